"""The native protocol: DESIGN's run endpoint, for APIs that were written for it (and for
`recall-worker reference-api`).

What its server can do: check and start atomically (409), say that a session is missing (404 with a
code), honour `Idempotency-Key`, answer when the run has ended, or stream, or accept it and be
polled (an address in `Location`, `Operation-Location` or `Content-Location`, or an id with a status
that goes on), end an accepted run (DELETE at the same address). Nothing is looked up before a
second post, as that has the same key.

An accepted run is polled at the address that the API gave, or at `<run url>/<id>`, but only on
RECALL_RUN_URL's own host, as the token would leak to another one. An address that was made of an id
is a guess: it is polled, but nothing is deleted there before a poll has shown a run.

Never here: headers and signatures (contract), and the table of statuses (outcomes), which all
protocols share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ..recall import Accepted, Answered, Claim, Failed, Outcome, Unknown
from ..settings import Settings
from . import Call
from .contract import (
    ABORT_DEADLINE,
    PRINTABLE,
    PROMPT,
    address,
    header_key,
    nameable,
    nominal,
    own_origin,
    post,
    segment,
)
from .credentials import Credentials
from .http import Answer, HttpClient, NoAnswer
from .outcomes import Word, ended, is_page, kept_members, meaning, members, read, retry_after
from .polling import StillOn, follow

LOCATIONS = ("Location", "Operation-Location", "Content-Location")
IDS = ("run_id", "runId", "id")
NO_RUN_THERE = frozenset({400, 403, 404, 405, 410, 501})
"""How an address is answered that was guessed, and at which no run is."""
MISSED_MOST = 3
"""Polls in a row that find no run, until it counts as forgotten."""
GUESSED = "#guessed"
"""Behind the stored address of a run that was made of its id. (A fragment is never sent.)"""


class Native:
    """Calls RECALL_RUN_URL and reads the answer by DESIGN's table."""

    def __init__(self, settings: Settings, credentials: Credentials | None = None) -> None:
        assert settings.run_url is not None
        self._url = settings.run_url
        self._timeout = settings.run_timeout
        self._credentials = credentials or Credentials(settings)
        self._http = HttpClient(settings)

    async def call(self, call: Call) -> Outcome:
        url = address(self._url, call.claim.session_id)
        content = pieces(call.whole())
        answer = await post(self._http, url, call, content, JSON, self._credentials, self._timeout)
        return accepted(answer, url) or read(answer) if isinstance(answer, Answer) else answer

    async def follow(
        self, claim: Claim, reference: str, within: float, first_in: float | None = None
    ) -> Outcome:
        url = self._polled_at(claim, reference)
        if url is None:
            return Unknown(
                "the reference of the accepted run leads to another origin than RECALL_RUN_URL"
            )
        guessed, missed = reference.endswith(GUESSED), 0

        async def ask() -> Outcome | StillOn:
            nonlocal guessed, missed
            answer = await self._ask("GET", claim, url)
            if isinstance(answer, NoAnswer):
                return StillOn(trouble=answer.reason)
            if answer.status == 303:
                return await self._result(claim, url, answer)
            outcome = polled(answer, guessed=guessed)
            guessed = guessed and not goes_on(answer)
            if isinstance(outcome, Unknown):
                # A replica may not know the run yet; a router may not know the API for a moment.
                missed += 1
                if missed < MISSED_MOST:
                    return StillOn(retry_after(answer.headers), outcome.reason)
            else:
                missed = 0
            return outcome

        return await follow(ask, within, first_in)

    async def _result(self, claim: Claim, url: str, answer: Answer) -> Outcome | StillOn:
        """The run has ended, and its result is elsewhere."""
        location = answer.headers.get("Location", "")
        found = own_origin(url, location) if location else None
        if found is None:
            return Answered(303, f"its result is elsewhere, and was not read: {location[:200]}")
        result = await self._ask("GET", claim, found[0])
        if isinstance(result, NoAnswer):
            return StillOn(trouble=result.reason)
        # The result may be there later: what is no end of the run ends nothing.
        outcome = polled(result)
        if isinstance(outcome, Unknown):
            return StillOn(retry_after(result.headers), f"its result: HTTP {result.status}")
        return outcome

    async def abort(self, claim: Claim, reference: str) -> None:
        url = self._polled_at(claim, reference)
        if url is None:
            return
        if reference.endswith(GUESSED):
            # What is at this address may be no run: a message, the session itself.
            answer = await self._ask("GET", claim, url, ABORT_DEADLINE)
            if isinstance(answer, NoAnswer) or not goes_on(answer):
                return
        await self._ask("DELETE", claim, url, ABORT_DEADLINE)

    async def find(self, claim: Claim) -> Outcome | None:
        return None

    async def _ask(
        self, method: str, claim: Claim, url: str, within: float | None = None
    ) -> Answer | NoAnswer:
        """A request about a run. The token's file is read again where it is refused: a poll that
        follows has the new one."""
        headers = self._credentials.headers() | {"Idempotency-Key": header_key(claim.key)}
        answer = await (
            self._http.ask(method, url, headers)
            if within is None
            else self._http.ask(method, url, headers, within)
        )
        if isinstance(answer, Answer) and answer.status == 401:
            self._credentials.changed()
        return answer

    def _polled_at(self, claim: Claim, reference: str) -> str | None:
        """A stored reference as an address, if it is one of the endpoint's own origin: what a row
        holds is hostile.
        """
        found = own_origin(address(self._url, claim.session_id), reference)
        return None if found is None else found[0]

    async def close(self) -> None:
        await self._http.close()


JSON: Mapping[str, str] = {"Content-Type": "application/json"}


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
    if answer.status not in (200, 201, 202):
        return None
    fields = kept_members(answer) or {}
    word = meaning(fields.get("status"))
    # Only a 202 says by itself that the run goes on.
    if word.is_final or (answer.status != 202 and word is not Word.GOING_ON):
        return None
    later = retry_after(answer.headers)
    for name in LOCATIONS:
        location = answer.headers.get(name, "").strip()
        if not location:
            continue
        found = own_origin(url, location)
        if found is not None and found[0] != url:
            where, elsewhere = found
            note = (
                f"the API gives the run's address as {location[:200]}, which is asked at "
                "RECALL_RUN_URL's own scheme and port"
            )
            return Accepted(where, answer.status, later, note if elsewhere else None)
        if found is None and name != "Content-Location":
            return Unknown(
                "the run was accepted, and can't be followed: its address is on another host, or "
                f"too long, {location[:200]} (HTTP {answer.status})",
                answer.status,
                accepted=True,
            )
    for name in IDS:
        if isinstance(run_id := fields.get(name), str) and run_id:
            return _guessed(answer.status, url, run_id, later)
    return None


def _guessed(status: int, url: str, run_id: str, later: float | None) -> Outcome:
    path, _, query = url.partition("?")
    path = path.rstrip("/")
    where = f"{path}/{segment(run_id)}" if nameable(run_id) else ""
    where += f"?{query}" if query and where else ""
    # Not valid text (half a surrogate pair), or too long: it is not stored.
    if not PRINTABLE.fullmatch(where):
        return Unknown(
            f"the run was accepted under a name that no address can hold (HTTP {status})",
            status,
            accepted=True,
        )
    return Accepted(where + GUESSED, status, later)


def goes_on(answer: Answer) -> bool:
    """Whether a poll's answer shows a run that has not ended."""
    fields: Mapping[str, Any] = (members(answer) if 200 <= answer.status < 300 else None) or {}
    word = meaning(fields.get("status"))
    return word is Word.GOING_ON or (answer.status == 202 and not word.is_final)


def ended_at(answer: Answer) -> Outcome | None:
    """The outcome of a run whose state holds a final word, whatever the status code."""
    return ended((members(answer) or {}).get("status"), answer.body, answer.status)


def polled(answer: Answer, *, guessed: bool = False) -> Outcome | StillOn:
    """The state of an accepted run, from a poll's answer. `guessed`: the first poll at an address
    that was made of an id."""
    later = retry_after(answer.headers)
    if (outcome := ended_at(answer)) is not None:
        return outcome
    if guessed and (answer.status in NO_RUN_THERE or (answer.status == 200 and is_page(answer))):
        return Answered(
            answer.status, "accepted, and not followed: nothing is at the address of its id"
        )
    if answer.status in (404, 410):
        return Unknown(
            f"the API no longer knows the run that it accepted (HTTP {answer.status})",
            answer.status,
        )
    if answer.status == 202 or not 200 <= answer.status < 300:
        return StillOn(later, None if answer.status == 202 else f"HTTP {answer.status}")
    if meaning((members(answer) or {}).get("status")) is not Word.ABSENT:
        return StillOn(later)
    outcome = read(answer)
    return (
        outcome
        if isinstance(outcome, Answered | Failed)
        else StillOn(later, "an answer that is no JSON")
    )
