"""Instants as people write them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_worker.cadence import ticks, zone
from recall_worker.instants import InstantError, parse
from recall_worker.terminal import local, rfc3339

BERLIN, HAVANA = zone("Europe/Berlin"), zone("America/Havana")


@pytest.mark.parametrize(
    ("text", "when"),
    [
        (" 2027-01-31T09:00 ", "2027-01-31T08:00Z"),
        ("2027-01-31  09:00", "2027-01-31T08:00Z"),
        ("2027-01-31T09:00:00,25", "2027-01-31T08:00:00.250Z"),
        ("2027-01-31T09:00:00.1234567", "2027-01-31T08:00:00.123456Z"),
        ("2027-01-31T09:00−04:00", "2027-01-31T13:00Z"),
        ("2027-01-31T09:00gmt", "2027-01-31T09:00Z"),
        ("2027-12-31T24:00:00", "2027-12-31T23:00Z"),
        ("2027-12-31T24:00Z", "2028-01-01T00:00Z"),
        ("20270131T090030+0130", "2027-01-31T07:30:30Z"),
        ("1893-01-01T00:00+00:53:28", "1892-12-31T23:06:32Z"),
    ],
)  # fmt: skip
def test_instants(text: str, when: str) -> None:
    """The forms that docs/times.md does not show."""
    assert parse(text, BERLIN).when == datetime.fromisoformat(when)


@pytest.mark.parametrize(
    "text",
    [
        "", "now", "2027", "2027-01", "2027-01-31T", "2027-01-31x09:00", "2027-01-3109:00",
        "2027-13-01", "2027-01-31T25:00", "2027-01-31T09:60", "2027-01-31T09:00:60",
        "2027-01-31T09:00+01:60", "2027-01-31T09:00+16", "2027-01-31T09:00+9",
        "2027-01-31T09:00 9", "2027-01-31 09:00 CEST", "٢٠٢٧-01-31", "1767225600",
        "0001-01-01T00:00", "9999-12-31T12:00", "2027-01-31T09:00\x00",
    ],
)  # fmt: skip
@pytest.mark.parametrize("whole_day", [False, True])
def test_no_instants(text: str, whole_day: bool) -> None:
    """What is no instant is refused with what to write, and nothing else is raised."""
    with pytest.raises(InstantError) as error:
        parse(text, BERLIN, whole_day=whole_day)
    assert error.value.instead


def test_an_offset_is_never_a_time_of_day() -> None:
    """`2027-01-31+09:00` was read as nine o'clock."""
    for text in ("2027-01-31+09:00", "2027-01-31 -09:00", "2027-01-31-0900", "20270131+09"):
        with pytest.raises(InstantError, match="no time of day") as error:
            parse(text, BERLIN)
        written = error.value.instead.partition(" ")[0]
        assert parse(written).when.minute == 0 and written.startswith("2027-01-31T00:00")


@pytest.mark.parametrize(
    ("text", "where", "when"),
    [
        ("2027-03-28T02:30", "Europe/Berlin", "2027-03-28T03:00+02:00"),
        ("2027-03-28T02:59:59.9", "Europe/Berlin", "2027-03-28T03:00+02:00"),
        ("2026-10-04T02:15", "Australia/Lord_Howe", "2026-10-04T02:30+11:00"),
        ("2018-11-04T00:30", "America/Sao_Paulo", "2018-11-04T01:00-02:00"),
        ("2011-12-30T12:00", "Pacific/Apia", "2011-12-31T00:00+14:00"),
    ],
)
def test_a_skipped_time_follows_the_rule_of_cron(text: str, where: str, when: str) -> None:
    """The first instant after the gap, as a cron expression of that time falls, and a note."""
    found = parse(text, zone(where))
    assert found.when == datetime.fromisoformat(when)
    [note] = found.notes
    assert "skip" in note and when in note and where in note
    wall = datetime.fromisoformat(text)
    rule = f"{wall.minute} {wall.hour} {wall.day} {wall.month} *"
    assert next(ticks(rule, where, found.when - timedelta(hours=20))) == found.when


def test_a_repeated_time_is_the_first() -> None:
    """And the note says how to write the second."""
    found = parse("2027-10-31T02:30", BERLIN)
    assert found.when == datetime(2027, 10, 31, 0, 30, tzinfo=UTC)
    [note] = found.notes
    second = note.rpartition(" ")[2].rstrip(".")
    assert parse(second).when == found.when + timedelta(hours=1)


@pytest.mark.parametrize(
    ("text", "where", "begins", "ends"),
    [
        ("2027-03-28", "Europe/Berlin", "2027-03-27T23:00Z", "2027-03-28T22:00Z"),
        ("2018-11-04", "America/Sao_Paulo", "2018-11-04T03:00Z", "2018-11-05T02:00Z"),
        ("2018-11-03", "America/Sao_Paulo", "2018-11-03T03:00Z", "2018-11-04T03:00Z"),
        ("2011-12-30", "Pacific/Apia", "2011-12-30T10:00Z", "2011-12-30T10:00Z"),
        ("2027-11-06", "America/Havana", "2027-11-06T04:00Z", "2027-11-07T04:00Z"),
    ],
)
def test_a_date_alone(text: str, where: str, begins: str, ends: str) -> None:
    """The beginning of the day, or its last microsecond, whatever its clocks do; no note."""
    first, last = parse(text, zone(where)), parse(text, zone(where), whole_day=True)
    assert first.when == datetime.fromisoformat(begins)
    assert last.when == datetime.fromisoformat(ends) - timedelta(microseconds=1)
    assert first.notes == last.notes == ()


@pytest.fixture
def host_in_berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("host_in_berlin")
def test_the_hosts_clock() -> None:
    """Without a zone the host's decides, by the same rules."""
    assert parse("2027-07-01T09:00").when == datetime(2027, 7, 1, 7, tzinfo=UTC)
    skipped, repeated = parse("2027-03-28T02:30"), parse("2027-10-31T02:30")
    assert skipped.when == datetime(2027, 3, 28, 1, tzinfo=UTC) and "skip" in skipped.notes[0]
    assert repeated.when == datetime(2027, 10, 31, 0, 30, tzinfo=UTC)
    assert "on this host" in repeated.notes[0] and "twice" in repeated.notes[0]


INSTANTS = st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=st.just(UTC))


@given(INSTANTS, st.integers(-14 * 60, 14 * 60))
def test_what_is_written_is_read(when: datetime, minutes: int) -> None:
    """An instant that is written with its offset is read as it was, in any zone."""
    there = when.astimezone(timezone(timedelta(minutes=minutes)))
    for text in (there.isoformat(), there.isoformat(" "), rfc3339(when)):
        assert parse(text, HAVANA).when == when
    assert parse(local(when)).when == when.replace(microsecond=0)


@given(st.text(max_size=40))
def test_any_text(text: str) -> None:
    """Nothing but InstantError is raised."""
    try:
        parse(text, BERLIN)
    except InstantError as error:
        assert str(error) and error.instead
