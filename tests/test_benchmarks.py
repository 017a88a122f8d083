"""The benchmarks: their document says what was measured, and their command works. How fast anything
is, is not a test's business.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import BEGIN, END, MEASURES, commits, main, reported
from benchmarks.ground import commit
from benchmarks.measures import inserting

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def test_the_document_has_every_measure_and_names_its_commit() -> None:
    """docs/performance.md carries the tables of every measure, in order, with the commit that they
    were made of and with every plot. The raw figures are not in the repository, so the tables
    cannot be held against them.
    """
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    marked = text[text.index(BEGIN) : text.index(END)]
    titles = [importlib.import_module(f"benchmarks.measures.{name}").TITLE for name in MEASURES]
    assert re.findall(r"(?m)^## (.+)$", marked) == titles
    assert all(len(part.strip().splitlines()) > 1 for part in re.split(r"(?m)^## .+$", marked)[1:])
    assert re.search(r"(?m)^Made of commit `[0-9a-f]{7,40}`\.$", marked)
    plots = re.findall(r"\(plots/(\w+)\.svg\)", marked)
    assert plots == ["wake", "timers", "backlog", "endurance"]
    assert all((DOCS / "plots" / f"{name}.svg").exists() for name in plots)


def test_the_document_is_written_from_figures_wherever_they_are(tmp_path: Path) -> None:
    """Only the marked part is written, and figures of several commits say which is of which."""
    found = {name: [2.0] for name in (inserting.PLAIN, inserting.LATER, inserting.NEAR)}
    measures: dict[str, Any] = {"inserting": {"commit": "1234567", "seconds": 1.0, "found": found}}
    figures = {"machine": {"cores": "2"}, "measures": measures}
    document, raw = tmp_path / "performance.md", tmp_path / "raw.json"
    document.write_text(f"before\n<!-- measured: long ago -->\nold\n{END}after\n", encoding="utf-8")
    raw.write_text(json.dumps(figures), encoding="utf-8")
    assert main(["--report", str(raw), "--docs", str(document)]) == 0
    text = document.read_text(encoding="utf-8")
    assert text == f"before\n{BEGIN}\n{reported(figures)}\n{END}after\n"
    assert "\nMade of commit `1234567`.\n" in text
    measures["idle"] = {"commit": "89abcde-dirty"}
    assert commits(figures) == ("Made of commits `89abcde-dirty` (idle), `1234567` (inserting).")


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
    assert {measure["commit"] for measure in measures.values()} == {commit()}
    assert measures["idle"]["found"]["recall-worker"]["connections"] == 4
    assert all(rate > 0 for rates in measures["inserting"]["found"].values() for rate in rates)
    assert "| recall-worker, due now |" in done.stdout
