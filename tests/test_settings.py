"""Settings: read once, from the environment and then from flags; every problem at once; secrets
shown to nobody."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as tried
from hypothesis import strategies as st

from recall_worker import settings
from recall_worker.recall import FINAL
from recall_worker.settings import Settings, SettingsError

SECRETS = (
    *("dsn", "listen_dsn", "run_token", "run_headers", "signing_secret", "proxy"),
    "token_key",
    "console_token",
)
TEXTS = tuple(name for name in SECRETS if name != "run_headers")
"""Those whose values are any text."""
HUSH = "password=correct-horse-battery-staple"


def secret(name: str, word: str = HUSH) -> str:
    """A value of a secret setting with this word in it."""
    if name == "console_token":  # It has a least length.
        return f"of-some-length-{word}"
    return f"http://me:{word}@proxy:3128" if name == "proxy" else word


KEY = "0123456789abcdefghijklmnopqrstuv"
FIELDS = {f.name: f for f in dataclasses.fields(Settings)}


def problems(environ: dict[str, str], **flags: Any) -> list[str]:
    """What is wrong with these settings; nothing where they can be used."""
    try:
        settings.read(environ, **flags)
    except SettingsError as error:
        return error.problems
    return []


def test_defaults() -> None:
    """Without any variable the settings are DESIGN's."""
    found = settings.read({})
    assert found == Settings()
    assert (
        found.concurrency,
        found.busy_delay,
        found.lease,
        found.run_timeout,
        found.max_attempts,
    ) == (3, 60, 60, 1800, 3)
    assert (found.give_up, found.poll_interval, found.drain_timeout) == (86_400, 30, 30)
    assert (found.protocol, found.log_level, found.log_format) == ("native", "info", "auto")
    assert found.poll_interval <= settings.HORIZON / 2


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_has_its_variable(name: str) -> None:
    """Field `x` is read from `RECALL_X`, says what it is, and a flag of the same name wins over
    it."""
    file = __file__
    samples = {
        "dsn": ("postgresql:///a", "postgresql:///b"),
        "listen_dsn": ("postgresql:///a", "postgresql:///b"),
        "run_url": ("http://a/{session_id}", "https://b:8080/run"),
        "failure_url": ("http://a/failures", "https://b:8080/"),
        "run_token": ("t1", "t2"),
        "run_headers": ("x-api-key: 1", "x-api-key: 2"),
        "signing_secret": ("s1", "s2"),
        "ca_file": (file, str(Path(file).parent / "__init__.py")),
        "client_cert_file": (file, str(Path(file).parent / "__init__.py")),
        "proxy": ("http://a:3128", "http://u:p@b"),
        "protocol": ("native", "native"),
        "concurrency": ("7", "8"),
        "max_attempts": ("4", "5"),
        "session_limit": ("5/h", "9/h,50/d"),
        "fleet_concurrency": ("7", "8"),
        "langgraph_assistant": ("a", "b"),
        "agno_agent": ("a", "b"),
        "responses_model": ("a", "b"),
        "token_key": (KEY, f"{KEY} {KEY[::-1]}"),
        "token_audience": ("a", "b"),
        "mcp_session": ("a", "b"),
        "mcp_hosts": ("mcp.example.com", "[::1]:9466, a.example"),
        "agent_horizon": ("60", "90.5"),
        "agent_message": ("1000", "2000"),
        "agent_limit": ("5/h", "20/h,100/d"),
        "log_level": ("debug", "error"),
        "log_format": ("json", "console"),
        "ops_listen": ("9464", "[::1]:9465"),
        "console_listen": ("9464", "[::1]:9466"),
        "console_base_path": ("/a", "/b/c"),
        "console_hosts": ("a", "b.example, c.example"),
        "console_token": ("a-token-of-16-and-more", "another-token-of-16-and-more"),
        "console_operators": ("ann", "ann, bob"),
        "console_messages": ("shown", "hidden"),
        "prune": ("30d", "fired=7d,failed=90d"),
        "message_limit": ("1000", "2000"),
        "allow_copy": ("1", "yes"),
        "paused": ("on", "TRUE"),
    }
    if name == "client_key_file":  # It means nothing without the other.
        pair = {"RECALL_CLIENT_CERT_FILE": file, "RECALL_CLIENT_KEY_FILE": file}
        assert settings.read(pair).client_key_file == file
        return
    if name in ("console_user_header", "console_trusted"):
        pair = {"RECALL_CONSOLE_USER_HEADER": "X-User", "RECALL_CONSOLE_TRUSTED": "10.0.0.0/8"}
        assert getattr(settings.read(pair), name) == pair[settings.variable(name)]
        return
    first, second = samples.get(name, ("2.5", "3.5"))
    default: Any = FIELDS[name].default
    kind: Any = int if name == "fleet_concurrency" else str if default is None else type(default)
    variable = settings.variable(name)
    assert variable == "RECALL_" + name.upper()
    assert getattr(settings.read({variable: first}), name) == kind(first)
    assert getattr(settings.read({variable: first}, **{name: second}), name) == kind(second)
    nothing: dict[str, Any] = {name: None}
    assert getattr(settings.read({variable: first}, **nothing), name) == kind(first)
    assert FIELDS[name].metadata["says"]


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ("9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:9464", ("0.0.0.0", 9464)),
        ("[::1]:9464", ("::1", 9464)),
        ("ops.example:0", ("ops.example", 0)),
        ("", None),
    ],
)
def test_where_the_pages_are(given: str, means: tuple[str, int] | None) -> None:
    """A port alone is this host's own: the pages ask nobody who they are."""
    assert settings.read({"RECALL_OPS_LISTEN": given}).ops_address == means


HOUR, DAY = 3600.0, 86_400.0


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ("", {}),
        ("30d", dict.fromkeys(settings.KEPT, 30 * DAY)),
        (
            "1.5h, failed=90d",
            {
                "fired": 1.5 * HOUR,
                "cancelled": 1.5 * HOUR,
                "failed": 90 * DAY,
                "calls": 90 * DAY,
                "actions": 90 * DAY,
                "failures": 90 * DAY,
            },
        ),
        (
            "fired=7d,failed=90d",
            {"fired": 7 * DAY, "failed": 90 * DAY} | dict.fromkeys(settings.KEPT[3:], 90 * DAY),
        ),
        (
            "fired=90m,calls=1s",
            {"fired": 1.5 * HOUR, "calls": 1.0, "actions": 1.5 * HOUR, "failures": 1.5 * HOUR},
        ),
        (
            "fired=7d,actions=365d",
            {"fired": 7 * DAY, "calls": 7 * DAY, "actions": 365 * DAY, "failures": 7 * DAY},
        ),
        ("calls=1d", {"calls": DAY}),
        ("actions=1d", {"actions": DAY}),
        ("failures=1d", {"failures": DAY}),
        ("1h30m", dict.fromkeys(settings.KEPT, 1.5 * HOUR)),
        ("fired=2 weeks", {"fired": 14 * DAY} | dict.fromkeys(settings.KEPT[3:], 14 * DAY)),
    ],
)
def test_how_long_what_is_over_is_kept(given: str, means: dict[str, float]) -> None:
    """A duration alone is for all statuses that are not named; marks of calls, actions
    and failures outlast their recalls unless they are named."""
    assert settings.read({"RECALL_PRUNE": given}).keep == means


@pytest.mark.parametrize(
    ("given", "means"),
    [("90", 90), ("90s", 90), ("2.5", 2.5), ("30m", 1800), ("1h30", 5400), ("2 hours", 7200)],
)
def test_a_duration(given: str, means: float) -> None:
    """Seconds, or with units; from the environment and from a flag alike."""
    assert settings.read({"RECALL_RUN_TIMEOUT": given}).run_timeout == means
    assert settings.read({}, run_timeout=given).run_timeout == means


def test_what_can_be_kept() -> None:
    """Every status in which a recall is over, and the marks of calls, actions and failures told."""
    assert (*FINAL, "calls", "actions", "failures") == settings.KEPT


def test_several_things_wrong_with_a_retention() -> None:
    """Each is a problem of its own."""
    found = problems({"RECALL_PRUNE": "fired=soon,pending=1d,cancelled=1d,cancelled=2d"})
    assert len(found) == 3 and all(problem.startswith("RECALL_PRUNE ") for problem in found)


@pytest.mark.parametrize(
    ("keep", "limit", "wrong"),
    [
        ("23h", "100/d", True),
        ("23h", "20/h", False),
        ("30m", "20/h", True),
        ("1h,calls=1d", "100/d", False),
        ("1h", "", False),
    ],
)
def test_calls_that_are_counted_are_kept(keep: str, limit: str, wrong: bool) -> None:
    """A cap on a session's runs counts marks: those that it still counts are not to be deleted."""
    found = problems({"RECALL_PRUNE": keep, "RECALL_SESSION_LIMIT": limit})
    assert [problem.startswith("RECALL_PRUNE deletes records") for problem in found] == [
        True
    ] * wrong


def test_settings_are_frozen() -> None:
    """Nobody changes a setting in mid-run."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.read({}).lease = 1  # type: ignore[misc]


def test_an_empty_variable_is_none() -> None:
    """A variable that is set to nothing counts as not set: what a unit file or a compose file
    leaves behind."""
    assert settings.read({settings.variable(name): "" for name in FIELDS}) == Settings()


# --- what is wrong --------------------------------------------------------------------------------


WRONG = [
    ({"RECALL_ALLOW_COPY": "perhaps"}, "RECALL_ALLOW_COPY is 'perhaps': give 1 or 0"),
    ({"RECALL_PAUSED": "2"}, "RECALL_PAUSED is '2': give 1 or 0"),
    ({"RECALL_CONCURRENCY": "many"}, "RECALL_CONCURRENCY is 'many': give a whole number"),
    ({"RECALL_CONCURRENCY": "3.5"}, "RECALL_CONCURRENCY is '3.5': give a whole number"),
    ({"RECALL_CONCURRENCY": "0"}, "RECALL_CONCURRENCY is 0: give a number between 1 and 100000"),
    ({"RECALL_MAX_ATTEMPTS": "-1"}, "RECALL_MAX_ATTEMPTS is -1: give a number between 1 and 1000"),
    (
        {"RECALL_LEASE": "a minute"},
        "RECALL_LEASE is 'a minute', which is not a duration: give seconds",
    ),
    ({"RECALL_LEASE": "2 days"}, "RECALL_LEASE is 2 days: give a number between 1 and 86400"),
    ({"RECALL_LEASE": "0.5"}, "RECALL_LEASE is 0.5: give a number between 1 and 86400"),
    ({"RECALL_LEASE": "nan"}, "RECALL_LEASE is nan: give a number between 1 and 86400"),
    ({"RECALL_GIVE_UP": "-1"}, "RECALL_GIVE_UP is -1: give a number at least 0"),
    ({"RECALL_BUSY_DELAY": "0"}, "RECALL_BUSY_DELAY is 0: give a number at least 0.05"),
    ({"RECALL_BUSY_DELAY": "inf"}, "RECALL_BUSY_DELAY is inf: give a number"),
    ({"RECALL_GIVE_UP": "1e300"}, "RECALL_GIVE_UP is 1e300: give a number"),
    (
        {"RECALL_DSN": "postgresql://me:p@ss@host/db"},
        "RECALL_DSN holds @ or / in its user or password",
    ),
    (
        {"RECALL_POLL_INTERVAL": "31"},
        "RECALL_POLL_INTERVAL is 31: give a number between 0.1 and 30",
    ),
    ({"RECALL_PROTOCOL": "telepathy"}, "RECALL_PROTOCOL is 'telepathy': give one of native"),
    (
        {"RECALL_LOG_LEVEL": "loud"},
        "RECALL_LOG_LEVEL is 'loud': give one of debug, info, warning, error",
    ),
    ({"RECALL_LOG_FORMAT": "xml"}, "RECALL_LOG_FORMAT is 'xml': give one of auto, json, console"),
    ({"RECALL_RUN_URL": "localhost:8000"}, "RECALL_RUN_URL is no address"),
    ({"RECALL_RUN_URL": "ftp://a/b"}, "RECALL_RUN_URL is no address"),
    ({"RECALL_RUN_URL": "http://"}, "RECALL_RUN_URL is no address"),
    ({"RECALL_RUN_URL": "http://a:0/"}, "RECALL_RUN_URL is no address"),
    ({"RECALL_RUN_URL": "http://a:99999/"}, "RECALL_RUN_URL is no address"),
    ({"RECALL_RUN_URL": "http://[::1/"}, "RECALL_RUN_URL is no address"),
    ({"RECALL_RUN_URL": "http://a/b c"}, "RECALL_RUN_URL holds a blank"),
    ({"RECALL_RUN_URL": "http://me:pw@a/"}, "RECALL_RUN_URL holds a user name or password"),
    (
        {"RECALL_RUN_URL": "http://a/{session}/{x}"},
        "RECALL_RUN_URL holds {session}, {x}: the one placeholder is {session_id}",
    ),
    ({"RECALL_RUN_URL": "http://{session_id}.a/"}, "RECALL_RUN_URL names the session in the host"),
    ({"RECALL_RUN_URL": "http://a/\nb"}, "RECALL_RUN_URL holds a control character"),
    ({"RECALL_FAILURE_URL": "localhost:8000"}, "RECALL_FAILURE_URL is no address"),
    ({"RECALL_FAILURE_URL": "ftp://a/b"}, "RECALL_FAILURE_URL is no address"),
    ({"RECALL_FAILURE_URL": "http://a/b c"}, "RECALL_FAILURE_URL holds a blank"),
    (
        {"RECALL_FAILURE_URL": "http://me:pw@a/"},
        "RECALL_FAILURE_URL holds a user name or password: leave it out",
    ),
    (
        {"RECALL_FAILURE_URL": "http://a/{session_id}"},
        "RECALL_FAILURE_URL holds { or }: nothing is replaced in it",
    ),
    (
        {"RECALL_RUN_TOKEN": "tökén"},
        "RECALL_RUN_TOKEN holds characters that no HTTP header can carry",
    ),
    ({"RECALL_RUN_TOKEN": "a\r\nX-Injected: yes"}, "RECALL_RUN_TOKEN holds a control character"),
    (
        {"RECALL_SIGNING_SECRET": "whsec_not base64"},
        "RECALL_SIGNING_SECRET starts with whsec_ but is not base64",
    ),
    ({"RECALL_OPS_LISTEN": ":9464"}, "RECALL_OPS_LISTEN is ':9464': give host:port"),
    ({"RECALL_OPS_LISTEN": "::1:9464"}, "RECALL_OPS_LISTEN is '::1:9464': give host:port"),
    ({"RECALL_OPS_LISTEN": "here"}, "RECALL_OPS_LISTEN is 'here': give host:port"),
    (
        {"RECALL_OPS_LISTEN": "http://here:80"},
        "RECALL_OPS_LISTEN is 'http://here:80': give host:port",
    ),
    ({"RECALL_OPS_LISTEN": "65536"}, "RECALL_OPS_LISTEN is '65536': give host:port"),
    (
        {"RECALL_PRUNE": "soon"},
        "RECALL_PRUNE holds 'soon': give durations such as 30d, or fired=7d",
    ),
    ({"RECALL_PRUNE": "30"}, "RECALL_PRUNE holds '30': give durations"),
    ({"RECALL_PRUNE": "fired=30"}, "RECALL_PRUNE holds 'fired=30': give durations"),
    ({"RECALL_PRUNE": "=30d"}, "RECALL_PRUNE names '': give one of fired"),
    ({"RECALL_PRUNE": "30d,"}, "RECALL_PRUNE holds '': give durations"),
    (
        {"RECALL_PRUNE": "pending=30d"},
        "RECALL_PRUNE names 'pending': give one of fired, cancelled, failed, calls",
    ),
    ({"RECALL_PRUNE": "fired=30d,fired=7d"}, "RECALL_PRUNE names fired twice"),
    ({"RECALL_PRUNE": "30d,7d"}, "RECALL_PRUNE gives two durations for all"),
    ({"RECALL_PRUNE": "fired=0d"}, "RECALL_PRUNE holds 'fired=0d': keep for a second at least"),
    (
        {"RECALL_PRUNE": "fired=99999d"},
        "RECALL_PRUNE holds 'fired=99999d': keep for a second at least, and 11574d at most",
    ),
    (
        {"RECALL_CA_FILE": "/nowhere/ca.pem"},
        "RECALL_CA_FILE is '/nowhere/ca.pem', which can't be read",
    ),
    (
        {"RECALL_CLIENT_CERT_FILE": "/nowhere/me.pem"},
        "RECALL_CLIENT_CERT_FILE is '/nowhere/me.pem', which can't be read",
    ),
    ({"RECALL_TOKEN_KEY": "short"}, "RECALL_TOKEN_KEY holds a key of 5 octets: give 32 at least"),
    (
        {"RECALL_TOKEN_KEY": f"{KEY} short"},
        "RECALL_TOKEN_KEY holds a key (2 of 2) of 5 octets: give 32 at least",
    ),
    ({"RECALL_TOKEN_KEY": "a" * 40}, "RECALL_TOKEN_KEY holds a key that can be guessed"),
    ({"RECALL_TOKEN_KEY": f"{KEY} {KEY}"}, "RECALL_TOKEN_KEY holds a key twice"),
    (
        {"RECALL_TOKEN_KEY": " ".join(f"{KEY}{n}" for n in range(11))},
        "RECALL_TOKEN_KEY holds 11 keys: keep 10 at most",
    ),
    ({"RECALL_TOKEN_AUDIENCE": "  "}, "RECALL_TOKEN_AUDIENCE is blank"),
    ({"RECALL_MCP_SESSION": ".."}, "RECALL_MCP_SESSION is '..', which can't be a session's id"),
    ({"RECALL_MCP_HOSTS": "https://a/"}, "RECALL_MCP_HOSTS names 'https://a/': give a host"),
    ({"RECALL_MCP_HOSTS": "a,,b"}, "RECALL_MCP_HOSTS names '': give a host"),
    ({"RECALL_AGENT_LIMIT": "many"}, "RECALL_AGENT_LIMIT is 'many': give recalls an hour"),
    ({"RECALL_AGENT_INTERVAL": "0"}, "RECALL_AGENT_INTERVAL is 0: give a number at least 1"),
    ({"RECALL_PROXY": "proxy:3128"}, "RECALL_PROXY is no address: give http://host:port"),
    ({"RECALL_PROXY": "http://"}, "RECALL_PROXY is no address"),
    ({"RECALL_PROXY": "http://proxy:0"}, "RECALL_PROXY is no address"),
    ({"RECALL_PROXY": "socks5://proxy:1080"}, "RECALL_PROXY is no address"),
    ({"RECALL_PROXY": "https://proxy"}, "RECALL_PROXY begins with https://"),
    ({"RECALL_PROXY": "http://proxy/path"}, "RECALL_PROXY holds more than an address"),
    ({"RECALL_PROXY": "http://me:pass@word@proxy"}, "RECALL_PROXY holds more than an address"),
    ({"RECALL_PROXY": "http://me:a b@proxy"}, "RECALL_PROXY holds a blank"),
]


@pytest.mark.parametrize(
    ("environ", "says"), WRONG, ids=[f"{next(iter(w[0].items()))}" for w in WRONG]
)
def test_a_problem_names_its_variable_and_what_to_do(environ: dict[str, str], says: str) -> None:
    """One wrong setting is one problem: a sentence that begins with the variable."""
    [problem] = problems(environ)
    assert problem.startswith(says)


def test_a_key_without_a_certificate() -> None:
    """The key alone shows nobody who the worker is."""
    [problem] = problems({"RECALL_CLIENT_KEY_FILE": __file__})
    assert problem.startswith("RECALL_CLIENT_KEY_FILE is set without RECALL_CLIENT_CERT_FILE")


def test_all_problems_are_reported_at_once() -> None:
    """Whoever made five mistakes is told of five: conversions, files, and contradictions alike."""
    found = problems(
        {
            "RECALL_CONCURRENCY": "many",
            "RECALL_LEASE": "0",
            "RECALL_PROTOCOL": "telepathy",
            "RECALL_RUN_URL": "http://me@a/{session}",
            "RECALL_RUN_TOKEN_FILE": "/nowhere/token",
        },
        poll_interval="3600",
    )
    named = sorted(problem.split()[0] for problem in found)
    assert named == [
        "--poll-interval",  # What an option gave is told by the option's name.
        "RECALL_CONCURRENCY",
        "RECALL_LEASE",
        "RECALL_PROTOCOL",
        "RECALL_RUN_TOKEN_FILE",
        "RECALL_RUN_URL",
        "RECALL_RUN_URL",
    ]


@given(wrong=st.sets(st.integers(0, len(WRONG) - 1), min_size=1))
@tried(deadline=None)
def test_any_set_of_mistakes_is_reported_whole(wrong: set[int]) -> None:
    """However mistakes are combined, each variable that is wrong is named, and none that is
    right."""
    environ: dict[str, str] = {}
    for number in wrong:
        environ |= WRONG[number][0]
    assert {problem.split()[0] for problem in problems(environ)} == set(environ)


@pytest.mark.parametrize(
    ("least", "most"),
    [(f.metadata["least"], f.metadata["most"]) for f in FIELDS.values()],
    ids=list(FIELDS),
)
def test_bounds_are_reachable(
    least: float | None, most: float | None, request: pytest.FixtureRequest
) -> None:
    """The bounds that a problem names are themselves allowed."""
    name = request.node.callspec.id
    for bound in (least, most):
        if bound is not None:
            assert getattr(settings.read({settings.variable(name): f"{bound:g}"}), name) == bound


def test_needed() -> None:
    """What a command can't do without is named, all of it, with what it is, together with what is
    wrong."""
    with pytest.raises(SettingsError) as caught:
        settings.read(
            {"RECALL_RUN_TOKEN": HUSH, "RECALL_LEASE": "0"},
            needed=["dsn", "run_url", "run_token", "lease"],
        )
    said = [problem.partition(":")[0] for problem in caught.value.problems]
    assert said == ["RECALL_LEASE is 0", "RECALL_DSN is not set", "RECALL_RUN_URL is not set"]
    assert HUSH not in str(caught.value)
    assert settings.read({"RECALL_DSN": "postgresql:///a"}, needed=["dsn"]).dsn == "postgresql:///a"


@pytest.mark.parametrize(
    "url",
    [
        "http://a/sessions/{session_id}/run",
        "https://api.example:8443/x?session={session_id}",
        "http://[::1]:8000/{session_id}",
        "http://a/one-address-for-all",
        "http://a/{session_id}/%7Bkept%7D",
    ],
)
def test_addresses_that_will_do(url: str) -> None:
    """The placeholder may stand anywhere behind the host, or nowhere."""
    assert settings.read({"RECALL_RUN_URL": url}).run_url == url


# --- secrets --------------------------------------------------------------------------------------


def test_which_settings_are_secret() -> None:
    """DSNs, the token, the keys that sign, and the proxy, which may hold a password, are; nothing
    else is."""
    assert tuple(name for name, f in FIELDS.items() if f.metadata["secret"]) == SECRETS


@pytest.mark.parametrize("name", TEXTS)
def test_secrets_are_shown_to_nobody(name: str) -> None:
    """Neither repr, nor str, nor what is shown to people holds a secret; that it is set is told."""
    found = settings.read({settings.variable(name): secret(name)})
    assert getattr(found, name) == secret(name)
    assert HUSH not in repr(found) and HUSH not in str(found)
    assert HUSH not in str(found.shown()) and found.shown()[name] == "set"
    assert settings.read({}).shown()[name] is None


def test_problems_keep_secrets() -> None:
    """A secret that is wrong is called wrong without being quoted, as is a password in an
    address."""
    wrong = {settings.variable(name): f"{HUSH}\n{HUSH}" for name in TEXTS}
    urls = [
        f"http://me:{HUSH}@a/",
        f"http://me:{HUSH}/",
        f"http://me:{HUSH}@[a/",
        f"http://me:{HUSH}@a℀/",
        f"http://{HUSH}@/",
    ]
    for environ in [
        wrong,
        {"RECALL_RUN_TOKEN": HUSH + "é"},
        {"RECALL_SIGNING_SECRET": "whsec_" + HUSH},
        {"RECALL_DSN": f"postgresql://me:{HUSH}@x@host/db"},
    ]:
        found = problems(environ)
        assert len(found) == len(environ) and HUSH not in str(found)
    for url in urls:
        found = problems({"RECALL_RUN_URL": url})
        assert found and HUSH not in str(found)
    for url in (*urls[1:], f"https://me:{HUSH}@a", f"http://me:{HUSH}@a/b", f"http://m:{HUSH}@@a"):
        found = problems({"RECALL_PROXY": url})
        assert found and HUSH not in str(found)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("x-api-key", "no header in line 1"),
        ("# ours\n\nx api: " + HUSH, "no header in line 3"),
        (f": {HUSH}", "no header in line 1"),
        ("x-api-key:", "no value for x-api-key"),
        (f"x-api-key: {HUSH}é", "plain ASCII"),
        (f"x-api-key: {HUSH}\x07", "control character"),
        (f"x-api-key: {HUSH}\nX-Api-Key: 2", "names X-Api-Key twice, again in line 2"),
        (f"authorization: Basic {HUSH}", "RECALL_RUN_TOKEN sets it, too"),
        *(
            (f"{name}: {HUSH}", "which the worker sets itself")
            for name in (
                *("Host", "Content-Length", "transfer-encoding", "Connection", "Idempotency-Key"),
                *("Recall-Attempt", "recall-lateness", "traceparent", "webhook-signature"),
                *("Content-Type", "Proxy-Authorization", "Cookie", "Expect"),
            )
        ),
    ],
)
def test_headers_that_are_refused(lines: str, problem: str, tmp_path: Path) -> None:
    """At the start, in words, from the environment and from a file, and never with a value."""
    file = tmp_path / "headers"
    file.write_text(lines, encoding="utf-8")
    for environ in ({"RECALL_RUN_HEADERS": lines}, {"RECALL_RUN_HEADERS_FILE": str(file)}):
        found = problems(environ | {"RECALL_RUN_TOKEN": "t"})
        assert len(found) == 1 and problem in found[0] and "RECALL_RUN_HEADERS" in found[0]
        assert HUSH not in found[0]


def test_headers() -> None:
    """Their lines, without comments; Authorization where there is no token."""
    text = (
        "# for the gateway\r\nX-Api-Key:  a:b \n\nCF-Access-Client-Id: c\nAuthorization: Basic x\n"
    )
    assert settings.read({"RECALL_RUN_HEADERS": text}).run_headers is not None
    assert settings.header_lines(text) == (
        [("X-Api-Key", "a:b"), ("CF-Access-Client-Id", "c"), ("Authorization", "Basic x")],
        [],
    )
    found = settings.read({"RECALL_RUN_HEADERS": text})
    assert "a:b" not in repr(found) and found.shown()["run_headers"] == "set"


@pytest.mark.parametrize("name", TEXTS)
def test_a_secret_from_a_file(name: str, tmp_path: Path) -> None:
    """`…_FILE` names a file with the secret; the line break at its end is not part of it."""
    file = tmp_path / "secret"
    file.write_text(secret(name) + "\n", encoding="utf-8")
    found = settings.read({settings.variable(name) + "_FILE": str(file)})
    assert getattr(found, name) == secret(name)


@pytest.mark.parametrize("name", TEXTS)
def test_a_secret_from_a_systemd_credential(name: str, tmp_path: Path) -> None:
    """A credential of the variable's name is the secret, where neither the variable nor the file is
    set."""
    (tmp_path / settings.variable(name)).write_text(secret(name) + "\n", encoding="utf-8")
    credentials = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert getattr(settings.read(credentials), name) == secret(name)
    other, another = (
        secret(name, f"dbname={word}-and-thirty-two-octets-of-it") for word in ("other", "another")
    )
    found = settings.read(credentials | {settings.variable(name): other})
    assert getattr(found, name) == other
    (tmp_path / "file").write_text(another, encoding="utf-8")
    in_file = {settings.variable(name) + "_FILE": str(tmp_path / "file")}
    assert getattr(settings.read(credentials | in_file), name) == another


def test_a_directory_of_other_credentials(tmp_path: Path) -> None:
    """Credentials that are not ours, or a directory that is gone, change nothing."""
    assert settings.read({"CREDENTIALS_DIRECTORY": str(tmp_path)}) == Settings()
    assert settings.read({"CREDENTIALS_DIRECTORY": str(tmp_path / "gone")}) == Settings()


def test_what_can_be_wrong_with_a_secret_file(tmp_path: Path) -> None:
    """A file that is missing, no text, empty, of two lines, or beside the variable itself: each is
    said, and none is quoted."""
    binary, lines, empty = tmp_path / "binary", tmp_path / "lines", tmp_path / "empty"
    empty.touch()
    binary.write_bytes(b"\xff\xfe")
    lines.write_text(f"{HUSH}\n{HUSH}\n", encoding="utf-8")
    for environ, says in (
        (
            {"RECALL_RUN_TOKEN_FILE": str(tmp_path / "missing")},
            "RECALL_RUN_TOKEN_FILE can't be read: No such file",
        ),
        (
            {"RECALL_RUN_TOKEN_FILE": str(tmp_path)},
            "RECALL_RUN_TOKEN_FILE can't be read: Is a directory",
        ),
        ({"RECALL_RUN_TOKEN_FILE": str(binary)}, "RECALL_RUN_TOKEN_FILE can't be read: not UTF-8"),
        ({"RECALL_RUN_TOKEN_FILE": str(empty)}, "RECALL_RUN_TOKEN_FILE is empty"),
        ({"RECALL_RUN_TOKEN_FILE": str(lines)}, "RECALL_RUN_TOKEN holds a control character"),
        (
            {"RECALL_RUN_TOKEN_FILE": str(lines), "RECALL_RUN_TOKEN": HUSH},
            "RECALL_RUN_TOKEN and RECALL_RUN_TOKEN_FILE are both set",
        ),
    ):
        [problem] = problems(environ)
        assert problem.startswith(says) and HUSH not in problem


def test_only_secrets_come_from_files(tmp_path: Path) -> None:
    """`RECALL_LEASE_FILE` is no setting: it is told to be ignored and is not read."""
    (tmp_path / "lease").write_text("5", encoding="utf-8")
    environ = {"RECALL_LEASE_FILE": str(tmp_path / "lease")}
    assert settings.read(environ).lease == 60
    assert settings.ignored(environ) == ["RECALL_LEASE_FILE"]


# --- typing errors --------------------------------------------------------------------------------


def test_ignored() -> None:
    """Variables that look like settings and are none are named; those of others, and the tests'
    own, are not."""
    environ = {
        "RECALL_CONCURENCY": "5",
        "RECALL_": "",
        "RECALL_DSN": "x",
        "RECALL_DSN_FILE": "y",
        "RECALL_TEST_DSN": "z",
        "recall_lease": "1",
        "PATH": "/bin",
    }
    assert settings.ignored(environ) == ["RECALL_", "RECALL_CONCURENCY"]


@given(
    environ=st.dictionaries(
        st.sampled_from([settings.variable(n) for n in FIELDS]), st.text(max_size=20)
    )
)
@tried(deadline=None)
def test_any_text_is_taken_or_refused(environ: dict[str, str]) -> None:
    """Whatever stands in the variables, reading gives settings or problems that name them, and
    never breaks otherwise."""
    found = problems(environ)
    assert {problem.split()[0] for problem in found} <= set(environ)
    if not found:
        read = settings.read(environ)
        assert read.concurrency >= 1 and read.lease >= 1 and read.max_attempts >= 1
