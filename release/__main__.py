"""`python -m release`: build a release and check it; say what publishing it would do.

Without the network, and without leaving anything behind but the files in `--into`:

1. The versions agree: pyproject.toml, the tag `v…` at this commit, the head of CHANGELOG.md.
2. The locks fit pyproject.toml, and the SBOM fits the locks.
3. The sdist and the wheel are built, and the wheel again from the sdist: the same bytes.
4. PyPI would take them (`twine check`); the SBOM and the licence are in the wheel.
5. SHA256SUMS.

`--publish` then does what the dry run says, in that order: the base image's digest is looked up and
pinned, the image is built with provenance and pushed, image and checksums are signed, and only then
does anything go to PyPI. It refuses without a signed tag, with uncommitted changes, and where the
dry run found something.

Exit status: 0 done, 1 something is wrong. What a release needs and a commit need not have (a tag, a
CHANGELOG that names the version) is said in a dry run, and fails only `--publish`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import lock, sbom

ROOT = Path(__file__).resolve().parent.parent
BASE = "debian:bookworm-slim"
"""The image's base by its tag. The digest is looked up at each release: a digest that is written
down here would keep the base's security updates away from a later build."""
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
PUSHED = "sha256:PUSHED"
"""Stands for the digest of the image that was built and pushed, which is known only then."""


@dataclass(slots=True)
class Release:
    """What one run knows."""

    into: Path
    registry: str
    version: str
    wrong: list[str] = field(default_factory=list)
    """What is wrong with this commit, a sentence each."""
    needed: list[str] = field(default_factory=list)
    """What this commit needs before it can be published, a sentence each."""

    @property
    def image(self) -> str:
        return f"{self.registry}/recall-worker"


def _run(*command: str | Path, **env: str) -> str:
    """stdout of a command in this checkout. Raises CalledProcessError where it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def _say(text: str) -> None:
    print(text, flush=True)


def check_versions(release: Release) -> None:
    """Tag, CHANGELOG and version say the same."""
    tags = _run("git", "tag", "--points-at", "HEAD").split()
    versions = [tag for tag in tags if re.fullmatch(r"v\d+\.\d+\.\d+.*", tag)]
    if versions and f"v{release.version}" not in versions:
        release.wrong.append(
            f"This commit has the tag {versions[0]}, and pyproject.toml the version "
            f"{release.version}."
        )
    elif not versions:
        release.needed.append(f"The tag: git tag --sign v{release.version}")
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    head = re.search(r"^## (.+)$", text, re.MULTILINE)
    if head is None:
        release.wrong.append("CHANGELOG.md has no heading of a version.")
    elif head[1] == "Unreleased":
        release.needed.append(f"CHANGELOG.md: Unreleased becomes {release.version} - YYYY-MM-DD")
    elif not re.fullmatch(re.escape(release.version) + r" - \d{4}-\d\d-\d\d", head[1]):
        release.wrong.append(f"CHANGELOG.md begins with {head[1]}, not with {release.version}.")
    if _run("git", "status", "--porcelain"):
        release.needed.append("A checkout without uncommitted changes.")


def check_dependencies(release: Release) -> None:
    """The locks fit, and the SBOM is made from them."""
    release.wrong += lock.problems()
    if sbom.WHEEL.read_text(encoding="utf-8") != sbom.of_wheel():
        release.wrong.append(
            "The SBOM is not that of release/locks/image.txt: python -m release.sbom"
        )


def build(release: Release) -> list[Path]:
    """The sdist and the wheel, in `into`. The times in them are the commit's, so that anybody who
    builds this commit gets the same bytes."""
    epoch = _run("git", "log", "-1", "--format=%ct")
    hatch = (sys.executable, "-m", "hatchling", "build")
    _run(*hatch, "-d", release.into, SOURCE_DATE_EPOCH=epoch)
    built = sorted(release.into.glob("recall_worker-*"))
    [sdist] = [path for path in built if path.name.endswith(".tar.gz")]
    [wheel] = [path for path in built if path.suffix == ".whl"]
    if wheel.name != f"recall_worker-{release.version}-py3-none-any.whl":
        release.wrong.append(f"The wheel is {wheel.name}, of another version.")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["tar", "-xzf", str(sdist), "-C", folder], check=True)
        [source] = Path(folder).iterdir()
        subprocess.run(
            [*hatch, "-t", "wheel", "-d", folder],
            cwd=source,
            env=os.environ | {"SOURCE_DATE_EPOCH": epoch},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        if (Path(folder) / wheel.name).read_bytes() != wheel.read_bytes():
            release.wrong.append(
                "The wheel that the sdist gives is not the wheel of this checkout."
            )
    return [sdist, wheel]


def check_files(release: Release, built: Sequence[Path]) -> None:
    """PyPI would take them, and the wheel has its SBOM, its licence and its SQL."""
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, built)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        release.wrong.append(f"twine check: {done.stdout.strip()}{done.stderr.strip()}")
    information = f"recall_worker-{release.version}.dist-info"
    needed = (
        f"{information}/sboms/{sbom.WHEEL.name}",
        f"{information}/licenses/LICENSE",
        "recall_worker/sql/ledger.sql",
        "recall_worker/py.typed",
    )
    for wheel in (path for path in built if path.suffix == ".whl"):
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        release.wrong += [f"{wheel.name} has no {name}." for name in needed if name not in names]


def write_sums(release: Release, built: Sequence[Path]) -> Path:
    """SHA256SUMS of what was built, as `sha256sum --check` reads it."""
    sums = release.into / "SHA256SUMS"
    sums.write_text(
        "".join(
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in built
        ),
        encoding="ascii",
    )
    return sums


def commands(release: Release, built: Sequence[Path], digest: str) -> list[list[str]]:
    """What publishing does once the base's digest is known, in order: whatever is published has
    been signed before."""
    base = f"{BASE}@{digest}"
    sums = str(release.into / "SHA256SUMS")
    image = (
        *("docker", "buildx", "build", "--pull", "--push", "--platform", "linux/amd64,linux/arm64"),
        *("--build-arg", f"BASE={base}", "--build-arg", f"VERSION={release.version}"),
        *("--build-arg", f"REVISION={_run('git', 'rev-parse', 'HEAD')}"),
        *("--provenance=mode=max", "--metadata-file", str(release.into / "image.json")),
        *("--tag", f"{release.image}:{release.version}", "."),
    )
    return [
        ["git", "verify-tag", f"v{release.version}"],
        list(image),
        ["cosign", "sign", "--yes", "--recursive", f"{release.image}@{PUSHED}"],
        ["cosign", "sign-blob", "--yes", "--bundle", f"{sums}.sigstore.json", sums],
        ["pypi-attestations", "sign", *map(str, built)],
        [
            *(sys.executable, "-m", "twine", "upload", "--attestations"),
            *(str(path) for one in built for path in (one, f"{one}.publish.attestation")),
        ],
    ]


def look_up_digest() -> list[str]:
    """The command that says which digest the base's tag has now."""
    return ["docker", "buildx", "imagetools", "inspect", BASE, "--format", "{{.Manifest.Digest}}"]


def publish(release: Release, built: Sequence[Path]) -> None:
    """Do it. Raises CalledProcessError at the first step that fails; the steps after it are not
    done."""
    digest = _run(*look_up_digest())
    if not DIGEST.fullmatch(digest):
        raise SystemExit(f"Error: {BASE} has no digest: {digest!r}")
    pushed = ""
    for command in commands(release, built, digest):
        words = [word.replace(PUSHED, pushed) for word in command]
        _say("$ " + " ".join(words))
        subprocess.run(words, cwd=ROOT, check=True)
        if "--metadata-file" in words:
            described = json.loads((release.into / "image.json").read_text(encoding="utf-8"))
            pushed = str(described["containerimage.digest"])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m release", description=__doc__.split("\n")[0])
    parser.add_argument("--publish", action="store_true", help="publish it, if nothing is wrong")
    parser.add_argument("--into", type=Path, help="where the files go (default: dist/)")
    parser.add_argument("--registry", default="REGISTRY", help="the image's registry and account")
    given = parser.parse_args(arguments)
    into: Path = (given.into or ROOT / "dist").resolve()
    into.mkdir(parents=True, exist_ok=True)
    for old in into.glob("recall_worker-*"):
        old.unlink()
    with (ROOT / "pyproject.toml").open("rb") as file:
        project: dict[str, Any] = tomllib.load(file)["project"]
    release = Release(into, given.registry, project["version"])
    check_versions(release)
    check_dependencies(release)
    built = build(release)
    check_files(release, built)
    write_sums(release, built)
    for path in built:
        _say(f"built  {path.name}, {path.stat().st_size / 1e3:.0f} kB")
    for sentence in release.wrong:
        _say(f"WRONG  {sentence}")
    for sentence in release.needed:
        _say(f"needed {sentence}")
    if release.wrong or (given.publish and release.needed):
        return 1
    if given.publish:
        publish(release, built)
        return 0
    _say("\n--publish would do this, with digests in the place of sha256:BASE and sha256:PUSHED:")
    for command in (look_up_digest(), *commands(release, built, "sha256:BASE")):
        _say("  " + " ".join(command).replace(str(into), "dist").replace(sys.executable, "python"))
    _say(f"\nRelease {release.version} is well made. Nothing was published.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
