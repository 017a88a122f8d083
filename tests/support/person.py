"""A person at a terminal: a command of ours on a pseudo-terminal, read as it writes, typed to."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PATIENCE = 60.0
"""Seconds until what is waited for has to be there."""


class Person:
    """What a person at the terminal sees and does."""

    def __init__(self, child: subprocess.Popen[bytes], screen: int) -> None:
        self.child = child
        self._screen = screen
        self.seen = ""

    def sees(self, text: str) -> str:
        """Wait until this text is written; returns all up to its end. It is not found again."""
        ends = time.monotonic() + PATIENCE
        while text not in self.seen:
            assert time.monotonic() < ends, f"{text!r} is not in {self.seen!r}"
            assert self._read() or text in self.seen, f"{text!r} is not in {self.seen!r}"
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def types(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def ends(self) -> int:
        """Wait until the command has ended; returns its exit status."""
        while self._read():
            pass
        return self.child.wait(PATIENCE)

    def _read(self) -> bool:
        """Read what is written next. False where nothing will be any more."""
        if not select.select([self._screen], [], [], PATIENCE)[0]:
            return False
        with suppress(OSError):
            if chunk := os.read(self._screen, 1 << 16):
                self.seen += chunk.decode(errors="replace").replace("\r\n", "\n")
                return True
        return False


@contextmanager
def person(
    dsn: str, *words: str, columns: int = 80, lines: int = 24, colours: bool = False
) -> Iterator[Person]:
    """Somebody who has typed `recall-worker <words>` on a terminal of this size."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RECALL_")}
    for name in ("COLUMNS", "LINES"):
        kept.pop(name, None)
    kept |= {"RECALL_DSN": dsn, "TERM": "xterm", "PYTHONUTF8": "1"}
    if not colours:
        kept["NO_COLOR"] = "1"
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    child = subprocess.Popen(
        [sys.executable, "-m", "recall_worker", *words],
        env=kept,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        close_fds=True,
        # Its terminal is this one, so that Ctrl-C is a signal.
        preexec_fn=lambda: _own(theirs),
    )
    os.close(theirs)
    try:
        yield Person(child, ours)
    finally:
        if child.poll() is None:
            child.kill()
        child.wait(PATIENCE)
        os.close(ours)


def _own(terminal: int) -> None:
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
