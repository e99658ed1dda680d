"""Rule chains in words and as graphs, without a database."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rules.authoring import graph
from rules.authoring.sentences import ACTIONS as TOLD_ACTIONS
from rules.authoring.sentences import MAXIMUM_NODES, TRANSFORMS, ChainDescriber
from rules.engine.actions import ACTIONS
from rules.engine.chains import NodeSpec
from rules.engine.transforms import OPERATIONS

SENSOR = "0b7e9d52-6a3c-4f0e-9d1b-2c5a8f4e7d10"
PUMP = "e3a90b6d-58c2-47f1-b0d4-6f9e1c3a7b25"
TELLER = ChainDescriber({("sensor", SENSOR): "Reservoir A", ("device", PUMP): "Doser"})


def leaf(operator: str = ">", value: object = 6.5, **more: object) -> dict[str, object]:
    return {"sourceType": "sensor", "UUID": SENSOR, "key": "pH", "operator": operator, "value": value, **more}


def command(value: object = "on", **more: object) -> dict[str, object]:
    return {"type": "device_command", "deviceUuid": PUMP, "stateName": "power", "value": value, **more}


def group(kind: str, *parts: object) -> dict[str, object]:
    return {"type": kind, "expressions": list(parts)}


def node(name: str, config: Any, **links: str) -> NodeSpec:
    kind = "transform" if "operation" in config else "action" if config.get("type") in TOLD_ACTIONS else "filter"
    return NodeSpec(name=name, type=kind, config=config, **links)


def test_a_chain_is_one_sentence_with_names_and_both_branches() -> None:
    nodes = [
        node("high", leaf(**{"for": "5m"}), next="dose", on_false="stop"),
        node("dose", command(cooldown="10m")),
        node("stop", command("off")),
    ]
    assert TELLER.chain(nodes) == (
        "When Reservoir A pH is above 6.5 for 5 m, set Doser power to on, at most once in 10 m; "
        "otherwise set Doser power to off."
    )


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (leaf("between", [5.5, 6.5]), "Reservoir A pH is between 5.5 and 6.5"),
        (leaf("==", True), "Reservoir A pH is true"),
        (leaf("in", ["a", "b"]), "Reservoir A pH is one of a, b"),
        (leaf("olderThan", duration="10m"), "Reservoir A pH was not reported for 10 m"),
        (leaf(">", 6.5, releaseAt=6.2), "Reservoir A pH is above 6.5 (until it is beyond 6.2)"),
        (leaf("<", 20, times=3, within="10m"), "Reservoir A pH is below 20 at least 3 times within 10 m"),
        (leaf("<", -0.5, per="1m"), "the change of Reservoir A pH in 1 m is below -0.5"),
        (
            group("AND", leaf(), group("OR", leaf("<", 1), leaf("==", 2))),
            "Reservoir A pH is above 6.5 and (Reservoir A pH is below 1 or Reservoir A pH is 2)",
        ),
        (leaf(UUID="7c1f4a88-31de-4b6a-8e55-9a0b3c2d1e4f"), "sensor 7c1f4a88 pH is above 6.5"),
        (leaf("~"), "Reservoir A pH ~ 6.5"),
        (leaf("{value.__class__}"), "Reservoir A pH {value.__class__} 6.5"),
        ({"operation": "multiply", "key": "t", "value": 1.8, "target": "f"}, "take t times 1.8 as f"),
        ({"operation": "scale", "key": "t", "factor": 2}, "take t times 2, plus 0"),
        ({"operation": "rename", "key": "t", "target": "f"}, "call t f"),
        (command(valueFrom="x", force=True), "set Doser power to the value of x, also when it is so already"),
        ({"type": "notify", "title": "Leak", "severity": "critical"}, "notify people “Leak” (critical)"),
        ({"type": "raise_alarm", "alarm": "pH too high"}, "raise the alarm “pH too high”"),
        ({"type": "clear_alarm", "alarm": "pH too high"}, "clear the alarm “pH too high”"),
    ],
)
def test_each_kind_of_node_has_its_words(config: dict[str, Any], text: str) -> None:
    assert TELLER.node(node("n", config)) == text


def test_filters_that_follow_one_another_are_one_condition() -> None:
    nodes = [
        node("a", group("OR", leaf(), leaf("<", 1)), next="b"),
        node("b", leaf("<", 9), next="act"),
        node("act", command()),
    ]
    assert TELLER.chain(nodes) == (
        "When (Reservoir A pH is above 6.5 or Reservoir A pH is below 1) and Reservoir A pH is below 9, set Doser power to on."
    )


def test_branches_that_meet_are_told_once_and_failures_in_brackets() -> None:
    nodes = [
        node("a", leaf(), next="on", on_false="tell"),
        node("on", command(), on_failure="tell"),
        node("tell", {"type": "notify", "title": "Look"}),
    ]
    assert TELLER.chain(nodes) == (
        "When Reservoir A pH is above 6.5, set Doser power to on (if that fails: notify people “Look”); "
        "otherwise continue with “tell”."
    )


def test_every_transform_and_action_has_words() -> None:
    assert OPERATIONS.keys() <= TRANSFORMS.keys()
    assert ACTIONS.keys() <= TOLD_ACTIONS.keys()


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(st.characters(exclude_categories=["C"]), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "expressions", "operator", "value", "operation", "key", "for", "per", "title"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
NODES = st.lists(
    st.builds(
        NodeSpec,
        name=st.sampled_from("abcde"),
        type=st.sampled_from(["filter", "transform", "action", "<b>"]),
        config=JSON,  # what is stored may be anything
        next=st.none() | st.sampled_from("abcdef"),
        on_false=st.none() | st.sampled_from("abcdef"),
        on_failure=st.none() | st.sampled_from("abcdef"),
    ),
    max_size=7,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
@given(NODES)
def test_whatever_is_stored_can_be_told_and_drawn(nodes: list[NodeSpec]) -> None:
    assert TELLER.chain(nodes).endswith((".", "…")) or not nodes
    drawn = graph.svg(nodes, {each.name: TELLER.node(each) for each in nodes}, title="<&>")
    found = ET.fromstring(drawn)
    assert len(found.findall(".//rect")) == len({each.name for each in nodes})


def test_of_a_very_long_chain_the_beginning_is_told_and_nothing_drawn() -> None:
    nodes = [node(f"n{index}", command(), next=f"n{index + 1}") for index in range(1_000)]
    assert TELLER.chain(nodes).count("set Doser") <= MAXIMUM_NODES
    assert "1000 nodes are too many" in graph.svg(nodes, {}, title="Long")


def test_a_graph_names_its_links_and_can_be_read_without_being_seen() -> None:
    nodes = [
        node("high", leaf(), next="dose", on_false="stop"),
        node("dose", command(), next="stop", on_failure="stop"),
        node("stop", command("off")),
    ]
    drawn = ET.fromstring(graph.svg(nodes, {each.name: TELLER.node(each) for each in nodes}, title="Graph of <Acid>"))
    assert drawn.findtext("title") == "Graph of <Acid>"
    described = drawn.findtext("desc") or ""
    assert "high (filter): Reservoir A pH is above 6.5; yes: dose, no: stop" in described
    labels = sorted(text.text or "" for text in drawn.iter("text") if text.get("class") == "label")
    assert labels == ["if it fails", "no", "then", "yes"]


def test_no_link_runs_behind_a_node_that_it_passes() -> None:
    """The row that it passes has a place of no width for it, outside of every box."""
    nodes = [
        node("a", leaf(), next="b", on_false="d"),
        node("b", command(), next="c"),
        node("c", command(), next="d"),
        node("d", command()),
    ]
    by_name = {each.name: each for each in nodes}
    rows, routes = graph._rows(by_name, str)
    boxes = graph._placed(rows, routes, {name: ["x"] for name in by_name})
    passing = {item: box for item, box in boxes.items() if not isinstance(item, str)}
    assert len(passing) == 2
    for place in passing.values():
        beside = [box for item, box in boxes.items() if isinstance(item, str) and box.y == place.y]
        assert beside
        assert not any(box.x <= place.x <= box.x + box.width for box in beside)
