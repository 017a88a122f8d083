"""Every operation in every state: what it answers, what the recall becomes, and what fires next
under which key.

The table below is the data: each cell is a test (the real command line, the real daemon, an
endpoint that holds its runs open), and docs/operations.md is generated from it. Then races, a
connection per actor: what comes out is always what some order gives.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Self

import pytest
import pytest_asyncio

from recall_worker import Recalls, statements
from recall_worker.database.ledger import Ledger
from recall_worker.judge import Policy, as_it_stands, judge, resolve_move
from recall_worker.recall import (
    Answered,
    Busy,
    Claim,
    Ended,
    Ending,
    LeaseLost,
    Locked,
    Moved,
    Outcome,
    Settled,
    Stranded,
    Unsent,
)

from .conftest import Connection, connected
from .support import postgres
from .support.application import Application
from .support.claiming import claim_due
from .support.daemon import Daemon, Daemons
from .support.endpoint import Answer, Endpoint, Gate, reply
from .test_cli import operate, process

# --- the table ------------------------------------------------------------------------------------

STATES = (
    "waiting, once",
    "waiting, recurring",
    "deferred, once",
    "deferred, recurring",
    "in a run, once",
    "in a run, recurring",
    "in a run, outside",
    "deferred, outside",
    "paused",
    "paused in a run",
    "fired",
    "cancelled",
    "cancelled, call open",
    "failed",
    "missing",
)
"""docs/operations.md says what each of them is; `outside`: of its session's slot, as the session
has scheduled another recall."""

ENDING_AND_SKIPPING = """
                     | cancel               | cancel --session     | skip          | skip --session
waiting, once        | 0 cancelled          | 0 cancelled          | 1             | 1
waiting, recurring   | 0 cancelled          | 0 cancelled          | 0 pending → 2 | 0 pending → 2
deferred, once       | 0 cancelled          | 0 cancelled          | 1             | 1
deferred, recurring  | 0 cancelled          | 0 cancelled          | 0 pending → 2 | 0 pending → 2
in a run, once       | 0 aborted, cancelled | 0 aborted, cancelled | 1             | 1
in a run, recurring  | 0 aborted, cancelled | 0 aborted, cancelled | 0 pending → 3 | 0 pending → 3
in a run, outside    | 0 aborted, cancelled | 0 aborted, cancelled | 1             | 1
deferred, outside    | 0 cancelled          | 0 cancelled          | 1             | 1
paused               | 0 cancelled          | 0 cancelled          | 0 paused → 2  | 0 paused → 2
paused in a run      | 0 aborted, cancelled | 0 aborted, cancelled | 0 paused → 3  | 0 paused → 3
fired                | 1                    | 1                    | 1             | 1
cancelled            | 1                    | 1                    | 1             | 1
cancelled, call open | 1                    | 1                    | 1             | 1
failed               | 1                    | 1                    | 1             | 1
missing              | 1                    | 1                    | 1             | 1
"""

HOLDING_AND_MOVING = """
                     | pause        | resume        | retry            | fire                 | reschedule
waiting, once        | 0 paused → 1 | 0 pending → 1 | 1                | 0 now 1, fired       | 0 pending → 1
waiting, recurring   | 0 paused → 1 | 0 pending → 1 | 1                | 0 now 1.f1, pending → 1 | 0 pending → 1
deferred, once       | 0 paused → 1 | 0 pending → 1 | 1                | 0 now 1, fired       | 0 pending → 1.1
deferred, recurring  | 0 paused → 1 | 0 pending → 1 | 1                | 0 now 1, pending → 2 | 0 pending → 1.1
in a run, once       | 0 fired      | 0 fired       | 1                | 1                    | 1
in a run, recurring  | 0 paused → 2 | 0 pending → 2 | 1                | 1                    | 0 pending → 2
in a run, outside    | 0 fired      | 0 fired       | 1                | 1                    | 1
deferred, outside    | 0 paused → 1 | 0 running → 1 | 1                | 0 now 1, fired       | 0 running → 1.1
paused               | 0 paused → 1 | 0 pending → 1 | 1                | 1                    | 0 paused → 1
paused in a run      | 0 paused → 2 | 0 pending → 2 | 1                | 1                    | 0 paused → 2
fired                | 1            | 1             | 1                | 1                    | 1
cancelled            | 1            | 1             | 0 now 1.1, fired | 1                    | 1
cancelled, call open | 1            | 1             | 1                | 1                    | 1
failed               | 1            | 1             | 0 now 1.1, fired | 1                    | 1
missing              | 1            | 1             | 1                | 1                    | 1
"""  # noqa: E501 - a table

APPLICATION = """
                     | cancel by session    | skip          | move by id    | mark fired       | mark cancelled       | delete the session
waiting, once        | 1 cancelled          | 0             | 1 pending → 1 | 1 fired          | 1 cancelled          | 1 gone
waiting, recurring   | 1 cancelled          | 1 pending → 2 | 1 pending → 1 | 1 fired          | 1 cancelled          | 1 gone
deferred, once       | 1 cancelled          | 0             | 1 pending → 2 | 1 fired          | 1 cancelled          | 1 gone
deferred, recurring  | 1 cancelled          | 1 pending → 2 | 1 pending → 2 | 1 fired          | 1 cancelled          | 1 gone
in a run, once       | 1 aborted, cancelled | 0             | 1 pending → 2 | 1 aborted, fired | 1 aborted, cancelled | 1 aborted, gone
in a run, recurring  | 1 aborted, cancelled | 1 pending → 3 | 1 pending → 2 | 1 aborted, fired | 1 aborted, cancelled | 1 aborted, gone
in a run, outside    | 1 fired              | 0             | 1 running → 2 | 1 aborted, fired | 1 aborted, cancelled | 1 aborted, gone
deferred, outside    | 1 running → 1        | 0             | 1 running → 2 | 1 fired          | 1 cancelled          | 1 gone
paused               | 1 cancelled          | 1 paused → 2  | 1 paused → 1  | 1 fired          | 1 cancelled          | 1 gone
paused in a run      | 1 aborted, cancelled | 1 paused → 3  | 1 paused → 2  | 1 aborted, fired | 1 aborted, cancelled | 1 aborted, gone
fired                | 0                    | 0             | 1 fired       | 1 fired          | 1 cancelled          | 1 gone
cancelled            | 0                    | 0             | 1 cancelled   | 1 fired          | 1 cancelled          | 1 gone
cancelled, call open | 0                    | 0             | 1 cancelled   | 1 fired          | 1 cancelled          | 1 gone
failed               | 0                    | 0             | 1 failed      | 1 fired          | 1 cancelled          | 1 gone
missing              | 0                    | 0             | 0             | 0                | 0                    | 1 gone
"""  # noqa: E501 - a table


@dataclass(frozen=True)
class Cell:
    """What an operation comes to in one state. Keys are told without the recall's id: `1`,
    `1.1`."""

    text: str
    answer: int
    """The command's exit status, or the rows that the application's statement counts."""
    aborted: bool
    """The open call is broken off."""
    now: str | None
    """The key under which it fires at once."""
    row: str | None
    """The row afterwards, in mid-run after the run's end; None where nothing is changed."""
    then: str | None
    """The key under which it fires when it is due (and, where it is paused, resumed)."""

    @classmethod
    def read(cls, text: str) -> Self:
        found = re.fullmatch(r"(\d)(?: (aborted, )?(?:now (\S+), )?(\w+)(?: → (\S+))?)?", text)
        assert found, text
        return cls(text, int(found[1]), found[2] is not None, found[3], found[4], found[5])


Table = Mapping[str, Mapping[str, Cell]]
"""Operation, then state."""


def table(text: str) -> Table:
    head, *lines = [
        [cell.strip() for cell in line.split("|")] for line in text.strip("\n").splitlines()
    ]
    assert tuple(line[0] for line in lines) == STATES
    return {
        operation: {line[0]: Cell.read(line[at]) for line in lines}
        for at, operation in enumerate(head)
        if at
    }


COMMANDS, STATEMENTS = (
    {**table(ENDING_AND_SKIPPING), **table(HOLDING_AND_MOVING)},
    table(APPLICATION),
)

# --- the stage ------------------------------------------------------------------------------------

HOUR = timedelta(hours=1)
QUIET = """
select 1 where not exists (
    select from session_recalls
    where session_id = %s and status in ('pending', 'running')
        and (
            lease is not null
            or (paused_at is null and coalesce(lease_until, trigger_at) <= now())
        )
)
"""
TIME_PASSES = """
update session_recalls
set planned_at = planned_at - (trigger_at - now()), trigger_at = now(),
    named_at = named_at - (trigger_at - now()), edits = edits + 1,
    lease_until = case when lease_until is not null then now() end
where session_id = %s and status in ('pending', 'running') and lease is null and trigger_at > now()
"""
LEASED_ELSEWHERE = """
update session_recalls
set lease = gen_random_uuid(), leased_by = 'elsewhere', leased_at = now(),
    lease_until = now() + interval '1 hour', attempt = 1
where id = %s
"""


@dataclass
class Stage:
    """A database, a daemon and an endpoint for all cells; each cell has a session of its own."""

    dsn: str
    db: Connection
    app: Application
    endpoint: Endpoint
    daemon: Daemon
    numbers: itertools.count[int] = field(default_factory=itertools.count)


@dataclass
class Scene:
    """One recall in one state, and what was called before."""

    stage: Stage
    session: str
    id: str
    gate: Gate | None = None
    newer: str | None = None
    """The recall that the session has scheduled meanwhile."""
    before: int = 0

    async def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        return await (await self.stage.db.execute(query.encode(), values)).fetchall()

    async def row(self, id: str | None = None) -> dict[str, Any] | None:
        found = await self.rows("select * from session_recalls where id = %s", id or self.id)
        return found[0] if found else None

    async def status(self) -> str:
        row = await self.row()
        if row is None:
            return "gone"
        return (
            "paused"
            if row["paused_at"] is not None and row["status"] in ("pending", "running")
            else str(row["status"])
        )

    async def until(self, query: str, *values: Any) -> None:
        async with asyncio.timeout(20):
            while not await self.rows(query, *values):
                await self.rows("select pg_sleep(0.003)")

    async def quiet(self) -> None:
        """Until nothing of this session is due or in a run."""
        await self.until(QUIET, self.session)

    def keys(self, id: str | None = None) -> list[str]:
        """The keys of the calls since the state was reached, without the recall's id."""
        id = id or self.id
        mine = [request.key for request in self.stage.endpoint.requests[self.before :]]
        return [key.removeprefix(f"{id}:") for key in mine if key.startswith(f"{id}:")]

    async def command(self, *words: str) -> int:
        return (await asyncio.to_thread(operate, self.stage.dsn, *words)).status


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(server: str, template: str) -> AsyncIterator[Stage]:
    with postgres.database(server, template) as dsn:
        async with (
            connected(dsn) as db,
            await Application.connect(dsn) as app,
            Endpoint() as endpoint,
            Daemons({"RECALL_DSN": dsn, "RECALL_RUN_URL": endpoint.url}) as daemons,
        ):
            daemon = await daemons.start(concurrency=20)
            yield Stage(dsn, db, app, endpoint, daemon)


async def scene(stage: Stage, state: str) -> Scene:
    """Bring a recall of a new session into a state."""
    app, n = stage.app, next(stage.numbers)
    here = Scene(stage, f"s{n}", f"r{n}")
    await app.create_session(here.session, "ann")
    if state == "missing":
        return here
    recurring = "recurring" in state or state.startswith("paused")
    called = not state.startswith("waiting") and state not in (
        "paused",
        "cancelled",
        "cancelled, call open",
    )
    answers: list[Answer] = [reply()]
    if "in a run" in state or state == "deferred, outside":
        here.gate = Gate()
        answers = [here.gate, reply()]
    if state == "deferred, outside":
        assert here.gate is not None
        here.gate.then = reply(409, headers={"retry-after": "3600"})
    elif state.startswith("deferred"):
        answers = [reply(409, headers={"retry-after": "3600"}), reply()]
    elif state == "failed":
        answers = [reply(422), reply()]
    stage.endpoint.script(here.session, *answers)
    when = datetime.now(UTC) + (timedelta() if called else HOUR)
    await app.schedule(
        here.session,
        "recurring" if recurring else "once",
        when,
        "come back",
        3600 if recurring else None,
        id=here.id,
    )
    if here.gate is not None:
        await here.gate.entered.wait()
    if "outside" in state:
        here.newer = await app.schedule(
            here.session, "once", datetime.now(UTC) + HOUR, "the next one", id=f"{here.id}-newer"
        )
    if state == "deferred, outside":
        assert here.gate is not None
        here.gate.open()
        here.gate = None
    if called and here.gate is None:
        await here.until("select 1 from recall_attempts where recall_id = %s", here.id)
        await here.quiet()
    if state.startswith("paused"):
        assert await here.command("pause", here.id) == 0
    if state == "cancelled, call open":
        await stage.db.execute(LEASED_ELSEWHERE.encode(), [here.id])
    if state.startswith("cancelled"):
        assert await app.cancel_session(here.session) == 1
    here.before = len(stage.endpoint.requests)
    return here


async def answer(here: Scene, operation: str) -> int:
    """Do it, by the command line or by the application's own SQL; the exit status, or how many rows
    there were."""
    app = here.stage.app
    match operation:
        case "cancel --session":
            return await here.command("cancel", "--session", here.session, "--yes")
        case "skip --session":
            return await here.command("skip", "--session", here.session)
        case "reschedule":
            return await here.command("reschedule", here.id, "--in", "30m")
        case "cancel" | "skip" | "pause" | "resume" | "retry" | "fire":
            return await here.command(operation, here.id)
        case "app: cancel by session":
            return await app.cancel_session(here.session)
        case "app: skip":
            return int(await app.skip_next(here.session))
        case "app: move by id":
            return int(await app.reschedule(here.id, datetime.now(UTC) + HOUR / 2))
        case "app: mark fired":
            return int(await app.mark_fired(here.id))
        case "app: mark cancelled":
            return int(await app.mark_cancelled(here.id))
        case "app: delete the session":
            return await app.delete_session(here.session)
    raise ValueError(operation)


CELLS = [
    (operation, state, cell)
    for operation, cells in COMMANDS.items()
    for state, cell in cells.items()
]
CELLS += [
    (f"app: {operation}", state, cell)
    for operation, cells in STATEMENTS.items()
    for state, cell in cells.items()
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("operation", "state", "cell"),
    CELLS,
    ids=[f"{operation}-{state}" for operation, state, _ in CELLS],
)
async def test_an_operation_in_a_state(
    operation: str, state: str, cell: Cell, stage: Stage
) -> None:
    """The cell: what is answered, whether the open call is aborted, what the row becomes, and the
    keys it fires under from then on."""
    here = await scene(stage, state)
    was = await here.row()
    assert await answer(here, operation) == cell.answer
    if cell.row is None:
        # A renewal of all runs may come between the two looks.
        renewed = ("lease_until", "sent_at")
        now = await here.row()
        assert (was is None) is (now is None)
        assert was is None or now is None or was == now | {name: was[name] for name in renewed}
    if here.gate is not None:
        if cell.aborted:
            async with asyncio.timeout(20):
                await here.gate.hung_up.wait()
        else:
            held = await here.row()
            assert (
                was is not None
                and held is not None
                and held["lease"] == was["lease"]
                and held["status"] in ("pending", "running")
            )
            assert not here.gate.hung_up.is_set()
            here.gate.open()
    await here.quiet()
    assert here.keys() == ([] if cell.now is None else [cell.now])
    if cell.row is not None:
        assert await here.status() == cell.row
        await time_passes(here, [key for key in (cell.now, cell.then) if key is not None])


async def time_passes(here: Scene, keys: list[str]) -> None:
    """All that is planned comes due, what is paused is resumed: these are the keys of all calls
    then, and the session's newer recall fires."""
    stage = here.stage
    await stage.db.execute(TIME_PASSES.encode(), [here.session])
    await here.quiet()
    if await here.status() == "paused":
        assert here.keys() == [] and await here.command("resume", here.id) == 0
        await here.quiet()
    assert here.keys() == keys
    newer = None if here.newer is None else await here.row(here.newer)
    if newer is not None:
        assert here.newer is not None and newer["status"] in ("fired", "cancelled")
        assert here.keys(here.newer) == (["1"] if newer["status"] == "fired" else [])


@pytest.mark.asyncio(loop_scope="module")
async def test_all_calls_were_called_for(stage: Stage) -> None:
    """At the end of all the cells: every call left its mark, and no two runs under one key were
    answered."""
    here = Scene(stage, "", "")
    await here.until(
        "select 1 where not exists (select from session_recalls where lease is not null and "
        "leased_by <> 'elsewhere')"
    )
    marks = await here.rows(
        "select recall_id, occurrence, rekey, sum(calls)::int as calls from recall_attempts "
        "group by 1, 2, 3"
    )
    asked = {key: stage.endpoint.keys.count(key) for key in set(stage.endpoint.keys)}
    assert asked == {
        f"{mark['recall_id']}:{mark['occurrence']}"
        + (
            f".f{-mark['rekey']}"
            if mark["rekey"] < 0
            else f".{mark['rekey']}" * (mark["rekey"] > 0)
        ): mark["calls"]
        for mark in marks
    }
    assert not stage.daemon.told("worker.error") and not stage.daemon.told("recall.stranded")


SEQUENCES = [
    ("waiting, recurring", ["skip", "fire"], ["1.f1"]),
    ("waiting, recurring", ["skip", "skip", "fire"], ["1.f1"]),
    ("deferred, recurring", ["skip", "fire"], ["2"]),
    ("deferred, once", ["reschedule", "fire"], ["1.1"]),
    ("waiting, once", ["reschedule", "fire"], ["1"]),
    ("waiting, recurring", ["skip", "cancel", "retry"], ["2"]),
    ("deferred, recurring", ["skip", "cancel", "retry"], ["2"]),
    ("deferred, once", ["cancel", "retry"], ["1.1"]),
    ("deferred, once", ["reschedule", "cancel", "retry"], ["1.1"]),
    ("failed", ["retry"], ["1.1"]),
    ("paused", ["skip", "resume", "fire"], ["1.f1"]),
    ("in a run, recurring", ["cancel", "retry"], ["1.1"]),
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("state", "operations", "keys"),
    SEQUENCES,
    ids=[f"{state}-{' '.join(operations)}" for state, operations, _ in SEQUENCES],
)
async def test_operations_one_after_the_other(
    state: str, operations: list[str], keys: list[str], stage: Stage
) -> None:
    """A skip is never lost to what an operator does after it, and no key that was called stands for
    another occurrence."""
    here = await scene(stage, state)
    for operation in operations:
        async with asyncio.timeout(20):
            # A retry waits for the aborted call to be let go.
            while await answer(here, operation) != 0:
                assert operation == "retry"
    await here.quiet()
    assert here.keys() == keys


@pytest.mark.asyncio(loop_scope="module")
async def test_a_retry_of_an_accepted_run_posts_anew(stage: Stage) -> None:
    """What the API had accepted before the cancel is not followed any more: the retry is posted,
    under its own key."""
    here = await scene(stage, "cancelled")
    await stage.db.execute(
        "update session_recalls set run_reference = '/runs/7', delivered_at = now() where id = %s",
        [here.id],
    )
    assert await answer(here, "retry") == 0
    await here.quiet()
    assert here.keys() == ["1.1"] and await here.status() == "fired"


BY_PROCESS = [
    ("cancel", "waiting, once"),
    ("cancel", "fired"),
    ("skip --session", "in a run, recurring"),
    ("fire", "deferred, once"),
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("operation", "state"), BY_PROCESS)
async def test_the_same_by_a_process(operation: str, state: str, stage: Stage) -> None:
    """The real process answers as the table says."""
    here = await scene(stage, state)
    words = [*operation.split(), here.session if "--session" in operation else here.id]
    done = await asyncio.to_thread(process, stage.dsn, *words)
    assert done.returncode == COMMANDS[operation][state].answer, done.stderr
    if here.gate is not None:
        here.gate.open()
    await here.quiet()


# --- races ----------------------------------------------------------------------------------------

POLICY = Policy(busy_delay=3600, max_attempts=3, give_up=86_400)


@dataclass
class Actor:
    """Somebody with connections of their own: the application, an operator, and a worker's
    ledger."""

    app: Application
    db: Connection
    ledger: Ledger
    claims: list[Claim] = field(default_factory=list)
    """What this one holds."""

    async def operate(self, name: str, values: Mapping[str, Any]) -> str:
        """A statement of the command line; what it did."""
        statement = statements.load("client")[name]
        try:
            who = {"actor": "somebody", "via": "test"}
            rows = await (await self.db.execute(statement.encode(), {**values, **who})).fetchall()
        except Exception as error:
            return type(error).__name__
        return f"{name} {len(rows)}"

    async def claim(self) -> str:
        """Claim as a worker does, until there is nothing that could not be claimed."""
        async with asyncio.timeout(20):
            while True:
                claimed = await claim_due(self.ledger, 5, take_expired=False)
                moved = [
                    (claim, number)
                    for claim in claimed.claims
                    if (number := resolve_move(claim)) is not None
                ]
                placed = (
                    {claim.lease: claim for claim in await self.ledger.write_moves(moved)}
                    if moved
                    else {}
                )
                for claim in claimed.claims:
                    claim = placed.get(claim.lease, claim)
                    if claim.moved and not claim.extra:
                        await self.settle(claim, Unsent("moved"))
                    else:
                        self.claims.append(claim)
                if self.claims or not claimed.waiting:
                    return "claimed " + " ".join(
                        f"{c.occurrence}.{c.rekey} attempt {c.attempt}" for c in self.claims
                    )

    async def settle(self, claim: Claim, outcome: Outcome) -> str:
        """Settle as the settler does: judged again where the row was moved, asked again where it is
        locked."""
        called = None if isinstance(outcome, Unsent) else 0.0
        ending = Ending(claim, outcome, called, 0.001, time.monotonic())
        async with asyncio.timeout(20):
            while True:
                [settlement] = await self.ledger.settle(
                    [(ending, judge(ending, POLICY, lambda: 0.5))]
                )
                match settlement:
                    case Moved(now):
                        ending = as_it_stands(ending, now)
                    case Locked():
                        pass
                    case Settled() | Ended() | LeaseLost() | Stranded():
                        return type(settlement).__name__


Act = Callable[[Actor, str], Awaitable[str]]


def operation(name: str) -> Act:
    async def act(actor: Actor, session: str) -> str:
        values = {
            "ids": [f"{session}-r"],
            "session_id": session,
            "reason": "by hand",
            "at": None,
            "after": 1800.0,
        }
        return await actor.operate(name, values)

    return act


async def claim(actor: Actor, session: str) -> str:
    return await actor.claim()


def settle(outcome: Outcome) -> Act:
    async def act(actor: Actor, session: str) -> str:
        return await actor.settle(actor.claims.pop(), outcome)

    return act


async def cancel(actor: Actor, session: str) -> str:
    return f"cancelled {await actor.app.cancel_session(session)}"


async def skip(actor: Actor, session: str) -> str:
    return f"skipped {await actor.app.skip_next(session)}"


async def delete(actor: Actor, session: str) -> str:
    return f"deleted {await actor.app.delete_session(session)}"


async def schedule(actor: Actor, session: str) -> str:
    """The application asks for another recall, an hour off."""
    try:
        await actor.app.schedule(
            session, "once", datetime.now(UTC) + HOUR, "another", id=f"{session}-another"
        )
    except Exception as error:
        return type(error).__name__
    return "scheduled"


OPERATIONS = (
    "cancel",
    "cancel_session",
    "skip",
    "skip_pending",
    "pause",
    "resume",
    "fire",
    "reschedule",
)
RACES: list[tuple[str, str, Act, str, Act]] = [
    *(
        (start, name, operation(name), "claim", claim)
        for name in OPERATIONS
        for start in ("due", "due paused")
    ),
    *(
        ("held", name, operation(name), "settle answered", settle(Answered(200)))
        for name in OPERATIONS
    ),
    *(("held", name, operation(name), "settle busy", settle(Busy(409))) for name in OPERATIONS),
    *(("deferred", name, operation(name), "cancel", cancel) for name in OPERATIONS),
    *(("held", name, operation(name), "delete", delete) for name in OPERATIONS),
    *(
        ("deferred", name, operation(name), "skip", skip)
        for name in ("skip", "fire", "reschedule", "pause")
    ),
    ("deferred", "fire", operation("fire"), "claim", claim),
    ("held once", "reschedule", operation("reschedule"), "settle answered", settle(Answered(200))),
    ("held once", "schedule", schedule, "settle busy", settle(Busy(409))),
    ("held once", "schedule", schedule, "settle answered", settle(Answered(200))),
    ("due once", "schedule", schedule, "claim", claim),
    ("cancelled", "retry", operation("retry"), "schedule", schedule),
    ("cancelled", "retry", operation("retry"), "retry", operation("retry")),
    ("cancelled", "retry", operation("retry"), "delete", delete),
    ("cancelled held", "retry", operation("retry"), "settle answered", settle(Answered(200))),
    ("held", "cancel", operation("cancel"), "cancel", cancel),
]


@dataclass
class Arena:
    """Three actors on one database; one session at a time."""

    one: Actor
    other: Actor
    judge: Actor
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def begin(self, start: str, holder: Actor) -> str:
        """A session whose recall `<session>-r` is in its state to begin with; where it is held,
        `holder` holds it."""
        session = f"s{next(self.numbers)}"
        app = self.judge.app
        await app.create_session(session, "ann")
        once = "once" in start
        await app.schedule(
            session,
            "once" if once else "recurring",
            datetime.now(UTC) - timedelta(seconds=1),
            "now",
            None if once else 3600,
            id=f"{session}-r",
        )
        if start == "due paused":
            await self.judge.operate("pause", {"ids": [f"{session}-r"]})
        if start.split()[0] in ("held", "deferred", "cancelled"):
            await holder.claim()
        if start == "deferred":
            await holder.settle(holder.claims.pop(), Busy(409))
        if start.startswith("cancelled"):
            await app.cancel_session(session)
        if start == "cancelled":
            await holder.settle(holder.claims.pop(), Answered(200))
        return session

    async def end(self, session: str) -> tuple[Any, ...]:
        """What came of it: runs in hand end, all that is live is let loose and comes due; every
        row, and the keys that are claimed."""
        ended = []
        for actor in (self.one, self.other):
            while actor.claims:
                ended.append(await actor.settle(actor.claims.pop(), Answered(200)))
        db = self.judge.db
        query = "select * from session_recalls where session_id = %s order by id"
        rows = await (await db.execute(query, [session])).fetchall()
        states = [
            (
                row["id"].removeprefix(session),
                row["status"],
                row["occurrence"],
                row["attempt"],
                row["deferrals"],
                row["paused_at"] is None,
            )
            for row in rows
        ]
        await db.execute(
            "update session_recalls set paused_at = null where session_id = %s", [session]
        )
        keys = []
        for _ in [row for row in rows if row["status"] in ("pending", "running")]:
            await db.execute(TIME_PASSES.encode(), [session])
            await self.judge.claim()
            assert self.judge.claims, "a live row without a way to become due"
            claimed = self.judge.claims.pop()
            keys.append(claimed.key.removeprefix(session))
            await db.execute("delete from session_recalls where id = %s", [claimed.id])
        await self.judge.app.delete_session(session)
        return (ended, states, keys)


@pytest.fixture
async def arena(database: str) -> AsyncIterator[Arena]:
    actors = []
    for n in range(3):
        db = await postgres_connection(database)
        actors.append(Actor(await Application.connect(database), db, Ledger(database, f"w{n}", 60)))
    yield Arena(actors[0], actors[1], actors[2])
    for actor in actors:
        await actor.app.close()
        await actor.db.close()
        await actor.ledger.close()


async def postgres_connection(dsn: str) -> Connection:
    import psycopg
    from psycopg.rows import dict_row

    return await psycopg.AsyncConnection.connect(dsn, autocommit=True, row_factory=dict_row)


@pytest.mark.parametrize("rounds", [10, pytest.param(150, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("start", "act", "rival"),
    [(start, act, rival) for start, _, act, _, rival in RACES],
    ids=[f"{start}: {a} x {b}" for start, a, _, b, _ in RACES],
)
async def test_a_race_ends_as_some_order_does(
    start: str, act: Act, rival: Act, rounds: int, arena: Arena
) -> None:
    """Both at once come to what one after the other comes to, in one order or the other: the same
    answers, rows and next keys."""
    orders = []
    for first_is_act in (True, False):
        session = await arena.begin(start, arena.other)
        if first_is_act:
            answers = (await act(arena.one, session), await rival(arena.other, session))
        else:
            second = await rival(arena.other, session)
            answers = (await act(arena.one, session), second)
        orders.append((answers, await arena.end(session)))
    for _ in range(rounds):
        session = await arena.begin(start, arena.other)
        barrier = asyncio.Barrier(2)

        async def at_once(
            actor: Actor, act: Act, session: str = session, barrier: asyncio.Barrier = barrier
        ) -> str:
            await barrier.wait()
            await actor.db.execute("select pg_sleep(%s)", [random.random() * 0.002])
            return await act(actor, session)

        one, other = await asyncio.gather(at_once(arena.one, act), at_once(arena.other, rival))
        assert ((one, other), await arena.end(session)) in orders


WAITING_FOR_A_LOCK = (
    "select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
)


@pytest.mark.parametrize("by", ["the application's SQL", "Recalls"])
async def test_a_cancel_that_meets_the_next_insert(by: str, arena: Arena, database: str) -> None:
    """The one race that no order explains, documented as such: a cancel by session that waited for
    the insert of the session's next recall counts nothing, and the next one does. `Recalls` asks
    again by itself."""
    session = await arena.begin("held once", arena.other)
    async with connected(database) as conn:
        transaction = arena.one.app.connection.transaction()
        await transaction.start()
        assert await schedule(arena.one, session) == "scheduled"
        if by == "Recalls":
            cancelling = asyncio.ensure_future(Recalls().cancel(session, conn=conn))
        else:
            cancelling = asyncio.ensure_future(arena.other.app.cancel_session(session))
        async with asyncio.timeout(20):
            while not await (await arena.judge.db.execute(WAITING_FOR_A_LOCK)).fetchall():
                await arena.judge.db.execute("select pg_sleep(0.003)")
        await transaction.commit()
        assert await cancelling == (1 if by == "Recalls" else 0)
    assert await arena.other.app.cancel_session(session) == (0 if by == "Recalls" else 1)
    await arena.end(session)


@pytest.mark.full
async def test_occurrences_are_counted_exactly(arena: Arena) -> None:
    """Two workers run a recurring recall while two applications skip and an operator fires, pauses
    and resumes: each run and each skip consumes exactly one number, an extra run none, no number is
    run twice, and no two runs are in hand at once."""
    session = await arena.begin("due", arena.judge)
    id, skips, busy = f"{session}-r", [0, 0], [0]
    runs: list[int] = []
    in_hand: set[str] = set()
    done = asyncio.Event()

    async def works(actor: Actor) -> None:
        while len(runs) < 60:
            await actor.db.execute(TIME_PASSES.encode(), [session])
            await actor.claim()
            while actor.claims:
                held = actor.claims.pop()
                assert not in_hand
                in_hand.add(held.key)
                await actor.db.execute("select pg_sleep(%s)", [random.random() * 0.004])
                is_busy = random.random() < 0.3
                busy[0] += is_busy
                if not is_busy and not held.extra:
                    runs.append(held.occurrence)
                in_hand.clear()
                assert (
                    await actor.settle(held, Busy(409) if is_busy else Answered(200)) == "Settled"
                )

    async def skips_some(app: Application, n: int) -> None:
        while not done.is_set():
            await app.connection.execute("select pg_sleep($1)", random.random() * 0.02)
            skips[n] += await app.skip_next(session)

    async def meddles(actor: Actor) -> None:
        while not done.is_set():
            for name in ("fire", "pause", "resume", "fire"):
                await actor.db.execute("select pg_sleep(%s)", [random.random() * 0.005])
                assert await actor.operate(name, {"ids": [id]}) in (f"{name} 0", f"{name} 1")

    async with asyncio.TaskGroup() as tasks:
        workers = [tasks.create_task(works(actor)) for actor in (arena.one, arena.other)]
        apps = (arena.one.app, arena.other.app)
        others = [tasks.create_task(skips_some(app, n)) for n, app in enumerate(apps)]
        others.append(tasks.create_task(meddles(arena.judge)))
        await asyncio.wait(workers)
        done.set()
    await arena.judge.operate("resume", {"ids": [id]})
    last = None
    while last is None or last.extra:
        if last is not None:
            await arena.judge.settle(last, Answered(200))
        await arena.judge.db.execute(TIME_PASSES.encode(), [session])
        await arena.judge.claim()
        [last] = arena.judge.claims
        arena.judge.claims.clear()
    assert sum(skips) > 5 and busy[0] > 5, "there was something to count"
    assert len(set(runs)) == len(runs)
    assert last.occurrence == 1 + len(runs) + sum(skips)
