"""Configuration of [`PlanPPOTrainer`]."""

from dataclasses import dataclass

from .grpo_config import PlanGRPOConfig


@dataclass
class PlanPPOConfig(PlanGRPOConfig):
    r"""
    Configuration of [`PlanPPOTrainer`]. Inherits all of [`PlanGRPOConfig`] but for what is about groups.

    Args:
        rollout_prompts (`int`, defaults to `128`), num_generations (`int`, defaults to `1`):
            Rollouts of a batch.
        gamma (`float`, defaults to `1.0`), gae_lambda (`float`, defaults to `0.95`):
            The discount of a segment, and λ of GAE over segments.
        value_coef (`float`, defaults to `0.5`):
            Weight of the value's squared error.
        value_clip_range (`float`, *optional*, defaults to `0.2`):
            How far the value may move in one batch of rollouts. `None` does not clip.
        whiten_advantages (`bool`, defaults to `True`):
            Whether advantages have mean 0 and variance 1 over the segments of a batch.
    """

    rollout_prompts: int = 128
    num_generations: int = 1
    gamma: float = 1.0
    gae_lambda: float = 0.95
    value_coef: float = 0.5
    value_clip_range: float | None = 0.2
    whiten_advantages: bool = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")

    def check_groups(self) -> None:
        for name, value in (
            ("exploration", "independent"),
            ("advantage_estimator", "grpo"),
            ("scale_rewards", "none"),
        ):
            if getattr(self, name) != value:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is about groups, and PPO has a value in their place. Leave it "
                    "out, or take `PlanGRPOTrainer`."
                )
