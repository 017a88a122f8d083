"""Notifications: do they arrive, and is a pooler in their way?

The whole way is tried: a LISTEN like the worker's, a NOTIFY from the other connection, timed on a
channel of the doctor's own. The workers' channel is notified once, in the same transaction, which
costs each of them one poll.
"""

from __future__ import annotations

import time
from uuid import uuid4

import psycopg

from ..database.connection import error_text
from ..database.listener import CHANNEL
from ..terminal import span
from .examination import (
    DIRECT,
    OK,
    PROBLEM,
    STATEMENT,
    TRANSACTION,
    Examination,
    pooling_of,
)
from .server import FAILOVER_HINT, QUEUE_FULL

NOTIFY_DEADLINE = 5.0
"""Seconds within which a notification must arrive."""
NOTIFICATIONS = 5
"""How many are sent; their median time is shown."""

POOLER_HINT = "the server's own address in RECALL_LISTEN_DSN: it must be direct"


async def pooler(exam: Examination) -> None:
    listens = exam.settings.listen_dsn is not None
    match exam.pooling:
        case "direct":
            exam.find(OK, "none: RECALL_DSN leads to the server itself")
        case "statement":
            exam.find(
                PROBLEM,
                "RECALL_DSN leads through a pooler in statement mode, which takes no transactions",
                "pool_mode = transaction",
            )
        case "transaction" if not listens:
            exam.find(
                PROBLEM,
                (
                    "RECALL_DSN leads through a pooler in transaction mode, which does not support "
                    "LISTEN: new recalls wait for a poll"
                ),
                POOLER_HINT,
            )
        case mode:
            how = f"RECALL_DSN leads through a pooler in {mode} mode"
            exam.find(
                OK,
                how + ("; LISTEN does not use it" if listens else ", which supports LISTEN"),
            )
    exam.listen_pooling = exam.pooling
    if exam.settings.listen_dsn is not None:
        try:
            exam.listen_pooling = await pooling_of(exam.settings.listen_dsn)
        except (psycopg.Error, OSError):
            exam.listen_pooling = DIRECT  # The check `listener` says what is wrong.
        if exam.listen_pooling in (TRANSACTION, STATEMENT):
            exam.find(
                PROBLEM,
                (
                    f"RECALL_LISTEN_DSN leads through a pooler in {exam.listen_pooling} mode, "
                    "too, which does not support LISTEN"
                ),
                POOLER_HINT,
            )


async def listens(exam: Examination) -> None:
    if exam.listen_pooling in (TRANSACTION, STATEMENT):
        # Not tried: the LISTEN would stay behind on one of the pooler's connections.
        seen = f"notifications can't pass the pooler: {_meanwhile(exam)}"
        exam.find(PROBLEM, seen, POOLER_HINT)
        return
    try:
        conn = await exam.connect(exam.settings.listen_dsn or exam.dsn)
    except (psycopg.Error, OSError) as error:
        which = "RECALL_LISTEN_DSN" if exam.settings.listen_dsn is not None else "RECALL_DSN"
        exam.find(
            PROBLEM,
            f"the LISTEN connection can't be opened: {error_text(error)}",
            f"check {which}: it must lead to the server itself",
        )
        return
    if (await exam.ask("read_only", conn))[0]["standby"]:
        exam.find(
            PROBLEM,
            "the LISTEN connection leads to a standby, which does not support LISTEN",
            FAILOVER_HINT,
        )
        return
    own = f"{CHANNEL}_{uuid4().hex[:16]}"
    for channel in (CHANNEL, own):
        await conn.execute(f"listen {channel}".encode())
    times = []
    for n in range(NOTIFICATIONS):
        began = time.monotonic()
        # Only the first of them also notifies the workers' channel.
        await exam.ask("notify_own" if n else "notify", channel=own)
        heard: set[str] = set()
        while own not in heard and (left := began + NOTIFY_DEADLINE - time.monotonic()) > 0:
            async for notification in conn.notifies(timeout=left, stop_after=1):
                heard.add(notification.channel)
        if own not in heard or (n == 0 and CHANNEL not in heard):
            _not_received(exam)
            return
        times.append(time.monotonic() - began)
    exam.find(
        OK,
        f"notifications arrive ({NOTIFICATIONS} of {NOTIFICATIONS}), after "
        f"{span(sorted(times)[NOTIFICATIONS // 2])}",
    )
    if exam.server["queue"] > QUEUE_FULL:
        todo = (
            "end the transaction that a listener has open: see pg_stat_activity, state "
            "'idle in transaction'"
        )
        exam.find(
            PROBLEM,
            (
                f"PostgreSQL's queue of notifications is {exam.server['queue']:.0%} full; when it "
                "is full, inserts fail"
            ),
            todo,
        )


def _not_received(exam: Examination) -> None:
    todo = (
        "the same database on the same server in RECALL_LISTEN_DSN"
        if exam.settings.listen_dsn is not None
        else POOLER_HINT
    )
    exam.find(
        PROBLEM,
        f"a notification did not arrive within {NOTIFY_DEADLINE:g} s: {_meanwhile(exam)}",
        todo,
    )


def _meanwhile(exam: Examination) -> str:
    return f"new recalls are found only by polls, every {exam.settings.poll_interval:g} s"
