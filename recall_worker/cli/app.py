"""The commands and their options. What a command does stands in its own file and is imported when
it runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    name="recall-worker",
    help=(
        "Keeps an AI agent's promises to come back: calls what is due in PostgreSQL, on "
        "time, and accounts for it."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Dsn = Annotated[
    str | None,
    typer.Option(help="PostgreSQL (else RECALL_DSN).", metavar="DSN", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"recall-worker {version('recall-worker')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None: ...


@app.command()
def migrate(
    dsn: Dsn = None,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit 1 where something is to be done.")
    ] = False,
    roles: Annotated[
        bool,
        typer.Option(
            "--roles",
            help=(
                "Make the roles recall_worker, recall_application, recall_reader and their grants."
            ),
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Adopt the application's table, or create it, and bring the schema up to date."""
    from .migrate import migrate

    migrate(dsn, check=check, roles=roles, as_json=json)


@app.command()
def run(
    dsn: Dsn = None,
    listen_dsn: Annotated[
        str | None,
        typer.Option(
            help="PostgreSQL for LISTEN, past a pooler (else RECALL_LISTEN_DSN).", metavar="DSN"
        ),
    ] = None,
    run_url: Annotated[
        str | None, typer.Option(help="The run endpoint (else RECALL_RUN_URL).", metavar="URL")
    ] = None,
    ca_file: Annotated[
        str | None,
        typer.Option(
            help="Certificate authority of a private endpoint (else RECALL_CA_FILE).",
            metavar="FILE",
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="How the agent server speaks (else RECALL_PROTOCOL, native).", metavar="NAME"
        ),
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Runs at once (else RECALL_CONCURRENCY, 3).", metavar="N")
    ] = None,
    lease: Annotated[
        str | None, typer.Option(help="Seconds of a lease (else RECALL_LEASE, 60).", metavar="S")
    ] = None,
    drain_timeout: Annotated[
        str | None,
        typer.Option(
            help="Seconds that runs get to end (else RECALL_DRAIN_TIMEOUT, 30).", metavar="S"
        ),
    ] = None,
    ops_listen: Annotated[
        str | None,
        typer.Option(
            help="[HOST:]PORT of /livez, /readyz, /metrics (else RECALL_OPS_LISTEN, off).",
            metavar="ADDRESS",
        ),
    ] = None,
    log_level: Annotated[
        str | None,
        typer.Option(
            help="debug, info, warning, error (else RECALL_LOG_LEVEL, info).", metavar="LEVEL"
        ),
    ] = None,
    log_format: Annotated[
        str | None,
        typer.Option(help="auto, json, console (else RECALL_LOG_FORMAT, auto).", metavar="FORMAT"),
    ] = None,
    embedded: Annotated[
        bool,
        typer.Option("--embedded", help="Use a PostgreSQL that pip installed, and migrate it."),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(help="Where the embedded PostgreSQL keeps its data.", metavar="DIR"),
    ] = None,
) -> None:
    """Be a worker: claim what is due, call the agent, settle. SIGTERM drains; a second one stops at
    once.

    All settings are RECALL_* variables; these options win over them. Secrets come from
    RECALL_RUN_TOKEN, RECALL_SIGNING_SECRET, their _FILE forms, or systemd credentials of these
    names, and never from options.
    """
    from .run import run

    flags = {
        "dsn": dsn,
        "listen_dsn": listen_dsn,
        "run_url": run_url,
        "ca_file": ca_file,
        "protocol": protocol,
        "concurrency": concurrency,
        "lease": lease,
        "drain_timeout": drain_timeout,
        "ops_listen": ops_listen,
        "log_level": log_level,
        "log_format": log_format,
    }
    run(flags, embedded=embedded, data=data)


@app.command()
def schedule(
    session: Annotated[str, typer.Argument(help="The session to come back to.", metavar="SESSION")],
    message: Annotated[str, typer.Argument(help="What the agent is told then.", metavar="MESSAGE")],
    after: Annotated[
        str | None,
        typer.Option("--in", help="Once, after this long: 90s, 5m, 1h30m.", metavar="DURATION"),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            help="Once, at this time: 2027-01-31T09:00 (local time where no offset is given).",
            metavar="ISO",
        ),
    ] = None,
    every: Annotated[
        str | None,
        typer.Option(
            help=(
                "Again and again, this long after each run; first after one interval, or at "
                "--in or --at."
            ),
            metavar="DURATION",
        ),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="Again and again on a fixed grid from the first, however long runs take.",
            metavar="DURATION",
        ),
    ] = None,
    cron: Annotated[
        str | None,
        typer.Option(
            help=(
                "Again and again by five fields, minute hour day month weekday: '30 9 * * mon-fri'."
            ),
            metavar="EXPR",
        ),
    ] = None,
    tz: Annotated[
        str | None,
        typer.Option(
            help="The time zone of --cron (else UTC), and of --at and --until: Europe/Berlin.",
            metavar="ZONE",
        ),
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="No occurrence after this time.", metavar="ISO")
    ] = None,
    times: Annotated[
        int | None, typer.Option(help="So many occurrences, then no more.", metavar="N")
    ] = None,
    failures: Annotated[
        int | None, typer.Option(help="End it when so many in a row have failed.", metavar="N")
    ] = None,
    grace: Annotated[
        str | None,
        typer.Option(
            help="What is later than this is not run, but recorded as misfired.", metavar="DURATION"
        ),
    ] = None,
    jitter: Annotated[
        str | None,
        typer.Option(help="Put each occurrence off by a random part of this.", metavar="DURATION"),
    ] = None,
    comment: Annotated[
        str | None, typer.Option(help="A note that never leaves the database.", metavar="TEXT")
    ] = None,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Promise to come back to a session; at once where no time is given."""
    from .recalls import schedule

    schedule(
        dsn,
        session,
        message,
        after=after,
        at=at,
        every=every,
        grid=grid,
        cron=cron,
        time_zone=tz,
        until=until,
        times=times,
        failures=failures,
        grace=grace,
        jitter=jitter,
        comment=comment,
        as_json=json,
    )


@app.command()
def preview(
    what: Annotated[
        str,
        typer.Argument(
            help="A cron expression of five fields, or a recall's id.", metavar="EXPR|ID"
        ),
    ],
    tz: Annotated[
        str | None, typer.Option(help="The expression's time zone (else UTC).", metavar="ZONE")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", help="From this time on, of an expression (else now).", metavar="ISO"
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="How many.", min=1, max=1000)] = 10,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """When an expression, or a recall, falls next: the local times with their zone and offset."""
    from .preview import preview

    preview(dsn, what, time_zone=tz, start=start, count=count, as_json=json)


@app.command("list")
def list_recalls(
    session: Annotated[str | None, typer.Option(help="Of this session only.", metavar="ID")] = None,
    user: Annotated[
        str | None, typer.Option(help="Of sessions that this user owns.", metavar="ID")
    ] = None,
    status: Annotated[
        list[str] | None,
        typer.Option(help="In this status only; may be repeated.", metavar="STATUS"),
    ] = None,
    limit: Annotated[int, typer.Option(help="At most this many.", min=1)] = 50,
    offset: Annotated[int, typer.Option(help="Leave out this many first.", min=0)] = 0,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Recalls, newest trigger first."""
    from .recalls import list_recalls

    list_recalls(
        dsn, session=session, user=user, statuses=status, limit=limit, offset=offset, as_json=json
    )


@app.command()
def show(
    id: Annotated[str, typer.Argument(help="The recall.", metavar="ID")],
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """One recall, with its calls."""
    from .recalls import show

    show(dsn, id, as_json=json)


Ids = Annotated[list[str], typer.Argument(help="The recalls.", metavar="ID...")]
SomeIds = Annotated[list[str] | None, typer.Argument(help="The recalls.", metavar="[ID]...")]


@app.command()
def why(
    id: Annotated[str, typer.Argument(help="The recall.", metavar="ID")],
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Why a recall has not fired, or how it ended: one sentence, with its evidence."""
    from .inspect import why

    why(dsn, id, as_json=json)


@app.command()
def cancel(
    ids: SomeIds = None,
    session: Annotated[
        str | None, typer.Option(help="All live recalls of this session.", metavar="ID")
    ] = None,
    yes: Yes = False,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Cancel recalls, also in mid-run: the call is aborted at once, and nothing fires again."""
    from .operate import cancel

    cancel(dsn, ids or [], session=session, yes=yes, as_json=json)


@app.command()
def skip(
    ids: SomeIds = None,
    session: Annotated[
        str | None, typer.Option(help="The recurring recall of this session.", metavar="ID")
    ] = None,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Leave out one occurrence of a recurring recall; in mid-run, the one after the run."""
    from .operate import skip

    skip(dsn, ids or [], session=session, as_json=json)


@app.command()
def pause(ids: Ids, dsn: Dsn = None, json: Json = False) -> None:
    """Hold recalls back until they are resumed; a run that is open ends as it ends."""
    from .operate import pause

    pause(dsn, ids, as_json=json)


@app.command()
def resume(ids: Ids, dsn: Dsn = None, json: Json = False) -> None:
    """Let paused recalls go on; what fell due meanwhile runs once, and says how many were missed."""
    from .operate import resume

    resume(dsn, ids, as_json=json)


@app.command()
def retry(ids: Ids, dsn: Dsn = None, json: Json = False) -> None:
    """Run failed or cancelled recalls again, under a new key."""
    from .operate import retry

    retry(dsn, ids, as_json=json)


@app.command()
def fire(ids: Ids, dsn: Dsn = None, json: Json = False) -> None:
    """Make the occurrence that waits due now; one that was called before keeps its key."""
    from .operate import fire

    fire(dsn, ids, as_json=json)


@app.command()
def reschedule(
    id: Annotated[str, typer.Argument(help="The recall.", metavar="ID")],
    after: Annotated[
        str | None,
        typer.Option("--in", help="To this long from now: 90s, 5m, 1h30m.", metavar="DURATION"),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            help="To this time: 2027-01-31T09:00 (local time where no offset is given).",
            metavar="ISO",
        ),
    ] = None,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Move a recall; in mid-run, what comes after the run."""
    from .operate import reschedule

    reschedule(dsn, id, after=after, at=at, as_json=json)


@app.command()
def workers(dsn: Dsn = None, json: Json = False) -> None:
    """The workers that are about, and what they are doing."""
    from .inspect import workers

    workers(dsn, as_json=json)


@app.command()
def stats(dsn: Dsn = None, json: Json = False) -> None:
    """How many recalls wait, run, are overdue; what the last hour's calls came to, and how late
    they were.
    """
    from .inspect import stats

    stats(dsn, as_json=json)


@app.command()
def prune(
    older_than: Annotated[
        str | None, typer.Option(help="Ended longer ago than this: 30d.", metavar="DURATION")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="Or for how long what is kept, as RECALL_PRUNE says it: 30d,failed=90d.",
            metavar="RETENTION",
        ),
    ] = None,
    status: Annotated[
        list[str] | None,
        typer.Option(
            help="Recalls in this status only, and no marks; may be repeated.", metavar="STATUS"
        ),
    ] = None,
    yes: Yes = False,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Delete recalls that are final and old, and the marks of old calls; in batches, never in the
    way.
    """
    from .prune import prune

    prune(dsn, older_than=older_than, keep=keep, statuses=status, yes=yes, as_json=json)


@app.command()
def doctor(dsn: Dsn = None, json: Json = False) -> None:
    """Check what the worker needs: database, rights, schema, ring, pooler, endpoint, workers; and
    what waits, and why.

    Each line is ok, a note or a problem, with what to do; exit 1 where there is a problem, 3 where
    the database can't be reached. Nothing is changed and no agent is run: the endpoint is asked by
    GET. Settings are those of `run`, from the environment.
    """
    from .doctor import doctor

    doctor(dsn, as_json=json)


@app.command("check-endpoint")
def check_endpoint(
    session: Annotated[
        str,
        typer.Option(
            help="A session to probe: one that exists, and that nobody is in.", metavar="ID"
        ),
    ],
    url: Annotated[
        str | None, typer.Argument(help="The run endpoint (else RECALL_RUN_URL).", metavar="URL")
    ] = None,
    missing_session: Annotated[
        str | None,
        typer.Option(help="A session that does not exist (else one is made up).", metavar="ID"),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds that a request, and a run, may take.", metavar="S", min=1)
    ] = 120.0,
    json: Json = False,
) -> None:
    """Probe an API, harmlessly, for what the run endpoint's contract asks of it; exit 1 where it
    does not keep it.

    Some ten short runs are started in the session. Token and signing secret come from the settings,
    as for `run`.
    """
    from .check_endpoint import check_endpoint

    check_endpoint(url, session, missing_session, timeout=timeout, as_json=json)


@app.command("reference-api")
def reference_api(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8090,
    seconds: Annotated[
        float, typer.Option("--run-seconds", help="How long its agent runs.", min=0)
    ] = 0.5,
    accept_after: Annotated[
        float | None,
        typer.Option(
            help="Accept runs (202) that take longer than this; off by default.",
            metavar="SECONDS",
            min=0,
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="RECALL_RUN_TOKEN", help="Bearer token that it wants.", show_envvar=True
        ),
    ] = None,
) -> None:
    """A small, correct run endpoint with an agent that only waits: for trying things out, and to
    read.
    """
    from ..contract.reference_api import serve

    serve(host, port, seconds=seconds, token=token, accept_after=accept_after)


@app.command()
def demo(
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave database and log behind, and say where.")
    ] = False,
) -> None:
    """Promises made and kept before your eyes, by the real daemon, in some 20 seconds; then nothing
    is left.
    """
    from ..demo.demo import demo

    demo(keep=keep)
