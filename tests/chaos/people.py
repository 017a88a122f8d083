"""Operators and agents at work, beside the application: commands that act on many by filters,
queues that are paused and resumed, people at the console (pages, the live stream, buttons, many at
once), and agents that call the tools of the MCP server with tokens of their sessions.

Each thing that is asked for is an operation of the journal, with its answer as far as one came.
What a page or a tool answers is checked by its form here; whether it is true, at the end. Nobody
does anything while the hand's rate is 0, and then no queue is paused.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self
from urllib.parse import urlencode

import aiohttp
import psycopg

from recall_worker import tokens

from .drawn import Drawn
from .hand import COMMAND_WITHIN, PAUSED_MOST, STOCK_OWNER, Hand
from .journal import Operation
from .stage import TOKEN_KEY, USER_HEADER, Stage

ANSWERED_WITHIN = 30.0
"""Seconds that an answer of the console, or of the MCP server, may take at all."""
JOB_WITHIN = 90.0
"""Seconds that a job of the console may take: each batch waits for a PostgreSQL that is away."""
COMMANDS_EVERY, CLICKS_EVERY, CALLS_EVERY = 6.0, 0.8, 0.5
"""Seconds between two things that one of them does, as a rule."""
QUEUE_PAUSED = (0.5, 4.0)
"""Seconds for which a queue is paused."""
LATELY = "1m"
"""What is acted on in traffic is what something happened to within; the stock is left alone."""
PAGES = (
    "/",
    "/agenda",
    "/recalls",
    "/recalls?state=due",
    "/recalls?state=failed",
    "/recalls?state=in-run",
    "/failures",
    "/queues",
    "/workers",
    "/settings",
)
PARTS = ("now", "queues", "workers")
OF_TRAFFIC: tuple[tuple[str, str, int], ...] = (
    ("cancel", "waiting", 6),
    ("retry", "failed", 12),
    ("retry", "cancelled", 8),
    ("reschedule", "waiting", 15),
    ("fire", "waiting", 15),
    ("pause", "waiting", 15),
)
"""What is done to many: the action, in which state they are, and to how many at most."""
OF_STOCK = ("pause", "resume", "reschedule")
ON_ONE = ("fire", "retry", "skip", "pause", "cancel", "reschedule", "edit", "edit")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the console answered. Instants are seconds of the epoch."""

    what: str
    status: int
    """0: none came."""
    asked: float
    done: float


class People:
    def __init__(self, stage: Stage, hand: Hand, seed: int, drawn: Drawn) -> None:
        self._stage, self._hand, self._drawn = stage, hand, drawn
        self._dice = random.Random(f"people {seed}")
        self._journal = hand.journal
        self.answers: list[Answer] = []
        """Of the console."""
        self.events = 0
        """Live events that came."""
        self._busy = 0
        self._edits = 0
        self._keys = tokens.keys(TOKEN_KEY)
        self._turns: dict[str, asyncio.Lock] = {}
        self._sessions: list[str] = []
        """Sessions of agents."""
        self._links: dict[str, int] = {}
        """How many more links an agent's chain has, by session."""
        hand.schedules_within = self._next_link

    async def __aenter__(self) -> Self:
        # Each request on a connection of its own: what is killed then breaks no other request.
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        timeout = aiohttp.ClientTimeout(total=ANSWERED_WITHIN)
        self._http = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    # --- their life -------------------------------------------------------------------------------

    async def live(self, until: asyncio.Event) -> None:
        """Be at work until told to stop; then no queue is paused."""
        slow = max(1.0, 5.0 / self._drawn.rate)
        await asyncio.gather(
            self._again(until, COMMANDS_EVERY, self._operate),
            self._again(until, CLICKS_EVERY * slow, self._click),
            self._again(until, 3 * COMMANDS_EVERY, self._click_many),
            self._again(until, CALLS_EVERY * slow, self._call),
            self._watch(until),
        )

    async def _again(
        self, until: asyncio.Event, every: float, act: Callable[[], Awaitable[None]]
    ) -> None:
        while not until.is_set():
            if self._hand.rate > 0:
                self._busy += 1
                try:
                    await act()
                finally:
                    self._busy -= 1
            with suppress(TimeoutError):
                async with asyncio.timeout(self._dice.uniform(0.5, 1.5) * every):
                    await until.wait()

    async def rest(self) -> None:
        """Wait until nobody does anything: while the hand's rate is 0 that stays so."""
        while self._busy:  # noqa: ASYNC110 - a count
            await asyncio.sleep(0.05)

    # --- commands ---------------------------------------------------------------------------------

    async def _operate(self) -> None:
        dice = self._dice.random()
        if dice < 0.2:
            await self._pause_queue()
        elif dice < 0.4:
            await self.command_on_stock()
        else:
            await self._command_on_traffic()

    async def _command_on_traffic(self) -> None:
        action, state, most = self._dice.choice(OF_TRAFFIC)
        # What is made due at once must not be a backlog that hides everything else.
        most = min(most, max(2, self._drawn.capacity))
        words = ["--state", state, "--since", LATELY, "--limit", str(self._dice.randint(1, most))]
        if self._drawn.queues > 1 and self._dice.random() < 0.5:
            words += ["--queue", self._dice.choice(self._drawn.names)]
        await self._many(action, words)
        if action == "pause":
            await asyncio.sleep(self._dice.uniform(0.5, PAUSED_MOST))
            await self._many("resume", ["--state", "paused", "--since", LATELY])

    async def command_on_stock(self) -> None:
        """Act on all that only wait: several batches."""
        await self._many(self._dice.choice(OF_STOCK), ["--user", STOCK_OWNER])

    async def _many(self, action: str, filters: list[str]) -> None:
        op = self._journal.operation("cli", action)
        when = []
        if action == "reschedule":
            stock = STOCK_OWNER in filters
            when = ["--in", "2h" if stock else f"{self._dice.uniform(0.1, 3):.1f}s"]
        said = await self._hand.command(op, [action, *filters, *when, "--yes", "--json"])
        broken_off(op, said)

    async def _pause_queue(self) -> None:
        queue = self._dice.choice((*self._drawn.names, "*"))
        by_console = self._dice.random() < 0.5
        op = self._journal.operation("console" if by_console else "cli", "pause_queue")
        if by_console:
            await self._post(op, "/queues/pause", {"queue": queue, "reason": "the audit"})
        else:
            which = ["--all"] if queue == "*" else [queue]
            await self._hand.command(op, ["queues", "pause", *which, "--yes"])
        await asyncio.sleep(self._dice.uniform(*QUEUE_PAUSED))
        # Whoever paused it resumes it, whatever is away meanwhile.
        while True:
            op = self._journal.operation("cli", "resume_queue")
            which = ["--all"] if queue == "*" else [queue]
            await self._hand.command(op, ["queues", "resume", *which, "--yes"])
            if op.done is not None and not op.refused:
                return
            await asyncio.sleep(0.5)

    # --- the console ------------------------------------------------------------------------------

    async def _click(self) -> None:
        """Look at a page, or press a button of a recall's."""
        dice = self._dice.random()
        if dice < 0.35:
            await self._get(self._dice.choice(PAGES))
            return
        young = self._hand.young()
        if not young:
            return
        promise = self._dice.choice(young)
        page = f"/recalls/{promise.id}"
        if dice < 0.5:
            await self._get(page)
            return
        action = self._dice.choice(ON_ONE)
        if action == "skip" and promise.kind != "recurring":
            action = "fire"
        fields: dict[str, str] = {}
        if action == "reschedule":
            fields["in"] = f"{self._dice.uniform(0.1, 4):.1f}s"
        op = self._journal.operation("console", action)
        if action == "edit":
            self._edits += 1
            if self._dice.random() < 0.7:
                op.message = fields["message"] = f"look again, says the console, {self._edits}"
            elif promise.kind == "recurring" and promise.cadence == "interval":
                fields["every"] = f"{self._dice.randint(1, 3)}s"
            else:
                fields["grace"] = "1h"
        shown, _ = await self._post(op, f"{page}/{action}", fields)
        if op.done is not None and not op.refused and shown is not None:
            same = re.search("nothing was changed|was not paused|nothing to change", shown)
            if action != "pause":
                op.changed = set() if same else {promise.id}
        if action == "pause" and not op.refused:
            await asyncio.sleep(self._dice.uniform(0.5, PAUSED_MOST))
            again = self._journal.operation("console", "resume")
            await self._post(again, f"{page}/resume", {})

    async def _click_many(self) -> None:
        if self._dice.random() < 0.3:
            await self.click_on_stock()
            return
        action, state, _ = self._dice.choice(
            [
                one
                for one in OF_TRAFFIC
                if one[0] != "reschedule" and one[2] <= max(8, self._drawn.capacity)
            ]
        )
        # The console takes no limit: a part of all sessions, by how their names end.
        ends = self._dice.choice("0123456789")
        filters = {"state": state, "since": LATELY, "session": f"*{ends}"}
        await self._choose(action, filters)
        if action == "pause":
            await asyncio.sleep(self._dice.uniform(0.5, PAUSED_MOST))
            await self._choose("resume", filters | {"state": "paused"})

    async def click_on_stock(self) -> None:
        """Act on all that only wait, in a job of several batches."""
        await self._choose(self._dice.choice(("pause", "resume")), {"user": STOCK_OWNER})

    async def _choose(self, action: str, filters: Mapping[str, str]) -> None:
        """Choose many, agree by their number, and follow the job to its end."""
        shown = await self._get(f"/bulk/{action}?{urlencode(filters)}")
        key = re.search(r'name="choice" value="([^"]+)"', shown or "")
        number = re.search(r"<h1>\w+ ([\d,]+) recalls?\?</h1>", shown or "")
        if key is None or number is None:
            return  # None matched.
        op = self._journal.operation("console", action)
        fields = {"choice": key[1], "count": number[1]}
        page, path = await self._post(op, f"/bulk/{action}", fields)
        if op.refused or op.done is None:
            return
        # It is begun. What became of it is known at its end.
        op.done = None
        end = time.monotonic() + JOB_WITHIN
        while page is not None and time.monotonic() < end:
            counted = re.search(r"<li>([\d,]+) of [\d,]+ recalls? ", page)
            if 'class="good"' in page or "Done, but not all" in page or "Broken off" in page:
                assert counted is not None, page
                op.counted(counted[1], exactly="is not known" not in page)
                return
            await asyncio.sleep(0.2)
            page = await self._get(path, op.name)

    async def _get(self, path: str, user: str = "ann") -> str | None:
        """A page's text; None where it did not come, or is of an error."""
        status, text, _ = await self._ask("GET", path, user)
        return text if status == 200 else None

    async def _post(
        self, op: Operation, path: str, fields: Mapping[str, str]
    ) -> tuple[str | None, str]:
        """Press a button; returns the page that follows, and its address."""
        status, _, place = await self._ask("POST", path, op.name, fields)
        if status == 303:
            op.done = time.time()
            return await self._get(place, op.name), place
        if 400 <= status < 500:
            op.refused, op.done = True, time.time()
        return None, ""

    async def _ask(
        self, method: str, path: str, user: str, fields: Mapping[str, str] | None = None
    ) -> tuple[int, str, str]:
        """Status (0: no answer came), text, and where the answer leads."""
        headers = {USER_HEADER: user, "Accept": "text/html", "Sec-Fetch-Site": "same-origin"}
        asked, status, text, place = time.time(), 0, "", ""
        with suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with self._http.request(
                method,
                self._stage.service("console").url + path,
                headers=headers,
                data=fields,
                allow_redirects=False,
            ) as response:
                text = await response.text()
                status, place = response.status, response.headers.get("Location", "")
        what = f"{method} {path.partition('?')[0]}"
        self.answers.append(Answer(what, status, asked, time.time()))
        return status, text, place

    async def _watch(self, until: asyncio.Event) -> None:
        """A page is open all the time, and opened again where it breaks."""
        while not until.is_set():
            part = self._dice.choice(PARTS)
            with suppress(aiohttp.ClientError, OSError, TimeoutError):
                url = f"{self._stage.service('console').url}/live?part={part}"
                headers = {USER_HEADER: "ann", "Accept": "text/event-stream"}
                async with self._http.get(
                    url, headers=headers, timeout=aiohttp.ClientTimeout(sock_read=ANSWERED_WITHIN)
                ) as response:
                    async for line in response.content:
                        self.events += line.startswith(b"event: ")
                        if until.is_set():
                            return
            await asyncio.sleep(0.3)

    # --- agents -----------------------------------------------------------------------------------

    async def _call(self) -> None:
        """A session's agent calls one of its tools."""
        dice = self._dice
        if not self._sessions or dice.random() < 0.5:
            session = self._hand.new_session()
            self._journal.agents.add(session)
            if not await self._hand.create_session(session):
                return
            self._sessions = [*self._sessions[-20:], session]
            when = {"in": f"{dice.uniform(0, 3):.1f}s"}
            rule: dict[str, Any] = {}
            if dice.random() < 0.3:
                rule = {dice.choice(("every", "grid")): "1s", "times": dice.randint(2, 5)}
            elif dice.random() < 0.4:
                self._links[session] = dice.randint(1, 3)
            await self._tool(session, "schedule_recall", {"message": "look", **when, **rule})
            return
        session = dice.choice(self._sessions)
        match dice.choice(("list", "list", "reschedule", "skip", "cancel", "schedule")):
            case "list":
                await self._tool(session, "list_recalls", {"ended": dice.random() < 0.5})
            case "reschedule":
                after = {"in": f"{dice.uniform(1, 4):.1f}s"}
                await self._tool(session, "reschedule_recall", after)
            case "skip":
                await self._tool(session, "skip_recall", {})
            case "cancel":
                await self._tool(session, "cancel_recall", {})
            case _:
                await self._tool(session, "schedule_recall", {"message": "look", "in": "1s"})

    async def _next_link(self, session: str) -> bool:
        """From inside its run, an agent schedules the next one."""
        left = self._links.get(session, 0)
        if left == 0 or self._hand.rate == 0:
            return True
        self._links[session] = left - 1
        op = await self._tool(session, "schedule_recall", {"message": "look on", "in": "0.1s"})
        return not op.refused

    async def _tool(self, session: str, name: str, arguments: Mapping[str, Any]) -> Operation:
        """Call a tool, and note what it answers. Of a session one at a time."""
        actions = {"cancel_recall": ("cancel", "edit")}.get(name, (name.removesuffix("_recall"),))
        async with self._turns.setdefault(session, asyncio.Lock()):
            op = self._journal.operation("mcp", *actions, session=session)
            token = tokens.sign(self._keys, session, ttl=timedelta(hours=1))
            headers = {
                "Authorization": f"Bearer {token}",
                "Accept": "application/json, text/event-stream",
            }
            call = {"name": name, "arguments": arguments}
            document = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
            status, text = 0, ""
            with suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with self._http.post(
                    f"{self._stage.service('mcp').url}/mcp", json=document, headers=headers
                ) as response:
                    text = await response.text()
                    status = response.status
            if status == 200:
                self._answered(op, name, json.loads(text))
            elif status not in (0, 503):
                self._journal.strange.append(f"mcp: {name} was answered {status}: {text[:200]}")
            return op

    def _answered(self, op: Operation, name: str, document: Mapping[str, Any]) -> None:
        result = document.get("result")
        if result is None:
            self._journal.strange.append(f"mcp: {name} was answered {json.dumps(document)[:300]}")
            return
        said = "".join(part.get("text", "") for part in result["content"])
        if result.get("isError"):
            if "it is not known whether" not in said:
                op.refused, op.done = True, time.time()
            return
        op.done, data = time.time(), result["structuredContent"]
        if name == "list_recalls":
            op.changed, op.shown = set(), {one["id"] for one in data["recalls"]}
        else:
            # A cancel in the last run of a recall changes nothing, and says so.
            last = name == "cancel_recall" and "in its last run" in said
            op.changed = set() if last else {data["recall"]["id"]}

    # --- for faults -------------------------------------------------------------------------------

    @asynccontextmanager
    async def many_at_work(self, via: str) -> AsyncIterator[None]:
        """While a command, or a job of the console, acts on many: its first batch is on record, or
        a while has gone by."""
        act = self.command_on_stock if via == "cli" else self.click_on_stock
        before = len(self._journal.operations)
        work = asyncio.create_task(act())
        end = time.monotonic() + 5.0
        with suppress(psycopg.Error):
            async with await psycopg.AsyncConnection.connect(
                self._stage.dsn, autocommit=True, connect_timeout=3
            ) as conn:
                while time.monotonic() < end and not work.done():
                    names = [op.name for op in self._journal.operations[before:] if op.via == via]
                    found = await (
                        await conn.execute(
                            "select count(*) from recall_actions where actor = any (%s)", [names]
                        )
                    ).fetchone()
                    if found is not None and found[0] > 0:
                        break
                    await asyncio.sleep(0.005)
        try:
            yield
        finally:
            await asyncio.wait((work,), timeout=COMMAND_WITHIN + JOB_WITHIN)


def broken_off(op: Operation, said: str) -> None:
    """Note how many a command says that it has changed before it was broken off."""
    found = re.search(r"Stopped: ([\d,]+) of [\d,]+ recalls? ", said)
    if found is not None and op.done is None:
        op.counted(found[1], exactly="is not known" not in said)
