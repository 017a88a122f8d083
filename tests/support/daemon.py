"""recall-worker as a process: started with settings, listened to by its log, sent real signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from jsonschema import Draft202012Validator

from recall_worker.events import json_schema

Event = dict[str, Any]
FAKETIME = next((str(p) for p in Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
"""What to preload, so that a process takes its clock from a file of ours; None: not installed. Its
command is not asked for that: it leaves shared memory behind, by its process's number."""
DESCRIBED = {name: Draft202012Validator(schema) for name, schema in json_schema()["$defs"].items()}


def check_events(events: Sequence[Event]) -> None:
    """Raise AssertionError where a line is not as `schema events` says: one line of each kind, as
    there are thousands. A line of another program's logger is none of ours."""
    kinds = {
        (event["event"], *sorted((name, type(value).__name__) for name, value in event.items())): (
            event
        )
        for event in events
        if "event" in event and "logger" not in event
    }
    for event in kinds.values():
        errors = [error.message for error in DESCRIBED[event["event"]].iter_errors(event)]
        assert not errors, (event, errors)


class Daemon:
    """One `recall-worker run`. `events` are its log lines so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.events: list[Event] = []
        self.talk: list[str] = []
        """Lines on stderr that are no events."""
        self._changed = asyncio.Condition()
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def start(
        cls,
        environ: Mapping[str, str],
        *options: str,
        before: Sequence[str] = (),
        command: str = "run",
    ) -> Self:
        """`before`: words of a command that becomes the daemon, such as `ip netns exec NAME`.
        `command`: what runs, if not the worker."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RECALL_")}
        process = await asyncio.create_subprocess_exec(
            *before,
            sys.executable,
            "-m",
            "recall_worker",
            command,
            *options,
            env=kept | {"RECALL_LOG_FORMAT": "json", "RECALL_LOG_LEVEL": "debug"} | dict(environ),
            stderr=asyncio.subprocess.PIPE,
            stdin=asyncio.subprocess.DEVNULL,
            limit=1 << 22,
        )
        return cls(process)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def name(self) -> str:
        return str(self.events[0]["worker"])

    def told(self, event: str, **facts: Any) -> list[Event]:
        """The events of this name so far that carry these facts."""
        return [
            e
            for e in self.events
            if e.get("event") == event and all(e.get(k) == v for k, v in facts.items())
        ]

    async def hears(
        self, event: str, times: int = 1, within: float = 20.0, **facts: Any
    ) -> list[Event]:
        """Wait until the daemon has told an event (so many times). Raises TimeoutError with its
        log."""
        await self.until(
            lambda: len(self.told(event, **facts)) >= times, within, f"{event} {facts}"
        )
        return self.told(event, **facts)

    async def until(
        self, condition: Callable[[], object], within: float = 20.0, what: str = ""
    ) -> None:
        try:
            async with asyncio.timeout(within), self._changed:
                await self._changed.wait_for(condition)
        except TimeoutError:
            raise TimeoutError(
                f"not within {within} s: {what}\n"
                + "\n".join([*map(str, self.events[-30:]), *self.talk])
            ) from None

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def exit(self, within: float = 20.0) -> int:
        """Wait for the process to end; returns its exit status."""
        async with asyncio.timeout(within):
            status = await self.process.wait()
        await self._listening
        return status

    async def stop(self, within: float = 20.0) -> int:
        """SIGTERM, and wait."""
        self.signal(signal.SIGTERM)
        return await self.exit(within)

    async def kill(self) -> None:
        """SIGKILL, and wait: what this process knew is lost."""
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        await self._listening

    async def _listen(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            async with self._changed:
                try:
                    event = json.loads(line)
                    (self.events if isinstance(event, dict) else self.talk).append(event)
                except ValueError:
                    self.talk.append(line.decode(errors="replace").rstrip())
                self._changed.notify_all()


class Daemons:
    """Starts daemons with common settings; kills what is left at the end."""

    def __init__(self, environ: Mapping[str, str], before: Sequence[str] = ()) -> None:
        self.environ = dict(environ)
        self._before = before
        self._all: list[Daemon] = []

    @property
    def started(self) -> list[Daemon]:
        """All that were started, in order."""
        return list(self._all)

    async def start(self, *options: str, ready: bool = True, **settings: Any) -> Daemon:
        """`settings`: `lease=3` becomes RECALL_LEASE=3. Waits until the daemon listens, unless told
        not to."""
        more = {"RECALL_" + name.upper(): str(value) for name, value in settings.items()}
        daemon = await Daemon.start(self.environ | more, *options, before=self._before)
        self._all.append(daemon)
        if ready:
            await daemon.hears("listener.listening")
        return daemon

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for daemon in self._all:
            await daemon.kill()
        for daemon in self._all:
            check_events(daemon.events)
