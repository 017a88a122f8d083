"""`check-endpoint`: does an API keep the run endpoint's contract? One line for each property."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from uuid import UUID, uuid4

import typer

from .. import settings as setting
from ..contract.check import FAIL, PASS, Check, Row
from ..contract.probes import REQUESTS
from ..events import escape_controls
from ..settings import Settings
from ..terminal import REFUSED, USAGE, Trouble, print_findings, print_json, tell


def check_endpoint(
    url: str | None, session: str, missing_session: str | None, *, timeout: float, as_json: bool
) -> None:
    """The command. Exit status 1 where a row failed."""
    try:
        settings = setting.read(needed=["run_url"], run_url=url)
    except setting.SettingsError as error:
        # Here it is no option, but the command's argument.
        name = setting.option("run_url")
        raise setting.SettingsError(
            [re.sub(f"^{name} ", "URL ", problem) for problem in error.problems]
        ) from None
    if settings.protocol != "native":
        raise Trouble(
            f"this checks the native protocol, and RECALL_PROTOCOL is {settings.protocol}",
            "RECALL_PROTOCOL=native",
            status=USAGE,
        )
    for option, id in (("--session", session), ("--missing-session", missing_session)):
        if id in ("", ".", "..") or any("\ud800" <= c <= "\udfff" for c in id or ""):
            raise Trouble(
                f"{option} {id!r} can't be a session's id",
                "the id that the application gave the session",
                status=USAGE,
            )
    began = time.monotonic()
    most = f"at most {REQUESTS} requests, and about ten short runs"
    tell(escape_controls(f"Probing {settings.run_url}, session {session}: {most}."))
    missing = missing_session or _made_up(session)
    rows, requests = asyncio.run(_checked(settings, session, missing, timeout))
    failed = [row for row in rows if row.finding.verdict == FAIL]
    if as_json:
        print_json(
            {
                "url": settings.run_url,
                "session": session,
                "verdict": FAIL if failed else PASS,
                "requests": requests,
                "seconds": round(time.monotonic() - began, 3),
                "rows": [row.shown() for row in rows],
            }
        )
    else:
        found = [(row.finding, row.property) for row in rows]
        print_findings([(f.verdict, property, f.seen, f.todo) for f, property in found])
    passed = sum(row.finding.verdict == PASS for row in rows)
    unshown = len(rows) - passed - len(failed)
    tell(f"{passed} passed, {len(failed)} failed, {unshown} not shown; {requests} requests.")
    if failed:
        raise typer.Exit(REFUSED)


async def _checked(
    settings: Settings, session: str, missing: str, timeout: float
) -> tuple[list[Row], int]:
    """The rows, and the number of requests made for them."""
    check = Check(settings, session, missing, timeout)
    return await check.rows(), check.requests


def _made_up(session: str) -> str:
    """An id of the same form, which no session has."""
    try:
        UUID(session)
        return str(uuid4())
    except ValueError:
        return f"missing-{secrets.token_hex(4)}"
