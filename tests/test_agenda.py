"""The console's agenda: moments, clocks that are changed, what will not run, what has no room.
Rows are as the statements return them; nothing is asked of PostgreSQL."""

from __future__ import annotations

from dataclasses import MISSING, fields
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from recall_worker.console import agenda
from recall_worker.console.agenda import clock_changes, column_name
from recall_worker.console.rendering import here, read_in
from recall_worker.recall import Recall


def row(id: str, due: datetime, **columns: Any) -> dict[str, Any]:
    """A recall that waits for then."""
    found: dict[str, Any] = {
        field.name: None if field.default is MISSING else field.default for field in fields(Recall)
    }
    return found | {
        "id": id,
        "session_id": f"s-{id}",
        "status": "pending",
        "call_type": "once",
        "cadence": "interval",
        "queue": "default",
        "occurrence": 1,
        "attempt": 0,
        "rekey": 0,
        "deferrals": 0,
        "skips": 0,
        "edits": 0,
        "fires": 0,
        "trigger_at": due,
        "planned_at": due,
        "due_at": due,
        "last_outcome": None,
        "reason": None,
        **columns,
    }


def cron(id: str, due: datetime, rule: str, zone: str, **columns: Any) -> dict[str, Any]:
    return row(
        id,
        due,
        call_type="recurring",
        cadence="cron",
        cron=rule,
        time_zone=zone,
        interval_seconds=86_400,
        **columns,
    )


def shown(
    now: datetime,
    rows: list[dict[str, Any]],
    *,
    paused: list[dict[str, Any]] | None = None,
    queues: list[dict[str, Any]] | None = None,
    span: str = "day",
) -> dict[str, Any]:
    ahead, width = agenda.SPANS[span]
    busy = []
    for at in range(ahead // width):
        begin = now + timedelta(seconds=at * width)
        found = [r for r in rows if begin < r["due_at"] <= begin + timedelta(seconds=width)]
        busy.append({"span": at, "recalls": min(agenda.COUNTED, len(found))})
    return agenda.agenda(rows[: agenda.ROWS], paused or [], busy, queues or [], now, span)


def moments(found: dict[str, Any], id: str) -> list[datetime]:
    return [
        one["at"] for one in found["moments"] if one["clock"] is None and one["row"]["id"] == id
    ]


def clocks(found: dict[str, Any]) -> list[str]:
    return [one["clock"] for one in found["moments"] if one["clock"] is not None]


SPRING, AUTUMN = datetime(2027, 3, 27, 22, tzinfo=UTC), datetime(2027, 10, 30, 22, tzinfo=UTC)
BERLIN, HOWE = "Europe/Berlin", "Australia/Lord_Howe"


@pytest.mark.parametrize(
    ("start", "zone", "at", "says"),
    [
        (
            SPRING,
            BERLIN,
            "2027-03-28 01:00:00",
            "At 02:00 the clocks are set to 03:00, from +01:00 to +02:00.",
        ),
        (
            AUTUMN,
            BERLIN,
            "2027-10-31 01:00:00",
            "At 03:00 the clocks are set to 02:00, from +02:00 to +01:00.",
        ),
        (
            datetime(2027, 4, 3, 6, tzinfo=UTC),
            HOWE,
            "2027-04-03 15:00:00",
            "At 02:00 the clocks are set to 01:30, from +11:00 to +10:30.",
        ),
        (
            datetime(2027, 10, 2, 6, 13, 7, 5, tzinfo=UTC),
            HOWE,
            "2027-10-02 15:30:00",
            "At 02:00 the clocks are set to 02:30, from +10:30 to +11:00.",
        ),
    ],
)
def test_where_clocks_are_changed(start: datetime, zone: str, at: str, says: str) -> None:
    """To the second, also by half an hour, and whether or not anything waits for a time after."""
    with read_in(zone):
        [(found, words)] = clock_changes(start, start + timedelta(days=1))
        assert f"{found:%Y-%m-%d %H:%M:%S}" == at and words == says
        assert not list(clock_changes(found, found + timedelta(days=1)))
        assert clocks(shown(start, [])) == [says]
        early, late = row("a", found - timedelta(seconds=1)), row("b", found)
        listed = shown(start, [early, late])["moments"]
        assert [one["clock"] or one["row"]["id"] for one in listed] == ["a", says, "b"]
    with read_in("UTC"):
        assert not clocks(shown(start, []))


def test_a_rule_in_the_night_of_spring_and_of_autumn() -> None:
    """A time that the night leaves out is the first instant after it, one that is there twice is
    once; the row is as PostgreSQL has it, the others are computed."""
    with read_in(BERLIN):
        first = datetime(2027, 3, 27, 1, 30, tzinfo=UTC)
        found = shown(
            first - timedelta(hours=1), [cron("c", first, "30 2 * * *", BERLIN)], span="week"
        )
        walls = [at.astimezone(here(at).tzinfo) for at in moments(found, "c")]
        assert [f"{wall:%d %H:%M}" for wall in walls[:3]] == ["27 02:30", "28 03:00", "29 02:30"]
        first = datetime(2027, 10, 30, 0, 30, tzinfo=UTC)
        found = shown(
            first - timedelta(hours=1), [cron("c", first, "30 2 * * *", BERLIN)], span="week"
        )
        assert [f"{at:%d %H:%M}" for at in moments(found, "c")[:3]] == [
            *("30 00:30", "31 00:30", "01 01:30")
        ]


def test_the_recalls_own_clock_is_noted() -> None:
    """Where its own zone changes its clocks, and the reader's does not."""
    with read_in("Asia/Tokyo"):
        first = datetime(2027, 4, 3, 14, tzinfo=UTC)
        found = shown(
            first - timedelta(hours=1), [cron("c", first, "0 1 * * *", HOWE)], span="week"
        )
        ours = [one for one in found["moments"] if one["clock"] is None]
        assert [one["wall"] for one in ours[:2]] == [f"01:00 {HOWE}"] * 2
        assert [one["own_clock"] for one in ours[:3]] == [
            *(None, "its clocks changed from +11:00 to +10:30", None)
        ]
        assert not clocks(found)


@pytest.mark.parametrize("start", [SPRING, AUTUMN])
@pytest.mark.parametrize("zone", [BERLIN, "UTC"])
def test_hours_of_a_day_that_has_23_or_25(start: datetime, zone: str) -> None:
    """A rule of every hour fills every column once: hours are counted as they pass. Names say
    which hour is meant where it is there twice, or cut."""
    rule = cron("c", start + timedelta(minutes=30), "30 * * * *", "UTC")
    with read_in(zone):
        found = shown(start, [rule])
        assert [count for _, count, _ in found["strip_counts"]] == [1] * 24
        names = [name for name, _, _ in found["strip_counts"]]
        assert len(set(names)) == 24
        if zone == BERLIN:
            odd = {
                SPRING: "Sun 01:00 (+01:00) to 03:00 (+02:00)",
                AUTUMN: "Sun 02:00 (+02:00) to 02:00 (+01:00)",
            }
            assert [name for name in names if "(" in name] == [odd[start]]
        week = shown(start, [rule], span="week")
        assert sum(count for _, count, _ in week["strip_counts"]) == 7 * 24


def test_half_an_hour_in_a_columns_name() -> None:
    with read_in(HOWE):
        assert column_name(datetime(2027, 10, 2, 15, tzinfo=UTC), 3600) == (
            "Sun 01:30 (+10:30) to 03:00 (+11:00)"
        )


NOW = datetime(2027, 1, 31, 12, tzinfo=UTC)
SOON = NOW + timedelta(hours=1)


def test_what_will_not_run_is_said() -> None:
    """Paused recalls among the others, by time, and those of a paused queue, or of all."""
    rows = [row("a", SOON), row("m", SOON, queue="mail")]
    paused = [row("p", SOON - timedelta(minutes=1), paused_at=NOW)]
    by = {"paused_by": "ann", "reason": "a move", "paused_at": NOW}
    found = shown(NOW, rows, paused=paused, queues=[{"queue": "mail", **by}])
    says = {one["row"]["id"]: one["stopped"] for one in found["moments"]}
    assert list(says) == ["p", "a", "m"] and not says["a"]
    assert says["p"] == "paused: it will not run" and says["m"].startswith("its queue is paused")
    assert found["paused"] == 1 and found["total"] == 2
    found = shown(NOW, rows, queues=[{"queue": "*", **by}])
    assert all(one["stopped"].startswith("all queues are paused") for one in found["moments"])


def test_jitter_and_grace_are_said() -> None:
    rule = {"call_type": "recurring", "cadence": "grid", "interval_seconds": 3600}
    one = row("g", SOON, **rule, jitter_seconds=30, grace_seconds=600)
    found = shown(NOW, [one])
    assert all(
        moment["notes"] == ["jitter: up to 30s later", "grace: not if it is more than 10m late"]
        for moment in found["moments"]
    )
    assert len(found["moments"]) == 24


def test_several_of_a_session() -> None:
    """A session with several slots: each of its recalls has its own line."""
    rows = [row("a", SOON, session_id="s"), row("b", SOON, session_id="s")]
    found = shown(NOW, rows)
    assert [one["row"]["id"] for one in found["moments"]] == ["a", "b"] and found["total"] == 2


def test_what_has_no_room_is_said() -> None:
    """More recalls than are read: no moment is drawn beyond the last of them, as others would be
    missing. More moments than are drawn, or computed: that is said, and the strip says `more`."""
    rows = [row(f"r{n:03}", NOW + timedelta(minutes=n + 1)) for n in range(200)]
    hourly = cron("c", SOON, "0 * * * *", "UTC")
    found = shown(NOW, sorted([*rows, hourly], key=lambda r: (r["due_at"], r["id"])))
    assert found["cut"] and found["drawn"] <= agenda.DRAWN
    last = found["moments"][-1]["at"]
    assert len([1 for n in range(200) if NOW + timedelta(minutes=n + 1) <= last]) + 2 == len(
        found["moments"]
    )
    minutely = cron("m", NOW + timedelta(minutes=1), "* * * * *", "UTC")
    found = shown(NOW, [minutely])
    assert found["cut"] and found["drawn"] == agenda.DRAWN
    assert found["endless"] == ["m"]
    counts = found["strip_counts"]
    assert [words for _, _, words in counts[:16]] == ["60"] * 16 and counts[-1][2] == "0+"
    found = shown(NOW, [])
    assert (found["drawn"], found["total"], found["cut"], found["endless"]) == (0, 0, False, [])


def test_a_rule_that_nobody_can_read_is_one_moment() -> None:
    broken = cron("c", SOON, "nonsense", "Nowhere/None")
    assert moments(shown(NOW, [broken]), "c") == [SOON]
