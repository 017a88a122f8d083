"""`console`: serve the pages for people, in a process of its own."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

from .. import events, settings
from ..settings import SettingsError
from ..terminal import USAGE, Trouble, tell, warn_of_password


def console(flags: dict[str, Any]) -> None:
    """The command. Raises Trouble, with the status of a usage error where it refuses to start."""
    try:
        from ..console.access import exposed
        from ..console.app import serve
    except ImportError as error:
        raise Trouble(
            f"the console needs packages that are not installed: {error.name}",
            "pip install 'recall-worker[console]'",
            status=USAGE,
        ) from None
    from psycopg.conninfo import conninfo_to_dict

    from ..exposures import exposures
    from ..secret_files import Secrets

    warn_of_password(flags.get("dsn"))
    chosen = settings.read(needed=["dsn"], **flags)
    for dsn in filter(None, (chosen.dsn, chosen.listen_dsn)):
        conninfo_to_dict(dsn)  # An unreadable DSN is reported before anything is started.
    if problems := exposed(chosen):
        raise SettingsError(problems)
    events.configure(chosen.log_level, chosen.log_format)
    for name in settings.ignored():
        tell(f"Note: {name} is not a setting of recall-worker and is ignored.")
    log = events.Events(worker=f"console-{socket.gethostname()}-{os.getpid()}")
    given = [name for name, value in flags.items() if value is not None]
    secrets = Secrets(chosen, os.environ, given)
    secrets.listen(lambda event, facts: log.tell(event, **facts))
    for exposure in exposures(chosen, secrets.files()):
        log.tell(
            "settings.exposed",
            setting=exposure.setting,
            reason=exposure.seen,
            hint=exposure.todo,
        )
    asyncio.run(serve(chosen, secrets, log))
