"""One connection to a server: bytes out, bytes in, and the moment at which the first one leaves.

Owns sockets, TLS, and the order of things on a connection: is it still alive, was anything said on
it that nobody asked for, has a byte of the request left, has all of it, is an answer there before
that. It knows these by itself, as it is the one who writes; no library stands in between.

No peer may hold the event loop. Each turn of the loop reads at most READ bytes of a connection, and
what is long is read in a lane: one connection at a time, and all of them together get a fraction of
the loop (Lane). A peer that disappears silently is noticed within a minute, by TCP keepalive
probes: a run may take half an hour.

Never here: which connection a request gets, what is in it, and what an answer means (http).
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from .answer import AnswerReader

PROBE_AFTER, PROBE_EVERY, PROBES = 30, 10, 3
"""Seconds of silence after which the other end is probed, seconds between two probes, and how many
go unanswered.
"""
PIECE = 1 << 16
"""Bytes of a long body that are written at once."""
READ = 1 << 14
"""Bytes of a connection that are read in one turn of the loop. An answer that is longer is read in
the lane from there on."""
LANE_SHARE = 4
"""All long answers together get one part in so many of the loop's time."""
LANE_TURN = 0.0002
"""Seconds between two connections' turns, where several wait."""
RESCUED_MOST = 1 << 20
"""Bytes that are still read of a connection on which nothing can be written any more."""
NEXT_ADDRESS_AFTER = 0.25
"""Seconds after which the next address of a host is tried beside the last (RFC 8305)."""
TLS_FAREWELL = 1.0
"""Seconds that a server gets to answer the end of a TLS connection."""
SETTLE_TURNS = 6
"""Turns of the loop in which TLS may take in what has arrived on it, such as session tickets."""

Address = tuple[Any, ...]
"""As getaddrinfo gives them."""


class Broken(Exception):
    """No answer will come over this connection."""

    def __init__(
        self, reason: str, cause: BaseException | None, *, is_break: bool, is_unread: bool
    ) -> None:
        """`is_break`: the connection ended. `is_unread`: the server can't have read the request,
        although bytes of it have left."""
        super().__init__(reason)
        self.reason, self.cause, self.is_break, self.is_unread = reason, cause, is_break, is_unread


class Lane:
    """Where long answers are read, in turn: so that all of them together leave the loop to others.

    Each read is paid for by a pause of LANE_SHARE - 1 times as long, whoever reads next.
    """

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(READ))
        """All connections read into it: what was read is used up before another one reads."""
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Connection] = deque()
        self._free_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def room(self, size: int) -> memoryview:
        """The buffer, with room for so many bytes."""
        if size > len(self.buffer):
            self.buffer = memoryview(bytearray(size))
        return self.buffer

    def queue(self, connection: Connection, began: float) -> None:
        """A connection in the lane has read, since `began`: its next turn comes after others'."""
        now = self._loop.time()
        self._free_at = max(self._free_at, began) + (now - began) * LANE_SHARE
        connection.pause()
        self._waiting.append(connection)
        if self._timer is None:
            self._timer = self._loop.call_at(self._free_at, self._turn)

    def _turn(self) -> None:
        self._timer = None
        now = self._loop.time()
        if self._free_at <= now:
            self._free_at = now + LANE_TURN
            while self._waiting and not self._waiting.popleft().resume():
                pass
        if self._waiting:
            self._timer = self._loop.call_at(self._free_at, self._turn)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._waiting.clear()


class Connection(asyncio.BufferedProtocol):
    """An open connection, which carries one request at a time."""

    __slots__ = (
        "_backlog",
        "_can_write",
        "_ended",
        "_lane",
        "_on_lost",
        "_poll",
        "_reader",
        "_transport",
        "cause",
        "idle_since",
        "is_open",
        "is_secure",
        "served",
    )

    def __init__(self, lane: Lane, on_lost: Callable[[Connection], None]) -> None:
        self._lane = lane
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._poll = select.poll()
        self._reader: AnswerReader | None = None
        self._backlog = memoryview(b"")
        """What TLS has passed on, and was not read yet."""
        self._ended: asyncio.Future[None] | None = None
        """Done when the answer is over, or the connection is."""
        self._can_write: asyncio.Future[None] | None = None
        """Set while more was written than the peer has read; done when writing can go on, or need
        not."""
        self.cause: BaseException | None = None
        """The error that ended it, if one did."""
        self.is_open = False
        self.is_secure = False
        self.served = 0
        """Requests that it has carried."""
        self.idle_since = 0.0

    def start(self, transport: asyncio.BaseTransport, *, secure: bool) -> None:
        """`transport`: from now on, what is written goes this way."""
        self._transport = cast(asyncio.Transport, transport)
        self.is_secure = secure

    def is_quiet(self) -> bool:
        """Whether it is open, and nothing arrives on it: what arrives before a request is no answer
        to it, or the end."""
        return self.is_open and not self._poll.poll(0)

    async def settle(self) -> bool:
        """The same, where TLS gets the turns to take in messages of its own."""
        for _ in range(SETTLE_TURNS if self.is_secure else 0):
            await asyncio.sleep(0)
            if not self.is_open or self.is_quiet():
                break
        return self.is_quiet()

    async def exchange(
        self,
        reader: AnswerReader,
        head: bytes,
        body: list[bytes | memoryview],
        on_written: Callable[[], None] | None = None,
    ) -> bool:
        """Write a request and read its answer. Returns whether the connection can be used again.

        `body` is emptied while it is written. An answer that is whole before all of the body was
        written ends the writing. Raises Broken where no answer comes; the answer of a refusal whose
        body breaks off is one.
        """
        if self._transport is None:
            raise Broken("the server hung up", self.cause, is_break=True, is_unread=False)
        self._reader = reader
        self._ended = asyncio.get_running_loop().create_future()
        self.served += 1
        try:
            is_written = await self._write(head, body)
            if is_written and on_written is not None:
                on_written()
            await self._ended
        except BaseException:
            self.abort()
            raise
        finally:
            self._reader = self._ended = None
            reader.close()
        if reader.failure is not None:
            self.abort()
            raise Broken(
                reader.failure,
                self.cause if reader.is_cut else None,
                is_break=reader.is_cut,
                is_unread=self._is_unread(reader),
            )
        return is_written and self.is_open and reader.is_reusable

    async def _write(self, head: bytes, body: list[bytes | memoryview]) -> bool:
        """Write a request; False if its answer, or the end, came before all of it was written.

        Written pieces are released, as the run may go on for long. A long one is written as fast as
        the server reads it, and is never copied whole into a buffer."""
        assert self._transport is not None and self._ended is not None
        if sum(map(len, body)) <= PIECE:
            self._transport.write(b"".join((head, *body)) if body else head)
            body.clear()
        else:
            self._transport.write(head)
        body.reverse()
        while body:
            piece = memoryview(body.pop())
            for start in range(0, len(piece), PIECE):
                # A turn, in which an answer is read that is there already.
                await asyncio.sleep(0)
                if self._can_write is not None:
                    await self._can_write
                if self._ended.done() or self._transport.is_closing():
                    body.clear()
                    return False
                self._transport.write(piece[start : start + PIECE])
        if self._can_write is not None:
            await self._can_write
            return not self._ended.done()
        return True

    def _is_unread(self, reader: AnswerReader) -> bool:
        """Whether what was sent can't have been read as a request: a TLS server has read it as a
        broken handshake, or has refused the handshake of which it was the end. In TLS 1.3 a client
        learns only then that its certificate, or the lack of one, was refused."""
        return reader.is_tls or (
            self.served == 1
            and not reader.size
            and isinstance(self.cause, ssl.SSLError)
            and is_refusal(self.cause)
        )

    def pause(self) -> None:
        if self.is_open and self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> bool:
        """Read on; False if there is nothing more to read."""
        if not self.is_open or self._transport is None or self._transport.is_closing():
            return False
        if self._backlog:
            self._read(self._backlog)
            if self._reader is not None and not self._reader.is_over:
                return True  # It is in the lane again.
        self._transport.resume_reading()
        return True

    def abort(self) -> None:
        """Hang up, at once."""
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def _end(self) -> None:
        """The answer is over."""
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
        self.resume_writing()

    # --- called by the event loop -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.start(transport, secure=transport.get_extra_info("ssl_object") is not None)
        self.is_open = True
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def get_buffer(self, pending: int) -> memoryview:
        # Behind TLS there has to be room for all that is pending: asyncio passes on no more once
        # the peer has hung up (`_do_flush`), and drops the rest.
        return self._lane.room(pending) if self.is_secure else self._lane.buffer[:READ]

    def buffer_updated(self, count: int) -> None:
        if count > READ:
            self._read(memoryview(bytes(self._lane.buffer[:count])))
        else:
            self._read(self._lane.buffer[:count])

    def eof_received(self) -> bool:
        self.is_open = False
        if self._reader is not None:
            self._reader.feed(self._backlog)
            self._reader.end(orderly=self._has_taken_leave())
            self._end()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self.cause = error
        reader = self._reader
        if reader is not None:
            reader.feed(self._backlog)
            if error is not None and not self.is_secure:
                self._rescue(reader)
            reader.end(orderly=False)
        self._end()
        # The transport and the reader refer to this object: they are not to wait for a collection.
        self._transport = None
        self._on_lost(self)

    def pause_writing(self) -> None:
        if self._can_write is None:
            self._can_write = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        waiting, self._can_write = self._can_write, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    # ----------------------------------------------------------------------------------------------

    def _read(self, data: memoryview) -> None:
        """Have the answer read of this as much as one turn of the loop may take."""
        reader = self._reader
        if reader is None or reader.is_over:
            # Nobody has asked for anything.
            if reader is not None:
                reader.is_reusable = False
            self.abort()
            return
        began = time.monotonic()
        reader.feed(data[:READ])
        self._backlog = data[READ:]
        if reader.is_over:
            reader.is_reusable = reader.is_reusable and not self._backlog
            self._end()
        elif reader.size > READ or self._backlog:
            self._lane.queue(self, began)

    def _rescue(self, reader: AnswerReader) -> None:
        """Read what the peer had said before writing to it failed. A server that refuses a long
        request answers it, and hangs up on the rest of it."""
        assert self._transport is not None
        number = self._transport.get_extra_info("socket").fileno()
        try:
            while not reader.is_over and reader.size < RESCUED_MOST:
                data = os.read(number, READ)
                if not data:
                    reader.end(orderly=True)
                    break
                reader.feed(memoryview(data))
        except OSError:
            pass  # Nothing more is there.

    def _has_taken_leave(self) -> bool:
        """Whether the end of what was received is the peer's own: behind TLS, an end that somebody
        else could have made is none."""
        if not self.is_secure or self._transport is None:
            return True
        try:
            return not self._transport.get_extra_info("ssl_object").read(1)
        except ssl.SSLZeroReturnError:
            return True
        except (ssl.SSLError, ValueError):
            return False


# --- connecting -----------------------------------------------------------------------------------


class Unreachable(Exception):
    """No connection was made. `is_secure`: it was there, and TLS on it failed."""

    def __init__(self, cause: BaseException, *, is_secure: bool) -> None:
        super().__init__()
        self.cause, self.is_secure = cause, is_secure


async def dial(
    made: Callable[[], Connection], addresses: list[Address], tls: ssl.SSLContext | None, name: str
) -> Connection:
    """A connection to the first address that takes it. `tls`: then the server has to prove that it
    is `name`. Raises Unreachable."""
    loop = asyncio.get_running_loop()
    try:
        sock = await _first(addresses)
    except OSError as error:
        raise Unreachable(error, is_secure=False) from None
    try:
        _, connection = await loop.create_connection(
            made,
            sock=sock,
            ssl=tls,
            server_hostname=name if tls is not None else None,
            ssl_shutdown_timeout=TLS_FAREWELL if tls is not None else None,
        )
    except OSError as error:
        raise Unreachable(error, is_secure=True) from None
    except BaseException:
        sock.close()
        raise
    return connection


async def secure(connection: Connection, tls: ssl.SSLContext, name: str) -> None:
    """Begin TLS on a connection that is open, behind a proxy. Raises Unreachable."""
    plain = connection._transport
    assert plain is not None
    try:
        transport = await asyncio.get_running_loop().start_tls(
            plain, connection, tls, server_hostname=name, ssl_shutdown_timeout=TLS_FAREWELL
        )
    except OSError as error:
        raise Unreachable(error, is_secure=True) from None
    if transport is None or not connection.is_open:
        raise Unreachable(ConnectionResetError(), is_secure=True)
    connection.start(transport, secure=True)
    connection.served = 0


async def _first(addresses: list[Address]) -> socket.socket:
    """A socket that is connected to one of the addresses: each is tried a while after the last, or
    at once where that has failed (RFC 8305). Raises OSError, the first."""
    waiting = _interleaved(addresses)
    trying: set[asyncio.Task[socket.socket]] = set()
    errors: list[OSError] = []
    try:
        while waiting or trying:
            if waiting:
                trying.add(asyncio.create_task(_connected(waiting.pop(0))))
            done, trying = await asyncio.wait(
                trying,
                timeout=NEXT_ADDRESS_AFTER if waiting else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in done:
                error = task.exception()
                if error is None:
                    trying |= done - {task}
                    return task.result()
                if not isinstance(error, OSError):
                    raise error
                errors.append(error)
        raise errors[0] if errors else OSError("the name has no address")
    finally:
        for task in trying:
            task.cancel()
            task.add_done_callback(_closed)


def _closed(task: asyncio.Task[socket.socket]) -> None:
    """A connection that came too late is not used."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


async def _connected(address: Address) -> socket.socket:
    made = _socket(address)
    try:
        await asyncio.get_running_loop().sock_connect(made, address[4])
    except BaseException:
        made.close()
        raise
    return made


def _interleaved(addresses: list[Address]) -> list[Address]:
    """The addresses, the families in turn, beginning with that of the first."""
    families: dict[Any, list[Address]] = {}
    for address in addresses:
        families.setdefault(address[0], []).append(address)
    turns = max(map(len, families.values()), default=0)
    return [one[turn] for turn in range(turns) for one in families.values() if turn < len(one)]


def _socket(address: Address) -> socket.socket:
    """A socket that notices when its peer is gone: a run may be silent for half an hour, but its
    host answers keepalive probes.
    """
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", PROBE_AFTER),
        ("TCP_KEEPINTVL", PROBE_EVERY),
        ("TCP_KEEPCNT", PROBES),
        ("TCP_USER_TIMEOUT", (PROBE_AFTER + PROBES * PROBE_EVERY) * 1000),
    ):
        if hasattr(socket, name):  # Not every system has all of them.
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made


# --- what TLS says --------------------------------------------------------------------------------

REFUSALS = frozenset(
    {
        "BAD_CERTIFICATE",
        "CERTIFICATE_EXPIRED",
        "CERTIFICATE_REQUIRED",
        "CERTIFICATE_REVOKED",
        "CERTIFICATE_UNKNOWN",
        "UNKNOWN_CA",
        "UNSUPPORTED_CERTIFICATE",
    }
)
"""Alerts by which a server says that it does not take the client's certificate (RFC 8446 6.2)."""
NO_TLS = frozenset(
    {
        "HTTP_REQUEST",
        "HTTPS_PROXY_REQUEST",
        "PACKET_LENGTH_TOO_LONG",
        "RECORD_LAYER_FAILURE",
        "UNKNOWN_PROTOCOL",
        "WRONG_VERSION_NUMBER",
    }
)
"""OpenSSL's words for an answer that is no TLS, in its several versions."""


def is_refusal(error: ssl.SSLError) -> bool:
    return (error.reason or "").partition("ALERT_")[2] in REFUSALS


def tls_reason(error: BaseException, has_certificate: bool) -> str | None:
    """Why TLS failed, and what helps; None if the error is none of TLS. `has_certificate`: whether
    this client has one."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not trusted: {error.verify_message or error.reason}"
    if not isinstance(error, ssl.SSLError):
        return None
    reason = error.reason or "no reason"
    alert = reason.partition("ALERT_")[2].lower().replace("_", " ")
    if reason in NO_TLS:
        return (
            "the port speaks no TLS: if it is one for plain HTTP, write http:// in the address "
            "(RECALL_RUN_URL)"
        )
    if is_refusal(error) and has_certificate:
        return f"the server refuses the client certificate ({alert}): see RECALL_CLIENT_CERT_FILE"
    if is_refusal(error):
        return (
            f"the server wants a client certificate ({alert}): set RECALL_CLIENT_CERT_FILE and "
            "RECALL_CLIENT_KEY_FILE"
        )
    if alert == "handshake failure" and not has_certificate:
        return (
            "the server refuses the TLS handshake (handshake failure): it may want a client "
            "certificate (RECALL_CLIENT_CERT_FILE)"
        )
    return f"TLS failed: {alert or reason.lower().replace('_', ' ')}"
