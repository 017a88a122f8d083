"""From the application's insert to a settled row, through the real daemon."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from ..conftest import Connection
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Raw, Request, reply


def soon(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


async def row(db: Connection, session: str) -> dict[str, object]:
    found = await (
        await db.execute("select * from session_recalls where session_id = %s", (session,))
    ).fetchone()
    assert found is not None
    return found


async def test_one_of_each_type(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """An immediate, a one-shot and a recurring recall, inserted by the application, each fire on
    time and once."""
    daemon = await daemons.start()
    for session in ("now", "once", "again"):
        await app.create_session(session, "ann")
    await app.schedule("now", "immediate", soon(0), "at once")
    await app.schedule("once", "once", soon(0.5), "in a moment")
    await app.schedule("again", "recurring", soon(0.2), "every second", interval_seconds=1)

    await daemon.hears("recall.settled", session="again", times=2)
    await daemon.hears("recall.settled", session="once")
    assert [r.key for r in endpoint.of("again")] == [
        f"{endpoint.of('again')[0].document['recall']['id']}:{n}" for n in (1, 2)
    ]
    assert len(endpoint.of("now")) == len(endpoint.of("once")) == 1
    assert (await row(db, "now"))["status"] == "fired"
    assert (await row(db, "once"))["status"] == "fired"
    again = await row(db, "again")
    assert (again["status"], again["occurrence"]) == ("pending", 3)
    assert await daemon.stop() == 0


@pytest.mark.slow
async def test_a_chain_scheduled_from_inside_its_runs(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Each run inserts its session's next recall before it answers; ten links follow at once, one
    after the other."""
    await app.create_session("chain", "ann")

    async def agent(request: Request) -> Raw:
        if len(endpoint.of("chain")) < 10:
            await app.schedule("chain", "immediate", soon(0), "the next link")
        return reply()

    endpoint.script("chain", agent)
    daemon = await daemons.start()
    await app.schedule("chain", "immediate", soon(0), "the first link")
    await daemon.hears("recall.settled", times=10)
    runs = endpoint.of("chain")
    assert len(runs) == len({r.key for r in runs}) == 10
    for earlier, later in pairwise(runs):
        assert earlier.ended_at is not None and later.at > earlier.ended_at
    left = await (
        await db.execute("select status, count(*) as n from session_recalls group by 1")
    ).fetchall()
    assert left == [{"status": "fired", "n": 10}]
