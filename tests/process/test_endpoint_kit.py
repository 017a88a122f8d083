"""The endpoint kit as people run it: uvicorn, one process or four, on one PostgreSQL.
`check-endpoint` passes whole; a process that is killed in mid-run frees its sessions, and no run
meets another. The agent's runs are counted over sockets of the test's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psycopg
import pytest

from recall_worker.contract.check import FAIL, NOT_SHOWN, Check
from recall_worker.protocols.contract import address
from recall_worker.settings import Settings

from ..support.application import Application
from ..support.daemon import Daemons
from ..support.postgres import free_port
from ..test_reference_api import document

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "rosebud-1"
DEADLINE = 60.0
LEASE = 3.0


@dataclass(slots=True, eq=False)
class Visit:
    """One run of the agent, as the counter sees it."""

    session_id: str
    key: str
    pid: int
    starts: int
    writer: asyncio.StreamWriter
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Counter:
    """Counts the agent's runs, and which of them meet in a session."""

    def __init__(self) -> None:
        self.visits: list[Visit] = []
        self.met: list[tuple[Visit, Visit]] = []
        self._news = asyncio.Condition()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session_id, key, pid, starts = (await reader.readline()).decode().split()
        visit = Visit(session_id, key, int(pid), int(starts), writer)
        self.met += [
            (other, visit)
            for other in self.visits
            if other.session_id == session_id and not other.ended.is_set()
        ]
        self.visits.append(visit)
        async with self._news:
            self._news.notify_all()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        visit.ended.set()
        writer.close()

    async def sees(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE), self._news:
            await self._news.wait_for(condition)

    @staticmethod
    def release(visit: Visit) -> None:
        visit.writer.write(b"\n")


@pytest.fixture
async def counter() -> AsyncIterator[tuple[Counter, int]]:
    counter = Counter()
    server = await asyncio.start_server(counter, "127.0.0.1", 0)
    yield counter, server.sockets[0].getsockname()[1]
    server.close()
    for visit in counter.visits:
        visit.writer.close()


@contextlib.asynccontextmanager
async def serving(
    processes: int,
    environ: Mapping[str, str],
    app: str = "tests.support.kit_app:app",
    folder: Path = ROOT,
) -> AsyncIterator[str]:
    """The API under uvicorn; its RECALL_RUN_URL, below a prefix."""
    port = free_port()
    uvicorn = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "uvicorn", app),
        *("--port", str(port), "--log-level", "warning", "--workers", str(processes)),
        cwd=folder,
        env=os.environ | {"KIT_TOKEN": TOKEN} | dict(environ),
    )
    base = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(DEADLINE), httpx.AsyncClient() as http:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    await http.get(base)
                    break
                await asyncio.sleep(0.05)
        yield f"{base}/agents/one/{{session_id}}/run"
    finally:
        with contextlib.suppress(ProcessLookupError):
            uvicorn.terminate()
        async with asyncio.timeout(DEADLINE):
            await uvicorn.wait()


@pytest.mark.parametrize(
    ("within", "not_offered"),
    [
        pytest.param("none", {"accepted", "cancel", "stream"}, id="answered at the end"),
        pytest.param("25", {"accepted", "cancel", "stream"}, id="accepted where it takes long"),
        pytest.param("0.1", {"stream"}, id="accepted"),
    ],
)
@pytest.mark.parametrize("processes", [1, 4])
async def test_check_endpoint_passes(
    processes: int, within: str, not_offered: set[str], database: str, counter: tuple[Counter, int]
) -> None:
    """Every row passes, or is what is not offered; and no run has met another."""
    counted, port = counter
    environ = {"KIT_DSN": database, "KIT_WITHIN": within, "KIT_COUNTER": str(port)}
    async with serving(processes, environ) as url:
        settings = Settings(run_url=url, run_token=TOKEN)
        rows = await Check(settings, "for-tests", "missing-1", 30.0).rows()
    shown = "\n".join(f"{r.finding.verdict:9} {r.name:12} {r.finding.seen}" for r in rows)
    print(shown)
    assert [r.name for r in rows if r.finding.verdict == FAIL] == [], shown
    assert {r.name for r in rows if r.finding.verdict == NOT_SHOWN} <= not_offered, shown
    assert counted.met == []
    keys = [visit.key for visit in counted.visits]
    assert len(keys) == len(set(keys)), "no key has run twice"
    if processes > 1:
        assert len({visit.pid for visit in counted.visits}) > 1, "one process has done all of it"


@pytest.mark.parametrize("within", ["none", "25", "0.1"])
async def test_a_process_is_killed_in_mid_run(
    within: str, database: str, counter: tuple[Counter, int]
) -> None:
    """Its session is busy until its lease ends, then another process runs the same key again, once;
    an accepted run is told to have failed, so that the worker begins anew. Other sessions are not
    touched. Afterwards everything passes."""
    counted, port = counter
    environ = {
        "KIT_DSN": database,
        "KIT_WITHIN": within,
        "KIT_COUNTER": str(port),
        "KIT_LEASE": str(LEASE),
    }
    async with (
        serving(4, environ) as url,
        httpx.AsyncClient(
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=DEADLINE,
            limits=httpx.Limits(max_keepalive_connections=0),
        ) as http,
    ):

        async def call(session: str, key: str, message: str) -> httpx.Response:
            return await http.post(
                address(url, session),
                content=json.dumps(document(session, message)).encode(),
                headers={"Idempotency-Key": key},
            )

        first = asyncio.create_task(call("s", "a:1", "hold"))
        await counted.sees(lambda: len(counted.visits) == 1)
        if within == "0.1":
            accepted = await first
            assert accepted.status_code == 202
        os.kill(counted.visits[0].pid, signal.SIGKILL)
        await asyncio.wait_for(counted.visits[0].ended.wait(), DEADLINE)
        if within != "0.1":
            with pytest.raises(httpx.TransportError):
                await first
        # While the lease holds, nobody can know that the process is dead.
        again = await call("s", "a:1", "hold")
        assert (again.status_code, len(counted.visits)) == (409 if within != "0.1" else 202, 1)
        other = await call("s", "b:1", "work")
        assert (other.status_code, other.json()["code"]) == (409, "session_busy")
        assert (await call("t", "c:1", "work")).status_code in (200, 202)

        if within != "0.1":
            later = asyncio.create_task(_until_it_runs(lambda: call("s", "a:1", "hold")))
            await counted.sees(lambda: [v.key for v in counted.visits].count("a:1") == 2)
            rerun = next(v for v in counted.visits if v.starts == 2)
            counted.release(rerun)
            ended = await later
            assert (ended.status_code, ended.json()["output"]) == (200, "did hold")
            assert (await call("s", "a:1", "hold")).headers["Idempotent-Replayed"] == "true"
        else:
            where = httpx.URL(address(url, "s")).join(accepted.headers["Location"])
            async with asyncio.timeout(DEADLINE):
                while True:
                    state = (await http.get(where)).json()
                    if state["status"] != "running":
                        break
                    await asyncio.sleep(0.1)
            assert (state["status"], state["code"]) == ("failed", "run_lost")
            renewed = asyncio.create_task(_until_it_runs(lambda: call("s", "a:1.1", "work")))
            assert (await renewed).status_code == 202
        assert counted.met == []

        settings = Settings(run_url=url, run_token=TOKEN)
        rows = await Check(settings, "for-tests", "missing-1", 30.0).rows()
        assert [r.name for r in rows if r.finding.verdict == FAIL] == []
    with psycopg.connect(database) as conn:
        held = conn.execute("select count(*) from recall_session_locks").fetchone()
        assert held == (0,), "nothing is left behind"


async def _until_it_runs(call: Callable[[], Awaitable[httpx.Response]]) -> httpx.Response:
    async with asyncio.timeout(DEADLINE):
        while True:
            answer = await call()
            if answer.status_code != 409:
                return answer
            await asyncio.sleep(0.1)


async def test_a_worker_gets_through_a_kill(
    database: str, counter: tuple[Counter, int], app: Application, daemons: Daemons
) -> None:
    """A real daemon: the process that runs the agent is killed, the worker calls again under the
    same key, and the recall fires; the agent ran twice, never at the same time."""
    counted, port = counter
    environ = {"KIT_DSN": database, "KIT_COUNTER": str(port), "KIT_LEASE": str(LEASE)}
    async with serving(4, environ) as url:
        daemon = await daemons.start(run_url=url, run_token=TOKEN)
        await app.create_session("s", "ann")
        await app.schedule("s", "immediate", datetime.now(UTC), "hold")
        await counted.sees(lambda: len(counted.visits) == 1)
        os.kill(counted.visits[0].pid, signal.SIGKILL)
        await counted.sees(lambda: len(counted.visits) == 2)
        assert counted.visits[1].pid != counted.visits[0].pid
        counted.release(counted.visits[1])
        await daemon.hears("recall.settled", outcome="answered", status="fired")
    assert [visit.starts for visit in counted.visits] == [1, 2]
    assert len({visit.key for visit in counted.visits}) == 1 and counted.met == []


async def test_the_program_of_the_document(database: str, tmp_path: Path) -> None:
    """docs/endpoint.md: what stands there is an endpoint that passes."""
    text = (ROOT / "docs" / "endpoint.md").read_text(encoding="utf-8")
    [program] = re.findall(r"<!-- the kit -->\n```python\n(.*?)```", text, re.S)
    (tmp_path / "app.py").write_text(program, encoding="utf-8")
    environ = {"RUN_TOKEN": TOKEN, "DATABASE_URL": database}
    async with serving(1, environ, "app:app", tmp_path) as url:
        settings = Settings(run_url=url, run_token=TOKEN)
        rows = await Check(settings, "for-tests", "missing-1", 30.0).rows()
    assert [r.name for r in rows if r.finding.verdict == FAIL] == []
