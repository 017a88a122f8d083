"""The worker's row in recall_workers, kept fresh: for people, and so that other replicas know that
this one is ready.

A heartbeat also does what one worker does for all: it ends leases without an end, and leases of
recalls that were ended or paused during a run and whose worker then died.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from ..database.connection import DatabaseUnavailable, StatementRejected
from ..database.ledger import Ledger
from .database_status import DatabaseStatus

HEARTBEAT_MOST, HEARTBEAT_LEAST = 60.0, 5.0
"""Seconds between two heartbeats: a lease, within these bounds."""
SOON = 5.0
"""Seconds until the next one after a failed one, and after the start: replicas that start together
learn of each other a little later."""


class Heartbeat:
    def __init__(
        self,
        ledger: Ledger,
        lease: float,
        settings: Mapping[str, Any],
        facts: Callable[[], Mapping[str, Any]],
        in_hand: Callable[[], Collection[str]],
        replicas_ahead: Callable[[int], None],
        database: DatabaseStatus,
    ) -> None:
        """`facts()`: the columns of the worker's row. `in_hand()`: this worker's recalls whose
        leases may have ended. `replicas_ahead(n)` is called with the number of other replicas that
        are ready and come before this one."""
        self._ledger = ledger
        self._every = min(HEARTBEAT_MOST, max(HEARTBEAT_LEAST, lease))
        self._settings = settings
        self._facts = facts
        self._in_hand = in_hand
        self._replicas_ahead = replicas_ahead
        self._database = database
        self._now = asyncio.Event()
        self.check: Callable[[], Awaitable[None]] | None = None
        """A check before each heartbeat: whether the schema still fits this code."""

    def beat_now(self) -> None:
        """Write the row now: what people see in it has changed."""
        self._now.set()

    async def run(self) -> None:
        """Keep the row fresh. Returns only by cancellation."""
        began = time.monotonic()
        while True:
            self._now.clear()
            pause = SOON
            try:
                if self.check is not None:
                    await self.check()
                ahead = await self._ledger.heartbeat(
                    self._facts(),
                    self._settings,
                    self._in_hand(),
                    all_held=not self._database.may_take_expired,
                )
                self._database.unlocked()
                self._replicas_ahead(ahead)
                if time.monotonic() - began > SOON:
                    pause = self._every
            except DatabaseUnavailable:
                pass
            except StatementRejected as refusal:
                if refusal.is_table_lock:
                    # A worker with nothing in hand learns of a lock by this.
                    self._database.locked(refusal.reason)
            try:
                async with asyncio.timeout(pause):
                    await self._now.wait()
            except TimeoutError:
                pass
