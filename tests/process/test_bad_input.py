"""Bad input: whatever stands in a row, the daemon stays up, doesn't spin, keeps its other promises,
and says what became of the row.

One daemon for most of it, on a table whose guards are gone: as one that was adopted with old rows
in it, or that a hand has written to. After each row the same process must be alive, ask PostgreSQL
for next to nothing, and call a good recall on time.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import string
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import unquote

import psycopg
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from recall_worker import schema
from recall_worker.database import ledger as ledger_module
from recall_worker.database.ledger import Ledger

from ..conftest import Connection, connected
from ..support import postgres
from ..support.application import CREATE_TABLES, AlreadyScheduled, Application
from ..support.claiming import claim_due
from ..support.daemon import Daemon, Daemons
from ..support.endpoint import Answer, Endpoint, Gate, Raw, Request, reply
from ..support.proxy import Proxy
from .test_corridor import soon
from .test_lease import eventually, promise, rows

pytestmark = pytest.mark.full

shared = pytest.mark.asyncio(loop_scope="module")
"""Tests in the one house share its event loop."""

LAST = 2**31 - 1
STATE = """
select id, status, reason, occurrence, rekey, attempt, deferrals, missed, last_outcome,
    trigger_at::text as trigger_at,
    lease is not null as leased
from session_recalls where id = %s
"""
DONE = (
    "and (status not in ('pending', 'running') or paused_at is not null or coalesce(lease_until, "
    "trigger_at) > now()) "
)
"""Final, or not due."""
FREE = "and (lease is null or leased_by is distinct from %s)"
"""In nobody's hands, or in those of a worker that there is not."""


@dataclass(slots=True)
class House:
    """One daemon on a table without guards, and a way to see how much it asks for."""

    dsn: str
    db: Connection
    endpoint: Endpoint
    proxy: Proxy
    daemon: Daemon
    numbers: itertools.count[int]

    async def insert(self, **columns: Any) -> str:
        """A row as a hostile hand writes it, in all columns that are named; its id. Its session
        exists."""
        row = {
            "id": f"bad-{next(self.numbers)}",
            "session_id": "s",
            "call_type": "once",
            "trigger_at": datetime.now(UTC),
            "additional_context_message": "m",
            "status": "pending",
            "created_at": datetime.now(UTC),
            "updated_at": datetime.now(UTC),
        } | columns
        names = sql.SQL(", ").join(map(sql.Identifier, row))
        values = sql.SQL(", ").join(sql.Placeholder() * len(row))
        async with self.db.transaction():
            await self.db.execute(
                "insert into sessions values (%s, 'ann') on conflict do nothing",
                [row["session_id"]],
            )
            await self.db.execute(
                sql.SQL("insert into session_recalls ({}) values ({})").format(names, values),
                list(row.values()),
            )
        return str(row["id"])

    async def done(self, id: str) -> dict[str, Any]:
        """The row when it is final, or waits."""
        return await eventually(self.db, STATE + DONE + FREE, [id, self.daemon.name])

    def calls(self, id: str) -> list[Request]:
        return [
            request for request in self.endpoint.requests if request.document["recall"]["id"] == id
        ]

    async def goes_on(self) -> None:
        """The same process calls a good recall on time, has told of no trouble, and then asks for
        next to nothing."""
        await self.calls_another()
        asked = self.proxy.asked
        await self.db.execute("select pg_sleep(0.1)")
        assert self.proxy.asked - asked <= 12, "a hot loop"

    async def calls_another(self) -> None:
        session = f"good-{next(self.numbers)}"
        await self.insert(id=session, session_id=session)
        [settled] = await self.daemon.hears("recall.settled", recall=session, status="fired")
        assert settled["lag_ms"] < 3000
        assert self.daemon.process.returncode is None
        assert (
            self.daemon.told("worker.error")
            == self.daemon.told("recall.stranded")
            == self.daemon.told("breaker.opened")
            == []
        )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one_house(server: str, template: str) -> AsyncIterator[House]:
    """A database whose guards are gone, and one daemon for all that follows."""
    with postgres.database(server, template) as dsn:
        async with connected(dsn) as db, Endpoint() as endpoint, Proxy(dsn) as proxy:
            await db.execute("alter table session_recalls disable trigger recall_before_insert")
            # Which notifies, too.
            await db.execute(
                "create trigger notifies after insert on session_recalls for each row execute "
                "function recall_ring()"
            )
            await db.execute(
                "alter table session_recalls drop constraint session_recalls_call_type_check"
            )
            async with Daemons(
                {"RECALL_DSN": proxy.dsn, "RECALL_RUN_URL": endpoint.url}
            ) as daemons:
                yield House(
                    dsn,
                    db,
                    endpoint,
                    proxy,
                    await daemons.start(poll_interval=5, lease=3, message_limit=5_000_000),
                    itertools.count(1),
                )


@pytest_asyncio.fixture(loop_scope="module")
async def house(one_house: House) -> AsyncIterator[House]:
    """The house, empty again."""
    one_house.endpoint.scripts.clear()
    one_house.endpoint.requests.clear()
    one_house.endpoint.default = reply()
    yield one_house
    await one_house.db.execute("delete from sessions")


INDEXED = "".join(uuid.uuid5(uuid.NAMESPACE_OID, str(n)).hex for n in range(84))
"""As long an id as the table's own index takes, and too long for that of the calls."""


# --- rows that can't be run -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"call_type": "weekly"}, "call_type is 'weekly'"),
        ({"call_type": ""}, "call_type is ''"),
        ({"call_type": "ONCE"}, "call_type is 'ONCE'"),
        ({"call_type": "once\u202e\x1b[2J"}, "call_type is 'once\\u202e\\x1b[2J'"),
        ({"call_type": "recurring"}, "interval_seconds of at least 1, not null"),
        (
            {"call_type": "recurring", "interval_seconds": 0},
            "interval_seconds of at least 1, not 0",
        ),
        (
            {"call_type": "recurring", "interval_seconds": -1},
            "interval_seconds of at least 1, not -1",
        ),
        (
            {"call_type": "recurring", "interval_seconds": -(2**31)},
            "interval_seconds of at least 1, not -2147483648",
        ),
        ({"session_id": ""}, "session_id is ''"),
        ({"session_id": "."}, "session_id is '.'"),
        ({"session_id": ".."}, "session_id is '..'"),
        ({"id": "x" * 2001}, "id is 2001 bytes long"),
        ({"id": "é" * 1001}, "id is 2002 bytes long"),
        ({"id": INDEXED}, "id is 2688 bytes long"),
        ({"id": "x" * 8_000}, "id is 8000 bytes long"),
        ({"id": "x" * 100_000}, "id is 100000 bytes long"),
    ],
    ids=[
        "unknown type",
        "no type",
        "type in capitals",
        "type with controls",
        "no interval",
        "interval 0",
        "interval -1",
        "least interval",
        "no session",
        "session .",
        "session ..",
        "id 2 kB",
        "id of two-byte characters",
        "id as long as an index takes",
        "id 8 kB",
        "id 100 kB",
    ],
)
@shared
async def test_rows_that_can_not_be_run(house: House, columns: dict[str, Any], reason: str) -> None:
    """A row that makes no sense is failed, with its reason, without a call; the daemon goes on."""
    id = await house.insert(**columns)
    row = await house.done(id)
    assert (row["status"], row["leased"]) == ("failed", False)
    assert reason in row["reason"]
    assert house.calls(id) == []
    await house.goes_on()


@pytest.mark.parametrize(
    "columns",
    [{"call_type": "weekly"}, {"call_type": "recurring"}, {"id": INDEXED}],
    ids=["unknown type", "no interval", "id too long"],
)
@shared
async def test_rows_that_can_not_be_run_and_whose_worker_died(
    house: House, columns: dict[str, Any]
) -> None:
    """Also where somebody claimed such a row and was not heard of again, it is failed at the end of
    that lease, not called."""
    lease = {
        "lease": uuid.uuid4(),
        "lease_until": soon(-1),
        "leased_by": "gone",
        "leased_at": soon(-10),
        "attempt": 1,
    }
    id = await house.insert(**columns, **lease, trigger_at=soon(-20))
    row = await house.done(id)
    assert row["status"] == "failed" and row["reason"]
    assert house.calls(id) == []
    await house.goes_on()


@pytest.mark.parametrize("interval", [None, 0, -5], ids=["none", "0", "-5"])
async def test_intervals_that_would_loop_are_refused_at_insert(
    interval: int | None, app: Application, daemons: Daemons, endpoint: Endpoint
) -> None:
    """The application is told what to do, in words that it does not take for "this session has one
    already"; nobody else notices."""
    daemon = await daemons.start()
    await app.create_session("s", "ann")
    with pytest.raises(Exception) as caught:
        await app.schedule("s", "recurring", soon(0), "m", interval)
    assert not isinstance(caught.value, AlreadyScheduled)
    said = str(caught.value)
    assert "interval_seconds" in said and "at least 1" in said
    assert "Set interval_seconds" in said and "call_type 'once'" in said
    assert not {"unique", "duplicate"} & set(said.lower().replace(".", " ").split())
    await app.schedule("s", "once", soon(0), "m")
    await daemon.hears("recall.settled", session="s", status="fired")
    assert len(endpoint.requests) == 1


async def test_an_adopted_table(empty_database: str, endpoint: Endpoint) -> None:
    """Rows that stood there before `migrate` and can't be run are failed with their reasons; those
    beside them fire; none loops."""
    bad = {
        "null": ("recurring", None, "2020-01-01"),
        "zero": ("recurring", 0, "2020-01-01"),
        "minus": ("recurring", -3, "-infinity"),
        "odd": ("weekly", 5, "2020-01-01"),
    }
    good = {
        "far": ("once", None, "infinity"),
        "old": ("once", None, "-infinity"),
        "bc": ("immediate", 7, "0044-03-15 BC"),
        "again": ("recurring", LAST, "1970-01-01"),
        "later": ("recurring", 0, "294276-12-31"),
    }
    async with connected(empty_database) as db:
        await db.execute(CREATE_TABLES.encode())
        await db.execute(
            "alter table session_recalls drop constraint session_recalls_call_type_check"
        )
        for id, (type, interval, trigger) in (bad | good).items():
            await db.execute("insert into sessions values (%s, 'ann')", [id])
            await db.execute(
                "insert into session_recalls values (%s, %s, %s, %s, %s, null, 'm', 'pending', "
                "'-infinity', 'infinity')",
                [id, id, type, trigger, interval],
            )
        await asyncio.to_thread(schema.migrate, empty_database)
        async with Daemons(
            {"RECALL_DSN": empty_database, "RECALL_RUN_URL": endpoint.url}
        ) as daemons:
            daemon = await daemons.start()
            await daemon.hears("recall.settled", times=len(bad) + 3)
            found = {row["id"]: row for row in await rows(db, STATE.replace("where id = %s", ""))}
            assert {id: found[id]["status"] for id in bad} == dict.fromkeys(bad, "failed")
            assert all(found[id]["reason"] for id in bad)
            assert {id: found[id]["status"] for id in good} == {
                "far": "pending",
                "old": "fired",
                "bc": "fired",
                "again": "pending",
                "later": "pending",
            }
            assert found["again"]["occurrence"] == 2
            assert sorted(request.session for request in endpoint.requests) == [
                "again",
                "bc",
                "old",
            ]
            assert await daemon.stop() == 0


# --- texts ----------------------------------------------------------------------------------------

TEXTS = {
    "quotes": "' \" ` '' \"\" $$ ${x} %s %(x)s {session_id}",
    "backslashes": "\\ \\\\ \\n \\u0000 \\x00 \\'",
    "controls": "".join(map(chr, range(1, 32))) + "\x7f\x80\x9b\x9f",
    "lines": "a\r\nb\n\nc\u2028d\u2029e",
    "escapes": "\x1b[2J\x1b]0;owned\x07\x1b[31m",
    "bidi": "\u202egnp.exe\u202c \u2066x\u2069 \u200f",
    "emoji": "🙂👩‍👩‍👧‍👦🇩🇪 \U0010ffff \ufeff \ufffe",
    "blanks": "  a  \t ",
    "markup": "<script>&amp;</script>",
    "sql": "'; drop table session_recalls; --",
}


@pytest.mark.parametrize(
    "text",
    ["", "m" * 5_000_000, "🙂" * 1_000_000, *TEXTS.values()],
    ids=["empty", "5 MB", "4 MB", *TEXTS],
)
@shared
async def test_messages_arrive_as_they_are(house: House, text: str) -> None:
    """A message of any size and any characters reaches the agent as it stands in the row, and the
    comment does not."""
    id = await house.insert(additional_context_message=text, internal_comment="hush" + text[:1000])
    assert (await house.done(id))["status"] == "fired"
    [call] = house.calls(id)
    assert call.document["user_message"] == text
    assert call.document["system_message"] == f"[Scheduled recall] {text}"
    assert b"hush" not in call.body
    await house.goes_on()


@pytest.mark.full
@shared
async def test_many_large_messages_at_once(house: House) -> None:
    """A dozen messages of 5 MB that are due in the same instant are all called, and the recall
    among them too."""
    due = soon(1)
    ids = [
        await house.insert(
            session_id=f"s{n}", additional_context_message=str(n) * 5_000_000, trigger_at=due
        )
        for n in range(9)
    ]
    ids += [await house.insert(session_id="small", trigger_at=due)]
    for id in ids:
        await eventually(
            house.db,
            "select from session_recalls where id = %s and status = 'fired'",
            [id],
            within=60,
        )
    assert [len(house.calls(id)) for id in ids] == [1] * len(ids)
    await house.goes_on()


@pytest.mark.parametrize(
    "text", [*TEXTS.values(), "a/b?c#d&e=f", "%2e%2e%2f%00", "r:1", "r:1.1", "x" * 2000], ids=ascii
)
@shared
async def test_ids_become_keys(house: House, text: str) -> None:
    """An id of any characters makes a header of plain ASCII without blanks, from which the id can
    be told, and no second header."""
    id = await house.insert(id=text)
    assert (await house.done(id))["status"] == "fired"
    [call] = house.calls(id)
    assert all("!" <= c <= "~" for c in call.key)
    assert unquote(call.key) == f"{id}:1" or call.key == f"{id}:1"
    assert set(call.headers) <= {
        "host",
        "content-type",
        "content-length",
        "accept",
        "accept-encoding",
        "user-agent",
        "idempotency-key",
        "recall-attempt",
        "recall-lateness",
        "traceparent",
    }
    await house.goes_on()


@pytest.mark.parametrize(
    "text",
    [
        *TEXTS.values(),
        "a/b",
        "/",
        "../..",
        "...",
        "%2e%2e",
        "a?b#c",
        "http://elsewhere/",
        "\\\\host\\share",
        "@",
        "a:b",
    ],
    ids=ascii,
)
@shared
async def test_sessions_keep_their_place_in_the_address(house: House, text: str) -> None:
    """A session id of any characters stays one segment of the path, from which it can be told."""
    id = await house.insert(session_id=text)
    assert (await house.done(id))["status"] == "fired"
    [call] = house.calls(id)
    assert call.session == text
    method, path, version = call.line.split(" ")
    assert (method, version) == ("POST", "HTTP/1.1")
    empty, sessions, named, run = path.split("/")
    assert (empty, sessions, unquote(named), run) == ("", "sessions", text, "run")
    await house.goes_on()


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (reply(414, {"error": "too long"}), "refused"),
        (reply(431, {"error": "too large"}), "refused"),
        (reply(), "answered"),
    ],
    ids=["414", "431", "200"],
)
@shared
async def test_a_session_id_of_100_kb(house: House, answer: Raw, outcome: str) -> None:
    """What is too long for the API is the API's to say, and ends the recall with its reason."""
    session = "x" * 100_000
    house.endpoint.script(session, answer)
    id = await house.insert(session_id=session)
    row = await house.done(id)
    assert row["last_outcome"] == outcome
    assert row["status"] == ("fired" if outcome == "answered" else "failed")
    assert outcome == "answered" or "too l" in row["reason"]
    assert len(house.calls(id)) == 1
    await house.goes_on()


@shared
async def test_nul_can_not_be_stored(house: House) -> None:
    """PostgreSQL refuses the one character that no text of its can hold, in the application's own
    insert; the daemon never hears of it."""
    async with await Application.connect(house.dsn) as app:
        await app.create_session("s", "ann")
        for message, id in (("a\0b", None), ("m", "a\0b")):
            with pytest.raises(Exception, match="0x00") as caught:
                await app.schedule("s", "once", soon(0), message, id=id)
            assert not isinstance(caught.value, AlreadyScheduled)
    await house.goes_on()


# --- dates ----------------------------------------------------------------------------------------

PAST = [
    "-infinity",
    "4713-01-01 00:00:00 BC",
    "0001-12-31 23:59:59 BC",
    "0001-01-01",
    "1582-10-10",
    "1969-12-31 23:59:59.999999",
]
FAR = [
    "9998-01-02",
    "9999-12-31 23:59:59.999999",
    "10000-01-01",
    "20000-01-01",
    "294276-12-31 23:59:59.999999",
    "infinity",
]


@pytest.mark.parametrize("type", ["once", "immediate", "recurring"])
@shared
async def test_past_dates_are_due(house: House, type: str) -> None:
    """However long ago a recall was due: it is called once, with a date that JSON readers know, and
    what it missed is one number."""
    interval = 3600 if type == "recurring" else None
    for id in [
        await house.insert(
            session_id=when, trigger_at=when, call_type=type, interval_seconds=interval
        )
        for when in PAST
    ]:
        row = await house.done(id)
        assert (row["status"], row["occurrence"]) == (("pending", 2) if interval else ("fired", 1))
        [call] = house.calls(id)
        told = call.document["recall"]
        assert (
            datetime(1, 1, 1, tzinfo=UTC)
            <= datetime.fromisoformat(told["scheduled_for"])
            < datetime(1970, 1, 1, tzinfo=UTC)
        )
        assert (told["missed"] > 0) is bool(interval)
        assert float(call.headers["recall-lateness"]) > 0
    await house.goes_on()


@pytest.mark.parametrize("type", ["once", "recurring"])
@shared
async def test_far_dates_wait(house: House, type: str) -> None:
    """However far off a recall is: it waits, untouched, and nobody wakes for it; brought near, it
    is called."""
    ids = [
        await house.insert(session_id=when, trigger_at=when, call_type=type, interval_seconds=3600)
        for when in FAR
    ]
    await house.goes_on()
    for id in ids:
        [row] = await rows(house.db, STATE, [id])
        assert (row["status"], row["leased"], row["attempt"], row["reason"]) == (
            "pending",
            False,
            0,
            None,
        )
        assert house.calls(id) == []
    await house.db.execute("update session_recalls set trigger_at = now() where trigger_at > now()")
    for id in ids:
        await house.daemon.hears("recall.settled", recall=id, outcome="answered")


@pytest.mark.parametrize(
    "column",
    [
        "created_at",
        "updated_at",
        "scheduled_for",
        "planned_at",
        "begun_at",
        "leased_at",
        "ended_at",
        "delivered_at",
    ],
)
@shared
async def test_dates_beside_the_trigger(house: House, column: str) -> None:
    """No date in any other column keeps a due recall from being called, or others."""
    for id in [await house.insert(session_id=when, **{column: when}) for when in [*PAST, *FAR]]:
        assert (await house.done(id))["status"] == "fired"
        [call] = house.calls(id)
        datetime.fromisoformat(call.document["recall"]["scheduled_for"])
    await house.goes_on()


@shared
async def test_a_busy_session_and_a_strange_first_call(house: House) -> None:
    """From whenever an occurrence is said to have begun, its deferrals end: at once where that is
    long ago, else after RECALL_GIVE_UP."""
    house.endpoint.default = reply(409, headers={"retry-after": "60"})
    for id, when in [
        (await house.insert(session_id=when, begun_at=when), when) for when in [*PAST, *FAR]
    ]:
        row = await house.done(id)
        if when in PAST:
            assert row["status"] == "failed" and "given up" in row["reason"]
        else:
            assert (row["status"], row["deferrals"]) == ("pending", 1)
            assert await rows(
                house.db, "select from session_recalls where id = %s and begun_at <= now()", [id]
            ), "from now on"
    house.endpoint.default = reply()
    await house.goes_on()


# --- counters -------------------------------------------------------------------------------------

ANSWERS: Mapping[str, Answer] = {
    "answered": reply(),
    "busy": reply(409, headers={"retry-after": "60"}),
    "unknown": reply(500),
    "failed": reply(200, {"status": "failed"}),
    "refused": reply(400),
}


@pytest.mark.parametrize("outcome", ANSWERS)
@shared
async def test_counters_at_their_ends(house: House, outcome: str) -> None:
    """No counter, however the call ends, overflows: the row is settled, in order or with a reason,
    and is not claimed again and again."""
    house.endpoint.default = ANSWERS[outcome]
    ends = list(
        itertools.product(
            ["occurrence", "rekey", "attempt", "deferrals", "missed"], [LAST, -(2**31), -1]
        )
    )
    for column, number in ends:
        id = f"{column} {number} {outcome}"
        await house.insert(
            id=id, session_id=id, call_type="recurring", interval_seconds=1000, **{column: number}
        )
        await house.daemon.hears("recall.settled", recall=id, outcome=outcome)
    over = await rows(house.db, "select id, reason from session_recalls where status = 'failed'")
    if outcome in ("answered", "refused"):
        assert [row["id"] for row in over] == [f"occurrence {LAST} {outcome}"]
        assert "no number is left" in over[0]["reason"]
    else:
        assert over == []
    await house.db.execute("delete from session_recalls")
    house.endpoint.default = reply()
    await house.goes_on()


@shared
async def test_what_was_missed_is_bounded(house: House) -> None:
    """More due moments since Christ than a counter holds: as many as it holds, in one run."""
    id = await house.insert(call_type="recurring", interval_seconds=1, trigger_at="-infinity")
    await house.daemon.hears("recall.settled", recall=id, outcome="answered")
    await house.db.execute("update session_recalls set status = 'cancelled' where id = %s", [id])
    assert house.calls(id)[0].document["recall"]["missed"] == LAST
    await house.goes_on()


@shared
async def test_the_longest_interval(house: House) -> None:
    """68 years on there is a next occurrence."""
    id = await house.insert(call_type="recurring", interval_seconds=LAST, trigger_at=PAST[0])
    row = await house.done(id)
    assert (row["status"], row["occurrence"]) == ("pending", 2)
    [left] = await rows(
        house.db,
        "select extract(epoch from trigger_at - now())::float8 as s from session_recalls where "
        "id = %s",
        [id],
    )
    assert LAST - 60 < left["s"] <= LAST
    await house.goes_on()


@pytest.mark.parametrize(
    ("planned", "trigger"),
    [("-infinity", "now"), ("1000-01-01", "2000-01-01"), ("2000-01-01", "-infinity")],
)
@pytest.mark.parametrize("occurrence", [1, LAST - 1, LAST])
@shared
async def test_moves_by_more_than_can_be_counted(
    house: House, planned: str, trigger: str, occurrence: int
) -> None:
    """A trigger that was moved by more intervals than there are numbers is called under the last
    number, and once."""
    id = await house.insert(
        call_type="recurring",
        interval_seconds=1,
        planned_at=planned,
        trigger_at=trigger,
        occurrence=occurrence,
        additional_context_message="",
    )
    await house.daemon.hears("recall.settled", recall=id, outcome="answered")
    await house.db.execute("update session_recalls set paused_at = now() where id = %s", [id])
    numbers = [call.document["recall"]["occurrence"] for call in house.calls(id)]
    assert numbers == sorted(set(numbers)) and occurrence <= numbers[-1] <= LAST
    await house.goes_on()


async def test_a_wider_interval_column(
    database: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """In a table that the application made with a wider column, an interval beyond all dates fails
    with its reason."""
    await db.execute("alter table session_recalls alter interval_seconds type bigint")
    await db.execute("insert into sessions values ('s', 'ann')")
    daemon = await daemons.start()
    await db.execute(
        "insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds, "
        "additional_context_message, created_at, "
        "updated_at, planned_at) values ('wide', 's', 'recurring', now(), 9223372036854775807, "
        "'m', now(), now(), now())"
    )
    await db.execute(
        "update session_recalls set trigger_at = trigger_at - interval '1 day', status = 'pending'"
    )
    await daemon.hears("recall.settled", recall="wide", status="failed")
    [row] = await rows(db, STATE, ["wide"])
    assert "at most 2147483647" in row["reason"]
    assert endpoint.requests == []
    assert await daemon.stop() == 0


# --- leases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "worker", [None, "", "somebody\x1b[2J\u202e" * 100], ids=["nobody", "no name", "a strange name"]
)
@shared
async def test_leases_that_are_over(house: House, worker: str | None) -> None:
    """A lease without an end, or one that ended ages ago, of whomever, is taken up, and its call is
    on record."""
    for until in [None, *PAST]:
        id = await house.insert(
            lease=uuid.uuid4(), lease_until=until, leased_by=worker, leased_at=until
        )
        assert (await house.done(id))["status"] == "fired"
        assert len(house.calls(id)) == 1
        marks = await rows(
            house.db,
            "select worker, settled, outcome from recall_attempts where recall_id = %s order by "
            "attempt",
            [id],
        )
        assert [(mark["outcome"], mark["settled"]) for mark in marks] == [
            ("unknown", "taken"),
            ("answered", "fired"),
        ]
        assert marks[1]["worker"] == house.daemon.name
    await house.goes_on()


@shared
async def test_dates_that_are_further_apart_than_an_interval_holds(house: House) -> None:
    """Written in the first year of PostgreSQL's calendar and due in its last one, though its lease
    is over: called and settled as any other."""
    id = await house.insert(
        trigger_at="294276-12-31 23:59:59.999999",
        updated_at="4713-01-01 00:00:00 BC",
        lease=uuid.uuid4(),
        lease_until="2000-01-01",
        leased_by="gone",
    )
    await house.daemon.hears("recall.settled", recall=id)
    await house.goes_on()


@shared
async def test_a_lease_of_ours_that_is_over(house: House) -> None:
    """A row that says that this very worker holds it, which it does not, is called after two leases
    at most, or when the lease is another's."""
    id = await house.insert(
        lease=uuid.uuid4(), lease_until="-infinity", leased_by=house.daemon.name
    )
    await house.daemon.hears("recall.settled", recall=id, status="fired")
    await house.goes_on()


@pytest.mark.parametrize("until", ["infinity", "294276-12-31", "9999-12-31"])
@pytest.mark.parametrize("status", ["cancelled", "fired", "failed"])
@shared
async def test_an_endless_lease_on_a_recall_that_is_over(
    house: House, until: str, status: str
) -> None:
    """A final row whose lease will never end does not keep its session's next recall waiting."""
    await house.insert(
        session_id="s", status=status, lease=uuid.uuid4(), lease_until=until, leased_by="gone"
    )
    id = await house.insert(session_id="s")
    assert (await house.done(id))["status"] == "fired"
    await house.goes_on()


@pytest.mark.parametrize(
    ("until", "trigger"), [("infinity", "now"), ("294276-12-31", "now"), (None, "infinity")]
)
async def test_an_endless_lease_on_a_live_recall(
    until: str | None,
    trigger: str,
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """A lease that no worker can have taken holds its session until the next beat of any worker;
    then the row is taken up."""
    await app.create_session("s", "ann")
    await db.execute(
        "insert into session_recalls (id, session_id, call_type, trigger_at, "
        "additional_context_message, created_at, updated_at, lease, "
        "lease_until, leased_by) values ('held', 's', 'once', %s, 'm', now(), now(), "
        "gen_random_uuid(), %s, 'gone')",
        [trigger, until],
    )
    daemon = await daemons.start(poll_interval=0.2)
    await daemon.hears("lease.taken", recall="held", worker_before="gone")
    await daemon.hears("recall.settled", recall="held", status="fired")
    assert len(endpoint.requests) == 1


# --- rows that PostgreSQL refuses to change -------------------------------------------------------

UNTOUCHABLE = """
create function untouchable() returns trigger language plpgsql as $$
begin
    raise exception 'nobody touches this %', repeat('!', 3);
end
$$;
create trigger untouchable before update on session_recalls for each row when (old.id = 'bad')
    execute function untouchable();
"""
NOT_VALID = "alter table session_recalls add constraint mine check (id <> 'bad') not valid"


async def crowd(db: Connection, bad: bool = True) -> list[str]:
    """Fifty good rows, due at once, with a bad one among them; the ids of the good."""
    good = [f"r{n}" for n in range(50)]
    due = soon(1.0)
    for n, id in enumerate([*good[:25], *(["bad"] if bad else []), *good[25:]]):
        await db.execute("insert into sessions values (%s, 'ann')", [id])
        await db.execute(
            "insert into session_recalls (id, session_id, call_type, trigger_at, "
            "additional_context_message, created_at, updated_at) "
            "values (%s, %s, 'once', %s, 'm', now(), now())",
            [id, id, due + timedelta(milliseconds=n)],
        )
    return good


@pytest.mark.parametrize(
    ("how", "said"),
    [(UNTOUCHABLE, "nobody touches this"), (NOT_VALID, "mine")],
    ids=["trigger", "constraint"],
)
@pytest.mark.parametrize("slots", [3, 100])
async def test_one_row_that_can_not_be_claimed_among_fifty(
    slots: int, how: str, said: str, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A row whose every update is refused is passed over, loudly; the fifty around it fire on
    time."""
    daemon = await daemons.start(concurrency=slots)
    good = await crowd(db)
    await db.execute(how.encode())
    await daemon.hears("recall.settled", times=50, status="fired")
    assert sorted(r.session for r in endpoint.requests) == sorted(good)
    assert max(event["lag_ms"] for event in daemon.told("recall.settled")) < 5000
    [stranded] = daemon.told("recall.stranded")
    assert stranded["recall"] == "bad" and said in stranded["error"]
    assert (await rows(db, STATE, ["bad"]))[0]["status"] == "pending"
    assert daemon.told("worker.error") == []
    assert await daemon.stop() == 0


async def test_a_row_that_is_put_aside_is_tried_again(
    app: Application, database: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be claimed is passed over for a while, by each worker for itself, and claimed
    once PostgreSQL allows it."""
    monkeypatch.setattr(ledger_module, "ASIDE_FIRST", 0.3)
    await promise(app, "bad")
    await promise(app, "good")
    await db.execute(UNTOUCHABLE.replace("old.id", "old.session_id").encode())
    ledger = Ledger(database, "w", 60)
    try:
        claimed = await claim_due(ledger, 5)
        assert [claim.session_id for claim in claimed.claims] == ["good"]
        assert [reason for _, reason in claimed.stranded] == ["nobody touches this !!!"]
        claimed = await claim_due(ledger, 5)
        assert (
            not claimed.claims
            and not claimed.stranded
            and not claimed.waiting
            and claimed.next_in is not None
        )
        await db.execute("drop trigger untouchable on session_recalls")
        await db.execute("select pg_sleep(0.4)")
        claimed = await claim_due(ledger, 5)
        assert [claim.session_id for claim in claimed.claims] == ["bad"]
    finally:
        await ledger.close()


async def test_one_row_that_can_not_be_settled_among_fifty(
    db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A row whose end is refused strands alone, and is not called again for ever: after its
    attempts nothing is sent any more."""
    daemon = await daemons.start(concurrency=100, lease=1, max_attempts=1)
    good = await crowd(db)
    await db.execute(
        "alter table session_recalls add constraint mine check (id <> 'bad' or status = 'pending')"
    )
    await daemon.hears("recall.settled", times=50, status="fired")
    await daemon.hears("recall.stranded", times=2, recall="bad")
    assert sorted(r.session for r in endpoint.requests) == sorted([*good, "bad"])
    assert all("mine" in event["error"] for event in daemon.told("recall.stranded"))
    assert daemon.told("lease.lost") == []
    assert await daemon.stop() == 0


async def test_one_row_that_can_not_be_renewed(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A row whose renewal is refused costs the others nothing: they keep their leases, and end as
    they end."""
    gates = {session: Gate() for session in ("a", "bad", "c")}
    for session, gate in gates.items():
        endpoint.script(session, gate)
    daemon = await daemons.start(lease=1)
    for session in gates:
        await promise(app, session)
    for gate in gates.values():
        await gate.entered.wait()
    await db.execute(UNTOUCHABLE.replace("old.id", "old.session_id").encode())
    await eventually(
        db,
        "select from session_recalls where lease_until > leased_at + interval '3 seconds' having "
        "count(*) = 2",
    )
    await db.execute("drop trigger untouchable on session_recalls")
    for gate in gates.values():
        gate.open()
    for session in gates:
        await daemon.hears("recall.settled", session=session, status="fired")
    assert len(endpoint.requests) == 3
    assert daemon.told("lease.lost") == []


# --- anything at all ------------------------------------------------------------------------------

INTEGERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, LAST, LAST - 1, -(2**31)]), st.integers(-(2**31), LAST)
)
DATES = st.one_of(
    st.sampled_from([*PAST, *FAR]),
    st.floats(-3, 0.5).map(lambda s: soon(s).isoformat()),
    st.datetimes(datetime(1, 1, 2), datetime(9998, 12, 31)).map(
        lambda d: d.replace(tzinfo=UTC).isoformat()
    ),
)
WORDS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40),
    st.sampled_from([*TEXTS.values(), "", ".", "..", "a/b", "x" * 3000]),
    st.text(string.printable, max_size=20),
)
ROWS = st.fixed_dictionaries(
    {
        "id": WORDS,
        "session_id": WORDS.filter(lambda s: not s.startswith("good-")),
        "call_type": st.one_of(st.sampled_from(["once", "recurring", "immediate"]), WORDS),
        "trigger_at": DATES,
        "interval_seconds": st.one_of(st.none(), INTEGERS),
        "internal_comment": st.one_of(st.none(), WORDS),
        "additional_context_message": WORDS,
        "status": st.sampled_from(["pending"] * 4 + ["running", "fired", "cancelled", "failed"]),
        "created_at": DATES,
        "updated_at": DATES,
    },
    optional={
        "lease": st.uuids(),
        "lease_until": DATES,
        "leased_at": DATES,
        "leased_by": WORDS,
        "occurrence": INTEGERS,
        "rekey": INTEGERS,
        "attempt": INTEGERS,
        "deferrals": INTEGERS,
        "scheduled_for": DATES,
        "planned_at": DATES,
        "begun_at": DATES,
        "delivered_at": DATES,
        "missed": INTEGERS,
        "last_outcome": WORDS,
        "reason": WORDS,
        "ended_at": DATES,
        "paused_at": DATES,
    },
)


@pytest.mark.full
@given(row=ROWS, outcome=st.sampled_from(sorted(ANSWERS)))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@shared
async def test_any_row_at_all(house: House, row: dict[str, Any], outcome: str) -> None:
    """Whatever stands in the columns, the application's and the worker's: the row ends with a
    reason or waits, and the daemon goes on."""
    house.endpoint.default = ANSWERS[outcome]
    told, asked, called = len(house.daemon.events), house.proxy.asked, len(house.endpoint.requests)
    began = time.monotonic()
    id = await house.insert(**row)
    left = await house.done(id)
    if left["status"] == "failed" and row["status"] != "failed":
        assert left["reason"]
    if row["status"] in ("fired", "cancelled", "failed"):
        assert left["status"] == row["status"] and len(house.endpoint.requests) == called
    await house.db.execute("delete from session_recalls")
    house.endpoint.default = reply()
    await house.calls_another()
    most = 60 + 20 * (time.monotonic() - began)  # A busy machine takes its time, and looks go on.
    assert len(house.daemon.events) - told < 40 and house.proxy.asked - asked < most, "a hot loop"
    await house.db.execute("delete from sessions")


@shared
async def test_all_rows_at_once(house: House) -> None:
    """What makes trouble alone makes none together: a table full of it, and the good ones fire."""
    strange = itertools.product(
        [*PAST, *FAR], [LAST, -(2**31), None], ["once", "recurring", "weekly"]
    )
    for n, (date, number, type) in enumerate(strange):
        lease = {"lease": uuid.uuid4(), "lease_until": date} if n % 2 else {}
        await house.insert(
            session_id=f"s{n}",
            trigger_at=date,
            call_type=type,
            interval_seconds=number,
            attempt=number or 0,
            deferrals=number or 0,
            begun_at=date,
            planned_at=date,
            leased_at=date,
            leased_by=None,
            **lease,
        )
    await eventually(
        house.db,
        "select where not exists (select from session_recalls where status in ('pending', "
        "'running') and "
        "coalesce(lease_until, trigger_at) <= now() and interval_seconds is distinct from 1)",
        within=60,
    )
    await house.goes_on()
    assert not await rows(
        house.db, "select from session_recalls where status = 'failed' and reason is null"
    )


def test_texts_are_as_bad_as_they_look() -> None:
    """The texts of these tests hold what they are to hold, and JSON can carry them."""
    everything = "".join(TEXTS.values())
    assert {"\x1b", "\r", "\n", "\x7f", "\u202e", "\\", "'", '"'} <= set(everything)
    assert json.loads(json.dumps(everything)) == everything
    with pytest.raises(psycopg.DataError):
        psycopg.adapt.Transformer().as_literal("\0")
