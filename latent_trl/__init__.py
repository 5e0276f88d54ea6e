"""Reinforcement learning of vision-language models over learned latent actions.

Public names load on first use (PEP 562), so that `import latent_trl` stays as light as `import torch`.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "ActionLaw": "generation.action_law",
    "CheckpointError": "checkpoint.files",
    "Codebook": "models.codebook",
    "CrossModalProjector": "models.projector",
    "InverseDynamicsModel": "models.inverse_dynamics",
    "LanguageWorldModel": "models.world_model",
    "LatentActionConfig": "checkpoint.configuration",
    "LatentActionDistillationConfig": "trainer.distillation.config",
    "LatentActionDistillationTrainer": "trainer.distillation.trainer",
    "LatentActionGRPOConfig": "trainer.grpo.config",
    "LatentActionGRPOTrainer": "trainer.grpo.trainer",
    "LatentActionModel": "models.latent_action_model",
    "LatentActionPPOConfig": "trainer.ppo.config",
    "LatentActionPPOTrainer": "trainer.ppo.trainer",
    "LatentActionPolicy": "models.policy",
    "LatentActionRLOOConfig": "trainer.rloo.config",
    "LatentActionRLOOTrainer": "trainer.rloo.trainer",
    "LatentActionSFTConfig": "trainer.sft.config",
    "LatentActionSFTTrainer": "trainer.sft.trainer",
    "LatentActionSpaceConfig": "trainer.space.config",
    "LatentActionSpaceTrainer": "trainer.space.trainer",
    "PlanBanditConfig": "trainer.plans.bandit_config",
    "PlanBanditTrainer": "trainer.plans.bandit_trainer",
    "PlanConfig": "plans.configuration",
    "PlanGRPOConfig": "trainer.plans.grpo_config",
    "PlanGRPOTrainer": "trainer.plans.grpo_trainer",
    "PlanModel": "plans.model",
    "PlanPPOConfig": "trainer.plans.ppo_config",
    "PlanPPOTrainer": "trainer.plans.ppo_trainer",
    "PlanSpaceConfig": "trainer.plans.space_config",
    "PlanSpaceTrainer": "trainer.plans.space_trainer",
    "ValueHead": "models.policy",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_PUBLIC])
