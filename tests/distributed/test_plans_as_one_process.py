"""Trainers of plans on two processes give what one gives with the same rows, resume exactly, and end together."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from datasets import Dataset

sys.path[:0] = [str(Path(__file__).parent.parent / "plans")]

import test_plan_policy as policy  # noqa: E402
import test_plan_trainers as plans  # noqa: E402
import test_switch_learning as switching  # noqa: E402
from engines import has_deepspeed, launch  # noqa: E402

from latent_trl.plans.scoring import log_likelihoods  # noqa: E402
from latent_trl.rewards.calling import RewardError  # noqa: E402
from latent_trl.trainer.plans import space_trainer  # noqa: E402

# Without its large epsilon, Adam turns rounding errors of gradients near zero into whole steps.
EXACT = {"adam_epsilon": 1e-3, "max_grad_norm": 0.5, "logging_steps": 1}
SAVES = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
RL = {**EXACT, **SAVES, "max_steps": 10, "rollout_prompts": 5, "num_iterations": 4, "ceiling_prompts": 3}
# 5 prompts and 7 of an evaluation cannot be shared out evenly.
KINDS = {
    "bandit": {"replay_batch_size": 8},
    "thompson": {"exploration": "thompson", "replay_batch_size": 8},
    "grpo": {"entropy_coef": 0.01},
    "without_replacement": {"exploration": "without_replacement"},
    "ppo": {"num_generations": 1},
    "grpo, switch": {"max_completion_length": 5},
    "ppo, switch": {"num_generations": 1, "max_completion_length": 5},
    "bandit, reads plans": {"replay_batch_size": 8},
    "bandit, answers": {"replay_batch_size": 3},
    "shared, answers": {"replay_batch_size": 3, "share_rewards": True},
    # One process has no prompt of a batch.
    "alone, answers": {"replay_batch_size": 3, "share_rewards": True, "rollout_prompts": 1},
}
FIGURES = ("reward", "reward_std", "entropy", "clip_ratio", "plans/entropy", "ppo/value_loss", "ceiling/reward")
FIGURES += ("switch/rate", "switch/entropy")


def build(kind: str, folder: Path, rows: int):
    """A trainer; `rows` a process, where the rows of a batch are counted by the process."""
    if kind.startswith("space"):
        model = policy.segmented_model() if kind == "space, segments" else plans.plan_model(num_plans=5)
        if kind == "space, segments":
            model.backbone.generation_config.eos_token_id = list(range(70, 140))
        options = {**EXACT, "per_device_train_batch_size": rows, "max_steps": 6, "eval_steps": 3, "save_steps": 3}
        return plans.space_trainer(folder, model, reward_funcs=plans.even_length, **options, save_total_limit=None)
    if kind.endswith(", switch"):
        return policy.trainer(
            kind.split(",")[0], folder, switching.switched_model(), by_length, **{**RL, **KINDS[kind]}
        )
    held = kind.endswith(", answers")
    reads = kind.endswith(", reads plans")
    name = "bandit" if held or reads or kind == "thompson" else {"without_replacement": "grpo"}.get(kind, kind)
    model = plans.plan_model() if held else policy.segmented_model(chooser_reads_plans=reads)
    return policy.trainer(name, folder, model, by_length, **{**RL, **KINDS[kind]})


def by_length(completion_ids, **columns):
    return [float(sum(ids) % 7) / 7 for ids in completion_ids]


def ended(trainer) -> dict:
    """What a run ended with."""
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    replay = getattr(trainer, "replay", None)
    kept = [] if replay is None else [replay.prompts, replay.said, replay.plans, replay.rewards]
    logs = [
        {name: row[name] for name in row if name in ("loss", *FIGURES) or name.startswith("eval_")}
        for row in trainer.state.log_history
    ]
    timed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    logs = [{name: value for name, value in row.items() if name not in timed} for row in logs]
    return {"weights": trained, "replay": kept, "logs": logs}


def train_all(folder: str, kinds: list[str], rows: int) -> None:
    """Runs of all kinds, one after the other, and each once more from the checkpoint of its third step."""
    torch.set_num_threads(1)
    for kind in kinds:
        found = []
        for resume in (None, str(Path(folder) / kind / "checkpoint-3")):
            trainer = build(kind, Path(folder) / kind, rows)
            before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
            trainer.train(resume_from_checkpoint=resume)
            found.append(ended(trainer))
            assert max((p - before[name]).abs().max() for name, p in found[0]["weights"].items()) > 1e-4
        torch.save(found, Path(folder) / kind / f"ended_{trainer.accelerator.process_index}.pt")


def check_same(got: dict, expected: dict) -> None:
    for name, tensor in expected["weights"].items():
        assert (got["weights"][name] - tensor).abs().max() < 1e-5, name
    assert got["replay"] == expected["replay"]
    assert len(got["logs"]) == len(expected["logs"])
    for own, whole in zip(got["logs"], expected["logs"], strict=True):
        assert own == pytest.approx(whole, abs=2e-4)


def compare(folder: Path, kinds: list[str]) -> None:
    debug_launcher(train_all, (str(folder / "two"), kinds, 2), num_processes=2)
    for kind in kinds:
        whole = build(kind, folder / "one" / kind, 4)
        whole.train()
        expected = ended(whole)
        for rank in (0, 1):
            got, again = torch.load(folder / "two" / kind / f"ended_{rank}.pt", weights_only=True)
            check_same(got, expected)
            for name, tensor in got["weights"].items():
                assert torch.equal(again["weights"][name], tensor)
            assert again["replay"] == got["replay"] and again["logs"] == got["logs"]
        # One process goes on with what two have written.
        rest = build(kind, folder / "two" / kind, 4)
        rest.train(resume_from_checkpoint=str(folder / "two" / kind / "checkpoint-3"))
        check_same(ended(rest), expected)
        names = {path.name for path in (folder / "two" / kind / "checkpoint-3").iterdir()}
        if not kind.startswith("space"):
            assert {"replay_states_0.safetensors", "replay_states_1.safetensors"} <= names


@pytest.mark.distributed
def test_two_processes_are_one(tmp_path):
    compare(tmp_path, ["space", "ppo", "bandit, answers", "shared, answers", "alone, answers"])


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_are_one_with_other_settings(tmp_path):
    switches = ["grpo, switch", "ppo, switch"]
    compare(
        tmp_path,
        ["space, segments", "bandit", "bandit, reads plans", "thompson", "grpo", "without_replacement", *switches],
    )


def failing(completion_ids, trainer_state=None, **columns):
    """Raises on the second process, at the second batch of rollouts."""
    second = torch.distributed.get_rank() == 1
    if second and trainer_state is not None and trainer_state.global_step == 4:
        raise ConnectionError("the judge is gone")
    return by_length(completion_ids)


def fails_on_the_second(model, encoder, prompts, answers, batch_size):
    if torch.distributed.get_rank() == 1:
        raise MemoryError("no room")
    return log_likelihoods(model, encoder, prompts, answers, batch_size)


def fail(folder: str) -> None:
    torch.set_num_threads(1)
    told = []
    options = {**RL, "measure_ceiling": False}
    try:
        policy.trainer("bandit", folder, plans.plan_model(), failing, **options).train()
    except RewardError as error:
        told.append(str(error))
    # A row that cannot be read, which the second process meets.
    rows = Dataset.from_list([{"prompt": "what"}, {"prompt": "what is"}, {"prompt": "what " * 40}])
    try:
        options = {"max_prompt_length": 10, "num_iterations": 1, "rollout_prompts": 3}
        trainer = policy.trainer("grpo", f"{folder}/rows", plans.plan_model(), rows=rows, **options)
        trainer.bad_rows.preflight = lambda *_, **__: {}
        trainer.drawn = lambda batch: [0, 1, 2]
        trainer.train()
    except ValueError as error:
        told.append(str(error))
    scored, space_trainer.log_likelihoods = space_trainer.log_likelihoods, fails_on_the_second
    try:
        plans.space_trainer(f"{folder}/space", **EXACT, per_device_train_batch_size=2).train()
    except (MemoryError, RuntimeError) as error:
        told.append(f"{type(error).__name__}: {error}")
    space_trainer.log_likelihoods = scored
    for options in ({**policy.GROWING, "reward": by_length},):
        try:
            policy.trainer("bandit", f"{folder}/growing", **options)
        except ValueError as error:
            told.append(str(error))
    torch.save(told, Path(folder) / f"told_{torch.distributed.get_rank()}.pt")


@pytest.mark.distributed
def test_all_processes_end_with_the_error_of_one(tmp_path):
    debug_launcher(fail, (str(tmp_path),), num_processes=2)
    (judge, row, space, growth), (own_judge, own_row, own_space, own_growth) = (
        torch.load(tmp_path / f"told_{rank}.pt") for rank in (0, 1)
    )
    assert own_space == "MemoryError: no room" and space == f"RuntimeError: On process 1: {own_space}"
    assert own_judge.startswith(
        "The reward function 'failing' raised ConnectionError: the judge is gone on sample 0 of "
    )
    assert judge == f"On process 1: {own_judge}"
    assert own_row.startswith("Row 2: its prompt has 200 tokens") and row == f"On process 1: {own_row}"
    assert growth == own_growth and growth.startswith("`grow_plans=2` changes what is trained, which DDP cannot follow")
    assert (tmp_path / "checkpoint-3" / "replay_states_1.safetensors").is_file()


def refuse(folder: str) -> None:
    for kind in ("space", "bandit, answers"):
        try:
            build(kind, Path(folder) / kind, 2)
        except ValueError as error:
            assert str(error).startswith("Plans are trained by DDP alone, and this run is under "), error
        else:
            raise AssertionError(kind)
    (Path(folder) / f"refused_{torch.distributed.get_rank()}").touch()


@pytest.mark.distributed
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("fsdp2", marks=pytest.mark.slow),
        *(
            pytest.param(name, marks=[pytest.mark.slow, pytest.mark.skipif(not has_deepspeed(), reason="no DeepSpeed")])
            for name in ("zero2", "zero3")
        ),
    ],
)
def test_engines_that_shard_are_refused(engine, tmp_path):
    launch(engine, refuse, str(tmp_path))
    assert {path.name for path in tmp_path.glob("refused_*")} == {"refused_0", "refused_1"}
