"""What a plain model keeps of the latent policy that it was distilled from."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data.prompts import encode_prompts
from ..data.reading import OpenedRows
from ..generation.answers import end_tokens, evaluation_mode
from .answers import answer, score_answers
from .perplexity import text_perplexity

SAYS = ("latent policy", "plain model", "backbone before")


@torch.no_grad()
def plain_answers(
    model: Any,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Any,
    batch_size: int = 64,
    max_new_tokens: int = 32,
) -> tuple[list[str], list[list[int]]]:
    """
    Answers of a model's backbone by itself, without codes: tokens are drawn at temperature 1 from all.

    Args:
        model (`LatentActionModel`): Whose backbone, adapter and all, answers in evaluation mode.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        rows (`Dataset` or list): With `prompt`, and `images` where there are some.
        batch_size (`int`, defaults to `64`), max_new_tokens (`int`, defaults to `32`): Of generation.

    Returns:
        Texts, and their token ids up to and including the end.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    ends, rows = end_tokens(model, tokenizer, {}), OpenedRows.of(rows)
    texts: list[str] = []
    token_ids: list[list[int]] = []
    with evaluation_mode(model):
        for start in range(0, len(rows), batch_size):
            batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            inputs = {k: v.to(model.device) for k, v in encode_prompts(processing_class, batch).items()}
            sequences = model.backbone.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=ends,
                suppress_tokens=model.config.vision_token_ids or None,
            )
            for ids in sequences[:, inputs["input_ids"].shape[1] :].tolist():
                length = next((i + 1 for i, token in enumerate(ids) if token in (ends or ())), len(ids))
                token_ids.append(ids[:length])
                texts.append(tokenizer.decode(ids[:length], skip_special_tokens=True).strip())
    return texts, token_ids


def what_is_kept(
    model: Any,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Any,
    rewards: list[Any],
    max_new_tokens: int = 32,
    batch_size: int = 64,
    seed: int = 0,
    **choice: Any,
) -> dict[str, dict[str, float]]:
    """
    Figures of a latent policy, of the plain model that was taught it, and of its backbone before, by one measure: mean
    rewards of sampled answers, and the perplexity of reference answers.

    Args:
        model (`LatentActionModel`): Whose backbone has the adapter that was taught.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        rows (`Dataset` or list): Held out: `prompt`, `images` where there are some, what the rewards read, and
            `reference` where there are answers to measure perplexity of.
        rewards (`list[Callable]`): Reward functions; each is a figure.
        max_new_tokens (`int`, defaults to `32`), batch_size (`int`, defaults to `64`): Of generation.
        seed (`int`, defaults to `0`): Of the samples.
        choice: How the policy's codes are drawn, as [`LatentActionModel.generate`] takes it.

    Returns:
        `dict`: By name of who says, and of the figure.
    """
    rows = OpenedRows.of(rows)
    found: dict[str, dict[str, float]] = {}
    with_references = "reference" in rows.column_names
    options: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    for name in SAYS:
        with nullcontext() if name == "plain model" else model.peft_backbone.disable_adapter():
            torch.manual_seed(seed)
            if name == "latent policy":
                said = answer(model, processing_class, rows, action_do_sample=True, **options, **choice)
                texts, token_ids = said.texts, said.token_ids
            else:
                texts, token_ids = plain_answers(model, processing_class, rows, **options)
            found[name] = {f"reward/{_name(reward)}": _mean(reward, rows, texts, token_ids) for reward in rewards}
            if with_references:
                law = "marginal" if name == "latent policy" else "backbone"
                found[name]["reference_perplexity"] = text_perplexity(model, processing_class, rows, law=law).value
    return found


def _name(reward: Any) -> str:
    return getattr(reward, "__name__", type(reward).__name__)


def _mean(reward: Any, rows: Any, texts: list[str], token_ids: list[list[int]]) -> float:
    scored = [value for value in score_answers(reward, rows, texts, token_ids) if not math.isnan(value)]
    return sum(scored) / len(scored) if scored else math.nan
