"""Random lives of recalls: the real SQL, the real judge, a clock that the test turns; and a plain
model that says what must have come of it.

Everything that PostgreSQL does here takes the time from a table: `now()` is a function of the
test's schema, which comes before pg_catalog. The host's durations are pinned to the same clock.
What a worker does with its claims is done in the order in which the daemon does it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

from recall_worker import schema, statements
from recall_worker.cadence import upcoming
from recall_worker.database import ledger as ledger_module
from recall_worker.database.ledger import Ledger
from recall_worker.database.values import Dates
from recall_worker.judge import (
    Policy,
    as_it_stands,
    before_call,
    judge,
    planned,
    resolve_move,
    runs_now,
)
from recall_worker.recall import (
    Accepted,
    Answered,
    Busy,
    Claim,
    Ended,
    Ending,
    Failed,
    Gone,
    LeaseLost,
    Misconfigured,
    Moved,
    Outcome,
    Recall,
    Refused,
    Settled,
    Unavailable,
    Unknown,
    Unsent,
    Verdict,
)

from ..support import postgres
from ..support.claiming import claim_due
from . import almanac, model
from .model import Row

STARTS = [
    datetime(2027, 3, 10, 9, tzinfo=UTC),
    datetime(2027, 3, 14, 5, 50, tzinfo=UTC),
    datetime(2027, 4, 3, 12, tzinfo=UTC),
    datetime(2027, 11, 6, 20, tzinfo=UTC),
    datetime(2027, 11, 7, 5, 10, tzinfo=UTC),
    datetime(2027, 11, 7, 6, 10, tzinfo=UTC),
]
"""Not long before New York's and Berlin's spring, Lord Howe's autumn, and New York's autumn, down
to the two passes of the repeated hour."""
REPEATED = ("30 1 * * *", "America/New_York")
LONGEST = timedelta(days=60)
SESSIONS = ["a", "b"]
WORKERS = ["w1", "w2"]
POLICY = Policy(busy_delay=model.BUSY_DELAY, max_attempts=model.MAX_ATTEMPTS, give_up=model.GIVE_UP)
OUTCOMES: dict[str, Outcome] = {
    "answered": Answered(200),
    "busy": Busy(409),
    "gone": Gone(404),
    "misconfigured": Misconfigured("a web page", 200),
    "unavailable": Unavailable("later", 503),
    "unknown": Unknown("silence"),
    "failed": Failed("failed", 200),
    "refused": Refused("no", 422),
    "unsent": Unsent("stopping"),
}
POLLED = ("answered", "failed", "unknown", "unsent")
"""How a run ends that was accepted; unsent: its worker stops while it goes on."""
ACCEPTED = Accepted("run", 202)
RULE = ["call_type", "interval", "cadence", "cron", "zone"]
EDITS: dict[str, st.SearchStrategy[Any]] = {
    "call_type": st.sampled_from(["once", "recurring", "recurring", "immediate"]),
    "interval": st.sampled_from([60, 90, 1800, 3600]),
    "cadence": st.sampled_from(["interval", "grid", "cron"]),
    "cron": st.sampled_from(almanac.EXPRESSIONS),
    "zone": st.none() | st.sampled_from(almanac.ZONES),
    "until": st.none() | st.sampled_from([-1, 0, 0.02, 0.1, 1, 3]),
    "times": st.none() | st.integers(1, 6),
    "failures_most": st.none() | st.integers(1, 2),
    "grace": st.none() | st.sampled_from([0, 100, 5000]),
    "jitter": st.none() | st.just(20),
}
"""The columns of a schedule, as the model names them, and what they are edited to; until: days from
now."""
COLUMNS = {
    "interval": "interval_seconds",
    "zone": "time_zone",
    "until": "until_at",
    "grace": "grace_seconds",
    "jitter": "jitter_seconds",
}
"""Where the table's name is another."""
LIKELY = ["answered", "answered", "answered", "refused", "unknown", "failed", "busy"]
CLOCK = """
create table test_clock (at timestamptz not null);
insert into test_clock values ('2027-01-01');
create function now() returns timestamptz stable language sql as 'select at from public.test_clock';
"""


def dice() -> float:
    return model.CHANCE


class World:
    """A database under the test's clock, with a ledger for each worker; shared by all examples.

    `most`: how many pending recalls a session may have.
    """

    def __init__(self, dsn: str, most: int = 1) -> None:
        self.most = most
        self.dsn = make_conninfo(dsn, options="-c search_path=public,pg_catalog -c timezone=UTC")
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            conn.execute(CLOCK.encode())
        schema.migrate(self.dsn, pending_most=most)
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            # The triggers name PostgreSQL's own clock in full.
            (edit,) = conn.execute(
                "select pg_get_functiondef('recall_before_edit'::regproc)"
            ).fetchone() or ("",)
            assert "pg_catalog.now()" in edit
            conn.execute(edit.replace("pg_catalog.now()", "public.now()").encode())
        self.loop = asyncio.new_event_loop()
        self.conn = psycopg.connect(self.dsn, autocommit=True, row_factory=dict_row)
        self.conn.adapters.register_loader("timestamptz", Dates)
        self.ledgers = {name: Ledger(self.dsn, name, float(model.LEASE)) for name in WORKERS}
        self.client = {name: text.encode() for name, text in statements.load("client").items()}
        self.set(STARTS[0])

    def set(self, now: datetime) -> None:
        self.conn.execute("update test_clock set at = %s", [now])
        # Durations by the same clock, so that what the worker reckons from them is known to the
        # microsecond.
        ledger_module.time = SimpleNamespace(monotonic=lambda: now.timestamp())  # type: ignore[assignment, attr-defined]

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def close(self) -> None:
        import time

        ledger_module.time = time  # type: ignore[attr-defined]
        for ledger in self.ledgers.values():
            self.run(ledger.close())
        self.conn.close()
        self.loop.close()


@pytest.fixture(scope="module")
def world(server: str) -> Iterator[World]:
    with postgres.database(server) as dsn:
        found = World(dsn)
        yield found
        found.close()


@pytest.fixture(scope="module")
def roomy_world(server: str) -> Iterator[World]:
    """A world in which a session may have three pending recalls."""
    with postgres.database(server) as dsn:
        found = World(dsn, 3)
        yield found
        found.close()


class Lives(RuleBasedStateMachine):
    world: World
    begun = 0
    """Lives so far."""

    @initialize(start=st.sampled_from(STARTS))
    def begin(self, start: datetime) -> None:
        type(self).begun += 1
        self.world.conn.execute("truncate session_recalls, recall_attempts")
        self.start = self.now = start
        self.world.set(start)
        self.rows: dict[str, Row] = {}
        self.open: list[tuple[str, str, Claim]] = []
        """Calls under way: worker, recall's id, claim."""
        self.bodies: dict[str, tuple[datetime, int]] = {}
        self.numbers = 0

    # --- the application and the operator ---------------------------------------------------------

    @rule(
        session=st.sampled_from(SESSIONS),
        kind=st.sampled_from(
            ["once", "immediate", "every", "grid", "grid", "cron", "cron", "cron", "unplanned"]
        ),
        ahead=st.sampled_from([-7200, -60, 0, 30, 600, 7200]),
        interval=st.sampled_from([60, 90, 1800]),
        which=st.sampled_from([*almanac.KNOWN, REPEATED, REPEATED]),
        times=st.none() | st.integers(1, 4),
        days=st.none() | st.sampled_from([0, 0.02, 0.1, 1, 3]),
        failures=st.none() | st.integers(1, 2),
        grace=st.none() | st.sampled_from([0, 100, 5000]),
        jitter=st.none() | st.just(20),
    )
    def schedule(
        self,
        session: str,
        kind: str,
        ahead: int,
        interval: int,
        which: tuple[str, str],
        times: int | None,
        days: float | None,
        failures: int | None,
        grace: int | None,
        jitter: int | None,
    ) -> None:
        """The application inserts a recall, if the session's slot is free or can be freed."""
        self.numbers += 1
        trigger = self.now + timedelta(seconds=ahead)
        row = Row(
            f"r{self.numbers}",
            session,
            {"once": "once", "immediate": "immediate"}.get(kind, "recurring"),
            trigger,
        )
        if kind in ("every", "grid"):
            row.cadence, row.interval = ("interval" if kind == "every" else "grid"), interval
        elif kind in ("cron", "unplanned"):
            row.cadence, (row.cron, row.zone) = "cron", which
            if kind == "cron":
                # As `schedule` writes it: on a moment, with the distance to the one behind it.
                row.trigger = row.base = row.planned = row.nth(trigger, 1)
                row.interval = row.distance(row.trigger)
        if row.recurring:
            row.times, row.failures_most = times, failures
            row.until = None if days is None else self.now + timedelta(days=days)
        row.grace, row.jitter = grace, jitter
        free = self._free_slot(row)
        movable = [
            r
            for r in self._pending(row)
            if not r.recurring and (r.holder is not None or r.may_go_on)
        ]
        if free is None and movable:
            moved = min(movable, key=lambda r: (r.holder is None, r.slot))
            moved.status, free = "running", moved.slot
        try:
            self.world.conn.execute(
                """insert into session_recalls (id, session_id, call_type, trigger_at,
                    interval_seconds, additional_context_message, status,
                    created_at, updated_at, cadence, cron, time_zone, until_at, times,
                        failures_most, grace_seconds, jitter_seconds)
                values (%s, %s, %s, %s, %s, 'look', 'pending', now(), now(), %s, %s, %s, %s, %s,
                    %s, %s, %s)""",
                [
                    row.id,
                    session,
                    row.call_type,
                    row.trigger,
                    row.interval,
                    row.cadence,
                    row.cron,
                    row.zone,
                    row.until,
                    row.times,
                    row.failures_most,
                    row.grace,
                    row.jitter,
                ],
            )
        except psycopg.errors.UniqueViolation:
            assert free is None, "refused though a slot is free"
        else:
            assert free is not None, "taken though the session has as many pending as it may"
            row.slot = free
            self.rows[row.id] = row

    def _pending(self, row: Row) -> list[Row]:
        """What else is pending in its session."""
        return [
            r
            for r in self.rows.values()
            if r.session == row.session and r.status == "pending" and r is not row
        ]

    def _free_slot(self, row: Row) -> int | None:
        """The slot that it gets when it becomes pending: the one that it had, else the lowest."""
        taken = {r.slot for r in self._pending(row)}
        free = [n for n in (row.slot, *range(1, self.world.most + 1)) if n not in taken]
        return free[0] if free and len(taken) < self.world.most else None

    @precondition(
        lambda self: (
            self.now.month == 11
            and self.now.day == 7
            and self.now.hour in (5, 6)
            and self.now.minute < 30
        )
    )
    @rule(session=st.sampled_from(SESSIONS), kind=st.sampled_from(["cron", "unplanned"]))
    def schedule_in_the_repeated_hour(self, session: str, kind: str) -> None:
        """Half past one is near; or it has been, and the clock of New York shows a time before it
        again."""
        self.schedule(session, kind, 0, 60, REPEATED, None, None, None, None, None)

    def _some(self, data: st.DataObject, *, live: bool = True) -> Row | None:
        some = [r for r in self.rows.values() if r.live is live]
        return data.draw(st.sampled_from(some), label="recall") if some else None

    @precondition(lambda self: self.rows)
    @rule(session=st.sampled_from(SESSIONS))
    def cancel(self, session: str) -> None:
        """The application's cancel, by session."""
        self._app(
            "update session_recalls set status = 'cancelled', updated_at = now() where "
            "session_id = %s and status = 'pending'",
            session,
        )
        for row in self.rows.values():
            if row.session == session and row.status == "pending":
                row.status = "cancelled"

    @precondition(lambda self: self.rows)
    @rule(session=st.sampled_from(SESSIONS), times=st.integers(1, 2))
    def skip(self, session: str, times: int) -> None:
        """The application's skip, by session; twice in quick succession, too."""
        found = [
            r
            for r in self.rows.values()
            if r.session == session and r.status == "pending" and r.recurring
        ]
        if any(r.interval is None for r in found):
            return  # A null would be added; such a row waits for a worker for moments only.
        for _ in range(times):
            self._app(
                "update session_recalls set trigger_at = trigger_at + interval_seconds * "
                "interval '1 second', updated_at = now()"
                " where session_id = %s and status = 'pending' and call_type = 'recurring'",
                session,
            )
            for row in found:
                row.move(self.now, row.trigger + timedelta(seconds=row.interval or 0))

    @precondition(lambda self: self.rows)
    @rule(
        data=st.data(),
        ahead=st.sampled_from([-5000, -1, 45, 90, 3601, 100_000]),
        from_there=st.booleans(),
    )
    def reschedule(self, data: st.DataObject, ahead: int, from_there: bool) -> None:
        """The application names another time, seen from now, or from where the recall was put."""
        row = self._some(data)
        if row is not None:
            to = (row.base if from_there else self.now) + timedelta(seconds=ahead)
            if to == row.planned != row.base:
                return  # That undoes, to the microsecond, what was named meanwhile.
            row.move(self.now, to)
            self._app(
                "update session_recalls set trigger_at = %s, updated_at = now() where id = %s",
                row.trigger,
                row.id,
            )

    @precondition(lambda self: self.rows)
    @rule(
        data=st.data(),
        columns=st.lists(st.sampled_from([*EDITS, *RULE]), min_size=1, max_size=2, unique=True),
        ahead=st.sampled_from([None, None, None, 45, 3601, -1]),
        skips=st.sampled_from([(0, 0), (0, 0), (0, 1), (1, 0), (1, 1)]),
    )
    def edit(
        self, data: st.DataObject, columns: list[str], ahead: int | None, skips: tuple[int, int]
    ) -> None:
        """Somebody edits the schedule by plain SQL: one column, or two at once, also with another
        time in the same statement; with a skip before and after."""
        row = self._some(data)
        if row is not None:
            changes = self._changes(data, row, columns)
            self._skip_one(row, skips[0])
            self._edit(row, changes, ahead)
            self._skip_one(row, skips[1])

    def _changes(self, data: st.DataObject, row: Row, columns: list[str]) -> dict[str, Any]:
        """New values of these columns, and of those without which they would make no sense."""
        new = {c: data.draw(EDITS[c], label=c) for c in columns}
        if (days := new.get("until")) is not None:
            new["until"] = self.now + timedelta(days=days)
        if new.get("call_type", row.call_type) == "recurring":
            cadence = new.get("cadence", row.cadence)
            if cadence == "cron" and new.get("cron", row.cron) is None:
                new["cron"] = data.draw(EDITS["cron"], label="cron")
            if cadence != "cron" and new.get("interval", row.interval) is None:
                new["interval"] = data.draw(EDITS["interval"], label="interval")
        return new

    def _edit(self, row: Row, changes: dict[str, Any], ahead: int | None) -> None:
        trigger = None if ahead is None else self.now + timedelta(seconds=ahead)
        trigger = None if trigger in (row.base, row.planned) else trigger
        values = {COLUMNS.get(name, name): value for name, value in changes.items()}
        if trigger is not None:
            values["trigger_at"] = trigger
        named = ", ".join(f"{column} = %s" for column in values)
        self._app(
            f"update session_recalls set {named}, updated_at = now() where id = %s",
            *values.values(),
            row.id,
        )
        row.edit(self.now, changes, trigger)

    def _skip_one(self, row: Row, times: int) -> None:
        if not row.recurring or row.interval is None or not times:
            return
        self._app(
            "update session_recalls set trigger_at = trigger_at + interval_seconds * interval "
            "'1 second', updated_at = now() where id = %s",
            row.id,
        )
        row.move(self.now, row.trigger + timedelta(seconds=row.interval))

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), ahead=st.sampled_from([-5000, -1, 45, 60, 90, 1800, 3601, 100_000]))
    def reschedule_by_name(self, data: st.DataObject, ahead: int) -> None:
        """The command `reschedule`, and `Recalls.reschedule`: always the time that they name."""
        row = self._some(data)
        if row is not None:
            at = self.now + timedelta(seconds=ahead)
            if at in (row.base, row.planned):
                return  # Where it was put before, to the microsecond: nothing, or undone.
            values = {"ids": [row.id], "at": at, "after": None, "actor": None, "via": "model"}
            done = self.world.conn.execute(self.world.client["reschedule"], values).fetchall()
            assert bool(done) is row.reschedule(self.now, at)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), what=st.sampled_from(["pause", "resume", "fire", "retry", "delete"]))
    def operate(self, data: st.DataObject, what: str) -> None:
        """The operator's hand, by the command line's statements; and a session that is deleted with
        its recall."""
        row = self._some(data, live=what != "retry")
        if row is None:
            return
        if what == "delete":
            self._app("delete from session_recalls where id = %s", row.id)
            del self.rows[row.id]
            return
        done: list[Any] | None
        try:
            values = {"ids": [row.id], "actor": None, "via": "model"}
            done = self.world.conn.execute(self.world.client[what], values).fetchall()
        except psycopg.errors.UniqueViolation:
            done = None
        if what in ("pause", "resume"):
            row.paused = what == "pause"
            return
        if what == "fire":
            assert bool(done) is row.fire(self.now)
            return
        possible = row.status in ("failed", "cancelled") and (
            row.holder is None or row.due_at < self.now
        )
        free = self._free_slot(row)
        taken = free is None
        assert (done is None) is (possible and taken)
        assert bool(done) is (possible and not taken)
        if possible and free is not None:
            row.retry(self.now)
            row.slot = free

    def _app(self, statement: str, *values: object) -> None:
        self.world.conn.execute(statement.encode(), values)

    # --- time and workers -------------------------------------------------------------------------

    @rule(step=st.sampled_from([1, 20, 61, 200, 1800, 3600, 7200, 86_400, 5 * 86_400]))
    def pass_time(self, step: int) -> None:
        if self.now + timedelta(seconds=step) - self.start < LONGEST:
            self.now += timedelta(seconds=step)
            self.world.set(self.now)

    @precondition(lambda self: self.rows)
    @rule()
    def pass_time_to_due(self) -> None:
        """To the instant at which something is due."""
        self._to_due()

    def _to_due(self) -> None:
        ahead = sorted({r.due_at for r in self.rows.values() if r.live and r.due_at > self.now})
        if ahead and ahead[0] - self.start < LONGEST:
            self.now = ahead[0]
            self.world.set(self.now)

    @precondition(lambda self: self.rows)
    @rule(worker=st.sampled_from(WORKERS), slots=st.integers(1, 3))
    def claim(self, worker: str, slots: int) -> None:
        """A worker looks: it claims, calls what is to be called, and settles at once what is
        not."""
        self._claim(worker, slots, None)

    @precondition(lambda self: self.rows)
    @rule(
        data=st.data(),
        worker=st.sampled_from(WORKERS),
        columns=st.lists(
            st.sampled_from([*EDITS, "until", "times", "grace"]),
            min_size=1,
            max_size=2,
            unique=True,
        ),
    )
    def claim_while_it_is_edited(
        self, data: st.DataObject, worker: str, columns: list[str]
    ) -> None:
        """The same, and a schedule is edited between the claim and what follows."""
        self._claim(worker, 3, lambda row: self._edit(row, self._changes(data, row, columns), None))

    def _claim(self, worker: str, slots: int, edit: Callable[[Row], None] | None) -> None:
        ledger = self.world.ledgers[worker]
        in_hand = [id for whose, id, _ in self.open if whose == worker]
        claimed = self.world.run(claim_due(ledger, slots, in_hand=in_hand))
        possible = self._possible(worker)
        chosen = [self.rows[c.id] for c in claimed.claims]
        assert {r.id for r in chosen} <= {r.id for r in possible}, (
            "claimed what is not to be claimed"
        )
        assert len(chosen) == min(slots, len(possible)), "left what is due, with slots free"
        # Ended leases are asked for first, by a statement of their own.
        for taken_up in (True, False):
            its = [r for r in possible if (r.holder is not None) is taken_up]
            took = [r.due_at for r in its if r in chosen]
            left = [r.due_at for r in its if r not in chosen]
            assert not took or not left or max(took) <= min(left), "not the oldest first"
            assert not (taken_up and left and len(chosen) > len(took)), "not ended leases first"

        does: dict[str, str] = {}
        for n, claim in enumerate(claimed.claims):
            row = self.rows[claim.id]
            assert claim.taken_from == row.holder
            row.take(worker, self.now)
            between = partial(edit, row) if edit is not None and n == 0 else None
            does[row.id] = row.begin(self.now, between)
        placements = [(c, p) for c in claimed.claims if (p := resolve_move(c)) is not None]
        now_placed = {
            c.id: c
            for c in self.world.run(
                ledger.write_moves([(c, p) for c, p in placements if runs_now(c, p)])
            )
        }
        to_place = {c.id for c, _ in placements}
        for claim in claimed.claims:
            row, expected = self.rows[claim.id], does[claim.id]
            claim = now_placed.get(claim.id, claim)
            if claim.id in to_place and claim.id not in now_placed:
                assert expected in ("put back", "given back")
                self._back_in_its_slot(row)
                self._settle(worker, claim, Unsent("moved by the application"))
                continue
            if claim.reference is not None:
                assert expected == "poll"
                self.open.append((worker, claim.id, claim))
                continue
            decided = before_call(claim, POLICY.max_attempts)
            if decided is not None:
                assert expected in ("ended", "used up", "given back"), decided
                self._back_in_its_slot(row)
                self._settle(worker, claim, decided)
                continue
            assert expected == "call"
            if claim.taken_from is not None:
                # As the executor does. A call that is known unsent would cost no attempt.
                assert self.world.run(ledger.sent(claim))
            body = (claim.scheduled_for, claim.missed)
            assert (claim.key, *body) == row.called[-1]
            assert self.bodies.setdefault(claim.key, body) == body, "one key, two bodies"
            self.open.append((worker, claim.id, claim))
        if claimed.moved:
            moved = self.world.run(ledger.moved())
            self.world.run(ledger.settle_moved([(claim, planned(claim, dice)) for claim in moved]))
            for row in self.rows.values():
                if (
                    row.live
                    and row.recurring
                    and row.cadence == "cron"
                    and row.holder is None
                    and row.extra is None
                    and row.changed
                ):
                    row.plan()

    @precondition(lambda self: any(row.live for row in self.rows.values()))
    @rule(
        data=st.data(),
        worker=st.sampled_from(WORKERS),
        outcomes=st.lists(st.sampled_from(LIKELY), min_size=1, max_size=4),
        late=st.sampled_from([0, 0, 150, 9000]) | st.none(),
        column=st.none() | st.sampled_from([*EDITS, "times", "times"]),
    )
    def live_on(
        self,
        data: st.DataObject,
        worker: str,
        outcomes: list[str],
        late: int | None,
        column: str | None,
    ) -> None:
        """Some occurrences one after the other: the next that is due is claimed (at once, late, or
        in the instant of another moment), called, perhaps edited, and settled."""
        for outcome in outcomes:
            self._to_due()
            if late is None:
                self._to_a_moment()
            else:
                self.pass_time(late)
            self.claim(worker, 3)
            self.the_rows_are_as_the_model_says()
            while self.open:
                row = self.rows.get(self.open[-1][1])
                if column is not None and row is not None and row.live:
                    self._edit(row, self._changes(data, row, [column]), None)
                self._end(len(self.open) - 1, outcome, None)
                self.the_rows_are_as_the_model_says()

    def _to_a_moment(self) -> None:
        """To the instant of the moment after the one that is due, of whichever recall has the
        nearest."""
        due = [
            r
            for r in self.rows.values()
            if r.live and r.recurring and r.interval is not None and r.due_at <= self.now
        ]
        ahead = sorted(
            moment for r in due if (moment := r.nth(r.scheduled or r.base, 1)) > self.now
        )
        if ahead and ahead[0] - self.start < LONGEST:
            self.now = ahead[0]
            self.world.set(self.now)

    def _waiting(self, data: st.DataObject) -> Row | None:
        some = [
            r
            for r in self.rows.values()
            if r.live and r.recurring and not r.paused and r.extra is None
            if not r.called_before and r.trigger > self.now
        ]
        return data.draw(st.sampled_from(some), label="recall") if some else None

    @precondition(lambda self: any(row.live and row.recurring for row in self.rows.values()))
    @rule(
        data=st.data(),
        worker=st.sampled_from(WORKERS),
        outcomes=st.lists(st.sampled_from([*LIKELY, "unavailable"]), min_size=1, max_size=4),
        before=st.sampled_from([None, 20]),
    )
    def fire_in_between(
        self, data: st.DataObject, worker: str, outcomes: list[str], before: int | None
    ) -> None:
        """Extra runs of a recall that waits, perhaps shortly before it is due; what they leave
        undone is called again."""
        row = self._waiting(data)
        if row is None:
            return
        ahead = None if before is None else row.trigger - timedelta(seconds=before)
        if ahead is not None and self.now < ahead < self.start + LONGEST:
            self.now = ahead
            self.world.set(self.now)
        for outcome in outcomes:
            if row.live and row.extra is None:
                values = {"ids": [row.id], "actor": None, "via": "model"}
                done = self.world.conn.execute(self.world.client["fire"], values).fetchall()
                assert bool(done) is row.fire(self.now)
            self.claim(worker, 3)
            self.the_rows_are_as_the_model_says()
            while self.open:
                self._end(len(self.open) - 1, outcome, None)
                self.the_rows_are_as_the_model_says()
            self._to_due()

    @precondition(lambda self: any(row.live and row.on_cron for row in self.rows.values()))
    @rule(
        data=st.data(),
        worker=st.sampled_from(WORKERS),
        column=st.sampled_from(["cron", "cron", "zone", "cadence"]),
        late=st.sampled_from([600, 3600, 86_400, 5 * 86_400]),
    )
    def edit_while_nobody_looks(
        self, data: st.DataObject, worker: str, column: str, late: int
    ) -> None:
        """A rule is edited while all workers are away: the moments of the new one count from the
        edit, not from when a worker comes back."""
        row = self._waiting(data)
        if row is not None:
            self._edit(row, self._changes(data, row, [column]), None)
            self.pass_time(late)
            self.claim(worker, 3)

    @precondition(lambda self: self.open)
    @rule(
        data=st.data(),
        columns=st.lists(
            st.sampled_from([*EDITS, "times", "times"]), min_size=1, max_size=2, unique=True
        ),
        outcome=st.sampled_from(LIKELY),
    )
    def edit_in_mid_run(self, data: st.DataObject, columns: list[str], outcome: str) -> None:
        """A schedule is edited during its run, which then ends."""
        which = data.draw(st.integers(0, len(self.open) - 1), label="call")
        row = self.rows.get(self.open[which][1])
        if row is not None and row.live:
            self._edit(row, self._changes(data, row, columns), None)
        self._end(which, outcome, None)

    @precondition(lambda self: any(row.live and row.recurring for row in self.rows.values()))
    @rule(data=st.data(), worker=st.sampled_from(WORKERS), more=st.integers(0, 3))
    def end_while_nobody_looks(self, data: st.DataObject, worker: str, more: int) -> None:
        """A recall's end passes while all workers are away, after its due moment and some more."""
        row = self._waiting(data)
        if row is not None and row.interval is not None:
            distance = timedelta(seconds=row.interval)
            self._edit(row, {"until": row.trigger + distance * more}, None)
            self._to_due()
            self.pass_time(86_400)
            self.claim(worker, 3)

    def _possible(self, worker: str) -> list[Row]:
        """What DESIGN lets this worker claim now."""
        found = []
        for row in self.rows.values():
            if not row.live or row.paused or row.due_at > self.now:
                continue
            others = [r for r in self.rows.values() if r.session == row.session and r is not row]
            if any(not r.live and r.holder is not None and r.due_at > self.now for r in others):
                continue
            if row.holder is not None:
                # What it has in hand it doesn't take from itself, and what it handed over not soon.
                in_hand = (worker, row.id) in {(whose, id) for whose, id, _ in self.open}
                soon = row.due_at + timedelta(seconds=model.LEASE / 3) >= self.now
                if not in_hand and not (row.holder == worker and soon):
                    found.append(row)
                continue
            if any(r.live and r.holder is not None for r in others):
                continue
            ahead = [
                r
                for r in others
                if r.live and not r.paused and (r.due_at, r.id) < (row.due_at, row.id)
            ]
            if not ahead:
                found.append(row)
        return found

    @precondition(lambda self: self.open)
    @rule(
        data=st.data(),
        outcome=st.sampled_from([*sorted(OUTCOMES), "answered", "answered", "refused"]),
        retry_after=st.none() | st.just(7),
    )
    def settle(self, data: st.DataObject, outcome: str, retry_after: int | None) -> None:
        """A call ends, be the lease still the worker's or not."""
        self._end(data.draw(st.integers(0, len(self.open) - 1), label="call"), outcome, retry_after)

    @precondition(lambda self: any(claim.reference is None for _, _, claim in self.open))
    @rule(data=st.data())
    def accept(self, data: st.DataObject) -> None:
        """The API accepts a run, and says later how it ended."""
        which = data.draw(
            st.sampled_from([n for n, (_, _, c) in enumerate(self.open) if c.reference is None]),
            label="call",
        )
        worker, id, claim = self.open[which]
        row = self.rows.get(id)
        holds = row is not None and row.live and self._holds(row, claim)
        assert self.world.run(self.world.ledgers[worker].accept(claim, ACCEPTED, 0.0)) is holds
        if row is not None and holds:
            row.accept(self.now)
            self.open[which] = (worker, id, claim._replace(reference=ACCEPTED.reference))

    def _end(self, which: int, outcome: str, retry_after: int | None) -> None:
        worker, id, claim = self.open.pop(which)
        ended: Outcome = OUTCOMES[outcome]
        if claim.reference is not None:
            outcome = outcome if outcome in POLLED else "answered"
            ended = ACCEPTED if outcome == "unsent" else OUTCOMES[outcome]
        if outcome == "busy":
            ended = Busy(409, None if retry_after is None else float(retry_after))
        row = self.rows.get(id)
        holds = row is not None and self._holds(row, claim)
        answer = self._settle(worker, claim, ended)
        if (
            outcome == "unsent"
            and claim.reference is None
            and claim.begun_age is None
            and claim.taken_from is None
        ):
            # Nothing was sent under this key yet.
            self.bodies.pop(claim.key, None)
        if row is None:
            assert answer == Ended("deleted") or (ended is ACCEPTED and isinstance(answer, Settled))
        elif not holds:
            # The very ending may be on record by then: by who took the row up, or retried it.
            lost = isinstance(answer, LeaseLost | Ended) or answer == Settled("before")
            assert lost, "a stale settle was written"
        elif not row.live:
            assert answer == Ended(row.status)
            row.holder = row.lease_until = None
        else:
            if ended is ACCEPTED:
                row.hand_over(self.now)
            else:
                row.settle(outcome, self.now, retry_after if outcome == "busy" else None)
            self._back_in_its_slot(row)
            assert answer == Settled(row.status)

    def _back_in_its_slot(self, row: Row) -> None:
        """What was moved out of its session's slot and waits again takes it, unless a newer recall
        has."""
        free = self._free_slot(row)
        if row.status == "running" and free is not None:
            row.status, row.slot = "pending", free

    def _holds(self, row: Row, claim: Claim) -> bool:
        return self.leases.get(row.id) == claim.lease

    def _settle(self, worker: str, claim: Claim, outcome: Outcome) -> object:
        ledger, at = self.world.ledgers[worker], self.now.timestamp()
        since = (self.now - claim.claimed_at).total_seconds()
        uncalled = (
            isinstance(outcome, Unsent)
            # Taken up, and only polled.
            or claim.delivered_age is not None
            or (claim.reference is None and before_call(claim, POLICY.max_attempts) is not None)
        )
        for _ in range(3):
            ending = Ending(claim, outcome, None if uncalled else 0.0, since, at)
            verdict: Verdict = judge(ending, POLICY, dice)
            (answer,) = self.world.run(ledger.settle([(ending, verdict)]))
            if not isinstance(answer, Moved):
                return answer
            ending = as_it_stands(ending, answer.now)
            claim, outcome = ending.claim, ending.outcome
        raise AssertionError("moved for ever")

    @precondition(lambda self: self.open)
    @rule(worker=st.sampled_from(WORKERS))
    def renew(self, worker: str) -> None:
        """A worker renews what it has in hand; what it hears of the rest is the truth."""
        mine = {id: claim for w, id, claim in self.open if w == worker}
        if not mine:
            return
        states = self.world.run(
            self.world.ledgers[worker].renew({id: claim.lease for id, claim in mine.items()})
        )
        for id, claim in mine.items():
            row = self.rows.get(id)
            if row is None:
                assert states[id] == "deleted"
            elif not self._holds(row, claim):
                assert states[id] == "lost"
            elif not row.live:
                assert states[id] == row.status
            else:
                assert states[id] == "renewed"
                row.lease_until = self.now + timedelta(seconds=model.LEASE)

    # --- what must hold ---------------------------------------------------------------------------

    @property
    def leases(self) -> dict[str, UUID]:
        found = self.world.conn.execute(
            "select id, lease from session_recalls where lease is not null"
        ).fetchall()
        return {row["id"]: row["lease"] for row in found}

    @invariant()
    def the_rows_are_as_the_model_says(self) -> None:
        if not hasattr(self, "rows"):
            return
        found = {
            row["id"]: row
            for row in self.world.conn.execute("select * from session_recalls").fetchall()
        }
        assert found.keys() == self.rows.keys()
        for id, row in self.rows.items():
            seen = found[id]
            told = {
                "status": row.status,
                "trigger_at": row.trigger,
                "interval_seconds": row.interval,
                "occurrence": row.occurrence,
                "rekey": row.rekey,
                "attempt": row.attempt,
                "deferrals": row.deferrals,
                "failures": row.failures,
                "last_outcome": row.last_outcome,
                "lease_until": row.lease_until,
                "run_reference": ACCEPTED.reference if row.accepted else None,
            }
            if row.status == "pending":
                told["slot"] = row.slot
            if row.called_before:
                told["missed"] = row.missed
            if row.live and not row.changed and not row.stands:
                seen["put_at"] = seen["named_at"] or seen["planned_at"]
                told["put_at"] = row.base
            if row.live and not row.changed:
                told["scheduled_for"] = row.scheduled
            if row.live:
                told |= {
                    "begun_at": row.begun,
                    "fired_at": row.extra,
                    "fires": row.extras,
                }
            assert {name: seen[name] for name in told} == told, (id, seen["reason"])
            assert (seen["leased_by"] if seen["lease"] is not None else None) == row.holder
            if row.live and row.holder is None and not (row.begun and row.changed and row.times):
                assert next(upcoming(Recall.of(seen), self.now), None) == row.ahead(), (
                    f"{id}: preview"
                )
            assert (seen["paused_at"] is not None) is row.paused


@pytest.mark.slow
def test_lives(world: World) -> None:
    """Whatever happens, in whatever order: each row is what DESIGN's rules say, and no key ever
    stands for two bodies."""
    deep = os.environ.get("RECALL_MODEL_EXAMPLES")
    _live(world, int(deep) if deep else 60)


def test_lives_with_several_pending(roomy_world: World) -> None:
    """The same where a session may have three pending recalls."""
    deep = os.environ.get("RECALL_MODEL_EXAMPLES")
    _live(roomy_world, int(deep) if deep else 20)


@pytest.mark.full
def test_many_lives_with_several_pending(roomy_world: World) -> None:
    """The same, for longer."""
    _live(roomy_world, 120)


@pytest.mark.full
def test_many_lives(world: World) -> None:
    """The same, for longer."""
    _live(world, 600)


def _live(world: World, examples: int) -> None:
    class Here(Lives):
        pass

    Here.world = world
    Here.TestCase.settings = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        # The same lives each time, so that what a change breaks is found in its own run.
        # RECALL_MODEL_EXAMPLES lives others.
        derandomize=bool(os.environ.get("RECALL_MODEL_FIXED"))
        or not os.environ.get("RECALL_MODEL_EXAMPLES"),
        suppress_health_check=list(HealthCheck),
        database=None,
        # A life is seconds long: what is found is shown as it was found. RECALL_MODEL_SHRINK takes
        # the time to make it small.
        phases=[Phase.generate, Phase.shrink]
        if os.environ.get("RECALL_MODEL_SHRINK")
        else [Phase.generate],
    )
    try:
        run_state_machine_as_test(Here, settings=Here.TestCase.settings)
    except BaseException as error:
        # What was found is lived once more, to be shown.
        error.add_note(f"Found in life {Here.begun - 1}.")
        raise
