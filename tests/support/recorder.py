"""A connection's way to PostgreSQL that writes down the statements that pass, byte for byte.

What it has is what PostgreSQL was sent, by whatever client and in whatever process: not what some
function of ours was called with.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from typing import Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo


class Recorder:
    """Listens on 127.0.0.1 for connections to the server of a DSN. `dsn` is the way through it."""

    def __init__(self, dsn: str) -> None:
        self._direct = dsn
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.statements: set[str] = set()
        """The texts of all statements that clients sent (Query and Parse messages)."""
        self.counts: Counter[str] = Counter()
        """How often each was sent."""

    @property
    def dsn(self) -> str:
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        return make_conninfo(
            self._direct, host="127.0.0.1", port=port, sslmode="disable", gssencmode="disable"
        )

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = conninfo_to_dict(self._direct)
        host, port = str(target.get("host") or "localhost"), int(target.get("port") or 5432)
        if host.startswith("/"):
            answers, server = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        else:
            answers, server = await asyncio.open_connection(host, port)
        back = asyncio.create_task(_copy(answers, writer))
        try:
            # The first message of a connection has a length and no type.
            kind = b""
            while True:
                head = await reader.readexactly(len(kind) + 4)
                body = await reader.readexactly(int.from_bytes(head[-4:], "big") - 4)
                match head[:-4]:
                    case b"Q":
                        self._note(body.removesuffix(b"\0"))
                    case b"P":
                        self._note(body.split(b"\0")[1])
                server.write(head + body)
                await server.drain()
                kind = b"-"
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            back.cancel()
            await asyncio.gather(back, return_exceptions=True)
            for end in (server, writer):
                end.transport.abort()

    def _note(self, text: bytes) -> None:
        self.statements.add(text.decode())
        self.counts[text.decode()] += 1


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()
