"""Migrations: adopt the application's table in place, or create it, without holding the application
up.

Owns the order in which `sql/migrations/` is applied, how long it waits for locks,
the foreign key to `sessions`, which is added by the first `migrate` that finds that table, and the
grants of the roles of `sql/roles.sql`, which are renewed where those roles exist. Each migration
runs in a transaction of its own together with its row in `recall_schema`; one with the header
`-- transaction: none` runs outside, statement by statement, and may be repeated.

The files up to number 15 are the baseline: what the migrations 0001 to 0015 from before the first
release made, in as few files as concurrent indexes allow. A database that has recorded 15, by these
files or by the earlier ones, skips them all. A baseline that was interrupted continues with the
first file that is not recorded. A database that the earlier files left below 15 is refused, as the
files that could continue it are no longer here.

It waits for a lock that blocks the application for `LOCK_PATIENCE_MS` at most: an ALTER that waits
behind an open reader makes every insert queue behind it, so it gives up and tries again. An
advisory lock keeps two `migrate`s apart. It is polled, never waited for, as the snapshot of a
waiting statement would block `create index concurrently` for ever.

Forward only. The schema records the oldest code that can work with it, so that replicas can be
upgraded one by one.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import errors, sql

from . import statements
from .database.connection import connection_info

LOCK_PATIENCE_MS = 400
"""Milliseconds, at most, to wait for a lock that blocks the application."""
INDEX_PATIENCE_MS = 5_000
"""The same outside of a transaction, where `create index concurrently` blocks nobody."""
LOCK_ID = 0x7265_6361_6C6C
"""The advisory lock that keeps two migrators apart: "recall" in ASCII."""
LOCK_PAUSE = (0.05, 0.2)
"""Seconds, drawn at random, between two tries to get that lock."""
PAUSE_FIRST, PAUSE_MOST = 0.2, 5.0
"""Seconds, at most, until the next try on a locked table: doubling from the first to the most."""
BASELINE = 15
"""The number of the baseline's last file, and so the version that the baseline makes."""

_WORKS_WITH = re.compile(r"^-- works with code from: (\d+)$", re.MULTILINE)
_OUTSIDE = re.compile(r"^-- transaction: none$", re.MULTILINE)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Migration:
    version: int
    name: str
    text: str

    @property
    def oldest_code(self) -> int:
        found = _WORKS_WITH.search(self.text)
        if found is None:
            raise ValueError(f"migration {self.name} does not say which code works with it")
        return int(found[1])

    @property
    def in_transaction(self) -> bool:
        return _OUTSIDE.search(self.text) is None


class SchemaError(Exception):
    """The schema can't be brought up to date. `hint` says what to do."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


class Pooled(SchemaError):
    """A pooler is in between: the session's settings and the migrators' lock would stay behind on
    its connection."""

    def __init__(self) -> None:
        super().__init__(
            "a pooler stands between here and PostgreSQL, "
            "and a migration needs a connection of its own",
            "recall-worker migrate --dsn with the server's own address "
            "(or give that in RECALL_LISTEN_DSN)",
        )


def migrations() -> list[Migration]:
    """All migrations that this code carries, in order."""
    return [_read(path) for path in statements.migrations()]


def _read(path: Path) -> Migration:
    number, _, name = path.stem.partition("_")
    return Migration(int(number), name, path.read_text(encoding="utf-8"))


GENERATION = statements.generation()
GRANTS = "grants of the roles recall_worker, recall_application, recall_reader"


def pending(dsn: str) -> list[str]:
    """What `migrate` would do, in words; empty where there is nothing to do. Raises psycopg.Error,
    SchemaError."""
    with _connected(dsn) as conn:
        _refuse_newer(conn)
        _refuse_older(conn)
        steps = [f"{m.version:04} {m.name}" for m in _to_apply(conn)]
        if _foreign_key_wanted(conn) and not _foreign_key_there(conn):
            steps.append("foreign key to sessions")
        if _grants_lacking(conn):
            steps.append(GRANTS)
        return steps


def migrate(
    dsn: str, say: Say = lambda _: None, patience: float = 600.0, *, roles: bool = False
) -> list[str]:
    """Bring the schema up to date; returns what was done. Repeated and concurrent calls are safe.

    `patience`: seconds of trying to get locks (the application's, another migrator's) before
    SchemaError. `roles`: also create the roles of `sql/roles.sql`; where they exist, their grants
    follow the schema in any case. Raises Pooled where the DSN leads through a pooler.
    """
    until = time.monotonic() + patience
    with _connected(dsn) as conn:
        if conn.execute("select pg_backend_pid()").fetchone() != (conn.pgconn.backend_pid,):
            raise Pooled
        # An index waits for open transactions, even where the account's statements must be short.
        conn.execute("set statement_timeout = 0")
        _refuse_standby(conn)
        _meet(conn, say, until)
        # The functions keep the table's schema, whatever search_path the application uses.
        conn.execute(
            "select set_config('search_path', "
            "quote_ident(coalesce(n.nspname, current_schema())) || ', pg_temp', false) "
            "from (select 1) one left join pg_class c on c.oid = to_regclass('session_recalls') "
            "left join pg_namespace n on n.oid = c.relnamespace"
        )
        _refuse_newer(conn)
        _refuse_older(conn)
        _refuse_strange_table(conn)
        _create_record(conn)
        done = []
        for migration in _to_apply(conn):
            say(f"{migration.version:04} {migration.name}")
            _patiently(conn, say, until, lambda m=migration: _apply(conn, m))  # type: ignore[misc]
            done.append(f"{migration.version:04} {migration.name}")
        if _foreign_key_wanted(conn) and not _foreign_key_there(conn):
            say("foreign key to sessions")
            _patiently(conn, say, until, lambda: _add_foreign_key(conn))
            _validate_foreign_key(conn, say)
            done.append("foreign key to sessions")
        if roles or _grants_lacking(conn):
            say(GRANTS)
            conn.add_notice_handler(lambda notice: say(f"{notice.message_primary}"))
            conn.execute(statements.text("roles").encode())
            done.append(GRANTS)
        return done


def _grants_lacking(conn: psycopg.Connection[tuple[object, ...]]) -> bool:
    """Whether the roles got their grants here before, and there is now a column or a table that the
    worker's role may not write.

    Six columns it may never write: those that define a recall. See sql/roles.sql.
    """
    return conn.execute(
        "select exists (select from pg_roles r "
        "join pg_attribute a on a.attrelid = to_regclass('session_recalls') "
        "where r.rolname = 'recall_worker' and has_table_privilege(r.oid, a.attrelid, 'delete') "
        "and a.attnum > 0 and not a.attisdropped "
        "and (not has_column_privilege(r.oid, a.attrelid, a.attnum, 'update') "
        "and a.attname <> all ('{id,session_id,call_type,internal_comment,"
        "additional_context_message,created_at}') "
        "or not has_table_privilege(r.oid, to_regclass('recall_chores'), 'update')))"
    ).fetchone() == (True,)


def _connected(dsn: str) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(**connection_info(dsn, "recall-worker migrate"), prepare_threshold=None)


def _applied(conn: psycopg.Connection[tuple[object, ...]]) -> set[int]:
    """The numbers of the migrations that the database has recorded."""
    if conn.execute("select to_regclass('recall_schema')").fetchone() == (None,):
        return set()
    return {int(str(row[0])) for row in conn.execute("select version from recall_schema")}


def _to_apply(conn: psycopg.Connection[tuple[object, ...]]) -> list[Migration]:
    """The migrations that the database has not recorded, in order; none up to 15 where that is."""
    done = _applied(conn)
    skipped = BASELINE if BASELINE in done else 0
    return [m for m in migrations() if m.version > skipped and m.version not in done]


def _create_record(conn: psycopg.Connection[tuple[object, ...]]) -> None:
    conn.execute(
        "create table if not exists recall_schema (version integer primary key, "
        "name text not null, oldest_code integer not null, "
        "applied_at timestamptz not null default now())"
    )


def _meet(conn: psycopg.Connection[tuple[object, ...]], say: Say, until: float) -> None:
    waits = False
    while conn.execute("select pg_try_advisory_lock(%s)", (LOCK_ID,)).fetchone() != (True,):
        if not waits:
            say("another migrate is at work; waiting for it")
            waits = True
        if time.monotonic() > until:
            raise SchemaError(
                "another migrate holds the lock",
                "see who: select pid from pg_locks where locktype = 'advisory'",
            )
        time.sleep(random.uniform(*LOCK_PAUSE))


def _patiently(
    conn: psycopg.Connection[tuple[object, ...]], say: Say, until: float, act: Callable[[], None]
) -> None:
    pause = PAUSE_FIRST
    while True:
        try:
            return act()
        except (errors.LockNotAvailable, errors.DeadlockDetected):
            if time.monotonic() > until:
                raise SchemaError(
                    "session_recalls could not be locked: a transaction has been open all the time",
                    "find it in pg_stat_activity (state 'idle in transaction', oldest xact_start), "
                    "end it, and migrate again",
                ) from None
            say("the table is in use by a longer transaction; trying again")
            # During the pause, statements that queued behind us can run.
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(PAUSE_MOST, pause * 2)


def _apply(conn: psycopg.Connection[tuple[object, ...]], migration: Migration) -> None:
    record = "insert into recall_schema (version, name, oldest_code) values (%s, %s, %s)"
    row = (migration.version, migration.name, migration.oldest_code)
    if migration.in_transaction:
        with conn.transaction():
            conn.execute(f"set local lock_timeout = {LOCK_PATIENCE_MS}")
            conn.execute(migration.text.encode())
            conn.execute(record, row)
        return
    conn.execute(f"set lock_timeout = {INDEX_PATIENCE_MS}")
    try:
        _drop_invalid_indexes(conn)
        for statement in re.split(r";\s*(?:\n|$)", migration.text):
            if re.sub(r"--.*", "", statement).strip():
                conn.execute(statement.encode())
        conn.execute(record, row)
    finally:
        conn.execute("set lock_timeout = 0")


def _drop_invalid_indexes(conn: psycopg.Connection[tuple[object, ...]]) -> None:
    """Drop what an interrupted `create index concurrently` leaves behind: an index that costs
    writes and serves no query."""
    left = conn.execute(
        "select c.relname from pg_index i join pg_class c on c.oid = i.indexrelid "
        "where i.indrelid in (to_regclass('session_recalls'), to_regclass('recall_attempts')) "
        "and not i.indisvalid and c.relname like 'idx\\_recall%'"
    ).fetchall()
    for (name,) in left:
        conn.execute(
            sql.SQL("drop index concurrently if exists {}").format(sql.Identifier(str(name)))
        )


def _refuse_standby(conn: psycopg.Connection[tuple[object, ...]]) -> None:
    if conn.execute("select pg_is_in_recovery()").fetchone() == (True,):
        raise SchemaError(
            "this PostgreSQL is a standby: it takes no writes",
            "give the primary's address in RECALL_DSN",
        )


def _refuse_newer(conn: psycopg.Connection[tuple[object, ...]]) -> None:
    if not _applied(conn):
        return
    row = conn.execute("select max(version), max(oldest_code) from recall_schema").fetchone()
    assert row is not None
    if int(str(row[1])) > GENERATION:
        raise SchemaError(
            f"the schema is at version {row[0]} and works with code from generation {row[1]} on; "
            f"this is {GENERATION}",
            "upgrade recall-worker on this host",
        )


def _refuse_older(conn: psycopg.Connection[tuple[object, ...]]) -> None:
    """Refuse a schema that the files from before the baseline began and did not complete.

    They were numbered from 1 and the baseline's are not, so a number below the baseline's first
    tells such a schema from a baseline that was interrupted.
    """
    done = _applied(conn)
    if done and BASELINE not in done and min(done) < migrations()[0].version:
        raise SchemaError(
            f"the schema is at version {max(done)}, made by a recall-worker from before the first "
            f"release; this one can continue from version {BASELINE} only",
            "with that recall-worker, or a later one whose last migration is "
            f"{BASELINE:04}: recall-worker migrate; then migrate again with this one",
        )


_EXPECTED = {
    "id": "text",
    "session_id": "text",
    "call_type": "text",
    "trigger_at": "timestamp with time zone",
    "interval_seconds": "integer",
    "internal_comment": "text",
    "additional_context_message": "text",
    "status": "text",
    "created_at": "timestamp with time zone",
    "updated_at": "timestamp with time zone",
}


def _refuse_strange_table(conn: psycopg.Connection[tuple[object, ...]]) -> None:
    rows = conn.execute(
        "select attname, format_type(atttypid, atttypmod) from pg_attribute "
        "where attrelid = to_regclass('session_recalls') and attnum > 0 and not attisdropped"
    ).fetchall()
    if not rows:
        return
    found = {str(name): str(kind) for name, kind in rows}
    # varchar works as well as text, and a wider integer as well as a narrow one.
    wrong = [
        f"{name} {kind} (found: {found.get(name, 'nothing')})"
        for name, kind in _EXPECTED.items()
        if found.get(name) != kind
        and not (kind == "text" and found.get(name, "").startswith("character varying"))
        and not (kind == "integer" and found.get(name) == "bigint")
    ]
    if conn.execute(
        "select relkind::text from pg_class where oid = to_regclass('session_recalls')"
    ).fetchone() != ("r",):
        wrong.append("an ordinary table (found: a view, or a partitioned or foreign table)")
    if wrong:
        raise SchemaError(
            "the table session_recalls is not the one that recall-worker knows; it expects "
            + ", ".join(wrong),
            "check that RECALL_DSN names the right database and search_path",
        )


def _foreign_key_wanted(conn: psycopg.Connection[tuple[object, ...]]) -> bool:
    """Whether there is a sessions table whose id can be referenced: one with another type of id
    belongs to something else."""
    return conn.execute(
        "select exists (select from pg_index i "
        "join pg_attribute a on a.attrelid = i.indrelid and a.attname = 'id' "
        "where i.indrelid = to_regclass('sessions') and i.indisunique and i.indisvalid "
        "and i.indpred is null and i.indnkeyatts = 1 and i.indkey[0] = a.attnum "
        "and a.atttypid in ('text'::regtype, 'varchar'::regtype))"
    ).fetchone() == (True,)


def _foreign_key_there(conn: psycopg.Connection[tuple[object, ...]]) -> bool:
    return conn.execute(
        "select exists (select from pg_constraint where conrelid = to_regclass('session_recalls') "
        "and confrelid = to_regclass('sessions') and contype = 'f')"
    ).fetchone() == (True,)


def _add_foreign_key(conn: psycopg.Connection[tuple[object, ...]]) -> None:
    with conn.transaction():
        conn.execute(f"set local lock_timeout = {LOCK_PATIENCE_MS}")
        conn.execute("lock table session_recalls in share row exclusive mode")
        conn.execute(
            "alter table session_recalls add constraint session_recalls_session_id_fkey "
            "foreign key (session_id) references sessions (id) on delete cascade not valid"
        )


def _validate_foreign_key(conn: psycopg.Connection[tuple[object, ...]], say: Say) -> None:
    try:
        conn.execute(
            "alter table session_recalls validate constraint session_recalls_session_id_fkey"
        )
    except errors.ForeignKeyViolation:
        say(
            "some old recalls belong to no session: the foreign key holds for new rows only, "
            "until they are deleted"
        )
