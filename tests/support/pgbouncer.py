"""PgBouncer as a process, from Debian's package: a pooler between whoever is tested and PostgreSQL.

Owns its configuration (a temporary folder), its process and its end. It runs as the account
`postgres` where we are root, which it refuses. It listens on 127.0.0.1 and trusts whoever knocks.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from .postgres import free_port

PATIENCE = 20.0


def program() -> str | None:
    """Where pgbouncer is; None where it is not installed."""
    return shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def needed() -> str:
    """The program; skips the test, loudly, where there is none."""
    found = program()
    if found is None:
        pytest.skip(
            "pgbouncer is not installed (Debian: apt-get install pgbouncer): poolers are NOT "
            "tested here"
        )
    return found


class PgBouncer:
    """One pgbouncer before one database. `dsn` is the way through it."""

    def __init__(self, dsn: str, folder: Path, **settings: object) -> None:
        """`settings`: of pgbouncer.ini, which win over ours."""
        self._target = {
            name: str(value) for name, value in conninfo_to_dict(dsn).items() if value is not None
        }
        self._direct = dsn
        self._folder = folder
        self._settings = {
            "pool_mode": "transaction",
            "listen_addr": "127.0.0.1",
            "listen_port": free_port(),
            "auth_type": "trust",
            "auth_file": folder / "users.txt",
            "admin_users": self._user,
            "unix_socket_dir": "",
            "max_client_conn": 500,
            "default_pool_size": 5,
            "server_reset_query": "discard all",
        } | settings
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def _user(self) -> str:
        return self._target.get("user", "postgres")

    @property
    def dsn(self) -> str:
        return self.address(self._target["dbname"])

    def address(self, dbname: str) -> str:
        """A database of the server, through the pooler."""
        port = self._settings["listen_port"]
        return make_conninfo(
            host="127.0.0.1",
            port=str(port),
            user=self._user,
            dbname=dbname,
            sslmode="disable",
            gssencmode="disable",
        )

    def way_to(self, dsn: str) -> str:
        """The database of a DSN, through the pooler."""
        return self.address(str(conninfo_to_dict(dsn)["dbname"]))

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")

    def start(self) -> None:
        """Starts it, and waits until it takes connections."""
        there = {
            name: self._target[name]
            for name in ("host", "port", "password")
            if name in self._target
        }
        target = " ".join(f"{name}='{value}'" for name, value in there.items())
        lines = [
            "[databases]",
            f"* = {target}",
            "[pgbouncer]",
            *(f"{name} = {value}" for name, value in self._settings.items()),
        ]
        (self._folder / "pgbouncer.ini").write_text("\n".join(lines) + "\n")
        (self._folder / "users.txt").write_text(
            f'"{self._user}" "{self._target.get("password", "")}"\n'
        )
        account = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
        if account is not None:
            for path in (self._folder, *self._folder.iterdir()):
                os.chown(path, account.pw_uid, account.pw_gid)
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [needed(), str(self._folder / "pgbouncer.ini")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                user=account.pw_uid if account else None,
                group=account.pw_gid if account else None,
                extra_groups=[] if account else None,
            )
        until = time.monotonic() + PATIENCE
        while True:
            try:
                psycopg.connect(
                    self.address("pgbouncer"), autocommit=True, connect_timeout=2
                ).close()
                return
            except psycopg.OperationalError as error:
                if self._process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"pgbouncer did not start: {error}\n{self.log}") from error
                time.sleep(0.05)

    def stop(self) -> None:
        """Ends it at once, and with it whatever goes through it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def pooler(dsn: str, **settings: object) -> Iterator[PgBouncer]:
    """A pgbouncer before the server of a DSN, for as long as the block runs."""
    needed()
    folder = Path(tempfile.mkdtemp(prefix="recall-pgbouncer-"))
    bouncer = PgBouncer(dsn, folder, **settings)
    try:
        bouncer.start()
        yield bouncer
    finally:
        bouncer.stop()
        shutil.rmtree(folder, ignore_errors=True)
