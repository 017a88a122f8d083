"""Dumps and restores, with the real pg_dump, pg_restore and psql: every row comes back as it was,
`migrate` knows what it finds, and the next insert works.

Each restore is compared column by column, table by table, with what was dumped.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import errors, sql

from recall_worker import schema
from recall_worker.schema import SchemaError, versions

from . import schema as expected
from .support import postgres
from .support.application import COLUMNS, CREATE_TABLES

pytestmark = pytest.mark.skipif(expected.pg_dump() is None, reason="there is no pg_dump here")

ROWS = f"""
insert into sessions select 's' || n, 'ann' from generate_series(1, 40) n;

-- As the application's old scheduler left them, before `migrate`.
insert into session_recalls ({COLUMNS}) values
    ('old zero', 's1', 'recurring', '2030-01-01', 0, null, 'm', 'pending', now(), now()),
    ('old null', 's2', 'recurring', '2020-01-01', null, 'note', 'm', 'pending', now(), now()),
    ('old negative', 's3', 'recurring', 'infinity', -5, '', 'it''s \\ 100 %', 'pending', now(),
        '-infinity'),
    ('old fine', 's4', 'recurring', '2030-01-01', 60, null, 'm', 'pending', now(), now()),
    ('old once', 's5', 'once', '2020-01-01', null, null, 'm', 'pending', now(), now()),
    ('over zero', 's1', 'recurring', '2020-01-01', 0, null, 'm', 'fired', now(), now()),
    ('over null', 's1', 'recurring', '2020-01-01', null, null, 'm', 'cancelled', now(), now());
"""
LIVED = f"""
insert into session_recalls ({COLUMNS}) values
    ('once', 's6', 'once', '2030-01-01', null, null, 'm', 'pending', now(), now()),
    ('immediate', 's7', 'immediate', now(), null, null, 'm', 'pending', now(), now()),
    ('skipped', 's8', 'recurring', '2030-01-01', 60, null, 'm', 'pending', now(), now()),
    ('edited', 's9', 'recurring', '2030-01-01', 60, null, 'm', 'pending', now(), now()),
    ('chain 1', 's10', 'once', now(), null, null, 'm', 'pending', now(), now()),
    ('paused', 's11', 'once', '2030-01-01', null, null, 'm', 'pending', now(), now()),
    ('unknown', 's12', 'once', '2030-01-01', null, null, 'm', 'pending', now(), now()),
    ('leased', 's13', 'once', now(), null, null, 'm', 'pending', now(), now()),
    ('leased again', 's14', 'recurring', now(), 60, null, 'm', 'pending', now(), now());
update session_recalls set trigger_at = trigger_at + interval '1 minute' where id = 'skipped';
update session_recalls set interval_seconds = 7200 where id = 'edited';
update session_recalls set named_at = '2031-01-01', trigger_at = '2031-01-01' where id = 'edited';
update session_recalls set paused_at = now() where id = 'paused';
update session_recalls set attempt = 1, last_outcome = 'unknown', may_still_run = true,
    begun_at = now(), planned_at = trigger_at where id = 'unknown';
update session_recalls
set lease = gen_random_uuid(), lease_until = now() + interval '1 hour', leased_at = now(),
    leased_by = 'w', attempt = 1, scheduled_for = trigger_at, planned_at = trigger_at
where id in ('chain 1', 'leased', 'leased again');
-- From inside the run of the first: that becomes `running`.
insert into session_recalls ({COLUMNS}) values
    ('chain 2', 's10', 'once', now() + interval '5 seconds', null, null, 'm', 'pending', now(),
        now());
-- What was valid when it was written: the worker fails it.
alter table session_recalls disable trigger user;
insert into session_recalls ({COLUMNS}, cadence, cron, time_zone, reason, ended_at, planned_at)
select 'cron ' || n, 's' || 20 + n, 'recurring', '2030-01-01', i, null, 'm', s, now(), now(), c, x,
    z, case s when 'failed' then 'no such cadence' end, case s when 'failed' then now() end,
    p::timestamptz
from (values
    (1, 'failed', 'lunar', null, null, 60, null),
    (2, 'failed', 'cron', null, 'Mars/Olympus', null, '2029-01-01'),
    (3, 'pending', 'cron', null, null, 0, null),
    (4, 'pending', 'lunar', null, null, 60, null),
    (5, 'pending', 'cron', '0 9 * * *', 'Europe/Berlin', 86400, '2030-01-01'),
    (6, 'running', 'grid', null, null, 0, null),
    (7, 'running', 'interval', null, null, null, '2029-01-01'),
    (8, 'pending', 'cron', '0 9 * * *', null, 0, null)
) as odd (n, s, c, x, z, i, p);
alter table session_recalls enable trigger user;
insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome, session_id, worker,
    lease, scheduled_for, ended_at, settled)
values ('once', 1, 0, 1, 'busy', 's6', 'w', gen_random_uuid(), 'infinity', now(), 'pending');
insert into recall_workers (worker, host, pid, version, slots, settings)
values ('w', 'h', 1, '1', 3, '{{"lease": 60}}');
insert into recall_endpoints (endpoint, probes) values ('e', 3);
insert into recall_chores (chore, worker, until) values ('prune', 'w', now());
insert into recall_queues (queue, paused_by) values ('night', 'ann');
insert into recall_subscriptions (queue, until) values ('default', now());
insert into recall_outbox (queue, recall_id, occurrence, body) values ('default', 'x', 1, '{{}}');
insert into recall_runs (key, session_id, fingerprint, lease, ended_at, status, answer)
values ('once:1', 's6', 'x', gen_random_uuid(), now(), 'completed', '{{}}');
insert into recall_session_locks (session_id, lease, until) values ('s7', gen_random_uuid(), now());
insert into recall_actions (actor, via, action, recall_id, detail)
values ('ann', 'command line', 'pause', 'paused', '{{"a": 1}}'),
    ('ann', 'command line', 'pause_queue', null, '{{"queue": "night"}}'),
    ('ann', 'command line', 'edit', 'edited', '{{}}');
"""
ALL = (
    "sessions",
    "session_recalls",
    "recall_actions",
    "recall_attempts",
    "recall_chores",
    "recall_endpoints",
    "recall_identity",
    "recall_queues",
    "recall_outbox",
    "recall_runs",
    "recall_schema",
    "recall_session_locks",
    "recall_subscriptions",
    "recall_workers",
)


def execute(dsn: str, *statements: str) -> list[tuple[Any, ...]]:
    """Run statements one by one; the rows of the last."""
    rows: list[tuple[Any, ...]] = []
    with psycopg.connect(dsn, autocommit=True) as conn:
        for statement in statements:
            cursor = conn.execute(statement.encode())
            rows = cursor.fetchall() if cursor.description else []
    return rows


def content(dsn: str, *but: str) -> dict[str, list[str]]:
    """Every row of every table as text, all columns, but of these tables."""
    return {
        table: [
            row
            for (row,) in execute(
                dsn, f"select to_jsonb(t)::text from {table} t order by to_jsonb(t)::text"
            )
        ]
        for table in ALL
        if table not in but
    }


def program(name: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
    """pg_dump, pg_restore or psql, to its good end."""
    found = expected.pg_dump()
    assert found is not None
    done = subprocess.run(
        [Path(found).with_name(name), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done


def psql(dsn: str, *options: str | Path) -> None:
    program("psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", dsn, *options)


@pytest.fixture(scope="module")
def source(server: str) -> Iterator[str]:
    """A database that has lived: rows in every state, valid and not."""
    with postgres.database(server) as dsn:
        execute(dsn, CREATE_TABLES, ROWS)
        schema.migrate(dsn)
        execute(dsn, LIVED)
        yield dsn


@pytest.fixture
def target(server: str) -> Iterator[str]:
    with postgres.database(server) as dsn:
        yield dsn


def next_insert_works(dsn: str) -> None:
    """The application's insert, and a record of an action, and `migrate` has nothing to do."""
    assert schema.pending(dsn) == []
    assert schema.migrate(dsn) == []
    execute(
        dsn,
        f"insert into session_recalls ({COLUMNS}) values ('next', 's40', 'once', now(), null, null,"
        " 'm', 'pending', now(), now())",
    )
    before = execute(dsn, "select max(id) from recall_actions")[0][0]
    [(id,)] = execute(
        dsn,
        "insert into recall_actions (actor, via, action, recall_id)"
        " values ('ann', 'test', 'pause', 'next') returning id",
    )
    assert id > before


FULL = {
    "plain": ([], ["psql"]),
    "plain, inserts": (["--column-inserts"], ["psql"]),
    "plain, one transaction": ([], ["psql", "--single-transaction"]),
    "custom": (["-Fc"], ["pg_restore", "--exit-on-error"]),
    "custom, two jobs": (["-Fc"], ["pg_restore", "--exit-on-error", "-j2"]),
    "custom, clean": (["-Fc"], ["pg_restore", "--clean", "--if-exists", "--exit-on-error"]),
    "custom, no owner": (
        ["-Fc"],
        ["pg_restore", "--no-owner", "--no-privileges", "--exit-on-error"],
    ),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_dump(kind: str, source: str, target: str, tmp_path: Path) -> None:
    """All rows come back; there is nothing to migrate; the database is a copy."""
    how, (restore, *options) = FULL[kind]
    file = tmp_path / "dump"
    program("pg_dump", *how, "-f", file, source)
    if "clean" in kind:
        # Into a database that has a schema and rows of its own.
        execute(target, CREATE_TABLES)
        schema.migrate(target)
    if restore == "psql":
        psql(target, *options, "-f", file)
    else:
        program("pg_restore", *options, "-d", target, file)
    assert content(target) == content(source)
    assert expected.dump(target) == expected.dump(source)
    assert schema.is_copy(target)
    next_insert_works(target)


DATA = {
    "plain": ([], ["psql"]),
    "plain, one transaction": ([], ["psql", "--single-transaction"]),
    "inserts": (["--inserts"], ["psql"]),
    "column inserts, many rows each": (["--column-inserts", "--rows-per-insert=5"], ["psql"]),
    "custom": (["-Fc"], ["pg_restore", "-a", "--exit-on-error"]),
    "custom, one transaction": (["-Fc"], ["pg_restore", "-a", "--single-transaction"]),
    "custom, triggers disabled": (
        ["-Fc"],
        ["pg_restore", "-a", "--disable-triggers", "--exit-on-error"],
    ),
}


@pytest.mark.parametrize("migrated", [False, True], ids=["schema only", "migrated"])
@pytest.mark.parametrize("kind", DATA)
def test_the_schema_and_then_the_data(
    kind: str, migrated: bool, source: str, target: str, tmp_path: Path
) -> None:
    """A dump of the schema, then (after a `migrate` or without one) a dump of the data: every
    column of every row is as it was, whatever would be refused from the application."""
    how, (restore, *options) = DATA[kind]
    if migrated and "disabled" in kind:
        # With them goes the trigger that passes over the versions that are recorded here already.
        how = [*how, "--exclude-table-data=recall_schema"]
    schema_file, data_file = tmp_path / "schema", tmp_path / "data"
    program("pg_dump", "-s", "-f", schema_file, source)
    program("pg_dump", "-a", *how, "-f", data_file, source)
    psql(target, "-f", schema_file)
    if migrated:
        assert schema.migrate(target) == [schema.RECORD]
    # A column that the application added later stands elsewhere here: COPY names its columns.
    execute(target, "alter table session_recalls add column later text")
    if restore == "psql":
        psql(target, *options, "-f", data_file)
    else:
        program("pg_restore", *options, "-d", target, data_file)
    execute(target, "alter table session_recalls drop column later")
    # What `migrate` recorded here stays; the versions are the same, and when differs.
    mine = ("recall_identity", "recall_schema") if migrated else ()
    assert content(target, *mine) == content(source, *mine)
    recorded = "select version, name from recall_schema where version >= 15 order by 1"
    assert execute(target, recorded) == execute(source, recorded)
    assert schema.is_copy(target)
    next_insert_works(target)


def test_the_data_where_workers_have_run(source: str, target: str, tmp_path: Path) -> None:
    """Rows that workers wrote here meanwhile stay as they are, and the restore goes on."""
    file = tmp_path / "data"
    program("pg_dump", "-a", "-f", file, source)
    execute(target, CREATE_TABLES)
    schema.migrate(target)
    execute(
        target,
        "insert into recall_workers (worker, host, pid, version, slots, settings)"
        " values ('w', 'here', 1, '1', 3, '{}'), ('x', 'here', 1, '1', 3, '{}')",
        "insert into recall_endpoints (endpoint, probes) values ('e', 9)",
        "insert into recall_chores (chore, worker, until) values ('prune', 'x', now())",
        "insert into recall_subscriptions (queue, until) values ('default', '2030-01-01')",
    )
    psql(target, "--single-transaction", "-f", file)
    assert content(target)["session_recalls"] == content(source)["session_recalls"]
    assert execute(target, "select worker, host from recall_workers order by 1") == [
        ("w", "here"),
        ("x", "here"),
    ]
    assert execute(target, "select probes from recall_endpoints") == [(9,)]
    assert execute(target, "select worker from recall_chores") == [("x",)]
    assert execute(target, "select until::date::text from recall_subscriptions") == [
        ("2030-01-01",)
    ]


def test_the_recalls_alone(source: str, target: str, tmp_path: Path) -> None:
    """A dump of the rows of session_recalls (and of sessions, which they refer to)."""
    file = tmp_path / "data"
    program("pg_dump", "-a", "-t", "sessions", "-t", "session_recalls", "-f", file, source)
    execute(target, CREATE_TABLES)
    schema.migrate(target)
    psql(target, "-f", file)
    assert content(target)["session_recalls"] == content(source)["session_recalls"]
    assert not schema.is_copy(target), "nothing in such a dump tells where it comes from"


@pytest.mark.slow
def test_a_dump_of_the_database_itself_is_no_copy(source: str, target: str, tmp_path: Path) -> None:
    """A backup that is restored in its own place, or data that is put back there."""
    execute(target, CREATE_TABLES, ROWS)
    schema.migrate(target)
    file = tmp_path / "dump"
    program("pg_dump", "-Fc", "-f", file, target)
    before = content(target)
    program("pg_restore", "--clean", "--if-exists", "--exit-on-error", "-d", target, file)
    assert content(target) == before
    assert not schema.is_copy(target)
    program("pg_dump", "-a", "-f", file, target)
    execute(target, "truncate sessions, session_recalls")
    psql(target, "-f", file)
    assert content(target, "recall_identity") == {
        table: rows for table, rows in before.items() if table != "recall_identity"
    }
    assert not schema.is_copy(target)


def test_a_template(server: str, source: str) -> None:
    """`create database … template`: a copy on the same server."""
    with postgres.database(server, source, recorded=False) as target:
        assert content(target) == content(source)
        assert schema.is_copy(target) and schema.pending(target) == []


# --- the insert trigger ---------------------------------------------------------------------------

BAD = {
    "no distance": "('x', 's', 'recurring', now(), null, null, 'm', 'pending', now(), now())",
    "no distance, 0": "('x', 's', 'recurring', now(), 0, null, 'm', 'pending', now(), now())",
    "no distance, below": "('x', 's', 'recurring', now(), -1, null, 'm', 'pending', now(), now())",
}


@pytest.mark.parametrize("row", BAD)
@pytest.mark.parametrize(
    "setting", ["", "set search_path = ''", "set check_function_bodies = off"], ids=str
)
def test_the_application_is_judged(row: str, setting: str, database: str) -> None:
    """Its ten columns are refused as before, also by a session that has one of the two settings by
    which a restore is known; and no refusal can be taken for a session that has one already."""
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("insert into sessions values ('s', 'ann')")
        conn.execute(setting.encode())
        with pytest.raises(errors.CheckViolation) as refused:
            conn.execute(
                f"insert into public.session_recalls ({COLUMNS}) values {BAD[row]}".encode()
            )
    assert "unique" not in str(refused.value) and "duplicate" not in str(refused.value)


def test_only_what_is_live_is_judged(database: str) -> None:
    """The application may write what is over as it likes, and its dates stay what they are."""
    over = BAD["no distance, 0"].replace("pending", "cancelled")
    execute(
        database,
        "insert into sessions values ('s', 'ann')",
        f"insert into session_recalls ({COLUMNS}) values {over}",
    )
    assert execute(database, "select interval_seconds, planned_at from session_recalls") == [
        (0, None)
    ]


@pytest.mark.parametrize(
    "mark",
    [
        "planned_at = '2020-01-01'",
        "leased_at = '2020-01-01'",
        "named_at = '2020-01-01'",
        "edited_at = '2020-01-01'",
        "last_outcome = 'busy'",
        "edits = 3",
        "occurrence = 7",
    ],
)
def test_a_row_with_our_marks_is_kept_as_given(mark: str, database: str) -> None:
    """Whoever copies rows by other means than pg_dump: what workers and commands have written marks
    them."""
    name, _, value = mark.partition(" = ")
    execute(
        database,
        "insert into sessions values ('s', 'ann')",
        f"insert into session_recalls ({COLUMNS}, {name}) values "
        f"('x', 's', 'recurring', '2030-01-01', 0, null, 'm', 'pending', now(), now(), {value})",
    )
    planned = "2020" if name == "planned_at" else None
    assert execute(
        database, f"select interval_seconds, {mark}, left(planned_at::text, 4) from session_recalls"
    ) == [(0, True, planned)]


def test_nothing_is_moved_for_a_row_that_is_put_back(database: str) -> None:
    """A run that goes on in the session keeps its slot, and the restore is refused by the index."""
    once = "('{}', 's', 'once', now(), null, null, 'm', 'pending', now(), now())"
    execute(
        database,
        "insert into sessions values ('s', 'ann')",
        f"insert into session_recalls ({COLUMNS}) values {once.format('in a run')}",
        "update session_recalls set lease = gen_random_uuid(), lease_until = 'infinity'",
    )
    insert = f"insert into public.session_recalls ({COLUMNS}) values {once.format('new')}"
    with pytest.raises(errors.UniqueViolation):
        execute(database, f"set search_path = ''; set check_function_bodies = off; {insert}")
    execute(database, insert)
    assert execute(database, "select id, status from session_recalls order by 1") == [
        ("in a run", "running"),
        ("new", "pending"),
    ]


# --- the record of the migrations -----------------------------------------------------------------


def test_the_comment_says_what_the_rows_say(source: str) -> None:
    with psycopg.connect(source, autocommit=True) as conn:
        rows = versions.read(conn)
        conn.execute("create temporary table recall_schema (version integer, oldest_code integer)")
        conn.execute(
            sql.SQL("comment on table pg_temp.recall_schema is {}").format(
                sql.Literal(rows.comment)
            )
        )
        said = versions.read(conn)
    assert said.lost and not rows.lost
    assert said.versions == {v for v in rows.versions if v >= schema.BASELINE}
    assert said.oldest_code == rows.oldest_code


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["delete from recall_schema", "drop table recall_schema"])
def test_a_schema_without_its_comment(
    lost: str, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a version from before the comment left it, at each of its migrations: what it has left
    behind tells how far it came, and `migrate` goes on from there."""
    execute(empty_database, CREATE_TABLES)
    every = schema.migrations()
    wanted = [f"{m.version:04} {m.name}" for m in every]
    for count, migration in enumerate(every, 1):
        if migration.version > versions.LAST_WITHOUT_COMMENT:
            break
        with monkeypatch.context() as patch:
            patch.setattr(schema, "migrations", lambda count=count: every[:count])
            schema.migrate(empty_database)
        execute(empty_database, "comment on table recall_schema is null", lost)
        assert schema.pending(empty_database) == [schema.RECORD, *wanted[count:]]
        with monkeypatch.context() as patch:
            patch.setattr(schema, "migrations", lambda count=count: every[:count])
            assert schema.migrate(empty_database) == [schema.RECORD]
    assert schema.migrate(empty_database) == wanted[count - 1 :]
    assert schema.pending(empty_database) == []
    assert expected.dump(empty_database) == expected.EXPECTED.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        "drop index idx_recalls_due",
        "alter table session_recalls drop column may_still_run",
        "drop table recall_endpoints",
        "create index on session_recalls (reason)",
    ],
)
def test_what_is_neither_whole_nor_on_record_is_put_back(damage: str, empty_database: str) -> None:
    """Neither rows nor comment, and something is missing in the middle, or was added by somebody:
    the trigger tells that the table is ours, and what is missing of the release is put back."""
    execute(empty_database, CREATE_TABLES)
    schema.migrate(empty_database)
    execute(
        empty_database,
        "comment on table recall_schema is null",
        "delete from recall_schema",
        damage,
    )
    assert schema.pending(empty_database)[0] == schema.RECORD
    assert schema.migrate(empty_database)[0] == schema.RECORD
    assert schema.pending(empty_database) == []
    assert execute(empty_database, "select max(version) from recall_schema") == [
        (schema.GENERATION,)
    ]


@pytest.mark.slow
def test_the_table_alone(source: str, target: str, tmp_path: Path) -> None:
    """A dump of session_recalls without the tables beside it: refused before the first change."""
    file = tmp_path / "dump"
    program(
        "pg_dump",
        "--section=pre-data",
        "-t",
        "sessions",
        "-t",
        "session_recalls",
        "-f",
        file,
        source,
    )
    psql(target, "-f", file)
    before = expected.dump(target)
    with pytest.raises(SchemaError) as refused:
        schema.migrate(target)
    assert "nothing tells which migrations" in str(refused.value)
    assert expected.dump(target) == before


def test_a_newer_schema_is_known_by_its_comment(database: str) -> None:
    """Where only newer code works with it, a dump of its schema is refused as the database is."""
    code = schema.GENERATION + 1
    execute(
        database,
        f"insert into recall_schema (version, name, oldest_code) values ({code}, 'n', {code})",
    )
    with psycopg.connect(database, autocommit=True) as conn:
        versions.write(conn, schema.BASELINE)
        conn.execute("delete from recall_schema")
    for act in (schema.pending, schema.migrate):
        with pytest.raises(SchemaError) as refused:
            act(database)
        assert f"version {code}" in str(refused.value)
