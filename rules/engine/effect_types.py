"""Effects that actions ask for: commands, notifications, alarms. Structs, because frozen dataclasses take long to make."""

from __future__ import annotations

import msgspec

from rules.engine.values import Value


class Effect(msgspec.Struct, frozen=True, kw_only=True):
    """What an action asks for; `effect_key` is the same whenever the same event meets the same node.

    `timestamp_us` is the event's own, in microseconds since 1970 (UTC). `cooldown_us` is for how long the action rests after
    it was done for this originator, 0 for not at all.
    """

    effect_key: str
    chain_uuid: str
    node: str
    timestamp_us: int
    cooldown_us: int = 0


class DeviceCommand(Effect, frozen=True, kw_only=True):
    """One state of one device is to be set; with `force` also when it has the value already. `vetoed`: it must not be, and the
    chain has taken another way."""

    device_uuid: str
    state_name: str
    value: Value
    force: bool = False
    vetoed: bool = False


class Notify(Effect, frozen=True, kw_only=True):
    """A notification to the members with these roles, or to all; about a device, or about none.

    `originator` is the name of what the event comes from.
    """

    title: str
    message: str
    severity: str
    originator: str = ""
    roles: tuple[str, ...] = ()
    device_uuid: str | None = None


class RaiseAlarm(Effect, frozen=True, kw_only=True):
    """The alarm of that type is to be active where the chain's first condition looks."""

    alarm: str
    severity: str
    message: str


class ClearAlarm(Effect, frozen=True, kw_only=True):
    """The alarm of that type is over there."""

    alarm: str
