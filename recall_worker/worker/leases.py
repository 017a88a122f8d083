"""Keeps the leases of the runs in hand, and lets go of those that are no longer ours.

All leases are renewed at once at a third of their length; also those of runs that have ended and wait to be settled. When the bell
rings, a look tells whether somebody ended a recall that is being run: its call is aborted at once.

A worker that is cut off breaks its calls off a twelfth of a lease before their leases end, so that its successor's run does not meet
its own. By the monotonic clock, counted from when the last renewal that went well was asked for: PostgreSQL's lease ends later. Not where
PostgreSQL takes nobody, as while it is restarted: then nobody takes leases either, nor for a third of a lease after it. Nor where a lock
of the application is all that stands in the way.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping

from ..database.connection import DatabaseUnavailable, StatementRejected
from ..database.ledger import Ledger
from .database_status import DatabaseStatus
from .run import Run

CHUNK = 2000
LOCKED_PAUSE = 1.0
OUTAGE_PAUSE = (0.1, 0.5)
UNRENEWED = "its lease could not be renewed"
CHECK_PAUSE = 0.1
"""Seconds between two looks at least; a look that takes long is waited for twenty times as long."""


class LeaseRenewer:
    def __init__(
        self,
        ledger: Ledger,
        lease: float,
        database: DatabaseStatus,
        held: Callable[[], Mapping[str, Run]],
        let_go: Callable[[Run, str], None],
    ) -> None:
        """`held()`: the runs in hand by their recalls' ids. `let_go(run, state)` is told of each that is no longer ours."""
        self._ledger = ledger
        self._lease = lease
        self._database = database
        self._held = held
        self._let_go = let_go
        self._renew_now = asyncio.Event()
        self._notified = asyncio.Event()
        database.on_return(self._renew_now.set)

    def notified(self) -> None:
        """The bell rang: somebody may have ended what is being run."""
        self._notified.set()

    async def renew(self) -> None:
        """Renew for ever. Returns only by cancellation."""
        pause = self._lease / 3
        while True:
            try:
                async with asyncio.timeout(pause):
                    await self._renew_now.wait()
            except TimeoutError:
                pass
            self._renew_now.clear()
            pause = self._lease / 3
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
                    if "locked" in states.values():
                        pause = min(LOCKED_PAUSE, pause / 4)
                    for id, state in states.items():
                        if state == "renewed":
                            runs[id].held_until = runs[id].ours_until = asked_at + self._lease
                        elif state == "locked":
                            self._is_left(runs[id], asked_at)
                    self._part(chunk, states)
            except DatabaseUnavailable as outage:
                self._database.lost(outage.reason, outage.asked_at)
                if outage.for_all:
                    for run in runs.values():
                        self._is_left(run, outage.asked_at)
                pause = min(self._lease / 12, random.uniform(*OUTAGE_PAUSE))
            except StatementRejected as refusal:
                self._database.lost(refusal.reason)
                pause = min(self._lease / 12, 1.0)

    def _is_left(self, run: Run, since: float) -> None:
        """What nobody could take just now is left to us for a third of a lease from then: see `claim`."""
        run.ours_until = max(run.ours_until, since + self._lease / 3)

    async def let_go_in_time(self) -> None:
        """Break off the calls whose leases are about to end. Returns only by cancellation."""
        margin = self._lease / 12
        while True:
            going = [run for run in self._held().values() if run.goes_on]
            began = time.monotonic()
            wait = min([self._lease / 4, *(run.ours_until - margin - began for run in going)])
            if wait > 0:
                await asyncio.sleep(wait)
                continue
            for run in going:
                if run.ours_until < began:
                    # Past the end, and not broken off before: this process stood still. PostgreSQL knows whether the lease is gone, and is
                    # asked before a run is broken off that is still ours.
                    self._renew_now.set()
                    run.ours_until = began + self._lease / 4
                elif run.ours_until - margin <= began:
                    self._let_go(run, UNRENEWED)

    async def check_leases(self) -> None:
        """Look at each ring whether the runs in hand are still ours. Returns only by cancellation."""
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
                continue  # The renewal says so, and looks itself.
            await asyncio.sleep(max(CHECK_PAUSE, 20 * (time.monotonic() - began)))

    def _part(self, runs: Mapping[str, Run], states: Mapping[str, str]) -> None:
        for id, state in states.items():
            if state not in ("renewed", "locked"):
                self._let_go(runs[id], state)
