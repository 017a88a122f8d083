"""What the settings expose: secrets that others may read, on this host or on the way.

Said once at the start (`settings.exposed`) and by `doctor`, in the same words. Each is a note and
refuses nothing: only the operator knows the network.

- A bearer token or secret headers over plain http to a host that is not this one.
- A DSN to a host that is not this one, where libpq does not insist on TLS (sslmode disable, allow,
  prefer, which is its default). It counts what libpq will use: the DSN, then the file of its
  service, then PGSSLMODE and its like.
- A secret in a file that all accounts of the host may read. By its mode, and only where all its
  directories can be entered by all. A file in a read-only mount of its own is passed over: so
  systemd, Kubernetes, Docker and Podman mount secrets, for this service or container alone, and
  they choose the mode (Kubernetes 0644, Docker 0444). Readable for a group is fine, too: systemd's
  credentials are 0440.

Never here: connections, and what is in a secret.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from . import settings
from .settings import Settings

ENCRYPTED = ("require", "verify-ca", "verify-full")
FILES = ("run_headers_file", "client_key_file")
"""Settings that name a file with a secret, besides those that are secrets themselves."""


@dataclass(frozen=True, slots=True)
class Exposure:
    setting: str
    """The variable."""
    seen: str
    todo: str


def exposures(chosen: Settings, files: Mapping[str, Path]) -> list[Exposure]:
    """`files`: where secrets come from, by setting (Secrets.files)."""
    return [*_tokens(chosen), *_dsns(chosen), *_files(chosen, files)]


def is_local(host: str | None) -> bool:
    """Whether a host, as an address or a DSN names it, is this one."""
    name = (host or "").strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _tokens(chosen: Settings) -> list[Exposure]:
    sent = [
        what
        for name, what in (
            ("run_token", "the token"),
            ("run_headers", "the secret headers"),
            ("run_headers_file", "the secret headers"),
        )
        if getattr(chosen, name, None) is not None
    ]
    parts = urlsplit(chosen.run_url or "")
    if not sent or parts.scheme != "http" or is_local(parts.hostname):
        return []
    go = "go" if len(sent) > 1 or sent[0].endswith("s") else "goes"
    return [
        Exposure(
            "RECALL_RUN_URL",
            f"{' and '.join(dict.fromkeys(sent))} {go} to {parts.hostname} over plain http, and can"
            " be read on the way",
            "https:// in RECALL_RUN_URL, or a proxy with TLS on this host",
        )
    ]


def _dsns(chosen: Settings) -> list[Exposure]:
    found = []
    for name in ("dsn", "listen_dsn"):
        dsn = getattr(chosen, name)
        given = None if dsn is None else connection_options(dsn)
        if given is None:
            continue
        mode = given.get("sslmode") or "prefer"
        remote = [host for host in _hosts(given) if host is not None]
        encrypted = (
            mode in ENCRYPTED
            or given.get("gssencmode") == "require"
            # SCRAM bound to the TLS channel: libpq gives up where there is none.
            or given.get("channel_binding") == "require"
        )
        if not remote or encrypted:
            continue
        how = (
            "is not encrypted (sslmode=disable)"
            if mode == "disable"
            else f"need not be encrypted (sslmode={mode}): libpq also takes a server without TLS"
        )
        variable = settings.variable(name)
        found.append(
            Exposure(
                variable,
                f"the connection to {', '.join(dict.fromkeys(remote))} {how}, and recalls, maybe "
                "the password, can be read on the way",
                f"sslmode=verify-full and sslrootcert in {variable} (sslmode=require at least)",
            )
        )
    return found


def connection_options(dsn: str) -> dict[str, str] | None:
    """What libpq will use for a DSN: what it says, then the file of its service, then the
    environment, then libpq's defaults. None where it can't be parsed."""
    from psycopg import ProgrammingError, pq
    from psycopg.conninfo import conninfo_to_dict

    try:
        given: dict[str, Any] = conninfo_to_dict(dsn)
    except ProgrammingError:
        return None
    with _service(given.get("service")):
        defaults = {o.keyword.decode(): o.val for o in pq.Conninfo.get_defaults()}
    return {name: value.decode(errors="replace") for name, value in defaults.items() if value} | {
        name: str(value) for name, value in given.items() if value not in (None, "")
    }


@contextmanager
def _service(name: str | None) -> Any:
    """libpq reads the file of a service where the environment names it; of one in a DSN only while
    it connects. (Nothing else runs here meanwhile.)"""
    before = os.environ.get("PGSERVICE")
    if name is None:
        yield
        return
    os.environ["PGSERVICE"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["PGSERVICE"]
        else:
            os.environ["PGSERVICE"] = before


def _hosts(given: Mapping[str, str]) -> list[str | None]:
    """The hosts of a DSN, as libpq pairs their names and addresses; None for one that is this
    host."""
    names = given.get("host", "").split(",")
    addresses = given.get("hostaddr", "").split(",")
    found: list[str | None] = []
    for name, address in zip_longest(names, addresses, fillvalue=""):
        where = address.strip() or name.strip()
        # None, or a path (or an abstract name): a socket.
        local = not where or where[:1] in ("/", "@") or is_local(where)
        found.append(None if local else name.strip() or where)
    return found


def _files(chosen: Settings, files: Mapping[str, Path]) -> list[Exposure]:
    named = {settings.variable(name) + "_FILE": path for name, path in files.items()}
    for name in FILES:
        if (path := getattr(chosen, name, None)) is not None:
            named[settings.variable(name)] = Path(path)
    found = []
    for variable, path in named.items():
        if (may := open_to_all(path)) is not None:
            found.append(
                Exposure(
                    variable,
                    f"every account of this host may {may} {path}",
                    f"chmod o= {path}, and give it to the account of the worker",
                )
            )
    return found


def open_to_all(path: Path) -> str | None:
    """What every account may do with a file: `read`, `change`, `read and change`; None for neither,
    or where that can't be found out."""
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
        if any(not parent.stat().st_mode & stat.S_IXOTH for parent in real.parents):
            return None
        if _is_mounted_for_us(real):
            return None
    except (OSError, RuntimeError):
        return None
    may = [word for bit, word in ((stat.S_IROTH, "read"), (stat.S_IWOTH, "change")) if mode & bit]
    return " and ".join(may) or None


def _is_mounted_for_us(path: Path) -> bool:
    """Whether a file is in a read-only mount that is not the host's own."""
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY and _device(path) != _device(Path("/")))


def _device(path: Path) -> int:
    return path.stat().st_dev
