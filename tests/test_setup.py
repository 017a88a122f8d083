"""What every connection is set to, and where the table is looked for: whatever a database, a role
or an application has set, commands and `Recalls` see and do the same, and leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel, errors, sql
from psycopg.abc import Buffer
from psycopg.adapt import Dumper, Loader
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row, tuple_row
from psycopg_pool import AsyncConnectionPool

from recall_worker import Recall, RecallExists, Recalls, schema
from recall_worker.database.ledger import Ledger
from recall_worker.database.setup import absence, elsewhere
from recall_worker.secret_files import Secrets
from recall_worker.settings import SettingsError, read
from recall_worker.worker.process import SchemaRefused, _check_schema

from .conftest import connected
from .support import postgres
from .support.application import CREATE_TABLES
from .support.awaited import Asynchronous
from .support.pgbouncer import PgBouncer, pooler
from .test_cli import Said, operate

TABLE = "create table {}.session_recalls (id text primary key)"
HOUR = timedelta(hours=1)

# --- where the table is ---------------------------------------------------------------------------


def test_tables_in_other_schemas_are_found(empty_database: str) -> None:
    """All schemas that have a table of that name, in order, whatever they are called; not the one
    that the search_path finds, no view, no temporary table."""
    with psycopg.connect(empty_database, autocommit=True) as conn:
        assert elsewhere(conn) == []
        for name in ("zoo", '"My ""odd"" Schema"', "app"):
            conn.execute(f"create schema {name}".encode())
            conn.execute(TABLE.format(name).encode())
        conn.execute("create schema views; create view views.session_recalls as select 1")
        conn.execute("create temporary table session_recalls (id text)")
        assert elsewhere(conn) == ['My "odd" Schema', "app", "zoo"]
        conn.execute("discard temp; set search_path = app")
        assert elsewhere(conn) == ['My "odd" Schema', "zoo"]


@pytest.mark.parametrize("autocommit", [True, False])
@pytest.mark.parametrize("named", [None, "app"])
def test_a_schema_that_the_role_may_not_use_is_named(
    named: str | None, autocommit: bool, empty_database: str
) -> None:
    """The search_path passes over such a schema without a word; what is said is the grant."""
    role = f"nobody_{conninfo_to_dict(empty_database)['dbname']}"
    with psycopg.connect(empty_database, autocommit=True) as conn:
        conn.execute(f"create schema app; {TABLE.format('app')}; create role {role}".encode())
        try:
            with psycopg.connect(
                empty_database, autocommit=autocommit, row_factory=dict_row
            ) as other:
                other.execute(f"set role {role}; set search_path = app, public".encode())
                assert elsewhere(other) == ["app"]
                absent = absence(other, named)
                assert absent is not None and "may not use the schema app" in absent.reason
                assert absent.hint == f"grant usage on schema app to {role}"
        finally:
            conn.execute(f"drop role {role}".encode())


# --- RECALL_SCHEMA --------------------------------------------------------------------------------

NAMES = {
    "plain": "app",
    "in capitals": "App",
    "with a blank": "My Schema",
    "with an apostrophe": "o'clock",
    "a keyword": "select",
    "with a percent sign": "100%s",
    "not ASCII": "Zoë 🙂",
    "two names": "public, app",
}
COMMANDS = [
    "list",
    "list --user ann",
    "list --session s",
    "show ID",
    "why ID",
    "stats",
    "workers",
    "preview ID",
    "skip ID",
    "pause ID",
    "resume ID",
    "fire ID",
    "reschedule ID --in 2h",
    "edit ID --times 9",
    "edit ID --comment note",
    "cancel ID",
    "retry ID",
    "cancel --session s --yes",
    "prune --older-than 30d --yes",
    "migrate --check",
    "doctor",
]


def create(dsn: str, name: str, *, sessions: str) -> None:
    """The application's tables, session_recalls in schema `name`, sessions in schema `sessions`."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        for one in {name, sessions} - {"public"}:
            conn.execute(sql.SQL("create schema {}").format(sql.Identifier(one)))
        conn.execute(
            sql.SQL("set search_path = {}, {}").format(
                sql.Identifier(name), sql.Identifier(sessions)
            )
        )
        conn.execute(CREATE_TABLES.encode())
        if sessions != name:
            conn.execute(
                sql.SQL("alter table sessions set schema {}").format(sql.Identifier(sessions))
            )
        conn.execute("insert into sessions values ('s', 'ann')")


def did(dsn: str, *words: str, environ: dict[str, str]) -> Said:
    """A command that ends well."""
    done = operate(dsn, *words, environ=environ)
    assert done.status == 0, (words, done)
    assert "Traceback" not in done.err
    return done


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
def test_a_schema_by_its_name(name: str, empty_database: str) -> None:
    """Every command works on the table in RECALL_SCHEMA, whatever its name, while sessions are in
    another schema, which the role's search_path has."""
    create(empty_database, name, sessions="public")
    environ = {"RECALL_SCHEMA": name}
    did(empty_database, "migrate", environ=environ)
    id = did(
        empty_database, "schedule", "s", "m", "--every", "1h", "--in", "1h", environ=environ
    ).out.strip()
    for command in COMMANDS if name == NAMES["with a blank"] else COMMANDS[:2]:
        words = [id if word == "ID" else word for word in command.split()]
        done = did(empty_database, *words, environ=environ)
        if words[0] == "list":
            assert id in done.out
    with psycopg.connect(empty_database) as conn:
        assert elsewhere(conn) == [name]
        found = conn.execute(
            "select nspname::text from pg_class c join pg_namespace n on n.oid = relnamespace "
            "where relname in ('recall_attempts', 'recall_schema', 'recall_workers') group by 1"
        ).fetchall()
        assert found == [(name,)], "our tables are beside it"


def test_it_wins_over_the_search_path(database: str) -> None:
    """Where the search_path finds another table first, RECALL_SCHEMA decides; by an option of
    migrate, too."""
    create(database, "app", sessions="app")
    assert operate(database, "migrate", "--check", "--schema", "app").status == 1
    environ = {"RECALL_SCHEMA": "app", "RECALL_RUN_URL": "http://127.0.0.1:9/"}
    with pytest.raises(SchemaRefused, match="no recall-worker schema yet"):
        chosen = read(environ, dsn=database)
        asyncio.run(_check_schema(chosen, "w", Secrets(chosen)))
    did(database, "migrate", "--schema", "app", environ={})
    id = did(database, "schedule", "s", "m", environ={"RECALL_SCHEMA": "app"}).out.strip()
    assert json.loads(did(database, "list", "--json", environ={}).out) == []
    [row] = json.loads(did(database, "list", "--json", environ={"RECALL_SCHEMA": "app"}).out)
    assert row["id"] == id


MISSING = {
    "no such schema": ("ap", "RECALL_SCHEMA is 'ap': no session_recalls there"),
    "no table there": ("empty", "RECALL_SCHEMA is 'empty': no session_recalls there"),
    "none at all": (None, "finds no table session_recalls"),
}


@pytest.fixture(scope="module")
def scattered(server: str) -> Iterator[str]:
    """A database with the table in two schemas, none of which the search_path finds."""
    with postgres.database(server) as dsn:
        create(dsn, "My Schema", sessions="My Schema")
        create(dsn, "app", sessions="app")
        schema.migrate(dsn, schema="app")
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute("create schema empty")
        yield dsn


@pytest.mark.parametrize(("name", "says"), MISSING.values(), ids=list(MISSING))
@pytest.mark.parametrize(
    "command",
    ["list", "show r", "stats", "schedule s m", "prune --yes --older-than 1d", "cancel r"],
)
def test_where_it_is_not(command: str, name: str | None, says: str, scattered: str) -> None:
    """Commands say where the table is and which RECALL_SCHEMA finds it, and touch no other."""
    done = operate(scattered, *command.split(), environ={"RECALL_SCHEMA": name} if name else {})
    assert done.status == 1 and done.out == ""
    error, todo = done.err.splitlines()
    assert says in error and "there is one in the schema My Schema and app" in error
    assert todo == "Try: RECALL_SCHEMA='My Schema' or RECALL_SCHEMA=app"
    with psycopg.connect(scattered) as conn:
        assert conn.execute("select count(*) from app.session_recalls").fetchone() == (0,)


@pytest.mark.parametrize("name", ["ap", "empty"])
def test_migrate_where_it_is_not(name: str, scattered: str) -> None:
    """Nothing is created in a schema that has no table while others have one."""
    for words in (["migrate"], ["migrate", "--check"], ["migrate", "--schema", name]):
        done = operate(scattered, *words, environ={"RECALL_SCHEMA": name})
        assert done.status == 1 and "RECALL_SCHEMA=app" in done.err, done
    with psycopg.connect(scattered) as conn:
        assert elsewhere(conn) == ["My Schema", "app"]


def test_migrate_creates_the_table_in_an_empty_schema(empty_database: str) -> None:
    """Where no schema has a table; one that is not there has to be created first."""
    done = operate(empty_database, "migrate", "--schema", "My Schema")
    assert done.status == 1 and 'Try: create schema "My Schema"' in done.err
    with psycopg.connect(empty_database, autocommit=True) as conn:
        conn.execute('create schema "My Schema"')
        did(empty_database, "migrate", "--schema", "My Schema", environ={})
        assert elsewhere(conn) == ["My Schema"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ('"My Schema"', "without SQL's quotes"),
        ('app"; drop schema app; --', "without SQL's quotes"),
        ("a\nb", "control character"),
        ("a\x7fb", "control character"),
        ("pg_temp", "PostgreSQL's own"),
        ("information_schema", "PostgreSQL's own"),
        ("a" * 64, "63 octets"),
    ],
)
def test_names_that_are_none(name: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused at the start, by commands and by `Recalls`."""
    done = operate("postgresql:///nowhere", "list", environ={"RECALL_SCHEMA": name})
    assert done.status == 2 and says in done.err and "RECALL_SCHEMA" in done.err
    monkeypatch.setenv("RECALL_SCHEMA", name)
    with pytest.raises(SettingsError, match=says):
        Recalls()


async def test_recalls_in_a_schema(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Recalls(schema=)`, else RECALL_SCHEMA; beside it the caller's own statements find what they
    found before."""
    create(empty_database, "My Schema", sessions="public")
    await asyncio.to_thread(schema.migrate, empty_database, schema="My Schema")
    async with connected(empty_database) as conn:
        async with conn.transaction():
            await conn.execute("set local search_path = public")
            made = await Recalls(schema="My Schema").schedule("s", "m", conn=conn)
            assert await (await conn.execute("show search_path")).fetchone() == {
                "search_path": "public"
            }
        monkeypatch.setenv("RECALL_SCHEMA", "My Schema")
        assert [one.id for one in await Recalls().list(user_id="ann", conn=conn)] == [made.id]
        with pytest.raises(errors.UndefinedTable):
            await Recalls(schema="empty").list(conn=conn)
        async with AsyncConnectionPool(empty_database, open=False, min_size=1) as pool:
            assert await Recalls(pool).cancel("s") == 1


async def test_the_worker_says_where_it_is(scattered: str) -> None:
    """The ledger finds the table by RECALL_SCHEMA, and tells where there is one if it does not."""
    for name, says in ((None, "RECALL_SCHEMA='My Schema'"), ("ap", "RECALL_SCHEMA='My Schema'")):
        ledger = Ledger(scattered, "w", 60, schema=name)
        try:
            assert await ledger.schema() == (0, 0)
            absent = await ledger.absence()
            assert absent is not None and says in absent.hint
        finally:
            await ledger.close()
    ledger = Ledger(scattered, "w", 60, schema="app")
    try:
        assert await ledger.schema() != (0, 0) and await ledger.absence() is None
        assert (await ledger.claim(1)).claims == []
    finally:
        await ledger.close()


async def test_a_table_that_comes_later_is_found(empty_database: str) -> None:
    """A worker's connections look for the table anew when it was not there: restored, or moved."""
    ledger = Ledger(empty_database, "w", 60, schema="app")
    try:
        assert await ledger.schema() == (0, 0)
        await asyncio.to_thread(create, empty_database, "app", sessions="app")
        await asyncio.to_thread(schema.migrate, empty_database, schema="app")
        assert (await ledger.schema())[0] == schema.GENERATION
        assert (await ledger.claim(1)).claims == []
    finally:
        await ledger.close()


# --- what others have set -------------------------------------------------------------------------

ELSEWHERE_SET = {
    "German": {
        "datestyle": "German",
        "timezone": "Asia/Kolkata",
        "intervalstyle": "iso_8601",
        "default_transaction_isolation": "serializable",
        "standard_conforming_strings": "off",
        "extra_float_digits": "-15",
        "statement_timeout": "1ms",
        "idle_session_timeout": "500ms",
    },
    "SQL": {
        "datestyle": "SQL, DMY",
        "timezone": "America/St_Johns",
        "intervalstyle": "sql_standard",
        "default_transaction_isolation": "repeatable read",
        "bytea_output": "escape",
        "array_nulls": "off",
        "lock_timeout": "1ms",
        "client_min_messages": "debug5",
        "quote_all_identifiers": "on",
    },
    "Postgres": {
        "datestyle": "Postgres, MDY",
        "timezone": "<-03>+03",
        "intervalstyle": "postgres_verbose",
        "default_transaction_deferrable": "on",
        "idle_in_transaction_session_timeout": "100ms",
        "client_min_messages": "error",
        "row_security": "off",
        "client_encoding": "LATIN1",
        "transform_null_equals": "on",
        "search_path": '"$user", public, pg_temp',
    },
}


def change(server: str, dsn: str, settings: dict[str, str], role: str | None = None) -> None:
    """Set these for everybody in a database, or for a role in it."""
    name = sql.Identifier(str(conninfo_to_dict(dsn)["dbname"]))
    whose = (
        sql.SQL("database {}").format(name)
        if role is None
        else sql.SQL("role {} in database {}").format(sql.Identifier(role), name)
    )
    with psycopg.connect(server, autocommit=True) as conn:
        for setting, value in settings.items():
            words = sql.SQL(value) if setting == "search_path" else sql.Literal(value)
            conn.execute(sql.SQL("alter {} set {} = {}").format(whose, sql.SQL(setting), words))


def fill(dsn: str) -> None:
    """Recalls in several states, calls, a worker; columns of the application's own of types that
    depend on settings."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(
            """
            alter table session_recalls add took interval default '1 day 02:03:04',
                add seen date default '2026-02-01', add raw bytea default 'ab',
                add part float8 default 0.1;
            insert into sessions select 's' || n, 'ann' from generate_series(1, 5) n;
            insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds,
                additional_context_message, status, created_at, updated_at)
            select 'r' || n, 's' || n, case when n % 2 = 0 then 'once' else 'recurring' end,
                '2031-02-03 04:05:06.789+00', 3600, 'Zoë', 'pending', '2026-02-01 00:00+00',
                '2026-02-01 00:00+00'
            from generate_series(1, 5) n;
            update session_recalls set status = 'fired', ended_at = '2026-02-03 01:00+00'
                where id = 'r2';
            insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome, session_id,
                worker, lease, scheduled_for, called_at, last_called_at, ended_at, settled)
            select 'r2', 1, 0, 1, 'answered', 's2', 'w', gen_random_uuid(), now(),
                now() - interval '10.123456 s', now() - interval '10.123456 s', now(), 'fired';
            insert into recall_workers (worker, host, pid, version, slots, settings)
                values ('w', 'h', 1, '1', 3, '{}');
            """
        )


READS = [
    "list --json",
    "list --user ann --json",
    "show r1 --json",
    "show r2",
    "why r1",
    "why r2",
    "stats",
    "workers",
    "preview r1 --json",
]
WRITES = [
    "schedule s2 m --in 2h --comment note",
    "skip r1",
    "pause r1",
    "resume r1",
    "fire r3",
    "reschedule r4 --at 2031-05-06T07:08:09Z",
    "edit r5 --every 2h --until 2032-01-01",
    "edit r5 --cron '30_9_*_*_*' --tz Europe/Berlin",
    "cancel r5",
    "retry r5",
    "cancel --session s4 --yes",
    "prune --older-than 1000d --yes",
    "migrate --check",
    "migrate",
]


def shown(dsn: str) -> list[str]:
    """What the reading commands show; without what depends on the moment."""
    said = []
    for command in READS:
        done = did(dsn, *command.split(), environ={})
        said.append(re.sub(r"\d+ (s|min|ms) ago|\(?in \d+ d\)?|now|\s", "", done.out))
    return said


@pytest.mark.slow
@pytest.mark.parametrize("role", [None, "postgres"], ids=["database", "role in it"])
@pytest.mark.parametrize("settings", ELSEWHERE_SET.values(), ids=list(ELSEWHERE_SET))
def test_commands_see_and_do_the_same(
    settings: dict[str, str], role: str | None, server: str, database: str
) -> None:
    """Every command, under settings that a database or a role has for others."""
    fill(database)
    before = shown(database)
    change(server, database, settings, role)
    assert shown(database) == before
    if role is None:
        for command in WRITES:
            did(database, *shlex.split(command.replace("_", " ")), environ={})
        examined = operate(database, "doctor", "--json").document
        assert "defect" not in json.dumps(examined) and "DateStyle" not in json.dumps(examined)


@pytest.mark.slow
def test_commands_that_only_read_on_a_read_only_role(server: str, database: str) -> None:
    """They work; one that writes says what is in its way, and that it may be no standby."""
    fill(database)
    before = shown(database)
    change(server, database, {"default_transaction_read_only": "on"})
    assert shown(database) == before
    did(database, "migrate", "--check", environ={})
    for command in ("schedule s2 m", "cancel r1", "prune --older-than 1d --yes"):
        done = operate(database, *command.split())
        assert done.status == 1 and "takes no writes" in done.err, done
        assert "default_transaction_read_only" in done.err


KEPT_BY_POOLERS = {
    "application_name",
    "client_encoding",
    "DateStyle",
    "TimeZone",
    "IntervalStyle",
    "standard_conforming_strings",
}
"""Settings that pgbouncer itself keeps for each of its clients."""

BEARABLE_FOR_POOLERS = {"statement_timeout": "500ms", "idle_session_timeout": "60s"}
"""What a pooler needs of the settings that are the worst elsewhere.

A deadline of one millisecond cuts off the pooler's own first statement and ours that lifts it, as a
pooler takes no deadline with the connection; and PostgreSQL would end the connections that wait in
its pool while it hands one out.
"""


@pytest.mark.slow
@pytest.mark.parametrize("settings", ELSEWHERE_SET.values(), ids=list(ELSEWHERE_SET))
def test_the_same_through_a_pooler(settings: dict[str, str], server: str, database: str) -> None:
    """Through pgbouncer in transaction mode, and nothing is left on its connections."""
    fill(database)
    before = shown(database)
    change(server, database, settings | BEARABLE_FOR_POOLERS)
    with pooler(database, default_pool_size=1, ignore_startup_parameters="options") as bouncer:
        assert shown(bouncer.dsn) == before
        for command in WRITES[:-2]:
            did(bouncer.dsn, *shlex.split(command.replace("_", " ")), environ={})
        did(bouncer.dsn, "migrate", "--check", environ={})
        with psycopg.connect(bouncer.dsn, prepare_threshold=None) as conn:
            conn.execute("set local statement_timeout = 0")
            left = conn.execute(
                "select name, setting from pg_settings where source = 'session'"
            ).fetchall()
            assert {name for name, _ in left} <= {"statement_timeout", *KEPT_BY_POOLERS}, left
            assert conn.execute("select count(*) from pg_prepared_statements").fetchone() == (0,)


@pytest.mark.parametrize("settings", ELSEWHERE_SET.values(), ids=list(ELSEWHERE_SET))
@pytest.mark.parametrize("pooled", [False, True], ids=["direct", "pooled"])
async def test_the_ledger_sees_the_same(
    pooled: bool, settings: dict[str, str], server: str, database: str, bouncer: PgBouncer
) -> None:
    """What a worker claims and when it is due next: with all digits, in UTC."""
    await asyncio.to_thread(fill, database)
    async with connected(database) as conn:
        await conn.execute(
            "update session_recalls set trigger_at = now() + case id when 'r1' then - interval "
            "'1.25 s' else interval '100.125 s' end where id in ('r1', 'r3')"
        )
    bearable = BEARABLE_FOR_POOLERS if pooled else {}
    await asyncio.to_thread(change, server, database, settings | bearable)
    ledger = Ledger(bouncer.way_to(database) if pooled else database, "w", 60)
    try:
        [claim] = (await ledger.claim(5)).claims
        assert claim.id == "r1" and claim.trigger_at.tzinfo == UTC
        assert abs((datetime.now(UTC) - claim.trigger_at).total_seconds()) < 60
        due = await ledger.next_due(claimed_at=None)
        assert due.next_in is not None and 40 < due.next_in < 101 and due.next_in % 1
    finally:
        await ledger.close()


# --- the application's own connection -------------------------------------------------------------

OF_THE_CALLER = {
    "German": ["set datestyle = German", "set intervalstyle = iso_8601"],
    "for the transaction": [
        "set local datestyle = 'SQL, DMY'",
        "set local timezone = 'Asia/Tokyo'",
    ],
    "encoding": ["set client_encoding = LATIN1"],
    "no encoding": ["set client_encoding = SQL_ASCII", "set local intervalstyle = sql_standard"],
    "digits": ["set extra_float_digits = -15", "set array_nulls = off"],
    "path": ["set local search_path = public, pg_catalog"],
    "nothing": [],
}


class Odd(str):
    """What an application may want texts and documents to be."""


class OddLoader(Loader):
    def load(self, data: Buffer) -> Odd:
        return Odd(bytes(data).decode(errors="replace"))


class OddDumper(Dumper):
    def dump(self, obj: Any) -> bytes:
        return f"odd {obj}".encode()


def make_odd(conn: psycopg.AsyncConnection[Any]) -> None:
    """The application's types: dates, texts and documents are something else."""
    for name in ("timestamptz", "timestamp", "text", "varchar", "json", "jsonb", "int4", "bool"):
        conn.adapters.register_loader(name, OddLoader)
    for kind in (str, int, datetime, list):
        conn.adapters.register_dumper(kind, OddDumper)


async def its_settings(client: Asynchronous, conn: psycopg.AsyncConnection[Any]) -> list[Any]:
    """All that a connection is set to, by PostgreSQL and by psycopg."""
    cursor = client.cursor(conn)
    await cursor.execute(
        "select name, setting from pg_settings where name not like 'plpgsql.%' order by name"
    )
    rows = [(str(name), str(value)) for name, value in await cursor.fetchall()]
    return [
        *rows,
        conn.autocommit,
        conn.isolation_level,
        conn.read_only,
        conn.row_factory,
        conn.cursor_factory,
        conn.prepare_threshold,
    ]


async def everything(recalls: Recalls, conn: psycopg.AsyncConnection[Any] | None) -> None:
    """Each method, on the recalls of `fill`."""
    made = await recalls.schedule("s2", "Zoë", after=HOUR, comment="note", conn=conn)
    assert isinstance(made, Recall) and made.trigger_at.utcoffset() == timedelta(0)
    assert type(made.additional_context_message) is str
    assert made.additional_context_message == "Zoë"
    with pytest.raises(RecallExists):
        await recalls.schedule("s2", "another", conn=conn)
    with pytest.raises(errors.ForeignKeyViolation):
        await recalls.schedule("nobody's", "m", conn=conn)
    with pytest.raises(errors.DataError):
        await recalls.schedule("s2", "a\0b", conn=conn)
    assert {one.id for one in await recalls.list(conn=conn)} == {
        made.id,
        "r1",
        "r2",
        "r3",
        "r4",
        "r5",
    }
    [first, *_] = await recalls.list(session_id="s1", conn=conn)
    assert first.trigger_at == datetime(2031, 2, 3, 4, 5, 6, 789000, UTC)
    assert await recalls.due(conn=conn) == []
    assert await recalls.next_trigger_at(conn=conn) == made.trigger_at
    assert len(await recalls.preview("r1", count=3, conn=conn)) == 3
    assert await recalls.skip_next("s1", conn=conn)
    assert await recalls.reschedule("r4", first.trigger_at, conn=conn)
    edited = await recalls.update("r5", message="é", cron="0 9 * * *", times=3, conn=conn)
    assert edited is not None and (edited.cron, edited.times) == ("0 9 * * *", 3)
    assert await recalls.sessions_with_pending(["s1", "s2", "s9"], conn=conn) == {"s1", "s2"}
    for act in (recalls.pause, recalls.resume, recalls.fire, recalls.get):
        found = await act("r3", conn=conn)
        assert found is not None and found.id == "r3"
    assert await recalls.mark_fired("r3", conn=conn)
    assert await recalls.mark_cancelled("r5", conn=conn)
    assert await recalls.retry("r5", conn=conn) is not None
    assert await recalls.cancel("s1", conn=conn) == 1


@pytest.mark.parametrize("before", OF_THE_CALLER.values(), ids=list(OF_THE_CALLER))
@pytest.mark.parametrize("named", [None, "public"], ids=["by the path", "by its schema"])
async def test_inside_the_callers_transaction(
    named: str | None, before: list[str], client: Asynchronous, database: str
) -> None:
    """Whatever the transaction is set to, everything works in it, failures included, and each of
    its settings is afterwards what it was; so is each of the connection's when it ends."""
    await asyncio.to_thread(fill, database)
    async with client.connect(database, row_factory=tuple_row) as conn:
        make_odd(conn)
        at_first = await its_settings(client, conn)
        await conn.rollback()
        for statement in before:
            await conn.execute(statement.encode())
        meanwhile = await its_settings(client, conn)
        await everything(client.make(schema=named), conn)
        assert await its_settings(client, conn) == meanwhile
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
        await conn.rollback()
        assert await its_settings(client, conn) == at_first, "nothing of it was committed"
    async with connected(database) as db:
        assert await (await db.execute("select count(*) from recall_actions")).fetchone() == {
            "count": 0
        }


@pytest.mark.parametrize("factory", ["plain", "client-side", "raw"])
@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize("hostile", [False, True], ids=["as it comes", "otherwise"])
async def test_on_a_connection_without_a_transaction(
    hostile: bool,
    autocommit: bool,
    factory: str,
    client: Asynchronous,
    server: str,
    database: str,
) -> None:
    """In autocommit each call is a transaction of its own; else the caller's begins with it. Rows,
    cursors and types are the caller's own business."""
    await asyncio.to_thread(fill, database)
    if hostile:
        settings = ELSEWHERE_SET["German"] | {"statement_timeout": "0", "idle_session_timeout": "0"}
        await asyncio.to_thread(change, server, database, settings)
    cursors = client.cursors[factory]
    async with client.connect(
        database, autocommit=autocommit, row_factory=tuple_row, cursor_factory=cursors
    ) as conn:
        make_odd(conn)
        conn.prepare_threshold = 0
        if hostile:
            await conn.set_isolation_level(IsolationLevel.REPEATABLE_READ)
        before = await its_settings(client, conn)
        await conn.rollback()
        await everything(client.make(), conn)
        assert await its_settings(client, conn) == before
        await conn.commit()
        with pytest.raises(errors.UndefinedTable):
            await client.make(schema="nowhere").list(conn=conn)
        await conn.rollback()
        assert await its_settings(client, conn) == before


@pytest.mark.parametrize("settings", ELSEWHERE_SET.values(), ids=list(ELSEWHERE_SET))
@pytest.mark.parametrize("way", ["transactions", "autocommit", "pooler"])
async def test_on_a_pool(
    way: str,
    settings: dict[str, str],
    client: Asynchronous,
    server: str,
    database: str,
    bouncer: PgBouncer,
) -> None:
    """Each call is a transaction of its own, read committed, and the pool's connections are as they
    were. (The deadlines of the role are the application's own, and stand.)"""
    await asyncio.to_thread(fill, database)
    kept = {name: value for name, value in settings.items() if not name.endswith("timeout")}
    await asyncio.to_thread(change, server, database, kept)

    def configure(conn: psycopg.AsyncConnection[Any]) -> None:
        make_odd(conn)
        conn.prepare_threshold = None

    dsn = bouncer.way_to(database) if way == "pooler" else database
    async with client.pool(
        dsn,
        min_size=1,
        max_size=1,
        configure=configure,
        kwargs={"autocommit": way == "autocommit"},
    ) as pool:
        async with pool.connection() as conn:
            before = await its_settings(client, conn)
        await everything(client.make(pool, schema="public"), None)
        async with pool.connection() as conn:
            assert await its_settings(client, conn) == before


async def test_another_session_meanwhile(server: str, database: str) -> None:
    """On a pool whose role is serializable, a cancel that waits for the application's own statement
    goes on when that commits: at a stricter isolation PostgreSQL would refuse it."""
    await asyncio.to_thread(fill, database)
    change(server, database, {"default_transaction_isolation": "serializable"})
    async with (
        AsyncConnectionPool(database, open=False, min_size=1) as pool,
        connected(database) as conn,
    ):
        async with conn.transaction():
            await conn.execute("update session_recalls set updated_at = now() where id = 'r1'")
            waits = asyncio.create_task(Recalls(pool).cancel("s1"))
            async with connected(server) as looks:
                for _ in range(1000):
                    cursor = await looks.execute(
                        "select from pg_stat_activity where wait_event_type = 'Lock' and datname = "
                        "%s",
                        [conninfo_to_dict(database)["dbname"]],
                    )
                    if await cursor.fetchone() is not None:
                        break
        assert await waits == 1
