"""Agent servers that others wrote, from PyPI, as processes. None of them is a dependency of
recall-worker.

Each has an environment of its own, made once and kept in RECALL_TEST_CACHE, or else in the system's
folder for temporary files.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import pytest

PATIENCE = 60.0
"""Seconds that a server gets to start or to stop, on a machine that has other things to do."""

QUIETLY = ("--quiet", "--disable-pip-version-check")


def environment(name: str, *requirements: str, by_uv: bool = False) -> Path:
    """The folder of programs of an environment with these packages. Skips the test where pip can't
    install them. `by_uv`: by uv where that can be had, which takes a fifth of pip's time."""
    wanted = hashlib.sha256("\n".join([sys.version, *requirements]).encode()).hexdigest()[:12]
    cache = Path(
        os.environ.get("RECALL_TEST_CACHE")
        or Path(tempfile.gettempdir()) / f"recall-test-servers-{os.getuid()}"
    )
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    home = cache / f"{name}-{wanted}"
    complete = home / "complete"
    with (cache / f"{name}-{wanted}.lock").open("w") as lock:
        # Others may want the same one at the same time; it is made once.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(home, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", home], check=True)
            pip = [str(home / "bin" / "python"), "-m", "pip", "install", *QUIETLY]
            installed = None
            if by_uv and subprocess.run([*pip, "uv"], capture_output=True).returncode == 0:
                uv = [str(home / "bin" / "uv"), "pip", "install", "--quiet", "--python", str(home)]
                installed = subprocess.run([*uv, *requirements], capture_output=True, text=True)
            if installed is None or installed.returncode != 0:
                installed = subprocess.run([*pip, *requirements], capture_output=True, text=True)
            if installed.returncode != 0:
                shutil.rmtree(home, ignore_errors=True)
                said = (installed.stderr.strip().splitlines() or ["no word"])[-1]
                pytest.skip(f"pip can't install {' '.join(requirements)}: {said}")
            complete.touch()
    return home / "bin"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Server:
    """A server as a group of processes, which can be stopped, killed, and started again where it
    was."""

    def __init__(
        self,
        command: Sequence[str | Path],
        folder: Path,
        environ: Mapping[str, str],
        ready: str,
        *,
        any_answer: bool = False,
    ) -> None:
        """`folder`: where it runs, and where its log goes. `ready`: the address that answers 2xx
        once it is up; with `any_answer`, anything."""
        self._command = command
        self._folder = folder
        self._ready, self._any_answer = ready, any_answer
        # Nothing of ours goes in, and nothing goes out: whatever it may want from the network, it
        # finds a closed port.
        nowhere = "http://127.0.0.1:9"
        proxies = {f"{scheme}_proxy": nowhere for scheme in ("http", "https", "all")} | {
            "no_proxy": "127.0.0.1,localhost"
        }
        self._environ = (
            {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"}
            | proxies
            | dict(environ)
        )
        self._process: subprocess.Popen[bytes] | None = None
        self.log = folder / "server.log"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE
        with httpx.Client(trust_env=False) as client:
            while True:
                try:
                    if client.get(self._ready).is_success or self._any_answer:
                        return
                except httpx.TransportError:
                    pass
                if time.monotonic() > deadline or self._process.poll() is not None:
                    self.kill()
                    raise RuntimeError(
                        "the server does not start:\n"
                        + self.log.read_text(errors="replace")[-4000:]
                    )
                time.sleep(0.05)

    def stop(self) -> None:
        """SIGTERM, and wait: it may put its affairs in order."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(PATIENCE)
            finally:
                self.kill()

    def kill(self) -> None:
        """SIGKILL to all of its processes, and wait."""
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()
            self._process = None
