"""The breaker: pure state. When it opens, which calls it lets through meanwhile, and what closes
it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recall_worker.protocols import Call
from recall_worker.recall import (
    Accepted,
    Answered,
    Busy,
    Failed,
    Gone,
    Malformed,
    Misconfigured,
    Outcome,
    Refused,
    Unavailable,
    Unknown,
    Unsent,
)
from recall_worker.worker.breaker import (
    FRESH_AT_LEAST,
    FRESH_EVERY,
    PATIENCE,
    PROBE_FIRST,
    PROBE_MOST,
    Breaker,
)

from .test_recall import claim_with

REFUSED_CONNECTION = Unavailable("no connection: connection refused")
LATER = Unavailable("the API says later (HTTP 503)", 503)
WRONG_TOKEN = Misconfigured("the API wants another token", 401)
GATEWAY = Unknown("a gateway answers for a server that is away", 502, by_gateway=True)
NOT_THERE = Misconfigured("nothing is at this address", 404, of_session=True)
TROUBLE: list[Outcome] = [REFUSED_CONNECTION, LATER, WRONG_TOKEN, GATEWAY]
ANSWERS: list[Outcome] = [
    Answered(200),
    Accepted("run-1", 202),
    Busy(409),
    Gone(404),
    Failed("failed", 200),
    Refused("no", 422),
    Unknown("the API broke (HTTP 500)", 500),
]
SILENCE: list[Outcome] = [
    Unknown("no answer within 5 s"),
    Unsent("stopping"),
    Malformed("no interval"),
]


def call_of(session: str, sent_at: float | None = 0.0) -> Call:
    return Call(claim_with(id=session, session_id=session), asked_at=0.0, sent_at=sent_at)


def opened(at: float = 100.0) -> Breaker:
    """A breaker that two sessions have opened."""
    breaker = Breaker()
    assert breaker.note(call_of("a", at), REFUSED_CONNECTION, at) is None
    assert breaker.note(call_of("b", at), REFUSED_CONNECTION, at) == "breaker.opened"
    return breaker


def probed(breaker: Breaker, now: float, outcome: Outcome, session: str = "c") -> str | None:
    """The breaker's word on a probe that it allows at `now` and that ends at once."""
    assert breaker.allowance(now) == (1, 0.0)
    call = call_of(session, now)
    breaker.probing(call)
    return breaker.note(call, outcome, now)


def test_closed_at_first() -> None:
    """A new breaker bounds nothing."""
    assert Breaker().allowance(0.0) == (None, 0.0)
    assert Breaker().state == "closed"


@pytest.mark.parametrize("second", TROUBLE, ids=repr)
@pytest.mark.parametrize("first", TROUBLE, ids=repr)
def test_two_sessions_in_a_row_open_it(first: Outcome, second: Outcome) -> None:
    """Trouble in one session, then in another, with no answer between, opens it, whatever kinds of
    trouble they are."""
    breaker = Breaker()
    assert breaker.note(call_of("a"), first, 1.0) is None
    assert breaker.allowance(1.0) == (None, 0.0)
    assert breaker.note(call_of("b"), second, 2.0) == "breaker.opened"
    assert breaker.state == "open"
    assert breaker.allowance(2.0) == (0, PROBE_FIRST)


@pytest.mark.parametrize("outcome", TROUBLE, ids=repr)
def test_one_session_never_opens_it(outcome: Outcome) -> None:
    """One session's trouble, however often, never stops the others."""
    breaker = Breaker()
    for now in range(50):
        assert breaker.note(call_of("a", now), outcome, now) is None
    assert breaker.state == "closed"


@pytest.mark.parametrize("answer", ANSWERS, ids=repr)
def test_an_answer_between_keeps_it_closed(answer: Outcome) -> None:
    """Any answer, also a bad one, shows that the endpoint is worth calling: the count begins
    anew."""
    breaker = Breaker()
    for session in "abcdef":
        assert breaker.note(call_of(session), LATER, 1.0) is None
        assert breaker.note(call_of("calm"), answer, 1.0) is None
    assert breaker.state == "closed"


@pytest.mark.parametrize("silence", SILENCE, ids=repr)
def test_silence_between_says_nothing(silence: Outcome) -> None:
    """A call without an answer neither opens the breaker nor counts as an answer between two
    troubles."""
    breaker = Breaker()
    for session in "abc":
        assert breaker.note(call_of(session), silence, 1.0) is None
    assert breaker.note(call_of("d"), LATER, 1.0) is None
    assert breaker.note(call_of("e"), silence, 1.0) is None
    assert breaker.note(call_of("f"), LATER, 1.0) == "breaker.opened"


def test_probes_double_to_a_bound() -> None:
    """Probes that meet trouble are 1 s apart at first, then twice as long each time, to 30 s, with
    jitter that shortens only."""
    now = 100.0
    breaker = opened(now)
    longest = PROBE_FIRST
    for turn in range(9):
        allowed, wait = breaker.allowance(now)
        assert allowed == 0
        assert 0.8 * longest <= wait <= longest or (turn == 0 and wait == PROBE_FIRST)
        now += wait
        assert probed(breaker, now, TROUBLE[turn % 4], session=f"s{turn}") == "breaker.probed"
        longest = min(PROBE_MOST, longest * 2)
    assert longest == PROBE_MOST


def test_one_probe_at_a_time() -> None:
    """While a probe is out nothing else is claimed."""
    breaker = opened(100.0)
    breaker.probing(call_of("c", None))
    assert breaker.allowance(150.0) == (0, 1.0)


@pytest.mark.parametrize("answer", ANSWERS, ids=repr)
def test_an_answered_probe_closes_it(answer: Outcome) -> None:
    """Any answer to a probe closes it, and trouble has to be met twice again."""
    breaker = opened(100.0)
    assert probed(breaker, 101.0, answer) == "breaker.closed"
    assert breaker.allowance(101.0) == (None, 0.0)
    assert breaker.note(call_of("a"), LATER, 102.0) is None
    assert breaker.note(call_of("b"), LATER, 103.0) == "breaker.opened"
    assert breaker.allowance(103.0) == (0, PROBE_FIRST)


@pytest.mark.parametrize("answer", ANSWERS, ids=repr)
def test_an_answer_to_a_call_sent_before_does_not_close_it(answer: Outcome) -> None:
    """A run that began while all was well says nothing of now; one that was sent since then
    does."""
    breaker = opened(100.0)
    assert breaker.note(call_of("long", 99.0), answer, 160.0) is None
    assert breaker.state == "open"
    assert breaker.note(call_of("late", 100.5), answer, 160.0) == "breaker.closed"


def test_trouble_of_others_while_open_changes_nothing() -> None:
    """Calls that were out when it opened, and meet the same trouble, neither put the probe off nor
    tell anything."""
    breaker = opened(100.0)
    for session in "cdef":
        assert breaker.note(call_of(session, 99.5), LATER, 100.2) is None
    allowed, wait = breaker.allowance(100.2)
    assert allowed == 0 and wait == pytest.approx(PROBE_FIRST - 0.2)


def test_a_probe_that_meets_silence_waits_longer() -> None:
    """A probe that was sent and broke off without an answer is no sign of health."""
    breaker = opened(100.0)
    assert probed(breaker, 101.0, Unknown("the connection broke off")) == "breaker.probed"
    allowed, wait = breaker.allowance(101.0)
    assert allowed == 0 and 1.6 <= wait <= 2.0


@pytest.mark.parametrize(
    "outcome", [Unsent("cancelled by the application"), Malformed("no interval")], ids=repr
)
def test_a_probe_that_was_never_sent_is_made_again(outcome: Outcome) -> None:
    """A probe that came to nothing for reasons of its own costs no time."""
    breaker = opened(100.0)
    assert probed(breaker, 101.0, outcome) is None
    assert breaker.allowance(101.0) == (1, 0.0)


def test_a_probe_that_runs_for_a_while_lets_the_next_one_go() -> None:
    """Trouble is quick to show: a probe that was sent and is silent after a while may be a run. It
    closes nothing, and holds up nothing; an answer to it still closes, and trouble of it counts."""
    breaker = opened(100.0)
    probe = call_of("c", None)
    breaker.probing(probe)
    assert breaker.allowance(101.0 + 10 * PATIENCE) == (0, 1.0)
    probe.sent_at = 101.0
    assert breaker.allowance(101.0 + PATIENCE - 0.5) == (0, 0.5)
    assert breaker.allowance(101.0 + PATIENCE) == (1, 0.0)
    assert breaker.is_open and breaker.pause_most == PATIENCE
    second = call_of("d", 101.0 + PATIENCE)
    breaker.probing(second)
    assert breaker.allowance(102.0 + PATIENCE) == (0, PATIENCE - 1.0)
    assert breaker.note(second, GATEWAY, 102.0 + PATIENCE) == "breaker.probed"
    assert breaker.note(probe, Answered(200), 103.0 + PATIENCE) == "breaker.closed"
    assert breaker.allowance(103.0 + PATIENCE) == (None, 0.0)


def test_sessions_that_are_gone_are_no_endpoint_that_is_gone() -> None:
    """A 404 opens it only where nobody else was answered for a minute."""
    breaker = Breaker()
    breaker.note(call_of("good", 0.0), Answered(200), 0.0)
    for n in range(50):
        assert breaker.note(call_of(f"gone-{n}", 1.0 + n), NOT_THERE, 1.0 + n) is None
    assert breaker.state == "closed"
    assert breaker.note(call_of("a", 61.0), NOT_THERE, 61.0) is None
    assert breaker.note(call_of("b", 62.0), NOT_THERE, 62.0) == "breaker.opened"
    # Its probes are quick, as each may be of another session that is gone.
    assert not breaker.may_try_fresh(62.0) and breaker.may_try_fresh(62.0 + FRESH_AT_LEAST)
    assert breaker.allowance(62.0 + FRESH_AT_LEAST)[0] == 0


def test_the_only_session_that_was_answered_says_nothing_of_itself() -> None:
    breaker = Breaker()
    breaker.note(call_of("a", 0.0), Answered(200), 0.0)
    assert breaker.note(call_of("a", 1.0), NOT_THERE, 1.0) is None
    assert breaker.note(call_of("b", 2.0), NOT_THERE, 2.0) is None
    assert not breaker.is_open


def test_fresh_sessions_are_probed_within_seconds() -> None:
    """However long the pause between probes has become."""
    breaker, now = opened(100.0), 100.0
    for turn in range(8):
        now += breaker.allowance(now)[1]
        probed(breaker, now, LATER, session=f"s{turn}")
    assert breaker.allowance(now)[1] > 20
    assert breaker.may_try_fresh(now + FRESH_EVERY)
    breaker.no_fresh(now + FRESH_EVERY, 0.5)
    assert breaker.may_try_fresh(now + FRESH_EVERY + 0.5)
    breaker.no_fresh(now + FRESH_EVERY, None)
    assert not breaker.may_try_fresh(now + FRESH_EVERY)
    assert breaker.fresh_in(now + FRESH_EVERY) == FRESH_EVERY


def test_beside_a_gateways_answers_fresh_sessions_are_probed_at_once() -> None:
    """As long as the application answers others; a failure doubles the pause, to a tenth of a
    second."""
    breaker = Breaker()
    breaker.note(call_of("good", 0.0), Answered(200), 0.0)
    for session in ("a", "b"):
        breaker.note(call_of(session, 1.0), GATEWAY, 1.0)
    assert breaker.is_open
    pauses = []
    for n in range(6):
        pauses.append(breaker.fresh_pause(2.0))
        breaker.note(call_of("in flight", 2.0), GATEWAY, 2.0)
        breaker.probing(probe := call_of(f"s{n}", 2.0))
        breaker.note(probe, GATEWAY, 2.0)
    assert pauses == [0.05, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert breaker.fresh_pause(11.0) == FRESH_EVERY, "nobody is answered any more"


def test_whether_others_are_answered() -> None:
    """Lately, and with no trouble of another session since; never by one's own answers."""
    breaker = Breaker()
    assert not breaker.others_answered("a", 0.0)
    breaker.note(call_of("a", 0.0), Answered(200), 0.0)
    assert not breaker.others_answered("a", 1.0) and breaker.others_answered("b", 1.0)
    breaker.note(call_of("b", 1.0), Busy(409), 1.0)
    assert breaker.others_answered("a", 2.0)
    breaker.note(call_of("a", 2.0), GATEWAY, 2.0)
    assert breaker.others_answered("a", 3.0), "its own trouble says nothing of the others"
    assert not breaker.others_answered("c", 3.0)
    breaker.note(call_of("b", 3.0), Answered(200), 3.0)
    assert breaker.others_answered("a", 4.0) and not breaker.others_answered("a", 6.0)
    assert not opened().others_answered("x", 100.0)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(TROUBLE + ANSWERS + SILENCE)), max_size=40
    )
)
@settings(deadline=None)
def test_what_is_told_is_what_happened(story: list[tuple[str, Outcome]]) -> None:
    """In any story, `opened` is told exactly when it opens and `closed` when it closes; probes are
    told only while it is open."""
    breaker, now = Breaker(), 100.0
    for session, outcome in story:
        allowed, wait = breaker.allowance(now)
        now += wait + 0.001
        was_open = breaker.is_open
        call = call_of(session, now)
        if allowed is not None:
            assert breaker.allowance(now) == (1, 0.0)
            breaker.probing(call)
        event = breaker.note(call, outcome, now)
        assert (event == "breaker.opened") == (not was_open and breaker.is_open)
        assert (event == "breaker.closed") == (was_open and not breaker.is_open)
        if was_open and outcome in TROUBLE:
            assert event == "breaker.probed"
