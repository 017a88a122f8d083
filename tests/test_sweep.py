"""The sweep: in which order and in which portions what is over is deleted. Pure: the table is a
list."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from recall_worker.settings import KEPT
from recall_worker.sweep import PAGES, ROWS, SMALLEST, Batch, Sweep

TABLES = ("recalls", "calls", "actions", "failures")


class Heap:
    """Four tables of pages, each with so many rows that may go; what is over is of one kind a
    table."""

    def __init__(self, *pages: list[int]) -> None:
        self.pages = dict(zip(TABLES, pages, strict=True))
        self.asked: list[Batch] = []

    def delete(self, batch: Batch) -> dict[str, int]:
        self.asked.append(batch)
        pages = self.pages[batch.statement]
        most = batch.values["most"]
        for n in range(
            batch.values["first"], min(len(pages), batch.values["first"] + batch.values["pages"])
        ):
            taken = min(most, pages[n])
            pages[n] -= taken
            most -= taken
        kind = "fired" if batch.statement == "recalls" else batch.statement
        return dict.fromkeys(KEPT, 0) | {kind: batch.values["most"] - most, "pages": len(pages)}

    def swept(self, keep: Mapping[str, float], took: float = 0.04) -> Sweep:
        sweep = Sweep(keep)
        while (batch := sweep.next()) is not None:
            sweep.note(batch, self.delete(batch), took)
            assert len(self.asked) < 100_000
        return sweep


ALL = dict.fromkeys(KEPT, 60.0)


@pytest.mark.parametrize("took", [0.0, 0.04, 1.0], ids=["fast", "as it should be", "slow"])
@pytest.mark.parametrize("rows", [0, 1, 31, 32, 5000])
def test_everything_is_reached(rows: int, took: float) -> None:
    """However many rows lie on a page, and however long a batch takes, what may go is gone in the
    end, and counted."""
    heap = Heap([rows] * 300, [1] * 7, [2] * 3, [4] * 2)
    swept = heap.swept(ALL, took)
    assert heap.pages == {
        "recalls": [0] * 300,
        "calls": [0] * 7,
        "actions": [0] * 3,
        "failures": [0] * 2,
    }
    assert swept.deleted == {
        "fired": 300 * rows,
        "cancelled": 0,
        "failed": 0,
        "calls": 7,
        "actions": 6,
        "failures": 8,
    }


@pytest.mark.parametrize(
    ("keep", "asked"),
    [
        (ALL, [*TABLES]),
        ({"actions": 60.0}, ["actions"]),
        ({"failures": 60.0}, ["failures"]),
        ({"fired": 60.0}, ["recalls"]),
        ({"calls": 60.0}, ["calls"]),
        ({"failed": 1.0, "calls": 2.0}, ["recalls", "calls"]),
        ({}, []),
    ],
)
def test_only_what_is_not_kept_for_ever(keep: dict[str, float], asked: list[str]) -> None:
    """A table of which everything is kept is not looked at; null stands for ever."""
    heap = Heap([], [], [], [])
    heap.swept(keep)
    assert [batch.statement for batch in heap.asked] == asked
    for batch in heap.asked:
        assert {kind: batch.values[kind] for kind in KEPT} == dict.fromkeys(KEPT) | keep


def test_a_slow_batch_makes_the_next_one_smaller() -> None:
    """Batches begin small, grow while they are quick, shrink when they are slow, and keep within
    their bounds."""
    sweep = Sweep({"fired": 1.0})
    sizes = []
    for took in [0.0] * 8 + [0.04] * 2 + [10.0] * 8:
        batch = sweep.next()
        assert batch is not None
        sizes.append((batch.values["pages"], batch.values["most"]))
        sweep.note(batch, dict.fromkeys(KEPT, 0) | {"pages": 10**9}, took)
    least = (PAGES * SMALLEST, int(ROWS * SMALLEST))
    assert sizes[0] == sizes[-1] == least and sizes[7:11] == [(PAGES, ROWS)] * 4
    assert max(sizes) == (PAGES, ROWS) and min(sizes) == least


def test_a_table_that_grows_meanwhile() -> None:
    """The walk ends where the table ended when it began: it does not run after inserts for ever."""
    sweep, grown, walked = Sweep({"calls": 1.0}), 1000, 0
    while (batch := sweep.next()) is not None:
        grown, walked = grown + 10_000, walked + 1
        sweep.note(batch, dict.fromkeys(KEPT, 0) | {"pages": grown}, 0.0)
        assert walked < 100


@pytest.mark.parametrize("referenced", [{0}, {5, 6, 7}, {499}, set(range(500)), {1, 100, 101}])
def test_rows_that_another_table_refers_to(referenced: set[int]) -> None:
    """They stay, and are counted; all others go, whichever page they are on."""
    rows = set(range(500))
    sweep, asked = Sweep({"fired": 1.0}), 0
    while (batch := sweep.next()) is not None:
        asked += 1
        assert asked < 5000
        first, pages = batch.values["first"], batch.values["pages"]
        # Ten rows a page.
        found = sorted(n for n in rows if first <= n // 10 < first + pages)
        chosen = found[batch.values["skip"] :][: batch.values["most"]]
        if referenced & set(chosen):
            sweep.refused(batch)
            continue
        rows -= set(chosen)
        sweep.note(batch, dict.fromkeys(KEPT, 0) | {"fired": len(chosen), "pages": 50}, 0.04)
    assert rows == referenced and sweep.referenced == len(referenced)
    assert sweep.deleted["fired"] == 500 - len(referenced)
