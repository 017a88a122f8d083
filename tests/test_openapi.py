"""docs/openapi.yaml: valid, in step with the native protocol's code, and kept by the reference API
as a process."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from recall_worker.protocols import Call
from recall_worker.protocols.http import Answer
from recall_worker.protocols.native import Native, accepted, body
from recall_worker.protocols.outcomes import FAILED_WORDS, FINAL_WORDS, read
from recall_worker.recall import name_of
from recall_worker.settings import Settings

from .support.endpoint import Endpoint
from .test_recall import claim_with

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "openapi.yaml"
TOKEN = "secret"
EVERY_CLIENT_SENDS = {
    "host",
    "accept",
    "accept-encoding",
    "user-agent",
    "content-type",
    "content-length",
    "authorization",
}

HOOKS = """
from itertools import count
from urllib.parse import unquote

import schemathesis

numbers = count(1)


@schemathesis.hook
def before_call(context, case, kwargs):
    # What no schema can say: a key stands for one body, which names the session of the address.
    positive = case.meta is not None and case.meta.generation.mode.is_positive
    if positive and case.operation.method == "post":
        case.headers["Idempotency-Key"] = f"r:{next(numbers)}"
        case.body["session_id"] = unquote(case.path_parameters["session_id"])
"""


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(DOCUMENT.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def run(document: dict[str, Any]) -> dict[str, Any]:
    """The one operation that every API has."""
    operation: dict[str, Any] = document["paths"]["/sessions/{session_id}/run"]["post"]
    return operation


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    """It is an OpenAPI 3.1 description by the published validator."""
    assert document["openapi"].startswith("3.1")
    validate(document)


def test_answers_are_read_as_documented(document: dict[str, Any], run: dict[str, Any]) -> None:
    """Each answer, with each of its examples, is to the native protocol what the document says;
    every outcome is explained."""
    said = set()
    for status, response in run["responses"].items():
        examples = (
            response.get("content", {})
            .get("application/json", {})
            .get("examples", {"none": {"value": {"code": "x"}}})
        )
        for name, example in examples.items():
            headers = {"Location": "/runs/r"} if status == "202" else {}
            answer = Answer(int(status), headers, json.dumps(example["value"]).encode(), False)
            outcome = name_of(accepted(answer, "http://a/run") or read(answer))
            wanted = (
                "misconfigured"
                if (status, name) == ("404", "none")
                else "failed"
                if name == "failed"
                else response["x-outcome"]
            )
            assert outcome == wanted, (status, name)
            assert wanted in document["info"]["x-outcomes"]
            said.add(outcome)
    assert said == set(document["info"]["x-outcomes"])


def test_final_words_are_those_of_the_code(document: dict[str, Any]) -> None:
    """A status that ends a run is the same word in the document and in the code."""
    schemas = document["components"]["schemas"]
    assert (
        set(schemas["Ended"]["properties"]["status"]["enum"])
        == set(FINAL_WORDS)
        > set(FAILED_WORDS)
    )
    assert set(schemas["Running"]["properties"]["status"]["not"]["enum"]) == set(FINAL_WORDS)


async def test_the_workers_request_is_the_documented_one(
    document: dict[str, Any], run: dict[str, Any], endpoint: Endpoint
) -> None:
    """What the native protocol sends is a valid request, and each of its headers is documented,
    none that it does not send."""
    native = Native(Settings(run_url=endpoint.url, run_token=TOKEN, signing_secret="secret"))
    claim = claim_with(message="Look at the build.", missed=2)
    await native.call(Call(claim, time.monotonic()))
    await native.close()
    request = endpoint.requests[0]
    assert request.body == body(claim)
    schema = {"$ref": "#/components/schemas/Request", "components": document["components"]}
    Draft202012Validator(schema).validate(request.document)
    named = document["components"]["schemas"]
    assert (
        request.document.keys()
        == named["Request"]["properties"].keys()
        == set(named["Request"]["required"])
    )
    assert (
        request.document["recall"].keys()
        == named["Recall"]["properties"].keys()
        == set(named["Recall"]["required"])
    )
    documented = {p["name"].lower() for p in run["parameters"] if p.get("in") == "header"}
    assert request.headers.keys() - EVERY_CLIENT_SENDS == documented


@asynccontextmanager
async def served(*options: str) -> AsyncIterator[str]:
    """The reference API as a process; its base URL."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RECALL_")} | {
        "RECALL_RUN_TOKEN": TOKEN
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "recall_worker",
        "reference-api",
        "--port",
        "0",
        *options,
        env=environ,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(20):
            line = (await process.stderr.readline()).decode()
        # What it says of each call is read on, or its pipe would fill up.
        rest = asyncio.create_task(process.stderr.read())
        yield line.partition("listens on ")[2].partition(";")[0]
        process.terminate()
        async with asyncio.timeout(20):
            await process.wait()
            assert "Traceback" not in (await rest).decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def schemathesis(
    base: str, folder: Path, examples: int, document: Path = DOCUMENT, *options: str
) -> tuple[int, str]:
    """Schemathesis against an API; its exit status and what it says."""
    (folder / "contract_hooks.py").write_text(HOOKS)
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).parent / "schemathesis"),
        "run",
        str(document),
        "--url",
        base,
        "--header",
        f"Authorization: Bearer {TOKEN}",
        "--checks",
        "all",
        # A run that was ended is still there, as cancelled.
        "--exclude-checks",
        "use_after_free",
        "--max-examples",
        str(examples),
        "--seed",
        "1",
        "--no-color",
        *options,
        cwd=folder,
        env=os.environ | {"SCHEMATHESIS_HOOKS": "contract_hooks", "PYTHONPATH": str(folder)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode(errors="replace")


CASES = [
    pytest.param(["--run-seconds", "0"], {"completed"}, id="answers when the run has ended"),
    pytest.param(
        ["--run-seconds", "0.05", "--accept-after", "0"], {"completed", "cancelled"}, id="accepts"
    ),
]


async def _holds(options: list[str], ends: set[str], folder: Path, examples: int) -> None:
    async with served(*options) as base:
        status, said = await schemathesis(base, folder, examples)
        assert status == 0, said[-4000:]
        async with httpx.AsyncClient(
            base_url=base, headers={"Authorization": f"Bearer {TOKEN}"}
        ) as http:
            runs = (await http.get("/runs")).json()
    # How many of the drawn requests are runs is chance; that many were is what makes the check one.
    assert len(runs) >= examples // 3, "the requests were such as are run"
    assert ends <= {run["status"] for run in runs}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "ends"), CASES)
async def test_the_reference_api_keeps_the_document(
    options: list[str], ends: set[str], tmp_path: Path
) -> None:
    """No request that schemathesis makes of the document, valid or not, gets an answer that the
    document does not have."""
    await _holds(options, ends, tmp_path, 5)


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("options", "ends"), CASES)
async def test_the_reference_api_keeps_the_document_at_length(
    options: list[str], ends: set[str], tmp_path: Path
) -> None:
    """The same with a hundred examples for each operation."""
    await _holds(options, ends, tmp_path, 100)


@pytest.mark.slow
async def test_what_is_not_in_the_document_is_caught(
    document: dict[str, Any], tmp_path: Path
) -> None:
    """Schemathesis finds what is to be found: without its row for 422 the document is not what the
    reference API does."""
    less = copy.deepcopy(document)
    del less["paths"]["/sessions/{session_id}/run"]["post"]["responses"]["422"]
    (tmp_path / "less.yaml").write_text(yaml.safe_dump(less))
    async with served("--run-seconds", "0") as base:
        status, said = await schemathesis(
            base, tmp_path, 1, tmp_path / "less.yaml", "--phases", "coverage"
        )
    assert status == 1, said[-4000:]
    assert "[422]" in said and "undocumented" in said.lower(), said[-4000:]
