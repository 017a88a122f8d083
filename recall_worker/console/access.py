"""Who may see the pages, and who acts: the user of a request, or the reason why there is none.

On this host's own loopback nobody is asked, unless a token is set. Elsewhere a user shows the token
(on the login page, which sets a cookie, or as a bearer token), or a trusted proxy says in a header
who it is. A name that nobody has told us of in Host is refused, so that no foreign page reaches the
console by a name of its own; a POST is taken from the console's own pages alone.

The cookie holds the user's name and its end, signed with a key made of the token: a new token ends
all of them. Attempts are bounded, by peer and in all.

Never here: what a user may do in PostgreSQL, which PostgreSQL decides.
"""

from __future__ import annotations

import base64
import getpass
import hashlib
import hmac
import ipaddress
import json
import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from multidict import MultiMapping

from ..settings import Settings, names_in

COOKIE = "recall_console"
COOKIE_FOR = 12 * 3600.0
"""Seconds until a login ends."""
ATTEMPTS_PEER, ATTEMPTS_ALL, ATTEMPTS_WITHIN = 10, 100, 60.0
"""Wrong tokens of one address, and of all, within so many seconds; then nobody is let in."""
PEERS_MOST = 10_000
NAME_MOST = 100
"""Characters of a user's name."""
BEARER = "bearer token"
"""The user of a request with a token and without a name."""


@dataclass(frozen=True, slots=True)
class User:
    name: str
    """For the record of actions."""
    may_act: bool = True
    """Whether RECALL_CONSOLE_OPERATORS lets them."""
    by_cookie: bool = False
    """Whether there is a login that can be ended."""


class Attempts:
    """Counts what failed lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._by_peer: dict[str, deque[float]] = {}
        self._all: deque[float] = deque()

    def wait(self, peer: str) -> float:
        """Seconds until this address may try again; 0: now."""
        now = self._clock()
        own = self._lately(self._by_peer.get(peer, deque()), now)
        every = self._lately(self._all, now)
        full = [
            times[0] + ATTEMPTS_WITHIN - now
            for times, most in ((own, ATTEMPTS_PEER), (every, ATTEMPTS_ALL))
            if len(times) >= most
        ]
        return max(full, default=0.0)

    def failed(self, peer: str) -> None:
        now = self._clock()
        if len(self._by_peer) >= PEERS_MOST:
            self._by_peer = {
                name: times for name, times in self._by_peer.items() if self._lately(times, now)
            }
        if len(self._by_peer) < PEERS_MOST:
            self._by_peer.setdefault(peer, deque(maxlen=ATTEMPTS_PEER)).append(now)
        self._all.append(now)

    def _lately(self, times: deque[float], now: float) -> deque[float]:
        while times and times[0] <= now - ATTEMPTS_WITHIN:
            times.popleft()
        return times


class Access:
    def __init__(self, settings: Settings, token: Callable[[], str | None]) -> None:
        """`token()`: RECALL_CONSOLE_TOKEN as it stands now."""
        self._token = token
        self._header = settings.console_user_header
        self._networks = [ipaddress.ip_network(name) for name in names_in(settings.console_trusted)]
        operators = names_in(settings.console_operators)
        self._operators = frozenset(operators) if operators else None
        listened = settings.console_address[0]
        self._names = {
            "localhost",
            listened.lower(),
            *map(str.lower, names_in(settings.console_hosts)),
        }
        self._local = settings.actor or _login_name()
        self.attempts = Attempts()

    @property
    def asks_for_token(self) -> bool:
        return bool(self._token())

    def is_known_host(self, header: str | None) -> bool:
        """Whether a request was meant for us. An address needs no name, so nobody can take it for
        another's."""
        name = host_of(header or "")
        if name is None:
            return False
        return name in self._names or is_address(name)

    def said_twice(self, headers: MultiMapping[str]) -> str | None:
        """A header that says who asks, and stands there twice: a proxy that adds its own behind
        what it received, and no one can tell which is the proxy's."""
        names = filter(None, ("Authorization", self._header))
        return next((name for name in names if len(headers.getall(name, ())) > 1), None)

    def is_from_our_pages(self, headers: Mapping[str, str]) -> bool:
        """Whether a POST was sent by one of the console's own pages."""
        site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
        if site is None and origin is None:
            return False
        if site is not None and site != "same-origin":
            return False
        return origin is None or self._is_ours(origin, headers.get("Host", ""))

    def is_drawn_into_another(self, headers: Mapping[str, str]) -> bool:
        """Whether a page of somebody else's asked for this, and not by a link that a person
        followed: each page that a browser has open could ask PostgreSQL by us, and keep streams."""
        if headers.get("Sec-Fetch-Site") not in ("cross-site", "same-site"):
            return False
        return (headers.get("Sec-Fetch-Mode"), headers.get("Sec-Fetch-Dest")) != (
            "navigate",
            "document",
        )

    def _is_ours(self, origin: str, host: str) -> bool:
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        if parts.scheme not in ("http", "https") or not parts.netloc:
            return False
        if parts.netloc.lower() == host.lower():
            return True
        name = host_of(parts.netloc)
        if name == host_of(host) and None not in (ports := (_port(parts.netloc), _port(host))):
            return ports[0] == ports[1]  # Another port of a host is another program.
        # Behind a proxy that writes a Host of its own.
        return name is not None and name in self._names - {"localhost"} and not is_address(name)

    def user(self, headers: Mapping[str, str], cookie: str | None, peer: str) -> User | None:
        """Who asks; None where they have to log in. Raises Locked."""
        if self._header is not None and self._is_trusted(peer):
            given = headers.get(self._header, "").strip()
            if given:
                return self._named(given)
        token = self._token()
        if token is not None:
            scheme, _, given = headers.get("Authorization", "").partition(" ")
            if scheme.lower() == "bearer":
                return self._named(BEARER) if self._fits(given.strip(), token, peer) else None
            name = None if cookie is None else _name_of(cookie, token)
            return None if name is None else self._named(name, by_cookie=True)
        if self._header is not None:
            return None
        return self._named(self._local)

    def log_in(self, given: str, name: str, peer: str) -> str | None:
        """The cookie of a login; None where the token is wrong. Raises Locked."""
        token = self._token()
        if token is None or not self._fits(given, token, peer):
            return None
        return _cookie(_readable(name).strip()[:NAME_MOST] or BEARER, token)

    def _fits(self, given: str, token: str, peer: str) -> bool:
        peer = whose(peer)
        if (seconds := self.attempts.wait(peer)) > 0:
            raise Locked(seconds)
        if hmac.compare_digest(_octets(given), _octets(token)):
            return True
        self.attempts.failed(peer)
        return False

    def _named(self, name: str, *, by_cookie: bool = False) -> User:
        name = _readable(name)[:NAME_MOST]
        return User(name, self._operators is None or name in self._operators, by_cookie)

    def _is_trusted(self, peer: str) -> bool:
        try:
            address = ipaddress.ip_address(peer.partition("%")[0])
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self._networks)


class Locked(Exception):
    """Too many wrong tokens. `seconds`: until the next try."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"too many wrong tokens: try again in {seconds:.0f} s")
        self.seconds = seconds


def exposed(settings: Settings) -> list[str]:
    """The problem of a console that everybody could use, who reaches its address."""
    if settings.console_token is not None or settings.console_user_header is not None:
        return []
    host, _ = settings.console_address
    if host.lower() == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback):
        return []
    return [
        f"RECALL_CONSOLE_LISTEN is {settings.console_listen!r}, which others may reach, and nobody "
        "would be asked who they are: set RECALL_CONSOLE_TOKEN, or RECALL_CONSOLE_USER_HEADER with "
        "RECALL_CONSOLE_TRUSTED, or listen on 127.0.0.1"
    ]


def host_of(header: str) -> str | None:
    """The name or address in a Host header, in lower case and without its port."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]/@?#]+))(?::\d{1,5})?", header)
    return None if found is None else (found[1] or found[2]).lower().rstrip(".")


def _port(header: str) -> str | None:
    """The port that a Host header names."""
    found = re.search(r":(\d{1,5})$", header)
    return None if found is None else found[1]


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def whose(peer: str) -> str:
    """Whom attempts are counted for: an IPv4 address, or the network of 64 bits that one host has
    of IPv6."""
    try:
        address = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return peer
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


def _login_name() -> str:
    """As commands record it."""
    try:
        name = f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):
        name = f"uid {os.getuid()}@{socket.gethostname()}"
    return name.encode(errors="replace").decode()


def _cookie(name: str, token: str) -> str:
    body: dict[str, Any] = {"name": name, "until": int(time.time() + COOKIE_FOR)}
    text = base64.urlsafe_b64encode(json.dumps(body).encode()).decode().rstrip("=")
    return f"{text}.{_signature(text, token)}"


def _name_of(cookie: str, token: str) -> str | None:
    """Whose login it is; None where it is not ours, or over."""
    text, _, signature = cookie.partition(".")
    if not hmac.compare_digest(_octets(signature), _octets(_signature(text, token))):
        return None
    try:
        body = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        name, until = str(body["name"]), float(body["until"])
    except (ValueError, KeyError, TypeError):
        return None
    return name if time.time() < until else None


def _signature(text: str, token: str) -> str:
    key = hmac.digest(token.encode(), b"recall-worker console: login", hashlib.sha256)
    return hmac.new(key, _octets(text), hashlib.sha256).hexdigest()


def _octets(text: str) -> bytes:
    """What a header held, also where it was no UTF-8."""
    return text.encode(errors="surrogateescape")


def _readable(name: str) -> str:
    """A name that can be stored and read: without controls and marks of direction."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name)
