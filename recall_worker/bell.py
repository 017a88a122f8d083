"""The bell: one dedicated LISTEN connection that wakes the worker.

A notification says only "look": the payload is empty and the row is the truth. The worker must also look once after every
(re)connection, as whatever rang meanwhile was not heard; the bell rings itself for that.

The connection is the bell's alone: psycopg's `notifies()` holds its lock. A half-open peer raises nothing, so the bell asks it
a question with a deadline. It reconnects for ever, with jitter.

Never here: what a ring means.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import psycopg

from .events import Events
from .ledger import CONNECT_DEADLINE, connection_info, said

CHANNEL = "session_recalls"
PROBE_EVERY = 30.0
PROBE_DEADLINE = 5.0
RECONNECT_MOST = 5.0


class Bell:
    """Calls `ring()` at each notification and after each connection, until cancelled."""

    def __init__(self, dsn: str, worker: str, ring: Callable[[], None], events: Events) -> None:
        self._info = connection_info(dsn, f"recall-worker bell {worker}")
        self._ring = ring
        self._events = events
        self.listening = False

    async def run(self) -> None:
        """Listen for ever. Returns only by cancellation."""
        failures = 0
        while True:
            try:
                await self._listen()
            except (psycopg.Error, OSError, TimeoutError) as error:
                if self.listening or failures == 0:
                    reason = "no answer to the probe" if isinstance(error, TimeoutError) else said(error)
                    self._events.tell("bell.lost", reason=reason)
                failures = 1 if self.listening else failures + 1
                self.listening = False
            await asyncio.sleep(random.uniform(0.05, min(RECONNECT_MOST, 0.2 * 2 ** min(failures, 6))))

    async def _listen(self) -> None:
        async with asyncio.timeout(CONNECT_DEADLINE):
            conn = await psycopg.AsyncConnection.connect(**self._info)
        try:
            async with asyncio.timeout(PROBE_DEADLINE):
                await conn.execute(f"listen {CHANNEL}".encode())
            self.listening = True
            self._events.tell("bell.listening", channel=CHANNEL)
            self._ring()
            while True:
                async for _ in conn.notifies(timeout=PROBE_EVERY):
                    self._ring()
                async with asyncio.timeout(PROBE_DEADLINE):
                    await conn.execute(b"select 1")
        finally:
            # Never close(): it could wait for a peer that is gone.
            conn.pgconn.finish()
