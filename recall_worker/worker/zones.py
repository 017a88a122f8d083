"""Plans waiting cron recalls anew when this worker has newer time zone data than the one that
planned them: a government has changed its clocks, and somebody has upgraded the package tzdata.

What the database decides: which rows those are, by the version that stands in each. A worker with
older data finds none of them, and so never plans back. Rows in a run are left to their settles,
which plan by the settling worker's data.

Never here: when a tick falls (cadence).
"""

from __future__ import annotations

import asyncio

from .. import cadence
from ..database.connection import DatabaseUnavailable, StatementRejected
from ..database.ledger import Ledger, Stale
from ..events import Events
from ..recall import At

EVERY = 60.0
"""Seconds between two looks: others may plan by older data while replicas are upgraded."""


class ZoneUpdater:
    def __init__(self, ledger: Ledger, events: Events) -> None:
        self._ledger = ledger
        self._events = events

    async def run(self) -> None:
        """Plan anew what was planned by older data. Returns only by cancellation."""
        while True:
            try:
                await self.update()
            except (DatabaseUnavailable, StatementRejected):
                pass
            await asyncio.sleep(EVERY)

    async def update(self) -> None:
        """One pass. Rows that could not be written are left to the next one. Raises
        DatabaseUnavailable, StatementRejected."""
        left: set[str] = set()
        while stale := await self._ledger.stale(left):
            moments = []
            for row in stale:
                if row.time_zone.lower() in cadence.zones():
                    at = _moment(row)
                    moments.append((row, at, at is not None and at.when != row.nominal))
                # Calls come first.
                await asyncio.sleep(0)
            written = await self._ledger.replan(moments) if moments else set()
            for row, at, moved in moments:
                if moved and at is not None and row.id in written:
                    self._events.tell(
                        "recall.replanned",
                        recall=row.id,
                        time_zone=row.time_zone,
                        tzdata=cadence.TZDATA,
                        planned_before=row.nominal.isoformat(),
                        planned_for=at.when.isoformat(),
                    )
            left |= {row.id for row in stale} - written


def _moment(row: Stale) -> At | None:
    """Its moment and distance by our data; None where both stand, as it waits for no tick. A rule
    that makes no sense ends the recall when it is claimed."""
    if not row.waits:
        return None
    try:
        return cadence.replanned(row.cron or "", row.time_zone, row.nominal)
    except (cadence.CadenceError, OverflowError):
        return None
