"""The commands and their options. A command's code is in its own file, imported when it runs."""

from __future__ import annotations

from enum import StrEnum
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


def _statuses(incomplete: str) -> list[str]:
    from ..recall import STATUSES

    return [status for status in STATUSES if status.startswith(incomplete)]


def _states(incomplete: str) -> list[str]:
    from ..selection import STATES

    return [state for state in STATES if state.startswith(incomplete)]


def _final_statuses(incomplete: str) -> list[str]:
    from ..recall import FINAL

    return [status for status in FINAL if status.startswith(incomplete)]


def _ids(context: typer.Context, incomplete: str) -> list[str]:
    from .completion import ids

    return ids(context.params.get("dsn"), incomplete)


def _queues(context: typer.Context, incomplete: str) -> list[str]:
    from .completion import queues

    return queues(context.params.get("dsn"), incomplete)


Dsn = Annotated[
    str | None,
    typer.Option(help="PostgreSQL's address (else RECALL_DSN).", metavar="DSN", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Queue = Annotated[
    str,
    typer.Option(
        help="The queue; only its workers claim the recall.", metavar="NAME", autocompletion=_queues
    ),
]
Id = Annotated[str, typer.Argument(help="The recall.", metavar="ID", autocompletion=_ids)]
NowIfPast = Annotated[
    bool, typer.Option("--now-if-past", help="Run now if --at is past, which is refused otherwise.")
]
SinceTime = Annotated[
    str | None,
    typer.Option(help="Since then: 1h, or 2027-01-31T09:00.", metavar="DURATION|ISO"),
]
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
            "--version", "-V", callback=_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None: ...


@app.command()
def migrate(
    dsn: Dsn = None,
    schema: Annotated[
        str | None,
        typer.Option(
            help="The schema that has, or is to have, session_recalls (else RECALL_SCHEMA).",
            metavar="NAME",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit 1 if there is something to do.")
    ] = False,
    roles: Annotated[
        bool,
        typer.Option(
            "--roles",
            help="Create the roles recall_worker, recall_application, _agent, _reader.",
        ),
    ] = False,
    foreign_key: Annotated[
        str | None,
        typer.Option(
            "--foreign-key",
            help="Make session_id refer to the id of this table.",
            metavar="TABLE",
        ),
    ] = None,
    here: Annotated[
        bool,
        typer.Option(
            "--here",
            help="Work on this database, although it is a copy (after a restore).",
        ),
    ] = False,
    slots: Annotated[
        int | None,
        typer.Option(
            "--slots",
            help="Let a session have so many pending recalls, 1 to 100; 1 is the "
            "application's own rule. Without it: as before.",
            metavar="N",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Adopt or create the table, and update the schema.

    The application's own table session_recalls is adopted where it stands, and created where there
    is none. What would be in the way is told before anything is changed.
    """
    from .migrate import migrate

    migrate(
        dsn,
        schema_name=schema,
        check=check,
        roles=roles,
        foreign_key=foreign_key,
        here=here,
        slots=slots,
        as_json=json,
    )


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
    queue: Annotated[
        str | None,
        typer.Option(
            help="The queues to claim from, separated by commas (else RECALL_QUEUE, default).",
            metavar="NAMES",
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
    paused: Annotated[
        bool,
        typer.Option("--paused", help="Start, but claim nothing (else RECALL_PAUSED)."),
    ] = False,
    embedded: Annotated[
        bool,
        typer.Option("--embedded", help="Use a PostgreSQL installed by pip, and migrate it."),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(help="Where the embedded PostgreSQL keeps its data.", metavar="DIR"),
    ] = None,
) -> None:
    """Run a worker: claim due recalls, call the agent, settle.

    SIGTERM drains: nothing more is claimed, and current runs may end. A second one stops at once.

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
        "queue": queue,
        "concurrency": concurrency,
        "lease": lease,
        "drain_timeout": drain_timeout,
        "ops_listen": ops_listen,
        "log_level": log_level,
        "log_format": log_format,
        "paused": True if paused else None,
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
            help=(
                "Once, at this time: 2027-01-31T09:00 (local time, or that of --tz, where no "
                "offset is given)."
            ),
            metavar="ISO",
        ),
    ] = None,
    now_if_past: NowIfPast = False,
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
        str | None,
        typer.Option(
            help="No occurrence after this time; a date alone includes that day.", metavar="ISO"
        ),
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
    queue: Queue = "default",
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Schedule a recall; due at once if no time is given."""
    from .recalls import schedule

    schedule(
        dsn,
        session,
        message,
        after=after,
        at=at,
        now_if_past=now_if_past,
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
        queue=queue,
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
    """Show the next occurrences of a cron expression or recall.

    Local times, with zone and offset.
    """
    from .preview import preview

    preview(dsn, what, time_zone=tz, start=start, count=count, as_json=json)


# The filters: recall_worker/selection.py says what each may be.
States = Annotated[
    list[str] | None,
    typer.Option(
        "--state",
        help=(
            "due, overdue, in-run, deferred, paused, waiting, live, failed, fired, cancelled or "
            "ended; may be repeated."
        ),
        metavar="STATE",
        autocompletion=_states,
    ),
]
Statuses = Annotated[
    list[str] | None,
    typer.Option(
        "--status",
        help="The column status; may be repeated.",
        metavar="STATUS",
        autocompletion=_statuses,
    ),
]
InQueue = Annotated[
    str | None,
    typer.Option("--queue", help="In this queue only.", metavar="NAME", autocompletion=_queues),
]
InSession = Annotated[
    str | None,
    typer.Option("--session", help="Of this session only; a * stands for any text.", metavar="ID"),
]
OfUser = Annotated[
    str | None, typer.Option("--user", help="Of sessions that this user owns.", metavar="ID")
]
Since = Annotated[
    str | None,
    typer.Option("--since", help="To which something happened within: 1h.", metavar="DURATION"),
]
LastOutcome = Annotated[
    str | None,
    typer.Option(
        "--outcome", help="Whose last call ended so (busy, unknown, refused, …).", metavar="OUTCOME"
    ),
]
Most = Annotated[
    int | None,
    typer.Option("--limit", help="Act on at most this many.", min=1, show_default=False),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show which recalls are meant, and change nothing.")
]


def _filters(
    state: list[str] | None,
    status: list[str] | None,
    queue: str | None,
    session: str | None,
    user: str | None,
    since: str | None,
    outcome: str | None,
    limit: int | None,
) -> dict[str, str | list[str] | None]:
    """The filters by their names, None for what is not given."""
    return {
        "state": state or None,
        "status": status or None,
        "queue": queue,
        "session": session,
        "user": user,
        "since": since,
        "outcome": outcome,
        "limit": None if limit is None else str(limit),
    }


@app.command("list")
def list_recalls(
    state: States = None,
    status: Statuses = None,
    queue: InQueue = None,
    session: InSession = None,
    user: OfUser = None,
    since: Since = None,
    outcome: LastOutcome = None,
    sort: Annotated[
        str | None,
        typer.Option(
            help=(
                "due (by when it is due; so are due, overdue, deferred and waiting ones) or newest "
                "(newest trigger first)."
            ),
            metavar="ORDER",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="At most this many (else 50).", min=1, show_default=False),
    ] = None,
    offset: Annotated[int, typer.Option(help="Skip this many first.", min=0)] = 0,
    watch: Annotated[
        bool, typer.Option("--watch", help="Redraw it every second, until q or Ctrl-C.")
    ] = False,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Recalls: all, or those that every filter fits.

    States: due: its time has come, and nobody has it in hand · overdue: due for over a minute ·
    in-run: a worker runs it now, whatever its status · deferred: to be called again · paused ·
    waiting: neither in a run nor paused · live: waiting, paused or in a run · failed, fired,
    cancelled · ended: any of these three.
    """
    from .listing import list_recalls

    given = _filters(state, status, queue, session, user, since, outcome, limit)
    given |= {"sort": sort, "offset": None if offset == 0 else str(offset)}
    list_recalls(dsn, given, watch=watch, as_json=json)


@app.command()
def show(
    id: Id,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Its latest calls and actions, at most this many (else 10; --json: all).",
            min=1,
            show_default=False,
        ),
    ] = None,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """One recall and its story: calls and actions.

    The latest come first.
    """
    from .story import show

    show(dsn, id, limit=limit, as_json=json)


@app.command()
def actions(
    id: Annotated[
        str | None,
        typer.Argument(
            help="Of this recall only.", metavar="ID", show_default=False, autocompletion=_ids
        ),
    ] = None,
    since: SinceTime = None,
    actor: Annotated[
        str | None,
        typer.Option(help="Of this person or program; the host may be left out.", metavar="NAME"),
    ] = None,
    action: Annotated[
        list[str] | None,
        typer.Option(help="Of this kind only, such as cancel; may be repeated.", metavar="ACTION"),
    ] = None,
    limit: Annotated[int, typer.Option(help="At most this many.", min=1)] = 50,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Who did what to recalls and queues, and when.

    The latest come first, with the values before and after.
    """
    from .story import actions

    actions(dsn, id, since=since, actor=actor, words=action, limit=limit, as_json=json)


@app.command()
def events(
    id: Annotated[
        str | None,
        typer.Argument(
            help="Of this recall only.", metavar="ID", show_default=False, autocompletion=_ids
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what happens, until Ctrl-C.")
    ] = False,
    since: SinceTime = None,
    limit: Annotated[int, typer.Option(help="At most this many that are past.", min=0)] = 50,
    dsn: Dsn = None,
    json: Annotated[
        bool,
        typer.Option("--json", help="One JSON document; with --follow one on each line."),
    ] = False,
) -> None:
    """Calls and actions in the order of time.

    Of the last hour, or all of one recall.
    """
    from .events import events

    events(dsn, id, follow=follow, since=since, limit=limit, as_json=json)


SomeIds = Annotated[
    list[str] | None,
    typer.Argument(
        help="The recalls: ids, or their first 6 characters and more.",
        metavar="ID",
        autocompletion=_ids,
    ),
]


@app.command()
def why(
    id: Id,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Say why a recall has not fired yet, or how it ended.

    One sentence, with its evidence: what it waits for, or when, how and by whom it was ended.
    """
    from .inspect import why

    why(dsn, id, as_json=json)


@app.command()
def cancel(
    ids: SomeIds = None,
    state: States = None,
    status: Statuses = None,
    queue: InQueue = None,
    session: InSession = None,
    user: OfUser = None,
    since: Since = None,
    outcome: LastOutcome = None,
    limit: Most = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Cancel recalls, also in mid-run; nothing fires again.

    The call of a current run is aborted at once.

    By ids, or all live ones that the filters find: then it shows which, and asks. --session alone
    is that session's.
    """
    from .operate import cancel

    given = _filters(state, status, queue, session, user, since, outcome, limit)
    cancel(dsn, ids or [], given, dry_run=dry_run, yes=yes, as_json=json)


@app.command()
def skip(
    ids: SomeIds = None,
    session: Annotated[
        str | None, typer.Option(help="The recurring recall of this session.", metavar="ID")
    ] = None,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Leave out one occurrence of a recurring recall.

    In mid-run, the one after the run.
    """
    from .operate import skip

    skip(dsn, ids or [], session=session, as_json=json)


@app.command()
def pause(
    ids: SomeIds = None,
    state: States = None,
    status: Statuses = None,
    queue: InQueue = None,
    session: InSession = None,
    user: OfUser = None,
    since: Since = None,
    outcome: LastOutcome = None,
    limit: Most = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Hold recalls back until they are resumed.

    The current run is not interrupted.

    By ids, or all live ones that the filters find: then it shows which, and asks.
    """
    from .operate import pause

    given = _filters(state, status, queue, session, user, since, outcome, limit)
    pause(dsn, ids or [], given, dry_run=dry_run, yes=yes, as_json=json)


@app.command()
def resume(
    ids: SomeIds = None,
    state: States = None,
    status: Statuses = None,
    queue: InQueue = None,
    session: InSession = None,
    user: OfUser = None,
    since: Since = None,
    outcome: LastOutcome = None,
    limit: Most = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Let paused recalls run again.

    What was missed meanwhile runs once, and the agent is told how many occurrences that stands for.

    By ids, or all paused ones that the filters find: then it shows which, and asks.
    """
    from .operate import resume

    given = _filters(state, status, queue, session, user, since, outcome, limit)
    resume(dsn, ids or [], given, dry_run=dry_run, yes=yes, as_json=json)


@app.command()
def retry(
    ids: SomeIds = None,
    state: States = None,
    status: Statuses = None,
    queue: InQueue = None,
    session: InSession = None,
    user: OfUser = None,
    since: Since = None,
    outcome: LastOutcome = None,
    limit: Most = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Run failed or cancelled recalls again, under a new key.

    By ids, or all failed ones that the filters find (--state cancelled for those): then it shows
    which, and asks.
    """
    from .operate import retry

    given = _filters(state, status, queue, session, user, since, outcome, limit)
    retry(dsn, ids or [], given, dry_run=dry_run, yes=yes, as_json=json)


@app.command()
def fire(
    ids: SomeIds = None,
    state: States = None,
    status: Statuses = None,
    queue: InQueue = None,
    session: InSession = None,
    user: OfUser = None,
    since: Since = None,
    outcome: LastOutcome = None,
    limit: Most = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Run the next occurrence now.

    Of a recurring recall that waits, this is an extra run: its schedule stays as it is. An
    occurrence that was called before keeps its key.

    By ids, or all waiting ones that the filters find: then it shows which, and asks.
    """
    from .operate import fire

    given = _filters(state, status, queue, session, user, since, outcome, limit)
    fire(dsn, ids or [], given, dry_run=dry_run, yes=yes, as_json=json)


@app.command()
def reschedule(
    ids: SomeIds = None,
    after: Annotated[
        str | None,
        typer.Option("--in", help="To this long from now: 90s, 5m, 1h30m.", metavar="DURATION"),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            help=(
                "To this time: 2027-01-31T09:00 (local time, or that of --tz, where no offset is "
                "given)."
            ),
            metavar="ISO",
        ),
    ] = None,
    tz: Annotated[
        str | None, typer.Option(help="The time zone of --at: Europe/Berlin.", metavar="ZONE")
    ] = None,
    now_if_past: NowIfPast = False,
    state: States = None,
    status: Statuses = None,
    queue: InQueue = None,
    session: InSession = None,
    user: OfUser = None,
    since: Since = None,
    outcome: LastOutcome = None,
    limit: Most = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Move a recall to another time.

    In mid-run, this is the time of what comes after the run.

    By ids, or all live ones that the filters find: then it shows which, and asks.
    """
    from .operate import reschedule

    given = _filters(state, status, queue, session, user, since, outcome, limit)
    reschedule(
        dsn,
        ids or [],
        given,
        after=after,
        at=at,
        time_zone=tz,
        now_if_past=now_if_past,
        dry_run=dry_run,
        yes=yes,
        as_json=json,
    )


@app.command()
def edit(
    id: Id,
    every: Annotated[
        str | None,
        typer.Option(help="It recurs this long after each run.", metavar="DURATION"),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="It recurs at fixed distances, however long runs take.", metavar="DURATION"
        ),
    ] = None,
    cron: Annotated[
        str | None,
        typer.Option(
            help="It recurs by five fields, minute hour day month weekday: '30 9 * * mon-fri'.",
            metavar="EXPR",
        ),
    ] = None,
    tz: Annotated[
        str | None,
        typer.Option(
            help=(
                "The time zone of its cron expression; with --until and without --cron only that "
                "of --until. none: UTC."
            ),
            metavar="ZONE",
        ),
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="No occurrence after this time.", metavar="ISO|none")
    ] = None,
    times: Annotated[
        str | None,
        typer.Option(help="End it after this many occurrences, from its first.", metavar="N|none"),
    ] = None,
    failures: Annotated[
        str | None,
        typer.Option(help="End it after this many failures in a row.", metavar="N|none"),
    ] = None,
    grace: Annotated[
        str | None,
        typer.Option(
            help="An occurrence later than this is not run, but recorded as misfired.",
            metavar="DURATION|none",
        ),
    ] = None,
    jitter: Annotated[
        str | None,
        typer.Option(
            help="Delay each occurrence by a random part of this.", metavar="DURATION|none"
        ),
    ] = None,
    message: Annotated[
        str | None, typer.Option(help="The message that the agent gets.", metavar="TEXT")
    ] = None,
    comment: Annotated[
        str | None,
        typer.Option(help="The note that never leaves the database.", metavar="TEXT|none"),
    ] = None,
    queue: Annotated[
        str | None,
        typer.Option(
            help="Workers of this queue claim it from now on.",
            metavar="NAME",
            autocompletion=_queues,
        ),
    ] = None,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Change a recall; what is not named stays as it is.

    It may wait, be paused, or be in a run. The word none takes a value away. The current run is not
    interrupted, and what has fallen due is still owed; what follows it follows the new rule.
    --every, --grid and --cron make a one-shot recurring.
    """
    from .operate import edit

    edit(
        dsn,
        id,
        every=every,
        grid=grid,
        cron=cron,
        time_zone=tz,
        until=until,
        times=times,
        failures=failures,
        grace=grace,
        jitter=jitter,
        message=message,
        comment=comment,
        queue=queue,
        as_json=json,
    )


@app.command()
def workers(dsn: Dsn = None, json: Json = False) -> None:
    """The running workers, and what they do."""
    from .inspect import workers

    workers(dsn, as_json=json)


queues = typer.Typer(help="Show the queues, and pause or resume them.")
app.add_typer(queues, name="queues", invoke_without_command=True)
Queues = Annotated[
    list[str] | None,
    typer.Argument(help="The queues.", metavar="NAME", autocompletion=_queues),
]


@queues.callback()
def queues_table(context: typer.Context, dsn: Dsn = None, json: Json = False) -> None:
    """Show the queues, and pause or resume them.

    Of each: what it holds, who serves it, and whether it is paused.
    """
    if context.invoked_subcommand is None:
        from .queues import show

        show(dsn, as_json=json)
        return
    # What is given before the word counts, too.
    context.obj = {"dsn": dsn, "json": json}


@queues.command("pause")
def queues_pause(
    context: typer.Context,
    names: Queues = None,
    every: Annotated[bool, typer.Option("--all", help="All queues, also future ones.")] = False,
    reason: Annotated[
        str | None, typer.Option(help="The reason, shown to others.", metavar="TEXT")
    ] = None,
    yes: Yes = False,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Claim nothing from these queues until they are resumed.

    Current runs are not interrupted.
    """
    from .queues import pause

    before = context.obj or {}
    pause(
        dsn or before.get("dsn"),
        names or [],
        every=every,
        reason=reason,
        yes=yes,
        as_json=json or before.get("json", False),
    )


@queues.command("resume")
def queues_resume(
    context: typer.Context,
    names: Queues = None,
    every: Annotated[bool, typer.Option("--all", help="All that are paused.")] = False,
    yes: Yes = False,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Claim from these queues again, at once."""
    from .queues import resume

    before = context.obj or {}
    resume(
        dsn or before.get("dsn"),
        names or [],
        every=every,
        yes=yes,
        as_json=json or before.get("json", False),
    )


@app.command()
def stats(dsn: Dsn = None, json: Json = False) -> None:
    """Count what waits, runs and is overdue; recent calls.

    Calls are those of the last hour, by outcome, with their lateness.
    """
    from .inspect import stats

    stats(dsn, as_json=json)


@app.command()
def top(
    needle: Annotated[
        str | None,
        typer.Option(
            "--filter",
            help="Only recalls with this text in their id, session or queue.",
            metavar="TEXT",
        ),
    ] = None,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """A live screen of what is due, runs and failed.

    With counts and workers; q ends it. Keys: / filter, s section, arrows scroll, p hold the
    picture, ? help. In a pipe, or with --json, one picture.
    """
    from ..top.screen import top

    raise typer.Exit(top(dsn, needle=needle, as_json=json))


@app.command()
def console(
    dsn: Dsn = None,
    console_listen: Annotated[
        str | None,
        typer.Option(
            help="[HOST:]PORT of the pages (else RECALL_CONSOLE_LISTEN, 127.0.0.1:9465).",
            metavar="ADDRESS",
        ),
    ] = None,
    log_level: Annotated[
        str | None,
        typer.Option(
            help="debug, info, warning, error (else RECALL_LOG_LEVEL, info).", metavar="LEVEL"
        ),
    ] = None,
) -> None:
    """Serve live pages for people, in a browser.

    What runs, what waits and why, what comes, who did what; and the commands as buttons. On this
    host's own loopback nobody is asked who they are; elsewhere it takes RECALL_CONSOLE_TOKEN, or a
    proxy that says who the user is: docs/console.md. With an account that only reads, the pages
    only show.
    """
    from .console import console

    console({"dsn": dsn, "console_listen": console_listen, "log_level": log_level})


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
            help="Only recalls in this status, and no records; may be repeated.",
            metavar="STATUS",
            autocompletion=_final_statuses,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show how much would be deleted, and delete nothing.")
    ] = False,
    yes: Yes = False,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Delete old recalls that have ended, and old records.

    Records are those of calls, actions and failures. It shows how many of each
    kind, and asks; it works in batches, and blocks nobody.
    """
    from .prune import prune

    prune(
        dsn,
        older_than=older_than,
        keep=keep,
        statuses=status,
        dry_run=dry_run,
        yes=yes,
        as_json=json,
    )


class Written(StrEnum):
    """What this program writes for other programs."""

    events = "events"
    json = "json"


@app.command()
def schema(
    what: Annotated[
        Written,
        typer.Argument(
            help="events: the log's lines. json: the documents of --json.", metavar="events|json"
        ),
    ],
) -> None:
    """The JSON Schema of the log, or of --json.

    Of the log's events, or of each command's document.
    """
    from .documents import show

    show(what.value)


@app.command()
def mcp(
    http: Annotated[
        str | None,
        typer.Option(
            help="Serve over HTTP here, path /mcp, in place of stdin and stdout.",
            metavar="[HOST:]PORT",
        ),
    ] = None,
    dsn: Dsn = None,
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
) -> None:
    """Serve an agent's tools over MCP: schedule, list, cancel.

    On stdin and stdout for one session, the one in RECALL_MCP_SESSION, which whoever starts the
    command sets. With --http for every session: each request has a bearer token that the
    application signs for its session (RECALL_TOKEN_KEY; see `recall-worker token`).

    An agent reaches the recalls of its own session and no others. It needs the extra mcp.
    docs/agents.md.
    """
    from .mcp import serve

    serve({"dsn": dsn, "log_level": log_level, "log_format": log_format}, http)


@app.command()
def token(
    session: Annotated[
        str, typer.Argument(help="The session whose recalls it opens.", metavar="SESSION")
    ],
    ttl: Annotated[
        str, typer.Option(help="How long it is valid, 30d at most.", metavar="DURATION")
    ] = "1h",
    audience: Annotated[
        str | None,
        typer.Option(
            help="The server that it is for (else RECALL_TOKEN_AUDIENCE, recall-worker).",
            metavar="NAME",
        ),
    ] = None,
) -> None:
    """Sign a token by which a session's agent calls `mcp`.

    It is signed with the first key of RECALL_TOKEN_KEY, and printed alone on stdout. Whoever has it
    can act on this session's recalls until it ends.
    """
    from .token import token

    token(session, ttl=ttl, audience=audience)


@app.command()
def settings(json: Json = False) -> None:
    """Show all settings, and where each comes from.

    An origin is default, environment, file (named by a variable that ends in _FILE) or credential
    (systemd's). Of a secret it only says whether it is set. If a setting is wrong, all problems are
    told behind the table, with exit status 2.
    """
    from .settings import show

    show(as_json=json)


@app.command()
def doctor(dsn: Dsn = None, json: Json = False) -> None:
    """Check what the worker needs, and say what waits, and why.

    That is: database, rights, schema, notifications, pooler, endpoint, workers.

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
    """Check whether an API keeps the run endpoint's contract.

    Exit status 1 if it does not. It makes test calls: about ten short runs are started in the
    session. Token and signing secret come from the settings, as for `run`.
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
    """Run a small, correct endpoint whose agent only waits.

    To try things out, and to read.
    """
    from ..contract.reference_api import serve

    serve(host, port, seconds=seconds, token=token, accept_after=accept_after)


@app.command()
def demo(
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the database and the log, and say where.")
    ] = False,
) -> None:
    """Show the daemon at work, in about 20 seconds.

    Recalls are scheduled, and called by the real daemon. Nothing is left behind.
    """
    from ..demo.demo import demo

    demo(keep=keep)


@app.command("help")
def help_(
    context: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(help="The command.", metavar="COMMAND")
    ] = None,
) -> None:
    """Show what a command does, and its options."""
    from .help import show

    show(context, words or [])
