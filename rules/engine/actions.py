"""From the JSON of an action to an `Action`, which turns a run's values into one effect.

{"type": "device_command", "deviceUuid": ..., "stateName": "power", "value": "on", "force": true}   or "valueFrom": "mode"
{"type": "notify", "title": "pH", "message": "pH is {ph} at {originator}", "severity": "warning", "audience": ["operator"]}
{"type": "raise_alarm", "alarm": "pH too high", "severity": "critical", "message": "pH is {ph}"}
{"type": "clear_alarm", "alarm": "pH too high"}

Every one of them may have a "cooldown" such as "10m".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from notifications.messages import PRIORITY_BY_SEVERITY
from rules.engine.context import Run
from rules.engine.durations import check_duration, microseconds_of
from rules.engine.effect_types import ClearAlarm, DeviceCommand, Effect, Notify, RaiseAlarm
from rules.engine.exceptions import ChainFailed, InvalidChain, Problem
from rules.engine.fields import Check, Fields, check_name, check_scalar, check_uuid, one_of
from rules.engine.templating import Template, check_template, compile_template
from rules.engine.values import Value

SEVERITIES = tuple(PRIORITY_BY_SEVERITY)
ROLES = ("viewer", "operator", "admin")
MAXIMUM_TITLE = 200
MAXIMUM_ALARM = 100


class Command(NamedTuple):
    """What a device_command node addresses; `path` is its config in the chain, `value` is None if known only at run."""

    path: str
    device_uuid: str
    state_name: str
    value: Value


class Action(NamedTuple):
    """A compiled action: `act(run)` makes its effect, or raises ChainFailed."""

    act: Callable[[Run], Effect]
    commands: tuple[Command, ...] = ()


class _Place(NamedTuple):
    """Where an action stands, and so what all of its effects have in common."""

    chain_uuid: str
    node: str
    path: str
    cooldown_us: int

    def effect_key(self, run: Run) -> str:
        return f"{run.trigger.event_id}:{self.chain_uuid}:{self.node}"

    def about(self, run: Run) -> dict[str, Any]:
        return {
            "effect_key": self.effect_key(run),
            "chain_uuid": self.chain_uuid,
            "node": self.node,
            "timestamp_us": run.trigger.timestamp_us,
            "cooldown_us": self.cooldown_us,
        }

    def failed(self, cause: str) -> ChainFailed:
        return ChainFailed(self.chain_uuid, self.node, cause)


def compile_action(config: object, *, chain_uuid: str, node: str, path: str) -> Action:
    """Compile the action that `config["type"]` names; raises InvalidChain with every problem of the object."""
    problems: list[Problem] = []
    fields = Fields(config, path=path, problems=problems)
    kind = fields.get("type", one_of(ACTIONS))
    if problems:
        raise InvalidChain(problems)
    keys, compile_kind = ACTIONS[kind]
    fields.only(("type", *keys, "cooldown"))
    cooldown = _optional(fields, "cooldown", check_duration, None)
    cooldown_us = microseconds_of(cooldown) if cooldown else 0
    action = compile_kind(fields, _Place(chain_uuid, node, path, cooldown_us))
    if problems:
        raise InvalidChain(problems)
    return action


def _device_command(fields: Fields, place: _Place) -> Action:
    """With either a fixed `value` or a key of the event, `valueFrom`."""
    device_uuid = str(fields.get("deviceUuid", check_uuid)).lower()
    state_name = fields.get("stateName", check_name)
    if "value" in fields and "valueFrom" in fields:
        fields.refuse("valueFrom", "excludes value: give one of the two")
    source = _optional(fields, "valueFrom", check_name, None)
    value = None if "valueFrom" in fields else fields.get("value", _not_a_state)
    force = _optional(fields, "force", _not_a_flag, False)

    def act(run: Run) -> DeviceCommand:
        found = value if source is None else run.values.get(source)
        if found is None:
            raise place.failed(f"the event has no value for {source!r}")
        if refusal := run.trigger.refuses(device_uuid, state_name, found):
            raise place.failed(refusal)
        # As `place.about`, spelled out: commands are what most chains ask for at every reading.
        return DeviceCommand(
            effect_key=place.effect_key(run),
            chain_uuid=place.chain_uuid,
            node=place.node,
            timestamp_us=run.trigger.timestamp_us,
            cooldown_us=place.cooldown_us,
            device_uuid=device_uuid,
            state_name=state_name,
            value=found,
            force=force,
        )

    return Action(act, (Command(place.path, device_uuid, state_name, value),))


def _notify(fields: Fields, place: _Place) -> Action:
    title, message = _template(fields, "title", _not_a_title), _template(fields, "message")
    severity = _optional(fields, "severity", one_of(SEVERITIES), "info")
    roles = tuple(_optional(fields, "audience", _not_an_audience, ()) or ())
    device_uuid = _optional(fields, "deviceUuid", check_uuid, None)
    device_uuid = device_uuid and device_uuid.lower()

    def act(run: Run) -> Notify:
        return Notify(
            **place.about(run),
            title=title.fill(run.values, run.trigger.originator, maximum=MAXIMUM_TITLE),
            message=message.fill(run.values, run.trigger.originator),
            severity=severity,
            originator=run.trigger.originator,
            roles=roles,
            device_uuid=device_uuid,
        )

    return Action(act)


def _raise_alarm(fields: Fields, place: _Place) -> Action:
    alarm = fields.get("alarm", _not_an_alarm)
    severity = _optional(fields, "severity", one_of(SEVERITIES), "warning")
    message = compile_template(_optional(fields, "message", check_template, "") or "")

    def act(run: Run) -> RaiseAlarm:
        text = message.fill(run.values, run.trigger.originator)
        return RaiseAlarm(**place.about(run), alarm=alarm, severity=severity, message=text)

    return Action(act)


def _clear_alarm(fields: Fields, place: _Place) -> Action:
    alarm = fields.get("alarm", _not_an_alarm)
    return Action(lambda run: ClearAlarm(**place.about(run), alarm=alarm))


def _optional(fields: Fields, key: str, check: Check, default: object) -> Any:
    return fields.get(key, check) if key in fields else default


def _template(fields: Fields, key: str, check: Check = check_template) -> Template:
    return compile_template(fields.get(key, check) or "")


def _not_a_title(value: object) -> str | None:
    return check_template(value) or ("must be one line" if "\n" in str(value) else None)


def _not_a_state(value: object) -> str | None:
    """Refuse what no state can hold; text must print, because databases refuse some characters that do not."""
    if isinstance(value, str) and not value.isprintable():
        return "must be printable text"
    return check_scalar(value)


def _not_a_flag(value: object) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _not_an_audience(value: object) -> str | None:
    if isinstance(value, list) and value and all(role in ROLES for role in value) and len(set(value)) == len(value):
        return None
    return f"must be a list of roles, each once: {', '.join(ROLES)}"


def _not_an_alarm(value: object) -> str | None:
    """Refuse what cannot be the type of an alarm, a few words such as "pH too high"."""
    if complaint := check_name(value):
        return complaint
    return None if len(str(value)) <= MAXIMUM_ALARM else f"must not be longer than {MAXIMUM_ALARM} characters"


_Compile = Callable[[Fields, _Place], Action]
ACTIONS: dict[str, tuple[tuple[str, ...], _Compile]] = {
    "device_command": (("deviceUuid", "stateName", "value", "valueFrom", "force"), _device_command),
    "notify": (("title", "message", "severity", "audience", "deviceUuid"), _notify),
    "raise_alarm": (("alarm", "severity", "message"), _raise_alarm),
    "clear_alarm": (("alarm",), _clear_alarm),
}
"""What an action is called in JSON -> its keys besides `type` and `cooldown`, and what compiles it."""
