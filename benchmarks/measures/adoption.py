"""Adopting a table of ten million rows, beside an application that writes all the time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import Any

import psycopg

from recall_worker.demo.demo import TABLES

from ..contenders import Contest
from ..figures import judged, table

TITLE = "Adopting a table"
FILL = """
insert into sessions select 's' || n, 'ann' from generate_series(1, {rows}) n;
insert into session_recalls
select gen_random_uuid()::text, 's' || n, (array['once', 'recurring', 'immediate'])[1 + n % 3],
    now() + (n % 100000 + 86400) * interval '1 second', case when n % 3 = 1 then 3600 end, null,
    'look at the build again', (array['pending', 'fired', 'cancelled'])[1 + n % 3], now(), now()
from generate_series(1, {rows}) n;
"""
WRITES = (
    "insert into session_recalls select gen_random_uuid()::text, %(session)s, 'once', "
    "now() + interval '1 day', null, null, 'x', 'pending', now(), now()",
    "update session_recalls set trigger_at = trigger_at + interval '1 hour', updated_at = now() "
    "where session_id = %(session)s and status = 'pending'",
    "update session_recalls set status = 'cancelled', updated_at = now() "
    "where session_id = %(session)s and status = 'pending'",
)
"""What the application does, again and again, in sessions of its own."""


class Writer(threading.Thread):
    """An application that writes without a pause; remembers how long each statement took."""

    def __init__(self, dsn: str, name: str) -> None:
        super().__init__(daemon=True)
        self.dsn, self.session = dsn, name
        self.stop = threading.Event()
        self.took: list[float] = []

    def run(self) -> None:
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            conn.execute("insert into sessions values (%s, 'ann')", [self.session])
            while not self.stop.is_set():
                for statement in WRITES:
                    began = time.monotonic()
                    conn.execute(statement.encode(), {"session": self.session})
                    self.took.append(time.monotonic() - began)


def measure(contest: Contest) -> dict[str, Any]:
    ground = contest.ground
    rows = 20_000 if ground.quick else 10_000_000
    with ground.database() as dsn:
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(TABLES.encode())
            conn.execute(FILL.format(rows=rows).encode())
            conn.execute("vacuum analyze")
            conn.execute("checkpoint")
        writers = [Writer(dsn, f"w{n}") for n in range(2)]
        for writer in writers:
            writer.start()
        time.sleep(2)
        before = [len(writer.took) for writer in writers]
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "recall_worker", "migrate"],
            env=os.environ | {"PYTHONPATH": str(ground.installed), "RECALL_DSN": dsn},
            capture_output=True,
            text=True,
            check=False,
        )
        took = time.monotonic() - began
        after = [len(writer.took) for writer in writers]
        time.sleep(2)
        for writer in writers:
            writer.stop.set()
        for writer in writers:
            writer.join(30)
        if done.returncode:
            raise RuntimeError(f"migrate failed: {done.stderr}")
    quiet = [t for writer, n in zip(writers, before, strict=True) for t in writer.took[:n]]
    during = [
        t
        for writer, first, last in zip(writers, before, after, strict=True)
        for t in writer.took[first : last + 1]
    ]
    return {
        "rows": rows,
        "seconds": took,
        "longest_before": max(quiet),
        "longest_during": max(during),
        "writes_during": len(during),
    }


def report(found: dict[str, Any]) -> str:
    section = table(
        ["rows", "migrate, seconds", "writes meanwhile", "longest before", "longest meanwhile"],
        [
            [
                f"{found['rows']:,}",
                f"{found['seconds']:.1f}",
                f"{found['writes_during']:,}",
                f"{found['longest_before'] * 1000:.0f} ms",
                f"{found['longest_during'] * 1000:.0f} ms",
            ]
        ],
    )
    return (
        section
        + "\n"
        + judged("longest stall of a writer", found["longest_during"], 1.0, unit=" s")
    )
