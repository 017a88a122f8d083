"""Peers without end, in a process of their own: each connection is answered by what its path
names, as fast as it is read.

    python -m tests.support.flood      # prints its port, ends with its stdin
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
BEGUN = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ENDLESS = {
    "interim": (b"", b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" * 1000),
    "chunks": (BEGUN, b"1\r\nx\r\n" * 10_000),
    "body": (BEGUN, b"8000\r\n" + b"x" * 32_768 + b"\r\n"),
    "head": (b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 1000),
    "extension": (BEGUN + b"1;", b"a" * 32_768),
}


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            [length] = [
                int(line.split(b":")[1])
                for line in head.lower().split(b"\r\n")
                if line.startswith(b"content-length:")
            ] or [0]
            await reader.readexactly(length)
            kind = head.split(b" ")[1].decode().rpartition("/")[2]
            begin, more = ENDLESS.get(kind, (OK, b""))
            writer.write(begin)
            while more:
                writer.write(more)
                await writer.drain()
            await writer.drain()
    writer.close()


async def _main() -> None:
    server = await asyncio.start_server(_serve, "127.0.0.1", 0, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)  # Nobody waits for what is still open.


@contextlib.asynccontextmanager
async def flooding() -> AsyncIterator[str]:
    """The process; yields the address, to which a kind is added."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.flood",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(await process.stdout.readline())}/"
    finally:
        process.stdin.close()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(_main())
