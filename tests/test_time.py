"""What a sender's clock may do: readings ahead, behind, out of order and undated in; what is switched, kept and believed out."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from itertools import pairwise, permutations
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aemos.lib import keys, redis
from devices import catalogue, latest
from devices.models import Device, DeviceState, Reading, Sensor, StateChange, Variable
from rules import events
from rules.engine.conditions import compile_condition
from rules.engine.context import Scope
from rules.engine.values import Sample
from rules.models import Alarm, RuleChain
from rules.processing import timers
from tests import builders
from tests.worker import drain_all, ledger

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("empty_redis")]


class Farm:
    """A sensor with ph and ec, a pump, and a client that posts what the sensor says."""

    def __init__(self) -> None:
        self.organization = builders.organization()
        self.sensor = builders.sensor(self.organization, variables={"ph": "number", "ec": "number"})
        self.pump = builders.device(self.organization, "Pump")
        self.token = builders.token(self.sensor)

    def chain(self, *, on_false: str = "off", **condition: Any) -> RuleChain:
        """Switches the pump on while the condition holds, off when not."""
        config = {**builders.leaf(self.sensor, operator=">", value=6.5), **condition}
        nodes = [
            builders.node("when", config, next="on", on_false=on_false),
            builders.node("on", builders.command(self.pump)),
            builders.node("off", builders.command(self.pump, "off")),
        ]
        return builders.chain(self.organization, nodes if on_false else nodes[:2])

    def post(self, *items: dict[str, Any], status: int = 202) -> Any:
        """And has the worker do it."""
        body = items[0] if len(items) == 1 else {"events": list(items)}
        answer = Client().post(
            "/api/v1/telemetry",
            json.dumps(body),
            content_type="application/json",
            headers={"authorization": f"Bearer {self.token}"},
        )
        assert answer.status_code == status, answer.content
        drain_all()
        return answer.json()

    def say(self, ph: float, **ago: float) -> Any:
        return self.post(said(ph, **ago))

    @property
    def power(self) -> Any:
        return DeviceState.objects.get(device=self.pump, name="power").value

    @property
    def switched(self) -> list[Any]:
        return list(StateChange.objects.filter(state__device=self.pump).order_by("id").values_list("value", flat=True))


def said(ph: float, **ago: float) -> dict[str, Any]:
    """A reading of so long ago; below zero is ahead."""
    return {"values": {"ph": ph}, "timestamp": (timezone.now() - timedelta(**ago)).isoformat()}


@pytest.fixture
def farm() -> Farm:
    return Farm()


@pytest.mark.parametrize("ahead", [{"seconds": 30}, {"minutes": 2}, {"hours": 1}, {"hours": 8}, {"hours": 23}])
def test_a_reading_from_the_future_does_not_outlive_the_present(farm: Farm, ahead: dict[str, float]) -> None:
    farm.chain(releaseAt=6.2)
    farm.say(6.0)
    farm.say(7.0, **{unit: -number for unit, number in ahead.items()})
    assert farm.power == "on", "it was received, so it counts"
    farm.say(5.0)
    assert farm.power == "off"


def test_history_keeps_what_the_sensor_claims_and_when_it_was_received(farm: Farm) -> None:
    farm.say(7.0, hours=-3)
    reading = Reading.objects.get()
    assert reading.timestamp - timezone.now() > timedelta(hours=2)
    assert reading.received_at is not None
    assert abs(reading.received_at - timezone.now()) < timedelta(seconds=20)
    farm.say(6.9)
    assert Reading.objects.earliest("timestamp").received_at is None


def test_a_reading_of_the_future_is_the_latest_only_until_the_next_also_when_redis_was_emptied(farm: Farm) -> None:
    farm.say(80.0, hours=-23)
    farm.say(3.0)
    redis.client().delete(keys.latest("sensor", str(farm.sensor.uuid)))
    key = ("sensor", str(farm.sensor.uuid), "ph")
    assert latest.recall([key])[key].value == 3.0
    farm.say(70.0, hours=-22)
    redis.client().delete(keys.latest("sensor", str(farm.sensor.uuid)))
    found = latest.recall([key])[key]
    assert found.value == 70.0
    assert found.timestamp_us <= timezone.now().timestamp() * 1_000_000


def test_a_condition_over_time_believes_no_clock_that_is_ahead(farm: Farm) -> None:
    """One reading stamped tomorrow, then the alarm is due."""
    farm.chain(**{"for": "3s"}, on_false="")
    farm.say(6.0, hours=-23)
    farm.say(8.5, seconds=2)
    farm.say(8.5, seconds=-4)
    assert farm.power != "on"
    farm.post({"values": {"ph": 8.5}})
    assert farm.power != "on", "not yet three seconds"


def test_many_readings_ahead_count_each_and_in_their_order_whatever_order_they_come_in(farm: Farm) -> None:
    farm.chain(times=3, within="1m", on_false="")
    farm.post(*(said(7.0 + number / 10, hours=-1, seconds=number) for number in range(3)))
    assert farm.power == "on"
    key = ("sensor", str(farm.sensor.uuid), "ph")
    assert latest.recall([key])[key].value == 7.0, "the one that claims the latest time"


@pytest.mark.parametrize("late", [{"hours": 5}, {"minutes": 11}, {"seconds": 30}])
def test_what_comes_after_something_newer_is_history(farm: Farm, late: dict[str, float]) -> None:
    farm.chain()
    farm.say(6.0)
    farm.say(7.2, **late)
    assert farm.switched == ["off"]
    assert Reading.objects.count() == 2
    assert ledger().processed == 2


def test_a_backlog_of_hours_switches_nothing_and_is_kept(farm: Farm) -> None:
    farm.chain()
    farm.post(*(said(5.0 + number % 3, hours=2, seconds=-number) for number in range(100)))
    assert farm.switched == []
    assert Reading.objects.count() == 100
    farm.say(7.2)
    assert farm.switched == ["on"]


def test_a_batch_may_have_its_newest_reading_first(farm: Farm) -> None:
    farm.chain()
    farm.post(said(6.0), said(7.2, seconds=5), said(7.3, seconds=10))
    assert farm.power == "off"
    key = ("sensor", str(farm.sensor.uuid), "ph")
    assert latest.recall([key])[key].value == 6.0


def test_no_order_of_late_readings_changes_what_is_commanded(farm: Farm) -> None:
    farm.chain(releaseAt=6.2)
    now = said(6.4)
    for order in permutations([said(7.0, minutes=20), said(5.0, minutes=21), said(9.0, minutes=22)]):
        farm.post(now, *order)
    assert farm.switched == ["on"], "between the two limits it stays what it was, as that of 20 minutes ago says"


def test_a_chain_may_mean_to_hear_of_what_is_late(farm: Farm) -> None:
    chain = farm.chain()
    chain.late_events = RuleChain.LateEvents.RUN
    chain.save()
    farm.say(6.0)
    farm.say(7.2, hours=5)
    assert farm.switched == ["off", "on"]


def test_of_an_event_of_which_a_part_is_late_the_rest_runs_chains(farm: Farm) -> None:
    farm.chain()
    farm.post({"values": {"ec": 1.0}})
    farm.post({"values": {"ec": 9.0, "ph": 7.0}, "timestamp": (timezone.now() - timedelta(seconds=20)).isoformat()})
    assert farm.switched == ["on"]
    key = ("sensor", str(farm.sensor.uuid), "ec")
    assert latest.recall([key]).get(key, latest.Latest(1.0, 0)).value == 1.0


def test_a_sensor_that_reports_rarely_says_how_late_it_may_be(farm: Farm) -> None:
    farm.chain()
    Sensor.objects.update(late_after_seconds=3 * 3_600)
    Sensor.objects.get().save()
    drain_all()
    farm.say(7.2, hours=2)
    assert farm.switched == ["on"]


def test_a_slow_clock_makes_no_living_sensor_silent(farm: Farm) -> None:
    silent = {key: builders.leaf(farm.sensor)[key] for key in ("sourceType", "UUID", "key")}
    nodes = [
        builders.node("silent", {**silent, "operator": "olderThan", "duration": "1m"}, next="off", on_false="on"),
        builders.node("off", builders.command(farm.pump, "off")),
        builders.node("on", builders.command(farm.pump)),
    ]
    builders.chain(farm.organization, nodes)
    farm.say(7.2, minutes=9)
    timers.fire_due()
    drain_all()
    farm.say(7.2, minutes=8.9)
    assert farm.switched == ["on"]


def test_an_age_is_counted_up_to_now_not_to_when_the_reading_says_it_was(farm: Farm) -> None:
    Sensor.objects.update(late_after_seconds=86_400)
    farm.sensor.refresh_from_db()
    farm.sensor.save()
    fresh = {key: builders.leaf(farm.sensor)[key] for key in ("sourceType", "UUID", "key")}
    both = {"type": "AND", "expressions": [
        builders.leaf(farm.sensor, operator=">", value=6.5), {**fresh, "operator": "newerThan", "duration": "10m"},
    ]}  # fmt: skip
    nodes = [builders.node("both", both, next="on"), builders.node("on", builders.command(farm.pump))]
    builders.chain(farm.organization, nodes)
    farm.say(7.2, hours=5)
    assert farm.switched == []
    farm.say(7.2, minutes=2)
    assert farm.switched == ["on"]


@pytest.mark.parametrize(
    "moment", ["2000-01-01T00:00:00Z", "2001-09-09T01:46:40Z", "1970-01-01T00:00:07Z", "1980-01-06T00:00:00Z"]
)
def test_a_clock_that_was_never_set_is_refused_by_name(farm: Farm, moment: str) -> None:
    farm.chain()
    answer = farm.post({"values": {"ph": 7.2}, "timestamp": moment}, status=400)
    assert "clock seems not to be set" in answer["detail"]
    assert (answer["errors"][0]["field"], Reading.objects.count(), farm.switched) == ("timestamp", 0, [])


def test_what_a_sensor_without_a_clock_says_of_time_is_ignored(farm: Farm) -> None:
    farm.chain()
    farm.sensor.clock = Sensor.Clock.NONE
    farm.sensor.save()
    drain_all()
    farm.post({"values": {"ph": 7.2}, "timestamp": "2000-01-01T00:00:00Z"})
    assert farm.switched == ["on"]
    assert timezone.now() - Reading.objects.get().timestamp < timedelta(seconds=20)


def test_old_data_is_imported_as_batch_operation_and_switches_nothing(farm: Farm) -> None:
    farm.chain()
    farm.post({"values": {"ph": 7.2}, "timestamp": "2023-05-01T00:00:00Z", "type": "batch-operation"})
    assert (Reading.objects.get().timestamp, farm.switched) == (datetime(2023, 5, 1, tzinfo=UTC), [])


def test_two_values_of_one_second_are_two_readings_and_the_later_counts(farm: Farm) -> None:
    second = timezone.now().replace(microsecond=0).isoformat()
    farm.chain()
    farm.post(*({"values": {"ph": ph}, "timestamp": second} for ph in (6.1, 6.2, 9.9)))
    assert list(Reading.objects.order_by("timestamp").values_list("number", flat=True)) == [6.1, 6.2, 9.9]
    assert farm.power == "on"
    farm.post({"values": {"ph": 9.9}, "timestamp": second})
    assert Reading.objects.count() == 3
    farm.post({"values": {"ph": 5.0}, "timestamp": second})
    assert farm.power == "off"


def test_null_says_that_there_is_no_value_now_until_the_next_good_one(farm: Farm) -> None:
    both = {"type": "AND", "expressions": [
        builders.leaf(farm.sensor, operator=">", value=6.5), builders.leaf(farm.sensor, key="ec", operator=">", value=1),
    ]}  # fmt: skip
    nodes = [
        builders.node("both", both, next="on", on_false="off"),
        builders.node("on", builders.command(farm.pump)),
        builders.node("off", builders.command(farm.pump, "off")),
    ]
    builders.chain(farm.organization, nodes)
    farm.post({"values": {"ph": 7.0, "ec": 2.0}})
    assert farm.power == "on"
    answer = farm.post({"values": {"ph": 7.0, "ec": None}})
    assert (answer, farm.power) == ({"accepted": 1, "rejected": 0}, "off")
    farm.post({"values": {"ec": None}})
    farm.post({"values": {"ph": 7.1}})
    assert (farm.power, Reading.objects.filter(variable__name="ec").count()) == ("off", 1)
    farm.post({"values": {"ec": 2.1}})
    assert farm.power == "on"
    assert (ledger().duplicate, ledger().dead) == (0, 0)


def test_how_often_times_were_not_taken_as_they_are_is_counted(farm: Farm) -> None:
    farm.chain()
    farm.say(7.0, hours=-1)
    farm.say(7.0, hours=1)
    text = Client().get("/api/v1/metrics/prometheus").text
    assert 'telemetry_time_total{result="ahead"} 1.0' in text
    assert 'telemetry_time_total{result="late"} 1.0' in text


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(claims=st.lists(st.floats(-86_000, 86_000), min_size=1, max_size=8))
def test_whatever_a_sender_claims_the_reading_received_last_and_claimed_now_decides(
    farm: Farm, claims: list[float]
) -> None:
    """No clock keeps a condition true beyond the next good reading."""
    if not RuleChain.objects.exists():
        farm.chain(releaseAt=6.2)
    for seconds in claims:
        farm.say(7.0, seconds=seconds)
    farm.post({"values": {"ph": 5.0}})
    assert farm.power in ("off", None)


def test_names_that_are_used_here_exist(farm: Farm) -> None:
    """The fixtures' sensor has both variables, or a test above says nothing."""
    assert {"ph", "ec"} <= set(Variable.objects.filter(sensor=farm.sensor).values_list("name", flat=True))
    assert Device.objects.count() == 1
    assert not Alarm.objects.exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(claims=st.lists(st.floats(-86_000, 86_000) | st.sampled_from([0.0, -600.0, 600.0]), min_size=1, max_size=8))
def test_whatever_is_claimed_nothing_is_true_longer_than_its_window_after_the_last_reading(
    claims: list[float], farm: Farm
) -> None:
    """Received a second apart; asked a tolerance of five seconds after the window of ten minutes has gone."""
    uuid = str(farm.sensor.uuid)
    originator = catalogue.shared().originator("sensor", uuid)
    assert originator is not None
    began = timezone.now()
    leaves: list[dict[str, Any]] = [
        {"operator": "newerThan", "duration": "10m"}, {"operator": "inLast", "duration": "10m"},
        {"operator": "valueNewerThan", "value": 7, "duration": "10m"},
        {"operator": ">", "value": 6.5, "times": 1, "within": "10m"},
    ]  # fmt: skip
    conditions = [
        compile_condition({"sourceType": "sensor", "UUID": uuid, "key": "ph", **leaf}, path="") for leaf in leaves
    ]
    newest, memory = Sample(None, 0), dict[str, Any]()
    for second, claim in enumerate(claims):
        received = began + timedelta(seconds=second)
        item = {"values": {"ph": 7}, "timestamp": (received + timedelta(seconds=claim)).isoformat()}
        body = json.dumps(item).encode()
        (event,) = events.decode(body, originator, highest_priority=1, now=received, protocol="http")
        sample = Sample(event.values["ph"], event.timestamp_us, event.received_us)
        newest = max(newest, sample, key=lambda each: each.timestamp_us)
        for watch in (watch for condition in conditions for watch in condition.watches):
            memory[watch.key] = watch.observe(memory.get(watch.key), sample)
    asked_us = events.microseconds(began + timedelta(seconds=len(claims) - 1 + 600 + 5))
    for leaf, condition in zip(leaves, conditions, strict=True):
        assert not condition.evaluate(Scope(lambda _: newest, asked_us, memory)), leaf


@pytest.mark.parametrize("seed", range(4))
def test_a_storm_of_wrong_clocks_copies_and_disorder_commands_what_right_clocks_in_order_do(seed: int) -> None:
    """The same readings, a second apart, from sensors whose clocks are right, an hour fast, an hour slow, or none."""
    chance = random.Random(seed)
    values = [6.0]
    while len(values) < 80:
        values.append(round(min(max(values[-1] + chance.uniform(-0.5, 0.5), 5.0), 8.0), 2))
    began = timezone.now() - timedelta(seconds=len(values))
    readings = [(began + timedelta(seconds=number), value) for number, value in enumerate(values)]
    cuts = sorted({0, len(readings), *(chance.randrange(len(readings)) for _ in range(20))})
    batches = [readings[begin:end] for begin, end in pairwise(cuts)]
    expected = commanded(batches, random.Random(seed), copies=0.0)
    assert len(expected) > 2
    sensors: list[dict[str, Any]] = [{"off_by": 3_600}, {"off_by": -3_600, "late_after_seconds": 7_200}, {"off_by": 0}]
    for sensor in sensors:
        assert commanded(batches, chance, copies=0.3, **sensor) == expected, sensor
    assert commanded(batches, chance, copies=0.0, off_by=-86_400, clock=Sensor.Clock.NONE, shuffles=False) == expected


def commanded(
    batches: list[list[tuple[datetime, float]]],
    chance: random.Random,
    *,
    copies: float,
    off_by: int = 0,
    shuffles: bool = True,
    **of_sensor: Any,
) -> list[Any]:
    """What a pump is set to, with a dead band and a count within a time, by a sensor of its own."""
    farm = Farm()
    for name, setting in of_sensor.items():
        setattr(farm.sensor, name, setting)
    farm.sensor.save()
    farm.chain(releaseAt=6.2)
    sent: list[dict[str, Any]] = []
    for batch in batches:
        items = [
            {"values": {"ph": value}, "timestamp": (at + timedelta(seconds=off_by)).isoformat()} for at, value in batch
        ]
        items += [item for item in items if chance.random() < copies]
        if shuffles and copies:
            chance.shuffle(items)
        farm.post(*items)
        sent += items
        if chance.random() < copies:
            farm.post(*chance.sample(sent, min(len(sent), 5)))
    farm.post({"values": {"ec": 1.0}})
    key = ("sensor", str(farm.sensor.uuid), "ph")
    assert latest.recall([key])[key].value == batches[-1][-1][1], "what is known last is what was measured last"
    return farm.switched
