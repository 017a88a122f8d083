"""What `migrate` looks at before it changes anything: where the table is, and what stands in its
way.

Owns the rules for the tables that people have (docs/adoption.md): which columns, types, checks and
rights a table needs, in words for people. The table is adopted whole, or refused before the first
change, with everything that stands in the way at once; `migrate --check` and `doctor` say the same.
Whether each status can be written is found out by asking PostgreSQL for the value of each check,
and of each unique index's condition, for rows that are not written anywhere: rows of the
application as they would be with another status, and made-up ones. That needs no right but to read,
works on a standby, runs no trigger, and touches no row. What can't be tried so is refused as well.

Never here: a change of the schema (the files beside this one), and what was dropped or altered
after the table was adopted (catalog).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import errors, sql
from psycopg.rows import dict_row

from .. import statements
from ..database.setup import absence, identifier
from ..recall import STATUSES
from . import versions
from .released import APPLICATION, DOMAINS, READERS, RECALLS, RECORD, released

Connection = psycopg.Connection[tuple[object, ...]]

OLDEST_SERVER = 140_000
"""server_version_num of the oldest PostgreSQL that the schema works with."""
OURS = ("running", "failed")
"""The statuses that recall-worker adds to the application's three."""
_TEXT = ("text", "character varying")
_KEY = (*_TEXT, "uuid", "bigint", "integer")
_TIME = ("timestamp with time zone", "timestamp(6) with time zone")
WANTED: Mapping[str, tuple[str, ...]] = {
    "id": _KEY,
    "session_id": _KEY,
    "call_type": _TEXT,
    "trigger_at": _TIME,
    "interval_seconds": ("integer", "bigint"),
    "internal_comment": _TEXT,
    "additional_context_message": _TEXT,
    "status": _TEXT,
    "created_at": _TIME,
    "updated_at": _TIME,
}
"""The application's ten columns, each with the types that it can have; the first is the one to
suggest. `character varying` stands for any length of it."""
NULLABLE = frozenset({"interval_seconds", "internal_comment"})
"""Those of the ten that a row may leave empty."""


class SchemaError(Exception):
    """The schema can't be brought up to date. `hint` says what to do."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Blocker:
    """Something that stands in the way: what was found and what is needed, and what to do."""

    what: str
    todo: str


class Refused(SchemaError):
    """The table can't be adopted, or worked with, as it stands. Nothing was changed."""

    def __init__(self, blockers: list[Blocker]) -> None:
        super().__init__("; ".join(blocker.what for blocker in blockers), blockers[0].todo)
        self.blockers = blockers

    def numbered(self) -> list[tuple[str, str]]:
        """What and todo of each, with a number where there are several."""
        if len(self.blockers) == 1:
            return [(self.blockers[0].what, self.blockers[0].todo)]
        return [
            (f"({n}) {blocker.what}", f"({n}) {blocker.todo}")
            for n, blocker in enumerate(self.blockers, 1)
        ]


@dataclass(frozen=True, slots=True)
class Survey:
    """What there is. `schema`: of the table, or where it would be created."""

    schema: str
    there: bool
    recorded: bool
    """Whether a migration is on record here."""
    blockers: list[Blocker] = field(default_factory=list)
    rights: list[Blocker] = field(default_factory=list)
    """What this role may not do, and `migrate` needs."""
    keys: list[str] = field(default_factory=list)
    """The foreign keys of session_id, in words."""
    narrow: bool = False
    """Whether a check of status alone refuses the statuses that recall-worker adds."""
    one_pending: bool = True
    """Whether an index allows a session one pending recall only."""
    required: list[str] = field(default_factory=list)
    """Further columns of the application's that every insert has to give."""
    unlogged: bool = False
    """Whether a crash of PostgreSQL empties the table."""

    def refuse(self, *, changes: bool) -> None:
        """Raise Refused where something stands in the way; with `changes`, also where this role may
        not make them."""
        blockers = self.blockers + (self.rights if changes else [])
        if blockers:
            raise Refused(blockers)


def survey(conn: Connection, schema: str | None = None) -> Survey:
    """Look at everything; changes nothing. `schema`: the one that RECALL_SCHEMA names, else what
    the connection's search_path finds. Raises Refused where there is no table, and no place for
    one, and psycopg.Error."""
    with conn.transaction():
        return _survey(conn, schema)


def _survey(conn: Connection, schema: str | None) -> Survey:
    [place] = _ask(conn, "place", schema=schema)
    if place["number"] < OLDEST_SERVER:
        raise Refused(
            [
                Blocker(
                    f"this is PostgreSQL {place['version']}, and recall-worker needs 14 or newer",
                    "upgrade PostgreSQL",
                )
            ]
        )
    _refuse_another_record(conn, place)
    if not place["there"]:
        _refuse_elsewhere(conn, schema)
        if place["schema"] is None:
            raise Refused(
                [
                    Blocker(
                        "the search_path names no schema in which the table could be created",
                        "give the schema in RECALL_SCHEMA",
                    )
                ]
            )
        place["recorded"] = _recorded(conn, place)
        found = Survey(place["schema"], False, place["recorded"])
        found.rights.extend(_rights(place))
        found.blockers.extend(_names(conn, place))
        return found
    where = place["schema"]
    place["recorded"] = _recorded(conn, place)
    found = Survey(
        where,
        True,
        place["recorded"],
        keys=[_key_text(key) for key in _ask(conn, "keys_to_sessions", schema=where)],
        narrow=_narrow(conn, where) if place["recorded"] else False,
        one_pending=_ask(conn, "one_pending", schema=where)[0]["there"],
        unlogged=place["unlogged"],
    )
    found.blockers.extend(_kind(conn, place))
    if not found.blockers:
        columns = _ask(conn, "columns", schema=where)
        ours = _added() if place["recorded"] else set()
        found.required.extend(
            c["name"]
            for c in columns
            if not (c["null"] or c["filled"]) and c["name"] not in WANTED.keys() | ours
        )
        found.blockers.extend(_columns(conn, where, columns, recorded=place["recorded"]))
        if place["reads"]:
            try:
                with conn.transaction():
                    fits = not found.blockers
                    found.blockers.extend(_nulls(conn, place, columns))
                    if fits:
                        found.blockers.extend(_statuses(conn, where, place, columns))
            except (
                errors.UndefinedObject,
                errors.InsufficientPrivilege,
                errors.DataError,
            ) as error:
                if not place["row_security"]:
                    raise
                found.blockers.append(_row_security(place, error))
        found.blockers.extend(_rules(conn, where))
    found.rights.extend(_rights(place))
    found.blockers.extend(_names(conn, place))
    if not place["recorded"] and "$$" in where:
        found.blockers.append(
            Blocker(
                f"the schema {where} has $$ in its name, which bodies of functions can't have",
                f"alter schema {identifier(where)} rename to …",
            )
        )
    return found


def _row_security(place: Mapping[str, Any], error: psycopg.Error) -> Blocker:
    return Blocker(
        f"row-level security keeps {place['role']} from reading session_recalls: "
        f"{error.diag.message_primary}",
        f"{_alter(place['schema'], 'no force row level security')}; or, as a superuser: "
        f"alter role {identifier(place['role'])} bypassrls",
    )


def _recorded(conn: Connection, place: Mapping[str, Any]) -> bool:
    """Whether a migration is on record, or was: a dump of the schema leaves the rows out."""
    record = versions.read(conn, place["schema"])
    return bool(record.versions) or record.adopted


def _ask(conn: Connection, name: str, **values: Any) -> list[dict[str, Any]]:
    cursor = conn.cursor(row_factory=dict_row)
    return cursor.execute(statements.load("survey")[name].encode(), values).fetchall()


# --- where ----------------------------------------------------------------------------------------


def _refuse_elsewhere(conn: Connection, schema: str | None) -> None:
    """A second, empty table is never made beside one that the application uses."""
    absent = absence(conn, schema)
    if absent is not None:
        raise Refused([Blocker(absent.reason, absent.hint)])
    renamed = [
        Blocker(
            "there is no table session_recalls: "
            f"it was renamed to {other['schema']}.{other['name']}",
            _alter(other["schema"], "rename to session_recalls", other["name"]),
        )
        for other in _ask(conn, "renamed")
    ]
    if renamed:
        raise Refused(renamed)


def _rights(place: Mapping[str, Any]) -> Iterable[Blocker]:
    """What the role that migrates must be allowed to do."""
    if place["there"] and not place["owns"]:
        yield Blocker(
            f"the table session_recalls belongs to {place['owner']}, and {place['role']} may not "
            "alter it",
            f"migrate as {place['owner']}, or as a member of that role",
        )
    if not place["creates"]:
        yield Blocker(
            f"{place['role']} may not create tables in schema {place['schema']}",
            f"grant create on schema {identifier(place['schema'])} to {identifier(place['role'])}",
        )


def _refuse_another_record(conn: Connection, place: Mapping[str, Any]) -> None:
    """A recall_schema that is none, which nothing could be read from."""
    if not place["other_record"]:
        return
    where = place["schema"]
    applied = statements.load("identity")["applied"].encode()
    row = conn.execute(applied, {"schema": where}).fetchone()
    if row is None or not (row[2] or row[3]):
        raise Refused(
            [
                Blocker(
                    f"there is a {RECORD} in schema {where} that recall-worker did not make",
                    "rename it: recall-worker needs this name for the record of its migrations",
                )
            ]
        )


def _names(conn: Connection, place: Mapping[str, Any]) -> Iterable[Blocker]:
    """Names that recall-worker needs and that mean something else here; before the first migration
    all of them, later only what can be confused with ours."""
    where = place["schema"]
    functions = list(released().functions)
    if place["recorded"]:
        for row in _ask(
            conn, "overloads", schema=where, functions=functions, readers=list(READERS)
        ):
            yield Blocker(
                f"there is a function {row['name']} beside recall-worker's of the same name",
                f"alter function {row['name']} rename to …",
            )
        return
    # An interrupted `migrate` of an earlier version leaves its record empty. Indexes of
    # session_recalls itself count by their definition.
    ours = {name: made for name, made in released().tables.items() if name != RECALLS}
    relations = [name for name in ours if name != RECORD]
    relations += [
        index
        for made in ours.values()
        for index in made.indexes
        # PostgreSQL finds a free name for what stands behind a constraint.
        if index not in made.constraints
    ]
    for row in _ask(
        conn,
        "taken",
        schema=where,
        relations=relations,
        domains=list(DOMAINS),
        functions=[*functions, *READERS],
        triggers=list(released().tables[RECALLS].triggers),
    ):
        on = "" if row["kind"] in ("trigger", "constraint") else f"{where}."
        yield Blocker(
            f"there is {'an' if row['kind'] == 'index' else 'a'} {row['kind']} "
            f"{on}{row['name'].removeprefix(on)} that recall-worker did not record",
            "rename it (recall-worker needs this name), or drop it if it is left of an earlier "
            "recall-worker",
        )


def _rules(conn: Connection, schema: str) -> Iterable[Blocker]:
    for row in _ask(conn, "rules", schema=schema):
        yield Blocker(
            f"the rule {row['name']} on session_recalls changes what statements do",
            f"drop rule {identifier(row['name'])} on {_table(schema)}, and use a trigger instead",
        )


# --- what it is made of ---------------------------------------------------------------------------


def _kind(conn: Connection, place: Mapping[str, Any]) -> Iterable[Blocker]:
    kinds = {
        "v": "a view",
        "m": "a materialized view",
        "p": "a partitioned table",
        "f": "a foreign table",
    }
    kind = "a temporary table" if place["temporary"] else kinds.get(place["kind"])
    if kind is not None:
        yield Blocker(
            f"{place['schema']}.session_recalls is {kind}, and must be an ordinary table",
            "give the database and schema of the ordinary table in RECALL_DSN and RECALL_SCHEMA",
        )
    elif place["recorded"]:
        return
    elif place["typed"]:
        yield Blocker(
            "session_recalls is a table of a type, and columns can't be added to it",
            _alter(place["schema"], "not of"),
        )
    elif place["inherits"]:
        yield Blocker(
            "session_recalls inherits from another table, or another from it, and must stand alone",
            "alter table CHILD no inherit PARENT",
        )
    else:
        for row in _ask(conn, "users_of_rows", schema=place["schema"]):
            yield Blocker(
                f"column {row['name']} of {row['relation']} holds whole rows of session_recalls, "
                "so columns can't be added",
                "drop that column, or keep its values as jsonb",
            )


def _columns(
    conn: Connection, schema: str, columns: list[dict[str, Any]], *, recorded: bool
) -> Iterable[Blocker]:
    found = {column["name"]: column for column in columns}
    for name, types in WANTED.items():
        column = found.get(name)
        if column is None:
            yield Blocker(
                f"column {name} is missing, and must be {types[0]}",
                "check that RECALL_DSN and RECALL_SCHEMA name the application's table; "
                "docs/adoption.md has its columns",
            )
        elif not _fits(column["type"], types):
            type_ = "an enum" if column["enum"] else column["type"]
            yield Blocker(
                f"column {name} is {type_}, and must be {_wanted(types)}",
                _convert(schema, name, column, types[0]),
            )
        elif column["generated"] and name != "id":
            yield Blocker(
                f"column {name} is generated by PostgreSQL, and must be one that can be written",
                _alter(schema, f"alter column {name} drop expression"),
            )
    # Of an adopted table it is put back (catalog).
    if "id" in found and not recorded and not _ask(conn, "unique_id", schema=schema)[0]["there"]:
        yield Blocker(
            "column id alone is not unique, and must be: recalls are found by it",
            _alter(schema, "add primary key (id)") + ", or a unique constraint",
        )
    if recorded:
        return
    for name in sorted(_added() & found.keys()):
        yield Blocker(
            f"there is a column {name} already, and recall-worker needs one of its own by that "
            "name",
            _alter(schema, f"rename column {name} to …"),
        )


def _nulls(
    conn: Connection, place: Mapping[str, Any], columns: list[dict[str, Any]]
) -> Iterable[Blocker]:
    """Columns that may be null, and must not be: before the table is adopted. Later only rows that
    are so stand in the way."""
    where = place["schema"]
    doubtful = [c["name"] for c in columns if c["null"] and c["name"] in WANTED.keys() - NULLABLE]
    if not doubtful:
        return
    counted = conn.execute(
        sql.SQL("select {} from {}").format(
            sql.SQL(", ").join(
                sql.SQL("count(*) filter (where {} is null)").format(sql.Identifier(name))
                for name in doubtful
            ),
            sql.Identifier(where, RECALLS),
        )
    ).fetchone()
    for name, count in zip(doubtful, counted or (), strict=True):
        if count:
            yield Blocker(
                f"column {name} may be null, and must not be: it is in {count} rows",
                f"give these rows a {name}, or delete them; then "
                + _alter(where, f"alter column {name} set not null"),
            )
        elif not place["recorded"]:
            yield Blocker(
                f"column {name} may be null, and must not be",
                _alter(where, f"alter column {name} set not null"),
            )


def _fits(type_: str, types: Iterable[str]) -> bool:
    return any(
        type_ == wanted or (wanted == "character varying" and type_.startswith(wanted + "("))
        for wanted in types
    )


def _wanted(types: Iterable[str]) -> str:
    return _or(type_ for type_ in types if "(" not in type_)


def _convert(schema: str, name: str, column: Mapping[str, Any], wanted: str) -> str:
    """The statement that gives a column its type."""
    using = f"{name}::{wanted}"
    if column["type"].startswith("timestamp") and "without time zone" in column["type"]:
        using = f"{name} at time zone 'UTC'"
    default = f"alter column {name} drop default, " if column["filled"] else ""
    hint = _alter(schema, f"{default}alter column {name} type {wanted} using {using}")
    notes = []
    if "without time zone" in column["type"]:
        notes.append("'UTC' if the application writes UTC")
    if default and name in ("status", "call_type"):
        notes.append("then set its default again")
    return hint + (f" ({'; '.join(notes)})" if notes else "")


def _added() -> set[str]:
    """The columns that recall-worker adds to the application's ten."""
    columns = released().tables[RECALLS].columns
    return {name for name, column in columns.items() if column.since > APPLICATION}


# --- statuses -------------------------------------------------------------------------------------


def _narrow(conn: Connection, schema: str) -> bool:
    """Whether a check of status alone refuses `running` or `failed`: `migrate` replaces it."""
    return any(
        check["alone"] and not _allows(conn, check["expression"], status)
        for check in _ask(conn, "checks", schema=schema)
        for status in OURS
    )


def _statuses(
    conn: Connection, schema: str, place: Mapping[str, Any], columns: list[dict[str, Any]]
) -> Iterable[Blocker]:
    checks = _ask(conn, "checks", schema=schema)
    alone = [check for check in checks if check["alone"]]
    if not place["recorded"]:
        in_use = [
            status
            for status in OURS
            if alone and all(_allows(conn, check["expression"], status) for check in alone)
        ]
        for status in in_use:
            yield Blocker(
                f"the application's own check allows status '{status}', "
                "which recall-worker uses for recalls of its own",
                f"give that status another name in the application, then {_drop(schema, alone)}",
            )
        held = _values(conn, schema)
        for status in OURS:
            if status not in in_use and status in held:
                yield Blocker(
                    f"{held[status]} rows have status '{status}', "
                    "which recall-worker uses for recalls of its own",
                    f"give these rows of {_table(schema)} another status of the application",
                )
    for check in alone:
        refused = [
            s for s in STATUSES if s not in OURS and not _allows(conn, check["expression"], s)
        ]
        if refused:
            yield Blocker(
                f"check constraint {check['name']} refuses status {_list(refused)}: "
                f"{check['definition']}",
                f"let it allow {_list(refused)}, which every application of recall-worker writes",
            )
    yield from _column_of_statuses(conn, columns)
    trial = Trial(conn, schema, columns)
    for check in checks:
        if not check["alone"]:
            yield from _of_check(trial, check)
    for index in _ask(conn, "unique_indexes", schema=schema, others=_never_alike()):
        yield from _of_unique_index(trial, index)


def _values(conn: Connection, schema: str) -> dict[str, int]:
    """How many rows have a status that recall-worker adds, by status."""
    rows = conn.execute(
        sql.SQL(
            "select status::text, count(*) from {} where status::text = any ({}) group by 1"
        ).format(sql.Identifier(schema, "session_recalls"), sql.Literal(list(OURS))),
    )
    return {str(status): int(str(count)) for status, count in rows}


def _allows(conn: Connection, expression: str, status: str) -> bool:
    """Whether a check that reads status alone allows a value, as PostgreSQL sees it."""
    query = sql.SQL("select ({}) is not false from (values ({}::text)) t (status)").format(
        sql.SQL(expression),  # as the catalog has it
        sql.Literal(status),
    )
    try:
        with conn.transaction():
            return conn.execute(query).fetchone() == (True,)
    except errors.DataError:
        return False


def _column_of_statuses(conn: Connection, columns: list[dict[str, Any]]) -> Iterable[Blocker]:
    """Statuses that the column itself can't hold: a text that is too short, a domain."""
    declared = next(c["declared"] for c in columns if c["name"] == "status")
    refused = []
    for status in STATUSES:
        cast = sql.SQL("select ({}::text)::{}::text").format(sql.Literal(status), sql.SQL(declared))
        try:
            with conn.transaction():
                if conn.execute(cast).fetchone() != (status,):
                    refused.append(status)
        except errors.IntegrityError:
            refused.append(status)
    if refused:
        yield Blocker(
            f"a recall can't become {_or(refused)}: column status is {declared}",
            f"let the column status hold {_list(refused)}",
        )


_SAMPLES: Mapping[str, str] = {
    "text": "'x'",
    "character varying": "'x'",
    "uuid": "'00000000-0000-4000-8000-000000000001'",
    "smallint": "1",
    "integer": "1",
    "bigint": "1",
    "numeric": "1",
    "double precision": "1",
    "real": "1",
    "boolean": "true",
    "date": "now()",
    "timestamp with time zone": "now()",
    "timestamp without time zone": "now()",
    "json": "'{}'",
    "jsonb": "'{}'",
}
_MADE_UP: Mapping[str, str] = {
    "trigger_at": "now()",
    "created_at": "now()",
    "updated_at": "now()",
    "additional_context_message": "'x'",
}
_CALL_TYPES = ("once", "recurring", "immediate")
ROWS_MOST = 200
"""Rows of the application that a check is tried with, at most, of those that are pending, and of
the others."""


class Trial:
    """Rows of the table as they would be with each status, to ask for the value of an expression of
    the catalog's. Nothing is written."""

    def __init__(self, conn: Connection, schema: str, columns: list[dict[str, Any]]) -> None:
        self.schema = schema
        self._conn = conn
        self._columns = columns

    def rows(self) -> list[sql.Composable]:
        """Sources of rows, in the order in which they are to be tried: of the application; made up,
        with the defaults of its further columns; made up, with something in each."""
        held = sql.SQL(
            "select * from (select {0} from {1} where status = 'pending' limit {2}) p "
            "union all select * from (select {0} from {1} limit {2}) o"
        ).format(
            sql.SQL(", ").join(sql.Identifier(c["name"]) for c in self._given()),
            sql.Identifier(self.schema, RECALLS),
            sql.Literal(ROWS_MOST),
        )
        return [held, *(self._made_up(filled=filled) for filled in (False, True))]

    def values(
        self, source: sql.Composable, expressions: Sequence[str]
    ) -> list[dict[str, tuple[Any, ...]]]:
        """The values of expressions for each row and status. Raises psycopg.Error where PostgreSQL
        can't tell."""
        kept = [c["name"] for c in self._given() if c["name"] != "status"]
        status = next(c["type"] for c in self._columns if c["name"] == "status")
        query = sql.SQL(
            "select recall_row, recall_status, {values} from ("
            "select b.*{generated} from ("
            "select t.recall_row, v.recall_status, {kept}, v.recall_status::{status} as status "
            "from (select row_number() over () as recall_row, s.* from ({source}) s) t "
            "cross join (values {statuses}) v (recall_status)"
            ") b) session_recalls"
        ).format(
            values=sql.SQL(", ").join(sql.SQL(f"({value})") for value in expressions),
            generated=sql.SQL("").join(
                sql.SQL(", ") + _named(c, c["expression"]) for c in self._columns if c["generated"]
            ),
            kept=sql.SQL(", ").join(sql.Identifier("t", name) for name in kept),
            status=sql.SQL(status),
            source=source,
            statuses=sql.SQL(", ").join(sql.SQL("({})").format(s) for s in STATUSES),
        )
        found: dict[Any, dict[str, tuple[Any, ...]]] = {}
        with self._conn.transaction():
            for row, at, *these in self._conn.execute(query).fetchall():
                found.setdefault(row, {})[str(at)] = tuple(these)
        return list(found.values())

    def _given(self) -> list[dict[str, Any]]:
        return [c for c in self._columns if not c["generated"]]

    def _made_up(self, *, filled: bool) -> sql.Composable:
        """A pending row of each call_type."""

        def value(column: Mapping[str, Any], call_type: str) -> str:
            name, type_ = column["name"], column["type"]
            sample = _SAMPLES.get(re.sub(r"\(.*?\)", "", type_))
            if name == "call_type":
                return f"'{call_type}'"
            if name == "status":
                return "'pending'"
            if name == "interval_seconds":
                return "3600" if call_type == "recurring" else "null"
            if name in WANTED and name not in NULLABLE:
                return _MADE_UP.get(name, sample or "null")
            if filled:
                return sample or "null"
            default = column["expression"]
            if name in WANTED or column["identity"] or default is None:
                # What may not be null has something in it.
                return "null" if column["null"] else sample or "null"
            return (sample or "null") if "nextval(" in default else str(default)

        rows = [
            sql.SQL("select {}").format(
                sql.SQL(", ").join(_named(c, value(c, call_type)) for c in self._given())
            )
            for call_type in _CALL_TYPES
        ]
        return sql.SQL(" union all ").join(rows)


def _named(column: Mapping[str, Any], expression: str) -> sql.Composable:
    """A value for a column, of the type below the column's domain."""
    return sql.SQL("({})::{} as {}").format(
        sql.SQL(expression), sql.SQL(column["type"]), sql.Identifier(column["name"])
    )


def _of_check(trial: Trial, check: Mapping[str, Any]) -> Iterable[Blocker]:
    """A check that reads status beside other columns: whether a row that it lets be pending can
    have each status."""
    named = f"check constraint {check['name']}: {check['definition']}"
    refused: list[str] = []
    tried = False
    for source in trial.rows():
        try:
            rows = trial.values(source, [f"({check['expression']}) is not false"])
        except psycopg.OperationalError:
            raise
        except psycopg.Error:
            continue
        for row in rows:
            if row["pending"] == (True,):
                tried = True
                refused += [s for s in STATUSES if row[s] != (True,) and s not in refused]
        if tried:
            break
    if refused:
        these = [status for status in STATUSES if status in refused]
        yield Blocker(
            f"a recall can't become {_or(these)}: {named}",
            f"let the constraint allow {_list(these)}, or drop it",
        )
    elif not tried:
        yield Blocker(
            f"whether a recall can have each status can't be tried, for want of a pending row: "
            f"{named}",
            "insert a pending recall by the application, then try again; or drop the constraint",
        )


def _never_alike() -> list[str]:
    """Columns in which two recalls of one session differ, or that are ours."""
    return [
        "id",
        "trigger_at",
        "created_at",
        "updated_at",
        "additional_context_message",
        "internal_comment",
        *sorted(_added()),
    ]


def _of_unique_index(trial: Trial, index: Mapping[str, Any]) -> Iterable[Blocker]:
    """A unique index over more than the pending recalls: whether two recalls of one session that
    are alike but for their statuses can be there at once, as recall-worker needs it."""
    named = f"unique index {index['name']}: {index['definition']}"
    drop = f"drop index {_table(trial.schema, index['name'])}"
    if index["constraint"] is not None:
        drop = _alter(trial.schema, f"drop constraint {identifier(index['constraint'])}")
    todo = (
        f"{drop}; then, where a session is to have one pending recall only: create unique index on "
        f"{_table(trial.schema)} (session_id) where status = 'pending'"
    )
    asked = [f"({index['condition'] or 'true'}) is true", *(f"({k})::text" for k in index["keys"])]
    tried = False
    for source in trial.rows():
        try:
            rows = trial.values(source, asked)
        except psycopg.OperationalError:
            raise
        except psycopg.Error:
            continue
        tried = True
        for row in rows:
            said = _apart(row)
            if said is not None:
                yield Blocker(f"{said}: {named}", todo)
                return
    if not tried:
        yield Blocker(f"whether recalls can have each status can't be tried: {named}", todo)


def _apart(row: Mapping[str, tuple[Any, ...]]) -> str | None:
    """What an index keeps recalls of one session from, in words; None where that is nothing that
    recall-worker needs. `row`: by status, whether the index has the row, and its keys."""

    def exclude(one: str, other: str) -> bool:
        return bool(row[one][0] and row[other][0]) and row[one] == row[other]

    if exclude("pending", "fired"):
        return None  # A session has one recall, whatever its state: the application's own rule.
    for status in OURS:
        if exclude("pending", status):
            return f"a session with a {status} recall can't have a pending one"
    beside = [s for s in STATUSES if s != "pending" and not exclude("pending", s)]
    for one in beside:
        for other in beside:
            if exclude(one, other):
                return f"a session can't have a {one} recall and a second that is {other}"
    return None


# --- the key to sessions --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reference:
    """A table that session_id is to refer to."""

    schema: str
    table: str


def reference(conn: Connection, schema: str, table: str) -> Reference | None:
    """What `migrate --foreign-key TABLE` is to refer to; None where session_id refers to it
    already. Raises Refused where it can't."""
    try:
        with conn.transaction():
            rows = _ask(conn, "referable", schema=schema, table=table)
    except (errors.InvalidName, errors.SyntaxError, errors.FeatureNotSupported):
        rows = []
    if not rows:
        raise Refused(
            [
                Blocker(
                    f"there is no table {table} that session_id could refer to",
                    "give its name, with its schema where it is not beside the recalls: "
                    "recall-worker migrate --foreign-key app.sessions",
                )
            ]
        )
    [row] = rows
    for key in _ask(conn, "keys_to_sessions", schema=schema):
        if (key["schema"], key["table"], key["column"]) == (row["schema"], row["table"], "id"):
            return None
    blockers = []
    if row["kind"] not in ("r", "p"):
        blockers.append(
            Blocker(f"{row['to']} is not a table that can be referred to", "name the table itself")
        )
    elif row["type"] is None:
        blockers.append(Blocker(f"{row['to']} has no column id", "name the table of the sessions"))
    else:
        if row["type"] != row["wanted"] and not {row["type"], row["wanted"]} <= set(_TEXT):
            blockers.append(
                Blocker(
                    f"{row['to']}.id is {row['type']}, and session_recalls.session_id is "
                    f"{row['wanted']}: a foreign key needs the same type",
                    "name the table of the sessions, or give both columns one type",
                )
            )
        if not row["unique"]:
            blockers.append(
                Blocker(
                    f"{row['to']}.id is not unique, and a foreign key needs that",
                    f"alter table {row['to']} add primary key (id)",
                )
            )
        if not row["refers"]:
            blockers.append(
                Blocker(
                    f"this role may not refer to {row['to']}",
                    f"grant references on {row['to']} to {identifier(row['role'])}",
                )
            )
    if blockers:
        raise Refused(blockers)
    return Reference(row["schema"], row["table"])


def own_sessions(conn: Connection, schema: str) -> Reference | None:
    """The table `sessions` beside a table that `migrate` has just created, where its id can be
    referred to by a text; None otherwise."""
    rows = _ask(conn, "referable", schema=schema, table=f"{identifier(schema)}.sessions")
    if rows and rows[0]["kind"] == "r" and rows[0]["type"] == "text":
        row = rows[0]
        if row["unique"] and row["refers"]:
            return Reference(row["schema"], row["table"])
    return None


def free_name(conn: Connection, schema: str, wanted: str) -> str:
    """A name for a constraint that no other one of the table has."""
    names = {row["name"] for row in _ask(conn, "constraint_names", schema=schema)}
    return next(
        name for name in (wanted, *(f"{wanted}{n}" for n in range(1, 1000))) if name not in names
    )


def _key_text(key: Mapping[str, Any]) -> str:
    actions = {"c": "cascade", "n": "set null", "d": "set default", "r": "restrict"}
    on_delete = actions.get(key["on_delete"], "no action")
    return f"session_id refers to {key['to']}({key['column']}), on delete {on_delete}"


# --- words ----------------------------------------------------------------------------------------


def _one(conn: Connection, query: str) -> object:
    row = conn.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def _table(schema: str, name: str = "session_recalls") -> str:
    return f"{identifier(schema)}.{identifier(name)}"


def _alter(schema: str, what: str, name: str = "session_recalls") -> str:
    return f"alter table {_table(schema, name)} {what}"


def _drop(schema: str, checks: list[dict[str, Any]]) -> str:
    return _alter(schema, ", ".join(f"drop constraint {identifier(c['name'])}" for c in checks))


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _or(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
