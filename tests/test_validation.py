"""What may be saved runs, and what runs may be saved: the verdicts on save and on load agree."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.django import TestCase

from devices import catalogue
from devices.models import Device, Organization, Sensor
from rules.authoring import editing, validation
from rules.engine.exceptions import InvalidChain
from rules.models import RuleChain, RuleNode
from rules.processing.index import RuleIndex
from tests import builders

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
RIGHT: list[dict[str, Any]] = [{}] * 3


def configs(sensor: str, device: str) -> st.SearchStrategy[dict[str, Any]]:
    """Filters, transforms and actions, each right, or changed so that it may be wrong."""
    leaf = {"sourceType": "sensor", "UUID": sensor, "key": "ph", "operator": ">", "value": 6.5}
    state = {"sourceType": "device", "UUID": device, "key": "power", "operator": "==", "value": "on"}
    command = {"type": "device_command", "deviceUuid": device, "stateName": "power", "value": "on"}
    add = {"operation": "add", "key": "ph", "value": 1}
    changes = [
        *RIGHT, {"for": "5m"}, {"off": 6}, {"off": 7}, {"operator": "between", "value": [1, 2]}, {"operator": "~"},
        {"unknown": 1},        {"operator": "olderThan", "duration": "10m"}, {"UUID": device},
        {"key": ""}, {"key": "x"}, {"value": None}, {"for": "x"},
    ]  # fmt: skip
    leaves = st.builds(lambda one, change: one | change, st.sampled_from([leaf, state]), st.sampled_from(changes))
    groups = st.builds(
        lambda kind, parts: {"type": kind, "expressions": parts},
        st.sampled_from(["AND", "OR", "XOR"]),
        st.lists(leaves, max_size=2),
    )
    wrong = [
        *RIGHT,
        {"value": "dimmed"},
        {"stateName": "colour"},
        {"deviceUuid": sensor},
        {"type": "x"},
        {"valueFrom": "ph"},
    ]
    commands = st.sampled_from(wrong).map(lambda change: command | change)
    transforms = st.sampled_from([*RIGHT, {"operation": "divide", "value": 0}, {"target": "x"}, {"key": ""}])
    return st.one_of(leaves, groups, commands, transforms.map(lambda change: add | change))


def _type_of(config: dict[str, Any]) -> str:
    return (
        "transform" if config.get("operation") in ("add", "divide") else "action" if "stateName" in config else "filter"
    )


@st.composite
def nodes_of(draw: st.DrawFn, sensor: str, device: str) -> list[RuleNode]:
    """One to three nodes, each mostly followed by the next."""
    names = ["a", "b", "c"][: draw(st.integers(1, 3))]
    nodes = []
    for name, following in zip(names, [*names[1:], ""], strict=True):
        config = draw(configs(sensor, device))
        links = draw(st.sampled_from([{}, {}, {}, {"on_false": following}, {"on_failure": following}, {"next": "a"}]))
        nodes.append(RuleNode(**{"name": name, "type": _type_of(config), "config": config, "next": following} | links))
    return nodes


class VerdictsTest(TestCase):
    """A class, because Hypothesis needs one to undo what each example did to the database."""

    organization: Organization
    sensor: Sensor
    device: Device

    @classmethod
    def setUpTestData(cls) -> None:
        cls.organization = builders.organization()
        cls.sensor = builders.sensor(cls.organization)
        cls.device = builders.device(cls.organization)

    def loaded(self, chain: RuleChain) -> bool:
        index = RuleIndex()
        index.refresh(at_once=True)
        return index.by_uuid(str(chain.uuid)) is not None

    @UNTIMED
    @given(st.data(), st.sampled_from(RuleChain.ExecutionType.values))
    def test_the_index_takes_exactly_what_saving_takes(self, data: st.DataObject, execution_type: str) -> None:
        nodes = data.draw(nodes_of(str(self.sensor.uuid), str(self.device.uuid)))
        cron = "" if execution_type == "event-triggered" else "0 6 * * *"
        chain = RuleChain(organization=self.organization, name="x", execution_type=execution_type, cron=cron)
        problems = validation.problems_of(chain, nodes)
        if problems:
            with pytest.raises(InvalidChain):
                editing.save(chain, nodes)
            assert not RuleChain.objects.exists()
            self.force(chain, nodes)
            # What only the database knows, such as a sensor that is gone, does not keep a chain from running.
            assert self.loaded(chain) is not bool(validation.compile_problems(chain, nodes))
        else:
            editing.save(chain, nodes)
            assert self.loaded(chain)

    def force(self, chain: RuleChain, nodes: list[RuleNode]) -> None:
        """Past the judge."""
        chain.version = 1
        chain.save()
        editing._replace_nodes(chain, nodes)
        catalogue.mark_changed(chain.organization_id)


@pytest.mark.django_db
def test_the_verdicts_are_compared_on_valid_chains_and_on_others() -> None:
    farm = builders.organization()
    sensor, device = builders.sensor(farm), builders.device(farm)
    chain = RuleChain(organization=farm, name="x")
    found = []

    @UNTIMED
    @given(nodes_of(str(sensor.uuid), str(device.uuid)))
    def look(nodes: list[RuleNode]) -> None:
        found.append(not validation.problems_of(chain, nodes))

    look()
    assert found.count(True) >= 5
    assert found.count(False) >= 5
