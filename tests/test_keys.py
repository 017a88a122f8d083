"""Ids of other types than text: uuid, bigint, integer, varchar, and mixed.

The same is done for each: adopt the table, the application's own statements, every command, every
method of `Recalls` and of the ledger. What a text means as an id is asked of PostgreSQL, not
written down here.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import errors

from recall_worker import Recall, RecallExists, Recalls, schema
from recall_worker.database.ledger import Ledger
from recall_worker.keys import Key
from recall_worker.recall import (
    Accepted,
    After,
    Answered,
    Busy,
    Claim,
    Defer,
    Ending,
    Finish,
    Next,
    Settled,
)
from recall_worker.schema import keys as schema_keys

from .conftest import Connection, connected
from .support import postgres
from .support.application import NUMBERS, AlreadyScheduled, Application, create_tables
from .support.daemon import Daemons
from .support.endpoint import Endpoint, Gate, reply
from .test_cli import Said, operate
from .test_statements import LEASE, NAMES, Table, buffers, nodes

HOUR = timedelta(hours=1)
KINDS = [
    ("text", "text"),
    ("varchar", "varchar"),
    ("varchar(40)", "varchar(40)"),
    ("uuid", "uuid"),
    ("bigint", "bigint"),
    ("integer", "integer"),
    ("uuid", "bigint"),
    ("bigint", "text"),
]
"""The types of `id` and of `session_id`."""


def key(type: str, n: int) -> str:
    """The nth id of a type, as PostgreSQL spells it."""
    match type:
        case "uuid":
            return str(UUID(int=0xABCDEF << 96 | n))
        case "bigint":
            return str(2**40 + n)
        case "integer":
            return str(1000 + n)
        case _:
            return f"key {n}"


def own(type: str, id: str) -> Key:
    """The id as Python has it in a column of that type."""
    return UUID(id) if type == "uuid" else int(id) if type in NUMBERS else id


@dataclass(frozen=True)
class Keyed:
    """A migrated database whose ids have these types; session 0 is zoe's, the others are ann's."""

    dsn: str
    id_type: str
    session_type: str

    def id(self, n: int) -> str:
        return key(self.id_type, n)

    def session(self, n: int) -> str:
        return key(self.session_type, n)

    def command(self, *words: str) -> Said:
        """A command that is to succeed."""
        done = operate(self.dsn, *words)
        assert done.status == 0, (words, done)
        return done

    def document(self, *words: str) -> Any:
        return json.loads(self.command(*words, "--json").out)

    def fails(self, *words: str) -> Said:
        """A command that is to fail, with a sentence."""
        done = operate(self.dsn, *words)
        assert done.status == 1, (words, done)
        assert "Error: " in done.err and "Traceback" not in done.err
        return done


def name(kind: tuple[str, str]) -> str:
    return kind[0] if kind[0] == kind[1] else f"{kind[0]}, {kind[1]}"


@pytest.fixture(scope="module")
def templates(server: str) -> Iterator[dict[tuple[str, str], str]]:
    """A migrated database for each pair of types, made when it is first asked for."""
    made: dict[tuple[str, str], str] = {}
    yield made
    for dsn in made.values():
        postgres.drop_database(server, dsn)


def template_of(server: str, templates: dict[tuple[str, str], str], kind: tuple[str, str]) -> str:
    if kind not in templates:
        dsn = postgres.create_database(server)
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(create_tables(*kind).encode())
            for n in range(6):
                conn.execute(
                    "insert into sessions values (%s, %s)",
                    (key(kind[1], n), "zoe" if n == 0 else "ann"),
                )
        schema.migrate(dsn)
        templates[kind] = dsn
    return templates[kind]


@pytest.fixture(params=KINDS, ids=name)
def keyed(
    request: pytest.FixtureRequest, server: str, templates: dict[tuple[str, str], str]
) -> Iterator[Keyed]:
    with postgres.database(server, template_of(server, templates, request.param)) as dsn:
        yield Keyed(dsn, *request.param)


@pytest.fixture
async def app(keyed: Keyed) -> AsyncIterator[Application]:
    async with await Application.connect(keyed.dsn, keyed.id_type, keyed.session_type) as opened:
        yield opened


async def put(db: Connection, keyed: Keyed, n: int, due: float = -1.0, **columns: Any) -> str:
    """Insert recall n of session n, due in so many seconds. Returns its id."""
    row = {"call_type": "once", "interval_seconds": None, "status": "pending"} | columns
    await db.execute(
        "insert into session_recalls (id, session_id, trigger_at, additional_context_message, "
        f"created_at, updated_at, {', '.join(row)}) values (%s, %s, now() + %s * interval '1 "
        f"second', 'look again', now(), now(){', %s' * len(row)})".encode(),
        (keyed.id(n), keyed.session(n), due, *row.values()),
    )
    return keyed.id(n)


async def row_of(db: Connection, id: str) -> dict[str, Any]:
    found = await (
        await db.execute("select * from session_recalls where id::text = %s", (id,))
    ).fetchone()
    assert found is not None
    return found


# --- adopted --------------------------------------------------------------------------------------

SEED = """
insert into session_recalls values
    ({0}, {5}, 'once', now() - interval '1 minute', null, null, 'm', 'pending', now(), now()),
    ({1}, {6}, 'recurring', now() + interval '1 hour', 60, 'c', 'm', 'pending', now(), now()),
    ({2}, {5}, 'immediate', now() - interval '1 day', null, null, 'm', 'fired', now(), now()),
    ({3}, {5}, 'recurring', now() - interval '1 day', 60, null, 'm', 'cancelled', now(), now()),
    ({4}, {7}, 'recurring', now() - interval '1 day', 0, null, 'm', 'pending', now(), now())
"""
"""As the application left it: in every state, and one with an interval that makes no sense."""


@pytest.mark.parametrize("kind", KINDS, ids=name)
async def test_a_table_with_such_keys_is_adopted_as_it_stands(
    kind: tuple[str, str], empty_database: str
) -> None:
    """Neither rows nor types change, nothing is left to do, and what was due is claimed under its
    id as text."""
    keyed = Keyed(empty_database, *kind)
    async with connected(empty_database) as db:
        await db.execute(create_tables(*kind).encode())
        ids = [f"'{keyed.id(n)}'" for n in range(5)]
        sessions = [f"'{keyed.session(n)}'" for n in range(3)]
        for session in sessions:
            await db.execute(f"insert into sessions values ({session}, 'ann')".encode())
        await db.execute(SEED.format(*ids, *sessions).encode())
        before = await (await db.execute("select * from session_recalls order by id")).fetchall()

        assert "0020 keys" in schema.migrate(empty_database)
        assert schema.pending(empty_database) == []
        assert schema.migrate(empty_database) == []
        after = await (await db.execute("select * from session_recalls order by id")).fetchall()
        assert [{k: v for k, v in row.items() if k in before[0]} for row in after] == before
        types = await (
            await db.execute(
                "select format_type(atttypid, atttypmod) as type from pg_attribute where attrelid "
                "= 'session_recalls'::regclass and attname in ('id', 'session_id') order by attname"
            )
        ).fetchall()
        assert [row["type"].replace("character varying", "varchar") for row in types] == [*kind]

    ledger = Ledger(empty_database, "w", LEASE)
    claims = {claim.id: claim for claim in (await ledger.claim(10)).claims}
    await ledger.close()
    assert set(claims) == {keyed.id(0), keyed.id(4)}
    assert claims[keyed.id(0)].session_id == keyed.session(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("session_type", "sessions", "fits"),
    [
        ("uuid", "uuid", True),
        ("bigint", "bigint", True),
        ("varchar(40)", "text", True),
        ("uuid", "text", False),
        ("text", "uuid", False),
        ("bigint", "integer", False),
    ],
)
def test_a_foreign_key_is_between_ids_of_one_type(
    session_type: str, sessions: str, fits: bool, empty_database: str
) -> None:
    """`migrate --foreign-key` adds one between ids of these types, too, or says that they
    differ."""
    table = create_tables("uuid", session_type).replace("references sessions(id)", "")
    with psycopg.connect(empty_database, autocommit=True) as conn:
        conn.execute(table.replace(" on delete cascade", "").encode())
        conn.execute(
            f"drop table sessions; create table sessions (id {sessions} primary key)".encode()
        )
    if fits:
        done = schema.migrate(empty_database, foreign_key="sessions")
        assert [step for step in done if step.startswith("foreign key")]
    else:
        with pytest.raises(schema.Refused, match="same type"):
            schema.migrate(empty_database, foreign_key="sessions")
        schema.migrate(empty_database)
    assert schema.pending(empty_database) == []


@pytest.mark.slow
async def test_domains_of_the_applications_are_taken_for_the_types_below_them(
    empty_database: str,
) -> None:
    """Also one over another, with a check that an id which is asked for does not pass."""
    tables = create_tables("recall_ref", "session_ref")
    async with connected(empty_database) as db:
        await db.execute(
            b"create domain anything as varchar(40);"
            b"create domain recall_ref as anything check (value like 'r%');"
            b"create domain session_ref as uuid check (value is not null)"
        )
        await db.execute(tables.encode())
        schema.migrate(empty_database)
        assert schema.pending(empty_database) == []
        session = key("uuid", 1)
        await db.execute("insert into sessions values (%s, 'ann')", (session,))
        made = await Recalls().schedule(UUID(session), "m", id="r1", conn=db)
        assert (made.id, made.session_id) == ("r1", session)
        with pytest.raises(RecallExists):
            await Recalls().schedule(session, "m", id="r2", conn=db)
        assert await Recalls().list(session_id="abc", conn=db) == []
        assert not await Recalls().mark_fired("x", conn=db)
        ledger = Ledger(empty_database, "w", LEASE)
        assert [claim.id for claim in (await ledger.claim(1)).claims] == ["r1"]
        await ledger.close()


@pytest.mark.parametrize(
    "taken",
    [
        "create function recall_id(text) returns text language sql as 'select $1'",
        "create domain recall_session_type as text",
        "create type recall_id_type as enum ('a')",
    ],
)
def test_the_applications_own_functions_and_types_are_not_replaced(
    taken: str, empty_database: str
) -> None:
    """One of a name that recall-worker needs is named before anything is changed."""
    with psycopg.connect(empty_database, autocommit=True) as conn:
        conn.execute(create_tables("uuid").encode())
        conn.execute(taken.encode())
    with pytest.raises(schema.Refused, match="did not record"):
        schema.migrate(empty_database)


def test_a_function_that_came_later_is_not_replaced(database: str) -> None:
    """Where the application, or a tool, has put another one in its place, `migrate` says so."""
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(
            b"drop function recall_id(text); create function recall_id(text) returns text "
            b"language sql as 'select $1'"
        )
    assert schema.pending(database) == [schema_keys.STEP]
    with pytest.raises(schema.SchemaError, match=r"function public\.recall_id\(text\)") as refused:
        schema.migrate(database)
    assert "Rename it" in refused.value.hint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("text", "text"), ("uuid", "uuid")),
        (("integer", "integer"), ("bigint", "bigint")),
        (("bigint", "text"), ("text", "uuid")),
        (("text", "text"), ("varchar", "varchar(40)")),
    ],
    ids=lambda kind: name(kind),
)
async def test_migrate_follows_a_column_that_is_given_another_type(
    before: tuple[str, str], after: tuple[str, str], empty_database: str
) -> None:
    """The application alters its columns later: nothing of ours is in its way, `--check` says what
    is to be done, `migrate` does it, and a worker that had prepared its statements goes on."""
    old, new = Keyed(empty_database, *before), Keyed(empty_database, *after)
    ledger = Ledger(empty_database, "w", LEASE)
    tables = create_tables(*before).replace("references sessions(id) on delete cascade", "")
    tables = re.sub(r"create table if not exists sessions [^;]*;", "", tables)
    async with connected(empty_database) as db:
        await db.execute(tables.encode())
        schema.migrate(empty_database)
        await put(db, old, 0, due=3600.0)
        assert (await ledger.claim(10)).claims == []

        await db.execute(b"delete from session_recalls")
        await db.execute(
            f"alter table session_recalls "
            f"alter column id type {after[0]} using id::text::{after[0]}, "
            f"alter column session_id type {after[1]} using session_id::text::{after[1]}".encode()
        )
        assert schema.pending(empty_database) == [schema_keys.STEP]
        assert schema.migrate(empty_database) == [schema_keys.STEP]
        assert schema.pending(empty_database) == [] == schema.migrate(empty_database)

        await put(db, new, 1)
        claims: list[Claim] = []
        for _ in range(3):
            try:
                claims = (await ledger.claim(10)).claims
                break
            except Exception as error:
                # The domain that its statement was prepared with is gone: once.
                assert "cache lookup failed" in str(error)
        assert [(claim.id, claim.session_id) for claim in claims] == [(new.id(1), new.session(1))]
    await ledger.close()


@pytest.mark.slow
async def test_the_change_of_a_type_that_the_document_shows(empty_database: str) -> None:
    """docs/adoption.md: from text to uuid, with the foreign key, and `migrate` afterwards."""
    document = (Path(__file__).parents[1] / "docs/adoption.md").read_text(encoding="utf-8")
    (change,) = re.findall(r"```sql\n(begin;.*?commit;\n)```", document, re.DOTALL)
    session = key("uuid", 1)
    async with connected(empty_database) as db:
        await db.execute(create_tables().encode())
        await db.execute(f"insert into sessions values ('{session}', 'ann')".encode())
        schema.migrate(empty_database)
        made = await Recalls().schedule(session, "m", conn=db)
        await db.execute(change.encode())
        assert schema.migrate(empty_database) == [schema_keys.STEP]
        assert [r.id for r in await Recalls().list(session_id=session, conn=db)] == [made.id]
        assert await Recalls().list(session_id="abc", conn=db) == []


@pytest.mark.parametrize(
    "loss",
    [
        "drop domain recall_id_type cascade",
        "drop function recall_session(text)",
        "drop function recall_id(text); drop domain recall_id_type",
    ],
)
def test_migrate_makes_what_was_dropped_anew(loss: str, database: str) -> None:
    """A domain or function that a tool dropped, or replaced, is noticed and made again."""
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(loss.encode())
    assert schema.pending(database) == [schema_keys.STEP] == schema.migrate(database)
    assert schema.pending(database) == []


# --- the application's own statements -------------------------------------------------------------


async def test_the_applications_statements_work_as_before(
    keyed: Keyed, app: Application, db_of: Connection
) -> None:
    """Each of them, beside a worker: also the insert from inside a run, which the trigger lets
    through, and the refusal that it reads."""
    soon = datetime.now(UTC) + HOUR
    await app.create_tables()
    await app.schedule(keyed.session(1), "recurring", soon, "m", 60, id=keyed.id(1))
    with pytest.raises(AlreadyScheduled):
        await app.schedule(keyed.session(1), "once", soon, "m", id=keyed.id(2))
    assert await app.skip_next(keyed.session(1))
    assert await app.sessions_with_pending([keyed.session(n) for n in (1, 2)]) == {
        own(keyed.session_type, keyed.session(1))
    }
    assert len(await app.list_by_session(keyed.session(1))) == 1
    assert len(await app.list_by_user("ann")) == 1
    assert await app.reschedule(keyed.id(1), soon) and await app.next_trigger() == soon
    assert await app.cancel_session(keyed.session(1)) == 1

    await app.schedule(keyed.session(2), "once", datetime.now(UTC), "m", id=keyed.id(3))
    ledger = Ledger(keyed.dsn, "w", LEASE)
    claims = (await ledger.claim(1)).claims
    await ledger.close()
    assert [claim.id for claim in claims] == [keyed.id(3)]
    await app.schedule(keyed.session(2), "once", soon, "the next link", id=keyed.id(4))
    assert (await row_of(db_of, keyed.id(3)))["status"] == "running"
    assert await app.mark_fired(keyed.id(3)) and await app.mark_cancelled(keyed.id(4))
    assert await app.delete_session(keyed.session(2)) == 1
    assert await app.list_by_session(keyed.session(2)) == []


@pytest.fixture
async def db_of(keyed: Keyed) -> AsyncIterator[Connection]:
    """A connection for looking at the database."""
    async with connected(keyed.dsn) as conn:
        yield conn


# --- the ledger -----------------------------------------------------------------------------------


def answered(claim: Claim) -> Ending:
    return Ending(claim, Answered(200), 0.1, 0.2, time.monotonic())


async def test_a_worker_runs_them_to_every_end(keyed: Keyed, db_of: Connection) -> None:
    """Claimed, renewed, accepted, deferred, settled, taken up from a dead worker, cancelled in
    mid-run: each row becomes what it becomes with text ids, and its calls are on record under its
    id as text."""
    for n in range(1, 5):
        await put(db_of, keyed, n, due=-10.0 + n)
    # Of a short lease the grace is short, too: PostgreSQL has run for longer.
    ledger, other = Ledger(keyed.dsn, "w", LEASE), Ledger(keyed.dsn, "other", 0.03)
    try:
        claims = (await ledger.claim(10)).claims
        ids = [keyed.id(n) for n in range(1, 5)]
        assert [claim.id for claim in claims] == ids
        assert [claim.session_id for claim in claims] == [keyed.session(n) for n in range(1, 5)]
        leases = {claim.id: claim.lease for claim in claims}
        assert await ledger.renew(leases, {ids[0]: 0.1}) == dict.fromkeys(ids, "renewed")
        assert await ledger.message(claims[0]) == "look again" and await ledger.sent(claims[0])
        assert await ledger.accept(claims[0], Accepted("run-1", 202), 0.1) is True
        await db_of.execute(
            "update session_recalls set status = 'cancelled' where id::text = %s", (ids[1],)
        )
        assert await ledger.check_leases(leases) == {ids[1]: "cancelled"}
        settled = await ledger.settle(
            [
                (answered(claims[0]), Finish("fired", None)),
                (answered(claims[1]), Finish("fired", None)),
                (
                    Ending(claims[2], Busy(409), 0.1, 0.2, time.monotonic()),
                    Defer(After(60.0), "the session is busy"),
                ),
            ]
        )
        assert settled[0] == Settled("fired") and settled[2] == Settled("pending")
        rows = [await row_of(db_of, id) for id in ids]
        assert [row["status"] for row in rows] == ["fired", "cancelled", "pending", "pending"]

        # The worker of the fourth dies.
        await db_of.execute(
            "update session_recalls set lease_until = now() - interval '1 minute', leased_by = "
            "'dead' where id::text = %s",
            (ids[3],),
        )
        ended = (await other.ended_leases()).unanswered
        assert ended == [ids[3]]
        taken = (await other.take_up(ended)).claims
        assert [(claim.id, claim.taken_from) for claim in taken] == [(ids[3], "dead")]
        assert await ledger.renew({ids[3]: leases[ids[3]]}) == {ids[3]: "lost"}
        await other.settle_waiting(answered(taken[0]), Finish("fired", None))
        calls = await (
            await db_of.execute(
                "select recall_id, session_id, outcome from recall_attempts order by recall_id, "
                "outcome"
            )
        ).fetchall()
        assert {(c["recall_id"], c["session_id"], c["outcome"]) for c in calls} == {
            (ids[0], keyed.session(1), "accepted"),
            (ids[0], keyed.session(1), "answered"),
            (ids[1], keyed.session(2), "answered"),
            (ids[2], keyed.session(3), "busy"),
            (ids[3], keyed.session(4), "unknown"),
            (ids[3], keyed.session(4), "answered"),
        }
    finally:
        await ledger.close()
        await other.close()


async def test_cron_recalls_are_planned_and_planned_anew(keyed: Keyed, db_of: Connection) -> None:
    """What the worker does to rows that wait: put on a moment after a move, planned anew by newer
    time zone data, pruned when they are over."""
    await put(
        db_of, keyed, 1, due=86400.0, call_type="recurring", cadence="cron", cron="0 9 * * *",
        time_zone="Europe/Berlin", interval_seconds=86400,
    )  # fmt: skip
    await db_of.execute("update session_recalls set trigger_at = trigger_at + interval '1 minute'")
    ledger = Ledger(keyed.dsn, "w", LEASE)
    try:
        moved = await ledger.moved()
        assert [(claim.id, claim.session_id) for claim in moved] == [
            (keyed.id(1), keyed.session(1))
        ]
        assert await ledger.settle_moved([(moved[0], Next(2, After(60.0)))]) == []
        stale = await ledger.stale([])
        assert [recall.id for recall in stale] == [keyed.id(1)]
        assert await ledger.stale([keyed.id(1)]) == []
        assert await ledger.replan([(stale[0], None, False)]) == {keyed.id(1)}
        assert (await row_of(db_of, keyed.id(1)))["zone_data"] is not None
        await ledger.heartbeat(FACTS, {}, [keyed.id(1)])
        assert (await ledger.backlog()).overdue == 0
    finally:
        await ledger.close()


FACTS = {
    "host": "h",
    "pid": 1,
    "version": "1",
    "slots": 3,
    "running": 0,
    "breaker": "closed",
    "bell": "listening",
}


# --- `Recalls` ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelled", ["as text", "as the column has it"])
async def test_every_method_of_recalls_takes_and_returns_them(
    spelled: str, keyed: Keyed, db_of: Connection
) -> None:
    """Given as text or as the column has it, returned as text, in PostgreSQL's spelling."""

    def id(n: int) -> Key:
        text = keyed.id(n)
        return text if spelled == "as text" else own(keyed.id_type, text)

    def session(n: int) -> Key:
        text = keyed.session(n)
        return text if spelled == "as text" else own(keyed.session_type, text)

    def is_one(recall: Recall | None, n: int) -> bool:
        return recall is not None and (recall.id, recall.session_id) == (
            keyed.id(n),
            keyed.session(n),
        )

    soon = datetime.now(UTC) + HOUR
    recalls = Recalls()
    async with await psycopg.AsyncConnection.connect(keyed.dsn) as conn:
        made = await recalls.schedule(session(1), "m", every=HOUR, id=id(1), conn=conn)
        assert is_one(made, 1)
        with pytest.raises(RecallExists):
            await recalls.schedule(session(1), "m", id=id(2), conn=conn)
        with pytest.raises(errors.UniqueViolation):
            await recalls.schedule(session(2), "m", id=id(1), conn=conn)
        assert await recalls.skip_next(session(1), conn=conn)
        assert await recalls.reschedule(id(1), soon, conn=conn)
        assert is_one(await recalls.update(id(1), times=3, conn=conn), 1)
        assert is_one(await recalls.update(id(1), message="another", conn=conn), 1)
        assert len(await recalls.preview(id(1), count=2, conn=conn)) == 2
        assert await recalls.next_trigger_at(conn=conn) == soon
        assert await recalls.sessions_with_pending([session(1), session(2)], conn=conn) == {
            keyed.session(1)
        }
        for asked in ({"session_id": session(1)}, {"user_id": "ann"}, {}):
            assert [is_one(r, 1) for r in await recalls.list(**asked, conn=conn)] == [True]
        assert [
            is_one(r, 1)
            for r in await recalls.list(session_id=session(1), user_id="ann", conn=conn)
        ] == [True]
        assert await recalls.list(session_id=session(1), user_id="zoe", conn=conn) == []
        assert await recalls.cancel(session(1), conn=conn) == 1
        assert not await recalls.mark_fired(id(1), conn=conn)

        await recalls.schedule(session(3), "m", id=id(3), conn=conn)
        assert is_one((await recalls.due(conn=conn))[0], 3)
        assert await recalls.mark_fired(id(3), conn=conn)
        await recalls.schedule(session(4), "m", id=id(4), conn=conn)
        assert await recalls.mark_cancelled(id(4), conn=conn)
        await conn.commit()
    actions = await (await db_of.execute("select recall_id, detail from recall_actions")).fetchall()
    assert {action["recall_id"] for action in actions} == {keyed.id(n) for n in (1, 3, 4)}
    sessions = [a["detail"]["session_id"] for a in actions if "session_id" in a["detail"]]
    assert sessions == [keyed.session(n) for n in (1, 3, 4)]


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.slow
async def test_every_command_takes_and_prints_them(keyed: Keyed, db_of: Connection) -> None:
    """Each command that names a recall or a session; in JSON every id is a string."""
    one, session = keyed.id(1), keyed.session(1)
    await put(db_of, keyed, 1, 3600.0, call_type="recurring", interval_seconds=60)
    await put(db_of, keyed, 2)
    listed = keyed.document("list")
    assert {(r["id"], r["session_id"]) for r in listed} == {
        (keyed.id(n), keyed.session(n)) for n in (1, 2)
    }
    for words in (["--session", session], ["--user", "ann", "--session", session]):
        assert [r["id"] for r in keyed.document("list", *words)] == [one]
    assert len(keyed.document("list", "--user", "ann")) == 2
    assert keyed.document("list", "--user", "zoe") == []
    assert keyed.document("show", one)["recall"]["id"] == one
    assert f" {one}\n" in keyed.command("show", one).out
    why = keyed.document("why", one)
    assert (why["id"], why["evidence"]["session_id"]) == (one, session)
    assert keyed.document("preview", one, "--count", "1")["id"] == one
    for words in (
        ["skip", one],
        ["skip", "--session", session],
        ["pause", one],
        ["resume", one],
        ["fire", one],
        ["reschedule", one, "--in", "1h"],
        ["edit", one, "--every", "2h"],
        ["edit", one, "--comment", "note"],
        ["cancel", one, "--yes"],
        ["retry", one],
        ["cancel", "--session", session, "--yes"],
    ):
        done = keyed.document(*words)
        assert [(r["id"], r["session_id"]) for r in done] == [(one, session)], words
        if words[0] in ("pause", "resume"):
            assert one in keyed.command(*words).out
    assert one in keyed.fails("pause", one).err
    assert session in keyed.fails("cancel", "--session", session, "--yes").err
    actions = await db_of.execute("select distinct recall_id from recall_actions")
    assert [action["recall_id"] for action in await actions.fetchall()] == [one]

    # The one that is due waits behind one that was there before it.
    await db_of.execute(
        "update session_recalls set lease = gen_random_uuid(), lease_until = now() + interval "
        "'1 hour', status = 'running' where id::text = %s",
        (keyed.id(2),),
    )
    await db_of.execute(
        "insert into session_recalls (id, session_id, call_type, trigger_at, "
        "additional_context_message, created_at, updated_at) "
        "values (%s, %s, 'once', now(), 'm', now(), now())",
        (keyed.id(3), keyed.session(2)),
    )
    assert f"recall {keyed.id(2)}" in keyed.command("why", keyed.id(3)).out.replace("\n", " ")
    assert keyed.document("stats")["live"]["waiting"] == 1
    assert "Deleted" in keyed.command("prune", "--older-than", "30d", "--yes").err


async def test_doctor_names_the_recall_that_is_overdue(
    endpoint: Endpoint, server: str, templates: dict[tuple[str, str], str]
) -> None:
    """In its spelling as text."""
    kind = ("uuid", "bigint")
    with postgres.database(server, template_of(server, templates, kind)) as dsn:
        async with connected(dsn) as db:
            id = await put(db, Keyed(dsn, *kind), 1, -3600.0)
        environ = {"RECALL_RUN_URL": endpoint.url}
        done = await asyncio.to_thread(operate, dsn, "doctor", environ=environ)
    assert id in done.out + done.err and "Traceback" not in done.err


async def test_what_is_over_is_pruned_and_what_lives_keeps_its_calls(
    keyed: Keyed, db_of: Connection
) -> None:
    """The records of calls are looked up by ids as text, also of ids that the column can't hold
    (any more)."""
    await put(db_of, keyed, 1, status="fired")
    await put(db_of, keyed, 2, 3600.0)
    await db_of.execute("update session_recalls set updated_at = now() - interval '9 days'")
    await db_of.execute(
        "insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome, session_id, "
        "worker, lease, scheduled_for, ended_at, settled) "
        "select id, 1, 0, 1, 'busy', 's', 'w', gen_random_uuid(), now(), now() - interval '9 days',"
        " 'pending' from unnest(%s::text[]) as t (id)",
        ([keyed.id(1), keyed.id(2), "of another time"],),
    )
    done = keyed.document("prune", "--older-than", "1d", "--yes")
    assert (done["recalls"], done["calls"]) == (1, 2)
    assert [call["recall_id"] for call in keyed.document("show", keyed.id(2))["calls"]] == [
        keyed.id(2)
    ]


# --- ids that a type can't hold -------------------------------------------------------------------

ODD = [
    "abc",
    "",
    " ",
    "0",
    "-1",
    "99999999999999999999",
    "2147483648",
    " 1001",
    "1001 ",
    "+1001",
    "01001",
    "1e3",
    "1001.0",
    "0x3e9",
    "1_001",
    "\u0661\u0660\u0660\u0661",
    "infinity",
    "null",
    "' or true --",
    "%s",
    "{}",
    "1001,1002",
]
"""Neighbours of 1001 among integers, and texts that are none."""
SPELLINGS = ["{}", "{}x", " {}", "{{{}}}"]


def odd_ids(id: str) -> list[str]:
    """Texts that are, or look like, an id: PostgreSQL decides which."""
    spelled = [spelling.format(id) for spelling in SPELLINGS]
    return list(dict.fromkeys([*ODD, *spelled, id.upper(), id.replace("-", "")]))


def few(id: str) -> list[str]:
    """The id, other spellings of it, and texts that are none."""
    return list(dict.fromkeys([id, id.upper(), f" {id}", f"+{id}", "abc", "", "9" * 20]))


def read_as(conn: psycopg.Connection[Any], type: str, text: str) -> str | None:
    """How PostgreSQL spells a text that it reads as a value of this type; None where it can't."""
    try:
        row = conn.execute(f"select %s::text::{type}::text".encode(), (text,)).fetchone()
    except errors.DataError:
        return None
    assert row is not None
    return str(row[0])


async def test_a_text_is_read_as_postgresql_reads_it(keyed: Keyed, db_of: Connection) -> None:
    """Null where the type can't hold it; else the same value, in whatever spelling."""
    with psycopg.connect(keyed.dsn, autocommit=True) as conn:
        for reader, type, id in (
            ("recall_id", keyed.id_type, keyed.id(1)),
            ("recall_session", keyed.session_type, keyed.session(1)),
        ):
            texts = odd_ids(id)
            rows = conn.execute(
                f"select {reader}(given)::text from unnest(%s::text[]) as t (given)".encode(),
                (texts,),
            ).fetchall()
            base = re.sub(r"\(.*", "", type)  # A longer varchar is no error: it is nobody's id.
            expected = {text: read_as(conn, base, text) for text in texts}
            assert dict(zip(texts, [row[0] for row in rows], strict=True)) == expected


async def test_an_id_that_the_type_cant_hold_is_not_found(keyed: Keyed, db_of: Connection) -> None:
    """By every method and command, without a traceback; what PostgreSQL reads as the same value is
    found, and is named in PostgreSQL's spelling."""
    recurring = {"call_type": "recurring", "interval_seconds": 60}
    id, session = await put(db_of, keyed, 1, 3600.0, **recurring), keyed.session(1)
    recalls = Recalls()
    with psycopg.connect(keyed.dsn, autocommit=True) as conn:
        ids = {text: read_as(conn, keyed.id_type, text) == id for text in few(id)}
        sessions = {
            text: read_as(conn, keyed.session_type, text) == session for text in few(session)
        }
    async with await psycopg.AsyncConnection.connect(keyed.dsn) as conn:
        for text, found in ids.items():
            assert (await recalls.update(text, times=3, conn=conn) is not None) == found, text
            assert await recalls.reschedule(text, datetime.now(UTC), conn=conn) == found, text
            if not found:
                assert not await recalls.mark_fired(text, conn=conn)
                with pytest.raises((LookupError, ValueError)):
                    await recalls.preview(text, conn=conn)
        for text, found in sessions.items():
            listed = await recalls.list(session_id=text, conn=conn)
            assert [recall.id for recall in listed] == [id] * found, text
            pending = await recalls.sessions_with_pending([text], conn=conn)
            assert pending == ({session} if found else set()), text
            if not found:
                assert await recalls.cancel(text, conn=conn) == 0
                assert not await recalls.skip_next(text, conn=conn)
        await conn.rollback()
    for text, found in ids.items():
        shown = operate(keyed.dsn, "show", text, "--json")
        assert shown.status == (0 if found else 1), (text, shown)
        if found:
            assert shown.document["recall"]["id"] == id
        else:
            assert f"there is no recall {text}" in shown.err


@pytest.mark.parametrize(
    ("type", "user", "found"),
    [
        ("bigint", "7", True),
        ("bigint", "abc", False),
        ("uuid", "7", False),
        ("integer", "9" * 20, 0),
    ],
)
async def test_a_user_that_the_type_cant_hold_has_no_recalls(
    type: str, user: str, found: bool, empty_database: str
) -> None:
    """The type of sessions.user_id is the application's, too."""
    async with connected(empty_database) as db:
        tables = create_tables("uuid", "bigint").replace("user_id text", f"user_id {type}")
        await db.execute(tables.encode())
        owner = key("uuid", 1) if type == "uuid" else "7"
        await db.execute(f"insert into sessions values (1, '{owner}')".encode())
        schema.migrate(empty_database)
        await Recalls().schedule(1, "m", conn=db)
        assert len(await Recalls().list(user_id=user, conn=db)) == found
        listed = operate(empty_database, "list", "--user", user, "--json")
        assert listed.status == 0 and len(listed.document) == found


async def test_sessions_whose_ids_have_another_type_are_joined_as_text(
    empty_database: str,
) -> None:
    """Without a foreign key the two may differ: `list --user` finds what belongs together."""
    async with connected(empty_database) as db:
        await db.execute(create_tables("bigint", "uuid").encode())
        await db.execute(
            b"alter table session_recalls drop constraint session_recalls_session_id_fkey;"
            b"alter table sessions alter column id type text"
        )
        session = key("uuid", 1)
        await db.execute(
            f"insert into sessions values ('{session.upper()}', 'ann'), ('abc', 'ann')".encode()
        )
        schema.migrate(empty_database)
        await Recalls().schedule(session, "m", id=1, conn=db)
        assert [r.id for r in await Recalls().list(user_id="ann", conn=db)] == ["1"]


@pytest.mark.parametrize("words", ["why", "pause", "fire", "retry", "cancel", "skip", "resume"])
def test_of_several_ids_the_good_ones_are_done(
    words: str, server: str, templates: dict[tuple[str, str], str]
) -> None:
    """One bad id does not strand the others; a second spelling of a good one is not bad."""
    kind = ("uuid", "bigint")
    with postgres.database(server, template_of(server, templates, kind)) as dsn:
        keyed = Keyed(dsn, *kind)
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(
                "insert into session_recalls (id, session_id, call_type, trigger_at, "
                "interval_seconds, additional_context_message, status, created_at, updated_at) "
                "values (%s, %s, 'recurring', now() + interval '1 hour', 60, 'm', %s, "
                "now(), now())",
                (keyed.id(1), keyed.session(1), "cancelled" if words == "retry" else "pending"),
            )
        if words == "why":
            assert keyed.id(1) in json.dumps(keyed.document("why", keyed.id(1).upper()))
            assert "there is no recall abc" in keyed.fails("why", "abc").err
            return
        done = keyed.fails(words, "abc", keyed.id(1).upper(), "{" + keyed.id(1) + "}", "1")
        assert done.out.split() == [keyed.id(1)]
        assert "there is no recall abc; there is no recall 1" in done.err
        assert done.err.count("there is no recall") == 2


@pytest.mark.parametrize(
    ("session_type", "session"),
    [("uuid", "abc"), ("bigint", "99999999999999999999"), ("integer", "2147483648"), ("uuid", "1")],
)
async def test_no_recall_is_scheduled_for_a_session_that_cant_be(
    session_type: str, session: str, server: str, templates: dict[tuple[str, str], str]
) -> None:
    """Refused with a sentence that names the column's type; nothing is inserted."""
    kind = (session_type, session_type)
    with postgres.database(server, template_of(server, templates, kind)) as dsn:
        async with await psycopg.AsyncConnection.connect(dsn) as conn:
            for id in (key(session_type, 1), "abc"):
                with pytest.raises(ValueError, match=rf"(is|session_id is) {session_type}"):
                    await Recalls().schedule(session, "m", id=id, conn=conn)
            await conn.execute(b"select")  # The caller's transaction goes on.
        if session_type == "uuid":
            refused = Keyed(dsn, *kind).fails("schedule", session, "m")
            assert f"{session!r} can't be a session's id" in refused.err
            assert "session_recalls.session_id is uuid" in refused.err


# --- ids of new recalls ---------------------------------------------------------------------------

UUIDS = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"
NEW_IDS = [
    ("text", UUIDS),
    ("varchar", UUIDS),
    ("varchar(36)", UUIDS),
    ("uuid", UUIDS),
    ("uuid default gen_random_uuid()", UUIDS),
    ("varchar(35)", "[0-9a-f]{35}"),
    ("varchar(16)", "[0-9a-f]{16}"),
    ("varchar(20) default 'r' || floor(random() * 1e9)", r"r\d+"),
    ("varchar(15)", None),
    ("bigint", None),
    ("integer", None),
    ("bigserial", "1"),
    ("serial", "1"),
    ("bigint generated by default as identity", "1"),
    ("integer generated always as identity", "1"),
    ("bigint default 7", "7"),
]
"""Types of id, and what a new one looks like; None: there has to be one."""


@pytest.mark.parametrize(("type", "expected"), NEW_IDS, ids=[type for type, _ in NEW_IDS])
async def test_ids_are_invented_where_the_column_takes_them(
    type: str, expected: str | None, empty_database: str
) -> None:
    """A random one where it fits, else the column's default, else a refusal that says so: by
    `Recalls` and by `schedule`."""
    async with connected(empty_database) as db:
        await db.execute(create_tables(type).encode())
        await db.execute(b"insert into sessions values ('s', 'ann')")
        schema.migrate(empty_database)
        recalls = Recalls()
        if expected is None:
            with pytest.raises(ValueError, match=r"give an id: session_recalls\.id is") as refused:
                await recalls.schedule("s", "m", conn=db)
            assert "without a default" in str(refused.value)
            done = Keyed(empty_database, "text", "text").fails("schedule", "s", "m")
            assert str(refused.value) in done.err and "Try: " in done.err
            given = await recalls.schedule("s", "m", id="12", conn=db)
            assert given.id == "12"
            return
        made = await recalls.schedule("s", "m", conn=db)
        assert re.fullmatch(expected, made.id)
        if "always" in type:
            with pytest.raises(ValueError, match="generated"):
                await recalls.schedule("s", "m", id=12, conn=db)
        await db.execute(b"delete from session_recalls")
        if not type.endswith("default 7"):
            expected = expected.replace("1", "2") if expected == "1" else expected
        printed = Keyed(empty_database, "text", "text").command("schedule", "s", "m").out.strip()
        assert re.fullmatch(expected, printed)


@pytest.mark.parametrize(
    ("type", "id"),
    [
        ("uuid", "abc"),
        ("bigint", "abc"),
        ("integer", 2**31),
        ("varchar(16)", "seventeen letters"),
        ("bigint", UUID(int=1)),
    ],
)
async def test_an_id_that_does_not_fit_is_refused(type: str, id: Key, empty_database: str) -> None:
    """With a sentence that names the id and the column's type; the caller's transaction goes on."""
    async with await psycopg.AsyncConnection.connect(empty_database) as conn:
        await conn.execute(create_tables(type).encode())
        await conn.execute(b"insert into sessions values ('s', 'ann')")
        await conn.commit()
        schema.migrate(empty_database)
        with pytest.raises(ValueError, match=r"does not fit session_recalls\.id") as refused:
            await Recalls().schedule("s", "m", id=id, conn=conn)
        assert repr(str(id)) in str(refused.value)
        assert await Recalls().list(conn=conn) == []


@pytest.mark.slow
async def test_a_column_that_is_given_another_type_is_noticed_by_recalls(
    empty_database: str,
) -> None:
    """What it remembers of the columns is asked anew before it refuses anything."""
    async with connected(empty_database) as db:
        await db.execute(create_tables().encode())
        await db.execute(b"insert into sessions values ('s', 'ann')")
        schema.migrate(empty_database)
        recalls = Recalls()
        for change, expected in (
            ("select", UUIDS),
            ("alter table session_recalls alter id type varchar(20)", "[0-9a-f]{20}"),
            (
                "alter table session_recalls alter id type bigint using 1; "
                "alter table session_recalls alter id add generated always as identity",
                "1",
            ),
            (
                "alter table session_recalls alter id drop identity; "
                "alter table session_recalls alter id type uuid using gen_random_uuid()",
                UUIDS,
            ),
        ):
            await db.execute(b"delete from session_recalls")
            await db.execute(change.encode())
            schema.migrate(empty_database)
            assert re.fullmatch(expected, (await recalls.schedule("s", "m", conn=db)).id)


@pytest.mark.parametrize("type", ["bigserial", "bigint generated by default as identity"])
async def test_roles_may_draw_from_the_sequence_of_ids(type: str, empty_database: str) -> None:
    """`migrate --roles` grants what an insert without an id needs, also where nobody may execute
    functions by default."""
    async with connected(empty_database) as db:
        await db.execute(b"alter default privileges revoke execute on functions from public")
        await db.execute(create_tables(type).encode())
        await db.execute(b"insert into sessions values ('s', 'ann'), ('z', 'zoe')")
        schema.migrate(empty_database, roles=True)
        for role, session in (("recall_application", "s"), ("recall_worker", "z")):
            await db.execute(f"set role {role}".encode())
            made = await Recalls().schedule(session, "m", conn=db)
            assert [r.id for r in await Recalls().list(session_id=session, conn=db)] == [made.id]
        await db.execute(b"set role recall_reader")
        assert len(await Recalls().list(session_id="s", conn=db)) == 1


# --- the session's one pending recall -------------------------------------------------------------


@pytest.mark.parametrize("index", ["idx_recalls_active_pending", "one_at_a_time", 'Odd "name"'])
async def test_a_session_that_has_one_already_is_known_by_the_indexs_columns(
    index: str, database: str
) -> None:
    """Whatever the index is called, in whichever language PostgreSQL speaks; a doubled id, and an
    index of the application's own, are something else."""
    async with connected(database) as db:
        quoted = '"' + index.replace('"', '""') + '"'
        if index != "idx_recalls_active_pending":
            await db.execute(f"alter index idx_recalls_active_pending rename to {quoted}".encode())
        await db.execute(
            b"create unique index idx_recalls_once on session_recalls (internal_comment);"
            b"insert into sessions values ('s', 'ann'), ('z', 'zoe')"
        )
        recalls = Recalls()
        await recalls.schedule("s", "m", comment="one", id="first", conn=db)
        with pytest.raises(RecallExists) as refused:
            await recalls.schedule("s", "m", conn=db)
        assert refused.value.session_id == "s"
        for id, comment in (("first", None), ("second", "one")):
            with pytest.raises(errors.UniqueViolation):
                await recalls.schedule("z", "m", id=id, comment=comment, conn=db)
        said = operate(database, "schedule", "s", "m")
        assert said.status == 1 and "session s already has a pending recall" in said.err
        said = operate(database, "schedule", "z", "m", "--comment", "one")
        assert said.status == 1 and "already has" not in said.err and "idx_recalls_once" in said.err


async def test_a_sequence_that_is_behind_is_no_pending_recall(empty_database: str) -> None:
    """After a restore without setval: the command line says what PostgreSQL said."""
    async with connected(empty_database) as db:
        await db.execute(create_tables("bigserial").encode())
        await db.execute(b"insert into sessions values ('s', 'ann'), ('z', 'zoe')")
        schema.migrate(empty_database)
        assert (await Recalls().schedule("s", "m", id=1, conn=db)).id == "1"
        said = operate(empty_database, "schedule", "z", "m")
        assert said.status == 1 and "already has" not in said.err and "sequence" in said.err


# --- plans ----------------------------------------------------------------------------------------

HALF = 20_000
NUMBERED = {"uuid": "lpad(to_hex({}), 32, '0')::uuid", "bigint": "({})::bigint"}
FILL = """
insert into sessions select {session}, 'ann' from generate_series(0, {last}) n;
alter table session_recalls disable trigger user;
insert into session_recalls
    (id, session_id, call_type, trigger_at, additional_context_message, status, created_at,
        updated_at)
select {id}, {session}, 'once',
    now() + case when n < {half} then -n when n < 2 * {half} then n else {half} - n end
        * interval '1 second',
    'm', case when n < {half} then 'fired' else 'pending' end, now(), now()
from generate_series(0, {last}) n;
alter table session_recalls enable trigger user;
insert into recall_attempts
    (recall_id, occurrence, rekey, attempt, outcome, session_id, worker, lease, scheduled_for,
        ended_at, settled)
select {id}::text, 1, 0, a, 'unknown', {session}::text, 'w', gen_random_uuid(), now(), now(),
    'pending'
from generate_series(0, {half}) n, generate_series(1, 2) a;
analyze
"""


@pytest.fixture(scope="module", params=[("uuid", "uuid"), ("bigint", "bigint")], ids=name)
def crowded(
    request: pytest.FixtureRequest, server: str, templates: dict[tuple[str, str], str]
) -> Iterator[Table]:
    """Rows that are over, rows that wait, and ten that are due; a few of these are claimed."""
    kind = request.param
    with postgres.database(server, template_of(server, templates, kind)) as dsn:
        with psycopg.connect(dsn, autocommit=True) as conn:
            fill = FILL.format(
                id=NUMBERED[kind[0]].format("n + 1000"),
                session=NUMBERED[kind[1]].format("n + 1000"),
                half=HALF,
                last=2 * HALF + 9,
            )
            conn.execute(fill.encode())
        yield Table(dsn, asyncio.run(claimed(dsn)))


async def claimed(dsn: str) -> list[Claim]:
    ledger = Ledger(dsn, "w", LEASE)
    try:
        return (await ledger.claim(5)).claims
    finally:
        await ledger.close()


@pytest.mark.slow
def test_the_workers_statements_use_indexes(
    crowded: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with text: no statement reads a table through, and none touches more than its few rows."""
    assert len(crowded.claims) == 5
    for statement in NAMES:
        asked = asyncio.run(crowded.asked(statement, monkeypatch))
        for mode in ("custom", "generic"):
            plan = crowded.plan(*asked, mode)
            read = [n["Relation Name"] for n in nodes(plan) if n["Node Type"] == "Seq Scan"]
            assert not {"session_recalls", "recall_attempts"} & set(read), (statement, mode)
            assert buffers(plan) <= 400, (statement, mode)


# --- the daemon -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [("uuid", "uuid"), ("bigint", "bigint")], ids=name)
async def test_the_daemon_runs_them_end_to_end(
    kind: tuple[str, str],
    server: str,
    templates: dict[tuple[str, str], str],
    endpoint: Endpoint,
) -> None:
    """Called at the address and under the key of its id as text; a chain from inside the run, a
    skip and a cancel in mid-run, and a deferral."""
    with postgres.database(server, template_of(server, templates, kind)) as dsn:
        keyed = Keyed(dsn, *kind)
        gates = {n: Gate() for n in (1, 2, 3)}
        for n, gate in gates.items():
            endpoint.script(keyed.session(n), gate, reply())
        endpoint.script(keyed.session(4), reply(409, headers={"retry-after": "1"}), reply())
        settings = {"RECALL_DSN": dsn, "RECALL_RUN_URL": endpoint.url}
        async with (
            connected(dsn) as db,
            await Application.connect(dsn, *kind) as app,
            Daemons(settings) as daemons,
        ):
            daemon = await daemons.start(concurrency=9)
            now = datetime.now(UTC)
            await app.schedule(keyed.session(1), "once", now, "m", id=keyed.id(1))
            await app.schedule(keyed.session(2), "recurring", now, "m", 3600, id=keyed.id(2))
            await app.schedule(keyed.session(3), "once", now, "m", id=keyed.id(3))
            await app.schedule(keyed.session(4), "once", now, "m", id=keyed.id(4))
            for gate in gates.values():
                await asyncio.wait_for(gate.entered.wait(), 20)
            for n in gates:
                request = endpoint.of(keyed.session(n))[0]
                assert request.path == f"/sessions/{keyed.session(n)}/run"
                assert request.key == f"{keyed.id(n)}:1"
                assert request.document["session_id"] == keyed.session(n)
                assert request.document["recall"]["id"] == keyed.id(n)

            await app.schedule(keyed.session(1), "once", now, "next link", id=keyed.id(11))
            assert await app.skip_next(keyed.session(2))
            assert await app.cancel_session(keyed.session(3)) == 1
            await asyncio.wait_for(gates[3].hung_up.wait(), 20)
            gates[1].open()
            gates[2].open()
            await endpoint.count(2, keyed.session(1))
            await endpoint.count(2, keyed.session(4))
            assert endpoint.of(keyed.session(1))[1].key == f"{keyed.id(11)}:1"
            assert [r.key for r in endpoint.of(keyed.session(4))] == [f"{keyed.id(4)}:1"] * 2
            for n, status in ((11, "fired"), (2, "pending"), (4, "fired")):
                await daemon.hears("recall.settled", recall=keyed.id(n), status=status)
            await daemon.hears("recall.ended", recall=keyed.id(3))
            assert await daemon.stop() == 0
            rows = await (
                await db.execute("select id::text, status, occurrence from session_recalls")
            ).fetchall()
        found = {row["id"]: (row["status"], row["occurrence"]) for row in rows}
        assert found == {
            keyed.id(1): ("fired", 1),
            keyed.id(2): ("pending", 3),
            keyed.id(3): ("cancelled", 1),
            keyed.id(4): ("fired", 1),
            keyed.id(11): ("fired", 1),
        }
        calls = keyed.document("show", keyed.id(4))["calls"]
        assert [(c["outcome"], c["session_id"]) for c in calls] == [
            ("busy", keyed.session(4)),
            ("answered", keyed.session(4)),
        ]
        assert keyed.document("stats")["statuses"]["fired"] == 3
