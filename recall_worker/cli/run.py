"""`run`: the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import events, settings
from ..dsn import EXAMPLE
from ..secret_files import Secrets
from ..terminal import OUTDATED, REFUSED, UNREACHABLE, USAGE, Trouble, tell, warn_of_password

if TYPE_CHECKING:
    from ..worker.worker import Worker

GARBAGE = 20_000
"""New objects after which the garbage collector runs: some megabytes."""


def run(flags: dict[str, Any], *, embedded: bool, data: str | None) -> None:
    from psycopg.conninfo import conninfo_to_dict

    from ..worker.process import SchemaRefused, serve

    for given in (flags.get("dsn"), flags.get("listen_dsn")):
        warn_of_password(given)
    with contextlib.ExitStack() as stack:
        if embedded:
            flags = flags | _without_dsn(flags)
            settings.read(needed=["run_url"], **flags)  # Problems are reported before the start.
            dsn = stack.enter_context(_embedded(data))
            flags |= {name: dsn for name in DSNS if flags[name] is not None}
        chosen = settings.read(needed=["dsn", "run_url"], **flags)
        for dsn in filter(None, (chosen.dsn, chosen.listen_dsn)):
            conninfo_to_dict(dsn)  # An unreadable DSN is reported before anything is started.
        events.configure(chosen.log_level, chosen.log_format)
        for name in settings.ignored():
            tell(f"Note: {name} is not a setting of recall-worker and is ignored.")
        # What was imported stays: the collector skips it, which keeps its pauses out of the lag.
        gc.collect()
        gc.freeze()
        # A run makes hundreds of objects and no cycles: with Python's default, a collection every
        # 700 objects, a tenth of the time would go into searching for them.
        gc.set_threshold(GARBAGE, 20, 20)
        try:
            given = [name for name, value in flags.items() if value is not None]
            secrets = Secrets(chosen, os.environ, given)
            asyncio.run(serve(chosen, functools.partial(_watched, chosen), secrets))
        except SchemaRefused as refused:
            status = OUTDATED if refused.excludes_code else REFUSED
            raise Trouble(str(refused), refused.hint, status=status) from None


DSNS = ("dsn", "listen_dsn")


def _without_dsn(flags: Mapping[str, Any]) -> dict[str, str | None]:
    """Flags that win over what the environment has for another PostgreSQL, and stand for the
    embedded one until its address is known. Says what is not used. Raises Trouble for an option
    that names another PostgreSQL."""
    for name in DSNS:
        if flags.get(name) is not None:
            raise Trouble(
                f"--embedded and {settings.option(name)} name two PostgreSQL servers",
                "the same command with one of the two",
                status=USAGE,
            )
    there = [name for name in DSNS if settings.origin(name, os.environ) != "default"]
    for name in there:
        tell(
            f"Note: {settings.variable(name)} is set, but not used: with --embedded the worker "
            "uses the embedded PostgreSQL."
        )
    return {name: EXAMPLE if name == "dsn" or name in there else None for name in DSNS}


@contextlib.asynccontextmanager
async def _watched(
    chosen: settings.Settings, worker: Worker, log: events.Events
) -> AsyncIterator[None]:
    """Run pages, metrics and traces as the settings say. What is off is not imported."""
    async with contextlib.AsyncExitStack() as stack:
        if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get(
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
        ):
            try:
                from ..ops.traces import traced
            except ImportError:
                tell(
                    "Note: OTEL_EXPORTER_OTLP_ENDPOINT is set, but no traces are sent: "
                    "pip install 'recall-worker[otel]'"
                )
            else:
                await stack.enter_async_context(traced(worker, log))
        if chosen.ops_address is not None:
            from ..ops.pages import pages

            await stack.enter_async_context(pages(worker, log, *chosen.ops_address))
        yield


@contextlib.contextmanager
def _embedded(data: str | None) -> Any:
    from .. import schema
    from ..embedded import EmbeddedError, EmbeddedServer

    directory = Path(data) if data else _home()
    try:
        server = EmbeddedServer(directory).start()
    except EmbeddedError as error:
        raise Trouble(
            str(error),
            getattr(error, "hint", "see the server's log beside its data"),
            status=UNREACHABLE,
        ) from None
    try:
        dsn = server.dsn("postgres")
        tell(f"To use this PostgreSQL elsewhere: RECALL_DSN='{dsn}'")
        # The database of this directory, upgraded in place, is no copy: see schema/identity.py.
        kept = directory / "identity"
        was = kept.read_text(encoding="ascii").strip() if kept.is_file() else None
        schema.migrate(dsn, tell, was=was)
        if (now := schema.identity_text(dsn)) not in (None, was):
            kept.write_text(f"{now}\n", encoding="ascii")
        yield dsn
    finally:
        server.stop()


def _home() -> Path:
    """The directory of the embedded data. For root it is not root's home: the server then runs as
    another account, which can't enter that.
    """
    if os.geteuid() == 0:
        return Path("/var/lib/recall-worker/postgresql")
    return (
        Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
        / "recall-worker"
        / "postgresql"
    )
