"""The language world model: a code is merged with the context state, and the backbone's head reads the result."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..checkpoint.configuration import READ_OUTS
from .component import LatentActionComponent


class MergeBlock(nn.Module):
    """F(x) = W_o(SiLU(W_1 x) ⊙ W_2 x) on [m; c], without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate = nn.Linear(2 * hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(2 * hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, merged: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        if merged.shape == codes.shape:
            joined = torch.cat([merged, codes], dim=-1)
            return self.down(F.silu(self.gate(joined)) * self.up(joined))
        gate, up = (self._broadcast(part.weight, merged, codes) for part in (self.gate, self.up))
        return self.down(F.silu(gate) * up)

    @staticmethod
    def _broadcast(weight: torch.Tensor, merged: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """`weight` on every pair [m; c], each half computed once for all pairs that share it."""
        first, second = weight.chunk(2, dim=1)
        return F.linear(merged, first) + F.linear(codes, second)


class LanguageWorldModel(LatentActionComponent):
    """
    Two merge blocks, m_k = m_{k-1} + F_k([m_{k-1}; c]) with m_0 = s, and a read-out.

    Args:
        hidden_size (`int`): d.
        intermediate_size (`int`): I, the width of the blocks.
        read_out (`str`, defaults to `"residual"`): `"residual"` is m_2, with output projections that start at zero;
            `"subtract"` is norm(m_2) - s; `"last_block"` is norm(F_2([m_1; c])).
    """

    config_keys = ("hidden_size", "intermediate_size", "read_out")
    folder_name = "world_model"

    def __init__(self, hidden_size: int, intermediate_size: int, read_out: str = "residual"):
        super().__init__()
        if read_out not in READ_OUTS:
            raise ValueError(f"`read_out` must be one of {READ_OUTS}, got {read_out!r}.")
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.read_out = read_out
        self.blocks = nn.ModuleList([MergeBlock(hidden_size, intermediate_size) for _ in range(2)])
        if read_out == "residual":
            for block in self.blocks:
                nn.init.zeros_(block.down.weight)

    def forward(
        self,
        states: torch.Tensor,
        codes: torch.Tensor,
        norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            states (`torch.Tensor`): `[..., d]`.
            codes (`torch.Tensor`): `[..., d]` code vectors; shapes broadcast, so `[M, 1, d]` states and `[K, d]` codes
                give `[M, K, d]`, at less than half the cost of K calls.
            norm (`Callable`, *optional*): The text model's final norm; `"subtract"` and `"last_block"` need it.

        Returns:
            `[..., d]`, what the backbone's head reads.
        """
        first, last = self.blocks
        dtype = first.down.weight.dtype
        start = states.to(dtype)
        middle = start + first(start, codes)
        step = last(middle, codes)
        if self.read_out == "residual":
            return middle + step
        if norm is None:
            raise ValueError(f"`norm`, the text model's final norm, is needed for read-out {self.read_out!r}.")
        if self.read_out == "subtract":
            return norm(middle + step) - start.detach()
        return norm(step)
