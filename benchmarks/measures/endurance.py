"""One worker at speed for minutes: what the tables and indexes grow to, and whether it gets slower."""

from __future__ import annotations

import time
from typing import Any

from ..contenders import OURS, Contest
from ..figures import number, percentile, table

TITLE = "Endurance"
SLOTS = 200
AHEAD = 600
"""Rows that wait at most."""
BATCH = 200
EVERY = 5.0
SIZES = """
select json_object_agg(c.relname, json_build_object(
    'mib', round(pg_relation_size(c.oid) / 1048576.0, 2), 'dead', coalesce(s.n_dead_tup, 0), 'live', coalesce(s.n_live_tup, 0),
    'updates', coalesce(s.n_tup_upd, 0), 'hot', coalesce(s.n_tup_hot_upd, 0), 'autovacuums', coalesce(s.autovacuum_count, 0)))
from pg_class c left join pg_stat_user_tables s on s.relid = c.oid
where c.relkind in ('r', 'i') and c.relname ~ 'recall' and pg_relation_size(c.oid) > 0"""


def measure(contest: Contest) -> dict[str, Any]:
    contest.present(OURS)
    ground = contest.ground
    seconds = 20.0 if ground.quick else 240.0
    samples: list[dict[str, Any]] = []
    with contest.field(OURS) as field:
        field.start(SLOTS)
        field.settle_down()
        began, told, inserted, counted = time.monotonic(), time.monotonic(), 0, 0
        committed: dict[str, int] = {}
        used = field.cpu(), ground.postgres_cpu()
        while time.monotonic() - began < seconds:
            count = ground.sink.state()["count"]
            if inserted - count < AHEAD:
                field.fill(f"e{inserted}-", BATCH)
                probe = f"p{inserted}"
                committed[probe] = field.insert(probe)
                inserted += BATCH + 1
            else:
                time.sleep(0.005)
            if (now := time.monotonic()) - told >= EVERY:
                arrived = ground.sink.probes()
                late = [(arrived[s] - at) / 1e6 for s, at in committed.items() if s in arrived]
                committed = {s: at for s, at in committed.items() if s not in arrived}
                cpu = field.cpu(), ground.postgres_cpu()
                runs = max(1, count - counted)
                samples.append(
                    {
                        "at": now - began, "runs": count, "rate": runs / (now - told), "p50": percentile(late, 0.5) if late else None,
                        "worker_us": (cpu[0] - used[0]) * 1e6 / runs, "postgres_us": (cpu[1] - used[1]) * 1e6 / runs,
                        "sizes": field.scalar(SIZES),
                    }
                )  # fmt: skip
                told, counted, used = now, count, cpu
        ground.sink.wait(20, count=inserted)
        field.stop(kill=False)
        left = field.scalar("select count(*) from session_recalls where status <> 'fired'")
    return {"samples": samples, "inserted": inserted, "left": left}


def report(found: dict[str, Any]) -> str:
    samples = found["samples"]
    first, last = samples[: max(1, len(samples) // 5)], samples[-max(1, len(samples) // 5) :]

    def middle(some: list[dict[str, Any]], name: str) -> str:
        values = [sample[name] for sample in some if sample[name] is not None]
        return number(percentile(values, 0.5)) if values else ""

    said = (
        f"{found['inserted']:,} recalls, inserted as they were run (at most {AHEAD} wait), {SLOTS} slots, {samples[-1]['at']:.0f} s;"
        f" not settled in the end: {found['left']}. No row was pruned.\n\n"
    )
    said += table(["", "first fifth", "last fifth"], [
        ["runs/s", middle(first, "rate"), middle(last, "rate")],
        ["commit to request behind those that wait, p50, ms", middle(first, "p50"), middle(last, "p50")],
        ["worker's CPU a run, µs", middle(first, "worker_us"), middle(last, "worker_us")],
        ["PostgreSQL's CPU a run, µs, inserts included", middle(first, "postgres_us"), middle(last, "postgres_us")],
    ])  # fmt: skip
    sizes = samples[-1]["sizes"]
    runs = samples[-1]["runs"]
    said += "\n" + table(["in the end", "MiB", "bytes a run", "dead rows", "updates in place (HOT)"], [
        [
            name, number(size["mib"]), number(size["mib"] * 1048576 / runs),
            f"{size['dead']:,}" if size["updates"] or size["live"] else "",
            f"{size['hot'] * 100 / size['updates']:.0f} %" if size["updates"] else "",
        ]
        for name, size in sorted(sizes.items(), key=lambda item: -item[1]["mib"])
        if size["mib"] >= 0.1
    ])  # fmt: skip
    return said


def plot(found: dict[str, Any], axes: Any) -> None:
    samples = found["samples"]
    at = [sample["at"] for sample in samples]
    axes.plot(at, [sample["rate"] for sample in samples], label="runs a second")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("runs a second")
    right = axes.twinx()
    for name in ("session_recalls", "recall_attempts", "idx_recalls_due"):
        right.plot(at, [sample["sizes"].get(name, {}).get("mib", 0) for sample in samples], "--", label=f"{name}, MiB")
    right.plot(
        at,
        [sample["sizes"].get("session_recalls", {}).get("dead", 0) / 1000 for sample in samples],
        ":",
        label="dead rows, thousands",
    )
    right.set_ylabel("MiB, thousands of rows")
    right.set_ylim(bottom=0)
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines], loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
