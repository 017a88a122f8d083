"""`queues`, `queues pause`, `queues resume`: what each queue holds and who serves it, and holding
queues back.

A paused queue is a row that every claim asks for: it holds for all workers, at once, and until it
is resumed. Each pause and resume records itself in recall_actions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import psycopg

from .. import statements
from ..database import identity
from ..events import escape_controls
from ..operations import queues as words
from ..settings import ALL_QUEUES, queue_problem
from ..terminal import (
    USAGE,
    Trouble,
    ask,
    command,
    print_json,
    print_table,
    tell,
    whole_span,
)
from .inspect import count_queues, shown_queue
from .recalls import acting, connect

Row = Mapping[str, Any]


def show(dsn: str | None, *, as_json: bool) -> None:
    with connect(dsn) as conn:
        rows = count_queues(conn, identity.ask_once(conn))
    if as_json:
        print_json([shown_queue(row) for row in rows])
        return
    print_table(
        [
            "QUEUE",
            ">DUE",
            ">OVERDUE",
            ">WAITING",
            ">IN RUN",
            ">FAILED",
            ">OLDEST",
            ">WORKERS",
            "PAUSED",
        ],
        [
            [
                row["queue"],
                *(f"{row[name]:,}" for name in ("due", "overdue", "waiting", "leased", "failed")),
                "" if row["oldest"] is None else whole_span(row["oldest"]),
                f"{row['workers']:,}",
                _paused(row),
            ]
            for row in rows
        ],
        yields=[("PAUSED", 24), ("FAILED", 0), ("OVERDUE", 0), ("QUEUE", 16), ("PAUSED", 8)],
    )
    for row in rows:
        if row["waiting"] and not row["workers"]:
            tell(
                f"Note: no live worker serves queue {escape_controls(row['queue'])}: "
                f"{command('run', '--queue', row['queue'])}"
            )


def pause(
    dsn: str | None,
    names: list[str],
    *,
    every: bool,
    reason: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    queues = _named(names, "pause", every=every)
    if every and not yes:
        ask("Pause all queues, also those that are new?")
    with connect(dsn) as conn:
        values = {"queues": queues, "reason": reason}
        rows = _act(conn, "pause_queues", values)
        if len(rows) < len(queues):
            # Somebody else paused one in the same instant: seen by now.
            known = {row["queue"] for row in rows}
            again = _act(conn, "pause_queues", values)
            rows += [row for row in again if row["queue"] not in known]
        rows.sort(key=lambda row: queues.index(row["queue"]))
        here = identity.ask_once(conn)
        states = {} if every else {name: words.state(conn, name, here) for name in queues}

    _show(rows, as_json, words.paused)
    for name, state in states.items():
        if (note := words.strange(state, name)) is not None:
            tell(f"Note: {escape_controls(note)} recall-worker queues")


def resume(dsn: str | None, names: list[str], *, every: bool, yes: bool, as_json: bool) -> None:
    queues = _named(names, "resume", every=every)
    if every and not yes:
        ask("Resume all queues?")
    with connect(dsn) as conn:
        rows = _act(conn, "resume_queues", {"queues": queues, "every": every})
        resumed = {row["queue"] for row in rows}
        rows = [{**row, "resumed": True} for row in rows]
        nothing = {"paused_at": None, "paused_by": None, "reason": None, "resumed": False}
        if not (every and rows):
            rows += [{"queue": name, **nothing} for name in queues if name not in resumed]
        still = not every and words.state(conn, queues[0], identity.ask_once(conn))["all_paused"]
    _show(rows, as_json, lambda row: words.resumed(row["resumed"]))
    if still:
        tell(f"Note: {words.ALL_PAUSED}: recall-worker queues resume --all")


def _named(names: list[str], word: str, *, every: bool) -> list[str]:
    """The queues that are meant, each once: those that were named, or all. Raises Trouble."""
    if every == bool(names):
        raise Trouble(
            "give the names of queues, or --all",
            f"recall-worker queues {word} NAME…",
            f"recall-worker queues {word} --all",
            status=USAGE,
        )
    for name in names:
        if (wrong := queue_problem(name)) is not None:
            hint = f"recall-worker queues {word} --all" if name == ALL_QUEUES else command("queues")
            raise Trouble(f"a queue's name {wrong}", hint, status=USAGE)
    return [ALL_QUEUES] if every else list(dict.fromkeys(names))


def _act(
    conn: psycopg.Connection[dict[str, Any]], name: str, values: Mapping[str, Any]
) -> list[dict[str, Any]]:
    statement = statements.load("client")[name].encode()
    rows = conn.execute(statement, {**values, **acting()}).fetchall()
    return [{name: row[name] for name in row if name != "notified"} for row in rows]


def _show(rows: list[dict[str, Any]], as_json: bool, done: Callable[[Row], str]) -> None:
    """Print what was done: the queues as they are now, or a sentence for each, and for a script
    their names."""
    if as_json:
        print_json(rows)
        return
    for row in rows:
        name = "all queues" if row["queue"] == ALL_QUEUES else row["queue"]
        if not sys.stdout.isatty():
            print(escape_controls(row["queue"]), flush=True)
        tell(escape_controls(f"{name}: {done(row)}."))


def _paused(row: Row) -> str:
    if row["paused_at"] is None:
        return ""
    return f"{'all, ' if row['all_paused'] else ''}{words.since(row)}"
