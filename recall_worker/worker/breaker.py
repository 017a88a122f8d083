"""The breaker: whether the endpoint is worth calling. Pure state; instants are monotonic seconds brought by the caller.

It opens when two sessions in a row meet Misconfigured or Unavailable with no answer between: one session's trouble never stops
the others. While it is open claims stop, but for probes: one row at a time, after 1 s doubling to 30 s. Which row is probed
rotates by itself, as the one that met trouble is deferred. Any answer to a call sent since then closes it; so does a probe that
was sent and meets silence for a while, as a run may take minutes and trouble is quick to show.

Whatever changes its state returns the event that this makes, so that no change can go untold: `endpoint_status` tells them.
"""

from __future__ import annotations

import random
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

PROBE_FIRST = 1.0
PROBE_MOST = 30.0
PATIENCE = 5.0


class Breaker:
    def __init__(self) -> None:
        self.is_open = False
        self._trouble_in: str | None = None
        self._opened_at = 0.0
        self._pause = PROBE_FIRST
        self._next_probe = 0.0
        self._probe: Call | None = None

    @property
    def state(self) -> str:
        return "open" if self.is_open else "closed"

    def allowance(self, now: float) -> tuple[int | None, float]:
        """How many rows may be claimed now (None: no bound), and seconds until that may change."""
        if not self.is_open:
            return None, 0.0
        if self._probe is not None:
            sent_at = self._probe.sent_at
            return 0, 1.0 if sent_at is None else max(0.05, sent_at + PATIENCE - now)
        return (1, 0.0) if now >= self._next_probe else (0, self._next_probe - now)

    def open_for(self, now: float) -> float:
        """Seconds since it opened."""
        return now - self._opened_at

    def be_patient(self, now: float) -> str | None:
        """The probe may have been silent for long enough to show that it is being run: breaker.closed, or None."""
        sent_at = self._probe.sent_at if self._probe is not None else None
        return self.close() if sent_at is not None and now - sent_at >= PATIENCE else None

    def close(self) -> str | None:
        """The endpoint is known to answer: breaker.closed, or None where it was not open."""
        was_open = self.is_open
        self.is_open, self._trouble_in, self._probe = False, None, None
        return "breaker.closed" if was_open else None

    def postpone(self, until: float) -> None:
        """The fleet's next probe is not before this instant."""
        self._next_probe = max(self._next_probe, until)

    def probing(self, call: Call) -> None:
        """This call is the probe that was allowed."""
        self._probe = call

    def note(self, call: Call, outcome: Outcome, now: float) -> str | None:
        """Take an ending in; returns the event that it makes: breaker.opened, breaker.closed, breaker.probed, or None."""
        was_probe = call is self._probe
        if was_probe:
            self._probe = None
        match outcome:
            case Misconfigured() | Unavailable():
                return self._trouble(call.claim.session_id, now, was_probe)
            case Answered() | Accepted() | Busy() | Gone() | Failed() | Refused():
                return self._answer(call)
            case Unknown(_, http_status):
                if http_status is not None:
                    return self._answer(call)
                return self._wait_longer(now) if was_probe else None
            case Unsent() | Malformed() | Capped() | Misfired() | Expired():
                if was_probe:
                    self._next_probe = now
                return None
            case never:
                assert_never(never)

    def _trouble(self, session: str, now: float, was_probe: bool) -> str | None:
        if self.is_open:
            return self._wait_longer(now) if was_probe else None
        if self._trouble_in is None or self._trouble_in == session:
            self._trouble_in = session
            return None
        self.is_open, self._opened_at, self._pause = True, now, PROBE_FIRST
        self._next_probe = now + self._pause
        return "breaker.opened"

    def _answer(self, call: Call) -> str | None:
        if not self.is_open:
            self._trouble_in = None
            return None
        if call.sent_at is None or call.sent_at < self._opened_at:
            return None
        return self.close()

    def _wait_longer(self, now: float) -> str:
        self._pause = min(PROBE_MOST, self._pause * 2)
        self._next_probe = now + self._pause * random.uniform(0.8, 1.0)
        return "breaker.probed"
