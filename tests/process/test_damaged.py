"""A schema that somebody's migration tool damages while workers run: they stay up, say what is
wrong and what to do, and go on by themselves after `migrate`; no run is lost, and none is skipped
by an API that remembers keys."""

from __future__ import annotations

import asyncio

import pytest

from recall_worker import schema

from ..conftest import Connection
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, Raw, Request, reply
from .test_corridor import row
from .test_lease import eventually, promise

LAST = (
    "select max(query_start) as at from pg_stat_activity where datname = current_database() "
    "and application_name ~ '^recall-worker ledger' "
    "and query ~ '^with served' and query ~ 'most as materialized'"
)
"""When a worker last tried to claim."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        "alter table session_recalls drop column occurrence",
        "alter table session_recalls drop column cadence cascade",
        "alter table session_recalls alter column attempt drop default, "
        "alter column attempt type text",
    ],
    ids=lambda damage: damage[28:60],
)
async def test_it_stays_up_and_goes_on_after_migrate(
    damage: str, app: Application, db: Connection, daemons: Daemons, database: str
) -> None:
    """Claims fail: it is said once, with what to do, however often it is tried; commands say the
    same; after `migrate` the worker goes on without a restart."""
    daemon = await daemons.start(poll_interval=1)
    await promise(app, "before")
    await daemon.hears("recall.settled", session="before")
    await promise(app, "due", "once", seconds=1.0)
    await db.execute(damage.encode())
    [told] = await daemon.hears("schema.broken")
    assert "recall-worker migrate" in told["hint"] and told["reason"]
    for _ in range(2):
        # None while its connection is at another statement.
        tried = await eventually(db, f"select at from ({LAST}) l where at is not null")
        await eventually(db, f"select from ({LAST}) l where at > %s", [tried["at"]])
    assert daemon.told("schema.broken") == [told] and daemon.process.returncode is None

    await asyncio.to_thread(schema.migrate, database)
    await daemon.hears("recall.settled", session="due", status="fired")
    await daemon.hears("schema.whole")
    assert not daemon.told("worker.error") and not daemon.told("database.lost")
    assert await daemon.stop() == 0


async def test_a_run_that_ends_meanwhile_is_settled_afterwards(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons, database: str
) -> None:
    """The table of calls is dropped during a run: its ending waits in the worker, and is written
    when the table is back. It is called once."""
    gate = Gate()
    endpoint.script("s", gate)
    daemon = await daemons.start(lease=30)
    await promise(app, "s")
    await gate.entered.wait()
    await db.execute("drop table recall_attempts")
    gate.open()
    await daemon.hears("schema.broken", doing="settle")
    assert not daemon.told("recall.stranded")
    await asyncio.to_thread(schema.migrate, database)
    await daemon.hears("recall.settled", session="s", status="fired")
    assert len(endpoint.requests) == 1
    assert (await row(db, "s"))["status"] == "fired"
    assert await eventually(db, "select from recall_attempts where settled = 'fired'") == {}


@pytest.mark.slow
async def test_an_api_that_remembers_keys_skips_no_run(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons, database: str
) -> None:
    """It honours keys, as it should: a key that it has answered is answered again, and no agent
    runs. After the loss of the number that keys are made of each run is a real one all the same."""
    ran: list[str] = []

    async def agent(request: Request) -> Raw:
        if request.key not in ran:
            ran.append(request.key)
        return reply()

    endpoint.script("s", agent)
    daemon = await daemons.start()
    recall = await promise(app, "s", "recurring", interval=1)
    await daemon.hears("recall.settled", session="s", times=2)
    assert await daemon.stop() == 0
    assert ran == [f"{recall}:1", f"{recall}:2"]
    await db.execute("alter table session_recalls drop column occurrence")
    await asyncio.to_thread(schema.migrate, database)
    again = await daemons.start()
    await again.hears("recall.settled", session="s", times=3)
    assert len(endpoint.of("s")) == len(ran) >= 5, "each call is a run"
    assert [key.split(":")[1].split(".")[0] for key in ran[2:5]] == ["1", "2", "3"]
