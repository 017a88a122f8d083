"""Whether PostgreSQL answers, and whether it lets us write. Every loop reports here, so that an
outage is logged once when it begins and once when it ends; the same for a lock of the whole table,
and for commits that a synchronous standby does not confirm. These two are no outages: PostgreSQL
answers.

After an outage or a lock, however long, living owners come first: for GRACE_AFTER_OUTAGE nobody
takes the leases of others that have ended, so that workers that still run them can settle and
renew. A lock keeps all workers out at the same time, so each of them knows.

Never here: what a worker does meanwhile.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ..database.ledger import GRACE_AFTER_OUTAGE
from ..events import Events

LOCKED_HINT = "doctor names the transaction that has been open for longest; docs/operations.md"
UNCONFIRMED = (
    "a synchronous standby does not confirm commits: what is claimed is put back, and not called"
)
UNCONFIRMED_HINT = "start the standby, or take it out of synchronous_standby_names"


class DatabaseStatus:
    def __init__(self, events: Events, lease: float) -> None:
        self._events = events
        self._lease = lease
        self._lost_at: float | None = None
        self._found_at = 0.0
        self._locked_at: float | None = None
        self._unconfirmed_at: float | None = None
        self._grace_until = 0.0
        self._on_return: list[Callable[[], None]] = []

    @property
    def is_lost(self) -> bool:
        return self._lost_at is not None

    @property
    def may_take_expired(self) -> bool:
        return self._lost_at is None and not self.is_locked and self._grace_is_over

    @property
    def is_locked(self) -> bool:
        """Whether the last write waited in vain for a lock of the whole table."""
        return self._locked_at is not None

    @property
    def _grace_is_over(self) -> bool:
        return time.monotonic() >= self._grace_until

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

    def locked(self, reason: str) -> None:
        """A statement that writes waited in vain for a lock of the whole table."""
        if self._locked_at is None:
            self._locked_at = time.monotonic()
            self._events.tell("table.locked", reason=reason, hint=LOCKED_HINT)

    def unlocked(self) -> None:
        """A statement that writes got its lock of the table: not one that only reads, as a lock may
        let those pass."""
        if self._locked_at is not None:
            seconds = time.monotonic() - self._locked_at
            self._locked_at = None
            self._events.tell("table.unlocked", after_s=round(seconds, 3))
            self._return()

    def committed(self, *, confirmed: bool) -> None:
        """A transaction that wrote was committed. `confirmed`: not only on this server, where it is
        to be on a standby, too."""
        if not confirmed:
            if self._unconfirmed_at is None:
                self._unconfirmed_at = time.monotonic()
                self._events.tell("commit.unconfirmed", reason=UNCONFIRMED, hint=UNCONFIRMED_HINT)
        elif self._unconfirmed_at is not None:
            seconds = time.monotonic() - self._unconfirmed_at
            self._unconfirmed_at = None
            self._events.tell("commit.confirmed", after_s=round(seconds, 3))

    def _return(self) -> None:
        self._grace_until = time.monotonic() + self._lease * GRACE_AFTER_OUTAGE
        for act in self._on_return:
            act()
