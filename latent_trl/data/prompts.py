"""From prompts of a data set to the inputs of `generate`."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .collator import LatentActionDataCollator


def encode_prompts(
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    image_root: str | None = None,
) -> dict[str, torch.Tensor]:
    """
    Prompts, padded on the left.

    Args:
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        rows (`list[dict]`): Each with `prompt`, a list of messages or a text, and `images`, a list, where it has some.
        image_root (`str`, *optional*): The only folder from which rows may name image files.

    Returns:
        `input_ids`, `attention_mask` `[B, P]` and the visual inputs.
    """
    collator = LatentActionDataCollator(processing_class, image_root=image_root)
    segments = [collator.prompt({"_row": i, **row}) for i, row in enumerate(rows)]
    vision = collator.tokenize(segments)
    longest = max(len(segment.ids) for segment in segments)
    names = sorted({name for segment in segments for name in segment.fields})
    padded = {name: torch.zeros(len(rows), longest, dtype=torch.long) for name in ("attention_mask", *names)}
    padded["input_ids"] = torch.full((len(rows), longest), collator.tokenizer.pad_token_id)
    for i, segment in enumerate(segments):
        start = longest - len(segment.ids)
        padded["input_ids"][i, start:] = torch.tensor(segment.ids, dtype=torch.long)
        padded["attention_mask"][i, start:] = 1
        for name, values in segment.fields.items():
            padded[name][i, start:] = torch.tensor(values, dtype=torch.long)
    return {**padded, **vision}
