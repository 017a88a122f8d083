"""Records which database this is, so that a copy of it can be told from it.

`migrate` records it the first time, and again with `--here`: then this database is the one whose
recalls are called, whatever it was before. Without that it never adopts a copy. Where the account
may not run pg_control_system() nothing is recorded, and copies can't be told apart.

The database decides what it is (database/identity). Never here: what workers do on a copy.
"""

from __future__ import annotations

from typing import Any

import psycopg

from .. import statements
from ..database import identity
from ..database.identity import Identity


def record(conn: psycopg.Connection[Any], *, here: bool, was: str | None = None) -> str | None:
    """Record this database if none is recorded, or if it is to be the one from now on (`here`).
    Returns what was done, where that is worth telling: it was a copy. Raises psycopg.Error.

    `was`: what `text` said of the database in this place when it was last used. If that is the one
    that is recorded, this is no copy, but what an upgrade has made of it.
    """
    found = identity.ask_once(conn)
    if found.system_identifier is None or found.database_oid is None:
        return None
    if found.copy and not here and not _was(conn, was):
        return None
    if found.copy or not found.recorded:
        conn.execute(statements.load("identity")["record_identity"].encode(), found.known)
    return "recorded this database as the one whose recalls are called" if found.copy else None


def is_copy(conn: psycopg.Connection[Any]) -> bool:
    return identity.ask_once(conn).copy


def is_unknown(conn: psycopg.Connection[Any]) -> bool:
    """Whether this account can't find out which database this is."""
    return identity.ask_once(conn).system_identifier is None


def text(conn: psycopg.Connection[Any]) -> str | None:
    """This database's identity, to be kept beside its data; None where it is not known."""
    return _text(identity.ask_once(conn))


def _text(found: Identity) -> str | None:
    if found.system_identifier is None:
        return None
    return f"{found.system_identifier} {found.database_oid}"


def _was(conn: psycopg.Connection[Any], was: str | None) -> bool:
    rows = conn.execute("select system_identifier, database_oid from recall_identity").fetchall()
    return {" ".join(map(str, row)) for row in rows} == {was}
