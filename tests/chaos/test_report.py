"""docs/reliability.md says what the audit's results say, and of every kind of fault what it is; and
what seeds draw covers what it is meant to cover."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from .__main__ import is_void
from .drawn import IDS, LEASES, PENDING_MOST, QUEUES, SLOTS, VERSIONS, draw
from .faults import KINDS, THIRDS, first_deck
from .report import BEGIN, END, WHAT, not_reached, summed_up, written

DOCS = Path(__file__).parents[2] / "docs"
RESULT = {
    "seed": 7,
    "minutes": 10.0,
    "commit": "0123456789" * 4,
    "settings": draw(7).shown,
    "recalls": 1,
    "occurrences": 1,
    "requests": 1,
    "runs": 1,
    "replays under the same key": 0,
    "keys after a failed run": 0,
    "lost": 0,
    "doubled": 0,
    "hung": 0,
    "postgresql": 18,
    "answers": {"ok": 1},
    "lag in calm phases, ms (p50, p99, most)": [1.0, 2.0, 3.0],
    "seconds to recover": {},
    "kinds": list(KINDS),
    "faults": dict.fromkeys(KINDS, 1),
    "findings": [],
}


def test_the_result_documented_is_what_was_found() -> None:
    """The tables are those of docs/reliability.json: every kind of fault that the audit had then
    was injected, and no finding is left out."""
    results = json.loads((DOCS / "reliability.json").read_text(encoding="utf-8"))
    text = (DOCS / "reliability.md").read_text(encoding="utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == f"\n{written(results)}\n"


def test_the_results_published_name_their_commit_and_reached_every_kind() -> None:
    """A result ages: it says what it was made of, and that is what was committed."""
    results = json.loads((DOCS / "reliability.json").read_text(encoding="utf-8"))
    if not any("commit" in result for result in results):
        pytest.skip(
            "docs/reliability.json was made before results named their commit: make it again"
        )
    assert not_reached(results) == []
    for result in results:
        assert len(result["commit"]) == 40 and set(result["commit"]) <= set("0123456789abcdef"), (
            result["commit"]
        )
        assert not result["findings"]


def test_every_kind_is_explained() -> None:
    assert set(WHAT) == set(KINDS)


def test_a_report_names_the_commit_the_settings_and_what_was_not_reached() -> None:
    text = written([RESULT])
    assert f"Audited commit: `{RESULT['commit']}`." in text
    assert "Kinds of faults that were not reached: none." in text
    assert "has learned since" not in text
    old = RESULT | {"kinds": sorted(set(KINDS) - {"mcp kill"})}
    assert "Kinds that the audit has learned since: mcp kill." in written([old])
    drawn = draw(7)
    assert f"| 7 | {drawn.slots} | {drawn.fleet or 'off'} | {drawn.lease:g} s | " in text
    some = {kind: 1 for kind in KINDS if kind not in ("kill", "term")}
    assert "Kinds of faults that were not reached: kill, term." in written(
        [RESULT | {"faults": some}]
    )


@pytest.mark.parametrize("first", range(100, 112))
def test_three_consecutive_seeds_draw_what_differs(first: int) -> None:
    drawn = [draw(seed) for seed in range(first, first + 3)]
    for low, high in LEASES:
        assert any(low <= d.lease <= high for d in drawn)
    assert {d.fleet is None for d in drawn} == {True, False}
    assert {d.session_limit is None for d in drawn} == {True, False}
    assert all(2 <= d.lease <= 60 and 1 <= d.slots <= 50 for d in drawn)
    assert all(d.fleet is None or d.fleet >= 2 for d in drawn)
    if first % 3 == 0:
        assert all(any(low <= d.slots <= high for d in drawn) for low, high in SLOTS)


@pytest.mark.parametrize("first", range(100, 112))
def test_seeds_draw_every_kind_of_table(first: int) -> None:
    """Ids by three from a multiple of three on, the rest by two from an even number on."""
    if first % 3 == 0:
        assert {draw(seed).ids for seed in range(first, first + 3)} == set(IDS)
    if first % 2 == 0:
        drawn = [draw(first), draw(first + 1)]
        assert {d.queues for d in drawn} == set(QUEUES)
        assert {d.pending_most for d in drawn} == set(PENDING_MOST)
        assert {d.postgres for d in drawn} == set(VERSIONS)


def test_results_are_summed_up() -> None:
    """One line for each seed and one for all, with what was not reached."""
    other = RESULT | {"seed": 8, "occurrences": 41, "hung": 1, "findings": ["drain: …"]}
    lines = summed_up([RESULT, other]).splitlines()
    faults = 2 * len(KINDS)
    assert lines[3].split() == ["all", "20", "42", str(faults), "0", "0", "1", "1"]
    assert lines[4] == "kinds of faults that were not reached: none"


@pytest.mark.parametrize("first", range(100, 103))
def test_three_consecutive_seeds_begin_with_all_kinds(first: int) -> None:
    """Each with a third of its own, so that a third of a deck from each reaches every kind."""
    assert sorted(kind for third in THIRDS for kind in third) == sorted(KINDS)
    reached: set[str] = set()
    for seed in range(first, first + 3):
        deck = first_deck(seed, list(KINDS), random.Random(seed))
        assert sorted(deck) == sorted(KINDS)
        reached |= set(deck[-max(map(len, THIRDS)) :])
    assert reached == set(KINDS)


@pytest.mark.parametrize(
    ("findings", "stood", "lag", "void"),
    [
        ([], 9.0, 900.0, False),
        (["lateness: …"], 0.1, 5.0, False),
        (["lateness: …"], 1.5, 5.0, True),
        (["lateness: …"], 0.1, 200.0, True),
        # What is lost is lost, also on a slow machine; unless it stood still as a SIGSTOP does.
        (["lateness: …", "endings: lost: …"], 1.5, 200.0, False),
        (["endings: lost: …"], 9.0, 5.0, True),
    ],
)
def test_findings_of_a_slow_machine_are_void(
    findings: list[str], stood: float, lag: float, void: bool
) -> None:
    lags = {"lag in calm phases, ms (p50, p99, most)": [lag, lag, lag]}
    result = RESULT | lags | {"findings": findings, "the machine stood still, s": stood}
    assert is_void(result) is void
