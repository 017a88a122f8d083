"""Secrets as they stand now: those that come from files (`…_FILE`) or systemd's credentials are
read again when they are needed.

A password is changed, and a token expires, while a worker runs. Before each connection the file is
read anew. One that is missing for a moment, empty, half written, or holds what can't be a value
leaves the last value in place; what looks like a value and is wrong is replaced at the next try.
What came from the environment itself, or from an option, stays.

Never here: a secret in an event, in an error, in a `repr`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from . import settings
from .settings import Settings

Listener = Callable[[str, dict[str, Any]], None]
KEPT = "the last value is used until it can be read"


class Secrets:
    def __init__(
        self,
        chosen: Settings,
        environ: Mapping[str, str] | None = None,
        given: Collection[str] = (),
    ) -> None:
        """`chosen`: the settings, read from `environ` (none: they come from nowhere that could
        change) and from the options `given`, by name."""
        self._values: dict[str, str | None] = {
            name: getattr(chosen, name) for name in settings.secrets()
        }
        self._environ = dict(environ or {})
        self._from_files = [
            name
            for name in self._values
            if name not in given and settings.comes_from_file(name, self._environ)
        ]
        self._unreadable: dict[str, list[str]] = {}
        self._stamps: dict[str, tuple[int, int, int] | None] = {
            name: self._stamp(name) for name in self._from_files
        }
        """By which a file that was changed is known."""
        self._listener: Listener = lambda event, facts: None

    def listen(self, listener: Listener) -> None:
        """Have `listener(event, facts)` called where a value has changed, and, once, where a file
        can't be used."""
        self._listener = listener

    def current(self, name: str) -> str | None:
        """The value of a setting that is a secret, read anew where it comes from a file."""
        if name in self._from_files:
            value, problems = settings.reread(name, self._environ)
            if value is not None and not problems and name.endswith("dsn"):
                problems = _unparsable(name, value)
            if problems:
                if self._unreadable.get(name) != problems:
                    for problem in problems:
                        self._listener("secret.unreadable", {"reason": problem, "hint": KEPT})
                self._unreadable[name] = problems
            elif value is not None:
                self._unreadable.pop(name, None)
                if value != self._values[name]:
                    self._values[name] = value
                    self._listener("secret.changed", {"setting": settings.variable(name)})
        return self._values[name]

    def last(self, name: str) -> str | None:
        """The value as it was read last."""
        return self._values[name]

    def current_if_changed(self, name: str) -> str | None:
        """The same as `current`, but the file is only read where it was changed since: for what is
        needed at every call."""
        if name in self._from_files and (stamp := self._stamp(name)) != self._stamps[name]:
            self._stamps[name] = stamp
            return self.current(name)
        return self._values[name]

    def _stamp(self, name: str) -> tuple[int, int, int] | None:
        path = settings.file_of(name, self._environ)
        try:
            found = path.stat() if path is not None else None
        except OSError:
            return None
        return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)

    def read_again(self) -> list[str]:
        """Read all files again. Returns the settings whose values come from files."""
        self._unreadable.clear()
        for name in self._from_files:
            self.current(name)
        return [settings.variable(name) for name in self._from_files]

    def files(self) -> dict[str, Path]:
        """The files that secrets come from, by setting."""
        found = {name: settings.file_of(name, self._environ) for name in self._from_files}
        return {name: path for name, path in found.items() if path is not None}

    def dsn(self) -> str:
        """The DSN for a connection that is opened now."""
        value = self.current("dsn")
        assert value is not None
        return value

    def listen_dsn(self) -> str:
        """The same for LISTEN."""
        return self.current("listen_dsn") or self.dsn()


def _unparsable(name: str, dsn: str) -> list[str]:
    """Half a DSN is often none. (libpq's own words would quote it.)"""
    from psycopg import ProgrammingError
    from psycopg.conninfo import conninfo_to_dict

    try:
        conninfo_to_dict(dsn)
    except ProgrammingError:
        return [f"{settings.variable(name)}_FILE holds no DSN"]
    return []
