"""`doctor`: one line for each finding: ok, note or problem, what was seen, what to do."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

import typer
from psycopg.conninfo import conninfo_to_dict

from .. import settings as setting
from ..doctor.doctor import examine
from ..doctor.examination import NOTE, OK, PROBLEM, Finding, verdict
from ..terminal import REFUSED, UNREACHABLE, print_findings, print_json, tell


def doctor(dsn: str | None, *, as_json: bool) -> None:
    """The command."""
    settings = setting.read(needed=["dsn"], dsn=dsn)
    for address in filter(None, (settings.dsn, settings.listen_dsn)):
        conninfo_to_dict(address)  # A DSN that can't be parsed is a usage error.
    unknown = []
    for name in setting.ignored():
        unknown.append(
            Finding(
                "settings",
                NOTE,
                f"{name} is not a setting of recall-worker and is ignored",
                "check its spelling",
            )
        )
    exam = asyncio.run(examine(settings))
    findings = [*unknown, *exam.findings]
    if as_json:
        rows = [
            {"check": f.check, "state": f.state, "seen": f.seen, "todo": f.todo} for f in findings
        ]
        print_json(
            {"version": version("recall-worker"), "verdict": verdict(findings), "checks": rows}
        )
    else:
        print_findings([(f.state, f.check, f.seen, f.todo) for f in findings])
    counts = {state: sum(f.state == state for f in findings) for state in (OK, NOTE, PROBLEM)}
    tell(
        ", ".join(
            f"{n} {state if n == 1 or state == OK else state + 's'}" for state, n in counts.items()
        )
        + "."
    )
    if not exam.reached:
        raise typer.Exit(UNREACHABLE)
    if counts[PROBLEM]:
        raise typer.Exit(REFUSED)
