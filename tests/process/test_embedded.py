"""`run --embedded` beside settings that name another PostgreSQL."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support.daemon import Daemons
from ..support.endpoint import Endpoint
from ..test_cli import operate


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other accounts may enter: as root, the embedded server runs as one of them."""
    with tempfile.TemporaryDirectory(prefix="recall-embedded-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.slow
async def test_beside_an_exported_dsn(endpoint: Endpoint, open_folder: Path) -> None:
    """What the environment says of another PostgreSQL, right or wrong, is not used; that is said,
    and the worker runs on its own."""
    exported = {"RECALL_DSN": "nonsense", "RECALL_LISTEN_DSN": "postgresql://127.0.0.1:1/x"}
    async with Daemons({"RECALL_RUN_URL": endpoint.url, **exported}) as daemons:
        daemon = await daemons.start("--embedded", "--data", str(open_folder / "data"))
        await daemon.hears("listener.listening")
        notes = [line for line in daemon.talk if line.startswith("Note: ")]
        assert [line.split()[1] for line in notes] == list(exported)
        assert all("is set, but not used: with --embedded" in line for line in notes)
        assert await daemon.stop(within=40) == 0


@pytest.mark.parametrize("option", ["--dsn", "--listen-dsn"])
def test_two_servers_on_one_command_line(option: str) -> None:
    """Options that contradict each other are a usage error: what was typed is meant."""
    environ = {"RECALL_RUN_URL": "http://127.0.0.1:9/"}
    said = operate(None, "run", "--embedded", option, "postgresql:///x", environ=environ)
    assert said.status == 2
    assert said.err.startswith(f"Error: --embedded and {option} name two PostgreSQL servers\nTry: ")


def test_other_problems_are_told_before_the_start(open_folder: Path) -> None:
    """No server is started for settings that can't be used."""
    data = open_folder / "data"
    environ = {"RECALL_DSN": "postgresql:///x", "RECALL_LEASE": "soon"}
    said = operate(None, "run", "--embedded", "--data", str(data), environ=environ)
    assert said.status == 2 and not data.exists()
    assert "RECALL_LEASE is 'soon'" in said.err and "RECALL_RUN_URL is not set" in said.err
