"""The console's live pages: what they cost PostgreSQL, counted there, and how soon they show what
has changed; with notifications and without."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import AsyncIterator

import pytest
from aiohttp import ClientResponse
from hypothesis import given
from hypothesis import strategies as st

from recall_worker.console import live
from recall_worker.console.database import patience
from recall_worker.console.live import EVERY, LEAST, Pace, Reader
from recall_worker.console.questions import Question

from .conftest import Connection
from .support.application import Application
from .support.pgbouncer import PgBouncer
from .support.recorder import Recorder
from .test_console import Site, news, put, said, served, site, until

__all__ = ["site"]
PATHS = (
    *("part=now", "part=queues", "part=workers", "part=agenda", "part=agenda&span=week"),
    *("part=failures", "part=recalls", "part=recalls&state=live", "part=recall&id=r1"),
    "part=recalls&state=paused",
)


# --- when it looks --------------------------------------------------------------------------------


def looks(pace: Pace, until: float, heard: list[float], took: float = 0.0) -> list[float]:
    """The instants of looks where notifications come at these instants."""
    now, found = 0.0, list[float]()
    while now < until:
        since = found[-1] if found else -1.0
        coming = [at for at in heard if at > since]
        waits = pace.wait(now, heard=bool([at for at in coming if at <= now]), every=EVERY)
        if waits > 0:
            following = min([at for at in coming if at > now], default=until)
            now = min(now + waits, following)
            continue
        pace.looked(now, took)
        found.append(now)
    return found


@given(st.lists(st.floats(0, 60), max_size=400), st.floats(0, 2))
def test_a_look_a_second_whatever_is_notified(heard: list[float], took: float) -> None:
    """On average, over every span: the look that was kept is the only one more. And none is later
    than the regular one."""
    found = looks(Pace(), 60.0, sorted(heard), took)
    least = max(LEAST, min(took / live.SHARE, live.RARELY))
    for first, at in enumerate(found):
        for number, other in enumerate(found[first:], 1):
            assert number <= (other - at) / least + 2 + 1e-6
    every = max(EVERY, least)
    assert all(b - a <= every + 1e-6 for a, b in itertools.pairwise(found))


def test_a_storm_and_the_quiet_after_it() -> None:
    storm = [5 + n / 100 for n in range(2000)]
    found = looks(Pace(), 60.0, [*storm, 40.3])
    assert 20 <= len([at for at in found if 5 <= at < 25]) <= 22
    # At once, and the next regular one counts from there.
    assert any(abs(at - 40.3) < 1e-6 for at in found)
    quiet = looks(Pace(), 61.0, [])
    assert len(quiet) == 41


# --- what it costs --------------------------------------------------------------------------------


async def connections(db: Connection) -> list[str]:
    """The console's, by name."""
    rows = await db.execute(
        "select application_name as name from pg_stat_activity where datname = current_database() "
        "and application_name like 'recall-worker console%' order by 1"
    )
    return [row["name"] for row in await rows.fetchall()]


@contextlib.asynccontextmanager
async def opened(site: Site, *queries: str) -> AsyncIterator[list[ClientResponse]]:
    """Pages that are open."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(site.session.get(f"{site.root}/live?{query}"))
            for query in queries
        ]


async def closed(site: Site, db: Connection) -> None:
    """Wait until nobody watches, and the connection that listened is gone."""

    async def quiet() -> bool:
        return "recall-worker console live" not in await connections(db)

    await until(quiet)
    assert site.console.live.picture is None


@pytest.mark.full
@pytest.mark.timeout(240)
async def test_what_open_pages_cost(database: str, app: Application, db: Connection) -> None:
    """What PostgreSQL is sent, counted on its way there: nothing where no page is open; where one
    is, or a hundred are, of one kind or of ten, one transaction a second at most, and no more
    statements in it."""
    await put(app, db, "r1")
    kinds: dict[str, list[str]] = {
        "none": [],
        "one": ["part=now"],
        "a hundred": ["part=now"] * 100,
        "of ten kinds": [path for path in PATHS for _ in range(10)],
        "none again": [],
    }
    async with Recorder(database) as recorder, served(recorder.dsn) as site:
        for name, queries in kinds.items():
            looked = site.console.live.looks

            async def connected(most: int = len(queries), looked: int = looked) -> bool:
                """A look was made since all of them are open."""
                live = site.console.live
                return live.readers == most and (not most or live.looks > looked + 1)

            async with opened(site, *queries):
                await until(connected)
                if not queries:
                    await closed(site, db)
                began, before = time.monotonic(), recorder.counts.copy()
                await asyncio.sleep(6)
                passed, sent = time.monotonic() - began, recorder.counts - before
            looks = sent[BEGIN]
            if not queries:
                assert not sent, name
            else:
                assert looks <= passed / LEAST + 2, (name, looks, passed)
                # Workers, moment, counts … and at most one question of five statements.
                assert sent.total() <= (looks + 1) * 20, (name, sent)
                assert all(number <= looks + 1 for number in sent.values()), (name, sent)


BEGIN = "begin isolation level repeatable read read only"


@pytest.mark.slow
async def test_a_storm_is_one_look_a_second(site: Site, app: Application, db: Connection) -> None:
    """Notifications by the hundred, and pages of all kinds open."""
    await put(app, db, "r1")
    async with opened(site, *PATHS) as pages:
        await news(pages[0])
        began, looked, number = time.monotonic(), site.console.live.looks, 0
        while time.monotonic() - began < 3:
            await db.execute("select pg_notify('session_recalls', %s)", [str(number := number + 1)])
        passed = time.monotonic() - began
        assert number > 100 and site.console.live.listening
        assert 1 <= site.console.live.looks - looked <= passed + 2


# --- how soon -------------------------------------------------------------------------------------


@pytest.fixture
def rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regular looks a minute apart: what is shown before was notified."""
    monkeypatch.setattr(live, "EVERY", 60.0)


async def seen(page: ClientResponse, what: str) -> None:
    """Wait until the page shows it."""
    async with asyncio.timeout(30):
        while what not in (await news(page))[1]:
            pass


async def test_a_notification_is_shown_at_once(
    rarely: None, site: Site, app: Application, db: Connection
) -> None:
    """On the pages of the picture, in the agenda, and beside a list that has more now."""
    queries = ("part=now", "part=agenda", "part=recalls&state=live")
    async with opened(site, *queries) as [now, agenda, listed]:
        await news(now)
        await put(app, db, "soon", trigger_at="now() + interval '30 seconds'")
        await seen(now, ">soon<")
        # The same look asks one question, the next one another.
        await db.execute("select pg_notify('session_recalls', '')")
        await seen(agenda, ">soon<")
        await seen(listed, "1 has changed")


async def test_it_listens_again(rarely: None, site: Site, app: Application, db: Connection) -> None:
    """Its connection broke: it is opened again at once, and heard on."""
    async with opened(site, "part=now") as [page]:
        await news(page)
        [before] = await (await db.execute(BACKENDS)).fetchall()
        await db.execute("select pg_terminate_backend(%s)", [before["pid"]])

        async def again() -> bool:
            rows = await (await db.execute(BACKENDS)).fetchall()
            return len(rows) == 1 and rows[0] != before and site.console.live.listening

        await until(again)
        await put(app, db, "soon", trigger_at="now() + interval '30 seconds'")
        await seen(page, ">soon<")
    await closed(site, db)


BACKENDS = (
    "select pid from pg_stat_activity where datname = current_database() "
    "and application_name = 'recall-worker console live'"
)


async def test_without_notifications(
    database: str, bouncer: PgBouncer, app: Application, db: Connection
) -> None:
    """Through a pooler there are the regular looks; with RECALL_LISTEN_DSN there are
    notifications."""
    pooled = bouncer.way_to(database)
    async with served(pooled) as site, opened(site, "part=now") as [page]:
        await news(page)
        assert not site.console.live.listening
        await put(app, db, "late", trigger_at="now() + interval '30 seconds'")
        await seen(page, ">late<")


async def test_beside_a_pooler(
    rarely: None, database: str, bouncer: PgBouncer, app: Application, db: Connection
) -> None:
    pooled = bouncer.way_to(database)
    async with served(pooled, LISTEN_DSN=database) as site:
        async with opened(site, "part=now") as [page]:
            await news(page)
            assert site.console.live.listening
            await put(app, db, "soon", trigger_at="now() + interval '30 seconds'")
            await seen(page, ">soon<")

        async def nobody_listens() -> bool:
            # (The pooler's own connections stay.)
            rows = await db.execute(
                "select from pg_stat_activity where datname = current_database() "
                "and query = 'listen session_recalls'"
            )
            return not await rows.fetchall()

        await until(nobody_listens)


async def test_what_is_done_here_is_shown_at_once(
    rarely: None, site: Site, app: Application, db: Connection
) -> None:
    """A pause notifies nobody; pages of the console that did it are told all the same."""
    await put(app, db, "r1")
    async with opened(site, "part=recall&id=r1", "part=now") as [page, now]:
        await news(now)
        assert (await news(page))[0] == "watched"
        assert (await site.post("/recalls/r1/pause"))[0] == 303
        assert (await news(page))[0] == "changed"


async def test_a_page_learns_from_when_on_it_is_told(
    rarely: None, site: Site, app: Application, db: Connection
) -> None:
    """A page that was cut off asks for its recall, and may be answered with a state that is over
    before the first look: back in the one in which the page was opened, it has not changed, as far
    as the server knows. So the page is told when the server watches, and asks again."""
    await put(app, db, "r1")
    query = stream_of(await site.page("/recalls/r1"))
    async with opened(site, query, "part=now") as [page, now]:
        await news(now)
        assert await news(page) == ("watched", "")
        await db.execute("update session_recalls set paused_at = now() where id = 'r1'")

    async def nobody() -> bool:
        return site.console.live.picture is None

    await until(nobody)
    async with opened(site, query) as [page]:
        assert [(await news(page))[0] for _ in range(2)] == ["watched", "changed"]


# --- lists that are read --------------------------------------------------------------------------


def stream_of(text: str) -> str:
    """The address of a page's stream, from its /live? on."""
    [found] = re.findall(r'sse-connect="[^"?]*\?([^"]*)"', text)
    return str(found).replace("&amp;", "&")


@pytest.mark.slow
async def test_a_list_is_told_how_many_have_changed(
    site: Site, app: Application, db: Connection
) -> None:
    """Since it was drawn, also before its stream was opened: rows that changed, came or went. It
    is never drawn anew by itself."""
    for number in range(4):
        await put(app, db, f"r{number}")
    query = stream_of(await site.page("/recalls?state=live"))
    await db.execute("update session_recalls set status = 'cancelled' where id = 'r3'")
    async with opened(site, query) as [page]:
        assert await news(page) == (
            "stale",
            '<p class="alert calm">1 has changed. <a href="">Show</a></p>',
        )
        await db.execute("update session_recalls set paused_at = now() where id <> 'r3'")
        await seen(page, "4 have changed")
        await db.execute("update session_recalls set status = 'pending' where id = 'r3'")
        await seen(page, "3 have changed")
    again = stream_of(await site.page("/recalls?state=live"))
    assert again != query
    async with opened(site, again, "part=now") as [page, now]:
        await news(now)
        looked = site.console.live.looks

        async def later() -> bool:
            return site.console.live.looks > looked + 2

        await until(later)
        await db.execute("update session_recalls set deferrals = 1 where id = 'r0'")
        await seen(page, "1 has changed")


async def test_which_lists_are_live(site: Site, app: Application, db: Connection) -> None:
    """Not those of a user, whose sessions would have to be asked for, and not very long ones."""
    await put(app, db, "r1")
    assert "sse-connect" in await site.page("/recalls?state=live&limit=200")
    for query in ("user=u", "limit=201", "session=s*"):
        assert "sse-connect" not in await site.page(f"/recalls?{query}")
        assert (await site.get(f"/live?part=recalls&{query}"))[0] == 422
    assert (await site.get("/live?part=recalls&state=none"))[0] == 422


async def test_a_question_that_takes_too_long_holds_nobody_up(
    rarely: None, site: Site, app: Application, db: Connection
) -> None:
    """It is given up, and left alone for a while; the pages of the picture go on."""
    text, values = patience()
    slow = Question(
        "recalls",
        "slow",
        {
            "patience": (text, {**values, "milliseconds": "50"}),
            "rows": ("select pg_sleep(60), 'r' as id", {}),
        },
        is_searched=True,
    )
    async with site.console.live.reading(Reader("recalls", "UTC", question=slow)) as reader:
        async with opened(site, "part=now") as [now]:
            await news(now)
            await put(app, db, "soon", trigger_at="now() + interval '30 seconds'")
            await seen(now, ">soon<")
        assert not await reader.next(0.0)


async def test_a_hundred_pages_of_one_recall_ask_once(
    site: Site, app: Application, db: Connection
) -> None:
    """All were told of the same change, and get the same answer; a person's own page is fresh."""
    await put(app, db, "r1")
    asked = 0
    ask = site.console.database.ask

    async def counted(work):  # type: ignore[no-untyped-def]
        nonlocal asked
        asked += 1
        return await ask(work)

    site.console.database.ask = counted  # type: ignore[method-assign]
    texts = await asyncio.gather(
        *(site.get("/recalls/r1", **{"HX-Request": "true"}) for _ in range(100))
    )
    assert asked == 1 and all("Not due until" in said(text) for _, text in texts)
    await asyncio.gather(*(site.get("/recalls/r1") for _ in range(3)))
    assert asked == 4
