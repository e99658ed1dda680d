"""MQTT topics: messages in, the topics that carry them out; topics in, who speaks on them out; and what a device may do.

    devices/{uuid}/datastream          device -> AEMOS   telemetry
    devices/{uuid}/status              device -> AEMOS   online or offline, also as its last will
    devices/{uuid}/commands/ack        device -> AEMOS   what became of a command
    devices/{uuid}/state               AEMOS -> device   QoS 1, retained: what the state should be
    devices/{uuid}/commands            AEMOS -> device   QoS 2: somebody wants the device to act now
    devices/{uuid}/reported            AEMOS -> others   QoS 1: what the device said of its state; not for the device
    organizations/{uuid}/broadcast     AEMOS -> all      QoS 1: alerts and notifications
    gateways/{name}/status             AEMOS -> all      QoS 1, retained, a last will: online or offline

A sensor has the same topics as a device: both are originators. Pure: no Django, no broker.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import NamedTuple
from uuid import UUID

from notifications.messages import Message, is_desired_change

DATASTREAMS = "devices/+/datastream"
STATUSES = "devices/+/status"
ACKNOWLEDGEMENTS = "devices/+/commands/ack"
GATEWAY_STATUSES = "gateways/+/status"
_ROLE_PREFIX = "device-"


class Address(NamedTuple):
    """Where one message goes: the topic, its quality of service, and whether the broker keeps the last one.

    After its `deadline` it is not sent any more.
    """

    topic: str
    qos: int
    retain: bool = False
    deadline: datetime | None = None
    is_command: bool = False


class Grant(NamedTuple):
    """One line of a role: what the dynamic-security plugin calls the right, and the topic it is for."""

    right: str
    topic: str


def addresses(message: Message) -> list[Address]:
    """Where a message goes, in this order; never empty.

    A change of a device's state that a rule or a person made goes to its state topic and to its commands. What the device
    itself reported goes to neither: it would receive its own report as a desired value, and find it as its desired state when
    it starts again. All else is for the organization, also an alert about one device: the body names the device.

    The state is retained, so that a device that was away or starts without memory learns its desired state as it subscribes.
    One topic keeps one message: a device with several states finds the newest change there, and every change it missed only
    if it keeps a session with the broker. Commands are not retained: a pump must not start again because it reconnects.
    """
    device = message.changed_device
    if device is None:
        return [Address(broadcast(message.organization_uuid), 1, deadline=_expiry(message))]
    if not is_desired_change(message):
        return [Address(reported(device), 1)]
    return [
        Address(state(device), 1, retain=True),
        Address(commands(device), 2, deadline=_deadline(message), is_command=True),
    ]


def _expiry(message: Message) -> datetime | None:
    return datetime.fromtimestamp(message.expires_at, UTC) if message.expires_at is not None else None


def _deadline(message: Message) -> datetime | None:
    text = message.payload.get("deadline")
    return datetime.fromisoformat(text) if text else None


def datastream(originator_uuid: str) -> str:
    return f"devices/{originator_uuid}/datastream"


def status(originator_uuid: str) -> str:
    return f"devices/{originator_uuid}/status"


def state(device_uuid: str) -> str:
    return f"devices/{device_uuid}/state"


def commands(device_uuid: str) -> str:
    return f"devices/{device_uuid}/commands"


def acknowledgements(device_uuid: str) -> str:
    return f"{commands(device_uuid)}/ack"


def reported(device_uuid: str) -> str:
    return f"devices/{device_uuid}/reported"


def gateway_status(name: str) -> str:
    return f"gateways/{name}/status"


def broadcast(organization_uuid: str) -> str:
    return f"organizations/{organization_uuid}/broadcast"


def originator_of(topic: str) -> str | None:
    """The uuid that an inbound topic names, spelled as everywhere else; None when it names none."""
    parts = topic.split("/")
    if len(parts) not in (3, 4) or parts[0] != "devices":
        return None
    try:
        return str(UUID(parts[1]))
    except ValueError:
        return None


def is_status(topic: str) -> bool:
    return topic.endswith("/status")


def role_name(originator_uuid: str) -> str:
    """Names the rights, too: an account with the role of an earlier version is found, and made anew, by names alone."""
    return f"{_ROLE_PREFIX}{originator_uuid}-{_RIGHTS}"


def is_role_of_an_originator(rolename: str) -> bool:
    return rolename.startswith(_ROLE_PREFIX)


def grants(originator_uuid: str, organization_uuid: str) -> list[Grant]:
    """All that one originator may do; the broker refuses everything else. Literal topics: `%u` would be the token.

    Whether a gateway is online concerns them all: without one, a device is on its own.
    """
    speaks = [datastream(originator_uuid), status(originator_uuid), acknowledgements(originator_uuid)]
    hears = [state(originator_uuid), commands(originator_uuid), broadcast(organization_uuid), GATEWAY_STATUSES]
    return [
        *(Grant("publishClientSend", topic) for topic in speaks),
        *(Grant(right, topic) for topic in hears for right in ("subscribeLiteral", "publishClientReceive")),
    ]


_RIGHTS = hashlib.blake2b(repr(grants("", "")).encode(), digest_size=4).hexdigest()
