"""Migrations on real databases: what is adopted, what is refused, and that the application is never
held up meanwhile.

`migrate` is the real command in a process of its own wherever its exit status, its words or other
clients matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import errors, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from recall_worker import schema
from recall_worker.embedded import EmbeddedServer
from recall_worker.schema import GENERATION, SchemaError

from . import schema as expected
from .conftest import connected
from .support import postgres
from .support.application import COLUMNS, CREATE_TABLES, Application

PATIENCE = 60.0
ALL = [f"{m.version:04} {m.name}" for m in schema.migrations()]
FOREIGN_KEY = "foreign key to sessions"


def execute(dsn: str, *statements: str) -> list[tuple[Any, ...]]:
    """Run statements one by one; the rows of the last."""
    rows: list[tuple[Any, ...]] = []
    with psycopg.connect(dsn, autocommit=True) as conn:
        for statement in statements:
            cursor = conn.execute(statement.encode())
            rows = cursor.fetchall() if cursor.description else []
    return rows


def environ(dsn: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("RECALL_")} | {
        "RECALL_DSN": dsn
    }


def command(dsn: str, *options: str) -> subprocess.CompletedProcess[str]:
    """`recall-worker migrate`, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "recall_worker", "migrate", *options],
        env=environ(dsn),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


class Migrate:
    """`recall-worker migrate` at work: `lines` is what it has said so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self._changed = asyncio.Condition()
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    @contextlib.asynccontextmanager
    async def started(cls, dsn: str, *options: str) -> AsyncIterator[Migrate]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "recall_worker",
            "migrate",
            *options,
            env=environ(dsn),
            stderr=asyncio.subprocess.PIPE,
        )
        migrate = cls(process)
        try:
            yield migrate
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            await migrate._listening

    async def says(self, words: str, times: int = 1) -> None:
        """Wait until it has said so (so many times)."""
        async with asyncio.timeout(PATIENCE), self._changed:
            await self._changed.wait_for(lambda: sum(words in line for line in self.lines) >= times)

    async def exit(self) -> int:
        async with asyncio.timeout(PATIENCE):
            status = await self.process.wait()
            await self._listening
        return status

    async def _listen(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            async with self._changed:
                self.lines.append(line.decode().rstrip())
                self._changed.notify_all()


async def until(condition: Callable[[], Any], within: float = 20.0) -> Any:
    """Ask until the answer is true; returns it. For what no event tells of: what PostgreSQL's other
    processes are doing."""
    async with asyncio.timeout(within):
        while not (answer := condition()):  # noqa: ASYNC110 -- there is nothing to be woken by
            await asyncio.sleep(0.02)
    return answer


# --- adopting -------------------------------------------------------------------------------------

SESSIONLESS = CREATE_TABLES[
    CREATE_TABLES.index("create table if not exists session_recalls") :
].replace(" references sessions(id) on delete cascade", "")

OLD_ROWS = """
insert into session_recalls
    (id, session_id, call_type, trigger_at, interval_seconds, internal_comment,
        additional_context_message, status, created_at, updated_at)
select kind || '-' || status || '-' || n, 's' || row_number() over (), kind, at::timestamptz,
    interval, comment, 'it''s "100 %" — ' || n,
    status, '2024-01-01'::timestamptz + n * interval '1 second', '2024-06-01'
from unnest(array['once', 'recurring', 'immediate']) kind,
    unnest(array['pending', 'fired', 'cancelled']) status,
    (values
        (1, '2024-02-29 12:00:00.123456+05:45', 60, null),
        (2, '2100-01-01', null, ''),
        (3, 'infinity', 0, 'a note'),
        (4, '-infinity', -5, E'two\\nlines'),
        (5, '20000-01-01', 2147483647, '%s'),
        (6, '0044-03-15 BC', 1, null)
    ) as odd (n, at, interval, comment)
"""
SESSIONS = "insert into sessions select 's' || n, 'ann' from generate_series(1, 54) n"
SNAPSHOT = "select ctid::text, xmin::text, row({})::text from session_recalls order by id".format(
    COLUMNS.replace("trigger_at", "trigger_at::text")
)
FILES = (
    "select relname, relfilenode from pg_class where relname in ('session_recalls', 'sessions') "
    "or relname ~ '^idx_recalls_.*_status$' order by 1"
)


@pytest.mark.parametrize(
    "tables", [CREATE_TABLES, SESSIONLESS], ids=["with sessions", "without sessions"]
)
def test_adoption_leaves_every_row_as_it_stands(tables: str, empty_database: str) -> None:
    """Rows in every state, with absurd intervals and dates, keep their columns, their place and
    their writer; no file is written anew."""
    execute(empty_database, tables, *([] if tables is SESSIONLESS else [SESSIONS]), OLD_ROWS)
    before = execute(empty_database, SNAPSHOT), execute(empty_database, FILES)
    assert len(before[0]) == 54

    done = schema.migrate(empty_database)

    assert done == ALL
    assert (execute(empty_database, SNAPSHOT), execute(empty_database, FILES)) == before
    assert execute(
        empty_database,
        "select distinct occurrence, attempt, missed, lease, planned_at from session_recalls",
    ) == [(1, 0, 0, None, None)]


def test_old_rows_with_absurd_intervals_still_obey_the_application(empty_database: str) -> None:
    """What may not be inserted any more may be there: the application cancels it, lists it and
    marks it as before."""
    execute(empty_database, CREATE_TABLES, SESSIONS, OLD_ROWS)
    schema.migrate(empty_database)
    touched = execute(
        empty_database,
        "update session_recalls set status = 'cancelled', updated_at = now() where status = "
        "'pending' and call_type = 'recurring' "
        "returning coalesce(interval_seconds, -1)",
    )
    assert {row[0] for row in touched} == {60, -1, 0, -5, 2147483647, 1}


@pytest.mark.parametrize("sessions", [True, False], ids=["with sessions", "without sessions"])
def test_the_table_is_created_where_it_is_missing(sessions: bool, empty_database: str) -> None:
    """On an empty database `migrate` makes the application's table with its indexes and rules; the
    foreign key where it can."""
    if sessions:
        execute(
            empty_database, "create table sessions (id text primary key, user_id text not null)"
        )
    assert schema.migrate(empty_database) == ALL + ([FOREIGN_KEY] if sessions else [])
    indexes = [
        name
        for (name,) in execute(
            empty_database, "select indexname from pg_indexes where tablename = 'session_recalls'"
        )
    ]
    assert {
        "idx_recalls_trigger_at_status",
        "idx_recalls_session_status",
        "idx_recalls_active_pending",
    } <= set(indexes)
    keys = execute(
        empty_database,
        "select confdeltype::text, convalidated from pg_constraint where contype = 'f'",
    )
    assert keys == ([("c", True)] if sessions else [])


FIRST = (
    f"insert into session_recalls ({COLUMNS}) values ('{{}}', '{{}}', 'once', 'infinity', null, "
    f"null, '', 'pending', now(), now())"
)


@pytest.mark.slow
@pytest.mark.parametrize("orphans", [0, 2])
def test_the_foreign_key_comes_when_it_is_asked_for(orphans: int, empty_database: str) -> None:
    """The application starts after the worker was installed: `migrate --foreign-key` adds the key,
    and no other `migrate` does; recalls of no session are told of, no more."""
    assert FOREIGN_KEY not in schema.migrate(empty_database)
    execute(
        empty_database,
        FIRST.format("kept", "here"),
        *(FIRST.format(f"orphan{n}", f"nowhere{n}") for n in range(orphans)),
    )
    execute(empty_database, CREATE_TABLES, "insert into sessions values ('here', 'ann')")

    assert command(empty_database, "--check").returncode == 0
    assert schema.migrate(empty_database) == []
    migrated = command(empty_database, "--foreign-key", "sessions")

    assert migrated.returncode == 0 and FOREIGN_KEY in migrated.stderr
    assert schema.migrate(empty_database, foreign_key="sessions") == []
    assert ("belong to no session" in migrated.stderr) == bool(orphans)
    assert command(empty_database, "--check").returncode == 0
    with pytest.raises(errors.ForeignKeyViolation):
        execute(empty_database, FIRST.format("new", "elsewhere"))
    execute(empty_database, "delete from sessions")
    assert len(execute(empty_database, "select id from session_recalls")) == orphans


@pytest.mark.parametrize("id", ["bigint", "uuid"])
def test_a_foreign_table_that_is_called_sessions_too_is_left_alone(
    id: str, empty_database: str
) -> None:
    """A table sessions with ids of another kind belongs to something else: there is no key to it,
    and `migrate` goes on."""
    execute(empty_database, f"create table sessions (id {id} primary key)")
    assert schema.migrate(empty_database) == ALL
    assert schema.pending(empty_database) == []


def test_the_table_may_stand_in_a_schema_of_its_own(empty_database: str) -> None:
    """Where the application keeps its tables in another schema all is done there, and the trigger
    works for whoever names it in full."""
    execute(empty_database, "create schema agent; set search_path = agent; " + CREATE_TABLES)
    dsn = make_conninfo(empty_database, options="-c search_path=agent,public")
    assert schema.migrate(dsn) == ALL
    assert schema.pending(dsn) == []
    assert (
        execute(empty_database, "select tablename from pg_tables where schemaname = 'public'") == []
    )
    execute(
        empty_database,
        "insert into agent.sessions values ('s', 'ann')",
        FIRST.format("r", "s").replace("into ", "into agent."),
    )
    execute(empty_database, "update agent.session_recalls set lease = gen_random_uuid()")
    execute(empty_database, FIRST.format("next", "s").replace("into ", "into agent."))
    assert execute(empty_database, "select id, status from agent.session_recalls order by 1") == [
        ("next", "pending"),
        ("r", "running"),
    ]


def test_the_application_starts_again_on_the_migrated_table(empty_database: str) -> None:
    """Its `create … if not exists` runs without an error, and leaves columns, triggers, constraints
    and indexes as `migrate` left them."""
    execute(empty_database, CREATE_TABLES)
    schema.migrate(empty_database)
    before = expected.dump(empty_database)
    execute(empty_database, CREATE_TABLES)
    assert expected.dump(empty_database) == before


# --- again, at once, and elsewhere ----------------------------------------------------------------


@pytest.mark.slow
def test_a_second_migrate_does_nothing(empty_database: str) -> None:
    """What was done stays done: no migration is recorded twice, nothing in the catalogue
    changes."""
    rows = "select * from recall_schema order by version"
    catalogue = (
        "select relname, xmin::text, relfilenode from pg_class where relnamespace = "
        "'public'::regnamespace order by 1"
    )
    assert command(empty_database).returncode == 0
    before = execute(empty_database, rows), execute(empty_database, catalogue)
    again = command(empty_database, "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout) == {"done": []}
    assert (execute(empty_database, rows), execute(empty_database, catalogue)) == before


@pytest.mark.slow
async def test_four_migrates_at_once(empty_database: str) -> None:
    """Four processes on one old table all end well, and each migration was applied once."""
    execute(empty_database, CREATE_TABLES)
    async with contextlib.AsyncExitStack() as stack:
        racers = [
            await stack.enter_async_context(Migrate.started(empty_database)) for _ in range(4)
        ]
        assert [await racer.exit() for racer in racers] == [0] * 4
    said = [line for racer in racers for line in racer.lines]
    assert [said.count(name) for name in ALL] == [1] * len(ALL)
    recorded = execute(empty_database, "select version from recall_schema order by 1")
    assert [version for (version,) in recorded] == [m.version for m in schema.migrations()]


@pytest.mark.slow
def test_check_tells_and_changes_nothing(empty_database: str) -> None:
    """`migrate --check` exits 1 and lists what is to be done, without doing it; 0 when nothing is
    left."""
    before = command(empty_database, "--check", "--json")
    assert before.returncode == 1
    assert json.loads(before.stdout) == {"up_to_date": False, "pending": ALL}
    assert "Try: recall-worker migrate" in before.stderr
    assert (
        execute(
            empty_database,
            "select relname from pg_class where relnamespace = 'public'::regnamespace",
        )
        == []
    )
    assert command(empty_database).returncode == 0
    after = command(empty_database, "--check", "--json")
    assert (after.returncode, json.loads(after.stdout)) == (0, {"up_to_date": True, "pending": []})
    assert command(empty_database, "--check").returncode == 0


@pytest.mark.parametrize("options", [(), ("--check",)], ids=["migrate", "check"])
def test_a_schema_that_needs_newer_code_is_refused(options: tuple[str, ...], database: str) -> None:
    """Where a newer recall-worker has migrated past what this code can work with, it says so and
    touches nothing."""
    execute(
        database,
        f"insert into recall_schema (version, name, oldest_code) values ({GENERATION + 9}, "
        f"'beyond', {GENERATION + 1})",
    )
    refused = command(database, *options)
    assert refused.returncode == 1
    assert (
        f"version {GENERATION + 9}" in refused.stderr
        and "Try: upgrade recall-worker" in refused.stderr
    )
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_a_newer_schema_that_works_with_this_code_is_accepted(database: str) -> None:
    """Replicas are upgraded one by one: code that the newer schema still works with has nothing to
    do, and no complaint."""
    execute(
        database,
        f"insert into recall_schema (version, name, oldest_code) values ({GENERATION + 9}, "
        f"'ahead', {GENERATION})",
    )
    assert command(database, "--check").returncode == 0
    assert command(database).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("alter table session_recalls drop column interval_seconds", "interval_seconds"),
        ("alter table session_recalls rename column trigger_at to due_at", "trigger_at"),
        ("alter table session_recalls alter column created_at type timestamp", "created_at"),
        (
            "alter table session_recalls rename to kept; create view session_recalls as select * "
            "from kept",
            "view",
        ),
    ],
    ids=["no interval", "another name", "no time zone", "a view"],
)
def test_a_strange_table_is_refused(change: str, word: str, empty_database: str) -> None:
    """A session_recalls that is not the application's is left alone; the refusal names what is
    wrong and what to check."""
    execute(empty_database, CREATE_TABLES, change)
    before = expected.dump(empty_database)
    refused = command(empty_database)
    assert refused.returncode == 1
    assert (
        word in refused.stderr and "Try: " in refused.stderr and "Traceback" not in refused.stderr
    )
    assert expected.dump(empty_database) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dsn", "status"),
    [
        ("postgresql://postgres@127.0.0.1:1/nowhere", 3),
        ("host=/nowhere dbname=x", 3),
        ("this is no address", 2),
        ("", 2),
    ],
    ids=["nobody listens", "no socket", "no address", "none"],
)
def test_a_wrong_address_is_told(dsn: str, status: int) -> None:
    """An address at which no PostgreSQL answers, or that is none: an exit status of its own, a
    hint, and no traceback."""
    refused = command(dsn)
    assert refused.returncode == status
    assert (
        refused.stderr.startswith("Error: ")
        and "Try: " in refused.stderr
        and "Traceback" not in refused.stderr
    )


@pytest.mark.slow
def test_a_database_that_is_not_there_is_told(server: str) -> None:
    """A server that answers, and has no such database."""
    refused = command(postgres.address(server, "recall_test_nowhere"))
    assert refused.returncode == 3
    assert (
        "recall_test_nowhere" in refused.stderr
        and "Try: " in refused.stderr
        and "Traceback" not in refused.stderr
    )


@pytest.fixture
def standby() -> Iterator[str]:
    """The DSN of a server that is a standby, and takes no writes."""
    bindir = os.environ.get("RECALL_TEST_PG_BINDIR") or None
    with EmbeddedServer(bindir=bindir, settings={"wal_level": "replica"}) as own:
        own.shutdown()
        (own.directory / "pgdata/standby.signal").touch(mode=0o644)
        own.start()
        yield own.dsn()


@pytest.mark.slow
def test_a_standby_is_refused(standby: str) -> None:
    """The address of a standby: nothing can be done there, and the hint says where."""
    refused = command(standby)
    assert refused.returncode == 1
    assert (
        "standby" in refused.stderr
        and "Try: give the primary's address" in refused.stderr
        and "Traceback" not in refused.stderr
    )


# --- from before the baseline ---------------------------------------------------------------------

VERSION_15 = (Path(expected.__file__).parent / "version_15.sql").read_text(encoding="utf-8")
"""What the migrations 0001 to 0015 made before they became the baseline, with rows in every
state."""
PUBLIC_TABLES = (
    "select array_agg(relname::text order by relname) from pg_class "
    "where relnamespace = 'public'::regnamespace and relkind = 'r' and relname <> 'recall_schema'"
)


def rows_at_15(dsn: str) -> dict[str, list[tuple[Any, ...]]]:
    """Each row of each table, with its place and its writer, in the columns of version 15."""
    columns = (
        "select string_agg(format('r.%I::text', attname), ', ' order by attnum) from pg_attribute "
        "where attrelid = '{0}'::regclass and attnum > 0 and not attisdropped "
        "and attname <> all ('{{sent_at,taken_lease,takeovers,may_still_run,uncounted,"
        "edits,edited_at,edit_of,skips,named_at,fired_at,fires,zone_data,"
        "held,system_identifier,database_oid,queue,queues,generation,slot}}')"
    )
    [(tables,)] = execute(dsn, PUBLIC_TABLES)
    younger = (
        *("recall_actions", "recall_identity", "recall_queues"),
        *("recall_outbox", "recall_subscriptions", "recall_runs", "recall_session_locks"),
    )
    tables = [table for table in tables if table not in younger]
    return {
        table: execute(
            dsn,
            f"select ctid::text, xmin::text, {execute(dsn, columns.format(table))[0][0]} from "
            f"{table} r order by ctid",
        )
        for table in tables
    }


@pytest.mark.slow
def test_version_15_skips_the_baseline(empty_database: str) -> None:
    """A database that has recorded 15 goes on from there: every row keeps its place and its
    writer."""
    execute(empty_database, VERSION_15)
    before = rows_at_15(empty_database), execute(empty_database, FILES)
    states = "select status, count(*) from session_recalls group by 1 order by 1"
    assert {status for status, _ in execute(empty_database, states)} == {
        "pending",
        "running",
        "fired",
        "cancelled",
        "failed",
    }
    assert all(before[0].values()), "a table without rows proves nothing"

    assert schema.pending(empty_database) == [name for name in ALL if int(name[:4]) > 15]
    assert schema.migrate(empty_database) == [name for name in ALL if int(name[:4]) > 15]
    assert (rows_at_15(empty_database), execute(empty_database, FILES)) == before
    assert schema.pending(empty_database) == []


@pytest.mark.slow
def test_15_alone_is_enough_to_skip_the_baseline(empty_database: str) -> None:
    """What counts is that 15 is recorded, not which numbers below it are."""
    execute(empty_database, VERSION_15, "delete from recall_schema where version < 15")
    assert schema.migrate(empty_database) == [name for name in ALL if int(name[:4]) > 15]


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 9, 10, 14])
@pytest.mark.parametrize("options", [(), ("--check",)], ids=["migrate", "check"])
def test_a_state_from_before_the_baseline_is_refused(
    options: tuple[str, ...], version: int, empty_database: str
) -> None:
    """A schema that the earlier files left below 15 is left alone, also where its number is one of
    the baseline's; the refusal says which version it has and what to do."""
    execute(empty_database, VERSION_15, f"delete from recall_schema where version > {version}")
    record = "select * from recall_schema order by version"
    before = rows_at_15(empty_database), execute(empty_database, record)
    refused = command(empty_database, *options)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"Error: the schema is at version {version}, made by")
    assert "Try: " in refused.stderr and "whose last migration is 0015" in refused.stderr
    assert (rows_at_15(empty_database), execute(empty_database, record)) == before


@pytest.mark.slow
@pytest.mark.parametrize("version", range(10, 16))
def test_an_interrupted_baseline_continues(
    version: int, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `migrate` that ended after any file of the baseline is continued with the next one."""
    execute(empty_database, CREATE_TABLES, SESSIONS, OLD_ROWS)
    assert up_to(monkeypatch, empty_database, version) == ALL[: version - 9]
    if version < 15:
        # The next index was interrupted in mid-build: its name is there, and the index is invalid.
        texts = [m.text for m in schema.migrations() if m.version > version]
        name = re.findall(r"concurrently if not exists (\w+)", "".join(texts))[0]
        with pytest.raises(errors.UniqueViolation):
            execute(
                empty_database,
                f"create unique index concurrently {name} on session_recalls ((1))",
            )
    assert schema.pending(empty_database) == ALL[version - 9 :]
    assert schema.migrate(empty_database) == ALL[version - 9 :]
    assert schema.pending(empty_database) == []
    if expected.pg_dump() is not None:
        assert expected.dump(empty_database) == expected.EXPECTED.read_text(encoding="utf-8")


# --- the application goes on meanwhile ------------------------------------------------------------


class Writers:
    """The application at work on a table that is being migrated: each writer on a connection of its
    own, without a pause.

    `longest` is the longest that any statement of theirs took, in seconds.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self.statements = 0
        self._stop = asyncio.Event()

    @classmethod
    @contextlib.asynccontextmanager
    async def at_work(cls, dsn: str, many: int = 3) -> AsyncIterator[Writers]:
        writers = cls()
        async with contextlib.AsyncExitStack() as stack:
            apps = [
                await stack.enter_async_context(await Application.connect(dsn)) for _ in range(many)
            ]
            work = [asyncio.create_task(writers._work(app)) for app in apps]
            try:
                yield writers
            finally:
                writers._stop.set()
                async with asyncio.timeout(PATIENCE):
                    await asyncio.gather(*work)

    async def more(self, statements: int) -> None:
        """Wait until so many more statements have been done."""
        enough = self.statements + statements
        await until(lambda: self.statements >= enough, PATIENCE)

    async def _work(self, app: Application) -> None:
        session = str(uuid4())
        far = (await app.connection.fetchval("select now() + interval '1 year'")).astimezone()
        await self._timed(app.create_session(session, "ann"))
        while not self._stop.is_set():
            id = await self._timed(
                app.schedule(session, "recurring", far, "on and on", interval_seconds=3600)
            )
            assert await self._timed(app.skip_next(session))
            assert await self._timed(app.reschedule(id, far))
            assert await self._timed(app.cancel_session(session)) == 1

    async def _timed(self, act: Any) -> Any:
        began = time.monotonic()
        answer = await act
        self.longest = max(self.longest, time.monotonic() - began)
        self.statements += 1
        return answer


MANY_ROWS = """
insert into sessions select 's' || n, 'ann' from generate_series(1, {n}) n;
insert into session_recalls
    (id, session_id, call_type, trigger_at, interval_seconds, additional_context_message, status,
        created_at, updated_at)
select 'r' || n, 's' || n, 'once', now() + interval '1 year', null, 'later', (array['pending',
    'fired', 'cancelled'])[1 + n % 3], now(), now()
from generate_series(1, {n}) n
"""


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1_000, pytest.param(200_000, marks=pytest.mark.full)])
async def test_an_open_reader_holds_up_migrate_and_nobody_else(
    rows: int, empty_database: str
) -> None:
    """While a transaction that has read the table stays open, `migrate` asks again and again, and
    no insert or update waits a second."""
    execute(empty_database, CREATE_TABLES, MANY_ROWS.format(n=rows))
    async with Writers.at_work(empty_database) as writers, connected(empty_database) as reader:
        await reader.execute("begin")
        await reader.execute("select count(*) from session_recalls")
        async with Migrate.started(empty_database) as migrate:
            await migrate.says("in use by a longer transaction", times=4)
            assert (
                execute(
                    empty_database, "select relname from pg_class where relname = 'recall_attempts'"
                )
                == []
            )
            await writers.more(10)
            await reader.execute("rollback")
            assert await migrate.exit() == 0
        await writers.more(10)
    assert writers.longest < 1.0
    assert schema.pending(empty_database) == []


def adopt_only(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apply the first migrations, up to those that build an index."""
    up_to(monkeypatch, dsn, 11)


def up_to(monkeypatch: pytest.MonkeyPatch, dsn: str, version: int) -> list[str]:
    """Apply the migrations up to this one; returns what was done."""
    first = [m for m in schema.migrations() if m.version <= version]
    with monkeypatch.context() as patch:
        patch.setattr(schema, "migrations", lambda: first)
        return schema.migrate(dsn)


@pytest.mark.full
async def test_an_open_writer_holds_up_the_indexes_and_nobody_else(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction that stays open while an index is built concurrently: the build is given up and
    begun again, and nobody waits for it."""
    execute(empty_database, CREATE_TABLES, MANY_ROWS.format(n=1_000))
    adopt_only(empty_database, monkeypatch)
    async with Writers.at_work(empty_database) as writers, connected(empty_database) as other:
        await other.execute("begin")
        await other.execute("update session_recalls set updated_at = now() where id = 'r1'")
        async with Migrate.started(empty_database) as migrate:
            await migrate.says("in use by a longer transaction", times=2)
            await writers.more(10)
            await other.execute("rollback")
            assert await migrate.exit() == 0
        await writers.more(10)
    assert writers.longest < 1.0
    assert execute(empty_database, "select indexrelid from pg_index where not indisvalid") == []
    assert schema.pending(empty_database) == []


@pytest.mark.slow
async def test_the_foreign_key_holds_nobody_up(empty_database: str) -> None:
    """The key to `sessions` needs a lock on two tables that are written all the time: it is asked
    for in short turns as well."""
    execute(empty_database, SESSIONLESS)
    schema.migrate(empty_database)
    execute(empty_database, CREATE_TABLES, MANY_ROWS.format(n=1_000))
    async with Writers.at_work(empty_database) as writers, connected(empty_database) as other:
        await other.execute("begin")
        await other.execute("update session_recalls set updated_at = now() where id = 'r1'")
        async with Migrate.started(empty_database, "--foreign-key", "sessions") as migrate:
            await migrate.says("in use by a longer transaction", times=3)
            await writers.more(10)
            await other.execute("rollback")
            assert await migrate.exit() == 0
        await writers.more(10)
    assert writers.longest < 1.0
    assert execute(
        empty_database, "select convalidated from pg_constraint where contype = 'f'"
    ) == [(True,)]


@pytest.mark.slow
async def test_an_interrupted_index_is_built_again(empty_database: str) -> None:
    """A `migrate` that is broken off in mid-build leaves an index that serves nobody; the next one
    drops it and builds it whole."""
    execute(empty_database, CREATE_TABLES, MANY_ROWS.format(n=10))
    invalid = (
        "select c.relname from pg_index i join pg_class c on c.oid = i.indexrelid where not "
        "i.indisvalid"
    )
    building = (
        "select pid from pg_stat_activity where application_name = 'recall-worker migrate' and "
        "query like '%index concurrently%'"
    )
    async with connected(empty_database) as other:
        await other.execute("begin isolation level repeatable read")
        await other.execute("select count(*) from sessions")
        async with Migrate.started(empty_database) as migrate:
            name = (await until(lambda: execute(empty_database, invalid)))[0][0]
            (pid,) = (await until(lambda: execute(empty_database, building)))[0]
            execute(empty_database, f"select pg_terminate_backend({pid})")
            assert await migrate.exit() == 3
            assert "Traceback" not in "\n".join(migrate.lines)
    assert execute(empty_database, invalid) == [(name,)]
    assert execute(empty_database, "select version from recall_schema order by 1") == [(10,), (11,)]
    assert command(empty_database, "--check").returncode == 1

    again = command(empty_database, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == {"done": ALL[2:]}
    assert execute(empty_database, invalid) == []
    assert schema.pending(empty_database) == []


@pytest.mark.slow
def test_patience_ends(empty_database: str) -> None:
    """A transaction that never ends is named as the reason, after the patience that was given;
    nothing is left half done."""
    execute(empty_database, CREATE_TABLES)
    with psycopg.connect(empty_database) as reader:
        reader.execute("select from session_recalls")
        with pytest.raises(SchemaError) as refused:
            schema.migrate(empty_database, patience=0.1)
    assert "pg_stat_activity" in refused.value.hint
    # Not even the record of the migrations, which is made with the first.
    assert execute(empty_database, "select to_regclass('recall_schema')") == [(None,)]
    assert schema.migrate(empty_database) == ALL


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"]
)
async def test_the_database_own_timeouts_do_not_matter(setting: str, empty_database: str) -> None:
    """Timeouts that are set for the application's sake break off no index that has to wait for an
    open transaction."""
    execute(empty_database, CREATE_TABLES)
    name = str(conninfo_to_dict(empty_database)["dbname"])
    async with connected(empty_database) as other:
        await other.execute(
            sql.SQL("alter database {} set {} = '200ms'").format(
                sql.Identifier(name), sql.Identifier(setting)
            )
        )
        await other.execute("begin isolation level repeatable read")
        await other.execute("select count(*) from sessions")
        async with Migrate.started(empty_database) as migrate:
            waiting = (
                "select pid from pg_stat_activity where application_name = 'recall-worker migrate' "
                "and query like '%index concurrently%' and query_start < now() - interval '300 ms'"
            )
            began = await until(
                lambda: execute(empty_database, waiting) or migrate.process.returncode is not None
            )
            assert began is not True, migrate.lines
            await other.execute("rollback")
            assert await migrate.exit() == 0


# --- the dump -------------------------------------------------------------------------------------

needs_pg_dump = pytest.mark.skipif(expected.pg_dump() is None, reason="there is no pg_dump here")


def test_settings_of_the_owners_stay(empty_database: str) -> None:
    """Whoever has set autovacuum for the table before keeps it so; where nobody has, a twentieth of
    dead rows is enough."""
    execute(
        empty_database,
        CREATE_TABLES,
        "alter table session_recalls set (autovacuum_vacuum_scale_factor = 0.3)",
    )
    schema.migrate(empty_database)
    options = (
        "select relname, reloptions from pg_class where relname in ('session_recalls', "
        "'recall_attempts') order by relname"
    )
    assert execute(empty_database, options) == [
        ("recall_attempts", ["autovacuum_vacuum_scale_factor=0.05"]),
        ("session_recalls", ["autovacuum_vacuum_scale_factor=0.3"]),
    ]


@needs_pg_dump
def test_the_schema_is_as_committed(database: str) -> None:
    """An adopted database looks as `tests/schema/expected.sql` says; `python -m tests.schema`
    writes that anew."""
    assert expected.dump(database) == expected.EXPECTED.read_text(encoding="utf-8")


@pytest.mark.slow
@needs_pg_dump
def test_a_created_table_is_like_an_adopted_one(empty_database: str) -> None:
    """Where the worker came first the schema differs by the foreign key alone, and that comes where
    it is asked for."""
    schema.migrate(empty_database)
    wanted = expected.EXPECTED.read_text(encoding="utf-8").strip().split("\n\n")
    alone = expected.dump(empty_database).strip().split("\n\n")
    assert [part for part in alone if part not in wanted] == []
    missing = [part.split()[0:6] for part in wanted if part not in alone]
    assert [" ".join(words) for words in missing] == [
        "CREATE TABLE public.sessions ( id text",
        "ALTER TABLE ONLY public.sessions ADD CONSTRAINT",
        "ALTER TABLE ONLY public.session_recalls ADD CONSTRAINT",
    ]
    execute(empty_database, CREATE_TABLES)
    schema.migrate(empty_database, foreign_key="sessions")
    assert expected.dump(empty_database).strip().split("\n\n") == wanted


@needs_pg_dump
@pytest.mark.parametrize(
    "before",
    [[CREATE_TABLES, SESSIONS, OLD_ROWS], [VERSION_15], []],
    ids=["the application's table", "version 15", "nothing"],
)
def test_the_schema_is_the_same_from_wherever_it_came(
    before: list[str], empty_database: str
) -> None:
    """From the application's table, from version 15 (both with rows in every state) and from
    nothing: the same dump, with the columns in the same order."""
    if before:
        execute(empty_database, *before)
    else:
        execute(
            empty_database, "create table sessions (id text primary key, user_id text not null)"
        )
    schema.migrate(empty_database)
    assert expected.dump(empty_database) == expected.EXPECTED.read_text(encoding="utf-8")


@needs_pg_dump
def test_the_baseline_makes_version_15(
    server: str, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baseline alone ends in what the earlier files 0001 to 0015 made, but for the line breaks
    and comments in the functions."""
    execute(empty_database, CREATE_TABLES)
    assert up_to(monkeypatch, empty_database, 15) == [name for name in ALL if int(name[:4]) <= 15]
    with postgres.database(server) as earlier:
        execute(earlier, VERSION_15)
        assert _words(expected.dump(empty_database)) == _words(expected.dump(earlier))


def _words(dump: str) -> list[str]:
    """A dump without the comments in functions' bodies and the breaks of lines and literals; and
    without the record that later versions write into a comment on recall_schema."""
    without_comments = re.sub(
        r"^ *-- .*$|^COMMENT ON TABLE public.recall_schema .*$", "", dump, flags=re.MULTILINE
    )
    # What `migrate` itself notes: which versions are there, and which index was.
    noted = r"^COMMENT ON (?:TABLE public.recall_schema|TRIGGER) .*?';$"
    without_comments = re.sub(noted, "", without_comments, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"'\n *'", "", without_comments).split()
