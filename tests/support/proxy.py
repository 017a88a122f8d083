"""A wire between a daemon and its PostgreSQL that can be made to fail: cut, slow, or half-open (a
peer that is there and silent).

It counts what is asked through it, so a test can say how many round trips something costs. It reads
nothing of what passes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo


@dataclass(slots=True, eq=False)
class _Line:
    """One connection of a daemon, and ours to PostgreSQL behind it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    dead: bool = False
    """Half-open: swallows what it is given, in both directions, for ever."""
    answered: bool = True
    """Whether the next piece from the client begins a question: none is open."""


class Proxy:
    """Listens on 127.0.0.1 for connections to the server of a DSN. `dsn` is the way through it."""

    def __init__(self, dsn: str) -> None:
        self._target = conninfo_to_dict(dsn)
        self._direct = dsn
        self._server: asyncio.Server | None = None
        self._lines: dict[_Line, None] = {}
        self._refusing = False
        self._silent = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self.seconds = 0.0
        """How long every piece is held back, in each direction."""
        self.connections = 0
        """Connections that were asked for so far."""
        self.asked = 0
        """Questions of clients so far, each in as many pieces as it likes: one a round trip, and
        two or three for each connection."""
        self.port = 0

    @property
    def dsn(self) -> str:
        return make_conninfo(
            self._direct, host="127.0.0.1", port=self.port, sslmode="disable", gssencmode="disable"
        )

    def lead(self, dsn: str) -> None:
        """Lead every connection that is asked for from now on to another server, as an address that
        was moved does; break the others."""
        self._target = conninfo_to_dict(dsn)
        for line in list(self._lines):
            _reset(line)

    def cut(self) -> None:
        """Reset every connection, and each new one at once."""
        self._refusing = True
        for line in list(self._lines):
            _reset(line)

    def delay(self, seconds: float) -> None:
        """Hold every piece back for so long."""
        self.seconds = seconds

    def blackhole(self) -> None:
        """Let every connection, and each new one, stay open and hear nothing any more."""
        self._silent = True
        for line in self._lines:
            line.dead = True

    def forget(self, n: int) -> None:
        """Let one connection, the n-th of those that are open, hear nothing any more; new ones
        pass: as behind a router that forgot it."""
        list(self._lines)[n].dead = True

    @property
    def open(self) -> int:
        """How many connections are open."""
        return len(self._lines)

    def heal(self) -> None:
        """Let new connections pass. Those that were half-open stay so, as behind a router that
        forgot them."""
        self._refusing = self._silent = False
        self.seconds = 0.0

    async def until(self, condition: Callable[[], object], within: float = 20.0) -> None:
        """Wait until `condition()` holds; it is asked whenever a connection or a piece comes.
        Raises TimeoutError."""
        async with asyncio.timeout(within), self._changed:
            await self._changed.wait_for(condition)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for line in list(self._lines):
            _reset(line)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self._changed:
            self.connections += 1
            self._changed.notify_all()
        line = _Line(writer, dead=self._silent)
        if self._refusing:
            _reset(line)
            return
        self._lines[line] = None
        task = asyncio.create_task(self._carry(line, reader))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, line: _Line, reader: asyncio.StreamReader) -> None:
        try:
            if line.dead:
                while await reader.read(1 << 16):
                    pass
                return
            answers, line.server = await self._connect()
            back = asyncio.create_task(self._pump(line, answers, line.client, asking=False))
            try:
                await self._pump(line, reader, line.server, asking=True)
            finally:
                back.cancel()
                await asyncio.gather(back, return_exceptions=True)
        except OSError:
            pass
        finally:
            self._lines.pop(line, None)
            _reset(line)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = (
            str(self._target.get("host") or "localhost"),
            str(self._target.get("port") or 5432),
        )
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, int(port))

    async def _pump(
        self,
        line: _Line,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        asking: bool,
    ) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if asking:
                    async with self._changed:
                        self.asked += line.answered
                        self._changed.notify_all()
                line.answered = not asking
                if self.seconds:
                    await asyncio.sleep(self.seconds)
                if not line.dead:
                    writer.write(data)
                    await writer.drain()
        if not asking and not line.dead:
            # PostgreSQL has hung up: so do we.
            line.client.close()


def _reset(line: _Line) -> None:
    for writer in (line.client, line.server):
        if writer is not None:
            writer.transport.abort()
