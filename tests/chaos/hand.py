"""The application's hand: its own ten columns and plain SQL, past every proxy; and a journal of what it did, which is one side of the account.

A statement whose answer was lost in an outage may have been done or not: the journal says so, and the account allows for both.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Self
from uuid import UUID

import psycopg

INSERT = """
insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds, internal_comment, additional_context_message,
    status, created_at, updated_at{columns})
values (%s, %s, %s, %s, %s, null, %s, 'pending', now(), now(){values})
"""


@dataclass(slots=True, eq=False)
class Promise:
    """One recall as its application knows it. Instants are seconds of the epoch."""

    id: str
    session: str
    kind: str
    due: float
    interval: int | None = None
    times: int | None = None
    certain: bool = True
    """Whether the insert's answer came."""
    moves: int = 0
    """Skips and reschedules that were done, or may have been."""
    ended: str | None = None
    """cancelled or deleted: by the application itself."""
    ended_at: float | None = None
    """When that was certain."""
    maybe_ended: bool = False


@dataclass(slots=True)
class Journal:
    promises: dict[str, Promise] = field(default_factory=dict)
    refused: int = 0
    """Inserts that met a session with a pending recall: expected, as the application's agents do ask twice."""
    strange: list[str] = field(default_factory=list)
    did: Counter[str] = field(default_factory=Counter)


class Hand:
    def __init__(self, dsn: str, seed: int) -> None:
        self._dsn = dsn
        self._dice = random.Random(f"hand {seed}")
        self.journal = Journal()
        self._pool: list[psycopg.AsyncConnection[Any]] = []
        self._chains: dict[str, int] = {}
        self._by_session: dict[str, list[Promise]] = defaultdict(list)
        self.rate = 25.0
        """Things done in a second."""
        self._sessions = 0
        self._busy: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in list(self._busy):
            task.cancel()
        await asyncio.gather(*self._busy, return_exceptions=True)
        for conn in self._pool:
            conn.pgconn.finish()

    # --- its life ----------------------------------------------------------------------------------------------------

    async def live(self, until: asyncio.Event) -> None:
        """Do things at the rate, until told to stop; each on a connection of its own, so that none waits for another."""
        while not until.is_set():
            if self.rate > 0 and len(self._busy) < 40:
                self._spawn(self._act())
            with suppress(TimeoutError):
                async with asyncio.timeout(self._dice.expovariate(self.rate) if self.rate > 0 else 0.2):
                    await until.wait()
        await asyncio.gather(*self._busy, return_exceptions=True)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._busy.add(task)
        task.add_done_callback(self._busy.discard)

    async def _act(self) -> None:
        dice = self._dice.random()
        if dice < 0.42:
            await self.promise("once", self._dice.uniform(0, 3))
        elif dice < 0.60:
            await self.promise("immediate", 0)
        elif dice < 0.68:
            await self.promise("immediate", 0, chain=self._dice.randint(1, 4))
        elif dice < 0.74:
            await self.promise(
                "recurring", self._dice.uniform(0, 2), interval=self._dice.randint(1, 3), times=self._dice.randint(2, 6)
            )
        elif dice < 0.79:
            grid: dict[str, Any] = {"cadence": "grid"}
            await self.promise("recurring", self._dice.uniform(0, 2), interval=2, times=self._dice.randint(2, 6), **grid)
        elif dice < 0.80:
            cron: dict[str, Any] = {
                "cadence": "cron",
                "cron": "* * * * *",
                "time_zone": self._dice.choice(("UTC", "Europe/Berlin")),
            }
            await self.promise("recurring", self._dice.uniform(0, 2), interval=60, times=2, **cron)
        else:
            await self._touch()

    async def _touch(self) -> None:
        """Do something to a recall of the last minute that nothing was done to yet, as people do: whatever it is doing just now."""
        now = time.time()
        young = [
            p for p in list(self.journal.promises.values())[-600:] if p.ended is None and not p.maybe_ended and p.due > now - 60
        ]
        if not young:
            return
        promise = self._dice.choice(young)
        what = self._dice.choice(("cancel", "delete", "skip", "skip", "move", "move"))
        if what == "cancel":
            await self._cancel(promise)
        elif what == "delete":
            await self._end(
                promise, "deleted", "delete from sessions where id = (select session_id from session_recalls where id = %s)"
            )
        elif what == "skip" and promise.kind == "recurring":
            promise.moves += 1
            await self._do("skip", "update session_recalls set trigger_at = trigger_at + interval_seconds * interval '1 second', updated_at = now()"
                " where session_id = %s and status = 'pending' and call_type = 'recurring'", promise.session)  # fmt: skip
        elif what == "move":
            promise.moves += 1
            at = datetime.now(UTC) + timedelta(seconds=self._dice.uniform(0, 4))
            await self._do(
                "move",
                "update session_recalls set trigger_at = %s, updated_at = now() where id = %s and status = 'pending'",
                at,
                promise.id,
            )

    async def _cancel(self, promise: Promise) -> None:
        await self._end(
            promise,
            "cancelled",
            "update session_recalls set status = 'cancelled', updated_at = now() where id = %s and status in ('pending', 'running')",
        )

    async def _end(self, promise: Promise, how: str, statement: str) -> None:
        promise.maybe_ended = True
        done = await self._do(how, statement, promise.id)
        if done:
            promise.ended, promise.ended_at = how, time.time()
        elif done == 0:
            promise.maybe_ended = False  # It was over already.

    async def promise(
        self, kind: str, ahead: float, *, interval: int | None = None, times: int | None = None, chain: int = 0, session: str | None = None,
        **more: Any,
    ) -> Promise | None:  # fmt: skip
        """Schedule a recall, by default in a new session. None where the session has one pending."""
        fresh = session is None
        if session is None:
            self._sessions += 1
            session = f"s{self._sessions}"
        if chain:
            self._chains[session] = chain
        at = datetime.now(UTC) + timedelta(seconds=ahead)
        promise = Promise(
            str(UUID(int=self._dice.getrandbits(128), version=4)), session, kind, at.timestamp(), interval, times, certain=False
        )
        extra = {k: v for k, v in {"times": times, **more}.items() if v is not None}
        insert = INSERT.format(columns="".join(f", {name}" for name in extra), values=", %s" * len(extra))
        self.journal.promises[promise.id] = promise
        self._by_session[session].append(promise)
        if (
            fresh
            and await self._do("session", "insert into sessions (id, user_id) values (%s, 'ann') on conflict do nothing", session)
            is None
        ):
            del self.journal.promises[promise.id]  # The insert was never tried.
            return None
        done = await self._do(kind, insert, promise.id, session, kind, at, interval, "look again", *extra.values())
        if done == -1:
            del self.journal.promises[promise.id]
            self.journal.refused += 1
            return None
        promise.certain = bool(done)
        return promise

    async def inside(self, session: str) -> None:
        """What an agent does in its run: schedules the next link, where its chain goes on."""
        left = self._chains.get(session, 0)
        if left > 0:
            self._chains[session] = left - 1
            # One that was moved in mid-run runs again beside its own next link; where one was ended the session may be gone.
            plain = all(p.ended is None and not p.maybe_ended and not p.moves for p in self._by_session[session])
            if await self.promise("immediate", 0, session=session) is None and plain:
                self.journal.strange.append(f"{session}: the next link was refused in mid-run")

    async def leaving(self, recall: str) -> None:
        """What an agent does last in its run: now and then it cancels what called it, in a race with the answer."""
        promise = self.journal.promises.get(recall)
        if promise is not None and promise.ended is None and not promise.maybe_ended and self._dice.random() < 0.03:
            await self._cancel(promise)

    # --- its connections ---------------------------------------------------------------------------------------------

    async def _do(self, what: str, statement: str, *values: Any) -> int | None:
        """Rows that a statement touched; -1 where it was refused as not unique; None where nobody knows."""
        self.journal.did[what] += 1
        conn: psycopg.AsyncConnection[Any] | None = None
        try:
            async with asyncio.timeout(20):
                conn = self._pool.pop() if self._pool else None
                if conn is None or conn.closed:
                    conn = await psycopg.AsyncConnection.connect(self._dsn, autocommit=True, connect_timeout=3)
                rows = (await conn.execute(statement.encode(), values, prepare=False)).rowcount
        except psycopg.errors.UniqueViolation:
            assert conn is not None
            self._pool.append(conn)
            return -1
        except psycopg.errors.ForeignKeyViolation:
            assert conn is not None
            self._pool.append(conn)
            return -1  # Its session was deleted meanwhile.
        except (psycopg.OperationalError, psycopg.InterfaceError, OSError, TimeoutError):
            if conn is not None:
                conn.pgconn.finish()
            return None
        except psycopg.Error as error:
            self.journal.strange.append(f"{what}: {type(error).__name__}: {str(error).splitlines()[0]}")
            conn.pgconn.finish() if conn is not None else None
            return None
        except BaseException:
            if conn is not None:
                conn.pgconn.finish()
            raise
        self._pool.append(conn)
        return rows

    async def insist(self, ask: Callable[[psycopg.AsyncConnection[Any]], Awaitable[Any]], within: float = 60) -> Any:
        """Run `ask(connection)` until it is answered."""
        end = time.monotonic() + within
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(self._dsn, autocommit=True, connect_timeout=3) as conn:
                    return await ask(conn)
            except (psycopg.OperationalError, OSError):
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.1)
