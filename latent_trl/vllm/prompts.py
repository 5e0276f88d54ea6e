"""Prompts as engines and rollout servers take them. Imports no vLLM."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..data.prompts import EncodedPrompt, PromptEncoder


def request_of(encoder: "PromptEncoder", prompt: "EncodedPrompt") -> Any:
    """A prompt as vLLM takes it: without the tokens of its pictures, which vLLM fills in."""
    images = prompt.rendering.images
    if not images:
        return prompt.ids
    return {"prompt_token_ids": encoder.encoder.unfilled(prompt.rendering), "multi_modal_data": {"image": images}}


def check_prompts(prompts: Sequence["EncodedPrompt"], answers: Sequence[Any], copies: int) -> None:
    """Raises `ValueError` where vLLM read another prompt than the processor, of pictures that is."""
    for i, answer in enumerate(answers):
        prompt = prompts[i // copies]
        if answer.prompt_ids != prompt.ids:
            raise ValueError(
                f"{prompt.rendering.row}: vLLM reads its prompt as {len(answer.prompt_ids)} tokens, and the processor "
                f"as {len(prompt.ids)}, which differ. Answer without an engine (`use_vllm=False`, no `--engine vllm`)."
            )
