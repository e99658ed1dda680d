"""Backtests: what a chain would have done with stored readings, compared with the days that the guides describe."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from devices.models import Device, DeviceState, Organization, Reading, Sensor, StateChange, Variable
from rules.authoring import backtest
from rules.models import RuleChain
from tests import builders
from tests.problems import wrong

pytestmark = pytest.mark.django_db
DAY = datetime(2026, 5, 4, tzinfo=UTC)


def at(clock: str) -> datetime:
    hour, minute = clock.split(":")
    return DAY + timedelta(hours=int(hour), minutes=int(minute))


@pytest.fixture
def farm() -> Organization:
    return builders.organization()


@pytest.fixture
def tank(farm: Organization) -> Sensor:
    return builders.sensor(farm, "Reservoir A", variables={"ph": "number", "waterLevel": "number"})


@pytest.fixture
def doser(farm: Organization) -> Device:
    device = builders.device(farm, "Doser", states={})
    DeviceState.objects.create(device=device, name="dose", kind="momentary", datatype="number")
    return device


def reported(sensor: Sensor, readings: Mapping[str, Mapping[str, float]], **fields: Any) -> None:
    variables = {row.name: row for row in Variable.objects.filter(sensor=sensor)}
    Reading.objects.bulk_create(
        Reading(variable=variables[name], timestamp=at(clock), number=value, **fields)
        for clock, values in readings.items()
        for name, value in values.items()
    )


def played(chain: RuleChain, begin: str = "00:00", end: str = "23:59") -> backtest.Backtest:
    return backtest.run(chain, list(chain.nodes.all()), begin=at(begin), end=at(end))


def times(result: backtest.Backtest) -> list[str]:
    return [f"{each.at:%H:%M}" for each in result.done]


def dosing(farm: Organization, tank: Sensor, doser: Device, **more: Any) -> RuleChain:
    leaves = [
        {**builders.leaf(tank, operator=">", value=6.5), "for": "5m"},
        builders.leaf(tank, "waterLevel", ">=", 20),
    ]
    dose = {**builders.command(doser, 5, state="dose"), "cooldown": "15m"}
    nodes = [
        builders.node("too high", {"type": "AND", "expressions": leaves}, next="acid"),
        builders.node("acid", dose),
    ]
    return builders.chain(farm, nodes, **more)


MORNING = {
    "06:00": {"ph": 6.8, "waterLevel": 64},
    "06:03": {"ph": 6.9},
    "06:05": {"ph": 6.8},
    "06:08": {"ph": 6.8},
    "06:21": {"ph": 6.7},
    "06:30": {"ph": 6.4},
    "06:40": {"ph": 6.6},
    "06:45": {"ph": 6.6, "waterLevel": 12},
}


def test_the_morning_of_the_guide_doses_twice(farm: Organization, tank: Sensor, doser: Device) -> None:
    reported(tank, MORNING)
    result = played(dosing(farm, tank, doser, enabled=False))
    assert times(result) == ["06:05", "06:21"]
    assert result.done[0].text == "set Doser dose to 5, at most once in 15 m"
    assert (result.count, result.held, result.readings, result.failures) == (2, 1, 10, [])
    assert not StateChange.objects.exists(), "a trial must do nothing"


def test_what_was_before_the_span_is_remembered(farm: Organization, tank: Sensor, doser: Device) -> None:
    reported(tank, MORNING)
    assert times(played(dosing(farm, tank, doser), begin="06:04")) == ["06:05", "06:21"]


def test_suspect_readings_are_not_believed(farm: Organization, tank: Sensor, doser: Device) -> None:
    reported(tank, MORNING, suspect="step")
    assert played(dosing(farm, tank, doser)).count == 0


def test_a_dead_band_switches_on_once_and_off_once(farm: Organization, tank: Sensor) -> None:
    fan = builders.device(farm, "Fan")
    hot = {**builders.leaf(tank, operator=">", value=7), "releaseAt": 6}
    nodes = [
        builders.node("hot", hot, next="on", on_false="off"),
        builders.node("on", builders.command(fan)),
        builders.node("off", builders.command(fan, "off")),
    ]
    values = (6.5, 7.5, 6.5, 7.2, 5.5, 6.5)
    reported(tank, {f"08:{minute:02d}": {"ph": value} for minute, value in enumerate(values)})
    result = played(builders.chain(farm, nodes))
    assert [(f"{each.at:%H:%M}", each.text) for each in result.done] == [
        ("08:00", "set Fan power to off"),
        ("08:01", "set Fan power to on"),
        ("08:04", "set Fan power to off"),
    ]


def test_time_alone_runs_a_chain(farm: Organization, tank: Sensor) -> None:
    """Nothing is reported from 09:00 on: the alarm is raised ten minutes later, and once."""
    silent = {**builders.leaf(tank), "operator": "olderThan", "duration": "10m"}
    del silent["value"]
    nodes = [
        builders.node("silent", silent, next="raise", on_false="clear"),
        builders.node("raise", {"type": "raise_alarm", "alarm": "Silent"}),
        builders.node("clear", {"type": "clear_alarm", "alarm": "Silent"}),
    ]
    reported(tank, {"08:55": {"ph": 6.0}, "09:00": {"ph": 6.0}, "11:00": {"ph": 6.0}})
    result = played(builders.chain(farm, nodes), end="12:00")
    assert times(result) == ["09:10", "11:00", "11:10"]


def test_states_that_change_at_one_moment_and_run_the_chain(farm: Organization) -> None:
    """A device reports two states at once; each report is known before the next event."""
    pump, light = (
        builders.device(farm, "Pump", states={"power": ["on", "off"], "mode": ["auto", "hand"]}),
        builders.device(farm, "Light"),
    )
    both = [builders.leaf(pump, "power", "==", "on"), builders.leaf(pump, "mode", "==", "auto")]
    nodes = [
        builders.node("both", {"type": "AND", "expressions": both}, next="on"),
        builders.node("on", builders.command(light)),
    ]
    for number, (clock, state, value) in enumerate(
        (("06:00", "power", "on"), ("06:00", "mode", "hand"), ("07:00", "power", "on"), ("07:00", "mode", "auto"))
    ):
        StateChange.objects.create(
            effect_key=str(number), state=DeviceState.objects.get(device=pump, name=state), value=value, source="device",
            actor="x", timestamp=at(clock),
        )  # fmt: skip
    assert times(played(builders.chain(farm, nodes))) == ["07:00"]


def test_a_schedule_runs_on_what_is_known(farm: Organization, tank: Sensor) -> None:
    pump = builders.device(farm, "Pump")
    nodes = [
        builders.node("drained", builders.leaf(tank, "waterLevel", "<", 30), next="on"),
        builders.node("on", {**builders.command(pump), "force": True}),
    ]
    chain = builders.chain(farm, nodes, execution_type="schedule-only", cron="0 6-12/2 * * *", timezone="Europe/Berlin")
    reported(tank, {"01:00": {"waterLevel": 10}, "07:00": {"waterLevel": 50}, "09:00": {"waterLevel": 20}})
    result = played(chain)
    assert (times(result), result.runs) == (["04:00", "06:00", "10:00"], 4)


def test_states_that_the_chain_sets_are_as_it_set_them(farm: Organization, tank: Sensor) -> None:
    """Ebb and flow: the pump that the chain switched on goes off by itself when it ran for a quarter of an hour."""
    pump = builders.device(farm, "Pump")
    low = builders.leaf(tank, "waterLevel", "<", 30)
    long = {**builders.leaf(pump, "power", "valueOlderThan", "on"), "duration": "15m"}
    nodes = [
        builders.node("long", long, next="off", on_false="low"),
        builders.node("off", builders.command(pump, "off")),
        builders.node("low", low, next="on"),
        builders.node("on", builders.command(pump)),
    ]
    reported(tank, {"06:00": {"waterLevel": 5}, "06:10": {"waterLevel": 60}})
    result = played(builders.chain(farm, nodes), end="07:00")
    assert [(f"{each.at:%H:%M}", each.text) for each in result.done] == [
        ("06:00", "set Pump power to on"),
        ("06:15", "set Pump power to off"),
    ]


def test_more_readings_than_can_be_played_are_cut_to_the_newest(
    farm: Organization, tank: Sensor, doser: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backtest, "MAXIMUM_READINGS", 4)
    reported(tank, MORNING)
    result = played(dosing(farm, tank, doser))
    assert (result.is_cut, result.readings, f"{result.begin:%H:%M}") == (True, 4, "06:30")


def test_an_action_that_fails_is_named_once(farm: Organization, tank: Sensor, doser: Device) -> None:
    dose = builders.command(doser, state="dose")
    del dose["value"]
    nodes = [
        builders.node("any", builders.leaf(tank, operator=">", value=0), next="dose"),
        builders.node("dose", {**dose, "valueFrom": "amount"}),
    ]
    reported(tank, MORNING)
    result = played(builders.chain(farm, nodes))
    assert result.failures == ["dose: the event has no value for 'amount'"]


def test_the_sensors_of_others_are_not_read(farm: Organization, tank: Sensor, doser: Device) -> None:
    chain = dosing(farm, tank, doser)
    reported(tank, MORNING)
    Sensor.objects.filter(pk=tank.pk).update(organization=builders.organization())
    assert played(chain).readings == 0


# Over REST


def asked(farm: Organization, path: str, body: dict[str, Any], role: str = "viewer") -> Any:
    client = builders.client_of(builders.member(farm, role))
    return client.post(f"/api/v1/rule-chains/{path}", body, content_type="application/json")


def test_a_stored_day_is_played_over_rest(farm: Organization, tank: Sensor, doser: Device) -> None:
    chain = dosing(farm, tank, doser)
    chain.enabled = False
    chain.save()
    reported(tank, MORNING)
    expected = played(chain)
    answer = asked(farm, f"{chain.uuid}/backtest", {"from": at("00:00").isoformat(), "to": at("23:59").isoformat()})
    assert answer.status_code == 200, answer.content
    found = answer.json()
    assert (found["count"], found["readings"], found["isCut"]) == (expected.count, expected.readings, False)
    assert [each["text"] for each in found["done"]] == [each.text for each in expected.done]
    assert found["count"] > 0


def given(sensor: Sensor, **values: float) -> list[dict[str, Any]]:
    return [
        {
            "UUID": str(sensor.uuid),
            "key": "ph",
            "value": value,
            "timestamp": at(clock.replace("_", ":").strip("t")).isoformat(),
        }
        for clock, value in values.items()
    ]


def held_for_five_minutes(farm: Organization, tank: Sensor) -> dict[str, Any]:
    pump = builders.device(farm, "Pump")
    nodes = [
        {
            "name": "high",
            "type": "filter",
            "config": {**builders.leaf(tank, operator=">", value=6.5), "for": "5m"},
            "next": "on",
        },
        {"name": "on", "type": "action", "config": builders.command(pump)},
    ]
    return {"organization": str(farm.uuid), "nodes": nodes}


@pytest.mark.parametrize(
    ("series", "times_done"),
    [
        ({"t09_00": 6.9, "t09_06": 6.9}, 1),
        ({"t09_00": 6.9, "t09_04": 6.0, "t09_06": 6.9}, 0),
        ({"t09_06": 6.9, "t09_00": 6.9}, 1),  # in whatever order they come
    ],
)
def test_a_series_shows_that_a_condition_over_time_fires(
    farm: Organization, tank: Sensor, series: dict[str, float], times_done: int
) -> None:
    reported(tank, {"08:00": {"ph": 9.0}})  # stored, and not asked for
    answer = asked(farm, "backtest", {**held_for_five_minutes(farm, tank), "readings": given(tank, **series)})
    assert answer.status_code == 200, answer.content
    assert answer.json()["count"] == times_done
    assert not RuleChain.objects.exists()


def test_a_series_is_played_to_the_end_that_is_asked_for(farm: Organization, tank: Sensor) -> None:
    body = held_for_five_minutes(farm, tank)
    silent = {**builders.leaf(tank, operator="olderThan"), "duration": "30m"}
    silent.pop("value")
    body["nodes"][0]["config"] = silent
    body["readings"] = given(tank, t09_00=6.9)
    assert asked(farm, "backtest", body).json()["count"] == 0
    found = asked(farm, "backtest", {**body, "to": at("10:00").isoformat()}).json()
    assert (found["count"], found["done"][0]["at"][:16]) == (1, "2026-05-04T09:30")


def test_what_a_backtest_cannot_use_is_named(farm: Organization, tank: Sensor) -> None:
    whole = held_for_five_minutes(farm, tank)
    good = given(tank, t09_00=6.9)[0]
    stranger = builders.sensor(builders.organization())
    for change, field in (
        ({"readings": [good, {**good, "key": "salt"}]}, "readings[1].key"),
        ({"readings": [{**good, "UUID": str(stranger.uuid)}]}, "readings[0].key"),
        ({"readings": [{**good, "value": "high"}]}, "readings[0].value"),
        ({"readings": [{**good, "timestamp": "yesterday"}]}, "readings[0].timestamp"),
        ({"readings": [good] * 5_001}, "readings"),
        ({"from": "2026-05-02T00:00:00Z", "to": "2026-05-01T00:00:00Z"}, "from"),
        ({"from": "2026-01-01T00:00:00Z", "to": "2026-05-01T00:00:00Z"}, "from"),
        ({"since": "2026-05-01T00:00:00Z"}, "since"),
        ({"organization": str(builders.organization().uuid)}, "organization"),
        ({"executionType": "schedule-only", "cron": "at noon"}, "cron"),
        ({"nodes": [{"name": "x", "type": "filter", "config": {}}]}, None),
    ):
        answer = asked(farm, "backtest", {**whole, **change})
        assert answer.status_code == 400, (change, answer.content)
        if field:
            assert field in wrong(answer), (field, answer.content)


def test_a_foreign_chain_cannot_be_played(farm: Organization, tank: Sensor, doser: Device) -> None:
    chain = dosing(farm, tank, doser)
    assert asked(builders.organization(), f"{chain.uuid}/backtest", {}).status_code == 404
