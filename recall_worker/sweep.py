"""A sweep: one walk through the tables that deletes what has been over for long enough, batch by
batch. Pure: the caller queries PostgreSQL.

Owns the order and the size of the batches: ranges of a table's pages, up to the end that the table
had when the walk began, and a limited number of rows in each. A batch that took long makes the next
one smaller. Where a batch can't be deleted, as another table refers to a recall in it, its pages
are taken one by one, and the rows of such a page, too: all others are deleted. The `prune` command
and the daemon's pruner sweep in the same way; the daemon adds pauses.

The database decides what is over, and whether the application holds it locked. Never here: SQL
(prune.sql), when to sweep (worker.pruner).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .settings import KEPT

PAGES, ROWS = 2048, 2000
"""The largest batch: pages that are read, rows that are deleted."""
SMALLEST = 1 / 32
"""Part of the largest batch: the size to begin with, and the smallest."""
AIM = 0.05
"""Seconds that a batch should take: between half and twice of it the size stays as it is."""


@dataclass(frozen=True, slots=True)
class Batch:
    statement: str
    """recalls, calls, actions or failures, of prune.sql."""
    values: dict[str, Any]


class Sweep:
    def __init__(self, keep: Mapping[str, float]) -> None:
        """`keep`: seconds, by what is kept (settings.KEPT). What is not in it is never deleted."""
        self.deleted = dict.fromkeys(KEPT, 0)
        self._keep = {kind: keep.get(kind) for kind in KEPT}
        *statuses, calls, actions, failures = (self._keep[kind] is not None for kind in KEPT)
        tables = {
            "recalls": any(statuses),
            "calls": calls,
            "actions": actions,
            "failures": failures,
        }
        self._left = [table for table, wanted in tables.items() if wanted]
        self._first = 0
        self._end: int | None = None
        self._size = SMALLEST
        self.referenced = 0
        """Recalls that stay, as another table refers to them."""
        self.vetoed = 0
        """Recalls that stay, as a trigger of the application's lets no delete pass."""
        self._one_by_one_to = 0
        """Before this page batches are single pages, as one of them has such a recall."""
        self._skipped: int | None = None
        """Rows of the page to leave out, where it is deleted row by row; else None."""

    def next(self) -> Batch | None:
        """The batch to delete now; None when the walk is over."""
        if not self._left:
            return None
        pages, most = max(1, int(PAGES * self._size)), max(1, int(ROWS * self._size))
        if self._first < self._one_by_one_to:
            pages = 1
        if self._skipped is not None:
            most = 1
        values = {"first": self._first, "pages": pages, "most": most, "skip": self._skipped or 0}
        return Batch(self._left[0], {**self._keep, **values})

    def refused(self, batch: Batch) -> None:
        """Note that nothing of that batch was deleted, as another table refers to a recall in
        it."""
        if self._skipped is not None:
            self.referenced += 1
            self._skipped += 1
        elif batch.values["pages"] > 1:
            self._one_by_one_to = batch.values["first"] + batch.values["pages"]
        else:
            self._skipped = 0

    def note(self, batch: Batch, row: Mapping[str, int], took: float) -> None:
        """Note what that batch deleted, and the seconds that it took."""
        deleted = {kind: row[kind] for kind in KEPT}
        for kind, count in deleted.items():
            self.deleted[kind] += count
        self.vetoed += row.get("vetoed", 0)
        if self._end is None:
            self._end = row["pages"]
        # Where the batch was full, more rows may be left in this range of pages.
        if sum(deleted.values()) < batch.values["most"]:
            self._first += batch.values["pages"]
            self._skipped = None
        if self._first >= self._end:
            self._left.pop(0)
            self._first, self._end, self._one_by_one_to = 0, None, 0
        if took > 2 * AIM:
            self._size = max(SMALLEST, self._size / 2)
        elif took < AIM / 2:
            self._size = min(1.0, self._size * 2)
