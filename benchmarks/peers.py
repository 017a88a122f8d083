"""One worker of a peer, or the bare loop, as a process: `python -m benchmarks.peers NAME DSN URL
SLOTS`. Ends with SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import sys
from itertools import count
from typing import Any

import aiohttp

MESSAGE = "Look at the build again, and say whether it is green. " * 4


class Caller:
    """The run endpoint, called as recall-worker calls it: the same transport, body and number of
    headers.
    """

    def __init__(self, url: str, slots: int) -> None:
        self._url = url
        self._room = asyncio.Semaphore(slots)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def call(self, session: str, message: str) -> Any:
        async with (
            self._room,
            self._session.post(
                self._url.replace("{session_id}", session),
                data=_body(session, message),
                headers=_headers(session),
            ) as answer,
        ):
            return json.loads(await answer.read())


def _body(session: str, message: str) -> bytes:
    document = {
        "session_id": session,
        "user_message": message,
        "system_message": f"[Scheduled recall] {message}",
        "recall": {
            "id": session,
            "call_type": "once",
            "occurrence": 1,
            "scheduled_for": "2027-01-31T09:00:00Z",
            "missed": 0,
        },
    }
    return json.dumps(document, separators=(",", ":")).encode()


def _headers(session: str) -> dict[str, str]:
    return {
        "Content-Type": "application/json",
        "Idempotency-Key": f"{session}:1",
        "Recall-Attempt": "1",
        "Recall-Lateness": "0.001000",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }


class HttpxCaller:
    """The same through httpx, over the same transport (httpx-aiohttp)."""

    def __init__(self, url: str, slots: int) -> None:
        import httpx
        from httpx_aiohttp import AiohttpTransport

        self._url = url
        self._client = httpx.AsyncClient(
            transport=AiohttpTransport(
                limits=httpx.Limits(
                    max_connections=None, max_keepalive_connections=None, keepalive_expiry=4.0
                )
            )
        )

    async def call(self, session: str, message: str) -> Any:
        answer = await self._client.post(
            self._url.replace("{session_id}", session),
            content=_body(session, message),
            headers=_headers(session),
        )
        return json.loads(answer.content)


async def loop(dsn: str, caller: Caller | HttpxCaller, slots: int) -> None:
    numbers = count()

    async def slot() -> None:
        while True:
            await caller.call(f"b{next(numbers)}", MESSAGE)

    await asyncio.gather(*(slot() for _ in range(slots)))


CLAIM = """with candidate as materialized (
    select id from session_recalls
    where status in ('pending', 'running') and paused_at is null
        and coalesce(lease_until, trigger_at) <= now() and lease is null
    order by coalesce(lease_until, trigger_at)
    limit %(slots)s
    for update skip locked
)
update session_recalls r
set lease = gen_random_uuid(), lease_until = now() + interval '60 seconds', leased_at = now(),
    leased_by = 'bare'
from candidate c
where c.id = r.id
returning r.id, r.session_id, r.additional_context_message"""
SETTLE = (
    "update session_recalls set status = 'fired', lease = null, lease_until = null where "
    "id = %(id)s"
)


async def bare(dsn: str, caller: Caller, slots: int) -> None:
    """Only what any worker must do: it listens, claims the row, calls, and writes that it has."""
    import psycopg

    from recall_worker.database.connection import Deadlines, QueryConnection

    connections: list[QueryConnection] = []
    claims, settles = (
        QueryConnection(dsn, name, Deadlines(), connections) for name in ("claims", "settles")
    )
    notified = asyncio.Event()
    running = set()

    async def run(id: str, session: str, message: str) -> None:
        await caller.call(session, message)
        await settles.ask(SETTLE, {"id": id})

    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as listener:

        def receive() -> None:
            listener.pgconn.consume_input()
            while listener.pgconn.notifies() is not None:
                notified.set()

        await listener.execute("listen session_recalls")
        asyncio.get_running_loop().add_reader(listener.fileno(), receive)
        while True:
            notified.clear()
            for row in await claims.ask(CLAIM, {"slots": slots}, as_=tuple):
                running.add(task := asyncio.create_task(run(*row)))
                task.add_done_callback(running.discard)
            await notified.wait()


async def procrastinate(dsn: str, caller: Caller, slots: int) -> None:
    import procrastinate as library

    app = library.App(
        connector=library.PsycopgConnector(conninfo=dsn, min_size=4, max_size=min(20, slots + 4))
    )

    @app.task(name="call")
    async def call(session: str, message: str) -> None:
        await caller.call(session, message)

    async with app.open_async():
        await app.run_worker_async(concurrency=slots, wait=True, listen_notify=True)


async def pgqueuer(dsn: str, caller: Caller, slots: int, capped: bool = False) -> None:
    import asyncpg
    from pgqueuer import PgQueuer
    from pgqueuer.db import AsyncpgPoolDriver
    from pgqueuer.models import Job

    async with asyncpg.create_pool(dsn, min_size=5, max_size=20) as pool:
        queue = PgQueuer(AsyncpgPoolDriver(pool))

        @queue.entrypoint("call")
        async def call(job: Job) -> None:
            assert job.payload is not None
            payload = json.loads(job.payload)
            await caller.call(payload["session"], payload["message"])

        if capped:
            # A batch may be half of the cap at most.
            await queue.run(batch_size=max(1, slots // 2), max_concurrent_tasks=slots)
        else:
            await queue.run(batch_size=slots)


async def pgqueuer_capped(dsn: str, caller: Caller, slots: int) -> None:
    await pgqueuer(dsn, caller, slots, capped=True)


async def main(name: str, dsn: str, url: str, slots: int) -> None:
    if name == "loop-httpx":
        await loop(dsn, HttpxCaller(url, slots), slots)
        return
    work = {
        "loop": loop,
        "bare": bare,
        "procrastinate": procrastinate,
        "pgqueuer": pgqueuer,
        "pgqueuer-capped": pgqueuer_capped,
    }[name]
    await work(dsn, Caller(url, slots), slots)


if __name__ == "__main__":
    name, dsn, url, slots = sys.argv[1:]
    if name.startswith("pgqueuer"):
        import uvloop

        uvloop.run(main(name, dsn, url, int(slots)))
    else:
        asyncio.run(main(name, dsn, url, int(slots)))
