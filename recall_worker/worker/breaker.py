"""The breaker: whether the endpoint is worth calling. Pure state; instants are monotonic seconds
that the caller passes in.

It opens when two different sessions in a row meet trouble (Misconfigured, Unavailable, or a
gateway's answer for a server that is away) with no answer in between: one session's trouble never
stops the others. Nor do sessions at whose address nothing is (404), as long as others were answered
lately: two sessions that are gone are no endpoint that is gone.

While it is open only probes are claimed: one row at a time, after 1 s doubling to 30 s. The probed
row changes by itself, as a row that failed is deferred. A row of a session that is not known as bad
may be probed sooner (`may_try_fresh`), so that bad sessions, however many, delay a good one by
seconds. A probe that was sent and has been silent for a while may be a run: it no longer holds up
the next probe. Only an answer of the application's own, to a call sent since it opened, closes it.

Each method that changes the state returns the event of that change, so that every change is logged:
`endpoint_status` does that.
"""

from __future__ import annotations

import random
from enum import IntEnum
from typing import assert_never

from ..protocols import Call
from ..recall import (
    Accepted,
    Answered,
    Busy,
    Capped,
    Expired,
    Failed,
    Gone,
    Malformed,
    Misconfigured,
    Misfired,
    Outcome,
    Refused,
    Unavailable,
    Unknown,
    Unsent,
)

PROBE_FIRST, PROBE_MOST = 1.0, 30.0
"""Seconds before a probe: doubling from the first to the most."""
PATIENCE = 5.0
"""Seconds of silence after which a probe may be a run, and no longer holds up the next one."""
FRESH_EVERY, FRESH_AT_LEAST = 5.0, 0.05
"""Seconds, at most, between two probes of sessions that are not known as bad; and at least, where
all trouble was of a kind that may be a session's own."""
FRESH_MANY = 200
"""So many of these probes without an answer double their pause."""
ALIVE = 10.0
"""Seconds after an answer during which what the application itself answers may be a session's own
trouble, whatever it is."""
ANSWERED_LATELY = 60.0
"""Seconds after an answer during which sessions at whose address nothing is say nothing of the
others."""
FRESH_BY_GATEWAY = 0.1
"""Seconds at most between these probes while a gateway answers some sessions, and the application
others: doubling from FRESH_AT_LEAST."""
MEANWHILE = 2.0
"""Seconds for which an answer says that the application is there now: one from before a restart
says nothing of it."""
PROBE_UNSENT_CHECK, PROBE_CHECK_LEAST = 1.0, 0.05
"""Seconds until the next check on a probe that is not sent yet, and at least on one that is."""


class Extent(IntEnum):
    """Whose trouble it may be."""

    SESSION = 0
    """This session's alone: nothing is at its address, or it is forbidden."""
    ANSWERED = 1
    """The application answered, so that it is there."""
    GATEWAY = 2
    """A gateway speaks for a server that is away."""
    ENDPOINT = 3
    """No connection."""


def _extent(outcome: Misconfigured | Unavailable | Unknown) -> Extent:
    if isinstance(outcome, Unknown):
        return Extent.GATEWAY
    if outcome.http_status is None:
        return Extent.ENDPOINT
    return Extent.SESSION if outcome.http_status in (403, 404, 410) else Extent.ANSWERED


class Breaker:
    def __init__(self) -> None:
        self.is_open = False
        self._trouble_in: str | None = None
        self._extent = Extent.SESSION
        """Of all trouble since the last answer."""
        self._fresh_failed = 0
        """Probes of sessions that were not known as bad, since the last answer."""
        self._answers: dict[str, float] = {}
        """The instants of the last answers to two different sessions, oldest first."""
        self._opened_at = 0.0
        self._pause = PROBE_FIRST
        self._next_probe = 0.0
        self._next_fresh = 0.0
        self._probe: Call | None = None
        self._silent: list[Call] = []
        """Probes that no longer hold up the next one."""

    @property
    def state(self) -> str:
        return "open" if self.is_open else "closed"

    def allowance(self, now: float) -> tuple[int | None, float]:
        """How many rows may be claimed now (None: no bound), and seconds until that may change."""
        if not self.is_open:
            return None, 0.0
        if (wait := self._probe_holds_for(now)) is not None:
            return 0, wait
        return (1, 0.0) if now >= self._next_probe else (0, self._next_probe - now)

    def _probe_holds_for(self, now: float) -> float | None:
        """Seconds until the probe that is out no longer holds up the next one; None where none
        does."""
        if self._probe is None:
            return None
        sent_at = self._probe.sent_at
        if sent_at is None:
            return PROBE_UNSENT_CHECK
        if now - sent_at < PATIENCE:
            return max(PROBE_CHECK_LEAST, sent_at + PATIENCE - now)
        self._silent.append(self._probe)
        self._probe = None
        return None

    def may_try_fresh(self, now: float) -> bool:
        """Whether a row of a session that is not known as bad may be probed already."""
        return self.is_open and self._probe_holds_for(now) is None and now >= self._next_fresh

    def fresh_in(self, now: float) -> float:
        """Seconds until such a row may be probed."""
        return max(0.0, self._next_fresh - now)

    def no_fresh(self, now: float, wait: float | None) -> None:
        """No such row was probed: none is due, or (`wait`, in seconds) another probe was made just
        now."""
        self._next_fresh = now + min(FRESH_EVERY, FRESH_EVERY if wait is None else wait)

    def fresh_pause(self, now: float) -> float:
        """Seconds between two probes of such rows."""
        alive = any(at >= now - ALIVE for at in self._answers.values())
        if self._extent is Extent.ENDPOINT or (self._extent is not Extent.SESSION and not alive):
            return FRESH_EVERY
        if self._extent is Extent.GATEWAY:
            # Quick at first: beside sessions that break their gateway a good one is soon found.
            doubled = FRESH_AT_LEAST * 2.0 ** min(self._fresh_failed, 10)
            return min(FRESH_BY_GATEWAY, doubled)
        return min(FRESH_EVERY, FRESH_AT_LEAST * 2.0 ** (self._fresh_failed // FRESH_MANY))

    @property
    def pause_most(self) -> float:
        """Seconds between two probes, at most."""
        return PATIENCE if self._silent else PROBE_MOST

    def others_answered(self, session: str, now: float) -> bool:
        """Whether the application answers other sessions than this one: lately, and with no trouble
        of another one since."""
        return (
            not self.is_open
            and self._trouble_in in (None, session)
            and any(at >= now - MEANWHILE for who, at in self._answers.items() if who != session)
        )

    def open_for(self, now: float) -> float:
        """Seconds since it opened."""
        return now - self._opened_at

    def close(self) -> str | None:
        """The endpoint is known to answer: breaker.closed, or None where it was not open."""
        was_open = self.is_open
        self.is_open, self._trouble_in, self._probe = False, None, None
        self._silent, self._extent, self._fresh_failed = [], Extent.SESSION, 0
        return "breaker.closed" if was_open else None

    def postpone(self, until: float) -> None:
        """The fleet's next probe is not before this instant."""
        self._next_probe = max(self._next_probe, until)

    def probing(self, call: Call) -> None:
        """This call is the probe that was allowed."""
        self._probe = call

    def note(self, call: Call, outcome: Outcome, now: float) -> str | None:
        """Note how a call ended. Returns the event: breaker.opened, breaker.closed, breaker.probed,
        or None."""
        was_probe = call is self._probe or call in self._silent
        if call is self._probe:
            self._probe = None
        elif was_probe:
            self._silent.remove(call)
        match outcome:
            case Misconfigured() | Unavailable() | Unknown(by_gateway=True):
                return self._trouble(call.claim.session_id, outcome, now, was_probe)
            case Answered() | Accepted() | Busy() | Gone() | Failed() | Refused():
                return self._answer(call, now)
            case Unknown(_, http_status):
                if http_status is not None:
                    return self._answer(call, now)
                return self._wait_longer(now) if was_probe else None
            case Unsent() | Malformed() | Capped() | Misfired() | Expired():
                if was_probe:
                    self._next_probe = now
                return None
            case never:
                assert_never(never)

    def _trouble(
        self, session: str, outcome: Misconfigured | Unavailable | Unknown, now: float, probe: bool
    ) -> str | None:
        extent = _extent(outcome)
        if self.is_open:
            self._extent = max(self._extent, extent)
            if not probe:
                return None
            self._fresh_failed += 1
            return self._wait_longer(now)
        gone = isinstance(outcome, Misconfigured) and outcome.of_session
        if gone and any(
            at >= now - ANSWERED_LATELY for who, at in self._answers.items() if who != session
        ):
            return None
        self._extent = max(self._extent, extent)
        if self._trouble_in is None or self._trouble_in == session:
            self._trouble_in = session
            return None
        self.is_open, self._opened_at, self._pause = True, now, PROBE_FIRST
        self._next_probe = now + self._pause
        self._next_fresh = now + min(self._pause, self.fresh_pause(now))
        return "breaker.opened"

    def _answer(self, call: Call, now: float) -> str | None:
        session = call.claim.session_id
        self._answers.pop(session, None)
        self._answers[session] = now
        while len(self._answers) > 2:
            del self._answers[next(iter(self._answers))]
        if not self.is_open:
            self._trouble_in, self._extent = None, Extent.SESSION
            return None
        if call.sent_at is None or call.sent_at < self._opened_at:
            return None
        return self.close()

    def _wait_longer(self, now: float) -> str:
        self._pause = min(PROBE_MOST, self._pause * 2)
        self._next_probe = now + self._pause * random.uniform(0.8, 1.0)
        self._next_fresh = now + min(self._pause, self.fresh_pause(now))
        return "breaker.probed"
