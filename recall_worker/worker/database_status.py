"""Whether PostgreSQL answers. Every loop reports here, so that an outage is logged once when it
begins and once when it ends.

After an outage, however long, living owners come first: for GRACE_AFTER_OUTAGE nobody takes the
leases of others that have ended, so that workers that still run them can settle and renew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ..database.ledger import GRACE_AFTER_OUTAGE
from ..events import Events


class DatabaseStatus:
    def __init__(self, events: Events, lease: float) -> None:
        self._events = events
        self._lease = lease
        self._lost_at: float | None = None
        self._found_at = 0.0
        self._grace_until = 0.0
        self._on_return: list[Callable[[], None]] = []

    @property
    def is_lost(self) -> bool:
        return self._lost_at is not None

    @property
    def may_take_expired(self) -> bool:
        return self._lost_at is None and time.monotonic() >= self._grace_until

    @property
    def may_take_expired_in(self) -> float:
        """Seconds until it may, while PostgreSQL answers; 0 where it may."""
        return max(0.0, self._grace_until - time.monotonic())

    def on_return(self, act: Callable[[], None]) -> None:
        """Have `act()` called when PostgreSQL answers again."""
        self._on_return.append(act)

    def woke(self, late: float) -> None:
        """The process slept `late` seconds longer than it meant to: it may have been stopped while
        its leases ended."""
        if late > self._lease * GRACE_AFTER_OUTAGE:
            self._return()

    def lost(self, reason: str, asked_at: float = math.inf) -> None:
        """`asked_at`: monotonic instant of the unanswered query. One from before PostgreSQL
        answered again is no news."""
        if self._lost_at is None and asked_at >= self._found_at:
            self._lost_at = time.monotonic()
            self._events.tell("database.lost", reason=reason)

    def found(self) -> None:
        if self._lost_at is not None:
            self._found_at = time.monotonic()
            seconds = self._found_at - self._lost_at
            self._lost_at = None
            self._events.tell("database.found", after_s=round(seconds, 3))
            self._return()

    def _return(self) -> None:
        self._grace_until = time.monotonic() + self._lease * GRACE_AFTER_OUTAGE
        for act in self._on_return:
            act()
