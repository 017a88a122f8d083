"""`prune`: delete what is final and old, and the marks of old calls, in batches that are never in anybody's way."""

from __future__ import annotations

from .. import statements
from ..recall import FINAL
from .recalls import connect
from .talk import USAGE, Trouble, confirmed, print_json, seconds, tell

BATCH = 2000
PAGES = 64
"""Pages of the table of attempts in a batch: some 2,500 marks."""


def prune(dsn: str | None, *, older_than: str, statuses: list[str] | None, yes: bool, as_json: bool) -> None:
    age = seconds(older_than, "--older-than")
    wrong = sorted(set(statuses or []) - set(FINAL))
    if wrong:
        raise Trouble(f"{', '.join(wrong)} is no final status", f"--status with one of {', '.join(FINAL)}", status=USAGE)
    what = f"{' and '.join(statuses)} recalls" if statuses else "recalls and marks of calls"
    if not yes and not confirmed(f"Delete {what} that ended more than {older_than} ago?"):
        raise Trouble("nothing was done", "the same with --yes")
    client = statements.load("client")
    recalls = marks = 0
    with connect(dsn) as conn:
        after: str | None = ""
        while after is not None:
            values = {"older_than": age, "batch": BATCH, "statuses": statuses or list(FINAL), "after": after}
            row = conn.execute(client["prune"].encode(), values).fetchone()
            assert row is not None
            recalls, after = recalls + row["deleted"], row["last"]
        first, more = 0, statuses is None
        while more:
            values = {"older_than": age, "first": first, "pages": PAGES}
            row = conn.execute(client["prune_attempts"].encode(), values).fetchone()
            assert row is not None
            marks, first, more = marks + row["deleted"], first + PAGES, row["more"]
    if as_json:
        print_json({"recalls": recalls, "calls": marks})
    tell(f"Deleted {recalls} recalls and the marks of {marks} calls.")
