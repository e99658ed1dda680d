"""Conditions over time: what each remembers and decides, also when readings come late, twice or not at all."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rules.engine.conditions import Condition, compile_condition
from rules.engine.context import Scope
from rules.engine.exceptions import InvalidChain
from rules.engine.operators import OPERATORS
from rules.engine.temporal import MAX_TIMES
from rules.engine.values import Reference, Sample, TemporalCondition, Value

SENSOR = "0b7e9d52-6a3c-4f0e-9d1b-2c5a8f4e7d10"
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
PH = Reference("sensor", SENSOR, "ph")
SECOND_US = 1_000_000


def leaf(operator: str = ">", value: object = 6.5, **changes: object) -> dict[str, object]:
    return {"sourceType": "sensor", "UUID": SENSOR, "key": "ph", "operator": operator, "value": value, **changes}


def compiled(config: object) -> Condition:
    return compile_condition(config, path="config")


def watch_of(config: object) -> TemporalCondition:
    (watch,) = compiled(config).watches
    return watch


def problems_of(config: object) -> dict[str, str]:
    with pytest.raises(InvalidChain) as raised:
        compiled(config)
    return {problem.path: problem.message for problem in raised.value.problems}


def at(seconds: float, value: Value) -> Sample:
    return Sample(value, round(seconds * SECOND_US))


def remembered_after(config: object, arrivals: Sequence[Sample], *, stored: bool = False) -> Any:
    """What is remembered of readings in the order of their arrival; `stored` between any two, as JSON."""
    memory = None
    for sample in arrivals:
        memory = watch_of(config).observe(memory, sample)
        if stored:
            memory = json.loads(json.dumps(memory, allow_nan=False))
    return memory


def answer(config: object, memory: Any, sample: Sample, now_us: int | None = None) -> bool:
    """Evaluate in a run for this sample, or one at `now_us` that reads it as the latest."""
    condition = compiled(config)
    scope = Scope(
        lambda _: sample, sample.timestamp_us if now_us is None else now_us, {condition.watches[0].key: memory}
    )
    return condition.evaluate(scope)


def answers(config: object, arrivals: Sequence[Sample]) -> list[bool]:
    """The answer at each reading, in the order of arrival."""
    return [answer(config, remembered_after(config, arrivals[: n + 1]), arrivals[n]) for n in range(len(arrivals))]


FOR = leaf(**{"for": "5m"})
TIMES = leaf(times=3, within="10m")
BAND = leaf(releaseAt=6.2)
BAND_FOR = leaf(releaseAt=6.2, **{"for": "5m"})
RATE = leaf(value=0.5, per="1m")
INCREASE = leaf(">=", 10, increase="1h")
MEDIAN = leaf(median=3)
ALL = [FOR, TIMES, BAND, BAND_FOR, RATE]
NAMES = ["for", "times", "releaseAt", "releaseAt and for", "per"]

# Readings in the order of arrival: second, value, expected answer at it.
Table = list[tuple[float, Value, bool]]
TABLES: dict[str, tuple[dict[str, object], Table]] = {
    "for: true at exactly the time": (FOR, [(0, 7, False), (299, 7, False), (300, 7, True), (301, 7, True)]),
    "for: two readings far apart are enough": (FOR, [(0, 7, False), (9000, 7, True)]),
    "for: one reading is never enough": (FOR, [(9000, 7, False)]),
    "for: a false one begins anew": (FOR, [(0, 7, False), (200, 6, False), (201, 7, False), (500, 7, False), (501, 7, True)]),
    "for: ends at once": (FOR, [(0, 7, False), (300, 7, True), (301, 6.5, False), (302, 7, False)]),
    "for: text ends it": (FOR, [(0, 7, False), (200, "7", False), (300, 7, False), (500, 7, False), (600, 7, True)]),
    "for: null ends it": (FOR, [(0, 7, False), (200, None, False), (300, 7, False), (600, 7, True)]),
    "for: a late false one begins anew at the newest": (
        FOR,
        [(0, 7, False), (200, 7, False), (100, 6, False), (300, 7, False), (499, 7, False), (500, 7, True)],
    ),
    "for: a late false one from before it changes nothing": (FOR, [(100, 7, False), (50, 6, False), (400, 7, True)]),
    "for: a late true one does not stretch it": (FOR, [(100, 7, False), (0, 7, False), (399, 7, False), (400, 7, True)]),
    "for: a late one after it came true does not undo it": (FOR, [(0, 7, False), (400, 7, True), (200, 7, True)]),
    "for: a late false one after it came true undoes it": (FOR, [(0, 7, False), (400, 7, True), (200, 6, False)]),
    "for: a doubled one is one": (FOR, [(0, 7, False), (0, 7, False), (300, 7, True), (300, 7, True)]),
    "for: with text": (
        leaf("==", "open", **{"for": "1m"}),
        [(0, "open", False), (60, "open", True), (61, "closed", False), (120, "open", False)],
    ),
    "times: the third within the time": (TIMES, [(0, 7, False), (60, 7, False), (600, 7, True)]),
    "times: the first is too old": (TIMES, [(0, 7, False), (60, 7, False), (601, 7, False), (602, 7, True)]),
    "times: false ones in between do not count": (TIMES, [(0, 7, False), (1, 6, False), (2, 7, False), (4, 7, True)]),
    "times: stays true while there are so many": (
        TIMES,
        [(0, 7, False), (1, 7, False), (2, 7, True), (3, 6, True), (600, 6, True), (601, 6, False)],
    ),
    "times: null and text are no hits": (TIMES, [(0, 7, False), (1, None, False), (2, "7", False), (3, 7, False), (4, 7, True)]),
    "times: a doubled one is one": (TIMES, [(0, 7, False), (0, 7, False), (0, 7, False), (1, 7, False), (1, 7, False)]),
    "times: a late one counts when it was": (TIMES, [(0, 7, False), (500, 7, False), (100, 7, True)]),
    "times: a late one from too long ago does not": (TIMES, [(700, 7, False), (800, 7, False), (100, 7, False)]),
    "off: on above, off below, as it was in between": (
        BAND,
        [(0, 6.4, False), (1, 6.6, True), (2, 6.4, True), (3, 6.2, True), (4, 6.1, False), (5, 6.4, False), (6, 6.5, False)],
    ),
    "off: the other way round": (
        leaf("<", 20, releaseAt=25),
        [(0, 22, False), (1, 19, True), (2, 22, True), (3, 25, True), (4, 25.5, False), (5, 22, False)],
    ),
    "releaseAt: equal counts with >=": (leaf(">=", 6.5, releaseAt=6.2), [(0, 6.5, True), (1, 6.3, True), (2, 6.1, False)]),
    "off: text switches off": (BAND, [(0, 7, True), (1, "broken", False), (2, 6.4, False)]),
    "off: true switches off": (BAND, [(0, 7, True), (1, True, False), (2, 6.4, False)]),
    "off: null switches off": (BAND, [(0, 7, True), (1, None, False), (2, 6.4, False)]),
    "off: a late one that a newer one has overruled changes nothing": (BAND, [(0, 7, True), (10, 7, True), (5, 6, True)]),
    "off: a late off before readings in between counts": (BAND, [(0, 7, True), (10, 6.4, True), (5, 6, False), (11, 6.4, False)]),
    "off: a late on before readings in between counts": (BAND, [(0, 6, False), (10, 6.4, False), (5, 7, True), (11, 6.4, True)]),
    "off and for: readings in between go on": (BAND_FOR, [(0, 7, False), (100, 6.4, False), (300, 6.3, True), (301, 6.1, False)]),
    "off and for: begins anew after off": (BAND_FOR, [(0, 7, False), (100, 6, False), (200, 7, False), (500, 6.3, True)]),
    "off and for: a late off begins anew at the newest on": (
        BAND_FOR,
        [(0, 7, False), (200, 7, False), (300, 6.4, True), (100, 6, False), (499, 6.4, False), (500, 6.4, True)],
    ),
    "per: needs two readings": (RATE, [(0, 6, False), (60, 6.6, True), (120, 7.1, False), (180, 7.7, True)]),
    "per: brought to the minute": (RATE, [(0, 6, False), (30, 6.2, False), (60, 6.5, True), (660, 11, False), (1260, 17, True)]),
    "per: falls are below zero": (leaf("<", -0.5, per="1m"), [(0, 7, False), (60, 6.4, True), (120, 6.0, False)]),
    "per: exactly": (leaf(">=", 0.5, per="1m"), [(0, 6, False), (60, 6.5, True)]),
    "per: an hour": (leaf("between", [-1, 1], per="1h"), [(0, 20, False), (1800, 20.4, True), (3600, 21, False)]),
    "per: text begins anew": (RATE, [(0, 6, False), (60, "broken", False), (120, 9, False), (180, 9.1, False), (240, 9.7, True)]),
    "per: null begins anew": (RATE, [(0, 6, False), (60, None, False), (120, 9, False), (180, 9.6, True)]),
    "per: late ones are passed over": (RATE, [(0, 6, False), (60, 7, True), (30, 99, True), (120, 7.1, False)]),
    "per: a doubled one is one": (RATE, [(0, 6, False), (60, 7, True), (60, 7, True), (120, 7, False)]),
    "per: less than a second is too short": (RATE, [(0, 6, False), (0.999, 6.4, False), (1, 6.5, True), (1.5, 6.1, True)]),
    "increase: since the first reading": (INCREASE, [(0, 100, False), (600, 105, False), (1200, 110, True)]),
    "increase: over a restart": (INCREASE, [(0, 100, False), (600, 108, False), (1200, 2, True)]),
    "increase: what is longer ago does not count": (INCREASE, [(0, 0, False), (60, 10, True), (3700, 10, False)]),
    "increase: late ones are passed over": (INCREASE, [(0, 100, False), (600, 109, False), (300, 0, False), (900, 109, False)]),
    "increase: evenly between two readings": (INCREASE, [(0, 0, False), (7200, 18, False), (7260, 19.5, True)]),
    "increase: what is no number is passed over": (INCREASE, [(0, None, False), (1, "x", False), (2, 0, False), (3, 10, True)]),
    "increase: below zero is no growth": (INCREASE, [(0, 100, False), (600, -5, False), (1200, 5, True)]),
    "median: of as many as asked for": (MEDIAN, [(0, 7, False), (60, 7, False), (120, 7, True)]),
    "median: an outlier changes nothing": (MEDIAN, [(0, 6, False), (60, 6, False), (120, 85, False), (180, 6, False)]),
    "median: two of three do": (MEDIAN, [(0, 6, False), (60, 7, False), (120, 7, True), (180, -127, True), (240, 6, False)]),
    "median: a doubled or late one is passed over": (MEDIAN, [(0, 7, False), (60, 7, False), (60, 7, False), (30, 7, False)]),
    "per: numbers at the end of the range": (RATE, [(0, -1.7e308, False), (60, 1.7e308, True), (120, 10**400, False)]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_condition_over_time_answers_as_its_table_says(name: str) -> None:
    config, table = TABLES[name]
    # Second 0 is some time after 1970, as every reading is.
    arrivals = [at(1000 + seconds, value) for seconds, value, _ in table]

    assert answers(config, arrivals) == [expected for *_, expected in table]


@pytest.mark.parametrize("config", ALL, ids=NAMES)
def test_a_source_that_was_never_seen_is_missing(config: dict[str, object]) -> None:
    scope = Scope(lambda _: None, 1)

    assert not compiled(config).evaluate(scope)
    assert scope.missing == [PH]


@pytest.mark.parametrize("config", ALL, ids=NAMES)
def test_without_memory_nothing_is_true_and_nothing_is_called_missing(config: dict[str, object]) -> None:
    scope = Scope(lambda _: at(1, 99), 1)

    assert not compiled(config).evaluate(scope)
    assert scope.missing == []


@pytest.mark.parametrize("config", ALL, ids=NAMES)
def test_a_sensor_that_falls_silent_turns_nothing_true_and_no_run_is_asked_for(config: dict[str, object]) -> None:
    condition, sample = compiled(config), at(1000, 7)
    memory = {condition.watches[0].key: remembered_after(config, [sample])}
    before = condition.evaluate(Scope(lambda _: sample, sample.timestamp_us, memory))
    scope = Scope(lambda _: sample, sample.timestamp_us + 3600 * SECOND_US, memory)

    assert condition.evaluate(scope) is before
    assert not scope.wakes


def test_hits_grow_old_by_the_time_of_whatever_event_asks() -> None:
    arrivals = [at(1000, 7), at(1001, 7), at(1002, 7)]
    memory = remembered_after(TIMES, arrivals)

    assert answer(TIMES, memory, arrivals[-1], now_us=at(1600, 0).timestamp_us)
    assert not answer(TIMES, memory, arrivals[-1], now_us=at(1601, 0).timestamp_us)


def test_no_more_is_remembered_than_the_hits_that_count() -> None:
    config = leaf(times=MAX_TIMES, within="1d")
    memory = remembered_after(config, [at(second, 7) for second in range(1, 1000)])

    assert len(memory[1]) == MAX_TIMES
    assert len(json.dumps(memory)) < 2_000


def test_what_an_increase_remembers_is_small_and_right_whatever_comes_in() -> None:
    config = leaf(">=", 3599.5, increase="1h")
    arrivals = [at(second, second % 1_000) for second in range(20_000)]
    memory = remembered_after(config, arrivals)
    assert len(memory[1]) < 110
    assert not answer(config, memory, arrivals[-1])
    # Each restart is a step of 0 instead of 1, and what began before the time is counted to a hundredth of it.
    assert answer(leaf(">", 3_550, increase="1h"), memory, arrivals[-1])
    assert not answer(leaf(">", 3_650, increase="1h"), memory, arrivals[-1])
    assert answer(leaf("<", 100, increase="1h"), memory, arrivals[-1], now_us=at(23_500, 0).timestamp_us)


# Times are few, so that readings meet the limits of conditions; a value of each kind on every side of every bound.
values = st.sampled_from([6.0, 6.3, 6.6, 7, "7", True, None, 10**400, -1.7e308])
instants = st.integers(1, 12).map(lambda minutes: minutes * 60 * SECOND_US)
histories = st.dictionaries(instants | instants.map(lambda us: us + 500_000), values, min_size=1, max_size=10).map(
    lambda by_time: [Sample(value, us) for us, value in sorted(by_time.items())]
)
configs = st.sampled_from(
    [
        *ALL,
        leaf(**{"for": "2m"}),
        leaf(times=2, within="3m"),
        leaf("<", 6.2, releaseAt=6.4),
        leaf("<=", 6.0, releaseAt=6.3, **{"for": "2m"}),
        leaf("!=", 7, **{"for": "1m"}),
        leaf("between", [-0.4, 0.4], per="1m"),
    ]
)


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def compares(symbol: str, value: Any, operand: Any) -> bool:
    if symbol == "!=":
        return value is not None and not (is_number(value) and value == operand)
    if not is_number(value):
        return False
    if symbol == "between":
        return bool(operand[0] <= value <= operand[1])
    return bool({">": value > operand, "<": value < operand, "<=": value <= operand}[symbol])


def states_by_the_book(config: dict[str, Any], history: list[Sample]) -> list[bool]:
    """Whether the comparison, with its dead band if it has one, is true at each reading."""
    symbol, states = config["operator"], list[bool]()
    value: Any
    for value, *_ in history:
        true = compares(symbol, value, config["value"])
        if "releaseAt" in config and is_number(value) and not true:
            beyond = value < config["releaseAt"] if symbol == ">" else value > config["releaseAt"]
            true = bool(states) and states[-1] and not beyond
        states.append(true)
    return states


def as_float(value: Value) -> float | None:
    in_range = isinstance(value, int | float) and is_number(value) and abs(value) <= sys.float_info.max
    return float(value) if in_range and value is not None else None


def rate_by_the_book(config: dict[str, Any], history: list[Sample]) -> bool:
    """The readings that count are numbers a second after the one before, and every one that is no number."""
    counted: list[tuple[float | None, int]] = []
    for value, us, *_ in history:
        number = as_float(value)
        if not counted or number is None or counted[-1][0] is None or us - counted[-1][1] >= SECOND_US:
            counted.append((number, us))
    (before, before_us), (after, after_us) = counted[-2:] if len(counted) > 1 else [(None, 0), counted[-1]]
    if before is None or after is None:
        return False
    return compares(config["operator"], (after - before) * 60 * SECOND_US / (after_us - before_us), config["value"])


def by_the_book(config: dict[str, Any], history: list[Sample]) -> bool:
    """The conditions once more, from the whole history in order, sharing nothing with the product."""
    if history[-1].value is None:
        return False
    if "per" in config:
        return rate_by_the_book(config, history)
    states = states_by_the_book(config, history)
    newest_us = history[-1].timestamp_us
    seconds = {"1m": 60, "2m": 120, "3m": 180, "5m": 300, "10m": 600}
    if "times" in config:
        start_us = newest_us - seconds[config["within"]] * SECOND_US
        hits = sum(true and us >= start_us for true, (_, us, *_) in zip(states, history, strict=True))
        return bool(hits >= config["times"])
    if "for" not in config:
        return states[-1]
    falses = [position for position, true in enumerate(states) if not true]
    since = falses[-1] + 1 if falses else 0
    return since < len(history) and newest_us - history[since].timestamp_us >= seconds[config["for"]] * SECOND_US


@UNTIMED
@given(configs, histories)
def test_readings_in_order_are_judged_as_the_whole_history_would_be(
    config: dict[str, Any], history: list[Sample]
) -> None:
    assert answer(config, remembered_after(config, history), history[-1]) is by_the_book(config, history)


@UNTIMED
@given(configs, histories.flatmap(st.permutations))
def test_what_is_remembered_is_the_same_after_every_restart(config: dict[str, Any], arrivals: list[Sample]) -> None:
    kept = remembered_after(config, arrivals)

    assert remembered_after(config, arrivals, stored=True) == json.loads(json.dumps(kept))


@UNTIMED
@given(configs, histories.flatmap(st.permutations))
def test_a_reading_that_was_seen_before_changes_nothing(config: dict[str, Any], arrivals: list[Sample]) -> None:
    memory = remembered_after(config, arrivals)

    for sample in arrivals:
        assert watch_of(config).observe(memory, sample) == memory


@UNTIMED
@given(
    configs.filter(lambda config: "per" not in config),
    histories.flatmap(lambda h: st.tuples(st.just(h), st.permutations(h))),
)
def test_readings_out_of_order_can_only_postpone(
    config: dict[str, Any], history_and_arrivals: tuple[list[Sample], list[Sample]]
) -> None:
    history, arrivals = history_and_arrivals
    late = answer(config, remembered_after(config, arrivals), history[-1])

    assert by_the_book(config, history) or not late
    if "for" not in config:  # of a count and of a dead band the order of arrival takes nothing away
        assert late is by_the_book(config, history)


@UNTIMED
@given(configs.filter(lambda config: "per" not in config), histories, st.integers(0, 9))
def test_a_memory_made_anew_from_the_newest_readings_can_only_postpone(
    config: dict[str, Any], history: list[Sample], lost: int
) -> None:
    kept = history[min(lost, len(history) - 1) :]
    anew = answer(config, remembered_after(config, kept), history[-1])

    assert by_the_book(config, history) or not anew


@UNTIMED
@given(configs, st.lists(st.builds(Sample, values | st.floats() | st.integers(), instants), min_size=1))
def test_no_value_makes_a_condition_over_time_fail(config: dict[str, Any], arrivals: list[Sample]) -> None:
    memory = remembered_after(config, arrivals, stored=True)

    assert answer(config, memory, arrivals[-1]) in (True, False)


def test_a_state_of_a_device_counts_from_its_last_change_and_turns_true_by_itself() -> None:
    condition = compiled(leaf("==", "on", sourceType="device", **{"for": "5m"}))
    changed = at(1000, "on")
    early = Scope(lambda _: changed, at(1001, 0).timestamp_us)
    assert not condition.evaluate(early)
    assert [*early.wakes.values()] == [at(1300, 0).timestamp_us]
    assert [timer.source for timer in condition.timers] == [*early.wakes]

    due = Scope(lambda _: changed, at(1300, 0).timestamp_us)
    assert condition.evaluate(due)
    assert not due.wakes
    assert condition.watches == ()


@pytest.mark.parametrize("state", [at(1000, "off"), at(1000, None), None])
def test_a_state_of_a_device_that_is_another_one_asks_for_no_further_run(state: Sample | None) -> None:
    scope = Scope(lambda _: state, at(1001, 0).timestamp_us)

    assert not compiled(leaf("==", "on", sourceType="device", **{"for": "5m"})).evaluate(scope)
    assert not scope.wakes


def test_a_condition_has_a_watch_for_each_leaf_over_time_and_equal_leaves_share_it() -> None:
    config = {
        "type": "AND",
        "expressions": [FOR, BAND, leaf("<", 9), {"type": "OR", "expressions": [FOR, leaf("<", 1)]}],
    }
    condition = compiled(config)

    assert {watch.key for watch in condition.watches} == {watch_of(FOR).key, watch_of(BAND).key}
    assert all(watch.reference == PH for watch in condition.watches)


@pytest.mark.parametrize(
    "same",
    [
        leaf(**{"for": "300s"}),
        dict(reversed(leaf(**{"for": "5m"}).items())),
        leaf(UUID=SENSOR.upper(), **{"for": "5m"}),
    ],
)
def test_what_is_remembered_outlives_an_edit_that_leaves_the_condition_as_it_was(same: dict[str, object]) -> None:
    assert watch_of(same).key == watch_of(FOR).key


def test_what_is_remembered_is_forgotten_when_the_condition_becomes_another() -> None:
    others = [
        leaf(value=6.6, **{"for": "5m"}),
        leaf(">=", **{"for": "5m"}),
        leaf(key="ec", **{"for": "5m"}),
        leaf(UUID="7c1f4a88-31de-4b6a-8e55-9a0b3c2d1e4f", **{"for": "5m"}),
        leaf(**{"for": "6m"}),
        leaf(times=3, within="5m"),
        leaf(times=4, within="5m"),
        leaf(releaseAt=6.2),
        leaf(releaseAt=6.1),
        leaf(releaseAt=6.1, **{"for": "5m"}),
        leaf(per="5m"),
        leaf("==", "1", **{"for": "5m"}),
        leaf("==", 1, **{"for": "5m"}),
        leaf("==", True, **{"for": "5m"}),
    ]

    assert len({watch_of(config).key for config in [FOR, *others]}) == len(others) + 1


def test_a_dead_band_under_its_older_name_is_the_same_condition() -> None:
    assert watch_of(leaf(off=6.2)).key == watch_of(BAND).key


def test_an_upgrade_forgets_nothing_because_the_key_of_a_memory_stays() -> None:
    assert watch_of(FOR).key == "586725097e183496"


@pytest.mark.parametrize(
    ("config", "days"), [(FOR, 7), (TIMES, 0), (BAND, 7), (RATE, 1)], ids=["for", "times", "releaseAt", "per"]
)
def test_a_watch_asks_for_enough_readings_to_be_made_anew(config: dict[str, object], days: int) -> None:
    watch = watch_of(config)

    assert watch.window_us >= max(days * 86_400, 600 if config is TIMES else 0) * SECOND_US
    assert 100 <= watch.maximum <= 10_000


NO_READINGS = "is for sensors: the state of a device stands until it is changed, and has no readings"
NO_DURATION = "must be a duration such as 10s, 5m, 2h or 1d"
NO_COUNT = "must be a whole number from 1 to 100"
REFUSED: list[tuple[dict[str, object], dict[str, str]]] = [
    ({**FOR, "for": 5}, {"for": NO_DURATION}),
    (leaf(**{"for": "400d"}), {"for": "must not be longer than 366d"}),
    ({**FOR, "for": None}, {"for": NO_DURATION}),
    (leaf(per="soon"), {"per": NO_DURATION}),
    (leaf(times=3), {"within": "is required"}),
    (leaf(within="5m"), {"times": "is required"}),
    (leaf(times=0, within="5m"), {"times": NO_COUNT}),
    (leaf(times=101, within="5m"), {"times": NO_COUNT}),
    (leaf(times=2.0, within="5m"), {"times": NO_COUNT}),
    (leaf(times=True, within="5"), {"times": NO_COUNT, "within": NO_DURATION}),
    (leaf(releaseAt="6"), {"releaseAt": "must be a number"}),
    (leaf(releaseAt=6.5), {"releaseAt": "must be below value, 6.5, for >"}),
    (leaf(">=", releaseAt=7), {"releaseAt": "must be below value, 6.5, for >="}),
    (leaf(off=6.5), {"off": "must be below value, 6.5, for >"}),
    (
        leaf(off=6.2, releaseAt=6.2),
        {"off": "releaseAt, off cannot be combined; only for and releaseAt, and times and within, go together"},
    ),
    (leaf("<", releaseAt=6.5), {"releaseAt": "must be above value, 6.5, for <"}),
    (leaf("<=", releaseAt=6), {"releaseAt": "must be above value, 6.5, for <="}),
    (leaf("==", releaseAt=6), {"releaseAt": "goes with >, >=, <, <= only, not with =="}),
    (leaf("between", [1, 2], releaseAt=1), {"releaseAt": "goes with >, >=, <, <= only, not with between"}),
    (leaf(median=4), {"median": "must be an odd whole number from 3 to 101"}),
    (leaf(median=True), {"median": "must be an odd whole number from 3 to 101"}),
    (leaf("==", median=3), {"median": "goes with >, >=, <, <=, between only, not with =="}),
    (leaf(increase="soon"), {"increase": NO_DURATION}),
    (leaf(sourceType="device", increase="1h"), {"increase": NO_READINGS}),
    (leaf("!=", per="1m"), {"per": "goes with >, >=, <, <=, between only, not with !="}),
    (
        leaf(per="1m", **{"for": "5m"}),
        {"per": "for, per cannot be combined; only for and releaseAt, and times and within, go together"},
    ),
    (
        leaf(times=3, within="1m", releaseAt=6),
        {"releaseAt": "times, within, releaseAt cannot be combined; only for and releaseAt, and times and within, go together"},
    ),
    (leaf(sourceType="device", per="1m"), {"per": NO_READINGS}),
    (leaf(sourceType="device", releaseAt=6), {"releaseAt": NO_READINGS}),
    (
        leaf(sourceType="device", times=2, within="1m"),
        dict.fromkeys(("times", "within"), NO_READINGS),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "problems"), REFUSED)
def test_a_time_key_that_means_nothing_is_refused_with_the_reason(
    config: dict[str, object], problems: dict[str, str]
) -> None:
    assert problems_of(config) == {f"config.{key}": message for key, message in problems.items()}


NO_COMPARISON = [symbol for symbol, described in OPERATORS.items() if not described.compares]


@pytest.mark.parametrize("operator", NO_COMPARISON)
def test_an_operator_that_compares_no_values_has_no_time_keys(operator: str) -> None:
    config = {**leaf(), "operator": operator, **OPERATORS[operator].example, "for": "5m"}
    if "value" not in OPERATORS[operator].example:
        del config["value"]

    expected = f"goes with operators that compare the value, such as >; {operator} does not"
    assert problems_of(config) == {"config.for": expected}


@pytest.mark.parametrize("operator", [symbol for symbol in OPERATORS if symbol not in NO_COMPARISON])
def test_every_operator_that_compares_values_can_be_held_for_a_time(operator: str) -> None:
    config = {**leaf(), "operator": operator, **OPERATORS[operator].example, "for": "5m"}

    for value in (7, 6.5, 10**400, "on", "", "low,leak", "\ud800", True, None):
        assert remembered_after(config, [at(1, value)], stored=True)[3] == at(1, value).timestamp_us
