"""Alembic and Django beside recall-worker: what their tools would do to an adopted table, and what
docs/adoption.md says against it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

from recall_worker import schema
from recall_worker.schema.released import released

from ..servers import environment
from ..test_catalog import works
from ..test_schema import execute

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]  # The first may have to install it.

HOUSE = Path(__file__).resolve().parents[2]
NEEDED = ("psycopg[binary]>=3.3.9,<4", "psycopg-pool>=3.2,<4", "structlog>=24.4")
"""What importing recall_worker needs."""
OURS = [n for n, c in released().tables["session_recalls"].columns.items() if c.since]


def run(home: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A program of an environment's, with this checkout on its path."""
    return subprocess.run(
        [str(home / words[0]), *words[1:]],
        env=os.environ | {"PYTHONPATH": str(HOUSE)} | environ,
        cwd=HOUSE,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def alembic(dsn: str, *words: str) -> list[str]:
    """The operations that autogenerate writes."""
    home = environment("alembic", "alembic>=1.13", "sqlalchemy>=2", *NEEDED)
    done = run(home, "python", "-m", "tests.orms.alembic_app", *words, DSN=dsn)
    assert done.returncode == 0, done.stderr
    return [line.strip() for line in done.stdout.splitlines() if re.match(r" +op\.", line)]


def test_alembic_without_us_drops_everything(database: str) -> None:
    """What `include_object` is for: every table, column and index of ours would be dropped."""
    drops = alembic(database, "without")
    assert len([line for line in drops if line.startswith("op.drop_column(")]) == len(OURS) >= 28
    assert len([line for line in drops if line.startswith("op.drop_table(")]) >= 6


@pytest.mark.parametrize("words", [(), ("bare",), ("schemas",)], ids=["whole", "bare", "schemas"])
def test_alembic_with_us_drops_nothing(words: tuple[str, ...], database: str) -> None:
    """On an adopted database autogenerate writes an empty migration: also where the model has no
    index, and beside a rule of the application's own."""
    execute(database, "create table legacy (x integer)")
    assert alembic(database, *words) == []


def test_alembic_after_indexes_under_free_names(database: str) -> None:
    """An index that `migrate` had to give another name is ours as well."""
    execute(
        database,
        "drop index idx_recalls_due, idx_recalls_session_status",
        "create index idx_recalls_due on sessions (user_id)",
    )
    schema.migrate(database)
    assert [line for line in alembic(database) if "session_recalls" in line] == []


def test_alembic_sees_what_the_application_changes(database: str) -> None:
    """Its own columns and indexes on session_recalls, in both directions."""
    execute(
        database,
        "alter table session_recalls add column dropped_from_the_model text",
        "create index mine on session_recalls (created_at)",
    )
    said = alembic(database, "further")
    words = " ".join(said)
    assert len(said) == 4
    assert "add_column('session_recalls', sa.Column('tenant'" in words
    assert "create_index('idx_recalls_tenant'" in words
    assert "drop_column('session_recalls', 'dropped_from_the_model')" in words
    assert re.search(r"drop_index\(.*'mine'", words)


# --- Django ---------------------------------------------------------------------------------------


class Django:
    """A Django project on a database. `managed`: its migrations make the tables."""

    def __init__(self, dsn: str, folder: Path, *, managed: bool) -> None:
        self._home = environment("django", "django>=5,<6", *NEEDED)
        parts = conninfo_to_dict(dsn)
        name = f"migrations_{folder.name.replace('-', '_')}"
        self._environ = {
            "MANAGED": "1" if managed else "0",
            "MIGRATIONS": name,
            "DJANGO_SETTINGS_MODULE": "tests.orms.django_settings",
            "PYTHONPATH": f"{HOUSE}:{folder}",
            "PGHOST": str(parts["host"]),
            "PGPORT": str(parts.get("port") or 5432),
            "PGUSER": str(parts.get("user") or "postgres"),
            "PGDATABASE": str(parts["dbname"]),
        }
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()

    def admin(self, *words: str) -> str:
        done = run(self._home, "django-admin", *words, **self._environ)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def program(self) -> str:
        done = run(self._home, "python", "-m", "tests.orms.django_program", **self._environ)
        assert done.returncode == 0, done.stderr
        return done.stdout


async def test_django_with_an_unmanaged_model(database: str, tmp_path: Path) -> None:
    """`managed = False`: Django's migrations never touch the table, its ORM works on it."""
    django = Django(database, tmp_path, managed=False)
    django.admin("makemigrations", "django_app")
    assert "session_recalls" not in django.admin("sqlmigrate", "django_app", "0001")
    django.admin("migrate")
    assert "No changes" in django.admin("makemigrations", "--check")
    assert django.program().strip() == "('r', 'cancelled')"
    assert schema.differences(database) == []
    await works(database)


async def test_django_with_a_managed_model(empty_database: str, tmp_path: Path) -> None:
    """Django makes the tables, `migrate` adopts them, and Django's later migrations do not see what
    was added: it compares models with its own migrations, never with the database."""
    django = Django(empty_database, tmp_path, managed=True)
    django.admin("makemigrations", "django_app")
    django.admin("migrate")
    schema.migrate(empty_database)
    assert schema.differences(empty_database) == []
    assert "No changes" in django.admin("makemigrations", "--check")
    django.admin("migrate")
    assert schema.differences(empty_database) == [] == schema.pending(empty_database)
    assert django.program().strip() == "('r', 'cancelled')"
    await works(empty_database)


def test_django_with_fake_initial(database: str, tmp_path: Path) -> None:
    """A managed model for a table that is there: `--fake-initial` takes it as it stands."""
    django = Django(database, tmp_path, managed=True)
    django.admin("makemigrations", "django_app")
    django.admin("migrate", "--fake-initial")
    assert schema.differences(database) == [] == schema.pending(database)
    assert django.program().strip() == "('r', 'cancelled')"


def test_djangos_inspectdb(database: str, tmp_path: Path) -> None:
    """It writes unmanaged models of all that stands there: ours are to be deleted from them."""
    django = Django(database, tmp_path, managed=False)
    said = django.admin("inspectdb", "session_recalls")
    assert "managed = False" in said and "occurrence = models" in said
