"""Paired and text-only rows side by side."""

import pickle

import pytest

from latent_trl.data.mixing import MixedRows, MixedRowsCollator, flatten

PAIRED = [{"messages": [i]} for i in range(5)]
TEXT = [{"messages": [10 + i]} for i in range(3)]


def test_paired_rows_alone():
    rows = MixedRows(PAIRED)
    assert len(rows) == 5 and rows[4][0].items() >= {"messages": [4], "_row": 4}.items()


@pytest.mark.parametrize("paired, text", [(PAIRED, TEXT), (TEXT, PAIRED)])
def test_the_shorter_kind_is_repeated_and_each_of_the_longer_is_seen_once(paired, text):
    rows = MixedRows(paired, text)
    assert len(rows) == 5
    items = [rows[i] for i in range(len(rows))]
    assert [item[0]["messages"] for item in items] == [paired[i % len(paired)]["messages"] for i in range(5)]
    assert [item[1]["messages"] for item in items] == [text[i % len(text)]["messages"] for i in range(5)]


def test_errors_name_the_row_of_the_kind():
    item = MixedRows(PAIRED, TEXT)[4]
    assert [row["_row"] for row in item] == [4, "1 of the text-only data"]


def test_a_batch_has_paired_rows_first():
    rows = MixedRows(PAIRED, TEXT)
    batch = [rows[0], rows[1]]
    assert [row["messages"][0] for row in flatten(batch)] == [0, 1, 10, 11]
    assert [row["messages"][0] for row in MixedRowsCollator(list)(batch)] == [0, 1, 10, 11]


def test_the_collator_goes_to_workers_of_any_kind():
    assert pickle.loads(pickle.dumps(MixedRowsCollator(list)))([[1], [2]]) == [1, 2]


def test_empty_data_sets():
    with pytest.raises(ValueError, match="training data set is empty"):
        MixedRows([])
    with pytest.raises(ValueError, match="`text_dataset` is empty. Leave it out"):
        MixedRows(PAIRED, [])
