"""OpenAI's Responses API by background responses, as agent servers offer it (tried:
azure-ai-agentserver-responses 2.3.0, with `resilient_background`).

RECALL_RUN_URL is the server's base (with or without `/v1`), a session is a conversation of the same
id, RECALL_RESPONSES_MODEL the model or agent, where the server wants one. A run is a response:
posted to /v1/responses with `background` and `store`, polled until its status is final, cancelled
by POST …/cancel. The server checks and starts it in one step: beside another response of the
conversation it answers 409 (OpenAI: 400) with the code `conversation_locked`, which is Busy.

What it cannot do:
- **It ignores Idempotency-Key**, and there is no list of responses. So each response gets an id
  made of the key (`X-Agent-Response-Id`), and before a post that may be the second one `find` looks
  for it. A server that does not take our ids (OpenAI's own) can't be asked, and answers 404 for
  that id in any case: the 404 counts only once this worker has seen the server use an id of ours.
  Until then, **a call whose answer was lost is Unknown, and is not posted again**.
- A response that is posted again under the id of an earlier one is run again (or hides it, while it
  goes on). One gap remains: a post that is still on its way while `find` looks for it.
- It does not say that a conversation is missing, unless its error has the code
  `conversation_not_found` or `session_not_found`: the tried server creates it. OpenAI's own words
  have no code: that is Misconfigured for this session, and kept until RECALL_GIVE_UP.
- Busy is what the server knows: a chat that does not name the conversation is not seen.
- The post is answered when the agent's first event is there. A response that ended badly is Failed,
  also an incomplete one, and is made again under a new key, with another id.
- A response that ends in a call of a function that the client is to execute, or in a question
  whether it may, counts as Answered: nobody here answers it.

The conversation gets one message of a user, `[Scheduled recall] <message>`, and no system message.
The rest of the contract's body is in the response's metadata, whose values are texts of at most 512
characters: longer ones are left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from ..recall import (
    Accepted,
    Answered,
    Busy,
    Claim,
    Failed,
    Gone,
    Misconfigured,
    Outcome,
    Unavailable,
    Unknown,
)
from ..settings import Settings
from . import Call
from .contract import ABORT_DEADLINE, PROMPT, ask, metadata, post
from .credentials import Credentials
from .http import Answer, HttpClient, NoAnswer
from .outcomes import (
    Word,
    ended,
    is_stream,
    meaning,
    members,
    read,
    reason_in,
    retry_after,
)
from .polling import StillOn, follow

ASK_DEADLINE = 10.0
METADATA_MOST = 512
"""Characters of a value in a response's metadata."""
LOCKED = "conversation_locked"
MISSING = frozenset({"conversation_not_found", "session_not_found"})
FOR_THE_CLIENT = frozenset({"function_call", "custom_tool_call", "mcp_approval_request"})
"""Kinds of output with which a response waits for its client."""
_RESPONSE_ID = re.compile(r"[0-9A-Za-z_-]{1,200}")


class Responses:
    """Posts background responses into the session's conversation, and polls them."""

    def __init__(self, settings: Settings, credentials: Credentials | None = None) -> None:
        assert settings.run_url is not None
        self._base = address(settings.run_url)
        self._model = settings.responses_model
        self._timeout = settings.run_timeout
        self._credentials = credentials or Credentials(settings)
        self._http = HttpClient(settings)
        self._takes_our_ids = False
        """Whether this server has shown us a response under an id that we made."""

    async def call(self, call: Call) -> Outcome:
        claim = call.claim
        content: list[bytes | memoryview] = [body(call.whole(), self._model)]
        headers = {**JSON, "X-Agent-Response-Id": id_of(claim)}
        answer = await post(
            self._http, self._base, call, content, headers, self._credentials, self._timeout
        )
        if not isinstance(answer, Answer):
            return answer
        self._seen(claim, answer)
        return taken(answer)

    async def follow(
        self, claim: Claim, reference: str, within: float, first_in: float | None = None
    ) -> Outcome:
        if not is_response_id(reference):
            return Unknown("the reference of the accepted run is no response's id")

        async def poll() -> Outcome | StillOn:
            answer = await self._ask("GET", reference)
            if isinstance(answer, NoAnswer):
                return StillOn(trouble=answer.reason)
            self._seen(claim, answer)
            return polled(answer)

        return await follow(poll, within, first_in)

    async def abort(self, claim: Claim, reference: str) -> None:
        if is_response_id(reference):
            await self._ask("POST", f"{reference}/cancel", ABORT_DEADLINE)

    async def find(self, claim: Claim) -> Outcome | None:
        answer = await self._ask("GET", id_of(claim))
        if isinstance(answer, NoAnswer):
            return Unavailable(answer.reason)
        self._seen(claim, answer)
        status = answer.status
        if 200 <= status < 300:
            if (members(answer) or {}).get("id") == id_of(claim):
                return Accepted(id_of(claim), status)  # Also a failed one: its poll will say so.
            return _no_response(answer)
        if status in (400, 404, 410):
            if self._takes_our_ids or not may_have_arrived(claim):
                return None
            return Unknown(
                "an earlier call may have run, and this server has not shown yet that it takes our "
                f"ids, by which it could be found (HTTP {status})",
                status,
            )
        outcome = read(answer)
        if isinstance(outcome, Misconfigured | Unavailable):
            return outcome
        reason = f"whether the run is there already could not be asked (HTTP {status})"
        return Unavailable(reason, status, retry_after(answer.headers))

    async def close(self) -> None:
        await self._http.close()

    def _seen(self, claim: Claim, answer: Answer) -> None:
        if answer.status == 200 and (members(answer) or {}).get("id") == id_of(claim):
            self._takes_our_ids = True

    async def _ask(
        self, method: str, path: str, deadline: float = ASK_DEADLINE
    ) -> Answer | NoAnswer:
        return await ask(self._http, method, f"{self._base}/{path}", self._credentials, deadline)


JSON: Mapping[str, str] = {"Content-Type": "application/json"}


def address(base: str) -> str:
    """Where a server with this base takes responses. OpenAI's libraries want `/v1` in the base."""
    return base.rstrip("/").removesuffix("/v1") + "/v1/responses"


def id_of(claim: Claim) -> str:
    """The id of the response that is the run of this key in this session: a server takes it in the
    form of its own, `caresp_`, a partition of 18 characters, and 32 letters and digits."""
    made = hashlib.sha256(f"{claim.session_id}\0{claim.key}".encode("utf-8", "surrogatepass"))
    return f"caresp_{made.hexdigest()[:16]}00{made.hexdigest()[16:48]}"


def may_have_arrived(claim: Claim) -> bool:
    """Whether an earlier call under this key may have reached the server without an answer that was
    understood: in doubt, yes."""
    if claim.taken_from is not None or claim.may_have_run > 0:
        return True
    # A call whose outcome was Failed gave the occurrence a new key; one at no attempt started
    # nothing.
    return claim.attempt > 1 and claim.last_outcome != "failed"


def body(claim: Claim, model: str | None) -> bytes:
    """The request's body. Nothing in it changes between two calls under one key; `internal_comment`
    is not in it.
    """
    assert claim.message is not None
    document: dict[str, Any] = {} if model is None else {"model": model}
    named = {name: str(value) for name, value in metadata(claim).items()}
    document |= {
        "background": True,
        "store": True,
        "stream": False,
        "conversation": claim.session_id,
        "input": PROMPT + claim.message,
        "metadata": {n: value for n, value in named.items() if len(value) <= METADATA_MOST},
    }
    return json.dumps(document, separators=(",", ":")).encode("ascii")


def taken(answer: Answer) -> Outcome:
    """The outcome of the answer to a post."""
    status, later = answer.status, retry_after(answer.headers)
    if 200 <= status < 300:
        if is_stream(answer):
            return read(answer)
        fields = members(answer) or {}
        found, word = fields.get("id"), meaning(fields.get("status"))
        if not isinstance(fields.get("status"), str) or not is_response_id(found):
            return _no_response(answer)
        return _ended(fields, word, answer) or Accepted(str(found), status, later)
    code = error_code(answer)
    if status in (400, 409) and code == LOCKED:
        return Busy(status, later)
    if status in (404, 410) and code in MISSING:
        return Gone(status)
    return read(answer)


def polled(answer: Answer) -> Outcome | StillOn:
    """The state of a response, from a poll's answer."""
    status, later = answer.status, retry_after(answer.headers)
    if status in (404, 410):
        return Unknown(
            f"the server no longer knows the response that it accepted (HTTP {status})", status
        )
    if not 200 <= status < 300:
        return StillOn(later, f"HTTP {status}")
    fields = members(answer) or {}
    word = fields.get("status")
    if not isinstance(word, str):
        return StillOn(later, "an answer that shows no status of the response")
    return _ended(fields, meaning(word), answer) or StillOn(later)


def error_code(answer: Answer) -> str | None:
    """The code of the error in an answer: OpenAI writes it into `error`, others at the top or into
    `detail`."""
    fields = members(answer) or {}
    for place in (fields.get("error"), fields, fields.get("detail")):
        code = place.get("code") if isinstance(place, dict) else None
        if isinstance(code, str):
            return code
    return None


def speaks(answer: Answer) -> bool:
    """Whether an answer about a response that does not exist is the API's own: it has an error."""
    return isinstance((members(answer) or {}).get("error"), dict)


def is_response_id(value: object) -> bool:
    """Whether a name can be a response's: what a server gave, or a row holds, becomes a part of an
    address."""
    return isinstance(value, str) and _RESPONSE_ID.fullmatch(value) is not None


def _ended(fields: Mapping[str, Any], word: Word, answer: Answer) -> Outcome | None:
    """The outcome of a response that has ended; None while it goes on."""
    outcome = ended(fields.get("status"), b"", answer.status)
    if word is Word.BADLY:
        said = " ".join(str(fields["status"]).split())[:40].lower()
        return Failed(f"the response ended as {said}{_why(fields)}", answer.status)
    output = fields.get("output")
    last = output[-1] if isinstance(output, list) and output else None
    kind = last.get("type") if isinstance(last, dict) else None
    if isinstance(outcome, Answered) and outcome.note is None and kind in FOR_THE_CLIENT:
        note = f"it ended with a {str(kind).replace('_', ' ')}, which nobody here answers"
        return Answered(answer.status, note)
    return outcome


def _why(fields: Mapping[str, Any]) -> str:
    for name, member in (("error", "message"), ("error", "code"), ("incomplete_details", "reason")):
        place = fields.get(name)
        said = place.get(member) if isinstance(place, dict) else None
        if isinstance(said, str) and said.strip():
            return ": " + " ".join(said.split())[:200]
    return ""


def _no_response(answer: Answer) -> Outcome:
    """The outcome of a 2xx whose body is no response."""
    outcome = read(answer)
    if not isinstance(outcome, Answered | Failed):
        return outcome
    if answer.truncated:
        return Unknown(
            "an answer larger than 1 MiB, which does not show the response's id "
            f"(HTTP {answer.status})",
            answer.status,
        )
    reason = (
        "an answer, but not as the Responses API gives them: see RECALL_RUN_URL and "
        f"RECALL_PROTOCOL (HTTP {answer.status}){reason_in(answer)}"
    )
    return Misconfigured(reason, answer.status)
