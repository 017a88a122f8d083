"""The worker's only SQL: claim, place, renew, look, settle, beat. One round trip each, no transaction across a call.

The database is authoritative for what is due, who holds which lease, and what a recall has become. The process may believe a
lease to be its own until a renewal or a settle says otherwise; it never concludes that from its own clock.

A ledger keeps a few connections ("lines") of its own, each opened when first needed and again after it broke: one for claims,
one for settles, one for renewals, so that none waits behind another. Whatever goes wrong with a connection is an `Outage`;
callers wait and ask again. Statements that PostgreSQL refuses because of the values given are `Refusal`s.

Never here: what an ending means (judge), when to ask (worker).
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never
from uuid import UUID

import psycopg
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

from . import statements
from .events import harmless
from .recall import (
    After,
    AsMoved,
    Claim,
    Defer,
    Ended,
    Ending,
    Finish,
    LeaseLost,
    Locked,
    Moved,
    Next,
    Release,
    Retry,
    Settled,
    Settlement,
    Stranded,
    Unsent,
    Verdict,
    http_status_of,
    name_of,
    reason_of,
)

STATEMENT_DEADLINE = 15.0
"""Seconds after which an unanswered statement means that the connection is gone."""
CONNECT_DEADLINE = 10.0
LOCK_PATIENCE_MS = 1000
"""Milliseconds a statement may wait for the application to end a transaction. Row locks are passed over and not waited for."""
REASON_MOST = 500
"""Characters of a reason that are kept."""

_CLAIM_FIELDS = tuple(f.name for f in dataclasses.fields(Claim))


class Outage(Exception):
    """PostgreSQL does not answer, or not this connection. `reason` is for people; the caller tries again."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Refusal(Exception):
    """PostgreSQL answered, and will not run this statement with these values (or at all). Trying again changes nothing."""

    def __init__(self, reason: str, sqlstate: str | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.sqlstate = sqlstate


@dataclass(frozen=True, slots=True)
class Claimed:
    """The answer to one claim: the rows taken, and when to come back."""

    claims: list[Claim]
    next_in: float | None
    """Seconds until the next row is due, or None where none is."""
    waiting: bool
    """Whether something is due that could not be claimed: locked, or behind a run of its session."""
    asked_at: float
    """Monotonic instant at which the claim was asked for."""


def connection_info(dsn: str, name: str) -> dict[str, Any]:
    """Keyword arguments for psycopg's connect: the DSN with our application_name and with keepalives that notice a dead peer."""
    return {
        "conninfo": dsn,
        "application_name": name,
        "connect_timeout": int(CONNECT_DEADLINE),
        "keepalives": 1,
        "keepalives_idle": 15,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 20_000,
        "autocommit": True,
    }


def _bounded(dsn: str) -> str:
    """The DSN with a bound on waiting for locks, as an insert that the application keeps open can hold up an index entry."""
    options = conninfo_to_dict(dsn).get("options") or ""
    return make_conninfo(dsn, options=f"{options} -c lock_timeout={LOCK_PATIENCE_MS}".strip())


def said(error: BaseException) -> str:
    """The first line of an error's text, without what could be a secret: libpq's messages name hosts and users, never passwords."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _is_refusal(error: psycopg.Error) -> bool:
    """Whether it is the values or the schema that PostgreSQL won't have, and not the moment or the connection."""
    if error.sqlstate is None:
        return not isinstance(error, errors.OperationalError | errors.InterfaceError)
    # 08 connection, 25 a standby after a failover, 26 a forgotten plan, 40 a deadlock, 53 no resources, 57 shut down, 58 disk.
    return error.sqlstate[:2] not in ("08", "25", "26", "40", "53", "57", "58", "XX")


class _Line:
    """One connection, opened when needed, one statement at a time."""

    def __init__(self, dsn: str, name: str, prepare: bool) -> None:
        self._info = connection_info(dsn, name)
        self._prepare = prepare
        self._conn: psycopg.AsyncConnection[dict[str, Any]] | None = None
        self._turn = asyncio.Lock()

    async def ask(self, statement: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        async with self._turn:
            try:
                async with asyncio.timeout(STATEMENT_DEADLINE + CONNECT_DEADLINE):
                    conn = await self._connected()
                    cursor = await conn.execute(statement.encode(), values, prepare=self._prepare)
                    return await cursor.fetchall() if cursor.description else []
            except TimeoutError:
                await self._drop()
                raise Outage("no answer within the deadline") from None
            except psycopg.Error as error:
                if _is_refusal(error):
                    raise Refusal(said(error), error.sqlstate) from error
                await self._drop()
                raise Outage(said(error)) from error
            except OSError as error:
                await self._drop()
                raise Outage(said(error)) from error
            except BaseException:
                # Cancelled in mid-statement: what the connection would say next belongs to nobody.
                await self._drop()
                raise

    async def _connected(self) -> psycopg.AsyncConnection[dict[str, Any]]:
        if self._conn is None or self._conn.closed:
            self._conn = await psycopg.AsyncConnection.connect(**self._info, row_factory=dict_row)
            if not self._prepare:
                self._conn.prepare_threshold = None
        return self._conn

    async def _drop(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            # pgconn.finish() and not close(): it never waits for a peer that is gone.
            conn.pgconn.finish()

    async def close(self) -> None:
        async with self._turn:
            await self._drop()


class Ledger:
    """The table as the worker sees it. All methods raise Outage, and Refusal where PostgreSQL will not take the values."""

    def __init__(self, dsn: str, worker: str, lease: float, *, pooled: bool = False) -> None:
        """`lease` in seconds. `pooled`: a transaction pooler stands in between, so statements aren't prepared."""
        name = f"recall-worker ledger {worker}"
        if not pooled:
            dsn = _bounded(dsn)
        self._worker = worker
        self._lease = lease
        self._claims, self._settles, self._renewals = (_Line(dsn, name, not pooled) for _ in range(3))
        self._sql = statements.load("ledger")

    async def close(self) -> None:
        for line in (self._claims, self._settles, self._renewals):
            await line.close()

    async def schema(self) -> tuple[int, int]:
        """The schema's version and the oldest code that can work with it; (0, 0) where there is none."""
        try:
            row = (await self._claims.ask(self._sql["schema"], {}))[0]
        except Refusal as refusal:
            if refusal.sqlstate == errors.UndefinedTable.sqlstate:
                return 0, 0
            raise
        return row["version"], row["oldest_code"]

    async def claim(self, slots: int, *, take_expired: bool) -> Claimed:
        """Take at most `slots` due rows under leases of their own, oldest due first, and learn when the next one is due."""
        asked_at = time.monotonic()
        values = {"slots": slots, "lease": self._lease, "worker": self._worker, "take_expired": take_expired}
        try:
            rows = await self._claims.ask(self._sql["claim"], values)
        except Refusal as refusal:
            if refusal.sqlstate != errors.UniqueViolation.sqlstate:
                raise
            # Another worker took a row of the same session in the same instant; a new look will see its lease.
            return Claimed([], None, True, asked_at)
        first = rows[0]
        claims = [Claim(**{f: row[f] for f in _CLAIM_FIELDS}) for row in rows if row["id"] is not None]
        return Claimed(claims, first["next_in"], first["waiting"], asked_at)

    async def place(self, claims: Sequence[tuple[Claim, int]]) -> list[Claim]:
        """Write the occurrences that follow from moves of `trigger_at`, before they are called.

        Returns the claims as they now stand; those that were moved again meanwhile, or lost, are left out.
        """
        rows = await self._claims.ask(
            self._sql["place"],
            {
                "ids": [c.id for c, _ in claims],
                "leases": [c.lease for c, _ in claims],
                "triggers": [c.trigger for c, _ in claims],
                "occurrences": [occurrence for _, occurrence in claims],
            },
        )
        missed = {row["id"]: row["missed"] for row in rows}
        return [
            dataclasses.replace(
                c, occurrence=occurrence, rekey=0, attempt=1, deferrals=0, begun_age=None, taken_from=None, missed=missed[c.id],
                lateness=c.lateness + (c.scheduled_for - c.trigger_at).total_seconds(),
                scheduled_for=c.trigger_at, planned_at=c.trigger_at,
            )
            for c, occurrence in claims
            if c.id in missed
        ]  # fmt: skip

    async def renew(self, leases: Mapping[str, UUID]) -> dict[str, str]:
        """Extend these leases (id → lease). Says of each: renewed, locked (ask again soon), lost, deleted, or its final status."""
        values = {"ids": list(leases), "leases": list(leases.values()), "lease": self._lease}
        return {row["id"]: row["state"] for row in await self._renewals.ask(self._sql["renew"], values)}

    async def look(self, leases: Mapping[str, UUID]) -> dict[str, str]:
        """Of these leases, those that are no longer ours to finish: lost, deleted, or the recall's final status."""
        values = {"ids": list(leases), "leases": list(leases.values())}
        return {row["id"]: row["state"] for row in await self._renewals.ask(self._sql["look"], values)}

    async def settle(self, batch: Sequence[tuple[Ending, Verdict]]) -> list[Settlement]:
        """Write the verdicts, each guarded by its lease, and leave each call's mark. Answers in the order of `batch`.

        One row that can't be written does not strand the others: where the batch is refused, each goes alone.
        """
        try:
            return await self._settle(batch)
        except Refusal as refusal:
            if len(batch) > 1:
                return [(await self.settle([one]))[0] for one in batch]
            if refusal.sqlstate not in (errors.UniqueViolation.sqlstate, errors.LockNotAvailable.sqlstate):
                return [Stranded(refusal.reason)]
        # The session's slot was taken (or is being taken) between look and write: put back outside of it.
        try:
            return await self._settle(batch, outside=True)
        except Refusal as refusal:
            return [Stranded(refusal.reason)]

    async def _settle(self, batch: Sequence[tuple[Ending, Verdict]], outside: bool = False) -> list[Settlement]:
        now = time.monotonic()
        rows = [_row(ending, verdict, now, "running" if outside else "pending") for ending, verdict in batch]
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        answers = await self._settles.ask(self._sql["settle"], columns | {"worker": self._worker})
        by_id = {row["id"]: row for row in answers}
        return [_settlement(by_id[ending.claim.id]) for ending, _ in batch]

    async def beat(self, facts: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Tell people that this worker is about."""
        await self._claims.ask(self._sql["beat"], {**facts, "worker": self._worker, "settings": json.dumps(settings)})

    async def leave(self) -> None:
        """Say goodbye, and ring for what was put back."""
        await self._claims.ask(self._sql["leave"], {"worker": self._worker})


def _row(ending: Ending, verdict: Verdict, now: float, waiting: str) -> dict[str, Any]:
    """One verdict as the settle statement takes it: the row's next state, and the call's mark."""
    claim, outcome = ending.claim, ending.outcome
    ended_ago = now - ending.ended_at
    called_ago = None if ending.called_after is None else ended_ago + ending.ended_after - ending.called_after
    status, occurrence, rekey, attempt, deferrals = waiting, claim.occurrence, claim.rekey, claim.attempt, claim.deferrals
    fresh, delay = False, None
    match verdict:
        case Finish():
            status = verdict.status
        case Next(occurrence, when):
            rekey, attempt, deferrals, fresh = 0, 0, 0, True
            match when:
                case After(delay):
                    pass
                case AsMoved():
                    delay = None
                case never:
                    assert_never(never)
        case Retry(After(delay), anew):
            rekey, deferrals = rekey + (1 if anew else 0), 0
        case Defer(After(delay)):
            attempt, deferrals = attempt - 1, deferrals + 1
        case Release():
            attempt -= 1
        case never_either:
            assert_never(never_either)
    return {
        "ids": claim.id, "leases": claim.lease, "triggers": claim.trigger,
        "statuses": status, "occurrences": occurrence, "rekeys": rekey, "attempts": attempt, "deferrals": deferrals,
        "delays": delay, "fresh": fresh,
        "outcomes": None if isinstance(outcome, Unsent) else name_of(outcome),
        "reasons": _told(verdict.reason or reason_of(outcome)),
        "called_ago": called_ago, "ended_ago": ended_ago, "http_statuses": http_status_of(outcome),
        "call_occurrences": claim.occurrence, "call_rekeys": claim.rekey, "call_attempts": claim.attempt,
        "sessions": claim.session_id, "scheduled": claim.scheduled_for,
    }  # fmt: skip


def _told(reason: str | None) -> str | None:
    """A reason that any column and any terminal takes: it may quote what a server answered."""
    return None if reason is None else harmless(reason[:REASON_MOST])


def _settlement(row: Mapping[str, Any]) -> Settlement:
    match row["state"]:
        case "settled":
            return Settled(row["status"])
        case "again":
            return Settled("before")
        case "moved":
            return Moved(row["trigger"], row["trigger_at"])
        case "locked":
            return Locked()
        case "lost":
            return LeaseLost()
        case "deleted":
            return Ended("deleted")
        case _:
            return Ended(row["status"])
