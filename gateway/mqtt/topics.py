"""MQTT topics: messages in, the topics that carry them out; topics in, who speaks on them out; and what a device may do.

    devices/{uuid}/datastream          device -> AEMOS   telemetry
    devices/{uuid}/status              device -> AEMOS   online or offline, also as its last will
    devices/{uuid}/commands/ack        device -> AEMOS   what became of a command
    devices/{uuid}/state/{name}        AEMOS -> device   QoS 1, retained: what a level state should be
    devices/{uuid}/state               AEMOS -> device   QoS 1, retained: the newest change, with all level states beside it
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
MOMENTARY = "momentary"
_ROLE_PREFIX = "device-"
_ENCODED = {ord(character): f"%{ord(character):02X}" for character in "%/+#"}


class Address(NamedTuple):
    """Where one message goes: the topic, its quality of service, and whether the broker keeps the last one.

    After its `deadline` it is not sent any more. `has_snapshot`: all level states of the device are sent with it.
    """

    topic: str
    qos: int
    retain: bool = False
    deadline: datetime | None = None
    is_command: bool = False
    has_snapshot: bool = False


class Grant(NamedTuple):
    """One line of a role: what the dynamic-security plugin calls the right, and the topic it is for."""

    right: str
    topic: str


def addresses(message: Message) -> list[Address]:
    """Where a message goes, in this order; never empty.

    A change of a device's state that a rule or a person made goes to its state topics and to its commands. What the device
    itself reported goes to none of them: it would receive its own report as a desired value, and find it as its desired state
    when it starts again. All else is for the organization, also an alert about one device: the body names the device.

    A level state is retained on a topic of its own, so that a device that was away or starts without memory learns each of its
    desired states as it subscribes. What is momentary is a command and nothing else, and commands are not retained: a doser
    must not dose again because it reconnects.
    """
    device = message.changed_device
    if device is None:
        return [Address(broadcast(message.organization_uuid), 1, deadline=_expiry(message))]
    if not is_desired_change(message):
        return [Address(reported(device), 1)]
    command = Address(commands(device), 2, deadline=_deadline(message), is_command=True)
    if message.payload.get("kind") == MOMENTARY:
        return [command]
    return [
        Address(state_of(device, message.payload["stateName"]), 1, retain=True),
        Address(state(device), 1, retain=True, has_snapshot=True),
        command,
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


def state_of(device_uuid: str, name: str) -> str:
    """Of one state; what a topic cannot hold or has a meaning in it is percent-encoded."""
    return f"{state(device_uuid)}/{name.translate(_ENCODED)}"


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
    hears = [commands(originator_uuid), broadcast(organization_uuid), GATEWAY_STATUSES]
    states = f"{state(originator_uuid)}/#"
    return [
        *(Grant("publishClientSend", topic) for topic in speaks),
        *(Grant(right, topic) for topic in hears for right in ("subscribeLiteral", "publishClientReceive")),
        # All states together, or one of them; also the topic above them.
        *(Grant(right, states) for right in ("subscribePattern", "publishClientReceive")),
    ]


# Since a client id is bound to its account: "bound".
_RIGHTS = hashlib.blake2b(f"bound {grants('', '')!r}".encode(), digest_size=4).hexdigest()
