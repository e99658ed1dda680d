"""For which values conditions can be true, compared with what they say of values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rules.authoring import satisfiability
from rules.engine.conditions import compile_condition
from rules.engine.context import Scope
from rules.engine.values import Reference, Sample

SENSOR = "0b7e9d52-6a3c-4f0e-9d1b-2c5a8f4e7d10"
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
NOON_US = 1_750_000_000_000_000
VALUES = (0, 1, 2, 3, True, "1", "a")


def leaf(operator: str, value: object, key: str = "x", **more: object) -> dict[str, object]:
    return {"sourceType": "sensor", "UUID": SENSOR, "key": key, "operator": operator, "value": value, **more}


def both(*parts: object) -> dict[str, object]:
    return {"type": "AND", "expressions": list(parts)}


def either(*parts: object) -> dict[str, object]:
    return {"type": "OR", "expressions": list(parts)}


@pytest.mark.parametrize(
    "config",
    [
        both(leaf(">", 7), leaf("<", 6)),
        both(leaf(">", 7), leaf("<=", 7)),
        both(leaf(">=", 7), leaf("<=", 7), leaf("!=", 7)),
        both(leaf("between", [1, 2]), leaf(">", 2)),
        both(leaf("==", 3), leaf("<", 3)),
        both(leaf("==", "on"), leaf("==", "off")),
        both(leaf("==", "on"), leaf(">", 1)),
        both(leaf("==", 1), leaf("==", True)),
        both(leaf(">", 7), either(leaf("<", 6), leaf("==", 1))),
        both(leaf(">", 7), leaf("<", 6, **{"for": "5m"})),
        both(leaf(">", 7, releaseAt=6), leaf("<", 5)),
    ],
)
def test_what_can_never_be_true_is_nothing(config: dict[str, Any]) -> None:
    assert not satisfiability.where_true(config)


@pytest.mark.parametrize(
    "config",
    [
        both(leaf(">=", 7), leaf("<=", 7)),
        both(leaf(">", 7), leaf("<", 6, "y")),
        both(leaf(">", 7, releaseAt=6), leaf("<", 6.5)),
        both(leaf(">", 7, off=6), leaf("<", 6.5)),
        both(leaf(">", 7, times=3, within="10m"), leaf("<", 6)),
        both(leaf(">", 7, per="1m"), leaf("<", 6)),
        both(leaf("matches", "a"), leaf("==", "b")),
        either(leaf(">", 7), leaf("<", 6)),
        {"broken": 1},
        both(*[either(leaf("==", n, f"k{i}") , leaf("==", n + 1, f"k{i}")) for i, n in enumerate(range(9))]),
    ],
)  # fmt: skip
def test_what_may_be_true_is_something(config: dict[str, Any]) -> None:
    assert satisfiability.where_true(config)


NUMBERS = st.sampled_from([0, 1, 2, 3])
LEAVES = st.one_of(
    st.builds(leaf, st.sampled_from([">", ">=", "<", "<="]), NUMBERS, st.sampled_from("xy")),
    st.builds(leaf, st.sampled_from(["==", "!="]), st.sampled_from(VALUES), st.sampled_from("xy")),
    st.builds(lambda ends, key: leaf("between", sorted(ends), key), st.tuples(NUMBERS, NUMBERS), st.sampled_from("xy")),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.builds(
        lambda kind, parts: {"type": kind, "expressions": parts},
        st.sampled_from(["AND", "OR"]),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=8,
)


def truth(config: object, x: Any, y: Any) -> bool:
    values = {"x": Sample(x, NOON_US), "y": Sample(y, NOON_US)}
    scope = Scope(lambda reference: values[reference.key], NOON_US)
    return compile_condition(config, path="c").evaluate(scope)


def holds(region: satisfiability.Region, x: Any, y: Any) -> bool:
    values = {"x": x, "y": y}
    atoms = {key: next(iter(satisfiability._atoms([value]))) for key, value in values.items()}
    return any(all(span._has(atoms[reference.key]) for reference, span in each.items()) for each in region)


@UNTIMED
@given(TREES, st.sampled_from(VALUES), st.sampled_from(VALUES))
def test_a_region_holds_every_value_for_which_the_condition_is_true(config: Any, x: Any, y: Any) -> None:
    if truth(config, x, y):
        assert holds(satisfiability.where_true(config), x, y)


@UNTIMED
@given(TREES, NUMBERS, NUMBERS)
def test_the_region_of_false_holds_every_number_for_which_the_condition_is_false(config: Any, x: Any, y: Any) -> None:
    if not truth(config, x, y):
        assert holds(satisfiability.where_false(config), x, y)


def test_a_transform_makes_what_is_known_of_its_result_unknown() -> None:
    region = satisfiability.where_true(both(leaf(">", 7), leaf("<", 3, "y")))
    (left,) = satisfiability.forget(region, "x")
    assert set(left) == {Reference("sensor", SENSOR, "y")}
