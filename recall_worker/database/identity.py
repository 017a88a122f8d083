"""Which database this is, and whether it is a copy of the one that `migrate` has recorded.

A database is known by the system identifier of its cluster and its oid there. A dump, or a
template, carries the record of the database that it was made from: where it is restored that record
names another database, and this one is a copy. Its recalls are the other one's promises: a worker
must not keep them a second time. A standby has the identity of its primary, so a failover makes no
copy. A copy of the files has it too, and is not noticed.

Never here: what a worker does about it (connection, ledger), and when it is recorded (schema).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import errors

from .. import statements

COPY = "copy"
"""Why a worker claims nothing on a database that is a copy: `held` in recall_workers."""
PAUSED = "paused"
"""Why it claims nothing where it was started with `run --paused`."""
IS_A_COPY = (
    "this database is a copy: what migrate has recorded in it is another database, "
    "so workers claim nothing here"
)
COPY_HINT = (
    "recall-worker migrate --here, if its recalls are to be called from here: after a restore, or "
    "after pg_upgrade, and while no worker runs on the other one; RECALL_ALLOW_COPY=1 lets a "
    "single worker claim"
)
IS_PAUSED = "this worker was started with --paused (RECALL_PAUSED): it claims nothing"
PAUSED_HINT = "start it again without"


@dataclass(frozen=True, slots=True)
class Identity:
    """Which database this is. Fields are None where that is not known."""

    system_identifier: int | None = None
    database_oid: int | None = None
    recorded: bool = False
    """Whether `migrate` has recorded any database in this one."""
    copy: bool = False
    """Whether it has recorded another one."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Identity:
        """From a row of the statements `identity` and `identity_by_oid`."""
        return cls(**row)

    @property
    def known(self) -> dict[str, int | None]:
        """Values of statements that ask for workers of this database."""
        return {"system_identifier": self.system_identifier, "database_oid": self.database_oid}


UNKNOWN = Identity()
UNASKED = (
    errors.UndefinedTable.sqlstate,
    errors.InsufficientPrivilege.sqlstate,
)
"""An older schema has no such table, and a role may lack the right to read it."""


async def ask(rows: Callable[[str], Awaitable[list[Any]]]) -> Identity:
    """The identity, by `rows(statement)`, which raises psycopg.Error. UNKNOWN where the schema is
    older, or where the role may not read the table."""
    texts = statements.load("identity")
    for name in ("identity", "identity_by_oid"):
        try:
            [row] = await rows(texts[name])
        except psycopg.Error as error:
            if error.sqlstate not in UNASKED:
                raise
        else:
            return Identity.of(row)
    return UNKNOWN


def ask_once(conn: psycopg.Connection[Any]) -> Identity:
    """The same on a connection of a command, which must be in autocommit."""
    texts = statements.load("identity")
    for name in ("identity", "identity_by_oid"):
        try:
            cursor = conn.execute(texts[name].encode())
            row = cursor.fetchone()
        except psycopg.Error as error:
            if error.sqlstate not in UNASKED:
                raise
        else:
            if row is None:
                return UNKNOWN
            names = [column.name for column in cursor.description or ()]
            return Identity.of(
                row if isinstance(row, Mapping) else dict(zip(names, row, strict=True))
            )
    return UNKNOWN
