"""The ops port under attack: it costs bounded descriptors and a bounded log, answers those who ask,
and stops no recall."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from recall_worker.ops.pages import ANSWER_DEADLINE, HEAD_DEADLINE

from ..support.application import Application
from ..support.daemon import Daemon, Daemons
from ..support.endpoint import Endpoint
from .test_lease import promise
from .test_ops import address, read, until

FILES = 256
FEW_FILES = ["sh", "-c", f'ulimit -n {FILES} && exec "$@"', "sh"]
HALF = b"GET /metrics HTTP/1.1\r\nHost: x\r\n"
KEPT = 128
"""Descriptors that are left for calls and PostgreSQL at least, of FILES."""

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def port(daemon: Daemon) -> int:
    return int((await address(daemon)).rpartition(":")[2])


def open_files(daemon: Daemon) -> int:
    return sum(1 for _ in Path(f"/proc/{daemon.pid}/fd").iterdir())


async def connect(at: int, head: bytes = b"") -> Stream:
    reader, writer = await asyncio.open_connection("127.0.0.1", at)
    writer.write(head)
    return reader, writer


@asynccontextmanager
async def crowd(at: int, size: int) -> AsyncIterator[list[Stream]]:
    """So many connections, half of them silent and half in mid-head, each opened again when it is
    closed."""

    async def one(n: int) -> None:
        while True:
            with suppress(OSError):
                reader, writer = await connect(at, HALF if n % 2 else b"")
                streams.append((reader, writer))
                if len(streams) >= size:
                    all_there.set()
                await reader.read()
                writer.close()
            await asyncio.sleep(0.5)

    streams: list[Stream] = []
    all_there = asyncio.Event()
    tasks = [asyncio.create_task(one(n)) for n in range(size)]
    try:
        async with asyncio.timeout(20):
            await all_there.wait()
        yield streams
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _, writer in streams:
            writer.close()


async def ends(stream: Stream, within: float) -> float:
    """Seconds until the other end closes the connection. Raises TimeoutError."""
    began = time.monotonic()
    async with asyncio.timeout(within):
        with suppress(ConnectionError):
            await stream[0].read()
    return time.monotonic() - began


@pytest.mark.slow
async def test_half_open_connections_stop_nothing(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """370 connections without a request, at 256 descriptors: recalls are fired, /livez answers, the
    log stays small."""
    async with Daemons(daemons.environ, before=FEW_FILES) as elsewhere:
        daemon = await elsewhere.start(ops_listen=0)
        async with crowd(await port(daemon), 370):
            began, most = time.monotonic(), 0
            for n in range(10):
                recall = await promise(app, f"s{n}")
                await daemon.hears("recall.settled", recall=recall, within=5)
                assert (await read(daemon, "/livez", within=5)).text == "alive\n"
                most = max(most, open_files(daemon))
                await asyncio.sleep(max(0.0, began + n - time.monotonic()))
            assert most < FILES - KEPT
        assert len(endpoint.requests) == 10
        assert len(daemon.talk) == 0 and len(daemon.events) < 200
        assert len(daemon.told("ops.crowded")) == 1
        assert await daemon.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("drip", [b"", b"x"], ids=["silent", "drips"])
async def test_a_head_has_a_deadline(drip: bytes, daemons: Daemons) -> None:
    """A connection that sends nothing, and one that sends a byte at a time, are closed when a
    head's time is up."""
    daemon = await daemons.start(ops_listen=0)
    stream = await connect(await port(daemon), HALF)
    closing = asyncio.create_task(ends(stream, HEAD_DEADLINE + 5))
    while drip and not closing.done():
        with suppress(ConnectionError):
            stream[1].write(drip)
            await stream[1].drain()
        await asyncio.sleep(0.1)
    took = await closing
    stream[1].close()
    assert HEAD_DEADLINE - 1 < took < HEAD_DEADLINE + 3


async def test_a_connection_is_for_one_request(daemons: Daemons) -> None:
    """An answer says that the connection ends, and it does: none stays open for a request that may
    come."""
    daemon = await daemons.start(ops_listen=0)
    reader, writer = await connect(await port(daemon), b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    said = await asyncio.wait_for(reader.read(), 3)
    assert said.startswith(b"HTTP/1.1 200") and b"\r\nConnection: close\r\n" in said
    assert said.endswith(b"alive\n")
    writer.close()


@pytest.mark.full
async def test_an_answer_that_nobody_reads(daemons: Daemons) -> None:
    """A client that asks and does not go on, here with its body, holds its connection for a bounded
    time."""
    daemon = await daemons.start(ops_listen=0)
    head = b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    stream = await connect(await port(daemon), head)
    assert await ends(stream, ANSWER_DEADLINE + 5) < ANSWER_DEADLINE + 3
    stream[1].close()


@pytest.mark.slow
async def test_no_descriptors_left(app: Application, daemons: Daemons) -> None:
    """Where accept itself has no descriptor left that is told once, and the port answers when there
    are some again."""
    daemon = await daemons.start(ops_listen=0)
    at = await port(daemon)
    await until(daemon, "/livez", 200)
    await daemon.hears("recall.settled", recall=await promise(app, "before"))
    before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    streams = [await connect(at, HALF) for _ in range(20)]
    [told] = await daemon.hears("ops.refused")
    assert told["reason"] == "Too many open files"
    await asyncio.sleep(5)
    assert len(daemon.told("ops.refused")) == 1 and daemon.talk == []
    # What is open goes on working meanwhile: calls over connections that are kept, PostgreSQL.
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
    assert (await until(daemon, "/livez", 200)).text == "alive\n"
    await daemon.hears("recall.settled", recall=await promise(app, "after"))
    for _, writer in streams:
        writer.close()


@pytest.mark.slow
async def test_garbage_is_not_logged(daemons: Daemons) -> None:
    """What is no HTTP is answered with 400, and fills no log."""
    daemon = await daemons.start(ops_listen=0)
    at = await port(daemon)
    for garbage in (
        b"\x16\x03\x01\x02\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /" + b"x" * 9000,
    ):
        for _ in range(20):
            reader, writer = await connect(at, garbage)
            with suppress(ConnectionError):
                assert b" 400 " in (await asyncio.wait_for(reader.read(), 5)).split(b"\r\n")[0]
            writer.close()
    assert (await read(daemon, "/livez")).status == 200
    assert daemon.talk == [] and {e["level"] for e in daemon.events} <= {"debug", "info"}
