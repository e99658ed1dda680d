"""Roll readings up by hour and by day: when an hour is over, and again for readings that come late.

An hour is made whole, of its readings, however often; so late and repeated work change nothing, and a crash costs nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta

from django.db import connection, transaction
from django.db.models import Max, Min, OuterRef, Q, Subquery
from django.db.models.functions import TruncHour
from django.utils import timezone

from aemos.lib import keys, redis
from aemos.lib.batched import batched
from devices.history.models import Rollup, RollupState
from devices.history.series import IN_RANGE
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
    made = sum(make(chunk, state.until, end) for chunk in batched(variables, VARIABLES_AT_ONCE))
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
    made = sum(make(variables, hour, hour + HOUR) for hour, variables in hours.items())
    if sum(map(len, hours.values())) < LATE_AT_ONCE and now - state.seen_at > LONGEST_TRANSACTION:
        state.readings, state.newest_seen, state.seen_at = state.newest_seen, _newest_id(), now
    return made


def _newest_id() -> int:
    return Reading.objects.aggregate(newest=Max("pk"))["newest"] or 0


def _hour(moment: datetime) -> datetime:
    return moment.replace(minute=0, second=0, microsecond=0)


def make(variables: Sequence[int], start: datetime, end: datetime) -> int:
    """The hours from `start` to `end` of these variables, and the days that they are in; how many rows."""
    midnight = start.replace(hour=0)
    days_end = (end - timedelta(microseconds=1)).replace(hour=0, minute=0, second=0, microsecond=0) + DAY
    hours = _insert(_OF_READINGS, variables, Rollup.Interval.HOUR, start, end)
    return hours + _insert(_OF_HOURS, variables, Rollup.Interval.DAY, midnight, days_end)


_TRUNC = {
    "postgresql": "date_trunc('{unit}', {column}, 'UTC')",
    "sqlite": "strftime('{format}', {column})",
}
_FORMATS = {"hour": "%%Y-%%m-%%d %%H:00:00", "day": "%%Y-%%m-%%d 00:00:00"}
_OF_READINGS = """
    SELECT variable_id, {start} AS start, count(*) AS of, min(number) AS low, max(number) AS high, sum(number) AS sum,
        {fit} AS fit, max(timestamp) AS newest
    FROM devices_reading JOIN devices_variable v ON v.id = variable_id
    WHERE variable_id IN ({variables}) AND timestamp >= %s AND timestamp < %s AND number IS NOT NULL AND suspect IS NULL
    GROUP BY 1, 2
"""
_OF_HOURS = """
    SELECT variable_id, {start} AS start, sum(count) AS of, min(minimum) AS low, max(maximum) AS high, sum(total) AS sum,
        sum(in_range) AS fit, max(last_at) AS newest
    FROM devices_rollup
    WHERE "interval" = 'hour' AND variable_id IN ({variables}) AND start >= %s AND start < %s
    GROUP BY 1, 2
"""
# The newest of a span is the reading at its newest time. SQLite takes ON for that of a join without the WHERE.
_INSERT = """
    INSERT INTO devices_rollup (variable_id, "interval", start, count, minimum, maximum, total, in_range, last_at, last)
    SELECT b.variable_id, %s, b.start, b.of, b.low, b.high, b.sum, b.fit, b.newest, r.number
    FROM ({source}) b JOIN devices_reading r ON r.variable_id = b.variable_id AND r.timestamp = b.newest
    WHERE true
    ON CONFLICT (variable_id, "interval", start) DO UPDATE SET count = excluded.count, minimum = excluded.minimum,
        maximum = excluded.maximum, total = excluded.total, in_range = excluded.in_range,
        last_at = excluded.last_at, last = excluded.last
"""


def _insert(source: str, variables: Sequence[int], interval: str, start: datetime, end: datetime) -> int:
    column = "timestamp" if source is _OF_READINGS else "start"
    begins = _TRUNC[connection.vendor].format(unit=interval, format=_FORMATS[interval], column=column)
    places = ", ".join(["%s"] * len(variables))
    sql = _INSERT.format(source=source.format(start=begins, variables=places, fit=IN_RANGE))
    span = [connection.ops.adapt_datetimefield_value(moment) for moment in (start, end)]
    with connection.cursor() as cursor:
        cursor.execute(sql, [interval, *variables, *span])
        return max(int(cursor.rowcount), 0)
