"""`token`: a token for one session, by which an agent calls the MCP server."""

from __future__ import annotations

from datetime import timedelta

from .. import settings, tokens
from ..terminal import USAGE, Trouble, seconds


def token(session: str, *, ttl: str, audience: str | None) -> None:
    """Print it, alone, on stdout."""
    chosen = settings.read(needed=["token_key"], token_audience=audience)
    try:
        lasts = timedelta(seconds=seconds(ttl, "--ttl"))
        print(
            tokens.sign(
                tokens.keys(chosen.token_key or ""),
                session,
                ttl=lasts,
                audience=chosen.token_audience,
            )
        )
    except OverflowError:
        raise Trouble(
            f"--ttl {ttl} is longer than any calendar", "--ttl 1h", status=USAGE
        ) from None
    except tokens.TokenError as error:
        hint = "--ttl 1h" if "valid for" in str(error) else "the id that the application gave it"
        raise Trouble(str(error), hint, status=USAGE) from None
