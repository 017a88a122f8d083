"""The native protocol's pure parts: address, key, body, signature, and what each answer means."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recall_worker.protocols.contract import address, header_key, same_origin, signature
from recall_worker.protocols.http import LIMIT, Answer
from recall_worker.protocols.native import GUESSED, accepted, body
from recall_worker.protocols.outcomes import Word, meaning, read, retry_after
from recall_worker.recall import (
    Accepted,
    Answered,
    Busy,
    Failed,
    Gone,
    Misconfigured,
    Outcome,
    Refused,
    Unavailable,
    Unknown,
    http_status_of,
    name_of,
    reason_of,
)

from .test_recall import claim_with

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
"""What a text column can hold."""


def answer(
    status: int, content: bytes | str = b"", *, truncated: bool = False, **headers: str
) -> Answer:
    """An answer as the wire gives it; `retry_after="5"` becomes the header Retry-After."""
    fields = {name.replace("_", "-").title(): value for name, value in headers.items()}
    return Answer(
        status, fields, content.encode() if isinstance(content, str) else content, truncated
    )


# --- the address ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("session", "place"),
    [
        ("s1", "s1"),
        ("a/../b", "a%2F..%2Fb"),
        ("a?b#c", "a%3Fb%23c"),
        ("%2e%2e", "%252e%252e"),
        ("a b", "a%20b"),
        ("a\\b", "a%5Cb"),
        ("größe/漢", "gr%C3%B6%C3%9Fe%2F%E6%BC%A2"),
        ("a\r\nHost: elsewhere", "a%0D%0AHost%3A%20elsewhere"),
        ("@elsewhere", "%40elsewhere"),
        ("{session_id}", "%7Bsession_id%7D"),
        ("...", "..."),
        ("a;b=c&d+e", "a%3Bb%3Dc%26d%2Be"),
    ],
    ids=ascii,
)
def test_address(session: str, place: str) -> None:
    """A session's id stays in its place in the address, in the path as in the query."""
    assert (
        address("http://a/sessions/{session_id}/run", session) == f"http://a/sessions/{place}/run"
    )
    assert (
        address("http://a/run?session={session_id}&x=1", session)
        == f"http://a/run?session={place}&x=1"
    )


def test_an_address_without_the_placeholder() -> None:
    """A template that names no session is the address of all of them."""
    assert address("http://a/run", "s1") == "http://a/run"


@given(TEXT)
@settings(deadline=None)
def test_no_session_leaves_its_place(session: str) -> None:
    """Whatever the id holds, the address has the same parts, and the id can be read back from its
    own."""
    parts = urlsplit(address("http://a:1/sessions/{session_id}/run?x=1", session))
    assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("http", "a:1", "x=1", "")
    *_, empty, sessions, place, run = ["", *parts.path.split("/")]
    assert (empty, sessions, run) == ("", "sessions", "run")
    assert (
        unquote(place) == session and place.isascii() and (place.isprintable() and " " not in place)
    )


# --- the key --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "header"),
    [
        ("r1:1", "r1:1"),
        ("4f0c/a+b=c:12.1", "4f0c/a+b=c:12.1"),
        ("a b:1", "a%20b:1"),
        ("é:1", "%C3%A9:1"),
        ("a\r\nX-Injected: yes:1", "a%0D%0AX-Injected:%20yes:1"),
        ("tab\t:1", "tab%09:1"),
        ("del\x7f:1", "del%7F:1"),
        ("100%:1", "100%25:1"),
        ("a%20b:1", "a%2520b:1"),
        ('"quoted":1', '"quoted":1'),
        (" :1", "%20:1"),
    ],
    ids=ascii,
)
def test_header_key(key: str, header: str) -> None:
    """A key of plain ASCII goes as it is; all else is percent-encoded, so that a header can carry
    it."""
    assert header_key(key) == header


@given(TEXT, TEXT)
@settings(deadline=None)
def test_keys_stay_apart_in_the_header(one: str, other: str) -> None:
    """The header holds visible ASCII only, can be read back, and is another for another key."""
    said = header_key(one + ":1")
    assert said.isascii() and said.isprintable() and " " not in said
    assert unquote(said) == one + ":1"
    assert (header_key(one) == header_key(other)) == (one == other)


# --- the body -------------------------------------------------------------------------------------


def test_body() -> None:
    """The body is the document that DESIGN promises, and nothing else; times are RFC 3339 in
    UTC."""
    when = datetime(2026, 3, 1, 13, 30, 0, 250_000, tzinfo=timezone(timedelta(hours=1)))
    claim = claim_with(
        call_type="recurring",
        interval=60,
        occurrence=7,
        scheduled_for=when,
        missed=2,
        message="read the inbox",
    )
    assert json.loads(body(claim)) == {
        "session_id": "s1",
        "user_message": "read the inbox",
        "system_message": "[Scheduled recall] read the inbox",
        "recall": {
            "id": "r1",
            "call_type": "recurring",
            "occurrence": 7,
            "scheduled_for": "2026-03-01T12:30:00.250000Z",
            "missed": 2,
        },
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"attempt": 3},
        {"deferrals": 9},
        {"rekey": 2},
        {"lease": UUID(int=7)},
        {"begun_age": 99.0},
        {"lag": 5.0},
        {"lateness": 500.0},
        {"taken_from": "w1"},
        {"due": False},
        {"interval": 900},
        {"trigger": "x", "trigger_at": datetime(2030, 1, 1, tzinfo=UTC)},
    ],
    ids=repr,
)
def test_the_body_stays_the_same_under_one_key(changes: dict[str, Any]) -> None:
    """Nothing that changes between two calls of an occurrence is in the body, byte for byte."""
    assert body(claim_with(**changes)) == body(claim_with())


@given(session=TEXT, message=TEXT)
@settings(deadline=None)
def test_any_text_goes_into_the_body(session: str, message: str) -> None:
    """The body is ASCII whatever is in it, byte for byte as the standard library would write it,
    and the texts can be read back."""
    written = body(claim_with(session_id=session, message=message))
    document = json.loads(written.decode("ascii"))
    assert written == json.dumps(document, separators=(",", ":")).encode("ascii")
    assert (document["session_id"], document["user_message"]) == (session, message)
    assert document["system_message"] == "[Scheduled recall] " + message


@pytest.mark.parametrize("year", [1, 9997])
def test_the_body_takes_clamped_dates(year: int) -> None:
    """The first and the last years that a claim can hold are dates like others."""
    scheduled_for = datetime(year, 1, 2, tzinfo=UTC)
    assert (
        json.loads(body(claim_with(scheduled_for=scheduled_for)))["recall"]["scheduled_for"]
        == f"{year:04}-01-02T00:00:00.000000Z"
    )


# --- signatures -----------------------------------------------------------------------------------


def test_signature_of_the_published_vector() -> None:
    """The example that the Standard Webhooks libraries publish comes out to the letter."""
    secret, key = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek"
    signed = signature(secret, key, 1614265330, b'{"test": 2432232314}')
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_signature_with_a_secret_of_plain_text() -> None:
    """A secret without the prefix is taken as its own bytes."""
    digest = hmac.new("ö-secret".encode(), b"k:1.5.{}", hashlib.sha256).digest()
    assert signature("ö-secret", "k:1", 5, b"{}") == "v1," + base64.b64encode(digest).decode()


@pytest.mark.parametrize(
    "changed",
    [
        ("whsec_AAAA", "k:1", 5, b"{}"),
        ("whsec_c2VjcmV0", "k:2", 5, b"{}"),
        ("whsec_c2VjcmV0", "k:1", 6, b"{}"),
        ("whsec_c2VjcmV0", "k:1", 5, b"[]"),
    ],
    ids=["secret", "key", "time", "body"],
)
def test_a_signature_covers_everything(changed: tuple[str, str, int, bytes]) -> None:
    """Another secret, key, time or body makes another signature."""
    assert signature(*changed) != signature("whsec_c2VjcmV0", "k:1", 5, b"{}")


# --- Retry-After ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("0", 1.0),
        ("1", 1.0),
        (" 120 ", 120.0),
        ("86400", 86_400.0),
        ("86401", 86_400.0),
        ("9" * 5000, 86_400.0),
        ("", None),
        ("-1", None),
        ("1.5", 1.5),
        ("1e3", None),
        ("soon", None),
        ("120.5", 120.5),
        ("1700000000", 1.0),
        ("1.", 1.0),
        (".5", None),
        ("²", None),
        ("٣", None),
        ("\x00", None),
        ("1, 2", None),
        ("Fri, 32 Mar 2026 12:00:00 GMT", None),
        ("Fri, 31 Dec 99999999999999999999 23:59:59 GMT", None),
        ("Fri, 31 Dec 2027 23:59:59 +99999999999999999999", None),
    ],
    ids=lambda value: ascii(value)[:50],
)
def test_retry_after_in_seconds(said: str, seconds: float | None) -> None:
    """Seconds are taken, at least one and at most a day of them; what can't be read is as if it was
    not said."""
    assert retry_after({"Retry-After": said}) == seconds
    assert retry_after({}) is None


@pytest.mark.parametrize(
    ("ahead", "seconds"),
    [(0, 1.0), (90, 90.0), (86_400, 86_400.0), (10**7, 86_400.0), (-5, 1.0), (-(10**9), 1.0)],
)
@pytest.mark.parametrize(
    "clock",
    [datetime(2001, 9, 9, tzinfo=UTC), datetime(2040, 1, 1, tzinfo=UTC)],
    ids=["slow", "fast"],
)
def test_retry_after_as_a_date(clock: datetime, ahead: int, seconds: float) -> None:
    """A date counts from the server's own clock, however wrong that is; one that has passed means
    a second."""
    then = clock + timedelta(seconds=ahead)
    headers = {
        "Retry-After": format_datetime(then, usegmt=True),
        "Date": format_datetime(clock, usegmt=True),
    }
    assert retry_after(headers) == seconds


def test_retry_after_as_a_unix_time() -> None:
    """Also in milliseconds; by the server's own clock."""
    date = format_datetime(datetime.fromtimestamp(2_000_000_000, UTC), usegmt=True)
    for said in ("2000000030", "2000000030000", "2000000030.0"):
        assert retry_after({"Retry-After": said, "Date": date}) == 30.0


def test_retry_after_as_a_date_without_the_servers_clock() -> None:
    """Where the server does not tell its time, ours has to do."""
    then = datetime.now(UTC) + timedelta(hours=1)
    waits = retry_after({"Retry-After": format_datetime(then, usegmt=True)})
    assert waits is not None and 3500 < waits <= 3600


@pytest.mark.slow
@given(said=st.text(max_size=60), date=st.none() | st.text(max_size=60))
@settings(deadline=None)
def test_retry_after_never_raises(said: str, date: str | None) -> None:
    """Whatever a server puts there, it is between a second and a day, or not said."""
    waits = retry_after({"Retry-After": said} | ({} if date is None else {"Date": date}))
    assert waits is None or 1 <= waits <= 86_400


# --- the outcome table ----------------------------------------------------------------------------


HTML = b"<!doctype html><title>Welcome</title>"
JSON = "application/json"
LARGE = b'{"text": "' + b"x" * (LIMIT - 10)

ANSWERS = [
    (answer(200, "{}"), Answered),
    (answer(200, '{"answer": "done", "status": "ok"}', content_type=JSON), Answered),
    (answer(201, '{"status": "completed"}'), Answered),
    (answer(200, " \r\n"), Answered),
    (answer(204), Answered),
    (answer(200, content_type="text/html"), Answered),
    (answer(200, "\ufeff{}", content_type=JSON), Answered),
    (answer(200, '{"status": 500}'), Answered),
    (answer(200, '{"status": null}'), Answered),
    (answer(200, '{"n": ' + "9" * 5000 + "}", content_type=JSON), Answered),
    (answer(200, LARGE, truncated=True, content_type=JSON), Answered),
    (answer(200, LARGE, truncated=True), Answered),
    (answer(200, '{"status": "failed"}'), Failed),
    (answer(200, '{"status": "error"}'), Failed),
    (answer(200, '{"status": "cancelled"}'), Failed),
    (answer(200, '{"status": "FAILED"}'), Failed),
    (answer(201, '{"status": "failed", "error": {"message": "no model"}}'), Failed),
    (answer(200, HTML, content_type="text/html"), Misconfigured),
    (answer(200, HTML), Misconfigured),
    (answer(200, "pong", content_type="text/plain"), Answered),
    (answer(200, "OK"), Answered),
    (answer(200, "queued, 3 < 4 and <em>", content_type="text/plain"), Answered),
    (answer(200, "I am done", content_type="text/html; charset=utf-8"), Answered),
    (answer(200, "<p>I am done</p>", content_type="text/html"), Misconfigured),
    (answer(200, "\ufeff<!-- x -->\n<html><body>"), Misconfigured),
    (answer(200, "[1, 2]"), Answered),
    (answer(200, '"done"'), Answered),
    (answer(200, b"\x1f\x8b\x08\x00"), Unknown),
    (answer(200, "GIF89a", content_type="image/gif"), Unknown),
    *(
        (answer(200, json.dumps({"status": word})), Failed)
        for word in (
            *("failed", "FAILURE", "Error", "errored", "cancelled", "canceled", "timeout"),
            *("timed_out", "timed-out", "Timed Out", "expired", "incomplete", "rejected"),
            "aborted",
        )
    ),
    *(
        (answer(status, json.dumps({"run_id": "r", "status": word})), Answered)
        for status in (200, 201, 202)
        for word in (
            *("succeeded", "success", "Completed", "complete", "done", "OK", "finished"),
            *("requires_action", "input-required", "Auth Required", "interrupted", "paused"),
            "suspended",
        )
    ),
    (answer(200, '{"status": "queued"}'), Answered),
    (answer(200, '{"status": {"code": 2}}'), Answered),
    (
        answer(200, '{"status": "failed", "text": "' + "x" * LIMIT, truncated=True),
        Failed,
    ),
    (
        answer(200, HTML + b" " * (LIMIT - len(HTML)), truncated=True, content_type="text/html"),
        Misconfigured,
    ),
    (answer(200, '{"status": "fai', content_type=JSON), Unknown),
    (answer(200, b"\xff\xfe{", content_type=JSON), Unknown),
    (answer(200, "[" * 200_000, content_type="application/problem+json"), Unknown),
    (answer(409), Busy),
    (answer(423, '{"code": "locked"}'), Busy),
    (answer(404, '{"code": "session_not_found"}'), Gone),
    (answer(404, '{"type": "session_not_found"}'), Gone),
    (answer(404, '{"detail": {"code": "session_not_found"}}'), Gone),
    (answer(410, '{"code": "session_not_found"}'), Gone),
    (answer(410, '{"detail": {"code": "session_not_found"}}', content_type="text/plain"), Gone),
    (answer(404), Misconfigured),
    (answer(404, '{"detail": "Not Found"}'), Misconfigured),
    (answer(404, '{"detail": "session_not_found"}'), Misconfigured),
    (answer(404, '{"error": "session_not_found"}'), Misconfigured),
    (answer(404, '{"code": ["session_not_found"]}'), Misconfigured),
    (answer(404, '["session_not_found"]'), Misconfigured),
    (answer(404, "session_not_found"), Misconfigured),
    (answer(404, HTML), Misconfigured),
    (answer(410), Misconfigured),
    (answer(410, '{"code": "gone"}'), Misconfigured),
    *((answer(status), Misconfigured) for status in (401, 402, 403, 405, 406, 407, 421, 426)),
    *(
        (answer(400, f"<html><title>400</title>{words}</html>", content_type="text/html"), kind)
        for words, kind in (
            ("The plain HTTP request was sent to HTTPS port", Misconfigured),
            ("Client sent an HTTP request to an HTTPS server.", Misconfigured),
            ("You're speaking plain HTTP to an SSL-enabled server port.", Misconfigured),
            ("This combination of host and port requires TLS.", Misconfigured),
            ("No required SSL certificate was sent", Misconfigured),
            ("Bad Request", Refused),
        )
    ),
    *(
        (answer(status, location="https://elsewhere/"), Misconfigured)
        for status in (301, 302, 303, 307, 308)
    ),
    (answer(304), Misconfigured),
    *((answer(status), Unavailable) for status in (408, 425, 429, 503)),
    *((answer(status), Unknown) for status in (500, 501, 502, 504, 505, 520, 529, 530, 599)),
    *(
        (answer(status), Refused)
        for status in (400, 411, 412, 413, 414, 415, 418, 422, 431, 451, 499)
    ),
    *((answer(status), Unknown) for status in (100, 199, 600, 999)),
]


@pytest.mark.parametrize(
    ("given_answer", "kind"),
    ANSWERS,
    ids=[f"{a.status} {a.body[:40]!r} {kind.__name__}" for a, kind in ANSWERS],
)
def test_read(given_answer: Answer, kind: type[Outcome]) -> None:
    """Each answer is the outcome that DESIGN's table names; it tells its HTTP status, and why where
    it is not as it should be."""
    outcome = read(given_answer)
    assert type(outcome) is kind
    if 200 <= given_answer.status < 600:
        assert http_status_of(outcome) == given_answer.status
    if kind not in (Answered, Failed):
        assert str(given_answer.status) in (reason_of(outcome) or "")


STREAM = "text/event-stream"
LINES = "application/x-ndjson"


@pytest.mark.parametrize(
    ("content", "content_type", "kind"),
    [
        ("data: a\n\ndata: [DONE]\n\n", STREAM, Answered),
        (": hello\n\n", STREAM, Answered),
        ("", STREAM, Answered),
        ("event: error\ndata: {}\n\n", STREAM, Failed),
        ("event: error\r\ndata: no model\r\n\r\n", STREAM, Failed),
        ("\ufeffevent: error\ndata: x\n\n", STREAM, Failed),
        ("event: error\ndata: x\n\nevent: end\ndata: {}\n\n", STREAM, Failed),
        ("event: error\ndata: x\n\ndata: [DONE]\n\n", STREAM, Failed),
        ("event: error\ndata: x\n\ndata: it went on\n\n", STREAM, Answered),
        ('data: {"type": "response.failed"}\n\n', STREAM, Failed),
        ('data: {"type": "RUN_ERROR", "message": "no"}\n\n', STREAM, Failed),
        ('data: {"error": {"message": "no"}}\n\ndata: [DONE]\n\n', STREAM, Failed),
        ('data: {"tok', STREAM, Unknown),
        ('{"type": "token"}\n{"type": "end"}\n', LINES, Answered),
        ('{"type": "token"}\n{"type": "end"}', LINES, Answered),
        ('{"type": "token"}\n{"ty', LINES, Unknown),
        ('{"type": "token"}\n{"status": "failed"}\n', LINES, Failed),
        ('{"a": 1}\n{"error": "no"}\n', "application/json", Failed),
        ("OK", "application/json", Answered),
        ('{"a": "al', "application/json", Unknown),
        ('<?xml version="1.0"?><r/>', "application/xml", Unknown),
        ("<think>so</think> done", "text/html", Answered),
    ],
)
def test_streams_and_their_neighbours(content: str, content_type: str, kind: type[Outcome]) -> None:
    """A stream's last event decides; one that only the end of the connection ended, in the middle
    of a line, broke off."""
    assert type(read(answer(200, content, content_type=content_type))) is kind


def test_json_in_another_charset() -> None:
    """As servlets send it."""
    latin = '{"status": "failed", "error": "é"}'.encode("latin-1")
    outcome = read(answer(200, latin, content_type="application/json;charset=ISO-8859-1"))
    assert isinstance(outcome, Failed) and outcome.reason.endswith("failed: é") is False


@pytest.mark.parametrize("word", ["RequiresAction", "TimedOut", "inProgress", " in  progress "])
def test_words_in_other_spellings(word: str) -> None:
    assert meaning(word) is not Word.OTHER


def test_a_refusal_that_speaks_of_https_is_the_applications_own() -> None:
    assert isinstance(read(answer(400, '{"detail": "the target must use https"}')), Refused)


@pytest.mark.parametrize("status", [409, 423, 408, 425, 429, 503])
def test_who_is_asked_to_come_back_later(status: int) -> None:
    """Busy and Unavailable carry what the API said of when; so does a date."""
    outcome = read(answer(status, retry_after="7"))
    assert isinstance(outcome, Busy | Unavailable) and outcome.retry_after == 7.0
    dated = read(
        answer(
            status,
            retry_after="Sun, 01 Mar 2026 12:00:30 GMT",
            date="Sun, 01 Mar 2026 12:00:00 GMT",
        )
    )
    assert isinstance(dated, Busy | Unavailable) and dated.retry_after == 30.0
    silent = read(answer(status))
    assert isinstance(silent, Busy | Unavailable) and silent.retry_after is None


@pytest.mark.parametrize("status", [200, 404, 500, 422])
def test_retry_after_means_nothing_elsewhere(status: int) -> None:
    """Other outcomes have times of their own."""
    assert read(answer(status, retry_after="7")) == read(answer(status))


@pytest.mark.parametrize(
    "document",
    [
        {"error": "out of tokens"},
        {"message": "out of\n tokens"},
        {"detail": {"message": "out of tokens"}},
        {"title": "out of tokens", "type": "about:blank"},
        {"error": None, "detail": "out of tokens"},
    ],
    ids=repr,
)
@pytest.mark.parametrize("status", [422, 500])
def test_the_apis_own_words(document: dict[str, Any], status: int) -> None:
    """Where the API says why in one of the usual places, the reason says so, too, on one line."""
    reason = reason_of(read(answer(status, json.dumps(document))))
    assert reason is not None and reason.endswith(": out of tokens")
    failed = reason_of(read(answer(200, json.dumps(document | {"status": "failed"}))))
    assert failed is not None and failed.endswith("ended as failed: out of tokens")


def test_a_redirect_says_where_to() -> None:
    """Whoever has to set the address right is told the address, cut where it is endless."""
    reason = reason_of(read(answer(307, location="https://elsewhere/" + "x" * 10_000)))
    assert reason is not None and "https://elsewhere/xxx" in reason and len(reason) < 400


def test_reasons_are_short() -> None:
    """An API that explains itself at length is cut."""
    long = json.dumps(
        {"status": "failed", "error": "x" * 100_000, "detail": {"code": "x" * 100_000}}
    )
    for status in (200, 404, 409, 422, 500, 503):
        assert len(reason_of(read(answer(status, long))) or "") < 400


@given(
    status=st.integers(100, 599),
    content=st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=20),
            lambda inner: (
                st.lists(inner)
                | st.dictionaries(
                    st.sampled_from(["status", "code", "type", "detail", "error", "message"]), inner
                )
            ),
            max_leaves=6,
        ).map(lambda document: json.dumps(document).encode()),
    ),
    content_type=st.sampled_from(["", "application/json", "text/html", "json", "\xff"]),
    truncated=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_any_answer_is_some_outcome(
    status: int, content: bytes, content_type: str, truncated: bool
) -> None:
    """Reading never raises, gives one of the outcomes of a call, and never says Answered to
    anything but a 2xx."""
    outcome = read(answer(status, content, truncated=truncated, content_type=content_type))
    assert name_of(outcome) in {
        "answered",
        "busy",
        "gone",
        "misconfigured",
        "unavailable",
        "unknown",
        "failed",
        "refused",
    }
    if isinstance(outcome, Answered | Failed):
        assert 200 <= status < 300


@given(
    st.sampled_from([200, 201, 202]),
    st.one_of(
        st.text(st.characters(), max_size=20),
        st.sampled_from(
            ["\ud800", "a\udfffb", "..", ".", "/", "r" * 3000, "é" * 900, "\0", "a\r\nb"]
        ),
    ),
    st.one_of(st.none(), st.text(st.characters(exclude_characters="\r\n\0"), max_size=20)),
)
def test_whatever_names_an_accepted_run(status: int, run_id: str, location: str | None) -> None:
    """JSON can hold texts that are none, and texts without end: a run is followed on the endpoint's
    own origin, below its address, or not at all."""
    headers = {} if location is None else {"Location": location}
    said = Answer(
        status, headers, json.dumps({"run_id": run_id, "status": "running"}).encode(), False
    )
    match accepted(said, "http://a:1/sessions/s/run?x=1"):
        case Accepted(reference):
            where = reference.removesuffix(GUESSED)
            assert same_origin("http://a:1/sessions/s/run?x=1", reference) == where
            assert location is not None or where.startswith("http://a:1/sessions/s/run/")
            assert len(where) <= 2000
        case Unknown(accepted=True) | None:
            pass
        case other:
            raise AssertionError(other)
