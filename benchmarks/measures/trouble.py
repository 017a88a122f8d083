"""An API in trouble: a restart behind a gateway, and sessions that are gone beside one that is not.

A raw server counts requests. Its gateway answers 502 for everybody while the API is away; sessions
whose names begin with `bad` are answered as FastAPI answers a missing one, or with 503.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from recall_worker.demo.demo import TABLES

from ..contenders import Contest
from ..figures import judged, percentile, table
from ..ground import Ground

TITLE = "An API in trouble"
REPLICAS = 3
RECALLS = 200
BAD = 200
INSERT = (
    "insert into session_recalls (id, session_id, call_type, trigger_at, "
    "additional_context_message, status, created_at, updated_at) "
    "values (gen_random_uuid()::text, %s, 'once', now(), 'look', 'pending', now(), now())"
)
GATEWAY = (502, b"<html><title>502 Bad Gateway</title></html>", "text/html")
GONE = (404, b'{"detail":"Session not found"}', "application/json")
LATER = (503, b"{}", "application/json")
FINE = (200, b"{}", "application/json")
Answer = tuple[int, bytes, str]


class Api(threading.Thread):
    """Answers POSTs one by one for each connection, and counts them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.listening.getsockname()[1]
        self.away = False
        self.bad = GONE
        self.requests = 0
        self.ran: Counter[str] = Counter()
        self.arrived: dict[str, float] = {}

    def run(self) -> None:
        while True:
            conn, _ = self.listening.accept()
            threading.Thread(target=self._serve, args=(conn,), daemon=True).start()

    def _serve(self, conn: socket.socket) -> None:
        with conn, conn.makefile("rb") as read:
            while line := read.readline():
                length = 0
                while (field := read.readline().strip().lower()) != b"":
                    if field.startswith(b"content-length:"):
                        length = int(field.partition(b":")[2])
                document = json.loads(read.read(length)) if line.startswith(b"POST") else {}
                status, body, kind = self._answer(document)
                head = (
                    f"HTTP/1.1 {status} Status\r\ncontent-type: {kind}\r\n"
                    f"content-length: {len(body)}\r\n\r\n"
                )
                try:
                    conn.sendall(head.encode() + body)
                except OSError:
                    return

    def _answer(self, document: dict[str, Any]) -> Answer:
        self.requests += 1
        session = str(document.get("session_id"))
        if self.away:
            return GATEWAY
        if session.startswith("bad"):
            return self.bad
        self.ran[session] += 1
        self.arrived.setdefault(session, time.monotonic())
        return FINE


@contextmanager
def workers(ground: Ground, dsn: str, api: Api, replicas: int) -> Iterator[None]:
    """So many replicas with their default settings."""
    environ = os.environ | {
        "PYTHONPATH": str(ground.installed),
        "RECALL_DSN": dsn,
        "RECALL_RUN_URL": f"http://127.0.0.1:{api.port}/sessions/{{session_id}}/run",
    }
    command = [sys.executable, "-m", "recall_worker"]
    subprocess.run([*command, "migrate"], env=environ, check=True, capture_output=True)
    running = [
        subprocess.Popen([*command, "run"], env=environ, stderr=subprocess.DEVNULL)
        for _ in range(replicas)
    ]
    try:
        with psycopg.connect(dsn, autocommit=True) as conn:
            _until(lambda: _count(conn, "select count(*) from recall_workers") == replicas, 30)
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(60)


def _count(conn: psycopg.Connection[Any], query: str) -> int:
    row = conn.execute(query.encode()).fetchone()
    return int(row[0]) if row else 0


def _until(condition: Any, within: float) -> None:
    end = time.monotonic() + within
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {within} s")
        time.sleep(0.1)


def promise(conn: psycopg.Connection[Any], session: str) -> None:
    conn.execute("insert into sessions values (%s, 'ann') on conflict do nothing", [session])
    conn.execute(INSERT, [session])


def measure(contest: Contest) -> dict[str, Any]:
    ground = contest.ground
    return {
        "restart": restart(ground, 5.0 if ground.quick else 120.0),
        "gone": beside(ground, GONE, 5.0 if ground.quick else 60.0),
        "later": beside(ground, LATER, 5.0 if ground.quick else 60.0),
        "gateway": beside(ground, GATEWAY, 5.0 if ground.quick else 60.0),
    }


def restart(ground: Ground, away_for: float) -> dict[str, Any]:
    """The API is away for a while behind its gateway, just as many recalls fall due."""
    api = Api()
    api.start()
    with ground.database() as dsn, psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(TABLES.encode())
        with workers(ground, dsn, api, REPLICAS):
            for n in range(20):
                promise(conn, f"before{n}")
            _until(lambda: len(api.ran) == 20, 30)
            api.away, before = True, api.requests
            for n in range(RECALLS):
                promise(conn, f"s{n}")
            time.sleep(away_for)
            meanwhile = api.requests - before
            api.away, back = False, time.monotonic()
            live = "select count(*) from session_recalls where status in ('pending', 'running')"
            _until(lambda: _count(conn, live) == 0, 900)
            settled = time.monotonic() - back
        failed = _count(conn, "select count(*) from session_recalls where status = 'failed'")
    runs = [count for session, count in api.ran.items() if session.startswith("s")]
    waited = sorted(at - back for session, at in api.arrived.items() if session.startswith("s"))
    return {
        "recalls": RECALLS,
        "away": away_for,
        "failed": failed,
        "never": RECALLS - len(runs),
        "twice": sum(count > 1 for count in runs),
        "meanwhile": meanwhile,
        "half_after": percentile(waited, 0.5),
        "all_after": settled,
    }


def beside(ground: Ground, bad: Answer, lasts: float) -> dict[str, Any]:
    """One good recall four times a second beside many sessions that are answered so."""
    api = Api()
    api.bad = bad
    api.start()
    committed: dict[str, float] = {}
    with ground.database() as dsn, psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(TABLES.encode())
        with workers(ground, dsn, api, 1):
            for n in range(BAD):
                promise(conn, f"bad{n}")
            end = time.monotonic() + lasts
            n = 0
            while time.monotonic() < end:
                promise(conn, f"good{n}")
                committed[f"good{n}"] = time.monotonic()
                n += 1
                time.sleep(0.25)
            _until(lambda: all(session in api.arrived for session in committed), 120)
        kept = _count(
            conn,
            "select count(*) from session_recalls where session_id like 'bad%' "
            "and status = 'pending'",
        )
    lags = [api.arrived[session] - at for session, at in committed.items()]
    return {
        "bad": BAD,
        "good": len(lags),
        "p50": percentile(lags, 0.5),
        "p99": percentile(lags, 0.99),
        "most": max(lags),
        "kept": kept,
    }


def report(found: dict[str, Any]) -> str:
    away = found["restart"]
    words = {
        "gone": "404, as FastAPI answers a missing session",
        "later": "503",
        "gateway": "502, by a gateway",
    }
    return (
        f"A restart of {away['away']:.0f} s behind a gateway that answers 502, {REPLICAS} "
        "replicas, as so many recalls fall due:\n\n"
        + table(
            [
                *("recalls", "failed", "never run", "run twice", "requests while it was away"),
                *("half of them run after, s", "all settled after, s"),
            ],
            [
                [
                    *(str(away[n]) for n in ("recalls", "failed", "never", "twice", "meanwhile")),
                    *(f"{away[n]:.1f}" for n in ("half_after", "all_after")),
                ]
            ],
        )
        + "\n"
        + judged("failed, never run, or run twice", float(_wrong(away)), 0.0, unit="")
        + "\nFrom commit to request of good recalls, four a second, beside sessions that are "
        "answered otherwise (one replica, three slots), seconds:\n\n"
        + table(
            ["bad sessions", "answered", "good recalls", "p50", "p99", "most", "bad ones kept"],
            [
                [
                    str(one["bad"]),
                    words[name],
                    str(one["good"]),
                    *(f"{one[n]:.3f}" for n in ("p50", "p99", "most")),
                    str(one["kept"]),
                ]
                for name in words
                if (one := found.get(name))
            ],
        )
        + "\n"
        + judged("p99 beside sessions that are gone", found["gone"]["p99"], 5.0, unit=" s")
    )


def _wrong(away: dict[str, Any]) -> int:
    return int(away["failed"] + away["never"] + away["twice"])
