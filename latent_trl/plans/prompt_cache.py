"""Prompts that are encoded once, and continued by many answers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache

from ..generation.cache_name import CACHE_NAME
from ..generation.cache_rows import has_rows, pick_rows
from ..models.backbone import Backbone


class PromptCache:
    """
    Prompts `[B, P]`, padded on the left, with the backbone's keys and values of them. Made by
    [`~PromptCache.encode`].

    Args:
        view (`Backbone`): The backbone.
        cache (`Cache`): Keys and values of B rows.
        states (`torch.Tensor`): `[B, 1, d]`, of the last position that was read.
        attention_mask (`torch.Tensor`): `[B, L]`.
        position_ids (`torch.Tensor`): `[..., B, 1]`, of the last position that was read.
    """

    def __init__(
        self,
        view: Backbone,
        cache: Cache,
        states: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
    ):
        self.view = view
        self.cache = cache
        self.states = states
        self.attention_mask = attention_mask
        self.position_ids = position_ids

    @classmethod
    @torch.no_grad()
    def encode(cls, view: Backbone, inputs: dict[str, Any]) -> "PromptCache":
        """
        Reads prompts.

        Args:
            view (`Backbone`): The backbone.
            inputs (`dict`): `input_ids`, `attention_mask` `[B, P]`, and what else the backbone takes, on its device.

        Raises:
            ValueError: For a backbone whose cache cannot be copied row by row.
        """
        cache = DynamicCache(config=view.text_config)
        if not has_rows(cache):
            kinds = sorted({type(layer).__name__ for layer in cache.layers})
            raise ValueError(
                f"`backbone` ({type(view.model).__name__}) keeps {', '.join(kinds)} in its cache, which cannot be "
                "copied for several answers. Use a model whose layers all attend to keys and values."
            )
        position_ids = view.positions(**inputs)
        with view.record() as calls:
            view.base(**inputs, position_ids=position_ids, use_cache=True, **{CACHE_NAME: cache})
        return cls(view, cache, calls[-1].states[:, -1:], inputs["attention_mask"], position_ids[..., -1:])

    def __len__(self) -> int:
        return len(self.attention_mask)

    def rows(self, index: torch.Tensor) -> "PromptCache":
        """A copy of the rows at `index` `[N]`, each as often as it is named."""
        index = index.to(self.attention_mask.device)
        cache = copy.deepcopy(self.cache)
        pick_rows(cache, index)
        positions = self.position_ids
        # Rows are on the last axis but one; some models make one row of positions for all.
        if positions.shape[-2] == len(self):
            positions = positions.index_select(-2, index)
        return PromptCache(self.view, cache, self.states[index], self.attention_mask[index], positions)

    @torch.no_grad()
    def extend(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Reads `token_ids` `[B, n]` behind what was read. Returns their states `[B, n, d]`."""
        new = torch.ones_like(token_ids)
        self.attention_mask = torch.cat([self.attention_mask, new], dim=1)
        steps = torch.arange(1, token_ids.shape[1] + 1, device=token_ids.device)
        positions = self.position_ids[..., -1:] + steps
        with self.view.record() as calls:
            self.view.base(
                input_ids=token_ids,
                attention_mask=self.attention_mask,
                position_ids=positions,
                use_cache=True,
                **{CACHE_NAME: self.cache},
            )
        self.position_ids = positions[..., -1:]
        self.states = calls[-1].states[:, -1:]
        return calls[-1].states


@dataclass
class GreedyAnswers:
    """
    Args:
        token_ids (`list[list[int]]`): Of each row, up to and including the end.
        ended (`list[bool]`): Whether an answer ended by itself, and was not cut at the longest length.
        likeliest (`list[tuple[torch.Tensor, torch.Tensor]]`): Of each step, the log-probabilities `[B, top_k]` of the
            likeliest tokens and their ids, where they were asked for.
    """

    token_ids: list[list[int]]
    ended: list[bool]
    likeliest: list[tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def decode_greedily(
    prompts: PromptCache,
    max_new_tokens: int,
    ends: list[int],
    forced: list[list[int]] | None = None,
    top_k: int = 0,
    steps: int | None = None,
    check_positions: bool = True,
    tell: Callable[[int, int], bool] | None = None,
    stop: Callable[[list[int], list[list[int]]], list[bool]] | None = None,
) -> GreedyAnswers:
    """
    The likeliest token at each step, of those that are no placeholder of a picture.

    Args:
        prompts (`PromptCache`): It is used up.
        max_new_tokens (`int`): Longest answer.
        ends (`list[int]`): Tokens that end an answer.
        forced (`list[list[int]]`, *optional*): What each answer begins with.
        top_k (`int`, defaults to `0`): How many of the likeliest tokens of each step to tell.
        steps (`int`, *optional*): Stop after so many tokens, as for a part of an answer of `max_new_tokens`.
        check_positions (`bool`, defaults to `True`): Whether the backbone must have positions for `max_new_tokens`
            behind the longest prompt.
        tell (`Callable`, *optional*): Told each token as it comes, with the number of its row; returns whether the
            answer ends with it.
        stop (`Callable`, *optional*): Asked behind each token that the backbone has read, given the numbers of the rows
            that go on and their answers so far; returns which of them end there.

    Raises:
        ValueError: When the backbone has no positions for so many tokens.
    """
    view, rows = prompts.view, len(prompts)
    # The last token is never read.
    length = int(prompts.position_ids.max()) + max_new_tokens
    if check_positions and view.max_positions is not None and length > view.max_positions:
        raise ValueError(
            f"Prompt and answer may take {length} positions, and the backbone has {view.max_positions}. Shorten the "
            "prompt, or lower `max_new_tokens` (`max_completion_length`)."
        )
    forced = forced or [[]] * rows
    answers: list[list[int]] = [[] for _ in range(rows)]
    ended, likeliest = [False] * rows, []
    steps = max_new_tokens if steps is None else min(steps, max_new_tokens)
    for step in range(steps):
        logits = next_logits(view, prompts.states)[:, 0]
        if top_k:
            likeliest.append(tuple(logits.log_softmax(dim=-1).topk(min(top_k, logits.shape[-1]))))
        tokens = [
            begin[step] if step < len(begin) else token
            for begin, token in zip(forced, logits.argmax(dim=-1).tolist(), strict=True)
        ]
        for row, token in enumerate(tokens):
            if not ended[row]:
                answers[row].append(token)
                ended[row] = token in ends
                if tell is not None:
                    ended[row] |= tell(row, token)
        if all(ended) or step == steps - 1:
            break
        prompts.extend(torch.tensor(tokens, device=logits.device)[:, None])
        if stop is not None:
            going = [row for row in range(rows) if not ended[row]]
            for row, is_over in zip(going, stop(going, [answers[row] for row in going]), strict=True):
                ended[row] = is_over
            if all(ended):
                break
    return GreedyAnswers(answers, ended, likeliest)


def next_logits(view: Backbone, states: torch.Tensor) -> torch.Tensor:
    """Logits of the next tokens `[..., V]` in float32, at which placeholders of pictures cannot follow."""
    logits = view.logits(states).float()
    never = [token for token in view.vision_token_ids if token < logits.shape[-1]]
    return logits.index_fill(-1, torch.tensor(never, dtype=torch.long, device=logits.device), -torch.inf)
