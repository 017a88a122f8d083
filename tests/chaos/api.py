"""A run endpoint on raw sockets, of the audit's own: it honours keys, and it is the one that knows
what was really run.

One request may end in any way of DESIGN's outcome table, and in ways that are none: broken off,
garbage, huge, slow. Whatever is answered, a run happens at most once for a key, and in a session
one after the other, as the contract asks of an API.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, Self
from urllib.parse import unquote

LONG = 0.04
"""The part of runs that take seconds."""
DEFINITE = ("ok", "huge", "dribbled", "refused", "gone")
"""Endings after which nobody may ask again under the key, if they arrived."""


@dataclass(slots=True, eq=False)
class Call:
    """One POST, as it arrived. Instants are seconds of the epoch, by this host's clock (which is
    PostgreSQL's)."""

    at: float
    worker: str
    """The replica's slot, from the path."""
    key: str
    session: str
    body: bytes
    attempt: int
    how: str = "open"
    """How it was answered; `open` where it was not, or not yet."""
    ended: float | None = None
    """When the answer was written, or the connection found closed."""
    hung_up: bool = False
    """Whether the caller had gone before the answer was written."""
    message: str = ""
    """What the agent was told."""

    @property
    def recall(self) -> str:
        return self.key.rpartition(":")[0]

    @property
    def number(self) -> tuple[int, int]:
        """Occurrence and rekey; of an extra run, the occurrence that waits and 0."""
        occurrence, _, rekey = self.key.rpartition(":")[2].partition(".")
        return int(occurrence), 0 if rekey.startswith("f") else int(rekey or 0)

    @property
    def is_extra(self) -> bool:
        """Whether it is an extra run's, which is no occurrence: `fire`."""
        return self.key.rpartition(":")[2].partition(".")[2].startswith("f")

    @property
    def scheduled_for(self) -> str:
        return str(json.loads(self.body)["recall"]["scheduled_for"])


@dataclass(slots=True, eq=False)
class Run:
    key: str
    session: str
    body: bytes
    result: str
    """ok or failed"""
    began: float
    done: asyncio.Event = field(default_factory=asyncio.Event)
    ended: float | None = None


class Agent(Protocol):
    """What an agent does itself, through its application."""

    async def inside(self, recall: str, session: str, *, long: bool) -> None:
        """In the middle of a run that ends well; `long` where seconds of it are left."""

    async def leaving(self, recall: str) -> None:
        """As the last thing in a run, right before its answer."""


class Api:
    """`calls` are all POSTs in the order of their arrival; `runs` what was run, by key."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(f"api {seed}")
        self.agent: Agent | None = None
        self.calls: list[Call] = []
        self.runs: dict[str, Run] = {}
        self.polls = 0
        self.deleted: dict[str, float] = {}
        """When a run that had been accepted was asked to end, by key."""
        self.outcomes: dict[str, int] = defaultdict(int)
        self.mood: str | None = None
        """An answer for every call, while the whole API is in trouble."""
        self.held: asyncio.Event | None = None
        """While the API hangs: calls are kept open without a run, and answered 503 when this is
        set."""
        self.port = 0
        self._server: asyncio.Server | None = None
        self._busy: dict[str, Run] = {}
        self._open: set[Call] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", 0, limit=1 << 22, backlog=512
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def open(self, worker: str | None = None) -> int:
        """How many requests are open; those of one worker, where one is named."""
        return sum(worker in (None, call.worker) for call in self._open)

    # --- the wire ---------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(
            ConnectionError,
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
            asyncio.CancelledError,
        ):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                line, *fields = head.rstrip("\r\n").split("\r\n")
                headers = {
                    name.lower(): value.strip()
                    for name, _, value in (f.partition(":") for f in fields)
                }
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                method, path, _ = line.split(" ", 2)
                if method == "POST":
                    keep = await self._post(path, headers, body, reader, writer)
                else:
                    if method == "DELETE":
                        self.deleted.setdefault(unquote(path.rpartition("/runs/")[2]), time.time())
                    keep = await self._poll(path, writer)
                if not keep:
                    break
        writer.close()

    async def _post(
        self,
        path: str,
        headers: dict[str, str],
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        found = re.fullmatch(r"/(w\d+)/sessions/([^/]+)/run", path)
        assert found is not None, path
        call = Call(
            time.time(),
            found[1],
            unquote(headers["idempotency-key"]),
            unquote(found[2]),
            body,
            int(headers["recall-attempt"]),
            message=str(json.loads(body)["user_message"]),
        )
        self.calls.append(call)
        self._open.add(call)
        answering = asyncio.create_task(self._answer(call))
        gone = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                # Nobody sends two requests at once on a connection: it was closed. The run goes on
                # without a listener.
                call.ended, call.hung_up = time.time(), True
                return False
            how, data, keep = answering.result()
            call.how = how
            self.outcomes[how] += 1
            if how == "dribbled":
                for start in range(0, len(data), 40):
                    await asyncio.sleep(0.01)
                    writer.write(data[start : start + 40])
                    await writer.drain()
            else:
                writer.write(data)
                with suppress(ConnectionError):
                    await writer.drain()
            if how == "reset":
                writer.transport.abort()
            call.ended = time.time()
            if gone.done() or not keep:
                return False
            gone.cancel()
            with suppress(asyncio.CancelledError):
                await gone
            return True
        finally:
            if call.ended is None:
                call.ended, call.hung_up = time.time(), True
            self._open.discard(call)
            gone.cancel()
            answering.cancel()

    async def _poll(self, path: str, writer: asyncio.StreamWriter) -> bool:
        self.polls += 1
        run = self.runs.get(unquote(path.rpartition("/runs/")[2]))
        if run is None:
            writer.write(_http(404, {"code": "no_such_run"}))
        elif run.ended is None:
            writer.write(_http(200, {"run_id": run.key, "status": "running"}))
        else:
            writer.write(
                _http(
                    200,
                    {"run_id": run.key, "status": "completed" if run.result == "ok" else "failed"},
                )
            )
        await writer.drain()
        return True

    # --- what it does -----------------------------------------------------------------------------

    async def _answer(self, call: Call) -> tuple[str, bytes, bool]:
        """How the call ends: a word for the record, the bytes, and whether the connection stays."""
        if self.held is not None:
            await self.held.wait()
            return "unavailable", _http(503, {"error": "down"}, retry_after=1), True
        if self.mood == "down":
            return "unavailable", _http(503, {"error": "down"}, retry_after=1), True
        if self.mood == "misconfigured":
            return "misconfigured", _http(401, {"error": "who are you?"}), True
        run = self.runs.get(call.key)
        if run is None:
            shown = self._before(call)
            if shown is not None:
                return shown
            if call.session in self._busy:
                return "busy", _http(409, {"code": "session_busy"}, retry_after=1), True
            run = self._begin(call)
        after = self._dice.random()
        if after < 0.03:
            return (
                "accepted",
                _http(202, {"run_id": call.key, "status": "running"}, location=f"/runs/{call.key}"),
                True,
            )
        if after < 0.05:
            await asyncio.sleep(self._dice.random() * 0.2)
            return "reset", b"", False  # The run goes on.
        await run.done.wait()
        if run.result == "failed":
            return "failed", _http(200, {"status": "failed", "error": "the agent broke"}), True
        if after < 0.08:
            return "unknown", _http(self._dice.choice((500, 502, 504)), {"error": "lost"}), True
        if after < 0.10:
            return "broken off", _http(200, {"status": "completed", "text": "x" * 500})[:90], False
        if after < 0.11:
            return "garbage", b"\x00\x16\x03 this is no HTTP\r\n\r\n", False
        if after < 0.12:
            return "huge", _http(200, {"status": "completed", "text": "x" * 1_500_000}), True
        if after < 0.13:
            return "dribbled", _http(200, {"status": "completed", "text": "x" * 900}), True
        return "ok", _http(200, {"status": "completed"}), True

    def _before(self, call: Call) -> tuple[str, bytes, bool] | None:
        """Answers with which no run begins."""
        dice = self._dice.random()
        if dice < 0.020:
            return (
                "busy",
                _http(self._dice.choice((409, 423)), {"code": "session_busy"}, retry_after=1),
                True,
            )
        if dice < 0.030:
            return (
                "unavailable",
                _http(self._dice.choice((408, 425, 429, 503)), {"error": "later"}, retry_after=1),
                True,
            )
        if dice < 0.040:
            return "unknown", _http(self._dice.choice((500, 502, 504)), {"error": "?"}), True
        if dice < 0.043:
            return "refused", _http(422, {"error": "not like this"}), True
        if dice < 0.046:
            return "gone", _http(404, {"code": "session_not_found"}), True
        if dice < 0.048:
            return (
                "misconfigured",
                _http(self._dice.choice((404, 405, 301)), {"error": "nothing here"}),
                True,
            )
        return None

    def _begin(self, call: Call) -> Run:
        result = "failed" if self._dice.random() < 0.02 else "ok"
        run = Run(call.key, call.session, call.body, result, time.time())
        self.runs[call.key] = self._busy[call.session] = run
        long = self._dice.random()
        seconds = self._dice.uniform(3, 9) if long < LONG else self._dice.uniform(0.02, 0.6)
        task = asyncio.create_task(self._run(run, seconds, long=long < LONG))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return run

    async def _run(self, run: Run, seconds: float, *, long: bool) -> None:
        assert self.agent is not None
        recall = run.key.rpartition(":")[0]
        try:
            before = seconds / (4 if long else 2)
            await asyncio.sleep(before)
            if run.result == "ok":
                await self.agent.inside(recall, run.session, long=long)
            await asyncio.sleep(seconds - before)
            await self.agent.leaving(recall)
        finally:
            run.ended = time.time()
            del self._busy[run.session]
            run.done.set()


def _http(
    status: int,
    document: dict[str, Any],
    *,
    retry_after: int | None = None,
    location: str | None = None,
) -> bytes:
    content = json.dumps(document).encode()
    lines = [
        f"HTTP/1.1 {status} Status",
        "content-type: application/json",
        f"content-length: {len(content)}",
    ]
    if retry_after is not None:
        lines.append(f"retry-after: {retry_after}")
    if location is not None:
        lines.append(f"location: {location}")
    return "\r\n".join([*lines, "", ""]).encode() + content
