"""What a seed draws besides its faults: the workers' settings, and every bound that follows them.

An audit finds what its settings can reach: twenty slots never fill, so "all slots full" is never
met. Any three consecutive seeds cover a short, a middle and a long lease, the fleet's cap on and
off, and the session limit on and off; three from a multiple of three on cover few, some and many
slots, and each type of ids, too. Two from an even number on cover one and two queues, one and three
pending recalls a session, and both versions of PostgreSQL.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

LEASES = ((2.0, 6.0), (6.0, 20.0), (20.0, 60.0))
SLOTS = ((1, 3), (4, 15), (16, 50))
IDS = ("text", "uuid", "bigint")
PENDING_MOST = (1, 3)
VERSIONS = (15, 18)
SIDE = "side"
"""The second queue."""
QUEUES = {
    1: (("default",),),
    2: (("default",), ("default", SIDE), (SIDE,)),
}
"""Which queues the replicas serve, in turns."""
RUN_TIMEOUT = 15.0
RATE_MOST = 20.0
"""Actions of the application in a second, at most."""
LOAD = 0.4
"""The part of all slots that the application keeps busy: a backlog of seconds is gone in
seconds."""
SECONDS_AN_ACTION = 0.82
"""What an action of the application costs in seconds of slots: 1.3 runs, and their repetitions."""
LONG_MOST = 40.0
"""Seconds that a fault lasts at most which is meant to outlast leases: with a long lease it does
not, as a run of ten minutes would hold little else. The account goes by how long a fault lasted."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The settings of all workers of one run, and the table that they find. `lease` in seconds;
    `fleet` and `session_limit` (runs of a session in an hour) are None where they are off. `ids`:
    the type of id and session_id. `queues`: how many there are. `pending_most`: pending recalls a
    session (`migrate --slots`). `postgres`: the major version, where its binaries are there."""

    slots: int = 20
    fleet: int | None = None
    lease: float = 6.0
    session_limit: int | None = None
    replicas: int = 3
    ids: str = "text"
    queues: int = 1
    pending_most: int = 1
    postgres: int = 18

    @property
    def environment(self) -> dict[str, str]:
        """The variables for `recall-worker run`. All else is as shipped."""
        found = {
            "RECALL_CONCURRENCY": str(self.slots),
            "RECALL_LEASE": f"{self.lease:g}",
            "RECALL_RUN_TIMEOUT": f"{RUN_TIMEOUT:g}",
            "RECALL_BUSY_DELAY": "1",
            "RECALL_DRAIN_TIMEOUT": "3",
            "RECALL_LOG_FORMAT": "json",
            "RECALL_LOG_LEVEL": "info",
        }
        if self.fleet is not None:
            found["RECALL_FLEET_CONCURRENCY"] = str(self.fleet)
        if self.session_limit is not None:
            found["RECALL_SESSION_LIMIT"] = f"{self.session_limit}/h"
        return found

    def serves(self, number: int) -> tuple[str, ...]:
        """The queues of this replica, counted from 0."""
        kinds = QUEUES[self.queues]
        return kinds[number % len(kinds)]

    @property
    def names(self) -> tuple[str, ...]:
        """The queues that there are."""
        return ("default", SIDE)[: self.queues]

    @property
    def shown(self) -> dict[str, Any]:
        """The settings for the result's document."""
        return asdict(self)

    @property
    def capacity(self) -> int:
        """Runs at once, of all workers together."""
        total = self.replicas * self.slots
        return total if self.fleet is None else min(total, self.fleet)

    @property
    def rate(self) -> float:
        """Actions of the application in a second."""
        return min(RATE_MOST, LOAD * self.capacity / SECONDS_AN_ACTION)

    # --- bounds, in seconds -----------------------------------------------------------------------

    def leases(self, count: float) -> float:
        """So many leases, as far as a fault goes on."""
        return min(count * self.lease, LONG_MOST)

    @property
    def taken_up_within(self) -> float:
        """What a dead worker had in hand is taken up: its lease ends, and after an outage a third
        of a lease goes by for owners that live."""
        return 1.4 * self.lease + 1

    @property
    def quiet_within(self) -> float:
        """What is due soon has ended when nothing new comes: the longest run, or two retries with
        their backoff, after the lease of a worker that died."""
        return 45.0 + self.taken_up_within

    @property
    def recovered_within(self) -> float:
        """What is due is claimed again, whatever it was: the longest are the breaker's pause
        between two test calls, leases that hold the fleet's cap, and a backlog before few slots."""
        backlog = 20.0 if self.capacity < 20 else 0.0
        return 40.0 + 2 * self.lease + backlog

    @property
    def drain_most(self) -> float:
        """Everything has ended when the application has fallen silent: the longest backoff of a
        recall that was deferred again and again, and leases. Most often it takes ten."""
        return 330.0 + 3 * self.lease


T = TypeVar("T")


def _dealt(what: str, seed: int, cards: Sequence[T]) -> T:
    """One of these cards: so many consecutive seeds, from a multiple of their number on, get all
    of them, in an order of their own."""
    turn, place = divmod(seed, len(cards))
    return random.Random(f"{what} {turn}").sample(list(cards), k=len(cards))[place]


def draw(seed: int, replicas: int = 3) -> Drawn:
    """The settings of a seed."""
    dice = random.Random(f"settings {seed}")
    slots = dice.randint(*SLOTS[(seed + seed // 3) % 3])
    most = max(2, replicas * slots * 2 // 3)
    return Drawn(
        slots=slots,
        fleet=dice.randint(2, most) if seed % 2 == 0 else None,
        lease=round(dice.uniform(*LEASES[seed % 3]), 1),
        session_limit=dice.choice((3, 6, 100)) if seed // 2 % 2 == 0 else None,
        replicas=replicas,
        ids=_dealt("ids", seed, IDS),
        queues=_dealt("queues", seed, tuple(QUEUES)),
        pending_most=_dealt("pending", seed, PENDING_MOST),
        postgres=_dealt("postgres", seed, VERSIONS),
    )
