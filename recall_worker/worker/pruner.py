"""Deletes what has been over for long enough (RECALL_PRUNE), a little at a time, without blocking
others.

One replica of all prunes at a time, and then none for a while: PART of the shortest retention, a
day at most. `recall_chores` records whose turn it is, so a restart neither forgets nor repeats it,
and it works through a transaction pooler. A batch is one statement, on a connection that is open
only for pruning; it skips locked rows, and a pause of PAUSE times its duration follows. Nothing is
deleted while PostgreSQL is lost or the worker drains: the next walk deletes what is left.

The database decides whose turn it is, and what may be deleted. Never here: what a batch is (sweep).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from typing import Any

from ..database.connection import ClaimsHeld, DatabaseUnavailable, StatementRejected
from ..database.ledger import TURN, Ledger
from ..events import Events
from ..sweep import Sweep
from .database_status import DatabaseStatus

PART, LONGEST = 1 / 24, 86_400.0
"""The pause between two turns: this part of the shortest retention, and so many seconds at most."""
START_WITHIN = 60.0
"""Seconds over which replicas that start together spread their first query."""
ASK_AGAIN, ASK_AGAIN_LEAST = 3600.0, 0.05
"""Seconds, at most and at least, until a replica whose turn it is not asks again: another may have
another retention."""
OPEN_FOR = 30.0
"""Seconds until the next turn from which on the connection is closed meanwhile."""
PAUSE, PAUSE_LEAST = 4, 0.02
"""The pause after a batch: so many times its duration, and so many seconds at least."""
TURN_RENEWED_AT = 1 / 4
"""Part of TURN after which a replica that prunes renews its turn."""
LOCKED_PAUSE = 1.0
"""Seconds until the next try while the whole table is locked."""
LOCKED = "55P03"
REFERRED_TO = ("23503", "23001")
"""A row of another table refers to a recall."""


class Pruner:
    def __init__(
        self,
        ledger: Ledger,
        keep: Mapping[str, float],
        database: DatabaseStatus,
        events: Events,
        stopped: asyncio.Event,
    ) -> None:
        """`keep`: seconds, by what is kept. `stopped`: set when the worker begins to drain."""
        self._ledger = ledger
        self._keep = keep
        self._database = database
        self._events = events
        self._stopped = stopped
        self._every = min(LONGEST, max(1.0, min(keep.values()) * PART))

    async def run(self) -> None:
        """Prune whenever it is time. Returns when the worker stops."""
        wait = random.uniform(0, min(self._every, START_WITHIN))
        while not await self._is_stopped_within(wait):
            wait = await self._prune_if_due() * random.uniform(1.0, 1.1)
            if wait >= OPEN_FOR:
                await self._ledger.stop_pruning()
        await self._ledger.stop_pruning()

    async def _prune_if_due(self) -> float:
        """Prune if it is our turn. Returns seconds until the next try."""
        if self._database.is_lost:
            return min(self._every, TURN)
        try:
            next_in = await self._ledger.take_turn(self._every)
            if next_in is None:
                next_in = self._every if await self._sweep() else min(self._every, TURN)
            return min(max(next_in, ASK_AGAIN_LEAST), ASK_AGAIN)
        except (DatabaseUnavailable, ClaimsHeld):
            # The loops that need PostgreSQL for more than this report it. Of a copy nothing is
            # deleted, as nothing is claimed.
            return min(self._every, TURN)
        except StatementRejected as refusal:
            if refusal.sqlstate != LOCKED:
                self._events.tell("worker.error", doing="prune", reason=refusal.reason)
            return max(self._every, TURN)

    async def _sweep(self) -> bool:
        """Walk through the tables. Returns whether the end was reached. Raises
        DatabaseUnavailable, StatementRejected."""
        sweep = Sweep(self._keep)
        began = asked = time.monotonic()
        whole = False
        try:
            while (batch := sweep.next()) is not None:
                if self._stopped.is_set() or self._database.is_lost:
                    break
                if time.monotonic() - asked > TURN * TURN_RENEWED_AT:
                    asked = time.monotonic()
                    if await self._ledger.take_turn(self._every) is not None:
                        break
                at = time.monotonic()
                try:
                    row = await self._ledger.prune(batch)
                except StatementRejected as refusal:
                    if refusal.sqlstate in REFERRED_TO:
                        sweep.refused(batch)
                        continue
                    if refusal.sqlstate != LOCKED:
                        raise
                    # The whole table is locked, as DDL does.
                    await self._is_stopped_within(LOCKED_PAUSE)
                    continue
                took = time.monotonic() - at
                sweep.note(batch, row, took)
                await self._is_stopped_within(max(PAUSE_LEAST, PAUSE * took))
            else:
                whole = True
        finally:
            facts: dict[str, Any] = {
                **sweep.deleted,
                "took_s": round(time.monotonic() - began, 3),
                "whole": whole,
            }
            self._events.tell("rows.pruned", **facts)
        await self._ledger.end_turn(self._every if whole else 0.0)
        return whole

    async def _is_stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._stopped.wait()
        except TimeoutError:
            return False
