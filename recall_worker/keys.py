"""Ids of recalls and sessions at the boundary: text, whatever type the application's columns have.

Owns what an id may be given as, which id a new recall gets, and the sentences that say why an id
does not fit. What a text means as a value of the column's type, PostgreSQL decides (recall_id and
recall_session in sql/).

Never here: SQL, connections.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, TypeAlias
from uuid import UUID, uuid4

Key: TypeAlias = str | UUID | int
"""An id as an application has it."""

UUID_LENGTH = 36
SHORT_LEAST = 16
"""Characters of a random id, at least: 64 bits."""


DEFAULT = "give the column a default, or have the application schedule the recall"


class UnfitKey(ValueError):
    """An id that its column can't hold, or none where one has to be given. `hint` says what to
    do."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


def text(key: Key) -> str:
    """The id as text. How PostgreSQL spells it may differ: it is read there. Raises TypeError for
    what is no id, as `None` would be the text None."""
    if not isinstance(key, str | UUID | int) or isinstance(key, bool):
        raise TypeError(f"an id is {repr(key)[:80]}: give a text, a UUID or a whole number")
    return str(key)


@dataclass(frozen=True, slots=True)
class Columns:
    """What the columns `id` and `session_id` of session_recalls take."""

    id_type: str
    """As PostgreSQL names it: `uuid`, `character varying(20)`."""
    most: int | None
    """Characters that `id` holds, where that is limited."""
    has_default: bool
    generated: bool
    """Whether `id` takes no value from an insert."""
    session_type: str

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """From a row of the statement `keys`."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    def new_id(self, given: str | None) -> str | None:
        """The id of a new recall: the one that was given, or a random one. None: the column's
        default is to give it. Raises UnfitKey."""
        if self.generated:
            if given is not None:
                raise UnfitKey("session_recalls.id is generated", "leave the id out")
            return None
        if given is not None:
            if self.most is not None and len(given) > self.most:
                raise self._unfit(given)
            return given
        if self.id_type not in ("text", "uuid") and not self.id_type.startswith("character"):
            return None
        if self.most is None or self.most >= UUID_LENGTH:
            return str(uuid4())
        if self.has_default:
            return None
        if self.most < SHORT_LEAST:
            raise UnfitKey(
                f"give an id: session_recalls.id is {self.id_type} without a default, "
                "too short for a random one",
                DEFAULT,
            )
        return secrets.token_hex(UUID_LENGTH)[: self.most]

    def refusal(self, column: str | None, given: str | None, session: str) -> UnfitKey | None:
        """Why the insert found null in this column; None where no id is the cause."""
        if column == "id":
            if given is not None:
                return self._unfit(given)
            return UnfitKey(
                f"give an id: session_recalls.id is {self.id_type} without a default", DEFAULT
            )
        if column == "session_id":
            return UnfitKey(
                f"{session!r} can't be a session's id: session_recalls.session_id is "
                f"{self.session_type}",
                "the id that the application gave the session",
            )
        return None

    def _unfit(self, given: str) -> UnfitKey:
        return UnfitKey(
            f"the id {given!r} does not fit session_recalls.id: it is {self.id_type}", "another id"
        )


TEXT = Columns("text", None, False, False, "text")
"""The columns as `migrate` creates them."""


def pending_most(violated: Mapping[str, Any] | None) -> int | None:
    """How many pending recalls a session may have, where a violated unique index is the one that
    holds it to that many; None where it is another. `violated`: the row of that statement, if there
    is one."""
    if violated is None or not violated["of_session"]:
        return None
    return int(violated["most"] or 1)
