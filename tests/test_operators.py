"""Operators: what each of them means for every kind of value, and what it refuses to be given."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devices.values import MAXIMUM_TEXT_LENGTH
from rules.engine import operators_page, temporal
from rules.engine.conditions import Condition, compile_condition
from rules.engine.context import Scope
from rules.engine.durations import MAX_DAYS, check_duration, microseconds_of
from rules.engine.exceptions import InvalidChain
from rules.engine.fields import MAX_LIST, MAX_TEXT
from rules.engine.operators import OPERATORS
from rules.engine.patterns import MAX_PATTERN
from rules.engine.values import Reference, Sample, Value

SENSOR = "0b7e9d52-6a3c-4f0e-9d1b-2c5a8f4e7d10"
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
NAN = math.nan
INF = math.inf
PH = Reference("sensor", SENSOR, "ph")
NOW_US = 1_700_000_000_000_000
MINUTE_US = 60_000_000
TEN_MINUTES_US = 10 * MINUTE_US


def leaf(operator: str, **changes: object) -> dict[str, object]:
    return {"sourceType": "sensor", "UUID": SENSOR, "key": "ph", "operator": operator, **changes}


def compiled(config: object) -> Condition:
    return compile_condition(config, path="config")


def run(config: object, sample: Sample | None) -> tuple[bool, Scope]:
    scope = Scope(lambda _reference: sample, NOW_US)
    return compiled(config).evaluate(scope), scope


def decide(operator: str, operand: object, value: Value) -> bool:
    """Evaluate with a value of now; operand Ellipsis is an operator without one."""
    config = leaf(operator) if operand is ... else leaf(operator, value=operand)
    holds, scope = run(config, Sample(value, NOW_US))
    assert not scope.wakes
    return holds


def problems_of(config: object) -> dict[str, str]:
    with pytest.raises(InvalidChain) as raised:
        compiled(config)
    return {problem.path: problem.message for problem in raised.value.problems}


def example_of(operator: str) -> dict[str, object]:
    return leaf(operator, **OPERATORS[operator].example)


BIG = 2**53 + 1  # no double holds it: float(BIG) == 2.0**53
LONG = "E42" + "x" * MAX_TEXT

MEANINGS: list[tuple[str, Any, Value, bool]] = [
    (">", 6.5, 6.6, True),
    (">", 6.5, 6.5, False),
    (">", 6, 6.5, True),
    (">", 6.5, 7, True),
    (">", 0, True, False),
    (">", 6.5, "7", False),
    (">", 6.5, "high", False),
    (">", 6.5, NAN, False),
    (">", 6.5, INF, True),
    (">", 2.0**53, BIG, True),
    (">", 1e308, 10**400, True),
    (">=", 6.5, 6.5, True),
    (">=", 6.5, 6.4, False),
    (">=", 1, True, False),
    (">=", 7, "7", False),
    (">=", BIG, 2.0**53, False),
    ("<", 6.5, 6.4, True),
    ("<", 6.5, 6.5, False),
    ("<", 1, False, False),
    ("<", 6.5, "", False),
    ("<", 0, -(10**400), True),
    ("<=", 6.5, 6.5, True),
    ("<=", 6.5, 7, False),
    ("<=", 6.5, NAN, False),
    ("<=", 0, -0.0, True),
    ("==", 6, 6.0, True),
    ("==", 6.0, 6, True),
    ("==", 0, -0.0, True),
    ("==", 1, True, False),
    ("==", True, 1, False),
    ("==", True, True, True),
    ("==", False, 0, False),
    ("==", 6.5, "6.5", False),
    ("==", "6.5", 6.5, False),
    ("==", "on", "on", True),
    ("==", "on", "On", False),
    ("==", "", "", True),
    ("==", "true", True, False),
    ("==", 2.0**53, BIG, False),
    ("==", BIG, BIG, True),
    ("==", 6.5, NAN, False),
    ("!=", 6.5, 6.6, True),
    ("!=", 6, 6.0, False),
    ("!=", 1, True, True),
    ("!=", 6.5, "6.5", True),
    ("!=", "on", "off", True),
    ("!=", "on", "on", False),
    ("!=", "on", False, True),
    ("!=", 2.0**53, BIG, True),
    ("!=", 6.5, NAN, True),
    ("between", [5.5, 6.5], 5.5, True),
    ("between", [5.5, 6.5], 6.5, True),
    ("between", [5.5, 6.5], 6, True),
    ("between", [5.5, 6.5], 6.6, False),
    ("between", [5.5, 6.5], 5.4, False),
    ("between", [6, 6], 6.0, True),
    ("between", [0, 1], True, False),
    ("between", [5.5, 6.5], "6", False),
    ("between", [5.5, 6.5], NAN, False),
    ("between", [2**53, BIG - 1], BIG, False),
    ("in", ["on", "auto"], "auto", True),
    ("in", ["on", "auto"], "Auto", False),
    ("in", [1, 2], 2.0, True),
    ("in", [1, 2], True, False),
    ("in", [True], 1, False),
    ("in", [False, "x"], False, True),
    ("in", ["1"], 1, False),
    ("in", [2.0**53], BIG, False),
    ("in", [1], NAN, False),
    ("notIn", ["off"], "on", True),
    ("notIn", ["off"], "off", False),
    ("notIn", [1], True, True),
    ("notIn", [1], 1.0, False),
    ("notIn", ["1"], 1, True),
    ("notIn", [1], NAN, True),
    ("contains", "leak", "a leak here", True),
    ("contains", "leak", "Leak", False),
    ("contains", "6", 6.5, False),
    ("contains", "rue", True, False),
    ("contains", "a", "", False),
    ("notContains", "leak", "all well", True),
    ("notContains", "leak", "leak", False),
    ("notContains", "6", 6.5, True),
    ("notContains", "a", "", True),
    ("startsWith", "E", "E42", True),
    ("startsWith", "E", "e42", False),
    ("startsWith", "4", 42, False),
    ("endsWith", "42", "E42", True),
    ("endsWith", "E", "E42", False),
    ("endsWith", "2", 42, False),
    ("matches", "[0-9]{2}", "E42!", True),
    ("matches", "^[0-9]{2}$", "E42!", False),
    ("matches", "(?i)^e4", "E42", True),
    ("matches", "e4", "E42", False),
    ("matches", "4", 42, False),
    ("matches", "^$", "", True),
    ("matches", "^.$", "ü", True),
    ("matches", "^.$", "\ud800", True),
    ("matches", "^E42", LONG[:MAX_TEXT], True),
    ("matches", "^E42", LONG, False),
    ("hasAll", ["low", "leak"], "leak, low, cold", True),
    ("hasAll", ["low", "leak"], "low", False),
    ("hasAll", ["low"], "low", True),
    ("hasAll", ["low"], "lower", False),
    ("hasAll", ["1"], 1, False),
    ("hasAny", ["low", "leak"], " leak ,cold", True),
    ("hasAny", ["low", "leak"], "Leak", False),
    ("hasAny", ["low"], "", False),
    ("hasAny", ["true"], True, False),
    ("hasNone", ["fault"], "low,leak", True),
    ("hasNone", ["fault"], "low,fault", False),
    ("hasNone", ["fault"], "", True),
    ("hasNone", ["1"], 1, True),
    ("isNull", ..., 0, False),
    ("isNull", ..., "", False),
    ("isNotNull", ..., 0, True),
    ("isNotNull", ..., "", True),
    ("isEmpty", ..., "", True),
    ("isEmpty", ..., " ", False),
    ("isEmpty", ..., 0, False),
    ("isEmpty", ..., False, False),
    ("isNotEmpty", ..., "", False),
    ("isNotEmpty", ..., " ", True),
    ("isNotEmpty", ..., 0, True),
    ("isNotEmpty", ..., False, True),
    ("isNumber", ..., 6, True),
    ("isNumber", ..., 6.5, True),
    ("isNumber", ..., "6.5", False),
    ("isNumber", ..., True, False),
    ("isNumber", ..., NAN, False),
    ("isString", ..., "6.5", True),
    ("isString", ..., "", True),
    ("isString", ..., 6.5, False),
    ("isBoolean", ..., False, True),
    ("isBoolean", ..., 0, False),
    ("isBoolean", ..., "true", False),
    ("isArray", ..., "a,b", False),
    ("isArray", ..., 1, False),
    ("isSuspect", ..., 6.5, False),
    ("isNotSuspect", ..., 6.5, True),
]
# Operator, value of the leaf (None: it takes none), value of the sample, age of the sample, expected.
AGES: list[tuple[str, Any, Value, int, bool]] = [
    ("olderThan", None, 6.5, TEN_MINUTES_US, True),
    ("olderThan", None, 6.5, TEN_MINUTES_US - 1, False),
    ("olderThan", None, 6.5, -1, False),
    ("olderThan", None, None, TEN_MINUTES_US, True),
    ("olderThan", None, None, 0, False),
    ("newerThan", None, 6.5, TEN_MINUTES_US, False),
    ("newerThan", None, 6.5, TEN_MINUTES_US - 1, True),
    ("newerThan", None, 6.5, -1, True),
    ("newerThan", None, None, 0, True),
    ("inLast", None, 6.5, TEN_MINUTES_US + 1, False),
    ("inLast", None, 6.5, TEN_MINUTES_US, True),
    ("inLast", None, 6.5, -1, True),
    ("valueOlderThan", "on", "on", TEN_MINUTES_US, True),
    ("valueOlderThan", "on", "on", TEN_MINUTES_US - 1, False),
    ("valueOlderThan", "on", "off", TEN_MINUTES_US, False),
    ("valueOlderThan", 1, True, TEN_MINUTES_US, False),
    ("valueOlderThan", 1, 1.0, TEN_MINUTES_US, True),
    ("valueNewerThan", "on", "on", TEN_MINUTES_US - 1, True),
    ("valueNewerThan", "on", "on", TEN_MINUTES_US, False),
    ("valueNewerThan", "on", "off", 0, False),
    ("valueNewerThan", True, 1, 0, False),
    ("valueInLast", "on", "on", TEN_MINUTES_US, True),
    ("valueInLast", "on", "on", TEN_MINUTES_US + 1, False),
    ("valueInLast", "on", "off", 0, False),
]


@pytest.mark.parametrize(("operator", "operand", "value", "expected"), MEANINGS)
def test_an_operator_has_one_meaning_for_every_kind_of_value(
    operator: str, operand: object, value: Value, expected: bool
) -> None:
    assert decide(operator, operand, value) is expected


@pytest.mark.parametrize(("operator", "operand", "value", "age_us", "expected"), AGES)
def test_an_operator_on_age_has_one_meaning_up_to_the_microsecond(
    operator: str, operand: object, value: Value, age_us: int, expected: bool
) -> None:
    config = leaf(operator, duration="10m", **({} if operand is None else {"value": operand}))

    assert run(config, Sample(value, NOW_US - age_us))[0] is expected


def test_every_operator_has_its_meaning_tested() -> None:
    assert {operator for operator, *_ in [*MEANINGS, *AGES]} == set(OPERATORS)


@pytest.mark.parametrize("value", [6.5, None])
def test_what_is_suspect_is_so_whether_or_not_a_value_was_ever_believed(value: Value) -> None:
    sample = Sample(value, NOW_US, suspicion="stuck")
    assert [run(leaf(operator), sample)[0] for operator in ("isSuspect", "isNotSuspect")] == [True, False]


ABSENCE = {"isNull", "isEmpty", "olderThan"}
REPORTS = {"newerThan", "inLast"}


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_value_never_seen_makes_every_leaf_false_but_those_about_absence(operator: str) -> None:
    holds, scope = run(example_of(operator), None)

    assert holds is (operator in ABSENCE)
    assert scope.missing == ([] if operator in ABSENCE else [PH])
    assert not scope.wakes


@pytest.mark.parametrize("operator", OPERATORS)
def test_null_is_no_value_yet_it_is_a_report_of_which_the_age_counts(operator: str) -> None:
    holds, scope = run(example_of(operator), Sample(None, NOW_US))

    assert holds is (operator in (ABSENCE | REPORTS) - {"olderThan"})
    assert scope.missing == ([] if operator in ABSENCE | REPORTS else [PH])


@pytest.mark.parametrize("config", [leaf("olderThan", duration="10m"), leaf("valueOlderThan", value=6, duration="10m")])
def test_what_is_not_old_yet_says_when_it_will_be_and_is_then(config: dict[str, object]) -> None:
    taken_us = NOW_US - MINUTE_US
    holds, scope = run(config, Sample(6, taken_us))
    assert (holds, scope.wakes) == (False, {PH[:2]: taken_us + TEN_MINUTES_US})
    assert [timer.source for timer in compiled(config).timers] == [PH[:2]]

    later = Scope(lambda _: Sample(6, taken_us), taken_us + TEN_MINUTES_US)
    assert compiled(config).evaluate(later)
    assert not later.wakes


@pytest.mark.parametrize(
    "config",
    [
        leaf("newerThan", duration="10m"),
        leaf("inLast", duration="10m"),
        leaf("valueNewerThan", value=6, duration="10m"),
        leaf("valueOlderThan", value=7, duration="10m"),
        leaf(">", value=6),
    ],
)
def test_what_cannot_turn_true_in_silence_asks_for_no_further_run(config: dict[str, object]) -> None:
    assert not run(config, Sample(6, NOW_US - 1))[1].wakes


NO_NUMBERS: list[object] = ["7", True, None, [1], {}]
NOT_FINITE: list[object] = [NAN, INF, -INF, 10**400]
BAD_TEXTS: list[object] = ["", 5, True, None, ["a"], "x" * (MAX_TEXT + 1)]
BAD_LISTS: list[object] = [
    [],
    "on",
    None,
    {"on": 1},
    [None],
    [[1]],
    [NAN],
    ["a"] * (MAX_LIST + 1),
    ["x" * (MAX_TEXT + 1)],
]
BAD_ITEMS: list[object] = [[], "low", None, [1], [True], [""], ["a,b"], [" a"], ["a "], ["a"] * (MAX_LIST + 1)]
BAD_PATTERNS: list[object] = [
    "(",
    "[",
    "*",
    "(?=a)",
    "(?<!a)b",
    r"(a)\1",
    "a{1001}",
    r"(\pL{50}){10}",
    "\ud800",
    "a" * (MAX_PATTERN + 1),
    *BAD_TEXTS,
]
REFUSED_OPERANDS: list[tuple[str, object]] = [
    *[(operator, operand) for operator in (">", ">=", "<", "<=") for operand in NO_NUMBERS],
    *[(operator, operand) for operator in (">", "==", "!=") for operand in NOT_FINITE],
    *[(operator, operand) for operator in ("==", "!=") for operand in [*NO_NUMBERS[2:], "x" * (MAX_TEXT + 1)]],
    *[
        ("between", operand)
        for operand in (5, [], [1], [1, 2, 3], [2, 1], [1, "2"], [False, True], [NAN, 1], [1, INF], None)
    ],
    *[(operator, operand) for operator in ("in", "notIn") for operand in BAD_LISTS],
    *[(operator, text) for operator in ("contains", "notContains", "startsWith", "endsWith") for text in BAD_TEXTS],
    *[("matches", operand) for operand in BAD_PATTERNS],
    *[(operator, operand) for operator in ("hasAll", "hasAny", "hasNone") for operand in BAD_ITEMS],
]


@pytest.mark.parametrize(("operator", "operand"), REFUSED_OPERANDS)
def test_an_operand_that_the_operator_cannot_use_is_refused_at_its_value(operator: str, operand: object) -> None:
    assert list(problems_of(leaf(operator, value=operand))) == ["config.value"]


TAKES_VALUE = [operator for operator, described in OPERATORS.items() if described.operand]
TAKES_NO_VALUE = sorted(set(OPERATORS) - set(TAKES_VALUE))
TAKES_DURATION = ["olderThan", "newerThan", "inLast", "valueOlderThan", "valueNewerThan", "valueInLast"]


def test_which_operators_take_a_duration() -> None:
    assert [operator for operator, described in OPERATORS.items() if described.takes_duration] == TAKES_DURATION


@pytest.mark.parametrize("operator", TAKES_VALUE)
def test_a_value_left_out_is_required(operator: str) -> None:
    config = example_of(operator)
    del config["value"]

    assert problems_of(config) == {"config.value": "is required"}


@pytest.mark.parametrize("operator", TAKES_NO_VALUE)
@pytest.mark.parametrize("value", [5, None, "10m"])
def test_a_value_where_none_is_taken_is_refused(operator: str, value: object) -> None:
    message = problems_of({**example_of(operator), "value": value})["config.value"]

    assert message.startswith(f"{operator} takes ")


def test_the_time_given_as_value_is_answered_with_where_it_belongs() -> None:
    problems = problems_of(leaf("olderThan", value="10m"))

    assert problems == {"config.value": "olderThan takes a duration and no value", "config.duration": "is required"}


@pytest.mark.parametrize("operator", [operator for operator in OPERATORS if operator not in TAKES_DURATION])
def test_a_duration_where_none_is_taken_is_refused(operator: str) -> None:
    message = problems_of({**example_of(operator), "duration": "5m"})["config.duration"]

    assert message == f"{operator} takes none; for how long it must be true is said with for"


BAD_DURATIONS: list[object] = [
    *(
        "",
        "5",
        "m",
        "0m",
        "-5m",
        "+5m",
        "5.5m",
        "5M",
        "5 m",
        " 5m",
        "5m ",
        "5m\n",
        "05m",
        "5ms",
        "5w",
        "1h30m",
        "\u0665m",
    ),
    *("367d", "31622401s", "9999999999s", 5, 5.0, None, True, ["5m"]),
]


@pytest.mark.parametrize("operator", TAKES_DURATION)
@pytest.mark.parametrize("duration", BAD_DURATIONS)
def test_a_duration_that_is_none_is_refused(operator: str, duration: object) -> None:
    assert list(problems_of({**example_of(operator), "duration": duration})) == ["config.duration"]


@pytest.mark.parametrize(
    ("text", "microseconds"),
    [("10s", 10**7), ("5m", 3 * 10**8), ("2h", 72 * 10**8), ("1d", 864 * 10**8), (f"{MAX_DAYS}d", 31_622_400 * 10**6)],
)
def test_a_duration_is_read_in_microseconds(text: str, microseconds: int) -> None:
    assert check_duration(text) is None
    assert microseconds_of(text) == microseconds


def test_microseconds_of_what_is_no_duration_is_an_error() -> None:
    with pytest.raises(ValueError, match="'soon' is no duration"):
        microseconds_of("soon")


@pytest.mark.parametrize(
    ("operator", "operand", "message"),
    [
        ("matches", "(", "is no regular expression that RE2 can use: missing ): ("),
        ("matches", "(?=a)", "is no regular expression that RE2 can use: invalid perl operator: (?="),
        ("matches", r"(\pL{50}){10}", "is no regular expression that RE2 can use: pattern too large - compile failed"),
        ("matches", "a" * 201, "must not be longer than 200 characters"),
        ("in", ["on", None], "entry 2 must be a finite number, text, true or false"),
        ("hasAny", ["low", "a,b"], "entry 2 must have neither a comma nor blanks around it"),
    ],
)
def test_a_refused_operand_is_told_what_is_wrong_with_it(operator: str, operand: object, message: str) -> None:
    assert problems_of(leaf(operator, value=operand)) == {"config.value": message}


def test_texts_of_rules_may_be_as_long_as_texts_of_sensors() -> None:
    assert MAX_TEXT == MAXIMUM_TEXT_LENGTH


def test_a_pattern_that_is_slow_elsewhere_is_fast_here() -> None:
    condition = compiled(leaf("matches", value="(a+)+$"))  # exponential where it backtracks
    scope = Scope(lambda _: Sample("a" * (MAX_TEXT - 1) + "!", NOW_US), NOW_US)

    began = time.process_time()
    assert not condition.evaluate(scope)
    assert time.process_time() - began < 1


numbers = st.integers() | st.floats() | st.sampled_from([0, -0.0, 1, 1.0, BIG, 2.0**53, 10**400])
texts = st.text(max_size=3) | st.sampled_from(["1", "on", "a,b", "a, b", "b", "ab", "\ud800", "x" * 1_001])
scalars = numbers | st.booleans() | texts
finite = st.integers(min_value=-(2**70), max_value=2**70) | st.floats(allow_nan=False, allow_infinity=False)
items = st.text("ab", min_size=1, max_size=2)
comparables = finite | st.booleans() | st.text(max_size=3) | st.sampled_from(["on", 1, 1.0, True, "1"])
OPERANDS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys([">", ">=", "<", "<="], finite),
    **dict.fromkeys(["==", "!=", "valueOlderThan", "valueNewerThan", "valueInLast"], comparables),
    **dict.fromkeys(["in", "notIn"], st.lists(comparables, min_size=1, max_size=4)),
    **dict.fromkeys(
        ["contains", "notContains", "startsWith", "endsWith"], st.text(min_size=1, max_size=2) | st.sampled_from("ab1o")
    ),
    **dict.fromkeys(["hasAll", "hasAny", "hasNone"], st.lists(items, min_size=1, max_size=3)),
    "between": st.tuples(finite, finite).map(sorted),
    "matches": st.sampled_from(["a", "^a", "b$", "^a,b$", "[0-9]", "a|b", "^$", "o.", "(ab)+"]),
}


def number(candidate: object) -> bool:
    return isinstance(candidate, int | float) and not isinstance(candidate, bool)


def equal(value: Any, operand: Any) -> bool:
    comparable = (number(value) and number(operand)) or type(value) is type(operand)
    return bool(comparable and value == operand)


def ages_by_the_book(operator: str, age_us: int, duration_us: int) -> bool:
    if operator.lower().endswith("olderthan"):
        return age_us >= duration_us
    return age_us <= duration_us if operator.lower().endswith("inlast") else age_us < duration_us


def comparisons_by_the_book(operator: str, value: Any, operand: Any) -> bool:  # noqa: PLR0912 - a table, in words
    match operator:
        case ">":
            return number(value) and bool(value > operand)
        case ">=":
            return number(value) and bool(value >= operand)
        case "<":
            return number(value) and bool(value < operand)
        case "<=":
            return number(value) and bool(value <= operand)
        case "between":
            return number(value) and bool(operand[0] <= value and value <= operand[1])  # noqa: PLR1716 - the product chains
        case "==":
            return equal(value, operand)
        case "!=":
            return not equal(value, operand)
        case "in":
            return any(equal(value, entry) for entry in operand)
        case "notIn":
            return all(not equal(value, entry) for entry in operand)
        case "isNotNull" | "isNotSuspect":
            return True
        case "isSuspect":
            return False
        case "isNotEmpty":
            return not equal(value, "")
        case "isNumber":
            return number(value) and not (isinstance(value, float) and math.isnan(value))
        case "isString":
            return isinstance(value, str)
        case "isBoolean":
            return value is True or value is False
        case "isArray":
            return False
    return texts_by_the_book(operator, value, operand)


def texts_by_the_book(operator: str, value: Any, operand: Any) -> bool:
    if not isinstance(value, str):
        return operator in ("notContains", "hasNone")
    listed = [item.strip() for item in value.split(",")]
    match operator:
        case "contains":
            return bool(value.find(operand) >= 0)
        case "notContains":
            return bool(value.find(operand) < 0)
        case "startsWith":
            return bool(value[: len(operand)] == operand)
        case "endsWith":
            return bool(value[-len(operand) :] == operand)
        case "matches":
            return len(value) <= 1_000 and re.search(operand.replace("$", r"\Z"), value) is not None
        case "hasAll":
            return all(item in listed for item in operand)
        case "hasAny":
            return any(item in listed for item in operand)
        case "hasNone":
            return not any(item in listed for item in operand)
    raise AssertionError(operator)


def by_the_book(config: Mapping[str, Any], sample: Sample | None) -> bool:
    """The operators once more, written for being read and sharing nothing with the product."""
    operator: str = config["operator"]
    operand = config.get("value")
    if operator == "isNull":
        return sample is None or sample.value is None
    if operator == "isEmpty":
        return sample is None or sample.value is None or equal(sample.value, "")
    if sample is None:
        return operator == "olderThan"
    if "duration" in config:
        counted_from_us = sample.timestamp_us
        if "lder" in operator and sample.received_us:  # silence is not what a clock says
            counted_from_us = sample.received_us
        of_age = ages_by_the_book(operator, NOW_US - counted_from_us, config["duration_us"])
        return of_age if operand is None else of_age and equal(sample.value, operand)
    if sample.suspicion and operator in ("isSuspect", "isNotSuspect"):
        return operator == "isSuspect"
    return sample.value is not None and comparisons_by_the_book(operator, sample.value, operand)


@UNTIMED
@given(st.data())
def test_operators_agree_with_a_plain_reference_implementation(data: st.DataObject) -> None:
    operator = data.draw(st.sampled_from(sorted(OPERATORS)))
    config = leaf(operator)
    near: st.SearchStrategy[Any] = st.nothing()
    if operator in OPERANDS:
        config["value"] = operand = data.draw(OPERANDS[operator])
        near = st.sampled_from(operand if isinstance(operand, list) else [operand])
    minutes = data.draw(st.integers(1, 20))
    if OPERATORS[operator].takes_duration:
        config["duration"] = f"{minutes}m"
    exactly_us = NOW_US - minutes * MINUTE_US
    taken_us = data.draw(st.sampled_from([exactly_us - 1, exactly_us, exactly_us + 1, NOW_US, NOW_US + 1]))
    heard_us = data.draw(st.sampled_from([0, taken_us, NOW_US, exactly_us - 1, exactly_us + 1]))
    samples = st.builds(Sample, scalars | st.none() | near, st.just(taken_us), received_us=st.just(heard_us))
    sample = data.draw(st.none() | samples)

    holds, scope = run(config, sample)

    assert holds is by_the_book({**config, "duration_us": minutes * MINUTE_US}, sample)
    assert all(due_us > NOW_US for due_us in scope.wakes.values())
    if scope.missing:
        assert not holds


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_example_of_an_operator_compiles(operator: str) -> None:
    assert compiled(example_of(operator)).references == {PH}


def test_the_page_of_operators_is_fresh() -> None:
    assert operators_page.PAGE.read_text() == operators_page.page(), "run python -m rules.engine.operators_page"


def test_the_page_shows_every_operator_and_its_examples_work() -> None:
    page = operators_page.page()
    examples = [json.loads(text) for text in re.findall(r'`(\{"operator": .*?\})`', page)]

    assert {example["operator"] for example in examples} == set(OPERATORS)
    assert all(f"| `{symbol}` |" in page for symbol in OPERATORS)
    assert set(temporal.TIME_KEYS) - {"off"} <= {key for example in examples for key in example}
    for example in examples:
        assert compiled({**leaf(">"), **example}).references == {PH}


def test_the_page_can_be_checked_and_written_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(operators_page, "PAGE", tmp_path / "operators.md")
    assert operators_page.main(["--check"]) == 1
    assert "run python -m rules.engine.operators_page" in capsys.readouterr().out
    assert operators_page.main([]) == 0
    assert operators_page.main(["--check"]) == 0
