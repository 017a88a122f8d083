"""The worker's SQL for telling failures: entries are taken under a lease, sent, and recorded.

A connection of its own, so that no claim, settle or renewal ever waits for it; it is opened when an
entry is due, and closed when none is due soon. On a copy of the database nothing is sent to it, as
the original's entries are the original's to deliver. The database decides what is due and who holds
an entry.

Never here: HTTP, and when to ask (worker.failures). Entries are written by a trigger, in the
transaction in which a recall becomes failed (recall_on_failure in sql/migrations/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from .. import statements
from .budget import ConnectionBudget
from .connection import Deadlines, Dsn, QueryConnection, StatementRejected

KEEP = 7 * 86_400.0
"""Seconds after which an entry that could not be delivered is given up. For as long entries are
written after the last worker with RECALL_FAILURE_URL was there."""
GIVEN_UP_MOST = 100
"""Entries that are given up at once."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A failure that is to be told, under a lease."""

    id: str
    lease: UUID
    recall_id: str
    tries: int
    """This one counted."""
    body: str | None
    """None where PostgreSQL can't give it to us as UTF-8."""
    age: float
    """Seconds since it was written, when it was taken."""


@dataclass(frozen=True, slots=True)
class GivenUp:
    id: str
    recall_id: str
    tries: int
    reason: str | None
    age: float


class Outbox:
    """All methods raise DatabaseUnavailable and StatementRejected (ClaimsHeld on a copy)."""

    def __init__(
        self,
        dsn: Dsn,
        worker: str,
        *,
        queues: Sequence[str] = ("default",),
        schema: str | None = None,
        budget: ConnectionBudget | None = None,
        allow_copy: bool = False,
    ) -> None:
        """As for Ledger. `queues`: those whose failures are told."""
        self._queues = list(queues)
        self._sql = statements.load("outbox")
        self._connection = QueryConnection(
            dsn,
            f"recall-worker ledger {worker}",
            Deadlines(),
            [],
            schema=schema,
            budget=budget,
            identify=True,
            allow_copy=allow_copy,
        )

    async def subscribe(self) -> list[GivenUp]:
        """Say that failures are to be told, for KEEP from now. Returns what was given up at the
        same time, as it is older than KEEP."""
        rows = await self._connection.ask(
            self._sql["subscribe"],
            {
                "queues": self._queues,
                "wanted_for": KEEP,
                "keep": KEEP,
                "most": GIVEN_UP_MOST,
            },
        )
        return [GivenUp(**row) for row in rows]

    async def take(self, most: int, lease: float) -> list[Entry]:
        """Take the oldest entries that are due, each for `lease` seconds."""
        values = {"queues": self._queues, "most": most, "lease": lease, "whole": True}
        try:
            rows = await self._connection.ask(self._sql["take"], values)
        except StatementRejected as refusal:
            if not refusal.of_a_row:
                raise
            rows = await self._connection.ask(self._sql["take"], values | {"whole": False})
        return [Entry(**row) for row in rows]

    async def record(
        self,
        entry: Entry,
        *,
        http_status: int | None,
        reason: str | None = None,
        delivered: bool = False,
        given_up: bool = False,
        delay: float | None = None,
    ) -> None:
        """Write down how a try ended. `delay`: seconds until the next one."""
        values = {
            "id": entry.id,
            "lease": entry.lease,
            "http_status": http_status,
            "reason": reason,
            "delivered": delivered,
            "given_up": given_up,
            "delay": delay,
        }
        await self._connection.ask(self._sql["record"], values)

    async def close(self) -> None:
        """Close the connection; the next query opens another."""
        await self._connection.close()
