"""The native protocol: DESIGN's run endpoint, for APIs that were written for it (and for
`recall-worker reference-api`).

What its server can do: check and start atomically (409), say that a session is missing (404 with a
code), honour `Idempotency-Key`, answer when the run has ended or accept it and be polled (202 with
`Location`, or a `run_id` with a status that is not final), end an accepted run (DELETE at the same
address). Nothing is looked up before a second post, as that has the same key.

An accepted run is polled at its Location, or at `<run url>/<run_id>`, but only on RECALL_RUN_URL's
own origin, as the token would leak to another one.

Never here: headers, signatures and the table of statuses, which all protocols share (contract).
"""

from __future__ import annotations

import json
from datetime import datetime

from ..recall import Accepted, Answered, Claim, Failed, Outcome, Unknown
from ..settings import Settings
from . import Call
from .contract import (
    ABORT_DEADLINE,
    FINAL_WORDS,
    PRINTABLE,
    PROMPT,
    address,
    bearer,
    header_key,
    nameable,
    nominal,
    post,
    read,
    read_json,
    retry_after,
    same_origin,
    segment,
)
from .http import Answer, HttpClient, NoAnswer
from .polling import StillOn, follow


class Native:
    """Calls RECALL_RUN_URL and reads the answer by DESIGN's table."""

    def __init__(self, settings: Settings) -> None:
        assert settings.run_url is not None
        self._url = settings.run_url
        self._timeout = settings.run_timeout
        self._secret = settings.signing_secret
        self._http = HttpClient(settings)
        self._always = {"Content-Type": "application/json"} | bearer(settings.run_token)

    async def call(self, call: Call) -> Outcome:
        url = address(self._url, call.claim.session_id)
        content = pieces(call.whole())
        answer = await post(
            self._http, url, call, content, self._always, self._secret, self._timeout
        )
        return accepted(answer, url) or read(answer) if isinstance(answer, Answer) else answer

    async def follow(self, claim: Claim, reference: str, within: float) -> Outcome:
        url = self._polled_at(claim, reference)
        if url is None:
            return Unknown(
                "the reference of the accepted run leads to another origin than RECALL_RUN_URL"
            )
        # One set of headers for all polls; the token is in it.
        headers = self._always | {"Idempotency-Key": header_key(claim.key)}

        async def ask() -> Outcome | StillOn:
            answer = await self._http.ask("GET", url, headers)
            return (
                StillOn(trouble=answer.reason) if isinstance(answer, NoAnswer) else polled(answer)
            )

        return await follow(ask, within)

    async def abort(self, claim: Claim, reference: str) -> None:
        url = self._polled_at(claim, reference)
        if url is not None:
            await self._http.ask(
                "DELETE",
                url,
                self._always | {"Idempotency-Key": header_key(claim.key)},
                ABORT_DEADLINE,
            )

    async def find(self, claim: Claim) -> Outcome | None:
        return None

    def _polled_at(self, claim: Claim, reference: str) -> str | None:
        """A stored reference as an address, if it is one of the endpoint's own origin: what a row
        holds is hostile.
        """
        return same_origin(address(self._url, claim.session_id), reference)

    async def close(self) -> None:
        await self._http.close()


def body(claim: Claim) -> bytes:
    """The request's body, whole. Nothing in it changes between two calls under one key;
    `internal_comment` is not in it.
    """
    return b"".join(pieces(claim))


def pieces(claim: Claim) -> list[bytes | memoryview]:
    """The request's body, in pieces where its message is long. The claim has its message."""
    assert claim.message is not None
    return written(
        claim.session_id,
        claim.message,
        claim.id,
        claim.call_type,
        claim.occurrence,
        claim.scheduled_for,
        claim.missed,
    )


def written(
    session_id: str,
    message: str,
    id: str,
    call_type: str,
    occurrence: int,
    scheduled_for: datetime,
    missed: int,
) -> list[bytes | memoryview]:
    """The body's JSON in pieces: one, or several if the message is long, as the body contains the
    message twice and would hold it twice in memory.

    Put together by hand, as it is made for every call and its form is fixed: by the JSON encoder it
    took a tenth of the worker's time.
    """
    text = _text(message)
    begin = f'{{"session_id":{_text(session_id)},"user_message":'
    between = f',"system_message":"{PROMPT}'
    end = (
        f',"recall":{{"id":{_text(id)},"call_type":{_text(call_type)},"occurrence":{occurrence},'
        f'"scheduled_for":"{nominal(scheduled_for)}","missed":{missed}}}}}'
    )
    if len(text) <= LONG:
        return [f"{begin}{text}{between}{text[1:]}{end}".encode("ascii")]
    held = text.encode("ascii")
    return [
        begin.encode("ascii"),
        held,
        between.encode("ascii"),
        memoryview(held)[1:],
        end.encode("ascii"),
    ]


LONG = 1 << 16
"""Octets of a message, as JSON, from which on a body is made in pieces."""
_text = json.JSONEncoder().encode


def accepted(answer: Answer, url: str) -> Outcome | None:
    """Accepted, if the answer says so; Unknown if the run was accepted but can't be followed; else
    None.
    """
    if not 200 <= answer.status < 300:
        return None
    document = read_json(answer.body) if answer.body and not answer.truncated else None
    fields = document if isinstance(document, dict) else {}
    word = fields.get("status")
    ended = isinstance(word, str) and word.lower() in FINAL_WORDS
    if ended:
        return None
    location = answer.headers.get("Location")
    if answer.status == 202 and location is not None:
        where = same_origin(url, location)
        if where is None:
            return Unknown(
                f"the run was accepted, but is to be polled elsewhere: {location[:200]} (HTTP 202)",
                202,
            )
        return Accepted(where, answer.status)
    run_id = fields.get("run_id")
    if isinstance(run_id, str) and run_id and isinstance(word, str):
        path, _, query = url.partition("?")
        where = f"{path}/{segment(run_id)}" if nameable(run_id) else ""
        where += f"?{query}" if query and where else ""
        # Not valid text (half a surrogate pair), or too long: it is not stored.
        if not PRINTABLE.fullmatch(where):
            return Unknown(
                (
                    "the run was accepted under a name that no address can hold (HTTP "
                    f"{answer.status})"
                ),
                answer.status,
            )
        return Accepted(where, answer.status)
    return None


def polled(answer: Answer) -> Outcome | StillOn:
    """The state of an accepted run, from a poll's answer."""
    later = retry_after(answer.headers)
    if answer.status in (404, 410):
        return Unknown(
            f"the API no longer knows the run that it accepted (HTTP {answer.status})",
            answer.status,
        )
    if answer.status == 202 or not 200 <= answer.status < 300:
        return StillOn(later, None if answer.status == 202 else f"HTTP {answer.status}")
    document = read_json(answer.body) if answer.body else {}
    word = document.get("status") if isinstance(document, dict) else None
    if isinstance(word, str) and word.lower() not in FINAL_WORDS:
        return StillOn(later)
    outcome = read(answer)
    return (
        outcome
        if isinstance(outcome, Answered | Failed)
        else StillOn(later, "an answer that is no JSON")
    )
