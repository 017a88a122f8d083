"""The console's pages over HTTP, on a real socket and PostgreSQL: what is shown and to whom, what
is done, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import html
import ipaddress
import os
import re
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, unquote

import psycopg
import pytest
from aiohttp import ClientResponse, ClientSession, CookieJar, web
from hypothesis import given
from hypothesis import strategies as st
from multidict import MultiDict

from recall_worker import settings
from recall_worker.console import access, acting, rendering
from recall_worker.console import database as database_of_console
from recall_worker.console.access import Access, Attempts, exposed, host_of
from recall_worker.console.app import HEADERS, Console
from recall_worker.console.brief import Fleet, brief
from recall_worker.console.database import CONNECTIONS
from recall_worker.events import Events
from recall_worker.settings import SettingsError

from .conftest import Connection
from .support.application import Application
from .support.pgbouncer import PgBouncer
from .test_cli import operate

TOKEN = "an-open-sesame-of-32-characters!"
OURS = {"Sec-Fetch-Site": "same-origin"}
HOSTILE = "<img src=x onerror=alert(1)>\"'&\u202e\x07{{7*7}}"
PAGES = ("/", "/agenda", "/agenda?span=week", "/recalls", "/workers", "/failures", "/queues")


class Site:
    """A console that is served, and a browser of sorts."""

    def __init__(self, dsn: str, console: Console, session: ClientSession, root: str) -> None:
        self.dsn = dsn
        self.console = console
        self.session = session
        self.root = root

    async def get(self, path: str, **headers: str) -> tuple[int, str]:
        async with self.session.get(self.root + path, headers=headers) as response:
            return response.status, await response.text()

    async def page(self, path: str) -> str:
        """A page that is to be there."""
        status, text = await self.get(path)
        assert status == 200, (path, status, said(text))
        return text

    async def post(
        self, path: str, headers: Mapping[str, str] = OURS, /, **fields: str
    ) -> tuple[int, str, str]:
        """The status, where it leads to, and the page."""
        async with self.session.post(
            self.root + path, data=fields, headers=headers, allow_redirects=False
        ) as response:
            return response.status, response.headers.get("Location", ""), await response.text()


@contextlib.asynccontextmanager
async def served(dsn: str, **environ: str) -> AsyncIterator[Site]:
    """`environ`: settings without RECALL_CONSOLE_; but `ACTOR` and `LISTEN_DSN` without RECALL_."""
    given = {
        f"RECALL_{name if name in ('ACTOR', 'LISTEN_DSN') else f'CONSOLE_{name}'}": value
        for name, value in environ.items()
    }
    chosen = settings.read({"RECALL_DSN": dsn, "RECALL_ACTOR": "ann"} | given)
    console = Console(chosen, Events(worker="console"))
    runner = web.AppRunner(console.application(), access_log=None, shutdown_timeout=2)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    [(_, port)] = [address[:2] for address in runner.addresses]
    try:
        async with ClientSession(cookie_jar=CookieJar(unsafe=True)) as session:
            yield Site(dsn, console, session, f"http://127.0.0.1:{port}")
    finally:
        await runner.cleanup()
        console.close()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110 - also what a page says is waited for
            await asyncio.sleep(0.02)


def main_of(text: str) -> str:
    """What stands in the page's <main>."""
    return text.partition("<main")[2].partition("</main>")[0]


def said(text: str) -> str:
    """A page's words."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", main_of(text))).split())


@pytest.fixture
async def site(database: str) -> AsyncIterator[Site]:
    async with served(database) as found:
        yield found


async def put(app: Application, db: Connection, id: str, **columns: Any) -> None:
    """A recall of a session of its own, due in an hour, with these columns."""
    session = columns.pop("session_id", f"s-{id}")
    await app.create_session(session, "u")
    await db.execute(
        "insert into session_recalls (id, session_id, call_type, trigger_at, "
        "additional_context_message, internal_comment, status, created_at, updated_at) values "
        "(%s, %s, 'once', now() + interval '1 hour', 'look', 'why not', 'pending', now(), now())",
        [id, session],
    )
    for name, value in columns.items():
        await db.execute(
            f"update session_recalls set {name} = {value} where id = %s".encode(), [id]
        )


# --- pages ----------------------------------------------------------------------------------------


async def test_every_page(site: Site, app: Application, db: Connection) -> None:
    """Each is whole, with a title of its own and the headers that keep it safe; empty tables are
    no error."""
    for path in (*PAGES, "/settings"):
        async with site.session.get(site.root + path) as response:
            text = await response.text()
            assert response.status == 200, (path, said(text))
            for name, value in HEADERS.items():
                assert response.headers[name] == value
            assert response.headers["Cache-Control"] == "no-store"
            assert "<h1" in main_of(text) and "</html>" in text
            assert "style=" not in text and "<style" not in text and "onclick" not in text
            assert not re.search(r"<script(?! src=)", text)
    assert (await site.get("/healthz")) == (200, "ok\n")
    assert (await site.get("/nothing"))[0] == 404


async def test_what_is_shown_of_a_recall(site: Site, app: Application, db: Connection) -> None:
    """Its why, its next moments and its story; no message and no comment."""
    await put(app, db, "r1")
    text = await site.page("/recalls/r1")
    assert "Not due until" in said(text) and "made; by whom is not on record" in said(text)
    assert "why not" not in text and ">look<" not in text
    assert "r1" in said(await site.page("/recalls"))
    assert "its time has not come" in said(await site.page("/recalls?state=waiting"))
    assert "r1" in said(await site.page("/agenda"))
    assert (await site.get("/recalls/r2"))[0] == 404


async def test_messages_are_shown_where_that_is_set(
    database: str, app: Application, db: Connection
) -> None:
    await put(app, db, "r1", additional_context_message=f"'a' || chr(10) || {literal(HOSTILE)}")
    async with served(database, MESSAGES="shown") as site:
        text = await site.page("/recalls/r1")
        assert "<img" not in text and "&lt;img src=x" in text and "a<br>" in text
        assert "why not" in text


@pytest.mark.slow
async def test_hostile_rows_stay_text(site: Site, app: Application, db: Connection) -> None:
    """Ids, sessions, reasons and workers' names are escaped wherever they stand, and what would
    turn the reading direction is made visible."""
    id = HOSTILE
    await put(app, db, id, session_id=f"s{HOSTILE}", reason=literal(HOSTILE), deferrals="2")
    await db.execute(
        "insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome, session_id, "
        "worker, lease, scheduled_for, missed, ended_at, reason, settled) values "
        "(%s, 1, 0, 1, 'failed', %s, %s, gen_random_uuid(), now(), 0, now(), %s, 'pending')",
        [id, f"s{HOSTILE}", HOSTILE, HOSTILE],
    )
    place = f"/recalls/{quote(id, safe='')}"
    for path in (*PAGES, place, f"{place}/edit", "/bulk/cancel?state=live", "/live?part=now"):
        if path.startswith("/live"):
            async with site.session.get(site.root + path) as response:
                text = (await response.content.readuntil(b"\n\n")).decode()
        else:
            text = await site.page(path)
        assert "<img" not in text and "\u202e" not in text and "\x07" not in text, path
        assert "{{7*7}}" in text or path not in ("/", "/recalls", place), path
    assert "&lt;img src=x onerror=alert(1)&gt;" in await site.page("/recalls")
    assert (await site.post(f"{place}/pause"))[0] == 303


@pytest.mark.parametrize("id", ["..", ".", "a/b", "a%2Fb", "?", "#", "a b", "ä", "é\u0301"])
async def test_ids_that_an_address_has_to_quote(
    id: str, site: Site, app: Application, db: Connection
) -> None:
    """The link in the list leads to the recall's page, and its buttons to the recall."""
    await put(app, db, id)
    [link] = re.findall(r'<a class="id" href="([^"]*)" title="(?!All)', await site.page("/recalls"))
    text = await site.page(html.unescape(link))
    assert "Not due until" in said(text)
    [action] = re.findall(r'<form method="post" action="([^"]*pause[^"]*)"', text)
    assert (await site.post(html.unescape(action)))[0] == 303
    row = await (
        await db.execute("select id from session_recalls where paused_at is not null")
    ).fetchone()
    assert row == {"id": id}


async def test_a_search_is_lists_filters(site: Site, app: Application, db: Connection) -> None:
    """The query string finds what `list` finds; what can't be meant is said, with what can."""
    for number in range(3):
        await put(app, db, f"r{number}-long-enough", session_id=f"mine-{number}")
    await db.execute("update session_recalls set queue = 'mail' where id like 'r1%'")
    assert "1 matches" in said(await site.page("/recalls?queue=mail"))
    assert "3 match" in said(await site.page("/recalls?session=mine-*"))
    assert "None matches" in said(await site.page("/recalls?state=due"))
    text = await site.page("/recalls?limit=2")
    assert "3 match, 1 to 2 shown" in said(text) and "offset=2" in text
    for query, what in {
        "state=gone": "there is no such state",
        "since=abc": "is not a duration",
        "limit=0": "is no number of at least 1",
        "queue=*": "stands for all queues",
    }.items():
        status, text = await site.get(f"/recalls?{query}")
        assert status == 422 and what in said(text), (query, said(text))
    async with site.session.get(
        site.root + "/recalls?id=r2-lon", allow_redirects=False
    ) as response:
        assert response.status == 303
        assert response.headers["Location"] == "/recalls/r2-long-enough"
    assert (await site.get("/recalls?id=nobody"))[0] == 404


async def test_a_page_in_the_readers_zone(site: Site, app: Application, db: Connection) -> None:
    """`zone` counts for this page and, by a cookie, for the following ones; the recall's own zone
    stands beside it."""
    await put(app, db, "r1", trigger_at="'2031-01-31 12:00+00'")
    text = await site.page("/recalls/r1?zone=Asia/Kolkata")
    assert "2031-01-31 17:30:00+05:30" in text
    assert "2031-01-31 17:30:00+05:30" in await site.page("/recalls/r1")
    assert "2031-01-31 12:00:00+00" in await site.page("/recalls/r1?zone=UTC")
    assert (await site.get("/recalls/r1?zone=Nowhere/<b>"))[0] == 200


async def test_the_agenda_has_what_a_rule_makes_of_a_recall(
    site: Site, database: str, app: Application, db: Connection
) -> None:
    """All its moments, by the recall's own clock, too; and the busy hours."""
    await put(app, db, "once")
    await app.create_session("s-cron", "u")
    done = operate(
        database,
        *("schedule", "s-cron", "m", "--cron", "0 * * * *", "--tz", "Asia/Tokyo"),
    )
    assert done.status == 0, done.err
    text = await site.page("/agenda")
    assert said(text).count("follows by its rule") >= 20
    assert "Asia/Tokyo" in text and '<svg class="strip"' in text


async def test_cells_are_named_by_their_columns(
    site: Site, app: Application, db: Connection
) -> None:
    """By the server: where a narrow screen shows a row as a card, no script is needed."""
    await put(app, db, "r1", deferrals="1", reason="'busy'")
    await put(app, db, "r2", call_type="'recurring'", interval_seconds="3600")
    await db.execute(
        "insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome, session_id, "
        "worker, lease, scheduled_for, missed, ended_at, reason, settled) values "
        "('r1', 1, 0, 1, 'failed', 's', 'w', gen_random_uuid(), now(), 0, now(), 'x', 'pending')"
    )
    cells = 0
    for path in (*PAGES, "/recalls/r1", "/recalls/r2/edit", "/bulk/cancel?state=live", "/settings"):
        for head, rows in re.findall(
            r'<table class="rows">\s*<thead>(.*?)</thead>(.*?)</table>', await site.page(path), re.S
        ):
            names = [
                " ".join(re.sub(r"<[^>]*>", "", name).split())
                for name in re.findall(r"<th[^>]*>(.*?)</th>", head, re.S)
            ]
            for row in re.findall(r"<tr[^>]*>(.*?)</tr>", rows, re.S):
                given = re.findall(r'<td(?: data-name="([^"]*)")?', row)
                if "colspan" not in row:
                    assert given == names, (path, row)
                    cells += len(given)
    assert cells > 50


async def test_a_search_that_no_index_serves_is_refused(
    monkeypatch: pytest.MonkeyPatch, site: Site, app: Application, db: Connection
) -> None:
    """Where the table is large, and with what can be asked; small ones are read through."""
    await put(app, db, "r1")
    await db.execute("analyze session_recalls")
    alone = ("queue=mail", "since=1h", "session=s*")
    for query in alone:
        assert (await site.get(f"/recalls?{query}"))[0] == 200
    monkeypatch.setattr("recall_worker.console.pages.READ_THROUGH", 0)
    for query in alone:
        status, text = await site.get(f"/recalls?{query}")
        assert status == 422 and "no index serves this search" in said(text), query
        assert "a state with it: live, due" in said(text)
        for more in ("state=live", "status=failed", "outcome=busy", "user=u"):
            assert (await site.get(f"/recalls?{query}&{more}"))[0] == 200
    for query in ("", "session=s", "queue=mail&session=s"):
        assert (await site.get(f"/recalls?{query}"))[0] == 200


# --- actions --------------------------------------------------------------------------------------


async def test_actions_are_on_record_under_the_users_name(
    site: Site, app: Application, db: Connection
) -> None:
    """Each button does what the command does, leads back to the recall, and says what was done."""
    await put(app, db, "r1")
    for name, status in {"pause": "pending", "resume": "pending", "fire": "pending"}.items():
        code, place, _ = await site.post(f"/recalls/r1/{name}")
        assert code == 303 and place.startswith("/recalls/r1?note="), place
        row = await (await db.execute("select status from session_recalls")).fetchone()
        assert row == {"status": status}
    assert (await site.post("/recalls/r1/cancel"))[0] == 303
    code, place, _ = await site.post("/recalls/r1/retry")
    assert "Done: due now, under the key r1:1.1." in said(await site.page(place))
    code, _, _ = await site.post("/recalls/r1/reschedule", **{"in": "2h"})
    assert code == 303
    rows = await (
        await db.execute("select actor, via, action from recall_actions order by id")
    ).fetchall()
    assert {(row["actor"], row["via"]) for row in rows} == {("ann", "console")}
    assert [row["action"] for row in rows] == [
        *("pause", "resume", "fire", "cancel", "retry", "reschedule")
    ]
    assert "paused by ann (console)" in said(await site.page("/recalls/r1"))


async def test_what_does_not_apply_is_said(site: Site, app: Application, db: Connection) -> None:
    await put(app, db, "r1")
    for path, fields, code, what in (
        ("/recalls/r1/retry", {}, 409, "it waits or runs already"),
        ("/recalls/r1/skip", {}, 409, "it has no next occurrence"),
        ("/recalls/r1/explode", {}, 404, "There is no action 'explode'"),
        ("/recalls/nobody/cancel", {}, 409, "There is no recall nobody"),
        ("/recalls/r1/reschedule", {}, 422, "No time is given"),
        ("/recalls/r1/reschedule", {"in": "soon"}, 422, "is not a duration"),
        ("/recalls/r1/reschedule", {"at": "2001-01-01T00:00"}, 422, "is past"),
        ("/recalls/r1/edit", {}, 422, "Nothing is changed"),
        ("/recalls/r1/edit", {"cron": "never"}, 422, "cron"),
        ("/recalls/%00/cancel", {}, 422, "NUL"),
        ("/bulk/cancel", {}, 409, "no filter"),
        ("/bulk/explode", {}, 404, "There is no action"),
        ("/queues/pause", {"queue": ""}, 422, "is empty"),
    ):
        status, _, text = await site.post(path, **fields)
        assert status == code and what.lower() in said(text).lower(), (path, status, said(text))
    row = await (await db.execute("select count(*) as n from recall_actions")).fetchone()
    assert row == {"n": 0}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"cron": "nonsense"}, "cron"),
        ({"cron": "0 9 * * *", "grace": "soon"}, "grace"),
        ({"cron": "0 9 * * *", "time_zone": "Nowhere/City"}, "time_zone"),
        ({"until": "soon", "times": "3"}, "until"),
        ({"times": "many", "was_times": "3", "queue": "mail", "was_queue": "mail"}, "times"),
        ({"every": "1h", "grid": "1h"}, None),
        ({"failures": "3"}, "failures"),
    ],
)
def test_the_field_that_is_wrong(fields: dict[str, str], name: str | None) -> None:
    """By itself, or as the only one that was changed; else it is not known."""
    assert acting.wrong_field(fields, datetime.now(UTC)) == name


async def test_a_refused_edit_keeps_what_was_typed(
    site: Site, app: Application, db: Connection
) -> None:
    """The words stand beside the field, and the other fields as they were typed."""
    await put(app, db, "r1", call_type="'recurring'", interval_seconds="3600")
    code, _, text = await site.post(
        "/recalls/r1/edit", every="", was_every="1h", cron="0 25 * * *", was_cron="", queue="mail"
    )
    assert code == 422 and 'name="queue" value="mail"' in text and 'value="0 25 * * *"' in text
    beside = re.search(r'<small class="wrong" id="wrong-cron">([^<]+)</small>', text)
    assert beside is not None and "no cron expression" in html.unescape(beside[1]), text
    # So it is with a message that is emptied, which can't be taken away.
    code, _, text = await site.post("/recalls/r1/edit", message="", was_message="a", queue="mail")
    assert code == 422 and 'name="queue" value="mail"' in text and "not taken away" in text
    _, text = await site.get("/recalls/r1/preview?message=&was_message=a")
    assert "not taken away" in text and text.count('hx-swap-oob="true"') == len(acting.EDITED) - 2
    # Live, each field's words are sent, the empty ones included.
    _, text = await site.get("/recalls/r1/preview?grace=soon")
    assert text.count('hx-swap-oob="true"') == len(acting.EDITED) - 2  # No texts are shown.
    assert "is not a duration" in text.partition('id="wrong-grace"')[2].partition("</small>")[0]


async def test_an_edit_and_its_preview(site: Site, app: Application, db: Connection) -> None:
    """The preview says what would come and changes nothing; only what was changed is written."""
    await put(app, db, "r1", call_type="'recurring'", interval_seconds="3600")
    text = await site.page("/recalls/r1/edit")
    assert 'name="every" value="1h"' in text and 'name="was_every" value="1h"' in text
    same = dict(re.findall(r'name="(\w+)" value="([^"]*)"', main_of(text)))
    shown = await site.page(
        "/recalls/r1/preview?cron=30+9+*+*+*&time_zone=Europe/Berlin&every=&was_every=1h"
    )
    assert "It would be: cron '30 9 * * *' Europe/Berlin" in said("<main" + shown + "</main>")
    assert shown.count("09:30:00") == 10
    row = await (await db.execute("select cron, updated_at from session_recalls")).fetchone()
    assert row is not None and row["cron"] is None
    wrong = await site.page("/recalls/r1/preview?cron=nonsense")
    assert "alert" in wrong
    # The application has changed the queue meanwhile: a form that shows another one leaves it.
    await db.execute("update session_recalls set queue = 'mail'")
    fields = same | {"every": "2h", "until": "2031-01-31"}
    code, place, text = await site.post("/recalls/r1/edit", **fields)
    assert code == 303, said(text)
    assert "every 2h, until 2031-01-31" in said(await site.page(place))
    row = await (
        await db.execute("select interval_seconds, queue, until_at from session_recalls")
    ).fetchone()
    assert row is not None and row["interval_seconds"] == 7200 and row["queue"] == "mail"
    text = await site.page("/recalls/r1/edit")
    same = dict(re.findall(r'name="(\w+)" value="([^"]*)"', main_of(text)))
    assert (await site.post("/recalls/r1/edit", **(same | {"until": ""})))[0] == 303
    row = await (await db.execute("select until_at from session_recalls")).fetchone()
    assert row == {"until_at": None}


async def test_an_edit_leaves_texts_as_they_are(
    database: str, app: Application, db: Connection
) -> None:
    """What a form shows it sends back as it is, tabs, line breaks and marks of direction too: an
    edit of something else changes no text."""
    text = "\n one\ttwo\n\u202ethree <b>&amp;</b>\x1b \n"
    await put(app, db, "r1", additional_context_message=literal(text))
    async with served(database, MESSAGES="shown") as site:
        shown = main_of(await site.page("/recalls/r1/edit"))
        typed = {
            name: as_a_browser_reads(value)
            for name, value in re.findall(r'<input[^>]*name="(\w+)" value="([^"]*)"', shown)
        }
        for name, value in re.findall(
            r"<textarea name=\"(\w+)\"[^>]*>\n(.*?)</textarea>", shown, re.S
        ):
            typed[name] = as_a_browser_reads(value).replace("\n", "\r\n")
        code, _, page = await site.post("/recalls/r1/edit", **(typed | {"grace": "1h"}))
        assert code == 303, said(page)
        row = await (await db.execute("select * from session_recalls")).fetchone()
        assert row is not None
        assert (row["additional_context_message"], row["grace_seconds"]) == (text, 3600)
        typed["message"] += "more"
        assert (await site.post("/recalls/r1/edit", **typed))[0] == 303
        row = await (await db.execute("select * from session_recalls")).fetchone()
        assert row is not None and row["additional_context_message"] == text + "more"


async def test_a_queue_is_paused(site: Site, db: Connection) -> None:
    code, place, _ = await site.post("/queues/pause", queue="mail", reason="the API moves")
    assert code == 303 and "queue mail: paused" in said(await site.page(place)).lower()
    assert "the API moves" in said(await site.page("/queues"))
    code, place, _ = await site.post("/queues/resume", queue="mail")
    assert "resumed" in said(await site.page(place))
    rows = await (await db.execute("select actor, via, action from recall_actions")).fetchall()
    assert [(row["actor"], row["via"]) for row in rows] == [("ann", "console")] * 2


async def over(site: Site, place: str) -> str:
    """A job's page when it is over."""

    async def ended() -> bool:
        return "<progress" in (text := await site.page(place)) and "It goes on" not in text

    await until(ended)
    return said(await site.page(place))


async def test_acting_on_many(site: Site, app: Application, db: Connection) -> None:
    """What is meant is shown first; beyond ten their number has to be typed; what is no longer as
    it was then is left alone, and what came later is not touched."""
    for number in range(12):
        await put(app, db, f"r{number:02}", status="'failed'", ended_at="now()")
    await put(app, db, "other")
    text = await site.page("/bulk/retry?state=failed")
    assert "Retry 12 recalls?" in said(text) and "The first 10 of 12" in said(text)
    [key] = re.findall(r'name="choice" value="([^"]*)"', text)
    for count in ("", "11", "x"):
        code, _, text = await site.post("/bulk/retry", choice=key, count=count)
        assert code == 422 and "12" in said(text)
    assert (await site.post("/bulk/cancel", choice=key, count="12"))[0] == 409
    await put(app, db, "late", status="'failed'")
    await db.execute("update session_recalls set status = 'fired' where id = 'r03'")
    code, place, _ = await site.post("/bulk/retry", choice=key, count="12")
    assert code == 303 and place.startswith("/jobs/")
    text = await over(site, place)
    assert "11 of 12 recalls retried" in text and "1 changed meanwhile" in text and "Done." in text
    rows = await (
        await db.execute("select id, status from session_recalls where status <> 'pending'")
    ).fetchall()
    assert {(row["id"], row["status"]) for row in rows} == {("r03", "fired"), ("late", "failed")}
    # Once: the choice is gone.
    assert (await site.post("/bulk/retry", choice=key, count="12"))[0] == 409


async def test_acting_on_what_was_selected(site: Site, app: Application, db: Connection) -> None:
    """Selected ones go before the filters; of few no number is asked; filters alone work, too."""
    for number in range(4):
        await put(app, db, f"r{number}")
    strange = 'r\u202e\t"<>'
    await put(app, db, strange)
    [value] = re.findall(r'name="id" value="([^"]*;)"', await site.page("/recalls?session=s-r*"))
    assert html.unescape(value) == strange
    text = await site.page(f"/bulk/pause?id={quote(strange)}")
    assert "Pause 1 recall?" in said(text)
    await db.execute("delete from session_recalls where id = %s", [strange])
    assert "Pause 2 recalls?" in said(await site.page("/bulk/pause?state=live&id=r1&id=r2"))
    code, place, _ = await site.post("/bulk/pause?id=r1&id=r2")
    assert code == 303 and "2 of 2 recalls paused" in await over(site, place)
    code, place, _ = await site.post("/bulk/cancel?state=paused")
    assert code == 303 and "2 of 2 recalls cancelled" in await over(site, place)
    rows = await (
        await db.execute("select id from session_recalls where status = 'cancelled' order by id")
    ).fetchall()
    assert [row["id"] for row in rows] == ["r1", "r2"]
    assert (await site.get("/bulk/retry?state=failed"))[0] == 409


async def test_a_job_is_stopped(site: Site, app: Application, db: Connection) -> None:
    """Between two batches; what was done stays done, and the page says how far it came."""
    for number in range(3):
        await put(app, db, f"r{number}")
    await db.execute("insert into sessions select 'many-' || n, 'u' from generate_series(1, 600) n")
    await db.execute(
        "insert into session_recalls (id, session_id, call_type, trigger_at, "
        "additional_context_message, status, created_at, updated_at) select 'm' || n, "
        "'many-' || n, 'once', now() + interval '1 day', 'x', 'pending', now(), now() "
        "from generate_series(1, 600) n"
    )
    # Each batch waits: the application holds a lock that cancels have to have.
    gate = await psycopg.AsyncConnection.connect(site.dsn)
    async with gate:
        await gate.execute("lock table recall_actions in share mode")
        code, place, _ = await site.post("/bulk/pause?state=live&session=many-*", count="600")
        assert code == 303
        code, back, _ = await site.post(f"{place}/stop")
        assert (code, back) == (303, place)
        await gate.commit()
    text = await over(site, place)
    assert "Stopped: the others are as they were." in text
    row = await (
        await db.execute("select count(*) as n from session_recalls where paused_at is not null")
    ).fetchone()
    assert row is not None and row["n"] <= 100
    assert f"{row['n']} of 600 recalls paused" in text


async def test_a_job_whose_connection_breaks(site: Site, app: Application, db: Connection) -> None:
    """What is counted was done; of the batch in hand nobody knows, and that is said."""
    await put(app, db, "r1")
    await db.execute(
        "create function gone() returns trigger language plpgsql as $$ begin "
        "perform pg_terminate_backend(pg_backend_pid()); return null; end $$"
    )
    await db.execute(
        "create constraint trigger gone after update on session_recalls deferrable initially "
        "deferred for each row execute function gone()"
    )
    code, place, _ = await site.post("/bulk/pause?state=live&session=*")
    assert code == 303
    text = await over(site, place)
    assert "0 of 1 recall paused" in text
    assert "Broken off: " in text and "in hand was done, too, is not known" in text


# --- who may --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 303),
        ({"Origin": "ROOT"}, 303),
        ({"Origin": "ROOT", "Sec-Fetch-Site": "same-origin"}, 303),
        ({"Origin": "ROOT", "Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
async def test_a_post_comes_from_a_page_of_ours(
    headers: dict[str, str], status: int, site: Site, app: Application, db: Connection
) -> None:
    await put(app, db, "r1")
    sent = {name: site.root if value == "ROOT" else value for name, value in headers.items()}
    code, _, _ = await site.post("/recalls/r1/pause", sent)
    assert code == status
    row = await (await db.execute("select paused_at from session_recalls")).fetchone()
    assert row is not None and (row["paused_at"] is not None) == (status == 303)


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost:9465", True),
        ("127.0.0.1", True),
        ("[::1]:9465", True),
        ("10.1.2.3:80", True),
        ("console.example.com", True),
        ("CONSOLE.example.com.:443", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("console.example.com.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
        ("a b", False),
        ("user@localhost", False),
    ],
)
async def test_no_foreign_name_reaches_it(host: str, known: bool, database: str) -> None:
    async with served(database, HOSTS="console.example.com") as site:
        status, text = await site.get("/", Host=host)
        assert status == (200 if known else 403), said(text)
        assert (await site.get("/healthz", Host=host))[0] == 200


async def test_a_token_opens_it(database: str, app: Application, db: Connection) -> None:
    """The login page sets a cookie that no script reads and no other site sends; a program sends
    the token itself; actions are on record under the name that was given."""
    await put(app, db, "r1")
    async with served(database, TOKEN=TOKEN) as site:
        async with site.session.get(
            site.root + "/recalls?state=live",
            headers={"Accept": "text/html"},
            allow_redirects=False,
        ) as response:
            assert response.status == 302
            assert unquote(response.headers["Location"]) == "/login?to=/recalls?state=live"
        assert (await site.get("/"))[0] == 401
        assert (await site.get("/live?part=now"))[0] == 401
        assert (await site.post("/recalls/r1/pause"))[0] == 401
        assert (await site.get("/healthz"))[0] == 200
        assert (await site.get("/", Authorization=f"Bearer {TOKEN}"))[0] == 200
        assert (await site.get("/", Authorization="Bearer wrong"))[0] == 401
        assert (await site.post("/login", token="wrong", name="bob"))[0] == 401
        assert (await site.post("/login", {}, token=TOKEN, name="bob"))[0] == 403
        async with site.session.post(
            site.root + "/login",
            data={"token": TOKEN, "name": "bob", "to": "/recalls?state=live"},
            headers=OURS,
            allow_redirects=False,
        ) as response:
            assert response.status == 303
            assert response.headers["Location"] == "/recalls?state=live"
            cookie = response.headers["Set-Cookie"]
            assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN not in cookie
            assert "Secure" not in cookie
        assert "bob" in await site.page("/")
        assert (await site.post("/recalls/r1/pause"))[0] == 303
        code, place, _ = await site.post("/logout")
        assert (code, place) == (303, "/login") and (await site.get("/"))[0] == 401
        cut = cookie.partition("=")[2].partition(";")[0][:-1]
        for wrong in ("", "a.b", "." * 10, cut):
            assert (await site.get("/", Cookie=f"{access.COOKIE}={wrong}"))[0] == 401
    rows = await (await db.execute("select actor from recall_actions")).fetchall()
    assert rows == [{"actor": "bob"}]


@pytest.mark.parametrize("to", ["//evil.example", "/\\evil.example", "https://evil.example", "x"])
async def test_a_login_leads_nowhere_else(to: str, database: str) -> None:
    async with served(database, TOKEN=TOKEN) as site:
        code, place, _ = await site.post("/login", token=TOKEN, name="a", to=to)
        assert (code, place) == (303, "/")


async def test_attempts_are_bounded(database: str) -> None:
    """After ten wrong tokens nobody is let in from there for a while, by whatever way."""
    async with served(database, TOKEN=TOKEN) as site:
        for _ in range(access.ATTEMPTS_PEER):
            assert (await site.post("/login", token="wrong", name="a"))[0] == 401
        assert (await site.post("/login", token=TOKEN, name="a"))[0] == 429
        assert (await site.get("/", Authorization=f"Bearer {TOKEN}"))[0] == 429


def test_attempts_are_forgotten() -> None:
    now = 0.0
    attempts = Attempts(lambda: now)
    for _ in range(access.ATTEMPTS_PEER):
        assert attempts.wait("a") == 0
        attempts.failed("a")
    assert attempts.wait("a") == access.ATTEMPTS_WITHIN and attempts.wait("b") == 0
    now = access.ATTEMPTS_WITHIN
    assert attempts.wait("a") == 0
    for number in range(access.ATTEMPTS_ALL):
        attempts.failed(f"peer {number}")
    assert attempts.wait("somebody else") > 0


async def test_a_proxy_says_who_it_is(database: str, app: Application, db: Connection) -> None:
    """Only one that is trusted is believed; operators may act, the others read."""
    await put(app, db, "r1")
    named = {"USER_HEADER": "X-Forwarded-User", "OPERATORS": "ann, bob"}
    async with served(database, TRUSTED="127.0.0.0/8,::1", **named) as site:
        assert (await site.get("/"))[0] == 401
        status, text = await site.get("/recalls/r1", **{"X-Forwarded-User": "eve"})
        assert status == 200 and "<form" not in main_of(text)
        code, _, text = await site.post("/recalls/r1/pause", {**OURS, "X-Forwarded-User": "eve"})
        assert code == 403 and "eve may read, and not act" in said(text)
        code, _, _ = await site.post("/recalls/r1/pause", {**OURS, "X-Forwarded-User": "bob"})
        assert code == 303
    async with served(database, TRUSTED="10.0.0.0/8", **named) as site:
        assert (await site.get("/", **{"X-Forwarded-User": "ann"}))[0] == 401
    rows = await (await db.execute("select actor from recall_actions")).fetchall()
    assert rows == [{"actor": "bob"}]


async def test_an_account_that_reads_makes_it_read_only(
    database: str, app: Application, db: Connection
) -> None:
    """Every button is gone, and PostgreSQL refuses what is sent all the same."""
    await put(app, db, "r1", call_type="'recurring'", interval_seconds="3600")
    await db.execute(
        "do $$ begin create role console_reader login; exception when duplicate_object then null; "
        "end $$"
    )
    assert operate(database, "migrate", "--roles").status == 0
    await db.execute("grant recall_reader to console_reader")
    reader = psycopg.conninfo.make_conninfo(database, user="console_reader")
    async with served(reader) as site:
        for path in (*PAGES, "/recalls/r1"):
            text = await site.page(path)
            assert "<form" not in main_of(text), path
            assert "Only to be read: the account console_reader may not change recalls" in text
        for path in ("/recalls/r1/pause", "/recalls/r1/cancel", "/recalls/r1/skip"):
            code, _, text = await site.post(path)
            assert code == 403 and "PostgreSQL refuses it" in said(text), (path, said(text))
        code, _, text = await site.post("/recalls/r1/edit", every="2h")
        assert code == 403 and "PostgreSQL" in said(text)
        code, _, text = await site.post("/queues/pause", queue="mail")
        assert code == 403
        assert (await site.get("/recalls/r1/edit"))[0] == 403
        assert (await site.get("/bulk/cancel?state=live"))[0] == 403
    row = await (await db.execute("select status, paused_at from session_recalls")).fetchone()
    assert row == {"status": "pending", "paused_at": None}


@pytest.mark.parametrize(
    ("environ", "refused"),
    [
        ({}, False),
        ({"LISTEN": "9999"}, False),
        ({"LISTEN": "localhost:9999"}, False),
        ({"LISTEN": "[::1]:9999"}, False),
        ({"LISTEN": "127.9.9.9:1"}, False),
        ({"LISTEN": "0.0.0.0:9465"}, True),
        ({"LISTEN": "[::]:9465"}, True),
        ({"LISTEN": "10.0.0.1:9465"}, True),
        ({"LISTEN": "myhost:9465"}, True),
        ({"LISTEN": "0.0.0.0:9465", "TOKEN": TOKEN}, False),
        ({"LISTEN": "0.0.0.0:9465", "USER_HEADER": "X-User", "TRUSTED": "10.0.0.0/8"}, False),
    ],
)
def test_what_others_reach_asks_who_they_are(environ: dict[str, str], refused: bool) -> None:
    chosen = settings.read({f"RECALL_CONSOLE_{name}": value for name, value in environ.items()})
    assert bool(exposed(chosen)) == refused


@pytest.mark.parametrize(
    ("environ", "what"),
    [
        ({"LISTEN": "here"}, "RECALL_CONSOLE_LISTEN is 'here': give host:port"),
        ({"LISTEN": "127.0.0.1:70000"}, "RECALL_CONSOLE_LISTEN"),
        ({"BASE_PATH": "recalls"}, "RECALL_CONSOLE_BASE_PATH is 'recalls': give a path"),
        ({"TOKEN": "short"}, "RECALL_CONSOLE_TOKEN is shorter than 16"),
        ({"USER_HEADER": "X-User"}, "set without RECALL_CONSOLE_TRUSTED"),
        ({"TRUSTED": "10.0.0.0/8"}, "set without RECALL_CONSOLE_USER_HEADER"),
        ({"USER_HEADER": "X-User", "TRUSTED": "10.0.0.1/8"}, "RECALL_CONSOLE_TRUSTED names"),
        ({"USER_HEADER": "X-User", "TRUSTED": "0.0.0.0/0"}, "which is everybody"),
        ({"USER_HEADER": "X-User", "TRUSTED": "10.0.0.5,::/0"}, "which is everybody"),
        ({"MESSAGES": "yes"}, "RECALL_CONSOLE_MESSAGES is 'yes': give one of hidden, shown"),
        ({"HOSTS": "http://a"}, "RECALL_CONSOLE_HOSTS names 'http://a'"),
    ],
)
def test_settings_that_can_not_be(environ: dict[str, str], what: str) -> None:
    with pytest.raises(SettingsError) as raised:
        settings.read({f"RECALL_CONSOLE_{name}": value for name, value in environ.items()})
    assert what in str(raised.value) and "short" not in str(raised.value).replace("shorter", "")


@given(st.text(max_size=60))
def test_any_host_is_an_address_a_name_or_none(text: str) -> None:
    """A name is never read out of something else, and has nothing in it that could be more."""
    found = host_of(text)
    if found is not None:
        assert not re.search(r"[\s/@?#\[\]]", found)
        assert found in text.lower()


@given(st.text(max_size=40), st.text(max_size=40))
def test_a_cookie_of_another_token_is_none(name: str, other: str) -> None:
    cookie = access._cookie(name, TOKEN)
    assert access._name_of(cookie, TOKEN) == name
    assert access._name_of(cookie, TOKEN + "x") is None
    assert access._name_of(other, TOKEN) is None


def test_a_cookie_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "COOKIE_FOR", -1.0)
    assert access._name_of(access._cookie("ann", TOKEN), TOKEN) is None


def test_a_user_of_a_proxy_behind_ipv6() -> None:
    """An IPv4 address that a socket of both kinds shows as IPv6 is the same proxy."""
    chosen = settings.read(
        {"RECALL_CONSOLE_USER_HEADER": "X-User", "RECALL_CONSOLE_TRUSTED": "10.0.0.0/8"}
    )
    found = Access(chosen, lambda: None)
    assert found.user({"X-User": "ann"}, None, "::ffff:10.1.2.3") is not None
    assert found.user({"X-User": "ann"}, None, "::ffff:11.1.2.3") is None
    assert found.user({"X-User": "ann"}, None, "unknown") is None
    assert ipaddress.ip_address("10.1.2.3") in found._networks[0]


# --- limits, paths, outages -----------------------------------------------------------------------


async def test_a_base_path(database: str, app: Application, db: Connection) -> None:
    """All addresses of a page begin with it."""
    await put(app, db, "r1")
    async with served(database, BASE_PATH="/ops/recalls/") as site:
        for path in ("/ops/recalls/", "/ops/recalls/recalls", "/ops/recalls/recalls/r1"):
            text = await site.page(path)
            for place in re.findall(
                r'(?:href|src|action|formaction|hx-get|sse-connect)="([^"]*)"', text
            ):
                # (None: this page again.)
                assert not place or place.startswith(("/ops/recalls", "#")), place
        code, place, _ = await site.post("/ops/recalls/recalls/r1/pause")
        assert code == 303 and place.startswith("/ops/recalls/recalls/r1?note=")
        assert (await site.get("/recalls"))[0] == 404
        assert (await site.get("/healthz"))[0] == (await site.get("/ops/recalls/healthz"))[0] == 200


async def test_what_is_too_large_is_refused(site: Site, app: Application, db: Connection) -> None:
    await put(app, db, "r1")
    code, _, _ = await site.post("/recalls/r1/edit", message="x" * 400_000)
    assert code == 413
    code, _, text = await site.post(
        "/recalls/r1/edit", {**OURS, "Content-Type": "application/json"}
    )
    assert code == 422 and "Only forms" in said(text)
    assert (await site.get("/static/../app.py"))[0] == 404
    assert (await site.get("/static/%2e%2e/app.py"))[0] == 404
    assert (await site.get("/static/vendor/README.md"))[0] == 404


async def test_static_files_are_kept_by_browsers(site: Site) -> None:
    place = site.console._templates.asset("console.css")
    async with site.session.get(site.root + place) as response:
        assert response.status == 200 and "immutable" in response.headers["Cache-Control"]
        assert response.content_type == "text/css"


async def test_postgresql_is_gone(app: Application, db: Connection, endpoint: Any) -> None:
    """A sentence, since when, and a page that asks again; the process stays healthy."""
    async with served("postgresql://nobody@127.0.0.1:1/none") as site:
        for path in ("/", "/recalls", "/recalls/r1"):
            status, text = await site.get(path)
            assert status == 503 and "PostgreSQL has not answered since" in said(text), said(text)
            assert 'http-equiv="refresh"' in text
        assert (await site.post("/recalls/r1/pause"))[0] == 503
        status, text = await site.get("/healthz")
        assert status == 200 and "PostgreSQL has not answered since" in text


async def test_it_comes_back(site: Site, app: Application, db: Connection) -> None:
    """Connections that broke while nobody used them are replaced, for reading and for acting."""
    await put(app, db, "r1")
    await site.page("/recalls/r1")
    await site.page("/")
    ended = await db.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() "
        "and application_name like 'recall-worker console%'"
    )
    assert len(await ended.fetchall()) >= 2
    assert "Not due until" in said(await site.page("/recalls/r1"))
    await site.page("/")
    assert (await site.post("/recalls/r1/pause"))[0] == 303


async def test_through_a_pooler(
    database: str, bouncer: PgBouncer, app: Application, db: Connection
) -> None:
    """In transaction mode: pages, actions, previews; what is set for one statement stays behind for
    nobody."""
    await put(app, db, "r1", call_type="'recurring'", interval_seconds="3600")
    async with served(bouncer.way_to(database)) as site:
        for path in (*PAGES, "/recalls/r1", "/recalls?state=due"):
            await site.page(path)
        assert (await site.post("/recalls/r1/pause"))[0] == 303
        assert "It would be: every 2h" in await site.page("/recalls/r1/preview?every=2h")
        async with site.session.get(f"{site.root}/live?part=now") as page:
            assert (await news(page))[0] == "page"
    row = await (
        await db.execute("select interval_seconds, paused_at from session_recalls")
    ).fetchone()
    assert row is not None and row["interval_seconds"] == 3600 and row["paused_at"] is not None


# --- live -----------------------------------------------------------------------------------------


async def news(response: ClientResponse) -> tuple[str, str]:
    """The next event of a stream, and its text."""
    while True:
        block = (await response.content.readuntil(b"\n\n")).decode()
        if not block.startswith(":"):
            lines = block.strip().split("\n")
            text = "\n".join(line[6:] for line in lines if line.startswith("data: "))
            return lines[0].removeprefix("event: "), text


@pytest.mark.slow
async def test_a_new_recall_is_seen_by_all_who_watch(
    site: Site, app: Application, db: Connection
) -> None:
    """One look a second for all of them, one text for all; none while nobody watches."""
    path = f"{site.root}/live?part=now"
    async with contextlib.AsyncExitStack() as open_pages:
        pages = [await open_pages.enter_async_context(site.session.get(path)) for _ in range(8)]
        for page in pages:
            assert (await news(page))[0] == "page"
        rendered = site.console.live.rendered
        await put(app, db, "seen-by-all", trigger_at="now() + interval '30 seconds'")
        for page in pages:
            while True:
                name, text = await news(page)
                assert name == "page"
                if "seen-by-all" in text:
                    break
        # The session's own insert may have been a change of its own.
        assert site.console.live.rendered - rendered <= 3
        assert site.console.live.readers == 8

    async def nobody() -> bool:
        return site.console.live.readers == 0 and site.console.live.picture is None

    await until(nobody)
    looks = site.console.live.looks
    await asyncio.sleep(1.5)
    assert site.console.live.looks == looks


async def test_a_recalls_page_hears_of_its_change(
    site: Site, app: Application, db: Connection
) -> None:
    await put(app, db, "r1")
    await put(app, db, "r2")
    async with site.session.get(f"{site.root}/live?part=recall&id=r1") as page:

        async def watched() -> bool:
            return "r1" in site.console.live._known

        await until(watched)
        assert (await news(page))[0] == "watched"
        await db.execute("update session_recalls set paused_at = now() where id = 'r2'")
        assert (await site.post("/recalls/r1/pause"))[0] == 303
        assert (await news(page))[0] == "changed"


@pytest.mark.slow
async def test_a_slow_reader_holds_nobody_up(site: Site, app: Application, db: Connection) -> None:
    """One that reads nothing misses what was replaced; the others go on."""
    path = f"{site.root}/live?part=now"
    async with site.session.get(path), site.session.get(path) as quick:
        for number in range(4):
            await put(app, db, f"r{number}", trigger_at="now() + interval '30 seconds'")
            while f">r{number}<" not in (await news(quick))[1]:
                pass


async def test_postgresqls_silence_is_told_live(database: str) -> None:
    async with served("postgresql://nobody@127.0.0.1:1/none") as site:
        async with site.session.get(f"{site.root}/live?part=now") as page:
            name, text = await news(page)
            assert name == "link" and "PostgreSQL has not answered since" in text


async def test_streams_that_are_none(site: Site) -> None:
    for query in ("", "part=settings", "part=recall", "part=../../x"):
        assert (await site.get(f"/live?{query}"))[0] == 422


# --- pure -----------------------------------------------------------------------------------------


def test_the_vendored_scripts_are_those_named() -> None:
    """Nobody has changed them, and each has its version and its licence."""
    folder = rendering.STATIC / "vendor"
    rows = re.findall(
        r"^\| (\S+\.js) \| \S+ \| [0-9.]+ \| \S+ \| ([0-9a-f]{64}) \|$",
        (folder / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert {name for name, _ in rows} == {path.name for path in folder.glob("*.js")}
    for name, digest in rows:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def worker(**columns: Any) -> dict[str, Any]:
    nothing = {"queues": ["default"], "held": None, "breaker": "closed", "slots": 3, "leases": 0}
    return {**nothing, "worker": "w", "alive": True, **columns}


def pause(queue: str) -> dict[str, Any]:
    return {"queue": queue, "paused_by": "ann", "reason": "a move"}


RUN = {"session_id": "s", "id": "other", "worker": "w"}


@pytest.mark.parametrize(
    ("columns", "fleet", "says"),
    [
        ({}, Fleet([worker()]), "waits to be claimed"),
        ({}, Fleet(), "no live worker"),
        ({"queue": "mail"}, Fleet([worker()]), "no live worker serves queue mail"),
        ({"queue": "mail"}, Fleet([worker(queues=None)]), "waits to be claimed"),
        ({}, Fleet([worker(leases=3)]), "all 3 slots are taken"),
        ({}, Fleet([worker(breaker="open")]), "the endpoint is failing"),
        ({}, Fleet([worker(held="paused")]), "held"),
        ({}, Fleet([worker()], {"default": pause("default")}), "queue default is paused by ann: a"),
        ({}, Fleet([worker()], {"*": pause("*")}), "all queues are paused by ann"),
        ({}, Fleet([worker()], {}, {"s": RUN}), "its session is in a run: recall other"),
        ({}, Fleet([worker()], {}, {"s": {**RUN, "id": "r"}}), "waits to be claimed"),
        ({}, Fleet([worker()], copy=True), "this database is a copy"),
        ({"deferrals": 2, "reason": "busy"}, Fleet([worker()]), "deferred 2 times: busy"),
        ({"attempt": 1, "reason": "HTTP 500"}, Fleet([worker()]), "attempt 2 follows: HTTP 500"),
        ({"due_at": "later"}, Fleet(), "its time has not come"),
        ({"due_at": None}, Fleet(), "never due"),
        ({"status": None}, Fleet(), "its status is null"),
        ({"status": "failed", "reason": "HTTP 422"}, Fleet(), "HTTP 422"),
        ({"status": "cancelled", "reason": "busy"}, Fleet(), "cancelled by the application"),
    ],
)
def test_why_in_a_few_words(columns: dict[str, Any], fleet: Fleet, says: str) -> None:
    """Of a row that is due: what holds it back, first cause first."""
    from datetime import UTC, datetime, timedelta

    now = datetime(2027, 1, 31, 12, tzinfo=UTC)
    row = {
        "id": "r",
        "session_id": "s",
        "queue": "default",
        "status": "pending",
        "lease": None,
        "paused_at": None,
        "due_at": now - timedelta(minutes=5),
        "deferrals": 0,
        "attempt": 0,
        "reason": None,
        "last_outcome": None,
        "ended_at": None,
        **columns,
    }
    if row["due_at"] == "later":
        row["due_at"] = now + timedelta(hours=1)
    assert says in brief(row, fleet, now)


def as_a_browser_reads(value: str) -> str:
    """An attribute's value, or a text area's: Python's own reader drops controls."""
    return html.unescape(re.sub(r"&#(\d+);", lambda found: chr(int(found[1])), value))


def literal(text: str) -> str:
    """A text as SQL has it."""
    return psycopg.sql.Literal(text).as_string(None)


# --- what an adversary found ----------------------------------------------------------------------


async def pressed(site: Site, path: str, action: str) -> dict[str, str]:
    """The hidden fields of a button on a page."""
    text = main_of(await site.page(path))
    [form] = re.findall(rf'<form method="post" action="[^"]*/{action}">(.*?)</form>', text, re.S)
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', form))


async def acted(db: Connection) -> list[str]:
    """The actions on record."""
    rows = await (await db.execute("select action from recall_actions order by id")).fetchall()
    return [row["action"] for row in rows]


@contextlib.asynccontextmanager
async def silent(db: Connection) -> AsyncIterator[list[int]]:
    """The console's connections to PostgreSQL are frozen, as on a host that is suspended."""
    rows = await (
        await db.execute(
            "select pid from pg_stat_activity where datname = current_database() "
            "and application_name = 'recall-worker console'"
        )
    ).fetchall()
    assert len(rows) == CONNECTIONS
    pids = [row["pid"] for row in rows]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
async def test_what_was_given_up_is_not_done_later(
    site: Site, app: Application, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what waited for a connection nor what was sent to a silent PostgreSQL: a person was
    told that nothing was done. The next one finds a connection that answers."""
    monkeypatch.setattr(database_of_console, "PATIENCE", 1.0)
    for number in range(CONNECTIONS + 3):
        await put(app, db, f"r{number}")
    # Each page holds its connection until all are there.
    together = threading.Barrier(CONNECTIONS, timeout=30)
    asked = (site.console.database.ask(lambda conn: together.wait()) for _ in range(CONNECTIONS))
    await asyncio.gather(*asked)
    async with silent(db) as frozen:
        answers = await asyncio.gather(
            *(site.post(f"/recalls/r{number}/pause") for number in range(CONNECTIONS + 3))
        )
    assert [status for status, _, _ in answers].count(503) >= CONNECTIONS
    # One that waited may have got a new connection in time; on a slow machine perhaps not quite.
    undone = [
        f"r{number}"
        for number, (_, _, text) in enumerate(answers)
        if "Nothing was done, and nothing will be" in said(text)
    ]
    assert len(undone) >= CONNECTIONS
    for status, _, text in answers:
        assert status == 303 or 'http-equiv="refresh"' not in text

    async def gone() -> bool:
        rows = await db.execute(
            "select from pg_stat_activity where datname = current_database() and pid = any (%s)",
            [frozen],
        )
        return not await rows.fetchall()

    await until(gone)
    rows = await (
        await db.execute("select id from session_recalls where paused_at is not null order by id")
    ).fetchall()
    assert not {row["id"] for row in rows} & set(undone)
    assert (await site.post(f"/recalls/{undone[0]}/pause"))[0] == 303


async def test_a_commit_that_nobody_confirmed_is_in_doubt(
    site: Site, app: Application, db: Connection
) -> None:
    """Where the connection broke at the commit the page says that it is not known."""
    await put(app, db, "r1")
    await db.execute(
        "create function break_off() returns trigger language plpgsql as $$ begin "
        "perform pg_terminate_backend(pg_backend_pid()); return null; end $$"
    )
    await db.execute(
        "create constraint trigger break_off after insert on recall_actions "
        "deferrable initially deferred for each row execute function break_off()"
    )
    status, _, text = await site.post("/recalls/r1/pause")
    assert status == 503 and "Whether it was done is not known" in said(text), said(text)


@pytest.mark.parametrize("action", ["skip", "fire", "retry"])
async def test_a_second_click_does_nothing(
    action: str, site: Site, app: Application, db: Connection
) -> None:
    """Of what does more where it is done twice: the second click, the way back in the browser, a
    page that was drawn before somebody else acted. A program, and a new page, act again."""
    await put(app, db, "r1", call_type="'recurring'", interval_seconds="3600")
    if action == "retry":
        await db.execute("update session_recalls set status = 'failed', ended_at = now()")
    seen = await pressed(site, "/recalls/r1", action)
    answers = await asyncio.gather(*(site.post(f"/recalls/r1/{action}", **seen) for _ in range(3)))
    assert sorted(status for status, _, _ in answers) == [303, 409, 409]
    [text] = {said(text) for status, _, text in answers if status == 409}
    assert "has changed since the page was drawn" in text and "The recall, as it is now" in text
    assert await acted(db) == [action]
    if action == "skip":
        seen = await pressed(site, "/recalls/r1", action)
        assert (await site.post("/recalls/r1/skip", **seen))[0] == 303
        assert (await site.post("/recalls/r1/skip"))[0] == 303
        assert await acted(db) == ["skip"] * 3


async def test_a_page_of_yesterday_still_cancels(
    site: Site, app: Application, db: Connection
) -> None:
    """What ends in the same state however often it is done is done."""
    await put(app, db, "r1", call_type="'recurring'", interval_seconds="3600")
    seen = await pressed(site, "/recalls/r1", "cancel")
    assert (await site.post("/recalls/r1/skip"))[0] == 303
    assert (await site.post("/recalls/r1/cancel", **seen))[0] == 303
    assert (await site.post("/recalls/r1/cancel", **seen))[0] == 409


async def test_two_edit_one_recall(site: Site, app: Application, db: Connection) -> None:
    """The second is told that its form is old, and overwrites nothing that it did not show; what
    the other did not touch is written."""
    await put(app, db, "r1", call_type="'recurring'", interval_seconds="3600")
    form = dict(re.findall(r'name="(\w+)" value="([^"]*)"', await site.page("/recalls/r1/edit")))
    cron = form | {"every": "", "cron": "0 9 * * *", "time_zone": "UTC"}
    assert (await site.post("/recalls/r1/edit", **cron))[0] == 303
    status, _, text = await site.post("/recalls/r1/edit", **(form | {"every": "2h"}))
    assert status == 409 and "has changed since the page was drawn" in said(text)
    assert (await site.post("/recalls/r1/edit", **(form | {"grace": "10m"})))[0] == 303
    row = await (await db.execute("select cron, grace_seconds from session_recalls")).fetchone()
    assert row == {"cron": "0 9 * * *", "grace_seconds": 600}


async def test_a_hidden_message_is_not_edited(site: Site, app: Application, db: Connection) -> None:
    await put(app, db, "r1")
    for name in ("message", "comment"):
        status, _, text = await site.post("/recalls/r1/edit", **{name: "x"})
        assert status == 409 and "is hidden here" in said(text), said(text)
    assert await acted(db) == []


async def test_no_address_is_taken_for_that_of_health(
    database: str, app: Application, db: Connection
) -> None:
    """Only /healthz asks nobody who they are; a recall of that name is a recall."""
    for id in ("healthz", "x/healthz"):
        await put(app, db, id)
    async with served(database, TOKEN=TOKEN) as site:
        for path in ("/recalls/healthz", "/recalls/x%2Fhealthz", "/jobs/healthz", "/bulk/healthz"):
            assert (await site.get(path))[0] == 401, path
        for path in ("/recalls/r1/healthz", "/queues/healthz", "/bulk/healthz"):
            assert (await site.post(path))[0] == 401, path
            assert (await site.post(path, {}))[0] == 403, path
        assert (await site.get("/healthz"))[0] == 200


async def test_what_is_no_text_is_refused(database: str, app: Application, db: Connection) -> None:
    """Octets that are not UTF-8, in each place where they can come; and what is too much."""
    await put(app, db, "r1")
    async with served(database, TOKEN=TOKEN) as site:
        for name, value in (
            ("Cookie", f"{access.COOKIE}=a.\udcff"),
            ("Cookie", f"{access.COOKIE}=\udcff.b"),
            ("Authorization", "Bearer \udcff"),
            ("Authorization", "Basic eA=="),
        ):
            assert await answer(site, "GET", "/", {name: value}) == 401, (name, value)
        known = OURS | {"Authorization": f"Bearer {TOKEN}"}
        form = known | {"Content-Type": "application/x-www-form-urlencoded"}
        for headers, body, status in (
            (form, b"a=\xff", 422),
            (form, b"a=%ff", 422),
            (form, b"a=b&" * 2500, 422),
            (form | {"Content-Type": form["Content-Type"] + "; charset=none"}, b"in=%ff", 422),
            (form | {"Content-Encoding": "gzip"}, b"a=b", 400),
        ):
            assert await answer(site, "POST", "/recalls/r1/pause", headers, body) == status, body
        for path, status in (
            ("/recalls?" + "session=1&" * 300, 422),
            ("/recalls?" + "x=1&" * 2500, 422),
            ("/recalls?session=%ff", 422),
            ("/bulk/cancel?" + "".join(f"id={n:036}&" for n in range(500)) + "id=r1", 200),
        ):
            assert await answer(site, "GET", path, known) == status, path[:40]
    assert await acted(db) == []


async def answer(
    site: Site, method: str, path: str, headers: Mapping[str, str], body: bytes = b""
) -> int:
    """The status of a request that is sent octet by octet as it stands."""
    port = int(site.root.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(body)}"] if body else []
    writer.write("\r\n".join([*lines, "", ""]).encode(errors="surrogateescape") + body)
    async with asyncio.timeout(30):
        status = int((await reader.readline()).split()[1])
        await reader.read()
    writer.close()
    return status


async def test_a_user_who_is_named_twice_is_nobody(
    database: str, app: Application, db: Connection
) -> None:
    """A proxy that adds its header behind the client's own would let anybody be anybody."""
    await put(app, db, "r1")
    named = {"USER_HEADER": "X-User", "TRUSTED": "127.0.0.0/8"}
    async with served(database, **named) as site:
        twice = MultiDict([*OURS.items(), ("X-User", "ann"), ("X-User", "eve")])
        async with site.session.post(
            site.root + "/recalls/r1/pause", headers=twice, allow_redirects=False
        ) as response:
            assert response.status == 400 and "sent twice" in said(await response.text())
        code, _, _ = await site.post("/recalls/r1/pause", {**OURS, "X-User": "b\u202eo\tb"})
        assert code == 303
    rows = await (await db.execute("select actor from recall_actions")).fetchall()
    assert rows == [{"actor": "b\ufffdo\ufffdb"}]


async def test_a_name_that_cannot_be_stored(
    database: str, app: Application, db: Connection
) -> None:
    await put(app, db, "r1")
    async with served(database, TOKEN=TOKEN) as site:
        assert (await site.post("/login", token=TOKEN, name="a\0b"))[0] == 303
        assert (await site.post("/recalls/r1/pause"))[0] == 303
    rows = await (await db.execute("select actor from recall_actions")).fetchall()
    assert rows == [{"actor": "a\ufffdb"}]


@pytest.mark.parametrize(
    ("peer", "of"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unknown", "unknown"),
    ],
)
def test_whose_attempts_are_counted(peer: str, of: str) -> None:
    """One host has a network of addresses in IPv6."""
    assert access.whose(peer) == of


async def test_a_page_behind_the_last(site: Site, app: Application, db: Connection) -> None:
    await put(app, db, "r1")
    text = said(await site.page("/recalls?offset=1000"))
    assert "1 matches: none from number 1,001 on" in text and "shown" not in text


async def test_a_connection_that_broke_is_found_out_before_anything_is_done(
    site: Site, app: Application, db: Connection
) -> None:
    """After PostgreSQL was started again, each action finds a connection at once."""
    await put(app, db, "r1")
    together = threading.Barrier(CONNECTIONS, timeout=30)
    asked = (site.console.database.ask(lambda conn: together.wait()) for _ in range(CONNECTIONS))
    await asyncio.gather(*asked)
    ended = await db.execute(
        "select pg_terminate_backend(pid, 10000) from pg_stat_activity "
        "where datname = current_database() and application_name = 'recall-worker console'"
    )
    assert len(await ended.fetchall()) == CONNECTIONS
    assert (await site.post("/recalls/r1/pause"))[0] == 303
    assert await acted(db) == ["pause"]


async def test_a_standby_is_named_as_what_it_is(
    database: str, app: Application, db: Connection
) -> None:
    """It is no fault of the account's."""
    await put(app, db, "r1")
    reads = psycopg.conninfo.make_conninfo(database, options="-c default_transaction_read_only=on")
    async with served(reads) as site:
        text = await site.page("/recalls/r1")
        assert "<form" not in main_of(text) and "this PostgreSQL takes no writes" in text
        status, _, text = await site.post("/recalls/r1/pause")
        assert status == 403 and "give the primary's address" in said(text)


async def test_a_damaged_schema_is_no_fault_of_the_page(
    site: Site, app: Application, db: Connection
) -> None:
    await put(app, db, "r1")
    await db.execute("alter table session_recalls drop column grace_seconds")
    for path in ("/recalls/r1", "/recalls/r1/edit"):
        status, text = await site.get(path)
        assert status == 503 and "recall-worker migrate" in said(text)
    await db.execute("alter table session_recalls rename to elsewhere")
    status, _, text = await site.post("/recalls/r1/pause")
    assert status == 503 and "recall-worker migrate" in said(text)


async def test_a_queue_is_paused_in_the_words_of_the_command(
    site: Site, app: Application, db: Connection, database: str
) -> None:
    """Also that it was paused already, and by whom; that a name may be wrong; that all of them are
    paused still."""
    await put(app, db, "r1", queue="'mail'")
    assert operate(database, "queues", "pause", "mail", "--reason", "first").status == 0
    _, place, _ = await site.post("/queues/pause", queue="mail", reason="second")
    text = said(await site.page(place))
    assert "Queue mail: paused already, since" in text and "first" in text and "second" not in text
    _, place, _ = await site.post("/queues/pause", queue="mial")
    assert "no live worker serves it: is that its name?" in said(await site.page(place))
    assert (await site.post("/queues/pause", queue="*"))[0] == 303
    _, place, _ = await site.post("/queues/resume", queue="mail")
    assert "All queues are paused, so nothing is claimed" in said(await site.page(place))
    _, place, _ = await site.post("/queues/resume", queue="elsewhere")
    assert "Queue elsewhere: was not paused." in said(await site.page(place))
    _, place, _ = await site.post("/queues/resume", queue="*")
    text = said(await site.page(place))
    assert "All queues: resumed." in text and "nothing is claimed" not in text.partition(".")[0]


async def test_an_edit_in_the_words_of_the_command(
    database: str, app: Application, db: Connection
) -> None:
    """Who moves a recall to a queue is told that nobody serves it; a message is not emptied."""
    await put(app, db, "r1")
    async with served(database, MESSAGES="shown") as site:
        _, place, _ = await site.post("/recalls/r1/edit", queue="nobody")
        assert "Note: no live worker serves queue nobody." in said(await site.page(place))
        status, _, text = await site.post("/recalls/r1/edit", message="", was_message="look")
        assert status == 422 and "can be replaced, and not taken away" in said(text)


async def test_numbers_are_those_of_the_commands(
    site: Site, app: Application, db: Connection, database: str
) -> None:
    """What a tile and the table of queues count is what `stats` and `queues` count, and what the
    search behind the tile finds."""
    for number, columns in enumerate(
        (
            {"trigger_at": "now() - interval '2 minutes'"},
            {"trigger_at": "now() - interval '5 s'"},
            {},
            {"queue": "'mail'"},
            {"deferrals": "2", "lease_until": "now() + interval '1 minute'"},
            {"paused_at": "now()"},
            {
                "lease": "gen_random_uuid()",
                "lease_until": "now() + interval '1 minute'",
                "leased_by": "'w'",
                "leased_at": "now()",
            },
            {"status": "'failed'", "ended_at": "now()"},
            {"status": "'cancelled'"},
        )
    ):
        await put(app, db, f"r{number}", **columns)
    found = operate(database, "stats", "--json").document["live"]
    text = main_of(await site.page("/"))
    tiles = re.findall(r'<a class="tile[^"]*" href="([^"]*)"><strong>(\d+)</strong>', text)
    counts = {place: int(count) for place, count in tiles if place.startswith("/recalls?")}
    assert len(counts) == 6
    for place, count in counts.items():
        shown = said(await site.page(place))
        assert ("None matches" if not count else f"{count} match") in shown, (place, shown)
    for state, name in (("overdue",) * 2, ("due",) * 2, ("waiting",) * 2, ("paused",) * 2):
        assert counts[f"/recalls?state={state}"] == found[name], (state, found)
    assert counts["/recalls?state=in-run"] == 1 and counts["/recalls?state=deferred"] == 1
    queues = operate(database, "queues", "--json").document
    for row in queues:
        cells = re.findall(r"<td[^>]*>(.*?)</td>", text.partition(f">{row['queue']}</a>")[2])
        assert [int(cell) for cell in cells[:4]] == [
            row[name] for name in ("overdue", "due", "leased", "waiting")
        ], (row, cells)


async def test_a_foreign_page_draws_nothing_of_ours(site: Site) -> None:
    """On loopback nobody is asked who they are, and each page in a browser reaches it: one leads
    here by a link, and neither asks PostgreSQL by us nor keeps our streams."""
    for place, mode, dest, status in (
        ("cross-site", "navigate", "document", 200),
        ("same-site", "navigate", "document", 200),
        ("none", "navigate", "document", 200),
        ("same-origin", "cors", "empty", 200),
        ("cross-site", "no-cors", "image", 403),
        ("cross-site", "cors", "empty", 403),
        ("same-site", "no-cors", "script", 403),
        ("cross-site", "navigate", "iframe", 403),
    ):
        headers = {"Sec-Fetch-Site": place, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}
        assert (await site.get("/workers", **headers))[0] == status, headers
        assert (await site.get("/healthz", **headers))[0] == 200


@pytest.mark.parametrize(
    ("origin", "host", "ours"),
    [
        ("http://console.example.com:9465", "console.example.com:9465", True),
        ("https://console.example.com", "127.0.0.1:9465", True),
        ("https://console.example.com:8443", "console.example.com", True),
        ("https://console.example.com", "console.example.com:9465", True),
        ("http://console.example.com:8080", "console.example.com:9465", False),
        ("http://127.0.0.1:8080", "127.0.0.1:9465", False),
        ("http://localhost:8080", "localhost:9465", False),
    ],
)
def test_another_port_is_another_program(origin: str, host: str, ours: bool) -> None:
    """Over plain HTTP browsers say the origin alone."""
    found = Access(settings.read({"RECALL_CONSOLE_HOSTS": "console.example.com"}), lambda: None)
    assert found.is_from_our_pages({"Origin": origin, "Host": host}) == ours


async def test_a_link_of_another_site_finds_who_is_logged_in(database: str) -> None:
    """A browser holds the cookie back at first; a page of ours leads on, and then it comes."""
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    link |= {"Sec-Fetch-Dest": "document", "Accept": "text/html"}
    async with served(database, TOKEN=TOKEN, BASE_PATH="/c") as site:
        status, text = await site.get("/c/recalls/r1?x=a%26b", **link)
        [onward] = re.findall(r'http-equiv="refresh" content="0; url=([^"]*)"', text)
        assert status == 401
        assert html.unescape(onward) == "/c/login?to=%2Frecalls%2Fr1%3Fx%3Da%2526b"
        assert (await site.post("/c/login", token=TOKEN, name="bob"))[0] == 303
        for to, leads in (
            ("/recalls/r1?x=a%26b", "/c/recalls/r1?x=a%26b"),
            ("//evil.example/", "/c/"),
            ("/\\evil.example", "/c/"),
        ):
            async with site.session.get(
                f"{site.root}/c/login", params={"to": to}, allow_redirects=False
            ) as response:
                assert (response.status, response.headers["Location"]) == (302, leads)
