"""Whether the schema lets the worker work. Somebody, or somebody's migration tool, may drop what
the statements need while workers run.

PostgreSQL answers then, and refuses: that is no outage. The worker stays up, tries again after
pauses, and says what is wrong and what to do: once when it begins, rarely while it lasts, and once
when it is over. `recall-worker migrate` puts back what is missing, and needs no restart.
"""

from __future__ import annotations

import time

from ..database.connection import StatementRejected
from ..events import Events

SAID_AGAIN = 600.0
"""Seconds until it is said again."""
TODO = "recall-worker migrate puts back what is missing; recall-worker doctor names it"
FORBIDDEN, GRANT = (
    "42501",
    (
        "give the account of RECALL_DSN the role recall_worker (docs/roles.md); "
        "recall-worker doctor names what it may not do"
    ),
)
"""The error of a right that is missing, and what to do then."""


class SchemaStatus:
    def __init__(self, events: Events) -> None:
        self._events = events
        self._refused: dict[str, str] = {}
        """What can't be done, and why."""
        self._broken_at = 0.0
        self._said_at: float | None = None

    @property
    def reason(self) -> str | None:
        """Why it does not let the worker work; None where it does."""
        return next(iter(self._refused.values()), None)

    def refused(self, doing: str, refusal: StatementRejected) -> None:
        """PostgreSQL refused a statement, as the schema does not fit it. `doing`: a verb; whoever
        says so says later that it `fits`."""
        if not self._refused:
            self._broken_at = time.monotonic()
        self._refused[doing] = refusal.reason
        self.say(doing, refusal)

    def say(self, doing: str, refusal: StatementRejected) -> None:
        """Say so, but not each time."""
        now = time.monotonic()
        if self._said_at is None or now >= self._said_at + SAID_AGAIN:
            self._said_at = now
            hint = GRANT if refusal.sqlstate == FORBIDDEN else TODO
            self._events.tell("schema.broken", doing=doing, reason=refusal.reason, hint=hint)

    def fits(self, doing: str) -> None:
        """That was done, or is not to be done any more."""
        if self._refused.pop(doing, None) is not None and not self._refused:
            self._said_at = None
            after = round(time.monotonic() - self._broken_at, 3)
            self._events.tell("schema.whole", after_s=after)
