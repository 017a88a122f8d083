"""What the rows of recall_workers say of the workers together: who is alive, and do they agree? And
what dates that have not come yet say of PostgreSQL's clock.

For the commands that read (`workers`, `why`, `stats`, `doctor`); the worker itself decides nothing
by this.

Never here: a statement of SQL, a table or a column of what is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .database.identity import COPY, PAUSED, UNKNOWN
from .database.ledger import GRACE_AFTER_OUTAGE
from .settings import DEFAULT_QUEUE, LEASE, LEASE_MOST
from .terminal import local, span

SILENT_AFTER = 180.0
"""Seconds without a heartbeat after which a worker counts as gone: three of its heartbeats at the
longest lease.
"""
CUT_OFF_AFTER = 10.0
"""The same where PostgreSQL also knows of no LISTEN connection of it, as after a kill -9."""
SILENCE = {"silence": SILENT_AFTER, "cut_off": CUT_OFF_AFTER}
FLEET = {
    **SILENCE,
    "lease": LEASE,
    "lease_most": LEASE_MOST,
    "grace": GRACE_AFTER_OUTAGE,
    "queue": None,
    **UNKNOWN.known,
}
"""The values of the statement `fleet`, of all queues, where it is not known which database this is
(else: with `Identity.known`). `lease`: of workers whose rows do not say theirs."""
CLOCK_TOLERANCE = 5.0
"""Seconds by which PostgreSQL's clock may go back unmentioned: time servers make such corrections,
and calls are dated from their workers' own measurements."""
ALIKE = (
    "lease",
    "run_url",
    "max_attempts",
    "give_up",
    "run_timeout",
    "protocol",
    "fleet_concurrency",
    "tzdata",
)
"""Settings that the workers of one table should agree in; and the version of their tzdata."""
SETTING_LONGEST = 100
"""Characters of a setting that are shown."""


def setting_of(row: Mapping[str, Any], name: str) -> str | None:
    """A setting as the worker wrote it; None if it did not. A row of another version, or one that
    somebody wrote by hand, may hold anything.
    """
    value = row["settings"].get(name) if isinstance(row["settings"], dict) else None
    if isinstance(value, int | float):
        return f"{value:g}"
    return None if value is None else str(value)[:SETTING_LONGEST]


def state_of(row: Mapping[str, Any]) -> str:
    """A worker's state in a word: `row` of the statement `workers`."""
    if row["elsewhere"]:
        return "elsewhere"
    if not row["alive"]:
        return "silent"
    return {COPY: "held (copy)", PAUSED: "paused"}.get(row["held"], "alive")


def serves(row: Mapping[str, Any], queue: str) -> bool:
    """Whether a worker claims from this queue; one of a version without queues claims from all."""
    return row["queues"] is None or queue in row["queues"]


def queues_of(row: Mapping[str, Any]) -> str:
    """The queues of a worker, for people."""
    return "all" if row["queues"] is None else ", ".join(row["queues"])


def differences(alive: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The settings in which live workers of one queue differ, each with its values."""
    queues = sorted({queue for row in alive for queue in row["queues"] or [DEFAULT_QUEUE]})
    found: dict[tuple[str, tuple[str, ...]], None] = {}
    for name in ALIKE:
        for queue in queues:
            values = {str(setting_of(row, name)) for row in alive if serves(row, queue)}
            if len(values) > 1:
                found[name, tuple(sorted(values))] = None
    return [(name, list(values)) for name, values in found]


def clock_back(row: Mapping[str, Any]) -> str | None:
    """A clause if PostgreSQL's clock has gone back: rows become due by it, and so stand still until
    it has caught up; else None. `row`: what the statement `clock_back` returns.
    """
    if row["clock_at"] is None:
        return None
    by = span((row["clock_at"] - row["now"]).total_seconds())
    perhaps = ", or the application's clock is ahead" if row["clock_foreign"] else ""
    return (
        f"PostgreSQL's clock has gone back, by {by} or more{perhaps}: it says {local(row['now'])}, "
        f"and {row['clock_what']} is dated {local(row['clock_at'])}; what was planned by the later "
        "time waits until the clock has caught up"
    )


def fleet_cap(row: Mapping[str, Any]) -> str | None:
    """A clause if RECALL_FLEET_CONCURRENCY holds back due recalls: the cap, and whose leases fill
    it; else None. `row`: what the statement `fleet` returns.
    """
    if row["fleet_cap"] is None or row["fleet_leases"] < row["fleet_cap"]:
        return None
    one = row["fleet_ended"] == 1
    after = span(row["fleet_lease"] * GRACE_AFTER_OUTAGE)
    whose = [
        (row["fleet_of_live"], "of live workers"),
        (row["fleet_of_silent"], "of workers without a heartbeat"),
        (
            row["fleet_ended"],
            (
                f"that {'has' if one else 'have'} ended, counted until {after} after "
                f"{'its' if one else 'their'} end"
            ),
        ),
    ]
    parts = ", ".join(f"{leases} {how}" for leases, how in whose if leases)
    count = (
        f"{row['fleet_leases']} "
        f"lease{' counts' if row['fleet_leases'] == 1 else 's count'} against it"
    )
    return (
        f"the fleet runs as many as RECALL_FLEET_CONCURRENCY ({row['fleet_cap']}) allows: "
        f"{count} ({parts})"
    )
