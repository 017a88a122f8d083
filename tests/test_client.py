"""`Recalls` and its twin `SyncRecalls`, as an application in Python uses them: on a pool and inside
its own transaction, beside the application's plain SQL on the same rows."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import errors
from psycopg.rows import tuple_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool

import recall_worker
from recall_worker import Recall, RecallExists, Recalls, SyncRecalls

from .conftest import Connection
from .support.application import AlreadyScheduled, Application
from .support.awaited import Asynchronous

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)


@pytest.fixture
async def pool(
    database: str, app: Application, client: Asynchronous
) -> AsyncIterator[AsyncConnectionPool]:
    """A pool as an application keeps one; the sessions a, b, c are ann's, z is zoe's."""
    for session, user in (("a", "ann"), ("b", "ann"), ("c", "ann"), ("z", "zoe")):
        await app.create_session(session, user)
    async with client.pool(database, min_size=1, max_size=3) as opened:
        yield opened


@pytest.fixture
async def recalls(pool: AsyncConnectionPool, client: Asynchronous) -> Recalls:
    recalls: Recalls = client.make(pool)
    return recalls


async def now(db: Connection) -> datetime:
    row = await (await db.execute("select now() as now")).fetchone()
    assert row is not None
    found: datetime = row["now"]
    return found


# --- schedule -------------------------------------------------------------------------------------

SOON = datetime(2031, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
SCHEDULED: list[tuple[str, dict[str, Any], str, timedelta | datetime, int | None]] = [
    ("at once", {}, "immediate", timedelta(), None),
    ("at", {"at": SOON}, "once", SOON, None),
    (
        "at, elsewhere",
        {"at": datetime.fromisoformat("2031-05-06T12:38:09.123456+05:30")},
        "once",
        SOON,
        None,
    ),
    ("after", {"after": HOUR}, "once", HOUR, None),
    (
        "after a moment",
        {"after": timedelta(milliseconds=1500)},
        "once",
        timedelta(milliseconds=1500),
        None,
    ),
    ("after, in the past", {"after": -HOUR}, "once", -HOUR, None),
    ("every", {"every": HOUR}, "recurring", HOUR, 3600),
    ("every, first at", {"every": HOUR, "at": SOON}, "recurring", SOON, 3600),
    ("every, first after", {"every": HOUR, "after": SECOND}, "recurring", SECOND, 3600),
]


@pytest.mark.parametrize(
    ("times", "call_type", "due", "interval"),
    [case[1:] for case in SCHEDULED],
    ids=[case[0] for case in SCHEDULED],
)
async def test_schedule(
    times: dict[str, Any],
    call_type: str,
    due: timedelta | datetime,
    interval: int | None,
    recalls: Recalls,
    db: Connection,
    app: Application,
) -> None:
    """Each way to name a time makes the row that the application's own insert would make, and
    returns it."""
    before = await now(db)
    recall = await recalls.schedule("a", "Look.", comment="a note", **times)
    after = await now(db)
    if isinstance(due, datetime):
        assert recall.trigger_at == due
    else:
        assert before + due <= recall.trigger_at <= after + due
    assert (recall.session_id, recall.call_type, recall.interval_seconds, recall.status) == (
        "a",
        call_type,
        interval,
        "pending",
    )
    assert (recall.additional_context_message, recall.internal_comment, recall.occurrence) == (
        "Look.",
        "a note",
        1,
    )
    assert str(UUID(recall.id)) == recall.id
    [row] = await app.list_by_session("a")
    assert row == {name: getattr(recall, name) for name in row}


async def test_an_id_of_ones_own(recalls: Recalls) -> None:
    """An application may name its recalls; a name that is taken is PostgreSQL's own error, and no
    RecallExists."""
    assert (await recalls.schedule("a", "m", id="mine")).id == "mine"
    with pytest.raises(errors.UniqueViolation, match="session_recalls_pkey"):
        await recalls.schedule("b", "m", id="mine")


NONSENSE: list[tuple[str, dict[str, Any]]] = [
    ("two times", {"at": SOON, "after": HOUR}),
    ("a naive time", {"at": datetime(2031, 5, 6)}),
    ("no interval", {"every": timedelta()}),
    ("a negative interval", {"every": -HOUR}),
    ("half a second", {"every": timedelta(seconds=0.5)}),
    ("an interval with a fraction", {"every": timedelta(seconds=1, microseconds=1)}),
    ("an interval of ages", {"every": timedelta(seconds=2**31)}),
    ("no session", {"session_id": ""}),
    ("a session that is a path", {"session_id": ".."}),
]


@pytest.mark.parametrize(
    "words", [case[1] for case in NONSENSE], ids=[case[0] for case in NONSENSE]
)
async def test_what_makes_no_sense(
    words: dict[str, Any], recalls: Recalls, app: Application
) -> None:
    """Times and sessions that make no sense are ValueErrors, and nothing is written."""
    with pytest.raises(ValueError, match=r"\w"):
        await recalls.schedule(**({"session_id": "a", "message": "m"} | words))
    assert await app.list_by_user("ann") == []


async def test_other_values_that_make_no_sense(recalls: Recalls, client: Asynchronous) -> None:
    """A naive time to move to, a status that is none, and a Recalls with nothing to work on."""
    with pytest.raises(ValueError, match="no time zone"):
        await recalls.reschedule("r", datetime(2031, 5, 6))
    with pytest.raises(ValueError, match="no status done"):
        await recalls.list(statuses=["done", "fired"])
    with pytest.raises(ValueError, match="no pool"):
        await client.make().due()


WRONG_TYPES: list[tuple[str, dict[str, Any], str]] = [
    (
        "schedule",
        {"after": 3600},
        r"`after` is 3600: give a timedelta, .* timedelta\(seconds=3600\)",
    ),
    ("schedule", {"after": 1.5}, r"timedelta\(seconds=1.5\)"),
    ("schedule", {"after": "1h"}, "`after` is '1h': give a timedelta, such as timedelta"),
    ("schedule", {"after": SOON}, "give a timedelta"),
    ("schedule", {"after": True}, r"`after` is True: give .* timedelta\(hours=1\)"),
    ("schedule", {"at": "2031-05-06"}, r"`at` is '2031-05-06': give an aware datetime, such as"),
    ("schedule", {"at": SOON.date()}, "give an aware datetime"),
    ("schedule", {"at": SOON.timestamp()}, "give an aware datetime"),
    ("schedule", {"at": HOUR}, "give an aware datetime"),
    ("schedule", {"every": 60}, r"`every` is 60: .* timedelta\(seconds=60\)"),
    ("schedule", {"grid": "1h"}, "`grid`"),
    ("schedule", {"every": HOUR, "until": "tomorrow"}, "`until` is 'tomorrow'"),
    ("schedule", {"every": HOUR, "times": True}, "`times` is True: give a whole number, such as 3"),
    ("schedule", {"every": HOUR, "times": 3.0}, "`times` is 3.0"),
    ("schedule", {"every": HOUR, "times": "3"}, "`times` is '3'"),
    ("schedule", {"every": HOUR, "failures": HOUR}, "`failures`"),
    ("schedule", {"every": HOUR, "grace": 5}, "`grace`"),
    ("schedule", {"every": HOUR, "jitter": 5}, "`jitter`"),
    ("update", {"every": 60}, "`every`"),
    ("update", {"grid": 60}, "`grid`"),
    ("update", {"until": "tomorrow"}, "`until`"),
    ("update", {"times": False}, "`times`"),
    ("update", {"failures": "2"}, "`failures`"),
    ("update", {"grace": 5}, "`grace`"),
    ("update", {"jitter": SOON}, "`jitter`"),
    ("reschedule", {"at": HOUR}, "`at`"),
    ("reschedule", {"at": None}, "`at` is None: give an aware datetime"),
    ("list", {"limit": "5"}, "`limit`"),
    ("list", {"offset": 1.0}, "`offset`"),
    ("due", {"limit": True}, "`limit`"),
    ("preview", {"count": "3"}, "`count`"),
    ("schedule", {"cron": 5}, "`cron` is 5: give a text of five fields"),
    ("schedule", {"cron": "0 9 * * *", "time_zone": UTC}, "`time_zone`"),
    ("schedule", {"queue": 3}, "`queue` is 3: give the name of a queue"),
    ("schedule", {"queue": None}, "`queue` is None"),
    ("schedule", {"comment": 3}, "`comment`"),
    ("update", {"message": b"look"}, "`message`"),
    ("update", {"comment": ["a"]}, "`comment`"),
    ("update", {"cron": 5}, "`cron`"),
    ("update", {"time_zone": 1}, "`time_zone`"),
    ("update", {"queue": None}, "`queue`"),
    ("preview", {"time_zone": 1}, "`time_zone`"),
]


@pytest.mark.parametrize(
    ("method", "given", "says"),
    WRONG_TYPES,
    ids=[f"{name}-{next(iter(words))}-{n}" for n, (name, words, _) in enumerate(WRONG_TYPES)],
)
async def test_what_has_another_type(
    method: str, given: dict[str, Any], says: str, client: Asynchronous
) -> None:
    """A time, a length, a number or a text of another type is a TypeError that shows what to write,
    before anything is asked of PostgreSQL."""
    words: dict[str, tuple[str, ...]] = {
        "schedule": ("a", "m"),
        "update": ("r",),
        "reschedule": ("r",),
        "preview": ("r",),
    }
    with pytest.raises(TypeError, match=says):
        await getattr(client.make(), method)(*words.get(method, ()), **given)


async def test_errors_of_postgresql_pass(recalls: Recalls) -> None:
    """A session that does not exist, text that PostgreSQL can't store, a time beyond its years:
    psycopg's own errors."""
    with pytest.raises(errors.ForeignKeyViolation):
        await recalls.schedule("nobody", "m")
    with pytest.raises(psycopg.DataError):
        await recalls.schedule("a", "m\0")
    with pytest.raises(psycopg.DataError):
        await recalls.schedule("a", "m", after=timedelta.max)


async def test_a_session_has_one(recalls: Recalls, app: Application) -> None:
    """RecallExists names the session; it is what the application's own insert reads as "has one
    already"."""
    await recalls.schedule("a", "first", after=HOUR)
    with pytest.raises(RecallExists, match="session a has a pending recall already") as caught:
        await recalls.schedule("a", "second")
    assert caught.value.session_id == "a"
    assert isinstance(caught.value.__cause__, type(None))
    with pytest.raises(AlreadyScheduled):
        await app.schedule("a", "once", SOON, "third")
    assert [recall.additional_context_message for recall in await recalls.list(session_id="a")] == [
        "first"
    ]


# --- the caller's transaction ---------------------------------------------------------------------


async def previewed(recalls: Recalls, conn: Any) -> list[datetime]:
    """When the newest recall falls, as far as anybody sees one."""
    newest = await recalls.list(limit=1, conn=conn)
    return await recalls.preview(newest[0].id, conn=conn) if newest else []


WRITING: list[tuple[str, Callable[[Recalls, Any], Awaitable[Any]]]] = [
    ("schedule", lambda r, conn: r.schedule("c", "m", conn=conn)),
    ("cancel", lambda r, conn: r.cancel("a", conn=conn)),
    ("skip_next", lambda r, conn: r.skip_next("a", conn=conn)),
    ("mark_fired", lambda r, conn: r.mark_fired("r", conn=conn)),
    ("mark_cancelled", lambda r, conn: r.mark_cancelled("r", conn=conn)),
    ("reschedule", lambda r, conn: r.reschedule("r", SOON, conn=conn)),
    ("pause", lambda r, conn: r.pause("r", conn=conn)),
    ("resume", lambda r, conn: r.resume("held", conn=conn)),
    ("fire", lambda r, conn: r.fire("r", conn=conn)),
    ("retry", lambda r, conn: r.retry("over", conn=conn)),
    ("update", lambda r, conn: r.update("r", message="another", conn=conn)),
]
READING: list[tuple[str, Callable[[Recalls, Any], Awaitable[Any]]]] = [
    ("get", lambda r, conn: r.get("seen", conn=conn)),
    ("list", lambda r, conn: r.list(conn=conn)),
    ("due", lambda r, conn: r.due(conn=conn)),
    ("next_trigger_at", lambda r, conn: r.next_trigger_at(conn=conn)),
    ("preview", lambda r, conn: previewed(r, conn)),
    ("sessions_with_pending", lambda r, conn: r.sessions_with_pending(["a"], conn=conn)),
]


def test_every_method_is_shown() -> None:
    """The tables above name every method of Recalls; each takes `conn=`, and says what it does."""
    methods = {
        name: method
        for name, method in vars(Recalls).items()
        if inspect.iscoroutinefunction(method) and not name.startswith("_")
    }
    assert set(methods) == {name for name, _ in WRITING + READING}
    assert all(
        "conn" in inspect.signature(method).parameters and method.__doc__
        for method in methods.values()
    )


@pytest.fixture
async def three(app: Application, db: Connection, pool: AsyncConnectionPool) -> None:
    """`r` waits in session a, `held` is paused in b, `over` is cancelled in c."""
    await app.schedule("a", "recurring", SOON, "m", 60, id="r")
    await app.schedule("b", "once", SOON, "m", id="held")
    await app.schedule("c", "once", SOON, "m", id="over")
    await app.mark_cancelled("over")
    await db.execute("update session_recalls set paused_at = now() where id = 'held'")


def test_the_twin_has_the_same_methods() -> None:
    """SyncRecalls takes and says the same, method for method; no name is missing, none is more."""

    def of(kind: type) -> dict[str, tuple[list[tuple[str, Any]], str | None]]:
        return {
            name: (
                [(one.name, one.default) for one in inspect.signature(method).parameters.values()],
                method.__doc__,
            )
            for name, method in vars(kind).items()
            if inspect.isfunction(method) and not name.startswith("_")
        }

    assert of(SyncRecalls) == of(Recalls)
    assert not any(map(inspect.iscoroutinefunction, vars(SyncRecalls).values()))


async def snapshot(app: Application) -> list[dict[str, Any]]:
    return sorted(await app.list_by_user("ann"), key=lambda row: str(row["id"]))


@pytest.mark.parametrize("act", [case[1] for case in WRITING], ids=[case[0] for case in WRITING])
async def test_rolled_back_with_the_caller(
    act: Callable[[Recalls, Any], Awaitable[Any]],
    client: Asynchronous,
    three: None,
    pool: AsyncConnectionPool,
    app: Application,
) -> None:
    """With `conn=` a method works inside the caller's transaction: unseen by others until that
    commits, undone where it is rolled back."""
    before = await snapshot(app)
    async with pool.connection() as conn:
        with pytest.raises(ZeroDivisionError):
            async with conn.transaction():
                assert await act(client.make(), conn)
                assert await snapshot(app) == before
                raise ZeroDivisionError
        assert await snapshot(app) == before
        async with conn.transaction():
            assert await act(client.make(), conn)
    assert await snapshot(app) != before


@pytest.mark.parametrize("act", [case[1] for case in WRITING], ids=[case[0] for case in WRITING])
async def test_on_a_pool_it_is_committed(
    act: Callable[[Recalls, Any], Awaitable[Any]], recalls: Recalls, three: None, app: Application
) -> None:
    """Without `conn=` each call is a transaction of its own, on a connection of the pool."""
    before = await snapshot(app)
    assert await act(recalls, None)
    assert await snapshot(app) != before


@pytest.mark.parametrize("act", [case[1] for case in READING], ids=[case[0] for case in READING])
async def test_reading_sees_what_the_caller_wrote(
    act: Callable[[Recalls, Any], Awaitable[Any]],
    recalls: Recalls,
    pool: AsyncConnectionPool,
    app: Application,
) -> None:
    """Inside the caller's transaction the methods that read see what it has written so far; others
    do not."""
    async with pool.connection() as conn:
        past = datetime(2020, 1, 1, tzinfo=UTC)
        await recalls.schedule("a", "m", id="seen", at=past, conn=conn)
        assert await act(recalls, conn)
        assert not await act(recalls, None)
        await conn.rollback()


@pytest.mark.parametrize(
    ("rule", "stands"),
    [
        ({}, False),
        ({"every": timedelta(hours=1)}, False),
        ({"every": timedelta(hours=1), "jitter": timedelta(minutes=1)}, False),
        ({"grid": timedelta(hours=1)}, True),
        ({"cron": "0 9 * * *"}, True),
    ],
)
async def test_a_time_in_the_past_means_now(
    rule: dict[str, Any], stands: bool, recalls: Recalls
) -> None:
    """Lateness counts from now and not from that time; on a grid and cron what was missed since
    then counts. A time within the last minute is what it is."""
    long_ago = datetime(2020, 1, 1, 9, tzinfo=UTC)
    made = await recalls.schedule("a", "m", at=long_ago, **rule)
    nominal = made.scheduled_for or made.trigger_at
    assert (nominal == long_ago) is stands
    assert stands or abs(nominal - datetime.now(UTC)) < timedelta(minutes=1)
    if not rule:
        just_now = datetime.now(UTC) - timedelta(seconds=30)
        assert (await recalls.schedule("b", "m", at=just_now)).trigger_at == just_now


async def test_a_zone_in_any_case(recalls: Recalls) -> None:
    """It is stored as IANA spells it."""
    made = await recalls.schedule("a", "m", cron="0 9 * * *", time_zone="europe/berlin")
    assert made.time_zone == "Europe/Berlin"


@pytest.mark.parametrize("refused", [False, True])
async def test_the_callers_transaction_may_begin_with_it(
    refused: bool, recalls: Recalls, client: Asynchronous, app: Application, database: str
) -> None:
    """On a connection whose transaction is implicit the call may be the first statement, and is
    undone with the rest, refused or not."""
    if refused:
        await app.schedule("a", "once", SOON, "m")
    before = await snapshot(app)
    with pytest.raises(errors.UndefinedTable):
        async with client.connect(database) as conn:
            if refused:
                with pytest.raises(RecallExists):
                    await recalls.schedule("a", "again", conn=conn)
            await recalls.schedule("b", "m", conn=conn)
            assert conn.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
            await conn.execute("insert into messages values ('the table is missing')")
    assert await snapshot(app) == before


@pytest.mark.parametrize("autocommit", [True, False])
async def test_recall_exists_leaves_the_transaction_usable(
    autocommit: bool, recalls: Recalls, client: Asynchronous, app: Application, database: str
) -> None:
    """A refused schedule is confined to a savepoint: the caller's transaction goes on, and commits
    what else it did."""
    await app.schedule("a", "once", SOON, "m", id="r")
    async with client.connect(database, autocommit=autocommit) as conn:
        async with conn.transaction():
            await conn.execute("insert into sessions (id, user_id) values ('d', 'ann')")
            with pytest.raises(RecallExists):
                await recalls.schedule("a", "again", conn=conn)
            assert (await recalls.schedule("d", "m", conn=conn)).session_id == "d"
    assert await app.sessions_with_pending(["a", "d"]) == {"a", "d"}


async def test_an_autocommit_connection(
    recalls: Recalls, client: Asynchronous, app: Application, database: str
) -> None:
    """Outside a transaction, on a connection in autocommit mode, each call commits by itself,
    whatever its row and cursor factories."""
    cursors = client.cursors["client-side"]
    async with client.connect(
        database, autocommit=True, row_factory=tuple_row, cursor_factory=cursors
    ) as conn:
        recall = await recalls.schedule("a", "100% of it: %s", after=HOUR, conn=conn)
        assert [row["id"] for row in await app.list_by_session("a")] == [recall.id]
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        assert [
            r.additional_context_message
            for r in await recalls.list(session_id="a", statuses=["pending"], conn=conn)
        ] == ["100% of it: %s"]
        assert await recalls.cancel("a", conn=conn) == 1


async def test_the_connection_is_left_as_it_was(
    recalls: Recalls, pool: AsyncConnectionPool
) -> None:
    """What the caller's connection makes of rows and dates stays its own affair."""
    async with pool.connection() as conn:
        await recalls.schedule("a", "m", at=SOON, conn=conn)
        assert await (await conn.execute("select 1, 'x'")).fetchone() == (1, "x")
        with pytest.raises(psycopg.DataError):
            await (await conn.execute("select 'infinity'::timestamptz")).fetchone()


# --- beside the application's own SQL -------------------------------------------------------------


@pytest.fixture
async def crowd(recalls: Recalls, app: Application) -> Application:
    """Recalls in several states, some due, in the sessions of two owners."""
    past, soon = datetime.now(UTC) - HOUR, datetime.now(UTC) + HOUR
    await app.schedule("a", "recurring", past, "m", 60, id="a1")
    await app.schedule("b", "once", past + SECOND, "m", id="b0")
    await app.mark_fired("b0")
    await app.schedule("b", "once", past + 2 * SECOND, "m", id="b1")
    await app.schedule("c", "once", soon, "m", id="c0")
    await app.mark_cancelled("c0")
    await app.schedule("z", "once", soon + SECOND, "m", id="z1")
    return app


def as_rows(found: list[Recall]) -> list[dict[str, Any]]:
    """The application's ten columns of what Recalls found."""
    names = [field.name for field in dataclasses.fields(Recall)][:10]
    return [{name: getattr(recall, name) for name in names} for recall in found]


async def test_lists_are_the_applications(recalls: Recalls, crowd: Application) -> None:
    """By session and by owner, in pages: the very rows, in the very order, that the application's
    own SQL gives."""
    for session in ("a", "b", "c", "z", "nobody"):
        assert as_rows(await recalls.list(session_id=session)) == await crowd.list_by_session(
            session
        )
    for user in ("ann", "zoe", "nobody"):
        assert as_rows(await recalls.list(user_id=user)) == await crowd.list_by_user(user)
        for offset in range(6):
            assert as_rows(
                await recalls.list(user_id=user, limit=2, offset=offset)
            ) == await crowd.list_by_user(user, 2, offset)
    assert [r.id for r in await recalls.list()] == ["z1", "c0", "b1", "b0", "a1"]
    assert [r.id for r in await recalls.list(limit=2, offset=1)] == ["c0", "b1"]
    assert [r.id for r in await recalls.list(statuses=["fired", "cancelled"])] == ["c0", "b0"]
    assert [
        r.id for r in await recalls.list(user_id="ann", session_id="b", statuses=["pending"])
    ] == ["b1"]
    assert await recalls.list(user_id="zoe", session_id="a") == []
    assert await recalls.list(limit=0) == []


async def test_what_is_due_is_the_applications(
    recalls: Recalls, crowd: Application, db: Connection
) -> None:
    """What is due, when the next one is, and which sessions have one: as the application asks it,
    as long as no worker is about."""
    assert as_rows(await recalls.due()) == await crowd.due(await now(db))
    assert await recalls.next_trigger_at() == await crowd.next_trigger()
    for ids in (["a", "b", "c", "z", "nobody"], ["c"], []):
        assert await recalls.sessions_with_pending(ids) == await crowd.sessions_with_pending(ids)
    assert [r.id for r in await recalls.due(limit=1)] == ["a1"]
    await db.execute("update session_recalls set status = 'cancelled'")
    assert (await recalls.due(), await recalls.next_trigger_at()) == ([], None)


async def test_due_means_waiting(recalls: Recalls, crowd: Application, db: Connection) -> None:
    """A recall that is in a run or paused is neither due nor next: nobody has to come for it."""
    await db.execute(
        "update session_recalls set lease = gen_random_uuid(), lease_until = now() + interval '1 "
        "minute' where id = 'a1'"
    )
    await db.execute("update session_recalls set paused_at = now() where id = 'b1'")
    assert await recalls.due() == []
    [z] = await crowd.list_by_session("z")
    assert await recalls.next_trigger_at() == z["trigger_at"]


CHANGES: list[
    tuple[str, Callable[[Recalls], Awaitable[Any]], Callable[[Application], Awaitable[Any]]]
] = [
    ("cancel", lambda r: r.cancel("a"), lambda app: app.cancel_session("a")),
    ("cancel of none", lambda r: r.cancel("c"), lambda app: app.cancel_session("c")),
    ("skip_next", lambda r: r.skip_next("a"), lambda app: app.skip_next("a")),
    ("skip_next of a one-shot", lambda r: r.skip_next("b"), lambda app: app.skip_next("b")),
    ("mark_fired", lambda r: r.mark_fired("b1"), lambda app: app.mark_fired("b1")),
    ("mark_fired of none", lambda r: r.mark_fired("nope"), lambda app: app.mark_fired("nope")),
    ("mark_cancelled", lambda r: r.mark_cancelled("b1"), lambda app: app.mark_cancelled("b1")),
    ("reschedule", lambda r: r.reschedule("b1", SOON), lambda app: app.reschedule("b1", SOON)),
    (
        "reschedule of none",
        lambda r: r.reschedule("nope", SOON),
        lambda app: app.reschedule("nope", SOON),
    ),
]


@pytest.mark.parametrize(
    ("ours", "theirs"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES]
)
async def test_changes_are_the_applications(
    ours: Callable[[Recalls], Awaitable[Any]],
    theirs: Callable[[Application], Awaitable[Any]],
    recalls: Recalls,
    crowd: Application,
    db: Connection,
) -> None:
    """The same operation by Recalls and by the application's own SQL: the same answer, and the same
    rows but for the second they were changed in, and that a time was named."""

    async def rows() -> list[dict[str, Any]]:
        return await (await db.execute("select * from session_recalls order by id")).fetchall()

    before = await rows()
    answers, outcomes = [], []
    for mine in (True, False):
        answers.append(await (ours(recalls) if mine else theirs(crowd)))
        outcomes.append(
            [
                {k: v for k, v in row.items() if k not in ("updated_at", "named_at")}
                for row in await rows()
            ]
        )
        await db.execute("delete from session_recalls")
        async with db.cursor() as cursor:
            for row in before:
                columns = ", ".join(row)
                values = ", ".join(f"%({name})s" for name in row)
                await cursor.execute(
                    f"insert into session_recalls ({columns}) values ({values})".encode(), row
                )
    assert answers[0] == answers[1]
    assert outcomes[0] == outcomes[1]


async def test_final_recalls_stay_as_they_are(recalls: Recalls, crowd: Application) -> None:
    """By id, Recalls changes live recalls only: what is fired or cancelled is history. (The
    application's own SQL asks no such question.)"""
    before = await crowd.list_by_session("b") + await crowd.list_by_session("c")
    for id in ("b0", "c0"):
        assert not await recalls.mark_fired(id)
        assert not await recalls.mark_cancelled(id)
        assert not await recalls.reschedule(id, SOON)
    assert await crowd.list_by_session("b") + await crowd.list_by_session("c") == before


async def stand(db: Connection, id: str) -> dict[str, Any]:
    row = await (await db.execute("select * from session_recalls where id = %s", [id])).fetchone()
    assert row is not None
    return row


async def test_get(recalls: Recalls, three: None) -> None:
    """Any recall by its id, whatever its status; None where there is none."""
    for id, status in (("r", "pending"), ("held", "pending"), ("over", "cancelled")):
        found = await recalls.get(id)
        assert found is not None and (found.id, found.status) == (id, status)
    assert await recalls.get("nope") is None


async def test_pause_and_resume(recalls: Recalls, three: None, db: Connection) -> None:
    """Both return the recall as it is then, also where it was so already; None where there is
    none that lives."""
    for id in ("r", "held"):
        before = (await stand(db, id))["paused_at"]
        paused = await recalls.pause(id)
        assert paused is not None and paused.paused_at == (await stand(db, id))["paused_at"]
        assert before in (None, paused.paused_at), "since when it was paused stays"
        for _ in range(2):
            resumed = await recalls.resume(id)
            assert resumed is not None and resumed.paused_at is None
            assert (await stand(db, id))["paused_at"] is None
    for id in ("over", "nope"):
        assert await recalls.pause(id) is None and await recalls.resume(id) is None


async def test_fire(recalls: Recalls, three: None, db: Connection) -> None:
    """A recurring recall has an extra run, a one-shot is due now; one that is due already stays as
    it is. None where it is paused, in a run, over, or not there."""
    fired = await recalls.fire("r")
    assert fired is not None and fired.trigger_at == SOON
    row = await stand(db, "r")
    assert row["fired_at"] is not None and row["lease_until"] <= datetime.now(UTC)
    again = await recalls.fire("r")
    assert again is not None and (await stand(db, "r"))["fires"] == row["fires"]
    assert await recalls.fire("held") is None
    assert await recalls.resume("held") is not None
    once = await recalls.fire("held")
    assert once is not None and once.trigger_at <= await now(db)
    await db.execute("update session_recalls set lease = gen_random_uuid(), leased_by = 'w'")
    for id in ("r", "over", "nope"):
        assert await recalls.fire(id) is None


async def test_retry(recalls: Recalls, three: None, db: Connection) -> None:
    """A failed or cancelled recall is due now, under a new key; not where it lives, and not while
    the session has another."""
    await recalls.schedule("c", "another", id="newer")
    with pytest.raises(RecallExists, match="session c has a pending recall already") as caught:
        await recalls.retry("over")
    assert caught.value.session_id == "c"
    assert await recalls.mark_cancelled("newer")
    for status in ("cancelled", "failed"):
        await db.execute("update session_recalls set status = %s where id = 'over'", [status])
        before = await stand(db, "over")
        retried = await recalls.retry("over")
        assert retried is not None and retried.status == "pending"
        assert retried.trigger_at <= await now(db)
        assert (await stand(db, "over"))["rekey"] == before["rekey"] + 1
    for id in ("r", "over", "nope"):
        assert await recalls.retry(id) is None


async def test_retry_leaves_the_transaction_usable(
    recalls: Recalls, client: Asynchronous, three: None, app: Application, database: str
) -> None:
    """A refused retry is confined to a savepoint, as a refused schedule is."""
    async with client.connect(database) as conn:
        await recalls.schedule("c", "another", id="newer", conn=conn)
        with pytest.raises(RecallExists):
            await recalls.retry("over", conn=conn)
        assert await recalls.mark_cancelled("r", conn=conn)
    assert await app.sessions_with_pending(["a", "b", "c"]) == {"b", "c"}


async def test_dates_that_python_does_not_hold(
    recalls: Recalls, app: Application, db: Connection
) -> None:
    """Infinite dates, and those of other ages, come as the nearest that Python holds; the list is
    whole."""
    dates = ("-infinity", "infinity", "0044-03-15 BC", "20000-01-01", "9999-12-31 23:59:59+00")
    for n, date in enumerate(dates):
        await app.create_session(f"d{n}", "dan")
        await app.schedule(f"d{n}", "once", SOON, date, id=f"d{n}")
        await db.execute(
            "update session_recalls set trigger_at = %s, status = 'fired' where id = %s",
            [date, f"d{n}"],
        )
    found = {r.additional_context_message: r.trigger_at for r in await recalls.list(user_id="dan")}
    assert list(found)[-1] == "-infinity" and set(found) == set(dates)
    assert found["-infinity"] == found["0044-03-15 BC"] == datetime(1, 1, 2, tzinfo=UTC)
    assert (
        found["infinity"]
        == found["20000-01-01"]
        == found["9999-12-31 23:59:59+00"]
        == datetime(9998, 1, 1, tzinfo=UTC)
    )


async def test_inside_a_run(recalls: Recalls, app: Application, db: Connection) -> None:
    """While a one-shot is being run its session's slot is free: schedule moves it out, and cancel
    acts on the newer one."""
    await recalls.schedule("a", "first", id="first")
    await db.execute(
        "update session_recalls set lease = gen_random_uuid(), lease_until = now() + interval '1 "
        "minute', leased_by = 'w'"
    )
    await recalls.schedule("a", "second", after=HOUR, id="second")
    assert {r.id: (r.status, r.leased_by) for r in await recalls.list(session_id="a")} == {
        "first": ("running", "w"),
        "second": ("pending", None),
    }
    assert await recalls.cancel("a") == 1
    assert {r.id: r.status for r in await recalls.list(session_id="a")} == {
        "first": "running",
        "second": "cancelled",
    }
    assert await recalls.mark_cancelled("first")


def test_several_threads_use_one(database: str) -> None:
    """A SyncRecalls on a pool may be shared by threads: each call is a transaction of its own."""
    sessions = [f"t{n}" for n in range(40)]
    with ConnectionPool(database, open=True, min_size=1, max_size=4) as pool:
        with pool.connection() as conn:
            conn.execute("insert into sessions select unnest(%s::text[]), 'tom'", [sessions])
        recalls = SyncRecalls(pool)
        with ThreadPoolExecutor(8) as threads:
            made = list(threads.map(lambda session: recalls.schedule(session, "m"), sessions))
            cancelled = list(threads.map(recalls.cancel, sessions))
        assert [recall.session_id for recall in made] == sessions
        assert cancelled == [1] * len(sessions)
        assert recalls.sessions_with_pending(sessions) == set()


# --- types ----------------------------------------------------------------------------------------

USE = """
from datetime import UTC, datetime, timedelta
from typing import Any

from psycopg import AsyncConnection, Connection
from psycopg.rows import DictRow
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from recall_worker import Recall, RecallExists, Recalls, SyncRecalls


async def use(
    pool: AsyncConnectionPool,
    rows: AsyncConnectionPool[AsyncConnection[DictRow]],
    conn: AsyncConnection[Any],
) -> Recall:
    recalls, others, bare = Recalls(pool), Recalls(rows), Recalls()
    try:
        recall: Recall = await recalls.schedule(
            "s", "m", at=datetime.now(UTC), every=timedelta(hours=1), comment=None, id="x",
            conn=conn,
        )
    except RecallExists as error:
        session: str = error.session_id
        raise
    count: int = await others.cancel("s")
    skipped: bool = await bare.skip_next("s", conn=conn)
    found: list[Recall] = await recalls.list(user_id="u", statuses=["fired"], limit=1, offset=0)
    due: list[Recall] = await recalls.due(limit=1)
    when: datetime | None = await recalls.next_trigger_at()
    marked: bool = await recalls.mark_fired("x") or await recalls.mark_cancelled("x")
    marked = marked or await recalls.reschedule("x", datetime.now(UTC))
    sessions: set[str] = await recalls.sessions_with_pending(found[0].session_id)
    interval: int | None = recall.interval_seconds
    now: Recall | None = await recalls.get("x") or await recalls.pause("x", conn=conn)
    now = now or await recalls.resume("x") or await recalls.fire("x") or await recalls.retry("x")
    return recall


def use_threads(pool: ConnectionPool, conn: Connection[Any]) -> Recall | None:
    recalls, bare = SyncRecalls(pool, actor="ann"), SyncRecalls()
    made: Recall = recalls.schedule("s", "m", after=timedelta(hours=1))
    count: int = bare.cancel("s", conn=conn)
    return recalls.update("x", times=3) or recalls.get(made.id)
"""
MISUSE = [
    'await recalls.schedule("s")',
    'await recalls.schedule("s", "m", at="tomorrow")',
    'recall.status = "fired"',
    "number: int = await recalls.next_trigger_at()",
    "await recalls.nope()",
]


def mypy(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "use.py").write_text(text, encoding="utf-8")
    cache = Path(recall_worker.__file__).parent.parent / ".mypy_cache" / "examples"
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(cache), "use.py"]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)


@pytest.mark.full
def test_the_package_is_typed(tmp_path: Path) -> None:
    """py.typed is there: the whole of the public API passes mypy --strict, and each misuse is
    found."""
    right = mypy(tmp_path, USE)
    assert right.returncode == 0, right.stdout + right.stderr
    wrong = mypy(
        tmp_path,
        USE.replace(
            "    return recall\n",
            "".join(f"    {line}\n" for line in MISUSE) + "    return recall\n",
        ),
    )
    first = USE.count("\n", 0, USE.index("    return recall")) + 1
    found = {int(line.split(":")[1]) for line in wrong.stdout.splitlines() if ": error:" in line}
    assert found == set(range(first, first + len(MISUSE))), wrong.stdout


def test_the_public_names() -> None:
    """`from recall_worker import …` gives four names, late, and says so of any other."""
    names = ["Recall", "RecallExists", "Recalls", "SyncRecalls"]
    assert sorted(recall_worker.__all__) == names
    assert [getattr(recall_worker, name).__name__ for name in names] == names
    command = (
        "import sys, recall_worker; assert 'psycopg' not in sys.modules; recall_worker.Recalls; "
        "assert 'psycopg' in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        recall_worker.Nope  # noqa: B018


# --- cadence --------------------------------------------------------------------------------------


async def test_cron_and_its_ends(recalls: Recalls) -> None:
    """By cron in a zone: the first moment from now on, the distance to the one behind it, and all
    that was said of ends."""
    until = datetime.now(UTC) + timedelta(days=400)
    made = await recalls.schedule(
        "a",
        "m",
        cron="30 9 * * mon-fri",
        time_zone="Europe/Berlin",
        until=until,
        times=7,
        failures=2,
        grace=HOUR,
        jitter=timedelta(minutes=5),
    )
    assert (made.cadence, made.cron, made.time_zone, made.until_at) == (
        "cron",
        "30 9 * * mon-fri",
        "Europe/Berlin",
        until,
    )
    assert (made.times, made.failures_most, made.grace_seconds, made.jitter_seconds) == (
        7,
        2,
        3600,
        300,
    )
    ahead = await recalls.preview(made.id, count=3)
    expected = await recalls.preview("30 9 * * mon-fri", time_zone="Europe/Berlin", count=3)
    assert ahead == expected and all(
        (when.hour, when.minute) == (9, 30) and when.isoweekday() <= 5 for when in ahead
    )
    assert made.scheduled_for in (None, ahead[0]) and timedelta(0) <= made.trigger_at - ahead[
        0
    ] < timedelta(minutes=5)
    assert made.interval_seconds == (ahead[1] - ahead[0]).total_seconds()


async def test_a_grid_from_a_named_time(recalls: Recalls) -> None:
    """The first occurrence where it is named, the others whole intervals from there."""
    made = await recalls.schedule("a", "m", grid=HOUR, at=SOON)
    assert (made.cadence, made.interval_seconds, made.trigger_at) == ("grid", 3600, SOON)
    assert await recalls.preview(made.id, count=3) == [SOON, SOON + HOUR, SOON + 2 * HOUR]


@pytest.mark.parametrize(
    "told",
    [
        {"cron": "0 9 30 2 *"},
        {"cron": "0 9 * * *", "time_zone": "Mars/Olympus"},
        {"grid": HOUR, "every": HOUR},
        {"grid": HOUR, "until": datetime(2020, 1, 1, tzinfo=UTC)},
        {"grid": HOUR, "until": datetime(2040, 1, 1)},
        {"times": 3},
    ],
    ids=[
        "an impossible date",
        "an unknown zone",
        "two rules",
        "an end that is past",
        "an end without a zone",
        "an end of what does not recur",
    ],
)
async def test_a_cadence_that_makes_no_sense(told: dict[str, Any], recalls: Recalls) -> None:
    """Refused as a ValueError, before anything is written."""
    with pytest.raises(ValueError):
        await recalls.schedule("a", "m", **told)
    assert await recalls.list() == []


async def test_a_preview_of_nothing(recalls: Recalls) -> None:
    """An id that there is not is a LookupError; six fields, and what never comes, are a
    ValueError."""
    with pytest.raises(LookupError):
        await recalls.preview("nobody")
    with pytest.raises(ValueError):
        await recalls.preview("0 0 9 * * *")
    with pytest.raises(ValueError, match="never comes"):
        await recalls.preview("0 0 */30 * mon#2")


async def test_what_was_previewed_can_be_scheduled(recalls: Recalls) -> None:
    """The moments of a preview, in their zone, are times like any other."""
    (first,) = await recalls.preview("30 9 * * *", time_zone="Europe/Berlin", count=1)
    made = await recalls.schedule(
        "a", "m", cron="30 9 * * *", time_zone="Europe/Berlin", at=first, until=first
    )
    assert made.trigger_at == made.until_at == first


async def test_what_is_no_id_is_refused(client: Asynchronous, database: str) -> None:
    """None, a number with a fraction, a text where a list is meant, something else than a pool or a
    connection: a TypeError that says what to write, and no recall of the session `None`."""
    async with client.pool(database) as pool:
        recalls = client.make(pool)
        for id in (None, 1.5, True, b"s"):
            with pytest.raises(TypeError, match="give a text, a UUID or a whole number"):
                await recalls.schedule(id, "m")
            with pytest.raises(TypeError, match="an id is"):
                await recalls.cancel(id)
        with pytest.raises(TypeError, match="give a list"):
            await recalls.sessions_with_pending("s1")
        with pytest.raises(TypeError, match="`conn` is 'x'"):
            await recalls.list(conn="x")
    with pytest.raises(TypeError, match="`pool` is 'dsn': give an open pool"):
        client.make("dsn")
    with pytest.raises(TypeError, match="`actor` is 5"):
        client.make(None, actor=5)
