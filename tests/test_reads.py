"""What people ask: `list`, `show`, `why`, `workers`, `stats`, and what `prune` leaves. Right answers first, then that they are quick on a million rows."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from recall_worker import statements
from recall_worker.cli import prune as pruning

from . import postgres
from .application import Application
from .conftest import Connection
from .daemon import Daemons
from .endpoint import Endpoint, Gate, reply
from .test_cli import operate, rows_of

HOUR = timedelta(hours=1)
RECALL = """
insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds, additional_context_message, status, created_at, updated_at)
values (%(id)s, %(session)s, %(call_type)s, now() + %(due)s * interval '1 second', case %(call_type)s when 'recurring' then 3600 end,
    'Look again.', %(status)s, now(), now())
"""
WORKER = """
insert into recall_workers (worker, host, pid, version, slots, seen_at, breaker, settings)
values (%(worker)s, 'h', 1, '0.1.0', %(slots)s, now() - %(silent)s * interval '1 second', %(breaker)s, %(settings)s)
"""
LEASE = """
update session_recalls
set lease = gen_random_uuid(), leased_by = %(worker)s, leased_at = now() - interval '5 seconds', attempt = 1,
    lease_until = now() + %(left)s * interval '1 second'
where id = %(id)s
"""
MARK = """
insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome, session_id, worker, lease, calls, scheduled_for, called_at,
    last_called_at, ended_at, http_status, reason, settled)
values (%(id)s, %(occurrence)s, 0, %(attempt)s, %(outcome)s, 's', 'w', gen_random_uuid(), %(calls)s, %(at)s - %(late)s * interval '1 second',
    %(at)s, %(at)s, %(at)s, 409, 'why not', 'pending')
"""


class Desk:
    """A database, and rows put into it as a worker or the application would leave them."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.conn = psycopg.connect(dsn, autocommit=True, row_factory=dict_row)
        self.conn.execute("insert into sessions values ('s', 'ann'), ('t', 'ann'), ('z', 'zoe') on conflict do nothing")

    def recall(self, id: str = "r", session: str = "s", due: float = 3600, call_type: str = "once", status: str = "pending", **columns: Any) -> None:
        self.conn.execute(RECALL.encode(), {"id": id, "session": session, "due": due, "call_type": call_type, "status": status})
        self.change(id, **columns)

    def change(self, id: str = "r", **columns: Any) -> None:
        for name, value in columns.items():
            self.conn.execute(f"update session_recalls set {name} = %s where id = %s".encode(), [value, id])

    def worker(
        self, worker: str = "w", *, slots: int = 3, silent: float = 0, breaker: str = "closed", settings: str = '{"lease": 60, "poll_interval": 30}'
    ) -> None:
        values = {"worker": worker, "slots": slots, "silent": silent, "breaker": breaker, "settings": settings}
        self.conn.execute(WORKER.encode(), values)

    def lease(self, id: str = "r", worker: str = "w", left: float = 60) -> None:
        self.conn.execute(LEASE.encode(), {"id": id, "worker": worker, "left": left})

    def mark(
        self, id: str = "r", occurrence: int = 1, attempt: int = 1, outcome: str = "busy", calls: int = 1, ago: float = 60, late: float = 0.01
    ) -> None:
        values = {"id": id, "occurrence": occurrence, "attempt": attempt, "outcome": outcome, "calls": calls, "late": late}
        self.conn.execute(MARK.encode(), values | {"at": datetime.now(UTC) - timedelta(seconds=ago)})

    def why(self, id: str = "r") -> str:
        said = operate(self.dsn, "why", id)
        assert (said.status, said.err) == (0, "") and said.out.count("\n") == 1
        return said.out.rstrip("\n")


@pytest.fixture
def desk(database: str) -> Iterator[Desk]:
    at = Desk(database)
    yield at
    at.conn.close()


# --- why -------------------------------------------------------------------------------------------------------------

DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d(:\d\d)?"


def not_due(desk: Desk) -> None:
    desk.recall()


def moved(desk: Desk) -> None:
    desk.recall()
    desk.change(trigger_at=datetime.now(UTC) + 3 * HOUR)


def waits(desk: Desk) -> None:
    desk.recall(due=-1)


def slots_taken(desk: Desk) -> None:
    desk.recall(due=-1)
    desk.recall("other", "t")
    desk.lease("other")
    desk.conn.execute("update recall_workers set slots = 1")


def slots_taken_in_two(desk: Desk) -> None:
    slots_taken(desk)
    desk.worker("w2", slots=0)


def busy(desk: Desk) -> None:
    desk.recall(due=30, deferrals=5, last_outcome="busy", reason="the session is busy (HTTP 409)", begun_at=datetime.now(UTC))
    desk.mark(calls=5)


def busy_once(desk: Desk) -> None:
    desk.recall(due=30, deferrals=1, last_outcome="busy", reason="the session is busy (HTTP 409)")
    desk.mark()


def deferred_for_two_reasons(desk: Desk) -> None:
    desk.recall(due=30, deferrals=5, attempt=1, last_outcome="busy", reason="the session is busy (HTTP 409)")
    desk.mark(attempt=1, outcome="unknown")
    desk.mark(attempt=2, outcome="busy", calls=2)
    desk.mark(attempt=2, outcome="unavailable", calls=3)


def to_be_retried(desk: Desk) -> None:
    desk.recall(due=3, attempt=1, last_outcome="unknown", reason="HTTP 502")
    desk.mark(outcome="unknown")


def next_occurrence(desk: Desk) -> None:
    desk.recall(call_type="recurring", occurrence=4, last_outcome="answered")
    desk.mark(occurrence=3, outcome="answered")


def in_a_run(desk: Desk) -> None:
    desk.recall()
    desk.lease()


def in_a_run_after_deferrals(desk: Desk) -> None:
    busy(desk)
    desk.lease()


def outside(desk: Desk) -> None:
    desk.recall()
    desk.lease()
    desk.recall("newer")


def lease_ended(desk: Desk) -> None:
    desk.recall()
    desk.lease(worker="dead", left=-3)
    desk.worker("dead", silent=70)


def lease_ended_of_nobody(desk: Desk) -> None:
    desk.recall()
    desk.lease(worker="dead", left=-3)


def sibling_in_a_run(desk: Desk) -> None:
    desk.recall("first", due=-9)
    desk.lease("first")
    desk.recall(due=-5)


def sibling_aborted(desk: Desk) -> None:
    desk.recall("first", due=-9)
    desk.lease("first")
    desk.change("first", status="cancelled")
    desk.recall(due=-5)


def sibling_aborted_long_ago(desk: Desk) -> None:
    desk.recall("first", due=-9)
    desk.lease("first", left=-1)
    desk.change("first", status="cancelled")
    desk.recall(due=-5)


def sibling_goes_first(desk: Desk) -> None:
    desk.recall("first", due=-9, status="running")
    desk.recall(due=-5)


def sibling_lost_and_paused(desk: Desk) -> None:
    sibling_in_a_run(desk)
    desk.lease("first", worker="dead", left=-2)
    desk.change("first", paused_at=datetime.now(UTC))


def paused(desk: Desk) -> None:
    desk.recall(paused_at=datetime.now(UTC))


def paused_and_due(desk: Desk) -> None:
    desk.recall(due=-5, paused_at=datetime.now(UTC))


def paused_in_a_run(desk: Desk) -> None:
    desk.recall(paused_at=datetime.now(UTC))
    desk.lease()


def breaker_open(desk: Desk) -> None:
    desk.recall(due=-5)
    desk.conn.execute("update recall_workers set breaker = 'open'")


def breaker_open_in_one(desk: Desk) -> None:
    breaker_open(desk)
    desk.worker("w2")


def no_worker(desk: Desk) -> None:
    desk.recall(due=-5)
    desk.conn.execute("delete from recall_workers")


def silent_worker(desk: Desk) -> None:
    desk.recall(due=-5)
    desk.conn.execute("update recall_workers set seen_at = now() - interval '1 hour'")


def failed(desk: Desk) -> None:
    desk.recall(status="failed", ended_at=datetime.now(UTC), reason="HTTP 422: no such tool", last_outcome="refused")


def fired(desk: Desk) -> None:
    desk.recall(status="fired", ended_at=datetime.now(UTC), last_outcome="answered")


def cancelled_by_hand(desk: Desk) -> None:
    desk.recall()
    assert operate(desk.dsn, "cancel", "r").status == 0


def cancelled_by_the_application(desk: Desk) -> None:
    desk.recall()
    desk.change(status="cancelled")


def cancelled_by_the_application_while_deferred(desk: Desk) -> None:
    busy(desk)
    desk.change(status="cancelled")


def being_aborted(desk: Desk) -> None:
    desk.recall()
    desk.lease()
    desk.change(status="cancelled")


def at_the_end_of_time(desk: Desk) -> None:
    desk.recall()
    desk.conn.execute("update session_recalls set trigger_at = 'infinity', planned_at = 'infinity'")


WHY = [
    (not_due, rf"Not due until {DATE} \(in 60 min\)\."),
    (moved, rf"Not due until {DATE} \(in 3 h\), where it was moved\."),
    (waits, rf"Due since {DATE} \(\d s ago\), and waits to be claimed\."),
    (slots_taken, rf"Due since {DATE} \(\d s ago\), but all slots are taken: 1 of 1 in the one live worker\."),
    (slots_taken_in_two, rf"Due since {DATE} \(\d s ago\), but all slots are taken: 1 of 1 in 2 live workers\."),
    (
        busy,
        rf"Not due until {DATE} \(in \d+ s\); deferred, busy 5 times since {DATE}, the last time {DATE}: the session is busy \(HTTP 409\)\.",
    ),
    (busy_once, rf"Not due until {DATE} \(in \d+ s\); deferred, busy once since {DATE}, .*"),
    (deferred_for_two_reasons, rf"Not due until .*; deferred, 5 times \(busy 2, unavailable 3\) since {DATE}, .*: the session is busy \(HTTP 409\)\."),
    (to_be_retried, rf"Not due until {DATE} \(in \d s\); its last call ended as unknown: HTTP 502\."),
    (next_occurrence, rf"Not due until {DATE} \(in 60 min\)\."),
    (in_a_run, rf"In a run since {DATE}: occurrence 1, attempt 1, leased by worker w\."),
    (in_a_run_after_deferrals, rf"In a run since {DATE}: occurrence 1, attempt 1, leased by worker w; its last call ended as busy: .*"),
    (outside, rf"In a run since {DATE}: occurrence 1, attempt 1, leased by worker w\."),
    (
        lease_ended,
        rf"In a run since {DATE}: .*, leased by worker dead, last heard of 70 s ago, whose lease ended \d s ago, so another worker takes it up\.",
    ),
    (lease_ended_of_nobody, r"In a run since .*, leased by worker dead, whose lease ended \d s ago, so another worker takes it up\."),
    (sibling_in_a_run, rf"Due since .*, but its session is in a run: recall first since {DATE}, leased by worker w\."),
    (sibling_aborted, rf"Due since .*, but its session waits for an aborted call to end: recall first since {DATE}, leased by worker w\."),
    (sibling_aborted_long_ago, r"Due since .*, and waits to be claimed\."),
    (sibling_goes_first, r"Due since .*, but recall first of its session is due longer and goes first\."),
    (
        sibling_lost_and_paused,
        r"Due since .*, but its session is in a run: recall first .*, whose lease ended \d s ago, which is paused: resume or cancel it\.",
    ),
    (paused, rf"Paused since {DATE}; not due until {DATE} \(in 60 min\)\."),
    (paused_and_due, rf"Paused since {DATE}; due since {DATE} \(\d s ago\)\."),
    (paused_in_a_run, rf"Paused since {DATE}; in a run since {DATE}: occurrence 1, attempt 1, leased by worker w\."),
    (breaker_open, r"Due since .*; the breaker is open in the one live worker: the endpoint is in trouble, and only probed\."),
    (breaker_open_in_one, r"Due since .*; the breaker is open in 1 of 2 live workers: the endpoint is in trouble, and only probed\."),
    (no_worker, r"Due since .*, and waits to be claimed; no live worker is known: start one with recall-worker run\."),
    (silent_worker, r"Due since .*; no live worker is known: start one with recall-worker run\."),
    (failed, rf"Failed since {DATE}: HTTP 422: no such tool\."),
    (fired, rf"Fired since {DATE}\."),
    (cancelled_by_hand, rf"Cancelled since {DATE}: cancelled on the command line\."),
    (cancelled_by_the_application, rf"Cancelled by the application since {DATE}\."),
    (cancelled_by_the_application_while_deferred, rf"Cancelled by the application since {DATE}; its last call had ended as busy\."),
    (being_aborted, rf"Cancelled by the application since {DATE}; its call by worker w is being aborted\."),
    (at_the_end_of_time, rf"Not due until 9998-01-01 {DATE[18:]} \(in \d+ d\)\."),
]


@pytest.mark.parametrize(("situation", "sentence"), WHY, ids=[situation.__name__ for situation, _ in WHY])
def test_why(situation: Any, sentence: str, desk: Desk) -> None:
    """One sentence, the first cause first, with its evidence; --json carries the same sentence and what it rests on."""
    desk.worker()
    situation(desk)
    said = desk.why()
    assert re.fullmatch(sentence, said), said
    document = operate(desk.dsn, "why", "r", "--json").document
    assert document["id"] == "r" and document["status"] == document["evidence"]["status"]
    assert re.fullmatch(sentence, document["why"])


async def test_why_of_a_real_daemon(app: Application, endpoint: Endpoint, daemons: Daemons, database: str) -> None:
    """What a daemon leaves behind is what `why` reads: a busy session, a run, a session in a run, a breaker."""
    gate = Gate()
    endpoint.script("busy", reply(409))
    endpoint.script("long", gate)
    daemon = await daemons.start(busy_delay=0.1, concurrency=5)
    for session in ("busy", "long", "bad", "worse"):
        await app.create_session(session, "ann")
    for session in ("busy", "long"):
        await app.schedule(session, "once", datetime.now(UTC), "now", id=session)
    await endpoint.count(5, "busy")
    assert re.search(rf"; deferred, busy \d+ times since {DATE}, the last time {DATE}: the session is busy \(HTTP 409\)\.$", why(database, "busy"))
    await gate.entered.wait()
    assert re.fullmatch(rf"In a run since {DATE}: occurrence 1, attempt 1, leased by worker {daemon.name}\.", why(database, "long"))
    await app.schedule("long", "once", datetime.now(UTC), "next", id="next")
    assert re.search(rf"but its session is in a run: recall long since {DATE}, leased by worker {daemon.name}", why(database, "next"))
    endpoint.default = reply(503)
    for session in ("bad", "worse"):
        await app.schedule(session, "once", datetime.now(UTC), "now", id=session)
    await daemon.hears("breaker.opened")
    async with connected_until(database, "select 1 from recall_workers where breaker = 'open'"):
        assert "the breaker is open in the one live worker" in why(database, "bad")
    assert await daemon.stop() == 0
    assert "no live worker is known" in why(database, "bad")


def why(dsn: str, id: str) -> str:
    return operate(dsn, "why", id).out.strip()


@contextmanager
def _nothing() -> Iterator[None]:
    yield
