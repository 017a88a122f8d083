"""Bills of materials (SBOM), as CycloneDX 1.6 in JSON.

`python -m release.sbom` writes release/recall-worker.cdx.json, which goes into the wheel (PEP 770:
`.dist-info/sboms/`). The wheel carries no other software, so it names what the wheel needs to run,
in the versions of release/locks/image.txt, with which the release was tested.

`python3 release/sbom.py --image` runs while the image is built, with Debian's Python alone, and
prints what is in the image: Debian's packages, and what is installed beside the program.

The same input gives the same bytes: no time, no random number.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent
WHEEL = ROOT / "release" / "recall-worker.cdx.json"
Component = dict[str, Any]


def _python(name: str, version: str) -> Component:
    purl = f"pkg:pypi/{name}@{quote(version)}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _document(
    about: Component, components: Iterable[Component], needs: dict[str, list[str]]
) -> dict[str, Any]:
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": about},
        "components": sorted(components, key=lambda component: str(component["bom-ref"])),
        "dependencies": [
            {"ref": ref, "dependsOn": sorted(refs)} for ref, refs in sorted(needs.items())
        ],
    }


def of_wheel() -> str:
    """The wheel's bill of materials, as text."""
    import tomllib

    from .lock import read

    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    about = _python(project["name"], project["version"]) | {
        "type": "application",
        "description": project["description"],
        "licenses": [{"license": {"id": project["license"]}}],
    }
    locked = read("image")
    refs = {one.name: _python(one.name, one.version) for one in locked.values()}
    refs[project["name"]] = about
    needs: dict[str, list[str]] = {str(component["bom-ref"]): [] for component in refs.values()}
    for one in locked.values():
        for owner in one.needed_by:
            needs[refs[owner]["bom-ref"]].append(refs[one.name]["bom-ref"])
    components = []
    for one in locked.values():
        component = refs[one.name] | {"scope": "required"}
        if one.marker is not None:
            component["properties"] = [{"name": "python:marker", "value": str(one.marker)}]
        components.append(component)
    return json.dumps(_document(about, components, needs), indent=1) + "\n"


def of_image() -> str:
    """What is in the image that this runs in: Debian's packages, and the distributions of the
    program's own Python. Raises CalledProcessError where dpkg does not answer."""
    release = dict(
        line.rstrip().split("=", 1)
        for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
        if "=" in line
    )
    distro = f"debian-{release.get('VERSION_ID', '').strip(chr(34))}"
    listed = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package}\\t${Version}\\t${Architecture}\\n"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    components = []
    for line in listed.splitlines():
        name, version, architecture = line.split("\t")
        purl = f"pkg:deb/debian/{name}@{quote(version)}?arch={architecture}&distro={distro}"
        components.append(
            {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
        )
    about: Component = {"type": "container", "bom-ref": "recall-worker", "name": "recall-worker"}
    for found in metadata.distributions():
        name = found.metadata["Name"].lower().replace("_", "-").replace(".", "-")
        components.append(_python(name, found.version))
        if name == "recall-worker":
            about["version"] = found.version
    return json.dumps(_document(about, components, {}), indent=1) + "\n"


if __name__ == "__main__":
    if "--image" in sys.argv[1:]:
        sys.stdout.write(of_image())
    else:
        WHEEL.write_text(of_wheel(), encoding="utf-8")
