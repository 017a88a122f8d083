"""What a shell offers to complete: ids and queues, from the database. Pressing the tab key shows no
error, and takes SECONDS at most."""

from __future__ import annotations

import os
import threading
from typing import Any

from .. import settings, statements

SECONDS = 2.0


def ids(dsn: str | None, beginning: str) -> list[str]:
    """Ids of recalls that begin so: of those whose time is nearest. None where there is no
    database, or anything fails."""
    return _found("complete_ids", dsn, beginning)


def queues(dsn: str | None, beginning: str) -> list[str]:
    """Names of queues that begin so, likewise."""
    return _found("complete_queues", dsn, beginning)


def _found(name: str, dsn: str | None, beginning: str) -> list[str]:
    from psycopg.rows import dict_row

    from ..database.connection import connection_info
    from ..database.setup import CommandConnection

    # The shell has started a process for this alone, which may end at any point.
    patience = threading.Timer(SECONDS, os._exit, (1,))
    patience.daemon = True
    patience.start()
    try:
        chosen = settings.read(needed=["dsn"], dsn=dsn)
        info = connection_info(chosen.dsn or "", "recall-worker completion")
        with CommandConnection[dict[str, Any]].connect(
            **info, row_factory=dict_row, prepare_threshold=None
        ) as conn:
            conn.set_up(chosen.schema)
            statement = statements.load("reads")[name].encode()
            rows = conn.execute(statement, {"beginning": beginning}).fetchall()
    except Exception:
        return []
    finally:
        patience.cancel()
    # A shell takes a line each, and shows it as it is.
    return [row["found"] for row in rows if row["found"].isprintable() and " " not in row["found"]]
