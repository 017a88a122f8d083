"""A run: one claimed occurrence in a slot, from the claim until it is settled."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ..protocols import Call
from ..recall import Claim


@dataclass(slots=True, eq=False)
class Run:
    call: Call
    held_until: float
    """Monotonic instant up to which its lease is ours for certain: counted from when the claim or the last renewal was asked for."""
    ours_until: float
    """Monotonic instant up to which nobody else runs it: with its lease, or beyond that, as long as nobody could take it."""
    task: asyncio.Task[None] | None = field(default=None)
    holds_slot: bool = True
    aborted: str | None = None
    """Why the call was broken off by us, if it was."""

    @property
    def claim(self) -> Claim:
        return self.call.claim

    @property
    def goes_on(self) -> bool:
        return self.task is not None and not self.task.done() and self.aborted is None

    def abort(self, reason: str) -> bool:
        """Break the call off; what has ended already stays as it ended. Returns whether there was anything to break off."""
        if self.task is None or not self.goes_on:
            return False
        self.aborted = reason
        self.task.cancel()
        return True
