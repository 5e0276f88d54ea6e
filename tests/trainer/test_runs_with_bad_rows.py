"""Runs of every trainer over broken rows: counted in the log, listed once, and of no weight in an evaluation."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from every_trainer import letters
from PIL import Image
from tiny_models import latent, latent_config, llama, make_tokenizer

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionPPOConfig,
    LatentActionPPOTrainer,
    LatentActionRLOOConfig,
    LatentActionRLOOTrainer,
    LatentActionSFTConfig,
    LatentActionSFTTrainer,
    LatentActionSpaceConfig,
    LatentActionSpaceTrainer,
    PlanBanditConfig,
    PlanBanditTrainer,
    PlanConfig,
    PlanModel,
    PlanSpaceConfig,
    PlanSpaceTrainer,
)
from latent_trl.data.rows import RowError

SHARED = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "max_steps": 4}
LEARNING = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 3}
RL = {**LEARNING, "max_completion_length": 4, "bf16": False, "num_generations": 2}
KINDS = {
    "space": (
        LatentActionSpaceTrainer,
        LatentActionSpaceConfig,
        {**LEARNING, "stages": ["policy"], "policy_max_steps": 4},
    ),
    "sft": (LatentActionSFTTrainer, LatentActionSFTConfig, LEARNING),
    "grpo": (LatentActionGRPOTrainer, LatentActionGRPOConfig, RL),
    "rloo": (LatentActionRLOOTrainer, LatentActionRLOOConfig, RL),
    "ppo": (LatentActionPPOTrainer, LatentActionPPOConfig, {k: v for k, v in RL.items() if k != "num_generations"}),
    "plan space": (
        PlanSpaceTrainer,
        PlanSpaceConfig,
        {
            "per_device_train_batch_size": 3,
            "max_completion_length": 6,
            "branch_min_prob": 0.005,
            "answers_per_prompt": 3,
            "eval_steps": 4,
            "early_stopping_patience": None,
        },
    ),
    "plan bandit": (
        PlanBanditTrainer,
        PlanBanditConfig,
        {"num_iterations": 2, "rollout_prompts": 5, "replay_batch_size": 8, "max_completion_length": 4},
    ),
}


def rows(count: int = 12, broken: tuple[int, ...] = ()) -> Dataset:
    asked = [None if i in broken else "what " * (1 + i % 3) + str(i) for i in range(count)]
    return Dataset.from_list([{"prompt": prompt, "completion": f"it is {i}"} for i, prompt in enumerate(asked)])


def build(kind: str, folder: Path, train, evaluated=None, on_bad_row: str = "skip", **options):
    trainer, config, own = KINDS[kind]
    args = config(str(folder), on_bad_row=on_bad_row, **{**SHARED, **own, **options})
    if kind.startswith("plan"):
        tiny = llama(num_hidden_layers=2)
        tiny.model.generation_config.eos_token_id = list(range(2, 140))
        model, tokenizer = PlanModel(tiny.model, PlanConfig(num_plans=4, depth=1, rank=2)), make_tokenizer()
    else:
        model, tiny = latent("llama", latent_config(use_projector=False, stage="policy"))
        tokenizer = tiny.processor
    rewards = {} if kind in ("space", "sft", "plan space") else {"reward_funcs": letters}
    return trainer(model, args=args, train_dataset=train, eval_dataset=evaluated, processing_class=tokenizer, **rewards)


def figures(metrics: dict) -> dict:
    clocks = ("runtime", "per_second", "preparation_time", "num_tokens")
    return {k: v for k, v in metrics.items() if k != "epoch" and not k.endswith(clocks)}


def evaluated(trainer, *sets) -> dict:
    trainer.evaluate(*sets)
    (found,) = [row for row in getattr(trainer, "history", None) or trainer.state.log_history][-1:]
    return {k: v for k, v in figures(found).items() if k != "step_time"}


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_rows_are_counted_in_the_log_and_listed_once(kind, tmp_path):
    trainer = build(kind, tmp_path, rows(broken=(2, 3, 7)), rows(5))
    trainer.train()
    logged = [row["bad_rows"] for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 4 and logged == sorted(logged) and logged[-1] == trainer.bad_rows.count() > 0
    entries = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert len({entry["row"] for entry in entries}) == len(entries) == logged[-1]
    assert {entry["row"] for entry in entries} <= {2, 3, 7} and all("prompt" in entry["reason"] for entry in entries)
    if kind == "space":
        assert [row["bad_rows"] for row in trainer.history if "loss" in row] == logged


@pytest.mark.parametrize("kind", KINDS)
def test_without_skipping_the_row_ends_the_run_before_its_first_step(kind, tmp_path):
    trainer = build(kind, tmp_path, rows(broken=(3,)), rows(5), on_bad_row="raise")
    with pytest.raises(RowError, match="Row 3: "):
        trainer.train()
    assert trainer.state.global_step == 0 and not (tmp_path / "bad_rows.jsonl").exists()
    trainer = build(kind, tmp_path, rows(), rows(5, broken=(4,)), on_bad_row="raise")
    with pytest.raises(RowError, match="Row 4 of `eval_dataset`: "):
        trainer.train()
    assert "bad_rows" not in str(trainer.state.log_history)


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_is_of_the_rows_that_are_there(kind, tmp_path):
    """Whatever batches they fall into; the row beside a broken one counts once."""
    broken = rows(7, broken=(0, 5, 6))
    trainer = build(kind, tmp_path, rows(), broken)
    whole = broken.select([1, 2, 3, 4])
    own = build(kind, tmp_path / "whole", rows(), whole)
    if kind.startswith("plan"):
        trainer.before_training()
        own.before_training()
    found, expected = evaluated(trainer), evaluated(own)
    assert found == pytest.approx(expected, rel=1e-5) and len(found) > 1
    assert evaluated(trainer) == found
    assert {(entry["data"], entry["row"]) for entry in trainer.bad_rows.listed()} == {
        ("eval_dataset", row) for row in (0, 5, 6)
    }
    if not kind.startswith("plan"):
        several = trainer.evaluate({"one": broken, "two": rows(3)})
        assert any(name.startswith("eval_one") for name in several)
    with pytest.raises(RowError, match="No row of `eval_dataset` can be used"):
        trainer.evaluate(rows(2, broken=(0, 1)))


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_several_sets_are_each_evaluated_as_they_are_with_workers_that_stay(kind, tmp_path):
    sets = {"one": rows(5, broken=(1,)), "two": rows(3)}
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    found = {}
    for name, extra in (("stay", options), ("go", {})):
        trainer = build(kind, tmp_path / name, rows(), sets, **extra)
        trainer.evaluate()
        found[name] = [figures(row) for row in trainer.state.log_history]
    assert found["stay"] == found["go"]
    one, two = ({k.replace(name, "set"): v for k, v in row.items()} for name, row in zip(sets, found["go"]))
    assert one.keys() == two.keys() and one != two


def test_a_second_epoch_and_a_resumed_run_list_nothing_anew(tmp_path):
    train = rows(broken=(2, 3))
    options = {"save_strategy": "steps", "save_steps": 4, "dataloader_num_workers": 2}
    build("sft", tmp_path, train, max_steps=8, **options).train()
    before = (tmp_path / "bad_rows.jsonl").read_text()
    assert before.count("\n") == 2
    build("sft", tmp_path, train, max_steps=16, **options).train(resume_from_checkpoint=True)
    assert (tmp_path / "bad_rows.jsonl").read_text() == before


def test_a_line_that_a_killed_run_left_half_written_is_passed_over(tmp_path):
    (tmp_path / "bad_rows.jsonl").write_text('{"data": "train_dataset", "row": 1, "reason": "a"}\n{"data": "tr\n')
    trainer = build("sft", tmp_path, rows(broken=(2,)))
    assert trainer.bad_rows.count() == 1
    trainer.train()
    assert {entry["row"] for entry in trainer.bad_rows.listed()} == {1, 2}


@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_conversations_of_the_anchor_are_looked_at_and_skipped_too(on_bad_row, tmp_path):
    model, tiny = latent("llama", latent_config(use_projector=False))
    args = LatentActionGRPOConfig(str(tmp_path), on_bad_row=on_bad_row, anchor_coef=0.1, **{**SHARED, **RL})
    trainer = LatentActionGRPOTrainer(
        model,
        letters,
        args,
        train_dataset=rows(),
        processing_class=tiny.processor,
        anchor_dataset=rows(20, broken=(4,)),
    )
    if on_bad_row == "raise":
        with pytest.raises(RowError, match="Row 4 of `anchor_dataset`: "):
            trainer.train()
        return
    trainer.train()
    assert [(entry["data"], entry["row"]) for entry in trainer.bad_rows.listed()] == [("anchor_dataset", 4)]
    assert trainer.state.log_history[-2]["bad_rows"] == 1.0


@pytest.mark.parametrize("kind", ["sft", "grpo", "plan bandit"])
def test_what_the_processor_alone_refuses_is_found_before_the_first_step(kind, tmp_path):
    """A picture that opens, and whose sides are too unlike for Qwen's processor."""
    thin = [{"prompt": [{"role": "user", "content": "?"}], "images": [Image.new("RGB", (4000, 4))]}]
    fine = [{"prompt": [{"role": "user", "content": "?"}], "images": [Image.new("RGB", (32, 32))]}] * 3
    data = [{**row, "completion": [{"role": "assistant", "content": "it is"}]} for row in [*fine, *thin]]
    trainer, config, own = KINDS[kind]
    args = config(str(tmp_path), **{**SHARED, **own})
    if kind == "plan bandit":
        from tiny_models import qwen2_5_vl

        tiny = qwen2_5_vl()
        model = PlanModel(tiny.model, PlanConfig(num_plans=4, depth=1, rank=2))
    else:
        model, tiny = latent("qwen2_5_vl", latent_config(stage="policy"))
    rewards = {} if kind == "sft" else {"reward_funcs": letters}
    run = trainer(model, args=args, train_dataset=Dataset.from_list(data), processing_class=tiny.processor, **rewards)
    with pytest.raises(RowError, match=r"Row 3: the processor cannot take its images of \[\(4000, 4\)\] pixels"):
        run.train()
    assert run.state.global_step == 0
