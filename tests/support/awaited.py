"""`Recalls` and `SyncRecalls` for the same tests: synchronous objects under an asynchronous face.

Each call of a synchronous method runs in a thread, and is awaited or entered as a psycopg test
does: `await conn.execute(…)`, `async with conn.transaction():`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from typing import Any

import psycopg
from psycopg.rows import tuple_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from recall_worker import Recalls, SyncRecalls


class Awaited:
    """A synchronous object; what its methods return is awaited, or entered."""

    def __init__(self, inner: Any) -> None:
        object.__setattr__(self, "inner", inner)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        return found if name.endswith("_factory") or not callable(found) else _method(found)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)


def _method(found: Callable[..., Any]) -> Callable[..., _Call]:
    def call(*given: Any, **named: Any) -> _Call:
        values = [_bare(value) for value in given]
        return _Call(lambda: found(*values, **{k: _bare(value) for k, value in named.items()}))

    return call


def _bare(value: Any) -> Any:
    return value.inner if isinstance(value, Awaited) else value


def _faced(value: Any) -> Any:
    """What has methods of psycopg's own gets a face, too."""
    return Awaited(value) if type(value).__module__.startswith("psycopg") else value


class _Call:
    """A call that was not made yet: awaited, it is made; entered, its context is."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._context: Any = None

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._result().__await__()

    async def _result(self) -> Any:
        return _faced(await asyncio.to_thread(self._make))

    async def __aenter__(self) -> Any:
        self._context = await asyncio.to_thread(self._make)
        return _faced(await asyncio.to_thread(self._context.__enter__))

    async def __aexit__(self, *error: Any) -> Any:
        return await asyncio.to_thread(self._context.__exit__, *error)


class Asynchronous:
    """`Recalls`, and psycopg's own classes."""

    cursors: Mapping[str, Any] = {
        "plain": psycopg.AsyncCursor,
        "client-side": psycopg.AsyncClientCursor,
        "raw": psycopg.AsyncRawCursor,
    }

    def make(self, *given: Any, **named: Any) -> Any:
        """A `Recalls`."""
        return Recalls(*given, **named)

    def cursor(self, conn: Any) -> Any:
        """A plain cursor on a connection, whatever that makes itself; its rows are tuples."""
        return psycopg.AsyncCursor(conn, row_factory=tuple_row)

    @contextlib.asynccontextmanager
    async def connect(self, dsn: str, **named: Any) -> AsyncIterator[Any]:
        """A connection, closed (and committed) as psycopg does it."""
        async with await psycopg.AsyncConnection.connect(dsn, **named) as conn:
            yield conn

    @contextlib.asynccontextmanager
    async def pool(
        self, dsn: str, *, configure: Callable[[Any], None] | None = None, **named: Any
    ) -> AsyncIterator[Any]:
        """An open pool. `configure(conn)`: what is done to each new connection."""

        async def configured(conn: Any) -> None:
            if configure is not None:
                configure(conn)

        async with AsyncConnectionPool(dsn, open=False, configure=configured, **named) as opened:
            yield opened


class Synchronous(Asynchronous):
    """`SyncRecalls`, and what psycopg has for it, under an asynchronous face."""

    cursors: Mapping[str, Any] = {
        "plain": psycopg.Cursor,
        "client-side": psycopg.ClientCursor,
        "raw": psycopg.RawCursor,
    }

    def make(self, *given: Any, **named: Any) -> Any:
        """A `SyncRecalls`."""
        return Awaited(SyncRecalls(*map(_bare, given), **named))

    def cursor(self, conn: Any) -> Any:
        """As psycopg's."""
        return Awaited(psycopg.Cursor(_bare(conn), row_factory=tuple_row))

    @contextlib.asynccontextmanager
    async def connect(self, dsn: str, **named: Any) -> AsyncIterator[Any]:
        """As psycopg's."""
        async with _Call(lambda: psycopg.Connection.connect(dsn, **named)) as conn:
            yield conn

    @contextlib.asynccontextmanager
    async def pool(
        self, dsn: str, *, configure: Callable[[Any], None] | None = None, **named: Any
    ) -> AsyncIterator[Any]:
        """As psycopg's."""
        async with _Call(
            lambda: ConnectionPool(dsn, open=True, configure=configure, **named)
        ) as opened:
            yield opened


BOTH = {"Recalls": Asynchronous(), "SyncRecalls": Synchronous()}
"""Both ways to use the client, by the name of its class."""
