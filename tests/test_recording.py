"""The README's pictures: the recording of the demo, and the architecture."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from recall_worker.demo.demo import INTRO, NEXT

from . import recording

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_picture_is_the_recording() -> None:
    """demo.svg is what demo.cast gives; the recording is of a demo that ended well, with today's
    first and last words."""
    lines = recording.load()
    assert recording.PICTURE.read_text(encoding="utf-8") == recording.render(lines)
    text = "\n".join(recording.SGR.sub("", line.text) for line in lines)
    assert re.search(r"All \d+ promises were kept\.", text)
    assert INTRO in text and text.rstrip().endswith(NEXT)
    assert max(map(len, text.splitlines())) <= recording.COLUMNS


def test_colours_and_columns() -> None:
    """A line's parts stand in their columns, in their colours; markup in them is text."""
    assert list(recording.spans("a\x1b[1;32mbc\x1b[0m d")) == [
        (0, "a", "", ""),
        (1, "bc", "b", "var(--c32)"),
        (3, " d", "", ""),
    ]
    assert "&lt;b&gt;" in recording.render([recording.Line(1.0, "<b>")])


@pytest.mark.parametrize("name", re.findall(r"docs/pictures/[\w.]+", README.read_text("utf-8")))
def test_the_readme_s_pictures(name: str) -> None:
    """Each is well-formed, says in words what it shows, and is light or dark as the reader's system
    is."""
    path = README.parent / name
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    assert root.get("role") == "img" and root.get("aria-label")
    assert "prefers-color-scheme: dark" in path.read_text(encoding="utf-8")
