"""A PPO run leaves the model as it would be without one: no hook, no attribute, no gradient that is held back."""

import copy

import pytest
import torch
from rl_models import prompts
from test_ppo_trainer import COMMON, build, letters, rollout

from latent_trl import LatentActionPPOConfig, LatentActionPPOTrainer

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks(model) -> dict[str, int]:
    return {f"{name}.{kind}": len(getattr(m, kind)) for name, m in model.named_modules() for kind in HOOKS}


@pytest.mark.parametrize("options", [{}, {"value_trains_policy_trunk": False}, {"value_warmup_steps": 2}], ids=str)
def test_a_model_can_be_copied_and_trained_again(tmp_path, options):
    first = build(tmp_path / "first", eval_strategy="steps", eval_steps=2, **options)
    model = first.model
    before, own = hooks(model), set(vars(model))
    first.train()
    assert hooks(model) == before
    assert "forward" not in vars(model) and set(vars(model)) <= own | {"training_report", "_is_accelerate_prepared"}
    twin = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    # What a second trainer's value loss does is its own affair.
    args = LatentActionPPOConfig(str(tmp_path / "second"), **{**COMMON, "beta": 0.0, "value_trains_policy_trunk": True})
    second = LatentActionPPOTrainer(
        twin, letters, args, train_dataset=prompts(12), processing_class=first.processing_class
    )
    with torch.no_grad():
        twin.value_head.head.weight.normal_()
    batch = rollout(second)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    second._compute_loss(second.model, batch).backward()
    assert max(p.grad.abs().max() for p in twin.policy.decoder_stack.parameters() if p.grad is not None) > 0
    second.model.zero_grad()
    second.train()


def test_the_coefficient_stays_positive_for_horizons_smaller_than_a_rollout(tmp_path):
    """Four completions, horizon 1, divergence 0: the plain formula would give 1 - 0.2 x 4 a rollout, and more."""
    trainer = build(
        tmp_path, kl_target=5.0, kl_horizon=1, max_steps=12, num_iterations=1, per_device_train_batch_size=8
    )
    trainer.train()
    coefficients = [log["ppo/kl_coef"] for log in trainer.state.log_history if "ppo/kl_coef" in log]
    assert len(coefficients) == 12 and all(value > 0 for value in coefficients)
    assert coefficients[1] == pytest.approx(0.05 / 2) and trainer.beta > 0
    ratios = [b / a for a, b in zip(coefficients, coefficients[1:], strict=False)]
    assert all(0.5 - 1e-9 <= ratio <= 2 + 1e-9 for ratio in ratios)
