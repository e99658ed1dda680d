"""Which devices are connected to the broker: update their rows, and notify people of each change."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from uuid import UUID, uuid4

from django.db import transaction

from devices import presence
from devices.models import Device
from notifications import outbox
from notifications.messages import DEVICE_STATUS, Message, Protocol

log = logging.getLogger(__name__)


def record(said: Mapping[UUID, bool]) -> None:
    """Device uuid -> whether it is connected. The same again changes nothing and notifies nobody. Raises django.db.Error."""
    if not said:
        return
    with transaction.atomic():
        changed = presence.record(said)
        outgoing = outbox.write([(_message(row), row.organization_id, row.pk) for row in changed])
    outbox.publish(outgoing)
    for row in changed:
        log.info("%s is %s", row, "online" if row.connected else "offline", extra={"device": str(row.uuid)})


def end(uuids: Collection[UUID]) -> None:
    """The broker's account of these was deleted, and of those it publishes no last will."""
    connected = Device.objects.filter(uuid__in=list(uuids), connected=True).values_list("uuid", flat=True)
    record(dict.fromkeys(connected, False))


def _message(device: Device) -> Message:
    """For people only: over MQTT every device of the farm would hear of every other one, all at once after an outage."""
    since = device.connection_changed_at
    assert since is not None  # noqa: S101  presence has just set it
    return Message(
        id=uuid4(),
        effect_key=f"status:{device.uuid}:{since.isoformat()}",
        organization_uuid=str(device.organization.uuid),
        device_uuid=str(device.uuid),
        event=DEVICE_STATUS,
        priority=5,
        timestamp=since.isoformat(),
        payload={"deviceName": device.name, "status": "online" if device.connected else "offline"},
        protocols=(Protocol.SOCKETIO,),
    )
