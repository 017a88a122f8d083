"""Secret headers: which are sent, and that none gets into a reason, whole or in part."""

from __future__ import annotations

from pathlib import Path

import pytest

from recall_worker import settings
from recall_worker.protocols.credentials import Credentials
from recall_worker.recall import Accepted, Answered, Refused
from recall_worker.secret_files import Secrets

TOKEN = "sk-live-correct-horse-battery"


def credentials(environ: dict[str, str]) -> Credentials:
    return Credentials(settings.read(environ), Secrets(settings.read(environ), environ))


def test_what_is_sent() -> None:
    """The token as the server wants it, and the further headers."""
    made = credentials({"RECALL_RUN_TOKEN": TOKEN, "RECALL_RUN_HEADERS": "X-Api-Key: a:b\nX-V: 2"})
    assert made.headers() == {"Authorization": f"Bearer {TOKEN}", "X-Api-Key": "a:b", "X-V": "2"}
    assert made.headers(lambda token: {"X-Api-Key": token}) == {"X-Api-Key": TOKEN, "X-V": "2"}


@pytest.mark.parametrize("name", ["Authorization", "authorization"])
def test_a_file_that_names_the_tokens_header_meanwhile(name: str, tmp_path: Path) -> None:
    """It is refused as at the start: what was read before stays, and one header is sent."""
    file = tmp_path / "headers"
    file.write_text("X-V: 2\n", encoding="utf-8")
    made = credentials({"RECALL_RUN_TOKEN": TOKEN, "RECALL_RUN_HEADERS_FILE": str(file)})
    file.write_text(f"{name}: Basic eHl6OmFiYw==\n", encoding="utf-8")
    assert made.headers() == {"Authorization": f"Bearer {TOKEN}", "X-V": "2"}


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (f"what is {TOKEN}?", "what is …?"),
        (f"{TOKEN} and {TOKEN}", "… and …"),
        ("x" * 160 + " " + TOKEN[:20], "x" * 160 + " …"),
        (f"no: {TOKEN[:15]}: see", "no: …: see"),
        ("Bearer", "Bearer"),
        ("to https://ann:secret@host/x", "to https://…@host/x"),
        ("key-of-the-gateway-1", "…"),
        ("Basic key-of-the-gateway-1", "…"),
    ],
)
def test_what_is_hidden(said: str, shown: str) -> None:
    """Whole, cut off at the end of a reason, behind its scheme; a user and a password, too."""
    made = credentials(
        {"RECALL_RUN_TOKEN": TOKEN, "RECALL_RUN_HEADERS": "X-Key: Basic key-of-the-gateway-1"}
    )
    assert made.hide(said) == shown
    for outcome in (Refused(said, 422), Answered(200, said), Accepted("r", 202, None, said)):
        hidden = made.redact(outcome)
        assert shown in (getattr(hidden, "reason", None), getattr(hidden, "note", None))


def test_a_token_that_was_replaced_is_still_hidden(tmp_path: Path) -> None:
    """The API may speak of the one that it was sent before."""
    file = tmp_path / "token"
    file.write_text(TOKEN, encoding="utf-8")
    made = credentials({"RECALL_RUN_TOKEN_FILE": str(file)})
    for n in range(3):
        file.write_text(f"another-correct-horse-{n}{n}", encoding="utf-8")
        assert made.headers()["Authorization"] == f"Bearer another-correct-horse-{n}{n}"
    assert made.hide(f"{TOKEN}, another-correct-horse-11") == "…, …"


def test_addresses_that_hold_a_key_are_not_shown() -> None:
    found = settings.read(
        {
            "RECALL_RUN_URL": "https://api/run/{session_id}?code=s3cret",
            "RECALL_FAILURE_URL": "https://hooks.example/services/T0/s3cret",
        }
    )
    assert "s3cret" not in str(found.shown())
    assert found.shown()["failure_url"] == "https://hooks.example/…"
