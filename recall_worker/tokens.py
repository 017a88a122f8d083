"""Tokens by which an application tells the MCP server (`mcp --http`) whose agent calls: signed for
one session, for a while.

    from recall_worker import tokens
    token = tokens.sign(os.environ["RECALL_TOKEN_KEY"], session_id, ttl=timedelta(hours=1))

A token is a JSON Web Token (RFC 7519) with HMAC-SHA256, so that applications in other languages
sign with any library: header {"alg": "HS256", "typ": "recall+jwt", "kid": …}, claims `sub` (the
session), `aud` (the deployment), `iat`, `exp`. Here it is read by one algorithm only, whatever its
header says: there is nothing to choose, so `none` and other algorithms are refused. `typ` keeps
apart what the application signs with the same key for another purpose. `kid` says which key signed,
as `Key.id` makes it; without it all keys are tried.

While the key is changed there are several: the first signs, all are accepted. Keys have 32 octets
at least. Nothing of a token, or of a key, is in an error.

Pure but for the clock, and nothing but the standard library: an application that signs needs no
extra.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeAlias, TypeGuard
from uuid import UUID

TYPE = "recall+jwt"
AUDIENCE = "recall-worker"
KEY_LEAST = 32
"""Octets of the shortest key, as HMAC-SHA256 wants it (RFC 7518, 3.2)."""
TTL_LEAST, TTL_MOST = timedelta(seconds=1), timedelta(days=30)
"""A token that was taken can be used until it ends: nothing revokes it but a new key."""
LEEWAY = 30
"""Seconds by which the clocks of who signs and who reads may differ."""
TOKEN_MOST = 4096
"""Octets of the longest token, as servers take headers."""
SESSION_MOST = 1000
"""Octets of the longest session's id in a token."""


class TokenError(ValueError):
    """The token, or what is to be signed, can't be used. The text says why, with no word of it."""


@dataclass(frozen=True, slots=True)
class Key:
    secret: bytes = field(repr=False)

    @property
    def id(self) -> str:
        """By which a token says that this key signed it: nothing of the key can be told from
        it."""
        return hmac.digest(self.secret, b"recall-worker key id", "sha256").hex()[:16]


@dataclass(frozen=True, slots=True)
class Claims:
    session_id: str
    audience: str
    issued_at: int
    """Seconds since 1970, as `expires_at`."""
    expires_at: int


Keys: TypeAlias = str | Key | Sequence[Key]
"""The text of RECALL_TOKEN_KEY, or what `keys` makes of it."""


def keys(text: str) -> list[Key]:
    """The keys of RECALL_TOKEN_KEY: one, or several separated by blanks, the one that signs first.
    Raises TokenError."""
    found = [Key(part.encode()) for part in text.split()]
    if not found:
        raise TokenError("there is no key: give one of 32 octets at least")
    for number, key in enumerate(found, 1):
        if len(key.secret) < KEY_LEAST:
            raise TokenError(
                f"key {number} has {len(key.secret)} octets: give {KEY_LEAST} at least, such as "
                "what `openssl rand -base64 32` prints"
            )
    return found


def sign(
    given: Keys,
    session_id: str | UUID | int,
    *,
    ttl: timedelta,
    audience: str = AUDIENCE,
    now: float | None = None,
) -> str:
    """A token for this session. `given`: the text of RECALL_TOKEN_KEY, or its keys. `now`: seconds
    since 1970, if not by this host's clock. Raises TokenError."""
    key = _several(given)[0]
    session_id = str(session_id)
    if (wrong := _session_problem(session_id)) is not None:
        raise TokenError(f"the session's id {wrong}")
    if not TTL_LEAST <= ttl <= TTL_MOST:
        raise TokenError(f"a token is valid for 1 s at least, and {TTL_MOST.days} days at most")
    if not audience.strip():
        raise TokenError("the audience is blank: give the name that the server has")
    issued = int(time.time() if now is None else now)
    header = {"alg": "HS256", "typ": TYPE, "kid": key.id}
    claims = {
        "sub": session_id,
        "aud": audience,
        "iat": issued,
        "exp": issued + int(ttl.total_seconds()),
    }
    signed = f"{_encoded(_json(header))}.{_encoded(_json(claims))}"
    token = f"{signed}.{_encoded(_signature(key, signed))}"
    if len(token) > TOKEN_MOST:
        raise TokenError(f"the token would be longer than {TOKEN_MOST} octets")
    return token


def verify(
    given: Keys,
    token: str,
    *,
    audience: str = AUDIENCE,
    now: float | None = None,
) -> Claims:
    """What a token says, where it was signed by one of the keys (as with `sign`), for this
    audience, and is valid now. Raises TokenError."""
    known = _several(given)
    if len(token) > TOKEN_MOST or not token.isascii():
        raise TokenError("it is no token")
    parts = token.split(".")
    if len(parts) != 3:
        raise TokenError("it is no token: it has not three parts")
    header = _object(parts[0])
    # The signature is checked before anything is believed of the claims.
    if header.get("alg") != "HS256" or header.get("typ") != TYPE or "crit" in header:
        raise TokenError(f"it is another kind of token: alg HS256 and typ {TYPE} are accepted")
    if "kid" in header:
        known = [key for key in known if key.id == header["kid"]]
        if not known:
            raise TokenError("it is signed by a key that is not known here")
    signature, signed = _decoded(parts[2]), f"{parts[0]}.{parts[1]}"
    if not any(hmac.compare_digest(_signature(key, signed), signature) for key in known):
        raise TokenError("its signature is wrong")
    return _claims(_object(parts[1]), audience, time.time() if now is None else now)


def _several(given: Keys) -> list[Key]:
    return (
        keys(given) if isinstance(given, str) else [given] if isinstance(given, Key) else [*given]
    )


def _session_problem(session_id: str) -> str | None:
    """Why this can't be a session's id, a clause; None where it can."""
    if session_id in ("", ".", "..") or "\0" in session_id:
        return "can't be one: it is empty, . or .., or holds NUL"
    try:
        if len(session_id.encode()) > SESSION_MOST:
            return f"is longer than {SESSION_MOST} octets"
    except UnicodeEncodeError:
        return "is not text: it has half of a character"
    return None


def _claims(claims: dict[str, Any], audience: str, now: float) -> Claims:
    session, aud = claims.get("sub"), claims.get("aud")
    issued, expires = claims.get("iat"), claims.get("exp")
    if not isinstance(session, str):
        raise TokenError("it names no session (sub)")
    if (wrong := _session_problem(session)) is not None:
        raise TokenError(f"the session that it names (sub) {wrong}")
    if audience not in (aud if isinstance(aud, list) else [aud]):
        raise TokenError("it is for another audience (aud)")
    if not _is_time(issued) or not _is_time(expires):
        raise TokenError("it does not say when it was made and when it ends (iat, exp)")
    if expires - issued > TTL_MOST.total_seconds() or expires <= issued:
        raise TokenError(f"it is valid for longer than {TTL_MOST.days} days, or for no time")
    if now >= expires + LEEWAY:
        raise TokenError("it has expired")
    if issued > now + LEEWAY or _begins(claims) > now + LEEWAY:
        raise TokenError("it is not valid yet: do the clocks agree?")
    return Claims(session, audience, int(issued), int(expires))


def _begins(claims: dict[str, Any]) -> float:
    begins = claims.get("nbf", 0)
    if not _is_time(begins):
        raise TokenError("it does not say when it begins (nbf)")
    return float(begins)


def _is_time(value: Any) -> TypeGuard[float]:
    """Whether it is a number of seconds: infinities and the like compare in odd ways."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 <= value <= 253_402_300_799
    )


def _signature(key: Key, signed: str) -> bytes:
    return hmac.digest(key.secret, signed.encode("ascii"), hashlib.sha256)


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _decoded(part: str) -> bytes:
    """Raises TokenError, also for what is another spelling of the same octets."""
    try:
        data = base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise TokenError("it is no token: it can't be decoded") from None
    if _encoded(data) != part:
        raise TokenError("it is no token: it can't be decoded")
    return data


def _object(part: str) -> dict[str, Any]:
    try:
        document = json.loads(_decoded(part))
    except (ValueError, RecursionError):
        raise TokenError("it is no token: it can't be decoded") from None
    if not isinstance(document, dict):
        raise TokenError("it is no token: it can't be decoded")
    return document
