"""The synchronous client is what the generator makes of the asynchronous one."""

from __future__ import annotations

import pytest

from .unasync import PACKAGE, TWINS, twin


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_what_its_module_makes(name: str) -> None:
    """`python -m tests.unasync` would change nothing."""
    assert (PACKAGE / f"{TWINS[name]}.py").read_text(encoding="utf-8") == twin(name)


@pytest.mark.parametrize("name", TWINS.values())
def test_nothing_asynchronous_is_left(name: str) -> None:
    """Not in the code, and not in what it says."""
    code = (PACKAGE / f"{name}.py").read_text(encoding="utf-8").partition("\n")[2]
    assert "async" not in code.lower() and "await" not in code
