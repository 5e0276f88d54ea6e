"""`target_kl` ends the epochs over a rollout once the policy has moved too far; the next rollout trains again."""

import pytest
import torch
from test_grpo_resume import SaveAt, assert_identical, logs, states
from test_grpo_resume import build as build_resumable
from test_ppo_trainer import build
from transformers import TrainerCallback

from latent_trl import LatentActionPPOConfig


class Weights(TrainerCallback):
    """The policy's head after each step."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if not self.seen:
            self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        trained = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
        self.seen.append(torch.cat(trained).clone())


def moved(folder, **options) -> tuple[list[bool], list[dict]]:
    """Whether each step moved a parameter, and what it logged."""
    weights = Weights()
    trainer = build(folder, num_iterations=4, max_steps=8, weight_decay=0.1, **options)
    trainer.add_callback(weights)
    trainer.train()
    pairs = zip(weights.seen, weights.seen[1:], strict=False)
    return [not torch.equal(a, b) for a, b in pairs], [log for log in trainer.state.log_history if "loss" in log]


def test_updates_that_are_left_out_move_nothing(tmp_path):
    assert moved(tmp_path / "all")[0] == [True] * 8
    steps, rows = moved(tmp_path / "some", target_kl=1e-6)
    # The first update of a rollout has no divergence, and the second sees that of the first.
    assert steps == [True, True, False, False] * 2
    assert [row["ppo/skipped"] for row in rows] == [0, 0, 1, 1] * 2
    assert all(row["ppo/approx_kl"] > 1e-6 for row in (rows[1], rows[5]))
    steps, rows = moved(tmp_path / "far", target_kl=1e6)
    assert steps == [True] * 8 and not any(row["ppo/skipped"] for row in rows)


def test_epochs_of_several_minibatches_end_together(tmp_path):
    steps, _ = moved(tmp_path, target_kl=1e-9, steps_per_generation=2, per_device_train_batch_size=4)
    # 2 minibatches, 4 epochs: the policy has moved before the second minibatch is seen.
    assert steps == [True, True] + [False] * 6


@pytest.mark.parametrize("step", [2, 3, 4, 5])
def test_a_run_that_is_resumed_between_skips_is_the_uninterrupted_one(step, tmp_path):
    options = {"num_iterations": 4, "target_kl": 1e-6}
    whole = build_resumable("ppo", tmp_path / "whole", SaveAt(step), **options)
    whole.train()
    build_resumable("ppo", tmp_path / "cut", SaveAt(step, stop=True), **options).train()
    resumed = build_resumable("ppo", tmp_path / "cut", None, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
    assert any(log.get("ppo/skipped") for log in logs(whole))
    assert_identical(states(resumed), states(whole))
    assert logs(resumed) == logs(whole)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_it_must_be_positive(value):
    with pytest.raises(ValueError, match="`target_kl` must be positive"):
        LatentActionPPOConfig("unused", use_cpu=True, bf16=False, target_kl=value)
