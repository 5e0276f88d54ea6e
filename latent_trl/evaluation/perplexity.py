"""Perplexity of given texts under a model that chooses codes, and under its backbone alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data.collator import LatentActionDataCollator
from ..data.reading import OpenedRows
from ..data.rows import IMAGE_COLUMNS
from ..models.cross_entropy import token_cross_entropy
from ..models.spoken import chunk_size, spoken_log_probs
from .intervals import Interval, bootstrap_interval

LAWS = ("most_likely", "marginal", "inferred", "backbone")


@dataclass(frozen=True)
class Perplexity:
    """
    Result of [`text_perplexity`].

    Args:
        nats (`list[float]`): Negative log-likelihood of each text, summed over its tokens.
        tokens (`list[int]`): Their number, the end of the turn included.
    """

    nats: list[float]
    tokens: list[int]

    @property
    def value(self) -> float:
        """exp of the mean over all tokens of all texts; NaN without a text."""
        return math.exp(sum(self.nats) / sum(self.tokens)) if self.tokens else math.nan

    def interval(self, confidence: float = 0.95, seed: int = 0) -> Interval:
        """Bootstrap interval of `value`; texts are drawn, each with all its tokens. NaN without a text."""
        if not self.tokens:
            return Interval(math.nan, math.nan, math.nan, confidence, 0)
        nats, tokens = np.array(self.nats), np.array(self.tokens)

        def statistic(drawn: np.ndarray, axis: int) -> np.ndarray:
            drawn = drawn.astype(int)
            return np.exp(nats[drawn].sum(axis) / tokens[drawn].sum(axis))

        return bootstrap_interval(range(len(nats)), statistic, confidence=confidence, seed=seed)


@torch.no_grad()
def text_perplexity(
    model,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Any,
    texts: list[Any] | None = None,
    law: str = "most_likely",
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Perplexity:
    r"""
    Perplexity of an answer to each prompt. Its tokens are given one by one; only the choice of codes is the model's.

    With the context state \\( s_t \\) of prompt and answer up to t, the policy \\( \pi \\) and the world model's
    softmax \\( p(x \mid s, a) \\), a token \\( x_{t+1} \\) has the probability

    - `"most_likely"`: \\( p(x_{t+1} \mid s_t, \arg\max_a \pi(a \mid s_t)) \\), the law that SFT trains. It
      rises when RL moves the policy away from codes that say such texts.
    - `"marginal"`: \\( \sum_a \pi(a \mid s_t) \, p(x_{t+1} \mid s_t, a) \\), exact, at the price of K reads of the
      vocabulary head a token. It also counts codes that are not the first choice.
    - `"inferred"`: \\( p(x_{t+1} \mid s_t, a_t) \\) with the code that the inverse dynamics model takes from the text
      itself, the next token included: what the codebook can say at best. It does not know the policy, so RL cannot
      change it.
    - `"backbone"`: the backbone's own head on its own state, without projector, code or merge. RL does not change it
      either, so it can judge the fluency of what a policy says; text that repeats itself has a low one.

    Args:
        model (`LatentActionModel`): In any mode; it is measured in evaluation mode.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        rows (`Dataset` or list): With `prompt`, and `images` where there are some.
        texts (`list`, *optional*): An answer for each row, text or messages. Defaults to the column `reference`.
        law (`str`, defaults to `"most_likely"`): One of the above.
        batch_size (`int`, defaults to `8`): Texts in one pass.
        progress (`Callable`, *optional*): Told the number of texts done after each batch.

    Returns:
        [`Perplexity`]
    """
    if law not in LAWS:
        raise ValueError(f"`law` must be one of {list(LAWS)}, got {law!r}.")
    rows = OpenedRows.of(rows)
    texts = rows["reference"] if texts is None else texts
    missing = [i for i, text in enumerate(texts) if not text or not str(text).strip()]
    if missing or len(texts) != len(rows) or not len(rows):
        raise ValueError(
            f"`texts` (the column `reference` by default) must hold an answer that is not empty for each of the "
            f"{len(rows)} rows; got {len(texts)}, empty or missing at {missing[:5]}."
        )
    model.require(*{"inferred": ("inverse_dynamics", "codebook"), "backbone": ()}.get(law, ("policy", "codebook")))
    collate = LatentActionDataCollator.of(model, processing_class)
    training, nats, tokens = model.training, [], []
    model.eval()
    for start in range(0, len(rows), batch_size):
        places = range(start, min(start + batch_size, len(rows)))
        batch = collate([{"_row": i, **_conversation(rows[i], texts[i])} for i in places])
        losses, counts = _losses(model, _on_device(batch, model.device), law)
        nats += [part.double().sum().item() for part in losses.split(counts)]
        tokens += counts
        if progress is not None:
            progress(len(nats))
    model.train(training)
    return Perplexity(nats, tokens)


def answer_perplexity(
    model, processing_class: ProcessorMixin | PreTrainedTokenizerBase, rows: Any, texts: list[str], **options: Any
) -> Perplexity:
    """
    Perplexity of what a model answered, under its backbone alone: it rises when RL earns reward by broken language.

    Empty answers are left out. An answer that was cut off counts as one that ended there, which is unlikely.

    Args:
        model (`LatentActionModel`), processing_class, rows (`Dataset`): As [`text_perplexity`] takes them.
        texts (`list[str]`): An answer for each row.
        options: Further ones of [`text_perplexity`].
    """
    said = [i for i, text in enumerate(texts) if text.strip()]
    if not said:
        return Perplexity([], [])
    kept = [texts[i] for i in said]
    rows = OpenedRows.of(rows)
    return text_perplexity(model, processing_class, [rows[i] for i in said], kept, law="backbone", **options)


def _conversation(row: dict[str, Any], text: Any) -> dict[str, Any]:
    if isinstance(text, str) and not isinstance(row["prompt"], str):
        text = [{"role": "assistant", "content": text}]
    return {"prompt": row["prompt"], "completion": text, **{name: row.get(name) for name in IMAGE_COLUMNS}}


def _on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return {**{k: move(v) for k, v in batch.items()}, "vision": {k: move(v) for k, v in batch["vision"].items()}}


def _losses(model, batch: dict[str, Any], law: str) -> tuple[torch.Tensor, list[int]]:
    """Negative log-likelihood `[M]` of the answers' tokens, row after row, and their number in each row."""
    ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    mask = batch["loss_mask"][:, 1:]
    targets, counts = ids[:, 1:][mask], mask.sum(dim=1).tolist()
    call = model.backbone_view.encode(ids, attention_mask, **batch["vision"])
    if law == "backbone":
        return token_cross_entropy(model, call.states[:, :-1][mask], targets), counts
    states = model.context_states(call.states, model.has_image(ids))
    inputs = states[:, :-1][mask]
    if law == "inferred":
        choice = model.infer(states, ids, attention_mask, call.position_ids)[mask]
    else:
        choice = model.policy(states, attention_mask, call.position_ids)[:, :-1][mask]
    if law != "marginal":
        return token_cross_entropy(model, model.merge(inputs, model.codebook(choice.argmax(dim=-1))), targets), counts
    return _mixture_losses(model, inputs, choice.log_softmax(dim=-1), targets), counts


def _mixture_losses(model, states: torch.Tensor, log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood `[M]` of `targets` `[M]` under all codes, chosen with `log_probs` `[M, K]`, in `states`
    `[M, d]`."""
    size = chunk_size(model, model.config.num_codes, states.device)
    losses = []
    for part, of_codes, wanted in zip(*(t.split(size) for t in (states, log_probs, targets)), strict=True):
        spoken = spoken_log_probs(model, part, wanted[:, None])[0].squeeze(-1)
        losses.append(-(of_codes + spoken).logsumexp(dim=-1))
    return torch.cat(losses)
