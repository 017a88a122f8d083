"""Is this database the one whose recalls are to be called, or a copy of it?"""

from __future__ import annotations

from typing import Any

from ..database import identity as identities
from ..terminal import command
from .examination import NOTE, OK, PROBLEM, Examination


async def identity(exam: Examination) -> None:
    async def rows(statement: str) -> list[Any]:
        return await (await exam.conn.execute(statement.encode())).fetchall()

    exam.identity = here = await identities.ask(rows)
    if here.copy and exam.settings.allow_copy:
        seen = "this database is a copy of the one that migrate recorded, and is used all the same"
        exam.find(NOTE, f"{seen}: RECALL_ALLOW_COPY is set", command("migrate --here"))
    elif here.copy:
        exam.find(PROBLEM, identities.IS_A_COPY, identities.COPY_HINT)
    elif here.system_identifier is None:
        exam.find(
            NOTE,
            f"it is not known whether this database is a copy: {exam.role} may not run "
            "pg_control_system(), or read recall_identity",
            f"grant execute on function pg_control_system() to {exam.role}; and "
            f"grant select on recall_identity to {exam.role}",
        )
    elif not here.recorded:
        exam.find(
            NOTE,
            "which database this is was never recorded: a copy of it could not be told from it",
            command("migrate"),
        )
    else:
        exam.find(OK, "this is the database that migrate recorded, and no copy")
