"""Is the schema as this code needs it: migrations, indexes, constraints, triggers, rights?"""

from __future__ import annotations

import asyncio
import re

from psycopg import errors

from .. import schema as migrating
from .. import statements
from ..database.connection import error_text
from ..terminal import command
from .examination import NOTE, OK, PROBLEM, Examination


async def schema(exam: Examination) -> None:
    exam.adopted = True
    try:
        left = await asyncio.to_thread(migrating.pending, exam.dsn)
    except migrating.SchemaError as error:
        exam.find(PROBLEM, str(error), error.hint)
        return
    if left:
        exam.find(PROBLEM, "to be done: " + ", ".join(left), command("migrate"))
        if len(left) >= len(migrating.migrations()):
            exam.adopted = False
            return
    for row in await exam.ask("indexes", names=made("index")):
        wrong, todo = (
            (
                "is invalid: it slows writes down and no query uses it",
                f"reindex index concurrently {row['name']}",
            )
            if row["there"]
            else ("is missing", "create it again as sql/migrations has it (concurrently)")
        )
        if row["there"] or not left:
            exam.find(PROBLEM, f"index {row['name']} {wrong}", todo)
    for row in await exam.ask("constraints"):
        old = (
            "delete the old recalls that belong to no session, then " if row["foreign_key"] else ""
        )
        todo = f"{old}alter table {row['table']} validate constraint {row['name']}"
        exam.find(NOTE, f"constraint {row['name']} holds for new rows only", todo)
    if not left:
        exam.find(OK, f"version {migrating.GENERATION}, up to date")


async def triggers(exam: Examination) -> None:
    wrong = await exam.ask("triggers", names=made("trigger"))
    for row in wrong:
        if row["enabled"] is None:
            exam.find(
                PROBLEM,
                f"{row['name']} is missing: {_without(row['name'])}",
                "create it again as sql/migrations has it",
            )
        else:
            how = "is disabled" if row["enabled"] == "D" else "fires in replica sessions only"
            todo = f"alter table session_recalls enable trigger {row['name']}"
            exam.find(PROBLEM, f"{row['name']} {how}: {_without(row['name'])}", todo)
    if not wrong:
        exam.find(OK, f"all {len(made('trigger'))} are there and enabled")


async def rights(exam: Examination) -> None:
    """EXPLAIN checks the rights that a statement needs, and runs nothing."""
    denied: dict[str, list[str]] = {}
    asked = 0
    # Only a worker that prunes deletes recalls.
    pruning = (
        {f"prune: {name}": text for name, text in statements.load("prune").items()}
        if exam.settings.keep
        else {}
    )
    for name, statement in (statements.load("ledger") | pruning).items():
        values = dict.fromkeys(re.findall(r"%\((\w+)\)s", statement))
        try:
            await exam.conn.execute(f"explain {statement}".encode(), values)
            asked += 1
        except errors.InsufficientPrivilege as error:
            denied.setdefault(error_text(error), []).append(name)
        except (errors.UndefinedTable, errors.UndefinedColumn, errors.UndefinedFunction):
            pass  # The check `schema` says so.
    for what, names in denied.items():
        todo = (
            "grant select, insert, update, delete on all tables named session_recalls and "
            f"recall_… to {exam.role}"
        )
        exam.find(PROBLEM, f"{what} (needed to {', '.join(names)})", todo)
    if asked and not denied:
        exam.find(OK, f"{exam.role} may do all that the worker does")
    if exam.server["superuser"]:
        exam.find(
            NOTE,
            f"{exam.role} is a superuser, and need not be one",
            "use an account of its own, with rights on these tables only",
        )
    if exam.server["row_security"]:
        exam.find(
            PROBLEM,
            (
                f"row security is active on session_recalls for {exam.role}: recalls that it hides "
                "are never called"
            ),
            f"alter role {exam.role} bypassrls, or a policy that shows it every row",
        )


def made(kind: str) -> list[str]:
    """The indexes or triggers that the migrations leave behind, by name."""
    found: dict[str, None] = {}
    pattern = rf"\b(create|drop) (?:unique )?{kind} (?:concurrently )?(?:if (?:not )?exists )?(\w+)"
    for migration in migrating.migrations():
        for verb, name in re.findall(pattern, re.sub(r"--.*", "", migration.text)):
            if verb == "create":
                found[name] = None
            else:
                found.pop(name, None)
    return sorted(found)


def _without(trigger: str) -> str:
    """What does not work while a trigger does not fire."""
    if trigger == "recall_before_insert":
        return (
            "new recalls are found only by polls, an agent can't schedule from inside "
            "a run, and a recall could loop"
        )
    if trigger.startswith("recall_ring"):
        return "the application's changes are found only by polls"
    return "its work is not done"
