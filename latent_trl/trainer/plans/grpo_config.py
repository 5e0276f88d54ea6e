"""Configuration of [`PlanGRPOTrainer`]."""

from dataclasses import dataclass

from ..rollout.advantages import GROUP_ADVANTAGES
from .rl_config import PlanRLConfig


@dataclass
class PlanGRPOConfig(PlanRLConfig):
    r"""
    Configuration of [`PlanGRPOTrainer`]. Inherits all of [`~latent_trl.trainer.plans.rl_config.PlanRLConfig`]; fields
    that GRPO over tokens has in TRL have its names.

    Args:
        rollout_prompts, num_generations, num_iterations (`int`, default to `16`, `8` and `4`):
            Rollouts of a batch, and updates on each.
        exploration (`str`, defaults to `"independent"`):
            How plans are drawn from the softmax of the chooser's logits over `exploration_temperature`:
            `"independent"` of each other, or `"without_replacement"`: a prompt's rollouts begin with different plans,
            each with the weight that makes the gradient unbiased ([Kool et al.,
            2019](https://openreview.net/forum?id=r1lgTGL5DE)). The advantage is then the reward less the weighted sum
            of the group's, and `num_generations` must be below K.
        advantage_estimator (`str`, defaults to `"grpo"`):
            `"grpo"`: the reward less its group's mean; `"rloo"`: less the mean of the others of its group; or
            `"reinforce++"`: less the batch's mean.
        scale_rewards (`str`, defaults to `"none"`):
            What advantages are divided by: the standard deviation of the `"group"`, of the `"batch"`, or `"none"`.
        epsilon (`float`, defaults to `0.2`), epsilon_high (`float`, *optional*):
            The ratio of a choice's probability to that at the rollout counts between 1 - `epsilon` and 1 +
            `epsilon_high`, which is `epsilon` by default.
        entropy_coef (`float`, defaults to `0.0`):
            Weight of the entropy of a choice of a plan, in nats, that is added to the reward. For decisions of a switch
            none is added.
    """

    rollout_prompts: int = 16
    num_generations: int = 8
    num_iterations: int = 4
    exploration: str = "independent"
    advantage_estimator: str = "grpo"
    scale_rewards: str = "none"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    entropy_coef: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        for name, value, choices in (
            ("exploration", self.exploration, ("independent", "without_replacement")),
            ("advantage_estimator", self.advantage_estimator, tuple(GROUP_ADVANTAGES)),
            ("scale_rewards", self.scale_rewards, ("group", "batch", "none")),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"`epsilon` must be between 0 and 1, got {self.epsilon}.")
        if self.epsilon_high is None:
            self.epsilon_high = self.epsilon
        self.check_groups()

    def check_groups(self) -> None:
        """Raises `ValueError` where a group is too small for its advantages."""
        if self.num_generations < 2 and self.advantage_estimator != "reinforce++":
            raise ValueError(
                f"`num_generations` must be at least 2 for `advantage_estimator={self.advantage_estimator!r}`, which "
                f"compares a prompt's rollouts; got {self.num_generations}."
            )
        if self.exploration == "without_replacement":
            for name, value in (("scale_rewards", "none"), ("advantage_estimator", "grpo")):
                if getattr(self, name) != value:
                    raise ValueError(
                        f"`exploration='without_replacement'` has weights and an advantage of its own: leave `{name}` "
                        f"out, got {getattr(self, name)!r}."
                    )
