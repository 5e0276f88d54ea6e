"""Rows as they are stored: pictures stay closed until they are used, and what cannot be read has its number."""

import io

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from latent_trl.data.images import load_row_images
from latent_trl.data.mixing import MixedRows
from latent_trl.data.reading import StoredRows
from latent_trl.data.rows import RowError


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def of_images(cells: list) -> Dataset:
    features = Features({"n": Value("int64"), "images": List(ImageFeature()), "image": ImageFeature()})
    rows = [{"n": i, "images": [cell], "image": cell} for i, cell in enumerate(cells)]
    return Dataset.from_list(rows, features=features)


def test_pictures_stay_encoded_and_rows_keep_their_number():
    cells = [{"bytes": png(colour), "path": None} for colour in ("red", "blue", "green")]
    rows = StoredRows(of_images(cells).select([2, 0, 1]))
    assert len(rows) == 3 and [row["n"] for row in rows] == [2, 0, 1] and [row["_row"] for row in rows] == [0, 1, 2]
    assert rows[1]["images"] == [cells[0]] and rows[1]["image"] == cells[0]
    loaded = load_row_images(rows[0])
    assert loaded["images"][0].getpixel((0, 0)) == loaded["image"].getpixel((0, 0)) == (0, 128, 0)


def test_paths_and_addresses_in_image_columns_are_not_opened(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    rows = StoredRows(of_images([{"bytes": None, "path": str(tmp_path / "secret.png")}]))
    with pytest.raises(RowError, match=r"Row 0: `images`\[0\]: .*no `image_root` says"):
        load_row_images(rows[0])
    assert load_row_images(rows[0], tmp_path)["image"].size == (4, 4)
    rows = StoredRows(of_images([{"bytes": None, "path": "http://127.0.0.1:9/a.png"}]))
    with pytest.raises(RowError, match="Row 0: .*is a URL"):
        load_row_images(rows[0], tmp_path)


def test_a_truncated_picture_is_named_by_its_row():
    whole = png()
    rows = StoredRows(of_images([{"bytes": whole if i != 2 else whole[:40], "path": None} for i in range(4)]))
    assert [row["n"] for row in rows] == [0, 1, 2, 3]
    with pytest.raises(RowError, match=r"Row 2: `images`\[0\]: 40 bytes cannot be read as an image"):
        load_row_images(rows[2])


def test_a_transform_that_fails_is_named_by_its_row():
    def transform(batch):
        if 1 in batch["n"]:
            raise KeyError("lost")
        return batch

    rows = StoredRows(Dataset.from_dict({"n": [0, 1, 2]}).with_transform(transform))
    assert rows[0] == {"n": 0, "_row": 0, "_index": 0, "_source": "train_dataset"}
    with pytest.raises(RowError, match=r"Row 1: cannot be read \(KeyError: 'lost'\)"):
        load_row_images(rows[1])
    with pytest.raises(IndexError, match="no row 3"):
        rows[3]


def test_mixed_rows_are_stored_rows():
    rows = of_images([{"bytes": png(), "path": None}])
    items = MixedRows(rows, [{"messages": "a"}, {"messages": "b"}])
    assert len(items) == 2 and items[1][0]["images"] == rows.with_format("arrow")[0].to_pylist()[0]["images"]
    own = {"_row": "1 of the text-only data", "_index": 1, "_source": "text_dataset"}
    assert items[1][1] == {"messages": "b", **own}
