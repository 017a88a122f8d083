"""Acting on all recalls that were chosen, in batches, a transaction each, so that no lock is held
for long and a batch that fails undoes itself alone. Each batch is locked first and looked at again:
what is no longer as it was asked for by then is left alone. What somebody else has locked is to be
tried again.

Never here: which recalls are meant (selection), what an operation does (actions), and who agrees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg

from .. import statements
from ..selection import Chosen, hold
from ..terminal import command
from .actions import Action

Connection = psycopg.Connection[dict[str, Any]]

BATCH = 100
"""Recalls of one transaction."""


@dataclass(slots=True)
class Tally:
    """What became of the recalls so far."""

    done: int = 0
    unchanged: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    left: int = 0
    """No longer as they were asked for, or gone."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What became of one batch."""

    rows: list[dict[str, Any]]
    """Those that the action applied to, as they are then."""
    changed: list[dict[str, Any]]
    """Those of them that it changed."""
    locked: list[str]
    """What somebody else has locked."""


def act_on_batch(
    conn: Connection,
    action: Action,
    chosen: Chosen,
    ids: list[str],
    tally: Tally,
    *,
    last: bool,
) -> Batch:
    """Act on one batch, in a transaction. In the `last` round those that somebody else has locked
    are refused."""
    with conn.transaction():
        held = hold(conn, chosen, ids)
        meant = [id for id in ids if id in held.meant]
        rows = action.act(conn, meant) if meant else []
        done = {row["id"] for row in rows}
        missed = [id for id in ids if id not in done]
        sql = statements.load("client")["states"].encode()
        states = conn.execute(sql, {"ids": missed}).fetchall() if missed else []
    # Counted when it is committed.
    changed = [row for row in rows if action.unchanged(row) is None]
    tally.done += len(changed)
    tally.unchanged.update(why for row in rows if (why := action.unchanged(row)) is not None)
    tally.left += len(missed) - len(states)
    locked = []
    for state in states:
        if state["id"] in held.meant:
            tally.refused[action.why_not(state).kind] += 1
        elif state["id"] in held.locked:
            tally.left += 1
        elif last:
            tally.refused["locked by another transaction"] += 1
        else:
            locked.append(state["id"])
    return Batch(rows, changed, locked)


def counted(number: int) -> str:
    """`1 recall`, `2 recalls`."""
    return f"{number:,} {'recall' if number == 1 else 'recalls'}"


def unknown_batch() -> str:
    """What is to be said where no answer came to a batch: it may be done, or be done yet."""
    return (
        f"whether the batch of {BATCH} at most that was in hand was done, too, is not known "
        f"({command('actions')} tells it); the rest are as they were."
    )


def batches(ids: Sequence[str]) -> Iterator[list[str]]:
    return (list(ids[at : at + BATCH]) for at in range(0, len(ids), BATCH))
