"""How far an agent may go on its own, so that one that calls itself in a loop costs little. Pure:
settings in, a refusal in words out.

They hold for what agents schedule and reschedule (the MCP server, `recall_worker.tools`), and not
for the application, `Recalls` and operators. RECALL_SESSION_LIMIT, besides, is kept by the workers,
whoever scheduled; a rule that would exceed it is refused here already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from .. import settings
from ..durations import length
from ..settings import Settings, variable


class LimitExceeded(Exception):
    """Why an agent may not do this, a clause that names the limit; `instead`: what it may do."""

    def __init__(self, why: str, instead: str) -> None:
        super().__init__(why)
        self.instead = instead


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    interval: float
    """Seconds, at least, from one occurrence to the next."""
    horizon: float
    """Seconds, at most, from now to the first occurrence."""
    message: int
    """Octets of the longest message."""
    schedules: tuple[tuple[float, int], ...]
    """(seconds, how many recalls a session may schedule in them)."""
    runs: tuple[tuple[float, int], ...] = ()
    """(seconds, most runs of a session): what the workers keep."""

    @classmethod
    def of(cls, chosen: Settings) -> Limits:
        return cls(
            interval=chosen.agent_interval,
            horizon=chosen.agent_horizon,
            message=min(chosen.agent_message, chosen.message_limit),
            schedules=tuple(settings.windows(chosen.agent_limit)),
            runs=tuple(chosen.session_windows),
        )

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Limits:
        """From the environment, for an application whose other settings are not the worker's.
        Raises SettingsError."""
        return cls.of(settings.some(environ, NAMES))

    def check_message(self, message: str) -> None:
        octets = len(message.encode())
        if octets > self.message:
            raise LimitExceeded(
                f"message has {octets} octets, and {self.message} is the most",
                "a shorter message: say what to do then, and where the details are",
            )

    def check_distance(self, name: str, seconds: float) -> None:
        """`name`: the argument that says it. `seconds`: the shortest distance of two
        occurrences."""
        if seconds < self.interval:
            least = length(round(self.interval))
            raise LimitExceeded(
                f"{name} would call more often than every {least}, the shortest interval here",
                f"{name} with {least} or longer between two occurrences",
            )
        for window, most in self.runs:
            if window / seconds > most:
                least = length(-int(-window // most))
                raise LimitExceeded(
                    f"{name} would call more than {most} times in {length(round(window))}, the "
                    "most runs of a session here",
                    f"{name} with {least} or longer between two occurrences",
                )

    def check_due(self, name: str, due: datetime, now: datetime) -> None:
        """`name`: the argument that says when the (next) occurrence is."""
        if due - now > timedelta(seconds=self.horizon):
            furthest = length(round(self.horizon))
            raise LimitExceeded(
                f"{name} is further away than {furthest}, the furthest that is allowed here",
                f"a time before {now + timedelta(seconds=self.horizon):%Y-%m-%d}",
            )

    def check_again(self, name: str, due: datetime, now: datetime) -> None:
        """The same for a recurring recall that is moved: from inside its run, to the next second,
        it would be a loop without a recall that is new."""
        if due - now < timedelta(seconds=self.interval):
            least = length(round(self.interval))
            raise LimitExceeded(
                f"{name} is sooner than {least} from now, the shortest interval here, and this "
                "recall recurs",
                f"{least} from now or later",
            )

    def check_count(self, counted: Sequence[int]) -> None:
        """`counted`: how many recalls the session has scheduled, for each of `schedules`."""
        for (window, most), count in zip(self.schedules, counted, strict=True):
            if count >= most:
                span = length(round(window))
                raise LimitExceeded(
                    f"{count} recalls were scheduled in this conversation in the last {span}, and "
                    f"{most} is the most",
                    "one recurring recall (every or cron) in place of many, or later again",
                )


NAMES = (
    "agent_limit",
    "agent_interval",
    "agent_horizon",
    "agent_message",
    "message_limit",
    "session_limit",
)
"""The settings that are limits of agents."""
VARIABLES = tuple(variable(name) for name in NAMES)
