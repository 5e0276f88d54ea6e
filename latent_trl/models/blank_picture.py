"""A prompt with a blank picture, put under batches without one where an engine shards the backbone."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class BlankPicture:
    """
    Where the backbone's tensors are sharded, a process that runs the vision tower waits for all others to gather its
    tensors with it. With this row in a batch that has no picture each process runs it as often.

    Args:
        ids (`list[int]`): Tokens of the prompt.
        fields (`dict[str, list[int]]`): What else the processor says of each token.
        vision (`dict[str, torch.Tensor]`): Its visual inputs.
    """

    ids: list[int]
    fields: dict[str, list[int]]
    vision: dict[str, torch.Tensor]

    def is_needed(self, inputs: dict[str, Any]) -> bool:
        """Whether `inputs` have no picture. With positions imposed they are a second look at a batch, which no process
        gives pictures to."""
        return inputs.get("position_ids") is None and not any(name in inputs for name in self.vision)

    def below(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """A batch of text, `input_ids` and `attention_mask` `[B, L]` and further inputs, with one row more, padded on
        the right to the longer of the two."""
        shape, device = input_ids.shape, input_ids.device
        width = max(shape[1], len(self.ids))

        def joined(batch: torch.Tensor | None, own: list[int], filler: int = 0) -> torch.Tensor:
            whole = torch.full((shape[0] + 1, width), filler, dtype=torch.long, device=device)
            if batch is not None:
                whole[:-1, : shape[1]] = batch
            whole[-1, : len(own)] = torch.tensor(own, device=device)
            return whole

        per_token = {name for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.shape == shape}
        fields = {name: joined(inputs.get(name), self.fields.get(name, [])) for name in per_token | set(self.fields)}
        vision = {name: value.to(device) for name, value in self.vision.items()}
        mask = joined(attention_mask, [1] * len(self.ids))
        return joined(input_ids, self.ids, self.ids[-1]), mask, {**inputs, **fields, **vision}
