"""Why there is no protocol for Google ADK: what `adk api_server` does where a recall meets a
conversation. docs/servers.md tells it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from ..support.endpoint import Endpoint, Gate
from .agno_server import AdkServer

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]  # The first test may have to install it.


@pytest.fixture(scope="module")
def adk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdkServer]:
    """ADK's own server."""
    server = AdkServer(tmp_path_factory.mktemp("adk"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def model(adk: AdkServer, endpoint: Endpoint) -> Endpoint:
    """What the model says, scripted by what it is told."""
    adk.play(endpoint)
    return endpoint


async def converse(adk: AdkServer, session: str) -> None:
    (
        await adk.ask("POST", f"/apps/helper/users/ann/sessions/{session}", json={})
    ).raise_for_status()


async def run(adk: AdkServer, session: str, message: str) -> httpx.Response:
    spoken = {"role": "user", "parts": [{"text": message}]}
    document = {"appName": "helper", "userId": "ann", "sessionId": session, "newMessage": spoken}
    return await adk.ask("POST", "/run", json=document, headers={"Idempotency-Key": "one"})


async def said(adk: AdkServer, session: str) -> list[tuple[str, str]]:
    """Who said what in the session, in order."""
    found = (await adk.ask("GET", f"/apps/helper/users/ann/sessions/{session}")).json()
    return [
        (event["author"], event["content"]["parts"][0]["text"])
        for event in found["events"]
        if event.get("content")
    ]


async def test_a_second_call_kills_the_first(adk: AdkServer, model: Endpoint) -> None:
    """A call into a session that is in a run is taken, and the run that was there, a person's, dies
    with 500 and loses its answer."""
    await converse(adk, "talk")
    persons, ours = Gate(), Gate()
    model.script("a person's question", persons)
    model.script("a recall", ours)
    first = asyncio.create_task(run(adk, "talk", "a person's question"))
    await persons.entered.wait()
    second = asyncio.create_task(run(adk, "talk", "a recall"))
    await ours.entered.wait()
    persons.open()
    assert (await first).status_code == 500
    ours.open()
    assert (await second).status_code == 200
    assert await said(adk, "talk") == [
        ("user", "a person's question"),
        ("user", "a recall"),
        ("helper", "done"),
    ]


async def test_keys_are_ignored(adk: AdkServer, model: Endpoint) -> None:
    """The same Idempotency-Key twice is two runs, and nothing tells them apart afterwards."""
    await converse(adk, "twice")
    for _ in range(2):
        assert (await run(adk, "twice", "hello")).status_code == 200
    assert len(model.of("hello")) == 2
    assert await said(adk, "twice") == [("user", "hello"), ("helper", "done")] * 2


async def test_a_caller_that_dies_takes_the_run_along(adk: AdkServer, model: Endpoint) -> None:
    """The request is the run: when its caller goes, the run is broken off, and no other worker can
    follow it."""
    await converse(adk, "short")
    gate = Gate()
    model.script("a recall", gate)
    caller = asyncio.create_task(run(adk, "short", "a recall"))
    await gate.entered.wait()
    caller.cancel()
    await asyncio.wait_for(gate.hung_up.wait(), 20)
    assert await said(adk, "short") == [("user", "a recall")]
