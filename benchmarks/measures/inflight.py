"""Ten thousand runs open at once in one worker, at an API that takes a minute for each."""

from __future__ import annotations

import random
import time
from typing import Any

from ..contenders import OURS, Contest
from ..figures import number, percentile, table
from ..ground import memory

TITLE = "In flight: ten thousand open runs"


def measure(contest: Contest) -> dict[str, Any]:
    quick = contest.ground.quick
    contest.present(OURS)
    runs, hold, watched = (2_000, 30.0, 8.0) if quick else (10_000, 60.0, 20.5)
    ground = contest.ground
    with contest.field(OURS) as field:
        field.start(runs + 100, drain_timeout=300)
        field.settle_down()
        [worker] = field.processes
        ground.sink.reset(hold=hold)
        before = memory(worker.pid)
        began = time.monotonic()
        field.fill("h", runs)
        opened = ground.sink.wait(hold, held=runs)
        took = time.monotonic() - began
        held = memory(worker.pid)
        updates = "select n_tup_upd from pg_stat_user_tables where relname = 'session_recalls'"
        used = field.cpu(), ground.postgres_cpu(), field.scalar(updates)
        time.sleep(watched)
        renewed = field.scalar(updates) - used[2]
        cpu = (field.cpu() - used[0]) / watched, (ground.postgres_cpu() - used[1]) / watched
        committed = {}
        for n in range(100):
            committed[f"p{n}"] = field.insert(f"p{n}")
            time.sleep(random.uniform(0.02, 0.06))
        ground.sink.wait(5, probes=100)
        arrived = ground.sink.probes()
        late = [(arrived[s] - at) / 1e6 for s, at in committed.items() if s in arrived]
        still = ground.sink.state()["held"]
        worker.terminate()
        worker.wait(hold + 120)
        drained = time.monotonic_ns() - ground.sink.state()["answered_last"]
        fired = field.scalar(
            "select count(*) from session_recalls where status = 'fired' and session_id like 'h%'"
        )
        return {
            "runs": runs,
            "opened": opened["held"],
            "opened_in": took,
            "kib_a_run": (held - before) * 1024 / runs,
            "mib": held,
            "renewals": renewed / watched,
            "worker_cores": cpu[0],
            "postgres_cores": cpu[1],
            "open_while_probed": still,
            "p50": percentile(late, 0.5),
            "p99": percentile(late, 0.99),
            "drained_in": drained / 1e9,
            "fired": fired,
        }


def report(found: dict[str, Any]) -> str:
    rows = [
        (
            "open at once",
            (
                f"{found['opened']:,} of {found['runs']:,}, all within "
                f"{number(found['opened_in'])} s of the first insert"
            ),
        ),
        ("memory", f"{number(found['kib_a_run'])} KiB a run, {number(found['mib'])} MiB in all"),
        ("renewals", f"{number(found['renewals'])} rows a second"),
        (
            "CPU meanwhile",
            (
                f"{number(found['worker_cores'] * 100)} % of a core in the worker, "
                f"{number(found['postgres_cores'] * 100)} % in PostgreSQL"
            ),
        ),
        (
            "other recalls meanwhile, commit to request",
            f"p50 {number(found['p50'])} ms, p99 {number(found['p99'])} ms",
        ),
        (
            "draining on SIGTERM",
            (
                f"gone {number(found['drained_in'])} s after the last answer, {found['fired']:,} "
                "settled as fired"
            ),
        ),
    ]
    return table(["", ""], rows)
