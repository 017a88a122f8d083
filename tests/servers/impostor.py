"""A server on a raw socket that answers by method and path, and keeps what it was asked; and a
gateway that loses an answer of a real one."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from ..support.endpoint import reply

NO_ROUTE = reply(404, {"detail": "Not Found"})


@dataclass(frozen=True, slots=True)
class Asked:
    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def what(self) -> str:
        """Method and path."""
        method, target, _ = self.line.split(" ")
        return f"{method} {urlsplit(target).path}"

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.line.split(" ")[1]).query)


Answers = dict[str, Any]
"""By method and path: a Raw, a list of them (worked off one by one, the last stays), or what makes
one of the request."""


class Impostor:
    """Answers like an agent server, well or badly; what it has no answer for is 404, as with any of
    them."""

    def __init__(self, answers: Answers) -> None:
        self.asked: list[Asked] = []
        self._answers = {
            what: list(answer) if isinstance(answer, list) else answer
            for what, answer in answers.items()
        }
        self._open: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._open.values():
            writer.transport.abort()
        await asyncio.gather(*self._open)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        task.add_done_callback(self._open.pop)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                line, *fields = (
                    (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip().split("\r\n")
                )
                headers = {
                    name.lower(): value.strip()
                    for name, _, value in (field.partition(":") for field in fields)
                }
                asked = Asked(
                    line, headers, await reader.readexactly(int(headers.get("content-length", "0")))
                )
                self.asked.append(asked)
                answer = self._answers.get(asked.what, NO_ROUTE)
                if isinstance(answer, list):
                    answer = answer[0] if len(answer) == 1 else answer.pop(0)
                if callable(answer):
                    answer = answer(asked)
                if answer is None:
                    await reader.read()
                    break
                writer.write(answer.data)
                if not answer.keep:
                    break
        writer.close()

    @property
    def what(self) -> list[str]:
        return [asked.what for asked in self.asked]


class Relay:
    """A gateway in front of the server that loses the answer to the next post to a path with this
    end: it hangs up instead, or says nothing for ever."""

    def __init__(self, url: str, *, silent: bool, path: str = "/runs") -> None:
        self._target = urlsplit(url)
        self._silent = silent
        self._path = f"{path} HTTP/1.1".encode()
        self._losing = True
        self._tasks: set[asyncio.Task[Any]] = set()
        self.lost = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._carry(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(
            self._target.hostname, self._target.port
        )
        losing = asyncio.Event()

        async def there() -> None:
            while data := await reader.read(1 << 16):
                line = data.split(b"\r\n", 1)[0]
                if self._losing and line.startswith(b"POST ") and line.endswith(self._path):
                    self._losing = False
                    losing.set()
                to_server.write(data)

        async def back() -> None:
            while data := await from_server.read(1 << 16):
                if not losing.is_set():
                    writer.write(data)
                    continue
                self.lost.set()
                if not self._silent:
                    return

        pumps = [asyncio.create_task(there()), asyncio.create_task(back())]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            to_server.transport.abort()
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
