"""Following a run that the API accepted: how often it is polled, and when polling ends.

The server's Retry-After is obeyed; without one the pause grows slowly. Failures on the way (no
connection, 5xx, a refused token) end nothing: the run goes on at the server, so polling continues
until its time is up.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ..recall import Outcome, Unknown

FIRST = 0.5
"""Seconds before the second poll; each later pause is FACTOR times as long, at most MOST."""
FACTOR = 1.5
MOST = 10.0
RETRY_AFTER_LEAST, RETRY_AFTER_MOST = 0.05, 300.0
"""Seconds: bounds of a Retry-After that a poll obeys."""


@dataclass(frozen=True, slots=True)
class StillOn:
    """The run goes on, or its state can't be read now (`trouble` says why)."""

    retry_after: float | None = None
    trouble: str | None = None


async def follow(ask: Callable[[], Awaitable[Outcome | StillOn]], within: float) -> Outcome:
    """Poll until there is an outcome, at most `within` seconds; then Unknown, with the last trouble
    in its reason.
    """
    pause, trouble = FIRST, None
    try:
        async with asyncio.timeout(max(0.0, within)):
            while True:
                answer = await ask()
                if not isinstance(answer, StillOn):
                    return answer
                trouble = answer.trouble
                if answer.retry_after is not None:
                    least = max(RETRY_AFTER_LEAST, answer.retry_after)
                    await asyncio.sleep(min(least, RETRY_AFTER_MOST))
                else:
                    await asyncio.sleep(pause * random.uniform(0.8, 1.0))
                    pause = min(MOST, pause * FACTOR)
    except TimeoutError:
        return Unknown(
            "the accepted run did not end in its time" + (f"; last: {trouble}" if trouble else "")
        )
