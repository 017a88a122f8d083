"""The breaker: whether the endpoint is worth calling. Pure state; instants are monotonic seconds
that the caller passes in.

It opens when two different sessions in a row get Misconfigured or Unavailable with no answer in
between: one session's trouble never stops the others. While it is open only probes are claimed: one
row at a time, after 1 s doubling to 30 s. The probed row changes by itself, as a row that failed is
deferred. Any answer to a call sent since then closes the breaker. So does a probe that was sent and
has been silent for a while: a run may take minutes, but trouble shows quickly.

Each method that changes the state returns the event of that change, so that every change is logged:
`endpoint_status` does that.
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

PROBE_FIRST, PROBE_MOST = 1.0, 30.0
"""Seconds before a probe: doubling from the first to the most."""
PATIENCE = 5.0
"""Seconds of silence after which a probe counts as being run."""
PROBE_UNSENT_CHECK, PROBE_CHECK_LEAST = 1.0, 0.05
"""Seconds until the next check on a probe that is not sent yet, and at least on one that is."""


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
            if sent_at is None:
                return 0, PROBE_UNSENT_CHECK
            return 0, max(PROBE_CHECK_LEAST, sent_at + PATIENCE - now)
        return (1, 0.0) if now >= self._next_probe else (0, self._next_probe - now)

    def open_for(self, now: float) -> float:
        """Seconds since it opened."""
        return now - self._opened_at

    def be_patient(self, now: float) -> str | None:
        """Close if the probe has been silent for so long that it must be running: breaker.closed,
        or None."""
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
        """Note how a call ended. Returns the event: breaker.opened, breaker.closed, breaker.probed,
        or None."""
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
