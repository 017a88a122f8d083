"""Tokens: what is signed is accepted, for its session, its audience and its time, and nothing else
is. Read and written by another library besides, as applications in other languages do."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from datetime import timedelta
from typing import Any
from uuid import UUID

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_worker import tokens
from recall_worker.tokens import LEEWAY, TTL_MOST, Claims, TokenError

from .test_cli import operate

ONE, TWO = "0123456789abcdefghijklmnopqrstuv", "the-second-key-of-thirty-two-octets-and-more"
KEYS = tokens.keys(ONE)
HOUR = timedelta(hours=1)
AT = 1_800_000_000
HEADER = {"alg": "HS256", "typ": "recall+jwt"}
CLAIMS = {"sub": "s", "aud": "recall-worker", "iat": AT, "exp": AT + 3600}


def part(document: Any) -> str:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def forged(header: Any = HEADER, claims: Any = CLAIMS, key: str = ONE, hash: str = "sha256") -> str:
    """A token by whoever has the key, whatever stands in it."""
    signed = f"{part(header)}.{part(claims)}"
    return f"{signed}.{part(hmac.digest(key.encode(), signed.encode(), hash))}"


def why(token: str, *, keys: str = ONE, audience: str = "recall-worker", now: float = AT) -> str:
    with pytest.raises(TokenError) as refused:
        tokens.verify(tokens.keys(keys), token, audience=audience, now=now)
    assert token == "" or token not in str(refused.value)
    return str(refused.value)


def test_what_is_signed_is_accepted() -> None:
    token = tokens.sign(KEYS, "ses-1", ttl=HOUR, now=AT)
    expected = Claims("ses-1", "recall-worker", AT, AT + 3600)
    assert tokens.verify(KEYS, token, now=AT) == expected
    assert tokens.verify(KEYS[0], token, now=AT + 3599) == expected
    assert tokens.verify(ONE, tokens.sign(f"{ONE} {TWO}", "ses-1", ttl=HOUR, now=AT), now=AT) == (
        expected
    )


def test_ids_as_applications_have_them() -> None:
    id = UUID("5f2c1a3e-7a55-4c0b-9a51-0f6d3c1e8b42")
    for given_, text in ((id, str(id)), (7, "7"), ("ä/ %\n", "ä/ %\n")):
        token = tokens.sign(KEYS, given_, ttl=HOUR, now=AT)
        assert tokens.verify(KEYS, token, now=AT).session_id == text


def test_another_library_reads_and_writes_them() -> None:
    """Nothing but a JSON Web Token."""
    token = tokens.sign(KEYS, "ses-1", ttl=HOUR)
    claims = jwt.decode(token, ONE, algorithms=["HS256"], audience="recall-worker")
    assert claims["sub"] == "ses-1" and claims["exp"] - claims["iat"] == 3600
    theirs = jwt.encode(CLAIMS, ONE, algorithm="HS256", headers={"typ": "recall+jwt"})
    assert tokens.verify(KEYS, theirs, now=AT).session_id == "s"
    several = jwt.encode(
        CLAIMS | {"aud": ["other", "recall-worker"]}, ONE, headers={"typ": "recall+jwt"}
    )
    assert tokens.verify(KEYS, several, now=AT).session_id == "s"


def test_keys_are_changed_one_after_the_other() -> None:
    """The new key in front signs, both are accepted; when the old one is taken out, its tokens
    are refused. Whether a token says which key, or not."""
    old, new = tokens.sign(tokens.keys(ONE), "s", ttl=HOUR, now=AT), f"{TWO} {ONE}"
    fresh = tokens.sign(tokens.keys(new), "s", ttl=HOUR, now=AT)
    for token in (old, fresh, forged(), forged(key=TWO)):
        assert tokens.verify(tokens.keys(new), token, now=AT).session_id == "s"
    assert tokens.verify(tokens.keys(TWO), fresh, now=AT).session_id == "s"
    assert why(old, keys=TWO) == "it is signed by a key that is not known here"
    assert why(forged(), keys=TWO) == "its signature is wrong"


REFUSED: list[tuple[str, str, str]] = [
    ("nothing", "", "no token"),
    ("text", "Bearer me", "no token"),
    ("two parts", "a.b", "three parts"),
    ("four parts", forged() + ".x", "three parts"),
    ("not ASCII", forged() + "é", "no token"),
    ("endless", "a" * 5000, "no token"),
    ("no JSON", f"{part(b'{')}.{part(CLAIMS)}.x", "can't be decoded"),
    ("deep JSON", f"{part(b'[' * 2900)}.{part(CLAIMS)}.x", "can't be decoded"),
    ("a list", f"{part([])}.{part(CLAIMS)}.x", "can't be decoded"),
    ("no signature", forged().rpartition(".")[0] + ".", "signature is wrong"),
    ("half a signature", forged()[:-20], ""),
    ("alg none", f"{part({'alg': 'none', 'typ': 'recall+jwt'})}.{part(CLAIMS)}.", "another kind"),
    ("alg None", forged({"alg": "None", "typ": "recall+jwt"}), "another kind"),
    ("alg RS256", forged({"alg": "RS256", "typ": "recall+jwt"}), "another kind"),
    ("alg HS512", forged({"alg": "HS512", "typ": "recall+jwt"}, hash="sha512"), "another kind"),
    ("no alg", forged({"typ": "recall+jwt"}), "another kind"),
    ("another token of the application's", forged({"alg": "HS256", "typ": "JWT"}), "another kind"),
    ("crit", forged({**HEADER, "crit": ["x"]}), "another kind"),
    ("unknown kid", forged({**HEADER, "kid": "x"}), "not known here"),
    ("kid of another kind", forged({**HEADER, "kid": ["x"]}), "not known here"),
    ("another key", forged(key=TWO), "signature is wrong"),
    ("an empty key", forged(key=""), "signature is wrong"),
    ("no session", forged(claims={**CLAIMS, "sub": None}), "names no session"),
    ("a number as session", forged(claims={**CLAIMS, "sub": 7}), "names no session"),
    ("an empty session", forged(claims={**CLAIMS, "sub": ""}), "can't be one"),
    ("a path as session", forged(claims={**CLAIMS, "sub": ".."}), "can't be one"),
    ("a NUL in the session", forged(claims={**CLAIMS, "sub": "s\0"}), "can't be one"),
    ("half a character", forged(claims={**CLAIMS, "sub": "\ud800"}), "half of a character"),
    ("a long session", forged(claims={**CLAIMS, "sub": "x" * 1500}), "longer than 1000 octets"),
    ("another audience", forged(claims={**CLAIMS, "aud": "staging"}), "another audience"),
    ("no audience", forged(claims={k: v for k, v in CLAIMS.items() if k != "aud"}), "audience"),
    ("a part of the audience", forged(claims={**CLAIMS, "aud": "recall"}), "another audience"),
    ("no end", forged(claims={k: v for k, v in CLAIMS.items() if k != "exp"}), "when it ends"),
    ("no beginning", forged(claims={k: v for k, v in CLAIMS.items() if k != "iat"}), "was made"),
    ("an end in words", forged(claims={**CLAIMS, "exp": "never"}), "when it ends"),
    ("an endless end", forged(claims={**CLAIMS, "exp": 1e309}), "when it ends"),
    ("true as end", forged(claims={**CLAIMS, "exp": True}), "when it ends"),
    ("31 days", forged(claims={**CLAIMS, "exp": AT + 31 * 86_400}), "longer than 30 days"),
    ("no time", forged(claims={**CLAIMS, "exp": AT}), "for no time"),
    ("expired", forged(claims={**CLAIMS, "iat": AT - 3700, "exp": AT - LEEWAY}), "has expired"),
    ("made later", forged(claims={**CLAIMS, "iat": AT + LEEWAY + 1}), "not valid yet"),
    ("begins later", forged(claims={**CLAIMS, "nbf": AT + 3600}), "not valid yet"),
    ("begins in words", forged(claims={**CLAIMS, "nbf": "later"}), "when it begins"),
]


@pytest.mark.parametrize(("token", "says"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_anything_else_is_refused(token: str, says: str) -> None:
    """Forged, of another kind, for somebody else, too early or too late; the sentence says which,
    and repeats nothing of it."""
    assert says in why(token)


def test_clocks_may_differ_a_little() -> None:
    token = tokens.sign(KEYS, "s", ttl=HOUR, now=AT)
    for now in (AT - LEEWAY, AT + 3600 + LEEWAY - 1):
        assert tokens.verify(KEYS, token, now=now).session_id == "s"
    assert why(token, now=AT - LEEWAY - 1).startswith("it is not valid yet")
    assert why(token, now=AT + 3600 + LEEWAY) == "it has expired"


def test_a_token_of_one_deployment_is_none_of_another() -> None:
    """They may share a key."""
    token = tokens.sign(KEYS, "s", ttl=HOUR, audience="staging", now=AT)
    assert "another audience" in why(token)
    assert tokens.verify(KEYS, token, audience="staging", now=AT).audience == "staging"


@given(st.data())
def test_no_character_can_be_changed(data: st.DataObject) -> None:
    """Nor taken out, nor put in: also where base64 would not notice."""
    token = tokens.sign(KEYS, "session", ttl=HOUR, now=AT)
    at = data.draw(st.integers(0, len(token) - 1))
    new = data.draw(
        st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.+/= \n")
    )
    for other in (
        token[:at] + new + token[at + 1 :],
        token[:at] + new + token[at:],
        token[:at] + token[at + 1 :],
    ):
        if other != token:
            assert why(other)


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda b: b.decode("latin-1")))
def test_whatever_comes_is_refused(token: str) -> None:
    with pytest.raises(TokenError):
        tokens.verify(KEYS, token)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"session_id": ""}, "can't be one"),
        ({"session_id": ".."}, "can't be one"),
        ({"session_id": "x" * 1001}, "longer than 1000 octets"),
        ({"session_id": "\ud800"}, "not text"),
        ({"session_id": "\x01" * 1000}, "longer than 4096 octets"),
        ({"session_id": "s\0"}, "can't be one"),
        ({"ttl": timedelta(0)}, "at most"),
        ({"ttl": TTL_MOST + timedelta(seconds=1)}, "30 days at most"),
        ({"audience": " "}, "audience is blank"),
    ],
)
def test_what_is_not_signed(values: dict[str, Any], says: str) -> None:
    with pytest.raises(TokenError, match=says):
        tokens.sign(KEYS, **{"session_id": "s", "ttl": HOUR, **values})


def test_keys_that_are_none() -> None:
    for text in ("", "  ", "short", f"{ONE} short"):
        with pytest.raises(TokenError, match="32"):
            tokens.keys(text)


def test_a_key_shows_nothing_of_itself() -> None:
    """Neither as text nor by its id."""
    [key] = KEYS
    assert ONE not in repr(key)
    assert key.id != hashlib.sha256(ONE.encode()).hexdigest()[:16]


# --- the command ----------------------------------------------------------------------------------


def test_the_command() -> None:
    """The token alone on stdout, for the audience and the time that were asked for."""
    environ = {"RECALL_TOKEN_KEY": f"{TWO} {ONE}"}
    said = operate("", "token", "ses-1", "--ttl", "2h", environ=environ)
    assert (said.status, said.err) == (0, "")
    assert said.out.count("\n") == 1
    claims = tokens.verify(tokens.keys(TWO), said.out.strip())
    assert claims.session_id == "ses-1" and claims.expires_at - claims.issued_at == 7200
    said = operate("", "token", "ses-1", "--audience", "staging", environ=environ)
    assert tokens.verify(tokens.keys(TWO), said.out.strip(), audience="staging")


@pytest.mark.parametrize(
    ("words", "environ", "says"),
    [
        (["s"], {}, "RECALL_TOKEN_KEY is not set"),
        (["s"], {"RECALL_TOKEN_KEY": "short"}, "give 32 at least"),
        (["s", "--ttl", "31d"], {"RECALL_TOKEN_KEY": ONE}, "30 days at most"),
        (["s", "--ttl", "60"], {"RECALL_TOKEN_KEY": ONE}, "has no unit"),
        (["s", "--ttl", "9999999999999999w"], {"RECALL_TOKEN_KEY": ONE}, "longer than any"),
        ([".."], {"RECALL_TOKEN_KEY": ONE}, "can't be one"),
        (["s", "--audience", " "], {"RECALL_TOKEN_KEY": ONE}, "is blank"),
    ],
)
def test_what_the_command_refuses(words: list[str], environ: dict[str, str], says: str) -> None:
    said = operate("", "token", *words, environ=environ)
    assert (said.status, said.out) == (2, "")
    assert said.err.startswith("Error: ") and says in said.err and "\nTry: " in said.err
    assert ONE not in said.err
