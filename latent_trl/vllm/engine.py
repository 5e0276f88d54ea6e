"""An engine of vLLM over latent actions: what it is started with, and the object that answers prompts."""

import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from vllm import LLM, SamplingParams

from ..generation.settings import ACTION_DEFAULTS
from ..models.latent_action_model import LatentActionModel
from ..models.policy import LatentActionPolicy
from .folders import EngineFolders, check_not_quantized, folders_of_checkpoint, folders_of_model
from .names import policy_tensors, tensor_bytes
from .plugin import FIRST_RUNNER, PREFIX, check_architecture, register
from .rows import EngineAnswer, row_settings
from .settings import check_sampling_params
from .stepped import SteppedEngine

# What an engine over codes is started with, and cannot be told otherwise.
OWN_ARGUMENTS = ("model", "revision", "hf_overrides", "logits_processors", "logprobs_mode", "worker_extension_cls")
REFUSED_ARGUMENTS = {
    "speculative_config": "drafts of several tokens have no codes",
    "tensor_parallel_size": "the components are not split over devices. Start an engine a device",
    "decode_context_parallel_size": "the components are not split over devices. Start an engine a device",
    "prefill_context_parallel_size": "the components are not split over devices. Start an engine a device",
    "pipeline_parallel_size": "the policy reads the last layer's states. Start an engine a device",
    "enable_lora": "an adapter of the backbone is merged when the engine starts",
    "quantization": "the policy's layers are of the backbone's kind, and would be quantised with them",
}


def engine_arguments(folders: EngineFolders, architecture: str | None = None, **options: Any) -> dict[str, Any]:
    """
    Arguments of `vllm.LLM`, or of `vllm.AsyncEngineArgs`, for an engine over latent actions.

    Args:
        folders (`EngineFolders`): What it reads, from [`folders_of_checkpoint`] or [`folders_of_model`].
        architecture (`str`, *optional*): Of the backbone, by vLLM's name. By default that of its configuration.
        options: Further arguments of vLLM's, such as `dtype`, `max_model_len`, `gpu_memory_utilization`.

    Raises:
        ValueError: For arguments that cannot be had over codes.
    """
    for name in options:
        if name in OWN_ARGUMENTS:
            raise ValueError(f"`{name}` is settled by the checkpoint of latent actions. Leave it out.")
        if name in REFUSED_ARGUMENTS and options[name] not in (None, False, 1):
            raise ValueError(f"`{name}={options[name]!r}` cannot be had: {REFUSED_ARGUMENTS[name]}.")
    config = folders.config
    if config.read_out != "residual":
        raise ValueError(
            f"`read_out={config.read_out!r}` needs the backbone's final norm by itself, which an engine does not give. "
            "Only checkpoints of `read_out='residual'` can be served."
        )
    backbone = folders.backbone_config()
    check_not_quantized(backbone)
    # What the sampler is put into.
    if os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0") != "0":
        raise ValueError(f"`VLLM_USE_V2_MODEL_RUNNER` is set. {FIRST_RUNNER}")
    register()
    architectures = [architecture] if architecture else backbone.architectures
    for name in architectures:
        check_architecture(name)
    record = {
        "path": folders.checkpoint,
        "vision_token_ids": config.vision_token_ids,
        "use_projector": bool(config.use_projector),
    }
    arguments: dict[str, Any] = {
        "model": folders.backbone,
        "revision": folders.revision,
        "hf_overrides": {"architectures": [PREFIX + name for name in architectures], "latent_action": record},
        "logits_processors": [f"latent_trl.vllm.requests:ActionRequests{config.num_codes}"],
        # Log-probabilities of codes; a processed one is taken as the sampler gives it.
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": config.num_codes,
        "worker_extension_cls": "latent_trl.vllm.worker.LatentActionWorkerExtension",
        # vLLM's own choice for a checkpoint in float32 is a shorter type.
        "dtype": folders.dtype,
        # A checkpoint's own defaults are about tokens.
        "generation_config": "vllm",
        # Who is in which row of the batch is read on the host, in forward too, and a step's tokens are known before the
        # next step.
        "enforce_eager": True,
        "async_scheduling": False,
    }
    if folders.processor is not None:
        arguments["tokenizer"] = folders.processor
    return arguments | options


def sampling_params(
    max_new_tokens: int,
    action_settings: dict[str, Any] | None = None,
    support: bool = False,
    num_codes: int | None = None,
    **options: Any,
) -> SamplingParams:
    """
    A request's `SamplingParams`, whose log-probabilities are those of its codes.

    Args:
        max_new_tokens (`int`): Of the answer.
        action_settings (`dict[str, Any]`, *optional*): How its codes are chosen, see
            [`~latent_trl.vllm.settings.ActionSettings`].
        support (`bool`, defaults to `False`): Whether the log-probabilities of all codes are wanted, for which
            `num_codes` must be given; by default that of the chosen one.
        options: Of `SamplingParams`: `stop_token_ids`, `stop`, `min_tokens`, `output_kind`, ...
    """
    return SamplingParams(
        max_tokens=max_new_tokens,
        extra_args=action_settings or None,
        logprobs=num_codes if support else 0,
        # Lists of numbers, and no object a token.
        flat_logprobs=True,
        **options,
    )


def answer_of(prompt_ids: Sequence[int], completion: Any, num_codes: int | None = None) -> EngineAnswer:
    """
    The answer in a `CompletionOutput` of vLLM's.

    Args:
        prompt_ids (`Sequence[int]`): Of its `RequestOutput`.
        completion (`CompletionOutput`): With log-probabilities.
        num_codes (`int`, *optional*): K, where the log-probabilities of all codes were asked for.

    Raises:
        FloatingPointError: When the policy's probabilities are not finite.
    """
    told = completion.logprobs
    # The first of a position is the chosen one.
    action_ids = [told.token_ids[start] for start in told.start_indices]
    log_probs = [told.logprobs[start] for start in told.start_indices]
    if any(math.isnan(value) for value in log_probs):
        raise FloatingPointError("No code could be drawn: the policy's probabilities are not finite.")
    support = None
    if num_codes is not None:
        support = torch.zeros(len(told), num_codes, dtype=torch.bool)
        for step, (start, end) in enumerate(zip(told.start_indices, told.end_indices, strict=True)):
            codes = zip(told.token_ids[start:end], told.logprobs[start:end], strict=True)
            support[step, [code for code, log_prob in codes if log_prob > -math.inf]] = True
    return EngineAnswer(list(prompt_ids), list(completion.token_ids), action_ids, log_probs, support)


class LatentActionEngine(SteppedEngine):
    """
    An engine of vLLM that answers with codes.

    Args:
        model (`LatentActionModel` or `str`): In memory, a folder, or an id of the Hub.
        options: Arguments of `vllm.LLM`, such as `dtype`, `max_model_len`, `gpu_memory_utilization`.
    """

    def __init__(self, model: LatentActionModel | str, **options: Any):
        with tempfile.TemporaryDirectory() as work:
            if isinstance(model, str):
                folders = folders_of_checkpoint(model)
            else:
                folders = folders_of_model(model, Path(work))
            self.config, self.folders = folders.config, folders
            self.llm = LLM(**engine_arguments(folders, **options))

    def generate(
        self,
        prompts: Sequence[Any],
        n: int = 1,
        seed: int | None = None,
        max_new_tokens: int = 20,
        action_do_sample: bool = ACTION_DEFAULTS["action_do_sample"],
        action_temperature: float = ACTION_DEFAULTS["action_temperature"],
        action_top_k: int = ACTION_DEFAULTS["action_top_k"],
        action_top_p: float = ACTION_DEFAULTS["action_top_p"],
        action_sampling: str = ACTION_DEFAULTS["action_sampling"],
        action_bias: Any = None,
        forced_action_ids: Sequence[Sequence[int]] | None = None,
        output_support: bool = False,
        **options: Any,
    ) -> list[EngineAnswer]:
        """
        Answers prompts, each `n` times.

        Args:
            prompts (`Sequence`): Token ids, texts, or vLLM's dictionaries with `multi_modal_data`.
            n (`int`, defaults to `1`): Samples a prompt.
            seed (`int`, *optional*): Of the sampling; rows have seeds that are made of it. Drawn by default.
            max_new_tokens, action_do_sample, action_temperature, action_top_k, action_top_p, action_sampling,
            action_bias: As [`LatentActionModel.generate`] takes them.
            forced_action_ids (`Sequence[Sequence[int]]`, *optional*): One list a row, prompt by prompt.
            output_support (`bool`, defaults to `False`): Whether answers carry which codes could be chosen.
            options: Further fields of `SamplingParams`, such as `stop_token_ids`.

        Returns:
            `list[EngineAnswer]`: Prompt by prompt.
        """
        settings = row_settings(
            len(prompts),
            n,
            seed,
            action_do_sample=action_do_sample,
            action_temperature=action_temperature,
            action_top_k=action_top_k,
            action_top_p=action_top_p,
            action_sampling=action_sampling,
            action_bias=action_bias,
            forced_action_ids=forced_action_ids,
        )
        requests = [self._prompt(prompts[row // n]) for row in range(len(settings))]
        params = [self._params(own, max_new_tokens, output_support, options) for own in settings]
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        codes = self.config.num_codes if output_support else None
        return [answer_of(output.prompt_token_ids, output.outputs[0], codes) for output in outputs]

    def add(
        self,
        name: str,
        prompt: Any,
        settings: dict[str, Any],
        max_new_tokens: int,
        output_support: bool = False,
        **options: Any,
    ) -> None:
        """
        Takes a request beside those that run; [`step`] goes on with all of them.

        Args:
            name (`str`): Of the request, which no other has.
            prompt (`Any`), settings (`dict[str, Any]`): As in [`generate`] and [`row_settings`].
            max_new_tokens, output_support, options: As in [`generate`].

        Raises:
            ValueError: For a request that cannot be had.
        """
        params = self._params(settings, max_new_tokens, output_support, options)
        self.take_request(name, self._prompt(prompt), params)

    def step(self) -> dict[str, EngineAnswer | FloatingPointError]:
        """The next token of the requests that run: what those that end with it answer, by their names."""
        ended: dict[str, EngineAnswer | FloatingPointError] = {}
        for output in self.llm.llm_engine.step():
            (completion,) = output.outputs
            support = len(completion.logprobs[0]) > 1
            try:
                codes = self.config.num_codes if support else None
                ended[output.request_id] = answer_of(output.prompt_token_ids, completion, codes)
            except FloatingPointError as error:
                ended[output.request_id] = error
        return ended

    def _params(
        self, settings: dict[str, Any], max_new_tokens: int, output_support: bool, options: dict[str, Any]
    ) -> SamplingParams:
        codes = self.config.num_codes
        params = sampling_params(max_new_tokens, settings, output_support, codes, **{"detokenize": False, **options})
        check_sampling_params(params, codes)
        return params

    @staticmethod
    def _prompt(prompt: Any) -> Any:
        if isinstance(prompt, str | dict):
            return prompt
        return {"prompt_token_ids": torch.as_tensor(prompt).tolist()}

    def update(self, policy: LatentActionPolicy | LatentActionModel) -> dict[str, float]:
        """
        Gives the engine the tensors of a policy of the same shapes; nothing else travels.

        Returns:
            `dict[str, float]`: `seconds` that it took, and `bytes` of the tensors.
        """
        policy = policy.policy if isinstance(policy, LatentActionModel) else policy
        start = time.perf_counter()
        tensors = policy_tensors(policy)
        self.load_policy(save(tensors))
        return {"seconds": time.perf_counter() - start, "bytes": float(tensor_bytes(tensors))}

    def load_policy(self, tensors: bytes) -> None:
        """
        Puts other values into the policy.

        Args:
            tensors (`bytes`): What [`~latent_trl.vllm.names.policy_tensors`] gives, as safetensors: so they reach an
                engine in a process of its own too.
        """
        self.llm.collective_rpc("update_latent_action_policy", args=(tensors,))
        # The policy's keys and values of a prefix are those of its old weights.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("The engine's prefix cache could not be emptied: requests are running in it.")

    def close(self) -> None:
        """Ends the engine, and gives its memory back."""
        self.llm.llm_engine.engine_core.shutdown()

    def sleep(self, level: int = 1) -> None:
        """Frees the memory of keys and values, and moves the weights to the host (`enable_sleep_mode=True`)."""
        self.llm.sleep(level=level)

    def wake_up(self) -> None:
        """Undoes [`sleep`]."""
        self.llm.wake_up()
