"""A run: one claimed occurrence in a slot, from the claim until it is settled; and all that this
worker has in hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from uuid import UUID

from ..protocols import Call
from ..recall import FINAL, Claim

ENDED = (*FINAL, "deleted")
"""What the application can make of a recall during its run."""
LET_GO = (*ENDED, "lost")
"""Why a run is broken off that is no longer this worker's to finish."""
RENEW_AT = 1 / 3
"""Part of a lease after which it is renewed: two more tries fit in before it ends."""
MARGIN = 1 / 12
"""Part of a lease that is kept clear before its end: calls are broken off by then, and no pause
that a lease depends on is longer."""


@dataclass(slots=True, eq=False)
class Run:
    call: Call
    held_until: float
    """Monotonic instant up to which its lease is ours for certain: counted from when the claim or
    the last renewal was sent."""
    ours_until: float
    """Monotonic instant up to which nobody else runs it: the end of its lease, or later where
    nobody could take it."""
    reference: str | None = None
    """The API's name for the run that it accepted, recorded yet or not."""
    delivered_at: float | None = None
    """Monotonic instant at which the API accepted it."""
    task: asyncio.Task[None] | None = field(default=None)
    holds_slot: bool = True
    aborted: str | None = None
    """Why we broke the call off, if we did."""

    @property
    def claim(self) -> Claim:
        return self.call.claim

    @property
    def goes_on(self) -> bool:
        return self.task is not None and not self.task.done() and self.aborted is None

    @property
    def is_unproven(self) -> bool:
        """Whether it was taken up from a worker that died, and has not been sent, accepted or ended
        yet: until then it may be what killed that worker."""
        return (
            self.claim.taken_from is not None
            and self.reference is None
            and self.call.sent_at is None
            and self.task is not None
            and not self.task.done()
        )

    def abort(self, reason: str) -> bool:
        """Break the call off; a run that has ended stays as it ended. Returns whether there was
        anything to break off."""
        if self.task is None or not self.goes_on:
            return False
        self.aborted = reason
        self.task.cancel()
        return True


class Runs:
    """All runs in hand, and the slots that they hold.

    A run that was answered leaves its slot before it is settled, so that the next one is claimed
    meanwhile. While PostgreSQL accepts no settles, at most as many such runs gather as there are
    slots. A run that ends otherwise keeps its slot, so that failures do not speed the worker up.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.slots_in_use = 0
        self.idle = asyncio.Event()
        """Set while no run is in hand."""
        self.idle.set()
        self._runs: dict[UUID, Run] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(list(self._runs.values()))

    def __contains__(self, run: Run) -> bool:
        return run.claim.lease in self._runs

    @property
    def free_slots(self) -> int:
        return min(self.slots - self.slots_in_use, 2 * self.slots - len(self._runs))

    @property
    def any_unproven(self) -> bool:
        """Whether a run that was taken up from a dead worker has not proven safe yet."""
        return any(
            run.is_unproven for run in self._runs.values() if run.claim.taken_from is not None
        )

    def by_id(self) -> dict[str, Run]:
        """The runs by their recalls' ids."""
        return {run.claim.id: run for run in self._runs.values()}

    def in_doubt(self, lease: float) -> list[str]:
        """Ids of recalls in hand whose leases may have ended: their renewal was refused, or is
        late. `lease`: seconds."""
        soon = time.monotonic() + lease * RENEW_AT
        return [run.claim.id for run in self._runs.values() if run.held_until < soon]

    def add(self, run: Run) -> None:
        self._runs[run.claim.lease] = run
        self.slots_in_use += 1
        self.idle.clear()

    def leave_slot(self, run: Run) -> None:
        self.slots_in_use -= run.holds_slot
        run.holds_slot = False

    def remove(self, run: Run) -> None:
        """The run is settled, whatever the answer."""
        self.leave_slot(run)
        self._runs.pop(run.claim.lease, None)
        if not self._runs:
            self.idle.set()
