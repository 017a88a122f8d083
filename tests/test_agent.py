"""What an agent may do with its session's recalls: what a model writes, what it is answered, and
that it reaches nothing else. On a real database; the transports are in test_mcp.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import hypothesis
import jsonschema
import psycopg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg_pool import AsyncConnectionPool

from recall_worker import Recalls, settings
from recall_worker.agent import AgentTools, Answer, Limits, ToolRefused, arguments, catalog, words
from recall_worker.agent import tools as agent_tools
from recall_worker.agent.arguments import ArgumentError
from recall_worker.agent.limits import LimitExceeded
from recall_worker.cadence import zone
from recall_worker.settings import Settings, SettingsError

from .conftest import Connection
from .process.test_corridor import soon
from .process.test_lease import eventually, rows
from .support.application import Application
from .support.daemon import Daemons
from .support.endpoint import Endpoint, Gate, Raw, Request, reply

NOW = datetime(2026, 11, 30, 18, 57, 12, tzinfo=UTC)
BERLIN = "Europe/Berlin"
LIMITS = Limits.of(Settings())


# --- what a model is told -------------------------------------------------------------------------


@pytest.mark.parametrize("tool", catalog.TOOLS, ids=lambda tool: str(tool.name))
def test_schemas(tool: catalog.Tool) -> None:
    """Schemas are sound, refuse what is not in them, and name no session: nothing that an agent
    says could be one."""
    for schema in (tool.input_schema, tool.output_schema):
        jsonschema.Draft202012Validator.check_schema(schema)
    assert "session" not in json.dumps(tool.input_schema).lower()
    assert "session" not in tool.description.lower()
    assert tool.input_schema["additionalProperties"] is False
    for name, one in tool.input_schema["properties"].items():
        assert one["description"].endswith("."), name


def test_examples_are_taken() -> None:
    """Each example of an argument is one that is read, and within the limits."""
    properties = catalog.TOOLS[0].input_schema["properties"]
    for name in ("in", "at", "every", "grid", "cron"):
        for text in properties[name]["examples"]:
            made = arguments.schedule(NOW, LIMITS, "in", {name: text, "time_zone": BERLIN})
            assert made.zone.key == BERLIN
    for text in properties["until"]["examples"]:
        made = arguments.schedule(
            NOW, LIMITS, "in", {"every": "1h", "until": text, "time_zone": BERLIN}
        )
        assert made.plan.until is not None


# --- what a model writes --------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "nothing says when", 'in: "10m"'),
    ({"in": 10}, "a number without a unit", '"10m" for minutes'),
    ({"in": "10"}, "has no unit", "10m"),
    ({"in": "5M"}, "minutes or months", "5m"),
    ({"in": "0s"}, "no time at all", '"10m"'),
    ({"in": "-5m"}, "is not a duration", "90s"),
    ({"in": "10m", "at": "2027-01-01T09:00Z"}, "two times", "one of them"),
    ({"at": "2026-12-01T09:00"}, "in which time zone", 'time_zone: "Europe/Berlin"'),
    ({"at": "2026-12-01"}, "in which time zone", "2026-12-01T09:00Z"),
    ({"at": "2026-11-30T18:00Z"}, "is past: now it is 2026-11-30 18:57 UTC", "a later time"),
    (
        {"at": "2026-11-30T19:00", "time_zone": BERLIN},
        f"is past: now it is 2026-11-30 19:57 {BERLIN}",
        "a later time",
    ),
    ({"at": "tomorrow at nine"}, "is not a time", "2027-01-31T09:00"),
    (
        {"at": "2026-12-01T09:00 Europe/Berlin"},
        "names a zone",
        'at: "2026-12-01T09:00", time_zone: "Europe/Berlin"',
    ),
    ({"at": 1_800_000_000}, "not a text", 'at: "'),
    ({"at": "2028-01-01T00:00Z"}, "further away than 366d", "before 2027-12-01"),
    ({"in": "400d"}, "further away than 366d", "before 2027-12-01"),
    ({"every": "1h", "cron": "0 9 * * *"}, "every and cron are 2 plans", "one of them"),
    ({"every": "1h", "grid": "1h", "cron": "0 9 * * *"}, "3 plans", "one of them"),
    ({"every": "10s"}, "more often than every 1m", "1m or longer"),
    ({"grid": "59s"}, "more often than every 1m", "1m or longer"),
    ({"every": "1.5m", "times": 0}, "times is 0", "times: 5"),
    ({"every": "1h", "times": True}, "times is True", "times: 5"),
    ({"every": "1h", "times": "many"}, "times is 'many'", "times: 5"),
    ({"in": "1h", "times": 3}, "nothing says how", 'every: "1h"'),
    ({"at": "2026-12-01T09:00Z", "until": "2026-12-02T09:00Z"}, "nothing says how", "without"),
    ({"every": "1h", "until": "2026-11-30T19:00Z"}, "after its end", "a later until"),
    ({"every": "1h", "until": "2020-01-01T00:00Z"}, "is past", "a later time"),
    ({"cron": "0 9 * *"}, "five fields", "minute hour day month weekday"),
    ({"cron": "0 9 31 2 *"}, "never comes", 'cron: "'),
    ({"cron": "@daily"}, "@daily", 'cron: "'),
    ({"cron": "0 9 * * *", "time_zone": "Berlin"}, "did you mean Europe/Berlin", "IANA"),
    ({"cron": "0 9 * * *", "time_zone": "UTC+1"}, "no time zone", "IANA"),
    ({"cron": "9" * 1001}, "1001 characters", 'cron: "'),
    ({"in": "1\0m"}, "can't be stored", "without it"),
    ({"in": {"minutes": 5}}, "not a text", 'in: "10m"'),
]


@pytest.mark.parametrize(
    ("values", "why", "instead"), REFUSED, ids=[json.dumps(v)[:60] for v, _, _ in REFUSED]
)
def test_what_can_be_misread_is_refused(values: dict[str, Any], why: str, instead: str) -> None:
    """A refusal says what was wrong with it, and what to write instead."""
    error: ArgumentError | LimitExceeded
    try:
        arguments.schedule(NOW, LIMITS, "in", values)
    except (ArgumentError, LimitExceeded) as refused:
        error = refused
    else:
        pytest.fail("it was taken")
    assert why in str(error)
    todo = error.todo if isinstance(error, ArgumentError) else (error.instead,)
    assert instead in " ".join(todo)


TAKEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"in": "10m"}, {"after": timedelta(minutes=10)}),
    ({"in": " 1h30 ", "at": "", "every": None, "times": None}, {"after": timedelta(hours=1.5)}),
    (
        {"at": "2026-12-01T09:00", "time_zone": "europe/berlin"},
        {"at": datetime(2026, 12, 1, 8, tzinfo=UTC)},
    ),
    ({"at": "2026-12-01T09:00+05:30"}, {"at": datetime(2026, 12, 1, 3, 30, tzinfo=UTC)}),
    ({"every": "1h", "times": 3.0}, {"every": timedelta(hours=1), "times": 3}),
    (
        {"cron": "0 9 * * mon-fri", "time_zone": BERLIN, "until": "2027-06-30"},
        {
            "cron": "0 9 * * mon-fri",
            "time_zone": BERLIN,
            "until": datetime(2027, 6, 30, 21, 59, 59, 999_999, tzinfo=UTC),
        },
    ),
    # Within the minute that is shown, a time is typed and not past.
    ({"at": "2026-11-30T18:57Z"}, {"at": datetime(2026, 11, 30, 18, 57, tzinfo=UTC)}),
]


@pytest.mark.parametrize(("values", "expected"), TAKEN, ids=[str(v)[:60] for v, _ in TAKEN])
def test_what_a_model_writes_is_read(values: dict[str, Any], expected: dict[str, Any]) -> None:
    """null and an empty text are an argument that is not given."""
    made = arguments.schedule(NOW, LIMITS, "in", values)
    assert made.plan == arguments.Plan(**expected)


def test_a_time_that_the_clocks_skip_is_said() -> None:
    """Its author may have meant another instant."""
    made = arguments.schedule(NOW, LIMITS, "in", {"at": "2027-03-28T02:30", "time_zone": BERLIN})
    assert "skip 2027-03-28 02:30" in made.notes[0]


ARGUMENTS = ("in", "at", "every", "grid", "cron", "time_zone", "until", "times")
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
WRITTEN = st.one_of(
    JSON,
    st.sampled_from(["10m", "1h", "2027-01-31T09:00Z", "0 9 * * *", "* * * * *", BERLIN, "5"]),
    st.datetimes().map(str),
)


@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(ARGUMENTS, WRITTEN),
    )
)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.too_slow], deadline=None)
@example({"in": "99999999999999w"})
@example({"at": "9999-12-31T23:59Z"})
@example({"cron": "* * * * *", "at": "9998-01-01T00:00Z"})
@example({"every": "68y"})
def test_whatever_a_model_writes(values: dict[str, Any]) -> None:
    """It is a plan within the limits, or a refusal that says what to do; nothing else is raised."""
    try:
        made = arguments.schedule(NOW, LIMITS, "in", values)
    except ArgumentError as error:
        assert str(error) and error.todo
    except LimitExceeded as error:
        assert str(error) and error.instead
    else:
        assert made.plan.at is None or made.plan.at > NOW - timedelta(minutes=1)
        for span in (made.plan.every, made.plan.grid):
            assert span is None or span.total_seconds() >= LIMITS.interval


# --- limits ---------------------------------------------------------------------------------------


def test_limits_come_from_settings() -> None:
    """Each has a variable, and a default; a wrong one is named."""
    environ = {
        "RECALL_AGENT_INTERVAL": "5m",
        "RECALL_AGENT_HORIZON": "30d",
        "RECALL_AGENT_MESSAGE": "1KiB",
        "RECALL_AGENT_LIMIT": "3/h",
        "RECALL_SESSION_LIMIT": "20/h,100/d",
        "RECALL_LEASE": "nonsense of the worker's",
    }
    found = Limits.read(environ)
    assert found == Limits(
        interval=300.0,
        horizon=30 * 86_400.0,
        message=1024,
        schedules=((3600.0, 3),),
        runs=((3600.0, 20), (86_400.0, 100)),
    )
    with pytest.raises(SettingsError, match="RECALL_AGENT_LIMIT is '3'"):
        Limits.read({"RECALL_AGENT_LIMIT": "3"})


def test_the_shorter_of_two_limits_of_messages_counts() -> None:
    """What the worker would not send is not scheduled."""
    chosen = settings.read({"RECALL_MESSAGE_LIMIT": "1KiB"})
    assert Limits.of(chosen).message == 1024


@pytest.mark.parametrize(
    ("values", "least"),
    [
        ({"every": "2m"}, "3m"),
        ({"grid": "179s"}, "3m"),
        ({"cron": "*/2 * * * *"}, "3m"),
        ({"cron": "0,1 9 * * *"}, "3m"),
    ],
)
def test_a_rule_that_the_workers_would_hold_back(values: dict[str, Any], least: str) -> None:
    """RECALL_SESSION_LIMIT: what could only be deferred is refused at once."""
    limits = Limits.read({"RECALL_SESSION_LIMIT": "20/h"})
    with pytest.raises(LimitExceeded, match="more than 20 times in 1h") as refused:
        arguments.schedule(NOW, limits, "in", values)
    assert least in refused.value.instead


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "now"),
        (-5, "now"),
        (1, "in 1 second"),
        (90, "in 1 minute 30 seconds"),
        (599, "in 9 minutes 59 seconds"),
        (600, "in 10 minutes"),
        (3599, "in 1 hour"),
        (50_580, "in 14 hours 3 minutes"),
        (90_000, "in 1 day 1 hour"),
        (2 * 86_400 + 60, "in 2 days 1 minute"),
    ],
)
def test_distances(seconds: int, said: str) -> None:
    assert words.distance(NOW + timedelta(seconds=seconds), NOW) == said


def test_times_are_said_in_one_zone() -> None:
    """As in the contract: the time, its zone, and how long from now."""
    due = datetime(2026, 12, 1, 8, tzinfo=UTC)
    now = datetime(2026, 11, 30, 17, 57, tzinfo=UTC)
    assert words.due(due, zone(BERLIN), now) == (
        "due 2026-12-01 09:00 Europe/Berlin, in 14 hours 3 minutes"
    )
    assert words.now_is(now, zone(BERLIN)) == "Now it is 2026-11-30 18:57 Europe/Berlin."
    assert words.said(due, zone(None)) == "2026-12-01 08:00 UTC"


# --- on the table ---------------------------------------------------------------------------------


@pytest.fixture
async def pool(database: str, app: Application) -> AsyncIterator[AsyncConnectionPool[Any]]:
    """The sessions a and b are ann's, z is zoe's."""
    for session, user in (("a", "ann"), ("b", "ann"), ("z", "zoe")):
        await app.create_session(session, user)
    async with AsyncConnectionPool(database, min_size=1, max_size=4, open=False) as opened:
        yield opened


@pytest.fixture
def tools(pool: AsyncConnectionPool[Any]) -> AgentTools:
    return AgentTools(Recalls(pool, via="mcp"), "a", limits=LIMITS)


async def refusal(tools: AgentTools, name: str, **given: Any) -> str:
    with pytest.raises(ToolRefused) as refused:
        await tools.call(name, given)
    assert "\nTry: " in str(refused.value)
    return str(refused.value)


def check(name: str, answer: Answer) -> Answer:
    """An answer is as its schema says, and says what time it is."""
    tool = next(tool for tool in catalog.TOOLS if tool.name == name)
    jsonschema.validate(answer.data, tool.output_schema)
    assert "Now it is " in answer.text and answer.data["now"] in answer.text
    return answer


async def call(tools: AgentTools, name: str, **given: Any) -> Answer:
    return check(name, await tools.call(name, given))


async def test_a_recall_from_its_promise_to_its_end(tools: AgentTools, db: Connection) -> None:
    """Each tool does what it says, in one zone, and is on record."""
    made = await call(
        tools, "schedule_recall", message="Look.", cron="0 9 * * mon-fri", time_zone=BERLIN, times=5
    )
    id = made.data["recall"]["id"]
    assert "Scheduled: due " in made.text and f"09:00 {BERLIN}, in " in made.text
    assert "by cron '0 9 * * mon-fri' in Europe/Berlin" in made.text
    [row] = await rows(db, "select * from session_recalls")
    assert (row["id"], row["session_id"], row["times"]) == (id, "a", 5)
    assert row["internal_comment"] is None

    listed = await call(tools, "list_recalls")
    [shown] = listed.data["recalls"]
    assert shown["due"].endswith(f"09:00 {BERLIN}") and shown["ends"] == "5 times in all, 5 left"
    assert f"id {id}" in listed.text

    moved = await call(tools, "reschedule_recall", **{"in": "2h"})
    assert "Rescheduled: due " in moved.text and "in 2 hours." in moved.text
    before = moved.data["recall"]["due"]
    skipped = await call(tools, "skip_recall", id=id)
    assert f"Skipped: {before}." in skipped.text
    assert skipped.data["recall"]["due"] != before
    ended = await call(tools, "cancel_recall")
    assert ended.data["recall"]["status"] == "cancelled"
    assert (await call(tools, "list_recalls")).data["recalls"] == []
    [over] = (await call(tools, "list_recalls", ended=True)).data["recalls"]
    assert (over["id"], over["status"], over["due"]) == (id, "cancelled", None)

    done = await rows(db, "select actor, via, action, recall_id from recall_actions order by id")
    assert [row["action"] for row in done] == ["schedule", "reschedule", "skip", "cancel"]
    assert {(r["actor"], r["via"], r["recall_id"]) for r in done} == {("agent of a", "mcp", id)}


async def test_a_second_recall_says_what_to_do(tools: AgentTools, db: Connection) -> None:
    """One pending recall a session; nothing is written, and nothing of the first changed."""
    await call(tools, "schedule_recall", message="one", **{"in": "1h"})
    said = await refusal(tools, "schedule_recall", message="two", every="1h")
    assert "one pending recall a session" in said and "in 1 hour" in said
    assert "reschedule_recall or cancel_recall, or schedule_recall from inside its run" in said
    assert [
        r["additional_context_message"] for r in await rows(db, "select * from session_recalls")
    ] == ["one"]
    assert len(await rows(db, "select from recall_actions")) == 1


async def test_nothing_to_act_on(tools: AgentTools) -> None:
    for name, values in (
        ("cancel_recall", {}),
        ("skip_recall", {}),
        ("reschedule_recall", {"in": "1h"}),
    ):
        assert "no pending recall" in await refusal(tools, name, **values)
    assert (await call(tools, "list_recalls", time_zone=BERLIN)).text.startswith("No recalls. Now")


async def test_a_one_shot_is_not_skipped(tools: AgentTools) -> None:
    await call(tools, "schedule_recall", message="one", **{"in": "1h"})
    assert "comes once" in await refusal(tools, "skip_recall")


async def test_the_end_is_kept(tools: AgentTools) -> None:
    """No time after the recall's own end; no second cancel."""
    until = f"{datetime.now(UTC) + timedelta(days=2):%Y-%m-%dT%H:%MZ}"
    made = await call(tools, "schedule_recall", message="m", every="1h", until=until)
    assert "before that time" in await refusal(tools, "reschedule_recall", **{"in": "3d"})
    await call(tools, "cancel_recall")
    said = await refusal(tools, "cancel_recall", id=made.data["recall"]["id"])
    assert "is cancelled already" in said


async def test_other_sessions_do_not_exist(
    tools: AgentTools, pool: AsyncConnectionPool[Any], app: Application, db: Connection
) -> None:
    """An id of another session's, also of the same person's, is answered word for word as one that
    there never was, and nothing of it is changed or seen."""
    others = [await app.schedule(s, "recurring", soon(3600), f"of {s}", 3600) for s in ("b", "z")]
    before = await rows(db, "select * from session_recalls order by id")
    for name, more in (
        ("cancel_recall", {}),
        ("skip_recall", {}),
        ("reschedule_recall", {"in": "1h"}),
    ):
        never = (await refusal(tools, name, id="x" * 36, **more)).replace("x" * 36, "ID")
        for id in others:
            assert (await refusal(tools, name, id=id, **more)).replace(id, "ID") == never
    assert await rows(db, "select * from session_recalls order by id") == before
    assert (await call(tools, "list_recalls", ended=True)).data["recalls"] == []
    assert await rows(db, "select from recall_actions") == []


@pytest.mark.parametrize("name", [tool.name for tool in catalog.TOOLS])
async def test_no_argument_names_a_session(name: str, tools: AgentTools, db: Connection) -> None:
    """Further arguments are refused, and what they say is not used."""
    for strange in ("session_id", "session", "sessionId", "user_id", "_meta", "queue", "comment"):
        said = await refusal(tools, name, **{"message": "m", "in": "1h"} | {strange: "z"})
        assert "has no argument" in said and f"{strange!r}" in said
    assert await rows(db, "select from session_recalls") == []


async def test_what_an_agent_does_not_see(
    tools: AgentTools, app: Application, db: Connection
) -> None:
    """Neither comments nor reasons, workers, leases, sessions."""
    await app.schedule("a", "recurring", soon(3600), "the message", 3600)
    await db.execute(
        "update session_recalls set internal_comment = 'hidden-1', reason = 'hidden-2', "
        "lease = gen_random_uuid(), lease_until = now() + interval '1 h', leased_by = 'hidden-3'"
    )
    answer = await call(tools, "list_recalls")
    assert "the message" in answer.text
    assert "hidden" not in answer.text + json.dumps(answer.data)
    assert '"a"' not in json.dumps(answer.data)


async def test_two_that_could_be_meant(tools: AgentTools, db: Connection) -> None:
    """With more than one, the agent says which; what is in its run is not meant where one waits."""
    await db.execute(
        "insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds, "
        "additional_context_message, status, created_at, updated_at) values "
        "('r1', 'a', 'recurring', now() + interval '1 h', 60, 'm', 'pending', now(), now())"
    )
    await db.execute(
        "insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds, "
        "additional_context_message, status, created_at, updated_at) values "
        "('r2', 'a', 'recurring', now() + interval '2 h', 60, 'm', 'running', now(), now())"
    )
    said = await refusal(tools, "cancel_recall")
    assert "2 recalls" in said and "id r1" in said and "id r2" in said
    await db.execute(
        "update session_recalls set lease = gen_random_uuid(), lease_until = now() "
        "+ interval '1 h', leased_at = now() where id = 'r2'"
    )
    assert (await call(tools, "cancel_recall")).data["recall"]["id"] == "r1"


async def test_a_loop_of_one_shots_is_stopped(
    pool: AsyncConnectionPool[Any], db: Connection
) -> None:
    """RECALL_AGENT_LIMIT: what a session has scheduled in the last hour counts, whatever became of
    it; other sessions' do not."""
    limits = Limits.read({"RECALL_AGENT_LIMIT": "3/h"})
    tools = AgentTools(Recalls(pool), "a", limits=limits)
    other = AgentTools(Recalls(pool), "b", limits=limits)
    for _ in range(3):
        await call(tools, "schedule_recall", message="m", **{"in": "1m"})
        await call(tools, "cancel_recall")
    said = await refusal(tools, "schedule_recall", message="m", **{"in": "1m"})
    assert "3 recalls were scheduled in this conversation in the last 1h, and 3 is the most" in said
    await call(other, "schedule_recall", message="m", **{"in": "1m"})
    await db.execute("update session_recalls set created_at = now() - interval '61 min'")
    await call(tools, "schedule_recall", message="m", **{"in": "1m"})


async def test_a_loop_of_one_recall_is_stopped(tools: AgentTools) -> None:
    """What recurs is not moved nearer than the shortest interval, be it from inside its run."""
    await call(tools, "schedule_recall", message="m", every="1h")
    said = await refusal(tools, "reschedule_recall", **{"in": "1s"})
    assert "in is sooner than 1m from now, the shortest interval here" in said
    await call(tools, "reschedule_recall", **{"in": "1m"})


async def test_messages(tools: AgentTools, db: Connection) -> None:
    """What is too long, empty or can't be stored is refused; everything else comes back as it
    was."""
    for message, why in (
        (None, "message is missing"),
        ("  ", "message is empty"),
        (7, "message is 7"),
        ("x" * 16_385, "16385 octets, and 16384 is the most"),
        ("a\0b", "can't be stored"),
        ("\ud800", "can't be stored"),
    ):
        assert why in await refusal(tools, "schedule_recall", message=message, **{"in": "1h"})
    text = " \U0001f389 'quotes' -- \\ \x1b[31m\n%s {x} "
    await call(tools, "schedule_recall", message=text, **{"in": "1h"})
    [row] = await rows(db, "select * from session_recalls")
    assert row["additional_context_message"] == text


async def test_many_at_once(tools: AgentTools, db: Connection) -> None:
    """Of calls at once for the one place, one is done, and the others say why not."""
    answers = await asyncio.gather(
        *(tools.call("schedule_recall", {"message": f"m{n}", "in": "1h"}) for n in range(12)),
        return_exceptions=True,
    )
    assert sum(isinstance(answer, Answer) for answer in answers) == 1
    refused = [str(answer) for answer in answers if not isinstance(answer, Answer)]
    assert all("one pending recall a session" in text for text in refused)
    assert len(await rows(db, "select from session_recalls")) == 1


async def test_a_session_that_is_gone(pool: AsyncConnectionPool[Any], app: Application) -> None:
    tools = AgentTools(Recalls(pool), "a", limits=LIMITS)
    await app.delete_session("a")
    said = await refusal(tools, "schedule_recall", message="m", **{"in": "1h"})
    assert "does not exist any more" in said


async def test_postgresql_that_is_not_there() -> None:
    """Nothing was done, and the model is told when to try again."""
    pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
        "host=127.0.0.1 port=1 dbname=x", min_size=0, max_size=1, timeout=0.5, open=False
    )
    async with pool:
        tools = AgentTools(Recalls(pool), "a", limits=LIMITS)
        with pytest.raises(ToolRefused, match="can't be reached just now: nothing was done") as e:
            await tools.call("cancel_recall", {})
        assert e.value.unreachable and e.value.__cause__ is not None


async def test_a_row_that_somebody_holds(
    tools: AgentTools, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call ends in time, and says that nobody knows."""
    await call(tools, "schedule_recall", message="m", **{"in": "1h"})
    monkeypatch.setattr(agent_tools, "DEADLINE", 1.0)
    async with await psycopg.AsyncConnection.connect(database) as other:
        await other.execute("select from session_recalls for update")
        with pytest.raises(ToolRefused, match="not known whether it was done") as refused:
            await tools.call("cancel_recall", {})
        assert refused.value.unreachable
        assert (await tools.call("list_recalls", {})).data["recalls"]
        await other.rollback()
    monkeypatch.setattr(agent_tools, "DEADLINE", 20.0)
    await call(tools, "cancel_recall")


@pytest.mark.parametrize("session", ["", ".", ".."])
def test_sessions_that_there_can_not_be(session: str) -> None:
    with pytest.raises(ValueError, match="can't be a session's id"):
        AgentTools(Recalls(), session, limits=LIMITS)


# --- from inside a run ----------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_chain_from_inside_its_runs(
    tools: AgentTools, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """An agent that is called back schedules its next recall there, which works, and acts on that
    one and not on its own run."""
    said: list[str] = []

    async def agent(request: Request) -> Raw:
        if len(endpoint.of("a")) == 1:
            said.append(await refusal(tools, "cancel_recall"))
            answer = await call(tools, "schedule_recall", message="next", **{"in": "1h"})
            said.append(answer.text)
            said.append((await call(tools, "reschedule_recall", **{"in": "1s"})).text)
        return reply()

    endpoint.script("a", agent)
    await call(tools, "schedule_recall", message="first", **{"in": "1s"})
    daemon = await daemons.start()
    await daemon.hears("recall.settled", session="a", times=2)
    assert "is in its run now and does not come again" in said[0]
    assert "Scheduled: due" in said[1] and "Rescheduled: due" in said[2]
    await eventually(db, "select from session_recalls where status = 'fired' having count(*) = 2")


@pytest.mark.slow
async def test_an_agent_ends_its_own_recurring_recall(
    tools: AgentTools, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The commonest end of a watch: it has seen what it waited for, says so, and is not called
    again. The run in which it says so is not broken off."""
    gate = Gate()
    said: list[str] = []

    async def agent(request: Request) -> Gate:
        said.append((await call(tools, "cancel_recall")).text)
        said.append((await call(tools, "cancel_recall")).text)
        return gate

    endpoint.script("a", agent)
    await call(tools, "schedule_recall", message="watch", every="1m", **{"in": "1s"})
    daemon = await daemons.start(lease=1)
    await eventually(db, "select from recall_actions where action = 'edit' and via = 'mcp'")
    # Renewals go by: a call that was to be aborted would have been by now.
    await eventually(
        db,
        "select from session_recalls where lease_until > leased_at + interval '2 seconds'",
    )
    gate.open()
    await daemon.hears("recall.settled", session="a", outcome="answered", status="fired")
    assert "the run that is going on ends as usual, and it does not come again" in said[0]
    # Once more: nothing is changed, nothing is on record, and it says so.
    assert said[1].startswith("It is in its last run: ")
    edits = "select count(*) as n from recall_actions where action = 'edit' and via = 'mcp'"
    assert (await eventually(db, edits))["n"] == 1
    assert (await call(tools, "list_recalls")).data["recalls"] == []


@pytest.mark.slow
async def test_during_a_run_the_next_occurrence_is_meant(
    tools: AgentTools, db: Connection, endpoint: Endpoint, daemons: Daemons
) -> None:
    """Reschedule and skip act on what comes after the run."""
    said: list[str] = []

    async def agent(request: Request) -> Raw:
        said.append((await call(tools, "list_recalls")).text)
        said.append((await call(tools, "skip_recall")).text)
        said.append((await call(tools, "reschedule_recall", **{"in": "3h"})).text)
        return reply()

    endpoint.script("a", agent)
    await call(tools, "schedule_recall", message="watch", every="1h", **{"in": "1s"})
    daemon = await daemons.start()
    await daemon.hears("recall.settled", session="a")
    assert "in its run now, and then due 1h after the end of this run" in said[0]
    assert "Skipped: the next occurrence." in said[1]
    assert "in its run now, and then due" in said[2] and "in 3 hours" in said[2]
    [row] = await rows(
        db, "select trigger_at - now() as wait from session_recalls where status = 'pending'"
    )
    assert timedelta(hours=2, minutes=50) < row["wait"] <= timedelta(hours=3)


@pytest.mark.full
@pytest.mark.parametrize("rule", [{"every": "1h"}, {"grid": "1h"}, {"cron": "* * * * *"}], ids=str)
@pytest.mark.parametrize("before", ["nothing", "reschedule", "skip"])
async def test_an_end_from_inside_the_run_wins(
    before: str,
    rule: dict[str, str],
    tools: AgentTools,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """Also where the agent had moved, or left out, what was to come; on every cadence."""

    async def agent(request: Request) -> Raw:
        if before == "reschedule":
            await call(tools, "reschedule_recall", **{"in": "2h"})
        if before == "skip":
            await call(tools, "skip_recall")
        said = await call(tools, "cancel_recall")
        assert "it does not come again" in said.text
        return reply()

    endpoint.script("a", agent)
    first = {} if "cron" in rule else {"in": "1s"}
    await call(tools, "schedule_recall", message="watch", **rule, **first)
    await db.execute("update session_recalls set trigger_at = now(), planned_at = now()")
    daemon = await daemons.start()
    [settled] = await daemon.hears("recall.settled", session="a", outcome="answered")
    assert settled["status"] == "fired", settled
    assert (await call(tools, "list_recalls")).data["recalls"] == []


@pytest.mark.full
@pytest.mark.parametrize("rule", [{"every": "1m"}, {"grid": "1m"}], ids=str)
async def test_an_end_from_inside_an_extra_run(
    rule: dict[str, str],
    tools: AgentTools,
    pool: AsyncConnectionPool[Any],
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
) -> None:
    """An operator fires a recall besides its schedule, and the agent ends it there: what was
    planned does not come."""

    async def agent(request: Request) -> Raw:
        await call(tools, "cancel_recall")
        return reply()

    endpoint.script("a", agent)
    made = await call(tools, "schedule_recall", message="watch", **rule, **{"in": "10s"})
    daemon = await daemons.start()
    assert await Recalls(pool).fire(made.data["recall"]["id"])
    await daemon.hears("recall.settled", session="a", outcome="answered")
    await eventually(db, "select from session_recalls where status = 'fired'")
    assert len(endpoint.of("a")) == 1


# --- found by an adversary ------------------------------------------------------------------------


async def test_a_skip_keeps_to_the_horizon(tools: AgentTools) -> None:
    """Skipping leads no further away than scheduling does, and what is refused is not done."""
    made = await call(tools, "schedule_recall", message="look", every="200d")
    with pytest.raises(ToolRefused) as said:
        await tools.call("skip_recall", {})
    assert "further away than" in str(said.value)
    left = await call(tools, "list_recalls")
    assert left.data["recalls"][0]["due_at"] == made.data["recall"]["due_at"]


async def test_what_is_left_counts_skips(tools: AgentTools) -> None:
    """A skipped occurrence is one of `times`."""
    await call(tools, "schedule_recall", message="look", every="1h", times=3)
    await call(tools, "skip_recall")
    assert "3 times in all, 2 left" in (await call(tools, "list_recalls")).text
