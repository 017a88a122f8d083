"""Many replicas and one endpoint that is down: together they ask it no more often than one
would."""

from __future__ import annotations

import asyncio
import time

import pytest

from ..conftest import Connection
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, reply
from .test_corridor import soon
from .test_lease import promise


async def _outage(
    app: Application, endpoint: Endpoint, daemons: Daemons, replicas: int, seconds: float
) -> list[float]:
    """Instants of the probes while `replicas` workers meet an endpoint that answers 503, in
    `seconds` after all breakers are open."""
    workers = [await daemons.start(log_level="info") for _ in range(replicas)]
    endpoint.default = reply(503)
    # Deferred rows come due again by their backoff: fresh ones keep every replica supplied with
    # something to meet trouble by.
    for n in range(replicas * 3):
        await app.create_session(f"s{n}", "ann")
        await app.schedule(f"s{n}", "immediate", soon(0), "work")
    for worker in workers:
        await worker.hears("breaker.opened", within=60)
    began = time.monotonic()
    await asyncio.sleep(seconds)
    return [r.at for r in endpoint.requests if r.at > began]


@pytest.mark.slow
async def test_replicas_share_their_probes_and_what_they_find(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Three replicas, the breaker open in all: probes come one at a time and ever rarer; the first
    answer closes all of them."""
    workers = await asyncio.gather(*(daemons.start() for _ in range(3)))
    endpoint.default = reply(503)
    for n in range(40):
        await app.create_session(f"s{n}", "ann")
        await app.schedule(f"s{n}", "immediate", soon(0), "work")
    for worker in workers:
        await worker.hears("breaker.opened", within=30)
    met = len(endpoint.requests)
    await endpoint.count(met + 2, within=30)
    endpoint.default = reply()
    for worker in workers:
        await worker.hears("breaker.closed", within=30)
    told = [worker.told("breaker.closed")[0].get("reason") for worker in workers]
    assert "another worker found the endpoint answering" in told
    await endpoint.until(
        lambda: len({r.session for r in endpoint.requests if r.ended_at}) == 40, within=30
    )


@pytest.mark.full
@pytest.mark.timeout(240)
async def test_twenty_replicas_do_not_hammer_an_endpoint_that_is_down(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Twenty replicas over 40 s of outage: no more probes than one replica's doubling pauses allow
    (1, 2, 4, 8, 16 … s), and a few to spare."""
    probes = await _outage(app, endpoint, daemons, 20, 40)
    print(f"20 replicas, endpoint down for 40 s: {len(probes)} probes")
    assert len(probes) <= 10


async def test_a_claim_takes_half_of_the_slots_at_most(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A backlog fills all slots, but in claims of half of them: while one half is being run
    PostgreSQL brings the other."""
    for n in range(30):
        await promise(app, f"s{n}")
    endpoint.default = gate = Gate()
    daemon = await daemons.start(concurrency=20)
    await daemon.until(lambda: len(daemon.told("recall.claimed")) == 20)
    taken = [told["recalls"] for told in daemon.told("claim.answered")]
    assert max(taken) == 10 and sum(taken) == 20
    gate.open()
    await daemon.hears("recall.settled", times=30)
