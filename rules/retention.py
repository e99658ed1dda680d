"""Delete alarms, vetoes, runs of states, rejected events, data problems, dead letters, replays and
refresh tokens that are too old."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db.models import QuerySet
from django.utils import timezone
from rest_framework_simplejwt.token_blacklist.models import OutstandingToken

from aemos.lib import keys
from aemos.lib.retention import delete_in_chunks
from devices.models import DataProblem, StateRun, Veto
from rules.engine.durations import MAX_DAYS
from rules.models import ActionCooldown, Alarm, DeadLetter, RejectedEvent, Replay, Status


def delete_expired() -> int:
    """Deletes what is too old, at most once an hour from the moment that nothing is left. Raises RedisError.

    A dead letter that nobody has decided about stays: it was accepted, and so it must not vanish. So does an alarm that is
    not cleared.
    """
    return delete_in_chunks(_expired(), done_key=keys.RETENTION_LOCK)


def _expired() -> list[QuerySet[Any]]:
    now = timezone.now()
    rejected = now - timedelta(days=settings.REJECTED_RETENTION_DAYS)
    dead = now - timedelta(days=settings.DEAD_LETTER_RETENTION_DAYS)
    alarms = now - timedelta(days=settings.ALARM_RETENTION_DAYS)
    return [
        RejectedEvent.objects.filter(received_at__lt=rejected),
        DataProblem.objects.filter(last_seen_at__lt=rejected),
        DeadLetter.objects.filter(created_at__lt=dead).exclude(status=Status.OPEN),
        Replay.objects.filter(ended_at__lt=dead),
        Alarm.objects.filter(state=Alarm.State.CLEARED, cleared_at__lt=alarms),
        Veto.objects.filter(last_at__lt=alarms),
        StateRun.objects.filter(ended_at__lt=alarms),
        OutstandingToken.objects.filter(expires_at__lt=now),
        ActionCooldown.objects.filter(done_at__lt=now - timedelta(days=MAX_DAYS)),
    ]
