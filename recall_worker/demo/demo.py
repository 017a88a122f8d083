"""`demo`: recalls scheduled and called while a new user watches, by the real daemon, on a temporary
PostgreSQL.

It acts as the application (its tables, its plain SQL), as the agent behind the reference API, as a
person who chats, and as an operator at the command line. Everything is shown as it happens; at the
end a table compares what was promised, expected and seen, and the exit status says whether all
promises were kept.

Lateness is measured where the request arrives: the instant at which the API received it, minus the
`scheduled_for` in it. PostgreSQL and the API use the same machine's clock. What the daemon says of
itself is shown, but proves nothing here.

Never here: RECALL_DSN or any other RECALL_* of the caller, a database or a process that the demo
did not start.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from .. import schema
from ..contract.reference_api import Agent, Call
from ..embedded import EmbeddedError, EmbeddedServer
from ..terminal import Trouble, tell
from .expectations import INTERVAL, LINKS, Evidence, Visit, expectations, figures, ms
from .playground import BOLD, DIM, GREEN, RED, RETRY_AFTER, YELLOW, Event, Playground, Screen

COLOURS = {
    "hello": 36,
    "build": 33,
    "inbox": 35,
    "report": 93,
    "meeting": 94,
    "chain": 96,
    "draft": 95,
}
RUN = 0.2
"""Seconds that the agent takes for a run."""

TABLES = """
create table sessions (id text primary key, user_id text not null);
create table session_recalls (
    id text primary key,
    session_id text not null references sessions(id) on delete cascade,
    call_type text not null check (call_type in ('once', 'recurring', 'immediate')),
    trigger_at timestamptz not null,
    interval_seconds integer,
    internal_comment text,
    additional_context_message text not null,
    status text not null default 'pending' check (status in ('pending', 'fired', 'cancelled')),
    created_at timestamptz not null,
    updated_at timestamptz not null
);
create index idx_recalls_trigger_at_status on session_recalls (trigger_at, status);
create index idx_recalls_session_status on session_recalls (session_id, status);
create unique index idx_recalls_active_pending on session_recalls (session_id)
    where status = 'pending';
"""
INSERT = """
insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds,
    internal_comment, additional_context_message, status, created_at, updated_at)
values (%s, %s, %s, now() + %s * interval '1 second', null, null, %s, 'pending', now(), now())
"""
CANCEL = (
    "update session_recalls set status = 'cancelled', updated_at = now() where "
    "session_id = %s and status = 'pending'"
)

INTRO = """\
"I'll look at the build again later", says an agent in a chat. Such a promise is
a recall: one row in PostgreSQL. recall-worker is the daemon that keeps it: when
the row is due, it calls the agent's API. Here such promises are made, and what
arrives at the API is counted and timed. The daemon, the API and PostgreSQL are
real; all of it is temporary, and nothing else on this machine is touched.

Each line: seconds since the start, the chat session, what happens in it."""

NEXT = """\
Next, by hand: docs/first-recall.md, in ten minutes, or
  recall-worker reference-api             an agent to call, which only answers
  recall-worker run --embedded            a worker, with a PostgreSQL of its own
  recall-worker check-endpoint URL        which promises your agent's API keeps
  recall-worker migrate, doctor, run      in earnest, on your PostgreSQL"""


class Play:
    """One run of the demo, from the tables to the evidence."""

    def __init__(
        self, screen: Screen, dsn: str, log: Path, spoil: Callable[[Agent], Agent]
    ) -> None:
        self.first_fired: float | None = None
        """When the first one-shot was done, by the screen's clock."""
        self._screen, self._say = screen, screen.say
        self._dsn = dsn
        self._playground = Playground(screen, dsn, log, spoil(self._agent), self._show)
        self._person_left: datetime | None = None
        self._cancelled: dict[str, datetime] = {}

    async def perform(self) -> Evidence:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        async with self._playground as playground:
            await self._set_up()
            # In this order the recurring recall goes on during the next acts, and the cancelled
            # ones are watched during others.
            for act in (
                self._types,
                self._busy,
                self._recurring,
                self._chain,
                self._mid_run,
                self._silence,
            ):
                await act()
            await playground.stop_daemon()
            self._say(
                "end",
                f"the daemon was sent SIGTERM and ended with status {playground.daemon_status}",
            )
            return await self._evidence()

    async def _set_up(self) -> None:
        await self._playground.db.execute(TABLES.encode())
        for session in COLOURS:
            await self._playground.db.execute("insert into sessions values (%s, 'ann')", (session,))
        self._say("setup", "the application creates its own tables, with its own SQL")
        self._playground.show_command("setup", "migrate")
        began = time.monotonic()
        await asyncio.to_thread(schema.migrate, self._dsn)
        self._say("setup", f"the application's table is adopted ({ms(time.monotonic() - began)})")
        await self._playground.start_daemon()

    async def _types(self) -> None:
        self._screen.heading(
            "1. Promises: at once, once, again and again; by command and by plain SQL"
        )
        await self._playground.command("hello", "schedule", "hello", "say hello")
        await self._playground.command(
            "build", "schedule", "build", "look at the build", "--in", "3s"
        )
        await self._playground.command(
            "inbox", "schedule", "inbox", "read the inbox", "--every", f"{INTERVAL}s"
        )
        await self._insert(
            "report",
            "once",
            1.5,
            "send the report",
            "application: insert into session_recalls ..., in 1.5 s",
        )
        for session in ("hello", "report", "build"):
            await self._answers(session)

    async def _busy(self) -> None:
        self._screen.heading("2. A person is chatting in the session: the agent must not burst in")
        await self._playground.api.enter("meeting")
        self._say("meeting", "a person comes in and chats")
        await self._insert(
            "meeting", "immediate", 0, "sum up the meeting", "application: insert ..., at once"
        )
        await self._playground.until(
            lambda: len(self._playground.events("recall.settled", "meeting", "busy")) >= 2,
            "two refusals",
        )
        await asyncio.sleep(0.4)
        self._person_left = datetime.now(UTC)
        await self._playground.api.leave("meeting")
        self._say("meeting", "the person leaves")
        await self._answers("meeting")

    async def _recurring(self) -> None:
        self._screen.heading(f"3. Every {INTERVAL} s, until it is cancelled")
        await self._answers(
            "inbox", max(3, len(self._playground.events("recall.settled", "inbox", "answered")) + 1)
        )
        cancelled_at = await self._playground.command(
            "inbox", "cancel", "--session", "inbox", "--yes"
        )
        if cancelled_at is not None:
            self._cancelled["inbox"] = cancelled_at
            self._say("inbox", "cancelled: from here on, nothing may come")

    async def _chain(self) -> None:
        self._screen.heading("4. A chain: from inside its run, the agent promises the next one")
        await self._insert(
            "chain",
            "immediate",
            0,
            f"link 1 of {LINKS}",
            f"application: insert ..., at once: link 1 of {LINKS}",
        )
        await self._answers("chain", LINKS)

    async def _mid_run(self) -> None:
        self._screen.heading("5. Cancelled in mid-run: the call is to be aborted at once")
        await self._insert(
            "draft", "immediate", 0, "write a long draft", "application: insert ..., at once"
        )
        if await self._playground.until(lambda: "draft" in self._playground.api.inside, "the run"):
            await asyncio.sleep(1.0)
            self._say("draft", "application: update ... set status = 'cancelled'")
            self._cancelled["draft"] = datetime.now(UTC)
            await self._playground.db.execute(CANCEL, ("draft",))
            await self._playground.until(
                lambda: self._playground.events("recall.ended", "draft"), "the run's end"
            )

    async def _silence(self) -> None:
        until = [at + timedelta(seconds=2 * INTERVAL + 0.5) for at in self._cancelled.values()]
        left = max(((at - datetime.now(UTC)).total_seconds() for at in until), default=0.0)
        if left > 0:
            self._say("", f"{left:.1f} s more: what was cancelled has to stay silent", DIM)
            await asyncio.sleep(left)

    # --- what the acts are made of ----------------------------------------------------------------

    async def _agent(self, session: str, message: str, recall: Mapping[str, Any]) -> str:
        run = self._playground.api.inside[session]
        assert run is not None
        self._playground.stir()
        late = run.call.at - datetime.fromisoformat(recall["scheduled_for"])
        after = f"{ms(late.total_seconds())} late"
        before = [
            other
            for other in self._playground.api.runs.values()
            if other.call.session_id == session and other is not run
        ]
        if session == "meeting" and self._person_left is not None:
            after = f"{(run.call.at - self._person_left).total_seconds():.1f} s after they left"
        elif session == "chain" and before and before[-1].ended_at is not None:
            after = f"{ms((run.call.at - before[-1].ended_at).total_seconds())} after the last run"
        self._say(session, f'agent called, {after}: "{message}"')
        if session == "draft":
            self._say(session, "the agent is at work for 30 s ...")
            await asyncio.wait_for(run.left.wait(), 30)
            took = datetime.now(UTC) - self._cancelled.get(session, run.call.at)
            self._say(
                session,
                f"the call breaks off {ms(took.total_seconds())} after that; the agent stops",
            )
            return "stopped"
        await asyncio.sleep(RUN)
        if session == "chain" and (n := int(message.split()[1])) < LINKS:
            await self._insert(
                "chain",
                "immediate",
                0,
                f"link {n + 1} of {LINKS}",
                f"agent: insert ..., at once: link {n + 1} of {LINKS}",
            )
        return "done"

    async def _insert(
        self, session: str, call_type: str, after: float, message: str, caption: str
    ) -> None:
        self._say(session, caption, BOLD)
        await self._playground.db.execute(
            INSERT, (str(uuid4()), session, call_type, after, message)
        )

    async def _answers(self, session: str, n: int = 1) -> None:
        """Wait until the daemon has settled n answered runs of a session."""
        await self._playground.until(
            lambda: len(self._playground.events("recall.settled", session, "answered")) >= n,
            f"{session} to run",
        )

    def _show(self, event: Event) -> None:
        """Show what the daemon reports of a call."""
        session, verdict = str(event.get("session", "")), event.get("verdict")
        match event.get("event"), event.get("outcome"):
            case "recall.settled", "answered":
                if verdict == "finish" and self.first_fired is None:
                    self.first_fired = self._screen.clock
                if session != "chain":
                    again = "" if verdict == "finish" else f" again, due in {INTERVAL} s"
                    self._say(session, f"done; the row is {event.get('status')}{again}", GREEN)
            case "recall.settled", "busy" if verdict == "defer":
                self._say(
                    session, f"API: 409, the session is busy; deferred for {RETRY_AFTER} s", YELLOW
                )
            case "recall.settled", outcome:
                self._say(session, f"{outcome}, so {verdict}: {event.get('reason')}", RED)
            case "recall.ended", _:
                self._say(session, f"the row stays {event.get('status')}", GREEN)
            case name, _ if event.get("level") in ("error", "critical"):
                self._say("daemon", f"{name}: {event.get('reason', '')}", RED)

    async def _evidence(self) -> Evidence:
        rows = await (
            await self._playground.db.execute("select session_id, status from session_recalls")
        ).fetchall()
        calls = await (
            await self._playground.db.execute(
                "select coalesce(sum(calls), 0)::int as n from recall_attempts"
            )
        ).fetchone()
        assert calls is not None
        visits = [self._visit(call) for call in self._playground.api.calls]
        return Evidence(
            visits,
            rows,
            calls["n"],
            self._person_left,
            self._cancelled,
            self._playground.daemon_status,
        )

    def _visit(self, call: Call) -> Visit:
        run = self._playground.api.runs.get(call.key)
        if run is None or run.call is not call:
            return Visit(call.session_id, call.key, call.at, call.http_status, left_at=call.left_at)
        return Visit(
            call.session_id,
            call.key,
            call.at,
            call.http_status,
            left_at=call.left_at,
            ended_at=run.ended_at,
            message=run.user_message,
            scheduled_for=datetime.fromisoformat(run.recall["scheduled_for"]),
        )


def demo(*, keep: bool, spoil: Callable[[Agent], Agent] = lambda agent: agent) -> None:
    """Run the demo. Raises Trouble if a promise was broken.

    `keep`: keep data and log. `spoil`: replaces the agent, for the tests.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    screen = Screen(COLOURS)
    screen.print("recall-worker demo: promises, and whether they are kept", BOLD)
    screen.print(f"\n{INTRO}")
    screen.heading("0. The stage")
    place = _kept_place() if keep else None
    try:
        with EmbeddedServer(place) as server:
            screen.say("setup", "PostgreSQL is up, temporary, on a socket of its own")
            play = Play(screen, server.dsn(), server.directory / "daemon.log", spoil)
            evidence = asyncio.run(play.perform())
    except EmbeddedError as error:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        raise Trouble(str(error), error.hint) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        tell("Interrupted: all that was started has been stopped.")
        raise KeyboardInterrupt from None
    finally:
        if place is not None and place.exists():
            tell(
                f"Kept in {place}: daemon.log, and the data (recall-worker run --embedded "
                f"--data {place})"
            )
    _sum_up(screen, evidence, play.first_fired)


def _kept_place() -> Path:
    place = Path(tempfile.mkdtemp(prefix="recall-demo-"))
    if os.geteuid() == 0:
        place.chmod(0o711)  # PostgreSQL then runs as another account, which must be able to enter
    return place


def _sum_up(screen: Screen, evidence: Evidence, first_fired: float | None) -> None:
    made = expectations(evidence)
    screen.heading("What was promised, and what the API and PostgreSQL have seen of it")
    screen.print(f"{'':7}{'SESSION':9}{'PROMISED':18}{'EXPECTED':23}SEEN", DIM)
    for expectation in made:
        word = (
            screen.paint("kept  ", GREEN) if expectation.kept else screen.paint("BROKEN", BOLD, RED)
        )
        screen.print(
            f"{word} {screen.name(expectation.session)} {expectation.what:17} "
            f"{expectation.expected:22} {expectation.seen}"
        )
    screen.print()
    for line in figures(evidence):
        screen.print(line)
    fired = "" if first_fired is None else f"The first recall had fired after {first_fired:.1f} s. "
    screen.print(f"{fired}The whole took {screen.clock:.1f} s.")
    screen.print()
    broken = [
        f"{expectation.session} ({expectation.what})"
        for expectation in made
        if not expectation.kept
    ]
    if broken:
        raise Trouble(
            f"{len(broken)} of {len(made)} promises were broken: {', '.join(broken)}",
            "recall-worker demo --keep, and read daemon.log",
        )
    screen.print(f"All {len(made)} promises were kept.", BOLD, GREEN)
    screen.print(f"\n{NEXT}")
