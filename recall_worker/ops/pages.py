"""The pages of RECALL_OPS_LISTEN: /livez, /readyz, /metrics. They answer whoever asks; nothing in them is secret, and nothing can be changed.

`/livez` is about this process alone: does the claim loop turn? An outage of PostgreSQL is no reason to restart it. `/readyz` says whether
recalls are kept now: PostgreSQL answers, the schema fits, no drain has begun. What they need to know from PostgreSQL is asked at most every
few seconds however often they are read, and not at all while nobody reads them; a page never waits long for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, TypeVar

from aiohttp import web

from ..events import Events
from ..ledger import Backlog
from ..line import Outage, Refusal
from ..terminal import Trouble
from ..worker.process import misfit, standing_still
from ..worker.worker import Worker
from .metrics import Metrics

BACKLOG_EVERY = 5.0
SCHEMA_EVERY = 2.0
PATIENCE = 2.0
"""Seconds that a page waits for PostgreSQL."""

T = TypeVar("T")


class Question(Generic[T]):
    """A question to PostgreSQL, asked at most every so many seconds, by one asker at a time."""

    def __init__(self, ask: Callable[[], Awaitable[T]], every: float) -> None:
        self._ask = ask
        self._every = every
        self._asked_at = -every
        self._asking: asyncio.Task[T | str] | None = None

    async def answer(self) -> T | str:
        """The newest answer, or why there is none."""
        if self._asking is None or (self._asking.done() and time.monotonic() - self._asked_at >= self._every):
            self._asked_at = time.monotonic()
            self._asking = asyncio.create_task(self._answered())
        # Not broken off when it takes longer: that would cost the connection, which others use, too.
        await asyncio.wait((self._asking,), timeout=PATIENCE)
        return self._asking.result() if self._asking.done() else f"PostgreSQL has not answered for {PATIENCE:g} s"

    async def _answered(self) -> T | str:
        try:
            return await self._ask()
        except (Outage, Refusal) as error:
            return error.reason

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait((self._asking,))


class Pages:
    """Answers for one worker."""

    def __init__(self, worker: Worker, metrics: Metrics) -> None:
        self._worker = worker
        self._metrics = metrics
        self._schema = Question(worker.schema, SCHEMA_EVERY)
        self._backlog: Question[Backlog] = Question(worker.backlog, BACKLOG_EVERY)

    async def livez(self, _: web.Request) -> web.Response:
        if standing_still(self._worker):
            return said(f"the claim loop has not turned for {time.monotonic() - self._worker.turned_at:.0f} s", 503)
        return said("alive")

    async def readyz(self, _: web.Request) -> web.Response:
        if self._worker.vitals.is_draining:
            return said("draining: nothing more is claimed", 503)
        schema = await self._schema.answer()
        if isinstance(schema, str):
            return said(f"PostgreSQL: {schema}", 503)
        unfit = misfit(*schema)
        return said("ready") if unfit is None else said(f"{unfit}: {unfit.hint}", 503)

    async def metrics(self, request: web.Request) -> web.Response:
        backlog = await self._backlog.answer()
        self._metrics.backlog = None if isinstance(backlog, str) else backlog
        page, content_type = self._metrics.page(request.headers.get("Accept", ""))
        return web.Response(body=page, headers={"Content-Type": content_type, "Cache-Control": "no-store"})

    async def close(self) -> None:
        for question in (self._schema, self._backlog):
            await question.close()


def said(text: str, status: int = 200) -> web.Response:
    return web.Response(text=text + "\n", status=status, headers={"Cache-Control": "no-store"})


@contextlib.asynccontextmanager
async def pages(worker: Worker, events: Events, host: str, port: int) -> AsyncIterator[None]:
    """Serve the pages until left. Raises Trouble where nothing can listen there."""
    metrics = Metrics(lambda: worker.vitals)
    events.listen(metrics.hear)
    answers = Pages(worker, metrics)
    app = web.Application()
    app.on_response_prepare.append(_without_a_name)
    app.add_routes([web.get(f"/{page.__name__}", page) for page in (answers.livez, answers.readyz, answers.metrics)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, keepalive_timeout=75.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            # asyncio's sentence names the address once more; those of name look-ups have numbers of their own, below zero.
            reason = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror or str(error)
            hint = f"another address in RECALL_OPS_LISTEN, or see what listens there: ss -ltnp 'sport = :{port}'"
            raise Trouble(f"RECALL_OPS_LISTEN: nothing can listen on {host} port {port}: {reason}", hint) from None
        address, bound = runner.addresses[0][:2]
        events.tell("ops.listening", host=address, port=bound)
        yield
    finally:
        await runner.cleanup()
        await answers.close()


async def _without_a_name(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "recall-worker"  # And not which versions of what.
