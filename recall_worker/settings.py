"""Settings: frozen, read once, from `RECALL_*` in the environment and then from flags. The only
reader of the environment.

Secrets may also come from `<NAME>_FILE` or from a systemd credential of the same name. All problems
are reported at once. Durations are seconds, or have units (durations). Secrets are kept out of
`repr`.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import durations
from .dsn import libpq

HORIZON = 60.0
"""Seconds ahead within which the table's triggers notify the workers.

The triggers contain the same number, in sql/migrations/ (0010, 0016, and 0017 last)."""

LONGEST = 1e9
"""Seconds of the longest duration that can be set: 31 years, which PostgreSQL, JSON and timers all
still accept."""

LEASE, LEASE_MOST = 60.0, 86_400
"""Seconds of a lease where none is set, and of the longest."""

DEFAULT_QUEUE = "default"
"""The queue of rows that name none: the application's own insert does not know the column."""
ALL_QUEUES = "*"
"""Stands for all queues where one is paused; no queue can have this name."""
QUEUE_MOST, QUEUES_MOST = 63, 100
"""Characters of a queue's name, and queues that one worker serves, at most. The trigger
recall_admit_queue has the first number, too."""

KEPT = ("fired", "cancelled", "failed", "calls", "actions", "failures")
"""What can be kept for a while and then deleted: recalls that are over, by status, and records of
calls, of what people and agents did, and of failures that were told (RECALL_FAILURE_URL)."""

PROTOCOLS = ("native", "langgraph", "agno", "responses")
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
    because: str | None = None,
) -> Any:
    """`because`: the reason for the bounds, where it is not plain."""
    metadata = {
        "says": says,
        "secret": secret,
        "least": least,
        "most": most,
        "size": size,
        "because": because,
    }
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set. Field `x` is the variable `RECALL_X`."""

    dsn: str | None = _setting(
        None,
        "PostgreSQL, as a URL (also SQLAlchemy's, `postgresql+asyncpg://…`) or key=value pairs",
        secret=True,
    )
    listen_dsn: str | None = _setting(
        None,
        "PostgreSQL for LISTEN, where RECALL_DSN goes through a transaction pooler, "
        "which does not support LISTEN",
        secret=True,
    )
    schema: str | None = _setting(
        None,
        "the schema that has session_recalls; where unset, the one that the role's search_path "
        "finds",
    )
    run_url: str | None = _setting(
        None, "the run endpoint; `{session_id}` in it is replaced, percent-encoded"
    )
    run_token: str | None = _setting(None, "bearer token for the run endpoint", secret=True)
    run_headers: str | None = _setting(
        None,
        "further headers for the run endpoint, such as `x-api-key: …`: one `Name: value` a line",
        secret=True,
    )
    signing_secret: str | None = _setting(
        None,
        "secret for Standard Webhooks signatures; two, separated by a blank, while it is changed",
        secret=True,
    )
    failure_url: str | None = _setting(
        None,
        "where a POST tells that a recall has failed for good, signed by RECALL_SIGNING_SECRET "
        "where that is set; docs/failures.md; nobody is told where unset",
    )
    ca_file: str | None = _setting(
        None, "PEM file with the certificate authority of a private endpoint"
    )
    client_cert_file: str | None = _setting(
        None,
        "PEM file with the certificate by which the worker shows the endpoint who it is (mutual "
        "TLS), its chain, and its key where RECALL_CLIENT_KEY_FILE is not set",
    )
    client_key_file: str | None = _setting(
        None, "PEM file with the key of RECALL_CLIENT_CERT_FILE, without a password"
    )
    proxy: str | None = _setting(
        None,
        "proxy between the worker and the endpoint, as `http://user:password@host:port`; "
        "HTTP_PROXY and its like are not read",
        secret=True,
    )
    langgraph_assistant: str = _setting(
        "agent", "the assistant (or graph) that LangGraph runs on the thread"
    )
    agno_agent: str | None = _setting(None, "the agent that Agno runs in the session")
    queue: str = _setting(
        DEFAULT_QUEUE,
        "the queues that this worker claims from, separated by commas; other recalls are left to "
        "other workers",
    )
    responses_model: str | None = _setting(
        None, "the model or agent that a server of the Responses API runs, where it wants one"
    )
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
        None,
        "runs at once in all workers together, counted in the queues that this worker serves; off "
        "where unset",
        least=1,
        most=100_000,
    )
    poll_interval: float = _setting(
        30.0,
        "seconds between polls when no notification arrives",
        least=0.1,
        most=HORIZON / 2,
        because=(
            f"only recalls that are due within {HORIZON:g} s of their insert notify the workers: "
            "with rarer polls, others could be late"
        ),
    )
    drain_timeout: float = _setting(
        30.0, "seconds that current runs get to end after SIGTERM", least=0
    )
    prune: str | None = _setting(
        None,
        "how long recalls that are over are kept, such as `30d`, `30d,failed=90d` or "
        "`fired=7d,calls=1d`; nothing is deleted where unset",
    )
    allow_copy: bool = _setting(
        False,
        "1: claim also where the database is a copy of the one that `migrate` recorded; "
        "docs/adoption.md",
    )
    paused: bool = _setting(
        False, "1: start, and claim nothing, until the worker is started again without"
    )
    actor: str | None = _setting(
        None,
        "who acts, for the record of what commands and `Recalls` do; where unset, commands record "
        "the login name and host, `Recalls` the database role",
    )
    token_key: str | None = _setting(
        None,
        "secret that signs the tokens of `token` and `mcp --http`, of 32 octets at least; while it "
        "is changed several, separated by blanks: the first signs, all are accepted",
        secret=True,
    )
    token_audience: str = _setting(
        "recall-worker",
        "whom tokens are for: `mcp --http` accepts those that name it; one for each deployment "
        "that shares a key",
    )
    mcp_session: str | None = _setting(
        None, "the session that `mcp` serves on stdin and stdout; by whoever starts the process"
    )
    mcp_hosts: str | None = _setting(
        None,
        "names by which `mcp --http` is reached, such as `mcp.example.com`, separated by commas: "
        "other Host and Origin headers are refused; where unset, only this host's own address",
    )
    agent_interval: float = _setting(
        60.0,
        "seconds, at least, between two occurrences of a recall that an agent schedules",
        least=1,
    )
    agent_horizon: float = _setting(
        366 * 86_400.0,
        "seconds, at most, until a recall that an agent schedules is first due",
        least=60,
    )
    agent_message: int = _setting(
        16 << 10,
        "octets of the longest message that an agent may schedule, also as `16KiB`",
        least=1,
        most=1_000_000_000,
        size=True,
    )
    agent_limit: str = _setting(
        "30/h,200/d", "most recalls that the agent of one session may schedule, an hour and a day"
    )
    ops_listen: str | None = _setting(
        None,
        "`port` or `host:port` of /livez, /readyz and /metrics, which are unauthenticated; "
        "off where unset",
    )
    console_listen: str = _setting(
        "127.0.0.1:9465",
        "`port` or `host:port` of `console`; on another address than this host's own loopback it "
        "takes RECALL_CONSOLE_TOKEN or RECALL_CONSOLE_USER_HEADER",
    )
    console_base_path: str | None = _setting(
        None, "the path under which a proxy shows the console, such as `/recalls`"
    )
    console_hosts: str | None = _setting(
        None,
        "names by which the console is reached, such as `console.example.com`, separated by "
        "commas: other names in Host are refused",
    )
    console_token: str | None = _setting(
        None,
        "secret that opens the console, on its login page or as a bearer token; of 16 characters "
        "at least",
        secret=True,
    )
    console_user_header: str | None = _setting(
        None,
        "header in which a proxy of RECALL_CONSOLE_TRUSTED says who the user is, such as "
        "`X-Forwarded-User`",
    )
    console_trusted: str | None = _setting(
        None,
        "addresses of the proxies whose RECALL_CONSOLE_USER_HEADER is believed, as `10.0.0.0/8`, "
        "separated by commas",
    )
    console_operators: str | None = _setting(
        None,
        "users who may act in the console, separated by commas: the others only read; where unset, "
        "all may act",
    )
    console_messages: str = _setting(
        "hidden", "whether the console shows messages and comments: hidden, shown"
    )
    log_level: str = _setting("info", "log level: " + ", ".join(LEVELS))
    log_format: str = _setting(
        "auto", "log format: " + ", ".join(FORMATS) + " (auto: console on a terminal, else json)"
    )

    @property
    def queues(self) -> tuple[str, ...]:
        """`queue` as names."""
        return tuple(name.strip() for name in self.queue.split(","))

    @property
    def session_windows(self) -> list[tuple[float, int]]:
        """`session_limit` as windows: (seconds, most runs)."""
        return windows(self.session_limit or "")

    @property
    def keep(self) -> dict[str, float]:
        """`prune` in seconds, by what is kept; anything that is not in it is kept for ever."""
        return retention(self.prune or "")[0]

    @property
    def ops_address(self) -> tuple[str, int] | None:
        """`ops_listen` as host and port; 127.0.0.1 where only a port is given."""
        return address(self.ops_listen or "")

    @property
    def console_address(self) -> tuple[str, int]:
        """`console_listen`, likewise."""
        found = address(self.console_listen)
        assert found is not None
        return found

    def of_the_failure_url(self) -> Settings:
        """The settings of HTTP for RECALL_FAILURE_URL: those for the run endpoint, with its
        address."""
        return dataclasses.replace(self, run_url=self.failure_url)

    def shown(self) -> dict[str, Any]:
        """The settings for people: secrets as `set` or null."""
        shown = {
            f.name: (None if getattr(self, f.name) is None else "set")
            if f.metadata["secret"]
            else getattr(self, f.name)
            for f in dataclasses.fields(self)
        }
        # Some services know their callers by a part of the address.
        if self.run_url is not None and "?" in self.run_url:
            shown["run_url"] = self.run_url.partition("?")[0] + "?…"
        if self.failure_url is not None:
            scheme, _, rest = self.failure_url.partition("://")
            host = re.split(r"[/?#]", rest)[0]
            shown["failure_url"] = f"{scheme}://{host}" + ("/…" if host != rest else "")
        return shown


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
_WORDS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(
    ("0", "false", "no", "off"), False
)
_SPANS = {"h": 3600.0, "d": 86_400.0}
_LIMIT = re.compile(r"([1-9]\d{0,5})/([hd])")
_ADDRESS = re.compile(
    r"(?:(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s:\[\]/@]+)):)?(?P<port>\d{1,5})"
)
_HOST = re.compile(
    r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?::\d{1,5})?"
)
_LIMITS = re.compile(r"[1-9]\d{0,5}/[hd](?:[, ]\s*[1-9]\d{0,5}/[hd])?")


def address(text: str) -> tuple[str, int] | None:
    """`port` or `host:port` as host and port; None where it is neither."""
    found = _ADDRESS.fullmatch(text)
    return (
        None
        if found is None
        else (found["six"] or found["host"] or "127.0.0.1", int(found["port"]))
    )


def windows(text: str) -> list[tuple[float, int]]:
    """`20/h,100/d` as windows: (seconds, most)."""
    return [(_SPANS[unit], int(most)) for most, unit in _LIMIT.findall(text)]


def names_in(text: str | None) -> tuple[str, ...]:
    """The names of a list that is separated by commas."""
    return tuple(name for part in (text or "").split(",") if (name := part.strip()))


def retention(text: str) -> tuple[dict[str, float], list[str]]:
    """How long recalls that are over are kept, in seconds (`30d,failed=90d`), and the problems of
    the text, a clause each.

    A duration alone is for every status that is not named; statuses without one are kept for ever.
    Records of calls and of actions, where not named, are kept as long as the status that is kept
    longest: then no record of an ended recall is deleted before it, and they do not accumulate for
    ever.
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
    longest = max(keep.values(), default=None)
    for name in KEPT[3:]:
        if (kept := given.get(name, longest)) is not None:
            keep[name] = kept
    return keep, problems


def queue_problem(name: str) -> str | None:
    """What is wrong with a queue's name, and what to do: a clause; None where nothing is."""
    shown = repr(name if len(name) <= 80 else name[:80] + "…")
    if name == "":
        return "is empty: give a queue a name"
    if name == ALL_QUEUES:
        return f"is {shown}, which stands for all queues: give a name"
    if any(c.isspace() for c in name):
        return f"is {shown}, with a blank or a line break: use - or _"
    if "," in name:
        return f"is {shown}, with a comma, which separates queues: use - or _"
    if not name.isprintable():
        return f"is {shown}, with a character that can't be seen: remove it"
    if len(name) > QUEUE_MOST:
        return f"is {shown}, of {len(name)} characters: give {QUEUE_MOST} at most"
    return None


def _queues_problems(text: str) -> list[str]:
    """The problems of a list of queues, a clause each."""
    names = [name.strip() for name in text.split(",")]
    problems = []
    if "" in names:
        problems.append(
            f"is {text!r}: a name is missing beside a comma: give names such as mail,reports"
            if len(names) > 1
            else "holds only blanks: give the name of a queue"
        )
    for name in dict.fromkeys(names):
        if name and (wrong := queue_problem(name)) is not None:
            problems.append(f"names a queue that {wrong}")
        if name and names.count(name) > 1:
            problems.append(f"names queue {name!r} twice: name it once")
    if len(names) > QUEUES_MOST:
        problems.append(f"names {len(names)} queues: name {QUEUES_MOST} at most")
    return problems


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
    settings, problems = _collected(os.environ if environ is None else environ, flags)
    problems += _missing(
        settings,
        [name for name in needed if not any(text.startswith(variable(name)) for text in problems)],
    )
    if problems:
        raise SettingsError([_by_option(problem, flags) for problem in problems])
    return settings


def _collected(environ: Mapping[str, str], flags: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """The settings, with the default for each that is wrong, and the problems."""
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
    return settings, problems + _contradictions(settings)


def _by_option(problem: str, flags: Mapping[str, Any]) -> str:
    """The problem, by the option's name where an option gave what is wrong."""
    subject, blank, rest = problem.partition(" ")
    name = subject.removeprefix("RECALL_").lower()
    return f"{option(name)}{blank}{rest}" if flags.get(name) is not None else problem


def option(name: str) -> str:
    """The command line's option for a field."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, slots=True)
class Shown:
    """A setting for people: what it is, and where that comes from."""

    name: str
    """The variable."""
    value: Any
    """As `Settings.shown` has it; where it is wrong, the text that was given, but `set` for what
    may hold a secret."""
    origin: str
    """`default`, `environment`, `file` or `credential`."""
    says: str


def survey(environ: Mapping[str, str] | None = None) -> tuple[list[Shown], list[str]]:
    """All settings as this environment has them, and every problem of them, a sentence each."""
    environ = os.environ if environ is None else environ
    settings, problems = _collected(environ, {})
    values = settings.shown()
    found = []
    for f in dataclasses.fields(Settings):
        name, value = variable(f.name), values[f.name]
        where = origin(f.name, environ)
        wrong = any(problem.startswith(f"{name} ") for problem in problems)
        if wrong and where != "default":
            # An address that can't be read may hold a password where none is looked for.
            hidden = f.metadata["secret"] or f.name.endswith("_url")
            value = "set" if hidden else environ.get(name)
        found.append(Shown(name, value, where, f.metadata["says"]))
    return found, problems


def origin(name: str, environ: Mapping[str, str]) -> str:
    """Where a field's value comes from: `default`, `environment`, `file` (that `…_FILE` names) or
    `credential` (systemd's)."""
    if environ.get(variable(name)):
        return "environment"
    if not _field(name).metadata["secret"]:
        return "default"
    if environ.get(variable(name) + "_FILE"):
        return "file"
    return "default" if file_of(name, environ) is None else "credential"


def actor(environ: Mapping[str, str] | None = None) -> str | None:
    """RECALL_ACTOR alone, for an application whose other settings are not the worker's. Raises
    SettingsError."""
    raw = (os.environ if environ is None else environ).get(variable("actor")) or None
    try:
        return None if raw is None else str(_converted(_field("actor"), raw))
    except ValueError as error:
        raise SettingsError([f"{variable('actor')} {error}"]) from None


def schema(environ: Mapping[str, str] | None = None) -> str | None:
    """RECALL_SCHEMA alone, likewise. Raises SettingsError."""
    raw = (os.environ if environ is None else environ).get(variable("schema")) or None
    try:
        name = None if raw is None else str(_converted(_field("schema"), raw))
    except ValueError as error:
        raise SettingsError([f"{variable('schema')} {error}"]) from None
    if problems := [f"{variable('schema')} {problem}" for problem in _schema_problems(name)]:
        raise SettingsError(problems)
    return name


def some(environ: Mapping[str, str] | None, names: Sequence[str]) -> Settings:
    """These settings alone, likewise; the others are as if nothing were set. Raises
    SettingsError."""
    environ = os.environ if environ is None else environ
    known = {variable(name) for name in names} | {variable(name) + "_FILE" for name in names}
    return read({name: value for name, value in environ.items() if name in known})


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


def secrets() -> list[str]:
    """The names of the settings that are secrets."""
    return [f.name for f in dataclasses.fields(Settings) if f.metadata["secret"]]


RESERVED_HEADERS = frozenset(
    {
        *("host", "content-length", "transfer-encoding", "connection", "te", "trailer", "upgrade"),
        *("expect", "keep-alive", "proxy-authorization", "proxy-connection"),
        *("content-type", "content-encoding", "accept", "accept-encoding", "user-agent", "cookie"),
        *("idempotency-key", "recall-attempt", "recall-lateness", "traceparent"),
        *("webhook-id", "webhook-timestamp", "webhook-signature"),
    }
)
"""Headers that the contract sets, or that decide where a request ends, in lower case. A cookie is
one of a session's, and the connections are everybody's."""
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,200}")
HEADERS_MOST, HEADER_MOST = 50, 16_384
"""Lines of RECALL_RUN_HEADERS at most, and characters of one value: servers refuse larger ones."""


def header_lines(
    text: str, *, beside_token: bool = False
) -> tuple[list[tuple[str, str]], list[str]]:
    """RECALL_RUN_HEADERS as names and values, and the problems, without a word of a value. A line
    that is empty or starts with `#` is none. `beside_token`: RECALL_RUN_TOKEN is set, too."""
    found: list[tuple[str, str]] = []
    problems: list[str] = []
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, value = line.partition(":")
        name, value = name.strip(), value.strip()
        lower = name.lower()
        if not colon or not _HEADER.fullmatch(name):
            problems.append(f"has no header in line {number}: write `Name: value`")
        elif not value:
            problems.append(f"has no value for {name} in line {number}")
        elif not value.isascii() or not value.isprintable() or len(value) > HEADER_MOST:
            problems.append(
                f"has a value for {name} in line {number} that no HTTP header can carry: use plain "
                f"ASCII, at most {HEADER_MOST} characters"
            )
        elif lower in RESERVED_HEADERS:
            problems.append(
                f"names {name} in line {number}, which the worker sets itself: leave it out"
            )
        elif lower == "authorization" and beside_token:
            problems.append(
                f"names Authorization in line {number}, and RECALL_RUN_TOKEN sets it, too: keep one"
            )
        elif lower in seen:
            problems.append(f"names {name} twice, again in line {number}: keep one")
        else:
            seen.add(lower)
            found.append((name, value))
    if len(found) > HEADERS_MOST:
        problems.append(f"has more than {HEADERS_MOST} headers: leave some out")
    return found, problems


def comes_from_file(name: str, environ: Mapping[str, str]) -> bool:
    """Whether a secret is read from a file, or may be from a credential, and not from the
    environment itself."""
    return not environ.get(variable(name)) and bool(
        environ.get(variable(name) + "_FILE") or environ.get("CREDENTIALS_DIRECTORY")
    )


def file_of(name: str, environ: Mapping[str, str]) -> Path | None:
    """The file that a secret is read from, if there is one."""
    for path in _secret_files(variable(name), environ).values():
        with contextlib.suppress(OSError):
            if path.exists():
                return path
    return None


def reread(name: str, environ: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """A secret as its file has it now, and the problems, without a word of the secret. None where
    there is no value, or none that can be used."""
    problems: list[str] = []
    f = _field(name)
    raw = _raw(f, environ, problems)
    if raw is None or problems:
        return None, problems
    try:
        value = str(_converted(f, raw))
    except ValueError as error:
        return None, [f"{variable(name)} {error}"]
    wrong = []
    if name.endswith("dsn"):
        wrong = _dsn_problems(value)
    elif name == "run_headers":
        token = variable("run_token")
        beside = bool(environ.get(token) or environ.get(token + "_FILE"))
        wrong = header_lines(value, beside_token=beside)[1]
    elif name == "token_key":
        wrong = token_key_problems(value)
    elif name == "run_token" and not value.isascii():
        wrong = ["holds characters that no HTTP header can carry: use plain ASCII"]
    if wrong:
        return None, [f"{variable(name)} {problem}" for problem in wrong]
    return value, []


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
    files = _secret_files(name, environ)
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


def _secret_files(name: str, environ: Mapping[str, str]) -> dict[str, Path]:
    """Where the value of a variable may be besides the environment, by how that is called."""
    if environ.get(name + "_FILE"):
        return {name + "_FILE": Path(environ[name + "_FILE"])}
    if environ.get("CREDENTIALS_DIRECTORY"):
        return {"the credential " + name: Path(environ["CREDENTIALS_DIRECTORY"]) / name}
    return {}


def _converted(f: dataclasses.Field[Any], raw: Any) -> Any:
    kind = str(f.type).removesuffix(" | None")
    if kind == "str":
        text = str(raw)
        lines = f.name == "run_headers"
        if any((ord(c) < 32 or ord(c) == 127) and not (lines and c in "\r\n\t") for c in text):
            raise ValueError("holds a control character (a line break?): remove it")
        return libpq(text) if f.name in ("dsn", "listen_dsn") else text
    if kind == "bool":
        if str(raw).strip().lower() not in _WORDS:
            raise ValueError(f"is {raw!r}: give 1 or 0")
        return _WORDS[str(raw).strip().lower()]
    if f.metadata["size"]:
        raw = _octets(str(raw))
    try:
        # Any number that is not whole is a duration: seconds, or with units.
        number = int(raw) if kind == "int" else durations.seconds(str(raw), bare=True)
    except durations.DurationError as error:
        number_too = "seconds, such as 90, or " if error.instead == durations.EXAMPLES else ""
        raise ValueError(f"is {raw!r}, which {error}: give {number_too}{error.instead}") from None
    except ValueError:
        raise ValueError(f"is {raw!r}: give a whole number") from None
    least, most = f.metadata["least"], f.metadata["most"]
    if (
        number != number
        or (least is not None and number < least)
        or (most is not None and number > most)
    ):
        bounds = f"at least {least:g}" if most is None else f"between {least:g} and {most:g}"
        why = "" if f.metadata["because"] is None else f" ({f.metadata['because']})"
        raise ValueError(f"is {raw}: give a number {bounds}{why}")
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
    problems += [f"RECALL_SCHEMA {problem}" for problem in _schema_problems(s.schema)]
    problems += [f"RECALL_QUEUE {problem}" for problem in _queues_problems(s.queue)]
    if s.protocol == "agno" and s.agno_agent is None:
        problems.append(
            "RECALL_PROTOCOL is 'agno', which needs RECALL_AGNO_AGENT: set it to the agent's id"
        )
    if s.run_url is not None:
        problems += [f"RECALL_RUN_URL {problem}" for problem in _url_problems(s.run_url)]
    if s.failure_url is not None:
        problems += [
            f"RECALL_FAILURE_URL {problem}"
            for problem in _url_problems(s.failure_url, of_a_session=False)
        ]
    if s.run_token is not None and not s.run_token.isascii():
        problems.append(
            "RECALL_RUN_TOKEN holds characters that no HTTP header can carry: use plain ASCII"
        )
    if s.run_headers is not None:
        wrong = header_lines(s.run_headers, beside_token=s.run_token is not None)[1]
        problems += [f"RECALL_RUN_HEADERS {problem}" for problem in wrong]
    if s.session_limit is not None and not _LIMITS.fullmatch(s.session_limit):
        problems.append(
            f"RECALL_SESSION_LIMIT is {s.session_limit!r}: give runs an hour, a day or both, as in "
            "20/h,100/d"
        )
    if not _LIMITS.fullmatch(s.agent_limit):
        problems.append(
            f"RECALL_AGENT_LIMIT is {s.agent_limit!r}: give recalls an hour, a day or both, as in "
            "30/h,200/d"
        )
    problems += [f"RECALL_TOKEN_KEY {problem}" for problem in token_key_problems(s.token_key or "")]
    if not s.token_audience.strip():
        problems.append("RECALL_TOKEN_AUDIENCE is blank: give a name, such as recall-worker")
    if s.mcp_session in (".", ".."):
        problems.append(
            f"RECALL_MCP_SESSION is {s.mcp_session!r}, which can't be a session's id: give the id "
            "that the application gave the session"
        )
    problems += [f"RECALL_MCP_HOSTS {problem}" for problem in _hosts_problems(s.mcp_hosts or "")]
    keep, wrong = retention(s.prune or "")
    problems += [f"RECALL_PRUNE {problem}" for problem in wrong]
    counted = max((span for span, _ in s.session_windows), default=0)
    if not wrong and keep.get("calls", counted) < counted:
        problems.append(
            "RECALL_PRUNE deletes records of calls that RECALL_SESSION_LIMIT counts: name calls, "
            "with a day or more (an hour for /h)"
        )
    if s.ops_listen is not None and (s.ops_address is None or s.ops_address[1] > 65535):
        problems.append(
            f"RECALL_OPS_LISTEN is {s.ops_listen!r}: give host:port, such as 127.0.0.1:9464 or "
            "[::1]:9464 (0.0.0.0:9464 for every address), or a port alone"
        )
    problems += _console_problems(s)
    for secret in [one for one in (s.signing_secret or "").split() if one.startswith("whsec_")]:
        try:
            base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except ValueError:
            problems.append(
                "RECALL_SIGNING_SECRET starts with whsec_ but is not base64 after it: copy it again"
            )
    if s.ca_file is not None and not os.access(s.ca_file, os.R_OK):
        problems.append(f"RECALL_CA_FILE is {s.ca_file!r}, which can't be read: give a PEM file")
    for name in ("client_cert_file", "client_key_file"):
        file = getattr(s, name)
        if file is not None and not os.access(file, os.R_OK):
            problems.append(f"{variable(name)} is {file!r}, which can't be read: give a PEM file")
    if s.client_key_file is not None and s.client_cert_file is None:
        problems.append(
            "RECALL_CLIENT_KEY_FILE is set without RECALL_CLIENT_CERT_FILE: set both, or neither"
        )
    if s.proxy is not None:
        problems += [f"RECALL_PROXY {problem}" for problem in _proxy_problems(s.proxy)]
    return problems


KEY_LEAST, KEYS_MOST = 32, 10
"""Octets of the shortest key that signs tokens, as HMAC-SHA256 wants it, and keys at most."""


def token_key_problems(text: str) -> list[str]:
    """The problems of RECALL_TOKEN_KEY, a clause each, without a word of a key."""
    keys, problems = text.split(), []
    for number, key in enumerate(keys, 1):
        which = f" ({number} of {len(keys)})" if len(keys) > 1 else ""
        if (octets := len(key.encode(errors="replace"))) < KEY_LEAST:
            problems.append(
                f"holds a key{which} of {octets} octets: give {KEY_LEAST} at least, such as what "
                "`openssl rand -base64 32` prints"
            )
        elif len(set(key)) < 8:
            problems.append(
                f"holds a key{which} that can be guessed: give a random one, such as what "
                "`openssl rand -base64 32` prints"
            )
    if len(set(keys)) < len(keys):
        problems.append("holds a key twice: keep one")
    if len(keys) > KEYS_MOST:
        problems.append(f"holds {len(keys)} keys: keep {KEYS_MOST} at most")
    return problems


def _hosts_problems(text: str) -> list[str]:
    """The problems of names that stand in the header Host, a clause each."""
    return [
        f"names {name.strip()!r}: give a host, or host:port, without http:// and without a path, "
        "such as mcp.example.com"
        for name in (text.split(",") if text else [])
        if not _HOST.fullmatch(name.strip())
    ]


def _console_problems(s: Settings) -> list[str]:
    import ipaddress

    problems = []
    found = address(s.console_listen)
    if found is None or found[1] > 65535:
        problems.append(
            f"RECALL_CONSOLE_LISTEN is {s.console_listen!r}: give host:port, such as "
            "127.0.0.1:9465 or [::1]:9465, or a port alone"
        )
    base = s.console_base_path
    if base is not None and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*/?", base):
        problems.append(
            f"RECALL_CONSOLE_BASE_PATH is {base!r}: give a path of letters, digits and -._~, such "
            "as /recalls"
        )
    for name in names_in(s.console_hosts):
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
            problems.append(
                f"RECALL_CONSOLE_HOSTS names {name!r}: give names alone, such as "
                "console.example.com, without a port"
            )
    if s.console_token is not None and len(s.console_token) < 16:
        problems.append(
            "RECALL_CONSOLE_TOKEN is shorter than 16 characters: make one with openssl rand -hex 32"
        )
    if s.console_token is not None and not (
        s.console_token.isascii() and s.console_token.isprintable() and " " not in s.console_token
    ):
        problems.append(
            "RECALL_CONSOLE_TOKEN holds characters that no HTTP header can carry: use plain ASCII "
            "without blanks"
        )
    header, trusted = s.console_user_header, names_in(s.console_trusted)
    if header is not None and not _HEADER.fullmatch(header):
        problems.append(
            f"RECALL_CONSOLE_USER_HEADER is {header!r}: give a header's name, such as "
            "X-Forwarded-User"
        )
    if header is not None and not trusted:
        problems.append(
            "RECALL_CONSOLE_USER_HEADER is set without RECALL_CONSOLE_TRUSTED: set both, or "
            "everybody could say who they are"
        )
    if trusted and header is None:
        problems.append(
            "RECALL_CONSOLE_TRUSTED is set without RECALL_CONSOLE_USER_HEADER: set both, or neither"
        )
    for network in trusted:
        try:
            if ipaddress.ip_network(network).prefixlen == 0:
                problems.append(
                    f"RECALL_CONSOLE_TRUSTED names {network!r}, which is everybody: anybody could "
                    "say who they are; give the proxy's own address"
                )
        except ValueError:
            problems.append(
                f"RECALL_CONSOLE_TRUSTED names {network!r}: give addresses as 10.0.0.0/8 or ::1"
            )
    if s.console_messages not in ("hidden", "shown"):
        problems.append(
            f"RECALL_CONSOLE_MESSAGES is {s.console_messages!r}: give one of hidden, shown"
        )
    return problems


def _proxy_problems(url: str) -> list[str]:
    """The problems of a proxy's address, without a word of its password."""
    from urllib.parse import urlsplit

    wanted = "give http://host:port, or http://user:password@host:port"
    try:
        parts = urlsplit(url)
        port_is_right = parts.port is None or 0 < parts.port < 65536
    except ValueError:
        return [f"is no address: {wanted}"]
    if parts.scheme == "https":
        return [f"begins with https://, which is not spoken to a proxy: {wanted}"]
    if parts.scheme != "http" or not parts.hostname or not port_is_right:
        return [f"is no address: {wanted}"]
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.netloc.count("@") > 1:
        return [
            f"holds more than an address: {wanted} (in a password, write %2F for /, %40 for @, "
            "%3F for ?, %23 for #)"
        ]
    if re.search(r"\s", url):
        return ["holds a blank: write it as %20"]
    return []


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


def _schema_problems(name: str | None) -> list[str]:
    """The problems of a schema's name: as it stands in pg_namespace, whatever else it holds."""
    if name is None:
        return []
    if '"' in name:
        return ["holds a quotation mark: give the name as it is, without SQL's quotes"]
    if name.startswith("pg_") or name == "information_schema":
        return ["names a schema of PostgreSQL's own: give the application's"]
    if len(name.encode(errors="replace")) > 63:
        return ["is longer than a name can be: give one of 63 octets at most"]
    return []


def _url_problems(url: str, *, of_a_session: bool = True) -> list[str]:
    """`of_a_session`: whether {session_id} in it is replaced."""
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
        problems.append(
            "holds a user name or password: give the token in RECALL_RUN_TOKEN"
            if of_a_session
            else "holds a user name or password: leave it out, and verify the signature instead"
        )
    if not of_a_session:
        if "{" in url or "}" in url:
            problems.append("holds { or }: nothing is replaced in it; write them as %7B and %7D")
        return problems
    strange = set(re.findall(r"\{[^}]*\}?", url)) - {"{session_id}"}
    if strange:
        problems.append(
            f"holds {', '.join(sorted(strange))}: the one placeholder is {{session_id}}"
        )
    if "{session_id}" in parts.netloc:
        problems.append("names the session in the host: put {session_id} in the path")
    return problems
