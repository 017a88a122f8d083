"""Whether the endpoint answers, as far as this worker knows: its breaker, and what replicas share.

Owns the breaker, and is the one place that reports its changes: to the log, to recall_workers (by a
heartbeat), to the dispatcher, and, where this worker got an answer, to the other replicas.

The database decides which replica makes the next probe, and knows whether any replica got an
answer. Never here: what an outcome means for a row.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..database.connection import ClaimsHeld, DatabaseUnavailable, StatementRejected
from ..database.ledger import Ledger
from ..events import Events
from ..protocols import Call
from ..recall import Outcome
from .breaker import Breaker

ASK_AGAIN = 1.0
"""Seconds until we ask PostgreSQL again for the fleet's probe, where it did not say when."""


PROBE_AGAIN_LEAST = 0.05
"""Seconds until the next look, at least."""


@dataclass(frozen=True, slots=True)
class Allowance:
    slots: int
    """How many rows may be claimed now."""
    changes_in: float | None = None
    """Seconds until that may change by itself; None: it does not."""
    probe: str | None = None
    """The row that is to be claimed, and no other: while the breaker is open."""


class EndpointStatus:
    def __init__(
        self, ledger: Ledger, endpoint: str, events: Events, on_change: Callable[[], None]
    ) -> None:
        """`endpoint`: the endpoint's key, the same in all replicas that call it. `on_change()` is
        called when the breaker opened or closed."""
        self._ledger = ledger
        self._endpoint = endpoint
        self._events = events
        self._on_change = on_change
        self._breaker = Breaker()
        self._telling: asyncio.Task[None] | None = None

    @property
    def state(self) -> str:
        """open or closed."""
        return self._breaker.state

    @property
    def is_open(self) -> bool:
        return self._breaker.is_open

    async def allowance(self, free_slots: int) -> Allowance:
        """How much may be claimed now, in at most `free_slots`. Raises ClaimsHeld."""
        now = time.monotonic()
        allowed, changes_in = self._breaker.allowance(now)
        if allowed is None:
            return Allowance(free_slots)
        if free_slots <= 0:
            # The end of a run wakes the dispatcher; silence of the probe lets the next one go.
            return Allowance(0, changes_in if allowed == 0 else None)
        try:
            return await self._shared(allowed > 0, changes_in, free_slots)
        except ClaimsHeld:
            raise
        except (DatabaseUnavailable, StatementRejected):
            return Allowance(0, ASK_AGAIN)

    async def _shared(self, may_probe: bool, changes_in: float, free_slots: int) -> Allowance:
        """The allowance after asking whether the endpoint answers other replicas, which row is the
        next probe, and whether it is ours."""
        now = time.monotonic()
        fresh = not may_probe and self._breaker.may_try_fresh(now)
        probe = await self._ledger.probe(
            self._endpoint,
            self._breaker.open_for(now),
            wanted=may_probe or fresh,
            fresh=fresh,
            pause_most=self._breaker.fresh_pause(now) if fresh else self._breaker.pause_most,
        )
        if probe.answered:
            self._changed(self._breaker.close(), "another worker found the endpoint answering")
            return Allowance(free_slots)
        if probe.id is not None:
            return Allowance(1, changes_in, probe.id)
        if fresh:
            self._breaker.no_fresh(now, probe.next_in)
        if may_probe and probe.next_in is not None:
            self._breaker.postpone(now + max(PROBE_AGAIN_LEAST, probe.next_in))
            changes_in = max(PROBE_AGAIN_LEAST, probe.next_in)
        elif may_probe:
            # Nothing is due that could be a probe: what falls due next is asked for.
            return Allowance(1)
        return Allowance(0, min(changes_in, max(PROBE_AGAIN_LEAST, self._breaker.fresh_in(now))))

    def others_answered(self, session: str) -> bool:
        """Whether the application answers other sessions meanwhile."""
        return self._breaker.others_answered(session, time.monotonic())

    def probing(self, call: Call) -> None:
        """This call is the probe that was allowed."""
        self._breaker.probing(call)

    def note(self, call: Call, outcome: Outcome) -> None:
        """Note how a call ended, or that the API has accepted its run."""
        event = self._breaker.note(call, outcome, time.monotonic())
        self._changed(event, getattr(outcome, "reason", None), session=call.claim.session_id)
        if event == "breaker.closed":
            self._telling = asyncio.create_task(self._tell_others())

    def _changed(self, event: str | None, reason: str | None, **facts: str) -> None:
        """Report a change of the breaker."""
        if event is None:
            return
        self._events.tell(event, **facts, **({"reason": reason} if reason else {}))
        self._on_change()

    async def _tell_others(self) -> None:
        try:
            await self._ledger.endpoint_answers(self._endpoint)
        except (DatabaseUnavailable, StatementRejected):
            pass  # The others learn it from their own probes.
