"""From the JSON of an action to an `Action`, which turns a run's values into one effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from rules.configuration import Fields, not_a_name, not_a_scalar, not_a_uuid, one_of
from rules.exceptions import ChainFailed, InvalidChain, Problem
from rules.scope import Run, Value

DEVICE_COMMAND_KEYS = ("type", "deviceUuid", "stateName", "value", "valueFrom")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCommand:
    """One state of one device is to be set; `effect_key` is the same whenever the same event meets the same node.

    `timestamp_us` is the event's own, in microseconds since 1970 (UTC).
    """

    effect_key: str
    chain_uuid: str
    node: str
    device_uuid: str
    state_name: str
    value: Value
    timestamp_us: int


Effect = DeviceCommand


class Command(NamedTuple):
    """What a device_command node addresses; `path` is its config in the chain, `value` is None if known only at run."""

    path: str
    device_uuid: str
    state_name: str
    value: Value


class Action(NamedTuple):
    """A compiled action: `act(run)` makes its effect, or raises ChainFailed."""

    act: Callable[[Run], Effect]
    commands: tuple[Command, ...]


def compile_action(config: object, *, chain_uuid: str, node: str, path: str) -> Action:
    """Compile the action that `config["type"]` names; raises InvalidChain with every problem of the object."""
    problems: list[Problem] = []
    kind = Fields(config, path=path, problems=problems).get("type", one_of(ACTIONS))
    if problems:
        raise InvalidChain(problems)
    return ACTIONS[kind](config, chain_uuid=chain_uuid, node=node, path=path)


def _compile_device_command(config: object, *, chain_uuid: str, node: str, path: str) -> Action:
    """Compile `{"type", "deviceUuid", "stateName"}` with either a fixed `value` or a key of the event, `valueFrom`."""
    problems: list[Problem] = []
    fields = Fields(config, path=path, problems=problems)
    fields.only(DEVICE_COMMAND_KEYS)
    device_uuid = fields.get("deviceUuid", not_a_uuid)
    state_name = fields.get("stateName", not_a_name)
    if "value" in fields and "valueFrom" in fields:
        fields.refuse("valueFrom", "excludes value: give one of the two")
    source = fields.get("valueFrom", not_a_name) if "valueFrom" in fields else None
    value = None if "valueFrom" in fields else fields.get("value", _not_a_state)
    if problems:
        raise InvalidChain(problems)

    device_uuid = device_uuid.lower()
    key_suffix = f":{chain_uuid}:{node}"

    def act(run: Run) -> DeviceCommand:
        found = value if source is None else run.values.get(source)
        if found is None:
            raise ChainFailed(chain_uuid, node, f"the event has no value for {source!r}")
        return DeviceCommand(
            effect_key=run.trigger.event_id + key_suffix,
            chain_uuid=chain_uuid,
            node=node,
            device_uuid=device_uuid,
            state_name=state_name,
            value=found,
            timestamp_us=run.trigger.timestamp_us,
        )

    return Action(act, (Command(path, device_uuid, state_name, value),))


def _not_a_state(value: object) -> str | None:
    """Refuse what no state can hold; text must print, because databases refuse some characters that do not."""
    if isinstance(value, str) and not value.isprintable():
        return "must be printable text"
    return not_a_scalar(value)


class _Compile(Protocol):
    def __call__(self, config: object, *, chain_uuid: str, node: str, path: str) -> Action: ...


ACTIONS: dict[str, _Compile] = {"device_command": _compile_device_command}
