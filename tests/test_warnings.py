"""Warnings: what looks wrong with a chain that may be saved, and what does not."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from django.utils import timezone

from devices.models import Device, DeviceState, Organization, Reading, Sensor, Variable
from rules.authoring import lint
from rules.models import RuleChain, RuleNode
from tests import builders

pytestmark = pytest.mark.django_db
NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


class Farm:
    """A sensor that has reported its pH, and a pump that was switched once."""

    def __init__(self) -> None:
        self.organization: Organization = builders.organization()
        self.sensor: Sensor = builders.sensor(
            self.organization, variables={"ph": "number", "ec": "number", "mode": "string"}
        )
        self.pump: Device = builders.device(self.organization)
        for variable in Variable.objects.filter(sensor=self.sensor).exclude(name="ec"):
            Reading.objects.create(variable=variable, timestamp=NOON, number=6)
        DeviceState.objects.update(changed_at=NOON)

    def leaf(self, operator: str, value: Any, key: str = "ph") -> dict[str, Any]:
        return builders.leaf(self.sensor, key, operator, value)

    def all_of(self, *parts: dict[str, Any]) -> dict[str, Any]:
        return {"type": "AND", "expressions": list(parts)}

    def warned(self, *nodes: RuleNode, **fields: Any) -> list[tuple[str, str]]:
        chain = builders.chain(self.organization, nodes, **fields)
        return self.of(chain)

    def of(self, chain: RuleChain) -> list[tuple[str, str]]:
        return [(each.path, each.message) for each in lint.warnings_of(chain, list(chain.nodes.all()))]

    def switching(self, config: dict[str, Any], value: str, name: str, **fields: Any) -> RuleChain:
        nodes = [builders.node("when", config, next="act"), builders.node("act", builders.command(self.pump, value))]
        return builders.chain(self.organization, nodes, name, **fields)


@pytest.fixture
def farm() -> Farm:
    return Farm()


def test_an_ordinary_chain_has_none(farm: Farm) -> None:
    assert farm.of(farm.switching(farm.leaf(">", 6.5), "on", "Dose")) == []


def test_bounds_that_contradict_one_another_are_told_where_they_do(farm: Farm) -> None:
    config = farm.all_of(
        farm.leaf("==", "day", "mode"), farm.leaf(">", 7), {"type": "OR", "expressions": [farm.leaf("<", 6)]}
    )
    ((path, text),) = farm.warned(builders.node("f", config))
    assert path == "nodes[0].config.expressions[2]"
    assert "never be true together with the conditions before it" in text


def test_a_contradiction_deep_inside_is_told_once(farm: Farm) -> None:
    deep = farm.all_of(farm.leaf("between", [6, 7]), farm.leaf("==", 5))
    config = farm.all_of(farm.leaf("!=", "x", "mode"), deep)
    assert [path for path, _ in farm.warned(builders.node("f", config))] == [
        "nodes[0].config.expressions[1].expressions[1]"
    ]


def test_a_node_behind_filters_that_contradict_one_another_is_never_reached(farm: Farm) -> None:
    nodes = [
        builders.node("high", farm.leaf(">", 7), next="low"),
        builders.node("low", farm.leaf("<", 6), next="act", on_false="fine"),
        builders.node("act", builders.command(farm.pump)),
        builders.node("fine", builders.command(farm.pump, "off")),
    ]
    assert farm.warned(*nodes) == [("nodes[2]", "is never reached: the filters before it contradict it")]


def test_a_false_branch_that_cannot_be_taken_is_told(farm: Farm) -> None:
    nodes = [
        builders.node("high", farm.leaf(">", 7), next="higher"),
        builders.node("higher", farm.leaf(">", 6), on_false="never"),
        builders.node("never", builders.command(farm.pump)),
    ]
    assert [path for path, _ in farm.warned(*nodes)] == ["nodes[2]"]


def test_what_a_transform_makes_is_not_taken_for_what_was_measured(farm: Farm) -> None:
    nodes = [
        builders.node("high", farm.leaf(">", 7), next="less"),
        builders.node("less", {"operation": "subtract", "key": "ph", "value": 5}, next="low"),
        builders.node("low", farm.leaf("<", 6), next="act"),
        builders.node("act", builders.command(farm.pump)),
    ]
    assert farm.warned(*nodes) == []


def test_a_variable_and_a_state_without_a_value_are_named(farm: Farm) -> None:
    DeviceState.objects.update(changed_at=None)
    config = farm.all_of(farm.leaf(">", 1, "ec"), builders.leaf(farm.pump, "power", "==", "on"))
    told = farm.warned(builders.node("f", config))
    assert [path for path, _ in told] == ["nodes[0].config.expressions[0].key", "nodes[0].config.expressions[1].key"]
    assert "variable that has no value yet" in told[0][1]
    assert "state that has no value yet" in told[1][1]


@pytest.mark.parametrize("moment", ["changed_at", "reported_at"])
def test_a_state_that_somebody_set_or_the_device_reported_has_a_value(farm: Farm, moment: str) -> None:
    DeviceState.objects.update(**{"changed_at": None, "reported_at": None, moment: timezone.now()})

    assert farm.warned(builders.node("f", builders.leaf(farm.pump, "power", "==", "on"))) == []


def test_a_comparison_of_the_wrong_kind_is_told(farm: Farm) -> None:
    config = farm.all_of(farm.leaf(">", 1, "mode"), farm.leaf("==", "6", "ph"))
    told = farm.warned(builders.node("f", config))
    assert [path for path, _ in told] == [
        "nodes[0].config.expressions[0].value",
        "nodes[0].config.expressions[1].value",
    ]
    assert all("this is never true" in text for _, text in told)


def test_two_chains_that_may_set_one_state_differently_are_named_to_each_other(farm: Farm) -> None:
    first = farm.switching(farm.leaf(">", 6.5), "on", "Dose")
    second = farm.switching(farm.leaf("<", 7), "off", "Stop")
    told = (
        "nodes[1].config.value",
        "may be set at the same time to something else: by the chain 'Stop' (node 'act') to 'off'",
    )
    assert farm.of(first) == [told]
    assert [path for path, _ in farm.of(second)] == ["nodes[1].config.value"]


def test_who_looks_at_all_chains_reads_the_others_once_and_finds_the_same(
    farm: Farm, django_assert_num_queries: Any
) -> None:
    found = [
        farm.switching(farm.leaf(">", 6.5), "on", "Dose"),
        farm.switching(farm.leaf("<", 7), "off", "Stop"),
        farm.switching(farm.leaf("<", 6), "on", "Low"),
    ]
    farm.switching(farm.leaf("<", 9), "off", "Off", enabled=False)
    everyone = lint.OrganizationWriters(farm.organization.pk)
    for chain in found:
        nodes = list(chain.nodes.all())
        alone = lint.warnings_of(chain, nodes)
        with django_assert_num_queries(2):  # its variables, and the interlocks of what it commands
            assert lint.warnings_of(chain, nodes, rivals=everyone) == alone
        assert len(alone) == 1


@pytest.mark.parametrize(
    ("condition", "value", "fields"),
    [
        (("<=", 6.5), "off", {}),  # never both
        (("<", 7), "on", {}),  # to the same value
        (("<", 7), "off", {"enabled": False}),
    ],
)
def test_chains_that_cannot_quarrel_are_left_in_peace(farm: Farm, condition: Any, value: str, fields: Any) -> None:
    first = farm.switching(farm.leaf(">", 6.5), "on", "Dose")
    second = farm.switching(farm.leaf(*condition), value, "Other", **fields)
    assert (farm.of(first), farm.of(second)) == ([], [])


def test_chains_of_other_organizations_and_devices_do_not_count(farm: Farm) -> None:
    first = farm.switching(farm.leaf(">", 6.5), "on", "Dose")
    other = Farm()
    other.switching(other.leaf("<", 7), "off", "Stop")
    nodes = [
        builders.node("when", farm.leaf("<", 7), next="act"),
        builders.node("act", builders.command(builders.device(farm.organization), "off")),
    ]
    builders.chain(farm.organization, nodes)
    assert farm.of(first) == []


def test_a_uuid_in_upper_case_is_the_same_device(farm: Farm) -> None:
    first = farm.switching(farm.leaf(">", 6.5), "on", "Dose")
    command = builders.command(farm.pump, "off") | {"deviceUuid": str(farm.pump.uuid).upper()}
    nodes = [builders.node("when", farm.leaf("<", 7), next="act"), builders.node("act", command)]
    builders.chain(farm.organization, nodes, "Stop")
    assert len(farm.of(first)) == 1


def test_a_state_that_one_run_sets_twice_is_told(farm: Farm) -> None:
    nodes = [
        builders.node("high", farm.leaf(">", 7), next="on"),
        builders.node("on", builders.command(farm.pump), next="off"),
        builders.node("off", builders.command(farm.pump, "off")),
    ]
    ((path, text),) = farm.warned(*nodes)
    assert (path, text) == (
        "nodes[1].config.value",
        "is set again in the same run, to another value, by the node 'off'",
    )


def test_the_two_branches_of_a_filter_do_not_quarrel(farm: Farm) -> None:
    nodes = [
        builders.node("high", farm.leaf(">", 7), next="on", on_false="off"),
        builders.node("on", builders.command(farm.pump)),
        builders.node("off", builders.command(farm.pump, "off")),
    ]
    assert farm.warned(*nodes) == []


def test_warnings_cost_the_same_few_queries_however_much_a_chain_reads(
    farm: Farm, django_assert_max_num_queries: Any
) -> None:
    sensors = [builders.sensor(farm.organization) for _ in range(50)]
    config = {"type": "OR", "expressions": [builders.leaf(sensor) for sensor in sensors]}
    chain = farm.switching(config, "on", "Many")
    with django_assert_max_num_queries(6):
        warned = farm.of(chain)
    assert len([text for _, text in warned if "no value yet" in text]) == 50


OLD = "may be of any age"


def test_a_chain_that_moves_an_actuator_on_a_value_of_any_age_is_told(farm: Farm) -> None:
    scheduled = {"execution_type": RuleChain.ExecutionType.SCHEDULE_ONLY, "cron": "0 6 * * *"}
    (told,) = farm.of(farm.switching(farm.leaf(">", 6.5), "on", "By the clock", **scheduled))
    assert told[0] == "nodes[0].config.key"
    assert OLD in told[1]
    two = farm.all_of(farm.leaf(">", 6.5), farm.leaf("==", "day", "mode"))
    assert [OLD in text for _, text in farm.of(farm.switching(two, "on", "Two"))] == [True, True]
    fresh = {**farm.leaf("newerThan", None), "duration": "10m"}
    fresh.pop("value")
    asked = farm.all_of(farm.leaf(">", 6.5), fresh)
    assert farm.of(farm.switching(asked, "on", "Asked", **scheduled)) == []
    Variable.objects.update(maximum_age_seconds=600)
    assert farm.of(farm.switching(two, "on", "Two again")) == []


def test_a_chain_that_only_tells_people_may_look_at_what_is_old(farm: Farm) -> None:
    two = farm.all_of(farm.leaf(">", 6.5), farm.leaf("==", "day", "mode"))
    nodes = [builders.node("when", two, next="tell"), builders.node("tell", {"type": "raise_alarm", "alarm": "high"})]
    assert farm.warned(*nodes) == []
