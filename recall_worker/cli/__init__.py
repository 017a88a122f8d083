"""The command line: one file a command (or a family of them), imported when it is asked for.

Data goes to stdout, talk to stderr. `--json` prints one document. Exit status: 0 done, 1 refused or not found, 2 usage, 3 database
or endpoint unreachable. Whatever goes wrong reads `Error: …` and then `Try: …`; a traceback is a defect.
"""

from __future__ import annotations

import sys


def main() -> None:
    """The console script."""
    from .app import app
    from .talk import Trouble, explain

    try:
        app()
    except Exception as error:
        trouble = explain(error)
        if trouble is None:
            raise
        print(f"Error: {trouble.what}", file=sys.stderr)
        for hint in trouble.hints:
            print(f"Try: {hint}", file=sys.stderr)
        sys.exit(trouble.status)
    except KeyboardInterrupt:
        sys.exit(130)


__all__ = ["Trouble", "main"]
