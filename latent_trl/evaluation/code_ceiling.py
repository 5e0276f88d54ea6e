"""What RL over codes could reach on a prompt: the best answer over all codes at the first steps."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data.reading import OpenedRows
from .answers import Answers, answer


def forced_answers(
    model: Any,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Any,
    steps: int = 1,
    max_new_tokens: int = 32,
    progress: Callable[[int], None] | None = None,
) -> list[Answers]:
    """
    For each prompt, the greedy answer but for one code: each code at each of the first `steps` steps.

    Args:
        model (`LatentActionModel`), processing_class, rows (`Dataset` or list), max_new_tokens (`int`, defaults to
            `32`): As in [`~latent_trl.evaluation.answers.answer`].
        steps (`int`, defaults to `1`): First steps at which codes are forced, one at a time.
        progress (`Callable`, *optional*): Told the number of prompts that are done.

    Returns:
        `list[Answers]`: `steps * K` answers to each prompt; entry `t * K + a` has code a at step t.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    codes, found = torch.arange(model.config.num_codes, device=model.device), []
    rows = OpenedRows.of(rows)
    for number in range(len(rows)):
        whole = Answers()
        for step in range(min(steps, max_new_tokens)):
            free = codes.new_full((len(codes), step), -1)
            part = answer(
                model,
                processing_class,
                [rows[number]],
                max_new_tokens=max_new_tokens,
                num_return_sequences=len(codes),
                forced_action_ids=torch.cat([free, codes[:, None]], dim=1),
            )
            for name in ("texts", "tokens", "token_ids", "action_ids"):
                setattr(whole, name, getattr(whole, name) + getattr(part, name))
        found.append(whole)
        if progress is not None:
            progress(len(found))
    return found
