"""`release/`: the locks fit, the bills of materials are true, each dependency has its reason, and a
release is built, checked and published in the right order, without the network."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.utils import canonicalize_name

from release import __main__ as release
from release import dependencies, lock, sbom

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LICENCES = {
    "Apache Software License": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "ISC License": "ISC",
    "MIT License": "MIT",
}
"""What older packages write, and the SPDX expression that it stands for."""


def test_the_locks_fit() -> None:
    """Every dependency is locked, with hashes, to a version that pyproject.toml allows; the image
    and the extras agree."""
    assert lock.problems() == []


def test_a_lock_that_does_not_fit_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version out of bounds, a dependency that is missing, locks that differ; and a package
    without a hash is refused."""
    for path in lock.LOCKS.iterdir():
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(lock, "LOCKS", tmp_path)
    image = (tmp_path / "image.txt").read_text(encoding="utf-8")
    old = re.sub(r"^cronsim==[\d.]+", "cronsim==1.0", image, flags=re.MULTILINE)
    without = re.sub(r"^tzdata==(?:.*\n)(?:    .*\n)*", "", old, flags=re.MULTILINE)
    (tmp_path / "image.txt").write_text(without, encoding="utf-8")
    assert lock.problems() == [
        "release/locks/image.txt has cronsim 1.0, and cronsim<3,>=2.8 is asked for.",
        "release/locks/image.txt has no tzdata.",
        "release/locks: image.txt and extras.txt differ in cronsim.",
    ]
    (tmp_path / "image.txt").write_text("cronsim==2.8\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cronsim==2\.8 is not pinned with a hash"):
        lock.read("image")


def test_the_image_is_built_from_the_locks() -> None:
    """pip installs nothing in the Dockerfile that is not locked and hashed, but the wheel that it
    has just built."""
    text = DOCKERFILE.replace("\\\n", " ")
    installs = re.findall(r"pip(?: --python \S+)? install ([^&\n]*)", text)
    assert len(installs) == 3
    for options in installs:
        assert "--no-deps" in options
        assert ("--require-hashes" in options) != ("/wheel/" in options)
    assert "pip wheel" in text and "--no-build-isolation" in text
    assert {lock.LOCKS / Path(name).name for name in re.findall(r"-r (\S+)", text)} == {
        lock.LOCKS / "build.txt",
        lock.LOCKS / "image.txt",
    }


def test_the_image_says_what_it_is() -> None:
    """Labels by the OCI's names, and the same source and licence as the package."""
    labels = dict(re.findall(r'org\.opencontainers\.image\.([\w.]+)="([^"]*)"', DOCKERFILE))
    assert labels["source"] == PROJECT["urls"]["Source"]
    assert labels["licenses"] == PROJECT["license"]
    assert PROJECT["description"].startswith(labels["description"])
    assert labels["base.name"] == "${BASE}" and f"ARG BASE={release.BASE}\n" in DOCKERFILE
    assert {"title", "version", "revision"} <= set(labels)


def test_each_dependency_has_its_reason() -> None:
    """What pyproject.toml names has a purpose, what comes with it a licence at least, and nothing
    else has an entry."""
    extras = {
        str(canonicalize_name(requirement.name))
        for requirement in lock.wanted(*lock.RUNTIME_EXTRAS)
    }
    assert extras <= set(dependencies.DIRECT)
    assert sorted([*dependencies.DIRECT, *dependencies.INDIRECT]) == sorted(lock.read("extras"))


@pytest.mark.parametrize("name", [*dependencies.DIRECT, *dependencies.INDIRECT])
def test_the_licence_is_the_package_s_own(name: str) -> None:
    """As its metadata say it, where it is installed here."""
    try:
        found = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        assert name in ("colorama", "pywin32", "httpx2-jsfetch")  # Windows and browsers only.
        return
    classifiers = [
        line.rpartition(" :: ")[2].partition(" (")[0]
        for line in found.get_all("Classifier") or []
        if line.startswith("License")
    ]
    said = found["License-Expression"] or (found["License"] or "").strip() or classifiers[0]
    assert LICENCES.get(said, said) == dependencies.licence(name)


def valid(document: str) -> dict[str, Any]:
    """A bill of materials, checked against CycloneDX's own schema."""
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(document) is None
    return dict(json.loads(document))


def test_the_wheel_s_bill_of_materials() -> None:
    """It is the one that the lock gives, and valid; it names all that is locked, and who needs
    what."""
    text = sbom.WHEEL.read_text(encoding="utf-8")
    assert text == sbom.of_wheel(), "python -m release.sbom"
    bill = valid(text)
    assert bill["metadata"]["component"]["purl"] == f"pkg:pypi/recall-worker@{PROJECT['version']}"
    assert {(c["name"], c["version"]) for c in bill["components"]} == {
        (one.name, one.version) for one in lock.read("image").values()
    }
    needs = {one["ref"]: one["dependsOn"] for one in bill["dependencies"]}
    ours = {
        ref.split("/")[1].split("@")[0]
        for ref in needs[f"pkg:pypi/recall-worker@{PROJECT['version']}"]
    }
    assert ours == dependencies.named() | {
        str(canonicalize_name(requirement.name)) for requirement in lock.wanted(*lock.IMAGE_EXTRAS)
    }


@pytest.mark.slow
def test_the_image_s_bill_of_materials() -> None:
    """With this machine in the place of the image: Debian's packages and what pip installed."""
    bill = valid(sbom.of_image())
    purls = [component["purl"] for component in bill["components"]]
    assert any(purl.startswith("pkg:deb/debian/libc6@") for purl in purls)
    assert any(purl.startswith("pkg:pypi/psycopg@") for purl in purls)
    assert bill["metadata"]["component"]["version"] == PROJECT["version"]


def test_the_classifiers_follow_the_pythons() -> None:
    """Each Python from the oldest that is supported is named."""
    named = re.findall(r"Python :: 3\.(\d+)", " ".join(PROJECT["classifiers"]))
    oldest = re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])
    assert oldest and [int(n) for n in named] == list(range(int(oldest[1]), int(named[-1]) + 1))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clone of this checkout as it is now, committed."""
    clone = tmp_path / "clone"
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@example", "-C", str(clone))
    subprocess.run(["git", "init", "-q", str(clone)], check=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (source := ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes(source.read_bytes())
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)
    return clone


@pytest.fixture
def make(checkout: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python -m release` in the clone, with tools that only write down how they were called."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("docker", "cosign", "pypi-attestations"):
        (tools / name).write_text(f"#!/bin/sh\necho $0 $* >> {tmp_path}/called\n")
        (tools / name).chmod(stat.S_IRWXU)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "release", "--into", str(tmp_path / "dist"), *words],
            cwd=checkout,
            env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.slow
def test_a_dry_release(
    make: Callable[..., subprocess.CompletedProcess[str]], checkout: Path, tmp_path: Path
) -> None:
    """It builds, checks and says what it would do, and does none of it; a wrong tag, or a
    stale SBOM, is wrong, and then nothing is published."""
    done = make()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Release 0.1.0 is well made. Nothing was published." in done.stdout
    assert "needed The tag: git tag --sign v0.1.0" in done.stdout
    assert not (tmp_path / "called").exists()
    sums = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=tmp_path / "dist",
        capture_output=True,
        check=False,
    )
    assert sums.returncode == 0
    [wheel] = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [bill] = [name for name in archive.namelist() if ".dist-info/sboms/" in name]
        valid(archive.read(bill).decode())

    subprocess.run(["git", "-C", str(checkout), "tag", "v9.9.9"], check=True)
    with (checkout / "release" / "recall-worker.cdx.json").open("a") as file:
        file.write(" ")
    wrong = make("--publish")
    assert wrong.returncode == 1 and not (tmp_path / "called").exists()
    assert "WRONG  This commit has the tag v9.9.9" in wrong.stdout
    assert "WRONG  The SBOM is not that of" in wrong.stdout


def test_what_is_published_was_signed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base by its digest, then the image, then signatures, then PyPI; what fails stops the
    rest."""
    called: list[list[str]] = []

    def run(command: list[str], **_: object) -> None:
        called.append(command)
        if "--metadata-file" in command:
            digest = {"containerimage.digest": "sha256:" + "b" * 64}
            (tmp_path / "image.json").write_text(json.dumps(digest), encoding="utf-8")
        if "sign-blob" in command and failing:
            raise subprocess.CalledProcessError(1, command)

    failing = False
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(release, "_run", lambda *words: "sha256:" + "a" * 64)
    one = release.Release(tmp_path, "registry.example/team", "0.1.0")
    built = [tmp_path / "recall_worker-0.1.0.tar.gz"]
    release.publish(one, built)
    steps = [" ".join(words) for words in called]
    assert f"BASE={release.BASE}@sha256:{'a' * 64}" in steps[1]
    assert steps[2].endswith(f"registry.example/team/recall-worker@sha256:{'b' * 64}")
    assert [
        next(w for w in ("verify-tag", "buildx", "sign", "upload") if w in step) for step in steps
    ] == ["verify-tag", "buildx", "sign", "sign", "sign", "upload"]

    called.clear()
    failing = True
    with pytest.raises(subprocess.CalledProcessError):
        release.publish(one, built)
    assert not [step for step in called if "upload" in step]
    monkeypatch.setattr(release, "_run", lambda *words: "not a digest")
    with pytest.raises(SystemExit, match="has no digest"):
        release.publish(one, built)
