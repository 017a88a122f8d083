"""What a shell completes, and what help says: by processes, as a shell starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest
from typer.main import get_command

from recall_worker.cli.app import app as commands

from .conftest import Connection
from .support.application import Application
from .test_cli import operate
from .test_ledger import put


def completed(line: str, *, tries: int = 10, **environ: str) -> list[str]:
    """What is offered for the last word of a command line, as bash asks for it. On a machine that
    is busy its patience may end before the answer; then it is asked again."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RECALL_")}
    words = line.split(" ")
    done = subprocess.run(
        [sys.executable, "-m", "recall_worker"],
        env=kept
        | {
            "_RECALL_WORKER_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
        }
        | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    if done.returncode == 1 and not done.stdout and tries > 1:
        return completed(line, tries=tries - 1, **environ)
    return done.stdout.split()


@pytest.mark.slow
def test_commands_and_statuses() -> None:
    """Without a database."""
    assert completed("recall-worker resch") == ["reschedule"]
    statuses = ["pending", "running", "fired", "cancelled", "failed"]
    assert sorted(completed("recall-worker list --status ")) == sorted(statuses)
    assert sorted(completed("recall-worker list --status f")) == ["failed", "fired"]
    assert completed("recall-worker prune --status fi") == ["fired"]


@pytest.mark.slow
async def test_ids_and_queues(database: str, db: Connection, app: Application) -> None:
    """From the database, where one is known, also by --dsn; what would break a line is not
    offered."""
    for id in ("build-1", "build-2", "inbox", "two words", "red\x1b[31m"):
        await put(db, f"s-{id}", 60.0, id=id)
    await db.execute("update session_recalls set queue = 'mail' where id = 'inbox'")
    await db.execute("update session_recalls set status = 'failed' where id = 'build-2'")
    assert completed("recall-worker show b", RECALL_DSN=database) == ["build-1", "build-2"]
    assert completed(f"recall-worker why --dsn {database} in") == ["inbox"]
    assert completed("recall-worker cancel build-1 i", RECALL_DSN=database) == ["inbox"]
    everything = completed("recall-worker pause ", RECALL_DSN=database)
    assert everything == ["build-1", "build-2", "inbox"]
    for line in ("list --queue ", "queues pause "):
        assert completed(f"recall-worker {line}", RECALL_DSN=database) == ["default", "mail"]


@pytest.mark.slow
def test_nothing_is_said_where_it_fails(empty_database: str) -> None:
    """No database, none that answers, none that was migrated: nothing is offered, nothing is said,
    and nobody waits long."""
    assert completed("recall-worker show x") == []
    assert completed("recall-worker show x", RECALL_DSN="nonsense") == []
    assert completed("recall-worker show x", RECALL_DSN=empty_database) == []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        dsn = f"postgresql://u@127.0.0.1:{silent.getsockname()[1]}/x"
        assert completed("recall-worker show x", tries=1, RECALL_DSN=dsn) == []
        assert time.monotonic() - began < 30


# --- help -----------------------------------------------------------------------------------------


def test_help_is_not_cut_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command has its first sentence, whole, in the list."""
    monkeypatch.setenv("COLUMNS", "80")
    for words in (["--help"], ["queues", "--help"]):
        said = operate(None, *words)
        assert said.status == 0 and "..." not in said.out.partition("Commands:")[2]
        assert all(len(line) <= 80 for line in said.out.splitlines())


@pytest.mark.parametrize("words", [[], ["list"], ["queues"], ["queues", "pause"]], ids=" ".join)
def test_help_as_a_word(words: list[str]) -> None:
    """`help COMMAND` is what `COMMAND --help` says."""
    assert operate(None, "help", *words) == operate(None, *words, "--help")


@pytest.mark.parametrize("words", [["nope"], ["queues", "nope"], ["list", "nope"]], ids=" ".join)
def test_help_on_nothing(words: list[str]) -> None:
    """A command that there is not is a usage error."""
    said = operate(None, "help", *words)
    assert said.status == 2
    error, todo = said.err.splitlines()
    assert error == f"Error: there is no command {' '.join(words)}"
    assert todo.startswith("Try: recall-worker") and todo.endswith("--help")


def test_version() -> None:
    """By both names."""
    assert operate(None, "-V") == operate(None, "--version")
    assert operate(None, "-V").out.startswith("recall-worker ")


def test_every_command_says_what_it_does() -> None:
    """In a sentence that begins with a capital letter and ends, as does the help of each option."""

    def every(command: object, name: str) -> None:
        text = (getattr(command, "help", None) or "").strip()
        assert text[:1].isupper() and text.endswith("."), (name, text)
        for parameter in getattr(command, "params", []):
            help = getattr(parameter, "help", None)
            assert help is None or help.strip().endswith((".", "Berlin.", ")", "'.")), (name, help)
        for word, below in getattr(command, "commands", {}).items():
            every(below, f"{name} {word}")

    every(get_command(commands), "recall-worker")
