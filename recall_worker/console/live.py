"""The live picture: at most one look a second for all open pages together, none while no page is
open.

A page listens to its stream. A look follows a notification at once, so that a change that notifies
is shown within some milliseconds; what notifies nobody (a pause, the end of a run, a recall that is
due in an hour) is found by the regular look. On average a second lies between two looks, however
much is notified; after a quiet while two may be close. Where LISTEN is impossible (a transaction
pooler without RECALL_LISTEN_DSN, a standby) there are the regular looks alone.

What differs from page to page (an agenda, a search, failures) is a question: pages that show the
same share it, and a look asks at most one besides its own. So a hundred pages cost PostgreSQL what
one does, and each is the longer out of date the more of them differ.

After each look a page's part is rendered once for all that show it in the same time zone, and sent
where it differs from what was sent before. Each reader has room for the newest text of each kind
alone: one that reads slowly misses what was replaced, and holds nobody up.

Never here: how a part is drawn (the templates), what a question asks (questions), and the questions
of a look (top.feed).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import errors

from .. import settings, statements
from ..database.connection import DatabaseUnavailable, error_text
from ..settings import Settings
from ..terminal import Trouble, explain
from ..top.feed import Feed
from ..top.picture import Picture
from .database import Database
from .questions import Question, Rows, mark, marks_of

LEAST = 1.0
"""Seconds between two looks, on average, at least."""
EVERY, EVERY_UNHEARD = 1.5, 1.0
"""Seconds until the next look where nothing is notified: while notifications arrive, and where they
can't. The first is longer than LEAST, so that a look is left for the next notification."""
SHARE, RARELY = 0.1, 10.0
"""Part of the time, at most, that PostgreSQL spends on looks, as long as a look each RARELY seconds
allows that."""
AFRESH = 10.0
"""Seconds after which a part is rendered anew, and a question asked again, where nothing changed:
it says how long ago things were."""
REFUSED_FOR = 60.0
"""Seconds for which a question is left alone that took too long."""
ONCE_FOR = 0.5
"""Seconds for which a picture serves all pages that are opened while none is live."""
READERS_MOST = 1000
"""Open streams."""
BEAT = 15.0
"""Seconds after which a stream without news says that it is alive."""
GONE_WITHIN = 1.0
"""Seconds within which it is noticed that a page was closed."""
WATCHED_MOST = 200
"""Recalls whose pages are kept up to date."""
FAILURES = (psycopg.Error, DatabaseUnavailable, Trouble, settings.SettingsError)


class Pace:
    """When the next look may be. Pure: instants are given, monotonic, in seconds.

    A look costs one; one comes back each LEAST seconds, and two are kept at most. So looks that
    follow notifications are one a second, and the first after a quiet while is at once.
    """

    def __init__(self) -> None:
        self._kept, self._at = 1.0, 0.0
        self._last = -RARELY
        self._took = 0.0

    def looked(self, began: float, took: float) -> None:
        """Note a look. `took`: seconds from the question to the answer."""
        self._kept = min(2.0, self._kept + (began - self._at) / self._least) - 1.0
        self._at = self._last = began
        self._took = took

    @property
    def _least(self) -> float:
        return max(LEAST, min(self._took / SHARE, RARELY))

    def wait(self, now: float, *, heard: bool, every: float) -> float:
        """Seconds until the next look. `heard`: whether something was notified since the last one;
        `every`: where nothing was."""
        least = self._least
        allowed = self._at + (1.0 - self._kept) * least
        wanted = self._last if heard else self._last + max(every, least)
        return max(0.0, allowed - now, wanted - now)


@dataclass(eq=False)
class Reader:
    """One open page."""

    part: str
    """What it shows: a template's name, `recall`, or a question's."""
    zone: str
    recall: str | None = None
    question: Question | None = None
    seen: frozenset[str] = frozenset()
    """Marks of the rows as the page shows them."""
    _news: dict[str, str] = field(default_factory=dict)
    """By event, the newest text that was not read yet."""
    _came: asyncio.Event = field(default_factory=asyncio.Event)
    _told: str = ""
    """What it was last told of a question, or of a recall."""

    def push(self, event: str, text: str) -> None:
        self._news[event] = text
        self._came.set()

    def show(self, event: str, text: str, key: str) -> None:
        """Push a text, unless it is the one that was told before, by its key."""
        if key != self._told:
            self._told = key
            self.push(event, text)

    async def next(self, patience: float) -> dict[str, str]:
        """What has come; nothing where nothing did for so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._came.wait()
        news, self._news = self._news, {}
        self._came.clear()
        return news


@dataclass
class Asked:
    """What is known of a question whose pages are open."""

    question: Question
    at: float = -AFRESH
    """When it was last asked."""
    stale: bool = True
    """Whether something has changed since."""
    refused_until: float = 0.0
    found: tuple[Rows, Picture] | None = None


class Live:
    def __init__(
        self,
        settings: Callable[[], Settings],
        database: Database,
        render: Callable[[str, str, Picture], str],
        draw: Callable[[Question, str, Rows, Picture], str],
        draw_number: Callable[[int], str],
        say: Callable[[str], str],
    ) -> None:
        """`render(part, zone, picture)`: a part as it is now. `draw(question, zone, rows,
        picture)`: the same of a question's answer; `draw_number(number)`: that so many rows have
        changed. `say(reason)`: the words for PostgreSQL's silence, in a page."""
        self._feed = Feed(settings, name="recall-worker console live")
        self._feed_once = Feed(settings, name="recall-worker console page", listens=False)
        self._asking: asyncio.Task[Picture] | None = None
        self._once: Picture | None = None
        self._once_at = 0.0
        self._database = database
        self._render = render
        self._draw = draw
        self._draw_number = draw_number
        self._say = say
        self._readers: set[Reader] = set()
        self._task: asyncio.Task[None] | None = None
        self._pace = Pace()
        self.picture: Picture | None = None
        """The newest one, while pages are open."""
        self.looks = 0
        self.rendered = 0
        self._known: dict[str, str] = {}
        """Marks of the watched recalls as the last look found them."""
        self._trouble = ""
        self._parts: dict[tuple[str, str], tuple[Any, float, str]] = {}
        """By part and zone: what it was made of, when, and the text."""
        self._asked: dict[str, Asked] = {}
        """By the question's key."""

    @property
    def readers(self) -> int:
        return len(self._readers)

    @property
    def listening(self) -> bool:
        """Whether notifications arrive, while pages are open."""
        return self._feed.listening

    def stir(self) -> None:
        """Something was changed here: it is looked at as if it had been notified."""
        if self._readers:
            self._feed.heard.set()

    @asynccontextmanager
    async def reading(self, reader: Reader) -> AsyncIterator[Reader]:
        """A page is open."""
        self._readers.add(reader)
        if reader.question is not None:
            self._asked.setdefault(reader.question.key, Asked(reader.question))
        if self._task is None or self._task.done():
            self._feed.heard.set()
            self._task = asyncio.create_task(self._go_on())
        elif self.picture is not None:
            self._tell_parts({reader})
            self._tell_answers({reader})
            self._tell_changed({reader})
        if self._trouble:
            reader.push("link", self._trouble)
        try:
            yield reader
        finally:
            self._readers.discard(reader)

    async def once(self) -> Picture:
        """A picture for a page that is being opened: asked for by itself, and for all who want one
        now."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_once())
        return await asyncio.shield(self._asking)

    async def _ask_once(self) -> Picture:
        try:
            if time.monotonic() - self._once_at < ONCE_FOR and self._once is not None:
                return self._once
            self._once = await self._feed_once.look(None)
            self._once_at = time.monotonic()
            self._database.found()
            return self._once
        except FAILURES as error:
            self._database.lost(error_text(error))
            raise

    # --- looks ------------------------------------------------------------------------------------

    async def _go_on(self) -> None:
        """Look until nobody watches."""
        try:
            while await self._wait():
                heard = self._feed.heard.is_set()
                self._feed.heard.clear()
                began = time.monotonic()
                await self._look(heard)
                self._pace.looked(began, 0.0 if self.picture is None else self.picture.took)
        finally:
            self._feed.close()
            self.picture = None
            self._parts.clear()
            self._known.clear()
            self._asked.clear()

    async def _wait(self) -> bool:
        """Until it is time for a look. Returns whether somebody watches."""
        while self._readers:
            heard = self._feed.heard.is_set()
            every = EVERY if self._feed.listening else EVERY_UNHEARD
            rest = self._pace.wait(time.monotonic(), heard=heard, every=every)
            if rest <= 0:
                return True
            if heard:
                await asyncio.sleep(rest)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(rest, GONE_WITHIN)):
                        await self._feed.heard.wait()
        return False

    async def _look(self, heard: bool) -> None:
        """`heard`: whether it follows a notification."""
        watched = list(
            Counter(reader.recall for reader in self._readers if reader.recall is not None)
        )[:WATCHED_MOST]
        also: dict[str, tuple[str, Mapping[str, Any]]] = {}
        if watched:
            also["watched"] = (statements.load("console")["watched"], {"watched": watched})
        asked = self._next_question(heard)
        if asked is not None:
            # Last, as they change what follows them in the transaction.
            also |= asked.question.statements
        self.looks += 1
        try:
            picture = await self._feed.look(None, also)
        except errors.QueryCanceled as error:
            if asked is None:
                self._lose(error)
                return
            # It is the question's own patience, as a rule, which is shorter than a look's.
            asked.refused_until = time.monotonic() + REFUSED_FOR
            self._feed.heard.set()
            return
        except FAILURES as error:
            self._lose(error)
            return
        self._database.found()
        if self._trouble:
            self._trouble = ""
            for reader in self._readers:
                reader.push("link", "")
        changed = self.picture is None or _differs(self.picture, picture)
        self.picture = picture
        rows = self._feed.also
        if changed or heard:
            for other in self._asked.values():
                other.stale = True
        if asked is not None:
            asked.at, asked.stale = time.monotonic(), False
            asked.found = (rows, picture)
        self._known = dict.fromkeys(watched, "")
        self._known |= {row["id"]: mark(row) for row in rows.get("watched", ())}
        self._tell_parts(self._readers)
        self._tell_answers(self._readers)
        self._tell_changed(self._readers)

    def _next_question(self, heard: bool) -> Asked | None:
        """The one that is asked with this look: the oldest of those that may have changed. What no
        page shows any more is forgotten."""
        shown = {
            (reader.part if reader.question is None else reader.question.key, reader.zone)
            for reader in self._readers
        }
        keys = {key for key, _ in shown}
        self._asked = {key: asked for key, asked in self._asked.items() if key in keys}
        self._parts = {key: part for key, part in self._parts.items() if key in shown}
        now = time.monotonic()
        due = [
            asked
            for asked in self._asked.values()
            if asked.refused_until < now and (heard or asked.stale or now - asked.at > AFRESH)
        ]
        return min(due, key=lambda asked: asked.at, default=None)

    def _lose(self, error: BaseException) -> None:
        """PostgreSQL did not answer: say so, once."""
        known = explain(error)
        reason = error_text(error) if known is None else known.what
        self._database.lost(reason)
        trouble = self._say(reason)
        if trouble != self._trouble:
            self._trouble = trouble
            for reader in self._readers:
                reader.push("link", trouble)

    # --- what readers are told --------------------------------------------------------------------

    def _tell_parts(self, readers: set[Reader]) -> None:
        """Those that show a part of the picture."""
        picture = self.picture
        assert picture is not None
        groups: dict[tuple[str, str], list[Reader]] = {}
        for reader in readers:
            if reader.recall is None and reader.question is None:
                groups.setdefault((reader.part, reader.zone), []).append(reader)
        for (part, zone), members in groups.items():
            before = self._parts.get((part, zone))
            text = self._rendered(
                part,
                zone,
                _content(picture),
                lambda part=part, zone=zone: self._render(part, zone, picture),  # type: ignore[misc]
            )
            for reader in members:
                if before is None or before[2] != text or readers is not self._readers:
                    reader.push("page", text)

    def _tell_answers(self, readers: set[Reader]) -> None:
        """Those whose question was answered: by its text, or by how many of the rows that they
        show have changed."""
        for reader in readers:
            question = reader.question
            asked = None if question is None else self._asked.get(question.key)
            if question is None or asked is None or asked.found is None:
                continue
            rows, picture = asked.found
            if question.is_searched:
                marks = marks_of(rows["rows"])
                number = max(len(marks - reader.seen), len(reader.seen - marks))
                if number or reader._told:
                    reader.show("stale", self._draw_number(number), str(number))
            else:
                text = self._rendered(
                    question.key,
                    reader.zone,
                    question.content(rows, picture),
                    lambda q=question, z=reader.zone, r=rows, p=picture: self._draw(q, z, r, p),  # type: ignore[misc]
                )
                reader.show("page", text, text)

    def _rendered(self, part: str, zone: str, content: Any, render: Callable[[], str]) -> str:
        """A part as it is now, rendered once for all who show it."""
        made, at, text = self._parts.get((part, zone), (None, 0.0, ""))
        now = time.monotonic()
        if made is None or now - at > AFRESH or made != content:
            text = render()
            self.rendered += 1
            self._parts[part, zone] = (content, now, text)
        return text

    def _tell_changed(self, readers: set[Reader]) -> None:
        """Those that show one recall."""
        for reader in readers:
            if reader.recall in self._known:
                now = self._known[reader.recall]
                if not reader._told:
                    # A page that was cut off, and has asked for the recall since, may show another
                    # state than the one in which it was opened; from here on each change is told.
                    reader._told = next(iter(reader.seen), now)
                    reader.push("watched", "")
                if now != reader._told:
                    reader.show("changed", "", now or "gone")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._feed_once.close()


def _differs(one: Picture, other: Picture) -> bool:
    """Whether two pictures show something else, but for the time that has passed."""
    return _content(one) != _content(other)


def _content(picture: Picture) -> tuple[Any, ...]:
    workers = [
        {name: value for name, value in row.items() if name not in ("now", "seen_at", "settings")}
        for row in picture.workers
    ]
    return (
        picture.copy,
        picture.counts,
        picture.next,
        picture.runs,
        picture.failures,
        picture.failed,
        workers,
        picture.paused_queues,
        picture.endpoints,
    )


def event(name: str, text: str) -> bytes:
    """An event of a stream. A text is sent in lines, as it may have line breaks."""
    data = "".join(f"data: {line}\n" for line in text.replace("\r", "").split("\n"))
    return f"event: {name}\n{data}\n".encode()
