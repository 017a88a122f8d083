"""docs/schemas/: the JSON Schemas of the run endpoint's contract, one file for each document that
goes over the wire, from docs/openapi.yaml. `python -m tests.contract_schemas` writes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).resolve().parent.parent / "docs"
FOLDER = DOCS / "schemas"
FILES = {
    "run-request": ("The body of a call", ["Request"]),
    "run-answer": ("A run's end: the answer to a call, or to a poll", ["Ended"]),
    "run-accepted": ("A 202: the run goes on, and is polled", ["Running"]),
    "poll-answer": ("The answer to a poll: the run goes on, or its end", ["Running", "Ended"]),
    "problem": ("An error, such as a missing session", ["Problem"]),
}
"""For each file what it is, and which of the document's schemas it is."""
REFERENCE = "#/components/schemas/"


def written() -> dict[str, str]:
    """The files' names and texts."""
    document = yaml.safe_load((DOCS / "openapi.yaml").read_text(encoding="utf-8"))
    schemas = document["components"]["schemas"]
    return {
        f"{name}.schema.json": json.dumps(_alone(name, title, parts, schemas), indent=2) + "\n"
        for name, (title, parts) in FILES.items()
    }


def _alone(name: str, title: str, parts: list[str], schemas: dict[str, Any]) -> dict[str, Any]:
    """A schema that stands by itself: what it refers to is in its `$defs`."""
    needed: dict[str, Any] = {}

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if not isinstance(value, dict):
            return value
        target = value.get("$ref")
        if isinstance(target, str):
            wanted = target.removeprefix(REFERENCE)
            if wanted not in needed:
                needed[wanted] = None  # It may refer to itself.
                needed[wanted] = moved(schemas[wanted])
            return {"$ref": f"#/$defs/{wanted}"}
        return {key: moved(item) for key, item in value.items()}

    body: dict[str, Any]
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:recall-worker:{name}",
        "title": title,
    }
    if len(parts) == 1:
        body = moved(schemas[parts[0]])
    else:
        body = {"anyOf": [moved({"$ref": REFERENCE + part}) for part in parts]}
    return head | body | ({"$defs": needed} if needed else {})


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in written().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
