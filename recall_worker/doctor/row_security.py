"""Does row security hide rows from the worker, or keep it from writing them?

PostgreSQL says nothing of a row that a policy hides: such a recall is never called, and nobody is
told. Which rows are hidden can't be seen by whom they are hidden from; so the policies themselves
are read. Only one that is always true (`using (true)`) shows every row for certain.
"""

from __future__ import annotations

from .examination import PROBLEM, Examination

TABLES = (
    "session_recalls",
    "recall_attempts",
    "recall_workers",
    "recall_endpoints",
    "recall_actions",
    "recall_outbox",
    "recall_subscriptions",
    "recall_schema",
)
READ_ONLY = ("recall_schema",)
"""What a worker only reads."""


async def row_security(exam: Examination) -> None:
    """Find each table on which row security applies to this account and does not let it see, and
    write, every row."""
    for row in await exam.ask("row_security", tables=list(TABLES)):
        table, role = row["table"], exam.role
        if row["sees"] and (row["writes"] or table in READ_ONLY):
            continue
        if row["sees"]:
            seen = f"row security on {table} keeps {role} from writing some rows, or all"
        else:
            missed = (
                "recalls that it hides are never called"
                if table == "session_recalls"
                else "rows that it hides are missing from what the worker decides by"
            )
            seen = f"row security is active on {table} for {role}: {missed}"
        how = (
            f"alter table {table} no force row level security (it owns the table)"
            if row["owned"] and row["forced"]
            else f"alter role {role} bypassrls"
        )
        policy = f"create policy worker on {table} to {role} using (true) with check (true)"
        exam.find(PROBLEM, seen, f"{how}; or {policy}")
