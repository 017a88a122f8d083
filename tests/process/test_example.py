"""examples/fastapi_agent, the daemon, and a person at the WebSocket: a recall that falls due in the
conversation waits, and fires after."""

from __future__ import annotations

import asyncio
import os
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


async def _messages(base: str, session: str) -> list[tuple[str, str]]:
    async with httpx.AsyncClient() as http:
        return [
            (m["role"], m["text"])
            for m in (await http.get(f"{base}/sessions/{session}/messages")).json()
        ]


async def test_a_recall_waits_for_the_person_to_leave(
    application: str, empty_database: str
) -> None:
    """The agent is asked for a reminder; it falls due while the person still chats (409, deferred);
    they leave; it fires, once."""
    schema.migrate(empty_database)
    run_url = application + "/sessions/{session_id}/run"
    settings = {
        "RECALL_DSN": empty_database,
        "RECALL_RUN_URL": run_url,
        "RECALL_RUN_TOKEN": "s3cret",
    }
    async with Daemons(settings) as daemons:
        daemon = await daemons.start()
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(f"{application}/sessions/one/chat") as person,
        ):
            await person.send_str("remind me in 1s: look at the build")
            assert await person.receive_str() == "I will come back in 1 s."
            await daemon.hears("recall.settled", outcome="busy", times=2)
            await person.send_str("are you still there?")
            assert await person.receive_str() == "I have read: are you still there?"
            assert not [m for m in await _messages(application, "one") if m[0] == "system"]
        await daemon.hears("recall.settled", outcome="answered", status="fired")
    assert await _messages(application, "one") == [
        ("user", "remind me in 1s: look at the build"),
        ("agent", "I will come back in 1 s."),
        ("user", "are you still there?"),
        ("agent", "I have read: are you still there?"),
        ("system", "[Scheduled recall] look at the build"),
        ("agent", "I have read: look at the build"),
    ]


async def test_the_endpoint_keeps_the_contract(application: str, empty_database: str) -> None:
    """Two calls at once: one runs, the other is told 409; the same key is replayed; another body
    under it refused; a stranger unknown."""
    async with (
        aiohttp.ClientSession() as web,
        web.ws_connect(f"{application}/sessions/two/chat") as person,
    ):
        await person.send_str("hello")
        await person.receive_str()
    body = {
        "session_id": "two",
        "user_message": "work",
        "system_message": "[Scheduled recall] work",
        "recall": {},
    }
    async with httpx.AsyncClient(headers={"Authorization": "Bearer s3cret"}) as http:

        async def call(key: str, session: str = "two", **more: str) -> httpx.Response:
            return await http.post(
                f"{application}/sessions/{session}/run",
                json=body | more,
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
