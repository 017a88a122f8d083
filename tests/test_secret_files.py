"""Secrets as they stand now: what is read anew, and what a file that can't be used changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recall_worker import settings
from recall_worker.secret_files import Secrets

OLD, NEW = "postgresql://ann:old@db/app", "postgresql://ann:new@db/app"


class Told:
    """What the secrets told, with all that could have quoted one."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, facts: dict[str, Any]) -> None:
        self.events.append((event, facts))
        assert "ann" not in str(facts)


def from_file(path: Path, **more: str) -> tuple[Secrets, Told]:
    environ = {"RECALL_DSN_FILE": str(path)} | more
    path.write_text(OLD + "\n")
    secrets, told = Secrets(settings.read(environ), environ), Told()
    secrets.listen(told)
    return secrets, told


def test_a_file_is_read_anew(tmp_path: Path) -> None:
    """Written over, or renamed into its place: the next connection has the new value, and one event
    says so."""
    path = tmp_path / "dsn"
    secrets, told = from_file(path)
    assert secrets.dsn() == secrets.listen_dsn() == OLD
    path.write_text(NEW)
    assert secrets.dsn() == secrets.dsn() == NEW
    other = tmp_path / "other"
    other.write_text(OLD)
    other.replace(path)
    assert secrets.dsn() == OLD
    assert told.events == [("secret.changed", {"setting": "RECALL_DSN"})] * 2


UNUSABLE: dict[str, Callable[[Path], int | None]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_text(""),
    "blank": lambda path: path.write_text(" \n\n"),
    "half a URL": lambda path: path.write_text("postgresql://ann:old%4"),
    "half a list": lambda path: path.write_text("host=db user=ann password="),
    "no DSN": lambda path: path.write_text("ann:old"),
    "two lines": lambda path: path.write_text(OLD + "\n" + OLD),
    "an @ too many": lambda path: path.write_text("postgresql://ann:o@ld@db/app"),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe" + OLD.encode()),
    "a directory": lambda path: path.rename(path.with_name("gone")).with_name(path.name).mkdir(),
    "a link to nothing": lambda path: (
        path.rename(path.with_name("gone")).with_name(path.name).symlink_to("nothing")
    ),
}


@pytest.mark.parametrize("how", UNUSABLE)
def test_a_file_that_cannot_be_used(how: str, tmp_path: Path) -> None:
    """The last value stays, and is told once; as soon as the file can be used it counts."""
    path = tmp_path / "dsn"
    secrets, told = from_file(path)
    UNUSABLE[how](path)
    # Half a list of words may be one: then it is wrong, and replaced at the next try.
    assert (
        secrets.dsn() == secrets.dsn() == ("host=db user=ann password=" if "list" in how else OLD)
    )
    events = [event for event, _ in told.events]
    assert events == (["secret.changed"] if "list" in how else ["secret.unreadable"])
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.write_text(NEW)
    assert secrets.dsn() == NEW
    assert [event for event, _ in told.events][1:] == ["secret.changed"]


def test_a_credential_is_read_anew(tmp_path: Path) -> None:
    """One of systemd's; that of a setting that has none stays unset."""
    (tmp_path / "RECALL_DSN").write_text(OLD)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    secrets = Secrets(settings.read(environ), environ)
    (tmp_path / "RECALL_DSN").write_text(NEW)
    assert secrets.dsn() == secrets.listen_dsn() == NEW
    (tmp_path / "RECALL_LISTEN_DSN").write_text(OLD)
    assert (secrets.dsn(), secrets.listen_dsn()) == (NEW, OLD)
    assert secrets.current("run_token") is None
    (tmp_path / "RECALL_RUN_TOKEN").write_text("t")
    assert secrets.current("run_token") == "t"


@pytest.mark.parametrize("given", ["option", "environment", "nowhere"])
def test_what_comes_from_no_file_stays(given: str, tmp_path: Path) -> None:
    """An option, or the variable itself, is what it is, whatever files there are."""
    path = tmp_path / "dsn"
    path.write_text(NEW)
    environ = {"RECALL_DSN": OLD} if given == "environment" else {"RECALL_DSN_FILE": str(path)}
    flags = {"dsn": OLD} if given == "option" else {}
    if given == "nowhere":
        secrets = Secrets(settings.Settings(dsn=OLD))
    else:
        secrets = Secrets(settings.read(environ, **flags), environ, list(flags))
    assert secrets.dsn() == OLD
    assert secrets.read_again() == []


def test_reading_all_again(tmp_path: Path) -> None:
    """It says which settings come from files; what could not be read is told again."""
    token = tmp_path / "token"
    token.write_text("one")
    secrets, told = from_file(tmp_path / "dsn", RECALL_RUN_TOKEN_FILE=str(token))
    token.write_text("two")
    (tmp_path / "dsn").unlink()
    for _ in range(2):
        assert secrets.read_again() == ["RECALL_DSN", "RECALL_RUN_TOKEN"]
    assert secrets.current("run_token") == "two"
    assert [event for event, _ in told.events] == [
        "secret.unreadable",
        "secret.changed",
        "secret.unreadable",
    ]
    assert "old" not in repr(secrets) and "two" not in repr(secrets)
