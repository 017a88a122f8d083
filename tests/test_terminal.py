"""What people and machines read of the log: nothing that stands in a row, or that a server said,
steers a terminal or breaks a line."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recall_worker.events import LOUDNESS, escape_controls
from recall_worker.terminal import print_table, span

from .conftest import Connection
from .process.test_corridor import soon
from .process.test_lease import eventually
from .support.application import Application
from .support.daemon import Daemons
from .support.endpoint import Endpoint, reply

STEERING = [
    "\x1b[2J\x1b[H",
    "\x1b]0;owned\x07",
    "\x1b]8;;http://elsewhere\x1b\\link\x1b]8;;\x1b\\",
    "\x9b2J",
    "\x1bP1$r\x1b\\",
    "\x1b[?1049h",
    "\r\nrecall.settled forged",
    "a\rb",
    "a\x08\x08b",
    "\x07",
    "\x0b\x0c",
    "\x85",
    "\u2028\u2029",
    "\x7f",
    "\x00",
    "\u202egnp.exe",
    "\u2066x\u2069",
    "\u200e\u200f\u061c",
    "\u200b\u2060\ufeff\u00ad",
    "\U000e0001\U000e0041",
    "\u034f\u115f\u1160\u17b4\u180b\u2800\u3164\uffa0",
    "\ufe00\ufe0d\U000e0100\U000e01ef",
    "\ud800",
    "\udfff\ud800",
]
"""Clears, titles, links, rings, overwrites, turns the direction, ends the line, hides."""
TEXTS = st.one_of(
    st.text(),
    st.sampled_from(STEERING),
    st.lists(st.sampled_from(STEERING)).map("".join),
    st.characters().map(lambda c: c * 3),
)
STORABLE = [
    text for text in STEERING if not any("\ud800" <= c <= "\udfff" or c == "\0" for c in text)
]
"""Those that PostgreSQL can hold."""
SGR = re.compile(r"\x1b\[[0-9;]*m")
"""What the log itself colours its lines with, on a terminal."""


@given(TEXTS)
@settings(deadline=None)
def test_nothing_steers(text: str) -> None:
    """No control, no mark of direction, no invisible character, no half of a character is left, and
    no line ends; again changes nothing."""
    shown = escape_controls(text)
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert len(shown.splitlines()) <= 1
    assert escape_controls(shown) == shown
    assert len(shown) <= 10 * len(text)
    shown.encode()


def test_what_nobody_can_see_is_shown() -> None:
    """Characters without width or ink are escaped, as they could hide something, or make two ids
    look alike; those of emoji are left, as they are in everybody's texts."""
    for text in STEERING[-4:-2]:
        assert escape_controls(text).isascii()
    assert escape_controls("\u2764\ufe0f a\u0308 \U0001f600") == "\u2764\ufe0f a\u0308 \U0001f600"


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        ("abc", 3),
        ("日本", 4),
        ("a\u0308", 1),
        ("\u1112\u1161\u11ab", 2),
        ("\U0001f600", 2),
        ("é", 1),
    ],
    ids=ascii,
)
def test_cells(text: str, cells: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A table's columns begin where they should, whatever is beside them."""
    print_table(["A", "B"], [[text, "x"], ["y" * cells, "x"]])
    _, first, second = capsys.readouterr().out.splitlines()
    assert first == f"{text}  x" and second == f"{'y' * cells}  x"


@given(TEXTS)
@settings(deadline=None)
def test_what_was_hidden_can_be_told(text: str) -> None:
    """What is shown in place of a character says which: read as Python reads it, it is the text
    again."""
    if "\\" not in text:
        shown = escape_controls(text)
        read = re.sub(
            r"\\(x..|u....|U........|[nrt])", lambda found: json_of(found[0]), shown, flags=re.ASCII
        )
        assert read == text


def json_of(escape: str) -> str:
    return escape.encode("ascii").decode("unicode_escape", "surrogatepass")


# --- the log, in each format ----------------------------------------------------------------------

TELLER = """
import json, logging, sys
from recall_worker import events
events.configure("debug", sys.argv[1])
told = events.Events(worker="w")
for line in sys.stdin:
    how, name, facts = json.loads(line)
    try:
        if how == "broken":
            raise ValueError(name)
        elif how == "other":
            logging.getLogger(name).error("%s", facts["said"])
        else:
            told.tell(name, **facts)
    except ValueError:
        told.tell("worker.error", **facts, exc_info=True)
    sys.stderr.flush()
    print("end", flush=True)
"""


class Teller:
    """A process that tells what it is given to its log, which is a pipe or a terminal."""

    def __init__(self, format: str, terminal: bool) -> None:
        self._read, write = pty.openpty() if terminal else os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", TELLER, format],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=write,
            encoding="utf-8",
            env=os.environ | {"TERM": "xterm-256color"},
        )
        os.close(write)
        os.set_blocking(self._read, False)

    def tell(self, name: str, /, how: str = "event", **facts: Any) -> str:
        """What comes out for one event."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([how, name, facts]) + "\n")
        self.process.stdin.flush()
        out = b""
        # A pipe and a terminal hold some kB, and the events here are smaller.
        assert self.process.stdout.readline() == "end\n"
        with suppress(BlockingIOError):
            while more := os.read(self._read, 1 << 16):
                out += more
        return out.decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self._read)


@pytest.fixture(scope="module", params=["terminal", "console, piped"])
def console(request: pytest.FixtureRequest) -> Iterator[Teller]:
    """The log for people: on a terminal, where `auto` chooses it, or asked for in a pipe."""
    terminal = request.param == "terminal"
    with Teller("auto" if terminal else "console", terminal) as teller:
        yield teller


@pytest.fixture(scope="module", params=["json", "auto"])
def machine(request: pytest.FixtureRequest) -> Iterator[Teller]:
    """The log for machines: asked for, or chosen where nobody watches."""
    with Teller(request.param, terminal=False) as teller:
        yield teller


def bare(text: str) -> str:
    """What a person sees, once the terminal has taken its colours out."""
    return SGR.sub("", text.replace("\r\n", "\n"))


FACTS = st.fixed_dictionaries(
    {"recall": TEXTS, "session": TEXTS, "reason": st.one_of(st.none(), TEXTS)}
)


@given(facts=FACTS)
@settings(max_examples=60, deadline=None)
def test_a_line_for_people(console: Teller, facts: dict[str, Any]) -> None:
    """Whatever ids and reasons hold, an event is one line of printable characters, and all its
    colours are the log's own."""
    out = console.tell("recall.settled", **facts)
    plain = console.tell("recall.settled", **{k: fact and "x" for k, fact in facts.items()})
    assert out.count("\x1b") == plain.count("\x1b")
    shown = bare(out)
    assert shown.endswith("\n") and shown.removesuffix("\n").isprintable()
    assert "recall.settled" in shown


@pytest.mark.parametrize("text", STEERING, ids=ascii)
def test_a_traceback_for_people(console: Teller, text: str) -> None:
    """A defect may take several lines, in which nothing that it quotes steers the terminal or
    begins a line of its own."""
    broken = bare(console.tell(text, "broken", recall=text))
    other = bare(console.tell("asyncio", "other", said=text))
    for out in (broken, other):
        event, *more = out.removesuffix("\n").split("\n")
        assert event.isprintable()
        assert all(line.startswith("  ") and line.isprintable() for line in more)
    assert "worker.error" in broken and "Traceback" in broken and "asyncio" in other


def strict(line: str) -> dict[str, Any]:
    """One JSON object, as those read it who know neither NaN nor Infinity."""

    def unknown(name: str) -> None:
        raise ValueError(name)

    document = json.loads(line, parse_constant=unknown)
    assert isinstance(document, dict)
    return document


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.lists(TEXTS, max_size=2)
)


@given(
    name=st.sampled_from(sorted(LOUDNESS)),
    facts=st.dictionaries(st.sampled_from(["recall", "session", "lag_ms", "x"]), VALUES),
)
@settings(max_examples=80, deadline=None)
def test_a_line_for_machines(machine: Teller, name: str, facts: dict[str, Any]) -> None:
    """Whatever the facts are, an event is one line of ASCII, which any JSON reader takes, and the
    facts come out as they went in."""
    out = machine.tell(name, **facts)
    assert out.isascii() and out.count("\n") == 1 and out.endswith("\n") and "\x7f" not in out
    document = strict(out)
    assert (document["event"], document["worker"], document["level"]) == (name, "w", LOUDNESS[name])
    for key, fact in facts.items():
        finite = not isinstance(fact, float) or abs(fact) < float("inf")
        # Two halves of a character that meet are one where they are read, wherever that is.
        assert document[key] == (json.loads(json.dumps(fact)) if finite else str(fact))


@pytest.mark.parametrize("text", STEERING, ids=ascii)
def test_everything_for_machines(machine: Teller, text: str) -> None:
    """Defects with their tracebacks, and what other libraries have to say, are lines of JSON like
    all else."""
    broken = strict(machine.tell(text, "broken", recall=text))
    assert (
        broken["event"] == "worker.error"
        and "ValueError" in broken["exception"]
        and broken["recall"] == text
    )
    other = strict(machine.tell("asyncio", "other", said=text))
    assert (other["event"], other["logger"], other["level"]) == (text, "asyncio", "error")


# --- the daemon -----------------------------------------------------------------------------------


async def test_a_daemon_on_a_terminal(
    app: Application, database: str, db: Connection, endpoint: Endpoint
) -> None:
    """Hostile ids in the table, and hostile answers of the API, come out on the operator's terminal
    as text that can be read."""
    read, write = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "recall_worker",
        "run",
        stderr=write,
        stdin=asyncio.subprocess.DEVNULL,
        env={k: v for k, v in os.environ.items() if not k.startswith("RECALL_")}
        | {
            "RECALL_DSN": database,
            "RECALL_RUN_URL": endpoint.url,
            "RECALL_LOG_LEVEL": "debug",
            "RECALL_POLL_INTERVAL": "1",
        },
    )
    os.close(write)
    seen = bytearray()

    def look() -> None:
        with suppress(OSError):
            seen.extend(os.read(read, 1 << 16))

    loop = asyncio.get_running_loop()
    loop.add_reader(read, look)
    try:
        endpoint.default = reply(400, {"error": "".join(STORABLE)})
        for n, text in enumerate(STORABLE):
            await app.create_session(text, "ann")
            await app.schedule(text, "once", soon(0), text, id=f"{n}{text}")
        await eventually(
            db,
            "select from session_recalls where status = 'failed' having count(*) = %s",
            [len(STORABLE)],
        )
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            assert await process.wait() == 0
    finally:
        loop.remove_reader(read)
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        os.set_blocking(read, False)
        with suppress(OSError):
            while more := os.read(read, 1 << 16):
                seen.extend(more)
        os.close(read)
    lines = bare(seen.decode()).splitlines()
    assert all(line.isprintable() for line in lines)
    assert sum("] recall.settled " in line for line in lines) == len(STORABLE)
    assert not any(line.startswith("recall.settled") for line in lines)
    assert {escape_controls(text) for text in STORABLE if " " not in text and "=" not in text} <= {
        found[1] for line in lines if (found := re.search(r" session=(\S+)", line))
    }


async def test_a_daemon_in_a_pipe(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The same in a pipe: every line is JSON, and says the ids as they stand in the table."""
    endpoint.default = reply(500, {"error": "".join(STORABLE)})
    daemon = await daemons.start(max_attempts=1)
    for n, text in enumerate(STORABLE):
        await app.create_session(text, "ann")
        await app.schedule(text, "immediate", soon(0), text, id=f"{n}{text}")
    await daemon.hears("recall.settled", times=len(STORABLE), status="failed")
    assert await daemon.stop() == 0
    assert daemon.talk == []
    assert {event["recall"] for event in daemon.told("recall.settled")} == {
        f"{n}{text}" for n, text in enumerate(STORABLE)
    }


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, ""),
        (0.0123, "12.3 ms"),
        (9.04, "9.0 s"),
        (599.9, "599.9 s"),
        (600, "10 min 00 s"),
        (1603.4, "26 min 43 s"),
        (3600, "1 h 00 min"),
        (90_061, "1 d 01 h"),
        (-1603.4, "-26 min 43 s"),
    ],
)
def test_a_length_of_time(seconds: float | None, said: str) -> None:
    """Exact as long as that says something; with its units then."""
    assert span(seconds) == said
