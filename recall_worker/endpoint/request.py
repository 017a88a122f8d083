"""A request to the run endpoint: read, and checked before anything is done about it.

Everything in it is hostile: the path, the headers, the body. What is wrong with it is a Refusal,
which is answered as it stands: a status, a code for machines, and a sentence.

Never here: keys and sessions as they are known (store), the agent.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import unquote

from ..protocols.contract import signature
from ..recall import CALL_TYPES

KEY_MOST = 1024
"""Characters of a key: a longer one does not fit an index of PostgreSQL's."""
SIGNED_WITHIN = 300.0
"""Seconds that the clock of a signature may differ from ours, as Standard Webhooks has it."""
TEXTS = ("session_id", "user_message", "system_message")

_KEY = re.compile(rf"[\x21-\x7e]{{1,{KEY_MOST}}}")


class Refusal(Exception):
    """An answer that is no run's."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A request, as HTTP has it."""

    method: str
    path: str
    """Percent-encoded where the server tells it so (`is_raw`)."""
    headers: Mapping[str, str]
    """By their names in lower case."""
    body: bytes = b""
    is_raw: bool = True
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the caller has closed the connection."""


@dataclass(frozen=True, slots=True, eq=False)
class RunRequest:
    """What the worker says of a run: for an agent that wants to know more than its message (a third
    parameter `recall`)."""

    key: str
    """The idempotency key: what the agent does under it, it should do once."""
    session_id: str
    user_message: str
    system_message: str
    recall: Mapping[str, Any]
    """`id`, `call_type`, `occurrence`, `scheduled_for`, `missed`, as they came."""
    attempt: int
    """The worker's attempt, counted from 1."""
    starts: int
    """How often the run was started under this key. More than 1: an earlier process died in
    mid-run, and nobody knows how far it came."""
    left: asyncio.Event
    """Set when the caller has closed the connection. The run goes on, unless the agent stops."""

    @property
    def recall_id(self) -> str:
        return str(self.recall["id"])

    @property
    def occurrence(self) -> int:
        return int(self.recall["occurrence"])

    @property
    def missed(self) -> int:
        """Due moments after `scheduled_for` that this run stands for, too."""
        return int(self.recall["missed"])

    @property
    def scheduled_for(self) -> datetime:
        return datetime.fromisoformat(self.recall["scheduled_for"])


def is_run(asked: Asked) -> bool:
    """Whether the path is that of a session's run: `…/{session_id}/run`."""
    return asked.path.rstrip("/").endswith("/run")


def run_named(asked: Asked) -> tuple[str, str] | None:
    """The session and the key of an accepted run's path, `…/{session_id}/run/{key}`; None where it
    is none."""
    before, slash, key = asked.path.rpartition("/run/")
    session_id = before.rpartition("/")[2]
    if not slash or not session_id or not key or ("/" in key and asked.is_raw):
        return None
    if not asked.is_raw:
        return session_id, key
    named = unquote(session_id, errors="replace"), unquote(key, errors="replace")
    return None if "\0" in named[0] + named[1] else named


def authorize(asked: Asked, tokens: Sequence[bytes]) -> None:
    """Raises Refusal where there are tokens and the request has none of them. Takes the same time
    for every wrong one."""
    if not tokens:
        return
    scheme, _, token = asked.headers.get("authorization", "").partition(" ")
    given = token.strip().encode("utf-8", "surrogateescape")
    # Each is compared, whether one was found or not.
    found = [hmac.compare_digest(given, one) for one in tokens]
    if scheme.lower() != "bearer" or not any(found):
        raise Refusal(
            401, "unauthorized", "another bearer token is required", WWW_Authenticate="Bearer"
        )


SESSION_MOST = 1024
"""Characters of a session's id, as of a key: PostgreSQL has no index entries of any length."""


def verify(asked: Asked, secrets: str | None) -> None:
    """Raises Refusal where there are signing secrets, and the request is not signed by one of
    them for its own key."""
    if secrets is None:
        return
    id, stamp = asked.headers.get("webhook-id", ""), asked.headers.get("webhook-timestamp", "")
    given = asked.headers.get("webhook-signature", "").split()[:20]
    in_time = re.fullmatch(r"[0-9]{1,12}", stamp) and (
        math.fabs(time.time() - int(stamp)) <= SIGNED_WITHIN
    )
    wanted = (
        [signature(secret, id, int(stamp), asked.body) for secret in secrets.split()]
        if (in_time)
        else []
    )
    # A text with other than ASCII characters can't be compared as text.
    found = [
        hmac.compare_digest(one.encode(), text.encode("utf-8", "surrogateescape"))
        for one in wanted
        for text in given
    ]
    if not any(found) or id != asked.headers.get("idempotency-key"):
        raise Refusal(
            401,
            "signature",
            "the request has no valid signature (webhook-id, webhook-timestamp, webhook-signature)",
        )


def read(asked: Asked) -> RunRequest:
    """The request's document, if it is valid. Raises Refusal."""
    try:
        document = json.loads(asked.body)
    except (ValueError, RecursionError):
        raise Refusal(400, "malformed", "the body is not JSON") from None
    key = asked.headers.get("idempotency-key", "")
    if not key:
        raise Refusal(400, "key_missing", "a run needs an Idempotency-Key")
    if not _KEY.fullmatch(key):
        raise Refusal(
            400,
            "key_invalid",
            f"an Idempotency-Key has 1 to {KEY_MOST} visible ASCII characters: percent-encode it",
        )
    fields = document if isinstance(document, dict) else {}
    if not is_recall(fields.get("recall")) or not all(is_text(fields.get(name)) for name in TEXTS):
        raise Refusal(
            422,
            "invalid",
            f"required: an object with {', '.join(TEXTS)} (texts) and recall, as in "
            "docs/openapi.yaml",
        )
    session_id = fields["session_id"]
    if session_id in ("", ".", "..") or "\0" in session_id or len(session_id) > SESSION_MOST:
        raise Refusal(422, "invalid", "this can't be a session's id")
    if not _is_of(asked, session_id):
        raise Refusal(422, "invalid", "the body names another session than the address")
    attempt = asked.headers.get("recall-attempt", "")
    return RunRequest(
        key,
        session_id,
        fields["user_message"],
        fields["system_message"],
        fields["recall"],
        int(attempt) if re.fullmatch(r"[0-9]{1,9}", attempt) else 1,
        1,
        asked.left,
    )


def _is_of(asked: Asked, session_id: str) -> bool:
    """Whether the path names this session."""
    before = asked.path.rstrip("/").removesuffix("/run")
    if not asked.is_raw:
        # A blank is not told from `%20`, nor `/` from `%2F`: the body says which it was.
        return before.endswith(f"/{session_id}")
    return unquote(before.rpartition("/")[2], errors="replace") == session_id


def is_text(value: Any) -> bool:
    """Whether it is a text that UTF-8 can hold: JSON may have halves of surrogate pairs."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_recall(value: Any) -> bool:
    """Whether this is the `recall` of a request. It may have more fields than are known today."""
    if (
        not isinstance(value, dict)
        or not is_text(value.get("id"))
        or value.get("call_type") not in CALL_TYPES
    ):
        return False
    try:
        datetime.fromisoformat(value["scheduled_for"])
    except (KeyError, TypeError, ValueError):
        return False
    return all(
        _is_whole(value.get(name)) and value[name] >= least
        for name, least in (("occurrence", 1), ("missed", 0))
    )


def _is_whole(value: Any) -> bool:
    """Whether it is a whole number in JSON: 1.0 is one."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and value.is_integer()
    )
