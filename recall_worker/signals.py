"""Signals that must never end the daemon: those that people and tools send to have something
reloaded, or by habit.

Owns what happens at SIGHUP and its like, from before anything slow is imported until the process
has ended. Never here: what ends the daemon (SIGTERM, SIGINT; see worker/process), and what is read
again.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

IGNORED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGPIPE)
"""Python ignores the last one anyway."""


def ignore() -> None:
    """Let none of them end this process. SIGHUP, too, until the daemon acts on it: what it stands
    for is done at the start."""
    for number in (*IGNORED, signal.SIGHUP):
        _handle(number, signal.SIG_IGN)


@contextmanager
def hangups(act: Callable[[], None]) -> Iterator[None]:
    """Within it SIGHUP calls `act()`, between two turns of the running loop; before and afterwards
    it is ignored. (The loop's own handlers would leave a deadly signal behind when it closes.)"""
    import asyncio

    loop = asyncio.get_running_loop()

    def received(*_: object) -> None:
        with suppress(RuntimeError):  # The loop has ended meanwhile.
            loop.call_soon_threadsafe(act)

    _handle(signal.SIGHUP, received)
    try:
        yield
    finally:
        _handle(signal.SIGHUP, signal.SIG_IGN)


def _handle(number: signal.Signals, what: object) -> None:
    with suppress(ValueError):  # Only the main thread may; it has.
        signal.signal(number, what)  # type: ignore[arg-type]
