"""Reading an answer, without a socket: whatever bytes come, in whatever pieces, it stays within its
bounds, and half an answer is never a whole one."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import time
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_worker.protocols.answer import (
    HEAD_LIMIT,
    INTERIM_MOST,
    LIMIT,
    LINES_MOST,
    RATIO,
    SILENCE_MOST,
    TAIL,
    Answer,
    AnswerReader,
    Headers,
)

READ = 1 << 16


def read(data: bytes, pieces: list[int] | None = None, end: str | None = None) -> AnswerReader:
    """A reader that was fed `data`, cut at these places; then the connection ends, in order or
    broken off."""
    reader = AnswerReader(None)
    places = [0, *sorted(pieces if pieces is not None else range(READ, len(data), READ)), len(data)]
    for begin, until in itertools.pairwise(places):
        if begin < until and not reader.is_over:
            reader.feed(memoryview(data)[begin:until])
    if end is not None:
        reader.end(orderly=end == "orderly")
    return reader


def head(status: int, *fields: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} Status", *fields, "", ""]).encode()


def sized(body: bytes, *fields: str, status: int = 200) -> bytes:
    return head(status, f"content-length: {len(body)}", *fields) + body


def chunked(body: bytes, size: int, extension: str = "", trailer: str = "") -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    chunks = b"".join(f"{len(p):x}{extension}\r\n".encode() + p + b"\r\n" for p in parts)
    return head(200, "transfer-encoding: chunked") + chunks + f"0\r\n{trailer}\r\n".encode()


BODY = b'{"status":"completed","output":"well, and thank you"}'
INTERIM = head(100) + head(103, "link: </style.css>; rel=preload")
WHOLE = {
    "length": sized(BODY),
    "chunked": chunked(BODY, 7),
    "extensions": chunked(BODY, 7, extension=';a=1;b="two"'),
    "trailers": chunked(BODY, 20, trailer="x-sum: 1\r\ncontent-type: text/html\r\n"),
    "interim": INTERIM + sized(BODY),
    "gzip": sized(gzip.compress(BODY), "content-encoding: gzip"),
    "GZIP": sized(gzip.compress(BODY), "Content-Encoding: GZIP"),
    "deflate": sized(zlib.compress(BODY), "content-encoding: deflate"),
    "bare deflate": sized(zlib.compress(BODY)[2:-4], "content-encoding: deflate"),
    "HTTP/1.0": sized(BODY).replace(b"HTTP/1.1", b"HTTP/1.0"),
}


@pytest.mark.parametrize("name", WHOLE)
@given(st.data())
def test_an_answer_is_the_same_in_any_pieces(name: str, data: st.DataObject) -> None:
    """Wherever the network cuts it."""
    sent = WHOLE[name]
    places = data.draw(st.lists(st.integers(0, len(sent)), max_size=8))
    reader = read(sent, places)
    assert reader.is_whole and reader.failure is None
    answer = reader.answer()
    assert (answer.status, answer.body, answer.tail, answer.truncated) == (200, BODY, BODY, False)
    assert "x-sum" not in answer.headers and answer.headers.get("Content-Type") is None
    assert reader.is_reusable is (name != "HTTP/1.0")


@pytest.mark.parametrize("end", ["orderly", "broken off"])
@pytest.mark.parametrize("name", WHOLE)
def test_no_beginning_of_a_success_is_one(name: str, end: str) -> None:
    """Cut after any of its bytes, it is no answer."""
    sent = WHOLE[name]
    for cut in range(len(sent)):
        reader = read(sent[:cut], end=end)
        assert not reader.is_whole and reader.failure is not None and reader.is_cut, cut


def test_an_answer_that_ends_with_its_connection() -> None:
    """Whole where the peer ends the connection itself, from the end of its head on; broken where
    the connection breaks off."""
    sent = head(200, "content-type: text/plain") + BODY
    for cut in range(len(sent)):
        assert read(sent[:cut], end="orderly").is_whole is (cut >= len(sent) - len(BODY))
        assert not read(sent[:cut], end="broken off").is_whole
    assert read(sent, end="orderly").answer().body == BODY
    assert not read(sent, end="orderly").is_reusable


@given(st.binary(max_size=300), st.booleans())
def test_nothing_raises(data: bytes, after_a_head: bool) -> None:
    """Whatever comes, it is an answer or a reason."""
    sent = (head(200, "transfer-encoding: chunked") if after_a_head else b"") + data
    for reader in (read(sent, end="orderly"), read(sent, list(range(len(sent))), end="orderly")):
        assert reader.is_over and (reader.failure is None) is reader.is_whole


@pytest.mark.parametrize("status", [300, 404, 409, 500, 503])
def test_a_refusal_is_read_from_its_head(status: int) -> None:
    """Its body may break off, be no packed data, or be too long."""
    cut = read(head(status, "content-length: 100") + b"half", end="broken off").answer()
    assert (cut.status, cut.body) == (status, b"half")
    broken = read(sized(b"no gzip", "content-encoding: gzip", status=status))
    assert broken.is_whole and broken.answer().status == status
    long = read(head(status) + b"x" * (LIMIT + 1))
    assert long.is_whole and long.answer().truncated and not long.is_reusable
    assert not read(head(status)[:-1], end="orderly").is_whole


# --- bounds ---------------------------------------------------------------------------------------


def test_interim_answers_are_counted() -> None:
    """So many are passed over; one more, and no answer is waited for."""
    assert read(head(100) * INTERIM_MOST + sized(BODY)).answer().body == BODY
    flood = read(head(103, "link: x") * (INTERIM_MOST + 1) + sized(BODY))
    assert not flood.is_whole and "interim answers without end" in (flood.failure or "")
    large = head(103, f"link: {'x' * (HEAD_LIMIT // 2)}")
    assert read(large + sized(BODY)).is_whole
    assert "interim answers without end" in (read(large * 2 + sized(BODY)).failure or "")


def test_an_interim_answers_headers_are_not_the_answers() -> None:
    """Those of the answer itself count."""
    found = read(head(103, "retry-after: 9", "location: /elsewhere") + sized(BODY)).answer()
    assert "location" not in found.headers and "retry-after" not in found.headers


def test_a_change_of_protocols_is_no_answer() -> None:
    """Nobody asked for one."""
    reader = read(head(101, "connection: upgrade", "upgrade: websocket") + b"\x81\x00")
    assert "HTTP 101" in (reader.failure or "")


def test_heads_up_to_their_limit() -> None:
    """64 KiB are read; a byte more is refused."""
    for more, whole in ((0, True), (1, False)):
        name, length = "x-long", "content-length: 0"
        value = "v" * (HEAD_LIMIT - len(name) - 4 - len(length) - 2 + more)
        reader = read(head(200, length, f"{name}: {value}"))
        assert reader.is_whole is whole
        assert whole or reader.failure == "the answer's head is longer than 64 KiB"
    for more, whole in ((0, True), (1, False)):
        lines = (f"a{n}: b" for n in range(LINES_MOST - 1 + more))
        reader = read(head(200, "content-length: 0", *lines))
        assert reader.is_whole is whole
        assert whole or reader.failure == "the answer's head has more than 1000 lines"


@pytest.mark.parametrize(
    "begin",
    [
        b"HTTP/1.1 200 ",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nx: ",
        head(200, "transfer-encoding: chunked") + b"1;",
        head(200, "transfer-encoding: chunked") + b"1\r\nx\r\n0\r\nx: ",
    ],
    ids=["status line", "name", "value", "chunk's extension", "trailer"],
)
def test_what_has_no_end_is_left(begin: bytes) -> None:
    """A line without end is not waited for, nor kept."""
    reader = read(begin)
    fed = 0
    while not reader.is_over:
        reader.feed(memoryview(b"a" * 4096))
        fed += 4096
        assert fed <= SILENCE_MOST + 4096
    assert reader.failure is not None


@pytest.mark.parametrize("size", [0, 1, TAIL, TAIL + 1, LIMIT, LIMIT + 1, LIMIT + TAIL, 3 * LIMIT])
@pytest.mark.parametrize("way", ["plain", "chunked", "gzip"])
def test_the_beginning_and_the_end_are_kept(size: int, way: str) -> None:
    """The first MiB, and the last 64 KiB."""
    body = bytes(n * n * 7 % 251 for n in range(1000)) * (size // 1000 + 1)
    body = body[:size]
    match way:
        case "plain":
            sent = sized(body)
        case "chunked":
            sent = chunked(body, 1000)
        case _:
            sent = sized(gzip.compress(body), "content-encoding: gzip")
    answer = read(sent).answer()
    assert answer.body == body[:LIMIT]
    assert answer.truncated is (size > LIMIT)
    # What grows too much is not unpacked to its end.
    assert answer.tail == body[-TAIL:] or (
        way == "gzip" and size > RATIO * 10_000 and not answer.tail
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gzip", "deflate"])
def test_a_bomb_costs_what_it_weighs(form: str) -> None:
    """A thousand times as much unpacked: its first MiB is kept, and the rest passes by; no piece of
    it takes long."""
    packer = zlib.compressobj(9, wbits=31 if form == "gzip" else 15)
    zeros = bytes(1 << 20)
    packed = b"".join([packer.compress(zeros) for _ in range(256)] + [packer.flush()])
    reader = AnswerReader(None)
    sent = sized(packed, f"content-encoding: {form}")
    longest = 0.0
    for at in range(0, len(sent), READ):
        began = time.perf_counter()
        reader.feed(memoryview(sent)[at : at + READ])
        longest = max(longest, time.perf_counter() - began)
    assert reader.is_whole and reader.is_reusable
    answer = reader.answer()
    assert (answer.body == zeros, answer.truncated, answer.tail) == (True, True, b"")
    assert longest < 0.1  # All of it takes half a second.


@pytest.mark.parametrize("coding", ["zstd", "gzip, gzip", "identity", "", "compress"])
def test_what_can_not_be_unpacked_is_left_as_it_is(coding: str) -> None:
    """It is kept as it came."""
    assert read(sized(BODY, f"content-encoding: {coding}")).answer().body == BODY


@pytest.mark.parametrize("form", ["gzip", "deflate"])
def test_a_success_that_is_packed_wrongly_is_none(form: str) -> None:
    """Broken, cut off, or followed by more."""
    packed = gzip.compress(BODY) if form == "gzip" else zlib.compress(BODY)
    for wrong in (b"\x1f\x8b" + packed[5:], packed[:-3], packed + b"more", b"plain text"):
        reader = read(sized(wrong, f"content-encoding: {form}"))
        assert "can't be unpacked" in (reader.failure or "") and not reader.is_whole
    assert read(sized(b"", f"content-encoding: {form}")).answer().body == b""


@pytest.mark.slow
def test_brotli_where_it_is_installed() -> None:
    """Its bombs are bounded likewise."""
    brotli = pytest.importorskip("brotli")
    packed = brotli.compress(BODY)
    assert read(sized(packed, "content-encoding: br")).answer().body == BODY
    assert read(sized(packed[:-2], "content-encoding: br")).failure is not None
    bomb = brotli.compress(bytes(64 << 20))
    found = read(sized(bomb, "content-encoding: br")).answer()
    assert found.truncated and found.body == bytes(LIMIT)


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\ncontent-length: 2\n\n{}",
        b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nx: a\r\n b\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nx: \xe4\x01\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2 \r\n{}\r\n0\r\n\r\n",
    ],
    ids=["LF", "no reason", "a folded header", "no ASCII", "a blank"],
)
def test_servers_that_are_not_strict(sent: bytes) -> None:
    """What is plain is read: the run behind it was made."""
    assert read(sent).answer().body == b"{}"
    assert read(sent, list(range(len(sent)))).answer().body == b"{}"


# --- what else comes ------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [sized(b"[]"), b"garbage", b"\r\n\r\nx", b"HTTP/1.1"], ids=repr)
def test_what_follows_an_answer_spoils_the_connection(more: bytes) -> None:
    """And never the answer, in one piece with it or in the next."""
    reader = read(sized(BODY) + more)
    assert reader.answer().body == BODY and not reader.is_reusable


def test_a_tls_server_is_known_by_its_alert() -> None:
    """What it says to plain HTTP: it has not read a request."""
    reader = read(b"\x15\x03\x01\x00\x02\x02\x46")
    assert reader.is_tls and "write https://" in (reader.failure or "")
    assert not read(b"\x15\x04").is_tls


def test_headers_have_names_in_any_case() -> None:
    """Of one that came twice the first counts."""
    found = read(sized(BODY, "Retry-After: 7", "X-A: 1", "x-a: 2", "empty:")).answer().headers
    assert found["retry-after"] == found.get("RETRY-AFTER") == "7" and "Retry-after" in found
    assert found["x-a"] == "1" and found["Empty"] == "" and found.get("none") is None
    assert len(found) == 4 and set(found) == {"retry-after", "x-a", "empty", "content-length"}
    with contextlib.suppress(KeyError):
        found["none"]
        pytest.fail("it has none")
    assert dict(Headers({"a": "b"})) == {"a": "b"}


def test_the_head_is_announced_once() -> None:
    """When it has come, before the body."""
    heads: list[tuple[int, str | None]] = []
    reader = AnswerReader(lambda status, headers: heads.append((status, headers.get("x"))))
    sent = INTERIM + sized(BODY, "x: y", status=202)
    for at in range(len(sent)):
        assert heads == ([] if at < len(sent) - len(BODY) else [(202, "y")])
        reader.feed(memoryview(sent)[at : at + 1])
    assert reader.is_whole and heads == [(202, "y")]


def test_an_answer_made_by_hand_has_its_tail() -> None:
    """As tests and other protocols make them."""
    assert Answer(200, {}, b"{}", False).tail == b"{}"
    assert Answer(200, {}, b"x" * LIMIT, True).tail == b""
