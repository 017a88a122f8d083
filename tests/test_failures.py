"""Failures that are told: the entry that a failed recall leaves in the outbox, in the same
transaction; and its sender, against a real PostgreSQL and a receiver on a raw socket."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import datetime
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook as Published

from recall_worker.database.ledger import Ledger
from recall_worker.database.outbox import KEEP, Outbox
from recall_worker.events import Events
from recall_worker.judge import planned
from recall_worker.protocols.webhook import Undelivered, Webhook
from recall_worker.recall import Busy, Ending, Finish
from recall_worker.settings import Settings
from recall_worker.worker import failures as telling
from recall_worker.worker.database_status import DatabaseStatus
from recall_worker.worker.failures import DELAY_MOST, FailureSender

from .conftest import Connection, connected
from .process.test_lease import eventually, rows
from .support.endpoint import Gate, Raw, reply
from .support.pgbouncer import PgBouncer
from .support.receiver import Receiver
from .test_ledger import put

FAIL = "update session_recalls set status = 'failed' where id = %s"


async def wanted(db: Connection, seconds: float = 3600.0, queue: str = "default") -> None:
    """Somebody wants to be told of failures, for so many seconds from now."""
    await db.execute(
        "insert into recall_subscriptions values (%s, now() + %s * interval '1 second') "
        "on conflict (queue) do update set until = excluded.until",
        [queue, seconds],
    )


async def entries(db: Connection) -> list[dict[str, Any]]:
    return await rows(db, "select * from recall_outbox order by written_at, recall_id")


async def failed(db: Connection, id: str, **columns: Any) -> None:
    """A recall that ends as failed, by plain SQL."""
    await put(db, f"s-{id}", id=id, **columns)
    await db.execute(FAIL, [id])


# --- the entry ------------------------------------------------------------------------------------


async def test_what_is_told(db: Connection) -> None:
    """Everything that an operator needs to find the recall, and nothing that is private."""
    await wanted(db)
    await put(db, "s", id="r", call_type="recurring", interval_seconds=60, occurrence=7, attempt=3)
    await db.execute(
        "update session_recalls set internal_comment = 'hush', scheduled_for = "
        "'2026-03-01 09:00:00.5+01' where id = 'r'"
    )
    await db.execute(
        "update session_recalls set status = 'failed', reason = 'the API said \"no\": größe', "
        "ended_at = '2026-03-01 08:01:02+00' where id = 'r'"
    )
    [entry] = await entries(db)
    said = json.loads(entry["body"])
    at = datetime.fromisoformat(said.pop("timestamp"))
    assert abs((at - entry["written_at"]).total_seconds()) < 0.001
    assert said == {
        "type": "recall.failed",
        "data": {
            "id": "r",
            "session_id": "s",
            "queue": "default",
            "call_type": "recurring",
            "occurrence": 7,
            "scheduled_for": "2026-03-01T08:00:00.500000Z",
            "status": "failed",
            "reason": 'the API said "no": größe',
            "attempts": 3,
            "ended_at": "2026-03-01T08:01:02.000000Z",
        },
    }
    assert "look again" not in entry["body"] and "hush" not in entry["body"]
    assert (entry["recall_id"], entry["occurrence"], entry["tries"]) == ("r", 7, 0)


async def test_only_where_somebody_wants_it(db: Connection) -> None:
    """Without a worker that has RECALL_FAILURE_URL nothing is written, nor long after the last one
    was there, nor where another queue's failures are told."""
    await failed(db, "nobody")
    await wanted(db, -1)
    await failed(db, "lapsed")
    await wanted(db, 3600, "another")
    await failed(db, "another")
    assert await entries(db) == []
    await wanted(db)
    await failed(db, "told")
    assert [entry["recall_id"] for entry in await entries(db)] == ["told"]


async def test_in_the_same_transaction(database: str, db: Connection) -> None:
    """A recall whose failure is rolled back leaves no entry; one that is committed has it at the
    same moment, also after its session is deleted."""
    await wanted(db)
    await put(db, "s", id="r")
    async with connected(database) as other:
        with suppress(ZeroDivisionError):
            async with other.transaction():
                await other.execute(FAIL, ["r"])
                assert len(await entries(other)) == 1 and await entries(db) == []
                raise ZeroDivisionError
        assert await entries(db) == []
        async with other.transaction():
            await other.execute(FAIL, ["r"])
    assert len(await entries(db)) == 1
    await db.execute("delete from sessions where id = 's'")
    assert len(await entries(db)) == 1 and await rows(db, "select from session_recalls") == []


async def test_each_failure_once(db: Connection) -> None:
    """Writing to a failed recall again tells nothing more; a failed one that runs again and fails
    again is told again; other endings, and rows that are inserted as failed, are no failures of
    ours."""
    await wanted(db)
    await failed(db, "r")
    await db.execute("update session_recalls set status = 'failed', reason = 'x' where id = 'r'")
    await db.execute("update session_recalls set status = 'pending' where id = 'r'")
    await db.execute("update session_recalls set reason = 'y' where id = 'r'")
    assert len(await entries(db)) == 1
    await db.execute(FAIL, ["r"])
    first, second = await entries(db)
    assert first["id"] != second["id"]
    for status in ("fired", "cancelled", "running"):
        await put(db, status, id=status)
        await db.execute("update session_recalls set status = %s where id = %s", [status, status])
    await put(db, "dump", id="dump", status="failed")
    assert len(await entries(db)) == 2


@pytest.mark.parametrize("way", ["settle", "settle_waiting", "settle_moved", "running"])
async def test_by_each_way_of_a_worker(way: str, database: str, db: Connection) -> None:
    """A settle, alone or in a batch, of a row in its slot or out of it; and a waiting row whose
    cadence makes no sense."""
    await wanted(db)
    ledger = Ledger(database, "w", 60.0)
    reason = "refused"
    try:
        if way == "settle_moved":
            await put(
                db, "s", 3600.0, id="r", call_type="recurring", cadence="cron", cron="61 * * * *"
            )
            [claim] = await ledger.moved()
            verdict = planned(claim, lambda: 0.0)
            assert isinstance(verdict, Finish) and verdict.status == "failed"
            await ledger.settle_moved([(claim, verdict)])
            reason = verdict.reason or ""
        else:
            await put(db, "s", id="r")
            [claim] = (await ledger.claim(1)).claims
            if way == "running":
                await db.execute("update session_recalls set status = 'running' where id = 'r'")
            ending = Ending(claim, Busy(409), 0.1, 0.2, time.monotonic())
            done = (ending, Finish("failed", reason))
            if way == "settle_waiting":
                await ledger.settle_waiting(*done)
            else:
                await ledger.settle([done])
        [entry] = await entries(db)
        said = json.loads(entry["body"])["data"]
        assert (said["id"], said["status"], said["reason"]) == ("r", "failed", reason)
        if way != "settle_moved":
            assert said["attempts"] == 1 and said["ended_at"] is not None
    finally:
        await ledger.close()


@pytest.mark.parametrize("when", ["infinity", "-infinity", "20000-01-01", "4000-01-01 BC"])
async def test_dates_that_json_has_not(when: str, db: Connection) -> None:
    """A row with a hostile date fails, and is told without that date."""
    await wanted(db)
    await put(db, "s", id="r")
    await db.execute(
        "update session_recalls set trigger_at = %s, ended_at = %s where id = 'r'", [when, when]
    )
    await db.execute(FAIL, ["r"])
    [entry] = await entries(db)
    said = json.loads(entry["body"])["data"]
    assert said["scheduled_for"] is None and said["ended_at"] is None


async def test_large_rows(db: Connection) -> None:
    """A message of megabytes, an id and a reason without end: the body is bounded, and the settle
    costs nothing more."""
    await wanted(db)
    await put(db, "s" * 2000, id="i" * 3000)
    await db.execute(
        "update session_recalls set additional_context_message = repeat('m', 9000000), "
        "reason = repeat('r', 9000)"
    )
    await db.execute(FAIL, ["i" * 3000])
    [entry] = await entries(db)
    assert len(entry["body"]) < 6000
    assert json.loads(entry["body"])["data"]["id"] == "i" * 2000


async def test_a_settle_comes_first(db: Connection) -> None:
    """Where the tables of the outbox are gone, as a migration tool drops what it does not know, a
    recall fails all the same."""
    await wanted(db)
    await db.execute("drop table recall_outbox")
    await failed(db, "r1")
    await db.execute("drop table recall_subscriptions")
    await failed(db, "r2")
    assert len(await rows(db, "select from session_recalls where status = 'failed'")) == 2


# --- the outbox -----------------------------------------------------------------------------------


@pytest.fixture(params=["direct", "pooled"])
async def outboxes(
    request: pytest.FixtureRequest, database: str
) -> AsyncIterator[Callable[[], Outbox]]:
    """Makes outboxes of workers of their own; through pgbouncer, too."""
    if request.param == "pooled":
        bouncer: PgBouncer = request.getfixturevalue("bouncer")
        database = bouncer.way_to(database)
    made: list[Outbox] = []

    def make() -> Outbox:
        made.append(Outbox(database, f"w{len(made)}"))
        return made[-1]

    yield make
    for outbox in made:
        await outbox.close()


async def test_an_entry_is_one_workers(db: Connection, outboxes: Callable[[], Outbox]) -> None:
    """Two workers never have the same entry in hand; when the lease has ended another one takes it,
    and the first can no longer write down that it failed, but that it was delivered."""
    first, second = outboxes(), outboxes()
    assert await first.subscribe() == []
    for n in range(6):
        await failed(db, f"r{n}")
    mine, theirs = await asyncio.gather(first.take(3, 60.0), second.take(3, 60.0))
    assert len({entry.recall_id for entry in mine + theirs}) == 6
    assert await first.take(3, 60.0) == []
    await db.execute("update recall_outbox set due_at = now()")
    again = {entry.id: entry for entry in await second.take(10, 60.0)}
    assert {entry.tries for entry in again.values()} == {2}
    late, delivered, *_ = mine
    await first.record(late, http_status=500, reason="late", delay=0.0)
    assert await first.take(10, 60.0) == []
    await first.record(delivered, http_status=200, delivered=True)
    await second.record(again[delivered.id], http_status=500, reason="no", given_up=True, delay=9.0)
    [row] = await rows(db, "select * from recall_outbox where delivered_at is not null")
    assert (str(row["id"]), row["given_up_at"], row["http_status"]) == (delivered.id, None, 200)


async def test_what_is_too_old_is_given_up(db: Connection, outboxes: Callable[[], Outbox]) -> None:
    """Once it is a week old; what another worker is just sending is left to that."""
    outbox = outboxes()
    await outbox.subscribe()
    for id in ("young", "old", "sent"):
        await failed(db, id)
    old = KEEP + 60
    await db.execute(
        "update recall_outbox set written_at = now() - %s * interval '1 second', due_at = now() + "
        "case recall_id when 'sent' then 1 else -1 end * interval '1 minute' "
        "where recall_id <> 'young'",
        [old],
    )
    [given_up] = await outbox.subscribe()
    assert (given_up.recall_id, given_up.tries) == ("old", 0)
    assert given_up.age == pytest.approx(old, abs=5)
    assert await outbox.subscribe() == []
    assert [entry.recall_id for entry in await outbox.take(9, 60.0)] == ["young"]


async def test_a_subscription_is_renewed_before_it_lapses(
    db: Connection, outboxes: Callable[[], Outbox]
) -> None:
    """Not at each hour: replicas do not write one row in turn. A longer one stays."""
    outbox = outboxes()
    writer = "select xmin::text as x, until - now() > interval '6 days 23 hours' as long from "
    await outbox.subscribe()
    [before] = await rows(db, writer + "recall_subscriptions")
    await outbox.subscribe()
    assert [before] == await rows(db, writer + "recall_subscriptions") and before["long"]
    await db.execute("update recall_subscriptions set until = now() + interval '6 days'")
    await outbox.subscribe()
    [after] = await rows(db, writer + "recall_subscriptions")
    assert after["x"] != before["x"] and after["long"]


# --- the sender -----------------------------------------------------------------------------------


class Replica:
    """A sender with connections of its own, as a worker has it; nothing else of a worker."""

    def __init__(self, dsn: str, settings: Settings, token: str | None = None) -> None:
        name = f"w-{uuid4().hex[:4]}"
        self.told: list[tuple[str, dict[str, Any]]] = []
        events = Events(worker=name)
        events.listen(lambda event, facts: self.told.append((event, facts)))
        self.ledger = Ledger(dsn, name, 60.0)
        self.sender = FailureSender(
            Outbox(dsn, name),
            self.ledger,
            lambda: Webhook(settings, lambda: token, lambda: settings.signing_secret, 2.0),
            DatabaseStatus(events, 60.0),
            events,
        )
        self._task = asyncio.create_task(self.sender.run())

    def heard(self, event: str) -> list[dict[str, Any]]:
        return [facts for name, facts in self.told if name == event]

    async def close(self) -> None:
        self.sender.end()
        await self._task
        await self.ledger.close()


Replicas = Callable[..., Replica]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as started:
        yield started


@pytest.fixture
async def replicas(
    database: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Replicas]:
    """Makes senders whose pauses are a fiftieth of the real ones."""
    for name in ("DELAY_FIRST", "DELAY_MOST", "PACE_FIRST", "PACE_MOST", "LOOK_EVERY"):
        monkeypatch.setattr(telling, name, getattr(telling, name) / 50)
    monkeypatch.setattr(telling, "UNSUBSCRIBED_FOR", 2.0)
    made: list[Replica] = []

    def make(dsn: str = database, token: str | None = None, **settings: Any) -> Replica:
        given = {"failure_url": receiver.url, "run_url": "http://127.0.0.1:1/"} | settings
        made.append(Replica(dsn, Settings(**given), token))
        return made[-1]

    yield make
    for replica in made:
        await replica.close()


async def delivered(db: Connection, number: int = 1, within: float = 20.0) -> list[dict[str, Any]]:
    await eventually(
        db,
        "select 1 from recall_outbox where delivered_at is not null having count(*) = %s",
        [number],
        within,
    )
    return await entries(db)


async def test_delivered_and_signed(db: Connection, receiver: Receiver, replicas: Replicas) -> None:
    """One POST, whose signature the published library verifies; 2xx is the end of it. The run
    endpoint's token is not for this host."""
    replica = replicas(token="secret-token", signing_secret="correct-horse")
    await replica.sender.ready()
    await failed(db, "r")
    replica.sender.wake()
    [entry] = await delivered(db)
    [request] = receiver.told
    assert request.line == "POST /failures HTTP/1.1" and request.body == entry["body"].encode()
    assert request.message == str(entry["id"])
    verified = Published(b"correct-horse").verify(request.body, request.headers)
    assert verified == request.document
    assert "secret-token" not in str(request.headers) and "authorization" not in request.headers
    assert abs(int(request.headers["webhook-timestamp"]) - time.time()) < 10
    [told] = replica.heard("failure.delivered")
    assert (told["recall"], told["tries"], told["http_status"]) == ("r", 1, 200)
    assert (entry["lease"], entry["http_status"], entry["reason"]) == (None, 200, None)


async def test_the_token_only_to_the_run_endpoints_own_origin(
    db: Connection, receiver: Receiver, replicas: Replicas
) -> None:
    """Same scheme, host and port: then the application behind both knows the token anyway."""
    run_url = f"http://127.0.0.1:{receiver.port}/sessions/{{session_id}}/run"
    replica = replicas(token="secret-token", run_url=run_url)
    await replica.sender.ready()
    await failed(db, "r")
    replica.sender.wake()
    await delivered(db)
    [request] = receiver.told
    assert request.headers["authorization"] == "Bearer secret-token"
    assert "webhook-signature" not in request.headers


@pytest.mark.slow
async def test_the_same_octets_at_each_try(
    db: Connection, receiver: Receiver, replicas: Replicas
) -> None:
    """Whatever is no 2xx is tried again, under the same id and with the same body: errors,
    redirects (which are not followed), garbage, hanging up. The signature is each try's own."""
    answers = [
        reply(500),
        reply(404),
        reply(302, headers={"location": "/elsewhere"}),
        Raw(b"no HTTP at all\r\n\r\n"),
        Raw(reset=True),
        reply(429, headers={"retry-after": "0"}),
        reply(204, text=b"", headers={"content-length": "0"}),
    ]
    receiver.answers(*answers)
    replica = replicas(signing_secret="correct-horse")
    await replica.sender.ready()
    await failed(db, "r")
    replica.sender.wake()
    [entry] = await delivered(db)
    assert entry["tries"] == len(receiver.told) == len(answers)
    assert {request.body for request in receiver.told} == {entry["body"].encode()}
    assert {request.message for request in receiver.told} == {str(entry["id"])}
    assert {request.path for request in receiver.told} == {"/failures"}
    for request in receiver.told:
        Published(b"correct-horse").verify(request.body, request.headers)
    deferred = replica.heard("failure.deferred")
    assert [facts["tries"] for facts in deferred] == [1, 2, 3, 4, 5, 6]
    assert deferred[0]["reason"] == "HTTP 500" and "redirect" in deferred[2]["reason"]


@pytest.mark.slow
async def test_a_receiver_that_wants_no_more(
    db: Connection, receiver: Receiver, replicas: Replicas
) -> None:
    """410: nothing is sent for a while, of any recall; then one entry is tried, and nothing is
    lost."""
    receiver.answers(reply(410), reply())
    replica = replicas()
    await replica.sender.ready()
    await failed(db, "r0")
    replica.sender.wake()
    await receiver.count(1)
    for n in range(1, 5):
        await failed(db, f"r{n}")
        replica.sender.wake()
    await delivered(db, 5)
    first, second = receiver.told[:2]
    assert second.at - first.at > 1.0
    assert len(replica.heard("failure.unsubscribed")) == 1


@pytest.mark.slow
async def test_a_receiver_that_is_down(
    db: Connection, receiver: Receiver, replicas: Replicas
) -> None:
    """Fifty failures and nobody there: it is tried one entry at a time after growing pauses, and
    all are told when it is back."""
    await receiver.stop()
    replica = replicas()
    await replica.sender.ready()
    for n in range(50):
        await failed(db, f"r{n}")
        replica.sender.wake()
    await eventually(db, "select 1 from recall_outbox having sum(tries) >= 5")
    began = time.monotonic()
    [before] = await rows(db, "select sum(tries)::int as tries from recall_outbox")
    await eventually(db, "select 1 from recall_outbox having sum(tries) >= 9")
    [after] = await rows(db, "select sum(tries)::int as tries from recall_outbox")
    # The pauses are 0.32 s and more by now: 50 entries are not 50 requests.
    assert (after["tries"] - before["tries"]) / (time.monotonic() - began) < 10
    assert receiver.told == []
    await receiver.start()
    await delivered(db, 50, within=40)
    assert len(receiver.told) == 50


@pytest.mark.slow
async def test_a_receiver_that_hangs(
    db: Connection, receiver: Receiver, replicas: Replicas
) -> None:
    """A request has a deadline, and the entry is tried again."""
    receiver.answers(Gate(), reply())
    replica = replicas()
    await replica.sender.ready()
    await failed(db, "r")
    replica.sender.wake()
    [entry] = await delivered(db)
    assert entry["tries"] == 2
    assert replica.heard("failure.deferred")[0]["reason"] == "no answer within 2 s"


async def test_given_up_with_a_word(db: Connection, receiver: Receiver, replicas: Replicas) -> None:
    """After a week: an event, and no try more. The row says it to `show`."""
    receiver.answers(reply(500))
    replica = replicas()
    await replica.sender.ready()
    await failed(db, "r")
    await db.execute(
        "update recall_outbox set written_at = now() - %s * interval '1 second'", [KEEP - 0.01]
    )
    replica.sender.wake()
    row = await eventually(db, "select * from recall_outbox where given_up_at is not null")
    assert (row["tries"], row["http_status"], row["reason"]) == (1, 500, "HTTP 500")
    [told] = replica.heard("failure.abandoned")
    assert (told["recall"], told["reason"]) == ("r", "HTTP 500") and told["after_s"] >= KEEP - 1
    assert len(receiver.told) == 1


async def test_what_others_have_written(
    db: Connection, receiver: Receiver, replicas: Replicas
) -> None:
    """The application's SQL, a worker of an earlier version: nobody wakes the sender, and its next
    look finds it."""
    replica = replicas()
    await replica.sender.ready()
    await asyncio.sleep(0.3)
    await failed(db, "r")
    await delivered(db)
    assert len(receiver.told) == 1 and replica.heard("failure.delivered")


@pytest.mark.slow
async def test_three_replicas(db: Connection, receiver: Receiver, replicas: Replicas) -> None:
    """Each entry is sent once, whichever of them does it."""
    fleet = [replicas() for _ in range(3)]
    for replica in fleet:
        await replica.sender.ready()
    for n in range(60):
        await failed(db, f"r{n}")
        for replica in fleet:
            replica.sender.wake()
    await delivered(db, 60)
    assert sorted(request.recall for request in receiver.told) == sorted(f"r{n}" for n in range(60))
    assert sum(len(replica.heard("failure.delivered")) for replica in fleet) == 60


@pytest.mark.slow
async def test_asleep_it_asks_nothing(
    database: str,
    db: Connection,
    receiver: Receiver,
    replicas: Replicas,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After its start, and after each failure, it is silent until its next look; an entry that
    waits for its next try costs nothing until then."""
    monkeypatch.setattr(telling, "LOOK_EVERY", 60.0)
    monkeypatch.setattr(telling, "DELAY_FIRST", 60.0)
    monkeypatch.setattr(telling, "DELAY_MOST", 60.0)
    asked: list[str] = []
    for kind in (Outbox, Ledger):
        for name in ("subscribe", "take", "record", "next_failure"):
            if (method := getattr(kind, name, None)) is not None:
                monkeypatch.setattr(kind, name, noting(asked, name, method))
    replica = replicas()
    await replica.sender.ready()
    receiver.answers(reply(), reply(500))
    await failed(db, "r0")
    replica.sender.wake()
    await delivered(db)
    await failed(db, "r1")
    replica.sender.wake()
    await receiver.count(2)
    await asyncio.sleep(1.0)
    # The start, each failure, and the end of the pause after the one that was not delivered.
    assert asked.count("subscribe") == 1 and asked.count("record") == 2
    assert len(asked) <= 14
    silent = len(asked)
    await asyncio.sleep(1.0)
    assert len(asked) == silent


def noting(asked: list[str], name: str, method: Any) -> Any:
    async def noted(*given: Any, **more: Any) -> Any:
        asked.append(name)
        return await method(*given, **more)

    return noted


@pytest.mark.slow
async def test_through_an_outage(
    database: str, db: Connection, receiver: Receiver, replicas: Replicas
) -> None:
    """PostgreSQL ends the connection between the POST and its record: it is recorded on the next
    one, and not sent again."""
    gate = Gate()
    receiver.answers(gate, reply(500))
    replica = replicas()
    await replica.sender.ready()
    await failed(db, "r")
    replica.sender.wake()
    await gate.entered.wait()
    await db.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() "
        "and pid <> pg_backend_pid()"
    )
    gate.open()
    await delivered(db)
    assert len(receiver.told) == 1


async def test_of_a_copy_nothing_is_told(
    db: Connection, receiver: Receiver, replicas: Replicas
) -> None:
    """Its entries are those of the original, which delivers them."""
    await wanted(db)
    await failed(db, "r")
    await db.execute("truncate recall_identity")
    await db.execute("insert into recall_identity values (1, 1)")
    replica = replicas()
    await replica.sender.ready()
    await asyncio.sleep(0.3)
    assert receiver.told == [] and not replica.told
    [entry] = await entries(db)
    assert entry["tries"] == 0


@given(st.integers(1, 10**6), st.none() | st.floats(0, 1e9), st.booleans())
def test_a_pause_is_bounded(tries: int, retry_after: float | None, gone: bool) -> None:
    """Never at once, never longer than an hour, and what the receiver says counts."""
    delay = telling._delay(tries, Undelivered("", 503, retry_after, gone))
    assert 1.0 <= delay <= DELAY_MOST
    if retry_after is not None and not gone and 1 <= retry_after <= DELAY_MOST:
        assert delay == retry_after
