"""A look at what is due, as the worker takes it: a claim, and what comes after it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from recall_worker.ledger import Ledger
from recall_worker.recall import Claim


@dataclass(frozen=True)
class Look:
    claims: list[Claim]
    waiting: bool
    next_in: float | None
    moved: bool
    stranded: list[tuple[str, str]]


async def look(ledger: Ledger, slots: int = 3, *, take_expired: bool = True, in_hand: Collection[str] = ()) -> Look:
    """Claim what is due, and see what that left behind; once more where something fell due meanwhile."""
    claims: list[Claim] = []
    stranded: list[tuple[str, str]] = []
    for once_more in (True, False):
        claimed = await ledger.claim(slots - len(claims), take_expired=take_expired, in_hand=in_hand)
        claims += claimed.claims
        stranded += claimed.stranded
        if claimed.refused:
            return Look(claims, True, None, False, stranded)
        ahead = await ledger.ahead(
            take_expired=take_expired, in_hand=in_hand, claimed_at=claimed.asked_at, took_expired=take_expired
        )
        if not (ahead.fresh and once_more) or len(claims) == slots:
            break
    return Look(claims, ahead.waiting, ahead.next_in, ahead.moved, stranded)
