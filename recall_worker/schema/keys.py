"""The types of the keys: whether the domains of migration 0020 are those of the table's columns.

The application may give `session_recalls.id` or `session_id` another type at any time (text, then
uuid). The domains and functions are then made anew, by the migration's own text, which may be run
again. No column has such a domain, so they can be dropped; a running worker's prepared statements
fail once, and are prepared anew.

Never here: which types there may be. The survey of the table decides that.
"""

from __future__ import annotations

import psycopg
from psycopg import errors

from .. import statements
from .survey import SchemaError

VERSION = 20
"""The migration that makes the domains."""
STEP = "types of the keys (the columns id and session_id of session_recalls)"


def keys_differ(conn: psycopg.Connection[tuple[object, ...]]) -> bool:
    """Whether a domain is missing or of another type than its column, or its function is
    missing."""
    return conn.execute(
        "select exists (select from (values ('id', 'recall_id_type', 'recall_id'), "
        "('session_id', 'recall_session_type', 'recall_session')) k (name, domain, reader) "
        "join pg_class c on c.oid = to_regclass('session_recalls') "
        "join pg_attribute a on a.attrelid = c.oid and a.attname = k.name "
        "left join pg_type d on d.typnamespace = c.relnamespace and d.typname = k.domain "
        "and d.typtype = 'd' "
        "left join pg_proc f on f.pronamespace = c.relnamespace and f.proname = k.reader "
        "and f.prorettype = d.oid and f.pronargs = 1 and f.proargtypes[0] = 'text'::regtype "
        "where f.oid is null or d.typbasetype is distinct from ("
        "with recursive below (type) as (select a.atttypid union all select t.typbasetype "
        "from below b join pg_type t on t.oid = b.type and t.typtype = 'd') "
        "select b.type from below b join pg_type t on t.oid = b.type and t.typtype <> 'd'))"
    ).fetchone() == (True,)


def repair(conn: psycopg.Connection[tuple[object, ...]], lock_timeout_ms: int) -> None:
    """Make the domains and their functions anew. Raises SchemaError where a name is taken."""
    text = next(
        path.read_text(encoding="utf-8")
        for path in statements.migrations()
        if int(path.name[:4]) == VERSION
    )
    try:
        with conn.transaction():
            conn.execute(f"set local lock_timeout = {lock_timeout_ms}".encode())
            conn.execute(text.encode())
    except errors.RaiseException as error:
        raise SchemaError(
            error.diag.message_primary or "", error.diag.message_hint or "rename it"
        ) from None
