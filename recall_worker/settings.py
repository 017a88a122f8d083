"""Settings: frozen, read once, from `RECALL_*` in the environment and then from flags. The only
reader of the environment.

Secrets may also come from `<NAME>_FILE` or from a systemd credential of the same name. All problems
are reported at once. Durations are seconds, or have units (durations). Secrets are kept out of
`repr`.
"""

from __future__ import annotations

import base64
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import durations

HORIZON = 60.0
"""Seconds ahead within which the table's triggers notify the workers.

The triggers contain the same number, in sql/migrations/ (0010, and 0016 last)."""

LONGEST = 1e9
"""Seconds of the longest duration that can be set: 31 years, which PostgreSQL, JSON and timers all
still accept."""

LEASE, LEASE_MOST = 60.0, 86_400
"""Seconds of a lease where none is set, and of the longest."""

KEPT = ("fired", "cancelled", "failed", "calls")
"""What can be kept for a while and then deleted: recalls that are over, by status, and records of
calls."""

PROTOCOLS = ("native", "langgraph", "agno")
LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "json", "console")


class SettingsError(Exception):
    """The settings can't be used. `problems` holds one sentence each, naming the variable and what
    to do."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def _setting(
    default: Any,
    says: str,
    *,
    secret: bool = False,
    least: float | None = None,
    most: float | None = None,
    size: bool = False,
) -> Any:
    metadata = {"says": says, "secret": secret, "least": least, "most": most, "size": size}
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set. Field `x` is the variable `RECALL_X`."""

    dsn: str | None = _setting(None, "PostgreSQL, as a URL or key=value pairs", secret=True)
    listen_dsn: str | None = _setting(
        None,
        "PostgreSQL for LISTEN, where RECALL_DSN goes through a transaction pooler, "
        "which does not support LISTEN",
        secret=True,
    )
    run_url: str | None = _setting(
        None, "the run endpoint; `{session_id}` in it is replaced, percent-encoded"
    )
    run_token: str | None = _setting(None, "bearer token for the run endpoint", secret=True)
    signing_secret: str | None = _setting(
        None,
        "secret for Standard Webhooks signatures; two, separated by a blank, while it is changed",
        secret=True,
    )
    ca_file: str | None = _setting(
        None, "PEM file with the certificate authority of a private endpoint"
    )
    langgraph_assistant: str = _setting(
        "agent", "the assistant (or graph) that LangGraph runs on the thread"
    )
    agno_agent: str | None = _setting(None, "the agent that Agno runs in the session")
    protocol: str = _setting("native", "protocol of the agent server: " + ", ".join(PROTOCOLS))
    concurrency: int = _setting(3, "slots: runs at once in this worker", least=1, most=100_000)
    busy_delay: float = _setting(
        60.0,
        "seconds until a busy session is tried again, where its answer does not say when",
        least=0.05,
    )
    lease: float = _setting(
        LEASE,
        "seconds after which a silent worker's runs are taken up by another",
        least=1,
        most=LEASE_MOST,
    )
    run_timeout: float = _setting(1800.0, "seconds a run may take", least=0.1)
    max_attempts: int = _setting(3, "attempts of one occurrence in all", least=1, most=1000)
    message_limit: int = _setting(
        4 << 20,
        "octets of the longest message that is sent, also as `512KiB` or `4MiB`; "
        "a recall with a longer one fails",
        least=1,
        most=1_000_000_000,
        size=True,
    )
    give_up: float = _setting(
        86_400.0,
        "seconds after an occurrence's first call; an occurrence that is still deferred by then is "
        "given up",
        least=0,
    )
    session_limit: str | None = _setting(
        None, "most runs of one session, such as `20/h`, `100/d` or `20/h,100/d`; off where unset"
    )
    fleet_concurrency: int | None = _setting(
        None, "runs at once in all workers together; off where unset", least=1, most=100_000
    )
    poll_interval: float = _setting(
        30.0,
        "seconds between polls when no notification arrives",
        least=0.1,
        most=HORIZON / 2,
    )
    drain_timeout: float = _setting(
        30.0, "seconds that current runs get to end after SIGTERM", least=0
    )
    prune: str | None = _setting(
        None,
        "how long recalls that are over are kept, such as `30d`, `30d,failed=90d` or "
        "`fired=7d,calls=1d`; nothing is deleted where unset",
    )
    ops_listen: str | None = _setting(
        None,
        "`port` or `host:port` of /livez, /readyz and /metrics, which are unauthenticated; "
        "off where unset",
    )
    log_level: str = _setting("info", "log level: " + ", ".join(LEVELS))
    log_format: str = _setting(
        "auto", "log format: " + ", ".join(FORMATS) + " (auto: console on a terminal, else json)"
    )

    @property
    def session_windows(self) -> list[tuple[float, int]]:
        """`session_limit` as windows: (seconds, most runs)."""
        return [
            (_SPANS[unit], int(most)) for most, unit in _LIMIT.findall(self.session_limit or "")
        ]

    @property
    def keep(self) -> dict[str, float]:
        """`prune` in seconds, by what is kept; anything that is not in it is kept for ever."""
        return retention(self.prune or "")[0]

    @property
    def ops_address(self) -> tuple[str, int] | None:
        """`ops_listen` as host and port; 127.0.0.1 where only a port is given."""
        found = _ADDRESS.fullmatch(self.ops_listen or "")
        return (
            None
            if found is None
            else (found["six"] or found["host"] or "127.0.0.1", int(found["port"]))
        )

    def shown(self) -> dict[str, Any]:
        """The settings for people: secrets as `set` or null."""
        return {
            f.name: (None if getattr(self, f.name) is None else "set")
            if f.metadata["secret"]
            else getattr(self, f.name)
            for f in dataclasses.fields(self)
        }


_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMG]i?B?|B)?", re.IGNORECASE | re.ASCII)
_NUMBER = re.compile(r"\d+(\.\d*)?e\+?\d\d?", re.IGNORECASE | re.ASCII)
_SIZES = {
    "": 1,
    "b": 1,
    "k": 1 << 10,
    "kb": 1000,
    "kib": 1 << 10,
    "ki": 1 << 10,
    "m": 1 << 20,
    "mb": 1000**2,
    "mib": 1 << 20,
    "mi": 1 << 20,
    "g": 1 << 30,
    "gb": 1000**3,
    "gib": 1 << 30,
    "gi": 1 << 30,
}
_SPANS = {"h": 3600.0, "d": 86_400.0}
_LIMIT = re.compile(r"([1-9]\d{0,5})/([hd])")
_ADDRESS = re.compile(
    r"(?:(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s:\[\]/@]+)):)?(?P<port>\d{1,5})"
)
_LIMITS = re.compile(r"[1-9]\d{0,5}/[hd](?:[, ]\s*[1-9]\d{0,5}/[hd])?")


def retention(text: str) -> tuple[dict[str, float], list[str]]:
    """How long recalls that are over are kept, in seconds (`30d,failed=90d`), and the problems of
    the text, a clause each.

    A duration alone is for every status that is not named; statuses without one are kept for ever.
    Records of calls, where not named, are kept as long as the status that is kept longest: then no
    record is deleted before its recall, and they do not accumulate for ever.
    """
    given: dict[str, float] = {}
    problems: list[str] = []
    for part in [part.strip() for part in text.split(",")] if text else []:
        name, named, duration = part.rpartition("=")
        try:
            seconds = durations.seconds(duration)
        except durations.DurationError:
            problems.append(f"holds {part!r}: give durations such as 30d, or fired=7d, with units")
            continue
        if named and name not in KEPT:
            problems.append(f"names {name!r}: give one of {', '.join(KEPT)}")
        elif name in given:
            problems.append(
                f"names {name} twice: keep one" if name else "gives two durations for all: keep one"
            )
        elif not 1 <= seconds <= LONGEST:
            problems.append(
                f"holds {part!r}: keep for a second at least, and {LONGEST / 86_400:.0f}d at most"
            )
        else:
            given[name] = seconds
    keep = {
        name: given[name] if name in given else given[""]
        for name in KEPT[:3]
        if name in given or "" in given
    }
    if "calls" in given or keep:
        keep["calls"] = given.get("calls") or max(keep.values())
    return keep, problems


def variable(name: str) -> str:
    """The environment variable of a field."""
    return "RECALL_" + name.upper()


def read(
    environ: Mapping[str, str] | None = None, needed: Sequence[str] = (), **flags: Any
) -> Settings:
    """The settings from the environment, then from `flags` (those that are not None).

    Raises SettingsError with every problem found: wrong numbers, unreadable files, contradictions,
    and settings that are `needed` and not set.
    """
    environ = os.environ if environ is None else environ
    problems: list[str] = []
    values: dict[str, Any] = {}
    for f in dataclasses.fields(Settings):
        given = flags.get(f.name)
        raw = given if given is not None else _raw(f, environ, problems)
        if raw is not None:
            try:
                values[f.name] = _converted(f, raw)
            except ValueError as error:
                problems.append(f"{variable(f.name)} {error}")
    settings = Settings(**values)
    problems += _contradictions(settings)
    problems += _missing(
        settings,
        [name for name in needed if not any(text.startswith(variable(name)) for text in problems)],
    )
    if problems:
        raise SettingsError(problems)
    return settings


def ignored(environ: Mapping[str, str] | None = None) -> list[str]:
    """Variables that look like settings and are none: typing errors that nobody would notice
    otherwise."""
    fields = {variable(f.name): f for f in dataclasses.fields(Settings)}
    known = set(fields) | {name + "_FILE" for name, f in fields.items() if f.metadata["secret"]}
    names = os.environ if environ is None else environ
    return sorted(
        n
        for n in names
        if n.startswith("RECALL_") and n not in known and not n.startswith("RECALL_TEST_")
    )


def _field(name: str) -> dataclasses.Field[Any]:
    return next(f for f in dataclasses.fields(Settings) if f.name == name)


def _missing(settings: Settings, names: Sequence[str]) -> list[str]:
    return [
        f"{variable(name)} is not set: {_field(name).metadata['says']}"
        for name in names
        if getattr(settings, name) is None
    ]


def _raw(f: dataclasses.Field[Any], environ: Mapping[str, str], problems: list[str]) -> str | None:
    name = variable(f.name)
    direct = environ.get(name) or None
    if not f.metadata["secret"]:
        return direct
    files = {}
    if environ.get(name + "_FILE"):
        files[name + "_FILE"] = Path(environ[name + "_FILE"])
    elif environ.get("CREDENTIALS_DIRECTORY"):
        files["the credential " + name] = Path(environ["CREDENTIALS_DIRECTORY"]) / name
    if direct is not None and name + "_FILE" in files:
        problems.append(f"{name} and {name}_FILE are both set: keep one")
        return direct
    for source, path in files.items():
        if direct is None:
            try:
                if text := path.read_text(encoding="utf-8").strip():
                    return text
                problems.append(f"{source} is empty: write the secret into it, or leave it out")
            except (FileNotFoundError, NotADirectoryError) as error:
                if not source.startswith("the credential"):  # A credential is optional.
                    problems.append(f"{source} can't be read: {error.strerror}")
            except (OSError, UnicodeDecodeError) as error:
                problems.append(
                    f"{source} can't be read: {getattr(error, 'strerror', None) or 'not UTF-8'}"
                )
    return direct


def _converted(f: dataclasses.Field[Any], raw: Any) -> Any:
    kind = str(f.type).removesuffix(" | None")
    if kind == "str":
        text = str(raw)
        if any(ord(c) < 32 or ord(c) == 127 for c in text):
            raise ValueError("holds a control character (a line break?): remove it")
        return text
    if f.metadata["size"]:
        raw = _octets(str(raw))
    try:
        # Any number that is not whole is a duration: seconds, or with units.
        number = int(raw) if kind == "int" else durations.seconds(str(raw), bare=True)
    except ValueError:
        wanted = "whole number" if kind == "int" else "number of seconds, or such as 90s or 1h30m"
        raise ValueError(f"is {raw!r}: give a {wanted}") from None
    least, most = f.metadata["least"], f.metadata["most"]
    if (
        number != number
        or (least is not None and number < least)
        or (most is not None and number > most)
    ):
        bounds = f"at least {least:g}" if most is None else f"between {least:g} and {most:g}"
        raise ValueError(f"is {raw}: give a number {bounds}")
    if number > LONGEST:
        raise ValueError(f"is {raw}: give a number of at most {LONGEST:g}")
    return number


def _octets(text: str) -> int:
    """A size in octets: `4194304`, `4MiB`. Raises ValueError with what to write."""
    found = _SIZE.fullmatch(text.strip())
    if found is None and _NUMBER.fullmatch(text.strip()):
        return int(float(text))
    if found is None:
        raise ValueError(
            f"is {text!r}: give octets, such as 4194304, or with a unit, such as 512KiB or 4MiB"
        )
    return int(float(found[1]) * _SIZES[(found[2] or "").lower()])


def _contradictions(s: Settings) -> list[str]:
    problems = []
    for name, value, allowed in (
        ("protocol", s.protocol, PROTOCOLS),
        ("log_level", s.log_level, LEVELS),
        ("log_format", s.log_format, FORMATS),
    ):
        if value not in allowed:
            problems.append(f"{variable(name)} is {value!r}: give one of {', '.join(allowed)}")
    for name, dsn in (("dsn", s.dsn), ("listen_dsn", s.listen_dsn)):
        problems += [f"{variable(name)} {problem}" for problem in _dsn_problems(dsn or "")]
    if s.protocol == "agno" and s.agno_agent is None:
        problems.append(
            "RECALL_PROTOCOL is 'agno', which needs RECALL_AGNO_AGENT: set it to the agent's id"
        )
    if s.run_url is not None:
        problems += [f"RECALL_RUN_URL {problem}" for problem in _url_problems(s.run_url)]
    if s.run_token is not None and not s.run_token.isascii():
        problems.append(
            "RECALL_RUN_TOKEN holds characters that no HTTP header can carry: use plain ASCII"
        )
    if s.session_limit is not None and not _LIMITS.fullmatch(s.session_limit):
        problems.append(
            f"RECALL_SESSION_LIMIT is {s.session_limit!r}: give runs an hour, a day or both, as in "
            "20/h,100/d"
        )
    keep, wrong = retention(s.prune or "")
    problems += [f"RECALL_PRUNE {problem}" for problem in wrong]
    if (
        not wrong
        and keep
        and keep["calls"] < max((span for span, _ in s.session_windows), default=0)
    ):
        problems.append(
            "RECALL_PRUNE deletes records of calls that RECALL_SESSION_LIMIT counts: name calls, "
            "with a day or more (an hour for /h)"
        )
    if s.ops_listen is not None and (s.ops_address is None or s.ops_address[1] > 65535):
        problems.append(
            f"RECALL_OPS_LISTEN is {s.ops_listen!r}: give host:port, such as 127.0.0.1:9464 or "
            "[::1]:9464 (0.0.0.0:9464 for every address), or a port alone"
        )
    for secret in [one for one in (s.signing_secret or "").split() if one.startswith("whsec_")]:
        try:
            base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except ValueError:
            problems.append(
                "RECALL_SIGNING_SECRET starts with whsec_ but is not base64 after it: copy it again"
            )
    if s.ca_file is not None and not os.access(s.ca_file, os.R_OK):
        problems.append(f"RECALL_CA_FILE is {s.ca_file!r}, which can't be read: give a PEM file")
    return problems


def _dsn_problems(dsn: str) -> list[str]:
    """The problems of a DSN with a stray @ or /: libpq reads the text after it as a host or a port,
    and would quote that part of a password in its error."""
    scheme, found, rest = dsn.partition("://")
    if not found or scheme not in ("postgresql", "postgres"):
        return []
    authority, _, path = rest.partition("/")
    if authority.count("@") > 1 or "@" in path.partition("?")[0]:
        return ["holds @ or / in its user or password: write %40 and %2F"]
    return []


def _url_problems(url: str) -> list[str]:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        port_is_right = parts.port is None or 0 < parts.port < 65536
    except ValueError:  # Its text may quote a password.
        return ["is no address: give http://… or https://…"]
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_right:
        return ["is no address: give http://… or https://…"]
    problems = []
    if re.search(r"\s", url):
        problems.append("holds a blank: write it as %20")
    if parts.username or parts.password:
        problems.append("holds a user name or password: give the token in RECALL_RUN_TOKEN")
    strange = set(re.findall(r"\{[^}]*\}?", url)) - {"{session_id}"}
    if strange:
        problems.append(
            f"holds {', '.join(sorted(strange))}: the one placeholder is {{session_id}}"
        )
    if "{session_id}" in parts.netloc:
        problems.append("names the session in the host: put {session_id} in the path")
    return problems
