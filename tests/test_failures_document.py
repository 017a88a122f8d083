"""docs/failures.md by doing it: its receiver verifies what a daemon sends, and its trigger and
loops tell each failure, through a lost connection and a `tell` that fails."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import Connection
from .process.test_lease import eventually, promise
from .support.application import Application
from .support.daemon import Daemons
from .support.endpoint import Endpoint, reply
from .support.postgres import free_port
from .test_docs import ROOT, blocks

DOCUMENT = ROOT / "docs" / "failures.md"
SECRET = "whsec_Y29ycmVjdC1ob3JzZS1iYXR0ZXJ5"
RECEIVER, *LOOPS = blocks(DOCUMENT, "python")
DELIVERED = "select tries from recall_outbox where delivered_at is not null"


def of(driver: str) -> dict[str, Any]:
    """What a block of the document defines."""
    [text] = [block for block in LOOPS if f"import {driver}" in block]
    names: dict[str, Any] = {}
    exec(compile(text, str(DOCUMENT), "exec"), names)
    return names


@pytest.mark.slow
async def test_the_message_is_as_shown(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Its fields, in their order."""
    [shown] = [text for text in blocks(DOCUMENT, "") if text.startswith("POST /failures")]
    body = json.loads(shown.partition("\n\n")[2])
    endpoint.default = reply(400)
    daemon = await daemons.start(failure_url=f"http://127.0.0.1:{free_port()}/")
    await promise(app, "s")
    await daemon.hears("failure.deferred")
    row = await eventually(db, "select body from recall_outbox")
    told = json.loads(row["body"])
    assert list(told) == list(body) and list(told["data"]) == list(body["data"])


@pytest.mark.slow
async def test_the_receiver(
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
    tmp_path: Path,
) -> None:
    """It takes what is signed with its secret, and refuses the rest with 401."""
    (tmp_path / "receiver.py").write_text(RECEIVER, encoding="utf-8")
    port = free_port()
    words = ["-m", "uvicorn", "receiver:app", "--port", str(port), "--log-level", "warning"]
    output = tmp_path / "out"
    with output.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *words,
            cwd=tmp_path,
            env=os.environ | {"RECALL_SIGNING_SECRET": SECRET, "PYTHONUNBUFFERED": "1"},
            stdout=out,
        )
    try:
        await listening(port)
        endpoint.default = reply(400)
        url = f"http://127.0.0.1:{port}/failures"
        liar = await daemons.start(failure_url=url, signing_secret="another")
        recall = await promise(app, "s")
        [refused] = await liar.hears("failure.deferred")
        assert "HTTP 401" in refused["reason"]
        assert await liar.stop() == 0
        await db.execute("update recall_outbox set due_at = now()")
        honest = await daemons.start(failure_url=url, signing_secret=SECRET)
        await honest.hears("failure.delivered", recall=recall)
        await eventually(db, DELIVERED)
        assert await honest.stop() == 0
        assert output.read_text().count(f"'id': '{recall}'") == 1
    finally:
        process.kill()
        await process.wait()


async def listening(port: int) -> None:
    async with asyncio.timeout(20):
        while True:
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    return
            await asyncio.sleep(0.05)


def test_the_receiver_is_short() -> None:
    """Its function has 15 lines."""
    body = RECEIVER.partition("async def")[2].splitlines()[1:]
    assert len([line for line in body if line.strip()]) <= 15


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
async def test_the_trigger_and_the_loop(
    driver: str,
    app: Application,
    database: str,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """Each failure is told: those from before anybody listened, those that a worker settles, the
    one whose `tell` failed, and those after the connection was lost."""
    [recipe] = blocks(DOCUMENT, "sql")
    await db.execute(recipe.encode())
    endpoint.default = reply(400)
    daemon = await daemons.start()
    told: list[tuple[str, str, str]] = []
    fails = [True]

    async def tell(recall_id: str, session_id: str, reason: str) -> None:
        if fails:
            fails.pop()
            raise OSError("the mail server is away")
        told.append((recall_id, session_id, reason))

    recalls = [await promise(app, "before")]
    await daemon.hears("recall.settled", status="failed")
    watching = asyncio.create_task(of(driver)["watch"](database, tell))
    try:
        await until(told, 1)
        recalls.append(await promise(app, "while"))
        await until(told, 2)
        await db.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = current_database() and query ilike '%failed_recalls%' "
            "and pid <> pg_backend_pid()"
        )
        recalls.append(await promise(app, "after"))
        await until(told, 3)
        assert [recall for recall, _, _ in told] == recalls
        assert told[0][1] == "before" and "HTTP 400" in told[0][2]
        await eventually(db, "select 1 where not exists (select from failed_recalls)")
        assert not watching.done()
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def until(told: list[Any], number: int) -> None:
    async with asyncio.timeout(20):
        while len(told) < number:  # noqa: ASYNC110 - the recipe's own callback fills it
            await asyncio.sleep(0.02)


@pytest.mark.slow
def test_the_loops_are_well_typed(tmp_path: Path) -> None:
    """The document's Python passes mypy --strict."""
    files = []
    for n, block in enumerate(LOOPS):
        files.append(tmp_path / f"loop_{n}.py")
        files[-1].write_text(block, encoding="utf-8")
    options = ["--strict", "--ignore-missing-imports"]
    cache = ["--cache-dir", str(ROOT / ".mypy_cache" / "examples")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *cache, *map(str, files)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
