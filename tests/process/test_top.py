"""`top` as a person sees it: the real command in a real terminal (tmux), beside a real worker and a
real PostgreSQL."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import AsyncIterator
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest

from ..conftest import Connection
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, reply
from ..support.proxy import Proxy
from ..support.tmux import MISSING, Tmux
from .test_lease import promise, rows

pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=MISSING or ""),
    pytest.mark.timeout(400),
]
TOP = f"{sys.executable} -m recall_worker top"


@pytest.fixture
async def wire(database: str) -> AsyncIterator[Proxy]:
    """The way of `top` to PostgreSQL."""
    async with Proxy(database) as proxy:
        yield proxy


@pytest.fixture
async def desk(wire: Proxy, tmp_path: Path) -> AsyncIterator[Tmux]:
    """A terminal of 80 columns and 24 lines, whose RECALL_DSN leads to the test's database."""
    async with Tmux(tmp_path, (80, 24), {"RECALL_DSN": wire.dsn}) as terminal:
        yield terminal


LAST_LOOK = """
select query_start as at from pg_stat_activity
where application_name = 'recall-worker top' and state = 'idle' and query = 'commit'
"""


def row_of(screen: str, id: str) -> str:
    """The line that shows a recall; empty where there is none."""
    return next((line for line in screen.splitlines() if id[:12] in line), "")


def has_keys_in(line: int, screen: str) -> bool:
    """Whether the keys are explained in this line, the last one."""
    lines = screen.splitlines()
    return len(lines) == line and lines[-1].startswith("q quit")


async def begin(desk: Tmux, *options: str) -> str:
    desk.line("stty -a | sed 1d > before; clear")
    desk.line(" ".join([TOP, *options, "; echo ended $?; stty -a | sed 1d > after"]))
    return await desk.until(lambda screen: "NEXT DUE" in screen, "the screen")


async def ended(desk: Tmux, status: int) -> None:
    """The command has ended so, and the terminal is as it was before."""
    await desk.until(lambda screen: f"ended {status}" in screen, f"its end with {status}")
    desk.line("cmp before after && echo the same")
    screen = await desk.until(lambda screen: "\nthe same" in screen, "the terminal's modes")
    assert "NEXT DUE" not in screen
    assert desk.told("#{alternate_on} #{cursor_flag}") == "0 1"


@pytest.mark.slow
async def test_a_night_with_top(
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
    desk: Tmux,
    tmp_path: Path,
) -> None:
    """A recall counts down, runs and is over; the filter, the hold, the help, the sizes; Ctrl-Z
    and back; q: and the terminal is as it was before."""
    desk.line(f"cd {tmp_path}")
    daemon = await daemons.start()
    gate = Gate()
    endpoint.script("soon", gate)
    far = await promise(app, "zebra", "once", 3600.0)
    soon = await promise(app, "soon", "once", 15.0)
    await begin(desk)

    # It counts down, by the second.
    seen: set[int] = set()

    def counts_down(screen: str) -> bool:
        if found := re.match(r"in (\d+) s", row_of(screen, soon)):
            seen.add(int(found[1]))
        return len(seen) >= 3

    await desk.until(counts_down, "three seconds of a countdown")
    assert max(seen) - min(seen) < 14 and "in 59 min" in row_of(desk.screen(), far)

    # It runs, and it is over.
    await gate.entered.wait()
    running = await desk.until(lambda screen: "in a run 1 of 3 slots" in screen, "its run")
    assert daemon.name[:8] in row_of(running, soon)
    await desk.until(lambda screen: re.match(r"[2-9] s", row_of(screen, soon)), "its time")
    gate.open()
    await desk.until(lambda screen: "in a run 0 of 3 slots" in screen, "its end")
    assert row_of(desk.screen(), soon) == ""

    # What fails is shown with its reason.
    endpoint.script("broken", reply(400, {"error": "no such tool"}))
    broken = await promise(app, "broken")
    await desk.until(lambda screen: "failed 1 in 1 h" in screen, "a failure")
    assert "refused" in row_of(desk.screen(), broken)

    # The filter.
    desk.press("/", "zeb")
    await desk.until(lambda screen: "/zeb" in screen.splitlines()[-1], "the filter's line")
    filtered = await desk.until(lambda screen: "NEXT DUE 1" in screen, "the filter")
    assert row_of(filtered, far) and not row_of(filtered, broken)
    desk.press("Enter")
    await desk.until(lambda screen: "Filter: zeb" in screen, "that it is kept")
    desk.press("Escape")
    await desk.until(lambda screen: row_of(screen, broken), "that it is cleared")

    # Held: what happens meanwhile is not shown.
    desk.press("p")
    await desk.until(lambda screen: "The picture is held" in screen, "that it is held")
    held = desk.screen()
    refused = await promise(app, "later", "once", 1800.0)
    await promise(app, "done")
    await daemon.hears("recall.settled", session="done")
    assert desk.screen() == held
    desk.press("p")
    await desk.until(lambda screen: row_of(screen, refused), "that it goes on")

    # Sections and help.
    desk.press("s")
    await desk.until(lambda screen: "> IN A RUN" in screen, "the next section")
    desk.press("?")
    await desk.until(lambda screen: "Ctrl-C quits" in screen, "the help")
    desk.press("?")

    # Sizes.
    for columns, lines in ((120, 40), (40, 10), (20, 5), (80, 24)):
        desk.resize(columns, lines)
        await desk.until(partial(has_keys_in, lines), f"{columns}×{lines}")

    # Ctrl-Z gives the terminal back, fg takes it again.
    desk.press("C-z")
    await desk.until(lambda screen: "Stopped" in screen, "the shell")
    assert desk.told("#{alternate_on} #{cursor_flag}") == "0 1"
    desk.line("stty -a | sed 1d > stopped; cmp before stopped && echo the same")
    await desk.until(lambda screen: "\nthe same" in screen, "the terminal's modes")
    desk.line("fg")
    await desk.until(lambda screen: "NEXT DUE" in screen, "the screen")
    desk.press("q")
    await desk.until(lambda screen: "\n$" in screen and "NEXT DUE" not in screen, "its end")
    desk.line("stty -a | sed 1d > after; cmp before after && echo as before")
    await desk.until(lambda screen: "\nas before" in screen, "the terminal's modes")


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.full),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.full),
    ],
)
async def test_signals_give_the_terminal_back(
    number: signal.Signals, status: int, desk: Tmux, tmp_path: Path
) -> None:
    desk.line(f"cd {tmp_path}")
    await begin(desk)
    desk.signal(number)
    await ended(desk, status)


@pytest.mark.full
async def test_an_outage(
    app: Application, db: Connection, desk: Tmux, wire: Proxy, tmp_path: Path
) -> None:
    """PostgreSQL goes away: the screen says so, and since when. It comes back: the screen goes on.
    However much is notified, there is one round trip a second at most."""
    desk.line(f"cd {tmp_path}")
    await begin(desk)
    await desk.until(lambda screen: "live" in screen.splitlines()[0], "that it listens")

    # When looks ended, by PostgreSQL's clock.
    ends: set[datetime] = set()
    async with asyncio.timeout(60):
        while len(ends) < 5:
            await db.execute("notify session_recalls")
            ends |= {row["at"] for row in await rows(db, LAST_LOOK)}
    first, *_, last = sorted(ends)
    assert (last - first).total_seconds() > 3.0

    wire.cut()
    lost = await desk.until(lambda screen: "PostgreSQL does not answer since" in screen, "that")
    assert "lost" in lost.splitlines()[0] and "No live worker" in lost
    seconds = re.compile(r"\((\d+) s\)")
    await desk.until(
        lambda screen: (s := seconds.search(screen)) and int(s[1]) >= 3, "for how long"
    )
    wire.heal()
    await desk.until(lambda screen: "does not answer" not in screen, "that it is back")
    id = await promise(app, "after", "once", 3600.0)
    await desk.until(lambda screen: row_of(screen, id), "what came after it")

    # One that answers nothing any more.
    wire.blackhole()
    silent = await desk.until(lambda screen: "no answer within" in screen, "its silence")
    assert all(line.startswith("Postgre") for line in silent.splitlines() if "does not" in line)
    assert "cancellation" not in silent
    wire.heal()
    await desk.until(lambda screen: "does not answer" not in screen, "that it is back again")
    desk.press("C-c")
    await ended(desk, 0)
