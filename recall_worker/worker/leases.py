"""Renews the leases of the runs in hand, and breaks off runs that are no longer ours.

All leases are renewed together (RENEW_AT), including those of runs that have ended and wait to be
settled. A notification starts a check whether the application ended a recall during its run: its
call is aborted at once.

A worker that is cut off from PostgreSQL breaks its calls off before their leases end (MARGIN), so
that its run and the next worker's never overlap. This uses the monotonic clock, counted from the
moment when the last successful renewal was sent: PostgreSQL's lease ends later. It does not break
calls off while PostgreSQL refuses everyone, as during a restart: then nobody can take leases
either, nor for GRACE_AFTER_OUTAGE afterwards. Nor where only a lock of the application prevents the
renewal, of the row or of the whole table: nobody else gets past it either. A row that stays locked
is told once, and again when its lease is renewed.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from uuid import UUID

from ..database.connection import LOCK_PATIENCE, DatabaseUnavailable, StatementRejected
from ..database.ledger import GRACE_AFTER_OUTAGE, Ledger
from ..events import Events
from .database_status import DatabaseStatus
from .run import MARGIN, RENEW_AT, Run
from .schema_status import SchemaStatus

CHUNK = 2000
"""Leases that are renewed in one statement."""
PAUSE_LEAST = 1 / 24
"""Part of a lease between two renewals, at least, however long one of them takes."""
LOCKED_PAUSE = 1.0
"""Seconds, at most, until the next renewal where a row was locked."""
OUTAGE_PAUSE = (0.1, 0.5)
"""Seconds, drawn at random, until the next try while PostgreSQL does not answer."""
REFUSED_PAUSE = 1.0
"""Seconds, at most, until the next try after PostgreSQL refused to renew."""
LOCKED = "another transaction holds its row locked, so its lease can't be renewed"
UNRENEWED = "its lease could not be renewed"
CHECK_PAUSE, CHECK_SHARE = 0.1, 20
"""Seconds between two checks, at least; and at least so many times as long as the check took."""
STOOD_STILL_GRACE = 1 / 4
"""Part of a lease in which PostgreSQL is asked about it, after this process stood still."""


@dataclass(slots=True)
class _Locked:
    since: float
    """Monotonic instant of the first renewal that found it so."""
    is_told: bool = False


class LeaseRenewer:
    def __init__(
        self,
        ledger: Ledger,
        lease: float,
        database: DatabaseStatus,
        schema: SchemaStatus,
        events: Events,
        held: Callable[[], Mapping[str, Run]],
        let_go: Callable[[Run, str], None],
    ) -> None:
        """`held()`: the runs in hand by their recalls' ids. `let_go(run, state)` is called for each
        that is no longer ours."""
        self._ledger = ledger
        self._lease = lease
        self._database = database
        self._schema = schema
        self._events = events
        self._locked: dict[UUID, _Locked] = {}
        """Leases whose rows were locked at the last renewal."""
        self._held = held
        self._let_go = let_go
        self._renew_now = asyncio.Event()
        self._notified = asyncio.Event()
        database.on_return(self._renew_now.set)

    def notified(self) -> None:
        """A notification came: the application may have ended a recall that is being run."""
        self._notified.set()

    async def renew(self) -> None:
        """Renew for ever. Returns only by cancellation."""
        pause = self._lease * RENEW_AT
        while True:
            try:
                async with asyncio.timeout(pause):
                    await self._renew_now.wait()
            except TimeoutError:
                pass
            self._renew_now.clear()
            pause, began = self._lease * RENEW_AT, time.monotonic()
            runs = dict(self._held())
            ids = list(runs)
            try:
                for start in range(0, len(ids), CHUNK):
                    chunk = {id: runs[id] for id in ids[start : start + CHUNK]}
                    asked_at = time.monotonic()
                    states = await self._ledger.renew(
                        {id: run.claim.lease for id, run in chunk.items()},
                        {
                            id: asked_at - run.call.sent_at
                            for id, run in chunk.items()
                            if run.call.sent_at is not None
                        },
                    )
                    self._database.found()
                    self._database.unlocked()
                    if "locked" in states.values():
                        pause = min(LOCKED_PAUSE, pause / 4)
                    for id, state in states.items():
                        if state == "renewed":
                            runs[id].held_until = runs[id].ours_until = asked_at + self._lease
                        elif state == "locked":
                            self._is_left(runs[id], asked_at)
                        self._note_lock(runs[id], asked_at, locked=state == "locked")
                    self._part(chunk, states)
                self._schema.fits("renew")
                held = {run.claim.lease for run in self._held().values()}
                self._locked = {k: lock for k, lock in self._locked.items() if k in held}
                # A commit that waits for a standby takes a deadline: the next renewal is due all
                # the same.
                pause = max(PAUSE_LEAST * self._lease, pause - (time.monotonic() - began))
            except DatabaseUnavailable as outage:
                self._database.lost(outage.reason, outage.asked_at)
                if outage.for_all:
                    for run in runs.values():
                        self._is_left(run, outage.asked_at)
                pause = min(self._lease * MARGIN, random.uniform(*OUTAGE_PAUSE))
            except StatementRejected as refusal:
                pause = min(self._lease * MARGIN, REFUSED_PAUSE)
                if refusal.is_table_lock:
                    self._database.locked(refusal.reason)
                    for run in runs.values():
                        self._is_locked_out(run, pause)
                elif refusal.of_the_schema:
                    self._schema.refused("renew", refusal)
                else:
                    self._database.lost(refusal.reason)

    def _is_left(self, run: Run, since: float) -> None:
        """Nobody could take this lease at `since`, so all workers leave it to us for
        GRACE_AFTER_OUTAGE from then: see `Ledger.ended_leases`."""
        run.ours_until = max(run.ours_until, since + self._lease * GRACE_AFTER_OUTAGE)

    def _is_locked_out(self, run: Run, pause: float) -> None:
        """The whole table is locked. It stays ours until the next renewal has waited for the lock:
        either it is renewed then, or nobody got past the lock."""
        now = time.monotonic()
        self._is_left(run, now)
        again = pause + LOCK_PATIENCE + 2 * self._lease * MARGIN
        run.ours_until = max(run.ours_until, now + again)

    def _note_lock(self, run: Run, now: float, *, locked: bool) -> None:
        """Tell of a row that is locked at two renewals in a row: many locks last a moment."""
        lease, facts = run.claim.lease, {"recall": run.claim.id, "session": run.claim.session_id}
        known = self._locked.get(lease)
        if not locked:
            if known is not None:
                del self._locked[lease]
                if known.is_told:
                    self._events.tell(
                        "lease.unlocked", **facts, after_s=round(now - known.since, 3)
                    )
        elif known is None:
            self._locked[lease] = _Locked(now)
        elif not known.is_told:
            known.is_told = True
            self._events.tell("lease.locked", **facts, reason=LOCKED)

    async def let_go_in_time(self) -> None:
        """Break off the calls whose leases are about to end. Returns only by cancellation."""
        margin = self._lease * MARGIN
        while True:
            going = [run for run in self._held().values() if run.goes_on]
            began = time.monotonic()
            wait = min(
                [
                    self._lease * STOOD_STILL_GRACE,
                    *(run.ours_until - margin - began for run in going),
                ]
            )
            if wait > 0:
                await asyncio.sleep(wait)
                continue
            for run in going:
                if run.ours_until < began:
                    # Past the end, and not broken off before: this process stood still. PostgreSQL
                    # knows whether the lease is gone: ask it first, as the run may still be ours.
                    self._renew_now.set()
                    run.ours_until = began + self._lease * STOOD_STILL_GRACE
                elif run.ours_until - margin <= began:
                    self._let_go(run, UNRENEWED)

    async def check_leases(self) -> None:
        """Check at each notification whether the runs in hand are still ours. Returns only by
        cancellation."""
        while True:
            await self._notified.wait()
            self._notified.clear()
            runs = dict(self._held())
            if not runs:
                continue
            began = time.monotonic()
            try:
                self._part(
                    runs,
                    await self._ledger.check_leases(
                        {id: run.claim.lease for id, run in runs.items()}
                    ),
                )
            except (DatabaseUnavailable, StatementRejected):
                continue  # The renewal reports the outage, and checks the leases itself.
            await asyncio.sleep(max(CHECK_PAUSE, CHECK_SHARE * (time.monotonic() - began)))

    def _part(self, runs: Mapping[str, Run], states: Mapping[str, str]) -> None:
        for id, state in states.items():
            if state not in ("renewed", "locked"):
                self._let_go(runs[id], state)
