"""How many pending recalls a session may have: one, or as many as `migrate --slots N` says.

Owns the switch. One pending recall a session is the application's own rule, kept by its unique
index over session_id; nothing here changes that unless somebody asks for it. Then two triggers give
each pending recall a slot (recall_admit_slot, migration 0029), a unique index over session_id and
slot stands in the place of the application's index, **under its name**: an application that runs
its `create unique index if not exists` at each start finds that name, and changes nothing.

What a table is to have is noted in the comment of the trigger recall_before_insert, and stands in
the argument of the two triggers: both are in a dump of the schema, and follow a schema that is
renamed. The note is written before the first change, so that the next `migrate` completes what was
interrupted, and `doctor` names it. Indexes are built concurrently, and the switch from one to the
other is one short transaction.

Fewer than before is refused before the first change where a session has more pending recalls than
that. Between that look and the switch a session may get one more: the switch is then taken back.

Never here: which slot a recall gets. The trigger decides that, and the index.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import psycopg
from psycopg import errors, sql
from psycopg.rows import dict_row

from .. import statements
from .catalog import (
    LOOK_MS,
    NOTE,
    ONE_PENDING,
    Difference,
    Means,
    Step,
    does,
    free_index,
    make,
    qualified,
)
from .released import RECALLS, Connection, Index, Place, Table, Trigger, ask, place, read
from .survey import Blocker, Refused

MOST = 100
"""As many pending recalls a session can have at most."""
MISPLACED_AT_ONCE = 20_000
"""Recalls that get another slot between two looks."""
ROUNDS = 5
"""How often an index is built that rows stood in the way of, which then got other slots."""
NOTED = "a session has up to {most} pending recalls, by recall-worker migrate --slots"
NOTED_AS = r"^a session has up to (\d{1,4}) pending"
FUNCTION = "recall_admit_slot"
SLOTTED = Index(True, "USING btree (session_id, slot) WHERE (status = 'pending')")
SINGLE = Index(True, "USING btree (session_id) WHERE (status = 'pending')")
BUILT_AS = "idx_recalls_session_slot"
"""The name of an index until it has the other one's."""
HARM = "a session may get no second pending recall, or more than it may have"

WHAT_CHANGES = (
    "Note: an upsert by session (on conflict (session_id) where status = 'pending') finds no index "
    "of its own any more, and fails. By id (on conflict (id)) it works as before.",
    "Note: what the application cancels or skips by session_id and status = 'pending' is now all "
    "of the session's pending recalls.",
)


def triggers(most: int) -> dict[str, Trigger]:
    """The two triggers, by name."""
    return {
        FUNCTION: Trigger(
            "BEFORE INSERT",
            "FOR EACH ROW WHEN ((new.status = 'pending'))",
            FUNCTION,
            arguments=f"'{most}'",
        ),
        f"{FUNCTION}_again": Trigger(
            "BEFORE UPDATE OF status",
            "FOR EACH ROW WHEN (((new.status = 'pending') AND (old.status <> 'pending')))",
            FUNCTION,
            arguments=f"'{most}'",
        ),
    }


@dataclass(frozen=True, slots=True)
class State:
    where: Place
    has: Table
    noted: int | None
    """What the table is to have, as it was noted."""
    done: int | None
    """What the triggers say; None where there are none."""

    @property
    def most(self) -> int:
        """What it is to have."""
        return self.noted or self.done or 1

    def named(self, wanted: Index) -> list[str]:
        """The indexes of that definition, those that serve first."""
        found = [n for n, i in self.has.indexes.items() if _is(i, wanted)]
        return sorted(found, key=lambda name: (not self.has.indexes[name].serves, name))

    def serving(self, wanted: Index) -> list[str]:
        return [name for name in self.named(wanted) if self.has.indexes[name].serves]

    def lacks(self, most: int) -> list[tuple[str, str, str]]:
        """What is not as it should be for so many: kind, name, what."""
        found = []
        for name, wanted in triggers(most).items():
            there = self.has.triggers.get(name)
            if there is None:
                found.append(("trigger", name, f"{name} is missing"))
            elif does(there) != does(wanted):
                found.append(
                    ("trigger", name, f"{name} has another definition than recall-worker's")
                )
            elif there.enabled not in ("O", "A"):
                found.append(("trigger", name, f"{name} does not fire"))
        if not self.serving(SLOTTED):
            found.append(
                ("index", ONE_PENDING, "a unique index over session_id and slot is missing")
            )
        found += [
            ("index", name, f"index {name} allows a session one pending recall only")
            for name in self.named(SINGLE)
        ]
        return found


def _is(index: Index, wanted: Index) -> bool:
    """Whether an index does what is wanted. The application's own may include further columns."""
    return (
        index.unique
        and index.keys == wanted.keys
        and index.condition == wanted.condition
        and "NULLS NOT DISTINCT" not in index.definition
    )


def state(conn: Connection) -> State | None:
    """How it stands; None where there is no adopted table. Raises psycopg.Error."""
    where = place(conn)
    if where is None or not where.adopted:
        return None
    with conn.transaction():
        conn.execute(f"set local lock_timeout = {LOOK_MS}")
        [said] = ask(conn, "slots", schema=where.schema, note=NOTED_AS)
        has = read(conn, where, [RECALLS], []).tables[RECALLS]
    return State(where, has, said["noted"], said["done"])


def _stated(conn: Connection, means: Means) -> State | None:
    """The same, however long the table is locked exclusively, which it has to wait for."""
    found: list[State | None] = []
    means.patiently(lambda: found.append(state(conn)))
    return found[0]


def differences(conn: Connection) -> list[Difference]:
    """What differs from what `migrate --slots` was told, in words; `migrate` completes it."""
    found = state(conn)
    if found is None or (found.noted is None and found.done is None):
        return []
    if found.most == 1:
        what = "a session is to have one pending recall again, and that was not completed"
        return [Difference("index", ONE_PENDING, what, HARM)]
    return [
        Difference(kind, name, f"{what} (a session has up to {found.most} pending recalls)", HARM)
        for kind, name, what in found.lacks(found.most)
    ]


def most(conn: Connection) -> int:
    """How many pending recalls a session may have, as the table was told."""
    found = state(conn)
    return 1 if found is None else found.most


def text(most: int) -> str:
    return (
        "one pending recall a session" if most == 1 else f"up to {most} pending recalls a session"
    )


def step(conn: Connection, most: int) -> str | None:
    """What `migrate --slots` would do, in words; None: nothing."""
    found = state(conn)
    if found is None:
        return None if most == 1 else text(most)
    if found.most == most and _is_so(found, most):
        return None
    was = "" if found.most == most else f", where it is {found.most}"
    return f"{text(most)}{was}"


def _is_so(found: State, most: int) -> bool:
    if most > 1:
        return not found.lacks(most)
    return bool(found.serving(SINGLE)) and found.noted is None and found.done is None


def refuse_crowded(conn: psycopg.Connection[Any], most: int) -> None:
    """Raises Refused where sessions have more pending recalls than that."""
    cursor = conn.cursor(row_factory=dict_row)
    row = cursor.execute(statements.load("survey")["crowded"].encode(), {"most": most}).fetchone()
    if row is not None and row["sessions"]:
        count, found = row["sessions"], row["most"]
        sessions = "1 session has" if count == 1 else f"{count} sessions have"
        raise Refused(
            [
                Blocker(
                    f"{sessions} more pending recalls than {most}; the most are {found}",
                    f"cancel what is too many of each session, or --slots {found}",
                )
            ]
        )


def bring(conn: Connection, means: Means, most: int | None) -> list[str]:
    """Make it so; returns what was done. `most`: as `migrate --slots` says; None: as the table was
    told before. Raises Refused where sessions have more, and what `means.patiently` raises."""
    found = _stated(conn, means)
    if found is None or (most is None and found.noted is None and found.done is None):
        return []
    wanted = found.most if most is None else most
    if _is_so(found, wanted):
        if wanted > 1:
            if found.noted != wanted:
                _run(conn, means, [_noted(found, wanted)])
            _place_again(conn, means, wanted)
        return []
    means.say(text(wanted))
    refuse_crowded(conn, wanted)
    if wanted > 1:
        _several(conn, means, found, wanted)
    else:
        _one(conn, means, found)
    return [text(wanted)]


def _several(conn: Connection, means: Means, found: State, most: int) -> None:
    before = found.done or 1
    if found.named(SINGLE):
        # Until the switch no session has two: all of them have the first slot.
        _run(conn, means, [_noted(found, most)])
    else:
        _run(conn, means, _fires(found, most))
        _take_back_where_crowded(conn, means, found, most, before)
        _place_again(conn, means, most)
    name = _built(conn, means, found, SLOTTED, most)
    _run(conn, means, lambda conn: _switched(conn, SLOTTED, name, most))
    _place_again(conn, means, most)
    if before == 1:
        for said in WHAT_CHANGES:
            means.say(said)


def _one(conn: Connection, means: Means, found: State) -> None:
    before = found.done
    if before is not None or found.serving(SLOTTED):
        _run(conn, means, _fires(found, 1))
        _take_back_where_crowded(conn, means, found, 1, before)
        _place_again(conn, means, 1)
    try:
        name = _built(conn, means, found, SINGLE, 1)
    except Refused:
        _take_back(conn, means, found, before)
        raise
    _run(conn, means, lambda conn: _switched(conn, SINGLE, name, 1))


def _take_back_where_crowded(
    conn: Connection, means: Means, found: State, most: int, before: int | None
) -> None:
    """A session may have got one more between the first look and the switch."""
    try:
        refuse_crowded(conn, most)
    except Refused:
        _take_back(conn, means, found, before)
        raise


def _take_back(conn: Connection, means: Means, found: State, before: int | None) -> None:
    if before is not None and before > 1:
        _run(conn, means, _fires(found, before))


def _built(conn: Connection, means: Means, found: State, wanted: Index, most: int) -> str:
    """The name of an index that serves as wanted, built where there is none."""
    table = qualified(found.where, RECALLS)
    for _ in range(ROUNDS):
        there = _stated(conn, means)
        assert there is not None
        if serving := there.serving(wanted):
            return serving[0]
        for left in there.named(wanted):  # By an interrupted build.
            make(conn, means, Step([_drop(found, left)], True))
        build = sql.SQL("create unique index concurrently {} on {} {}").format(
            sql.Identifier(free_index(conn, found.where, BUILT_AS)),
            table,
            sql.SQL(wanted.definition),
        )
        if make(conn, means, Step([build], True, stands="two pending recalls have one slot")):
            continue
        refuse_crowded(conn, most)
        _place_again(conn, means, most)
    raise Refused(
        [Blocker(f"an index for {text(most)} can't be built", "recall-worker migrate, once more")]
    )


def _drop(found: State, name: str) -> sql.Composed:
    return sql.SQL("drop index concurrently if exists {}").format(qualified(found.where, name))


def _switched(conn: Connection, wanted: Index, name: str, most: int) -> list[sql.Composed]:
    """The statements of one transaction: the one index in the place of the other, and the triggers.
    As things stand then, under the lock."""
    here = place(conn)
    assert here is not None
    table = qualified(here, RECALLS)
    conn.execute(sql.SQL("lock table {} in access exclusive mode").format(table))
    found = state(conn)
    assert found is not None
    old = found.named(SINGLE if wanted is SLOTTED else SLOTTED)
    called = ONE_PENDING if ONE_PENDING in old or not old else old[0]
    made = [sql.SQL("drop index {}").format(qualified(here, other)) for other in old]
    if name not in (called, ONE_PENDING) and free_index(conn, here, called, *old) == called:
        made.append(
            sql.SQL("alter index {} rename to {}").format(
                qualified(here, name), sql.Identifier(called)
            )
        )
    if most > 1:
        return [*made, *_fires(found, most)]
    made += [
        sql.SQL("drop trigger if exists {} on {}").format(sql.Identifier(trigger), table)
        for trigger in triggers(most)
    ]
    return [*made, _comment(found, NOTE)]


def _fires(found: State, most: int) -> list[sql.Composed]:
    table = qualified(found.where, RECALLS)
    return [
        *(
            sql.SQL("create or replace trigger {} {} on {} {} execute function {}({})").format(
                sql.Identifier(name),
                sql.SQL(trigger.event),
                table,
                sql.SQL(trigger.scope),
                qualified(found.where, FUNCTION),
                sql.SQL(trigger.arguments),
            )
            for name, trigger in triggers(most).items()
        ),
        # One that somebody has disabled.
        *(
            sql.SQL("alter table {} enable trigger {}").format(table, sql.Identifier(name))
            for name in triggers(most)
        ),
        _noted(found, most),
    ]


def _noted(found: State, most: int) -> sql.Composed:
    return _comment(found, NOTED.format(most=most))


def _comment(found: State, said: str) -> sql.Composed:
    return sql.SQL("comment on trigger recall_before_insert on {} is {}").format(
        qualified(found.where, RECALLS), sql.Literal(said)
    )


def _run(conn: Connection, means: Means, made: Any) -> None:
    """One transaction."""
    make(conn, means, Step(made))


def _place_again(conn: Connection, means: Means, most: int) -> None:
    """Give those recalls another slot that have none of their own, or too high a one: as the table
    had no index over one pending recall, or more slots before."""
    texts = statements.load("survey")
    seen: list[str] = []
    while True:
        rows = (
            conn.cursor(row_factory=dict_row)
            .execute(texts["misplaced"].encode(), {"most": most, "limit": MISPLACED_AT_ONCE})
            .fetchall()
        )
        found = [str(row["id"]) for row in rows]
        if not found or found == seen:
            return  # Those that are left wait for a slot that somebody frees.
        seen = found
        for recall in found:
            means.patiently(partial(_place, conn, means, recall, most))


def _place(conn: Connection, means: Means, id: str, most: int) -> None:
    try:
        with conn.transaction():
            conn.execute(f"set local lock_timeout = {means.lock_ms}")
            conn.execute(
                statements.load("survey")["place_again"].encode(), {"id": id, "most": most}
            )
    except errors.UniqueViolation:
        return  # Somebody was faster: it is looked for again.
    except errors.NotNullViolation:
        refuse_crowded(conn, most)
