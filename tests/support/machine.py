"""A machine with systemd, booted for a test: a Debian folder (debootstrap) in a systemd-nspawn
container that shares our network.

Owns the folder, which is made once and kept (RECALL_TEST_CACHE, else
`~/.cache/recall-worker-tests`), its copies, wheels and what is installed from them, and the
container's life. Needs root, debootstrap and systemd-nspawn; `missing()` names what is not there.

Never here: anything of recall-worker's beyond its wheel.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self
from uuid import uuid4

HERE = Path(__file__).parents[2]
SUITE = "bookworm"
PYTHON = "3.11"
"""The suite's Python, for which the wheels are fetched, whatever runs the tests."""
MIRROR = "http://deb.debian.org/debian"
PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-venv,ca-certificates"
PLATFORMS = (
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux_2_34_x86_64",
)


def missing() -> str | None:
    """What this machine lacks for it, for a skip's reason; None where nothing."""
    if os.geteuid() != 0:
        return "booting a machine needs root"
    tools = [
        tool for tool in ("debootstrap", "systemd-nspawn", "nsenter") if shutil.which(tool) is None
    ]
    return f"not installed: {', '.join(tools)}" if tools else None


def cache() -> Path:
    folder = Path(
        os.environ.get("RECALL_TEST_CACHE") or Path.home() / ".cache" / "recall-worker-tests"
    )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def debian(packages: str = PACKAGES) -> Path:
    """The folder with a Debian that has these packages, made where it is not there yet. Not to be
    changed: copy it."""
    made = cache() / f"{SUITE}-{hashlib.sha256(packages.encode()).hexdigest()[:8]}"
    if not made.is_dir():
        half = made.with_name(f"{made.name}.{uuid4().hex[:8]}")
        said = [
            "debootstrap",
            "--variant=minbase",
            f"--include={packages}",
            SUITE,
            str(half),
            os.environ.get("RECALL_TEST_MIRROR", MIRROR),
        ]
        done = subprocess.run(said, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        try:
            half.rename(made)
        except OSError:
            shutil.rmtree(half)  # Another process was quicker.
    return made


def build_wheel(folder: Path, source: Path = HERE) -> Path:
    """The project's wheel, built from a checkout into `folder`."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("recall_worker-*.whl")
    return wheel


def fetch_wheels(folder: Path, wheel: Path) -> None:
    """What the wheel needs, with the console, for the machine's Python, so that the machine
    installs without a network."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "-d",
            str(folder),
            "--only-binary=:all:",
            "--python-version",
            PYTHON,
            "--implementation",
            "cp",
            "--abi",
            f"cp{PYTHON.replace('.', '')}",
            "--abi",
            "abi3",
            "--abi",
            "none",
            *platforms,
            f"{wheel}[console]",
        ],
        check=True,
        capture_output=True,
    )


class Machine:
    """A booted container. Paths are as the machine sees them; `root / path` is where they lie
    here."""

    def __init__(self, root: Path, process: subprocess.Popen[bytes], console: Path) -> None:
        self.root = root
        self._process = process
        self._console = console
        self._leader = 0

    @classmethod
    @contextmanager
    def boot(cls, root: Path, folder: Path) -> Iterator[Self]:
        """Boot `root`; `folder` takes the console's log. Powered off at the end, whatever
        happens."""
        console = folder / "console"
        name = f"recall-{uuid4().hex[:8]}"
        with console.open("wb") as log:
            process = subprocess.Popen(
                [
                    "systemd-nspawn",
                    "-q",
                    "-D",
                    str(root),
                    "-M",
                    name,
                    "--boot",
                    "--register=no",
                    "--keep-unit",
                    "--resolv-conf=off",
                    "--timezone=off",
                    "--console=pipe",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        machine = cls(root, process, console)
        try:
            machine._wait_until_up()
            yield machine
        finally:
            machine._power_off()

    def run(
        self, *command: str, check: bool = True, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as its root. Where it fails: AssertionError with what it said,
        unless `check` is False."""
        done = subprocess.run(
            [
                "nsenter",
                "-t",
                str(self._leader),
                "-a",
                "--wdns=/",
                "env",
                "-i",
                "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
                "LANG=C.UTF-8",
                "PAGER=cat",
                *command,
            ],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done

    def systemctl(self, *words: str, check: bool = True, timeout: float = 120) -> str:
        done = self.run("systemctl", *words, check=False, timeout=timeout)
        assert not check or done.returncode == 0, (
            f"systemctl {' '.join(words)}: {done.stderr}\n{self.log('-n', '40')}"
        )
        return done.stdout.strip()

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.systemctl("show", "-P", name, unit)

    def log(self, *words: str) -> str:
        """The journal, as plain messages."""
        return self.run("journalctl", "-o", "cat", "--no-pager", *words).stdout

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        where = self.root / path.lstrip("/")
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(text, encoding="utf-8")
        where.chmod(mode)

    def _wait_until_up(self) -> None:
        until = time.monotonic() + 60
        state = ""
        while time.monotonic() < until and self._process.poll() is None:
            self._leader = self._leader or next(iter(_children(self._process.pid)), 0)
            if self._leader:
                try:
                    state = self.run(
                        "systemctl", "is-system-running", check=False, timeout=10
                    ).stdout.strip()
                except subprocess.TimeoutExpired:
                    continue
                if state in ("running", "degraded"):
                    return
            time.sleep(0.1)
        raise AssertionError(
            f"the machine did not come up ({state or 'silent'}): "
            f"{self._console.read_text(errors='replace')[-2000:]}"
        )

    def _power_off(self) -> None:
        if self._process.poll() is None:
            # What SIGRTMIN+4 means to systemd: power off.
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)


def copy(root: Path, to: Path) -> Path:
    """A copy of a folder with a system in it."""
    subprocess.run(["cp", "-a", "--reflink=auto", str(root), str(to)], check=True)
    return to


def install(root: Path, venv: str, wheel: Path, wheels: Path) -> None:
    """Make a venv in the folder and install the wheel into it, from what was fetched."""
    inside = root / "var/tmp/wheels"
    shutil.copytree(wheels, inside, dirs_exist_ok=True)
    shutil.copy(wheel, inside)
    _chroot(root, "python3", "-m", "venv", venv)
    _chroot(
        root,
        f"{venv}/bin/pip",
        "-q",
        "install",
        "--no-index",
        "--find-links",
        "/var/tmp/wheels",
        f"/var/tmp/wheels/{wheel.name}[console]",
    )
    shutil.rmtree(inside)


def _chroot(root: Path, *command: str) -> None:
    words: Sequence[str] = [
        "chroot",
        str(root),
        "env",
        "-i",
        "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG=C.UTF-8",
        *command,
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
