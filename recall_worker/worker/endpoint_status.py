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

from ..database.connection import DatabaseUnavailable, StatementRejected
from ..database.ledger import Ledger
from ..events import Events
from ..protocols import Call
from ..recall import Outcome
from .breaker import Breaker

ASK_AGAIN = 1.0
"""Seconds until we ask PostgreSQL again for the fleet's probe, where it did not say when."""


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

    async def allowance(self, free_slots: int) -> tuple[int, float | None]:
        """How many rows may be claimed now, at most `free_slots`; and seconds until that may change
        by itself (None: it does not)."""
        self._changed(
            self._breaker.be_patient(time.monotonic()), "the probe was taken and is being run"
        )
        allowed, changes_in = self._breaker.allowance(time.monotonic())
        if allowed is None:
            return free_slots, None
        if free_slots <= 0:
            # The end of a run wakes the dispatcher; a running probe closes the breaker by its
            # silence.
            return 0, changes_in if allowed == 0 else None
        try:
            return await self._shared(min(allowed, free_slots), changes_in, free_slots)
        except (DatabaseUnavailable, StatementRejected):
            return 0, ASK_AGAIN

    async def _shared(
        self, allowed: int, changes_in: float, free_slots: int
    ) -> tuple[int, float | None]:
        """The allowance after asking whether the endpoint answers other replicas, and whether the
        next probe is ours."""
        now = time.monotonic()
        probe = await self._ledger.probe(
            self._endpoint, self._breaker.open_for(now), wanted=allowed > 0
        )
        if probe.answered:
            self._changed(self._breaker.close(), "another worker found the endpoint answering")
            return free_slots, None
        if allowed > 0 and not probe.mine:
            wait = probe.next_in or ASK_AGAIN
            self._breaker.postpone(now + wait)
            return 0, wait
        return allowed, changes_in

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
