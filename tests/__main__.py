"""`python -m tests`: everything that is checked, in one word. The fast tier, what takes a second or
two each; `--full` adds what takes longer (marked slow) and what needs minutes, or the machine to
itself (marked full).

Format, lint, types, layers, tests; stops at the first that fails and says which.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def main(arguments: list[str]) -> int:
    full = "--full" in arguments
    more = [a for a in arguments if a != "--full"]
    tier = [] if full else ["-m", "not full and not slow"]
    steps = [
        [str(BIN / "ruff"), "format", "--check", "--quiet", "."],
        [str(BIN / "ruff"), "check", "--quiet", "."],
        [str(BIN / "mypy")],
        [str(BIN / "lint-imports"), "--no-cache"],
        [sys.executable, "-m", "pytest", "-q", "-n", "5", "--dist", "loadfile", *tier, *more],
    ]
    for step in steps:
        began = time.monotonic()
        print("$", " ".join([Path(step[0]).name, *step[1:]]), flush=True)
        status = subprocess.run(step, cwd=HERE, check=False).returncode
        print(
            f"  {'ok' if status == 0 else f'FAILED ({status})'} in "
            f"{time.monotonic() - began:.1f} s",
            flush=True,
        )
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
