"""The REST API of rule chains, their nodes, switching by hand, rejected events and dead letters."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from django.contrib.auth.models import User
from django.db import connection
from rest_framework.test import APIClient

from aemos.lib import keys, per_process, redis
from deploy.servers import free_port
from devices.models import CatalogueVersion, Device, DeviceState, Membership, Organization, Sensor, StateChange
from notifications import messages
from notifications.models import Notification
from rules.authoring import editing, validation
from rules.effects import suspension
from rules.engine import chains
from rules.engine.exceptions import InvalidChain
from rules.journal import ledger
from rules.models import Alarm, ChainStatistics, DeadLetter, RejectedEvent, RuleChain, RuleNode
from rules.processing import loading
from tests import builders
from tests.problems import problem, wrong

pytestmark = pytest.mark.django_db
API = "/api/v1"
NOWHERE = "8b0e8f1c-6f0e-4a35-9f3f-2f1c8a1d7f10"


@dataclass
class Farm:
    organization: Organization
    sensor: Sensor
    device: Device
    operator: User
    client: Any

    def body(self, *nodes: dict[str, Any], **fields: Any) -> dict[str, Any]:
        return {"organization": str(self.organization.uuid), "name": "Acid", "nodes": list(nodes)} | fields

    def low(self, **changes: Any) -> dict[str, Any]:
        return {"name": "low", "type": "filter", "config": builders.leaf(self.sensor), "next": "switch"} | changes

    def switch(self, **changes: Any) -> dict[str, Any]:
        return {"name": "switch", "type": "action", "config": builders.command(self.device)} | changes

    def version(self) -> int:
        return CatalogueVersion.objects.get(organization=self.organization).version


@pytest.fixture
def farm() -> Farm:
    organization = builders.organization()
    operator = builders.member(organization, "operator", username="olga")
    client = APIClient()
    client.force_authenticate(operator)
    return Farm(organization, builders.sensor(organization), builders.device(organization), operator, client)


@pytest.fixture
def chain(farm: Farm) -> RuleChain:
    return builders.switching_chain(farm.sensor, farm.device, name="Acid")


def url(chain: RuleChain, node: str = "") -> str:
    path = f"{API}/rule-chains/{chain.uuid}"
    return f"{path}/nodes/{chain.nodes.get(name=node).uuid}" if node else path


def links(chain: RuleChain) -> dict[str, tuple[str, str]]:
    return {node.name: (node.next, node.on_false) for node in chain.nodes.all()}


def paths(answer: Any) -> list[str]:
    assert answer.status_code == 400, answer.content
    return list(wrong(answer))


# Chains


def test_a_chain_is_created_with_its_nodes(farm: Farm) -> None:
    before = farm.version()
    answer = farm.client.post(f"{API}/rule-chains", farm.body(farm.low(), farm.switch(), priority=2))
    assert answer.status_code == 201
    created = answer.json()
    chain = RuleChain.objects.get()
    assert [set(node) for node in created["nodes"]] == [
        {"uuid", "name", "type", "config", "next", "onFalse", "onFailure"}
    ] * 2
    assert [(node["next"], node["onFalse"]) for node in created["nodes"]] == [("switch", None), (None, None)]
    assert created["nodes"][0]["config"] == builders.leaf(farm.sensor)
    assert (created["version"], created["enabled"], created["executionType"]) == (1, True, "event-triggered")
    assert (created["priority"], created["maxRetries"]) == (2, 3)
    assert created == farm.client.get(f"{API}/rule-chains/{created['uuid']}").json()
    assert chains.compile(loading.spec_of(chain, chain.nodes.all())).references
    assert farm.version() == before + 1


def test_every_change_is_a_new_version_and_tells_the_workers(farm: Farm, chain: RuleChain) -> None:
    before = farm.version()
    assert farm.client.patch(url(chain), {"enabled": False}).json()["version"] == 2
    assert farm.client.patch(url(chain), {"nodes": [farm.low(next=None)]}).json()["version"] == 3
    assert farm.client.put(url(chain), farm.body(farm.low(), farm.switch())).json()["version"] == 4
    assert farm.version() == before + 3
    farm.client.delete(url(chain))
    assert farm.version() == before + 4
    assert not RuleChain.objects.exists()


def test_what_was_read_can_be_changed_and_written_back(farm: Farm, chain: RuleChain) -> None:
    body = farm.client.get(url(chain)).json()
    uuids = [node["uuid"] for node in body["nodes"]]
    body["nodes"][0]["name"], body["nodes"][1]["name"] = "switch", "low"
    body["nodes"][0]["next"] = "low"
    answer = farm.client.put(url(chain), body)
    assert answer.status_code == 200
    assert [(node["uuid"], node["name"]) for node in answer.json()["nodes"]] == list(
        zip(uuids, ["switch", "low"], strict=True)
    )


def test_nodes_without_a_uuid_keep_the_one_of_their_name(farm: Farm, chain: RuleChain) -> None:
    uuids = {node.name: str(node.uuid) for node in chain.nodes.all()}
    answer = farm.client.patch(url(chain), {"nodes": [farm.low(next="new"), farm.switch(name="new")]})
    found = {node["name"]: node["uuid"] for node in answer.json()["nodes"]}
    assert found["low"] == uuids["low"]
    assert found["new"] not in uuids.values()


def test_a_uuid_of_no_node_of_the_chain_is_refused(farm: Farm, chain: RuleChain) -> None:
    other = builders.switching_chain(farm.sensor, farm.device)
    own, foreign = str(chain.nodes.get(name="low").uuid), str(other.nodes.get(name="low").uuid)
    nodes = [farm.low(uuid=own), farm.switch(uuid=own)]
    assert paths(farm.client.patch(url(chain), {"nodes": nodes})) == ["nodes[1].uuid"]
    assert paths(farm.client.patch(url(chain), {"nodes": [farm.low(uuid=foreign), farm.switch()]})) == ["nodes[0].uuid"]
    assert paths(
        farm.client.post(f"{API}/rule-chains", farm.body(farm.low(uuid=NOWHERE), farm.switch(), name="B"))
    ) == ["nodes[0].uuid"]


def test_a_version_that_has_passed_is_not_written_over(farm: Farm, chain: RuleChain) -> None:
    body = farm.client.get(url(chain)).json()
    farm.client.patch(url(chain), {"priority": 1})
    assert wrong(farm.client.put(url(chain), body)).keys() >= {"version"}
    chain.refresh_from_db()
    assert (chain.priority, chain.version) == (1, 2)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"organization": NOWHERE}, "organization"),
        ({"name": ""}, "name"),
        ({"name": "Acid"}, "name"),
        ({"executionType": "sometimes"}, "executionType"),
        ({"priority": 0}, "priority"),
        ({"priority": 99_999}, "priority"),
        ({"maxRetries": -1}, "maxRetries"),
        ({"enabeld": True}, "enabeld"),
        ({"version": 7}, "version"),
        ({"nodes": None}, "nodes"),
    ],
)
def test_a_field_of_the_chain_that_is_wrong_is_named(
    farm: Farm, chain: RuleChain, fields: dict[str, Any], field: str
) -> None:
    answer = farm.client.post(f"{API}/rule-chains", farm.body(farm.low(), farm.switch()) | {"name": "New"} | fields)
    assert answer.status_code == 400
    assert list(wrong(answer)) == [field]
    assert RuleChain.objects.count() == 1


def test_a_chain_stays_in_its_organization(farm: Farm, chain: RuleChain) -> None:
    other = builders.organization()
    Membership.objects.create(user=farm.operator, organization=other, role="operator")
    answer = farm.client.patch(url(chain), {"organization": str(other.uuid)})
    assert wrong(answer).keys() == {"organization"}


# What is done with a chain as a whole


def test_the_schedule_of_a_chain_is_written_and_read(farm: Farm) -> None:
    schedule = {"executionType": "hybrid", "cron": "0 6 * * *", "timezone": "Europe/Berlin", "missedRuns": "skip"}
    created = farm.client.post(f"{API}/rule-chains", farm.body(farm.low(), farm.switch(), **schedule)).json()
    assert {name: created[name] for name in schedule} == schedule
    assert (created["lastRunAt"], created["suspendedAt"]) == (None, None)
    assert datetime.fromisoformat(created["nextRunAt"]) > datetime.now(UTC)
    assert created["sentence"].startswith(
        "At the times 0 6 * * * (Europe/Berlin), and with every value reported: when "
    )


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"executionType": "hybrid"}, "cron"),
        ({"executionType": "hybrid", "cron": "0 6 * * * *"}, "cron"),
        ({"cron": "0 6 * * *"}, "cron"),
        ({"executionType": "schedule-only", "cron": "0 6 * * *", "timezone": "Mars"}, "timezone"),
        ({"missedRuns": "never"}, "missedRuns"),
        ({"nextRunAt": "2026-05-01T06:00:00Z"}, "nextRunAt"),
        ({"suspendedAt": None}, "suspendedAt"),
    ],
)
def test_a_schedule_that_is_wrong_is_told_by_field(farm: Farm, fields: dict[str, Any], field: str) -> None:
    answer = farm.client.post(f"{API}/rule-chains", farm.body(farm.low(), farm.switch(), **fields))
    assert list(wrong(answer)) == [field]


def test_a_wrong_schedule_and_wrong_nodes_are_told_together(farm: Farm) -> None:
    answer = farm.client.post(f"{API}/rule-chains", farm.body(farm.low(), cron="x"))
    assert paths(answer) == ["cron", "nodes[0].next"]


def test_what_changes_by_itself_does_not_keep_an_edit_from_being_written_back(farm: Farm, chain: RuleChain) -> None:
    body = farm.client.get(url(chain)).json()
    ChainStatistics.objects.create(chain=chain, executions=4, failures=1, seconds=0.5, last_error="no value")
    RuleChain.objects.filter(pk=chain.pk).update(last_run_at=datetime(2026, 5, 1, tzinfo=UTC))
    body["priority"] = 1
    answer = farm.client.put(url(chain), body)
    assert answer.status_code == 200
    assert answer.json()["lastRunAt"] == "2026-05-01T00:00:00Z"
    assert answer.json()["statistics"] == {
        "executions": 4, "failures": 1, "failuresInARow": 0, "averageSeconds": 0.125, "lastExecutedAt": None,
        "lastFailedAt": None, "lastError": "no value",
    }  # fmt: skip


def test_a_chain_that_never_ran_has_statistics_of_nothing(farm: Farm, chain: RuleChain) -> None:
    (row,) = farm.client.get(f"{API}/rule-chains").json()["results"]
    assert (row["statistics"]["executions"], row["statistics"]["averageSeconds"]) == (0, None)
    assert not {"sentence", "validationWarnings"} & row.keys()


def suspend(chain: RuleChain) -> None:
    ChainStatistics.objects.update_or_create(chain=chain, defaults={"failures_in_a_row": 10})
    assert suspension.suspend(chain.pk, "it failed")


def failures_in_a_row(chain: RuleChain) -> int:
    return ChainStatistics.objects.get(chain=chain).failures_in_a_row


@pytest.mark.usefixtures("empty_redis")
def test_enabling_ends_a_suspension_clears_its_alarm_and_tells_the_workers(farm: Farm, chain: RuleChain) -> None:
    suspend(chain)
    before = farm.version()
    answer = farm.client.post(f"{url(chain)}/enable")
    assert (answer.json()["enabled"], answer.json()["suspendedAt"], answer.json()["version"]) == (True, None, 2)
    assert farm.version() > before
    assert failures_in_a_row(chain) == 0
    alarm = Alarm.objects.get()
    assert (alarm.state, alarm.cleared_by) == ("cleared", "olga")


@pytest.mark.usefixtures("empty_redis")
def test_disabling_ends_a_suspension_too_and_both_can_be_repeated(farm: Farm, chain: RuleChain) -> None:
    suspend(chain)
    for verb, enabled in (("disable", False), ("disable", False), ("enable", True), ("enable", True)):
        answer = farm.client.post(f"{url(chain)}/{verb}")
        assert (answer.status_code, answer.json()["enabled"], answer.json()["suspendedAt"]) == (200, enabled, None)
    assert Alarm.objects.get().state == "cleared"


@pytest.mark.usefixtures("empty_redis")
def test_a_suspension_outlives_a_new_name_and_ends_with_new_nodes(farm: Farm, chain: RuleChain) -> None:
    suspend(chain)
    assert farm.client.patch(url(chain), {"name": "Base"}).json()["suspendedAt"] is not None
    assert farm.client.patch(url(chain), {"enabled": True}).json()["suspendedAt"] is not None
    assert Alarm.objects.get().state == "active"
    assert farm.client.patch(url(chain, "low"), {"config": builders.leaf(farm.sensor, value=5)}).status_code == 200
    assert farm.client.get(url(chain)).json()["suspendedAt"] is None
    assert (failures_in_a_row(chain), Alarm.objects.get().cleared_by) == (0, "olga")


def test_a_suspended_chain_that_broke_is_not_enabled(farm: Farm, chain: RuleChain) -> None:
    RuleChain.objects.filter(pk=chain.pk).update(suspended_at=datetime(2026, 5, 1, tzinfo=UTC))
    farm.sensor.delete()
    assert paths(farm.client.post(f"{url(chain)}/enable")) == ["nodes[0].config.UUID"]
    assert farm.client.post(f"{url(chain)}/disable").status_code == 200


def test_a_scheduled_chain_without_a_filter_stays_one_that_something_triggers(farm: Farm) -> None:
    schedule = {"executionType": "schedule-only", "cron": "0 6 * * *"}
    created = farm.client.post(f"{API}/rule-chains", farm.body(farm.switch(), **schedule))
    assert created.status_code == 201
    change = {"executionType": "event-triggered", "cron": ""}
    assert paths(farm.client.patch(f"{API}/rule-chains/{created.json()['uuid']}", change)) == ["nodes"]


def test_a_copy_has_a_name_of_its_own_and_is_switched_off(farm: Farm, chain: RuleChain) -> None:
    chain.nodes.filter(name="switch").update(on_failure="low")
    chain.nodes.filter(name="low").update(next="")
    names = [farm.client.post(f"{url(chain)}/duplicate", {}).json()["name"] for _ in range(2)]
    assert names == ["Acid (copy)", "Acid (copy 2)"]
    answer = farm.client.post(f"{url(chain)}/duplicate", {"name": "Base"})
    assert answer.status_code == 201
    assert (answer.json()["enabled"], answer.json()["version"]) == (False, 1)
    copy = RuleChain.objects.get(name="Base")
    assert links(copy) == links(chain)
    assert copy.nodes.get(name="switch").on_failure == "low"
    assert not {node.uuid for node in copy.nodes.all()} & {node.uuid for node in chain.nodes.all()}
    again = farm.client.post(f"{url(chain)}/duplicate", {"name": "Base"})
    assert (again.status_code, list(wrong(again))) == (400, ["name"])


def test_a_name_of_full_length_is_shortened_for_its_copy(farm: Farm) -> None:
    chain = builders.switching_chain(farm.sensor, farm.device, name="a" * 200)
    name = farm.client.post(f"{url(chain)}/duplicate", {}).json()["name"]
    assert (len(name), name[-8:]) == (200, "a (copy)")


def test_a_chain_is_judged_on_demand(farm: Farm, chain: RuleChain) -> None:
    answer = farm.client.get(f"{url(chain)}/validate").json()
    assert answer["validationErrors"] == []
    assert [warning["path"] for warning in answer["validationWarnings"]] == ["nodes[0].config.key"]
    chain.nodes.filter(name="switch").update(next="low")
    answer = farm.client.get(f"{url(chain)}/validate").json()
    assert [problem["path"] for problem in answer["validationErrors"]] == ["nodes[1].next"]
    assert answer["validationWarnings"] == []


def test_answers_to_a_change_hold_a_sentence_and_warnings(farm: Farm) -> None:
    created = farm.client.post(f"{API}/rule-chains", farm.body(farm.low(), farm.switch())).json()
    assert created["sentence"] == f"When {farm.sensor} ph is below 5.5, set {farm.device} power to on."
    (warning,) = created["validationWarnings"]
    assert (warning["path"], warning["value"]) == ("nodes[0].config.key", "ph")
    assert "has never reported" in warning["message"]


@pytest.mark.usefixtures("empty_redis")
def test_triggering_puts_an_urgent_event_of_the_chain_into_the_journal(farm: Farm, chain: RuleChain) -> None:
    answer = farm.client.post(f"{url(chain)}/trigger")
    assert answer.status_code == 202
    assert list(answer.json()) == ["eventId"]
    assert ledger.counts().depth["critical"] == 1
    farm.client.post(f"{url(chain)}/disable")
    answer = farm.client.post(f"{url(chain)}/trigger")
    assert answer.status_code == 409
    assert "switched off" in answer.json()["detail"]
    RuleChain.objects.update(enabled=True, suspended_at=datetime(2026, 5, 1, tzinfo=UTC))
    answer = farm.client.post(f"{url(chain)}/trigger")
    assert answer.status_code == 409
    assert "suspended" in answer.json()["detail"]
    assert ledger.counts().depth["critical"] == 1


@pytest.mark.usefixtures("empty_redis")
def test_a_queue_that_is_away_refuses_a_trigger_as_it_refuses_telemetry(
    farm: Farm, chain: RuleChain, settings: Any
) -> None:
    settings.REDIS_PORT = free_port()
    per_process.forget_all()
    answer = farm.client.post(f"{url(chain)}/trigger")
    assert answer.status_code == 503
    told = answer.json()
    assert (told["code"], told["accepted"], told["reason"]) == ("enqueue-error", 0, "enqueue-error")
    assert answer.headers["Retry-After"] == str(told["retryAfter"])


# What is wrong with nodes


def test_all_problems_of_a_chain_are_told_at_once_with_path_value_and_message(farm: Farm) -> None:
    nodes = [
        farm.low(
            config={
                "type": "AND",
                "expressions": [builders.leaf(farm.sensor), builders.leaf(farm.sensor, operator="~")],
            }
        ),
        farm.switch(config=builders.command(farm.device, "dimmed"), next="nowhere"),
        farm.low(name="stranger", config=builders.leaf(farm.sensor) | {"UUID": NOWHERE}, next=None),
    ]
    answer = farm.client.post(f"{API}/rule-chains", farm.body(*nodes))
    assert answer.status_code == 400
    told = {error["field"]: error for error in problem(answer)["errors"]}
    assert told.keys() == {
        "nodes",
        "nodes[1].next",
        "nodes[0].config.expressions[1].operator",
        "nodes[1].config.value",
        "nodes[2].config.UUID",
    }
    assert told["nodes[1].next"]["value"] == "nowhere"
    assert told["nodes[1].config.value"]["value"] == "dimmed"
    assert told["nodes[2].config.UUID"]["value"] == NOWHERE
    assert told["nodes"]["value"] == 2
    assert not RuleChain.objects.exists()


@pytest.mark.parametrize(
    ("change", "path", "complaint"),
    [
        ({"name": "switch"}, "nodes[1].name", "is the name of an earlier node"),
        ({"name": " low"}, "nodes[0].name", "without blanks"),
        ({"name": ""}, "nodes[0].name", "may not be blank"),
        ({"name": "x" * 101}, "nodes[0].name", "no more than 100 characters"),
        ({"name": None}, "nodes[0].name", "may not be null"),
        ({"type": "filtre"}, "nodes[0].type", "must be one of filter, transform, action"),
        ({"type": "action"}, "nodes[0].config.type", "is required"),
        ({"next": "low"}, "nodes[0].next", "closes a cycle"),
        ({"next": 7}, "nodes[0].next", "Must be a text."),
        ({"next": ["low"]}, "nodes[0].next", "Not a valid string."),
        ({"onFalse": "nowhere"}, "nodes[0].onFalse", "names no node"),
        ({"nxt": "switch"}, "nodes[0].nxt", "There is no such field"),
        ({"config": "ph < 5"}, "nodes[0].config", "must be an object"),
        ({"config": None}, "nodes[0].config", "may not be null"),
        ({"config": {}}, "nodes[0].config.UUID", "is required"),
        ({"config": {"type": "AND", "expressions": []}}, "nodes[0].config.expressions", "non-empty list"),
    ],
)
def test_a_node_that_is_wrong_is_told_with_its_path(
    farm: Farm, change: dict[str, Any], path: str, complaint: str
) -> None:
    answer = farm.client.post(f"{API}/rule-chains", farm.body(farm.low(**change), farm.switch()))
    assert answer.status_code == 400
    told = wrong(answer)
    assert complaint in told[path], told
    assert not RuleChain.objects.exists()


@pytest.mark.parametrize(
    ("change", "path", "complaint"),
    [
        ({"UUID": "not-a-uuid"}, "nodes[0].config.UUID", "must be a version 4 UUID"),
        ({"UUID": NOWHERE, "sourceType": "device"}, "nodes[0].config.UUID", "is no device of this organization"),
        ({"sourceType": "senser"}, "nodes[0].config.sourceType", "must be one of sensor, device"),
        ({"key": "hp"}, "nodes[0].config.key", "is no variable of this sensor; it has ph"),
        ({"operater": "<"}, "nodes[0].config.operater", "unknown key"),
        ({"value": "low"}, "nodes[0].config.value", "must be a number"),
        ({"value": [1, 2]}, "nodes[0].config.value", "must be a number"),
    ],
)
def test_a_filter_that_is_wrong_is_told_with_its_path(
    farm: Farm, change: dict[str, Any], path: str, complaint: str
) -> None:
    node = farm.low(config=builders.leaf(farm.sensor) | change)
    answer = farm.client.post(f"{API}/rule-chains", farm.body(node, farm.switch()))
    told = wrong(answer)
    assert complaint in told[path], told


@pytest.mark.parametrize(
    ("change", "path", "complaint"),
    [
        ({"deviceUuid": NOWHERE}, "nodes[1].config.deviceUuid", "is no device of this organization"),
        ({"deviceUuid": 7}, "nodes[1].config.deviceUuid", "must be a version 4 UUID"),
        ({"stateName": "colour"}, "nodes[1].config.stateName", "is no state of this device; it has power"),
        ({"value": 1}, "nodes[1].config.value", "must be a string, not a number"),
        ({"value": {"deep": 1}}, "nodes[1].config.value", "must be a finite number, text, true or false"),
        ({"valueFrom": "ph"}, "nodes[1].config.valueFrom", "excludes value"),
    ],
)
def test_an_action_that_is_wrong_is_told_with_its_path(
    farm: Farm, change: dict[str, Any], path: str, complaint: str
) -> None:
    node = farm.switch(config=builders.command(farm.device) | change)
    answer = farm.client.post(f"{API}/rule-chains", farm.body(farm.low(), node))
    told = wrong(answer)
    assert complaint in told[path], told
    assert len(told) == len(problem(answer)["errors"])


def test_sensors_devices_and_states_of_another_organization_do_not_exist(farm: Farm) -> None:
    other = builders.organization()
    sensor, device = builders.sensor(other), builders.device(other)
    Membership.objects.create(user=farm.operator, organization=other, role="operator")
    nodes = [farm.low(config=builders.leaf(sensor)), farm.switch(config=builders.command(device))]
    answer = farm.client.post(f"{API}/rule-chains", farm.body(*nodes))
    assert paths(answer) == ["nodes[0].config.UUID", "nodes[1].config.deviceUuid"]


def test_fields_of_the_chain_and_of_its_nodes_are_told_together(farm: Farm) -> None:
    answer = farm.client.post(f"{API}/rule-chains", farm.body(farm.low(nxt="x"), {"name": "b"}) | {"name": ""})
    assert wrong(answer).keys() == {"name", "nodes[0].nxt", "nodes[1].type", "nodes[1].config"}


@pytest.mark.parametrize("nodes", ["low", {"name": "low"}, ["low"], []])
def test_nodes_that_are_no_list_of_nodes_are_refused(farm: Farm, nodes: Any) -> None:
    answer = farm.client.post(f"{API}/rule-chains", farm.body() | {"nodes": nodes})
    assert all(path.startswith("nodes") for path in paths(answer))


def test_upper_case_uuids_and_devices_as_sources_are_accepted(farm: Farm) -> None:
    leaf = builders.leaf(farm.device, key="power", operator="==", value="off")
    node = farm.low(config=leaf | {"UUID": leaf["UUID"].upper()})
    assert farm.client.post(f"{API}/rule-chains", farm.body(node, farm.switch())).status_code == 201


def test_a_filter_may_read_what_a_transform_of_the_chain_makes(farm: Farm) -> None:
    transform = {"operation": "multiply", "key": "ph", "value": 10, "target": "ph10"}
    nodes = [
        {"name": "times", "type": "transform", "config": transform, "next": "low"},
        farm.low(config=builders.leaf(farm.sensor, key="ph10", value=55)),
        farm.switch(),
    ]
    assert farm.client.post(f"{API}/rule-chains", farm.body(*nodes)).status_code == 201


def test_a_chain_of_too_many_nodes_is_refused_unread(farm: Farm, django_assert_max_num_queries: Any) -> None:
    nodes = [farm.low(name=f"n{number}", next=None) for number in range(chains.MAX_STEPS + 1)]
    with django_assert_max_num_queries(10):
        answer = farm.client.post(f"{API}/rule-chains", farm.body(*nodes))
    (error,) = problem(answer)["errors"]
    assert (error["field"], error["value"]) == ("nodes", 1001)


def test_a_chain_is_checked_in_a_few_queries_however_many_sensors_it_reads(
    farm: Farm, django_assert_max_num_queries: Any
) -> None:
    sensors = [builders.sensor(farm.organization) for _ in range(10)]
    group = {"type": "OR", "expressions": [builders.leaf(sensor) for sensor in sensors]}
    with django_assert_max_num_queries(28):
        assert (
            farm.client.post(f"{API}/rule-chains", farm.body(farm.low(config=group), farm.switch())).status_code == 201
        )


def test_a_configuration_that_no_database_can_hold_is_refused(farm: Farm) -> None:
    node = builders.node("low", builders.leaf(farm.sensor, operator="==", value="a\x00b"))
    problems = validation.problems_of(RuleChain(organization=farm.organization), [node])
    assert [str(problem.message) for problem in problems] == ["holds a NUL character"]


def test_a_chain_that_lost_its_sensor_can_be_renamed_and_switched_off_but_not_on(farm: Farm, chain: RuleChain) -> None:
    farm.sensor.delete()
    assert farm.client.patch(url(chain), {"name": "Orphan"}).status_code == 200
    assert farm.client.patch(url(chain), {"enabled": False}).status_code == 200
    assert paths(farm.client.patch(url(chain), {"enabled": True})) == ["nodes[0].config.UUID"]
    chain.refresh_from_db()
    assert (chain.name, chain.enabled, chain.version) == ("Orphan", False, 3)


def test_saving_a_broken_chain_changes_nothing(farm: Farm, chain: RuleChain) -> None:
    before, version = links(chain), farm.version()
    chain.name = "Broken"
    with pytest.raises(InvalidChain):
        editing.save(chain, [builders.node("low", builders.leaf(farm.sensor), next="nowhere")])
    chain.refresh_from_db()
    assert (chain.name, chain.version, links(chain), farm.version()) == ("Acid", 1, before, version)


def test_chains_are_listed_and_filtered(farm: Farm, chain: RuleChain) -> None:
    builders.switching_chain(
        farm.sensor, farm.device, name="Night", enabled=False, execution_type="hybrid", cron="0 6 * * *", priority=1
    )

    def names(**filters: Any) -> list[str]:
        return [row["name"] for row in farm.client.get(f"{API}/rule-chains", filters).json()["results"]]

    assert names() == ["Night", "Acid"]
    assert names(enabled=True) == ["Acid"]
    assert names(executionType="hybrid") == ["Night"]
    assert names(name="ACI") == ["Acid"]
    assert names(organization=farm.organization.uuid) == ["Night", "Acid"]


# Nodes of a chain


def test_a_new_node_goes_to_the_end_of_the_main_line(farm: Farm, chain: RuleChain) -> None:
    answer = farm.client.post(
        f"{url(chain)}/nodes", farm.switch(name="then", config=builders.command(farm.device, "off"))
    )
    assert answer.status_code == 201
    assert answer.json().keys() == {"uuid", "name", "type", "config", "next", "onFalse", "onFailure"}
    assert links(chain) == {"low": ("switch", ""), "switch": ("then", ""), "then": ("", "")}
    chain.refresh_from_db()
    assert chain.version == 2


def test_a_new_node_is_put_after_the_one_named(farm: Farm, chain: RuleChain) -> None:
    before = farm.version()
    node = farm.low(name="sure", next=None, previous="low")
    assert farm.client.post(f"{url(chain)}/nodes", node).json()["next"] == "switch"
    assert links(chain) == {"low": ("sure", ""), "sure": ("switch", ""), "switch": ("", "")}
    assert [row["name"] for row in farm.client.get(f"{url(chain)}/nodes").json()["results"]] == [
        "low",
        "sure",
        "switch",
    ]
    assert farm.version() == before + 1


def test_a_node_is_changed_and_links_follow_its_new_name(farm: Farm, chain: RuleChain) -> None:
    answer = farm.client.patch(url(chain, "switch"), {"name": "act", "config": builders.command(farm.device, "off")})
    assert (answer.status_code, answer.json()["name"]) == (200, "act")
    assert links(chain) == {"low": ("act", ""), "act": ("", "")}
    body = farm.client.get(url(chain, "act")).json()
    assert farm.client.put(url(chain, "act"), body).status_code == 200


def test_a_deleted_node_leaves_a_link_to_what_followed_it(farm: Farm, chain: RuleChain) -> None:
    farm.client.post(f"{url(chain)}/nodes", farm.low(name="sure", next=None, previous="low"))
    assert farm.client.delete(url(chain, "sure")).status_code == 204
    assert links(chain) == {"low": ("switch", ""), "switch": ("", "")}


def test_a_deleted_node_is_left_out_of_false_branches_too(farm: Farm, chain: RuleChain) -> None:
    nodes = [
        farm.low(onFalse="off"),
        farm.switch(),
        farm.switch(name="off", config=builders.command(farm.device, "off"), next="end"),
        farm.switch(name="end"),
    ]
    assert farm.client.patch(url(chain), {"nodes": nodes}).status_code == 200
    assert farm.client.delete(url(chain, "off")).status_code == 204
    assert links(chain)["low"] == ("switch", "end")


@pytest.mark.parametrize(
    ("method", "node", "body", "path"),
    [
        ("post", "", {"name": "x", "type": "filter", "config": {}}, "nodes[2].config.UUID"),
        ("post", "", {"name": "low", "type": "action", "config": {"type": "device_command"}}, "nodes[2].name"),
        ("post", "", {"name": "x", "type": "action", "config": {}, "previous": "nowhere"}, "previous"),
        ("patch", "switch", {"next": "low"}, "nodes[1].next"),
        ("patch", "switch", {"name": "low"}, "nodes[1].name"),
        ("patch", "low", {"type": "action"}, "nodes[0].config.type"),
        ("put", "low", {"name": "low", "type": "filter", "config": {}}, "nodes[0].config.UUID"),
        ("delete", "low", None, "nodes"),
    ],
)
def test_a_change_of_a_node_that_breaks_the_chain_changes_nothing(
    farm: Farm, chain: RuleChain, method: str, node: str, body: Any, path: str
) -> None:
    before, version = links(chain), farm.version()
    target = url(chain, node) if node else f"{url(chain)}/nodes"
    assert path in paths(getattr(farm.client, method)(target, body))
    chain.refresh_from_db()
    assert (chain.version, links(chain), farm.version()) == (1, before, version)


@pytest.mark.parametrize("body", [{"nam": "x"}, {"name": ""}, {"uuid": NOWHERE}])
def test_a_field_of_a_node_that_is_wrong_is_named(farm: Farm, chain: RuleChain, body: dict[str, Any]) -> None:
    answer = farm.client.patch(url(chain, "low"), body)
    assert (answer.status_code, wrong(answer).keys()) == (400, body.keys())


def test_a_node_is_found_under_its_own_chain_only(farm: Farm, chain: RuleChain) -> None:
    other = builders.switching_chain(farm.sensor, farm.device)
    wrong = f"{url(other)}/nodes/{chain.nodes.get(name='low').uuid}"
    assert [farm.client.get(wrong).status_code, farm.client.patch(wrong, {}).status_code] == [404, 404]
    assert farm.client.delete(wrong).status_code == 404
    assert farm.client.get(f"{API}/rule-chains/{NOWHERE}/nodes").status_code == 404


def test_the_end_of_the_main_line_is_found_in_a_chain_that_stands_in_any_order() -> None:
    nodes = [
        RuleNode(name="c"),
        RuleNode(name="a", next="b", on_false="d"),
        RuleNode(name="d"),
        RuleNode(name="b", next="c"),
    ]
    assert [node.name for node in editing.insert(nodes, RuleNode(name="new"), after=None)] == [
        "c",
        "new",
        "a",
        "d",
        "b",
    ]
    assert nodes[0].next == "new"
    assert [node.name for node in editing.insert([], RuleNode(name="new"), after=None)] == ["new"]


@pytest.mark.django_db(transaction=True)
def test_changes_of_one_chain_that_cross_all_happen(farm: Farm, chain: RuleChain) -> None:
    if connection.vendor == "sqlite":
        pytest.skip("the test database of SQLite is in memory, where threads do not wait for one another")

    def add(number: int) -> int:
        try:
            node = farm.switch(name=f"n{number}")
            status: int = farm.client.post(f"{url(chain)}/nodes", node).status_code
            return status
        finally:
            connection.close()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(add, range(8))) == [201] * 8
    chain.refresh_from_db()
    assert (chain.version, chain.nodes.count()) == (9, 10)
    assert validation.problems_of(chain, list(chain.nodes.all())) == []


def test_a_cycle_does_not_keep_the_end_of_the_main_line_from_being_found() -> None:
    nodes = [RuleNode(name="a", next="b"), RuleNode(name="b", next="a")]
    assert len(editing.insert(nodes, RuleNode(name="new"), after=None)) == 3


def test_a_link_that_is_taken_after_a_failure_follows_its_node(farm: Farm) -> None:
    nodes = [
        builders.node("low", builders.leaf(farm.sensor), next="switch"),
        builders.node("switch", builders.command(farm.device), on_failure="off"),
        builders.node("off", builders.command(farm.device, "off"), next="end"),
        builders.node("end", builders.command(farm.device, "off")),
    ]
    chain = builders.chain(farm.organization, nodes)
    assert farm.client.get(url(chain, "switch")).json()["onFailure"] == "off"
    assert farm.client.patch(url(chain, "off"), {"name": "stop"}).status_code == 200
    assert chain.nodes.get(name="switch").on_failure == "stop"
    assert farm.client.delete(url(chain, "stop")).status_code == 204
    assert chain.nodes.get(name="switch").on_failure == "end"
    answer = farm.client.patch(url(chain, "low"), {"onFailure": "end"})
    assert paths(answer) == ["nodes[0].onFailure"]


# Switching by hand


@pytest.mark.usefixtures("empty_redis")
def test_a_person_switches_a_device_and_everybody_is_told(farm: Farm) -> None:
    body = {"deviceUuid": str(farm.device.uuid), "stateName": "power", "value": "on"}
    first = farm.client.post(f"{API}/device-state-instances", body)
    assert first.status_code == 201
    assert first.json().keys() == {"uuid", "device", "stateName", "value", "previous", "timestamp"}
    answer = farm.client.post(f"{API}/device-state-instances", body | {"value": "off"}).json()
    assert (answer["device"], answer["stateName"], answer["value"], answer["previous"]) == (
        str(farm.device.uuid), "power", "off", "on",
    )  # fmt: skip
    assert DeviceState.objects.get().value == "off"
    change = StateChange.objects.get(uuid=answer["uuid"])
    assert (change.source, change.actor) == ("person", "olga")
    assert Notification.objects.filter(device=farm.device, event="device-state-change").count() == 2
    entries = redis.client().xrange(keys.NOTIFICATIONS)
    told = [messages.decode(fields[b"m"]).payload["value"] for _, fields in entries]
    assert told == ["on", "off"]


@pytest.mark.parametrize(
    ("change", "field", "complaint"),
    [
        ({"value": "dimmed"}, "value", "power must be one of"),
        ({"value": 1}, "value", "must be a string, not a number"),
        ({"value": {"a": []}}, "value", "must be a string, not an object"),
        ({"stateName": "colour"}, "stateName", "has no such state; it has: power."),
        ({"deviceUuid": NOWHERE}, "deviceUuid", "There is none with the uuid"),
        ({"deviceUuid": "pump"}, "deviceUuid", "Must be a valid UUID."),
        ({"devceUuid": "pump"}, "devceUuid", "There is no such field"),
    ],
)
def test_a_switch_that_cannot_be_is_refused_by_field(
    farm: Farm, change: dict[str, Any], field: str, complaint: str
) -> None:
    body = {"deviceUuid": str(farm.device.uuid), "stateName": "power", "value": "on"} | change
    answer = farm.client.post(f"{API}/device-state-instances", body)
    assert list(wrong(answer)) == [field]
    assert complaint in wrong(answer)[field]
    assert not StateChange.objects.exists()


def test_switching_needs_the_role_in_the_device_s_own_organization(farm: Farm) -> None:
    other = builders.organization()
    Membership.objects.create(user=farm.operator, organization=other, role="viewer")
    seen, foreign = builders.device(other), builders.device(builders.organization())
    statuses = [
        farm.client.post(
            f"{API}/device-state-instances", {"deviceUuid": str(device.uuid), "stateName": "power", "value": "on"}
        ).status_code
        for device in (seen, foreign)
    ]
    assert statuses == [403, 400]


# Rejected events and dead letters


def test_rejected_events_are_listed_newest_first_and_filtered(farm: Farm) -> None:
    for hour, reason in enumerate(("circuit-open", "bad-payload")):
        RejectedEvent.objects.create(
            organization=farm.organization,
            protocol="mqtt",
            originator_uuid=str(farm.sensor.uuid),
            reason=reason,
            payload='{"values": {}}',
            received_at=datetime(2026, 5, 1, hour, tzinfo=UTC),
        )

    def reasons(**filters: Any) -> list[str]:
        return [row["reason"] for row in farm.client.get(f"{API}/rejected-events", filters).json()["results"]]

    assert reasons() == ["bad-payload", "circuit-open"]
    assert reasons(reason="circuit-open") == ["circuit-open"]
    assert reasons(protocol="coap") == []
    assert reasons(originator=farm.sensor.uuid, **{"from": "2026-05-01T01:00:00Z"}) == ["bad-payload"]
    assert reasons(to="2026-05-01T00:30:00Z") == ["circuit-open"]


def test_dead_letters_are_listed_and_filtered_without_their_tracebacks(farm: Farm, chain: RuleChain) -> None:
    for number in range(2):
        DeadLetter.objects.create(
            failure_key=str(number),
            event_id=uuid4(),
            organization=farm.organization,
            lane="normal",
            originator_uuid=farm.sensor.uuid,
            event={"values": {"ph": 6.1}},
            error="division by zero",
            chain=chain if number else None,
            attempts=4,
            traceback="secret.py",
        )
    rows = farm.client.get(f"{API}/dead-letters").json()["results"]
    assert [row["chain"] for row in rows] == [str(chain.uuid), None]
    assert rows[0]["event"] == {"values": {"ph": 6.1}}
    assert "traceback" not in rows[0]
    (found,) = farm.client.get(f"{API}/dead-letters", {"event": rows[1]["eventId"]}).json()["results"]
    assert found["uuid"] == rows[1]["uuid"]
    assert farm.client.get(f"{API}/dead-letters", {"chain": chain.uuid, "lane": "normal"}).json()["count"] == 1


@pytest.mark.parametrize("levels", [200, 900, 10_000])
@pytest.mark.parametrize("path", ["rule-chains", "rule-chains/import", "rule-chains/execute"])
def test_a_body_of_hopelessly_many_levels_is_refused_and_not_followed(farm: Farm, path: str, levels: int) -> None:
    deep = '{"type":"AND","expressions":[' * levels + "]}" * levels
    body = f'{{"document": {deep}, "nodes": [{{"config": {deep}}}]}}'
    answer = farm.client.post(f"{API}/{path}", body, content_type="application/json")
    assert answer.status_code == 400
    assert "nested too deeply" in answer.json()["detail"]
