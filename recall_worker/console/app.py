"""The console's HTTP: addresses, who is let in, answers, and the process.

`/` now, `/agenda`, `/recalls`, `/recalls/{id}`, `/workers`, `/failures`, `/queues`, `/settings`,
`/healthz`; actions are POSTs, answered 303. Errors are pages: a sentence and what to do, and of
PostgreSQL's silence since when. Every page may be asked for at any time: questions are bounded, and
what takes too long is given up and said.

Never here: what a page shows (pages), what an action does (acting), what is sent live (live).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import resource
import secrets
import signal
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import psycopg
from aiohttp import hdrs, web
from multidict import MultiDict, MultiDictProxy
from psycopg import errors

from .. import cadence
from .. import settings as setting
from ..database.connection import error_text
from ..events import Events
from ..operations.actions import By
from ..operations.connection import Damaged, clock
from ..secret_files import Secrets
from ..selection import FILTERS, OUTCOMES, PREFIX_LEAST, STATES, SelectionError
from ..settings import ALL_QUEUES, Settings, queue_problem
from ..signals import hangups
from ..terminal import UNREACHABLE, USAGE, ZONE, Trouble, explain
from ..top.picture import Picture
from . import acting, pages
from .access import COOKIE, COOKIE_FOR, Access, Locked, User, host_of
from .acting import Job, Many, act_on_one, action_of
from .agenda import SPANS
from .database import Connection, Database, Doubt
from .live import BEAT, GONE_WITHIN, READERS_MOST, Live, Reader, event
from .pages import FIELDS_MOST
from .questions import WINDOWS, Question, Rows, agenda_of, failures_of, mark, marks_of
from .rendering import STATIC, Templates, digest, read_in

BODY_MOST = 256 * 1024
"""Octets of a POST: an edit's message is the longest of what is sent."""
BODY_PATIENCE = 20.0
"""Seconds in which it must have come."""
LINE_MOST = 64 * 1024
"""Octets of an address or of a header: a page's recalls may all be selected."""
IDLE_MOST = 75.0
"""Seconds in which a connection must have sent a whole request, the first one or the next one. A
proxy keeps its own for up to a minute."""
READS = ("GET", "HEAD")
FORM = "application/x-www-form-urlencoded"
STOP_PATIENCE = 5.0
"""Seconds that batches, and answers, get to end when the console stops."""
NICE = 10
"""How far the process gives way to others on its machine (`man nice`)."""
SEND_PATIENCE = 20.0
"""Seconds in which a reader of a stream must take what is sent."""
NOTE_FOR, NOTES_MOST = 120.0, 1000
"""Seconds for which a sentence waits for the page that shows it, and how many wait."""
HEALTH_FOR = 30.0
"""Seconds for which an examination is shown again."""
ZONE_COOKIE = "recall_zone"
ASKED = ("span", "queue", "window")
"""Parameters by which an agenda, or failures, are chosen."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
NAVIGATION = (
    ("now", "/", "Now"),
    ("agenda", "/agenda", "Agenda"),
    ("recalls", "/recalls", "Recalls"),
    ("failures", "/failures", "Failures"),
    ("queues", "/queues", "Queues"),
    ("workers", "/workers", "Workers"),
    ("settings", "/settings", "Settings"),
)
STATUS_WORDS = {
    400: "This can't be asked",
    401: "Who are you?",
    403: "Not allowed",
    404: "Nothing here",
    405: "Not in this way",
    408: "Too slow",
    409: "It does not apply",
    413: "Too much",
    422: "This can't be asked",
    429: "Too many tries",
    500: "A defect",
    503: "PostgreSQL does not answer as it should",
}

USER = web.RequestKey[User | None]("user", User)
ZONE_NAME = web.RequestKey("zone", str)

Health = tuple[float, Sequence[object], str]
"""When it was examined, what was found, and how it is in all."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Refused(Exception):
    """An answer that is a page of its own."""

    def __init__(self, status: int, what: str, *hints: str, onward: str | None = None) -> None:
        """`onward`: where the page leads by itself, at once."""
        super().__init__(what)
        self.onward = onward
        self.status = status
        self.what = what
        self.hints = hints


class Console:
    def __init__(self, chosen: Settings, log: Events, secrets: Secrets | None = None) -> None:
        self._settings = chosen
        self._log = log
        found = secrets or Secrets(chosen)
        self._secrets = found

        def current() -> Settings:
            return dataclasses.replace(
                chosen, dsn=found.current("dsn"), listen_dsn=found.current("listen_dsn")
            )

        self._current = current
        self.base = (chosen.console_base_path or "").rstrip("/")
        self._access = Access(chosen, lambda: found.current("console_token"))
        self.database = Database(current)
        self._templates = Templates(
            self.base,
            navigation=NAVIGATION,
            version=version("recall-worker"),
            messages=chosen.console_messages == "shown",
            states=STATES,
            outcomes=OUTCOMES,
        )
        self.live = Live(
            current,
            self.database,
            self._part,
            self._answer,
            lambda number: self._templates.render("_stale.html", number=number),
            self._lost_words,
        )
        self._shared: dict[tuple[str, str, int], asyncio.Task[dict[str, Any] | None]] = {}
        """Recalls' pages that are asked for by all who were told of the same change."""
        self.many = Many(self.database, log)
        self._notes: dict[str, tuple[float, str]] = {}
        self._health: Health | None = None
        self._examining = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._here = _zone_here()

    @property
    def messages(self) -> bool:
        return self._settings.console_messages == "shown"

    def application(self) -> web.Application:
        app = web.Application(
            middlewares=[self._guard],
            client_max_size=BODY_MOST,
            handler_args={
                "max_line_size": LINE_MOST,
                "max_field_size": LINE_MOST,
                "keepalive_timeout": IDLE_MOST,
            },
        )
        get: dict[str, Handler] = {
            "/": self.now,
            "/agenda": self.agenda,
            "/recalls": self.recalls,
            "/recalls/{id:[^/]+}": self.recall,
            "/recalls/{id:[^/]+}/edit": self.edit,
            "/recalls/{id:[^/]+}/preview": self.preview,
            "/recall": self.recall,
            "/recall/edit": self.edit,
            "/recall/preview": self.preview,
            "/workers": self.workers,
            "/failures": self.failures,
            "/queues": self.queues,
            "/settings": self.settings,
            "/live": self.stream,
            "/bulk/{action}": self.choose,
            "/jobs/{job}": self.job,
            "/login": self.login,
        }
        post: dict[str, Handler] = {
            "/recalls/{id:[^/]+}/{action}": self.act,
            "/recall/{action}": self.act,
            "/bulk/{action}": self.act_on_many,
            "/jobs/{job}/stop": self.stop_job,
            "/queues/{action}": self.act_on_queue,
            "/login": self.log_in,
            "/logout": self.log_out,
        }
        for path, handler in get.items():
            app.router.add_get(self.base + path, handler, allow_head=path != "/live")
        for path, handler in post.items():
            app.router.add_post(self.base + path, handler)
        app.router.add_get(self.base + "/static/{name:.+}", self.static)
        app.router.add_get("/healthz", self.healthz)
        if self.base:
            app.router.add_get(self.base + "/healthz", self.healthz)
            app.router.add_get(self.base, self.to_the_front)
        app.on_shutdown.append(self._shut_down)
        return app

    async def _shut_down(self, _: web.Application) -> None:
        self._stopping.set()
        await self.many.stop(STOP_PATIENCE)
        await self.live.close()

    def close(self) -> None:
        self.database.close()

    # --- who is let in, and how errors are told ---------------------------------------------------

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Around every answer: who asks, in which zone they read, and what went wrong."""
        request[USER] = None
        zone = self._zone(request)
        with read_in(zone):
            request[ZONE_NAME] = zone
            try:
                if request.match_info.handler != self.healthz:
                    self._let_in(request)
                response = await handler(request)
            except web.HTTPException as error:
                if error.status < 400:
                    response = _redirect(error.status, error.headers["Location"])
                else:
                    response = self._error(request, error.status, _http_words(error.status))
            except Exception as error:
                response = self._explained(request, error)
        if not response.prepared:
            response.headers.update(HEADERS)
            if "Cache-Control" not in response.headers:
                response.headers["Cache-Control"] = "no-store"
            wanted = request.query.get("zone")
            if wanted and wanted == zone and request.cookies.get(ZONE_COOKIE) != zone:
                self._set_cookie(request, response, ZONE_COOKIE, zone, 366 * 86_400.0)
        return response

    def _let_in(self, request: web.Request) -> None:
        """Raises Refused, HTTPFound, Locked."""
        host = request.headers.get(hdrs.HOST)
        if not self._access.is_known_host(host):
            named = host_of(host or "") or "none"
            raise Refused(
                403,
                f"The console is not known by the name {named!r}.",
                "name it in RECALL_CONSOLE_HOSTS, if that is its name",
            )
        if request.method not in ("GET", "HEAD") and not self._access.is_from_our_pages(
            request.headers
        ):
            raise Refused(
                403,
                "This request was not sent by a page of the console.",
                "open the console itself, and do it there; a program sends Sec-Fetch-Site: "
                "same-origin, or the console's address as Origin",
            )
        if self._access.is_drawn_into_another(request.headers):
            raise Refused(
                403,
                "A page of another site asked for this.",
                "open it by a link, or by its address",
            )
        if request.match_info.handler == self.static:
            return
        if (name := self._access.said_twice(request.headers)) is not None:
            raise Refused(
                400,
                f"The header {name} was sent twice: whose it is can't be told.",
                "a proxy must remove it from what it receives before it sets its own",
            )
        user = self._access.user(
            request.headers, request.cookies.get(COOKIE), request.remote or "unknown"
        )
        request[USER] = user
        if user is not None or request.match_info.handler in (self.login, self.log_in):
            return
        given = request.headers.get(hdrs.AUTHORIZATION, "").lower().startswith("bearer")
        if given:
            self._log.tell(
                "console.refused", host=request.remote or "unknown", reason="a wrong bearer token"
            )
        if not self._access.asks_for_token:
            raise Refused(
                401,
                "The proxy in front of the console did not say who you are.",
                f"come by the proxy that sends {self._settings.console_user_header}",
            )
        if given or request.method != "GET" or "text/html" not in request.headers.get("Accept", ""):
            raise Refused(
                401,
                "The console asks who you are.",
                f"log in at {self._templates.url('/login')}, or send a bearer token",
            )
        back = request.path_qs.removeprefix(self.base)
        query = [("to", back)] if back not in ("", "/") else []
        place = self._templates.url("/login", query)
        if request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
            # With a link of another site a browser holds a strict cookie back, and with where that
            # redirects to; not with where our own page leads: there it is known who logged in.
            raise Refused(401, "One moment: it is looked up who you are.", onward=place)
        raise web.HTTPFound(place)

    def _explained(self, request: web.Request, error: Exception) -> web.Response:
        """The page of an error."""
        match error:
            case Refused():
                return self._error(
                    request, error.status, error.what, *error.hints, onward=error.onward
                )
            case Locked():
                self._log.tell(
                    "console.refused", host=request.remote or "unknown", reason="too many tries"
                )
                response = self._error(
                    request,
                    429,
                    f"Too many wrong tokens were given: nobody is let in for {error.seconds:.0f} s "
                    "from here.",
                )
                response.headers["Retry-After"] = f"{max(1, error.seconds):.0f}"
                return response
            case SelectionError():
                return self._error(
                    request, 422, f"{error.name} {error.why}", error.instead.replace("--", "")
                )
            case pages.Unserved():
                return self._error(
                    request,
                    422,
                    f"PostgreSQL would read all of about {error.recalls:,} recalls: no index "
                    "serves this search.",
                    "a state with it: live, due, overdue, in-run, deferred, paused, failed, fired "
                    "or cancelled",
                    "a session's whole id, a user, or an outcome",
                )
            case UnicodeEncodeError():
                return self._error(
                    request, 422, "The address holds bytes that are not UTF-8.", "text in UTF-8"
                )
            case errors.QueryCanceled() if request.method == "POST":
                return self._error(
                    request,
                    409,
                    "PostgreSQL gave this up, and nothing was changed: somebody else holds what it "
                    "needs, or it has too much to do.",
                    "the same again in a moment",
                )
            case errors.QueryCanceled():
                return self._error(
                    request,
                    422,
                    "PostgreSQL gave this up: it would have to read too much of the table.",
                    "narrow it: a session, a state (due, failed …) or an outcome is found by an "
                    "index; a queue, a pattern or a time is not",
                )
        if acting.is_forbidden(error):
            return self._error(
                request,
                403,
                f"PostgreSQL refuses it: {error_text(error)}",
                "the console's account only reads: an account in the role recall_worker may act",
            )
        known = explain(error)
        if known is not None and known.status == UNREACHABLE:
            self.database.lost(known.what)
            doubt = None if request.method in READS else isinstance(error, Doubt)
            return self._error(request, 503, *self._lost(known.what, doubt=doubt))
        if known is not None and isinstance(error, errors.ReadOnlySqlTransaction):
            return self._error(request, 403, _sentence(known.what), *known.hints)
        if isinstance(error, errors.OperationalError) and known is not None:
            return self._error(request, 503, known.what, *known.hints)
        if known is not None:
            status = 422 if known.status == USAGE else 409
            if isinstance(error, psycopg.Error | Damaged) and status == 409:
                status = 503
            return self._error(request, status, _sentence(known.what), *known.hints)
        self._log.tell(
            "console.failed",
            doing=f"{request.method} {request.path}",
            reason=f"{type(error).__name__}: {error}"[:500],
            exception="".join(traceback.format_exception(error)),
        )
        return self._error(
            request,
            500,
            "This page failed, by a defect of recall-worker.",
            "report it, with the log",
        )

    def _error(
        self,
        request: web.Request,
        status: int,
        what: str,
        *hints: str,
        onward: str | None = None,
    ) -> web.Response:
        title = STATUS_WORDS.get(status, "It can't be done")
        return self._page(
            request,
            "error.html",
            status=status,
            title=title,
            what=what,
            hints=[hint for hint in hints if hint],
            onward=onward,
            recall=self._id(request) if request.match_info.handler == self.act else None,
            retry=status == 503 and request.method in READS,
        )

    def _lost(self, reason: str, *, doubt: bool | None = None) -> tuple[str, str]:
        """The words for PostgreSQL's silence, and what to do. `doubt`: of an action, whether it is
        unknown if it was done; None: of a page."""
        since = self.database.lost_since
        for_ = "" if since is None else f" since {_clock(since)}"
        reason = reason.removeprefix("PostgreSQL can't be reached: ")
        what = f"PostgreSQL has not answered{for_}: {reason}"
        if doubt is not None:
            return (
                (
                    f"{what.rstrip('.')}. Whether it was done is not known.",
                    "see what is on record of it when PostgreSQL answers, before you do it again",
                )
                if doubt
                else (
                    f"{what.rstrip('.')}. Nothing was done, and nothing will be.",
                    "the same again when PostgreSQL answers",
                )
            )
        return (
            what,
            "this page asks again by itself; workers go on by themselves when PostgreSQL is back",
        )

    def _lost_words(self, reason: str) -> str:
        return self._templates.render(
            "_lost.html", since=self.database.lost_since, reason=reason.split(": ", 1)[-1]
        )

    # --- parts of answers -------------------------------------------------------------------------

    def _page(
        self, request: web.Request, name: str, *, status: int = 200, **values: Any
    ) -> web.Response:
        user = request[USER]
        text = self._templates.render(
            name,
            page=name.removesuffix(".html"),
            user=user,
            zone=request[ZONE_NAME],
            may_act=self._may_act(user),
            only_reads=user is not None and not user.may_act,
            database=self.database,
            asks=self._access.asks_for_token,
            note=self._note(request),
            status=status,
            **values,
        )
        return web.Response(status=status, text=text, content_type="text/html", charset="utf-8")

    def _may_act(self, user: User | None) -> bool:
        return user is not None and user.may_act and self.database.may_act

    def _part(self, part: str, zone: str, picture: Picture) -> str:
        with read_in(zone):
            return self._templates.render(f"_{part}.html", **pages.PARTS[part](picture))

    def _answer(self, question: Question, zone: str, rows: Rows, picture: Picture) -> str:
        with read_in(zone):
            return self._templates.render(
                f"_{question.part}.html", **pages.shown(question, rows, picture.now)
            )

    def _zone(self, request: web.Request) -> str:
        """The reader's time zone: as asked, as their browser said, or this host's."""
        for name in (request.query.get("zone"), request.cookies.get(ZONE_COOKIE)):
            if name:
                with contextlib.suppress(cadence.CadenceError):
                    return cadence.zone(name).key
        return self._here

    def _set_cookie(
        self, request: web.Request, response: web.StreamResponse, name: str, value: str, age: float
    ) -> None:
        response.set_cookie(
            name,
            value,
            max_age=int(age),
            path=self.base or "/",
            httponly=name == COOKIE,
            samesite="Strict",
            secure=request.headers.get("X-Forwarded-Proto", request.scheme) == "https",
        )

    def _note(self, request: web.Request) -> str | None:
        """What was done before this page, told once or again for a while."""
        found = self._notes.get(request.query.get("note", ""))
        return None if found is None else found[1]

    def _told(self, text: str) -> list[tuple[str, str]]:
        """The query by which the next page tells this."""
        now = time.monotonic()
        self._notes = {k: (at, t) for k, (at, t) in self._notes.items() if at > now - NOTE_FOR}
        while len(self._notes) >= NOTES_MOST:
            del self._notes[next(iter(self._notes))]
        name = secrets.token_urlsafe(8)
        self._notes[name] = (now, text)
        return [("note", name)]

    def _by(self, request: web.Request) -> By:
        user = request[USER]
        assert user is not None
        if not user.may_act:
            raise Refused(
                403,
                f"{user.name} may read, and not act.",
                "RECALL_CONSOLE_OPERATORS names who may",
            )
        return {"actor": user.name, "via": "console"}

    async def _look(self) -> Picture:
        """The picture of now: the live one, or one that is asked for, also where PostgreSQL has
        not answered since the live one."""
        if self.live.picture is not None and self.database.lost_since is None:
            return self.live.picture
        return await self.live.once()

    async def _live_page(self, request: web.Request, name: str) -> web.Response:
        picture = await self._look()
        if not self.database.role:
            await self.database.ask(lambda conn: None)
        return self._page(request, f"{name}.html", **pages.PARTS[name](picture))

    # --- pages ------------------------------------------------------------------------------------

    async def to_the_front(self, _: web.Request) -> web.Response:
        raise web.HTTPFound(self._templates.url("/"))

    async def healthz(self, _: web.Request) -> web.Response:
        """The process answers. PostgreSQL's silence is no reason to start it again."""
        lost = self.database.lost_since
        words = (
            "ok\n" if lost is None else f"ok; PostgreSQL has not answered since {_clock(lost)}\n"
        )
        return web.Response(text=words, headers={"Cache-Control": "no-store"})

    async def static(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        path = STATIC / name
        if path.suffix not in TYPES or STATIC not in path.resolve().parents or not path.is_file():
            raise web.HTTPNotFound
        fresh = request.query.get("v") == digest(name)
        return web.Response(
            body=path.read_bytes(),
            content_type=TYPES[path.suffix],
            charset="utf-8",
            headers={
                "Cache-Control": "public, max-age=31536000, immutable" if fresh else "no-cache",
            },
        )

    async def now(self, request: web.Request) -> web.Response:
        return await self._live_page(request, "now")

    async def workers(self, request: web.Request) -> web.Response:
        return await self._live_page(request, "workers")

    async def queues(self, request: web.Request) -> web.Response:
        return await self._live_page(request, "queues")

    def _agenda_question(self, query: Mapping[str, str]) -> Question:
        span = query.get("span", "day")
        if span not in SPANS:
            raise Refused(422, f"span {span!r} is none.", "span=day, or span=week")
        return agenda_of(span, query.get("queue") or None)

    def _failures_question(self, query: Mapping[str, str]) -> Question:
        window = query.get("window", "1h")
        if window not in WINDOWS:
            raise Refused(422, f"window {window!r} is none.", "window=1h, 24h or 7d")
        return failures_of(window)

    async def _question_page(
        self, request: web.Request, question: Question, **values: Any
    ) -> web.Response:
        def ask(conn: Connection) -> dict[str, Any]:
            rows = pages.answer(conn, question)
            return pages.shown(question, rows, clock(conn))

        found = await self.database.ask(ask)
        # The stream asks for what the page does.
        stream = [(name, value) for name, value in request.query.items() if name in ASKED]
        return self._page(
            request, f"{question.part}.html", stream=stream, is_read=True, **values, **found
        )

    async def agenda(self, request: web.Request) -> web.Response:
        return await self._question_page(request, self._agenda_question(request.query))

    async def recalls(self, request: web.Request) -> web.Response:
        if id := request.query.get("id"):
            whole, some = await self.database.ask(lambda conn: pages.whole(conn, id))
            if whole is not None:
                raise web.HTTPSeeOther(self._templates.recall_url(whole))
            if not some:
                raise Refused(
                    404,
                    f"There is no recall {id}.",
                    f"its whole id, or the first {PREFIX_LEAST} characters and more",
                )
            return self._page(request, "ambiguous.html", id=id, some=some)
        given = pages.filters(request.query_string)
        found = await self.database.ask(
            lambda conn: pages.search(conn, given, self.database.identity)
        )
        query = [(name, value) for name, values in given.items() for value in values]
        return self._page(
            request,
            "recalls.html",
            found=found,
            now=found.page.now,
            query=query,
            given=given,
            # Beyond a bound, marks make too long an address.
            stream=None
            if pages.question_of(found.selection) is None
            else [*query, ("seen", ".".join(sorted(marks_of(found.page.rows))))],
            plain=[(name, value) for name, value in query if name not in ("limit", "offset")],
            bulk=acting.BULK,
        )

    def _id(self, request: web.Request) -> str:
        return request.match_info.get("id") or request.query.get("id", "")

    async def recall(self, request: web.Request) -> web.Response:
        id = self._id(request)
        found = await self._recall(request, id)
        if found is None:
            raise Refused(404, f"There is no recall {id}, and nothing of it on record.")
        row = found["row"]
        offered = [] if row is None else acting.offered(row)
        live = row is not None and row["status"] in ("pending", "running")
        seen = None if row is None else mark(row)
        return self._page(
            request,
            "recall.html",
            offered=offered,
            is_live=live,
            seen=seen,
            again=acting.AGAIN,
            version=None if row is None else acting.version(row),
            **found,
        )

    async def _recall(self, request: web.Request, id: str) -> dict[str, Any] | None:
        def ask(conn: Connection) -> dict[str, Any] | None:
            return pages.recall(conn, id, self.database.identity, messages=self.messages)

        if request.headers.get("HX-Request") != "true":
            return await self.database.ask(ask)
        # All pages that the live picture told of a change ask together, and get one answer.
        key = (id, request[ZONE_NAME], self.live.looks)
        self._shared = {
            known: task
            for known, task in self._shared.items()
            if known[2] == self.live.looks or not task.done()
        }
        if key not in self._shared:
            self._shared[key] = asyncio.create_task(self.database.ask(ask))
        return await asyncio.shield(self._shared[key])

    async def edit(self, request: web.Request) -> web.Response:
        """The form of an edit; where values are given, with what they would make of the recall."""
        id = self._id(request)
        fields = {name: value for name, value in request.query.items() if name != "id"}
        return await self._edit_page(request, id, fields)

    async def _edit_page(
        self,
        request: web.Request,
        id: str,
        fields: Mapping[str, str],
        *,
        status: int = 200,
        wrong: Trouble | None = None,
    ) -> web.Response:
        def ask(conn: Connection) -> dict[str, Any] | None:
            return pages.recall(conn, id, self.database.identity, messages=self.messages)

        found = await self.database.ask(ask)
        if found is None or found["row"] is None:
            raise Refused(404, f"There is no recall {id}.")
        if not self._may_act(request[USER]):
            raise Refused(403, "Recalls can't be edited here: the console only reads.")
        row = found["row"]
        if row["status"] not in ("pending", "running"):
            raise Refused(409, f"{id} is {row['status']}: what is over can't be edited.")
        was = acting.as_typed(row, messages=self.messages)
        # A form that comes back still knows what it was made of: what somebody else has written
        # since then is not taken for what is typed here.
        was |= {name: fields[f"was_{name}"] for name in was if f"was_{name}" in fields}
        shown = await self._preview(id, fields)
        return self._page(
            request,
            "edit.html",
            status=status,
            id=found["id"],
            row=row,
            now=found["now"],
            why=found["why"],
            was=was,
            typed=was | {name: fields[name] for name in was if name in fields},
            moments=found["moments"],
            moments_note=found["moments_note"],
            shown=shown,
            wrong=wrong,
        )

    async def _preview(self, id: str, fields: Mapping[str, str]) -> dict[str, Any] | None:
        """What an edit would make of it, or what is wrong with it; None where nothing is edited."""
        try:
            if not acting.edited_fields(fields):
                return None
            return await self.database.ask(lambda conn: acting.preview(conn, id, fields))
        except Exception as error:
            known = explain(error)
            if known is None or known.status == UNREACHABLE:
                raise
            return {"wrong": known, "field": acting.wrong_field(fields, datetime.now(UTC))}

    async def preview(self, request: web.Request) -> web.Response:
        id = self._id(request)
        fields = {name: value for name, value in request.query.items() if name != "id"}
        self._by(request)
        shown = await self._preview(id, fields)
        texts = () if self.messages else acting.TEXTS
        edited = [name for name in acting.EDITED if name not in texts]
        return self._page(request, "_preview.html", shown=shown, edited=edited)

    async def failures(self, request: web.Request) -> web.Response:
        question = self._failures_question(request.query)
        return await self._question_page(request, question, windows=WINDOWS)

    async def settings(self, request: web.Request) -> web.Response:
        rows, problems = setting.survey()
        health = await self._examined() if "health" in request.query else self._health
        await self.database.ask(lambda conn: None)
        return self._page(
            request,
            "settings.html",
            settings=rows,
            problems=problems,
            health=None if health is None else health[1],
            health_at=None if health is None else time.monotonic() - health[0],
            verdict=None if health is None else health[2],
        )

    async def _examined(self) -> Health:
        """Health as `doctor` says it: one examination at a time, which is shown for a while."""
        # Only here, as most consoles never need it.
        from ..doctor.doctor import examine
        from ..doctor.examination import verdict

        async with self._examining:
            if self._health is None or time.monotonic() - self._health[0] > HEALTH_FOR:
                exam = await examine(self._current())
                self._health = (time.monotonic(), exam.findings, verdict(exam.findings))
            return self._health

    # --- live -------------------------------------------------------------------------------------

    def _reader(self, request: web.Request) -> Reader:
        """What a page that is open shows."""
        query = request.query
        part, zone = query.get("part", ""), request[ZONE_NAME]
        seen = frozenset(filter(None, query.get("seen", "").split(".")))
        match part:
            case "recall" if "id" in query:
                return Reader(part, zone, recall=query["id"], seen=seen)
            case "recalls":
                given = pages.filters(request.query_string)
                question = pages.question_of(pages.selection(given))
                if question is None:
                    raise Refused(422, "This search is not live.")
                return Reader(part, zone, question=question, seen=seen)
            case "agenda":
                return Reader(part, zone, question=self._agenda_question(query))
            case "failures":
                return Reader(part, zone, question=self._failures_question(query))
            case _ if part in pages.PARTS:
                return Reader(part, zone)
        raise Refused(
            422,
            f"part {part!r} is none.",
            f"part={', '.join(pages.PARTS)}, agenda, failures or recalls; or recall, with id",
        )

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """A page's stream, until its reader goes, or is too slow."""
        reader = self._reader(request)
        if self.live.readers >= READERS_MOST:
            raise Refused(503, f"{READERS_MOST} pages are open already.", "close some of them")
        response = web.StreamResponse(
            headers={
                **HEADERS,
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
            }
        )
        await response.prepare(request)
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            async with self.live.reading(reader):
                written = checked = time.monotonic()
                while not self._stopping.is_set():
                    if time.monotonic() - checked > BEAT:
                        self._let_in(request)  # The login may have ended, or the token changed.
                        checked = time.monotonic()
                    coming = asyncio.create_task(reader.next(GONE_WITHIN))
                    await asyncio.wait((coming, stopped), return_when=asyncio.FIRST_COMPLETED)
                    if not coming.done():
                        coming.cancel()
                        break
                    if request.transport is None:
                        break  # The page was closed.
                    parts = [event(name, text) for name, text in coming.result().items()]
                    if not parts and time.monotonic() - written < BEAT:
                        continue
                    async with asyncio.timeout(SEND_PATIENCE):
                        await response.write(b"".join(parts) or event("alive", ""))
                    written = time.monotonic()
        except (ConnectionError, TimeoutError, Refused, Locked, web.HTTPFound):
            pass  # It ends here: an answer that has begun can't be another one.
        finally:
            stopped.cancel()
        return response

    # --- actions ----------------------------------------------------------------------------------

    async def _form(self, request: web.Request) -> MultiDictProxy[str]:
        """A POST's fields. Line breaks are as a form's text area gives them: one character."""
        # Without a body there is no type, which aiohttp calls octet-stream.
        if request.content_type not in (FORM, "application/octet-stream"):
            raise Refused(422, "Only forms are taken.", f"Content-Type: {FORM}")
        try:
            async with asyncio.timeout(BODY_PATIENCE):
                body = await request.read()
        except TimeoutError:
            raise Refused(408, f"The form did not come within {BODY_PATIENCE:g} s.") from None
        except (web.RequestPayloadError, ConnectionError):
            raise Refused(400, "The form can't be read: it is cut off, or compressed.") from None
        try:
            pairs = parse_qsl(
                body.decode(), keep_blank_values=True, max_num_fields=FIELDS_MOST, errors="strict"
            )
        except ValueError:
            raise Refused(
                422, "The form can't be read.", f"fields in UTF-8, {FIELDS_MOST:,} at most"
            ) from None
        return MultiDictProxy(MultiDict((n, v.replace("\r\n", "\n")) for n, v in pairs))

    async def act(self, request: web.Request) -> web.Response:
        """One recall's action."""
        id, name = self._id(request), request.match_info["action"]
        by = self._by(request)
        form = await self._form(request)
        fields = {key: form[key] for key in form}
        notes: list[str] = []
        if name == "edit":
            try:
                done = await self.database.act(
                    lambda conn: acting.edit(
                        conn, id, fields, by, self.database.identity, messages=self.messages
                    )
                )
            except Trouble as error:
                if error.status != USAGE:
                    raise
                # What was typed is not lost.
                return await self._edit_page(request, id, fields, status=422, wrong=error)
        else:
            if name == "reschedule":
                given = {key: value for key, value in fields.items() if value}
                action = acting.reschedule(given, by, notes.append)
            elif (found := action_of(name, by)) is not None:
                action = found
            else:
                raise Refused(404, f"There is no action {name!r}.")
            seen = fields.get("seen") or None
            done = await self.database.act(lambda conn: act_on_one(conn, id, action, seen))
        self.live.stir()
        self._log.tell("console.acted", user=by["actor"], action=name, recall=id)
        told = self._told(" ".join([_sentence(f"Done: {done}"), *notes]))
        address = self._templates.recall_url(id)
        joint = "&" if "?" in address else "?"
        raise web.HTTPSeeOther(f"{address}{joint}note={told[0][1]}")

    async def choose(self, request: web.Request) -> web.Response:
        """What acting on many would act on: how many, and the first of them."""
        name = request.match_info["action"]
        if name not in acting.BULK:
            raise Refused(404, f"There is no action {name!r} on many.")
        await self.database.ask(lambda conn: None)  # What the account may is known then.
        if not self._may_act(request[USER]):
            raise Refused(403, "Nothing can be done here: the console only reads.")
        filters = pages.filters(request.query_string)
        return await self._choice_page(request, name, filters, request.query.getall("id", []))

    async def _choice_page(
        self,
        request: web.Request,
        name: str,
        filters: Mapping[str, list[str]],
        ids: list[str],
        *,
        status: int = 200,
        wrong: str | None = None,
    ) -> web.Response:
        choice = await self.database.ask(lambda conn: self.many.choose(conn, name, filters, ids))
        return self._choice(request, choice, self.many.offer(choice), status=status, wrong=wrong)

    def _choice(
        self,
        request: web.Request,
        choice: acting.Choice,
        key: str,
        *,
        status: int = 200,
        wrong: str | None = None,
    ) -> web.Response:
        return self._page(
            request,
            "choice.html",
            status=status,
            choice=choice,
            key=key,
            does=acting.WORDS[choice.action],
            typed=choice.number > acting.SHOWN,
            now=datetime.now(UTC),
            wrong=wrong,
        )

    async def act_on_many(self, request: web.Request) -> web.Response:
        name = request.match_info["action"]
        if name not in acting.BULK:
            raise Refused(404, f"There is no action {name!r} on many.")
        by = self._by(request)
        form = await self._form(request)
        key = form.get("choice")
        count = form.get("count", "").strip().replace(",", "")
        if key is not None:
            choice = self.many.offered(key)
            if choice is None or choice.action != name:
                raise Refused(
                    409,
                    "What was chosen is not known any more: it was done, or shown too long ago.",
                    "choose again",
                )
        else:
            filters = pages.filters(request.query_string)
            for field in form:
                if field in FILTERS:
                    filters[field] = [value for value in form.getall(field) if value]
            filters = {field: values for field, values in filters.items() if values}
            ids = [*request.query.getall("id", []), *form.getall("id", [])]
            choice = await self.database.ask(
                lambda conn: self.many.choose(conn, name, filters, ids)
            )
            key = self.many.offer(choice)
        if choice.number > acting.SHOWN and count != str(choice.number):
            wrong = (
                f"{count!r} is not their number: type {choice.number}."
                if count
                else f"Type their number to go on: {choice.number}."
            )
            return self._choice(request, choice, key, status=422, wrong=wrong)
        job = self.many.start(choice, by, key)
        raise web.HTTPSeeOther(self._templates.url(f"/jobs/{job.id}"))

    def _job(self, request: web.Request) -> Job:
        job = self.many.jobs.get(request.match_info["job"])
        if job is None:
            raise Refused(
                404, "This job is not known any more: the console was started again, or it is old."
            )
        return job

    async def job(self, request: web.Request) -> web.Response:
        """How far acting on many has come. The page asks again until it is over."""
        job = self._job(request)
        part = request.headers.get("HX-Request") == "true"
        return self._page(
            request,
            "_job.html" if part else "job.html",
            job=job,
            now=datetime.now(UTC),
        )

    async def stop_job(self, request: web.Request) -> web.Response:
        self._by(request)
        job = self._job(request)
        job.stopped = True
        raise web.HTTPSeeOther(self._templates.url(f"/jobs/{job.id}"))

    async def act_on_queue(self, request: web.Request) -> web.Response:
        """Pause or resume a queue, or all."""
        name = request.match_info["action"]
        by = self._by(request)
        form = await self._form(request)
        queue = form.get("queue", "").strip()
        if queue != ALL_QUEUES and (wrong := queue_problem(queue)) is not None:
            raise Refused(422, f"A queue's name {wrong}.")
        reason = form.get("reason", "").strip()[:500] or None
        done = await self.database.act(
            lambda conn: acting.act_on_queue(conn, name, queue, reason, by, self.database.identity)
        )
        if done is None:
            raise Refused(404, f"There is no action {name!r} of a queue.")
        self.live.stir()
        self._log.tell("console.acted", user=by["actor"], action=f"{name}_queue", queue=queue)
        raise web.HTTPSeeOther(self._templates.url("/queues", self._told(_sentence(done))))

    # --- logging in -------------------------------------------------------------------------------

    async def login(self, request: web.Request) -> web.Response:
        to = request.query.get("to", "")
        if not self._access.asks_for_token or request[USER] is not None:
            return _redirect(302, self._inside(to))
        return self._page(request, "login.html", to=to, wrong=False)

    def _inside(self, to: str) -> str:
        """The address that `to` stands for; never elsewhere: `//host` and `/\\host` would be."""
        inside = to.startswith("/") and not to.startswith(("//", "/\\")) and to.isprintable()
        return f"{self.base}{to}" if inside else self._templates.url("/")

    async def log_in(self, request: web.Request) -> web.Response:
        form = await self._form(request)
        peer = request.remote or "unknown"
        to = form.get("to", "")
        cookie = self._access.log_in(form.get("token", "").strip(), form.get("name", ""), peer)
        if cookie is None:
            self._log.tell("console.refused", host=peer, reason="a wrong token on the login page")
            return self._page(request, "login.html", status=401, to=to, wrong=True)
        response = _redirect(303, self._inside(to))
        self._set_cookie(request, response, COOKIE, cookie, COOKIE_FOR)
        return response

    async def log_out(self, request: web.Request) -> web.Response:
        response = _redirect(303, self._templates.url("/login"))
        response.del_cookie(COOKIE, path=self.base or "/")
        return response


def _redirect(status: int, place: str) -> web.Response:
    return web.Response(status=status, headers={"Location": place})


def _zone_here() -> str:
    """This host's zone by IANA's name, as far as that is known."""
    for name in (os.environ.get("TZ", "").lstrip(":"), _link("/etc/localtime")):
        if name:
            with contextlib.suppress(cadence.CadenceError):
                key = cadence.zone(name).key
                return "UTC" if key in ("Etc/UTC", "Etc/UCT", "UCT", "Zulu") else key
    return "UTC"


def _link(path: str) -> str:
    with contextlib.suppress(OSError):
        return str(Path(path).readlink()).partition("zoneinfo/")[2]
    return ""


def _clock(moment: datetime) -> str:
    shown = moment.astimezone(ZONE.get())
    return f"{shown:%H:%M:%S} ({_span(moment)})"


def _span(moment: datetime) -> str:
    from ..terminal import whole_span

    return whole_span((datetime.now(UTC) - moment).total_seconds())


def _sentence(text: str) -> str:
    text = text.strip()
    return (text[:1].upper() + text[1:]).rstrip(".") + "."


def _http_words(status: int) -> str:
    return {
        404: "There is no such page.",
        405: "This page is not asked for in this way.",
        413: f"A form may have {BODY_MOST // 1024} KiB.",
    }.get(status, "The request can't be answered.")


def _os_words(error: OSError) -> str:
    """Why nothing can listen there. (A name's errors have numbers of their own.)"""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error)


async def serve(chosen: Settings, secrets_: Secrets, log: Events) -> None:
    """Serve the pages until a signal stops it. Raises Trouble where nothing can listen."""
    console = Console(chosen, log, secrets_)
    with contextlib.suppress(ValueError, OSError):
        # Each open page is a socket, and mostly 1,024 are allowed at first.
        _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    with contextlib.suppress(OSError):
        # Who looks at the workers must not hold them up, where they share a machine.
        os.nice(max(0, NICE - os.nice(0)))
    host, port = chosen.console_address
    runner = web.AppRunner(
        console.application(),
        handle_signals=False,
        access_log=None,
        shutdown_timeout=STOP_PATIENCE,
    )
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, reuse_address=True)
        try:
            await site.start()
        except OSError as error:
            raise Trouble(
                f"RECALL_CONSOLE_LISTEN: nothing can listen on {host} port {port}: "
                f"{_os_words(error)}",
                "another address in RECALL_CONSOLE_LISTEN, or see what listens there: ss -tlnp",
                status=USAGE,
            ) from None
        for name, number in {sock[:2] for sock in runner.addresses}:
            log.tell("console.listening", host=name, port=number)
        with hangups(lambda: log.tell("secrets.read", settings=secrets_.read_again())):
            await stopped.wait()
    finally:
        await runner.cleanup()
        console.close()
    log.tell("console.stopped")
