"""Planted defects: small changes to the shipped code that the tests must find.

`tests/planted/NAME.toml` names the kinds of test that find it (`found_by`) and the changes: a
file, the exact code before and after. Whitespace, line breaks and trailing commas do not matter;
`statement` confines a change to one named statement of an SQL file. The code before must occur
exactly once: a defect that no longer applies, or is no longer clear, is an error.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "planted"
SUFFIX = ".toml"


class DoesNotApplyError(Exception):
    """The code that a planted defect changes is not there, or is there more than once."""


def planted(found_by: str | None = None) -> list[Path]:
    """The planted defects, or those that this kind of test finds, in the order of their names."""
    files = sorted(FOLDER.glob("*" + SUFFIX))
    return [f for f in files if found_by is None or found_by in _read(f)["found_by"]]


def plant(defect: Path, root: Path) -> list[Path]:
    """Change the files below `root` as the defect says; the files that were changed.

    Raises DoesNotApplyError; then no file has been changed.
    """
    changed: dict[Path, str] = {}
    for change in _read(defect)["changes"]:
        path = root / change["file"]
        text = changed[path] if path in changed else path.read_text(encoding="utf-8")
        try:
            changed[path] = replaced(
                text, change["before"], change["after"], change.get("statement")
            )
        except DoesNotApplyError as error:
            raise DoesNotApplyError(f"{defect.name} on {change['file']}: {error}") from None
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    return list(changed)


def copy_with(defect: Path, folder: Path) -> list[Path]:
    """Copy the package and its SQL into the folder, and plant the defect there; the changed
    files."""
    for name in ("recall_worker", "sql"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return plant(defect, folder)


def replaced(text: str, before: str, after: str, statement: str | None = None) -> str:
    """The text with `before` replaced by `after`, indented as the line in which `before` begins.

    Raises DoesNotApplyError unless `before` occurs exactly once in the text, or in the statement.
    """
    start, end = 0, len(text)
    if statement is not None:
        named = re.search(rf"^-- name: {re.escape(statement)}$", text, re.MULTILINE)
        if named is None:
            raise DoesNotApplyError(f"there is no statement {statement!r}")
        following = re.search(r"^-- name: ", text[named.end() :], re.MULTILINE)
        start, end = named.end(), named.end() + following.start() if following else end
    found = list(_pattern(before).finditer(text, start, end))
    if len(found) != 1:
        raise DoesNotApplyError(f"occurs {len(found)} times, not once: {before.strip()!r}")
    [match] = found
    line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
    indent = line[: len(line) - len(line.lstrip())]
    lines = after.strip().split("\n")
    new = "\n".join([lines[0], *(indent + more if more else "" for more in lines[1:])])
    return text[: match.start()] + new + text[match.end() :]


def _pattern(code: str) -> re.Pattern[str]:
    """Matches the code however it is broken into lines, with or without a trailing comma."""
    tokens = re.findall(r"\w+|[^\w\s]", code)
    pattern = ""
    for number, token in enumerate(tokens):
        if number > 0:
            words = token[0].isalnum() or token[0] == "_"
            before = tokens[number - 1][-1]
            pattern += r"\s+" if words and (before.isalnum() or before == "_") else r"\s*"
        pattern += (r",?\s*" if token in ")]}" else "") + re.escape(token)
    return re.compile(rf"(?<!\w){pattern}" if tokens[0][0].isalnum() else pattern)


def _read(defect: Path) -> dict[str, Any]:
    return tomllib.loads(defect.read_text(encoding="utf-8"))
