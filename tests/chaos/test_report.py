"""docs/reliability.md says what the audit's results say, and of every kind of fault what it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .faults import KINDS
from .report import BEGIN, END, WHAT, written

DOCS = Path(__file__).parents[2] / "docs"


def test_the_result_documented_is_what_was_found() -> None:
    """The tables are those of docs/reliability.json: every kind of fault was injected,
    no finding is left out, and each run names the commit that it was made of.
    """
    results = json.loads((DOCS / "reliability.json").read_text(encoding="utf-8"))
    text = (DOCS / "reliability.md").read_text(encoding="utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == f"\n{written(results)}\n"
    assert all(re.fullmatch(r"[0-9a-f]{7,40}", result["commit"]) for result in results)
    assert set(KINDS) == {kind for result in results for kind in result["faults"]}


def test_every_kind_is_explained() -> None:
    assert set(WHAT) == set(KINDS)
