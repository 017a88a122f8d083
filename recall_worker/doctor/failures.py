"""RECALL_FAILURE_URL: can it be reached, and does it take what it is told?

Nothing is told: an OPTIONS request shows that something answers there, and what waits in the outbox
shows whether failures are taken. A receiver may refuse what is not a POST, so any answer counts
but a server's error.
"""

from __future__ import annotations

from ..protocols.http import Answer, HttpClient
from ..settings import SettingsError
from ..terminal import relative
from .examination import NOTE, OK, PROBLEM, Examination

LATE = 300.0
"""Seconds after which a failure that nobody was told of is a problem: a few tries have failed."""


async def failures(exam: Examination) -> None:
    before = len(exam.findings)
    await _address(exam)
    if exam.adopted:
        await _outbox(exam)
    if len(exam.findings) == before:
        exam.find(OK, "nobody is told of failed recalls: RECALL_FAILURE_URL is not set")


async def _address(exam: Examination) -> None:
    settings = exam.settings
    if settings.failure_url is None:
        return
    try:
        http = HttpClient(settings.of_the_failure_url())
    except SettingsError as error:
        exam.find(PROBLEM, error.problems[0])
        return
    try:
        answer = await http.ask("OPTIONS", settings.failure_url, {})
    finally:
        await http.close()
    if not isinstance(answer, Answer):
        exam.find(
            PROBLEM,
            answer.reason,
            "check RECALL_FAILURE_URL, and that the receiver runs and accepts connections from "
            "this host; what is to be told is kept for a week",
        )
    elif answer.status >= 500:
        exam.find(NOTE, f"answers an OPTIONS with HTTP {answer.status}", "see the receiver's log")
    else:
        exam.find(OK, f"answers an OPTIONS with HTTP {answer.status}; nothing was told")
    if settings.signing_secret is None:
        exam.find(
            NOTE,
            "what it is told is not signed: anybody who knows the address can tell it lies",
            "set RECALL_SIGNING_SECRET, and verify the signature: docs/failures.md",
        )


async def _outbox(exam: Examination) -> None:
    rights = await exam.one("may_tell")
    if exam.settings.failure_url is not None and not rights["may_write"]:
        exam.find(
            PROBLEM,
            f"what {exam.role} makes failed is told to nobody: it may not write to recall_outbox",
            f"grant insert on recall_outbox, and select on recall_subscriptions, to {exam.role}",
        )
    if not rights["may_read"]:
        return
    row = await exam.one("untold")
    telling = [w for w in exam.alive if (w.get("settings") or {}).get("failure_url")]
    if not row["failures"]:
        return
    age = (row["now"] - row["since"]).total_seconds()
    seen = (
        f"{row['failures']:,} failed recalls are still to be told, the first since "
        f"{relative(row['since'], row['now'])}"
    )
    if row["reason"]:
        seen += f"; the last try: {row['reason']}"
    if not telling:
        exam.find(
            PROBLEM,
            f"{seen}; no live worker has RECALL_FAILURE_URL",
            "set it for the workers; without it entries are kept for a week and then pruned",
        )
    else:
        exam.find(
            PROBLEM if age > LATE else NOTE,
            seen,
            "see the receiver's log; they are kept for a week",
        )
