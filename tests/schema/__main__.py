"""Write `expected.sql` anew: the schema of a database with the application's tables, adopted."""

from __future__ import annotations

import psycopg

from recall_worker import schema

from ..support import postgres
from ..support.application import CREATE_TABLES
from . import EXPECTED, dump

with postgres.server() as server, postgres.database(server) as dsn:
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(CREATE_TABLES.encode())
    schema.migrate(dsn)
    EXPECTED.write_text(dump(dsn), encoding="utf-8")
