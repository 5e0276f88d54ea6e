"""Segments under plans from an engine of vLLM, in the place of those that `PlanModel` decodes itself."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ..data.prompts import EncodedPrompt, PromptEncoder
from ..vllm.prompts import check_prompt, request_of
from ..vllm.rows import EngineText
from .engine import check_multi_lora, check_no_switch, check_plans_alone
from .model import PlanModel
from .prompt_cache import GreedyAnswers


def check_decodable(model: PlanModel, elsewhere: bool = False) -> None:
    """
    Args:
        model (`PlanModel`): The model.
        elsewhere (`bool`, defaults to `False`): Whether the engine is on a server, which checks the architecture when
            it starts. This process needs no vLLM then.

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
    if not elsewhere:
        check_multi_lora(model.backbone.config.architectures or [type(model.backbone).__name__])


class PlanSource(Protocol):
    """
    Who answers rows under plans: [`~latent_trl.plans.lora_engine.LoraEngine`] in this process, or
    [`~latent_trl.plans.plan_servers.PlanServers`].
    """

    # How its context is made longer.
    remedy: str

    @property
    def longest(self) -> int: ...

    def take(self, tensors: dict[str, torch.Tensor]) -> None: ...

    def generate(
        self,
        prompts: Sequence[Any],
        rows: Sequence[tuple[int, dict[str, Any]]],
        max_new_tokens: int,
        stop_token_ids: Sequence[int],
    ) -> list[EngineText]: ...

    def close(self) -> None: ...


class PlanEngine:
    """
    vLLM beside a [`PlanModel`]: decodes segments, as [`~PlanModel.speak`] takes it. Plans are given to it when they are
    first asked for, and again when they have changed.

    Args:
        model (`PlanModel`): Whose plans.
        encoder (`PromptEncoder`): Of its prompts.
        source (`PlanSource`): Who answers.
    """

    def __init__(self, model: PlanModel, encoder: PromptEncoder, source: PlanSource) -> None:
        self.model, self.encoder, self.source = model, encoder, source
        self._given: list[torch.Tensor] = []

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
            RolloutServersError: When no server is left.
        """
        if not prompts:
            return GreedyAnswers([], [], [])
        shortest = min(map(len, said))
        limits = [max_new_tokens + shortest - len(own) for own in said]
        self._check_lengths(prompts, said, limits)
        if steps is not None:
            limits = [min(limit, steps) for limit in limits]
        # Rows of one prompt travel with it once.
        asked: dict[Any, int] = {}
        requests: list[dict[str, Any]] = []
        rows: list[tuple[int, dict[str, Any]]] = []
        for i, (prompt, own) in enumerate(zip(prompts, said, strict=True)):
            place = asked.setdefault((id(prompt), tuple(own)), len(asked))
            if place == len(requests):
                requests.append(request_of(self.encoder, prompt, own))
            rows.append((place, {"plan": None if plan_ids is None else plan_ids[i], "max_tokens": limits[i]}))
        self._give_plans()
        found = GreedyAnswers([], [], [])
        texts = self.source.generate(requests, rows, max(limits), ends)
        for text, prompt, own in zip(texts, prompts, said, strict=True):
            check_prompt(prompt, text.prompt_ids, own)
            found.token_ids.append(text.token_ids)
            found.ended.append(bool(text.token_ids) and text.token_ids[-1] in ends)
        return found

    def _check_lengths(self, prompts: list[EncodedPrompt], said: list[list[int]], limits: list[int]) -> None:
        """vLLM would cut an answer where its context ends, and not say so."""
        longest = self.source.longest
        for prompt, own, limit in zip(prompts, said, limits, strict=True):
            length = len(prompt.ids) + len(own) + limit
            if length > longest:
                raise ValueError(
                    f"{prompt.rendering.row}: prompt and answer may take {length} tokens, and the engine's context is "
                    f"of {longest}. {self.source.remedy}, shorten the prompt, or lower `max_completion_length`."
                )

    def _give_plans(self) -> None:
        """The plans as they are now, unless the source has them."""
        own = list(self.model.plans.parameters())
        if len(own) == len(self._given) and all(map(torch.equal, own, self._given)):
            return
        self.source.take(self.model.plans.tensors)
        self._given = [parameter.detach().clone() for parameter in own]

    def close(self) -> None:
        """Ends an engine in this process, and the connections to servers."""
        self.source.close()
