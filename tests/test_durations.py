"""Durations as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_worker.durations import DurationError, length, seconds


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("90s", 90),
        ("5m", 300),
        ("5min", 300),
        ("1h30m", 5400),
        ("1h30", 5400),
        ("1h5", 3900),
        ("1d 1h 30", 91_800),
        ("2d", 172_800),
        ("1w", 604_800),
        ("1.5h", 5400),
        (" 1H ", 3600),
        ("1h 5m", 3900),
        ("2 hours", 7200),
        ("2hrs", 7200),
        ("1 hour 30 minutes", 5400),
        ("1 h 30 min", 5400),
        ("5MIN", 300),
        ("1H30", 5400),
        ("1 day", 86_400),
        ("3 weeks", 1_814_400),
        ("0s", 0),
    ],
)
@pytest.mark.parametrize("bare", [False, True])
def test_durations(text: str, value: float, bare: bool) -> None:
    """With units a duration is the same in a setting and in an option."""
    assert seconds(text, bare=bare) == value


NONE = [
    "",
    " ",
    "h",
    "1x",
    "1 fortnight",
    "-5s",
    "5s-",
    "1h?",
    "1,5h",
    "1 000",
    "90 5m",
    "5m 90",
    "5m30",
    "1h60",
    "1h1.5",
    "30m 1h",
    "1h1h",
    "1h 30 s 5",
    "١h",
]


@pytest.mark.parametrize("text", [*NONE, "nan", "inf", "1e3", "-5"])
def test_no_durations(text: str) -> None:
    """What is no duration is said to be none, with examples of what is."""
    with pytest.raises(DurationError, match="is not a duration") as error:
        seconds(text)
    assert "1h30m" in error.value.instead


@pytest.mark.parametrize("text", NONE)
def test_no_durations_where_a_number_will_do(text: str) -> None:
    """A setting takes seconds alone, but no other nonsense."""
    with pytest.raises(DurationError, match="is not a duration"):
        seconds(text, bare=True)


@pytest.mark.parametrize("text", ["90", "0", "1.5", " 30 "])
def test_a_bare_number(text: str) -> None:
    """Seconds in a setting; refused in an option, with what might have been meant."""
    assert seconds(text, bare=True) == float(text)
    with pytest.raises(DurationError, match="has no unit") as error:
        seconds(text)
    assert f"{text.strip()}m" in error.value.instead


@pytest.mark.parametrize(
    ("text", "why", "instead"),
    [
        ("1M", "minutes or months", "1m for minutes"),
        ("1.5 M", "minutes or months", "1.5m"),
        ("1H30M", "minutes or months", "30m"),
        ("1mo", "months", "30d"),
        ("2 months", "months", "30d"),
        ("1 Month", "months", "30d"),
        ("1y", "years", "365d"),
        ("1 year 2d", "years", "365d"),
    ],
)
@pytest.mark.parametrize("bare", [False, True])
def test_a_month_is_never_a_minute(text: str, why: str, instead: str, bare: bool) -> None:
    """A unit without a fixed length, or that may be read as one, is refused, with what to write."""
    with pytest.raises(DurationError, match=why) as error:
        seconds(text, bare=bare)
    assert instead in error.value.instead


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1s"), (60, "1m"), (3600, "1h"), (5400, "1h30m"), (86_400, "1d"), (0, "0s"), (-5, "-5s")],
)
def test_lengths(value: int, text: str) -> None:
    """Whole seconds as people write them."""
    assert length(value) == text


@given(st.integers(0, 10**12))
def test_a_length_reads_as_it_is_written(value: int) -> None:
    """Whatever is shown can be typed in again."""
    assert seconds(length(value)) == value
