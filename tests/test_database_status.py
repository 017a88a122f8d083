"""Whether expired leases may be taken: never while PostgreSQL is lost, nor for a third of a lease
after it answers again."""

from __future__ import annotations

import time

import pytest

from recall_worker.events import Events
from recall_worker.worker.database_status import DatabaseStatus

LEASE = 60.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock, in its only element."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_nothing_is_taken_while_postgresql_is_lost(clock: list[float]) -> None:
    """A claim that is asked for in an outage may be the first thing that PostgreSQL answers: before
    living owners could renew."""
    seen = DatabaseStatus(Events(worker="w"), LEASE)
    assert seen.may_take_expired
    seen.lost("connection refused")
    clock[0] += 10 * LEASE
    assert not seen.may_take_expired
    seen.found()
    assert not seen.may_take_expired
    clock[0] += LEASE / 3 - 0.001
    assert not seen.may_take_expired
    clock[0] += 0.001
    assert seen.may_take_expired


def test_a_process_that_stood_still_is_courteous_too(clock: list[float]) -> None:
    seen = DatabaseStatus(Events(worker="w"), LEASE)
    seen.woke(LEASE / 3)
    assert seen.may_take_expired
    seen.woke(LEASE / 3 + 0.001)
    assert not seen.may_take_expired
    clock[0] += LEASE / 3
    assert seen.may_take_expired


def test_what_waits_for_the_return_is_told_once(clock: list[float]) -> None:
    seen = DatabaseStatus(Events(worker="w"), LEASE)
    returns: list[float] = []
    seen.on_return(lambda: returns.append(clock[0]))
    seen.found()
    assert returns == []
    seen.lost("reset")
    seen.lost("reset again")
    clock[0] += 5
    seen.found()
    seen.found()
    assert returns == [1005.0]


# --- locks and commits ----------------------------------------------------------------------------


class Kept(Events):
    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, object]] = []

    def tell(self, event: str, **facts: object) -> None:
        self.all.append((event, facts.get("after_s")))


def test_a_lock_is_no_outage_and_has_a_grace(clock: list[float]) -> None:
    """However often it is met, it is told once, and once more when a write gets past it; what only
    reads meanwhile ends nothing. Owners come first afterwards, as after an outage."""
    told = Kept()
    seen = DatabaseStatus(told, LEASE)
    returns: list[float] = []
    seen.on_return(lambda: returns.append(clock[0]))
    for _ in range(3):
        seen.locked("canceling statement due to lock timeout")
        seen.found()
        clock[0] += 10
    assert seen.is_locked and not seen.is_lost and not seen.may_take_expired
    assert returns == []
    seen.unlocked()
    seen.unlocked()
    assert not seen.is_locked and not seen.may_take_expired
    assert returns == [clock[0]]
    clock[0] += LEASE / 3
    assert seen.may_take_expired
    assert told.all == [("table.locked", None), ("table.unlocked", 30.0)]


def test_unconfirmed_commits_are_told_once(clock: list[float]) -> None:
    told = Kept()
    seen = DatabaseStatus(told, LEASE)
    seen.committed(confirmed=True)
    for _ in range(3):
        seen.committed(confirmed=False)
        clock[0] += 5
    assert seen.may_take_expired and not seen.is_lost
    seen.committed(confirmed=True)
    seen.committed(confirmed=True)
    assert told.all == [("commit.unconfirmed", None), ("commit.confirmed", 15.0)]
