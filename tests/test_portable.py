"""Rule chains as documents: out of one organization, into another."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from rest_framework.test import APIClient

from devices.models import Device, Membership, Organization, Sensor
from rules.models import RuleChain
from tests import builders
from tests.problems import problem, wrong

pytestmark = pytest.mark.django_db
API = "/api/v1/rule-chains"


@dataclass
class Farm:
    organization: Organization
    sensor: Sensor
    pump: Device
    client: Any

    def imported(self, document: Any, **more: Any) -> Any:
        body = {"organization": str(self.organization.uuid), "document": document, **more}
        return self.client.post(f"{API}/import", body)


def make_farm() -> Farm:
    organization = builders.organization()
    client = APIClient()
    client.force_authenticate(builders.member(organization, "operator"))
    return Farm(
        organization, builders.sensor(organization, "Reservoir A"), builders.device(organization, "Doser"), client
    )


@pytest.fixture
def farm() -> Farm:
    return make_farm()


def chain_of(farm: Farm) -> RuleChain:
    nodes = [
        builders.node("high", {"type": "AND", "expressions": [builders.leaf(farm.sensor)]}, next="on", on_false="off"),
        builders.node("on", builders.command(farm.pump), on_failure="off"),
        builders.node("off", builders.command(farm.pump, "off")),
    ]
    fields = {"execution_type": "hybrid", "cron": "0 6 * * *", "timezone": "Europe/Berlin", "missed_runs": "skip"}
    return builders.chain(farm.organization, nodes, "Acid", priority=2, max_retries=7, **fields)


def exported(farm: Farm) -> Any:
    return json.loads(json.dumps(farm.client.get(f"{API}/{chain_of(farm).uuid}/export").json()))


def test_a_document_holds_everything_but_what_is_of_its_place(farm: Farm) -> None:
    document = exported(farm)
    assert (document["format"], document["version"]) == ("aemos-rule-chain", 1)
    chain = document["chain"]
    assert {key: value for key, value in chain.items() if key != "nodes"} == {
        "name": "Acid", "executionType": "hybrid", "cron": "0 6 * * *", "timezone": "Europe/Berlin", "missedRuns": "skip",
        "priority": 2, "maxRetries": 7, "lateEvents": "history",
    }  # fmt: skip
    assert [set(node) for node in chain["nodes"]] == [
        {"name", "type", "config", "next", "onFalse"}, {"name", "type", "config", "onFailure"}, {"name", "type", "config"},
    ]  # fmt: skip
    assert document["sources"] == [
        {"sourceType": "device", "UUID": str(farm.pump.uuid), "name": "Doser"},
        {"sourceType": "sensor", "UUID": str(farm.sensor.uuid), "name": "Reservoir A"},
    ]


def test_what_is_imported_is_the_same_chain_switched_off(farm: Farm) -> None:
    document = exported(farm)
    assert wrong(farm.imported(document)).keys() == {"name"}
    answer = farm.imported(document, name="Acid again")
    assert answer.status_code == 201
    assert (answer.json()["enabled"], answer.json()["nextRunAt"]) == (False, None)
    again = farm.client.get(f"{API}/{answer.json()['uuid']}/export").json()
    assert again == document | {"chain": document["chain"] | {"name": "Acid again"}}


def test_a_uuid_that_the_organization_lacks_is_a_problem_at_each_place(farm: Farm) -> None:
    other = make_farm()
    answer = other.imported(exported(farm))
    assert answer.status_code == 400
    told = {error["field"]: error for error in problem(answer)["errors"]}
    assert list(told) == [
        "nodes[0].config.expressions[0].UUID",
        "nodes[1].config.deviceUuid",
        "nodes[2].config.deviceUuid",
    ]
    first = told["nodes[0].config.expressions[0].UUID"]
    assert first["value"] == str(farm.sensor.uuid)
    assert "'Reservoir A'" in first["detail"]
    assert not RuleChain.objects.filter(organization=other.organization).exists()


def test_a_mapping_puts_ones_own_in_their_place(farm: Farm) -> None:
    other = make_farm()
    mapping = {str(farm.sensor.uuid).upper(): str(other.sensor.uuid), str(farm.pump.uuid): str(other.pump.uuid)}
    answer = other.imported(exported(farm), mapping=mapping)
    assert answer.status_code == 201, answer.json()
    assert answer.json()["sentence"].startswith(
        "At the times 0 6 * * * (Europe/Berlin), and with every value reported: when "
    )
    nodes = answer.json()["nodes"]
    assert nodes[0]["config"]["expressions"][0]["UUID"] == str(other.sensor.uuid)
    assert [node["config"]["deviceUuid"] for node in nodes[1:]] == [str(other.pump.uuid)] * 2


NOWHERE = "8b0e8f1c-6f0e-4a35-9f3f-2f1c8a1d7f10"


@pytest.mark.parametrize(
    ("change", "more", "path"),
    [
        ({"format": "node-red"}, {}, "document.format"),
        ({"version": 2}, {}, "document.version"),
        ({"version": True}, {}, "document.version"),
        ({"chain": []}, {}, "document.chain"),
        ({"chian": 1}, {}, "document.chian"),
        ({}, {"mapping": {NOWHERE: NOWHERE}}, f"mapping.{NOWHERE}"),
        ({}, {"mapping": {"a": NOWHERE}}, "mapping.a"),
        ({}, {"mapping": {NOWHERE: "b"}}, f"mapping.{NOWHERE}"),
    ],
)
def test_an_envelope_that_is_wrong_is_told_by_path(farm: Farm, change: Any, more: Any, path: str) -> None:
    answer = farm.imported(exported(farm) | change, **more)
    assert answer.status_code == 400
    assert list(wrong(answer)) == [path]


@pytest.mark.parametrize("document", [None, [], "text", 7])
def test_what_is_no_document_is_refused(farm: Farm, document: Any) -> None:
    assert farm.imported(document).status_code == 400


def test_fields_of_the_chain_and_of_its_nodes_are_told_together(farm: Farm) -> None:
    document = exported(farm)
    document["chain"] |= {"name": "New", "cron": "0 6 * *", "enabeld": True}
    document["chain"]["nodes"][0]["next"] = "nowhere"
    assert "enabeld" in wrong(farm.imported(document))
    del document["chain"]["enabeld"]
    found = wrong(farm.imported(document))
    assert "five fields" in found["cron"]
    assert "nodes[0].next" in found


def test_importing_takes_the_role_in_that_organization(farm: Farm) -> None:
    other = make_farm()
    document = exported(farm)
    person = farm.client.handler._force_user
    assert (
        farm.client.post(
            f"{API}/import", {"organization": str(other.organization.uuid), "document": document}
        ).status_code
        == 400
    )
    Membership.objects.create(user=person, organization=other.organization, role="viewer")
    answer = farm.client.post(f"{API}/import", {"organization": str(other.organization.uuid), "document": document})
    assert answer.status_code == 403
    assert "viewer" in answer.json()["detail"]
