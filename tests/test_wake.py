"""When to look next: pure state, in every order of events.

The rule that no state of anything may break: a look that follows at once has a reason, so that a
worker whose table, breaker or clock stands still looks a few times a second at most.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recall_worker.worker.wake import (
    EAGER_REPLICAS,
    FLOOR_FIRST,
    FLOOR_MOST,
    UNPROVOKED_MOST,
    WAKE_STAGGER,
    DispatchResult,
    Wake,
)

POLL = 30.0
START = 1000.0

SECONDS = st.floats(-1.0, 40.0)
FOUND = st.builds(
    DispatchResult,
    claimed=st.just(0),
    full=st.booleans(),
    has_room=st.booleans(),
    waiting=st.booleans(),
    fell_due=st.booleans(),
    ended=st.booleans(),
    due_at=st.none() | st.floats(START - 10, START + 100),
    unfinished=st.booleans(),
    blocked=st.booleans(),
    again_in=st.none() | st.floats(0.0, 5.0),
)
"""What a look may find that takes nothing."""
LOOK_TAKES = st.floats(0.0, 0.01)


def dispatched(wake: Wake, now: float, found: DispatchResult) -> float:
    """A look that finds this; returns seconds until the next one."""
    wake.begin(now)
    wake.dispatched(found, now)
    return wake.seconds(now)


def quiet(found: DispatchResult, now: float = START) -> tuple[Wake, float]:
    """A worker that has looked once and found nothing, and looks again when nothing has changed
    since."""
    wake = Wake(POLL, now - 100)
    dispatched(wake, now - 100, DispatchResult())
    return wake, dispatched(wake, now, found)


@pytest.mark.slow
@given(st.lists(st.tuples(FOUND, LOOK_TAKES), min_size=1, max_size=300))
@settings(deadline=None, max_examples=300)
def test_nothing_makes_it_spin(story: list[tuple[DispatchResult, float]]) -> None:
    """Whatever looks find, as long as nothing changes: in any second there are no more of them than
    a few, and the loop goes on."""
    wake, now = Wake(POLL, START), START
    began: list[float] = []
    for found, takes in story:
        now += wake.seconds(now)
        began.append(now)
        wake.begin(now)
        now += takes
        wake.dispatched(found, now)
        assert 0.0 <= wake.seconds(now) <= POLL + 1e-6
    # The first look has a reason: the start. Then so many as a due instant may provoke, and those
    # that the floor lets pass.
    most = 1 + 2 * UNPROVOKED_MOST + FLOOR_MOST / FLOOR_FIRST
    for at in began:
        assert sum(at <= other < at + FLOOR_MOST for other in began) <= most


@pytest.mark.slow
@given(FOUND.filter(lambda found: not (found.fell_due or found.ended or found.due_at is not None)))
def test_a_look_at_once_needs_a_change(found: DispatchResult) -> None:
    """Where a look changed nothing, and nothing has changed since it began, the next one is no
    earlier than the floor."""
    _, wait = quiet(found)
    assert wait >= FLOOR_FIRST - 1e-9


@pytest.mark.slow
@given(FOUND)
@settings(max_examples=300)
def test_what_stands_still_is_looked_at_ever_more_rarely(found: DispatchResult) -> None:
    """The same finding again and again, by a clock that stands still: after a while a second passes
    between two looks."""
    wake, now = Wake(POLL, START), START
    waits = []
    for _ in range(60):
        now += wake.seconds(now)
        wake.begin(now)
        wake.dispatched(
            DispatchResult(
                **{name: getattr(found, name) for name in DispatchResult.__dataclass_fields__}
                | {"due_at": None}
            ),
            now,
        )
        waits.append(wake.seconds(now))
    assert sum(waits[-30:]) >= 30 * FLOOR_FIRST - 1e-6


EVENTS = st.sampled_from(["notified", "run over", "run not over", "changed", "awaited"])


def tell(wake: Wake, event: str, now: float) -> None:
    match event:
        case "notified":
            wake.notified(now)
        case "changed":
            wake.changed(now)
        case _:
            wake.run_ended(now, is_over=event != "run not over", awaited=event == "awaited")


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(EVENTS | st.none(), EVENTS | st.none(), EVENTS | st.none(), FOUND), max_size=40
    )
)
@settings(deadline=None)
def test_what_is_told_is_looked_after(
    story: list[tuple[str | None, str | None, str | None, DispatchResult]],
) -> None:
    """A notification, a change, and the end of a run that something waits for: the next look is at
    once, whenever they come."""
    wake, now = Wake(POLL, START), START
    for before, during, asking, found in story:
        now += 0.5
        if before in ("notified", "changed", "awaited"):
            tell(wake, before, now)
            assert wake.seconds(now) == 0.0
        wake.begin(now)
        if during is not None:
            tell(wake, during, now)
        wake.asks_next_due()
        if asking is not None:
            tell(wake, asking, now)
        wake.dispatched(found, now)
        if (
            {during, asking} & {"notified", "changed", "awaited"}
            or during is not None
            or asking == "run not over"
            or (asking == "run over" and found.waiting and not found.full)
        ):
            assert wake.seconds(now) == 0.0


def test_a_due_instant_is_met() -> None:
    """The timer is armed for the instant itself, however near."""
    for ahead in (0.002, 0.2, 20.0):
        _, wait = quiet(DispatchResult(due_at=START + ahead))
        assert wait == pytest.approx(ahead)
    assert quiet(DispatchResult(due_at=START + 100))[1] == POLL


def test_a_poll_at_the_latest() -> None:
    assert quiet(DispatchResult())[1] == POLL


def test_a_full_look_goes_on_where_there_is_room() -> None:
    """What was claimed is a change; where no slot is free the end of a run is what is waited
    for."""
    assert quiet(DispatchResult(claimed=3, full=True, has_room=True))[1] == 0.0
    wake, wait = quiet(DispatchResult(claimed=3, full=True))
    assert wait == POLL
    wake.run_ended(START, is_over=True)
    assert wake.seconds(START) == 0.0 and wake.begin(START)


def test_what_waits_is_asked_for_ever_more_rarely() -> None:
    """Locked by the application, or behind a run: 50 ms, then twice that, up to a second; and anew
    after a notification."""
    wake, now = Wake(POLL, START), START
    waits = []
    for _ in range(7):
        waits.append(dispatched(wake, now, DispatchResult(waiting=True)))
        now += waits[-1]
    assert waits == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    wake.notified(now)
    assert dispatched(wake, now, DispatchResult(waiting=True)) == pytest.approx(FLOOR_FIRST)


def test_a_run_that_is_over_costs_no_look_where_nothing_waits() -> None:
    """Nothing was left due, so nothing can have waited for it. One that is due again is asked
    after, without a claim."""
    wake, _ = quiet(DispatchResult(due_at=START + 20))
    wake.run_ended(START, is_over=True)
    assert wake.seconds(START) == pytest.approx(20.0)
    wake.run_ended(START, is_over=False)
    assert wake.seconds(START) == 0.0 and not wake.begin(START)


def test_a_notification_is_left_to_others_first() -> None:
    """Replicas beyond the first two look a little later each, and only ask whether anything is due;
    one look for all that comes meanwhile."""
    wake, _ = quiet(DispatchResult())
    wake.begin(START)
    wake.dispatched(DispatchResult(), START)
    wake.replicas_ahead = EAGER_REPLICAS + 2
    wake.notified(START)
    assert wake.seconds(START) == pytest.approx(3 * WAKE_STAGGER)
    wake.notified(START + WAKE_STAGGER)
    assert wake.seconds(START) == pytest.approx(3 * WAKE_STAGGER)
    assert not wake.begin(START + 3 * WAKE_STAGGER)
    wake.dispatched(DispatchResult(), START + 3 * WAKE_STAGGER)
    assert wake.seconds(START + 3 * WAKE_STAGGER) == POLL
