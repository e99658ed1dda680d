"""Messages that the broker may have forgotten while it was unavailable, to be published again."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

from aemos.lib.batched import batched
from devices import commands
from devices.models import DeviceState, StateChange
from notifications.messages import Message
from notifications.state_messages import message_of

QUERY_ROWS = 500


def newest_states() -> list[Message]:
    """The newest wish to each device, which is what its retained state holds; under the id that it had when it was made."""
    wishes = DeviceState.objects.exclude(command_uuid=None).order_by("device_id", "changed_at")
    newest = {device: uuid for device, uuid in wishes.values_list("device_id", "command_uuid") if uuid}
    return list(_messages(list(newest.values())))


def commands_under_way() -> list[Message]:
    """Commands that were sent, in their order, that no device has acknowledged and that are not overdue."""
    return [message_of(row) for row in commands.under_way()]


def _messages(uuids: list[UUID]) -> Iterator[Message]:
    for batch in batched(uuids, QUERY_ROWS):
        rows = StateChange.objects.filter(uuid__in=batch)
        for row in rows.select_related("state__device__organization").order_by("id"):
            yield message_of(row)
