"""From the schema and the code of before the first release to those of today, while both run side
by side; and the way back, on which the old code works with the new schema.

The old code is commit 6bdc742 of this repository, the last one whose schema is version 15. Every
state that a row can be in is made by it. Runs are counted at the endpoint, whoever calls.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from recall_worker import schema

from ..conftest import Connection, OneAtATime, connected
from ..support.application import CREATE_TABLES, Application
from ..support.daemon import Daemon, Daemons
from ..support.endpoint import Endpoint, Gate, Raw, Request, reply
from ..test_cli import process
from .test_lease import eventually, promise, rows

BEFORE = "6bdc742"
REPOSITORY = Path(__file__).parent.parent.parent
SETTINGS = {"RECALL_LEASE": "6", "RECALL_CONCURRENCY": "20"}

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the old code and its SQL."""
    found = subprocess.run(
        ["git", "archive", BEFORE, "recall_worker", "sql"], cwd=REPOSITORY, capture_output=True
    )
    if found.returncode != 0:
        pytest.skip(f"the history does not reach back to {BEFORE}: {found.stderr.decode().strip()}")
    folder = tmp_path_factory.mktemp("before")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=found.stdout, check=True)
    return folder


class Old:
    """The old code's commands and workers."""

    def __init__(self, folder: Path, dsn: str, url: str) -> None:
        self._folder = folder
        self._environ = {"RECALL_DSN": dsn, "RECALL_RUN_URL": url} | SETTINGS
        self.workers: list[Daemon] = []

    def does(self, *words: str) -> str:
        """A command, which must succeed; what it says on stdout."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RECALL_")}
        said = subprocess.run(
            [sys.executable, "-m", "recall_worker", *words],
            cwd=self._folder,
            env=kept | self._environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert said.returncode == 0, said.stderr
        return said.stdout

    async def start(self) -> Daemon:
        # `-m` looks into the folder that a process is started in, before anything else.
        worker = await Daemon.start(self._environ, before=("env", "-C", str(self._folder)))
        self.workers.append(worker)
        await worker.hears("bell.listening")
        return worker

    async def end(self) -> None:
        for worker in self.workers:
            await worker.kill()


@asynccontextmanager
async def house(
    before: Path, dsn: str
) -> AsyncIterator[tuple[Application, Connection, Endpoint, Old, Daemons]]:
    async with AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(Endpoint())
        app = Application(await asyncpg.connect(dsn, connection_class=OneAtATime))
        stack.push_async_callback(app.close)
        db = await stack.enter_async_context(connected(dsn))
        await db.execute(CREATE_TABLES.encode())
        old = Old(before, dsn, endpoint.url)
        stack.push_async_callback(old.end)
        environ = {"RECALL_DSN": dsn, "RECALL_RUN_URL": endpoint.url} | SETTINGS
        new = await stack.enter_async_context(Daemons(environ))
        yield app, db, endpoint, old, new


class Build:
    """A run that the API accepts, and that is on until `ended`."""

    def __init__(self) -> None:
        self.ended = False

    async def __call__(self, request: Request) -> Raw:
        if request.method == "POST":
            return reply(202, {"run_id": "r-1"}, {"location": "/runs/accepted"})
        return reply(200, {"status": "completed" if self.ended else "running"})


async def test_an_upgrade_and_the_way_back(before: Path, empty_database: str) -> None:
    async with house(before, empty_database) as (app, db, endpoint, old, new):
        old.does("migrate")
        assert await rows(db, "select max(version) as v from recall_schema") == [{"v": 15}]
        one, two = await old.start(), await old.start()

        # --- every state that a row can be in, made by the old code ---
        ids: dict[str, str] = {}
        open_run, dead, aborted, moved = Gate(), Gate(), Gate(), Gate()
        build = Build()
        endpoint.script("fired", reply())
        endpoint.script("failed", reply(400, {"error": "no such tool"}))
        endpoint.script("busy", reply(409, {"detail": "busy"}, {"retry-after": "1"}))
        for session, gate in {
            "open": open_run,
            "dead": dead,
            "aborted": aborted,
            "moved": moved,
        }.items():
            endpoint.script(session, gate, reply())
        endpoint.script("accepted", build)
        for session in ("fired", "failed", "busy", "open", "aborted", "accepted"):
            ids[session] = await promise(app, session)
        ids["moved"] = await promise(app, "moved", "recurring", 0, 3600)
        ids["often"] = await promise(app, "often", "recurring", 0, 2)
        ids["waiting"] = await promise(app, "waiting", "once", 45)
        ids["cancelled"] = await promise(app, "cancelled", "once", 3000)
        ids["paused"] = await promise(app, "paused", "recurring", 3000, 60)
        await app.cancel_session("cancelled")
        old.does("pause", ids["paused"])
        await app.create_session("cron", "ann")
        made = old.does(
            *("schedule", "cron", "every day", "--cron", "0 9 * * *", "--tz", "Europe/Berlin"),
            "--json",
        )
        ids["cron"] = json.loads(made)["id"]
        for gate in (open_run, aborted, moved):
            await gate.entered.wait()
        await endpoint.until(lambda: endpoint.of("accepted", "GET"))
        await endpoint.until(lambda: len(endpoint.of("busy")) >= 2)
        await eventually(
            db, "select from session_recalls where id = %s and status = 'failed'", [ids["failed"]]
        )
        await app.skip_next("moved")
        await app.cancel_session("aborted")
        # One whose worker dies in mid-run, before the upgrade.
        ids["dead"] = await promise(app, "dead")
        await dead.entered.wait()
        [holder] = await rows(
            db, "select leased_by from session_recalls where id = %s", [ids["dead"]]
        )
        first, other = (one, two) if holder["leased_by"] == one.name else (two, one)
        states = {
            row["id"]: row["status"] for row in await rows(db, "select * from session_recalls")
        }
        assert Counter(states.values()) >= Counter(
            {"pending": 7, "fired": 1, "failed": 1, "cancelled": 2}
        )
        held = await rows(
            db,
            "select session_id from session_recalls where leased_by = %s "
            "and status = 'pending' and run_reference is null",
            [first.name],
        )
        # Handed on when their worker dies: once more, under the same key. Not the one that was
        # moved in mid-run: the application has said when the next call is.
        twice = {str(row["session_id"]) for row in held} & {"open", "dead"}
        assert "dead" in twice
        await first.kill()

        # --- the new schema, below a worker of the old code; then workers of both ---
        await does(empty_database, "migrate")
        [now] = await rows(db, "select max(version) as v from recall_schema")
        assert now["v"] == schema.migrations()[-1].version
        alone = [await promise(app, f"alone-{n}") for n in range(20)]
        await endpoint.until(lambda: all(endpoint.of(f"alone-{n}") for n in range(20)))
        newer = [await new.start(), await new.start()]
        third = await old.start()
        beside = [
            await promise(app, f"beside-{n}", *(("once", 0.05 * n) if n % 2 else ("immediate",)))
            for n in range(60)
        ]
        for gate in (open_run, dead, aborted, moved):
            gate.open()
        build.ended = True
        endpoint.script("busy", reply())
        for recall in (*alone, *beside, *(ids[s] for s in ("open", "dead", "accepted", "busy"))):
            await eventually(
                db,
                "select from session_recalls where id = %s and status = 'fired'",
                [recall],
                within=40,
            )
        # Who is first at a recall is chance: a few more, until old and new have each had some.
        more = 0
        async with asyncio.timeout(60):
            for workers in ([third, other], newer):
                while not any(worker.told("recall.settled") for worker in workers):
                    id = await promise(app, f"more-{more}")
                    await eventually(
                        db, "select from session_recalls where id = %s and status = 'fired'", [id]
                    )
                    more += 1

        # --- the old ones go; what they made goes on ---
        for worker in (third, other):
            assert await worker.stop(within=30) == 0
        await eventually(
            db,
            "select from session_recalls where id = %s and status = 'fired'",
            [ids["waiting"]],
            60,
        )
        await does(empty_database, "resume", ids["paused"])
        await does(empty_database, "doctor")
        endpoint.script("failed", reply())
        await does(empty_database, "retry", ids["failed"])
        await eventually(
            db,
            "select from session_recalls where id = %s and status = 'fired'",
            [ids["failed"]],
        )

        # --- the way back: the old code alone on the new schema ---
        back = await old.start()
        for daemon in newer:
            assert await daemon.stop(within=30) == 0
        returned = [await promise(app, f"back-{n}") for n in range(20)]
        old.does("cancel", ids["cron"])
        for recall in returned:
            await eventually(
                db, "select from session_recalls where id = %s and status = 'fired'", [recall]
            )
        assert len(json.loads(old.does("list", "--limit", "500", "--json"))) >= len(ids) + 100
        often = len(endpoint.of("often"))
        await endpoint.until(lambda: len(endpoint.of("often")) > often + 1)
        assert await back.stop(within=30) == 0

        # --- and forward once more ---
        await does(empty_database, "migrate", "--check")
        last = await new.start()
        forward = await promise(app, "forward")
        await last.hears("recall.settled", recall=forward, status="fired")

        # --- is everything accounted for? ---
        posts = [request for request in endpoint.requests if request.method == "POST"]
        by_session = Counter(request.session for request in posts)
        once = [
            f"{name}-{n}"
            for name, most in (("alone", 20), ("beside", 60), ("more", more), ("back", 20))
            for n in range(most)
        ]
        for session in (*once, "fired", "open", "dead", "accepted", "waiting", "moved", "forward"):
            assert by_session[session] == 1 + (session in twice), session
            assert len({request.key for request in endpoint.of(session)}) == 1, session
        assert by_session["paused"] == by_session["cron"] == by_session["cancelled"] == 0
        assert by_session["failed"] == 2 and len({r.key for r in endpoint.of("failed")}) == 2
        assert len({r.key for r in endpoint.of("busy")}) == 1
        # Each occurrence of the recurring one under a key of its own, and none left out.
        keys = [request.key for request in endpoint.of("often")]
        assert len(set(keys)) == len(keys)
        occurrences = [occurrence(request) for request in endpoint.of("often")]
        assert occurrences == sorted(occurrences)
        [row] = await rows(db, "select * from session_recalls where id = %s", [ids["aborted"]])
        assert row["status"] == "cancelled"
        [row] = await rows(db, "select * from session_recalls where id = %s", [ids["moved"]])
        assert row["status"] == "pending"
        assert row["trigger_at"] > row["created_at"] + timedelta(seconds=3599)


async def does(dsn: str, *words: str) -> str:
    """A command of the new code, which must succeed; what it says on stdout."""
    said = await asyncio.to_thread(process, dsn, *words)
    assert said.returncode == 0, said.stderr
    return said.stdout


def occurrence(request: Request) -> int:
    """Which one of its recall a call is for."""
    recall: dict[str, Any] = request.document["recall"]
    return int(recall["occurrence"])
