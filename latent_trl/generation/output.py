"""What `generate` returns over codes."""

from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.utils import ModelOutput


@dataclass
class LatentActionGenerateOutput(ModelOutput):
    """
    What [`LatentActionModel.generate`] returns with `return_dict_in_generate=True`. Behind the end of a text, where
    `sequences` holds padding, entries of the other tensors mean nothing.

    Args:
        sequences (`torch.Tensor`): `[B, P+C]` prompt and completion ids.
        action_ids (`torch.Tensor`): `[B, C]`; entry i, chosen from the state of position P-1+i, emitted completion
            token i.
        action_log_probs (`torch.Tensor`): `[B, C]` in float32, under the law that was sampled from. Zero where the
            code was forced from outside that law's support.
        action_support (`torch.Tensor`, *optional*): `[B, C, K]`, the codes that could be sampled, when top-k, top-p or
            a bias left some out.
        context_states (`torch.Tensor`, *optional*): `[B, P+C-1, d]`, what the policy and the world model read.
        position_ids (`torch.Tensor`, *optional*): Position ids of the context states, batch first.
        scores, logits: Of the token choice, as transformers returns them.
        cache (`Cache`, *optional*): Unless `output_cache=False`: backbone's and policy's layers in one cache; also read
            as `past_key_values`.
    """

    sequences: torch.Tensor | None = None
    action_ids: torch.Tensor | None = None
    action_log_probs: torch.Tensor | None = None
    action_support: torch.Tensor | None = None
    context_states: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    cache: Cache | None = None

    @property
    def past_key_values(self) -> Cache | None:
        return self.cache


def trunk_positions(position_ids: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Position ids as the text model takes them, from the batch-first form in which they are kept."""
    if position_ids is None:
        return None
    position_ids = position_ids.to(device)
    return position_ids if position_ids.ndim == 2 else position_ids.transpose(0, 1)
