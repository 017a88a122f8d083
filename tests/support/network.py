"""Hosts on one machine: Linux network namespaces with addresses of their own, joined by a switch,
whose paths can be cut.

A path is cut by sending what leaves for the other host to a hardware address that nobody has: it
vanishes, as in a switch that has failed, and nobody is told. Or it is barred: each packet is
answered with "no route to host", as a router does.

Namespaces are named after this process and removed at the end; those of a process that died before
it could are removed by the next. Needs Linux, root and iproute2. Never here: what runs in the
hosts, but for the ways to start it there.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Self

PREFIX = "recall-test-"
CLONE_NEWNET = 0x40000000
NOWHERE = "02:00:00:00:00:fe"
"""A hardware address that no host has."""

_numbers = count(1)


def lacking() -> str | None:
    """Why there can be no hosts here, or None."""
    if shutil.which("ip") is None:
        return "network namespaces need iproute2 (the command ip)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"{PREFIX}{os.getpid()}-{next(_numbers)}"
    try:
        _ip("netns", "add", probe)
        # Adding one may be allowed where entering it, or setting it up, is not.
        _ip("-n", probe, "link", "set", "lo", "up")
    except Unable as error:
        return f"network namespaces are not allowed here: {error}"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return None


class Unable(Exception):
    """iproute2 refused; its words."""


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Unable(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace. `address` is its IPv4 address, the same in no other network of this
    process."""

    name: str
    namespace: str
    address: str
    hardware: str

    @property
    def words(self) -> tuple[str, ...]:
        """What to put before a command to have it run here, as the same process."""
        return ("ip", "netns", "exec", self.namespace)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have this thread make its sockets and its processes here. Not to be left for another task
        in between."""
        libc = ctypes.CDLL(None, use_errno=True)
        own = Path(f"/proc/self/task/{threading.get_native_id()}/ns/net")
        with own.open() as home, Path(f"/run/netns/{self.namespace}").open() as here:
            if libc.setns(here.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"setns to {self.namespace}")
            try:
                yield
            finally:
                assert libc.setns(home.fileno(), CLONE_NEWNET) == 0, "this thread can't go home"

    def socket(self, port: int = 0) -> socket.socket:
        """A listening TCP socket of this host's address, for a server in this process."""
        with self.entered():
            return socket.create_server((self.address, port))


class Network:
    """Hosts by their names, each reaching each until a path is cut. A context manager; its end
    removes them, whatever runs there."""

    def __init__(self, *names: str) -> None:
        number = next(_numbers)
        self._switch = f"{PREFIX}{os.getpid()}-{number}-switch"
        self._hosts = {
            name: Host(
                name,
                f"{PREFIX}{os.getpid()}-{number}-{name}",
                f"10.199.{number % 256}.{n}",
                f"02:00:00:{number % 256:02x}:00:{n:02x}",
            )
            for n, name in enumerate(names, 1)
        }

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __enter__(self) -> Self:
        _sweep()
        try:
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "switch", "type", "bridge", "forward_delay", "0")
            _ip("-n", self._switch, "link", "set", "switch", "up")
            for n, host in enumerate(self._hosts.values(), 1):
                _ip("netns", "add", host.namespace)
                ends = (
                    "link",
                    "add",
                    f"port{n}",
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "eth0",
                    "netns",
                    host.namespace,
                )
                _ip("-n", self._switch, *ends)
                _ip("-n", self._switch, "link", "set", f"port{n}", "master", "switch", "up")
                _ip("-n", host.namespace, "link", "set", "lo", "up")
                _ip("-n", host.namespace, "link", "set", "eth0", "address", host.hardware, "up")
                _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            self.heal()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _remove(self) -> None:
        for namespace in (*(host.namespace for host in self._hosts.values()), self._switch):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)

    def cut(self, a: str, b: str, *, both: bool = True) -> None:
        """What a sends to b vanishes from now on; `both`: and what b sends to a. No connection is
        told."""
        self._lead(a, b, NOWHERE)
        if both:
            self._lead(b, a, NOWHERE)

    def bar(self, a: str, b: str) -> None:
        """What a sends to b is refused from now on: no route to host."""
        _ip("-n", self[a].namespace, "route", "replace", "unreachable", f"{self[b].address}/32")

    def heal(self) -> None:
        """Every host reaches every other again; connections that have not been given up go on."""
        for a in self._hosts:
            _ip("-n", self[a].namespace, "route", "flush", "type", "unreachable")
            for b in self._hosts:
                if a != b:
                    self._lead(a, b, self[b].hardware)

    def _lead(self, a: str, b: str, hardware: str) -> None:
        words = (
            "neigh",
            "replace",
            self[b].address,
            "lladdr",
            hardware,
            "dev",
            "eth0",
            "nud",
            "permanent",
        )
        _ip("-n", self[a].namespace, *words)


def _sweep() -> None:
    """Remove what processes that are gone left behind."""
    for line in _ip("netns", "list").splitlines():
        found = re.match(rf"({PREFIX}(\d+)-\S+)", line)
        if found and not Path(f"/proc/{found[2]}").exists():
            subprocess.run(["ip", "netns", "del", found[1]], capture_output=True, check=False)
