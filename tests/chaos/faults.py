"""What is done to the stage, and when: each kind of fault begins, lasts, is healed, and is on
record with whom it struck.

The order is the seed's: every kind once before any comes again, now and then two at a time, with a
calm phase after each. Of the kinds a seed begins with its third (`THIRDS`), so that three
consecutive seeds reach every kind, also where each has time for a third of them only. How long a
kind took to recover from is measured from its healing until nothing is due and unclaimed any more.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psycopg

from recall_worker.worker.breaker import PROBE_MOST

from ..support.daemon import FAKETIME
from .hand import Hand
from .journal import Promise
from .people import People
from .stage import Replica, Stage


@dataclass(slots=True, eq=False)
class Fault:
    """Instants are seconds of the epoch."""

    kind: str
    began: float
    slots: frozenset[str]
    ended: float | None = None
    recovered: float | None = None
    """When nothing was due and unclaimed any more; None where two faults overlapped, or it never
    was."""
    alone: bool = True
    lone: Promise | None = None
    """What was inserted while nobody heard."""

    def strikes(self, slot: str, start: float, end: float) -> bool:
        """Whether it was on, for this slot, at any time between."""
        return (
            slot in self.slots and self.began <= end and (self.ended is None or self.ended >= start)
        )

    @property
    def seconds(self) -> float:
        return (self.ended or time.time()) - self.began


STIRRING = """
select count(*) from session_recalls
where status in ('pending', 'running')
    and (lease is not null or (paused_at is null and trigger_at < now() + interval '5 seconds'))
"""
TERM_MOST = 25.0
"""Seconds in which a worker ends on SIGTERM: RECALL_DRAIN_TIMEOUT, ten for its last settles, and
some."""
IN_HAND_WITHIN = 10.0
"""Seconds that are waited for those who are to be killed to have runs in hand."""
FILLED_WITHIN = 10.0
"""Seconds that are waited for all slots to be in use."""
HEARD_WITHIN = 3.0
"""Seconds in which a bell is back and its worker has looked: a reconnect, and some."""

Strike = Callable[["Scene"], Awaitable[None]]


class Scene:
    """One fault on the stage, with dice of its own."""

    def __init__(
        self, stage: Stage, hand: Hand, people: People, dice: random.Random, fault: Fault
    ) -> None:
        self.stage, self.hand, self.people = stage, hand, people
        self.dice, self.fault = dice, fault
        self.drawn = stage.drawn

    def victims(self, most: int = 1) -> list[Replica]:
        """Some replicas, never all of them; they are on record."""
        chosen = self.dice.sample(
            self.stage.replicas,
            k=min(self.dice.randint(1, most), max(1, len(self.stage.replicas) - 1)),
        )
        self.fault.slots = frozenset(r.slot for r in chosen)
        return chosen

    def everybody(self) -> list[Replica]:
        self.fault.slots = frozenset(r.slot for r in self.stage.replicas)
        return self.stage.replicas

    async def lasts(self, least: float, most: float) -> None:
        await asyncio.sleep(self.dice.uniform(least, most))

    async def lasts_leases(self, least: float, most: float) -> None:
        """For so many leases, as far as a fault goes on."""
        await self.lasts(self.drawn.leases(least), self.drawn.leases(most))

    async def terminate(self, name: str) -> None:
        with suppress(psycopg.Error):
            async with await psycopg.AsyncConnection.connect(
                self.stage.dsn, autocommit=True, connect_timeout=3
            ) as conn:
                await conn.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity where "
                    "application_name like %s",
                    [name],
                )


# --- workers --------------------------------------------------------------------------------------


async def kill(scene: Scene) -> None:
    """One of them with runs in hand, as far as there are any within a while."""
    victims, end = scene.victims(2), time.monotonic() + IN_HAND_WITHIN
    while not any(scene.stage.api.open(r.slot) for r in victims) and time.monotonic() < end:  # noqa: ASYNC110 - a count
        await asyncio.sleep(0.02)
    for replica in victims:
        replica.signal(signal.SIGKILL)


async def term(scene: Scene) -> None:
    (replica,) = scene.victims()
    statuses = len(replica.statuses)
    replica.signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(TERM_MOST):
            await replica.ends(statuses)
    except TimeoutError:
        scene.stage.spins.append(f"{replica.slot} had not ended {TERM_MOST:g} s after SIGTERM")


async def _stop(scene: Scene, least: float, most: float) -> None:
    (replica,) = scene.victims()
    replica.signal(signal.SIGSTOP)
    try:
        await scene.lasts(least, most)
    finally:
        replica.signal(signal.SIGCONT)


async def stop_short(scene: Scene) -> None:
    await _stop(scene, min(0.3, scene.drawn.lease / 9), min(8.0, scene.drawn.lease / 3))


async def stop_long(scene: Scene) -> None:
    """Longer than a lease: it must find its leases gone, and settle nothing."""
    await _stop(scene, scene.drawn.leases(1.3), scene.drawn.leases(2))


async def console_kill(scene: Scene) -> None:
    """The console is killed while a job of it acts on many."""
    async with scene.people.many_at_work("console"):
        scene.stage.service("console").signal(signal.SIGKILL)


async def mcp_kill(scene: Scene) -> None:
    """The MCP server is killed, whatever it is doing."""
    scene.stage.service("mcp").signal(signal.SIGKILL)
    await scene.lasts(0.5, 2)


async def clock(scene: Scene) -> None:
    """The host's clock jumps by hours, or by a second; it stays so."""
    for replica in scene.victims(2):
        replica.clock.write_text(
            scene.dice.choice(("+0", "+3h", "-7h", "+1", "-1", "+40d", "-40d"))
        )
    await scene.lasts(0.5, 1)


# --- PostgreSQL -----------------------------------------------------------------------------------


async def postgres_kill_short(scene: Scene) -> None:
    await scene.stage.kill_postgres()
    try:
        await scene.lasts(0.1, 1)
    finally:
        await scene.stage.revive_postgres()


async def postgres_kill_long(scene: Scene) -> None:
    """For three leases, with runs open: their owners come first afterwards."""
    await scene.stage.kill_postgres()
    try:
        await scene.lasts_leases(3, 3.2)
    finally:
        await scene.stage.revive_postgres()


async def postgres_frozen(scene: Scene) -> None:
    """All of PostgreSQL stands still while a command, or a job of the console, acts on many: for
    moments, or for longer than a lease. What was asked meanwhile is done afterwards, also for those
    who have given it up."""
    scene.everybody()
    async with scene.people.many_at_work(scene.dice.choice(("cli", "console"))):
        scene.fault.began = time.time()
        processes = scene.stage.freeze_postgres()
        try:
            await scene.lasts(1, scene.drawn.leases(1.6))
        finally:
            scene.stage.thaw_postgres(processes)


async def postgres_restart(scene: Scene) -> None:
    await asyncio.to_thread(scene.stage.server.shutdown)
    await scene.stage.revive_postgres()


async def bells(scene: Scene) -> None:
    await scene.terminate("recall-worker listener%")


async def ledgers(scene: Scene) -> None:
    await scene.terminate("recall-worker ledger%")


async def _stirs(conn: psycopg.AsyncConnection[Any]) -> bool:
    """Whether anything in the table could wake a worker within the next seconds."""
    return await (await conn.execute(STIRRING.encode())).fetchone() != (0,)


async def lone_ring(scene: Scene) -> None:
    """Every bell is cut off, and while nobody hears one recall is inserted, due at once, with
    nothing else about that could wake anybody."""
    rate, scene.hand.rate = scene.hand.rate, 0
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(scene.drawn.quiet_within), _asking(scene.stage.dsn) as conn:
                await scene.people.rest()
                while conn is not None and await _stirs(conn):  # noqa: ASYNC110 - a table
                    await asyncio.sleep(0.1)
                await scene.terminate("recall-worker listener%")
                scene.fault.lone = await scene.hand.promise("immediate", 0)
                await scene.lasts(HEARD_WITHIN + 0.5, HEARD_WITHIN + 1)
    finally:
        scene.hand.rate = rate


async def full_house(scene: Scene) -> None:
    """All connections that PostgreSQL has are taken, and those of the workers broken: they can't
    come back for a while."""
    taken: list[psycopg.AsyncConnection[Any]] = []
    try:
        await scene.terminate("recall-worker%")
        until = time.monotonic() + scene.dice.uniform(3, 6)
        while time.monotonic() < until:
            try:
                taken.append(
                    await psycopg.AsyncConnection.connect(
                        scene.stage.dsn, autocommit=True, connect_timeout=3
                    )
                )
            except psycopg.OperationalError:
                await asyncio.sleep(0.02)
    finally:
        for conn in taken:
            conn.pgconn.finish()


async def full_disk(scene: Scene) -> None:
    """No room is left for the database's files: it refuses to write, or dies for want of room for
    its log."""
    ballast = await asyncio.to_thread(scene.stage.fill_disk)
    try:
        await scene.lasts(3, 6)
    finally:
        if ballast is not None:
            ballast.unlink(missing_ok=True)
        await scene.stage.revive_postgres()


async def locks(scene: Scene) -> None:
    """Transactions of the application hold rows for longer than a lease, by locking or by changing
    them, in mid-run or before."""

    async def hold(how: str, end: str) -> None:
        with suppress(psycopg.Error):
            async with await psycopg.AsyncConnection.connect(
                scene.stage.dsn, connect_timeout=3
            ) as conn:
                await conn.execute("set lock_timeout = '2s'")
                await conn.execute(
                    how.replace(
                        "SOME",
                        "(select id from session_recalls where status in ('pending', 'running') "
                        "and trigger_at < now() + interval '10 minutes' "
                        "order by random() limit 8)",
                    ).encode()
                )
                await scene.lasts_leases(1.2, 1.6)
                await conn.execute(end.encode())

    await asyncio.gather(
        hold("select from session_recalls where id in SOME for update skip locked", "commit"),
        hold(
            "update session_recalls set internal_comment = 'looked at' where id in SOME", "commit"
        ),
        hold(
            "update session_recalls set internal_comment = 'looked at' where id in SOME", "rollback"
        ),
    )


# --- ways -----------------------------------------------------------------------------------------


async def database_cut(scene: Scene) -> None:
    victims = scene.victims(2)
    for replica in victims:
        replica.proxy.cut()
    await scene.lasts(0.5, min(10.0, scene.drawn.lease / 2))
    for replica in victims:
        replica.proxy.heal()


async def database_cut_for_all(scene: Scene) -> None:
    for replica in scene.everybody():
        replica.proxy.cut()
    await scene.lasts_leases(1.2, 2)
    for replica in scene.stage.replicas:
        replica.proxy.heal()


async def database_slow(scene: Scene) -> None:
    victims = scene.victims(2)
    for replica in victims:
        replica.proxy.delay(0.2)
    await scene.lasts(3, 5)
    for replica in victims:
        replica.proxy.heal()


async def database_half_open(scene: Scene) -> None:
    """Every connection of a worker is forgotten on the way; new ones pass."""
    (replica,) = scene.victims()
    replica.proxy.blackhole()
    await asyncio.sleep(0.05)
    replica.proxy.heal()
    # It takes as long as its deadlines to be noticed, and is on as long.
    await scene.lasts_leases(1, 1.5)


async def database_silent(scene: Scene) -> None:
    """One worker is cut off from the database, without a word, for longer than a lease."""
    (replica,) = scene.victims()
    replica.proxy.blackhole()
    await scene.lasts_leases(1.3, 2)
    replica.proxy.heal()


async def api_cut(scene: Scene) -> None:
    scene.everybody()
    scene.stage.way.cut()
    await scene.lasts(0.5, 3)
    scene.stage.way.heal()


async def api_slow(scene: Scene) -> None:
    scene.everybody()
    scene.stage.way.delay(0.4)
    await scene.lasts(3, 5)
    scene.stage.way.heal()


async def api_silent(scene: Scene) -> None:
    """Its connections, and new ones, stay open and say nothing. What was half-open stays so."""
    scene.everybody()
    scene.stage.way.blackhole()
    await scene.lasts(0.5, 4)
    scene.stage.way.heal()


async def api_down(scene: Scene) -> None:
    scene.everybody()
    scene.stage.api.mood = "down"
    await scene.lasts(2, 5)
    scene.stage.api.mood = None


async def api_down_slots_full(scene: Scene) -> None:
    """The API hangs until every slot is in use; then PostgreSQL dies and the API answers 503 to all
    of it. So the breaker opens, nothing can be settled, and a test call is due while no slot is
    free."""
    api, rate = scene.stage.api, scene.hand.rate
    scene.everybody()
    api.held = released = asyncio.Event()
    # Those that were open before end first, as they hold slots, too.
    scene.hand.rate = min(60.0, rate * 2)
    try:
        end = time.monotonic() + FILLED_WITHIN
        while scene.stage.api.open() < scene.drawn.capacity and time.monotonic() < end:  # noqa: ASYNC110 - a count
            await asyncio.sleep(0.05)
        scene.hand.rate = rate
        await scene.stage.kill_postgres()
        released.set()
        await scene.lasts(2.5, 4)
    finally:
        scene.hand.rate = rate
        released.set()
        api.held = None
        await scene.stage.revive_postgres()


async def api_misconfigured(scene: Scene) -> None:
    scene.everybody()
    scene.stage.api.mood = "misconfigured"
    await scene.lasts(2, 5)
    scene.stage.api.mood = None


KINDS: dict[str, Strike] = {
    strike.__name__.replace("_", " "): strike
    for strike in (
        kill,
        term,
        console_kill,
        mcp_kill,
        stop_short,
        stop_long,
        clock,
        postgres_kill_short,
        postgres_kill_long,
        postgres_restart,
        postgres_frozen,
        bells,
        ledgers,
        lone_ring,
        full_house,
        full_disk,
        locks,
        database_cut,
        database_cut_for_all,
        database_slow,
        database_half_open,
        database_silent,
        api_cut,
        api_slow,
        api_silent,
        api_down,
        api_down_slots_full,
        api_misconfigured,
    )
}
THIRDS: tuple[tuple[str, ...], ...] = (
    (
        "stop long",
        "postgres kill long",
        "locks",
        "database cut for all",
        "database half open",
        "database silent",
        "kill",
        "postgres frozen",
        "api down slots full",
        "lone ring",
    ),
    (
        "term",
        "stop short",
        "postgres kill short",
        "full disk",
        "full house",
        "database cut",
        "api silent",
        "console kill",
        "api misconfigured",
    ),
    (
        "clock",
        "postgres restart",
        "bells",
        "ledgers",
        "database slow",
        "api cut",
        "api slow",
        "mcp kill",
        "api down",
    ),
)
"""What the seeds of each remainder by three begin with. The first draws the short leases: what is
meant to outlast a lease does so there."""

WAITING = """
select count(*) from session_recalls r
where r.status in ('pending', 'running') and r.paused_at is null and coalesce(r.lease_until,
    r.trigger_at) < now() - interval '0.3 seconds'
    and not exists (select from recall_queues q where q.queue in (r.queue, '*'))
    and (r.lease is not null or not exists (
        select from session_recalls o
        where o.session_id = r.session_id and o.id <> r.id and o.status in ('pending', 'running')
            and o.lease is not null))
"""

CLOSED_BREAKERS = """
select count(*) from recall_workers w
where w.breaker = 'closed' and w.seen_at > now() - interval '90 seconds'
"""
"""While all breakers are open only test calls are sent, up to half a minute apart: the calm phase,
in which nothing may be late, has not begun. One that is closed is enough: its worker calls, and the
account knows of the others that they take nothing."""


class Schedule:
    def __init__(
        self, stage: Stage, hand: Hand, people: People, seed: int, kinds: list[str]
    ) -> None:
        self._stage, self._hand, self._drawn = stage, hand, stage.drawn
        self._people = people
        self._dice = random.Random(f"faults {seed}")
        self._kinds = [
            kind
            for kind in kinds
            if (kind != "full disk" or stage.has_room) and (kind != "clock" or FAKETIME)
        ]
        self._deck = first_deck(seed, self._kinds, self._dice)
        self.faults: list[Fault] = []
        self.calm: list[tuple[float, float]] = []
        """Stretches in which nothing was wrong and nothing was left over."""
        self.stuck: list[str] = []

    @property
    def missed(self) -> list[str]:
        """Kinds of which none was struck."""
        return sorted(set(self._kinds) - {fault.kind for fault in self.faults})

    async def run(self, seconds: float, calm: tuple[float, float] = (3.0, 6.0)) -> None:
        """Strike and heal, until the time is up or a worker spins: all that comes then comes of
        that."""
        end = time.monotonic() + seconds
        await self._recovered()
        while not self._stage.spins:
            closed = await self._breaker_closed()
            began = time.time()
            await asyncio.sleep(self._dice.uniform(*calm))
            if closed:
                self.calm.append((began, time.time()))
            if time.monotonic() >= end:
                return
            two = self._dice.random() < 0.3 and len(self._kinds) > 2
            chosen = [self._next() for _ in range(2 if two else 1)]
            faults = await asyncio.gather(
                *(
                    self._strike(kind, alone=not two, after=n * self._dice.uniform(0, 2))
                    for n, kind in enumerate(chosen)
                )
            )
            healed = time.time()
            if await self._recovered():
                for fault in faults:
                    fault.recovered = time.time() if fault.alone else None
            elif not self._stage.spins:
                self.stuck.append(
                    f"{' and '.join(chosen)}: something is due and unclaimed "
                    f"{time.time() - healed:.0f} s after it was healed"
                )

    def _next(self) -> str:
        if not self._deck:
            self._deck = self._dice.sample(self._kinds, k=len(self._kinds))
        return self._deck.pop()

    async def _strike(self, kind: str, *, alone: bool, after: float) -> Fault:
        await asyncio.sleep(after)
        fault = Fault(kind, time.time(), frozenset(), alone=alone)
        self.faults.append(fault)
        dice = random.Random(self._dice.random())
        await KINDS[kind](Scene(self._stage, self._hand, self._people, dice, fault))
        fault.ended = time.time()
        return fault

    async def _recovered(self) -> bool:
        """Wait until nothing is due and unclaimed; False where that takes too long, or a worker
        spins."""
        end = time.monotonic() + self._drawn.recovered_within
        while time.monotonic() < end and not self._stage.spins:
            async with _asking(self._stage.dsn) as conn:
                while conn is not None and time.monotonic() < end and not self._stage.spins:
                    found = await (await conn.execute(WAITING.encode())).fetchone()
                    if found is not None and found[0] == 0:
                        return True
                    await asyncio.sleep(0.05)
            await asyncio.sleep(0.1)
        return False

    async def _breaker_closed(self) -> bool:
        """Wait until a worker's breaker is closed. False where that takes longer than the pause
        between two test calls."""
        end = time.monotonic() + PROBE_MOST + 5
        while time.monotonic() < end and not self._stage.spins:
            async with _asking(self._stage.dsn) as conn:
                while conn is not None and time.monotonic() < end:
                    found = await (await conn.execute(CLOSED_BREAKERS.encode())).fetchone()
                    if found is not None and found[0] > 0:
                        return True
                    await asyncio.sleep(0.2)
            await asyncio.sleep(0.1)
        return False


def first_deck(seed: int, kinds: list[str], dice: random.Random) -> list[str]:
    """All of these kinds, in the seed's order; the last comes first. Its own third comes before the
    rest."""
    mixed = dice.sample(kinds, k=len(kinds))
    own = THIRDS[seed % 3]
    return [kind for kind in mixed if kind not in own] + [kind for kind in mixed if kind in own]


@asynccontextmanager
async def _asking(dsn: str) -> AsyncIterator[psycopg.AsyncConnection[Any] | None]:
    """A connection for looking; None, and no error, where PostgreSQL does not answer."""
    conn: psycopg.AsyncConnection[Any] | None = None
    try:
        conn = await psycopg.AsyncConnection.connect(dsn, autocommit=True, connect_timeout=3)
    except psycopg.OperationalError:
        yield None
        return
    try:
        with suppress(psycopg.OperationalError):
            yield conn
    finally:
        conn.pgconn.finish()
