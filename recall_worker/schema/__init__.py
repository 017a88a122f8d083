"""Migrations: adopt the application's table in place, or create it, without holding the application
up.

Owns the order in which `sql/migrations/` is applied, how long it waits for locks, the foreign key
to the sessions, which is added where it is asked for, and the grants of the roles of
`sql/roles.sql`, which are renewed where those roles exist. Everything is looked at before the first
change (survey). What differs from the schema as released is put back after the migrations
(catalog); what is missing before them, too, as a migration may need it.

Each migration runs in a transaction of its own together with its row in `recall_schema`; one with
the header `-- transaction: none` runs outside, statement by statement, and may be repeated; one
with `-- then: FILE` is followed by `sql/FILE.sql`, in its transaction.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import errors, sql

from .. import statements
from ..database.connection import OF_THE_SCHEMA, connection_info, error_text
from ..database.identity import COPY_HINT, IS_A_COPY
from ..database.setup import CommandConnection
from . import catalog, identity, keys, slots, versions
from .catalog import Difference
from .survey import (
    Blocker,
    Reference,
    Refused,
    SchemaError,
    Survey,
    free_name,
    own_sessions,
    reference,
    survey,
)

__all__ = [
    "PENDING_MOST",
    "Blocker",
    "Difference",
    "Migration",
    "Pooled",
    "Refused",
    "SchemaError",
    "differences",
    "migrate",
    "pending",
]

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
_THEN = re.compile(r"^-- then: (\w+)$", re.MULTILINE)

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

    @property
    def then(self) -> str | None:
        """The file of `sql/` that is executed after it, in its transaction."""
        found = _THEN.search(self.text)
        return found and found[1]


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


PENDING_MOST = slots.MOST
GENERATION = statements.generation()
GRANTS = "grants of the roles recall_worker, recall_application, recall_agent, recall_reader"
STATUSES = "the statuses running and failed, which a check of the table refuses"
NO_KEY = (
    "The table has no foreign key of session_id: recalls of a session that is deleted stay. "
    "If sessions are in a table, name it: recall-worker migrate --foreign-key sessions"
)
SEVERAL_PENDING = (
    "A session has up to {most} pending recalls; two runs of one session still never overlap."
)
MANY_PENDING = (
    "No index allows a session one pending recall only, so it may have several; "
    "two runs of one session still never overlap."
)

UNLOGGED = (
    "Note: session_recalls is unlogged: a crash of PostgreSQL empties it. "
    "If recalls are to survive one: alter table session_recalls set logged"
)

Connection = psycopg.Connection[tuple[object, ...]]


RECORD = "the rows of recall_schema, the record of what was migrated"


def pending(dsn: str, *, schema: str | None = None, pending_most: int | None = None) -> list[str]:
    """What `migrate` would do, in words; empty where there is nothing to do. The options: see
    `migrate`. Raises psycopg.Error, SchemaError: Refused where the table can't be adopted, or
    worked with, as it stands."""
    with _connected(dsn, schema) as conn, _looking():
        found = _survey(conn, schema)
        strays = [stray.what for stray in catalog.strays(conn)]
        if strays and not catalog.has_record(conn):
            # What else there is to do, the record of the migrations tells.
            return strays
        _refuse_newer(conn)
        _refuse_older(conn)
        found.refuse(changes=not found.recorded)
        if pending_most is not None and found.there:
            slots.refuse_crowded(conn, pending_most)
        lost = versions.read(conn).lost
        steps = strays + ([RECORD] if lost else [])
        steps += [f"{m.version:04} {m.name}" for m in _to_apply(conn)]
        if found.narrow:
            steps.append(STATUSES)
        # Where rows stand in the way of an index, `migrate` says so, and `doctor`: it can't do it.
        steps += [
            difference.what
            for difference in _differences(conn)
            if difference.todo is None
            and not (lost and (difference.kind, difference.name) == ("table", "recall_schema"))
            and not catalog.is_blocked(conn, difference)
        ]
        if keys.VERSION in _applied(conn) and keys.keys_differ(conn):
            steps.append(keys.STEP)
        if pending_most is not None and (step := slots.step(conn, pending_most)) is not None:
            steps.append(step)
        elif pending_most is None:
            steps += [difference.what for difference in _slots(conn)]
        if catalog.rights_lacking(conn):
            steps.append(GRANTS)
        return steps


def differences(dsn: str, *, schema: str | None = None) -> list[Difference]:
    """What differs from the schema as released: for `doctor`. Raises psycopg.Error, SchemaError."""
    with _connected(dsn, schema) as conn, _looking():
        _survey(conn, schema)
        return _differences(conn) + _slots(conn)


@contextmanager
def _looking() -> Iterator[None]:
    try:
        yield
    except errors.LockNotAvailable:
        raise SchemaError(
            "the schema can't be compared with the release, as one of its tables is locked",
            "see who: select * from pg_locks where mode = 'AccessExclusiveLock'; then try again",
        ) from None


def _differences(conn: Connection) -> list[Difference]:
    """Before the first migration nothing can be missing, and of later code's schema this code does
    not know what is."""
    applied = _applied(conn)
    if not applied or max(applied) > GENERATION:
        return []
    return catalog.differences(conn, _incomplete(conn))


def _slots(conn: Connection) -> list[Difference]:
    """The same of what `migrate --slots` was told. Not before its migration, nor of a schema of
    later code."""
    applied = _applied(conn)
    return slots.differences(conn) if applied and max(applied) == GENERATION else []


def _incomplete(conn: Connection) -> int | None:
    """The version up to which the schema can be compared with the release; None: all of it."""
    version = max(_applied(conn))
    return version if version < GENERATION or _to_apply(conn) else None


def migrate(
    dsn: str,
    say: Say = lambda _: None,
    patience: float = 600.0,
    *,
    roles: bool = False,
    schema: str | None = None,
    foreign_key: str | None = None,
    here: bool = False,
    was: str | None = None,
    pending_most: int | None = None,
) -> list[str]:
    """Bring the schema up to date; returns what was done. Repeated and concurrent calls are safe.

    `patience`: seconds of trying to get locks (the application's, another migrator's) before
    SchemaError. `roles`: also create the roles of `sql/roles.sql`; where they exist, their grants
    follow the schema in any case. `schema`: the one that has the table (RECALL_SCHEMA); if not
    given, what the connection's search_path finds. `foreign_key`: the table that session_id is to
    refer to, by its id; no key is ever guessed. `here`: this database is no copy, or no longer (see
    `identity`); `was`: what it was when it was last used in this place. `pending_most`: how many
    pending recalls a session may have from now on (`--slots`); if not given, as many as before.
    Raises Refused, before the first change, where something stands in the way, and Pooled where the
    DSN leads through a pooler.
    """
    until = time.monotonic() + patience
    with _connected(dsn, schema) as conn:
        if conn.pooled:
            raise Pooled
        # An index waits for open transactions, even where the account's statements must be short.
        conn.execute("set statement_timeout = 0")
        _refuse_standby(conn)
        _meet(conn, say, until)
        found = _patient_survey(conn, schema, say, until)
        means = catalog.Means(
            say,
            lambda act: _patiently(conn, say, until, act),
            LOCK_PATIENCE_MS,
            INDEX_PATIENCE_MS,
        )
        if done := catalog.gather(conn, means):
            found = _patient_survey(conn, schema, say, until)
        _refuse_newer(conn)
        _refuse_older(conn)
        changes = (
            found.narrow
            or roles
            or foreign_key is not None
            or pending_most is not None
            or bool(_to_apply(conn))
        )
        found.refuse(changes=changes)
        if pending_most is not None and found.there:
            slots.refuse_crowded(conn, pending_most)
        to = None
        if foreign_key is not None:
            to = reference(conn, found.schema, foreign_key)
        elif not found.there:
            to = own_sessions(conn, found.schema)
        if found.recorded:
            # Where it is there, an account that may not migrate is refused here.
            _create_record(conn)
        record = versions.read(conn)
        if record.lost:
            say(RECORD)
            names = {m.version: m.name for m in migrations()}
            versions.restore(conn, record.versions, record.oldest_code, names)
            done.append(RECORD)
        if _applied(conn) and _to_apply(conn):
            # What is refused before them may be made by them.
            done += catalog.repair(conn, means, _incomplete(conn)).done
        for migration in _to_apply(conn):
            say(f"{migration.version:04} {migration.name}")
            with _explained(migration, first=not done and not _applied(conn)):
                _patiently(conn, say, until, lambda m=migration: _apply(conn, m))  # type: ignore[misc]
            done.append(f"{migration.version:04} {migration.name}")
        if found.narrow:
            say(STATUSES)
            _patiently(conn, say, until, lambda: _widen(conn))
            done.append(STATUSES)
        if max(_applied(conn), default=0) <= GENERATION:
            done += _repaired(catalog.repair(conn, means, _incomplete(conn)), say)
        if max(_applied(conn), default=0) == GENERATION:
            done += slots.bring(conn, means, pending_most)
        if keys.VERSION in _applied(conn) and keys.keys_differ(conn):
            say(keys.STEP)
            _patiently(conn, say, until, lambda: keys.repair(conn, LOCK_PATIENCE_MS))
            done.append(keys.STEP)
        catalog.hand_over(conn)
        if to is not None:
            step = f"foreign key to {to.table}"
            say(step)
            named: list[str] = []
            _patiently(
                conn, say, until, lambda: named.append(_add_foreign_key(conn, found.schema, to))
            )
            _validate_foreign_key(conn, named[0], say)
            done.append(step)
        if done:
            most: list[int] = []
            _patiently(conn, say, until, lambda: most.append(slots.most(conn)))
            _report(survey(conn, found.schema), say, most[0])
        catalog.note_one_pending(conn, means)
        if roles or catalog.rights_lacking(conn):
            say(GRANTS)
            conn.add_notice_handler(lambda notice: say(f"{notice.message_primary}"))
            conn.execute(statements.text("roles").encode())
            done.append(GRANTS)
        versions.write(conn, BASELINE)
        if (recorded := identity.record(conn, here=here, was=was)) is not None:
            say(recorded)
            done.append(recorded)
        elif here and identity.is_unknown(conn):
            raise SchemaError(
                "it can't be found out which database this is: this account may not run "
                "pg_control_system()",
                "as a superuser: grant execute on function pg_control_system() to its role",
            )
        elif identity.is_copy(conn):
            say(f"Note: {IS_A_COPY}. Try: {COPY_HINT}")
        return done


def most_pending(dsn: str, *, schema: str | None = None) -> int:
    """How many pending recalls a session may have, as `migrate --slots` was told. `schema`: see
    `migrate`. Raises psycopg.Error."""
    with _connected(dsn, schema) as conn, _looking():
        return slots.most(conn)


def is_copy(dsn: str, *, schema: str | None = None) -> bool:
    """Whether the database is a copy of the one that `migrate` has recorded. `schema`: see
    `migrate`. Raises psycopg.Error."""
    with _connected(dsn, schema) as conn:
        return identity.is_copy(conn)


def identity_text(dsn: str) -> str | None:
    """Which database this is, for `was`; None where that is not known. Raises psycopg.Error."""
    with _connected(dsn, None) as conn:
        return identity.text(conn)


def _survey(conn: CommandConnection[tuple[object, ...]], schema: str | None) -> Survey:
    """Look at everything, and in the table's schema alone from here on: the functions keep it,
    whatever search_path the application uses."""
    found = survey(conn, schema)
    conn.stay_in(found.schema)
    return found


def _patient_survey(
    conn: CommandConnection[tuple[object, ...]], schema: str | None, say: Say, until: float
) -> Survey:
    """The same, however long a table is locked exclusively, whose checks can't be read then."""
    found: list[Survey] = []
    _patiently(conn, say, until, lambda: found.append(_survey(conn, schema)))
    return found[0]


def _report(found: Survey, say: Say, most: int) -> None:
    """What a person should know of the table as it stands."""
    for key in found.keys:
        say(f"Foreign key: {key}.")
    if not found.keys:
        say(NO_KEY)
    if most > 1:
        say(SEVERAL_PENDING.format(most=most))
    elif not found.one_pending:
        say(MANY_PENDING)
    if found.required:
        say(
            f"Note: {', '.join(found.required)} must be given in every insert: "
            "recall-worker schedule and `Recalls` can't, unless they get defaults."
        )
    if found.unlogged:
        say(UNLOGGED)


def _widen(conn: Connection) -> None:
    """Let the table's check allow the two further statuses again."""
    with conn.transaction():
        conn.execute(f"set local lock_timeout = {LOCK_PATIENCE_MS}")
        conn.execute(statements.text("statuses").encode())
    conn.execute("alter table session_recalls validate constraint session_recalls_status_known")


def _repaired(repaired: catalog.Repaired, say: Say) -> list[str]:
    """What was put back. Raises SchemaError where PostgreSQL refused something."""
    for reason in repaired.blocked:
        say(f"{reason}; then migrate again")
    if repaired.refused:
        raise SchemaError(
            "; ".join(repaired.refused),
            "migrate as the owner of session_recalls, "
            "after removing what of the application's depends on it",
        )
    return repaired.done


@contextmanager
def _explained(migration: Migration, *, first: bool) -> Iterator[None]:
    """A migration that does not find what earlier ones made: that was dropped, and not put back."""
    try:
        yield
    except errors.InsufficientPrivilege:
        raise
    except psycopg.Error as error:
        if (error.sqlstate or "")[:2] != OF_THE_SCHEMA:
            raise
        if first:
            raise SchemaError(
                f"the table can't be adopted: {error_text(error)}",
                "nothing was changed: rename or drop what this names, or report it",
            ) from None
        raise SchemaError(
            f"migration {migration.version:04} can't be applied: {error_text(error)}",
            "something that recall-worker made was dropped or altered: put it back as the earlier "
            "migrations in sql/migrations made it",
        ) from None


def _connected(dsn: str, schema: str | None) -> CommandConnection[tuple[object, ...]]:
    conn = CommandConnection[tuple[object, ...]].connect(
        **connection_info(dsn, "recall-worker migrate"), prepare_threshold=None
    )
    try:
        conn.set_up(schema)
    except BaseException:
        conn.close()
        raise
    return conn


def _applied(conn: Connection) -> set[int]:
    """The numbers of the migrations that were applied. Raises SchemaError where nothing tells
    which."""
    record = versions.read(conn)
    if record.adopted and not record.versions:
        raise SchemaError(
            "session_recalls has columns of recall-worker, but nothing tells which migrations were "
            "applied: recall_schema is empty or missing, and of the migrations up to "
            f"{versions.LAST_WITHOUT_COMMENT:04} there are traces of these only: {record.evidence}",
            "restore the rows of recall_schema from where this schema comes from: "
            "pg_dump --data-only --table=recall_schema, or a dump with all tables of "
            "recall-worker; then migrate again",
        )
    return set(record.versions)


def _to_apply(conn: Connection) -> list[Migration]:
    """The migrations that the database has not recorded, in order; none up to 15 where that is."""
    done = _applied(conn)
    skipped = BASELINE if BASELINE in done else 0
    return [m for m in migrations() if m.version > skipped and m.version not in done]


def _create_record(conn: Connection) -> None:
    conn.execute(
        "create table if not exists recall_schema ("
        "version integer primary key, name text not null, "
        "oldest_code integer not null, applied_at timestamptz not null default now())"
    )


def _meet(conn: Connection, say: Say, until: float) -> None:
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


def _patiently(conn: Connection, say: Say, until: float, act: Callable[[], None]) -> None:
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


def _apply(conn: Connection, migration: Migration) -> None:
    record = "insert into recall_schema (version, name, oldest_code) values (%s, %s, %s)"
    row = (migration.version, migration.name, migration.oldest_code)
    if migration.in_transaction:
        with conn.transaction():
            conn.execute(f"set local lock_timeout = {LOCK_PATIENCE_MS}")
            # With the first migration, so that nothing is left where that is refused.
            _create_record(conn)
            conn.execute(migration.text.encode())
            if migration.then is not None:
                conn.execute(statements.text(migration.then).encode())
            conn.execute(record, row)
            versions.write(conn, BASELINE)
        return
    conn.execute(f"set lock_timeout = {INDEX_PATIENCE_MS}")
    try:
        _drop_invalid_indexes(conn)
        for statement in re.split(r";\s*(?:\n|$)", migration.text):
            if re.sub(r"--.*", "", statement).strip():
                conn.execute(statement.encode())
        with conn.transaction():
            conn.execute(record, row)
            versions.write(conn, BASELINE)
    finally:
        conn.execute("set lock_timeout = 0")


def _drop_invalid_indexes(conn: Connection) -> None:
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


def _refuse_standby(conn: Connection) -> None:
    if conn.execute("select pg_is_in_recovery()").fetchone() == (True,):
        raise SchemaError(
            "this PostgreSQL is a standby: it takes no writes",
            "give the primary's address in RECALL_DSN",
        )


def _refuse_newer(conn: Connection) -> None:
    record = versions.read(conn)
    if record.oldest_code > GENERATION:
        raise SchemaError(
            f"the schema is at version {max(record.versions)} and works with code from generation "
            f"{record.oldest_code} on; this is {GENERATION}",
            "upgrade recall-worker on this host",
        )


def _refuse_older(conn: Connection) -> None:
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


def _add_foreign_key(conn: Connection, schema: str, to: Reference) -> str:
    """Add it NOT VALID; returns its name."""
    with conn.transaction():
        conn.execute(f"set local lock_timeout = {LOCK_PATIENCE_MS}")
        conn.execute("lock table session_recalls in share row exclusive mode")
        name = free_name(conn, schema, "session_recalls_session_id_fkey")
        conn.execute(
            sql.SQL(
                "alter table session_recalls add constraint {} foreign key (session_id) "
                "references {} (id) on delete cascade not valid"
            ).format(sql.Identifier(name), sql.Identifier(to.schema, to.table))
        )
        return name


def _validate_foreign_key(conn: Connection, name: str, say: Say) -> None:
    try:
        conn.execute(
            sql.SQL("alter table session_recalls validate constraint {}").format(
                sql.Identifier(name)
            )
        )
    except errors.ForeignKeyViolation:
        say(
            "some old recalls belong to no session: the foreign key holds for new rows only, "
            "until they are deleted"
        )
