"""`settings`: what is set, and where it comes from; wrong settings included, secrets never."""

from __future__ import annotations

from pathlib import Path

import pytest

from recall_worker.settings import Settings, option, secrets, survey, variable

from .test_cli import Said, operate
from .test_settings import FIELDS, HUSH, secret


def shown(said: Said) -> dict[str, list[str]]:
    """The table: value and origin of each setting."""
    lines = [line.split() for line in said.out.splitlines()]
    return {words[0]: [" ".join(words[1:-1]), words[-1]] for words in lines}


def test_without_any() -> None:
    """Every setting with its default, in order; times as people write them."""
    said = operate(None, "settings")
    assert (said.status, said.err) == (0, "")
    table = shown(said)
    assert list(table)[1:] == [variable(name) for name in FIELDS]
    assert all(origin == "default" for _, origin in list(table.values())[1:])
    assert table["RECALL_LEASE"] == ["1m", "default"]
    assert table["RECALL_DSN"] == ["not set", "default"]
    assert table["RECALL_PAUSED"] == ["no", "default"]


def test_where_they_come_from(tmp_path: Path) -> None:
    """Environment, file, credential; of a secret only that it is set."""
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "RECALL_SIGNING_SECRET").write_text(HUSH)
    (tmp_path / "token").write_text(HUSH)
    environ = {
        "RECALL_DSN": f"postgresql://me:{HUSH}@db/app",
        "RECALL_RUN_URL": f"http://api/run?code={HUSH}",
        "RECALL_RUN_TOKEN_FILE": str(tmp_path / "token"),
        "RECALL_LEASE": "90",
        "RECALL_BUSY_DELAY": "0.5",
        "CREDENTIALS_DIRECTORY": str(credentials),
        "RECALL_LAESE": "90",
    }
    said = operate(None, "settings", environ=environ)
    assert said.status == 0 and HUSH not in said.out + said.err
    table = shown(said)
    assert table["RECALL_DSN"] == ["set", "environment"]
    assert table["RECALL_RUN_URL"] == ["http://api/run?…", "environment"]
    assert table["RECALL_RUN_TOKEN"] == ["set", "file"]
    assert table["RECALL_SIGNING_SECRET"] == ["set", "credential"]
    assert table["RECALL_LEASE"] == ["1m30s", "environment"]
    assert table["RECALL_BUSY_DELAY"] == ["0.5s", "environment"]
    assert table["RECALL_RUN_HEADERS"] == ["not set", "default"]
    assert said.err == "Note: RECALL_LAESE is not a setting of recall-worker and is ignored.\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_wrong_ones(as_json: bool, tmp_path: Path) -> None:
    """All are shown, the wrong ones as they were given, and every problem is told; exit status
    2."""
    environ = {
        "RECALL_LEASE": "soon\x1b[31m",
        "RECALL_CONCURRENCY": "0",
        "RECALL_DSN": "nonsense",
        "RECALL_RUN_URL": f"http://me:{HUSH}@api/",
        "RECALL_RUN_TOKEN_FILE": str(tmp_path / "nothing"),
    }
    said = operate(None, "settings", *(["--json"] if as_json else []), environ=environ)
    assert said.status == 2 and HUSH not in said.out + said.err
    assert said.out.isascii() and "\x1b" not in said.out + said.err
    for name in (*list(environ)[:-1], "RECALL_RUN_TOKEN_FILE"):
        assert f"{name} " in said.err
    if as_json:
        document = said.document
        found = {row["variable"]: row for row in document["settings"]}
        assert found["RECALL_LEASE"]["value"] == "soon\x1b[31m"
        assert found["RECALL_DSN"]["value"] == "set"
        token = found["RECALL_RUN_TOKEN"]
        assert (token["value"], token["origin"]) == (None, "file")
        assert len(document["problems"]) == len(environ)
    else:
        table = shown(said)
        assert table["RECALL_CONCURRENCY"] == ["0", "environment"]
        assert table["RECALL_RUN_URL"] == ["set", "environment"]


@pytest.mark.parametrize("name", secrets())
def test_no_secret_is_shown(name: str) -> None:
    """Right or wrong."""
    for value in (secret(name), secret(name) + "\n"):
        found, _ = survey({variable(name): value})
        assert HUSH not in str(found)
        assert next(one for one in found if one.name == variable(name)).value == "set"


def test_options_are_those_of_run() -> None:
    """The names by which a problem is told are those that `run` takes."""
    said = operate(None, "run", "--help").out
    for name in ("dsn", "listen_dsn", "run_url", "lease", "drain_timeout", "log_level"):
        assert name in Settings.__dataclass_fields__ and f"{option(name)} " in said
