"""The loop: looks as often as is worth it, keys as they come, a screen whenever it has changed. And
the terminal, which is as before on every way out.

A look follows the last one after a second at the earliest, whatever happens: after LIVELY while
something is due, runs, or was just heard of, else after QUIET. While PostgreSQL does not answer it
is tried again, for as long as the person likes. Between looks the screen is drawn once a second.

Ctrl-Z gives the terminal back for as long as the process is stopped. Where stdout or stdin is no
terminal, or one that can't be moved about in (TERM=dumb), one picture is printed.

Never here: what a key means (view), what is drawn (frame).
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psycopg
from rich.console import Console, RenderableType

from .. import settings
from ..database.connection import DatabaseUnavailable, error_text
from ..terminal import Trouble, explain, print_json, warn_of_password
from .feed import Feed
from .frame import Link, frame, page, sections
from .picture import Picture
from .view import View, keys

LEAST = 1.0
"""Seconds between the beginnings of two looks, at least."""
LIVELY, QUIET = 1.0, 5.0
"""Seconds until the next look while something goes on, and while nothing does."""
SHARE = 0.1
"""Part of the time, at most, that PostgreSQL spends on looks, as long as QUIET allows that."""
TYPED_AFTER = 0.4
"""Seconds without a key until a filter that is being typed is asked for."""
ESCAPE_AFTER = 0.05
"""Seconds after which an Escape is one, and not the beginning of a key's sequence."""
FAILURES = (psycopg.Error, DatabaseUnavailable, Trouble, settings.SettingsError)
"""How a look fails."""

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[H\x1b[2J"
_LEAVE = "\x1b[?25h\x1b[?1049l"
_BEGIN, _END = "\x1b[?2026h\x1b[H", "\x1b[J\x1b[?2026l"
"""Around a frame: a terminal that knows it shows all of it at once."""
_TO_THE_END = "\x1b[K"


def top(dsn: str | None, *, needle: str | None, as_json: bool) -> int:
    """The command. Returns the exit status; raises what `terminal.explain` knows."""
    warn_of_password(dsn)
    # What it warns of would stand in the middle of the screen; each failure is shown there anyway.
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)
    settings.read(needed=["dsn"], dsn=dsn)
    feed = Feed(lambda: settings.read(needed=["dsn"], dsn=dsn))
    view = View(needle=needle or "")
    if not as_json and _is_movable():
        return asyncio.run(Screen(feed, view).run())
    picture = asyncio.run(_once(feed, view))
    if as_json:
        print_json(picture.document())
    else:
        width = shutil.get_terminal_size().columns
        print(_text(frame(picture, (width, None), view, Link(listening=True)), width), flush=True)
    return 0


def _is_movable() -> bool:
    return (
        sys.stdin is not None
        and sys.stdin.isatty()
        and sys.stdout.isatty()
        and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")
    )


async def _once(feed: Feed, view: View) -> Picture:
    try:
        return await feed.look(view.needle.lower() or None)
    finally:
        feed.close()


def _text(drawn: RenderableType, width: int, *, height: int | None = None) -> str:
    """What is drawn as text: with colours where the terminal has them and the person wants them
    (rich reads NO_COLOR and TERM)."""
    movable = height is not None
    console = Console(
        file=io.StringIO(),
        force_terminal=movable,
        force_interactive=False,
        width=width,
        height=height,
        markup=False,
        emoji=False,
        highlight=False,
        legacy_windows=False,
        color_system="auto" if movable else None,
    )
    with console.capture() as captured:
        console.print(drawn, soft_wrap=False)
    return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))


class Terminal:
    """The terminal, while it shows the screen."""

    def __init__(self) -> None:
        self._before = termios.tcgetattr(sys.stdin.fileno())
        self._is_ours = False

    def enter(self) -> None:
        """Keys come one by one and unseen, and the screen is another one. Ctrl-C and Ctrl-Z go on
        to be signals. Also where it is ours, but somebody else has set it."""
        was, self._is_ours = self._is_ours, True
        tty.setcbreak(sys.stdin.fileno(), termios.TCSANOW)
        if not was:
            self._write(_ENTER)

    def leave(self) -> None:
        """As it was before. Does nothing the second time, and raises nothing where the terminal is
        gone."""
        if self._is_ours:
            self._is_ours = False
            with suppress(OSError, ValueError):
                self._write(_LEAVE)
            with suppress(termios.error, OSError, ValueError):
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._before)

    def draw(self, drawn: RenderableType, size: tuple[int, int]) -> None:
        text = _text(drawn, size[0], height=size[1])
        self._write(_BEGIN + text.replace("\n", f"{_TO_THE_END}\r\n") + _TO_THE_END + _END)

    def _write(self, text: str) -> None:
        encoding = sys.stdout.encoding or "utf-8"
        data = text.encode(encoding, "replace")
        while data:
            try:
                data = data[os.write(sys.stdout.fileno(), data) :]
            except BlockingIOError:
                time.sleep(0.01)  # A terminal that somebody made non-blocking, and that is slow.

    @property
    def size(self) -> tuple[int, int]:
        columns, lines = os.get_terminal_size(sys.stdout.fileno())
        return columns or 80, lines or 24


class Screen:
    def __init__(self, feed: Feed, view: View) -> None:
        self._feed = feed
        self._view = view
        self._terminal = Terminal()
        self._picture: Picture | None = None
        self._taken = 0.0
        """Monotonic instant at which the picture was true."""
        self._held_at: float | None = None
        self._lost_at: float | None = None
        self._reason = ""
        self._begun = b""
        """Octets that may be the beginning of a key."""
        self._changed = asyncio.Event()
        """Whether the loop has something to do before its time."""
        self._status: int | None = None
        """Set when it is to end."""
        self._looked_at = -LEAST
        self._pressed_at = -TYPED_AFTER

    async def run(self) -> int:
        """Show the screen until the person or a signal ends it; returns the exit status. What fails
        before the first picture is raised, and shows no screen."""
        try:
            await self._look()
            with self._signals(), self._reading():
                self._terminal.enter()
                looking = asyncio.create_task(self._keep_looking())
                try:
                    await self._draw_on(looking)
                finally:
                    looking.cancel()
                    await asyncio.wait((looking,))
        finally:
            self._terminal.leave()
            self._feed.close()
        return self._status or 0

    # --- looks ------------------------------------------------------------------------------------

    @property
    def _needle(self) -> str | None:
        return self._view.needle.lower() or None

    async def _look(self) -> None:
        """One look. Raises FAILURES."""
        self._looked_at = time.monotonic()
        self._feed.heard.clear()
        picture = await self._feed.look(self._needle)
        if not self._view.held:
            # Its moment is that of the transaction's beginning.
            self._picture, self._taken = picture, time.monotonic() - picture.took
        self._lost_at = None

    async def _keep_looking(self) -> None:
        """Look as often as is worth it, until cancelled."""
        while True:
            await self._wait_for_the_next()
            try:
                await self._look()
            except FAILURES as failure:
                if self._lost_at is None:
                    self._lost_at = self._looked_at
                self._reason = _reason(failure)
            self._changed.set()

    async def _wait_for_the_next(self) -> None:
        picture = self._picture
        assert picture is not None
        least = max(LEAST, min(picture.took / SHARE, QUIET))
        asked = self._needle
        until = self._looked_at + least
        await asyncio.sleep(max(0.0, until - time.monotonic()))
        until = self._looked_at + max(least, LIVELY if self._is_lively(picture) else QUIET)
        while (
            not self._feed.heard.is_set()
            and self._needle == asked == picture.needle
            and self._lost_at is None
            and (left := until - time.monotonic()) > 0
        ):
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, 0.2)):
                    await self._feed.heard.wait()
        while True:
            typed = self._pressed_at + TYPED_AFTER if self._view.typing else 0.0
            if not self._view.held and time.monotonic() >= typed:
                return
            await asyncio.sleep(0.1)

    def _is_lively(self, picture: Picture) -> bool:
        """Whether something goes on, or falls due before the next quiet look."""
        soon = any(-picture.age(row["due_at"]) < 2 * QUIET for row in picture.next[:1])
        return soon or bool(picture.runs) or any(row["breaker"] == "open" for row in picture.alive)

    # --- the screen -------------------------------------------------------------------------------

    def _link(self) -> Link:
        now = time.monotonic() if self._held_at is None else self._held_at
        return Link(
            elapsed=max(0.0, now - self._taken),
            listening=self._feed.listening,
            lost_for=None if self._lost_at is None else max(0.0, time.monotonic() - self._lost_at),
            reason=self._reason,
        )

    async def _draw_on(self, looking: asyncio.Task[None]) -> None:
        """Draw whenever something has changed, and once a second. Returns when it is to end."""
        while self._status is None and not looking.done():
            self._changed.clear()
            picture = self._picture
            assert picture is not None
            link, size = self._link(), self._terminal.size
            self._terminal.draw(frame(picture, size, self._view, link), size)
            # Spans change when PostgreSQL's clock has another second.
            tick = 1.0 - (picture.now.microsecond / 1e6 + link.elapsed) % 1.0
            with suppress(TimeoutError):
                async with asyncio.timeout(tick + 0.005):
                    await self._changed.wait()
        if looking.done():
            await looking  # It has failed.

    # --- keys and signals -------------------------------------------------------------------------

    def _press(self, names: list[str]) -> None:
        picture = self._picture
        if picture is None:
            return
        self._pressed_at = time.monotonic()
        for name in names:
            link, size = self._link(), self._terminal.size
            rows, seen = page(picture, size, self._view, link)
            shown = tuple(s.name for s in sections(picture, self._view, size[0], link.elapsed))
            self._view = self._view.press(name, rows, seen, shown)
        if self._view.held and self._held_at is None:
            self._held_at = time.monotonic()
        elif not self._view.held and self._held_at is not None:
            self._held_at = None
        if self._view.quit:
            self._status = 0
        self._changed.set()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Keys, within it."""
        loop = asyncio.get_running_loop()
        stdin = sys.stdin.fileno()
        late: asyncio.TimerHandle | None = None

        def ended() -> None:
            names, self._begun = keys(self._begun, ended=True)
            self._press(names)

        def read() -> None:
            nonlocal late
            if late is not None:
                late.cancel()
            try:
                data = os.read(stdin, 4096)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                # The terminal is gone.
                self._end(128 + signal.SIGHUP)
                loop.remove_reader(stdin)
                return
            names, self._begun = keys(self._begun + data, ended=False)
            self._press(names)
            if self._begun:
                late = loop.call_later(ESCAPE_AFTER, ended)

        loop.add_reader(stdin, read)
        try:
            yield
        finally:
            if late is not None:
                late.cancel()
            loop.remove_reader(stdin)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """What signals do, within it."""
        loop = asyncio.get_running_loop()
        acts: dict[signal.Signals, Callable[[], None]] = {
            signal.SIGINT: lambda: self._end(0),
            signal.SIGTERM: lambda: self._end(128 + signal.SIGTERM),
            signal.SIGHUP: lambda: self._end(128 + signal.SIGHUP),
            signal.SIGWINCH: self._changed.set,
            signal.SIGTSTP: self._stop,
            signal.SIGCONT: self._go_on,
        }
        for number, act in acts.items():
            loop.add_signal_handler(number, act)
        try:
            yield
        finally:
            for number in acts:
                loop.remove_signal_handler(number)

    def _end(self, status: int) -> None:
        self._status = status
        self._changed.set()

    def _stop(self) -> None:
        """Ctrl-Z: the terminal is the shell's until we are continued."""
        loop = asyncio.get_running_loop()
        self._terminal.leave()
        loop.remove_signal_handler(signal.SIGTSTP)
        os.kill(os.getpid(), signal.SIGTSTP)
        loop.add_signal_handler(signal.SIGTSTP, self._stop)
        self._go_on()

    def _go_on(self) -> None:
        """Continued, also after a stop that nobody told us of: the shell has set the terminal to
        its own modes."""
        self._terminal.enter()
        self._feed.heard.set()
        self._changed.set()


def _reason(failure: BaseException) -> str:
    """Why a look failed, for people. (That PostgreSQL does not answer is said already.)"""
    if isinstance(failure, psycopg.OperationalError | DatabaseUnavailable):
        return error_text(failure)
    known = explain(failure)
    return error_text(failure) if known is None else known.what
