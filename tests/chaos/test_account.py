"""A rule of the account accuses a worker, and nobody of what the audit did itself."""

from __future__ import annotations

import pytest

from .account import Records, paused
from .api import Api, Call
from .drawn import draw
from .journal import NEVER, Act, Journal, Promise

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("acts", "resumed", "accused"),
    [
        ([Act("pause", 0, 0.1)], NEVER, True),
        ([Act("pause", 0, 0.1)], 40, True),
        # Nobody could resume it, as a fault was on; at the end the audit did.
        ([Act("pause", 0, 0.1)], 20, False),
        ([Act("pause", 0, 0.1), Act("resume", 20, 20.1)], 40, False),
        ([Act("pause", 0, 0.1), Act("resume", 35, 35.1)], 40, True),
        # Whether the pause was done is not known.
        ([Act("pause", 0, None)], NEVER, False),
    ],
)
def test_a_paused_recall_is_called_by_nobody(
    acts: list[Act], resumed: float, accused: bool
) -> None:
    """A call thirty seconds after the pause."""
    api = Api(1)
    api.calls.append(Call(NOW + 30, "a", "r:1", "s", b"", 1))
    journal = Journal(resumed=NOW + resumed)
    journal.promises["r"] = Promise("r", "s", "once", NOW)
    for act in acts:
        done = None if act.done is None else NOW + act.done
        journal.promises["r"].acts.append(Act(act.what, NOW + act.asked, done))
    records = Records(api, journal, {}, [], [], [], draw(11))
    assert bool(list(paused(records))) is accused
