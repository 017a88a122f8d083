"""The scheduler that ran inside the application's process, as it stood before there was a
recall-worker.

It polls for what is pending and due, runs the agent for as long as that takes, and only then marks
the row: fired, put off by its interval from now, or cancelled where the run failed. What it has in
hand it knows by heart; the table does not tell.

Never here: an import of recall_worker, a look at a lease. That it can't live beside the daemon is
what docs/migration.md is about.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Self

from .application import Application, Row

Agent = Callable[[str, str], Awaitable[None]]
"""Runs the agent in a session on a message; raises where the run fails."""

POLL = 0.05
"""Seconds between two looks."""


class Scheduler:
    def __init__(self, application: Application, agent: Agent, slots: int = 3) -> None:
        self.application = application
        self._agent = agent
        self._slots = slots
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._polling: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._polling = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Take up nothing more, and let the runs end."""
        await self._stop_polling()
        await asyncio.gather(*list(self._runs.values()))

    async def kill(self) -> None:
        """What becomes of it when the application's process dies: runs break off, nothing is
        marked."""
        await self._stop_polling()
        runs = list(self._runs.values())
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def _stop_polling(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
            with suppress(asyncio.CancelledError):
                await self._polling
            self._polling = None

    async def _poll(self) -> None:
        while True:
            in_hand = set(self._runs)  # What ends while the table is asked may be among the answer.
            for recall in await self.application.due(datetime.now(UTC)):
                if recall["id"] not in in_hand and len(self._runs) < self._slots:
                    self._runs[recall["id"]] = asyncio.create_task(self._run(recall))
            await asyncio.sleep(POLL)

    async def _run(self, recall: Row) -> None:
        try:
            try:
                await self._agent(recall["session_id"], recall["additional_context_message"])
            except Exception:
                await self.application.mark_cancelled(recall["id"])
                return
            if recall["call_type"] == "recurring":
                again = datetime.now(UTC) + timedelta(seconds=recall["interval_seconds"])
                await self.application.reschedule(recall["id"], again)
            else:
                await self.application.mark_fired(recall["id"])
        finally:
            del self._runs[recall["id"]]
