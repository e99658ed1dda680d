"""Trials: what a chain would do with given values, step by step, and that nothing is done."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from django.utils import timezone
from rest_framework.test import APIClient

from aemos.lib import per_process, redis
from deploy.servers import free_port
from devices import latest
from devices.latest import Latest
from devices.models import Device, DeviceState, Organization, Reading, Sensor, StateChange, Variable
from notifications.models import Notification
from rules import events
from rules.authoring import editing
from rules.models import RuleChain
from tests import builders
from tests.problems import wrong

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]
API = "/api/v1/rule-chains"
NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


@dataclass
class Farm:
    organization: Organization
    sensor: Sensor
    other: Sensor
    pump: Device
    client: Any

    def chain(self, **fields: Any) -> RuleChain:
        """Above 6.5 with warm water, a part of the pH becomes the speed of the pump; else the pump stops."""
        warm = builders.leaf(self.other, "temperature", ">", 20)
        nodes = [
            builders.node("high", builders.leaf(self.sensor, operator=">", value=6.5), next="warm", on_false="stop"),
            builders.node("warm", warm, next="half"),
            builders.node("half", {"operation": "divide", "key": "ph", "value": 2, "target": "speed"}, next="dose"),
            builders.node("dose", builders.command(self.pump, "on")),
            builders.node("stop", builders.command(self.pump, "off")),
        ]
        return builders.chain(self.organization, nodes, **fields)

    def tried(self, chain: RuleChain, **given: Any) -> Any:
        answer = self.client.post(f"{API}/{chain.uuid}/execute", given)
        assert answer.status_code == 200, answer.json()
        return answer.json()

    def warm(self, value: Any, **more: Any) -> dict[str, Any]:
        return {
            "sourceType": "sensor",
            "UUID": str(self.other.uuid),
            "key": "temperature",
            "value": value,
        } | more


@pytest.fixture
def farm() -> Farm:
    organization = builders.organization()
    client = APIClient()
    client.force_authenticate(builders.member(organization))
    return Farm(
        organization,
        builders.sensor(organization, "Reservoir A"),
        builders.sensor(organization, "Reservoir B", variables={"temperature": "number"}),
        builders.device(organization, "Doser"),
        client,
    )


def test_every_step_is_told_with_what_it_saw_and_what_it_made(farm: Farm) -> None:
    moment = NOON - timedelta(seconds=90)
    known = [farm.warm(25, timestamp=moment.isoformat())]
    report = farm.tried(farm.chain(), values={"ph": 7}, timestamp=NOON.isoformat(), latest=known)
    assert [(step["node"], step["passed"]) for step in report["trace"]] == [
        ("high", True), ("warm", True), ("half", True), ("dose", True),
    ]  # fmt: skip
    high, warm, half, dose = report["trace"]
    assert high["text"] == "Reservoir A ph is above 6.5"
    assert (high["conditions"][0]["found"], high["conditions"][0]["ageSeconds"]) == (7, 0)
    assert warm["conditions"] == [
        {
            "path": "nodes[1].config", "text": "Reservoir B temperature is above 20", "sourceType": "sensor",
            "UUID": str(farm.other.uuid), "name": "Reservoir B", "key": "temperature", "found": 25,
            "foundAt": "2026-05-01T11:58:30Z", "ageSeconds": 90.0, "suspect": None, "passed": True,
        }
    ]  # fmt: skip
    assert half["values"] == {"ph": 7, "speed": 3.5}
    assert report["effects"] == [dose["effect"]]
    assert dose["effect"] == {
        "type": "device_command", "text": "set Doser power to on", "node": "dose", "deviceUuid": str(farm.pump.uuid),
        "deviceName": "Doser", "stateName": "power", "value": "on", "force": False, "held": None,
    }  # fmt: skip
    assert report["completed"] is True
    assert (report["partialData"], report["stoppedAt"], report["error"]) == (False, None, None)
    assert report["originator"]["name"] == "Reservoir A"
    assert report["timestamp"] == "2026-05-01T12:00:00Z"


def test_nothing_is_done_however_the_trial_ends(farm: Farm) -> None:
    chain = farm.chain(enabled=False)
    for value in (7, 6):
        assert farm.tried(chain, values={"ph": value}, latest=[farm.warm(25)])["effects"]
    assert not StateChange.objects.exists()
    assert not Notification.objects.exists()
    assert DeviceState.objects.get().value is None
    assert redis.client().dbsize() == 0
    chain.refresh_from_db()
    assert chain.version == 1


def test_what_is_missing_is_named_and_where_the_run_ends_too(farm: Farm) -> None:
    report = farm.tried(farm.chain(), values={"ph": 7})
    assert (report["completed"], report["stoppedAt"], report["effects"]) == (True, "warm", [])
    assert report["partialData"] is True
    missing = {key: value for key, value in farm.warm(None).items() if key != "value"}
    assert report["missingSources"] == [{**missing, "name": "Reservoir B"}]
    assert report["trace"][1]["conditions"][0]["found"] is None


def test_what_is_known_is_used_unless_something_else_is_given(farm: Farm) -> None:
    chain = farm.chain()
    key = ("sensor", str(farm.other.uuid), "temperature")
    latest.remember({key: Latest(25, events.microseconds(NOON))})
    assert [each["value"] for each in farm.tried(chain, values={"ph": 7})["effects"]] == ["on"]
    assert farm.tried(chain, values={"ph": 7}, latest=[farm.warm(15)])["stoppedAt"] == "warm"
    assert farm.tried(chain, values={"ph": 7}, latest=[farm.warm(None)])["partialData"] is True
    history = [farm.warm(15, timestamp=NOON.isoformat()), farm.warm(21, timestamp=(NOON + timedelta(1)).isoformat())]
    for known in (history, history[::-1]):
        report = farm.tried(chain, values={"ph": 7}, latest=known)
        assert report["trace"][1]["conditions"][0]["found"] == 21


def test_a_node_that_fails_is_told_with_the_reason(farm: Farm) -> None:
    nodes = [
        builders.node("high", builders.leaf(farm.sensor, operator=">", value=6.5), next="sum"),
        builders.node("sum", {"operation": "add", "key": "other", "value": 1}),
    ]
    chain = builders.chain(farm.organization, nodes)
    report = farm.tried(chain, values={"ph": 7})
    assert report["completed"] is False
    assert (report["error"]["node"], report["error"]["code"]) == ("sum", None)
    assert [(step["node"], step["passed"]) for step in report["trace"]] == [("high", True), ("sum", False)]
    assert [step["error"] for step in report["trace"]] == [None, report["error"]["message"]]
    nodes[1].on_failure = "stop"
    nodes.append(builders.node("stop", builders.command(farm.pump, "off")))
    editing.save(chain, nodes)
    report = farm.tried(chain, values={"ph": 7})
    assert (report["completed"], [step["passed"] for step in report["trace"]]) == (True, [True, False, True])
    assert "'other'" in report["trace"][2]["values"]["error"]


def test_an_effect_that_would_change_nothing_says_why(farm: Farm) -> None:
    chain = farm.chain()
    DeviceState.objects.update(value="off")
    assert farm.tried(chain, values={"ph": 6})["effects"][0]["held"]
    assert farm.tried(chain, values={"ph": 7}, latest=[farm.warm(25)])["effects"][0]["held"] is None
    command = {**builders.command(farm.pump, "off"), "force": True, "cooldown": "10m"}
    nodes = [
        builders.node("low", builders.leaf(farm.sensor), next="stop"),
        builders.node("stop", command),
    ]
    chain = builders.chain(farm.organization, nodes)
    assert farm.tried(chain, values={"ph": 5})["effects"][0]["held"] is None
    done_at = timezone.now() - timedelta(minutes=9)
    DeviceState.objects.update(commanded={'"off"': int(done_at.timestamp() * 1_000_000)})
    held = farm.tried(chain, values={"ph": 5})["effects"][0]["held"]
    assert held == f"it rests until {done_at + timedelta(minutes=10):%Y-%m-%d %H:%M:%S} UTC"
    DeviceState.objects.update(commanded={'"off"': int((done_at - timedelta(minutes=2)).timestamp() * 1_000_000)})
    assert farm.tried(chain, values={"ph": 5})["effects"][0]["held"] is None


def test_texts_are_told_as_people_would_get_them(farm: Farm) -> None:
    nodes = [
        builders.node("low", builders.leaf(farm.sensor), next="tell"),
        builders.node("tell", {"type": "notify", "title": "pH", "message": "pH is {ph} at {originator}"}, next="alarm"),
        builders.node("alarm", {"type": "raise_alarm", "alarm": "pH too low", "message": "{ph}"}),
    ]
    report = farm.tried(builders.chain(farm.organization, nodes), values={"ph": 5})
    told, raised = report["effects"]
    assert (told["type"], told["message"]) == ("notify", "pH is 5 at Reservoir A")
    assert (raised["type"], raised["alarm"], raised["severity"]) == ("raise_alarm", "pH too low", "warning")


def test_a_command_that_the_device_does_not_take_fails_in_the_trial_as_in_a_run(farm: Farm) -> None:
    nodes = [
        builders.node("low", builders.leaf(farm.sensor), next="set"),
        builders.node("set", {**builders.command(farm.pump), "valueFrom": "ph"}),
    ]
    del nodes[1].config["value"]
    report = farm.tried(builders.chain(farm.organization, nodes), values={"ph": 5})
    assert report["error"]["node"] == "set"
    assert "Doser" in report["error"]["message"]
    assert "power" in report["error"]["message"]


@pytest.mark.parametrize(("minutes", "expected"), [((0, 3), "high"), ((0, 5), None)])
def test_a_condition_over_time_remembers_the_history_that_is_given(
    farm: Farm, minutes: tuple[int, int], expected: str | None
) -> None:
    held = {**builders.leaf(farm.sensor, operator=">", value=6.5), "for": "5m"}
    nodes = [builders.node("high", held, next="on"), builders.node("on", builders.command(farm.pump))]
    chain = builders.chain(farm.organization, nodes)
    first, last = (NOON + timedelta(minutes=minute) for minute in minutes)
    known = {"sourceType": "sensor", "UUID": str(farm.sensor.uuid), "key": "ph", "value": 7}
    history = [{**known, "timestamp": first.isoformat()}]
    report = farm.tried(chain, values={"ph": 7}, timestamp=last.isoformat(), latest=history)
    assert report["stoppedAt"] == expected


def test_a_condition_over_time_remembers_what_is_stored(farm: Farm) -> None:
    held = {**builders.leaf(farm.sensor, operator=">", value=6.5), "for": "5m"}
    nodes = [builders.node("high", held, next="on"), builders.node("on", builders.command(farm.pump))]
    chain = builders.chain(farm.organization, nodes)
    variable = Variable.objects.get(sensor=farm.sensor)
    Reading.objects.create(variable=variable, timestamp=NOON, number=7)
    later = (NOON + timedelta(minutes=5)).isoformat()
    assert farm.tried(chain, values={"ph": 7}, timestamp=later)["effects"]
    Reading.objects.create(variable=variable, timestamp=NOON + timedelta(minutes=3), number=6)
    assert farm.tried(chain, values={"ph": 7}, timestamp=later)["stoppedAt"] == "high"
    Reading.objects.create(variable=variable, timestamp=NOON + timedelta(minutes=9), number=6)
    assert farm.tried(chain, values={"ph": 6.4}, timestamp=later)["trace"][0]["conditions"][0]["passed"] is False


def test_a_trial_that_would_read_for_too_long_is_refused(farm: Farm, settings: Any) -> None:
    settings.DATA_COLLECTION_TIMEOUT_MS = -1
    leaf = builders.leaf(farm.sensor, operator=">", value=6.5) | {"for": "5m"}
    chain = builders.chain(farm.organization, [builders.node("long", leaf)])
    answer = farm.client.post(f"{API}/{chain.uuid}/execute", {"values": {"ph": 7}})

    assert answer.status_code == 400
    assert "1 conditions over time" in wrong(answer)["latest"]


def test_the_time_at_which_the_outcome_may_change_by_itself_is_told(farm: Farm) -> None:
    silent = builders.leaf(farm.sensor, operator="olderThan") | {"duration": "10m"}
    del silent["value"]
    chain = builders.chain(farm.organization, [builders.node("silent", silent)])
    report = farm.tried(chain, values={"ph": 7}, timestamp=NOON.isoformat())
    assert (report["stoppedAt"], report["wakeAt"]) == ("silent", "2026-05-01T12:10:00Z")


def test_without_values_it_is_a_run_by_schedule(farm: Farm) -> None:
    latest.remember({("sensor", str(farm.sensor.uuid), "ph"): Latest(6.0, events.microseconds(NOON))})
    chain = farm.chain(name="By night")
    report = farm.tried(chain)
    assert report["originator"] == {"sourceType": "chain", "UUID": str(chain.uuid), "name": "By night"}
    assert [each["value"] for each in report["effects"]] == ["off"]


@pytest.mark.parametrize(
    ("given", "field", "complaint"),
    [
        ({"values": {"pH": 7}}, "originator", "must be one whose values the filters of the chain read: sensor"),
        ({"values": {"ph": 7}, "originator": str(uuid4())}, "originator", "must be one whose values"),
        ({"values": {"ph": "7"}}, "values", "ph must be a number, not a string"),
        ({"values": [7]}, "values", "Expected a dictionary"),
        ({"valeus": {"ph": 7}}, "valeus", "There is no such field"),
        ({"values": {"ph": 7}, "timestamp": "noon"}, "timestamp", "wrong format"),
        ({"values": {"ph": 7}, "timestamp": "9999-12-31T23:59:59Z"}, "timestamp", "9000"),
        (
            {
                "latest": [
                    {
                        "sourceType": "sensor",
                        "UUID": str(uuid4()),
                        "key": "ph",
                        "value": 7,
                        "timestamp": "9999-12-31T23:59:59Z",
                    }
                ]
            },
            "latest[0].timestamp",
            "9000",
        ),
        ({"values": {"ph": 7}, "sourceType": "chain"}, "sourceType", "not a valid choice"),
        ({"values": {"ph": 7}, "latest": [{"key": "ph"}]}, "latest[0].UUID", "required"),
    ],
)
def test_what_cannot_be_tried_is_refused_by_field(farm: Farm, given: Any, field: str, complaint: str) -> None:
    answer = farm.client.post(f"{API}/{farm.chain().uuid}/execute", given)
    assert answer.status_code == 400
    assert complaint in wrong(answer)[field]


def test_a_misspelt_variable_of_a_named_sensor_is_told_with_what_it_has(farm: Farm) -> None:
    given = {"values": {"pH": 7}, "originator": str(farm.sensor.uuid)}
    answer = farm.client.post(f"{API}/{farm.chain().uuid}/execute", given)
    assert wrong(answer).keys() == {"values"}


def test_a_broken_chain_tells_its_problems(farm: Farm) -> None:
    chain = farm.chain()
    chain.nodes.filter(name="half").update(next="nowhere")
    answer = farm.client.post(f"{API}/{chain.uuid}/execute", {"values": {"ph": 7}})
    assert answer.status_code == 400
    assert "nodes[2].next" in list(wrong(answer))


def test_a_chain_that_is_not_saved_can_be_tried(farm: Farm) -> None:
    nodes = [
        {"name": "high", "type": "filter", "config": builders.leaf(farm.sensor, operator=">", value=6.5), "next": "on"},
        {"name": "on", "type": "action", "config": builders.command(farm.pump)},
    ]
    body = {"organization": str(farm.organization.uuid), "nodes": nodes, "values": {"ph": 7}}
    answer = farm.client.post(f"{API}/execute", body)
    assert [each["value"] for each in answer.json()["effects"]] == ["on"]
    assert not RuleChain.objects.exists()
    nodes[1]["config"] = builders.command(farm.pump, "dimmed")
    answer = farm.client.post(f"{API}/execute", body)
    assert list(wrong(answer)) == ["nodes[1].config.value"]


def test_a_trial_says_that_latest_values_are_not_known_while_redis_is_away(farm: Farm, settings: Any) -> None:
    chain = farm.chain()
    settings.REDIS_PORT = free_port()
    per_process.forget_all()
    try:
        answer = farm.client.post(f"{API}/{chain.uuid}/execute", {"values": {"ph": 7}})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        given = {"values": {"ph": 7}, "latest": [farm.warm(25)]}
        assert farm.client.post(f"{API}/{chain.uuid}/execute", given).status_code == 200
    finally:
        per_process.forget_all()
