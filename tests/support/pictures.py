"""`python -m tests.support.pictures FOLDER`: every page of the console in Chromium, light, dark and
narrow, as PNG, over a day that was made up (scene.py).

    python -m tests.support.pictures /tmp/pictures
    python -m tests.support.pictures --docs        # those that docs/console.md shows

Look at them after each change of a template or of the style sheet.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path

import psycopg
from playwright.async_api import Browser, Page

from recall_worker import schema

from . import postgres
from .application import CREATE_TABLES
from .browser import NARROW, chromium_browser, person
from .console import Console, console
from .scene import FAILED, RUNNING, SOME, lay

DOCS = Path(__file__).resolve().parents[2] / "docs" / "pictures"
TOKEN = "correct-horse-battery-staple"
WAYS = {
    "light": {"width": 1280, "height": 800},
    "dark": {"width": 1280, "height": 800, "color_scheme": "dark"},
    "narrow": {"width": NARROW, "height": 800},
    "narrow-dark": {"width": NARROW, "height": 800, "color_scheme": "dark"},
}
SHOWN = {
    ("now", "light"): "console-now",
    ("agenda", "light"): "console-agenda",
    ("recalls", "dark"): "console-recalls",
    ("recall", "light"): "console-recall",
    ("edit", "light"): "console-edit",
    ("choice", "light"): "console-choice",
    ("failures", "dark"): "console-failures",
    ("queues", "narrow"): "console-queues",
    ("workers", "light"): "console-workers",
    ("recall-failed", "narrow-dark"): "console-recall-narrow",
    ("job", "light"): "console-job",
}
"""What docs/console.md shows: page and way, and the file's name. The upper part of each."""

Show = Callable[[Page, str], Awaitable[None]]


async def _goes(page: Page, address: str) -> None:
    await page.goto(address)


async def _edit(page: Page, root: str) -> None:
    """With the preview of another rule."""
    await page.goto(f"{root}/recalls/{SOME}/edit")
    await page.get_by_label("by cron").fill("0 8 * * mon,thu")
    await page.get_by_text("It would be").wait_for()


async def _edit_wrong(page: Page, root: str) -> None:
    await page.goto(f"{root}/recalls/{SOME}/edit")
    await page.get_by_label("by cron").fill("0 25 * * *")
    await page.locator("#preview .alert").wait_for()


async def _keys(page: Page, root: str) -> None:
    await page.goto(f"{root}/recalls?state=failed")
    await page.keyboard.press("?")


async def _job(page: Page, root: str) -> None:
    """A job that has ended."""
    await page.goto(f"{root}/bulk/retry?state=failed")
    count = page.get_by_label("number")
    if await count.count():
        heading = await page.get_by_role("heading", level=1).inner_text()
        await count.fill("".join(c for c in heading if c.isdigit()))
    await page.get_by_role("button", name="Retry").click()
    await page.locator("#job .good").wait_for()


PAGES: dict[str, str | Show] = {
    "now": "/",
    "agenda": "/agenda",
    "agenda-week": "/agenda?span=week",
    "recalls": "/recalls?state=live",
    "recalls-failed": "/recalls?state=failed",
    "recalls-none": "/recalls?state=paused&queue=nowhere",
    "recall": f"/recalls/{SOME}",
    "recall-failed": f"/recalls/{FAILED}",
    "recall-running": f"/recalls/{RUNNING}",
    "edit": _edit,
    "edit-wrong": _edit_wrong,
    "choice": "/bulk/retry?state=failed",
    "failures": "/failures",
    "queues": "/queues",
    "workers": "/workers",
    "settings": "/settings",
    "health": "/settings?health=1",
    "error": "/recalls/nobody",
    "error-search": "/recalls?since=yesterday",
    "keys": _keys,
}


@asynccontextmanager
async def served() -> AsyncIterator[tuple[Console, Console]]:
    """Two consoles over the scene: as it is on this host, and one that asks for a token."""
    with postgres.server() as maintenance, postgres.database(maintenance) as dsn:
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(CREATE_TABLES.encode())
        schema.migrate(dsn)
        lay(dsn, version("recall-worker"))
        shown = {"CONSOLE_MESSAGES": "shown"}
        async with (
            console(dsn, 0, **shown) as plain,
            console(dsn, CONSOLE_TOKEN=TOKEN) as guarded,
        ):
            yield plain, guarded


async def take(folder: Path, wanted: Mapping[tuple[str, str], str], *, whole: bool) -> None:
    """Pictures of pages, each in a way, by their files' names. `whole`: else what a window shows at
    first."""
    async with chromium_browser() as browser, served() as (plain, guarded):
        for (page, way), name in wanted.items():
            file = folder / f"{name}.png"
            if page == "login":
                await _picture(browser, guarded.root, "/login", way, file, whole)
            elif page != "job":
                await _picture(browser, plain.root, PAGES[page], way, file, whole)
        if jobs := {way: name for (page, way), name in wanted.items() if page == "job"}:
            # It changes what the others show.
            async with person(browser, None) as someone:
                await _job(someone.page, plain.root)
                job = someone.page.url.removeprefix(plain.root)
            for way, name in jobs.items():
                await _picture(browser, plain.root, job, way, folder / f"{name}.png", whole)


async def _picture(
    browser: Browser, root: str, page: str | Show, way: str, file: Path, whole: bool
) -> None:
    async with person(browser, None, **WAYS[way]) as someone:  # type: ignore[arg-type]
        if isinstance(page, str):
            await someone.goes(root + page)
        else:
            await page(someone.page, root)
        await someone.page.screenshot(path=file, full_page=whole, animations="disabled")
        someone.troubles = [t for t in someone.troubles if "status of 4" not in t]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.pictures")
    parser.add_argument("folder", type=Path, nargs="?", help="where they are written")
    parser.add_argument("--docs", action="store_true", help="those that docs/console.md shows")
    parser.add_argument("--only", default=",".join(PAGES), metavar="PAGE,…")
    parser.add_argument("--ways", default=",".join(WAYS), metavar="WAY,…")
    given = parser.parse_args()
    if given.docs:
        asyncio.run(take(DOCS, SHOWN, whole=False))
        return
    if given.folder is None:
        parser.error("a folder, or --docs")
    given.folder.mkdir(parents=True, exist_ok=True)
    pages, ways = given.only.split(","), given.ways.split(",")
    every = {(page, way): f"{page}-{way}" for way in ways for page in (*pages, "login", "job")}
    asyncio.run(take(given.folder, every, whole=True))


if __name__ == "__main__":
    main()
