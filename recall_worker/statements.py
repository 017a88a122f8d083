"""Finds `sql/` and splits its files into named statements.

A file is a sequence of `-- name: <name>` headers, each followed by one statement. Comments are for
the reader of the file and are dropped here, as psycopg would read a `%` in one as a placeholder.
So is the indentation of lines: a sixth of what is sent each time where nothing is prepared.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_NAME = re.compile(r"^-- name: (\w+)\s*$", re.MULTILINE)
_COMMENT = re.compile(r"^\s*--.*$|\s--\s.*$", re.MULTILINE)
_INDENTATION = re.compile(r"\n\s+")


def folder() -> Path:
    """The folder `sql/`: beside the modules in an installed wheel, beside the package in a
    checkout. Raises FileNotFoundError."""
    for candidate in (_HERE / "sql", _HERE.parent / "sql"):
        if (candidate / "ledger.sql").is_file():
            return candidate
    raise FileNotFoundError(
        "recall_worker is installed without its sql/ folder; install the wheel again"
    )


def text(file: str) -> str:
    """The text of `sql/<file>.sql`."""
    return (folder() / f"{file}.sql").read_text(encoding="utf-8")


@cache
def load(file: str) -> dict[str, str]:
    """The named statements of `sql/<file>.sql`, without comments and indentation, in the file's
    order."""
    parts = _NAME.split(text(file))
    return {
        name: _INDENTATION.sub("\n", _COMMENT.sub("", body)).strip().rstrip(";")
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def migrations() -> list[Path]:
    """The migrations' files, in order."""
    return sorted((folder() / "migrations").glob("[0-9][0-9][0-9][0-9]_*.sql"))


@cache
def generation() -> int:
    """The schema version that this code was written for: the number of its last migration.

    Read once: a running worker asks at each heartbeat, and may have no descriptor left by then.
    """
    return int(migrations()[-1].name[:4])
