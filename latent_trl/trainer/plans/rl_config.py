"""What the configurations of RL over plans share."""

from dataclasses import dataclass, fields

from .training_config import PlanTrainingConfig


@dataclass
class PlanRLConfig(PlanTrainingConfig):
    """
    Configuration of [`~latent_trl.trainer.plans.rl_trainer.PlanRLTrainer`]. Inherits all of
    [`~latent_trl.trainer.plans.training_config.PlanTrainingConfig`]. A step is one update of the chooser;
    `num_iterations` of them follow on each batch of rollouts.

    Args:
        max_steps (`int`, defaults to `300`):
            Updates in all: `max_steps / num_iterations` batches of `rollout_prompts * num_generations` rollouts.
        rollout_prompts (`int`, defaults to `64`):
            Prompts of a batch of rollouts, drawn without replacement until all have been.
        num_generations (`int`, defaults to `2`):
            Rollouts of a prompt.
        num_iterations (`int`, defaults to `20`):
            Updates for each batch of rollouts.
        exploration_temperature (`float`, defaults to `1.0`):
            Plans are drawn from the softmax of the chooser's logits over it.
        measure_ceiling (`bool`, defaults to `True`):
            Whether the first evaluation also lets every plan answer every held-out prompt once, to log the reward of
            the best plan. Turn it off where K rewards a prompt are too dear.
        ceiling_prompts (`int`, defaults to `0`):
            Training prompts on which the reward of the best plan is logged beside that of the chosen ones. It costs K
            rewards each, once, and once more when plans are added; no update learns from them.
        ceiling_steps (`int`, defaults to `100`):
            Updates from one such figure to the next, as far as batches of rollouts end there.
        grow_plans (`int`, defaults to `0`):
            So many plans are added when the chooser's reward on the `ceiling_prompts` stands at the ceiling: learned
            from alternatives of the plans that it takes. 0 adds none.
        max_plans (`int`, defaults to `64`):
            No plans are added beyond so many.
        rollout_batch_size (`int`, defaults to `256`):
            Answers decoded at once. Lower it to save memory.
        use_vllm (`bool`, defaults to `False`):
            Whether vLLM decodes the answers, of rollouts and of evaluations: each names its plan as an adapter. The
            chooser stays in this process. The engine starts with the first answer.
        vllm_mode (`str`, defaults to `"colocate"`):
            The engine runs in the trainer's process; there is no other mode over plans.
        vllm_max_model_length (`int`, *optional*):
            Most tokens of prompt and answer; the backbone's by default.
        vllm_gpu_memory_utilization (`float`, defaults to `0.3`):
            Share of the GPU's memory for the engine.
        vllm_enable_sleep_mode (`bool`, defaults to `False`):
            Whether the engine's memory is given back while it does not decode. It needs a GPU.
    """

    max_steps: int = 300
    rollout_prompts: int = 64
    num_generations: int = 2
    num_iterations: int = 20
    exploration_temperature: float = 1.0
    measure_ceiling: bool = True
    ceiling_prompts: int = 0
    ceiling_steps: int = 100
    grow_plans: int = 0
    max_plans: int = 64
    rollout_batch_size: int = 256
    use_vllm: bool = False
    vllm_mode: str = "colocate"
    vllm_max_model_length: int | None = None
    vllm_gpu_memory_utilization: float = 0.3
    vllm_enable_sleep_mode: bool = False
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    logging_steps: float = 20

    def __post_init__(self):
        super().__post_init__()
        counts = ("max_steps", "rollout_prompts", "num_generations", "num_iterations", "ceiling_steps", "max_plans")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("ceiling_prompts", "grow_plans"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if not self.exploration_temperature > 0:
            raise ValueError(f"`exploration_temperature` must be above 0, got {self.exploration_temperature}.")
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"`gradient_accumulation_steps` must be 1, got {self.gradient_accumulation_steps}. An update reads "
                "rollouts that are stored, not a batch of the data set."
            )
        if self.grow_plans and not self.ceiling_prompts:
            raise ValueError(
                f"`grow_plans={self.grow_plans}` needs `ceiling_prompts`, on which it is seen that the chooser stands "
                "at the ceiling. Set it, 32 say."
            )
        self._check_engine()

    def _check_engine(self) -> None:
        if self.vllm_mode != "colocate":
            raise ValueError(
                f"`vllm_mode={self.vllm_mode!r}` cannot be had over plans: the engine runs in the trainer's process. "
                "Leave it out."
            )
        if not self.use_vllm:
            of_engine = [field for field in fields(PlanRLConfig) if field.name.startswith("vllm_")]
            given = [field.name for field in of_engine if getattr(self, field.name) != field.default]
            if given:
                raise ValueError(f"`{given[0]}` is about vLLM. Set `use_vllm=True`, or leave it out.")
        longest = self.vllm_max_model_length
        if longest is not None and longest <= self.max_completion_length:
            raise ValueError(
                f"`vllm_max_model_length` is {longest}, and leaves no room for a prompt before the longest answer "
                f"(`max_completion_length={self.max_completion_length}`)."
            )
