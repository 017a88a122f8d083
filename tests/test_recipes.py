"""The recipes of docs/endpoint.md: each program as it stands there, served by the server that it
names, and `check-endpoint` against it."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from recall_worker.contract.check import FAIL, NOT_SHOWN, Check
from recall_worker.settings import Settings

from .servers import Server, environment, free_port

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]  # The first may have to install it.

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "endpoint.md"
RECIPES = dict(
    re.findall(
        r"<!-- recipe: (\w+) -->\n```\w+\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S
    )
)
TOKEN = "rosebud-1"
NOT_OFFERED = {"accepted", "cancel", "stream"}
"""What a recipe that answers when the run has ended shows nothing of."""


def test_all_recipes_are_tested() -> None:
    """None is in the document that is not tried below."""
    assert set(RECIPES) == {"fastapi", "starlette", "django", "express"}


def uvicorn(folder: Path, port: int) -> list[str | Path]:
    """FastAPI and Starlette, which the tests have already."""
    (folder / "app.py").write_text(RECIPES[folder.name], encoding="utf-8")
    return [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port)]


def django(folder: Path, port: int) -> list[str | Path]:
    home = environment("django-recipe", "django>=5,<6")
    (folder / "app.py").write_text(RECIPES["django"], encoding="utf-8")
    return [home / "python", "app.py", "runserver", "--noreload", str(port)]


def express(folder: Path, port: int) -> list[str | Path]:
    (folder / "app.mjs").write_text(RECIPES["express"], encoding="utf-8")
    (folder / "node_modules").symlink_to(npm("express@^5", "pg@^8") / "node_modules")
    return ["node", "app.mjs"]


def npm(*packages: str) -> Path:
    """A folder with these packages, made once. Skips the test where npm is not there, or can't
    install them."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("not installed: node, with npm")
    cache = Path(
        os.environ.get("RECALL_TEST_CACHE")
        or Path(tempfile.gettempdir()) / f"recall-test-servers-{os.getuid()}"
    )
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    home = cache / re.sub(r"\W+", "-", "npm-" + "-".join(packages))
    with (cache / f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "complete").exists():
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
            words = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(home)]
            done = subprocess.run([*words, *packages], capture_output=True, text=True)
            if done.returncode != 0:
                shutil.rmtree(home, ignore_errors=True)
                said = (done.stderr.strip().splitlines() or ["no word"])[-1]
                pytest.skip(f"npm can't install {' '.join(packages)}: {said}")
            (home / "complete").touch()
    return home


SERVED: dict[str, Callable[[Path, int], list[str | Path]]] = {
    "fastapi": uvicorn,
    "starlette": uvicorn,
    "django": django,
    "express": express,
}


@pytest.mark.parametrize("name", SERVED)
async def test_the_recipe_passes(name: str, tmp_path: Path, empty_database: str) -> None:
    """Nothing fails, and nothing is left unshown but what it does not offer."""
    folder, port = tmp_path / name, free_port()
    folder.mkdir()
    command = SERVED[name](folder, port)
    environ = {"RUN_TOKEN": TOKEN, "PORT": str(port), "DATABASE_URL": empty_database}
    base = f"http://127.0.0.1:{port}"
    server = Server(command, folder, environ, f"{base}/", any_answer=True)
    server.start()
    try:
        settings = Settings(run_url=f"{base}/sessions/{{session_id}}/run", run_token=TOKEN)
        rows = await Check(settings, "for-tests", "missing-1", 20.0).rows()
    finally:
        server.stop()
    shown = "\n".join(f"{r.finding.verdict:9} {r.name:12} {r.finding.seen}" for r in rows)
    assert [r.name for r in rows if r.finding.verdict == FAIL] == [], shown
    assert {r.name for r in rows if r.finding.verdict == NOT_SHOWN} == NOT_OFFERED, shown
