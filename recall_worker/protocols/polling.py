"""Following a run that the API accepted: with what patience it is asked for, and when that ends.

The server's Retry-After is obeyed; without one the pause grows gently. Trouble on the way (no
connection, 5xx, a token refused) ends nothing: the run goes on at the server, so it is asked for
again until its time is up.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ..recall import Outcome, Unknown

FIRST = 0.5
FACTOR = 1.5
MOST = 10.0


@dataclass(frozen=True, slots=True)
class StillOn:
    """The run goes on, or nothing can be said of it now."""

    retry_after: float | None = None
    trouble: str | None = None


async def follow(ask: Callable[[], Awaitable[Outcome | StillOn]], within: float) -> Outcome:
    """Ask until there is an outcome, at most `within` seconds; then Unknown, saying what the last
    trouble was.
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
                    await asyncio.sleep(min(max(0.05, answer.retry_after), 300.0))
                else:
                    await asyncio.sleep(pause * random.uniform(0.8, 1.0))
                    pause = min(MOST, pause * FACTOR)
    except TimeoutError:
        return Unknown(
            "the accepted run did not end in its time" + (f"; last: {trouble}" if trouble else "")
        )
