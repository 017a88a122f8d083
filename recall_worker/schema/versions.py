"""The record of the migrations that a database has: the rows of recall_schema, and a comment on
that table that says the same.

A dump of the schema has no rows, but it has the comment: where the rows are missing they are
written again from it. Versions up to 0019 wrote no comment. Of a schema that they made the catalog
tells which of them have been applied, as each left something behind. Where neither tells, but the
table has the trigger of recall-worker, somebody has dropped what was not known to him, such as a
tool that generates migrations from models: all migrations are taken for applied, and what is
missing of the release is put back (catalog). Without that trigger nothing is guessed.

Never here: what a migration does, and when it is applied.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from .. import statements

FIRST, LAST_WITHOUT_COMMENT = 10, 19
"""The baseline's first migration, and the last one of a version that wrote no comment."""
_COMMENT = re.compile(r"migrations (\d+(?: \d+)*); works with code from: (\d+)$")

_WORKS_WITH = re.compile(r"^-- works with code from: (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a database's migrations."""

    versions: frozenset[int]
    oldest_code: int
    """The oldest code that can work with the schema; 0 where there is none."""
    lost: bool
    """Whether the rows of recall_schema are missing, and `versions` is known otherwise."""
    comment: str | None
    adopted: bool
    """Whether session_recalls has columns of ours."""
    evidence: str = ""
    """Where nothing tells which migrations were applied: what was found."""


def read(conn: psycopg.Connection[tuple[Any, ...]], schema: str | None = None) -> Record:
    """The record. `schema`: of the table; None: what the search_path finds. It has no versions
    where nothing was applied, or nothing tells: then `adopted` is True. Raises psycopg.Error."""
    texts = statements.load("identity")
    found = conn.execute(texts["applied"].encode(), {"schema": schema}).fetchone()
    assert found is not None
    comment, there, adopted, marked = found
    table = sql.Identifier(*([schema] if schema else []), "recall_schema")
    select = sql.SQL("select version, oldest_code from {}").format(table)
    rows = conn.execute(select).fetchall() if there else []
    if rows:
        versions = frozenset(version for version, _ in rows)
        return Record(versions, max(code for _, code in rows), False, comment, adopted)
    if (said := _COMMENT.search(comment or "")) is not None:
        return Record(frozenset(map(int, said[1].split())), int(said[2]), True, comment, adopted)
    if not adopted and not marked:
        return Record(frozenset(), 0, False, comment, False)
    traces = conn.execute(texts["evidence"].encode(), {"schema": schema}).fetchall()
    seen: dict[int, bool] = dict(traces)
    last = max((version for version, there in seen.items() if there), default=0)
    whole = all(there == (version <= last) for version, there in seen.items())
    if whole and 0 < last <= LAST_WITHOUT_COMMENT:
        return Record(frozenset(range(FIRST, last + 1)), FIRST, True, comment, True)
    if marked:
        return Record(frozenset(_known()), _oldest_code(), True, comment, True)
    left = ", ".join(f"{version:04}" for version, there in seen.items() if there) or "none"
    return Record(frozenset(), 0, False, comment, True, left)


def _known() -> list[int]:
    """The numbers of the migrations that this code carries."""
    return [int(path.name[:4]) for path in statements.migrations()]


def _oldest_code() -> int:
    """The oldest code that can work with the schema that this code makes."""
    texts = (path.read_text(encoding="utf-8") for path in statements.migrations())
    return max(int(found[1]) for text in texts if (found := _WORKS_WITH.search(text)))


def write(conn: psycopg.Connection[tuple[Any, ...]], baseline: int) -> None:
    """Write the comment for what the rows say, if it is not there already; in the transaction that
    is open, if any. `baseline`: the migrations below it are part of it."""
    record = read(conn)
    if not record.versions or record.lost:
        return
    least = baseline if baseline in record.versions else 0
    listed = " ".join(str(version) for version in sorted(record.versions) if version >= least)
    comment = (
        "the migrations that were applied, by recall-worker migrate; the same for a dump of the "
        f"schema: migrations {listed}; works with code from: {record.oldest_code}"
    )
    if comment != record.comment:
        conn.execute(sql.SQL("comment on table recall_schema is {}").format(sql.Literal(comment)))


def restore(
    conn: psycopg.Connection[Any],
    versions: Collection[int],
    oldest_code: int,
    names: Mapping[int, str],
) -> None:
    """Write the rows again that a dump of the schema left out. `names`: of the migrations that this
    code knows."""
    with conn.transaction(), conn.cursor() as cursor:
        cursor.executemany(
            "insert into recall_schema (version, name, oldest_code) values (%s, %s, %s)",
            [(version, names.get(version, "unknown"), oldest_code) for version in sorted(versions)],
        )
