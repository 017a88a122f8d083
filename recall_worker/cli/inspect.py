"""`why`, `workers`, `stats`: what is going on, in a sentence or a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psycopg

from .. import statements
from ..database import identity
from ..database.identity import Identity
from ..events import escape_controls
from ..fleet import SILENCE, differences, queues_of, setting_of, state_of
from ..operations.why import because, evidence
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
from .recalls import connect, whole_id

Row = Mapping[str, Any]

WINDOW = 3600.0
"""Seconds that `stats` counts calls and lateness of."""


def why(dsn: str | None, id: str, *, as_json: bool) -> None:
    with connect(dsn) as conn:
        id = whole_id(conn, id)
        row = evidence(conn, id, identity.ask_once(conn))
    if row is None:
        raise Trouble(f"there is no recall {id}", command("list"))
    sentence = because(row)
    if as_json:
        print_json({"id": row["id"], "status": row["status"], "why": sentence, "evidence": row})
    else:
        print("\n".join(wrapped(escape_controls(sentence))), flush=True)


def _workers(conn: psycopg.Connection[dict[str, Any]], here: Identity) -> list[dict[str, Any]]:
    values = {**SILENCE, **here.known}
    return conn.execute(statements.load("reads")["workers"].encode(), values).fetchall()


def count_queues(conn: psycopg.Connection[dict[str, Any]], here: Identity) -> list[dict[str, Any]]:
    """All queues, with what they hold and who serves them."""
    values = {**SILENCE, **here.known}
    return conn.execute(statements.load("reads")["queues"].encode(), values).fetchall()


def shown_queue(row: Row) -> dict[str, Any]:
    """A queue as --json shows it."""
    return {name: value for name, value in row.items() if name != "now"}


def workers(dsn: str | None, *, as_json: bool) -> None:
    with connect(dsn) as conn:
        rows = _workers(conn, identity.ask_once(conn))
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
            ">HEARTBEAT",
            ">RUNS",
            "BREAKER",
            "LISTENER",
            "QUEUES",
            "SINCE",
            "VERSION",
            ">LEASE",
            ">POLL",
        ],
        [
            [
                row["worker"],
                state_of(row),
                relative(row["seen_at"], row["now"]),
                f"{row['leases']}/{row['slots']}",
                row["breaker"],
                row["bell"],
                queues_of(row),
                local(row["started_at"]),
                row["version"],
                *(f"{setting_of(row, name) or '?'} s" for name in ("lease", "poll_interval")),
            ]
            for row in rows
        ],
        yields=[
            ("POLL", 0),
            ("LEASE", 0),
            ("VERSION", 0),
            ("SINCE", 0),
            ("WORKER", 12),
            ("QUEUES", 16),
        ],
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
        here = identity.ask_once(conn)
        rows = _workers(conn, here)
        queues = count_queues(conn, here)
        told = conn.execute(reads["stats_failures"].encode()).fetchone()
        now = conn.execute("select now() as now").fetchone()
    assert late is not None and told is not None and now is not None
    live = [by_status[status] for status in ("pending", "running") if status in by_status]
    counts = {
        name: sum(row[name] for row in live)
        for name in ("waiting", "due", "overdue", "deferred", "paused", "leased")
    }
    next_due = min((row["next_due"] for row in live if row["next_due"] is not None), default=None)
    alive = [row for row in rows if row["alive"]]
    workers = {
        "alive": len(alive),
        "silent": sum(state_of(row) == "silent" for row in rows),
        "slots": sum(row["slots"] for row in alive),
        "breakers_open": sum(row["breaker"] == "open" for row in alive),
        "held": sum(row["held"] is not None for row in alive),
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
                "queues": [shown_queue(queue) for queue in queues],
                "workers": workers,
                "failures_told": told,
                "copy": here.copy,
            }
        )
        return
    open_in = workers["breakers_open"]
    breaker = f"open in {open_in} of them" if open_in else "closed"
    held = f", {workers['held']} of them claim nothing" if workers["held"] else ""
    facts = [
        (
            "waiting",
            f"{counts['waiting']:,}"
            + (f", the next due {relative(next_due, now['now'])}" if next_due else ""),
        ),
        ("  due", f"{counts['due']:,}, {counts['overdue']:,} of them overdue"),
        ("  deferred", f"{counts['deferred']:,}"),
        ("paused", f"{counts['paused']:,}"),
        (
            "in a run",
            f"{counts['leased']:,}"
            + (f" of {workers['slots']:,} slots" if alive else " whose worker is gone")
            if alive or counts["leased"]
            else "0",
        ),
        (
            "workers",
            (f"{workers['alive']} alive{held}, breaker {breaker}" if alive else "none alive")
            + (f"; {workers['silent']} silent: recall-worker workers" if workers["silent"] else ""),
        ),
        ("recalls", ", ".join(f"{n:,} {status}" for status, n in statuses.items() if n) or "none"),
        (
            "calls",
            (", ".join(f"{row['calls']:,} {row['outcome']}" for row in calls) or "none")
            + " in the last hour",
        ),
    ]
    if len(queues) > 1 or queues[0]["paused_at"] is not None:
        facts += [(f"queue {queue['queue']}", _of_queue(queue)) for queue in queues]
    if told["wanted"] or told["waiting"]:
        oldest = f" (the oldest since {relative(told['oldest'], now['now'])})"
        facts.append(
            (
                "failures",
                f"{told['delivered']:,} told, {told['waiting']:,} waiting to be"
                + (oldest if told["waiting"] else "")
                + (f", {told['given_up']:,} given up" if told["given_up"] else ""),
            )
        )
    if late["occurrences"]:
        most = ", ".join(
            f"{label} {span(late[name])}"
            for name, label in (("p50", "median"), ("p99", "99 %"), ("most", "at most"))
        )
        facts.append(("lateness", f"{most} ({late['occurrences']:,} occurrences in the last hour)"))
    print_facts(facts)


def _of_queue(row: Row) -> str:
    parts = [f"{row['waiting']:,} waiting", f"{row['due']:,} due", f"{row['leased']:,} in a run"]
    if row["paused_at"] is not None:
        parts.append(f"paused since {local(row['paused_at'])}")
    if not row["workers"]:
        parts.append("no live worker serves it")
    return ", ".join(parts)
