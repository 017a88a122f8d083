"""`migrate`: bring the schema up to date, or say what is left to do."""

from __future__ import annotations

from .. import schema, settings
from ..database.identity import COPY_HINT, IS_A_COPY
from ..terminal import USAGE, Trouble, print_json, tell, warn_of_password


def migrate(
    dsn: str | None,
    *,
    schema_name: str | None,
    check: bool,
    roles: bool,
    foreign_key: str | None,
    here: bool,
    slots: int | None,
    as_json: bool,
) -> None:
    warn_of_password(dsn)
    if check and here:
        raise Trouble(
            "--check changes nothing, and --here does",
            "the same command with one of them",
            status=USAGE,
        )
    if slots is not None and not 1 <= slots <= schema.PENDING_MOST:
        raise Trouble(
            f"--slots is {slots}, and must be 1 to {schema.PENDING_MOST}",
            "--slots 5, for up to five pending recalls a session",
            status=USAGE,
        )
    chosen = settings.read(needed=["dsn"], dsn=dsn, schema=schema_name)
    address = chosen.dsn or ""
    if check:
        try:
            left = schema.pending(address, schema=chosen.schema, pending_most=slots)
        except schema.Refused as error:
            if as_json:
                refused = [{"what": b.what, "todo": b.todo} for b in error.blockers]
                print_json({"up_to_date": False, "pending": [], "refused": refused})
            raise
        if as_json:
            print_json({"up_to_date": not left, "pending": left})
        if left:
            raise Trouble(
                "the schema is not up to date; to be done: " + ", ".join(left),
                "recall-worker migrate" + ("" if slots is None else f" --slots {slots}"),
            )
        tell("The schema is up to date.")
        if schema.is_copy(address, schema=chosen.schema):
            tell(f"Note: {IS_A_COPY}. Try: {COPY_HINT}")
        return
    try:
        done = schema.migrate(
            address,
            tell,
            roles=roles,
            schema=chosen.schema,
            foreign_key=foreign_key,
            here=here,
            pending_most=slots,
        )
    except schema.Pooled:
        if dsn is not None or chosen.listen_dsn is None:
            raise
        tell("RECALL_DSN leads through a pooler: migrating by RECALL_LISTEN_DSN.")
        done = schema.migrate(
            chosen.listen_dsn,
            tell,
            roles=roles,
            schema=chosen.schema,
            foreign_key=foreign_key,
            here=here,
            pending_most=slots,
        )
    if as_json:
        print_json({"done": done})
    tell("Done." if done else "The schema was up to date.")
