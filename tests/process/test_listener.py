"""The listener in the daemon: what notifies it, what is found without it, and that nothing ever
spins."""

from __future__ import annotations

import time

import psycopg
import pytest

from ..conftest import Connection, connected
from ..support.application import Application
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, reply
from ..support.proxy import Proxy
from .test_corridor import soon
from .test_lease import eventually, promise, rows
from .test_outage import terminate

AT_REST = """
select 1 from pg_stat_activity where datname = current_database()
    and application_name like 'recall-worker ledger %'
having count(*) > 0 and bool_and(state = 'idle' and state_change < now() - interval '1 second')
"""


class Notifications:
    """Counts what is notified on the listener's channel, on a connection of its own."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn

    async def until_now(self) -> int:
        """How many notifications the transactions made that were committed between the last call
        and this one."""
        await self._conn.execute("notify barrier")
        notifies = 0
        async for notification in self._conn.notifies(timeout=20):
            if notification.channel == "barrier":
                return notifies
            assert notification.payload == ""
            notifies += 1
        raise TimeoutError("the barrier was not heard")


async def listening(conn: Connection) -> Notifications:
    await conn.execute("listen session_recalls")
    await conn.execute("listen barrier")
    return Notifications(conn)


async def test_an_insert_wakes_a_sleeping_worker(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """From the application's insert to the request it takes no poll: the listener rang."""
    daemon = await daemons.start(poll_interval=30)
    seconds = []
    for n in range(10):
        await app.create_session(f"s{n}", "ann")
        asked = time.monotonic()
        await app.schedule(f"s{n}", "immediate", soon(0), "now")
        [request] = await endpoint.count(1, f"s{n}")
        seconds.append(request.at - asked)
        await daemon.hears("recall.settled", session=f"s{n}")
    assert sorted(seconds)[5] < 1, f"insert to request, in seconds: {seconds}"


@pytest.mark.slow
async def test_an_insert_while_the_listener_is_away(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """What was inserted while the listener had no connection is found by the look after it has one
    again."""
    async with Proxy(database) as proxy:
        daemon = await daemons.start(poll_interval=30, listen_dsn=proxy.dsn)
        await eventually(db, AT_REST)
        proxy.cut()
        await daemon.hears("listener.lost")
        await promise(app, "meanwhile")
        tried = proxy.connections
        await proxy.until(lambda: proxy.connections >= tried + 2)
        assert endpoint.of("meanwhile") == []
        proxy.heal()
        await daemon.hears("listener.listening", times=2)
        await endpoint.count(1, "meanwhile")
        await daemon.hears("recall.settled", session="meanwhile")


async def test_the_listeners_backend_is_terminated(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Inserted in the instant after the listener's backend was ended, a recall is called within
    moments all the same."""
    daemon = await daemons.start(poll_interval=30)
    for n in range(3):
        await daemon.hears("listener.listening", times=n + 1)
        assert await terminate(db, "recall-worker listener") == 1
        await promise(app, f"s{n}")
        await endpoint.count(1, f"s{n}")
    assert len(endpoint.requests) == 3


@pytest.mark.full
async def test_a_silent_host_before_the_right_one(
    app: Application, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Of two hosts in the DSN the first takes connections and says nothing: the second is asked in
    time, by listener and ledger."""
    async with Proxy(database) as silent, Proxy(database) as right:
        silent.blackhole()
        parts = psycopg.conninfo.conninfo_to_dict(right.dsn)
        both = psycopg.conninfo.make_conninfo(
            right.dsn, host="127.0.0.1,127.0.0.1", port=f"{silent.port},{parts['port']}"
        )
        daemon = await daemons.start(ready=False, dsn=both)
        await daemon.hears("listener.listening", within=60)
        recall = await promise(app, "s")
        await daemon.hears("recall.settled", recall=recall, within=60)
        assert silent.connections >= 2
        # The others of its lines go by there, too.
        await daemon.stop(within=60)


@pytest.mark.slow
async def test_an_idle_listener_is_not_ended(
    server: str,
    app: Application,
    database: str,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """A database that ends idle sessions does not end the listener's, which is idle by its
    nature."""
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    async with connected(server) as outside:
        await outside.execute(f"alter database {name} set idle_session_timeout = '1s'".encode())
    daemon = await daemons.start()
    await db.execute("select pg_sleep(3)")
    recall = await promise(app, "s")
    await daemon.hears("recall.settled", recall=recall)
    assert daemon.told("listener.lost") == daemon.told("database.lost") == []
    assert len(daemon.told("listener.listening")) == 1


@pytest.mark.slow
async def test_an_insert_that_is_committed_late(
    app: Application, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A recall whose transaction stays open past its due time is called at the commit."""
    await daemons.start(poll_interval=30)
    await app.create_session("s", "ann")
    transaction = app.connection.transaction()
    await transaction.start()
    await app.schedule("s", "once", soon(0.5), "soon")
    async with connected(database) as clock:
        await clock.execute("select pg_sleep(1.5)")
    assert endpoint.requests == []
    await transaction.commit()
    committed = time.monotonic()
    [request] = await endpoint.count(1)
    assert request.at - committed < 5


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [50, 3600], ids=["within the horizon", "far beyond it"])
async def test_rescheduled_to_earlier(
    seconds: float, app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The application moves a recall to now: it is called at once."""
    await daemons.start(poll_interval=30)
    recall = await promise(app, "s", "once", seconds)
    assert await app.reschedule(recall, soon(0))
    moved = time.monotonic()
    [request] = await endpoint.count(1)
    assert request.at - moved < 5


@pytest.mark.slow
async def test_rescheduled_to_later(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A timer that was armed for a recall that is then moved away does nothing, and the new time is
    kept."""
    await daemons.start(poll_interval=30)
    recall = await promise(app, "s", "once", 1.0)
    assert await app.reschedule(recall, soon(2.0))
    await endpoint.count(1)
    [on_time] = await rows(db, "select clock_timestamp() >= trigger_at as yes from session_recalls")
    assert on_time["yes"]


async def test_what_notifies(app: Application, database: str, db: Connection) -> None:
    """Inserts within the horizon of a minute and moves to earlier notify once; what is far off,
    later or idle does not."""
    async with connected(database) as conn:
        notifies = await listening(conn)
        near = await promise(app, "near", "once", 50)
        assert await notifies.until_now() == 1
        far = await promise(app, "far", "once", 70)
        assert await notifies.until_now() == 0
        await app.reschedule(near, soon(55))
        assert await notifies.until_now() == 0
        await app.reschedule(near, soon(30))
        assert await notifies.until_now() == 1
        await app.reschedule(far, soon(3600))
        await app.reschedule(far, soon(1800))
        assert await notifies.until_now() == 0
        await app.reschedule(far, soon(10))
        assert await notifies.until_now() == 1
        await app.cancel_session("near")
        await app.mark_fired(far)
        await app.delete_session("far")
        assert await notifies.until_now() == 0


@pytest.mark.slow
async def test_the_workers_own_writing_is_silent(
    app: Application, database: str, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Claims, renewals, settles and next occurrences notify nobody; only the application's inserts
    did."""
    daemon = await daemons.start(lease=1)
    async with connected(database) as conn:
        notifies = await listening(conn)
        for n in range(3):
            await promise(app, f"s{n}", "recurring", interval=1)
        await daemon.hears("recall.settled", times=6)
        assert await notifies.until_now() == 3


@pytest.mark.full
@pytest.mark.timeout(200)
async def test_beyond_the_horizon(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A recall inserted beyond the horizon does not notify, and is called on time all the same."""
    await daemons.start(poll_interval=30)
    async with connected(database) as conn:
        notifies = await listening(conn)
        recall = await promise(app, "s", "once", 63)
        assert await notifies.until_now() == 0
    await endpoint.count(1, within=90)
    late = float(endpoint.requests[0].headers["recall-lateness"])
    assert 0 <= late < 5, f"{recall} was late by {late} s"


@pytest.mark.slow
async def test_due_and_locked_is_no_busy_loop(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Something due that the application holds locked is looked for about once a second, and called
    soon after it is let go."""
    async with Proxy(database) as proxy:
        daemon = await daemons.start(poll_interval=30, dsn=proxy.dsn)
        async with connected(database) as holder:
            async with holder.transaction():
                await holder.execute("set local lock_timeout = '5s'")
                await promise(app, "s", "once", 0.3)
                await holder.execute("select from session_recalls for update")
                await holder.execute("select pg_sleep(1.0)")
                asked = proxy.asked
                await holder.execute("select pg_sleep(2.5)")
                looks = proxy.asked - asked
        await daemon.hears("recall.settled", session="s")
    assert 1 <= looks <= 15, f"{looks} statements in two and a half seconds"
    assert len(endpoint.requests) == 1


@pytest.mark.slow
async def test_due_behind_a_run_is_no_busy_loop(
    app: Application, database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """So it is with a recall that waits for the run of its own session."""
    gate = Gate()
    endpoint.script("s", gate, reply())
    async with Proxy(database) as proxy:
        daemon = await daemons.start(poll_interval=30, lease=60, dsn=proxy.dsn)
        await promise(app, "s", "once")
        await gate.entered.wait()
        await app.schedule("s", "immediate", soon(0), "the next one, from inside the run")
        async with connected(database) as clock:
            await clock.execute("select pg_sleep(1.0)")
            asked = proxy.asked
            await clock.execute("select pg_sleep(2.5)")
            looks = proxy.asked - asked
        assert len(endpoint.requests) == 1
        gate.open()
        ended = time.monotonic()
        await endpoint.count(2)
        assert endpoint.requests[1].at - ended < 5, "a settle wakes the claim"
        await daemon.hears("recall.settled", times=2)
    assert looks <= 15, f"{looks} statements in two and a half seconds"


@pytest.mark.full
@pytest.mark.timeout(200)
async def test_an_idle_worker_asks_little(
    server: str, app: Application, database: str, daemons: Daemons
) -> None:
    """A worker with nothing due, and a recall due tomorrow, makes at most ten transactions a
    minute."""
    await promise(app, "s", "once", 86_400)
    await daemons.start()
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    committed = "select xact_commit + xact_rollback as n from pg_stat_database where datname = %s"
    async with connected(server) as outside:
        # Backends tell their figures with a delay of up to ten seconds.
        await outside.execute("select pg_sleep(15)")
        [before] = await rows(outside, committed, [name])
        await outside.execute("select pg_sleep(60)")
        [after] = await rows(outside, committed, [name])
    transactions = after["n"] - before["n"]
    print(f"transactions of an idle worker in a minute: {transactions}")
    assert transactions <= 10
