"""Holds the policy where it was before RL on conversations that no reward speaks of."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import nn

from ...data.bad_rows import BadRows
from ...data.collator import LatentActionDataCollator
from ...data.reading import StoredRows
from ...models.latent_action_model import LatentActionModel
from ...models.policy import LatentActionPolicy

# Conversations that each process draws with each micro-batch, and tokens of the longest.
BATCH_SIZE = 16
MAX_LENGTH = 2048


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
        on_bad_row (`str`, defaults to `"raise"`), folder (`str`, *optional*): Of [`BadRows`].
    """

    def __init__(
        self,
        reference: LatentActionPolicy,
        dataset: Any,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        rows: int,
        seed: int,
        on_bad_row: str = "raise",
        folder: str | None = None,
    ):
        self.reference = reference
        self.dataset = StoredRows(dataset, "anchor_dataset")
        self.bad_rows = BadRows(on_bad_row, folder, [self.dataset])
        self.collate = collate
        self.rows = min(rows, len(dataset))
        self.seed = seed
        # The batches of the update that is being made, by micro-batch, and their tokens, averaged over processes.
        self._waiting: dict[int, dict[str, Any]] = {}
        self._tokens = torch.ones(())

    @classmethod
    def of(cls, trainer: Any, dataset: Any) -> "PolicyAnchor":
        """The anchor of a trainer over `dataset`."""
        args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
        collate = LatentActionDataCollator.of(
            model, trainer.processing_class, max_length=MAX_LENGTH, image_root=args.image_root
        )
        options = {"on_bad_row": args.on_bad_row, "folder": args.output_dir}
        return cls(trainer.reference.policy, dataset, collate, BATCH_SIZE, args.seed, **options)

    def preflight(self) -> None:
        """Looks at some rows before the first step; raises [`RowError`] as `bad_rows` decides."""
        self.bad_rows.preflight(lambda row: self.collate([row]), seed=self.seed)

    def batch(self, step: int, process_index: int) -> dict[str, Any]:
        """A batch of different rows; `RowError` for one that cannot be used, unless such rows are skipped."""
        generator = np.random.default_rng([self.seed, step, process_index])
        drawn = generator.choice(len(self.dataset), self.rows, replace=False).tolist()
        return self.bad_rows.collate([self.dataset[i] for i in drawn], self.collate)

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

    def loss(self, trainer: Any, model: nn.Module, step: int) -> torch.Tensor:
        """
        The term of one micro-batch: the parts of an update add up to the mean over the tokens of all its micro-batches
        and processes.

        Args:
            trainer (`GRPOTrainer`): Whose update it is.
            model (`nn.Module`): The wrapped model.
            step (`int`): The number of the micro-batch in the run.
        """
        accelerator = trainer.accelerator
        if step not in self._waiting:
            steps = range(step, step + trainer.current_gradient_accumulation_steps)
            self._waiting = {s: self.batch(s, accelerator.process_index) for s in steps}
            own = torch.tensor(float(sum(map(self.count, self._waiting.values()))), device=accelerator.device)
            self._tokens = accelerator.reduce(own, "mean").clamp(min=1e-6)
        batch = send_to_device(self._waiting.pop(step), accelerator.device)
        # DDP counts the gradients of the pass that it saw last: what this one leaves out it would take for unused.
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        total = model(objective=self.divergence, batch=batch).loss
        parts = torch.stack([total.detach(), total.new_tensor(float(self.count(batch)))])
        divergence, tokens = accelerator.reduce(parts, "sum").tolist()
        trainer._metrics["train"]["anchor/kl"].append(divergence / max(tokens, 1.0))
        # Gradients of processes are averaged, and so the count is an average too.
        return trainer.args.anchor_coef * total / self._tokens

    @staticmethod
    def _log_probs(policy, states, batch, position_ids, mask) -> torch.Tensor:
        logits = policy(states, batch["attention_mask"], position_ids)
        return logits[:, :-1][mask].log_softmax(dim=-1)
