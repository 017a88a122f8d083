"""The command line: one file a command (or a family of them), imported when that command runs.

Data goes to stdout, messages to stderr. `--json` prints one document. Exit status: 0 done, 1
refused, not found, or the output can't be written, 2 usage, 3 database or endpoint unreachable, 4
(`run` alone) the schema is for newer code. Every error reads `Error: …` and then `Try: …`; that a
person said no is none; a traceback is a defect. A reader of stdout that goes away (`| head -1`)
ends a command without a word.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys

_OUTPUT_LOST = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EBADF,
    errno.EPIPE,
)
"""How writing to stdout or stderr fails."""


def main() -> None:
    """The console script."""
    _open_missing_descriptors()
    # What a stream's encoding can't write is escaped there, as on stderr: no command ends half way
    # because of a character in a row.
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if sys.argv[1:2] in (["run"], ["mcp"], ["console"]):
        # Before anything slow is imported: a signal that is meant to have something reloaded never
        # ends the daemon, the MCP server or the console.
        from .. import signals

        signals.ignore()
    try:
        try:
            status = _run()
        finally:
            # What is still held back: a failure at the interpreter's own end would be no error.
            sys.stdout.flush()
    except OSError as error:
        if not _is_of_output(error):
            raise
        _drop(1)
        if error.errno != errno.EPIPE:
            _complain(
                f"the output can't be written: {error.strerror}",
                "another place for it; what the command was to do may have been done",
            )
        status = 1
    sys.exit(status)


def _run() -> int:
    """Run the command; returns its exit status."""
    from ..terminal import Declined, explain

    try:
        if sys.argv[1:] == ["run"]:
            # As systemd units and containers start it, with all settings in the environment. The
            # command line's library would stay in the daemon's memory, a fifth of the total.
            from .run import run

            run({}, embedded=False, data=None)
            return 0
        from .app import app

        return int(app(standalone_mode=False, prog_name="recall-worker") or 0)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error, file=sys.stderr)
            return 2
        trouble = explain(error)
        if trouble is None:
            raise
        _complain(trouble.what, *trouble.hints, error=not isinstance(trouble, Declined))
        return trouble.status
    except KeyboardInterrupt:
        return 130


def _complain(what: str, *hints: str, error: bool = True) -> None:
    try:
        print(f"Error: {what}" if error else what, file=sys.stderr)
        for hint in hints:
            print(f"Try: {hint}", file=sys.stderr)
    except OSError:
        _drop(2)  # The exit status is all that can be said.


def _is_of_output(error: OSError) -> bool:
    """Whether stdout or stderr could not be written: an error of a file would name it."""
    return error.filename is None and error.errno in _OUTPUT_LOST


def _drop(number: int) -> None:
    """Forget what could not be written to a descriptor: the interpreter would try it again at its
    end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


class _Closed(io.TextIOBase):
    """A stdout that was closed before the start."""

    encoding = "utf-8"

    def write(self, _: str, /) -> int:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def _open_missing_descriptors() -> None:
    """Where stdin, stdout or stderr are closed, their numbers must not become a connection's."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = _Closed()
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 lasts as long as we
