"""A row with a null where DESIGN's table has none: `migrate` refuses such a table, but the
application may drop `not null` later. The row ends as failed with its reason, and nothing else is
held up by it."""

from __future__ import annotations

import pytest

from ..conftest import Connection
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint
from ..test_cli import operate
from .test_lease import eventually, promise


@pytest.mark.slow
@pytest.mark.parametrize(
    "column",
    [
        "additional_context_message",
        "session_id",
        "call_type",
        "created_at",
        "updated_at",
        "trigger_at",
        "status",
    ],
)
async def test_a_row_with_a_null(
    column: str,
    app: Application,
    db: Connection,
    database: str,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """It ends as failed, runs, or is never due, without an error of the worker's; another session's
    recall runs meanwhile; `list`, `show` and `why` print it, and `doctor` and `migrate` name it."""
    odd = await promise(app, "s1", seconds=-1)
    await db.execute(f"alter table session_recalls alter column {column} drop not null".encode())
    await db.execute(f"update session_recalls set {column} = null".encode())
    good = await promise(app, "s2", seconds=-1)
    daemon = await daemons.start()
    await eventually(db, "select from session_recalls where id = %s and status = 'fired'", (good,))
    if column in ("additional_context_message", "session_id", "call_type"):
        found = await eventually(
            db, "select reason from session_recalls where id = %s and status = 'failed'", (odd,)
        )
        assert f"{column} must not be null" in str(found["reason"])
    elif column in ("created_at", "updated_at"):
        await eventually(
            db, "select from session_recalls where id = %s and status = 'fired'", (odd,)
        )
    for command in (("list",), ("show", odd), ("why", odd), ("stats",)):
        for options in ((), ("--json",)):
            said = operate(database, *command, *options)
            assert said.status == 0 and "Traceback" not in said.err, said.err
    assert daemon.told("worker.error") == []
