"""Series of points for charts and tables: a span of time and an interval in, at most 2,000 points of each variable out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from operator import attrgetter
from typing import Any

from django.db import connection

from devices.history.models import Rollup, RollupState
from devices.models import Reading, Variable
from devices.values import Datatype

MAXIMUM_POINTS = 2_000
# What a chart can show; a span is divided into at most so many intervals, unless somebody names one.
AIM = 1_000
RAW = "raw"
INTERVALS: dict[str, timedelta] = {
    "1m": timedelta(minutes=1),
    "5m": timedelta(minutes=5),
    "15m": timedelta(minutes=15),
    "1h": timedelta(hours=1),
    "6h": timedelta(hours=6),
    "1d": timedelta(days=1),
    "7d": timedelta(days=7),
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class TooManyPoints(ValueError):
    """Says which interval would do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The good readings of one interval, which begins `at`; `in_range` of them within the target range, None without one."""

    at: datetime
    count: int
    minimum: float
    maximum: float
    mean: float
    in_range: int | None
    last: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One reading as it is: a number, text, true or false. `suspect`: why rules do not believe it."""

    at: datetime
    value: float | str | bool | None
    suspect: str | None


def interval_for(begin: datetime, end: datetime) -> str:
    """The finest interval of which the span has few enough for a chart."""
    return next((name for name, length in INTERVALS.items() if (end - begin) / length <= AIM), "7d")


def check(begin: datetime, end: datetime, interval: str) -> None:
    """Raises TooManyPoints."""
    if interval != RAW and (end - begin) / INTERVALS[interval] > MAXIMUM_POINTS:
        raise TooManyPoints(
            f"{interval} gives more than {MAXIMUM_POINTS:,} points for this span; {interval_for(begin, end)} does not"
        )


def values(variable: Variable, begin: datetime, end: datetime, *, maximum: int = MAXIMUM_POINTS) -> list[Value]:
    """The first readings of the span, one more than `maximum` where there are more."""
    rows = Reading.objects.filter(variable=variable, timestamp__gte=begin, timestamp__lt=end).order_by("timestamp")
    found = list(rows[: maximum + 1])
    for row in found:
        row.variable = variable  # its datatype says what a number means
    return [Value(at=row.timestamp, value=row.value, suspect=row.suspect) for row in found]


def points(variable: Variable, begin: datetime, end: datetime, interval: str) -> list[Point]:
    """Of a variable of numbers. Begins and ends with whole intervals; those without readings are left out."""
    if variable.datatype == Datatype.STRING:
        return []
    length = INTERVALS[interval]
    begin = _floor(begin, length)
    if length < INTERVALS["1h"]:
        return list(of_readings(variable, begin, end, length))
    kind = Rollup.Interval.DAY if length >= INTERVALS["1d"] else Rollup.Interval.HOUR
    state = RollupState.objects.filter(pk=1).first()
    until = state.until if state else begin
    # A day is rolled up with each of its hours, so the day of today is there, but not whole.
    rolled = min(max(until, begin), end)
    if kind == Rollup.Interval.DAY:
        rolled = _floor(rolled, INTERVALS["1d"])
    parts = [*_of_rollups(variable, begin, rolled, length, kind), *of_readings(variable, rolled, end, length)]
    return [_together(at, list(group)) for at, group in groupby(parts, key=attrgetter("at"))]


# Number of the interval since 1970, from a time and a length in seconds.
_BUCKETS = {
    "postgresql": "floor(extract(epoch FROM {column}) / %s)::bigint",
    "sqlite": "CAST(strftime('%%s', {column}) AS INTEGER) / %s",
}
# How many readings are within the target range of their variable `v`; null without one.
IN_RANGE = """sum(CASE WHEN v.target_minimum IS NULL AND v.target_maximum IS NULL THEN NULL
            WHEN number >= coalesce(v.target_minimum, number) AND number <= coalesce(v.target_maximum, number) THEN 1
            ELSE 0 END)"""
_READINGS = """
    SELECT b.bucket, b.of, b.low, b.high, b.sum, b.fit, r.number FROM (
        SELECT {bucket} AS bucket, count(*) AS of, min(number) AS low, max(number) AS high, sum(number) AS sum,
            {fit} AS fit, max(timestamp) AS newest
        FROM devices_reading JOIN devices_variable v ON v.id = variable_id
        WHERE variable_id = %s AND timestamp >= %s AND timestamp < %s AND number IS NOT NULL AND suspect IS NULL
        GROUP BY 1
    ) b JOIN devices_reading r ON r.variable_id = %s AND r.timestamp = b.newest
    ORDER BY b.bucket
"""
_ROLLUPS = """
    SELECT b.bucket, b.of, b.low, b.high, b.sum, b.fit, r.last FROM (
        SELECT {bucket} AS bucket, sum(count) AS of, min(minimum) AS low, max(maximum) AS high, sum(total) AS sum,
            sum(in_range) AS fit, max(start) AS newest
        FROM devices_rollup
        WHERE variable_id = %s AND start >= %s AND start < %s AND "interval" = '{interval}'
        GROUP BY 1
    ) b JOIN devices_rollup r ON r.variable_id = %s AND r.start = b.newest AND r."interval" = '{interval}'
    ORDER BY b.bucket
"""


def of_readings(variable: Variable, begin: datetime, end: datetime, length: timedelta) -> Iterator[Point]:
    """Aggregated in the database; the newest of each interval comes with it, as the value at its newest time."""
    return _points(
        _READINGS.format(bucket=_BUCKETS[connection.vendor].format(column="timestamp"), fit=IN_RANGE),
        variable,
        begin,
        end,
        length,
    )


def _of_rollups(variable: Variable, begin: datetime, end: datetime, length: timedelta, kind: str) -> Iterator[Point]:
    bucket = _BUCKETS[connection.vendor].format(column="start")
    return _points(_ROLLUPS.format(bucket=bucket, interval=kind), variable, begin, end, length)


def _points(sql: str, variable: Variable, begin: datetime, end: datetime, length: timedelta) -> Iterator[Point]:
    if begin >= end:
        return
    span = [connection.ops.adapt_datetimefield_value(moment) for moment in (begin, end)]
    with connection.cursor() as cursor:
        cursor.execute(sql, [int(length.total_seconds()), variable.pk, *span, variable.pk])
        for number, count, low, high, total, fit, last in cursor.fetchall():
            yield Point(
                at=_EPOCH + number * length,
                count=int(count),
                minimum=low,
                maximum=high,
                mean=total / float(count),
                in_range=None if fit is None else int(fit),
                last=last,
            )


def _together(at: datetime, parts: Sequence[Point]) -> Point:
    """What is rolled up and what is not yet, of one interval."""
    count = sum(part.count for part in parts)
    known = [part.in_range for part in parts]
    return Point(
        at=at,
        count=count,
        minimum=min(part.minimum for part in parts),
        maximum=max(part.maximum for part in parts),
        mean=sum(part.mean * part.count for part in parts) / count,
        in_range=None if None in known else sum(each for each in known if each is not None),
        last=parts[-1].last,
    )


def _floor(moment: datetime, length: timedelta) -> datetime:
    return moment - (moment - _EPOCH) % length


def as_rows(found: Iterable[Point | Value]) -> Iterator[dict[str, Any]]:
    """JSON-ready."""
    for each in found:
        at = each.at.isoformat().replace("+00:00", "Z")
        if isinstance(each, Value):
            yield {"at": at, "value": each.value, **({"suspect": each.suspect} if each.suspect else {})}
        else:
            yield {
                "at": at,
                "count": each.count,
                "minimum": each.minimum,
                "maximum": each.maximum,
                "mean": each.mean,
                "inRange": each.in_range,
                "last": each.last,
            }
