"""A day of an agent application as its operators find it, written into a migrated database:
recalls in every state with their calls and their story, workers of two queues, a queue that is
paused, an endpoint that fails. For pictures of pages, and for tests that look at each page.

Nothing of it runs: workers are rows, which stay alive for as long as a page counts a heartbeat.
"""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from typing import Any

import psycopg

from recall_worker import cadence

AGENT = "https://agent.example.com/sessions/{session_id}/run"
MAILER = "https://mail.example.com/sessions/{session_id}/run"
SOME = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
"""A recall with everything: a cron rule of its own zone, calls, edits, an end."""
FAILED = "b1946ac9-2492-4d23-8f4a-3b0cbb7d1a55"
RUNNING = "0f8fad5b-d9cb-469f-a165-70867728950e"

INSERT = """
insert into session_recalls (id, session_id, call_type, trigger_at, interval_seconds,
    internal_comment, additional_context_message, status, created_at, updated_at, cadence, cron,
    time_zone, queue)
values (%(id)s, %(session)s, %(type)s,
    coalesce(%(at)s, now() + %(due)s * interval '1 second'), %(interval)s,
    %(comment)s, %(message)s, 'pending', now() - interval '9 days', now() - interval '1 hour',
    %(cadence)s, %(cron)s, %(zone)s, %(queue)s)
"""
ATTEMPT = """
insert into recall_attempts (recall_id, occurrence, rekey, attempt, outcome, session_id, worker,
    lease, calls, scheduled_for, called_at, last_called_at, ended_at, http_status, reason, settled)
values (%(id)s, %(occurrence)s, 0, %(attempt)s, %(outcome)s, %(session)s, %(worker)s,
    gen_random_uuid(), %(calls)s, now() - (%(ago)s + %(late)s) * interval '1 second',
    now() - %(ago)s * interval '1 second', now() - %(ago)s * interval '1 second',
    now() - (%(ago)s - %(took)s) * interval '1 second', %(http)s, %(reason)s, %(settled)s)
"""
ACTION = """
insert into recall_actions (at, actor, via, action, recall_id, detail)
values (now() - %s * interval '1 second', %s, %s, %s, %s, %s::jsonb)
"""
WORKER = """
insert into recall_workers (worker, host, pid, version, started_at, seen_at, slots, running,
    breaker, settings, bell, queues)
values (%s, %s, %s, %s, now() - %s * interval '1 second', now() - %s * interval '1 second', %s, 0,
    %s, %s::jsonb, 'listening', %s)
"""


def lay(dsn: str, version: str = "1.0.0") -> None:
    """Write it, in one transaction. `version`: what the workers say of themselves."""
    with psycopg.connect(dsn) as conn:
        _workers(conn, version)
        _recalls(conn)
        _failures(conn)


def _id(number: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"recall {number}"))


def _session(number: int) -> str:
    return f"chat-{uuid.uuid5(uuid.NAMESPACE_DNS, f'session {number}').hex[:12]}"


def _workers(conn: psycopg.Connection[Any], version: str) -> None:
    for name, host, pid, slots, breaker, url, queues, seen in (
        ("agents-0-7f4d", "agents-0", 17, 8, "closed", AGENT, ["default"], 4),
        ("agents-1-1c22", "agents-1", 17, 8, "closed", AGENT, ["default"], 9),
        ("mail-0-90be", "mail-0", 17, 4, "open", MAILER, ["mail"], 2),
        ("agents-2-a0e1", "agents-2", 17, 8, "closed", AGENT, ["default"], 4_000),
    ):
        settings = {
            "run_url": url,
            "lease": 60,
            "max_attempts": 3,
            "give_up": 86400,
            "run_timeout": 1800 if name != "mail-0-90be" else 600,
            "protocol": "native",
            "tzdata": "2026c",
        }
        conn.execute(
            WORKER.encode(),
            (name, host, pid, version, 93_000, seen, slots, breaker, json.dumps(settings), queues),
        )
    conn.execute(
        b"insert into recall_queues (queue, paused_at, paused_by, reason) values "
        b"('reports', now() - interval '52 minutes', 'maria', 'the warehouse is being moved')"
    )
    conn.execute(
        b"insert into recall_endpoints (endpoint, probed_at, probes) "
        b"select encode(sha256(convert_to(%s, 'UTF8')), 'hex'), now() - interval '8 seconds', 14",
        [MAILER],
    )


def _recall(conn: psycopg.Connection[Any], id: str, session: str, due: float, **more: Any) -> None:
    """`due`: in so many seconds. What is no value of the insert is written as SQL, afterwards."""
    values: dict[str, Any] = {
        "id": id,
        "session": session,
        "type": "once",
        "due": due,
        "at": None,
        "interval": None,
        "comment": None,
        "message": "Look at the build again, and say whether it is green.",
        "cadence": "interval",
        "cron": None,
        "zone": None,
        "queue": "default",
    }
    given = {name: more.pop(name) for name in list(more) if name in values}
    if given.get("cron"):
        # Its moments are those of its rule, to the second.
        values["at"] = cadence.check(given["cron"], given["zone"], datetime.now(UTC))
    conn.execute(b"insert into sessions (id, user_id) values (%s, %s)", [session, "user-118"])
    conn.execute(INSERT.encode(), values | given)
    for name, value in more.items():
        conn.execute(f"update session_recalls set {name} = {value} where id = %s".encode(), [id])


def _cron(rule: str, zone: str) -> dict[str, Any]:
    return {"type": "recurring", "cadence": "cron", "cron": rule, "zone": zone}


def _recalls(conn: psycopg.Connection[Any]) -> None:
    now = datetime.now(UTC)
    due = (cadence.check("30 9 * * *", "America/New_York", now) - now).total_seconds()
    comment = "asked for by the user on the first day of the project"
    _recall(
        conn,
        SOME,
        "chat-4be1c07a92d3",
        due,
        **_cron("30 9 * * *", "America/New_York"),
        message="Read the inbox of the team.\nTell Ann what can't wait until tomorrow.",
        comment=comment,
        occurrence="8",
    )
    _recall(
        conn,
        RUNNING,
        _session(1),
        -75,
        lease="gen_random_uuid()",
        lease_until="now() + interval '48 seconds'",
        leased_at="now() - interval '72 seconds'",
        leased_by="'agents-0-7f4d'",
        begun_at="now() - interval '72 seconds'",
        scheduled_for="now() - interval '75 seconds'",
        attempt="1",
    )
    for n in range(2, 7):
        _recall(
            conn,
            _id(n),
            _session(n),
            -3 * n,
            lease="gen_random_uuid()",
            lease_until="now() + interval '50 seconds'",
            leased_at=f"now() - interval '{3 * n - 1} seconds'",
            leased_by=f"'agents-{n % 2}-{('7f4d', '1c22')[n % 2]}'",
            begun_at=f"now() - interval '{3 * n - 1} seconds'",
            scheduled_for=f"now() - interval '{3 * n} seconds'",
            attempt="1",
        )
    for n in range(10, 24):  # The endpoint of mail fails, so they stay.
        _recall(
            conn,
            _id(n),
            _session(n),
            -240 - 31 * n,
            queue="mail",
            message="Send the weekly letter.",
            attempt="1",
            last_outcome="'unavailable'",
            reason="'HTTP 503: upstream connect error'",
        )
    for n in range(24, 29):
        _recall(
            conn,
            _id(n),
            _session(n),
            -600 * (n - 23),
            queue="reports",
            message="Write the report of the night.",
        )
    for n in range(30, 34):  # Their users are typing.
        _recall(
            conn,
            _id(n),
            _session(n),
            20 + 9 * (n - 30),
            deferrals=str(n - 28),
            last_outcome="'busy'",
            reason="'HTTP 409: the session is in use'",
        )
    for n in range(40, 78):  # What comes.
        rule: dict[str, Any] = {}
        if n % 5 == 0:
            rule = _cron(f"{7 * n % 60} {n % 24} * * *", "Europe/Berlin")
        elif n % 5 == 1:
            rule = {"type": "recurring", "interval": 5400, "cadence": "grid"}
        elif n % 5 == 2:
            rule = {"type": "recurring", "interval": 3600}
        _recall(conn, _id(n), _session(n), 40 + (n - 40) ** 2 * 61, **rule)
    for n in range(80, 83):
        _recall(conn, _id(n), _session(n), 7_200 * n, paused_at="now() - interval '3 days'")
    for n in range(90, 96):
        _recall(
            conn,
            _id(n),
            _session(n),
            -700 * n,
            status="'fired'",
            ended_at="now() - interval '3 hours'",
            last_outcome="'answered'",
        )
    _recall(
        conn, _id(97), _session(97), 99, status="'cancelled'", ended_at="now() - interval '1 hour'"
    )
    for at, (actor, via, action, detail) in {
        777_600: ("agent", "mcp", "schedule", {"session_id": "chat-4be1c07a92d3"}),
        400_000: ("ann", "cli", "edit", {"cron": {"from": "0 9 * * *", "to": "30 9 * * *"}}),
        260_000: ("maria", "console", "pause", {}),
        173_000: ("maria", "console", "resume", {}),
    }.items():
        conn.execute(ACTION.encode(), [at, actor, via, action, SOME, json.dumps(detail)])
    for occurrence in range(1, 8):
        ended = {"outcome": "answered", "http": 200, "reason": None}
        if occurrence == 5:
            _attempt(
                conn,
                SOME,
                "chat-4be1c07a92d3",
                (8 - occurrence) * 86_400 - due,
                occurrence=5,
                outcome="failed",
                http=500,
                reason="HTTP 500: the model's answer was cut off",
                settled="pending",
                took=61.0,
            )
            ended["attempt"] = 2
        _attempt(
            conn,
            SOME,
            "chat-4be1c07a92d3",
            (8 - occurrence) * 86_400 - due - (181 if occurrence == 5 else 0),
            occurrence=occurrence,
            settled="pending",
            late=0.1 if occurrence != 5 else 181.0,
            took=12.0 + 9 * occurrence,
            **ended,
        )


def _attempt(conn: psycopg.Connection[Any], id: str, session: str, ago: float, **more: Any) -> None:
    values: dict[str, Any] = {
        "id": id,
        "session": session,
        "ago": ago,
        "occurrence": 1,
        "attempt": 1,
        "outcome": "answered",
        "worker": "agents-0-7f4d",
        "calls": 1,
        "late": 0.04,
        "took": 20.0,
        "http": 200,
        "reason": None,
        "settled": "fired",
    }
    conn.execute(ATTEMPT.encode(), values | more)


def _failures(conn: psycopg.Connection[Any]) -> None:
    for n in range(10, 24):
        _attempt(
            conn,
            _id(n),
            _session(n),
            200 + 31 * n,
            worker="mail-0-90be",
            outcome="unavailable",
            http=503,
            reason="HTTP 503: upstream connect error",
            settled="pending",
            took=0.2,
        )
    for n in range(100, 112):
        id = FAILED if n == 100 else _id(n)
        out_of_memory = n % 3
        reason = (
            "HTTP 500: the tool `search` ran out of memory"
            if out_of_memory
            else "the run was cut off after 1,800 s (RECALL_RUN_TIMEOUT)"
        )
        _recall(
            conn,
            id,
            _session(n),
            -4_000 + 20 * n,
            status="'failed'",
            ended_at=f"now() - interval '{120 + 200 * (n - 100)} seconds'",
            last_outcome="'failed'" if out_of_memory else "'unknown'",
            reason="'" + reason + "'",
            attempt="3",
        )
        for attempt in (1, 2, 3):
            _attempt(
                conn,
                id,
                _session(n),
                121 + 200 * (n - 100) + 300 * (3 - attempt),
                attempt=attempt,
                outcome="failed" if out_of_memory else "unknown",
                http=500 if out_of_memory else None,
                reason=reason,
                settled="failed" if attempt == 3 else "pending",
                took=1.0,
                late=0.1 + 300 * (attempt - 1),
            )
