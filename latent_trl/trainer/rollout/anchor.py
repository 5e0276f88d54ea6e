"""Holds the policy where it was before RL on conversations that no reward speaks of."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...data.collator import RowError
from ...models.latent_action_model import LatentActionModel
from ...models.policy import LatentActionPolicy


class PolicyAnchor:
    """
    Draws conversations, and measures how far the policy has moved on them; as the pre-training mix of InstructGPT
    (arXiv:2203.02155, equation 2), but exact over codes and measured from the policy before RL.

    Args:
        reference (`LatentActionPolicy`): The policy before RL, frozen.
        dataset: Map-style data set of conversations, as [`LatentActionSpaceTrainer`] takes them.
        collate (`Callable`): Makes a batch of rows.
        rows (`int`): In a batch of one process.
        seed (`int`): What is drawn is a function of it, the step and the process alone.
    """

    def __init__(
        self,
        reference: LatentActionPolicy,
        dataset: Any,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        rows: int,
        seed: int,
    ):
        self.reference = reference
        self.dataset = dataset
        self.collate = collate
        self.rows = min(rows, len(dataset))
        self.seed = seed

    def batch(self, step: int, process_index: int) -> dict[str, Any]:
        """A batch of different rows; `RowError` for one that cannot be used."""
        generator = np.random.default_rng([self.seed, step, process_index])
        drawn = generator.choice(len(self.dataset), self.rows, replace=False).tolist()
        try:
            return self.collate([{**self.dataset[i], "_row": i} for i in drawn])
        except RowError as error:
            # The rows are counted in a data set of their own.
            raise RowError(f"`anchor_dataset`: {error}") from error

    @staticmethod
    def count(batch: dict[str, Any]) -> int:
        """The answers' tokens in a batch."""
        return int(batch["loss_mask"][:, 1:].sum())

    def divergence(self, model: LatentActionModel, batch: dict[str, Any]) -> torch.Tensor:
        """KL(reference ‖ policy) in nats, summed over the answers' tokens."""
        mask = batch["loss_mask"][:, 1:]
        with torch.no_grad():
            states, position_ids = model.encode(batch["input_ids"], batch["attention_mask"], **batch["vision"])
            before = self._log_probs(self.reference, states, batch, position_ids, mask)
        now = self._log_probs(model.policy, states, batch, position_ids, mask)
        return F.kl_div(now, before, reduction="sum", log_target=True)

    @staticmethod
    def _log_probs(policy, states, batch, position_ids, mask) -> torch.Tensor:
        logits = policy(states, batch["attention_mask"], position_ids)
        return logits[:, :-1][mask].log_softmax(dim=-1)
