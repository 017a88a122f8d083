"""`migrate`: bring the schema up to date, or say what is left to do."""

from __future__ import annotations

from .. import schema, settings
from ..terminal import Trouble, print_json, tell, warn_of_password


def migrate(dsn: str | None, *, check: bool, roles: bool, as_json: bool) -> None:
    warn_of_password(dsn)
    chosen = settings.read(needed=["dsn"], dsn=dsn)
    address = chosen.dsn or ""
    if check:
        left = schema.pending(address)
        if as_json:
            print_json({"up_to_date": not left, "pending": left})
        if left:
            raise Trouble(
                "the schema is not up to date; to be done: " + ", ".join(left),
                "recall-worker migrate",
            )
        tell("The schema is up to date.")
        return
    try:
        done = schema.migrate(address, tell, roles=roles)
    except schema.Pooled:
        if dsn is not None or chosen.listen_dsn is None:
            raise
        tell("RECALL_DSN leads through a pooler: migrating by RECALL_LISTEN_DSN.")
        done = schema.migrate(chosen.listen_dsn, tell, roles=roles)
    if as_json:
        print_json({"done": done})
    tell("Done." if done else "The schema was up to date.")
