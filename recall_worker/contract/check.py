"""Does an API keep the contract of the run endpoint? For its author: one row for each property,
with what was seen.

What an API does inside can't be seen from outside, so the rows about runs reason by time: the
length of a run is measured first, on calls that have the session to themselves. If runs are too
short to overlap, or a measurement is doubtful, the verdict is "not shown", never "pass".

A row passes only if nothing that is seen later contradicts it: what all answers say together
(addresses, words, streams, gateways, redirects) is judged at the end, the first key is called once
more then, and a row that others disprove is taken back.

Never here: how a probe is made (probes), how rows are shown (cli/check_endpoint), the database, a
session that was not named (except one that does not exist).
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..events import escape_controls
from ..protocols.native import LOCATIONS, goes_on
from ..protocols.outcomes import (
    Word,
    is_stream,
    meaning,
    members,
    reason_in,
    retry_after,
)
from ..recall import (
    Accepted,
    Answered,
    Busy,
    Failed,
    Gone,
    Misconfigured,
    Refused,
    Unavailable,
    Unknown,
    name_of,
)
from ..settings import Settings
from ..terminal import UNREACHABLE, Trouble, span
from .probes import MESSAGE, REQUESTS, Probes, Reply, Run, Secrets, Spent

TOGETHER, ROUNDS = 3, 3
"""Calls at once in one session, and how often."""
SHORT = 0.2
"""Seconds: whether shorter runs overlapped can't be seen from outside."""
PASS, FAIL, NOT_SHOWN = "pass", "fail", "not shown"
TIMED = ("key_during", "slow", "hang_up")
"""Rows that a slow machine can spoil: if one is not shown, it is tried a second time."""
PROPERTIES = {
    "answers": "answers a call with 2xx",
    "gateway": "answers itself, and no gateway for it",
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
    "words": "says how a run stands in words that are known (advice)",
    "stream": "ends a streamed answer whole",
    "large": "keeps an answer within 1 MiB (advice)",
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
        self._has_headers = settings.run_headers is not None
        self._missing_session = missing_session
        self._first: Run | None = None
        self._first_reply: Reply | None = None
        """The answer to the first call, whether it was one or not."""
        self._refused_again = False
        """Whether the same request under a known key was refused."""

    @property
    def requests(self) -> int:
        """The number of requests made."""
        return self._probes.made

    async def rows(self) -> list[Row]:
        """All rows, in the order in which they are shown. Raises Trouble if no connection to the
        endpoint can be made.
        """
        found: dict[str, Finding] = {}
        no_run = Finding(NOT_SHOWN, "no call was answered as a run")
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
            ):
                found[name] = no_run if self._first is None else await self._found(find)
                if (
                    name in TIMED
                    and found[name].verdict == NOT_SHOWN
                    and self._probes.shortest >= SHORT
                ):
                    found[name] = await self._found(find)
            for name, find in (("token", self._token), ("missing", self._missing)):
                found[name] = await self._found(find)
            ended = self._first is not None and self._first.ended_at is not None
            if ended and found["key_after"].verdict != FAIL:
                found["key_after"] = await self._found(
                    functools.partial(self._key_at_the_end, found["key_after"])
                )
        # What all answers say together.
        found |= {
            "gateway": self._gateway(),
            "redirect": self._redirect(),
            "stream": self._stream(),
        }
        for name, judge in (
            ("accepted", self._accepted),
            ("words", self._words),
            ("large", self._large),
            ("retry_after", self._retry_after),
        ):
            found[name] = no_run if self._first is None else judge()
        if found["answers"].verdict == PASS:
            found["answers"] = self._answers_all(found["answers"])
        return [
            Row(name, property, self._shown(found[name])) for name, property in PROPERTIES.items()
        ]

    def _shown(self, found: Finding) -> Finding:
        """A server's text may repeat a secret, and contain control characters for a terminal."""
        return Finding(
            found.verdict,
            escape_controls(self._probes.hide(found.seen))[:500],
            None if found.todo is None else escape_controls(found.todo),
        )

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
        self._first_reply = reply
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
            todo = "--timeout with more seconds, if the agent takes longer"
            if reply.cut is not None:
                todo = "answer to the end: with Content-Length, or the last chunk" + (
                    f"; {todo}" if "did not end" in str(reply) else ""
                )
            return Finding(FAIL, str(reply), todo)
        if not reply.got_in or (isinstance(reply.outcome, Unknown) and reply.lost is None):
            return Finding(FAIL, f"{reply}: {_reason(reply)}", self._todo_of(reply))
        self._first = run = await self._probes.to_its_end(reply)
        if run.length is None:
            why = f": {run.lost}" if run.lost else ""
            return Finding(
                NOT_SHOWN,
                f"{reply}; how its run ended could not be read{why}",
                "see the row of accepted runs",
            )
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

    def _todo_of(self, reply: Reply) -> str:
        """What to do where the first call was answered, and not as a run."""
        status = reply.status
        if status in (401, 403):
            given = [
                name
                for name, is_set in (
                    ("RECALL_RUN_TOKEN", self._has_token),
                    ("RECALL_RUN_HEADERS_FILE", self._has_headers),
                )
                if is_set
            ]
            if given:
                return f"the value that the API wants, in {' or '.join(given)}"
            return "set RECALL_RUN_TOKEN, or RECALL_RUN_HEADERS_FILE for headers such as x-api-key"
        if reply.by_gateway:
            return GATEWAYS
        if status in (404, 410):
            return f"check RECALL_RUN_URL; if the session is what is missing: {NAME_IT}"
        if isinstance(reply.outcome, Misconfigured):
            return "check RECALL_RUN_URL"
        return "200 when the run has ended"

    def _answers_all(self, first: Finding) -> Finding:
        """The finding of the first row, if later calls were answered, too."""
        odd = [r for r in self._probes.replies if r.ours and _is_trouble(r)]
        if not odd:
            return first
        return Finding(
            NOT_SHOWN,
            f"{first.seen}; but {len(odd)} of {len(self._probes.replies)} calls were not answered "
            f"so: {odd[0]}",
            "see the rows below",
        )

    async def _key_after(self) -> Finding:
        first = self._first
        assert first is not None
        again = await self._probes.when_free(lambda: self._probes.call(first.reply.key))
        if isinstance(again.outcome, Busy):
            return Finding(FAIL, f"the same request, after its run had ended: {again}", REMEMBER)
        if isinstance(first.reply.outcome, Accepted) and isinstance(again.outcome, Accepted):
            if first.reply.outcome.reference == again.outcome.reference:
                if first.ended_at is None:
                    return Finding(
                        NOT_SHOWN,
                        "the same request was given the same run, which was not seen to end",
                        "see the row of accepted runs",
                    )
                return Finding(PASS, "the same request was given the same run")
            await self._probes.to_its_end(again)
            return Finding(FAIL, "the same request was given another run", REMEMBER)
        self._refused_again = isinstance(again.outcome, Refused)
        if again.by_gateway:
            return Finding(NOT_SHOWN, f"the same request was answered by a gateway: {again}")
        if isinstance(again.outcome, Accepted):
            await self._probes.to_its_end(again)
        if not again.got_in or (
            first.ended_at is not None and name_of(again.outcome) != name_of(first.outcome)
        ):
            return Finding(
                FAIL, f"the same request was answered {first.reply} first, then {again}", REMEMBER
            )
        if first.ended_at is None:
            return Finding(
                NOT_SHOWN,
                f"the first run was not seen to end; the same request: {again}",
                "see the row of accepted runs",
            )
        took, length = again.ended_at - again.sent_at, self._probes.shortest
        for _ in range(2):
            if not again.is_replay or length < SHORT or took < length / 2:
                break
            # It says that nothing ran: the machine, or the way, may have been slow.
            once_more = await self._probes.call(first.reply.key)
            took = min(took, once_more.ended_at - once_more.sent_at)
        says = ", though it is called a replay (Idempotent-Replayed)" if again.is_replay else ""
        if length >= SHORT and took >= length / 2:
            return Finding(
                FAIL,
                (
                    f"the same request took {span(took)}, as long as a run ({span(length)}): it "
                    f"ran again{says}"
                ),
                REMEMBER,
            )
        if not isinstance(first.reply.outcome, Accepted) and again.document != first.reply.document:
            return Finding(
                FAIL,
                (
                    "the same request got another answer than the first time: it seems to have "
                    f"run again{says}"
                ),
                REMEMBER,
            )
        if again.is_replay:
            return Finding(
                PASS,
                (
                    f"the same request was answered after {span(took)}, as a replay "
                    "(Idempotent-Replayed)"
                ),
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

    async def _key_at_the_end(self, before: Finding) -> Finding:
        """The finding about a key after its run, if the first key is still known at the end."""
        first = self._first
        assert first is not None
        try:
            again = await self._probes.when_free(lambda: self._probes.call(first.reply.key))
        except Spent:
            return before
        took, length = again.ended_at - again.sent_at, self._probes.shortest
        if length >= SHORT and took >= length / 2:
            same = False
        elif isinstance(first.reply.outcome, Accepted) and isinstance(again.outcome, Accepted):
            same = first.reply.outcome.reference == again.outcome.reference
        else:
            same = again.got_in and (
                isinstance(first.reply.outcome, Accepted) or again.document == first.reply.document
            )
        if same or again.by_gateway:
            return before
        await self._probes.to_its_end(again)
        return Finding(
            FAIL,
            f"at first: {before.seen}; but {len(self._probes.replies)} calls later the same one "
            f"took {span(took)}: {again}",
            REMEMBER,
        )

    async def _body(self) -> Finding:
        assert self._first is not None
        key = self._first.reply.key
        reply = await self._probes.when_free(
            lambda: self._probes.call(key, message=f"{MESSAGE} (another body)")
        )
        if isinstance(reply.outcome, Refused):
            if self._refused_again:
                return Finding(
                    NOT_SHOWN, f"refused, but so is the same body under a known key: {reply}"
                )
            return Finding(PASS, f"another body under a known key: {reply}")
        if reply.got_in:
            await self._probes.to_its_end(reply)
        return Finding(FAIL, f"another body under a known key: {reply}", PIN)

    async def _token(self) -> Finding:
        if not self._has_token and not self._has_headers:
            return Finding(
                NOT_SHOWN,
                "no token is set",
                "set RECALL_RUN_TOKEN, so that nobody else can run your agent",
            )
        what = "token" if self._has_token else "header"
        statuses = set()
        tries: tuple[tuple[Secrets, str], ...] = (("wrong", f"a wrong {what}"), ("none", "none"))
        for kind, which in tries:
            key = self._probes.new_key()
            reply = await self._probes.when_free(
                functools.partial(self._probes.call, key, secrets=kind)
            )
            if reply.got_in:
                await self._probes.to_its_end(reply)
            if (always := self._like_every_call(reply)) is not None:
                return always
            # A gateway that wants a pass sends those without one to its login page.
            at_the_gate = self._has_headers and 300 <= (reply.status or 0) < 400
            if reply.status not in (401, 403) and not at_the_gate:
                return Finding(
                    FAIL,
                    f"a call with {which if which != 'none' else f'no {what}'}: {reply}",
                    f"401 to every call without the right {what}, before anything else",
                )
            statuses.add(str(reply.status))
        return Finding(PASS, f"a wrong {what}, and none: HTTP {', '.join(sorted(statuses))}")

    def _like_every_call(self, reply: Reply) -> Finding | None:
        """The finding where an answer shows nothing, as the first call had the same one."""
        first = self._first_reply
        if first is None or self._first is not None or reply.status != first.status:
            return None
        if isinstance(first.outcome, Misconfigured | Unknown | Unavailable | Gone):
            return Finding(NOT_SHOWN, f"answered as every call is: {reply}", SEE_FIRST)
        return None

    async def _missing(self) -> Finding:
        key = self._probes.new_key()
        reply = await self._probes.when_free(
            lambda: self._probes.call(key, session=self._missing_session)
        )
        seen = f"session {self._missing_session}: {reply}"
        if (always := self._like_every_call(reply)) is not None:
            return always
        if isinstance(reply.outcome, Gone):
            return Finding(PASS, seen)
        if reply.got_in:
            await self._probes.to_its_end(reply)
            return Finding(FAIL, f"{seen}; it was created, or run without one", NAME_IT)
        if reply.status in (404, 410):
            said = _detail(reply)
            if said is not None:
                seen += f', with {{"detail": "{said[:100]}"}}: no code names the session'
                return Finding(FAIL, seen, NAME_IT_FASTAPI)
            return Finding(FAIL, f"{seen}: no code names the session", NAME_IT)
        return Finding(FAIL, seen, NAME_IT)

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
        if again.is_replay:
            self._probes.measured(run)
            return Finding(
                PASS,
                (
                    "the same request while its run was on waited for its end and got its answer "
                    "(Idempotent-Replayed)"
                ),
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
        if run.ended_at is None or run.length is None:
            return Finding(NOT_SHOWN, "the run that was called again was not seen to end")
        if run.length < self._probes.shortest * 0.75:
            if again.is_replay and not isinstance(again.outcome, Accepted):
                return Finding(
                    PASS,
                    (
                        "a caller who disconnected and called again got the answer of the first "
                        "run (Idempotent-Replayed)"
                    ),
                )
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
        if not await self._probes.is_deletable(reply):
            return Finding(
                NOT_SHOWN, "the run had ended before it could be ended at the address of its id"
            )
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

    # --- what all answers say together ------------------------------------------------------------

    def _accepted(self) -> Finding:
        lost = [(r.lost, r.outcome) for r in self._probes.replies if r.lost is not None]
        lost += [(r.lost, r.outcome) for r in self._probes.followed if r.lost is not None]
        if lost:
            why, outcome = lost[0]
            so = (
                "the occurrence fails, and is not posted again"
                if isinstance(outcome, Unknown)
                else "the worker takes the answer for the run's end"
            )
            return Finding(
                FAIL,
                f"{_times(len(lost), 'run')} can't be followed: {why}; so {so}",
                OWN_HOST if "another host" in why else ADDRESS,
            )
        if not self._probes.followed:
            return Finding(NOT_SHOWN, "not offered: every call was answered when its run had ended")
        unended = [run for run in self._probes.followed if run.ended_at is None]
        if unended:
            why = getattr(unended[0].outcome, "reason", "")
            others = sorted({str(s) for s, word in self._spoken() if word is Word.OTHER})
            unknown = f" (its status: {', '.join(others)[:100]})" if others else ""
            return Finding(
                FAIL,
                (
                    f"{len(unended)} of {len(self._probes.followed)} accepted runs were not seen "
                    f"to end: {why}{unknown}"
                ),
                POLL,
            )
        ways = ", ".join(sorted({_way(run.reply) for run in self._probes.followed}))
        words = ", ".join(sorted({name_of(run.outcome) for run in self._probes.followed}))
        seen = f"{_times(len(self._probes.followed), 'accepted run')} polled to the end ({words})"
        notes = [
            run.reply.outcome.note
            for run in self._probes.followed
            if isinstance(run.reply.outcome, Accepted) and run.reply.outcome.note
        ]
        if notes:
            return Finding(PASS, f"{seen}, by {ways}; noted: {notes[0]}", OWN_SCHEME)
        return Finding(PASS, f"{seen}, by {ways}")

    def _spoken(self) -> list[tuple[object, Word]]:
        """Every `status` of an answer about a run, and what it means to the worker."""
        found = []
        for reply in [*self._probes.replies, *self._probes.polls]:
            if reply.answer is None or not 200 <= reply.answer.status < 300:
                continue
            status = (members(reply.answer) or {}).get("status")
            if status is not None:
                found.append((status, meaning(status)))
        return found

    def _words(self) -> Finding:
        spoken = self._spoken()
        if not spoken:
            return Finding(NOT_SHOWN, "no answer has a status: each 2xx is taken for a good end")
        others = sorted({str(status)[:40] for status, word in spoken if word is Word.OTHER})
        if others:
            return Finding(
                NOT_SHOWN,
                f"status {', '.join(others)[:200]}: not known; in a 202 and in a poll it means "
                "that the run goes on, else that it ended well",
                KNOWN_WORDS,
            )
        said = {str(status).strip().lower(): word for status, word in spoken}
        return Finding(
            PASS,
            "; ".join(
                f"{', '.join(sorted(s for s, w in said.items() if w is word))} ({word.value})"
                for word in Word
                if word in said.values()
            )[:400],
        )

    def _stream(self) -> Finding:
        all_of_them = [
            (reply, answer)
            for reply in self._probes.replies
            if (answer := reply.answer or reply.cut) is not None
            and answer.status < 300
            and is_stream(answer)
        ]
        if not all_of_them:
            return Finding(NOT_SHOWN, "not offered: no answer was a stream")
        broken = [reply for reply, _ in all_of_them if reply.answer is None]
        if broken:
            return Finding(
                FAIL,
                f"{len(broken)} of {len(all_of_them)} streams did not end whole: {broken[0]}",
                WHOLE,
            )
        failed = [r for r, _ in all_of_them if isinstance(r.outcome, Failed)]
        ends = (
            f"{len(failed)} ended with an error: {_reason(failed[0])}"
            if failed
            else ("none ended with an error")
        )
        return Finding(PASS, f"{_times(len(all_of_them), 'stream')} read to the end; {ends}")

    def _large(self) -> Finding:
        asked = [*self._probes.replies, *self._probes.polls]
        longest = max(asked, key=lambda reply: reply.length, default=None)
        if longest is None or longest.length == 0:
            return Finding(NOT_SHOWN, "no answer has a body")
        size = (
            f"{longest.length / (1 << 20):.1f} MiB"
            if longest.length >= 1 << 20
            else (f"{longest.length} octets")
        )
        answer = longest.answer or longest.cut
        if answer is None or not answer.truncated:
            return Finding(PASS, f"the longest answer has {size}")
        if is_stream(answer):
            return Finding(PASS, f"the longest answer is a stream of {size}: its end is read")
        if (members(answer) or {}).get("status") is not None:
            return Finding(PASS, f"the longest answer has {size}; its status is read")
        return Finding(
            NOT_SHOWN,
            f"the longest answer has {size}: read to its end, but a status between its first MiB "
            "and its last 64 KiB is not seen, and a run that failed counts as ended well",
            "a short answer, or `status` as the first member of it",
        )

    def _gateway(self) -> Finding:
        asked = [*self._probes.replies, *self._probes.polls]
        by_gateway = [reply for reply in asked if reply.by_gateway]
        answered = sum(reply.answer is not None for reply in asked)
        if by_gateway:
            assert by_gateway[0].answer is not None
            said = reason_in(by_gateway[0].answer)
            return Finding(
                FAIL,
                f"{len(by_gateway)} of {answered} answers were a gateway's, for an application "
                f"that it could not reach or that was too slow{said}",
                GATEWAYS,
            )
        if not answered:
            return Finding(NOT_SHOWN, "there was no answer")
        return Finding(PASS, f"none of {answered} answers was a gateway's (502, 504, 52x)")

    def _redirect(self) -> Finding:
        # A gateway that wants a pass sends those without one to its login page.
        asked = [r for r in self._probes.replies if r.ours]
        moved = [r for r in asked if r.answer is not None and 300 <= r.answer.status < 400]
        moved += [
            poll
            for poll in self._probes.polls
            if poll.answer is not None and 300 <= poll.answer.status < 400 and poll.status != 303
        ]
        if moved:
            assert moved[0].answer is not None
            to = moved[0].answer.headers.get("Location", "nowhere")[:200]
            return Finding(
                FAIL,
                f"HTTP {moved[0].status} to {to}",
                "give the final address as RECALL_RUN_URL: redirects aren't followed"
                if moved[0] in asked
                else "the final address in Location: redirects aren't followed",
            )
        answered = sum(reply.answer is not None for reply in asked)
        if not answered:
            return Finding(NOT_SHOWN, "there was no answer")
        return Finding(PASS, f"none of {answered} answers was a redirect")

    def _retry_after(self) -> Finding:
        """Advice: never a failure. Also what the answers of accepted runs say of polls."""
        busy = [r for r in self._probes.replies if isinstance(r.outcome, Busy)]
        accepted = [r for r in self._probes.replies if isinstance(r.outcome, Accepted)]
        going_on = [
            r
            for r in self._probes.polls
            if r.answer is not None and 200 <= r.answer.status < 300 and goes_on(r.answer)
        ]
        parts, missing = [], []
        for replies, what, without in (
            (busy, "busy answer", "a worker waits 60 s"),
            (accepted, "accepted run", "the first poll comes at once"),
            (going_on, "poll", "pauses grow from 0.5 s to 10 s"),
        ):
            if not replies:
                continue
            raw = [r.answer.headers.get("Retry-After") for r in replies if r.answer is not None]
            pauses = {p for r in replies if r.answer and (p := retry_after(r.answer.headers))}
            bad = {
                text
                for r, text in zip(replies, raw, strict=True)
                if text is not None and r.answer and retry_after(r.answer.headers) is None
            }
            if bad:
                missing.append(f"{what}s with a Retry-After that can't be read: {min(bad)[:40]!r}")
            elif None in raw:
                if what == "busy answer":
                    missing.append(
                        f"{raw.count(None)} of {_times(len(raw), what)} had no "
                        f"Retry-After: {without}"
                    )
                else:
                    parts.append(f"{_times(len(raw), what)} without ({without})")
            else:
                most = 300.0 if what != "busy answer" else 86_400.0
                seconds = ", ".join(f"{min(p, most):g}" for p in sorted(pauses))
                parts.append(f"{_times(len(raw), what)} with Retry-After ({seconds} s)")
        if missing:
            return Finding(NOT_SHOWN, "; ".join(missing + parts), "Retry-After in whole seconds")
        if not busy:
            return Finding(NOT_SHOWN, "; ".join(["no session was busy", *parts]))
        return Finding(PASS, "; ".join(parts))


LONGER = "let the agent take half a second for this message, and check again"
REMEMBER = (
    "keep the answer under Idempotency-Key for two days, and send it again to the same request"
)
REPLAYED = "send Idempotent-Replayed: true with a repeated answer"
PIN = "422 if the body's hash differs from the one kept with the key"
NAME_IT = '404 with {"code": "session_not_found"}; --missing-session gives another id to try'
NAME_IT_FASTAPI = (
    'raise HTTPException(404, detail={"code": "session_not_found", "message": "…"}), or '
    'return JSONResponse({"code": "session_not_found"}, status_code=404)'
)
SEE_FIRST = "see the first row"
GATEWAYS = (
    "see what the gateway logs: the application is away, or its run takes longer than the gateway "
    "waits (then raise that, or answer 202 and be polled)"
)
OWN_HOST = "a Location on the API's own host: the token is sent there, and to no other host"
OWN_SCHEME = (
    "a Location without scheme and host (/runs/…), or let the API trust X-Forwarded-Proto and -Host"
)
ADDRESS = (
    "202 with a Location that GET answers with the run's status; if the run has ended, 200 with "
    "status completed"
)
KNOWN_WORDS = (
    "queued or running while it goes on; then completed, failed, or requires_action where a "
    "person is waited for (docs/endpoint.md has all words)"
)
WHOLE = (
    "end the stream as HTTP ends it (the last chunk), with an event of its own (data: [DONE]; "
    "event: error where the run failed)"
)
ATOMIC = (
    "take the session in one atomic step (a unique row, a conditional update); answer the second "
    "call 409"
)
ONCE = "keep the key when the run starts: 409 (or the same 202) until it has ended"
UNTIL = "free the session when the run has ended, not before: renew its busy mark, if that expires"
OUTLIVE = "let the run go on when its caller disconnects; meanwhile 409, afterwards its answer"
POLL = "GET at the Location: a status, in the end one of completed, failed, cancelled"
END_IT = "DELETE at the Location ends the run, and frees the session"


def _reason(reply: Reply) -> str:
    return str(getattr(reply.outcome, "reason", ""))


def _is_trouble(reply: Reply) -> bool:
    """Whether a call was answered neither as a run, nor refused, nor as busy."""
    if reply.answer is None or reply.lost is not None:
        return True
    return isinstance(reply.outcome, Unknown | Unavailable) or (
        isinstance(reply.outcome, Misconfigured) and reply.status not in (404, 410)
    )


def _detail(reply: Reply) -> str | None:
    """What FastAPI says of its own accord, and Starlette and others likewise."""
    document = reply.document
    detail = document.get("detail") if isinstance(document, dict) else None
    return detail if isinstance(detail, str) else None


def _way(reply: Reply) -> str:
    """Which part of the answer named the run's address."""
    headers = {} if reply.answer is None else reply.answer.headers
    return next((name for name in LOCATIONS if headers.get(name, "").strip()), "its id")


def _times(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
