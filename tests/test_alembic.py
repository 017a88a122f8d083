"""What Alembic is told about each object; test_orms shows what it makes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from recall_worker.alembic import include_object

RECALLS = SimpleNamespace(name="session_recalls")
ATTEMPTS = SimpleNamespace(name="recall_attempts")
MODEL = object()


@pytest.mark.parametrize(
    ("table", "name", "type_", "reflected", "compare_to", "included"),
    [
        (None, "recall_attempts", "table", True, None, False),
        (None, "recall_schema", "table", True, None, False),
        (None, "recall_attempts", "table", False, None, False),
        (None, "session_recalls", "table", True, MODEL, True),
        (None, "sessions", "table", True, None, True),
        (None, "recall_notes", "table", True, None, True),
        (RECALLS, "occurrence", "column", True, None, False),
        (RECALLS, "occurrence", "column", False, MODEL, False),
        (RECALLS, "status", "column", True, None, True),
        (RECALLS, "tenant", "column", True, None, True),
        (ATTEMPTS, "outcome", "column", True, None, False),
        (SimpleNamespace(name="other"), "occurrence", "column", True, None, True),
        (RECALLS, "idx_recalls_due", "index", True, None, False),
        (RECALLS, "idx_recalls_due_2", "index", True, None, False),
        (RECALLS, "idx_recalls_session_status", "index", True, None, False),
        (RECALLS, "idx_recalls_session_status", "index", False, MODEL, True),
        (RECALLS, "idx_recalls_active_pending", "unique_constraint", True, None, False),
        (RECALLS, "idx_of_the_application", "index", True, None, True),
        (RECALLS, None, "index", True, None, True),
        (ATTEMPTS, "anything", "index", True, None, False),
        (RECALLS, "session_recalls_status_known", "check_constraint", True, None, False),
        (RECALLS, "theirs", "check_constraint", True, None, True),
        (RECALLS, "session_recalls_session_id_fkey", "foreign_key_constraint", True, None, False),
        (RECALLS, "session_recalls_session_id_fkey", "foreign_key_constraint", True, MODEL, True),
        (RECALLS, "theirs", "foreign_key_constraint", True, None, True),
    ],
)
def test_what_is_compared(
    table: Any, name: str | None, type_: str, reflected: bool, compare_to: Any, included: bool
) -> None:
    """Ours is not; the application's is; its three indexes are never dropped."""
    of = SimpleNamespace(name=name, table=table)
    assert include_object(of, name, type_, reflected, compare_to) is included


def test_the_index_that_migrate_slots_has_put_there_is_no_difference() -> None:
    """The application's model has it over session_id alone, and a migration of that would allow a
    session one pending recall again."""
    name = "idx_recalls_active_pending"
    model, there = (
        SimpleNamespace(
            name=name, table=RECALLS, columns=[SimpleNamespace(name=column) for column in columns]
        )
        for columns in (["session_id"], ["session_id", "slot"])
    )
    assert include_object(model, name, "index", False, SimpleNamespace(name=name, columns=[]))
    assert not include_object(model, name, "index", False, there)
    assert not include_object(there, name, "index", True, None)
