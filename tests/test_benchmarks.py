"""The benchmarks: their document says what was measured, and their command works. How fast anything
is, is not a test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import BEGIN, END, reported

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def test_the_figures_documented_are_those_measured() -> None:
    """docs/performance.md carries the tables that docs/performance.json gives, and every plot that
    it shows is there."""
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    start, end = text.index(BEGIN.format("performance.json")), text.index(END)
    figures = json.loads((DOCS / "performance.json").read_text(encoding="utf-8"))
    expected = reported(figures, DOCS / "plots", DOCS)
    assert text[start:end] == BEGIN.format("performance.json") + "\n" + expected + "\n"
    assert all(
        (DOCS / "plots" / f"{name}.svg").exists()
        for name in ("wake", "timers", "backlog", "endurance")
    )


@pytest.mark.full
@pytest.mark.timeout(180)
def test_a_quick_run_measures_and_reports(tmp_path: Path) -> None:
    """Inserts and an idle replica, quickly: whichever peers are installed, recall-worker's own
    figures are there, as JSON and as tables."""
    found = tmp_path / "found.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks",
            "--quick",
            "--only",
            "inserting,idle",
            "--json",
            str(found),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measures = json.loads(found.read_text(encoding="utf-8"))["measures"]
    assert measures["idle"]["found"]["recall-worker"]["connections"] == 4
    assert all(rate > 0 for rates in measures["inserting"]["found"].values() for rate in rates)
    assert "| recall-worker, due now |" in done.stdout
