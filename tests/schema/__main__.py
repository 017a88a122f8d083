"""Write `expected.sql` anew: the schema of a database with the application's tables, adopted; and
the record of it that is released, `sql/released.json`."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import psycopg

from recall_worker import schema, statements
from recall_worker.schema import catalog
from recall_worker.schema.released import released

from ..support import postgres
from ..support.application import CREATE_TABLES
from . import EXPECTED, RELEASED, dump, granted, record, written


def up_to(dsn: str, version: int) -> None:
    """Apply the migrations up to a version, and compare nothing with the record that is to be
    written."""
    first = [m for m in schema.migrations() if m.version <= version]
    with (
        mock.patch.object(schema, "migrations", lambda: first),
        mock.patch.object(catalog, "repair", lambda *_, **__: catalog.Repaired([], [], [])),
        mock.patch.object(catalog, "gather", lambda *_, **__: []),
        mock.patch.object(catalog, "rights_lacking", lambda *_, **__: []),
        mock.patch.object(catalog, "note_one_pending", lambda *_, **__: None),
    ):
        schema.migrate(dsn)


with postgres.embedded() as own, postgres.database(own.dsn()) as dsn:
    made = record(dsn, up_to)
    with postgres.database(own.dsn()) as another, psycopg.connect(another, autocommit=True) as conn:
        conn.execute(CREATE_TABLES.encode())
        up_to(another, schema.GENERATION)
        conn.execute(statements.text("roles").encode())
        made = replace(made, privileges=granted(another))
    RELEASED.write_text(written(made), encoding="utf-8")
    released.cache_clear()

with postgres.server() as server, postgres.database(server) as dsn:
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(CREATE_TABLES.encode())
    schema.migrate(dsn)
    EXPECTED.write_text(dump(dsn), encoding="utf-8")
