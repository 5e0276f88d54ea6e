"""Answers of a model to the prompts of a data set, with the codes that made them and their rewards."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data.pieces import text_pieces
from ..data.prompts import encode_prompts


@dataclass
class Answers:
    """
    Args:
        texts (`list[str]`): One answer a prompt, special tokens left out.
        tokens (`list[list[str]]`): The same token by token, up to and including the end.
        action_ids (`list[list[int]]`): The codes that emitted those tokens.
        rewards (`list[float]`): Empty when no reward function was given.
    """

    texts: list[str] = field(default_factory=list)
    tokens: list[list[str]] = field(default_factory=list)
    action_ids: list[list[int]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    @property
    def mean_reward(self) -> float:
        return sum(self.rewards) / len(self.rewards)

    def mean_by(self, keys: list[str]) -> dict[str, float]:
        """Mean reward of the prompts of each key."""
        groups: dict[str, list[float]] = {}
        for key, reward in zip(keys, self.rewards, strict=True):
            groups.setdefault(key, []).append(reward)
        return {key: sum(values) / len(values) for key, values in sorted(groups.items())}


@torch.no_grad()
def answer(
    model,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Any,
    reward: Callable[..., list[float]] | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    progress: Callable[[int], None] | None = None,
    **generate_kwargs: Any,
) -> Answers:
    """
    Lets `model` answer every prompt.

    Args:
        model (`LatentActionModel`): In any mode; it answers in evaluation mode.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The backbone's.
        rows (`Dataset` or list): With `prompt`, `images` and the columns that the reward reads.
        reward (`Callable`, *optional*): A reward function of TRL's signature.
        batch_size (`int`, defaults to `64`), max_new_tokens (`int`, defaults to `32`): Of generation.
        progress (`Callable`, *optional*): Told the number of prompts answered after each batch.
        generate_kwargs: Passed on, such as `action_do_sample` (by default `False`: the most likely codes).
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    generate_kwargs = {"action_do_sample": False, **generate_kwargs}
    training, result = model.training, Answers()
    model.eval()
    end = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])}
    for start in range(0, len(rows), batch_size):
        batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        inputs = {k: v.to(model.device) for k, v in encode_prompts(processing_class, batch).items()}
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **generate_kwargs
        )
        ids = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        texts = []
        for row_ids, codes in zip(ids, output.action_ids.tolist(), strict=True):
            length = next((i + 1 for i, token in enumerate(row_ids) if token in ends), len(row_ids))
            texts.append(tokenizer.decode(row_ids[:length], skip_special_tokens=True).strip())
            result.tokens.append(text_pieces(tokenizer, row_ids[:length]))
            result.action_ids.append(codes[:length])
        result.texts += texts
        if reward is not None:
            columns = {k: [row[k] for row in batch] for k in batch[0] if k not in ("prompt", "images")}
            completions = [[{"role": "assistant", "content": text}] for text in texts]
            result.rewards += reward(prompts=[row["prompt"] for row in batch], completions=completions, **columns)
        if progress is not None:
            progress(len(result.texts))
    model.train(training)
    return result
