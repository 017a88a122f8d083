"""The schema as released, and the schema as it is: one shape for both, so that they can be
compared.

Owns the record `sql/released.json`, which `python -m tests.schema` writes from a database that was
just migrated, and the way in which definitions are made comparable. PostgreSQL prints them, and
three things are taken out: the name of the schema (`SCHEMA` stands for it in bodies of functions),
casts to text (PostgreSQL prints them where the application chose varchar), and the names and
storage parameters of indexes. What is left is valid SQL, of which `catalog` makes repairs.

Never here: what a difference means, and how it is repaired (catalog).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import psycopg
from psycopg.rows import dict_row

from .. import statements

RECALLS = "session_recalls"
"""The application's table, to which we add columns."""
RECORD = "recall_schema"
"""The table of the migrations that were applied."""
READERS = ("recall_id", "recall_session")
"""The functions that read an id which somebody typed (migration 0020)."""
DOMAINS = ("recall_id_type", "recall_session_type")
"""The types of the keys (the same)."""
SCHEMA = "@schema@"
"""Stands in the record for the schema's name, as SQL has to write it."""
APPLICATION = 0
"""The version of what stood there before the first migration."""

Connection = psycopg.Connection[Any]


@dataclass(frozen=True, slots=True)
class Column:
    """`since`: the first version that had it."""

    type: str
    default: str | None
    not_null: bool
    identity: str = ""
    generated: str = ""
    comment: str | None = None
    since: int = APPLICATION


@dataclass(frozen=True, slots=True)
class Constraint:
    kind: str
    """p: primary key, u: unique, c: check."""
    definition: str
    columns: tuple[str, ...]
    since: int = APPLICATION


@dataclass(frozen=True, slots=True)
class Index:
    unique: bool
    definition: str
    """From USING on."""
    since: int = APPLICATION
    serves: bool = True
    """Whether it was built to its end: queries and unique indexes count on it."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Its columns, without their order and what is only included; of expressions nothing."""
        found = re.match(r"USING btree \(([\w, ]+)\)", self.definition)
        return tuple(key.split()[0] for key in found[1].split(", ")) if found else ()

    @property
    def condition(self) -> str:
        """Of a partial index, else ''."""
        return self.definition.partition(" WHERE ")[2]


@dataclass(frozen=True, slots=True)
class Trigger:
    event: str
    """When it fires: BEFORE INSERT."""
    scope: str
    """FOR EACH ROW, and its condition."""
    function: str
    """With the schema before it where that is not the table's."""
    since: int = APPLICATION
    arguments: str = ""
    """As they stand between the parentheses behind the function."""
    enabled: str = "O"
    """As in pg_trigger: O and A fire in ordinary sessions, R and D don't."""


@dataclass(frozen=True, slots=True)
class Function:
    body: str
    language: str
    returns: str
    definer: bool
    strict: bool
    settings: tuple[str, ...]
    since: int = APPLICATION
    owner: str = ""
    strange: bool = False
    """Whether its owner has nothing to do with the owner of session_recalls."""

    def at(self, quoted: str) -> str:
        """Its body for a schema. It names its tables in full, so that it does not depend on the
        search_path of whoever writes to them."""
        return self.body.replace(SCHEMA, quoted)


@dataclass(frozen=True, slots=True)
class Table:
    columns: dict[str, Column]
    constraints: dict[str, Constraint] = field(default_factory=dict)
    indexes: dict[str, Index] = field(default_factory=dict)
    triggers: dict[str, Trigger] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    """Its storage parameters. An owner may choose others."""
    comment: str | None = None
    kind: str = "r"
    persistence: str = "p"
    since: int = APPLICATION
    owner: str = ""
    strange: bool = False


@dataclass(frozen=True, slots=True)
class Schema:
    tables: dict[str, Table]
    functions: dict[str, Function]
    privileges: dict[str, dict[str, dict[str, list[str] | None]]] = field(default_factory=dict)
    """By role, table and privilege: of these columns, or None for the whole table."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tables are."""

    adopted: bool
    """Whether session_recalls is there."""
    schema: str
    quoted: str
    """The schema's name as SQL has to write it."""
    owner: str | None
    """Of session_recalls."""
    record: bool
    """Whether the record of the migrations stands in that schema, too."""


# --- the record -----------------------------------------------------------------------------------


@cache
def released() -> Schema:
    """The schema that this code was released with. Raises FileNotFoundError."""
    text = (statements.folder() / "released.json").read_text(encoding="utf-8")
    return from_json(json.loads(text))


def from_json(record: Mapping[str, Any]) -> Schema:
    return Schema(
        tables={
            name: Table(
                columns={n: Column(**c) for n, c in table["columns"].items()},
                constraints={
                    n: Constraint(**(c | {"columns": tuple(c["columns"])}))
                    for n, c in table["constraints"].items()
                },
                indexes={n: Index(**i) for n, i in table["indexes"].items()},
                triggers={n: Trigger(**t) for n, t in table["triggers"].items()},
                options=tuple(table["options"]),
                comment=table["comment"],
                since=table["since"],
            )
            for name, table in record["tables"].items()
        },
        functions={
            name: Function(**(f | {"settings": tuple(f["settings"])}))
            for name, f in record["functions"].items()
        },
        privileges=record["privileges"],
    )


def to_json(schema: Schema) -> dict[str, Any]:
    """The record of a schema: without what says only how this database is."""
    local = {"owner", "strange", "enabled", "serves", "kind", "persistence"}

    def kept(thing: Any, *also: str) -> dict[str, Any]:
        return {k: v for k, v in asdict(thing).items() if k not in local - set(also)}

    record = asdict(schema)
    for name, table in schema.tables.items():
        record["tables"][name] = kept(table) | {
            "options": list(table.options),
            "columns": {n: asdict(c) for n, c in table.columns.items()},
            "constraints": {n: asdict(c) for n, c in table.constraints.items()},
            "indexes": {n: kept(i) for n, i in table.indexes.items()},
            "triggers": {n: kept(t) for n, t in table.triggers.items()},
        }
        for constraint in record["tables"][name]["constraints"].values():
            constraint["columns"] = list(constraint["columns"])
    record["functions"] = {
        n: kept(f) | {"settings": list(f.settings)} for n, f in schema.functions.items()
    }
    return record


# --- the database ---------------------------------------------------------------------------------


def ask(conn: Connection, statement: str, **values: Any) -> list[dict[str, Any]]:
    """The rows of a statement of sql/catalog.sql."""
    with conn.cursor(row_factory=dict_row) as cursor:
        cursor.execute(statements.load("catalog")[statement].encode(), values or None)
        return cursor.fetchall()


def place(conn: Connection) -> Place | None:
    """Where session_recalls is, or the record of the migrations of one that was dropped; None where
    there is neither."""
    rows = ask(conn, "place")
    return Place(**rows[0]) if rows else None


def read(conn: Connection, where: Place, tables: Iterable[str], functions: Iterable[str]) -> Schema:
    """These tables and functions as they are in a schema. Those that are missing are left out."""
    given = {"schema": where.schema, "tables": list(tables)}
    found: dict[str, Table] = {}
    for row in ask(conn, "columns", **given):
        table = found.setdefault(
            row["table"],
            Table(
                {},
                options=tuple(row["options"] or ()),
                kind=row["kind"],
                persistence=row["persistence"],
                comment=row["about"],
                owner=row["owner"],
                strange=bool(row["strange"]),
            ),
        )
        if row["name"] is None:
            continue
        names = ("type", "default", "not_null", "identity", "generated", "comment")
        column = Column(**{name: row[name] for name in names})
        default = None if column.default is None else plain(column.default)
        table.columns[row["name"]] = replace(column, default=default)
    for row in ask(conn, "constraints", **given):
        definition = row["definition"].removesuffix(" NOT VALID")
        found[row["table"]].constraints[row["name"]] = Constraint(
            row["kind"],
            plain(definition) if row["kind"] == "c" else definition,
            tuple(row["columns"]),
        )
    for row in ask(conn, "indexes", **given):
        found[row["table"]].indexes[row["name"]] = Index(
            row["unique"], _of_index(row["definition"]), serves=row["serves"]
        )
    for row in ask(conn, "triggers", **given):
        event, scope = _of_trigger(row, f"{where.quoted}.{row['table']}")
        near = row["place"] == where.schema
        found[row["table"]].triggers[row["name"]] = Trigger(
            event,
            scope,
            row["function"] if near else f"{row['place']}.{row['function']}",
            arguments=row["definition"].rpartition("(")[2].removesuffix(")"),
            enabled=row["enabled"],
        )
    return Schema(
        found,
        {
            row["name"]: Function(
                row["body"],
                row["language"],
                row["returns"],
                row["definer"],
                row["strict"],
                tuple(row["settings"]),
                owner=row["owner"],
                strange=bool(row["strange"]),
            )
            for row in ask(conn, "functions", schema=where.schema, functions=list(functions))
        },
    )


_CAST = re.compile(r"::(?:text|character varying|bpchar)(?:\(\d+\))?(?:\[\])?")
_NAME_IN_PARENTHESES = re.compile(r"(?<![\w\"])\(((?:new\.|old\.)?\w+)\)")
_ARRAY_IN_PARENTHESES = re.compile(r"\(\((ARRAY\[[^][]*\])\)\)")
_STORAGE = re.compile(r" WITH \([^()]*\)")
_STRING = re.compile(r"('(?:[^']|'')*')")


def plain(definition: str) -> str:
    """An expression without the casts to text that PostgreSQL prints where a column is varchar, and
    without the parentheses that they need. What stands in quotes is left alone."""
    parts = _STRING.split(definition)
    # A cast stands behind what it casts, which may be a string.
    parts[::2] = [_CAST.sub("", part) for part in parts[::2]]
    held: list[str] = []

    def hold(string: re.Match[str]) -> str:
        held.append(string[1])
        return f"'{len(held) - 1}'"

    text = _STRING.sub(hold, "".join(parts))
    text = _ARRAY_IN_PARENTHESES.sub(r"(\1)", _NAME_IN_PARENTHESES.sub(r"\1", text))
    return re.sub(r"'(\d+)'", lambda number: held[int(number[1])], text)


def _of_index(definition: str) -> str:
    """From USING on. Storage parameters say how it is stored; those of a BRIN index, what it is."""
    head, _, condition = f"USING {definition.partition(' USING ')[2]}".partition(" WHERE ")
    if not head.startswith("USING brin"):
        head = _STORAGE.sub("", head)
    return head + (f" WHERE {plain(condition)}" if condition else "")


def _of_trigger(row: Mapping[str, Any], table: str) -> tuple[str, str]:
    """A trigger's event and scope, of a definition with its name before and its function behind."""
    head = re.sub(r"^CREATE (?:CONSTRAINT )?TRIGGER ", "", row["definition"])
    event, _, behind = head.removeprefix(f"{row['quoted']} ").partition(f" ON {table} ")
    return event, plain(behind.rpartition(" EXECUTE FUNCTION ")[0])
