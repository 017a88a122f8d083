"""`help`: the same as `--help`, for those who try the word first."""

from __future__ import annotations

from typing import Any

import typer

from ..terminal import USAGE, Trouble


def show(context: typer.Context, words: list[str]) -> None:
    """The command. `words`: names of a command, and of one below it. Raises Trouble where there is
    no such command."""
    at: Any = context.parent
    for word in words:
        known = getattr(at.command, "commands", {})
        if word not in known:
            raise Trouble(
                f"there is no command {' '.join(words)}", f"{at.command_path} --help", status=USAGE
            )
        at = type(at)(known[word], info_name=word, parent=at)
    print(at.get_help())
