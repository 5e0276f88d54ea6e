"""Answers of a `generate` call: where they end, and what is in them up to there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .output import LatentActionGenerateOutput


@dataclass
class GeneratedAnswer:
    """
    One answer, up to and including its end.

    Args:
        text (`str`): Special tokens left out, and white space around it.
        token_ids (`list[int]`), action_ids (`list[int]`): Its tokens, and the codes that emitted them.
        log_probs (`list[float]`): Of the codes, in nats, under the law that they were chosen by.
    """

    text: str
    token_ids: list[int]
    action_ids: list[int]
    log_probs: list[float]


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, generate_kwargs: dict[str, Any]) -> list[int] | None:
    """
    The tokens that end an answer, to be passed to `generate` and to [`generated_answers`]: those of `eos_token_id` or
    `generation_config` in `generate_kwargs`, by default the model's and its tokenizer's. `None` where there are none.
    """
    config, given = generate_kwargs.get("generation_config"), generate_kwargs.get("eos_token_id")
    if given is None and config is not None:
        given = config.eos_token_id
    if given is None:
        own = _as_list(model.generation_config.eos_token_id)
        given = own if tokenizer.eos_token_id in own else [*own, *_as_list(tokenizer.eos_token_id)]
    return _as_list(given) or None


def _as_list(token_ids: Any) -> list[int]:
    if token_ids is None:
        return []
    return [token_ids] if isinstance(token_ids, int) else [int(token) for token in token_ids]


def generated_answers(
    output: LatentActionGenerateOutput,
    prompt_length: int,
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int] | None,
) -> list[GeneratedAnswer]:
    """
    The answers in what `generate` returned for prompts of `prompt_length` tokens, padding included, where `ends` were
    its `eos_token_id`.
    """
    answers, sequences = [], cast(torch.Tensor, output.sequences)
    for ids, codes, log_probs in zip(
        sequences[:, prompt_length:].tolist(),
        output.action_ids.tolist(),
        output.action_log_probs.tolist(),
        strict=True,
    ):
        length = next((i + 1 for i, token in enumerate(ids) if token in (ends or ())), len(ids))
        text = tokenizer.decode(ids[:length], skip_special_tokens=True).strip()
        answers.append(GeneratedAnswer(text, ids[:length], codes[:length], log_probs[:length]))
    return answers


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode inside the block, and afterwards in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
