"""Retention of the history: notifications that are too old in, nothing of them and of their deliveries out."""

from __future__ import annotations

from datetime import timedelta

from django.conf import settings
from django.utils import timezone

from aemos.lib import keys
from aemos.lib.retention import delete_in_chunks
from notifications.models import Notification


def delete_expired() -> int:
    """Deletes what is too old, at most once an hour; returns how many notifications. Raises RedisError."""
    oldest = timezone.now() - timedelta(days=settings.NOTIFICATION_RETENTION_DAYS)
    return delete_in_chunks(
        [Notification.objects.filter(created_at__lt=oldest)], done_key=keys.NOTIFICATION_RETENTION_DONE
    )
