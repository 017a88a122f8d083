"""`why`, `workers`, `stats`: what is going on, in a sentence or a table.

`why` is a pure function of the evidence that one statement gathers: it says what a recall waits
for, first cause first.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from .. import statements
from ..events import escape_controls
from ..fleet import FLEET, SILENT_AFTER, differences, fleet_cap, setting_of
from ..recall import STATUSES
from ..terminal import (
    Trouble,
    command,
    local,
    print_facts,
    print_json,
    print_table,
    relative,
    span,
    tell,
    wrapped,
)
from .recalls import connect

Row = Mapping[str, Any]

WINDOW = 3600.0
"""Seconds that `stats` counts calls and lateness of."""


def why(dsn: str | None, id: str, *, as_json: bool) -> None:
    with connect(dsn) as conn:
        reads = statements.load("reads")
        found = conn.execute(reads["why"].encode(), {"id": id, "silence": SILENT_AFTER}).fetchone()
        fleet = conn.execute(reads["fleet"].encode(), FLEET).fetchone()
    if found is None or fleet is None:
        raise Trouble(f"there is no recall {id}", command("list"))
    row = found | fleet
    sentence = because(row)
    if as_json:
        print_json({"id": row["id"], "status": row["status"], "why": sentence, "evidence": row})
    else:
        print("\n".join(wrapped(escape_controls(sentence))), flush=True)


def because(row: Row) -> str:
    """Why a recall is in its state: a sentence with its evidence. `row`: what the statements `why`
    and `fleet` return.
    """
    now: datetime = row["now"]
    if row["status"] not in ("pending", "running"):
        return _ended(row, now)
    parts = [_waits_for(row, now)]
    if row["paused_at"] is not None:
        parts.insert(0, f"paused since {local(row['paused_at'])}")
    if (
        row["lease"] is not None
        and row["paused_at"] is None
        and not _holds(row["lease_until"], now)
    ):
        parts += filter(None, [fleet_cap(row)])
    parts += filter(None, [_history(row)])
    if not _holds(row["lease_until"], now):
        if not row["alive"]:
            parts.append("no live worker is known: start one with recall-worker run")
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
    if row["ended_at"] is not None:
        how = f"{row['status'].capitalize()} since {local(row['ended_at'])}" + (
            f": {row['reason']}" if row["reason"] else ""
        )
    else:
        # The application's own statement writes neither a time nor a reason; the row's are from
        # the last call.
        how = f"{row['status'].capitalize()} by the application since {local(row['updated_at'])}"
        how += f"; its last call had ended as {row['last_outcome']}" if row["last_outcome"] else ""
    if _holds(row["lease_until"], now):
        how += f"; its call by worker {row['leased_by']} is being aborted"
    return f"{how}."


def _waits_for(row: Row, now: datetime) -> str:
    if row["lease"] is not None:
        which = f"occurrence {row['occurrence']}, attempt {row['attempt']}"
        held = (
            f"in a run since {local(row['leased_at'])}: {which}, leased by worker "
            f"{row['leased_by']}"
        )
        if row["run_reference"] is not None:
            held += f", accepted by the API at {local(row['delivered_at'])} and polled since"
        if _holds(row["lease_until"], now):
            return held
        return f"{held}, {_lost(row['lease_until'], row['holder_seen_at'], row['paused_at'], now)}"
    if row["trigger_at"] > now:
        moved = ", where it was moved" if row["moved"] else ""
        return (
            f"not due until {local(row['trigger_at'])} ({relative(row['trigger_at'], now)}){moved}"
        )
    due = f"due since {local(row['due_at'])} ({relative(row['due_at'], now)})"
    if row["paused_at"] is not None:
        return due
    if row["ahead"] is not None:
        return f"{due}, but {_behind(row, now)}"
    if (cap := fleet_cap(row)) is not None:
        return f"{due}, but {cap}"
    if row["alive"] and row["leases"] >= row["slots"]:
        of = "the one live worker" if row["alive"] == 1 else f"{row['alive']} live workers"
        return f"{due}, but all slots are taken: {row['leases']} of {row['slots']} in {of}"
    return f"{due}, and waits to be claimed"


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


def _history(row: Row) -> str | None:
    if row["lease"] is not None or not row["deferrals"]:
        if not row["reason"] or row["run_reference"] is not None:
            return None
        if row["last_outcome"] == "misfired":
            return f"its last occurrence {row['reason']}"
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


def workers(dsn: str | None, *, as_json: bool) -> None:
    with connect(dsn) as conn:
        rows = conn.execute(
            statements.load("reads")["workers"].encode(), {"silence": SILENT_AFTER}
        ).fetchall()
    if as_json:
        print_json([{name: value for name, value in row.items() if name != "now"} for row in rows])
        return
    if not rows:
        tell("No workers. Start one with: recall-worker run")
        return
    print_table(
        [
            "WORKER",
            "STATE",
            ">SEEN",
            ">RUNS",
            "BREAKER",
            "LISTENER",
            "SINCE",
            "VERSION",
            ">LEASE",
            ">POLL",
        ],
        [
            [
                row["worker"],
                "alive" if row["alive"] else "silent",
                relative(row["seen_at"], row["now"]),
                f"{row['leases']}/{row['slots']}",
                row["breaker"],
                row["bell"],
                local(row["started_at"]),
                row["version"],
                *(f"{setting_of(row, name) or '?'} s" for name in ("lease", "poll_interval")),
            ]
            for row in rows
        ],
        yields=[("POLL", 0), ("LEASE", 0), ("VERSION", 0), ("SINCE", 0), ("WORKER", 12)],
    )
    alive = [row for row in rows if row["alive"]]
    if deaf := sum(row["bell"] == "deaf" for row in alive):
        tell(
            f"Note: {deaf} of {len(alive)} live workers receive no notifications and find new "
            "recalls only by polls: recall-worker doctor"
        )
    for name, values in differences(alive):
        tell(escape_controls(f"Note: live workers differ in {name}: {', '.join(values)}"))


def stats(dsn: str | None, *, as_json: bool) -> None:
    reads = statements.load("reads")
    with connect(dsn) as conn:
        by_status = {row["status"]: row for row in conn.execute(reads["stats_recalls"].encode())}
        calls = conn.execute(reads["stats_calls"].encode(), {"window": WINDOW}).fetchall()
        late = conn.execute(reads["stats_lateness"].encode(), {"window": WINDOW}).fetchone()
        rows = conn.execute(reads["workers"].encode(), {"silence": SILENT_AFTER}).fetchall()
        now = conn.execute("select now() as now").fetchone()
    assert late is not None and now is not None
    live = [by_status[status] for status in ("pending", "running") if status in by_status]
    counts = {
        name: sum(row[name] for row in live)
        for name in ("waiting", "overdue", "deferred", "paused", "leased")
    }
    next_due = min((row["next_due"] for row in live if row["next_due"] is not None), default=None)
    alive = [row for row in rows if row["alive"]]
    workers = {
        "alive": len(alive),
        "slots": sum(row["slots"] for row in alive),
        "breakers_open": sum(row["breaker"] == "open" for row in alive),
    }
    statuses = {
        status: by_status[status]["recalls"] if status in by_status else 0 for status in STATUSES
    }
    if as_json:
        print_json(
            {
                "live": {**counts, "next_due": next_due},
                "statuses": statuses,
                "calls_last_hour": {row["outcome"]: row["calls"] for row in calls},
                "lateness_last_hour": late,
                "workers": workers,
            }
        )
        return
    open_in = workers["breakers_open"]
    breaker = f"open in {open_in} of them" if open_in else "closed"
    facts = [
        (
            "waiting",
            f"{counts['waiting']:,}"
            + (f", the next due {relative(next_due, now['now'])}" if next_due else ""),
        ),
        ("  overdue", f"{counts['overdue']:,}"),
        ("  deferred", f"{counts['deferred']:,}"),
        ("paused", f"{counts['paused']:,}"),
        ("in a run", f"{counts['leased']:,} of {workers['slots']:,} slots"),
        ("workers", f"{workers['alive']} alive, breaker {breaker}" if alive else "none alive"),
        ("recalls", ", ".join(f"{n:,} {status}" for status, n in statuses.items() if n) or "none"),
        (
            "last hour",
            ", ".join(f"{row['calls']:,} {row['outcome']}" for row in calls) or "no calls",
        ),
    ]
    if late["occurrences"]:
        most = ", ".join(
            f"{label} {span(late[name])}"
            for name, label in (("p50", "median"), ("p99", "99 %"), ("most", "at most"))
        )
        facts.append(("lateness", f"{most} ({late['occurrences']:,} occurrences in the last hour)"))
    print_facts(facts)
