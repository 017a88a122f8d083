"""The documents against the code, so that they can't drift apart. `python -m tests.test_docs` writes what is generated."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from typer.main import get_command

from recall_worker.cli.app import app
from recall_worker.settings import Settings, variable

from .test_operations import COMMANDS, STATEMENTS, STATES, Cell, Table

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION = ROOT / "docs" / "configuration.md"
MARK = "<!-- the table below is written by `python -m tests.test_docs` -->\n"
OPERATIONS = ROOT / "docs" / "operations.md"
OPERATIONS_MARK = "<!-- the tables below are written by `python -m tests.test_docs` -->\n"


def settings_table() -> str:
    lines = ["| variable | default | what it is |", "| --- | --- | --- |"]
    for f in dataclasses.fields(Settings):
        default = "" if f.default is None else f"{f.default:g}" if isinstance(f.default, float) else f"{f.default}"
        bounds = ", ".join(f"{word} {f.metadata[word]:g}" for word in ("least", "most") if f.metadata[word] is not None)
        says = f.metadata["says"] + (f" ({bounds})" if bounds else "") + ("; secret" if f.metadata["secret"] else "")
        lines.append(f"| `{variable(f.name)}` | {default} | {says} |")
    return "\n".join(lines) + "\n"


def operations_tables() -> str:
    """What tests/test_operations.py shows, cell by cell."""
    cancelling = {name: COMMANDS[name] for name in ("cancel", "cancel --session", "skip", "skip --session")}
    holding = {name: cells for name, cells in COMMANDS.items() if name not in cancelling}
    parts = [
        _table("`{}`", cancelling),
        _table("`{}`", holding),
        "The application's own SQL, as docs/application.md has it:\n\n" + _table("{}", STATEMENTS),
    ]
    return "\n" + "\n".join(parts)


def _table(heading: str, table: Table) -> str:
    lines = ["| | " + " | ".join(heading.format(name) for name in table) + " |", "| --- |" + " --- |" * len(table)]
    lines += [f"| {state} | " + " | ".join(_cell(cells[state]) for cells in table.values()) + " |" for state in STATES]
    return "\n".join(lines) + "\n"


def _cell(cell: Cell) -> str:
    parts = ["aborted"] if cell.aborted else []
    parts += [f"now `:{cell.now}`"] if cell.now is not None else []
    parts += [cell.row + (f" → `:{cell.then}`" if cell.then is not None else "")] if cell.row is not None else []
    return f"{cell.answer} {', '.join(parts)}".rstrip()


def test_the_operations_documented_are_those_shown() -> None:
    """docs/operations.md carries the tables whose every cell is a test."""
    assert OPERATIONS.read_text(encoding="utf-8").endswith(OPERATIONS_MARK + operations_tables())


def test_the_settings_documented_are_those_there_are() -> None:
    """docs/configuration.md carries the table that the settings themselves give."""
    assert CONFIGURATION.read_text(encoding="utf-8").endswith(MARK + settings_table())


def test_every_command_of_the_readme_exists() -> None:
    """Each `recall-worker …` in the README names a command, with options that it takes."""
    commands = getattr(get_command(app), "commands")  # noqa: B009 - a Group, which typer's types don't tell
    found = re.findall(r"recall-worker ([a-z-]+)((?: --?[a-z-]+| [^\s`#]+)*)", (ROOT / "README.md").read_text(encoding="utf-8"))
    said = [(name, rest) for name, rest in found if name in commands or rest]
    assert {"demo", "migrate", "run", "list", "show", "cancel"} <= {name for name, _ in said}
    for name, rest in said:
        if name not in commands:
            continue
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options, name


if __name__ == "__main__":
    for path, mark, generated in (
        (CONFIGURATION, MARK, settings_table()),
        (OPERATIONS, OPERATIONS_MARK, operations_tables()),
    ):
        text = path.read_text(encoding="utf-8")
        path.write_text(text[: text.index(mark)] + mark + generated, encoding="utf-8")
