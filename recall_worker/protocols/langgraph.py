"""LangGraph's protocol: RECALL_RUN_URL is an agent server's base, a session is a thread,
RECALL_LANGGRAPH_ASSISTANT the assistant or graph.

What its server can do, as tried on LangGraph API 0.16.7 (docs/servers.md): check and start in one
step (409 beside another run of the thread, by `multitask_strategy: reject`), run in the background
(200 with a `run_id`, then GET …/runs/R), end a run (POST …/cancel), say why a graph failed. What it
cannot do:

- It ignores Idempotency-Key. So each run carries its key as `metadata.recall_key`, and before a
  post that may be the second one `find` searches the thread's newest runs for it. One gap remains:
  a first post that is still on its way while `find` searches. The message has an id made of the
  key, so that even then the thread has it once.
- 404 has the same text for a missing thread, a missing assistant, and a wrong address. The thread
  counts as gone if its list of runs is 404 too and the thread search answers; if the thread exists,
  the assistant is wrong. A thread that the token may not see counts as gone, too.
- A graph that stops to ask a person (`interrupt()`) ends as `success`, and a run that somebody
  cancelled, or that another run displaced, as `interrupted`. The thread tells a question: its
  `interrupts` are not empty then. With a question a run counts as Answered, whatever its status,
  and is noted as waiting for a person; `interrupted` without one is Failed, as at any API that says
  `cancelled`.
- A run that another one rolled back is deleted: its poll is 404, and what became of it is Unknown.
  As it was accepted, it is not posted again. One that was deleted with its thread is Gone.

The thread gets one message of a user, `[Scheduled recall] <message>`, and no system message: that
would stay in the thread for good, and several models refuse conversations with a system message in
the middle. The rest of the contract's body is in the run's metadata, which nodes find in
`config["metadata"]`.

The token is sent as `Authorization: Bearer` and as `X-Api-Key`, as both kinds of handlers are in
use. A LangSmith key is sent as `X-Api-Key` alone, since LangSmith would check a bearer token, too.

Servers that share LangGraph's paths (Aegra) answer differently: busy by 200, missing threads
created, `interrupted` for questions to a person. A client can't see which server it is, so they are
not supported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from ..recall import (
    Accepted,
    Answered,
    Claim,
    Failed,
    Gone,
    Malformed,
    Misconfigured,
    Outcome,
    Unavailable,
    Unknown,
)
from ..settings import Settings
from . import Call
from .contract import ABORT_DEADLINE, PROMPT, ask, metadata, post
from .credentials import Credentials, bearer
from .http import Answer, HttpClient, NoAnswer
from .outcomes import WAITS_FOR_A_PERSON, is_stream, json_of, members, read, retry_after
from .polling import StillOn, follow

POST_DEADLINE = 60.0
"""Seconds that the server has to accept a run; the run itself goes on in the background."""
ASK_DEADLINE = 10.0
PAGE, PAGES = 100, 10
"""How many runs of a thread are searched for a key: no thread has a thousand runs between a call
whose answer was lost and its retry.
"""
LANGSMITH_KEY = "lsv2_"
_RUN_ID = re.compile(r"[0-9A-Za-z_-]{1,100}")
_ENDED_BADLY = {
    "error": "the graph failed",
    "timeout": "the server ended the run at its own time limit",
    "interrupted": "the run was cancelled at the server, or displaced by another run of its thread",
}
_DISPLACED = Failed(_ENDED_BADLY["interrupted"], 200)


class LangGraph:
    """Runs the assistant on the session's thread, in the background, and polls it."""

    def __init__(self, settings: Settings, credentials: Credentials | None = None) -> None:
        assert settings.run_url is not None
        self._base = settings.run_url.rstrip("/")
        self._assistant = settings.langgraph_assistant
        self._timeout = settings.run_timeout
        self._credentials = credentials or Credentials(settings)
        self._http = HttpClient(settings)

    async def call(self, call: Call) -> Outcome:
        claim = call.claim
        thread = thread_of(claim)
        if thread is None:
            return Malformed(
                f"session_id is {claim.session_id[:100]!r}, which names no thread: "
                "LangGraph's are UUIDs"
            )
        deadline = min(self._timeout, POST_DEADLINE)
        content: list[bytes | memoryview] = [body(call.whole(), self._assistant)]
        answer = await post(
            self._http,
            self._runs(thread),
            call,
            content,
            JSON,
            self._credentials,
            deadline,
            api_key,
        )
        if not isinstance(answer, Answer):
            return answer
        if 200 <= answer.status < 300:
            return taken(answer)
        if answer.status == 404:
            return await self._missing(thread)
        if answer.status in (400, 422):
            return await self._refused(answer)
        return read(answer)

    async def follow(
        self, claim: Claim, reference: str, within: float, first_in: float | None = None
    ) -> Outcome:
        url, thread = self._run(claim, reference), thread_of(claim)
        if url is None or thread is None:
            return Unknown(
                "the reference of the accepted run is none that LangGraph could have given"
            )

        async def poll() -> Outcome | StillOn:
            answer = await self._ask("GET", url)
            if isinstance(answer, Answer) and answer.truncated and _word(answer) is None:
                # A run's answer includes its whole input; the list can leave that out.
                answer = one_of(await self._listed(thread, PAGE, 0, "run_id", "status"), reference)
            outcome = (
                StillOn(trouble=answer.reason) if isinstance(answer, NoAnswer) else polled(answer)
            )
            if isinstance(outcome, Unknown):
                # Deleted, with its thread, or by a run that rolled it back.
                missing = await self._missing(thread)
                return missing if isinstance(missing, Gone) else outcome
            if isinstance(outcome, Answered) or outcome == _DISPLACED:
                return await self._asked(thread) or outcome
            return await self._explained(url, outcome) if isinstance(outcome, Failed) else outcome

        return await follow(poll, within, first_in)

    async def abort(self, claim: Claim, reference: str) -> None:
        url = self._run(claim, reference)
        if url is not None:
            await self._ask("POST", f"{url}/cancel", ABORT_DEADLINE)

    async def find(self, claim: Claim) -> Outcome | None:
        thread = thread_of(claim)
        if thread is None:
            return None
        for page in range(PAGES):
            answer = await self._listed(thread, PAGE, page * PAGE, "run_id", "metadata")
            if isinstance(answer, Answer) and answer.status == 404:
                return None  # No thread, so no run; the post will say which of them is missing.
            runs = listed(answer, "whether the run is there already could not be asked")
            if not isinstance(runs, list):
                return runs
            for run in runs:
                if (
                    isinstance(run, dict)
                    and _metadata(run).get("recall_key") == claim.key
                    and _is_run_id(run.get("run_id"))
                ):
                    # Also a failed one: its poll will say so.
                    return Accepted(run["run_id"], 200)
            if len(runs) < PAGE:
                return None
        return None

    async def close(self) -> None:
        await self._http.close()

    # --- addresses --------------------------------------------------------------------------------

    def _runs(self, thread: UUID) -> str:
        return f"{self._base}/threads/{thread}/runs"

    def _run(self, claim: Claim, reference: str) -> str | None:
        """A stored reference as an address, if it is valid: the row's content is untrusted."""
        thread = thread_of(claim)
        return (
            f"{self._runs(thread)}/{reference}"
            if thread is not None and _is_run_id(reference)
            else None
        )

    # --- queries ----------------------------------------------------------------------------------

    async def _listed(
        self, thread: UUID, limit: int, offset: int, *fields: str
    ) -> Answer | NoAnswer:
        """The thread's runs, newest first."""
        query = "&".join(
            [f"limit={limit}", f"offset={offset}", *(f"select={field}" for field in fields)]
        )
        return await self._ask("GET", f"{self._runs(thread)}?{query}")

    async def _search(self, what: str, wanted: dict[str, Any]) -> Answer | NoAnswer:
        content = json.dumps(wanted | {"limit": 1}).encode()

        async def once() -> Answer | NoAnswer:
            return await self._http.post(
                f"{self._base}/{what}/search",
                lambda: self._credentials.headers(api_key) | dict(JSON),
                content,
                ASK_DEADLINE,
                lambda: None,
            )

        answer = await once()
        if isinstance(answer, Answer) and answer.status == 401 and self._credentials.changed():
            return await once()
        return answer

    async def _ask(
        self, method: str, url: str, deadline: float = ASK_DEADLINE
    ) -> Answer | NoAnswer:
        return await ask(self._http, method, url, self._credentials, deadline, api_key)

    async def _missing(self, thread: UUID) -> Outcome:
        """What is missing when a post is answered 404."""
        runs = await self._listed(thread, 1, 0, "run_id")
        if not (isinstance(runs, Answer) and runs.status == 404):
            found = listed(runs, "a 404, and whether the thread exists could not be asked")
            return self._no_assistant(404) if isinstance(found, list) else found
        threads = await self._search("threads", {"ids": [str(thread)]})
        if isinstance(threads, Answer) and threads.status in (404, 405):
            return Misconfigured(
                "nothing at this address speaks as LangGraph does: see RECALL_RUN_URL (HTTP 404)",
                404,
            )
        found = listed(threads, "a 404, and whether the thread exists could not be asked")
        if not isinstance(found, list):
            return found
        if any(isinstance(one, dict) and one.get("thread_id") == str(thread) for one in found):
            return Unavailable(
                (
                    "the server finds the thread, but not for a run: it may have been created just "
                    "now (HTTP 404)"
                ),
                404,
            )
        return Gone(404)

    async def _refused(self, answer: Answer) -> Outcome:
        """The outcome of a 400 or 422: an unknown graph is our fault, anything else the row's."""
        try:
            UUID(self._assistant)
        except ValueError:
            assistants = await self._search("assistants", {"graph_id": self._assistant})
            if isinstance(assistants, Answer) and assistants.status == 404:
                return self._no_assistant(answer.status)
            found = listed(assistants, "whether the assistant exists could not be asked")
            if not isinstance(found, list):
                return found
            if not found:
                return self._no_assistant(answer.status)
        return read(answer)

    def _no_assistant(self, status: int) -> Misconfigured:
        reason = (
            f"the server shows no assistant {self._assistant!r}: see "
            f"RECALL_LANGGRAPH_ASSISTANT (HTTP {status})"
        )
        return Misconfigured(reason, status)

    async def _asked(self, thread: UUID) -> Answered | None:
        """Answered, with a note, where a run that has just ended left a question to a person; None
        where it left none, or the server does not say."""
        wanted = {"ids": [str(thread)], "select": ["thread_id", "interrupts"]}
        answer = await self._search("threads", wanted)
        found = json_of(answer) if isinstance(answer, Answer) and answer.status == 200 else None
        one = found[0] if isinstance(found, list) and found else None
        if isinstance(one, dict) and one.get("thread_id") == str(thread) and one.get("interrupts"):
            return Answered(200, WAITS_FOR_A_PERSON)
        return None

    async def _explained(self, url: str, failed: Failed) -> Failed:
        """The failure with the graph's own error text, if the server still has it."""
        if failed.reason != _ENDED_BADLY["error"]:
            return failed
        answer = await self._ask("GET", f"{url}/join")
        document = json_of(answer) if isinstance(answer, Answer) and answer.status == 200 else None
        error = document.get("__error__") if isinstance(document, dict) else None
        words = (
            [str(error[name]) for name in ("error", "message") if error.get(name)]
            if isinstance(error, dict)
            else []
        )
        detail = " ".join(": ".join(words).split())[:200]
        return Failed(f"{failed.reason}: {detail}", failed.http_status) if detail else failed


JSON: Mapping[str, str] = {"Content-Type": "application/json"}


def api_key(token: str) -> dict[str, str]:
    """The headers that carry a token: LangSmith's keys in one of their own, others in both."""
    key = {"X-Api-Key": token}
    return key if token.startswith(LANGSMITH_KEY) else key | bearer(token)


def thread_of(claim: Claim) -> UUID | None:
    """The session as a thread; None if its id can't be one. Formatted anew, so that no part of an
    untrusted id gets into an address.
    """
    try:
        return UUID(claim.session_id)
    except ValueError:
        return None


def body(claim: Claim, assistant: str) -> bytes:
    """The request's body. Nothing in it changes between two calls under one key; `internal_comment`
    is not in it.
    """
    assert claim.message is not None
    message = {
        "role": "user",
        "content": PROMPT + claim.message,
        "id": str(uuid5(NAMESPACE_URL, f"recall:{claim.key}")),
    }
    document = {
        "assistant_id": assistant,
        "input": {"messages": [message]},
        "metadata": metadata(claim),
        "multitask_strategy": "reject",
        "if_not_exists": "reject",
    }
    return json.dumps(document, separators=(",", ":")).encode("ascii")


def taken(answer: Answer) -> Outcome:
    """The outcome of a 2xx to a post: Accepted, if it is LangGraph's."""
    if is_stream(answer):
        return read(answer)
    document, later = members(answer) or {}, retry_after(answer.headers)
    if _is_run_id(document.get("run_id")) and isinstance(document.get("status"), str):
        return Accepted(document["run_id"], answer.status, later)
    if answer.truncated:
        # The answer repeats a long message. A header names the run, too.
        run = answer.headers.get("Content-Location", "").rpartition("/")[2]
        if _is_run_id(run):
            return Accepted(run, answer.status, later)
        return Unknown(
            f"an answer larger than 1 MiB, which does not show its run (HTTP {answer.status})",
            answer.status,
        )
    return _no_langgraph(answer)


def one_of(answer: Answer | NoAnswer, reference: str) -> Answer | NoAnswer:
    """From an answer with a list of runs, the answer as if for this run alone."""
    runs = json_of(answer) if isinstance(answer, Answer) and answer.status == 200 else None
    if isinstance(answer, NoAnswer) or not isinstance(runs, list):
        return answer
    run = next(
        (run for run in runs if isinstance(run, dict) and run.get("run_id") == reference), {}
    )
    return Answer(answer.status, answer.headers, json.dumps(run).encode(), False)


def polled(answer: Answer) -> Outcome | StillOn:
    """The state of a run, from a poll's answer."""
    if answer.status in (404, 410):
        return Unknown(
            f"the server no longer knows the run that it took (HTTP {answer.status})", answer.status
        )
    word = _word(answer)
    if word == "success":
        return Answered(answer.status)
    if isinstance(word, str) and word in _ENDED_BADLY:
        return Failed(_ENDED_BADLY[word], answer.status)
    trouble = None if isinstance(word, str) else f"HTTP {answer.status}, and no status of the run"
    return StillOn(retry_after(answer.headers), trouble)


def _word(answer: Answer) -> object:
    """The status of the run in a poll's answer."""
    return (members(answer) or {}).get("status") if answer.status == 200 else None


def listed(answer: Answer | NoAnswer, otherwise: str) -> list[Any] | Outcome:
    """The list in the answer; or the outcome if there is none, with a reason that begins with
    `otherwise`: a query starts nothing.
    """
    if isinstance(answer, NoAnswer):
        return Unavailable(f"{otherwise}: {answer.reason}")
    if answer.status == 200:
        found = json_of(answer)
        if isinstance(found, list):
            return found
        if answer.truncated:
            return Unknown(f"{otherwise}: an answer larger than 1 MiB (HTTP 200)", 200)
        return _no_langgraph(answer)
    outcome = read(answer)
    if isinstance(outcome, Misconfigured | Unavailable):
        return outcome
    return Unavailable(
        f"{otherwise}: HTTP {answer.status}", answer.status, retry_after(answer.headers)
    )


def _no_langgraph(answer: Answer) -> Outcome:
    """The outcome of a 2xx whose body is not LangGraph's."""
    outcome = read(answer)
    if not isinstance(outcome, Answered | Failed):
        return outcome
    reason = (
        "an answer, but not as LangGraph gives them: see RECALL_RUN_URL and "
        f"RECALL_PROTOCOL (HTTP {answer.status})"
    )
    return Misconfigured(reason, answer.status)


def _metadata(run: dict[str, Any]) -> dict[str, Any]:
    metadata = run.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _is_run_id(value: object) -> bool:
    return isinstance(value, str) and _RUN_ID.fullmatch(value) is not None
