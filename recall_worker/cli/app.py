"""The commands and their options. A command's code is in its own file, imported when it runs."""

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
        bool, typer.Option("--check", help="Change nothing; exit 1 if there is something to do.")
    ] = False,
    roles: Annotated[
        bool,
        typer.Option(
            "--roles",
            help="Create recall_worker, recall_application, recall_reader and their grants.",
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
            help="Direct address for LISTEN, if the DSN is a pooler's (else RECALL_LISTEN_DSN).",
            metavar="DSN",
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
            help="The agent server's protocol (else RECALL_PROTOCOL, native).", metavar="NAME"
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
            help="Seconds that runs have to end (else RECALL_DRAIN_TIMEOUT, 30).", metavar="S"
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
        typer.Option("--embedded", help="Use a PostgreSQL installed by pip, and migrate it."),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(help="Where the embedded PostgreSQL keeps its data.", metavar="DIR"),
    ] = None,
) -> None:
    """Run a worker: claim due recalls, call the agent, settle. SIGTERM drains; a second one stops
    at once.

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
    session: Annotated[str, typer.Argument(help="The session to call.", metavar="SESSION")],
    message: Annotated[
        str, typer.Argument(help="The message that the agent gets then.", metavar="MESSAGE")
    ],
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
            help="Again and again at fixed distances from the first, however long runs take.",
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
        int | None, typer.Option(help="End it after this many occurrences.", metavar="N")
    ] = None,
    failures: Annotated[
        int | None, typer.Option(help="End it after this many failures in a row.", metavar="N")
    ] = None,
    grace: Annotated[
        str | None,
        typer.Option(
            help="An occurrence later than this is not run, but recorded as misfired.",
            metavar="DURATION",
        ),
    ] = None,
    jitter: Annotated[
        str | None,
        typer.Option(help="Delay each occurrence by a random part of this.", metavar="DURATION"),
    ] = None,
    comment: Annotated[
        str | None, typer.Option(help="A note that never leaves the database.", metavar="TEXT")
    ] = None,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Schedule a recall of a session; due at once if no time is given."""
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
            "--from", help="Start of the list, for an expression (else now).", metavar="ISO"
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="How many.", min=1, max=1000)] = 10,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """The next occurrences of an expression or a recall: local times with zone and offset."""
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
    offset: Annotated[int, typer.Option(help="Skip this many first.", min=0)] = 0,
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
    """Hold recalls back until they are resumed; the current run is not interrupted."""
    from .operate import pause

    pause(dsn, ids, as_json=json)


@app.command()
def resume(ids: Ids, dsn: Dsn = None, json: Json = False) -> None:
    """Resume paused recalls; occurrences missed meanwhile run once, with their number."""
    from .operate import resume

    resume(dsn, ids, as_json=json)


@app.command()
def retry(ids: Ids, dsn: Dsn = None, json: Json = False) -> None:
    """Run failed or cancelled recalls again, under a new key."""
    from .operate import retry

    retry(dsn, ids, as_json=json)


@app.command()
def fire(ids: Ids, dsn: Dsn = None, json: Json = False) -> None:
    """Run the next occurrence now; one that was called before keeps its key."""
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
    """Move a recall to another time; in mid-run, its next occurrence."""
    from .operate import reschedule

    reschedule(dsn, id, after=after, at=at, as_json=json)


@app.command()
def workers(dsn: Dsn = None, json: Json = False) -> None:
    """The running workers, and what they do."""
    from .inspect import workers

    workers(dsn, as_json=json)


@app.command()
def stats(dsn: Dsn = None, json: Json = False) -> None:
    """How many recalls wait, run, are overdue; the last hour's calls by outcome, and lateness."""
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
            help="Or how long each kind is kept, as in RECALL_PRUNE: 30d,failed=90d.",
            metavar="RETENTION",
        ),
    ] = None,
    status: Annotated[
        list[str] | None,
        typer.Option(
            help="Only recalls in this status, and no calls; may be repeated.", metavar="STATUS"
        ),
    ] = None,
    yes: Yes = False,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Delete old recalls that have ended, and records of old calls; in batches, blocking nobody."""
    from .prune import prune

    prune(dsn, older_than=older_than, keep=keep, statuses=status, yes=yes, as_json=json)


@app.command()
def doctor(dsn: Dsn = None, json: Json = False) -> None:
    """Check what the worker needs: database, rights, schema, notifications, pooler, endpoint,
    workers; and what waits, and why.

    Each line is ok, a note or a problem, with what to do; exit 1 if there is a problem, 3 if the
    database can't be reached. Nothing is changed and no agent is run: the endpoint is checked by
    GET. Settings are those of `run`, from the environment.
    """
    from .doctor import doctor

    doctor(dsn, as_json=json)


@app.command("check-endpoint")
def check_endpoint(
    session: Annotated[
        str,
        typer.Option(
            help="A session to probe: one that exists and that nobody uses.", metavar="ID"
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
    """Check by test calls whether an API keeps the run endpoint's contract; exit 1 if it does not.

    About ten short runs are started in the session. Token and signing secret come from the
    settings, as for `run`.
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
            envvar="RECALL_RUN_TOKEN", help="Bearer token that it requires.", show_envvar=True
        ),
    ] = None,
) -> None:
    """A small, correct run endpoint whose agent only waits: to try things out, and to read."""
    from ..contract.reference_api import serve

    serve(host, port, seconds=seconds, token=token, accept_after=accept_after)


@app.command()
def demo(
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the database and the log, and say where.")
    ] = False,
) -> None:
    """Show recalls scheduled and called by the real daemon, in about 20 seconds; nothing is left
    behind.
    """
    from ..demo.demo import demo

    demo(keep=keep)
