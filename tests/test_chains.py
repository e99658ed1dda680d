"""Chains: which graphs are accepted, what a run reads and changes, and what effects it has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rules.engine import chains
from rules.engine.actions import ACTIONS, Command
from rules.engine.chains import MAX_REFERENCES, MAX_STEPS, Chain, ChainSpec, NodeSpec, Outcome
from rules.engine.context import Trigger
from rules.engine.effect_types import DeviceCommand
from rules.engine.exceptions import ChainFailed, InvalidChain, Problem, RuleError
from rules.engine.values import Reference, Sample, Value

ROOT = Path(__file__).parents[1]
CHAIN = "5f2d8c1a-94b7-4e3f-a6d0-1b8c7e9f2a34"
SENSOR = "0b7e9d52-6a3c-4f0e-9d1b-2c5a8f4e7d10"
OTHER = "7c1f4a88-31de-4b6a-8e55-9a0b3c2d1e4f"
PUMP = "e3a90b6d-58c2-47f1-b0d4-6f9e1c3a7b25"
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
NOON_US = 1_750_000_000_000_000


def leaf(key: str = "temperature", operator: str = ">", value: object = 30, uuid: str = SENSOR) -> dict[str, object]:
    return {"sourceType": "sensor", "UUID": uuid, "key": key, "operator": operator, "value": value}


def scale(**changes: object) -> dict[str, object]:
    return {"operation": "multiply", "key": "temperature", "value": 1.8, **changes}


def command(**changes: object) -> dict[str, object]:
    return {"type": "device_command", "deviceUuid": PUMP, "stateName": "power", "value": "on", **changes}


def command_from(key: str, **changes: object) -> dict[str, object]:
    return {"type": "device_command", "deviceUuid": PUMP, "stateName": "power", "valueFrom": key, **changes}


HOT, SCALE, PUMP_ON = leaf(), scale(), command()


def filter_node(name: str = "hot", config: object = HOT, **links: str | None) -> NodeSpec:
    return NodeSpec(name=name, type="filter", config=as_config(config), **links)


def transform_node(name: str = "scale", config: object = SCALE, **links: str | None) -> NodeSpec:
    return NodeSpec(name=name, type="transform", config=as_config(config), **links)


def action_node(name: str = "pump", config: object = PUMP_ON, **links: str | None) -> NodeSpec:
    return NodeSpec(name=name, type="action", config=as_config(config), **links)


def as_config(config: object) -> Any:
    """Pass anything as a config, as a JSON column would."""
    return config


def compiled(*nodes: NodeSpec) -> Chain:
    return chains.compile(ChainSpec(uuid=CHAIN, version=1, nodes=nodes))


def problems_of(*nodes: NodeSpec) -> tuple[Problem, ...]:
    with pytest.raises(InvalidChain) as raised:
        compiled(*nodes)
    return raised.value.problems


def paths_of(*nodes: NodeSpec) -> list[str]:
    return [problem.path for problem in problems_of(*nodes)]


def compiled_or_refused(*nodes: NodeSpec) -> Chain | InvalidChain:
    try:
        return compiled(*nodes)
    except InvalidChain as refusal:
        return refusal


def run(
    chain: Chain,
    values: Mapping[str, Value],
    latest: Mapping[Reference, Sample] | None = None,
    *,
    uuid: str = SENSOR,
    source_type: str = "sensor",
) -> Outcome:
    return chain.run(
        Trigger(
            event_id="event-1",
            source_type=source_type,
            uuid=uuid,
            values=values,
            timestamp_us=NOON_US,
            lookup=(latest or {}).get,
        )
    )


def effect(node: str = "pump", value: Value = "on") -> DeviceCommand:
    return DeviceCommand(
        effect_key=f"event-1:{CHAIN}:{node}",
        chain_uuid=CHAIN,
        node=node,
        device_uuid=PUMP,
        state_name="power",
        value=value,
        timestamp_us=NOON_US,
    )


def values_set(outcome: Outcome) -> list[Value]:
    """What the commands of a run would set states to."""
    return [done.value for done in outcome.effects if isinstance(done, DeviceCommand)]


def test_a_filter_that_holds_leads_to_the_action() -> None:
    chain = compiled(filter_node(next="pump"), action_node())

    outcome = run(chain, {"temperature": 31})

    assert outcome == Outcome(effects=(effect(),), missing=(), stopped_at=None, steps=2, filters_true=1)


def test_a_filter_that_does_not_hold_stops_the_chain_and_is_named() -> None:
    chain = compiled(filter_node(next="pump"), action_node())

    outcome = run(chain, {"temperature": 30})

    assert outcome == Outcome(effects=(), missing=(), stopped_at="hot", steps=1, filters_false=1)


def test_a_filter_that_does_not_hold_goes_to_the_node_for_false() -> None:
    chain = compiled(
        filter_node(next="pump", on_false="rest"), action_node(), action_node("rest", command(value="off"))
    )

    outcome = run(chain, {"temperature": 20})

    off = effect("rest", "off")
    assert outcome == Outcome(effects=(off,), missing=(), stopped_at=None, steps=2, filters_false=1)


def test_both_ways_of_a_filter_may_meet_again() -> None:
    chain = compiled(
        filter_node(next="scale", on_false="pump"),
        transform_node(next="pump"),
        action_node(config=command_from("temperature")),
    )

    assert run(chain, {"temperature": 20}).effects == (effect(value=20),)
    assert run(chain, {"temperature": 50}).effects == (effect(value=90.0),)


def test_every_action_on_the_way_has_its_effect_in_order() -> None:
    chain = compiled(filter_node(next="a"), action_node("a", next="b"), action_node("b", command(value=False)))

    assert run(chain, {"temperature": 31}).effects == (effect("a"), effect("b", False))


def test_the_order_in_which_nodes_are_listed_means_nothing() -> None:
    chain = compiled(action_node(), filter_node(next="scale"), transform_node(next="pump"))

    assert run(chain, {"temperature": 31}).steps == 3


def test_a_chain_without_an_action_is_valid_and_has_no_effects() -> None:
    assert run(compiled(filter_node()), {"temperature": 31}).effects == ()


def test_the_same_event_gives_the_same_effects_however_often_it_runs() -> None:
    chain = compiled(
        filter_node(next="scale"), transform_node(next="pump"), action_node(config=command_from("temperature"))
    )
    again = compiled(*chain.spec.nodes)

    outcomes = [run(chain, {"temperature": 31}), run(chain, {"temperature": 31}), run(again, {"temperature": 31})]

    assert outcomes == [outcomes[0]] * 3
    assert outcomes[0].effects[0].effect_key == f"event-1:{CHAIN}:pump"


def test_the_event_wins_over_the_latest_known_value_of_its_own_originator() -> None:
    chain = compiled(filter_node(next="pump"), action_node())
    stored = {Reference("sensor", SENSOR, "temperature"): Sample(10, NOON_US + 1)}

    assert run(chain, {"temperature": 31}, stored).effects == (effect(),)


def test_a_null_in_the_event_is_missing_and_is_not_replaced_by_an_older_value() -> None:
    chain = compiled(filter_node(next="pump"), action_node())
    temperature = Reference("sensor", SENSOR, "temperature")

    outcome = run(chain, {"temperature": None}, {temperature: Sample(31, NOON_US)})

    assert outcome == Outcome(effects=(), missing=(temperature,), stopped_at="hot", steps=1, filters_false=1)


def test_another_key_of_the_originator_and_other_sources_come_from_the_lookup() -> None:
    both = {"type": "AND", "expressions": [leaf("level", "<", 10), leaf(uuid=OTHER)]}
    chain = compiled(filter_node(config=both, next="pump"), action_node())
    latest = {
        Reference("sensor", SENSOR, "level"): Sample(5, NOON_US),
        Reference("sensor", OTHER, "temperature"): Sample(31, NOON_US),
    }

    assert run(chain, {"temperature": 0}, latest).effects == (effect(),)


def test_a_device_is_not_taken_for_the_sensor_with_the_same_uuid() -> None:
    chain = compiled(filter_node(next="pump"), action_node())

    assert run(chain, {"temperature": 31}, source_type="device").missing == (
        Reference("sensor", SENSOR, "temperature"),
    )


def test_what_is_missing_along_the_way_is_named_once() -> None:
    either = {"type": "OR", "expressions": [leaf("level", "<", 10), leaf("level", ">", 90), leaf()]}
    chain = compiled(filter_node(config=either, next="dark"), filter_node("dark", leaf("light", "<", 1)))

    outcome = run(chain, {"temperature": 31})

    assert outcome.missing == (Reference("sensor", SENSOR, "level"), Reference("sensor", SENSOR, "light"))
    assert outcome.stopped_at == "dark"


def test_a_chain_is_triggered_by_what_all_its_filters_read() -> None:
    chain = compiled(
        filter_node(next="dark", on_false="dry"),
        filter_node("dark", leaf("light", uuid=OTHER)),
        filter_node("dry", leaf("level")),
    )

    assert chain.references == {
        Reference("sensor", SENSOR, "temperature"),
        Reference("sensor", OTHER, "light"),
        Reference("sensor", SENSOR, "level"),
    }


def test_a_filter_on_a_derived_key_is_triggered_by_what_the_key_is_derived_from() -> None:
    chain = compiled(
        transform_node("times", scale(target="product"), next="plus"),
        transform_node("plus", {"operation": "add", "key": "product", "value": 32, "target": "fahrenheit"}, next="hot"),
        filter_node(config=leaf("fahrenheit", ">", 86), next="pump"),
        action_node(config=command_from("fahrenheit")),
    )

    assert Reference("sensor", SENSOR, "temperature") in chain.references
    assert Reference("sensor", SENSOR, "fahrenheit") in chain.references
    assert run(chain, {"temperature": 50}).effects == (effect(value=122.0),)


def test_a_transform_after_the_filter_adds_no_trigger() -> None:
    chain = compiled(
        filter_node(config=leaf("fahrenheit"), next="scale"), transform_node(config=scale(target="fahrenheit"))
    )

    assert chain.references == {Reference("sensor", SENSOR, "fahrenheit")}


@pytest.mark.parametrize(
    ("operation", "operand", "value", "expected"),
    [
        ("add", 0.5, 20, 20.5),
        ("add", 1, 2**60, 2**60 + 1),
        ("subtract", 5, 20, 15),
        ("multiply", 1.8, 20, 36.0),
        ("multiply", 3, 2**60, 3 * 2**60),
        ("divide", 4, 10, 2.5),
        ("divide", -0.5, 10, -20.0),
    ],
)
def test_a_transform_computes_with_the_event_value(
    operation: str, operand: float, value: float, expected: float
) -> None:
    chain = compiled(
        filter_node(config=leaf("temperature", "!=", 0), next="scale"),
        transform_node(config=scale(operation=operation, value=operand), next="pump"),
        action_node(config=command_from("temperature")),
    )

    (done,) = values_set(run(chain, {"temperature": value}))

    assert (done, type(done)) == (expected, type(expected))


def test_a_target_leaves_the_key_it_is_computed_from_as_it_was() -> None:
    chain = compiled(
        filter_node(next="scale"),
        transform_node(config=scale(target="product"), next="before"),
        action_node("before", command_from("temperature"), next="after"),
        action_node("after", command_from("product")),
    )

    assert values_set(run(chain, {"temperature": 50})) == [50, 90.0]


def test_later_filters_see_what_a_transform_made() -> None:
    chain = compiled(
        filter_node(next="scale"), transform_node(next="very"), filter_node("very", leaf("temperature", ">", 89))
    )

    assert run(chain, {"temperature": 50}).stopped_at is None
    assert run(chain, {"temperature": 49}).stopped_at == "very"


def test_a_transform_is_invisible_outside_the_run() -> None:
    chain = compiled(filter_node(next="scale"), transform_node())
    values: dict[str, Value] = {"temperature": 50}

    run(chain, values)

    assert values == {"temperature": 50}


def test_a_transform_does_not_touch_another_source_with_the_same_key() -> None:
    chain = compiled(
        filter_node(config=leaf("temperature", "<", 100), next="scale"),
        transform_node(next="other"),
        filter_node("other", leaf("temperature", "==", 7, OTHER)),
    )

    assert run(chain, {"temperature": 50}, {Reference("sensor", OTHER, "temperature"): Sample(7, 1)}).stopped_at is None


@pytest.mark.parametrize(
    ("config", "value", "cause"),
    [
        (scale(key="humidity"), 31, "the event has no value for 'humidity'"),
        (scale(), None, "the event has no value for 'temperature'"),
        (scale(), "31", "the value of 'temperature' is not a number"),
        (scale(), True, "the value of 'temperature' is not a number"),
        (scale(), float("nan"), "the value of 'temperature' is not a finite number"),
        (scale(), float("inf"), "the value of 'temperature' is not a finite number"),
        (scale(), 10**400, "the value of 'temperature' is not a finite number"),
        (scale(), 1.7e308, "multiply on 'temperature' gives a result too large for a number"),
        (scale(value=10**300), 10**300, "multiply on 'temperature' gives a result too large for a number"),
        (scale(operation="divide", value=5e-324), 1, "divide on 'temperature' gives a result too large for a number"),
    ],
)
def test_a_transform_that_cannot_compute_fails_the_run_and_says_where_and_why(
    config: object, value: Value, cause: str
) -> None:
    chain = compiled(
        filter_node(config=leaf("ph"), next="pump"), action_node(next="scale"), transform_node(config=config)
    )

    with pytest.raises(ChainFailed) as raised:
        run(chain, {"ph": 31, "temperature": value})

    assert (raised.value.chain_uuid, raised.value.node, raised.value.cause) == (CHAIN, "scale", cause)
    assert str(raised.value) == f"chain {CHAIN}, node 'scale': {cause}"
    assert isinstance(raised.value, RuleError)


@pytest.mark.parametrize(
    ("config", "paths"),
    [
        (scale(operation="divide", value=0), ["value"]),
        (scale(operation="divide", value=-0.0), ["value"]),
        (scale(operation="power"), ["operation"]),
        (scale(operation=["add"]), ["operation"]),
        (scale(value="1.8"), ["value"]),
        (scale(value=True), ["value"]),
        (scale(value=float("inf")), ["value"]),
        (scale(value=10**400), ["value"]),
        (scale(key=""), ["key"]),
        (scale(target=None), ["target"]),
        (scale(tarket="x"), ["tarket"]),
        ({}, ["operation", "key", "value"]),
        (None, [""]),
        ([], [""]),
    ],
)
def test_a_malformed_transform_is_refused_where_it_is_malformed(config: object, paths: list[str]) -> None:
    expected = [f"nodes[1].config.{path}".rstrip(".") for path in paths]

    assert paths_of(filter_node(next="scale"), transform_node(config=config)) == expected


@pytest.mark.parametrize("value", ["on", "", 1, 0.5, 0, True, False])
def test_a_device_command_sets_a_fixed_value(value: Value) -> None:
    chain = compiled(filter_node(next="pump"), action_node(config=command(value=value)))

    assert run(chain, {"temperature": 31}).effects == (effect(value=value),)


@pytest.mark.parametrize("value", ["boost", 40, 40.5, 0, True, False])
def test_a_device_command_takes_a_value_from_the_event(value: Value) -> None:
    chain = compiled(filter_node(next="pump"), action_node(config=command_from("mode")))

    assert run(chain, {"temperature": 31, "mode": value}).effects == (effect(value=value),)


@pytest.mark.parametrize("values", [{}, {"mode": None}])
def test_a_value_that_the_event_does_not_have_fails_the_run(values: dict[str, Value]) -> None:
    chain = compiled(filter_node(next="pump"), action_node(config=command_from("mode")))

    with pytest.raises(ChainFailed, match="node 'pump': the event has no value for 'mode'"):
        run(chain, {"temperature": 31, **values})


def test_a_chain_lists_what_its_actions_address() -> None:
    chain = compiled(
        filter_node(next="a"),
        action_node("a", command(deviceUuid=PUMP.upper()), next="b"),
        action_node("b", command_from("mode", stateName="speed")),
    )

    assert chain.commands == (
        Command("nodes[1].config", PUMP, "power", "on"),
        Command("nodes[2].config", PUMP, "speed", None),
    )


@pytest.mark.parametrize(
    ("config", "paths"),
    [
        (command(deviceUuid="abc"), ["deviceUuid"]),
        (command(stateName=" "), ["stateName"]),
        (command(value=None), ["value"]),
        (command(value=["on"]), ["value"]),
        (command(value=float("nan")), ["value"]),
        (command(value="o\x00n"), ["value"]),
        (command(valueFrom="mode"), ["valueFrom"]),
        (command_from(""), ["valueFrom"]),
        (command(device="x"), ["device"]),
        (command(type="send_email"), ["type"]),
        (command(type=[]), ["type"]),
        ({"type": "device_command"}, ["deviceUuid", "stateName", "value"]),
        ({}, ["type"]),
        ("on", [""]),
    ],
)
def test_a_malformed_action_is_refused_where_it_is_malformed(config: object, paths: list[str]) -> None:
    expected = [f"nodes[1].config.{path}".rstrip(".") for path in paths]

    assert paths_of(filter_node(next="pump"), action_node(config=config)) == expected


def test_a_chain_that_nothing_can_trigger_is_refused() -> None:
    assert problems_of(action_node()) == (Problem("nodes", 1, "must have a filter, or nothing can trigger the chain"),)
    assert paths_of() == ["nodes"]


def test_a_schedule_runs_no_chain_without_a_node() -> None:
    with pytest.raises(InvalidChain) as raised:
        chains.compile(ChainSpec(uuid=CHAIN, version=1, nodes=(), is_scheduled=True))
    assert [problem.path for problem in raised.value.problems] == ["nodes"]


def test_a_link_to_a_node_that_does_not_exist_is_refused() -> None:
    assert problems_of(filter_node(next="pmup", on_false="")) == (
        Problem("nodes[0].next", "pmup", "names no node of this chain"),
        Problem("nodes[0].onFalse", "", "names no node of this chain"),
    )


def test_two_starts_are_refused_and_named() -> None:
    assert problems_of(filter_node("a", next="c"), filter_node("b", next="c"), action_node("c")) == (
        Problem("nodes", 2, "must have one start, but no other node points to 2 nodes: a, b"),
    )


def test_a_cycle_without_a_start_is_refused_and_spelled_out() -> None:
    problems = problems_of(filter_node("a", next="b"), transform_node("b", next="c"), filter_node("c", next="a"))

    assert problems == (Problem("nodes[2].next", "a", "closes a cycle of 3 nodes: a -> b -> c -> a"),)


def test_a_cycle_behind_a_start_is_refused() -> None:
    problems = problems_of(filter_node("a", next="b"), filter_node("b", next="c"), filter_node("c", on_false="b"))

    assert problems == (Problem("nodes[2].onFalse", "b", "closes a cycle of 2 nodes: b -> c -> b"),)


def test_a_cycle_apart_from_the_start_is_refused() -> None:
    assert paths_of(filter_node("a"), filter_node("b", next="c"), filter_node("c", next="b")) == ["nodes[2].next"]


def test_a_node_that_leads_to_itself_is_refused_and_counts_as_a_start() -> None:
    assert problems_of(filter_node("a", next="a"), filter_node("b")) == (
        Problem("nodes[0].next", "a", "closes a cycle of 1 node: a -> a"),
        Problem("nodes", 2, "must have one start, but no other node points to 2 nodes: a, b"),
    )


@pytest.mark.parametrize("name", ["", "  ", " hot", "h\not"])
def test_a_name_that_cannot_be_seen_is_refused(name: str) -> None:
    assert paths_of(filter_node(name)) == ["nodes[0].name"]


def test_a_name_is_given_once() -> None:
    problems = problems_of(filter_node("a", next="b"), filter_node("b"), action_node("b"))

    assert problems == (Problem("nodes[2].name", "b", "is the name of an earlier node"),)


def test_an_unknown_node_type_is_refused() -> None:
    assert paths_of(filter_node(), NodeSpec(name="x", type="Filter", config={})) == ["nodes", "nodes[1].type"]


@pytest.mark.parametrize("node", [transform_node(on_false="hot"), action_node(on_false="hot")])
def test_only_a_filter_may_name_a_node_for_false(node: NodeSpec) -> None:
    assert f"{problems_of(node, filter_node())[0]}" == "nodes[0].onFalse: is for filters only (found 'hot')"


def test_all_problems_of_a_chain_are_reported_at_once() -> None:
    paths = paths_of(
        filter_node("a", leaf(uuid="abc"), next="b"),
        transform_node("b", scale(operation="divide", value=0), next="gone"),
        action_node("b", command(state="on")),
        filter_node("d", leaf(operator="~"), next="e"),
        NodeSpec(name="e", type="loop", config={}, next="d"),
    )

    assert set(paths) == {
        "nodes[0].config.UUID",
        "nodes[1].config.value",
        "nodes[1].next",
        "nodes[2].name",
        "nodes[2].config.state",
        "nodes[3].config.operator",
        "nodes[4].type",
        "nodes[4].next",
    }


def a_row_of(number: int) -> list[NodeSpec]:
    return [filter_node(f"n{i}", next=f"n{i + 1}" if i + 1 < number else None) for i in range(number)]


def test_a_chain_may_be_as_long_as_the_bound() -> None:
    assert run(compiled(*a_row_of(MAX_STEPS)), {"temperature": 31}).steps == MAX_STEPS == 1_000


def test_a_chain_longer_than_the_bound_is_refused() -> None:
    assert problems_of(*a_row_of(MAX_STEPS + 1)) == (Problem("nodes", 1_001, "must not have more than 1000 nodes"),)


def test_a_long_cycle_is_reported_briefly() -> None:
    (problem,) = problems_of(*a_row_of(MAX_STEPS - 1), filter_node("n999", next="n0"), filter_node("n998x", next="n0"))[
        :1
    ]

    assert len(str(problem)) < 300


def test_derived_keys_cannot_multiply_the_triggers_without_bound() -> None:
    branches = []
    for i in range(100):
        branches.append(filter_node(f"f{i}", next=f"t{i}", on_false=f"f{i + 1}" if i < 99 else "end"))
        branches.append(transform_node(f"t{i}", scale(key=f"k{i}", target="sum"), next="end"))
    many = [leaf("sum", uuid=f"{i:08x}-6a3c-4f0e-9d1b-2c5a8f4e7d10") for i in range(MAX_REFERENCES // 100)]

    problems = problems_of(*branches, filter_node("end", {"type": "OR", "expressions": many}))

    assert [problem.message for problem in problems] == ["must not read more than 10000 variables"]


def independent_judgement(nodes: list[NodeSpec]) -> bool:
    """Whether a graph of existing links has one start and no cycle, found by repeatedly taking away sources."""
    left = {node.name: {link for link in (node.next, node.on_false) if link} for node in nodes}
    sources = set(left) - set().union(*left.values())
    if len(sources) != 1:
        return False
    while sources:
        for name in sources:
            del left[name]
        sources = set(left) - set().union(*left.values())
    return not left


@st.composite
def graphs(draw: st.DrawFn) -> list[NodeSpec]:
    """Mostly forward links, so that both acyclic and cyclic graphs come up."""
    size = draw(st.integers(min_value=1, max_value=8))
    names = [f"n{i}" for i in range(size)]
    nodes = []
    for i, name in enumerate(names):
        ahead = st.sampled_from(names[i + 1 :]) if i + 1 < size else st.none()
        link = st.none() | ahead | ahead | ahead | st.sampled_from(names)
        make = draw(st.sampled_from([filter_node, filter_node, transform_node, action_node])) if i else filter_node
        on_false = {"on_false": draw(link)} if make is filter_node else {}
        nodes.append(make(name, next=draw(ahead | link), **on_false))
    return draw(st.permutations(nodes))


@settings(UNTIMED, max_examples=300)
@given(graphs(), st.floats(min_value=-100, max_value=100))
def test_a_chain_is_accepted_if_and_only_if_it_ends_and_then_it_does_end(nodes: list[NodeSpec], value: float) -> None:
    chain = compiled_or_refused(*nodes)
    assert isinstance(chain, Chain) is independent_judgement(nodes)
    if isinstance(chain, InvalidChain):
        return

    outcome = run(chain, {"temperature": value})

    assert 1 <= outcome.steps <= len(nodes)
    assert len({done.effect_key for done in outcome.effects}) == len(outcome.effects)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.sampled_from([*leaf(), *scale(), *command()]), inner, max_size=4)
    ),
    max_leaves=15,
)


def nearly(config: dict[str, object]) -> st.SearchStrategy[Any]:
    """A valid config with some of its values replaced by any JSON, or any JSON at all."""
    changes = st.dictionaries(st.sampled_from([*config, "valueFrom", "target", "expressions"]), json_values, max_size=2)
    return json_values | changes.map(lambda changed: {**config, **changed})


def run_or_failed(chain: Chain, values: Mapping[str, Value]) -> Outcome | ChainFailed:
    try:
        return run(chain, values)
    except ChainFailed as failure:
        return failure


@UNTIMED
@given(nearly(leaf()), nearly(scale()), nearly(command()))
def test_any_json_as_config_is_compiled_or_refused_and_what_compiles_runs(
    condition: object, transform: object, action: object
) -> None:
    verdict = compiled_or_refused(
        filter_node("f", condition, next="t", on_false="t"),
        transform_node("t", transform, next="a"),
        action_node("a", action),
    )
    if isinstance(verdict, InvalidChain):
        assert verdict.problems
        assert str(verdict)
        return

    result = run_or_failed(verdict, {"temperature": 31})

    assert result.steps == 3 if isinstance(result, Outcome) else result.node in ("t", "a")


def test_every_action_type_is_known_to_the_table() -> None:
    assert set(ACTIONS) == {"device_command", "notify", "raise_alarm", "clear_alarm"}


def test_the_core_is_pure() -> None:
    """Conditions and chains run where neither Django nor Redis nor RQ is loaded."""
    script = (
        "import sys, rules.engine.chains\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'django', 'redis', 'rq', 'django_rq'}))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "DJANGO_SETTINGS_MODULE"}

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    )

    assert done.stdout.strip() == "[]"
