"""When to dispatch next, and why. Pure state: instants are monotonic seconds that the caller passes
in.

A dispatch asks PostgreSQL once for what is due. It happens at a due instant, when a notification or
the end of a run may have changed the answer, after a pause (an outage, an open breaker), and at the
latest after the poll interval.

Every wait goes through `_arm`, which keeps one rule: a dispatch that follows at once needs a
reason, and a reason is something that has changed since the last dispatch began: a notification,
the end of a run, recalls that were claimed, PostgreSQL or the endpoint answering again. Where
nothing has changed, the next dispatch is FLOOR_FIRST seconds away, then twice that, up to
FLOOR_MOST, whatever the last one found. So no state of the table, of the breaker or of a clock
makes a worker spin.

Never here: a clock, a timer, a query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FLOOR_FIRST, FLOOR_MOST = 0.05, 1.0
"""Seconds between two dispatches where nothing has changed: doubling from the first to the most."""
UNPROVOKED_MOST = 20
"""Dispatches that may come before the floor within FLOOR_MOST seconds because a row has fallen due,
or falls due in a moment: a timer may be early by a fraction of a millisecond, another replica may
have been faster, and rows fall due while PostgreSQL answers."""
SHORTEST = 0.0005
"""Seconds until a due instant, at least: PostgreSQL read its clock a little after we asked."""
EAGER_REPLICAS = 2
"""Replicas that dispatch at once at a notification or a due instant. In a fleet one claim finds the
row, and all other claims find nothing."""
WAKE_STAGGER, WAKE_STAGGER_MOST = 0.01, 0.25
"""Seconds by which each further replica dispatches later than the one before it, in case those have
died, or are full."""


@dataclass(frozen=True, slots=True)
class DispatchResult:
    """What one dispatch found. Without arguments: nothing is due, and nothing is known of later
    rows."""

    claimed: int = 0
    """Recalls that were taken."""
    full: bool = False
    """It took as many as it was allowed to: more may be due."""
    has_room: bool = False
    """Where `full`: whether a slot is free all the same."""
    waiting: bool = False
    """Something is due and was not taken: it is locked, waits for a run of its session, or is under
    a lease that has ended."""
    fell_due: bool = False
    """Some of that fell due only after the claim was sent."""
    ended: bool = False
    """Leases have ended that may be taken up, and this dispatch did not try yet."""
    due_at: float | None = None
    """Monotonic instant at which the next row is due."""
    unfinished: bool = False
    """PostgreSQL refused a part of what is due, or moved cron rows wait for their ticks: try again
    soon."""
    blocked: bool = False
    """It could not ask, or not for all that is due: no slot is free, the breaker is open, or
    PostgreSQL does not answer."""
    again_in: float | None = None
    """Seconds until something outside of the table may have changed: an outage, a probe, the end of
    the grace after an outage."""


class Wake:
    """Call `begin` when `seconds` are over, and `dispatched` with what the dispatch found; report
    at any time what happened meanwhile."""

    def __init__(self, poll: float, now: float) -> None:
        """`poll`: seconds between polls when no notification arrives."""
        self._poll = poll
        self._look_at = now
        self._claims = True
        """Whether the next dispatch claims. Else it first asks whether anything is due, which is
        cheap."""
        self._claims_at = math.inf
        """The due instant from which it claims in any case."""
        self._called = False
        """Whether another dispatch was requested during the current one."""
        self._later: float | None = None
        """When to dispatch after a notification for which other replicas come first."""
        self._changed = True
        """Whether anything has changed since the last dispatch began."""
        self._run_ended = False
        self._waits = True
        """Whether something may wait for a run of ours to end, as of the last dispatch and the
        notifications since."""
        self._looking = False
        self._floor = FLOOR_FIRST
        self._unprovoked, self._unprovoked_since = 0, now
        self._at_once = False
        """Whether the last dispatch came at once although nothing had changed: allowed once."""
        self.replicas_ahead = 0
        """How many other replicas are ready before this one."""

    @property
    def is_called(self) -> bool:
        """Whether another dispatch was requested since this one began."""
        return self._called

    @property
    def wake_delay(self) -> float:
        """Seconds for which other replicas come first."""
        return min(
            WAKE_STAGGER_MOST, WAKE_STAGGER * max(0, self.replicas_ahead - EAGER_REPLICAS + 1)
        )

    def seconds(self, now: float) -> float:
        """Seconds until the next dispatch; 0 where it is time."""
        return max(0.0, self._look_at - now)

    # --- what happened ----------------------------------------------------------------------------

    def notified(self, now: float) -> None:
        """A notification came: the table may hold something new."""
        self._floor = FLOOR_FIRST
        self._waits = True
        if self.wake_delay == 0:
            self._call(now, claims=True)
        elif self._later is None:
            self._changed = True
            self._later = now + self.wake_delay
            self._look_at = min(self._look_at, self._later)

    def run_ended(self, now: float, *, is_over: bool, awaited: bool = False) -> None:
        """A run was settled. `is_over`: its recall will not be due again. `awaited`: something
        waits for the slot."""
        self._changed = self._run_ended = True
        if self._waits or awaited:
            self._call(now, claims=True)
        elif not is_over:
            # Its recall is due again at some time.
            self._call(now, claims=False)

    def changed(self, now: float) -> None:
        """PostgreSQL answers again, the breaker opened or closed, or a slot is free: dispatch
        again."""
        self._call(now, claims=True)

    def _call(self, now: float, *, claims: bool) -> None:
        self._changed = True
        self._claims |= claims
        self._called |= self._looking
        self._look_at = min(self._look_at, now)

    # --- dispatches -------------------------------------------------------------------------------

    def begin(self, now: float) -> bool:
        """A dispatch begins. Returns whether it claims; else it first asks whether anything is
        due."""
        claims, self._claims = self._claims or now >= self._claims_at, False
        self._claims_at = math.inf
        if self._later is not None and self._later <= now:
            self._later = None
        self._looking, self._called = True, False
        self._changed = self._run_ended = False
        self._waits = True
        return claims

    def asks_next_due(self) -> None:
        """The dispatch asks what is due next: a run that ends from now on needs no dispatch of its
        own, as the answer shows whether anything can have waited for it."""
        self._waits = False

    def dispatched(self, found: DispatchResult, now: float) -> None:
        """The dispatch that began last has ended, and found this."""
        self._looking = False
        self._waits = found.waiting or found.full or found.blocked
        if found.claimed:
            self._changed, self._floor = True, FLOOR_FIRST
        if self._called:
            self._arm(now, now)
            return
        at, reason = now + self._poll, self._changed
        if found.full:
            self._claims = True
            at = now if found.has_room else at
        elif found.fell_due or found.ended or (found.waiting and self._run_ended):
            self._claims = reason = True
            at = now
        elif found.waiting or found.unfinished:
            # What blocks it may go away without a notification.
            self._claims = True
            at = min(at, now + self._next_floor())
        if found.due_at is not None and found.due_at + self.wake_delay < at:
            at = min(at, max(now + SHORTEST, found.due_at + self.wake_delay))
            self._claims_at = at if self.wake_delay == 0 else math.inf
            reason = True
        if found.again_in is not None:
            self._claims = True
            at = min(at, now + found.again_in)
        self._arm(at, now, reason=reason)

    def _arm(self, at: float, now: float, *, reason: bool = False) -> None:
        """Set the next dispatch to `at`, or later where nothing has changed. Every wait passes
        here.

        `reason`: a row fell due meanwhile, or does in a moment. PostgreSQL's clock says so, and it
        may stand still: so this counts only a few times a second, and never twice in a row for a
        dispatch at once.
        """
        before, self._at_once = self._at_once, False
        if not self._changed and at < now + FLOOR_FIRST:
            if now >= self._unprovoked_since + FLOOR_MOST:
                self._unprovoked, self._unprovoked_since = 0, now
            self._unprovoked += 1
            self._at_once = at <= now
            if not reason or (before and self._at_once) or self._unprovoked > UNPROVOKED_MOST:
                at = now + self._next_floor()
        elif at > now + FLOOR_MOST:
            self._floor = FLOOR_FIRST
        if self._later is not None:
            at = min(at, max(self._later, now))
        self._look_at = at

    def _next_floor(self) -> float:
        self._floor, floor = min(FLOOR_MOST, self._floor * 2), self._floor
        return floor
