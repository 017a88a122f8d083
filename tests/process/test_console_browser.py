"""The console as a person has it: `recall-worker console` as a process, its pages in Chromium, and
a worker where something is to run.

What is shown is what Chromium shows. `person` fails where a page had an error of its own, asked for
something elsewhere, or tried what its policy forbids.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from aiohttp import ClientSession, web
from playwright.async_api import Browser, expect

from recall_worker import schema
from recall_worker.embedded import EmbeddedServer

from ..conftest import Connection, connected
from ..support import postgres
from ..support.application import CREATE_TABLES, Application
from ..support.browser import NARROW, TOO_WIDE, Person, chromium, person
from ..support.console import Console, console
from ..support.daemon import Daemons
from ..support.endpoint import Endpoint, Gate, reply
from ..support.postgres import free_port
from ..support.scene import FAILED, RUNNING, SOME, lay
from ..test_cli import operate

pytestmark = [chromium, pytest.mark.full, pytest.mark.timeout(420)]

TOKEN = "an-open-sesame-of-32-characters!"
AT_MOST = 5.0
"""Seconds from a commit until a page shows it. Where nothing else uses the machine it is a second,
and the time of a look and of a page; here much else does, so the test prints what it took."""
PAGES = (
    "/",
    "/agenda",
    "/agenda?span=week",
    "/recalls",
    "/recalls?state=live",
    "/recalls?state=failed",
    "/recalls?state=paused&queue=nowhere",
    f"/recalls/{SOME}",
    f"/recalls/{FAILED}",
    f"/recalls/{RUNNING}",
    f"/recalls/{SOME}/edit",
    f"/recalls/{SOME}/edit?cron=0+8+*+*+*&was_cron=x",
    f"/recalls/{SOME}/edit?cron=nonsense&was_cron=x",
    "/bulk/retry?state=failed",
    "/bulk/cancel?id=" + SOME,
    "/failures",
    "/failures?window=7d",
    "/queues",
    "/workers",
    "/settings",
    "/settings?health=1",
    "/recalls?id=" + "0" * 8,
    "/recalls?since=yesterday",
    "/nothing",
)
"""Every kind of page, with the scene's recalls; the last ones are errors."""
ERRORS = ("/recalls?id=" + "0" * 8, "/recalls?since=yesterday", "/nothing")
MODES: dict[str, dict[str, Any]] = {
    "light": {"width": 1280, "color_scheme": "light"},
    "dark": {"width": 1280, "color_scheme": "dark"},
    "narrow": {"width": NARROW, "color_scheme": "light"},
    "narrow, dark": {"width": NARROW, "color_scheme": "dark"},
}
NOTICE = """text => {
  const main = document.querySelector("main");
  const root = document.documentElement;
  delete root.dataset.noticed;
  const look = () => {
    if (!root.dataset.noticed && main.textContent.includes(text)) root.dataset.noticed = Date.now();
  };
  if (window.noticing) window.noticing.disconnect();
  window.noticing = new MutationObserver(look);
  window.noticing.observe(main, { subtree: true, childList: true, characterData: true });
  look();
}"""
"""Notes when a text stands on the page for the first time."""


@pytest.fixture
async def pages(database: str) -> AsyncIterator[Console]:
    """A console over an empty table."""
    async with console(database) as started:
        yield started


async def notices(someone: Person, text: str) -> float:
    """Wait until the text that was looked for stands there: seconds since 1970."""
    root = someone.page.locator("html")
    await expect(root).to_have_attribute("data-noticed", re.compile(r"^\d+$"))
    assert text in await someone.page.locator("main").inner_text()
    return float(await root.get_attribute("data-noticed") or "") / 1000


async def settled(someone: Person) -> None:
    """Wait until the page's stream is open, and has told its first news."""
    await someone.page.wait_for_load_state("load")
    await someone.page.evaluate(
        """() => new Promise((done) => {
          document.addEventListener("htmx:sseMessage", () => done(), { once: true });
          document.addEventListener("htmx:sseOpen", () => setTimeout(done, 1500), { once: true });
          setTimeout(done, 3000);
        })"""
    )


def pardon(someone: Person, *what: str) -> None:
    """Forget troubles that were meant to be."""
    someone.troubles = [
        trouble for trouble in someone.troubles if not any(word in trouble for word in what)
    ]


# --- live -----------------------------------------------------------------------------------------


async def test_what_is_committed_is_shown(
    browser: Browser, pages: Console, app: Application, db: Connection
) -> None:
    """The page Now shows a recall that the application inserts, and a recall's page shows that
    somebody paused it: measured in the page, from the commit."""
    late: dict[str, list[float]] = {"insert, on Now": [], "pause, on the recall": []}
    soon = datetime.now(UTC) + timedelta(minutes=10)
    async with (
        person(browser, pages.root) as ann,
        person(browser, None) as bob,
    ):
        await settled(ann)
        for n in range(8):
            session = f"inserted-{n}"
            await app.create_session(session, "ann")
            await ann.page.evaluate(NOTICE, session)
            await asyncio.sleep(0.13 * n)  # At every phase of the looks.
            await app.schedule(session, "once", soon, "look")
            committed = time.time()
            late["insert, on Now"].append(await notices(ann, session) - committed)
        await app.create_session("watched", "ann")
        id = await app.schedule("watched", "once", soon, "look")
        await bob.goes(f"{pages.root}/recalls/{id}")
        await settled(bob)
        for n in range(8):
            paused = n % 2 == 0
            word = "paused" if paused else "waiting"
            await bob.page.evaluate(
                NOTICE.replace("main.textContent", "main.querySelector('.badge').textContent"), word
            )
            await asyncio.sleep(0.13 * n)
            await db.execute(
                "update session_recalls set paused_at = "
                f"{'now()' if paused else 'null'} where id = %s",
                [id],
            )
            committed = time.time()
            late["pause, on the recall"].append(await notices(bob, word) - committed)
    for what, seconds in late.items():
        print(f"{what}: median {statistics.median(seconds):.2f} s, most {max(seconds):.2f} s")
        assert max(seconds) < AT_MOST, (what, seconds)


async def test_a_run_is_seen_to_begin_and_to_end(
    browser: Browser, pages: Console, app: Application, daemons: Daemons, endpoint: Endpoint
) -> None:
    """With a real worker: what runs stands on Now for as long as it does, and the recall's page
    goes from waiting to its end, with its call, untouched."""
    gate = Gate()
    endpoint.script("s1", gate, reply())
    await app.create_session("s1", "ann")
    id = await app.schedule("s1", "once", datetime.now(UTC) + timedelta(hours=1), "look")
    await daemons.start()
    async with (
        person(browser, pages.root) as ann,
        person(browser, f"{pages.root}/recalls/{id}") as bob,
    ):
        await expect(ann.page.locator("#live")).to_contain_text("Nothing runs.")
        await bob.page.evaluate("window.before = true")
        await app.connection.execute("update session_recalls set trigger_at = now()")
        await gate.entered.wait()
        running = ann.page.locator("section").filter(has_text="Running").locator("tbody tr")
        await expect(running.filter(has_text=id)).to_have_count(1)
        await expect(bob.page.locator("h1 .badge")).to_have_text("in a run")
        gate.open()
        await expect(bob.page.locator("h1 .badge")).to_have_text("fired")
        await expect(bob.page.locator("#recall")).to_contain_text("answered (HTTP 200)")
        await expect(running).to_have_count(0)
        assert await bob.page.evaluate("window.before"), "it was loaded again"


@pytest.fixture
def own_server() -> Any:
    """A PostgreSQL that a test may stop."""
    with postgres.embedded() as server:
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute(CREATE_TABLES.encode())
        schema.migrate(server.dsn())
        yield server


async def test_a_page_says_that_it_is_old_and_comes_back(
    browser: Browser, own_server: EmbeddedServer
) -> None:
    """While the console is gone, and while PostgreSQL is, each open page says since when; when it
    is back they show what has happened meanwhile, untouched. A page that is opened meanwhile says
    it, too, and comes by itself."""
    dsn = own_server.dsn()
    soon = datetime.now(UTC) + timedelta(minutes=10)

    async def schedule(session: str) -> str:
        async with await Application.connect(dsn) as app:
            await app.create_session(session, "ann")
            return await app.schedule(session, "once", soon, "look")

    async def pause(id: str, value: str) -> None:
        async with connected(dsn) as db:
            await db.execute(
                f"update session_recalls set paused_at = {value} where id = %s".encode(), [id]
            )

    id = await schedule("first")
    async with (
        console(dsn) as pages,
        person(browser, pages.root) as ann,
        person(browser, f"{pages.root}/recalls/{id}") as bob,
        person(browser, None) as eve,
    ):
        badge = bob.page.locator("h1 .badge")
        for someone in (ann, bob):
            await settled(someone)
            await someone.page.evaluate("window.before = true")
        # The console.
        await pages.stop()
        for someone in (ann, bob):
            await expect(someone.page.get_by_role("alert")).to_contain_text(
                "The console was last heard of at"
            )
        await pause(id, "now()")
        await schedule("while the console was gone")
        await pages.start()
        await expect(ann.page.locator("#live")).to_contain_text("while the console was gone")
        await expect(badge).to_have_text("paused")
        for someone in (ann, bob):
            await expect(someone.page.get_by_role("alert")).to_have_count(0)
        # PostgreSQL.
        own_server.shutdown()
        for someone in (ann, bob):
            await expect(someone.page.locator("#link")).to_contain_text(
                "What you see is as old as that"
            )
        assert await eve.goes(pages.root) == 503
        await expect(eve.page.get_by_role("alert")).to_contain_text("PostgreSQL has not answered")
        own_server.start()
        await pause(id, "null")
        await schedule("after PostgreSQL came back")
        await expect(ann.page.locator("#live")).to_contain_text("after PostgreSQL came back")
        await expect(eve.page.locator("#live")).to_contain_text("after PostgreSQL came back")
        await expect(badge).to_have_text("waiting")
        for someone in (ann, bob):
            await expect(someone.page.locator("#link")).to_be_empty()
            assert await someone.page.evaluate("window.before"), "it was loaded again"
        for someone in (ann, bob, eve):
            pardon(someone, "Failed to load resource", "net::ERR", "htmx:sseError")
            pardon(someone, "Status Error Code 503")
            # What htmx writes of a stream's error.
            someone.troubles = [trouble for trouble in someone.troubles if trouble != "Event"]


# --- doing ----------------------------------------------------------------------------------------


async def test_many_are_chosen_agreed_to_watched_and_stopped(
    browser: Browser, pages: Console, db: Connection
) -> None:
    """All that match a search, by clicking: what will be done is shown first, their number has to
    be typed, the page shows how far it is, and Stop stops it. What it says then is what was
    done."""
    number = 12_000
    await db.execute(
        "insert into sessions select 's' || n, 'ann' from generate_series(1, %s) n", [number]
    )
    await db.execute(
        "insert into session_recalls (id, session_id, call_type, trigger_at, "
        "additional_context_message, status, created_at, updated_at) select 'r' || n, 's' || n, "
        "'once', now() - interval '1 hour', 'look', 'pending', now(), now() "
        "from generate_series(1, %s) n",
        [number],
    )
    await db.execute(
        "update session_recalls set status = 'failed', ended_at = now(), reason = 'HTTP 500'"
    )
    async with person(browser, f"{pages.root}/recalls?state=failed") as ann:
        page = ann.page
        await page.get_by_role("button", name="Retry …").click()
        await expect(page.get_by_role("heading", level=1)).to_have_text("Retry 12,000 recalls?")
        await expect(page.locator("main tbody tr")).to_have_count(10)
        for typed, said in {"11": "'11' is not their number", "12000": ""}.items():
            await page.get_by_label("Their number").fill(typed)
            await page.get_by_role("button", name="Retry them").click()
            if said:
                await expect(page.get_by_role("alert")).to_contain_text(said)
        await expect(page.get_by_role("progressbar")).to_have_attribute(
            "value", re.compile(r"^[1-9]\d*$")
        )
        await page.get_by_role("button", name="Stop").click()
        state = page.locator("#job")
        await expect(state).to_contain_text("Stopped: the others are as they were.")
        said = await state.inner_text()
        [done] = re.findall(r"([\d,]+) of 12,000 recalls retried", said)
        row = await (
            await db.execute(
                "select count(*) filter (where status = 'pending') as done, "
                "(select count(*) from recall_actions where actor = 'ann' and via = 'console') "
                "as told from session_recalls"
            )
        ).fetchone()
        assert row == {"done": int(done.replace(",", "")), "told": int(done.replace(",", ""))}
        assert 0 < row["done"] < number
        pardon(ann, "status of 422")

        # Some, by their boxes: three need no number.
        await ann.goes(f"{pages.root}/recalls?state=failed")
        boxes = page.get_by_role("checkbox", name=re.compile("Select recall "))
        for n in range(3):
            await boxes.nth(n).check()
        chosen = [await boxes.nth(n).get_attribute("value") for n in range(3)]
        await page.get_by_role("button", name="Cancel …").click()
        pardon(ann, "status of 4")
        # Those that have failed can't be cancelled, and this is said.
        await expect(page.get_by_role("alert")).to_contain_text("o recall matches")
        await page.go_back()
        for n in range(3):
            await boxes.nth(n).check()
        await page.get_by_role("button", name="Retry …").click()
        await expect(page.get_by_role("heading", level=1)).to_have_text("Retry 3 recalls?")
        await page.get_by_role("button", name="Retry them").click()
        await expect(page.locator("#job")).to_contain_text("3 of 3 recalls retried")
        await expect(page.locator("#job")).to_contain_text("Done.")
        rows = await (
            await db.execute("select status from session_recalls where id = any(%s)", [chosen])
        ).fetchall()
        assert rows == [{"status": "pending"}] * 3
        pardon(ann, "status of 4")


async def test_an_edit_is_previewed_while_it_is_typed(
    browser: Browser, pages: Console, app: Application, db: Connection
) -> None:
    """Typing shows what would come and changes nothing; what can't be meant is said beside its
    field, and what was typed is not lost. Writing it writes it."""
    await app.create_session("s1", "ann")
    id = await app.schedule(
        "s1", "recurring", datetime.now(UTC) + timedelta(hours=1), "look", interval_seconds=3600
    )
    async with person(browser, f"{pages.root}/recalls/{id}/edit") as ann:
        page = ann.page
        preview = page.locator("#preview")
        every, cron = page.get_by_label("every (after each run)"), page.get_by_label("by cron")
        await expect(every).to_have_value("1h")
        await every.clear()
        await page.get_by_label("in the time zone").fill("Europe/Berlin")
        await cron.press_sequentially("30 9 * * mon")
        await expect(preview).to_contain_text("It would be: cron '30 9 * * mon' Europe/Berlin")
        moments = preview.locator("tbody tr")
        await expect(moments).to_have_count(10)
        for text in await moments.all_inner_texts():
            assert re.search(r"Mon \d{4}-\d\d-\d\d 09:30:00", text), text
        await cron.fill("30 25 * * *")
        await expect(page.locator("#wrong-cron")).to_contain_text("'30 25 * * *'")
        await page.get_by_label("grace").fill("soon")
        await cron.fill("30 10 * * *")
        await expect(page.locator("#wrong-grace")).to_contain_text("'soon' is not a duration")
        await expect(page.locator("#wrong-cron")).to_be_empty()
        row = await (await db.execute("select cron, edits from session_recalls")).fetchone()
        assert row == {"cron": None, "edits": 0}
        # Written as it stands: refused, and still there.
        await page.get_by_role("button", name="Write it").click()
        await expect(page.get_by_role("alert")).to_contain_text("'soon' is not a duration")
        await expect(page.locator("#wrong-grace")).to_contain_text("'soon' is not a duration")
        await expect(cron).to_have_value("30 10 * * *")
        pardon(ann, "status of 422")
        await page.get_by_label("grace").fill("10m")
        await expect(preview).to_contain_text("It would be: cron '30 10 * * *' Europe/Berlin")
        await page.get_by_role("button", name="Write it").click()
        await expect(page.get_by_role("status").first).to_contain_text("Done:")
        row = await (
            await db.execute("select cron, cadence, time_zone, grace_seconds from session_recalls")
        ).fetchone()
        assert row == {
            "cron": "30 10 * * *",
            "cadence": "cron",
            "time_zone": "Europe/Berlin",
            "grace_seconds": 600,
        }
        await expect(page.locator("#recall")).to_contain_text("edited by ann (console)")


# --- who ------------------------------------------------------------------------------------------


async def test_a_login_by_token(browser: Browser, database: str, app: Application) -> None:
    """Any page leads to the login, and the login to that page. A wrong token is said; what the
    right one sets is for this console alone; logging out ends it."""
    await app.create_session("s1", "ann")
    id = await app.schedule("s1", "once", datetime.now(UTC) + timedelta(hours=1), "look")
    async with (
        console(database, CONSOLE_TOKEN=TOKEN) as pages,
        person(browser, f"{pages.root}/recalls/{id}") as ann,
    ):
        page = ann.page
        await expect(page).to_have_url(re.compile(r"/login\?to="))
        assert await page.get_by_role("navigation").count() == 0
        for token in ("not-this-one", TOKEN):
            await page.get_by_label("Token").fill(token)
            await page.get_by_label("Your name").fill("Ann Smith")
            await page.get_by_role("button", name="Log in").click()
            if token != TOKEN:
                await expect(page.get_by_role("alert")).to_have_text("That is not the token.")
                pardon(ann, "status of 401")
        await expect(page).to_have_url(f"{pages.root}/recalls/{id}")
        await expect(page.locator("footer")).to_contain_text("Ann Smith")
        [cookie] = [one for one in await page.context.cookies() if one["name"] == "recall_console"]
        assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/")
        assert 0 < cookie["expires"] - time.time() <= 12 * 3600 + 5
        assert TOKEN not in cookie["value"] and cookie["name"] not in await page.evaluate(
            "document.cookie"
        )
        await page.get_by_role("button", name="Pause").click()
        await expect(page.locator("#recall")).to_contain_text("paused by Ann Smith (console)")
        await page.get_by_role("button", name="log out").click()
        await expect(page).to_have_url(f"{pages.root}/login")
        await ann.goes(f"{pages.root}/workers")
        await expect(page).to_have_url(re.compile("/login"))
        assert TOKEN not in str(pages.daemon.events) + str(pages.daemon.talk)


async def test_who_only_reads_is_shown_no_button(
    browser: Browser, database: str, db: Connection
) -> None:
    """With an account in recall_reader every page is there, says so, and has neither a form nor a
    button in what it shows; live pages are live."""
    lay(database)
    await db.execute(
        "do $$ begin create role console_reader login; exception when duplicate_object then null; "
        "end $$"
    )
    assert operate(database, "migrate", "--roles").status == 0
    await db.execute("grant recall_reader to console_reader")
    reader = psycopg.conninfo.make_conninfo(database, user="console_reader")
    async with console(reader) as pages, person(browser, None) as ann:
        for path in PAGES:
            if path in ERRORS or "/edit" in path or "/bulk" in path or "health" in path:
                continue
            assert await ann.goes(pages.root + path) == 200, path
            await expect(ann.page.locator(".bar-note")).to_contain_text("may not change recalls")
            assert await ann.page.locator("main form, main button").count() == 0, path
        await ann.goes(pages.root)
        await settled(ann)
        await ann.page.evaluate(NOTICE, "all, since")
        await db.execute("insert into recall_queues (queue, paused_by) values ('*', 'bob')")
        await notices(ann, "all, since")


class ReverseProxy:
    """Shows a console below /ops/recalls, and says who the user is; `strayed` are requests that
    came for something else."""

    def __init__(self, root: str) -> None:
        self._root = root
        self.strayed: list[str] = []
        self.passed: list[str] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if not re.match(r"/ops/recalls(/|$)", request.path):
            self.strayed.append(request.path_qs)
            raise web.HTTPNotFound
        self.passed.append(request.path_qs)
        kept = {k: v for k, v in request.headers.items() if k.lower() != "x-forwarded-user"}
        async with self._session.request(
            request.method,
            self._root + request.raw_path,
            headers=kept | {"X-Forwarded-User": "maria"},
            data=await request.read(),
            allow_redirects=False,
        ) as found:
            headers = found.headers.copy()
            for name in ("Transfer-Encoding", "Content-Length", "Content-Encoding"):
                headers.popall(name, None)
            response = web.StreamResponse(status=found.status, headers=headers)
            await response.prepare(request)
            async for piece in found.content.iter_any():
                await response.write(piece)
        return response

    @classmethod
    @asynccontextmanager
    async def serve(cls, root: str) -> AsyncIterator[tuple[ReverseProxy, str]]:
        proxy = cls(root)
        application = web.Application(client_max_size=1 << 20)
        application.router.add_route("*", "/{path:.*}", proxy.answer)
        runner = web.AppRunner(application, shutdown_timeout=1)
        await runner.setup()
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        async with ClientSession(auto_decompress=True) as proxy._session:
            try:
                yield proxy, f"http://127.0.0.1:{port}/ops/recalls"
            finally:
                await runner.cleanup()

    _session: ClientSession


async def test_below_a_path_behind_a_proxy_that_knows_the_user(
    browser: Browser, database: str, db: Connection
) -> None:
    """Every link, form, request of htmx, stream and redirect stays below the path; the user is who
    the proxy says, and without the proxy nobody."""
    lay(database)
    settings = {
        "CONSOLE_BASE_PATH": "/ops/recalls",
        "CONSOLE_USER_HEADER": "X-Forwarded-User",
        "CONSOLE_TRUSTED": "127.0.0.1/32",
    }
    async with (
        console(database, 0, **settings) as pages,
        ReverseProxy.serve(pages.root) as (proxy, root),
        person(browser, f"{root}/") as ann,
    ):
        page = ann.page
        await expect(page.locator("footer")).to_contain_text("maria")
        await settled(ann)
        await page.evaluate(NOTICE, "all, since")
        await db.execute("insert into recall_queues (queue, paused_by) values ('*', 'bob')")
        await notices(ann, "all, since")
        names = await page.get_by_role("navigation").get_by_role("link").all_inner_texts()
        for name in names:
            await page.get_by_role("navigation").get_by_role("link", name=name).click()
            current = page.locator("nav a[aria-current=page]")
            await expect(current).to_have_text(name)
            here = await page.locator("a[href], form[action]").evaluate_all(
                "all => all.map(one => new URL(one.href || one.action).pathname)"
            )
            assert all(place.startswith("/ops/recalls") for place in here), here
        await page.keyboard.press("g")
        await page.keyboard.press("r")
        await expect(page).to_have_url(f"{root}/recalls")
        await page.locator("#jump").fill(SOME[:8])
        await page.locator("#jump").press("Enter")
        await expect(page).to_have_url(f"{root}/recalls/{SOME}")
        await page.get_by_role("button", name="Pause").click()
        await expect(page.locator("#recall")).to_contain_text("paused by maria (console)")
        await page.get_by_role("link", name="Edit").click()
        await page.get_by_label("by cron").fill("0 8 * * *")
        await expect(page.locator("#preview")).to_contain_text("It would be: cron '0 8 * * *'")
        assert proxy.strayed == []
        assert any(path.startswith("/ops/recalls/live?") for path in proxy.passed)
        assert any("/preview?" in path for path in proxy.passed)
        await ann.goes(f"{pages.root}/ops/recalls/")
        await expect(page.get_by_role("alert")).to_contain_text("did not say who you are")
        pardon(ann, "status of 401")


# --- for everybody --------------------------------------------------------------------------------


@pytest.fixture
async def scene(database: str) -> AsyncIterator[Console]:
    """A console over the made-up day, with texts shown."""
    lay(database)
    async with console(database, CONSOLE_MESSAGES="shown") as started:
        yield started


@pytest.mark.parametrize("script", [True, False], ids=["with JavaScript", "without"])
async def test_every_page_on_a_telephone(browser: Browser, scene: Console, script: bool) -> None:
    """No page has to be scrolled sideways, nothing is cut off, and without JavaScript everything
    can be read."""
    async with person(browser, None, NARROW, 800, java_script_enabled=script) as ann:
        for path in PAGES:
            status = await ann.goes(scene.root + path)
            assert (status == 200) == (path not in ERRORS), path
            assert await ann.too_wide() <= 0, path
            cut = await ann.page.evaluate(CUT_OFF)
            assert cut == [], (path, cut)
            text = await ann.page.locator("main").inner_text()
            assert len(text) > 20, path
        await ann.goes(f"{scene.root}/recalls/{SOME}")
        text = await ann.page.locator("main").inner_text()
        for words in ("Not due until", "09:30:00", "answered (HTTP 200)", "paused by maria"):
            assert words in text, words
        assert not script or await ann.page.locator("td[data-name]").count() > 0
        pardon(ann, "status of 4")


CUT_OFF = """() => [...document.querySelectorAll("main *")].filter((one) => {
  const box = one.getBoundingClientRect();
  return box.width > 1 && box.right > document.documentElement.clientWidth + 1 &&
    !one.closest(".hidden, thead");
}).slice(0, 5).map((one) => one.outerHTML.slice(0, 200))"""
"""What of a page lies beyond its right edge."""


async def test_light_and_dark(browser: Browser, scene: Console) -> None:
    """As the reader's system is."""
    grounds = []
    for scheme in ("light", "dark"):
        async with person(browser, scene.root, color_scheme=scheme) as ann:
            colours = await ann.page.evaluate(
                "(({ backgroundColor, color }) => [backgroundColor, color])"
                "(getComputedStyle(document.body))"
            )
            grounds.append([sum(map(int, re.findall(r"\d+", c)[:3])) for c in colours])
    (light, ink), (dark, pale) = grounds
    assert light > 600 > ink and dark < 150 < pale, grounds


async def test_keys(browser: Browser, scene: Console) -> None:
    """j and k go through the rows, x selects, Enter opens, / goes to the field, ? shows all."""
    async with person(browser, f"{scene.root}/recalls?state=failed") as ann:
        page = ann.page
        rows = page.locator("main tbody tr")
        for key, at in {"j": 0, "j ": 1, "j  ": 2, "k": 1}.items():
            await page.keyboard.press(key.strip())
            await expect(rows.nth(at)).to_have_class(re.compile(r"\bat\b"))
            await expect(page.locator("tr.at")).to_have_count(1)
        await page.keyboard.press("x")
        await expect(rows.nth(1).get_by_role("checkbox")).to_be_checked()
        await page.keyboard.press("?")
        keys = page.get_by_role("dialog")
        await expect(keys).to_be_visible()
        await page.keyboard.press("Escape")
        await expect(keys).to_be_hidden()
        await page.keyboard.press("/")
        await expect(page.locator("#jump")).to_be_focused()
        await page.keyboard.type("j")  # A letter, there.
        await expect(page.locator("#jump")).to_have_value("j")
        await page.keyboard.press("Escape")
        await page.keyboard.press("k")
        id = await rows.nth(0).locator("a.id").first.get_attribute("title")
        await page.keyboard.press("Enter")
        await expect(page).to_have_url(f"{scene.root}/recalls/{id}")
        for key, place in {"n": "/", "w": "/workers", "s": "/settings"}.items():
            await page.keyboard.press("g")
            await page.keyboard.press(key)
            await expect(page).to_have_url(scene.root + place)


@pytest.mark.parametrize("mode", MODES)
async def test_axe_finds_nothing(
    browser: Browser, scene: Console, database: str, mode: str
) -> None:
    """No violation of WCAG 2.2, A and AA, on any page, the login's included."""
    found: dict[str, list[str]] = {}
    async with (
        console(database, CONSOLE_TOKEN=TOKEN) as guarded,
        person(browser, None, **MODES[mode]) as ann,
    ):
        alike = {"/agenda?span=week", "/recalls", "/failures?window=7d", "/recalls?id=" + "0" * 8}
        paths = [path for path in PAGES if path not in alike]
        for address in (*(scene.root + path for path in paths), guarded.root + "/login"):
            await ann.goes(address)
            if violations := await ann.violations():
                found[address.partition("/")[2]] = violations
        await ann.goes(scene.root)
        await ann.page.keyboard.press("?")
        await expect(ann.page.get_by_role("dialog")).to_be_visible()
        if violations := await ann.violations():
            found["keys"] = violations
        pardon(ann, "status of 4")
    assert found == {}, "\n".join(f"{path}: {one}" for path in found for one in found[path])


# --- hostile rows ---------------------------------------------------------------------------------

TAKEN = "window.taken=1"
ELSEWHERE = "http://elsewhere.invalid/x"
HOSTILE = (
    f"<img src=x onerror={TAKEN}>",
    f"<script>{TAKEN}</script>",
    f"</script><script>{TAKEN}</script>",
    f"\"'><svg onload={TAKEN}><style>*{{display:none}}</style>",
    f'" autofocus onfocus={TAKEN} x="',
    f"<iframe src=javascript:{TAKEN}></iframe><base href=//elsewhere.invalid>",
    f"javascript:{TAKEN}",
    f"<meta http-equiv=refresh content='0;url={ELSEWHERE}'><link rel=stylesheet href={ELSEWHERE}>",
    f"<div hx-get={ELSEWHERE} hx-trigger=load hx-on:load={TAKEN} sse-connect={ELSEWHERE}>",
    "{{7*7}}{% for x in ().__class__.__base__.__subclasses__() %}{{x}}{% endfor %}${7*7}",
    "--><!--]]>&lt;b&gt;&#x3c;&amp;amp;%3Cb%3E\\u003cb\\x3e",
    "a\x1b[31mred\x1b]0;t\x07\n\r\tb\u202egnihton\u2066\u200b\x9b2J\u2028\x7f\ufeff",
    "\nevent: page\ndata: <b>taken</b>\n\n",
    "../../..;/%2e%2e%2f?a=b&c#d",
    "W" * 4_000,
    "\u0e49" * 300 + "\U0001f469\u200d\U0001f469\u200d\U0001f467" * 40 + "\ufdfd" * 40,
)


async def hostile(dsn: str) -> list[str]:
    """Rows whose every text is hostile, past the triggers that would refuse some; the texts that
    could stand there."""
    stored = []
    async with await psycopg.AsyncConnection.connect(dsn) as conn:
        await conn.execute(b"set session_replication_role = replica")

        async def tried(statement: str, values: dict[str, Any]) -> bool:
            try:
                async with conn.transaction():
                    await conn.execute(statement.encode(), values)
                return True
            except (psycopg.errors.DataError, psycopg.errors.IntegrityError):
                return False

        for n, text in enumerate(HOSTILE):
            values = {"text": text, "n": n}
            assert await tried("insert into sessions values (%(text)s, %(text)s)", values)
            assert await tried(
                "insert into session_recalls (id, session_id, call_type, trigger_at, "
                "internal_comment, additional_context_message, status, created_at, updated_at) "
                "values (%(text)s, %(text)s, (array['once', 'recurring'])[1 + %(n)s %% 2], "
                "now() + (%(n)s - 8) * interval '5 minutes', %(text)s, %(text)s, 'pending', now(), "
                "now())",
                values,
            )
            for column in (
                "reason",
                "last_outcome",
                "leased_by",
                "queue",
                "cron",
                "time_zone",
                "run_reference",
                "body_hash",
                "zone_data",
            ):
                await tried(
                    f"update session_recalls set {column} = %(text)s where id = %(text)s", values
                )
            for change in (
                "cadence = 'cron' where %(n)s %% 4 = 1 and id = %(text)s",
                "status = 'failed', ended_at = now() where %(n)s %% 4 = 2 and id = %(text)s",
                "lease = gen_random_uuid(), leased_at = now(), lease_until = now() + interval "
                "'1 hour' where %(n)s %% 4 = 3 and id = %(text)s",
                "deferrals = 2 where id = %(text)s",
            ):
                await tried(f"update session_recalls set {change}", values)
            assert await tried(
                "insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome, "
                "session_id, worker, lease, scheduled_for, called_at, last_called_at, ended_at, "
                "http_status, reason, settled) values (%(text)s, 1, 0, 1, %(text)s, %(text)s, "
                "%(text)s, gen_random_uuid(), now(), now(), now(), now(), 500, %(text)s, %(text)s)",
                values,
            )
            assert await tried(
                "insert into recall_actions (actor, via, action, recall_id, detail) values "
                "(%(text)s, %(text)s, 'edit', %(text)s, jsonb_build_object(%(text)s::text, "
                "%(text)s::text, 'cron', jsonb_build_object('from', %(text)s::text, 'to', "
                "%(text)s::text)))",
                values,
            )
            assert await tried(
                "insert into recall_workers (worker, host, pid, version, slots, breaker, settings, "
                "bell, queues) values (%(text)s, %(text)s, 1, %(text)s, 3, %(text)s, "
                "jsonb_build_object('run_url', %(text)s::text, 'protocol', %(text)s::text), "
                "%(text)s, array[%(text)s])",
                values,
            )
            await tried(
                "insert into recall_queues (queue, paused_by, reason) values "
                "(%(text)s, %(text)s, %(text)s)",
                values,
            )
            stored.append(text)
    return stored


async def test_hostile_rows_are_only_text(browser: Browser, database: str) -> None:
    """Every text of every row, on every page: no script of it runs, nothing is asked for elsewhere,
    the policy has nothing to refuse, and the page keeps its shape."""
    texts = await hostile(database)
    async with (
        console(database, CONSOLE_MESSAGES="shown") as pages,
        person(browser, None, NARROW, 800) as ann,
    ):
        place = [f"/recalls/{quote(text, safe='')}" for text in texts]
        paths = [
            *("/", "/agenda", "/agenda?span=week", "/recalls", "/recalls?state=live"),
            *("/recalls?state=failed", "/failures", "/queues", "/workers", "/settings?health=1"),
            *("/bulk/pause?state=waiting", "/bulk/retry?state=failed"),
            *place,
            *(f"{one}/edit" for one in place),
            *(f"/recalls?session={quote(text, safe='')}" for text in texts[:10]),
            *(f"/recalls?id={quote(text, safe='')}" for text in texts[:10]),
            *(f"/agenda?queue={quote(text, safe='')}" for text in texts[:10]),
            *(f"/recalls?state={quote(text, safe='')}" for text in texts[:4]),
        ]
        for path in paths:
            status = await ann.goes(pages.root + path)
            assert status in (200, 409, 422), (path[:80], status)
            assert status == 200 or path not in ("/", *place), (path[:80], status)
            assert await ann.page.evaluate("window.taken") is None, path
            assert (
                await ann.page.evaluate(
                    "document.querySelectorAll('main :is(img, iframe, "
                    "script, style, base, meta, link, object)').length"
                )
                == 0
            ), path
            assert await ann.too_wide() <= 0, (path[:80], await ann.page.evaluate(CUT_OFF))
            pardon(ann, "the server responded with a status of 4")
            assert ann.troubles == [], path
        # What is pushed is text, too.
        await ann.goes(pages.root)
        await settled(ann)
        assert await ann.page.evaluate("window.taken") is None
        assert "<b>taken</b>" not in await ann.page.locator("#live").inner_html()
        # Nothing of the page's own lets a script in: the policy refuses what is inline.
        await ann.page.evaluate(
            "text => { const trap = document.createElement('div'); trap.innerHTML = text; "
            "document.body.append(trap); }",
            f"<img src='data:,' onerror={TAKEN}>",
        )
        await expect(ann.page.locator("body > div img")).to_have_count(1)
        async with asyncio.timeout(60):
            while not any("refused by the policy" in trouble for trouble in ann.troubles):
                await ann.page.evaluate("1")
        assert await ann.page.evaluate("window.taken") is None
        ann.troubles.clear()


async def test_wide_windows_keep_their_shape(browser: Browser, database: str) -> None:
    """The same rows in a window of a desk: no page has to be scrolled sideways."""
    texts = await hostile(database)
    async with console(database) as pages, person(browser, None, 1280, 800) as ann:
        for path in (
            *("/", "/agenda", "/recalls", "/failures", "/queues", "/workers"),
            *(f"/recalls/{quote(text, safe='')}" for text in texts),
        ):
            await ann.goes(pages.root + path)
            wide = await ann.page.evaluate(TOO_WIDE)
            assert wide <= 0, (path[:80], wide, await ann.page.evaluate(CUT_OFF))
