"""Is the schema as it was released? What somebody, or somebody's migration tool, dropped or altered
is named here, and put back.

Owns the comparison of the catalogue with the record (`released`), and the repairs, which are made
of the record: there is no second description of the schema. Compared is what recall-worker made:
its tables, its columns of session_recalls, their types, defaults and constraints, its indexes,
triggers and functions. What the application adds is its own. Of the application's own part only
that is compared on which recall-worker counts: the primary key and three indexes; the one that
allows a session one pending recall only where the table was seen with it.

An index counts by its definition. One under another name serves as well; one of the application's
under a name of ours does not, and is left alone: ours is built under a free name beside it.

What the database decides: what there is. The comparison reads catalogues only, and needs no right;
PostgreSQL makes it wait while a table is locked exclusively, as any reader. Repairs take the locks
that migrations take, as patiently.

Where a column or a table is lost on which idempotency keys depend, an API that remembers the old
keys would take the next calls for calls that it has answered, and not run them. So the keys of all
recalls are renewed with the column: see `_renew_keys`.

Never here: whether a table can be adopted (survey), the order of the migrations.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import psycopg
from psycopg import errors, sql

from ..database.connection import error_text
from ..recall import KEYS_OF_AN_ERA
from .released import (
    APPLICATION,
    DOMAINS,
    READERS,
    RECALLS,
    RECORD,
    Column,
    Connection,
    Constraint,
    Function,
    Index,
    Place,
    Schema,
    Table,
    Trigger,
    ask,
    place,
    read,
    released,
)

ROUNDS = 4
"""How often the schema is compared and repaired at most: what was built anew has parts of its
own."""
ERAS = 2_147_000
"""How many times keys can be renewed with numbers that nobody has used."""
ONE_PENDING = "idx_recalls_active_pending"
NOTE = "a session has one pending recall: the table was seen with an index that says so"
"""On the trigger, as a comment: it is in every dump, and nowhere in the application's way."""
LOOK_MS = 5_000
"""Milliseconds, at most, that the comparison waits for a table that is locked exclusively."""
KEYED = frozenset(
    {
        "occurrence",
        "rekey",
        "fires",
        "fired_at",
        "attempt",
        "skips",
        "scheduled_for",
        "planned_at",
        "missed",
        "body_hash",
        "begun_at",
        "sent_at",
        "lease",
        "lease_until",
        "run_reference",
    }
)
"""Columns that a key is made of, or the body that it stands for; or that tell whether a run was
called."""
KEYED_TABLES = frozenset({"recall_attempts"})
FILLED = {
    "text": "''",
    "integer": "0",
    "bigint": "0",
    "boolean": "false",
    "uuid": "'00000000-0000-0000-0000-000000000000'",
    "timestamp with time zone": "now()",
    "jsonb": "'{}'",
}
"""What old rows get in a column that may not be null and has no default."""
FILLED_KEYS = {
    "text": "gen_random_uuid()::text",
    "integer": "-(random() * 2147483646)::integer - 1",
    "bigint": "-(random() * 2147483646)::integer - 1",
}
"""The same in a column of the primary key, where rows have to differ."""

LOST = "what it held is lost"
HARM = {
    RECALLS: "workers can't claim, and nothing is called",
    RECORD: "nobody knows the version of the schema",
    "recall_attempts": "calls can't be recorded, and so no run can be settled",
    "recall_workers": "workers can't tell that they run",
    "recall_endpoints": "workers can't tell each other whether the endpoint answers",
    "recall_chores": "nothing is pruned",
    "recall_queues": "claims can't tell whether a queue is paused, and so nothing is claimed",
    "recall_actions": "commands and `Recalls` can't record what they do, and so refuse to",
    "recall_outbox": "RECALL_FAILURE_URL is told of no failure",
    "recall_subscriptions": "RECALL_FAILURE_URL is told of no failure",
    "recall_runs": "an API on the endpoint kit can begin no run",
    "recall_session_locks": "an API on the endpoint kit can begin no run",
}
HARM_OF_TRIGGERS = {
    "recall_at_insert": "an account that may only insert can't schedule from inside a run",
    "recall_before_insert": "new recalls are found only by polls, an agent can't schedule from "
    "inside a run, and a recall could loop",
    "recall_admit_queue": "a worker of a version without queues may claim what is not for it",
    "recall_admit_queue_edit": "a worker of a version without queues may claim what is not for it",
    "recall_before_edit": "a schedule that is edited during a run is not followed",
    "recall_on_failure": "RECALL_FAILURE_URL is told of no failure",
    "recall_keep_actions": "who may delete actions can take back what is on record",
    "recall_keep_all_actions": "who may truncate actions can take back what is on record",
}
POLLS = "the application's changes are found only by polls"
HARM_OF_INDEXES = {
    ONE_PENDING: "a session can have more than one pending recall",
    "idx_recalls_one_run": "two runs can meet in one session",
}
SLOW = "statements read the whole table"

Doable = Callable[[], None]
Patiently = Callable[[Doable], None]
Say = Callable[[str], None]
Composed = sql.Composed


@dataclass(frozen=True, slots=True)
class Step:
    """Statements that belong together."""

    statements: Sequence[Composed] | Callable[[Connection], Sequence[Composed]]
    concurrently: bool = False
    """Outside of a transaction, as `create index concurrently` has to be; else in one."""
    stands: str | None = None
    """What is so where rows stand in the way: an index is then not built, and the steps behind it
    are left out; a constraint stays without proof for old rows. None: that is an error."""


@dataclass(frozen=True, slots=True)
class Difference:
    """`what` is so, which harms by `harm`; `migrate` repairs it, except where `todo` says what a
    person has to do."""

    kind: str
    name: str
    what: str
    harm: str
    table: str = RECALLS
    alters: tuple[Composed, ...] = ()
    """Parts of one ALTER TABLE."""
    steps: tuple[Step, ...] = ()
    """What else puts it back, after that."""
    loses_keys: bool = False
    """Whether keys are to be renewed."""
    todo: str | None = None

    @property
    def sentence(self) -> str:
        return f"{self.what}: {self.harm}"


KINDS = ("table", "function", "column", "constraint", "trigger", "index", "owner")
"""In this order they are put back: a trigger needs its function and its columns."""


# --- comparing ------------------------------------------------------------------------------------


def differences(conn: Connection, version: int | None = None) -> list[Difference]:
    """What differs from the schema as released, in the order in which it is put back; nothing where
    there is no schema. Raises psycopg.Error.

    `version`: the database is at this version, and later migrations are still to be applied: only
    what is missing is looked for, and of that only tables, columns, functions and triggers, which a
    migration may need.
    """
    with conn.transaction():
        # PostgreSQL prints no definition of a table that is locked exclusively.
        conn.execute(f"set local lock_timeout = {LOOK_MS}")
        return _differences(conn, version)


def _differences(conn: Connection, version: int | None) -> list[Difference]:
    where = place(conn)
    if where is None:
        return []
    record = released()
    if not where.adopted:
        if ask(conn, "tables_elsewhere")[0]["there"]:
            return []
        made = record.tables[RECALLS]
        return [_missing_table(conn, where, RECALLS, made)]
    live = read(conn, where, record.tables, record.functions)
    found: list[Difference] = []
    for name, wanted in record.tables.items():
        if version is not None and wanted.since > version:
            continue
        has = live.tables.get(name)
        if has is None:
            found.append(_missing_table(conn, where, name, _as_of(wanted, version)))
        elif has.kind != "r":
            found.append(
                Difference(
                    "table",
                    name,
                    f"{name} is no table",
                    HARM.get(name, "workers need it"),
                    name,
                    todo=f"rename what is called {name}, then recall-worker migrate",
                )
            )
        else:
            found += _of_table(conn, where, name, wanted, has, version)
    for name, function in record.functions.items():
        there = live.functions.get(name)
        if version is None or (there is None and function.since <= version):
            found += _of_function(where, name, function, there)
    if version is None:
        found += _of_owners(where, live)
    return sorted(found, key=lambda difference: KINDS.index(difference.kind))


def _of_table(
    conn: Connection, where: Place, name: str, wanted: Table, has: Table, version: int | None
) -> list[Difference]:
    found: list[Difference] = []
    for column, made in wanted.columns.items():
        ours = name != RECALLS or made.since > APPLICATION
        if not ours or (version is not None and made.since > version):
            continue
        there = has.columns.get(column)
        if there is None:
            found.append(_missing_column(where, name, column, wanted))
        elif version is None:
            found += _of_column(where, name, column, made, there)
    if version is not None:
        for trigger, fires in wanted.triggers.items():
            if trigger not in has.triggers and fires.since <= version:
                found += _of_trigger(where, name, trigger, fires, has)
        return found
    set_here = {option.partition("=")[0] for option in has.options}
    for option in wanted.options:
        if option.partition("=")[0] not in set_here:
            # What an owner has set to something else is the owner's.
            alter = sql.SQL("alter table {} set ({})").format(
                qualified(where, name), sql.SQL(option)
            )
            what = f"table {name} has no setting {option.partition('=')[0]}"
            harm = "dead rows are left for longer, and indexes grow"
            found.append(Difference("table", name, what, harm, name, steps=(Step([alter]),)))
    if has.persistence != "p" and name != RECALLS:
        what = f"table {name} is not written to the log of PostgreSQL (unlogged)"
        harm = "a crash empties it, and a standby has nothing of it"
        alter = sql.SQL("alter table {} set logged").format(qualified(where, name))
        found.append(Difference("table", name, what, harm, name, steps=(Step([alter]),)))
    for constraint, rule in wanted.constraints.items():
        if rule.kind == "c" and rule.columns == ("status",) and name == RECALLS:
            continue  # What the application allows is for the survey, which replaces what refuses.
        if rule.kind == "c" and (name != RECALLS or rule.since > APPLICATION):
            found += _of_check(where, name, constraint, rule, has)
        elif rule.kind in ("p", "u"):
            found += _of_key(conn, where, name, constraint, rule, has)
    left_out = {n for n, rule in wanted.constraints.items() if rule.kind in ("p", "u")}
    if name == RECALLS and not ask(conn, "one_pending", schema=where.schema, note=NOTE)[0]["noted"]:
        left_out.add(ONE_PENDING)
    for index, definition in wanted.indexes.items():
        if index not in left_out:
            found += _of_index(conn, where, name, index, definition, has)
    for trigger, fires in wanted.triggers.items():
        found += _of_trigger(where, name, trigger, fires, has)
    return found


def _as_of(wanted: Table, version: int | None) -> Table:
    """A table without the columns of later migrations."""
    if version is None:
        return wanted
    columns = {name: made for name, made in wanted.columns.items() if made.since <= version}
    return replace(wanted, columns=columns)


def _missing_table(conn: Connection, where: Place, name: str, wanted: Table) -> Difference:
    columns = [_definition(column, made) for column, made in wanted.columns.items()]
    rules = [
        sql.SQL(rule.definition)
        for rule in wanted.constraints.values()
        if rule.kind in ("p", "u") or rule.since == APPLICATION
    ]
    made = sql.SQL("create table {} ({})").format(
        qualified(where, name), sql.SQL(", ").join(columns + rules)
    )
    if wanted.options:
        made = sql.SQL("{} with ({})").format(made, sql.SQL(", ".join(wanted.options)))
    comments = _comments(where, name, wanted, wanted.columns)
    if not wanted.constraints:
        # Else a publication of all tables keeps rows of it from being deleted.
        comments.append(
            sql.SQL("alter table {} replica identity full").format(qualified(where, name))
        )
    grants = Step(lambda conn: _grants(conn, where, name))
    what = f"table {name} is missing"
    if any(row["missing"] == name for row in ask(conn, "strays", **_looked_for(where))):
        what = f"table {name} was moved to another schema, or has another name"
    return Difference(
        "table",
        name,
        what,
        HARM.get(name, "workers need it"),
        name,
        steps=(Step([made, *comments]), grants),
        loses_keys=name in KEYED_TABLES,
    )


def _grants(conn: Connection, where: Place, name: str) -> list[Composed]:
    """The rights of those who work with a sibling of a table, on that table: as far as any of our
    roles has them. The roles themselves get theirs by roles.sql."""
    rights = {right for tables in released().privileges.values() for right in tables.get(name, ())}
    if name == RECALLS:
        return []
    for sibling in ("recall_attempts", "recall_workers", "recall_endpoints", "recall_chores"):
        if sibling == name:
            continue
        given = ask(conn, "grantees", schema=where.schema, table=sibling)
        if given:
            return [
                sql.SQL("grant {} on {} to {}").format(
                    sql.SQL(row["privilege"]), qualified(where, name), sql.SQL(row["grantee"])
                )
                for row in given
                if row["privilege"] in rights
            ]
    return []


def _definition(column: str, made: Column, filled: str | None = None) -> Composed:
    """A column as CREATE TABLE and ADD COLUMN have it. `filled`: its default for a start."""
    parts = [sql.Identifier(column), sql.SQL(made.type)]
    if made.identity:
        how = "always" if made.identity == "a" else "by default"
        parts.append(sql.SQL(f"generated {how} as identity"))
    elif (default := filled or made.default) is not None:
        parts.append(sql.SQL(f"default {default}"))
    if made.not_null:
        parts.append(sql.SQL("not null"))
    return sql.SQL(" ").join(parts)


def _comments(where: Place, name: str, wanted: Table, columns: Iterable[str]) -> list[Composed]:
    found = [
        sql.SQL("comment on column {}.{} is {}").format(
            qualified(where, name), sql.Identifier(column), sql.Literal(comment)
        )
        for column in columns
        if (comment := wanted.columns[column].comment) is not None
    ]
    if wanted.comment is not None and len(found) > 1:
        found.append(
            sql.SQL("comment on table {} is {}").format(
                qualified(where, name), sql.Literal(wanted.comment)
            )
        )
    return found


def _missing_column(where: Place, name: str, column: str, wanted: Table) -> Difference:
    made = wanted.columns[column]
    in_key = any(column in rule.columns for rule in wanted.constraints.values())
    filled = None
    alters = []
    if made.not_null and made.default is None and not made.identity:
        filled = (FILLED_KEYS if in_key else {}).get(made.type) or FILLED.get(made.type)
    # It may be there by now: keys that are renewed bring their columns.
    alters.append(sql.SQL("add column if not exists {}").format(_definition(column, made, filled)))
    empties = filled is not None and not wanted.constraints
    if filled is not None:
        # Behind ADD COLUMN in one ALTER TABLE, as PostgreSQL sorts them.
        alters.append(sql.SQL("alter column {} drop default").format(sql.Identifier(column)))
    return Difference(
        "column",
        column,
        f"column {column} of {name} is missing",
        f"{HARM.get(name, 'workers need it')}; {LOST}",
        name,
        alters=(alters[0],),
        steps=(
            *([Step([_altered(where, name, alters[1:])])] if len(alters) > 1 else []),
            # Rows of a table without a key are nothing but what they say: which database is
            # recorded. One that says half of it would make this database a copy.
            *(
                [Step([sql.SQL("delete from {}").format(qualified(where, name))])]
                if empties
                else []
            ),
            *([Step(c)] if (c := _comments(where, name, wanted, [column])) else []),
        ),
        loses_keys=name == RECALLS and column in KEYED,
    )


def _of_column(
    where: Place, name: str, column: str, made: Column, there: Column
) -> list[Difference]:
    harm = HARM.get(name, "workers need it")
    what = f"column {column} of {name}"
    known = sql.Identifier(column)

    def differs(said: str, *alters: Composed, steps: tuple[Step, ...] = ()) -> Difference:
        return Difference(
            "column", column, f"{what} {said}", harm, name, alters=alters, steps=steps
        )

    found: list[Difference] = []
    if there.generated:
        anew = sql.SQL("drop column {}, add column {}").format(known, _definition(column, made))
        loses = name == RECALLS and column in KEYED
        said = f"{what} is generated"
        return [Difference("column", column, said, harm, name, (anew,), loses_keys=loses)]
    retyped = there.type != made.type
    set_default = (
        sql.SQL("alter column {} drop default").format(known)
        if made.default is None
        else sql.SQL("alter column {} set default {}").format(known, sql.SQL(made.default))
    )
    if retyped:
        alters = [] if there.identity else [sql.SQL("alter column {} drop default").format(known)]
        alters.append(
            sql.SQL("alter column {} type {} using {}").format(
                known, sql.SQL(made.type), _converted(known, there.type, made.type)
            )
        )
        if made.default is not None:
            alters.append(set_default)
        found.append(differs(f"is of type {there.type}, not {made.type}", *alters))
    elif there.default != made.default and there.identity == made.identity:
        has = "no default" if there.default is None else f"the default {there.default}"
        wants = "none" if made.default is None else made.default
        found.append(differs(f"has {has}, not {wants}", set_default))
    if there.not_null and not made.not_null:
        alter = sql.SQL("alter column {} drop not null").format(known)
        found.append(differs("may not be null any more", alter))
    elif made.not_null and not there.not_null:
        found.append(differs("may be null", steps=_not_null(where, name, column, made)))
    if there.identity != made.identity:
        found.append(_of_identity(where, name, column, made, there))
    return found


def _converted(known: sql.Identifier, was: str, becomes: str) -> Composed:
    """The values of a column in another type: numbers as such, all else by its text."""
    numbers = ("smallint", "integer", "bigint", "numeric", "real", "double precision", "boolean")
    directly = becomes in numbers and was.split("(")[0] in numbers
    over = sql.SQL("") if directly or becomes == "text" else sql.SQL("::text")
    return sql.SQL("({}{})::{}").format(known, over, sql.SQL(becomes.split(" collate ")[0]))


def _not_null(where: Place, name: str, column: str, made: Column) -> tuple[Step, ...]:
    """A constraint that is validated while readers and writers pass proves to PostgreSQL that the
    column has no nulls: it then need not read the table under its exclusive lock."""
    table, known = qualified(where, name), sql.Identifier(column)
    proof = sql.Identifier(f"recall_{column}_not_null")
    guarded = [
        sql.SQL("alter table {} drop constraint if exists {}").format(table, proof),
        sql.SQL("alter table {} add constraint {} check ({} is not null) not valid").format(
            table, proof, known
        ),
    ]
    filled = made.default or FILLED.get(made.type)
    fill = sql.SQL("update {} set {} = {} where {} is null").format(
        table, known, sql.SQL(filled or "null"), known
    )
    return (
        Step(guarded),
        *([] if filled is None or made.identity else [Step([fill])]),
        Step([sql.SQL("alter table {} validate constraint {}").format(table, proof)]),
        Step(
            [
                sql.SQL("alter table {} alter column {} set not null").format(table, known),
                sql.SQL("alter table {} drop constraint {}").format(table, proof),
            ]
        ),
    )


def _of_identity(where: Place, name: str, column: str, made: Column, there: Column) -> Difference:
    table, known = qualified(where, name), sql.Identifier(column)
    if not made.identity:
        alters = [sql.SQL("alter column {} drop identity").format(known)]
    elif there.identity:
        alters = [sql.SQL("alter column {} set generated always").format(known)]
    else:
        alters = [sql.SQL("alter column {} add generated always as identity").format(known)]
        if there.default is not None:
            alters.insert(0, sql.SQL("alter column {} drop default").format(known))
    steps = [Step([_altered(where, name, [alter])]) for alter in alters]
    if made.identity and not there.identity:
        # Behind the numbers that are given.
        steps.append(
            Step(
                [
                    sql.SQL(
                        "select setval(pg_get_serial_sequence({}, {}), "
                        "coalesce(max({}), 0) + 1, false) from {}"
                    ).format(
                        sql.Literal(f"{where.quoted}.{name}"), sql.Literal(column), known, table
                    )
                ]
            )
        )
    what = f"column {column} of {name} is numbered in another way"
    return Difference("constraint", column, what, HARM.get(name, ""), name, steps=tuple(steps))


# --- constraints and indexes ----------------------------------------------------------------------


def _of_key(
    conn: Connection, where: Place, name: str, constraint: str, rule: Constraint, has: Table
) -> list[Difference]:
    """A primary key: any unique index over the same columns serves as well."""
    for index in has.indexes.values():
        if (
            index.unique
            and index.serves
            and not index.condition
            and sorted(index.keys) == sorted(rule.columns)
        ):
            return []
    table = qualified(where, name)
    columns = sql.SQL(", ").join(map(sql.Identifier, _columns_of(rule)))
    dropped, free = _room(conn, where, constraint, Index(True, ""), has)
    build = sql.SQL("create unique index concurrently {} on {} ({})").format(
        sql.Identifier(free), table, columns
    )
    steps = [*dropped]
    if name != RECALLS:
        # Which of the rows that can't be told apart is meant, nobody knows: the last one stays.
        same = sql.SQL(" and ").join(
            sql.SQL("a.{0} = b.{0}").format(sql.Identifier(column)) for column in _columns_of(rule)
        )
        steps.append(
            Step(
                [
                    sql.SQL("delete from {0} a using {0} b where a.ctid < b.ctid and {1}").format(
                        table, same
                    )
                ]
            )
        )
    doubled = f"{name} has rows with the same {', '.join(rule.columns)}"
    steps.append(Step([build], concurrently=True, stands=doubled))
    if not any(other.kind == "p" for other in has.constraints.values()):
        steps.append(
            Step(
                [
                    sql.SQL("alter table {} add constraint {} primary key using index {}").format(
                        table, sql.Identifier(free), sql.Identifier(free)
                    )
                ]
            )
        )
    return [
        Difference(
            "constraint",
            constraint,
            f"constraint {constraint} is missing",
            f"two rows of {name} can be the same one; {HARM.get(name, '')}",
            name,
            steps=tuple(steps),
        )
    ]


def _columns_of(rule: Constraint) -> list[str]:
    """The columns of a key, in its order."""
    return [part.strip(' "') for part in rule.definition.partition("(")[2].strip(")").split(",")]


def _of_index(
    conn: Connection, where: Place, name: str, index: str, wanted: Index, has: Table
) -> list[Difference]:
    if any(there.serves and _serves_as(there, wanted) for there in has.indexes.values()):
        return []
    there = has.indexes.get(index)
    harm = HARM_OF_INDEXES.get(index, SLOW)
    dropped, free = _room(conn, where, index, wanted, has)
    if there is not None and not there.serves:
        what = f"index {index} is invalid"
        harm = f"it slows writes down and no query uses it; {harm}"
    elif there is not None:
        what = f"index {index} has another definition than recall-worker's"
    elif any(name == index for name in _names(conn, where, index)):
        what = f"index {index} is missing, and something else has its name"
    else:
        what = f"index {index} is missing"
    build = sql.SQL("create {} concurrently {} on {} {}").format(
        sql.SQL("unique index" if wanted.unique else "index"),
        sql.Identifier(free),
        qualified(where, name),
        sql.SQL(wanted.definition),
    )
    doubled = f"{name} has rows that a unique index over {', '.join(wanted.keys)} does not allow"
    if index == ONE_PENDING:
        doubled = "there are sessions with more than one pending recall: cancel all but one of each"
    step = Step([build], concurrently=True, stands=doubled if wanted.unique else None)
    return [Difference("index", index, what, harm, name, steps=(*dropped, step))]


def _serves_as(there: Index, wanted: Index) -> bool:
    """Whether an index serves as the one that is wanted. Of the application's own three, any order
    of its columns and any further column will do."""
    if (there.unique, there.definition) == (wanted.unique, wanted.definition):
        return True
    if wanted.since > APPLICATION or there.condition != wanted.condition:
        return False
    if wanted.unique:
        return there.unique and there.keys == wanted.keys
    return there.keys[: len(wanted.keys)] == wanted.keys


def _room(
    conn: Connection, where: Place, name: str, wanted: Index, has: Table
) -> tuple[list[Step], str]:
    """A name for an index of ours: its own, or one that nobody has. What an interrupted build of
    ours left behind is dropped first; an index of another definition is somebody's."""
    taken = set(_names(conn, where, name))
    steps = []
    for other in sorted(taken):
        left = has.indexes.get(other)
        if left is None or left.serves:
            continue
        if not wanted.definition or _serves_as(left, wanted):
            drop = sql.SQL("drop index concurrently if exists {}").format(qualified(where, other))
            steps.append(Step([drop], concurrently=True))
            taken.discard(other)
    return steps, _free(name, taken)


def free_index(conn: Connection, where: Place, name: str, *dropped: str) -> str:
    """The name for an index, or the same with a number where something else has it. `dropped` are
    about to be free."""
    return _free(name, set(_names(conn, where, name)) - set(dropped))


def _free(name: str, taken: set[str]) -> str:
    free = name
    number = 2
    while free in taken:
        free = f"{name}_{number}"
        number += 1
    return free


def _names(conn: Connection, where: Place, name: str) -> list[str]:
    like = name.replace("_", "\\_") + "%"
    return [row["name"] for row in ask(conn, "names", schema=where.schema, like=like)]


def _of_check(
    where: Place, name: str, constraint: str, rule: Constraint, has: Table
) -> list[Difference]:
    if any(there.definition == rule.definition for there in has.constraints.values()):
        return []
    table, known = qualified(where, name), sql.Identifier(constraint)
    is_there = constraint in has.constraints
    said = "has another definition than recall-worker's" if is_there else "is missing"
    return [
        Difference(
            "constraint",
            constraint,
            f"constraint {constraint} {said}",
            "values can be written that no worker understands",
            name,
            steps=_checked(table, known, sql.SQL(rule.definition)),
        )
    ]


def _checked(
    table: Composed, known: sql.Identifier, definition: sql.SQL | Composed
) -> tuple[Step, ...]:
    return (
        Step(
            [
                sql.SQL("alter table {} drop constraint if exists {}").format(table, known),
                sql.SQL("alter table {} add constraint {} {} not valid").format(
                    table, known, definition
                ),
            ]
        ),
        Step(
            [sql.SQL("alter table {} validate constraint {}").format(table, known)],
            stands="old rows do not keep to it: it holds for new rows only, until they are deleted",
        ),
    )


# --- triggers, functions, owners ------------------------------------------------------------------


def _of_trigger(
    where: Place, name: str, trigger: str, wanted: Trigger, has: Table
) -> list[Difference]:
    there = has.triggers.get(trigger)
    table, known = qualified(where, name), sql.Identifier(trigger)
    harm = HARM_OF_TRIGGERS.get(trigger, POLLS if trigger.startswith("recall_ring") else "")
    if there is not None and does(there) == does(wanted):
        if there.enabled in ("O", "A"):
            return []
        how = "is disabled" if there.enabled == "D" else "fires in replica sessions only"
        alter = sql.SQL("alter table {} enable trigger {}").format(table, known)
    else:
        how = "has another definition than recall-worker's" if there else "is missing"
        alter = _created(where, name, trigger, wanted)
        for other, also in has.triggers.items():
            if there is None and does(also) == does(wanted) and also.enabled in ("O", "A"):
                how = f"is called {other} now"
                alter = sql.SQL("alter trigger {} on {} rename to {}").format(
                    sql.Identifier(other), table, known
                )
    return [Difference("trigger", trigger, f"{trigger} {how}", harm, name, steps=(Step([alter]),))]


def does(trigger: Trigger) -> tuple[str, str, str, str]:
    return trigger.event, trigger.scope, trigger.function, trigger.arguments


def _created(where: Place, name: str, trigger: str, wanted: Trigger) -> Composed:
    return sql.SQL("create or replace trigger {} {} on {} {} execute function {}({})").format(
        sql.Identifier(trigger),
        sql.SQL(wanted.event),
        qualified(where, name),
        sql.SQL(wanted.scope),
        qualified(where, wanted.function),
        sql.SQL(wanted.arguments),
    )


def _of_function(
    where: Place, name: str, wanted: Function, there: Function | None
) -> list[Difference]:
    harm = "the application's writes to session_recalls may fail, or not reach the workers"

    def shape(function: Function, body: str) -> tuple[object, ...]:
        return (
            body,
            function.language,
            function.returns,
            function.definer,
            function.strict,
            function.settings,
        )

    if there is None:
        said = "is missing"
    elif shape(there, there.body) == shape(wanted, wanted.at(where.quoted)):
        return []
    elif there.body != wanted.at(where.quoted) and _without_places(there.body) == _without_places(
        wanted.body
    ):
        said = f"names another schema than {where.schema}, where session_recalls is"
        harm = "every insert into session_recalls fails"
    elif there.body == wanted.at(where.quoted):
        said = "runs under other settings or rights than as released"
    else:
        said = "is not as released"
    made = sql.SQL("create or replace function {}() returns {} language {} {}{}{} as {}").format(
        qualified(where, name),
        sql.SQL(wanted.returns),
        sql.Identifier(wanted.language),
        sql.SQL("security definer" if wanted.definer else "security invoker"),
        sql.SQL(" strict" if wanted.strict else ""),
        sql.SQL("".join(f" set {setting.replace('=', ' = ', 1)}" for setting in wanted.settings)),
        sql.Literal(wanted.at(where.quoted)),
    )
    return [Difference("function", name, f"function {name} {said}", harm, steps=(Step([made]),))]


_PLACE = re.compile(r"(?:@schema@|\"(?:[^\"]|\"\")+\"|\b\w+)\.(?=(?:session_recalls|recall_\w+)\b)")


def _without_places(body: str) -> str:
    """A body without the schemas of our tables."""
    return _PLACE.sub("", body)


def _of_owners(where: Place, live: Schema) -> list[Difference]:
    if where.owner is None:
        return []
    owner = sql.Identifier(where.owner)
    found = [("table", name, t.owner) for name, t in live.tables.items() if t.strange]
    found += [("function", name, f.owner) for name, f in live.functions.items() if f.strange]
    return [
        Difference(
            "owner",
            name,
            f"{kind} {name} belongs to {other}, and session_recalls to {where.owner}",
            f"{other} can change what the application's and the workers' statements do",
            steps=(
                Step(
                    [
                        sql.SQL("alter {} {}{} owner to {}").format(
                            sql.SQL(kind),
                            qualified(where, name),
                            sql.SQL("()" if kind == "function" else ""),
                            owner,
                        )
                    ]
                ),
            ),
        )
        for kind, name, other in found
    ]


def qualified(where: Place, name: str) -> Composed:
    return sql.SQL("{}.{}").format(sql.Identifier(where.schema), sql.Identifier(name))


def _altered(where: Place, name: str, alters: Sequence[Composed]) -> Composed:
    return sql.SQL("alter table {} {}").format(qualified(where, name), sql.SQL(", ").join(alters))


def hand_over(conn: Connection) -> None:
    """Give what this role has made to the owner of session_recalls, as another member of that role
    may migrate next. Where PostgreSQL does not let it, it stays."""
    where = place(conn)
    if where is None or not where.adopted:
        return
    record = released()
    for row in ask(
        conn,
        "to_hand_over",
        schema=where.schema,
        tables=[name for name in record.tables if name != RECALLS],
        functions=[*record.functions, *READERS],
        domains=list(DOMAINS),
    ):
        try:
            with conn.transaction():
                conn.execute(f"set local lock_timeout = {LOOK_MS}")
                conn.execute(f"alter {row['sql']} owner to {row['owner']}".encode())
        except (errors.InsufficientPrivilege, errors.LockNotAvailable):
            continue


# --- moved tables ---------------------------------------------------------------------------------


def _looked_for(where: Place) -> dict[str, object]:
    ours = {name: made for name, made in released().tables.items() if name != RECALLS}
    keyless = [name for name, made in ours.items() if not made.constraints]
    return {"schema": where.schema, "tables": list(ours), "keyless": keyless}


@dataclass(frozen=True, slots=True)
class Stray:
    """A table or function of ours that is not where session_recalls is."""

    what: str
    step: Step


def strays(conn: Connection) -> list[Stray]:
    """Tables that somebody moved to another schema or renamed, and functions. `session_recalls`
    itself is where the search_path finds it. Raises psycopg.Error."""
    where = place(conn)
    if where is None or not where.adopted:
        return []
    record = released()
    found: list[Stray] = []
    by_name: dict[str, list[dict[str, object]]] = {}
    for row in ask(conn, "strays", **_looked_for(where)):
        if set(record.tables[row["missing"]].columns) <= set(row["columns"]):
            by_name.setdefault(row["missing"], []).append(row)
    for name, rows in by_name.items():
        if len(rows) > 1:
            continue  # Nobody knows which is meant: it is built anew.
        at, called = str(rows[0]["schema"]), str(rows[0]["name"])
        there = sql.SQL("{}.{}").format(sql.Identifier(at), sql.Identifier(called))
        if at == where.schema:
            what = f"table {name} is called {called} now"
            move = sql.SQL("alter table {} rename to {}").format(there, sql.Identifier(name))
        else:
            what = f"table {name} is in schema {at}, and session_recalls in {where.schema}"
            move = sql.SQL("alter table {} set schema {}").format(
                there, sql.Identifier(where.schema)
            )
        found.append(Stray(what, Step([move])))
    asked = {"schema": where.schema, "functions": list(record.functions)}
    for row in ask(conn, "stray_functions", **asked):
        at, name = str(row["schema"]), str(row["name"])
        what = f"function {name} is in schema {at}, and session_recalls in {where.schema}"
        move = sql.SQL("alter function {}.{}() set schema {}").format(
            sql.Identifier(at), sql.Identifier(name), sql.Identifier(where.schema)
        )
        found.append(Stray(what, Step([move])))
    return found


# --- repairing ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Means:
    """How repairs are made: `patiently(act)` tries again while something is locked, and gives up in
    the end; how long a statement waits for a lock, in milliseconds."""

    say: Say
    patiently: Patiently
    lock_ms: int
    index_ms: int


@dataclass(frozen=True, slots=True)
class Repaired:
    done: list[str]
    blocked: list[str]
    """What rows stand in the way of."""
    refused: list[str]
    """What PostgreSQL refused, with its reason."""


def gather(conn: Connection, means: Means) -> list[str]:
    """Put moved and renamed tables where they belong; returns what was done. Before the migrations,
    as the record of these may be among them."""
    done = []
    for stray in strays(conn):
        means.say(f"{stray.what}: put back")
        make(conn, means, stray.step)
        done.append(stray.what)
    return done


def repair(conn: Connection, means: Means, version: int | None = None) -> Repaired:
    """Put back what differs; returns what was done. What was built anew is compared again. Raises
    what `means.patiently` raises, and psycopg.OperationalError.

    `version`: as in `differences`.
    """
    repaired = Repaired([], [], [])
    left: set[tuple[str, str, str]] = set()
    for last in [False] * ROUNDS + [True]:
        all_of_them = _looked(conn, means, version)
        found = [d for d in all_of_them if d.todo is None and _id(d) not in left]
        if last:
            repaired.refused.extend(f"{d.what}, and it stays so" for d in found)
        for together in [] if last else _together(found):
            for difference, blocked, refused in _put_back(conn, means, together):
                if blocked is None and refused is None:
                    repaired.done.append(difference.what)
                    continue
                left.add(_id(difference))
                if blocked is not None:
                    repaired.blocked.append(f"{difference.what}: {blocked}")
                else:
                    repaired.refused.append(f"{difference.what}, and can't be put back: {refused}")
        if not found:
            break
    return repaired


def _looked(conn: Connection, means: Means, version: int | None) -> list[Difference]:
    found: list[Difference] = []
    means.patiently(lambda: found.extend(differences(conn, version)))
    return found


def _id(difference: Difference) -> tuple[str, str, str]:
    return difference.table, difference.name, difference.what


def _together(found: Sequence[Difference]) -> list[list[Difference]]:
    """Differences in the order in which they are put back; those of one table's columns in one
    go."""
    groups: list[list[Difference]] = []
    for difference in found:
        if (
            groups
            and difference.kind == "column"
            and (groups[-1][0].kind, groups[-1][0].table) == ("column", difference.table)
        ):
            groups[-1].append(difference)
        else:
            groups.append([difference])
    return groups


def _put_back(
    conn: Connection, means: Means, together: list[Difference]
) -> list[tuple[Difference, str | None, str | None]]:
    """Put these back. Returns for each what rows stand in the way of, and why PostgreSQL refused
    it."""
    for difference in together:
        means.say(f"{difference.what}: put back")
    blocked = {}
    try:
        if any(d.alters or d.loses_keys for d in together):
            means.patiently(lambda: _alter(conn, means, together))
        for difference in together:
            for step in difference.steps:
                if not make(conn, means, step):
                    means.say(f"{step.stands}")
                    if step.concurrently:
                        blocked[_id(difference)] = step.stands
                        break
    except psycopg.OperationalError:
        raise
    except psycopg.Error as error:
        if len(together) == 1:
            return [(together[0], None, error_text(error))]
        # One of them can't be put back: that must not keep the others from it.
        return [found for one in together for found in _put_back(conn, means, [one])]
    return [(d, blocked.get(_id(d)), None) for d in together]


def _alter(conn: Connection, means: Means, together: Sequence[Difference]) -> None:
    """Change the columns of a table in one go, and renew keys where that is due."""
    where = place(conn)
    assert where is not None
    name = together[0].table
    alters = [alter for difference in together for alter in difference.alters]
    retyped = any(" type " in alter.as_string(conn) for alter in alters)
    triggers = released().tables[name].triggers if retyped else {}
    with conn.transaction():
        conn.execute(f"set local lock_timeout = {means.lock_ms}")
        conn.execute("set local timezone = 'UTC'")
        if name == RECALLS or any(difference.loses_keys for difference in together):
            conn.execute(
                sql.SQL("lock table {} in access exclusive mode").format(qualified(where, RECALLS))
            )
        for trigger in triggers:
            # PostgreSQL changes no type that a trigger's condition depends on.
            conn.execute(
                sql.SQL("drop trigger if exists {} on {}").format(
                    sql.Identifier(trigger), qualified(where, name)
                )
            )
        if alters:
            conn.execute(_altered(where, name, alters))
        for trigger, wanted in triggers.items():
            conn.execute(_created(where, name, trigger, wanted))
        if any(difference.loses_keys for difference in together):
            means.say("the keys of all recalls are renewed")
            _renew_keys(conn, where)


def _renew_keys(conn: Connection, where: Place) -> None:
    """Give each recall a number of renewals that no key of it ever had, and that its later
    occurrences keep: see `next_rekey`.

    A column that is added with a constant default costs the same for a million rows as for one, and
    no trigger fires: so the two counters are made anew. Where something of the application's
    depends on them, such as a view, the rows that are not over for good are updated.
    """
    era = random.randrange(1, ERAS) * KEYS_OF_AN_ERA
    table = qualified(where, RECALLS)
    wanted = released().tables[RECALLS]
    asked = {"schema": where.schema, "tables": [RECALLS]}
    there = {row["name"] for row in ask(conn, "columns", **asked)}
    # Before migration 0017 there is only the first.
    for column in ("rekey", "fires") if "fires" in there else ("rekey",):
        known = sql.Identifier(column)
        try:
            with conn.transaction():
                conn.execute(
                    sql.SQL("alter table {} drop column if exists {}").format(table, known)
                )
        except errors.DependentObjectsStillExist:
            conn.execute(
                sql.SQL("update {} set {} = {} where status <> 'fired'").format(
                    table, known, sql.Literal(era)
                )
            )
            continue
        definition = _definition(column, wanted.columns[column], str(era))
        conn.execute(sql.SQL("alter table {} add column {}").format(table, definition))
        conn.execute(sql.SQL("alter table {} alter column {} set default 0").format(table, known))
        for comment in _comments(where, RECALLS, wanted, [column]):
            conn.execute(comment)


def make(conn: Connection, means: Means, step: Step) -> bool:
    """Execute a step. Returns whether it was done; False where rows stand in the way."""
    try:
        means.patiently(lambda: _execute(conn, means, step))
    except (errors.UniqueViolation, errors.CheckViolation):
        if step.stands is None:
            raise
        return False
    return True


def _execute(conn: Connection, means: Means, step: Step) -> None:
    if not step.concurrently:
        with conn.transaction():
            conn.execute(f"set local lock_timeout = {means.lock_ms}")
            made = step.statements
            for statement in made(conn) if callable(made) else made:
                conn.execute(statement)
        return
    assert not callable(step.statements)
    conn.execute(f"set lock_timeout = {means.index_ms}")
    try:
        for statement in step.statements:
            _drop_what_is_left(conn, statement)
            try:
                conn.execute(statement)
            except errors.UniqueViolation:
                _drop_what_is_left(conn, statement)
                raise
    finally:
        if not conn.closed:
            conn.execute("set lock_timeout = 0")


def _drop_what_is_left(conn: Connection, statement: Composed) -> None:
    """Drop the index that an earlier try of this statement has left: it costs writes, and serves
    nobody."""
    building = re.match(r'create (?:unique )?index concurrently "(\w+)"', statement.as_string(conn))
    where = place(conn)
    if building is None or where is None:
        return
    tables = list(released().tables)
    for row in ask(conn, "indexes", schema=where.schema, tables=tables):
        if row["name"] == building[1] and not row["serves"]:
            conn.execute(
                sql.SQL("drop index concurrently if exists {}").format(
                    qualified(where, row["name"])
                )
            )


def is_blocked(conn: Connection, difference: Difference) -> bool:
    """Whether rows stand in the way of the index over one pending recall a session. Reads rows."""
    where = place(conn)
    if where is None or difference.name != ONE_PENDING:
        return False
    asked = sql.SQL(
        "select exists (select from {} where status = 'pending' "
        "group by session_id having count(*) > 1)"
    ).format(qualified(where, RECALLS))
    row = conn.execute(asked).fetchone()
    return row is not None and row[0] is True


def note_one_pending(conn: Connection, means: Means) -> None:
    """Note that the table has the index over one pending recall a session. Where it is missing
    later, somebody has dropped it; where it never was, the application wants it so."""
    where = place(conn)
    if where is None or not where.adopted:
        return
    if ask(conn, "one_pending", schema=where.schema, note=NOTE)[0]["noted"] is not False:
        return
    wanted = released().tables[RECALLS].indexes[ONE_PENDING]
    has: list[Index] = []
    means.patiently(lambda: has.extend(_indexes(conn, where)))
    if any(there.serves and _serves_as(there, wanted) for there in has):
        note = sql.SQL("comment on trigger recall_before_insert on {} is {}").format(
            qualified(where, RECALLS), sql.Literal(NOTE)
        )
        make(conn, means, Step([note]))


def _indexes(conn: Connection, where: Place) -> list[Index]:
    with conn.transaction():
        conn.execute(f"set local lock_timeout = {LOOK_MS}")
        return list(read(conn, where, [RECALLS], []).tables[RECALLS].indexes.values())


def has_record(conn: Connection) -> bool:
    """Whether the record of the migrations stands where session_recalls does."""
    where = place(conn)
    return where is not None and where.record


# --- rights ---------------------------------------------------------------------------------------


def rights_lacking(conn: Connection) -> list[str]:
    """What the roles of sql/roles.sql lack, where they were given rights here before."""
    where = place(conn)
    if where is None or not where.adopted:
        return []
    wanted: list[tuple[str, str, str | None, str]] = []
    for role, tables in released().privileges.items():
        for table, rights in tables.items():
            for right, columns in rights.items():
                wanted += [(role, table, column, right) for column in columns or [None]]  # type: ignore[list-item]
    roles, tables_, columns_, privileges = map(list, zip(*wanted, strict=True))
    rows = ask(
        conn,
        "privileges",
        schema=where.schema,
        roles=roles,
        tables=tables_,
        columns=columns_,
        privileges=privileges,
    )
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        at = row["table"] or f"schema {where.schema}"
        columns = found.setdefault((row["role"], row["privilege"], at), [])
        if row["column"] is not None:
            columns.append(row["column"])
    return [
        f"{role} lacks {right} on {at}" + (f" ({', '.join(columns)})" if columns else "")
        for (role, right, at), columns in found.items()
    ]
