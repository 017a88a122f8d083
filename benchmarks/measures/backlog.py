"""Runs a second while recalls wait, and what a run costs."""

from __future__ import annotations

import time
from typing import Any

from ..contenders import CAPPED, CONTENDERS, HTTPX_LOOP, LOOP, OURS, PEERS, Contest, rotated
from ..figures import judged, number, ratio, shown, spread, table

TITLE = "Throughput: a backlog"
RAMP = 1.0
"""Seconds from the first request until counting begins."""


def measure(contest: Contest) -> dict[str, Any]:
    quick = contest.ground.quick
    peers = contest.present(*PEERS, CAPPED)
    loops = [LOOP, *contest.present(HTTPX_LOOP)]
    found: dict[str, Any] = {}
    for slots in (50,) if quick else (10, 50, 200, 1000):
        # procrastinate fetches one job at a time: more slots change nothing for it.
        names = [
            OURS,
            *loops,
            *(
                name
                for name in peers
                if slots in (10, 50, 200) and (name != "procrastinate" or slots <= 50)
            ),
        ]
        found[str(slots)] = {name: [] for name in names}
        for round in range(1 if quick else 3):
            for name in rotated(names, round):
                found[str(slots)][name].append(run(contest, name, slots, 1.5 if quick else 2.0))
    return found


def run(
    contest: Contest, name: str, slots: int, seconds: float, workers: int = 1
) -> dict[str, float]:
    """One worker, or several, at a backlog for so many seconds."""
    ground = contest.ground
    with contest.field(name) as field:
        rows = int(CONTENDERS[name].speed * (seconds + RAMP + 0.5) * min(2.0, workers))
        if rows:
            field.fill("b", rows)
            field.connection.execute("checkpoint")
        ground.sink.reset()
        field.start(slots, workers)
        if not ground.sink.wait(30, count=1)["count"]:
            raise RuntimeError(f"{name} does not call: {field.log()[-2000:]}")
        time.sleep(RAMP + (1.5 if workers > 1 else 0.0))
        since = time.monotonic_ns()
        before = field.cpu(), field.server_cpu(), _idle()
        time.sleep(seconds)
        until = time.monotonic_ns()
        worker, postgres, idle = (
            after - then
            for after, then in zip((field.cpu(), field.server_cpu(), _idle()), before, strict=True)
        )
        runs = ground.sink.between(since, until)
        took = (until - since) / 1e9
        left = ground.sink.state()["count"] < rows or not rows
        if not left:
            raise RuntimeError(f"{name}: the backlog of {rows} rows ran out")
        return {
            "rate": runs / took,
            "worker_us": worker * 1e6 / max(1, runs),
            "postgres_us": postgres * 1e6 / max(1, runs),
            "worker_cores": worker / took,
            "postgres_cores": postgres / took,
            "idle_cores": idle / took,
        }


def _idle() -> float:
    """Seconds that the machine's cores were idle, all together."""
    with open("/proc/stat", encoding="ascii") as lines:
        words = lines.readline().split()
    return (int(words[4]) + int(words[5])) / 100


def report(found: dict[str, Any]) -> str:
    section = ""
    for slots, by_name in found.items():
        mine = [run["rate"] for run in by_name[OURS]]
        rows = [
            [
                name,
                shown(spread([run["rate"] for run in runs])),
                "" if name == OURS else shown(ratio(mine, [run["rate"] for run in runs])),
                shown(spread([run["worker_us"] for run in runs])),
                ""
                if name in (LOOP, HTTPX_LOOP)
                else shown(spread([run["postgres_us"] for run in runs])),
            ]
            for name, runs in by_name.items()
        ]
        section += (
            f"{slots} slots:\n\n"
            + table(
                [
                    "",
                    "runs/s",
                    "recall-worker does ×",
                    "worker's CPU a run, µs",
                    "PostgreSQL's, µs",
                ],
                rows,
            )
            + "\n"
        )
        for name in (name for name in (LOOP, HTTPX_LOOP) if name in by_name):
            section += judged(
                f"against the {name} at {slots}",
                ratio(mine, _rates(by_name, name))["median"],
                0.9,
                at_least=True,
                unit=" ×",
            )
        for name in (name for name in ("PgQueuer", CAPPED) if name in by_name):
            section += judged(
                f"against {name} at {slots}",
                ratio(mine, _rates(by_name, name))["median"],
                2.5,
                at_least=True,
                unit=" ×",
            )
            loops = ratio([2.5 * rate for rate in _rates(by_name, name)], _rates(by_name, LOOP))[
                "median"
            ]
            if loops > 1:
                section += (
                    f"  (2.5 × as many would be {number(loops)} × the bare loop's, which "
                    "has no database, over the same transport.)\n"
                )
        section += "\n"
    return section


def _rates(by_name: dict[str, Any], name: str) -> list[float]:
    return [run["rate"] for run in by_name[name]]


def plot(found: dict[str, Any], axes: Any) -> None:
    names = list(dict.fromkeys(name for by_name in found.values() for name in by_name))
    for name in names:
        at = [slots for slots in found if name in found[slots]]
        found_here = [spread(_rates(found[slots], name)) for slots in at]
        bars = [
            [f["median"] - f["least"] for f in found_here],
            [f["most"] - f["median"] for f in found_here],
        ]
        axes.errorbar(
            [int(slots) for slots in at],
            [f["median"] for f in found_here],
            yerr=bars,
            marker="o",
            capsize=3,
            label=name,
        )
    axes.set_xscale("log")
    axes.set_xticks([int(slots) for slots in found], list(found))
    axes.set_xlabel("slots (requests open at once)")
    axes.set_ylabel("runs a second")
    axes.set_ylim(bottom=0)
    axes.legend()
