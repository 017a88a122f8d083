"""Why a recall is in its state, in a few words beside it in a table: from its row and from what is
known of all workers together. The whole sentence, with its evidence, is on its own page
(operations.why). Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ..fleet import serves
from ..settings import ALL_QUEUES
from ..terminal import local
from ..top.picture import called_before

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fleet:
    """What holds back many recalls at once."""

    workers: Sequence[Row] = ()
    """Of the statement `workers`."""
    paused: Mapping[str, Row] = field(default_factory=dict)
    """Paused queues, by name."""
    runs: Mapping[str, Row] = field(default_factory=dict)
    """What is in a run, by its session."""
    copy: bool = False

    @classmethod
    def of(
        cls, workers: Sequence[Row], paused: Sequence[Row], runs: Sequence[Row], copy: bool
    ) -> Fleet:
        return cls(
            workers=[row for row in workers if row["alive"]],
            paused={row["queue"]: row for row in paused},
            runs={row["session_id"]: row for row in runs},
            copy=copy,
        )


def brief(row: Row, fleet: Fleet, now: datetime) -> str:
    """Why it is in its state. `row`: of session_recalls, or of the live picture, whose rows are all
    live, unleased and unpaused."""
    status = row.get("status", "pending")
    if status is None:
        return "its status is null: no worker takes it up"
    if status not in ("pending", "running"):
        of_its_own = status != "cancelled" or row["ended_at"] is not None
        return str((row["reason"] if of_its_own else None) or _ended(row))
    if row.get("lease") is not None:
        if row["lease_until"] is not None and row["lease_until"] <= now:
            return f"the lease of worker {row['leased_by']} has ended: another one takes it over"
        return f"in a run, by worker {row['leased_by']}"
    if row.get("paused_at") is not None:
        return f"paused since {local(row['paused_at'])}"
    due = row["due_at"] if "due_at" in row else row["lease_until"] or row["trigger_at"]
    past = _past(row)
    if due is None:
        return "never due: its trigger_at is null"
    if due > now:
        return past or "its time has not come"
    held = _held(row, fleet)
    return f"{held}; {past}" if past else held


def _held(row: Row, fleet: Fleet) -> str:
    """Why it was not claimed, though it is due."""
    queue = row["queue"]
    if fleet.copy:
        return "this database is a copy: workers claim nothing"
    pause = fleet.paused.get(ALL_QUEUES) or fleet.paused.get(queue)
    if pause is not None:
        which = "all queues are" if pause["queue"] == ALL_QUEUES else f"queue {queue} is"
        why = f": {pause['reason']}" if pause["reason"] else ""
        return f"{which} paused by {pause['paused_by']}{why}"
    ahead = fleet.runs.get(row["session_id"])
    if ahead is not None and ahead["id"] != row["id"]:
        return f"its session is in a run: recall {ahead['id']}"
    if not fleet.workers:
        return "no live worker"
    serving = [worker for worker in fleet.workers if serves(worker, queue)]
    if not serving:
        return f"no live worker serves queue {queue}"
    if all(worker["held"] is not None for worker in serving):
        return "all workers of its queue are held: they claim nothing"
    if all(worker["breaker"] == "open" for worker in serving):
        return "the endpoint is failing: only test calls are sent"
    slots = sum(worker["slots"] for worker in serving)
    if sum(worker["leases"] for worker in serving) >= slots:
        return f"all {slots} slots are taken"
    return "waits to be claimed"


def _past(row: Row) -> str | None:
    """What its last calls were, where it is called again."""
    if (called := called_before(row)) is not None:
        return called
    if row["last_outcome"] == "misfired":
        return f"its last occurrence {row['reason'] or row['last_outcome']}"
    return None


def _ended(row: Row) -> str:
    if row["status"] == "cancelled" and row["ended_at"] is None:
        return "cancelled by the application"
    last = row["last_outcome"]
    return str(row["status"]) + (f", its last call {last}" if last is not None else "")
