"""`show`, `actions`: what became of a recall, and who did what to it.

A call or an action is one entry: when, and a sentence. An entry's time is that of its record: a
call's is when it ended, an action's when its transaction began. `events` prints the same sentences.

Never here: why a recall waits (inspect).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

import psycopg

from .. import instants, statements
from ..durations import DurationError
from ..durations import seconds as seconds_of
from ..events import escape_controls
from ..instants import InstantError
from ..operations.connection import clock
from ..operations.story import ACTIONS, Entry, changes, facts, story, unsaid
from ..terminal import (
    USAGE,
    Trouble,
    command,
    local,
    print_facts,
    print_json,
    print_table,
    tell,
)
from .recalls import connect, whole_id

Row = Mapping[str, Any]

NARROW = 60
"""Columns of a terminal below which a time has neither year nor zone."""


def show(dsn: str | None, id: str, *, limit: int | None, as_json: bool) -> None:
    """`limit`: of the latest calls and actions; None: ten for people, all for --json."""
    reads = statements.load("reads")
    most = limit if limit is not None else None if as_json else 10
    with connect(dsn) as conn:
        id = whole_id(conn, id)
        row = conn.execute(reads["show"].encode(), {"id": id}).fetchone()
        calls = conn.execute(reads["calls"].encode(), {"id": id, "most": most}).fetchall()
        actions = _actions(conn, id=id, most=most)
        told = conn.execute(reads["told"].encode(), {"id": id}).fetchall()
        total = conn.execute(reads["on_record"].encode(), {"id": id}).fetchone()
        now = clock(conn)
    assert total is not None
    if row is None and not calls and not actions:
        raise Trouble(f"there is no recall {id}", command("list"))
    if as_json:
        document = {
            "recall": row,
            "calls": calls[::-1],
            "actions": actions[::-1],
            "told": told,
        }
        print_json(document)
        return
    if row is None:
        tell("The recall is gone (it or its session was deleted); this is on record of it:")
    else:
        print_facts(facts(row, told, now))
        print()
    more = unsaid(row, total)
    entries = story(calls, actions, more)[:most]
    print_entries(entries)
    many = total["calls"] + total["actions"] + len(more)
    if many > len(entries):
        tell(f"The latest {len(entries)} of {many:,} entries: --limit {many} shows all.")


def known(conn: psycopg.Connection[dict[str, Any]], id: str) -> None:
    """Raises Trouble where there is no such recall, and nothing of it on record."""
    reads = statements.load("reads")
    total = conn.execute(reads["on_record"].encode(), {"id": id}).fetchone()
    assert total is not None
    row = conn.execute(reads["show"].encode(), {"id": id}).fetchone()
    if row is None and not (total["calls"] or total["actions"]):
        raise Trouble(f"there is no recall {id}", command("list"))


def print_entries(entries: Iterable[Entry]) -> None:
    """An entry a line; on a terminal wrapped behind its time, which is short where there is little
    room."""
    narrow = sys.stdout.isatty() and shutil.get_terminal_size().columns < NARROW
    for entry in entries:
        at = local(entry.at)
        print_facts([(at[5:19] if narrow else at, entry.says)])


# --- actions --------------------------------------------------------------------------------------


def actions(
    dsn: str | None,
    id: str | None,
    *,
    since: str | None,
    actor: str | None,
    words: list[str] | None,
    limit: int,
    as_json: bool,
) -> None:
    """What was done, the last first. `words`: the actions that are asked for, None: all."""
    if unknown := sorted(set(words or []) - set(ACTIONS)):
        raise Trouble(
            f"there is no action {', '.join(unknown)}",
            f"--action with one of {', '.join(ACTIONS)}",
            status=USAGE,
        )
    with connect(dsn) as conn:
        if id is not None:
            id = whole_id(conn, id)
            known(conn, id)
        asked = None if since is None else beginning(since, clock(conn))
        # One more than is shown tells whether there are more.
        rows = _actions(
            conn, id=id, since=asked, actor=actor, actions=words or None, most=limit + 1
        )
    rows, more = rows[:limit], len(rows) > limit
    if as_json:
        print_json(rows)
    elif not rows:
        tell("No actions on record" + (f" of recall {escape_controls(id)}." if id else "."))
    else:
        print_table(
            ["WHEN", "WHO", "VIA", "ACTION", "RECALL", "CHANGE"],
            [
                [
                    local(row["at"]),
                    row["actor"],
                    row["via"],
                    row["action"],
                    row["recall_id"] or "",
                    changes(row),
                ]
                for row in rows
            ],
            # What was changed comes first: the rest can be asked for.
            yields=[("CHANGE", 1000), ("VIA", 0), ("RECALL", 8), ("WHO", 10), ("CHANGE", 12)],
        )
    if more:
        tell(f"More are on record: --limit {limit * 10}")


def _actions(
    conn: psycopg.Connection[dict[str, Any]],
    *,
    id: str | None = None,
    since: datetime | None = None,
    actor: str | None = None,
    actions: list[str] | None = None,
    most: int | None = None,
) -> list[dict[str, Any]]:
    values = {"id": id, "since": since, "actor": actor, "actions": actions, "most": most}
    return conn.execute(statements.load("reads")["actions"].encode(), values).fetchall()


def beginning(text: str, now: datetime) -> datetime:
    """What --since names: a duration before `now`, or a time. Raises Trouble."""
    try:
        return now - timedelta(seconds=seconds_of(text))
    except (DurationError, OverflowError):
        pass
    try:
        return instants.parse(text).when
    except InstantError:
        raise Trouble(
            f"--since {text!r} is neither a duration nor a time",
            "--since 1h, or --since 2027-01-31T09:00",
            status=USAGE,
        ) from None
