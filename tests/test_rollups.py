"""History: rollups are what the readings say, however late those came, and the API gives points of any span."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.utils import timezone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rest_framework.test import APIClient

from aemos.lib import keys, redis
from devices.history import retention, rollups, series
from devices.models import Reading, Rollup, RollupState, Variable
from tests import builders
from tests.problems import wrong

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]
NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.fixture
def ph() -> Variable:
    return Variable.objects.get(sensor=builders.sensor(builders.organization()))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    class Clock:
        now = NOON

        def set(self, now: datetime) -> None:
            self.now = now

    made = Clock()
    monkeypatch.setattr(timezone, "now", lambda: made.now)
    return made


def measured(variable: Variable, *pairs: tuple[datetime, float | None], suspect: str | None = None) -> None:
    Reading.objects.bulk_create(
        Reading(variable=variable, timestamp=at, number=number, suspect=suspect) for at, number in pairs
    )


def roll_up() -> None:
    """Until it rests."""
    for _ in range(500):
        redis.client().delete(keys.ROLLUPS_LOCK)
        rollups.roll_up()
        if redis.client().exists(keys.ROLLUPS_LOCK):
            return
    raise AssertionError("it does not end")


def stored(variable: Variable, interval: str = "hour") -> list[tuple[Any, ...]]:
    rows = Rollup.objects.filter(variable=variable, interval=interval).order_by("start")
    return [(row.start, row.count, row.minimum, row.maximum, row.total / row.count, row.last) for row in rows]


def test_an_hour_is_rolled_up_when_it_is_over(ph: Variable, clock: Any) -> None:
    measured(ph, (NOON + timedelta(minutes=5), 6.0), (NOON + timedelta(minutes=50), 7.0), (NOON + HOUR, 9.0))
    clock.set(NOON + timedelta(minutes=61))
    roll_up()
    assert stored(ph) == []
    clock.set(NOON + timedelta(minutes=63))
    roll_up()
    assert stored(ph) == [(NOON, 2, 6.0, 7.0, 6.5, 7.0)]
    clock.set(NOON + timedelta(minutes=130))
    roll_up()
    assert stored(ph)[1:] == [(NOON + HOUR, 1, 9.0, 9.0, 9.0, 9.0)]
    assert stored(ph, "day") == [(NOON.replace(hour=0), 3, 6.0, 9.0, 22 / 3, 9.0)]


def test_what_comes_late_is_in_its_hour_and_its_day(ph: Variable, clock: Any) -> None:
    clock.set(NOON + 30 * HOUR)
    measured(ph, (NOON, 6.0), (NOON + 26 * HOUR, 8.0))
    roll_up()
    measured(ph, (NOON + timedelta(minutes=1), 1.0))
    roll_up()
    assert stored(ph)[0] == (NOON, 2, 1.0, 6.0, 3.5, 1.0)
    assert stored(ph, "day")[0] == (NOON.replace(hour=0), 2, 1.0, 6.0, 3.5, 1.0)


def test_a_transaction_that_ends_late_is_not_missed(ph: Variable, clock: Any) -> None:
    """Its reading has a lower id than others that were rolled up before it was there."""
    clock.set(NOON + 5 * HOUR)
    measured(ph, (NOON, 6.0))
    roll_up()
    newest = Reading.objects.create(variable=ph, timestamp=NOON + timedelta(minutes=2), number=8.0)
    roll_up()
    clock.set(clock.now + timedelta(minutes=6))
    roll_up()
    number = newest.pk
    newest.delete()
    Reading.objects.create(pk=number, variable=ph, timestamp=NOON + timedelta(minutes=3), number=7.0)
    roll_up()
    assert stored(ph) == [(NOON, 2, 6.0, 7.0, 6.5, 7.0)]
    for _ in range(3):
        clock.set(clock.now + timedelta(minutes=6))
        roll_up()
    assert RollupState.objects.get().readings == number


def test_suspect_readings_and_texts_are_left_out(ph: Variable, clock: Any) -> None:
    clock.set(NOON + 5 * HOUR)
    measured(ph, (NOON, 6.0), (NOON + timedelta(minutes=1), None))
    measured(ph, (NOON + timedelta(minutes=2), 99.0), suspect="above-maximum")
    roll_up()
    assert stored(ph) == [(NOON, 1, 6.0, 6.0, 6.0, 6.0)]


def test_years_are_caught_up_and_then_it_rests(ph: Variable, clock: Any) -> None:
    clock.set(NOON + timedelta(days=40))
    measured(ph, *((NOON + timedelta(days=day), float(day)) for day in range(40)))
    roll_up()
    assert len(stored(ph)) == len(stored(ph, "day")) == 40
    assert rollups.roll_up() == 0  # for a minute


def test_without_readings_there_is_nothing_to_do(clock: Any) -> None:
    assert rollups.roll_up() == 0
    assert not RollupState.objects.exists()


def expected(pairs: Iterable[tuple[datetime, float]], length: timedelta, begin: datetime, end: datetime) -> list[Any]:
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    groups: dict[datetime, list[tuple[datetime, float]]] = {}
    for at, number in sorted(pairs):
        bucket = at - (at - epoch) % length
        if begin - (begin - epoch) % length <= at < end:
            groups.setdefault(bucket, []).append((at, number))
    return [
        (at, len(rows), min(n for _, n in rows), max(n for _, n in rows), rows[-1][1])
        for at, rows in sorted(groups.items())
    ]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    offsets=st.lists(st.integers(0, 3 * 86_400), min_size=1, max_size=30, unique=True),
    late=st.sets(st.integers(0, 29)),
    interval=st.sampled_from(list(series.INTERVALS)),
    span=st.tuples(st.integers(0, 80), st.integers(1, 80)),
)
def test_points_are_what_the_readings_say(
    ph: Variable, clock: Any, offsets: list[int], late: set[int], interval: str, span: tuple[int, int]
) -> None:
    """Whatever the order, the interval and the span; rolled up, not rolled up yet, or rolled up before some of it came."""
    for model in (Reading, Rollup, RollupState):
        model._default_manager.all().delete()
    pairs = [(NOON + timedelta(seconds=offset), float(number)) for number, offset in enumerate(offsets)]
    clock.set(NOON + timedelta(days=2))
    measured(ph, *(pair for number, pair in enumerate(pairs) if number not in late))
    roll_up()
    measured(ph, *(pair for number, pair in enumerate(pairs) if number in late))
    roll_up()
    begin = NOON + span[0] * HOUR
    end = begin + span[1] * HOUR
    found = series.points(ph, begin, end, interval)
    wanted = expected(pairs, series.INTERVALS[interval], begin, end)
    if series.INTERVALS[interval] >= HOUR:  # whole hours at the end
        end = end.replace(minute=0)
    assert [(point.at, point.count, point.minimum, point.maximum, point.last) for point in found] == wanted


TARGETS = [(5.5, 6.5, 3), (None, 6.5, 4), (6.0, None, 4), (6.2, None, 2), (None, None, None)]


@pytest.mark.parametrize("interval", ["1m", "5m", "1h", "6h", "1d", "7d"])
@pytest.mark.parametrize(("low", "high", "wanted"), TARGETS)
def test_readings_within_the_target_range_are_counted(
    ph: Variable, clock: Any, low: float | None, high: float | None, wanted: int | None, interval: str
) -> None:
    """Also those of an hour that is rolled up, of today, which is so in part, and of what came late."""
    ph.target_minimum, ph.target_maximum = low, high
    ph.save()
    minutes = (0, 1, 90, 91, 200)
    measured(
        ph,
        *(
            (NOON + timedelta(minutes=each), value)
            for each, value in zip(minutes, (5.0, 6.0, 6.5, 7.0, 6.1), strict=True)
        ),
    )
    clock.set(NOON + 3 * HOUR + timedelta(minutes=5))
    roll_up()
    found = series.points(ph, NOON, NOON + 4 * HOUR, interval)
    counted = [point.in_range for point in found]
    assert (None if None in counted else sum(each or 0 for each in counted)) == wanted


def test_a_target_range_is_a_range_of_numbers(ph: Variable) -> None:
    for low, high, field in (
        (7.0, 6.0, "target_maximum"),
        (6.0, 6.0, "target_maximum"),
        (float("inf"), None, "target_minimum"),
    ):
        ph.target_minimum, ph.target_maximum = low, high
        with pytest.raises(ValidationError) as error:
            ph.clean()
        assert list(error.value.message_dict) == [field]
    ph.target_minimum, ph.target_maximum = 5.5, 6.5
    ph.clean()
    assert [ph.missed_target(value) for value in (5.0, 5.5, 6.5, 6.6, None, True, "x")] == [
        5.5, None, None, 6.5, None, None, None,
    ]  # fmt: skip
    ph.datatype = "string"
    with pytest.raises(ValidationError):
        ph.clean()


def test_the_interval_follows_the_span() -> None:
    spans = {
        timedelta(hours=6): "1m", timedelta(days=1): "5m", timedelta(days=7): "15m", timedelta(days=30): "1h",
        timedelta(days=180): "6h", timedelta(days=365): "1d", timedelta(days=3_000): "7d",
    }  # fmt: skip
    assert {span: series.interval_for(NOON, NOON + span) for span in spans} == spans


@pytest.fixture
def client(ph: Variable) -> Any:
    made = APIClient()
    made.force_authenticate(builders.member(ph.sensor.organization, "viewer"))
    return made


def url(variable: Variable) -> str:
    return f"/api/v1/sensors/{variable.sensor.uuid}/history"


def test_the_api_gives_points(ph: Variable, client: Any, clock: Any) -> None:
    clock.set(NOON + HOUR)
    measured(ph, (NOON, 6.0), (NOON + timedelta(seconds=30), 7.0))
    answer = client.get(url(ph)).json()
    assert (answer["sensor"], answer["interval"]) == (str(ph.sensor.uuid), "5m")
    (one,) = answer["variables"]
    assert one["points"] == [
        {
            "at": "2026-05-01T12:00:00Z",
            "count": 2,
            "minimum": 6.0,
            "maximum": 7.0,
            "mean": 6.5,
            "inRange": None,
            "last": 7.0,
        }
    ]
    raw = client.get(url(ph), {"interval": "raw", "variables": "ph"}).json()["variables"][0]
    assert raw["points"][0] == {"at": "2026-05-01T12:00:00Z", "value": 6.0}
    assert raw["truncated"] is False


def test_the_api_gives_files(ph: Variable, client: Any, clock: Any) -> None:
    clock.set(NOON + HOUR)
    measured(ph, (NOON, 6.0))
    csv = client.get(url(ph), {"format": "csv", "interval": "raw"})
    assert csv["Content-Type"].startswith("text/csv")
    assert csv.getvalue().decode().splitlines()[1].startswith("2026-05-01T12:00:00Z,ph,6.0")
    lines = client.get(url(ph), {"format": "ndjson"}).getvalue().splitlines()
    assert json.loads(lines[0])["variable"] == "ph"


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"from": "yesterday"}, "from"),
        ({"from": "2026-05-02T00:00:00Z", "to": "2026-05-01T00:00:00Z"}, "from"),
        ({"interval": "2m"}, "interval"),
        ({"from": "2020-01-01T00:00:00Z", "interval": "1m"}, "interval"),
        ({"variables": "ph,ec"}, "variables"),
        ({"since": "2026-05-01T00:00:00Z"}, "since"),
        ({"to": "9999-12-31T23:59:59-12:00"}, "to"),
    ],
)
def test_what_cannot_be_asked_is_named(ph: Variable, client: Any, query: dict[str, str], field: str) -> None:
    answer = client.get(url(ph), query)
    assert answer.status_code == 400
    assert field in wrong(answer)


def test_raw_says_when_there_is_more(ph: Variable, client: Any, clock: Any) -> None:
    clock.set(NOON + HOUR)
    measured(ph, *((NOON + timedelta(seconds=second), 1.0) for second in range(2_001)))
    answer = client.get(url(ph), {"interval": "raw"}).json()["variables"][0]
    assert (len(answer["points"]), answer["truncated"]) == (2_000, True)


def test_readings_are_deleted_after_their_time_and_their_rollups_stay(ph: Variable, clock: Any) -> None:
    clock.set(NOON + timedelta(days=100))
    measured(ph, *((NOON + timedelta(days=day), float(day)) for day in range(100)))
    assert retention.delete_old() == 0
    roll_up()
    organization = ph.sensor.organization
    organization.keep_readings_days = 30
    organization.save()
    redis.client().delete(keys.HISTORY_RETENTION_LOCK)
    for _ in range(10):
        retention.delete_old()
    assert Reading.objects.filter(variable=ph).count() == 30
    assert len(stored(ph)) == 100
    ph.keep_readings_days = 10
    ph.save()
    organization.keep_hours_days = 50
    organization.save()
    redis.client().delete(keys.HISTORY_RETENTION_LOCK)
    for _ in range(10):
        retention.delete_old()
    assert (Reading.objects.filter(variable=ph).count(), len(stored(ph)), len(stored(ph, "day"))) == (10, 50, 100)
    ph.keep_hours_days = 20
    ph.save()
    redis.client().delete(keys.HISTORY_RETENTION_LOCK)
    for _ in range(10):
        retention.delete_old()
    assert (len(stored(ph)), len(stored(ph, "day"))) == (20, 100)


def test_the_newest_reading_stays_however_old(ph: Variable, clock: Any) -> None:
    clock.set(NOON + timedelta(days=400))
    measured(ph, (NOON, 1.0), (NOON + HOUR, 2.0))
    roll_up()
    ph.keep_readings_days = 1
    ph.save()
    retention.delete_old()
    assert [row.number for row in Reading.objects.all()] == [2.0]
