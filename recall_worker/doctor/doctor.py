"""`doctor`: is all there that the worker needs, and does it do its work? One line a finding: ok, note or problem, what was seen, what to do.

It looks from where it is run, with the settings that are there: run it where, and as whom, the worker runs. Each check stands alone;
one that breaks is a problem of its own, and the others go on.

What it does is harmless. The rights are asked by EXPLAIN of every statement that the worker has. The ring is tried all the way: a
LISTEN as the bell's, a NOTIFY from the other connection, timed on a channel of the doctor's own; the workers' channel is rung once,
in the same transaction, which costs each of them one look. The endpoint is asked by GET, which runs no agent.

Never here: a change of anything, a call to a session.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import typer
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row

from .. import schema, statements
from .. import settings as setting
from ..bell import CHANNEL
from ..line import CONNECT_DEADLINE, Dates, connection_info, said
from ..protocols import langgraph, native
from ..protocols.wire import Answer, Wire
from ..settings import Settings
from ..terminal import REFUSED, UNREACHABLE, command, explain, print_findings, print_json, relative, span, tell

OK, NOTE, PROBLEM = "ok", "note", "problem"
OLDEST = 140000
"""The oldest PostgreSQL that the statements are written for."""
PATIENCE = 15.0
"""Seconds that one check may take."""
RING_PATIENCE = 5.0
RINGS = 5
CONNECTIONS = 5
"""What a worker has open at most: claims, settles, renewals, the bell, and one for a row that is held locked."""
LATE = 10.0
"""Seconds that something may have been due: a worker that is about and has a slot takes it within milliseconds."""
OVERDUE = 60.0
SILENT_AFTER = 180.0
"""Seconds after which a worker that has not been heard of counts as gone: three of its heartbeats."""
LONG_TRANSACTION = 300.0
CLOCK_OFF, CLOCK_FAR_OFF = 2.0, 240.0
"""Seconds between two clocks that are worth a word, and that a receiver of signatures (Standard Webhooks: five minutes) may not take."""
POOLING_ROUNDS = 5
DIRECT, SESSION, TRANSACTION, STATEMENT = "direct", "session", "transaction", "statement"

Connection = psycopg.AsyncConnection[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    state: str
    seen: str
    todo: str | None = None


class Doctor:
    """One examination. `findings` are in the order in which they are shown."""

    def __init__(self, settings: Settings) -> None:
        assert settings.dsn is not None
        self.settings = settings
        self.findings: list[Finding] = []
        self.reached = False
        """Whether the database answered."""
        self._dsn = settings.dsn
        self._sql = statements.load("doctor")
        self._stack = AsyncExitStack()
        self._alive: list[dict[str, Any]] = []
        self._pooling = self._bell_pooling = DIRECT
        self._role = "its role"
        self._adopted = False
        """Whether there is a schema to ask of."""

    async def examine(self) -> None:
        async with self._stack:
            await self._check("database", self._database)
            if self.reached:
                await self._check("schema", self._schema)
                await self._check("pooler", self._pooler)
                await self._check("bell", self._bell)
                await self._check("clock", self._clock)
            if self._adopted:
                await self._check("rights", self._rights)
                await self._check("trigger", self._triggers)
                await self._check("workers", self._workers)
                await self._check("server", self._server)
                await self._check("backlog", self._backlog)
                await self._check("held", self._held)
            await self._check("endpoint", self._endpoint)

    async def _check(self, name: str, check: Callable[[], Awaitable[None]]) -> None:
        self._name = name
        try:
            async with asyncio.timeout(PATIENCE):
                await check()
        except TimeoutError:
            self._find(PROBLEM, f"no answer within {PATIENCE:g} s", "see pg_stat_activity for what is in the way")
        except (psycopg.Error, OSError) as error:
            trouble = explain(error)
            self._find(PROBLEM, trouble.what if trouble else said(error), *(trouble.hints[:1] if trouble else ()))

    def _find(self, state: str, seen: str, todo: str | None = None) -> None:
        self.findings.append(Finding(self._name, state, seen, todo))

    # --- asking ----------------------------------------------------------------------------------------------------

    async def _connect(self, dsn: str) -> Connection:
        """A connection that lasts as long as the examination."""
        return await self._stack.enter_async_context(_connected(dsn))

    async def _ask(self, name: str, conn: Connection | None = None, **values: Any) -> list[dict[str, Any]]:
        cursor = await (conn or self._conn).execute(self._sql[name].encode(), values or None)
        return await cursor.fetchall()

    async def _one(self, name: str, **values: Any) -> dict[str, Any]:
        [row] = await self._ask(name, **values)
        return row

    # --- the database ----------------------------------------------------------------------------------------------

    async def _database(self) -> None:
        began = time.monotonic()
        self._conn = await self._connect(self._dsn)
        took = time.monotonic() - began
        self.reached = True
        self._facts = row = await self._one("server")
        self._role = row["role"]
        where = self._conn.info.host or "its socket"
        self._find(
            OK,
            f"PostgreSQL {row['version']} at {where}, port {self._conn.info.port}, database {row['database']}, as {row['role']}; "
            f"connected in {span(took)}",
        )
        if row["number"] < OLDEST:
            self._find(
                PROBLEM, f"PostgreSQL {row['version']} is older than the statements are written for", "PostgreSQL 14 or newer"
            )
        given = conninfo_to_dict(self._dsn)
        attrs = given.get("target_session_attrs")
        several = "," in str(given.get("host") or given.get("hostaddr") or "")
        if row["standby"]:
            todo = (
                FAILOVER_HINT if several else "the primary's address in RECALL_DSN, or both, with target_session_attrs=read-write"
            )
            self._find(PROBLEM, "this is a standby: it takes no writes", todo)
        elif row["read_only"]:
            todo = "alter role or database … set default_transaction_read_only = off; or the primary's address in RECALL_DSN"
            self._find(PROBLEM, "transactions take no writes here: default_transaction_read_only is on", todo)
        # Where nothing is said, the worker means the one that takes writes.
        elif several and attrs not in (None, "read-write", "primary"):
            self._find(PROBLEM, f"target_session_attrs={attrs} may lead to a standby after a failover", FAILOVER_HINT)

    async def _rights(self) -> None:
        """EXPLAIN asks for the rights that the statement would need, and runs nothing."""
        denied: dict[str, list[str]] = {}
        asked = 0
        # Only a worker that prunes deletes recalls.
        pruning = {f"prune: {name}": text for name, text in statements.load("prune").items()} if self.settings.keep else {}
        for name, statement in (statements.load("ledger") | pruning).items():
            values = dict.fromkeys(re.findall(r"%\((\w+)\)s", statement))
            try:
                await self._conn.execute(f"explain {statement}".encode(), values)
                asked += 1
            except errors.InsufficientPrivilege as error:
                denied.setdefault(said(error), []).append(name)
            except (errors.UndefinedTable, errors.UndefinedColumn, errors.UndefinedFunction):
                pass  # The schema says so.
        for what, names in denied.items():
            todo = f"grant select, insert, update, delete on all tables named session_recalls and recall_… to {self._role}"
            self._find(PROBLEM, f"{what} (needed to {', '.join(names)})", todo)
        if asked and not denied:
            self._find(OK, f"{self._role} may do all that the worker does")
        if self._facts["superuser"]:
            self._find(
                NOTE,
                f"{self._role} is a superuser, and need not be one",
                "an account of its own, with rights on these tables only",
            )
        if self._facts["row_security"]:
            self._find(
                PROBLEM,
                f"row security is active on session_recalls for {self._role}: what it hides is never called",
                f"alter role {self._role} bypassrls, or a policy that shows it every row",
            )

    async def _schema(self) -> None:
        self._adopted = True
        try:
            left = await asyncio.to_thread(schema.pending, self._dsn)
        except schema.SchemaError as error:
            self._find(PROBLEM, str(error), error.hint)
            return
        if left:
            self._find(PROBLEM, "to be done: " + ", ".join(left), command("migrate"))
            if len(left) >= len(schema.migrations()):
                self._adopted = False
                return
        for row in await self._ask("indexes", names=_made("index")):
            wrong, todo = (
                ("is invalid: it costs writes and serves nobody", f"reindex index concurrently {row['name']}")
                if row["there"]
                else ("is missing", "create it again as sql/migrations has it (concurrently)")
            )
            if row["there"] or not left:
                self._find(PROBLEM, f"index {row['name']} {wrong}", todo)
        for row in await self._ask("constraints"):
            old = "some old recalls belong to no session: delete them, then " if row["foreign_key"] else ""
            todo = f"{old}alter table {row['table']} validate constraint {row['name']}"
            self._find(NOTE, f"constraint {row['name']} holds for new rows only", todo)
        if not left:
            self._find(OK, f"version {schema.GENERATION}, up to date")

    async def _triggers(self) -> None:
        wrong = await self._ask("triggers", names=_made("trigger"))
        for row in wrong:
            if row["enabled"] is None:
                self._find(
                    PROBLEM, f"{row['name']} is missing: {_without(row['name'])}", "create it again as sql/migrations has it"
                )
            else:
                how = "is disabled" if row["enabled"] == "D" else "fires in replica sessions only"
                todo = f"alter table session_recalls enable trigger {row['name']}"
                self._find(PROBLEM, f"{row['name']} {how}: {_without(row['name'])}", todo)
        if not wrong:
            self._find(OK, f"all {len(_made('trigger'))} are there and enabled")

    # --- waking ----------------------------------------------------------------------------------------------------

    async def _pooler(self) -> None:
        self._pooling = await self._pooling_of(self._dsn)
        listens = self.settings.listen_dsn is not None
        match self._pooling:
            case "direct":
                self._find(OK, "none: RECALL_DSN leads to the server itself")
            case "statement":
                self._find(
                    PROBLEM,
                    "RECALL_DSN leads through a pooler in statement mode, which takes no transactions",
                    "pool_mode = transaction",
                )
            case "transaction" if not listens:
                self._find(
                    PROBLEM,
                    "RECALL_DSN leads through a pooler in transaction mode, which LISTEN does not pass: what is inserted waits for a poll",
                    POOLER_HINT,
                )
            case mode:
                how = f"RECALL_DSN leads through a pooler in {mode} mode"
                self._find(OK, how + ("; LISTEN has its own way" if listens else ", which passes LISTEN"))
        self._bell_pooling = self._pooling
        if self.settings.listen_dsn is not None:
            try:
                self._bell_pooling = await self._pooling_of(self.settings.listen_dsn)
            except (psycopg.Error, OSError):
                self._bell_pooling = DIRECT  # The bell says what is wrong.
            if self._bell_pooling in (TRANSACTION, STATEMENT):
                self._find(
                    PROBLEM,
                    f"RECALL_LISTEN_DSN leads through a pooler in {self._bell_pooling} mode, too, which LISTEN does not pass",
                    POOLER_HINT,
                )

    async def _pooling_of(self, dsn: str) -> str:
        """How connections by this DSN are pooled.

        A pooler announces a backend of its own making; asked, the server names the true one. If that changes while the connection is
        open, or serves another connection meanwhile, it is lent for a transaction at a time.
        """
        async with _connected(dsn) as one:
            mine = await _backend(one)
            if mine == one.pgconn.backend_pid:
                return DIRECT
            try:
                async with one.transaction():
                    await one.execute(b"select 1")
            except psycopg.Error:
                return STATEMENT
            for _ in range(POOLING_ROUNDS):
                async with _connected(dsn) as another:
                    if await _backend(another) == mine or await _backend(one) != mine:
                        return TRANSACTION
        return SESSION

    async def _bell(self) -> None:
        if self._bell_pooling in (TRANSACTION, STATEMENT):
            # Not tried: the LISTEN would stay behind on one of the pooler's connections.
            self._find(PROBLEM, f"what is rung can't pass the pooler: {self._meanwhile}", POOLER_HINT)
            return
        try:
            conn = await self._connect(self.settings.listen_dsn or self._dsn)
        except (psycopg.Error, OSError) as error:
            which = "RECALL_LISTEN_DSN" if self.settings.listen_dsn is not None else "RECALL_DSN"
            self._find(
                PROBLEM,
                f"the bell's connection can't be had: {said(error)}",
                f"check {which}: it is to lead to the server itself",
            )
            return
        if (await self._ask("read_only", conn))[0]["standby"]:
            self._find(PROBLEM, "the bell's connection leads to a standby, which takes no LISTEN", FAILOVER_HINT)
            return
        own = f"{CHANNEL}_{uuid4().hex[:16]}"
        for channel in (CHANNEL, own):
            await conn.execute(f"listen {channel}".encode())
        times = []
        for n in range(RINGS):
            began = time.monotonic()
            # Only the first of them also rings the workers' channel.
            await self._ask("echo" if n else "ring", channel=own)
            heard: set[str] = set()
            while own not in heard and (left := began + RING_PATIENCE - time.monotonic()) > 0:
                async for notification in conn.notifies(timeout=left, stop_after=1):
                    heard.add(notification.channel)
            if own not in heard or (n == 0 and CHANNEL not in heard):
                self._unheard()
                return
            times.append(time.monotonic() - began)
        self._find(OK, f"heard what was rung, {RINGS} of {RINGS} times, after {span(sorted(times)[RINGS // 2])}")
        if self._facts["queue"] > 0.5:
            todo = "end the transaction that a listener has open: see pg_stat_activity, state 'idle in transaction'"
            self._find(
                PROBLEM,
                f"PostgreSQL's queue of notifications is {self._facts['queue']:.0%} full; when it is full, inserts fail",
                todo,
            )

    def _unheard(self) -> None:
        todo = (
            "the same database on the same server in RECALL_LISTEN_DSN" if self.settings.listen_dsn is not None else POOLER_HINT
        )
        self._find(PROBLEM, f"what was rung did not arrive within {RING_PATIENCE:g} s: {self._meanwhile}", todo)

    @property
    def _meanwhile(self) -> str:
        return f"what is inserted waits for a look, every {self.settings.poll_interval:g} s"

    async def _clock(self) -> None:
        measured = []
        for _ in range(3):
            began, host = time.monotonic(), datetime.now(UTC)
            row = await self._one("clock")
            took = time.monotonic() - began
            measured.append((took, (row["now"] - host).total_seconds() - took / 2))
        took, offset = min(measured)
        how = f"the database's clock is {span(abs(offset))} {'ahead of' if offset > 0 else 'behind'} this host's (± {span(took / 2)})"
        if abs(offset) > CLOCK_FAR_OFF and self.settings.signing_secret is not None:
            self._find(
                NOTE,
                f"{how}; signatures carry this host's, and an API may refuse them",
                "chrony or another NTP client on this host",
            )
        elif abs(offset) > CLOCK_OFF:
            self._find(NOTE, f"{how}; harmless, as the database's alone decides", "chrony or another NTP client on both hosts")
        else:
            self._find(OK, how)

    # --- how it is set, and who is about ---------------------------------------------------------------------------

    async def _server(self) -> None:
        row, before = self._facts, len(self.findings)
        for name in ("fsync", "full_page_writes"):
            if row[name] == "off":
                self._find(NOTE, f"{name} is off: a crash of the server's host may cost the database", f"{name} = on")
        if row["synchronous_commit"] == "off":
            self._find(
                NOTE,
                "synchronous_commit is off: a crash takes back promises and settles of the last moment",
                "synchronous_commit = on",
            )
        if row["autovacuum"] == "off":
            self._find(NOTE, "autovacuum is off: every settle leaves a dead row behind", "autovacuum = on")
        if 0 < row["statement_timeout"] < 5:
            seen = f"statement_timeout is {span(row['statement_timeout'])} for {self._role}: commands may be cut off (the worker sets its own)"
            self._find(NOTE, seen, f"alter role {self._role} set statement_timeout = '30s'")
        replicas = max(1, len(self._alive))
        needed, limit = replicas * CONNECTIONS, row["places"]
        which = next((name for name in ("role_limit", "database_limit") if row[name] == limit), "max_connections")
        if self._pooling == DIRECT and limit is not None and limit < needed:
            seen = f"{_workers(replicas)} may open {needed} connections, and {which.replace('_', ' ')} leaves {limit}"
            self._find(PROBLEM, seen, f"at least {needed}, besides those of the application")
        elif self._pooling == DIRECT and row["max_connections"] - row["connections"] < CONNECTIONS:
            self._find(
                NOTE,
                f"{row['connections']} of {row['max_connections']} connections are in use: another worker may find none",
                "more max_connections, or a pooler (RECALL_DSN through it, RECALL_LISTEN_DSN direct)",
            )
        for open in await self._ask("open_transaction", longest=LONG_TRANSACTION):
            who = f"of {open['role']}, {open['application'] or 'without a name'}, pid {open['pid']}, {open['state']}"
            self._find(
                NOTE,
                f"a transaction ({who}) has been open for {span(open['seconds'])}: its locks and dead rows stay as long",
                f"select pg_terminate_backend({open['pid']}); idle_in_transaction_session_timeout ends such by itself",
            )
        if len(self.findings) == before:
            self._find(OK, f"{row['connections']} of {row['max_connections']} connections are in use; nothing is set to our harm")

    async def _workers(self) -> None:
        cursor = await self._conn.execute(statements.load("reads")["workers"].encode(), {"silence": SILENT_AFTER})
        rows = await cursor.fetchall()
        self._alive = alive = [row for row in rows if row["alive"]]
        if not alive:
            waiting = (await self._one("waiting"))["recalls"]
            seen = "none alive" + (f", and {waiting:,} recalls wait" if waiting else "; nothing waits")
            self._find(PROBLEM if waiting else NOTE, seen, command("run"))
        else:
            slots, runs = (sum(row[name] for row in alive) for name in ("slots", "leases"))
            self._find(OK, f"{len(alive)} alive, {runs:,} of {slots:,} slots in a run")
        for row in rows:
            name = row["worker"]
            if not row["alive"]:
                seen = f"{name} was last heard of {relative(row['seen_at'], row['now'])}, and took no leave"
                self._find(NOTE, seen, "its log, if it is not known why; its runs are taken up by others")
                continue
            if row["breaker"] != "closed":
                self._find(
                    PROBLEM,
                    f"the breaker is open in {name}: the endpoint is in trouble, and only probed",
                    "see the endpoint below",
                )
            if row.get("bell", "listening") != "listening":
                how = "hears nothing of what is rung" if row["bell"] == "unheard" else "has no connection for LISTEN"
                self._find(
                    PROBLEM,
                    f"{name} {how}, and finds what is inserted by polls only",
                    f"its log (bell.{row['bell']}) says why; its RECALL_LISTEN_DSN is to lead to the server itself",
                )
        if alive:
            others = await self._one("settled_by_others", since=min(row["started_at"] for row in alive))
            if others["recalls"]:
                were = "recall was" if others["recalls"] == 1 else "recalls were"
                seen = f"{others['recalls']:,} {were} marked fired by others than the workers within an hour, such as {others['last']}"
                todo = "turn the application's old scheduler off, should it run beside the workers: docs/migration.md"
                self._find(NOTE, seen, todo)
        for what in ("lease", "run_url", "max_attempts", "give_up", "run_timeout", "protocol"):
            values = {str(row["settings"].get(what)) for row in alive}
            if len(values) > 1:
                self._find(
                    NOTE,
                    f"live workers differ in {what}: {', '.join(sorted(values))}",
                    f"the same {setting.variable(what)} for all",
                )
        if len(versions := {row["version"] for row in alive}) > 1:
            self._find(NOTE, f"live workers differ in version: {', '.join(sorted(versions))}", "upgrade the others, too")

    # --- what waits ------------------------------------------------------------------------------------------------

    async def _backlog(self) -> None:
        row = await self._one("overdue", late=LATE)
        if not row["recalls"]:
            self._find(OK, "nothing is overdue")
            return
        age = (row["now"] - row["since"]).total_seconds()
        seen = f"{row['recalls']:,} overdue, the oldest ({row['oldest']}) due {relative(row['since'], row['now'])}"
        if row["leased"]:
            seen += f"; {row['leased']:,} of them were in a run whose lease has ended"
        full = self._alive and sum(r["leases"] for r in self._alive) >= sum(r["slots"] for r in self._alive)
        todo = "more RECALL_CONCURRENCY or more workers: all slots are taken" if full else command("why", row["oldest"])
        self._find(PROBLEM if age > OVERDUE else NOTE, seen, todo)

    async def _held(self) -> None:
        before = len(self.findings)
        for row in await self._ask("held"):
            since = relative(row["since"], row["now"])
            seen = f"{row['recalls']:,} {row['by']}, the first {since}" + (f"; such as: {row['reason']}" if row["reason"] else "")
            match row["by"]:
                case "misconfigured" | "unavailable":
                    self._find(PROBLEM, seen, "see the endpoint below; every recall is kept")
                case "paused":
                    self._find(
                        NOTE,
                        f"{row['recalls']:,} paused by hand, the first {since}",
                        f"{command('resume')} ID… when they may go on",
                    )
                case "capped":
                    self._find(NOTE, seen, "RECALL_SESSION_LIMIT holds them back: an agent that calls itself?")
                case "busy":
                    self._find(OK, seen)
                case _:
                    self._find(NOTE, seen, f"{command('why')} ID tells of each")
        failed = await self._one("failed")
        if failed["recalls"]:
            seen = f"{failed['recalls']:,} have failed within a day; such as: {failed['reason']}"
            self._find(NOTE, seen, f"{command('list', '--status', 'failed')}; {command('retry')} ID… when the cause is mended")
        if len(self.findings) == before:
            self._find(OK, "nothing is held back")

    # --- the endpoint ----------------------------------------------------------------------------------------------

    async def _endpoint(self) -> None:
        settings = self.settings
        if settings.run_url is None:
            self._find(NOTE, "RECALL_RUN_URL is not set here, so nobody was asked", "set it as for recall-worker run")
            return
        try:
            wire = Wire(settings)
        except setting.SettingsError as error:
            self._find(PROBLEM, error.problems[0])
            return
        try:
            url = _harmless_question(settings)
            began = time.monotonic()
            answer = await wire.ask("GET", url, _credentials(settings))
            took = time.monotonic() - began
            if not isinstance(answer, Answer):
                self._find(PROBLEM, answer.reason.replace(settings.run_token or "\0", "…"), _unreachable_hint(answer.reason))
                return
            if self._refused(answer):
                return
            self._find(OK, f"answers a GET with HTTP {answer.status}, after {span(took)}")
            if settings.run_token is None:
                self._find(NOTE, "no token is set", "RECALL_RUN_TOKEN, so that nobody else can make your agent run")
            else:
                without = await wire.ask("GET", url, {})
                await self._token(isinstance(without, Answer) and without.status in (401, 403))
        finally:
            await wire.close()

    def _refused(self, answer: Answer) -> bool:
        status, has_token = answer.status, self.settings.run_token is not None
        if status in (401, 403):
            seen = f"HTTP {status}: it " + ("does not take the token" if has_token else "wants a token, and none is set")
            self._find(PROBLEM, seen, "the right token in RECALL_RUN_TOKEN (or RECALL_RUN_TOKEN_FILE)")
        elif status == 407:
            self._find(
                PROBLEM, "HTTP 407: a proxy stands in between and wants a login", "the endpoint's own address in RECALL_RUN_URL"
            )
        elif 300 <= status < 400:
            to = str(answer.headers.get("Location", "nowhere"))[:200]
            self._find(
                PROBLEM, f"HTTP {status}, a redirect to {to}, which is not followed", "the final address in RECALL_RUN_URL"
            )
        elif status >= 500:
            self._find(PROBLEM, f"HTTP {status}: it is in trouble", "its log; every recall is kept meanwhile")
        else:
            return False
        return True

    async def _token(self, wanted: bool) -> None:
        if self.settings.run_url is not None:
            parts = urlsplit(self.settings.run_url)
            if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
                self._find(NOTE, "the token goes over the network unencrypted", "https:// in RECALL_RUN_URL")
        last = await self._ask("last_call") if self._adopted else []
        if wanted:
            self._find(OK, "takes the token, and refuses who has none")
        elif last and (row := last[0])["outcome"] in ("answered", "accepted", "busy", "gone", "failed", "refused"):
            self._find(OK, f"the last call, {relative(row['ended_at'], row['now'])}, was let in with its token: {row['outcome']}")
        else:
            trouble = f" (the last call: {last[0]['outcome']}, {last[0]['reason']})" if last else ""
            todo = f"{command('check-endpoint')} --session ID, with a session that nobody is in"
            self._find(NOTE, f"whether it takes the token, a GET does not show{trouble}", todo)


POOLER_HINT = "the server's own address in RECALL_LISTEN_DSN: it must be direct"
FAILOVER_HINT = "target_session_attrs=read-write in RECALL_DSN (and RECALL_LISTEN_DSN), with all hosts"


@asynccontextmanager
async def _connected(dsn: str) -> AsyncIterator[Connection]:
    async with asyncio.timeout(CONNECT_DEADLINE + 1):
        conn = await psycopg.AsyncConnection.connect(**connection_info(dsn, "recall-worker doctor"), row_factory=dict_row)
    try:
        conn.prepare_threshold = None
        conn.adapters.register_loader("timestamptz", Dates)
        yield conn
    finally:
        conn.pgconn.finish()


async def _backend(conn: Connection) -> int:
    [row] = await (await conn.execute(b"select pg_backend_pid() as pid")).fetchall()
    return int(row["pid"])


def _made(kind: str) -> list[str]:
    """The indexes or triggers that the migrations leave behind, by name."""
    found: dict[str, None] = {}
    pattern = rf"\b(create|drop) (?:unique )?{kind} (?:concurrently )?(?:if (?:not )?exists )?(\w+)"
    for migration in schema.migrations():
        for verb, name in re.findall(pattern, re.sub(r"--.*", "", migration.text)):
            if verb == "create":
                found[name] = None
            else:
                found.pop(name, None)
    return sorted(found)


def _without(trigger: str) -> str:
    """What is amiss while a trigger does not fire."""
    if trigger == "recall_before_insert":
        return "what is inserted is found by polls only, an agent can't schedule from inside a run, and a recall could loop"
    if trigger.startswith("recall_ring"):
        return "the application's changes are found by polls only"
    return "its work is left undone"


def _workers(count: int) -> str:
    return "one worker" if count == 1 else f"{count} workers"


def _harmless_question(settings: Settings) -> str:
    """An address to GET: of a session that does not exist, and nothing is run by a GET."""
    assert settings.run_url is not None
    base = settings.run_url.rstrip("/")
    match settings.protocol:
        case "langgraph":
            return f"{base}/threads/{uuid4()}/runs?limit=1"
        case "agno":
            return f"{base}/config"
        case _:
            return native.address(settings.run_url, f"missing-{uuid4()}")


def _credentials(settings: Settings) -> dict[str, str]:
    if settings.protocol == "langgraph":
        return langgraph.credentials(settings.run_token)
    return {"Authorization": f"Bearer {settings.run_token}"} if settings.run_token is not None else {}


def _unreachable_hint(reason: str) -> str:
    if "certificate" in reason:
        return "RECALL_CA_FILE with the authority that signed its certificate"
    return "check RECALL_RUN_URL, and that the API runs and can be reached from this host"


def verdict(findings: Sequence[Finding]) -> str:
    """The worst of their states."""
    return max((finding.state for finding in findings), key=(OK, NOTE, PROBLEM).index, default=OK)


def doctor(dsn: str | None, *, as_json: bool) -> None:
    """The command."""
    settings = setting.read(needed=["dsn"], dsn=dsn)
    for address in filter(None, (settings.dsn, settings.listen_dsn)):
        conninfo_to_dict(address)  # What can't be read is a matter of usage.
    examination = Doctor(settings)
    for name in setting.ignored():
        examination.findings.append(
            Finding("settings", NOTE, f"{name} is not a setting of recall-worker and is ignored", "check its spelling")
        )
    asyncio.run(examination.examine())
    findings = examination.findings
    if as_json:
        rows = [{"check": f.check, "state": f.state, "seen": f.seen, "todo": f.todo} for f in findings]
        print_json({"version": version("recall-worker"), "verdict": verdict(findings), "checks": rows})
    else:
        print_findings([(f.state, f.check, f.seen, f.todo) for f in findings])
    counts = {state: sum(f.state == state for f in findings) for state in (OK, NOTE, PROBLEM)}
    tell(", ".join(f"{n} {state if n == 1 or state == OK else state + 's'}" for state, n in counts.items()) + ".")
    if not examination.reached:
        raise typer.Exit(UNREACHABLE)
    if counts[PROBLEM]:
        raise typer.Exit(REFUSED)
