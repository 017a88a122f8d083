"""Commands whose output can't be written: a full disk, a reader that goes away, no stdout."""

from __future__ import annotations

import errno
import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from recall_worker import cli
from recall_worker.cli import main

from .support import postgres
from .test_schema import execute

FULL = Path("/dev/full")
PROGRAM = f"{sys.executable} -m recall_worker"
COMMANDS = {
    "list": 0,
    "list --json": 0,
    "show r": 0,
    "show r --json": 0,
    "why r": 0,
    "why r --json": 0,
    "schema events": 0,
    "schema json": 0,
    "stats": 0,
    "stats --json": 0,
    "top": 0,
    "top --json": 0,
    "workers": 0,
    "workers --json": 0,
    "preview r": 0,
    "preview r --json": 0,
    "schedule s2 m": 0,
    "schedule s3 m --json": 0,
    "skip r": 0,
    "pause r --json": 0,
    "resume r --json": 0,
    "reschedule r --in 2h": 0,
    "edit r --times 9": 0,
    "fire r": 0,
    "cancel r": 0,
    "actions": 0,
    "actions --json": 0,
    "events": 0,
    "events --json": 0,
    "retry r --json": 0,
    "prune --older-than 30d --yes --json": 0,
    "migrate --check --json": 0,
    "migrate --json": 0,
    "settings": 0,
    "settings --json": 0,
    "help list": 0,
    "doctor": 0,
    "doctor --json": 0,
    "--version": 0,
    "--help": 0,
    "list --help": 0,
    "list --status nothing": 2,
}
"""What is run, in this order, and its exit status where the output can be written."""


for _module in pkgutil.iter_modules(cli.__path__):
    # Once, and not in each process that is forked below.
    importlib.import_module(f"{cli.__name__}.{_module.name}")


@pytest.fixture
def filled(server: str, template: str) -> Iterator[str]:
    """A database with a recall that waits, and two more sessions."""
    with postgres.database(server, template) as dsn:
        execute(
            dsn,
            "insert into sessions values ('s', 'ann'), ('s2', 'ann'), ('s3', 'ann')",
            "insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds, "
            "additional_context_message, created_at, updated_at) values ('r', 's', 'recurring', "
            "now() + interval '1 hour', 3600, 'm', now(), now())",
            "insert into recall_workers (worker, host, pid, version, slots, settings) "
            "values ('w', 'h', 1, '1', 3, '{}')",
        )
        yield dsn


def forked(dsn: str, words: list[str], stdout: Callable[[], int | None]) -> tuple[int, str]:
    """A command in a process of its own, forked from this one, as that is faster; its exit status
    and what it said on stderr. `stdout()`: a descriptor, None for none."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            os.close(reads)
            os.dup2(writes, 2)
            number = stdout()
            if number is None:
                os.close(1)
            else:
                os.dup2(number, 1)
            # As the interpreter begins.
            sys.stdout = None if number is None else open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            for name in [name for name in os.environ if name.startswith("RECALL_")]:
                del os.environ[name]
            os.environ["RECALL_DSN"] = dsn
            sys.argv = ["recall-worker", *words]
            try:
                main()
            except SystemExit as ends:
                status = ends.code if isinstance(ends.code, int) else 0
            except BaseException:
                import traceback

                traceback.print_exc()
                status = 99
            # What the interpreter does at its end.
            try:
                if sys.stdout is not None:
                    sys.stdout.flush()
            except OSError:
                status = 120
            os._exit(status)
        os._exit(98)
    os.close(writes)
    with os.fdopen(reads, encoding="utf-8") as pipe:
        said = pipe.read()
    _, ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended), said


def full() -> int:
    return os.open(FULL, os.O_WRONLY)


def broken() -> int:
    """A pipe whose reader has gone away."""
    reads, writes = os.pipe()
    os.close(reads)
    return writes


WAYS: dict[str, tuple[Callable[[], int | None], int | None]] = {
    "full": (full, errno.ENOSPC),
    "closed": (lambda: None, errno.EBADF),
    "a reader that has gone": (broken, None),
}


@pytest.mark.slow
@pytest.mark.parametrize(("stdout", "number"), WAYS.values(), ids=list(WAYS))
def test_output_that_can_not_be_written(
    stdout: Callable[[], int | None], number: int | None, filled: str
) -> None:
    """Each command that prints ends with a sentence on stderr and exit status 1; without a word
    where its reader has gone away. Never with a traceback."""
    for command, status in list(COMMANDS.items())[:: 1 if number == errno.ENOSPC else 4]:
        ended, said = forked(filled, command.split(), stdout)
        assert "Traceback" not in said and "Exception" not in said, (command, said)
        if status:
            assert ended == status, (command, said)
            continue
        assert ended == 1, (command, ended, said)
        errors = [line for line in said.splitlines() if line.startswith("Error: ")]
        assert errors == (
            [] if number is None else [f"Error: the output can't be written: {os.strerror(number)}"]
        ), (command, said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        ("list > /dev/full", 1, "Error: the output can't be written: No space left on device"),
        ("list --json | head -0", 1, ""),
        ("list >&-", 1, "Error: the output can't be written: Bad file descriptor"),
        ("list > /dev/full 2>&1", 1, ""),
        ("list >&- 2>&-", 1, ""),
        ("list --json 2>&- <&- | cat", 0, ""),
        ("list --json 2>&-", 0, ""),
    ],
)
def test_as_a_shell_does_it(line: str, status: int, says: str, filled: str) -> None:
    """The same in a process that a shell has started."""
    line = line.replace("list", f"{PROGRAM} list", 1)
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        env={"RECALL_DSN": filled, "PATH": os.environ["PATH"], "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done
    assert done.stderr.partition("\n")[0] == says, done
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_knows_few_characters(encoding: str, database: str) -> None:
    """What stdout can't show is escaped there. No command ends half way, or says that it did
    nothing where it did."""
    execute(database, "insert into sessions values ('s', 'ann')")
    few = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    def said(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "recall_worker", *words],
            env=os.environ | few | {"RECALL_DSN": database},
            capture_output=True,
        )
        assert done.returncode == 0 and b"Error" not in done.stderr, done
        return done.stdout.decode(encoding)

    text = "\u65e5\u672c\u8a9e \u0416"
    id = said("schedule", "s", text, "--in", "2h").strip()
    assert "\\u65e5" in said("show", id) and "\\u0416" in said("list")
    said("help", "list")
    assert said("cancel", id).strip() == id
