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
        learning_rate (`float`, defaults to `3e-3`):
            Of the chooser.
        exploration (`str`, defaults to `"softmax"`):
            How the plans of a prompt's rollouts are drawn, different ones for the first segment: `"softmax"`: from that
            of the chooser's logits over `exploration_temperature`; raise it where the first plans that are found good
            keep others from being tried. `"thompson"`: those with the greatest logits, of which the last layer's
            weights are drawn from their posterior (Laplace's approximation) times `exploration_temperature`.
        share_rewards (`bool`, defaults to `False`):
            Whether all K plans answer each prompt of a batch, so that its rollouts have different answers, as far as
            there are so many, and a reward counts for every plan that gives the answer. K answers are decoded for
            `num_generations` rewards: it pays where a reward costs more than answers do (a judge, people), and plans
            often say the same.
    """

    replay_batch_size: int = 256
    learning_rate: float = 3e-3
    exploration: str = "softmax"
    share_rewards: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.replay_batch_size < 1:
            raise ValueError(f"`replay_batch_size` must be at least 1, got {self.replay_batch_size}.")
        if self.exploration not in ("softmax", "thompson"):
            raise ValueError(f"`exploration` must be 'softmax' or 'thompson', got {self.exploration!r}.")
