"""PPO and each GRPO variant solve a problem with a known optimum; with a mistake in sign or alignment they do not."""

import pytest
import torch
from rl_models import prompts, target_problem, target_reward

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionPPOConfig,
    LatentActionPPOTrainer,
    LatentActionRLOOConfig,
    LatentActionRLOOTrainer,
)
from latent_trl.trainer.rollout.rollout import Rollout

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "max_completion_length": 4,
    "logging_steps": 10,
    "beta": 0.0,
    "disable_tqdm": True,
    "learning_rate": 3e-3,
    "num_iterations": 2,
    "save_strategy": "no",
    "seed": 1,
}
GRPO = {"per_device_train_batch_size": 64, "num_generations": 16, "entropy_coef": 0.02, "max_steps": 150}
PPO = {"per_device_train_batch_size": 64, "value_learning_rate": 1e-2, "num_iterations": 4, "max_steps": 240}
OPTIMUM = 1.0


def share_of_optimum(folder, method: str, trainer_class=None, **options) -> float:
    """Mean reward of the last fifth of the rollouts, sampled, over the optimum."""
    model, tokenizer, letters = target_problem()
    if method == "ppo":
        config, trainer_class = LatentActionPPOConfig, trainer_class or LatentActionPPOTrainer
        options = {**COMMON, **PPO, **options}
    elif method == "rloo":
        config, trainer_class = LatentActionRLOOConfig, trainer_class or LatentActionRLOOTrainer
        options = {**COMMON, **GRPO, **options}
    else:
        config, trainer_class = LatentActionGRPOConfig, trainer_class or LatentActionGRPOTrainer
        options = {**COMMON, **GRPO, "preset": method, **options}
    trainer = trainer_class(
        model,
        target_reward(letters),
        config(str(folder), **options),
        train_dataset=prompts(64),
        processing_class=tokenizer,
    )
    trainer.train()
    name = "rewards/share_of_target/mean"
    history = [log[name] for log in trainer.state.log_history if log.get(name) is not None]
    last = history[-len(history) // 5 :]
    return sum(last) / len(last) / OPTIMUM


@pytest.mark.parametrize("method", ["ppo", "rloo", "grpo", "bnpo", "dr_grpo", "dapo"])
def test_known_optimum_is_reached_within_five_percent(method, tmp_path):
    assert share_of_optimum(tmp_path, method) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "luspo", "vespo"])
def test_other_losses_of_trl_learn(loss_type, tmp_path):
    high = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    assert share_of_optimum(tmp_path, None, loss_type=loss_type, **high) >= 0.7


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_truncated_law_learns_too(method, tmp_path):
    options = {"action_top_k": 4, "action_temperature": 0.9, "max_steps": 250}
    assert share_of_optimum(tmp_path, method, **options) >= 0.7


def wrong_sign(trainer_class):
    class WrongSign(trainer_class):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, {**inputs, "advantages": -inputs["advantages"]})

    return WrongSign


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["rloo", "reinforce++"])
def test_other_advantages_learn(estimator, tmp_path):
    assert share_of_optimum(tmp_path, None, advantage_estimator=estimator) >= 0.9


@pytest.mark.parametrize("method", ["ppo", "rloo", "grpo"])
def test_mutation_wrong_sign_is_caught(method, tmp_path):
    trainer_class = {"ppo": LatentActionPPOTrainer, "rloo": LatentActionRLOOTrainer}.get(
        method, LatentActionGRPOTrainer
    )
    assert share_of_optimum(tmp_path, method, wrong_sign(trainer_class), max_steps=60) < 0.5


@pytest.mark.parametrize("method", ["ppo", "grpo"])
@pytest.mark.parametrize("shift", [1, -1], ids=["late", "early"])
def test_mutation_off_by_one_alignment_is_caught(method, shift, tmp_path, monkeypatch):
    built = Rollout.of.__func__

    def shifted(cls, *args, **kwargs):
        rollout = built(cls, *args, **kwargs)
        rollout.action_ids = torch.roll(rollout.action_ids, shift, dims=1)
        return rollout

    monkeypatch.setattr(Rollout, "of", classmethod(shifted))
    assert share_of_optimum(tmp_path, method, max_steps=100) < 0.8
