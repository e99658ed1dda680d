"""What chains leave on when they are switched off, deleted, suspended, or edited so that they command a state no more.

What a state is set to was commanded last by the change that its row names, whose effect key names the chain.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from devices.models import DeviceState, StateChange
from rules.engine.fields import check_uuid
from rules.models import RuleChain, RuleNode

Target = tuple[str, str]
"""The uuid of a device and the name of its state."""


class LeftOn(NamedTuple):
    """A state that a chain set last, and to what. `goes_off`: when the chain ends, it goes to its safe value."""

    state: DeviceState
    goes_off: bool

    def __str__(self) -> str:
        ending = f"goes to {self.state.safe_value!r}" if self.goes_off else "stays so: it has no safe value"
        return f"{self.state} is {self.state.value!r} and {ending}"


def reasons_of(ids: Collection[int]) -> dict[int, str]:
    """Of states that are on, those that a chain has switched on which does not command them any more, each with the reason."""
    commanding = DeviceState.objects.filter(pk__in=ids).exclude(command_uuid=None)
    by_rules = StateChange.objects.filter(
        uuid__in=commanding.values("command_uuid"), source=StateChange.Source.RULE
    ).select_related("state__device")
    rows = [row for row in by_rules if row.state.is_on(row.value)]
    rows = [row for row in rows if _chain_of(row.effect_key)]
    wanted = {_chain_of(row.effect_key) for row in rows}
    if not wanted:
        return {}
    running = {str(chain.uuid): chain for chain in RuleChain.objects.running().filter(uuid__in=wanted)}
    targets = _targets_of(running.values())
    return {
        row.state_id: f"{row.actor} had switched it on, and does so no more"
        for row in rows
        if (str(row.state.device.uuid), row.state.name) not in targets.get(_chain_of(row.effect_key), ())
    }


def left_on(chain: RuleChain) -> list[LeftOn]:
    """What stands as the chain has set it last, but for what is off."""
    states = DeviceState.objects.filter(device__organization=chain.organization_id).exclude(command_uuid=None)
    own = StateChange.objects.filter(
        uuid__in=states.values("command_uuid"), source=StateChange.Source.RULE, effect_key__contains=f":{chain.uuid}:"
    )
    found = states.filter(command_uuid__in=own.values("uuid"), kind=DeviceState.Kind.LEVEL)
    rows = found.select_related("device").order_by("device__name", "name")
    return [LeftOn(row, row.safe_value is not None) for row in rows if row.safe_value is None or row.is_on(row.value)]


def _chain_of(effect_key: str) -> str:
    """<event>:<chain>:<node>; empty for another key."""
    parts = effect_key.split(":", 2)
    return parts[1] if len(parts) == 3 and not check_uuid(parts[1]) else ""


def _targets_of(chains: Iterable[RuleChain]) -> dict[str, set[Target]]:
    """By uuid of the chain, what its actions command."""
    found: dict[str, set[Target]] = {str(chain.uuid): set() for chain in chains}
    nodes = RuleNode.objects.filter(chain__uuid__in=found).values_list("chain__uuid", "config")
    for uuid, config in nodes:
        if config.get("type") == "device_command":
            found[str(uuid)].add((str(config.get("deviceUuid", "")).lower(), str(config.get("stateName", ""))))
    return found
