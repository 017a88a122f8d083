"""Planted defects: each is applied to a copy of what is shipped, and the model must find it; the
copy without a defect stays green."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..support.planted import ROOT, plant, planted

DEFECTS = planted("model")
LIVES, FIXED = "1800", "700"
TRIES = 5
"""Lives that a defect may take to be found, so many times: they are drawn anew each time. Most take
a tenth of the first ones; an edit by which an old moment still counts took more than 3,600 once."""


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


def lives_of(defect: Path) -> str:
    """The test that finds a defect: those of the slots of a session need sessions with several."""
    return "test_lives_with_several_pending" if defect.stem.startswith("slot_") else "test_lives"


def live(
    copy: Path, lives: str = LIVES, test: str = "test_lives", **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the model against the copy."""
    env = os.environ | {
        **more,
        "RECALL_MODEL_EXAMPLES": lives,
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
        "--timeout=560",
        f"tests/model/test_model.py::{test}",
    ]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=copy, env=env, capture_output=True, text=True
    )


@pytest.mark.full
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("defect", DEFECTS, ids=[defect.stem for defect in DEFECTS])
def test_a_planted_defect_is_found(defect: Path, copy: Path) -> None:
    """With the defect the model's test is red, by a life that went otherwise than DESIGN says."""
    plant(defect, copy)
    begun = time.monotonic()
    for _ in range(TRIES):
        if (found := live(copy, test=lives_of(defect))).returncode:
            break
    took = time.monotonic() - begun
    assert found.returncode == 1, found.stdout[-3000:]
    assert "AssertionError" in found.stdout and "state.begin(" in found.stdout, found.stdout[-3000:]
    which = re.search(r"Found in life ([0-9]+)[.]", found.stdout)
    assert which is not None, found.stdout[-3000:]
    # pytest -rP shows how fast.
    steps = len(re.findall(r"state[.](?!begin|teardown)[a-z_]+[(]", found.stdout))
    print(f"{defect.stem}: found after {took:.1f} s, in life {which[1]}, by {steps} steps")


@pytest.mark.full
@pytest.mark.timeout(240)
def test_without_it_the_copy_is_green(copy: Path) -> None:
    """Nothing but the defect makes it red: in the same lives each time."""
    found = live(copy, lives=FIXED, RECALL_MODEL_FIXED="1")
    assert found.returncode == 0, found.stdout[-3000:]


def test_there_are_defects() -> None:
    """An empty directory is no test."""
    assert len(DEFECTS) >= 9
