"""Filters: how groups combine, and what a configuration is refused for."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rules.engine.conditions import MAX_DEPTH, MAX_LEAVES, Condition, compile_condition
from rules.engine.context import Scope
from rules.engine.exceptions import InvalidChain, Problem
from rules.engine.operators import OPERATORS
from rules.engine.values import Lookup, Reference, Sample, Value

SENSOR = "0b7e9d52-6a3c-4f0e-9d1b-2c5a8f4e7d10"
OTHER = "7c1f4a88-31de-4b6a-8e55-9a0b3c2d1e4f"
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
NAN = math.nan
INF = math.inf


def leaf(operator: object = ">", value: object = 6.5, **changes: object) -> dict[str, object]:
    return {"sourceType": "sensor", "UUID": SENSOR, "key": "ph", "operator": operator, "value": value, **changes}


def group(kind: object, *expressions: object) -> dict[str, object]:
    return {"type": kind, "expressions": list(expressions)}


def reference(key: str = "ph", uuid: str = SENSOR) -> Reference:
    return Reference("sensor", uuid, key)


def compiled(config: object) -> Condition:
    return compile_condition(config, path="config")


def decide(config: object, values: Mapping[str, Value]) -> tuple[bool, list[Reference]]:
    """Evaluate against values of SENSOR; a key that is absent was never seen."""
    samples = {reference(key): Sample(value, 1) for key, value in values.items()}
    return evaluated(compiled(config), samples.get)


def evaluated(condition: Condition, lookup: Lookup) -> tuple[bool, list[Reference]]:
    scope = Scope(lookup, now_us=1)
    return condition.evaluate(scope), scope.missing


def problems_of(config: object) -> dict[str, str]:
    with pytest.raises(InvalidChain) as raised:
        compiled(config)
    return {problem.path: problem.message for problem in raised.value.problems}


HIGH, LOW = leaf(">", 8), leaf("<", 5)
WARM = leaf(">", 25, key="temperature")
DRY = leaf("<", 10, key="level")


@pytest.mark.parametrize(
    ("config", "values", "expected"),
    [
        (group("AND", leaf(">", 5), leaf("<", 7)), {"ph": 6}, True),
        (group("AND", leaf(">", 5), leaf("<", 7)), {"ph": 8}, False),
        (group("OR", HIGH, LOW), {"ph": 9}, True),
        (group("OR", HIGH, LOW), {"ph": 4}, True),
        (group("OR", HIGH, LOW), {"ph": 6}, False),
        (group("AND", HIGH), {"ph": 9}, True),
        (group("OR", group("AND", HIGH)), {"ph": 6}, False),
        (group("AND", group("OR", HIGH, LOW), WARM), {"ph": 9, "temperature": 30}, True),
        (group("AND", group("OR", HIGH, LOW), WARM), {"ph": 9, "temperature": 20}, False),
        (group("OR", group("AND", HIGH, WARM), group("AND", LOW, DRY)), {"ph": 4, "level": 5, "temperature": 0}, True),
    ],
)
def test_groups_nest_and_combine(config: object, values: dict[str, Value], expected: bool) -> None:
    assert decide(config, values) == (expected, [])


def test_and_stops_asking_at_the_first_false() -> None:
    assert decide(group("AND", HIGH, WARM), {"ph": 6}) == (False, [])


def test_or_stops_asking_at_the_first_true() -> None:
    assert decide(group("OR", HIGH, WARM), {"ph": 9}) == (True, [])


def test_what_was_missing_on_the_way_is_named_even_where_the_filter_holds() -> None:
    assert decide(group("OR", WARM, DRY, HIGH), {"ph": 9}) == (True, [reference("temperature"), reference("level")])


def test_a_condition_names_every_variable_it_may_read() -> None:
    condition = compiled(group("AND", HIGH, group("OR", WARM, leaf(UUID=OTHER, sourceType="device")), LOW))

    assert condition.references == {reference("ph"), reference("temperature"), Reference("device", OTHER, "ph")}


def test_a_uuid_is_compared_in_lower_case_however_it_was_written() -> None:
    assert compiled(leaf(UUID=SENSOR.upper())).references == {reference()}


@pytest.mark.parametrize(
    "uuid",
    [
        "abc",
        "",
        None,
        5,
        ["0b7e9d52"],
        SENSOR + "\n",
        " " + SENSOR,
        SENSOR.replace("-", ""),
        "{" + SENSOR + "}",
        "urn:uuid:" + SENSOR,
        "0b7e9d52-6a3c-1f0e-9d1b-2c5a8f4e7d10",  # version 1
        "0b7e9d52-6a3c-4f0e-cd1b-2c5a8f4e7d10",  # another variant
        "00000000-0000-0000-0000-000000000000",
    ],
)
def test_only_a_version_4_uuid_is_accepted(uuid: object) -> None:
    assert problems_of(leaf(UUID=uuid)) == {"config.UUID": "must be a version 4 UUID"}


def test_a_wrong_uuid_deep_inside_is_named_with_its_path_and_value() -> None:
    config = group("AND", HIGH, leaf(UUID="abc"))

    with pytest.raises(InvalidChain) as raised:
        compile_condition(config, path="nodes[0].config")

    assert raised.value.problems == (Problem("nodes[0].config.expressions[1].UUID", "abc", "must be a version 4 UUID"),)
    assert str(raised.value) == "nodes[0].config.expressions[1].UUID: must be a version 4 UUID (found 'abc')"


@pytest.mark.parametrize("key", ["", " ", " ph", "ph ", "p\nh", "p\x00h", "\ud800", 5, None, ["ph"]])
def test_a_key_that_could_never_match_is_refused(key: object) -> None:
    assert list(problems_of(leaf(key=key))) == ["config.key"]


@pytest.mark.parametrize(
    ("config", "paths"),
    [
        (leaf("=>"), ["config.operator"]),
        (leaf(["<"]), ["config.operator"]),
        (leaf(sourceType="Sensor"), ["config.sourceType"]),
        (leaf(sourceType={}), ["config.sourceType"]),
        (leaf(duration="5m"), ["config.duration"]),
        (leaf(type="sensor"), ["config.type"]),
        ({"UUID": SENSOR}, ["config.sourceType", "config.key", "config.operator"]),
        ({}, ["config.sourceType", "config.UUID", "config.key", "config.operator"]),
        (group("and", HIGH), ["config.type"]),
        (group("AND"), ["config.expressions"]),
        ({"type": "AND", "expressions": {"0": HIGH}}, ["config.expressions"]),
        ({"type": "AND", "expresions": [HIGH]}, ["config.expresions", "config.expressions"]),
        ({"typ": "AND", "expressions": [HIGH]}, ["config.typ", "config.type"]),
        (group("OR", HIGH, None), ["config.expressions[1]"]),
        (group("OR", HIGH, [LOW]), ["config.expressions[1]"]),
        (None, ["config"]),
        ([HIGH], ["config"]),
        ("ph > 6.5", ["config"]),
    ],
)
def test_a_malformed_filter_is_refused_where_it_is_malformed(config: object, paths: list[str]) -> None:
    assert list(problems_of(config)) == paths


def test_an_operand_left_out_is_a_problem_of_its_own() -> None:
    config = leaf()
    del config["value"]

    assert problems_of(config) == {"config.value": "is required"}


def test_an_unknown_key_is_answered_with_the_known_ones() -> None:
    message = problems_of(leaf(operater=">"))["config.operater"]

    known = (
        "sourceType, UUID, key, operator, value, duration, for, times, within, releaseAt, off, per, increase, median"
    )
    assert message == f"unknown key; known here: {known}"


@pytest.mark.parametrize("key", ["duration", "for", "times", "within", "off", "per"])
def test_a_key_of_leaves_on_a_group_is_answered_with_where_it_belongs(key: str) -> None:
    config = {**group("AND", HIGH), key: "5m"}

    assert problems_of(config) == {f"config.{key}": "is not for groups: put it on each leaf"}


def test_all_problems_of_a_tree_are_reported_at_once() -> None:
    config = group(
        "AND",
        leaf(UUID="abc", sourceType="pump"),
        group("XOR", leaf("~"), leaf("between", [9, 5])),
        "ph",
        leaf(colour="red"),
    )

    assert set(problems_of(config)) == {
        "config.expressions[0].sourceType",
        "config.expressions[0].UUID",
        "config.expressions[1].type",
        "config.expressions[1].expressions[0].operator",
        "config.expressions[1].expressions[1].value",
        "config.expressions[2]",
        "config.expressions[3].colour",
    }


def nested(groups: int) -> dict[str, object]:
    config = leaf()
    for _ in range(groups):
        config = group("AND", config)
    return config


def test_groups_nest_as_deep_as_the_bound_and_no_deeper() -> None:
    assert evaluated(compiled(nested(MAX_DEPTH)), {reference(): Sample(7, 1)}.get) == (True, [])
    assert list(problems_of(nested(MAX_DEPTH + 1))) == ["config" + ".expressions[0]" * MAX_DEPTH]


def test_a_hopelessly_deep_filter_is_refused_and_its_problem_can_be_shown() -> None:
    with pytest.raises(InvalidChain) as raised:
        compiled(nested(100_000))

    assert len(repr(raised.value.problems)) < 1_000


def test_a_filter_has_as_many_leaves_as_the_bound_and_no_more() -> None:
    never = [leaf(">", 14)] * (MAX_LEAVES // 2)

    assert decide(group("OR", group("OR", *never), group("OR", *never[1:], HIGH)), {"ph": 9}) == (True, [])
    assert list(problems_of(group("OR", group("OR", *never), group("OR", *never), HIGH, LOW))) == [
        "config.expressions[2]"
    ]


@pytest.mark.parametrize("found", ["x" * 10_000, ["x" * 10_000] * 100, {"a": {"b": {"c": {}}}}, NAN])
def test_a_problem_shows_what_was_found_briefly_and_fit_for_json(found: object) -> None:
    shown = Problem("config", found, "is wrong").value

    assert isinstance(shown, str)
    assert len(shown) < 1_000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(), inner, max_size=4)
        | st.fixed_dictionaries({"type": st.sampled_from(["AND", "OR"]), "expressions": st.lists(inner, max_size=4)})
        | st.fixed_dictionaries(
            {},
            optional={
                "sourceType": st.just("sensor") | inner,
                "UUID": st.just(SENSOR) | inner,
                "key": st.just("ph") | inner,
                "operator": st.sampled_from(sorted(OPERATORS)) | inner,
                "value": inner,
                "duration": st.just("5m") | inner,
                "for": st.just("5m") | inner,
                "times": st.just(3) | inner,
                "within": st.just("5m") | inner,
                "off": st.integers() | inner,
                "per": st.just("1m") | inner,
            },
        )
    ),
    max_leaves=30,
)


def compiled_or_refused(config: object) -> Condition | InvalidChain:
    try:
        return compiled(config)
    except InvalidChain as refusal:
        return refusal


@UNTIMED
@given(json_values)
def test_any_json_is_either_compiled_or_refused_with_problems_that_can_be_shown(config: object) -> None:
    verdict = compiled_or_refused(config)

    if isinstance(verdict, InvalidChain):
        assert verdict.problems
        assert str(verdict)
    else:
        assert set(evaluated(verdict, lambda _: None)[1]) <= verdict.references
