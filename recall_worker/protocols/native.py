"""The native protocol: DESIGN's run endpoint, spoken by APIs that were written for it (and by `recall-worker reference-api`).

What its server can do: check and start atomically (409), name a missing session (404 with a code), honour `Idempotency-Key`, answer when the
run has ended or accept it and be polled (202 with `Location`, or a `run_id` with a status that is not final), end an accepted run (DELETE on the
same address). Nothing needs looking up before a second post, as that carries the same key.

An accepted run is polled at its Location, or at `<run url>/<run_id>`; only on RECALL_RUN_URL's own origin, or the token would leak.

Sources of rules that are not ours: Retry-After, RFC 9110 10.2.3; traceparent, W3C Trace Context level 1; webhook-* headers and whsec_
secrets, Standard Webhooks 1.0.
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
    Accepted,
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
from .polling import StillOn, follow
from .wire import Answer, NoAnswer, Wire

FAILED_WORDS = frozenset({"failed", "error", "cancelled", "canceled", "timeout", "expired"})
FINAL_WORDS = FAILED_WORDS | {"succeeded", "completed", "success"}
ABORT_DEADLINE = 5.0
UNAVAILABLE = frozenset({408, 425, 429, 503})
MISCONFIGURED = frozenset({401, 403, 404, 405, 407})
RETRY_AFTER_MOST = 86_400.0
_PLAIN = re.compile(r"[!-~]+")
_PRINTABLE = re.compile(r"[!-~]{1,2000}")


class Native:
    """Calls RECALL_RUN_URL and reads the answer by DESIGN's table."""

    def __init__(self, settings: Settings) -> None:
        assert settings.run_url is not None
        self._url = settings.run_url
        self._timeout = settings.run_timeout
        self._secret = settings.signing_secret
        self._wire = Wire(settings)
        self._always = {"Content-Type": "application/json"}
        if settings.run_token is not None:
            self._always["Authorization"] = f"Bearer {settings.run_token}"

    async def call(self, call: Call) -> Outcome:
        url = address(self._url, call.claim.session_id)
        answer = await post(self._wire, url, call, pieces(call.whole()), self._always, self._secret, self._timeout)
        return accepted(answer, url) or read(answer) if isinstance(answer, Answer) else answer

    async def follow(self, claim: Claim, reference: str, within: float) -> Outcome:
        url = self._polled_at(claim, reference)
        if url is None:
            return Unknown("the reference of the accepted run leads to another origin than RECALL_RUN_URL")
        # One set of headers for all polls; the token is in it.
        headers = self._always | {"Idempotency-Key": header_key(claim.key)}

        async def ask() -> Outcome | StillOn:
            answer = await self._wire.ask("GET", url, headers)
            return StillOn(trouble=answer.reason) if isinstance(answer, NoAnswer) else polled(answer)

        return await follow(ask, within)

    async def abort(self, claim: Claim, reference: str) -> None:
        url = self._polled_at(claim, reference)
        if url is not None:
            await self._wire.ask("DELETE", url, self._always | {"Idempotency-Key": header_key(claim.key)}, ABORT_DEADLINE)

    async def find(self, claim: Claim) -> Outcome | None:
        return None

    def _polled_at(self, claim: Claim, reference: str) -> str | None:
        """A stored reference as an address, if it is one of the endpoint's own origin: what a row holds is hostile."""
        return same_origin(address(self._url, claim.session_id), reference)

    async def close(self) -> None:
        await self._wire.close()


async def post(
    wire: Wire,
    url: str,
    call: Call,
    content: list[bytes | memoryview],
    always: Mapping[str, str],
    secret: str | None,
    timeout: float,
) -> Answer | Unavailable | Unknown:
    """Make a call: POST `content` (in pieces; the list is emptied) once, with the headers of the contract besides `always`.

    Returns its answer, or what the lack of one means.
    """
    claim, key = call.claim, header_key(call.claim.key)

    def headers() -> dict[str, str]:
        # An occurrence that an operator fired before its time is not late.
        lateness = max(0.0, claim.lateness + time.monotonic() - call.asked_at)
        made = dict(always) | {
            "Idempotency-Key": key,
            "Recall-Attempt": str(claim.attempt),
            "Recall-Lateness": f"{lateness:.6f}",
            "traceparent": call.traceparent,
        }
        if secret is not None:
            timestamp = int(time.time())
            made["webhook-id"], made["webhook-timestamp"] = key, str(timestamp)
            # While a secret is being changed there are two, and a signature by each.
            signed = (signature(one, key, timestamp, *content) for one in secret.split())
            made["webhook-signature"] = " ".join(signed)
        return made

    answer = await wire.post(url, headers, content, timeout, call.sent, before_sent=call.before_sent, on_written=call.written)
    if isinstance(answer, NoAnswer):
        return Unknown(answer.reason) if answer.sent else Unavailable(answer.reason)
    return answer


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
    return b"".join(pieces(claim))


def pieces(claim: Claim) -> list[bytes | memoryview]:
    """The body, in pieces where its message is long: as that stands in it twice, it would be held twice.

    Put together by hand, as it is made for every call and its shape is fixed: a tenth of the worker's time went into it.
    """
    nominal = claim.scheduled_for.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    assert claim.message is not None
    message = _text(claim.message)
    begin, between = f'{{"session_id":{_text(claim.session_id)},"user_message":', ',"system_message":"[Scheduled recall] '
    end = (
        f',"recall":{{"id":{_text(claim.id)},"call_type":{_text(claim.call_type)},"occurrence":{claim.occurrence},'
        f'"scheduled_for":"{nominal}","missed":{claim.missed}}}}}'
    )
    if len(message) <= LONG:
        return [f"{begin}{message}{between}{message[1:]}{end}".encode("ascii")]
    held = message.encode("ascii")
    return [begin.encode("ascii"), held, between.encode("ascii"), memoryview(held)[1:], end.encode("ascii")]


LONG = 1 << 16
"""Octets of a message, as JSON, from which on a body is made in pieces."""
_text = json.JSONEncoder().encode


def nameable(name: str) -> bool:
    """Whether a name that a server gave can be part of an address or a body: JSON may hold halves of surrogate pairs, UTF-8 may not."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def same_origin(base: str, location: str) -> str | None:
    """`location`, resolved against `base` (RFC 9110 10.2.2), if it stays on the same scheme, host and port."""
    try:
        url = urljoin(base, location)
        here, there = urlsplit(base), urlsplit(url)
        ports = [p.port or {"http": 80, "https": 443}.get(p.scheme) for p in (here, there)]
    except ValueError:
        return None
    stays = (here.scheme, here.hostname, ports[0]) == (there.scheme, there.hostname, ports[1])
    return url.partition("#")[0] if stays and there.username is None and _PRINTABLE.fullmatch(url) else None


def accepted(answer: Answer, url: str) -> Outcome | None:
    """Accepted, where that is what the answer says; Unknown where the run was accepted but can't be followed; else None."""
    if not 200 <= answer.status < 300:
        return None
    document = _json(answer.body) if answer.body and not answer.truncated else None
    said = document if isinstance(document, dict) else {}
    word = said.get("status")
    ended = isinstance(word, str) and word.lower() in FINAL_WORDS
    if ended:
        return None
    location = answer.headers.get("Location")
    if answer.status == 202 and location is not None:
        where = same_origin(url, location)
        if where is None:
            return Unknown(f"the run was accepted, but is to be polled elsewhere: {location[:200]} (HTTP 202)", 202)
        return Accepted(where, answer.status)
    run_id = said.get("run_id")
    if isinstance(run_id, str) and run_id and isinstance(word, str):
        # `quote` leaves dots alone, and a dot segment would lead out of the run's place.
        name = quote(run_id, safe="", errors="replace") if run_id not in (".", "..") else run_id.replace(".", "%2E")
        path, _, query = url.partition("?")
        where = f"{path}/{name}" + (f"?{query}" if query else "")
        # A text that is none (half a surrogate pair), or without end: nothing of it is stored.
        if not nameable(run_id) or not _PRINTABLE.fullmatch(where):
            return Unknown(f"the run was accepted under a name that no address can hold (HTTP {answer.status})", answer.status)
        return Accepted(where, answer.status)
    return None


def polled(answer: Answer) -> Outcome | StillOn:
    """What a poll's answer says of an accepted run."""
    later = retry_after(answer.headers)
    if answer.status in (404, 410):
        return Unknown(f"the API no longer knows the run that it accepted (HTTP {answer.status})", answer.status)
    if answer.status == 202 or not 200 <= answer.status < 300:
        return StillOn(later, None if answer.status == 202 else f"HTTP {answer.status}")
    document = _json(answer.body) if answer.body else {}
    word = document.get("status") if isinstance(document, dict) else None
    if isinstance(word, str) and word.lower() not in FINAL_WORDS:
        return StillOn(later)
    outcome = _success(answer)
    return outcome if isinstance(outcome, Answered | Failed) else StillOn(later, "an answer that is no JSON")


def signature(secret: str, key: str, timestamp: int, *content: bytes | memoryview) -> str:
    """A Standard Webhooks signature: `v1,` and the base64 of an HMAC-SHA256 over `id.timestamp.body`."""
    raw = base64.b64decode(secret.removeprefix("whsec_")) if secret.startswith("whsec_") else secret.encode()
    signed = hmac.new(raw, f"{key}.{timestamp}.".encode(), hashlib.sha256)
    for piece in content:
        signed.update(piece)
    return "v1," + base64.b64encode(signed.digest()).decode()


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
_READER = json.JSONDecoder(parse_int=str)


def _json(text: bytes) -> Any:
    try:
        return _READER.decode(text.decode(json.detect_encoding(text), "surrogatepass"))
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
