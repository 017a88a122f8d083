"""The cost of a claim in one queue while another queue, which nobody serves, has a million rows
due: before PostgreSQL's statistics know of them, and after.
"""

from __future__ import annotations

from typing import Any

from ..contenders import OURS, Contest
from ..figures import judged, number, table
from .timers import claim_time

TITLE = "Queues: a claim beside a million due in another"
OTHERS = """
insert into session_recalls (id, session_id, call_type, trigger_at, additional_context_message,
    status, created_at, updated_at, planned_at, queue)
select 'o' || n, 'o' || n, 'once', now() - interval '1 day', 'Look at the build again.', 'pending',
    now(), now(), now() - interval '1 day', 'others'
from generate_series(1, {rows}) n"""
EMPTY, BEFORE, AFTER = "an empty table", "beside them", "beside them, analyzed"


def measure(contest: Contest) -> dict[str, Any]:
    contest.present(OURS)
    rows = 20_000 if contest.ground.quick else 1_000_000
    claims: dict[str, Any] = {}
    with contest.field(OURS) as field:
        # Statistics are made here, when they should be.
        field.connection.execute("alter table session_recalls set (autovacuum_enabled = off)")
        claims[EMPTY] = claim_time(field)
        field.connection.execute("set session_replication_role = replica")
        field.connection.execute(OTHERS.format(rows=rows).encode())
        field.connection.execute("reset session_replication_role")
        claims[BEFORE] = claim_time(field)
        field.connection.execute("analyze session_recalls")
        claims[AFTER] = claim_time(field)
    return {"rows": rows, "claims": claims}


def report(found: dict[str, Any]) -> str:
    claims = found["claims"]
    section = f"A claim of ten rows, with {found['rows']:,} rows due in a queue of others:\n\n"
    section += table(
        ["", "milliseconds, median", "least"],
        [
            [name, number(claim["ms"]["median"]), number(claim["ms"]["least"])]
            for name, claim in claims.items()
        ],
    )
    for name in (BEFORE, AFTER):
        section += "\n" + judged(
            f"claim time, {name}",
            claims[name]["ms"]["median"] / claims[EMPTY]["ms"]["median"],
            1.2,
            unit=" ×",
        )
    return section
