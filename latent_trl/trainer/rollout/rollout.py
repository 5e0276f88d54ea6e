"""What a rollout leaves behind for its scoring: codes, states, and the law's support, aligned with the completion."""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from ...generation.output import LatentActionGenerateOutput


@dataclass
class Rollout:
    """
    Tensors with the batch in front, so that a trainer can shuffle and split them with the rest.

    Args:
        action_ids (`torch.Tensor`): `[B, C]`.
        action_log_probs (`torch.Tensor`): `[B, C]`, at sampling time.
        context_states (`torch.Tensor`, *optional*): `[B, P+C-1, d]`.
        position_ids (`torch.Tensor`, *optional*): `[B, ..., P+C-1]`.
        action_support (`torch.Tensor`, *optional*): `[B, C, K]`.
        prompt_index (`torch.Tensor`, *optional*): `[B]`; rows of one number have one prompt, encoded once.
    """

    action_ids: torch.Tensor
    action_log_probs: torch.Tensor
    context_states: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    action_support: torch.Tensor | None = None
    prompt_index: torch.Tensor | None = None

    @classmethod
    def of(
        cls, output: LatentActionGenerateOutput, prompt_lengths: list[int], completion_lengths: list[int]
    ) -> list["Rollout"]:
        """
        The rollout of one `generate` call, as batches of one without padding.

        Args:
            output (`LatentActionGenerateOutput`): With or without context states.
            prompt_lengths (`list[int]`), completion_lengths (`list[int]`): In tokens, without padding.
        """
        width = output.sequences.shape[1] - output.action_ids.shape[1]
        rows = []
        for i, (prompt, completion) in enumerate(zip(prompt_lengths, completion_lengths, strict=True)):
            row, codes, states = slice(i, i + 1), slice(0, completion), slice(width - prompt, width + completion - 1)
            positions, support = output.position_ids, output.action_support
            rows.append(
                cls(
                    action_ids=output.action_ids[row, codes],
                    action_log_probs=output.action_log_probs[row, codes],
                    context_states=None if output.context_states is None else output.context_states[row, states],
                    position_ids=None if positions is None else positions[row, ..., states],
                    action_support=None if support is None else support[row, codes],
                )
            )
        return rows

    @classmethod
    def padded(cls, rows: list["Rollout"], prompt_lengths: list[int], multiple: int = 1) -> "Rollout":
        """One batch: prompts padded on the left and completions on the right, as the trainer pads tokens."""
        lengths = [row.action_ids.shape[1] for row in rows]
        prompt_width, width = (-(-max(x) // multiple) * multiple for x in (prompt_lengths, lengths))

        def joined(name: str, axis: int, left: bool = False, value: float = 0) -> torch.Tensor | None:
            parts = []
            for row, prompt, length in zip(rows, prompt_lengths, lengths, strict=True):
                tensor = getattr(row, name)
                if tensor is None:
                    return None
                beyond = [0, 0] * (tensor.ndim - 1 - axis % tensor.ndim)
                sides = [prompt_width - prompt if left else 0, width - length]
                parts.append(F.pad(tensor, beyond + sides, value=value))
            return torch.cat(parts)

        return cls(
            action_ids=joined("action_ids", 1),
            action_log_probs=joined("action_log_probs", 1),
            context_states=joined("context_states", 1, left=True),
            position_ids=joined("position_ids", -1, left=True),
            # Padding must leave a code to choose, or its log-probabilities are not numbers.
            action_support=joined("action_support", 1, value=1),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    @classmethod
    def from_tensors(cls, batch: dict[str, torch.Tensor]) -> "Rollout":
        return cls(**{f.name: batch[f.name] for f in fields(cls) if batch.get(f.name) is not None})

    def rows(self, start: int, end: int) -> "Rollout":
        return Rollout(**{name: tensor[start:end] for name, tensor in self.tensors().items()})
