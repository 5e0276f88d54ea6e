"""Rows of a data set as they are stored: numbered, with pictures that nothing has opened yet."""

from typing import Any

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
        label (`str`, *optional*): What messages put after a row's number.
    """

    def __init__(self, rows: Any, name: str = "train_dataset", label: str = ""):
        import datasets

        self.rows = rows
        self.name = name
        self.label = label
        self.stored = self.features = None
        if isinstance(rows, datasets.Dataset) and rows.format["type"] is None:
            self.stored = rows.with_format("arrow")
            self.features = datasets.Features({k: encoded(feature) for k, feature in rows.features.items()})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError(f"The data set has {len(self)} rows, and no row {index}.")
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
