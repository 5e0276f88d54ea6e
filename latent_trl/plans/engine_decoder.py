"""Segments under plans from an engine of vLLM, in the place of those that `PlanModel` decodes itself."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.plan_files import plan_folder
from ..data.prompts import EncodedPrompt, PromptEncoder
from ..vllm.prompts import check_prompt, request_of
from .configuration import PlanConfig
from .engine import adapter_arguments, check_multi_lora, check_no_switch, check_plans_alone
from .model import PlanModel
from .prompt_cache import GreedyAnswers


def check_decodable(model: PlanModel) -> None:
    """
    Raises:
        ImportError: Where vLLM is not installed.
        ValueError: For a model that an engine does not answer as: with a learned switch of segments, a LoRA below its
            plans, of a quantised backbone, of plans of a high rank, or of an architecture whose model in vLLM takes no
            adapters.
    """
    check_no_switch(model.plan_config)
    check_plans_alone(model.plan_config, "These plans")
    if model.view.fingerprint() is None:
        raise ValueError(
            "The backbone is quantised, and vLLM would load the one that it was made of. Load it without "
            "`quantization_config`, or answer with transformers."
        )
    check_multi_lora(model.backbone.config.architectures or [type(model.backbone).__name__])


def never_tokens(config: PlanConfig, model_config: Any) -> dict[int, float] | None:
    """A `logit_bias` of vLLM's that keeps placeholders of pictures from following; `model_config` is vLLM's."""
    size = model_config.get_vocab_size()
    return {token: -100.0 for token in config.vision_token_ids or [] if token < size} or None


class PlanEngine:
    """
    vLLM beside a [`PlanModel`]: decodes segments, as [`~PlanModel.speak`] takes it. Plans are given to it as files of
    PEFT's format when they are first asked for, and again when they have changed.

    Args:
        model (`PlanModel`): Whose plans.
        encoder (`PromptEncoder`): Of its prompts.
        slots (`int`): Plans that it has room for.
        sleeps (`bool`, defaults to `False`): Whether its memory is given back between calls (`enable_sleep_mode`).
        options: Further arguments of `vllm.LLM`, such as `dtype`, `max_model_len`, `gpu_memory_utilization`.

    Raises:
        ImportError, ValueError: As [`check_decodable`].
    """

    def __init__(
        self, model: PlanModel, encoder: PromptEncoder, slots: int, sleeps: bool = False, **options: Any
    ) -> None:
        check_decodable(model)
        from vllm import LLM

        self.model, self.encoder, self.sleeps = model, encoder, sleeps
        self._folder = tempfile.TemporaryDirectory(prefix="latent_trl_plans_")
        config = model.plan_config
        base: dict[str, Any] = {"model": config.base_model_name_or_path, "revision": config.base_model_revision}
        if not config.base_model_name_or_path:
            base = {"model": str(Path(self._folder.name) / "backbone")}
            model.backbone.save_pretrained(base["model"])
            encoder.processing_class.save_pretrained(base["model"])
        if not config.vision_token_ids:
            base["skip_tokenizer_init"] = True
        adapters = adapter_arguments(config, slots, options)
        self.llm = LLM(**base, **adapters, enable_sleep_mode=sleeps, **options)
        self._written: list[torch.Tensor] = []
        self._requests: list[Any] = []
        self._count = 0
        self._is_asleep = False

    def __call__(
        self,
        prompts: list[EncodedPrompt],
        said: list[list[int]],
        plan_ids: list[int] | None,
        max_new_tokens: int,
        ends: list[int],
        steps: int | None = None,
    ) -> GreedyAnswers:
        """
        A segment behind each prompt.

        Args:
            prompts (`list[EncodedPrompt]`), said (`list[list[int]]`): B prompts, and what their answers begin with.
            plan_ids (`list[int]`, *optional*): One a prompt; `None` for the backbone's own answers.
            max_new_tokens (`int`): Longest one, behind the shortest beginning; others get as many fewer.
            ends (`list[int]`): Tokens that end it.
            steps (`int`, *optional*): Stop after so many tokens.

        Raises:
            ValueError: When prompt and answer are longer than the engine's context, or it reads a prompt otherwise.
        """
        from vllm import SamplingParams

        shortest = min(map(len, said))
        limits = [max_new_tokens + shortest - len(own) for own in said]
        self._check_lengths(prompts, said, limits)
        never = never_tokens(self.model.plan_config, self.llm.model_config)
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=limit if steps is None else min(limit, steps),
                stop_token_ids=ends,
                ignore_eos=True,
                detokenize=False,
                logit_bias=never,
            )
            for limit in limits
        ]
        requests = [] if plan_ids is None else self._adapters()
        adapters = None if plan_ids is None else [requests[plan] for plan in plan_ids]
        asked = [request_of(self.encoder, *one) for one in zip(prompts, said, strict=True)]
        if self._is_asleep:
            self.llm.wake_up()
        outputs = self.llm.generate(asked, params, lora_request=adapters, use_tqdm=False)
        if self.sleeps:
            self.llm.sleep(level=1)
        self._is_asleep = self.sleeps
        return self._read(outputs, prompts, said, ends)

    def _read(
        self, outputs: list[Any], prompts: list[EncodedPrompt], said: list[list[int]], ends: list[int]
    ) -> GreedyAnswers:
        found = GreedyAnswers([], [], [])
        for output, prompt, own in zip(outputs, prompts, said, strict=True):
            check_prompt(prompt, output.prompt_token_ids, own)
            ids = list(output.outputs[0].token_ids)
            found.token_ids.append(ids)
            found.ended.append(bool(ids) and ids[-1] in ends)
        return found

    def _check_lengths(self, prompts: list[EncodedPrompt], said: list[list[int]], limits: list[int]) -> None:
        """vLLM would cut an answer where its context ends, and not say so."""
        longest = self.llm.model_config.max_model_len
        for prompt, own, limit in zip(prompts, said, limits, strict=True):
            length = len(prompt.ids) + len(own) + limit
            if length > longest:
                raise ValueError(
                    f"{prompt.rendering.row}: prompt and answer may take {length} tokens, and the engine's context is "
                    f"of {longest}. Raise `vllm_max_model_length` if the backbone has positions for it, shorten the "
                    "prompt, or lower `max_completion_length`."
                )

    def _adapters(self) -> list[Any]:
        """A request for an adapter for each plan as it is now."""
        from vllm.lora.request import LoRARequest

        plans, config = self.model.plans, self.model.plan_config
        own = list(plans.parameters())
        if len(own) != len(self._written) or not all(map(torch.equal, own, self._written)):
            self._requests = []
            for plan in range(config.num_plans):
                # An engine knows adapters, and the texts that it has read under them, by number and name.
                self._count += 1
                folder = Path(self._folder.name) / f"{plan_folder(plan)}_{self._count}"
                plans.save_plan(plan, folder, config.base_model_name_or_path)
                self._requests.append(LoRARequest(folder.name, self._count, str(folder)))
            self._written = [parameter.detach().clone() for parameter in own]
        return self._requests

    def close(self) -> None:
        """Ends the engine, and gives its memory back."""
        self.llm.llm_engine.engine_core.shutdown()
        self._folder.cleanup()
