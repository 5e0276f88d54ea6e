"""The trainers of plans: what they learn, report, refuse, and that a resumed run is the same run."""

import copy
import logging
import math

import pytest
import torch
from datasets import Dataset
from test_branching import picture_rows
from tiny_models import llama, make_tokenizer

from latent_trl import PlanBanditConfig, PlanBanditTrainer, PlanConfig, PlanModel, PlanSpaceConfig, PlanSpaceTrainer
from latent_trl.data.prompts import PromptEncoder
from latent_trl.rewards.calling import RewardError
from latent_trl.trainer.plans.choosing import perturbed
from latent_trl.trainer.plans.replay import Replay
from latent_trl.trainer.plans.report import PlanReport

LENGTH = 3
QUIET = {"use_cpu": True, "disable_tqdm": True}


@pytest.fixture(autouse=True)
def warnings_are_heard(caplog):
    logger = logging.getLogger("transformers")
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before


def short_backbone():
    """A tiny model that always ends an answer after one token or two: the end follows every other letter."""
    tiny = llama(num_hidden_layers=2)
    tiny.model.generation_config.eos_token_id = list(range(2, 140))
    return tiny.model


def plan_model(num_plans=4, **options):
    return PlanModel(short_backbone(), PlanConfig(num_plans=num_plans, depth=1, rank=2, **options))


def prompts(count=12):
    return Dataset.from_list([{"prompt": "what " * (1 + i % 3) + str(i), "number": i} for i in range(count)])


def space_args(folder, **options):
    fields = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "max_completion_length": 6,
        "branch_min_prob": 0.005,
        "answers_per_prompt": 3,
        "early_stopping_patience": None,
    }
    return PlanSpaceConfig(str(folder), **{**QUIET, **fields, **options})


def space_trainer(folder, model=None, rows=None, **options):
    rewards = options.pop("reward_funcs", None)
    fluent = options.pop("is_fluent", None)
    return PlanSpaceTrainer(
        model or plan_model(),
        space_args(folder, **options),
        rows or prompts(),
        prompts(5),
        make_tokenizer(),
        reward_funcs=rewards,
        is_fluent=fluent,
    )


def even_length(completions, **columns):
    return [float(len(text) % 2 == 0) for text in completions]


def bandit_args(folder, **options):
    fields = {
        "max_steps": 8,
        "num_iterations": 4,
        "rollout_prompts": 5,
        "num_generations": 2,
        "replay_batch_size": 8,
        "logging_steps": 1,
        "max_completion_length": 4,
        "save_strategy": "no",
    }
    return PlanBanditConfig(str(folder), **{**QUIET, **fields, **options})


def bandit_trainer(folder, model=None, reward=even_length, rows=None, **options):
    return PlanBanditTrainer(
        model or plan_model(), reward, bandit_args(folder, **options), rows or prompts(), prompts(5), make_tokenizer()
    )


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# The space


def test_plans_come_to_say_the_alternatives(tmp_path):
    model = PlanModel(short_backbone(), PlanConfig(num_plans=4, depth=0, rank=8))
    options = {"max_steps": 40, "eval_steps": 40, "save_steps": 40, "learning_rate": 2e-2, "logging_steps": 5}
    trainer = space_trainer(tmp_path, model, prompts(6), per_device_train_batch_size=6, **options)
    before = trainer.evaluate(trainer.train_dataset)
    trainer.train()
    after = trainer.evaluate(trainer.train_dataset)
    assert after["eval_coverage"] > before["eval_coverage"] + 0.2
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    gains = [row["assignment/gain"] for row in trainer.state.log_history if "assignment/gain" in row]
    assert gains[-1] > gains[0] > 0
    assert all(parameter.grad is None for parameter in trainer.model.backbone.parameters())


def test_learning_stops_when_the_best_is_not_surpassed(tmp_path):
    options = {"max_steps": 50, "early_stopping_patience": 2, "early_stopping_threshold": 2.0}
    trainer = space_trainer(tmp_path, **options, load_best_model_at_end=True, save_total_limit=5)
    trainer.train()
    assert trainer.state.global_step == 6
    best = PlanModel.from_pretrained(trainer.state.best_model_checkpoint, backbone=short_backbone())
    for name, tensor in best.plans.state_dict().items():
        assert torch.equal(tensor, trainer.model.plans.state_dict()[name])


def test_a_resumed_space_is_the_same(tmp_path):
    options = {"save_total_limit": None}
    whole = space_trainer(tmp_path / "whole", **options)
    whole.train()
    part = space_trainer(tmp_path / "part", **options)
    part.args.max_steps = 2
    part.train()
    rest = space_trainer(tmp_path / "part", **options)
    rest.train(resume_from_checkpoint=True)
    assert losses(rest) == losses(whole)
    for name, tensor in whole.model.plans.state_dict().items():
        assert torch.equal(tensor, rest.model.plans.state_dict()[name])


def test_the_report_is_counted_by_hand():
    nan = math.nan
    report = PlanReport(
        prompts=["p", "q"],
        texts=[["a", "b", "a"], ["c", "c", "c"]],
        own=["a", "d"],
        rewards=torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.25, nan]]),
        own_rewards=torch.tensor([0.0, 1.0]),
        alternatives=[["a", "b", "e", "f"], ["d", "c"]],
        is_fluent=lambda text: text in "ab",
    )
    assert report.metrics() == pytest.approx(
        {
            "distinct": 1.5,
            "coverage": 0.5,
            "ceiling": 0.75,
            "random_plan": 1.75 / 5,
            "best_single_plan": 0.625,
            "backbone": 0.5,
            "fluent": 0.5,
            "fluent_backbone": 0.5,
        }
    )
    table = report.table().splitlines()
    assert table[0] == "| plan | reward | most often | p | q |"
    assert table[3] == "| 0 | 0.250 | a (1) | a | c |" and len(table) == 6


def test_evaluations_tell_ceiling_and_table(tmp_path):
    trainer = space_trainer(tmp_path, reward_funcs=even_length, is_fluent=lambda text: True)
    figures = trainer.evaluate()
    assert trainer.args.metric_for_best_model == "ceiling"
    assert figures["eval_random_plan"] <= figures["eval_best_single_plan"] <= figures["eval_ceiling"] <= 1
    assert figures["eval_fluent"] == 1.0
    assert (tmp_path / "plan_report.md").read_text(encoding="utf-8") == trainer.report.table()


def test_a_space_that_gains_nothing_sounds_an_alarm(tmp_path, caplog):
    trainer = space_trainer(tmp_path, reward_funcs=lambda completions, **_: [1.0] * len(completions))
    trainer.train()
    assert "alarm: the ceiling over plans (1.000) is no better than the best single answer" in caplog.text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"branch_min_prob": 0.99}, "one answer to each of the 12 prompts"),
        ({"max_completion_length": 1}, "no answer of at most `max_completion_length=1`.*segment='sentence'"),
        ({"model": "many"}, r"400 plans, and the alternatives to all prompts have \d+ different texts"),
    ],
)
def test_prompts_that_teach_no_plans_are_refused_before_learning(tmp_path, options, message):
    if "model" in options:
        options = {"model": plan_model(400)}
    if "max_completion_length" in options:
        backbone = llama(num_hidden_layers=2).model
        options = {**options, "model": PlanModel(backbone, PlanConfig(num_plans=4, depth=1))}
    trainer = space_trainer(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"eval_dataset": None}, "`eval_dataset` must be given"),
        ({"train_dataset": None}, "`train_dataset` must be given"),
        ({"train_dataset": []}, "`train_dataset` is empty"),
        ({"train_dataset": [{"messages": []}]}, r"columns \['messages'\]; it needs `prompt`"),
        ({"train_dataset": iter([])}, "has no length"),
        ({"metric": "ceiling"}, "needs `reward_funcs`"),
        ({"answers_per_prompt": 5}, "`answers_per_prompt` is 5, and there are 4 plans"),
        ({"answers_per_prompt": 1}, "`answers_per_prompt` must be at least 2"),
        ({"assignment_temperature": 0.0}, "`assignment_temperature` must be above 0"),
    ],
)
def test_a_space_that_cannot_be_learned_is_refused(tmp_path, change, message):
    data = {"train_dataset": prompts(), "eval_dataset": prompts(3)}
    data |= {name: change.pop(name) for name in list(change) if name in data}
    if "metric" in change:
        change = {"metric_for_best_model": change["metric"]}
    with pytest.raises(ValueError, match=message):
        PlanSpaceTrainer(plan_model(), space_args(tmp_path, **change), processing_class=make_tokenizer(), **data)


def test_a_bare_backbone_is_no_plan_model(tmp_path):
    with pytest.raises(TypeError, match=r"`model` must be a PlanModel.*PlanModel\(backbone\)"):
        space_trainer(tmp_path, model=short_backbone())


def test_no_token_is_written(tmp_path):
    """Trainer's own checkpoints would have its arguments as a pickle that holds the token."""
    trainer = space_trainer(tmp_path / "run", hub_token="hf_" + "a" * 34)
    trainer.train()
    trainer.save_model(tmp_path / "end")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.json" for path in files)
    assert not any(b"hf_aaaa" in path.read_bytes() for path in files)


def test_the_processing_class_that_was_saved_is_used_again(tmp_path):
    """Not that of the backbone, which may have another chat template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}own {{ m['content'] }}{% endfor %}"
    PlanSpaceTrainer(plan_model(), space_args(tmp_path), prompts(), prompts(5), tokenizer).save_model(tmp_path / "end")
    model = PlanModel.from_pretrained(tmp_path / "end", backbone=short_backbone())
    bandit = PlanBanditTrainer(model, even_length, bandit_args(tmp_path / "bandit"), prompts())
    assert bandit.encoder.processing_class.chat_template == tokenizer.chat_template


def test_arguments_of_another_trainer_are_refused(tmp_path):
    with pytest.raises(TypeError, match="`args` is a PlanSpaceConfig, and this trainer takes a `PlanBanditConfig`"):
        PlanBanditTrainer(plan_model(), even_length, space_args(tmp_path), prompts(), processing_class=make_tokenizer())


def test_an_earlier_run_is_not_mixed_up_with_a_new_one(tmp_path):
    space_trainer(tmp_path).train()
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        space_trainer(tmp_path).train()


def test_pictures_are_learned_from(tmp_path, make_tiny):
    tiny = make_tiny("llava")
    tiny.model.generation_config.eos_token_id = list(range(10, 140))
    model = PlanModel(tiny.model, PlanConfig(num_plans=3, depth=1))
    rows = picture_rows()
    trainer = PlanSpaceTrainer(
        model, space_args(tmp_path, max_steps=2, per_device_train_batch_size=2), rows, rows, tiny.processor
    )
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    bandit = PlanBanditTrainer(model, even_length, bandit_args(tmp_path / "b", max_steps=2), rows, rows, tiny.processor)
    bandit.train()
    assert all(math.isfinite(loss) for loss in losses(bandit))


# The bandit


def test_plans_are_tried_without_replacement_and_by_their_law():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(40_000, -1)
    found = perturbed(logits, 2.0, generator).topk(2, dim=1).indices
    assert (found[:, 0] != found[:, 1]).all()
    law = (logits[0] / 2).softmax(0)
    first = torch.bincount(found[:, 0], minlength=4) / len(found)
    torch.testing.assert_close(first, law, atol=0.01, rtol=0)
    pair = ((found[:, 0] == 2) & (found[:, 1] == 1)).float().mean().item()
    assert pair == pytest.approx((law[2] * law[1] / (1 - law[2])).item(), abs=0.01)


def test_all_prompts_are_drawn_before_any_is_again(tmp_path):
    trainer = bandit_trainer(tmp_path, rows=prompts(10))
    drawn = [number for batch in range(4) for number in trainer.drawn(batch)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]


def test_rewards_beyond_probabilities_are_scaled():
    replay = Replay()
    for reward in (-3.0, 1.0, 5.0):
        replay.add(0, 0, reward)
    assert replay.targets().tolist() == [0.0, 0.5, 1.0]
    replay.rewards = [0.25, 1.0]
    assert replay.targets().tolist() == [0.25, 1.0]
    replay.rewards = [7.0, 7.0]
    assert replay.targets().tolist() == [0.5, 0.5]


def test_the_bandit_finds_the_plan_of_each_prompt(tmp_path):
    """The reward is 1 under one plan, which depends on the prompt, and plans are told by what they say."""
    model = plan_model(init_std=2.0)
    encoder = PromptEncoder(make_tokenizer())
    rows = prompts(12)
    encoded = [encoder({"_row": i, **row}) for i, row in enumerate(rows)]
    said = []
    for plan in range(4):
        ids = model.answers(encoder, encoded, [plan] * 12, 4, [2]).token_ids
        said.append([make_tokenizer().decode(one, skip_special_tokens=True).strip() for one in ids])
    right = {row["number"]: said[row["number"] % 4][i] for i, row in enumerate(rows)}

    def reward(completions, number, **columns):
        return [float(text == right[n]) for text, n in zip(completions, number)]

    model.backbone.generation_config.eos_token_id = 2
    options = {"max_steps": 160, "num_iterations": 10, "rollout_prompts": 12, "replay_batch_size": 64}
    args = bandit_args(tmp_path, **options, exploration_temperature=4.0)
    trainer = PlanBanditTrainer(model, reward, args, rows, rows, make_tokenizer())
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_ceiling"] == before["eval_ceiling"] == 1.0
    assert before["eval_reward"] < 0.7 and after["eval_reward"] == 1.0


def test_a_resumed_bandit_is_the_same(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 10}
    whole = bandit_trainer(tmp_path / "whole", **options)
    whole.train()
    part = bandit_trainer(tmp_path / "part", **options)
    part.args.max_steps = 6
    part.train()
    rest = bandit_trainer(tmp_path / "part", **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"))
    assert losses(rest) == losses(whole)
    assert (rest.replay.plans, rest.replay.rewards) == (whole.replay.plans, whole.replay.rewards)
    for name, tensor in whole.model.chooser.state_dict().items():
        assert torch.equal(tensor, rest.model.chooser.state_dict()[name])


def test_a_checkpoint_of_a_killed_bandit_is_passed_over(tmp_path, monkeypatch):
    """Killed between the model's files and the rollouts, it has the checkpoint before to go on from."""
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 9, "save_total_limit": 1}
    whole = bandit_trainer(tmp_path / "whole", **options)
    whole.train()
    folder, save = tmp_path / "part", Replay.save

    def killed(replay, target):
        if target.name == "checkpoint-6":
            raise KeyboardInterrupt
        save(replay, target)

    with monkeypatch.context() as patched:
        patched.setattr(Replay, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            bandit_trainer(folder, **options).train()
    assert (folder / "checkpoint-6" / "plan_config.json").is_file()
    rest = bandit_trainer(folder, **options)
    rest.train(resume_from_checkpoint=True)
    assert losses(rest) == losses(whole)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-9"]


def test_without_a_whole_checkpoint_nothing_is_resumed(tmp_path):
    with pytest.raises(ValueError, match="holds no whole checkpoint. Leave it out to start anew"):
        space_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_the_bandit_leaves_the_plans_alone_and_its_choice_is_saved(tmp_path):
    trainer = bandit_trainer(tmp_path)
    before = copy.deepcopy(trainer.model.plans.state_dict())
    trainer.train()
    for name, tensor in trainer.model.plans.state_dict().items():
        assert torch.equal(tensor, before[name])
    trainer.save_model(tmp_path / "end")
    again = PlanModel.from_pretrained(tmp_path / "end", backbone=short_backbone())
    inputs = llama().text_inputs
    assert torch.equal(again.generate(**inputs), trainer.model.generate(**inputs))


def test_what_was_not_scored_is_not_learned_from(tmp_path):
    def some(completions, number, **columns):
        return [None if n % 2 else 1.0 for n in number]

    trainer = bandit_trainer(tmp_path, reward=some)
    trainer.train()
    assert trainer.replay.prompts and all(number % 2 == 0 for number in trainer.replay.prompts)


def test_a_bandit_at_the_ceiling_says_so(tmp_path, caplog):
    bandit_trainer(tmp_path, reward=lambda completions, **_: [1.0] * len(completions)).train()
    assert "stands at the ceiling over plans (1.000)" in caplog.text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_generations": 5}, "`num_generations` is 5, and there are 4 plans"),
        ({"num_iterations": 0}, "`num_iterations` must be at least 1"),
        ({"exploration_temperature": 0.0}, "`exploration_temperature` must be above 0"),
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` must be 1"),
    ],
)
def test_a_bandit_that_cannot_run_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        bandit_trainer(tmp_path, **options)


def test_rewards_that_fail_are_named(tmp_path):
    with pytest.raises(RewardError, match="nothing_good"):
        bandit_trainer(tmp_path, reward=nothing_good).train()
    with pytest.raises(ValueError, match="could score any of the 10 rollouts"):
        bandit_trainer(tmp_path, reward=lambda completions, **_: [None] * len(completions)).train()


def nothing_good(completions, **columns):
    return ["good"] * len(completions)
