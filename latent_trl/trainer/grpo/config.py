"""Configuration of [`LatentActionGRPOTrainer`]."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.utils import logging
from trl import GRPOConfig

from ...data.bad_rows import ON_BAD_ROW
from ...generation.arithmetic_sampling import ACTION_SAMPLING
from ...generation.settings import REFUSED_SETTINGS, check_generation_kwargs
from ...rewards.time_limit import check_timeout
from ..rollout.advantages import GROUP_ADVANTAGES
from ..rollout.engine_options import check_engine_options
from ..run.defaults import settle_arguments
from ..run.health import ON_COLLAPSE, ON_NONFINITE, check_choice
from ..run.old_names import OLD_NAMES

logger = logging.get_logger(__name__)

# What each named algorithm is, in TRL's own fields. DAPO's dynamic sampling and overlong shaping are fields of ours.
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "scale_rewards": "group"},
    "bnpo": {"loss_type": "bnpo", "scale_rewards": "group"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {
        "loss_type": "dapo",
        "scale_rewards": "group",
        "epsilon_high": 0.28,
        "beta": 0.0,
        "dynamic_sampling_rounds": 3,
        "overlong_buffer": -1,
    },
}

_NO_BATCHING = "Rollouts run in transformers' `generate`, which returns codes."
_ONE_REFERENCE = "The reference is the policy before RL; start a new run to move it."
# Why a field of TRL's must keep its default.
NOT_OVER_CODES = {
    "vllm_group_port": "The policy travels over HTTP, to the servers' own ports.",
    "vllm_tensor_parallel_size": "An engine has one device. Start more servers, `vllm_server_hosts`.",
    "vllm_model_impl": "The policy needs layers of vLLM's own.",
    "vllm_structured_outputs_regex": "It constrains tokens, and codes know no grammar.",
    "vllm_importance_sampling_cap": "Use `vllm_importance_sampling_clip_max`.",
    "use_transformers_continuous_batching": _NO_BATCHING,
    "transformers_continuous_batching_config": _NO_BATCHING,
    "use_transformers_paged": _NO_BATCHING,
    "sync_ref_model": _ONE_REFERENCE,
    "ref_model_mixup_alpha": _ONE_REFERENCE,
    "ref_model_sync_steps": _ONE_REFERENCE,
    "cast_lm_head_to_fp32": "Codes are always scored in float32.",
    "max_tool_calling_iterations": "There are no tools over codes. Use reward functions.",
}


@dataclass
class LatentActionGRPOConfig(GRPOConfig):
    r"""
    Configuration of [`LatentActionGRPOTrainer`]. Inherits all of TRL's `GRPOConfig`; ratios, KL, entropy and clipping
    are over codes.

    Args:
        preset (`str`, *optional*):
            `"grpo"`, `"bnpo"`, `"dr_grpo"` (no std scaling, constant normaliser) or `"dapo"` (clip-higher, dynamic
            sampling, overlong shaping): sets the fields that make up that algorithm, where they have their defaults. A
            field that is given another value keeps it, and is named in a warning.
        advantage_estimator (`str`, defaults to `"grpo"`):
            `"grpo"`: the reward less its group's mean; `"rloo"`: less the mean of the others of its group; or
            `"reinforce++"`: less the batch's mean, over the batch's standard deviation.
        action_temperature, action_top_k, action_top_p (`float`, `int`, `float`, default to `1.0`, `0`, `1.0`):
            The law that codes are sampled from in rollouts, and scored under.
        action_sampling (`str`, defaults to `"arithmetic"`):
            How the samples of a prompt are drawn in rollouts: `"arithmetic"`: together, so that a code of probability p
            is drawn by p x `num_generations` of them, rounded up or down; or `"independent"` of each other.
        eval_action_do_sample (`bool`, defaults to `False`):
            Whether evaluation samples codes by that law, or takes the most likely token at each step, under no law.
        reuse_context_states (`bool`, defaults to `True`):
            Score from the states that the rollout computed; the frozen backbone is not run again. `False` saves their
            memory, and costs a pass of the backbone for each score.
        offload_context_states (`bool`, defaults to `False`):
            Keep those states in host memory between updates.
        cuda_graphs (`bool`, *optional*):
            Replay the decoding steps of rollouts as CUDA graphs, see [`LatentActionModel.generate`]. By default
            wherever it can be done; never where FSDP or DeepSpeed shards the backbone.
        train_backbone (`bool`, defaults to `False`):
            Also train the backbone's adapter (`peft_config`); every pass then runs the backbone.
        dynamic_sampling_rounds (`int`, defaults to `0`):
            Draw other prompts in place of those whose group got equal rewards, at most so many times a batch (DAPO).
        overlong_buffer (`int`, defaults to `0`):
            DAPO's soft punishment: over the last so many tokens before `max_completion_length` the reward falls
            linearly by up to 1. 0 turns it off; -1 is a fifth of the maximum.
        vllm_server_hosts (`list[str]`, *optional*):
            Rollout servers that share a rollout batch, with `vllm_mode="server"`: addresses as `host`, `host:port` or
            `http://host:port`; the port is `vllm_server_port` where none is given. In the place of `vllm_server_host`
            and `vllm_server_base_url`, which name one server. See `latent-trl vllm-serve`.
        anchor_coef (`float`, defaults to `0.0`):
            Weight of the KL from the policy before RL on the answers of the trainer's `anchor_dataset`, in nats a code:
            what rewards do not speak of stays as it was.
        language_guard (`bool`, defaults to `False`):
            An answer in broken language is worth the least reward of its batch, whatever the functions say: for rewards
            that can be gamed. Broken is what surprises the frozen backbone far more than the first 64 answers of the
            run did, see [`LanguageGuard`]. It costs a pass of the vocabulary head over each rollout, and what the
            backbone hardly ever says is hardly learned.
        image_root (`str`, *optional*):
            The only folder from which rows may name image files.
        on_bad_row (`str`, defaults to `"raise"`):
            What follows a row that cannot be used: `"raise"` its error, or `"skip"` it: the next row that can be used
            takes its place, and it is listed in `bad_rows.jsonl` in `output_dir`. Some rows are looked at before the
            first step either way.
        on_nonfinite (`str`, defaults to `"stop"`):
            What follows a reward, loss or gradient that is NaN or infinite: `"stop"` with an error before the update,
            or `"skip"`: such a reward counts as `None`, such an update is not made, `skipped_updates` is logged, and 20
            in a row stop the run.
        reward_timeout (`float`, *optional*):
            Seconds that a reward function may take for a batch, after which the run ends with its name; the last
            checkpoint is whole. An async function is cancelled; a plain one runs in a thread, which is left behind.
        on_collapse (`str`, defaults to `"warn"`):
            What follows an alarm, of a constant reward too: `"warn"` once for each, `"stop"` with an error, or
            `"ignore"`.
        learning_rate (`float`, *optional*):
            Of the policy. By default 1e-5 where its decoder is 2048 wide or wider, and larger for a narrower one
            (5e-4 at 192). The paper's 1e-6 moves a freshly cloned policy too little.
        beta (`float`, defaults to `0.01`):
            Weight of the KL to the policy before RL.
    """

    preset: str | None = None
    advantage_estimator: str = "grpo"
    action_temperature: float = 1.0
    action_top_k: int = 0
    action_top_p: float = 1.0
    action_sampling: str = "arithmetic"
    eval_action_do_sample: bool = False
    reuse_context_states: bool = True
    offload_context_states: bool = False
    cuda_graphs: bool | None = None
    train_backbone: bool = False
    dynamic_sampling_rounds: int = 0
    overlong_buffer: int = 0
    vllm_server_hosts: list[str] | None = None
    anchor_coef: float = 0.0
    language_guard: bool = False
    image_root: str | None = None
    on_bad_row: str = "raise"
    on_nonfinite: str = "stop"
    reward_timeout: float | None = None
    on_collapse: str = "warn"
    learning_rate: float | None = None
    beta: float = 0.01
    lr_scheduler_type: str = "constant"
    gradient_checkpointing: bool = False
    remove_unused_columns: bool | None = False
    report_to: None | str | list[str] = "none"

    def __new__(cls, *args: Any, **kwargs: Any):
        # A dataclass would only say that it does not know them.
        for name in OLD_NAMES.keys() & kwargs.keys():
            raise TypeError(f"`{name}` is no field of `{cls.__name__}`: {OLD_NAMES[name]}.")
        return super().__new__(cls)

    def __post_init__(self):
        if self.preset is not None:
            self._apply_preset()
        if self.max_completion_length is None or self.max_completion_length < 1:
            raise ValueError(
                f"`max_completion_length` must be a number of tokens, got {self.max_completion_length}: "
                "no code may ever lead to the end of a text. Give the longest answer that your task has."
            )
        self._refuse()
        if self.bf16 is None and not torch.cuda.is_available():
            # TRL turns bfloat16 on by default, on the CPU too, where it is slower and less exact.
            self.bf16 = False
        settle_arguments(self)
        super().__post_init__()
        self._check_estimator()
        if self.overlong_buffer == -1:
            self.overlong_buffer = max(1, self.max_completion_length // 5)
        if not 0 <= self.overlong_buffer <= self.max_completion_length:
            raise ValueError(
                f"`overlong_buffer` must be between 0 and `max_completion_length` = {self.max_completion_length}, got "
                f"{self.overlong_buffer}."
            )
        check_choice("action_sampling", self.action_sampling, ACTION_SAMPLING)
        check_choice("on_bad_row", self.on_bad_row, ON_BAD_ROW)
        check_choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        check_timeout("reward_timeout", self.reward_timeout)
        check_choice("on_collapse", self.on_collapse, ON_COLLAPSE)
        if self.dynamic_sampling_rounds < 0:
            raise ValueError(f"`dynamic_sampling_rounds` must not be negative, got {self.dynamic_sampling_rounds}.")
        if self.anchor_coef < 0:
            raise ValueError(f"`anchor_coef` must not be negative, got {self.anchor_coef}.")
        if self.anchor_coef and self.train_backbone:
            raise ValueError(
                f"`anchor_coef={self.anchor_coef}` holds the policy alone, and with `train_backbone=True` what a code "
                "says moves too. Set one of the two."
            )
        if self.language_guard and self.train_backbone:
            raise ValueError(
                "`language_guard=True` holds answers to what the frozen backbone expects, and with "
                "`train_backbone=True` that moves too. Set one of the two."
            )
        if self.language_guard and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"`language_guard=True` lowers the sum of the rewards, and with `multi_objective_aggregation="
                f"{self.multi_objective_aggregation!r}` there is none. Set one of the two."
            )
        if self.train_backbone and self.reuse_context_states:
            self.reuse_context_states = False

    def _apply_preset(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {sorted(PRESETS)}, got {self.preset!r}.")
        defaults = {f.name: f.default for f in fields(self)}
        for name, value in PRESETS[self.preset].items():
            given = getattr(self, name)
            if given == defaults[name]:
                setattr(self, name, value)
            elif given != value:
                logger.warning(f"`preset={self.preset!r}` has `{name}={value!r}`; yours, {given!r}, is kept.")

    def _check_estimator(self) -> None:
        check_choice("advantage_estimator", self.advantage_estimator, tuple(GROUP_ADVANTAGES))
        if self.advantage_estimator == "grpo":
            return
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"`multi_objective_aggregation={self.multi_objective_aggregation!r}` is about GRPO's advantages, and "
                f"`advantage_estimator` is {self.advantage_estimator!r}. Leave one of them out."
            )
        if self.scale_rewards == "group":
            # GRPO's default, which these estimators do not have.
            self.scale_rewards = {"rloo": "none", "reinforce++": "batch"}[self.advantage_estimator]

    def _refuse(self) -> None:
        """What cannot give back one code per token."""
        for f in fields(GRPOConfig):
            value, why = getattr(self, f.name), NOT_OVER_CODES.get(f.name)
            if why is not None and value != f.default:
                raise ValueError(f"`{f.name}={value!r}` cannot work over latent actions; leave it out. {why}")
        if self.neftune_noise_alpha is not None and not self.train_backbone:
            raise ValueError(
                f"`neftune_noise_alpha={self.neftune_noise_alpha}` is noise on the embeddings of a backbone that is "
                "trained, and here it is frozen. Leave it out, or set `train_backbone=True`."
            )
        check_engine_options(self)
        for name in ("temperature", "top_p", "top_k", "min_p"):
            if getattr(self, name) not in REFUSED_SETTINGS[name][0]:
                raise ValueError(
                    f"`{name}={getattr(self, name)}` is about sampling tokens, which are always the most likely given "
                    "their code. Use `action_temperature`, `action_top_k` and `action_top_p`."
                )
        check_generation_kwargs(self.generation_kwargs)
