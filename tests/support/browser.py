"""People at pages in Debian's Chromium, driven by Playwright: what a page shows, by roles and
labels, and everything that went wrong in it.

`Person.troubles` has what no page of ours may do: errors of its scripts, lines of its console that
are errors, what the content security policy refused, dialogs of scripts, and requests to elsewhere.

Never here: what any page is about.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Browser, Dialog, Page, Request, async_playwright, expect

CHROMIUM = shutil.which("chromium")
PATIENCE = 60.0
"""Seconds for what takes a moment here: the machine may be slow."""
NARROW = 380
"""Pixels: the width of a small telephone."""
AXE = "4.14.1"
"""axe-core's version, from npm."""
AXE_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
WATCH = """
document.addEventListener("securitypolicyviolation", (event) => {
  window.__refused(`${event.violatedDirective}: ${event.blockedURI} ${event.sample}`);
});
"""
expect.set_options(timeout=PATIENCE * 1000)

chromium = pytest.mark.skipif(CHROMIUM is None, reason="not installed: chromium")


@asynccontextmanager
async def chromium_browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        started = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield started
        await started.close()


class Person:
    """Somebody at a page."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.troubles: list[str] = []
        self.root = ""
        """The origin that everything has to come from; empty: not known yet."""
        page.set_default_timeout(PATIENCE * 1000)
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.on(
            "console",
            lambda line: self.troubles.append(line.text) if line.type == "error" else None,
        )
        page.on("request", self._requested)
        page.on("dialog", self._asked)
        self.state = page.get_by_role("status")

    def _requested(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if self.root and f"{parts.scheme}://{parts.netloc}" != self.root:
            self.troubles.append(f"a request to elsewhere: {request.url}")

    async def _asked(self, dialog: Dialog) -> None:
        self.troubles.append(f"a dialog: {dialog.message}")
        await dialog.dismiss()

    async def goes(self, address: str) -> int:
        """Open a page; the status of its answer."""
        parts = urlsplit(address)
        self.root = f"{parts.scheme}://{parts.netloc}"
        answer = await self.page.goto(address)
        assert answer is not None
        return answer.status

    async def too_wide(self) -> int:
        """Pixels by which the page has to be scrolled sideways."""
        return int(await self.page.evaluate(TOO_WIDE))

    async def violations(self) -> list[str]:
        """What axe-core finds on the page as it is, a line each."""
        await self.page.evaluate(axe())
        found = await self.page.evaluate(
            "tags => axe.run(document, { runOnly: { type: 'tag', values: tags }, resultTypes: "
            "['violations'], elementRef: false })",
            AXE_RULES,
        )
        return [
            f"{one['id']} ({one['help']}): {node['target']} {node['html'][:200]} "
            f"{(node['any'] or [{}])[0].get('message', '')}"
            for one in found["violations"]
            for node in one["nodes"]
        ]


P = TypeVar("P", bound=Person)


@asynccontextmanager
async def at_a_page(
    browser: Browser, address: str | None, of: type[P], width: int, height: int = 720, **more: Any
) -> AsyncIterator[P]:
    """Somebody of this kind at a page of their own, in a window of this size. At the end the page
    must have had no trouble."""
    async with AsyncExitStack() as stack:
        context = await browser.new_context(
            viewport={"width": width, "height": height},
            **{"locale": "en-GB", "timezone_id": "UTC"} | more,
        )
        stack.push_async_callback(context.close)
        someone = of(await context.new_page())
        await context.expose_function(
            "__refused", lambda what: someone.troubles.append(f"refused by the policy: {what}")
        )
        await context.add_init_script(WATCH)
        if address is not None:
            await someone.goes(address)
        yield someone
        assert someone.troubles == [], someone.troubles


@asynccontextmanager
async def person(
    browser: Browser, address: str | None, width: int = 1000, height: int = 720, **more: Any
) -> AsyncIterator[Person]:
    """The same of a person."""
    async with at_a_page(browser, address, Person, width, height, **more) as someone:
        yield someone


@cache
def axe() -> str:
    """axe-core's source, from npm, of one version. Skips the test where there is no npm, or no way
    to its registry."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("not installed: npm, which brings axe-core")
    with tempfile.TemporaryDirectory(prefix="recall-axe-") as folder:
        words = ("install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts")
        done = subprocess.run(
            [npm, *words, "--prefix", folder, f"axe-core@{AXE}"],
            capture_output=True,
            text=True,
            check=False,
        )
        source = Path(folder, "node_modules", "axe-core", "axe.min.js")
        if not source.exists():
            pytest.skip(f"npm brings no axe-core {AXE}: {done.stderr.strip()[-300:]}")
        return source.read_text(encoding="utf-8")
