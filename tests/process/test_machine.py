"""Three replicas as an operator installs them: the wheel, the units and the credentials on a
machine that systemd boots.

While recalls fall due every 100 ms one replica hangs, one is killed, one is stopped in mid-run, and
the code and the schema are upgraded replica by replica. What counts is asked of the endpoint, on a
raw socket: each occurrence requested once, or again under its key only where its worker died with
it in hand; none late by more than a second.

The machine shares this one's network; PostgreSQL and the endpoint are out here.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import pytest

from recall_worker import statements

from ..conftest import Connection, connected
from ..support import machine, postgres
from ..support.application import CREATE_TABLES, Application
from ..support.endpoint import Endpoint, Gate, Request
from ..support.machine import Machine
from ..support.postgres import free_port
from .test_lease import eventually, promise, rows

lacking = machine.missing()
pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(600),
    pytest.mark.skipif(lacking is not None, reason=lacking or ""),
]

EVERY = 0.1
LATE_MOST = 1.0
REPLICAS = [f"recall-worker@{n}.service" for n in (1, 2, 3)]
LEASE = 5
OVERRIDE = "[Service]\nWatchdogSec=6\nRestartSec=1\n"
"""So that a hung worker is found within this test and not in a minute and a half; all else is as
shipped."""
NEXT_VERSION = "9.9.9"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, Path]]:
    """The wheel, the next version's wheel (with a schema of its own), and a folder with what they
    need."""
    folder = tmp_path_factory.mktemp("wheels")
    wheel = machine.build_wheel(folder / "this")
    machine.fetch_wheels(folder / "needed", wheel)
    source = folder / "source"
    shutil.copytree(
        machine.HERE,
        source,
        ignore=shutil.ignore_patterns(".git", ".venv*", "site", "tests", "docs", "__pycache__"),
    )
    project = source / "pyproject.toml"
    project.write_text(
        re.sub(
            r'(?m)^version = ".*"$',
            f'version = "{NEXT_VERSION}"',
            project.read_text(encoding="utf-8"),
        )
    )
    number = statements.generation() + 1
    (source / "sql" / "migrations" / f"{number:04d}_next.sql").write_text(
        "-- works with code from: 1\nalter table recall_workers add column next_version_was_here "
        "boolean;\n",
        encoding="utf-8",
    )
    yield wheel, machine.build_wheel(folder / "next", source), folder / "needed"


class Load:
    """Recalls that fall due one after the other, and what became of them."""

    def __init__(self, dsn: str, app: Application, db: Connection, endpoint: Endpoint) -> None:
        self.dsn, self.app, self.db, self.endpoint = dsn, app, db, endpoint
        self.due: dict[str, datetime] = {}
        self.died_in_hand: set[str] = set()
        self.asked: dict[str, tuple[int, datetime]] = {}
        """By key: how often it was requested, and when first."""
        self._stop = asyncio.Event()

    async def answer(self, request: Request) -> Gate:
        """A run of a third of a second, or as long as its session says."""
        times, first = self.asked.get(request.key, (0, datetime.now(UTC)))
        self.asked[request.key] = (times + 1, first)
        gate = Gate()
        asyncio.get_running_loop().call_later(0.3, gate.open)
        return gate

    async def flow(self) -> None:
        """One recall every 100 ms, each in a session of its own, due a second after it was
        promised."""
        # On a connection of its own, as the test does other things meanwhile.
        app = await Application.connect(self.dsn)
        started, n = time.monotonic(), 0
        while not self._stop.is_set():
            session, at = f"s{n}", datetime.now(UTC) + timedelta(seconds=1)
            await app.create_session(session, "ann")
            self.due[await app.schedule(session, "once", at, "look")] = at
            n += 1
            await asyncio.sleep(max(0.0, started + n * EVERY - time.monotonic()))
        await app.close()

    async def dies(self, worker: str) -> None:
        """Note what a worker that can't go on has in hand: those runs are taken up by others, under
        the same keys."""
        found = await rows(
            self.db,
            "select id from session_recalls where leased_by = %s and status in ('pending', "
            "'running')",
            [worker],
        )
        self.died_in_hand |= {row["id"] for row in found}

    async def account(self) -> None:
        """Stop, wait for the rest, and hold what was requested against what was promised."""
        self._stop.set()
        await eventually(
            self.db,
            "select 1 from session_recalls where status = 'fired' having count(*) = %s",
            [len(self.due)],
            40,
        )
        assert set(self.asked) == {f"{id}:1" for id in self.due}, (
            "lost, or called though nobody asked"
        )
        again = {key.rpartition(":")[0] for key, (times, _) in self.asked.items() if times > 1}
        assert again <= self.died_in_hand, "called twice though its worker lived"
        lateness = {
            id: (self.asked[f"{id}:1"][1] - at).total_seconds() for id, at in self.due.items()
        }
        assert max(lateness.values()) <= LATE_MOST, sorted(
            lateness.items(), key=lambda item: -item[1]
        )[:10]
        print(
            f"{len(self.due)} recalls, {len(again)} again, late by {max(lateness.values()):.3f} "
            f"s at most"
        )


@pytest.fixture
async def load() -> AsyncIterator[Load]:
    """A PostgreSQL and an endpoint that the machine reaches, with the application's tables."""
    with postgres.embedded(tcp=True) as server, postgres.database(server.dsn(tcp=True)) as dsn:
        async with connected(dsn) as db, Endpoint() as endpoint:
            await db.execute(CREATE_TABLES.encode())
            app = await Application.connect(dsn)
            load = Load(dsn, app, db, endpoint)
            endpoint.default = load.answer
            yield load
            await app.close()


@pytest.fixture
def box(tmp_path: Path, wheels: tuple[Path, Path, Path], load: Load) -> Iterator[Machine]:
    """The machine, set up as docs/deployment.md says, nothing started."""
    wheel, _, needed = wheels
    root = machine.copy(machine.debian(), tmp_path / "root")
    try:
        machine.install(root, "/opt/recall-worker-1", wheel, needed)
        (root / "opt/recall-worker").symlink_to("recall-worker-1")
        for unit in (machine.HERE / "systemd").iterdir():
            if unit.suffix in (".service", ".timer", ".target"):
                shutil.copy(unit, root / "etc/systemd/system")
        with Machine.boot(root, tmp_path) as box:
            settings = (
                f"RECALL_RUN_URL={load.endpoint.url}\nRECALL_LEASE={LEASE}\n"
                "RECALL_CONCURRENCY=20\nPRUNE_OLDER_THAN=30d\n"
            )
            box.write("/etc/recall-worker/recall-worker.env", settings)
            for folder in ("credentials", "owner-credentials"):
                box.write(f"/etc/recall-worker/{folder}/DSN", load.dsn, 0o600)
            box.write("/etc/recall-worker/credentials/RUN_TOKEN", "tok-5eed", 0o600)
            box.write("/etc/systemd/system/recall-worker@.service.d/quick.conf", OVERRIDE)
            box.systemctl("daemon-reload")
            yield box
    finally:
        shutil.rmtree(root, ignore_errors=True)


@asynccontextmanager
async def flowing(load: Load) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        flow = group.create_task(load.flow())
        await eventually(
            load.db, "select 1 from session_recalls where status = 'fired' having count(*) >= 5"
        )
        yield
        await load.account()
        await flow


async def worker_of(box: Machine, unit: str, db: Connection, within: float = 30) -> str:
    """The name of the worker that a unit runs now, once that has said so in the database."""
    pid = await asyncio.to_thread(box.show, unit, "MainPID")
    found = await eventually(
        db, "select worker from recall_workers where pid = %s", [int(pid)], within
    )
    return str(found["worker"])


async def until(box: Machine, unit: str, name: str, wanted: str, within: float = 60) -> None:
    async with asyncio.timeout(within):
        while True:
            if await asyncio.to_thread(box.show, unit, name) == wanted:
                return
            await asyncio.sleep(0.1)


async def test_three_replicas(box: Machine, load: Load, wheels: tuple[Path, Path, Path]) -> None:
    """Installed, started, hung, killed, stopped in mid-run, upgraded: none lost, none doubled, none
    late."""
    await asyncio.to_thread(box.systemctl, "start", "recall-worker-migrate.service")
    await asyncio.to_thread(
        box.systemctl,
        "enable",
        "--now",
        *REPLICAS,
        "recall-worker.target",
        "recall-worker-prune.timer",
    )
    for unit in REPLICAS:
        assert await asyncio.to_thread(box.show, unit, "ActiveState") == "active"

    async with flowing(load):
        # One hangs. systemd finds out by the watchdog, and starts it anew.
        hung = REPLICAS[1]
        before = await asyncio.to_thread(box.show, hung, "MainPID")
        name = await worker_of(box, hung, load.db)
        await asyncio.to_thread(box.systemctl, "kill", "--signal=STOP", "--kill-who=main", hung)
        await load.dies(name)
        await until(box, hung, "NRestarts", "1")
        await until(box, hung, "ActiveState", "active")
        assert await asyncio.to_thread(box.show, hung, "MainPID") != before
        assert "watchdog" in (await asyncio.to_thread(box.log, "-u", hung)).lower()

        # One is killed.
        killed = REPLICAS[2]
        name = await worker_of(box, killed, load.db)
        await asyncio.to_thread(box.systemctl, "kill", "--signal=KILL", killed)
        await load.dies(name)
        await until(box, killed, "NRestarts", "1")
        await until(box, killed, "ActiveState", "active")

        # One is stopped in mid-run: it takes no more, and its run comes to its end.
        drained = REPLICAS[0]
        name = await worker_of(box, drained, load.db)
        long = Gate()
        for n in range(100):
            session = f"long{n}"
            gate = Gate()
            load.endpoint.script(session, gate)
            id = await promise(load.app, session)
            holder = await eventually(
                load.db,
                "select leased_by, id from session_recalls where id = %s and leased_by is not null",
                [id],
            )
            if holder["leased_by"] == name:
                long = gate
                break
            gate.open()
            await eventually(
                load.db, "select 1 from session_recalls where id = %s and status = 'fired'", [id]
            )
        stopping = asyncio.create_task(asyncio.to_thread(box.systemctl, "stop", drained))
        await until(box, drained, "ActiveState", "deactivating")
        assert not stopping.done()
        long.open()
        await stopping
        assert await asyncio.to_thread(box.show, drained, "Result") == "success"
        ended = await rows(
            load.db, "select outcome, calls from recall_attempts where session_id like 'long%'"
        )
        assert {(row["outcome"], row["calls"]) for row in ended} == {("answered", 1)}
        await load.db.execute("delete from sessions where id like 'long%'")
        for key in [key for key in load.asked if key.rpartition(":")[0] not in load.due]:
            del load.asked[key]
        await asyncio.to_thread(box.systemctl, "start", drained)

        # The upgrade: the code beside the old one, the schema, then one replica after the other.
        _, newer, needed = wheels
        await asyncio.to_thread(machine.install, box.root, "/opt/recall-worker-2", newer, needed)
        await asyncio.to_thread(box.run, "ln", "-sfn", "recall-worker-2", "/opt/recall-worker")
        await asyncio.to_thread(box.systemctl, "start", "recall-worker-migrate.service")
        assert await rows(load.db, "select next_version_was_here from recall_workers limit 1")
        for unit in REPLICAS:
            await asyncio.to_thread(box.systemctl, "restart", unit)
            assert await asyncio.to_thread(box.show, unit, "ActiveState") == "active"
        await eventually(
            load.db,
            "select 1 from recall_workers where version = %s having count(*) = 3",
            [NEXT_VERSION],
        )

    # Nothing that systemd or the programs said tells a secret, and what runs is nobody on this
    # machine.
    said = await asyncio.to_thread(box.log)
    assert "tok-5eed" not in said
    assert await asyncio.to_thread(box.show, REPLICAS[0], "DynamicUser") == "yes"
    assert load.endpoint.requests[-1].headers["authorization"] == "Bearer tok-5eed"
    await asyncio.to_thread(box.systemctl, "start", "recall-worker-prune.service")
    assert await asyncio.to_thread(box.show, "recall-worker-prune.service", "Result") == "success"


async def test_a_setting_that_is_wrong(box: Machine) -> None:
    """Said in the log once; systemd does not start it again and again."""
    await asyncio.to_thread(
        box.write, "/etc/recall-worker/recall-worker.env", "RECALL_RUN_URL=nowhere\n"
    )
    await asyncio.to_thread(box.systemctl, "start", REPLICAS[0], check=False)
    await until(box, REPLICAS[0], "ActiveState", "failed")
    assert await asyncio.to_thread(box.show, REPLICAS[0], "NRestarts") == "0"
    assert "RECALL_RUN_URL is no address" in await asyncio.to_thread(box.log, "-u", REPLICAS[0])


async def test_the_console(box: Machine, load: Load) -> None:
    """Under its unit, with secrets of its own: pages for who has the token, and a clean stop."""
    unit, port = "recall-worker-console.service", free_port()
    console = "/etc/recall-worker/console"
    for path, text in {
        f"{console}.env": f"RECALL_CONSOLE_LISTEN=127.0.0.1:{port}\n",
        f"{console}-credentials/DSN": load.dsn,
        f"{console}-credentials/CONSOLE_TOKEN": "tok-0f-the-console",
    }.items():
        await asyncio.to_thread(box.write, path, text, 0o600)
    for name in ("recall-worker-migrate.service", unit):
        await asyncio.to_thread(box.systemctl, "start", name)
    root = f"http://127.0.0.1:{port}"
    async with aiohttp.ClientSession() as session:

        async def page(path: str, **headers: str) -> tuple[int, str]:
            async with session.get(root + path, headers=headers) as answer:
                return answer.status, await answer.text()

        async with asyncio.timeout(30):
            while True:
                with suppress(aiohttp.ClientConnectionError):
                    assert (await page("/healthz"))[0] == 200
                    break
                await asyncio.sleep(0.1)
        status, text = await page("/")
        assert status == 401 and "live workers" not in text
        for path, says in {"/": "live workers", "/settings": "RECALL_CONSOLE_LISTEN"}.items():
            status, text = await page(path, Authorization="Bearer tok-0f-the-console")
            assert status == 200 and says in text, text
    await asyncio.to_thread(box.systemctl, "stop", unit)
    assert await asyncio.to_thread(box.show, unit, "Result") == "success"
    assert await asyncio.to_thread(box.show, unit, "NRestarts") == "0"
    said = await asyncio.to_thread(box.log, "-u", unit)
    assert "console.listening" in said and "tok-0f-the-console" not in said
