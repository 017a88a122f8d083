"""One worker at full speed for minutes: how large tables and indexes grow, and whether it gets
slower; once with every row kept, once with a worker that prunes: there rows, pages and latency
should stop growing.
"""

from __future__ import annotations

import time
from typing import Any

from ..contenders import OURS, Contest
from ..figures import number, percentile, table

TITLE = "Endurance"
SLOTS = 200
WAITING_MOST = 600
"""The most rows that wait at a time."""
BATCH = 200
EVERY = 5.0
RETENTION = 20
"""Seconds for which the worker that prunes keeps ended recalls."""
PHASES = {"kept": 80.0, "pruned": 180.0}
"""Seconds of each. PostgreSQL vacuums once a minute at most: three times show whether anything
still grows.
"""
SIZES = """
select json_object_agg(c.relname, json_build_object(
    'mib', round(pg_relation_size(c.oid) / 1048576.0, 2),
    'dead', coalesce(s.n_dead_tup, 0), 'live', coalesce(s.n_live_tup, 0),
    'updates', coalesce(s.n_tup_upd, 0), 'hot', coalesce(s.n_tup_hot_upd, 0),
    'autovacuums', coalesce(s.autovacuum_count, 0)))
from pg_class c left join pg_stat_user_tables s on s.relid = c.oid
where c.relkind in ('r', 'i') and c.relname ~ 'recall' and pg_relation_size(c.oid) > 0"""
TABLES = ("session_recalls", "recall_attempts")


def measure(contest: Contest) -> dict[str, Any]:
    contest.present(OURS)
    return {
        phase: _phase(contest, phase, 20.0 if contest.ground.quick else seconds)
        for phase, seconds in PHASES.items()
    }


def _phase(contest: Contest, phase: str, seconds: float) -> dict[str, Any]:
    ground = contest.ground
    samples: list[dict[str, Any]] = []
    with contest.field(OURS) as field:
        field.start(SLOTS, **({"prune": f"{RETENTION}s"} if phase == "pruned" else {}))
        field.settle_down()
        began, sampled_at, inserted, counted = time.monotonic(), time.monotonic(), 0, 0
        committed: dict[str, int] = {}
        used = field.cpu(), ground.postgres_cpu()
        while time.monotonic() - began < seconds:
            count = ground.sink.state()["count"]
            if inserted - count < WAITING_MOST:
                field.fill(f"e{inserted}-", BATCH)
                probe = f"p{inserted}"
                committed[probe] = field.insert(probe)
                inserted += BATCH + 1
            else:
                time.sleep(0.005)
            if (now := time.monotonic()) - sampled_at >= EVERY:
                arrived = ground.sink.probes()
                late = [(arrived[s] - at) / 1e6 for s, at in committed.items() if s in arrived]
                committed = {s: at for s, at in committed.items() if s not in arrived}
                cpu = field.cpu(), ground.postgres_cpu()
                runs = max(1, count - counted)
                samples.append(
                    {
                        "at": now - began,
                        "runs": count,
                        "rate": runs / (now - sampled_at),
                        "p50": percentile(late, 0.5) if late else None,
                        "p99": percentile(late, 0.99) if late else None,
                        "worker_us": (cpu[0] - used[0]) * 1e6 / runs,
                        "postgres_us": (cpu[1] - used[1]) * 1e6 / runs,
                        "sizes": field.scalar(SIZES),
                    }
                )
                sampled_at, counted, used = now, count, cpu
        ground.sink.wait(20, count=inserted)
        field.stop(kill=False)
        left = field.scalar("select count(*) from session_recalls where status <> 'fired'")
        rows = field.scalar("select count(*) from session_recalls")
    return {"samples": samples, "inserted": inserted, "left": left, "rows": rows}


def report(found: dict[str, Any]) -> str:
    # Old figures, without a phase that prunes, are those of "kept".
    phases = found if "kept" in found else {"kept": found}
    section = (
        f"{SLOTS} slots; recalls are inserted as they are run (at most {WAITING_MOST} wait).\n\n"
    )
    for phase, its in phases.items():
        how = (
            "No row was pruned"
            if phase == "kept"
            else f"`RECALL_PRUNE={RETENTION}s`, so that {its['rows']:,} rows are left"
        )
        seconds = its["samples"][-1]["at"]
        section += (
            f"- {phase}: {its['inserted']:,} recalls in {seconds:.0f} s; not settled in "
            f"the end: {its['left']}. {how}.\n"
        )
    columns = [(phase, which) for phase in phases for which in ("first", "last")]
    section += "\n" + table(
        ["", *(f"{phase}, {which} fifth" for phase, which in columns)],
        [
            [
                what,
                *(
                    _middle(_fifth(phases[phase]["samples"], which), name)
                    for phase, which in columns
                ),
            ]
            for what, name in (
                ("runs/s", "rate"),
                ("commit to request behind those that wait, p50, ms", "p50"),
                ("p99, ms", "p99"),
                ("worker's CPU a run, µs", "worker_us"),
                ("PostgreSQL's CPU a run, µs, inserts included", "postgres_us"),
            )
            if name in phases["kept"]["samples"][0]
        ],
    )
    for phase, its in phases.items():
        section += "\n" + _sizes(phase, its["samples"])
    return section


def _sizes(phase: str, samples: list[dict[str, Any]]) -> str:
    """The size of each table and index; if rows are pruned, beside its size at two thirds of the
    time, which shows what has stopped growing.
    """
    last, before, runs = (
        samples[-1]["sizes"],
        samples[len(samples) * 2 // 3]["sizes"],
        samples[-1]["runs"],
    )
    pruned = phase == "pruned"
    rows = [
        [
            name,
            number(size["mib"]),
            number(before.get(name, {"mib": 0.0})["mib"])
            if pruned
            else number(size["mib"] * 1048576 / runs),
            f"{size['dead']:,}" if size["updates"] or size["live"] else "",
            f"{size['hot'] * 100 / size['updates']:.0f} %" if size["updates"] else "",
        ]
        for name, size in sorted(last.items(), key=lambda item: -item[1]["mib"])
        if size["mib"] >= 0.1
    ]
    second = f"at {samples[len(samples) * 2 // 3]['at']:.0f} s" if pruned else "bytes a run"
    return table(
        [f"{phase}, in the end", "MiB", second, "dead rows", "updates in place (HOT)"], rows
    )


def _fifth(samples: list[dict[str, Any]], which: str) -> list[dict[str, Any]]:
    size = max(1, len(samples) // 5)
    return samples[:size] if which == "first" else samples[-size:]


def _middle(some: list[dict[str, Any]], name: str) -> str:
    values = [sample[name] for sample in some if sample[name] is not None]
    return number(percentile(values, 0.5)) if values else ""


def plot(found: dict[str, Any], axes: Any) -> None:
    phases = found if "kept" in found else {"kept": found}
    figure = axes.figure
    axes.remove()
    figure.set_size_inches(8, 6.4)
    figure.suptitle(TITLE)
    (rate, latency), (size, dead) = figure.subplots(2, 2, sharex=True)
    for (phase, its), colour in zip(phases.items(), ("C0", "C1"), strict=False):
        samples = its["samples"]
        at = [sample["at"] for sample in samples]
        rate.plot(at, [sample["rate"] for sample in samples], colour, label=phase)
        latency.plot(at, [sample["p50"] for sample in samples], colour, label=f"{phase}, p50")
        if "p99" in samples[0]:
            latency.plot(
                at,
                [sample["p99"] for sample in samples],
                colour,
                linestyle=":",
                label=f"{phase}, p99",
            )
        for what, style, wanted in (("tables", "-", True), ("indexes", "--", False)):
            mib = [
                sum(
                    one["mib"]
                    for name, one in sample["sizes"].items()
                    if (name in TABLES) is wanted
                )
                for sample in samples
            ]
            size.plot(at, mib, colour, linestyle=style, label=f"{phase}, {what}")
        for name, style in zip(TABLES, ("-", "--"), strict=True):
            thousands = [
                sample["sizes"].get(name, {"dead": 0})["dead"] / 1000 for sample in samples
            ]
            dead.plot(at, thousands, colour, linestyle=style, label=f"{phase}, {name}")
    for panel, title in (
        (rate, "runs a second"),
        (latency, "commit to request, ms"),
        (size, "MiB"),
        (dead, "dead rows, thousands"),
    ):
        panel.set_title(title, fontsize="medium")
        panel.grid(alpha=0.3)
        panel.set_ylim(bottom=0)
        panel.legend(fontsize="x-small")
    size.set_xlabel("seconds")
    dead.set_xlabel("seconds")
