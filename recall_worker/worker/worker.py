"""The worker: builds its parts, supervises their loops, and stops them in order.

All its loops are supervised together: a defect in one ends the worker with an error, after its runs
were given back. A run passes through `dispatcher` (claim, start), `executor` (call) and `settler`
(judge, write).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from .. import judge as judging
from ..cadence import TZDATA
from ..database.budget import ConnectionBudget
from ..database.connection import DatabaseUnavailable, Deadlines, StatementRejected
from ..database.ledger import Backlog, Ledger
from ..database.listener import Listener
from ..database.outbox import Outbox
from ..events import Events
from ..protocols import Protocol, traceparent
from ..protocols.credentials import Credentials
from ..protocols.webhook import Webhook
from ..secret_files import Secrets
from ..settings import Settings
from .database_status import DatabaseStatus
from .dispatcher import Dispatcher
from .endpoint_status import EndpointStatus
from .executor import Executor
from .failures import FailureSender
from .heartbeat import Heartbeat
from .leases import LeaseRenewer
from .pruner import Pruner
from .run import Run, Runs
from .schema_status import TODO, SchemaStatus
from .settler import Settler
from .wake import Wake
from .zones import ZoneUpdater

SETTLE_PATIENCE = 10.0
"""Seconds that a stopping worker waits for its last settles; leases that are not settled by then
end by themselves."""

CHORES_PATIENCE = 1.0
"""Seconds that it then waits for a batch that is being pruned, and for failures that are being
told."""

SUBSCRIBE_PATIENCE = 10.0
"""Seconds, at most, that the first claim waits until PostgreSQL knows that failures are to be told:
one that is settled before leaves no entry."""

DEREGISTER_PATIENCE = 2.0
"""Seconds that it then waits for its row in recall_workers to be deleted."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker's own view of its state."""

    slots: int
    slots_in_use: int
    breaker: str
    """open or closed"""
    bell: str
    """listening, lost or deaf"""
    database_is_lost: bool
    is_draining: bool
    held: str | None = None
    """Why nothing is claimed: copy, paused, or None."""


class Worker:
    """One replica. `run()` works until `stop()` is called (drain); a second `stop()` releases the
    runs at once."""

    def __init__(
        self,
        settings: Settings,
        protocol: Protocol,
        events: Events,
        name: str,
        secrets: Secrets | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        """`secrets`: those of the settings, as they stand now; None: as they stand there.
        `credentials`: the protocol's."""
        assert settings.dsn is not None
        secrets = secrets or Secrets(settings)
        self.name = name
        self._settings = settings
        self._protocol = protocol
        self._events = events
        # Read once, and not at each heartbeat: there may be no descriptor left by then.
        self._version = version("recall-worker")
        limit = settings.message_limit
        self._policy = judging.Policy(
            busy_delay=settings.busy_delay,
            max_attempts=settings.max_attempts,
            give_up=settings.give_up,
            message_limit=limit,
        )
        self._database = DatabaseStatus(events, settings.lease)
        budget = ConnectionBudget()
        self._ledger = Ledger(
            secrets.dsn,
            name,
            settings.lease,
            fleet=settings.fleet_concurrency,
            message_limit=limit,
            schema=settings.schema,
            budget=budget,
            committed=lambda confirmed: self._database.committed(confirmed=confirmed),
            allow_copy=settings.allow_copy,
            paused=settings.paused,
            queues=settings.queues,
            run_timeout=settings.run_timeout,
        )
        endpoint = hashlib.sha256((settings.run_url or "").encode()).hexdigest()[:16]
        self._queues = frozenset(settings.queues)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._runs = Runs(settings.concurrency)
        self._wake = Wake(settings.poll_interval, time.monotonic())
        self._schema = SchemaStatus(events)
        deadlines = Deadlines.within(settings.lease)
        self._listener = Listener(
            secrets.listen_dsn,
            name,
            self._notified,
            self._self_test,
            events,
            deadlines,
            settings.schema,
            budget=budget,
        )
        self._settler = Settler(
            self._ledger,
            self._policy,
            events,
            self._database,
            self._schema,
            self._settled,
            settings.lease,
        )
        self._endpoint = EndpointStatus(self._ledger, endpoint, events, self._endpoint_changed)
        executor = Executor(
            settings,
            self._policy,
            protocol,
            credentials or Credentials(settings, secrets),
            self._ledger,
            self._runs,
            self._settler,
            self._endpoint,
            self._database,
            self._schema,
            events,
            self._progressed,
        )
        self._dispatcher = Dispatcher(
            settings,
            self._ledger,
            self._runs,
            executor,
            self._endpoint,
            self._database,
            self._schema,
            events,
            self._wake,
            lambda: self.traceparent(),
        )
        self._leases = LeaseRenewer(
            self._ledger,
            settings.lease,
            self._database,
            self._schema,
            events,
            self._runs.by_id,
            self._let_go,
        )
        self._heartbeat = Heartbeat(
            self._ledger,
            settings.lease,
            settings.shown() | {"tzdata": TZDATA},
            self._facts,
            lambda: self._runs.in_doubt(settings.lease),
            self._replicas_ahead,
            self._database,
        )
        self._zones = ZoneUpdater(self._ledger, events)
        self._drained_at: float | None = None
        self._refused: Exception | None = None
        self.traceparent: Callable[[], str] = traceparent
        """Makes the value of a call's `traceparent` header; tracing replaces it."""
        keep = settings.keep if not settings.paused else {}
        self._pruner = (
            Pruner(self._ledger, keep, self._database, events, self._stop) if keep else None
        )
        self._failures = self._failure_sender(settings, secrets, budget)
        self._database.on_return(self._dispatcher.changed)
        self._database.on_return(self._listener.recheck)
        events.listen(
            lambda event, _: (
                self._heartbeat.beat_now() if event.startswith(("listener.", "claims.")) else None
            )
        )

    def _failure_sender(
        self, settings: Settings, secrets: Secrets, budget: ConnectionBudget
    ) -> FailureSender | None:
        """What tells failures; None where nobody is to be told, or nothing is claimed."""
        if settings.failure_url is None or settings.paused:
            return None
        outbox = Outbox(
            secrets.dsn,
            self.name,
            schema=settings.schema,
            budget=budget,
            allow_copy=settings.allow_copy,
            queues=settings.queues,
        )
        sender = FailureSender(
            outbox,
            self._ledger,
            lambda: Webhook(
                settings,
                lambda: secrets.current("run_token"),
                lambda: secrets.current("signing_secret"),
            ),
            self._database,
            self._events,
        )
        self._events.listen(
            lambda event, facts: (
                sender.wake()
                if event == "recall.settled" and facts["status"] in ("failed", "before")
                else None
            )
        )
        return sender

    # --- from outside -----------------------------------------------------------------------------

    def stop(self) -> None:
        """Claim no more and let the runs end, for RECALL_DRAIN_TIMEOUT at most. A second call gives
        them back now."""
        if self._stop.is_set():
            if not self._hurry.is_set():
                self._events.tell("worker.hurried", runs=len(self._runs))
            self._hurry.set()
        else:
            self._events.tell(
                "worker.draining", runs=len(self._runs), timeout_s=self._settings.drain_timeout
            )
            self._stop.set()
            self._dispatcher.stop()

    def refuse(self, reason: Exception) -> None:
        """Claim no more and let the runs end, as with `stop()`; then `run()` raises `reason`."""
        if self._refused is None and not self._stop.is_set():
            self._refused = reason
            self.stop()

    @property
    def refused(self) -> Exception | None:
        """Why this worker drains and ends, where it was made to by `refuse`."""
        return self._refused

    def before_heartbeat(self, check: Callable[[], Awaitable[None]]) -> None:
        """Have `check()` awaited before a heartbeat, once a lease or a minute. It may raise
        DatabaseUnavailable, StatementRejected."""
        self._heartbeat.check = check

    @property
    def is_listening(self) -> bool:
        return self._listener.listening

    @property
    def turned_at(self) -> float:
        """Monotonic instant of the last turn of the dispatch loop, or of the drain: for a
        watchdog."""
        return max(self._dispatcher.turned_at, self._drained_at or 0.0)

    @property
    def status(self) -> WorkerStatus:
        return WorkerStatus(
            slots=self._settings.concurrency,
            slots_in_use=self._runs.slots_in_use,
            breaker=self._endpoint.state,
            bell=self._listener.state,
            database_is_lost=self._database.is_lost,
            is_draining=self._stop.is_set(),
            held=self._ledger.held,
        )

    @property
    def schema_refuses(self) -> str | None:
        """Why the schema does not let this worker work, with what to do; None where it does."""
        reason = self._schema.reason
        return (
            None
            if reason is None
            else f"the schema is not as this code needs it: {reason}: " + TODO
        )

    async def schema(self) -> tuple[int, int]:
        """The schema's version and the oldest code that can work with it. Raises
        DatabaseUnavailable, StatementRejected."""
        return await self._noting_outages(self._ledger.schema())

    async def backlog(self) -> Backlog:
        """What is due and unclaimed in the table. Raises DatabaseUnavailable, StatementRejected."""
        return await self._noting_outages(self._ledger.backlog(failures=self._failures is not None))

    async def _noting_outages(self, query: Awaitable[T]) -> T:
        """Await a query for a caller outside. An outage that shows here is noted; the end of an
        outage is for those to note who write, as a standby answers queries, too."""
        try:
            return await query
        except DatabaseUnavailable as outage:
            self._database.lost(outage.reason)
            self._dispatcher.changed()
            raise

    async def run(self) -> None:
        """Work until stopped. Raises ExceptionGroup where a defect ended a loop, after giving the
        runs back, and the exception that `refuse()` got."""
        self._events.tell(
            "worker.started", **{k: v for k, v in self._settings.shown().items() if v is not None}
        )
        try:
            async with asyncio.TaskGroup() as loops:
                helpers = [
                    loops.create_task(work, name=name)
                    for name, work in (
                        ("listener", self._listener.run()),
                        ("settler", self._settler.run()),
                        ("renewals", self._leases.renew()),
                        ("lease checks", self._leases.check_leases()),
                        ("ends of leases", self._leases.let_go_in_time()),
                        ("heartbeat", self._heartbeat.run()),
                        ("zones", self._zones.run()),
                    )
                ]
                pruning = (
                    loops.create_task(self._pruner.run(), name="pruner")
                    if self._pruner is not None
                    else None
                )
                telling = (
                    loops.create_task(self._failures.run(), name="failures")
                    if self._failures is not None
                    else None
                )
                await self._await_subscription()
                await self._dispatcher.run()
                await self._drain()
                if self._failures is not None:
                    # Runs that ended in the drain may have failed.
                    self._failures.end()
                # The pruner knows of the stop, and ends by itself after its current batch. What is
                # cut off in being told is told again, by another worker.
                if chores := [task for task in (pruning, telling) if task is not None]:
                    await asyncio.wait(chores, timeout=CHORES_PATIENCE)
                    helpers += chores
                for helper in helpers:
                    helper.cancel()
        finally:
            for run in self._runs:
                run.abort("the worker broke")
            await self._protocol.close()
            await self._deregister()
            await self._ledger.close()
        self._events.tell("worker.stopped")
        if self._refused is not None:
            raise self._refused

    # --- what the parts report to each other ------------------------------------------------------

    def _notified(self, queue: str) -> None:
        """A notification came. `queue`: the one that a new row is in; "": anything may have
        changed."""
        if queue and queue not in self._queues:
            return
        if self._runs:
            self._leases.notified()
        self._dispatcher.notified()

    def _progressed(self) -> None:
        self._dispatcher.progressed()

    def _settled(self, run: Run, is_over: bool) -> None:
        self._runs.remove(run)
        self._dispatcher.run_ended(is_over=is_over)

    def _endpoint_changed(self) -> None:
        self._dispatcher.changed()
        self._heartbeat.beat_now()

    def _let_go(self, run: Run, state: str) -> None:
        if run in self._runs and run.abort(state):
            self._events.tell(
                "recall.aborted", recall=run.claim.id, session=run.claim.session_id, because=state
            )

    def _replicas_ahead(self, number: int) -> None:
        self._wake.replicas_ahead = number

    def _facts(self) -> dict[str, Any]:
        """The columns of this worker's row, for people."""
        status = self.status
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": self._version,
            "slots": self._settings.concurrency,
            "running": status.slots_in_use,
            "breaker": status.breaker,
            "bell": status.bell,
        }

    async def _self_test(self, channel: str) -> None:
        """Notify the listener's own channel. This uses the connection of the renewals: an outage
        may show here first, and delays them."""
        try:
            await self._ledger.notify(channel)
        except DatabaseUnavailable as outage:
            self._database.lost(outage.reason, outage.asked_at)
            # Only writes show that PostgreSQL is back: a NOTIFY may also succeed on a standby.
            self._dispatcher.changed()
            raise

    async def _await_subscription(self) -> None:
        if self._failures is None:
            return
        waits = [asyncio.create_task(wait) for wait in (self._failures.ready(), self._stop.wait())]
        await asyncio.wait(waits, timeout=SUBSCRIBE_PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    # --- stopping ---------------------------------------------------------------------------------

    async def _drain(self) -> None:
        hurry = asyncio.create_task(self._hurry.wait())
        idle = asyncio.create_task(self._runs.idle.wait())
        until = time.monotonic() + self._settings.drain_timeout
        while (left := until - time.monotonic()) > 0 and not (hurry.done() or idle.done()):
            await asyncio.wait(
                (hurry, idle), timeout=min(1.0, left), return_when=asyncio.FIRST_COMPLETED
            )
            self._drained_at = time.monotonic()
        if self._runs:
            released = sum(run.abort("the worker stopped in mid-run") for run in self._runs)
            self._events.tell("worker.released", runs=released)
            until = time.monotonic() + SETTLE_PATIENCE
            while (
                (left := until - time.monotonic()) > 0
                and not idle.done()
                and not self._is_hurried_away
            ):
                await asyncio.wait((idle,), timeout=min(0.2, left))
                self._drained_at = time.monotonic()
        for task in (hurry, idle):
            task.cancel()

    @property
    def _is_hurried_away(self) -> bool:
        """A second signal does not wait for a PostgreSQL that is lost: the leases end by
        themselves."""
        return self._hurry.is_set() and self._database.is_lost

    async def _deregister(self) -> None:
        if self._is_hurried_away:
            return
        try:
            async with asyncio.timeout(DEREGISTER_PATIENCE):
                await self._ledger.deregister()
        except (DatabaseUnavailable, StatementRejected, TimeoutError):
            pass
