"""What becomes of a recall whose schedule is edited: every edit, in every state, on every cadence.

`expected` is the rule, written once and from the contract; it knows nothing of the judge. Each cell
is a test: the real statements and a real worker that takes its steps by hand, on PostgreSQL's own
clock. docs/operations.md shows the same answers, put together where they are the same.

Times are told in minutes from the minute in which a cell begins. The recall is due 50 minutes from
it, or was 50 minutes before it, and recurs hourly; what is written instead is told at EDITS. Time
passes for a row by moving all of its times back by whole minutes, its cron expression with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio

from recall_worker import schema
from recall_worker.protocols.contract import metadata
from recall_worker.recall import (
    Accepted,
    Answered,
    Busy,
    Failed,
    Gone,
    Outcome,
    Refused,
    Unknown,
)

from .conftest import Connection, connected
from .support import postgres
from .support.application import CREATE_TABLES, RESCHEDULE, SKIP_NEXT
from .support.passing import let_pass
from .support.stepping import SteppedWorker
from .test_cli import operate

HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)

# --- what there is --------------------------------------------------------------------------------

CADENCES = ("once", "interval", "grid", "cron")
WAITING = ("waiting", "paused")
DUE = ("due",)
CALLED = ("deferred", "to be retried")
IN_A_RUN: Mapping[str, Outcome] = {
    "in a run, answered": Answered(200),
    "in a run, refused": Refused("no", 422),
    "paused in a run": Answered(200),
    "outside, in a run": Answered(200),
    "in a run, busy": Busy(409, 3600.0),
    "in a run, failed": Failed("the agent failed", 200),
}
"""The state, and how its run ends after the edit."""
RUN_IS_OVER = ("in a run, answered", "in a run, refused", "paused in a run", "outside, in a run")
OUTSIDE = ("outside, in a run", "outside, deferred")
STATES = (*WAITING, *DUE, *CALLED, *IN_A_RUN, "outside, deferred", "ended")
NEW_CRON, OLD_DUE, OLD_WAITING, END, NAMED = 40, -50, 50, 5, 17
"""Minutes: a moment of the expression that is written instead; when it was due, or will be; when it
ends, where an end is written; and the time to which it is moved."""
NEW_INTERVAL = 5400
KATHMANDU = timedelta(minutes=345)
"""From Kathmandu's clock to UTC's, all the year."""
RULE = ("call_type", "cadence", "interval_seconds", "cron", "time_zone")


@dataclass(frozen=True)
class Edit:
    title: str
    """As docs/operations.md has it."""
    cadences: tuple[str, ...]
    writes: Mapping[str, Any] = field(default_factory=dict)
    """Columns; a number stands for a time in minutes, `cron` for a moment of it."""
    before: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the row before."""
    acts: tuple[str, ...] = ("edit",)
    """What is done, in order: edit, skip, move (the application's SQL), reschedule, fire."""


RECURRING = CADENCES[1:]
EDITS = (
    Edit("`interval_seconds`", ("interval", "grid"), {"interval_seconds": NEW_INTERVAL}),
    Edit("a shorter `interval_seconds`", ("interval", "grid"), {"interval_seconds": 1200}),
    Edit("`cadence = 'interval'`", ("grid", "cron"), {"cadence": "interval"}),
    Edit("`cadence = 'grid'`", ("interval", "cron"), {"cadence": "grid"}),
    Edit("`cadence = 'cron'`, `cron`", ("interval", "grid"), {"cadence": "cron", "cron": NEW_CRON}),
    Edit("`cron`", ("cron",), {"cron": NEW_CRON}),
    Edit("`cron`, `interval_seconds = null`", ("cron",),
         {"cron": NEW_CRON, "interval_seconds": None}),
    Edit("`time_zone`", ("cron",), {"time_zone": "Asia/Kathmandu"}),
    Edit(
        "a rule and `trigger_at`",
        ("interval", "grid"),
        {"interval_seconds": NEW_INTERVAL, "trigger_at": NAMED},
    ),
    Edit("a rule and `trigger_at`", ("cron",), {"cron": NEW_CRON, "trigger_at": NAMED}),
    Edit("`call_type = 'once'`", RECURRING, {"call_type": "once"}),
    Edit(
        "`call_type = 'recurring'`, `interval_seconds`",
        ("once",),
        {"call_type": "recurring", "interval_seconds": 3600},
    ),
    Edit(
        "`call_type = 'recurring'`, `cadence = 'grid'`, `interval_seconds`",
        ("once",),
        {"call_type": "recurring", "interval_seconds": 3600, "cadence": "grid"},
    ),
    Edit(
        "`call_type = 'recurring'`, `cadence = 'cron'`, `cron`",
        ("once",),
        {"call_type": "recurring", "cadence": "cron", "cron": NEW_CRON},
    ),
    Edit("`until_at`, before the next", RECURRING, {"until_at": END}),
    Edit("`until_at` taken away", RECURRING, {"until_at": None}, {"until_at": END}),
    Edit("`times`: this one is the last", RECURRING, {"times": 1}),
    Edit("`times = 10`, it was 1", RECURRING, {"times": 10}, {"times": 1}),
    Edit("`failures_most = 1`", RECURRING, {"failures_most": 1}),
    Edit("`failures_most`, it was 1", RECURRING, {"failures_most": 3}, {"failures_most": 1}),
    Edit("`grace_seconds`, shorter than it is late", CADENCES, {"grace_seconds": 1800}),
    Edit(
        "`grace_seconds` taken away", CADENCES, {"grace_seconds": None}, {"grace_seconds": 1800}
    ),
    Edit("`jitter_seconds`", CADENCES, {"jitter_seconds": 600}),
    Edit("a column that its cadence does not use", ("once",), {"interval_seconds": 60, "times": 0}),
    Edit("a column that its cadence does not use", ("interval", "grid"), {"cron": NEW_CRON}),
    Edit("a column that its cadence does not use", ("cron",), {"interval_seconds": None}),
    Edit("the application's skip", RECURRING, acts=("skip",)),
    Edit("two of its skips", RECURRING, acts=("skip", "skip")),
    Edit("another time, by its SQL", CADENCES, acts=("move",)),
    Edit("the distance, then a skip", ("interval", "grid"), {"interval_seconds": NEW_INTERVAL},
         acts=("edit", "skip")),
    Edit("a skip, then the distance", ("interval", "grid"), {"interval_seconds": NEW_INTERVAL},
         acts=("skip", "edit")),
    Edit("`cron`, then a skip", ("cron",), {"cron": NEW_CRON}, acts=("edit", "skip")),
    Edit("a skip, then `cron`", ("cron",), {"cron": NEW_CRON}, acts=("skip", "edit")),
    Edit("`skip`", RECURRING, acts=("command skip",)),
    Edit("`reschedule`", CADENCES, acts=("command reschedule",)),
    Edit("`fire`", CADENCES, acts=("command fire",)),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    edit: Edit
    state: str
    cadence: str

    def __str__(self) -> str:
        return f"{self.edit.title} - {self.state} - {self.cadence}".replace("`", "")

    @property
    def called(self) -> bool:
        """Whether its occurrence was called and waits, or will wait, to be called again."""
        return self.state in CALLED or self.state in (
            "in a run, busy",
            "in a run, failed",
            "outside, deferred",
        )

    @property
    def owed(self) -> bool:
        return self.state in DUE or self.called

    @property
    def is_over(self) -> bool:
        """Whether its run ends the occurrence."""
        return self.state in RUN_IS_OVER

    @property
    def refused(self) -> bool:
        """Whether the command answers 1 and changes nothing."""
        [act, *_] = self.edit.acts
        if not act.startswith("command"):
            return False
        if self.state == "ended":
            return True
        if act == "command fire":
            return self.state in IN_A_RUN or self.state == "paused"
        return act == "command reschedule" and self.cadence == "once" and self.state in IN_A_RUN


CELLS = [
    Cell(edit, state, cadence)
    for edit in EDITS
    for cadence in edit.cadences
    for state in STATES
    if state not in OUTSIDE or cadence == "once"
]

# --- what must come of it -------------------------------------------------------------------------

Span = tuple[datetime, datetime]


@dataclass
class Clock:
    """When things happened: the earliest and the latest that it can have been."""

    zero: datetime
    """The minute in which the cell began."""
    trigger: datetime
    """`trigger_at` before the edit."""
    edited: Span
    ended: Span
    """The run that was open at the edit."""
    claimed: Span | None = None
    """What came next: its claim and its end."""
    done: Span | None = None

    def at(self, minutes: float) -> datetime:
        return self.zero + minutes * MINUTE


@dataclass(frozen=True)
class Over:
    status: str
    word: str = ""


@dataclass(frozen=True)
class Coming:
    key: str
    """Without the recall's id."""
    due: Span
    word: str
    """What decides when it comes, for people."""
    nominal: datetime | None = None
    """None: when it is due."""
    called: bool = False
    extra: bool = False

    @property
    def number(self) -> int:
        return int(self.key.split(".")[0])


@dataclass(frozen=True)
class Rule:
    """What the row says after the edit."""

    row: Mapping[str, Any]
    phase: datetime
    """A moment of its cron expression."""

    @property
    def recurring(self) -> bool:
        return bool(self.row["call_type"] == "recurring")

    @property
    def cadence(self) -> str:
        return str(self.row["cadence"])

    @property
    def step(self) -> timedelta:
        return HOUR if self.cadence == "cron" else self.row["interval_seconds"] * MINUTE / 60

    def moments(self, anchor: datetime, after: datetime) -> Iterator[datetime]:
        """On grid and cron, those after the anchor (the last moment) and after an instant."""
        start = self.phase if self.cadence == "cron" else anchor
        moment = start + self.step * ((max(anchor, after) - start) // self.step + 1)
        while True:
            yield moment
            moment += self.step

    def nth(self, n: int, anchor: datetime, after: datetime) -> datetime:
        return next(itertools.islice(self.moments(anchor, after), n - 1, None))


def row_before(cell: Cell) -> dict[str, Any]:
    before = dict(cell.edit.before)
    if "grace_seconds" in before and cell.state not in DUE:
        # Such that it got into its state.
        before["grace_seconds"] = 2 * before["grace_seconds"]
    return {
        "call_type": "once" if cell.cadence == "once" else "recurring",
        "cadence": "interval" if cell.cadence == "once" else cell.cadence,
        "interval_seconds": None if cell.cadence == "once" else 3600,
        "cron": due_minute(cell) if cell.cadence == "cron" else None,
        "time_zone": None,
        "until_at": None,
        "times": None,
        "failures_most": None,
        "grace_seconds": None,
        "jitter_seconds": None,
        **before,
    }


def due_minute(cell: Cell) -> int:
    return OLD_WAITING if cell.state in (*WAITING, "ended") else OLD_DUE


def rule_after(cell: Cell, clock: Clock) -> Rule:
    row = {**row_before(cell), **cell.edit.writes}
    zone = KATHMANDU if row["time_zone"] is not None else timedelta()
    return Rule(row, clock.at(row["cron"] or 0) - zone)


def expected(cell: Cell, clock: Clock) -> Over | Coming:
    """What comes next."""
    rule, acts = rule_after(cell, clock), cell.edit.acts
    before = row_before(cell)
    writes = cell.edit.writes
    nominal = clock.at(due_minute(cell))
    if cell.state == "ended":
        return Over("cancelled", "nothing")
    if acts == ("command fire",) and not cell.refused:
        if cell.cadence == "once" or cell.owed:
            early = cell.state in WAITING
            return Coming("1", clock.edited, "now", None if early else nominal, called=cell.called)
        return Coming("1.f1", clock.edited, "now, an extra run", extra=True)
    new_rule = any(name in writes and writes[name] != before[name] for name in RULE)
    # A column that the cadence does not use decides nothing.
    new_rule = new_rule and not cell.edit.title.startswith("a column")
    since = clock.edited[1] if new_rule else datetime.min.replace(tzinfo=UTC)
    skips = sum(act in ("skip", "command skip") for act in acts)
    moved = "move" in acts
    named = "trigger_at" in writes or (acts == ("command reschedule",) and not cell.refused)
    at_named = (
        (clock.at(NAMED), clock.at(NAMED))
        if acts != ("command reschedule",)
        else tuple(instant + NAMED * MINUTE for instant in clock.edited)
    )
    if cell.is_over:
        good = cell.state != "in a run, refused"
        status = "fired" if good else "failed"
        if not good and rule.row["failures_most"] == 1 and rule.recurring:
            return Over("failed")
        if moved or named:
            return ends(cell, clock, Coming("2", at_named, "the time named"), status)  # type: ignore[arg-type]
        if not rule.recurring:
            return Over(status)
        number = 2 + skips
        coming = after_a_run(rule, number, nominal, since, clock.ended, 1 + skips)
        return ends(cell, clock, coming, status)
    # The occurrence is still to come.
    rekeys = (cell.state == "in a run, failed") + (
        cell.called and writes.get("call_type", before["call_type"]) != before["call_type"]
    )
    due: Span = (clock.trigger, clock.trigger)
    if cell.state == "in a run, busy":
        due = (clock.ended[0] + HOUR, clock.ended[1] + HOUR)
    elif cell.state == "in a run, failed":
        due = (clock.ended[0], clock.ended[1] + timedelta(seconds=5))
    key = "1" + (f".{rekeys}" if rekeys else "")
    coming = Coming(key, due, "as planned", nominal, called=cell.called)
    if moved:
        coming = Coming("2" if cell.called else "1", at_named, "the time named")  # type: ignore[arg-type]
    elif named:
        coming = Coming("1.1" if cell.called else "1", at_named, "the time named")  # type: ignore[arg-type]
    elif (cell.state in WAITING or put_off(cell)) and new_rule and planned_anew(cell):
        if rule.cadence == "cron":
            moment = rule.nth(1 + skips, clock.edited[1], clock.edited[1])
            due = (moment, moment)
        else:
            due = shifted(clock.edited, rule.step * (1 + skips))
        coming = Coming(str(1 + skips), due, "new rule")
    elif skips:
        coming = skipped(cell, clock, rule, skips, since)
    late = clock.edited[0] - nominal
    grace = rule.row["grace_seconds"]
    if (
        cell.state == "due"
        and acts == ("edit",)
        and grace is not None
        and late > grace * MINUTE / 60
    ):
        if not rule.recurring:
            return Over("failed", "misfired, failed")
        moment = nominal + HOUR
        return Coming("2", (moment, moment), "misfired; the next one")
    return ends(cell, clock, coming, "fired")


def put_off(cell: Cell) -> bool:
    """Whether it was due, and a skip before the edit made it one that waits."""
    return cell.state in DUE and cell.edit.acts == ("skip", "edit")


def planned_anew(cell: Cell) -> bool:
    return any(name in cell.edit.writes for name in ("cadence", "cron", "time_zone"))


def shifted(span: Span, by: timedelta) -> Span:
    return span[0] + by, span[1] + by


def skipped(cell: Cell, clock: Clock, rule: Rule, skips: int, since: datetime) -> Coming:
    """A skip leaves out the first of what is to come: the occurrence that waits or is owed."""
    nominal = clock.at(due_minute(cell))
    # In a run, the application adds to the time that the run has; else to what the row shows.
    trigger = nominal if cell.state in IN_A_RUN else clock.trigger
    edited_first = cell.edit.acts[0] == "edit"
    step = rule.step if edited_first else HOUR
    due = trigger + step * skips
    number = str(1 + skips)
    if rule.cadence == "cron":
        moment = rule.nth(skips, nominal, since)
        return Coming(number, (moment, moment), "the next one")
    if rule.cadence == "grid":
        # Skipped while it was deferred, and edited then: nobody knows any more where on the old
        # grid that was, but when it is due.
        lost = cell.state in CALLED and cell.edit.acts == ("skip", "edit")
        on_grid = due if lost else nominal + step * skips
        return Coming(number, (due, due), "the next one", on_grid)
    return Coming(number, (due, due), "the next one")


def after_a_run(
    rule: Rule, number: int, nominal: datetime, since: datetime, ended: Span, n: int
) -> Coming:
    """What follows an occurrence that is over."""
    jitter = timedelta(seconds=rule.row["jitter_seconds"] or 0)
    if rule.cadence == "interval":
        early, late = shifted(ended, rule.step * n)
        return Coming(str(number), (early, late + jitter), "by the rule")
    moment = rule.nth(n, nominal, since)
    return Coming(str(number), (moment, moment + jitter), "by the rule", moment)


def ends(cell: Cell, clock: Clock, coming: Coming, status: str) -> Over | Coming:
    """An occurrence that was not called yet does not come past the recall's end."""
    row = rule_after(cell, clock).row
    if row["call_type"] != "recurring" or coming.called:
        return coming
    past = row["times"] is not None and coming.number > row["times"]
    if row["until_at"] is not None:
        past = past or (coming.nominal or coming.due[0]) > clock.at(row["until_at"])
    return Over(status) if past else coming


def missed(cell: Cell, clock: Clock, coming: Coming) -> int:
    """The moments of the rule after its nominal time, up to its claim."""
    rule = rule_after(cell, clock)
    if not rule.recurring or coming.called or coming.extra:
        return 0
    assert clock.claimed is not None
    nominal = coming.nominal or coming.due[0]
    new_rule = any(name in cell.edit.writes for name in RULE)
    since = max(nominal, clock.edited[1]) if new_rule else nominal
    last, anchor = clock.claimed[0], since if rule.cadence == "cron" else nominal
    return len([*itertools.takewhile(lambda m: m <= last, rule.moments(anchor, since))])


def then(cell: Cell, clock: Clock, first: Coming, seen: datetime) -> Over | Coming:
    """What follows that one, once it was answered. `seen`: the nominal time that its call had."""
    assert clock.done is not None
    rule = rule_after(cell, clock)
    if first.extra:
        nominal = clock.at(due_minute(cell))
        if rule.cadence == "interval":
            return Coming("1", shifted(clock.done, HOUR), "an interval after it")
        return Coming("1", (nominal, nominal), "as planned")
    if not rule.recurring:
        return Over("fired")
    new_rule = any(name in cell.edit.writes for name in RULE)
    since = clock.edited[1] if new_rule else seen
    n = 1 + missed(cell, clock, first)
    if rule.cadence == "cron":
        following = after_a_run(rule, first.number + 1, seen, max(seen, since), clock.done, n)
    else:
        following = after_a_run(
            rule, first.number + 1, seen, since, clock.done, n if rule.cadence == "grid" else 1
        )
    return ends(cell, clock, following, "fired")


# --- for docs/operations.md -----------------------------------------------------------------------

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "waiting": WAITING,
    "due": DUE,
    "called, waits again": CALLED,
    "in a run that ends it": ("in a run, answered", "paused in a run", "in a run, refused"),
    "in a run that does not": ("in a run, busy", "in a run, failed"),
}
"""The columns of the table: states whose answers are the same, but for the key of what failed."""


def table() -> str:
    """Edits as rows; edits and cadences with the same answers share one."""
    rows: dict[tuple[str, ...], list[str]] = {}
    titles: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for edit in EDITS:
        for cadence in edit.cadences:
            cells = tuple(_together(edit, states, cadence) for states in COLUMNS.values())
            titles.setdefault(edit.title, {}).setdefault(cells, []).append(cadence)
    for title, found in titles.items():
        for cells, cadences in found.items():
            rows.setdefault((", ".join(cadences), *cells), []).append(title)
    lines = ["| edit | cadence | " + " | ".join(COLUMNS) + " |", "| --- |" * 2 + " --- |" * 5]
    lines += [f"| {'; '.join(named)} | {' | '.join(row)} |" for row, named in rows.items()]
    return "\n".join(lines).replace("| --- || --- |", "| --- | --- |") + "\n"


def _together(edit: Edit, states: tuple[str, ...], cadence: str) -> str:
    zero = datetime(2027, 1, 1, tzinfo=UTC)
    trigger = zero + OLD_WAITING * MINUTE
    clock = Clock(zero, trigger, (zero, zero), (zero, zero))
    texts = []
    for state in states:
        cell = Cell(edit, state, cadence)
        coming = expected(cell, clock)
        if cell.refused:
            text = "no"
        elif isinstance(coming, Over):
            text = coming.word or coming.status
        else:
            key = coming.key
            if state == "in a run, failed" and coming.called:
                # One more than otherwise.
                again = int(key.partition(".")[2] or "0") - 1
                key = "1" + (f".{again}" if again else "")
            text = f"`:{key}` {coming.word}"
        texts.append((state, text))
    found = list(dict.fromkeys(text for _, text in texts))
    if len(found) == 2 and texts[-1][0] == "in a run, refused" and texts[-1][1] == found[1]:
        return f"{found[0]}; if refused: {found[1]}"
    if len(found) == 2 and states == WAITING:
        return f"{found[0]}; if paused: {found[1]}"
    assert len(found) == 1, (edit.title, cadence, texts)
    return found[0]


# --- the stage ------------------------------------------------------------------------------------

INSERT = """
insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds,
    additional_context_message, status, created_at, updated_at, cadence, cron, time_zone, until_at,
    times, failures_most, grace_seconds, jitter_seconds)
values (%(id)s, %(id)s, %(call_type)s, %(trigger_at)s, %(interval_seconds)s, 'look', 'pending',
    now(), now(), %(cadence)s, %(cron)s, %(time_zone)s, %(until_at)s, %(times)s, %(failures_most)s,
    %(grace_seconds)s, %(jitter_seconds)s)
"""
NEWER = """
insert into session_recalls (id, session_id, call_type, trigger_at, additional_context_message,
    status, created_at, updated_at)
values (%(newer)s, %(id)s, 'once', now() + interval '1 year', 'and then', 'pending', now(), now())
"""


@dataclass
class Stage:
    dsn: str
    db: Connection
    worker: SteppedWorker
    numbers: itertools.count[int] = field(default_factory=itertools.count)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(server: str, template: str) -> AsyncIterator[Stage]:
    with postgres.database(server, template) as dsn:
        async with connected(dsn) as db, SteppedWorker(dsn, busy_delay=3600.0) as worker:
            yield Stage(dsn, db, worker)
            assert [
                event
                for event in worker.told.all
                if event[0] in ("worker.error", "recall.stranded", "lease.lost", "lease.violated")
            ] == []


@dataclass
class Scene:
    """One recall, and the time that has passed for it."""

    stage: Stage
    id: str
    zero: datetime
    passed: timedelta = timedelta()

    @classmethod
    async def begin(cls, stage: Stage) -> Scene:
        scene = cls(stage, f"r{next(stage.numbers)}", datetime.min)
        await stage.db.execute("insert into sessions values (%s, 'ann')", [scene.id])
        scene.zero = (await scene.now()).replace(second=0, microsecond=0)
        return scene

    async def end(self) -> None:
        if self.id in self.stage.worker.api.open:
            await self.stage.worker.answer(self.id, Answered(200))
        await self.stage.db.execute("delete from sessions where id = %s", [self.id])

    async def write(self, query: str, values: Any = ()) -> int:
        return (await self.stage.db.execute(query.encode(), values)).rowcount

    async def now(self) -> datetime:
        """As the recall has it: with the time that has passed for it."""
        [found] = await (await self.stage.db.execute("select clock_timestamp() as at")).fetchall()
        instant: datetime = found["at"]
        return instant.astimezone(UTC) + self.passed

    async def row(self) -> dict[str, Any]:
        query = b"select * from session_recalls where id = %s"
        [row] = await (await self.stage.db.execute(query, [self.id])).fetchall()
        return {
            name: value.astimezone(UTC) + self.passed if isinstance(value, datetime) else value
            for name, value in row.items()
        }

    def columns(self, written: Mapping[str, Any]) -> dict[str, Any]:
        """Minutes as times, and as expressions."""
        found = dict(written)
        for name in ("trigger_at", "until_at"):
            if found.get(name) is not None:
                found[name] = self.zero + found[name] * MINUTE - self.passed
        if found.get("cron") is not None:
            minute = (self.zero + found["cron"] * MINUTE - self.passed).minute
            found["cron"] = f"{minute} * * * *"
        return found

    async def put(self, row: Mapping[str, Any]) -> None:
        await self.write(INSERT, {**self.columns(row), "id": self.id})

    async def edit(self, written: Mapping[str, Any]) -> int:
        """As an application's own SQL does."""
        columns = self.columns(written)
        names = ", ".join(f"{name} = %({name})s" for name in columns)
        query = f"update session_recalls set {names}, updated_at = now() where id = %(id)s"
        return await self.write(query, {**columns, "id": self.id})

    async def pass_until(self, due: datetime) -> None:
        """Let time pass for this recall until it is due, in whole minutes."""
        left = due - await self.now()
        if left <= timedelta():
            return
        minutes = -(-left // MINUTE)
        await let_pass(self.stage.db, self.id, minutes)
        self.passed += minutes * MINUTE

    async def command(self, *words: str) -> int:
        return (await asyncio.to_thread(operate, self.stage.dsn, *words)).status

    @property
    def calls(self) -> list[dict[str, Any]]:
        """What each request said of the recall."""
        return [
            metadata(call.claim) for call in self.stage.worker.api.calls if call.claim.id == self.id
        ]

    async def bring(self, cell: Cell) -> None:
        """Into the cell's state, before the edit."""
        worker, state = self.stage.worker, cell.state
        await self.put({**row_before(cell), "trigger_at": due_minute(cell)})
        if cell.called or state in IN_A_RUN:
            await worker.step()
        if state in OUTSIDE:
            await self.write(NEWER, {"id": self.id, "newer": f"{self.id}-newer"})
        if state in ("deferred", "outside, deferred"):
            await worker.answer(self.id, Busy(409, 3600.0))
        elif state == "to be retried":
            await worker.answer(self.id, Unknown("silence"))
        elif state.startswith("paused"):
            await self.write(
                "update session_recalls set paused_at = now() where id = %s", [self.id]
            )
        elif state == "ended":
            await self.write(
                "update session_recalls set status = 'cancelled' where id = %s", [self.id]
            )

    async def act(self, act: str, cell: Cell) -> None:
        match act:
            case "edit":
                assert await self.edit(cell.edit.writes) == 1
            case "skip":
                # The application skips by session, what is pending.
                query = SKIP_NEXT.replace("$1", "%s")
                assert await self.write(query, [self.id]) == (cell.state != "ended")
            case "move":
                query = RESCHEDULE.replace("$1", "%(id)s").replace("$2", "%(at)s")
                at = self.zero + NAMED * MINUTE
                assert await self.write(query, {"id": self.id, "at": at}) == 1
            case "command reschedule":
                words = ("reschedule", self.id, "--in", f"{NAMED}m")
                assert await self.command(*words) == cell.refused
            case "command skip" | "command fire":
                assert await self.command(act.split()[1], self.id) == cell.refused
            case _:
                raise ValueError(act)


# --- the cells ------------------------------------------------------------------------------------


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("cell", CELLS, ids=str)
async def test_an_edit_in_a_state(cell: Cell, stage: Stage) -> None:
    """The cell: under which key the recall comes next, when, for which nominal time and how many
    missed ones; and when it comes after that."""
    scene = await Scene.begin(stage)
    try:
        await scene.bring(cell)
        trigger = (await scene.row())["trigger_at"]
        before = len(scene.calls)
        edited = await scene.now()
        for act in cell.edit.acts:
            await scene.act(act, cell)
        clock = Clock(scene.zero, trigger, (edited, await scene.now()), (edited, edited))
        if cell.state in IN_A_RUN:
            await stage.worker.answer(scene.id, IN_A_RUN[cell.state])
            clock.ended = (clock.edited[1], await scene.now())
        coming = await comes(scene, cell, clock, expected(cell, clock), before)
        if coming is not None:
            nominal = datetime.fromisoformat(str(scene.calls[-1]["recall_scheduled_for"]))
            began = await scene.now()
            await stage.worker.answer(scene.id, Answered(200))
            clock.done = (began, await scene.now())
            following = then(cell, clock, coming, nominal + scene.passed)
            if isinstance(following, Over):
                assert (await scene.row())["status"] == following.status
            else:
                waits(await scene.row(), following)
    finally:
        await scene.end()


def waits(row: Mapping[str, Any], coming: Coming) -> None:
    """The row, once a worker has planned it, waits for that."""
    assert row["status"] in ("pending", "running"), row["reason"]
    early, late = coming.due
    assert early <= row["trigger_at"] <= late, (early, row["trigger_at"], late)


async def comes(
    scene: Scene, cell: Cell, clock: Clock, coming: Over | Coming, before: int
) -> Coming | None:
    """Let time pass until the recall comes, or does not; what it is that came."""
    worker = scene.stage.worker
    row = await scene.row()
    if isinstance(coming, Over) and cell.state == "ended":
        assert row["status"] == coming.status
        await scene.pass_until(row["trigger_at"])
        await worker.step()
        assert len(scene.calls) == before
        return None
    if row["status"] in ("pending", "running"):
        # A worker plans what is to be planned; nothing that is early is called.
        # What is to be retried is due at a random time within seconds.
        early = isinstance(coming, Coming) and coming.due[0] > await scene.now() + MINUTE
        if early or cell.state.startswith("paused"):
            await worker.step()
            assert len(scene.calls) == before
            row = await scene.row()
        if isinstance(coming, Coming) and not coming.extra:
            assert row["status"] == ("running" if cell.state in OUTSIDE else "pending")
            if early:
                waits(row, coming)
        await scene.pass_until(row["trigger_at"] if not _extra(coming) else await scene.now())
        if cell.state.startswith("paused"):
            await worker.step()
            assert len(scene.calls) == before, "paused"
            await scene.write(
                "update session_recalls set paused_at = null where id = %s", [scene.id]
            )
        claimed = await scene.now()
        await worker.step()
        clock.claimed = (claimed, await scene.now())
    if isinstance(coming, Over):
        assert len(scene.calls) == before
        assert (await scene.row())["status"] == coming.status, (await scene.row())["reason"]
        return None
    if coming.word.startswith("misfired"):
        waits(await scene.row(), coming)
        await scene.pass_until((await scene.row())["trigger_at"])
        claimed = await scene.now()
        await worker.step()
        clock.claimed = (claimed, await scene.now())
    assert [call["recall_key"] for call in scene.calls[before:]] == [f"{scene.id}:{coming.key}"]
    call = scene.calls[-1]
    nominal = datetime.fromisoformat(str(call["recall_scheduled_for"])) + scene.passed
    span = coming.due if coming.nominal is None else (coming.nominal, coming.nominal)
    assert span[0] <= nominal <= span[1], (span, nominal)
    assert call["recall_missed"] == missed(cell, clock, coming)
    return dataclasses.replace(coming, nominal=nominal)


def _extra(coming: Over | Coming) -> bool:
    return isinstance(coming, Coming) and coming.extra


# --- beside the table -----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def recall(
    stage: Stage, state: str, cadence: str, before: Mapping[str, Any] | None = None
) -> AsyncIterator[Scene]:
    """A recall in a state, to be edited."""
    scene = await Scene.begin(stage)
    try:
        await scene.bring(Cell(Edit("", (cadence,), before=before or {}), state, cadence))
        yield scene
    finally:
        await scene.end()


async def next_call(scene: Scene) -> tuple[str, datetime]:
    """Time passes until the recall comes: its key and its nominal time."""
    await scene.stage.worker.step()
    await scene.pass_until((await scene.row())["trigger_at"])
    await scene.stage.worker.step()
    assert scene.calls, await scene.row()
    call = scene.calls[-1]
    nominal = datetime.fromisoformat(str(call["recall_scheduled_for"]))
    return str(call["recall_key"]).removeprefix(f"{scene.id}:"), nominal + scene.passed


def minutes(scene: Scene, instant: datetime) -> float:
    return (instant - scene.zero) / MINUTE


SETTLE_WAITS = (
    "select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("first", ["edit", "lock"])
@pytest.mark.parametrize(
    ("cadence", "written", "occurrence"),
    [
        ("interval", {"times": 10}, 2),
        ("grid", {"interval_seconds": NEW_INTERVAL, "times": None}, 2),
        ("cron", {"cron": NEW_CRON, "times": None}, 2),
        ("interval", {"call_type": "once"}, 1),
    ],
)
async def test_an_edit_that_is_not_committed_when_the_run_ends(
    first: str, cadence: str, written: dict[str, Any], occurrence: int, stage: Stage
) -> None:
    """A transaction that edits the row, or locks it and edits it later, is open when the run ends:
    the settle waits for it, and judges by what it wrote."""
    async with recall(stage, "in a run, answered", cadence, {"times": 1}) as scene:
        async with connected(stage.dsn) as other:
            editor = Scene(dataclasses.replace(stage, db=other), scene.id, scene.zero)
            async with other.transaction():
                if first == "lock":
                    await editor.write(
                        "select 1 from session_recalls where id = %s for update", [scene.id]
                    )
                else:
                    await editor.edit(written)
                answering = asyncio.create_task(stage.worker.answer(scene.id, Answered(200)))
                async with asyncio.timeout(20):
                    while not await (await stage.db.execute(SETTLE_WAITS)).fetchall():
                        await stage.db.execute("select pg_sleep(0.003)")
                if first == "lock":
                    await editor.edit(written)
            await answering
        row = await scene.row()
        status = "pending" if occurrence == 2 else "fired"
        assert (row["status"], row["occurrence"]) == (status, occurrence), row["reason"]
        if "cron" in written or "interval_seconds" in written:
            assert minutes(scene, row["trigger_at"]) == NEW_CRON


ZONE, OTHER = {"time_zone": "Mars/Olympus"}, {"time_zone": "Mars/Valles"}
UNCALLED: Mapping[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "expired": ("interval", {"until_at": -51}, {"until_at": None}, {"until_at": -52}),
    "misfired": ("grid", {"grace_seconds": 1800}, {"grace_seconds": None}, {"grace_seconds": 60}),
    "failed": ("once", {"grace_seconds": 60}, {"grace_seconds": 7200}, {"grace_seconds": 1}),
    "malformed": ("cron", ZONE, {"time_zone": None}, OTHER),
}
"""How it is decided: the cadence, the columns before, and an edit that takes that away, and one
that does not."""


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("outcome", UNCALLED)
@pytest.mark.parametrize("saved", [True, False], ids=["saved", "the same"])
async def test_an_edit_between_a_claim_and_a_decision_without_a_call(
    outcome: str, saved: bool, stage: Stage
) -> None:
    """Claimed, found to be past its end, too late or malformed, and edited before that is written:
    it is decided again by what stands there then. What was due is still run."""
    cadence, before, saves, does_not = UNCALLED[outcome]
    async with recall(stage, "due", cadence, before) as scene:
        async with stage.worker.settling_later():
            await stage.worker.dispatch()
            assert (await scene.row())["lease"] is not None and scene.calls == []
            await scene.edit(saves if saved else does_not)
        await stage.worker.step()
        async with asyncio.timeout(20):
            while (await scene.row())["lease"] is not None and not scene.calls:
                await stage.worker.step()
        if saved:
            assert [call["recall_key"] for call in scene.calls] == [f"{scene.id}:1"]
            nominal = datetime.fromisoformat(str(scene.calls[0]["recall_scheduled_for"]))
            assert minutes(scene, nominal) == OLD_DUE
        else:
            row = await scene.row()
            assert scene.calls == []
            if outcome == "misfired":
                assert (row["status"], row["occurrence"]) == ("pending", 2)
            else:
                assert row["status"] == ("fired" if outcome == "expired" else "failed")


EDITED_AGAIN: Mapping[str, tuple[str, list[dict[str, Any] | str], str, float]] = {
    "cron twice": ("cron", [{"cron": 20}, {"cron": NEW_CRON}], "1", NEW_CRON),
    "cron and back": ("cron", [{"cron": 20}, {"cron": OLD_WAITING}], "1", OLD_WAITING),
    "zone and cron": ("cron", [{"time_zone": "UTC"}, {"cron": NEW_CRON}], "1", NEW_CRON),
    "interval twice": (
        "interval",
        [{"interval_seconds": 5400}, {"interval_seconds": 1800}],
        "1",
        OLD_WAITING,
    ),
    "grid to cron": (
        "grid",
        [{"interval_seconds": 5400}, {"cadence": "cron", "cron": NEW_CRON}],
        "1",
        NEW_CRON,
    ),
    "there and back": (
        "cron",
        [{"cadence": "grid"}, {"cadence": "cron", "cron": NEW_CRON}],
        "1",
        NEW_CRON,
    ),
    "edits around a skip": ("cron", [{"cron": 20}, "skip", {"cron": NEW_CRON}], "2", NEW_CRON + 60),
    "skips around an edit": ("cron", ["skip", {"cron": NEW_CRON}, "skip"], "3", NEW_CRON + 120),
    "a skip and two edits": (
        "cron",
        ["skip", {"cron": 20}, {"cron": NEW_CRON}],
        "2",
        NEW_CRON + 60,
    ),
    "two skips, cron to grid to cron": (
        "cron",
        ["skip", "skip", {"cadence": "grid"}, {"cadence": "cron", "cron": NEW_CRON}],
        "3",
        NEW_CRON,
    ),
    "skips around a distance": (
        "grid",
        ["skip", {"interval_seconds": 5400}, "skip"],
        "3",
        OLD_WAITING + 60 + 90,
    ),
    "a time, then a skip, grid": ("grid", ["reschedule", "skip"], "2", NAMED + 60),
    "a time, then a skip, interval": ("interval", ["reschedule", "skip"], "2", NAMED + 60),
    "a time, then a skip, cron": ("cron", ["reschedule", "skip"], "2", OLD_WAITING),
    "a skip, then a time, grid": ("grid", ["skip", "reschedule"], "2", NAMED),
    "a skip, then a time, cron": ("cron", ["skip", "reschedule"], "2", NAMED),
    "a time, then an expression": ("cron", ["reschedule", {"cron": NEW_CRON}], "1", NEW_CRON),
    "two times": ("grid", ["reschedule", "reschedule"], "1", NAMED),
    "a time, then another by SQL": ("cron", ["reschedule", "move"], "1", NAMED),
}
"""The cadence, what is done in turn, the key and the minute of what comes."""


LEFT_OUT = {
    "edits around a skip": NEW_CRON,
    "skips around an edit": NEW_CRON + 60,
    "a skip and two edits": NEW_CRON,
}
"""Where a worker has left a skipped moment out already, only its number stays left out: the moment
that waits is the first one by the new rule. The minute of what comes then."""


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("planned", [False, True], ids=["at once", "a worker between"])
@pytest.mark.parametrize("name", EDITED_AGAIN)
async def test_an_edit_of_an_edit(name: str, planned: bool, stage: Stage) -> None:
    """Edits, skips and named times one after the other, while it waits: each counts once."""
    cadence, acts, key, minute = EDITED_AGAIN[name]
    if planned and name in LEFT_OUT:
        minute = LEFT_OUT[name]
    async with recall(stage, "waiting", cadence) as scene:
        for act in acts:
            if isinstance(act, dict):
                assert await scene.edit(act) == 1
            else:
                act = "command reschedule" if act == "reschedule" else act
                await scene.act(act, Cell(Edit("", (cadence,), acts=(act,)), "waiting", cadence))
            if planned:
                await stage.worker.step()
        found, nominal = await next_call(scene)
        assert found == key
        # A time in so many minutes counts from when it was named.
        assert minute <= minutes(scene, nominal) < minute + (1.1 if "reschedule" in acts else 0.001)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("cadence", "written", "ends", "minute"),
    [
        ("grid", {"interval_seconds": NEW_INTERVAL}, "pending", NEW_CRON),
        ("cron", {"cron": NEW_CRON}, "pending", NEW_CRON),
        ("cron", {"times": 1}, "fired", None),
        ("grid", {"call_type": "once"}, "fired", None),
        ("grid", {"trigger_at": NAMED, "interval_seconds": NEW_INTERVAL}, "pending", NAMED),
    ],
)
async def test_an_edit_while_an_accepted_run_is_polled(
    cadence: str, written: dict[str, Any], ends: str, minute: int | None, stage: Stage
) -> None:
    """The run goes on at the API and is followed to its end; then the row is judged as it
    stands."""
    async with recall(stage, "in a run, answered", cadence) as scene:
        await stage.worker.answer(scene.id, Accepted("/runs/1", 202))
        assert (await scene.row())["run_reference"] == "/runs/1"
        await scene.edit(written)
        await stage.worker.step()
        await stage.worker.answer(scene.id, Answered(200))
        row = await scene.row()
        assert row["status"] == ends
        if minute is not None:
            assert (row["occurrence"], minutes(scene, row["trigger_at"])) == (2, minute)
        assert len(scene.calls) == 1


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("cadence", "written", "key", "ends", "minute"),
    [
        ("interval", {"times": 10}, "1", "pending", None),
        ("grid", {"interval_seconds": NEW_INTERVAL, "times": None}, "1", "pending", NEW_CRON),
        ("cron", {"cron": NEW_CRON, "times": None}, "1", "pending", NEW_CRON),
        ("cron", {"call_type": "once"}, "1.1", "fired", None),
        ("cron", {"trigger_at": NAMED, "cron": NEW_CRON, "times": None}, "1.1", "pending", None),
    ],
)
async def test_an_edit_in_a_dead_workers_run(
    cadence: str, written: dict[str, Any], key: str, ends: str, minute: int | None, stage: Stage
) -> None:
    """The worker dies, the row is edited, the lease ends: another worker takes the run up under its
    key, and what follows it follows the edit. A named time stands: at it the recall comes again."""
    async with recall(stage, "ended", cadence, {"times": 1}) as scene:
        await scene.write("delete from session_recalls where id = %s", [scene.id])
        async with SteppedWorker(stage.dsn, "dead", lease=3.0) as dead:
            doomed = Scene(dataclasses.replace(stage, worker=dead), scene.id, scene.zero)
            await doomed.bring(
                Cell(Edit("", (cadence,), before={"times": 1}), "in a run, answered", cadence)
            )
            assert len(doomed.calls) == 1
            await dead.die()
        await scene.edit(written)
        await let_pass(stage.db, scene.id, 1)
        scene.passed += MINUTE
        # PostgreSQL may have just started: a third of a lease after that, leases are taken up.
        async with SteppedWorker(stage.dsn, "heir", lease=3.0) as heir, asyncio.timeout(60):
            scene.stage = dataclasses.replace(stage, worker=heir)
            while not scene.calls and (await scene.row())["lease"] is not None:
                await stage.db.execute("select pg_sleep(0.01)")
                await heir.step()
            if "trigger_at" in written:
                await next_call(scene)
            assert [call["recall_key"] for call in scene.calls] == [f"{scene.id}:{key}"]
            await heir.answer(scene.id, Answered(200))
        scene.stage = stage
        row = await scene.row()
        assert row["status"] == ends, row["reason"]
        if minute is not None:
            assert minutes(scene, row["trigger_at"]) == minute


# --- extra runs -----------------------------------------------------------------------------------


FIRED: Mapping[str, tuple[Outcome, list[str], str, int]] = {
    "answered": (Answered(200), ["1.f1"], "pending", OLD_WAITING),
    "refused": (Refused("no", 422), ["1.f1"], "pending", OLD_WAITING),
    "failed": (Failed("the agent failed", 200), ["1.f1", "1.f2"], "pending", OLD_WAITING),
    "unknown": (Unknown("silence"), ["1.f1", "1.f1"], "pending", OLD_WAITING),
    "busy until then": (Busy(409, 3600.0), ["1.f1"], "pending", OLD_WAITING),
    "busy": (Busy(409, 60.0), ["1.f1", "1.f1"], "pending", OLD_WAITING),
    "gone": (Gone(404), ["1.f1"], "cancelled", OLD_WAITING),
}
"""How an extra run ends: its calls, and the row then."""


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("cadence", ["grid", "cron"])
@pytest.mark.parametrize("name", FIRED)
async def test_how_an_extra_run_ends(name: str, cadence: str, stage: Stage) -> None:
    """Whatever becomes of it, the planned occurrence, its number, and how many there may be, stay;
    only a session that is gone ends the recall."""
    outcome, keys, status, minute = FIRED[name]
    async with recall(stage, "waiting", cadence, {"times": 1, "failures_most": 1}) as scene:
        assert await scene.command("fire", scene.id) == 0
        await stage.worker.step()
        assert await scene.command("fire", scene.id) == 1, "it is in a run"
        await stage.worker.answer(scene.id, outcome)
        if len(keys) == 2:
            await let_pass(stage.db, scene.id, 2)
            scene.passed += 2 * MINUTE
            await stage.worker.step()
            await stage.worker.answer(scene.id, Answered(200))
        assert [call["recall_key"] for call in scene.calls] == [f"{scene.id}:{k}" for k in keys]
        assert {call["recall_missed"] for call in scene.calls} == {0}
        row = await scene.row()
        assert (row["status"], row["occurrence"], row["failures"]) == (status, 1, 0)
        assert minutes(scene, row["trigger_at"]) == minute and row["lease_until"] is None
        if status == "pending":
            assert await next_call(scene) == ("1", scene.zero + minute * MINUTE)
            await stage.worker.answer(scene.id, Answered(200))
            assert (await scene.row())["status"] == "fired"


IN_AN_EXTRA_RUN: Mapping[str, tuple[str, dict[str, Any] | str, str, float]] = {
    "cron": ("cron", {"cron": NEW_CRON}, "1", NEW_CRON),
    "grid": ("grid", {"interval_seconds": NEW_INTERVAL}, "1", OLD_WAITING),
    "skip, cron": ("cron", "skip", "2", OLD_WAITING + 60),
    "skip, grid": ("grid", "skip", "2", OLD_WAITING + 60),
    "move, grid": ("grid", "move", "1", NAMED),
    "move, interval": ("interval", "move", "1", NAMED),
    "move, cron": ("cron", "move", "1", NAMED),
    "reschedule, grid": ("grid", "command reschedule", "1", NAMED),
    "reschedule, interval": ("interval", "command reschedule", "1", NAMED),
    "reschedule, cron": ("cron", "command reschedule", "1", NAMED),
    "ends": ("grid", {"times": 1}, "1", OLD_WAITING),
}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", IN_AN_EXTRA_RUN)
async def test_an_edit_during_an_extra_run(name: str, stage: Stage) -> None:
    """What is edited while an extra run is open concerns what is planned, as while it waits."""
    cadence, act, key, minute = IN_AN_EXTRA_RUN[name]
    async with recall(stage, "waiting", cadence) as scene:
        assert await scene.command("fire", scene.id) == 0
        await stage.worker.step()
        if isinstance(act, dict):
            await scene.edit(act)
        else:
            await scene.act(act, Cell(Edit("", (cadence,), acts=(act,)), "waiting", cadence))
        await stage.worker.answer(scene.id, Answered(200))
        found, nominal = await next_call(scene)
        assert found == key
        assert minute <= minutes(scene, nominal) < minute + (1.1 if "resch" in name else 0.001)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("cadence", ["interval", "grid", "cron"])
async def test_a_skip_before_an_extra_run_stays_one(cadence: str, stage: Stage) -> None:
    """Skipped, then fired: the extra run comes now, and then the occurrence after the one that was
    left out."""
    async with recall(stage, "waiting", cadence) as scene:
        await scene.act("skip", Cell(Edit("", (cadence,), acts=("skip",)), "waiting", cadence))
        assert await scene.command("fire", scene.id) == 0
        await stage.worker.step()
        [call] = scene.calls
        assert str(call["recall_key"]).endswith(".f1")
        began = await scene.now()
        await stage.worker.answer(scene.id, Answered(200))
        ended = await scene.now()
        found, nominal = await next_call(scene)
        assert found == "2"
        if cadence == "interval":
            # One interval after the extra run, and one more for the skip, or where the skip led.
            assert nominal == scene.zero + (OLD_WAITING + 60) * MINUTE or (
                began + HOUR <= nominal <= ended + 2 * HOUR
            )
        else:
            assert nominal == scene.zero + (OLD_WAITING + 60) * MINUTE


# --- tables that were there before ----------------------------------------------------------------


@pytest.mark.parametrize("cadence", ["interval", "grid", "cron"])
async def test_rows_that_were_there_before(empty_database: str, cadence: str) -> None:
    """Rows that the application wrote before the worker was installed are edited as all others:
    one that waits, and one that is due."""
    async with connected(empty_database) as db:
        await db.execute(CREATE_TABLES.encode())
        now = datetime.now(UTC).replace(second=0, microsecond=0)
        for id, minute in (("waits", OLD_WAITING), ("due", OLD_DUE)):
            await db.execute("insert into sessions values (%s, 'ann')", [id])
            await db.execute(
                b"""insert into session_recalls values (%s, %s, 'recurring', %s, 3600, null, 'look',
                'pending', now(), now())""",
                [id, id, now + minute * MINUTE],
            )
        schema.migrate(empty_database)
        edits: dict[str, dict[str, Any]] = {
            "interval": {"interval_seconds": NEW_INTERVAL},
            "grid": {"cadence": "grid", "interval_seconds": NEW_INTERVAL},
            "cron": {"cadence": "cron", "cron": NEW_CRON},
        }
        written = edits[cadence]
        async with SteppedWorker(empty_database) as worker:
            stage = Stage(empty_database, db, worker)
            waits_, due = (Scene(stage, id, now) for id in ("waits", "due"))
            edited = await due.now()
            assert await waits_.edit(written) == await due.edit(written) == 1
            await worker.step()
            assert [call["recall_key"] for call in due.calls] == ["due:1"]
            assert waits_.calls == []
            await worker.answer("due", Answered(200))
            await worker.step()
            following, waiting = await due.row(), await waits_.row()
            assert (following["occurrence"], waiting["occurrence"]) == (2, 1)
            if cadence == "interval":
                assert minutes(waits_, waiting["trigger_at"]) == OLD_WAITING
                assert following["trigger_at"] >= edited + timedelta(seconds=NEW_INTERVAL)
            elif cadence == "grid":
                assert minutes(due, following["trigger_at"]) == OLD_DUE + 90
                assert waiting["trigger_at"] >= edited + timedelta(seconds=NEW_INTERVAL)
            else:
                assert minutes(due, following["trigger_at"]) == NEW_CRON
                assert minutes(waits_, waiting["trigger_at"]) == NEW_CRON
