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
    Conversational prompts, padded on the left.

    Args:
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        rows (`list[dict]`): Each with `prompt`, a list of messages, and `images`, a list, where it has some.
        image_root (`str`, *optional*): The only folder from which rows may name image files.

    Returns:
        `input_ids`, `attention_mask` `[B, P]` and the visual inputs.
    """
    collator = LatentActionDataCollator(processing_class, image_root=image_root)
    # An answer of one word makes each prompt a conversation; its tokens are cut off again.
    answered = [{**row, "messages": [*row["prompt"], {"role": "assistant", "content": "x"}]} for row in rows]
    batch = collator(answered)
    lengths = [int(row.argmax()) for row in batch["loss_mask"].int()]
    longest = max(lengths)
    visual = batch["vision"]
    shape = batch["input_ids"].shape
    names = ["input_ids", *[k for k, v in visual.items() if v.shape == shape]]
    source = {"input_ids": batch["input_ids"], **visual}
    padded = {name: torch.zeros(len(rows), longest, dtype=torch.long) for name in names}
    padded["input_ids"].fill_(collator.tokenizer.pad_token_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, length in enumerate(lengths):
        mask[i, longest - length :] = 1
        for name in names:
            padded[name][i, longest - length :] = source[name][i, :length]
    rest = {k: v for k, v in visual.items() if k not in names}
    return {**padded, "attention_mask": mask, **rest}
