"""MQTT topics: messages in, the topics that carry them out; topics in, who speaks on them out; and what a device may do.

    devices/{uuid}/datastream          device -> AEMOS   telemetry
    devices/{uuid}/status              device -> AEMOS   online, offline, firmware and the like
    devices/{uuid}/state               AEMOS -> device   QoS 1, retained: what the state should be
    devices/{uuid}/commands            AEMOS -> device   QoS 2: somebody wants the device to act now
    organizations/{uuid}/broadcast     AEMOS -> all      QoS 1: alerts and notifications

A sensor has the same topics as a device: both are originators. Pure: no Django, no broker.
"""

from __future__ import annotations

from typing import NamedTuple
from uuid import UUID

from notifications.messages import DEVICE_STATE_CHANGE, Message

DATASTREAMS = "devices/+/datastream"
STATUSES = "devices/+/status"
# Who asks a device to act. A change that the device itself reported must not come back to it as a command.
COMMANDING_SOURCES = frozenset({"rule", "person"})
_ROLE_PREFIX = "device-"


class Address(NamedTuple):
    """Where one message goes: the topic, its quality of service, and whether the broker keeps the last one."""

    topic: str
    qos: int
    retain: bool = False


class Grant(NamedTuple):
    """One line of a role: what the dynamic-security plugin calls the right, and the topic it is for."""

    right: str
    topic: str


def addresses(message: Message) -> list[Address]:
    """Where a message goes, in this order; never empty.

    A change of a device's state goes to its state topic and, when a rule or a person made it, to its commands. All else is
    for the organization, also an alert about one device: the body names the device.

    The state is retained, so that a device that was away or starts without memory learns its desired state as it subscribes.
    One topic keeps one message: a device with several states finds the newest change there, and every change it missed only
    if it keeps a session with the broker. Commands are not retained: a pump must not start again because it reconnects.
    """
    if message.event != DEVICE_STATE_CHANGE or message.device_uuid is None:
        return [Address(broadcast(message.organization_uuid), 1)]
    found = [Address(state(message.device_uuid), 1, retain=True)]
    if message.payload.get("source") in COMMANDING_SOURCES:
        found.append(Address(commands(message.device_uuid), 2))
    return found


def datastream(originator_uuid: str) -> str:
    return f"devices/{originator_uuid}/datastream"


def status(originator_uuid: str) -> str:
    return f"devices/{originator_uuid}/status"


def state(device_uuid: str) -> str:
    return f"devices/{device_uuid}/state"


def commands(device_uuid: str) -> str:
    return f"devices/{device_uuid}/commands"


def broadcast(organization_uuid: str) -> str:
    return f"organizations/{organization_uuid}/broadcast"


def originator_of(topic: str) -> str | None:
    """The uuid that an inbound topic names, spelled as everywhere else; None when it names none."""
    parts = topic.split("/")
    if len(parts) != 3 or parts[0] != "devices":
        return None
    try:
        return str(UUID(parts[1]))
    except ValueError:
        return None


def is_status(topic: str) -> bool:
    return topic.endswith("/status")


def role_name(originator_uuid: str) -> str:
    return f"{_ROLE_PREFIX}{originator_uuid}"


def is_role_of_an_originator(rolename: str) -> bool:
    return rolename.startswith(_ROLE_PREFIX)


def grants(originator_uuid: str, organization_uuid: str) -> list[Grant]:
    """All that one originator may do; the broker refuses everything else. Literal topics: `%u` would be the token."""
    speaks = [datastream(originator_uuid), status(originator_uuid)]
    hears = [state(originator_uuid), commands(originator_uuid), broadcast(organization_uuid)]
    return [
        *(Grant("publishClientSend", topic) for topic in speaks),
        *(Grant(right, topic) for topic in hears for right in ("subscribeLiteral", "publishClientReceive")),
    ]
