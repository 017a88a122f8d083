"""Planted defects still apply to what is shipped, and say so loudly where they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from .support.planted import DoesNotApplyError, copy_with, planted, replaced

FINDERS = ("chaos", "hosts", "model")


@pytest.mark.parametrize("defect", planted(), ids=[defect.stem for defect in planted()])
def test_it_applies_to_what_is_shipped(defect: Path, tmp_path: Path) -> None:
    """Each defect applies, and is still valid Python."""
    for file in copy_with(defect, tmp_path):
        if file.suffix == ".py":
            compile(file.read_text(encoding="utf-8"), file, "exec")


def test_each_is_found_by_a_test() -> None:
    """No defect is left that no test plants."""
    found = [defect for finder in FINDERS for defect in planted(finder)]
    assert set(found) == set(planted()) and all(planted(finder) for finder in FINDERS)


@pytest.mark.parametrize(
    ("text", "before", "after", "result"),
    [
        ("a = f(x, y)\n", "f(x, y)", "g()", "a = g()\n"),
        ("a = f(\n    x,\n    y,\n)\n", "f(x, y)", "g()", "a = g()\n"),
        ("if a:\n    b = 1\n", "b = 1", "b = 2\nc = 3", "if a:\n    b = 2\n    c = 3\n"),
        ("ab = b\n", "b = b", "b = c", None),
        ("b = 1\nb = 1\n", "b = 1", "b = 2", None),
        ("b = 1\n", "c = 1", "b = 2", None),
    ],
)
def test_replaced(text: str, before: str, after: str, result: str | None) -> None:
    """The code is found however it is broken into lines; not there, or twice, is an error."""
    if result is not None:
        assert replaced(text, before, after) == result
        return
    with pytest.raises(DoesNotApplyError, match="times, not once"):
        replaced(text, before, after)


def test_replaced_in_one_statement() -> None:
    """Of two statements with the same code the one that is named is changed."""
    text = "-- name: one\nselect 1;\n\n-- name: two\nselect 1;\n"
    changed = "-- name: one\nselect 1;\n\n-- name: two\nselect 2;\n"
    assert replaced(text, "select 1", "select 2", "two") == changed
    with pytest.raises(DoesNotApplyError, match="no statement 'three'"):
        replaced(text, "select 1", "select 2", "three")
