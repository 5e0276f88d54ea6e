"""Numbers that go wrong are found in every trainer, named with a remedy, and stopped or passed over as asked."""

import logging
import math

import pytest
import torch
from every_trainer import KINDS, build
from learning_runs import changed, tensors
from transformers import TrainerCallback

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionPPOConfig,
    LatentActionSFTConfig,
    LatentActionSpaceConfig,
)
from latent_trl.trainer.run import health as health_module
from latent_trl.trainer.run.health import MOST_CONSTANT, MOST_SKIPPED, CollapseError, RunHealth
from latent_trl.trainer.space import trainer as space_trainer_module

CONFIGS = (LatentActionSpaceConfig, LatentActionSFTConfig, LatentActionGRPOConfig, LatentActionPPOConfig)
SOME = [pytest.param(kind, marks=[] if kind in ("sft", "ppo") else pytest.mark.slow) for kind in KINDS]


def start(kind: str, folder, steps: int = 4, **options):
    length = {"steps": steps}
    if kind == "space":
        length = {"stages": ["inverse_dynamics"], "inverse_dynamics_max_steps": steps}
    return build(kind, folder, **length, **{"save_strategy": "no", "logging_steps": 1, **options})


def spoil(trainer, steps, value: float = math.nan, gradient: bool = False):
    """Makes the loss of some steps, or its gradient alone, not finite."""
    name = "_compute_loss" if hasattr(trainer, "_compute_loss") else "compute_loss"
    check, spoilt = trainer._check_loss, {"now": False}

    def checked(loss, inputs):
        check(loss * value if spoilt["now"] and not gradient else loss, inputs)

    compute = getattr(trainer, name)

    def computed(*args, **kwargs):
        spoilt["now"] = trainer.state.global_step in steps
        loss = compute(*args, **kwargs)
        if spoilt["now"]:
            # The root of zero is finite, and its derivative is not.
            loss = loss + (loss - loss).abs().sqrt() if gradient else loss * value
        return loss

    trainer._check_loss = checked
    setattr(trainer, name, computed)


class Weights(TrainerCallback):
    """The trained tensors after each step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append(tensors(model))


def warnings(caplog) -> str:
    return " ".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("kind", SOME)
def test_an_update_that_is_not_finite_is_skipped(kind, gradient, tmp_path, caplog):
    trainer = start(kind, tmp_path, on_nonfinite="skip")
    spoil(trainer, [2], gradient=gradient)
    weights = Weights()
    trainer.add_callback(weights)
    trainer.train()
    assert changed(weights.after[1], weights.after[2]) == set()
    assert changed(weights.after[2], weights.after[3]) and changed(weights.after[0], weights.after[1])
    assert all(tensor.isfinite().all() for tensor in weights.after[-1].values() if tensor.is_floating_point())
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row.get("skipped_updates") for row in rows] == [None, None, 1.0, None]
    assert "The gradient became nan" in warnings(caplog) and "No parameter is changed by it." in warnings(caplog)


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
@pytest.mark.parametrize("gradient", [False, True])
def test_rl_stops_before_an_update_that_is_not_finite(kind, gradient, tmp_path):
    trainer = start(kind, tmp_path, save_strategy="steps")
    spoil(trainer, [2], math.inf, gradient=gradient)
    what = "gradient became nan" if gradient else "loss became -?inf"
    with pytest.raises(
        FloatingPointError, match=f"The {what} at step 2. .*checkpoint-2', is whole. Lower the learning"
    ):
        trainer.train()


def test_too_many_skipped_updates_in_a_row_stop_the_run(tmp_path):
    trainer = start("sft", tmp_path, steps=MOST_SKIPPED + 10, on_nonfinite="skip")
    spoil(trainer, range(3, 1000))
    with pytest.raises(FloatingPointError, match=f"at step {MOST_SKIPPED + 2}. {MOST_SKIPPED} updates in a row were"):
        trainer.train()


class Scaler:
    """What a gradient scaler is to the trainer, which only asks whether there is one."""


def test_a_gradient_scaler_may_overflow_now_and_then_but_not_for_ever(tmp_path):
    trainer = start("sft", tmp_path)
    trainer.accelerator.scaler = Scaler()
    trainer.args.fp16 = True
    for _ in range(MOST_SKIPPED - 1):
        assert trainer._get_grad_norm(trainer.model, torch.tensor(math.inf)) == math.inf
    trainer._get_grad_norm(trainer.model, torch.tensor(1.0))
    for _ in range(MOST_SKIPPED - 1):
        trainer._get_grad_norm(trainer.model, torch.tensor(math.inf))
    with pytest.raises(
        FloatingPointError, match="updates in a row were skipped. .*float16 overflows beyond 65504: use"
    ):
        trainer._get_grad_norm(trainer.model, torch.tensor(math.inf))


def test_states_of_a_half_precision_backbone_that_overflow(tmp_path):
    trainer = start("sft", tmp_path, trained_layers=["lm_head"])
    trainer.model.backbone.half()
    with torch.no_grad():
        trainer.model.backbone.model.language_model.norm.weight.fill_(6e4)
    with pytest.raises(
        FloatingPointError, match="overflowed. .*float16 overflows beyond 65504: use `bf16=True`, or load"
    ):
        trainer.train()


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_rollout_whose_probabilities_are_not_finite(kind, tmp_path):
    trainer = start(kind, tmp_path)
    with torch.no_grad():
        trainer.model.backbone.model.norm.weight[0] = math.inf
    message = "No code could be drawn at step 0.* The parameter 'backbone.model.norm.weight' is not finite."
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()


def test_states_of_a_batch_that_are_not_finite_are_named_with_their_rows(tmp_path):
    trainer = start("ppo", tmp_path)
    prepare = trainer._prepare_inputs

    def spoilt(inputs):
        batch = prepare(inputs)
        batch["context_states"][1, 2] = math.nan
        return batch

    trainer._prepare_inputs = spoilt
    with pytest.raises(
        FloatingPointError, match=r"loss became nan at step 0. In the batch, context states are not .* \[1\]"
    ):
        trainer.train()


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_reward_that_is_not_finite_is_left_out_when_asked(kind, tmp_path, caplog):
    def sometimes(completions, **columns):
        return [math.nan, math.inf, 1.0, 0.0][: len(completions)] + [0.5] * (len(completions) - 4)

    trainer = start(kind, tmp_path, reward=sometimes, on_nonfinite="skip")
    trainer.train()
    text = warnings(caplog)
    assert "'sometimes' returned nan for sample 0" in text and "returned inf for sample 1" in text
    assert "It counts as not scored." in text
    rows = [row for row in trainer.state.log_history if "reward" in row]
    assert rows and all(row["reward"] == pytest.approx(0.5) for row in rows)


# A rollout batch for every step.
EVERY_STEP = {"steps_per_generation": 1, "num_iterations": 1, "per_device_train_batch_size": 8}


def same(completions, **columns):
    return [0.25] * len(completions)


@pytest.mark.parametrize("kind", [pytest.param("grpo", marks=pytest.mark.slow), "ppo"])
def test_a_constant_reward_is_named(kind, tmp_path, caplog):
    start(kind, tmp_path / "warn", MOST_CONSTANT + 1, reward=same, **EVERY_STEP).train()
    text = warnings(caplog)
    assert text.count("constant reward") == 1 and "(0.25 on average), so that nothing is learned" in text
    caplog.clear()
    start(kind, tmp_path / "ignore", MOST_CONSTANT, reward=same, on_collapse="ignore", **EVERY_STEP).train()
    assert "constant reward" not in warnings(caplog)
    message = f"constant reward: at step {MOST_CONSTANT - 1}.*No checkpoint.*`on_collapse='stop'`"
    with pytest.raises(CollapseError, match=message):
        start(kind, tmp_path / "stop", MOST_CONSTANT, reward=same, on_collapse="stop", **EVERY_STEP).train()


def test_rewards_that_differ_between_prompts_teach_ppo_and_not_grpo(tmp_path, caplog):
    def of_prompt(prompts, **columns):
        return [float(prompt.endswith(tuple("02468"))) for prompt in prompts]

    start("ppo", tmp_path / "ppo", MOST_CONSTANT, reward=of_prompt, **EVERY_STEP).train()
    assert "constant reward" not in warnings(caplog)
    start("grpo", tmp_path / "grpo", MOST_CONSTANT, reward=of_prompt, **EVERY_STEP).train()
    assert "the rewards of each group have been equal" in warnings(caplog)


@pytest.mark.parametrize("kind", [pytest.param("grpo", marks=pytest.mark.slow), "ppo"])
def test_a_policy_without_entropy_is_named(kind, tmp_path, caplog):
    trainer = start(kind, tmp_path)
    with torch.no_grad():
        trainer.model.policy.head.weight.mul_(1e4)
    trainer.train()
    assert "no exploration: at step 1, the policy's choices have an entropy of" in warnings(caplog)
    assert "Raise `action_temperature`" in warnings(caplog)


def test_codes_that_collapse_in_rollouts(tmp_path, caplog, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(health_module, "MIN_PERPLEXITY", 16.5)
        start("grpo", tmp_path).train()
    assert "collapse: at step 1, the codes of rollouts have perplexity" in warnings(caplog)
    caplog.clear()
    start("grpo", tmp_path).train()
    assert "alarm" not in warnings(caplog)


def test_learning_stops_at_a_collapsed_codebook_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(space_trainer_module, "MIN_PERPLEXITY", 16.5)
    with pytest.raises(CollapseError, match="alarm, .*`on_collapse='stop'`"):
        start("space", tmp_path / "stop", 24, on_collapse="stop", logging_steps=2).train()


def test_what_was_noticed_is_kept_over_a_resumption():
    health = RunHealth("skip", "warn", "unused")
    health.collapse("collapse", "text", 3)
    health.skip_update("what", "remedy")
    again = RunHealth("skip", "warn", "unused")
    again.load_state(health.state())
    assert again.state() == health.state() and again.alarmed == ["collapse"]
    assert again.figures() == {"skipped_updates": 1.0} and again.figures() == {}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["on_nonfinite", "on_collapse"])
def test_unknown_choices_are_refused(config, name, tmp_path):
    if name == "on_collapse" and config is LatentActionSFTConfig:
        pytest.skip("SFT follows codes, and learns none.")
    with pytest.raises(ValueError, match=f"`{name}` must be one of .*'stop'.*, got 'panic'"):
        config(str(tmp_path), **{name: "panic"})
