"""Several workers on one PostgreSQL, on one machine: their total throughput and what limits it."""

from __future__ import annotations

from typing import Any

from ..contenders import OURS, Contest, rotated
from ..figures import number, shown, spread, table
from .backlog import run

TITLE = "Growth: workers on one PostgreSQL"
SLOTS = 50


def measure(contest: Contest) -> dict[str, Any]:
    quick = contest.ground.quick
    contest.present(OURS)
    numbers = ["1", "2"] if quick else ["1", "2", "4", "8"]
    found: dict[str, Any] = {workers: [] for workers in numbers}
    for round in range(1 if quick else 3):
        for workers in rotated(numbers, round):
            found[workers].append(run(contest, OURS, SLOTS, 1.5 if quick else 3.0, int(workers)))
    return found


def report(found: dict[str, Any]) -> str:
    rows = [
        [
            workers,
            *(
                shown(spread([run[f] for run in runs]))
                for f in (
                    "rate",
                    "worker_us",
                    "postgres_us",
                    "worker_cores",
                    "postgres_cores",
                    "idle_cores",
                )
            ),
        ]
        for workers, runs in found.items()
    ]
    section = f"{SLOTS} slots each; the sink is on the same cores:\n\n"
    section += table(
        [
            "workers",
            "runs/s",
            "workers' CPU a run, µs",
            "PostgreSQL's, µs",
            "cores the workers use",
            "cores PostgreSQL uses",
            "cores idle",
        ],
        rows,
    )
    most = max(found.values(), key=lambda runs: spread([run["rate"] for run in runs])["median"])
    postgres = spread([run["postgres_us"] for run in most])["median"]
    return section + (
        f"\nA core of PostgreSQL's is good for {number(1e6 / postgres)} runs a second at "
        f"these {number(postgres)} µs, and a worker holds four"
        " connections: see [scaling.md](scaling.md).\n"
    )
