"""Values that Python has no type for: dates beyond its calendar, and JSON written by hand."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg import errors
from psycopg.abc import AdaptContext, Buffer
from psycopg.adapt import AdaptersMap, Loader
from psycopg.types.datetime import TimestamptzLoader
from psycopg.types.string import TextLoader

LEVELS_MOST = 100
"""Levels of nesting that are read from a JSON document: Python's own reader and writer stop at some
hundreds.
"""
DIGITS_MOST = 300
"""Digits of a whole number that a double can still stand for."""
EARLIEST, LATEST = datetime(1, 1, 2, tzinfo=UTC), datetime(9998, 1, 1, tzinfo=UTC)


def clamped(when: datetime) -> datetime:
    """`when`, or the nearest date that Python can still calculate with."""
    return when if EARLIEST.year < when.year < LATEST.year else min(LATEST, max(EARLIEST, when))


class Dates(TimestamptzLoader):
    """Dates as Python can hold them. Those that it can't hold (infinite, before Christ, beyond the
    year 9998) become the nearest that it can.

    In UTC, as Python subtracts two dates of one zone by local time, ignoring clock changes. Read as
    ISO, which is what we set (`setup`), whatever the connection was set to before.
    """

    def __init__(self, oid: int, context: AdaptContext | None = None) -> None:
        super().__init__(oid, None)

    def load(self, data: Buffer) -> datetime:
        text = bytes(data)
        if text.startswith(b"-") or text.endswith(b"BC"):
            return EARLIEST
        try:
            return clamped(super().load(data)).astimezone(UTC)
        except (errors.DataError, ValueError, OverflowError):
            return LATEST


def load_whatever_stands_there(
    conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any],
) -> None:
    """Have a connection also load values that somebody wrote by hand and Python has no type for."""
    register_loaders(conn.adapters)
    for name in ("json", "jsonb"):
        conn.adapters.register_loader(name, Documents)
    if is_unencoded(conn):
        conn.adapters.register_loader(0, Bytes)
        for name in _TEXTS:
            conn.adapters.register_loader(name, Bytes)


def is_unencoded(conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    """Whether the database's texts are bytes of any encoding, as PostgreSQL does not know which.
    Sent as UTF-8 (client_encoding), one odd byte makes a whole statement fail."""
    return conn.info.parameter_status("server_encoding") == "SQL_ASCII"


_TEXTS = (
    *("text", "varchar", "bpchar", "name"),
    *("date", "timestamp", "time", "timetz", "interval"),
)


class Bytes(Loader):
    """A text that may be in any encoding: UTF-8, and `\\xe9` for each byte that is none."""

    def load(self, data: Buffer) -> str:
        return bytes(data).decode("utf-8", "backslashreplace")


def register_loaders(adapters: AdaptersMap) -> None:
    """Load all dates: ours, and those of columns that the application has besides, which we only
    show, as PostgreSQL writes them."""
    adapters.register_loader("timestamptz", Dates)
    for name in ("date", "timestamp", "time", "timetz", "interval"):
        adapters.register_loader(name, TextLoader)


class Documents(Loader):
    """JSON. What Python, or a reader of our own `--json`, has no type for stays text: a document
    nested deeper than LEVELS_MOST, a number that is no finite double.
    """

    def load(self, data: Buffer) -> Any:
        text = bytes(data).decode("utf-8", "backslashreplace")
        levels = most = 0
        for bracket in re.findall(r"[][{}]", text):
            levels += 1 if bracket in "[{" else -1
            most = max(most, levels)
        if most > LEVELS_MOST:
            return text
        return json.loads(text, parse_int=_whole, parse_float=_fraction)


def _whole(digits: str) -> int | str:
    return int(digits) if len(digits) <= DIGITS_MOST else digits


def _fraction(digits: str) -> float | str:
    number = float(digits)
    return number if math.isfinite(number) else digits
