"""An agent API on a raw socket: it counts requests byte by byte and answers by script, well or
badly.

It knows nothing of recall-worker's code. Requests are recorded when they have been read whole,
before they are answered. Answers are chosen by session id: a list is worked off one by one, and its
last stays; a session without a script gets 200 and `{}`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self


@dataclass(slots=True)
class Request:
    at: float
    """Monotonic instant at which the request had been read."""
    line: str
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes
    ended_at: float | None = None
    """Monotonic instant at which it was answered (or the peer hung up)."""
    answered: bool = False

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.body)
        return document

    @property
    def method(self) -> str:
        return self.line.split(" ")[0]

    @property
    def path(self) -> str:
        return self.line.split(" ")[1]

    @property
    def session(self) -> str:
        """The session of a call; of a poll or an abort, what follows `/runs/` in its path."""
        return (
            str(self.document["session_id"])
            if self.method == "POST"
            else self.path.rpartition("/runs/")[2]
        )

    @property
    def key(self) -> str:
        return self.headers["idempotency-key"]


@dataclass(frozen=True, slots=True)
class Raw:
    """These bytes, then (unless `keep`) the end of the connection. `reset`: by RST."""

    data: bytes = b""
    keep: bool = False
    reset: bool = False


@dataclass(slots=True)
class Gate:
    """Answers `then` when it is opened; until then the run goes on. `hung_up` is set when the
    caller leaves before."""

    then: Answer = field(default_factory=lambda: reply())
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)

    def open(self) -> None:
        self.opened.set()


Script = Callable[[Request], Awaitable["Raw | Gate"]]
Answer = Raw | Gate | Script


def reply(
    status: int = 200,
    body: Any = None,
    headers: dict[str, str] | None = None,
    *,
    text: bytes | None = None,
) -> Raw:
    """An HTTP answer: `body` as JSON (an empty object where None), or `text` as it is."""
    content = json.dumps({} if body is None else body).encode() if text is None else text
    fields = {"content-type": "application/json", "content-length": str(len(content))} | (
        headers or {}
    )
    lines = [
        f"HTTP/1.1 {status} Status",
        *(f"{name}: {value}" for name, value in fields.items()),
        "",
        "",
    ]
    return Raw("\r\n".join(lines).encode("latin-1") + content, keep=True)


class Endpoint:
    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self.scripts: dict[str, list[Answer]] = {}
        self.default: Answer = reply()
        self._changed = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.host, self.port = "127.0.0.1", 0

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/sessions/{{session_id}}/run"

    def script(self, session: str, *answers: Answer) -> None:
        """How calls of this session are answered, in turn; the last answer stays."""
        self.scripts[session] = list(answers)

    def of(self, session: str, method: str = "POST") -> list[Request]:
        return [
            request
            for request in self.requests
            if request.method == method and request.session == session
        ]

    @property
    def keys(self) -> list[str]:
        return [request.key for request in self.requests]

    async def until(self, condition: Callable[[], object], within: float = 20.0) -> None:
        """Wait until `condition()` holds; it is asked whenever a request arrives or ends. Raises
        TimeoutError."""
        async with asyncio.timeout(within), self._changed:
            await self._changed.wait_for(condition)

    async def count(
        self, n: int, session: str | None = None, within: float = 20.0
    ) -> list[Request]:
        """Wait for n requests (of a session); returns them."""
        await self.until(
            lambda: len(self.requests if session is None else self.of(session)) >= n, within
        )
        return self.requests if session is None else self.of(session)

    async def start(self, port: int = 0, on: socket.socket | None = None) -> None:
        """Listen on that port of 127.0.0.1, or on a socket that listens already."""
        where = {"sock": on} if on is not None else {"host": "127.0.0.1", "port": port or self.port}
        self._server = await asyncio.start_server(self._serve, **where, limit=1 << 26)
        self.host, self.port = self._server.sockets[0].getsockname()[:2]

    async def stop(self) -> None:
        """Refuse connections from now on, and break those that are open. `start()` takes the same
        port again."""
        if self._server is not None:
            self._server.close()
            for writer in list(self._open):
                writer.transport.abort()
            self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.add(writer)
        try:
            while (request := await self._read(reader)) is not None:
                await self._tell(partial(self.requests.append, request))
                keep = await self._answer(request, reader, writer)
                await self._tell(partial(setattr, request, "ended_at", time.monotonic()))
                if not keep:
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _tell(self, change: Callable[[], object]) -> None:
        async with self._changed:
            change()
            self._changed.notify_all()

    async def _read(self, reader: asyncio.StreamReader) -> Request | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError:
            return None
        line, *fields = head.rstrip("\r\n").split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (f.partition(":") for f in fields)
        }
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        return Request(time.monotonic(), line, headers, body)

    async def _answer(
        self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        # Calls are answered by the session's script, polls and aborts by that of `GET <run>` and
        # `DELETE <run>`.
        script = self.scripts.get(
            request.session if request.method == "POST" else f"{request.method} {request.session}",
            [],
        )
        answer = self.default if not script else script[0] if len(script) == 1 else script.pop(0)
        while not isinstance(answer, Raw):
            answer = (
                await self._pass(answer, reader)
                if isinstance(answer, Gate)
                else await answer(request)
            )
        request.answered = bool(answer.data)
        writer.write(answer.data)
        with suppress(ConnectionError):
            await writer.drain()
        if answer.reset:
            # Without lingering an abort is a FIN like any other.
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            writer.transport.abort()
        return answer.keep

    @staticmethod
    async def _pass(gate: Gate, reader: asyncio.StreamReader) -> Answer:
        gate.entered.set()
        opened = asyncio.ensure_future(gate.opened.wait())
        left = asyncio.ensure_future(reader.read(1))
        await asyncio.wait((opened, left), return_when=asyncio.FIRST_COMPLETED)
        for task in (opened, left):
            task.cancel()
        if left.done() and not left.cancelled() and not gate.opened.is_set():
            gate.hung_up.set()
            return Raw()
        with suppress(asyncio.CancelledError):
            await left
        return gate.then
