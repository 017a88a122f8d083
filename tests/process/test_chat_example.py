"""examples/chat as a person has it: the chat and a worker as processes, and the page in Chromium.

What is shown of the page is what Chromium shows, found by its roles and labels.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
import yaml
from aiohttp import web
from playwright.async_api import Browser, expect

from recall_worker import Recalls, schema

from ..support.browser import PATIENCE, at_a_page, chromium
from ..support.browser import Person as Someone
from ..support.daemon import Daemon, Daemons
from ..support.postgres import free_port

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "chat"
PICTURES = os.environ.get("CHAT_PICTURES")
"""A folder for pictures of what was shown: to look at them, and for the document."""
TOKEN = "t0ken"


@asynccontextmanager
async def chat(
    dsn: str,
    port: int = 0,
    environ: Mapping[str, str] | None = None,
) -> AsyncIterator[str]:
    """One process of the chat; its address."""
    port = port or free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "uvicorn", "app:app", "--port", str(port)),
        *("--log-level", "warning", "--timeout-graceful-shutdown", "1"),
        cwd=EXAMPLE,
        env=os.environ
        | {"CHAT_MODEL": "", "DATABASE_URL": dsn, "RUN_TOKEN": TOKEN}
        | dict(environ or {}),
    )
    base = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(PATIENCE), httpx.AsyncClient() as http:
            while True:
                assert process.returncode is None, "it has ended"
                try:
                    await http.get(base)
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
        yield base
    finally:
        process.terminate()
        await process.wait()


@pytest.fixture
def migrated(empty_database: str) -> str:
    schema.migrate(empty_database)
    return empty_database


@pytest.fixture
async def base(migrated: str) -> AsyncIterator[str]:
    async with chat(migrated) as address:
        yield address


@asynccontextmanager
async def worker(base: str, dsn: str) -> AsyncIterator[Daemon]:
    settings = {
        "RECALL_DSN": dsn,
        "RECALL_RUN_URL": base + "/agent/{session_id}/run",
        "RECALL_RUN_TOKEN": TOKEN,
        "RECALL_BUSY_DELAY": "1",
    }
    async with Daemons(settings) as daemons:
        yield await daemons.start()


# --- without a browser ----------------------------------------------------------------------------


@asynccontextmanager
async def opened(
    base: str, id: str, after: int = 0
) -> AsyncIterator[Callable[[], Awaitable[tuple[str, Any]]]]:
    """The open chat as the page has it: a function that waits for the next event, with its
    data."""
    async with (
        httpx.AsyncClient(timeout=PATIENCE) as http,
        http.stream(
            "GET", f"{base}/chats/{id}/events", headers={"Last-Event-ID": str(after)}
        ) as answer,
    ):
        lines = answer.aiter_lines()

        async def following() -> tuple[str, Any]:
            event = ""
            async for line in lines:
                if line.startswith("event: "):
                    event = line.removeprefix("event: ")
                if line.startswith("data: "):
                    return event, json.loads(line.removeprefix("data: "))
            raise AssertionError("the chat was closed")

        yield following


async def said(following: Callable[[], Awaitable[tuple[str, Any]]], role: str) -> str:
    """Wait for a message of this role."""
    async with asyncio.timeout(PATIENCE):
        while True:
            event, data = await following()
            if event == "message" and data["role"] == role:
                return str(data["text"])


async def say(base: str, id: str, text: str) -> httpx.Response:
    async with httpx.AsyncClient(timeout=PATIENCE) as http:
        return await http.post(
            f"{base}/chats/{id}/messages",
            content=json.dumps({"text": text}),
            headers={"Content-Type": "application/json"},
        )


async def test_what_is_said_is_answered_and_seen(base: str) -> None:
    """Every open page has the message, the answer as it is written, and the answer; one that is
    opened later has both, and one that comes back has what it has not seen. What can't be a message
    is refused with a sentence."""
    id = str(uuid4())
    async with opened(base, id) as first, opened(base, id) as second:
        assert (await say(base, id, " <b>hello</b> ")).status_code == 200
        for page in (first, second):
            kind, asked = await page()
            assert (kind, asked["role"], asked["text"]) == ("message", "user", "<b>hello</b>")
            chunks = []
            while (event := await page())[0] == "chunk":
                chunks.append(event[1])
            kind, answered = event
            assert (kind, answered["role"], len(chunks) > 1) == ("message", "agent", True)
            assert answered["text"] == "".join(chunks) == "I have read: <b>hello</b>"
    async with opened(base, id) as later:
        texts = [(await later())[1]["text"] for _ in range(2)]
        assert texts == ["<b>hello</b>", "I have read: <b>hello</b>"]
    async with opened(base, id, after=asked["id"]) as again:
        assert (await again())[1]["text"] == "I have read: <b>hello</b>"

    for text in ("", "  ", "a\0b"):
        assert (await say(base, id, text)).status_code == 400
    assert (await say(base, id, "\ud800")).status_code == 200
    assert (await say(base, id, "x" * 40_000)).status_code == 413
    address = f"{base}/chats/{id}/messages"
    async with httpx.AsyncClient() as http:
        for body in (b"", b"[", b"[" * 20_000, b'"text"', b"{}", b"\xff"):
            json_type = {"Content-Type": "application/json"}
            answer = await http.post(address, content=body, headers=json_type)
            assert (answer.status_code, list(answer.json())) == (400, ["message"]), body
        assert (await http.post(address, data={"text": "a form's"})).status_code == 415
        assert (await http.get(f"{base}/chats/..%2fetc")).status_code == 404


def test_compose_says_what_the_chat_listens_to() -> None:
    """The worker's address in compose.yaml and in the README are that of the mount, and both
    services have one token."""
    composed = yaml.safe_load((EXAMPLE / "compose.yaml").read_text("utf-8"))["services"]
    [mount] = re.findall(r'Mount\("(/\w+)", endpoint\)', (EXAMPLE / "app.py").read_text("utf-8"))
    settings = composed["worker"]["environment"]
    assert settings["RECALL_RUN_URL"] == f"http://chat:8000{mount}/{{session_id}}/run"
    assert settings["RECALL_RUN_TOKEN"] == composed["chat"]["environment"]["RUN_TOKEN"]
    readme = (EXAMPLE / "README.md").read_text("utf-8")
    assert f"http://127.0.0.1:8000{mount}/{{session_id}}/run" in readme


@pytest.mark.full
@pytest.mark.timeout(240)
async def test_two_processes_and_a_lost_connection(migrated: str) -> None:
    """A page of one process sees what another answers; recalls, too, whichever of them the worker
    calls, of which the first schedules the second. Where PostgreSQL ends all connections, the pages
    go on by themselves."""
    id = str(uuid4())
    async with chat(migrated) as one, chat(migrated) as two, worker(two, migrated):
        async with opened(one, id) as page:
            await say(two, id, "hello")
            assert await said(page, "agent") == "I have read: hello"
            await say(one, id, "remind me in 1 second to remind me in 1 second to stretch")
            assert (
                await said(page, "system") == "[Scheduled recall] remind me in 1 second to stretch"
            )
            assert await said(page, "system") == "[Scheduled recall] stretch"
            assert await said(page, "agent") == "It is time: stretch"
        await end_connections(migrated)
        async with opened(one, id) as page, asyncio.timeout(PATIENCE):
            while (await say(two, id, "still there?")).status_code == 503:
                pass
            while await said(page, "agent") != "I have read: still there?":
                pass


async def end_connections(dsn: str) -> None:
    """As a restart of PostgreSQL does."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        await conn.execute(
            b"select pg_terminate_backend(pid) from pg_stat_activity "
            b"where datname = current_database() and pid <> pg_backend_pid()"
        )


class ModelServer:
    """Answers as a language model's server does that streams chat completions: a tool's call for a
    wish, else a sentence about the last message. `heard` is what it was asked."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        self.heard.append(asked)
        last = asked["messages"][-1]
        if wish := re.fullmatch(r"remind me in (.+) to (.+)", str(last["content"])):
            arguments = json.dumps({"message": wish[2], "after": wish[1]})
            function = {"name": "schedule_recall", "arguments": arguments}
            call = {"index": 0, "id": "call-1", "type": "function", "function": function}
            deltas: list[dict[str, Any]] = [{"role": "assistant", "tool_calls": [call]}]
        else:
            deltas = [
                {"content": piece} for piece in ("The model ", "has ", "heard ", last["role"])
            ]
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        about = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        for delta in (*deltas, None):
            reason = None if delta else "tool_calls" if "tool_calls" in deltas[0] else "stop"
            choice = {"index": 0, "delta": delta or {}, "finish_reason": reason}
            await answer.write(f"data: {json.dumps({**about, 'choices': [choice]})}\n\n".encode())
        await answer.write(b"data: [DONE]\n\n")
        return answer


@pytest.mark.full
@pytest.mark.timeout(600)
async def test_a_model_s_server(migrated: str, tmp_path: Path) -> None:
    """With CHAT_MODEL the agent is a language model, here a server of OpenAI's protocol: it is
    given the tools and the messages so far, its call of a tool schedules, and it answers the
    recall. The packages are those of requirements.txt."""
    install = (sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    into = ("--target", tmp_path / "packages", "--no-compile")
    await executed(*install, *into, "-r", EXAMPLE / "requirements.txt")
    server, id = ModelServer(), str(uuid4())
    application = web.Application()
    application.router.add_post("/v1/chat/completions", server.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    model = {
        "PYTHONPATH": str(tmp_path / "packages"),
        "CHAT_MODEL": "openai-chat:m",
        "OPENAI_API_KEY": "k",
        "OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1",
    }
    try:
        async with (
            chat(migrated, environ=model) as base,
            worker(base, migrated),
            opened(base, id) as page,
        ):
            await say(base, id, "remind me in 1 second to stretch")
            assert await said(page, "agent") == "The model has heard tool"
            assert "stretch" in await said(page, "system")
            assert await said(page, "agent") == "The model has heard user"
    finally:
        await runner.cleanup()
    first, second, third = server.heard
    assert "schedule_recall" in {tool["function"]["name"] for tool in first["tools"]}
    assert second["messages"][-1]["content"].startswith("Scheduled: due ")
    contents = [(message["role"], message["content"]) for message in third["messages"]]
    assert contents == [
        ("user", "remind me in 1 second to stretch"),
        ("assistant", "The model has heard tool"),
        ("user", "stretch"),
    ]


async def executed(*command: object) -> None:
    process = await asyncio.create_subprocess_exec(*map(str, command))
    assert await process.wait() == 0, command


# --- in Chromium ----------------------------------------------------------------------------------


class Person(Someone):
    """Somebody in a chat."""

    async def says(self, text: str) -> None:
        await self.page.get_by_label("Your message").fill(text)
        await self.page.get_by_role("button", name="Send").click()

    async def sees(self, role: str, text: str | re.Pattern[str], times: int = 1) -> None:
        """Wait until so many stored messages with this text stand there."""
        found = self.page.locator(f"article.{role}:not(.waiting, .open) p").filter(has_text=text)
        await expect(found).to_have_count(times)

    async def reads(self) -> list[str]:
        """All messages, as `role text`."""
        script = "all => all.map(one => `${one.className} ${one.lastChild.textContent}`)"
        return list(await self.page.locator("article").evaluate_all(script))

    async def pictures(self, name: str) -> None:
        if PICTURES:
            await self.page.screenshot(path=f"{PICTURES}/{name}.png")


@asynccontextmanager
async def person(
    browser: Browser, address: str, width: int = 1000, **more: Any
) -> AsyncIterator[Person]:
    """A person at a page of their own, in a window of this width."""
    async with at_a_page(browser, address, Person, width, **more) as someone:
        yield someone


@chromium
@pytest.mark.full
@pytest.mark.timeout(300)
async def test_a_recall_arrives_in_the_open_chat(
    browser: Browser, base: str, migrated: str
) -> None:
    """A person asks for a reminder, sees the answer, and then the recall and what the agent says to
    it, without touching the page; so does somebody at a second page, with a narrow window. After a
    reload all of it is there, in the same order. It fired once."""
    async with worker(base, migrated), person(browser, base) as ann:
        await ann.pictures("empty")
        async with person(browser, ann.page.url, width=380, color_scheme="dark") as bob:
            await ann.page.evaluate("window.before = true")
            await ann.says("remind me in 2 seconds to stretch")
            await ann.sees("user", "remind me in 2 seconds to stretch")
            await ann.sees("agent", "due")
            for someone in (ann, bob):
                await someone.sees("system", re.compile("^stretch$"))
                await someone.sees("agent", "It is time: stretch")
                await expect(someone.state).to_be_empty()
            assert await ann.page.evaluate("window.before"), "it was loaded again"
            shown = await ann.reads()
            roles = [line.split()[0] for line in shown]
            assert roles == ["user", "agent", "system", "agent"] and await bob.reads() == shown
            await ann.says("what is planned?")
            await ann.sees("agent", "No recalls.")
            await ann.pictures("recall")
            await bob.pictures("recall-narrow")
            await ann.page.reload()
            await ann.sees("agent", "It is time: stretch")
            assert (await ann.reads())[:4] == shown
            # Nothing is cut off at the sides.
            wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
            assert not await bob.page.evaluate(wide)
    async with await psycopg.AsyncConnection.connect(migrated) as conn:
        rows = await conn.execute(b"select status, last_outcome from session_recalls")
        assert await rows.fetchall() == [("fired", "answered")]


@chromium
@pytest.mark.full
@pytest.mark.timeout(300)
async def test_hostile_text_is_shown_as_text(browser: Browser, base: str, migrated: str) -> None:
    """Markup in a message, an answer and a recall is text; nothing is run, and the policy would
    not let it."""
    evil = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
    async with worker(base, migrated), person(browser, base) as ann:
        title = await ann.page.title()
        await ann.says(f"remind me in 1 second to {evil} \u202e\u001b[31m")
        await ann.sees("user", evil)
        await ann.sees("system", evil)
        await ann.sees("agent", f"It is time: {evil}")
        assert await ann.page.locator("main img, main script").count() == 0
        assert await ann.page.title() == title
        # Not by the page's own script either: what is inline is refused.
        await ann.page.evaluate(
            """text => { const trap = document.createElement("div"); trap.innerHTML = text;
                         document.body.append(trap); }""",
            "<img src='data:,' onerror=\"document.title='taken'\">",
        )
        await expect(ann.page.locator("body > div img")).to_have_count(1)
        assert await ann.page.title() == title
        assert [t for t in ann.troubles if "olicy" not in t] == []
        ann.troubles.clear()


@chromium
@pytest.mark.full
@pytest.mark.timeout(300)
async def test_one_at_a_time(browser: Browser, base: str, migrated: str) -> None:
    """While the agent answers, every page says so. Who speaks meanwhile sees the message wait; a
    recall that falls due waits too. Afterwards all have been answered, each whole before the
    next."""
    async with (
        worker(base, migrated) as daemon,
        person(browser, base) as ann,
        person(browser, ann.page.url) as bob,
    ):
        await ann.says("think for 8 seconds")
        for someone in (ann, bob):
            await someone.sees("user", "think for 8 seconds")
            await expect(someone.state).to_have_text("The agent is answering…")
        async with await psycopg.AsyncConnection.connect(migrated) as conn:
            await Recalls().schedule(ann.page.url.rpartition("/")[2], "stretch", conn=conn)
        await bob.says("and me?")
        await expect(bob.state).to_contain_text("Your message waits")
        assert (await bob.reads())[-1] == "user waiting and me?"
        await bob.pictures("busy")
        await daemon.hears("recall.settled", outcome="busy", within=PATIENCE)
        for someone in (ann, bob):
            await someone.sees("agent", "I have read: and me?")
            await someone.sees("agent", "It is time: stretch")
        shown = await bob.reads()
        assert shown == await ann.reads()
        for asked, answered in {
            "user think for 8 seconds": "agent I have thought for 8 seconds.",
            "user and me?": "agent I have read: and me?",
            "system stretch": "agent It is time: stretch",
        }.items():
            assert shown[shown.index(asked) + 1] == answered


@chromium
@pytest.mark.full
@pytest.mark.timeout(300)
async def test_the_chat_goes_away_and_comes_back(browser: Browser, migrated: str) -> None:
    """Where PostgreSQL ends all connections, the page goes on. Where the chat is away, it says that
    the connection is lost, keeps what was typed, and goes on by itself when the chat is back."""
    async with AsyncExitStack() as stack:
        port = free_port()
        base = await stack.enter_async_context(chat(migrated, port))
        async with person(browser, base) as ann:
            await ann.says("hello")
            await ann.sees("agent", "I have read: hello")
            await end_connections(migrated)
            await ann.says("hello again")
            await ann.sees("agent", "I have read: hello again")
            shown = await ann.reads()
            await stack.aclose()
            await expect(ann.state).to_contain_text("The connection is lost")
            await ann.says("are you there?")
            await expect(ann.state).to_contain_text("not sent")
            await expect(ann.page.get_by_label("Your message")).to_have_value("are you there?")
            assert await ann.reads() == shown
            await ann.pictures("lost")
            async with chat(migrated, port):
                await expect(ann.state).to_be_empty()
                await ann.page.get_by_role("button", name="Send").click()
                await ann.sees("agent", "I have read: are you there?")
                assert len(await ann.reads()) == len(shown) + 2 == 6
            ann.troubles.clear()  # what could not be loaded
