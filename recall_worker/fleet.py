"""What the rows of recall_workers say of the workers together: who is alive, and do they agree?

For the commands that read (`workers`, `why`, `stats`, `doctor`); the worker itself decides nothing
by this.

Never here: a statement of SQL, a table or a column of what is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .database.ledger import GRACE_AFTER_OUTAGE
from .settings import LEASE, LEASE_MOST
from .terminal import span

SILENT_AFTER = 180.0
"""Seconds without a heartbeat after which a worker counts as gone: three of its heartbeats at the
longest lease.
"""
FLEET = {
    "silence": SILENT_AFTER,
    "lease": LEASE,
    "lease_most": LEASE_MOST,
    "grace": GRACE_AFTER_OUTAGE,
}
"""The values of the statement `fleet`. `lease`: of workers whose rows do not say theirs."""
ALIKE = (
    "lease",
    "run_url",
    "max_attempts",
    "give_up",
    "run_timeout",
    "protocol",
    "fleet_concurrency",
)
"""Settings that the workers of one table should agree in."""
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


def differences(alive: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The settings in which live workers differ, each with its values."""
    found = [(name, sorted({str(setting_of(row, name)) for row in alive})) for name in ALIKE]
    return [(name, values) for name, values in found if len(values) > 1]


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
