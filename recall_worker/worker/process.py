"""The daemon as a process: signals, systemd's notifications, limits of the operating system.

SIGTERM and SIGINT drain; a second one releases at once. SIGHUP has the secrets read again, and
ends nothing; nor do SIGUSR1, SIGUSR2 and their like (`signals`). systemd gets READY when the loop
turns, with or without PostgreSQL. Its watchdog gets no more notifications when the dispatch loop
stands still.
"""

from __future__ import annotations

import asyncio
import functools
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from uuid import uuid4

from .. import signals
from ..database.connection import CONNECT_DEADLINE, STATEMENT_DEADLINE, DatabaseUnavailable
from ..database.ledger import Ledger
from ..events import Events
from ..exposures import exposures
from ..protocols import create
from ..protocols.credentials import Credentials
from ..secret_files import Secrets
from ..settings import Settings
from ..statements import generation
from .worker import Worker

STANDSTILL = STATEMENT_DEADLINE + 2 * CONNECT_DEADLINE + 30.0
"""Seconds that one turn of the dispatch loop can take at most, after the longest pause between
polls."""

SCHEMA_PATIENCE = 5.0
"""Seconds, at most, that the check of the schema takes at the start."""
WATCHDOG_AT = 1 / 3
"""Part of systemd's watchdog interval after which it is notified: two may be late."""
WORKING_FILES = 64
"""Descriptors kept for PostgreSQL, DNS, files and the log. Calls need one for each slot; as many
again are kept for polls, and for runs that were answered and wait to be settled."""
UNLIMITED = 1 << 30


class SchemaRefused(Exception):
    """The schema and this code can't work together. `hint` says what to do.

    `excludes_code`: the schema is for newer code, so that this code can't start at all. Else
    `migrate` may still run.
    """

    def __init__(self, reason: str, hint: str, *, excludes_code: bool = False) -> None:
        super().__init__(reason)
        self.hint = hint
        self.excludes_code = excludes_code


def name_worker() -> str:
    """A name for this replica: host, pid, and four random letters, as the pid in a container is
    always the same."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:4]}"


Beside = Callable[[Worker, Events], AbstractAsyncContextManager[None]]


async def serve(
    settings: Settings, beside: Beside | None = None, secrets: Secrets | None = None
) -> None:
    """Run a worker until a signal stops it. `beside(worker, events)` is entered before it works and
    left when it has ended. `secrets`: those of the settings, as they stand now.

    Raises SchemaRefused where the schema does not fit this code: at once or, where a later
    migration excludes this code, after a drain. Raises ExceptionGroup where a defect ended a loop.
    """
    name = name_worker()
    events = Events(worker=name)
    _raise_open_files()
    received = 0
    secrets = secrets or Secrets(settings)
    credentials = Credentials(settings, secrets)
    protocol = create(settings, credentials)
    secrets.listen(lambda event, facts: events.tell(event, **facts))
    for exposure in exposures(settings, secrets.files()):
        events.tell(
            "settings.exposed",
            setting=exposure.setting,
            reason=exposure.seen,
            hint=exposure.todo,
        )

    def hung_up() -> None:
        events.tell("secrets.read", settings=secrets.read_again())

    def stop() -> None:
        nonlocal received
        received += 1
        notify("STOPPING=1")
        # A first signal during a drain that the schema began must not cut that drain short.
        if received > 1 or not worker.status.is_draining:
            worker.stop()

    async with AsyncExitStack() as around:
        around.enter_context(signals.hangups(hung_up))
        try:
            worker = Worker(settings, protocol, events, name, secrets, credentials)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stop)
            worker.before_heartbeat(functools.partial(_check_running, worker, events))
            await _check_schema(settings, name, secrets)
            if beside is not None:
                await around.enter_async_context(beside(worker, events))
        except BaseException as error:
            await protocol.close()
            if isinstance(error, SchemaRefused):
                events.tell("schema.refused", reason=str(error), hint=error.hint)
            raise
        work = asyncio.create_task(worker.run())
        events.tell("worker.ready")
        notify("READY=1")
        feeding = asyncio.create_task(_feed(worker))
        try:
            await work
        finally:
            feeding.cancel()


def notify(state: str) -> None:
    """Notify systemd (sd_notify(3)); does nothing where systemd did not ask for it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError:
            pass  # The worker goes on without its manager.


def standing_still(worker: Worker) -> bool:
    """Whether the dispatch loop has not turned for longer than it ever should."""
    return time.monotonic() - worker.turned_at >= STANDSTILL


async def _feed(worker: Worker) -> None:
    every = float(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 * WATCHDOG_AT
    mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    while every > 0 and mine:
        if not standing_still(worker):
            notify("WATCHDOG=1")
        await asyncio.sleep(every)


async def _check_schema(settings: Settings, name: str, secrets: Secrets) -> None:
    """Raise SchemaRefused for a schema that is too old or too new. Do not wait for a database that
    does not answer: the worker does that."""
    ledger = Ledger(secrets.dsn, name, settings.lease, schema=settings.schema)
    try:
        async with asyncio.timeout(SCHEMA_PATIENCE):
            version, oldest_code = await ledger.schema()
            unfit = misfit(version, oldest_code)
            if version == 0 and (absent := await ledger.absence()) is not None:
                unfit = SchemaRefused(absent.reason, absent.hint)
    except (DatabaseUnavailable, TimeoutError):
        return
    finally:
        await ledger.close()
    if unfit is not None:
        raise unfit


async def _check_running(worker: Worker, events: Events) -> None:
    """Let a running worker drain and end once the schema excludes its code. Raises
    DatabaseUnavailable, StatementRejected.

    Only then: a schema that is missing or older than the code is probably being restored.
    """
    unfit = misfit(*await worker.schema())
    if unfit is not None and unfit.excludes_code and not worker.status.is_draining:
        events.tell("schema.refused", reason=str(unfit), hint=unfit.hint)
        notify("STOPPING=1")
        worker.refuse(unfit)


def misfit(version: int, oldest_code: int) -> SchemaRefused | None:
    """Why this code can't work with a schema of this version, which works with code from
    `oldest_code` on; None where it can."""
    needed = generation()
    if version == 0:
        return SchemaRefused(
            "the database has no recall-worker schema yet", "recall-worker migrate"
        )
    if oldest_code > needed:
        return SchemaRefused(
            f"the schema is at version {version} and works with code from generation {oldest_code} "
            f"on; this is {needed}",
            "upgrade recall-worker on this host",
            excludes_code=True,
        )
    if version < needed:
        return SchemaRefused(
            f"the schema is at version {version}, this code needs {needed}", "recall-worker migrate"
        )
    return None


def spare_descriptors(slots: int) -> int:
    """Descriptors that the process may open besides those that its work needs."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft - WORKING_FILES - 2 * slots if soft != resource.RLIM_INFINITY else UNLIMITED


def _raise_open_files() -> None:
    """Allow as many open files as the system lets us: each open run is a socket."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):
        pass
