"""The two tables. `MANAGED=1` in the environment: Django's migrations make them."""

from __future__ import annotations

import os
from typing import ClassVar

from django.db import models

MANAGED = os.environ.get("MANAGED") == "1"


class Session(models.Model):  # type: ignore[misc]
    """The application's session."""

    id = models.TextField(primary_key=True)
    user_id = models.TextField()

    class Meta:
        """The table's name."""

        db_table = "sessions"
        managed = MANAGED


class Recall(models.Model):  # type: ignore[misc]
    """The application's ten columns of session_recalls."""

    id = models.TextField(primary_key=True)
    session = models.ForeignKey(Session, on_delete=models.CASCADE)
    call_type = models.TextField()
    trigger_at = models.DateTimeField()
    interval_seconds = models.IntegerField(null=True)
    internal_comment = models.TextField(null=True)
    additional_context_message = models.TextField()
    status = models.TextField(default="pending")
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        """The table's name, and its indexes."""

        db_table = "session_recalls"
        managed = MANAGED
        indexes: ClassVar = [
            models.Index(fields=["trigger_at", "status"], name="idx_recalls_trigger_at_status"),
            models.Index(fields=["session", "status"], name="idx_recalls_session_status"),
        ]
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["session"],
                condition=models.Q(status="pending"),
                name="idx_recalls_active_pending",
            )
        ]
