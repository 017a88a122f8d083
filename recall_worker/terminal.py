"""How commands talk to people: errors with hints and exit statuses, tables that fit the terminal,
JSON documents, times.

Control characters in texts from a row are escaped before a terminal sees them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import Decimal
from itertools import zip_longest
from typing import Any
from uuid import UUID

from . import durations
from .dsn import EXAMPLE
from .events import escape_controls

ZONE: ContextVar[tzinfo | None] = ContextVar("zone", default=None)
"""The time zone in which people read dates; None: this host's."""
REFUSED, USAGE, UNREACHABLE, OUTDATED = 1, 2, 3, 4
"""Exit statuses. OUTDATED: the schema is for newer code than this; only an upgrade helps."""


class Trouble(Exception):
    """A command can't do its task: a sentence that says why, with hints on what to do."""

    def __init__(self, what: str, *hints: str, status: int = REFUSED) -> None:
        super().__init__(what)
        self.what = escape_controls(what)
        self.hints = [escape_controls(hint) for hint in hints]
        self.status = status


class Declined(Trouble):
    """Nothing was done, as a person did not agree, or as there was nobody to ask. It is no error,
    and is said without that word."""


def explain(error: BaseException) -> Trouble | None:
    """The Trouble for an exception that a user can do something about; None for a defect."""
    import psycopg
    from psycopg import errors

    from .database.connection import (
        OF_THE_SCHEMA,
        DatabaseUnavailable,
        StatementRejected,
        error_text,
    )
    from .schema import Refused, SchemaError
    from .selection import AmbiguousId, NoSessions, SelectionError
    from .settings import SettingsError

    match error:
        case Trouble():
            return error
        case SettingsError():
            what = "; ".join(error.problems)
            hints = ["recall-worker settings (all of them, and where each comes from)"]
            if any(problem.startswith("RECALL_DSN is not set") for problem in error.problems):
                hints.insert(0, f"--dsn {EXAMPLE}, or the same in RECALL_DSN")
            if any(problem.startswith("RECALL_RUN_URL is not set") for problem in error.problems):
                hints.append("recall-worker reference-api (an endpoint to try it with)")
            return Trouble(what, *hints, status=USAGE)
        case SelectionError():
            return Trouble(str(error), error.instead, status=USAGE)
        case AmbiguousId():
            return Trouble(str(error), "more characters of the id")
        case NoSessions():
            return Trouble(
                "this database has no table sessions, so a user's sessions are not known",
                "--session ID",
            )
        case Refused():
            whats, todos = zip(*error.numbered(), strict=True)
            return Trouble(f"session_recalls, nothing was changed: {'; '.join(whats)}", *todos)
        case SchemaError():
            return Trouble(str(error), error.hint)
        case (
            errors.UndefinedTable()
            | errors.UndefinedColumn()
            | errors.UndefinedFunction()
            | errors.UndefinedObject()
        ):
            return Trouble(
                "the database has no (or an old) recall-worker schema, or a damaged one: "
                + error_text(error),
                "recall-worker migrate",
            )
        case errors.InsufficientPrivilege():
            hint = (
                "give RECALL_DSN an account in the role recall_worker (see docs/roles.md), "
                "or the tables' owner for migrate"
            )
            return Trouble(f"PostgreSQL forbids it: {error_text(error)}", hint)
        case errors.ReadOnlySqlTransaction():
            return Trouble(
                "this PostgreSQL takes no writes: it is a standby, or "
                "default_transaction_read_only is on",
                "give the primary's address in RECALL_DSN",
            )
        case errors.ProgrammingError() if error.sqlstate is None:
            # What libpq quotes from an unreadable DSN may be a part of the password.
            what = re.sub(r'"[^"]*"', "…", error_text(error))
            return Trouble(f"RECALL_DSN (or --dsn) can't be read: {what}", EXAMPLE, status=USAGE)
        case errors.QueryCanceled():
            return Trouble(
                f"PostgreSQL gave up what was asked: {error_text(error)}",
                "the same with narrower filters, or when the database has less to do",
            )
        case errors.OperationalError() | DatabaseUnavailable():
            return Trouble(
                f"PostgreSQL can't be reached: {error_text(error)}",
                "check RECALL_DSN (or --dsn), and whether the server runs",
                status=UNREACHABLE,
            )
        case errors.DataError():
            return Trouble(
                f"PostgreSQL can't store that: {error_text(error)}",
                "a nearer time, or text without NUL characters",
                status=USAGE,
            )
        case psycopg.Error() | StatementRejected() if (error.sqlstate or "")[:2] == OF_THE_SCHEMA:
            return Trouble(
                f"the schema is not as recall-worker made it: {error_text(error)}",
                "recall-worker migrate (recall-worker doctor names what is missing)",
            )
        case psycopg.Error() | StatementRejected():
            return Trouble(
                f"PostgreSQL refuses it: {error_text(error)}", "read PostgreSQL's own log"
            )
        case UnicodeEncodeError():
            return Trouble(
                "an argument is not text: it holds bytes that are not UTF-8",
                "the same command, with arguments in UTF-8",
                status=USAGE,
            )
        case _ if (usage := getattr(error, "ctx", None)) is not None and hasattr(
            error, "format_message"
        ):
            # A usage error of the command line's library: click, or typer's copy of it.
            what = " ".join(str(getattr(error, "format_message")()).split()).removesuffix(".")  # noqa: B009 - typer tells no types of it
            return Trouble(what, f"{usage.command_path} --help", status=USAGE)
        case _:
            return None


def command(*words: str) -> str:
    """A command line to try, quoted for a shell."""
    guard = ["--"] if len(words) == 2 and words[1].startswith("-") else []
    return " ".join(["recall-worker", words[0], *guard, *map(shlex.quote, words[1:])])


def tell(text: str) -> None:
    """A message to a person: on stderr. What quotes a row in it, and may hold line breaks, is
    escaped by the caller."""
    print("\n".join(map(escape_controls, text.split("\n"))), file=sys.stderr, flush=True)


def warn_of_password(dsn: str | None) -> None:
    """Warn that a password on the command line can be read by others."""
    from psycopg import ProgrammingError
    from psycopg.conninfo import conninfo_to_dict

    from .dsn import libpq

    try:
        given = dsn is not None and "password" in conninfo_to_dict(libpq(dsn))
    except (ProgrammingError, ValueError):
        return  # An unreadable DSN is reported where it is used.
    if given:
        tell(
            "Note: the list of processes shows the password in --dsn to everybody on this "
            "host: set RECALL_DSN instead."
        )


def ask(question: str, *, answer: str | None = None) -> None:
    """Go on where the person at the terminal agrees: by y or yes, or by what `answer` says. Raises
    Declined."""
    wanted = ("y", "yes") if answer is None else (answer,)
    choice = " [y/N]" if answer is None else ""
    print(f"{escape_controls(question)}{choice} ", end="", file=sys.stderr, flush=True)
    try:
        said = input().strip().lower()
    except EOFError:
        print(file=sys.stderr)
        raise nobody() from None
    if said not in wanted:
        raise Declined("Nothing was done.")


def nobody() -> Declined:
    """Nobody is there who could be asked."""
    return Declined("Nothing was done: there is no terminal to ask at.", "the same with --yes")


def print_json(document: Any) -> None:
    """One JSON document on stdout, in ASCII: no text from a row steers a terminal that shows it,
    also at the end of a pipe, or depends on how it reads bytes."""
    writer = json.JSONEncoder(default=_jsonable, indent=2 if sys.stdout.isatty() else None)
    for part in writer.iterencode(document):
        # The one control character that JSON's ASCII leaves as it is.
        sys.stdout.write(part.replace("\x7f", "\\u007f"))
    print(flush=True)


def print_json_line(document: Any) -> None:
    """One JSON document of several, on a line of its own, at once; in ASCII."""
    line = json.dumps(document, default=_jsonable)
    print(line.replace("\x7f", "\\u007f"), flush=True)


def _jsonable(value: Any) -> Any:
    match value:
        case datetime():
            return rfc3339(value)
        case UUID():
            return str(value)
        case Decimal():
            return float(value)
        case timedelta():
            return value.total_seconds()
        case bytes():
            return "\\x" + value.hex()
        case _:
            # Of a column that the application has besides: an address, a range …
            return str(value)


def rfc3339(when: datetime) -> str:
    return when.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def local(when: datetime | None) -> str:
    """A date for a person: by the clock of ZONE, to the second, and how far from UTC that is, as
    PostgreSQL writes it; `--at` takes it back.
    """
    if when is None:
        return ""
    try:
        here = when.astimezone(ZONE.get())
    except (OverflowError, ValueError):
        here = when.astimezone(UTC)
    return here.isoformat(sep=" ", timespec="seconds").removesuffix(":00")


def relative(when: datetime | None, now: datetime) -> str:
    """The distance of a date from now: `in 2 h`, `3 min ago`."""
    if when is None:
        return ""
    seconds = (when - now).total_seconds()
    size = abs(seconds)
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if size >= length * (1.5 if unit != "s" else 1):
            return (
                f"in {size / length:.0f} {unit}"
                if seconds > 0
                else f"{size / length:.0f} {unit} ago"
            )
    return "now"


def span(seconds: float | Decimal | None) -> str:
    """A length of time for a person."""
    if seconds is None:
        return ""
    took = float(seconds)
    if took <= -1:
        return f"-{span(-took)}"
    if abs(took) < 1:
        return f"{took * 1000:.1f} ms"
    return f"{took:.1f} s" if took < 600 else whole_span(took)


def whole_span(seconds: float) -> str:
    """A length of time that can be watched: `9 s`, `4 min 09 s`, `2 h 05 min`, `3 d 04 h`."""
    whole = max(0, int(seconds))
    for size, unit, below, part in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below:02} {part}"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"


def seconds(text: str, option: str) -> float:
    """The seconds of an option's duration. Raises Trouble, also for a number without unit."""
    try:
        return durations.seconds(text)
    except durations.DurationError as error:
        raise Trouble(
            f"{option} {text!r} {error}", f"{option} {error.instead}", status=USAGE
        ) from None


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str | None]],
    *,
    yields: Sequence[tuple[str, int]] = (),
    whole: Sequence[str] = (),
) -> None:
    """A table on stdout: on a terminal it keeps to its width. See table_lines."""
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in table_lines(columns, rows, room, yields=yields, whole=whole):
        print(line)
    sys.stdout.flush()


def table_lines(
    columns: Sequence[str],
    rows: Sequence[Sequence[str | None]],
    room: int | None,
    *,
    yields: Sequence[tuple[str, int]] = (),
    whole: Sequence[str] = (),
) -> list[str]:
    """A table in lines. With `room`, in cells, it keeps to that: columns yield in the order of
    `yields`, each down to so many cells, or altogether for 0; those of `whole` are never cut.
    Without, it is as wide as its data, and plain. A column whose name begins with `>` is set to the
    right. None stands as `null`.
    """
    names = [name.removeprefix(">") for name in columns]
    cells = [[escape_controls("null" if cell is None else cell) for cell in row] for row in rows]
    natural = [max(map(_width, column)) for column in zip(names, *cells, strict=True)]
    widths = natural if room is None else _fitted(names, natural, yields, whole, room)
    lines = []
    for row, colour in [(names, _bold), *((row, _coloured) for row in cells)]:
        parts = []
        for text, column, width in zip(row, columns, widths, strict=True):
            if width:
                cut = _cut(text, width)
                blank = " " * (width - _width(cut))
                parts.append(blank + colour(cut) if column.startswith(">") else colour(cut) + blank)
        lines.append("  ".join(parts).rstrip())
    return lines


def plain(lines: Sequence[str]) -> list[str]:
    """The lines of a table without colours, for `tell`."""
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]


def print_facts(facts: Sequence[tuple[str, str | None]]) -> None:
    """Names and values, a line each, with `null` for None; on a terminal a long value is wrapped
    under its beginning."""
    left = max(_width(name) for name, _ in facts) + 2
    for name, value in facts:
        first, *rest = wrapped(escape_controls("null" if value is None else value), left)
        print(f"{name}{' ' * (left - _width(name))}{_coloured(first)}".rstrip())
        for line in rest:
            print(" " * left + line)
    sys.stdout.flush()


def print_findings(findings: Sequence[tuple[str, str, str, str | None]]) -> None:
    """State, name, what was seen, and what to try. Piped: a line each, and one more for each `Try`.
    On a terminal long texts are wrapped under their beginning; names take a third of it at most.
    """
    states, natural = (
        max(map(_width, column)) + 2
        for column in zip(*((f[0], f[1]) for f in findings), strict=True)
    )
    names = min(natural, max(20, shutil.get_terminal_size().columns // 3))
    names = names if sys.stdout.isatty() else natural
    for state, name, seen, todo in findings:
        lines = wrapped(escape_controls(seen), states + names)
        lines += wrapped(escape_controls(f"Try: {todo}"), states + names) if todo else []
        head = f"{_coloured(state)}{' ' * (states - _width(state))}"
        for part, line in zip_longest(_lines(name, names - 2), lines, fillvalue=""):
            print(f"{head}{part}{' ' * (names - _width(part))}{line}".rstrip())
            head = " " * states
    sys.stdout.flush()


def wrapped(text: str, indent: int = 0) -> list[str]:
    """`text` in lines that fit the terminal after an indent in cells; without a terminal in one."""
    if not sys.stdout.isatty():
        return [text]
    return _lines(text, max(20, shutil.get_terminal_size().columns - indent))


def _lines(text: str, room: int) -> list[str]:
    """`text` in lines of at most `room` cells, broken at blanks where it can be."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if _width(longer) <= room:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        while _width(word) > room:
            head = _taken(word, room)
            lines[-1:] = [head, ""]
            word = word[len(head) :]
        lines[-1] = word
    return lines


def _fitted(
    names: Sequence[str],
    natural: Sequence[int],
    yields: Sequence[tuple[str, int]],
    whole: Sequence[str],
    room: int,
) -> list[int]:
    """Widths that fit into `room` cells; 0 for a column that is left out."""
    widths = list(natural)

    def spare() -> int:
        return room - sum(widths) - 2 * (sum(width > 0 for width in widths) - 1)

    for name, least in [*yields, *((n, 4) for n in reversed(names) if n not in whole)]:
        if spare() < 0:
            at = names.index(name)
            widths[at] = min(widths[at], max(least, widths[at] + spare())) if least else 0
    for name, _ in yields:
        at = names.index(name)
        if widths[at]:
            widths[at] = min(natural[at], widths[at] + max(0, spare()))
    return widths


def _width(text: str) -> int:
    """How many cells of a terminal a text needs."""
    return len(text) if text.isascii() else sum(_cells(c) for c in text)


def _cells(c: str) -> int:
    """Marks take none, and neither do the vowels and final consonants of a Korean syllable that is
    written in parts: all of these stand in the cell before."""
    return (
        0
        if unicodedata.category(c) in ("Mn", "Me") or "\u1160" <= c <= "\u11ff"
        else 2
        if unicodedata.east_asian_width(c) in "WF"
        else 1
    )


def _taken(text: str, width: int) -> str:
    """As much of a text's beginning as fits."""
    taken = 0
    for at, c in enumerate(text):
        taken += _cells(c)
        if taken > width:
            return text[:at]
    return text


def _cut(text: str, width: int) -> str:
    return text if _width(text) <= width else _taken(text, width - 1) + "…"


def _coloured(text: str) -> str:
    code = _COLOURS.get(text)
    return f"\x1b[{code}m{text}\x1b[0m" if code and _has_colours() else text


def _bold(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m" if text and _has_colours() else text


def _has_colours() -> bool:
    """Whether stdout is a terminal with colours, and the user wants them (https://no-color.org)."""
    return (
        sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "dumb") != "dumb"
    )


_COLOURS = {
    "pending": "36",
    "running": "33",
    "in a run": "33",
    "fired": "32",
    "alive": "32",
    "failed": "31",
    "silent": "31",
    "open": "31",
    "deaf": "31",
    "lost": "31",
    "ok": "32",
    "note": "33",
    "problem": "31",
    "pass": "32",
    "fail": "31",
    "not shown": "33",
    "cancelled": "2",
}
