"""Rows whose text has ended leave the batch of a `generate` call: completions cost what they are long."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.utils import ModelOutput

from .cache_name import CACHE_NAME
from .cache_rows import has_rows, pick_rows, rows_of_input

# Of the rows that are present, the share that must have ended: to leave costs a copy of the cache.
LEAST_SHARE = 0.25
# The host looks once in so many tokens, and waits for the device to do it.
TOKENS_BETWEEN = 4


class EndedRows(StoppingCriteria):
    """
    Keeps rows that have ended out of the backbone's forward during one `generate` call.

    transformers' loop goes on with the whole batch, and puts padding behind a text that has ended. Between its inputs
    and its logits only the rows that are present are computed; the logits of the others are zero. Codes are drawn for
    the whole batch, so that the random numbers of a row do not depend on who has left.

    Rows stay where the cache is of a kind that cannot be cut by rows, and where the backbone is given a tensor of as
    many rows that is no known input.

    Args:
        rows (`int`): B, the rows of the batch.
        names (`set[str]`): Inputs of the backbone with a row for each text.
        end_token_ids (`Sequence[int]`): Tokens that end a text.
        criteria (`StoppingCriteriaList`): The caller's own, which this one stands for.
    """

    def __init__(self, rows: int, names: set[str], end_token_ids: Sequence[int], criteria: StoppingCriteriaList):
        self.rows = rows
        self.names = names
        self.ends = torch.tensor(end_token_ids, dtype=torch.long)
        self.criteria = criteria
        self.ended = torch.zeros(rows, dtype=torch.bool)
        self.tokens = 0
        # Of the rows in the forward; `None` for all.
        self.present: torch.Tensor | None = None
        self.paused = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs) -> torch.Tensor:
        """What the caller's own criteria say `[B]`; notes who has ended."""
        done = self.criteria(input_ids, scores, **kwargs)
        self.ended = self.ended.to(input_ids.device) | done | torch.isin(input_ids[:, -1], self.ends.to(input_ids))
        self.tokens += 1
        return done

    @contextmanager
    def attached(self, backbone: nn.Module) -> Iterator[None]:
        """Cuts the calls of `backbone` inside the block to the rows that are present."""
        handles = [
            backbone.register_forward_pre_hook(self._cut, with_kwargs=True),
            backbone.register_forward_hook(self._complete),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside the block calls of the backbone are of rows of their own, and are left alone."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def of_present(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows `[A, ...]` of `tensor` `[B, ...]` that are present."""
        return tensor if self.present is None else tensor[self.present.to(tensor.device)]

    def of_all(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """`tensor` `[A, ...]` of the rows that are present, with zeros `[B, ...]` for the others."""
        if self.present is None:
            return tensor
        shape = list(tensor.shape)
        shape[dim] = self.rows
        return tensor.new_zeros(shape).index_copy_(dim, self.present.to(tensor.device), tensor)

    def _cut(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if self.paused:
            return None
        if self.tokens and self.tokens % TOKENS_BETWEEN == 0:
            self._leave(kwargs)
        if self.present is None:
            return None
        cut = {name: rows_of_input(value, self.present) for name, value in kwargs.items() if name in self.names}
        return args, {**kwargs, **cut}

    def _leave(self, kwargs: dict[str, Any]) -> None:
        """Cuts the cache to the rows that have not ended, where enough have."""
        keep = (~self.of_present(self.ended)).nonzero().squeeze(-1)
        present = self.rows if self.present is None else len(self.present)
        if not 0 < len(keep) <= (1 - LEAST_SHARE) * present:
            return
        cache = kwargs.get(CACHE_NAME)
        if cache is None or not has_rows(cache) or any(self._is_unknown(*item) for item in kwargs.items()):
            return
        pick_rows(cache, keep)
        self.present = keep if self.present is None else self.present[keep]

    def _is_unknown(self, name: str, value: Any) -> bool:
        return name not in self.names and isinstance(value, torch.Tensor) and self.rows in value.shape[:1]

    def _complete(self, backbone: nn.Module, args: tuple, output: ModelOutput) -> ModelOutput | None:
        if self.present is None or self.paused:
            return None
        output["logits"] = self.of_all(output["logits"])
        return output
