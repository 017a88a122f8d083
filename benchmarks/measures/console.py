"""The console before a table of a million recalls: each page and each filter, how soon a change is
shown, what open pages cost PostgreSQL, and the process's memory.
"""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg

from recall_worker.demo.demo import TABLES

from ..contenders import Contest
from ..figures import number, percentile, shown, spread, table
from ..ground import Ground, cpu, memory

TITLE = "The console before a million recalls"
FILL = """
insert into sessions select 's' || n, 'user-' || n % 1000 from generate_series(1, {rows}) n;
insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds,
    additional_context_message, status, created_at, updated_at)
select md5(n::text)::uuid::text, 's' || n, case when n % 9 = 0 then 'recurring' else 'once' end,
    case when n % 3 = 0 then now() + (n % 100000 + 3) * interval '7 seconds'
        else now() - (n % 100000) * interval '60 seconds' end,
    case when n % 9 = 0 then 3600 end, 'look at the build again',
    case when n % 3 = 0 then 'pending' when n % 20 = 1 then 'failed'
        when n % 50 = 2 then 'cancelled' else 'fired' end,
    now() - interval '1 day', now() - (n % 100000) * interval '60 seconds'
from generate_series(1, {rows}) n;
"""
PAST = """
update session_recalls set ended_at = updated_at, reason = 'HTTP 422: refused',
    last_outcome = case when status = 'failed' then 'refused' when status = 'fired' then 'answered'
    end where status <> 'pending';
update session_recalls set paused_at = now() where status = 'pending' and left(id, 2) = 'aa';
update session_recalls set deferrals = 2, last_outcome = 'busy', reason = 'its session is busy'
where status = 'pending' and left(id, 2) = 'ab';
update session_recalls set queue = 'mail' where left(id, 2) = 'ac';
insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome, session_id, worker,
    lease, scheduled_for, missed, called_at, last_called_at, ended_at, reason, settled)
select r.id, 1, 0, 1, 'refused', r.session_id, 'w', gen_random_uuid(), now(), 0, now(), now(),
    now() - n * interval '1 hour' / {failures}, 'HTTP 422: refused ' || n % 7, 'failed'
from (select id, session_id, row_number() over () as n from session_recalls
    where status = 'failed' limit {failures}) r order by n desc;
"""
PAGES = (
    *("/", "/agenda", "/agenda?span=week", "/agenda?queue=mail", "/workers", "/queues"),
    *("/failures", "/failures?window=24h", "/failures?window=7d", "/settings"),
    *("/recalls/{id}", "/recalls?id={beginning}", "/recalls", "/recalls?offset=10000"),
    *(f"/recalls?state={name}" for name in ("due", "overdue", "in-run", "deferred", "paused")),
    *(f"/recalls?state={name}" for name in ("waiting", "live", "failed", "fired", "cancelled")),
    *("/recalls?state=ended", "/recalls?state=live&sort=newest", "/recalls?status=failed"),
    *(f"/recalls?outcome={name}" for name in ("answered", "refused", "busy", "unknown")),
    *("/recalls?session=s30", "/recalls?session=s99*", "/recalls?session=s99*&state=paused"),
    *("/recalls?user=user-7", "/recalls?queue=mail", "/recalls?queue=mail&state=live"),
    *("/recalls?queue=none&state=live", "/recalls?queue=none&state=failed"),
    *("/recalls?since=1h", "/recalls?since=1h&state=failed", "/recalls?outcome=busy&state=live"),
    "/bulk/retry?state=failed&session=s22",
)
PORT = 19465


def measure(contest: Contest) -> dict[str, Any]:
    ground = contest.ground
    rows = 20_000 if ground.quick else 1_000_000
    found: dict[str, Any] = {"rows": rows, "pages": {}}
    with ground.database() as dsn, psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(TABLES.encode())
        environ = {"PYTHONPATH": str(ground.installed), "RECALL_DSN": dsn}
        _run(environ, "migrate")
        conn.execute("alter table session_recalls disable trigger user")
        conn.execute(FILL.format(rows=rows).encode())
        conn.execute(PAST.format(failures=rows // 30).encode())
        conn.execute("alter table session_recalls enable trigger user")
        conn.execute("vacuum analyze")
        conn.execute("checkpoint")
        [(id,)] = conn.execute("select id from session_recalls where session_id = 's30'")
        with _console(ground, environ) as process:
            found["memory"] = {"when it began": memory(process.pid)}
            for path in PAGES:
                place = path.format(id=id, beginning=id[:8])
                found["pages"][path] = _asked(place, 2 if ground.quick else 7)
            found["memory"]["after all pages"] = memory(process.pid)
            found["shown"] = [_shown(conn, n) for n in range(3 if ground.quick else 20)]
            found["open"] = {
                name: _open(ground, dsn, process.pid, list(paths))
                for name, paths in (
                    ("none", []),
                    ("one", ["part=now"]),
                    ("a hundred", ["part=now"] * 100),
                    ("a hundred lists", ["part=recalls&state=live"] * 100),
                    ("a hundred agendas", ["part=agenda"] * 100),
                )
            }
            found["memory"]["after a hundred open pages"] = memory(process.pid)
    return found


def _run(environ: dict[str, str], *words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recall_worker", *words],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: {done.stderr}")


@contextmanager
def _console(ground: Ground, environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with (ground.scratch / "console-log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "recall_worker", "console"],
            env=os.environ | environ | {"RECALL_CONSOLE_LISTEN": str(PORT)},
            stderr=log,
        )
        try:
            until = time.monotonic() + 60
            while True:
                try:
                    _get("/healthz")
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > until:
                        raise
                    time.sleep(0.1)
            yield process
        finally:
            process.terminate()
            process.wait()


def _get(path: str) -> int:
    """Asks for a page, whole; returns the status."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


def _asked(path: str, times: int) -> dict[str, Any]:
    """Milliseconds of a page, from the request to its last octet, and its status."""
    status, took = _get(path), []
    for _ in range(times):
        began = time.monotonic()
        status = _get(path)
        took.append((time.monotonic() - began) * 1000)
    return {"status": status, "ms": took}


@contextmanager
def _streams(paths: list[str]) -> Iterator[list[http.client.HTTPResponse]]:
    with ExitStack() as stack:
        responses = []
        for path in paths:
            connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
            stack.callback(connection.close)
            connection.request("GET", f"/live?{path}")
            responses.append(stack.enter_context(connection.getresponse()))
        yield responses


def _shown(conn: psycopg.Connection[Any], n: int) -> float:
    """Milliseconds from the commit of a recall, after some quiet seconds, until a page has it."""
    id = f"shown-{n}-{time.monotonic_ns()}"
    with _streams(["part=now"]) as [page]:
        while page.readline() != b"\n":
            pass
        time.sleep(3.2 + n % 7 / 7)
        conn.execute("insert into sessions values (%s, 'ann')", [id])
        conn.execute(
            "insert into session_recalls (id, session_id, call_type, trigger_at, "
            "additional_context_message, status, created_at, updated_at) values (%s, %s, 'once', "
            "now() + interval '1 second', 'x', 'pending', now(), now())",
            [id, id],
        )
        began = time.monotonic()
        while id.encode() not in page.readline():
            pass
        took = (time.monotonic() - began) * 1000
    conn.execute("delete from session_recalls where id = %s", [id])
    return took


def _open(ground: Ground, dsn: str, pid: int, paths: list[str]) -> dict[str, float]:
    """What PostgreSQL does in ten seconds while these pages are open, a second."""
    seconds = 3.0 if ground.quick else 10.0
    with _streams(paths) as pages:
        for page in pages[:1]:
            page.readline()
        time.sleep(4)
        before = ground.transactions(dsn), ground.postgres_cpu(), cpu([pid])
        began = time.monotonic()
        time.sleep(seconds)
        passed = time.monotonic() - began
        after = ground.transactions(dsn), ground.postgres_cpu(), cpu([pid])
    return {
        "transactions": (after[0] - before[0]) / passed,
        "postgres_ms": (after[1] - before[1]) * 1000 / passed,
        "console_ms": (after[2] - before[2]) * 1000 / passed,
    }


def report(found: dict[str, Any]) -> str:
    section = (
        f"{found['rows']:,} recalls, a third of them waiting, {found['rows'] // 30:,} failures "
        "within the last hour. Milliseconds from a request to the last octet of its page; of a "
        "search that no index serves, until it is refused (422):\n\n"
    )
    section += table(
        ["page", "status", "ms"],
        [
            [f"`{path}`", str(page["status"]), shown(spread(page["ms"]))]
            for path, page in found["pages"].items()
        ],
    )
    soon = found["shown"]
    section += (
        f"\nFrom the commit of a recall until an open page has it, after a quiet while: "
        f"{number(percentile(soon, 0.5))} ms (p50), {number(max(soon))} ms at most of "
        f"{len(soon)}.\n\nWhile pages are open, a second:\n\n"
    )
    section += table(
        ["open pages", "transactions", "PostgreSQL's CPU, ms", "the console's CPU, ms"],
        [
            [
                name,
                *(number(one[key]) for key in ("transactions", "postgres_ms", "console_ms")),
            ]
            for name, one in found["open"].items()
        ],
    )
    section += "\nResident memory: " + ", ".join(
        f"{number(value)} MiB {name}" for name, value in found["memory"].items()
    )
    return section + ".\n"
