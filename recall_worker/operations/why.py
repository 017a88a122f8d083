"""Why a recall is in its state: the evidence, which a few statements gather, and the sentence, a
pure function of it that names the first cause first."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from .. import cadence, statements
from ..database import identity
from ..database.identity import Identity
from ..fleet import CLOCK_TOLERANCE, FLEET, SILENCE, clock_back, fleet_cap
from ..recall import Recall
from ..terminal import command, local, relative, span
from .connection import Connection
from .connection import Row as WholeRow
from .story import how_told

Row = Mapping[str, Any]

ENDS = {"cancel": "cancelled", "mark_fired": "fired"}
"""Actions that end a recall, and the status that it has then."""


def evidence(conn: Connection, id: str, here: Identity) -> Row | None:
    """What the sentence is made of; None where there is no such recall. `here`: which database this
    is."""
    reads = statements.load("reads")
    asked = {**SILENCE, **here.known}
    found = conn.execute(reads["why"].encode(), {"id": id, **asked}).fetchone()
    queue = None if found is None else found["queue"]
    values = FLEET | here.known | {"queue": queue}
    fleet = conn.execute(reads["fleet"].encode(), values).fetchone()
    since = {"id": id, "tolerance": CLOCK_TOLERANCE}
    clock = conn.execute(reads["clock_back"].encode(), since).fetchone()
    told = conn.execute(reads["told"].encode(), {"id": id}).fetchall()
    ending = conn.execute(reads["ending"].encode(), {"id": id}).fetchone()
    if found is None or fleet is None or clock is None or ending is None:
        return None
    recall = Recall.of(found)
    zones: dict[str, Any] = {"zone_missing": cadence.foreign_zone(recall)}
    zones["skipped"] = cadence.skips_that_wait(recall) if found["moved"] else 0
    if (zone := zones["zone_missing"]) is not None:
        elsewhere = statements.load("zones")["known_elsewhere"].encode()
        of = {**asked, "names": [zone], "tzdata": cadence.TZDATA, "queues": [queue]}
        zones["zone_elsewhere"] = conn.execute(elsewhere, of).fetchone() is not None
    last = told[-1] if told else None
    return WholeRow({**clock, **found, **fleet, **zones, **ending, "copy": here.copy, "told": last})


def because(row: Row) -> str:
    """Why a recall is in its state: a sentence with its evidence. `row`: what the statements
    `why`, `fleet` and `clock_back` return, `copy`, whether the database is one, and `zone_missing`,
    the name of its time zone where this process does not know it, with `zone_elsewhere`, whether
    others may. `told`: where it has failed, the last row of `told`, if there is one. Of one
    that has ended, what the statement `ending` returns.
    """
    now: datetime = row["now"]
    if row["status"] is None:
        return "Its status is null: no worker takes it up."
    if row["status"] not in ("pending", "running"):
        return _ended(row, now)
    parts = [_waits_for(row, now)]
    if row["paused_at"] is not None:
        by = f" by {row['paused_by']}" if row.get("paused_by") else ""
        parts.insert(0, f"paused since {local(row['paused_at'])}{by}")
    if row["queue_paused_at"] is not None:
        parts.append(_paused_queue(row))
    if row["lease"] is not None and row["paused_at"] is None and not _in_a_run(row, now):
        parts += filter(None, [fleet_cap(row)])
    parts += filter(None, [clock_back(row), _unknown_zone(row), _history(row)])
    if not _in_a_run(row, now):
        if row["copy"]:
            parts.append(identity.IS_A_COPY)
        elif row["alive"] and row["held"] == row["alive"]:
            parts.append("all live workers are paused: they were started with --paused")
        if not row["alive_in_all"]:
            parts.append("no live worker is known: start one with recall-worker run")
        elif not row["alive"]:
            parts.append(
                f"no live worker serves its queue {row['queue']}: start one with "
                f"{command('run', '--queue', row['queue'])}"
            )
        elif row["breakers"]:
            of = (
                "the one live worker"
                if row["alive"] == 1
                else f"{row['breakers']} of {row['alive']} live workers"
            )
            parts.append(
                f"the breaker is open in {of}: the endpoint is failing; only test calls are "
                "sent until it answers"
            )
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _ended(row: Row, now: datetime) -> str:
    """When and by whom it was ended, and what its last call was."""
    at = row["ended_at"] or row["updated_at"]
    head = f"{row['status'].capitalize()} {local(at)} ({relative(at, now)})"
    reason = row["reason"]
    # An action that was the last one, and leads to this status.
    if ENDS.get(row.get("action") or "") == row["status"]:
        head += f" by {row['action_by']} ({row['action_via']})"
        reason = None if row["action"] == "cancel" else reason
    elif row["ended_at"] is None:
        # The application's own statement writes neither a time nor a reason; the row's are from
        # the last call.
        head += " by the application"
        reason = None
    parts = [f"{head}: {reason}" if reason else head]
    if _in_a_run(row, now):
        parts.append(f"its call by worker {row['leased_by']} is being aborted")
    parts.append(_last_call(row))
    if row["status"] == "failed" and row.get("told") is not None:
        parts.append(f"told: {how_told(row['told'], now)}")
    return f"{'; '.join(parts)}."


def _last_call(row: Row) -> str:
    """How its last call ended, and how late the occurrence was."""
    if row.get("call_outcome") is None:
        if row["last_outcome"]:
            return f"its last call ended as {row['last_outcome']}"
        return "no call of it is on record"
    status = f" (HTTP {row['call_status']})" if row["call_status"] is not None else ""
    times = f" {row['call_calls']} times" if row["call_calls"] > 1 else ""
    late = "" if row["call_late"] is None else f", {span(row['call_late'])} late,"
    sent = (
        "was never sent"
        if row["call_sent_at"] is None
        else f"was sent {local(row['call_sent_at'])}{late}"
    )
    which = (
        f"extra run {-row['call_rekey']}"
        if row["call_rekey"] < 0
        else f"occurrence {row['call_occurrence']}"
    )
    return (
        f"its last call ({which}, attempt {row['call_attempt']}) "
        f"{sent} and ended as {row['call_outcome']}{status}{times}"
    )


def _waits_for(row: Row, now: datetime) -> str:
    if row["lease"] is not None:
        which = (
            f"occurrence {row['occurrence']}"
            if row["fired_at"] is None
            else f"extra run {row['fires']}"
        ) + f", attempt {row['attempt']}"
        held = (
            f"in a run since {local(row['leased_at'])}: {which}, leased by worker "
            f"{row['leased_by']}"
        )
        if row["run_reference"] is not None:
            held += f", accepted by the API at {local(row['delivered_at'])} and polled since"
        if _in_a_run(row, now):
            if row.get("holder_alive") is False:
                seen = row["holder_seen_at"]
                heard = f" (last heartbeat {relative(seen, now)})" if seen else ""
                held += (
                    f", which is silent{heard}: its lease ends "
                    f"{relative(row['lease_until'], now)}, then another worker takes over"
                )
            return held
        return f"{held}, {_lost(row['lease_until'], row['holder_seen_at'], row['paused_at'], now)}"
    if row["due_at"] is None:
        return "it is never due, as its trigger_at is null"
    if row["due_at"] > now:
        which = "" if row["fired_at"] is None else f"extra run {row['fires']} is "
        moved = (
            ", until a worker computes its next moment by the new rule"
            if row["to_replan"]
            else f", after {_times(row['skipped'], 'skipped occurrence')}"
            if row.get("skipped")
            else ", where it was moved"
            if row["moved"]
            else ""
        )
        return (
            f"{which}not due until {local(row['due_at'])} ({relative(row['due_at'], now)}){moved}"
        )
    due = f"due since {local(row['due_at'])} ({relative(row['due_at'], now)})"
    if row["paused_at"] is not None:
        return due
    if row["ahead"] is not None:
        return f"{due}, but {_behind(row, now)}"
    if (cap := fleet_cap(row)) is not None:
        return f"{due}, but {cap}"
    if row["queue_paused_at"] is not None or (row["alive_in_all"] and not row["alive"]):
        return due
    if row["alive"] and row["leases"] >= row["slots"]:
        of = "the one live worker" if row["alive"] == 1 else f"{row['alive']} live workers"
        return f"{due}, but all slots are taken: {row['leases']} of {row['slots']} in {of}"
    return f"{due}, and waits to be claimed"


def _times(number: int, what: str) -> str:
    return f"1 {what}" if number == 1 else f"{number:,} {what}s"


def _paused_queue(row: Row) -> str:
    """That its queue is paused, by whom and why."""
    which = "all queues are" if row["all_paused"] else f"its queue {row['queue']} is"
    why = f": {row['queue_paused_reason']}" if row["queue_paused_reason"] else ""
    return f"{which} paused since {local(row['queue_paused_at'])} by {row['queue_paused_by']}{why}"


def _behind(row: Row, now: datetime) -> str:
    ahead = f"recall {row['ahead']}"
    if row["ahead_leased_at"] is None:
        return f"{ahead} of its session is due longer and goes first"
    run = (
        f"{ahead} since {local(row['ahead_leased_at'])}, leased by worker {row['ahead_leased_by']}"
    )
    if row["ahead_status"] not in ("pending", "running"):
        return f"its session waits for an aborted call to end: {run}"
    if _holds(row["ahead_lease_until"], now):
        return f"its session is in a run: {run}"
    return (
        f"its session is in a run: {run}, "
        f"{_lost(row['ahead_lease_until'], None, row['ahead_paused_at'], now)}"
    )


def _in_a_run(row: Row, now: datetime) -> bool:
    """Whether it is in a run whose lease holds."""
    return row["lease"] is not None and _holds(row["lease_until"], now)


def _holds(lease_until: datetime | None, now: datetime) -> bool:
    return lease_until is not None and lease_until > now


def _lost(
    lease_until: datetime | None, seen: datetime | None, paused: datetime | None, now: datetime
) -> str:
    """What happens to a run whose lease has expired."""
    heartbeat = f"last heartbeat {relative(seen, now)}, " if seen else ""
    then = (
        "which is paused: resume or cancel it"
        if paused is not None
        else "so another worker takes it over"
    )
    ended = (
        f"whose lease ended {relative(lease_until, now)}"
        if lease_until is not None
        else "whose lease has no end"
    )
    return f"{heartbeat}{ended}, {then}"


def _unknown_zone(row: Row) -> str | None:
    if row["zone_missing"] is None:
        return None
    zone = f"its time zone {row['zone_missing']!r} is not in tzdata {cadence.TZDATA} of this host"
    if not row["zone_elsewhere"]:
        return f"{zone}, and nobody else knows it: it ends as failed when it is due"
    return (
        f"{zone}, and others know it: workers with this tzdata leave the recall to those with a "
        "newer one; upgrade the package tzdata"
    )


def _history(row: Row) -> str | None:
    if row["lease"] is not None or not row["deferrals"]:
        if not row["reason"] or row["run_reference"] is not None:
            return None
        if row["last_outcome"] == "misfired":
            return f"its last occurrence {row['reason']}"
        if row["last_outcome"] is None:
            return f"given back unsent: {row['reason']}"
        return f"its last call ended as {row['last_outcome']}: {row['reason']}"
    kinds, calls = row["deferred_as"] or {}, row["deferred_calls"] or row["deferrals"]
    times = "once" if calls == 1 else f"{calls} times"
    if not kinds:
        # The worker itself held it back: nothing was sent.
        return f"deferred {times}: {row['reason']}"
    counted = (
        f"{next(iter(kinds))} {times}"
        if len(kinds) == 1
        else f"{times} ({', '.join(f'{name} {n}' for name, n in kinds.items())})"
    )
    return (
        f"deferred, {counted} since {local(row['deferred_since'])}, the last time "
        f"{local(row['deferred_last'])}: {row['reason']}"
    )
