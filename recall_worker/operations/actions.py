"""What can be done to recalls, and why it does not apply to one.

Each is one guarded statement on the rows that it can apply to. The other rows are read afterwards,
and a Refusal says why it did not apply and what to do instead. Races with claim, settle, cancel and
deletion are decided by the row's lock: an operation acts on the row as it finds it. Each records
itself in recall_actions, under the name of who acts.
docs/operations.md says what each does in every state.

Never here: who is asked before, and which recalls are meant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

from psycopg import errors

from .. import cadence, client, keys, statements
from ..cadence import KEEP, Keep
from ..database.connection import error_text
from ..recall import Recall
from ..terminal import Trouble, command, local
from .arguments import explained, refused_queue
from .connection import Connection
from .words import ends, nature

Row = Mapping[str, Any]
By = Mapping[str, str | None]
"""Who acts, for the record: `actor` and `via`."""

CANCELLED = "cancelled on the command line"
"""The reason of what is cancelled here."""
_TEXTS = {"additional_context_message": "message", "internal_comment": "comment"}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an operation did not apply to a recall."""

    kind: str
    """In a few words that can be counted: `paused`."""
    what: str
    """In a sentence that names the recall."""
    hint: str


@dataclass(frozen=True, slots=True)
class Action:
    """An operation on recalls."""

    name: str
    done: str
    """Its participle: `cancelled`."""
    states: tuple[str, ...]
    """Which recalls are meant where no state was asked for: those that it makes sense for."""
    act: Callable[[Connection, list[str]], list[dict[str, Any]]]
    """Does it, and returns the rows as they are then; not those that it did not apply to."""
    why_not: Callable[[Row], Refusal]
    """From a row of the statement `states`: why it did not apply, and what to do instead."""
    says: Callable[[Row], str]
    """From a row that `act` returned: what was done, a clause."""
    unchanged: Callable[[Row], str | None] = lambda _: None
    """Why a row that `act` returned was left as it was; None where it was not."""
    begin: Callable[[Connection], None] = lambda _: None
    """What has to be asked first."""
    literal: bool = False
    """Whether a `*` in the session that is named stands for itself."""


def act(conn: Connection, name: str, values: Mapping[str, Any], by: By) -> list[dict[str, Any]]:
    """Run a statement of sql/client.sql that acts."""
    return conn.execute(statements.load("client")[name].encode(), {**values, **by}).fetchall()


def cancel(by: By, reason: str = CANCELLED, *, literal: bool = False) -> Action:
    return Action(
        "cancel",
        "cancelled",
        ("live",),
        lambda conn, ids: act(conn, "cancel", {"ids": ids, "reason": reason}, by),
        _why_not_live,
        cancelled,
        literal=literal,
    )


def cancelled(row: Row) -> str:
    # Where the lease had ended, there is nobody to abort it.
    open_call = row["lease"] and row["lease_until"] and row["lease_until"] > row["updated_at"]
    return f"cancelled{', its call is aborted' if open_call else ''}"


def skip(by: By) -> Action:
    return Action(
        "skip",
        "skipped",
        ("waiting", "in-run"),
        lambda conn, ids: act(conn, "skip", {"ids": ids, "session_id": None}, by),
        _why_not_skipped,
        skipped,
    )


def skipped(row: Row) -> str:
    return "the occurrence after this run is left out" if row["lease"] else f"next {_due(row)}"


def pause(by: By) -> Action:
    def says(row: Row) -> str:
        run = "; the current run is not interrupted" if row["lease"] else ""
        return f"paused since {local(row['paused_at'])}{run}"

    return Action(
        "pause",
        "paused",
        ("waiting", "in-run"),
        lambda conn, ids: act(conn, "pause", {"ids": ids}, by),
        _why_not_live,
        says,
    )


def resume(by: By) -> Action:
    def says(row: Row) -> str:
        what = "resumed" if row["resumed"] else "was not paused"
        if row["lease"] is None and row["fired_at"] is not None:
            return f"{what}; its extra run is due {local(row['lease_until'])}"
        return f"{what}; {'it is in a run' if row['lease'] else _due(row)}"

    return Action(
        "resume",
        "resumed",
        ("paused",),
        lambda conn, ids: act(conn, "resume", {"ids": ids}, by),
        _why_not_live,
        says,
        lambda row: None if row["resumed"] else "not paused",
    )


def retry(by: By) -> Action:
    taken: dict[str, int] = {}

    def retried(conn: Connection, ids: list[str]) -> list[dict[str, Any]]:
        """All at once, and one by one only where the slot of a session is taken."""
        try:
            with conn.transaction():
                return act(conn, "retry", {"ids": ids}, by)
        except errors.UniqueViolation as error:
            if len(ids) == 1:
                violated = {"schema": error.diag.schema_name, "name": error.diag.constraint_name}
                text = statements.load("client")["violated"].encode()
                taken[ids[0]] = keys.pending_most(conn.execute(text, violated).fetchone()) or 1
                return []
        return [row for id in ids for row in retried(conn, [id])]

    def says(row: Row) -> str:
        # The key of a recall that was moved is decided by the claim, which resolves the move.
        moved = row["planned_at"] not in (None, row["trigger_at"]) or row["skips"]
        return (
            "due now, under a new key"
            if moved
            else f"due now, under the key {row['id']}:{row['occurrence']}.{row['rekey']}"
        )

    def why_not(row: Row) -> Refusal:
        most = taken.get(row["given"])
        return _why_taken(row, most) if most is not None else _why_not_retried(row)

    return Action("retry", "retried", ("failed",), retried, why_not, says)


def fire(by: By) -> Action:
    def says(row: Row) -> str:
        if row["already"]:
            return "due already: nothing was changed"
        if row["fired_at"] is None:
            return "due now"
        return f"an extra run, now; what is planned stays: {_due(row)}"

    return Action(
        "fire",
        "made due now",
        ("waiting",),
        lambda conn, ids: act(conn, "fire", {"ids": ids}, by),
        _why_not_fired,
        says,
        lambda row: "due already" if row["already"] else None,
    )


def reschedule(
    by: By,
    when: Mapping[str, Any],
    begin: Callable[[Connection], None] = lambda _: None,
) -> Action:
    """`when`: `at`, a time, or `after`, seconds; read when it is done."""

    def says(row: Row) -> str:
        return f"{'after this run, ' if row['lease'] else ''}{_due(row)}"

    return Action(
        "reschedule",
        "rescheduled",
        ("live",),
        lambda conn, ids: act(conn, "reschedule", {"ids": ids, **when}, by),
        _why_not_rescheduled,
        says,
        begin=begin,
    )


def edit(
    conn: Connection,
    id: str,
    rule: Mapping[str, Any],
    texts: tuple[str | Keep, str | Keep | None, str | Keep],
    by: By,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Change how a live recall recurs and ends, and its texts: message, comment, queue. Returns the
    row as it is then (none where it is not live) and the columns that differ. `rule`: as
    cadence.change takes it. Raises Trouble for what makes no sense."""
    changes: dict[str, Any] = {}
    # Held until the edit is written, so that it is judged by what stands there then.
    with conn.transaction():
        rows = act(conn, "hold", {"id": id}, by)
        if rows:
            now = conn.execute("select now() as now").fetchone()
            assert now is not None
            changes |= planned(rows[0], now["now"], rule)
            changes |= client.texts(rows[0], *texts)
        if changes:
            rows = _write(conn, *client.edit(id, changes), by)
    return rows, changes


def planned(row: Row, now: datetime, rule: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that an edit changes, with their new values. Raises Trouble."""
    try:
        with explained("recall-worker edit --help"):
            return cadence.change(Recall.of(row), now, **rule)
    except cadence.Unfit as error:
        hints = [command("show", row["id"])]
        if isinstance(rule["time_zone"], str) and rule["cron"] is KEEP:
            hints.insert(0, "--tz with --cron (or with --until, as the zone of that time)")
        raise Trouble(f"{row['id']}: {error}", *hints) from None


def _write(
    conn: Connection, statement: str, values: Mapping[str, Any], by: By
) -> list[dict[str, Any]]:
    try:
        return act(conn, statement, values, by)
    except errors.ObjectNotInPrerequisiteState as error:
        raise refused_queue(error) from None
    except errors.InsufficientPrivilege as error:
        if statement != "edit_content":
            raise
        raise Trouble(
            f"PostgreSQL forbids it: {error_text(error)}: a recall's message, comment and type "
            "are not the worker's to change",
            "the same with an account in the role recall_application (see docs/roles.md), or the "
            "tables' owner",
        ) from None


def edited(row: Row, changes: Mapping[str, Any]) -> str:
    """What an edit has changed, and what is next."""
    parts = []
    if not changes:
        parts.append("nothing to change, it is so already")
    if "call_type" in changes:
        parts.append("recurs now")
    if "queue" in changes:
        parts.append(f"in queue {row['queue']} now")
    if changes.keys() - {"call_type", "grace_seconds", "jitter_seconds", "queue"} - _TEXTS.keys():
        parts.append(f"{nature(row)}{ends(row)}")
    words = {"grace_seconds": "grace", "jitter_seconds": "jitter", **_TEXTS}
    parts += [f"{word} changed" for name, word in words.items() if name in changes]
    return f"{', '.join(parts)}; {_next(row)}"


def _next(row: Row) -> str:
    """When the recall is due next. A worker computes the moment of a cron expression that was
    edited; it is the same that is computed here."""
    paused = ", but paused" if row["paused_at"] is not None else ""
    if row["lease"] is not None:
        return f"the current run is not interrupted{paused}"
    if row["edit_of"] == row["occurrence"]:
        found = cadence.ticks(row["cron"] or "", row["time_zone"], row["edited_at"])
        when = next(islice(found, row["skips"], None), cadence.FAR)
        return f"next due {local(when)} (computed by a worker){paused}"
    return f"next {_due(row)}"


def refusals(
    conn: Connection,
    rows: list[dict[str, Any]],
    ids: list[str],
    why_not: Callable[[Row], Refusal],
) -> list[Refusal]:
    """Why nothing was done to those of the recalls that were named that are not among the rows."""
    done = {row["id"] for row in rows}
    left = [id for id in dict.fromkeys(ids) if id not in done]
    if not left:
        return []
    states = {row["given"]: row for row in act(conn, "states", {"ids": left}, {})}
    return [
        why_not(states[id])
        if id in states
        else Refusal("gone", f"there is no recall {id}", command("list"))
        for id in left
        # A uuid in capitals is another spelling of what was done.
        if id not in states or states[id]["id"] not in done
    ]


def _due(row: Row) -> str:
    return f"due {local(row['trigger_at'])}{', but paused' if row['paused_at'] is not None else ''}"


def _why_not_live(row: Row) -> Refusal:
    kind = f"{row['status']} already"
    return Refusal(kind, f"{row['id']} is {kind}", command("show", row["id"]))


def why_not_edited(row: Row) -> Refusal:
    return Refusal(
        f"{row['status']}",
        f"{row['id']} is {row['status']}: what is over can't be edited",
        command("retry", row["id"])
        if row["status"] in ("failed", "cancelled")
        else "recall-worker schedule SESSION MESSAGE",
    )


def _why_not_skipped(row: Row) -> Refusal:
    if row["status"] in ("pending", "running") and row["call_type"] != "recurring":
        kind = f"{row['call_type']}: it has no next occurrence"
        return Refusal(kind, f"{row['id']} is {kind}", command("cancel", row["id"]))
    if row["status"] in ("pending", "running"):
        kind = "no positive interval_seconds"
        return Refusal(kind, f"{row['id']} has {kind}", command("show", row["id"]))
    return _why_not_live(row)


def _why_not_rescheduled(row: Row) -> Refusal:
    if row["status"] not in ("pending", "running"):
        return _why_not_live(row)
    if row["leased"] and row["fired_at"] is None and row["call_type"] != "recurring":
        return Refusal(
            "in the one run",
            f"{row['id']} is in its one run: nothing comes after it",
            "recall-worker schedule SESSION MESSAGE --at TIME",
        )
    if row["leased"] and row["fired_at"] is None and row["times"] is not None:
        return Refusal(
            "in the last run",
            f"{row['id']} is in its last run: it has {row['times']} in all",
            command("edit", row["id"], "--times", str(row["times"] + 1)),
        )
    return Refusal(
        "ends before that time",
        f"{row['id']} ends at {local(row['until_at'])}, before that time",
        command("edit", row["id"], "--until", "TIME"),
    )


def _why_not_fired(row: Row) -> Refusal:
    if row["status"] not in ("pending", "running"):
        word = "retry" if row["status"] in ("failed", "cancelled") else "show"
        kind = f"{row['status']} already"
        return Refusal(kind, f"{row['id']} is {row['status']}", command(word, row["id"]))
    if row["leased"]:
        return Refusal(
            "in a run",
            f"{row['id']} is in a run, by {row['leased_by']}",
            command("why", row["id"]),
        )
    return Refusal("paused", f"{row['id']} is paused", command("resume", row["id"]))


def _why_not_retried(row: Row) -> Refusal:
    if row["status"] in ("failed", "cancelled"):
        return Refusal(
            "an aborted call still open",
            f"{row['id']}: its aborted call is still open",
            "the same command in a moment",
        )
    if row["status"] == "fired":
        return Refusal(
            "fired already",
            f"{row['id']} has fired: there is nothing to retry",
            "recall-worker schedule SESSION MESSAGE",
        )
    return Refusal(
        f"{row['status']} already",
        f"{row['id']} is {row['status']}: it waits or runs already",
        command("why", row["id"]),
    )


def _why_taken(row: Row, most: int) -> Refusal:
    found = command("list", "--status", "pending", "--session", row["session_id"])
    if most > 1:
        return Refusal(
            "as many pending recalls in the session as it can have",
            f"{row['id']}: its session {row['session_id']} has {most} pending recalls already, "
            "and can have no more",
            f"{found}, and cancel one of them first",
        )
    return Refusal(
        "another pending recall in the session",
        f"{row['id']}: its session {row['session_id']} has another pending recall, and can have "
        "only one",
        f"{found}, and cancel that one first",
    )
