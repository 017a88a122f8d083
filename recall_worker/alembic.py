"""For the env.py of an application that uses Alembic: keeps `alembic revision --autogenerate` and
`alembic check` away from what is recall-worker's.

    from recall_worker.alembic import include_object

    context.configure(..., include_object=include_object)

An application with a rule of its own asks both: `include_object(*of) and mine(*of)`.

What is recall-worker's stands in the record of the schema as released. Whatever else the
application has, on session_recalls too, is compared as before. Alembic itself is not imported.

Never here: a connection to a database.
"""

from __future__ import annotations

import re
from typing import Any

from .schema.released import APPLICATION, RECALLS, released

FOREIGN_KEY = "session_recalls_session_id_fkey"
"""The key that `migrate --foreign-key sessions` adds."""
SLOT = "slot"


def include_object(
    object: Any, name: str | None, type_: str, reflected: bool, compare_to: Any
) -> bool:
    """Whether Alembic may compare this object, and so create, alter or drop it. The parameters are
    those of Alembic's `include_object`."""
    record = released()
    table = getattr(object, "table", None)
    of = getattr(object, "name", None) if type_ == "table" else getattr(table, "name", None)
    if of is None or of not in record.tables:
        return True
    if of != RECALLS:
        return False
    ours = record.tables[RECALLS]
    only_there = reflected and compare_to is None
    match type_:
        case "column":
            column = ours.columns.get(str(name))
            return column is None or column.since == APPLICATION
        case "index" | "unique_constraint" if _has_slots(object) or _has_slots(compare_to):
            # What `migrate --slots` has put in the place of the application's.
            return False
        case "index" | "unique_constraint":
            index = ours.indexes.get(re.sub(r"_\d+$", "", str(name))) or ours.indexes.get(str(name))
            # The application's own three are dropped by nobody, as workers count on them.
            return index is None or (index.since == APPLICATION and not only_there)
        case "check_constraint":
            check = ours.constraints.get(str(name))
            return check is None or (check.since == APPLICATION and not only_there)
        case "foreign_key_constraint":
            return not (only_there and name == FOREIGN_KEY)
        case _:
            return True


def _has_slots(object: Any) -> bool:
    """Whether an index is one over the slots of a session."""
    columns = getattr(object, "columns", None) or ()
    return any(getattr(column, "name", None) == SLOT for column in columns)
