"""Planted defects: each patch is applied to a copy of what is shipped, and the model must find it; the copy as it is stays green."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PATCHES = sorted((HERE / "patches").glob("*.patch"))
LIVES = "500"
"""Lives that a defect may take to be found; most take a tenth of that."""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package, its SQL and its tests, with nothing else of the project in reach."""
    for name in ("recall_worker", "sql", "tests"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"),
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def live(copy: Path) -> subprocess.CompletedProcess[str]:
    """Run the model against the copy."""
    env = os.environ | {
        "RECALL_MODEL_EXAMPLES": LIVES,
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    seen = subprocess.run(
        [sys.executable, "-c", "import recall_worker; print(recall_worker.__file__)"],
        cwd=copy,
        env=env,
        capture_output=True,
        text=True,
    )
    assert seen.stdout.startswith(str(copy)), "the copy is not what would be tested"
    words = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        "not full",
        "--tb=short",
        "tests/model/test_model.py",
    ]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=copy, env=env, capture_output=True, text=True
    )


@pytest.mark.full
@pytest.mark.timeout(240)
@pytest.mark.parametrize("patch", PATCHES, ids=[patch.stem for patch in PATCHES])
def test_a_planted_defect_is_found(patch: Path, copy: Path) -> None:
    """The patch applies to what is shipped, and with it the model's test is red, by a life that went otherwise than DESIGN says."""
    applied = subprocess.run(
        ["patch", "-p1", "--fuzz=0", "-i", str(patch)], cwd=copy, capture_output=True, text=True
    )
    assert applied.returncode == 0, (
        f"{patch.name} no longer applies: {applied.stdout}{applied.stderr}"
    )
    begun = time.monotonic()
    found = live(copy)
    took = time.monotonic() - begun
    assert found.returncode == 1, found.stdout[-3000:]
    assert "AssertionError" in found.stdout and "state.begin(" in found.stdout, found.stdout[-3000:]
    which = re.search(r"Found in life ([0-9]+)[.]", found.stdout)
    assert which is not None, found.stdout[-3000:]
    # How fast, for whoever asks: pytest -rP.
    steps = len(re.findall(r"state[.](?!begin|teardown)[a-z_]+[(]", found.stdout))
    print(f"{patch.stem}: found after {took:.1f} s, in life {which[1]}, by {steps} steps")


@pytest.mark.full
@pytest.mark.timeout(240)
def test_without_it_the_copy_is_green(copy: Path) -> None:
    """Nothing but the patch makes it red."""
    found = live(copy)
    assert found.returncode == 0, found.stdout[-3000:]


def test_there_are_patches() -> None:
    """Nobody takes an empty directory for a test."""
    assert len(PATCHES) >= 5
