"""What the pages say and what is counted, without a daemon: the corners that a real one seldom
comes into."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from recall_worker.database.connection import DatabaseUnavailable, StatementRejected
from recall_worker.ops.metrics import Metrics
from recall_worker.ops.pages import Pages, Question, connections_most
from recall_worker.protocols.server import Request
from recall_worker.worker.process import STANDSTILL
from recall_worker.worker.worker import Worker, WorkerStatus

VITALS = WorkerStatus(3, 1, "closed", "listening", database_is_lost=False, is_draining=False)
ASKED = cast(Request, None)


def counted(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"recall_worker_{name}", labels)


def settled(**facts: Any) -> dict[str, Any]:
    """The facts of a settled run."""
    told = {
        "outcome": "answered",
        "verdict": "finish",
        "status": "fired",
        "first": True,
        "lag_ms": 4.0,
        "lateness_ms": 9.0,
    }
    return told | {"duration_ms": 1000.0, "settled_ms": 1.0, "held_ms": 1005.0} | facts


def test_of_an_occurrence_the_first_call_is_what_its_owner_waited_for() -> None:
    """Lag is every call's, lateness the first one's."""
    metrics = Metrics(lambda: VITALS)
    metrics.hear("recall.settled", settled(outcome="unknown", verdict="retry", status="pending"))
    metrics.hear("recall.settled", settled(first=False, lateness_ms=7000.0))
    assert counted(metrics, "lag_seconds_count") == 2 and counted(
        metrics, "lag_seconds_sum"
    ) == pytest.approx(0.008)
    assert counted(metrics, "lateness_seconds_count") == 1 and counted(
        metrics, "lateness_seconds_sum"
    ) == pytest.approx(0.009)
    assert counted(metrics, "run_duration_seconds_sum") == pytest.approx(2.0)


def test_what_was_fired_early_is_not_late() -> None:
    """An operator's `fire` calls before the time: that counts as on time, as a sum must not
    shrink."""
    metrics = Metrics(lambda: VITALS)
    metrics.hear("recall.settled", settled(lag_ms=-0.2, lateness_ms=-3_600_000.0))
    assert counted(metrics, "lateness_seconds_sum") == counted(metrics, "lag_seconds_sum") == 0


def test_what_was_never_called() -> None:
    """A run that was given back unsent is settled, and neither an outcome nor late."""
    metrics = Metrics(lambda: VITALS)
    unsent = {
        "outcome": None,
        "verdict": "release",
        "status": "pending",
        "settled_ms": 1.0,
        "held_ms": 2.0,
    }
    metrics.hear("recall.settled", unsent)
    assert counted(metrics, "settles_total", verdict="release", status="pending") == 1
    assert counted(metrics, "lag_seconds_count") == 0
    assert {
        s.value
        for f in metrics.registry.collect()
        if f.name == "recall_worker_outcomes"
        for s in f.samples
    } == {0}


def test_events_that_are_for_people() -> None:
    """What only people are told counts nothing, and breaks nothing."""
    metrics = Metrics(lambda: VITALS)
    before = {
        (s.name, *s.labels.items()): s.value
        for f in metrics.registry.collect()
        for s in f.samples
        if "recall" in s.name
    }
    for event in (
        "worker.started",
        "recall.moved",
        "listener.listening",
        "ops.listening",
        "database.found",
    ):
        metrics.hear(event, {})
    after = {
        (s.name, *s.labels.items()): s.value
        for f in metrics.registry.collect()
        for s in f.samples
        if "recall" in s.name
    }
    assert before == after


async def test_a_loop_that_does_not_turn() -> None:
    """Where the claim loop is stuck and the process is not, /livez says for how long."""
    worker = SimpleNamespace(turned_at=time.monotonic() - STANDSTILL - 5, schema=None, backlog=None)
    pages = Pages(cast(Worker, worker), Metrics(lambda: VITALS))
    answer = await pages.livez(ASKED)
    assert (answer.status, answer.text) == (
        503,
        f"the claim loop has not turned for {STANDSTILL + 5:.0f} s\n",
    )
    worker.turned_at = time.monotonic()
    assert (await pages.livez(ASKED)).status == 200


@pytest.mark.parametrize(
    ("spare", "most"),
    [(-500, 4), (0, 4), (9, 4), (40, 20), (186, 64), (1 << 30, 64)],
)
def test_how_many_connections_the_port_may_hold(spare: int, most: int) -> None:
    """Half of what the work leaves over; a few where it leaves nothing, as a probe must be
    answered."""
    assert connections_most(spare) == most


async def test_many_ask_at_once_and_postgresql_is_asked_once() -> None:
    """All who ask while the answer is on its way get the same one; it stands for a while, and then
    it is asked anew."""
    asked, go = 0, asyncio.Event()

    async def ask() -> int:
        nonlocal asked
        asked += 1
        await go.wait()
        return asked

    question = Question(ask, every=3600)
    waiting = [asyncio.create_task(question.answer()) for _ in range(50)]
    await asyncio.sleep(0)
    go.set()
    assert set(await asyncio.gather(*waiting)) == {1}
    assert await question.answer() == 1
    eager = Question(ask, every=0)
    assert [await eager.answer() for _ in range(3)] == [2, 3, 4]


@pytest.mark.parametrize(
    "error", [DatabaseUnavailable("gone"), StatementRejected("permission denied", "42501")]
)
async def test_trouble_is_an_answer(error: Exception) -> None:
    """An outage or a refusal is told, and asked about again later."""

    async def ask() -> int:
        raise error

    assert await Question(ask, every=1.0).answer() == error.args[0]


async def test_nobody_waits_for_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question without an answer is left open, not broken off: those who ask meanwhile are told
    so, and it is asked once."""
    monkeypatch.setattr("recall_worker.ops.pages.PATIENCE", 0.01)
    asked = 0

    async def ask() -> int:
        nonlocal asked
        asked += 1
        await asyncio.Event().wait()
        return 0

    question = Question(ask, every=0.0)
    for _ in range(3):
        assert str(await question.answer()).startswith("PostgreSQL has not answered for")
    assert asked == 1
    await question.close()
