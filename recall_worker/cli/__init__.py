"""The command line: one file a command (or a family of them), imported when that command runs.

Data goes to stdout, messages to stderr. `--json` prints one document. Exit status: 0 done, 1
refused or not found, 2 usage, 3 database or endpoint unreachable, 4 (`run` alone) the schema is for
newer code. Every error reads `Error: …` and then `Try: …`; a traceback is a defect.
"""

from __future__ import annotations

import sys


def main() -> None:
    """The console script."""
    from ..terminal import explain

    try:
        if sys.argv[1:] == ["run"]:
            # As systemd units and containers start it, with all settings in the environment. The
            # command line's library would stay in the daemon's memory, a fifth of the total.
            from .run import run

            run({}, embedded=False, data=None)
            sys.exit(0)
        from .app import app

        sys.exit(app(standalone_mode=False, prog_name="recall-worker"))
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error, file=sys.stderr)
            sys.exit(2)
        trouble = explain(error)
        if trouble is None:
            raise
        print(f"Error: {trouble.what}", file=sys.stderr)
        for hint in trouble.hints:
            print(f"Try: {hint}", file=sys.stderr)
        sys.exit(trouble.status)
    except KeyboardInterrupt:
        sys.exit(130)
