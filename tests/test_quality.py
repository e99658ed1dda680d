"""What a value is worth: readings outside their limits in; what is kept, believed, switched, told and counted out."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.db import OperationalError
from django.test import Client
from django.utils import timezone
from rest_framework.test import APIClient

from aemos.lib import keys, redis
from devices import latest
from devices.models import DataProblem, DeviceState, Organization, Reading, SensorClock, StateChange, Variable
from devices.quality import data_problems, sensor_clocks
from rules.models import Alarm, RuleChain
from tests import builders
from tests.worker import drain_all, ledger

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("empty_redis")]
RANGE = {"minimum": 3.0, "maximum": 10.0}


class Farm:
    """A sensor whose ph has limits and whose ec has none, a pump, and a client that posts what the sensor says."""

    def __init__(self, **limits: Any) -> None:
        self.organization = builders.organization()
        self.sensor = builders.sensor(self.organization, variables={"ph": "number", "ec": "number"})
        self.ph = Variable.objects.get(sensor=self.sensor, name="ph")
        for name, limit in limits.items():
            setattr(self.ph, name, limit)
        self.ph.full_clean()
        self.ph.save()
        self.pump = builders.device(self.organization, "Pump")
        self.token = builders.token(self.sensor)

    def leaf(self, **condition: Any) -> dict[str, Any]:
        return {**builders.leaf(self.sensor, operator=">", value=6.5), **condition}

    def chain(self, condition: dict[str, Any] | None = None, **options: Any) -> RuleChain:
        """Switches the pump on while the condition holds, off when not."""
        nodes = [
            builders.node("when", condition or self.leaf(), next="on", on_false="off"),
            builders.node("on", builders.command(self.pump)),
            builders.node("off", builders.command(self.pump, "off")),
        ]
        return builders.chain(self.organization, nodes, **options)

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

    def say(self, *values: float, step: float = 1.0) -> None:
        """So many seconds apart, the last one now, in one request."""
        now = timezone.now()
        ago = [(len(values) - 1 - place) * step for place in range(len(values))]
        self.post(*(said(value, now - timedelta(seconds=each)) for value, each in zip(values, ago, strict=True)))

    @property
    def power(self) -> Any:
        return DeviceState.objects.get(device=self.pump, name="power").value

    @property
    def reasons(self) -> list[str | None]:
        return list(Reading.objects.filter(variable=self.ph).order_by("timestamp").values_list("suspect", flat=True))

    @property
    def latest(self) -> latest.Latest:
        key = ("sensor", str(self.sensor.uuid), "ph")
        return latest.recall([key])[key]

    def forget(self) -> None:
        """As if Redis had been emptied."""
        redis.client().delete(keys.latest("sensor", str(self.sensor.uuid)))


def client_of(organization: Organization, role: str) -> Any:
    client = APIClient()
    client.force_authenticate(builders.member(organization, role))
    return client


def said(ph: float, at: Any, **others: Any) -> dict[str, Any]:
    return {"values": {"ph": ph, **others}, "timestamp": at.isoformat()}


@pytest.mark.parametrize(
    ("value", "reason"), [(85.0, "above-maximum"), (-127.0, "below-minimum"), (2.999, "below-minimum")]
)
def test_what_is_out_of_range_is_kept_with_its_reason_and_switches_nothing(value: float, reason: str) -> None:
    farm = Farm(**RANGE)
    farm.chain()
    farm.say(7.0)
    farm.say(value)
    farm.say(3.0)
    farm.say(10.0)

    assert farm.reasons == [None, reason, None, None], "the limits themselves are allowed"
    assert list(StateChange.objects.order_by("id").values_list("value", flat=True)) == ["on", "off", "on"]
    assert ledger().processed == 4


def test_rules_see_the_last_good_value_with_its_age() -> None:
    farm = Farm(**RANGE)
    farm.chain({"type": "AND", "expressions": [farm.leaf(), farm.leaf(key="ec", value=1)]})
    farm.post({"values": {"ph": 7.0}})
    farm.post({"values": {"ph": -127.0, "ec": 2.0}})
    assert farm.power == "on"
    farm.post({"values": {"ph": 85.0, "ec": 0.5}})
    assert farm.power == "off"
    assert (farm.latest.value, farm.latest.suspicion) == (7.0, "above-maximum")
    assert farm.latest.received_us > farm.latest.timestamp_us, "the sensor lives all the same"


def test_a_sensor_that_sends_nothing_good_is_not_silent() -> None:
    farm = Farm(**RANGE)
    farm.chain(
        {"sourceType": "sensor", "UUID": str(farm.sensor.uuid), "key": "ph", "operator": "olderThan", "duration": "10s"}
    )
    for _ in range(3):
        farm.say(-127.0)
    assert farm.power is None, "suspect readings run no chain that does not ask for them"
    farm.post({"values": {"ec": 1.0}})
    assert farm.latest.value is None
    assert farm.latest.heard_us > 0


def test_a_jump_is_believed_when_it_lasts() -> None:
    farm = Farm(maximum_step=0.5, maximum_step_seconds=10)
    farm.chain()
    farm.say(6.0, 6.4, 8.4, step=1)
    assert farm.reasons == [None, None, "step-too-large"]
    assert farm.power == "off"
    now = timezone.now()
    farm.post(*(said(8.4, now + timedelta(seconds=seconds)) for seconds in (-2, -1)))
    assert farm.reasons[-1] == "step-too-large"
    # 2 away from the last good value: believed when four spans of 10 s have gone.
    farm = Farm(maximum_step=0.5, maximum_step_seconds=10)
    farm.say(6.0, *[8.0] * 5, step=11)
    assert farm.reasons == [None, "step-too-large", "step-too-large", "step-too-large", None, None]


def test_what_does_not_move_is_suspect_until_it_does() -> None:
    farm = Farm(stuck_after_seconds=30)
    farm.say(7.2, 7.2, 7.2, 7.2, 7.2, step=10)
    assert farm.reasons == [None, None, None, "stuck", "stuck"]
    farm.say(7.2)
    assert farm.reasons[-1] == "stuck", "remembered from request to request"
    farm.say(7.21)
    assert farm.reasons[-1] is None


def test_a_chain_that_asks_hears_of_suspect_readings_and_of_the_end_of_them() -> None:
    farm = Farm(**RANGE)
    quality = {"sourceType": "sensor", "UUID": str(farm.sensor.uuid), "key": "ph"}
    nodes = [
        builders.node("bad", {**quality, "operator": "isSuspect"}, next="raise", on_false="clear"),
        builders.node("raise", {"type": "raise_alarm", "alarm": "ph probe", "severity": "warning"}),
        builders.node("clear", {"type": "clear_alarm", "alarm": "ph probe"}),
    ]
    builders.chain(farm.organization, nodes)
    farm.chain({**quality, "operator": "isNotSuspect"}, name="pump while it is believed")
    farm.say(7.0)
    assert farm.power == "on"
    farm.say(85.0)
    assert farm.power == "off"
    assert Alarm.objects.get().state == Alarm.State.ACTIVE
    farm.say(85.5)
    farm.say(7.1)
    assert (Alarm.objects.get().state, farm.power) == (Alarm.State.CLEARED, "on")


def test_one_event_with_a_good_and_a_suspect_value_runs_each_chain_once() -> None:
    farm = Farm(**RANGE)
    ask = farm.leaf(operator="isSuspect")
    ask.pop("value")
    farm.chain({"type": "OR", "expressions": [ask, farm.leaf(key="ec", value=1)]})
    farm.post({"values": {"ph": 85.0, "ec": 2.0}})
    assert farm.power == "on"
    assert StateChange.objects.count() == 1


def test_conditions_over_time_do_not_observe_what_is_suspect_nor_when_they_are_rebuilt() -> None:
    farm = Farm(**RANGE)
    farm.chain(farm.leaf(times=3, within="1m"))
    farm.say(7.0, 85.0, 86.0, 7.1, step=2)
    assert farm.power == "off", "two, not four"
    for key in redis.client().scan_iter(keys.condition_state(0, "*").replace("0", "*")):
        redis.client().delete(key)
    farm.say(6.0)
    assert farm.power == "off"
    farm.say(7.2)
    assert farm.power == "on"


def test_what_redis_lost_is_restored_with_what_is_believed_and_what_is_not() -> None:
    farm = Farm(**RANGE)
    farm.say(7.0, 85.0, step=5)
    known = farm.latest
    farm.forget()
    assert (farm.latest.value, farm.latest.suspicion) == (known.value, known.suspicion) == (7.0, "above-maximum")
    assert farm.latest.timestamp_us == known.timestamp_us
    Reading.objects.filter(suspect=None).delete()
    farm.forget()
    assert (farm.latest.value, farm.latest.suspicion) == (None, "above-maximum")


def test_to_send_it_again_changes_nothing() -> None:
    farm = Farm(**RANGE, maximum_step=1.0, stuck_after_seconds=60)
    farm.chain()
    items = [
        said(value, timezone.now() - timedelta(seconds=9 - place)) for place, value in enumerate((6.0, 6.9, 85.0, 8.8))
    ]
    farm.post(*items)
    before = (farm.latest, farm.reasons, farm.power)
    changes = StateChange.objects.count()
    for _ in range(2):
        farm.post(*items)
    heard_us = farm.latest.received_us
    assert heard_us > before[0].received_us
    assert (farm.latest._replace(received_us=before[0].received_us), farm.reasons, farm.power) == before
    assert StateChange.objects.count() == changes
    assert before[1] == [None, None, "above-maximum", "step-too-large"]


def test_a_value_older_than_its_maximum_age_is_missing_for_a_chain_that_the_clock_runs() -> None:
    farm = Farm(maximum_age_seconds=60)
    farm.chain({"type": "AND", "expressions": [farm.leaf(), farm.leaf(key="ec", value=1)]})
    farm.post(said(7.0, timezone.now() - timedelta(seconds=90)))
    farm.post({"values": {"ec": 2.0}})
    assert farm.power == "off", "of 90 seconds ago"
    farm.say(7.0)
    farm.post({"values": {"ec": 2.1}})
    assert farm.power == "on"


def test_what_is_bad_is_one_row_for_each_kind_with_a_count_and_the_newest() -> None:
    farm = Farm(**RANGE)
    for number in range(5):
        farm.post({"values": {"ph": "bad", "ec": number, f"made up {number}": 1}})
    farm.post({"values": {"ph": 7.0}, "timestamp": "2000-01-01T00:00:00Z"}, status=400)
    for value in (85.0, 86.0):
        farm.say(value)
    data_problems.shared().flush(force=True)

    rows = {(row.kind, row.name): row for row in DataProblem.objects.all()}
    assert {key: row.count for key, row in rows.items()} == {
        ("value", "ph"): 5, ("unknown", ""): 5, ("clock-not-set", ""): 1, ("above-maximum", "ph"): 2,
    }  # fmt: skip
    assert "made up 4" in rows["unknown", ""].detail
    assert json.loads(rows["value", "ph"].payload)["values"]["ec"] == 4
    assert "86.0" in rows["above-maximum", "ph"].detail
    first = rows["value", "ph"]
    farm.post({"values": {"ph": None, "ec": "x", "no": 1}}, status=202)
    farm.post({"values": {"ph": "worse", "ec": 1}})
    data_problems.shared().flush(force=True)
    again = DataProblem.objects.get(pk=first.pk)
    assert (again.count, again.first_seen_at) == (6, first.first_seen_at)
    assert again.last_seen_at > first.last_seen_at


def test_data_problems_are_listed_for_those_who_may_see_them_and_deleted_by_operators() -> None:
    farm = Farm(**RANGE)
    farm.say(85.0)
    data_problems.shared().flush(force=True)
    row = DataProblem.objects.get()
    viewer = client_of(farm.organization, "viewer")
    (found,) = viewer.get(f"/api/v1/data-problems?originator={farm.sensor.uuid}&kind=above-maximum").json()["results"]
    assert (found["name"], found["count"], found["sourceType"]) == ("ph", 1, "sensor")
    assert viewer.delete(f"/api/v1/data-problems/{row.uuid}").status_code == 403
    assert client_of(builders.organization("Other"), "admin").get("/api/v1/data-problems").json()["count"] == 0
    assert client_of(farm.organization, "operator").delete(f"/api/v1/data-problems/{row.uuid}").status_code == 204


def test_a_sensor_shows_by_how_much_its_clock_is_off_and_what_was_late_or_ahead() -> None:
    farm = Farm()
    api = client_of(farm.organization, "viewer")
    url = f"/api/v1/sensors/{farm.sensor.uuid}"
    assert api.get(url).json()["measuredClock"] is None
    farm.post({"values": {"ec": 1.0}})
    for _ in range(5):
        farm.post(said(7.0, timezone.now() - timedelta(seconds=90)))
    farm.post(said(7.0, timezone.now() - timedelta(hours=2)))
    farm.post(said(7.0, timezone.now() + timedelta(minutes=2)))
    sensor_clocks.shared().flush(force=True)
    found = api.get(url).json()["measuredClock"]
    assert 89_900 < found["offsetMs"] < 95_000, "the median: neither the backlog nor the one ahead"
    assert (found["late"], found["ahead"]) == (1, 1)
    farm.post(said(7.0, timezone.now() - timedelta(hours=3)))
    sensor_clocks.shared().flush(force=True)
    assert SensorClock.objects.get().late == 2


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        ({"minimum": 5, "maximum": 5}, "maximum"),
        ({"minimum": float("nan")}, "minimum"),
        ({"maximum_step": 0}, "maximum_step"),
        ({"maximum_step": 1, "maximum_step_seconds": 0}, "maximum_step_seconds"),
        ({"datatype": "string", "stuck_after_seconds": 5}, "stuck_after_seconds"),
        ({"maximum_age_seconds": 0}, "maximum_age_seconds"),
    ],
)
def test_limits_that_make_no_sense_are_refused_by_name(limits: dict[str, Any], field: str) -> None:
    sensor = builders.sensor(builders.organization(), variables={})
    with pytest.raises(ValidationError) as refused:
        Variable(sensor=sensor, name="x", **{"datatype": "number", **limits}).full_clean()
    assert list(refused.value.message_dict) == [field]


def test_what_is_noted_while_the_database_is_away_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    farm, problems = Farm(), data_problems.DataProblems()
    key = data_problems.Key("sensor", str(farm.sensor.uuid), "ph", data_problems.Kind.VALUE)
    problems.note(key, farm.organization.pk, detail="first", payload="1")

    def away(_seen: Any) -> None:
        """Another greenlet notes the same while this one waits for the database."""
        problems.note(key, farm.organization.pk, detail="second", payload="2")
        raise OperationalError("away")

    with monkeypatch.context() as patch:
        patch.setattr(data_problems, "_write", away)
        problems.flush(force=True)
    problems.flush(force=True)
    row = DataProblem.objects.get()
    assert (row.count, row.detail) == (2, "second")
    assert row.first_seen_at < row.last_seen_at
