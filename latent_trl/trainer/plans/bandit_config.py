"""Configuration of [`PlanBanditTrainer`]."""

from dataclasses import dataclass

from .rl_config import PlanRLConfig


@dataclass
class PlanBanditConfig(PlanRLConfig):
    r"""
    Configuration of [`PlanBanditTrainer`]. Inherits all of [`~latent_trl.trainer.plans.rl_config.PlanRLConfig`].

    Args:
        replay_batch_size (`int`, defaults to `256`):
            Choices of one update, drawn from all so far.
        exploration (`str`, defaults to `"softmax"`):
            How the plans of a prompt's rollouts are drawn, different ones for the first segment: `"softmax"`: from that
            of the chooser's logits over `exploration_temperature`; raise it where the first plans that are found good
            keep others from being tried. `"thompson"`: those with the greatest logits, of which the last layer's
            weights are drawn from their posterior (Laplace's approximation) times `exploration_temperature`.
    """

    replay_batch_size: int = 256
    exploration: str = "softmax"

    def __post_init__(self):
        super().__post_init__()
        if self.replay_batch_size < 1:
            raise ValueError(f"`replay_batch_size` must be at least 1, got {self.replay_batch_size}.")
        if self.exploration not in ("softmax", "thompson"):
            raise ValueError(f"`exploration` must be 'softmax' or 'thompson', got {self.exploration!r}.")
