"""What all protocols share of the run endpoint's contract: how a call is made.

Owns the headers and the key in them, the signature, and the address template. Protocols differ in
bodies and addresses. `contract/probes.py` makes its calls with this module, too.

Sources of rules that are not ours: traceparent, W3C Trace Context level 1; webhook-* headers and
whsec_ secrets, Standard Webhooks 1.0; how a reference is resolved, RFC 9110 10.2.2.

Never here: what an answer means (outcomes), the token and other secret headers (credentials), and
how an accepted run is recognised and followed (native, langgraph, agno, responses, polling).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from ..recall import Claim, Misconfigured, Unavailable, Unknown
from . import Call
from .credentials import Bearer, Credentials, bearer
from .http import Answer, HttpClient, NoAnswer

KEPT_MOST = 1 << 16
"""Octets of a body that is kept until it is answered."""
ABORT_DEADLINE = 5.0
"""Seconds that a server has to end a run."""
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
    credentials: Credentials,
    timeout: float,
    carries: Bearer = bearer,
) -> Answer | Misconfigured | Unavailable | Unknown:
    """Make a call: POST `content` (in pieces; the list is emptied) once, with the headers of the
    contract besides `always` and the credentials (`carries`: the token, as the server wants it).

    A call that is refused for its token (401), which has been replaced meanwhile, is made once
    more: nothing has run. Returns its answer, or the outcome if there is none.
    """
    # Of a long message no copy is held while the run goes on: it is called again later.
    kept = list(content) if sum(map(len, content)) <= KEPT_MOST else None
    answer = await _post(http, url, call, content, always, credentials, timeout, carries)
    if isinstance(answer, Answer) and answer.status == 401 and credentials.changed() and kept:
        return await _post(http, url, call, kept, always, credentials, timeout, carries)
    return answer


async def ask(
    http: HttpClient,
    method: str,
    url: str,
    credentials: Credentials,
    timeout: float,
    carries: Bearer = bearer,
) -> Answer | NoAnswer:
    """A request about a run, which may be repeated: a query, a poll, or the wish that a run ends.
    Made once more where it is refused for its token (401), which has been replaced meanwhile."""
    answer = await http.ask(method, url, credentials.headers(carries), timeout)
    if isinstance(answer, Answer) and answer.status == 401 and credentials.changed():
        return await http.ask(method, url, credentials.headers(carries), timeout)
    return answer


async def _post(
    http: HttpClient,
    url: str,
    call: Call,
    content: list[bytes | memoryview],
    always: Mapping[str, str],
    credentials: Credentials,
    timeout: float,
    carries: Bearer,
) -> Answer | Misconfigured | Unavailable | Unknown:
    claim = call.claim

    def made() -> dict[str, str]:
        # An occurrence that an operator fired early is not late.
        lateness = max(0.0, claim.lateness + time.monotonic() - call.asked_at)
        return headers(
            claim.key,
            claim.attempt,
            lateness,
            call.traceparent,
            content,
            credentials.headers(carries) | dict(always),
            credentials.signing_secret,
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
        if answer.is_misconfigured:
            return Misconfigured(answer.reason)
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
        ports = [p.port or _PORTS.get(p.scheme) for p in (here, there)]
    except ValueError:
        return None
    stays = (here.scheme, here.hostname, ports[0]) == (there.scheme, there.hostname, ports[1])
    return (
        url.partition("#")[0]
        if stays and there.username is None and PRINTABLE.fullmatch(url)
        else None
    )


_PORTS = {"http": 80, "https": 443}
_SENDABLE = "".join(map(chr, range(33, 127)))


def own_origin(base: str, location: str) -> tuple[str, bool] | None:
    """`location` at the origin of `base`, and whether its scheme or port was another one: an API
    behind a gateway does not know how it is reached. None where it is on another host, or no
    address."""
    location = quote(location, safe=_SENDABLE)
    where = same_origin(base, location)
    if where is not None:
        return where, False
    try:
        here, there = urlsplit(base), urlsplit(urljoin(base, location))
        hosts = [(part.hostname or "").rstrip(".") for part in (here, there)]
        if there.scheme not in _PORTS or hosts[0] != hosts[1]:
            return None
    except ValueError:
        return None
    where = same_origin(base, urlunsplit((here.scheme, here.netloc, there.path, there.query, "")))
    return None if where is None or there.username is not None else (where, True)


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
