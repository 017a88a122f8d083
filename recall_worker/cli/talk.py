"""How the commands speak: troubles with hints and exit statuses, tables that fit the terminal, JSON documents, durations.

Every text that comes from a row is made harmless before a terminal sees it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from ..events import harmless

REFUSED, USAGE, UNREACHABLE = 1, 2, 3


class Trouble(Exception):
    """A command that can't do what it was asked: said in a sentence, with hints on what to do."""

    def __init__(self, what: str, *hints: str, status: int = REFUSED) -> None:
        super().__init__(what)
        self.what = harmless(what)
        self.hints = [harmless(hint) for hint in hints]
        self.status = status


def explain(error: BaseException) -> Trouble | None:
    """The trouble behind an exception that a user can do something about; None for a defect."""
    import psycopg
    from psycopg import errors

    from ..ledger import Outage, Refusal, said
    from ..schema import SchemaError
    from ..settings import SettingsError

    match error:
        case Trouble():
            return error
        case SettingsError():
            what = "; ".join(error.problems)
            return Trouble(what, "recall-worker run --help (it lists the settings)", status=USAGE)
        case SchemaError():
            return Trouble(str(error), error.hint)
        case errors.UndefinedTable() | errors.UndefinedColumn() | errors.UndefinedFunction():
            return Trouble(f"the database has no (or an old) recall-worker schema: {said(error)}", "recall-worker migrate")
        case errors.InsufficientPrivilege():
            return Trouble(f"PostgreSQL forbids it: {said(error)}", "give RECALL_DSN an account with rights on session_recalls")
        case errors.ReadOnlySqlTransaction():
            return Trouble("this PostgreSQL is a standby: it takes no writes", "give the primary's address in RECALL_DSN")
        case errors.ProgrammingError() if error.sqlstate is None:
            return Trouble(f"RECALL_DSN can't be read: {said(error)}", "postgresql://user@host/database", status=USAGE)
        case errors.OperationalError() | Outage():
            return Trouble(
                f"PostgreSQL can't be reached: {said(error)}", "check RECALL_DSN, and that the server runs", status=UNREACHABLE
            )
        case psycopg.Error() | Refusal():
            return Trouble(f"PostgreSQL refuses it: {said(error)}")
        case _:
            return None


def tell(text: str) -> None:
    """Talk: to stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    json.dump(document, sys.stdout, default=_jsonable, ensure_ascii=not _utf8(), indent=2 if sys.stdout.isatty() else None)
    print()


def _utf8() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8" and not sys.stdout.isatty()


def _jsonable(value: Any) -> Any:
    match value:
        case datetime():
            return rfc3339(value)
        case UUID():
            return str(value)
        case timedelta():
            return value.total_seconds()
        case _:
            raise TypeError(type(value).__name__)


def rfc3339(when: datetime) -> str:
    return when.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def local(when: datetime | None) -> str:
    """A date for a person: local time, to the second."""
    if when is None:
        return ""
    try:
        return when.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError):
        return rfc3339(when)


def relative(when: datetime | None, now: datetime) -> str:
    """How far off a date is: `in 2 h`, `3 min ago`."""
    if when is None:
        return ""
    seconds = (when - now).total_seconds()
    size = abs(seconds)
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if size >= length * (2 if unit != "s" else 1):
            return f"in {size / length:.0f} {unit}" if seconds > 0 else f"{size / length:.0f} {unit} ago"
    return "now"


_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d|w)?")


def seconds(text: str, option: str) -> float:
    """A duration as people write it: `90s`, `5m`, `1h30m`, `2d`, or plain seconds. Raises Trouble."""
    total, at = 0.0, 0
    text = text.strip().lower()
    for part in _PART.finditer(text):
        if part.start() != at:
            break
        total += float(part[1]) * _UNITS[part[2] or "s"]
        at = part.end()
    if not text or at != len(text):
        raise Trouble(f"{option} {text!r} is no duration", f"{option} 90s, 5m, 1h30m or 2d", status=USAGE)
    return total


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, wide: str | None = None) -> None:
    """A table on stdout that fits the terminal; the column `wide` gives way first. Piped, it is as wide as its data."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    console = Console(highlight=False, width=None if terminal else 10_000, soft_wrap=False)
    table = Table(box=None, pad_edge=False, header_style="bold" if terminal else "", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="ellipsis", no_wrap=True, ratio=None, min_width=None if column != wide else 12)
    for row in rows:
        table.add_row(*(Text(harmless(cell), style=_STYLES.get(cell, "") if terminal else "") for cell in row))
    console.print(table)


_STYLES = {"pending": "cyan", "running": "yellow", "fired": "green", "failed": "red", "cancelled": "dim"}


def columns(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}
