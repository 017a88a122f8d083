"""`recall_tools`: plain functions that answer in words, for one session, and never raise."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg_pool import AsyncConnectionPool

from recall_worker import Recalls
from recall_worker.agent import Limits, catalog
from recall_worker.settings import SettingsError
from recall_worker.tools import Tool, recall_tools

from .conftest import Connection
from .support.postgres import free_port

NAMES = [tool.name for tool in catalog.TOOLS]


def named(tools: list[Tool]) -> dict[str, Tool]:
    return {tool.__name__: tool for tool in tools}


@pytest.fixture
async def pool(database: str) -> AsyncIterator[AsyncConnectionPool[Any]]:
    async with AsyncConnectionPool[Any](database, min_size=1, max_size=2) as opened:
        yield opened


@pytest.fixture
async def tools(pool: AsyncConnectionPool[Any], db: Connection) -> dict[str, Tool]:
    """Those of session `one`; there is a session `two` as well."""
    await db.execute("insert into sessions (id, user_id) values ('one', 'ann'), ('two', 'bo')")
    return named(recall_tools(Recalls(pool), "one"))


async def rows(db: Connection, statement: str) -> list[dict[str, Any]]:
    return await (await db.execute(statement.encode())).fetchall()


@pytest.mark.parametrize("tool", catalog.TOOLS, ids=NAMES)
def test_they_are_the_tools_of_the_catalog(tool: catalog.Tool) -> None:
    """The same names, arguments, types, and what is required; `in` is `after`."""
    function = named(recall_tools(Recalls(), "one"))[tool.name]
    schema = tool.input_schema
    parameters = inspect.signature(function).parameters
    assert list(parameters) == ["after" if name == "in" else name for name in schema["properties"]]
    assert [n for n, p in parameters.items() if p.default is p.empty] == schema["required"]
    types = {"string": "str", "integer": "int", "boolean": "bool"}
    hints = get_type_hints(function)
    assert hints.pop("return") is str
    for name, found in schema["properties"].items():
        assert types[found["type"]] in str(hints["after" if name == "in" else name])
    assert inspect.iscoroutinefunction(function)


@pytest.mark.parametrize("tool", catalog.TOOLS, ids=NAMES)
def test_each_says_what_it_does(tool: catalog.Tool) -> None:
    """A docstring in Google's style, with every argument, which speaks of no session and never of
    an argument `in`."""
    function = named(recall_tools(Recalls(), "one"))[tool.name]
    said = function.__doc__ or ""
    about, _, arguments = said.partition("\n\nArgs:\n")
    assert about and "session" not in said.lower() and "`in`" not in said
    for name in inspect.signature(function).parameters:
        assert f"    {name}: " in arguments
        assert "session" not in name


async def test_what_is_scheduled_is_a_row_and_on_record(
    tools: dict[str, Tool], db: Connection
) -> None:
    """The answer says when; the row is the session's; who did it is on record."""
    before = datetime.now(UTC)
    said = await tools["schedule_recall"]("Look at the build.", after="2h")
    assert said.startswith("Scheduled: ") and "2 hours" in said
    [row] = await rows(db, "select * from session_recalls")
    assert (row["session_id"], row["call_type"]) == ("one", "once")
    assert row["additional_context_message"] == "Look at the build."
    assert abs(row["trigger_at"] - before - timedelta(hours=2)) < timedelta(minutes=2)
    assert row["id"] in said
    [action] = await rows(db, "select * from recall_actions")
    assert (action["actor"], action["via"], action["action"]) == (
        "agent of one",
        "python",
        "schedule",
    )


async def test_all_five_act(tools: dict[str, Tool], db: Connection) -> None:
    """List, move, skip and cancel reach the session's recall without an id."""
    await tools["schedule_recall"]("Read the inbox.", every="1h")
    assert "Read the inbox." in await tools["list_recalls"]()
    moved = await tools["reschedule_recall"](at="2027-01-31T09:00", time_zone="Europe/Berlin")
    assert "2027-01-31 09:00" in moved and "Europe/Berlin" in moved
    [row] = await rows(db, "select trigger_at from session_recalls")
    assert row["trigger_at"] == datetime(2027, 1, 31, 8, tzinfo=UTC)
    assert not (await tools["skip_recall"]()).startswith("Error")
    assert not (await tools["cancel_recall"]()).startswith("Error")
    assert "Read the inbox." not in await tools["list_recalls"]()
    assert "Read the inbox." in await tools["list_recalls"](ended=True)
    acted = await rows(db, "select action, actor, via from recall_actions order by at, id")
    assert [row["action"] for row in acted] == ["schedule", "reschedule", "skip", "cancel"]
    assert {(row["actor"], row["via"]) for row in acted} == {("agent of one", "python")}


async def test_what_is_refused_is_said_and_nothing_is_done(
    tools: dict[str, Tool], db: Connection
) -> None:
    """A refusal is an answer, with what to do; it calls the argument `after`, not `in`."""
    await tools["schedule_recall"]("first", after="1h")
    for answer in (
        await tools["schedule_recall"]("second", after="1h"),
        await tools["schedule_recall"]("third", after="soon"),
        await tools["schedule_recall"]("fourth", after="1h", at="2027-01-31T09:00Z"),
        await tools["reschedule_recall"](),
        await tools["cancel_recall"](id="nobody's"),
        await tools["skip_recall"](),
    ):
        assert answer.startswith("Error: ") and "\nTry: " in answer, answer
        assert "`in`" not in answer
    assert "after" in await tools["schedule_recall"]("third", after="soon")
    found = await rows(db, "select additional_context_message as message from session_recalls")
    assert found == [{"message": "first"}]


async def test_another_session_is_out_of_reach(
    tools: dict[str, Tool], pool: AsyncConnectionPool[Any], db: Connection
) -> None:
    """An id of another session is answered as one that does not exist, and its recall stays."""
    theirs = await Recalls(pool).schedule("two", "secret", after=timedelta(hours=1))
    none = await tools["cancel_recall"](id="5f2c1a3e-7a55-4c0b-9a51-0f6d3c1e8b42")
    for answer in (
        await tools["cancel_recall"](id=theirs.id),
        await tools["reschedule_recall"](id=theirs.id, after="5m"),
        await tools["skip_recall"](id=theirs.id),
    ):
        assert answer.startswith("Error: ") and "secret" not in answer
        assert (
            answer.replace(theirs.id, "ID").split(".")[0]
            == none.replace("5f2c1a3e-7a55-4c0b-9a51-0f6d3c1e8b42", "ID").split(".")[0]
        )
    assert "secret" not in await tools["list_recalls"](ended=True)
    [row] = await rows(db, "select status, trigger_at from session_recalls")
    assert (row["status"], row["trigger_at"]) == ("pending", theirs.trigger_at)


async def test_limits_and_queue_are_the_makers(
    pool: AsyncConnectionPool[Any], db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given, or by the environment; a wrong variable is an error of the one who makes them."""
    await db.execute("insert into sessions (id, user_id) values ('one', 'ann')")
    narrow = Limits(interval=3600, horizon=7200, message=10, schedules=())
    tools = named(recall_tools(Recalls(pool), "one", limits=narrow, queue="mail"))
    for answer in (
        await tools["schedule_recall"]("x", every="5m"),
        await tools["schedule_recall"]("x", after="3h"),
        await tools["schedule_recall"]("x" * 11, after="1h"),
    ):
        assert answer.startswith("Error: ") and "\nTry: " in answer
    assert (await tools["schedule_recall"]("x", after="1h")).startswith("Scheduled")
    assert [row["queue"] for row in await rows(db, "select queue from session_recalls")] == ["mail"]
    monkeypatch.setenv("RECALL_AGENT_LIMIT", "many")
    with pytest.raises(SettingsError, match="RECALL_AGENT_LIMIT"):
        recall_tools(Recalls(pool), "one")
    with pytest.raises(ValueError, match="session"):
        recall_tools(Recalls(pool), "..", limits=narrow)


async def test_postgresql_is_gone() -> None:
    """It is said, without an address or a name."""
    nowhere = f"postgresql://ann:s3cret@127.0.0.1:{free_port()}/gone"
    async with AsyncConnectionPool[Any](nowhere, min_size=0, max_size=1, timeout=1) as pool:
        said = await named(recall_tools(Recalls(pool), "one"))["list_recalls"]()
    assert said.startswith("Error: ") and "reached" in said
    assert "s3cret" not in said and "127.0.0.1" not in said


words = st.one_of(
    st.none(),
    st.text(max_size=20),
    st.sampled_from(
        ["1h", "-1h", "1e9d", "2027-01-31T09:00", "infinity", "* * * * *", "\0", "UTC"]
    ),
)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    given=st.fixed_dictionaries(
        {"message": st.text(max_size=20)},
        optional={
            **dict.fromkeys(("after", "at", "every", "grid", "cron", "time_zone", "until"), words),
            "times": st.one_of(st.none(), st.integers()),
        },
    ),
    id=words,
)
async def test_no_argument_makes_them_raise(
    tools: dict[str, Tool], given: dict[str, Any], id: str | None
) -> None:
    """Whatever a model writes, the answer is a text that says what was done or what to try."""
    said = await tools["schedule_recall"](**given)
    assert said.startswith("Scheduled: ") or (said.startswith("Error: ") and "\nTry: " in said)
    said = await tools["cancel_recall"](id=id)
    assert "\nTry: " in said or not said.startswith("Error: ")
