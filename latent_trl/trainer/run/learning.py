"""What the trainers that learn from data sets share: means over whole updates and whole sets, and exact resuming."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging

from ...data.bad_rows import BadRows
from ...data.collator import LatentActionDataCollator
from ...data.mixing import MixedRows, MixedRowsCollator
from ...models.latent_action_model import LatentActionModel
from .component_training import ComponentTrainingMixin
from .loading import check_columns, check_one_set
from .manifest import write_json

logger = logging.get_logger(__name__)

RUN_STATE_FILE = "run_state_{rank}.json"


def evaluation_rows(dataset: Any, name: str = "eval_dataset") -> Any:
    """
    An evaluation set, or a dict of several, as the trainers read them.

    Raises:
        ValueError: When one lacks the columns or is empty; names the set.
    """
    if dataset is None or isinstance(dataset, (str, MixedRows)):
        return dataset
    check_one_set(dataset, name)
    if isinstance(dataset, dict):
        return {key: evaluation_rows(rows, f"{name}[{key!r}]") for key, rows in dataset.items()}
    check_columns(dataset, name)
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty. Leave it out to learn without an evaluation.")
    return MixedRows(dataset, name=name)


def bad_rows_of(args: Any, *datasets: Any) -> BadRows:
    """What becomes of rows that cannot be used, of data sets as [`evaluation_rows`] gives them."""
    sets = [rows for one in datasets for rows in (one.values() if isinstance(one, dict) else [one])]
    sources = [source for rows in sets if isinstance(rows, MixedRows) for source in rows.sources]
    return BadRows(args.on_bad_row, args.output_dir, sources)


def conversation_collator(args: Any, model: LatentActionModel, processing_class: Any) -> LatentActionDataCollator:
    """What makes batches of conversations, by a trainer's arguments."""
    return LatentActionDataCollator.of(
        model,
        processing_class,
        max_length=args.max_length,
        assistant_only=args.assistant_only_loss,
        image_root=args.image_root,
    )


def row_sums(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of each row's `values`, `[M]` at the marked positions of `mask` `[B, L]`, and their number: `[B, 2]`."""
    sums = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    sums[mask] = values.float()
    return torch.stack([sums.sum(dim=1), mask.sum(dim=1).float()], dim=1)


def position_means(prediction: EvalPrediction, names: tuple[str, ...]) -> dict[str, float]:
    """Means over all positions of a set, of rows' sums and numbers `[rows, F]`. One without a position is left out."""
    sums = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    counts = np.asarray(prediction.label_ids, dtype=np.float64).sum(axis=0)
    return {name: float(total / count) for name, total, count in zip(names, sums, counts, strict=True) if count > 0}


class LearningMixin(ComponentTrainingMixin):
    """
    For trainers that learn from data sets.

    A loss is the mean over the whole update: Trainer reads the batches of an accumulation window together, and hands
    what [`whole_update`] makes of them to the loss of each. An evaluation is the mean over all positions of a set. A
    resumed run goes on bit by bit, in the middle of a logging interval too.
    """

    data_collator: MixedRowsCollator

    def __init__(self, *args, **kwargs):
        super().__init__(*args, compute_metrics=self.held_out_metrics, **kwargs)
        if isinstance(self.data_collator, MixedRowsCollator):
            self.bad_rows = self.data_collator.bad_rows
        # The loss is divided by the whole update's positions, and Trainer must not divide it by the batches again.
        self.model_accepts_loss_kwargs = True

    def prepared(self, batch: dict[str, Any], place: int | None) -> dict[str, Any]:
        """A batch of the collator's on the device, as the loss reads it; `place` is its number in the update, or `None`
        in an evaluation. Trainer restores random states only afterwards when it resumes: none may be drawn from here.
        """
        return self._prepare_inputs(batch)

    def whole_update(self, batches: list[dict[str, Any]]) -> Any:
        """What the loss of each of `batches`, those of one update on this process, must know of the others."""
        raise NotImplementedError

    def held_out_sums(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """`[B, F, 2]`: for each row and figure, the sum over the row's positions, and their number."""
        raise NotImplementedError

    def held_out_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics of an evaluation, of the rows' sums and numbers."""
        raise NotImplementedError

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self.prepared(batch, place) for place, batch in enumerate(batches)]
        return batches, self.whole_update(batches) if batches else None

    def usable_rows(self, dataset: Any, name: str) -> MixedRows:
        return self.data_collator.usable(evaluation_rows(dataset, name))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # Trainer gathers what it takes for predictions and labels, and drops the rows that fill up a last batch.
        inputs = self.prepared(inputs, None)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = model(objective=self.held_out_sums, batch=inputs).loss
        return None, sums[..., 0], sums[..., 1]

    def run_state(self) -> dict[str, Any]:
        """What changes during a run, as plain JSON values; a subclass adds its own."""
        return {
            "loss": self._tr_loss.item(),
            "last_logged_step": self._globalstep_last_logged,
            "health": self.health.state(),
        }

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Puts back what [`run_state`] gave."""
        self.health.load_state(state["health"])
        self._tr_loss.fill_(state["loss"])
        self._globalstep_last_logged = state["last_logged_step"]

    def save_run(self, folder: str | Path) -> None:
        write_json(Path(folder) / RUN_STATE_FILE.format(rank=self.args.process_index), self.run_state())

    def restore_run(self) -> None:
        if self.resumed_from is None:
            return
        path = Path(self.resumed_from) / RUN_STATE_FILE.format(rank=self.args.process_index)
        if path.is_file():
            self.load_run_state(json.loads(path.read_text(encoding="utf-8")))
        else:
            logger.warning(f"{self.resumed_from} has no {path.name}: the logs do not go on exactly.")
