"""Following a run that the API accepted: how often it is polled, and when polling ends.

The server's Retry-After is obeyed; without one the pause grows slowly. Failures on the way (no
connection, 5xx, a refused token) end nothing: the run goes on at the server, so polling continues
until its time is up. Then it is asked once more, as it may have ended while nobody asked: its
worker stood still, PostgreSQL was away, or the pause was long.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from ..recall import Outcome, Unknown

FIRST = 0.5
"""Seconds before the second poll; each later pause is FACTOR times as long, at most MOST."""
FACTOR = 1.5
MOST = 10.0
RETRY_AFTER_LEAST, RETRY_AFTER_MOST = 1.0, 300.0
"""Seconds: bounds of a Retry-After that a poll obeys."""


@dataclass(frozen=True, slots=True)
class StillOn:
    """The run goes on, or its state can't be read now (`trouble` says why)."""

    retry_after: float | None = None
    trouble: str | None = None


async def follow(
    ask: Callable[[], Awaitable[Outcome | StillOn]], within: float, first_in: float | None = None
) -> Outcome:
    """Poll until there is an outcome, for `within` seconds, which may be past, and once more; then
    Unknown, with the last trouble in its reason. `first_in`: seconds until the first poll, as the
    API wants it.
    """
    pause = FIRST
    with suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, within)):
            if first_in is not None:
                await asyncio.sleep(_obeyed(first_in))
            while True:
                answer = await ask()
                if not isinstance(answer, StillOn):
                    return answer
                if answer.retry_after is not None:
                    await asyncio.sleep(_obeyed(answer.retry_after))
                else:
                    await asyncio.sleep(pause * random.uniform(0.8, 1.0))
                    pause = min(MOST, pause * FACTOR)
    answer = await ask()
    if not isinstance(answer, StillOn):
        return answer
    return Unknown(
        "the accepted run did not end in its time"
        + (f"; last: {answer.trouble}" if answer.trouble else "")
    )


def _obeyed(retry_after: float) -> float:
    return min(max(RETRY_AFTER_LEAST, retry_after), RETRY_AFTER_MOST)
