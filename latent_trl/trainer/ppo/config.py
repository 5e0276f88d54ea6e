"""Configuration of [`LatentActionPPOTrainer`]."""

from dataclasses import dataclass

from ..grpo.config import LatentActionGRPOConfig

CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")


@dataclass
class LatentActionPPOConfig(LatentActionGRPOConfig):
    r"""
    Configuration of [`LatentActionPPOTrainer`]. Inherits [`LatentActionGRPOConfig`]; rates and coefficients are
    CoLA's. `epsilon` clips the ratio, `num_iterations` is the number of epochs over a rollout batch, and
    `steps_per_generation` the number of minibatches in it.

    Args:
        num_generations (`int`, *optional*, defaults to `1`):
            Samples per prompt; any number, 1 included.
        num_iterations (`int`, defaults to `4`):
            Epochs over a rollout batch.
        gamma (`float`, defaults to `1.0`), gae_lambda (`float`, defaults to `0.95`):
            Of GAE over codes.
        whiten_advantages (`bool`, defaults to `True`):
            Whether advantages are whitened over all codes of the rollout batch, on all processes.
        target_kl (`float`, *optional*):
            Stops the epochs over a rollout batch once the policy's mean divergence from the one that made it, in nats a
            code (`ppo/approx_kl`), is larger after an update. The updates that are left out count as steps.
        value_coef (`float`, defaults to `0.5`):
            Weight of the value loss, a squared error.
        value_clip_range (`float`, *optional*, defaults to `0.2`):
            How far the value may move in one rollout batch; `None` does not clip.
        value_learning_rate (`float`, *optional*):
            Of the value head. By default 1.8 times `learning_rate`, CoLA's ratio.
        value_warmup_steps (`int`, defaults to `0`):
            First updates that train the value head only.
        value_trains_policy_trunk (`bool`, defaults to `True`):
            Whether the value loss also moves the trunk, which the policy shares.
        kl_in (`str`, defaults to `"reward"`):
            Where the KL to the policy before RL goes: off each code's `"reward"`, or into the `"loss"`.
        kl_target (`float`, *optional*):
            Adapt `beta` so that the KL of a completion comes near to this, in nats; `None` keeps `beta`.
        kl_horizon (`int`, defaults to `10000`):
            Completions over which an adapted `beta` may move by a fifth.
        learning_rate (`float`, *optional*):
            Of the policy. By default CoLA's 5e-6 where its decoder is 2048 wide or wider, and larger for a narrower
            one.
        beta (`float`, defaults to `0.01`):
            The KL coefficient.
        loss_type (`str`, defaults to `"dapo"`):
            How TRL averages the clipped objective: `"dapo"` is the mean over all codes of an update; also `"grpo"`
            (of completions), `"bnpo"` (of a micro-batch's codes), `"dr_grpo"` (constant).
        scale_rewards (`str`, defaults to `"none"`):
            Of group advantages, which PPO has not: no other value is taken.
        use_bias_correction_kl (`bool`, *optional*):
            TRL's, of a divergence in the loss: `True` with `kl_in="loss"` unless given, and refused without it.
    """

    num_generations: int | None = 1
    advantage_estimator: str = "gae"
    num_iterations: int = 4
    gamma: float = 1.0
    gae_lambda: float = 0.95
    whiten_advantages: bool = True
    target_kl: float | None = None
    value_coef: float = 0.5
    value_clip_range: float | None = 0.2
    value_learning_rate: float | None = None
    value_warmup_steps: int = 0
    value_trains_policy_trunk: bool = True
    kl_in: str = "reward"
    kl_target: float | None = None
    kl_horizon: int = 10_000
    learning_rate: float | None = None
    beta: float = 0.01
    loss_type: str = "dapo"
    scale_rewards: str = "none"
    use_bias_correction_kl: bool | None = None

    def __post_init__(self):
        self._check_ppo()
        one = self.num_generations == 1
        if one:
            # GRPOConfig insists on groups of two or more: it is shown every sample twice, and its checks then say
            # the same of the batch sizes as they would of single samples.
            self.num_generations_eval = self.num_generations_eval or 1
            self._scale_batch(2)
        super().__post_init__()
        if one:
            self._scale_batch(0.5)

    def _check_estimator(self) -> None:
        if self.advantage_estimator != "gae":
            raise ValueError(
                f"`advantage_estimator={self.advantage_estimator!r}` is about groups, and PPO's advantages are of its "
                "value function. Use `LatentActionGRPOConfig` for it."
            )

    def _scale_batch(self, factor: float) -> None:
        for name in ("num_generations", "per_device_train_batch_size", "generation_batch_size"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else int(value * factor))

    def _check_ppo(self) -> None:
        if self.preset is not None:
            raise ValueError(f"`preset={self.preset!r}` names a GRPO variant. Use `LatentActionGRPOConfig` for it.")
        if self.loss_type not in CLIPPED_LOSSES:
            raise ValueError(
                f"`loss_type` must be one of {list(CLIPPED_LOSSES)}, PPO's clipped objective, got {self.loss_type!r}."
            )
        if self.kl_in not in ("reward", "loss"):
            raise ValueError(f"`kl_in` must be 'reward' or 'loss', got {self.kl_in!r}.")
        if self.num_generations is None or self.num_generations < 1:
            raise ValueError(f"`num_generations` must be at least 1, got {self.num_generations}.")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        for name in ("value_clip_range", "target_kl", "kl_target", "kl_horizon"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if self.kl_target is not None and self.beta == 0.0:
            raise ValueError("`kl_target` adapts `beta`, which is 0 and would stay 0. Give `beta` a first value.")
        if self.target_kl is not None and self.fp16:
            raise ValueError("`target_kl` leaves updates out, which the gradient scaler of `fp16` cannot. Use `bf16`.")
        if self.dynamic_sampling_rounds:
            raise ValueError(
                "`dynamic_sampling_rounds` replaces groups of equal rewards, which PPO learns from. Leave it 0."
            )
        if self.scale_rewards not in ("none", False):
            raise ValueError(
                f"`scale_rewards={self.scale_rewards!r}` is about group advantages; PPO's are whitened, with "
                "`whiten_advantages`. Leave it 'none'."
            )
        if self.kl_in == "loss" and self.beta != 0.0:
            self.use_bias_correction_kl = self.use_bias_correction_kl is not False
        elif self.use_bias_correction_kl is not None:
            raise ValueError(
                f"`use_bias_correction_kl={self.use_bias_correction_kl}` is about a divergence in the loss, and here "
                "there is none. Set `kl_in='loss'` and `beta`, or leave it out."
            )
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"`multi_objective_aggregation={self.multi_objective_aggregation!r}` is about group advantages; PPO "
                "sums the weighted rewards. Leave it 'sum_then_normalize'."
            )
