"""From the commit of an insert to the request's arrival, with idle workers; and the cost of an
insert when many are idle.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

from ..contenders import BARE, OURS, PEERS, Contest, rotated
from ..figures import curve, judged, percentile, ratio, shown, spread, table

TITLE = "Waking: from commit to request"
SLOTS = 10
STATISTICS_LAG = 10.5
"""Seconds after which an idle backend has reported its counters."""


def measure(contest: Contest) -> dict[str, Any]:
    quick = contest.ground.quick
    everybody = contest.present(OURS, *PEERS)
    found: dict[str, Any] = {}
    for replicas in (1, 5) if quick else (1, 20):
        # Many short rounds: the kernel may happen to put two processes of a run on one core, and
        # leave them there.
        rounds, inserts = (1, 60) if quick else (9, 100) if replicas == 1 else (3, 120)
        names = [*everybody, BARE] if replicas == 1 else everybody
        found[str(replicas)] = {name: [] for name in names}
        for round in range(rounds):
            for name in rotated(names, round):
                found[str(replicas)][name].append(
                    _one(contest, name, replicas, inserts, counting=round == 0 and not quick)
                )
    return found


def _one(
    contest: Contest, name: str, replicas: int, inserts: int, *, counting: bool
) -> dict[str, Any]:
    ground = contest.ground
    with contest.field(name) as field:
        field.start(SLOTS, replicas)
        field.settle_down()
        if counting:
            time.sleep(STATISTICS_LAG)
        before = field.transactions(), field.server_cpu(), field.cpu()
        committed = {}
        for n in range(inserts):
            session = f"p{n}"
            committed[session] = field.insert(session)
            time.sleep(random.uniform(0.012, 0.03))
        ground.sink.wait(10, probes=inserts)
        used = field.server_cpu() - before[1], field.cpu() - before[2]
        arrived = ground.sink.probes()
        late = [
            (arrived[session] - at) / 1e6 for session, at in committed.items() if session in arrived
        ]
        if not late:
            raise RuntimeError(f"{name} does not call: {field.log()[-2000:]}")
        figures: dict[str, Any] = {
            "p50": percentile(late, 0.5),
            "p99": percentile(late, 0.99),
            "most": max(late),
            "never": inserts - len(late),
            "curve": curve(late),
            "postgres_ms": used[0] * 1000 / inserts,
            "workers_ms": used[1] * 1000 / inserts,
        }
        if counting:
            # A backend reports all its counters when it ends.
            field.stop()
            field.connection.close()
            time.sleep(0.5)
            figures["transactions"] = (field.transactions() - before[0]) / inserts - 1
        return figures


def report(found: dict[str, Any]) -> str:
    parts = []
    for replicas, by_name in found.items():
        rows = [
            [
                name,
                *(
                    shown(spread([run[figure] for run in runs]))
                    for figure in ("p50", "p99", "most", "postgres_ms", "workers_ms")
                ),
                *(
                    f"{run['transactions']:.1f}" if "transactions" in (run := runs[0]) else ""
                    for _ in "1"
                ),
            ]
            for name, runs in by_name.items()
        ]
        parts.append(
            f"At {replicas} idle replica{'s' if replicas != '1' else ''}, milliseconds:\n\n"
        )
        parts.append(
            table(
                [
                    "",
                    "p50",
                    "p99",
                    "most",
                    "PostgreSQL's CPU an insert",
                    "workers' CPU an insert",
                    "transactions an insert (besides it)",
                ],
                rows,
            )
        )
        lost = [
            f"{name} {sum(run['never'] for run in runs)}"
            for name, runs in by_name.items()
            if any(run["never"] for run in runs)
        ]
        parts.append(f"\nNot called for within ten seconds: {', '.join(lost)}.\n" if lost else "")
        parts.append("\n" + _targets(by_name))
        if BARE in by_name:
            mine, least = _of(by_name, OURS, "p50"), _of(by_name, BARE, "p50")
            best = _best(by_name, "p50")
            beside = (
                f", and it is {shown(ratio(least, _of(by_name, best, 'p50')))} times {best}'s"
                if best is not None
                else ""
            )
            parts.append(
                f"\n*{BARE}*: only what any worker must do. It listens, claims the oldest row by "
                "the shortest possible statement, calls through the same transport and writes "
                "that it has, over recall-worker's own connections to PostgreSQL: no rules of "
                "sessions, no keys, no attempts, no take-over after a crash, no log. "
                "recall-worker's p50 is"
                f" {shown(ratio(mine, least))} times as long{beside}.\n"
            )
        parts.append("\n")
    return "".join(parts)


def _targets(by_name: dict[str, Any]) -> str:
    section = ""
    for figure, target in (("p50", 0.8), ("p99", 1.0)):
        if (best := _best(by_name, figure)) is None:
            continue
        beside = ratio(_of(by_name, OURS, figure), _of(by_name, best, figure))
        section += judged(
            f"{figure} against the best peer's ({best})", beside["median"], target, unit=" ×"
        )
    return section


def _best(by_name: dict[str, Any], figure: str) -> str | None:
    peers = [name for name in by_name if name not in (OURS, BARE)]
    return min(peers, key=lambda name: spread(_of(by_name, name, figure))["median"], default=None)


def _of(by_name: dict[str, Any], name: str, figure: str) -> list[float]:
    return [run[figure] for run in by_name[name]]


def plot(found: dict[str, Any], axes: Any) -> None:
    by_name = found[next(iter(found))]
    drawn = []
    for name, runs in by_name.items():
        # The median of the rounds, step by step.
        late = [
            statistics.median(values)
            for values in zip(*(run["curve"] for run in runs), strict=True)
        ]
        drawn.append(late)
        axes.plot(late, [n / (len(late) - 1) for n in range(len(late))], label=name)
    axes.set_xscale("log")
    most = max(values[-1] for values in drawn)
    axes.set_xlim(
        0.5, 1.1 * most
    )  # Some requests are there before their inserter knows of its commit.
    ticks = [tick for tick in (0.5, 0.7, 1, 2, 3, 5, 7, 10, 20, 50, 100) if tick <= 1.1 * most]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("milliseconds from commit to request, one idle replica")
    axes.set_ylabel("share of inserts")
    axes.legend()
