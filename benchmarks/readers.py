"""Open pages of a console, as far as they cost anything: streams that are read, in a process of
their own.

    python -m benchmarks.readers http://127.0.0.1:9465 200

They stand for browsers on other machines: this process gives way to all others on its own, which
pay for what they send to it, and not for what a browser does with it.

Says `{"open": 200}` when each has had its first news, and at the end of its standard input how many
octets and how many events came to all of them together.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

PARTS = ("now", "now", "queues", "workers")
"""What is open: most people look at what goes on now."""
PATIENCE = 60.0


class Readers:
    def __init__(self) -> None:
        self.octets = 0
        self.events = 0

    async def read(self, host: str, port: int, part: str, told: asyncio.Event) -> None:
        """One page, until it is cancelled."""
        reader, writer = await asyncio.open_connection(host, port)
        try:
            request = f"GET /live?part={part} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n"
            writer.write(request.encode())
            while data := await reader.read(1 << 16):
                self.octets += len(data)
                if number := data.count(b"event: "):
                    self.events += number
                    told.set()
            raise ConnectionError(f"the stream of {part} ended")
        finally:
            writer.close()


async def main(root: str, number: int) -> None:
    host, _, port = root.removeprefix("http://").partition(":")
    readers = Readers()
    async with asyncio.TaskGroup() as tasks:
        told = [asyncio.Event() for _ in range(number)]
        pages = [
            tasks.create_task(readers.read(host, int(port), PARTS[n % len(PARTS)], told[n]))
            for n in range(number)
        ]
        async with asyncio.timeout(PATIENCE):
            for one in told:
                await one.wait()
        print(json.dumps({"open": number}), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        for page in pages:
            page.cancel()
    print(json.dumps({"octets": readers.octets, "events": readers.events}), flush=True)


if __name__ == "__main__":
    os.nice(19)
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
