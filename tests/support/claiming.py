"""Claim what is due in the order of statements that the worker uses."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from recall_worker.database.ledger import Ledger
from recall_worker.recall import Claim


@dataclass(frozen=True)
class DueClaims:
    claims: list[Claim]
    waiting: bool
    next_in: float | None
    moved: bool
    stranded: list[tuple[str, str]]


async def claim_due(
    ledger: Ledger, slots: int = 3, *, take_expired: bool = True, in_hand: Collection[str] = ()
) -> DueClaims:
    """Take over expired leases, claim what is due, and ask what is due next.

    Claims once more where something fell due in the meantime.
    """
    claims: list[Claim] = []
    stranded: list[tuple[str, str]] = []
    for once_more in (True, False):
        if take_expired:
            ended = await ledger.ended_leases(in_hand)
            if ids := [*ended.accepted, *ended.unanswered][: slots - len(claims)]:
                taken = await ledger.take_up(ids, in_hand)
                claims += taken.claims
                stranded += taken.stranded
        claimed = await ledger.claim(slots - len(claims))
        claims += claimed.claims
        stranded += claimed.stranded
        if claimed.refused:
            return DueClaims(claims, True, None, False, stranded)
        ahead = await ledger.next_due(claimed_at=claimed.asked_at)
        if not (ahead.fresh and once_more) or len(claims) == slots:
            break
    claims.sort(key=lambda claim: -claim.lag)
    return DueClaims(claims, ahead.waiting, ahead.next_in, ahead.moved, stranded)
