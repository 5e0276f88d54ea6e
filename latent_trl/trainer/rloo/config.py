"""Configuration of [`LatentActionRLOOTrainer`]."""

from dataclasses import dataclass, fields

from ..grpo.config import LatentActionGRPOConfig

NOT_OF_RLOO = (
    *("loss_type", "importance_sampling_level", "scale_rewards", "top_entropy_quantile"),
    *("multi_objective_aggregation", "off_policy_mask_threshold", "use_bias_correction_kl"),
)


@dataclass
class LatentActionRLOOConfig(LatentActionGRPOConfig):
    r"""
    Configuration of [`LatentActionRLOOTrainer`]. Inherits [`LatentActionGRPOConfig`]; names are those of TRL's
    `RLOOConfig`.

    Args:
        normalize_advantages (`bool`, defaults to `False`):
            Whether advantages are whitened over the batch of all processes.
        reward_clip_range (`tuple[float, float]`, *optional*):
            What rewards are clipped to, before the divergence is taken off.
        beta (`float`, defaults to `0.05`):
            Weight of the KL to the policy before RL, summed over a completion's codes, which is taken off its reward.
        num_generations (`int`, defaults to `2`):
            Samples of a prompt.
    """

    # A completion of one action: TRL's mean over completions.
    loss_type: str = "grpo"
    advantage_estimator: str = "rloo"
    normalize_advantages: bool = False
    reward_clip_range: tuple[float, float] | None = None
    beta: float = 0.05
    num_generations: int | None = 2

    def __post_init__(self):
        if self.preset is not None:
            raise ValueError(f"`preset={self.preset!r}` names a GRPO variant. Use `LatentActionGRPOConfig` for it.")
        if self.advantage_estimator != "rloo":
            raise ValueError(
                f"`advantage_estimator={self.advantage_estimator!r}` is not RLOO's. Use `LatentActionGRPOConfig`."
            )
        for f in fields(self):
            if f.name in NOT_OF_RLOO and getattr(self, f.name) != f.default:
                raise ValueError(
                    f"`{f.name}={getattr(self, f.name)!r}` is about the loss of single actions, and RLOO's is of whole "
                    "completions. Leave it out, or use `LatentActionGRPOConfig` with `advantage_estimator='rloo'`."
                )
        if self.reward_clip_range is not None and not self.reward_clip_range[0] < self.reward_clip_range[1]:
            raise ValueError(f"`reward_clip_range` must be (low, high), got {self.reward_clip_range}.")
        if self.use_vllm and not self.vllm_importance_sampling_mode.startswith("sequence"):
            raise ValueError(
                f"`vllm_importance_sampling_mode={self.vllm_importance_sampling_mode!r}` weighs single codes, and "
                "RLOO's loss is of whole completions. Use `'sequence_mask'` or `'sequence_truncate'`."
            )
        super().__post_init__()
        if self.normalize_advantages:
            self.scale_rewards = "batch"
