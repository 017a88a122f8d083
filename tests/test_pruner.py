"""The pruner against a real PostgreSQL: whose turn it is, what goes, and what neither locks, nor
stops, nor outages make of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from recall_worker import sweep as sweeping
from recall_worker.database.ledger import Ledger
from recall_worker.events import Events
from recall_worker.settings import KEPT, retention
from recall_worker.sweep import Batch
from recall_worker.worker import pruner as pruning
from recall_worker.worker.database_status import DatabaseStatus
from recall_worker.worker.pruner import Pruner

from .conftest import Connection, connected
from .process.test_lease import eventually, rows
from .support.pgbouncer import PgBouncer
from .test_cli import operate
from .test_ledger import put

DAY = 86_400.0


class Replica:
    """A pruner with a ledger of its own, as a worker has it."""

    def __init__(self, dsn: str, worker: str, keep: str) -> None:
        self.ledger = Ledger(dsn, worker, 60.0)
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.stopped = asyncio.Event()
        events = Events(worker=worker)
        events.listen(lambda event, facts: self.told.append((event, facts)))
        self.database = DatabaseStatus(events, 60.0)
        self.pruner = Pruner(self.ledger, retention(keep)[0], self.database, events, self.stopped)

    @property
    def pruned(self) -> list[dict[str, Any]]:
        return [facts for event, facts in self.told if event == "rows.pruned"]

    async def look(self) -> float:
        return await self.pruner._prune_if_due()


Replicas = Callable[..., Replica]


@pytest.fixture(params=["direct", "pooled"])
async def replicas(request: pytest.FixtureRequest, database: str) -> AsyncIterator[Replicas]:
    """Makes replicas; all that is shown holds through pgbouncer, too."""
    if request.param == "pooled":
        bouncer: PgBouncer = request.getfixturevalue("bouncer")
        database = bouncer.way_to(database)
    made: list[Replica] = []

    def make(keep: str = "30d") -> Replica:
        made.append(Replica(database, f"w{len(made)}", keep))
        return made[-1]

    yield make
    for replica in made:
        await replica.ledger.close()


async def over(db: Connection, id: str, status: str, days: float, **columns: Any) -> None:
    """A recall that has been in this status for so many days, with the mark of a call as old."""
    await put(db, id, -days * DAY, id=id, status=status, **columns)
    await db.execute(
        "update session_recalls set ended_at = now() - %s * interval '1 day', updated_at = now() "
        "- %s * interval '1 day' where id = %s",
        [days, days, id],
    )
    await db.execute(
        "insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome, "
        "session_id, worker, lease, scheduled_for, ended_at, settled) "
        "values (%s, 1, 0, 1, 'answered', %s, 'w', gen_random_uuid(), now(), now() - %s * "
        "interval '1 day', 'fired')",
        [id, id, days],
    )


async def left(db: Connection) -> tuple[set[str], set[str]]:
    """The ids of the recalls, and of the recalls of which there are marks."""
    recalls = {row["id"] for row in await rows(db, "select id from session_recalls")}
    return recalls, {
        row["recall_id"] for row in await rows(db, "select recall_id from recall_attempts")
    }


async def test_what_goes_and_what_stays(db: Connection, replicas: Replicas) -> None:
    """Each status goes by its own retention. What is live stays, with the marks of the occurrence
    that it is at; what has its call open stays."""
    for status in ("fired", "cancelled", "failed"):
        for days in (1, 8, 100):
            await over(db, f"{status}{days}", status, days)
    await over(db, "live", "pending", 100)
    await over(db, "outside", "running", 100)
    await over(db, "paused", "pending", 100, paused_at="2020-01-01")
    for id, status, until in (
        ("leased", "pending", 1),
        ("called", "cancelled", 1),
        ("died", "cancelled", -1),
    ):
        await over(db, id, status, 100)
        await db.execute(
            "update session_recalls set lease = gen_random_uuid(), lease_until = now() + %s * "
            "interval '1 day', leased_by = 'w' where id = %s",
            [until, id],
        )
    await over(db, "before", "pending", 100, occurrence=2)
    await db.execute(
        "insert into recall_actions (at, actor, via, action, recall_id) "
        "select now() - n * interval '1 day', 'ann', 'Recalls', 'pause', 'live' "
        "from unnest('{1, 60, 89, 91, 100}'::integer[]) n"
    )
    replica = replicas("fired=7d,failed=90d,calls=50d")
    wait = await replica.look()
    assert replica.pruned == [
        {
            "fired": 2,
            "cancelled": 0,
            "failed": 1,
            "calls": 6,
            "actions": 2,
            "failures": 0,
            "took_s": replica.pruned[0]["took_s"],
            "whole": True,
        }
    ]
    kept = "select extract(day from now() - at)::integer as days from recall_actions order by at"
    assert [row["days"] for row in await rows(db, kept)] == [89, 60, 1]
    recalls, marks = await left(db)
    assert {"fired8", "fired100", "failed100"} == (
        {f"{s}{d}" for s in KEPT[:3] for d in (1, 8, 100)} - recalls
    )
    assert {
        "live",
        "outside",
        "paused",
        "leased",
        "called",
        "died",
        "before",
        "cancelled100",
    } <= recalls
    assert {"live", "outside", "paused", "leased"} <= marks and not {
        "before",
        "called",
        "died",
        "fired100",
        "cancelled100",
    } & marks
    assert {"fired8", "failed8", "fired1"} <= marks
    # A twenty-fourth of the shortest; asked again sooner, as others may be configured otherwise.
    assert wait == pruning.ASK_AGAIN


async def test_one_replica_at_a_time_and_then_none(db: Connection, replicas: Replicas) -> None:
    """While one prunes the other is told to come back; when it is done both are; when it is time
    again the other may."""
    first, second = replicas("1d"), replicas("1d")
    assert await first.ledger.take_turn(3600) is None
    assert await first.ledger.take_turn(3600) is None
    other = await second.ledger.take_turn(3600)
    assert other is not None and 50 < other <= 60
    await first.ledger.end_turn(3600)
    for replica in (first, second):
        wait = await replica.ledger.take_turn(3600)
        assert wait is not None and 3500 < wait <= 3600
    await over(db, "old", "fired", 2)
    await second.look()
    assert second.pruned == [] and "old" in (await left(db))[0]
    await db.execute("update recall_chores set until = now()")
    await second.look()
    assert len(second.pruned) == 1 and "old" not in (await left(db))[0]
    await first.look()
    assert first.pruned == []


async def test_a_replica_that_fell_silent(db: Connection, replicas: Replicas) -> None:
    """Its turn lapses; should it come back, it finds the turn taken, and ends nobody else's."""
    first, second = replicas(), replicas()
    assert await first.ledger.take_turn(3600) is None
    await db.execute("update recall_chores set until = now() - interval '1 second'")
    assert await second.ledger.take_turn(3600) is None
    assert await first.ledger.take_turn(3600) is not None
    await first.ledger.end_turn(0)
    assert await first.ledger.take_turn(3600) is not None


async def test_shorter_retentions_need_not_wait_for_longer_ones(
    db: Connection, replicas: Replicas
) -> None:
    """A pause that was made for a month's retention does not hold a worker up that is to keep for
    an hour."""
    month, hour = replicas("30d"), replicas("1h")
    await month.look()
    assert len(month.pruned) == 1
    await hour.look()
    assert len(hour.pruned) == 1


async def test_two_at_once(db: Connection, replicas: Replicas) -> None:
    """Many replicas look in the same instant: one prunes."""
    for n in range(20):
        await over(db, f"r{n}", "fired", 40)
    crowd = [replicas() for _ in range(4)]
    await asyncio.gather(*(replica.look() for replica in crowd))
    assert [len(replica.pruned) for replica in crowd].count(1) == 1
    assert sum(facts["fired"] for replica in crowd for facts in replica.pruned) == 20


async def test_what_the_application_holds_is_left(
    db: Connection, database: str, replicas: Replicas
) -> None:
    """A transaction of the application's that stays open on rows that are over holds nothing up;
    the rows go the next time."""
    for n in range(10):
        await over(db, f"r{n}", "fired", 40)
    replica = replicas()
    async with connected(database) as holder, holder.transaction():
        await holder.execute("select from session_recalls where id = any ('{r3,r7}') for update")
        await replica.look()
        assert (await left(db))[0] == {"r3", "r7"}
    assert replica.pruned[0]["took_s"] < 5
    await db.execute("update recall_chores set until = now()")
    await replica.look()
    assert (await left(db))[0] == set()


async def test_a_table_that_is_locked(
    db: Connection, database: str, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDL holds the table: the pruner waits for a moment, lets go, and tries again. It does not
    call that a defect."""
    monkeypatch.setattr(pruning, "LOCKED_PAUSE", 0.01)
    await over(db, "r", "fired", 40)
    replica = replicas()
    refused = asyncio.Event()
    ask = replica.ledger.prune

    async def asked(batch: Batch) -> Any:
        try:
            return await ask(batch)
        except Exception:
            refused.set()
            raise

    monkeypatch.setattr(replica.ledger, "prune", asked)
    async with connected(database) as holder, holder.transaction():
        await holder.execute("lock table session_recalls in access exclusive mode")
        looking = asyncio.create_task(replica.look())
        await refused.wait()
    await looking
    assert [event for event, _ in replica.told] == ["rows.pruned"] and replica.pruned[0][
        "fired"
    ] == 1


async def test_a_stop_ends_a_walk(
    db: Connection, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that begins to drain ends with the batch that it is at, says how far it came, and
    leaves its turn to the others."""
    monkeypatch.setattr(sweeping, "ROWS", 1)
    monkeypatch.setattr(pruning, "START_WITHIN", 0.0)
    for n in range(10):
        await over(db, f"r{n}", "fired", 40)
    replica, other = replicas(), replicas()
    prune = replica.ledger.prune

    async def once(batch: Batch) -> Any:
        replica.stopped.set()
        return await prune(batch)

    monkeypatch.setattr(replica.ledger, "prune", once)
    await replica.pruner.run()
    assert [(facts["fired"], facts["whole"]) for facts in replica.pruned] == [(1, False)]
    assert len((await left(db))[0]) == 9
    await other.look()
    assert other.pruned[0]["whole"] and other.pruned[0]["fired"] == 9


async def test_not_while_postgresql_is_lost(db: Connection, replicas: Replicas) -> None:
    """What those who need PostgreSQL have found lost is not asked for more."""
    await over(db, "r", "fired", 40)
    replica = replicas()
    replica.database.lost("gone")
    await replica.look()
    assert replica.pruned == [] and await rows(db, "select from recall_chores") == []
    replica.database.found()
    await replica.look()
    assert replica.pruned[0]["fired"] == 1


async def test_a_connection_only_while_pruning(
    db: Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pruner's connection is gone when it is done: a replica has no more than it had."""
    monkeypatch.setattr(pruning, "START_WITHIN", 0.0)
    replica = Replica(database, "w0", "30d")
    running = asyncio.create_task(replica.pruner.run())
    await eventually(db, "select from recall_chores where rests")
    its = (
        "select from pg_stat_activity where datname = current_database() and application_name = "
        "'recall-worker ledger w0'"
    )
    await eventually(db, f"select 1 where not exists ({its})")
    replica.stopped.set()
    await running
    assert len(replica.pruned) == 1


@pytest.mark.slow
async def test_what_another_table_refers_to_stays_and_all_else_goes(
    db: Connection, database: str, replicas: Replicas
) -> None:
    """By the pruner and by the command, which says which table it is; and where a trigger of the
    application's lets no delete pass, the command says that."""
    for number in range(12):
        await over(db, f"r{number}", "fired", 40)
    await db.execute("create table receipts (recall text references session_recalls (id))")
    await db.execute("insert into receipts values ('r3'), ('r7')")
    replica = replicas()
    await replica.look()
    assert {r["id"] for r in await rows(db, "select id from session_recalls")} == {"r3", "r7"}
    assert [told["fired"] for told in replica.pruned] == [10]
    await over(db, "r12", "fired", 40)
    said = operate(database, "prune", "--older-than", "30d", "--yes")
    assert said.status == 0 and "2 recalls stay: the table receipts refers to them" in said.err
    assert "Deleted 1 recalls" in said.err
    await db.execute("truncate receipts")
    await db.execute(
        "create function keep() returns trigger language plpgsql as 'begin return null; end'"
    )
    await db.execute(
        "create trigger keep before delete on session_recalls for each row execute function keep()"
    )
    said = operate(database, "prune", "--older-than", "30d", "--yes")
    assert said.status == 0 and "2 recalls stay: a trigger of session_recalls" in said.err
