"""Prompts as engines and rollout servers take them. Imports no vLLM."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..data.prompts import EncodedPrompt, PromptEncoder


def as_request(ids: list[int], images: list[Any]) -> dict[str, Any]:
    """Tokens as vLLM takes them, in which each picture is its one placeholder, and the pictures."""
    return {"prompt_token_ids": ids, **({"multi_modal_data": {"image": images}} if images else {})}


def request_of(encoder: "PromptEncoder", prompt: "EncodedPrompt", said: Sequence[int] = ()) -> dict[str, Any]:
    """A prompt as vLLM takes it, with the beginning `said` of its answer."""
    images = prompt.rendering.images
    ids = encoder.encoder.unfilled(prompt.rendering) if images else prompt.ids
    return as_request([*ids, *said], images)


def check_prompt(prompt: "EncodedPrompt", read: Sequence[int], said: Sequence[int] = ()) -> None:
    """Raises `ValueError` where vLLM has `read` another prompt than the processor, of pictures that is."""
    if list(read) != [*prompt.ids, *said]:
        raise ValueError(
            f"{prompt.rendering.row}: vLLM reads its prompt as {len(read) - len(said)} tokens, and the processor as "
            f"{len(prompt.ids)}, which differ. Answer without an engine (`use_vllm=False`, no `--engine vllm`)."
        )
