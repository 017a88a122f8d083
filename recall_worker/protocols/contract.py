"""What all protocols share of the run endpoint's contract: how a call is made, and how an answer is
read.

Owns the headers and the key in them, the signature, the address template, the token, the table of
statuses (which outcome an answer is), Retry-After, and the reasons that an API gives. Protocols
differ in bodies and addresses. `contract/probes.py` makes its calls with this module, too.

Sources of rules that are not ours: Retry-After, RFC 9110 10.2.3; traceparent, W3C Trace Context
level 1; webhook-* headers and whsec_ secrets, Standard Webhooks 1.0.

Never here: how an accepted run is recognised and followed (native, langgraph, agno, polling).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

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
from . import Call
from .http import Answer, HttpClient, NoAnswer

FAILED_WORDS = frozenset({"failed", "error", "cancelled", "canceled", "timeout", "expired"})
FINAL_WORDS = FAILED_WORDS | {"succeeded", "completed", "success"}
ABORT_DEADLINE = 5.0
"""Seconds that a server has to end a run."""
UNAVAILABLE = frozenset({408, 425, 429, 503})
MISCONFIGURED = frozenset({401, 403, 404, 405, 407})
RETRY_AFTER_MOST = 86_400.0
PROMPT = "[Scheduled recall] "
"""The prefix of the message that the agent reads."""
_PLAIN = re.compile(r"[!-~]+")
PRINTABLE = re.compile(r"[!-~]{1,2000}")
"""The characters of an address that may be stored."""


# --- a call ---------------------------------------------------------------------------------------


async def post(
    http: HttpClient,
    url: str,
    call: Call,
    content: list[bytes | memoryview],
    always: Mapping[str, str],
    secret: str | None,
    timeout: float,
) -> Answer | Unavailable | Unknown:
    """Make a call: POST `content` (in pieces; the list is emptied) once, with the headers of the
    contract besides `always`.

    Returns its answer, or the outcome if there is none.
    """
    claim = call.claim

    def made() -> dict[str, str]:
        # An occurrence that an operator fired early is not late.
        lateness = max(0.0, claim.lateness + time.monotonic() - call.asked_at)
        return headers(
            claim.key, claim.attempt, lateness, call.traceparent, content, always, secret
        )

    answer = await http.post(
        url,
        made,
        content,
        timeout,
        call.sent,
        before_sent=call.before_sent,
        on_written=call.written,
    )
    if isinstance(answer, NoAnswer):
        return Unknown(answer.reason) if answer.sent else Unavailable(answer.reason)
    return answer


def headers(
    key: str,
    attempt: int,
    lateness: float,
    traceparent: str,
    content: list[bytes | memoryview],
    always: Mapping[str, str],
    secret: str | None,
) -> dict[str, str]:
    """The headers of one call, made when it is sent: those of the contract besides `always`.

    `lateness`: seconds. `secret`: RECALL_SIGNING_SECRET, by which `content` (in pieces) is signed.
    """
    name = header_key(key)
    made = dict(always) | {
        "Idempotency-Key": name,
        "Recall-Attempt": str(attempt),
        "Recall-Lateness": f"{lateness:.6f}",
        "traceparent": traceparent,
    }
    if secret is not None:
        timestamp = int(time.time())
        made["webhook-id"], made["webhook-timestamp"] = name, str(timestamp)
        # While a secret is being replaced there are two, and a signature by each.
        signed = (signature(one, name, timestamp, *content) for one in secret.split())
        made["webhook-signature"] = " ".join(signed)
    return made


def header_key(key: str) -> str:
    """The idempotency key for a header: percent-encoded if it isn't plain ASCII."""
    if _PLAIN.fullmatch(key) and "%" not in key:
        return key
    return quote(key, safe="!#$&'()*+,/:;=?@[]^_`{|}~")


def signature(secret: str, key: str, timestamp: int, *content: bytes | memoryview) -> str:
    """A Standard Webhooks signature: `v1,` and the base64 of an HMAC-SHA256 over
    `id.timestamp.body`. `content`: the body's pieces.
    """
    raw = (
        base64.b64decode(secret.removeprefix("whsec_"))
        if secret.startswith("whsec_")
        else secret.encode()
    )
    signed = hmac.new(raw, f"{key}.{timestamp}.".encode(), hashlib.sha256)
    for piece in content:
        signed.update(piece)
    return "v1," + base64.b64encode(signed.digest()).decode()


def bearer(token: str | None) -> dict[str, str]:
    """The header that carries RECALL_RUN_TOKEN, if it is set."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def address(template: str, session_id: str) -> str:
    """The endpoint's address for one session. The id is untrusted: it is encoded so that it stays
    one part of the address.
    """
    return template.replace("{session_id}", quote(session_id, safe=""))


def segment(name: str) -> str:
    """A name encoded as exactly one segment of an address."""
    # `quote` does not encode dots, and a dot segment would lead to another path.
    return quote(name, safe="") if name not in (".", "..") else name.replace(".", "%2E")


def same_origin(base: str, location: str) -> str | None:
    """`location`, resolved against `base` (RFC 9110 10.2.2), if it stays on the same scheme, host
    and port.
    """
    try:
        url = urljoin(base, location)
        here, there = urlsplit(base), urlsplit(url)
        ports = [p.port or {"http": 80, "https": 443}.get(p.scheme) for p in (here, there)]
    except ValueError:
        return None
    stays = (here.scheme, here.hostname, ports[0]) == (there.scheme, there.hostname, ports[1])
    return (
        url.partition("#")[0]
        if stays and there.username is None and PRINTABLE.fullmatch(url)
        else None
    )


def nameable(name: str) -> bool:
    """Whether a name that a server gave can be part of an address or a body: JSON may hold halves
    of surrogate pairs, UTF-8 may not.
    """
    return not any("\ud800" <= c <= "\udfff" for c in name)


def nominal(when: datetime) -> str:
    """An occurrence's nominal time for a body: RFC 3339 in UTC, to the microsecond."""
    return when.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def metadata(claim: Claim) -> dict[str, str | int]:
    """The recall's fields of the contract's body, for servers that store them as a run's metadata;
    and the key, to find the run again if the server ignores Idempotency-Key.
    """
    return {
        "recall_key": claim.key,
        "recall_id": claim.id,
        "recall_call_type": claim.call_type,
        "recall_occurrence": claim.occurrence,
        "recall_scheduled_for": nominal(claim.scheduled_for),
        "recall_missed": claim.missed,
    }


# --- an answer ------------------------------------------------------------------------------------


def read(answer: Answer) -> Outcome:
    """The outcome of an answer, by DESIGN's table."""
    status = answer.status
    if 200 <= status < 300:
        return _success(answer)
    if status in (409, 423):
        return Busy(status, retry_after(answer.headers))
    if status in UNAVAILABLE:
        return Unavailable(
            f"the API says later (HTTP {status})", status, retry_after(answer.headers)
        )
    if status in (404, 410) and _names_the_session(answer.body):
        return Gone(status)
    if status in MISCONFIGURED:
        return Misconfigured(_WHY_MISCONFIGURED.get(status, f"HTTP {status}"), status)
    if 300 <= status < 400:
        to = answer.headers.get("Location", "nowhere")
        return Misconfigured(
            f"a redirect to {to[:200]}: set RECALL_RUN_URL to the final address (HTTP {status})",
            status,
        )
    if 400 <= status < 500:
        return Refused(f"the API refuses the request (HTTP {status}){_detail(answer.body)}", status)
    if 500 <= status < 600:
        return Unknown(f"the API broke (HTTP {status}){_detail(answer.body)}", status)
    return Unknown(f"an answer that HTTP does not know (status {status})", status)


_WHY_MISCONFIGURED = {
    401: "the API wants another token: see RECALL_RUN_TOKEN (HTTP 401)",
    403: "the API forbids this token the endpoint: see RECALL_RUN_TOKEN (HTTP 403)",
    404: (
        "nothing is at this address: see RECALL_RUN_URL (HTTP 404, and no code "
        "session_not_found in the answer)"
    ),
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
        return Misconfigured(
            f"something larger than 1 MiB that is no JSON (HTTP {answer.status})", answer.status
        )
    document = read_json(text)
    if document is NO_JSON:
        if said_json:
            return Unknown(
                f"an answer that calls itself JSON and is none (HTTP {answer.status})",
                answer.status,
            )
        return Misconfigured(
            f"no JSON but {_kind(answer)}: see RECALL_RUN_URL (HTTP {answer.status})", answer.status
        )
    word = document.get("status") if isinstance(document, dict) else None
    if isinstance(word, str) and word.lower() in FAILED_WORDS:
        return Failed(
            f"the API says that the run ended as {word.lower()}{_detail(text)}", answer.status
        )
    return Answered(answer.status)


def _kind(answer: Answer) -> str:
    return answer.headers.get("Content-Type", "").split(";")[0].strip()[:60] or "something else"


def json_of(answer: Answer) -> Any:
    """The JSON in an answer; None if it is not JSON, or not whole."""
    try:
        return None if answer.truncated else json.loads(answer.body)
    except (ValueError, RecursionError):
        return None


NO_JSON = object()
_READER = json.JSONDecoder(parse_int=str)


def read_json(text: bytes) -> Any:
    """The JSON in a text, with whole numbers as texts, as they may be of any length; NO_JSON if it
    is not JSON.
    """
    try:
        return _READER.decode(text.decode(json.detect_encoding(text), "surrogatepass"))
    except (ValueError, RecursionError):
        return NO_JSON


def _names_the_session(text: bytes) -> bool:
    document = read_json(text)
    if not isinstance(document, dict):
        return False
    detail = document.get("detail")
    words = [
        document.get("code"),
        document.get("type"),
        detail.get("code") if isinstance(detail, dict) else None,
    ]
    return "session_not_found" in [w for w in words if isinstance(w, str)]


def _detail(text: bytes) -> str:
    """The API's own reason, at most a line, if it is in one of the usual fields."""
    document = read_json(text)
    if isinstance(document, dict):
        for name in ("error", "message", "detail", "title"):
            reason = document.get(name)
            if isinstance(reason, dict):
                reason = reason.get("message") or reason.get("detail")
            if isinstance(reason, str) and reason.strip():
                return ": " + " ".join(reason.split())[:200]
    return ""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from a Retry-After header (a number or a date), at most a day; None without a valid
    one.
    """
    raw = headers.get("Retry-After", "").strip()
    if raw.isascii() and raw.isdigit():
        return min(float(raw[:12]), RETRY_AFTER_MOST)
    try:
        then = parsedate_to_datetime(raw)
        # By the server's own clock if it sends one, as the host's may be wrong.
        since = parsedate_to_datetime(headers["Date"]) if "Date" in headers else datetime.now(UTC)
        return min(max(0.0, (then - since).total_seconds()), RETRY_AFTER_MOST)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
