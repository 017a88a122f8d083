"""The application's hand: its own ten columns and plain SQL, past every proxy; and a journal of
what it did, which is one side of the account. An operator's hand, too: pauses, resumes, retries,
fires, skips and moves by the wheel's command line, as far as that can be afforded, and else by its
statements (`sql/client.sql`).

A statement whose answer was lost in an outage may have been done or not: the journal says so, and
the account allows for both.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import psycopg
from psycopg.rows import dict_row

from recall_worker import statements

INSERT = """
insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds,
    internal_comment, additional_context_message,
    status, created_at, updated_at{columns})
values (%s, %s, %s, %s, %s, null, %s, 'pending', now(), now(){values})
"""


EDIT = """
update session_recalls set additional_context_message = %s, updated_at = now()
where id = %s and status in ('pending', 'running')
returning id, lease
"""
EDIT_BETWEEN = """
update session_recalls set additional_context_message = %s, updated_at = now()
where id = (
    select id from session_recalls
    where status in ('pending', 'running') and lease is null and attempt + deferrals > 0
    order by random() limit 1)
    and status in ('pending', 'running')
returning id, lease
"""
"""One that waits between two calls of one occurrence: what is edited there must get a new key."""
OVER = """
select id from session_recalls where status in ('failed', 'cancelled') order by updated_at desc
    limit 20
"""
DELETE = "delete from sessions where id = (select session_id from session_recalls where id = %s)"
APPLICATION = {
    "skip": """
update session_recalls set trigger_at = trigger_at + interval_seconds * interval '1 second',
    updated_at = now()
where session_id = (select session_id from session_recalls where id = %s)
    and status = 'pending' and call_type = 'recurring'
returning trigger_at, lease
""",
    "move": """
update session_recalls set trigger_at = %s, updated_at = now() where id = %s and status = 'pending'
returning trigger_at, lease
""",
}
"""What the application does itself."""
NAMED = {"move": "reschedule"}
"""An act, as the statements and the command line call it."""
WHAT_IS_DONE = (
    "cancel",
    "cancel",
    "delete",
    "skip",
    "skip",
    "skip",
    "move",
    "move",
    "move",
    "edit",
    "edit",
    "edit",
    "pause",
    "fire",
    "retry",
)
NEVER = float("inf")
OPERATOR_EVERY = 4.0
"""Seconds between two commands of the operator's, as each takes half a second of a core."""
PAUSED_MOST = 8.0

Row = dict[str, Any]


@dataclass(slots=True, eq=False)
class Act:
    """What was done to one recall, and found it live (or over, for `retry`)."""

    what: str
    """move, skip, fire, retry, pause, resume or edit."""
    asked: float
    done: float | None
    """When it was certain; None where nobody knows whether it was done."""
    due: float | None = None
    """When the row was due by then."""
    leased: bool = False
    """Whether it was in a run."""
    message: str | None = None


@dataclass(slots=True, eq=False)
class Promise:
    """One recall as its application knows it. Instants are seconds of the epoch."""

    id: str
    session: str
    kind: str
    due: float
    interval: int | None = None
    times: int | None = None
    cadence: str = "interval"
    certain: bool = True
    """Whether the insert's answer came."""
    moves: int = 0
    """Skips and reschedules that were done, or may have been."""
    ended: str | None = None
    """cancelled or deleted: by the application itself."""
    maybe_ended: bool = False
    ends: list[list[float]] = field(default_factory=list)
    """From when to when it was certainly ended: each end, and the retry after it."""
    acts: list[Act] = field(default_factory=list)

    @property
    def ended_at(self) -> float | None:
        """When its last end was certain."""
        return self.ends[-1][0] if self.ends else None

    def did(self, *what: str) -> int:
        """How often any of this was done to it, or may have been."""
        return sum(act.what in what for act in self.acts)


@dataclass(slots=True)
class Journal:
    promises: dict[str, Promise] = field(default_factory=dict)
    refused: int = 0
    """Inserts that met a session with a pending recall: expected, as the application's agents do
    ask twice."""
    strange: list[str] = field(default_factory=list)
    did: Counter[str] = field(default_factory=Counter)


class Hand:
    def __init__(self, dsn: str, seed: int, site: Path) -> None:
        """`site`: where the wheel is installed, for the operator's commands."""
        self._dsn = dsn
        self._site = site
        self._sql = statements.load("client")
        self._operator_next = 0.0
        self._edits = 0
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

    # --- its life ---------------------------------------------------------------------------------

    async def live(self, until: asyncio.Event) -> None:
        """Do things at the rate, until told to stop; each on a connection of its own, so that none
        waits for another."""
        while not until.is_set():
            if self.rate > 0 and len(self._busy) < 80:
                self._spawn(self._act())
            with suppress(TimeoutError):
                async with asyncio.timeout(
                    self._dice.expovariate(self.rate) if self.rate > 0 else 0.2
                ):
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
                "recurring",
                self._dice.uniform(0, 2),
                interval=self._dice.randint(1, 3),
                times=self._dice.randint(2, 6),
            )
        elif dice < 0.79:
            grid: dict[str, Any] = {"cadence": "grid"}
            await self.promise(
                "recurring",
                self._dice.uniform(0, 2),
                interval=2,
                times=self._dice.randint(2, 6),
                **grid,
            )
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
        """Do something to a recall of the last minute that nothing was done to yet, as people do:
        whatever it is doing just now."""
        now = time.time()
        young = [
            p
            for p in list(self.journal.promises.values())[-600:]
            if p.ended is None and not p.maybe_ended and p.due > now - 60
        ]
        if not young:
            return
        promise = self._dice.choice(young)
        what = self._dice.choice(WHAT_IS_DONE)
        if what == "cancel":
            await self._cancel(promise)
        elif what == "delete":
            await self._end(promise, "deleted", DELETE)
        elif what == "edit":
            self._edits += 1
            await self._edit(promise, f"look again, {self._edits}")
        elif what == "retry":
            await self._retry()
        elif what == "pause":
            if await self._operate("pause", promise):
                await asyncio.sleep(self._dice.uniform(0.5, PAUSED_MOST))
                await self._operate("resume", promise)
        elif what == "fire" or (what == "skip" and promise.kind == "recurring"):
            await self._operate(what, promise)
        elif what == "move":
            seconds = self._dice.uniform(0, 4)
            await self._operate("move", promise, after=seconds)

    async def _operate(self, what: str, promise: Promise, after: float | None = None) -> bool:
        """Do it by the command line, by its statement, or (what the application has always done) by
        the application's own; returns whether it was done for certain. `after`: seconds, for a
        move."""
        asked = time.time()
        if asked >= self._operator_next:
            self._operator_next = asked + OPERATOR_EVERY
            found = await self._command(what, promise.id, after)
        elif what in APPLICATION and self._dice.random() < 0.5:
            when = () if after is None else (datetime.now(UTC) + timedelta(seconds=after),)
            found = await self._ask(what, APPLICATION[what], (*when, promise.id))
        else:
            values = {"ids": [promise.id], "at": None, "after": after}
            found = await self._ask(what, self._sql[NAMED.get(what, what)], values)
        return self._note(what, promise, asked, found)

    def _note(
        self,
        what: str,
        promise: Promise,
        asked: float,
        found: list[Row] | int | None,
        message: str | None = None,
    ) -> bool:
        if found is None:
            promise.acts.append(Act(what, asked, None, message=message))
            promise.moves += what in ("move", "skip")
            return False
        if not isinstance(found, list) or not found or found[0].get("resumed") is False:
            return False
        due = found[0].get("trigger_at")
        promise.moves += what in ("move", "skip")
        promise.acts.append(
            Act(
                what,
                asked,
                time.time(),
                None if due is None else due.timestamp(),
                found[0]["lease"] is not None,
                message,
            )
        )
        return True

    async def _edit(self, promise: Promise, message: str) -> None:
        """The message changes, now and then that of a recall that waits between two calls."""
        asked = time.time()
        if self._dice.random() < 0.3:
            self._note(
                "edit",
                promise,
                asked,
                await self._ask("edit", EDIT, (message, promise.id)),
                message,
            )
            return
        found = await self._ask("edit", EDIT_BETWEEN, (message,))
        if found is None:
            # Any of them may have it now.
            for each in self.journal.promises.values():
                if each.due > asked - 600:
                    each.acts.append(Act("edit", asked, None, message=message))
        elif isinstance(found, list) and found and found[0]["id"] in self.journal.promises:
            self._note("edit", self.journal.promises[found[0]["id"]], asked, found, message)

    async def _retry(self) -> None:
        """Once more, what failed or was cancelled lately."""
        over = await self._ask("look", OVER, ())
        ids = (
            [row["id"] for row in over if row["id"] in self.journal.promises]
            if isinstance(over, list)
            else []
        )
        if not ids:
            return
        promise = self.journal.promises[self._dice.choice(ids)]
        asked = time.time()
        if asked >= self._operator_next:
            self._operator_next = asked + OPERATOR_EVERY
            found = await self._command("retry", promise.id, None)
        else:
            found = await self._ask("retry", self._sql["retry"], {"ids": [promise.id]})
        if self._note("retry", promise, asked, found) or found is None:
            # A cancel that was asked for meanwhile is in `ends` with its own time.
            if promise.ends and promise.ends[-1][1] == NEVER:
                promise.ends[-1][1] = asked
            promise.ended = None
            promise.maybe_ended |= found is None

    async def _command(self, what: str, id: str, after: float | None) -> list[Row] | int | None:
        """An operator's command of the wheel: the row as it says; 0 where it refuses, None where
        nobody knows."""
        self.journal.did[f"{what} by command"] += 1
        words = [NAMED.get(what, what), id, "--json"]
        if after is not None:
            words += ["--in", f"{after:.1f}s"]
        environ = {k: v for k, v in os.environ.items() if not k.startswith("RECALL_")}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "recall_worker",
            *words,
            cwd="/",
            env=environ | {"PYTHONPATH": str(self._site), "RECALL_DSN": self._dsn},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(30):
                out, err = await process.communicate()
        except BaseException as error:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            if isinstance(error, TimeoutError):
                return None
            raise
        if process.returncode == 0:
            rows: list[Row] = json.loads(out)
            for row in rows:
                row["trigger_at"] = datetime.fromisoformat(row["trigger_at"])
            return rows
        if process.returncode == 1:
            return 0
        if process.returncode != 3:
            said = err.decode(errors="replace").strip().splitlines()[-1:]
            self.journal.strange.append(
                f"{' '.join(words)}: exit status {process.returncode}: {said}"
            )
        return None

    async def _cancel(self, promise: Promise) -> None:
        await self._end(
            promise,
            "cancelled",
            "update session_recalls set status = 'cancelled', updated_at = now() where id = %s "
            "and status in ('pending', 'running')",
        )

    async def _end(self, promise: Promise, how: str, statement: str) -> None:
        promise.maybe_ended = True
        done = await self._do(how, statement, promise.id)
        if done:
            promise.ended = how
            promise.ends.append([time.time(), NEVER])
        elif done == 0:
            promise.maybe_ended = False  # It was over already.

    async def promise(
        self,
        kind: str,
        ahead: float,
        *,
        interval: int | None = None,
        times: int | None = None,
        chain: int = 0,
        session: str | None = None,
        **more: Any,
    ) -> Promise | None:
        """Schedule a recall, by default in a new session. None where the session has one
        pending."""
        fresh = session is None
        if session is None:
            self._sessions += 1
            session = f"s{self._sessions}"
        if chain:
            self._chains[session] = chain
        at = datetime.now(UTC) + timedelta(seconds=ahead)
        promise = Promise(
            str(UUID(int=self._dice.getrandbits(128), version=4)),
            session,
            kind,
            at.timestamp(),
            interval,
            times,
            more.get("cadence", "interval"),
            certain=False,
        )
        extra = {k: v for k, v in {"times": times, **more}.items() if v is not None}
        insert = INSERT.format(
            columns="".join(f", {name}" for name in extra), values=", %s" * len(extra)
        )
        self.journal.promises[promise.id] = promise
        self._by_session[session].append(promise)
        if (
            fresh
            and await self._do(
                "session",
                "insert into sessions (id, user_id) values (%s, 'ann') on conflict do nothing",
                session,
            )
            is None
        ):
            del self.journal.promises[promise.id]  # The insert was never tried.
            return None
        done = await self._do(
            kind, insert, promise.id, session, kind, at, interval, "look again", *extra.values()
        )
        if done == -1:
            del self.journal.promises[promise.id]
            self.journal.refused += 1
            return None
        promise.certain = bool(done)
        return promise

    async def inside(self, recall: str, session: str, *, long: bool) -> None:
        """What an agent does in its run: schedules the next link, where its chain goes on. And a
        person who sees that it takes long now and then cancels it, or deletes its session."""
        left = self._chains.get(session, 0)
        if left > 0:
            self._chains[session] = left - 1
            # One that was moved in mid-run, or retried, or whose message was edited after a call
            # whose end nobody knows (that is another key), runs again beside its own next link;
            # where one was ended the session may be gone.
            plain = all(
                p.ended is None
                and not p.maybe_ended
                and not p.moves
                and not p.did("retry", "fire", "edit")
                for p in self._by_session[session]
            )
            if await self.promise("immediate", 0, session=session) is None and plain:
                self.journal.strange.append(f"{session}: the next link was refused in mid-run")
        promise = self.journal.promises.get(recall)
        if long and promise is not None and promise.ended is None and not promise.maybe_ended:
            dice = self._dice.random()
            if dice < 0.2:
                await self._cancel(promise)
            elif dice < 0.3:
                await self._end(promise, "deleted", DELETE)

    async def leaving(self, recall: str) -> None:
        """What an agent does last in its run: now and then it cancels what called it, in a race
        with the answer."""
        promise = self.journal.promises.get(recall)
        if (
            promise is not None
            and promise.ended is None
            and not promise.maybe_ended
            and self._dice.random() < 0.03
        ):
            await self._cancel(promise)

    # --- its connections --------------------------------------------------------------------------

    async def _do(self, what: str, statement: str, *values: Any) -> int | None:
        """Rows that a statement touched; -1 where it was refused as not unique; None where nobody
        knows."""
        found = await self._ask(what, statement, values)
        return len(found) if isinstance(found, list) else found

    async def _ask(
        self, what: str, statement: str, values: Sequence[Any] | Mapping[str, Any]
    ) -> list[Row] | int | None:
        """The rows that a statement returned, empty ones where it returns none; -1 where it was
        refused as not unique, None where nobody knows."""
        self.journal.did[what] += 1
        conn: psycopg.AsyncConnection[Any] | None = None
        try:
            async with asyncio.timeout(20):
                conn = self._pool.pop() if self._pool else None
                if conn is None or conn.closed:
                    conn = await psycopg.AsyncConnection.connect(
                        self._dsn, autocommit=True, connect_timeout=3
                    )
                async with conn.cursor(row_factory=dict_row) as cursor:
                    await cursor.execute(statement.encode(), values, prepare=False)
                    rows: list[Row] = (
                        await cursor.fetchall() if cursor.description else [{}] * cursor.rowcount
                    )
        except (psycopg.errors.UniqueViolation, psycopg.errors.ForeignKeyViolation):
            # The latter: its session was deleted meanwhile.
            assert conn is not None
            self._pool.append(conn)
            return -1
        except (psycopg.OperationalError, psycopg.InterfaceError, OSError, TimeoutError):
            if conn is not None:
                conn.pgconn.finish()
            return None
        except psycopg.Error as error:
            self.journal.strange.append(
                f"{what}: {type(error).__name__}: {str(error).splitlines()[0]}"
            )
            conn.pgconn.finish() if conn is not None else None
            return None
        except BaseException:
            if conn is not None:
                conn.pgconn.finish()
            raise
        self._pool.append(conn)
        return rows

    async def until_done(
        self, ask: Callable[[psycopg.AsyncConnection[Any]], Awaitable[Any]], within: float = 60
    ) -> Any:
        """Run `ask(connection)` until it is answered."""
        end = time.monotonic() + within
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(
                    self._dsn, autocommit=True, connect_timeout=3
                ) as conn:
                    return await ask(conn)
            except (psycopg.OperationalError, OSError):
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.1)
