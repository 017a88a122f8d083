"""`events`: calls and actions as one stream; followed, none is missed and none is shown twice."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, Self

import pytest

from recall_worker.cli.events import FAR, FAR_EVERY, NEAR, Stream

from .conftest import Connection, connected
from .support.pgbouncer import PgBouncer
from .test_cli import operate
from .test_ledger import put

TALK = b"Following what happens; Ctrl-C ends it.\n"
NOW = datetime(2030, 1, 1, tzinfo=UTC)
ACTED = """
insert into recall_actions (at, actor, via, action, recall_id)
values (now() - %s * interval '1 second', 'ann', 'sql', 'pause', %s)
"""
CALLED = """
insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome, session_id, worker,
    lease, calls, scheduled_for, called_at, last_called_at, ended_at, settled)
values (%(id)s, 1, 0, 1, 'busy', 's', 'w', gen_random_uuid(), 1, now(), now(), now(),
    now() - %(ago)s * interval '1 second', 'pending')
on conflict (recall_id, occurrence, rekey, attempt, outcome) do update
    set calls = recall_attempts.calls + 1, ended_at = excluded.ended_at
"""


class Follower:
    """`recall-worker events --follow --json` as a process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.seen: list[dict[str, Any]] = []

    @classmethod
    async def start(cls, dsn: str, *words: str) -> Self:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RECALL_")}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "recall_worker", "events", "--follow", "--json", *words),
            env=kept | {"RECALL_DSN": dsn},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        return cls(process)

    async def until(self, *ids: str, within: float = 60.0) -> list[str]:
        """Read on until all these recalls were seen; returns the recalls of all entries so far."""
        assert self.process.stdout is not None
        async with asyncio.timeout(within):
            while not set(ids) <= {entry["recall_id"] for entry in self.seen}:
                line = await self.process.stdout.readline()
                assert line, (await self.process.stderr.read()) if self.process.stderr else b""
                self.seen.append(json.loads(line))
        return [entry["recall_id"] for entry in self.seen]

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


@pytest.fixture
async def follower(database: str, db: Connection) -> AsyncIterator[Follower]:
    """One that has shown what was there, the action of `first`."""
    await db.execute(ACTED, (0, "first"))
    started = await Follower.start(database)
    await started.until("first")
    yield started
    await started.end()


@pytest.mark.slow
async def test_what_is_past(database: str, db: Connection) -> None:
    """In the order of time; of the last hour, or since then; the last ones; of one recall."""
    for ago, id in ((30, "a"), (10, "b"), (7200, "old")):
        await db.execute(ACTED, (ago, id))
        await db.execute(CALLED, {"id": id, "ago": ago + 5})

    async def found(*words: str) -> list[tuple[str, str]]:
        said = await asyncio.to_thread(operate, database, "events", *words, "--json")
        return [(entry["recall_id"], entry["kind"]) for entry in said.document]

    of_a = [("a", "call"), ("a", "action")]
    of_b = [("b", "call"), ("b", "action")]
    of_old = [("old", "call"), ("old", "action")]
    assert await found() == of_a + of_b
    assert await found("--since", "3h") == of_old + of_a + of_b
    assert await found("--since", "20s") == of_b
    assert await found("--limit", "1") == of_b[1:]
    assert await found("--limit", "0") == []
    assert await found("a") == of_a
    assert await found("old") == of_old
    assert await found("old", "--since", "1h") == []
    said = await asyncio.to_thread(operate, database, "events", "--limit", "1")
    assert said.err == "The latest 1 of 4: --limit 4 shows all.\n"
    assert "b: paused by ann (sql)" in said.out
    said = await asyncio.to_thread(operate, database, "events", "nobody")
    assert said.status == 1 and "there is no recall nobody" in said.err
    said = await asyncio.to_thread(operate, database, "events", "old", "--since", "1h")
    assert (said.out, said.err) == ("", "Nothing is on record.\n")


@pytest.mark.slow
async def test_what_happens_is_shown_once(follower: Follower, db: Connection) -> None:
    """Calls and actions as they are recorded, with equal times, too; a call that is repeated is
    another entry, a look that finds it again is not."""
    async with db.transaction():
        for id in ("a", "b", "c"):
            await db.execute(ACTED, (0, id))
            await db.execute(CALLED, {"id": id, "ago": 0})
    await follower.until("a", "b", "c")
    await db.execute(CALLED, {"id": "a", "ago": 0})
    await db.execute(ACTED, (0, "last"))
    seen = await follower.until("last")
    assert sorted(seen) == ["a", "a", "a", "b", "b", "c", "c", "first", "last"]


@pytest.mark.slow
async def test_what_is_committed_late_is_not_missed(
    follower: Follower, database: str, db: Connection
) -> None:
    """A transaction that began earlier, and draws its ids earlier, commits after others were
    shown: its entries come then, once."""
    async with connected(database) as late, connected(database) as later:
        async with late.transaction():
            await late.execute(ACTED, (0, "late"))
            await late.execute(CALLED, {"id": "late", "ago": 1})
            async with later.transaction():
                await later.execute(ACTED, (0, "later"))
                await db.execute(ACTED, (0, "between"))
                await follower.until("between")
            await follower.until("later")
        await follower.until("late")
    await db.execute(ACTED, (0, "last"))
    seen = await follower.until("last")
    assert sorted(seen) == ["between", "first", "last", "late", "late", "later"]


@pytest.mark.slow
async def test_of_one_recall(database: str, db: Connection) -> None:
    """Followed by its id, nothing of others is shown; what was past is, and not again."""
    await db.execute(ACTED, (600, "r"))
    await db.execute(ACTED, (0, "other"))
    follower = await Follower.start(database, "r")
    try:
        await follower.until("r")
        await db.execute(ACTED, (0, "other"))
        await db.execute(CALLED, {"id": "r", "ago": 0})
        await db.execute(ACTED, (0, "r"))
        async with asyncio.timeout(60):
            while len(follower.seen) < 3:
                assert follower.process.stdout is not None
                follower.seen.append(json.loads(await follower.process.stdout.readline()))
        assert {entry["recall_id"] for entry in follower.seen} == {"r"}
    finally:
        await follower.end()


@pytest.mark.slow
async def test_behind_a_pooler(database: str, db: Connection, bouncer: PgBouncer) -> None:
    """Where no notifications arrive, it looks by itself."""
    await db.execute(ACTED, (0, "first"))
    follower = await Follower.start(bouncer.way_to(database))
    try:
        await follower.until("first")
        await db.execute(ACTED, (0, "next"))
        await follower.until("next")
    finally:
        await follower.end()


@pytest.mark.slow
async def test_a_reader_that_goes_away(follower: Follower) -> None:
    """It ends without a word, although there is nothing to write."""
    assert follower.process.stdout is not None and follower.process.stderr is not None
    follower.process.stdout._transport.close()  # type: ignore[attr-defined]
    async with asyncio.timeout(30):
        assert await follower.process.wait() == 1
        assert await follower.process.stderr.read() == TALK


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_ctrl_c(follower: Follower, number: signal.Signals) -> None:
    """It ends without a word, and well."""
    assert follower.process.stderr is not None
    follower.process.send_signal(number)
    async with asyncio.timeout(30):
        assert await follower.process.wait() == 0
        assert await follower.process.stderr.read() == TALK


@pytest.mark.slow
async def test_connections_that_are_lost(follower: Follower, database: str, db: Connection) -> None:
    """It says so, connects again, and misses nothing of what was recorded meanwhile."""
    await db.execute(ACTED, (0, "before"))
    await db.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity "
        "where datname = current_database() and pid <> pg_backend_pid()"
    )
    await db.execute(ACTED, (0, "meanwhile"))
    await follower.until("before", "meanwhile")
    await db.execute(ACTED, (0, "after"))
    seen = await follower.until("after")
    assert sorted(seen) == ["after", "before", "first", "meanwhile"]
    await follower.end()
    assert follower.process.stderr is not None
    talk = (await follower.process.stderr.read()).decode()
    assert "\nNote: PostgreSQL is lost" in talk and "PostgreSQL is back" in talk


@pytest.mark.slow
async def test_notifications_wake_it(follower: Follower, db: Connection) -> None:
    """A recall's insert notifies; what is recorded with it is shown soon."""
    await put(db, "s", 0.0, id="r")
    await db.execute(ACTED, (0, "r"))
    await follower.until("r")


# --- the stream, as it is -------------------------------------------------------------------------


class Table:
    """recall_actions as snapshots see it: ids are drawn in order, and committed in any."""

    def __init__(self) -> None:
        self.drawn = 0
        self.open: dict[int, list[int]] = {}
        """Transactions that have not ended, with the ids that they drew."""
        self.transactions = 0
        self.committed: set[int] = set()

    def begin(self) -> int:
        self.transactions += 1
        self.open[self.transactions] = []
        return self.transactions

    def draw(self, transaction: int) -> None:
        self.drawn += 1
        self.open[transaction].append(self.drawn)

    def end(self, transaction: int, *, commits: bool) -> None:
        ids = self.open.pop(transaction)
        if commits:
            self.committed |= set(ids)

    def look(self, after: int | None) -> list[dict[str, Any]]:
        """What the statement `events` returns."""
        last = max(self.committed, default=0)
        first = {
            "kind": None,
            "at": NOW,
            "last_action": last,
            "decided": last - 1000,
            "oldest": min(self.open, default=self.transactions + 1),
            "next": self.transactions + 1,
        }
        return [
            first,
            *(
                {"kind": "action", "at": NOW, "id": str(id), "recall_id": "r"}
                for id in sorted(self.committed)
                if after is None or id > after
            ),
        ]


@pytest.mark.parametrize("seed", range(200))
def test_no_action_is_missed_or_doubled(seed: int) -> None:
    """However transactions begin, draw ids, and end between the looks, each id that is committed is
    new exactly once; and what is decided is not kept in mind."""
    dice = random.Random(seed)
    table, stream, shown = Table(), Stream(), []
    for _ in range(300):
        match dice.choice(["begin", "draw", "draw", "end", "look"]):
            case "begin" if len(table.open) < 5:
                table.begin()
            case "draw" if table.open:
                table.draw(dice.choice(list(table.open)))
            case "end" if table.open:
                table.end(dice.choice(list(table.open)), commits=dice.random() < 0.8)
            case "look":
                shown += [int(row["id"]) for row in stream.new(table.look(stream.after))]
            case _:
                pass
    for transaction in list(table.open):
        table.end(transaction, commits=True)
    for _ in range(4):
        shown += [int(row["id"]) for row in stream.new(table.look(stream.after))]
    assert len(shown) == len(set(shown)) and set(shown) == table.committed
    if table.committed:
        assert stream.after == max(table.committed)
        assert not stream._actions


def test_how_far_a_look_goes_back() -> None:
    """Near, as a rule; far once a minute, and after PostgreSQL was lost."""
    stream = Stream()
    stream.new(Table().look(None))
    gone = []
    for _ in range(FAR_EVERY):
        gone.append(NOW - stream.since(NOW))
        stream.new(Table().look(stream.after))
    assert gone == [NEAR] * (FAR_EVERY - 1) + [FAR]
    stream.reconnected()
    assert stream.since(NOW + timedelta(days=1)) == NOW - FAR


def test_a_call_is_known_by_its_end() -> None:
    """Found again it is not new; repeated, or ended otherwise, it is."""
    stream = Stream()
    call = {
        "kind": "call",
        "id": None,
        "at": NOW,
        "recall_id": "r",
        "occurrence": 1,
        "rekey": 0,
        "attempt": 1,
        "outcome": "busy",
        "calls": 1,
    }
    [first] = Table().look(None)
    assert stream.new([first, call]) == [call]
    assert stream.new([first, call]) == []
    again = {**call, "calls": 2, "at": NOW + timedelta(seconds=1)}
    assert stream.new([first, again]) == [again]
    far = {**first, "at": NOW + 3 * FAR}
    assert stream.new([far]) == [] and stream._calls == {}


@pytest.mark.slow
async def test_it_asks_once_a_second_at_most(database: str, db: Connection) -> None:
    """While notifications arrive all the time, too."""
    await db.execute(ACTED, (0, "first"))
    follower = await Follower.start(database)
    try:
        await follower.until("first")
        began = asyncio.get_running_loop().time()
        looks = set()
        while asyncio.get_running_loop().time() < began + 4:
            await db.execute("select pg_notify('session_recalls', '')")
            cursor = await db.execute(
                "select query_start from pg_stat_activity where application_name = "
                "'recall-worker cli' and query like '%last_action%'"
            )
            looks |= {row["query_start"] for row in await cursor.fetchall()}
        # PostgreSQL notes a start for each message of one look, milliseconds apart.
        starts = [
            b
            for a, b in itertools.pairwise([datetime.min.replace(tzinfo=UTC), *sorted(looks)])
            if b - a > timedelta(seconds=0.2)
        ]
        assert 2 <= len(starts) <= 6
        # On a busy machine one may arrive late, and the next one on time.
        assert all(b - a > timedelta(seconds=0.5) for a, b in itertools.pairwise(starts))
    finally:
        await follower.end()
