"""examples/fastapi_agent, the daemon, and a person at the WebSocket: a recall that falls due in the
conversation waits, and fires after."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import httpx
import psycopg
import pytest

from recall_worker import schema

from ..support.daemon import Daemons
from ..support.postgres import free_port
from ..test_reference_api import document

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fastapi_agent"


@pytest.fixture
async def application(empty_database: str) -> AsyncIterator[str]:
    """The example under uvicorn, as a process; its base URL."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "uvicorn",
        "app:app",
        "--port",
        str(port),
        "--log-level",
        "warning",
        cwd=EXAMPLE,
        env=os.environ | {"DATABASE_URL": empty_database, "RUN_TOKEN": "s3cret"},
    )
    base = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(20), httpx.AsyncClient() as http:
            while True:
                try:
                    await http.get(f"{base}/sessions/none/messages")
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
        yield base
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.slow
async def test_a_recall_waits_for_the_person_to_leave(
    application: str, empty_database: str
) -> None:
    """As its README says it: the agent is asked for a reminder; it falls due while the person still
    chats (409, deferred); they leave; it fires, once."""
    schema.migrate(empty_database)
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    [command] = re.findall(r"^python (chat\.py .*)$", readme, re.MULTILINE)
    [shown] = re.findall(r"^```text\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    settings = {
        "RECALL_DSN": empty_database,
        "RECALL_RUN_URL": application + "/sessions/{session_id}/run",
        "RECALL_RUN_TOKEN": "s3cret",
    }
    async with Daemons(settings) as daemons:
        daemon = await daemons.start()
        person = await asyncio.create_subprocess_exec(
            sys.executable,
            *shlex.split(command),
            cwd=EXAMPLE,
            env=os.environ | {"CHAT_URL": application},
            stdout=asyncio.subprocess.PIPE,
        )
        await daemon.hears("recall.settled", outcome="busy", times=2)
        await daemon.hears("recall.settled", outcome="answered", status="fired")
        said, _ = await person.communicate()
    assert person.returncode == 0 and said.decode() == shown


async def test_the_endpoint_keeps_the_contract(application: str, empty_database: str) -> None:
    """Two calls at once: one runs, the other is told 409; the same key is replayed; another body
    under it refused; a stranger unknown."""
    schema.migrate(empty_database)
    async with (
        aiohttp.ClientSession() as web,
        web.ws_connect(f"{application}/sessions/two/chat") as person,
    ):
        await person.send_str("hello")
        await person.receive_str()
    async with httpx.AsyncClient(headers={"Authorization": "Bearer s3cret"}) as http:

        async def call(key: str, session: str = "two", **more: str) -> httpx.Response:
            return await http.post(
                f"{application}/sessions/{session}/run",
                json=document(session, "work") | more,
                headers={"Idempotency-Key": key},
            )

        answers = await asyncio.gather(call("a:1"), call("b:1"))
        assert sorted(a.status_code for a in answers) == [200, 409]
        ran = next(a for a in answers if a.status_code == 200)
        again = await call(ran.request.headers["idempotency-key"])
        assert (again.status_code, again.json()) == (200, ran.json())
        assert (
            await call(ran.request.headers["idempotency-key"], user_message="other")
        ).status_code == 422
        gone = await call("c:1", session="nobody")
        assert (gone.status_code, gone.json()["code"]) == (404, "session_not_found")
        http.headers.pop("Authorization")
        assert (await call("d:1")).status_code == 401
    async with await psycopg.AsyncConnection.connect(empty_database) as conn:
        found = await (
            await conn.execute("select count(*) from messages where role = 'system'")
        ).fetchone()
        assert found == (1,)
