"""The account is itself audited: each planted defect turns it red, by the rule that is there for
it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from ..support.planted import ROOT, planted
from .drawn import draw

DEFECTS = planted("chaos")
PLAIN = ("--lease", "6", "--slots", "20", "--fleet", "off", "--session-limit", "off")
SEEDS_MOST = 3
"""Runs in which a defect may be found."""
FEW = ("--slots", "4")
"""What operators and agents do takes no load."""
FOUND_BY: dict[str, tuple[str, float, str, *tuple[str, ...]]] = {
    "agent_sees_others": ("bells", 0.4, "recorded", *FEW),
    "bulk_rolled_back": ("bells", 0.4, "recorded", *FEW),
    "cancel_not_recorded": ("bells", 0.4, "recorded", *FEW),
    "console_acts_twice": ("bells", 0.4, "recorded", *FEW),
    "paused_queue_claimed": ("bells", 1, "queues paused", *FEW),
    "tool_says_only": ("bells", 0.6, "recorded", *FEW),
    "cancel_not_aborted": ("locks", 1, "hung up"),
    "cancel_overwritten": ("bells", 0.2, "endings|after the end"),
    # One queue, of which all count the same leases; a person who cancels frees the cap.
    "fleet_counts_ended_leases": (
        *("kill", 1, "recovery"),
        *("--seed", "12", "--alone", "--fleet", "1", "--lease", "3"),
    ),
    "interval_from_the_claim": ("bells", 0.2, "intervals"),
    "look_again_at_once": ("bells", 0.2, "spins", "--slots", "2"),
    "message_changed_under_one_key": ("api down", 0.4, "one body"),
    # A seed that stops those who look first: the third replica of a fleet has few runs in hand.
    "no_fence": ("stop long", 1.4, "settled twice|at once|numbers|one body", "--seed", "12"),
    "no_look_after_reconnect": ("lone ring", 2, "heard"),
    "repeated_calls_not_counted": ("api down", 0.3, "counts"),
    "second_key_on_unknown": ("bells", 0.1, "second keys"),
    "settled_before_the_answer": ("bells", 0.1, "endings"),
    "taken_before_living_owners": ("postgres kill long", 0.6, "replays"),
}
"""For each: the faults that bring it out, for how many minutes, the rules that find it, and what
makes it likelier. What nobody heard is found by the next poll every other time, within the three
seconds that it is given: it takes a few."""


def test_every_defect_is_for_a_rule() -> None:
    assert {defect.stem for defect in DEFECTS} == set(FOUND_BY) and len(FOUND_BY) >= 18


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("defect", DEFECTS, ids=[defect.stem for defect in DEFECTS])
def test_a_planted_defect_is_found(defect: Path, tmp_path: Path) -> None:
    """Without it the same rules find nothing: the audit that CI runs. Whether a fault meets what
    the defect spoils is chance; where none did, another seed of the kind is drawn."""
    only, minutes, rules, *more = FOUND_BY[defect.stem]
    first = int(more[more.index("--seed") + 1]) if "--seed" in more else 11
    result = tmp_path / "result.json"
    for seed in _alike(first):
        words = ["--minutes", str(minutes), "--only", only, *PLAIN, *more, "--seed", str(seed)]
        words += ["--patch", str(defect), "--json", str(result)]
        code, said = _audit(words)
        if code != 0:
            break
    assert code == 1 and result.exists(), said[-3000:]
    (told,) = json.loads(result.read_text(encoding="utf-8"))
    assert any(found.split(":")[0] in rules.split("|") for found in told["findings"]), told[
        "findings"
    ]


def _alike(first: int) -> list[int]:
    """A seed, and the next ones that draw as many queues and pending recalls, and the same
    PostgreSQL."""
    drawn = {seed: draw(seed) for seed in range(first, first + 100)}
    kinds = {seed: (d.queues, d.pending_most, d.postgres) for seed, d in drawn.items()}
    return [seed for seed in drawn if kinds[seed] == kinds[first]][:SEEDS_MOST]


def _audit(words: list[str]) -> tuple[int, str]:
    """An audit's exit status, and what it said."""
    audit = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = audit.communicate()
    finally:
        # An audit that is ended from outside, by the test's deadline, ends no daemon; one that
        # spins would take the machine from all other tests.
        with suppress(ProcessLookupError):
            os.killpg(audit.pid, signal.SIGKILL)
    return audit.returncode, said
