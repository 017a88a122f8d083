"""Events: what happened, told once, with a loudness of its own; to the log as a line, and to
whoever else listens."""

from __future__ import annotations

import ast
import asyncio
import json
import subprocess
import sys
from pathlib import Path
from select import PIPE_BUF
from typing import Any, TextIO, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

import recall_worker
from recall_worker.events import LOUDNESS, Events, Together, escape_controls

HOUSE = Path(recall_worker.__file__).parent
STEER = "\x1b[2J\u202egnp.exe\x07"
"""Clears the screen, turns the direction, rings."""


def constants(file: Path) -> set[str]:
    """All strings that stand in a module."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }


def tellings(file: Path) -> set[str]:
    """The first arguments of all calls of `….tell(…)` and `…._tell(…)` in a module, where they are
    plain strings."""
    calls = [
        n
        for n in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(n, ast.Call) and n.args
    ]
    told = [
        c.args[0]
        for c in calls
        if isinstance(c.func, ast.Attribute) and c.func.attr in ("tell", "_tell")
    ]
    return {a.value for a in told if isinstance(a, ast.Constant) and isinstance(a.value, str)}


def test_names_are_nouns_with_past_participles() -> None:
    """An event is `noun.past_participle` (or a state that was reached), and how loud it is is known
    to the log."""
    for name, loudness in LOUDNESS.items():
        noun, _, done = name.partition(".")
        assert noun.isalpha() and done.isalpha() and name == name.lower()
        assert loudness in ("debug", "info", "warning", "error")


@pytest.mark.slow
def test_every_event_is_told_and_every_telling_is_known() -> None:
    """The list of events has no entry that nobody tells, and nobody tells what is not on it."""
    modules = [file for file in HOUSE.rglob("*.py") if file.name != "events.py"]
    everywhere = set().union(*(constants(file) for file in modules))
    assert set(LOUDNESS) <= everywhere
    # What the commands tell people goes by a function of that name, too, but is no method.
    assert set().union(*(tellings(file) for file in modules if "cli" not in file.parts)) <= set(
        LOUDNESS
    )


def test_an_event_that_nobody_knows() -> None:
    """A name that is not on the list is a defect, and is met at once."""
    with pytest.raises(KeyError, match=r"recall\.forgotten"):
        Events().tell("recall.forgotten")


def test_told_once_to_the_log_and_to_each_listener() -> None:
    """One telling makes one line, with the context in it, and one call of each listener, with the
    facts alone."""
    heard: list[tuple[str, dict[str, Any]]] = []
    with capture_logs() as lines:
        events = Events(worker="w1")
        events.listen(lambda name, facts: heard.append((name, facts)))
        events.listen(lambda name, facts: heard.append((name, facts)))
        events.tell("recall.settled", recall="r1", lag_ms=1.5)
    assert lines == [
        {
            "event": "recall.settled",
            "log_level": "info",
            "worker": "w1",
            "recall": "r1",
            "lag_ms": 1.5,
        }
    ]
    assert heard == [("recall.settled", {"recall": "r1", "lag_ms": 1.5})] * 2


@pytest.mark.parametrize(("name", "loudness"), LOUDNESS.items(), ids=list(LOUDNESS))
def test_loudness(name: str, loudness: str) -> None:
    """Each event is as loud as the list says."""
    with capture_logs() as lines:
        Events().tell(name)
    assert [(line["event"], line["log_level"]) for line in lines] == [(name, loudness)]


@given(st.text())
@settings(deadline=None)
def test_harmless_text_is_printable(text: str) -> None:
    """Nothing is left that could steer a terminal or hide in a line, and what was printable stays
    as it is."""
    shown = escape_controls(text)
    assert shown.isprintable()
    shown.encode()
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain – and Ümläute, 漢字 🙂", "plain – and Ümläute, 漢字 🙂"),
        ("a\nb", "a\\nb"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\u202e", "\\u202e"),
        ("\u200b", "\\u200b"),
        ("\ud800", "\\ud800"),
        ("\U000e0001", "\\U000e0001"),
    ],
    ids=ascii,
)
def test_harmless(text: str, shown: str) -> None:
    """Controls, bidirectional marks, invisible characters and lone surrogates are made visible."""
    assert escape_controls(text) == shown


def lines_of(format: str, level: str) -> list[str]:
    """What a process of its own writes to stderr of three events, so that the tests' own log stays
    as it is."""
    program = f"""
from recall_worker import events
events.configure({level!r}, {format!r})
told = events.Events(worker="w1")
told.tell("recall.claimed", recall="r0")
told.tell("recall.settled", recall={STEER!r}, session="two\\r\\nlines", lag_ms=1.5, reason=None)
try:
    1 / 0
except ZeroDivisionError:
    told.tell("worker.error", doing="call", exc_info=True)
print("data")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.stdout == "data\n"
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    ("level", "events"), [("debug", 3), ("info", 2), ("warning", 1), ("error", 1)]
)
def test_json_lines(level: str, events: int) -> None:
    """As JSON each event is one line, whatever its facts hold; quieter ones than the level are left
    out."""
    lines = [json.loads(line) for line in lines_of("json", level)]
    assert [line["event"] for line in lines] == [
        "recall.claimed",
        "recall.settled",
        "worker.error",
    ][-events:]
    assert all(line["worker"] == "w1" and line["timestamp"].endswith("Z") for line in lines)
    assert "ZeroDivisionError" in lines[-1]["exception"] and lines[-1]["level"] == "error"
    if events > 1:
        settled = lines[-2]
        assert (settled["recall"], settled["session"], settled["lag_ms"], settled["reason"]) == (
            STEER,
            "two\r\nlines",
            1.5,
            None,
        )


@pytest.mark.parametrize("format", ["console", "json", "auto"])
def test_no_format_lets_a_fact_steer_the_terminal(format: str) -> None:
    """Hostile facts stay inside their line, in every format; `auto` is JSON where nobody
    watches."""
    lines = lines_of(format, "info")
    assert not set("".join(lines)) & {"\x1b", "\x07", "\u202e", "\r"}
    assert sum("recall.settled" in line for line in lines) == 1
    assert not any("Warning" in line for line in lines), (
        "structlog has something against how it is set up"
    )
    assert all(line.startswith("{") for line in lines) is (format != "console")


class Paper:
    """A file that remembers what was written to it at once."""

    def __init__(self) -> None:
        self.writes: list[str] = []

    def write(self, text: str) -> None:
        self.writes.append(text)

    def flush(self) -> None: ...


def test_lines_of_one_turn_are_one_write() -> None:
    """What is told in one turn of the loop is written at its end, in order; the next turn's is
    another write."""
    paper = Paper()

    async def tell() -> None:
        together = Together(cast("TextIO", paper))
        for line in ("one\n", "two\n", "three\n"):
            together.write(line)
            together.flush()
        assert paper.writes == []
        await asyncio.sleep(0)
        together.write("four\n")
        await asyncio.sleep(0)

    asyncio.run(tell())
    assert paper.writes == ["one\ntwo\nthree\n", "four\n"]


def test_a_write_is_no_more_than_a_pipe_takes_whole() -> None:
    """Several workers may share one pipe: their lines must not come to lie in one another."""
    paper = Paper()

    async def tell() -> None:
        together = Together(cast("TextIO", paper))
        for n in range(100):
            together.write(f"{n:0>99}\n")
        together.write("x" * 2 * PIPE_BUF + "\n")
        await asyncio.sleep(0)

    asyncio.run(tell())
    *lines, long = paper.writes
    assert (
        "".join(lines) == "".join(f"{n:0>99}\n" for n in range(100))
        and long == "x" * 2 * PIPE_BUF + "\n"
    )
    assert len(lines) == 3 and max(map(len, lines)) <= PIPE_BUF


def test_a_line_outside_of_a_loop_is_written_at_once() -> None:
    """Before the loop runs, and after it, nothing is kept back."""
    paper = Paper()
    Together(cast("TextIO", paper)).write("one\n")
    assert paper.writes == ["one\n"]


def test_the_last_lines_are_not_lost() -> None:
    """What was told in the very turn in which the loop ended is written before the process ends,
    even where that ends with a defect."""
    program = """
import asyncio
from recall_worker import events
events.configure("info", "json")
async def main():
    events.Events().tell("worker.draining")
    1 / 0
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", timeout=60
    )
    assert (
        done.returncode == 1
        and "worker.draining" in done.stderr
        and "ZeroDivisionError" in done.stderr
    )
