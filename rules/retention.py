"""Retention of what is kept for people: rows that are too old in, nothing of them out, in chunks so small that nobody waits."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db.models import QuerySet
from django.utils import timezone

from aemos.lib import keys, redis
from rules.durations import MAX_DAYS
from rules.models import ActionCooldown, Alarm, DeadLetter, RejectedEvent, Replay, Status

CHUNK_ROWS = 1_000
# The scheduler has other duties every second; what is left goes on at its next tick.
CHUNKS_PER_TURN = 5
EVERY_SECONDS = 3_600


def delete_expired() -> int:
    """Deletes what is too old, at most once an hour from the moment that nothing is left. Raises RedisError.

    A dead letter that nobody has decided about stays: it was accepted, and so it must not vanish. So does an alarm that is
    not cleared.
    """
    client = redis.client()
    if client.exists(keys.RETENTION_DONE):
        return 0
    deleted = 0
    for rows in _expired():
        for _ in range(CHUNKS_PER_TURN):
            found = _delete_some(rows)
            deleted += found
            if found < CHUNK_ROWS:
                break
        else:
            return deleted
    client.set(keys.RETENTION_DONE, "1", ex=EVERY_SECONDS)
    return deleted


def _expired() -> list[QuerySet[Any]]:
    now = timezone.now()
    rejected = now - timedelta(days=settings.REJECTED_RETENTION_DAYS)
    dead = now - timedelta(days=settings.DEAD_LETTER_RETENTION_DAYS)
    alarms = now - timedelta(days=settings.ALARM_RETENTION_DAYS)
    return [
        RejectedEvent.objects.filter(received_at__lt=rejected),
        DeadLetter.objects.filter(created_at__lt=dead).exclude(status=Status.KEPT),
        Replay.objects.filter(ended_at__lt=dead),
        Alarm.objects.filter(state=Alarm.State.CLEARED, cleared_at__lt=alarms),
        ActionCooldown.objects.filter(done_at__lt=now - timedelta(days=MAX_DAYS)),
    ]


def _delete_some(rows: QuerySet[Any]) -> int:
    ids = list(rows.order_by("id").values_list("id", flat=True)[:CHUNK_ROWS])
    if ids:
        rows.model._default_manager.filter(id__in=ids).delete()
    return len(ids)
