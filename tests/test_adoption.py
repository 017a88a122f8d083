"""The tables that people have: adopted whole, or refused before the first change.

Each case is the application's table with something of its own. An adopted one goes on taking what
the application wrote before, and the worker can write each status to it. A refused one is as it
was: the refusal names what was found and what to do, and `migrate`, `migrate --check` and `doctor`
say the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest
from psycopg import errors

from recall_worker import schema
from recall_worker.doctor import schema as doctor_schema
from recall_worker.doctor import server
from recall_worker.doctor.examination import PROBLEM, Examination, Finding
from recall_worker.recall import STATUSES
from recall_worker.schema.survey import WANTED
from recall_worker.settings import Settings

from . import schema as expected
from .support import postgres
from .support.application import CREATE_TABLES
from .test_cli import operate
from .test_schema import ALL, FIRST, SESSIONLESS, execute

INSERT = FIRST
CHECK = "check (status in ('pending', 'fired', 'cancelled'))"
FOREIGN = "references sessions(id) on delete cascade"
INDEX = CREATE_TABLES[CREATE_TABLES.index("create unique index") :].strip()


def table(*changes: tuple[str, str], after: str = "") -> str:
    """The application's tables with parts of their definition replaced, and statements after."""
    text = CREATE_TABLES
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text + after


def examined(dsn: str) -> list[Finding]:
    """What `doctor` finds of the schema."""

    async def examine() -> list[Finding]:
        async with Examination(Settings(dsn=dsn)) as exam:
            await exam.check("database", server.database)
            await exam.check("schema", doctor_schema.schema)
            await exam.check("triggers", doctor_schema.triggers)
            return exam.findings

    return asyncio.run(examine())


# --- adopted --------------------------------------------------------------------------------------

ADOPTED = {
    "as it is": table(),
    "no sessions at all": SESSIONLESS,
    "a status more in the check": table(("'cancelled')", "'cancelled', 'archived')")),
    "a check by pattern": table((CHECK, "check (status ~ '^[a-eg-qs-z]')")).replace(
        "'pending' check (status ~", "'pending' check (status !~ '^(running|failed)$' or status ~"
    ),
    "a status check with a name": table((CHECK, f"constraint good_status {CHECK}")),
    "two checks of status": table((CHECK, f"{CHECK} check (length(status) < 10)")),
    "no check of status": table((CHECK, "")),
    "an upper bound on status": table(("status text", "status varchar(9)")),
    "varchar everywhere": table(
        (
            "id text primary key,\n    session_id text",
            "id varchar(36) primary key,\n    session_id varchar(36)",
        ),
        ("call_type text", "call_type varchar(20)"),
        ("status text", "status varchar(20)"),
        ("internal_comment text", "internal_comment varchar"),
    ),
    "a wide interval": table(("interval_seconds integer", "interval_seconds bigint")),
    "six digits of a second": table(("created_at timestamptz", "created_at timestamptz(6)")),
    "columns of its own": table(
        (
            "updated_at timestamptz not null\n",
            "updated_at timestamptz not null,\n"
            "    tenant text not null default 'acme', priority integer,\n"
            "    day date generated always as ((created_at at time zone 'UTC')::date) stored,\n"
            "    serial bigint generated always as identity, tags text[] default '{}'\n",
        )
    ),
    "a column of its own that must be given": table(
        ("updated_at timestamptz not null\n", "updated_at timestamptz not null, tenant text\n"),
        after="insert into sessions values ('t', 'ann');"
        + INSERT.format("old", "t").replace("'', 'pending'", "'', 'cancelled'")
        + "; update session_recalls set tenant = 'acme';"
        "alter table session_recalls alter column tenant set not null, "
        "alter column tenant set default 'acme';",
    ),
    "a check that has to do with no status": table(
        after="alter table session_recalls add check (length(additional_context_message) < 999), "
        "add check (id <> 'x'), add check (session_id ~ '^s');"
    ),
    "a check of two columns that allows all": table(
        after="alter table session_recalls "
        "add check (status <> 'pending' or trigger_at is not null);"
    ),
    "defaults": table(
        ("id text primary key", "id text primary key default gen_random_uuid()::text"),
        ("created_at timestamptz not null", "created_at timestamptz not null default now()"),
    ),
    "indexes of other names": table(
        ("idx_recalls_trigger_at_status", "by_time"),
        ("idx_recalls_session_status", "by_session"),
        ("idx_recalls_active_pending", "one_pending_a_session"),
    ),
    "no one-pending index": table(
        (
            "create unique index if not exists idx_recalls_active_pending on session_recalls "
            "(session_id)\n    where status = 'pending';",
            "",
        )
    ),
    "a trigger of its own": table(
        after="create function touched() returns trigger language plpgsql as "
        "$$ begin new.updated_at := now(); return new; end $$;"
        "create trigger touched before update on session_recalls "
        "for each row execute function touched();"
    ),
    "row security that lets the owner see all": table(
        after="alter table session_recalls enable row level security;"
        "create policy mine on session_recalls using (session_id = current_user);"
    ),
    "the key by a name of the automatic kind": table(
        (FOREIGN, ""),
        after="alter table session_recalls add foreign key (session_id) references sessions (id);",
    ),
    "a unique index of its own beside it": table(
        after="create unique index apart on session_recalls (session_id, trigger_at) "
        "where status <> 'cancelled';"
        "create unique index live on session_recalls (session_id) "
        "where status in ('pending') and call_type <> 'recurring';"
    ),
    "one recall a session, for ever": table(
        (INDEX, "create unique index only_one on session_recalls (session_id);")
    ),
    "a check that asks for something of the application's": table(
        ("updated_at timestamptz not null\n", "updated_at timestamptz not null, tenant text\n"),
        after="alter table session_recalls add constraint tenants "
        "check (tenant is not null and status <> 'odd');"
        "alter table session_recalls alter column tenant set default 'acme';",
    ),
    "a check that names what is generated of the status": table(
        (
            "updated_at timestamptz not null\n",
            "updated_at timestamptz not null, "
            "live boolean generated always as (status in ('pending', 'running')) stored\n",
        ),
        after="alter table session_recalls add check (live or trigger_at is not null);",
    ),
    "a schema-like default with braces": table(
        (
            "updated_at timestamptz not null\n",
            "updated_at timestamptz not null, tags jsonb not null default '{}', "
            "size int not null default 5 % 3\n",
        ),
        after="alter table session_recalls add check (status <> 'odd' or size % 2 = 0);",
    ),
    "an unlogged table": table(
        ("create table if not exists session", "create unlogged table if not exists session")
    ),
    "a session that has a domain": table(
        (
            "create table if not exists sessions",
            "create domain sid as text check (value ~ '^s');create table if not exists sessions",
        ),
        ("session_id text not null", "session_id sid not null"),
    ),
    "a status check by the name of ours": table(
        (CHECK, f"constraint session_recalls_status_known {CHECK}")
    ),
    "functions of ours in another schema": table(
        after="create schema other;"
        "create function other.recall_id(a text, b int default 0) returns int "
        "language sql as 'select 1';"
    ),
    "a domain": table(
        (
            "create table if not exists sessions",
            "create domain message as text check (value <> 'x');"
            "create table if not exists sessions",
        ),
        ("additional_context_message text", "additional_context_message message"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ADOPTED)
def test_adopted(name: str, empty_database: str) -> None:
    """Adopted whole: the application writes as before, each status can be written, a second
    `migrate` has nothing to do, and no foreign key was added or lost."""
    execute(empty_database, ADOPTED[name])
    keys = "select conname, pg_get_constraintdef(oid) from pg_constraint where contype = 'f'"
    before = execute(empty_database, keys)
    assert schema.pending(empty_database) == ALL
    done = operate(empty_database, "migrate")
    assert done.status == 0, done.err
    assert execute(empty_database, keys) == before
    assert ("has no foreign key" in done.err) == (not before)
    assert schema.pending(empty_database) == []
    assert schema.migrate(empty_database) == []
    if execute(empty_database, "select to_regclass('sessions')") != [(None,)]:
        execute(empty_database, "insert into sessions values ('s1', 'ann')")
    execute(empty_database, INSERT.format("r1", "s1"))
    for status in STATUSES:
        execute(empty_database, f"update session_recalls set status = '{status}'")
    assert [f.seen for f in examined(empty_database) if f.state == PROBLEM] == []


@pytest.mark.parametrize("value", ["archived", "snoozed by the user"])
def test_further_statuses_stay_allowed_and_are_left_alone(value: str, empty_database: str) -> None:
    """What the application's check allows besides the three: rows keep it, further rows may have
    it, and what the check never allowed is refused as before."""
    execute(
        empty_database,
        table(("'cancelled')", f"'cancelled', '{value}')")),
        "insert into sessions select 's' || n, 'ann' from generate_series(1, 3) n",
        INSERT.format("r1", "s1").replace("'', 'pending'", f"'', '{value}'"),
    )
    schema.migrate(empty_database)
    execute(
        empty_database,
        INSERT.format("r2", "s2"),
        f"update session_recalls set status = '{value}' where id = 'r2'",
        INSERT.format("r3", "s3").replace("'', 'pending'", f"'', '{value}'"),
    )
    assert execute(
        empty_database, "select distinct status, lease, ended_at from session_recalls"
    ) == [(value, None, None)]
    with pytest.raises(errors.CheckViolation):
        execute(empty_database, "update session_recalls set status = 'nonsense'")
    assert operate(empty_database, "list").status == 0


@pytest.mark.slow
def test_without_a_check_the_application_writes_what_it_likes(empty_database: str) -> None:
    """No check is added where there was none."""
    execute(empty_database, table((CHECK, "")), "insert into sessions values ('s1', 'ann')")
    schema.migrate(empty_database)
    execute(
        empty_database,
        INSERT.format("r1", "s1"),
        "update session_recalls set status = 'archived'",
    )


@pytest.mark.slow
def test_a_narrow_check_that_came_back_is_replaced(empty_database: str) -> None:
    """A tool of the application puts its own check back: `--check` and `doctor` name it, `migrate`
    widens it."""
    execute(empty_database, CREATE_TABLES, "insert into sessions values ('s1', 'ann')")
    schema.migrate(empty_database)
    execute(
        empty_database,
        "alter table session_recalls drop constraint session_recalls_status_known, "
        "add constraint again check (status in ('pending', 'fired', 'cancelled', 'kept'))",
        INSERT.format("r1", "s1"),
    )
    assert schema.pending(empty_database) == [schema.STATUSES]
    assert schema.STATUSES in operate(empty_database, "doctor").out
    assert schema.migrate(empty_database) == [schema.STATUSES]
    for status in (*STATUSES, "kept"):
        execute(empty_database, f"update session_recalls set status = '{status}'")
    assert schema.pending(empty_database) == []


def test_a_narrow_check_by_the_name_of_ours_is_replaced(empty_database: str) -> None:
    """What a check says counts, not its name."""
    execute(empty_database, CREATE_TABLES, "insert into sessions values ('s1', 'ann')")
    schema.migrate(empty_database)
    execute(
        empty_database,
        "alter table session_recalls drop constraint session_recalls_status_known, "
        f"add constraint session_recalls_status_known {CHECK}",
        INSERT.format("r1", "s1"),
    )
    assert schema.pending(empty_database) == [schema.STATUSES]
    assert schema.migrate(empty_database) == [schema.STATUSES]
    for status in STATUSES:
        execute(empty_database, f"update session_recalls set status = '{status}'")
    assert schema.pending(empty_database) == []


# --- refused --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """A table that can't be adopted: how it is made, and words of the refusal and of its hint."""

    made: str
    found: tuple[str, ...]
    todo: tuple[str, ...]


ENUM = (
    "create type state as enum ('pending', 'fired', 'cancelled');"
    "create table if not exists sessions"
)
COMPOUND = (
    "call_type = 'recurring' and status in ('pending', 'cancelled') "
    "or call_type <> 'recurring' and status in ('pending', 'fired', 'cancelled')"
)
ROW = "insert into sessions values ('s1', 'ann');" + INSERT.format("r1", "s1") + ";"
REFUSED = {
    "an enum": Refusal(
        table(
            ("create table if not exists sessions", ENUM),
            (f"status text not null default 'pending' {CHECK}", "status state not null"),
        ),
        ("column status is an enum", "must be text"),
        ("alter column status type text using status::text",),
    ),
    "an enum with a default": Refusal(
        table(
            ("create table if not exists sessions", ENUM),
            (
                f"status text not null default 'pending' {CHECK}",
                "status state not null default 'pending'",
            ),
        ),
        ("column status is an enum", "must be text"),
        ("alter column status drop default, alter column status type text",),
    ),
    "an enum of types": Refusal(
        table(
            (
                "create table if not exists sessions",
                "create type kind as enum ('once', 'recurring', 'immediate');"
                "create table if not exists sessions",
            ),
            (
                "call_type text not null check (call_type in ('once', 'recurring', 'immediate'))",
                "call_type kind not null",
            ),
        ),
        ("column call_type is an enum",),
        ("alter column call_type type text using call_type::text",),
    ),
    "no time zone": Refusal(
        table(("trigger_at timestamptz", "trigger_at timestamp")),
        ("column trigger_at is timestamp without time zone", "must be timestamp with time zone"),
        ("alter column trigger_at type timestamp with time zone using trigger_at at time zone",),
    ),
    "no time zone anywhere": Refusal(
        table(("timestamptz", "timestamp")),
        ("(1) column trigger_at", "(2) column created_at", "(3) column updated_at"),
        ("(1) alter", "(2) alter", "(3) alter"),
    ),
    "rounded times": Refusal(
        table(("trigger_at timestamptz", "trigger_at timestamptz(0)")),
        ("column trigger_at is timestamp(0) with time zone",),
        ("alter column trigger_at type timestamp with time zone",),
    ),
    "a day": Refusal(
        table(("trigger_at timestamptz", "trigger_at date")),
        ("column trigger_at is date",),
        ("alter column trigger_at type timestamp with time zone",),
    ),
    "json": Refusal(
        table(("additional_context_message text", "additional_context_message jsonb")),
        ("column additional_context_message is jsonb", "must be text"),
        ("type text using additional_context_message::text",),
    ),
    "an interval": Refusal(
        table(("interval_seconds integer", "interval_seconds interval")),
        ("column interval_seconds is interval", "must be integer or bigint"),
        ("alter column interval_seconds type integer",),
    ),
    "a small key": Refusal(
        table(
            (
                "id text primary key,\n    session_id text",
                "id smallint primary key,\n    session_id text",
            )
        ),
        ("column id is smallint", "text, character varying, uuid, bigint or integer"),
        ("alter column id type",),
    ),
    "columns that are missing": Refusal(
        table(("    interval_seconds integer,\n    internal_comment text,\n", "")),
        ("column interval_seconds is missing", "column internal_comment is missing"),
        ("RECALL_SCHEMA",),
    ),
    "a column of ours that means something else": Refusal(
        table(
            ("updated_at timestamptz not null\n", "updated_at timestamptz not null, reason jsonb\n")
        ),
        ("there is a column reason already",),
        ("rename column reason",),
    ),
    "an id that is not unique": Refusal(
        table(
            ("    id text primary key,\n    session_id text", "    id text,\n    session_id text")
        ),
        ("column id alone is not unique",),
        ("add primary key (id)",),
    ),
    "a key over two columns": Refusal(
        table(
            ("    id text primary key,\n    session_id text", "    id text,\n    session_id text"),
            (
                "updated_at timestamptz not null\n",
                "updated_at timestamptz not null, primary key (id, session_id)\n",
            ),
        ),
        ("column id alone is not unique",),
        ("add primary key (id)",),
    ),
    "failed is its own": Refusal(
        table(("'cancelled')", "'cancelled', 'failed')")),
        ("allows status 'failed'",),
        ("drop constraint session_recalls_status_check",),
    ),
    "running and failed are its own": Refusal(
        table(("'cancelled')", "'cancelled', 'failed', 'running')")),
        ("(1)", "'running'", "(2)", "'failed'"),
        ("drop constraint session_recalls_status_check",),
    ),
    "rows that are running": Refusal(
        table((CHECK, ""), after=ROW + "update session_recalls set status = 'running';"),
        ("1 rows have status 'running'",),
        ("another status",),
    ),
    "no fired": Refusal(
        table(("'fired', ", "'done', ")),
        ("session_recalls_status_check refuses status 'fired'",),
        ("let it allow 'fired'",),
    ),
    "a check over two columns": Refusal(
        table(after=f"alter table session_recalls add constraint sane check ({COMPOUND});"),
        ("can't become", "running", "failed", "check constraint sane"),
        ("let the constraint allow", "or drop it"),
    ),
    "a check that needs what only the application knows": Refusal(
        table(
            (
                "updated_at timestamptz not null\n",
                "updated_at timestamptz not null, cancelled_by text\n",
            ),
            after="alter table session_recalls add constraint whom check "
            "(status <> 'cancelled' or cancelled_by is not null);",
        ),
        ("can't become cancelled", "check constraint whom"),
        ("let the constraint allow 'cancelled'",),
    ),
    "a check over two columns, seen in rows": Refusal(
        table(
            (
                "updated_at timestamptz not null\n",
                "updated_at timestamptz not null, stage int not null\n",
            ),
            after="alter table session_recalls add constraint staged check "
            "(stage = 7 and status in ('pending', 'fired', 'cancelled'));"
            "alter table session_recalls alter column stage set default 7;"
            + ROW
            + "alter table session_recalls alter column stage drop default;",
        ),
        ("can't become running or failed", "check constraint staged"),
        ("let the constraint allow",),
    ),
    "a domain with a check": Refusal(
        table(
            (
                "create table if not exists sessions",
                "create domain state as text check (value in ('pending', 'fired', 'cancelled'));"
                "create table if not exists sessions",
            ),
            ("status text", "status state"),
            (CHECK, ""),
        ),
        ("can't become running or failed",),
        ("let the column status hold",),
    ),
    "a short status": Refusal(
        table(("status text", "status varchar(8)"), (CHECK, "")),
        ("can't become cancelled",),
        ("let the column status hold 'cancelled'",),
    ),
    "a view": Refusal(
        table(
            after="alter table session_recalls rename to kept;"
            "create view session_recalls as select * from kept;"
        ),
        ("is a view",),
        ("RECALL_SCHEMA",),
    ),
    "a partitioned table": Refusal(
        "create table session_recalls (id text, session_id text) partition by hash (id)",
        ("is a partitioned table",),
        ("RECALL_SCHEMA",),
    ),
    "a table of ours that means something else": Refusal(
        table(after="create table recall_workers (name text);"),
        ("there is a table public.recall_workers",),
        ("rename it",),
    ),
    "a function of ours that means something else": Refusal(
        table(after="create function recall_ring() returns integer language sql as 'select 1';"),
        ("there is a function public.recall_ring",),
        ("rename it",),
    ),
    **{
        f"a slot that failed recalls keep: {condition}": Refusal(
            table((INDEX, f"create unique index slot on session_recalls {condition};")),
            ("unique index slot", said),
            ("drop index public.slot", "(session_id) where status = 'pending'"),
        )
        for condition, said in (
            ("(session_id) where status not in ('fired', 'cancelled')", "a running recall"),
            ("(session_id) where status <> 'cancelled' and status <> 'fired'", "a running recall"),
            ("(session_id) where status in ('pending', 'failed')", "a failed recall"),
            ("(session_id) where status in ('pending', 'running')", "a running recall"),
            (
                "(session_id, status) where status in ('pending', 'failed', 'running')",
                "a running recall and a second that is running",
            ),
            ("(session_id, status) where status in ('pending', 'failed')", "that is failed"),
            ("(session_id, status)", "a second that is"),
            ("((lower(session_id))) where status !~ '^(fired|cancelled)$'", "a running recall"),
            (
                "(session_id) where status not in ('fired', 'cancelled') and call_type = 'once'",
                "a running recall",
            ),
        )
    },
    "a constraint that failed recalls violate": Refusal(
        table(
            after="alter table session_recalls add constraint pairs unique (session_id, status);"
        ),
        ("unique index pairs",),
        ("drop constraint pairs",),
    ),
    "a check over two columns, and a session by a domain": Refusal(
        table(
            (
                "create table if not exists sessions",
                "create domain sid as text check (value ~ '^s');"
                "create table if not exists sessions",
            ),
            ("session_id text not null", "session_id sid not null"),
            after=f"alter table session_recalls add constraint sane check ({COMPOUND});",
        ),
        ("can't become running, fired or failed", "check constraint sane"),
        ("let the constraint allow", "or drop it"),
    ),
    "a check over what only the application knows": Refusal(
        table(
            ("updated_at timestamptz not null\n", "updated_at timestamptz not null, tenant text\n"),
            after="alter table session_recalls add constraint tenants check "
            "(tenant is not null and status in ('pending', 'fired', 'cancelled'));",
        ),
        ("can't become running or failed", "check constraint tenants"),
        ("let the constraint allow 'running', 'failed'",),
    ),
    "a check that can't be tried": Refusal(
        table(
            ("updated_at timestamptz not null\n", "updated_at timestamptz not null, tenant text\n"),
            after="alter table session_recalls add constraint tenants check "
            "(tenant is not null and tenant ~ '^acme-' "
            "and status in ('pending', 'fired', 'cancelled'));",
        ),
        ("can't be tried", "check constraint tenants"),
        ("insert a pending recall",),
    ),
    "a check of what is generated": Refusal(
        table(
            (
                "updated_at timestamptz not null\n",
                "updated_at timestamptz not null, "
                "state text generated always as (upper(status)) stored\n",
            ),
            after="alter table session_recalls add constraint upper "
            "check (state in ('PENDING', 'FIRED', 'CANCELLED'));",
        ),
        ("can't become running or failed", "check constraint upper"),
        ("let the constraint allow",),
    ),
    **{
        f"a rule on {event}": Refusal(
            table(after=f"create rule quiet as on {event} to session_recalls do also select 1;"),
            ("the rule quiet on session_recalls",),
            ("drop rule quiet on public.session_recalls",),
        )
        for event in ("insert", "update", "delete")
    },
    **{
        f"{column} may be null": Refusal(
            table(
                (f"    {column} {type_} not null", f"    {column} {type_}"),
            ),
            (f"column {column} may be null, and must not be",),
            (f"alter column {column} set not null",),
        )
        for column, type_ in (
            ("session_id", "text"),
            ("call_type", "text"),
            ("trigger_at", "timestamptz"),
            ("additional_context_message", "text"),
            ("status", "text"),
            ("created_at", "timestamptz"),
            ("updated_at", "timestamptz"),
        )
    },
    "rows with nulls": Refusal(
        table(
            ("trigger_at timestamptz not null", "trigger_at timestamptz"),
            after=ROW + "update session_recalls set trigger_at = null;",
        ),
        ("column trigger_at may be null, and must not be: it is in 1 rows",),
        ("give these rows a trigger_at, or delete them; then alter table",),
    ),
    "functions with the names of ours": Refusal(
        table(
            after="create function recall_id(a text, b int default 0) returns int "
            "language sql as 'select 1'; create function recall_session(a int) returns int "
            "language sql as 'select 1'; create function recall_ring(a int) returns int "
            "language sql as 'select 1';"
        ),
        ("function public.recall_id(text,integer)", "recall_session(integer)", "recall_ring"),
        ("rename it",),
    ),
    "a trigger with the name of ours": Refusal(
        table(
            after="create function touched() returns trigger language plpgsql as "
            "$$ begin return new; end $$;"
            "create trigger recall_before_insert before update on session_recalls "
            "for each row execute function touched();"
        ),
        ("there is a trigger recall_before_insert",),
        ("rename it",),
    ),
    **{
        f"a type with the name of ours: {made}": Refusal(
            table(after=f"create type {made};"), ("there is a type public.recall_",), ("rename it",)
        )
        for made in (
            "recall_workers as enum ('a')",
            "recall_attempts as (a int)",
            "recall_id_type as enum ('a')",
            "recall_session_type as (a int)",
        )
    },
    "an index with the name of ours": Refusal(
        table(after="create index idx_recall_attempts_session on sessions (user_id);"),
        ("there is an index public.idx_recall_attempts_session",),
        ("rename it",),
    ),
    **{
        f"a record of its own: {made}": Refusal(
            table(after=f"create {made};"),
            ("there is a recall_schema in schema public",),
            ("rename it",),
        )
        for made in ("table recall_schema (a int)", "view recall_schema as select 1 as version")
    },
    "a child": Refusal(
        table(
            after="alter table session_recalls rename to parent;"
            "create table session_recalls () inherits (parent);"
            "alter table session_recalls add primary key (id);"
        ),
        ("inherits from another table",),
        ("no inherit",),
    ),
    "a parent": Refusal(
        table(after="create table archived () inherits (session_recalls);"),
        ("inherits from another table, or another from it",),
        ("no inherit",),
    ),
    "a table of a type": Refusal(
        "create type recall as (id text, session_id text, call_type text, trigger_at timestamptz, "
        "interval_seconds int, internal_comment text, additional_context_message text, "
        "status text, created_at timestamptz, updated_at timestamptz);"
        "create table session_recalls of recall (id primary key)",
        ("is a table of a type",),
        ("not of",),
    ),
    "a row type in use": Refusal(
        table(after="create table log (was session_recalls);"),
        ("column was of log holds whole rows",),
        ("drop that column",),
    ),
    "everything at once": Refusal(
        table(
            ("trigger_at timestamptz", "trigger_at timestamp"),
            ("additional_context_message text", "additional_context_message bytea"),
            ("updated_at timestamptz not null\n", "updated_at timestamptz not null, lease int\n"),
            ("id text primary key,\n    session_id text", "id text,\n    session_id text"),
            after="create table recall_attempts (n int);",
        ),
        (
            "trigger_at",
            "additional_context_message",
            "column id",
            "column lease",
            "recall_attempts",
        ),
        ("(1)", "(2)", "(3)", "(4)", "(5)"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, empty_database: str) -> None:
    """Refused before the first change, in the same words everywhere."""
    case = REFUSED[name]
    execute(empty_database, case.made)
    before = expected.dump(empty_database)
    refused = operate(empty_database, "migrate")
    checked = operate(empty_database, "migrate", "--check", "--json")
    assert (refused.status, checked.status) == (1, 1)
    what, *hints = refused.err.splitlines()
    for words in case.found:
        assert words in what, refused.err
    for words in case.todo:
        assert any(words in hint for hint in hints), refused.err
    assert "recall-worker migrate" not in "".join(hints)
    assert refused.err == checked.err
    blockers = checked.document["refused"]
    found = [f for f in examined(empty_database) if f.check == "schema"]
    assert [(f.seen, f.todo) for f in found] == [(b["what"], b["todo"]) for b in blockers]
    assert {f.state for f in found} == {PROBLEM}
    assert expected.dump(empty_database) == before


def test_what_the_hint_says_helps(empty_database: str) -> None:
    """Each hint is a statement that can be run as it stands; then the table is adopted."""
    execute(
        empty_database,
        table(
            ("timestamptz", "timestamp"),
            ("additional_context_message text", "additional_context_message json"),
        ),
    )
    with pytest.raises(schema.Refused) as refused:
        schema.migrate(empty_database)
    for blocker in refused.value.blockers:
        execute(empty_database, blocker.todo.partition(" (")[0])
    assert schema.migrate(empty_database) == ALL


# --- foreign keys ---------------------------------------------------------------------------------


def keys(dsn: str) -> list[str]:
    """The foreign keys of the table."""
    return [
        str(row[0])
        for row in execute(
            dsn,
            "select pg_get_constraintdef(oid) from pg_constraint where contype = 'f' "
            "and conrelid = to_regclass('session_recalls')",
        )
    ]


@pytest.mark.parametrize(
    "sessions",
    [
        "create table sessions (id text primary key, token text)",
        "create table sessions (id varchar(40) primary key)",
        "create table sessions (id uuid primary key)",
        "create table sessions (key text primary key)",
        "create view sessions as select 'x'::text as id",
    ],
)
def test_no_key_is_guessed(sessions: str, empty_database: str) -> None:
    """A login table called sessions beside an adopted table: no key to it, by any `migrate`, and
    the application's inserts go on."""
    execute(empty_database, sessions, SESSIONLESS)
    for _ in range(2):
        done = operate(empty_database, "migrate")
        assert done.status == 0, done.err
        assert keys(empty_database) == []
    execute(empty_database, INSERT.format("r1", "s1"))


def test_the_key_to_another_table_stays_the_only_one(empty_database: str) -> None:
    """The sessions are called conversations, and there is a login table sessions as well."""
    execute(
        empty_database,
        "create table sessions (id text primary key)",
        "create table conversations (id text primary key)",
        SESSIONLESS.replace(
            "session_id text not null", "session_id text not null references conversations(id)"
        ),
        "insert into conversations values ('c1')",
    )
    before = keys(empty_database)
    for _ in range(2):
        done = operate(empty_database, "migrate")
        assert done.status == 0 and keys(empty_database) == before
    execute(empty_database, INSERT.format("r1", "c1"))
    assert schema.migrate(empty_database, foreign_key="conversations") == []


@pytest.mark.parametrize("type_", ["text", "varchar", "uuid", "bigint"])
def test_a_created_table_refers_to_sessions_of_its_own_type(
    type_: str, empty_database: str
) -> None:
    """The table that `migrate` makes gets its key where sessions(id) is text, else none."""
    execute(empty_database, f"create table sessions (id {type_} primary key)")
    schema.migrate(empty_database)
    assert bool(keys(empty_database)) == (type_ == "text")


def test_a_key_that_is_asked_for(empty_database: str) -> None:
    """`migrate --foreign-key TABLE`, also where the name that it would have is taken, in another
    schema, and again."""
    execute(
        empty_database,
        "create schema auth",
        "create table auth.sessions (id text primary key)",
        SESSIONLESS,
        "alter table session_recalls add constraint session_recalls_session_id_fkey "
        "check (session_id <> '')",
    )
    done = operate(empty_database, "migrate", "--foreign-key", "auth.sessions")
    assert done.status == 0, done.err
    assert keys(empty_database) == [
        "FOREIGN KEY (session_id) REFERENCES auth.sessions(id) ON DELETE CASCADE"
    ]
    assert schema.migrate(empty_database, foreign_key="auth.sessions") == []
    assert len(keys(empty_database)) == 1


@pytest.mark.parametrize(
    ("made", "named", "found"),
    [
        ("select 1", "sessions", "there is no table sessions"),
        ("select 1", "a b", "there is no table a b"),
        ("select 1", "x.y.z.w", "there is no table x.y.z.w"),
        ("create table sessions (id uuid primary key)", "sessions", "is uuid"),
        ("create table sessions (id text)", "sessions", "is not unique"),
        ("create table sessions (key text)", "sessions", "has no column id"),
        ("create view sessions as select ''::text as id", "sessions", "not a table"),
    ],
)
def test_a_key_that_can_not_be_made(made: str, named: str, found: str, empty_database: str) -> None:
    """Refused before the first change."""
    execute(empty_database, made, SESSIONLESS)
    before = expected.dump(empty_database)
    refused = operate(empty_database, "migrate", "--foreign-key", named)
    assert refused.status == 1 and found in refused.err and "Try: " in refused.err
    assert expected.dump(empty_database) == before


# --- schemas and rights ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--check",)], ids=["migrate", "check"])
def test_a_table_that_the_search_path_does_not_find(
    options: tuple[str, ...], empty_database: str
) -> None:
    """No second, empty table is made: the one that exists is named, with what to set."""
    execute(empty_database, "create schema app; set search_path = app; " + CREATE_TABLES)
    before = expected.dump(empty_database)
    refused = operate(empty_database, "migrate", *options)
    assert refused.status == 1
    assert "there is one in the schema app" in refused.err and "RECALL_SCHEMA=app" in refused.err
    assert expected.dump(empty_database) == before
    assert "RECALL_SCHEMA=app" in operate(empty_database, "doctor").out


def test_a_renamed_table(empty_database: str) -> None:
    """An adopted table under another name: said, with the statement that gives the name back."""
    execute(empty_database, CREATE_TABLES)
    schema.migrate(empty_database)
    execute(empty_database, "alter table session_recalls rename to agent_recalls")
    refused = operate(empty_database, "migrate")
    assert refused.status == 1
    assert "renamed to public.agent_recalls" in refused.err
    assert "alter table public.agent_recalls rename to session_recalls" in refused.err


def test_sessions_in_another_schema_than_the_table(empty_database: str) -> None:
    """`migrate` and `migrate --check` agree."""
    execute(
        empty_database,
        "create schema app; set search_path = app; " + SESSIONLESS,
        "create table sessions (id text primary key)",
    )
    assert schema.pending(empty_database, schema="app") == ALL
    assert schema.migrate(empty_database, schema="app") == ALL
    assert schema.pending(empty_database, schema="app") == []
    assert schema.migrate(empty_database, schema="app") == []


def test_a_schema_that_is_not_there(empty_database: str) -> None:
    """RECALL_SCHEMA names none."""
    with pytest.raises(schema.Refused, match="RECALL_SCHEMA is 'nowhere'"):
        schema.migrate(empty_database, schema="nowhere")


def test_an_owner_without_create(empty_database: str) -> None:
    """The owner of the table may not create tables beside it: the hint is the grant. Nor may
    anybody alter a table of others."""
    name = f"boss_{empty_database.partition('?')[0].rpartition('/')[2]}"
    execute(
        empty_database,
        f"create role {name} login",
        "revoke create on schema public from public",
        SESSIONLESS,
        f"alter table session_recalls owner to {name}",
    )
    try:
        dsn = psycopg.conninfo.make_conninfo(empty_database, user=name)
        refused = operate(dsn, "migrate")
        assert refused.status == 1
        assert f"Try: grant create on schema public to {name}" in refused.err
        execute(empty_database, f"grant create on schema public to {name}")
        assert operate(dsn, "migrate").status == 0
        execute(empty_database, "alter table session_recalls owner to postgres")
        refused = operate(dsn, "migrate", "--foreign-key", "sessions")
        assert refused.status == 1
        assert "belongs to postgres" in refused.err and "migrate as postgres" in refused.err
    finally:
        execute(
            empty_database,
            f"reassign owned by {name} to postgres; drop owned by {name}; drop role {name}",
        )


@contextlib.contextmanager
def accounts(dsn: str, *kinds: str) -> Iterator[list[tuple[str, str]]]:
    """Roles of a test's own that can log in: the name and the DSN of each."""
    number = dsn.partition("?")[0].rpartition("/")[2]
    names = [f"{kind}_{number}" for kind in kinds]
    execute(dsn, *(f"create role {name} login" for name in names))
    try:
        yield [(name, psycopg.conninfo.make_conninfo(dsn, user=name)) for name in names]
    finally:
        for name in reversed(names):
            execute(dsn, f"reassign owned by {name} to current_user; drop owned by {name}")
        execute(dsn, *(f"drop role {name}" for name in reversed(names)))


TEN = ", ".join(WANTED)
GRANTS = {
    "columns": f"select ({TEN}), insert ({TEN}), update (status, trigger_at, updated_at)",
    "select and insert": "select, insert",
    "insert alone": "insert",
    "no update of status": f"select, insert, update ({TEN.replace('status, ', '')})",
    "everything": "select, insert, update, delete",
}
"""What applications give the account that writes recalls."""


@pytest.mark.parametrize("grants", GRANTS)
def test_an_account_with_few_rights_inserts_as_before(grants: str, empty_database: str) -> None:
    """Also from inside a run, which moves the running recall out of the session's slot; and "this
    session has one already" is told as ever. Triggers of the application's find its tables."""
    execute(
        empty_database,
        CREATE_TABLES,
        "insert into sessions values ('s1', 'ann'), ('s2', 'bob'), ('s3', 'cid')",
        "create table audit (id text)",
        "create function seen() returns trigger language plpgsql as "
        "$$ begin insert into audit values (new.id); return new; end $$",
        "create trigger seen after update on session_recalls for each row execute function seen()",
        "grant insert on audit to public",
    )
    schema.migrate(empty_database)
    lease = (
        "update session_recalls set lease = gen_random_uuid(), lease_until = now() + interval '1h'"
    )
    with accounts(empty_database, "narrow") as [(name, dsn)]:
        execute(empty_database, f"grant {GRANTS[grants]} on session_recalls to {name}")
        execute(dsn, INSERT.format("r1", "s1"), INSERT.format("r2", "s2"))
        execute(empty_database, f"{lease} where id = 'r1'", "truncate audit")
        execute(dsn, INSERT.format("r3", "s1"), INSERT.format("r4", "s3"))
        with pytest.raises(errors.UniqueViolation):
            execute(dsn, INSERT.format("r5", "s2"))
    assert execute(empty_database, "select id, status from session_recalls order by id") == [
        ("r1", "running"),
        ("r2", "pending"),
        ("r3", "pending"),
        ("r4", "pending"),
    ]
    assert execute(empty_database, "select * from audit") == [("r1",)]


def test_the_owner_s_rights_free_a_slot_and_do_nothing_else(empty_database: str) -> None:
    """Operators of the inserter's own are not run with the owner's rights, and the function does
    nothing on a table of somebody else's."""
    execute(
        empty_database,
        CREATE_TABLES,
        "insert into sessions values ('s1', 'ann')",
        "create table loot (who text); grant insert on loot to public",
    )
    schema.migrate(empty_database)
    with accounts(empty_database, "hostile") as [(name, dsn)]:
        execute(
            empty_database,
            f"grant insert on session_recalls to {name}",
            f"create schema lair authorization {name}",
            INSERT.format("r1", "s1"),
            "update session_recalls set lease = gen_random_uuid()",
            "create table lair.session_recalls (like public.session_recalls including defaults)",
            f"alter table lair.session_recalls owner to {name}",
        )
        hostile = "".join(
            f"create function lair.same_{type_}({type_}, {type_}) returns boolean language plpgsql "
            "as $$ begin insert into public.loot values (current_user); return true; end $$;"
            f"create operator lair.= (leftarg = {type_}, rightarg = {type_}, "
            f"function = lair.same_{type_});"
            for type_ in ("text", "integer", "uuid")
        )
        execute(
            dsn,
            hostile,
            "create trigger mine before insert on lair.session_recalls "
            "for each row execute function recall_free_slot()",
        )
        path = psycopg.conninfo.make_conninfo(dsn, options="-c search_path=lair,public,pg_catalog")
        execute(path, INSERT.format("r2", "s1"))
        assert execute(empty_database, "select status from session_recalls") == [("pending",)]
        execute(
            path, INSERT.format("r2", "s1").replace("session_recalls", "public.session_recalls")
        )
        assert execute(empty_database, "select id, status from session_recalls order by id") == [
            ("r1", "running"),
            ("r2", "pending"),
        ]
        found = {who for (who,) in execute(empty_database, "select who from loot")}
        assert found <= {name}


def test_what_migrate_makes_belongs_to_the_owner_of_the_table(empty_database: str) -> None:
    """A table of a group's: one member migrates, then another, then a superuser."""
    with accounts(empty_database, "team", "alice", "bob") as [(team, _), (_, alice), (_, bob)]:
        number = team.partition("_")[2]
        execute(
            empty_database,
            f"grant {team} to alice_{number}, bob_{number}",
            f"grant create on schema public to {team}, alice_{number}, bob_{number}",
            SESSIONLESS,
            f"alter table session_recalls owner to {team}",
        )
        assert schema.migrate(alice) == ALL
        assert schema.migrate(bob) == [] and schema.pending(bob) == []
        execute(bob, "drop table recall_chores; drop function recall_ring() cascade")
        schema.migrate(empty_database)
        assert schema.migrate(bob) == []
        assert execute(
            empty_database,
            "select distinct pg_get_userbyid(o.owner)::text from ("
            "select relowner from pg_class where relname like 'recall\\_%' "
            "union all select proowner from pg_proc where proname like 'recall\\_%' "
            "union all select typowner from pg_type where typname like 'recall\\_%') o (owner)",
        ) == [(team,)]


def test_a_compound_check_is_found_without_the_right_to_temporary_tables(
    empty_database: str,
) -> None:
    """By the owner who migrates, and by an account that only reads."""
    with accounts(empty_database, "bare", "eyes") as [(name, dsn), (eyes, reader)]:
        [(database,)] = execute(empty_database, "select current_database()")
        execute(
            empty_database,
            f"revoke temporary on database {database} from public",
            f"grant create on schema public to {name}",
            SESSIONLESS,
            f"alter table session_recalls add constraint sane check ({COMPOUND})",
            f"alter table session_recalls owner to {name}",
            f"grant select on session_recalls to {eyes}",
        )
        said = [operate(dsn, "migrate"), operate(dsn, "migrate", "--check")]
        assert [each.status for each in said] == [1, 1]
        assert "can't become running, fired or failed" in said[0].err
        assert said[0].err == said[1].err
        assert "can't become running" in operate(reader, "migrate", "--check").err


def test_row_security_that_hides_the_rows_is_named(empty_database: str) -> None:
    """With FORCE it holds for the owner, too, and a policy that reads a setting of the
    application's raises where that is not set."""
    with accounts(empty_database, "strict") as [(name, dsn)]:
        execute(
            empty_database,
            f"grant create on schema public to {name}",
            SESSIONLESS,
            INSERT.format("r1", "s1"),
            f"alter table session_recalls owner to {name}",
            "alter table session_recalls enable row level security, force row level security",
            "create policy own on session_recalls using (session_id = current_setting('app.sid'))",
        )
        before = expected.dump(empty_database)
        said = [operate(dsn, "migrate"), operate(dsn, "migrate", "--check")]
        for each in said:
            assert each.status == 1 and "row-level security keeps" in each.err
            assert "no force row level security" in each.err
        assert said[0].err == said[1].err
        assert "row-level security keeps" in operate(dsn, "doctor").out
        assert expected.dump(empty_database) == before


def test_a_schema_with_dollars(empty_database: str) -> None:
    """Refused before the first change where bodies of functions can't name it, else adopted."""
    execute(
        empty_database,
        'create schema "a$$b"; set search_path = "a$$b"; ' + SESSIONLESS,
        """create schema "it's $1"; set search_path = "it's $1"; """ + SESSIONLESS,
    )
    with pytest.raises(schema.Refused) as refused:
        schema.migrate(empty_database, schema="a$$b")
    assert 'alter schema "a$$b" rename to' in refused.value.hint
    assert execute(empty_database, """select to_regclass('"a$$b".recall_schema')""") == [(None,)]
    assert schema.migrate(empty_database, schema="it's $1") == ALL
    assert schema.pending(empty_database, schema="it's $1") == []


def test_a_publication_of_all_tables(empty_database: str) -> None:
    """Made before `migrate`, or after it: every row of ours can be changed, as with `--here`."""
    execute(empty_database, CREATE_TABLES)
    if execute(empty_database, "show wal_level") != [("logical",)]:
        execute(empty_database, "set client_min_messages = error")
    execute(empty_database, "create publication everything for all tables")
    assert schema.migrate(empty_database) == ALL
    execute(empty_database, "update recall_identity set system_identifier = 7")
    schema.migrate(empty_database, here=True)
    for (table,) in execute(empty_database, OURS):
        execute(empty_database, f"delete from {table} where false")


@pytest.mark.slow
def test_columns_that_must_be_given(empty_database: str) -> None:
    """`schedule` leaves nothing empty that may not be null, and says what it can't give; `migrate`
    notes that."""
    execute(
        empty_database,
        table(
            ("interval_seconds integer", "interval_seconds integer not null default 0"),
            ("internal_comment text", "internal_comment text not null default ''"),
            ("updated_at timestamptz not null\n", "updated_at timestamptz not null, tenant text\n"),
        ),
        "insert into sessions values ('s1', 'ann'), ('s2', 'bob')",
    )
    assert "must be given" not in operate(empty_database, "migrate").err
    for options in ((), ("--every", "1h")):
        done = operate(empty_database, "schedule", "s1", "hello", *options)
        assert done.status == 0, done.err
        execute(empty_database, "delete from session_recalls")
    execute(empty_database, "alter table session_recalls alter column tenant set not null")
    refused = operate(empty_database, "schedule", "s1", "hello")
    assert refused.status == 1 and "column tenant of session_recalls must be given" in refused.err
    execute(empty_database, "drop index idx_recalls_due")
    assert "Note: tenant must be given in every insert" in operate(empty_database, "migrate").err


@pytest.mark.slow
def test_a_text_in_no_encoding(server: str, empty_database: str) -> None:
    """A database in SQL_ASCII, with one message in Latin-1: it is printed as far as it can be, and
    every other recall, too."""
    name = f"ascii_{empty_database.partition('?')[0].rpartition('/')[2]}"
    execute(server, f"create database {name} encoding 'SQL_ASCII' locale 'C' template template0")
    dsn = postgres.address(server, name)
    try:
        execute(dsn, CREATE_TABLES, "insert into sessions values ('s1', 'ann'), ('s2', 'bob')")
        assert operate(dsn, "migrate").status == 0
        execute(
            dsn,
            INSERT.format("r1", "s1"),
            INSERT.format("r2", "s2"),
            "update session_recalls set additional_context_message = "
            "convert_from('\\x636166e9', 'SQL_ASCII') where id = 'r1'",
            "update session_recalls set additional_context_message = 'für' where id = 'r2'",
        )
        for options in ((), ("--json",)):
            listed = operate(dsn, "list", *options)
            assert listed.status == 0, listed.err
            for words in ("caf\\xe9", "für"):
                told = json.dumps(words)[1:-1] if options else words
                assert told in listed.out, listed.out
            for command in ("show", "why"):
                assert operate(dsn, command, "r1", *options).status == 0
        assert operate(dsn, "cancel", "r1", "--yes").status == 0
    finally:
        execute(server, f"drop database {name} with (force)")


def test_an_unlogged_table_stays_unlogged(empty_database: str) -> None:
    """And `migrate` says what that means."""
    execute(
        empty_database,
        table(
            ("create table if not exists session", "create unlogged table if not exists session")
        ),
    )
    assert "Note: session_recalls is unlogged" in operate(empty_database, "migrate").err
    assert schema.migrate(empty_database) == []
    assert execute(
        empty_database, "select relpersistence from pg_class where relname = 'session_recalls'"
    ) == [("u",)]


@pytest.mark.slow
def test_a_function_that_is_added_beside_ours(empty_database: str) -> None:
    """After the table was adopted: named by all three, before a statement of ours is ambiguous."""
    execute(empty_database, CREATE_TABLES)
    schema.migrate(empty_database)
    execute(
        empty_database,
        "create function recall_id(a text, b int default 0) returns int language sql as 'select 1'",
    )
    for options in (("migrate",), ("migrate", "--check")):
        said = operate(empty_database, *options)
        assert said.status == 1 and "recall_id(text,integer) beside recall-worker's" in said.err
    assert "recall_id(text,integer) beside" in operate(empty_database, "doctor").out
    execute(empty_database, "drop function recall_id(text, int)")
    assert schema.migrate(empty_database) == []


def test_a_first_adoption_that_fails_leaves_nothing_behind(empty_database: str) -> None:
    """What no survey foresees: an event trigger of the database's forbids the change."""
    execute(
        empty_database,
        CREATE_TABLES,
        "create function never() returns event_trigger language plpgsql as "
        "$$ begin raise exception 'not here' using errcode = '42501'; end $$",
        "create event trigger never on ddl_command_start when tag in ('ALTER TABLE') "
        "execute function never()",
    )
    before = expected.dump(empty_database)
    said = operate(empty_database, "migrate")
    assert said.status != 0 and "not here" in said.err and "Traceback" not in said.err
    assert expected.dump(empty_database) == before


# --- what a tool drops that does not know it ------------------------------------------------------

OURS = "select relname from pg_class where relkind = 'r' and relname ~ '^recall_' order by 1"
ADDED = (
    "select attname from pg_attribute where attrelid = 'session_recalls'::regclass and attnum > 10 "
    "and not attisdropped order by attnum"
)
INDEXES = (
    "select indexname from pg_indexes where tablename = 'session_recalls' "
    "and indexdef !~ '_pkey|idx_recalls_(trigger_at_status|session_status|active_pending)'"
)


@pytest.mark.slow
@pytest.mark.parametrize("tables", ["all tables", "all but the record", "the record", "no table"])
@pytest.mark.parametrize("columns", [True, False], ids=["with columns", "without columns"])
def test_what_a_migration_tool_drops(tables: str, columns: bool, empty_database: str) -> None:
    """A tool that generates migrations from models drops what is in no model: columns, indexes and
    tables of ours, the record of the migrations among them. `migrate` puts all of it back, and
    gives the recalls new keys where the old ones were lost."""
    execute(empty_database, CREATE_TABLES, "insert into sessions values ('s1', 'ann')")
    schema.migrate(empty_database)
    before = expected.dump(empty_database)
    execute(empty_database, INSERT.format("r1", "s1"))
    gone = {
        "all tables": "",
        "all but the record": "recall_schema",
        "the record": "recall_[^s]",
        "no table": "",
    }[tables]
    for (name,) in execute(empty_database, OURS) if tables != "no table" else []:
        if not gone or not re.match(gone, name):
            execute(empty_database, f"drop table {name}")
    for (name,) in execute(empty_database, INDEXES):
        execute(empty_database, f"drop index {name}")
    for (name,) in execute(empty_database, ADDED) if columns else []:
        execute(empty_database, f"alter table session_recalls drop column {name} cascade")

    checked = operate(empty_database, "migrate", "--check")
    assert checked.status == 1 and "index idx_recalls_due is missing" in checked.err
    repaired = operate(empty_database, "migrate")
    assert repaired.status == 0, repaired.err
    assert schema.pending(empty_database) == [] and schema.migrate(empty_database) == []
    assert [f.seen for f in examined(empty_database) if f.state == PROBLEM] == []
    assert sorted(re.findall(r"\w+", expected.dump(empty_database))) == sorted(
        re.findall(r"\w+", before)
    )
    [(rekey,)] = execute(empty_database, "select rekey from session_recalls")
    assert (rekey != 0) == (columns or tables in ("all tables", "all but the record"))
