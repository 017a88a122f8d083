"""Does an API keep the contract of the run endpoint? For its author: one row for each property,
with what was seen.

What an API does inside can't be seen from outside, so the rows about runs reason by time: the
length of a run is measured first, on calls that have the session to themselves. If runs are too
short to overlap, or a measurement is doubtful, the verdict is "not shown", never "pass".

Never here: how a probe is made (probes), how rows are shown (cli/check_endpoint), the database, a
session that was not named (except one that does not exist).
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..events import escape_controls
from ..protocols.contract import FINAL_WORDS
from ..recall import Accepted, Answered, Busy, Gone, Refused, Unavailable, Unknown, name_of
from ..settings import Settings
from ..terminal import UNREACHABLE, Trouble, span
from .probes import MESSAGE, REQUESTS, Probes, Reply, Run, Spent

TOGETHER, ROUNDS = 3, 3
"""Calls at once in one session, and how often."""
SHORT = 0.2
"""Seconds: whether shorter runs overlapped can't be seen from outside."""
PASS, FAIL, NOT_SHOWN = "pass", "fail", "not shown"
TIMED = ("key_during", "slow", "hang_up")
"""Rows that a slow machine can spoil: if one is not shown, it is tried a second time."""
PROPERTIES = {
    "answers": "answers a call with 2xx and JSON",
    "redirect": "does not redirect",
    "token": "requires its token",
    "missing": "says that a session is missing",
    "busy": "accepts one of several calls at once",
    "slow": "keeps the session busy until the run ends",
    "key_after": "replays a key's answer after its run",
    "key_during": "starts no second run under a key",
    "body": "pins the body to its key",
    "hang_up": "runs once, also if its caller disconnects",
    "accepted": "accepted runs can be polled to their end",
    "cancel": "ends an accepted run when asked to",
    "retry_after": "says when to call again (advice)",
}


@dataclass(frozen=True, slots=True)
class Finding:
    verdict: str
    seen: str
    todo: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    property: str
    finding: Finding

    def shown(self) -> dict[str, Any]:
        found = self.finding
        return {
            "row": self.name,
            "property": self.property,
            "verdict": found.verdict,
            "seen": found.seen,
            "todo": found.todo,
        }


class Check:
    """One check of one endpoint, made by `rows()`. Needs a running event loop."""

    def __init__(
        self, settings: Settings, session: str, missing_session: str, timeout: float
    ) -> None:
        """`timeout`: seconds that a request, and a run, may take."""
        self._probes = Probes(settings, session, timeout)
        self._has_token = settings.run_token is not None
        self._missing_session = missing_session
        self._first: Run | None = None

    @property
    def requests(self) -> int:
        """The number of requests made."""
        return self._probes.made

    async def rows(self) -> list[Row]:
        """All rows, in the order in which they are shown. Raises Trouble if no connection to the
        endpoint can be made.
        """
        found: dict[str, Finding] = {}
        async with self._probes:
            found["answers"] = await self._found(self._answers)
            for name, find in (
                ("key_after", self._key_after),
                ("body", self._body),
                ("busy", self._busy),
                ("key_during", self._key_during),
                ("slow", self._slow),
                ("hang_up", self._hang_up),
                ("cancel", self._cancel),
                ("accepted", self._accepted),
                ("retry_after", self._retry_after),
            ):
                no_run = Finding(NOT_SHOWN, "no call was answered as a run")
                found[name] = no_run if self._first is None else await self._found(find)
                if (
                    name in TIMED
                    and found[name].verdict == NOT_SHOWN
                    and self._probes.shortest >= SHORT
                ):
                    found[name] = await self._found(find)
            for name, find in (
                ("token", self._token),
                ("missing", self._missing),
                ("redirect", self._redirect),
            ):
                found[name] = await self._found(find)
        return [Row(name, property, _escaped(found[name])) for name, property in PROPERTIES.items()]

    @staticmethod
    async def _found(find: Callable[[], Awaitable[Finding]]) -> Finding:
        try:
            return await find()
        except Spent:
            return Finding(
                NOT_SHOWN,
                f"the limit of {REQUESTS} requests was used up",
                "see the rows above first",
            )

    def _too_short(self) -> Finding | None:
        if self._probes.shortest >= SHORT:
            return None
        if not self._probes.lengths:
            return Finding(NOT_SHOWN, "no run was seen to end", "see the rows above first")
        return Finding(
            NOT_SHOWN,
            f"the runs last {span(self._probes.shortest)}: too short to overlap",
            LONGER,
        )

    # --- the rows ---------------------------------------------------------------------------------

    async def _answers(self) -> Finding:
        key = self._probes.new_key()
        reply = await self._probes.when_free(lambda: self._probes.call(key))
        if isinstance(reply.outcome, Unavailable) and reply.answer is None:
            raise Trouble(
                f"the endpoint can't be reached: {reply.outcome.reason}",
                "check RECALL_RUN_URL, and that the API runs",
                status=UNREACHABLE,
            )
        if isinstance(reply.outcome, Busy):
            return Finding(
                FAIL, f"the session stays busy: {reply}", "--session with one that nobody uses"
            )
        if isinstance(reply.outcome, Gone):
            return Finding(
                FAIL,
                f"the API does not know the session: {reply}",
                "--session with one that exists",
            )
        if reply.answer is None:
            return Finding(
                FAIL, str(reply), "--timeout with more seconds, if the agent takes longer"
            )
        if not reply.got_in or (isinstance(reply.outcome, Unknown) and reply.status != 202):
            return Finding(
                FAIL,
                f"{reply}: {getattr(reply.outcome, 'reason', '')}",
                "200 and JSON when the run has ended",
            )
        self._first = run = await self._probes.to_its_end(reply)
        if run.length is None:
            return Finding(PASS, f"{reply}; its run was not seen to end")
        # A first run may be longer than others, as things are loaded for it: so a second one is
        # measured, too.
        another = self._probes.new_key()
        second = await self._probes.when_free(lambda: self._probes.call(another))
        if second.got_in:
            self._probes.measured(await self._probes.to_its_end(second))
        self._probes.measured(run)
        how = (
            ""
            if isinstance(run.outcome, Answered)
            else f", and says that the run failed: {getattr(run.outcome, 'reason', '')}"
        )
        return Finding(PASS, f"HTTP {reply.status}, after a run of {span(run.length)}{how}")

    async def _key_after(self) -> Finding:
        first = self._first
        assert first is not None
        again = await self._probes.when_free(lambda: self._probes.call(first.reply.key))
        if isinstance(again.outcome, Busy):
            return Finding(FAIL, f"the same request, after its run had ended: {again}", REMEMBER)
        if isinstance(first.reply.outcome, Accepted) and isinstance(again.outcome, Accepted):
            if first.reply.outcome.reference == again.outcome.reference:
                return Finding(PASS, "the same request was given the same run")
            await self._probes.to_its_end(again)
            return Finding(FAIL, "the same request was given another run", REMEMBER)
        if isinstance(again.outcome, Accepted):
            await self._probes.to_its_end(again)
        if not again.got_in or (
            first.ended_at is not None and name_of(again.outcome) != name_of(first.outcome)
        ):
            return Finding(
                FAIL, f"the same request was answered {first.reply} first, then {again}", REMEMBER
            )
        took, length = again.ended_at - again.sent_at, self._probes.shortest
        if again.is_replay:
            return Finding(
                PASS,
                (
                    f"the same request was answered after {span(took)}, as a replay "
                    "(Idempotent-Replayed)"
                ),
            )
        if length >= SHORT and took >= length / 2:
            return Finding(
                FAIL,
                (
                    f"the same request took {span(took)}, as long as a run ({span(length)}): it "
                    "ran again"
                ),
                REMEMBER,
            )
        if not isinstance(first.reply.outcome, Accepted) and again.document != first.reply.document:
            return Finding(
                FAIL,
                (
                    "the same request got another answer than the first time: it seems to have "
                    "run again"
                ),
                REMEMBER,
            )
        if length < SHORT:
            return Finding(
                NOT_SHOWN,
                f"the same answer, after {span(took)}: a replay, or a run as short as the first",
                REPLAYED,
            )
        return Finding(
            PASS,
            f"the same request was answered after {span(took)}, where a run takes {span(length)}",
        )

    async def _body(self) -> Finding:
        assert self._first is not None
        key = self._first.reply.key
        reply = await self._probes.when_free(
            lambda: self._probes.call(key, message=f"{MESSAGE} (another body)")
        )
        if isinstance(reply.outcome, Refused):
            return Finding(PASS, f"another body under a known key: {reply}")
        if reply.got_in:
            await self._probes.to_its_end(reply)
        return Finding(FAIL, f"another body under a known key: {reply}", PIN)

    async def _token(self) -> Finding:
        if not self._has_token:
            return Finding(
                NOT_SHOWN,
                "no token is set",
                "set RECALL_RUN_TOKEN, so that nobody else can run your agent",
            )
        for token, which in (("wrong-" + secrets.token_hex(8), "a wrong token"), ("", "no token")):
            key = self._probes.new_key()
            reply = await self._probes.when_free(
                functools.partial(self._probes.call, key, token=token)
            )
            if reply.got_in:
                await self._probes.to_its_end(reply)
            if reply.status not in (401, 403):
                return Finding(
                    FAIL,
                    f"a call with {which}: {reply}",
                    "401 to every call without the right token, before anything else",
                )
        return Finding(PASS, f"a wrong token and none: HTTP {reply.status}")

    async def _missing(self) -> Finding:
        key = self._probes.new_key()
        reply = await self._probes.when_free(
            lambda: self._probes.call(key, session=self._missing_session)
        )
        if isinstance(reply.outcome, Gone):
            return Finding(PASS, f"session {self._missing_session}: {reply}")
        if reply.got_in:
            return Finding(
                FAIL,
                f"session {self._missing_session}: {reply}; it was created, or run without one",
                NAME_IT,
            )
        return Finding(FAIL, f"session {self._missing_session}: {reply}", NAME_IT)

    async def _busy(self) -> Finding:
        shown = unclear = 0
        refused: set[int] = set()
        for _ in range(ROUNDS + 2):
            if shown + unclear == ROUNDS:
                break
            replies = await asyncio.gather(
                *(self._probes.call(self._probes.new_key()) for _ in range(TOGETHER))
            )
            runs = await asyncio.gather(
                *(self._probes.to_its_end(reply) for reply in replies if reply.got_in)
            )
            odd = [
                reply
                for reply in replies
                if not reply.got_in and not isinstance(reply.outcome, Busy)
            ]
            if odd:
                return Finding(FAIL, f"{TOGETHER} calls at once: one was answered {odd[0]}", ATOMIC)
            refused |= {
                reply.status for reply in replies if not reply.got_in and reply.status is not None
            }
            if not runs:
                await self._probes.rest(replies[0])
            elif len(runs) == 1:
                shown += 1
                self._probes.measured(runs[0])
            elif met := self._met(runs):
                return Finding(
                    FAIL, f"{TOGETHER} calls at once: {len(runs)} were accepted, and {met}", ATOMIC
                )
            else:
                unclear += 1
        codes = ", ".join(map(str, sorted(refused)))
        if shown:
            rest = f"; {unclear} more showed nothing, as the runs are too short" if unclear else ""
            return Finding(
                PASS,
                (
                    f"{TOGETHER} calls at once: one was accepted, the others answered {codes}; "
                    f"{shown} times{rest}"
                ),
            )
        if unclear:
            return self._too_short() or Finding(
                NOT_SHOWN, "all were accepted, one after the other", LONGER
            )
        return Finding(
            FAIL, f"{TOGETHER} calls at once: none was accepted (HTTP {codes}), each time", ATOMIC
        )

    def _met(self, runs: list[Run]) -> str | None:
        """Why several accepted calls at once are a failure; None if the runs may be too short to
        overlap.
        """
        spans = sorted(run.length for run in runs if run.length is not None)
        if not self._probes.lengths or len(spans) < 2:
            return "no run was seen to end before another was accepted"
        if (
            self._probes.shortest < SHORT
            or max(r.reply.sent_at for r in runs) - min(r.reply.sent_at for r in runs)
            > self._probes.shortest / 2
        ):
            return None
        if spans[0] < self._probes.shortest / 2:
            return (
                f"one was answered after {span(spans[0])}, where a run takes "
                f"{span(self._probes.shortest)}: busy must not be answered as a success"
            )
        if spans[-1] - spans[0] > self._probes.shortest / 2:
            return (
                "waited for one another: the second caller of a session must be refused, not queued"
            )
        return "ran at the same time"

    async def _key_during(self) -> Finding:
        if (short := self._too_short()) is not None:
            return short
        flight = await self._probes.leave_open(self._probes.shortest / 2)
        assert flight.task is not None
        again = await self._probes.call(flight.key)
        first = await flight.task
        if not first.got_in:
            return Finding(FAIL, f"a call that had the session to itself: {first}", UNTIL)
        run = await self._probes.to_its_end(first)
        if isinstance(again.outcome, Busy):
            self._probes.measured(run)
            return Finding(PASS, f"the same request while its run was on: {again}")
        if isinstance(again.outcome, Accepted):
            if isinstance(first.outcome, Accepted):
                if first.outcome.reference == again.outcome.reference:
                    self._probes.measured(run)
                    return Finding(
                        PASS,
                        f"the same request while its run was on was given the same run: {again}",
                    )
                await self._probes.to_its_end(again)
                return Finding(
                    FAIL, "the same request while its run was on was given another run", ONCE
                )
            later = await self._probes.to_its_end(again, at_once=True)
            if (
                later.ended_at is not None
                and later.ended_at - first.ended_at < self._probes.shortest / 4
            ):
                return Finding(
                    PASS, "the same request while its run was on got the address to poll"
                )
            return Finding(
                FAIL, "the same request while its run was on was accepted as another run", ONCE
            )
        if not again.got_in:
            return Finding(FAIL, f"the same request while its run was on: {again}", ONCE)
        if run.on_until - again.ended_at > (
            0.0 if isinstance(first.outcome, Accepted) else self._probes.shortest / 4
        ):
            return Finding(
                FAIL,
                f"the same request while its run was on was answered as if it had ended: {again}",
                ONCE,
            )
        if again.is_replay:
            self._probes.measured(run)
            return Finding(
                PASS,
                (
                    "the same request while its run was on waited for its end and got its answer "
                    "(Idempotent-Replayed)"
                ),
            )
        if run.ended_at is None or run.ended_at < again.sent_at + self._probes.shortest / 8:
            return Finding(
                NOT_SHOWN, "the run ended before the same request could be made again", LONGER
            )
        apart = again.ended_at - run.ended_at
        if apart > self._probes.shortest / 4:
            return Finding(
                FAIL,
                f"the same request while its run was on ended {span(apart)} after it: a second run",
                ONCE,
            )
        if again.document == first.document:
            return Finding(
                PASS, "the same request while its run was on waited for its end and got its answer"
            )
        return Finding(
            NOT_SHOWN,
            "the same request while its run was on ended with it, and was answered otherwise",
        )

    async def _slow(self) -> Finding:
        if (short := self._too_short()) is not None:
            return short
        flight = await self._probes.leave_open(self._probes.shortest / 6)
        assert flight.task is not None
        refused: list[Reply] = []
        late: Reply | None = None
        for _ in range(5):
            if flight.task.done() and not isinstance(flight.task.result().outcome, Accepted):
                break
            then = time.monotonic() + self._probes.shortest / 6
            reply = await self._probes.call(self._probes.new_key())
            if not isinstance(reply.outcome, Busy):
                late = reply
                break
            refused.append(reply)
            await asyncio.wait({flight.task}, timeout=max(0.0, then - time.monotonic()))
            if flight.task.done() and isinstance(flight.task.result().outcome, Accepted):
                await asyncio.sleep(max(0.0, then - time.monotonic()))
        run = await self._probes.to_its_end(await flight.task, at_once=True)
        if late is not None:
            if not late.got_in:
                return Finding(FAIL, f"another call while a run was on: {late}", UNTIL)
            await self._probes.to_its_end(late)
            after = late.sent_at - flight.sent_at
            if (
                run.on_until >= late.ended_at
                or run.on_until - late.sent_at >= self._probes.shortest / 4
            ):
                lasted = "goes on" if run.length is None else f"took {span(run.length)}"
                return Finding(
                    FAIL,
                    f"another call was accepted {span(after)} after a run had begun that {lasted}",
                    UNTIL,
                )
        if not run.reply.got_in:
            return Finding(
                FAIL, f"a call that came first, while others were refused: {run.reply}", UNTIL
            )
        self._probes.measured(run)
        if len(refused) < 2:
            return Finding(NOT_SHOWN, "the run ended before others could be refused", LONGER)
        times = " to ".join(
            span(reply.sent_at - flight.sent_at) for reply in (refused[0], refused[-1])
        )
        return Finding(
            PASS,
            (
                f"{len(refused)} calls, {times} into a run of {span(run.length)}: HTTP "
                f"{refused[0].status}"
            ),
        )

    async def _hang_up(self) -> Finding:
        if (short := self._too_short()) is not None:
            return short
        flight = await self._probes.leave_open(self._probes.shortest / 2)
        assert flight.task is not None
        if flight.task.done():
            return await self._left_after_answer(flight.task.result())
        flight.task.cancel()
        await asyncio.wait({flight.task})
        usual = median(self._probes.lengths)
        again = await self._probes.call(flight.key)
        for _ in range(6):
            if not isinstance(again.outcome, Busy):
                break
            await asyncio.sleep(usual * 0.3)
            again = await self._probes.call(flight.key)
        if not again.got_in:
            return Finding(
                FAIL,
                (
                    "a caller who disconnected and called again, "
                    f"{span(again.sent_at - flight.sent_at)} on: {again}"
                ),
                OUTLIVE,
            )
        run = await self._probes.to_its_end(again, at_once=True)
        if (
            run.ended_at is not None
            and run.ended_at < flight.sent_at + self._probes.shortest * 0.75
        ):
            return Finding(
                FAIL,
                (
                    "a caller who disconnected and called again was answered before the run can "
                    f"have ended: {again}"
                ),
                OUTLIVE,
            )
        if again.is_replay and not isinstance(again.outcome, Accepted):
            return Finding(
                PASS,
                (
                    "a caller who disconnected and called again got the answer of the first run "
                    "(Idempotent-Replayed)"
                ),
            )
        if run.ended_at is None or run.length is None:
            return Finding(NOT_SHOWN, "the run that was called again was not seen to end")
        if run.length < self._probes.shortest * 0.75:
            return Finding(
                PASS,
                (
                    f"a caller who disconnected and called again had the answer {span(run.length)} "
                    "later: the first run's"
                ),
            )
        if (
            again.sent_at > flight.sent_at + max(self._probes.lengths)
            or run.on_until - flight.sent_at > usual * 1.25
        ):
            on = span(run.on_until - flight.sent_at)
            return Finding(
                FAIL,
                (
                    f"a caller who disconnected and called again made it run again: a run was on "
                    f"{on} after the first call"
                ),
                OUTLIVE,
            )
        return Finding(NOT_SHOWN, "the runs differ too much in length to tell one run from two")

    async def _left_after_answer(self, first: Reply) -> Finding:
        """The finding if a run is accepted before its caller can disconnect."""
        if not isinstance(first.outcome, Accepted):
            return Finding(
                NOT_SHOWN,
                f"the call was answered before its caller could disconnect: {first}",
                LONGER,
            )
        again = await self._probes.call(first.key)
        await self._probes.to_its_end(first, at_once=True)
        if (
            isinstance(again.outcome, Accepted)
            and again.outcome.reference == first.outcome.reference
        ):
            return Finding(
                PASS,
                "accepted before its caller could disconnect; the second call got the same run",
            )
        if isinstance(again.outcome, Busy) or (again.got_in and again.is_replay):
            return Finding(
                PASS, f"accepted before its caller could disconnect; the second call: {again}"
            )
        return Finding(
            FAIL,
            f"accepted before its caller could disconnect; the second call: {again}, another run",
            OUTLIVE,
        )

    async def _cancel(self) -> Finding:
        if not any(run.ended_at is not None for run in self._probes.followed):
            return Finding(
                NOT_SHOWN,
                "not offered: no run was accepted"
                if not self._probes.followed
                else "no accepted run was seen to end",
            )
        reply = await self._probes.when_free(lambda: self._probes.call(self._probes.new_key()))
        if not isinstance(reply.outcome, Accepted):
            return Finding(NOT_SHOWN, f"this time, no run was accepted: {reply}")
        asked = await self._probes.of_run("DELETE", reply)
        run = await self._probes.polled(reply, at_once=True)
        if asked.status in (404, 405, 501):
            return Finding(
                NOT_SHOWN, f"not offered: DELETE of a run was answered HTTP {asked.status}"
            )
        if asked.status is None or not 200 <= asked.status < 300:
            return Finding(FAIL, f"DELETE of a run: {asked}", END_IT)
        if isinstance(run.outcome, Answered):
            if run.on_until - asked.ended_at < self._probes.shortest / 4:
                return Finding(NOT_SHOWN, "the run had ended before it could be ended", LONGER)
            return Finding(
                FAIL, f"DELETE of a run: HTTP {asked.status}, but it went on to its end", END_IT
            )
        if run.ended_at is None and getattr(run.outcome, "http_status", None) not in (404, 410):
            return Finding(
                FAIL, f"DELETE of a run: HTTP {asked.status}, but it was not seen to end", END_IT
            )
        following = await self._probes.when_free(lambda: self._probes.call(self._probes.new_key()))
        if isinstance(following.outcome, Busy):
            return Finding(
                FAIL,
                f"DELETE of a run: HTTP {asked.status}, but the session stays busy afterwards",
                END_IT,
            )
        if following.got_in:
            await self._probes.to_its_end(following)
        return Finding(
            PASS, f"DELETE of a run: HTTP {asked.status}; it ended, and the session was free"
        )

    async def _accepted(self) -> Finding:
        for reply in self._probes.replies:
            if reply.status == 202 and isinstance(reply.outcome, Unknown):
                return Finding(
                    FAIL,
                    reply.outcome.reason,
                    "Location on the API's own origin: the token is sent there",
                )
            if (
                reply.status == 202
                and isinstance(reply.outcome, Answered)
                and _word(reply) not in FINAL_WORDS
            ):
                return Finding(
                    FAIL,
                    "202 without Location or run_id: read as the run's end",
                    "Location, or run_id and status, with each 202",
                )
        if not self._probes.followed:
            return Finding(NOT_SHOWN, "not offered: every call was answered when its run had ended")
        lost = [run for run in self._probes.followed if run.ended_at is None]
        if lost:
            why = getattr(lost[0].outcome, "reason", "")
            return Finding(
                FAIL,
                (
                    f"{len(lost)} of {len(self._probes.followed)} accepted runs were not seen to "
                    f"end: {why}"
                ),
                POLL,
            )
        words = ", ".join(sorted({name_of(run.outcome) for run in self._probes.followed}))
        return Finding(
            PASS, f"{len(self._probes.followed)} accepted runs were polled to their end ({words})"
        )

    async def _redirect(self) -> Finding:
        for reply in self._probes.replies:
            if reply.answer is not None and 300 <= reply.answer.status < 400:
                to = reply.answer.headers.get("Location", "nowhere")[:200]
                return Finding(
                    FAIL,
                    f"HTTP {reply.answer.status} to {to}",
                    "give the final address as RECALL_RUN_URL: redirects aren't followed",
                )
        return Finding(
            PASS,
            (
                f"none of {sum(reply.answer is not None for reply in self._probes.replies)} "
                "answers was a redirect"
            ),
        )

    async def _retry_after(self) -> Finding:
        busy = [reply for reply in self._probes.replies if isinstance(reply.outcome, Busy)]
        if not busy:
            return Finding(NOT_SHOWN, "no session was busy")
        pauses = [reply.outcome.retry_after for reply in busy if isinstance(reply.outcome, Busy)]
        if None in pauses:
            return Finding(
                NOT_SHOWN,
                f"{pauses.count(None)} of {len(pauses)} busy answers had no Retry-After",
                "send it: without it a worker waits 60 s",
            )
        return Finding(
            PASS,
            (
                f"{len(pauses)} busy answers had Retry-After "
                f"({', '.join(f'{s:g}' for s in sorted({p or 0.0 for p in pauses}))} s)"
            ),
        )


LONGER = "let the agent take half a second for this message, and check again"
REMEMBER = (
    "keep the answer under Idempotency-Key for two days, and send it again to the same request"
)
REPLAYED = "send Idempotent-Replayed: true with a repeated answer"
PIN = "422 if the body's hash differs from the one kept with the key"
NAME_IT = '404 with {"code": "session_not_found"}; --missing-session gives another id to try'
ATOMIC = (
    "take the session in one atomic step (a unique row, a conditional update); answer the second "
    "call 409"
)
ONCE = "keep the key when the run starts: 409 (or the same 202) until it has ended"
UNTIL = "free the session when the run has ended, not before: renew its busy mark, if that expires"
OUTLIVE = "let the run go on when its caller disconnects; meanwhile 409, afterwards its answer"
POLL = "GET at the Location: a status, in the end one of completed, failed, cancelled"
END_IT = "DELETE at the Location ends the run, and frees the session"


def _word(reply: Reply) -> str:
    return str(reply.document.get("status")).lower() if isinstance(reply.document, dict) else ""


def _escaped(found: Finding) -> Finding:
    """A server's text may contain control characters for a terminal."""
    return Finding(
        found.verdict,
        escape_controls(found.seen)[:500],
        None if found.todo is None else escape_controls(found.todo),
    )
