"""Starting: the help, and from the start of a process to its first call."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from ..contenders import OURS, PEERS, Contest, rotated
from ..figures import judged, shown, spread, table

TITLE = "Starting"
HELP = "recall-worker --help"


def measure(contest: Contest) -> dict[str, Any]:
    quick = contest.ground.quick
    names = contest.present(OURS, *PEERS)
    found: dict[str, Any] = {name: [] for name in (HELP, *names)}
    for round in range(3 if quick else 7):
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "recall_worker", "--help"],
            env={"PYTHONPATH": str(contest.ground.installed)},
            check=True,
            capture_output=True,
        )
        found[HELP].append(time.monotonic() - began)
        for name in rotated(names, round):
            with contest.field(name) as field:
                contest.ground.sink.reset()
                field.insert("p")
                began_at = time.monotonic_ns()
                field.start(10)
                contest.ground.sink.wait(20, probes=1)
                found[name].append((contest.ground.sink.probes()["p"] - began_at) / 1e9)
    return found


def report(found: dict[str, Any]) -> str:
    rows = [
        [name if name == HELP else f"{name}, to its first call", shown(spread(took))]
        for name, took in found.items()
    ]
    section = table(["", "seconds"], rows) + "\n"
    section += judged(HELP, spread(found[HELP])["median"], 0.3, unit=" s")
    return section + judged(
        "ready to claim (its first call has been made)",
        spread(found[OURS])["median"],
        1.0,
        unit=" s",
    )
