"""Alternatives of a backbone: the greedy answer, and what comes of each other likely token at each of its steps."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ..data.prompts import EncodedPrompt, PromptEncoder
from ..generation.answers import end_tokens
from ..models.backbone import Backbone
from .prompt_cache import GreedyAnswers, PromptCache, decode_greedily


@dataclass
class Alternative:
    """
    An answer that the backbone could give.

    Args:
        text (`str`): Special tokens left out, and white space around it.
        token_ids (`list[int]`): Its tokens, up to and including the end.
        log_prob (`float`): Of its tokens up to and including the one that was forced, in nats; 0 for the greedy answer.
        ended (`bool`): Whether it ended by itself, and was not cut at the longest length.
    """

    text: str
    token_ids: list[int]
    log_prob: float
    ended: bool


@dataclass
class _Branch:
    prompt: int
    token_ids: list[int]
    log_prob: float


def branch_answers(
    backbone: Backbone,
    encoder: PromptEncoder,
    prompts: list[EncodedPrompt],
    max_new_tokens: int = 32,
    ends: list[int] | None = None,
    top_k: int = 6,
    min_prob: float = 0.02,
    max_branches: int = 16,
    batch_size: int = 64,
    under: Callable[[list[int]], AbstractContextManager] | None = None,
    whole_at: int | None = None,
    may_be_empty: bool = False,
) -> list[list[Alternative]]:
    """
    Alternatives of the backbone for each prompt: its greedy answer, and, at each step of that, every other of the
    `top_k` likeliest tokens that has probability `min_prob` or more, forced, and gone on from greedily. A prompt is
    read once.

    Args:
        backbone (`Backbone`): View of the model.
        encoder (`PromptEncoder`), prompts (`list[EncodedPrompt]`): Prompts, or beginnings of answers behind them.
        max_new_tokens (`int`, defaults to `32`): Longest answer.
        ends (`list[int]`, *optional*): Tokens that end an answer; the model's and its tokenizer's by default.
        top_k (`int`, defaults to `6`): Tokens of a step that are looked at, the greedy one among them.
        min_prob (`float`, defaults to `0.02`): Least probability of a forced token.
        max_branches (`int`, defaults to `16`): Forced tokens a prompt: those whose beginning is the likeliest.
        batch_size (`int`, defaults to `64`): Answers decoded at once.
        under (`Callable`, *optional*): Given the numbers of the prompts of a batch's rows, the context in which the
            backbone reads them, such as plans.
        whole_at (`int`, *optional*): Answers of so many tokens are whole, as segments of a number of tokens are.
        may_be_empty (`bool`, defaults to `False`): Whether an answer may end at once, as it may behind a segment.

    Returns:
        `list[list[Alternative]]`: For each prompt, the greedy answer first and the others from the likeliest beginning
        on. Of answers of the same text all but the first are left out, and empty ones unless they `may_be_empty`.

    Raises:
        ValueError: For a `top_k`, `min_prob`, `max_branches`, `max_new_tokens` or `batch_size` that is out of range.
    """
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 1),
        ("top_k", top_k, 2),
        ("max_branches", max_branches, 1),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    if not 0 < min_prob < 1:
        raise ValueError(f"`min_prob` must be between 0 and 1, got {min_prob}.")
    tokenizer, found = encoder.encoder.tokenizer, []
    ends = (end_tokens(backbone.model, tokenizer, {}) or []) if ends is None else ends
    under = (lambda rows: nullcontext()) if under is None else under
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        inputs = {name: value.to(backbone.model.device) for name, value in encoder.collate(batch).items()}
        numbers = list(range(start, start + len(batch)))
        with under(numbers):
            cache = PromptCache.encode(backbone, inputs)
            greedy = decode_greedily(cache.rows(torch.arange(len(cache))), max_new_tokens, ends, top_k=top_k)
        branches = _branches(greedy, math.log(min_prob), max_branches)
        answers: list[list[tuple[list[int], float, bool]]] = [
            [(ids, 0.0, ended)] for ids, ended in zip(greedy.token_ids, greedy.ended, strict=True)
        ]
        for first in range(0, len(branches), batch_size):
            some = branches[first : first + batch_size]
            copies = cache.rows(torch.tensor([branch.prompt for branch in some]))
            with under([start + branch.prompt for branch in some]):
                decoded = decode_greedily(copies, max_new_tokens, ends, forced=[branch.token_ids for branch in some])
            for branch, ids, ended in zip(some, decoded.token_ids, decoded.ended, strict=True):
                answers[branch.prompt].append((ids, branch.log_prob, ended))
        found += [_distinct(of_prompt, tokenizer, whole_at, may_be_empty) for of_prompt in answers]
    return found


def _branches(greedy: GreedyAnswers, min_log_prob: float, max_branches: int) -> list[_Branch]:
    """Beginnings that end with a forced token, prompt by prompt, the likeliest first."""
    found: list[list[_Branch]] = [[] for _ in greedy.token_ids]
    before = [0.0] * len(found)
    for step, (log_probs, tokens) in enumerate(greedy.likeliest):
        for row, (values, ids) in enumerate(zip(log_probs.tolist(), tokens.tolist(), strict=True)):
            answer = greedy.token_ids[row]
            if step >= len(answer):
                continue
            for value, token in zip(values, ids, strict=True):
                if token != answer[step] and value >= min_log_prob:
                    found[row].append(_Branch(row, [*answer[:step], token], before[row] + value))
            before[row] += values[0]
    for of_prompt in found:
        of_prompt.sort(key=lambda branch: -branch.log_prob)
    return [branch for of_prompt in found for branch in of_prompt[:max_branches]]


def _distinct(
    answers: list[tuple[list[int], float, bool]],
    tokenizer: PreTrainedTokenizerBase,
    whole_at: int | None,
    may_be_empty: bool,
) -> list[Alternative]:
    texts: dict[str, Alternative] = {}
    for ids, log_prob, ended in answers:
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        if text or may_be_empty:
            texts.setdefault(text, Alternative(text, ids, log_prob, ended or len(ids) == whole_at))
    return list(texts.values())
