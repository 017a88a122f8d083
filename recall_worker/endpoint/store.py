"""What has to be remembered of keys and sessions, and who may be where.

A key stands for one run. It is unknown, then its run goes on, then the run has ended and its answer
is kept. A session is free, or it is held under a lease: by a run, or by a chat.

    unknown ──begin──▶ goes on ──finish, cancel──▶ ended (the answer stays)
       ▲                 │  ▲
       └──────undo───────┘  │ begin, up to `starts_most` times
                         ▼  │
                        lost ──give_up──▶ ended (failed)

Lost: the run has not ended, and nobody holds its session under its lease any more, as its process
died or was stopped. How far it came, nobody can say. One thing decides whether a run goes on, the
lease of its session: so no run can go on without its session, and no other lease can contradict it.

Never here: HTTP, the agent.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol, TypeAlias
from uuid import UUID


class StoreUnavailable(Exception):
    """The store can't be asked, or refuses. `hint` says what to do, where somebody can."""

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Start:
    """A run that is to be started."""

    key: str
    session_id: str
    fingerprint: str
    """The hash of the request's body."""
    lease: UUID


@dataclass(frozen=True, slots=True)
class Started:
    """The key and the session are ours."""

    starts: int
    """How often the run was started under this key: more than 1, where it was lost before."""
    is_stored: bool
    """Whether the system message was stored already."""


@dataclass(frozen=True, slots=True)
class Ended:
    answer: str
    """The JSON text of the answer."""


@dataclass(frozen=True, slots=True)
class GoesOn:
    """The run of this key has not ended."""

    is_accepted: bool = False
    """Whether its caller was told to poll it."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The run's process is gone, and it was started too often to be started again."""

    starts: int
    is_accepted: bool = False
    """Whether its caller was told to poll it."""


@dataclass(frozen=True, slots=True)
class OtherRequest:
    """The key stands for another request."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Somebody is in the session."""


NotStarted: TypeAlias = Ended | GoesOn | Lost | OtherRequest | Taken
Begun: TypeAlias = Started | NotStarted
State: TypeAlias = Ended | GoesOn | Lost


class Store(Protocol):
    """All methods raise StoreUnavailable. Leases end where nobody renews them for `lease`
    seconds."""

    lease: float | None
    """Seconds; None: leases last as long as the process."""

    @property
    def is_down(self) -> bool:
        """Whether the last step met a PostgreSQL that is away."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def begin(self, start: Start, starts_most: int) -> Begun:
        """In one atomic step: the key is looked up, and a run that may start has its session."""

    async def stored(self, start: Start) -> None:
        """The system message of this key is stored."""

    async def accepted(self, start: Start) -> None:
        """The caller of this run is told that it is accepted, and where to poll it."""

    async def finish(self, start: Start, status: str, answer: str) -> bool:
        """The run has ended: keep the answer, free the session. False: the run is no longer ours,
        or was ended by `cancel`; the session is free all the same if it was ours."""

    async def undo(self, start: Start) -> None:
        """Nothing was run: as if there had been no `begin`."""

    async def look(self, key: str, session_id: str) -> State | None:
        """How the run of this key stands; None where this session has none."""

    async def cancel(self, key: str, session_id: str, answer: str) -> None:
        """A run that goes on, or is lost, has ended with this answer. Who runs it learns that by
        `ended`; the session stays held until then."""

    async def give_up(self, key: str, session_id: str, answer: str) -> None:
        """A run that is lost has ended with this answer; nothing happens where it goes on."""

    async def take(self, session_id: str, lease: UUID) -> bool:
        """Take a free session for a chat. False: it is not free."""

    async def free(self, session_id: str, lease: UUID) -> None:
        """Free a session, if it is held under this lease. A run in it that has not ended is
        lost."""

    async def renew(self, held: Collection[tuple[str, UUID]]) -> set[UUID]:
        """Renew these sessions' leases; which of them are still ours."""

    def renew_now(self, held: Collection[tuple[str, UUID]]) -> None:
        """The same from a thread, without an event loop; blocks meanwhile."""

    async def ended(self, keys: Collection[str]) -> set[str]:
        """Which of these keys' runs have ended."""

    async def prune(self, keep: float) -> None:
        """Forget runs that ended more than `keep` seconds ago, and those lost for so long."""
