"""The pages as text: Jinja's environment, and how times, addresses and drawings stand in a page.

Every text is escaped, and what could steer a reader's eye in it (controls, marks of direction) is
made visible. Nothing in a template is marked as safe but what is made here of numbers and escaped
texts. A page has neither a style nor a script of its own: drawings are SVG with plain attributes.

Never here: what is asked of PostgreSQL.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import jinja2
from markupsafe import Markup, escape

from .. import cadence
from ..events import escape_controls
from ..operations.words import ends, nature
from ..terminal import ZONE, local, relative, span, whole_span

HERE = Path(__file__).resolve().parent
STATIC = HERE / "static"
ODD_IDS = frozenset(("", ".", ".."))
"""Ids that no path of an address can name."""


class Templates:
    def __init__(self, base: str, **shared: Any) -> None:
        """`base`: the path before every address, without a slash at its end; `shared`: what every
        template knows."""
        self.base = base
        self._env = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            finalize=_visible,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._env.globals.update(
            url=self.url,
            recall_url=self.recall_url,
            asset=self.asset,
            strip=strip,
            bar=bar,
            **shared,
        )
        self._env.filters.update(
            when=when,
            ago=ago,
            until=until,
            local=local,
            span=span,
            ticking=ticking,
            nature=nature,
            ends=ends,
            lines=lines,
            exact=exact,
            number=lambda value: f"{value:,}",
        )

    def render(self, name: str, **values: Any) -> str:
        return self._env.get_template(name).render(**values)

    def url(self, path: str, query: Mapping[str, Any] | Sequence[tuple[str, Any]] = ()) -> str:
        """An address of the console."""
        found = urlencode(query, doseq=True)
        return f"{self.base}{path}{'?' + found if found else ''}"

    def recall_url(self, id: str, path: str = "") -> str:
        """The address of a recall's page, or of something below it."""
        if id in ODD_IDS:
            return self.url(f"/recall{path}", {"id": id})
        return self.url(f"/recalls/{quote(id, safe='', errors='surrogateescape')}{path}")

    def asset(self, name: str) -> str:
        """The address of a file in static/, which changes with it."""
        return self.url(f"/static/{name}", {"v": digest(name)})


@lru_cache(64)
def digest(name: str) -> str:
    return hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:16]


def _visible(value: Any) -> Any:
    """What an expression in a template becomes."""
    if value is None:
        return ""
    if isinstance(value, Markup):
        return value
    return escape_controls(value if isinstance(value, str) else str(value))


@contextmanager
def read_in(zone: str) -> Iterator[None]:
    """Times are shown in this zone within the block."""
    before = ZONE.set(cadence.zone(zone))
    try:
        yield
    finally:
        ZONE.reset(before)


def here(moment: datetime) -> datetime:
    """A moment by the clock of the reader's zone."""
    try:
        return moment.astimezone(ZONE.get())
    except (OverflowError, ValueError):
        return moment.astimezone(UTC)


def _time(moment: datetime, text: str, counts: str = "") -> Markup:
    """`counts`: what the page goes on to count: `relative`, `lasting`, or nothing."""
    return Markup('<time datetime="{}" title="{}" data-counts="{}">{}</time>').format(
        moment.astimezone(UTC).isoformat(timespec="milliseconds"), local(moment), counts, text
    )


def when(moment: datetime | None, now: datetime) -> Markup | str:
    """A time, as short as it can be read beside others: of today without the date."""
    if moment is None:
        return ""
    shown, today = here(moment), here(now)
    days = abs((shown.date() - today.date()).days)
    if days == 0:
        text = f"{shown:%H:%M:%S}"
    elif days < 7:
        text = f"{shown:%a} {shown.day} {shown:%b %H:%M}"
    else:
        text = f"{shown.date().isoformat()} {shown:%H:%M}"
    return _time(moment, text)


def ago(moment: datetime | None, now: datetime) -> Markup | str:
    """How far a moment is from now; the page goes on counting where it can."""
    return "" if moment is None else _time(moment, relative(moment, now), "relative")


def until(moment: datetime | None, now: datetime) -> Markup | str:
    """A time, and how far it is."""
    if moment is None:
        return ""
    return Markup("{} <small>{}</small>").format(when(moment, now), ago(moment, now))


def ticking(moment: datetime | None, now: datetime) -> Markup | str:
    """For how long something has lasted since then; the page goes on counting."""
    if moment is None:
        return ""
    return _time(moment, whole_span((now - moment).total_seconds()), "lasting")


def exact(text: str) -> Markup:
    """A text as a form sends it back: every character as it is, those that nobody sees by their
    numbers."""
    return Markup("").join(
        escape(c) if c.isprintable() else Markup("&#{};").format(ord(c)) for c in text
    )


def lines(text: str | None) -> list[str]:
    return (text or "").split("\n")


def strip(counts: Sequence[tuple[str, int, str]], label: str) -> Markup:
    """Columns beside each other, as high as the numbers: a name, a number and its words each."""
    most = max((count for _, count, _ in counts), default=0) or 1
    width, gap, high = 20, 4, 48
    parts = []
    for at, (name, count, says) in enumerate(counts):
        height = 0 if not count else max(2, round(high * count / most))
        parts.append(
            Markup(
                '<g><title>{}: {}</title><rect class="{}" x="{}" y="{}" width="{}" height="{}" '
                'rx="2"/></g>'
            ).format(
                name,
                says,
                "some" if count else "none",
                at * (width + gap),
                high - (height or 2),
                width,
                height or 2,
            )
        )
    return Markup(
        '<svg class="strip" role="img" aria-label="{}" preserveAspectRatio="none" '
        'viewBox="0 0 {} {}">{}</svg>'
    ).format(label, max(1, len(counts) * (width + gap) - gap), high, Markup("").join(parts))


def bar(late: float | None, took: float | None, most: float) -> Markup:
    """One call as a line of time: how late it began, then how long it ran, of `most` seconds."""
    scale = 160 / most if most > 0 else 0
    first = max(0.0, late or 0.0) * scale
    second = max(2.0, max(0.0, took or 0.0) * scale)
    return Markup(
        '<svg class="bar" viewBox="0 0 164 10" role="img" aria-label="{}">'
        '<rect class="late" x="0" y="4" width="{}" height="2"/>'
        '<rect class="took" x="{}" y="1" width="{}" height="8" rx="1"/></svg>'
    ).format(
        f"{span(late or 0)} late, took {span(took or 0)}",
        f"{first:.1f}",
        f"{first:.1f}",
        f"{min(second, 164 - first):.1f}",
    )
