"""A rollout: the samples that were drawn, and the scored batch of them that an update reads."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F

from ...data.prompts import EncodedPrompt


@dataclass(eq=False)
class Sample:
    """
    One completion, with all that is known of it.

    Args:
        row (`dict`): The data set's row, its pictures loaded.
        prompt (`EncodedPrompt`): Its prompt, the same object for all samples that were generated from one encoding.
        completion_ids (`list[int]`): Its tokens, up to and including the end.
        action_ids (`torch.Tensor`): `[C]`, the codes that emitted them.
        action_log_probs (`torch.Tensor`): `[C]`, under the law that they were sampled from.
        action_support (`torch.Tensor`, *optional*): `[C, K]`, where the law left codes out.
        context_states (`torch.Tensor`, *optional*): `[P+C-1, d]`, where they are kept.
        position_ids (`torch.Tensor`, *optional*): `[..., P+C-1]`, of these states.
        completion (`str` or `list[dict]`): As reward functions see it.
        extra (`dict`): What reward functions logged of it, by column.
    """

    row: dict[str, Any]
    prompt: EncodedPrompt
    completion_ids: list[int]
    action_ids: torch.Tensor
    action_log_probs: torch.Tensor
    action_support: torch.Tensor | None = None
    context_states: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    completion: str | list[dict[str, Any]] = ""
    extra: dict[str, Any] = field(default_factory=dict)


def ended_by_itself(samples: list[Sample], end_token_ids: set[int]) -> torch.Tensor:
    """Boolean `[B]`: which completions end with one of `end_token_ids`, and were not cut at the longest length."""
    return torch.tensor([sample.completion_ids[-1] in end_token_ids for sample in samples])


@dataclass
class Rollout:
    """
    A scored batch: tensors and lists with the batch in front, so that TRL can shuffle and split them; prompts are
    padded on the left and completions on the right. Names are TRL's where TRL has one.

    Args:
        prompt_ids, prompt_mask (`torch.Tensor`): `[B, P]`.
        completion_ids, completion_mask (`torch.Tensor`): `[B, C]`; the mask ends with the first end of a text.
        action_ids (`torch.Tensor`): `[B, C]`.
        sampling_per_token_logps (`torch.Tensor`): `[B, C]`, log-probabilities of the codes at sampling time.
        prompt_index (`torch.Tensor`): `[B]`; rows of one number have one prompt.
        num_items_in_batch (`torch.Tensor`): Codes that count, of all processes.
        action_support (`torch.Tensor`, *optional*): `[B, C, K]`.
        context_states (`torch.Tensor`, *optional*): `[B, P+C-1, d]`. Without them the backbone is run again.
        position_ids (`torch.Tensor`, *optional*): `[B, ..., P+C-1]`.
        prompts (`list[EncodedPrompt]`, *optional*): With their pictures, where the backbone is run again.
        importance_sampling_ratio (`torch.Tensor`, *optional*): `[B, C]` or `[B, 1]`, of samples from an engine.
        advantages (`torch.Tensor`, *optional*): `[B]`, or `[B, C]` from a value function.
        old_per_token_logps, ref_per_token_logps (`torch.Tensor`, *optional*): `[B, C]`.
        old_values, returns, value_mask (`torch.Tensor`, *optional*): `[B, C]`, of PPO.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    action_ids: torch.Tensor
    sampling_per_token_logps: torch.Tensor
    prompt_index: torch.Tensor
    num_items_in_batch: torch.Tensor | None = None
    action_support: torch.Tensor | None = None
    context_states: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    prompts: list[EncodedPrompt] | None = None
    importance_sampling_ratio: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    old_per_token_logps: torch.Tensor | None = None
    ref_per_token_logps: torch.Tensor | None = None
    old_values: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    value_mask: torch.Tensor | None = None

    @classmethod
    def of(
        cls, samples: list[Sample], pad_token_id: int, device: torch.device, multiple: int = 1, offload: bool = False
    ) -> "Rollout":
        """
        The batch of `samples`, before it is scored.

        Args:
            samples (`list[Sample]`): Of one source: all with states, or none.
            pad_token_id (`int`): Of the tokenizer.
            device (`torch.device`): Where the batch goes.
            multiple (`int`, defaults to `1`): Widths are padded to a multiple of it.
            offload (`bool`, defaults to `False`): Keep the states in host memory.
        """
        prompt_lengths = [len(sample.prompt.ids) for sample in samples]
        lengths = [len(sample.completion_ids) for sample in samples]
        prompt_width, width = (-(-max(x) // multiple) * multiple for x in (prompt_lengths, lengths))
        left = [prompt_width - length for length in prompt_lengths]
        right = [width - length for length in lengths]

        def tensor(values: list[list[int]], before: list[int] | None, after: list[int] | None, value: int):
            padded = []
            for i, row in enumerate(values):
                padded.append([value] * (before[i] if before else 0) + row + [value] * (after[i] if after else 0))
            return torch.tensor(padded, dtype=torch.long, device=device)

        def joined(name: str, axis: int, begins: bool = False, value: float = 0, to: torch.device = device):
            parts = [getattr(sample, name) for sample in samples]
            if any(part is None for part in parts):
                return None
            beyond = [0, 0] * (parts[0].ndim - 1 - axis % parts[0].ndim)
            sides = ([left[i] if begins else 0, right[i]] for i in range(len(parts)))
            return torch.stack(
                [F.pad(p, beyond + pads, value=value).to(to) for p, pads in zip(parts, sides, strict=True)]
            )

        numbers: dict[int, int] = {}
        index = [numbers.setdefault(id(sample.prompt), len(numbers)) for sample in samples]
        states = joined("context_states", 0, begins=True, to=torch.device("cpu") if offload else device)
        return cls(
            prompt_ids=tensor([sample.prompt.ids for sample in samples], left, None, pad_token_id),
            prompt_mask=tensor([[1] * length for length in prompt_lengths], left, None, 0),
            completion_ids=tensor([sample.completion_ids for sample in samples], None, right, pad_token_id),
            completion_mask=tensor([[1] * length for length in lengths], None, right, 0),
            action_ids=joined("action_ids", 0),
            sampling_per_token_logps=joined("action_log_probs", 0),
            prompt_index=torch.tensor(index),
            # Padding must leave a code to choose, or its log-probabilities are not numbers.
            action_support=joined("action_support", 0, value=1),
            context_states=states,
            position_ids=None if states is None else joined("position_ids", -1, begins=True),
            prompts=[sample.prompt for sample in samples] if states is None else None,
        )

    def to_batch(self) -> dict[str, Any]:
        """What is there, by name, as TRL buffers and splits it."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    @classmethod
    def from_batch(cls, batch: dict[str, Any]) -> "Rollout":
        return cls(**{f.name: batch[f.name] for f in fields(cls) if batch.get(f.name) is not None})

    def rows(self, start: int, end: int) -> "Rollout":
        """Some rows of the batch."""
        single = ("num_items_in_batch",)
        return Rollout(**{k: v if k in single else v[start:end] for k, v in self.to_batch().items()})
