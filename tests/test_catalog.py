"""What somebody's migration tool dropped or altered: named by `doctor` and `migrate --check`, put
back by `migrate`; an API that remembers keys skips no run afterwards.

Each kind of damage is tried on each object that the release has (`sql/released.json`), so that what
a later migration adds is tried, too. The proof that all is back is the dump of the schema, not the
comparison that is tested.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from recall_worker import schema
from recall_worker.database.ledger import Ledger
from recall_worker.judge import next_rekey
from recall_worker.recall import KEYS_OF_AN_ERA, Answered, Claim, Ending, Finish
from recall_worker.schema import SchemaError, catalog, released

from . import schema as expected
from .support.application import COLUMNS, CREATE_TABLES
from .test_cli import operate
from .test_recall import claim_with
from .test_schema import execute, up_to

pytestmark = pytest.mark.full

RECORD = released.released()
OURS = [
    (table, column)
    for table, made in RECORD.tables.items()
    for column, of in made.columns.items()
    if table != "session_recalls" or of.since > released.APPLICATION
]
"""Every column of ours."""
KEPT = {("recall_schema", column) for column in RECORD.tables["recall_schema"].columns}
"""Of the record of the migrations: without it nobody knows what was applied."""
TABLES = [table for table in RECORD.tables if table not in ("session_recalls", "recall_schema")]
TRIGGERS = list(RECORD.tables["session_recalls"].triggers)
INDEXES = [
    (table, index)
    for table, made in RECORD.tables.items()
    for index in made.indexes
    if index not in made.constraints
]


def found(dsn: str) -> list[str]:
    """What differs, in sentences."""
    return [difference.what for difference in schema.differences(dsn)]


def lines(dsn: str) -> list[str]:
    """The dump's lines in an order that does not depend on that of columns."""
    return sorted(line.strip().rstrip(",") for line in expected.dump(dsn).splitlines() if line)


WHOLE = sorted(
    line.strip().rstrip(",")
    for line in expected.EXPECTED.read_text(encoding="utf-8").splitlines()
    if line
)


def is_whole(dsn: str) -> None:
    """The schema is as released, to the letter, and nobody finds anything to do."""
    assert found(dsn) == []
    assert schema.pending(dsn) == []
    if expected.pg_dump() is not None:
        assert lines(dsn) == WHOLE


async def works(dsn: str) -> None:
    """The application schedules, a worker claims and settles, an operator looks."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("insert into sessions values ('works', 'ann') on conflict do nothing")
        conn.execute(
            f"insert into session_recalls ({COLUMNS}) values ('works', 'works', 'once', now(), "
            f"null, null, 'm', 'pending', now(), now())".encode()
        )
    ledger = Ledger(dsn, "w", 60.0)
    try:
        [claim] = (await ledger.claim(1)).claims
        await ledger.settle([(ending(claim), Finish("fired", None))])
    finally:
        await ledger.close()
    assert execute(dsn, "select status, reason from session_recalls where id = 'works'") == [
        ("fired", None)
    ]
    assert "works" in operate(dsn, "list").out


def ending(claim: Claim) -> Ending:
    return Ending(claim, Answered(200), 0.0, 0.1, time.monotonic())


@pytest.fixture
def conn(database: str) -> Iterator[psycopg.Connection[Any]]:
    """A superuser's connection to the test's database."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


# --- the record -----------------------------------------------------------------------------------


def test_the_record_is_what_migrations_make(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sql/released.json` is what `python -m tests.schema` would write, on any PostgreSQL; but for
    the rights of the roles, which test_roles compares."""
    made = expected.record(empty_database, lambda dsn, version: up_to(monkeypatch, dsn, version))
    wanted = released.to_json(RECORD) | {"privileges": {}}
    assert released.to_json(made) == wanted


def test_the_record_is_read_as_it_is_written() -> None:
    """Nothing is lost on the way through JSON."""
    assert released.from_json(json.loads(expected.written(RECORD))) == RECORD


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("(status = 'pending'::text)", "(status = 'pending')"),
        ("((status)::text = 'pending'::text)", "(status = 'pending')"),
        (
            "((status)::text = ANY ((ARRAY['a'::character varying, "
            "'b'::character varying])::text[]))",
            "(status = ANY (ARRAY['a', 'b']))",
        ),
        (
            "(status = ANY (ARRAY['a'::text, 'it''s::text (b)'::text]))",
            "(status = ANY (ARRAY['a', 'it''s::text (b)']))",
        ),
        ("((new.status)::text <> ALL (ARRAY['x'::text]))", "(new.status <> ALL (ARRAY['x']))"),
        ("'{}'::jsonb", "'{}'::jsonb"),
        ("(now() + '00:01:00'::interval)", "(now() + '00:01:00'::interval)"),
        ("((lease IS NOT NULL) AND (a = b))", "((lease IS NOT NULL) AND (a = b))"),
    ],
)
def test_definitions_are_compared_without_casts_to_text(given: str, plain: str) -> None:
    """PostgreSQL prints them where the application's columns are varchar; strings stay as they
    are."""
    assert released.plain(given) == plain


@pytest.mark.parametrize("name", ["new", "My Schema", 'a"b'])
def test_the_schema_may_have_any_name(name: str, empty_database: str) -> None:
    """A name that needs quotes, and one that PL/pgSQL gives to a row."""
    quoted = '"' + name.replace('"', '""') + '"'
    execute(empty_database, f"create schema {quoted}; set search_path = {quoted}; {CREATE_TABLES}")
    path = quoted.replace("\\", "\\\\").replace(" ", "\\ ")
    dsn = make_conninfo(empty_database, options=f"-c search_path={path}")
    schema.migrate(dsn)
    assert found(dsn) == []
    execute(dsn, "drop function recall_before_insert() cascade")
    assert len(found(dsn)) == 2
    schema.migrate(dsn)
    assert found(dsn) == []


def test_columns_of_varchar_and_bigint_are_no_difference(empty_database: str) -> None:
    """What the application chose for its own ten columns changes how PostgreSQL prints our
    definitions, and nothing else."""
    tables = re.sub(r"\btext\b(?! primary)", "varchar(200)", CREATE_TABLES).replace(
        "interval_seconds integer", "interval_seconds bigint"
    )
    execute(empty_database, tables)
    schema.migrate(empty_database)
    assert found(empty_database) == []
    for damage, names in (
        ("drop index {}", [index for _, index in INDEXES]),
        ("drop trigger {} on session_recalls", TRIGGERS),
    ):
        execute(empty_database, *map(damage.format, names))
        assert len(found(empty_database)) == len(names)
        schema.migrate(empty_database)
        assert found(empty_database) == []


# --- each kind, on each object --------------------------------------------------------------------


def damages() -> list[tuple[str, list[tuple[str, str]]]]:
    """Kinds of damage; each a list of statements with what is to be said of them."""
    columns = [(t, c, RECORD.tables[t].columns[c]) for t, c in OURS]
    some = {
        "text": "'x'",
        "integer": "7",
        "bigint": "7",
        "uuid": "gen_random_uuid()",
        "timestamp with time zone": "'2001-01-01'",
        "jsonb": "'[]'",
        "text[]": "'{x}'",
    }
    keys = {
        (t, c)
        for t, made in RECORD.tables.items()
        for k in made.constraints.values()
        if k.kind == "p"
        for c in k.columns
    }
    without_triggers = "".join(f"drop trigger if exists {n} on session_recalls;" for n in TRIGGERS)
    without_triggers += "".join(
        f"drop index if exists {i};" for _, i in INDEXES if "pending" not in i
    )
    others = {"integer": "bigint", "text": "varchar(300)", "boolean": "integer", "uuid": "text"}
    return [
        (
            "columns dropped",
            [
                (f"alter table {t} drop column {c} cascade", f"column {c} of {t} is missing")
                for t, c, _ in columns
                if (t, c) not in KEPT
            ],
        ),
        (
            "types altered",
            [
                (
                    f"{without_triggers} alter table {t} alter column {c} drop default, "
                    f"alter column {c} type {others.get(of.type, 'text')} using "
                    + (
                        f"{c}::integer"
                        if of.type == "boolean"
                        else f"({c}::text)::{others.get(of.type, 'text')}"
                    ),
                    f"column {c} of {t} is of type",
                )
                for t, c, of in columns
                if not of.identity
            ],
        ),
        (
            "defaults",
            [
                (
                    f"alter table {t} alter column {c} drop default"
                    if of.default is not None
                    else f"alter table {t} alter column {c} set default {some[of.type]}",
                    f"column {c} of {t} has ",
                )
                for t, c, of in columns
                if not of.identity
            ],
        ),
        (
            "null",
            [
                (
                    f"alter table {t} alter column {c} drop not null"
                    if of.not_null
                    else f"alter table {t} alter column {c} set not null",
                    f"column {c} of {t} may ",
                )
                for t, c, of in columns
                if not of.identity and (t, c) not in keys
            ],
        ),
        (
            "identity dropped",
            [
                (
                    f"alter table {t} alter column {c} drop identity",
                    f"column {c} of {t} is numbered in another way",
                )
                for t, c, of in columns
                if of.identity
            ],
        ),
        (
            "identity altered",
            [
                (
                    f"alter table {t} alter column {c} set generated by default",
                    f"column {c} of {t} is numbered in another way",
                )
                for t, c, of in columns
                if of.identity
            ],
        ),
        (
            "keys dropped",
            [
                (
                    f"alter table {t} drop constraint {name} cascade",
                    f"constraint {name} is missing",
                )
                for t, made in RECORD.tables.items()
                for name, rule in made.constraints.items()
                if rule.kind == "p"
            ],
        ),
        ("indexes dropped", [(f"drop index {i}", f"index {i} is missing") for _, i in INDEXES]),
        (
            "indexes of another definition",
            [
                (
                    f"drop index {i}; create index {i} on {t} ((1))",
                    f"index {i} has another definition",
                )
                for t, i in INDEXES
            ],
        ),
        (
            "triggers dropped",
            [(f"drop trigger {n} on session_recalls", f"{n} is missing") for n in TRIGGERS],
        ),
        (
            "triggers disabled",
            [
                (f"alter table session_recalls disable trigger {n}", f"{n} is disabled")
                for n in TRIGGERS
            ],
        ),
        (
            "triggers for replicas",
            [
                (
                    f"alter table session_recalls enable replica trigger {n}",
                    f"{n} fires in replica sessions only",
                )
                for n in TRIGGERS
            ],
        ),
        (
            "triggers of another definition",
            [
                (
                    f"create or replace trigger {n} after update on session_recalls for each row "
                    "execute function recall_ring()",
                    f"{n} has another definition",
                )
                for n in TRIGGERS
            ],
        ),
        (
            "triggers renamed",
            [
                (
                    f"alter trigger {n} on session_recalls rename to a_{n}",
                    f"{n} is called a_{n} now",
                )
                for n in TRIGGERS
            ],
        ),
        (
            "functions dropped",
            [
                (f"drop function {f}() cascade", f"function {f} is missing")
                for f in RECORD.functions
            ],
        ),
        (
            "bodies altered",
            [
                (
                    f"create or replace function {f}() returns trigger language plpgsql "
                    "as 'begin return new; end'",
                    f"function {f} is not as released",
                )
                for f in RECORD.functions
            ],
        ),
        (
            "functions with settings",
            [
                (
                    f"alter function {f}() set search_path = nowhere",
                    f"function {f} runs under other settings",
                )
                for f in RECORD.functions
            ],
        ),
        (
            "functions as their definer",
            [
                (
                    # One of them is released as its definer's.
                    f"alter function {f}() security {'invoker' if of.definer else 'definer'}",
                    f"function {f} runs under other settings or rights",
                )
                for f, of in RECORD.functions.items()
            ],
        ),
        (
            "tables dropped",
            [(f"drop table {t} cascade", f"table {t} is missing") for t in TABLES],
        ),
        (
            "tables renamed",
            [
                (f"alter table {t} rename to mine_{t}", f"table {t} is called mine_{t} now")
                for t in [*TABLES, "recall_schema"]
                if RECORD.tables[t].constraints
            ],
        ),
        (
            "tables moved",
            [
                (
                    f"alter table {t} set schema other",
                    f"table {t} is in schema other, and session_recalls in public",
                )
                for t in [*TABLES, "recall_schema"]
            ],
        ),
        (
            "tables unlogged",
            [
                (f"alter table {t} set unlogged", f"table {t} is not written to the log")
                for t in [*TABLES, "recall_schema"]
            ],
        ),
    ]


@pytest.mark.parametrize(
    "cases", [pytest.param(cases, id=kind.replace(" ", "-")) for kind, cases in damages()]
)
async def test_what_was_damaged_is_named_and_put_back(
    cases: list[tuple[str, str]], database: str
) -> None:
    """With all objects of a kind damaged at once each is named, `migrate` puts all back, recalls
    run, and a second `migrate` has nothing to do."""
    assert cases
    execute(database, "create schema other", *(damage for damage, _ in cases))
    pending = schema.pending(database)
    for damage, said in cases:
        assert [what for what in pending if what.startswith(said)], (damage, pending)
    done = schema.migrate(database)
    assert {what for what in pending if what in done} == set(pending)
    assert found(database) == [] and schema.pending(database) == []
    execute(database, "drop schema other")
    if "create index" not in cases[0][0]:
        is_whole(database)
    await works(database)
    assert schema.migrate(database) == []


# --- indexes --------------------------------------------------------------------------------------


def made(dsn: str) -> dict[str, str]:
    """The indexes of session_recalls, by name."""
    return dict(
        execute(
            dsn,
            "select indexname::text, indexdef from pg_indexes where tablename = 'session_recalls'",
        )
    )


@pytest.mark.parametrize(
    ("ours", "another"),
    [
        ("idx_recalls_due", None),
        ("idx_recalls_one_run", None),
        ("idx_recalls_active_pending", None),
        (
            "idx_recalls_active_pending",
            "create unique index {0} on session_recalls (session_id) include (trigger_at) "
            "where status in ('pending')",
        ),
        (
            "idx_recalls_session_status",
            "create index {0} on session_recalls (session_id, status, id)",
        ),
        (
            "idx_recalls_session_status",
            "create index {0} on session_recalls (session_id desc, status) include (trigger_at)",
        ),
        (
            "idx_recalls_trigger_at_status",
            "create index {0} on session_recalls (trigger_at desc nulls last, status)",
        ),
        ("session_recalls_pkey", "create unique index {0} on session_recalls (id)"),
    ],
)
async def test_an_index_counts_by_its_definition(
    ours: str, another: str | None, database: str
) -> None:
    """Under another name it serves as well: nobody complains, and `migrate` builds no second one.
    Of the application's own three an equivalent will do."""
    if another is None:
        execute(database, f"alter index {ours} rename to of_the_application")
    else:
        drop = f"drop index {ours}"
        if ours.endswith("pkey"):
            drop = f"alter table session_recalls drop constraint {ours}"
        execute(database, drop, another.format("of_the_application"))
    before = made(database)
    assert "of_the_application" in before and ours not in before
    assert found(database) == []
    assert schema.migrate(database) == []
    assert made(database) == before
    await works(database)


@pytest.mark.parametrize(
    ("index", "definition"),
    [
        ("idx_recalls_due", "create index {0} on session_recalls (created_at)"),
        (
            "idx_recalls_due",
            "create index {0} on session_recalls (coalesce(lease_until, trigger_at))",
        ),
        ("idx_recalls_one_run", "create unique index {0} on session_recalls (session_id, id)"),
        (
            "idx_recalls_one_run",
            "create index {0} on session_recalls (session_id) where lease is not "
            "null and status in ('pending', 'running')",
        ),
        (
            "idx_recalls_active_pending",
            "create unique index {0} on session_recalls (session_id, call_type) "
            "where status = 'pending'",
        ),
        (
            "idx_recalls_active_pending",
            "create unique index {0} on session_recalls (session_id, id) where status = 'fired'",
        ),
        ("idx_recalls_session_status", "create index {0} on session_recalls (status, session_id)"),
        (
            "idx_recalls_session_status",
            "create index {0} on session_recalls using hash (session_id)",
        ),
        (
            "idx_recalls_trigger_at_status",
            "create index {0} on session_recalls (trigger_at, status) where status = 'pending'",
        ),
        ("session_recalls_pkey", "create index {0} on session_recalls (id)"),
        ("session_recalls_pkey", "create unique index {0} on session_recalls (lower(id))"),
        ("session_recalls_pkey", "create unique index {0} on session_recalls (id) where id > 'a'"),
    ],
)
async def test_a_name_of_ours_proves_nothing(index: str, definition: str, database: str) -> None:
    """An index of the application's that is called as ours, and is another, does not pass for it:
    ours is built under a free name, and the application's stays."""
    drop = f"drop index {index}"
    if index.endswith("pkey"):
        drop = f"alter table session_recalls drop constraint {index}"
    execute(database, drop, definition.format(index))
    theirs = made(database)[index]
    assert [what for what in found(database) if index in what]
    schema.migrate(database)
    assert made(database)[index] == theirs
    assert f"{index}_2" in made(database)
    assert found(database) == [] and schema.pending(database) == []
    await works(database)


def test_a_foreign_index_from_before_the_adoption(empty_database: str) -> None:
    """`create index if not exists` passes over it: the comparison does not, and names that are
    taken by other relations, too, are left alone."""
    execute(
        empty_database,
        CREATE_TABLES,
        "create index idx_recalls_due on session_recalls (created_at)",
        "create index idx_recalls_due_2 on sessions (user_id)",
        "create table idx_recalls_aborting (x integer)",
    )
    done = schema.migrate(empty_database)
    assert "index idx_recalls_due has another definition than recall-worker's" in done
    assert {"idx_recalls_due", "idx_recalls_due_3", "idx_recalls_aborting_2"} <= set(
        made(empty_database)
    )
    assert found(empty_database) == []


def test_a_table_without_the_applications_indexes(empty_database: str) -> None:
    """They are built, as the workers' statements count on them."""
    execute(
        empty_database,
        CREATE_TABLES,
        "drop index idx_recalls_trigger_at_status, idx_recalls_session_status",
    )
    schema.migrate(empty_database)
    is_whole(empty_database)


def test_a_table_that_never_had_the_index_over_one_pending_recall(empty_database: str) -> None:
    """Its application wants it so: none is built. Once the table was seen with it, it is missed."""
    execute(empty_database, CREATE_TABLES, "drop index idx_recalls_active_pending")
    schema.migrate(empty_database)
    assert "idx_recalls_active_pending" not in made(empty_database)
    assert found(empty_database) == [] and schema.pending(empty_database) == []
    execute(empty_database, CREATE_TABLES)
    schema.migrate(empty_database)
    execute(empty_database, "drop index idx_recalls_active_pending")
    assert found(empty_database) == ["index idx_recalls_active_pending is missing"]
    schema.migrate(empty_database)
    is_whole(empty_database)


def test_rows_that_stand_in_the_way_of_an_index(database: str) -> None:
    """Two pending recalls in a session: `migrate` does all else, and says what to do; `--check`
    does not ask for what it can't do; `doctor` names it."""
    execute(
        database,
        "drop index idx_recalls_active_pending, idx_recalls_due",
        "insert into sessions values ('s', 'ann')",
        *(
            f"insert into session_recalls ({COLUMNS}) values ('{id}', 's', 'recurring', now(), 60, "
            "null, 'm', 'pending', now(), now())"
            for id in "ab"
        ),
    )
    said: list[str] = []
    assert schema.migrate(database, said.append) == ["index idx_recalls_due is missing"]
    assert "cancel all but one of each" in " ".join(said)
    assert schema.pending(database) == []
    assert found(database) == ["index idx_recalls_active_pending is missing"]
    assert not execute(database, "select from pg_index where not indisvalid")
    execute(database, "update session_recalls set status = 'cancelled' where id = 'b'")
    assert schema.pending(database) == ["index idx_recalls_active_pending is missing"]
    schema.migrate(database)
    is_whole(database)


def test_an_invalid_index_of_ours_is_built_anew(database: str) -> None:
    """What an interrupted build has left is dropped; nothing is built beside it."""
    execute(
        database,
        "update pg_index set indisvalid = false where indexrelid = 'idx_recalls_due'::regclass",
    )
    assert found(database) == ["index idx_recalls_due is invalid"]
    schema.migrate(database)
    is_whole(database)


def test_rows_of_our_own_that_stand_in_the_way_of_a_key(database: str) -> None:
    """Of rows of ours that can't be told apart the last one stays."""
    execute(
        database,
        "alter table recall_chores drop constraint recall_chores_pkey",
        "insert into recall_chores (chore, worker, until) values ('prune', 'a', now()), "
        "('prune', 'b', now()), ('other', 'c', now())",
    )
    schema.migrate(database)
    is_whole(database)
    assert execute(database, "select chore, worker from recall_chores order by 1") == [
        ("other", "c"),
        ("prune", "b"),
    ]


# --- statuses -------------------------------------------------------------------------------------


def test_each_status_can_be_written(database: str) -> None:
    """A check that a tool has put back as the application's model has it keeps the workers from
    writing: the survey finds it, and it gives way to one that allows ours besides."""
    execute(
        database,
        "alter table session_recalls add check (status in ('pending', 'fired', 'cancelled'))",
    )
    assert schema.pending(database) == [schema.STATUSES]
    assert schema.migrate(database) == [schema.STATUSES]
    is_whole(database)


def test_what_the_application_allows_is_its_own(database: str) -> None:
    """A check that allows more, and none at all, is no difference."""
    execute(database, "alter table session_recalls drop constraint session_recalls_status_known")
    assert found(database) == [] and schema.migrate(database) == []
    execute(
        database,
        "alter table session_recalls add constraint theirs check (status in ('pending', 'running', "
        "'fired', 'cancelled', 'failed', 'archived'))",
    )
    assert found(database) == [] and schema.migrate(database) == []


# --- moved ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("move", "said"),
    [
        ("alter schema app rename to core", "names another schema than core"),
        (
            "create schema core; alter table app.session_recalls set schema core; alter table "
            "app.sessions set schema core",
            "is in schema app, and session_recalls in core",
        ),
    ],
)
async def test_a_schema_that_was_renamed(move: str, said: str, empty_database: str) -> None:
    """The functions name the table's old schema, and every insert fails: that is named, and put
    back; so is a table that was moved without ours."""
    execute(empty_database, f"create schema app; set search_path = app; {CREATE_TABLES}")
    schema.migrate(make_conninfo(empty_database, options="-c search_path=app"))
    execute(empty_database, move)
    dsn = make_conninfo(empty_database, options="-c search_path=core,public")
    assert [what for what in schema.pending(dsn) if said in what]
    schema.migrate(dsn)
    assert found(dsn) == [] and schema.pending(dsn) == []
    await works(dsn)
    assert schema.migrate(dsn) == []
    left = "select relname from pg_class where relnamespace = to_regnamespace('app')"
    assert execute(empty_database, left) == []


def test_another_installation_is_left_alone(empty_database: str) -> None:
    """Tables in a schema with a session_recalls of its own belong to that."""
    for name in ("one", "two"):
        execute(empty_database, f"create schema {name}; set search_path = {name}; {CREATE_TABLES}")
        schema.migrate(make_conninfo(empty_database, options=f"-c search_path={name}"))
    dsn = make_conninfo(empty_database, options="-c search_path=two")
    execute(empty_database, "drop table two.recall_attempts")
    assert found(dsn) == ["table recall_attempts is missing"]
    schema.migrate(dsn)
    tables = "select schemaname from pg_tables where tablename = 'recall_attempts' order by 1"
    assert execute(empty_database, tables) == [("one",), ("two",)]


async def test_the_applications_table_dropped_and_created_anew(database: str) -> None:
    """By the application at its next start, or by `migrate` itself."""
    execute(database, "drop table session_recalls", CREATE_TABLES)
    schema.migrate(database)
    is_whole(database)
    execute(database, "drop table session_recalls")
    assert found(database) == ["table session_recalls is missing"]
    schema.migrate(database)
    assert found(database) == []
    await works(database)


# --- owners, other rights, other places -----------------------------------------------------------


def test_a_role_that_only_reads_sees_the_same(database: str, conn: Any) -> None:
    """The comparison needs no right and writes nothing: as on a standby."""
    conn.execute("drop index idx_recalls_due; alter table session_recalls drop column skips")
    wanted = found(database)
    conn.execute("drop role if exists recall_test_catalog; create role recall_test_catalog login")
    try:
        with psycopg.connect(
            database, user="recall_test_catalog", options="-c default_transaction_read_only=on"
        ) as reader:
            assert [d.what for d in catalog.differences(reader)] == wanted
    finally:
        conn.execute("drop role recall_test_catalog")


def test_a_locked_table_is_said(database: str, conn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL prints no definition of what is locked exclusively: nobody waits for ever."""
    monkeypatch.setattr(catalog, "LOOK_MS", 50)
    with conn.transaction():
        conn.execute("lock table session_recalls in access exclusive mode")
        for look in (schema.pending, schema.differences):
            with pytest.raises(SchemaError, match="is locked"):
                look(database)
        with pytest.raises(SchemaError, match="could not be locked"):
            schema.migrate(database, patience=0.1)
    assert schema.migrate(database) == []


def test_owners(database: str, conn: Any) -> None:
    """A role that is no relative of the table's owner could change what inserts run. A superuser's
    objects, and those of a member of the owner's, are fine."""
    roles = ["recall_test_owner", "recall_test_member", "recall_test_other"]
    for role in roles:
        conn.execute(f"drop role if exists {role}; create role {role}".encode())
    conn.execute("grant recall_test_owner to recall_test_member")
    try:
        conn.execute("grant all on schema public to recall_test_owner, recall_test_other")
        conn.execute("alter table session_recalls owner to recall_test_owner")
        conn.execute("alter table recall_workers owner to recall_test_member")
        assert found(database) == []
        conn.execute("alter function recall_ring() owner to recall_test_other")
        conn.execute("alter table recall_attempts owner to recall_test_other")
        assert found(database) == [
            "table recall_attempts belongs to recall_test_other, and session_recalls to "
            "recall_test_owner",
            "function recall_ring belongs to recall_test_other, and session_recalls to "
            "recall_test_owner",
        ]
        schema.migrate(database)
        assert found(database) == []
        assert execute(
            database, "select proowner::regrole::text from pg_proc where proname = 'recall_ring'"
        ) == [("recall_test_owner",)]
    finally:
        for role in reversed(roles):
            conn.execute(f"reassign owned by {role} to postgres".encode())
            conn.execute(f"drop owned by {role}; drop role {role}".encode())


def test_what_the_application_adds_is_its_own(database: str) -> None:
    """Columns, defaults, triggers, indexes, checks, policies, views: none is a difference, and none
    is touched."""
    execute(
        database,
        "alter table session_recalls add column tenant text not null default 'x', "
        "add column size integer generated always as (length(additional_context_message)) stored",
        "alter table session_recalls alter column created_at set default now()",
        "alter table session_recalls add check (length(internal_comment) < 1000)",
        "create index on session_recalls (tenant)",
        "create function audit() returns trigger language plpgsql as 'begin return new; end'",
        "create trigger audit before update on session_recalls for each row execute function "
        "audit()",
        "create policy all_of_them on session_recalls using (true)",
        "create view recalls as select * from session_recalls",
        "alter table session_recalls set (fillfactor = 70)",
    )
    before = expected.dump(database) if expected.pg_dump() else ""
    assert found(database) == [] and schema.migrate(database) == []
    assert before == (expected.dump(database) if before else "")


def test_what_postgresql_refuses_is_said(database: str) -> None:
    """A view of the application's that depends on a column keeps its type from being put back: that
    is said, all else is done."""
    execute(
        database,
        "drop index idx_recalls_due",
        "alter table session_recalls alter column reason type varchar(9), drop column zone_data",
        "create view reasons as select reason from session_recalls",
    )
    with pytest.raises(SchemaError) as refused:
        schema.migrate(database)
    assert "column reason of session_recalls is of type character varying(9), not text" in str(
        refused.value
    )
    assert "view" in str(refused.value) and "depends on it" in refused.value.hint
    assert len(found(database)) == 1
    execute(database, "drop view reasons")
    schema.migrate(database)
    assert found(database) == []


def test_values_that_do_not_fit(database: str) -> None:
    """Nor are values lost that the right type can't hold."""
    execute(
        database,
        "insert into sessions values ('s', 'ann')",
        f"insert into session_recalls ({COLUMNS}) values ('r', 's', 'once', now(), null, null, "
        "'m', 'pending', now(), now())",
        "alter table session_recalls alter column missed type text",
        "update session_recalls set missed = 'many'",
    )
    with pytest.raises(SchemaError, match=r"column missed .* invalid input syntax"):
        schema.migrate(database)
    assert execute(database, "select missed from session_recalls") == [("many",)]


def test_rows_keep_their_values(database: str) -> None:
    """What a type, a default or a null was changed to does not change what stands there."""
    execute(
        database,
        "insert into sessions values ('s', 'ann')",
        f"insert into session_recalls ({COLUMNS}) values ('r', 's', 'once', now(), null, null, "
        "'m', 'pending', now(), now())",
        "update session_recalls set missed = 7, attempt = 3, reason = 'why'",
        "alter table session_recalls alter column missed drop default, alter column missed type "
        "varchar(20), alter column attempt drop not null, alter column reason type varchar(50)",
        "update session_recalls set attempt = null",
    )
    schema.migrate(database)
    is_whole(database)
    assert execute(database, "select missed, attempt, reason from session_recalls") == [
        (7, 0, "why")
    ]


def test_it_is_put_back_before_a_migration_that_needs_it(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of version 15 that lost columns is repaired first: 0016 to 0019 build on them."""
    execute(empty_database, CREATE_TABLES)
    up_to(monkeypatch, empty_database, 15)
    execute(
        empty_database,
        "alter table session_recalls drop column cadence cascade, drop column lease cascade",
        "drop table recall_workers",
    )
    pending = schema.pending(empty_database)
    assert [what for what in pending if "missing" in what][:3] == [
        "table recall_workers is missing",
        "column lease of session_recalls is missing",
        "column cadence of session_recalls is missing",
    ]
    schema.migrate(empty_database)
    is_whole(empty_database)


def test_a_later_schema_is_left_alone(database: str) -> None:
    """What later code made of it, this code does not know."""
    execute(
        database,
        f"insert into recall_schema (version, name, oldest_code) values ({schema.GENERATION + 1}, "
        f"'later', {schema.GENERATION})",
        "alter table session_recalls alter column reason set default 'none yet'",
        "drop index idx_recalls_due",
    )
    assert found(database) == [] and schema.migrate(database) == []


READING = ("list", "show {0}", "why {0}", "stats", "workers", "queues")
WRITING = (
    "pause {0}",
    "resume {0}",
    "edit {0} --every 2h",
    "fire {0}",
    "skip {0}",
    "schedule t m --in 1h",
    "cancel {0} --yes",
    "retry {0}",
    "prune --older-than 30d --yes",
)


FEW = [
    ("session_recalls", "occurrence"),
    ("session_recalls", "cadence"),
    ("recall_attempts", "called_at"),
    ("recall_workers", "settings"),
]


@pytest.mark.parametrize(
    ("columns", "commands"),
    [
        pytest.param(FEW, READING, id="few"),
        *(
            pytest.param(OURS, commands, marks=[pytest.mark.full, pytest.mark.timeout(900)])
            for commands in (READING, WRITING)
        ),
    ],
)
def test_no_command_has_a_traceback(
    columns: list[tuple[str, str]], commands: tuple[str, ...], database: str
) -> None:
    """Whatever column is missing: each command does what it can, or says what is missing and what
    to do. (A column under another name is as good as gone, and quickly back.) Of many columns, each
    meets every third command."""
    execute(database, "insert into sessions values ('s', 'ann'), ('t', 'ann')")
    id = operate(database, "schedule", "s", "m", "--every", "1h").out.strip()
    refusals = 0
    step = 1 if len(columns) <= len(FEW) else 3
    for n, (table, column) in enumerate(columns):
        execute(database, f"alter table {table} rename column {column} to gone")
        for words in commands[n % step :: step]:
            said = operate(database, *words.format(id).split())
            refusals += "recall-worker migrate" in said.err
            assert said.status in (0, 1), (column, words, said)
            assert said.status == 0 or "Try: recall-worker " in said.err, (column, words, said)
        execute(database, f"alter table {table} rename column gone to {column}")
    assert refusals >= len(columns) // 2 // step


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        *(
            f"alter table session_recalls drop column {column}"
            for column in (
                "occurrence",
                "rekey",
                "attempt",
                "fires",
                "lease cascade",
                "scheduled_for",
            )
        ),
        "alter table session_recalls "
        + ", ".join(
            f"drop column {column} cascade" for table, column in OURS if table == "session_recalls"
        ),
        "drop table recall_attempts",
    ],
    ids=lambda damage: damage[:60],
)
async def test_keys_are_renewed(damage: str, database: str) -> None:
    """No key of before is used again, by this occurrence or a later one; final recalls that are
    retried have new keys, too. Nor is a key used again after a second loss."""
    execute(
        database,
        "insert into sessions values ('s', 'ann')",
        f"insert into session_recalls ({COLUMNS}) values ('r', 's', 'recurring', now(), 1, null, "
        "'m', 'pending', now(), now()), ('f', 's', 'once', now(), null, null, 'm', 'failed', "
        "now(), now())",
    )
    seen: list[tuple[int, int]] = []
    for _ in range(3):
        for _ in range(3):
            # As the worker's settle would write them.
            [(occurrence, rekey)] = execute(
                database, "select occurrence, rekey from session_recalls where id = 'r'"
            )
            seen.append((occurrence, rekey))
            renewed = rekey // KEYS_OF_AN_ERA * KEYS_OF_AN_ERA
            execute(
                database,
                f"update session_recalls set occurrence = {occurrence + 1}, rekey = {renewed}, "
                "lease = null",
            )
        execute(database, damage)
        schema.migrate(database)
        [final] = execute(database, "select rekey, fires from session_recalls where id = 'f'")
        assert min(final) >= KEYS_OF_AN_ERA
    assert len(set(seen)) == len(seen)
    is_whole(database)
    execute(
        database,
        "delete from session_recalls",
        f"insert into session_recalls ({COLUMNS}) values ('n', 's', 'once', now(), null, null, "
        "'m', 'pending', now(), now())",
    )
    assert execute(database, "select rekey, fires from session_recalls") == [(0, 0)]


async def test_a_view_of_the_applications_on_all_columns(database: str) -> None:
    """It keeps the counters from being made anew: the rows are updated instead."""
    execute(
        database,
        "insert into sessions values ('s', 'ann')",
        f"insert into session_recalls ({COLUMNS}) values ('r', 's', 'recurring', now(), 60, null, "
        "'m', 'pending', now(), now())",
        "alter table session_recalls drop column occurrence",
        "create view everything as select * from session_recalls",
    )
    schema.migrate(database)
    [(rekey, fires)] = execute(database, "select rekey, fires from session_recalls")
    assert rekey >= KEYS_OF_AN_ERA and fires >= KEYS_OF_AN_ERA
    assert found(database) == []


@pytest.mark.parametrize(
    ("rekey", "occurrence", "called", "after"),
    [
        (0, 2, True, 0),
        (3, 2, True, 0),
        (7000, 2, True, 7000),
        (7003, 2, False, 7000),
        (7003, 1, True, 7004),
        (7003, 1, False, 7003),
        (-5, 2, True, 0),
        (2_147_483_647, 1, True, 2_147_483_647),
    ],
)
def test_later_occurrences_keep_the_renewal(
    rekey: int, occurrence: int, called: bool, after: int
) -> None:
    """Their numbers may have been used before the loss."""
    claim = claim_with(occurrence=1, rekey=rekey)
    assert next_rekey(claim, occurrence, called=called) == after
