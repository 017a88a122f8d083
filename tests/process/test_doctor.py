"""`doctor` beside daemons: what it says of them, and that it does them no harm."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ..conftest import Connection
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, Raw, Request, reply
from ..support.pgbouncer import pooler
from ..test_cli import operate
from .test_lease import eventually, promise


async def examined(dsn: str, endpoint: Endpoint) -> tuple[int, list[dict[str, Any]]]:
    """The exit status of `doctor --json`, and what it found."""
    said = await asyncio.to_thread(
        operate, dsn, "doctor", "--json", environ={"RECALL_RUN_URL": endpoint.url}
    )
    return said.status, said.document["checks"]


def problems(findings: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["check"], row["seen"]) for row in findings if row["state"] == "problem"]


async def by_method(request: Request) -> Raw:
    return reply(405 if request.method == "GET" else 200)


@pytest.mark.slow
async def test_beside_a_daemon_at_work(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """With a run open and another recall waiting all is well; the run is not disturbed, and nobody
    is called."""
    gate = Gate()
    endpoint.default = by_method
    endpoint.script("s", gate)
    daemon = await daemons.start()
    await promise(app, "s")
    await promise(app, "later", "once", 3600)
    await gate.entered.wait()
    await eventually(db, "select 1 from recall_workers")
    status, findings = await examined(database, endpoint)
    assert (status, problems(findings)) == (0, [])
    assert ("workers", "1 alive, 1 of 3 slots in a run") in [
        (row["check"], row["seen"]) for row in findings
    ]
    gate.open()
    await daemon.hears("recall.settled", session="s", outcome="answered")
    assert [r.session for r in endpoint.requests if r.method == "POST"] == ["s"]
    assert daemon.told("worker.error") == daemon.told("listener.lost") == []


@pytest.mark.slow
async def test_beside_a_daemon_that_is_not_rung(
    database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Asked from a host with a direct connection, it still says that a worker elsewhere hears
    nothing behind its pooler."""
    endpoint.default = by_method
    with pooler(database) as bouncer:
        daemon = await daemons.start(dsn=bouncer.dsn)
        await daemon.hears("listener.deaf")
        await eventually(db, "select 1 from recall_workers where bell = 'deaf'")
        status, findings = await examined(database, endpoint)
    assert status == 1
    assert problems(findings) == [
        (
            "workers",
            f"{daemon.name} receives no notifications, and finds new recalls only by polls",
        )
    ]


@pytest.mark.slow
async def test_beside_a_daemon_whose_endpoint_is_down(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The breaker that opened, the recalls that wait for it, and the endpoint itself are named,
    each on its line."""
    await daemons.start()
    endpoint.default = reply(503)
    for session in ("a", "b", "c"):
        await promise(app, session)
    await eventually(db, "select 1 from recall_workers where breaker = 'open'")
    status, findings = await examined(database, endpoint)
    assert status == 1 and {check for check, _ in problems(findings)} == {
        "workers",
        "held",
        "endpoint",
    }, problems(findings)
