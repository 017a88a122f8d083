"""One examination: its findings so far, and how the database is queried.

Owns the connections and closes them. Each check stands alone: one that raises an error is a problem
of its own, and the others go on. A check writes what later checks need into the examination's
fields.

Never here: what is checked (the files beside this one, by subject), how it is shown (cli/doctor).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.rows import dict_row

from .. import statements
from ..database.connection import CONNECT_DEADLINE, connection_info, error_text
from ..database.values import load_whatever_stands_there
from ..settings import Settings
from ..terminal import explain

OK, NOTE, PROBLEM = "ok", "note", "problem"
PATIENCE = 15.0
"""Seconds that one check may take."""
DIRECT, SESSION, TRANSACTION, STATEMENT = "direct", "session", "transaction", "statement"
"""How connections by a DSN are pooled: not at all, or for a session, transaction or statement."""

Connection = psycopg.AsyncConnection[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    state: str
    seen: str
    todo: str | None = None


class Examination:
    """An async context that closes its connections. `findings`: in the order of the checks."""

    def __init__(self, settings: Settings) -> None:
        assert settings.dsn is not None
        self.settings = settings
        self.dsn = settings.dsn
        self.findings: list[Finding] = []
        self.reached = False
        """Whether the database answered."""
        self.adopted = False
        """Whether the schema is there."""
        self.conn: Connection
        """Opened by the check `database`, if PostgreSQL answers."""
        self.server: dict[str, Any] = {}
        """The row of the statement `server`: its version, settings and limits."""
        self.role = "its role"
        self.pooling = self.listen_pooling = DIRECT
        """How connections by RECALL_DSN, and those for LISTEN, are pooled."""
        self.alive: list[dict[str, Any]] = []
        """The rows of workers with a recent heartbeat."""
        self._sql = statements.load("doctor")
        self._stack = AsyncExitStack()
        self._check = ""

    async def __aenter__(self) -> Examination:
        await self._stack.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.__aexit__(*error)

    async def check(self, name: str, check: Callable[[Examination], Awaitable[None]]) -> None:
        """Make a check. Its findings have this name."""
        self._check = name
        try:
            async with asyncio.timeout(PATIENCE):
                await check(self)
        except TimeoutError:
            todo = "see pg_stat_activity for what blocks it"
            self.find(PROBLEM, f"no answer within {PATIENCE:g} s", todo)
        except (psycopg.Error, OSError) as error:
            trouble = explain(error)
            self.find(
                PROBLEM,
                trouble.what if trouble else error_text(error),
                *(trouble.hints[:1] if trouble else ()),
            )
        except Exception as error:
            # A defect of one check must not hide the findings of the others.
            defect = f"{type(error).__name__}: {error}"
            seen = f"this check failed by a defect of recall-worker: {defect}"
            self.find(PROBLEM, seen[:500], "report it, with this line")

    def find(self, state: str, seen: str, todo: str | None = None) -> None:
        self.findings.append(Finding(self._check, state, seen, todo))

    async def connect(self, dsn: str) -> Connection:
        """A connection that lasts as long as the examination."""
        return await self._stack.enter_async_context(connected(dsn))

    async def ask(
        self, name: str, conn: Connection | None = None, **values: Any
    ) -> list[dict[str, Any]]:
        """The rows of a statement of sql/doctor.sql."""
        cursor = await (conn or self.conn).execute(self._sql[name].encode(), values or None)
        return await cursor.fetchall()

    async def one(self, name: str, **values: Any) -> dict[str, Any]:
        """The one row of a statement that returns exactly one."""
        [row] = await self.ask(name, **values)
        return row


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[Connection]:
    async with asyncio.timeout(CONNECT_DEADLINE + 1):
        conn = await psycopg.AsyncConnection.connect(
            **connection_info(dsn, "recall-worker doctor"), row_factory=dict_row
        )
    try:
        conn.prepare_threshold = None
        load_whatever_stands_there(conn)
        yield conn
    finally:
        conn.pgconn.finish()


def verdict(findings: Sequence[Finding]) -> str:
    """The worst of their states."""
    return max((finding.state for finding in findings), key=(OK, NOTE, PROBLEM).index, default=OK)
