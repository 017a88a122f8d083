"""The ledger against a real PostgreSQL: who may claim what, whose settle counts, and what a crowd
at one table does.

A ledger (and so a connection) for each worker, the application on its own asyncpg connection, a
third one for looking.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any
from uuid import uuid4

import asyncpg
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from recall_worker import cadence
from recall_worker.database.ledger import PASSED_MOST, Ledger
from recall_worker.database.values import Dates
from recall_worker.judge import before_call, resolve_move
from recall_worker.recall import (
    Accepted,
    After,
    Answered,
    AsMoved,
    Busy,
    Claim,
    Defer,
    Ended,
    Ending,
    Failed,
    Finish,
    LeaseLost,
    Locked,
    Malformed,
    Moved,
    Next,
    Outcome,
    Placement,
    Release,
    Retry,
    Settled,
    Unavailable,
    Unknown,
    Unsent,
    Verdict,
)

from .conftest import Connection, connected
from .support.application import AlreadyScheduled, Application
from .support.claiming import claim_due
from .support.pgbouncer import PgBouncer

LEASE = 3.0
FIRED = Finish("fired", None)
Ledgers = Callable[..., Ledger]
Put = Callable[..., Any]


def as_moved(occurrence: int) -> Placement:
    """What a row stands for that the application put at a time of its own."""
    return Placement(occurrence, AsMoved(), 0)


@pytest.fixture(params=["direct", "pooled"])
async def ledgers(request: pytest.FixtureRequest, database: str) -> AsyncIterator[Ledgers]:
    """Makes ledgers, each with connections and a worker's name of its own; all that is shown holds
    through pgbouncer, too."""
    if request.param == "pooled":
        bouncer: PgBouncer = request.getfixturevalue("bouncer")
        database = bouncer.way_to(database)
    made: list[Ledger] = []
    names = count(1)

    def make(worker: str | None = None, lease: float = LEASE) -> Ledger:
        made.append(Ledger(database, worker or f"w{next(names)}", lease))
        return made[-1]

    yield make
    for ledger in made:
        await ledger.close()


@pytest.fixture
async def settled_in(db: Connection) -> None:
    """Waits until PostgreSQL has been up for a third of a lease, as nobody takes an expired lease
    before."""
    while not (
        await one(
            db,
            "select pg_postmaster_start_time() < now() - %s * interval '1 second' as up",
            LEASE / 3,
        )
    )["up"]:
        await db.execute("select pg_sleep(0.05)")


async def put(db: Connection, session: str, due: str | float = -1.0, **columns: Any) -> str:
    """Insert a recall as old rows or the application may have put it; `due` in seconds from now, or
    a date. Returns its id."""
    id = str(columns.pop("id", f"r-{uuid4()}"))
    row = {"call_type": "once", "interval_seconds": None, "status": "pending"} | columns
    at = "now() + %s * interval '1 second'" if isinstance(due, float) else "%s::timestamptz"
    await db.execute("insert into sessions values (%s, 'ann') on conflict do nothing", (session,))
    names = "".join(f", {name}" for name in row)
    await db.execute(
        "insert into session_recalls (id, session_id, trigger_at, additional_context_message, "
        "created_at, updated_at"
        f"{names}) values (%s, %s, {at}, 'look again', now(), now(){', %s' * len(row)})".encode(),
        (id, session, due, *row.values()),
    )
    return id


async def one(db: Connection, query: str, *values: Any) -> dict[str, Any]:
    row = await (await db.execute(query.encode(), values)).fetchone()
    assert row is not None
    return row


async def recall(db: Connection, id: str) -> dict[str, Any]:
    """The row, and `due_in`: seconds until `trigger_at`. Dates that Python does not have are the
    nearest that it has."""
    db.adapters.register_loader("timestamptz", Dates)
    clamped = "least(greatest(trigger_at, '0001-01-02'::timestamptz), '9998-01-01'::timestamptz)"
    return await one(
        db,
        f"select *, extract(epoch from {clamped} - now())::float8 as due_in from session_recalls "
        f"where id = %s",
        id,
    )


async def marks(db: Connection, id: str) -> list[tuple[Any, ...]]:
    """The recall's calls as they are on record: attempt, outcome, calls, settled."""
    rows = await db.execute(
        "select attempt, outcome, calls, settled from recall_attempts where recall_id = %s order "
        "by attempt, outcome",
        (id,),
    )
    return [tuple(row.values()) for row in await rows.fetchall()]


async def expire(db: Connection, id: str) -> None:
    """Have the recall's lease end now."""
    await db.execute(
        "update session_recalls set lease_until = now() - interval '1 ms' where id = %s", (id,)
    )


async def free_slot(app: Application, session: str) -> None:
    """The session's leased one-shot is moved out of its slot, and the slot is free again."""
    await app.schedule(session, "once", FAR, "came and went")
    assert await app.cancel_session(session) == 1


FAR = datetime(2900, 1, 1, tzinfo=UTC)


async def claim(ledger: Ledger, slots: int = 10, *, take_expired: bool = True) -> list[Claim]:
    return (await claim_due(ledger, slots, take_expired=take_expired)).claims


async def claim_one(ledger: Ledger) -> Claim:
    (found,) = await claim(ledger)
    return found


def ending(claim: Claim, outcome: Outcome | None = None) -> Ending:
    """The call of this claim began and ended just now."""
    outcome = outcome or Answered(200)
    return Ending(
        claim,
        outcome,
        None if isinstance(outcome, Unsent | Malformed) else 0.01,
        0.02,
        time.monotonic(),
    )


async def settle(
    ledger: Ledger, claim: Claim, verdict: Verdict = FIRED, outcome: Outcome | None = None
) -> Any:
    (answer,) = await ledger.settle([(ending(claim, outcome), verdict)])
    return answer


# --- claiming -------------------------------------------------------------------------------------


async def test_the_oldest_due_come_first_and_never_more_than_the_slots(
    db: Connection, ledgers: Ledgers
) -> None:
    """Of five due recalls two are claimed, those that are due longest; the rest follows when asked
    for again."""
    ids = {age: await put(db, f"s{age}", -float(age)) for age in (3, 1, 5, 2, 4)}
    ledger = ledgers()
    first = await ledger.claim(2)
    assert [c.id for c in first.claims] == [ids[5], ids[4]]
    rest = await claim_due(ledger, 4)
    assert [c.id for c in rest.claims] == [ids[3], ids[2], ids[1]]
    assert not rest.waiting


async def test_what_fell_due_after_the_claim_is_told_apart(
    db: Connection, app: Application, ledgers: Ledgers
) -> None:
    """A claim and the question what is next see the table at two instants: what fell due in between
    is to be claimed at once, not at leisure."""
    ledger = ledgers()
    for n in range(25):
        await put(db, f"s{n}", -60.0 - n)
    async with db.transaction():
        await db.execute("select from session_recalls for update")
        claimed = await ledger.claim(3)
        ahead = await ledger.next_due(claimed_at=claimed.asked_at)
        assert (claimed.claims, ahead.waiting, ahead.fresh) == ([], True, False)
        await app.create_session("t", "ann")
        id = await app.schedule("t", "once", datetime.now(UTC) - timedelta(milliseconds=1), "late")
        ahead = await ledger.next_due(claimed_at=claimed.asked_at)
        assert (ahead.waiting, ahead.fresh) == (True, True)
        claimed = await ledger.claim(3)
        assert [claim.id for claim in claimed.claims] == [id]


async def test_whoever_comes_by_sees_whether_there_is_anything(
    db: Connection, ledgers: Ledgers
) -> None:
    ledger = ledgers()
    ahead = await ledger.next_due(claimed_at=None)
    assert (ahead.waiting, ahead.fresh, ahead.next_in) == (False, False, None)
    await put(db, "later", 60.0)
    ahead = await ledger.next_due(claimed_at=None)
    assert (ahead.waiting, ahead.fresh) == (False, False) and ahead.next_in == pytest.approx(
        60.0, abs=5.0
    )
    await put(db, "s", -60.0)
    ahead = await ledger.next_due(claimed_at=None)
    assert (ahead.waiting, ahead.fresh) == (True, True) and ahead.next_in == pytest.approx(
        60.0, abs=5.0
    )


@pytest.mark.parametrize(
    ("due", "status", "wanted"),
    [
        ([], "pending", None),
        ([30.0, 10.0, 20.0], "pending", 10.0),
        ([10.0, 7.0], "running", 7.0),
        ([10.0], "cancelled", None),
        (["infinity"], "pending", 86_400.0),
        (["20000-01-01"], "pending", 86_400.0),
    ],
    ids=["nothing", "the nearest", "out of its slot", "over", "never", "far"],
)
async def test_next_in_tells_when_to_come_back(
    due: list[float | str], status: str, wanted: float | None, db: Connection, ledgers: Ledgers
) -> None:
    """The answer to a claim that finds nothing due says in how many seconds the nearest live recall
    is, a day at the most."""
    for n, at in enumerate(due):
        await put(db, f"s{n}", at, status=status)
    answer = await claim_due(ledgers(), 3)
    assert (answer.claims, answer.waiting) == ([], False)
    assert answer.next_in == (None if wanted is None else pytest.approx(wanted, abs=5.0))


async def test_a_leased_recall_is_due_when_its_lease_ends(db: Connection, ledgers: Ledgers) -> None:
    """While a recall is leased, the next time to wake is the end of that lease, though its trigger
    has long passed."""
    await put(db, "s", -100.0)
    ledger = ledgers(lease=60.0)
    assert len(await claim(ledger)) == 1
    answer = await claim_due(ledger, 3)
    assert (answer.claims, answer.waiting) == ([], False)
    assert answer.next_in == pytest.approx(60.0, abs=5.0)


async def test_what_the_application_has_locked_is_waited_for(
    db: Connection, app: Application, ledgers: Ledgers
) -> None:
    """A due row in an open transaction is passed over, others are claimed, and the answer says that
    something waits."""
    locked, free = await put(db, "locked", -9.0), await put(db, "free", -1.0)
    ledger = ledgers()
    async with app.connection.transaction():
        await app.reschedule(locked, datetime.now(UTC))
        answer = await claim_due(ledger, 3)
        assert [c.id for c in answer.claims] == [free] and answer.waiting
    assert [c.id for c in await claim(ledger)] == [locked]


async def test_a_paused_recall_is_not_due(db: Connection, ledgers: Ledgers) -> None:
    """What an operator holds back is neither claimed nor waited for, and does not stand in its
    session's way."""
    held = await put(db, "s", -9.0, status="running", paused_at=datetime.now(UTC))
    free = await put(db, "s", -1.0)
    ledger = ledgers()
    answer = await claim_due(ledger, 3)
    assert [c.id for c in answer.claims] == [free]
    assert isinstance(await settle(ledger, answer.claims[0]), Settled)
    answer = await claim_due(ledger, 3)
    assert (answer.claims, answer.next_in, answer.waiting) == ([], None, False)
    assert (await recall(db, held))["lease"] is None


async def test_one_run_a_session(db: Connection, ledgers: Ledgers) -> None:
    """Of two due recalls of one session the older is claimed; the other waits until that is
    settled, and follows at once."""
    older = await put(db, "s", -9.0, status="running")
    newer = await put(db, "s", -1.0)
    ledger = ledgers()
    answer = await claim_due(ledger, 3)
    assert [c.id for c in answer.claims] == [older] and answer.waiting
    again = await claim_due(ledger, 3)
    assert again.claims == [] and again.waiting
    await settle(ledger, answer.claims[0])
    assert [c.id for c in await claim(ledger)] == [newer]


async def test_a_cancelled_run_keeps_its_session_until_it_has_let_go(
    db: Connection, app: Application, ledgers: Ledgers
) -> None:
    """After a cancel in mid-run the session takes a new recall at once, which is called when the
    old call is known to be broken off."""
    await put(db, "s")
    ledger = ledgers()
    running = await claim_one(ledger)
    assert await app.cancel_session("s") == 1
    newer = await app.schedule("s", "immediate", datetime.now(UTC), "instead")
    other = await claim_due(ledgers(), 3)
    assert other.claims == [] and other.waiting
    assert await settle(ledger, running, Release("cancelled"), Unknown("broken off")) == Ended(
        "cancelled"
    )
    assert [c.id for c in await claim(ledger)] == [newer]


async def test_a_cancelled_run_of_a_dead_worker_keeps_its_session_for_a_lease(
    db: Connection, app: Application, ledgers: Ledgers
) -> None:
    """Where nobody is left to let go, the session is free when the cancelled recall's lease has
    ended."""
    id = await put(db, "s")
    await claim_one(ledgers())
    await app.cancel_session("s")
    newer = await app.schedule("s", "immediate", datetime.now(UTC), "instead")
    assert await claim(ledgers()) == []
    await expire(db, id)
    assert [c.id for c in await claim(ledgers())] == [newer]


async def leased_twice(db: Connection) -> list[dict[str, Any]]:
    rows = await db.execute(
        "select session_id from session_recalls where lease is not null and status in "
        "('pending', 'running') group by 1 having count(*) > 1"
    )
    return await rows.fetchall()


@pytest.mark.slow
@pytest.mark.parametrize(("racers", "rounds"), [(2, 60), (8, 40)], ids=["two", "eight"])
async def test_racing_claimers_share_no_row_and_no_session(
    racers: int, rounds: int, db: Connection, ledgers: Ledgers
) -> None:
    """Claimers on connections of their own at sessions with two due recalls each: every recall is
    run once, in a session one at a time."""
    ours = [ledgers() for _ in range(racers)]
    for turn in range(rounds):
        ids = set()
        for n in range(6):
            ids.add(await put(db, f"s{n}", -2.0, status="running", id=f"{turn}-{n}-a"))
            ids.add(await put(db, f"s{n}", -1.0, id=f"{turn}-{n}-b"))
        runs: list[str] = []
        async with asyncio.timeout(20):
            while len(runs) < len(ids):
                answers = await asyncio.gather(*(ledger.claim(3) for ledger in ours))
                taken = [c for answer in answers for c in answer.claims]
                assert len({c.session_id for c in taken}) == len(taken)
                assert await leased_twice(db) == []
                assert all(len(answer.claims) <= 3 for answer in answers)
                runs += [c.id for c in taken]
                settled = await asyncio.gather(
                    *(
                        ledger.settle([(ending(c), FIRED) for c in answer.claims])
                        for ledger, answer in zip(ours, answers, strict=True)
                        if answer.claims
                    )
                )
                assert all(isinstance(s, Settled) for batch in settled for s in batch)
        assert sorted(runs) == sorted(ids)
        for n in range(6):
            assert runs.index(f"{turn}-{n}-a") < runs.index(f"{turn}-{n}-b")


async def test_a_locked_row_is_not_waited_for_before_it_is_sent(
    db: Connection, database: str, ledgers: Ledgers
) -> None:
    """Renewals use the same connection: a row that the application holds locked is given back."""
    id = await put(db, "s")
    ledger = ledgers()
    claim = await claim_one(ledger)
    async with connected(database) as other, other.transaction():
        await other.execute("select from session_recalls where id = %s for update", (id,))
        assert await ledger.sent(claim) is False
    assert await ledger.sent(claim) is True
    assert (await recall(db, id))["sent_at"] is not None


async def test_a_lost_race_for_a_session_is_an_empty_claim(
    db: Connection, database: str, ledgers: Ledgers
) -> None:
    """A session that gets a run between a claim's look and its write: the index on one run a
    session says so, and nothing is claimed."""
    id = await put(db, "s")
    async with connected(database) as other:
        await other.execute("begin")
        await put(other, "s", -5.0, status="running", lease=uuid4(), lease_until=FAR)
        claiming = asyncio.create_task(claim_due(ledgers("loser"), 3))
        await blocked(db, "recall-worker ledger loser")
        await other.execute("commit")
        answer = await claiming
    assert (answer.claims, answer.waiting) == ([], True)
    assert (await recall(db, id))["lease"] is None


async def blocked(db: Connection, name: str) -> None:
    """Wait until a connection of this name waits for a lock."""
    waiting = (
        "select exists (select from pg_stat_activity where application_name = %s and "
        "wait_event_type = 'Lock') as waits"
    )
    async with asyncio.timeout(20):
        while not (await one(db, waiting, name))["waits"]:
            pass


# --- the fence ------------------------------------------------------------------------------------


async def test_a_stale_lease_settles_nothing(
    db: Connection, ledgers: Ledgers, settled_in: None
) -> None:
    """Whoever was thought dead can't overwrite its successor: its settle, renewal and placing
    change nothing, and its call is on record."""
    id = await put(db, "s")
    dead, alive = ledgers("dead"), ledgers("alive")
    old = await claim_one(dead)
    await expire(db, id)
    new = await claim_one(alive)
    before = await recall(db, id)

    assert await settle(dead, old) == LeaseLost()
    assert await dead.renew({id: old.lease}) == {id: "lost"}
    assert await dead.check_leases({id: old.lease}) == {id: "lost"}
    assert await dead.write_moves([(old, as_moved(7))]) == []

    assert await recall(db, id) == before | {"due_in": pytest.approx(before["due_in"], abs=20)}
    assert await marks(db, id) == [(1, "answered", 1, "lost"), (1, "unknown", 1, "taken")]
    assert await settle(alive, new) == Settled("fired")
    assert await marks(db, id) == [
        (1, "answered", 1, "lost"),
        (1, "unknown", 1, "taken"),
        (2, "answered", 1, "fired"),
    ]


async def test_a_run_is_taken_up_when_its_lease_ends(
    db: Connection, ledgers: Ledgers, settled_in: None
) -> None:
    """The next worker gets the same key and the next attempt, and leaves the dead worker's mark; a
    late word of that one adds no call."""
    id = await put(db, "s")
    dead, alive = ledgers("dead"), ledgers("alive")
    old = await claim_one(dead)
    await expire(db, id)
    new = await claim_one(alive)
    assert (new.key, new.attempt, new.taken_from) == (old.key, old.attempt + 1, "dead")
    assert new.begun_age is not None and new.scheduled_for == old.scheduled_for
    mark = await one(db, "select * from recall_attempts where recall_id = %s", id)
    assert (mark["outcome"], mark["settled"], mark["worker"], mark["lease"]) == (
        "unknown",
        "taken",
        "dead",
        old.lease,
    )

    assert (
        await settle(dead, old, Retry(After(5.0), False, "no answer"), Unknown("no answer"))
        == LeaseLost()
    )
    assert await marks(db, id) == [(1, "unknown", 1, "lost")]


async def test_expired_leases_are_left_alone_when_asked_to(
    db: Connection, ledgers: Ledgers, settled_in: None
) -> None:
    """After an outage living owners come first: what is merely due is claimed, what somebody held
    is waited for, and still theirs."""
    id = await put(db, "held")
    owner, other = ledgers(), ledgers()
    held = await claim_one(owner)
    await expire(db, id)
    due = await put(db, "due")
    answer = await claim_due(other, 3, take_expired=False)
    assert [c.id for c in answer.claims] == [due] and answer.waiting
    assert await owner.renew({id: held.lease}) == {id: "renewed"}
    assert await claim(other) == []
    assert await settle(owner, held) == Settled("fired")


async def test_a_worker_does_not_take_what_it_has_in_hand(
    db: Connection, ledgers: Ledgers, settled_in: None
) -> None:
    """A lease that ended though its run is in hand is about to be renewed or settled: its worker
    doesn't take it, others do, however long ago."""
    id = await put(db, "s")
    ledger = ledgers()
    await claim_one(ledger)
    for ago in ("1 ms", "1 hour"):
        await db.execute(
            "update session_recalls set lease_until = now() - %s::interval where id = %s", (ago, id)
        )
        answer = await claim_due(ledger, 3, in_hand=[id])
        assert answer.claims == [] and answer.waiting
    assert [c.id for c in await claim(ledgers())] == [id]


async def test_a_worker_takes_its_own_lease_that_it_does_not_know_of(
    db: Connection, ledgers: Ledgers, settled_in: None
) -> None:
    """The answer to a claim was lost with the connection: when its lease ends, the row is taken up
    by others, and a third of a lease later by that worker itself, which may have been held up
    between asking what it has in hand and asking for more."""
    id = await put(db, "s")
    ledger = ledgers("me")
    await claim_one(ledger)
    assert await claim(ledger) == []
    await db.execute(
        "update session_recalls set lease_until = now() - make_interval(secs => %s) where id = %s",
        [LEASE / 5, id],
    )
    answer = await claim_due(ledger, 3)
    assert answer.claims == [] and answer.waiting
    assert await claim(ledger) == []
    await db.execute(
        "update session_recalls set lease_until = now() - make_interval(secs => %s) where id = %s",
        [LEASE / 2, id],
    )
    (again,) = await claim(ledger)
    assert (again.id, again.taken_from) == (id, "me")


@pytest.mark.parametrize(
    "how",
    [
        "select from session_recalls where id = $1 for update",
        "update session_recalls set internal_comment = 'x' where id = $1",
    ],
)
async def test_a_lease_that_ended_under_a_lock_is_left_to_its_owner(
    how: str, db: Connection, database: str, ledgers: Ledgers, settled_in: None
) -> None:
    """Its owner could not renew it, and comes first when the application is done: for a third of a
    lease nobody else takes the row."""
    id = await put(db, "s")
    owner, other = ledgers(), ledgers()
    held = await claim_one(owner)
    await expire(db, id)
    long = await asyncpg.connect(database)
    try:
        transaction = long.transaction()
        await transaction.start()
        await long.execute(how, id)
        assert await owner.renew({id: held.lease}) == {id: "locked"}
        seen = await claim_due(other, 3)
        assert seen.claims == [] and seen.waiting
        locked_last = time.monotonic()
        seen = await claim_due(other, 3)
        await transaction.rollback()
    finally:
        await long.close()
    assert seen.claims == [] and seen.waiting
    assert await claim(other) == []
    assert await owner.renew({id: held.lease}) == {id: "renewed"}

    await expire(db, id)
    taken: list[Claim] = []
    while not taken:
        taken = await claim(other)
    assert [c.id for c in taken] == [id]
    assert time.monotonic() - locked_last >= LEASE / 3


@pytest.mark.slow
async def test_what_a_lock_held_up_is_taken_where_its_owner_is_gone(
    db: Connection, database: str, ledgers: Ledgers, settled_in: None
) -> None:
    """However long the application held it: a third of a lease after that it is taken, and so is
    another one at once that was never locked."""
    id, free = await put(db, "s"), await put(db, "t")
    other = ledgers()
    assert len(await claim(ledgers())) == 2
    await expire(db, id)
    long = await asyncpg.connect(database)
    try:
        async with long.transaction():
            await long.execute("select from session_recalls where id = $1 for update", id)
            until = time.monotonic() + LEASE / 2
            while time.monotonic() < until:
                assert (await claim_due(other, 3)).waiting
    finally:
        await long.close()
    await expire(db, free)
    assert [c.id for c in await claim(other)] == [free]
    taken: list[Claim] = []
    while not taken:
        taken = await claim(other)
    assert [c.id for c in taken] == [id]


async def test_a_settle_is_for_one_lease_only(
    db: Connection, ledgers: Ledgers, settled_in: None
) -> None:
    """Two endings of one recall in one batch, one of a lease that was lost: each is answered for
    itself, and the stale one writes nothing."""
    for turn in range(6):
        id = await put(db, f"s{turn}")
        ledger = ledgers()
        old = await claim_one(ledgers())
        await expire(db, id)
        new = await claim_one(ledger)
        stale: tuple[Ending, Verdict] = (ending(old, Busy(409)), Defer(After(900.0), "busy"))
        fresh: tuple[Ending, Verdict] = (ending(new), FIRED)
        batch = [stale, fresh] if turn % 2 else [fresh, stale]
        answers = await ledger.settle(batch)
        assert set(answers) == {LeaseLost(), Settled("fired")}
        assert answers[batch.index(fresh)] == Settled("fired")
        row = await recall(db, id)
        assert (row["status"], row["reason"], row["last_outcome"]) == ("fired", None, "answered")


# --- attempts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "outcome", "wanted"),
    [
        (
            Defer(After(0.0), "busy"),
            Busy(409),
            {"attempt": 0, "deferrals": 1, "occurrence": 1, "rekey": 0},
        ),
        (
            Release("stopping"),
            Unsent("stopping"),
            {"attempt": 0, "deferrals": 0, "occurrence": 1, "rekey": 0},
        ),
        (
            Retry(After(0.0), False, "silence"),
            Unknown("silence"),
            {"attempt": 1, "deferrals": 0, "occurrence": 1, "rekey": 0},
        ),
        (
            Retry(After(0.0), True, "it failed"),
            Failed("it failed"),
            {"attempt": 1, "deferrals": 0, "occurrence": 1, "rekey": 1},
        ),
        (
            Next(2, After(0.0)),
            Answered(200),
            {"attempt": 0, "deferrals": 0, "occurrence": 2, "rekey": 0},
        ),
    ],
    ids=["defer", "release", "retry", "retry anew", "next"],
)
async def test_an_attempt_is_counted_at_the_claim(
    verdict: Verdict, outcome: Outcome, wanted: dict[str, int], db: Connection, ledgers: Ledgers
) -> None:
    """A recall that kills its worker is not retried for ever: the claim spends the attempt, and
    what cost none gives it back."""
    id = await put(db, "s")
    ledger = ledgers()
    claimed = await claim_one(ledger)
    assert (claimed.attempt, (await recall(db, id))["attempt"]) == (1, 1)
    assert await settle(ledger, claimed, verdict, outcome) == Settled("pending")
    row = await recall(db, id)
    assert {name: row[name] for name in wanted} == wanted
    assert row["lease"] is None and row["planned_at"] == row["trigger_at"]


@pytest.mark.parametrize("how", ["accepted", "busy", "unavailable"])
async def test_an_edit_between_the_claim_and_the_request_came_after_the_beginning(
    how: str, db: Connection, ledgers: Ledgers
) -> None:
    """The claim counted what was missed, by the rule as it was then."""
    id = await put(db, "s", -7200.0, call_type="recurring", interval_seconds=600, cadence="grid")
    ledger = ledgers()
    claimed = await claim_one(ledger)
    await db.execute("update session_recalls set interval_seconds = 300 where id = %s", (id,))
    if how == "accepted":
        assert await ledger.accept(claimed, Accepted("run", 202), 0.0) is True
    else:
        outcome = Busy(409) if how == "busy" else Unavailable("no connection")
        edits = claimed._replace(edits=claimed.edits + 1)
        assert await settle(ledger, edits, Defer(After(9.0), how), outcome) == Settled("pending")
    row = await recall(db, id)
    assert row["begun_at"] < row["edited_at"]


async def test_deferrals_fold_into_one_mark(db: Connection, ledgers: Ledgers) -> None:
    """Five busy answers to one occurrence, and the answer at last: two marks, of which one stands
    for five calls."""
    id = await put(db, "s")
    ledger = ledgers()
    for _ in range(5):
        await settle(ledger, await claim_one(ledger), Defer(After(-1.0), "busy"), Busy(409))
    assert (await recall(db, id))["deferrals"] == 5
    await settle(ledger, await claim_one(ledger))
    assert await marks(db, id) == [(1, "answered", 1, "fired"), (1, "busy", 5, "pending")]


# --- settling -------------------------------------------------------------------------------------


async def test_one_bad_row_strands_nobody(
    db: Connection, app: Application, ledgers: Ledgers, settled_in: None
) -> None:
    """In one batch: settled, locked by the application, cancelled, deleted, moved, and lost; each
    is answered for what it is."""
    names = ["plain", "locked", "cancelled", "deleted", "moved", "lost"]
    ids = {name: await put(db, name, -float(10 + n), id=name) for n, name in enumerate(names)}
    ledger = ledgers()
    claims = {c.session_id: c for c in await claim(ledger)}
    await app.cancel_session("cancelled")
    await app.delete_session("deleted")
    await app.reschedule(ids["moved"], FAR)
    await expire(db, ids["lost"])
    assert [c.id for c in await claim(ledgers())] == [ids["lost"]]
    batch = [(ending(claims[name]), FIRED) for name in names]

    async with app.connection.transaction():
        await app.connection.execute("select from session_recalls where id = 'locked' for update")
        began = time.monotonic()
        answers = dict(zip(names, await ledger.settle(batch), strict=True))
        assert time.monotonic() - began < 5

    assert answers["plain"] == Settled("fired")
    assert answers["locked"] == Locked()
    assert answers["cancelled"] == Ended("cancelled")
    assert answers["deleted"] == Ended("deleted")
    assert isinstance(answers["moved"], Moved) and answers["moved"].now["trigger_at"] == FAR
    assert answers["lost"] == LeaseLost()
    assert await settle(ledger, claims["locked"]) == Settled("fired")
    cancelled = await recall(db, "cancelled")
    assert (cancelled["status"], cancelled["lease"], cancelled["last_outcome"]) == (
        "cancelled",
        None,
        None,
    )
    told = {
        "plain": "fired",
        "locked": "fired",
        "cancelled": "ended",
        "deleted": "deleted",
        "lost": "lost",
    }
    for name in names:
        assert [m[3] for m in await marks(db, name) if m[1] == "answered"] == (
            [told[name]] if name in told else []
        )


@pytest.mark.parametrize(
    ("verdict", "outcome", "status"),
    [
        (FIRED, Answered(200), "fired"),
        (Defer(After(60.0), "busy"), Busy(409), "pending"),
        (Next(2, After(60.0)), Answered(200), "pending"),
        (Retry(After(60.0), False, "silence"), Unknown("silence"), "pending"),
    ],
    ids=["finish", "defer", "next", "retry"],
)
async def test_a_settle_whose_answer_was_lost(
    verdict: Verdict, outcome: Outcome, status: str, db: Connection, ledgers: Ledgers
) -> None:
    """The connection broke after the settle was done: asked again it is known as done, changes
    nothing, and the call counts once."""
    id = await put(db, "s", call_type="recurring", interval_seconds=60)
    ledger = ledgers()
    claimed = await claim_one(ledger)
    batch = [(ending(claimed, outcome), verdict)]
    assert await ledger.settle(batch) == [Settled(status)]
    before = await recall(db, id)
    (again,) = await ledger.settle(batch)
    assert isinstance(again, Settled)
    assert await recall(db, id) | {"due_in": 0} == before | {"due_in": 0}
    assert [(m[1], m[2]) for m in await marks(db, id)] == [(type(outcome).__name__.lower(), 1)]


async def test_a_move_in_mid_run_is_answered_and_then_honoured(
    db: Connection, app: Application, ledgers: Ledgers
) -> None:
    """A settle that finds another trigger than it was judged by writes nothing and says what stands
    there; judged by that, it is written."""
    id = await put(db, "s")
    ledger = ledgers()
    claimed = await claim_one(ledger)
    await app.reschedule(id, FAR)
    moved = await settle(ledger, claimed)
    assert isinstance(moved, Moved)
    assert (await recall(db, id))["lease"] == claimed.lease and await marks(db, id) == []
    judged = claimed._replace(**moved.now)
    assert await settle(ledger, judged, Next(2, AsMoved())) == Settled("pending")
    row = await recall(db, id)
    assert (row["occurrence"], row["trigger_at"], row["planned_at"], row["scheduled_for"]) == (
        2,
        FAR,
        FAR,
        None,
    )


@pytest.mark.parametrize("date", ["infinity", "-infinity", "20000-01-01", "0044-03-15 BC"])
async def test_a_move_to_a_date_that_python_lacks(
    date: str, db: Connection, ledgers: Ledgers
) -> None:
    """The proof that nobody moved a recall is its date as PostgreSQL writes it, so that any date
    can be settled."""
    id = await put(db, "s")
    ledger = ledgers()
    claimed = await claim_one(ledger)
    await db.execute("update session_recalls set trigger_at = %s where id = %s", (date, id))
    moved = await settle(ledger, claimed)
    assert isinstance(moved, Moved)
    judged = claimed._replace(**moved.now)
    assert await settle(ledger, judged, Next(2, AsMoved())) == Settled("pending")
    assert await one(
        db, "select trigger_at = %s::timestamptz as there from session_recalls", date
    ) == {"there": True}


async def test_a_table_that_is_locked_as_a_whole_strands_nothing(
    db: Connection, database: str, ledgers: Ledgers
) -> None:
    """While somebody's DDL holds the table, a settle is to be asked again and a claim finds
    nothing; then all goes on."""
    await put(db, "s")
    ledger = ledgers()
    claimed = await claim_one(ledger)
    async with connected(database) as other:
        await other.execute("begin")
        await other.execute("lock table session_recalls in share mode")
        assert await settle(ledger, claimed) == Locked()
        waiting = await claim_due(ledger, 3)
        assert (waiting.claims, waiting.waiting) == ([], True)
        await other.execute("rollback")
    assert await settle(ledger, claimed) == Settled("fired")


# --- the slot -------------------------------------------------------------------------------------


async def test_a_recall_out_of_its_slot_goes_back_where_it_is_free(
    db: Connection, app: Application, ledgers: Ledgers
) -> None:
    """A leased one-shot that made room for a newer recall is pending again after its run, once that
    one is gone."""
    id = await put(db, "s")
    ledger = ledgers()
    claimed = await claim_one(ledger)
    await free_slot(app, "s")
    assert (await recall(db, id))["status"] == "running"
    assert await settle(ledger, claimed, Defer(After(60.0), "busy"), Busy(409)) == Settled(
        "pending"
    )
    with pytest.raises(AlreadyScheduled):
        await app.schedule("s", "once", FAR, "one too many")


async def test_a_recall_whose_slot_is_taken_waits_beside_it(
    db: Connection, app: Application, ledgers: Ledgers
) -> None:
    """Nothing is lost to the index: where a newer recall has the slot the older stays running, with
    a later due time, and is claimed then."""
    id = await put(db, "s")
    ledger = ledgers()
    claimed = await claim_one(ledger)
    newer = await app.schedule("s", "once", FAR, "the next one")
    assert await settle(ledger, claimed, Defer(After(-1.0), "busy"), Busy(409)) == Settled(
        "running"
    )
    assert (await recall(db, id))["lease"] is None
    assert [c.id for c in await claim(ledger)] == [id]
    assert (await recall(db, newer))["status"] == "pending"


async def test_two_recalls_out_of_one_slot(
    db: Connection, app: Application, ledgers: Ledgers
) -> None:
    """Of two recalls that go back into one slot, one gets it; each settle sees what the one before
    has done."""
    first = await put(db, "s", -9.0)
    ledger = ledgers()
    held = await claim_one(ledger)
    second = await app.schedule("s", "immediate", datetime.now(UTC), "the second")
    assert await settle(ledger, held, Defer(After(-5.0), "busy"), Busy(409)) == Settled("running")
    held = await claim_one(ledger)
    assert held.id == first
    await app.cancel_session("s")
    assert (await recall(db, second))["status"] == "cancelled"
    assert await settle(ledger, held, Defer(After(60.0), "busy"), Busy(409)) == Settled("pending")


@pytest.mark.parametrize("end", ["commit", "rollback"])
async def test_a_race_for_the_slot_is_settled_for_that_row_alone(
    end: str, db: Connection, database: str, app: Application, ledgers: Ledgers
) -> None:
    """The application's insert is in an open transaction, so the slot looks free: that row stays
    running, the rest of its batch is settled."""
    ids = [await put(db, f"s{n}", -float(9 - n)) for n in range(3)]
    ledger = ledgers()
    claims = await claim(ledger)
    await free_slot(app, "s1")
    async with await Application.connect(database) as other:
        transaction = other.connection.transaction()
        await transaction.start()
        newer = await other.schedule("s1", "once", FAR, "not yet committed")
        batch = [(ending(c, Busy(409)), Defer(After(60.0), "busy")) for c in claims]
        answers = await ledger.settle(batch)
        await (transaction.commit() if end == "commit" else transaction.rollback())
    assert answers == [Settled("pending"), Settled("running"), Settled("pending")]
    rows = [await recall(db, id) for id in ids]
    assert [row["lease"] for row in rows] == [None] * 3
    assert all(40 < row["due_in"] <= 60 for row in rows)
    assert [len(await marks(db, id)) for id in ids] == [1, 1, 1]
    found = await (
        await db.execute("select status from session_recalls where id = %s", (newer,))
    ).fetchall()
    assert found == ([{"status": "pending"}] if end == "commit" else [])


async def test_a_unique_violation_is_settled_for_that_row_alone(
    db: Connection, database: str, app: Application, ledgers: Ledgers
) -> None:
    """The same race, the application's transaction ending while the settle waits: the violation
    strands nobody."""
    await put(db, "s", -9.0)
    await put(db, "t", -8.0)
    ledger = ledgers("racer")
    claims = await claim(ledger)
    await free_slot(app, "s")
    async with await Application.connect(database) as other:
        transaction = other.connection.transaction()
        await transaction.start()
        await other.schedule("s", "once", FAR, "not yet committed")
        settling = asyncio.create_task(
            ledger.settle([(ending(c, Busy(409)), Defer(After(60.0), "busy")) for c in claims])
        )
        await blocked(db, "recall-worker ledger racer")
        await transaction.commit()
        assert await settling == [Settled("running"), Settled("pending")]


async def test_an_unknown_one_shot_frees_its_slot(
    db: Connection, app: Application, ledgers: Ledgers
) -> None:
    """Its run may still go on and schedule: a one-shot whose last outcome is Unknown makes room,
    and is retried beside the newer one."""
    id = await put(db, "s")
    ledger = ledgers()
    await settle(
        ledger, await claim_one(ledger), Retry(After(60.0), False, "silence"), Unknown("silence")
    )
    assert (await recall(db, id))["status"] == "pending"
    await app.schedule("s", "once", FAR, "from a run that nobody heard of")
    row = await recall(db, id)
    assert (row["status"], row["lease"]) == ("running", None) and 40 < row["due_in"] <= 60


@pytest.mark.parametrize("busy", [True, False], ids=["deferred", "waiting"])
async def test_any_other_recall_keeps_its_slot(
    busy: bool, db: Connection, app: Application, ledgers: Ledgers
) -> None:
    """One that waits, or was deferred, or recurs, leased or not: an insert is refused, in the words
    that the application reads."""
    await put(db, "once", -9.0)
    await put(db, "recurring", -8.0, call_type="recurring", interval_seconds=60)
    ledger = ledgers()
    if busy:
        for claimed in await claim(ledger):
            await settle(ledger, claimed, Defer(After(60.0), "busy"), Busy(409))
    for session in ("once", "recurring"):
        with pytest.raises(AlreadyScheduled):
            await app.schedule(session, "once", FAR, "one too many")
    await db.execute("update session_recalls set trigger_at = now(), planned_at = now()")
    assert len(await claim(ledger)) == 2
    with pytest.raises(AlreadyScheduled):
        await app.schedule("recurring", "once", FAR, "one too many")


# --- moves ----------------------------------------------------------------------------------------


async def test_skipped_occurrences_consume_their_numbers(
    db: Connection, app: Application, ledgers: Ledgers, settled_in: None
) -> None:
    """Two skips of a waiting recall: it is called as its third occurrence, and whoever takes the
    run up calls it under the same key."""
    id = await put(db, "s", -250.0, call_type="recurring", interval_seconds=100)
    assert await app.skip_next("s") and await app.skip_next("s")
    ledger = ledgers()
    claimed = await claim_one(ledger)
    assert claimed.moved and resolve_move(claimed) == as_moved(3)
    (placed,) = await ledger.write_moves([(claimed, as_moved(3))])
    assert (placed.key, placed.attempt, placed.missed) == (f"{id}:3", 1, 0)
    assert placed.scheduled_for == claimed.trigger_at and 45 < placed.lateness < 75
    row = await recall(db, id)
    assert (row["occurrence"], row["attempt"], row["planned_at"]) == (3, 1, row["trigger_at"])

    await expire(db, id)
    successor = await claim_one(ledgers())
    assert (successor.key, successor.moved) == (f"{id}:3", False)


async def test_a_move_between_two_calls_begins_the_next_occurrence(
    db: Connection, app: Application, ledgers: Ledgers
) -> None:
    """Deferred and then rescheduled: the key that was sent stands for what was, the new time gets a
    new one."""
    id = await put(db, "s")
    ledger = ledgers()
    first = await claim_one(ledger)
    await settle(ledger, first, Defer(After(60.0), "busy"), Busy(409))
    await app.reschedule(id, datetime.now(UTC) - timedelta(seconds=1))
    second = await claim_one(ledger)
    assert resolve_move(second) == as_moved(2)
    (placed,) = await ledger.write_moves([(second, as_moved(2))])
    assert (first.key, placed.key) == (f"{id}:1", f"{id}:2")
    assert (placed.attempt, placed.deferrals, placed.begun_age) == (1, 0, None)


async def test_a_move_of_a_run_that_was_taken_up_counts_its_attempts(
    db: Connection, app: Application, ledgers: Ledgers
) -> None:
    """Its worker dies, it was rescheduled in mid-run, and who takes it up begins the next
    occurrence; the worker after that can't know whether that call was made, and counts it."""
    id = await put(db, "s")
    first, second, third = ledgers("first"), ledgers("second"), ledgers("third")
    await claim_one(first)
    await app.reschedule(id, datetime.now(UTC) - timedelta(seconds=1))
    await expire(db, id)
    moved = await claim_one(second)
    (placed,) = await second.write_moves([(moved, as_moved(2))])
    assert (placed.key, placed.attempt, placed.taken_from) == (f"{id}:2", 1, None)
    await expire(db, id)
    again = await claim_one(third)
    assert (again.key, again.attempt, again.takeovers) == (f"{id}:2", 2, 1)
    assert await marks(db, id) == [(1, "unknown", 1, "taken"), (1, "unknown", 1, "taken")]


async def test_a_move_before_the_first_call_keeps_the_number(
    db: Connection, app: Application, ledgers: Ledgers
) -> None:
    """Nothing was sent under the key yet: a recall that is rescheduled while it waits is still its
    first occurrence."""
    id = await put(db, "s", 600.0, call_type="recurring", interval_seconds=7200)
    await app.reschedule(id, datetime.now(UTC) - timedelta(seconds=1))
    ledger = ledgers()
    claimed = await claim_one(ledger)
    assert resolve_move(claimed) == as_moved(1)
    (placed,) = await ledger.write_moves([(claimed, as_moved(1))])
    assert (placed.key, placed.scheduled_for) == (f"{id}:1", claimed.trigger_at)


@pytest.mark.parametrize(
    ("due", "columns", "quiet", "notifies"),
    [
        (0.0, {}, False, True),
        (59.0, {}, False, True),
        (61.0, {}, False, False),
        (0.0, {"status": "cancelled"}, False, False),
        (0.0, {"call_type": "recurring", "interval_seconds": 60}, False, True),
        (0.0, {}, True, False),
    ],
    ids=["now", "within the horizon", "beyond it", "ended", "recurring", "turned off"],
)
async def test_which_inserts_ring(
    due: float, columns: dict[str, Any], quiet: bool, notifies: bool, db: Connection, database: str
) -> None:
    """What is due within a minute notifies once, with nothing in it; what is due later costs nobody
    anything, and who inserts in bulk may be quiet."""
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as bell:
        await bell.execute("listen session_recalls")
        if quiet:
            await db.execute("set recall_worker.rings = 'off'")
        await put(db, "s", due, **columns)
        await db.execute("select pg_notify('session_recalls', 'the end')")
        heard = [
            notification.payload
            async for notification in bell.notifies(timeout=20, stop_after=1 + notifies)
        ]
    assert heard == [""] * notifies + ["the end"]


async def test_a_one_shot_stands_where_it_is_put(
    db: Connection, app: Application, ledgers: Ledgers
) -> None:
    """It has no distance to skip: where it was never called, another time is simply its time."""
    id = await put(db, "s", 600.0)
    await app.reschedule(id, datetime.now(UTC) - timedelta(seconds=1))
    claimed = await claim_one(ledgers())
    assert resolve_move(claimed) is None
    assert (claimed.key, claimed.scheduled_for) == (f"{id}:1", claimed.trigger_at)


async def test_what_was_moved_again_is_not_placed(
    db: Connection, app: Application, ledgers: Ledgers
) -> None:
    """Placing is guarded by the very time that was judged: a second move in between leaves the row
    as it is."""
    id = await put(db, "s", -50.0)
    await app.reschedule(id, datetime.now(UTC) - timedelta(seconds=20))
    ledger = ledgers()
    claimed = await claim_one(ledger)
    await app.reschedule(id, FAR)
    before = await recall(db, id)
    assert await ledger.write_moves([(claimed, as_moved(1))]) == []
    assert await recall(db, id) | {"due_in": 0} == before | {"due_in": 0}


@pytest.mark.parametrize(("age", "missed"), [(50.0, 0), (250.0, 2), (10_050.0, 100)])
async def test_missed_occurrences_are_counted_once(
    age: float, missed: int, db: Connection, ledgers: Ledgers
) -> None:
    """Due moments after the nominal time and up to now coalesce into one run, whose number of
    missed ones does not change afterwards."""
    await put(db, "s", -age, call_type="recurring", interval_seconds=100)
    ledger = ledgers()
    first = await claim_one(ledger)
    assert (first.missed, first.occurrence) == (missed, 1)
    await settle(ledger, first, Defer(After(-1.0), "busy"), Busy(409))
    await db.execute("update session_recalls set begun_at = begun_at - interval '1 hour'")
    second = await claim_one(ledger)
    assert (second.missed, second.key, second.scheduled_for) == (
        missed,
        first.key,
        first.scheduled_for,
    )


async def test_what_was_ended_while_its_worker_died(
    db: Connection, app: Application, ledgers: Ledgers
) -> None:
    """Nobody takes up a recall that was cancelled in mid-run. A minute after its lease the next
    beat of any worker ends that, and leaves the call's mark."""
    fit = {
        "host": "h",
        "pid": 1,
        "version": "1",
        "slots": 3,
        "running": 0,
        "breaker": "closed",
        "bell": "listening",
    }
    id = await put(db, "s")
    claimed = await claim_one(ledgers("dead"))
    assert await app.cancel_session("s") == 1
    for ago, left in (("30 seconds", claimed.lease), ("61 seconds", None)):
        await db.execute(
            "update session_recalls set lease_until = now() - %s::interval where id = %s", (ago, id)
        )
        await ledgers("alive").heartbeat(fit, {})
        assert (await recall(db, id))["lease"] == left
    assert (await recall(db, id))["status"] == "cancelled"
    cursor = await db.execute(
        "select worker, outcome, settled, attempt, lease from recall_attempts where recall_id = %s",
        (id,),
    )
    assert await cursor.fetchall() == [
        {
            "worker": "dead",
            "outcome": "unknown",
            "settled": "ended",
            "attempt": 1,
            "lease": claimed.lease,
        }
    ]


async def test_who_is_at_hand_before_a_worker(db: Connection, ledgers: Ledgers) -> None:
    """A beat tells how many come first: by name, but for those that are full, in trouble, deaf, or
    have not been heard of for long."""
    fit = {
        "host": "h",
        "pid": 1,
        "version": "1",
        "slots": 3,
        "running": 2,
        "breaker": "closed",
        "bell": "listening",
    }
    assert [await ledgers(name).heartbeat(fit, {}) for name in ("b", "a", "c", "d")] == [0, 0, 2, 3]
    for trouble in ({"running": 3}, {"breaker": "open"}, {"bell": "deaf"}):
        await ledgers("b").heartbeat(fit | trouble, {})
        assert await ledgers("d").heartbeat(fit, {}) == 2
    await db.execute(
        "update recall_workers set seen_at = now() - interval '2 minutes' where worker = 'a'"
    )
    assert await ledgers("d").heartbeat(fit, {}) == 1


# --- odd rows -------------------------------------------------------------------------------------

DUE_LONG_AGO = ["-infinity", "0044-03-15 BC", "0001-01-01", "1969-12-31"]
NOT_DUE = ["infinity", "20000-01-01", "9999-12-31"]


@pytest.mark.parametrize("kind", ["once", "recurring", "immediate"])
@pytest.mark.parametrize("date", DUE_LONG_AGO + NOT_DUE)
async def test_any_date_is_claimed_or_waited_for(
    date: str, kind: str, db: Connection, app: Application, ledgers: Ledgers
) -> None:
    """Infinite dates, and those that Python does not have: past ones are claimed and settled,
    others are waited for, a day at a time."""
    id = await put(
        db, "s", date, call_type=kind, interval_seconds=60 if kind == "recurring" else None
    )
    ledger = ledgers()
    answer = await claim_due(ledger, 3)
    if date in NOT_DUE:
        assert (answer.claims, answer.waiting) == ([], False)
        assert answer.next_in == pytest.approx(86_400.0)
        return
    (claimed,) = answer.claims
    assert (
        claimed.lateness > 1e9
        and claimed.lag > 1e9
        and not claimed.moved
        and resolve_move(claimed) is None
    )
    assert claimed.missed == (
        0 if kind != "recurring" else pytest.approx(claimed.lateness / 60, rel=0.01)
    )
    verdict = Next(2, After(60.0)) if kind == "recurring" else FIRED
    assert isinstance(await settle(ledger, claimed, verdict), Settled)
    assert [m[1] for m in await marks(db, id)] == ["answered"]


@pytest.mark.parametrize("interval", [None, 0, -5, -(2**31)])
async def test_old_rows_without_a_right_interval_fail_with_their_reason(
    interval: int | None, db: Connection, ledgers: Ledgers
) -> None:
    """Where such a row is there already it is claimed like any other, and judged: nothing is sent,
    it ends as failed, saying why."""
    await db.execute("alter table session_recalls disable trigger recall_before_insert")
    id = await put(db, "s", call_type="recurring", interval_seconds=interval)
    await db.execute("alter table session_recalls enable trigger recall_before_insert")
    ledger = ledgers()
    claimed = await claim_one(ledger)
    found = before_call(claimed, 3)
    assert (
        isinstance(found, Malformed) and "interval_seconds" in found.reason and claimed.missed == 0
    )
    assert await settle(ledger, claimed, Finish("failed", found.reason), found) == Settled("failed")
    row = await recall(db, id)
    assert (row["status"], row["reason"]) == ("failed", found.reason) and row[
        "ended_at"
    ] is not None


@pytest.mark.parametrize("interval", [None, 0, -5])
async def test_a_recall_that_could_only_loop_is_refused(
    interval: int | None, app: Application
) -> None:
    """The insert of a recurring recall without a right interval fails, in words that the
    application can't take for "has one already"."""
    await app.create_session("s", "ann")
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await app.schedule("s", "recurring", FAR, "on and on", interval_seconds=interval)
    words = f"{refused.value} {refused.value.detail} {refused.value.hint}".lower()
    assert "interval_seconds" in words and "unique" not in words and "duplicate" not in words
    await app.schedule(
        "s", "once", FAR, "an interval means nothing here", interval_seconds=interval
    )


# --- the listener
# -------------------------------------------------------------------------------------


async def notifies(database: str, act: Callable[[], Any]) -> list[str]:
    """The payloads of the listener while something is done."""
    async with connected(database) as listener, connected(database) as marker:
        await listener.execute("listen session_recalls")
        await listener.execute("listen done")
        await act()
        await marker.execute("notify done")
        heard: list[str] = []
        async for notification in listener.notifies(timeout=20):
            if notification.channel == "done":
                return heard
            heard.append(notification.payload)
    raise AssertionError("the end was not heard")


@pytest.mark.parametrize(
    ("due", "kind", "heard"),
    [
        (0.0, "immediate", True),
        (-3600.0, "once", True),
        (50.0, "once", True),
        (50.0, "recurring", True),
        (70.0, "once", False),
        ("infinity", "once", False),
        ("-infinity", "once", True),
    ],
    ids=["now", "past", "within", "recurring", "beyond", "never", "ever"],
)
async def test_an_insert_rings_within_the_horizon(
    due: float | str, kind: str, heard: bool, db: Connection, database: str
) -> None:
    """What is due within a minute notifies, once, with an empty payload; what is further off costs
    the inserter nothing."""

    async def insert() -> None:
        await put(
            db, "s", due, call_type=kind, interval_seconds=60 if kind == "recurring" else None
        )

    assert await notifies(database, insert) == ([""] if heard else [])


UPDATES = {
    "earlier, within": (600.0, "trigger_at = now() + interval '30 seconds'", True),
    "earlier, beyond": (6000.0, "trigger_at = now() + interval '600 seconds'", False),
    "later, within": (5.0, "trigger_at = now() + interval '30 seconds'", False),
    "later, beyond": (5.0, "trigger_at = 'infinity'", False),
    "cancelled": (5.0, "status = 'cancelled'", False),
    "marked fired": (5.0, "status = 'fired'", False),
    "a comment": (5.0, "internal_comment = 'a note'", False),
    "paused": (5.0, "paused_at = now()", False),
}


@pytest.mark.parametrize(("due", "change", "heard"), UPDATES.values(), ids=UPDATES.keys())
async def test_an_update_rings_where_it_makes_due_earlier(
    due: float, change: str, heard: bool, db: Connection, database: str
) -> None:
    """Of changes to a waiting recall, one that a sleeping worker could miss notifies, and no
    other."""
    await put(db, "s", due)

    async def update() -> None:
        await db.execute(f"update session_recalls set {change}, updated_at = now()".encode())

    assert await notifies(database, update) == ([""] if heard else [])


@pytest.mark.parametrize(
    "change",
    ["status = 'pending'", "status = 'pending', paused_at = null"],
    ids=["revived", "resumed"],
)
async def test_what_waits_again_rings(change: str, db: Connection, database: str) -> None:
    """A recall that was over or held back, and is live and due again, notifies."""
    before = (
        {"status": "cancelled"}
        if change == "status = 'pending'"
        else {"paused_at": datetime.now(UTC)}
    )
    await put(db, "s", **before)

    async def update() -> None:
        await db.execute(f"update session_recalls set {change}".encode())

    assert await notifies(database, update) == [""]


@pytest.mark.parametrize(
    ("change", "heard"),
    [
        ("update session_recalls set status = 'cancelled'", True),
        ("update session_recalls set status = 'fired'", True),
        ("delete from session_recalls", True),
        ("delete from sessions", True),
        ("update session_recalls set trigger_at = now() - interval '1 hour'", False),
        ("update session_recalls set trigger_at = 'infinity'", False),
    ],
    ids=[
        "cancelled",
        "marked fired",
        "deleted",
        "its session deleted",
        "moved earlier",
        "moved later",
    ],
)
async def test_the_end_of_a_leased_recall_rings(
    change: str, heard: bool, db: Connection, database: str, ledgers: Ledgers
) -> None:
    """Whoever runs a recall that somebody else ended hears of it; a move is found when the run is
    settled."""
    await put(db, "s")
    await claim_one(ledgers())

    async def act() -> None:
        await db.execute(change.encode())

    assert await notifies(database, act) == ([""] if heard else [])


async def test_the_deletion_of_a_waiting_recall_is_silent(db: Connection, database: str) -> None:
    """There is nothing to do for anybody."""
    await put(db, "s")
    assert await notifies(database, lambda: db.execute("delete from sessions")) == []


async def test_an_insert_that_is_rolled_back_is_silent(db: Connection, database: str) -> None:
    """NOTIFY is part of the inserter's transaction."""

    async def act() -> None:
        async with db.transaction(force_rollback=True):
            await put(db, "s")

    assert await notifies(database, act) == []


async def test_the_worker_itself_is_silent(
    db: Connection, app: Application, database: str, ledgers: Ledgers
) -> None:
    """Claims, renewals, looks, placings and settles of every kind notify nobody: NOTIFY takes a
    lock that spans the database."""
    for n in range(6):
        await put(db, f"s{n}", -100.0 - n, call_type="recurring", interval_seconds=10)
    await app.skip_next("s0")
    verdicts: list[tuple[Verdict, Outcome]] = [
        (Next(2, After(0.0)), Answered(200)),
        (Defer(After(0.0), "busy"), Busy(409)),
        (Retry(After(0.0), False, "silence"), Unknown("silence")),
        (Release("stopping"), Unsent("stopping")),
        (FIRED, Answered(200)),
        (Finish("cancelled", "gone"), Answered(200)),
    ]

    async def work() -> None:
        ledger = ledgers()
        claims = sorted(await claim(ledger), key=lambda c: c.session_id)
        claims[0] = (await ledger.write_moves([(claims[0], as_moved(2))]))[0]
        leases = {c.id: c.lease for c in claims}
        assert set((await ledger.renew(leases)).values()) == {"renewed"}
        assert await ledger.check_leases(leases) == {}
        answers = await ledger.settle(
            [(ending(c, o), v) for c, (v, o) in zip(claims, verdicts, strict=True)]
        )
        assert [a.status for a in answers if isinstance(a, Settled)] == ["pending"] * 4 + [
            "fired",
            "cancelled",
        ]

    assert await notifies(database, work) == []


async def test_a_worker_that_leaves_rings(database: str, ledgers: Ledgers) -> None:
    """What it put back is for the others, at once."""
    assert await notifies(database, ledgers().deregister) == [""]


async def test_an_agent_that_schedules_from_inside_its_run_rings_once(
    db: Connection, app: Application, database: str, ledgers: Ledgers
) -> None:
    """Moving the running recall out of its slot is no event for anybody; the new one is."""
    await put(db, "s")
    await claim_one(ledgers())

    async def act() -> None:
        await app.schedule("s", "immediate", datetime.now(UTC), "the next link")

    assert await notifies(database, act) == [""]


async def test_a_skip_across_a_change_of_clocks(
    database: str, db: Connection, ledgers: Ledgers
) -> None:
    """A day is a day also where the database's own zone has one of 23 hours in between: the
    application skipped one occurrence."""
    name = conninfo_to_dict(database)["dbname"]
    await db.execute(f"alter database {name} set timezone = 'Europe/Berlin'".encode())
    for id, planned, moved in (
        ("spring", "2026-03-28 11:00Z", "2026-03-29 11:00Z"),
        ("autumn", "2025-10-25 11:00Z", "2025-10-26 11:00Z"),
    ):
        await put(db, id, id=id, call_type="recurring", interval_seconds=86_400)
        await db.execute(
            "update session_recalls set planned_at = %s, trigger_at = %s where id = %s",
            (planned, moved, id),
        )
    claims = await claim(ledgers())
    assert {claim.id: cadence.skipped(claim) for claim in claims} == {"spring": 1, "autumn": 1}
    assert all(claim.claimed_at.tzinfo is UTC for claim in claims)


@pytest.mark.usefixtures("settled_in")
async def test_an_ended_lease_behind_much_that_waits_is_asked_for(
    db: Connection, ledgers: Ledgers
) -> None:
    """A claim that takes no ended leases is quicker, and so the usual one. Whether there are any is
    then said, also where the rows that wait for their sessions' runs are too many to see it."""
    dead, living = ledgers(), ledgers()
    ended = await put(db, "ended")
    assert [claim.id for claim in await claim(dead)] == [ended]
    for waits, known in ((0, True), (PASSED_MOST - 2, True), (PASSED_MOST + 1, True)):
        for n in range(waits):
            session = f"{waits}-{n}"
            await put(db, session, -1000.0, status="running")
            await claim(living, take_expired=False)
            await put(db, session, -999.0)
        await db.execute(
            "update session_recalls set lease_until = now() + interval '1 hour' where lease is "
            "not null"
        )
        await expire(db, ended)
        claimed = await living.claim(5)
        ahead = await living.next_due(claimed_at=claimed.asked_at)
        assert claimed.claims == [] and ahead.ended is known and ahead.waiting
    assert [claim.id for claim in await claim(living)] == [ended]
    ahead = await living.next_due(claimed_at=time.monotonic())
    assert ahead.ended, "too many wait still to say no"
    await db.execute("delete from session_recalls where lease is null")
    assert not (await living.next_due(claimed_at=time.monotonic())).ended
