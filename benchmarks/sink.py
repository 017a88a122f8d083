"""The run endpoint of the benchmarks: answers at once, and stamps each arrival with the monotonic
clock (nanoseconds).

`POST …/<session>`. All arrivals are stamped; for sessions whose name begins with `p` (probes) the
arrival is kept by name. Sessions whose name begins with `h` are held: answered after `hold`
seconds. Controlled and queried by lines of JSON on stdin and stdout: see `Sink` in ground.py.
"""

from __future__ import annotations

import asyncio
import json
import re
import resource
import sys
import time
from array import array
from bisect import bisect_left
from typing import Any

ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
    b'22\r\n\r\n{"status":"completed"}'
)
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)

stamps = array("q")
probes: dict[str, int] = {}
hold = 0.0
held = 0
answered_last = 0
changed = asyncio.Event()


class Connection(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.pending = b""

    def data_received(self, data: bytes) -> None:
        global held
        data = self.pending + data if self.pending else data
        while (head := data.find(b"\r\n\r\n")) >= 0:
            found = LENGTH.search(data, 0, head)
            end = head + 4 + (int(found[1]) if found else 0)
            if len(data) < end:
                break
            now = time.monotonic_ns()
            stamps.append(now)
            path = data[: data.index(b"\r\n")].split(b" ")[1]
            session = path[path.rindex(b"/") + 1 :]
            data = data[end:]
            if session[:1] == b"p":
                probes.setdefault(session.decode(), now)
            if session[:1] == b"h" and hold:
                held += 1
                asyncio.get_running_loop().call_later(hold, self.release)
            else:
                self.transport.write(ANSWER)
        self.pending = data
        changed.set()

    def release(self) -> None:
        global held, answered_last
        held -= 1
        answered_last = time.monotonic_ns()
        self.transport.write(ANSWER)
        changed.set()


async def reply(asked: dict[str, Any]) -> dict[str, Any]:
    global hold
    match asked["do"]:
        case "reset":
            hold = asked.get("hold", 0.0)
            del stamps[:]
            probes.clear()
        case "wait":
            deadline = time.monotonic() + asked["within"]
            while not (
                len(stamps) >= asked.get("count", 0)
                and len(probes) >= asked.get("probes", 0)
                and held >= asked.get("held", 0)
            ):
                changed.clear()
                try:
                    async with asyncio.timeout(deadline - time.monotonic()):
                        await changed.wait()
                except TimeoutError:
                    break
        case "between":
            return {
                "count": bisect_left(stamps, asked["until"]) - bisect_left(stamps, asked["since"])
            }
        case "probes":
            return probes
    return {
        "count": len(stamps),
        "probes": len(probes),
        "held": held,
        "answered_last": answered_last,
        "first": stamps[0] if stamps else 0,
        "last": stamps[-1] if stamps else 0,
    }


async def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=4096)
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    while line := await lines.readline():
        print(json.dumps(await reply(json.loads(line))), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
