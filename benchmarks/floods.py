"""How long healthy calls take beside peers that answer without end: our HTTP client and the one
before.

    python benchmarks/floods.py       # from the repository's root; about a minute

The peers (tests/support/flood.py, a process of their own) send interim answers, one-byte chunks, or
a plain body, without end. Each bad call ends by its client's bounds or after half a second, and is
made again 20 ms later; healthy calls go to another process. Shown is the median of 300 healthy
calls, made one after the other, and the longest time for which the event loop did not turn, in
milliseconds.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BODY = b'{"a":"' + b"x" * 300 + b'"}'
BAD = (0, 1, 5, 30)
KINDS = ("interim", "chunks", "body")


async def server() -> tuple[asyncio.subprocess.Process, str]:
    """A server in a process of its own, and its address."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.flood"),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    return process, f"http://127.0.0.1:{int(await process.stdout.readline())}/"


async def measured(client: Any, healthy: str, flood: str, bad: int) -> tuple[float, float]:
    """Milliseconds: the median of healthy calls, and the longest standstill of the loop."""
    longest, over = 0.0, asyncio.Event()

    async def watch() -> None:
        nonlocal longest
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - began - 0.001)

    async def call_again() -> None:
        while not over.is_set():
            await client.post(flood, dict, BODY, 0.5, lambda: None)
            await asyncio.sleep(0.02)

    calls = [asyncio.create_task(call_again()) for _ in range(bad)]
    await asyncio.sleep(0.3)
    watching = asyncio.create_task(watch())
    found, until = [], time.perf_counter() + 10
    while len(found) < 300 and time.perf_counter() < until:
        began = time.perf_counter()
        await client.post(healthy + "ok", dict, BODY, 30.0, lambda: None)
        found.append(time.perf_counter() - began)
    watching.cancel()
    over.set()
    await asyncio.gather(*calls)
    return statistics.median(found) * 1000, longest * 1000


async def main() -> None:
    from aiohttp_client import HttpClient as Former

    from recall_worker.protocols.http import HttpClient as Own
    from recall_worker.settings import Settings

    print(f"{'':<18}" + "".join(f"{f'{bad} bad':>18}" for bad in BAD))
    (well, healthy), (ill, flood) = await server(), await server()
    for kind in KINDS:
        for name, made in (("own", Own), ("former", Former)):
            line = f"{kind + ', ' + name:<18}"
            for bad in BAD:
                client: Any = made(Settings())
                middle, longest = await measured(client, healthy, flood + kind, bad)
                await client.close()
                line += f"{f'{middle:.2f} ({longest:.0f})':>18}"
            print(line, flush=True)
    for process in (well, ill):
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(main())
