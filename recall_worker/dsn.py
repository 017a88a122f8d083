"""DSNs as applications have them, made into ones that libpq reads.

An application on SQLAlchemy has `postgresql+asyncpg://ann:p%40ss@db/app?ssl=require`: the same
server, with the name of a driver and its parameters. Parameters that libpq has under the same or
another name are kept; those that tune the driver alone (caches, timeouts of its own) mean nothing
here and are left out; any other is refused, by its name.

Pure. Nothing here quotes a DSN: pieces of it may be a password.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import cache
from urllib.parse import quote, unquote, unquote_plus

EXAMPLE = "postgresql://user@host:5432/database"
FORMS = f"{EXAMPLE}, or host=… dbname=… user=…"
"""What a DSN looks like."""

_URL = re.compile(
    r"""(?xs)
    (?P<scheme> [\w.-]+) (?: \+ (?P<driver> \w+))? (?P<colon> ://)
    (?: (?P<user> [^:/@]*) (?: : (?P<password> [^@]*))? @)?
    (?P<place> [^/?]*)
    (?: / (?P<database> [^?]*))?
    (?: \? (?P<query> .*))?
    """
)
_SCHEMES = ("postgresql", "postgres")
_DRIVERS_OWN = frozenset(
    {
        "async_fallback",
        "async_creator_fn",
        "autocommit",
        "command_timeout",
        "connection_class",
        "executemany_mode",
        "max_cacheable_statement_size",
        "max_cached_statement_lifetime",
        "prepare_threshold",
        "prepared_statement_cache_size",
        "prepared_statement_name_func",
        "record_class",
        "statement_cache_size",
        "use_native_hstore",
        "use_native_unicode",
    }
)
"""Parameters that tune a driver, and say nothing of the server."""
_NAMES = {"ssl": "sslmode", "timeout": "connect_timeout", "database": "dbname"}
"""Other drivers' names of what libpq has."""
_SSL = {"true": "require", "false": "disable"}
_SCHEMA_NAMES = ("schema", "search_path", "currentschema")
_PLACE = re.compile(r"(?P<host>\[[^\]]*\]|[^:\[\]/]*):(?P<port>\d+)")


def libpq(text: str) -> str:
    """The DSN as libpq reads it. Raises ValueError with what is wrong and what to write, a clause
    that follows the variable's name."""
    text = text.strip()
    if "://" not in text:
        if "=" not in text:
            raise ValueError(f"is neither a URL nor key=value pairs: give {FORMS}")
        return text
    found = _URL.fullmatch(text)
    scheme = text.partition("://")[0]
    if "=" in scheme or " " in scheme:
        return text  # Key=value pairs, one of whose values holds "://".
    driver = scheme.partition("+")[2] if "+" in scheme else None
    if scheme.partition("+")[0].lower() not in _SCHEMES:
        raise ValueError(f"is no address of PostgreSQL's: give {FORMS}")
    if driver is None:
        query = text.partition("?")[2]
        if "@" not in query:  # Else it may be the rest of a password that holds a question mark.
            _check(unquote(name) for name, equals, _ in _parts(query) if equals)
        return text if scheme in _SCHEMES else "postgresql" + text[len(scheme) :]
    if found is None:
        raise ValueError("holds @ or / in its user or password: write %40 and %2F")
    return _translated(found)


def _translated(found: re.Match[str]) -> str:
    """A URL of SQLAlchemy's, read as SQLAlchemy does: there a password may hold a slash."""
    user, password, place = found["user"], found["password"], found["place"]
    given: dict[str, str] = {}
    hosts: list[tuple[str, str]] = []
    for name, equals, value in _parts(found["query"] or ""):
        if not equals:
            raise ValueError("has a parameter without a value: give it as name=value")
        name, value = unquote_plus(name), unquote_plus(value)
        name = _NAMES.get(name, name)
        if name == "host":
            hosts += [_host(one) for one in value.split(",")]
        elif name not in _DRIVERS_OWN:
            given[name] = value
    if hosts:
        ports = given.pop("port", "").split(",")
        if len(ports) == 1:
            ports *= len(hosts)
        if len(ports) != len(hosts):
            raise ValueError("names another number of ports than of hosts: give as many")
        given["host"] = ",".join(host for host, _ in hosts)
        written = [port or other for (_, port), other in zip(hosts, ports, strict=True)]
        if any(written):
            given["port"] = ",".join(written)
    _check(given)
    if "sslmode" in given:
        given["sslmode"] = _SSL.get(given["sslmode"].lower(), given["sslmode"])
    if "connect_timeout" in given:
        given["connect_timeout"] = _whole(given["connect_timeout"])
    login = "" if user is None else quote(unquote(user), safe="")
    if password is not None:
        login += ":" + quote(unquote(password), safe="")
    at = "@" if user is not None else ""
    database = "" if found["database"] is None else "/" + found["database"]
    query = "&".join(f"{name}={quote(value, safe='/,:')}" for name, value in given.items())
    if query and not database:
        database = "/"
    return f"postgresql://{login}{at}{place}{database}{'?' if query else ''}{query}"


def _host(text: str) -> tuple[str, str]:
    """A host and its port, if it has one, of a parameter `host`."""
    found = _PLACE.fullmatch(text)
    return (text, "") if found is None else (found["host"].strip("[]"), found["port"])


def _whole(seconds: str) -> str:
    """A driver's timeout may be a fraction."""
    try:
        return f"{math.ceil(float(seconds))}"
    except (ValueError, OverflowError):
        return seconds


def _parts(query: str) -> list[tuple[str, str, str]]:
    return [part.partition("=") for part in query.split("&") if part]


def _check(names: Iterable[str]) -> None:
    """Raise ValueError for a parameter that libpq does not know."""
    for name in names:
        if name in _known() or not re.fullmatch(r"\w{1,40}", name, re.ASCII):
            continue  # What is no name at all is left to libpq: it may be a piece of a password.
        if name.lower() in _SCHEMA_NAMES:
            raise ValueError(
                f"holds the parameter {name}, which libpq does not know: leave it out, and set "
                "RECALL_SCHEMA"
            )
        raise ValueError(
            f"holds the parameter {name}, which libpq does not know: leave it out, or give "
            "libpq's own (sslmode, connect_timeout, options …)"
        )


@cache
def _known() -> frozenset[str]:
    from psycopg.pq import Conninfo

    # libpq takes `ssl=true` for JDBC's sake.
    return frozenset(option.keyword.decode() for option in Conninfo.get_defaults()) | {"ssl"}
