"""`migrate`."""

from __future__ import annotations

from .. import schema, settings
from .talk import Trouble, print_json, tell


def migrate(dsn: str | None, *, check: bool, as_json: bool) -> None:
    address = settings.read(needed=["dsn"], dsn=dsn).dsn or ""
    if check:
        left = schema.pending(address)
        if as_json:
            print_json({"up_to_date": not left, "pending": left})
        if left:
            raise Trouble("the schema is not up to date; to be done: " + ", ".join(left), "recall-worker migrate")
        tell("The schema is up to date.")
        return
    done = schema.migrate(address, tell)
    if as_json:
        print_json({"done": done})
    tell("Done." if done else "The schema was up to date.")
