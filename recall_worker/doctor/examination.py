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
from ..database.identity import UNKNOWN
from ..database.setup import AsyncCommandConnection
from ..database.values import load_whatever_stands_there
from ..schema import Difference
from ..settings import Settings
from ..terminal import explain

OK, NOTE, PROBLEM = "ok", "note", "problem"
PATIENCE = 15.0
"""Seconds that one check may take."""
DIRECT, SESSION, TRANSACTION, STATEMENT = "direct", "session", "transaction", "statement"
"""How connections by a DSN are pooled: not at all, or for a session, transaction or statement."""

POOLING_ROUNDS = 5
"""How many other connections are opened to see whether a backend is shared."""

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
        self.differences: list[Difference] = []
        """What differs from the schema as released, as the check `schema` found it."""
        self.server: dict[str, Any] = {}
        """The row of the statement `server`: its version, settings and limits."""
        self.role = "its role"
        self.pooling = self.listen_pooling = DIRECT
        """How connections by RECALL_DSN, and those for LISTEN, are pooled."""
        self.identity = UNKNOWN
        """Which database this is, as the check `identity` finds it."""
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

    async def connect(self, dsn: str, *, set_up: bool = True) -> Connection:
        """A connection that lasts as long as the examination. `set_up`: as with `connected`."""
        return await self._stack.enter_async_context(
            connected(dsn, self.settings.schema, set_up=set_up)
        )

    @property
    def transactions_dsn(self) -> str:
        """The DSN for what needs transactions, which a pooler in statement mode does not take."""
        return (self.settings.listen_dsn if self.pooling == STATEMENT else None) or self.dsn

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
async def connected(
    dsn: str, schema: str | None = None, *, set_up: bool = True
) -> AsyncIterator[Connection]:
    """`schema`: RECALL_SCHEMA. `set_up`: with our settings; through a pooler that takes no
    transactions that is not possible."""
    async with asyncio.timeout(CONNECT_DEADLINE + 1):
        conn = await AsyncCommandConnection[dict[str, Any]].connect(
            **connection_info(dsn, "recall-worker doctor"), row_factory=dict_row
        )
    try:
        conn.prepare_threshold = None
        if set_up:
            await conn.set_up(schema)
        load_whatever_stands_there(conn)
        yield conn
    finally:
        conn.pgconn.finish()


async def pooling_of(dsn: str) -> str:
    """How connections by this DSN are pooled.

    A pooler announces a process id of its own; a query returns that of the real backend. If the
    backend changes while the connection is open, or also serves another connection, pooling is by
    transaction.
    """
    async with connected(dsn, set_up=False) as one:
        mine = await _backend(one)
        if mine == one.pgconn.backend_pid:
            return DIRECT
        try:
            async with one.transaction():
                await one.execute(b"select 1")
        except psycopg.Error:
            return STATEMENT
        for _ in range(POOLING_ROUNDS):
            async with connected(dsn, set_up=False) as another:
                if await _backend(another) == mine or await _backend(one) != mine:
                    return TRANSACTION
    return SESSION


async def _backend(conn: Connection) -> int:
    [row] = await (await conn.execute(b"select pg_backend_pid() as pid")).fetchall()
    return int(row["pid"])


def verdict(findings: Sequence[Finding]) -> str:
    """The worst of their states."""
    return max((finding.state for finding in findings), key=(OK, NOTE, PROBLEM).index, default=OK)
