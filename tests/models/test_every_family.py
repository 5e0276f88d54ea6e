"""The committed table of every family is what is found, and the page is made from it."""

import json

import pytest
from every_family import NAMES, RELEASE, TABLE, examine, made_part, page_of

RECORDS = json.loads(TABLE.read_text(encoding="utf-8"))
FAMILIES = [(kind, name) for kind, names in NAMES.items() for name in names]
of_this_release = pytest.mark.skipif(
    RELEASE != RECORDS["transformers"], reason=f"the table is of transformers {RECORDS['transformers']}"
)


@of_this_release
def test_no_family_is_left_out():
    assert {(kind, name) for kind in NAMES for name in RECORDS[kind]} == set(FAMILIES)


def test_enough_families_work_and_the_others_have_a_reason():
    works = {kind: [n for n, record in RECORDS[kind].items() if record["status"] == "works"] for kind in NAMES}
    assert len(works["text"]) >= 60 and len(works["vision"]) >= 25
    for kind in NAMES:
        assert all(RECORDS[kind][name]["reason"] for name in RECORDS[kind] if name not in works[kind])


def test_the_page_is_made_from_the_table():
    assert made_part() == page_of(RECORDS)


@of_this_release
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), FAMILIES)
def test_a_family_is_as_the_table_says(kind, name):
    expected = RECORDS[kind][name]
    if expected["status"] == "not built":
        pytest.skip(expected["reason"])
    found = examine(kind, name)
    # The words of a reason may hold measured numbers.
    assert {k: v for k, v in found.items() if k != "reason"} == {k: v for k, v in expected.items() if k != "reason"}
