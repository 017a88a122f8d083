"""What people do on the pages: one recall's action, an edit with its preview, and acting on many.

Each runs in PostgreSQL under the console's account and is on record under the user's name. What
does not apply says why, in the words of the command line. Acting on many is a job: which recalls
are meant is decided when they are shown to a person, who agrees by their number; then they are
taken batch by batch, and it can be stopped between two.

Never here: who the user is (access), what an action does (operations.actions).
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, tzinfo
from typing import Any

import psycopg
from psycopg import errors

from .. import cadence, statements
from ..cadence import KEEP, Keep
from ..database.connection import DatabaseUnavailable, StatementRejected
from ..database.identity import Identity
from ..durations import length
from ..events import Events
from ..operations import actions, queues
from ..operations.actions import Action, By, refusals
from ..operations.arguments import (
    NONE,
    delta,
    explained,
    given,
    instant,
    is_past,
    known_queue,
    number,
)
from ..operations.bulk import Tally, act_on_batch, batches, counted, unknown_batch
from ..operations.connection import clock
from ..selection import Chosen, Selection, choose, named
from ..settings import ALL_QUEUES
from ..terminal import USAGE, ZONE, Trouble, explain, local, seconds
from .database import Connection, Database, Doubt, impatient
from .pages import upcoming

CANCELLED = "cancelled in the console"
"""The reason of what is cancelled here."""
BULK_MOST = 100_000
"""Recalls of one job, at most."""
SHOWN = 10
"""Recalls that are shown before the question; for more of them their number has to be typed."""
TRIES, PAUSE = 5, 0.2
"""How often what somebody else has locked is tried again, and seconds before each try."""
OFFERED_MOST, OFFERED_FOR = 50, 900.0
"""Choices that wait for a person to agree, and seconds for which each does."""
OFFERED_IDS = 300_000
"""Recalls of them all: some ten megabytes for each hundred thousand."""
RUNNING_MOST = 8
"""Jobs at once: each uses a connection for a part of the time."""
JOBS_MOST = 100
"""Jobs that are remembered."""

SAYS = {
    "fire": "Fire",
    "retry": "Retry",
    "skip": "Skip",
    "pause": "Pause",
    "resume": "Resume",
    "cancel": "Cancel",
}
"""Actions of one recall without further values, and what the button says."""
BULK = ("retry", "pause", "resume", "fire", "cancel")
WORDS = {
    "retry": "Run again, now, each with all its attempts and under a new key",
    "pause": "Hold back until resumed; current runs are not interrupted",
    "resume": "Let run again; what was missed meanwhile runs once",
    "fire": "Run now: a recurring one has an extra run besides its schedule",
    "cancel": "End for good; calls in progress are aborted",
}


def offered(row: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The actions that apply to a recall as it is: name, what the button says, what it will do."""
    live = row["status"] in ("pending", "running")
    leased, recurring = row["lease"] is not None, row["call_type"] == "recurring"
    found = []
    if row["status"] in ("failed", "cancelled"):
        found.append(
            (
                "retry",
                "It runs now, with all its attempts, under a new key: the API sees a new run.",
            )
        )
    if live and not leased and row["paused_at"] is None:
        found.append(
            (
                "fire",
                "It has an extra run now; what is planned stays as it is."
                if recurring
                else "It runs now instead of at its time.",
            )
        )
    if live and recurring and row["interval_seconds"]:
        found.append(
            (
                "skip",
                "The occurrence after the current run is left out."
                if leased
                else "The next occurrence is left out, and it goes on with the one after it.",
            )
        )
    if live and row["paused_at"] is not None:
        found.append(("resume", "It runs at its time again; what was missed runs once."))
    elif live:
        run = " The current run is not interrupted." if leased else ""
        found.append(("pause", f"Nothing is called until somebody resumes it.{run}"))
    if live:
        run = " The call in progress is aborted." if leased else ""
        found.append(("cancel", f"It ends for good: nothing is called any more.{run}"))
    return [(name, SAYS[name], does) for name, does in found]


def action_of(name: str, by: By) -> Action | None:
    """An action without further values."""
    match name:
        case "cancel":
            return actions.cancel(by, CANCELLED)
        case "skip":
            return actions.skip(by)
        case "pause":
            return actions.pause(by)
        case "resume":
            return actions.resume(by)
        case "retry":
            return actions.retry(by)
        case "fire":
            return actions.fire(by)
        case _:
            return None


class Changed(Trouble):
    """A recall is no longer as it was when a person saw it."""

    def __init__(self, id: str, what: str = "it") -> None:
        super().__init__(
            f"{id}: {what} has changed since the page was drawn (where you clicked twice, by the "
            "first click), so this was not done",
            "see the recall as it is now, and do it again if you still mean it",
        )


AGAIN = ("fire", "retry", "skip")
"""Actions that do more where they are done twice."""


def version(row: Mapping[str, Any]) -> str:
    """What stands for a recall as it is, in a form: another one once it was called, moved, paused
    or acted on. A renewed lease is no change."""
    parts = [
        *(row["status"], row["call_type"], row["trigger_at"], row["occurrence"], row["rekey"]),
        *(row["skips"], row["attempt"], row["paused_at"], row["fired_at"], row["lease"]),
        None if row["lease"] else row["lease_until"],
    ]
    text = "\n".join(
        part.astimezone(UTC).isoformat() if isinstance(part, datetime) else str(part)
        for part in parts
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def act_on_one(conn: Connection, id: str, action: Action, seen: str | None = None) -> str:
    """Act on one recall, in a transaction. `seen`: its version as a person saw it; None: whatever
    it is now. Returns what was done, in a sentence; raises Trouble that says why it did not apply,
    and Changed."""
    if seen is not None and (row := _held(conn, id)) is not None and version(row) != seen:
        raise Changed(row["id"])
    action.begin(conn)
    rows = action.act(conn, [id])
    for refusal in refusals(conn, rows, [id], action.why_not):
        raise Trouble(refusal.what, refusal.hint)
    return "; ".join(action.says(row) for row in rows)


def _held(conn: Connection, id: str) -> dict[str, Any] | None:
    """The recall, locked until the transaction ends."""
    return conn.execute(statements.load("console")["held"].encode(), {"id": id}).fetchone()


def reschedule(fields: Mapping[str, str], by: By, hear: Callable[[str], None]) -> Action:
    """`in`: a duration, or `at`: a time, by the clock of `tz` or of the reader. Raises Trouble."""
    after, at = fields.get("in"), fields.get("at")
    if (after is None) == (at is None):
        what = "no time is given" if at is None else "`in` and `at` exclude each other"
        raise Trouble(what, "in: 90s, or at: 2027-01-31T09:00", status=USAGE)
    when: dict[str, Any] = {
        "at": None if at is None else instant(at, "at", _zone(fields), hear),
        "after": None if after is None else seconds(after, "in"),
    }

    def begin(conn: Connection) -> None:
        if is_past(when["at"], clock(conn), now_if_past="now_if_past" in fields):
            when.update({"at": None, "after": 0.0})

    return actions.reschedule(by, when, begin)


def _zone(fields: Mapping[str, str]) -> tzinfo | None:
    name = fields.get("tz") or fields.get("time_zone")
    if name is None or name == NONE:
        return ZONE.get()
    with explained("tz: an IANA name, such as Europe/Berlin"):
        return cadence.zone(name)


def act_on_queue(
    conn: Connection, name: str, queue: str, reason: str | None, by: By, here: Identity
) -> str | None:
    """Pause or resume a queue, or all, in a transaction. Returns what was done; None where there is
    no such action."""
    every = queue == ALL_QUEUES
    values: dict[str, Any] = {"queues": [queue], "reason": reason, "every": every}
    notes = []
    if name == "pause":
        # Twice where somebody else paused it in the same instant: seen by then.
        rows = actions.act(conn, "pause_queues", values, by) or actions.act(
            conn, "pause_queues", values, by
        )
        done = queues.paused(rows[0])
        if not every and (note := queues.strange(queues.state(conn, queue, here), queue)):
            notes.append(note)
    elif name == "resume":
        done = queues.resumed(bool(actions.act(conn, "resume_queues", values, by)))
        if not every and queues.state(conn, queue, here)["all_paused"]:
            notes.append(f"{queues.ALL_PAUSED}.")
    else:
        return None
    which = "all queues" if every else f"queue {queue}"
    return " ".join([f"{which}: {done}.", *(note[:1].upper() + note[1:] for note in notes)])


# --- edits ----------------------------------------------------------------------------------------

RULE = ("every", "grid", "cron")
TAKEN_AWAY = ("time_zone", "until", "times", "failures", "grace", "jitter", "comment")
EDITED = (*RULE, *TAKEN_AWAY, "message", "queue")
"""The fields of an edit."""
TEXTS = ("message", "comment")
"""Those of them that are shown where RECALL_CONSOLE_MESSAGES says so."""


def edited_fields(fields: Mapping[str, str]) -> dict[str, str]:
    """What a form changes: the fields that were not as they are now when the form was shown. A
    field that was emptied takes its value away; of a program that sends no form, what it gives.
    Raises Trouble for a message that was emptied."""
    found = {}
    for name in EDITED:
        said, was = fields.get(name), fields.get(f"was_{name}")
        if said is None or said == was or (said == "" and was is None):
            continue
        if said == "":
            if name == "message":
                raise Trouble("a message can be replaced, and not taken away", status=USAGE)
            if name in TAKEN_AWAY:
                found[name] = NONE
            continue
        found[name] = said
    return found


def edit_values(
    fields: Mapping[str, str], hear: Callable[[str], None]
) -> tuple[dict[str, Any], tuple[str | Keep, str | Keep | None, str | Keep]]:
    """An edit as operations.actions.edit takes it. Raises Trouble."""
    if not fields:
        raise Trouble("nothing is changed", "change a field", status=USAGE)
    where = _zone(fields)
    rule: dict[str, Any] = {
        "every": KEEP if "every" not in fields else delta(fields["every"], "every"),
        "grid": KEEP if "grid" not in fields else delta(fields["grid"], "grid"),
        "cron": fields.get("cron", KEEP),
        "time_zone": given(fields.get("time_zone"), lambda text: text),
        "until": given(fields.get("until"), lambda text: instant(text, "--until", where, hear)),
        "times": given(fields.get("times"), lambda text: number(text, "times")),
        "failures": given(fields.get("failures"), lambda text: number(text, "failures")),
        "grace": given(fields.get("grace"), lambda text: delta(text, "grace")),
        "jitter": given(fields.get("jitter"), lambda text: delta(text, "jitter")),
    }
    texts = (
        fields.get("message", KEEP),
        given(fields.get("comment"), lambda text: text),
        KEEP if "queue" not in fields else known_queue(fields["queue"]),
    )
    return rule, texts


def wrong_field(fields: Mapping[str, str], now: datetime) -> str | None:
    """The field of an edit that was refused that makes no sense by itself, or is the only one that
    was changed; None: which one is not known."""
    try:
        edited = edited_fields(fields)
    except Trouble:
        return "message"  # It was emptied.
    for name, text in edited.items():
        try:
            with explained():
                if name == "time_zone" and text != NONE:
                    cadence.zone(text)
                if name == "cron":
                    cadence.check(text, None, now)
            if name != "time_zone":
                edit_values({name: text}, lambda note: None)
        except Trouble:
            return name
    return next(iter(edited)) if len(edited) == 1 else None


def edit(
    conn: Connection,
    id: str,
    fields: Mapping[str, str],
    by: By,
    here: Identity,
    *,
    messages: bool = True,
) -> str:
    """Change a live recall, in a transaction. `messages`: whether they are shown here. Returns what
    was changed. Raises Trouble, and Changed where somebody else has written one of these fields
    since the form was shown."""
    notes: list[str] = []
    changed = edited_fields(fields)
    if not messages and (hidden := [name for name in TEXTS if name in changed]):
        raise Trouble(
            f"the {hidden[0]} is hidden here, and can't be edited",
            "RECALL_CONSOLE_MESSAGES=shown",
        )
    rule, texts = edit_values(changed, notes.append)
    if (row := _held(conn, id)) is not None:
        now = as_typed(row, messages=True)
        rules = RULE if any(name in changed for name in RULE) else ()
        for name in dict.fromkeys((*changed, *rules)):
            if fields.get(f"was_{name}", now[name]) != now[name]:
                raise Changed(row["id"], name)
    rows, changes = actions.edit(conn, id, rule, texts, by)
    for refusal in refusals(conn, rows, [id], actions.why_not_edited):
        raise Trouble(refusal.what, refusal.hint)
    if "queue" in changes:
        state = queues.state(conn, rows[0]["queue"], here)
        if (note := queues.unserved(state, rows[0]["queue"])) is not None:
            notes.append(f"Note: {note}.")
    return " ".join([actions.edited(rows[0], changes) + ".", *notes])


def preview(conn: Connection, id: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """What an edit would make of a recall: it is written and undone, so that the database itself
    says it. Raises Trouble."""
    notes: list[str] = []
    rule, texts = edit_values(edited_fields(fields), notes.append)
    by: By = {"actor": "preview", "via": "console"}
    with conn.transaction(force_rollback=True):
        impatient(conn)
        rows, changes = actions.edit(conn, id, rule, texts, by)
        now = clock(conn)
    for refusal in refusals(conn, rows, [id], actions.why_not_edited):
        raise Trouble(refusal.what, refusal.hint)
    row = rows[0]
    return {"now": now, "row": row, "changes": changes, "notes": notes, **upcoming(row, now)}


def as_typed(row: Mapping[str, Any], *, messages: bool) -> dict[str, str]:
    """A recall's rule as its form shows it."""
    recurring = row["call_type"] == "recurring"
    interval = row["interval_seconds"]
    distance = "" if interval is None or interval <= 0 else length(interval)
    found = {
        "every": distance if recurring and row["cadence"] == "interval" else "",
        "grid": distance if recurring and row["cadence"] == "grid" else "",
        "cron": (row["cron"] or "") if recurring and row["cadence"] == "cron" else "",
        "time_zone": row["time_zone"] or "",
        "until": local(row["until_at"]),
        "times": "" if row["times"] is None else str(row["times"]),
        "failures": "" if row["failures_most"] is None else str(row["failures_most"]),
        "grace": "" if row["grace_seconds"] is None else length(row["grace_seconds"]),
        "jitter": length(row["jitter_seconds"]) if row["jitter_seconds"] else "",
        "queue": row["queue"],
    }
    if messages:
        found["message"] = row["additional_context_message"] or ""
        found["comment"] = row["internal_comment"] or ""
    return found


# --- many -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Choice:
    """Recalls that were shown to a person, who has not agreed yet."""

    action: str
    chosen: Chosen
    rows: list[dict[str, Any]]
    """The first of them."""
    at: float
    cut: bool
    """Whether more are meant than one job takes."""

    @property
    def number(self) -> int:
        return len(self.chosen.ids)


@dataclass(slots=True)
class Job:
    id: str
    action: str
    by: str
    ids: int
    started: datetime
    done: str
    """The action's participle."""
    tally: Tally = field(default_factory=Tally)
    handled: int = 0
    """Recalls that a batch was through with."""
    stopped: bool = False
    """Whether somebody wants it to stop."""
    ended: str | None = None
    """How it ended, in a sentence."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def running(self) -> bool:
        return self.ended is None

    def says(self) -> list[str]:
        """What became of the recalls so far, a clause each."""
        tally = self.tally
        parts = [f"{tally.done:,} of {counted(self.ids)} {self.done}"]
        parts += [f"{n:,} {why}" for why, n in tally.unchanged.items()]
        if tally.left:
            parts.append(f"{tally.left:,} changed meanwhile, and left alone")
        parts += [f"{n:,} refused: {why}" for why, n in tally.refused.most_common()]
        return parts


class Many:
    """Acting on many recalls."""

    def __init__(self, database: Database, log: Events) -> None:
        self._database = database
        self._log = log
        self._choices: dict[str, Choice] = {}
        self.jobs: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    def choose(
        self, conn: Connection, name: str, filters: Mapping[str, list[str]], ids: list[str]
    ) -> Choice:
        """The recalls that are meant now: those that were selected, or all that the filters find.
        Raises SelectionError, Trouble where there are none."""
        action = action_of(name, {"actor": None, "via": "console"})
        assert action is not None
        if ids:
            with conn.transaction():
                impatient(conn)
                chosen = choose(conn, Selection(states=action.states, limit=None), ids)
        else:
            given_filters = {k: v for k, v in filters.items() if k not in ("limit", "offset")}
            selection = replace(Selection.parse(given_filters), limit=BULK_MOST)
            if selection.is_all:
                raise Trouble(
                    "no filter is given: all recalls would be meant", "narrow the search first"
                )
            if not selection.states and not selection.statuses:
                selection = replace(selection, states=action.states)
            with conn.transaction():
                impatient(conn)
                chosen = choose(conn, selection)
        if not chosen.ids:
            raise Trouble(f"no recall matches that can be {action.done}", "another search")
        rows = named(conn, chosen.ids[:SHOWN])
        return Choice(name, chosen, rows, time.monotonic(), len(chosen.ids) >= BULK_MOST)

    def offer(self, choice: Choice) -> str:
        """Remember a choice until a person agrees; returns its name."""
        oldest = time.monotonic() - OFFERED_FOR
        self._choices = {k: c for k, c in self._choices.items() if c.at > oldest}
        while len(self._choices) >= OFFERED_MOST:
            del self._choices[next(iter(self._choices))]
        name = secrets.token_urlsafe(16)
        self._choices[name] = choice
        while len(self._choices) > 1 and (
            sum(waiting.number for waiting in self._choices.values()) > OFFERED_IDS
        ):
            del self._choices[next(iter(self._choices))]
        return name

    def offered(self, name: str) -> Choice | None:
        choice = self._choices.get(name)
        fresh = choice is not None and choice.at > time.monotonic() - OFFERED_FOR
        return choice if fresh else None

    def start(self, choice: Choice, by: By, name: str | None = None) -> Job:
        """Act on them, in the background. Raises Trouble where that can't begin now."""
        if self._stopping:
            raise Trouble("the console stops: nothing was done", "again when it has started")
        if len(self._tasks) >= RUNNING_MOST:
            raise Trouble(
                f"{RUNNING_MOST} jobs run already: nothing was done", "again when one has ended"
            )
        if name is not None:
            self._choices.pop(name, None)
        action = action_of(choice.action, by)
        assert action is not None
        job = Job(
            secrets.token_urlsafe(12),
            choice.action,
            by["actor"] or "",
            choice.number,
            datetime.now().astimezone(),
            action.done,
        )
        while len(self.jobs) >= JOBS_MOST and (
            over := next((job.id for job in self.jobs.values() if not job.running), None)
        ):
            del self.jobs[over]
        self.jobs[job.id] = job
        self._log.tell("console.acted", user=job.by, action=job.action, recalls=job.ids)
        task = asyncio.create_task(self._run(job, action, choice.chosen))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    async def _run(self, job: Job, action: Action, chosen: Chosen) -> None:
        try:
            job.ended = await self._all(job, action, chosen)
        except (psycopg.Error, DatabaseUnavailable, StatementRejected, Trouble) as error:
            known = explain(error)
            reason = str(error) if known is None else known.what
            # Cut off before its commit was sent, the batch is undone.
            rest = unknown_batch() if isinstance(error, Doubt) else "the rest was not."
            job.ended = f"Broken off: {reason}. What is counted here was done; {rest}"
        finally:
            if job.ended is None:
                job.ended = f"Stopped, as the console stops: {unknown_batch()}"
            job.changed.set()

    async def _all(self, job: Job, action: Action, chosen: Chosen) -> str:
        ids = chosen.ids
        for tries_left in reversed(range(TRIES + 1)):
            locked: list[str] = []
            for part in batches(ids):
                if job.stopped:
                    return "Stopped: the others are as they were."
                last = not tries_left

                def act(conn: Connection, part: list[str] = part, last: bool = last) -> list[str]:
                    batch = act_on_batch(conn, action, chosen, part, job.tally, last=last)
                    return batch.locked

                still = await self._database.act_in_batch(act)
                locked += still
                job.handled += len(part) - len(still)
                job.changed.set()
            ids = locked
            if not ids:
                break
            await asyncio.sleep(PAUSE)
        return "Done." if not job.tally.refused else "Done, but not all."

    async def stop(self, patience: float) -> None:
        """Let the batches end that have begun."""
        self._stopping = True
        for job in self.jobs.values():
            job.stopped = True
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=patience)
            for task in late:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


def is_forbidden(error: BaseException) -> bool:
    """Whether PostgreSQL lets this account not act."""
    return isinstance(error, errors.InsufficientPrivilege)
