"""The locked and hashed dependencies: `python -m release.lock` writes them, with uv.

Four locks, each for all platforms and for Python 3.11 and later:

- `image.txt`: what the image runs, of pyproject.toml's dependencies;
- `extras.txt`: the same with the extras `embedded`, `endpoint` and `otel`, for SECURITY.md;
- `build.txt`: what builds the wheel in the image;
- `docs.txt`: what builds the pages.

Versions that a lock has are kept where they still fit; `--upgrade` takes the newest. Reading a lock
needs no network and no uv.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "release" / "locks"
PYTHON = "3.11"
"""The oldest Python that we support: what it can't install is not locked."""
RUNTIME_EXTRAS = ("console", "embedded", "endpoint", "mcp", "otel")
IMAGE_EXTRAS = ("console",)
"""What the image has besides: it is one for all of kubernetes/ and compose.yaml."""

SOURCES: dict[str, tuple[str, ...]] = {
    "image": (
        "pyproject.toml",
        *(word for extra in IMAGE_EXTRAS for word in ("--extra", extra)),
    ),
    "extras": (
        "pyproject.toml",
        *(word for extra in RUNTIME_EXTRAS for word in ("--extra", extra)),
        "--constraint",
        "release/locks/image.txt",
    ),
    "build": ("release/locks/build.in",),
    "docs": ("release/locks/docs.in",),
}
"""Each lock's name, and what uv makes it from. In this order: one constrains the next."""


@dataclass(frozen=True, slots=True)
class Locked:
    """One package of a lock."""

    name: str
    version: str
    marker: Marker | None
    """Where it is installed; None: everywhere."""
    hashes: frozenset[str]
    needed_by: frozenset[str] = field(default_factory=frozenset)
    """The packages that need it, by name; recall-worker among them where it is named in
    pyproject.toml."""


def read(name: str) -> dict[str, Locked]:
    """A lock's packages by name. Raises OSError where there is no such lock, and ValueError for a
    line that is not understood, or a package without a hash."""
    found: dict[str, Locked] = {}
    text = (LOCKS / f"{name}.txt").read_text(encoding="utf-8")
    for block in re.split(r"^(?=[^\s#])", text, flags=re.MULTILINE)[1:]:
        lines = [line.strip().removesuffix("\\").strip() for line in block.splitlines()]
        requirement = Requirement(lines[0])
        [specifier] = requirement.specifier
        hashes = {line.partition("=")[2] for line in lines if line.startswith("--hash=")}
        if specifier.operator != "==" or not hashes:
            raise ValueError(f"{name}.txt: {lines[0]} is not pinned with a hash")
        comments = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
        needed_by = comments.removeprefix("via").replace("(pyproject.toml)", "").split()
        package = str(canonicalize_name(requirement.name))
        found[package] = Locked(
            package,
            specifier.version,
            requirement.marker,
            frozenset(hashes),
            frozenset(word for word in needed_by if word != "-c" and "/" not in word),
        )
    return found


def wanted(*extras: str) -> list[Requirement]:
    """pyproject.toml's dependencies, with those of the extras."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def problems() -> list[str]:
    """What is wrong with the locks, a sentence each: a dependency that is not locked, or locked to
    a version that pyproject.toml excludes."""
    found = []
    for name, requirements in (
        ("image", wanted(*IMAGE_EXTRAS)),
        ("extras", wanted(*RUNTIME_EXTRAS)),
        ("build", [Requirement(line) for line in _lines("build.in")]),
        ("docs", [Requirement(line) for line in _lines("docs.in")]),
    ):
        locked = read(name)
        for requirement in requirements:
            one = locked.get(canonicalize_name(requirement.name))
            if one is None:
                found.append(f"release/locks/{name}.txt has no {requirement.name}.")
            elif not requirement.specifier.contains(one.version):
                found.append(
                    f"release/locks/{name}.txt has {one.name} {one.version}, and {requirement} is "
                    "asked for."
                )
    image, extras = read("image"), read("extras")
    found += [
        f"release/locks: image.txt and extras.txt differ in {one.name}."
        for one in image.values()
        if one.name not in extras or extras[one.name].version != one.version
    ]
    return found


def _lines(name: str) -> list[str]:
    text = (LOCKS / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def write(*, upgrade: bool) -> None:
    """Write all locks. Raises CalledProcessError where uv refuses, and says why on stderr."""
    for name, sources in SOURCES.items():
        command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", PYTHON]
        command += ["--generate-hashes", "--no-emit-index-url", "--no-emit-find-links"]
        command += ["--custom-compile-command", "python -m release.lock"]
        command += ["--upgrade"] if upgrade else []
        subprocess.run(
            [*command, *sources, "--output-file", f"release/locks/{name}.txt"],
            cwd=ROOT,
            check=True,
        )


if __name__ == "__main__":
    write(upgrade="--upgrade" in sys.argv[1:])
    print("\n".join(problems()) or "release/locks/ fits pyproject.toml.")
