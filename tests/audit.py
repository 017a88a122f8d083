"""`python -m tests.audit`: are there known vulnerabilities in what is installed with recall-worker?

Asks pip-audit about the exact versions that are installed here of all that recall-worker needs to
run (the extras `embedded` and `otel` included, the tools of development not): PyPI's own list
first, OSV's for what that does not answer. One that is found fails. A list that can't be had fails
nothing, as that is the network's doing, but it is said loudly: pip-audit itself calls what it could
not look up "no known vulnerabilities".
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

LISTS = {"pypi": "PyPI's JSON API", "osv": "api.osv.dev"}
PATIENCE = 300.0

Ask = Callable[[str, Mapping[str, str]], Any]
"""From a list's name and versions by name to pip-audit's report, or None where it could not make
one."""


@dataclass(slots=True)
class Audit:
    clean: set[str] = field(default_factory=set)
    vulnerable: list[str] = field(default_factory=list)
    """A sentence each."""
    unknown: set[str] = field(default_factory=set)
    """Those that no list could be asked about."""


def installed(
    name: str = "recall-worker", extras: frozenset[str] = frozenset({"embedded", "otel"})
) -> dict[str, str]:
    """The versions of all that a package needs to run, as installed here; without itself."""
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    left = [(name, extras)]
    while left:
        one, wanted = left.pop()
        if (one, wanted) in seen:
            continue
        seen.add((one, wanted))
        try:
            package = distribution(one)
        except PackageNotFoundError:
            continue  # An extra that nobody installed here.
        found[re.sub(r"[-_.]+", "-", one).lower()] = package.version
        for line in package.requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in {"", *wanted}
            ):
                left.append((needed.name, frozenset(needed.extras)))
    del found[name]
    return found


def audit(versions: Mapping[str, str], ask: Ask) -> Audit:
    """Ask each list in turn about what the ones before it did not know."""
    result = Audit(unknown=set(versions))
    for name in LISTS:
        report = (
            ask(name, {one: versions[one] for one in sorted(result.unknown)})
            if result.unknown
            else None
        )
        for entry in (report or {}).get("dependencies", []):
            one = str(entry["name"])
            if "skip_reason" in entry:
                continue
            result.unknown.discard(one)
            if not entry["vulns"]:
                result.clean.add(one)
            for found in entry["vulns"]:
                mended = ", ".join(found.get("fix_versions") or []) or "no release yet"
                result.vulnerable.append(
                    f"{one} {entry['version']}: {found['id']}, mended in {mended}"
                )
    return result


def pip_audit(name: str, versions: Mapping[str, str]) -> Any:
    """pip-audit's report; None where it has none, because the list can't be reached."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="ascii") as file:
        file.write("".join(f"{one}=={version}\n" for one, version in versions.items()))
        file.flush()
        options = [
            "-r",
            file.name,
            "--no-deps",
            "--disable-pip",
            "-f",
            "json",
            "--progress-spinner",
            "off",
            "-s",
            name,
        ]
        try:
            done = subprocess.run(
                [Path(sys.executable).parent / "pip-audit", *options],
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
            return json.loads(done.stdout)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            return None


def main(ask: Ask = pip_audit) -> int:
    versions = installed()
    result = audit(versions, ask)
    print(f"{len(result.clean)} of {len(versions)} packages have no known vulnerability.")
    for said in result.vulnerable:
        print(f"VULNERABLE: {said}")
    if result.unknown:
        print(
            f"NOT AUDITED: {', '.join(sorted(result.unknown))}. Neither "
            f"{' nor '.join(LISTS.values())} told anything about them: "
        )
        print(
            "             is there a way to them from here? This says NOTHING about their "
            "vulnerabilities, and fails nothing."
        )
    return 1 if result.vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
