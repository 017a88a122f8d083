"""One screen: what is drawn of a picture, for a view, in a size. Pure.

From the top: where and when this is; what is wrong, in a sentence each; the counts; the endpoints;
then the sections, of which the chosen one gets the room that there is; at the bottom the keys.
Whatever does not fit is left out, and the chosen section goes last. Texts of rows are escaped here,
and colours only repeat what words say.

Never here: a terminal's octets (screen), numbers (picture).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..events import escape_controls
from ..fleet import queues_of, state_of
from ..terminal import local, whole_span
from .picture import ROWS, Picture, Row, kind, matches, note
from .view import HELP, View

PLAIN_ROWS = 20
"""Rows of a section where there is no terminal."""
ENDPOINTS = 3
"""Sentences on endpoints, at most."""
AIRY = 30
"""Lines from which sections are set apart by an empty one."""
LEAST_CHOSEN, LEAST_ROWS = 5, 3
"""Rows that the chosen section, and then each other one, gets before the chosen one gets the
rest."""
NARROW, WIDE = 100, 140
"""Columns below which ids are cut, and from which they are whole."""
FIRST = 18
"""Cells of a section's first column at least: it has the title above the spans."""
KEYS = "q quit  / filter  s section  ↑↓ scroll  p hold  ? help"
STYLES = {
    "alive": "green",
    "silent": "red",
    "open": "red",
    "deaf": "red",
    "lost": "red",
    "overdue": "red",
    "failed": "red",
    "closed": "",
    "listening": "",
}


@dataclass(frozen=True, slots=True)
class Link:
    """How fresh the picture is."""

    elapsed: float = 0.0
    """Seconds since the picture was taken."""
    listening: bool = True
    """Whether notifications arrive."""
    lost_for: float | None = None
    """Seconds for which PostgreSQL has not answered; None: it answers."""
    reason: str = ""
    """Why it does not."""


@dataclass(frozen=True, slots=True)
class Section:
    """A table: `rows()` makes the cells of some of `whole`."""

    name: str
    title: str
    columns: Sequence[tuple[str, int]]
    """Headings, after the first one, which is the title; and the most cells, 0: as many as there
    are."""
    whole: Sequence[Row]
    cells: Callable[[Row], Sequence[str]]
    counted: str = ""
    """How many there are, where that is more than is listed."""
    nothing: str = "none"


def sections(picture: Picture, view: View, width: int, elapsed: float) -> list[Section]:
    """All that there is to show, filtered as the view says."""
    needle = view.needle.lower()
    if needle == (picture.needle or ""):
        needle = ""  # The answer is filtered already, also by what its rows do not hold.
    narrow = width < NARROW
    ids = 14 if narrow else 20 if width < WIDE else 0
    several = len(picture.queues) > 1
    queued = several and not narrow

    def shown(rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if not needle or matches(row, needle)]

    def whose(row: Row) -> list[str]:
        return [row["id"], row["session_id"], *([row["queue"]] if queued else [])]

    def of_next(row: Row) -> list[str]:
        late = picture.age(row["due_at"]) + elapsed
        when = (
            f"{whole_span(late)} late"
            if late >= 1
            else f"in {whole_span(-late)}"
            if late <= -1
            else "now"
        )
        recurs, why = kind(row), note(row, late)
        return [when, *whose(row), *([why or recurs] if narrow else [recurs, why])]

    def of_run(row: Row) -> list[str]:
        runs = (
            "" if row["leased_at"] is None else whole_span(picture.age(row["leased_at"]) + elapsed)
        )
        ends, worker = row["lease_until"], row["worker"] or "?"
        if ends is None or picture.age(ends) + elapsed > 0:
            worker += ": its lease ended, another worker takes it over"
        elif row["accepted"]:
            worker += ", accepted by the API and polled"
        return [runs, *whose(row), str(row["attempt"]), worker]

    def of_failure(row: Row) -> list[str]:
        ago = f"{whole_span(picture.age(row['ended_at']) + elapsed)} ago"
        what = str(row["outcome"]) + (f" ×{row['calls']}" if row["calls"] > 1 else "")
        then = {"pending": "goes on", "running": "goes on"}.get(row["settled"], row["settled"])
        reason = row["reason"] or (f"HTTP {row['http_status']}" if row["http_status"] else "")
        session = [] if narrow else [row["session_id"]]
        return [ago, row["id"], *session, what, then, reason]

    def of_worker(row: Row) -> list[str]:
        return [
            state_of(row),
            row["worker"],
            f"{whole_span(picture.age(row['seen_at']) + elapsed)} ago",
            f"{row['leases']}/{row['slots']}",
            row["breaker"],
            row["bell"],
            queues_of(row),
        ]

    def of_queue(row: Row) -> list[str]:
        counts = [
            f"{row[kind]:,}{'+' if kind in row['more'] else ''}"
            for kind in ("due", "in_run", "waiting", "paused")
        ]
        return [row["queue"], *counts, str(row["workers"]), _of_queue(row)]

    recalls = [("RECALL", ids), ("SESSION", ids), *([("QUEUE", 14)] if queued else [])]
    due, waiting = picture.count("due"), picture.count("waiting")
    found = [
        Section(
            "next",
            "NEXT DUE",
            [*recalls, *([] if narrow else [("RECURS", 20)]), ("NOTE", 0)],
            shown(picture.next),
            of_next,
            f"{due.number + waiting.number:,}{'+' if due.more or waiting.more else ''}",
            "nothing waits",
        ),
        Section(
            "runs",
            "IN A RUN",
            [*recalls, ("ATTEMPT", 7), ("WORKER", 0)],
            shown(picture.runs),
            of_run,
            str(picture.count("in_run")),
            "nothing runs",
        ),
        Section(
            "failures",
            "FAILURES",
            [
                ("RECALL", ids),
                *([] if narrow else [("SESSION", ids)]),
                ("OUTCOME", 17),
                ("THEN", 9),
                ("REASON", 0),
            ],
            shown(picture.failures),
            of_failure,
            f"{len(picture.failures):,}+" if len(picture.failures) >= ROWS else "",
            nothing="none in the last hour",
        ),
        Section(
            "workers",
            "WORKERS",
            [
                ("WORKER", 24 if narrow else 0),
                ("SEEN", 14),
                ("RUNS", 9),
                ("BREAKER", 7),
                ("LISTENER", 9),
                ("QUEUES", 0),
            ],
            sorted(picture.workers, key=_trouble_first),
            of_worker,
        ),
    ]
    if several:
        names = ("DUE", "IN A RUN", "WAITING", "PAUSED", "WORKERS", "NOTE")
        columns = [(name, 0) for name in names]
        found.append(
            Section(
                "queues", "QUEUES", columns, sorted(picture.queues, key=_unserved_first), of_queue
            )
        )
    return found


def _trouble_first(row: Row) -> int:
    """Workers that somebody should look at, then the others that live, then those that are gone."""
    if row["alive"]:
        well = row["breaker"] == "closed" and row["bell"] == "listening" and row["held"] is None
        return 1 if well else 0
    return 0 if row["leases"] else 2


def _unserved_first(row: Row) -> tuple[bool, int]:
    """Queues of which nothing is claimed, then those with the most that is due."""
    return row["pause"] is None and row["workers"] > 0, -row["due"]


def _of_queue(row: Row) -> str:
    """Why nothing of a queue is claimed, if so."""
    if (pause := row["pause"]) is not None:
        why = f": {pause['reason']}" if pause["reason"] else ""
        return f"paused by {pause['paused_by']}{why}"
    return "" if row["workers"] else "no live worker serves it"


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which lines there are above and below the sections, and how many rows each section gets."""

    head: Sequence[Text]
    found: Sequence[Section]
    shares: dict[str, int]
    foot: Sequence[Text]
    air: int
    """Empty lines above a section."""

    @classmethod
    def of(cls, picture: Picture, size: tuple[int, int], view: View, link: Link) -> _Plan:
        width, height = size
        head, foot = _head(picture, size, view, link), _footer(width, view)
        head = head[: max(1, height - len(foot) - 3)]
        if height - len(head) - len(foot) < 2:
            head, foot = head[:1], foot[-1:]
        found = sections(picture, view, width, link.elapsed)
        air = 1 if height >= AIRY else 0
        room = height - len(head) - len(foot)
        return cls(head, found, share(found, view.section, room, air), foot, air)


def frame(picture: Picture, size: tuple[int, int | None], view: View, link: Link) -> RenderableType:
    """The screen, of exactly as many lines as `size` (columns, lines) has; without lines (None) as
    many as it needs, and no keys."""
    width, height = size
    if height is None:
        parts: list[RenderableType] = list(_head(picture, size, view, link))
        for s in sections(picture, view, width, link.elapsed):
            parts += [Text(), _table(s, 0, min(PLAIN_ROWS, max(1, len(s.whole))), width)]
        return Group(*parts)
    plan = _Plan.of(picture, (width, height), view, link)
    parts, left = [], height - len(plan.head) - len(plan.foot)
    for s in plan.found:
        if s.name in plan.shares:
            rows, chosen = plan.shares[s.name], s.name == view.section
            top = min(view.top, max(0, len(s.whole) - rows)) if chosen else 0
            parts += [*[Text()] * plan.air, _table(s, top, rows, width, chosen=chosen)]
            left -= rows + 1 + plan.air
    lines = [*plan.head, *parts, *[Text()] * max(0, left), *plan.foot]
    return Group(*lines) if height >= 2 else Group(*plan.head)


def page(picture: Picture, size: tuple[int, int], view: View, link: Link) -> tuple[int, int]:
    """How many rows the chosen section has, and how many of them can be seen: for scrolling."""
    plan = _Plan.of(picture, size, view, link)
    whole = sum(len(s.whole) for s in plan.found if s.name == view.section)
    return whole, plan.shares.get(view.section, 1)


def _head(picture: Picture, size: tuple[int, int | None], view: View, link: Link) -> list[Text]:
    """What stands above the sections."""
    width, _ = size
    lines = [_header(picture, width, view, link), *_alarms(picture, width, view, link)]
    return [*lines, *_counts(picture, width), *_endpoints(picture, size, link.elapsed)]


def share(found: Sequence[Section], chosen: str, room: int, air: int = 0) -> dict[str, int]:
    """The rows of each section that is shown, besides its heading and `air`: a few for each, and
    what is left for the chosen one, then for the others in turn."""
    names = [s.name for s in found]
    chosen = chosen if chosen in names else names[0]
    wants = {s.name: max(1, len(s.whole)) for s in found}
    order = [chosen, *(name for name in names if name != chosen)]
    shares: dict[str, int] = {}
    for name in order:
        if room >= 2 + air:
            shares[name] = 1
            room -= 2 + air
    for name in order:
        least = LEAST_CHOSEN if name == chosen else LEAST_ROWS
        if name in shares:
            more = max(0, min(room, min(least, wants[name]) - shares[name]))
            shares[name] += more
            room -= more
    for name in order:
        if name in shares:
            more = min(room, wants[name] - shares[name])
            shares[name] += more
            room -= more
    return shares


def _table(section: Section, top: int, rows: int, width: int, *, chosen: bool = False) -> Table:
    """The section's heading and its rows from `top` on. `chosen`: keys scroll it."""
    part = section.whole[top : top + rows]
    listed = section.counted or f"{len(section.whole):,}"
    if top:
        listed = f"{top + 1}–{top + len(part)} of {listed}"
    table = Table(
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
        width=width,
        header_style="bold",
        expand=True,
    )
    title = f"{section.title} {listed}" if section.whole or section.counted else section.title
    title = f"> {title}" if chosen else title
    table.add_column(Text(title), min_width=FIRST, max_width=22, no_wrap=True)
    cells = [[escape_controls(str(cell)) for cell in section.cells(row)] for row in part]
    for n, (name, most) in enumerate(section.columns, start=1):
        natural = max((cell_len(row[n]) for row in cells), default=0)
        last = n == len(section.columns)
        wide = max(len(name), min(natural, most) if most else natural)
        table.add_column(
            Text(name),
            no_wrap=True,
            width=None if last else wide,
            ratio=1 if last else None,
            overflow="ellipsis",
        )
    if not cells:
        table.add_row(Text(section.nothing, style="dim"))
    for row in cells:
        table.add_row(*(_coloured(cell) for cell in row))
    return table


def _coloured(cell: str) -> Text:
    style = STYLES.get(cell.partition(";")[0].partition(":")[0], "")
    return Text(cell, style=style, overflow="ellipsis", no_wrap=True)


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _lines(parts: Sequence[str], width: int, glue: str) -> Iterator[str]:
    """The parts in lines, none of which is broken unless it must be."""
    line = ""
    for part in parts:
        longer = f"{line}{glue}{part}" if line else part
        if line and cell_len(longer) > width:
            yield line
            line = part
        else:
            line = longer
    if line:
        yield line


def _header(picture: Picture, width: int, view: View, link: Link) -> Text:
    """Where this is and when, by PostgreSQL's clock, and how it comes."""
    now = picture.now + timedelta(seconds=link.elapsed)
    how = "held" if view.held else "live" if link.listening else "polled"
    how = how if link.lost_for is None else "lost"
    left = f"recall-worker top  {escape_controls(picture.database)}"
    right = f"{local(now)}  {how}"
    blank = width - cell_len(left) - cell_len(right)
    if blank < 2:
        left, right, blank = "top", right[:width], max(1, width - 3 - cell_len(right))
    return _line(f"{left}{' ' * blank}{right}", "bold")


def _alarms(picture: Picture, width: int, view: View, link: Link) -> list[Text]:
    """Sentences on the picture itself, and on what keeps recalls from being called."""
    alarms = []
    if link.lost_for is not None:
        since = picture.now + timedelta(seconds=link.elapsed - link.lost_for)
        alarms.append(
            f"PostgreSQL does not answer since {local(since)} ({whole_span(link.lost_for)}): "
            f"{link.reason}. It is tried again."
        )
    if view.held:
        alarms.append("The picture is held; p lets it go on.")
    if view.needle and not view.typing:
        alarms.append(f"Filter: {view.needle}   (Esc clears it)")
    alarms += picture.notes
    return [
        _line(line, "bold red" if link.lost_for is not None and n == 0 else "bold")
        for n, alarm in enumerate(alarms)
        for line in _lines(escape_controls(alarm).split(" "), width, " ")
    ]


def _counts(picture: Picture, width: int) -> list[Text]:
    def part(whole: str, kind: str) -> str:
        """`3 (1 overdue)`."""
        found = picture.count(kind)
        return f"{picture.count(whole)}" + (f" ({found} {kind})" if found.number else "")

    overdue = picture.count("overdue")
    slots = f" of {picture.slots:,} slots" if picture.alive else ""
    parts = [
        f"due {part('due', 'overdue')}",
        f"in a run {picture.count('in_run')}{slots}",
        f"waiting {part('waiting', 'deferred')}",
        f"paused {picture.count('paused')}",
        f"failed {picture.failed:,} in 1 h",
    ]
    lines = []
    for line in _lines(parts, width, "  "):
        text = _line(line)
        if overdue.number:
            text.highlight_regex(r"\d[\d,]*\+? overdue", "bold red")
        if picture.failed:
            text.highlight_regex(r"failed \d.*", "bold red")
        lines.append(text)
    return lines


def _endpoints(picture: Picture, size: tuple[int, int | None], elapsed: float) -> list[Text]:
    """A sentence for each endpoint, those that fail first and in full."""
    width, height = size
    found = picture.breakers(elapsed, brief=height is not None and height < AIRY)
    more = len(found) - ENDPOINTS
    lines: list[Text] = []
    for failing, sentence in found if more <= 0 else found[: ENDPOINTS - 1]:
        sentence = escape_controls(sentence)
        if failing:
            lines += [_line(line, "bold red") for line in _lines(sentence.split(" "), width, " ")]
        else:
            lines.append(_line(sentence))
    if more > 0:
        rest = found[ENDPOINTS - 1 :]
        bad = sum(failing for failing, _ in rest)
        lines.append(_line(f"And {len(rest)} more endpoints; breakers are open for {bad} of them."))
    return lines


def _footer(width: int, view: View) -> list[Text]:
    """The keys; what is typed; or the help."""
    if view.typing:
        return [_line(f"/{escape_controls(view.needle)}▏ Enter keeps it, Esc clears it", "reverse")]
    if view.help:
        return [_line(line) for line in _lines(HELP.split(" "), width, " ")]
    return [_line(KEYS, "dim")]
