"""Keys and sessions in the memory of one process: for one API process, tests and demonstrations.

All is lost at its end: a run that was going on, and answers that a worker may ask for again. Where
there is no await, a method is one atomic step.

Never here: what PostgreSQL does for several processes (postgres).
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from uuid import UUID

from .store import Begun, Ended, GoesOn, Lost, OtherRequest, Start, Started, State, Taken


@dataclass(slots=True)
class _Row:
    session_id: str
    fingerprint: str
    lease: UUID
    starts: int = 1
    is_stored: bool = False
    is_accepted: bool = False
    answer: str | None = None
    touched_at: float = 0.0
    """Of the monotonic clock: when it ended, else when it was started."""


class MemoryStore:
    lease: float | None = None
    is_down = False

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}
        self._locks: dict[str, UUID] = {}
        """Who holds a session, by its id."""

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def begin(self, start: Start, starts_most: int) -> Begun:
        row = self._rows.get(start.key)
        if row is not None:
            if (row.fingerprint, row.session_id) != (start.fingerprint, start.session_id):
                return OtherRequest()
            if not isinstance(state := self._state(row), Lost) or row.starts >= starts_most:
                return state
        if start.session_id in self._locks:
            return Taken()
        if row is None:
            row = self._rows[start.key] = _Row(start.session_id, start.fingerprint, start.lease)
        else:
            row.lease, row.starts, row.is_accepted = start.lease, row.starts + 1, False
        row.touched_at = time.monotonic()
        self._locks[start.session_id] = start.lease
        return Started(row.starts, row.is_stored)

    async def stored(self, start: Start) -> None:
        self._rows[start.key].is_stored = True

    async def accepted(self, start: Start) -> None:
        row = self._rows.get(start.key)
        if row is not None and row.lease == start.lease:
            row.is_accepted = True

    async def finish(self, start: Start, status: str, answer: str) -> bool:
        row = self._rows.get(start.key)
        ours = row is not None and row.lease == start.lease and row.answer is None
        if row is not None and ours:
            row.answer, row.touched_at = answer, time.monotonic()
        await self.free(start.session_id, start.lease)
        return ours

    async def undo(self, start: Start) -> None:
        row = self._rows.get(start.key)
        if row is not None and row.lease == start.lease:
            row.starts -= 1
            if not row.starts:
                del self._rows[start.key]
        await self.free(start.session_id, start.lease)

    async def look(self, key: str, session_id: str) -> State | None:
        row = self._rows.get(key)
        return None if row is None or row.session_id != session_id else self._state(row)

    async def cancel(self, key: str, session_id: str, answer: str) -> None:
        row = self._rows.get(key)
        if row is not None and row.session_id == session_id and row.answer is None:
            row.answer, row.touched_at = answer, time.monotonic()

    async def give_up(self, key: str, session_id: str, answer: str) -> None:
        if isinstance(await self.look(key, session_id), Lost):
            await self.cancel(key, session_id, answer)

    async def take(self, session_id: str, lease: UUID) -> bool:
        return self._locks.setdefault(session_id, lease) == lease

    async def free(self, session_id: str, lease: UUID) -> None:
        if self._locks.get(session_id) == lease:
            del self._locks[session_id]

    async def renew(self, held: Collection[tuple[str, UUID]]) -> set[UUID]:
        return {lease for session_id, lease in held if self._locks.get(session_id) == lease}

    def renew_now(self, held: Collection[tuple[str, UUID]]) -> None:
        pass

    async def ended(self, keys: Collection[str]) -> set[str]:
        return {
            key
            for key in keys
            if (row := self._rows.get(key)) is not None and row.answer is not None
        }

    async def prune(self, keep: float) -> None:
        old = time.monotonic() - keep
        for key, row in list(self._rows.items()):
            if row.touched_at < old and not isinstance(self._state(row), GoesOn):
                del self._rows[key]

    def _state(self, row: _Row) -> State:
        if row.answer is not None:
            return Ended(row.answer)
        goes_on = self._locks.get(row.session_id) == row.lease
        return GoesOn(row.is_accepted) if goes_on else Lost(row.starts, row.is_accepted)
