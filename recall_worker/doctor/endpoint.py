"""The run endpoint: does it answer, and accept the token? Checked by GET, which runs no agent."""

from __future__ import annotations

import time
from uuid import uuid4

from ..protocols import contract, langgraph, responses
from ..protocols.credentials import Credentials, bearer
from ..protocols.http import Answer, HttpClient
from ..settings import Settings, SettingsError
from ..terminal import command, relative, span
from .examination import NOTE, OK, PROBLEM, Examination


async def endpoint(exam: Examination) -> None:
    settings = exam.settings
    if settings.run_url is None:
        exam.find(
            NOTE,
            "RECALL_RUN_URL is not set here, so the endpoint was not checked",
            "set it as for recall-worker run",
        )
        return
    try:
        http = HttpClient(settings)
    except SettingsError as error:
        exam.find(PROBLEM, error.problems[0])
        return
    try:
        url = _safe_address(settings)
        began = time.monotonic()
        answer = await http.ask("GET", url, _headers(settings))
        took = time.monotonic() - began
        if not isinstance(answer, Answer):
            exam.find(
                PROBLEM,
                _credentials(settings).hide(answer.reason),
                _unreachable_hint(answer.reason),
            )
            return
        if _refused(exam, answer):
            return
        if settings.protocol == "responses" and not responses.speaks(answer):
            exam.find(
                PROBLEM,
                f"HTTP {answer.status}, but not as the Responses API answers",
                "the server's base in RECALL_RUN_URL: /v1/responses is added to it",
            )
            return
        exam.find(OK, f"answers a GET with HTTP {answer.status}, after {span(took)}")
        if settings.run_token is None:
            exam.find(
                NOTE,
                "no token is set",
                "set RECALL_RUN_TOKEN, so that nobody else can run your agent",
            )
        else:
            without = await http.ask("GET", url, {})
            await _token(exam, isinstance(without, Answer) and without.status in (401, 403))
    finally:
        await http.close()


def _refused(exam: Examination, answer: Answer) -> bool:
    status, has_token = answer.status, exam.settings.run_token is not None
    if status in (401, 403):
        seen = f"HTTP {status}: it " + (
            "does not accept the token" if has_token else "requires a token, and none is set"
        )
        exam.find(PROBLEM, seen, "the right token in RECALL_RUN_TOKEN (or RECALL_RUN_TOKEN_FILE)")
    elif status == 407:
        exam.find(
            PROBLEM,
            "HTTP 407: a proxy in between requires a login",
            "the endpoint's own address in RECALL_RUN_URL",
        )
    elif 300 <= status < 400:
        to = str(answer.headers.get("Location", "nowhere"))[:200]
        exam.find(
            PROBLEM,
            f"HTTP {status}, a redirect to {to}, which is not followed",
            "the final address in RECALL_RUN_URL",
        )
    elif status >= 500:
        exam.find(
            PROBLEM, f"HTTP {status}: it is failing", "see its log; no recall is lost meanwhile"
        )
    else:
        return False
    return True


async def _token(exam: Examination, wanted: bool) -> None:
    last = await exam.ask("last_call") if exam.adopted else []
    if wanted:
        exam.find(OK, "accepts the token, and refuses requests without one")
    elif last and (row := last[0])["outcome"] in (
        "answered",
        "accepted",
        "busy",
        "gone",
        "failed",
        "refused",
    ):
        exam.find(
            OK,
            (
                f"the last call, {relative(row['ended_at'], row['now'])}, was accepted with its "
                f"token: {row['outcome']}"
            ),
        )
    else:
        trouble = f" (the last call: {last[0]['outcome']}, {last[0]['reason']})" if last else ""
        todo = f"{command('check-endpoint')} --session ID, with a session that nobody uses"
        exam.find(NOTE, f"a GET does not show whether it accepts the token{trouble}", todo)


def _safe_address(settings: Settings) -> str:
    """An address to GET without effect: its session does not exist, and a GET runs nothing."""
    assert settings.run_url is not None
    base = settings.run_url.rstrip("/")
    match settings.protocol:
        case "langgraph":
            return f"{base}/threads/{uuid4()}/runs?limit=1"
        case "agno":
            return f"{base}/config"
        case "responses":
            made = uuid4().hex
            return f"{responses.address(base)}/caresp_{made[:16]}00{made}"
        case _:
            return contract.address(settings.run_url, f"missing-{uuid4()}")


def _credentials(settings: Settings) -> Credentials:
    return Credentials(settings)


def _headers(settings: Settings) -> dict[str, str]:
    carries = langgraph.api_key if settings.protocol == "langgraph" else bearer
    return _credentials(settings).headers(carries)


def _unreachable_hint(reason: str) -> str:
    """What to change; the reason says what is wrong (protocols.http, protocols.connection)."""
    for words, hint in (
        ("certificate is not trusted", "RECALL_CA_FILE with the authority that signed it"),
        ("client certificate", "RECALL_CLIENT_CERT_FILE and RECALL_CLIENT_KEY_FILE, PEM files"),
        ("proxy", "the proxy's address and login in RECALL_PROXY, and what it allows"),
        ("write https://", "https:// in RECALL_RUN_URL"),
        ("write http://", "http:// in RECALL_RUN_URL, or the port that speaks TLS"),
    ):
        if words in reason:
            return hint
    return "check RECALL_RUN_URL, and that the API runs and accepts connections from this host"
