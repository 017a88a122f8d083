"""The only HTTP: how agent servers are called. One module a protocol, behind one small interface.

A protocol turns a claim into one request and its answer into an `Outcome`. It never raises (but for cancellation, by which a call is
aborted), never decides what an outcome means for the row, and never touches the database.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol as Interface

from ..recall import Claim, Outcome
from ..settings import Settings


@dataclass(slots=True)
class Call:
    """One request to the endpoint, being made. The protocol writes `sent_at`; the worker reads it, also after aborting."""

    claim: Claim
    asked_at: float
    """Monotonic instant at which the claim was asked for: what passes from there adds to the claim's lag and lateness."""
    sent_at: float | None = None
    """Monotonic instant from which on bytes of the request may have reached the server; None: nothing was sent."""


class Protocol(Interface):
    """How one kind of agent server is spoken to."""

    async def call(self, call: Call) -> Outcome:
        """Make the request and wait for its end, at most RECALL_RUN_TIMEOUT seconds."""
        ...

    async def close(self) -> None:
        """Close what is open. Calls that are still open are broken off."""
        ...


def create(settings: Settings) -> Protocol:
    """The protocol that RECALL_PROTOCOL names, ready to call. Needs a running event loop."""
    from .native import Native

    return Native(settings)
