"""`run`: the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import events, settings
from ..terminal import OUTDATED, REFUSED, UNREACHABLE, Trouble, tell, warn_of_password

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
            found = settings.read(needed=["run_url"], **flags)
            if found.dsn is not None:
                raise Trouble(
                    "--embedded and RECALL_DSN are both given", "keep one of them", status=2
                )
            flags = flags | {"dsn": stack.enter_context(_embedded(data))}
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
            asyncio.run(serve(chosen, functools.partial(_watched, chosen)))
        except SchemaRefused as refused:
            status = OUTDATED if refused.excludes_code else REFUSED
            raise Trouble(str(refused), refused.hint, status=status) from None


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
                    "Note: OTEL_EXPORTER_OTLP_ENDPOINT is set, but traces are an extra that "
                    "is not installed: recall-worker[otel]."
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
        schema.migrate(dsn, tell)
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
