"""A worker in the test's own process that takes a step when it is told to, and an API that answers
when it is told to.

The worker is the real one, with its dispatcher, executor and settler on the real SQL; only its
loops do not run by themselves. So a test acts between the claim and the settle without waiting for
anything, and a hundred lives take a second.

Never here: what must come of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

from recall_worker.events import Events
from recall_worker.protocols import Call
from recall_worker.recall import Accepted, Claim, Outcome
from recall_worker.settings import Settings
from recall_worker.worker.run import Run
from recall_worker.worker.worker import Worker

STEPS_MOST = 10
"""Dispatches in one step, at most: more would be a loop without an end."""


class Told(Events):
    """Events that are kept, and not written to a log."""

    def __init__(self, changed: Callable[[], None]) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, Any]]] = []
        self._changed = changed

    def tell(self, event: str, **facts: Any) -> None:
        self.all.append((event, facts))
        self._changed()


class HeldApi:
    """An agent server whose runs go on until the test ends them."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.calls: list[Call] = []
        """All requests so far."""
        self.open: dict[str, asyncio.Future[Outcome]] = {}
        """The runs that go on, by their recalls' ids."""
        self._changed = changed

    async def call(self, call: Call) -> Outcome:
        call.sent()
        call.written()
        self.calls.append(call)
        return await self._held(call.claim)

    async def follow(
        self, claim: Claim, reference: str, within: float, first_in: float | None = None
    ) -> Outcome:
        return await self._held(claim)

    async def _held(self, claim: Claim) -> Outcome:
        self.open[claim.id] = asyncio.get_running_loop().create_future()
        self._changed()
        try:
            return await self.open[claim.id]
        finally:
            del self.open[claim.id]

    async def abort(self, claim: Claim, reference: str) -> None:
        pass

    async def find(self, claim: Claim) -> Outcome | None:
        return None

    async def close(self) -> None:
        pass


class SteppedWorker:
    def __init__(self, dsn: str, name: str = "stepped", **settings: Any) -> None:
        self._pulse = asyncio.Event()
        self.told = Told(self._pulse.set)
        self.api = HeldApi(self._pulse.set)
        self._worker = Worker(
            Settings(dsn=dsn, run_url="http://127.0.0.1:1/{session_id}", **settings),
            self.api,
            self.told,
            name,
        )

    async def __aenter__(self) -> Self:
        self._settling = asyncio.create_task(self._worker._settler.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        for run in self._runs:
            if run.task is not None:
                run.task.cancel()
                await asyncio.wait((run.task,))
        self._settling.cancel()
        await self._worker._ledger.close()

    @property
    def _runs(self) -> list[Run]:
        return list(self._worker._runs)

    async def dispatch(self) -> None:
        """Claim what is due and start it, once; wait for nothing."""
        await self._worker._dispatcher.dispatch_once(claims=True)

    @contextlib.asynccontextmanager
    async def settling_later(self) -> AsyncIterator[None]:
        """Within it nothing is judged nor settled: what has ended waits."""
        self._settling.cancel()
        await asyncio.wait((self._settling,))
        try:
            yield
        finally:
            self._settling = asyncio.create_task(self._worker._settler.run())

    async def step(self) -> None:
        """Claim what is due and start it, take up what dead workers left, and put cron recalls on
        their moments: until nothing is left to do, and every run is at the API."""
        for _ in range(STEPS_MOST):
            before = len(self.told.all)
            found = await self._worker._dispatcher.dispatch_once(claims=True)
            await self._until(lambda: all(run.claim.id in self.api.open for run in self._runs))
            busy = {name for name, _ in self.told.all[before:]} - {"claim.answered"}
            if not (found.claimed or found.unfinished or found.ended or busy):
                return
        raise AssertionError(f"no end of it: {self.told.all[-20:]}")

    async def answer(self, id: str, outcome: Outcome) -> None:
        """End a run so, and have that settled. Accepted: it goes on, and is followed."""
        held = self.api.open[id]
        held.set_result(outcome)
        if isinstance(outcome, Accepted):
            await self._until(lambda: self.api.open.get(id) not in (None, held))
        else:
            await self._until(lambda: all(run.claim.id != id for run in self._runs))

    async def die(self) -> None:
        """What this worker has in hand is lost, as by a SIGKILL."""
        self._settling.cancel()
        for run in self._runs:
            self._worker._runs.remove(run)
            if run.task is not None:
                run.task.cancel()

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self._pulse.clear()
                await self._pulse.wait()
