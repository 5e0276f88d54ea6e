"""An engine of vLLM whose adapters are plans: in a trainer's process, or behind a rollout server."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load
from transformers import AutoConfig
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from ..checkpoint.files import resolve_folder
from ..checkpoint.plan_files import PLAN_PATTERNS, plan_folder
from ..data.prompts import PromptEncoder
from ..vllm.folders import check_not_quantized, dtype_of
from ..vllm.prompts import as_request
from ..vllm.rows import EngineText
from ..vllm.stepped import SteppedEngine
from .adapters import write_plan
from .configuration import PlanConfig
from .engine import adapter_arguments, check_multi_lora, check_no_switch, engine_arguments
from .folder import check_plan_folder, stacked_plans
from .model import PlanModel

# What a row's settings may name.
SETTINGS = {"plan", "max_tokens"}


def never_tokens(config: PlanConfig, model_config: Any) -> dict[int, float] | None:
    """A `logit_bias` of vLLM's that keeps placeholders of pictures from following; `model_config` is vLLM's."""
    size = model_config.get_vocab_size()
    return {token: -100.0 for token in config.vision_token_ids or [] if token < size} or None


class LoraEngine(SteppedEngine):
    """
    vLLM with plans as its adapters, which answers greedily. The settings of a row are its `plan`, a number or `None`
    for the backbone's own answer, and `max_tokens`, where it may take fewer than other rows.

    Args:
        config (`PlanConfig`): Of the plans.
        adapter (`LoraConfig`): The record of each plan.
        tensors (`dict[str, torch.Tensor]`): Of all plans, as [`PlanAdapters.tensors`].
        arguments: Of `vllm.LLM`; with `enable_sleep_mode` the engine's memory is given back after each batch.
    """

    # How its context is made longer.
    remedy = "Raise `vllm_max_model_length` if the backbone has positions for it"

    def __init__(
        self, config: PlanConfig, adapter: LoraConfig, tensors: dict[str, torch.Tensor], **arguments: Any
    ) -> None:
        self.adapter, self.slots = adapter, arguments["max_loras"]
        self.llm = LLM(**arguments)
        self._never = never_tokens(config, self.llm.model_config)
        self._sleeps, self._is_asleep = bool(arguments.get("enable_sleep_mode")), False
        self._folder = tempfile.TemporaryDirectory(prefix="latent_trl_plans_")
        self._requests: list[LoRARequest] = []
        # Of the plans before: rows that end may still be answered under them.
        self._earlier: list[LoRARequest] = []
        self._count = 0
        self.take(tensors)

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its answer."""
        return self.llm.model_config.max_model_len

    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes other plans, of any number that it has room for."""
        count = len(next(iter(tensors.values())))
        for request in self._earlier:
            shutil.rmtree(request.lora_path, ignore_errors=True)
        self._earlier, self._requests = self._requests, []
        for plan in range(count):
            # An engine knows adapters, and the texts that it has read under them, by number and name.
            self._count += 1
            folder = Path(self._folder.name) / f"{plan_folder(plan)}_{self._count}"
            write_plan(plan, folder, self.adapter, tensors)
            self._requests.append(LoRARequest(folder.name, self._count, str(folder)))

    def load_policy(self, tensors: bytes) -> None:
        """The same of safetensors."""
        self.take(load(tensors))

    def generate(
        self,
        prompts: Sequence[Any],
        rows: Sequence[tuple[int, dict[str, Any]]],
        max_new_tokens: int,
        stop_token_ids: Sequence[int],
    ) -> list[EngineText]:
        """
        Answers rows.

        Args:
            prompts (`Sequence`): Token ids, or vLLM's dictionaries of `prompt_token_ids` and `multi_modal_data`.
            rows (`Sequence[tuple[int, dict]]`): The place of a row's prompt, and its settings.
            max_new_tokens (`int`): Longest answer.
            stop_token_ids (`Sequence[int]`): Tokens that end an answer.

        Raises:
            ValueError: For settings that cannot be had.
        """
        asked = [self._asked(settings, max_new_tokens, stop_token_ids) for _, settings in rows]
        if self._is_asleep:
            self.llm.wake_up()
        outputs = self.llm.generate(
            [_prompt(prompts[place]) for place, _ in rows],
            [params for params, _ in asked],
            lora_request=[adapter for _, adapter in asked],
            use_tqdm=False,
        )
        if self._sleeps:
            self.llm.sleep(level=1)
        self._is_asleep = self._sleeps
        return [_text(output) for output in outputs]

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
            prompt, settings, max_new_tokens: As in [`generate`].
            output_support (`bool`, defaults to `False`): Is of codes, and cannot be had.
            options: `stop_token_ids`.

        Raises:
            ValueError: For a request that cannot be had.
        """
        if output_support:
            raise ValueError("`output_support` is of codes, and there are plans.")
        params, adapter = self._asked(settings, max_new_tokens, **options)
        self.take_request(name, _prompt(prompt), params, lora_request=adapter)

    def step(self) -> dict[str, EngineText | FloatingPointError]:
        """The next token of the requests that run: what those that end with it answer, by their names."""
        return {output.request_id: _text(output) for output in self.llm.llm_engine.step()}

    def close(self) -> None:
        """Ends the engine, and gives its memory back."""
        self.llm.llm_engine.engine_core.shutdown()
        self._folder.cleanup()

    def _asked(
        self, settings: dict[str, Any], max_new_tokens: int, stop_token_ids: Sequence[int]
    ) -> tuple[SamplingParams, LoRARequest | None]:
        """How a row is asked for, and its adapter."""
        plan, limit = settings.get("plan"), settings.get("max_tokens", max_new_tokens)
        if settings.keys() - SETTINGS:
            raise ValueError(f"Rows under plans have the settings {sorted(SETTINGS)}, got {sorted(settings)}.")
        if plan is not None and (type(plan) is not int or not 0 <= plan < len(self._requests)):
            raise ValueError(f"`plan` must be in 0 ... {len(self._requests) - 1}, or None; got {plan!r:.80}.")
        if type(limit) is not int or limit < 1:
            raise ValueError(f"`max_tokens` must be at least 1, got {limit!r:.80}.")
        params = SamplingParams(
            temperature=0,
            max_tokens=min(limit, max_new_tokens),
            stop_token_ids=list(stop_token_ids),
            ignore_eos=True,
            detokenize=False,
            logit_bias=self._never,
        )
        return params, None if plan is None else self._requests[plan]


def _prompt(prompt: Any) -> dict[str, Any]:
    return prompt if isinstance(prompt, dict) else as_request(list(prompt), [])


def _text(output: Any) -> EngineText:
    return EngineText(list(output.prompt_token_ids), list(output.outputs[0].token_ids))


def engine_of_model(model: PlanModel, encoder: PromptEncoder, slots: int, **options: Any) -> LoraEngine:
    """
    An engine of a model in memory, whose backbone is written to a folder where it is in none.

    Args:
        model (`PlanModel`): Whose plans.
        encoder (`PromptEncoder`): Of its prompts.
        slots (`int`): Plans that it has room for.
        options: Further arguments of `vllm.LLM`, such as `dtype`, `max_model_len`, `enable_sleep_mode`.

    Raises:
        ValueError: For plans or options that an engine cannot have.
    """
    config, plans = model.plan_config, model.plans
    with tempfile.TemporaryDirectory() as work:
        base: dict[str, Any] = {"model": config.base_model_name_or_path, "revision": config.base_model_revision}
        if not config.base_model_name_or_path:
            base = {"model": str(Path(work) / "backbone")}
            model.backbone.save_pretrained(base["model"])
            encoder.processing_class.save_pretrained(base["model"])
        arguments = {**base, **adapter_arguments(config, slots, options), **_tokenizer(config), **options}
        return LoraEngine(config, plans.lora_config(config.base_model_name_or_path), plans.tensors, **arguments)


def engine_of_folder(name_or_path: str, **options: Any) -> LoraEngine:
    """
    An engine of saved plans. `max_loras` makes room for more plans than there are.

    Args:
        name_or_path (`str`): The folder, or a Hub id.
        options: Further arguments of `vllm.LLM`, such as `dtype`, `max_model_len`, `gpu_memory_utilization`.

    Raises:
        CheckpointError: When it is no folder of plans.
        ValueError: For plans, a backbone or options that an engine cannot have.
    """
    for name in ("model", "revision"):
        if name in options:
            raise ValueError(f"`{name}` is settled by the folder of plans. Leave it out.")
    folder = resolve_folder(name_or_path, patterns=PLAN_PATTERNS)
    config = PlanConfig.load(folder)
    check_no_switch(config)
    if not config.base_model_name_or_path:
        raise ValueError(
            f"The plans of {name_or_path!r} were learned on a backbone that has no name, and an engine reads it by its "
            "name. Save the backbone in a folder, load it from there with the plans, and save those again."
        )
    arguments = engine_arguments(folder, **options)
    backbone, revision = arguments["model"], arguments["revision"]
    loaded = AutoConfig.from_pretrained(backbone, revision=revision)
    check_not_quantized(loaded, "plans are learned and chosen on one that is not")
    check_multi_lora(loaded.architectures or [])
    arguments = {"dtype": dtype_of(backbone, revision), **_tokenizer(config), **arguments}
    adapter = LoraConfig.from_pretrained(str(check_plan_folder(folder, 0)))
    return LoraEngine(config, adapter, stacked_plans(folder, config), **arguments)


def _tokenizer(config: PlanConfig) -> dict[str, bool]:
    """Text comes as tokens; pictures need the processor."""
    return {} if config.vision_token_ids else {"skip_tokenizer_init": True}
