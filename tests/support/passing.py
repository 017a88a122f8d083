"""Time passes for one recall: all of its times move back, and its cron expression with them.

PostgreSQL's clock can't be turned by a test, and an hour can't be waited for. Written without
triggers, as nobody edits anything here.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import psycopg

Connection = psycopg.AsyncConnection[dict[str, Any]]

TIMES = """
select attname as name from pg_attribute
where attrelid = 'session_recalls'::regclass and attnum > 0 and not attisdropped
    and atttypid = 'timestamptz'::regtype
"""


async def let_pass(db: Connection, id: str, minutes: int) -> None:
    """So many minutes pass for this recall; workers are notified. A cron expression has a fixed
    minute and every hour, or the minutes are whole days."""
    names = [row["name"] for row in await (await db.execute(TIMES.encode())).fetchall()]
    moved = ", ".join(f"{name} = {name} - %(by)s" for name in names)
    async with db.transaction():
        await db.execute("set local session_replication_role = replica")
        [row] = await (
            await db.execute("select cron from session_recalls where id = %s for update", [id])
        ).fetchall()
        cron = row["cron"]
        if cron is not None and minutes % 1440:
            cron = re.sub(r"^\d+(?= \*)", lambda m: str((int(m[0]) - minutes) % 60), cron)
            assert cron != row["cron"] or minutes % 60 == 0, row["cron"]
        await db.execute(
            f"update session_recalls set {moved}, cron = %(cron)s where id = %(id)s".encode(),
            {"by": timedelta(minutes=minutes), "cron": cron, "id": id},
        )
        await db.execute("notify session_recalls")
