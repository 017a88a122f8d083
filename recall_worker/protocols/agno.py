"""Agno's AgentOS (tried: 3.1.10), by background runs through its durable queue, the only safe way
that it offers.

RECALL_RUN_URL is the server's base, RECALL_AGNO_AGENT the agent, a session is Agno's session of the
same id. The run's input is `[Scheduled recall] <message>`; the rest of the contract's body is in
the run's metadata (`run_context.metadata` for its tools).

With `AgentOS(queue=QueueConfig(durable=True))` on PostgreSQL the server keeps a ticket for each
run: it honours `Idempotency-Key` (the same run is returned), runs a session's runs one after
another, keeps them over restarts (a run cut off by one is called failed), and can be polled. With
any other queue it ignores keys and runs a session's runs at the same time, so nothing is posted
there: the call is Misconfigured, and the recall is kept. Checked before each post: `durable` and
`queue_per_session` in GET /config; whether the queue's worker runs on this replica (an AgentOS
whose lifespan is not started, such as a mounted one, still calls itself durable in /config); and
whether the token may read how a run ends. With JWTs that takes the scopes agents:run, agents:read
and config:read.

What it cannot do, and what this module cannot make up for:
- **It does not say that a session is busy.** A foreground run (a chat without background=true)
  can't be seen until it ends, and ours runs at the same time. Nothing is ever Busy: only a chat
  that goes through the queue, too, is waited for, and waits for ours. Time in the queue counts
  towards RECALL_RUN_TIMEOUT; a run paused for a person's consent blocks its session's queue until
  that person acts.
- It never says that a session is missing: it creates one. Nothing is ever Gone.
- A key belongs to the server and the user, not to the session, and is not checked against the
  payload: two recall-workers with recalls of the same id on one server would get each other's runs.
  An answer that names another session is refused.
- A ticket, with its key, is deleted `retention_seconds` (a day) after the run's end. So a run whose
  answer was lost is searched before it is posted again: in the session's tickets, by key, then in
  its runs, by `metadata.recall_key` (visible once a run has ended). If the runs can't be listed and
  half a day has passed, it is Unknown, and not posted blindly.
- A session that a user owns accepts only that user's runs, and answers 404 to others. The owner is
  then looked up, and the run posted in their name. With JWTs, which post only in their own name,
  such a session stays closed (except to an admin's, whose runs are then the admin's).

A run is followed by its ticket. Its own address is polled only if tickets can't be read (403: with
JWTs they are the admin's) or the ticket was deleted: the run's address says ERROR while the queue
is about to retry (`max_attempts` above 1), and contains all messages in each poll. A paused run
counts as Answered, and is noted as waiting for a person: it continues when they answer, and is
neither cancelled nor posted again. A server in between that streams the run all the same is read to
the stream's end, whose last event says how it ended.
"""

from __future__ import annotations

import json
import re
from typing import Any, TypeGuard
from urllib.parse import quote, urlencode

from ..recall import (
    Accepted,
    Answered,
    Claim,
    Failed,
    Misconfigured,
    Outcome,
    Refused,
    Unavailable,
    Unknown,
)
from ..settings import Settings
from . import Call, contract, outcomes
from .credentials import Credentials
from .http import Answer, HttpClient, NoAnswer
from .polling import StillOn, follow

POST_DEADLINE = 60.0
"""Seconds for the answer to a post, which the server sends as soon as the run is stored."""
ASK_DEADLINE = 10.0
TICKETS_LISTED = 100
NAME_MOST = 300
"""Characters of a name that a server gives: a run's, an agent's, an owner's."""
KEYS_KEPT = 43_200.0
"""Seconds after an occurrence's first call during which a server still knows its key, if it keeps
keys for a day, as it does by default.
"""

QUEUED = frozenset({"PENDING", "QUEUED"})
FINE = frozenset({"COMPLETED", "REGENERATED"})
PAUSED = "PAUSED"
BROKEN = frozenset({"ERROR", "FAILED", "CANCELLED"})
_REFERENCE = re.compile(r"/agents/(?!\.\.?/)[\w.~%-]+/runs/(?!\.\.?$)([\w.~%-]{1,300})", re.ASCII)


class Agno:
    """Posts background runs to one AgentOS, and follows them."""

    def __init__(self, settings: Settings, credentials: Credentials | None = None) -> None:
        assert settings.run_url is not None
        assert settings.agno_agent is not None
        self._base = settings.run_url.rstrip("/")
        self._agent = settings.agno_agent
        self._timeout = min(settings.run_timeout, POST_DEADLINE)
        self._credentials = credentials or Credentials(settings)
        self._http = HttpClient(settings)

    async def call(self, call: Call) -> Outcome:
        unsafe = await self._unsafe(_query(call.claim))
        if unsafe is not None:
            return unsafe
        whole = call.whole()
        answer = await self._post(call, whole, None)
        if isinstance(answer, Answer) and answer.status == 404:
            owner = await self._owner(call.claim.session_id)
            if not isinstance(owner, str):
                return owner
            answer = await self._post(call, whole, owner)
        return (
            read(answer, self._agent, call.claim.session_id)
            if isinstance(answer, Answer)
            else answer
        )

    async def follow(
        self, claim: Claim, reference: str, within: float, first_in: float | None = None
    ) -> Outcome:
        known = _REFERENCE.fullmatch(reference)
        if known is None:
            return Unknown("the reference of the accepted run is none of Agno's")
        session = _query(claim)

        async def poll() -> Outcome | StillOn:
            answer = await self._ask("GET", f"/queue/jobs/{known[1]}")
            if isinstance(answer, Answer) and answer.status in (403, 404):
                answer = await self._ask("GET", f"{reference}?{session}")
            return (
                StillOn(trouble=answer.reason) if isinstance(answer, NoAnswer) else polled(answer)
            )

        return await follow(poll, within, first_in)

    async def abort(self, claim: Claim, reference: str) -> None:
        if _REFERENCE.fullmatch(reference):
            await self._ask("POST", f"{reference}/cancel?{_query(claim)}", contract.ABORT_DEADLINE)

    async def find(self, claim: Claim) -> Outcome | None:
        session = _query(claim)
        unsafe = await self._unsafe(session)
        if unsafe is not None:
            return unsafe
        tickets = await self._ask("GET", f"/queue/jobs?{session}&limit={TICKETS_LISTED}")
        if isinstance(tickets, NoAnswer):
            return Unavailable(tickets.reason)
        if tickets.status not in (200, 403, 404):
            return _untold(tickets, "which runs the session has")
        found = listed(tickets, claim.key)
        if found is not None:
            return Accepted(place(*found), tickets.status)
        runs = await self._ask("GET", f"{place(self._agent)}?{session}")
        if isinstance(runs, NoAnswer):
            return Unavailable(runs.reason)
        # 404: no such session or agent, as the post will say. 400, 501: this kind of agent has no
        # list of runs.
        if runs.status not in (200, 400, 404, 501):
            return _untold(runs, "which runs the session has")
        found = listed(runs, claim.key)
        if found is not None:
            return Accepted(place(*found), runs.status)
        whole = runs.status == 404 or (runs.status == 200 and outcomes.json_of(runs) is not None)
        if not whole and (claim.begun_age or 0.0) > KEYS_KEPT:
            return Unknown(
                "an earlier call may have run, and the session's runs can't be listed", runs.status
            )
        return None

    async def close(self) -> None:
        await self._http.close()

    async def _unsafe(self, session: str) -> Outcome | None:
        """Why nothing may be posted to this server now; None if it may."""
        config = await self._ask("GET", "/config")
        if isinstance(config, NoAnswer):
            return Unavailable(config.reason)
        if config.status != 200:
            return _untold(config, "whether its queue is durable (GET /config)")
        queue = members(config).get("queue")
        if not isinstance(queue, dict) or queue.get("durable") is not True:
            return Misconfigured(
                (
                    "the server's queue is not durable, so it would ignore our keys: give AgentOS "
                    "a QueueConfig(durable=True)"
                ),
                200,
            )
        if queue.get("queue_per_session") is not True:
            return Misconfigured(
                (
                    "the server lets a session's runs go side by side: give AgentOS a "
                    "QueueConfig(durable=True, queue_per_session=True)"
                ),
                200,
            )
        tickets = await self._ask("GET", f"/queue/jobs?{session}&limit=1")
        if isinstance(tickets, NoAnswer):
            return Unavailable(tickets.reason)
        if tickets.status == 503 and "detail" in members(tickets):
            return Misconfigured(
                (
                    "the server's queue is durable, but no worker processes it: start AgentOS with "
                    "its lifespan (HTTP 503)"
                ),
                503,
            )
        if tickets.status >= 500:
            return _untold(tickets, "whether its queue is worked off")
        return None if tickets.status == 200 else await self._unread(session)

    async def _unread(self, session: str) -> Outcome | None:
        """Why we could not see how a run ends if we may not read tickets: a token may be allowed to
        post runs, but not to read them. None if we can.
        """
        run = await self._ask("GET", f"{place(self._agent, 'recall-worker')}?{session}")
        if isinstance(run, NoAnswer):
            return Unavailable(run.reason)
        return (
            None if run.status in (200, 404) else _untold(run, "how runs end (scope agents:read)")
        )

    async def _owner(self, session_id: str) -> str | Outcome:
        """The session's owner. Queried after a 404, which means another owner, or no such agent."""
        answer = await self._ask("GET", f"/sessions/{quote(session_id, safe='')}?type=agent")
        if isinstance(answer, NoAnswer):
            return Unavailable(answer.reason)
        if answer.status >= 500 or answer.status in outcomes.UNAVAILABLE:
            return _untold(answer, "whose the session is")
        owner = members(answer).get("user_id") if answer.status == 200 else None
        return owner if _is_name(owner) else _no_agent(self._agent, 404)

    async def _post(
        self, call: Call, claim: Claim, owner: str | None
    ) -> Answer | Misconfigured | Unavailable | Unknown:
        content: list[bytes | memoryview] = [body(claim, owner)]
        return await contract.post(
            self._http,
            self._base + place(self._agent),
            call,
            content,
            {"Content-Type": "application/x-www-form-urlencoded"},
            self._credentials,
            self._timeout,
        )

    async def _ask(
        self, method: str, path: str, deadline: float = ASK_DEADLINE
    ) -> Answer | NoAnswer:
        return await contract.ask(
            self._http, method, self._base + path, self._credentials, deadline
        )


def place(agent: str, run_id: str | None = None) -> str:
    """The path of the agent's runs, or of one of them, below the base address. Names are encoded,
    so that they stay one segment each.
    """
    runs = f"/agents/{contract.segment(agent)}/runs"
    return runs if run_id is None else f"{runs}/{contract.segment(run_id)}"


def body(claim: Claim, owner: str | None) -> bytes:
    """The form. Nothing in it changes between two calls under one key, unless the session gets
    another owner; no `internal_comment`.
    """
    assert claim.message is not None
    form = {
        "message": contract.PROMPT + claim.message,
        "stream": "false",
        "background": "true",
        "session_id": claim.session_id,
        "metadata": json.dumps(contract.metadata(claim), separators=(",", ":")),
    }
    if owner is not None:
        form["user_id"] = owner
    return urlencode(form).encode("ascii")


def read(answer: Answer, agent: str, session_id: str) -> Outcome:
    """The outcome of the answer to a post."""
    status = answer.status
    if status == 404:
        return _no_agent(agent, status)
    if status == 409:
        # Never a busy session: Agno answers 409 if the key is another agent's.
        return Unknown(
            (
                "the server knows the key as another agent's: was RECALL_AGNO_AGENT changed "
                "meanwhile? (HTTP 409)"
            ),
            status,
        )
    if not 200 <= status < 300:
        return outcomes.read(answer)
    if outcomes.is_stream(answer):
        return _streamed(answer)
    fields = members(answer)
    run_id, word = fields.get("run_id"), fields.get("status")
    if not _is_name(run_id) or not isinstance(word, str):
        outcome = outcomes.read(answer)
        return (
            outcome
            if isinstance(outcome, Misconfigured)
            else Unknown(f"an answer that is none of Agno's (HTTP {status})", status)
        )
    if fields.get("session_id", session_id) != session_id:
        return Refused(
            (
                "the server ran this key in another session: the key is another recall's, or the "
                f"token is bound to a session (HTTP {status})"
            ),
            status,
        )
    if status != 202 and (ended := _ended(word, fields.get("content"), status)) is not None:
        return ended
    # Also if it has ended already: the ticket says how.
    return Accepted(place(agent, run_id), status, outcomes.retry_after(answer.headers))


def polled(answer: Answer) -> Outcome | StillOn:
    """The state of a run, from its ticket or its own address."""
    status, later = answer.status, outcomes.retry_after(answer.headers)
    if status == 404:
        return Unknown("Agno no longer knows the run that it accepted (HTTP 404)", status)
    if status != 200:
        return StillOn(later, f"HTTP {status}")
    fields = members(answer)
    word = fields.get("status")
    if not isinstance(word, str):
        # Only a completed run has that much output before its status.
        return (
            Answered(status)
            if answer.truncated
            else StillOn(later, "an answer that is none of Agno's")
        )
    ended = _ended(word, fields.get("error") or fields.get("content"), status)
    if ended is not None:
        return ended
    return StillOn(later, "it waits in its session's queue" if word.upper() in QUEUED else None)


def listed(answer: Answer, key: str) -> tuple[str, str] | None:
    """The agent and the id of the run under this key, in a list of tickets or of runs."""
    document = outcomes.json_of(answer) if answer.status == 200 else None
    entries = document.get("data") if isinstance(document, dict) else document
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        metadata = entry.get("metadata")
        named = metadata.get("recall_key") if isinstance(metadata, dict) else None
        agent, run_id = (
            entry.get("component_id") or entry.get("agent_id"),
            entry.get("id") or entry.get("run_id"),
        )
        ours = entry.get("idempotency_key") == contract.header_key(key) or named == key
        if ours and _is_name(agent) and _is_name(run_id):
            return agent, run_id
    return None


def members(answer: Answer) -> dict[str, Any]:
    """The members of the JSON object in an answer; of one that was cut off at its limit, those that
    came whole.
    """
    return outcomes.members(answer) or {}


def _ended(word: str, why: object, status: int) -> Outcome | None:
    if word.upper() == PAUSED:
        return Answered(status, outcomes.WAITS_FOR_A_PERSON)
    if word.upper() in FINE:
        return Answered(status)
    if word.upper() in BROKEN:
        detail = ": " + " ".join(why.split())[:200] if isinstance(why, str) and why.strip() else ""
        return Failed(f"Agno says that the run ended as {word.lower()}{detail}", status)
    return None


def _streamed(answer: Answer) -> Outcome:
    """The outcome of a run that came as a stream of Agno's events, read to its end."""
    outcome = outcomes.read(answer)
    if isinstance(outcome, Answered):
        text = answer.tail if answer.truncated else answer.body
        match outcomes.last_event(text)[0].removeprefix("Team"):
            case "RunError" | "RunCancelled" as word:
                return Failed(f"Agno's stream ended with {word}", answer.status)
            case "RunPaused":
                return Answered(answer.status, outcomes.WAITS_FOR_A_PERSON)
    return outcome


def _no_agent(agent: str, status: int) -> Outcome:
    return Misconfigured(
        (
            f"the server has no agent {agent[:100]!r}, or keeps the session from it: see "
            f"RECALL_AGNO_AGENT (HTTP {status})"
        ),
        status,
    )


def _untold(answer: Answer, what: str) -> Outcome:
    """The outcome if the server does not say what we must know before we post."""
    status = answer.status
    if status >= 500 or status in outcomes.UNAVAILABLE:
        return Unavailable(
            f"the server does not say {what} (HTTP {status})",
            status,
            outcomes.retry_after(answer.headers),
        )
    hint = "RECALL_RUN_TOKEN" if status in (401, 403) else "RECALL_RUN_URL"
    return Misconfigured(f"the server does not say {what}: see {hint} (HTTP {status})", status)


def _is_name(value: object) -> TypeGuard[str]:
    """Whether a name from the server can be part of an address, and be stored in the row."""
    return isinstance(value, str) and 0 < len(value) <= NAME_MOST and contract.nameable(value)


def _query(claim: Claim) -> str:
    return urlencode({"session_id": claim.session_id})
