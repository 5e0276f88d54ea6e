"""Rows of a data set as they are stored: numbered, with pictures that nothing has opened yet."""

import copy
from pathlib import Path
from typing import Any

from .images import load_row_images
from .rows import UNREADABLE, said


class StoredRows:
    """
    Rows of a map-style data set as they are stored. Pictures of `datasets.Image` columns stay encoded, so that they
    are opened by [`~latent_trl.data.images.load_row_images`] alone. A row that cannot be read keeps the reason, which
    is raised where the row is used. Each has further keys: `_row`, what messages call it; `_index`, its number; and
    `_source`, the name.

    Args:
        rows: A `datasets.Dataset`, or anything with a length and items that are dicts.
        name (`str`, defaults to `"train_dataset"`): The data set's.
        label (`str`, *optional*): What messages put after a row's number; the name of a set that is not trained on.
    """

    def __init__(self, rows: Any, name: str = "train_dataset", label: str = ""):
        import datasets

        self.rows = rows
        self.name = name
        self.label = label or ("" if name == "train_dataset" else f"of `{name}`")
        self.places: list[int] | None = None
        self.stored = self.features = None
        if isinstance(rows, datasets.Dataset) and rows.format["type"] is None:
            self.stored = rows.with_format("arrow")
            self.features = datasets.Features({k: encoded(feature) for k, feature in rows.features.items()})

    def only(self, places: list[int]) -> "StoredRows":
        """The rows of these numbers, which they keep."""
        some = copy.copy(self)
        some.places = places
        return some

    def __len__(self) -> int:
        return len(self.rows) if self.places is None else len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError(f"The data set has {len(self)} rows, and no row {index}.")
        if self.places is not None:
            index = self.places[index]
        try:
            if self.stored is None:
                row = self.rows[index]
            else:
                row = self.features.decode_example(self.stored[index].to_pylist()[0])
            return {**row, **self._place(index)}
        except Exception as error:
            # A transform of the data set's own raises whatever it runs into.
            return {UNREADABLE: f"{type(error).__name__}: {said(error)}", **self._place(index)}

    def _place(self, index: int) -> dict[str, Any]:
        return {"_row": f"{index} {self.label}" if self.label else index, "_index": index, "_source": self.name}


class OpenedRows:
    """
    Rows to be answered, measured or searched: each with its number under `_row`, and its pictures in RGB, opened when
    the row is read. Functions that take rows make these of others, for which no path may be opened.

    Args:
        rows: A `datasets.Dataset`, or anything with a length and items that are dicts.
        image_root (`str` or `Path`, *optional*): The only folder from which rows may name image files.
        name (`str`, defaults to `"train_dataset"`): The data set's.

    Example:

    ```python
    answer(model, processor, OpenedRows(rows, image_root="pictures"))
    ```
    """

    def __init__(self, rows: Any, image_root: str | Path | None = None, name: str = "train_dataset"):
        self.stored = StoredRows(rows, name)
        self.image_root = image_root

    def only(self, places: list[int]) -> "OpenedRows":
        """The rows of these numbers, which they keep."""
        some = copy.copy(self)
        some.stored = self.stored.only(places)
        return some

    @classmethod
    def of(cls, rows: Any) -> "OpenedRows":
        """`rows`, if they are such, or such of them."""
        return rows if isinstance(rows, cls) else cls(rows)

    @property
    def column_names(self) -> list[str]:
        import datasets

        rows = self.stored.rows
        if isinstance(rows, datasets.Dataset):
            return rows.column_names
        return list(dict.fromkeys(name for i in range(len(rows)) for name in rows[i]))

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, place: int | str) -> Any:
        if isinstance(place, str):
            return [self[i].get(place) for i in range(len(self))]
        row = load_row_images(self.stored[place], self.image_root)
        return {name: value for name, value in row.items() if name not in ("_index", "_source")}


def encoded(feature: Any) -> Any:
    """A feature of `datasets` in which images are their bytes and paths."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        length = {"length": feature.length} if isinstance(feature, datasets.List) else {}
        return type(feature)(encoded(feature.feature), **length)
    if isinstance(feature, dict):
        return {name: encoded(inner) for name, inner in feature.items()}
    return feature
