"""Secrets that the settings expose: which of them, in which words, and where there is nothing to
say."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recall_worker import exposures as exposing
from recall_worker.exposures import exposures, is_local, open_to_all
from recall_worker.secret_files import Secrets
from recall_worker.settings import Settings, read

from .conftest import Connection
from .support.daemon import Daemons
from .test_cli import operate

RUN = "http://agent.example/{session_id}"


@pytest.fixture(autouse=True)
def nothing_of_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """libpq reads the environment and the home directory."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def seen(**given: Any) -> list[tuple[str, str]]:
    return [(e.setting, e.seen) for e in exposures(Settings(**given), {})]


# --- the way to the endpoint ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "https://agent.example/run",
        "http://localhost:8000/run",
        "http://LOCALHOST./run",
        "http://api.localhost/run",
        "http://127.0.0.1/run",
        "http://127.8.9.1/run",
        "http://[::1]:8000/run",
        "http://[::ffff:127.0.0.1]/run",
    ],
)
def test_a_token_that_is_safe(url: str) -> None:
    """Over TLS, or to this host."""
    assert seen(run_url=url, run_token="t") == []


@pytest.mark.parametrize(
    "url",
    [
        "http://agent.example/run",
        "http://agent:8000/run",
        "http://10.0.0.1/run",
        "http://[fd00::1]/run",
        "http://localhost.example/run",
        "http://127.0.0.1.example/run",
    ],
)
def test_a_token_in_the_clear(url: str) -> None:
    """To any other host; without a token there is nothing to say."""
    [(setting, words)] = seen(run_url=url, run_token="hush")
    assert setting == "RECALL_RUN_URL" and "the token goes to" in words and "hush" not in words
    assert seen(run_url=url) == []


# --- the way to PostgreSQL ------------------------------------------------------------------------

SAFE = [
    "postgresql:///app",
    "dbname=app",
    "host=/run/postgresql",
    "host=@abstract",
    "postgresql://%2Frun%2Fpostgresql/app",
    "postgresql://localhost/app",
    "postgresql://127.0.0.1:6432/app",
    "postgresql://[::1]/app",
    "host=db.example hostaddr=127.0.0.1",
    "host=/run/postgresql,localhost",
    "postgresql://db.example/app?sslmode=require",
    "postgresql://db.example/app?ssl=true",
    "postgresql+asyncpg://db.example/app?ssl=verify-full",
    "host=db.example sslmode=verify-ca",
    "host=a,b sslmode=verify-full",
    "host=db.example gssencmode=require",
    "host=db.example channel_binding=require",
]
OPEN = [
    ("postgresql://u:hush@db.example/app", "db.example need not be encrypted (sslmode=prefer)"),
    ("host=db.example", "db.example need not be encrypted (sslmode=prefer)"),
    ("host=db.example sslmode=allow", "need not be encrypted (sslmode=allow)"),
    ("host=db.example sslmode=disable", "db.example is not encrypted (sslmode=disable)"),
    ("hostaddr=10.0.0.1", "10.0.0.1 need not be"),
    ("host=localhost hostaddr=10.0.0.1", "localhost need not be"),
    ("postgresql://a.example,localhost,b.example:6432/app", "a.example, b.example need not be"),
    ("host=/run/postgresql,db.example", "to db.example need not be"),
    ("postgresql+psycopg://db.example/app?ssl=prefer", "(sslmode=prefer)"),
]


@pytest.mark.parametrize("dsn", SAFE)
def test_a_dsn_that_is_safe(dsn: str) -> None:
    """A socket, this host, or TLS that libpq insists on."""
    settings = read({"RECALL_DSN": dsn, "RECALL_LISTEN_DSN": dsn})
    assert exposures(settings, {}) == []


@pytest.mark.parametrize(("dsn", "words"), OPEN)
def test_a_dsn_in_the_clear(dsn: str, words: str) -> None:
    """Both DSNs are looked at; no password is quoted."""
    found = exposures(read({"RECALL_DSN": dsn, "RECALL_LISTEN_DSN": dsn}), {})
    assert [e.setting for e in found] == ["RECALL_DSN", "RECALL_LISTEN_DSN"]
    assert words in found[0].seen and "hush" not in found[0].seen + found[0].todo
    assert "sslmode=verify-full" in found[0].todo


def test_what_libpq_takes_from_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PGHOST and PGSSLMODE; the file of a service, named in the DSN or by PGSERVICE, which counts
    before the environment and after the DSN."""
    monkeypatch.setenv("PGHOST", "db.example")
    assert len(seen(dsn="dbname=app")) == 1
    assert seen(dsn="dbname=app host=localhost") == []
    monkeypatch.setenv("PGSSLMODE", "require")
    assert seen(dsn="dbname=app") == []
    assert len(seen(dsn="dbname=app sslmode=prefer")) == 1
    monkeypatch.delenv("PGSSLMODE")
    monkeypatch.delenv("PGHOST")
    file = tmp_path / "services"
    file.write_text("[open]\nhost=a.example\n\n[closed]\nhost=b.example\nsslmode=verify-full\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    assert seen(dsn="service=closed") == []
    [(_, words)] = seen(dsn="service=open")
    assert "a.example" in words
    assert len(seen(dsn="service=closed sslmode=allow")) == 1
    monkeypatch.setenv("PGSERVICE", "open")
    assert len(seen(dsn="dbname=app")) == 1
    assert seen(dsn="service=closed") == []
    assert os.environ["PGSERVICE"] == "open"
    monkeypatch.delenv("PGSERVICE")
    # One that is not there: the connection says so, and this says nothing of it.
    assert seen(dsn="service=missing") == [] and "PGSERVICE" not in os.environ


def test_a_dsn_that_is_none() -> None:
    """Others say so."""
    assert seen(dsn="host='") == []


def test_this_host() -> None:
    """By name and by address, whatever their spelling."""
    assert all(map(is_local, ("localhost", "127.1.2.3", "::1", "[::1]", "a.localhost")))
    assert not any(map(is_local, ("", None, "localhos", "0.0.0.0", "fe80::1%eth0", "1.1.1.1")))


# --- files ----------------------------------------------------------------------------------------

Put = Callable[[int], Path]


@pytest.fixture
def put() -> Iterator[Put]:
    """Makes a file of this mode in a directory that all may enter, as /etc/recall-worker is.
    (pytest's own are 0700, and other pytests keep them so.)"""
    base = Path(tempfile.mkdtemp())
    folder = base / "etc"
    folder.mkdir()
    base.chmod(0o755)
    if any(not parent.stat().st_mode & 0o001 for parent in folder.resolve().parents):
        pytest.skip(f"others can't enter {base}")

    def make(mode: int) -> Path:
        file = folder / f"secret-{mode:o}"
        file.write_text("hush\n")
        file.chmod(mode)
        folder.chmod(0o755)
        return file

    yield make
    shutil.rmtree(base)


@pytest.mark.parametrize(
    ("mode", "may"),
    [
        (0o600, None),
        (0o400, None),
        (0o440, None),
        (0o640, None),
        (0o660, None),
        (0o644, "read"),
        (0o444, "read"),
        (0o604, "read"),
        (0o602, "change"),
        (0o666, "read and change"),
    ],
)
def test_the_mode_of_a_file(mode: int, may: str | None, put: Put) -> None:
    """What others may do; what the owner and the group may is theirs (systemd's are 0440)."""
    assert open_to_all(put(mode)) == may


def test_behind_a_directory_that_others_can_not_enter(put: Put) -> None:
    """Nobody gets as far as the file; a link to it from elsewhere changes nothing."""
    file = put(0o644)
    file.parent.chmod(0o750)
    link = file.parent.parent / "link"
    link.symlink_to(file)
    assert open_to_all(file) is None is open_to_all(link)
    file.parent.chmod(0o755)
    assert open_to_all(link) == "read"


def test_what_is_mounted_for_the_container(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes mounts secrets 0644, read-only and apart from the root: no note. On a host whose
    root is read-only as a whole a file is looked at all the same."""
    file = put(0o644)
    real = os.statvfs(file)

    class Mounted:
        f_flag = real.f_flag | os.ST_RDONLY

    monkeypatch.setattr(os, "statvfs", lambda _: Mounted)
    apart = file.stat().st_dev != Path("/").stat().st_dev
    assert open_to_all(file) == (None if apart else "read")
    monkeypatch.setattr(exposing, "_device", lambda path: hash(str(path)))
    assert open_to_all(file) is None


def test_each_secret_is_looked_at(put: Put, tmp_path: Path) -> None:
    """What comes from a file, by the variable that names it; not what comes from the environment or
    an option, and not a file that is not there."""
    file = put(0o644)
    environ = {
        "RECALL_DSN_FILE": str(file),
        "RECALL_RUN_TOKEN_FILE": str(file),
        "RECALL_SIGNING_SECRET": "from the environment",
    }
    settings = Settings(dsn="dbname=x", run_token="hush", signing_secret="s")
    found = exposures(settings, Secrets(settings, environ).files())
    assert [e.setting for e in found] == ["RECALL_DSN_FILE", "RECALL_RUN_TOKEN_FILE"]
    assert found[0].seen == f"every account of this host may read {file}"
    assert found[0].todo.startswith(f"chmod o= {file}")
    assert Secrets(settings, environ, ["dsn"]).files().keys() == {"run_token"}
    gone = {"RECALL_RUN_TOKEN_FILE": str(tmp_path / "gone")}
    assert Secrets(settings, gone).files() == {}


def test_a_credential(put: Put) -> None:
    """systemd's credentials, by the directory that it names."""
    file = put(0o644)
    credential = file.with_name("RECALL_RUN_TOKEN")
    file.rename(credential)
    environ = {"CREDENTIALS_DIRECTORY": str(credential.parent)}
    settings = Settings(run_token="hush")
    assert Secrets(settings, environ).files() == {"run_token": credential}
    credential.chmod(0o440)
    assert exposures(settings, Secrets(settings, environ).files()) == []


# --- where it is said -----------------------------------------------------------------------------


@pytest.mark.slow
async def test_the_same_words_at_the_start_and_in_doctor(
    database: str, db: Connection, daemons: Daemons, put: Put
) -> None:
    """A warning each, once; `doctor` has them as notes."""
    file = put(0o644)
    given: dict[str, Any] = {"run_url": RUN, "run_token_file": file}
    daemon = await daemons.start(**given)
    told = daemon.told("settings.exposed")
    assert [e["setting"] for e in told] == ["RECALL_RUN_URL", "RECALL_RUN_TOKEN_FILE"]
    assert {e["level"] for e in told} == {"warning"}
    environ = {"RECALL_" + name.upper(): str(value) for name, value in given.items()}
    said = await asyncio.to_thread(operate, database, "doctor", "--json", environ=environ)
    notes = [row for row in said.document["checks"] if row["check"] == "secrets"]
    assert [(row["seen"], row["todo"]) for row in notes] == [(e["reason"], e["hint"]) for e in told]
    assert {row["state"] for row in notes} == {"note"}
    assert await daemon.stop() == 0
