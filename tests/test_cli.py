"""The command line as a stranger meets it: documents, exit statuses, errors with hints, tables on a
terminal and in a pipe.

Most commands are run in this process, through the console script's own entry; what only a process
or a terminal shows, in one of theirs.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import mock

import psycopg
import pytest
from psycopg.rows import dict_row
from typer.main import get_command

from recall_worker import schema
from recall_worker.cli import main
from recall_worker.cli.app import app as commands
from recall_worker.terminal import Trouble, local, relative, seconds, span

from .process.test_wake import faketime  # noqa: F401 - a fixture
from .support import postgres
from .support.application import COLUMNS, Application

NOWHERE = "postgresql://u:sekret@127.0.0.1:1/x"


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout; strict, so that no NaN passes."""

        def never(name: str) -> None:
            raise ValueError(f"{name} is no JSON")

        return json.loads(self.out, parse_constant=never)


class Screen(io.StringIO):
    """A standard output that believes to be a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def operate(
    dsn: str | None,
    *words: str,
    stdin: str = "",
    environ: Mapping[str, str] | None = None,
    columns: int | None = None,
) -> Said:
    """`recall-worker <words>` in this process, with nothing but RECALL_DSN set; on a terminal of so
    many columns, if told."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RECALL_")}
    kept |= (
        ({} if dsn is None else {"RECALL_DSN": dsn})
        | ({} if columns is None else {"COLUMNS": str(columns)})
        | dict(environ or {})
    )
    out, err = io.StringIO() if columns is None else Screen(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, kept, clear=True))
        stack.enter_context(mock.patch.object(sys, "argv", ["recall-worker", *words]))
        stack.enter_context(mock.patch.object(sys, "stdin", io.StringIO(stdin)))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            main()
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
    return Said(status, out.getvalue(), err.getvalue())


def process(
    dsn: str | None, *words: str, environ: Mapping[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """The same as a process of its own, its output piped."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RECALL_")}
    kept |= ({} if dsn is None else {"RECALL_DSN": dsn}) | dict(environ or {})
    return subprocess.run(
        [sys.executable, "-m", "recall_worker", *words],
        env=kept,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def terminal(
    dsn: str, *words: str, columns: int = 80, environ: Mapping[str, str] | None = None
) -> str:
    """What the same shows on a terminal of so many columns."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("RECALL_") and k not in ("COLUMNS", "NO_COLOR")
    }
    kept |= {"RECALL_DSN": dsn, "TERM": "xterm-256color", "LINES": "24", "PYTHONUTF8": "1"} | dict(
        environ or {}
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen(
        [sys.executable, "-m", "recall_worker", *words],
        env=kept,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        close_fds=True,
    )
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(ours, 1 << 16):
            seen += chunk
    os.close(ours)
    assert child.wait(60) == 0
    return seen.decode().replace("\r\n", "\n")


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def rows_of(dsn: str) -> list[dict[str, Any]]:
    with psycopg.connect(dsn, row_factory=dict_row) as conn:
        return conn.execute("select * from session_recalls order by id").fetchall()


@pytest.fixture(scope="module")
def calm(server: str, template: str) -> Iterator[str]:
    """The DSN of a database for all that changes nothing: sessions `s`, with a recall `r` that
    waits, and `t`, without."""
    with postgres.database(server, template) as dsn:
        with psycopg.connect(dsn) as conn:
            conn.execute("insert into sessions values ('s', 'ann'), ('t', 'ann')")
            conn.execute(
                """insert into session_recalls (id, session_id, call_type, trigger_at,
                   additional_context_message, status, created_at,
                   updated_at) values ('r', 's', 'once', now() + interval '1 hour', 'Look again.',
                       'pending', now(), now())"""
            )
        yield dsn


@pytest.fixture(scope="module")
def bare(server: str) -> Iterator[str]:
    """The DSN of a database that was never migrated."""
    with postgres.database(server) as dsn:
        yield dsn


@pytest.fixture
async def waiting(app: Application, database: str) -> str:
    """A recall that waits in the session `s` of `ann`: `r`, due in an hour."""
    await app.create_session("s", "ann")
    await app.schedule(
        "s", "once", datetime.now(UTC) + timedelta(hours=1), "Look at the build again.", id="r"
    )
    return database


# --- documents ------------------------------------------------------------------------------------

DATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
SHOWING = [
    ("schedule", ["schedule", "t", "hello", "--in", "1h"], dict),
    ("list", ["list"], list),
    ("show", ["show", "r"], dict),
    ("why", ["why", "r"], dict),
    ("skip", ["skip", "again"], list),
    ("pause", ["pause", "r"], list),
    ("resume", ["resume", "r"], list),
    ("fire", ["fire", "r"], list),
    ("reschedule", ["reschedule", "r", "--in", "2h"], list),
    ("cancel", ["cancel", "r"], list),
    ("retry", ["retry", "over"], list),
    ("workers", ["workers"], list),
    ("actions", ["actions"], list),
    ("events", ["events"], list),
    ("stats", ["stats"], dict),
    ("prune", ["prune", "--older-than", "30d", "--yes"], dict),
    ("migrate", ["migrate"], dict),
    ("migrate --check", ["migrate", "--check"], dict),
]


@pytest.mark.parametrize(
    ("words", "kind"), [case[1:] for case in SHOWING], ids=[case[0] for case in SHOWING]
)
async def test_json_is_one_document(
    words: list[str], kind: type, app: Application, waiting: str
) -> None:
    """Every command that shows data takes --json: one document on stdout and nothing else, its
    dates RFC 3339 in UTC."""
    for session in ("t", "u", "v"):
        await app.create_session(session, "ann")
    soon = datetime.now(UTC) + timedelta(hours=1)
    await app.schedule("u", "recurring", soon, "again", interval_seconds=3600, id="again")
    await app.schedule("v", "once", soon, "over", id="over")
    await app.mark_cancelled("over")
    said = operate(waiting, *words, "--json")
    assert said.status == 0, said.err
    document: Any = said.document
    assert kind is (list if isinstance(document, list) else dict)
    assert said.out.count("\n") == 1
    dates = [
        value
        for name, value in _pairs(document)
        if name.endswith(("_at", "_until", "next_due")) and value is not None
    ]
    assert all(DATED.fullmatch(date) for date in dates)
    if words[0] in (
        "schedule",
        "list",
        "show",
        "skip",
        "pause",
        "resume",
        "fire",
        "reschedule",
        "cancel",
        "retry",
    ):
        assert dates
        recalls = document if isinstance(document, list) else [document.get("recall", document)]
        assert recalls and all(
            set(map(str.strip, COLUMNS.split(","))) <= set(recall) for recall in recalls
        )


def _pairs(document: Any) -> list[tuple[str, Any]]:
    if isinstance(document, dict):
        return [
            pair
            for name, value in document.items()
            for pair in ([(name, value)] if not isinstance(value, dict | list) else _pairs(value))
        ]
    return (
        [pair for value in document for pair in _pairs(value)] if isinstance(document, list) else []
    )


def test_json_of_nothing_is_an_empty_array(database: str) -> None:
    """Nothing to show is still a document."""
    assert operate(database, "list", "--json").document == []
    assert operate(database, "workers", "--json").document == []


async def test_talk_goes_to_stderr(waiting: str) -> None:
    """Data on stdout, talk on stderr: a script that schedules reads an id and nothing else."""
    said = operate(waiting, "reschedule", "r", "--in", "2h")
    assert (said.status, said.out) == (0, "r\n")
    assert said.err.startswith("r: due ")
    shown = operate(waiting, "reschedule", "r", "--in", "2h", columns=80)
    assert shown.out == "" and shown.err.startswith("r: due "), "a person needs to be told once"


# --- exit statuses --------------------------------------------------------------------------------

NEEDING = [
    ["schedule", "s", "m"],
    ["list"],
    ["show", "r"],
    ["why", "r"],
    ["actions"],
    ["events"],
    ["cancel", "r"],
    ["skip", "r"],
    ["pause", "r"],
    ["resume", "r"],
    ["retry", "r"],
    ["fire", "r"],
    ["reschedule", "r", "--in", "1h"],
    ["edit", "r", "--comment", "note"],
    ["workers"],
    ["stats"],
    ["top"],
    ["prune", "--older-than", "1d", "--yes"],
    ["migrate"],
    ["migrate", "--check"],
    ["run", "--run-url", "http://127.0.0.1:9/"],
]


@pytest.mark.parametrize("words", NEEDING, ids=" ".join)
def test_without_a_dsn(words: list[str]) -> None:
    """No command guesses a database: exit status 2, naming the variable."""
    assert "RECALL_DSN is not set" in trouble(operate(None, *words), 2)


@pytest.mark.parametrize("words", NEEDING[:-1], ids=" ".join)
def test_an_unreachable_database(words: list[str]) -> None:
    """A database that can't be reached is exit status 3, and its password is not told. (`run` waits
    for it instead.)"""
    said = operate(NOWHERE, *words)
    assert "can't be reached" in trouble(said, 3)
    assert "sekret" not in said.out + said.err


@pytest.mark.parametrize("words", NEEDING[:-3], ids=" ".join)
def test_a_database_without_the_schema(words: list[str], bare: str) -> None:
    """A database that was never migrated is said to be one, and how to change that."""
    said = operate(bare, *words)
    assert "no (or an old) recall-worker schema" in trouble(said, 1)
    assert said.err.endswith("\nTry: recall-worker migrate\n")


REFUSED = [
    ("nobody's recall", ["show", "nope"], "there is no recall nope"),
    ("why of nothing", ["why", "nope"], "there is no recall nope"),
    ("cancel of nothing", ["cancel", "nope"], "there is no recall nope"),
    (
        "cancel of an empty session",
        ["cancel", "--session", "t", "--yes"],
        "session t has no live recall",
    ),
    ("skip of a one-shot", ["skip", "r"], "r is once: it has no next occurrence"),
    (
        "skip in an empty session",
        ["skip", "--session", "t"],
        "session t has no recurring recall that waits",
    ),
    ("pause of nothing", ["pause", "nope"], "there is no recall nope"),
    ("resume of nothing", ["resume", "nope"], "there is no recall nope"),
    ("retry of what waits", ["retry", "r"], "r is pending: it waits or runs already"),
    ("fire of nothing", ["fire", "nope"], "there is no recall nope"),
    ("reschedule of nothing", ["reschedule", "nope", "--in", "1h"], "there is no recall nope"),
    ("edit of nothing", ["edit", "nope", "--times", "3"], "there is no recall nope"),
    ("an end of what is once", ["edit", "r", "--times", "3"], "r: only what recurs has an end"),
    (
        "an end before the next occurrence",
        ["edit", "r", "--grid", "2h", "--until", "2020-01-01"],
        "r: its end, 2020-01-0",
    ),
    (
        "a zone of what has no expression",
        ["edit", "r", "--every", "1h", "--tz", "Europe/Berlin"],
        "r: a time zone goes with a cron expression",
    ),
    ("a second recall", ["schedule", "s", "again"], "session s already has a pending recall"),
    ("nobody's session", ["schedule", "nobody", "hello"], "there is no session nobody"),
    (
        "several",
        ["pause", "nope", "neither"],
        "there is no recall nope; there is no recall neither",
    ),
]


@pytest.mark.parametrize(
    ("words", "what"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_refused_or_not_found(words: list[str], what: str, calm: str) -> None:
    """What can't be done to what is there is exit status 1: the reason, and what to do instead;
    nothing is changed."""
    before = rows_of(calm)
    assert what in trouble(operate(calm, *words), 1)
    assert rows_of(calm) == before


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("n\n", "Nothing was done.\n"),
        ("", "Nothing was done: there is no terminal to ask at.\nTry: the same with --yes\n"),
    ],
)
@pytest.mark.parametrize(
    "words",
    [["cancel", "--session", "s"], ["prune", "--older-than", "1s"], ["queues", "pause", "--all"]],
    ids=" ".join,
)
async def test_a_no_is_no_error(
    words: list[str], answer: str, said: str, app: Application, waiting: str
) -> None:
    """Nothing is done where a person does not agree, or nobody is there; the exit status says so,
    and no error is told."""
    await app.create_session("t", "ann")
    await app.schedule("t", "once", datetime.now(UTC), "m", id="over")
    await app.mark_fired("over")
    with psycopg.connect(waiting) as conn:
        conn.execute("update session_recalls set ended_at = '2020-01-01' where id = 'over'")
    before = rows_of(waiting)
    done = operate(waiting, *words, stdin=answer)
    assert done.status == 1 and done.out == "" and "Error" not in done.err
    assert done.err.endswith(f"? [y/N] {said}" if answer else f"? [y/N] \n{said}")
    assert rows_of(waiting) == before


WRONG = [
    ("no such command", ["nope"]),
    ("no such option", ["list", "--nope"]),
    ("no id", ["show"]),
    ("two ids for show", ["show", "a", "b"]),
    ("a limit that is no number", ["list", "--limit", "many"]),
    ("a limit of nothing", ["list", "--limit", "0"]),
    ("a negative offset", ["list", "--offset", "-1"]),
    ("a status that is none", ["list", "--status", "done"]),
    ("prune of a live status", ["prune", "--older-than", "1d", "--status", "pending", "--yes"]),
    ("prune without an age", ["prune"]),
    ("prune by two rules", ["prune", "--older-than", "1d", "--keep", "1d"]),
    ("prune by status twice", ["prune", "--keep", "1d", "--status", "fired", "--yes"]),
    ("a retention that is none", ["prune", "--keep", "fired=soon,pending=1d", "--yes"]),
    ("an age that is none", ["prune", "--older-than", "soon"]),
    ("an age without unit", ["prune", "--older-than", "30", "--yes"]),
    ("a retention without unit", ["prune", "--keep", "fired=30", "--yes"]),
    ("two times", ["schedule", "s", "m", "--in", "1h", "--at", "2030-01-01"]),
    ("two cadences", ["schedule", "s", "m", "--every", "1h", "--cron", "0 9 * * *"]),
    ("an impossible date", ["schedule", "s", "m", "--cron", "0 9 30 2 *"]),
    ("six fields", ["schedule", "s", "m", "--cron", "0 0 9 * * *"]),
    ("an unknown zone", ["schedule", "s", "m", "--cron", "0 9 * * *", "--tz", "Mars/Olympus"]),
    ("a zone without cron", ["schedule", "s", "m", "--grid", "1h", "--tz", "Europe/Berlin"]),
    (
        "an unknown zone of a time",
        ["schedule", "s", "m", "--at", "2030-01-01", "--tz", "Mars/Olympus"],
    ),
    ("a number of five thousand digits", ["schedule", "s", "m", "--cron", "9" * 5000 + " 9 * * *"]),
    ("a preview of that", ["preview", "9" * 5000 + " 9 * * *"]),
    ("a preview from before the calendar", ["preview", "0 9 * * *", "--from", "0001-01-01"]),
    (
        "a grace within which nothing can run",
        ["schedule", "s", "m", "--grid", "1h", "--grace", "0s"],
    ),
    ("an end of what happens once", ["schedule", "s", "m", "--in", "1h", "--times", "3"]),
    (
        "an end before the beginning",
        ["schedule", "s", "m", "--grid", "1h", "--until", "2020-01-01"],
    ),
    ("no occurrence at all", ["schedule", "s", "m", "--grid", "1h", "--times", "0"]),
    ("a grid that stands still", ["schedule", "s", "m", "--grid", "0s"]),
    ("half a jitter", ["schedule", "s", "m", "--grid", "1h", "--jitter", "0.5s"]),
    ("a preview of what never comes", ["preview", "0 9 31 4 *"]),
    ("a preview with the zone of a recall", ["preview", "r", "--tz", "Europe/Berlin"]),
    ("a time that is none", ["schedule", "s", "m", "--at", "tomorrow"]),
    ("an offset without a time", ["schedule", "t", "m", "--at", "2037-01-31+09:00"]),
    ("an end that is none", ["schedule", "t", "m", "--grid", "1h", "--until", "2037-01-31Z"]),
    ("a time in the past", ["schedule", "t", "m", "--at", "2020-01-01"]),
    (
        "a first time in the past",
        ["schedule", "t", "m", "--cron", "0 9 * * *", "--at", "2020-01-01"],
    ),
    ("a grid from the past", ["schedule", "t", "m", "--grid", "1h", "--at", "2020-01-01"]),
    ("now, if nothing is past", ["schedule", "t", "m", "--now-if-past"]),
    ("a month that is a minute", ["schedule", "t", "m", "--every", "1M"]),
    ("a month", ["schedule", "t", "m", "--every", "1 month"]),
    ("a move into the past", ["reschedule", "r", "--at", "2020-01-01"]),
    ("a move by the clock of no zone", ["reschedule", "r", "--at", "2030-01-01", "--tz", "X/Y"]),
    ("a delay in a zone", ["reschedule", "r", "--in", "1h", "--tz", "Europe/Berlin"]),
    ("a delay that is past", ["reschedule", "r", "--in", "1h", "--now-if-past"]),
    (
        "a jitter as wide as a gap",
        ["schedule", "t", "m", "--cron", "0 9,10 * * *", "--jitter", "2h"],
    ),
    ("a duration that is none", ["schedule", "s", "m", "--in", "1 fortnight"]),
    ("an interval of nothing", ["schedule", "s", "m", "--every", "0s"]),
    ("half an interval", ["schedule", "s", "m", "--every", "0.5s"]),
    ("an interval without end", ["schedule", "s", "m", "--every", "99999d"]),
    ("a time without end", ["schedule", "s", "m", "--in", "999999999d"]),
    ("a session that no address names", ["schedule", "..", "m"]),
    ("no time to move to", ["reschedule", "r"]),
    ("two times to move to", ["reschedule", "r", "--in", "1h", "--at", "2030-01-01"]),
    ("a move without end", ["reschedule", "r", "--in", "999999999d"]),
    ("cancel of nothing in particular", ["cancel"]),
    ("cancel of both", ["cancel", "r", "--session", "s"]),
    ("skip of both", ["skip", "r", "--session", "s"]),
    ("nothing to edit", ["edit", "r"]),
    ("two rules at once", ["edit", "r", "--every", "1h", "--cron", "0 9 * * *"]),
    ("an edit to what never comes", ["edit", "r", "--cron", "0 9 31 4 *"]),
    ("an edit to what can't be meant", ["edit", "r", "--cron", "*/90 * * * *"]),
    ("an edit to no zone", ["edit", "r", "--cron", "0 9 * * *", "--tz", "Mars/Olympus"]),
    ("an edit to no rule", ["edit", "r", "--every", "none"]),
    ("an edit to no occurrence", ["edit", "r", "--every", "1h", "--times", "0"]),
    ("an edit to some occurrences", ["edit", "r", "--every", "1h", "--times", "some"]),
    ("an edit to half a jitter", ["edit", "r", "--grid", "1h", "--jitter", "0.5s"]),
    ("an edit to a wide jitter", ["edit", "r", "--grid", "2s", "--jitter", "20s"]),
    ("an edit to a NUL", ["edit", "r", "--message", "a\0b"]),
    ("an edit to no text", ["edit", "r", "--message", "a\udcff"]),
    ("text with a NUL", ["schedule", "s", "a\0b"]),
    ("an id with a NUL", ["show", "a\0b"]),
    ("an id that is no text", ["cancel", "a\udcff"]),
    ("a message that is no text", ["schedule", "s", "a\udcff"]),
]


@pytest.mark.parametrize("words", [case[1] for case in WRONG], ids=[case[0] for case in WRONG])
def test_usage(words: list[str], calm: str) -> None:
    """What can't be meant is exit status 2, with a hint, and changes nothing."""
    before = rows_of(calm)
    trouble(operate(calm, *words), 2)
    assert rows_of(calm) == before


def trouble(said: Said, status: int) -> str:
    """A command's trouble: `Error: …`, then `Try: …`, nothing else on stderr but talk of what was
    done, no traceback."""
    assert said.status == status, said
    lines = said.err.splitlines()
    at = next(n for n, line in enumerate(lines) if "Error: " in line)
    assert lines[at + 1 :] and all(
        line.startswith("Try: ") and len(line) > 5 for line in lines[at + 1 :]
    ), said.err
    assert "Traceback" not in said.err and "Usage:" not in said.err
    return lines[at].partition("Error: ")[2]


def test_a_partial_success_does_what_it_can(waiting: str) -> None:
    """Of several recalls those that can be are paused, and said; the others are the trouble."""
    said = operate(waiting, "pause", "nope", "r")
    trouble(said, 1)
    assert said.out == "r\n"
    assert [row["paused_at"] is not None for row in rows_of(waiting)] == [True]


@pytest.mark.parametrize(
    ("answer", "status"),
    [("y\n", "cancelled"), ("yes\n", "cancelled"), ("n\n", "pending"), ("\n", "pending")],
)
async def test_a_bulk_cancel_asks(answer: str, status: str, waiting: str) -> None:
    """Cancelling a session asks the person at the terminal; anything but a yes is a no."""
    said = operate(waiting, "cancel", "--session", "s", stdin=answer)
    assert "Cancel every live recall of session s? [y/N]" in said.err
    assert said.status == (0 if status == "cancelled" else 1)
    assert [row["status"] for row in rows_of(waiting)] == [status]


UNREADABLE = [
    "postgresql://u:se/kret@127.0.0.1:1/x",
    "postgresql://u:p@sekret@127.0.0.1:1/x",
    "postgresql://u:se%kret@h/x",
    "postgresql://u:sekret@127.0.0.1:1/x?passw=sekret",
    "host=x password=sekret foo=bar",
    "user=u password=two sekret",
    "password='sekret host=h",
    "sekret",
]
UNREACHABLE = [
    "postgresql://u:sekret@127.0.0.1:1/x",
    "postgresql://u:sekret@127.0.0.1:port/x",
    "host=127.0.0.1 port=1 password=sekret",
]
SECRETS = [
    (words, dsn, status)
    for words in (["list"], ["migrate"], ["run", "--run-url", "http://127.0.0.1:9/"])
    for dsns, status in ((UNREADABLE, 2), (UNREACHABLE, 3))
    for dsn in dsns
    if words[0] != "run" or status == 2  # It waits for a database that is away.
]


@pytest.mark.parametrize(
    ("words", "dsn", "status"), SECRETS, ids=[f"{words[0]}-{dsn}" for words, dsn, _ in SECRETS]
)
def test_a_password_is_never_told(words: list[str], dsn: str, status: int) -> None:
    """However a DSN is misspelt, no part of its password is quoted back."""
    said = operate(dsn, *words)
    trouble(said, status)
    assert "kret" not in said.out + said.err


@pytest.mark.slow
def test_a_pipe_that_closes_early(waiting: str) -> None:
    """`recall-worker list | head -0` says nothing of a broken pipe."""
    command = f"{sys.executable} -m recall_worker list | true"
    done = subprocess.run(
        ["bash", "-c", command],
        env=os.environ | {"RECALL_DSN": waiting},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""


@pytest.mark.slow
def test_as_a_process(waiting: str) -> None:
    """The exit statuses are those of the process, too."""
    assert process(waiting, "show", "r").returncode == 0
    assert process(waiting, "show", "nope").returncode == 1
    assert process(waiting, "show").returncode == 2
    done = process(NOWHERE, "show", "r")
    assert (done.returncode, done.stdout, done.stderr.splitlines()[0][:7]) == (3, "", "Error: ")
    assert process(None, "--version").stdout.startswith("recall-worker ")


def test_the_daemon_is_started_without_what_takes_command_lines_apart(database: str) -> None:
    """`run` with nothing behind it, as units have it: what only people need is not in its memory
    for good."""
    program = """
import sys
from recall_worker.cli import main
from recall_worker.worker.worker import Worker
def run(self):
    print(*sorted({"typer", "click", "pydantic"} & set(sys.modules)), "and no more")
    return self._ledger.close()
Worker.run = run
sys.argv = ["recall-worker", "run"]
main()
"""
    environ = {
        "PATH": os.environ["PATH"],
        "RECALL_DSN": database,
        "RECALL_RUN_URL": "http://127.0.0.1:1/",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environ,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "and no more\n"), done.stderr


# --- help and completion --------------------------------------------------------------------------

OF = getattr(get_command(commands), "commands")  # noqa: B009 - a Group, which typer's types don't tell
NAMES = sorted(OF)


@pytest.mark.parametrize("name", NAMES)
def test_help_of_every_command(name: str) -> None:
    """`--help` and `-h` tell what a command does and explain each of its options, without a
    database."""
    said = operate(None, name, "--help")
    assert said.status == 0 and said.err == ""
    assert said.out.startswith("Usage: recall-worker " + name)
    assert operate(None, name, "-h") == said
    parameters = OF[name].params
    assert all(getattr(parameter, "help", None) for parameter in parameters)
    assert all(
        option in said.out
        for parameter in parameters
        for option in parameter.opts
        if option.startswith("--")
    )


def test_help_without_a_command() -> None:
    """`recall-worker` alone shows every command, and is no success."""
    said = operate(None)
    assert said.status == 2
    assert all(re.search(rf"^  {name} ", said.err, re.MULTILINE) for name in NAMES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "mark"), [("bash", "complete -o"), ("zsh", "compdef"), ("fish", "complete --command")]
)
def test_completion(shell: str, mark: str) -> None:
    """Each shell gets its completion script, and the script's question is answered with the
    commands."""
    environ = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = process(None, "--show-completion", shell, environ=environ)
    assert script.returncode == 0 and mark in script.stdout and "recall-worker" in script.stdout
    question = {
        "_RECALL_WORKER_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": "recall-worker re",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "recall-worker re",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    command = (
        "import sys; sys.argv[0] = 'recall-worker'; from recall_worker.cli import main; main()"
    )
    answer = subprocess.run(
        [sys.executable, "-c", command],
        env=os.environ | question,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert {"resume", "retry", "reschedule"} <= set(re.findall(r"[a-z]+", answer.stdout)), answer


# --- tables ---------------------------------------------------------------------------------------

LONG = (
    "Read the inbox and tell me what is new since yesterday evening, in three sentences at most. "
    * 3
)
UUID = "7c9e6679-7425-40de-944b-e07fc1f90ae7"


@pytest.fixture
async def populated(app: Application, database: str) -> str:
    """Recalls and calls with long ids, long messages, wide characters, in several states; a worker
    that is about."""
    await app.create_session("a-session-with-a-long-name-0123456789-0123456789", "ann")
    await app.create_session("会話", "ann")
    soon = datetime.now(UTC) + timedelta(hours=1)
    await app.schedule(
        "a-session-with-a-long-name-0123456789-0123456789", "recurring", soon, LONG, 5400, id=UUID
    )
    await app.schedule("会話", "once", soon, "もう一度ビルドを見てください。" * 10, id="短い")
    await app.mark_fired("短い")
    with psycopg.connect(database) as conn:
        conn.execute(
            """insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome,
               session_id, worker, lease, calls, scheduled_for,
               called_at, last_called_at, ended_at, http_status, reason, settled)
               select %s, n, 1, 2, 'misconfigured', 's', 'a-worker-with-a-long-name-12345-abcd',
                   gen_random_uuid(), 12345, now(), now(), now(),
               now() + interval '700 s', 404, repeat('no such address ', 10), 'pending'
                   from generate_series(1, 3) n""",
            (UUID,),
        )
        conn.execute(
            """insert into recall_workers (worker, host, pid, version, slots, settings)
               values ('a-worker-with-a-long-name-12345-abcd', 'h', 1, '0.1.0', 1000,
                   '{"lease": 60, "poll_interval": 30}')"""
        )
    return database


WIDE = [["list"], ["show", UUID], ["why", UUID], ["workers"], ["stats"], ["show", "短い"]]


def _cells(line: str) -> int:
    from unicodedata import east_asian_width

    return sum(2 if east_asian_width(c) in "WF" else 1 for c in line)


@pytest.mark.parametrize("words", WIDE, ids=" ".join)
async def test_nothing_wraps_on_a_terminal(words: list[str], populated: str) -> None:
    """However wide the terminal is, no line is wider, none ends in blanks, and a recall's id stands
    there whole from 80 columns on."""
    for columns in (40, 80, 81, 100, 120, 200):
        shown = operate(populated, *words, columns=columns).out
        lines = plain(shown).splitlines()
        assert lines and max(map(_cells, lines)) <= columns
        assert all(line == line.rstrip() for line in lines)
        if words == ["list"]:
            assert columns < 80 or UUID in shown
            assert columns < 200 or all(
                word in shown for word in ("MESSAGE", "TYPE", "every 1h30m", "DUE", "OCC")
            )


@pytest.mark.slow
async def test_a_real_terminal(populated: str) -> None:
    """The width is the terminal's own."""
    for columns in (80, 120):
        lines = plain(terminal(populated, "list", columns=columns)).splitlines()
        assert max(map(_cells, lines)) <= columns
        assert ("MESSAGE" in lines[0]) == (columns == 120)


@pytest.mark.slow
async def test_colours_on_a_terminal_only(populated: str) -> None:
    """Colours help a person at a terminal; a pipe, NO_COLOR and a dumb terminal get none."""
    assert "\x1b[36mpending\x1b[0m" in terminal(populated, "list")
    xterm = {"TERM": "xterm"}
    for words in WIDE:
        assert "\x1b" not in operate(populated, *words, environ=xterm).out
        assert (
            "\x1b"
            not in operate(populated, *words, columns=80, environ=xterm | {"NO_COLOR": "1"}).out
        )
        assert "\x1b" not in operate(populated, *words, columns=80, environ={"TERM": "dumb"}).out
    assert "\x1b[1mID" in operate(populated, "list", columns=80, environ=xterm).out


@pytest.mark.slow
async def test_a_pipe_gets_everything(populated: str) -> None:
    """Piped, a table has all its columns, uncut, and aligned."""
    out = process(populated, "list", environ={"COLUMNS": "40", "PYTHONUTF8": "1"}).stdout
    head, *lines = out.splitlines()
    assert head.split() == ["ID", "SESSION", "TYPE", "STATUS", "WHEN", "DUE", "OCC", "MESSAGE"]
    assert "…" not in out.replace("… (", "") and len(lines) == 2
    assert "a-session-with-a-long-name-0123456789-0123456789" in out
    at = head.index("STATUS")
    pending = next(line for line in lines if line.startswith(UUID))
    assert pending[at:].startswith("pending  ") and pending[head.index("MESSAGE") :].startswith(
        "Read the inbox"
    )
    assert all(line == line.rstrip() for line in out.splitlines())


@pytest.mark.slow
async def test_local_time_says_so(waiting: str) -> None:
    """Times for people are local and carry their distance from UTC, in a form that --at takes back;
    --json has UTC."""
    zone = {"TZ": "Asia/Kolkata"}
    due = rows_of(waiting)[0]["trigger_at"]
    shown = process(waiting, "show", "r", environ=zone).stdout
    found = re.search(r"^due +(\S+ \S+) \(in 60 min\)$", shown, re.MULTILINE)
    assert found and found[1].endswith("+05:30")
    assert datetime.fromisoformat(found[1]) == due.replace(microsecond=0)
    assert process(waiting, "reschedule", "r", "--at", found[1], environ=zone).returncode == 0
    assert rows_of(waiting)[0]["trigger_at"] == due.replace(microsecond=0)
    assert json.loads(process(waiting, "show", "r", "--json", environ=zone).stdout)["recall"][
        "trigger_at"
    ].endswith("Z")
    assert (
        process(waiting, "reschedule", "r", "--at", "2030-06-01T09:00", environ=zone).returncode
        == 0
    )
    assert rows_of(waiting)[0]["trigger_at"] == datetime(2030, 6, 1, 3, 30, tzinfo=UTC), (
        "without an offset the wall's clock is meant"
    )


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        ("schedule s m --in 1h --tz UTC", "--tz goes with --cron, --at or --until", "without --tz"),
        ("schedule s m --cron 0_9_*_*_* --tz Nowhere", "no time zone 'Nowhere'", "--tz with an"),
        ("reschedule r --in 1h --tz UTC", "--tz and --now-if-past go with --at", "without them"),
        ("reschedule r --at 2031-01-01 --tz Nowhere", "no time zone 'Nowhere'", "--tz with an"),
        ("preview r --tz UTC", "--tz and --from go with a cron expression", "--tz Europe/Berlin"),
        ("preview 0_9_*_*_* --tz Nowhere", "no time zone 'Nowhere'", "--tz with an"),
        ("list --dsn nonsense", "--dsn is neither a URL nor key=value", "recall-worker settings"),
        (
            "run --lease soon",
            "--lease is 'soon', which is not a duration: give seconds",
            "settings",
        ),
    ],
)
def test_options_are_named(words: str, said: str, hint: str, calm: str) -> None:
    """A mistake in an option is told by the option's name, with the ones that it goes with."""
    done = operate(calm, *(word.replace("_", " ") for word in words.split()))
    assert done.status == 2 and said in done.err and hint in done.err.partition("Try: ")[2], done


def test_the_hint_without_a_dsn() -> None:
    """What a DSN looks like, by the option that takes one."""
    said = operate(None, "list")
    assert (
        "\nTry: --dsn postgresql://user@host:5432/database, or the same in RECALL_DSN\n" in said.err
    )


# --- hostile texts --------------------------------------------------------------------------------

HOSTILE = "a\x1b[31mred\x1b]0;title\x07\n\rb\t\u202egnihton\u2066\u200b\x9b2J\u2028\x7f"
HARMFUL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]")


@pytest.mark.parametrize(
    "words",
    [
        ["list"],
        ["list", "--session", HOSTILE],
        ["show", HOSTILE],
        ["why", HOSTILE],
        ["pause", HOSTILE],
        ["resume", HOSTILE],
        ["fire", HOSTILE],
        ["reschedule", HOSTILE, "--in", "1h"],
        ["skip", HOSTILE],
        ["cancel", HOSTILE],
        ["retry", HOSTILE],
        ["show", HOSTILE + "no"],
        ["cancel", "--session", HOSTILE, "--yes"],
        ["cancel", "--session", HOSTILE + "no", "--yes"],
        ["cancel", "--session", HOSTILE],
        ["schedule", HOSTILE, "again"],
        ["schedule", HOSTILE + "no", "m"],
        ["schedule", "s", "m", "--in", HOSTILE],
        ["list", "--status", HOSTILE],
        [HOSTILE],
        ["list", HOSTILE],
        ["list", "--limit", HOSTILE],
        ["workers"],
    ],
    ids=lambda words: " ".join(words).encode("unicode_escape").decode()[:40],
)
async def test_hostile_texts_come_out_harmless(
    words: list[str], app: Application, database: str
) -> None:
    """Nothing that a row or an argument holds steers a terminal: not in tables, sentences, errors
    or hints; lines stay lines."""
    await app.create_session(HOSTILE, "ann")
    await app.schedule(
        HOSTILE,
        "once",
        datetime.now(UTC) + timedelta(hours=1),
        HOSTILE,
        comment=HOSTILE,
        id=HOSTILE,
    )
    with psycopg.connect(database) as conn:
        conn.execute(
            "update session_recalls set reason = %s, last_outcome = 'refused', leased_by = %s",
            (HOSTILE, HOSTILE),
        )
        conn.execute(
            """insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome,
               session_id, worker, lease, scheduled_for,
               called_at, last_called_at, ended_at, reason, settled)
               values (%s, 1, 0, 1, 'refused', 's', %s, gen_random_uuid(), now(), now(), now(),
                   now(), %s, '')""",
            (HOSTILE, HOSTILE, HOSTILE),
        )
        conn.execute(
            """insert into recall_workers (worker, host, pid, version, slots, settings)
               values (%s, 'h', 1, '0.1.0', 3, '{"lease": 60}'), ('other', 'h', 1, '0.1.0', 3,
                   '{"lease": "\\u001b[31m"}')""",
            (HOSTILE,),
        )
    if words[0] == "workers":
        with psycopg.connect(database) as conn:
            conn.execute(
                "update recall_workers set settings = jsonb_build_object('lease', 5, 'run_url', "
                "%s::text) where worker = 'other'",
                (HOSTILE,),
            )
    said = operate(database, *words)
    assert not HARMFUL.search(said.out + said.err), repr(said.out + said.err)
    assert "Traceback" not in said.err
    if said.status and "Nothing was done" not in said.err:
        trouble(said, said.status)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["list"], ["show", HOSTILE], ["why", HOSTILE], ["pause", HOSTILE]],
    ids=lambda words: words[0],
)
async def test_hostile_texts_are_whole_in_json(
    words: list[str], app: Application, database: str
) -> None:
    """--json tells every character, in a valid document that is ASCII: on a terminal, and at the
    end of a pipe, behind which there may be one."""
    await app.create_session(HOSTILE, "ann")
    await app.schedule(HOSTILE, "once", datetime.now(UTC) + timedelta(hours=1), HOSTILE, id=HOSTILE)
    for shown in (
        operate(database, *words, "--json").out,
        operate(database, *words, "--json", columns=80).out,
        process(database, *words, "--json", environ={"PYTHONUTF8": "1"}).stdout,
    ):
        assert shown.isascii() and not HARMFUL.search(shown)
        assert HOSTILE in [value for _, value in _pairs(json.loads(shown))]


@pytest.mark.slow
async def test_hostile_texts_in_a_pipe(app: Application, database: str) -> None:
    """What a command says at the end of a pipe is as harmless as on a terminal."""
    await app.create_session(HOSTILE, "ann")
    await app.schedule(HOSTILE, "once", datetime.now(UTC) + timedelta(hours=1), HOSTILE, id=HOSTILE)
    for words in (["list"], ["show", HOSTILE], ["pause", HOSTILE], ["why", HOSTILE]):
        said = process(database, *words, environ={"PYTHONUTF8": "1"})
        assert said.returncode == 0
        assert not HARMFUL.search(said.stdout + said.stderr), words


# --- how people write and read times --------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("1x", "--in '1x' is not a duration", "--in 90s, 5m, 1h30m, 2 hours or 30d"),
        ("30", "--in '30' has no unit", "--in 30s, 30m, 30h or 30d"),
    ],
)
def test_no_durations(text: str, what: str, hint: str) -> None:
    """An option that is no duration is told with what to write."""
    with pytest.raises(Trouble) as trouble:
        seconds(text, "--in")
    assert (trouble.value.what, trouble.value.hints, trouble.value.status) == (what, [hint], 2)


@pytest.mark.parametrize(
    ("off", "text"),
    [
        (0.2, "now"),
        (5, "in 5 s"),
        (-5, "5 s ago"),
        (89, "in 89 s"),
        (90, "in 2 min"),
        (5399, "in 90 min"),
        (7199, "in 2 h"),
        (-90_000, "25 h ago"),
        (259_200, "in 3 d"),
    ],
)
def test_distances(off: float, text: str) -> None:
    """How far off a date is, in the unit that says it best."""
    now = datetime(2026, 7, 1, tzinfo=UTC)
    assert relative(now + timedelta(seconds=off), now) == text


def test_dates_at_the_ends_of_time() -> None:
    """The first and the last date that Python holds can be shown anywhere; no date is nothing."""
    assert local(None) == relative(None, datetime.now(UTC)) == span(None) == ""
    with mock.patch.dict(os.environ, {"TZ": "Pacific/Kiritimati"}):
        assert local(datetime(9999, 12, 31, 23, tzinfo=UTC)).startswith("9999") or local(
            datetime(9999, 12, 31, 23, tzinfo=UTC)
        ).startswith("10")
    assert local(datetime(1, 1, 1, tzinfo=UTC)).startswith("0001")


@pytest.mark.slow
def test_migrate_check_tells(empty_database: str) -> None:
    """`migrate --check` changes nothing, exits with 1 while there is something to do, and says what
    in --json."""
    said = operate(empty_database, "migrate", "--check", "--json")
    assert said.status == 1 and said.document["up_to_date"] is False and said.document["pending"]
    assert schema.pending(empty_database)
    assert operate(empty_database, "migrate").status == 0
    assert operate(empty_database, "migrate", "--check", "--json").document == {
        "up_to_date": True,
        "pending": [],
    }


# --- recurring recalls ----------------------------------------------------------------------------


def test_schedule_by_cron(waiting: str) -> None:
    """The next working day's half past nine in Berlin, said and stored; `list`, `show` and
    `preview` tell of it."""
    assert operate(waiting, "cancel", "r").status == 0
    made = operate(
        waiting,
        "schedule",
        "s",
        "Read the inbox.",
        "--cron",
        "30 9 * * mon-fri",
        "--tz",
        "Europe/Berlin",
        "--grace",
        "2h",
        "--times",
        "9",
    )
    assert (
        made.status == 0
        and "Scheduled cron '30 9 * * mon-fri' Europe/Berlin, due " in made.err
        and ", 9 times." in made.err
    )
    id = made.out.strip()
    row = next(row for row in rows_of(waiting) if row["id"] == id)
    assert (row["cadence"], row["cron"], row["time_zone"], row["times"], row["grace_seconds"]) == (
        "cron",
        "30 9 * * mon-fri",
        "Europe/Berlin",
        9,
        7200,
    )
    ahead = json.loads(operate(waiting, "preview", id, "--count", "12", "--json").out)
    assert len(ahead["occurrences"]) == 9 and all(
        "T09:30:00+0" in moment["local"] for moment in ahead["occurrences"]
    )
    assert datetime.fromisoformat(ahead["occurrences"][0]["at"]) == row["trigger_at"]
    assert "cron '30 9 * * mon-fri' Europe/Berlin" in operate(waiting, "list").out
    assert "grace       2h" in operate(waiting, "show", id).out


def test_preview_around_a_change_of_clocks() -> None:
    """Half past two in New York on the night that has none: once, at three, and said to be after a
    change. No database is asked."""
    said = operate(
        None,
        "preview",
        "30 2 * * *",
        "--tz",
        "America/New_York",
        "--from",
        "2026-03-07T00:00",
        "--count",
        "3",
    )
    assert said.status == 0
    lines = said.out.splitlines()[1:]
    assert [line[:38] for line in lines] == [
        "Sat 2026-03-07 02:30:00  EST   -05:00 ",
        "Sun 2026-03-08 03:00:00  EDT   -04:00 ",
        "Mon 2026-03-09 02:30:00  EDT   -04:00 ",
    ]
    assert "clocks changed from -05:00" in lines[1] and "clocks" not in lines[0] + lines[2]


def test_preview_from_a_moment_on() -> None:
    """The time that is named counts itself, as with `schedule --at`."""
    said = operate(
        None,
        "preview",
        "0 0 * * *",
        "--tz",
        "Europe/Berlin",
        "--from",
        "2027-03-28",
        "--count",
        "2",
    )
    assert [line[:25] for line in said.out.splitlines()[1:]] == [
        "Sun 2027-03-28 00:00:00  ",
        "Mon 2027-03-29 00:00:00  ",
    ]


def test_times_by_the_clock_of_a_zone(waiting: str) -> None:
    """`--tz` says by which clock `--at` and `--until` are meant, with cron and without."""
    assert operate(waiting, "cancel", "r").status == 0
    berlin = ["--tz", "Europe/Berlin"]
    for words in (
        ["--at", "2030-07-01T09:00"],
        ["--cron", "0 9 * * *", "--at", "2030-07-01", "--until", "2030-07-01T09:00"],
    ):
        made = operate(waiting, "schedule", "s", "m", *words, *berlin, "--json").document
        assert (made["trigger_at"], made["time_zone"]) == (
            "2030-07-01T07:00:00.000000Z",
            "Europe/Berlin" if "--cron" in words else None,
        )
        assert operate(waiting, "cancel", made["id"]).status == 0
    assert made["until_at"] == "2030-07-01T07:00:00.000000Z"


async def test_reschedule_by_the_clock_of_a_zone(waiting: str) -> None:
    """`--tz` says by which clock `--at` is meant, in any case; what the clocks skip is told."""
    moved = operate(
        waiting, "reschedule", "r", "--at", "2030-07-01T09:00", "--tz", "europe/BERLIN", "--json"
    )
    assert moved.document[0]["trigger_at"] == "2030-07-01T07:00:00.000000Z" and not moved.err
    moved = operate(waiting, "reschedule", "r", "--at", "2030-03-31T02:30", "--tz", "Europe/Berlin")
    assert moved.status == 0 and "skip 2030-03-31 02:30" in moved.err
    assert "2030-03-31T03:00+02:00" in moved.err
    assert rows_of(waiting)[0]["trigger_at"] == datetime(2030, 3, 31, 1, tzinfo=UTC)


@pytest.mark.slow
async def test_now_if_past(waiting: str) -> None:
    """A time in the past is refused with the way out, or means now: lateness does not count from
    it."""
    before = rows_of(waiting)
    refused = operate(waiting, "reschedule", "r", "--at", "2020-01-01T09:00")
    assert "is past: PostgreSQL's clock says" in trouble(refused, 2)
    assert "--now-if-past" in refused.err and rows_of(waiting) == before
    assert operate(waiting, "reschedule", "r", "--at", "2020-01-01", "--now-if-past").status == 0
    assert abs(rows_of(waiting)[0]["trigger_at"] - datetime.now(UTC)) < timedelta(minutes=1)
    assert operate(waiting, "cancel", "r").status == 0
    rules: list[list[str]] = [[], ["--every", "1h"], ["--grid", "1h"], ["--cron", "0 9 * * *"]]
    for words in rules:
        past = ["--at", "2020-01-01T09:00", "--now-if-past"]
        made = operate(waiting, "schedule", "s", "m", *past, *words, "--json").document
        due = datetime.fromisoformat(made["trigger_at"])
        if "--cron" in words:
            assert timedelta(0) <= due - datetime.now(UTC) <= timedelta(days=1)
        else:
            assert abs(due - datetime.now(UTC)) < timedelta(minutes=1)
        assert operate(waiting, "cancel", made["id"]).status == 0


async def test_the_current_minute_is_not_past(waiting: str) -> None:
    """Who types the time that the clock shows means now."""
    clock = datetime.now(UTC) - timedelta(seconds=20)
    assert operate(waiting, "reschedule", "r", "--at", clock.isoformat()).status == 0
    assert rows_of(waiting)[0]["trigger_at"] == clock


async def test_a_date_alone_ends_with_its_day(waiting: str) -> None:
    """`--until` a day includes that day, by the clocks of the zone."""
    assert operate(waiting, "cancel", "r").status == 0
    rule = ["--cron", "0 23 * * *", "--tz", "America/new_york", "--until", "2037-01-31"]
    made = operate(waiting, "schedule", "s", "m", *rule, "--json").document
    assert made["until_at"] == "2037-02-01T04:59:59.999999Z"
    assert made["time_zone"] == "America/New_York"


@pytest.mark.slow
@pytest.mark.parametrize("days", ["-400d", "+400d"])
async def test_a_host_with_a_wrong_clock(
    days: str,
    faketime: str,  # noqa: F811
    waiting: str,
) -> None:
    """PostgreSQL's clock alone decides what is past, and whether an end comes before the
    beginning."""
    assert operate(waiting, "cancel", "r").status == 0
    wrong = {"LD_PRELOAD": faketime, "FAKETIME": days, "TZ": "UTC"}
    now = datetime.now(UTC)
    soon, before = ((now + timedelta(days=n)).isoformat() for n in (2, -2))
    rules: list[list[str]] = [["--cron", "0 9 * * *"], ["--grid", "1h"]]
    for rule in rules:
        made = process(waiting, "schedule", "s", "m", *rule, "--until", soon, environ=wrong)
        assert made.returncode == 0, made.stderr
        assert operate(waiting, "cancel", made.stdout.strip()).status == 0
        over = process(waiting, "schedule", "s", "m", *rule, "--until", before, environ=wrong)
        assert over.returncode == 2 and "would be after its end" in over.stderr
    past = process(waiting, "schedule", "s", "m", "--at", before, environ=wrong)
    assert past.returncode == 2 and "is past" in past.stderr
    made = process(waiting, "schedule", "s", "m", "--at", soon, environ=wrong)
    assert made.returncode == 0, made.stderr
    # An expression's next occurrence is PostgreSQL's business, too.
    shown = process(waiting, "preview", "0 9 * * *", "--count", "1", "--json", environ=wrong)
    first = datetime.fromisoformat(json.loads(shown.stdout)["occurrences"][0]["at"])
    assert timedelta(0) < first - now <= timedelta(days=1, minutes=1)


@pytest.mark.slow
def test_preview_after_a_skip(waiting: str) -> None:
    """What was skipped, by whatever hand, is not ahead; and what waits there is not said to stand
    for the time before."""
    assert operate(waiting, "cancel", "r").status == 0
    id = operate(waiting, "schedule", "s", "m", "--grid", "1h", "--jitter", "1m").out.strip()
    before = [
        moment["at"]
        for moment in operate(waiting, "preview", id, "--count", "3", "--json").document[
            "occurrences"
        ]
    ]
    assert operate(waiting, "skip", id).status == 0
    after = [
        moment["at"]
        for moment in operate(waiting, "preview", id, "--count", "2", "--json").document[
            "occurrences"
        ]
    ]
    assert after == before[1:]
    assert "stands for" not in operate(waiting, "show", id).out


def test_preview_of_what_is_over(waiting: str) -> None:
    """Nothing is ahead of a recall that has ended, and an id that nobody has is said to be none."""
    assert operate(waiting, "cancel", "r").status == 0
    assert "is cancelled: it has no next occurrence" in trouble(operate(waiting, "preview", "r"), 1)
    assert "there is no recall nobody" in trouble(operate(waiting, "preview", "nobody"), 1)
