"""`show`, `actions`, and how `why` tells an ending: what happened to a recall, and who did it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from recall_worker.operations.story import UNKNOWN, Entry, changes, story

from .conftest import Connection
from .support.daemon import Daemons
from .test_cli import operate, plain, terminal, trouble
from .test_inspect import DATE, Desk

NOW = datetime.now(UTC)


@pytest.fixture
def desk(database: str) -> Iterator[Desk]:
    at = Desk(database)
    yield at
    at.conn.close()


def sentences(desk: Desk, id: str = "r", *options: str) -> list[str]:
    """The story that `show` tells, without its times."""
    said = operate(desk.dsn, "show", id, *options)
    assert said.status == 0, said
    return [
        line.partition("  ")[2] for line in said.out.splitlines() if re.match(rf"{DATE}  ", line)
    ]


def by(actor: str, *words: str, dsn: str) -> None:
    said = operate(dsn, *words, environ={"RECALL_ACTOR": actor})
    assert said.status == 0, said


def test_the_story_of_a_recall(desk: Desk) -> None:
    """Made, moved, edited, called, paused, resumed, cancelled: the last first, and by whom."""
    by("ann", "schedule", "s", "SECRET", "--every", "1h", "--times", "9", dsn=desk.dsn)
    [row] = desk.conn.execute("select id from session_recalls").fetchall()
    id = row["id"]
    by("bob", "reschedule", id, "--in", "2h", dsn=desk.dsn)
    by("bob", "edit", id, "--times", "5", dsn=desk.dsn)
    desk.mark(id, outcome="answered", ago=0, late=0.5)
    by("eve", "pause", id, dsn=desk.dsn)
    by("eve", "resume", id, dsn=desk.dsn)
    by("zoe on call", "cancel", id, dsn=desk.dsn)
    told = sentences(desk, id)
    for sentence, pattern in zip(
        told,
        [
            r"cancelled by zoe on call \(cli\): status pending → cancelled, occurrence 1",
            r"resumed by eve \(cli\)",
            r"paused by eve \(cli\)",
            r"occurrence 1, attempt 1: answered \(HTTP 409\): why not; 500\.0 ms late; .*",
            r"edited by bob \(cli\): times 9 → 5",
            r"moved by bob \(cli\): due .* → .*",
            r"scheduled by ann \(cli\): session s, every 1h, 9 times, due .*",
        ],
        strict=True,
    ):
        assert re.fullmatch(pattern, sentence), (sentence, pattern)
    assert "SECRET" not in "".join(told)


def test_made_and_ended_by_the_application(desk: Desk) -> None:
    """Its own SQL is not on record; what the row says of it is told."""
    desk.recall()
    desk.change(status="cancelled")
    assert sentences(desk) == [f"cancelled; {UNKNOWN}", f"made; {UNKNOWN}"]


def test_the_latest_first_and_no_more_than_asked(desk: Desk) -> None:
    """Ten of them, or as many as --limit says; how many there are is said on stderr. For --json
    all, the oldest first, as ever, or the latest of them."""
    desk.recall(call_type="recurring", created_at=NOW - timedelta(days=1))
    for n in range(1, 16):
        desk.mark(occurrence=n, outcome="answered", ago=60 - n)
    said = operate(desk.dsn, "show", "r")
    assert re.findall(r"occurrence (\d+), attempt", said.out) == [str(n) for n in range(15, 5, -1)]
    assert said.err == "The latest 10 of 16 entries: --limit 16 shows all.\n"
    said = operate(desk.dsn, "show", "r", "--limit", "2")
    assert re.findall(r"occurrence (\d+), attempt", said.out) == ["15", "14"]
    whole = operate(desk.dsn, "show", "r", "--limit", "16")
    assert whole.err == "" and whole.out.count(", attempt") == 15
    document = operate(desk.dsn, "show", "r", "--json").document
    assert [call["occurrence"] for call in document["calls"]] == list(range(1, 16))
    assert document["actions"] == [] and document["told"] == []
    document = operate(desk.dsn, "show", "r", "--json", "--limit", "2").document
    assert [call["occurrence"] for call in document["calls"]] == [14, 15]


def test_a_recall_that_was_deleted(desk: Desk) -> None:
    """Its calls and actions are on record, and shown; so are actions alone."""
    desk.recall()
    by("ann", "pause", "r", dsn=desk.dsn)
    desk.conn.execute("delete from session_recalls")
    said = operate(desk.dsn, "show", "r")
    assert said.status == 0 and said.err.startswith("The recall is gone")
    assert "paused by ann (cli)" in said.out
    document = operate(desk.dsn, "show", "r", "--json").document
    assert document["recall"] is None
    assert [action["action"] for action in document["actions"]] == ["pause"]
    assert "there is no recall q" in trouble(operate(desk.dsn, "show", "q"), 1)


@pytest.mark.slow
def test_a_story_fits_the_terminal(desk: Desk) -> None:
    """At 80 columns nothing is cut: sentences are wrapped behind their times."""
    desk.recall(due=7200)
    by("ann", "reschedule", "r", "--in", "3h", dsn=desk.dsn)
    desk.mark(outcome="unavailable", calls=3)
    desk.conn.execute("update recall_attempts set reason = repeat('no connection ', 20)")
    shown = plain(terminal(desk.dsn, "show", "r", columns=80))
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.count("no connection") == 20
    for columns in (80, 120):
        shown = plain(terminal(desk.dsn, "actions", columns=columns))
        assert max(map(len, shown.splitlines())) <= columns
        assert re.search(r"ann .*reschedule .* due ", shown)


# --- actions --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_actions_are_found(desk: Desk) -> None:
    """The last first; by recall, time, actor (with or without the host) and action."""
    desk.recall()
    desk.recall("q", "t")
    by("ann@host-1", "pause", "r", dsn=desk.dsn)
    by("bob", "pause", "q", dsn=desk.dsn)
    by("ann@host-2", "resume", "r", dsn=desk.dsn)
    by("bob", "queues", "pause", "default", dsn=desk.dsn)
    desk.conn.execute(
        "insert into recall_actions (at, actor, via, action, recall_id) "
        "values (now() - interval '2 days', 'zoe', 'command line', 'cancel', 'gone')"
    )

    def found(*options: str) -> list[tuple[str, str]]:
        document = operate(desk.dsn, "actions", *options, "--json").document
        return [(row["actor"], row["action"]) for row in document]

    old = ("zoe", "cancel")
    resumed, paused = ("ann@host-2", "resume"), ("ann@host-1", "pause")
    other, queue = ("bob", "pause"), ("bob", "pause_queue")
    assert found() == [old, queue, resumed, other, paused]
    assert found("r") == [resumed, paused]
    assert found("gone") == [old]
    assert found("--since", "1h") == [queue, resumed, other, paused]
    assert found("--since", "2020-01-01") == found()
    assert found("--actor", "ann") == [resumed, paused]
    assert found("--actor", "ann@host-1") == [paused]
    assert found("--action", "pause", "--action", "resume") == [resumed, other, paused]
    assert found("--limit", "2") == [old, queue]
    assert operate(desk.dsn, "actions", "nobody").status == 1
    said = operate(desk.dsn, "actions", "--limit", "2")
    assert said.out.splitlines()[0].split() == ["WHEN", "WHO", "VIA", "ACTION", "RECALL", "CHANGE"]
    assert said.err == "More are on record: --limit 20\n"
    # As it stands, from before the words were chosen.
    assert re.search(r"zoe +command line +cancel +gone", operate(desk.dsn, "actions").out)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--since", "soon"], "--since 'soon' is neither a duration nor a time"),
        (["--since", "5"], "is neither a duration nor a time"),
        (["--action", "destroy"], "there is no action destroy"),
        (["--limit", "0"], "--limit"),
    ],
)
def test_actions_that_make_no_sense(words: list[str], says: str, desk: Desk) -> None:
    """A usage error, which says what is accepted."""
    assert says in trouble(operate(desk.dsn, "actions", *words), 2)


DETAILS: list[tuple[str, Any, str]] = [
    ("cancel", {"status": {"from": "pending", "to": "cancelled"}}, "status pending → cancelled"),
    ("cancel", {"occurrence": 2, "in_run": True}, "occurrence 2, in a run"),
    ("cancel", {"occurrence": 2, "in_run": False}, "occurrence 2"),
    ("edit", {"grace_seconds": {"from": None, "to": 90}}, "grace none → 1m30s"),
    ("edit", {"internal_comment": "changed"}, "comment changed"),
    ("edit", {"trigger_at": {"from": "infinity", "to": "soon"}}, "due infinity → soon"),
    ("pause", {"paused_at": {"from": None, "to": "2030-01-01T00:00:00+00:00"}}, ""),
    ("fire", {"occurrence": 3, "extra": None}, "occurrence 3"),
    ("fire", {"occurrence": 3, "extra": 1}, "occurrence 3, extra run 1"),
    ("skip", {"trigger_at": "2030-01-01T00:00:00+00:00"}, "due 2030-01-01 00:00:00+00"),
    ("schedule", {"session_id": "s", "trigger_at": "never"}, "session s, due never"),
    ("schedule", {"session_id": 5, "cron": {"from": None, "to": []}}, "None"),
    ("pause_queue", {"queue": "mail", "reason": "repair"}, "queue mail, reason repair"),
    ("anything", [1, 2], ""),
    ("anything", None, ""),
    ("anything", {"odd_name": {"from": 1}}, "odd name {'from': 1}"),
]


@pytest.mark.parametrize(("action", "detail", "says"), DETAILS)
def test_details(action: str, detail: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was changed, in a line; also where some other program wrote the detail."""
    monkeypatch.setenv("TZ", "UTC")
    import time

    time.tzset()
    assert changes({"action": action, "detail": detail, "at": NOW}) == says


HOSTILE = "\x1b]0;gone\x07\u202e\nr: cancelled"


def test_hostile_texts_of_a_story(desk: Desk) -> None:
    """Whoever may record actions may write anything: it does not reach the terminal as it is."""
    desk.recall()
    desk.conn.execute(
        "insert into recall_actions (actor, via, action, recall_id, detail) "
        "values (%(text)s, %(text)s, %(text)s, 'r', %(detail)s)",
        {"text": HOSTILE, "detail": json.dumps({HOSTILE: HOSTILE})},
    )
    desk.mark()
    desk.conn.execute("update recall_attempts set reason = %s, worker = %s", [HOSTILE] * 2)
    for words in (["show", "r"], ["actions"], ["events"]):
        said = operate(desk.dsn, *words)
        assert said.status == 0
        assert not set(said.out) & {"\x1b", "\x07", "\u202e"}
        assert not [line for line in said.out.splitlines() if line.startswith("r: cancelled")]


def test_a_story_in_order() -> None:
    """Calls and actions are merged by time, the last first; of one time, what was done after what
    the row tells."""
    action = {"action": "cancel", "actor": "a", "via": "sql", "detail": {}}
    actions = [{**action, "at": NOW + timedelta(minutes=n)} for n in (0, 5)]
    told = story([], actions, [Entry(NOW, "made"), Entry(NOW + timedelta(minutes=1), "ended")])
    assert [entry.says for entry in told] == [
        "cancelled by a (sql)",
        "ended",
        "cancelled by a (sql)",
        "made",
    ]


# --- why ------------------------------------------------------------------------------------------


def test_why_it_was_cancelled(desk: Desk) -> None:
    """By whom, and how its last call had ended."""
    desk.recall()
    desk.mark(outcome="busy", calls=3, late=2.5)
    by("ann", "cancel", "r", dsn=desk.dsn)
    assert re.fullmatch(
        rf"Cancelled {DATE} \(now\) by ann \(cli\); its last call \(occurrence 1, attempt 1\) was "
        rf"sent {DATE}, 2\.5 s late, and ended as busy \(HTTP 409\) 3 times\.",
        desk.why(),
    ), desk.why()


def test_why_it_fired(desk: Desk) -> None:
    """When, how late, with which answer."""
    desk.recall(status="fired", ended_at=NOW - timedelta(hours=2), last_outcome="answered")
    desk.mark(outcome="answered", late=0.25)
    desk.conn.execute("update recall_attempts set http_status = 200, reason = null")
    assert re.fullmatch(
        rf"Fired {DATE} \(2 h ago\); its last call \(occurrence 1, attempt 1\) was sent {DATE}, "
        r"250\.0 ms late, and ended as answered \(HTTP 200\)\.",
        desk.why(),
    ), desk.why()


def test_a_cancel_that_was_undone_is_nobodys_ending(desk: Desk) -> None:
    """Cancelled by ann, retried by bob, failed by itself: ann did not end it."""
    desk.recall()
    by("ann", "cancel", "r", dsn=desk.dsn)
    by("bob", "retry", "r", dsn=desk.dsn)
    desk.change(status="failed", ended_at=NOW, reason="HTTP 422: no such tool")
    assert re.fullmatch(
        rf"Failed {DATE} \(.*\): HTTP 422: no such tool; no call of it is on record\.", desk.why()
    ), desk.why()


# --- workers --------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_killed_worker_is_silent(database: str, db: Connection, daemons: Daemons) -> None:
    """A worker that was killed is silent 44 s later, with its last heartbeat, and no longer counts
    as one that would claim; one that beats is alive."""
    daemon = await daemons.start()
    other = await daemons.start()
    await daemon.kill()
    await db.execute(
        "update recall_workers set seen_at = now() - interval '44 seconds' where worker = %s",
        (daemon.name,),
    )
    said = operate(database, "workers")
    assert re.search(rf"{re.escape(daemon.name)} +silent +\d+ s ago", said.out)
    assert re.search(rf"{re.escape(other.name)} +alive ", said.out)
    stats = operate(database, "stats", "--json").document
    assert (stats["workers"]["alive"], stats["workers"]["silent"]) == (1, 1)
    [queue] = stats["queues"]
    assert queue["workers"] == 1


def test_a_worker_without_its_connection(desk: Desk) -> None:
    """One that says that it listens, and has no connection, is gone. One that does not listen, or
    whose connection has another name at PostgreSQL, is known by its heartbeats alone."""
    seen = '{"connection_seen": true}'
    for worker in ("listens", "deaf", "gone"):
        desk.worker(worker, silent=100, settings=seen)
    desk.worker("renamed by a pooler", silent=100, settings='{"connection_seen": false}')
    desk.worker("of a version before", silent=100)
    desk.worker("long gone", silent=190, settings=seen)
    desk.worker("began just now", silent=5, settings=seen)
    desk.conn.execute("update recall_workers set bell = 'deaf' where worker = 'deaf'")
    with psycopg.connect(desk.dsn, application_name="recall-worker listener listens"):
        rows = operate(desk.dsn, "workers", "--json").document
        [queue] = operate(desk.dsn, "queues", "--json").document
    alive = {row["worker"] for row in rows if row["alive"]}
    assert alive == {row["worker"] for row in rows} - {"gone", "long gone"}
    assert queue["workers"] == len(alive)


@pytest.mark.parametrize("words", ["events nosuch", "events nosuch --follow", "actions nosuch"])
def test_a_recall_that_never_was(words: str, desk: Desk) -> None:
    """It is not found, and not a recall to which nothing has happened."""
    said = operate(desk.dsn, *words.split())
    assert said.status == 1
    assert "there is no recall nosuch" in said.err and "Try: recall-worker list" in said.err


@pytest.mark.slow
def test_what_is_retried_under_a_key_that_is_not_known_yet(desk: Desk) -> None:
    """After a skip the claim decides which occurrence it is: no key is said, and none is on
    record."""
    [id] = operate(desk.dsn, "schedule", "s", "m", "--every", "1h").out.split()
    for words in ("skip", "reschedule --in 3h", "cancel"):
        name, *options = words.split()
        assert operate(desk.dsn, name, id, *options).status == 0
    assert "due now, under a new key" in operate(desk.dsn, "retry", id).err
    [retried] = operate(desk.dsn, "actions", id, "--action", "retry", "--json").document
    assert not {"occurrence", "rekey"} & retried["detail"].keys()


@pytest.mark.slow
def test_who_may_read_the_story(server: str, database: str) -> None:
    """A reading role sees all of it."""
    role = f"recall_test_story_{os.getpid()}"
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(f"create role {role} login".encode())
        try:
            conn.execute(
                f"grant select on session_recalls, recall_attempts, recall_actions, recall_outbox, "
                f"recall_identity, recall_schema to {role}".encode()
            )
            conn.execute("insert into sessions values ('s', 'ann')")
            assert operate(database, "schedule", "s", "m", "--in", "1h").status == 0
            [(id,)] = conn.execute("select id from session_recalls").fetchall()
            dsn = psycopg.conninfo.make_conninfo(database, user=role)
            for words in (["show", id], ["actions"], ["events"], ["events", id]):
                said = operate(dsn, *words)
                assert said.status == 0 and "schedule" in said.out, said
        finally:
            conn.execute(f"drop owned by {role}".encode())
            conn.execute(f"drop role {role}".encode())
