"""The probes of `check-endpoint`: calls to a run endpoint as the worker makes them, over a plain
HTTP client, counted and timed.

Owns what is sent, the limit on requests, and what can be known of a run from outside: when it was
requested, until when it was known to run, when it was seen to have ended. Answers are read by the
worker's own table. Nothing is kept between two requests: no connection, no cookie; no redirect is
followed, nothing unpacked, and no answer read further than the worker would.

Never here: what an API should have done (check).
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from statistics import median
from typing import Any, Self

import httpx

from ..protocols import traceparent
from ..protocols.contract import address, bearer, headers, read, retry_after, same_origin
from ..protocols.http import CONNECT_DEADLINE, LIMIT, Answer, trust
from ..protocols.native import accepted, polled, written
from ..protocols.polling import StillOn
from ..recall import (
    Accepted,
    Answered,
    Busy,
    Failed,
    Misconfigured,
    Outcome,
    Unavailable,
    Unknown,
    name_of,
)
from ..settings import Settings

MESSAGE = "recall-worker check-endpoint: a harmless probe; answer anything"
REQUESTS = 58
"""The most requests of one check."""
PATIENCE = 5.0
"""Seconds: a longer Retry-After, or pause between polls, is cut to this."""


@dataclass(frozen=True, slots=True)
class Reply:
    """How one request was answered. Instants are monotonic; `sent_at`: when the whole request was
    sent.
    """

    key: str
    sent_at: float
    ended_at: float
    outcome: Outcome
    answer: Answer | None

    @property
    def status(self) -> int | None:
        return self.answer.status if self.answer is not None else None

    @property
    def got_in(self) -> bool:
        """Whether the answer says that a run was started (or replayed)."""
        return (
            self.status is not None
            and 200 <= self.status < 300
            and not isinstance(self.outcome, Misconfigured)
        )

    @property
    def is_replay(self) -> bool:
        return self.answer is not None and self.answer.headers.get(
            "Idempotent-Replayed", ""
        ).strip().lower() in ("true", "?1")

    @property
    def document(self) -> Any:
        try:
            return (
                json.loads(self.answer.body)
                if self.answer is not None and self.answer.body.strip()
                else None
            )
        except (ValueError, RecursionError):
            return self.answer.body if self.answer is not None else None

    def __str__(self) -> str:
        if self.answer is None:
            return str(getattr(self.outcome, "reason", "no answer"))
        return f"HTTP {self.answer.status} (read as {name_of(self.outcome)})"


@dataclass(frozen=True, slots=True)
class Run:
    """An accepted call, and its run."""

    reply: Reply
    outcome: Outcome
    ended_at: float | None
    """When it was seen to have ended; None: never."""
    on_until: float
    """When it was last known to be running."""

    @property
    def length(self) -> float | None:
        return None if self.ended_at is None else self.ended_at - self.reply.sent_at


@dataclass(slots=True)
class Flight:
    """An open call. `gone` is set when the request has been sent, or never will be."""

    key: str
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    sent_at: float = 0.0
    task: asyncio.Task[Reply] | None = None


class Spent(Exception):
    """The limit of requests is used up."""


class Probes:
    """Probes of one endpoint, in one session. An async context that closes its connections; needs a
    running event loop.
    """

    def __init__(self, settings: Settings, session: str, timeout: float) -> None:
        """`timeout`: seconds that a request, and a run, may take."""
        assert settings.run_url is not None
        self.made = 0
        self.lengths: list[float] = []
        """Seconds that runs took which had the session to themselves."""
        self.replies: list[Reply] = []
        """To calls, not to polls."""
        self.followed: list[Run] = []
        """Runs that were accepted."""
        self._settings, self._template, self._session, self._timeout = (
            settings,
            settings.run_url,
            session,
            timeout,
        )
        self._name = f"check-endpoint-{secrets.token_hex(4)}"
        self._began = datetime.now(UTC)
        self._keys = 0
        self._lost = False
        """Whether an accepted run did not end in time: then no other is waited for so long."""
        self._http = httpx.AsyncClient(
            verify=trust(settings),
            timeout=httpx.Timeout(
                None, connect=CONNECT_DEADLINE
            ),  # Each request has its own, for everything.
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=0),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            headers={
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                "User-Agent": "recall-worker check-endpoint",
            },
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def call(
        self,
        key: str,
        *,
        message: str = MESSAGE,
        session: str | None = None,
        token: str | None = None,
        flight: Flight | None = None,
    ) -> Reply:
        """POST a run. `token`: another one; "" for none. `flight`: records when it was sent."""
        session = self._session if session is None else session
        content = self._content(key, message, session)
        url = address(self._template, session)
        return await self._ask(
            "POST", url, key, self._headers(key, content, token), content, flight
        )

    async def leave_open(self, seconds: float) -> Flight:
        """A call under a new key, sent and waited for `seconds`; it may still be open then."""
        for _ in range(3):
            flight = Flight(self.new_key())
            flight.task = asyncio.create_task(self.call(flight.key, flight=flight))
            flight.task.add_done_callback(lambda _, gone=flight.gone: gone.set())  # type: ignore[misc]
            await flight.gone.wait()
            await asyncio.wait({flight.task}, timeout=seconds)
            if not flight.task.done() or not isinstance(flight.task.result().outcome, Busy):
                break
            await self.rest(flight.task.result())
        return flight

    async def to_its_end(self, reply: Reply, *, at_once: bool = False) -> Run:
        """The run of an accepted call; polled, if it was answered 202. `at_once`: the first poll
        does not wait.
        """
        if not isinstance(reply.outcome, Accepted):
            ended_at = reply.ended_at if isinstance(reply.outcome, Answered | Failed) else None
            return Run(reply, reply.outcome, ended_at, reply.ended_at)
        run = await self.polled(reply, at_once)
        self.followed.append(run)
        return run

    async def polled(self, reply: Reply, at_once: bool = False) -> Run:
        """The accepted run of a call, polled until it has ended or its time is up."""
        assert isinstance(reply.outcome, Accepted)
        on_until = reply.ended_at
        usual = median(self.lengths) if self.lengths else 0.0
        pause = max(0.05, usual * 0.15) if usual else 0.1
        wait = 0.0 if at_once else max(0.1, reply.sent_at + usual * 0.8 - time.monotonic())
        while time.monotonic() + wait < reply.sent_at + self._timeout:
            await asyncio.sleep(wait)
            polling = await self.of_run("GET", reply)
            found = (
                polled(polling.answer)
                if polling.answer is not None
                else StillOn(trouble=str(polling))
            )
            if not isinstance(found, StillOn):
                return Run(
                    reply, found, None if isinstance(found, Unknown) else polling.ended_at, on_until
                )
            on_until = polling.sent_at if found.trouble is None else on_until
            if self._lost:
                break
            wait, pause = pause, min(PATIENCE, pause * (1.25 if usual else 1.5))
        self._lost = True
        return Run(reply, Unknown(f"it did not end within {self._timeout:g} s"), None, on_until)

    async def of_run(self, method: str, reply: Reply) -> Reply:
        """GET or DELETE of an accepted run."""
        assert isinstance(reply.outcome, Accepted)
        where = same_origin(address(self._template, self._session), reply.outcome.reference)
        assert where is not None
        made = self._headers(reply.key, b"", None)
        unsigned = {n: value for n, value in made.items() if not n.startswith("webhook-")}
        return await self._ask(method, where, reply.key, unsigned)

    def new_key(self) -> str:
        """A key that was not used yet."""
        self._keys += 1
        return f"{self._name}:{self._keys}"

    @staticmethod
    async def rest(reply: Reply) -> None:
        """The pause before a busy session is called again."""
        pause = retry_after(reply.answer.headers) if reply.answer is not None else None
        await asyncio.sleep(min(PATIENCE, 0.5 if pause is None else max(0.1, pause)))

    async def when_free(self, call: Callable[[], Awaitable[Reply]]) -> Reply:
        """A call, repeated while the session is busy: three in all."""
        reply = await call()
        for _ in range(2):
            if not isinstance(reply.outcome, Busy):
                break
            await self.rest(reply)
            reply = await call()
        return reply

    def measured(self, run: Run) -> None:
        """Record the length of a run that had the session to itself, if its end was seen."""
        if run.length is not None:
            self.lengths.append(run.length)

    @property
    def shortest(self) -> float:
        """Seconds of the shortest run that had the session to itself; 0 if none was seen."""
        return min(self.lengths, default=0.0)

    async def _ask(
        self,
        method: str,
        url: str,
        key: str,
        headers: dict[str, str],
        content: bytes | None = None,
        flight: Flight | None = None,
    ) -> Reply:
        if self.made >= REQUESTS:
            raise Spent
        self.made += 1
        flight = flight or Flight(key)
        answer: Answer | None = None
        outcome: Outcome | None = None

        async def trace(event: str, _: Any) -> None:
            if event.endswith("send_request_body.complete"):
                flight.sent_at = time.monotonic()
                flight.gone.set()

        began = time.monotonic()
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._http.stream(
                    method, url, content=content, headers=headers, extensions={"trace": trace}
                ) as response,
            ):
                got = bytearray()
                # As it arrives: nothing is unpacked, and an endless answer is cut.
                async for chunk in response.aiter_raw():
                    got += chunk
                    if len(got) > LIMIT:
                        break
                answer = Answer(
                    response.status_code, response.headers, bytes(got[:LIMIT]), len(got) > LIMIT
                )
        except TimeoutError:
            reason = f"no answer within {self._timeout:g} s"
            outcome = Unknown(reason) if flight.gone.is_set() else Unavailable(reason)
        except (
            Exception
        ) as error:  # Whatever a server sends, or an address holds, it ends in a row.
            reason = f"{type(error).__name__}: {error}"
            outcome = (
                Unknown(f"no answer: {reason}")
                if flight.gone.is_set()
                else Unavailable(f"no connection: {reason}")
            )
        finally:
            flight.sent_at = flight.sent_at or began
            flight.gone.set()
        if answer is not None:
            outcome = (accepted(answer, url) if method == "POST" else None) or read(answer)
        assert outcome is not None
        reply = Reply(key, flight.sent_at, time.monotonic(), outcome, answer)
        if method == "POST":
            self.replies.append(reply)
        return reply

    def _content(self, key: str, message: str, session: str) -> bytes:
        """The request's body, the same for the same key and message."""
        occurrence = int(key.rpartition(":")[2])
        return b"".join(written(session, message, self._name, "once", occurrence, self._began, 0))

    def _headers(self, key: str, content: bytes, token: str | None) -> dict[str, str]:
        token = self._settings.run_token if token is None else token
        always = {"Content-Type": "application/json"} | bearer(token or None)
        trace, secret = traceparent(), self._settings.signing_secret
        return headers(key, 1, 0.0, trace, [content], always, secret)
