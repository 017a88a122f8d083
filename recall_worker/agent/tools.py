"""The five tools of one session's agent: arguments in, a sentence and JSON out. See the room's own
docstring.

Each call is one transaction. What acts on a recall first holds it by its session and id (`own` in
sql/agent.sql), and then runs the statement that the command line and `Recalls` run, which records
the action.
"""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import psycopg
from psycopg import errors
from psycopg_pool import PoolTimeout, TooManyRequests

from .. import keys, statements
from ..cadence import Zone
from ..client import Connection, RecallExists, Recalls
from ..database.borrowed import BorrowedCursor
from ..keys import Key, UnfitKey
from ..recall import FINAL
from ..settings import DEFAULT_QUEUE
from . import arguments, catalog, words
from .arguments import ArgumentError
from .limits import LimitExceeded, Limits
from .words import Seen

DEADLINE = 15.0
"""Seconds after which a call is given up: a model that waits longer is given up by its own side."""
LISTED, LISTED_ENDED = 50, 10
"""Recalls of a list: live ones, and those that are over, at most."""
CANCELLED = "cancelled by its agent"

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    """For the model, in sentences."""
    data: dict[str, Any]
    """The same as JSON: `now`, and `recall` or `recalls`."""


class ToolRefused(Exception):
    """Nothing was done, or nobody knows (`unreachable`). The text is for the model: what was wrong,
    and after `Try:` what to do. `__cause__` is for the operator's log."""

    def __init__(self, what: str, *todo: str, unreachable: bool = False) -> None:
        """`unreachable`: PostgreSQL did not answer; the same call may work later."""
        super().__init__("\n".join([_ended(what), *(_ended(f"Try: {one}") for one in todo)]))
        self.unreachable = unreachable


class AgentTools:
    def __init__(
        self,
        recalls: Recalls,
        session_id: Key,
        *,
        limits: Limits | None = None,
        queue: str = DEFAULT_QUEUE,
        delay: str = "in",
    ) -> None:
        """`recalls`: with a pool. `limits`: if not given, those of the environment (RECALL_AGENT_…;
        raises SettingsError). `queue`: where its recalls go. `delay`: what the argument is called
        that refusals call `in`, as Python has that word for itself. Raises ValueError for a session
        that there can't be.

        What is done is on record as done by `agent of <session_id>`.
        """
        self._session = keys.text(session_id)
        if self._session in ("", ".", ".."):
            raise ValueError(f"{self._session!r} can't be a session's id")
        self._recalls = recalls.acting_as(f"agent of {self._session}")
        self._limits = Limits.read() if limits is None else limits
        self._queue = queue
        self._delay = delay
        self._sql = statements.load("agent")
        self._client = statements.load("client")
        self._going_on: set[asyncio.Task[Any]] = set()

    @property
    def session_id(self) -> str:
        return self._session

    async def finish(self, within: float) -> None:
        """Wait until the calls that are going on have ended, for so many seconds at most."""
        if self._going_on:
            await asyncio.wait(set(self._going_on), timeout=within)

    async def schedule(
        self,
        message: str,
        *,
        after: str | None = None,
        at: str | None = None,
        every: str | None = None,
        grid: str | None = None,
        cron: str | None = None,
        time_zone: str | None = None,
        until: str | None = None,
        times: int | None = None,
    ) -> Answer:
        """All times and lengths are texts, as a model writes them; `after` is the argument `in`.
        Raises ToolRefused."""
        given = {
            "in": after,
            "at": at,
            "every": every,
            "grid": grid,
            "cron": cron,
            "time_zone": time_zone,
            "until": until,
            "times": times,
        }

        async def act(conn: Connection) -> Answer:
            content = arguments.message(message)
            self._limits.check_message(content)
            now = await self._now(conn)
            made = arguments.schedule(now, self._limits, self._delay, given)
            await self._ask(conn, self._sql["alone"], {})
            spans = [span for span, _ in self._limits.schedules]
            counted = await self._ask(conn, self._sql["scheduled_since"], {"spans": spans})
            self._limits.check_count([row["count"] for row in counted])
            plan = made.plan
            try:
                recall = await self._recalls.schedule(
                    self._session,
                    content,
                    at=plan.at,
                    after=plan.after,
                    every=plan.every,
                    grid=plan.grid,
                    cron=plan.cron,
                    time_zone=plan.time_zone,
                    until=plan.until,
                    times=plan.times,
                    queue=self._queue,
                    conn=conn,
                )
            except RecallExists:
                raise await self._no_room(conn, made.zone) from None
            seen = Seen(recall, in_run=False)
            parts = [f"Scheduled: {words.comes(seen, made.zone, now)}."]
            if (rule := words.recurs(recall)) is not None:
                parts.append(f"It comes again {rule}.")
            if (end := words.ends(recall, made.zone)) is not None:
                parts.append(f"It ends: {end}.")
            parts += made.notes
            return self._about(parts, seen, made.zone, now)

        return await self._guarded(act)

    async def list(self, *, time_zone: str | None = None, ended: bool | None = None) -> Answer:
        """The session's live recalls, and with `ended` the last that are over. Raises
        ToolRefused."""

        async def act(conn: Connection) -> Answer:
            where = arguments.zone(time_zone)
            found = builtins.list(await self._ask(conn, self._sql["own_live"], {"most": LISTED}))
            if arguments.flag("ended", ended):
                found += await self._ask(conn, self._sql["own_ended"], {"most": LISTED_ENDED})
            now = found[0]["now"] if found else await self._now(conn)
            shown = [(seen := Seen.of(row), words.zone_of(seen.recall, where)) for row in found]
            # One zone for all of them: the one asked for, else the first that a recall has.
            zone = where or next(
                (own for seen, own in shown if seen.recall.time_zone is not None),
                words.zone_of(shown[0][0].recall, None) if shown else arguments.zone("UTC"),
            )
            assert zone is not None
            lines = [words.line(seen, zone, now) for seen, _ in shown]
            head = f"{len(lines)} recall{'' if len(lines) == 1 else 's'}" if lines else "No recalls"
            text = "\n".join([f"{head}. {words.now_is(now, zone)}", *lines])
            views = [words.view(seen, zone, now, whole=False) for seen, _ in shown]
            return Answer(text, {**_now(now, zone), "recalls": views})

        return await self._guarded(act)

    async def reschedule(
        self,
        *,
        id: str | None = None,
        after: str | None = None,
        at: str | None = None,
        time_zone: str | None = None,
    ) -> Answer:
        """Raises ToolRefused."""
        given = {"in": after, "at": at, "time_zone": time_zone}

        async def act(conn: Connection) -> Answer:
            now = await self._now(conn)
            when, where, notes = arguments.moment(now, self._limits, self._delay, given)
            seen = await self._one(conn, id, "rescheduled")
            zone = words.zone_of(seen.recall, where)
            if seen.in_run and seen.recall.call_type != "recurring":
                raise ToolRefused(
                    f"recall {seen.recall.id} is in its run now and does not come again: it can't "
                    "be rescheduled",
                    "schedule_recall, which works from inside the run",
                )
            if seen.recall.call_type == "recurring":
                self._limits.check_again("at" if after is None else self._delay, when, now)
            values = {"ids": [seen.recall.id], "at": when, "after": None}
            rows = await self._act(conn, "reschedule", values)
            if not rows:
                until = seen.recall.until_at
                if until is not None and when > until:
                    raise ToolRefused(
                        f"recall {seen.recall.id} ends {words.said(until, zone)}, before that time",
                        "an earlier time, or cancel_recall and then schedule_recall",
                    )
                raise ToolRefused(
                    f"recall {seen.recall.id} is in its last run and does not come again",
                    "schedule_recall after this run",
                )
            seen = Seen.of(rows[0])
            parts = [f"Rescheduled: {words.comes(seen, zone, now)}.", *notes]
            return self._about(parts, seen, zone, now)

        return await self._guarded(act)

    async def skip(self, *, id: str | None = None, time_zone: str | None = None) -> Answer:
        """Raises ToolRefused."""

        async def act(conn: Connection) -> Answer:
            where = arguments.zone(time_zone)
            now = await self._now(conn)
            seen = await self._one(conn, id, "skipped", recurring=True)
            zone = words.zone_of(seen.recall, where)
            left_out = seen.next_due(now)
            if left_out is None:
                raise ToolRefused(
                    f"recall {seen.recall.id} has no occurrence left that could be skipped",
                    "list_recalls",
                )
            rows = await self._act(conn, "skip", {"ids": [seen.recall.id]})
            if not rows:
                raise ToolRefused(
                    f"recall {seen.recall.id} has no interval by which it could be skipped",
                    "reschedule_recall, or cancel_recall",
                )
            seen = Seen.of(rows[0])
            if (due := seen.next_due(now)) is not None:
                # Where it is too far away nothing is skipped: the transaction is rolled back.
                self._limits.check_due("the occurrence after it", due, now)
            # During a run the occurrence after it has no fixed time where it counts from its end.
            what = "the next occurrence" if seen.in_run else words.said(left_out, zone)
            parts = [f"Skipped: {what}. Next: {words.comes(seen, zone, now)}."]
            return self._about(parts, seen, zone, now)

        return await self._guarded(act)

    async def cancel(self, *, id: str | None = None) -> Answer:
        """During a run of its own the recall ends with that run, which is not broken off: it is
        mostly the agent itself that runs there. Raises ToolRefused."""

        async def act(conn: Connection) -> Answer:
            seen = await self._one(conn, id, "cancelled")
            now = await self._now(conn)
            zone = words.zone_of(seen.recall, None)
            if not seen.in_run:
                rows = await self._act(
                    conn, "cancel", {"ids": [seen.recall.id], "reason": CANCELLED}
                )
                seen = Seen.of(rows[0])
                return self._about(["Cancelled: it does not come again."], seen, zone, now)
            if seen.recall.call_type != "recurring":
                raise ToolRefused(
                    f"recall {seen.recall.id} is in its run now and does not come again: there is "
                    "nothing to cancel",
                    "the same again in a minute, if this is not its run",
                )
            # An extra run (fire) is no occurrence: the one that waits is still to come, unless the
            # recall ends before.
            last: dict[str, Any] = (
                {"times": seen.recall.occurrence}
                if seen.recall.fired_at is None
                else {"until": now + timedelta(seconds=1)}
            )
            ends = "the run that is going on ends as usual, and it does not come again."
            if seen.recall.times is not None and last.get("times") == seen.recall.times:
                # Cancelled before, or it was to run so many times: nothing is changed.
                return self._about([f"It is in its last run: {ends}"], seen, zone, now)
            found = await self._recalls.update(seen.recall.id, **last, conn=conn)
            seen = Seen(seen.recall if found is None else found, in_run=True)
            parts = [f"Cancelled: {ends}"]
            return self._about(parts, seen, zone, now)

        return await self._guarded(act)

    async def call(self, name: str, given: Mapping[str, Any] | None) -> Answer:
        """The tool of this name, with arguments as they come from a model: `schedule_recall`,
        `list_recalls`, `reschedule_recall`, `skip_recall`, `cancel_recall`. Raises ToolRefused,
        also for arguments that there are not."""
        tool = next((tool for tool in catalog.TOOLS if tool.name == name), None)
        if tool is None:
            known = ", ".join(tool.name for tool in catalog.TOOLS)
            raise ToolRefused(f"there is no tool {name[:60]!r}", f"one of {known}")
        known = tool.input_schema["properties"]
        strange = [repr(one[:60]) for one in given or {} if one not in known]
        if strange:
            raise ToolRefused(
                f"{name} has no argument {', '.join(strange[:5])}",
                f"with these alone: {', '.join(known)}" if known else "without arguments",
            )
        values: dict[str, Any] = {
            {"in": "after"}.get(one, one): value for one, value in (given or {}).items()
        }
        match name:
            case "schedule_recall":
                return await self.schedule(values.pop("message", None), **values)
            case "list_recalls":
                return await self.list(**values)
            case "reschedule_recall":
                return await self.reschedule(**values)
            case "skip_recall":
                return await self.skip(**values)
            case _:
                return await self.cancel(**values)

    async def _one(
        self, conn: Connection, given: str | None, done: str, *, recurring: bool = False
    ) -> Seen:
        """The recall that is meant: the one of that id, else the only one that can be; held until
        the transaction ends. `done`: what is done to it. Raises ToolRefused."""
        id = arguments.text("id", given, "the id that schedule_recall or list_recalls gave")
        found = [Seen.of(row) for row in await self._ask(conn, self._sql["own"], {"id": id})]
        if id is not None:
            if not found:
                raise ToolRefused(
                    f"there is no recall {id[:80]!r} in this conversation",
                    "list_recalls, which shows the ids that there are",
                )
            if found[0].recall.status in FINAL:
                raise ToolRefused(
                    f"recall {found[0].recall.id} is {found[0].recall.status} already",
                    "list_recalls, which shows what is still to come",
                )
        fit = [one for one in found if one.recall.call_type == "recurring" or not recurring]
        if not fit and found:
            raise ToolRefused(
                f"recall {found[0].recall.id} comes once: there is nothing to skip",
                "cancel_recall, or reschedule_recall for another time",
            )
        if not fit:
            raise ToolRefused(
                f"nothing is {done}: this conversation has no pending recall", "schedule_recall"
            )
        # From inside a run, what is meant is what waits behind it.
        waiting = [one for one in fit if not one.in_run]
        if len(fit) > 1 and len(waiting) != 1:
            now = await self._now(conn)
            raise ToolRefused(
                f"nothing is {done}: there are {len(fit)} recalls that could be meant:\n"
                + "\n".join(
                    words.line(one, words.zone_of(one.recall, None), now) for one in fit[:LISTED]
                ),
                "the same with the id of one",
            )
        return fit[0] if len(fit) == 1 else waiting[0]

    async def _no_room(self, conn: Connection, zone: Zone) -> ToolRefused:
        """The session has as many pending recalls as it may have."""
        now = await self._now(conn)
        rows = await self._ask(conn, self._sql["own_live"], {"most": LISTED})
        taken = [seen for seen in map(Seen.of, rows) if seen.recall.status == "pending"]
        which = "; ".join(
            f"{words.comes(seen, zone, now)}, id {seen.recall.id}" for seen in taken[:LISTED]
        )
        now_in = next((s for s in taken if s.in_run and s.recall.call_type == "recurring"), None)
        rule = "one pending recall" if len(taken) < 2 else f"{len(taken)} pending recalls"
        return ToolRefused(
            f"not scheduled: {rule} a session, and this one has "
            f"{'that' if which else 'it'} already ({which or 'it changes just now'}). "
            + words.now_is(now, zone).rstrip("."),
            # A recurring recall keeps its place during its runs, too.
            "reschedule_recall or cancel_recall, or schedule_recall from inside its run"
            if now_in is None
            else "reschedule_recall for its next time; schedule_recall when this run has ended",
        )

    def _about(self, sentences: Sequence[str], seen: Seen, zone: Zone, now: datetime) -> Answer:
        text = " ".join([*sentences, words.now_is(now, zone), f"Id: {seen.recall.id}"])
        return Answer(text, {**_now(now, zone), "recall": words.view(seen, zone, now)})

    async def _now(self, conn: Connection) -> datetime:
        now: datetime = (await self._ask(conn, self._client["clock"], {}))[0]["now"]
        return now

    async def _act(self, conn: Connection, name: str, values: Mapping[str, Any]) -> Rows:
        """A statement that acts on recalls by id, and records it."""
        return await self._ask(conn, self._client[name], {**values, **self._recalls.by})

    async def _ask(self, conn: Connection, statement: str, values: Mapping[str, Any]) -> Rows:
        """A statement's rows. Statements of agent.sql have the session among their values."""
        values = {**values, "session_id": self._session}
        return await BorrowedCursor(conn).ask(statement, values)

    async def _guarded(self, act: Callable[[Connection], Awaitable[Answer]]) -> Answer:
        """What `act` answers, in one transaction. Raises ToolRefused, and nothing else, for all
        that a model, an operator or PostgreSQL can do wrong."""
        begun = False
        task = asyncio.current_task()
        assert task is not None
        self._going_on.add(task)
        try:
            async with asyncio.timeout(DEADLINE):
                async with self._recalls.transaction() as conn:
                    begun = True
                    return await act(conn)
        except ToolRefused:
            raise
        except ArgumentError as error:
            raise ToolRefused(str(error), *error.todo) from None
        except LimitExceeded as error:
            raise ToolRefused(str(error), error.instead) from None
        except errors.ForeignKeyViolation as error:
            raise ToolRefused(
                "this conversation does not exist any more: nothing can be scheduled in it",
                "tell the person so",
            ) from error
        except (errors.DataError, UnfitKey, ValueError) as error:
            raise ToolRefused(
                f"it can't be stored: {_first_line(error)}", "other values"
            ) from error
        except (
            TimeoutError,
            PoolTimeout,
            TooManyRequests,
            psycopg.OperationalError,
            psycopg.InterfaceError,
            OSError,
        ) as error:
            raise _unreachable(begun) from error
        except psycopg.Error as error:
            raise ToolRefused(
                "the scheduler's database refuses it: nothing was done, and trying again does not "
                "help until its operator has looked",
                "tell the person that the scheduler needs its operator",
            ) from error
        finally:
            self._going_on.discard(task)


def _unreachable(begun: bool) -> ToolRefused:
    if not begun:
        return ToolRefused(
            "the scheduler's database can't be reached just now: nothing was done",
            "the same call again in a minute",
            unreachable=True,
        )
    return ToolRefused(
        "the scheduler's database stopped answering, so it is not known whether it was done",
        "list_recalls in a minute, and the same call again if it was not",
        unreachable=True,
    )


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "?", "!")) else f"{sentence}."


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(".")


def _now(now: datetime, zone: Zone) -> dict[str, str]:
    return {"now": words.said(now, zone), "now_at": words.rfc3339(now)}
