"""Messages about a device's state, made of its StateChange row: the same message however often it is made."""

from __future__ import annotations

from typing import Any

from devices.commands import NewChange
from devices.models import StateChange
from notifications import messages
from notifications.messages import Message


def message_of(row: StateChange | NewChange, *, priority: int = 5) -> Message:
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


def _payload(row: StateChange | NewChange) -> dict[str, Any]:
    payload = {
        "deviceName": row.state.device.name,
        "stateName": row.state.name,
        "value": row.value,
        "previous": row.previous,
        "source": row.source,
        "actor": row.actor,
        "kind": row.state.kind,
    }
    return payload | ({"deadline": row.deadline.isoformat()} if row.deadline else {})
