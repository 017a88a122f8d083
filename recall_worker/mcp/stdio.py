"""MCP on stdin and stdout, for one session: the one that whoever starts the process names.

stdout carries the protocol and nothing else: the SDK moves it to a descriptor of its own, and what
anything else prints goes to stderr, as the log does. The process ends when stdin does, or at
SIGTERM; a call that is going on then has a few seconds to end.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Collection
from contextlib import suppress
from typing import Any, Self

import anyio
from mcp.server.stdio import stdio_server

from ..settings import Settings
from .process import running
from .server import serve_tools

LAST_CALL = 5.0
"""Seconds for the calls that are going on when the process is told to end."""


class _Asked:
    """The requests that were read and not answered yet."""

    def __init__(self) -> None:
        self._ids: set[str | int] = set()
        self._none = asyncio.Event()
        self._none.set()

    def read(self, message: Any) -> None:
        id = getattr(getattr(message, "message", None), "id", None)
        if id is not None and hasattr(message.message, "method"):
            self._ids.add(id)
            self._none.clear()

    def answered(self, message: Any) -> None:
        self._ids.discard(getattr(message.message, "id", None))
        if not self._ids:
            self._none.set()

    async def all_answered(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_CALL):
                await self._none.wait()


class _Reading:
    """The SDK's stream of what is read. At its end the server cancels the calls that go on, so that
    end comes when they are answered, or after LAST_CALL."""

    def __init__(self, inner: Any, asked: _Asked) -> None:
        self._inner, self._asked = inner, asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def receive(self) -> Any:
        try:
            message = await self._inner.receive()
        except anyio.EndOfStream:
            await self._asked.all_answered()
            raise
        self._asked.read(message)
        return message

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> Self:
        await self._inner.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> Any:
        return await self._inner.__aexit__(*error)


class _Writing:
    """The SDK's stream of what is written."""

    def __init__(self, inner: Any, asked: _Asked) -> None:
        self._inner, self._asked = inner, asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def send(self, message: Any) -> None:
        await self._inner.send(message)
        self._asked.answered(message)

    async def __aenter__(self) -> Self:
        await self._inner.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> Any:
        return await self._inner.__aexit__(*error)


async def serve(chosen: Settings, given: Collection[str]) -> None:
    session = chosen.mcp_session
    assert session is not None
    async with running(chosen, given) as process:
        tools = process.tools(session)
        server = serve_tools(lambda _: tools, process.events)
        ending = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, ending.set)
        try:
            async with stdio_server() as (read, write):
                process.events.tell("mcp.started", session=session)
                asked = _Asked()
                work = asyncio.create_task(
                    server.run(
                        _Reading(read, asked),
                        _Writing(write, asked),
                        server.create_initialization_options(),
                    )
                )
                told = asyncio.create_task(ending.wait())
                await asyncio.wait({work, told}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    await tools.finish(LAST_CALL)
                    process.events.tell("mcp.stopped")
                    await asyncio.sleep(0)  # The log's lines are written between two turns.
                    sys.stderr.flush()
                    # A thread of the SDK's waits in a read of stdin, which nothing interrupts: the
                    # interpreter's own end would wait for it, and with it for the client.
                    os._exit(0)
                told.cancel()
                await work
        except* BrokenPipeError:
            pass  # The client reads no more: there is nobody to tell.
        process.events.tell("mcp.stopped")
