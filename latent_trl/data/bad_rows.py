"""Rows that cannot be used: the first ends the run, or each is left out, listed, and replaced by the next that can."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers.utils import logging

from .reading import StoredRows
from .rows import RowError

logger = logging.get_logger(__name__)

Used = TypeVar("Used")
ON_BAD_ROW = ("raise", "skip")
FILE = "bad_rows.jsonl"
SHOWN = 3
# So many rows after a bad one are tried in its place.
TRIES = 200


class BadRows:
    """
    Decides what becomes of rows that cannot be used.

    A skipped row is replaced by the next of its data set that can be used, so that batches keep their size and a run
    stays a function of configuration, data and seed; where a whole set is read, as in an evaluation, it is left out.
    Each is written to a file once, with its reason.

    Args:
        on_bad_row (`str`, defaults to `"raise"`): `"raise"` ends the run with the row's [`RowError`]; `"skip"` goes
            on.
        folder (`str` or `Path`, *optional*): Where `bad_rows.jsonl` is written; needed to skip.
        sources (`list[StoredRows]`, *optional*): The data sets that rows come from. A row of none of them, as of a
            stream, is replaced by another of its batch.

    Raises:
        ValueError: For another `on_bad_row`, or `"skip"` without a folder.
    """

    def __init__(
        self,
        on_bad_row: str = "raise",
        folder: str | Path | None = None,
        sources: list[StoredRows] | None = None,
    ):
        if on_bad_row not in ON_BAD_ROW:
            raise ValueError(f"`on_bad_row` must be one of {list(ON_BAD_ROW)}, got {on_bad_row!r}.")
        if on_bad_row == "skip" and folder is None:
            raise ValueError("`on_bad_row='skip'` needs a folder, in which skipped rows are listed.")
        self.on_bad_row = on_bad_row
        self.path = None if folder is None else Path(folder) / FILE
        self.sources = {source.name: source for source in sources or []}
        # Of this process; those of all are in the file.
        self._listed: set[tuple[str, Any]] = set()
        self._usable: dict[str, list[int]] = {}

    def usable(
        self, rows: list[dict[str, Any]], use: Callable[[dict[str, Any]], Used]
    ) -> list[tuple[dict[str, Any], Used]]:
        """
        Each row with what `use` makes of it, or the row that takes its place.

        Args:
            rows (`list[dict]`): Rows of a batch.
            use (`Callable`): Raises [`RowError`] for a row that cannot be used. Equal rows that stand beside each
                other, as those of a group, are used once.

        Raises:
            RowError: With `on_bad_row="raise"`, of the first bad row; else when no row can take the place of one.
        """
        found: list[tuple[dict[str, Any], Used] | None] = []
        for i, row in enumerate(rows):
            if i and row is rows[i - 1]:
                found.append(found[-1])
                continue
            try:
                found.append((row, use(row)))
            except RowError as error:
                found.append(self._replacement(row, error, use))
        good = [pair for pair in found if pair is not None]
        if not good:
            raise RowError("No row of the batch can be used, and there is none to take their place.")
        return [good[i % len(good)] if pair is None else pair for i, pair in enumerate(found)]

    def collate(self, rows: list[dict[str, Any]], collate: Callable[[list[dict[str, Any]]], Any]) -> Any:
        """A batch of `rows`, by `collate`; rows are looked at one by one only when there is a bad one."""
        try:
            return collate(rows)
        except RowError:
            if self.on_bad_row == "raise":
                raise
            return collate([row for row, _ in self.usable(rows, lambda row: collate([row]))])

    def preflight(self, use: Callable[[dict[str, Any]], Any], count: int = 32, seed: int = 0) -> dict[str, str]:
        """
        Looks at some rows of each data set before the first step, and says what it found.

        Args:
            use (`Callable`): As in [`usable`].
            count (`int`, defaults to 32): Rows of each data set; 0 looks at none.
            seed (`int`, defaults to 0): Of the draw.

        Returns:
            The reason for each row that cannot be used.

        Raises:
            RowError: For a bad row with `on_bad_row="raise"`, and in any case when every row is bad.
        """
        reasons: dict[str, str] = {}
        for source in self.sources.values() if count else ():
            drawn = sorted(random.Random(seed).sample(range(len(source)), min(count, len(source))))
            bad = {}
            for index in drawn:
                row = source[index]
                try:
                    use(row)
                except RowError as error:
                    bad[str(row["_row"])] = str(error)
            self._say(source.name, len(drawn), list(bad.values()))
            reasons |= bad
        return reasons

    def usable_places(self, source: StoredRows, use: Callable[[dict[str, Any]], Any]) -> list[int]:
        """
        Numbers of the rows of a set that is read whole. With `on_bad_row="raise"` all; else each row is looked at,
        those of `sources` once, and what cannot be used is listed and left out.

        Args:
            source (`StoredRows`): The set.
            use (`Callable`): As in [`usable`].

        Raises:
            RowError: When no row can be used.
        """
        if self.on_bad_row == "raise":
            return list(range(len(source)))
        own = self.sources.get(source.name)
        is_known = own is not None and own.rows is source.rows
        if is_known and source.name in self._usable:
            return self._usable[source.name]
        places, first = [], None
        for index in range(len(source)):
            row = source[index]
            try:
                use(row)
            except RowError as error:
                first = first or error
                self._list(row, error)
            else:
                places.append(index)
        if first is not None and not places:
            raise RowError(f"{first} (No row of `{source.name}` can be used: this is a matter of the settings.)")
        if is_known:
            self._usable[source.name] = places
        return places

    def figures(self) -> dict[str, float]:
        """For the log: `bad_rows`, how many have been skipped, where rows are."""
        return {"bad_rows": float(self.count())} if self.on_bad_row == "skip" else {}

    def count(self) -> int:
        """Number of different rows that were skipped, by every process and worker."""
        return len({_key(entry) for entry in self.listed()})

    def listed(self) -> list[dict[str, Any]]:
        """Entries of the file: `data`, `row` and `reason`."""
        if self.path is None or not self.path.is_file():
            return []
        entries = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                # The line of a process that was killed.
                continue
        return entries

    def _say(self, name: str, looked: int, reasons: list[str]) -> None:
        if not reasons:
            logger.warning(f"`{name}`: {looked} rows were looked at; all can be used.")
            return
        more = f"{len(reasons)} of {looked} rows of `{name}` that were looked at cannot be used"
        first = "; ".join(reasons[:SHOWN])
        if self.on_bad_row == "raise":
            raise RowError(f"{first} ({more}. `on_bad_row='skip'` leaves such rows out and lists them.)")
        if len(reasons) == looked:
            raise RowError(f"{first} ({more}: this is a matter of the settings, not of single rows.)")
        logger.warning(f"{more}, and will be skipped and listed in {self.path}: {first}")

    def _replacement(self, row: dict[str, Any], error: RowError, use: Callable) -> tuple[dict[str, Any], Any] | None:
        """The next row of the data set that can be used; `None` where it has no number."""
        if self.on_bad_row == "raise":
            raise error
        self._list(row, error)
        source = self.sources.get(row.get("_source", ""))
        if source is None:
            return None
        tries = min(TRIES, len(source)) - 1
        for step in range(1, tries + 1):
            other = source[(row["_index"] + step) % len(source)]
            try:
                return other, use(other)
            except RowError as own:
                self._list(other, own)
        raise RowError(
            f"{error} Nor can the {tries} rows after it be used: this is a matter of the settings."
        ) from error

    def _list(self, row: dict[str, Any], error: RowError) -> None:
        entry = {"data": row.get("_source"), "row": row.get("_index"), "reason": str(error)}
        key = _key(entry)
        if key in self._listed:
            return
        # A worker, another process or the run before may have listed it.
        others = set(map(_key, self.listed()))
        self._listed |= {key, *others}
        if key in others:
            return
        assert self.path is not None, "rows are skipped with a folder alone"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        logger.warning(f"Skipped, and listed in {self.path}: {error}")


def _key(entry: dict[str, Any]) -> tuple[str, Any]:
    """What tells an entry from others: a row of a stream has no number."""
    return str(entry["data"]), entry["reason"] if entry["row"] is None else entry["row"]
