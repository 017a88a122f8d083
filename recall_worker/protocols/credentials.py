"""The secret headers of a call: the token (RECALL_RUN_TOKEN), and what RECALL_RUN_HEADERS_FILE
holds.

Both are read again when their files change: a token expires, and is replaced, while the worker
runs. They go to the origin of RECALL_RUN_URL, and to no other.

Owns also that none of them gets into a row or a log: an API may repeat what it was sent.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from ..recall import Outcome
from ..secret_files import Secrets
from ..settings import Settings, header_lines

Bearer = Callable[[str], Mapping[str, str]]


def bearer(token: str) -> dict[str, str]:
    """The header that carries a token, as most servers want it."""
    return {"Authorization": f"Bearer {token}"}


class Credentials:
    def __init__(self, settings: Settings, secrets: Secrets | None = None) -> None:
        """`secrets`: those of the settings, as they stand now."""
        self._secrets = secrets or Secrets(settings)
        self._known: dict[str, None] = {}
        self._hidden()

    def headers(self, carries: Bearer = bearer) -> dict[str, str]:
        """The headers as they stand now. `carries`: how the server wants its token."""
        token = self._secrets.current_if_changed("run_token")
        if token is not None and token not in self._known:
            self._hidden()
        made = {} if token is None else dict(carries(token))
        lines = self._secrets.current_if_changed("run_headers")
        if lines is None:
            return made
        # The token's header wins: a file that was replaced meanwhile may name it, too.
        taken = {name.lower() for name in made}
        return made | {n: v for n, v in header_lines(lines)[0] if n.lower() not in taken}

    @property
    def signing_secret(self) -> str | None:
        """RECALL_SIGNING_SECRET as it stands now."""
        return self._secrets.current_if_changed("signing_secret")

    def changed(self) -> bool:
        """Read the files again, after a refusal. Returns whether any has changed."""
        self._hidden()
        before = self._values()
        for name in ("run_token", "run_headers"):
            self._secrets.current(name)
        return self._values() != before

    def redact(self, outcome: Outcome) -> Outcome:
        """The outcome without any of these secrets, which an API may have repeated."""
        for name in ("reason", "note"):
            text = getattr(outcome, name, None)
            if text is not None and (shown := self.hide(text)) != text:
                outcome = dataclasses.replace(outcome, **{name: shown})  # type: ignore[arg-type]
        return outcome

    def hide(self, text: str) -> str:
        """The text without any of these secrets, whole or cut off at the end of a reason, and
        without a user and a password in an address."""
        secrets = self._hidden()
        for secret in secrets:
            text = text.replace(secret, "…")
        for secret in secrets:
            begin = secret[:BEGINNING]
            while len(secret) > BEGINNING and (at := text.find(begin)) >= 0:
                end = at + BEGINNING
                while end < len(text) and text[at : end + 1] == secret[: end + 1 - at]:
                    end += 1
                text = f"{text[:at]}…{text[end:]}"
        return _USER.sub("//…@", text)

    def _hidden(self) -> list[str]:
        """All secrets, also those that were replaced: an API may speak of the old one still."""
        for value in self._values():
            # Behind its scheme a header's value is a secret of its own: `Bearer …`.
            parts = [value, *(part for part in value.split()[1:] if len(part) > BEGINNING)]
            self._known |= dict.fromkeys(parts)
        while len(self._known) > KNOWN_MOST:
            del self._known[next(iter(self._known))]
        # The longest first: one may be a part of another.
        return sorted(self._known, key=len, reverse=True)

    def _values(self) -> list[str]:
        token, lines = self._secrets.last("run_token"), self._secrets.last("run_headers")
        values = [] if token is None else [token]
        if lines is not None:
            values += [value for _, value in header_lines(lines)[0]]
        return [value for value in values if len(value) >= SECRET_LEAST]


_USER = re.compile(r"//[^/@\s]{1,500}@")
BEGINNING = 12
"""Characters by which the beginning of a longer secret is known, where the rest was cut off."""
KNOWN_MOST = 100
"""Secrets that are remembered."""
SECRET_LEAST = 4
"""Characters from which on a header's value is a secret: `X-Version: 2` is none, and its value
stands in every text."""
