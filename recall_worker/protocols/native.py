"""The native protocol: DESIGN's run endpoint, spoken by APIs that were written for it (and by `recall-worker reference-api`).

What its server can do: check and start atomically (409), name a missing session (404 with a code), honour `Idempotency-Key`.
What is missing so far: runs that are accepted and polled.

Sources of rules that are not ours: Retry-After, RFC 9110 10.2.3; traceparent, W3C Trace Context level 1; webhook-* headers and whsec_
secrets, Standard Webhooks 1.0.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

from ..recall import (
    Answered,
    Busy,
    Claim,
    Failed,
    Gone,
    Misconfigured,
    Outcome,
    Refused,
    Unavailable,
    Unknown,
)
from ..settings import Settings
from . import Call
from .wire import Answer, NoAnswer, Wire

FAILED_WORDS = frozenset({"failed", "error", "cancelled", "canceled", "timeout", "expired"})
UNAVAILABLE = frozenset({408, 425, 429, 503})
MISCONFIGURED = frozenset({401, 403, 404, 405, 407})
RETRY_AFTER_MOST = 86_400.0
_PLAIN = re.compile(r"[!-~]+")


class Native:
    """Calls RECALL_RUN_URL and reads the answer by DESIGN's table."""

    def __init__(self, settings: Settings) -> None:
        assert settings.run_url is not None
        self._url = settings.run_url
        self._timeout = settings.run_timeout
        self._secret = settings.signing_secret
        self._wire = Wire(settings.ca_file)
        self._always = {"Content-Type": "application/json"}
        if settings.run_token is not None:
            self._always["Authorization"] = f"Bearer {settings.run_token}"

    async def call(self, call: Call) -> Outcome:
        claim = call.claim
        sent_body, key = body(claim), header_key(claim.key)

        def headers() -> dict[str, str]:
            lateness = claim.lateness + time.monotonic() - call.asked_at
            made = self._always | {
                "Idempotency-Key": key,
                "Recall-Attempt": str(claim.attempt),
                "Recall-Lateness": f"{lateness:.6f}",
                "traceparent": f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01",
            }
            if self._secret is not None:
                timestamp = int(time.time())
                made["webhook-id"], made["webhook-timestamp"] = key, str(timestamp)
                made["webhook-signature"] = signature(self._secret, key, timestamp, sent_body)
            return made

        def sent() -> None:
            call.sent_at = time.monotonic()

        answer = await self._wire.post(address(self._url, claim.session_id), headers, sent_body, self._timeout, sent)
        if isinstance(answer, NoAnswer):
            return Unknown(answer.reason) if answer.sent else Unavailable(answer.reason)
        return read(answer)

    async def close(self) -> None:
        await self._wire.close()


def address(template: str, session_id: str) -> str:
    """The endpoint's address for one session, whose id is hostile: nothing in it can leave its place in the address."""
    return template.replace("{session_id}", quote(session_id, safe=""))


def header_key(key: str) -> str:
    """The idempotency key as a header takes it: percent-encoded where it isn't plain ASCII."""
    if _PLAIN.fullmatch(key) and "%" not in key:
        return key
    return quote(key, safe="!#$&'()*+,/:;=?@[]^_`{|}~")


def body(claim: Claim) -> bytes:
    """The request's body. Nothing in it changes between two calls under one key; `internal_comment` is not in it."""
    nominal = claim.scheduled_for.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    document = {
        "session_id": claim.session_id,
        "user_message": claim.message,
        "system_message": f"[Scheduled recall] {claim.message}",
        "recall": {
            "id": claim.id,
            "call_type": claim.call_type,
            "occurrence": claim.occurrence,
            "scheduled_for": nominal,
            "missed": claim.missed,
        },
    }
    return json.dumps(document, separators=(",", ":")).encode("ascii")


def signature(secret: str, key: str, timestamp: int, content: bytes) -> str:
    """A Standard Webhooks signature: `v1,` and the base64 of an HMAC-SHA256 over `id.timestamp.body`."""
    raw = base64.b64decode(secret.removeprefix("whsec_")) if secret.startswith("whsec_") else secret.encode()
    digest = hmac.new(raw, f"{key}.{timestamp}.".encode() + content, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def read(answer: Answer) -> Outcome:
    """What an answer means: the rows of DESIGN's table."""
    status = answer.status
    if 200 <= status < 300:
        return _success(answer)
    if status in (409, 423):
        return Busy(status, retry_after(answer.headers))
    if status in UNAVAILABLE:
        return Unavailable(f"the API says later (HTTP {status})", status, retry_after(answer.headers))
    if status in (404, 410) and _names_the_session(answer.body):
        return Gone(status)
    if status in MISCONFIGURED:
        return Misconfigured(_WHY_MISCONFIGURED.get(status, f"HTTP {status}"), status)
    if 300 <= status < 400:
        to = answer.headers.get("Location", "nowhere")
        return Misconfigured(f"a redirect to {to[:200]}: set RECALL_RUN_URL to the final address (HTTP {status})", status)
    if 400 <= status < 500:
        return Refused(f"the API refuses the request (HTTP {status}){_detail(answer.body)}", status)
    if 500 <= status < 600:
        return Unknown(f"the API broke (HTTP {status}){_detail(answer.body)}", status)
    return Unknown(f"an answer that HTTP does not know (status {status})", status)


_WHY_MISCONFIGURED = {
    401: "the API wants another token: see RECALL_RUN_TOKEN (HTTP 401)",
    403: "the API forbids this token the endpoint: see RECALL_RUN_TOKEN (HTTP 403)",
    404: "nothing is at this address: see RECALL_RUN_URL (HTTP 404, and no code session_not_found in the answer)",
    405: "what is at this address takes no POST: see RECALL_RUN_URL (HTTP 405)",
    407: "a proxy wants a login (HTTP 407)",
}


def _success(answer: Answer) -> Outcome:
    text = answer.body.strip()
    if not text:
        return Answered(answer.status)
    said_json = "json" in answer.headers.get("Content-Type", "").lower()
    if answer.truncated:
        if said_json or text[:1] in (b"{", b"["):
            return Answered(answer.status)
        return Misconfigured(f"something larger than 1 MiB that is no JSON (HTTP {answer.status})", answer.status)
    document = _json(text)
    if document is _NO_JSON:
        if said_json:
            return Unknown(f"an answer that calls itself JSON and is none (HTTP {answer.status})", answer.status)
        return Misconfigured(f"no JSON but {_kind(answer)}: see RECALL_RUN_URL (HTTP {answer.status})", answer.status)
    word = document.get("status") if isinstance(document, dict) else None
    if isinstance(word, str) and word.lower() in FAILED_WORDS:
        return Failed(f"the API says that the run ended as {word.lower()}{_detail(text)}", answer.status)
    return Answered(answer.status)


def _kind(answer: Answer) -> str:
    return answer.headers.get("Content-Type", "").split(";")[0].strip()[:60] or "something else"


_NO_JSON = object()


def _json(text: bytes) -> Any:
    try:
        return json.loads(text, parse_int=str)
    except (ValueError, RecursionError):
        return _NO_JSON


def _names_the_session(text: bytes) -> bool:
    document = _json(text)
    if not isinstance(document, dict):
        return False
    detail = document.get("detail")
    words = [document.get("code"), document.get("type"), detail.get("code") if isinstance(detail, dict) else None]
    return "session_not_found" in [w for w in words if isinstance(w, str)]


def _detail(text: bytes) -> str:
    """What the API says of the reason, where it says so in one of the usual places: at most a line."""
    document = _json(text)
    if isinstance(document, dict):
        for name in ("error", "message", "detail", "title"):
            said = document.get(name)
            if isinstance(said, dict):
                said = said.get("message") or said.get("detail")
            if isinstance(said, str) and said.strip():
                return ": " + " ".join(said.split())[:200]
    return ""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from a Retry-After header (a number or a date), at most a day; None where there is none that can be read."""
    raw = headers.get("Retry-After", "").strip()
    if raw.isascii() and raw.isdigit():
        return min(float(raw[:12]), RETRY_AFTER_MOST)
    try:
        then = parsedate_to_datetime(raw)
        # Against the server's own clock where it tells, as the host's may be wrong.
        since = parsedate_to_datetime(headers["Date"]) if "Date" in headers else datetime.now(UTC)
        return min(max(0.0, (then - since).total_seconds()), RETRY_AFTER_MOST)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
