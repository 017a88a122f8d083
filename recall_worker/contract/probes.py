"""The probes of `check-endpoint`: calls to a run endpoint as the worker makes them, over a plain
HTTP client, counted and timed.

Owns what is sent, the limit on requests, and what can be known of a run from outside: when it was
requested, until when it was known to run, when it was seen to have ended. Answers are read by the
worker's own table. Nothing is kept between two requests: no connection, no cookie; no redirect is
followed. An answer is read to its end, and as much of it is unpacked and kept as the worker keeps.

Never here: what an API should have done (check).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from secrets import token_hex
from statistics import median
from typing import Any, Literal, Self

import httpx

from ..protocols import traceparent
from ..protocols.answer import Packed
from ..protocols.contract import address, headers, own_origin, same_origin
from ..protocols.credentials import Credentials, bearer
from ..protocols.http import CONNECT_DEADLINE, LIMIT, TAIL, Answer, trust
from ..protocols.native import GUESSED, accepted, ended_at, goes_on, polled, written
from ..protocols.outcomes import GATEWAY, Word, meaning, members, read, retry_after
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
from ..settings import Settings, header_lines

MESSAGE = "recall-worker check-endpoint: a harmless probe; answer anything"
REQUESTS = 78
"""The most requests of one check. Where the end of polling is 303, each run costs one more."""
Secrets = Literal["ours", "wrong", "none"]
"""Which token and headers a call has."""
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
    length: int = 0
    """Octets of the answer's body."""
    lost: str | None = None
    """Why the run, which this answer says goes on, can't be followed."""
    cut: Answer | None = None
    """What came of an answer that broke off, or did not end in time."""
    ours: bool = True
    """Whether it was asked with the worker's own token and headers."""
    head_at: float | None = None
    """When the head of the answer had come."""

    @property
    def on_until(self) -> float:
        """When the run that it answers was last known to be on. A long answer takes its time, and
        the session is free meanwhile; but a head that comes early says nothing of the end."""
        if self.head_at is None or self.head_at < (self.sent_at + self.ended_at) / 2:
            return self.ended_at
        return self.head_at

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
    def by_gateway(self) -> bool:
        """Whether a gateway answered for an application that is away."""
        return self.status in GATEWAY

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
        who = " by a gateway" if self.by_gateway else ""
        return f"HTTP {self.answer.status}{who} (read as {name_of(self.outcome)})"


@dataclass(frozen=True, slots=True)
class Run:
    """An accepted call, and its run."""

    reply: Reply
    outcome: Outcome
    ended_at: float | None
    """When it was seen to have ended; None: never."""
    on_until: float
    """When it was last known to be running."""
    lost: str | None = None
    """Why its end could not be read."""

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
        self._credentials = Credentials(settings)
        self.made = 0
        self.lengths: list[float] = []
        """Seconds that runs took which had the session to themselves."""
        self.replies: list[Reply] = []
        """To calls, not to polls."""
        self.polls: list[Reply] = []
        """To requests about accepted runs."""
        self.followed: list[Run] = []
        """Runs that were accepted."""
        self._settings, self._template, self._session, self._timeout = (
            settings,
            settings.run_url,
            session,
            timeout,
        )
        self._name = f"check-endpoint-{token_hex(4)}"
        self._began = datetime.now(UTC)
        self._keys = 0
        self._lost = False
        """Whether an accepted run did not end in time: then no other is waited for so long."""
        self._http = httpx.AsyncClient(
            verify=trust(settings),
            proxy=settings.proxy,
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
        secrets: Secrets = "ours",
        flight: Flight | None = None,
    ) -> Reply:
        """POST a run. `secrets`: which token and headers. `flight`: records when it was sent."""
        session = self._session if session is None else session
        content = self._content(key, message, session)
        url = address(self._template, session)
        return await self._ask(
            "POST", url, key, self._headers(key, content, secrets), content, flight, secrets
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
            over = isinstance(reply.outcome, Answered | Failed) and reply.lost is None
            ended_at = reply.ended_at if over else None
            return Run(reply, reply.outcome, ended_at, reply.on_until, reply.lost)
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
        guessed, trouble = reply.outcome.reference.endswith(GUESSED), None
        while time.monotonic() + wait < reply.sent_at + self._timeout:
            await asyncio.sleep(wait)
            found, polling = await self._state(reply, guessed)
            guessed = False
            if not isinstance(found, StillOn):
                lost = found.note if isinstance(found, Answered) else None
                if lost is not None and _word_of(polling) is Word.PERSON:
                    lost = None
                over = not isinstance(found, Unknown) and lost is None
                return Run(reply, found, polling.ended_at if over else None, on_until, lost)
            on_until = polling.sent_at if found.trouble is None else on_until
            trouble = found.trouble
            if self._lost:
                break
            wait, pause = pause, min(PATIENCE, pause * (1.25 if usual else 1.5))
        self._lost = True
        why = f"it did not end within {self._timeout:g} s"
        why += f"; last: {trouble}" if trouble else ""
        return Run(reply, Unknown(why), None, on_until)

    async def _state(self, reply: Reply, guessed: bool) -> tuple[Outcome | StillOn, Reply]:
        """How an accepted run stands, as the worker reads it; and the answer that says so."""
        polling = await self.of_run("GET", reply)
        if polling.answer is None:
            return StillOn(trouble=str(polling)), polling
        if polling.status != 303:
            return polled(polling.answer, guessed=guessed), polling
        location = polling.answer.headers.get("Location", "")
        found = own_origin(self._where(reply), location) if location else None
        if found is None:
            lost = f"its result is elsewhere, and was not read: {location[:200] or 'no Location'}"
            return Answered(303, lost), polling
        result = await self._ask("GET", found[0], reply.key, self._unsigned(reply.key))
        if result.answer is None:
            return StillOn(trouble=str(result)), result
        if not 200 <= result.answer.status < 300 and ended_at(result.answer) is None:
            lost = f"its result, at {location[:200]}, is answered HTTP {result.answer.status}"
            return Answered(result.answer.status, lost), result
        return ended_at(result.answer) or Answered(result.answer.status), result

    async def of_run(self, method: str, reply: Reply) -> Reply:
        """GET or DELETE of an accepted run."""
        return await self._ask(method, self._where(reply), reply.key, self._unsigned(reply.key))

    async def is_deletable(self, reply: Reply) -> bool:
        """Whether the worker would DELETE it: at an address that was made of an id only a run that
        is seen to go on."""
        assert isinstance(reply.outcome, Accepted)
        if not reply.outcome.reference.endswith(GUESSED):
            return True
        polling = await self.of_run("GET", reply)
        return polling.answer is not None and goes_on(polling.answer)

    def _where(self, reply: Reply) -> str:
        assert isinstance(reply.outcome, Accepted)
        where = same_origin(address(self._template, self._session), reply.outcome.reference)
        assert where is not None
        return where

    def _unsigned(self, key: str) -> dict[str, str]:
        made = self._headers(key, b"", "ours")
        return {n: value for n, value in made.items() if not n.startswith("webhook-")}

    def hide(self, text: str) -> str:
        """The text without the worker's own token and headers, which an API may have repeated."""
        return self._credentials.hide(text)

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
        secrets: Secrets = "ours",
    ) -> Reply:
        if self.made >= REQUESTS:
            raise Spent
        self.made += 1
        flight = flight or Flight(key)
        answer: Answer | None = None
        cut: Answer | None = None
        outcome: Outcome | None = None
        kept = _Kept()

        async def trace(event: str, _: Any) -> None:
            if event.endswith("send_request_body.complete"):
                flight.sent_at = time.monotonic()
                flight.gone.set()

        asked_at = time.monotonic()
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._http.stream(
                    method, url, content=content, headers=headers, extensions={"trace": trace}
                ) as response,
            ):
                kept.begin(response.status_code, response.headers)
                # As it arrives: it is unpacked within bounds only.
                async for chunk in response.aiter_raw():
                    kept.add(chunk)
                answer = kept.answer()
                if kept.is_broken and response.status_code < 300:
                    answer, outcome = None, Unknown("a compressed answer that can't be unpacked")
        except TimeoutError:
            cut = kept.answer()
            reason = f"no answer within {self._timeout:g} s"
            if cut is not None:
                began = f"HTTP {cut.status}, {kept.length} octets"
                reason = f"an answer that did not end within {self._timeout:g} s ({began} so far)"
            outcome = Unknown(reason) if flight.gone.is_set() else Unavailable(reason)
        except (
            Exception
        ) as error:  # Whatever a server sends, or an address holds, it ends in a row.
            cut = kept.answer()
            reason = f"{type(error).__name__}: {error}"
            if cut is not None and cut.status >= 300:
                # Of other answers than a success the status is enough, whole or not.
                answer = cut
            elif cut is not None:
                reason = f"the answer broke off after {kept.length} octets (HTTP {cut.status})"
            outcome = (
                Unknown(f"no answer: {reason}")
                if flight.gone.is_set()
                else Unavailable(f"no connection: {reason}")
            )
        finally:
            flight.sent_at = flight.sent_at or asked_at
            flight.gone.set()
        lost = None
        if answer is not None:
            found = accepted(answer, url) if method == "POST" else None
            outcome = found or read(answer)
            if method == "POST":
                lost = _lost(answer, found, outcome)
        assert outcome is not None
        reply = Reply(
            key,
            flight.sent_at,
            time.monotonic(),
            outcome,
            answer,
            kept.length,
            lost,
            cut,
            secrets == "ours",
            kept.head_at,
        )
        (self.replies if method == "POST" else self.polls).append(reply)
        return reply

    def _content(self, key: str, message: str, session: str) -> bytes:
        """The request's body, the same for the same key and message."""
        occurrence = int(key.rpartition(":")[2])
        return b"".join(written(session, message, self._name, "once", occurrence, self._began, 0))

    def _headers(self, key: str, content: bytes, secrets: Secrets) -> dict[str, str]:
        always = self._secret_headers(secrets) | {"Content-Type": "application/json"}
        trace, secret = traceparent(), self._settings.signing_secret
        return headers(key, 1, 0.0, trace, [content], always, secret)

    def _secret_headers(self, secrets: Secrets) -> dict[str, str]:
        """The worker's own, or such as the API should refuse. Where there are both, only the token
        is wrong: the headers are a gateway's, and its pass is not the API's."""
        if secrets == "none":
            return {}
        if secrets == "ours":
            return self._credentials.headers()
        wrong = f"wrong-{token_hex(8)}"
        given = header_lines(self._settings.run_headers or "")[0]
        if self._settings.run_token is not None:
            return dict(given) | bearer(wrong)
        return {name: wrong for name, _ in given}


@dataclass(slots=True)
class _Kept:
    """What is kept of an answer that is being read."""

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    tail: bytes = b""
    length: int = 0
    packed: Packed | None = None
    head_at: float | None = None

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.head_at = time.monotonic()
        self.status, self.headers = status, headers
        self.packed = Packed.of(headers.get("Content-Encoding", ""))

    def add(self, chunk: bytes) -> None:
        for piece in [chunk] if self.packed is None else self.packed.unpacked(chunk):
            self.length += len(piece)
            self.body += piece[: max(0, LIMIT - len(self.body))]
            self.tail = (self.tail + piece)[-TAIL:]

    @property
    def is_broken(self) -> bool:
        return self.packed is not None and not self.packed.is_complete

    def answer(self) -> Answer | None:
        """As far as it has come; None where its head has not come."""
        if self.status is None:
            return None
        body = bytes(self.body)
        is_left = self.packed is not None and self.packed.is_left
        tail = b"" if is_left else self.tail
        return Answer(self.status, self.headers, body, self.length > LIMIT, tail)


def _lost(answer: Answer, found: Outcome | None, outcome: Outcome) -> str | None:
    """Why a run that goes on, as the answer says, can't be followed; None where it can be, or is
    over."""
    if isinstance(found, Unknown) and found.accepted:
        return found.reason
    if found is not None or not isinstance(outcome, Answered):
        return None
    status = (members(answer) or {}).get("status")
    word = meaning(status)
    if answer.status == 202 and not word.is_final:
        return "202, and no address: neither a Location nor a run_id"
    if word is Word.GOING_ON:
        return f"its status is {status}, and it has no address: neither a Location nor a run_id"
    return None


def _word_of(reply: Reply) -> Word:
    return meaning(None if reply.answer is None else (members(reply.answer) or {}).get("status"))
