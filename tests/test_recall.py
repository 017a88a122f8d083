"""The nouns: closed unions of frozen dataclasses, the idempotency key, and the words for how a call
ended.

`claim_with` is where the other pure tests get a claim from: one that nothing is special about, but
for what they name.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from uuid import UUID

import pytest

from recall_worker import recall
from recall_worker.recall import (
    Accepted,
    Answered,
    Busy,
    Capped,
    Claim,
    Expired,
    Failed,
    Gone,
    Malformed,
    Misconfigured,
    Misfired,
    Outcome,
    Refused,
    Settlement,
    Unavailable,
    Unknown,
    Unsent,
    Verdict,
    When,
    http_status_of,
    name_of,
    reason_of,
)

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)

OUTCOMES: list[Outcome] = [
    Answered(200),
    Accepted("run-1", 202),
    Busy(409, None),
    Gone(404),
    Misconfigured("nothing is at this address", 404),
    Unavailable("no connection"),
    Unknown("no answer within 5 s"),
    Failed("the API says that the run ended as failed", 200),
    Refused("the API refuses the request", 422),
    Capped("its session had 5 runs within an hour", 90.0),
    Unsent("stopping"),
    Malformed("an interval of 0"),
    Misfired("7201 s late, past its grace of 7200 s", 1),
    Expired("it had all of its 3 occurrences"),
]


def claim_with(**changes: Any) -> Claim:
    """A one-shot's first claim, due at noon and claimed at once; `changes` say what is
    otherwise."""
    claim = Claim(
        id="r1",
        session_id="s1",
        call_type="once",
        message="look at the build again",
        interval=None,
        occurrence=1,
        rekey=0,
        attempt=1,
        deferrals=0,
        scheduled_for=NOON,
        missed=0,
        begun_age=None,
        lag=0.001,
        lateness=0.001,
        lease=UUID(int=1),
        trigger="2026-03-01 12:00:00+00",
        trigger_at=NOON,
        planned_at=NOON,
        due=True,
        taken_from=None,
        claimed_at=NOON + timedelta(milliseconds=1),
    )
    return claim._replace(**changes)


def test_every_outcome_has_a_sample() -> None:
    """The table that the pure tests work through holds each outcome of the union once."""
    assert {type(outcome) for outcome in OUTCOMES} == set(get_args(Outcome))
    assert len(OUTCOMES) == len(get_args(Outcome))


@pytest.mark.parametrize(
    "union", [Outcome, Verdict, When, Settlement], ids=["outcome", "verdict", "when", "settlement"]
)
def test_unions_are_closed_over_frozen_dataclasses(union: object) -> None:
    """Each member of a union is a frozen dataclass with slots, and no member is a kind of another:
    a match is unambiguous."""
    members = get_args(union)
    assert len(members) > 1
    for member in members:
        assert member.__dataclass_params__.frozen and "__slots__" in vars(member)
        assert [other for other in members if issubclass(member, other)] == [member]


def test_a_claim_is_frozen() -> None:
    """What the worker holds of a recall can't be changed in place."""
    with pytest.raises(AttributeError):
        claim_with().attempt = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({}, "r1:1"),
        ({"occurrence": 12}, "r1:12"),
        ({"rekey": 1}, "r1:1.1"),
        ({"occurrence": 3, "rekey": 2}, "r1:3.2"),
        ({"id": "a:1.1", "occurrence": 7}, "a:1.1:7"),
    ],
    ids=["first", "twelfth", "renewed", "renewed twice", "an id that looks like a key"],
)
def test_key(changes: dict[str, Any], key: str) -> None:
    """The key is `<recall id>:<occurrence>`, with `.<rekey>` behind it where it was renewed."""
    assert claim_with(**changes).key == key


def test_key_is_the_same_for_each_attempt() -> None:
    """Neither the attempt, nor the deferrals, nor the lease, nor the time of the claim are in the
    key."""
    later = claim_with(
        attempt=3,
        deferrals=9,
        lease=UUID(int=2),
        lateness=900.0,
        begun_age=80.0,
        taken_from="w2",
        missed=4,
    )
    assert later.key == claim_with().key


@pytest.mark.parametrize(
    ("call_type", "recurring"), [("once", False), ("immediate", False), ("recurring", True)]
)
def test_recurring(call_type: str, recurring: bool) -> None:
    """Of the call types only `recurring` recurs."""
    assert claim_with(call_type=call_type).recurring is recurring
    assert call_type in recall.CALL_TYPES


@pytest.mark.parametrize(
    "by", [timedelta(microseconds=1), timedelta(microseconds=-1), timedelta(days=400)], ids=str
)
def test_moved(by: timedelta) -> None:
    """A claim is moved exactly if `trigger_at` is another than the worker last wrote, by a
    microsecond or by a year."""
    assert claim_with(trigger_at=NOON + by).moved
    assert not claim_with().moved
    assert not claim_with(trigger_at=NOON.astimezone(None)).moved


def test_statuses() -> None:
    """Live and final statuses share none, and are all there are."""
    assert set(recall.LIVE) == {"pending", "running"}
    assert set(recall.FINAL) == {"fired", "cancelled", "failed"}
    assert recall.STATUSES == recall.LIVE + recall.FINAL


@pytest.mark.parametrize("outcome", OUTCOMES, ids=name_of)
def test_name_of(outcome: Outcome) -> None:
    """An outcome's name is one plain lower-case word."""
    assert name_of(outcome) == type(outcome).__name__.lower()
    assert re.fullmatch(r"[a-z]+", name_of(outcome))


@pytest.mark.parametrize("outcome", OUTCOMES, ids=name_of)
def test_reason_of(outcome: Outcome) -> None:
    """Each ending that is not as it should be says why in a sentence; a run that went well has
    nothing to explain."""
    reason = reason_of(outcome)
    if isinstance(outcome, Answered | Accepted):
        assert reason is None
    else:
        assert reason
    if isinstance(outcome, Busy | Gone):
        assert reason is not None and str(outcome.http_status) in reason


@pytest.mark.parametrize("outcome", OUTCOMES, ids=name_of)
def test_http_status_of(outcome: Outcome) -> None:
    """An outcome tells the HTTP status where there was an answer, and None where there was none."""
    answered = {
        "answered": 200,
        "accepted": 202,
        "busy": 409,
        "gone": 404,
        "misconfigured": 404,
        "failed": 200,
        "refused": 422,
    }
    assert http_status_of(outcome) == answered.get(name_of(outcome))
