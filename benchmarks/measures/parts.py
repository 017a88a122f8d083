"""Where a worker's CPU goes at a backlog, by part, sampled by py-spy, and what each part is for;
and PostgreSQL's, by the connection that it works for.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ..contenders import CONTENDERS, OURS, Contest, Field
from ..figures import number, table
from ..ground import cpu

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
    "claim": ("recall_worker/database/ledger.py:claim", "recall_worker/worker/dispatcher.py"),
    "request and answer": (
        "recall_worker/protocols/http.py",
        "recall_worker/protocols/connection.py",
        "recall_worker/protocols/answer.py",
    ),
    "body, headers, reading": ("recall_worker/protocols/",),
    "PostgreSQL's answers": ("recall_worker/database/connection.py",),
    "slots, breaker, ledger": ("recall_worker/",),
    "waiting": ("selectors.py",),
    "event loop": ("asyncio/",),
}
POSTGRES = {
    "claims": "rows under leases; when the next one is due",
    "settles": "the row's next state; the call's record",
    "PostgreSQL itself": "WAL, checkpoints, vacuum; the planner's statistics",
}
BUYS = {
    "settle: parameters": "the row's next state and the call's mark",
    "log": "one line a run, for people and for machines",
    "settle: the rest": "batches; a verdict that is fenced by its lease",
    "claim": "the row under a lease",
    "request and answer": "the call, and knowing whether anything was sent",
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
        backends = _backends(field)
        postgres = {part: cpu(pids) for part, pids in backends.items()}
        whole = ground.postgres_cpu()
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
            return {"parts": {}, "worker_us": 0.0, "postgres": {}}
        runs = ground.sink.between(since, time.monotonic_ns())
        used = (field.cpu() - before) * 1e6 / max(1, runs)
        postgres = {part: cpu(pids) - postgres[part] for part, pids in backends.items()}
        postgres["PostgreSQL itself"] = ground.postgres_cpu() - whole - sum(postgres.values())
    samples: Counter[str] = Counter()
    for line in raw.read_text().splitlines():
        stack, count = line.rsplit(" ", 1)
        samples[_part(stack)] += int(count)
    whole = sum(samples.values())
    return {
        "parts": {name: count / whole for name, count in samples.most_common()},
        "worker_us": used,
        "postgres": {part: seconds * 1e6 / max(1, runs) for part, seconds in postgres.items()},
    }


def _backends(field: Field) -> dict[str, list[int]]:
    """The processes of PostgreSQL that work for the worker's connections, by what those are for.

    A connection is known by its statements, so they are looked at several times.
    """
    seen: dict[int, str] = {}
    for _ in range(20):
        for pid, text in field.connection.execute(
            "select pid, query from pg_stat_activity where application_name like 'recall-worker %'"
        ).fetchall():
            if text.startswith("with given as"):
                seen[pid] = "settles"
            elif text.startswith("with served as"):
                seen[pid] = "claims"
            else:
                seen.setdefault(pid, "renewals, LISTEN")
        time.sleep(0.05)
    found: dict[str, list[int]] = {}
    for pid, part in seen.items():
        found.setdefault(part, []).append(pid)
    return found


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
        (
            f"{SLOTS} slots; py-spy's sampling slows the worker down, so the shares say more than "
            "the sum:\n\n"
        )
        + table(["", "µs", "share"], rows)
        + _report_postgres(found.get("postgres", {}))
    )


def _report_postgres(found: dict[str, float]) -> str:
    if not found:
        return ""
    whole = sum(found.values())
    rows = [
        [
            f"{part}: {POSTGRES.get(part, '')}".removesuffix(": "),
            number(us),
            f"{us / whole * 100:.0f} %",
        ]
        for part, us in sorted(found.items(), key=lambda item: -item[1])
    ]
    return "\nPostgreSQL's, by the connection that it works for:\n\n" + table(
        ["", "µs", "share"], rows
    )
