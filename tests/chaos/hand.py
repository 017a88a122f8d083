"""The application's hand: its own ten columns and plain SQL, past every proxy; and the journal of
what it did. An operator's hand, too, who acts on one recall: pauses, resumes, retries, fires, skips
and moves by the wheel's command line, as far as that can be afforded, and else by its statements
(`sql/client.sql`). Whoever does more is in `people`.

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
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import psycopg
from psycopg.rows import dict_row

from recall_worker import statements

from .drawn import SIDE, Drawn
from .journal import Act, End, Journal, Operation, Promise, Row

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
returning id, trigger_at, lease
""",
    "move": """
update session_recalls set trigger_at = %s, updated_at = now() where id = %s and status = 'pending'
returning id, trigger_at, lease
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
OPERATOR_EVERY = 8.0
"""Seconds between two commands of the operator's, as each takes half a second of a core."""
COMMAND_WITHIN = 60.0
"""Seconds that a command may take: it waits for a PostgreSQL that is away."""
PAUSED_MOST = 8.0
STOCK = 300
"""Recalls that only wait, for operators to act on many: three batches."""
STOCK_AHEAD = 7200.0
"""Seconds until they are due."""
STOCK_OWNER = "stock"
SIDE_SHARE, CROWDED_SHARE = 0.5, 0.3
"""Which part of the recalls is in the second queue, and which is scheduled into a session that had
one lately, where a session may have several."""


class Hand:
    def __init__(self, dsn: str, seed: int, site: Path, drawn: Drawn) -> None:
        """`site`: where the wheel is installed, for the operator's commands."""
        self._dsn = dsn
        self._site = site
        self._drawn = drawn
        self._sql = statements.load("client")
        self._operator_next = 0.0
        self._edits = 0
        self._dice = random.Random(f"hand {seed}")
        self.journal = Journal()
        self._pool: list[psycopg.AsyncConnection[Any]] = []
        self._chains: dict[str, int] = {}
        self._recent: deque[str] = deque(maxlen=20)
        """Sessions of which one recall was scheduled lately."""
        self.schedules_within: Callable[[str], Awaitable[bool]] | None = None
        """How an agent that has a tool for it schedules the next link; False where it was
        refused."""
        self.rate = 25.0
        """Things done in a second; 0 while nobody may do anything, operators and agents
        included."""
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

    async def fill_stock(self) -> None:
        """Schedule those that only wait."""
        async with await psycopg.AsyncConnection.connect(self._dsn) as conn:
            for _ in range(STOCK):
                session, at = self.new_session(), datetime.now(UTC) + timedelta(seconds=STOCK_AHEAD)
                promise = Promise(
                    self._id(), session, "once", at.timestamp(), queue=self._queue(), stock=True
                )
                await conn.execute(
                    "insert into sessions (id, user_id) values (%s, %s)", (session, STOCK_OWNER)
                )
                values = (promise.id, session, "once", at, None, "look again", promise.queue)
                insert = INSERT.format(columns=", queue", values=", %s")
                await conn.execute(insert.encode(), values)
                self.journal.promises[promise.id] = promise

    def new_session(self) -> str:
        """The id of a session that there is not yet."""
        self._sessions += 1
        match self._drawn.ids:
            case "bigint":
                return str(self._sessions)
            case "uuid":
                return str(UUID(int=self._dice.getrandbits(128), version=4))
            case _:
                return f"s{self._sessions}"

    def _id(self) -> str:
        if self._drawn.ids == "bigint":
            # Above those that the column gives itself.
            return str(self._dice.randrange(1 << 40, 1 << 62))
        return str(UUID(int=self._dice.getrandbits(128), version=4))

    def _queue(self) -> str:
        side = self._drawn.queues > 1 and self._dice.random() < SIDE_SHARE
        return SIDE if side else "default"

    def young(self) -> list[Promise]:
        """Those of the last minute that nobody has ended, as far as is known."""
        now = time.time()
        return [
            p
            for p in list(self.journal.promises.values())[-600:]
            if p.ended is None and not p.maybe_ended and not p.stock and p.due > now - 60
        ]

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
        crowded: str | None = None
        if self._drawn.pending_most > 1 and self._recent and self._dice.random() < CROWDED_SHARE:
            crowded = self._dice.choice(self._recent)
        if dice < 0.42:
            await self.promise("once", self._dice.uniform(0, 3), session=crowded)
        elif dice < 0.60:
            await self.promise("immediate", 0, session=crowded)
        elif dice < 0.68:
            await self.promise("immediate", 0, chain=self._dice.randint(1, 4))
        elif dice < 0.74:
            await self.promise(
                "recurring",
                self._dice.uniform(0, 2),
                interval=self._dice.randint(1, 3),
                times=self._dice.randint(2, 6),
                session=crowded,
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
        young = self.young()
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
        asked, name = time.time(), NAMED.get(what, what)
        if asked >= self._operator_next:
            self._operator_next = asked + OPERATOR_EVERY
            return await self._command(name, promise.id, after)
        if what in APPLICATION and self._dice.random() < 0.5:
            when = () if after is None else (datetime.now(UTC) + timedelta(seconds=after),)
            found = await self._ask(what, APPLICATION[what], (*when, promise.id))
            return self._note(what, promise, asked, found)
        return await self._state(name, promise.id, {"at": None, "after": after})

    async def _state(self, name: str, id: str, values: Mapping[str, Any]) -> bool:
        """Act by a statement of sql/client.sql; whether it was done for certain."""
        op = self.journal.operation("chaos", name)
        given = {"ids": [id], **values, "actor": op.name, "via": "chaos"}
        found = await self._ask(name, self._sql[name], given)
        if isinstance(found, list):
            answered(op, found)
        elif found == -1:
            op.refused, op.done = True, time.time()
        return bool(op.told)

    def _note(
        self,
        what: str,
        promise: Promise,
        asked: float,
        found: list[Row] | int | None,
        message: str | None = None,
    ) -> bool:
        """Note what the application did itself: to all recalls that its statement found."""
        if found is None:
            # A skip is of all that the session has.
            for each in self.journal.promises.values() if what == "skip" else (promise,):
                if each.session == promise.session:
                    each.acts.append(Act(what, asked, None, message=message))
                    each.moves += what in ("move", "skip")
            return False
        rows = found if isinstance(found, list) else []
        for row in rows:
            of = self.journal.promises.get(row["id"])
            if of is None:
                continue
            due = row.get("trigger_at")
            of.moves += what in ("move", "skip")
            of.acts.append(
                Act(
                    what,
                    asked,
                    time.time(),
                    None if due is None else due.timestamp(),
                    row["lease"] is not None,
                    message,
                )
            )
        return bool(rows)

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
            self.journal.maybe_edited.append(Act("edit", asked, None, message=message))
            for each in self.journal.promises.values():
                if each.due > asked - 600:
                    each.acts.append(Act("edit", asked, None, message=message))
        elif isinstance(found, list) and found:
            of = self.journal.promises.get(found[0]["id"])
            if of is not None:
                self._note("edit", of, asked, found, message)
            else:
                self.journal.edited[found[0]["id"]].append(
                    Act("edit", asked, time.time(), None, False, message)
                )

    async def _retry(self) -> None:
        """Once more, what failed or was cancelled lately."""
        over = await self._ask("look", OVER, ())
        ids = [row["id"] for row in over] if isinstance(over, list) else []
        if not ids:
            return
        id, asked = self._dice.choice(ids), time.time()
        if asked >= self._operator_next:
            self._operator_next = asked + OPERATOR_EVERY
            done = await self._command("retry", id, None)
        else:
            done = await self._state("retry", id, {})
        promise = self.journal.promises.get(id)
        if done and promise is not None:
            promise.ended = None  # What came of it is resolved at the end.

    async def _command(self, name: str, id: str, after: float | None) -> bool:
        """An operator's command of the wheel, on one recall; whether it was done for certain."""
        op = self.journal.operation("cli", name)
        when = [] if after is None else ["--in", f"{after:.1f}s"]
        await self.command(op, [name, id, "--json", *when])
        return bool(op.told)

    async def command(self, op: Operation, words: Sequence[str]) -> str:
        """Run a command of the wheel as this operation, and note what it answers; returns what it
        said to the person."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith("RECALL_")}
        environ |= {"PYTHONPATH": str(self._site), "RECALL_DSN": self._dsn, "RECALL_ACTOR": op.name}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "recall_worker",
            *words,
            cwd="/",
            env=environ,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(COMMAND_WITHIN):
                out, err = await process.communicate()
        except BaseException as error:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            if isinstance(error, TimeoutError):
                return ""
            raise
        said = err.decode(errors="replace").strip()
        if "Traceback" in said or process.returncode not in (0, 1, 3):
            self.journal.strange.append(
                f"{' '.join(words)}: exit status {process.returncode}: {said.splitlines()[-1:]}"
            )
        elif process.returncode in (0, 1) and op.actions[0].endswith("_queue"):
            op.done, op.refused = time.time(), process.returncode == 1
        elif process.returncode in (0, 1):
            answered(op, _rows(json.loads(out)) if out.strip() else [])
        return said

    async def _cancel(self, promise: Promise) -> None:
        await self._end(
            promise,
            "cancelled",
            "update session_recalls set status = 'cancelled', updated_at = now() where id = %s "
            "and status in ('pending', 'running')",
        )

    async def _end(self, promise: Promise, how: str, statement: str) -> None:
        promise.maybe_ended, asked = True, time.time()
        done = await self._do(how, statement, promise.id)
        if done:
            promise.ended = how
            promise.ends.append(End(asked, time.time()))
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
            session = self.new_session()
            if not chain:
                self._recent.append(session)
        elif not chain and session not in self._chains:
            self.journal.crowded.add(session)
        if chain:
            self._chains[session] = chain
        at = datetime.now(UTC) + timedelta(seconds=ahead)
        if (queue := self._queue()) != "default":
            more["queue"] = queue
        promise = Promise(
            self._id(),
            session,
            kind,
            at.timestamp(),
            interval,
            times,
            more.get("cadence", "interval"),
            queue,
            certain=False,
        )
        extra = {k: v for k, v in {"times": times, **more}.items() if v is not None}
        insert = INSERT.format(
            columns="".join(f", {name}" for name in extra), values=", %s" * len(extra)
        )
        self.journal.promises[promise.id] = promise
        if fresh and not await self.create_session(session):
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

    async def create_session(self, session: str) -> bool:
        """Whether it is there for certain."""
        statement = "insert into sessions (id, user_id) values (%s, 'ann') on conflict do nothing"
        return await self._do("session", statement, session) is not None

    async def inside(self, recall: str, session: str, *, long: bool) -> None:
        """What an agent does in its run: schedules the next link, where its chain goes on. And a
        person who sees that it takes long now and then cancels it, or deletes its session."""
        left = self._chains.get(session, 0)
        if left > 0:
            self._chains[session] = left - 1
            if await self.promise("immediate", 0, session=session) is None:
                self.journal.refused_inside.append(session)
        elif session in self.journal.agents and self.schedules_within is not None:
            await self.schedules_within(session)
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
                    for row in rows:
                        if "id" in row:
                            row["id"] = str(row["id"])
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


def answered(op: Operation, rows: Sequence[Row]) -> None:
    """Note the rows that an operation answered: those that it changed, and as they are then."""
    op.done = time.time()
    op.told = {row["id"]: row for row in rows}
    # A pause does not say which were paused already, and by whom.
    if op.actions[0] != "pause":
        unchanged = {"resume": ("resumed", False), "fire": ("already", True)}.get(op.actions[0])
        op.changed = {
            row["id"] for row in rows if unchanged is None or row[unchanged[0]] is not unchanged[1]
        }


def _rows(document: list[Row]) -> list[Row]:
    """What a command wrote as JSON, with its times."""
    for row in document:
        for name in ("trigger_at", "lease_until", "paused_at"):
            if row.get(name) is not None:
                row[name] = datetime.fromisoformat(row[name])
    return document
