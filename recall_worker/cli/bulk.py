"""Acting on all recalls that the filters of `list` find: `cancel`, `pause`, `resume`, `retry`,
`fire` and `reschedule` without ids.

Which recalls are meant is decided once, when they are shown: what appears later is not acted on.
Then a person agrees, and they are taken in batches, a transaction each, so that no lock is held for
long and a batch that fails undoes itself alone. Each batch is locked first and looked at again:
what is no longer as it was asked for by then is left alone. What somebody else has locked is tried
again at the end.

Never here: what an operation does, and why it does not apply (operate).
"""

from __future__ import annotations

import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import psycopg

from ..events import escape_controls
from ..operations.actions import Action
from ..operations.bulk import Tally, act_on_batch, batches, counted, unknown_batch
from ..operations.connection import clock
from ..selection import Chosen, Selection, choose, named
from ..terminal import USAGE, Trouble, ask, command, nobody, plain, print_json, tell
from .listing import Given, recall_lines
from .recalls import connect

Connection = psycopg.Connection[dict[str, Any]]
Row = Mapping[str, Any]

TRIES, PAUSE = 5, 0.2
"""How often what somebody else has locked is tried again, and seconds before each try."""
PROGRESS = 2.0
"""Seconds between two lines of progress."""

SHOWN = 10
"""Recalls that are shown before the question; for more of them their number has to be typed."""


def act_on_all(
    dsn: str | None,
    action: Action,
    given: Given,
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Show which recalls are meant, ask, and act on them."""
    texts = {name: value for name, value in given.items() if value is not None}
    if not texts.keys() - {"limit"}:
        raise Trouble(
            "name recalls, or filters that find them",
            f"recall-worker {action.name} ID…",
            command(action.name, "--state", action.states[0], "--dry-run"),
            status=USAGE,
        )
    selection = Selection.parse({"limit": None, **texts})
    selection = replace(selection, literal=action.literal)
    if "limit" not in texts:
        selection = replace(selection, limit=None)
    if not selection.states and not selection.statuses:
        selection = replace(selection, states=action.states)
    with connect(dsn) as conn:
        action.begin(conn)
        chosen = choose(conn, selection)
        ids = chosen.ids
        if not ids:
            state = "" if texts.keys() & {"state", "status"} else f" ({' or '.join(action.states)})"
            pattern = action.literal and "*" in (selection.session or "")
            raise Trouble(
                f"no recall{state} matches: nothing to {action.name}",
                command("list"),
                *(
                    [
                        command(
                            action.name, "--session", selection.session or "", "--state", "live"
                        )
                        + " (a pattern; --session alone is the session of that name)"
                    ]
                    if pattern
                    else []
                ),
            )
        if dry_run:
            show_meant(conn, action, ids)
            tell("Nothing was changed: --dry-run.")
            if as_json:
                print_json([row for part in batches(ids) for row in named(conn, part)])
            elif not sys.stdout.isatty():
                _print_ids(ids)
            return
        if not yes:
            show_meant(conn, action, ids)
            if not sys.stdin.isatty():
                raise nobody()
            _agree(action, len(ids))
        tally = Tally()
        rows: list[dict[str, Any]] | None = [] if as_json else None
        with _until_interrupted() as interrupted:
            try:
                whole = _act(conn, action, chosen, tally, interrupted, rows)
            except (psycopg.Error, KeyboardInterrupt):
                so_far = _so_far(action, tally, len(ids), is_lost=conn.broken)
                tell(f"Stopped: {so_far}")
                raise
        if as_json:
            print_json(rows)
        if not whole:
            tell(f"Stopped: {_so_far(action, tally, len(ids))}")
            raise KeyboardInterrupt
    _conclude(action, tally, len(ids))


def show_meant(conn: Connection, action: Action, ids: Sequence[str]) -> None:
    """Which recalls are meant: how many, and the first of them."""
    first = f", the first {SHOWN} of them" if len(ids) > SHOWN else ""
    tell(f"To {action.name}: {counted(len(ids))}{first}:")
    room = shutil.get_terminal_size().columns if sys.stderr.isatty() else None
    if rows := named(conn, ids[:SHOWN]):  # They may be gone by now.
        tell("\n".join(plain(recall_lines(conn, rows, clock(conn), room))))


def _agree(action: Action, number: int) -> None:
    """Raises Declined unless the person at the terminal agrees."""
    verb = action.name.capitalize()
    if number > SHOWN:
        ask(f"{verb} all {number:,}? Type {number} to go on:", answer=str(number))
    else:
        ask(f"{verb} {'this recall' if number == 1 else f'these {number} recalls'}?")


def _act(
    conn: Connection,
    action: Action,
    chosen: Chosen,
    tally: Tally,
    interrupted: threading.Event,
    rows: list[dict[str, Any]] | None,
) -> bool:
    """Act on all, batch by batch. False where that was interrupted. `rows`: takes the recalls as
    they are then; None: their ids are printed for a script."""
    said = time.monotonic()
    ids = chosen.ids
    for tries_left in reversed(range(TRIES + 1)):
        locked: list[str] = []
        for part in batches(ids):
            if interrupted.is_set():
                return False
            batch = act_on_batch(conn, action, chosen, part, tally, last=not tries_left)
            locked += batch.locked
            if rows is not None:
                rows += batch.rows
            elif not sys.stdout.isatty():
                _print_ids([row["id"] for row in batch.changed])
            if time.monotonic() - said > PROGRESS:
                said = time.monotonic()
                tell(f"{tally.done:,} of {len(chosen.ids):,} {action.done} …")
        ids = locked
        if not ids:
            break
        interrupted.wait(PAUSE)
    return True


def _conclude(action: Action, tally: Tally, number: int) -> None:
    """Say what was done. Raises Trouble where something was refused, or nothing done."""
    parts = [f"{number} {why}" for why, number in tally.unchanged.items()]
    if tally.left:
        parts.append(f"{tally.left:,} changed meanwhile, and left alone")
    what = f"{tally.done:,} of {counted(number)} {action.done}"
    tell(f"{'; '.join([what, *parts])}.")
    if tally.refused:
        why = ", ".join(f"{count:,} {kind}" for kind, count in tally.refused.most_common())
        raise Trouble(
            f"{tally.refused.total():,} could not be {action.done}: {why}", command("list")
        )
    if not tally.done:
        raise Trouble(f"no recall was {action.done}", command("list"))


def _so_far(action: Action, tally: Tally, number: int, *, is_lost: bool = False) -> str:
    """`is_lost`: whether the connection broke, perhaps between a batch's commit and its answer."""
    done = f"{tally.done:,} of {counted(number)} {action.done}"
    if is_lost:
        return f"{done}; {unknown_batch()}"
    return f"{done}; the others are as they were."


def _print_ids(ids: Sequence[str]) -> None:
    for id in ids:
        print(escape_controls(id))
    sys.stdout.flush()


@contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that a batch is finished first; a second one ends the command at
    once, and undoes the batch."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
