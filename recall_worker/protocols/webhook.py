"""Tells RECALL_FAILURE_URL something: a POST of JSON with the headers of Standard Webhooks 1.0.

The receiver is the operator's, and need not be the agent's API. So the bearer token of the run
endpoint is sent only where both have the same scheme, host and port. `webhook-id` and the body are
the same at every try of one message, `webhook-timestamp` is the try's, as the standard has it. With
RECALL_SIGNING_SECRET it is signed, as calls are. RECALL_CA_FILE holds here, too.

A connection pool of its own: a receiver that hangs takes no connection from calls.

Never here: what is told, and when it is tried again (worker.failures).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..settings import Settings
from .contract import same_origin, signature
from .credentials import bearer
from .http import HttpClient, NoAnswer
from .outcomes import retry_after

DEADLINE = 15.0
"""Seconds, at most, from the connection to the end of the answer: what the standard recommends."""

Secret = Callable[[], str | None]
"""Returns a secret as it stands now, as its file may have changed."""


@dataclass(frozen=True, slots=True)
class Delivered:
    http_status: int


@dataclass(frozen=True, slots=True)
class Undelivered:
    reason: str
    http_status: int | None = None
    retry_after: float | None = None
    """Seconds, where the receiver says so."""
    gone: bool = False
    """Whether the receiver wants no more of them (410)."""


class Webhook:
    """Needs a running event loop."""

    def __init__(
        self, settings: Settings, token: Secret, signing_secret: Secret, deadline: float = DEADLINE
    ) -> None:
        """Raises SettingsError as HttpClient does."""
        assert settings.failure_url is not None
        self._url = settings.failure_url
        self._http = HttpClient(settings.of_the_failure_url())
        run_url = (settings.run_url or "").replace("{session_id}", "s")
        self._token = token if same_origin(self._url, run_url) is not None else lambda: None
        self._signing_secret = signing_secret
        self._deadline = deadline

    async def send(self, id: str, body: bytes) -> Delivered | Undelivered:
        """POST once. Never raises, except for cancellation. `id`: webhook-id."""
        token = self._token()
        timestamp = int(time.time())
        headers = (bearer(token) if token else {}) | {
            "webhook-id": id,
            "webhook-timestamp": str(timestamp),
        }
        if (secrets := self._signing_secret()) is not None:
            # While a secret is being replaced there are two, and a signature by each.
            headers["webhook-signature"] = " ".join(
                signature(secret, id, timestamp, body) for secret in secrets.split()
            )
        heads: list[int] = []
        answer = await self._http.post(
            self._url,
            lambda: headers,
            body,
            self._deadline,
            lambda: None,
            on_head=lambda status, _: heads.append(status),
        )
        if isinstance(answer, NoAnswer) and heads and 200 <= heads[-1] < 300:
            return Delivered(heads[-1])  # The head says it all, wherever the body ends.
        if isinstance(answer, NoAnswer):
            return Undelivered(answer.reason.replace(token or "\0", "…"))
        status = answer.status
        if 200 <= status < 300:
            return Delivered(status)
        return Undelivered(
            _REASONS.get(status, f"HTTP {status}")
            if not 300 <= status < 400
            else f"a redirect, which is not followed (HTTP {status})",
            status,
            retry_after(answer.headers),
            gone=status == 410,
        )

    async def close(self) -> None:
        await self._http.close()


_REASONS = {
    401: "the receiver refuses the signature, or wants a token (HTTP 401)",
    403: "the receiver refuses the signature, or wants a token (HTTP 403)",
    404: "nothing is at this address (HTTP 404)",
    405: "what is at this address takes no POST (HTTP 405)",
    410: "the receiver wants no more of them (HTTP 410)",
}
