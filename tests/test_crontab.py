"""What a cron expression may say at the entrance: pure, without a database."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from cronsim import CronSim
from hypothesis import given
from hypothesis import strategies as st

from recall_worker import cadence, crontab

from .test_recall import claim_with

NOW = datetime(2026, 11, 29, tzinfo=UTC)


@pytest.mark.parametrize(
    ("expression", "field", "instead"),
    [
        ("*/90 * * * *", "minute", "--every 90m"),
        ("5/90 * * * *", "minute", "write 5"),
        ("0-30/45 * * * *", "minute", "write 0"),
        ("1,*/90 * * * *", "minute", "write 0"),
        ("0 */30 * * *", "hour", "--every 30h"),
        ("0 9-17/10 * * *", "hour", "write 9"),
        ("0 0 */40 * *", "day of month", "--grid 40d"),
        ("0 0 * */13 *", "month", "write 1"),
        ("0 0 * * 1-5/9", "day of week", "write 1"),
        ("0 0 L/2 * *", "day of month", "leave /… out"),
        ("0 0 LW/2 * *", "day of month", "leave /… out"),
        ("0 0 * * 5L/2", "day of week", "leave /… out"),
        ("0 0 * * monday", "day of week", "write mon"),
        ("0 0 * * Monday-FRIDAY", "day of week", "write mon"),
        ("0 0 1 january *", "month", "write jan"),
        ("0 0 * * sat-sun", "day of week", "write sat,sun"),
        ("0 0 * * fri-mon", "day of week", "write fri-sat,sun-mon"),
        ("0 0 * * 7-2", "day of week", "write 0-2"),
        ("0 22-2 * * *", "hour", "write 22-23,0-2"),
        ("50-10/5 * * * *", "minute", "write 50,55,0,5,10"),
        ("0 0 1 nov-feb *", "month", "write nov-dec,jan-feb"),
        ("0 0 * * mon,sat-sun", "day of week", "write sat,sun"),
    ],
)
def test_what_can_not_mean_what_it_says(expression: str, field: str, instead: str) -> None:
    """It is refused, naming the field and what to write."""
    with pytest.raises(cadence.CadenceError) as refused:
        cadence.check(expression, None, NOW)
    assert f"in the field {field}," in str(refused.value) and instead in str(refused.value)


@pytest.mark.parametrize(
    ("expression", "instead"),
    [
        ("CRON_TZ=Europe/Berlin 0 9 * * *", "--tz Europe/Berlin"),
        ("TZ=UTC 0 9 * * *", "--tz UTC"),
        ("@daily", "write '0 0 * * *'"),
        ("@Hourly", "write '0 * * * *'"),
        ("@reboot", "five fields"),
        ("0 0 9 * * *", "without seconds or years"),
        ("0 0 9 * * * 2027", "without seconds or years"),
        ("0 9 * *", "five fields"),
    ],
)
def test_what_other_crons_take(expression: str, instead: str) -> None:
    with pytest.raises(cadence.CadenceError, match=re.escape(instead)):
        cadence.check(expression, None, NOW)


@pytest.mark.parametrize(
    "expression",
    [
        "0 8 */100,1-7 * mon",
        "0 8 1-7 * */100,mon",
        "*/60 * * * *",
        "*/59 * * * *",
        "0 */24 * * *",
        "5/10 * * * *",
        "0 9-17/9 * * *",
        "0 0 L * *",
        "0 0 LW * *",
        "0 0 * * 5L",
        "0 0 * * mon#1",
        "0 0 * * 5-7",
        "0 0 * * MON-Fri",
        "0 0 1 JAN,jul *",
    ],
)
def test_what_stays(expression: str) -> None:
    assert crontab.objection(expression) is None
    cadence.check(expression, None, NOW)


def test_a_row_that_stands_goes_on() -> None:
    """What plain SQL wrote, or an older version took, is judged by cronsim alone."""
    claim = claim_with(call_type="recurring", cadence="cron", cron="*/90 * * * *", interval=3600)
    assert cadence.problem(claim) is None


def test_the_idiom_for_both_days() -> None:
    """`*/100` makes a field of days start with a star, and then both must match: the first Monday
    of each month."""
    first = cadence.check("0 8 */100,1-7 * mon", None, NOW)
    second = cadence.check("0 8 */100,1-7 * mon", None, first)
    assert (first, second) == (
        datetime(2026, 12, 7, 8, tzinfo=UTC),
        datetime(2027, 1, 4, 8, tzinfo=UTC),
    )
    either = cadence.check("0 8 1-7 * mon", None, NOW)
    assert either == datetime(2026, 11, 30, 8, tzinfo=UTC)


@given(
    place=st.integers(0, 4),
    begin=st.integers(0, 59),
    end=st.integers(0, 59),
    step=st.none() | st.integers(1, 9),
    names=st.booleans(),
)
def test_a_backward_range_is_given_forwards(
    place: int, begin: int, end: int, step: int | None, names: bool
) -> None:
    """What the refusal says to write is read by cronsim as the values that the range means."""
    field = crontab.FIELDS[place]
    size = field.last - field.first + 1
    begin, end = field.first + begin % size, field.first + end % size
    if begin <= end:
        return
    like = "a" if names and field.names else "0"
    text = f"{field.written(begin, like)}-{field.written(end, like)}{f'/{step}' if step else ''}"
    words = ["0", "0", "*", "*", "*"]
    words[place] = text
    said = crontab.objection(" ".join(words))
    assert said is not None
    words[place] = said.rpartition("write ")[2]
    assert crontab.objection(" ".join(words)) is None
    meant = {
        (v - field.first) % size + field.first for v in range(begin, end + size + 1, step or 1)
    }
    read = CronSim(" ".join(words), datetime(2026, 1, 1))
    found = (read.minutes, read.hours, read.days, read.months, read.weekdays)[place]
    numbers = {value for value in found if isinstance(value, int)}
    assert {value % 7 if place == 4 else value for value in numbers} == meant


@pytest.mark.slow
@given(st.text(max_size=40) | st.from_regex(r"([*\w]+[-/,#]?\w* ){4}[*\w]+", fullmatch=True))
def test_any_text_is_refused_in_words_or_read(text: str) -> None:
    """Whatever is written: a first moment, or a CadenceError."""
    try:
        assert cadence.check(text, None, NOW) > NOW
    except cadence.CadenceError as error:
        assert str(error)


def test_a_jitter_wider_than_the_distance() -> None:
    """It would swallow moments, on a grid and on cron; on an interval it only delays."""
    minute = timedelta(minutes=1)
    for wide in ({"grid": timedelta(seconds=2)}, {"cron": "* * * * *"}):
        with pytest.raises(cadence.CadenceError, match="wider than the"):
            cadence.plan(NOW, 0.5, jitter=minute + timedelta(seconds=1), **wide)
    cadence.plan(NOW, 0.5, jitter=minute, cron="* * * * *")
    cadence.plan(NOW, 0.5, jitter=minute, every=timedelta(seconds=2))
