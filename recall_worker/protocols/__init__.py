"""The only HTTP: how agent servers are called. One module for each protocol, behind one small
interface of four verbs.

A protocol turns a claim into requests, and answers into an `Outcome`. It never raises (except for
cancellation, which aborts a call), never decides what an outcome means for the row, and never
touches the database.

`http` owns which connection a request gets, `connection` its bytes, `answer` what is read of them;
`server` is a small server for pages. `contract` owns how a call is made, `credentials` its secret
headers, `outcomes` what an answer means, `polling` how an accepted run is followed, `webhook` how a
failure is told to the operator. `native`, `langgraph`, `agno` and `responses` say in their
docstrings what their servers can and cannot do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol as Interface

from ..recall import Claim, Outcome
from ..settings import Settings
from .credentials import Credentials


def traceparent() -> str:
    """A new trace for a call (W3C Trace Context), by which the API's traces and logs are found."""
    ids = os.urandom(24).hex()
    return f"00-{ids[:32]}-{ids[32:]}-01"


@dataclass(slots=True)
class Call:
    """One request to the endpoint, being made. The protocol records when it is sent; the worker
    reads that, also after it aborted the call.
    """

    claim: Claim
    asked_at: float
    """Monotonic instant at which the claim was requested: the time since then adds to the claim's
    lag and lateness.
    """
    sent_at: float | None = None
    """Monotonic instant from which on the server may have received bytes of the request; None:
    nothing was sent.
    """
    traceparent: str = field(default_factory=traceparent)
    """The header of that name; also in the log, and in traces if they are switched on."""
    message: str | None = None
    """The message, if it is long and the claim came without it. Kept until the request is made."""
    before_sent: Callable[[], Awaitable[bool]] | None = None
    """Called when a connection is open, before the first byte is sent. False: send nothing."""
    on_sent: Callable[[], None] | None = None
    on_written: Callable[[], None] | None = None

    def sent(self) -> None:
        """The first byte is about to leave."""
        self.sent_at = time.monotonic()
        if self.on_sent is not None:
            self.on_sent()

    def written(self) -> None:
        """The last byte has been handed to the kernel."""
        if self.on_written is not None:
            self.on_written()

    def whole(self) -> Claim:
        """The claim with its message, to make the request of; a long message is released here."""
        message, self.message = self.message, None
        return self.claim if message is None else self.claim._replace(message=message)


class Protocol(Interface):
    """How one kind of agent server is called."""

    async def call(self, call: Call) -> Outcome:
        """Make the request and wait for its answer, at most RECALL_RUN_TIMEOUT seconds. Accepted:
        to be followed.
        """
        ...

    async def follow(
        self, claim: Claim, reference: str, within: float, first_in: float | None = None
    ) -> Outcome:
        """Poll an accepted run until it ends, at most `within` seconds. `first_in`: seconds until
        the first poll, as the API wants it (None: at once). Never Accepted."""
        ...

    async def abort(self, claim: Claim, reference: str) -> None:
        """Ask the server to end an accepted run, if it can. Best effort, a few seconds at most."""
        ...

    async def find(self, claim: Claim) -> Outcome | None:
        """Whether a call under this claim's key whose answer was lost has arrived at the server;
        called before it is posted again.

        None: it may be posted (the server honours keys, or does not have the run). Accepted: the
        server has it, to be followed. Any other outcome: that can't be found out now.
        """
        ...

    async def close(self) -> None:
        """Close all connections. Open calls are aborted."""
        ...


def create(settings: Settings, credentials: Credentials | None = None) -> Protocol:
    """The protocol that RECALL_PROTOCOL names, ready to call. Needs a running event loop."""
    match settings.protocol:
        case "native":
            from .native import Native

            return Native(settings, credentials)
        case "langgraph":
            from .langgraph import LangGraph

            return LangGraph(settings, credentials)
        case "agno":
            from .agno import Agno

            return Agno(settings, credentials)
        case "responses":
            from .responses import Responses

            return Responses(settings, credentials)
        case other:
            raise ValueError(other)
