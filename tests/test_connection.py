"""A line against a real PostgreSQL: what is asked and answered, refused, broken off and lost, and
that the next question finds a connection."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from recall_worker.database.connection import (
    SERVER_GIVES_UP_AT,
    DatabaseUnavailable,
    Deadlines,
    QueryConnection,
    StatementRejected,
    connection_info,
    takes_nobody,
)

from .conftest import Connection
from .process.test_lease import eventually
from .support.pgbouncer import PgBouncer
from .support.postgres import free_port
from .support.proxy import Proxy

WITHIN = Deadlines(statement=5.0, connect=5.0)
Lines = Callable[..., QueryConnection]


@pytest.fixture(params=["direct", "pooled"])
async def lines(request: pytest.FixtureRequest, database: str) -> AsyncIterator[Lines]:
    """Makes lines that are siblings; all that is shown holds through pgbouncer, too."""
    if request.param == "pooled":
        bouncer: PgBouncer = request.getfixturevalue("bouncer")
        database = bouncer.way_to(database)
    siblings: list[QueryConnection] = []

    def make(dsn: str | None = None, deadlines: Deadlines = WITHIN) -> QueryConnection:
        return QueryConnection(dsn or database, "recall-worker test", deadlines, siblings)

    yield make
    for line in siblings:
        await line.close()


async def backend(line: QueryConnection) -> int:
    """Whom the line speaks to."""
    return int((await line.ask("select pg_backend_pid() as pid", {}))[0]["pid"])


VALUES: Mapping[str, Any] = {
    "number": 7,
    "large": 2**40,
    "part": 0.1,
    "yes": True,
    "nothing": None,
    "text": "a'b\\c\"d {e,f} null $1 %s \u202e",
    "texts": ["", "null", None, 'a"b\\c', "{},", " \t\r\n", "\U0001f642"],
    "numbers": [1, None, -(2**31)],
    "parts": [0.1, None, 1e300],
    "ids": [UUID(int=1), None],
    "dates": [datetime(2026, 1, 31, 9, tzinfo=UTC), None],
    "flags": [True, False, None],
}
ASKED = """select %(number)s + 0 as number, %(large)s::bigint as large, %(part)s::float8 as part,
    %(yes)s::boolean as yes,
    %(nothing)s::text as nothing, %(text)s::text as text, %(texts)s::text[] as texts,
        %(numbers)s::integer[] as numbers,
    %(parts)s::float8[] as parts, %(ids)s::uuid[] as ids,
    %(dates)s::timestamptz[] as dates, %(flags)s::boolean[] as flags"""


async def test_values_come_back_as_they_went(lines: Lines) -> None:
    line = lines()
    for _ in range(3):  # The first time it is prepared.
        assert await line.ask(ASKED, VALUES) == [VALUES]
        assert await line.ask(ASKED, VALUES, as_=tuple) == [tuple(VALUES.values())]


async def test_the_reason_is_postgresqls_own(database: str) -> None:
    """Ended by somebody just as the next question is sent, so that the farewell is read with the
    question's own answer."""
    line = QueryConnection(database, "recall-worker test", WITHIN, [])
    for _ in range(3):
        pid = await backend(line)
        # Not awaited: if this loop turned, it would see the farewell before it asks.
        with psycopg.connect(database, autocommit=True) as other:
            other.execute("select pg_terminate_backend(%s, 5000)", [pid])
        with pytest.raises(DatabaseUnavailable, match=r"^terminating connection due to admin"):
            await line.ask("select 1", {})
    await line.close()


async def test_what_has_no_rows(lines: Lines) -> None:
    line = lines()
    assert await line.ask("select where false", {}) == []
    assert await line.ask("delete from sessions", {}, as_=tuple) == []


async def test_one_question_at_a_time(lines: Lines) -> None:
    """However many ask at once: each has its own answer."""
    line = lines()
    answers = await asyncio.gather(
        *(
            line.ask("select %(n)s + 0 as n, pg_sleep(0.002)", {"n": n}, as_=tuple)
            for n in range(50)
        )
    )
    assert [answer[0][0] for answer in answers] == list(range(50))


async def test_much_at_once_goes_both_ways(lines: Lines) -> None:
    """More than the kernel takes in one piece, while the other side answers with as much."""
    line, much = lines(), ["x" * 1000] * 20_000
    rows = await line.ask("select t from unnest(%(much)s::text[]) t", {"much": much}, as_=tuple)
    assert len(rows) == len(much) and {row[0] for row in rows} == {much[0]}


@pytest.mark.parametrize(
    ("statement", "values", "sqlstate"),
    [
        ("select 1 / %(n)s", {"n": 0}, "22012"),
        ("select no_such_column", {}, "42703"),
        ("select %(text)s::text", {"text": "a\0b"}, None),
        ("select %(texts)s::text[]", {"texts": ["\udc00"]}, "22021"),
    ],
)
async def test_a_refusal_costs_nothing_else(
    statement: str, values: Mapping[str, Any], sqlstate: str | None, lines: Lines
) -> None:
    """What PostgreSQL won't have is said; what it had written before is undone, and the same line
    goes on."""
    line = lines()
    await line.ask("select 1", {})
    for _ in range(3):
        with pytest.raises(StatementRejected) as refusal:
            await line.ask(statement, values, after="insert into sessions values ('s', 'ann')")
        assert refusal.value.sqlstate == sqlstate
        assert await line.ask("select id from sessions", {}) == []


async def test_two_statements_are_one_transaction(lines: Lines) -> None:
    line = lines()
    asked = "select id, pg_current_xact_id_if_assigned() is not null as same from sessions"
    assert await line.ask(asked, {}, after="insert into sessions values ('s', 'ann')") == [
        {"id": "s", "same": True}
    ]
    with pytest.raises(StatementRejected):
        await line.ask(asked, {}, after="insert into sessions values ('s', 'ann')")
    assert await line.ask("select id from sessions", {}) == [{"id": "s"}]


async def test_plans_are_kept_for_each_kind_of_value(database: str) -> None:
    """A statement is prepared once for the types it is asked with, also where its first execution
    is refused."""
    line = QueryConnection(database, "recall-worker test", WITHIN, [])
    for _ in range(3):
        with pytest.raises(StatementRejected):
            await line.ask("select 1 / %(n)s", {"n": 0})
        for n in (1, 2**20, 2**40):
            await line.ask("select 1 / %(n)s", {"n": n})
    kept = await line.ask(
        "select count(*) as n from pg_prepared_statements where statement = 'select 1 / $1'", {}
    )
    assert kept == [{"n": 3}]
    await line.close()


async def test_a_line_that_is_cut_is_replaced(database: str, db: Connection) -> None:
    """Idle or in mid-question: whoever asks is told why, and the next one has a new connection; so
    have its siblings, without being told."""
    siblings: list[QueryConnection] = []
    line, sibling = (
        QueryConnection(database, "recall-worker test", WITHIN, siblings) for _ in range(2)
    )
    for in_question in (False, True):
        pid, other = await backend(line), await backend(sibling)
        asking = asyncio.create_task(line.ask("select pg_sleep(30)", {})) if in_question else None
        if asking is not None:
            await eventually(
                db, "select 1 from pg_stat_activity where pid = %s and state = 'active'", [pid]
            )
        await db.execute("select pg_terminate_backend(%s, 5000)", [pid])
        with pytest.raises(DatabaseUnavailable) as outage:
            await (asking or line.ask("select 1", {}))
        assert not outage.value.for_all
        assert ("terminating connection" in outage.value.reason) or not in_question
        assert await backend(line) != pid
        assert await backend(sibling) != other
    for each in siblings:
        await each.close()


async def test_what_is_broken_off_belongs_to_nobody(database: str) -> None:
    """Whoever is cancelled in mid-question leaves no answer behind that the next one could take for
    its own."""
    line = QueryConnection(database, "recall-worker test", WITHIN, [])
    pid = await backend(line)
    asking = asyncio.create_task(line.ask("select pg_sleep(0.2), 'stale' as said", {}))
    await asyncio.sleep(0.05)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert await line.ask("select 'fresh' as said", {}) == [{"said": "fresh"}]
    assert await backend(line) != pid
    await line.close()


@pytest.mark.parametrize("in_question", [False, True])
async def test_a_connection_that_breaks_without_a_word(in_question: bool, database: str) -> None:
    """Nobody says why: it is an outage all the same, and never taken for PostgreSQL's refusal of
    what was asked."""
    async with Proxy(database) as proxy:
        line = QueryConnection(proxy.dsn, "recall-worker test", WITHIN, [])
        await backend(line)
        asking = asyncio.create_task(line.ask("select pg_sleep(30)", {})) if in_question else None
        if asking is not None:
            asked = proxy.asked
            await proxy.until(lambda: proxy.asked > asked)
        proxy.cut()
        proxy.heal()
        with pytest.raises(DatabaseUnavailable):
            await (asking or line.ask("select 1", {}))
        assert await backend(line)
        await line.close()


async def test_a_silence_is_noticed(database: str) -> None:
    """PostgreSQL that says nothing within the deadline is lost, and asked anew over another
    connection."""
    async with Proxy(database) as proxy:
        line = QueryConnection(
            proxy.dsn, "recall-worker test", Deadlines(statement=1.0, connect=2.0), []
        )
        await backend(line)
        proxy.forget(0)
        with pytest.raises(DatabaseUnavailable, match="no answer within the deadline"):
            await line.ask("select 1", {})
        assert await backend(line)
        await line.close()


async def test_a_mark_of_its_own_for_each_line(lines: Lines) -> None:
    """A unique key that is refused is told with its code, as callers tell a race for a slot by
    it."""
    line, id = lines(), str(uuid4())
    await line.ask("insert into sessions values (%(id)s, 'ann')", {"id": id})
    with pytest.raises(StatementRejected) as refusal:
        await line.ask("insert into sessions values (%(id)s, 'ann')", {"id": id})
    assert (refusal.value.sqlstate, refusal.value.of_a_row) == ("23505", True)


# --- deadlines and addresses ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lease", "statement", "connect"),
    [(86_400, 15, 10), (60, 15, 10), (36, 9, 9), (6, 1.5, 2), (4, 1, 2), (1, 1, 2)],
)
def test_deadlines_follow_the_lease(lease: float, statement: float, connect: float) -> None:
    """A silence is noticed, and a new connection tried, before a lease of four seconds or more is
    over."""
    found = Deadlines.within(lease)
    assert (found.statement, found.connect) == (statement, connect)
    if lease >= 4:
        assert lease / 3 + found.statement / SERVER_GIVES_UP_AT < lease * 11 / 12


@pytest.mark.parametrize(
    ("dsn", "within", "each", "whole"),
    [
        ("host=a", 10, 10, 10),
        ("host=a,b", 10, 5, 10),
        ("host=a,b", 2, 2, 4),
        ("host=a,b,c,d,e,f", 10, 2, 12),
        ("", 2, 2, 2),
    ],
)
def test_the_time_to_connect_is_shared_by_the_hosts(
    dsn: str, within: float, each: int, whole: float
) -> None:
    assert connection_info(dsn, "n", within)["connect_timeout"] == each
    assert Deadlines(connect=within).connecting(dsn) == whole


@pytest.mark.slow
async def test_who_is_refused_with_everybody(database: str) -> None:
    """Nobody listening, on any of the hosts, is everybody's trouble; a wrong database, or a host
    that may be there for others, is not."""
    port = free_port()

    async def refused(dsn: str) -> bool:
        with pytest.raises(psycopg.OperationalError) as error:
            await psycopg.AsyncConnection.connect(dsn)
        return takes_nobody(error.value, dsn)

    assert await refused(f"host=127.0.0.1 port={port}")
    assert await refused(f"host=127.0.0.1,127.0.0.1 port={port}")
    assert await refused("host=/nowhere")
    assert not await refused(make_conninfo(database, dbname="no such one"))
    assert not await refused("host=no-such-host.invalid")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        silent = mute.getsockname()[1]
        assert not await refused(f"host=127.0.0.1 port={silent} connect_timeout=2")
        assert not await refused(f"host=127.0.0.1,127.0.0.1 port={port},{silent} connect_timeout=2")
