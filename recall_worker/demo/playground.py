"""What the demo runs on: a screen of plain lines, the application's connection, the agent's API,
and the daemon's process.

Owns their start and end: nothing is left behind, however the demo ends. The daemon is started as a
user would start it, with settings of its own and none of the caller's RECALL_*; its log goes to a
file and is read as it arrives.

Never here: what is shown (demo), or whether the expectations were met (expectations).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import psycopg
from psycopg.rows import dict_row

from ..contract.reference_api import Agent, ReferenceAPI
from ..events import escape_controls
from ..terminal import Trouble

WIDTH = 80
PATIENCE = 10.0
"""Seconds that one event is waited for; then the demo goes on, and a promise is broken."""
RETRY_AFTER = 1
"""Seconds of the API's Retry-After for a busy session."""
BOLD, DIM, RED, GREEN, YELLOW = 1, 2, 31, 32, 33

_OURS = ("RECALL_", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_")
# A shell that waits for the end of a pipe: it kills the daemon when we end, however we end.
_GUARD = 'read -r _; kill -KILL "$1"'

Event = dict[str, Any]


class Screen:
    """Plain lines with a clock, 80 columns; coloured on a terminal."""

    def __init__(self, colours: Mapping[str, int]) -> None:
        """`colours`: the sessions', as terminals number them."""
        self._began = time.monotonic()
        self._colours = colours
        self._coloured = (
            sys.stdout.isatty()
            and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") != "dumb"
        )

    @property
    def clock(self) -> float:
        """Seconds since the demo began."""
        return time.monotonic() - self._began

    def paint(self, text: str, *codes: int) -> str:
        return (
            f"\033[{';'.join(map(str, codes))}m{text}\033[0m" if self._coloured and codes else text
        )

    def print(self, text: str = "", *codes: int) -> None:
        print(self.paint(text, *codes), flush=True)

    def heading(self, text: str) -> None:
        self.print()
        self.print(text, BOLD)

    def name(self, session: str) -> str:
        return self.paint(f"{session:8}", self._colours.get(session, DIM))

    def say(self, session: str, text: str, *codes: int) -> None:
        """Print what happens now in a session."""
        clock = f"+{self.clock:.3f} s".rjust(10)
        lines = textwrap.wrap(escape_controls(text), WIDTH - 20)
        for line in lines:
            print(self.paint(clock, DIM), self.name(session), self.paint(line, *codes), flush=True)
            clock, session = " " * len(clock), ""


class Playground:
    """An async context in which everything runs; `dsn` must be migrated before the daemon is
    started.
    """

    def __init__(
        self, screen: Screen, dsn: str, log: Path, agent: Agent, show: Callable[[Event], None]
    ) -> None:
        """`log`: the file for the daemon's log. `show(event)` is called for each line as it
        arrives.
        """
        self.screen = screen
        self.told: list[Event] = []
        """The daemon's log so far."""
        self.daemon_status: int | None = None
        self._dsn, self._log, self._show = dsn, log, show
        token = secrets.token_urlsafe()
        self.api = ReferenceAPI(
            agent, token=token, retry_after=RETRY_AFTER, watch=lambda _: self.stir()
        )
        self._environ = {k: v for k, v in os.environ.items() if not k.startswith(_OURS)}
        self._environ |= {
            "RECALL_DSN": dsn,
            "RECALL_RUN_TOKEN": token,
            "RECALL_LOG_FORMAT": "json",
            "PYTHONUNBUFFERED": "1",
        }
        self._news = asyncio.Event()
        self._ended = False
        self._daemon: asyncio.subprocess.Process | None = None
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            self.db = await psycopg.AsyncConnection.connect(
                self._dsn, autocommit=True, row_factory=dict_row
            )
            stack.push_async_callback(self.db.close)
            url = await self.api.start()
            stack.push_async_callback(self.api.stop)
            self._environ["RECALL_RUN_URL"] = url
            self.screen.say("setup", f"the agent's API listens on {url.partition('/sessions')[0]}")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    # --- waiting ----------------------------------------------------------------------------------

    def stir(self) -> None:
        """Something has happened: `until` checks its condition again."""
        self._news.set()

    async def until(self, condition: Callable[[], object], what: str) -> bool:
        """Wait for a condition on what the API and the daemon reported; False if it is not met in
        time. Raises Trouble if the daemon has ended.
        """
        try:
            async with asyncio.timeout(PATIENCE):
                while not condition():
                    if self._ended:
                        raise Trouble(
                            "the daemon ended unexpectedly",
                            "recall-worker demo --keep, and read daemon.log",
                        )
                    self._news.clear()
                    await self._news.wait()
            return True
        except TimeoutError:
            self.screen.say("", f"waited {PATIENCE:g} s in vain for {what}", RED)
            return False

    def events(
        self, name: str, session: str | None = None, outcome: str | None = None
    ) -> list[Event]:
        """The daemon's events of this name, of this session, with this outcome."""
        wanted = {"event": name, "session": session, "outcome": outcome}
        return [
            event
            for event in self.told
            if all(value is None or event.get(key) == value for key, value in wanted.items())
        ]

    # --- commands ---------------------------------------------------------------------------------

    def show_command(self, session: str, *words: str) -> None:
        quoted = (f'"{word}"' if " " in word else word for word in words)
        self.screen.say(session, " ".join(("$ recall-worker", *quoted)), BOLD)

    async def command(self, session: str, *words: str) -> datetime | None:
        """Run a command as a process; returns the instant at which it had done its work, or None if
        it failed.
        """
        self.show_command(session, *words)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "recall_worker",
            *words,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            await process.stdout.readline()
            done_at = datetime.now(UTC)
            _, talk = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode == 0:
            return done_at
        self.screen.say(session, " ".join(talk.decode(errors="replace").split()), RED)
        return None

    # --- the daemon -------------------------------------------------------------------------------

    async def start_daemon(self) -> None:
        self.show_command("setup", "run")
        await self._stack.enter_async_context(self._running_daemon())
        if (
            await self.until(lambda: self.events("listener.listening"), "the daemon")
            and self._daemon is not None
        ):
            self.screen.say(
                "setup", f"the daemon is up: process {self._daemon.pid}, idle until a recall is due"
            )

    async def stop_daemon(self) -> None:
        """SIGTERM, and wait."""
        assert self._daemon is not None
        self._daemon.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(PATIENCE):
                self.daemon_status = await self._daemon.wait()
        except TimeoutError:
            pass

    @contextlib.asynccontextmanager
    async def _running_daemon(self) -> AsyncIterator[None]:
        self._daemon = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "recall_worker",
            "run",
            env=self._environ,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        guard = subprocess.Popen(  # noqa: ASYNC220, S603 -- a shell starts at once
            ["/bin/sh", "-c", _GUARD, "recall-worker-guard", str(process.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        reading = asyncio.create_task(self._read(process))
        try:
            yield
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            guard.kill()
            guard.communicate()
            await reading

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        with self._log.open("ab", buffering=0) as log:
            async for line in process.stderr:
                log.write(line)
                try:
                    event = json.loads(line)
                    self.told.append(event)
                    self._show(event)
                except ValueError:
                    self.screen.say("daemon", line.decode(errors="replace").strip(), RED)
                self.stir()
        self._ended = True
        self.stir()
