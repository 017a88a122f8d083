"""An application's models and its env.py in one file: prints the operations that Alembic would
write into a migration, one a line, for the database in DSN.

Run in an environment with alembic, sqlalchemy and psycopg. `without`: as an application that has
not heard of `include_object`. `further`: with a column and an index that its database lacks.
"""

from __future__ import annotations

import os
import sys

import sqlalchemy as sa
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.migration import MigrationContext

from recall_worker.alembic import include_object

metadata = sa.MetaData()
sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Text, nullable=False),
)
recalls = sa.Table(
    "session_recalls",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column(
        "session_id", sa.Text, sa.ForeignKey("sessions.id", ondelete="CASCADE"), nullable=False
    ),
    sa.Column("call_type", sa.Text, nullable=False),
    sa.Column("trigger_at", sa.TIMESTAMP(timezone=True), nullable=False),
    sa.Column("interval_seconds", sa.Integer),
    sa.Column("internal_comment", sa.Text),
    sa.Column("additional_context_message", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False, server_default="pending"),
    sa.Column("created_at", sa.TIMESTAMP(timezone=True), nullable=False),
    sa.Column("updated_at", sa.TIMESTAMP(timezone=True), nullable=False),
)
if "bare" not in sys.argv:
    sa.Index("idx_recalls_trigger_at_status", recalls.c.trigger_at, recalls.c.status)
    sa.Index("idx_recalls_session_status", recalls.c.session_id, recalls.c.status)
    sa.Index(
        "idx_recalls_active_pending",
        recalls.c.session_id,
        unique=True,
        postgresql_where=sa.text("status = 'pending'"),
    )
if "further" in sys.argv:
    recalls.append_column(sa.Column("tenant", sa.Text))
    sa.Index("idx_recalls_tenant", recalls.c.tenant)


def mine(object: object, name: str | None, type_: str, reflected: bool, compare_to: object) -> bool:
    """A rule of the application's own."""
    return not (type_ == "table" and name == "legacy")


options: dict[str, object] = {"compare_type": True, "compare_server_default": True}
if "without" not in sys.argv:
    options["include_object"] = lambda *of: include_object(*of) and mine(*of)
if "schemas" in sys.argv:
    options["include_schemas"] = True
engine = sa.create_engine(os.environ["DSN"].replace("postgresql://", "postgresql+psycopg://", 1))
with engine.connect() as conn:
    context = MigrationContext.configure(conn, opts=options)
    script = produce_migrations(context, metadata)
    assert script.upgrade_ops is not None
    print(render_python_code(script.upgrade_ops))
