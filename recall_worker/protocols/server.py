"""A small HTTP server: a request comes in whole, an answer goes out whole. For the pages of
RECALL_OPS_LISTEN and for `reference-api`.

Owns one connection: its parser, its limits, the order of requests on it, and the end of a handler
whose caller has disconnected. It does not listen, knows no routes, and reads no settings.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from .answer import Headers

HEAD_MOST = 1 << 13
IDLE_MOST = 75.0
"""Seconds for which a connection is kept that is not used."""
WAITING_MOST = 16
"""Requests that may be sent before the first of them is answered."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Request:
    method: str
    path: str
    """As it was sent, percent-encoded, without the query."""
    headers: Mapping[str, str]
    body: bytes
    is_last: bool
    """Whether its connection ends with its answer."""
    names: dict[str, str] = field(default_factory=dict)
    """The names in its path, by what they stand for: for those who know routes."""


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.body.decode()


Handler = Callable[[Request], Awaitable[Reply]]


class _Refused(Exception):
    """A request that is not read any further."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class ServerConnection(asyncio.Protocol):
    """One connection of a client. `handler` is called for each request, one after the other."""

    def __init__(self, handler: Handler, *, head_most: int = HEAD_MOST, body_most: int = 0) -> None:
        """`head_most`: octets of a request's line and headers. `body_most`: of its body; 0: no body
        is read, a request is answered when its head is there, and is the connection's last."""
        self._handler = handler
        self._head_most, self._body_most = head_most, body_most
        self._parser: Any = httptools.HttpRequestParser(self)
        self._url = bytearray()
        self._fields: dict[str, str] = {}
        self._body = bytearray()
        self._head_size = 0
        self._is_in_body = self._is_over = False
        self._waiting: deque[Request] = deque()
        self.task: asyncio.Task[None] | None = None
        """Answers what has come; None if nothing waits."""
        self._timer: asyncio.TimerHandle | None = None

    def abort(self) -> None:
        """Hang up."""
        self._transport.abort()

    def close(self) -> None:
        """Hang up once what was written has been sent."""
        self._transport.close()

    # --- called by the event loop -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self._is_over:
            return
        if not self._is_in_body:
            self._head_size += len(data)
        try:
            self._parser.feed_data(data)
            if not self._is_in_body and self._head_size > self._head_most:
                raise _Refused(400, "the head is too long")
        except httptools.HttpParserUpgrade:
            self._is_over = True  # Of what it wants to change to, nothing is known here.
        except httptools.HttpParserError as error:
            cause = error.__context__
            refused = cause if isinstance(cause, _Refused) else _Refused(400, "this is no HTTP")
            self._refuse(refused)
        except _Refused as refused:
            self._refuse(refused)

    def connection_lost(self, _: Exception | None) -> None:
        self._is_over = True
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self.task is not None:
            self.task.cancel()
        self._parser = None

    # --- called by the parser ---------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._url.clear()
        self._body.clear()
        self._fields = {}

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.setdefault(
            name.decode("latin-1").lower(), value.decode("utf-8", "surrogateescape")
        )

    def on_headers_complete(self) -> None:
        self._is_in_body, self._head_size = True, 0
        self.head_was_read()
        if not self._body_most:
            self._take(is_last=True)
        elif self._fields.get("expect", "").lower() == "100-continue" and self.task is None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        if not self._body_most:
            return
        self._body += data
        if len(self._body) > self._body_most:
            raise _Refused(413, "the body is too long")

    def on_message_complete(self) -> None:
        self._is_in_body = False
        if self._body_most:
            goes_on = self._parser.should_keep_alive() and not self._parser.should_upgrade()
            self._take(is_last=not goes_on)

    def head_was_read(self) -> None:
        """Called when the whole head of a request has been read."""

    # ----------------------------------------------------------------------------------------------

    def _take(self, *, is_last: bool) -> None:
        if self._is_over:
            return
        url = self._url.decode("utf-8", "surrogateescape")
        path = url.partition("?")[0] if url.startswith("/") else urlsplit(url).path or url
        method = self._parser.get_method().decode()
        self._waiting.append(
            Request(method, path, Headers(self._fields), bytes(self._body), is_last)
        )
        self._is_over = is_last
        if len(self._waiting) > WAITING_MOST:
            raise _Refused(400, "more requests than were answered")
        if self._timer is not None:
            self._timer.cancel()
        if self.task is None:
            self.task = asyncio.get_running_loop().create_task(self._answer())

    async def _answer(self) -> None:
        try:
            while self._waiting:
                request = self._waiting.popleft()
                try:
                    reply = await self._handler(request)
                except Exception:
                    logger.exception("a request failed")
                    reply = Reply(500, b"internal error\n", {"Content-Type": "text/plain"})
                self._write(reply, has_body=request.method != "HEAD", is_last=request.is_last)
        finally:
            self.task = None
        if not self._transport.is_closing():
            self._wait()

    def _write(self, reply: Reply, *, has_body: bool, is_last: bool) -> None:
        fields = {
            "Content-Length": str(len(reply.body)),
            "Date": formatdate(usegmt=True),
            "Server": "recall-worker",  # And not which versions of what.
            "Connection": "close" if is_last else "keep-alive",
        }
        if reply.status == 204:
            del fields["Content-Length"]
        fields |= reply.headers
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        head = f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}\r\n{lines}\r\n"
        self._transport.write(head.encode() + (reply.body if has_body else b""))
        if is_last:
            self._transport.close()

    def _refuse(self, refused: _Refused) -> None:
        """Answer what can't be read, behind the requests that could."""
        self._is_over = True
        if self.task is None:
            reply = Reply(refused.status, f"{refused}\n".encode(), {"Content-Type": "text/plain"})
            self._write(reply, has_body=True, is_last=True)
        else:
            self._transport.close()

    def _wait(self) -> None:
        """A connection that is not used is closed after a while."""
        self._timer = asyncio.get_running_loop().call_later(IDLE_MOST, self.abort)
