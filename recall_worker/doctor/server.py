"""The database server: does it answer and accept writes, are its settings safe, its clock right?"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from psycopg.conninfo import conninfo_to_dict

from ..terminal import span
from .examination import DIRECT, NOTE, OK, PROBLEM, STATEMENT, Examination, pooling_of

OLDEST = 140000
"""The oldest PostgreSQL that the statements are written for."""
CONNECTIONS = 5
"""What a worker has open every day: claims, settles, renewals, LISTEN, and one for a locked row."""
LONG_TRANSACTION = 300.0
"""Seconds after which an open transaction is noted: its locks and dead rows begin to cost."""
QUEUE_FULL = 0.5
"""Share of PostgreSQL's notification queue in use from which on a problem is reported."""
CLOCK_OFF, CLOCK_FAR_OFF = 2.0, 240.0
"""Seconds between two clocks: from the first on a note; past the second a receiver of signatures
(Standard Webhooks: five minutes) may refuse them.
"""

FAILOVER_HINT = (
    "target_session_attrs=read-write in RECALL_DSN (and RECALL_LISTEN_DSN), with all hosts"
)


async def database(exam: Examination) -> None:
    exam.pooling = await pooling_of(exam.dsn)
    began = time.monotonic()
    exam.conn = await exam.connect(exam.dsn, set_up=exam.pooling != STATEMENT)
    took = time.monotonic() - began
    exam.reached = True
    exam.server = row = await exam.one("server")
    exam.role = row["role"]
    where = exam.conn.info.host or "its socket"
    exam.find(
        OK,
        f"PostgreSQL {row['version']} at {where}, port {exam.conn.info.port}, database "
        f"{row['database']}, as {row['role']}; "
        f"connected in {span(took)}",
    )
    if row["number"] < OLDEST:
        exam.find(
            PROBLEM,
            f"PostgreSQL {row['version']} is older than the statements are written for",
            "PostgreSQL 14 or newer",
        )
    given = conninfo_to_dict(exam.dsn)
    attrs = given.get("target_session_attrs")
    several = "," in str(given.get("host") or given.get("hostaddr") or "")
    if row["standby"]:
        todo = (
            FAILOVER_HINT
            if several
            else (
                "the primary's address in RECALL_DSN, or both, with target_session_attrs=read-write"
            )
        )
        exam.find(PROBLEM, "this is a standby: it takes no writes", todo)
    elif row["read_only"]:
        todo = (
            "alter role or database … set default_transaction_read_only = off; or the "
            "primary's address in RECALL_DSN"
        )
        exam.find(
            PROBLEM, "transactions can't write here: default_transaction_read_only is on", todo
        )
    # Without the setting, the worker connects to the host that accepts writes.
    elif several and attrs not in (None, "read-write", "primary"):
        exam.find(
            PROBLEM,
            f"target_session_attrs={attrs} may lead to a standby after a failover",
            FAILOVER_HINT,
        )


async def clock(exam: Examination) -> None:
    measured = []
    for _ in range(3):
        began, host = time.monotonic(), datetime.now(UTC)
        row = await exam.one("clock")
        took = time.monotonic() - began
        measured.append((took, (row["now"] - host).total_seconds() - took / 2))
    took, offset = min(measured)
    how = (
        f"the database's clock is {span(abs(offset))} "
        f"{'ahead of' if offset > 0 else 'behind'} this host's (± {span(took / 2)})"
    )
    if abs(offset) > CLOCK_FAR_OFF and exam.settings.signing_secret is not None:
        exam.find(
            NOTE,
            f"{how}; signatures carry this host's time, and an API may refuse them",
            "chrony or another NTP client on this host",
        )
    elif abs(offset) > CLOCK_OFF:
        exam.find(
            NOTE,
            f"{how}; no recall is late for it, as only the database's clock decides",
            "chrony or another NTP client on both hosts",
        )
    else:
        exam.find(OK, how)


async def server(exam: Examination) -> None:
    row, before = exam.server, len(exam.findings)
    for name in ("fsync", "full_page_writes"):
        if row[name] == "off":
            exam.find(
                NOTE,
                f"{name} is off: a crash of the server's host may cost the database",
                f"{name} = on",
            )
    if row["synchronous_commit"] == "off":
        exam.find(
            NOTE,
            "synchronous_commit is off: a crash loses the last recalls and settles",
            "synchronous_commit = on",
        )
    if row["autovacuum"] == "off":
        exam.find(
            NOTE, "autovacuum is off: every settle leaves a dead row behind", "autovacuum = on"
        )
    replicas = max(1, len(exam.alive))
    needed, limit = replicas * CONNECTIONS, row["places"]
    which = next(
        (name for name in ("role_limit", "database_limit") if row[name] == limit), "max_connections"
    )
    if exam.pooling == DIRECT and limit is not None and limit < needed:
        seen = (
            f"{_workers(replicas)} may open {needed} connections, and "
            f"{which.replace('_', ' ')} leaves {limit}"
        )
        exam.find(PROBLEM, seen, f"allow at least {needed}, besides those of the application")
    elif exam.pooling == DIRECT and row["max_connections"] - row["connections"] < CONNECTIONS:
        exam.find(
            NOTE,
            (
                f"{row['connections']} of {row['max_connections']} connections are in use: "
                "another worker may get none"
            ),
            "more max_connections, or a pooler (RECALL_DSN through it, RECALL_LISTEN_DSN direct)",
        )
    for open in await exam.ask("open_transaction", longest=LONG_TRANSACTION):
        who = (
            f"of {open['role']}, {open['application'] or 'without a name'}, pid "
            f"{open['pid']}, {open['state']}"
        )
        exam.find(
            NOTE,
            (
                f"a transaction ({who}) has been open for {span(open['seconds'])}: until it ends, "
                "its locks and dead rows stay"
            ),
            (
                f"select pg_terminate_backend({open['pid']}); idle_in_transaction_session_timeout "
                "does it by itself"
            ),
        )
    if len(exam.findings) == before:
        exam.find(
            OK,
            (
                f"{row['connections']} of {row['max_connections']} connections are in use; "
                "no harmful settings found"
            ),
        )


def _workers(count: int) -> str:
    return "one worker" if count == 1 else f"{count} workers"
