"""`recall-worker console` as a process: how it starts, what it refuses, how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from aiohttp import ClientSession

from ..support.daemon import check_events
from ..support.postgres import free_port
from ..test_cli import process

PATIENCE = 60.0


@asynccontextmanager
async def running(**environ: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, list[Any]]]:
    """A console that listens, and its log so far."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RECALL_")}
    given = {f"RECALL_{name}": value for name, value in environ.items()}
    console = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "recall_worker", "console"),
        env=kept | {"RECALL_LOG_FORMAT": "json"} | given,
        stderr=asyncio.subprocess.PIPE,
        stdin=asyncio.subprocess.DEVNULL,
    )
    events: list[Any] = []
    assert console.stderr is not None
    try:
        async with asyncio.timeout(PATIENCE):
            while not events or events[-1]["event"] != "console.listening":
                line = await console.stderr.readline()
                assert line, events
                events.append(json.loads(line))
        yield console, events
        async with asyncio.timeout(PATIENCE):
            rest = await console.stderr.read()
        events += [json.loads(line) for line in rest.splitlines()]
        check_events(events)
    finally:
        if console.returncode is None:
            console.kill()
        await console.wait()


@pytest.mark.slow
async def test_it_serves_and_ends_while_pages_are_open(database: str) -> None:
    """SIGTERM ends open streams, and the process ends well; its log is as its schema says."""
    port = free_port()
    async with running(DSN=database, CONSOLE_LISTEN=str(port)) as (console, events):
        async with ClientSession() as session:
            root = f"http://localhost:{port}"
            async with session.get(f"{root}/recalls") as response:
                assert response.status == 200 and "<h1>Recalls</h1>" in await response.text()
            async with session.get(f"{root}/live?part=now") as page:
                assert (await page.content.readline()) == b"event: page\n"
                console.send_signal(signal.SIGTERM)
                async with asyncio.timeout(PATIENCE):
                    assert await page.content.read()
                    assert await console.wait() == 0
    assert [event["event"] for event in events] == ["console.listening", "console.stopped"]


@pytest.mark.slow
async def test_a_hangup_reads_its_secrets_again(database: str, tmp_path: Path) -> None:
    """And never ends it: a login by the old token has ended then, and the new one opens it."""
    port, file = free_port(), tmp_path / "token"
    file.write_text("the-first-of-16-and-more\n")
    given = {"CONSOLE_LISTEN": f"127.0.0.1:{port}", "CONSOLE_TOKEN_FILE": str(file)}
    async with running(DSN=database, **given) as (console, events):
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            console.send_signal(number)
        file.write_text("the-second-of-16-and-more\n")
        console.send_signal(signal.SIGHUP)
        assert console.stderr is not None
        async with asyncio.timeout(PATIENCE):
            while events[-1]["event"] != "secrets.read":
                events.append(json.loads(await console.stderr.readline()))
        async with ClientSession() as session:
            for token, status in (("the-first-of-16-and-more", 401), (file.read_text(), 200)):
                headers = {"Authorization": f"Bearer {token.strip()}"}
                async with session.get(f"http://127.0.0.1:{port}/", headers=headers) as response:
                    assert response.status == status
        console.send_signal(signal.SIGTERM)
        assert await console.wait() == 0
    assert [event["event"] for event in events] == [
        *("console.listening", "secret.changed", "secrets.read", "console.refused"),
        "console.stopped",
    ]


@pytest.mark.slow
async def test_it_ends_while_postgresql_is_silent(database: str) -> None:
    """Within its patience: what it had asked is cut off."""
    port = free_port()
    async with running(DSN=database, CONSOLE_LISTEN=str(port)) as (console, events):
        async with ClientSession() as session:
            root = f"http://localhost:{port}"
            async with session.get(f"{root}/recalls") as response:
                assert response.status == 200
            with psycopg.connect(database, autocommit=True) as conn:
                [pid] = [
                    pid
                    for (pid,) in conn.execute(
                        "select pid from pg_stat_activity where datname = current_database() "
                        "and application_name = 'recall-worker console'"
                    )
                ]
            os.kill(pid, signal.SIGSTOP)
            try:
                asked = asyncio.create_task(session.get(f"{root}/recalls"))
                async with session.get(f"{root}/healthz") as response:
                    assert response.status == 200 and not asked.done()
                console.send_signal(signal.SIGTERM)
                async with asyncio.timeout(PATIENCE):
                    assert await console.wait() == 0
                await asyncio.gather(asked, return_exceptions=True)
            finally:
                os.kill(pid, signal.SIGCONT)
    assert events[-1]["event"] == "console.stopped"


@pytest.mark.slow
async def test_actions_are_logged_without_what_is_secret(database: str) -> None:
    port, token = free_port(), "a-secret-of-16-and-more"
    given = {"CONSOLE_LISTEN": f"127.0.0.1:{port}", "CONSOLE_TOKEN": token}
    async with running(DSN=database, **given) as (console, events):
        async with ClientSession() as session:
            root, ours = f"http://127.0.0.1:{port}", {"Sec-Fetch-Site": "same-origin"}
            bearer = ours | {"Authorization": f"Bearer {token}"}
            for headers in (bearer, ours | {"Authorization": f"Bearer {token}x"}):
                async with session.post(
                    f"{root}/queues/pause", data={"queue": "mail"}, headers=headers
                ) as response:
                    assert response.status == (200 if headers == bearer else 401)
        console.send_signal(signal.SIGINT)
        assert await console.wait() == 0
    assert token not in str(events)
    [acted] = [event for event in events if event["event"] == "console.acted"]
    assert (acted["user"], acted["action"], acted["queue"]) == (
        "bearer token",
        "pause_queue",
        "mail",
    )
    assert "console.refused" in [event["event"] for event in events]


@pytest.mark.parametrize(
    ("environ", "what"),
    [
        ({"RECALL_CONSOLE_LISTEN": "0.0.0.0:0"}, "which others may reach"),
        ({"RECALL_CONSOLE_TOKEN": "short"}, "shorter than 16"),
        ({"RECALL_CONSOLE_USER_HEADER": "X-User"}, "without RECALL_CONSOLE_TRUSTED"),
        ({"RECALL_DSN": ""}, "RECALL_DSN is not set"),
    ],
)
def test_it_refuses_to_start(environ: dict[str, str], what: str, database: str) -> None:
    done = process(database, "console", environ={"RECALL_DSN": database} | environ)
    assert done.returncode == 2 and what in done.stderr, done.stderr
    assert "Try: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_address_that_is_taken(database: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = process(database, "console", environ={"RECALL_CONSOLE_LISTEN": str(port)})
    assert done.returncode == 2 and "nothing can listen on 127.0.0.1 port" in done.stderr, (
        done.stderr
    )


@pytest.mark.slow
def test_an_address_that_nobody_has(database: str) -> None:
    """It says why in words, and not by a number of the resolver's."""
    environ = {"RECALL_CONSOLE_LISTEN": "no-such-host.invalid:1", "RECALL_CONSOLE_TOKEN": "x" * 16}
    done = process(database, "console", environ=environ)
    assert done.returncode == 2 and "nothing can listen on no-such-host.invalid" in done.stderr
    assert "Unknown error" not in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_without_its_packages(database: str) -> None:
    """It says what to install."""
    code = (
        "import sys; sys.modules['aiohttp'] = None; sys.argv[1:] = ['console']; "
        "from recall_worker.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"RECALL_DSN": database},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 2 and "recall-worker[console]" in done.stderr, done.stderr
