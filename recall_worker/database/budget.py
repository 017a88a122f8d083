"""How many connections a worker has at PostgreSQL, counted as PostgreSQL counts them.

A connection that we hang up on may go on at the server: a commit that waits for a synchronous
standby, a peer that the network has cut off. PostgreSQL still counts it, so it keeps its place here
until PostgreSQL says that it is gone. Each new connection first ends those that were given up.
Where all places are taken nothing is opened: the caller waits, and the application keeps its own.

Never here: a statement, and when a connection is opened or given up (connection, listener).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import psycopg

CONNECTIONS_MOST = 8
"""Connections of a worker at PostgreSQL, at most. It works with four as a rule: claims, settles,
renewals, LISTEN. One more while a row is locked or a message is long, one while it prunes, one
while failures are told."""
LOOKING = 1
"""Of these, kept free to look which of the given-up ones are gone."""
NAME_MOST = 63
"""Octets that PostgreSQL keeps of an application_name."""
FAREWELL = 2.0
"""Seconds, at most, that the end of a worker waits until its cancel requests are sent."""


class NoPlace(psycopg.OperationalError):
    """All places are taken, most of them by connections that PostgreSQL has not ended yet."""


class Place:
    """The place of one connection. It ends by `free` or by `give_up`; what comes later does
    nothing."""

    def __init__(self, budget: ConnectionBudget) -> None:
        self._budget = budget
        self._opened: tuple[int, str] | None = None
        self._is_taken = True

    def opened(self, pid: int, name: str) -> None:
        """PostgreSQL has made the connection, as the backend `pid`."""
        self._opened = pid, name.encode()[:NAME_MOST].decode(errors="ignore")
        self._budget.ended([pid])  # The number of one that is gone is used again.

    def pooled(self) -> None:
        """A pooler owns the server's side: there is nothing for us to end."""
        self._opened = None

    def free(self) -> None:
        """PostgreSQL has ended the connection, or does so at once."""
        if self._is_taken:
            self._is_taken = False
            self._budget._leave(None)

    def give_up(self) -> None:
        """We hang up, and PostgreSQL may not know."""
        if self._is_taken:
            self._is_taken = False
            self._budget._leave(self._opened)


class ConnectionBudget:
    """The places of one worker's connections: shared by all that connect for it."""

    def __init__(self, most: int = CONNECTIONS_MOST) -> None:
        self._most = most
        self._open = 0
        self._given_up: dict[int, str] = {}
        self._farewells: set[asyncio.Task[None]] = set()

    @property
    def given_up(self) -> tuple[list[int], list[str]]:
        """The backends that may still be there after we gave them up, and their names."""
        return list(self._given_up), list(self._given_up.values())

    @property
    def counted(self) -> int:
        """Connections that PostgreSQL may count."""
        return self._open + len(self._given_up)

    @property
    def is_full(self) -> bool:
        """Whether the place that is kept for looking is taken, too."""
        return self.counted > self._most - LOOKING

    def take(self) -> Place:
        """A place for a connection that is about to be opened. Raises NoPlace."""
        if self.counted >= self._most:
            raise NoPlace(
                f"{len(self._given_up)} connections that were given up have not ended at "
                f"PostgreSQL, and a worker has {self._most} at most"
            )
        self._open += 1
        return Place(self)

    def ended(self, pids: Sequence[int]) -> None:
        """These backends are gone."""
        for pid in pids:
            self._given_up.pop(pid, None)

    def see_off(self, farewell: Coroutine[Any, Any, None]) -> None:
        """Run this beside everything else: it has a connection that nobody waits for cancelled, and
        ends by itself."""
        task = asyncio.create_task(farewell)
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    async def close(self) -> None:
        """Wait a moment for what is being seen off."""
        if self._farewells:
            await asyncio.wait(self._farewells, timeout=FAREWELL)

    def _leave(self, given_up: tuple[int, str] | None) -> None:
        self._open -= 1
        if given_up is not None:
            self._given_up[given_up[0]] = given_up[1]
