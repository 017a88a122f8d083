"""The database server: can it be reached, does it take writes, how is it set, what does its clock
say?
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from psycopg.conninfo import conninfo_to_dict

from ..terminal import span
from .examination import DIRECT, NOTE, OK, PROBLEM, Examination

OLDEST = 140000
"""The oldest PostgreSQL that the statements are written for."""
CONNECTIONS = 5
"""What a worker has open at most: claims, settles, renewals, the bell, and one for a row that is
held locked.
"""
LONG_TRANSACTION = 300.0
CLOCK_OFF, CLOCK_FAR_OFF = 2.0, 240.0
"""Seconds between two clocks that are worth a word, and that a receiver of signatures (Standard
Webhooks: five minutes) may not take.
"""

FAILOVER_HINT = (
    "target_session_attrs=read-write in RECALL_DSN (and RECALL_LISTEN_DSN), with all hosts"
)


async def database(exam: Examination) -> None:
    began = time.monotonic()
    exam.conn = await exam.connect(exam.dsn)
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
            PROBLEM, "transactions take no writes here: default_transaction_read_only is on", todo
        )
    # Where nothing is said, the worker means the one that takes writes.
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
            f"{how}; signatures carry this host's, and an API may refuse them",
            "chrony or another NTP client on this host",
        )
    elif abs(offset) > CLOCK_OFF:
        exam.find(
            NOTE,
            f"{how}; escape_controls, as the database's alone decides",
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
            "synchronous_commit is off: a crash takes back promises and settles of the last moment",
            "synchronous_commit = on",
        )
    if row["autovacuum"] == "off":
        exam.find(
            NOTE, "autovacuum is off: every settle leaves a dead row behind", "autovacuum = on"
        )
    if 0 < row["statement_timeout"] < 5:
        seen = (
            f"statement_timeout is {span(row['statement_timeout'])} for {exam.role}: "
            "commands may be cut off (the worker sets its own)"
        )
        exam.find(NOTE, seen, f"alter role {exam.role} set statement_timeout = '30s'")
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
        exam.find(PROBLEM, seen, f"at least {needed}, besides those of the application")
    elif exam.pooling == DIRECT and row["max_connections"] - row["connections"] < CONNECTIONS:
        exam.find(
            NOTE,
            (
                f"{row['connections']} of {row['max_connections']} connections are in use: "
                "another worker may find none"
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
                f"a transaction ({who}) has been open for {span(open['seconds'])}: its locks and "
                "dead rows stay as long"
            ),
            (
                f"select pg_terminate_backend({open['pid']}); idle_in_transaction_session_timeout "
                "ends such by itself"
            ),
        )
    if len(exam.findings) == before:
        exam.find(
            OK,
            (
                f"{row['connections']} of {row['max_connections']} connections are in use; "
                "nothing is set to our harm"
            ),
        )


def _workers(count: int) -> str:
    return "one worker" if count == 1 else f"{count} workers"
