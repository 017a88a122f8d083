"""`top`: the pure parts on fixed data (keys, views, frames, what is remembered), its questions on a
real PostgreSQL. The screen in a terminal: process/test_top.py."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from rich.cells import cell_len

from recall_worker import settings, statements
from recall_worker.terminal import whole_span
from recall_worker.top.feed import Feed, Recent
from recall_worker.top.frame import Link, frame, page, sections, share
from recall_worker.top.picture import MOST, ROWS, Picture, Row
from recall_worker.top.screen import _text
from recall_worker.top.view import SECTIONS, View, keys

from .support.pgbouncer import PgBouncer
from .support.postgres import RECORD
from .support.proxy import Proxy
from .test_cli import DATED, operate
from .test_inspect import Desk, crowd, nodes

NOW = datetime(2027, 1, 31, 3, 4, 5, tzinfo=UTC)
HOSTILE = "\x1b]0;gone\x07\x9b31m\u202eevil\r\n"


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def waiting(id: str, due_in: float, **more: Any) -> dict[str, Any]:
    return {
        "id": id,
        "session_id": f"chat-{id}",
        "queue": "default",
        "call_type": "once",
        "cadence": "interval",
        "cron": None,
        "interval_seconds": None,
        "occurrence": 1,
        "attempt": 0,
        "deferrals": 0,
        "last_outcome": None,
        "reason": None,
        "due_at": ago(-due_in),
    } | more


def running(id: str, for_seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "id": id,
        "session_id": f"chat-{id}",
        "queue": "default",
        "worker": "vm-1-ab12",
        "occurrence": 1,
        "attempt": 1,
        "accepted": False,
        "leased_at": ago(for_seconds),
        "lease_until": ago(-40),
    } | more


def failure(id: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "id": id,
        "session_id": f"chat-{id}",
        "occurrence": 1,
        "rekey": 0,
        "attempt": 3,
        "outcome": "unknown",
        "settled": "failed",
        "calls": 1,
        "worker": "vm-1-ab12",
        "http_status": 500,
        "reason": "HTTP 500: out of memory",
        "ended_at": ago(seconds),
    } | more


def worker(name: str, **more: Any) -> dict[str, Any]:
    return {
        "worker": name,
        "alive": True,
        "elsewhere": False,
        "held": None,
        "seen_at": ago(12),
        "leases": 1,
        "slots": 3,
        "breaker": "closed",
        "bell": "listening",
        "queues": ["default"],
        "settings": {"run_url": "https://api.example/sessions/{session_id}/run"},
    } | more


def counted(queue: str = "default", **more: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(("due", "overdue", "in_run", "waiting", "deferred", "paused"), 0)
    return {"queue": queue, **nothing, "more": []} | more


PICTURE = Picture(
    now=NOW,
    database="app",
    counts=[counted(due=2, overdue=1, in_run=2, waiting=4, deferred=1, paused=3)],
    next=[
        waiting("7c9e6679-7425-40de-944b-e07fc1f90ae7", -192.0),
        waiting("late", -2.0, attempt=1, reason="HTTP 500: out of memory"),
        waiting("soon", 9.0, call_type="recurring", interval_seconds=5400),
        waiting("busy", 61.0, deferrals=3, reason="the session is busy (HTTP 409)"),
        waiting("cron", 7500.0, call_type="recurring", cadence="cron", cron="0 9 * * mon"),
        waiting("会話のビルド", 90_000.0, session_id="会話"),
    ],
    runs=[running("long", 754.0, accepted=True), running("lost", 70.0, lease_until=ago(3))],
    failures=[
        failure("broken", 33.0),
        failure("away", 340.0, outcome="unavailable", settled="pending", calls=7, reason="no"),
    ],
    failed=1,
    workers=[worker("vm-1-ab12"), worker("vm-2-cd34", alive=False, seen_at=ago(400))],
)
AT_80 = """\
recall-worker top  app                              2027-01-31 03:04:05+00  live
due 2 (1 overdue)  in a run 2 of 3 slots  waiting 4 (1 deferred)  paused 3
failed 1 in 1 h
Breaker closed in 1 worker: calls go to https://api.example/sessions/{session_i…
> NEXT DUE 6        RECALL          SESSION         NOTE
3 min 12 s late     7c9e6679-7425…  chat-7c9e6679…  overdue
2 s late            late            chat-late       attempt 2 follows: HTTP 500…
in 9 s              soon            chat-soon       every 1h30m
in 1 min 01 s       busy            chat-busy       deferred 3 times: the sessi…
in 2 h 05 min       cron            chat-cron       cron 0 9 * * mon
in 1 d 01 h         会話のビルド    会話            once
IN A RUN 2          RECALL  SESSION    ATTEMPT  WORKER
12 min 34 s         long    chat-long  1        vm-1-ab12, accepted by the API …
1 min 10 s          lost    chat-lost  1        vm-1-ab12: its lease ended, ano…
FAILURES 2          RECALL  OUTCOME         THEN     REASON
33 s ago            broken  unknown         failed   HTTP 500: out of memory
5 min 40 s ago      away    unavailable ×7  goes on  no
WORKERS 2           WORKER     SEEN            RUNS  BREAKER  LISTENER   QUEUES
silent              vm-2-cd34  6 min 40 s ago  1/3   closed   listening  default
alive               vm-1-ab12  12 s ago        1/3   closed   listening  default



q quit  / filter  s section  ↑↓ scroll  p hold  ? help
"""


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import time

    with monkeypatch.context() as patched:
        patched.setenv("TZ", "UTC")
        patched.delenv("NO_COLOR", raising=False)
        patched.setenv("TERM", "xterm-256color")
        time.tzset()
        yield
    time.tzset()


def drawn(
    picture: Picture = PICTURE,
    size: tuple[int, int | None] = (80, 24),
    view: View = View(),  # noqa: B008 frozen
    link: Link = Link(),  # noqa: B008 frozen
) -> list[str]:
    """The frame's lines, without colours."""
    text = _text(frame(picture, size, view, link), size[0], height=size[1])
    return [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", text).split("\n")]


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "found", "rest"),
    [
        (b"q", ["q"], b""),
        (b"\x1b[A\x1bOB\x1b[5~", ["up", "down", "page up"], b""),
        (b"\x1b[1;5C\x1b[200~x", ["x"], b""),
        (b"\r\n\x7f\x15\t", ["enter", "enter", "backspace", "erase", "tab"], b""),
        ("é会🎉".encode(), ["é", "会", "🎉"], b""),
        ("会".encode()[:2], [], "会".encode()[:2]),
        (b"a\x1b", ["a"], b"\x1b"),
        (b"\x1b[", [], b"\x1b["),
        (b"\x1bq", ["escape", "q"], b""),
        (b"\xff\xfeq\x00\x01", ["q"], b""),
    ],
)
def test_keys(data: bytes, found: list[str], rest: bytes) -> None:
    """What a terminal sends, as keys; what may go on is waited for."""
    assert keys(data, ended=False) == (found, rest)


def test_an_escape_is_one_when_nothing_follows() -> None:
    assert keys(b"\x1b", ended=True) == (["escape"], b"")
    assert keys(b"\x1b[", ended=True) == ([], b"")
    assert keys("会".encode()[:2], ended=True) == ([], b"")


def pressed(*names: str, view: View = View(), rows: int = 50, page: int = 10) -> View:  # noqa: B008
    for name in names:
        view = view.press(name, rows, page)
    return view


def test_scrolling_stays_within_the_section() -> None:
    assert pressed("up").top == 0
    assert pressed("down", "j", "k").top == 1
    assert pressed("page down").top == 9
    assert pressed("end", "down").top == 40
    assert pressed("G", "page up", "home").top == 0
    assert pressed("page down", rows=3).top == 0
    # The section has become shorter.
    assert View(top=40).press("up", 12, 10).top == 1


def test_sections_follow_each_other() -> None:
    order = [pressed(*"s" * n).section for n in range(len(SECTIONS) + 1)]
    assert order == [*SECTIONS, SECTIONS[0]]
    assert pressed("S").section == SECTIONS[-1]
    assert View(section="queues").press("s", 0, 1, ("next", "runs")).section == "runs"
    assert pressed("down", "s").top == 0


def test_the_filter() -> None:
    """Keys are text while it is typed; Enter keeps it, Escape clears it."""
    typing = pressed("/", "q", "p", "x", "backspace", "down")
    assert (typing.needle, typing.typing, typing.quit, typing.held) == ("qp", True, False, False)
    assert pressed("enter", "q", view=typing) == replace(typing, typing=False, quit=True)
    assert pressed("escape", view=typing) == View()
    assert pressed("enter", "escape", view=typing) == View()
    assert pressed("erase", view=typing).needle == ""
    assert len(pressed("/", *"x" * 1000).needle) == 200


def test_hold_help_quit() -> None:
    assert pressed("p").held and not pressed("p", "p").held
    assert pressed("?").help and not pressed("?", "?").help
    assert pressed("q").quit
    assert pressed("x", "Z", "tab", "é").section == "runs", "other keys mean nothing"


# --- frames ---------------------------------------------------------------------------------------


def test_a_frame() -> None:
    """All of it at 80 columns and 24 lines."""
    assert [*drawn(), ""] == AT_80.split("\n")


def test_a_wide_frame_has_whole_ids_and_reasons() -> None:
    lines = drawn(size=(200, 40))
    text = "\n".join(lines)
    assert "7c9e6679-7425-40de-944b-e07fc1f90ae7" in text
    assert "deferred 3 times: the session is busy (HTTP 409)" in text
    assert "lost" in text and "its lease ended, another worker takes it over" in text
    assert len(lines) == 40 and lines[-1].startswith("q quit")


BUSY = replace(
    PICTURE,
    next=[waiting(f"id-{n:03}-{'x' * 30}", n) for n in range(ROWS)],
    runs=[running(f"run-{n}", n) for n in range(60)],
    failures=[failure(f"bad-{n}", n) for n in range(ROWS)],
    workers=[worker(f"vm-{n}", breaker="open" if n % 2 else "closed") for n in range(9)],
    counts=[
        counted(due=MOST, overdue=MOST, waiting=MOST, more=["due", "waiting"]),
        counted("mail", paused=3),
    ],
    paused_queues=[{"queue": "mail", "paused_at": ago(9), "paused_by": "ann", "reason": "moved"}],
    copy=True,
)
NOTHING = Picture(now=NOW, database="app")
LOST = Link(elapsed=75.0, listening=False, lost_for=70.0, reason="connection refused")
LINKS = (Link(), LOST)


@pytest.mark.parametrize("picture", [PICTURE, BUSY, NOTHING], ids=["some", "many", "nothing"])
@pytest.mark.parametrize(
    "view",
    [
        View(),
        View(help=True),
        View(typing=True, needle="x" * 150),
        View(needle="id-1", held=True, section="queues", top=900),
    ],
    ids=["plain", "help", "typing", "held"],
)
def test_a_frame_fits_any_size(picture: Picture, view: View) -> None:
    """As many lines as there are, none wider than the screen, and the keys in the last one."""
    for columns, lines, link in product((1, 20, 40, 80, 100, 140), (1, 2, 3, 5, 10, 24, 40), LINKS):
        found = drawn(picture, (columns, lines), view, link)
        assert len(found) <= lines
        assert max(map(cell_len, found)) <= columns
        if lines >= 10 and columns >= 40:
            assert len(found) == lines
            assert found[-1].startswith(("q quit", "/xxx")) or view.help
            rows, seen = page(picture, (columns, lines), view, link)
            assert rows >= 0 and 1 <= seen <= lines


def test_without_a_terminal_all_is_listed() -> None:
    """As many lines as are needed, and no keys."""
    lines = drawn(BUSY, (80, None))
    assert sum("id-0" in line for line in lines) == 20
    assert not any("q quit" in line for line in lines)
    assert "> " not in "".join(line[:2] for line in lines)


def test_spans_tick_between_looks() -> None:
    """By the time that has passed here."""
    later = "\n".join(drawn(link=Link(elapsed=5.4)))
    assert "2027-01-31 03:04:10+00" in later
    assert "in 3 s              soon" in later
    assert "3 min 17 s late" in later and "7 s late            late" in later
    assert "12 min 39 s         long" in later and "38 s ago            broken" in later
    assert "1 s late            soon" in "\n".join(drawn(link=Link(elapsed=10.5)))


def test_the_chosen_section_has_the_room_and_scrolls() -> None:
    lines = drawn(BUSY, (80, 40), View(section="failures", top=100))
    heading = next(line for line in lines if "FAILURES" in line)
    assert heading.startswith("> FAILURES 101–")
    assert sum(" ago " in line and "bad-" in line for line in lines) > 10
    assert "bad-100 " in lines[lines.index(heading) + 1]
    last = drawn(BUSY, (80, 40), View(section="failures", top=9999))
    assert any("bad-199" in line for line in last), "no further than its end"


def test_an_outage_is_told() -> None:
    lines = drawn(link=LOST)
    assert lines[0].endswith("  lost")
    assert lines[1:3] == [
        "PostgreSQL does not answer since 2027-01-31 03:04:10+00 (1 min 10 s): connection",
        "refused. It is tried again.",
    ]


def test_how_it_comes_is_told() -> None:
    assert drawn()[0].endswith("  live")
    assert drawn(link=Link(listening=False))[0].endswith("  polled")
    held = drawn(view=View(held=True))
    assert held[0].endswith("  held") and held[1] == "The picture is held; p lets it go on."


def test_what_keeps_recalls_from_being_called() -> None:
    assert "No live worker: nothing is called. Start one with: recall-worker run" in drawn(NOTHING)
    text = "\n".join(drawn(BUSY, (120, 40)))
    assert "This database is a copy" in text
    assert "paused by ann: moved" in text
    everything = replace(PICTURE, paused_queues=[{**BUSY.paused_queues[0], "queue": "*"}])
    assert "All queues are paused: nothing is claimed until queues resume --all." in drawn(
        everything
    )
    held = replace(PICTURE, workers=[worker("vm-1", held="paused")])
    assert "All live workers are held: they claim nothing." in drawn(held)


def test_breakers_by_endpoint() -> None:
    """A sentence for each, those that fail first; of many only some."""

    def at(host: str, **more: Any) -> Row:
        return worker(f"w-{host}-{len(more)}", settings={"run_url": f"https://{host}/"}, **more)

    picture = replace(
        PICTURE,
        workers=[at("a"), at("b", breaker="open"), at("b"), at("c", breaker="open", alive=False)],
    )
    assert [sentence for _, sentence in picture.breakers()] == [
        "Breaker open in 1 of 2 workers: https://b/ is failing, only test calls are sent until it "
        "answers",
        "Breaker closed in 1 worker: calls go to https://a/",
    ]
    calm = replace(PICTURE, workers=[at("a"), at("b"), at("b")])
    assert [text for _, text in calm.breakers(brief=True)] == [
        "Breaker closed for 2 endpoints, in 3 workers"
    ]
    many = replace(PICTURE, workers=[at(f"h{n}", breaker="open") for n in range(5)])
    assert "And 3 more endpoints; breakers are open for 3 of them." in drawn(many)


def test_the_last_test_call_of_a_failing_endpoint() -> None:
    import hashlib

    url = "https://api.example/sessions/{session_id}/run"
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    picture = replace(
        PICTURE,
        workers=[worker("w", breaker="open")],
        endpoints=[{"endpoint": key, "probed_at": ago(7)}],
    )
    [(failing, sentence)] = picture.breakers(elapsed=3.0)
    assert failing and "only test calls are sent (the last one 10 s ago) until" in sentence


def test_hostile_texts_are_escaped_and_columns_aligned() -> None:
    """Nothing of a row controls the terminal, and wide characters take two cells."""
    picture = replace(
        PICTURE,
        database=HOSTILE,
        next=[
            waiting(HOSTILE, 5.0, session_id=HOSTILE, deferrals=1, reason=HOSTILE, queue=HOSTILE),
            waiting("短い", 6.0),
            waiting("[bold]x[/] :smile:", 7.0),
        ],
        runs=[running(HOSTILE, 5.0, worker=HOSTILE)],
        failures=[failure(HOSTILE, 5.0, reason=HOSTILE, outcome=HOSTILE)],
        workers=[worker(HOSTILE, queues=[HOSTILE], breaker=HOSTILE, settings={"run_url": HOSTILE})],
        counts=[counted(HOSTILE, due=1), counted()],
    )
    for size in ((80, 24), (200, 60)):
        lines = drawn(picture, size, View(needle=""))
        assert all(line.isprintable() for line in lines)
        rows = [next(line for line in lines if mark in line) for mark in ("短い", "[bold]x[/]")]
        at = [cell_len(line[: line.index("chat-")]) for line in rows]
        assert at[0] == at[1]
    assert all(
        line.isprintable() for line in drawn(picture, view=View(typing=True, needle=HOSTILE))
    )


def test_colours_only_repeat_what_words_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is the same without them, and NO_COLOR leaves none."""
    colour = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|38;[\d;]+|9[0-7])m")
    picture = frame(BUSY, (80, 24), View(), LOST)
    coloured = _text(picture, 80, height=24)
    assert colour.search(coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = _text(picture, 80, height=24)
    assert not colour.search(plain)
    codes = re.compile(r"\x1b\[[\d;]*m")
    assert codes.sub("", coloured).split() == codes.sub("", plain).split()
    assert "\x1b" not in _text(frame(BUSY, (80, None), View(), Link()), 80)


@pytest.mark.parametrize("air", [0, 1])
def test_the_room_is_shared(air: int) -> None:
    """Whatever there is and whoever is chosen: it fits, and nothing is left while rows are not
    shown."""
    found = sections(BUSY, View(), 80, 0.0)
    for room in range(2, 300):
        for chosen in SECTIONS:
            shares = share(found, chosen, room, air)
            used = sum(rows + 1 + air for rows in shares.values())
            wants = {s.name: max(1, len(s.whole)) for s in found}
            assert chosen in shares or room < 2 + air
            assert used <= room and all(0 < rows <= wants[name] for name, rows in shares.items())
            if used < room - 1 - air:
                assert shares == wants or len(shares) < len(found)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.9, "59 s"), (60, "1 min 00 s"), (3600, "1 h 00 min"), (90_000, "1 d 01 h")],
)
def test_spans(seconds: float, text: str) -> None:
    assert whole_span(seconds) == text


# --- what is remembered ---------------------------------------------------------------------------


def test_failures_of_the_hour_are_remembered() -> None:
    """Each look adds the latest; a call that ended again counts once; after an hour it is gone."""
    recent = Recent()
    assert recent.since(None) is None
    minute = int(NOW.timestamp() // 60)
    recent.add(
        [failure("a", 5.0), failure("b", 3000.0)],
        [{"minute": minute, "failed": 1}, {"minute": minute - 50, "failed": 4}],
        NOW,
    )
    assert [row["id"] for row in recent.failures] == ["a", "b"] and recent.failed == 5
    assert recent.since(None) == NOW
    # The minute is counted anew, and one is named again with a later end.
    later = NOW + timedelta(seconds=2)
    recent.add([failure("a", -1.0, calls=2)], [{"minute": minute, "failed": 2}], later)
    assert [row["calls"] for row in recent.failures] == [2, 1] and recent.failed == 6
    # What the look before had asked for from on is asked for again.
    recent.add([], [{"minute": minute, "failed": 2}], NOW + timedelta(seconds=700))
    assert [row["id"] for row in recent.failures] == ["a"] and recent.failed == 2
    recent.add([], [], NOW + timedelta(hours=2))
    assert recent.failures == [] and recent.failed == 0


def test_another_filter_forgets() -> None:
    recent = Recent()
    recent.add([failure("a", 5.0)], [{"minute": int(NOW.timestamp() // 60), "failed": 1}], NOW)
    assert recent.since("x") is None
    assert recent.failures == [] and recent.failed == 0


# --- PostgreSQL -----------------------------------------------------------------------------------


@asynccontextmanager
async def feeding(dsn: str, **more: str) -> AsyncIterator[Feed]:
    feed = Feed(lambda: settings.read({}, needed=["dsn"], dsn=dsn, **more))
    try:
        yield feed
    finally:
        feed.close()


@pytest.fixture
def desk(database: str) -> Iterator[Desk]:
    made = Desk(database)
    yield made
    made.conn.close()


def states(desk: Desk) -> None:
    """A recall in each state, one a session."""
    desk.conn.execute("insert into sessions select 's' || n, 'ann' from generate_series(1, 20) n")
    desk.worker(slots=5)
    desk.conn.execute("update recall_workers set queues = '{default}', generation = 99")
    desk.recall("due", "s1", -5.0)
    desk.recall("overdue", "s2", -600.0)
    desk.recall("in-run", "s3", -30.0)
    desk.lease("in-run")
    desk.recall("waiting", "s4", 600.0)
    desk.recall("deferred", "s5", 60.0, deferrals=2, reason="the session is busy")
    desk.recall("paused", "s6", -60.0, paused_at=datetime.now(UTC))
    desk.recall("fired", "s7", -60.0, status="fired")
    desk.recall("never", "s8", 60.0)
    desk.conn.execute("alter table session_recalls disable trigger user")
    desk.change("never", trigger_at="infinity")
    desk.conn.execute("alter table session_recalls enable trigger user")
    desk.recall("mail", "s9", 30.0, queue="mail")
    desk.conn.execute(
        """insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome, session_id,
               worker, lease, scheduled_for, ended_at, settled, reason)
           select 'a' || n, 1, 0, 1, (array['unknown', 'refused', 'answered', 'busy'])[n], 's',
               'w', gen_random_uuid(), now(), now() - n * interval '10 s',
               (array['pending', 'failed', 'fired', 'pending'])[n], 'why not'
           from generate_series(1, 4) n
           union all
           select 'old', 1, 0, 1, 'unknown', 's', 'w', gen_random_uuid(), now(),
               now() - interval '2 h', 'failed', 'long ago'
           union all
           select 'odd', 1, 0, 1, 'unknown', 's', 'w', gen_random_uuid(), now(), 'infinity',
               'failed', 'never'"""
    )


async def test_a_look_counts_every_state(desk: Desk) -> None:
    states(desk)
    async with feeding(desk.dsn) as feed:
        picture = await feed.look(None)
        again = await feed.look(None)
    counts = {k: picture.count(k).number for k in ("due", "overdue", "in_run", "paused")}
    assert counts == {"due": 2, "overdue": 1, "in_run": 1, "paused": 1}
    assert (picture.count("waiting").number, picture.count("deferred").number) == (4, 1)
    assert not picture.count("due").more
    assert [row["id"] for row in picture.next] == [
        "overdue",
        "due",
        "mail",
        "deferred",
        "waiting",
        "never",
    ]
    assert [row["id"] for row in picture.runs] == ["in-run"]
    assert [(row["id"], row["outcome"]) for row in picture.failures] == [
        ("a1", "unknown"),
        ("a2", "refused"),
    ]
    assert picture.failed == 1 and again.failed == 1 and len(again.failures) == 2
    assert [row["queue"] for row in picture.queues] == ["default", "mail"]
    assert not picture.copy and picture.slots == 5
    assert drawn(picture) and drawn(again, (200, 60))


async def test_a_copy_is_told_until_it_is_none(desk: Desk) -> None:
    """Also while the screen stays open."""
    desk.conn.execute("update recall_identity set database_oid = 1")
    async with feeding(desk.dsn) as feed:
        assert (await feed.look(None)).copy
        desk.conn.execute(RECORD)
        await feed.look(None)
        assert not (await feed.look(None)).copy


async def test_a_filter_is_for_all_recalls(desk: Desk) -> None:
    """By id, session or queue, whatever the case; also of what its rows do not show."""
    states(desk)
    desk.recall("a1", "s10", 3600.0, queue="mail")
    async with feeding(desk.dsn) as feed:
        by_queue = await feed.look("mail")
        by_id = await feed.look("overd")
        by_session = await feed.look("s3")
    assert {row["id"] for row in by_queue.next} == {"mail", "a1"}
    assert [row["id"] for row in by_queue.failures] == ["a1"] and by_queue.failed == 0
    assert by_queue.count("waiting").number == 2 and by_queue.count("in_run").number == 0
    assert [row["id"] for row in by_id.next] == ["overdue"] and by_id.runs == []
    assert [row["id"] for row in by_session.runs] == ["in-run"]
    shown = "\n".join(drawn(by_queue, view=View(needle="MAIL")))
    assert "Filter: MAIL" in shown and "a1" in shown and "refused" not in shown


async def test_a_look_is_one_round_trip(desk: Desk) -> None:
    """Once the connection is there; and it hears notifications."""
    states(desk)
    async with Proxy(desk.dsn) as proxy, feeding(proxy.dsn) as feed:
        await feed.look(None)
        assert feed.listening
        before = proxy.asked
        for needle in (None, None, "mail", None):
            await feed.look(needle)
        assert proxy.asked == before + 4
        feed.heard.clear()
        desk.conn.execute("notify session_recalls")
        async with asyncio.timeout(20):
            await feed.heard.wait()


async def test_after_an_outage_another_connection_is_opened(desk: Desk) -> None:
    async with Proxy(desk.dsn) as proxy, feeding(proxy.dsn) as feed:
        await feed.look(None)
        feed.heard.clear()
        proxy.cut()
        async with asyncio.timeout(20):
            await feed.heard.wait()
        with pytest.raises(psycopg.OperationalError):
            await feed.look(None)
        assert not feed.listening
        proxy.heal()
        assert (await feed.look(None)).database and feed.listening


async def test_through_a_pooler(desk: Desk, bouncer: PgBouncer) -> None:
    """Only looks; with RECALL_LISTEN_DSN notifications, too. Nothing stays behind."""
    states(desk)
    pooled = bouncer.way_to(desk.dsn)
    async with feeding(pooled) as feed:
        assert (await feed.look(None)).count("due").number == 2
        assert (await feed.look("mail")).count("due").number == 0
        assert not feed.listening
    async with feeding(pooled, listen_dsn=desk.dsn) as feed:
        await feed.look(None)
        assert feed.listening
        feed.heard.clear()
        desk.conn.execute("notify session_recalls")
        async with asyncio.timeout(20):
            await feed.heard.wait()
        assert (await feed.look(None)).count("due").number == 2


OF: dict[str, Any] = {
    "needle": None,
    "most": MOST,
    "depth": ROWS,
    "rows": ROWS,
    "late": 60.0,
    "since": None,
    "overlap": 60.0,
    "window": 3600.0,
}


@pytest.mark.slow
def test_a_look_reads_few_rows_by_indexes(server: str, template: str) -> None:
    """Of a table of 40,000 rows, half of them live: nothing is read through, and no part of a
    plan has more rows than a count may read."""
    filtered: dict[str, Any] = OF | {"needle": "live7", "depth": MOST}
    with crowd(server, template, 20_000) as dsn:
        with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as conn:
            for of, (name, statement) in product((OF, filtered), statements.load("top").items()):
                found = conn.execute(f"explain (analyze, format json) {statement}".encode(), of)
                row = found.fetchone()
                assert row is not None
                scans = [n for n in nodes(row["QUERY PLAN"][0]["Plan"]) if n.get("Relation Name")]
                through = [n["Relation Name"] for n in scans if n["Node Type"] == "Seq Scan"]
                assert not {"session_recalls", "recall_attempts"} & set(through), name
                if name not in ("failures", "failed"):
                    read = [n["Actual Rows"] * n["Actual Loops"] for n in scans]
                    assert max(read, default=0) <= MOST, (name, read)


# --- without a screen -----------------------------------------------------------------------------


def test_one_picture_in_a_pipe(desk: Desk) -> None:
    states(desk)
    said = operate(desk.dsn, "top")
    assert said.status == 0 and said.err == ""
    assert "\x1b" not in said.out and max(map(cell_len, said.out.splitlines())) <= 80
    assert "due 2 (1 overdue)  in a run 1 of 5 slots" in said.out
    wide = operate(desk.dsn, "top", "--filter", "MAIL", environ={"COLUMNS": "132"}).out
    assert "Filter: MAIL" in wide and "mail" in wide and "overdue" not in wide
    assert 100 < max(map(cell_len, wide.splitlines())) <= 132


def test_its_document(desk: Desk) -> None:
    states(desk)
    said = operate(desk.dsn, "top", "--json")
    document = said.document
    assert said.err == "" and said.out.count("\n") == 1
    dates = [document["at"], *(row["due_at"] for row in document["next"])]
    assert all(DATED.fullmatch(date) for date in dates)
    assert document["counts"] == {
        "due": 2,
        "overdue": 1,
        "in_run": 1,
        "waiting": 4,
        "deferred": 1,
        "paused": 1,
        "failed_last_hour": 1,
    }
    assert document["not_counted_to_the_end"] == [] and document["counted_to"] == MOST
    assert [row["id"] for row in document["runs"]] == ["in-run"]
    assert document["workers"][0]["state"] == "alive"
    assert {row["queue"]: row["waiting"] for row in document["queues"]} == {"default": 3, "mail": 1}


REFUSED: list[tuple[Callable[[str], str], int, str]] = [
    (lambda dsn: "postgresql://u:sekret@127.0.0.1:1/x", 3, "can't be reached"),
    (lambda dsn: dsn, 1, "recall-worker migrate"),
]


@pytest.mark.parametrize(("way", "status", "words"), REFUSED, ids=["unreachable", "no schema"])
def test_what_fails_at_first_shows_no_screen(
    way: Callable[[str], str], status: int, words: str, empty_database: str
) -> None:
    said = operate(way(empty_database), "top")
    assert said.status == status and said.out == "" and said.err.startswith("Error: ")
    assert words in said.err and "sekret" not in said.err


def test_the_daemon_does_not_pay_for_it() -> None:
    """Neither `run` nor the list of commands imports the screen."""
    code = (
        "import sys, recall_worker.cli.run, recall_worker.worker.process;"
        "import recall_worker.cli.app;"
        "assert not [m for m in sys.modules if m.startswith('recall_worker.top')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
