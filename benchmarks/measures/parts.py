"""Where a worker's CPU goes at a backlog, by part, sampled by py-spy; and what each part is for."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ..contenders import CONTENDERS, OURS, Contest
from ..figures import number, table

TITLE = "A run's microseconds, by part"
SLOTS = 200

PARTS = {
    # The first part found anywhere in a stack gets the sample.
    "settle: parameters": (
        "recall_worker/database/pipeline.py:_array",
        "recall_worker/database/ledger.py:_settle",
        "recall_worker/database/ledger.py:_row",
    ),
    "log": ("recall_worker/events.py",),
    "settle: the rest": ("recall_worker/worker/settler.py",),
    "claim": ("recall_worker/database/ledger.py:claim", "recall_worker/worker/worker.py:_look"),
    "request": (
        "aiohttp/client.py",
        "aiohttp/client_reqrep.py",
        "aiohttp/http_writer.py",
        "aiohttp/connector.py",
    ),
    "answer": ("aiohttp/",),
    "wire": ("recall_worker/protocols/http.py",),
    "body, headers, reading": ("recall_worker/protocols/",),
    "PostgreSQL's answers": ("recall_worker/database/connection.py",),
    "slots, breaker, ledger": ("recall_worker/",),
    "waiting": ("selectors.py",),
    "event loop": ("asyncio/",),
}
BUYS = {
    "settle: parameters": "the row's next state and the call's mark",
    "log": "one line a run, for people and for machines",
    "settle: the rest": "batches; a verdict that is fenced by its lease",
    "claim": "the row under a lease",
    "request": "the call; a bare loop pays this, too",
    "answer": "likewise paid by a bare loop",
    "wire": "knowing whether anything was sent: may it be posted again?",
    "body, headers, reading": (
        "the endpoint's contract: key, attempt, lateness, trace; what the answer means"
    ),
    "slots, breaker, ledger": "never more than the slots; a place for each run",
    "PostgreSQL's answers": "questions as they leave, claims and settlements as they come",
    "waiting": "the system's: what is ready to be read",
    "event loop": "tasks, timers, sockets",
}


def measure(contest: Contest) -> dict[str, Any]:
    contest.present(OURS)
    ground, seconds = contest.ground, 3 if contest.ground.quick else 10
    raw = ground.scratch / "samples"
    with contest.field(OURS) as field:
        field.fill("b", CONTENDERS[OURS].speed * (seconds + 2))
        ground.sink.reset()
        field.start(SLOTS)
        ground.sink.wait(30, count=1)
        time.sleep(1)
        before, since = field.cpu(), time.monotonic_ns()
        command = [
            str(Path(sys.executable).with_name("py-spy")),
            "record",
            "-f",
            "raw",
            "-r",
            "200",
            "-d",
            str(seconds),
            "-o",
            str(raw),
            "-p",
            str(field.processes[0].pid),
        ]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            contest.missing["py-spy"] = f"{type(error).__name__}: {error}"
            return {"parts": {}, "worker_us": 0.0}
        runs = ground.sink.between(since, time.monotonic_ns())
        used = (field.cpu() - before) * 1e6 / max(1, runs)
    samples: Counter[str] = Counter()
    for line in raw.read_text().splitlines():
        stack, count = line.rsplit(" ", 1)
        samples[_part(stack)] += int(count)
    whole = sum(samples.values())
    return {
        "parts": {name: count / whole for name, count in samples.most_common()},
        "worker_us": used,
    }


def _part(stack: str) -> str:
    frames = [frame.rstrip(")").split(" (") for frame in stack.split(";") if " (" in frame]
    seen = [
        f"{place.rsplit(':', 1)[0]}:{name.rsplit('.', 1)[-1]}"
        for name, place in (frame[-2:] for frame in frames)
    ]
    for part, marks in PARTS.items():
        if any(mark in frame for mark in marks for frame in seen):
            return part
    return "other"


def report(found: dict[str, Any]) -> str:
    if not found["parts"]:
        return "py-spy is not installed.\n"
    rows = [
        [
            f"{name}: {BUYS.get(name, 'not assigned to a part')}",
            number(share * found["worker_us"]),
            f"{share * 100:.0f} %",
        ]
        for name, share in found["parts"].items()
    ]
    return (
        f"{SLOTS} slots; py-spy's sampling slows the worker down, so the shares say more than "
        "the sum:\n\n"
    ) + table(["", "µs", "share"], rows)
