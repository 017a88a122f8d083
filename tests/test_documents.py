"""`schema`: what the log and `--json` write is what their JSON Schemas say. (Every test with
daemons holds their lines against the schema, too: tests/support/daemon.py.)"""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import recall_worker
from recall_worker.cli.documents import documents
from recall_worker.events import COMMON, EVENTS, FIELDS, NULLABLE, Event, json_schema

from .conftest import Connection
from .support.application import Application
from .support.daemon import Daemons, check_events
from .support.endpoint import Endpoint
from .test_cli import operate
from .test_ledger import put

HOUSE = Path(recall_worker.__file__).parent
MADE = {
    "exc_info": "exception",
}
"""What is told under another name than it is written."""


def tellings() -> list[tuple[str, str, set[str], bool]]:
    """Where each event is told, its name, the fields that stand there, and whether more come."""
    found = []
    for file in sorted(HOUSE.rglob("*.py")):
        if "cli" in file.parts or file.name in ("events.py", "settler.py"):
            continue
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr == "tell"
                and call.args
            ):
                continue
            names = [
                n.value
                for n in ast.walk(call.args[0])
                if isinstance(n, ast.Constant) and n.value in EVENTS
            ]
            fields = {MADE.get(k.arg, k.arg) for k in call.keywords if k.arg is not None}
            more = any(k.arg is None for k in call.keywords)
            where = f"{file.name}:{call.lineno}"
            found += [(where, str(name), fields, more) for name in names]
    return found


@pytest.mark.slow
def test_what_is_told_is_what_is_declared() -> None:
    """Each place that tells an event gives the fields that are declared, and no others."""
    found = tellings()
    assert len({name for _, name, _, _ in found}) > 35
    for where, name, fields, more in found:
        event = EVENTS[name]
        assert fields <= {*event.fields, *event.optional}, where
        assert more or set(event.fields) <= fields or event.is_open, where


def test_every_field_is_declared_once() -> None:
    """No event has a field that is not described, and none is described that no event has."""
    used = {field for event in EVENTS.values() for field in (*event.fields, *event.optional)}
    assert used == set(FIELDS)
    assert not set(FIELDS) & set(COMMON)
    assert used >= NULLABLE
    assert not [name for name, event in EVENTS.items() if set(event.fields) & set(event.optional)]


@pytest.mark.parametrize("what", ["events", "json"])
def test_the_schemas_are_schemas(what: str) -> None:
    """Each is a valid JSON Schema, and printed whole."""
    said = operate(None, "schema", what)
    assert said.status == 0
    assert said.document == (json_schema() if what == "events" else documents())
    Draft202012Validator.check_schema(said.document)


def test_another_schema() -> None:
    """What is asked for is one of two."""
    assert operate(None, "schema", "nothing").status == 2


def test_a_line_that_is_not_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that all tests with daemons make finds a field that nobody declared."""
    line = {
        "event": "worker.ready",
        "level": "info",
        "timestamp": "2030-01-01T00:00:00Z",
        "worker": "w",
    }
    check_events([line])
    check_events([{"event": "anything", "logger": "psycopg"}])
    for wrong in ({**line, "more": 1}, {**line, "level": "error"}, {**line, "worker": 1}):
        with pytest.raises(AssertionError):
            check_events([wrong])
    assert isinstance(EVENTS["worker.ready"], Event)


async def test_a_run_is_told_as_it_is_described(
    database: str, db: Connection, daemons: Daemons, endpoint: Endpoint
) -> None:
    """A run in the log: started, with its key and its lag, then settled, once each; each line is
    one of the schema's as a whole."""
    daemon = await daemons.start(log_level="info")
    await db.execute("insert into sessions values ('s', 'ann')")
    await put(db, "s", 0.0, id="r")
    [settled] = await daemon.hears("recall.settled")
    [started] = daemon.told("recall.started")
    assert (started["recall"], started["session"], started["key"]) == ("r", "s", "r:1")
    assert (started["occurrence"], started["attempt"], started["missed"]) == (1, 1, 0)
    assert 0 <= started["lag_ms"] <= settled["lag_ms"]
    assert started["traceparent"] == settled["traceparent"]
    assert daemon.events.index(started) < daemon.events.index(settled)
    assert await daemon.stop() == 0
    whole = Draft202012Validator(json_schema())
    for line in daemon.events:
        whole.validate(line)


COMMANDS = [
    ("schedule t m --every 1h --in 1h", "schedule"),
    ("schedule u m --cron 0_9_*_*_*", "schedule"),
    ("list", "list"),
    ("show r", "show"),
    ("show r --limit 1", "show"),
    ("why r", "why"),
    ("why over", "why"),
    ("edit r --times 9", "edit"),
    ("skip r", "skip"),
    ("pause r", "pause"),
    ("resume r", "resume"),
    ("fire r", "fire"),
    ("reschedule r --in 1h", "reschedule"),
    ("cancel r", "cancel"),
    ("retry r", "retry"),
    ("show r", "show"),
    ("show over", "show"),
    ("actions", "actions"),
    ("events", "events"),
    ("events r", "events"),
    ("queues pause default", "queues pause"),
    ("queues", "queues"),
    ("stats", "stats"),
    ("queues resume default", "queues resume"),
    ("actions --action resume_queue", "actions"),
    ("workers", "workers"),
    ("preview r", "preview"),
    ("preview 0_9_*_*_*", "preview"),
    ("doctor", "doctor"),
    ("top", "top"),
    ("settings", "settings"),
    ("prune --older-than 30d --dry-run", "prune"),
    ("migrate", "migrate"),
    ("migrate --check", "migrate --check"),
    ("prune --older-than 30d --yes", "prune"),
]
ELSEWHERE = {"check-endpoint"}
"""Documents that tests/test_check_endpoint.py holds against the schema."""


@pytest.mark.slow
async def test_what_commands_write_is_what_is_described(
    database: str, db: Connection, daemons: Daemons, endpoint: Endpoint, app: Application
) -> None:
    """Each command's --json on real rows, against its schema; every command's schema is tried."""
    whole = documents()
    daemon = await daemons.start()
    await db.execute("insert into sessions values ('s', 'ann'), ('t', 'ann'), ('u', 'ann')")
    await put(db, "x", 0.0, id="over")
    await daemon.hears("recall.settled")
    await put(db, "s", 3600.0, id="r", call_type="recurring", interval_seconds=3600)
    tried = set()
    for line, name in COMMANDS:
        words = [word.replace("_", " ") if "*" in word else word for word in line.split()]
        said = await asyncio.to_thread(operate, database, *words, "--json")
        assert said.out, (line, said)
        schema = {**whole, "$ref": f"#/$defs/{name}"}
        errors = [
            f"{error.json_path}: {error.message}"
            for error in Draft202012Validator(schema).iter_errors(said.document)
        ]
        assert not errors, (line, errors)
        tried.add(name)
    rows = {"recall", "call", "action", "queue", "event"}
    assert tried | rows | ELSEWHERE == set(whole["$defs"])


def test_a_document_that_differs_is_found(database: str) -> None:
    """The schemas are closed: a name that nobody declared is an error."""
    document: dict[str, Any] = operate(database, "stats", "--json").document
    schema = Draft202012Validator({**documents(), "$ref": "#/$defs/stats"})
    schema.validate(document)
    assert list(schema.iter_errors({**document, "more": 1}))
    assert list(schema.iter_errors({k: v for k, v in document.items() if k != "live"}))
