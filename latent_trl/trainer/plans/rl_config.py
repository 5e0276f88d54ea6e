"""What the configurations of RL over plans share."""

from dataclasses import dataclass

from ..rollout.engine_options import ANY_HOST, check_engine_fields
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
            Answers decoded at once, by each server where there are servers. Lower it to save memory.
        use_vllm (`bool`, defaults to `False`):
            Whether vLLM decodes the answers, of rollouts and of evaluations: each names its plan as an adapter. The
            chooser stays in this process.
        vllm_mode (`str`, defaults to `"colocate"`):
            `"colocate"`: the engine runs in the trainer's process, and starts with the first answer. `"server"`:
            engines run on servers of `latent-trl vllm-serve`, which must be there when the trainer is made.
        vllm_max_model_length (`int`, *optional*):
            Most tokens of prompt and answer; the backbone's by default. With `"colocate"`.
        vllm_gpu_memory_utilization (`float`, defaults to `0.3`):
            Share of the GPU's memory for the engine. With `"colocate"`.
        vllm_enable_sleep_mode (`bool`, defaults to `False`):
            Whether the engine's memory is given back while it does not decode. It needs a GPU. With `"colocate"`.
        vllm_server_hosts (`list[str]`, *optional*):
            Several servers: `host`, `host:port` or `http://host:port`. With `"server"`.
        vllm_server_base_url (`str`, *optional*):
            The address of one server, in the place of host and port.
        vllm_server_host (`str`, defaults to `"0.0.0.0"`), vllm_server_port (`int`, defaults to `8000`):
            One server, by default on this machine. Hosts without a port have this one.
        vllm_server_timeout (`float`, defaults to `240.0`):
            Seconds to wait for the servers at the start, for the answers to a part of a batch, and for any server to
            come back when none is left.
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
    vllm_server_hosts: list[str] | None = None
    vllm_server_base_url: str | None = None
    vllm_server_host: str = ANY_HOST
    vllm_server_port: int = 8000
    vllm_server_timeout: float = 240.0
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
        check_engine_fields(self)
        longest = self.vllm_max_model_length
        if longest is not None and longest <= self.max_completion_length:
            raise ValueError(
                f"`vllm_max_model_length` is {longest}, and leaves no room for a prompt before the longest answer "
                f"(`max_completion_length={self.max_completion_length}`)."
            )
