"""Acting on all that the filters find: what is shown, what is asked, what is done, what is counted;
and `list --watch`, at a terminal."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import psycopg
import pytest

from recall_worker.cli import bulk
from recall_worker.operations.bulk import BATCH

from .support import postgres
from .support.person import person
from .test_cli import Said, operate, trouble
from .test_inspect import Desk

MANY = 25


@pytest.fixture(scope="module")
def room(server: str, template: str) -> Iterator[str]:
    """A database for all that leaves its schema as it is."""
    with postgres.database(server, template) as dsn:
        yield dsn


@pytest.fixture
def desk(room: str) -> Iterator[Desk]:
    """A database without rows, and rows put into it."""
    at = Desk(room)
    yield at
    at.conn.execute("truncate sessions, session_recalls, recall_actions")
    at.conn.close()


@pytest.fixture
def ward(desk: Desk) -> Desk:
    """Failed recalls, more than are shown, and one that waits."""
    for n in range(MANY):
        desk.conn.execute("insert into sessions values (%s, 'ann')", (f"f-{n}",))
        desk.recall(f"failed-{n:02}", f"f-{n}", status="failed", due=-n)
    desk.recall("waits", "s")
    return desk


def statuses(desk: Desk) -> dict[str, int]:
    rows = desk.conn.execute("select status, count(*) as n from session_recalls group by 1")
    return {row["status"]: row["n"] for row in rows}


def actions(desk: Desk) -> list[str]:
    rows = desk.conn.execute("select action, recall_id from recall_actions order by recall_id")
    return [f"{row['action']} {row['recall_id']}" for row in rows]


def process(dsn: str, *words: str) -> Said:
    """In a process of its own, without a terminal."""
    environ = {"PATH": "/usr/bin:/bin", "RECALL_DSN": dsn}
    done = subprocess.run(
        [sys.executable, "-m", "recall_worker", *words],
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Said(done.returncode, done.stdout, done.stderr)


# --- what is shown and asked ----------------------------------------------------------------------


def test_a_dry_run_shows_which_and_changes_nothing(ward: Desk) -> None:
    """How many, and the first ten; the ids of all on stdout, or the rows as JSON."""
    said = operate(ward.dsn, "retry", "--state", "failed", "--dry-run")
    assert said.status == 0
    assert said.err.startswith("To retry: 25 recalls, the first 10 of them:\nID ")
    assert said.err.endswith("\nNothing was changed: --dry-run.\n")
    assert said.err.count("failed-") == 10
    assert said.out.split() == [f"failed-{n:02}" for n in range(MANY)]
    rows = operate(ward.dsn, "retry", "--since", "1h", "--dry-run", "--json").document
    assert [row["id"] for row in rows] == [f"failed-{n:02}" for n in range(MANY)]
    assert statuses(ward) == {"failed": 25, "pending": 1} and actions(ward) == []


@pytest.mark.parametrize(("answer", "done"), [("25", True), ("y", False), ("24", False)])
def test_beyond_ten_their_number_has_to_be_typed(answer: str, done: bool, ward: Desk) -> None:
    """A yes is too quick for twenty-five."""
    with person(ward.dsn, "retry", "--state", "failed") as at:
        shown = at.sees("Retry all 25? Type 25 to go on: ")
        assert shown.count("failed-") == 10
        at.types(f"{answer}\n")
        assert at.ends() == (0 if done else 1)
        expected = "25 of 25 recalls retried.\n" if done else "Nothing was done.\n"
        assert at.seen.endswith(expected) and "Error" not in at.seen
    assert statuses(ward).get("failed", 0) == (0 if done else 25)


@pytest.mark.parametrize(("answer", "done"), [("y", True), ("", False), ("n", False)])
def test_up_to_ten_a_yes_is_enough(answer: str, done: bool, ward: Desk) -> None:
    """They are all shown."""
    with person(ward.dsn, "retry", "--session", "f-2*", "--limit", "3", colours=True) as at:
        shown = at.sees("Retry these 3 recalls? [y/N] ")
        assert shown.count("failed") == 6 and "x1b" not in shown
        assert max(map(len, shown.splitlines())) <= 80
        at.types(f"{answer}\n")
        assert at.ends() == (0 if done else 1)
    assert statuses(ward)["failed"] == (22 if done else 25)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["cancel --state live", "retry --since 1h", "prune --keep 1s"])
def test_nobody_to_ask(words: str, ward: Desk) -> None:
    """Without a terminal nothing is done, which is no error, and what to say instead is said."""
    ward.conn.execute("update session_recalls set updated_at = now() - interval '1 day'")
    ward.conn.execute("update session_recalls set ended_at = now() where id = 'failed-00'")
    said = process(ward.dsn, *words.split())
    assert said.status == 1 and said.out == ""
    assert said.err.endswith(
        "Nothing was done: there is no terminal to ask at.\nTry: the same with --yes\n"
    )
    assert "Error" not in said.err and actions(ward) == []
    assert statuses(ward) == {"failed": 25, "pending": 1}


def test_ctrl_c_at_the_question(ward: Desk) -> None:
    """Nothing is done, without a traceback."""
    with person(ward.dsn, "cancel", "--state", "failed", "--state", "live") as at:
        at.sees("Type 26 to go on: ")
        at.types("\x03")
        assert at.ends() == 130 and "Traceback" not in at.seen
    assert actions(ward) == []


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("retry", "name recalls, or filters that find them"),
        ("retry --limit 3 --yes", "name recalls, or filters that find them"),
        ("cancel --yes", "name recalls, or filters that find them"),
        ("pause waits --state live", "recalls are named, and --state finds others"),
        ("cancel waits --session s", "recalls are named, and --session finds others"),
        ("fire waits --dry-run", "recalls are named, and --dry-run finds others"),
        ("retry --state done --yes", "--state 'done': there is no such state"),
        ("reschedule --state live --yes", "no time is given"),
        ("list --state live --watch --sort up", "--sort 'up': there is no such sort"),
    ],
)
def test_usage(words: str, what: str, ward: Desk) -> None:
    """What can't be meant is exit status 2, and nothing is done."""
    assert trouble(operate(ward.dsn, *words.split()), 2) == what
    assert actions(ward) == []


# --- what is done ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "done", "which"),
    [
        (
            "cancel --session w* --user ann",
            "cancelled",
            ["cancel w1", "cancel w2", "cancel w3", "cancel w4"],
        ),
        ("pause --session w*", "paused", ["pause w1", "pause w2"]),
        ("resume --session w*", "resumed", ["resume w3"]),
        ("retry --session w*", "retried", ["retry w5"]),
        ("retry --session w* --state cancelled", "retried", ["retry w6"]),
        ("fire --session w*", "made due now", ["fire w1"]),
        (
            "reschedule --session w* --in 3h",
            "rescheduled",
            ["reschedule w1", "reschedule w2", "reschedule w3", "reschedule w4"],
        ),
        ("cancel --state paused --session w*", "cancelled", ["cancel w3", "cancel w4"]),
    ],
)
def test_what_is_meant_where_no_state_is_named(
    words: str,
    done: str,
    which: list[str],
    desk: Desk,
) -> None:
    """Each operation takes the recalls that it makes sense for; each leaves its record."""
    for n in range(1, 7):
        desk.conn.execute("insert into sessions values (%s, 'ann')", (f"w{n}",))
        desk.recall(f"w{n}", f"w{n}", call_type="recurring")
    desk.recall("other", "s")
    desk.lease("w2")
    desk.change("w3", paused_at=datetime.now(UTC))
    desk.change("w4", paused_at=datetime.now(UTC))
    desk.lease("w4")
    desk.change("w5", status="failed")
    desk.change("w6", status="cancelled")
    if words.split()[0] in ("pause", "resume"):
        desk.conn.execute("delete from session_recalls where id = 'w4'")
    said = operate(desk.dsn, *words.split(), "--yes")
    assert said.status == 0, said
    recalls = f"{len(which)} of {len(which)} recall{'' if len(which) == 1 else 's'}"
    assert said.err == f"{recalls} {done}.\n"
    assert sorted(said.out.split()) == [word.split()[1] for word in which]
    assert actions(desk) == which


def test_a_session_alone_is_that_session(desk: Desk) -> None:
    """Scripts give `cancel --session` whatever name a session has: a `*` in it is one there."""
    desk.recall("a", "s")
    said = operate(desk.dsn, "cancel", "--session", "*", "--yes")
    assert trouble(said, 1) == "session * has no live recall"
    assert "Try: recall-worker cancel --session '*' --state live (a pattern)" in said.err
    trouble(operate(desk.dsn, "cancel", "--session", "*", "--dry-run"), 1)
    assert statuses(desk) == {"pending": 1}
    assert operate(desk.dsn, "cancel", "--session", "*", "--state", "live", "--yes").status == 0
    assert statuses(desk) == {"cancelled": 1}


def test_nothing_matches(ward: Desk) -> None:
    """Then nothing is asked, and the exit status says it."""
    said = operate(ward.dsn, "resume", "--queue", "default", "--yes")
    assert trouble(said, 1) == "no recall (paused) matches: nothing to resume"


def test_what_could_not_be_done_is_counted(ward: Desk) -> None:
    """By reason, in one line; the others are done."""
    for n in range(3):
        ward.recall(f"next-{n}", f"f-{n}")
    said = operate(ward.dsn, "retry", "--state", "failed", "--state", "waiting", "--yes")
    assert trouble(said, 1) == (
        "7 could not be retried: 4 pending already, 3 another pending recall in the session"
    )
    assert said.err.startswith("22 of 29 recalls retried.\n")
    assert len(said.out.split()) == 22 and len(actions(ward)) == 22
    assert statuses(ward) == {"failed": 3, "pending": 26}


def test_what_is_due_already_is_no_failure(ward: Desk) -> None:
    """It is as it was to be, and says so."""
    ward.change("waits", trigger_at=datetime(2020, 1, 1, tzinfo=UTC))
    said = operate(ward.dsn, "fire", "--state", "live", "--yes")
    assert said.err.startswith("0 of 1 recall made due now; 1 due already.\n") and said.status == 1


def test_json_is_one_document(ward: Desk) -> None:
    """The rows as they are then, in an array."""
    rows = operate(ward.dsn, "retry", "--state", "failed", "--yes", "--json").document
    assert len(rows) == 25 and {row["status"] for row in rows} == {"pending"}


# --- meanwhile ------------------------------------------------------------------------------------


@pytest.fixture
def crowd(server: str, template: str) -> Iterator[Desk]:
    """Five batches that wait."""
    with postgres.database(server, template) as dsn:
        at = Desk(dsn)
        number = 5 * BATCH
        at.conn.execute(
            "insert into sessions select 'c' || n, 'ann' from generate_series(1, %s) n", (number,)
        )
        at.conn.execute(
            "insert into session_recalls (id, session_id, call_type, trigger_at, "
            "additional_context_message, status, created_at, updated_at) "
            "select 'c' || lpad(n::text, 4, '0'), 'c' || n, 'once', now() + interval '1 hour' "
            "+ n * interval '1 second', 'm', 'pending', now(), now() from generate_series(1, %s) n",
            (number,),
        )
        yield at
        at.conn.close()


def test_each_batch_is_a_transaction(crowd: Desk) -> None:
    """No lock is held over all of them, and each has its record."""
    assert operate(crowd.dsn, "pause", "--state", "waiting", "--yes").status == 0
    rows = crowd.conn.execute(
        "select xmin::text as transaction, count(*) as n from recall_actions group by 1"
    ).fetchall()
    assert [row["n"] for row in rows] == [BATCH] * 5


def test_progress_is_told(crowd: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what takes long, how many are done."""
    monkeypatch.setattr(bulk, "PROGRESS", 0.0)
    said = operate(crowd.dsn, "pause", "--state", "waiting", "--yes")
    assert said.err.splitlines()[:2] == ["100 of 500 paused …", "200 of 500 paused …"]


def test_what_is_no_longer_meant_is_left_alone(crowd: Desk) -> None:
    """What changes or appears between the question and its turn: a recall that was claimed by then
    is not overdue any more, and is not cancelled."""
    crowd.conn.execute("update session_recalls set trigger_at = now() - interval '1 hour'")
    with person(crowd.dsn, "cancel", "--state", "overdue", "--since", "1h") as at:
        at.sees("Type 500 to go on: ")
        # What was meant stays so, however long the person takes to answer.
        crowd.change("c0001", updated_at=datetime(2020, 1, 1, tzinfo=UTC))
        crowd.lease("c0250")
        crowd.change("c0400", status="fired")
        crowd.conn.execute("delete from session_recalls where id = 'c0500'")
        crowd.recall("new", "s", due=-3600)
        at.types("500\n")
        assert at.ends() == 0
        assert "497 of 500 recalls cancelled; 3 changed meanwhile, and left alone.\n" in at.seen
    assert statuses(crowd) == {"cancelled": 497, "pending": 2, "fired": 1}


@pytest.mark.slow
def test_what_somebody_has_locked_is_tried_again(
    crowd: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds nobody up. Where the lock stays it is counted; where it goes, it is done."""
    monkeypatch.setattr(bulk, "PAUSE", 0.01)
    words = ("pause", "--state", "waiting", "--yes")
    with psycopg.connect(crowd.dsn) as holder:
        holder.execute("select from session_recalls where id in ('c0007', 'c0123') for update")
        said = operate(crowd.dsn, *words)
        assert trouble(said, 1) == "2 could not be paused: 2 locked by another transaction"
        assert said.err.startswith("498 of 500 recalls paused.\n")
        monkeypatch.setattr(bulk, "TRIES", 1000)
        with ThreadPoolExecutor() as threads:
            again = threads.submit(operate_there, crowd.dsn, words)
            holder.rollback()
            assert again.result().err == "2 of 2 recalls paused.\n"


def operate_there(dsn: str, words: tuple[str, ...]) -> Said:
    return process(dsn, *words)


@pytest.mark.slow
def test_ctrl_c_stops_between_batches(crowd: Desk) -> None:
    """The batch in hand is finished; how many were done is said, and the others are as they
    were."""
    with psycopg.connect(crowd.dsn) as holder:
        # The third batch waits here for the record of its first action.
        holder.execute(
            "create function slow() returns trigger language plpgsql as $$ begin "
            "if new.recall_id = 'c0201' then perform pg_advisory_xact_lock(1); end if; "
            "return new; end $$"
        )
        holder.execute(
            "create trigger slow before insert on recall_actions "
            "for each row execute function slow()"
        )
        holder.commit()
        holder.execute("select pg_advisory_lock(1)")
        with person(crowd.dsn, "pause", "--state", "waiting", "--yes") as at:
            while not crowd.conn.execute(
                "select from pg_locks where locktype = 'advisory' and not granted"
            ).fetchall():
                crowd.conn.execute("select pg_sleep(0.01)")
            at.types("\x03")
            at.sees("^C")
            holder.execute("select pg_advisory_unlock(1)")
            holder.commit()
            assert at.ends() == 130
            stopped = "Stopped: 300 of 500 recalls paused; the others are as they were."
            assert at.seen.strip() == stopped
    paused = crowd.conn.execute("select from session_recalls where paused_at is not null")
    assert paused.rowcount == 300


def test_a_connection_that_breaks_in_a_batch(crowd: Desk) -> None:
    """It may have been committed before its answer was lost: so that is not known, and said."""
    crowd.conn.execute(
        "create function gone() returns trigger language plpgsql as $$ begin "
        "perform pg_terminate_backend(pg_backend_pid()); return null; end $$"
    )
    crowd.conn.execute(
        "create constraint trigger gone after update on session_recalls deferrable initially "
        "deferred for each row when (old.id = 'c0150') execute function gone()"
    )
    said = operate(crowd.dsn, "cancel", "--state", "waiting", "--yes")
    assert said.status == 3
    assert said.err.startswith(
        "Stopped: 100 of 500 recalls cancelled; whether the batch of 100 at most that was in hand "
        "was done, too, is not known (recall-worker actions tells it); the rest are as they were.\n"
    )
    assert statuses(crowd) == {"cancelled": 100, "pending": 400}


def test_an_error_in_a_batch(crowd: Desk) -> None:
    """What was done before is said; the batch with the error is undone, and the rest not begun."""
    crowd.conn.execute(
        "create function no() returns trigger language plpgsql as $$ begin "
        "raise exception 'not this one'; end $$"
    )
    crowd.conn.execute(
        "create trigger no before update on session_recalls for each row "
        "when (old.id = 'c0150') execute function no()"
    )
    said = operate(crowd.dsn, "cancel", "--state", "waiting", "--yes")
    assert "not this one" in trouble(said, 1)
    assert said.err.startswith("Stopped: 100 of 500 recalls cancelled; the others are as they were")
    assert statuses(crowd) == {"cancelled": 100, "pending": 400}


# --- list --watch ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("key", "columns"), [("q", 80), ("\x03", 120)])
def test_watch(key: str, columns: int, ward: Desk) -> None:
    """It is redrawn as things change, keeps to the screen, and leaves it as it was."""
    words = ("list", "--watch", "--state", "failed")
    with person(ward.dsn, *words, columns=columns, lines=12) as at:
        frame = at.sees("25 recalls, 9 shown; --offset 9 for more.")
        assert "q ends  recall-worker list --state failed" in frame
        assert frame.startswith("\x1b[?1049h") and frame.count("failed-") == 9
        ward.change("failed-03", status="cancelled")
        at.sees("24 recalls")
        at.types(key)
        assert at.ends() == 0
        assert at.seen.endswith("\x1b[?25h\x1b[?1049l") and "Traceback" not in at.seen


@pytest.mark.slow
def test_watch_outlives_its_connection(ward: Desk) -> None:
    """PostgreSQL was restarted, say: what stands there says that it is old, and is redrawn when
    there is an answer again."""
    with person(ward.dsn, "list", "--watch", "--state", "failed", columns=80, lines=12) as at:
        at.sees("25 recalls")
        ward.conn.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where application_name = 'recall-worker cli'"
        )
        at.sees("PostgreSQL has not answered for 1.0 s; q ends: what stands here is old")
        ward.change("failed-03", status="cancelled")
        at.sees("24 recalls")
        at.types("q")
        assert at.ends() == 0 and "Traceback" not in at.seen


@pytest.mark.slow
def test_watch_is_one_query(ward: Desk) -> None:
    """Each look is one statement, in which PostgreSQL's clock is, too."""
    with person(ward.dsn, "list", "--watch") as at:
        at.sees("26 recalls")
        before = ward.conn.execute("select pg_backend_pid() as pid").fetchone()
        assert before is not None
        seen = ward.conn.execute(
            "select query from pg_stat_activity where application_name = 'recall-worker cli'"
        ).fetchall()
        assert len(seen) == 1 and seen[0]["query"].startswith("with matching as")
        at.types("q")
        assert at.ends() == 0


@pytest.mark.parametrize("words", [["list", "--watch"], ["list", "--watch", "--json"]])
def test_watch_needs_a_terminal(words: list[str], ward: Desk) -> None:
    """Off a terminal it is refused."""
    assert "this is none" in trouble(operate(ward.dsn, *words), 2)
