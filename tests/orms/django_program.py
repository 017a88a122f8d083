"""What the application does to its recalls, in Django's words; prints the statuses that it ends
with."""

from __future__ import annotations

from datetime import timedelta

import django
from django.db import IntegrityError, transaction
from django.db.models import F
from django.utils import timezone

django.setup()

from tests.orms.django_app.models import Recall, Session  # noqa: E402 - after the set-up

session = Session.objects.create(id="s", user_id="ann")
recall = Recall.objects.create(
    id="r",
    session=session,
    call_type="recurring",
    trigger_at=timezone.now() + timedelta(hours=1),
    interval_seconds=3600,
    additional_context_message="m",
)
try:
    with transaction.atomic():
        Recall.objects.create(
            id="again",
            session=session,
            call_type="once",
            trigger_at=timezone.now(),
            additional_context_message="m",
        )
except IntegrityError as error:
    assert "unique" in str(error)
Recall.objects.filter(session=session, status="pending").update(
    trigger_at=F("trigger_at") + timedelta(hours=1)
)
recall.refresh_from_db()
recall.internal_comment = "seen"
recall.save()
assert Recall.objects.filter(session=session, status="pending").update(status="cancelled") == 1
print(*Recall.objects.values_list("id", "status"))
session.delete()
assert not Recall.objects.exists()
