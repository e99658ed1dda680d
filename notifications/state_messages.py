"""Messages about a device's state, made of its StateChange row: the same message however often it is made."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

from devices.models import DeviceState
from notifications import messages
from notifications.messages import Message


class Row(Protocol):
    """What a message needs of a StateChange, which may not be written yet."""

    uuid: UUID
    effect_key: str
    state: DeviceState
    value: Any
    previous: Any
    source: str
    actor: str
    timestamp: datetime
    deadline: datetime | None


def message_of(row: Row, *, priority: int = 5) -> Message:
    """Its id is the row's uuid: what a device acknowledges, and knows a repetition by. Needs state, device, organization."""
    device = row.state.device
    return Message(
        id=row.uuid,
        effect_key=row.effect_key,
        organization_uuid=str(device.organization.uuid),
        device_uuid=str(device.uuid),
        event=messages.DEVICE_STATE_CHANGE,
        priority=priority,
        timestamp=row.timestamp.isoformat(),
        payload=_payload(row),
    )


def _payload(row: Row) -> dict[str, Any]:
    payload = {
        "deviceName": row.state.device.name,
        "stateName": row.state.name,
        "value": row.value,
        "previous": row.previous,
        "source": row.source,
        "actor": row.actor,
    }
    return payload | ({"deadline": row.deadline.isoformat()} if row.deadline else {})
