"""Actions: from JSON to effects, what is refused with its path, texts with places for values, and durations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.models import Role
from rules.engine import chains
from rules.engine.actions import ROLES, SEVERITIES, Action, compile_action
from rules.engine.chains import ChainSpec, NodeSpec, Outcome
from rules.engine.context import Run, Trigger, refuses_nothing
from rules.engine.durations import check_duration, microseconds_of
from rules.engine.effect_types import ClearAlarm, DeviceCommand, Effect, Notify, RaiseAlarm
from rules.engine.exceptions import ChainFailed, InvalidChain
from rules.engine.templating import MAXIMUM_LENGTH, check_template, compile_template
from rules.engine.values import Value
from rules.models import Severity

CHAIN = "7b1c2f60-0a4e-4d2c-9a51-3f1f6d1f0001"
SENSOR = "7b1c2f60-0a4e-4d2c-9a51-3f1f6d1f0002"
PUMP = "7b1c2f60-0a4e-4d2c-9a51-3f1f6d1f0003"
COMMAND = {"type": "device_command", "deviceUuid": PUMP, "stateName": "power", "value": "on"}
NOTIFY = {"type": "notify", "title": "pH", "message": "pH is {ph} at {originator}"}
RAISE = {"type": "raise_alarm", "alarm": "pH too high"}
CLEAR = {"type": "clear_alarm", "alarm": "pH too high"}
ABOUT: dict[str, Any] = {
    "effect_key": f"event-1:{CHAIN}:act", "chain_uuid": CHAIN, "node": "act", "timestamp_us": 7_000_000,
}  # fmt: skip


def trigger(values: Mapping[str, Value], refuses: Any = refuses_nothing) -> Trigger:
    return Trigger(
        event_id="event-1",
        source_type="sensor",
        uuid=SENSOR,
        values=values,
        timestamp_us=7_000_000,
        lookup=lambda reference: None,
        refuses=refuses,
        originator="Reservoir A",
    )


def compiled(config: object) -> Action:
    return compile_action(config, chain_uuid=CHAIN, node="act", path="config")


def effect_of(config: object, **values: Value) -> Effect:
    return compiled(config).act(Run(trigger(values)))


def problems_of(config: object) -> dict[str, str]:
    with pytest.raises(InvalidChain) as raised:
        compiled(config)
    return {problem.path: problem.message for problem in raised.value.problems}


def test_a_command_is_forced_and_rests_only_when_it_says_so() -> None:
    plain: dict[str, Any] = {"device_uuid": PUMP, "state_name": "power", "value": "on"}

    assert effect_of(COMMAND) == DeviceCommand(**ABOUT, **plain)
    assert effect_of({**COMMAND, "force": True, "cooldown": "10m"}) == DeviceCommand(
        **ABOUT, **plain, force=True, cooldown_us=600_000_000
    )


def test_a_notification_has_its_places_filled() -> None:
    config = {**NOTIFY, "severity": "critical", "audience": ["operator", "admin"], "deviceUuid": PUMP.upper()}

    assert effect_of(config, ph=6.9) == Notify(
        **ABOUT, title="pH", message="pH is 6.9 at Reservoir A", severity="critical", originator="Reservoir A",
        roles=("operator", "admin"), device_uuid=PUMP,
    )  # fmt: skip
    plain = effect_of(NOTIFY, ph=6.9)
    assert isinstance(plain, Notify)
    assert (plain.severity, plain.roles, plain.device_uuid) == ("info", (), None)


def test_alarms_have_a_severity_and_a_message_even_when_none_is_given() -> None:
    full = {**RAISE, "severity": "critical", "message": "pH is {ph}"}

    assert effect_of(RAISE) == RaiseAlarm(**ABOUT, alarm="pH too high", severity="warning", message="")
    assert effect_of(full, ph=7) == RaiseAlarm(**ABOUT, alarm="pH too high", severity="critical", message="pH is 7")
    assert effect_of(CLEAR) == ClearAlarm(**ABOUT, alarm="pH too high")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({**COMMAND, "force": "yes"}, {"config.force": "must be true or false"}),
        ({**COMMAND, "force": 1}, {"config.force": "must be true or false"}),
        ({**COMMAND, "cooldown": 10}, {"config.cooldown": "must be a duration"}),
        ({**COMMAND, "cooldown": "0m"}, {"config.cooldown": "must be a duration"}),
        ({**CLEAR, "cooldown": "367d"}, {"config.cooldown": "must not be longer than 366d"}),
        ({"type": "notify"}, {"config.title": "is required", "config.message": "is required"}),
        ({**NOTIFY, "title": " "}, {"config.title": "must be non-empty text"}),
        ({**NOTIFY, "title": "a\nb"}, {"config.title": "must be one line"}),
        ({**NOTIFY, "message": "{ph"}, {"config.message": "has a single {"}),
        ({**NOTIFY, "message": "ph}"}, {"config.message": "has a single }"}),
        ({**NOTIFY, "message": "{}"}, {"config.message": "has a place without a name"}),
        ({**NOTIFY, "message": "{ ph }"}, {"config.message": "has a place without a name"}),
        ({**NOTIFY, "message": "x" * 501}, {"config.message": "must not be longer than 500"}),
        ({**NOTIFY, "message": "a\x00b"}, {"config.message": "must be printable text"}),
        ({**NOTIFY, "severity": "bad"}, {"config.severity": "must be one of info, warning, critical"}),
        ({**NOTIFY, "audience": []}, {"config.audience": "must be a list of roles"}),
        ({**NOTIFY, "audience": "admin"}, {"config.audience": "must be a list of roles"}),
        ({**NOTIFY, "audience": ["admin", "admin"]}, {"config.audience": "must be a list of roles"}),
        ({**NOTIFY, "audience": ["owner"]}, {"config.audience": "must be a list of roles"}),
        ({**NOTIFY, "audience": [[]]}, {"config.audience": "must be a list of roles"}),
        ({**NOTIFY, "deviceUuid": "pump"}, {"config.deviceUuid": "must be a version 4 UUID"}),
        ({**NOTIFY, "titel": "x"}, {"config.titel": "unknown key"}),
        ({"type": "raise_alarm"}, {"config.alarm": "is required"}),
        ({**RAISE, "alarm": "x" * 101}, {"config.alarm": "must not be longer than 100"}),
        ({**RAISE, "alarm": 7}, {"config.alarm": "must be non-empty text"}),
        ({**RAISE, "severity": None, "message": 5}, {"config.severity": "one of", "config.message": "non-empty"}),
        ({**CLEAR, "severity": "info"}, {"config.severity": "unknown key"}),
        ({"type": "email"}, {"config.type": "must be one of device_command, notify, raise_alarm, clear_alarm"}),
    ],
)
def test_what_is_wrong_with_an_action_is_named_with_its_place(config: object, expected: dict[str, str]) -> None:
    found = problems_of(config)

    assert found.keys() == expected.keys()
    assert [path for path, part in expected.items() if part not in found[path]] == []


def test_the_words_for_roles_and_severities_are_those_of_the_tables() -> None:
    assert set(ROLES) == set(Role.values)
    assert list(SEVERITIES) == Severity.values


def chain_with_failure(refuses: Any) -> Outcome:
    nodes = (
        NodeSpec(name="high", type="filter", next="dose", config={
            "sourceType": "sensor", "UUID": SENSOR, "key": "ph", "operator": ">", "value": 6.5,
        }),
        NodeSpec(name="dose", type="action", on_failure="tell", config=COMMAND),
        NodeSpec(name="tell", type="action", config={**NOTIFY, "message": "{error}"}),
    )  # fmt: skip
    chain = chains.compile(ChainSpec(uuid=CHAIN, version=1, nodes=nodes))
    return chain.run(trigger({"ph": 7}, refuses))


def test_a_value_the_state_does_not_allow_takes_the_failure_branch() -> None:
    asked = []

    def refuses(device_uuid: str, state_name: str, value: Value) -> str:
        asked.append((device_uuid, state_name, value))
        return "Pump cannot be set: power must be one of ['off']"

    (told,) = chain_with_failure(refuses).effects

    assert asked == [(PUMP, "power", "on")]
    assert isinstance(told, Notify)
    assert "Pump" in told.message
    assert "['off']" in told.message
    assert [type(effect) for effect in chain_with_failure(refuses_nothing).effects] == [DeviceCommand]


def test_a_value_the_state_does_not_allow_fails_a_run_without_that_branch() -> None:
    with pytest.raises(ChainFailed, match="node 'act': Pump is locked"):
        compiled(COMMAND).act(Run(trigger({}, lambda *_: "Pump is locked")))


@pytest.mark.parametrize(
    ("template", "values", "expected"),
    [
        ("pH is {ph}", {"ph": 6.8999999999999995}, "pH is 6.9"),
        ("{ph}{ph}", {"ph": 7}, "77"),
        ("{a}", {"a": True}, "true"),
        ("{a}", {"a": None}, "unknown"),
        ("{missing} is missing", {}, "unknown is missing"),
        ("{a}", {"a": math.nan}, "no finite number"),
        ("{a}", {"a": 10**400}, "no finite number"),
        ("{a}", {"a": "two\nlines\x00"}, "two lines "),
        ("{a}", {"a": "{b}", "b": "never"}, "{b}"),
        ("{a}", {"a": "x" * 300}, "x" * 100),
        ("{{ph}} at {originator}", {"ph": 1, "originator": "another"}, "{ph} at Reservoir A"),
        ("{ph.__class__}", {"ph": 1}, "unknown"),
        ("{ph!r:>9}", {"ph": 1}, "unknown"),
        ("{0} {ph[0]}", {"ph": "x"}, "unknown unknown"),
    ],
)
def test_places_are_filled_with_values_and_nothing_else(template: str, values: dict[str, Any], expected: str) -> None:
    assert check_template(template) is None
    assert compile_template(template).fill(values, "Reservoir A") == expected


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
PIECES = st.sampled_from(["{", "}", "{{", "}}", "ph", "{ph}", "{originator}", ".", "__class__", "[0]", "!r", ":", " "])


@given(text=st.text() | st.lists(PIECES).map("".join), values=st.dictionaries(st.text(), VALUES), name=st.text())
def test_a_text_is_refused_or_filled_but_never_raises(text: str, values: dict[str, Value], name: str) -> None:
    if check_template(text) is not None:
        return
    filled = compile_template(text).fill(values, name)

    assert len(filled) <= MAXIMUM_LENGTH
    assert all(character.isprintable() or character == "\n" for character in filled)


@given(st.text(alphabet=st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=200))
def test_text_without_places_is_told_as_it_was_written(text: str) -> None:
    escaped = text.replace("{", "{{").replace("}", "}}")

    assert check_template(escaped) is None
    assert compile_template(escaped).fill({}, "x") == text


@given(st.text(min_size=1), st.dictionaries(st.text(), VALUES))
def test_a_place_reaches_no_more_than_the_value_of_its_name(name: str, values: dict[str, Value]) -> None:
    template = f"{{{name}}}"
    if check_template(template) is not None or name in values or name == "originator" or "{" in name or "}" in name:
        return
    assert compile_template(template).fill(values, "x") == "unknown"


@pytest.mark.parametrize(
    ("text", "microseconds"),
    [
        ("1s", 1_000_000),
        ("90s", 90_000_000),
        ("5m", 300_000_000),
        ("2h", 7_200_000_000),
        ("366d", 366 * 86_400_000_000),
    ],
)
def test_a_duration_has_a_unit(text: str, microseconds: int) -> None:
    assert check_duration(text) is None
    assert microseconds_of(text) == microseconds


@pytest.mark.parametrize(
    "value", ["", "5", "m", "0s", "05m", "-5m", "1.5h", "5 m", "5M", "5w", "\u0665m", "5m\n", 5, None, True]
)
def test_what_is_no_duration_is_refused(value: object) -> None:
    assert check_duration(value) == "must be a duration such as 10s, 5m, 2h or 1d"


@pytest.mark.parametrize("value", ["367d", "999999999s", "999999999d"])
def test_a_duration_of_more_than_a_year_is_refused(value: str) -> None:
    assert check_duration(value) == "must not be longer than 366d"
