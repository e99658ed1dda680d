"""What the broker has to hold for devices: the newest messages of level states, and the snapshot of all states of a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID

from aemos.lib.batched import batched
from devices import catalogue, commands
from devices.models import DeviceState, StateChange
from gateway.mqtt import topics
from notifications import messages
from notifications.messages import Message
from notifications.state_messages import message_of

QUERY_ROWS = 500


class Snapshots:
    """The desired values of all level states by device, as the messages say that have passed. Used from one thread."""

    def __init__(self) -> None:
        self._states: dict[str, dict[str, Any]] = {}

    def note(self, message: Message) -> None:
        """The change that the message reports was sent."""
        states = self._states.setdefault(message.changed_device or "", {})
        states[message.payload["stateName"]] = {"value": message.payload["value"], "changedAt": message.timestamp}

    def body(self, message: Message) -> dict[str, Any]:
        """The message with all level states of its device beside it."""
        device = message.changed_device or ""
        states = self._states.get(device, {})
        known = catalogue.shared().originator("device", device)
        if known is not None:  # without what was renamed, deleted or is momentary now
            held = {name for name, field in known.fields.items() if not field.is_momentary}
            states = {name: state for name, state in states.items() if name in held}
        return {**messages.body(message), "states": states}


def newest_states() -> list[Message]:
    """The newest wish to each level state, which its retained topic holds; under the id that it had when it was made. Those of
    one device stand together, the newest last. Raises django.db.Error."""
    wishes = DeviceState.objects.exclude(command_uuid=None).filter(kind=DeviceState.Kind.LEVEL)
    rows = wishes.order_by("device_id", "changed_at").values_list("command_uuid", flat=True)
    order = {uuid: position for position, uuid in enumerate(rows) if uuid}
    return sorted(_messages(list(order)), key=lambda message: order[message.id])


def topics_to_clear() -> list[str]:
    """Retained topics that must hold nothing, because what they may hold from earlier was momentary. Raises django.db.Error."""
    momentary = DeviceState.objects.filter(kind=DeviceState.Kind.MOMENTARY).exclude(command_uuid=None)
    levels = DeviceState.objects.filter(kind=DeviceState.Kind.LEVEL).exclude(command_uuid=None)
    with_levels = set(levels.filter(device__in=momentary.values("device")).values_list("device__uuid", flat=True))
    found: dict[str, None] = {}
    for device, name in momentary.values_list("device__uuid", "name"):
        found[topics.state_of(str(device), name)] = None
        if device not in with_levels:
            found[topics.state(str(device))] = None
    return list(found)


def commands_under_way() -> list[Message]:
    """Commands that were sent, in their order, that no device has acknowledged and that are not overdue."""
    return [message_of(row) for row in commands.under_way()]


def _messages(uuids: list[UUID]) -> Iterator[Message]:
    for batch in batched(uuids, QUERY_ROWS):
        rows = StateChange.objects.filter(uuid__in=batch)
        for row in rows.select_related("state__device__organization").order_by("id"):
            yield message_of(row)
