"""One answer, read from bytes as they come: within bounds, whatever the peer sends.

Owns the parser (httptools, Node's llhttp), what is kept of an answer (its head, the first LIMIT
bytes of its body and the last TAIL), the bounds of a head and of what comes before it, and the
unpacking of compressed bodies. It never sees a socket.

An answer is read to its end, however long it is, as a run may go on while it is being answered; a
refusal (300 and above) ends where enough of it is there. The work that one call of `feed` makes is
proportional to the bytes that it is given, a compressed body included: a body that grows more than
RATIO times past LIMIT is not unpacked any further.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httptools

LIMIT = 1 << 20
"""Bytes of a body that are kept of its beginning."""
TAIL = 1 << 16
"""Bytes of a body that are kept of its end: a stream says there how it ended."""
HEAD_LIMIT = 1 << 16
"""Bytes of an answer's headers, its trailers included."""
LINES_MOST = 1000
"""Headers, those of interim answers and trailers included: each costs more than its bytes do."""
INTERIM_MOST = 20
"""Interim answers (100, 102, 103) before the answer, which together have HEAD_LIMIT bytes at most.
"""
SILENCE_MOST = 3 * HEAD_LIMIT
"""Bytes without any of a body in them: a head with its interim answers is shorter."""
RATIO = 32
"""Beyond LIMIT, a body is unpacked as long as it has no more than this many times the bytes that
came for it."""
PIECE = 1 << 16
"""Bytes that are unpacked at once."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    """By names in any case; of a header that came twice, the first."""
    body: bytes
    """Its first bytes, at most LIMIT; unpacked."""
    truncated: bool
    """Whether more came than `body` has."""
    tail: bytes = b""
    """Its last bytes, at most TAIL. Empty if they are not known: a body that was cut off, or not
    unpacked to its end."""

    def __post_init__(self) -> None:
        if not self.truncated and not self.tail:
            object.__setattr__(self, "tail", self.body[-TAIL:])


class Headers(Mapping[str, str]):
    """Headers by their names, in any case."""

    __slots__ = ("_fields",)

    def __init__(self, fields: dict[str, str]) -> None:
        """`fields`: by names in lower case."""
        self._fields = fields

    def __getitem__(self, name: str) -> str:
        return self._fields[name.lower()]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return f"Headers({self._fields!r})"


class _Stop(Exception):
    """Ends the parser's work on the bytes at hand."""


class AnswerReader:
    """Reads one answer. `feed` takes its bytes, and never raises."""

    __slots__ = (
        "_body",
        "_fields",
        "_head_size",
        "_interim",
        "_interim_size",
        "_is_tunnel",
        "_late",
        "_lines",
        "_on_head",
        "_packed",
        "_parser",
        "_silence",
        "failure",
        "has_head",
        "headers",
        "is_cut",
        "is_reusable",
        "is_tls",
        "is_whole",
        "size",
        "status",
    )

    def __init__(
        self, on_head: Callable[[int, Mapping[str, str]], None] | None, is_tunnel: bool = False
    ) -> None:
        """`on_head(status, headers)` is called once, when the head of the answer has come.
        `is_tunnel`: the answer to CONNECT, which is nothing but a head.
        """
        self._parser: Any = httptools.HttpResponseParser(self)
        # Old servers end lines with LF alone, fold headers, and put blanks behind a chunk's size.
        # Nobody reads the answer after us, who could read it otherwise.
        self._parser.set_dangerous_leniencies(
            lenient_headers=True,
            lenient_optional_cr_before_lf=True,
            lenient_spaces_after_chunk_size=True,
        )
        self._on_head = on_head
        self._is_tunnel = is_tunnel
        self._fields: dict[str, str] = {}
        self._head_size = self._lines = self._interim = self._interim_size = self._silence = 0
        self._body = bytearray()
        self._late: bytearray | None = None
        self._packed: Packed | None = None
        self.status = 0
        self.headers = Headers(self._fields)
        self.size = 0
        """Bytes fed."""
        self.has_head = False
        self.is_whole = False
        """Whether nothing more is read."""
        self.is_reusable = False
        """Whether the connection can carry another request, so far."""
        self.is_tls = False
        """Whether a TLS server speaks, which has taken the request for a broken handshake."""
        self.is_cut = False
        """Whether it failed as the connection ended."""
        self.failure: str | None = None
        """Why no answer will come."""

    @property
    def is_over(self) -> bool:
        return self.is_whole or self.failure is not None

    def feed(self, data: memoryview) -> None:
        """Read on. Bytes past the answer's end are not read."""
        if not data or self.is_over:
            return
        had_head = self.has_head
        if not self.size and bytes(data[:2]) == b"\x15\x03":
            self.is_tls = True
            self.failure = (
                "the port speaks TLS, and no plain HTTP: write https:// in the address "
                "(RECALL_RUN_URL)"
            )
            return
        self.size += len(data)
        self._silence += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            # Something follows the answer; or it is that to CONNECT, behind which HTTP ends.
            self.is_reusable = self._is_tunnel and self.status < 300
            if not self.is_over:
                what = str(error.args[0] if error.args else "").partition("\n")[0][:100]
                self.failure = f"the answer is no HTTP: {what or 'malformed'}"
        if self._silence > SILENCE_MOST and not self.is_over:
            self.failure = f"the answer's head is longer than {HEAD_LIMIT >> 10} KiB"
        if self.has_head and not had_head and self._on_head is not None:
            self._on_head(self.status, self.headers)

    def end(self, orderly: bool) -> None:
        """The peer sends nothing more. `orderly`: it said so itself, and nothing is missing."""
        if self.is_over:
            self.is_reusable = False
        elif orderly and self.has_head and self._ends_with_connection():
            self._complete()
        elif self.has_head and self.status >= 300:
            # A refusal says enough with its head.
            self.is_whole = True
        elif self.has_head and self._ends_with_connection():
            self.failure, self.is_cut = "the answer has no length, and no end of its own", True
        else:
            self.failure, self.is_cut = "the server hung up", True

    def close(self) -> None:
        """Read no more. The parser refers to this object: neither is to wait for a collection."""
        self._parser = None

    def answer(self) -> Answer:
        """What was read. Only of an answer that has its head."""
        if self._late is None:
            return Answer(self.status, self.headers, bytes(self._body), False)
        late = bytes(self._late[-TAIL:])
        if self._packed is not None and self._packed.is_left:
            late = b""
        elif len(late) < TAIL:
            late = bytes(self._body[len(late) - TAIL :]) + late
        return Answer(self.status, self.headers, bytes(self._body), True, late)

    # --- called by the parser ---------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.is_whole:
            raise _Stop  # A second answer to one request.
        self._head_size = 0
        self._fields.clear()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value) + 4
        self._lines += 1
        if self._head_size > HEAD_LIMIT:
            self.failure = f"the answer's head is longer than {HEAD_LIMIT >> 10} KiB"
            raise _Stop
        if self._lines > LINES_MOST:
            self.failure = f"the answer's head has more than {LINES_MOST} lines"
            raise _Stop
        if not self.has_head:  # Trailers are passed over.
            self._fields.setdefault(
                name.decode("latin-1").lower(), value.decode("utf-8", "replace").strip()
            )

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self._pass_over(status)
            return
        self.status, self.has_head = status, True
        if self._is_tunnel:
            self.is_whole = True
            raise _Stop
        if "content-encoding" in self._fields:
            self._packed = Packed.of(self._fields["content-encoding"])

    def on_body(self, data: bytes) -> None:
        self._silence = 0
        if self._packed is None:
            self._keep(data)
            return
        for piece in self._packed.unpacked(data):
            self._keep(piece)

    def on_message_complete(self) -> None:
        if self.has_head:
            self.is_reusable = self._parser.should_keep_alive()
            self._complete()

    # ----------------------------------------------------------------------------------------------

    def _pass_over(self, status: int) -> None:
        """An interim answer is none. Without end they would keep the connection, and the loop."""
        self._interim += 1
        self._interim_size += self._head_size
        if status == 101:
            self.failure = "the server changes the protocol, which nobody asked for (HTTP 101)"
        elif self._interim > INTERIM_MOST or self._interim_size > HEAD_LIMIT:
            self.failure = "interim answers without end (HTTP 100, 103), and no answer"
        if self.failure is not None:
            raise _Stop

    def _keep(self, data: bytes) -> None:
        room = LIMIT - len(self._body)
        if self._late is None and len(data) <= room:
            self._body += data
            return
        if self._late is None:
            self._body += data[:room]
            self._late = bytearray()
            data = data[room:]
        self._late += data
        if len(self._late) > 2 * TAIL:
            del self._late[:-TAIL]
        if self.status >= 300:
            # Nothing runs any more: enough was read.
            self.is_whole = True
            raise _Stop

    def _complete(self) -> None:
        if self._packed is not None and not self._packed.is_complete and self.status < 300:
            self.failure = "the answer is compressed, and can't be unpacked whole"
            self.is_reusable = False
            return
        self.is_whole = True

    def _ends_with_connection(self) -> bool:
        """Whether the body has no other end than that of the connection (RFC 9112 6.3)."""
        coding = self._fields.get("transfer-encoding", "").lower()
        return "content-length" not in self._fields and "chunked" not in coding


class Packed:
    """A compressed body, unpacked as it comes."""

    __slots__ = ("_arrived", "_form", "_inflate", "_made", "is_broken", "is_left")

    def __init__(self, form: str) -> None:
        self._form = form
        self._inflate: Any = None
        self._arrived = self._made = 0
        self.is_left = False
        """Whether it grew too much, and its rest is read without being unpacked."""
        self.is_broken = False

    @classmethod
    def of(cls, coding: str) -> Packed | None:
        """None for what is not packed, or in a form that can't be unpacked: it is kept as it is."""
        form = coding.strip().lower()
        return cls(form) if form in _FORMS or (form == "br" and _brotli() is not None) else None

    @property
    def is_complete(self) -> bool:
        """Whether the packed data had its end, or was left."""
        if self._inflate is None or self.is_left:
            return not self.is_broken
        return not self.is_broken and self._ended()

    def unpacked(self, data: bytes) -> Iterator[bytes]:
        """The next pieces of the body, at most PIECE bytes each."""
        self._arrived += len(data)
        if self.is_left or self.is_broken:
            return
        try:
            if self._inflate is None:
                self._inflate = self._begun(data)
            for piece in self._brotlied(data) if self._form == "br" else self._inflated(data):
                self._made += len(piece)
                yield piece
                if self._made > max(LIMIT, RATIO * self._arrived):
                    self.is_left, self._inflate = True, None
                    return
        except (zlib.error, _brotli_error()):
            self.is_broken = True

    def _begun(self, data: bytes) -> Any:
        if self._form == "br":
            return _brotli().Decompressor()
        if self._form == "deflate" and data[0] & 15 != 8:
            # RFC 9110's deflate is zlib's form; many send the bare one, whose first byte differs.
            return zlib.decompressobj(-zlib.MAX_WBITS)
        return zlib.decompressobj(zlib.MAX_WBITS | 32)

    def _inflated(self, data: bytes) -> Iterator[bytes]:
        while data and not self._inflate.eof:
            piece = self._inflate.decompress(data, PIECE)
            data = self._inflate.unconsumed_tail
            if piece:
                yield piece
        if self._inflate.eof and self._inflate.unused_data:
            self.is_broken = True  # Something follows the end.

    def _brotlied(self, data: bytes) -> Iterator[bytes]:
        piece = self._inflate.process(data, output_buffer_limit=PIECE)
        while piece:
            yield piece
            if self._inflate.can_accept_more_data():
                return
            piece = self._inflate.process(b"", output_buffer_limit=PIECE)

    def _ended(self) -> bool:
        return bool(self._inflate.is_finished() if self._form == "br" else self._inflate.eof)


_FORMS = frozenset({"gzip", "x-gzip", "deflate"})


def _brotli() -> Any:
    """The package `brotli`, if it is installed and can bound what it unpacks (1.2)."""
    try:
        import brotli
    except ImportError:
        return None
    return brotli if hasattr(brotli.Decompressor, "can_accept_more_data") else None


def _brotli_error() -> type[Exception]:
    found = _brotli()
    return zlib.error if found is None else found.error
