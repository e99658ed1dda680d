"""Delete readings and rollups of hours that an organization does not want to keep any longer."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from django.db.models import F, QuerySet
from django.db.models.functions import Coalesce
from django.utils import timezone

from aemos.lib import keys, redis
from devices.history.models import Rollup, RollupState
from devices.models import Reading, Variable

# At most a day of one variable at once, so that no other transaction waits.
STEP = timedelta(days=1)
STEPS_PER_TURN = 50
EVERY_SECONDS = 3_600


def delete_old() -> int:
    """One turn of the scheduler, at most one an hour once nothing is left; how many rows. Raises RedisError."""
    client = redis.client()
    if client.exists(keys.HISTORY_RETENTION_LOCK):
        return 0
    state = RollupState.objects.filter(pk=1).first()
    deleted = 0
    for step, rows in enumerate(_expired(state.until) if state else ()):
        if step == STEPS_PER_TURN:
            return deleted
        deleted += rows._raw_delete(rows.db)  # nothing hangs on them
    client.set(keys.HISTORY_RETENTION_LOCK, "1", ex=EVERY_SECONDS)
    return deleted


def _expired(rolled_up: datetime) -> Iterator[QuerySet[Reading] | QuerySet[Rollup]]:
    """Piece by piece. Readings that are not rolled up yet stay, and so does the newest of each variable."""
    now = timezone.now()
    days = Coalesce("keep_readings_days", "sensor__organization__keep_readings_days")
    for variable, kept in Variable.objects.annotate(kept=days).exclude(kept=None).values_list("pk", F("kept")):
        readings = Reading.objects.filter(variable_id=variable)
        span = readings.order_by("timestamp").values_list("timestamp", flat=True)
        first, newest = span.first(), span.last()
        if first is None or newest is None:
            continue
        limit = min(now - timedelta(days=kept or 0), rolled_up, newest)
        while first < limit:
            end = min(first + STEP, limit)
            yield readings.filter(timestamp__lt=end)
            first = end
    hours = Coalesce("keep_hours_days", "sensor__organization__keep_hours_days")
    kept_hours = Variable.objects.annotate(kept=hours).exclude(kept=None)
    for kept in kept_hours.order_by("kept").values_list("kept", flat=True).distinct():
        old = Rollup.objects.filter(interval=Rollup.Interval.HOUR, start__lt=now - timedelta(days=kept))
        rows = old.filter(variable__in=kept_hours.filter(kept=kept).order_by())
        if rows.exists():
            yield Rollup.objects.filter(pk__in=list(rows.values_list("pk", flat=True)[:10_000]))
