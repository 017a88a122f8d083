"""A2A's reference server: why there is no protocol for it. If a test fails here one day, that has
changed."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from . import Server, environment, free_port

pytestmark = pytest.mark.timeout(900)  # The first test may have to install the server.

VERSIONS = ("a2a-sdk[http-server]==1.3.0", "uvicorn==0.54.0")
APP = Path(__file__).parent / "a2a_app"


class A2AServer(Server):
    def __init__(self, folder: Path) -> None:
        bin = environment("a2a", *VERSIONS)
        shutil.copytree(
            APP, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
        self._notes = folder / "notes"
        self._notes.mkdir()
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        environ = {"AGENT_NOTES": str(self._notes), "PORT": str(port)}
        ready = f"{self.url}/.well-known/agent-card.json"
        super().__init__([bin / "python", "app.py"], folder, environ, ready)

    async def say(self, message: str, context: str, text: str) -> httpx.Response:
        """Send a message with this id into this context; the answer, which is not waited for."""
        content = {
            "message": {
                "messageId": message,
                "contextId": context,
                "role": "ROLE_USER",
                "parts": [{"text": text}],
            },
            "configuration": {"returnImmediately": True},
        }
        headers = {"A2A-Version": "1.0", "Idempotency-Key": message}
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=20) as client:
            return await client.post("/message:send", json=content, headers=headers)

    def lines(self, context: str) -> list[dict[str, Any]]:
        diary = self._notes / "diary"
        lines = diary.read_text().splitlines() if diary.exists() else []
        return [line for line in map(json.loads, lines) if line["context"] == context]

    async def until(self, context: str, does: str, times: int) -> None:
        """Wait until this many of the context's runs have begun, or ended."""
        async with asyncio.timeout(20):
            while True:
                if [line["does"] for line in self.lines(context)].count(does) >= times:
                    return
                await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def a2a(tmp_path_factory: pytest.TempPathFactory) -> Iterator[A2AServer]:
    server = A2AServer(tmp_path_factory.mktemp("a2a"))
    server.start()
    yield server
    server.kill()


@pytest.mark.full
async def test_a_repeated_message_runs_again(a2a: A2AServer) -> None:
    """The same message, with the same id and the same Idempotency-Key, is another task and another
    run."""
    tasks = set()
    for times in (1, 2):
        answer = await a2a.say("m1", "c1", "hello")
        assert answer.status_code == 200
        tasks.add(answer.json()["task"]["id"])
        await a2a.until("c1", "ends", times)
    assert len(tasks) == 2 and {line["message"] for line in a2a.lines("c1")} == {"m1"}


@pytest.mark.full
async def test_a_busy_context_is_not_busy(a2a: A2AServer) -> None:
    """A message into a context whose task goes on is 200, and runs beside it."""
    assert (await a2a.say("m2", "c2", "wait")).status_code == 200
    await a2a.until("c2", "begins", 1)
    assert (await a2a.say("m3", "c2", "hello")).status_code == 200
    await a2a.until("c2", "ends", 1)
    assert [(line["message"], line["does"]) for line in a2a.lines("c2")] == [
        ("m2", "begins"),
        ("m3", "begins"),
        ("m3", "ends"),
    ]
