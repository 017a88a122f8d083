"""What people ask: `list`, `show`, `why`, `workers`, `stats`, and what `prune` leaves; first that
the answers are right, then that they are quick."""

from __future__ import annotations

import asyncio
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
from recall_worker import sweep as sweeping
from recall_worker.database.identity import UNKNOWN as ANY_DATABASE
from recall_worker.fleet import FLEET, SILENCE
from recall_worker.operations.story import UNKNOWN
from recall_worker.selection import COUNT_MOST, Selection

from .conftest import Connection
from .support import postgres
from .support.application import Application
from .support.daemon import Daemons
from .support.endpoint import Endpoint, Gate, reply
from .test_cli import operate, rows_of

HOUR = timedelta(hours=1)
RECALL = """
insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds,
    additional_context_message, status, created_at, updated_at)
values (%(id)s, %(session)s, %(call_type)s, now() + %(due)s * interval '1 second',
    case %(call_type)s when 'recurring' then 3600 end,
    'Look again.', %(status)s, now(), now())
"""
WORKER = """
insert into recall_workers (worker, host, pid, version, slots, seen_at, breaker, settings)
values (%(worker)s, 'h', 1, '0.1.0', %(slots)s, now() - %(silent)s * interval '1 second',
    %(breaker)s, %(settings)s)
"""
LEASE = """
update session_recalls
set lease = gen_random_uuid(), leased_by = %(worker)s, leased_at = now() - interval '5 seconds',
    attempt = 1,
    lease_until = now() + %(left)s * interval '1 second'
where id = %(id)s
"""
MARK = """
insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome, session_id, worker,
    lease, calls, scheduled_for, called_at,
    last_called_at, ended_at, http_status, reason, settled)
values (%(id)s, %(occurrence)s, 0, %(attempt)s, %(outcome)s, 's', 'w', gen_random_uuid(),
    %(calls)s, %(at)s - %(late)s * interval '1 second',
    %(at)s, %(at)s, %(at)s, 409, 'why not', 'pending')
"""


class Desk:
    """A database, and rows put into it as a worker or the application would leave them."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.conn = psycopg.connect(dsn, autocommit=True, row_factory=dict_row)
        self.conn.execute(
            "insert into sessions values ('s', 'ann'), ('t', 'ann'), ('z', 'zoe'), ('y', 'zoe') "
            "on conflict do nothing"
        )

    def recall(
        self,
        id: str = "r",
        session: str = "s",
        due: float = 3600,
        call_type: str = "once",
        status: str = "pending",
        **columns: Any,
    ) -> None:
        self.conn.execute(
            RECALL.encode(),
            {"id": id, "session": session, "due": due, "call_type": call_type, "status": status},
        )
        self.change(id, **columns)

    def change(self, id: str = "r", **columns: Any) -> None:
        for name, value in columns.items():
            self.conn.execute(
                f"update session_recalls set {name} = %s where id = %s".encode(), [value, id]
            )

    def worker(
        self,
        worker: str = "w",
        *,
        slots: int = 3,
        silent: float = 0,
        breaker: str = "closed",
        settings: str = '{"lease": 60, "poll_interval": 30}',
    ) -> None:
        values = {
            "worker": worker,
            "slots": slots,
            "silent": silent,
            "breaker": breaker,
            "settings": settings,
        }
        self.conn.execute(WORKER.encode(), values)

    def lease(self, id: str = "r", worker: str = "w", left: float = 60) -> None:
        self.conn.execute(LEASE.encode(), {"id": id, "worker": worker, "left": left})

    def mark(
        self,
        id: str = "r",
        occurrence: int = 1,
        attempt: int = 1,
        outcome: str = "busy",
        calls: int = 1,
        ago: float = 60,
        late: float = 0.01,
    ) -> None:
        values = {
            "id": id,
            "occurrence": occurrence,
            "attempt": attempt,
            "outcome": outcome,
            "calls": calls,
            "late": late,
        }
        self.conn.execute(
            MARK.encode(), values | {"at": datetime.now(UTC) - timedelta(seconds=ago)}
        )

    def why(self, id: str = "r") -> str:
        said = operate(self.dsn, "why", id)
        assert (said.status, said.err) == (0, "") and said.out.count("\n") == 1
        return said.out.rstrip("\n")


@pytest.fixture
def desk(database: str) -> Iterator[Desk]:
    at = Desk(database)
    yield at
    at.conn.close()


# --- why ------------------------------------------------------------------------------------------

DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d(:\d\d)?"


def not_due(desk: Desk) -> None:
    desk.recall()


def moved(desk: Desk) -> None:
    desk.recall(call_type="recurring", interval_seconds=60)
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
    desk.recall(
        due=30,
        deferrals=5,
        last_outcome="busy",
        reason="the session is busy (HTTP 409)",
        begun_at=datetime.now(UTC),
    )
    desk.mark(calls=5)


def busy_once(desk: Desk) -> None:
    desk.recall(due=30, deferrals=1, last_outcome="busy", reason="the session is busy (HTTP 409)")
    desk.mark()


def deferred_for_two_reasons(desk: Desk) -> None:
    desk.recall(
        due=30, deferrals=5, attempt=1, last_outcome="busy", reason="the session is busy (HTTP 409)"
    )
    desk.mark(attempt=1, outcome="unknown")
    desk.mark(attempt=2, outcome="busy", calls=2)
    desk.mark(attempt=2, outcome="unavailable", calls=3)


def never_connected(desk: Desk) -> None:
    desk.recall(
        due=30,
        deferrals=4,
        last_outcome="unavailable",
        reason="no connection",
        begun_at=datetime.now(UTC) - HOUR,
    )
    desk.mark(outcome="unavailable", calls=4)
    desk.conn.execute("update recall_attempts set called_at = null, last_called_at = null")


def held_back(desk: Desk) -> None:
    desk.recall(
        due=30,
        deferrals=2,
        last_outcome="capped",
        reason="its session had 20 runs within an hour, and may have 20",
    )


def to_be_retried(desk: Desk) -> None:
    desk.recall(due=3, attempt=1, last_outcome="unknown", reason="HTTP 502")
    desk.mark(outcome="unknown")


def next_occurrence(desk: Desk) -> None:
    desk.recall(call_type="recurring", occurrence=4, last_outcome="answered")
    desk.mark(occurrence=3, outcome="answered")


def in_a_run(desk: Desk) -> None:
    desk.recall()
    desk.lease()


def accepted(desk: Desk) -> None:
    desk.recall(
        last_outcome="accepted",
        run_reference="/runs/7",
        delivered_at=datetime.now(UTC),
        reason="from before",
    )
    desk.lease()


def handed_over(desk: Desk) -> None:
    accepted(desk)
    desk.lease(left=-1)


def lease_without_end(desk: Desk) -> None:
    desk.recall()
    desk.lease()
    desk.change(lease_until=None)


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
    desk.recall(
        status="failed",
        ended_at=datetime.now(UTC),
        reason="HTTP 422: no such tool",
        last_outcome="refused",
    )


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


CAPPED = '{"lease": 60, "fleet_concurrency": %d}'


def fleet_full(desk: Desk) -> None:
    """Two leases of a live worker's, and one that ended so long ago that it does not count."""
    desk.conn.execute("update recall_workers set settings = %s::jsonb", [CAPPED % 2])
    desk.recall(due=-100)
    for n, left in enumerate((60, 60, -140)):
        desk.recall(f"held{n}", session=("t", "z", "y")[n])
        desk.lease(f"held{n}", "w" if left > 0 else "dead", left)


def fleet_full_of_the_dead(desk: Desk) -> None:
    """One lease of a live worker's, one of a silent one's, one that has ended."""
    desk.conn.execute("update recall_workers set settings = %s::jsonb", [CAPPED % 3])
    desk.worker("silent", silent=600, settings=CAPPED % 3)
    desk.recall(due=-100)
    for n, (worker, left) in enumerate((("w", 60), ("silent", 30), ("dead", -5))):
        desk.recall(f"held{n}", session=("t", "z", "y")[n])
        desk.lease(f"held{n}", worker, left)


def fleet_full_and_itself_left_behind(desk: Desk) -> None:
    """The recall's own lease has ended, and those of others fill the cap."""
    desk.conn.execute("update recall_workers set settings = %s::jsonb", [CAPPED % 1])
    desk.recall(due=-100)
    desk.lease("r", "dead", -100)
    desk.recall("held", "t")
    desk.lease("held")


def fleet_not_full(desk: Desk) -> None:
    desk.conn.execute("update recall_workers set settings = %s::jsonb", [CAPPED % 2])
    desk.recall(due=-100)
    for n, left in enumerate((60, -140)):
        desk.recall(f"held{n}", session=("t", "z")[n])
        desk.lease(f"held{n}", "w" if left > 0 else "dead", left)


def fleet_with_one_that_has_no_cap(desk: Desk) -> None:
    """A worker that keeps to no cap may take it."""
    fleet_full(desk)
    desk.worker("free")


WHY = [
    (
        fleet_full,
        rf"Due since {DATE} \(2 min ago\), but the fleet runs as many as "
        rf"RECALL_FLEET_CONCURRENCY \(2\) allows: "
        r"2 leases count against it \(2 of live workers\)\.",
    ),
    (
        fleet_full_of_the_dead,
        rf"Due since {DATE} \(2 min ago\), but the fleet runs as many as "
        rf"RECALL_FLEET_CONCURRENCY \(3\) allows: "
        r"3 leases count against it \(1 of live workers, "
        r"1 of workers without a heartbeat, 1 that has ended, counted until 20\.0 "
        r"s after its end\)\.",
    ),
    (
        fleet_full_and_itself_left_behind,
        r"In a run since .*, whose lease ended 2 min ago, so another worker takes it over; "
        r"the fleet runs as many as RECALL_FLEET_CONCURRENCY \(1\) allows: 1 "
        r"lease counts against it \(1 of live workers\)\.",
    ),
    (fleet_not_full, rf"Due since {DATE} \(2 min ago\), and waits to be claimed\."),
    (fleet_with_one_that_has_no_cap, rf"Due since {DATE} \(2 min ago\), and waits to be claimed\."),
    (not_due, rf"Not due until {DATE} \(in 60 min\)\."),
    (moved, rf"Not due until {DATE} \(in 3 h\), where it was moved\."),
    (waits, rf"Due since {DATE} \(\d s ago\), and waits to be claimed\."),
    (
        slots_taken,
        rf"Due since {DATE} \(\d s ago\), but all slots are taken: 1 of 1 in the one live worker\.",
    ),
    (
        slots_taken_in_two,
        rf"Due since {DATE} \(\d s ago\), but all slots are taken: 1 of 1 in 2 live workers\.",
    ),
    (
        busy,
        rf"Not due until {DATE} \(in \d+ s\); deferred, busy 5 times since {DATE}, the last time "
        rf"{DATE}: the session is busy \(HTTP 409\)\.",
    ),
    (busy_once, rf"Not due until {DATE} \(in \d+ s\); deferred, busy once since {DATE}, .*"),
    (
        deferred_for_two_reasons,
        rf"Not due until .*; deferred, 5 times \(busy 2, unavailable 3\) since {DATE}, .*: the "
        rf"session is busy \(HTTP 409\)\.",
    ),
    (
        never_connected,
        rf"Not due until .*; deferred, unavailable 4 times since {DATE}, the last time {DATE}: "
        rf"no connection\.",
    ),
    (
        held_back,
        r"Not due until .*; deferred 2 times: its session had 20 runs within an hour, and may "
        r"have 20\.",
    ),
    (
        to_be_retried,
        rf"Not due until {DATE} \(in \d s\); its last call ended as unknown: HTTP 502\.",
    ),
    (next_occurrence, rf"Not due until {DATE} \(in 60 min\)\."),
    (in_a_run, rf"In a run since {DATE}: occurrence 1, attempt 1, leased by worker w\."),
    (
        in_a_run_after_deferrals,
        rf"In a run since {DATE}: occurrence 1, attempt 1, leased by worker w; its last call "
        rf"ended as busy: .*",
    ),
    (outside, rf"In a run since {DATE}: occurrence 1, attempt 1, leased by worker w\."),
    (
        lease_ended,
        rf"In a run since {DATE}: .*, leased by worker dead, last heartbeat 7\d s "
        rf"ago, whose lease ended \d s ago, so another worker takes it over\.",
    ),
    (
        lease_ended_of_nobody,
        r"In a run since .*, leased by worker dead, whose lease ended \d s ago, "
        r"so another worker takes it over\.",
    ),
    (
        sibling_in_a_run,
        rf"Due since .*, but its session is in a run: recall first since {DATE}, leased by "
        rf"worker w\.",
    ),
    (
        sibling_aborted,
        rf"Due since .*, but its session waits for an aborted call to end: recall first since "
        rf"{DATE}, leased by worker w\.",
    ),
    (sibling_aborted_long_ago, r"Due since .*, and waits to be claimed\."),
    (
        sibling_goes_first,
        r"Due since .*, but recall first of its session is due longer and goes first\.",
    ),
    (
        sibling_lost_and_paused,
        r"Due since .*, but its session is in a run: recall first .*, whose lease ended \d s "
        r"ago, which is paused: resume or cancel it\.",
    ),
    (paused, rf"Paused since {DATE}; not due until {DATE} \(in 60 min\)\."),
    (paused_and_due, rf"Paused since {DATE}; due since {DATE} \(\d s ago\)\."),
    (
        paused_in_a_run,
        rf"Paused since {DATE}; in a run since {DATE}: occurrence 1, attempt 1, leased by worker "
        rf"w\.",
    ),
    (
        breaker_open,
        r"Due since .*; the breaker is open in the one live worker: the endpoint "
        r"is failing; only test calls are sent until it answers\.",
    ),
    (
        breaker_open_in_one,
        r"Due since .*; the breaker is open in 1 of 2 live workers: the endpoint "
        r"is failing; only test calls are sent until it answers\.",
    ),
    (
        no_worker,
        r"Due since .*, and waits to be claimed; no live worker is known: start one with "
        r"recall-worker run\.",
    ),
    (silent_worker, r"Due since .*; no live worker is known: start one with recall-worker run\."),
    (
        failed,
        rf"Failed {DATE} \(.*\): HTTP 422: no such tool; its last call ended as refused\.",
    ),
    (fired, rf"Fired {DATE} \(.*\); its last call ended as answered\."),
    (
        cancelled_by_hand,
        rf"Cancelled {DATE} \(.*\) by .+@.+ \(cli\); no call of it is on record\.",
    ),
    (
        cancelled_by_the_application,
        rf"Cancelled {DATE} \(.*\) by the application; no call of it is on record\.",
    ),
    (
        cancelled_by_the_application_while_deferred,
        rf"Cancelled {DATE} \(.*\) by the application; its last call \(occurrence 1, attempt 1\) "
        rf"was sent {DATE}, 10\.0 ms late, and ended as busy \(HTTP 409\) 5 times\.",
    ),
    (
        being_aborted,
        rf"Cancelled {DATE} \(.*\) by the application; its call by worker w is being aborted; "
        r"no call of it is on record\.",
    ),
    (at_the_end_of_time, r"Not due until 999[78]-\d\d-\d\d .* \(in \d+ d\)\."),
]


@pytest.mark.parametrize(
    ("situation", "sentence"), WHY, ids=[situation.__name__ for situation, _ in WHY]
)
def test_why(situation: Any, sentence: str, desk: Desk) -> None:
    """One sentence, the first cause first, with its evidence; --json carries the same sentence and
    what it rests on."""
    desk.worker()
    situation(desk)
    said = desk.why()
    assert re.fullmatch(sentence, said), said
    document = operate(desk.dsn, "why", "r", "--json").document
    assert document["id"] == "r" and document["status"] == document["evidence"]["status"]
    assert re.fullmatch(sentence, document["why"])


GONE_BACK = (
    rf"Not due until {DATE} \(in 3 h\); PostgreSQL's clock has gone back, by (1 h 59|2 h 00) min "
    rf"or more: it says {DATE}, and WHAT is dated {DATE}; what was planned by the later time waits "
    rf"until the clock has caught up\."
)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("update recall_workers set seen_at = LATER", "a worker's heartbeat"),
        ("update recall_workers set started_at = LATER", "a worker's heartbeat"),
        ("update recall_attempts set ended_at = LATER", "the record of a call"),
        ("update session_recalls set leased_at = LATER", "a call of this recall"),
        ("update session_recalls set begun_at = LATER", "a call of this recall"),
        ("update session_recalls set updated_at = LATER", "the last change of this recall"),
        ("update session_recalls set created_at = LATER", "the last change of this recall"),
    ],
)
def test_why_when_the_databases_clock_went_back(change: str, what: str, desk: Desk) -> None:
    """A date that PostgreSQL wrote and that has not come yet says why rows stand still; a recall's
    own may be the application's. A few seconds are no cause."""
    desk.worker()
    desk.recall(due=3 * 3600)
    desk.mark("other", outcome="answered", ago=10)
    desk.conn.execute(change.replace("LATER", "now() + interval '4 seconds'").encode())
    assert re.fullmatch(rf"Not due until {DATE} \(in 3 h\)\.", desk.why())
    desk.conn.execute(change.replace("LATER", "now() + interval '2 hours'").encode())
    wanted = GONE_BACK.replace("WHAT", what)
    if what == "the last change of this recall":
        wanted = wanted.replace("or more:", "or more, or the application's clock is ahead:")
    said = desk.why()
    assert re.fullmatch(wanted, said), said
    desk.conn.execute(change.replace("LATER", "'infinity'").encode())
    assert "gone back" not in desk.why()


@pytest.mark.slow
async def test_why_of_a_real_daemon(
    app: Application, endpoint: Endpoint, daemons: Daemons, database: str, db: Connection
) -> None:
    """What a daemon leaves behind is what `why` reads: a busy session, a run, a session in a run, a
    breaker, an end."""
    gate = Gate()
    endpoint.script("busy", reply(409))
    endpoint.script("long", gate)
    daemon = await daemons.start(busy_delay=0.1, concurrency=5)
    for session in ("busy", "long", "bad", "worse"):
        await app.create_session(session, "ann")
    for session in ("busy", "long"):
        await app.schedule(session, "once", datetime.now(UTC), "now", id=session)
    await endpoint.count(5, "busy")
    deferred = (
        rf"; deferred, busy \d+ times since {DATE}, the last time {DATE}: the session is busy "
        rf"\(HTTP 409\)\.$"
    )
    # On a slow machine it may be asked for just while it is called again.
    said = [await asyncio.to_thread(why, database, "busy")]
    while "In a run since" in said[-1] and len(said) < 20:
        said.append(await asyncio.to_thread(why, database, "busy"))
    assert re.search(deferred, said[-1]), said
    await gate.entered.wait()
    assert re.fullmatch(
        rf"In a run since {DATE}: occurrence 1, attempt 1, leased by worker {daemon.name}\.",
        why(database, "long"),
    )
    await app.schedule("long", "once", datetime.now(UTC), "next", id="next")
    assert re.search(
        rf"but its session is in a run: recall long since {DATE}, leased by worker "
        rf"{daemon.name}\.$",
        why(database, "next"),
    )
    endpoint.script("busy", reply(503))
    endpoint.default = reply(503)
    for session in ("bad", "worse"):
        await app.schedule(session, "once", datetime.now(UTC), "now", id=session)
    await daemon.hears("breaker.opened")
    async with asyncio.timeout(20):
        while not await (
            await db.execute("select 1 from recall_workers where breaker = 'open'")
        ).fetchall():
            await db.execute("select pg_sleep(0.01)")
    assert "the breaker is open in the one live worker" in why(database, "bad")
    gate.open()
    await daemon.hears("recall.settled", recall="long")
    assert re.fullmatch(
        rf"Fired {DATE} \(.*\); its last call \(occurrence 1, attempt 1\) was sent {DATE}, "
        r".* late, and ended as answered \(HTTP 200\)\.",
        why(database, "long"),
    )
    assert await daemon.stop() == 0
    assert "no live worker is known" in why(database, "bad")


def why(dsn: str, id: str) -> str:
    return operate(dsn, "why", id).out.strip()


# --- list and show --------------------------------------------------------------------------------


def ids(dsn: str, *words: str) -> list[str]:
    return [row["id"] for row in operate(dsn, "list", *words, "--json").document]


@pytest.fixture
def shelf(desk: Desk) -> Desk:
    """Recalls of two owners, in every status, at different times; two at the same."""
    desk.recall("a", "s", due=100)
    desk.recall("b", "s", due=200, status="fired")
    desk.recall("c", "s", due=300, status="failed")
    desk.recall("d", "t", due=50, call_type="recurring")
    desk.recall("e", "t", due=150, status="cancelled")
    desk.recall("f", "z", due=250, status="running")
    desk.recall("g", "z", due=-5)
    desk.recall("h", "s", due=300, status="fired")
    desk.conn.execute(
        "update session_recalls set trigger_at = (select trigger_at from session_recalls where "
        "id = 'c') where id = 'h'"
    )
    return desk


LISTS = [
    ("all", [], "chfbeadg"),
    ("session", ["--session", "s"], "chba"),
    ("user", ["--user", "ann"], "chbead"),
    ("user and session", ["--user", "ann", "--session", "t"], "ed"),
    ("another's session", ["--user", "zoe", "--session", "t"], ""),
    ("nobody", ["--user", "nobody"], ""),
    ("status", ["--status", "pending"], "adg"),
    ("statuses", ["--status", "fired", "--status", "failed"], "chb"),
    ("status of a session", ["--session", "s", "--status", "fired"], "hb"),
    ("status of a user", ["--user", "zoe", "--status", "running"], "f"),
    ("limit", ["--limit", "3"], "chf"),
    ("offset", ["--limit", "3", "--offset", "2"], "fbe"),
    ("beyond the end", ["--offset", "8"], ""),
    ("a page of a session", ["--session", "s", "--limit", "2", "--offset", "1"], "hb"),
    ("a page of a user", ["--user", "ann", "--limit", "2", "--offset", "3"], "ea"),
]


@pytest.mark.parametrize(
    ("words", "found"), [case[1:] for case in LISTS], ids=[case[0] for case in LISTS]
)
def test_list(words: list[str], found: str, shelf: Desk) -> None:
    """Newest trigger first, ties by id; by session, by owner, by status, in pages, and all of it at
    once."""
    assert "".join(ids(shelf.dsn, *words)) == found


def test_list_without_a_sessions_table(empty_database: str) -> None:
    """Where the application keeps its sessions elsewhere, an owner can't be asked for, and
    everything else can."""
    assert operate(empty_database, "migrate").status == 0
    assert operate(empty_database, "schedule", "s", "m").status == 0
    assert len(ids(empty_database, "--session", "s")) == 1
    said = operate(empty_database, "list", "--user", "ann")
    assert said.status == 1 and "no table sessions" in said.err and "Try: " in said.err


def test_list_tells_what_is_going_on(desk: Desk) -> None:
    """WHEN is the distance for what waits, what is going on for what does not, and since when for
    what is over."""
    desk.recall("waits", "s", due=7200.5)
    desk.recall("runs", "t")
    desk.lease("runs")
    desk.recall("held", "z", paused_at=datetime.now(UTC))
    desk.recall("over", "z", status="fired", ended_at=datetime.now(UTC) - 3 * HOUR)
    lines = {line.split()[0]: line for line in operate(desk.dsn, "list").out.splitlines()}
    for id, words in (
        ("waits", "pending  in 2 h"),
        ("runs", "pending  in a run"),
        ("held", "pending  paused"),
        ("over", "fired    3 h ago"),
    ):
        assert f"  {words} " in lines[id], lines[id]


def test_show(desk: Desk) -> None:
    """A recall with all that is known of it, and every call in order, deferrals folded into one
    that counts them."""
    desk.recall(
        call_type="recurring",
        occurrence=2,
        attempt=1,
        deferrals=3,
        last_outcome="busy",
        reason="the session is busy (HTTP 409)",
    )
    desk.change(internal_comment="asked on Monday", paused_at=datetime.now(UTC))
    desk.mark(occurrence=1, attempt=1, outcome="answered", ago=4000)
    desk.mark(occurrence=2, attempt=1, outcome="unknown", ago=300)
    desk.mark(occurrence=2, attempt=2, outcome="busy", calls=3, ago=200)
    said = operate(desk.dsn, "show", "r")
    facts, _, calls = said.out.partition("\n\n")
    shown = dict(re.split(r"  +", line, maxsplit=1) for line in facts.splitlines())
    assert (
        shown["recall"] == "r"
        and shown["session"] == "s"
        and shown["type"] == "every 1h"
        and shown["status"] == "pending"
    )
    assert shown["occurrence"] == "2 (attempt 1, deferred 3 times)"
    assert shown["reason"] == "the session is busy (HTTP 409)" and shown["last outcome"] == "busy"
    assert (
        shown["comment"] == "asked on Monday"
        and re.fullmatch(DATE, shown["paused"])
        and "ended" not in shown
    )
    assert [line.partition("  ")[2].partition(" (HTTP")[0] for line in calls.splitlines()] == [
        f"made; {UNKNOWN}",
        "occurrence 2, attempt 2: busy",
        "occurrence 2, attempt 1: unknown",
        "occurrence 1, attempt 1: answered",
    ]
    assert ": busy (HTTP 409) 3 times: why not; first called " in calls
    document = operate(desk.dsn, "show", "r", "--json").document
    assert document["recall"]["id"] == "r"
    assert [
        (c["occurrence"], c["attempt"], c["outcome"], c["calls"]) for c in document["calls"]
    ] == [
        (1, 1, "answered", 1),
        (2, 1, "unknown", 1),
        (2, 2, "busy", 3),
    ]


def test_show_of_a_recall_that_is_gone(desk: Desk) -> None:
    """A deleted session takes its recalls, not the record of what was called."""
    desk.recall()
    desk.mark()
    desk.conn.execute("delete from sessions where id = 's'")
    said = operate(desk.dsn, "show", "r")
    assert said.status == 0 and "this is on record of it" in said.err and "busy" in said.out
    document = operate(desk.dsn, "show", "r", "--json").document
    assert document["recall"] is None and len(document["calls"]) == 1


def test_show_of_a_long_message(desk: Desk) -> None:
    """Of a message of megabytes a person is shown the beginning and told how long it is; --json has
    it whole."""
    desk.recall(additional_context_message="word " * 1_000_000)
    said = operate(desk.dsn, "show", "r")
    assert len(said.out) < 5000 and "… (5,000,000 characters)" in said.out
    assert len(operate(desk.dsn, "list").out) < 2000
    assert (
        len(
            operate(desk.dsn, "show", "r", "--json").document["recall"][
                "additional_context_message"
            ]
        )
        == 5_000_000
    )


# --- workers and stats ----------------------------------------------------------------------------


def test_workers(desk: Desk) -> None:
    """Who is about and who has fallen silent, with the runs that each has in hand by its leases."""
    desk.worker("w1", slots=5)
    desk.worker(
        "w2",
        breaker="open",
        settings='{"lease": 30, "poll_interval": 30, "run_url": "http://elsewhere/"}',
    )
    desk.worker("w3", silent=600)
    for n, worker in enumerate(("w1", "w1", "w3")):
        desk.recall(f"r{n}", session=("s", "t", "z")[n])
        desk.lease(f"r{n}", worker)
    desk.conn.execute("update recall_workers set bell = 'deaf' where worker in ('w2', 'w3')")
    said = operate(desk.dsn, "workers")
    head, *lines = said.out.splitlines()
    assert head.split() == [
        "WORKER",
        "STATE",
        "HEARTBEAT",
        "RUNS",
        "BREAKER",
        "LISTENER",
        "QUEUES",
        "SINCE",
        "VERSION",
        "LEASE",
        "POLL",
    ]
    told = {line.split()[0]: line for line in lines}
    assert re.search(r" alive .* 2/5  closed +listening ", told["w1"]) and re.search(
        r" alive .* 0/3  open +deaf ", told["w2"]
    )
    assert re.search(r" silent +10 min ago +1/3 ", told["w3"])
    assert "Note: live workers differ in lease: 30, 60\n" in said.err
    assert (
        "Note: 1 of 2 live workers receive no notifications and find new recalls "
        "only by polls: recall-worker doctor\n" in said.err
    )
    assert "differ in run_url: None, http://elsewhere/\n" in said.err
    document = operate(desk.dsn, "workers", "--json").document
    assert {row["worker"]: (row["alive"], row["leases"]) for row in document} == {
        "w1": (True, 2),
        "w2": (True, 0),
        "w3": (False, 1),
    }


STRANGE = [
    "{}",
    "[]",
    "null",
    '"x"',
    "7",
    "true",
    '{"lease": "x", "poll_interval": [1]}',
    '{"lease": 1e300, "run_url": "\\u001b[2J"}',
    '{"lease": 1e400, "poll_interval": 1.5e400}',
    '{"lease": 1e5000, "poll_interval": -1e5000, "fleet_concurrency": 1e5000}',
    '{"lease": 1e-5000, "fleet_concurrency": -1}',
    '{"lease": -1, "fleet_concurrency": 0.5}',
    '{"lease": {}, "fleet_concurrency": "2"}',
    '{"lease": null, "fleet_concurrency": [2]}',
    "[" * 3000 + "]" * 3000,
    '{"lease": ' + "[" * 3000 + "]" * 3000 + "}",
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", STRANGE, ids=[str(n) for n in range(len(STRANGE))])
def test_workers_with_strange_settings(settings: str, desk: Desk) -> None:
    """Whatever JSON stands where a worker's settings should, each command does what it does without
    it."""
    desk.worker("odd", settings=settings)
    desk.worker("w1")
    desk.recall(due=-1)
    said = operate(desk.dsn, "workers")
    assert said.status == 0 and {line.split()[0] for line in said.out.splitlines()} == {
        "WORKER",
        "odd",
        "w1",
    }
    assert said.out.isascii() and "\x1b" not in said.out + said.err
    told = operate(desk.dsn, "workers", "--json")
    assert {row["worker"] for row in told.document} == {"odd", "w1"} and "Infinity" not in told.out
    assert desk.why().endswith("and waits to be claimed.")
    for words in (
        ["why", "r", "--json"],
        ["stats"],
        ["stats", "--json"],
        ["list"],
        ["show", "r"],
        ["doctor"],
        ["doctor", "--json"],
    ):
        said = operate(desk.dsn, *words)
        assert said.status in ((0, 1) if words[0] == "doctor" else (0,)), said.err
    [found] = [
        check
        for check in said.document["checks"]
        if check["check"] == "workers" and " alive, " in check["seen"]
    ]
    assert found["seen"].startswith("2 alive, ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["worker", "host", "version", "breaker", "bell"])
def test_workers_with_strange_words(name: str, desk: Desk) -> None:
    """The same for texts that a hand wrote: empty, long, or such as steer a terminal."""
    for n, text in enumerate(("", "x" * 10_000, "\x1b[2J\n%s", "{}")):
        desk.worker(f"odd{n}")
        desk.conn.execute(
            f"update recall_workers set {name} = %s where worker = %s".encode(), [text, f"odd{n}"]
        )
    desk.recall(due=-1)
    desk.recall("held", "t")
    desk.lease("held", "")
    for words in (
        ["workers"],
        ["workers", "--json"],
        ["why", "r"],
        ["why", "held"],
        ["stats"],
        ["list"],
        ["doctor"],
        ["doctor", "--json"],
    ):
        said = operate(desk.dsn, *words)
        assert said.status in ((0, 1) if words[0] == "doctor" else (0,)), said.err
        assert "\x1b" not in said.out + said.err


def test_stats_of_times_that_are_none(desk: Desk) -> None:
    """A mark whose times are infinite, as a hand can write them, is left out where lateness is
    told; JSON stays JSON."""
    for n, column in enumerate(("called_at", "scheduled_for")):
        for sign in ("", "-"):
            desk.mark(f"m{n}{sign}")
            desk.conn.execute(
                (
                    f"update recall_attempts set {column} = '{sign}infinity' where recall_id = "
                    f"'m{n}{sign}'"
                ).encode()
            )
    desk.mark("good", late=0.5)
    assert operate(desk.dsn, "stats").status == 0
    late = operate(desk.dsn, "stats", "--json").document["lateness_last_hour"]
    assert late["occurrences"] == 2 and late["p50"] == pytest.approx(0.5)


def test_workers_that_agree(desk: Desk) -> None:
    """No note where live workers agree, whatever the silent ones had; and where there are none, how
    to start one."""
    desk.worker("w1")
    desk.worker("w2")
    desk.worker("w3", silent=600, settings='{"lease": 5}')
    assert operate(desk.dsn, "workers").err == ""
    desk.conn.execute("delete from recall_workers")
    assert operate(desk.dsn, "workers").err == "No workers. Start one with: recall-worker run\n"


def test_stats(shelf: Desk) -> None:
    """Everything is counted once: waiting (of it overdue and deferred), paused, in a run; by
    status; the last hour's calls, and their lateness."""
    shelf.worker("w1", slots=5)
    shelf.worker("w2", breaker="open")
    shelf.worker("w3", silent=600)
    shelf.change("a", deferrals=2)
    shelf.change("f", paused_at=datetime.now(UTC))
    shelf.lease("d")
    for n, late in enumerate((0.01, 0.02, 0.03, 5.0)):
        shelf.mark(f"m{n}", outcome="answered", ago=60, late=late)
    shelf.mark("m0", outcome="busy", calls=7, ago=120, late=0.005)
    shelf.mark("old", outcome="answered", ago=4000)
    said = operate(shelf.dsn, "stats", "--json").document
    assert {k: v for k, v in said["live"].items() if k != "next_due"} == {
        "waiting": 2,
        "due": 1,
        "overdue": 0,
        "deferred": 1,
        "paused": 1,
        "leased": 1,
    }
    assert said["live"]["next_due"] == next(
        r["trigger_at"] for r in operate(shelf.dsn, "list", "--json").document if r["id"] == "g"
    )
    assert said["statuses"] == {"pending": 3, "running": 1, "fired": 2, "cancelled": 1, "failed": 1}
    assert said["calls_last_hour"] == {"busy": 7, "answered": 4}
    late = said["lateness_last_hour"]
    assert late["occurrences"] == 4 and late["most"] == pytest.approx(5.0, abs=0.01)
    assert late["p50"] == pytest.approx(0.02, abs=0.01)
    assert said["workers"] == {
        "alive": 2,
        "silent": 1,
        "slots": 8,
        "breakers_open": 1,
        "held": 0,
    }
    out = operate(shelf.dsn, "stats").out
    assert (
        "waiting     2, the next due 5 s ago\n  due       1, 0 of them overdue\n  deferred  1\n"
        "paused      1\nin a run    1 of 8 slots\n"
    ) in re.sub(r"due \d+ s ago", "due 5 s ago", out)
    assert (
        "workers     2 alive, breaker open in 1 of them; 1 silent: recall-worker workers\n" in out
    )
    assert "calls       7 busy, 4 answered in the last hour\n" in out


def test_stats_of_nothing(database: str) -> None:
    """An empty database has its figures, too."""
    said = operate(database, "stats", "--json").document
    assert (
        set(said["statuses"].values()) == {0}
        and said["live"]["next_due"] is None
        and said["lateness_last_hour"]["occurrences"] == 0
    )
    out = operate(database, "stats").out
    assert (
        "workers     none alive\n" in out
        and "calls       none in the last hour\n" in out
        and "lateness" not in out
    )


def test_stats_with_dates_at_the_ends_of_time(desk: Desk) -> None:
    """Infinite dates in rows and marks break no count, on any PostgreSQL."""
    desk.recall("a", "s")
    desk.recall("b", "t")
    desk.conn.execute(
        "update session_recalls set trigger_at = case id when 'a' then '-infinity'::timestamptz "
        "else 'infinity' end"
    )
    desk.mark("a")
    desk.conn.execute("update recall_attempts set scheduled_for = '-infinity'")
    said = operate(desk.dsn, "stats", "--json").document
    assert (
        said["live"]["next_due"] == "0001-01-02T00:00:00.000000Z" and said["live"]["overdue"] == 1
    )
    assert (
        operate(desk.dsn, "stats").status
        == operate(desk.dsn, "list").status
        == operate(desk.dsn, "show", "a").status
        == 0
    )


# --- prune ----------------------------------------------------------------------------------------


def left(desk: Desk) -> tuple[str, list[tuple[str, int]]]:
    recalls = "".join(row["id"] for row in rows_of(desk.dsn))
    marks = desk.conn.execute(
        "select recall_id, occurrence from recall_attempts order by 1, 2"
    ).fetchall()
    return recalls, [(mark["recall_id"], mark["occurrence"]) for mark in marks]


@pytest.fixture
def store(desk: Desk) -> Desk:
    """Old and young recalls in every state, and marks of theirs; f was ended by the application,
    which tells no ended_at."""
    old, young = datetime.now(UTC) - timedelta(days=40), datetime.now(UTC) - timedelta(days=20)
    for id, status in (("a", "fired"), ("b", "cancelled"), ("c", "failed")):
        desk.recall(id, status=status, ended_at=old, updated_at=datetime.now(UTC))
    desk.recall("d", status="fired", ended_at=young, updated_at=old)
    desk.recall(
        "e", due=-40 * 86_400, updated_at=old, created_at=old, occurrence=2, call_type="recurring"
    )
    desk.recall("f", status="cancelled", updated_at=old)
    desk.recall("g", status="cancelled", updated_at=young)
    desk.recall("h", status="running", updated_at=old, ended_at=old)
    desk.recall("i", status="cancelled", ended_at=old)
    desk.lease("i")
    desk.recall("j", status="cancelled", ended_at=old)
    desk.lease("j", left=-86_400)
    for id, occurrence, days in (
        ("a", 1, 40),
        ("d", 1, 20),
        ("d", 0, 40),
        ("e", 1, 40),
        ("e", 2, 40),
        ("gone", 1, 40),
        ("gone", 2, 20),
        ("h", 1, 40),
    ):
        desk.mark(id, occurrence, ago=days * 86_400)
    desk.conn.execute(
        "insert into recall_actions (at, actor, via, action, recall_id) "
        "select now() - n * interval '1 day', 'ann', 'cli', 'pause', 'e' "
        "from unnest('{20, 40, 41}'::integer[]) n"
    )
    return desk


def test_prune(store: Desk) -> None:
    """What is final and ended before the cutoff goes, with old marks; what is live, young, or has
    its call open stays, and so do the marks of occurrences that are not over yet."""
    said = operate(store.dsn, "prune", "--older-than", "30d", "--yes")
    assert (said.status, said.out, said.err) == (
        0,
        "",
        "Deleted 5 recalls and the records of 4 calls, 2 actions and 0 failures told.\n",
    )
    assert left(store) == ("deghi", [("d", 1), ("e", 2), ("gone", 2), ("h", 1)])
    assert operate(store.dsn, "prune", "--older-than", "30d", "--yes", "--json").document == {
        "recalls": 0,
        "calls": 0,
        "actions": 0,
        "failures": 0,
    }


def test_prune_of_a_status(store: Desk) -> None:
    """With --status, recalls in that status only, and no marks."""
    marks = left(store)[1]
    said = operate(
        store.dsn,
        "prune",
        "--older-than",
        "30d",
        "--status",
        "fired",
        "--status",
        "failed",
        "--yes",
        "--json",
    )
    assert said.document == {"recalls": 2, "calls": 0, "actions": 0, "failures": 0}
    assert left(store) == ("bdefghij", marks)


def test_prune_by_status(store: Desk) -> None:
    """With --keep each status goes by its own time, marks by theirs, and a status that is not named
    stays."""
    said = operate(
        store.dsn, "prune", "--keep", "fired=10d,failed=50d,calls=30d", "--yes", "--json"
    )
    assert said.document == {"recalls": 2, "calls": 4, "actions": 0, "failures": 0}
    assert left(store)[0] == "bcefghij"


def test_prune_passes_over_what_is_locked(store: Desk) -> None:
    """A row that the application holds locked, in a transaction that it does not end, is left for
    the next time; the others go at once."""
    with psycopg.connect(store.dsn) as holder:
        holder.execute("select from session_recalls where id = 'a' for update")
        said = operate(store.dsn, "prune", "--older-than", "30d", "--yes", "--json")
    assert said.document == {"recalls": 4, "calls": 4, "actions": 2, "failures": 0}
    assert left(store)[0] == "adeghi"


def test_prune_in_batches(store: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the batches are, the same goes and the same stays."""
    monkeypatch.setattr(sweeping, "PAGES", 1)
    monkeypatch.setattr(sweeping, "ROWS", 1)
    assert operate(store.dsn, "prune", "--older-than", "30d", "--yes", "--json").document == {
        "recalls": 5,
        "calls": 4,
        "actions": 2,
        "failures": 0,
    }
    assert left(store) == ("deghi", [("d", 1), ("e", 2), ("gone", 2), ("h", 1)])


def test_prune_of_many_marks(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks beyond the first stretch of pages are found, those that stay are passed, and none is
    forgotten."""
    monkeypatch.setattr(sweeping, "PAGES", 7)
    desk.recall("live", occurrence=1)
    desk.conn.execute(
        """insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome,
               session_id, worker, lease, scheduled_for, ended_at, settled)
           select case when n % 10 = 0 then 'live' else 'gone' end, 1, 0, n, 'busy', 's', 'w',
               gen_random_uuid(), now(),
               now() - case when n % 2 = 0 then interval '40 days' else interval '1 day' end,
                   'pending'
           from generate_series(1, 20000) n"""
    )
    said = operate(desk.dsn, "prune", "--older-than", "30d", "--yes", "--json").document
    assert said == {"recalls": 0, "calls": 8000, "actions": 0, "failures": 0}
    row = desk.conn.execute(
        "select count(*) filter (where recall_id = 'live') as live, count(*) as marks from "
        "recall_attempts"
    ).fetchone()
    assert row == {"live": 2000, "marks": 12_000}


def test_prune_asks(store: Desk) -> None:
    """Without --yes it shows how many of each kind there are, and nothing goes where nobody says
    yes. What it shows is what goes then."""
    before = left(store)
    said = operate(store.dsn, "prune", "--older-than", "30d", "--status", "fired")
    assert said.status == 1 and said.err.startswith(
        "To delete: fired recalls that ended more than 30d ago:\n"
        "              1 recalls that fired\nDelete them? [y/N] "
    )
    shown = operate(store.dsn, "prune", "--older-than", "30d", "--dry-run", "--json")
    assert shown.status == 0 and shown.err.endswith("Nothing was deleted: --dry-run.\n")
    assert left(store) == before
    done = operate(store.dsn, "prune", "--older-than", "30d", "--json", stdin="y\n")
    assert done.status == 0 and left(store) != before
    assert done.document == shown.document and done.document["calls"] > 0
    said = operate(store.dsn, "prune", "--older-than", "30d")
    assert said.status == 0 and said.err == "Nothing is old enough to be deleted.\n"


# --- a million rows -------------------------------------------------------------------------------

# s1 to s3 are few's; the next thousand are many's, who owns a tenth of all; one is deep's, with a
# tenth of all in it; the rest are spread.
FILL = """
insert into sessions
select 's' || n, case when n <= 3 then 'few' when n <= 1003 then 'many' when n = 1004 then 'deep'
    else 'u' || n %% 5000 end
from generate_series(1, %(half)s) n;
create index on sessions (user_id);
alter table session_recalls disable trigger user;
alter table session_recalls set (autovacuum_enabled = off);
alter table recall_attempts set (autovacuum_enabled = off);
insert into session_recalls (id, session_id, call_type, trigger_at, planned_at, interval_seconds,
    additional_context_message,
    status, created_at, updated_at)
select 'live' || n, 's' || n, (array['once', 'recurring', 'immediate'])[1 + n %% 3],
    now() + n * interval '20 seconds', now() + n * interval '20 seconds', case when n %% 3 = 1
        then 3600 end,
    'Look at the build again, number ' || n, 'pending', now(), now()
from generate_series(1, %(half)s) n;
insert into session_recalls (id, session_id, call_type, trigger_at, additional_context_message,
    status, created_at, updated_at,
    ended_at, last_outcome)
select 'old' || n,
    case when n %% 5 = 0 then 's1004' when n %% 5 = 1 then 's' || 4 + n / 5 %% 1000
        else 's' || 4 + n %% (%(half)s - 10) end,
    'once', now() - n * interval '20 seconds', 'Done long ago, number ' || n,
    case when n %% 100 = 0 then 'failed' when n %% 10 = 0 then 'cancelled' else 'fired' end,
        now() - n * interval '20 seconds',
    now() - n * interval '20 seconds', now() - n * interval '20 seconds', 'answered'
from generate_series(1, %(half)s) n;
insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome, session_id, worker,
    lease, scheduled_for, called_at, last_called_at,
    ended_at, http_status, settled)
select 'old' || 1 + n / 2, 1, 0, 1, case when n %% 2 = 0 then 'busy' else 'answered' end, 's' || n,
    'w', gen_random_uuid(),
    now() - n * interval '10 seconds', now() - n * interval '10 seconds',
        now() - n * interval '10 seconds',
    now() - n * interval '10 seconds' + interval '3 seconds', 200, 'fired'
from generate_series(2 * %(half)s, 1, -1) n;
alter table session_recalls enable trigger user;
update session_recalls set lease = gen_random_uuid(), leased_by = 'w',
    lease_until = now() + interval '1 hour', leased_at = now()
where id in ('live7', 'live8', 'live9');
update session_recalls set trigger_at = now() - interval '1 second' where id in ('live11',
    'live12');
insert into sessions values ('free', 'few');
insert into session_recalls (id, session_id, call_type, trigger_at, additional_context_message,
    status, created_at, updated_at)
values ('free', 'free', 'once', now(), 'Not now.', 'cancelled', now(), now());
"""


@contextmanager
def crowd(server: str, template: str, half: int) -> Iterator[str]:
    """As many recalls that wait as are over, `half` of each, with two calls for each that is over;
    vacuumed and analyzed."""
    with postgres.database(server, template) as dsn:
        with psycopg.connect(dsn, autocommit=True) as conn, psycopg.ClientCursor(conn) as cursor:
            conn.execute("set synchronous_commit = off")
            for statement in FILL.split(";\n"):
                if statement.strip():
                    cursor.execute(statement.encode(), {"half": half})
            conn.execute("vacuum analyze")
        yield dsn


PAGE = {
    "session_id": None,
    "user_id": None,
    "statuses": None,
    "queue": None,
    "limit": 50,
    "offset": 0,
}


def found(**given: str) -> dict[str, Any]:
    """The values of the statement `find`, of a page that is asked for so."""
    return Selection.parse(given).values()


SILENT = {**SILENCE, **ANY_DATABASE.known}
DONE = {"id": None, "since": None, "actor": None, "actions": None, "most": 51}
ONE = {
    "ids": ["live5"],
    "session_id": "s5",
    "reason": "x",
    "at": None,
    "after": 60.0,
    "id": "live5",
    "status": "fired",
    "limit": 100,
    "actor": "somebody",
    "via": "test",
    "action": "mark_fired",
    "changes": '{"times": 9}',
}
ASKED: list[tuple[str, str, dict[str, Any]]] = [
    ("reads", "show", {"id": "live5"}),
    ("reads", "calls", {"id": "old5", "most": None}),
    ("reads", "actions", DONE),
    ("reads", "actions", {**DONE, "id": "old5"}),
    ("reads", "actions", {**DONE, "since": datetime.now(UTC)}),
    ("reads", "on_record", {"id": "old5"}),
    ("reads", "ending", {"id": "old5"}),
    ("reads", "events", {"id": None, "since": datetime.now(UTC), "after": None}),
    ("reads", "events", {"id": None, "since": datetime.now(UTC), "after": 0}),
    ("reads", "events", {"id": "old5", "since": datetime(2020, 1, 1, tzinfo=UTC), "after": None}),
    ("reads", "list", PAGE),
    ("reads", "list", {**PAGE, "statuses": ["pending"]}),
    ("reads", "list_session", {**PAGE, "session_id": "s5"}),
    ("reads", "list_session", {**PAGE, "session_id": "s1004", "statuses": ["pending"]}),
    ("reads", "list_user", {**PAGE, "user_id": "few"}),
    ("reads", "list_user", {**PAGE, "user_id": "nobody"}),
    ("reads", "list_user", {**PAGE, "user_id": "u77"}),
    ("find", "find", found(state="due")),
    ("find", "find", found(state="overdue")),
    ("find", "find", found(state="in-run")),
    ("find", "find", found(state="waiting", queue="mail")),
    ("find", "find", found(session="s5")),
    ("find", "find", found(session="s1004", status="pending")),
    ("find", "find", {**found(), "sessions": ["s1", "s2", "s3"], "gathered": True}),
    ("find", "find", {**found(), "sessions": [], "gathered": True}),
    ("find", "find", {**found(state="live"), "among": ["live5", "live7", "old5"], "limit": None}),
    ("find", "named", {"ids": ["live5", "old5"]}),
    ("find", "lock", {"ids": ["live5", "old5"]}),
    ("find", "existing", {"ids": ["live5", "old5", "nobody"]}),
    ("reads", "why", {**SILENT, "id": "live5"}),
    ("reads", "why", {**SILENT, "id": "old5"}),
    ("reads", "why", {**SILENT, "id": "live1004"}),
    ("reads", "workers", SILENT),
    ("reads", "fleet", FLEET),
    ("reads", "stats_calls", {"window": 3600.0}),
    ("reads", "stats_lateness", {"window": 3600.0}),
    *(
        ("client", name, ONE)
        for name in (
            "cancel_pending",
            "skip_pending",
            "due",
            "next_trigger",
            "mark",
            "cancel",
            "cancel_session",
            "skip",
            "reschedule",
            "hold",
            "edit",
            "edit_content",
            "pause",
            "resume",
            "fire",
            "states",
        )
    ),
    ("client", "retry", {**ONE, "ids": ["free"]}),
    ("client", "cancel_session", {**ONE, "session_id": "s1004"}),
    ("client", "sessions_with_pending", {"session_ids": [f"s{n}" for n in range(1, 51)]}),
    (
        "prune",
        "recalls",
        {
            "first": 3,
            "pages": 2,
            "most": 50,
            "skip": 0,
            "fired": 86_400.0,
            "cancelled": None,
            "failed": 60.0,
        },
    ),
    ("prune", "calls", {"first": 3, "pages": 2, "most": 50, "calls": 86_400.0}),
]
COUNTING: list[tuple[str, str, dict[str, Any]]] = [
    ("reads", "list", {**PAGE, "statuses": ["failed"]}),
    ("reads", "list", {**PAGE, "statuses": ["running"]}),
    ("reads", "list", {**PAGE, "offset": 5000}),
    ("reads", "list_session", {**PAGE, "session_id": "s1004"}),
    ("reads", "list_user", {**PAGE, "user_id": "many"}),
    ("reads", "list_user", {**PAGE, "user_id": "many", "statuses": ["failed"]}),
    ("reads", "list_user", {**PAGE, "user_id": "deep"}),
]
"""What has to go through all that is asked for, as far as an index tells what that is."""
BOUNDED: list[tuple[str, str, dict[str, Any]]] = [
    ("find", "find", found()),
    ("find", "find", found(offset="5000")),
    ("find", "find", found(state="live")),
    ("find", "find", found(state="waiting")),
    ("find", "find", found(state="failed")),
    ("find", "find", found(status="pending")),
    ("find", "find", found(session="s1004", state="ended")),
]
"""What is counted to a bound: that may also be read in the order of its pages, as it ends soon."""


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def planned(
    conn: psycopg.Connection[dict[str, Any]], file: str, name: str, values: dict[str, Any]
) -> tuple[dict[str, Any], float]:
    """The plan by which PostgreSQL did it, of which nothing stays, and how many milliseconds it
    took at best."""
    statement = statements.load(file)[name]
    with conn.transaction(force_rollback=True):
        found = conn.execute(
            f"explain (analyze, timing off, format json) {statement}".encode(), values
        ).fetchone()
    took = []
    for _ in range(3):
        began = time.perf_counter()
        with conn.transaction(force_rollback=True):
            conn.execute(statement.encode(), values, prepare=False)
        took.append(time.perf_counter() - began)
    assert found is not None
    plan: dict[str, Any] = found["QUERY PLAN"][0]["Plan"]
    return plan, min(took) * 1000


def check(
    dsn: str,
    asked: Sequence[tuple[str, str, dict[str, Any]]],
    most: float,
    *,
    bounded: bool = False,
) -> None:
    """No table of ours is read through, and no node of a plan has more than so many rows pass.
    `bounded`: only the latter."""
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as conn:
        for file, name, values in asked:
            plan, ms = planned(conn, file, name, values)
            seen = {n.get("Relation Name") for n in nodes(plan) if n["Node Type"] == "Seq Scan"}
            rows = max(
                (n["Actual Rows"] + n.get("Rows Removed by Filter", 0)) * n["Actual Loops"]
                for n in nodes(plan)
            )
            print(
                f"{file}.{name:22} {ms:8.2f} ms  {rows:9.0f} rows  "
                f"{ ({k: v for k, v in values.items() if v is not None and v != ONE.get(k)})!s:.70}"
            )
            through = seen & {"session_recalls", "recall_attempts"}
            assert bounded or not through, (file, name, values, seen)
            assert rows <= most, (file, name, values)


@pytest.mark.slow
def test_indexes_serve(server: str, template: str) -> None:
    """Whatever people ask comes by an index, and touches hardly more rows than it shows; counting
    and deep pages go through what is asked for."""
    with crowd(server, template, 20_000) as dsn:
        check(dsn, ASKED, 600)
        check(dsn, COUNTING, 40_000)
        check(dsn, BOUNDED, COUNT_MOST + 1000, bounded=True)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_million_rows(server: str, template: str) -> None:
    """The same on a million recalls and a million calls; and what the commands take, as a whole,
    which is what a person waits for."""
    with crowd(server, template, 500_000) as dsn:
        check(dsn, ASKED, 600)
        check(dsn, COUNTING, 1_100_000)
        check(dsn, BOUNDED, COUNT_MOST + 100_000, bounded=True)
        with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as conn:
            print(
                f"reads.stats_recalls          "
                f"{planned(conn, 'reads', 'stats_recalls', {})[1]:8.2f} ms"
            )
        for words in (
            ["why", "live5"],
            ["show", "old5"],
            ["list"],
            ["list", "--user", "few"],
            ["list", "--user", "many"],
            ["list", "--user", "deep"],
            ["list", "--session", "s1004"],
            ["list", "--status", "failed"],
            ["list", "--state", "overdue"],
            ["list", "--state", "paused"],
            ["list", "--since", "1m"],
            ["list", "--session", "s10*"],
            ["stats"],
            ["workers"],
        ):
            began = time.perf_counter()
            assert operate(dsn, *words).status == 0
            inside = time.perf_counter() - began
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "recall_worker", *words, "--dsn", dsn],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=True,
            )
            print(
                f"recall-worker {' '.join(words):24} {inside * 1000:7.1f} ms, as a process "
                f"{(time.perf_counter() - began) * 1000:7.1f} ms"
            )


def sits_in(desk: Desk, session: str) -> None:
    """A further session."""
    desk.conn.execute("insert into sessions values (%s, 'ann')", [session])


def test_stats_and_list_mean_the_same_by_overdue(shelf: Desk) -> None:
    """stats, queues and `list --state` count the same recalls, a dead worker's among them."""
    sits_in(shelf, "s-late")
    shelf.recall("late", "s-late", due=-90)
    sits_in(shelf, "s-just")
    shelf.recall("just", "s-just", due=-30)
    sits_in(shelf, "s-lost")
    shelf.recall("lost", "s-lost", due=-300)
    shelf.lease("lost", left=-120)
    for state in ("due", "overdue"):
        listed = len(operate(shelf.dsn, "list", "--state", state, "--json").document)
        stats = operate(shelf.dsn, "stats", "--json").document
        assert listed == stats["live"][state] == sum(q[state] for q in stats["queues"]), state


def test_who_has_paused_it(shelf: Desk) -> None:
    """`why` names who paused a recall, by the record of it; where it was done by SQL, nobody."""
    sits_in(shelf, "s-held")
    shelf.recall("held", "s-held", due=3600)
    assert operate(shelf.dsn, "pause", "held", environ={"RECALL_ACTOR": "ann"}).status == 0
    assert re.match(rf"Paused since {DATE} by ann;", operate(shelf.dsn, "why", "held").out)
    shelf.conn.execute("update session_recalls set paused_at = now() where id = 'held'")
    assert re.match(rf"Paused since {DATE}; not due", operate(shelf.dsn, "why", "held").out)


@pytest.mark.parametrize("times", [1, 2])
def test_a_skip_is_told_from_a_move(times: int, shelf: Desk) -> None:
    """`why` says how many occurrences were left out."""
    sits_in(shelf, "s-skip")
    recall = operate(shelf.dsn, "schedule", "s-skip", "m", "--every", "1h").out.strip()
    for _ in range(times):
        assert operate(shelf.dsn, "skip", recall).status == 0
    said = operate(shelf.dsn, "why", recall).out
    assert f"after {times} skipped occurrence{'s' if times > 1 else ''}" in said
    operate(shelf.dsn, "reschedule", recall, "--in", "7h")
    assert "skipped" not in operate(shelf.dsn, "why", recall).out


def test_a_run_whose_worker_is_gone(shelf: Desk) -> None:
    """Before its lease ends, too, `why` says that its worker is silent, and what follows."""
    sits_in(shelf, "s-run")
    shelf.recall("run", "s-run", due=-60)
    shelf.lease("run", left=30)
    said = operate(shelf.dsn, "why", "run").out
    assert "which is silent" in said and "then another worker takes over" in said
    assert "in a run" in operate(shelf.dsn, "list", "--session", "s-run").out
    cancelled = operate(shelf.dsn, "cancel", "run")
    assert "its call is aborted" in cancelled.err
    sits_in(shelf, "s-over")
    shelf.recall("over", "s-over", due=-60)
    shelf.lease("over", left=-30)
    assert "lease ended" in operate(shelf.dsn, "list", "--session", "s-over").out
    assert operate(shelf.dsn, "cancel", "over").err == "over: cancelled.\n"
