"""Signatures that the published library verifies, and keys that stand for one body: what a real
daemon sends, byte by byte."""

from __future__ import annotations

import base64
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from .conftest import Connection
from .process.test_corridor import row, soon
from .process.test_edits import command
from .process.test_lease import eventually
from .support.application import Application
from .support.daemon import Daemon, Daemons
from .support.endpoint import Answer, Endpoint, Gate, Raw, Request, reply

pytestmark = pytest.mark.full

WHSEC = "whsec_" + base64.b64encode(b"a secret of twenty-four b").decode()
OTHER = "whsec_" + base64.b64encode(b"another secret").decode()
ENDPOINT_MD = Path(__file__).resolve().parent.parent / "docs" / "endpoint.md"
PLAIN = "correct-horse-battery-staple"


async def called(
    app: Application, endpoint: Endpoint, message: str = "look at the build", session: str = "s"
) -> Request:
    """The daemon's call for a recall that the application schedules."""
    await app.create_session(session, "ann")
    await app.schedule(session, "immediate", soon(0), message)
    return (await endpoint.count(1, session))[-1]


# --- signatures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("secret", "verify_with"),
    [
        pytest.param(WHSEC, [WHSEC], id="whsec_"),
        pytest.param(PLAIN, [PLAIN.encode()], id="plain"),
        pytest.param(f"{WHSEC} {OTHER}", [WHSEC, OTHER], id="two while it is changed"),
        pytest.param(
            f"{PLAIN} {WHSEC}", [PLAIN.encode(), WHSEC], id="a plain one changed for whsec_"
        ),
    ],
)
async def test_the_published_library_verifies(
    app: Application,
    endpoint: Endpoint,
    daemons: Daemons,
    secret: str,
    verify_with: list[str | bytes],
) -> None:
    """What the daemon sends verifies with each secret that is set, and with no other; nor if a byte
    of it was changed."""
    daemon = await daemons.start(signing_secret=secret)
    request = await called(app, endpoint, 'größe "漢" \\ {}')
    assert request.headers["webhook-id"] == request.key
    for known in verify_with:
        assert Webhook(known).verify(request.body, request.headers) == request.document
        for body, changes in (
            (request.body + b" ", {}),
            (request.body, {"webhook-id": "other:1"}),
            (
                request.body,
                {"webhook-timestamp": str(int(request.headers["webhook-timestamp"]) + 1)},
            ),
        ):
            with pytest.raises(WebhookVerificationError):
                Webhook(known).verify(body, request.headers | changes)
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + base64.b64encode(b"wrong").decode()).verify(
            request.body, request.headers
        )
    await daemon.hears("recall.settled", status="fired")


@pytest.mark.parametrize(
    "secret", [WHSEC, PLAIN, f"{OTHER} {WHSEC}"], ids=["whsec_", "plain", "two"]
)
async def test_the_documented_lines_verify(
    app: Application, endpoint: Endpoint, daemons: Daemons, secret: str
) -> None:
    """The lines of docs/endpoint.md do what is said of them, with a genuine call and with one that
    is not."""
    lines: dict[str, Any] = {}
    for snippet in re.findall(
        r"<!-- verify [^>]* -->\n```python\n(.*?)```",
        ENDPOINT_MD.read_text(encoding="utf-8"),
        re.DOTALL,
    ):
        exec(snippet, lines)
    await daemons.start(signing_secret=secret)
    request = await called(app, endpoint)
    for one in secret.split():
        assert lines["genuine"](one, request.headers, request.body)
        assert (
            lines["verified"](
                one if one.startswith("whsec_") else one.encode(), request.headers, request.body
            )
            == request.document
        )
        assert not lines["genuine"](one, request.headers, request.body + b" ")
        assert not lines["genuine"](one, request.headers | {"webhook-timestamp": "1"}, request.body)
        assert not lines["genuine"]("other", request.headers, request.body)


async def test_a_key_that_no_header_can_carry(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """The id that is signed is the one in the header, also where the recall's own had to be
    encoded."""
    await daemons.start(signing_secret=WHSEC)
    await app.create_session("s", "ann")
    await app.schedule("s", "immediate", soon(0), "work", id="é\r\nx: y")
    request = (await endpoint.count(1))[0]
    assert request.headers["webhook-id"] == request.key == "%C3%A9%0D%0Ax:%20y:1"
    assert Webhook(WHSEC).verify(request.body, request.headers)["recall"]["id"] == "é\r\nx: y"


async def test_each_call_is_signed_anew(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """A later call has the same id and body and a signature of its own time, so that it is never
    too old; both verify."""
    endpoint.script("s", reply(503, headers={"retry-after": "2"}), reply())
    await daemons.start(signing_secret=WHSEC)
    await called(app, endpoint)
    one, two = await endpoint.count(2)
    assert (one.key, one.body) == (two.key, two.body)
    assert int(one.headers["webhook-timestamp"]) < int(two.headers["webhook-timestamp"])
    for request in (one, two):
        assert Webhook(WHSEC).verify(request.body, request.headers)


async def test_without_a_secret_nothing_is_signed(
    app: Application, endpoint: Endpoint, daemons: Daemons
) -> None:
    """No secret, no webhook headers."""
    await daemons.start()
    request = await called(app, endpoint)
    assert not [name for name in request.headers if name.startswith("webhook-")]


async def test_secrets_stay_secret(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons, tmp_path: Path
) -> None:
    """Neither log nor database shows token or signing secret, as given or decoded; both may come
    from files."""
    (tmp_path / "secret").write_text(f"{WHSEC} {PLAIN}\n")
    (tmp_path / "token").write_text("s3cr3t-token\n")
    daemon = await daemons.start(
        signing_secret_file=tmp_path / "secret", run_token_file=tmp_path / "token"
    )
    endpoint.script("s", reply(401, {"error": "no"}), reply())
    request = await called(app, endpoint)
    assert Webhook(PLAIN.encode()).verify(request.body, request.headers)
    assert request.headers["authorization"] == "Bearer s3cr3t-token"
    await daemon.hears("recall.settled")
    await daemon.stop()
    tables = [
        await (await db.execute(f"select * from {name}".encode())).fetchall() for name in TABLES
    ]
    shown = "\n".join([*map(str, daemon.events), *daemon.talk, *map(str, tables)])
    assert "signing_secret" in shown, "that one is set is told"
    decoded = base64.b64decode(WHSEC.removeprefix("whsec_")).decode()
    for secret in (WHSEC, WHSEC.removeprefix("whsec_"), decoded, PLAIN, "s3cr3t-token"):
        assert secret not in shown


TABLES = ("session_recalls", "recall_attempts", "recall_workers", "recall_endpoints")


# --- keys and bodies ------------------------------------------------------------------------------


class Fingerprints:
    """An API that remembers the body of each key, and refuses the same key with another one:
    422."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.bodies: dict[str, bytes] = {}
        self.refused: list[Request] = []
        self._answers: list[Answer] = []
        endpoint.default = self._read

    def then(self, *answers: Answer) -> None:
        """How calls are answered that are not refused, in turn; then 200."""
        self._answers = list(answers)

    async def _read(self, request: Request) -> Raw | Gate:
        if self.bodies.setdefault(request.key, request.body) != request.body:
            self.refused.append(request)
            return reply(422, {"code": "key_reused"})
        answer = self._answers.pop(0) if self._answers else reply()
        return answer if isinstance(answer, Raw | Gate) else await answer(request)


@pytest.fixture
def api(endpoint: Endpoint) -> Fingerprints:
    return Fingerprints(endpoint)


async def now(db: Connection) -> None:
    """What waits is due now, as if time had passed."""
    await db.execute(
        b"update session_recalls set planned_at = planned_at - (trigger_at - now()), "
        b"trigger_at = now() where status in ('pending', 'running') and trigger_at > now()"
    )


BUSY = reply(409, {"code": "session_busy"}, {"retry-after": "60"})
LATER = reply(503, headers={"retry-after": "60"})
BROKE = reply(500, {"error": "a tool broke"})


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param([BROKE, Raw(reset=True)], id="unknown, retried"),
        pytest.param([BUSY, BUSY, BUSY], id="busy, deferred"),
        pytest.param([LATER, LATER, LATER], id="unavailable, deferred"),
        pytest.param([BUSY, BROKE, LATER, BROKE], id="all of it"),
    ],
)
@pytest.mark.parametrize("call_type", ["once", "recurring"])
async def test_one_key_has_one_body(
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
    api: Fingerprints,
    answers: list[Raw],
    call_type: str,
) -> None:
    """However often one occurrence is called, and however many due moments pass meanwhile, its key
    stands for one body."""
    api.then(*answers)
    daemon = await daemons.start()
    await app.create_session("s", "ann")
    due = soon(-2.5)
    await app.schedule("s", call_type, due, "look", 1 if call_type == "recurring" else None)
    await daemon.hears("recall.settled")
    missed = endpoint.requests[0].document["recall"]["missed"]
    assert missed >= 2 if call_type == "recurring" else missed == 0
    # What was missed would be counted otherwise by now.
    await eventually(
        db, "select 1 where clock_timestamp() > %s + %s * interval '1 second'", [due, missed + 1.1]
    )
    for n in range(len(answers)):
        await daemon.hears("recall.settled", times=n + 1)
        await now(db)
    await daemon.hears("recall.settled", outcome="answered")
    calls = endpoint.requests[: len(answers) + 1]
    assert api.refused == []
    assert len({(r.key, r.body) for r in calls}) == 1


async def test_a_dead_workers_successor_sends_the_same_body(
    app: Application, endpoint: Endpoint, daemons: Daemons, api: Fingerprints
) -> None:
    """A worker that is killed in mid-run is succeeded with the same key and body, whatever was
    missed meanwhile."""
    gate = Gate()
    api.then(gate)
    first = await daemons.start(lease=1)
    await app.create_session("s", "ann")
    await app.schedule("s", "recurring", soon(-1.5), "look", 1)
    await gate.entered.wait()
    second = await daemons.start(lease=1)
    await first.kill()
    await second.hears("recall.settled", outcome="answered")
    one, two = endpoint.requests[:2]
    assert (one.key, one.body) == (two.key, two.body)
    assert api.refused == []


Change = Callable[[Connection, str], Awaitable[Any]]


async def _other_message(db: Connection, id: str) -> None:
    await db.execute(
        "update session_recalls set additional_context_message = 'look elsewhere' where id = %s",
        [id],
    )


async def _other_type(db: Connection, id: str) -> None:
    await db.execute("update session_recalls set call_type = 'immediate' where id = %s", [id])


async def _other_interval(db: Connection, id: str) -> None:
    await db.execute(
        "update session_recalls set interval_seconds = 7200, internal_comment = 'new', "
        "updated_at = now() where id = %s",
        [id],
    )


async def _called_then_changed(
    app: Application, db: Connection, daemon: Daemon, change: Change, call_type: str = "once"
) -> str:
    """A recall that was called once and not for good, then changed by the application, then called
    again; its id."""
    await app.create_session("s", "ann")
    id = await app.schedule(
        "s", call_type, soon(0), "look", 3600 if call_type == "recurring" else None
    )
    await daemon.hears("recall.settled", recall=id)
    await change(db, id)
    await now(db)
    await daemon.hears("recall.settled", recall=id, outcome="answered")
    return id


@pytest.mark.parametrize(
    "answer",
    [BROKE, BUSY, LATER, reply(401)],
    ids=["unknown", "busy", "unavailable", "misconfigured"],
)
@pytest.mark.parametrize("change", [_other_message, _other_type], ids=["message", "type"])
async def test_a_body_that_the_application_changed_has_a_key_of_its_own(
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
    api: Fingerprints,
    answer: Raw,
    change: Change,
) -> None:
    """A message (or type) that is updated between two calls of one occurrence is sent under a new
    key, so it is never refused."""
    api.then(answer)
    daemon = await daemons.start(busy_delay=60)
    id = await _called_then_changed(app, db, daemon, change)
    one, two = endpoint.requests
    assert api.refused == []
    assert (one.key, two.key) == (f"{id}:1", f"{id}:1.1")
    assert one.body != two.body
    assert (await row(db, "s"))["status"] == "fired"


@pytest.mark.parametrize("answer", [BROKE, BUSY], ids=["unknown", "busy"])
async def test_what_is_not_in_the_body_changes_no_key(
    app: Application,
    db: Connection,
    endpoint: Endpoint,
    daemons: Daemons,
    api: Fingerprints,
    answer: Raw,
) -> None:
    """An interval or a comment that is updated between two calls of one occurrence leaves its key
    and body alone."""
    api.then(answer)
    daemon = await daemons.start()
    id = await _called_then_changed(app, db, daemon, _other_interval, "recurring")
    one, two = endpoint.requests
    assert (one.key, one.body) == (two.key, two.body)
    assert one.key == f"{id}:1"
    following = await row(db, "s")
    assert (following["occurrence"], following["rekey"]) == (2, 0)


async def test_changed_while_its_worker_was_dead(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons, api: Fingerprints
) -> None:
    """A message that is updated under a lease that nobody holds any more is sent by the successor
    under a new key."""
    gate = Gate()
    api.then(gate)
    first = await daemons.start(lease=1)
    await app.create_session("s", "ann")
    id = await app.schedule("s", "once", soon(0), "look")
    await gate.entered.wait()
    await first.kill()
    await _other_message(db, id)
    second = await daemons.start(lease=1)
    await second.hears("recall.settled", outcome="answered", attempt=2)
    assert endpoint.keys == [f"{id}:1", f"{id}:1.1"]
    assert api.refused == []
    marks = await (
        await db.execute("select rekey, attempt, outcome from recall_attempts order by attempt")
    ).fetchall()
    assert [tuple(mark.values()) for mark in marks] == [(0, 1, "unknown"), (1, 2, "answered")]


async def test_changed_and_changed_back(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons, api: Fingerprints
) -> None:
    """Each change begins a key; a new occurrence, or one that was never called, begins with none of
    that."""
    api.then(BUSY, BUSY, BUSY)
    daemon = await daemons.start(busy_delay=60)
    await app.create_session("s", "ann")
    id = await app.schedule("s", "recurring", soon(3600), "first words", 3600)
    await _other_message(db, id)
    await now(db)
    await daemon.hears("recall.settled", times=1)
    for times, message in ((2, "look"), (3, "look elsewhere"), (4, "look elsewhere")):
        await db.execute(
            "update session_recalls set additional_context_message = %s where id = %s",
            [message, id],
        )
        await now(db)
        await daemon.hears("recall.settled", times=times)
    assert (await row(db, "s"))["occurrence"] == 2
    await _other_message(db, id)
    await now(db)
    await daemon.hears("recall.settled", times=5)
    assert endpoint.keys == [f"{id}:{number}" for number in ("1", "1.1", "1.2", "1.2", "2")]
    assert api.refused == []


async def test_changed_after_a_move_and_a_death(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons, api: Fingerprints
) -> None:
    """An occurrence that began with a move by the application has one body for a key, too, though
    its worker died and it was changed."""
    gate = Gate()
    api.then(BUSY, gate)
    first = await daemons.start(lease=1)
    await app.create_session("s", "ann")
    id = await app.schedule("s", "once", soon(0), "look")
    await first.hears("recall.settled", outcome="busy")
    await app.reschedule(id, soon(0))
    await gate.entered.wait()
    await first.kill()
    await _other_message(db, id)
    second = await daemons.start(lease=1)
    await second.hears("recall.settled", outcome="answered")
    assert endpoint.keys == [f"{id}:1", f"{id}:2", f"{id}:2.1"]
    assert api.refused == []


async def test_changed_while_a_run_was_polled_that_is_lost(
    app: Application,
    db: Connection,
    database: str,
    endpoint: Endpoint,
    daemons: Daemons,
    api: Fingerprints,
) -> None:
    """An accepted run that the API forgets is not called again, whatever was changed meanwhile; a
    person's `retry` calls it under a new key, with the new message."""
    api.then(reply(202, {}, {"location": "/runs/r1"}))
    endpoint.scripts["GET r1"] = [reply(200, {"status": "running"}, {"retry-after": "0"})]
    first = await daemons.start(lease=1)
    await app.create_session("s", "ann")
    id = await app.schedule("s", "once", soon(0), "look")
    await endpoint.until(lambda: endpoint.of("r1", "GET"))
    await first.kill()
    await _other_message(db, id)
    second = await daemons.start(lease=1)
    await second.hears("lease.taken")
    endpoint.scripts["GET r1"] = [reply(404)]
    await second.hears("recall.settled", outcome="unknown", status="failed")
    assert [r.key for r in endpoint.of("s")] == [f"{id}:1"]
    assert (await command(database, "retry", id)).status == 0
    await second.hears("recall.settled", outcome="answered")
    first_key, second_key = (r.key for r in endpoint.of("s"))
    assert first_key == f"{id}:1" != second_key
    assert api.refused == []


async def test_a_run_that_was_accepted_keeps_its_key(
    app: Application, db: Connection, endpoint: Endpoint, daemons: Daemons, api: Fingerprints
) -> None:
    """What the application changes while an accepted run goes on is not posted; the run is followed
    to its end under its key."""
    api.then(reply(202, {}, {"location": "/runs/r1"}))
    endpoint.scripts["GET r1"] = [reply(200, {"status": "running"}, {"retry-after": "0"})]
    first = await daemons.start(lease=1)
    await app.create_session("s", "ann")
    id = await app.schedule("s", "once", soon(0), "look")
    await endpoint.until(lambda: endpoint.of("r1", "GET"))
    await first.kill()
    await _other_message(db, id)
    second = await daemons.start(lease=1)
    await second.hears("lease.taken")
    endpoint.scripts["GET r1"] = [reply(200, {"status": "completed"})]
    await second.hears("recall.settled", outcome="answered", status="fired")
    assert [r.key for r in endpoint.of("s")] == [f"{id}:1"]
    assert {r.key for r in endpoint.of("r1", "GET")} == {f"{id}:1"}
