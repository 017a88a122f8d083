"""`list`: the recalls that are meant, as a table, once or redrawn every second; and how a recall
stands in a table, for the commands that act on many.

What the filters mean is in selection. An id is never shown with an ellipsis in it: people copy it,
and commands take its beginning.
"""

from __future__ import annotations

import os
import select
import shutil
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any

import psycopg

from ..events import escape_controls
from ..operations.words import in_a_line, nature, when
from ..selection import COUNT_MOST, Page, Selection, find, short_ids
from ..settings import DEFAULT_QUEUE
from ..terminal import (
    UNREACHABLE,
    USAGE,
    Trouble,
    command,
    local,
    print_json,
    span,
    table_lines,
    tell,
)
from .recalls import connect

Connection = psycopg.Connection[dict[str, Any]]
Row = Mapping[str, Any]
Given = Mapping[str, str | list[str] | None]
"""The filters as they were given, by the names of their options."""

SECOND = 1.0
"""Seconds between two looks of `list --watch`, at least."""
REST = 4.0
"""So many times as long as a look took is waited until the next one: a filter that reads a large
table through takes a fifth of one of PostgreSQL's cores at most."""
SESSION_LEAST = 8
"""Cells that a session's id keeps on a narrow terminal."""


def list_recalls(
    dsn: str | None,
    given: Given,
    *,
    watch: bool,
    as_json: bool,
) -> None:
    selection = Selection.parse(given)
    if watch:
        if as_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise Trouble(
                "--watch redraws a terminal's screen, and this is none",
                "the same without --watch",
                status=USAGE,
            )
        _watch(dsn, selection, _typed(given))
        return
    with connect(dsn) as conn:
        page = find(conn, selection)
        if as_json:
            print_json(page.rows)
            if _follows(page, selection):
                tell(summary(page, selection))
            return
        if page.rows:
            room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            for line in recall_lines(conn, page.rows, page.now, room):
                print(line)
            sys.stdout.flush()
    tell(summary(page, selection))


def summary(page: Page, selection: Selection) -> str:
    """How many there are, how many of them are shown, and how to see more."""
    if not page.total:
        return "No recalls."
    many = page.total > COUNT_MOST
    count = f"more than {COUNT_MOST:,}" if many else f"{page.total:,}"
    recalls = f"{count} {'recall' if page.total == 1 else 'recalls'}"
    if not page.rows:
        return f"{recalls}, none shown: --offset is {selection.offset:,}."
    if len(page.rows) == page.total and not many:
        return f"{recalls}."
    end = selection.offset + len(page.rows)
    more = f"; --offset {end} for more" if _follows(page, selection) else ""
    return f"{recalls}, {len(page.rows):,} shown{more}."


def _follows(page: Page, selection: Selection) -> bool:
    """Whether there are more behind this page."""
    if page.total > COUNT_MOST:
        return len(page.rows) == selection.limit
    return len(page.rows) > 0 and selection.offset + len(page.rows) < page.total


def recall_lines(
    conn: Connection,
    rows: Sequence[Row],
    now: datetime,
    room: int | None,
    shown: dict[str, str] | None = None,
) -> list[str]:
    """A table of recalls in lines; with `room`, in cells, of at most that width. `shown`: what ids
    were shown as before, to be kept up."""
    # Most tables have one queue, which nobody needs to be told.
    queues = any(row["queue"] != DEFAULT_QUEUE for row in rows)
    statuses, whens = [str(row["status"]) for row in rows], [when(row, now) for row in rows]
    ids = {row["id"]: row["id"] for row in rows}
    if room is not None:
        widths = [
            min(SESSION_LEAST, max(len(row["session_id"] or "") for row in rows)),
            *([12] if queues else []),
            max(len("STATUS"), *map(len, statuses)),
            max(len("WHEN"), *map(len, whens)),
        ]
        ids = _fitting(conn, ids, room - sum(width + 2 for width in widths), shown)
    return table_lines(
        [
            "ID",
            "SESSION",
            *(["QUEUE"] if queues else []),
            "TYPE",
            "STATUS",
            "WHEN",
            "DUE",
            ">OCC",
            "MESSAGE",
        ],
        [
            [
                ids[row["id"]],
                row["session_id"],
                *([row["queue"]] if queues else []),
                nature(row),
                row["status"],
                found,
                local(row["trigger_at"]),
                str(row["occurrence"]),
                in_a_line(row["additional_context_message"], 200),
            ]
            for row, found in zip(rows, whens, strict=True)
        ],
        room,
        yields=[
            ("MESSAGE", 16),
            ("OCC", 0),
            ("DUE", 0),
            ("TYPE", 0),
            ("SESSION", 36),
            *([("QUEUE", 12)] if queues else []),
            ("MESSAGE", 0),
            ("SESSION", SESSION_LEAST),
        ],
        whole=["ID"],
    )


def _fitting(
    conn: Connection, ids: dict[str, str], room: int, shown: dict[str, str] | None
) -> dict[str, str]:
    """What to show of each id."""
    if max(map(len, ids)) <= room:
        return ids
    known = {} if shown is None else shown
    new = [id for id in ids if id not in known]
    known |= short_ids(conn, new, room) if new else {}
    return {id: known[id] for id in ids}


# --- redrawn every second -------------------------------------------------------------------------


def _typed(given: Given) -> str:
    """The command as it was typed, with its filters."""
    words = []
    for name, value in given.items():
        for text in [value] if isinstance(value, str) else value or []:
            words += [f"--{name}", text]
    return command("list", *words)


def _watch(dsn: str | None, selection: Selection, typed: str) -> None:
    """Redraw the page until q or Ctrl-C. One query a second. Where PostgreSQL is lost meanwhile,
    the last page stands, and says so, until PostgreSQL is back."""
    conn = connect(dsn)
    lines: list[str] = []
    lost: float | None = None
    shown: dict[str, str] = {}
    columns = 0
    with ExitStack() as stack:
        stack.callback(lambda: conn.close())
        pressed = stack.enter_context(_screen())
        while True:
            size = shutil.get_terminal_size()
            if size.columns != columns:
                columns = size.columns
                shown.clear()
            # A line for the title, one for the table's head, one for the count.
            limit = min(selection.limit or size.lines, max(1, size.lines - 3))
            here = replace(selection, limit=limit)
            began, rest = time.monotonic(), SECOND
            try:
                if conn.closed:
                    conn = connect(dsn)
                page = find(conn, here)
                rest = max(SECOND, REST * (time.monotonic() - began))
                lines = [escape_controls(f"{local(page.now)}  q ends  {typed}")[:columns]]
                if page.rows:
                    lines += recall_lines(conn, page.rows, page.now, columns, shown)
                lines.append(summary(page, here)[:columns])
                lost = None
            except (psycopg.OperationalError, Trouble) as error:
                if isinstance(error, Trouble) and error.status != UNREACHABLE:
                    raise
                conn.close()
                lost = began if lost is None else lost
                away = span(max(SECOND, time.monotonic() - lost))
                note = f"PostgreSQL has not answered for {away}; q ends: what stands here is old"
                lines = [note[:columns], *lines[1:]]
            _draw(lines)
            if pressed(rest) in ("q", "Q", "\x04"):
                return


def _draw(lines: Sequence[str]) -> None:
    """Write over what stands on the screen, without clearing it first, so that it does not
    flicker."""
    rows = "\x1b[K\r\n".join(lines)
    sys.stdout.write(f"\x1b[H{rows}\x1b[K\x1b[J")
    sys.stdout.flush()


@contextmanager
def _screen() -> Iterator[Callable[[float], str]]:
    """The terminal's second screen, for as long as the block runs; what was there before is there
    again afterwards. Yields what waits so many seconds for a key, and returns it, or ''. Ctrl-C
    ends the block."""
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard, termios.TCSADRAIN)
    sys.stdout.write("\x1b[?1049h\x1b[?25l\x1b[H\x1b[J")

    def pressed(patience: float) -> str:
        if not select.select([keyboard], [], [], patience)[0]:
            return ""
        return os.read(keyboard, 1).decode(errors="replace") or "q"

    try:
        yield pressed
    except KeyboardInterrupt:
        pass
    finally:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
