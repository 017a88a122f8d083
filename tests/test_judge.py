"""The judge: every outcome, for every call type, moved or not, with attempts left or not; and what
holds for all of them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, assert_never

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recall_worker.judge import (
    BACKOFF_MOST,
    ID_MOST,
    LAST,
    RETRY_AFTER_LEAST,
    RETRY_AFTER_MOST,
    Policy,
    as_it_stands,
    backoff,
    before_call,
    changed_by_hand,
    judge,
    resolve_move,
)
from recall_worker.recall import (
    Accepted,
    After,
    Answered,
    AsMoved,
    At,
    Busy,
    Capped,
    Claim,
    Defer,
    Ending,
    Expired,
    Failed,
    Finish,
    Gone,
    Malformed,
    Misconfigured,
    Misfired,
    Next,
    Outcome,
    Placement,
    Refused,
    Release,
    Retry,
    Unavailable,
    Unknown,
    Unsent,
    Verdict,
    name_of,
    reason_of,
)

from .test_recall import NOON, OUTCOMES, claim_with

POLICY = Policy(busy_delay=60.0, max_attempts=3, give_up=86_400.0)
CALL_TYPES = ("once", "immediate", "recurring")
INTERVAL = 600
MOVES = {
    "unmoved": timedelta(0),
    "skipped once": timedelta(seconds=INTERVAL),
    "skipped twice": timedelta(seconds=2 * INTERVAL),
    "rescheduled": timedelta(seconds=INTERVAL + 7),
    "rescheduled earlier": timedelta(seconds=-7),
}


def half() -> float:
    """Dice that show the middle."""
    return 0.5


def claimed(call_type: str = "once", move: str = "unmoved", **changes: Any) -> Claim:
    interval = INTERVAL if call_type == "recurring" else None
    return claim_with(
        call_type=call_type,
        interval=interval,
        trigger_at=NOON + MOVES[move],
        occurrence=5,
        **changes,
    )


def ended(
    claim: Claim,
    outcome: Outcome,
    *,
    after: float = 1.0,
    breaker_closed: bool = True,
    called_after: float = 0.001,
    others_answered: bool = False,
) -> Ending:
    called = None if isinstance(outcome, Unsent | Malformed) else called_after
    return Ending(claim, outcome, called, after, 1000.0, breaker_closed, others_answered)


def verdict_on(claim: Claim, outcome: Outcome, **more: Any) -> Verdict:
    return judge(ended(claim, outcome, **more), POLICY, half)


# --- one row a case: the outcome table ------------------------------------------------------------


BACKOFF_OF_FIRST = After(2.5)
"""Half of 5 s: what `half` makes of the first backoff."""

HANDED_OVER = Release("accepted by the API, and polled by the next worker")
"""What a worker that stops says of a run that goes on at the API."""

UNMOVED: list[tuple[Outcome, Verdict, Verdict]] = [
    (Answered(200), Finish("fired", None), Next(6, After(600.0))),
    (Accepted("run-1", 202), HANDED_OVER, HANDED_OVER),
    (
        Capped("had 5 runs", 90.0),
        Defer(After(90.0), "had 5 runs"),
        Defer(After(90.0), "had 5 runs"),
    ),
    (
        Busy(409),
        Defer(After(60.0), "the session is busy (HTTP 409)"),
        Defer(After(60.0), "the session is busy (HTTP 409)"),
    ),
    (
        Busy(423, 7.0),
        Defer(After(7.0), "the session is busy (HTTP 423)"),
        Defer(After(7.0), "the session is busy (HTTP 423)"),
    ),
    (
        Gone(404),
        Finish("cancelled", "the API says that the session does not exist (HTTP 404)"),
        Finish("cancelled", "the API says that the session does not exist (HTTP 404)"),
    ),
    (
        Misconfigured("a web page", 200),
        Defer(BACKOFF_OF_FIRST, "a web page", 1),
        Defer(BACKOFF_OF_FIRST, "a web page", 1),
    ),
    (
        Unavailable("refused"),
        Defer(BACKOFF_OF_FIRST, "refused"),
        Defer(BACKOFF_OF_FIRST, "refused"),
    ),
    (Unavailable("later", 503, 9.0), Defer(After(9.0), "later"), Defer(After(9.0), "later")),
    (
        Unknown("broke off"),
        Retry(BACKOFF_OF_FIRST, False, "broke off"),
        Retry(BACKOFF_OF_FIRST, False, "broke off"),
    ),
    (
        Failed("failed", 200),
        Retry(BACKOFF_OF_FIRST, True, "failed"),
        Retry(BACKOFF_OF_FIRST, True, "failed"),
    ),
    (Refused("no", 422), Finish("failed", "no"), Next(6, After(600.0), "no", failures=1)),
    (Unsent("stopping"), Release("stopping"), Release("stopping")),
    (Malformed("no interval"), Finish("failed", "no interval"), Finish("failed", "no interval")),
    (
        Misfired("late", 0),
        Finish("failed", "misfired: late"),
        Next(6, At(NOON + timedelta(seconds=600)), "misfired: late"),
    ),
    (Expired("it had all"), Finish("fired", "it had all"), Finish("fired", "it had all")),
]
"""outcome, verdict on once and immediate, verdict on recurring: a first attempt of three, nobody
moved the recall."""


def test_the_table_is_whole() -> None:
    """Every outcome has its row."""
    assert {type(outcome) for outcome, _, _ in UNMOVED} == {type(outcome) for outcome in OUTCOMES}


@pytest.mark.parametrize(
    ("outcome", "one_shot", "recurring"), UNMOVED, ids=[repr(row[0]) for row in UNMOVED]
)
def test_first_attempt(outcome: Outcome, one_shot: Verdict, recurring: Verdict) -> None:
    """What the row becomes after a first call that nobody interfered with: DESIGN's outcome
    table."""
    assert verdict_on(claimed("once"), outcome) == one_shot
    assert verdict_on(claimed("immediate"), outcome) == one_shot
    assert verdict_on(claimed("recurring"), outcome) == recurring


@pytest.mark.parametrize("outcome", [Unknown("broke off"), Failed("failed", 200)], ids=name_of)
@pytest.mark.parametrize("attempt", [3, 4, 1000])
def test_no_attempts_left(outcome: Outcome, attempt: int) -> None:
    """After the last attempt a one-shot has failed, and a recurring recall waits for its next
    occurrence; both say why."""
    reason = reason_of(outcome)
    assert verdict_on(claimed("once", attempt=attempt), outcome) == Finish("failed", reason)
    assert verdict_on(claimed("immediate", attempt=attempt), outcome) == Finish("failed", reason)
    assert verdict_on(claimed("recurring", attempt=attempt), outcome) == Next(
        6, After(600.0), reason, failures=1
    )


@pytest.mark.parametrize(
    "outcome",
    [Answered(200), Busy(409), Misconfigured("x"), Unavailable("x"), Gone(404)],
    ids=name_of,
)
def test_attempts_do_not_matter_elsewhere(outcome: Outcome) -> None:
    """Only Unknown and Failed look at how many attempts are left."""
    for call_type in CALL_TYPES:
        assert verdict_on(claimed(call_type, attempt=3), outcome) == verdict_on(
            claimed(call_type, attempt=1), outcome
        )


@pytest.mark.parametrize("move", [name for name in MOVES if name != "unmoved"])
@pytest.mark.parametrize("call_type", CALL_TYPES)
@pytest.mark.parametrize("attempt", [1, 3], ids=["attempts left", "none left"])
@pytest.mark.parametrize("outcome", OUTCOMES, ids=name_of)
def test_moved_in_mid_run(outcome: Outcome, attempt: int, call_type: str, move: str) -> None:
    """The application's move is honoured by every ending that leaves the recall live, and costs k
    numbers for k intervals.

    An occurrence that is over gives way to the one that the move names: after a skip, an interval
    after the run and one more for each skipped; after any other move, the new time as it stands,
    also for a one-shot. One that is not over gives way, too, as its key stands for one due moment
    only.
    """
    claim = claimed(call_type, move, attempt=attempt, begun_age=0.5)
    skips = {"skipped once": 1, "skipped twice": 2}.get(move, 0) if call_type == "recurring" else 0
    verdict = verdict_on(claim, outcome)
    match outcome:
        case Gone():
            assert verdict == Finish("cancelled", reason_of(outcome))
            return
        case Malformed(why):
            assert verdict == Finish("failed", why)
            return
        case Accepted():
            # The run goes on, and honours the move when it has ended.
            assert verdict == HANDED_OVER
            return
        case Answered() | Refused():
            over = True
        case Unknown() | Failed():
            over = attempt == 3
        case Expired(why):
            assert verdict == Finish("fired", why)
            return
        case Misfired(why, _):
            when = At(NOON + timedelta(seconds=600) * (1 + skips)) if skips else AsMoved()
            assert verdict == Next(6 + skips, when, f"misfired: {why}")
            return
        case Busy() | Misconfigured() | Unavailable() | Capped() | Unsent():
            over = False
        case never:
            assert_never(never)
    reason = None if isinstance(outcome, Answered | Unsent) else reason_of(outcome)
    failures = int(over and call_type == "recurring" and not isinstance(outcome, Answered))
    if over and skips:
        assert verdict == Next(6 + skips, After(600.0 * (1 + skips)), reason, failures)
    else:
        assert verdict == Next(6 if over or not skips else 5 + skips, AsMoved(), reason, failures)


def test_a_move_before_the_first_call_keeps_the_number() -> None:
    """A recall that was moved after its claim, and given back unsent, has not begun: its occurrence
    keeps its number."""
    assert verdict_on(claimed("once", "rescheduled"), Unsent("moved")) == Next(5, AsMoved())
    assert verdict_on(claimed("recurring", "rescheduled"), Unsent("moved")) == Next(5, AsMoved())
    assert verdict_on(claimed("recurring", "skipped twice"), Unsent("moved")) == Next(7, AsMoved())


# --- waiting and giving up ------------------------------------------------------------------------


GIVES_UP: list[Outcome] = [
    Busy(409),
    Busy(409, 5.0),
    Unavailable("refused"),
    Unavailable("later", 503, 5.0),
]


@pytest.mark.parametrize("outcome", GIVES_UP, ids=repr)
@pytest.mark.parametrize(
    ("begun_age", "after", "breaker_closed", "gives_up"),
    [
        (None, 90_000.0, True, False),
        (0.0, 1.0, True, False),
        (86_399.0, 1.0, True, False),
        (86_399.0, 1.5, True, True),
        (90_000.0, 1.0, True, True),
        (90_000.0, 1.0, False, False),
    ],
    ids=[
        "the first call",
        "just begun",
        "at the limit",
        "past the limit",
        "long past",
        "long past, the breaker open",
    ],
)
def test_give_up(
    outcome: Outcome, begun_age: float | None, after: float, breaker_closed: bool, gives_up: bool
) -> None:
    """Waiting ends past RECALL_GIVE_UP, counted from the occurrence's first call, and only by calls
    under a closed breaker."""
    for call_type in CALL_TYPES:
        verdict = verdict_on(
            claimed(call_type, begun_age=begun_age),
            outcome,
            after=after,
            breaker_closed=breaker_closed,
        )
        if not gives_up:
            assert isinstance(verdict, Defer)
        elif call_type == "recurring":
            assert isinstance(verdict, Next) and (verdict.occurrence, verdict.when) == (
                6,
                After(600.0),
            )
            assert (
                verdict.reason
                and "given up" in verdict.reason
                and str(reason_of(outcome)) in verdict.reason
            )
        else:
            assert isinstance(verdict, Finish) and verdict.status == "failed"
            assert (
                verdict.reason
                and "given up" in verdict.reason
                and str(reason_of(outcome)) in verdict.reason
            )


@pytest.mark.parametrize("call_type", CALL_TYPES)
def test_misconfigured_gives_up_while_others_are_answered(call_type: str) -> None:
    """What is our fault is waited out while nobody is answered; else until RECALL_GIVE_UP."""
    late = claimed(call_type, begun_age=1e9, deferrals=10_000, attempt=3)
    wrong = Misconfigured("a wrong token", 401)
    assert verdict_on(late, wrong, breaker_closed=False) == Defer(After(150.0), "a wrong token")
    verdict = verdict_on(late, wrong)
    assert isinstance(verdict, Next if call_type == "recurring" else Finish)
    assert verdict.reason is not None and verdict.reason.startswith("given up after 1000000")


GATEWAY = Unknown("a gateway", 502, None, by_gateway=True)


def test_a_gateways_answer_costs_no_attempt_while_nobody_is_answered() -> None:
    """A restart behind a gateway: the same key again, with pauses that grow to an hour, and an end
    after twenty calls."""
    mosts = [5, 20, 80, 300, 600, 1200, 2400, *[3600] * 12]
    for n, most in enumerate(mosts):
        claim = claimed("once", begun_age=1.0, uncounted=n, attempt=3)
        for closed in (True, False):
            assert verdict_on(claim, GATEWAY, breaker_closed=closed) == Defer(
                After(most / 2), "a gateway", n + 1
            )
    for closed in (True, False):
        last = claimed("once", begun_age=1.0, uncounted=19, attempt=1)
        assert verdict_on(last, GATEWAY, breaker_closed=closed) == Finish(
            "failed", "given up after 20 calls that may have run: a gateway"
        )
    # Of an occurrence that was never called, the number is an earlier one's.
    fresh = claimed("once", uncounted=19)
    assert verdict_on(fresh, GATEWAY) == Defer(After(2.5), "a gateway", 1)
    asked = Unknown("a gateway", 503, 7.0, by_gateway=True)
    assert verdict_on(fresh, asked) == Defer(After(7.0), "a gateway", 1)


def test_a_gateways_answer_costs_an_attempt_where_the_run_may_be_the_cause() -> None:
    """Others are answered meanwhile, or the run had gone on for a while."""
    for more in ({"others_answered": True}, {"called_after": 0.0, "after": 10.5}):
        assert verdict_on(claimed("once", uncounted=3, begun_age=1.0), GATEWAY, **more) == Retry(
            BACKOFF_OF_FIRST, False, "a gateway", 3
        )
        assert verdict_on(claimed("once", attempt=3), GATEWAY, **more) == Finish(
            "failed", "a gateway"
        )
    quick = {"called_after": 100.0, "after": 109.0}
    assert isinstance(verdict_on(claimed("once"), GATEWAY, **quick), Defer)


def test_a_gateways_retry_after_never_shortens_the_pauses() -> None:
    """Else the bound would be reached within a minute."""
    asked = Unknown("a gateway", 502, 3.0, by_gateway=True)
    assert verdict_on(claimed("once", begun_age=1.0, uncounted=10), asked) == Defer(
        After(1800.0), "a gateway", 11
    )


def test_an_answer_of_later_after_a_run_may_have_begun_is_bounded() -> None:
    """Routers answer 503 for a run that took too long."""
    late = {"called_after": 0.0, "after": 30.0}
    assert verdict_on(claimed("once"), Unavailable("later", 503), **late) == Defer(
        After(2.5), "later", 1
    )
    assert verdict_on(claimed("once"), Unavailable("refused"), **late) == Defer(
        After(2.5), "refused"
    )
    last = claimed("once", begun_age=1.0, uncounted=19)
    assert isinstance(verdict_on(last, Unavailable("later", 503), **late), Finish)


def test_what_never_reached_the_server_costs_no_attempt_however_slow() -> None:
    away = Unknown("a gateway", 522, None, by_gateway=True)
    assert isinstance(verdict_on(claimed("once"), away, called_after=0.0, after=20.0), Defer)


def test_a_web_page_is_not_repeated_without_end() -> None:
    """A success that is a web page may mean that the agent ran."""
    page = Misconfigured("a web page", 200)
    assert verdict_on(claimed("once", begun_age=1.0, uncounted=18), page) == Defer(
        After(1800.0), "a web page", 19
    )
    end = verdict_on(claimed("once", begun_age=1.0, uncounted=19), page)
    assert isinstance(end, Finish) and end.status == "failed"


@pytest.mark.parametrize("call_type", ["once", "immediate", "recurring"])
def test_once_accepted_never_posted_again(call_type: str) -> None:
    """A run that was accepted, and whose end is not known, is over; one that failed is not."""
    accepted = claimed(call_type, reference="http://a/runs/1", attempt=1)
    lost = verdict_on(accepted, Unknown("the API no longer knows it", 404))
    if call_type == "recurring":
        assert isinstance(lost, Next) and lost.failures == 1
    else:
        assert lost == Finish("failed", "the API no longer knows it")
    unfollowed = Unknown("on another host", 202, accepted=True)
    lost = verdict_on(claimed(call_type), unfollowed)
    assert isinstance(lost, Next if call_type == "recurring" else Finish)
    assert verdict_on(accepted, Failed("failed", 200)) == Retry(BACKOFF_OF_FIRST, True, "failed")


@pytest.mark.parametrize("retry_after", [0.0, 1.0, 86_400.0, 86_401.0, 1e12])
def test_retry_after_is_honoured_up_to_a_day(retry_after: float) -> None:
    """What the API asks for is done, in seconds, but for less than one and for more than a day."""
    waits = After(min(max(retry_after, RETRY_AFTER_LEAST), RETRY_AFTER_MOST))
    assert verdict_on(claimed(), Busy(409, retry_after)) == Defer(
        waits, "the session is busy (HTTP 409)"
    )
    assert verdict_on(claimed(), Unavailable("later", 503, retry_after)) == Defer(waits, "later")


@pytest.mark.parametrize(
    ("n", "most"), [(-1, 5), (0, 5), (1, 20), (2, 80), (3, 300), (4, 300), (10**9, 300)]
)
def test_backoff_steps(n: int, most: float) -> None:
    """5 s × 4ⁿ, at most 300 s, with full jitter: the dice choose between nothing and all of it."""
    assert backoff(n, lambda: 0.0) == 0.0
    assert backoff(n, half) == most / 2
    assert backoff(n, lambda: 0.999) == pytest.approx(most * 0.999)


@given(n=st.integers(0, 10**12), chance=st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_backoff_bounds(n: int, chance: float) -> None:
    """Whatever the dice show and however often it was tried, the wait is between 0 and 300 s."""
    assert 0 <= backoff(n, lambda: chance) <= BACKOFF_MOST


@pytest.mark.parametrize(
    ("outcome", "changes", "n"),
    [
        (Unknown("x"), {"attempt": 1}, 0),
        (Unknown("x"), {"attempt": 2, "deferrals": 7}, 1),
        (Failed("x"), {"attempt": 2, "rekey": 1}, 1),
        (Unavailable("x"), {"deferrals": 0}, 0),
        (Unavailable("x"), {"deferrals": 2, "attempt": 2}, 2),
        (Misconfigured("x"), {"deferrals": 9}, 9),
    ],
    ids=[
        "first attempt",
        "second attempt",
        "failed twice",
        "first deferral",
        "third deferral",
        "tenth deferral",
    ],
)
def test_what_the_backoff_counts(outcome: Outcome, changes: dict[str, Any], n: int) -> None:
    """Retries grow with the attempts, deferrals with the deferrals; one does not feed the other."""
    verdict = verdict_on(claimed(**changes), outcome)
    assert isinstance(verdict, Retry | Defer)
    assert verdict.when == After(backoff(n, half))


# --- before a call --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"call_type": "recurring", "interval": None}, "interval_seconds"),
        ({"call_type": "recurring", "interval": 0}, "interval_seconds"),
        ({"call_type": "recurring", "interval": -9}, "interval_seconds"),
        ({"call_type": "sometimes"}, "'sometimes'"),
        ({"session_id": ""}, "''"),
        ({"session_id": "."}, "'.'"),
        ({"session_id": ".."}, "'..'"),
        ({"id": "x" * (ID_MOST + 1)}, f"{ID_MOST + 1} bytes"),
        ({"id": "é" * (ID_MOST // 2 + 1)}, f"{ID_MOST + 2} bytes"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_can_not_be_called(changes: dict[str, Any], says: str) -> None:
    """A row that can't be run is malformed before anything is sent, and the reason names what is
    wrong with it."""
    outcome = before_call(claim_with(**changes), max_attempts=3)
    assert isinstance(outcome, Malformed) and says in outcome.reason


@pytest.mark.parametrize(
    ("changes", "buried"),
    [
        ({"attempt": 3, "taken_from": "w1"}, False),
        ({"attempt": 4, "taken_from": "w1"}, True),
        ({"attempt": 4, "taken_from": None}, False),
        ({"attempt": 1}, False),
        ({"session_id": "..."}, False),
        ({"id": "é" * (ID_MOST // 2)}, False),
        ({"session_id": "a/../b"}, False),
        ({"call_type": "recurring", "interval": 1}, False),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_recall_that_kills_its_workers_is_buried(changes: dict[str, Any], buried: bool) -> None:
    """Only a claim that takes up a dead worker's last attempt is Unknown without a call; all others
    are called."""
    outcome = before_call(claim_with(**changes), max_attempts=3)
    assert isinstance(outcome, Unknown) if buried else outcome is None


# --- what a move means for a claimed row ----------------------------------------------------------


@pytest.mark.parametrize(
    ("call_type", "move", "changes", "occurrence"),
    [
        ("once", "unmoved", {}, None),
        ("recurring", "unmoved", {"begun_age": 3.0}, None),
        ("once", "rescheduled", {}, 5),
        ("once", "rescheduled", {"begun_age": 3.0}, 6),
        ("once", "rescheduled", {"taken_from": "w1"}, 6),
        ("once", "skipped once", {}, 5),
        ("recurring", "rescheduled", {}, 5),
        ("recurring", "rescheduled earlier", {"begun_age": 3.0}, 6),
        ("recurring", "skipped once", {}, 6),
        ("recurring", "skipped twice", {}, 7),
        ("recurring", "skipped twice", {"begun_age": 3.0}, 7),
    ],
    ids=str,
)
def test_honour(call_type: str, move: str, changes: dict[str, Any], occurrence: int | None) -> None:
    """A skip consumes a number for each interval; any other move keeps the number of what was never
    called."""
    expected = None if occurrence is None else Placement(occurrence, AsMoved(), 0)
    assert resolve_move(claimed(call_type, move, **changes)) == expected


@given(
    interval=st.integers(1, 100_000),
    k=st.integers(1, 500),
    occurrence=st.integers(1, 10**6),
    attempt=st.integers(1, 3),
)
@settings(deadline=None)
def test_skipping_k_intervals_consumes_exactly_k_numbers(
    interval: int, k: int, occurrence: int, attempt: int
) -> None:
    """However a recall is met by a skip of k (waiting, between two calls, in mid-run), exactly k
    numbers are left out."""
    claim = claim_with(
        call_type="recurring",
        interval=interval,
        occurrence=occurrence,
        attempt=attempt,
        trigger_at=NOON + timedelta(seconds=interval) * k,
    )
    begun = claim._replace(begun_age=1.0)
    assert resolve_move(claim) == resolve_move(begun) == Placement(occurrence + k, AsMoved(), 0)
    after_a_run = verdict_on(begun, Answered(200))
    assert after_a_run == Next(occurrence + 1 + k, After(float(interval) * (1 + k)))
    between_calls = verdict_on(begun, Busy(409))
    assert isinstance(between_calls, Next) and between_calls.occurrence == occurrence + k


@pytest.mark.parametrize("outcome", [Answered(200), Refused("no", 422)], ids=name_of)
@pytest.mark.parametrize(
    ("move", "left"),
    [("unmoved", 1), ("skipped once", 2), ("skipped twice", 3), ("rescheduled", 1)],
)
def test_the_last_number(outcome: Outcome, move: str, left: int) -> None:
    """A recall whose numbers are used up has failed and says so; the last of them is still used."""
    claim = claimed("recurring", move)
    used_up = verdict_on(claim._replace(occurrence=LAST - left + 1), outcome)
    assert isinstance(used_up, Finish) and used_up.status == "failed"
    assert used_up.reason is not None and "no number is left" in used_up.reason
    still = verdict_on(claim._replace(occurrence=LAST - left), outcome)
    assert isinstance(still, Next) and still.occurrence == LAST


@pytest.mark.parametrize("move", ["skipped once", "rescheduled"])
def test_honouring_never_passes_the_last_number(move: str) -> None:
    """A column of four bytes holds what a move makes of the number."""
    claim = claimed("recurring", move, begun_age=1.0)._replace(occurrence=LAST)
    assert resolve_move(claim) == Placement(LAST, AsMoved(), 0)


# --- what holds whatever happens ------------------------------------------------------------------


RUNS = st.one_of(
    st.builds(Busy, st.sampled_from([409, 423]), st.none() | st.floats(0, 1e7)),
    st.builds(
        Unavailable, st.just("away"), st.none() | st.just(503), st.none() | st.floats(0, 1e7)
    ),
    st.builds(Unknown, st.just("broke off")),
    st.builds(Failed, st.just("failed")),
    st.builds(Misconfigured, st.just("a web page")),
    st.builds(Unsent, st.just("stopping")),
)
"""The outcomes after which a one-shot may be called again."""


def settled(claim: Claim, ending: Ending, verdict: Verdict) -> Claim | None:
    """The claim that follows from a verdict on an unmoved recall; None where the recall is over."""
    waited = (claim.begun_age or 0.0) + ending.ended_after
    match verdict:
        case Finish():
            return None
        case Retry(After(seconds), rekey, _):
            return claim._replace(
                attempt=claim.attempt + 1,
                rekey=claim.rekey + rekey,
                deferrals=0,
                begun_age=waited + seconds,
            )
        case Defer(After(seconds), _):
            return claim._replace(deferrals=claim.deferrals + 1, begun_age=waited + seconds)
        case Release():
            return claim
        case _:
            raise AssertionError(f"an unmoved one-shot has no next occurrence: {verdict}")


@given(
    outcomes=st.lists(RUNS, max_size=60),
    chance=st.floats(0, 1, exclude_max=True),
    most=st.integers(1, 5),
)
@settings(deadline=None)
def test_a_one_shot_spends_no_more_than_its_attempts(
    outcomes: list[Outcome], chance: float, most: int
) -> None:
    """Whatever order of outcomes it meets, a one-shot is over at the latest with its last attempt;
    deferrals spend none."""
    policy = Policy(busy_delay=60.0, max_attempts=most, give_up=86_400.0)
    claim: Claim | None = claim_with()
    spent, keys = 0, set()
    for outcome in outcomes:
        assert claim is not None and claim.attempt == spent + 1 <= most
        keys.add(claim.key)
        spent += isinstance(outcome, Unknown | Failed)
        ending = ended(claim, outcome)
        claim = settled(claim, ending, judge(ending, policy, lambda: chance))
        assert spent < most or claim is None
        if claim is None:
            break
    assert len(keys) <= most


@given(
    outcome=st.sampled_from([Busy(409), Unavailable("away"), Unavailable("later", 503, 3600.0)]),
    age=st.floats(0, 1e9),
)
@settings(deadline=None)
def test_waiting_comes_to_an_end(outcome: Outcome, age: float) -> None:
    """No one-shot waits on past RECALL_GIVE_UP, and none is given up before."""
    verdict = verdict_on(claim_with(begun_age=age), outcome, after=0.0)
    assert (verdict.status if isinstance(verdict, Finish) else None) == (
        "failed" if age > POLICY.give_up else None
    )


@given(
    outcome=st.one_of(RUNS, st.sampled_from(OUTCOMES)),
    call_type=st.sampled_from(CALL_TYPES),
    move=st.sampled_from(list(MOVES)),
    attempt=st.integers(1, 10),
    deferrals=st.integers(0, 10**6),
    rekey=st.integers(0, 9),
    begun_age=st.none() | st.floats(0, 1e9),
    after=st.floats(0, 1e6),
    breaker_closed=st.booleans(),
    chance=st.floats(0, 1, exclude_max=True),
)
@settings(deadline=None, max_examples=300)
def test_what_every_verdict_keeps(
    outcome: Outcome,
    call_type: str,
    move: str,
    attempt: int,
    deferrals: int,
    rekey: int,
    begun_age: float | None,
    after: float,
    breaker_closed: bool,
    chance: float,
) -> None:
    """Whatever is judged: waits are never negative nor over a day (or the cadence), numbers never
    fall, and reasons are given."""
    claim = claimed(
        call_type, move, attempt=attempt, deferrals=deferrals, rekey=rekey, begun_age=begun_age
    )
    verdict = judge(
        ended(claim, outcome, after=after, breaker_closed=breaker_closed), POLICY, lambda: chance
    )
    match verdict:
        case Finish(status, reason):
            assert status in ("fired", "cancelled", "failed")
            assert call_type != "recurring" or isinstance(outcome, Gone | Malformed | Expired)
            assert (reason is None) == (status == "fired" and not isinstance(outcome, Expired))
        case Next(occurrence, when, _):
            assert occurrence >= claim.occurrence and (call_type == "recurring" or claim.moved)
            match when:
                case After(seconds):
                    assert seconds in (600.0, 1200.0, 1800.0)
                case At(nominal):
                    assert isinstance(outcome, Misfired) and nominal > claim.scheduled_for
        case Retry(After(seconds), anew, reason):
            assert 0 <= seconds <= BACKOFF_MOST and reason and attempt < POLICY.max_attempts
            assert anew is isinstance(outcome, Failed)
        case Defer(After(seconds), reason):
            assert 0 <= seconds <= RETRY_AFTER_MOST and reason
            assert isinstance(outcome, Busy | Unavailable | Misconfigured | Capped)
        case Release(reason):
            assert isinstance(outcome, Unsent | Accepted) and reason
        case never:
            assert_never(never)


DATES = st.datetimes(datetime(1, 1, 2), datetime(9998, 1, 1), timezones=st.just(UTC)) | st.integers(
    -9, 9
).map(lambda n: NOON + n * timedelta(seconds=INTERVAL))
EDITED: dict[str, st.SearchStrategy[Any]] = {
    "call_type": st.sampled_from([*CALL_TYPES, "never"]),
    "cadence": st.sampled_from(["interval", "grid", "cron", "lunar", ""]),
    "cron": st.none() | st.sampled_from(["", "nonsense", "0 9 * * *", "*/5 * * * *", "0 0 30 2 *"]),
    "time_zone": st.none() | st.sampled_from(["Europe/Berlin", "Mars/Olympus", ""]),
    "interval": st.none() | st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 90_000),
    "until": st.none() | DATES,
    "times": st.none() | st.integers(-(2**31), 2**31 - 1),
    "failures_most": st.none() | st.integers(-(2**31), 2**31 - 1),
    "grace": st.none() | st.integers(-(2**31), 2**31 - 1),
    "jitter": st.none() | st.integers(-(2**31), 2**31 - 1),
    "trigger_at": DATES,
    "named_at": st.none() | DATES,
    "edited_at": st.none() | DATES,
    "skips": st.integers(0, 2**31 - 1),
    "edit_of": st.none() | st.integers(1, 3),
    "edits": st.integers(0, 2**31 - 1),
}
"""What anybody may write into a row in mid-run."""


@pytest.mark.slow
@given(
    outcome=st.one_of(RUNS, st.sampled_from(OUTCOMES)),
    edited=st.fixed_dictionaries({}, optional=EDITED),
    extra=st.integers(0, 2),
    begun_age=st.none() | st.floats(0, 1e9),
)
@example(OUTCOMES[0], {"cadence": "cron", "cron": "0 9 * * *", "interval": 86_400 * 10**9}, 0, None)
@example(
    OUTCOMES[0],
    {
        "cadence": "cron",
        "cron": "0 9 * * *",
        "interval": 2**31 - 1,
        "trigger_at": NOON + 60 * timedelta(seconds=2**31 - 1),
    },
    0,
    None,
)
@settings(deadline=None, max_examples=1500)
def test_whatever_is_edited_in_mid_run_is_judged(
    outcome: Outcome, edited: dict[str, Any], extra: int, begun_age: float | None
) -> None:
    """No edit of a row can raise in the settler, which settles all others too; and what goes on has
    a time."""
    before = ended(claimed("recurring", begun_age=begun_age, extra=extra), outcome)
    ending = as_it_stands(before, edited)
    changed_by_hand(ending.claim)
    verdict = judge(ending, POLICY, lambda: 0.5)
    assert isinstance(verdict, Finish | Next | Retry | Defer | Release)
    if isinstance(verdict, Next):
        assert ending.claim.occurrence <= verdict.occurrence <= LAST


@pytest.mark.parametrize(
    "outcome", [Answered(200), Refused("no", 422), Busy(409), Unknown("broke", 500)]
)
def test_a_zone_that_others_may_know_ends_nothing(outcome: Outcome) -> None:
    """Edited in mid-run to a zone that this worker's tzdata lacks: what follows is planned by
    another one. Where the rule itself makes no sense, the recall is over."""
    cron = {"cadence": "cron", "cron": "0 9 * * *", "edits": 1}
    elsewhere = as_it_stands(
        ended(claimed("recurring"), outcome), {**cron, "time_zone": "Mars/Olympus"}
    )
    verdict = judge(elsewhere, POLICY, half)
    over = isinstance(outcome, Answered | Refused)
    assert over == isinstance(verdict, Next)
    if isinstance(verdict, Next):
        assert verdict.replan and verdict.occurrence == 6 and verdict.when == After(0.0)
    broken = as_it_stands(ended(claimed("recurring"), outcome), {**cron, "cron": "nonsense"})
    assert over == isinstance(judge(broken, POLICY, half), Finish)


def test_dice_are_cast_only_where_they_decide() -> None:
    """A verdict that needs no chance asks for none: what the API or the settings say is done to the
    second."""

    def loaded() -> float:
        raise AssertionError("the dice were cast")

    no_dice: Callable[[], float] = loaded
    for outcome in (
        Answered(200),
        Busy(409),
        Busy(409, 3.0),
        Gone(404),
        Refused("no"),
        Unsent("stopping"),
        Malformed("none"),
    ):
        assert judge(ended(claimed(), outcome), POLICY, no_dice)


ENDED_BADLY: list[Outcome] = [
    Busy(409),
    Unavailable("refused"),
    Misconfigured("a wrong token", 401),
    Unknown("the API broke", 500),
    Failed("the model broke", 200),
    Refused("no", 422),
]


@pytest.mark.parametrize("move", ["skipped once", "skipped twice", "rescheduled"])
@pytest.mark.parametrize("attempt", [1, 3])
@pytest.mark.parametrize("outcome", ENDED_BADLY, ids=name_of)
def test_what_is_moved_past_its_end_ends_as_its_last_call_did(
    outcome: Outcome, attempt: int, move: str
) -> None:
    """Its last occurrence, moved in mid-run: fired only where the call was answered well."""
    claim = claimed("recurring", move, times=5, attempt=attempt)
    verdict = verdict_on(claim, outcome)
    assert isinstance(verdict, Finish) and verdict.status == "failed"
    assert verdict.reason
    well = verdict_on(claim, Answered(200))
    assert isinstance(well, Finish) and well.status == "fired"
