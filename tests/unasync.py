"""The synchronous twins of asynchronous modules, made from their text: `python -m tests.unasync`
writes them, and tests/test_unasync.py compares them with what it would write.

A definition that has nothing asynchronous in it is not written twice: the twin imports it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "recall_worker"
TWINS = {"client": "client_sync", "database/borrowed": "database/borrowed_sync"}
"""Modules and their twins, as paths in the package without `.py`."""

WORDS = {
    r"async (def|with|for)\b": r"\1",
    r"\bawait ": "",
    r"\bAsync(?=[A-Z])": "",
    r"\basynccontextmanager\b": "contextmanager",
    r"\benter_async_context\b": "enter_context",
    r"\ban async psycopg\b": "a psycopg",
    r"\bclass Recalls\b": "class SyncRecalls",
    r"\.borrowed import\b": ".borrowed_sync import",
}
"""What stands in an asynchronous module, and what stands in its twin for that."""


def twin(name: str) -> str:
    """The text of a module's twin."""
    text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    tree = ast.parse(text)
    shared: list[str] = []
    for node, following in reversed(list(zip(tree.body, [*tree.body[1:], None], strict=True))):
        if not (names := _defined(node)) or _is_asynchronous(node, lines):
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        last = node.end_lineno
        if following is not None and _is_text(following):
            last = following.end_lineno  # The docstring of a constant goes with it.
        shared += names
        del lines[first - 1 : last]
    text = "".join(lines)
    for asynchronous, synchronous in WORDS.items():
        text = re.sub(asynchronous, synchronous, text)
    used = sorted(one for one in shared if re.search(rf"\b{one}\b", text))
    source = name.rpartition("/")[2]
    docstring = f'"""Written by `python -m tests.unasync` from {source}.py: not to be edited."""'
    body = ast.parse(text).body
    assert _is_text(body[0]) and isinstance(body[1], ast.ImportFrom)
    after = "".join(text.splitlines(keepends=True)[body[1].lineno :])
    imports = f"from .{source} import {', '.join(used)}"
    head = f"{docstring}\n\nfrom __future__ import annotations\n\n{imports}\n"
    return _formatted(head + after)


def _defined(node: ast.stmt) -> list[str]:
    """The names that a statement of the module defines; none of an import."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.Assign():
            return [target.id for target in node.targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Expr(value=ast.Call()):
            return ["register"]  # What fills a constant is done once, in the module itself.
        case _:
            return []


def _is_asynchronous(node: ast.stmt, lines: list[str]) -> bool:
    assert node.end_lineno is not None
    return bool(re.search(r"\b[Aa]sync", "".join(lines[node.lineno - 1 : node.end_lineno])))


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _formatted(text: str) -> str:
    for command in (["check", "--fix", "--select", "F401,I"], ["format"]):
        config = ["--quiet", "--config", str(PACKAGE.parent / "pyproject.toml")]
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *config, "-"],
            input=text,
            capture_output=True,
            text=True,
            check=True,
        )
        text = done.stdout
    return text


def main() -> None:
    for name, other in TWINS.items():
        (PACKAGE / f"{other}.py").write_text(twin(name), encoding="utf-8")


if __name__ == "__main__":
    main()
