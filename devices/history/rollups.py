"""Roll readings up by hour and by day: when an hour is over, and again for readings that come late.

An hour is made whole, of its readings, however often; so late and repeated work change nothing, and a crash costs nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from django.db import models, transaction
from django.db.models import Count, Max, Min, OuterRef, Q, Subquery, Sum
from django.db.models.functions import TruncDay, TruncHour
from django.utils import timezone

from aemos.lib import keys, redis
from aemos.lib.batched import batched
from devices.history.models import Rollup, RollupState
from devices.models import Reading, Variable

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
# Most readings of an hour are there by then; those that are not are late, and make it anew.
GRACE = timedelta(minutes=2)
EVERY_SECONDS = 60
LONGEST_TRANSACTION = timedelta(minutes=5)
VARIABLES_AT_ONCE = 500
# Of hours that late readings belong to, in one turn.
LATE_AT_ONCE = 2_000
GOOD = Q(number__isnull=False, suspect=None)
_MEASURES = ["count", "minimum", "maximum", "total", "last_at"]


def roll_up() -> int:
    """One turn of the scheduler, at most one a minute once nothing is left: the next hour that is over (a day, where much is to
    be caught up), and what came late. How many rollups were made. Raises RedisError.
    """
    client = redis.client()
    if client.exists(keys.ROLLUPS_LOCK):
        return 0
    now = timezone.now()
    with transaction.atomic():
        state = _state(now)
        if state is None:
            made, is_done = 0, True
        else:
            made = _late(state, now) + _next(state, now)
            is_done = state.until >= _hour(now - GRACE)
            state.save()
    if is_done:
        client.set(keys.ROLLUPS_LOCK, "1", ex=EVERY_SECONDS)
    return made


def _state(now: datetime) -> RollupState | None:
    """The row, locked; made with the first reading that there is."""
    state = RollupState.objects.select_for_update().filter(pk=1).first()
    if state is not None:
        return state
    first = Reading.objects.filter(variable=OuterRef("pk")).order_by("timestamp").values("timestamp")[:1]
    oldest = Variable.objects.annotate(first=Subquery(first)).aggregate(oldest=Min("first"))["oldest"]
    if oldest is None:
        return None
    newest = _newest_id()
    return RollupState.objects.create(
        pk=1, until=min(_hour(oldest), _hour(now)), readings=newest, newest_seen=newest, seen_at=now
    )


def _next(state: RollupState, now: datetime) -> int:
    over = _hour(now - GRACE)
    if state.until >= over:
        return 0
    end = min(state.until + (DAY if over - state.until > DAY else HOUR), over)
    variables = list(Variable.objects.order_by("pk").values_list("pk", flat=True))
    made = sum(_make(chunk, state.until, end) for chunk in batched(variables, VARIABLES_AT_ONCE))
    state.until = end
    return made


def _late(state: RollupState, now: datetime) -> int:
    """Readings that were stored after their hour was rolled up. Ids are given in another order than transactions end, so the
    newest are looked at again."""
    rows = (
        Reading.objects.filter(GOOD, pk__gt=state.readings, timestamp__lt=state.until)
        .annotate(hour=TruncHour("timestamp"))
        .values_list("variable_id", "hour")
        .distinct()[:LATE_AT_ONCE]
    )
    hours: defaultdict[datetime, list[int]] = defaultdict(list)
    for variable, hour in rows:
        hours[hour].append(variable)
    made = sum(_make(variables, hour, hour + HOUR) for hour, variables in hours.items())
    if sum(map(len, hours.values())) < LATE_AT_ONCE and now - state.seen_at > LONGEST_TRANSACTION:
        state.readings, state.newest_seen, state.seen_at = state.newest_seen, _newest_id(), now
    return made


def _newest_id() -> int:
    return Reading.objects.aggregate(newest=Max("pk"))["newest"] or 0


def _hour(moment: datetime) -> datetime:
    return moment.replace(minute=0, second=0, microsecond=0)


def _make(variables: Sequence[int], start: datetime, end: datetime) -> int:
    """The hours from `start` to `end` of these variables, and the days that they are in."""
    readings = Reading.objects.filter(GOOD, variable_id__in=variables, timestamp__gte=start, timestamp__lt=end)
    hours = (
        readings.annotate(start=TruncHour("timestamp"))
        .values("variable_id", "start")
        .annotate(of=Count("pk"), low=Min("number"), high=Max("number"), sum=Sum("number"), newest=Max("timestamp"))
        .order_by()
    )
    made = _save(Rollup.Interval.HOUR, hours)
    _note_last(
        Rollup.objects.filter(interval=Rollup.Interval.HOUR, variable_id__in=variables, start__gte=start, start__lt=end)
    )
    first = start.replace(hour=0)
    of_days = Rollup.objects.filter(interval=Rollup.Interval.HOUR, variable_id__in=variables, start__gte=first)
    days = (
        of_days.filter(
            start__lt=(end - timedelta(microseconds=1)).replace(hour=0, minute=0, second=0, microsecond=0) + DAY
        )
        .annotate(day=TruncDay("start"))
        .values("variable_id", "day")
        .annotate(of=Sum("count"), low=Min("minimum"), high=Max("maximum"), sum=Sum("total"), newest=Max("last_at"))
        .order_by()
    )
    made += _save(Rollup.Interval.DAY, ({**row, "start": row["day"]} for row in days))
    _note_last(
        Rollup.objects.filter(interval=Rollup.Interval.DAY, variable_id__in=variables, start__gte=first, start__lt=end)
    )
    return made


def _save(interval: str, rows: Iterable[Mapping[str, Any]]) -> int:
    found = [
        Rollup(
            variable_id=row["variable_id"],
            interval=interval,
            start=row["start"],
            count=row["of"],
            minimum=row["low"],
            maximum=row["high"],
            total=row["sum"],
            last_at=row["newest"],
        )
        for row in rows
    ]
    Rollup.objects.bulk_create(
        found,
        batch_size=1_000,
        update_conflicts=True,
        unique_fields=["variable", "interval", "start"],
        update_fields=_MEASURES,
    )
    return len(found)


def _note_last(rows: models.QuerySet[Rollup]) -> None:
    newest = Reading.objects.filter(variable=OuterRef("variable_id"), timestamp=OuterRef("last_at")).values("number")[
        :1
    ]
    rows.update(last=Subquery(newest))
