"""Paired and text-only rows in one batch."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset

from .bad_rows import BadRows
from .reading import StoredRows


class MixedRows(Dataset):
    """
    Item i is row i of the paired data, and, when there are text-only data, row i of those beside it.

    Args:
        paired: Map-style data set of conversations with images (or of any kind, for a text model).
        text: Map-style data set of conversations without images, *optional*; repeated when it is the shorter.
        name (`str`, defaults to `"train_dataset"`): Of the paired data.
    """

    def __init__(self, paired, text=None, name: str = "train_dataset"):
        if len(paired) == 0:
            raise ValueError("The training data set is empty.")
        if text is not None and len(text) == 0:
            raise ValueError("`text_dataset` is empty. Leave it out to learn from the paired data alone.")
        self.paired, self.text = paired, text
        self.sources = [StoredRows(paired, name)]
        if text is not None:
            self.sources.append(StoredRows(text, "text_dataset", "of the text-only data"))

    def __len__(self) -> int:
        return max(map(len, self.sources))

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [source[index % len(source)] for source in self.sources]


def flatten(items: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of a batch of [`MixedRows`] items, paired ones first."""
    return [item[kind] for kind in range(len(items[0])) for item in items]


@dataclass
class MixedRowsCollator:
    """
    Batches of [`MixedRows`] items, for a `DataLoader` and its workers.

    Args:
        collate (`Callable`): Makes a batch of rows.
        bad_rows (`BadRows`, *optional*): What becomes of rows that cannot be used; by default the first one raises.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    bad_rows: BadRows = field(default_factory=BadRows)

    def preflight(self, seed: int) -> None:
        """Looks at some rows of each data set; raises [`~latent_trl.data.rows.RowError`] as `bad_rows` decides."""
        self.bad_rows.preflight(lambda row: self.collate([row]), seed=seed)

    def usable(self, rows: MixedRows) -> MixedRows:
        """The rows of an evaluation set that can be used, those that cannot being left out as `bad_rows` decides."""
        some = copy.copy(rows)
        some.sources = [s.only(self.bad_rows.usable_places(s, lambda row: self.collate([row]))) for s in rows.sources]
        return some

    def __call__(self, items: list[list[dict[str, Any]]]) -> dict[str, Any]:
        return self.bad_rows.collate(flatten(items), self.collate)
