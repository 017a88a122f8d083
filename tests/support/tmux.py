"""A terminal that a person sits at: tmux, with a shell in it, on a server of its own."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

MISSING = None if shutil.which("tmux") else "tmux is not installed: apt-get install tmux"
"""Why there is none here."""
SHELL = ("bash", "--norc", "--noprofile")


class Tmux:
    """`environ` is that of the shell, whose prompt is `$ `."""

    def __init__(self, folder: Path, size: tuple[int, int], environ: Mapping[str, str]) -> None:
        self._socket = folder / "tmux"
        self._size = size
        self._environ = {"PS1": "$ ", "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"} | dict(environ)

    def _tmux(self, *words: str) -> str:
        command = ["tmux", "-S", str(self._socket), "-f", "/dev/null", *words]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    async def __aenter__(self) -> Self:
        columns, lines = map(str, self._size)
        words = [f"{name}={value}" for name, value in self._environ.items()]
        shell = ["env", "-u", "NO_COLOR", "-u", "COLUMNS", "-u", "LINES", *words, *SHELL]
        self._tmux("new-session", "-d", "-s", "t", "-x", columns, "-y", lines, *shell)
        await self.until(lambda screen: screen.startswith("$"), "a prompt")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._tmux("kill-server")

    def press(self, *keys: str) -> None:
        """Keys by tmux's names, and texts."""
        self._tmux("send-keys", "-t", "t", *keys)

    def line(self, text: str) -> None:
        """A line for the shell."""
        self._tmux("send-keys", "-t", "t", "-l", text)
        self.press("Enter")

    def resize(self, columns: int, lines: int) -> None:
        self._tmux("resize-window", "-t", "t", "-x", str(columns), "-y", str(lines))

    def screen(self) -> str:
        """What can be seen."""
        return self._tmux("capture-pane", "-p", "-t", "t")

    def told(self, format: str) -> str:
        """What tmux knows of the terminal, such as `#{alternate_on}`."""
        return self._tmux("display-message", "-p", "-t", "t", format).strip()

    def signal(self, number: signal.Signals) -> None:
        """To the program that the shell has started."""
        shell = self.told("#{pane_pid}")
        [child] = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
        subprocess.run(["kill", f"-{number.value}", child], check=True)

    async def until(
        self, condition: Callable[[str], object], what: str, within: float = 60.0
    ) -> str:
        """Wait until the screen is so; returns it. Raises TimeoutError with what it was."""
        try:
            async with asyncio.timeout(within):
                while True:
                    if condition(screen := self.screen()):
                        return screen
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise TimeoutError(f"not within {within} s: {what}\n{self.screen()}") from None
