"""What is on record is compared with what was asked and answered: each difference is found, and
what agrees is not."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from .journal import LATEST, NEVER, Act, End, Journal, Operation, Promise, resolve

NOW = 1_800_000_000.0


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(NOW + seconds, UTC)


def row(actor: str, action: str, recall: str | None = "r", **more: Any) -> dict[str, Any]:
    """An action on record, by default of a command, a second after it was asked for."""
    return {
        "at": at(1),
        "actor": actor,
        "via": "cli",
        "action": action,
        "recall_id": recall,
        "detail": {},
    } | more


def operation(*actions: str, name: str = "op0", **more: Any) -> Operation:
    given: dict[str, Any] = {"via": "cli", "asked": NOW, "done": NOW + 2} | more
    return Operation(name, actions=actions, **given)


def journal(*operations: Operation) -> Journal:
    found = Journal(operations=list(operations))
    found.promises["r"] = Promise("r", "s", "once", NOW)
    return found


@pytest.mark.parametrize(
    ("operations", "rows", "said"),
    [
        ([], [row("somebody", "cancel")], "nobody asked for it"),
        ([operation("pause")], [row("op0", "cancel")], "asked for was pause"),
        ([operation("cancel", via="console")], [row("op0", "cancel")], "asked for was cancel"),
        ([operation("cancel")], [row("op0", "cancel", at=at(3))], "3.00 s after"),
        ([operation("cancel")], [row("op0", "cancel", at=at(-1))], "-1.00 s after"),
        ([operation("cancel")], [row("op0", "cancel")] * 2, "2 times for r"),
        ([operation("cancel", refused=True)], [row("op0", "cancel")], "was refused, and is on"),
        ([operation("cancel", changed={"r"})], [], "not on record: ['r']"),
        ([operation("cancel", changed=set())], [row("op0", "cancel")], "not named: ['r']"),
        ([operation("cancel", count=2)], [row("op0", "cancel")], "counts 2, and on record are 1"),
        ([operation("cancel")], [row("op0", "cancel", "x")], "which nobody scheduled"),
        (
            [operation("cancel", count=0, in_hand=100, done=None)],
            [row("op0", "x")] * 101,
            "counts 0",
        ),
        (
            [operation("cancel", name="agent of t", via="mcp", session="t")],
            [row("agent of t", "cancel", via="mcp")],
            "an agent of t did cancel to r of s",
        ),
        (
            [operation("list_recalls", name="agent of t", via="mcp", session="t", shown={"r"})],
            [],
            "an agent of t was shown r of s",
        ),
        (
            [operation("pause", told={"r": {"paused_at": at(1), "trigger_at": at(9)}})],
            [],
            "paused r, and that is not on record",
        ),
    ],
)
def test_a_difference_is_found(
    operations: list[Operation], rows: list[dict[str, Any]], said: str
) -> None:
    assert any(said in found for found in resolve(journal(*operations), rows))


@pytest.mark.parametrize(
    ("operations", "rows"),
    [
        ([operation("cancel", changed={"r"})], [row("op0", "cancel")]),
        ([operation("cancel", count=1)], [row("op0", "cancel")]),
        ([operation("cancel", refused=True)], []),
        ([operation("cancel", count=0, in_hand=100, done=None)], [row("op0", "cancel")]),
        # No answer came: whether it was done is what the record says.
        ([operation("cancel", done=None)], []),
        ([operation("cancel", done=None)], [row("op0", "cancel", at=at(40))]),
        # It was paused a moment before, by somebody else.
        (
            [
                operation("pause", told={"r": {"paused_at": at(1), "trigger_at": at(9)}}),
                operation("pause", name="op1"),
            ],
            [row("op1", "pause")],
        ),
    ],
)
def test_what_agrees_is_no_finding(operations: list[Operation], rows: list[dict[str, Any]]) -> None:
    assert resolve(journal(*operations), rows) == []


def test_what_is_on_record_was_done_to_the_recall() -> None:
    """Also where no answer came: then by a while after it began."""
    known = journal(operation("reschedule"), operation("cancel", name="op1", done=None))
    moved = {"trigger_at": {"from": None, "to": at(9).isoformat()}, "in_run": True}
    rows = [row("op0", "reschedule", detail=moved), row("op1", "cancel", at=at(2))]
    assert resolve(known, rows) == []
    promise = known.promises["r"]
    [act] = promise.acts
    assert (act.what, act.due, act.leased, promise.moves) == ("move", NOW + 9, True, 1)
    [end] = promise.ends
    assert (end.done, end.revived, promise.ended) == (NOW + 2 + LATEST, NEVER, "cancelled")


@pytest.mark.parametrize(
    ("retried", "ended"), [(-5, "cancelled"), (5, None), (1, None)], ids=["before", "after", "with"]
)
def test_a_retry_undoes_an_end_before_it(retried: float, ended: str | None) -> None:
    """Of two at the same time nobody knows which was first."""
    known = journal()
    promise = known.promises["r"]
    promise.ends.append(End(NOW, NOW + 2))
    promise.acts.append(Act("retry", NOW + retried, NOW + retried + 1))
    resolve(known, [])
    assert promise.ended == ended


def test_what_an_agent_scheduled_is_a_promise() -> None:
    """As it is on record, whether its answer came or not."""
    known = journal(
        operation("schedule", name="agent of t", via="mcp", session="t", done=None),
    )
    fields = {
        "call_type": "recurring",
        "trigger_at": at(4).isoformat(),
        "interval_seconds": 1,
        "times": 3,
        "cadence": "grid",
        "queue": "default",
    }
    detail = {name: {"from": None, "to": value} for name, value in fields.items()}
    scheduled = row("agent of t", "schedule", "q", via="mcp", detail=detail | {"session_id": "t"})
    assert resolve(known, [scheduled]) == []
    promise = known.promises["q"]
    assert (promise.session, promise.kind, promise.interval, promise.times, promise.cadence) == (
        "t",
        "recurring",
        1,
        3,
        "grid",
    )


def test_a_queue_is_paused_from_its_pause_to_its_resume() -> None:
    known = journal(operation("pause_queue"), operation("resume_queue", name="op1"))
    rows = [
        row("op0", "pause_queue", None, detail={"queue": "side"}),
        row("op1", "resume_queue", None, at=at(1.5), detail={"queue": "side"}),
    ]
    assert resolve(known, rows) == []
    [pause] = known.pauses
    assert (pause.queue, pause.asked, pause.held) == ("side", NOW + 1, NOW + 2)
    assert (pause.freed, pause.over) == (NOW + 1.5, NOW + 2)
