"""Messages: what an effect says to devices and people, and which protocols carry it. Pure: no Django, no Redis."""

from __future__ import annotations

from enum import StrEnum
from typing import Any
from uuid import UUID

import msgspec


class Protocol(StrEnum):
    SOCKETIO = "socketio"
    MQTT = "mqtt"
    COAP = "coap"


ALL_PROTOCOLS = (Protocol.SOCKETIO, Protocol.MQTT, Protocol.COAP)

DEVICE_STATE_CHANGE = "device-state-change"
DEVICE_STATUS = "device-status"
ALERT = "alert"
NOTIFICATION = "notification"
EVENTS = (DEVICE_STATE_CHANGE, DEVICE_STATUS, ALERT, NOTIFICATION)

# How urgent a message about something of that severity is: 1 is the most urgent, 10 the least.
PRIORITY_BY_SEVERITY = {"info": 7, "warning": 4, "critical": 1}
# What is at most this number overtakes everything that is not, as an event of the critical lane does.
LEAST_URGENT = 2

# The names that callers of the predecessor's notification API used for a choice of protocols.
_BY_TYPE = {
    "socket": (Protocol.SOCKETIO,),
    "mqtt": (Protocol.MQTT,),
    "coap": (Protocol.COAP,),
    "multi-protocol": ALL_PROTOCOLS,
}


def protocols_for(kind: str) -> tuple[Protocol, ...]:
    """socket, mqtt, coap or multi-protocol; anything else goes out on all three, because too many beats too few."""
    return _BY_TYPE.get(kind, ALL_PROTOCOLS)


class Message(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One notification. `effect_key` is unique: the same effect makes one message, however often its event is processed.

    `device_uuid` addresses one device and those who watch it; without it the whole organization is addressed.
    `timestamp` is when it happened, RFC 3339 in UTC. `payload` is what clients receive under "data". `expires_at`, in epoch
    seconds, is from when on it comes too late: see `has_expired`. `position` is where it stands in the notification stream;
    empty until it is published. `trace` is the W3C traceparent of what led to it, or empty.
    """

    id: UUID
    effect_key: str
    organization_uuid: str
    event: str
    priority: int
    payload: dict[str, Any]
    timestamp: str
    device_uuid: str | None = None
    protocols: tuple[Protocol, ...] = ALL_PROTOCOLS
    expires_at: float | None = None
    position: str = ""
    trace: str = ""

    @property
    def is_urgent(self) -> bool:
        return self.priority <= LEAST_URGENT

    @property
    def addressee(self) -> str:
        """Messages with the same addressee keep their order, whatever their priorities."""
        return self.device_uuid or self.organization_uuid

    @property
    def changed_device(self) -> str | None:
        """The device whose state it reports a change of; None when it is about something else."""
        return self.device_uuid if self.event == DEVICE_STATE_CHANGE else None


def has_expired(message: Message, now: float) -> bool:
    """Whether it must not be sent any more. A device's state is never too old to be sent, because devices and observers
    converge on it; what expires of it is the command, and that is for the transport to leave out."""
    if message.event == DEVICE_STATE_CHANGE or message.expires_at is None:
        return False
    return now >= message.expires_at


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes, *, position: str = "") -> Message:
    """The message again, which stands at `position` of the stream; msgspec.DecodeError when the bytes are none."""
    return msgspec.structs.replace(_decoder.decode(data), position=position)


def body(message: Message) -> dict[str, Any]:
    """What every protocol sends, as JSON-ready data: the same keys on Socket.IO, MQTT and CoAP."""
    return {
        "id": str(message.id),
        "event": message.event,
        "organization": message.organization_uuid,
        "device": message.device_uuid,
        "priority": message.priority,
        "timestamp": message.timestamp,
        "data": message.payload,
    }


# Who asks a device to act. A change that the device itself reported must not come back to it as a command.
COMMANDING_SOURCES = frozenset({"rule", "person", "interlock"})


def is_desired_change(message: Message) -> bool:
    """Whether a change of state is one that the device is to make, not one that it has reported."""
    return message.payload.get("source") in COMMANDING_SOURCES
