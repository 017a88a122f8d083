"""The cost of open pages of the console: for a worker under load beside it, and for PostgreSQL."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..contenders import OURS, Contest, Field, rotated
from ..figures import judged, number, percentile, ratio, shown, spread, table
from ..ground import ROOT, cpu, memory
from .wake import STATISTICS_LAG

TITLE = "Open pages of the console, beside a worker"
PAGES = 200
SLOTS = 20
EVERY = 0.01
"""Seconds between two inserts, at least: at most a hundred runs a second."""
WITH, WITHOUT = f"{PAGES} pages", "no page"
OPEN = (0, 1, 100)
"""Pages that are open while PostgreSQL's transactions are counted."""


def measure(contest: Contest) -> dict[str, Any]:
    quick = contest.ground.quick
    contest.present(OURS)
    found: dict[str, Any] = {WITHOUT: [], WITH: [], "transactions": {}}
    with contest.field(OURS) as field:
        field.start(SLOTS)
        field.settle_down()
        with _console(field) as (root, pid):
            # One run: what the machine does besides is the same for both.
            for round in range(2):
                for name in rotated([WITHOUT, WITH], round):
                    seconds = 10.0 if quick else 60.0
                    with _pages(root, PAGES if name == WITH else 0) as readers:
                        found[name].append(_lag(field, seconds, pid))
                    found[name][-1] |= readers
            found["mib"] = memory(pid)
            field.stop()
            for pages in OPEN:
                seconds = 10.0 if quick else 60.0
                with _pages(root, pages):
                    time.sleep(STATISTICS_LAG)
                    before = field.ground.transactions(field.dsn)
                    time.sleep(seconds)
                    after = field.ground.transactions(field.dsn)
                found["transactions"][str(pages)] = (after - before) / seconds
    return found


def _lag(field: Field, seconds: float, console: int) -> dict[str, Any]:
    """Milliseconds from each commit to its request, and the console's CPU."""
    field.ground.sink.reset()
    used = cpu([console])
    committed: dict[str, int] = {}
    began = time.monotonic()
    while (elapsed := time.monotonic() - began) < seconds:
        session = f"p{time.monotonic_ns()}"
        committed[session] = field.insert(session)
        time.sleep(max(0.0, EVERY * len(committed) - elapsed))
    field.ground.sink.wait(30, probes=len(committed))
    used = (cpu([console]) - used) / seconds
    arrived = field.ground.sink.probes()
    late = [(arrived[one] - at) / 1e6 for one, at in committed.items() if one in arrived]
    return {
        "rate": len(committed) / seconds,
        "p50": percentile(late, 0.5),
        "p99": percentile(late, 0.99),
        "most": max(late),
        "never": len(committed) - len(late),
        "console_cores": used,
    }


@contextmanager
def _console(field: Field) -> Iterator[tuple[str, int]]:
    """A console on the field's database: its address and its process, while it runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RECALL_", "PG", "PYTHON"))}
    settings = {
        "PYTHONPATH": str(field.ground.installed),
        "RECALL_DSN": field.dsn,
        "RECALL_CONSOLE_LISTEN": f"127.0.0.1:{port}",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "recall_worker", "console"],
        env=kept | settings,
        cwd=field.ground.scratch,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    root = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(root + "/healthz").close()
                break
            except OSError:
                time.sleep(0.1)
        yield root, process.pid
    finally:
        process.kill()
        process.wait()


@contextmanager
def _pages(root: str, pages: int) -> Iterator[dict[str, int]]:
    """So many open pages; afterwards, in what is yielded, the octets and events that came."""
    told: dict[str, int] = {}
    if not pages:
        yield told
        return
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.readers", root, str(pages)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        if json.loads(process.stdout.readline())["open"] != pages:
            raise RuntimeError("not all pages were opened")
        yield told
        told |= json.loads(process.communicate(timeout=60)[0])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def report(found: dict[str, Any]) -> str:
    lags = {name: found[name] for name in (WITHOUT, WITH)}
    rows = [
        [
            name,
            *(
                shown(spread([run[figure] for run in runs]))
                for figure in ("rate", "p50", "p99", "most", "console_cores")
            ),
        ]
        for name, runs in lags.items()
    ]
    section = (
        "Up to a hundred recalls a second, as many as the machine can insert; beside the worker a "
        f"console, with no open page and with {PAGES}, in turn. Milliseconds from an insert's "
        "commit to its request:\n\n"
    )
    section += table(["", "runs/s", "p50", "p99", "most", "cores the console uses"], rows) + "\n"
    lost = sum(run["never"] for runs in lags.values() for run in runs)
    section += f"Not called for within thirty seconds: {lost}.\n\n" if lost else ""
    p99 = {name: [run["p99"] for run in runs] for name, runs in lags.items()}
    beside = ratio(p99[WITH], p99[WITHOUT])["median"]
    section += judged("p99 with open pages against without", beside, 1.2, unit=" ×")
    told = found["transactions"]
    section += (
        f"\nThe console had {number(found['mib'])} MiB. PostgreSQL's transactions a second, with "
        "no worker: "
        + ", ".join(f"{number(rate)} with {pages} open pages" for pages, rate in told.items())
        + ".\n"
    )
    more = told[str(OPEN[2])] - told[str(OPEN[1])]
    return section + judged("more of them with 100 pages than with one", more, 0.2)
