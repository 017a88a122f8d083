"""Queues: who may claim what, what is paused, and that no queue stands in the way of another.

A ledger for each worker on a real PostgreSQL; the commands as an operator types them. Whole daemons
are in process/test_queues.py.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import errors

from recall_worker import Recalls
from recall_worker.database.ledger import Ledger
from recall_worker.recall import Claim, Ended, Finish, Settled
from recall_worker.settings import QUEUE_MOST, QUEUES_MOST, SettingsError, queue_problem, read
from recall_worker.statements import generation

from .conftest import Connection, connected
from .support import postgres
from .support.application import Application
from .test_cli import Said, operate
from .test_ledger import ending as answered
from .test_ledger import notifies, one, put, recall

LEASE = 3.0
FACTS = {
    "host": "h",
    "pid": 1,
    "version": "1",
    "slots": 3,
    "running": 0,
    "breaker": "closed",
    "bell": "listening",
}
OLD = (
    "insert into recall_workers (worker, host, pid, version, slots, settings, seen_at) "
    "values ('old', 'h', 1, '0.9', 3, '{}', now() - %s * interval '1 second')"
)
"""A worker of a version without queues, last heard of so many seconds ago."""
Ledgers = Callable[..., Ledger]


@pytest.fixture
async def ledgers(database: str) -> AsyncIterator[Ledgers]:
    """Makes ledgers: `ledgers("mail", "night", worker="w1")`."""
    made: list[Ledger] = []

    def make(*queues: str, worker: str | None = None, **more: Any) -> Ledger:
        name = worker or f"w{len(made) + 1}"
        made.append(Ledger(database, name, LEASE, queues=queues or ("default",), **more))
        return made[-1]

    yield make
    for ledger in made:
        await ledger.close()


async def claimed(ledger: Ledger, slots: int = 10) -> list[str]:
    return [claim.id for claim in (await ledger.claim(slots)).claims]


async def hold_back(db: Connection, queue: str) -> None:
    await db.execute(
        "insert into recall_queues (queue, paused_by, reason) values (%s, 'ann', 'rest')", (queue,)
    )


# --- the names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "queues"),
    [
        (None, ("default",)),
        ("mail", ("mail",)),
        ("mail,night", ("mail", "night")),
        (" mail , night ", ("mail", "night")),
        ("100%", ("100%",)),
        ("o'neill", ("o'neill",)),
        ('say "so"'.replace(" ", "-"), ('say-"so"',)),
        ("почта", ("почта",)),
        ("q" * QUEUE_MOST, ("q" * QUEUE_MOST,)),
    ],
)
def test_the_queues_of_a_worker(given: str | None, queues: tuple[str, ...]) -> None:
    """A list of names, as people write lists."""
    assert read({} if given is None else {"RECALL_QUEUE": given}).queues == queues


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a,b,,a", ["a name is missing beside a comma", "names queue 'a' twice"]),
        (",", ["a name is missing"]),
        (" ", ["only blanks"]),
        ("a b", ["with a blank"]),
        ("a\nb", ["control character"]),
        ("a\u200bb", ["can't be seen"]),
        ("a\u00a0b", ["with a blank"]),
        ("*", ["stands for all queues"]),
        ("q" * (QUEUE_MOST + 1), [f"{QUEUE_MOST + 1} characters"]),
        ("q" * 5000, ["5000 characters"]),
        (",".join(f"q{n}" for n in range(QUEUES_MOST + 1)), [f"names {QUEUES_MOST + 1} queues"]),
    ],
)
def test_names_that_are_none(given: str, said: list[str]) -> None:
    """Each is refused at the start, with what is wrong and what to write."""
    with pytest.raises(SettingsError) as refused:
        read({"RECALL_QUEUE": given})
    text = str(refused.value)
    assert "RECALL_QUEUE" in text and all(words in text for words in said) and len(text) < 500
    assert ":" in text.removeprefix("RECALL_QUEUE")


@pytest.mark.parametrize("name", ["", "*", "a b", "a,b", "a\tb", "q" * 64, "\x7f", "a\nb"])
async def test_the_table_refuses_names_that_are_none(name: str, db: Connection) -> None:
    """Plain SQL, too, by insert and by update, in words that an application can't mistake."""
    await put(db, "s", id="r")
    for change in (
        put(db, "other", queue=name),
        db.execute("update session_recalls set queue = %s", (name,)),
    ):
        with pytest.raises(errors.CheckViolation, match="name of a queue") as refused:
            await change
        assert not re.search("unique|duplicate", str(refused.value))


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=70))
def test_a_name_that_is_accepted_can_be_in_a_list(name: str) -> None:
    """Whatever people think of: a name with no problem is what a list of it alone has."""
    if queue_problem(name) is None:
        assert read({"RECALL_QUEUE": name}).queues == (name,)


# --- claims ---------------------------------------------------------------------------------------


async def test_a_worker_claims_from_its_queues(db: Connection, ledgers: Ledgers) -> None:
    """Each its own, oldest due first over all that it serves; and the next due moment is one of its
    own queues."""
    await put(db, "s1", -3.0, id="d")
    await put(db, "s2", -2.0, id="m", queue="mail")
    await put(db, "s3", -4.0, id="n", queue="night")
    await put(db, "s4", 600.0, id="later", queue="mail")
    await put(db, "s5", 60.0, id="sooner", queue="night")
    default, both = ledgers(), ledgers("mail", "night")
    assert not (await ledgers("other").next_due(claimed_at=None)).waiting
    assert await claimed(both, 1) == ["n"]
    assert await claimed(default) == ["d"] and await claimed(default) == []
    assert await claimed(both) == ["m"]
    mail = await ledgers("mail").next_due(claimed_at=None)
    # The lease of a row in a run is its due moment.
    assert mail.next_in == pytest.approx(LEASE, abs=1) and mail.paused == frozenset()
    assert (await ledgers("other").next_due(claimed_at=None)).next_in is None


async def test_as_many_as_there_are_slots(db: Connection, ledgers: Ledgers) -> None:
    """Two queues with ten due each, and three slots: the oldest three."""
    for n in range(10):
        await put(db, f"a{n}", -100.0 + 2 * n, id=f"a{n}", queue="a")
        await put(db, f"b{n}", -99.0 + 2 * n, id=f"b{n}", queue="b")
    assert await claimed(ledgers("a", "b"), 3) == ["a0", "b0", "a1"]
    assert await claimed(ledgers("b"), 2) == ["b1", "b2"]


async def test_runs_of_a_session_never_meet(db: Connection, ledgers: Ledgers) -> None:
    """A recall in a run holds its session's recalls in all queues; settled, it frees them."""
    mail, night = ledgers("mail"), ledgers("night")
    await put(db, "s", -2.0, id="m", queue="mail")
    [run] = (await mail.claim(5)).claims
    await put(db, "s", -1.0, id="n", queue="night")
    assert (await recall(db, "m"))["status"] == "running", "the session's slot spans queues"
    passed = await night.claim(5)
    assert passed.claims == [] and not passed.refused, "passed over, and no index has to refuse it"
    assert (await night.next_due(claimed_at=None)).waiting
    assert await mail.settle([(answered(run), Finish("fired", None))]) == [Settled("fired")]
    assert await claimed(night) == ["n"]


async def test_an_older_recall_of_an_unserved_queue_is_not_waited_for(
    db: Connection, ledgers: Ledgers
) -> None:
    """Of one queue the older recall of a session goes first; of another queue nobody may ever
    come."""
    await put(db, "s", -20.0, id="older", queue="nobody", status="running")
    await put(db, "s", -10.0, id="m", queue="mail")
    assert await claimed(ledgers("mail")) == ["m"]
    assert await claimed(ledgers("nobody")) == []
    await put(db, "t", -20.0, id="first", queue="mail", status="running")
    await put(db, "t", -10.0, id="second", queue="mail")
    assert await claimed(ledgers("mail")) == ["first"]


async def test_claims_of_two_queues_at_once(db: Connection, ledgers: Ledgers) -> None:
    """Two workers of two queues reach for the same session in the same instant: one gets it, and
    the other is told to try again."""
    one_, other = ledgers("a"), ledgers("b")
    await one_.schema()
    for n in range(20):
        await put(db, f"s{n}", -2.0, id=f"a{n}", queue="a", status="running")
        await put(db, f"s{n}", -1.0, id=f"b{n}", queue="b")
    for _ in range(60):
        await asyncio.gather(one_.claim(1), other.claim(1))
        leased = await one(
            db,
            "select count(*) as leases, count(distinct session_id) as sessions "
            "from session_recalls where lease is not null",
        )
        assert leased["leases"] == leased["sessions"]
    assert leased["sessions"] == 20


async def test_the_fleets_cap_counts_the_queues_that_are_served(
    db: Connection, ledgers: Ledgers
) -> None:
    """Runs of another queue, which has an endpoint of its own, fill nobody's cap."""
    for n in range(3):
        await put(db, f"a{n}", queue="a", id=f"a{n}")
        await put(db, f"b{n}", queue="b", id=f"b{n}")
    assert len(await claimed(ledgers("a", fleet=2))) == 2
    assert await claimed(ledgers("a", fleet=2)) == []
    assert len(await claimed(ledgers("b", fleet=2))) == 2
    assert await claimed(ledgers("a", "b", fleet=4)) == []


async def test_the_applications_own_statements_are_in_default(
    app: Application, db: Connection, ledgers: Ledgers
) -> None:
    """The ten-column insert, and an upsert of a row that stands in another queue, which stays
    there."""
    await app.create_session("s", "ann")
    id = await app.schedule("s", "immediate", (await one(db, "select now() as at"))["at"], "now")
    assert (await recall(db, id))["queue"] == "default"
    await db.execute("update session_recalls set queue = 'mail'")
    await app.connection.execute(
        "insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds, "
        "internal_comment, additional_context_message, status, created_at, updated_at) "
        "select id, session_id, call_type, trigger_at, interval_seconds, internal_comment, 'anew', "
        "status, created_at, updated_at from session_recalls "
        "on conflict (id) do update set additional_context_message = 'anew'"
    )
    found = await recall(db, id)
    assert (found["queue"], found["additional_context_message"]) == ("mail", "anew")
    assert await claimed(ledgers()) == [] and await claimed(ledgers("mail")) == [id]


async def test_an_edited_queue_counts_at_once(db: Connection, ledgers: Ledgers) -> None:
    """By plain SQL, waiting and in mid-run: the run is its worker's to the end."""
    await put(db, "s", id="r", queue="a")
    await db.execute("update session_recalls set queue = 'b'")
    assert await claimed(ledgers("a")) == []
    b = ledgers("b")
    [run] = (await b.claim(1)).claims
    await db.execute("update session_recalls set queue = 'c'")
    assert await b.settle([(answered(run), Finish("fired", None))]) == [Settled("fired")]


async def test_what_notifies(db: Connection, database: str) -> None:
    """A new recall rings for its queue alone; one that is put into another queue rings for all,
    where it is due soon."""

    async def insert(queue: str) -> None:
        await put(db, f"s-{queue}", queue=queue, id=queue)

    assert await notifies(database, lambda: insert("default")) == [""]
    assert await notifies(database, lambda: insert("mail")) == ["mail"]

    async def edit(queue: str, id: str) -> None:
        await db.execute("update session_recalls set queue = %s where id = %s", (queue, id))

    assert await notifies(database, lambda: edit("night", "mail")) == [""]
    assert await notifies(database, lambda: edit("night", "mail")) == [], "it is there already"
    await put(db, "far", 600.0, id="far")
    assert await notifies(database, lambda: edit("night", "far")) == []


# --- paused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("paused", ["mail", "*"])
async def test_nothing_of_a_paused_queue_is_claimed(
    paused: str, db: Connection, ledgers: Ledgers
) -> None:
    """Nor counted as due, so that nobody looks again and again; resumed, it is claimed."""
    await put(db, "s1", id="m", queue="mail")
    await put(db, "s2", id="n", queue="night")
    await hold_back(db, paused)
    both = ledgers("mail", "night")
    assert await claimed(both) == ([] if paused == "*" else ["n"])
    next_due = await both.next_due(claimed_at=None)
    assert next_due.paused == ({"mail", "night"} if paused == "*" else {"mail"})
    assert not next_due.waiting and (paused != "*" or next_due.next_in is None)
    await db.execute("delete from recall_queues")
    assert await claimed(both) == (["m", "n"] if paused == "*" else ["m"])


async def test_a_run_of_a_paused_queue_goes_on(db: Connection, ledgers: Ledgers) -> None:
    """It is renewed, may retry and is settled; pausing holds back only what is not claimed."""
    await put(db, "s", id="r")
    worker = ledgers()
    [run] = (await worker.claim(1)).claims
    await hold_back(db, "default")
    assert await worker.renew({"r": run.lease}) == {"r": "renewed"}
    assert await worker.settle([(answered(run), Finish("fired", None))]) == [Settled("fired")]


async def leased(db: Connection, id: str, ago: float, run: float, by: str = "dead") -> None:
    """A run of a worker that died: its lease ended `ago` seconds ago, after `run` seconds."""
    await db.execute(
        "update session_recalls set lease = gen_random_uuid(), leased_by = %s, attempt = 1, "
        "lease_until = now() - %s * interval '1 second', "
        "leased_at = now() - %s * interval '1 second' where id = %s",
        (by, ago, ago + run, id),
    )


@pytest.mark.parametrize("held", ["paused", "unserved"])
@pytest.mark.parametrize("accepted", [False, True], ids=["posted", "accepted"])
async def test_an_ended_lease_that_nobody_may_take_up(
    held: str, accepted: bool, db: Connection, ledgers: Ledgers
) -> None:
    """It holds its session until its run must be over, and no longer; its own queue goes on with it
    whenever it is served."""
    await put(db, "s", -100.0, id="m", queue="mail", status="running")
    await put(db, "s", -50.0, id="n", queue="night")
    await leased(db, "m", 20.0, 5.0)
    if accepted:
        await db.execute("update session_recalls set run_reference = 'run-1' where id = 'm'")
    if held == "paused":
        await hold_back(db, "mail")
    night = ledgers("night", worker="night", run_timeout=30.0)
    mail = ledgers("mail", worker="mail", run_timeout=30.0)
    ended = await night.ended_leases()
    assert not ended.unanswered and not ended.accepted
    if held == "paused":
        ended = await mail.ended_leases()
        assert not ended.unanswered and not ended.accepted
        assert (await mail.take_up(["m"])).claims == []
    # Its run may go on: 25 s of at most 30.
    await night.heartbeat(FACTS, {})
    assert await claimed(night) == []
    await db.execute(
        "update session_recalls set leased_at = leased_at - interval '10 seconds' where id = 'm'"
    )
    await night.heartbeat(FACTS, {})
    found = await recall(db, "m")
    assert (found["lease"], found["attempt"], found["may_still_run"]) == (None, 1, True)
    [run] = (await night.claim(5)).claims
    assert run.id == "n"
    marks = await (await db.execute("select outcome, settled from recall_attempts")).fetchall()
    assert marks == ([] if accepted else [{"outcome": "unknown", "settled": "taken"}])
    await db.execute("delete from recall_queues")
    assert await claimed(mail) == [], "the session is in a run"
    await night.settle([(answered(run), Finish("fired", None))])
    [again] = (await mail.claim(5)).claims
    assert (again.id, again.occurrence, again.rekey) == ("m", 1, 0), "under the same key"
    assert (again.attempt, again.reference) == ((1, "run-1") if accepted else (2, None))


async def test_the_holder_says_how_long_a_run_may_take(db: Connection, ledgers: Ledgers) -> None:
    """A queue with long runs beside one with short ones: the longer of both counts."""
    await put(db, "s", -100.0, id="m", queue="mail")
    slow = ledgers("mail", worker="slow")
    await slow.heartbeat(FACTS, {"run_timeout": 3600.0})
    await leased(db, "m", 20.0, 50.0, by="slow")
    night = ledgers("night", run_timeout=30.0)
    await night.heartbeat(FACTS, {})
    assert (await recall(db, "m"))["lease"] is not None
    await db.execute("""update recall_workers set settings = '{"run_timeout": "long"}'""")
    await night.heartbeat(FACTS, {})
    assert (await recall(db, "m"))["lease"] is None


async def test_a_queue_that_is_resumed_in_time_is_taken_up(
    db: Connection, ledgers: Ledgers
) -> None:
    """A short pause costs a dead worker's run nothing: the next worker takes it up as ever."""
    await put(db, "s", -100.0, id="m", queue="mail")
    await leased(db, "m", 20.0, 5.0)
    await hold_back(db, "mail")
    mail = ledgers("mail")
    await mail.heartbeat(FACTS, {})
    await db.execute("delete from recall_queues")
    assert (await mail.ended_leases()).unanswered == ["m"]
    [run] = (await mail.take_up(["m"])).claims
    assert (run.id, run.attempt, run.taken_from) == ("m", 2, "dead")


# --- beside earlier versions ----------------------------------------------------------------------


async def test_while_a_worker_knows_no_queues(db: Connection) -> None:
    """It would claim from all of them: so nothing gets into another queue than default, by insert
    or by edit, and the application can't mistake the words."""
    await put(db, "s", id="r")
    await put(db, "t", id="there", queue="mail")
    await db.execute(OLD, (170,))
    for change in (
        put(db, "u", queue="mail"),
        db.execute("update session_recalls set queue = 'mail' where id = 'r'"),
    ):
        with pytest.raises(
            errors.ObjectNotInPrerequisiteState, match="a worker that runs knows none"
        ) as refused:
            await change
        assert not re.search("unique|duplicate", str(refused.value))
    await put(db, "u", id="u")
    await db.execute("update session_recalls set queue = 'default' where id = 'there'")
    await db.execute("update recall_workers set seen_at = now() - interval '181 seconds'")
    await db.execute("update session_recalls set queue = 'mail' where id = 'r'")


async def test_a_heartbeat_says_what_a_worker_serves(db: Connection, ledgers: Ledgers) -> None:
    """Its queues, and the version that its code was made for; and only workers that serve as much
    come before it."""
    await ledgers("mail", "night", worker="a").heartbeat(FACTS, {})
    await ledgers("mail", worker="b").heartbeat(FACTS, {})
    assert await ledgers("night", worker="c").heartbeat(FACTS, {}) == 1
    assert await ledgers("mail", "night", worker="d").heartbeat(FACTS, {}) == 1
    assert await ledgers("mail", worker="e").heartbeat(FACTS, {}) == 3
    assert await ledgers("other", worker="f").heartbeat(FACTS, {}) == 0
    row = await one(db, "select queues, generation from recall_workers where worker = 'a'")
    assert row == {"queues": ["mail", "night"], "generation": generation()}
    await db.execute(OLD, (0,))
    assert await ledgers("zzz", worker="zzz").heartbeat(FACTS, {}) == 1


async def test_an_account_without_rights_of_ours_can_name_a_queue(
    db: Connection, database: str
) -> None:
    """Who inserts recalls need not be allowed to read recall_workers."""
    role = f"recall_test_{uuid4().hex[:12]}"
    await db.execute(f"create role {role}".encode())
    try:
        await db.execute(f"grant insert, select on session_recalls, sessions to {role}".encode())
        await db.execute(OLD, (170,))
        await db.execute("insert into sessions values ('s', 'ann')")
        await db.execute(f"set role {role}".encode())
        insert = (
            "insert into session_recalls (id, session_id, call_type, trigger_at, "
            "additional_context_message, created_at, updated_at, queue) "
            "values ('r', 's', 'once', now(), 'm', now(), now(), 'mail')"
        )
        with pytest.raises(errors.ObjectNotInPrerequisiteState):
            await db.execute(insert)
        await db.execute("reset role; delete from recall_workers")
        await db.execute(f"set role {role}".encode())
        await db.execute(insert)
    finally:
        await db.execute("reset role")
        await db.execute(f"drop owned by {role}; drop role {role}".encode())


# --- what people see and do -----------------------------------------------------------------------


async def told(
    database: str, *words: str, status: int = 0, stdin: str = "", actor: str | None = None
) -> Said:
    """What a command said, which ended with this status."""
    environ = {} if actor is None else {"RECALL_ACTOR": actor}
    said = await asyncio.to_thread(operate, database, *words, stdin=stdin, environ=environ)
    assert said.status == status, said
    return said


async def test_the_table_of_queues(db: Connection, database: str, ledgers: Ledgers) -> None:
    """A line for each queue that has recalls, is served or paused; a note where nobody serves
    what waits."""
    await ledgers("mail", worker="w1").heartbeat(FACTS, {})
    await put(db, "s1", -120.0, queue="mail")
    await put(db, "s2", -5.0, queue="mail")
    await put(db, "s3", 600.0, queue="mail")
    await put(db, "s4", queue="nobody's")
    await put(db, "s5", queue="mail", status="failed")
    await leased(db, await put(db, "s6", queue="mail"), -50.0, 0.0)
    await hold_back(db, "night")
    said = await told(database, "queues")
    lines = {line.split()[0]: line.split() for line in said.out.splitlines()}
    head = ["QUEUE", "DUE", "OVERDUE", "WAITING", "IN", "RUN", "FAILED", "OLDEST", "WORKERS"]
    assert lines["QUEUE"] == [*head, "PAUSED"]
    assert lines["mail"][:6] == ["mail", "2", "1", "3", "1", "1"] and lines["mail"][-1] == "1"
    assert lines["nobody's"][1:4] == ["1", "0", "1"] and lines["default"][-1] == "0"
    assert "by ann: rest" in said.out
    assert "no live worker serves queue nobody's: recall-worker run --queue" in said.err
    document = (await told(database, "queues", "--json")).document
    assert [row["queue"] for row in document] == ["default", "mail", "night", "nobody's"]
    assert document[1] | {"oldest": 0, "next_due": 0} == {
        "queue": "mail",
        "due": 2,
        "overdue": 1,
        "waiting": 3,
        "leased": 1,
        "held_back": 0,
        "failed": 1,
        "oldest": 0,
        "next_due": 0,
        "workers": 1,
        "paused_at": None,
        "paused_by": None,
        "reason": None,
        "all_paused": False,
    }
    assert document[2]["paused_by"] == "ann" and document[2]["reason"] == "rest"


@pytest.mark.slow
async def test_pausing_and_resuming(db: Connection, database: str) -> None:
    """On record with who did it; again changes nothing, and is not on record."""
    await put(db, "s", queue="mail")

    async def queues(*words: str, status: int = 0, stdin: str = "") -> Said:
        return await told(database, "queues", *words, status=status, stdin=stdin, actor="ann")

    said = await queues("pause", "mail", "--reason", "the API moves")
    assert said.out == "mail\n" and said.err.startswith("mail: paused; current runs are not inter")
    again = await queues("pause", "mail", "mail", "--reason", "another")
    assert "mail: paused already, since " in again.err and "by ann: the API moves" in again.err
    [row] = (await queues("--json", "pause", "mail")).document
    assert (row["queue"], row["changed"], row["reason"]) == ("mail", False, "the API moves")
    mistyped = await queues("pause", "mial")
    assert "queue mial has no recalls, and no live worker serves it" in mistyped.err
    resumed = await queues("resume", "mial", "never")
    assert resumed.err == "mial: resumed.\nnever: was not paused.\n"
    assert (await queues("pause", "--all", status=1)).err.endswith("Try: the same with --yes\n")
    await queues("pause", "--all", stdin="y\n")
    still = await queues("resume", "mail")
    assert "all queues are paused, so nothing is claimed" in still.err
    rows = (await queues("resume", "--all", "--yes", "--json")).document
    assert [(row["queue"], row["resumed"]) for row in rows] == [("*", True)]
    assert (await queues("resume", "--all", "--yes")).err == "all queues: was not paused.\n"
    found = await db.execute("select actor, action, detail from recall_actions order by id")
    assert [
        (row["actor"], row["action"], row["detail"]["queue"]) for row in await found.fetchall()
    ] == [
        ("ann", "pause_queue", "mail"),
        ("ann", "pause_queue", "mial"),
        ("ann", "resume_queue", "mial"),
        ("ann", "pause_queue", "*"),
        ("ann", "resume_queue", "mail"),
        ("ann", "resume_queue", "*"),
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pause"], "give the names of queues, or --all"),
        (["pause", "mail", "--all"], "give the names of queues, or --all"),
        (["resume"], "give the names of queues, or --all"),
        (["pause", "*"], "stands for all queues"),
        (["pause", "a b"], "with a blank"),
        (["resume", "a,b"], "with a comma"),
        (["pause", ""], "is empty"),
        (["pause", "a\nb"], "line break"),
        (["pause", "q" * 100], "100 characters"),
    ],
)
def test_what_can_not_be_paused(words: list[str], said: str) -> None:
    """A usage error, before any connection."""
    done = operate("postgresql://nowhere.invalid/x", "queues", *words)
    assert done.status == 2 and said in done.err and "Try: " in done.err, done


@pytest.mark.parametrize("name", ["o'neill", "100%", "почта", 'say"so"', "-dash", "%(x)s", "{}"])
async def test_strange_names_are_names(name: str, db: Connection, database: str) -> None:
    """Quotes, percent signs and other alphabets pass through every command."""
    await put(db, "s", queue=name, id="r")
    rows = (await told(database, "queues", "pause", "--json", "--", name)).document
    assert [row["queue"] for row in rows] == [name]
    listed = (await told(database, "list", f"--queue={name}", "--json")).document
    assert [row["id"] for row in listed] == ["r"]
    assert (await told(database, "show", "r", "--json")).document["recall"]["queue"] == name
    said = (await told(database, "why", "r", "--json")).document["why"]
    assert f"its queue {name} is paused since" in said
    assert name in [row["queue"] for row in (await told(database, "queues", "--json")).document]
    counted = (await told(database, "stats", "--json")).document["queues"]
    assert name in [row["queue"] for row in counted]
    ledger = Ledger(database, "w", LEASE, queues=[name])
    try:
        assert await claimed(ledger) == []
        await db.execute("delete from recall_queues")
        assert await claimed(ledger) == ["r"]
    finally:
        await ledger.close()


@pytest.mark.slow
async def test_scheduling_into_a_queue(db: Connection, database: str, ledgers: Ledgers) -> None:
    """By the command, and then by an edit; a queue that nobody serves is noted, as the name may be
    a mistake."""
    await db.execute("insert into sessions values ('s', 'ann'), ('t', 'ann')")
    await ledgers("mail", worker="w").heartbeat(FACTS, {})
    made = await told(database, "schedule", "s", "m", "--queue", "mail", "--in", "1h")
    assert "Note" not in made.err
    id = made.out.strip()
    assert (await recall(db, id))["queue"] == "mail"
    for said in ("no live worker serves queue mial", "nothing to change, it is so already"):
        assert said in (await told(database, "edit", id, "--queue", "mial")).err
    assert "in queue mail now" in (await told(database, "edit", id, "--queue", "mail")).err
    action = await one(
        db, "select detail from recall_actions where action = 'edit' order by id desc limit 1"
    )
    assert action["detail"] == {"queue": {"from": "mial", "to": "mail"}}
    wrong = await told(database, "schedule", "t", "m", "--queue", "a b", status=2)
    assert wrong.err.startswith("Error: --queue is 'a b', with a blank")
    listed = await told(database, "list")
    assert "QUEUE" in listed.out.splitlines()[0] and " mail " in listed.out
    assert (await told(database, "list", "--queue", "default")).err == "No recalls.\n"
    assert (await told(database, "list", "--queue", "mail", "--session", "s")).out
    assert (await told(database, "list", "--queue", "mail", "--user", "ann")).out
    await db.execute(OLD, (1,))
    for words in (["schedule", "t", "m", "--queue", "mail"], ["edit", id, "--queue", "night"]):
        refused = await told(database, *words, status=1)
        assert (
            "a worker that runs knows none" in refused.err and "Upgrade all workers" in refused.err
        )
    await told(database, "schedule", "t", "m")


async def test_recalls_in_a_queue(db: Connection, database: str) -> None:
    """`Recalls` schedules into a queue, lists and edits it; a name that is none is a ValueError."""
    await db.execute("insert into sessions values ('s', 'ann'), ('t', 'ann')")
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as conn:
        recalls = Recalls()
        made = await recalls.schedule("s", "m", queue="mail", conn=conn)
        assert made.queue == "mail"
        assert (await recalls.schedule("t", "m", conn=conn)).queue == "default"
        assert [r.id for r in await recalls.list(queue="mail", conn=conn)] == [made.id]
        assert await recalls.list(queue="mail", session_id="t", conn=conn) == []
        moved = await recalls.update(made.id, queue="night", conn=conn)
        assert moved is not None and moved.queue == "night"
        with pytest.raises(ValueError, match="the queue is 'a,b'"):
            await recalls.schedule("s", "m", queue="a,b", conn=conn)
        with pytest.raises(ValueError, match="the queue is empty"):
            await recalls.update(made.id, queue="", conn=conn)
        await recalls.cancel("s", conn=conn)
        await db.execute(OLD, (1,))
        with pytest.raises(
            errors.ObjectNotInPrerequisiteState, match="a worker that runs knows none"
        ):
            await recalls.schedule("s", "m", after=timedelta(hours=1), queue="mail", conn=conn)


async def test_why_a_queue_is_not_called(db: Connection, database: str, ledgers: Ledgers) -> None:
    """Nobody alive serves it; it is paused, by whom and why; all are."""
    await ledgers("night", worker="w").heartbeat(FACTS, {})
    await put(db, "s", queue="mail", id="r")

    async def why() -> str:
        return (await told(database, "why", "r")).out.replace("\n", " ")

    assert "no live worker serves its queue mail: start one with recall-worker run" in await why()
    await hold_back(db, "mail")
    said = await why()
    assert "its queue mail is paused since" in said and "by ann: rest" in said
    await db.execute("update recall_queues set queue = '*', reason = null")
    assert re.search("all queues are paused since .* by ann[;.]", await why())
    await db.execute("delete from recall_queues")
    await ledgers("mail", worker="m").heartbeat(FACTS, {})
    assert "waits to be claimed" in await why()


async def test_workers_and_their_settings(db: Connection, database: str, ledgers: Ledgers) -> None:
    """`workers` shows the queues of each; another run URL is a difference only within a queue."""
    await ledgers("mail", worker="a").heartbeat(FACTS, {"run_url": "http://one/"})
    await ledgers("night", worker="b").heartbeat(FACTS, {"run_url": "http://two/"})
    said = await told(database, "workers")
    assert " mail " in said.out and " night " in said.out and "differ" not in said.err
    await ledgers("night", "mail", worker="c").heartbeat(FACTS, {"run_url": "http://two/"})
    said = await told(database, "workers")
    assert "differ in run_url: http://one/, http://two/" in said.err
    rows = (await told(database, "workers", "--json")).document
    assert [row["queues"] for row in rows] == [["mail"], ["night"], ["night", "mail"]]


@pytest.mark.slow
async def test_the_doctor_looks_at_queues(db: Connection, database: str, ledgers: Ledgers) -> None:
    """A queue with live recalls and no live worker is a problem; a paused one is a note."""
    await ledgers("night", worker="w").heartbeat(FACTS, {})
    await put(db, "s", 600.0, queue="mail")

    async def found() -> list[tuple[str, str]]:
        said = await asyncio.to_thread(operate, database, "doctor", "--json")
        return [(c["state"], c["seen"]) for c in said.document["checks"] if c["check"] == "queues"]

    [(state, seen)] = await found()
    assert state == "problem" and "queue mail, which has 1 recalls waiting" in seen
    await hold_back(db, "mail")
    [(state, seen)] = await found()
    assert state == "note" and re.match("queue mail is paused since .* by ann: rest", seen)
    await db.execute("delete from recall_queues")
    await db.execute("update session_recalls set queue = 'night'")
    assert await found() == [("ok", "1 with live recalls, none paused")]


async def test_what_monitoring_sees(db: Connection, ledgers: Ledgers) -> None:
    """Each queue of the table, with the workers that serve it; overdue in all is of our own that
    are not paused."""
    mail = ledgers("mail", worker="w")
    await mail.heartbeat(FACTS, {})
    await put(db, "s1", -50.0, queue="mail")
    await put(db, "s2", -90.0, queue="nobody")
    await put(db, "s3", 600.0, queue="later")
    await hold_back(db, "night")
    backlog = await mail.backlog()
    assert (backlog.overdue, round(backlog.oldest, -1)) == (1, 50)
    assert [
        (q.queue, q.ours, q.overdue, q.workers, q.paused, round(q.oldest, -1))
        for q in backlog.queues
    ] == [
        ("mail", True, 1, 1, False, 50),
        ("later", False, 0, 0, False, 0),
        ("nobody", False, 1, 0, False, 90),
        ("night", False, 0, 0, True, 0),
    ]
    await hold_back(db, "mail")
    assert (await mail.backlog()).overdue == 0


async def test_monitoring_is_bounded(db: Connection, ledgers: Ledgers) -> None:
    """However many queues people invent, a hundred are told of, ours among them."""
    await db.execute("insert into sessions select 's' || n, 'u' from generate_series(1, 300) n")
    await db.execute(
        "insert into session_recalls (id, session_id, call_type, trigger_at, "
        "additional_context_message, created_at, updated_at, queue) "
        "select n, 's' || n, 'once', now(), 'm', now(), now(), 'q' || n "
        "from generate_series(1, 300) n"
    )
    backlog = await ledgers("zzz").backlog()
    assert len(backlog.queues) == 100 and backlog.queues[0].queue == "zzz"


# --- the invariant --------------------------------------------------------------------------------

QUEUES = ("a", "b", "c")
some_queues = st.lists(st.sampled_from(QUEUES), min_size=1, max_size=2, unique=True)
queue = st.sampled_from(QUEUES)
paused = st.sampled_from((*QUEUES, "*"))
worker = st.integers(0, 2)
moves = {
    "put": (5, st.tuples(st.sampled_from(("s", "t", "u")), queue)),
    "claim": (5, st.tuples(worker, st.integers(1, 3))),
    "settle": (2, st.tuples(st.integers(0, 5))),
    "die": (3, st.tuples(st.integers(0, 5))),
    "take up": (3, st.tuples(worker)),
    "beat": (2, st.tuples(worker)),
    "pause": (1, st.tuples(paused)),
    "resume": (1, st.tuples(paused)),
    "move": (1, st.tuples(queue, st.integers(0, 5))),
}
"""What may happen, and how often it is drawn."""
steps = st.lists(
    st.sampled_from([word for word, (weight, _) in moves.items() for _ in range(weight)]).flatmap(
        lambda word: moves[word][1].map(lambda values: (word, *values))
    ),
    min_size=10,
    max_size=50,
)


class Fleet:
    """Three workers, and what they have in hand."""

    def __init__(self, dsn: str, db: Connection, served: list[list[str]]) -> None:
        self.db = db
        self.served = served
        self.workers = [
            Ledger(dsn, f"w{n}", LEASE, queues=queues, run_timeout=60.0)
            for n, queues in enumerate(served)
        ]
        self.runs: list[tuple[int, Claim]] = []
        self.dead: set[str] = set()
        """Recalls whose worker died."""

    async def rows(self, query: str) -> list[dict[str, Any]]:
        return await (await self.db.execute(query.encode())).fetchall()

    async def step(self, word: str, *values: Any) -> None:
        match word:
            case "put":
                session, queue = values
                try:
                    await put(self.db, session, -1.0, queue=queue)
                except errors.UniqueViolation:
                    pass  # The session has one.
            case "claim":
                worker, slots = values
                await self._takes(worker, (await self.workers[worker].claim(slots)).claims)
            case "take up":
                [worker] = values
                ended = await self.workers[worker].ended_leases()
                ids = ended.unanswered + ended.accepted
                claims = (await self.workers[worker].take_up(ids)).claims if ids else []
                await self._takes(worker, claims)
            case "settle":
                if self.runs:
                    worker, run = self.runs.pop(values[0] % len(self.runs))
                    ending = (answered(run), Finish("fired", None))
                    [done] = await self.workers[worker].settle([ending])
                    assert isinstance(done, Settled | Ended), done
            case "die":
                if self.runs:
                    _, run = self.runs.pop(values[0] % len(self.runs))
                    await self.db.execute(
                        "update session_recalls set leased_by = 'dead', "
                        "lease_until = now() - interval '30 seconds', "
                        "leased_at = now() - interval '90 seconds' where id = %s",
                        (run.id,),
                    )
                    self.dead.add(run.id)
            case "beat":
                hand = [run.id for worker, run in self.runs if worker == values[0]]
                held = await self.rows(
                    "select id, queue from session_recalls where lease is not null"
                )
                await self.workers[values[0]].heartbeat(FACTS, {}, hand)
                free = await self.rows("select id from session_recalls where lease is null")
                paused = {
                    row["queue"] for row in await self.rows("select queue from recall_queues")
                }
                for row in held:
                    served = row["queue"] in self.served[values[0]] and not paused & {
                        row["queue"],
                        "*",
                    }
                    # A dead worker's run, which must be over by now.
                    expected = row["id"] in self.dead and not served
                    assert ({"id": row["id"]} in free) == expected, "freed where nobody may come"
            case "pause":
                await self.db.execute(
                    "insert into recall_queues (queue, paused_by) values (%s, 'ann') "
                    "on conflict do nothing",
                    values,
                )
            case "resume":
                await self.db.execute("delete from recall_queues where queue = %s", values)
            case "move":
                queue, n = values
                await self.db.execute(
                    "update session_recalls set queue = %s where id = (select id from "
                    "session_recalls order by id offset %s limit 1)",
                    (queue, n),
                )

    async def _takes(self, worker: int, claims: list[Claim]) -> None:
        paused = {row["queue"] for row in await self.rows("select queue from recall_queues")}
        for claim in claims:
            queue = (await recall(self.db, claim.id))["queue"]
            assert queue in self.served[worker], "a worker claims from its queues"
            assert not paused & {queue, "*"}, "and nothing of a queue that is paused"
            self.runs.append((worker, claim))
            self.dead.discard(claim.id)
        sessions = [run.session_id for _, run in self.runs]
        assert len(sessions) == len(set(sessions)), "two runs never meet in a session"

    async def finish(self) -> None:
        """Whatever was paused or unserved: in the end each recall is claimed and settled."""
        await self.db.execute("delete from recall_queues")
        all_ = len(self.workers)
        self.served.append(list(QUEUES))
        self.workers.append(
            Ledger(self.workers[0]._prunes._dsn, "last", LEASE, queues=QUEUES, run_timeout=60.0)
        )
        for _ in range(60):
            for run in list(self.runs):
                await self.step("settle", self.runs.index(run))
            await self.step("take up", all_)
            await self.step("claim", all_, 10)
            live = await self.rows("select * from session_recalls where status <> 'fired'")
            if not live and not self.runs:
                return
        raise AssertionError(live)


async def played(dsn: str, served: list[list[str]], drawn: list[tuple[Any, ...]]) -> None:
    async with connected(dsn) as db:
        await db.execute(
            "truncate session_recalls, sessions, recall_attempts, recall_queues, recall_workers"
        )
        fleet = Fleet(dsn, db, served)
        try:
            for move in drawn:
                await fleet.step(*move)
            await fleet.finish()
        finally:
            for worker in fleet.workers:
                await worker.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_queue_is_its_workers_own(server: str, template: str) -> None:
    """Whatever is scheduled, paused, moved and left behind by dead workers, in whatever order: a
    worker gets what is in its queues and not paused, no two runs meet in a session, and nothing is
    held for ever."""
    with postgres.database(server, template) as dsn:
        with psycopg.connect(dsn, autocommit=True) as conn:
            up = "select pg_postmaster_start_time() < now() - interval '1 second'"
            while conn.execute(up).fetchone() != (True,):
                conn.execute("select pg_sleep(0.05)")

        @settings(
            max_examples=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        )
        @given(st.lists(some_queues, min_size=3, max_size=3), steps)
        def play(served: list[list[str]], drawn: list[tuple[Any, ...]]) -> None:
            asyncio.run(played(dsn, [list(queues) for queues in served], drawn))

        play()
