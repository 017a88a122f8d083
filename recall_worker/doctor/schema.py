"""Is the schema as this code was released with: migrations, tables, columns, indexes, constraints,
triggers, functions, rights?

What differs is found by `schema.catalog`, the same that `migrate` repairs by. Never here: a
description of the schema.
"""

from __future__ import annotations

import asyncio
import re

import psycopg
from psycopg import errors

from .. import schema as migrating
from .. import statements
from ..database.connection import OF_THE_SCHEMA, error_text
from ..schema.released import RECALLS, released
from ..terminal import command
from .examination import NOTE, OK, PROBLEM, Examination
from .row_security import row_security

NAMED_MOST = 10
"""Differences that are named one by one; of more, those of one kind and table go into one line."""


async def schema(exam: Examination) -> None:
    exam.adopted = True
    where = exam.settings.schema
    try:
        left = await asyncio.to_thread(migrating.pending, exam.transactions_dsn, schema=where)
        exam.differences = await asyncio.to_thread(
            migrating.differences, exam.transactions_dsn, schema=where
        )
        most = await asyncio.to_thread(migrating.most_pending, exam.transactions_dsn, schema=where)
    except migrating.Refused as error:
        for blocker in error.blockers:
            exam.find(PROBLEM, blocker.what, blocker.todo)
        exam.adopted = False
        return
    except migrating.SchemaError as error:
        exam.find(PROBLEM, str(error), error.hint)
        return
    named = {difference.what for difference in exam.differences}
    left = [step for step in left if step not in named]
    if left:
        exam.find(PROBLEM, "to be done: " + ", ".join(left), command("migrate"))
        if len(left) >= len(migrating.migrations()):
            exam.adopted = False
            return
    others = [d for d in exam.differences if d.kind != "trigger"]
    for seen, todo in _lines(others):
        exam.find(PROBLEM, seen, todo or command("migrate"))
    told = {difference.name for difference in others if difference.kind == "index"}
    for row in await exam.ask("invalid_indexes", tables=list(released().tables)):
        if row["name"] not in told:
            exam.find(
                PROBLEM,
                f"index {row['name']} is invalid: it slows writes down and no query uses it",
                f"reindex index concurrently {row['name']}",
            )
    for row in await exam.ask("constraints"):
        old = (
            "delete the old recalls that belong to no session, then " if row["foreign_key"] else ""
        )
        todo = f"{old}alter table {row['table']} validate constraint {row['name']}"
        exam.find(NOTE, f"constraint {row['name']} holds for new rows only", todo)
    if not left and not others:
        several = f"; a session may have up to {most} pending recalls" if most > 1 else ""
        exam.find(OK, f"version {migrating.GENERATION}, up to date{several}")


def _lines(found: list[migrating.Difference]) -> list[tuple[str, str | None]]:
    """What is seen, and what to do where `migrate` is not enough. After a tool has dropped
    everything, a line for each column says less than one for all."""
    if len(found) <= NAMED_MOST:
        return [(difference.sentence, difference.todo) for difference in found]
    groups: dict[tuple[str, str, str, str | None], list[str]] = {}
    for difference in found:
        said = difference.what.replace(difference.name, "{}", 1)
        groups.setdefault((said, difference.harm, difference.table, difference.todo), []).append(
            difference.name
        )
    return [
        (f"{said.replace('{}', ', '.join(names), 1)}: {harm}", todo)
        for (said, harm, _, todo), names in groups.items()
    ]


async def triggers(exam: Examination) -> None:
    wrong = [difference for difference in exam.differences if difference.kind == "trigger"]
    for difference in wrong:
        exam.find(PROBLEM, difference.sentence, command("migrate"))
    if not wrong:
        exam.find(OK, f"all {len(released().tables[RECALLS].triggers)} are there and enabled")


async def rights(exam: Examination) -> None:
    """EXPLAIN checks the rights that a statement needs, and runs nothing."""
    denied: dict[str, list[str]] = {}
    asked = 0
    # Only a worker that prunes deletes recalls. It counts nothing first, as the command does.
    pruning = (
        {
            f"prune: {name}": text
            for name, text in statements.load("prune").items()
            if name != "count"
        }
        if exam.settings.keep
        else {}
    )
    # Only a worker that has somebody to tell takes entries of the outbox.
    telling = (
        {f"tell: {name}": text for name, text in statements.load("outbox").items()}
        if exam.settings.failure_url is not None
        else {}
    )
    for name, statement in (statements.load("ledger") | pruning | telling).items():
        values = dict.fromkeys(re.findall(r"%\((\w+)\)s", statement))
        try:
            await exam.conn.execute(f"explain {statement}".encode(), values)
            asked += 1
        except errors.InsufficientPrivilege as error:
            denied.setdefault(error_text(error), []).append(name)
        except psycopg.Error as error:
            if (error.sqlstate or "")[:2] != OF_THE_SCHEMA:
                raise
            # Something is missing, or of another type. The check `schema` says so.
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
    await row_security(exam)
