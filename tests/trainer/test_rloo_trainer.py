"""The RLOO trainer: what it refuses, what it logs, and that nothing of GRPO's loss is left in it."""

import pytest
import torch
from every_trainer import build
from rl_models import prompts
from tiny_models import latent, latent_config

from latent_trl import LatentActionRLOOConfig, LatentActionRLOOTrainer


def config(**options):
    return LatentActionRLOOConfig("unused", use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dapo"},
        {"importance_sampling_level": "sequence"},
        {"scale_rewards": "none"},
        {"top_entropy_quantile": 0.5},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"off_policy_mask_threshold": 0.5},
        {"use_bias_correction_kl": False},
        {"preset": "dapo"},
        {"advantage_estimator": "grpo"},
        {"reward_clip_range": (1.0, 1.0)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_are_not_rloos_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}"):
        config(**options)


def test_defaults_are_trls():
    args = config()
    assert (args.beta, args.num_generations, args.normalize_advantages, args.reward_clip_range) == (
        0.05,
        2,
        False,
        None,
    )
    assert (args.advantage_estimator, args.scale_rewards) == ("rloo", "none")
    assert config(normalize_advantages=True).scale_rewards == "batch"


def test_a_run_learns_saves_and_logs(tmp_path):
    trainer = build("rloo", tmp_path, 4, logging_steps=1)
    before = trainer.model.policy.head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.model.policy.head.weight, before)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4 and {"kl", "reward", "entropy", "clip_ratio/region_mean"} <= logs[0].keys()
    assert (tmp_path / "checkpoint-4").is_dir()
    card = (trainer._name, trainer._paper["id"])
    assert card == ("Latent-action RLOO", "2402.14740")


def test_a_completion_without_a_reward_teaches_nothing(tmp_path):
    def one_of_four(completions, **columns):
        return [None, 1.0, None, None]

    model, tiny = latent("llama", latent_config(use_projector=False))
    args = LatentActionRLOOConfig(
        str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=4, max_completion_length=3, beta=0.0
    )
    trainer = LatentActionRLOOTrainer(
        model, one_of_four, args, train_dataset=prompts(8), processing_class=tiny.processor
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions([trainer.train_dataset[i] for i in (0, 0, 1, 1)])
    assert batch["advantages"].tolist() == [0.0] * 4
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.policy.parameters())
