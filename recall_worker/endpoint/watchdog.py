"""Renews leases from a thread of its own while the event loop is blocked.

An agent that calls a blocking library in an `async def` stops everything else in its process, the
renewals too. Its leases would end, another process would take its sessions, and two runs would meet
in one session, only because of a missing `asyncio.to_thread`. So this thread watches the loop. As
long as it turns, nothing happens here: no connection, no statement.

Never here: what else is done about leases (application).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection
from uuid import UUID

from .store import StoreUnavailable

PATIENCE = 1 / 3
"""Of a lease: how long the loop may stand still until this thread renews in its place. With the
time since the last renewal (a third) and this thread's own pause it is less than a lease."""
EVERY = 1 / 8
"""Of a lease: how often this thread looks."""
BLOCKED_MOST = 1800.0
"""Seconds after which a loop that stands still is taken for dead, as RECALL_RUN_TIMEOUT has it."""

Held = Callable[[], Collection[tuple[str, UUID]]]


class LoopWatchdog:
    """`held()` returns what the process holds; it is called in another thread. `renew` renews that,
    and blocks meanwhile. `lease`: seconds."""

    def __init__(
        self,
        lease: float,
        held: Held,
        renew: Callable[[Collection[tuple[str, UUID]]], None],
        logger: logging.Logger,
    ) -> None:
        self._lease, self._held, self._renew, self._logger = lease, held, renew, logger
        self._turned_at = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, name="recall-worker-endpoint-watchdog", daemon=True
        )

        self._turning: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Watch the running event loop."""
        self._turned_at = time.monotonic()
        self._turning = asyncio.create_task(self._turn())
        self._thread.start()

    async def stop(self) -> None:
        self._stopped.set()
        if self._turning is not None:
            self._turning.cancel()
            await asyncio.gather(self._turning, return_exceptions=True)

    async def _turn(self) -> None:
        while True:
            self._turned_at = time.monotonic()
            await asyncio.sleep(self._lease * EVERY)

    def _watch(self) -> None:
        renewed_at, said_for = 0.0, 0.0
        while not self._stopped.wait(self._lease * EVERY):
            now, turned_at = time.monotonic(), self._turned_at
            still = now - turned_at
            if not self._lease * PATIENCE < still < BLOCKED_MOST:
                continue
            if now - renewed_at < self._lease / 3 or not (held := self._held()):
                continue
            if said_for != turned_at:
                said_for = turned_at
                self._logger.warning(
                    "the event loop has been blocked for %.1f s: run blocking code by "
                    "asyncio.to_thread; leases are renewed meanwhile",
                    still,
                )
            try:
                self._renew(held)
                renewed_at = now
            except StoreUnavailable as error:
                self._logger.warning("leases could not be renewed: %s", error)
