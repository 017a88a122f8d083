"""docs/schemas/: made of docs/openapi.yaml, valid, and true of what the worker sends and reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from recall_worker.protocols.http import Answer
from recall_worker.protocols.native import accepted, body
from recall_worker.protocols.outcomes import read
from recall_worker.recall import Accepted, name_of

from .contract_schemas import DOCS, FOLDER, written
from .test_recall import claim_with


def schema(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / f"{name}.schema.json").read_text("utf-8"))
    return loaded


def is_valid(name: str, document: object) -> bool:
    return bool(Draft202012Validator(schema(name)).is_valid(document))


def test_the_files_are_those_of_the_document() -> None:
    """`python -m tests.contract_schemas` writes them; none is left over."""
    assert {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()} == written()


@pytest.mark.parametrize("name", sorted(written()))
def test_each_stands_by_itself(name: str) -> None:
    """A valid schema of its draft, which refers to nothing outside it, and the page names it."""
    text = written()[name]
    Draft202012Validator.check_schema(json.loads(text))
    assert "#/components" not in text
    assert f"(schemas/{name})" in (DOCS / "other-languages.md").read_text(encoding="utf-8")


def test_what_the_worker_sends_is_a_request() -> None:
    """Byte for byte; and what lacks a member is none."""
    sent = json.loads(body(claim_with(message="Look at the build.", missed=2)))
    assert is_valid("run-request", sent)
    for name in sent:
        assert not is_valid("run-request", {k: v for k, v in sent.items() if k != name})
    assert not is_valid("run-request", sent | {"recall": sent["recall"] | {"occurrence": 0}})


def test_the_documents_examples_are_valid_and_read_so() -> None:
    """Each answer of docs/openapi.yaml fits its file, and the worker reads it as what that file
    says."""
    document = yaml.safe_load((DOCS / "openapi.yaml").read_text(encoding="utf-8"))
    responses = document["paths"]["/sessions/{session_id}/run"]["post"]["responses"]
    ends = responses["200"]["content"]["application/json"]["examples"]
    for example in ends.values():
        assert is_valid("run-answer", example["value"]) and is_valid(
            "poll-answer", example["value"]
        )
        answer = Answer(200, {}, json.dumps(example["value"]).encode(), False)
        assert name_of(read(answer)) in ("answered", "failed")
    going_on = {"run_id": "r:1", "status": "running"}
    assert is_valid("run-accepted", going_on) and is_valid("poll-answer", going_on)
    assert not is_valid("run-answer", going_on)
    assert not is_valid("run-accepted", {"run_id": "r:1", "status": "completed"})
    answer = Answer(202, {}, json.dumps(going_on).encode(), False)
    assert isinstance(accepted(answer, "http://a/run"), Accepted)
    missing = {"code": "session_not_found"}
    assert is_valid("problem", missing) and not is_valid("problem", {"detail": "not found"})
    gone = Answer(404, {}, json.dumps(missing).encode(), False)
    assert name_of(read(gone)) == "gone"
