"""From the application's old scheduler to the daemon and back, as docs/migration.md has it; and
what the order of its steps is good for.

The application counts its agent's runs by itself, whoever calls: by the recall, and by what stands
in `trigger_at` when the run begins, which neither scheduler nor daemon writes before the run has
ended. So nothing of the worker's own numbers and keys is believed. The document's SQL is executed
as it stands there.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from ..conftest import Connection, connected
from ..support.application import CREATE_TABLES, AlreadyScheduled, Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, Raw, Request, reply
from ..support.scheduler import Scheduler
from ..test_cli import operate
from .test_corridor import soon
from .test_lease import eventually, promise, rows
from .test_ops import scrape, value

MIGRATION = Path(__file__).parent.parent.parent / "docs" / "migration.md"
SQL: dict[str, str] = dict(
    re.findall(
        r"^<!-- (\w+) -->\n```sql\n(.*?)^```$",
        MIGRATION.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
)
"""The document's statements, by the names that stand above them."""


async def execute(db: Connection, *names: str) -> None:
    """Statements of the document, each block in a transaction of its own."""
    for name in names:
        async with db.transaction():
            await db.execute(SQL[name].encode())


# --- the application ------------------------------------------------------------------------------


@dataclass(slots=True)
class Run:
    recall: str
    call_type: str
    due: datetime
    """`trigger_at` when the run began: with the recall's id, which occurrence it is."""
    by: str
    """old or daemon."""
    began: float
    ended: float | None = None


class Agents:
    """The application's agent, and its run endpoint before it. Runs are counted here and nowhere
    else."""

    def __init__(self, pool: asyncpg.Pool[asyncpg.Record]) -> None:
        self.runs: list[Run] = []
        self.met: list[str] = []
        """Sessions in which a run began while another one was on."""
        self._pool = pool
        self._busy: Counter[str] = Counter()
        self._changed = asyncio.Condition()

    async def old(self, session: str, message: str) -> None:
        await self._run(session, message, "old")

    async def answer(self, request: Request) -> Raw:
        await self._run(request.session, request.document["user_message"], "daemon")
        return reply()

    def of(self, by: str, call_type: str | None = None) -> list[Run]:
        return [run for run in self.runs if run.by == by and call_type in (None, run.call_type)]

    async def until(self, condition: Callable[[], object], within: float = 60.0) -> None:
        async with asyncio.timeout(within), self._changed:
            await self._changed.wait_for(condition)

    async def some_more(self, by: str, times: int = 7) -> None:
        """Wait until so many more recalls of each type have been run to their ends."""

        def ended() -> list[int]:
            return [
                sum(r.ended is not None for r in self.of(by, kind))
                for kind in ("once", "immediate", "recurring")
            ]

        before = ended()
        await self.until(
            lambda: all(now >= was + times for was, now in zip(before, ended(), strict=True))
        )

    async def _run(self, session: str, message: str, by: str) -> None:
        row = await self._pool.fetchrow(
            "select id, call_type, trigger_at from session_recalls where session_id = $1 and "
            "additional_context_message = $2",
            session,
            message,
        )
        run = Run(row["id"], row["call_type"], row["trigger_at"], by, time.monotonic())
        if self._busy[session]:
            self.met.append(session)
        self._busy[session] += 1
        self.runs.append(run)
        await asyncio.sleep(random.uniform(0.05, 0.4))  # The agent at work.
        self._busy[session] -= 1
        async with self._changed:
            run.ended = time.monotonic()
            self._changed.notify_all()


@pytest.fixture
async def pool(database: str) -> AsyncIterator[asyncpg.Pool[asyncpg.Record]]:
    """The application's connections."""
    async with asyncpg.create_pool(database, min_size=1, max_size=10) as pool:
        yield pool


@contextlib.asynccontextmanager
async def falling_due(
    application: Application, recurring: int = 6
) -> AsyncIterator[asyncio.Task[None]]:
    """Meanwhile recalls of all three types fall due all the time; recurring ones, every second, in
    so many sessions."""
    feeding = asyncio.create_task(_feed(application, recurring))
    try:
        yield feeding
    finally:
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)


async def _feed(application: Application, recurring: int) -> None:
    for n in count():
        kind = "recurring" if n < recurring else ("once", "immediate")[n % 2]
        await application.create_session(f"s{n}", "ann")
        due = soon(0 if kind == "immediate" else 0.3)
        await application.schedule(
            f"s{n}", kind, due, f"come back {n}", 1 if kind == "recurring" else None
        )
        await asyncio.sleep(0.1)


# --- in the documented order ----------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.timeout(240)
async def test_there_and_back_while_recalls_fall_due(
    empty_database: str, endpoint: Endpoint
) -> None:
    """Migrated under the old scheduler, then the daemon, then the old one, then the daemon: each
    occurrence was run exactly once, no two runs met in a session, nothing was forgotten, and the
    daemon had nothing to complain of."""
    dsn = empty_database
    async with asyncpg.create_pool(dsn, min_size=1, max_size=10) as pool, connected(dsn) as db:
        await pool.execute(CREATE_TABLES)
        application, agents = Application(pool), Agents(pool)
        endpoint.default = agents.answer
        old = Scheduler(application, agents.old, slots=8)
        settings = {"RECALL_DSN": dsn, "RECALL_RUN_URL": endpoint.url, "RECALL_DRAIN_TIMEOUT": "60"}
        async with Daemons(settings) as daemons, old, falling_due(application) as feeding:
            await agents.some_more("old")
            assert (await asyncio.to_thread(operate, dsn, "migrate")).status == 0
            assert (await asyncio.to_thread(operate, dsn, "migrate", "--check")).status == 0
            await application.create_tables()  # A process of the application is started anew.
            await agents.some_more("old")

            await old.stop()
            first = await daemons.start(concurrency=8)
            await agents.some_more("daemon")

            assert await first.stop(within=70) == 0
            assert await rows(db, SQL["held"]) == await rows(db, SQL["doubtful"]) == []
            await execute(db, "order", "slots")
            before = len(agents.of("daemon"))
            old.start()
            await agents.some_more("old")
            assert len(agents.of("daemon")) == before
            assert await rows(db, SQL["left"]) == [{"count": 0}]

            await old.stop()
            await execute(db, "resume")
            second = await daemons.start(concurrency=8)
            await agents.some_more("daemon")
            feeding.cancel()
            await eventually(
                db,
                "select 1 where not exists (select from session_recalls where status = 'pending' "
                "and call_type <> 'recurring')",
            )
            assert await second.stop(within=70) == 0

            complaints = [
                e
                for daemon in (first, second)
                for e in daemon.events
                if e["level"] in ("warning", "error")
            ]
            assert complaints == []
        assert agents.met == []
        times = Counter((run.recall, run.due) for run in agents.runs)
        assert set(times.values()) == {1}
        for row in await rows(db, "select * from session_recalls"):
            runs = [run for run in agents.runs if run.recall == row["id"]]
            if row["call_type"] == "recurring":
                assert row["status"] == "pending" and row["trigger_at"] > runs[-1].due
                assert {run.by for run in runs} == {"old", "daemon"}
                ends = [run.ended for run in runs[:-1]]
                # An interval after the run before has ended, however it was called.
                assert all(
                    e is not None and run.began > e + 0.9
                    for run, e in zip(runs[1:], ends, strict=True)
                )
            else:
                assert (row["status"], len(runs)) == ("fired", 1), row


LIVE = (
    "select id, status, paused_at is not null as paused from session_recalls where status in "
    "('pending', 'running')"
)


@pytest.mark.slow
async def test_what_the_daemon_leaves(
    app: Application,
    db: Connection,
    database: str,
    pool: asyncpg.Pool[asyncpg.Record],
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """Put off, moved out of their slots, cut off in mid-run, failed, paused, on cron, on a grid,
    with an end: each is run once by the old scheduler, or not at all where it might have been run
    before, or kept, and run by the daemon when that is back."""
    agents = Agents(pool)
    later = reply(409, headers={"retry-after": "3600"})
    gates = {session: Gate() for session in ("cut", "cut again", "moved", "beside")}
    for session, gate in gates.items():
        endpoint.script(session, gate)
    gates["moved"].then = gates["beside"].then = later
    endpoint.script("busy", later)
    endpoint.script("refused", reply(422))
    endpoint.default = agents.answer
    daemon = await daemons.start(concurrency=10, drain_timeout=0.1)
    ids = {
        session: await promise(app, session, "once")
        for session in ("busy", "refused", "cut", "moved", "beside")
    }
    ids["cut again"] = await promise(app, "cut again", "recurring", interval=3600)
    for gate in gates.values():
        await gate.entered.wait()
    # Scheduled from inside the runs, which then find the session busy: the older ones wait outside
    # of their slots.
    ids["moved on"] = await app.schedule("moved", "once", soon(3600), "and then")
    ids["beside on"] = await app.schedule(
        "beside", "recurring", soon(3600), "and then, again and again", 3600
    )
    gates["moved"].open()
    gates["beside"].open()
    for session in ("busy", "refused", "moved", "beside"):
        await daemon.hears("recall.settled", session=session)
    for name, words in {
        "paused": ("--every", "1h"),
        "cron": ("--cron", "0 * * * *"),
        "grid": ("--grid", "1h"),
        "until": ("--every", "1h", "--times", "2"),
        "once paused": ("--in", "1h"),
    }.items():
        await app.create_session(name, "ann")
        said = await asyncio.to_thread(
            operate, database, "schedule", name, f"come back to {name}", *words, "--json"
        )
        ids[name] = said.document["id"]
    for name in ("paused", "once paused"):
        assert (await asyncio.to_thread(operate, database, "pause", ids[name])).status == 0

    assert await daemon.stop() == 0
    assert await rows(db, SQL["held"]) == []
    assert {row["id"] for row in await rows(db, SQL["doubtful"])} == {ids["cut"], ids["cut again"]}
    await execute(db, "order", "slots")
    # An hour passes.
    await db.execute(
        "update session_recalls set trigger_at = trigger_at - interval '1 hour', planned_at = "
        "planned_at - interval '1 hour'"
    )
    kept = {ids[name] for name in ("paused", "once paused", "cron", "grid", "until")}
    assert {row["id"] for row in await rows(db, LIVE) if row["paused"]} == kept

    ran = {ids[name] for name in ("busy", "moved", "moved on", "beside", "beside on", "cut again")}
    old = Scheduler(Application(pool), agents.old)
    async with old:
        async with asyncio.timeout(30):
            while {run.recall for run in agents.runs if run.ended} != ran or (
                await rows(db, SQL["left"])
            )[0]["count"]:
                await execute(db, "slots")
                await asyncio.sleep(0.05)
        await old.stop()
    assert Counter(run.recall for run in agents.of("old")) == dict.fromkeys(ran, 1)
    status = {row["id"]: row["status"] for row in await rows(db, "select * from session_recalls")}
    assert {
        name: status[ids[name]]
        for name in ("busy", "moved", "moved on", "beside", "cut", "refused")
    } == {
        "busy": "fired",
        "moved": "fired",
        "moved on": "fired",
        "beside": "fired",
        "cut": "cancelled",
        "refused": "failed",
    }
    await execute(db, "failed")

    await execute(db, "resume")
    again = await daemons.start(concurrency=10)
    goes_on = {ids[name] for name in ("cron", "grid", "until")}
    await agents.until(lambda: {run.recall for run in agents.of("daemon") if run.ended} == goes_on)
    for name in ("cron", "grid", "until"):
        await again.hears("recall.settled", session=name, outcome="answered")
    assert await again.stop() == 0
    assert Counter(run.recall for run in agents.of("daemon")) == dict.fromkeys(goes_on, 1)
    assert {row["id"] for row in await rows(db, LIVE) if row["paused"]} == {
        ids["paused"],
        ids["once paused"],
    }
    assert agents.met == [] and again.told("lease.violated") == []


@pytest.mark.slow
async def test_keys_that_were_used_are_not_used_again(
    app: Application,
    db: Connection,
    pool: asyncpg.Pool[asyncpg.Record],
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """A recurring recall that the daemon had called before, and that the old scheduler ran since,
    is called under another key."""
    agents = Agents(pool)
    endpoint.script("s", reply(409, headers={"retry-after": "3600"}), reply())
    first = await daemons.start()
    await promise(app, "s", "recurring", interval=3600)
    await first.hears("recall.settled", outcome="busy")
    await first.stop()
    await execute(db, "order", "slots")
    await app.connection.execute("update session_recalls set trigger_at = now()")
    async with Scheduler(Application(pool), agents.old) as old:
        await agents.until(lambda: [run.ended for run in agents.runs] not in ([], [None]))
        await old.stop()
    await app.connection.execute("update session_recalls set trigger_at = now()")
    second = await daemons.start()
    await second.hears("recall.settled", outcome="answered")
    one, two = endpoint.keys
    assert one != two


@pytest.mark.slow
@pytest.mark.parametrize("accepted", [False, True], ids=["answered", "accepted"])
async def test_a_worker_that_was_killed_before_the_way_back(
    accepted: bool,
    app: Application,
    db: Connection,
    pool: asyncpg.Pool[asyncpg.Record],
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """Its row is seen to be held; another worker takes it up under the same key, and then nothing
    is left that the old one would run."""
    agents = Agents(pool)
    gate = Gate(then=reply(200, {"status": "succeeded"}))
    if accepted:
        endpoint.script("s", reply(202, {}, {"location": "/runs/run-1"}))
        endpoint.script("GET run-1", gate)
    else:
        endpoint.script("s", gate, gate)
    worker = await daemons.start(lease=2, drain_timeout=60)
    recall = await promise(app, "s", "once")
    await gate.entered.wait()
    await worker.kill()
    [held] = await rows(db, SQL["held"])
    assert (held["id"], held["leased_by"], held["run_reference"] is not None) == (
        recall,
        worker.name,
        accepted,
    )

    worker = await daemons.start(lease=2, drain_timeout=60)
    await worker.hears("lease.taken", recall=recall)
    stopping = asyncio.create_task(worker.stop())
    await worker.hears("worker.draining")
    gate.open()
    assert await stopping == 0
    assert await rows(db, SQL["held"]) == await rows(db, SQL["doubtful"]) == []
    await execute(db, "order", "slots")
    async with Scheduler(Application(pool), agents.old) as old:
        other = await promise(app, "t")
        await agents.until(lambda: [run.recall for run in agents.runs if run.ended] == [other])
        await old.stop()
    assert len({request.key for request in endpoint.requests if request.method == "POST"}) == 1


@pytest.mark.slow
async def test_a_recall_that_is_made_plain(
    app: Application, db: Connection, database: str, pool: asyncpg.Pool[asyncpg.Record]
) -> None:
    """A recall on a grid, with an end, that is to go on under the old scheduler, does so by its
    interval."""
    agents = Agents(pool)
    await app.create_session("s", "ann")
    said = await asyncio.to_thread(
        operate, database, "schedule", "s", "come back", "--grid", "1s", "--times", "9", "--json"
    )
    id = said.document["id"]
    await execute(db, "order")
    async with db.transaction():
        await db.execute(SQL["plain"].replace("'ID'", f"'{id}'").encode())
    await execute(db, "slots")
    async with Scheduler(Application(pool), agents.old) as old:
        await agents.until(lambda: len([run for run in agents.runs if run.ended]) == 2)
        await old.stop()
    assert {run.recall for run in agents.runs} == {id}


# --- in any other order ---------------------------------------------------------------------------


class Slow:
    """An agent that runs until it is let go; whoever calls, it counts."""

    def __init__(self) -> None:
        self.began: Counter[str] = Counter()
        self.gates = {"old": Gate(), "daemon": Gate()}

    async def old(self, session: str, message: str) -> None:
        self.began[session] += 1
        self.gates["old"].entered.set()
        await self.gates["old"].opened.wait()

    async def answer(self, request: Request) -> Gate:
        self.began[request.session] += 1
        return self.gates["daemon"]


@pytest.mark.parametrize(("call_type", "status"), [("once", "fired"), ("recurring", "pending")])
async def test_side_by_side_the_daemon_notices(
    call_type: str,
    status: str,
    app: Application,
    pool: asyncpg.Pool[asyncpg.Record],
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """Both on: the recall runs twice. Where the old one settles what the daemon holds, that is
    told, counted, and once."""
    agent = Slow()
    endpoint.default = agent.answer
    daemon = await daemons.start(ops_listen=0)
    async with Scheduler(Application(pool), agent.old) as old:
        recall = await promise(
            app, "s", call_type, interval=3600 if call_type == "recurring" else None
        )
        for gate in agent.gates.values():
            await gate.entered.wait()
        assert agent.began["s"] == 2, "it is really dangerous"
        agent.gates["old"].open()
        await old.stop()
    agent.gates["daemon"].open()
    [told] = await daemon.hears("lease.violated")
    assert (told["recall"], told["status"], told["level"]) == (recall, status, "warning")
    await daemon.until(lambda: daemon.told("recall.ended") + daemon.told("recall.settled"))
    assert value(await scrape(daemon), "leases_violated_total", status=status) == 1
    assert len(daemon.told("lease.violated")) == 1


async def test_side_by_side_the_doctor_notices(
    app: Application,
    db: Connection,
    database: str,
    pool: asyncpg.Pool[asyncpg.Record],
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """Where the daemon ends first it holds nothing any more that could be violated: the recall ran
    twice all the same, and the mark that came after the worker's own is seen."""
    agent = Slow()
    endpoint.default = agent.answer
    daemon = await daemons.start()
    await eventually(db, "select 1 from recall_workers")
    async with Scheduler(Application(pool), agent.old) as old:
        recall = await promise(app, "s")
        for gate in agent.gates.values():
            await gate.entered.wait()
        agent.gates["daemon"].open()
        await daemon.hears("recall.settled", recall=recall, status="fired")
        agent.gates["old"].open()
        await old.stop()
    assert agent.began["s"] == 2 and daemon.told("lease.violated") == []
    said = await asyncio.to_thread(operate, database, "doctor", "--json")
    assert [
        row["seen"] for row in said.document["checks"] if "marked fired by others" in row["seen"]
    ] == [
        f"1 recall was marked fired by others than the workers within an hour, for example {recall}"
    ]


async def test_an_old_run_that_was_not_let_end(
    app: Application, pool: asyncpg.Pool[asyncpg.Record], endpoint: Endpoint, daemons: Daemons
) -> None:
    """Turned off in mid-run, the old scheduler leaves a recall that looks as if nobody had run it:
    the daemon does, again."""
    agent = Slow()
    endpoint.default = agent.answer
    async with Scheduler(Application(pool), agent.old) as old:
        await promise(app, "s")
        await agent.gates["old"].entered.wait()
        await old.kill()
    await daemons.start()
    await agent.gates["daemon"].entered.wait()
    assert agent.began["s"] == 2


async def test_a_daemon_that_still_drains(
    app: Application, pool: asyncpg.Pool[asyncpg.Record], endpoint: Endpoint, daemons: Daemons
) -> None:
    """Turned on before the daemon has gone, the old scheduler runs what is being run."""
    agent = Slow()
    endpoint.default = agent.answer
    daemon = await daemons.start(drain_timeout=60)
    await promise(app, "s")
    await agent.gates["daemon"].entered.wait()
    stopping = asyncio.create_task(daemon.stop())
    await daemon.hears("worker.draining")
    async with Scheduler(Application(pool), agent.old):
        await agent.gates["old"].entered.wait()
        assert agent.began["s"] == 2
        agent.gates["daemon"].open()
        assert await stopping == 0


async def test_rows_that_were_not_put_in_order(
    app: Application, database: str, db: Connection, pool: asyncpg.Pool[asyncpg.Record]
) -> None:
    """Left as the daemon leaves them, a paused recall and one on cron are run by the old scheduler,
    and one in `running` is not."""
    agents = Agents(pool)
    ids = {}
    for name, words in {
        "paused": ("--in", "1h"),
        "cron": ("--cron", "0 * * * *"),
        "running": ("--in", "1h"),
    }.items():
        await app.create_session(name, "ann")
        said = await asyncio.to_thread(
            operate, database, "schedule", name, f"come back to {name}", *words, "--json"
        )
        ids[name] = said.document["id"]
    await asyncio.to_thread(operate, database, "pause", ids["paused"])
    await db.execute("update session_recalls set status = 'running' where session_id = 'running'")
    await db.execute("update session_recalls set trigger_at = now()")
    async with Scheduler(Application(pool), agents.old) as old:
        await agents.until(
            lambda: {run.recall for run in agents.runs if run.ended} == {ids["paused"], ids["cron"]}
        )
        await old.stop()


async def test_the_old_scheduler_is_as_it_was(
    app: Application, db: Connection, pool: asyncpg.Pool[asyncpg.Record]
) -> None:
    """The emulation: one of each type, a failure, a refusal of what is scheduled from inside a run,
    a cancel that is overwritten."""
    refused: list[str] = []

    async def agent(session: str, _: str) -> None:
        if session == "failing":
            raise RuntimeError("no")
        if session == "once":
            try:
                await Application(pool).schedule("once", "once", soon(0), "the next one")
            except AlreadyScheduled:
                refused.append(session)
            assert await Application(pool).cancel_session("once") == 1

    async with Scheduler(Application(pool), agent) as old:
        for session, kind in {
            "once": "once",
            "now": "immediate",
            "failing": "recurring",
            "again": "recurring",
        }.items():
            await promise(app, session, kind, interval=3600 if kind == "recurring" else None)
        due = "select from session_recalls where status = 'pending' and trigger_at <= now()"
        await eventually(db, f"select 1 where not exists ({due})")
        await old.stop()
    [again] = await app.list_by_session("again")
    status = {
        session: (await app.list_by_session(session))[0]["status"]
        for session in ("once", "now", "failing", "again")
    }
    assert status == {"once": "fired", "now": "fired", "failing": "cancelled", "again": "pending"}
    assert refused == ["once"] and again["trigger_at"] > soon(3500)


def test_every_statement_is_executed() -> None:
    """The document's SQL has a name each, and each name is used here."""
    text = MIGRATION.read_text(encoding="utf-8")
    assert len(SQL) == text.count("```sql") == len(set(SQL))
    source = Path(__file__).read_text(encoding="utf-8")
    unused: list[Any] = [name for name in SQL if f'"{name}"' not in source]
    assert unused == []
