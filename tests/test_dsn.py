"""DSNs as applications have them, and what libpq makes of them."""

from __future__ import annotations

from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict

from recall_worker.dsn import libpq

SECRET = "open-sesame"
APP: dict[str, Any] = {"user": "ann", "password": SECRET, "host": "db", "dbname": "app"}

UNDERSTOOD = {
    "asyncpg": ("postgresql+asyncpg://ann:open-sesame@db/app", APP),
    "psycopg": ("postgresql+psycopg://ann:open-sesame@db/app", APP),
    "psycopg, async": ("postgresql+psycopg_async://ann:open-sesame@db/app", APP),
    "psycopg2": ("postgresql+psycopg2://ann:open-sesame@db/app", APP),
    "an older name": ("postgres+asyncpg://ann:open-sesame@db/app", APP),
    "in capitals": ("POSTGRESQL+ASYNCPG://ann:open-sesame@db/app", APP),
    "a port": ("postgresql+asyncpg://ann:open-sesame@db:5433/app", APP | {"port": "5433"}),
    "no database": ("postgresql+asyncpg://ann@db", {"user": "ann", "host": "db"}),
    "IPv6": (
        "postgresql+asyncpg://[::1]:5433/app",
        {"host": "::1", "port": "5433", "dbname": "app"},
    ),
    "a socket": ("postgresql+psycopg:///app?host=/run/pg", {"host": "/run/pg", "dbname": "app"}),
    "a blank before it": ("  postgresql+asyncpg://ann:open-sesame@db/app\n", APP),
    "an encoded password": (
        "postgresql+asyncpg://ann:p%40s%2Fs%3A%25@db/app",
        APP | {"password": "p@s/s:%"},
    ),
    "marks that SQLAlchemy takes as they are": (
        "postgresql+asyncpg://ann:p/s?s:#+ä@db/app",
        APP | {"password": "p/s?s:#+ä"},
    ),
    "ssl": (
        "postgresql+asyncpg://ann:open-sesame@db/app?ssl=require",
        APP | {"sslmode": "require"},
    ),
    "ssl, as a word": (
        "postgresql+asyncpg://ann:open-sesame@db/app?ssl=true",
        APP | {"sslmode": "require"},
    ),
    "ssl by libpq's name": (
        "postgresql+psycopg2://ann:open-sesame@db/app?sslmode=verify-full&sslrootcert=/ca.pem",
        APP | {"sslmode": "verify-full", "sslrootcert": "/ca.pem"},
    ),
    "a timeout": (
        "postgresql+asyncpg://ann:open-sesame@db/app?timeout=2.5&command_timeout=60",
        APP | {"connect_timeout": "3"},
    ),
    "what tunes a driver": (
        "postgresql+asyncpg://ann:open-sesame@db/app"
        "?prepared_statement_cache_size=0&statement_cache_size=0&prepare_threshold=5",
        APP,
    ),
    "options": (
        "postgresql+psycopg2://ann:open-sesame@db/app?options=-c+search_path%3Dapp",
        APP | {"options": "-c search_path=app"},
    ),
    "several hosts": (
        "postgresql+psycopg2://ann:open-sesame@/app?host=one:5433&host=two:5434",
        APP | {"host": "one,two", "port": "5433,5434"},
    ),
    "several hosts, one port": (
        "postgresql+asyncpg://ann:open-sesame@/app?host=one,two&port=5433",
        APP | {"host": "one,two", "port": "5433,5433"},
    ),
    "libpq's own": (
        "postgresql://ann:open-sesame@one,two/app?sslmode=require&ssl=true",
        APP | {"host": "one,two", "port": ",", "sslmode": "require"},
    ),
    "libpq's own, in capitals": ("Postgres://ann:open-sesame@db/app", APP),
    "pairs": ("host=db user=ann password=open-sesame dbname=app", APP),
    "pairs with an address in them": (
        "host=db user=ann password=a+b://c dbname=app",
        APP | {"password": "a+b://c"},
    ),
    "a service": ("service=app", {"service": "app"}),
}


@pytest.mark.parametrize(("given", "means"), UNDERSTOOD.values(), ids=list(UNDERSTOOD))
def test_what_is_understood(given: str, means: dict[str, Any]) -> None:
    """The same server, account and parameters as for the application."""
    assert conninfo_to_dict(libpq(given)) == means


REFUSED = {
    "mydb": "is neither a URL nor key=value pairs",
    "localhost:5432/app": "is neither a URL nor key=value pairs",
    f"ann:{SECRET}@db/app": "is neither a URL nor key=value pairs",
    f"mysql+pymysql://ann:{SECRET}@db/app": "is no address of PostgreSQL's",
    f"sqlite:///{SECRET}": "is no address of PostgreSQL's",
    f"postgresql+asyncpg://ann:{SECRET}@db/app?pool_size=5": "holds the parameter pool_size",
    f"postgresql+asyncpg://ann:{SECRET}@db/app?{SECRET}": "has a parameter without a value",
    f"postgresql://ann:{SECRET}@db/app?pgbouncer=true": "holds the parameter pgbouncer",
    f"postgresql://ann:{SECRET}@db/app?search_path=app": "RECALL_SCHEMA",
    f"postgresql://ann:{SECRET}@db/app?currentSchema=app": "RECALL_SCHEMA",
    f"postgresql+asyncpg://ann:{SECRET}@/app?host=a,b&port=1,2,3": "number of ports",
}


@pytest.mark.parametrize(("given", "says"), REFUSED.items(), ids=range(len(REFUSED)))
def test_what_is_refused(given: str, says: str) -> None:
    """With the reason, and what to write; never with a piece of what may be a password."""
    with pytest.raises(ValueError) as refused:
        libpq(given)
    assert says in str(refused.value) and SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "given",
    [
        f"postgresql://ann:half?{SECRET}=a@db/app",
        f"postgresql://db/app?{SECRET}",
        f"postgresql://db/app?{SECRET}=1",
    ],
)
def test_what_may_be_a_password_is_left_to_libpq(given: str) -> None:
    """It refuses it, too, and what it quotes is never shown."""
    assert libpq(given) == given
