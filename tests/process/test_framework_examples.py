"""examples/tools and examples/endpoints, as their READMEs say it: real packages of five agent
frameworks, each in an environment of its own, a stand-in for the model, PostgreSQL, a worker."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import time
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from recall_worker import Recalls
from recall_worker.protocols.native import body

from ..conftest import Connection
from ..servers import Server, environment
from ..support.daemon import Daemons
from ..support.postgres import free_port
from ..test_recall import claim_with

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
BLOCK = re.compile(r"^```(sh|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATIENCE = 90.0
"""Seconds for what takes two or three on an idle machine."""


@dataclass(frozen=True)
class Example:
    """A framework's section of a README."""

    requirements: tuple[str, ...]
    """As `pip install` is given them."""
    command: str
    shown: str


def programs(framework: str) -> Path:
    """Where the programs of a framework's environment are. It is made once, with what the endpoint
    needs: that is what the tools need, and a server."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    requirements = ENDPOINTS[framework].requirements
    assert set(TOOLS[framework].requirements) == set(requirements) - {"fastapi", "uvicorn"}
    name = f"example-{re.sub('[^a-z]', '-', framework.lower())}"
    return environment(name, *requirements, *project["dependencies"], "-e", str(ROOT), by_uv=True)


def versions(framework: str) -> str:
    names = [re.split("[<>=]", one)[0] for one in ENDPOINTS[framework].requirements]
    code = "import importlib.metadata as m, sys\nfor n in sys.argv[1:]: print(n, m.version(n))"
    said = subprocess.run(
        [programs(framework) / "python", "-c", code, *names], capture_output=True, text=True
    )
    return f"{framework}: {', '.join(said.stdout.splitlines())}"


def examples(folder: str) -> dict[str, Example]:
    """The sections of a README that install something, by the framework's name."""
    text = (EXAMPLES / folder / "README.md").read_text(encoding="utf-8")
    found = {}
    for section in text.split("\n## ")[1:]:
        blocks = BLOCK.findall(section)
        commands = blocks[0][1].splitlines() if blocks else []
        if commands[:1] == ["cd examples"]:
            _, install, command = commands
            requirements = tuple(shlex.split(install)[2:])
            shown = blocks[1][1] if len(blocks) > 1 else ""
            found[section.partition("\n")[0]] = Example(requirements, command, shown)
    assert len(found) == 5
    return found


TOOLS, ENDPOINTS = examples("tools"), examples("endpoints")


def shape(text: str) -> list[str]:
    """The words of an answer, without ids and times."""
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", text)
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)?", "TIME", text).split()


def environ(dsn: str, **more: str) -> dict[str, str]:
    """Nothing of ours, and no way out: a framework that wants the network finds a closed port."""
    nowhere = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https", "all")}
    return nowhere | {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "RECALL_DSN": dsn} | more


def turn(framework: str, dsn: str) -> str:
    """What `python -m tools.NAME SESSION TEXT` says."""
    python, *arguments = shlex.split(TOOLS[framework].command)
    assert python == "python"
    done = subprocess.run(
        [programs(framework) / "python", *arguments],
        cwd=EXAMPLES,
        env=environ(dsn),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("framework", TOOLS)
async def test_an_agent_schedules_by_a_tool(
    framework: str, database: str, db: Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model calls schedule_recall, the row stands in PostgreSQL, and the tool's answer reaches
    the model; so does a refusal."""
    with capsys.disabled():
        print(f"\n{await asyncio.to_thread(versions, framework)}")
    await db.execute("insert into sessions (id, user_id) values ('one', 'ann')")
    said = await asyncio.to_thread(turn, framework, database)
    assert shape(said) == shape(TOOLS[framework].shown)
    [row] = await (await db.execute("select * from session_recalls")).fetchall()
    assert (row["session_id"], row["additional_context_message"], row["status"]) == (
        "one",
        "look at the build",
        "pending",
    )
    distance = row["trigger_at"] - datetime.now(UTC)
    assert timedelta(hours=2) - timedelta(seconds=PATIENCE) < distance < timedelta(hours=2)
    assert row["id"] in said
    [action] = await (await db.execute("select * from recall_actions")).fetchall()
    assert (action["actor"], action["via"]) == ("agent of one", "python")
    again = await asyncio.to_thread(turn, framework, database)
    assert again.startswith("The tool said: Error: not scheduled") and "\nTry: " in again
    assert row["id"] in again


def test_each_is_short() -> None:
    """At most 40 lines, with the name of a real model beside the stand-in."""
    for example in TOOLS.values():
        module = shlex.split(example.command)[2].removeprefix("tools.")
        text = (EXAMPLES / "tools" / f"{module}.py").read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 40
        assert re.search(r"FakeModel\(\)  # a real one: \S", text)


def chats() -> list[tuple[list[str], list[str]]]:
    """What the README has a person say, a list for each block, and what is answered."""
    text = (EXAMPLES / "endpoints" / "README.md").read_text(encoding="utf-8")
    blocks = BLOCK.findall(text.partition("\n## A person\n")[2])
    said = [
        [
            json.loads(shlex.split(line)[-1])
            for line in block.splitlines()
            if line.startswith("curl ")
        ]
        for kind, block in blocks
        if kind == "sh"
    ]
    shown = [block.splitlines() for kind, block in blocks if kind == "text"]
    return list(zip(said, shown, strict=True))


async def until(db: Connection, statement: str, what: str) -> dict[str, Any]:
    """The first row that a query finds."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        row = await (await db.execute(statement.encode())).fetchone()
        if row is not None:
            return row
        await asyncio.sleep(0.05)
    raise TimeoutError(what)


@pytest.mark.parametrize("framework", ENDPOINTS)
async def test_an_agent_is_called(
    framework: str,
    database: str,
    db: Connection,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The person's chat and two recalls, the second scheduled from inside the first one's run, as
    the README says; then busy while the chat has the session; then a replay, which runs nothing."""
    with capsys.disabled():
        print(f"\n{await asyncio.to_thread(versions, framework)}")
    program, application = shlex.split(ENDPOINTS[framework].command)
    port = str(free_port())
    base = f"http://127.0.0.1:{port}"
    server = Server(
        [programs(framework) / program, application, "--port", port, "--app-dir", str(EXAMPLES)],
        tmp_path,
        environ(database),
        f"{base}/",
        any_answer=True,
    )
    await asyncio.to_thread(server.start)
    await db.execute("insert into sessions (id, user_id) values ('one', 'ann')")
    settings = {"RECALL_DSN": database, "RECALL_RUN_URL": base + "/sessions/{session_id}/run"}
    try:
        async with (
            Daemons(settings) as daemons,
            httpx.AsyncClient(base_url=base, timeout=PATIENCE, trust_env=False) as http,
        ):
            daemon = await daemons.start()

            async def chat(text: str) -> str:
                answer = await http.post("/chat/one", json=text)
                assert answer.status_code == 200, server.log.read_text(errors="replace")
                return answer.text

            first, second = chats()
            assert [shape(await chat(text)) for text in first[0]] == [shape(t) for t in first[1]]
            await daemon.hears("recall.settled", 2, PATIENCE, outcome="answered", status="fired")
            assert [await chat(text) for text in second[0]] == second[1]

            thought = tmp_path / "thought"
            thinking = asyncio.create_task(chat(f"wait for the file {thought}"))
            await until(
                db,
                "select from recall_session_locks where session_id = 'one' and key is null",
                "the chat has the session",
            )
            recall = await Recalls().schedule("one", "look at the build", conn=db)
            await daemon.hears("recall.settled", within=PATIENCE, recall=recall.id, outcome="busy")
            assert not thinking.done(), "the agent was still at work for the person"
            thought.touch()
            assert "message 6" in await thinking
            await daemon.hears("recall.settled", within=PATIENCE, recall=recall.id, status="fired")

            call = await http.post(
                "/sessions/one/run",
                content=body(
                    claim_with(
                        id=recall.id,
                        session_id="one",
                        message="look at the build",
                        call_type="immediate",
                        scheduled_for=recall.trigger_at,
                    )
                ),
                headers={
                    "Idempotency-Key": f"{recall.id}:1",
                    "Content-Type": "application/json",
                },
            )
            assert (call.status_code, call.json()) == (
                200,
                {
                    "status": "completed",
                    "output": "I have read message 7 of this conversation: look at the build",
                },
            )
            assert call.headers["idempotent-replayed"] == "true"
            assert "message 8" in await chat("and now?")
    finally:
        await asyncio.to_thread(server.kill)
