"""An MQTT client for sessions through which much comes in: paho's, but it reads messages many at a time.

paho reads each message with a select and three calls of recv, and makes objects of properties that nobody asks for: four times
the processor time that AEMOS takes for all else. Here one recv reads what is there, and PUBLISH packets are taken apart in place
(MQTT 5.0, section 3.3). Every other packet, and all that is sent, is paho's.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from typing import NamedTuple

import paho.mqtt.client as mqtt
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.exception import MalformedPacket

READ_BYTES = 65_536
_PUBLISH, _RETAIN, _QOS_2, _DUP = 0x30, 0x01, 0x04, 0x08
_PUBACK, _ACKNOWLEDGEMENT = 0x40, struct.Struct("!BBH")
# A user property, as it begins on the wire, and how long the whole of it is.
_TRACEPARENT = b"\x26\x00\x0btraceparent\x00\x37"
_TRACEPARENT_BYTES = len(_TRACEPARENT) + 55


class Publication(NamedTuple):
    """What `on_message` is given, by paho's names. Of properties there is only the traceparent."""

    topic: str
    payload: bytes
    mid: int
    qos: int
    retain: bool
    dup: bool
    trace: str = ""


class _Malformed(Exception):
    """The broker sent what is no MQTT."""


class ReceivingClient(mqtt.Client):
    """To be made with MQTTv5 and `manual_ack`, and to subscribe with QoS 0 or 1."""

    # Overrides what paho 2.2.0 keeps to itself: tests/test_mqtt_receiving.py says whether another version may take its place.
    _received = bytearray()

    def reconnect(self) -> MQTTErrorCode:
        self._received = bytearray()  # of a connection that was lost in the middle of a packet
        return super().reconnect()

    def _packet_read(self) -> MQTTErrorCode:
        try:
            data = self._sock_recv(READ_BYTES)
        except BlockingIOError:
            return MQTTErrorCode.MQTT_ERR_AGAIN
        except OSError:
            return MQTTErrorCode.MQTT_ERR_CONN_LOST
        if not data:
            return MQTTErrorCode.MQTT_ERR_CONN_LOST
        with self._msgtime_mutex:
            self._last_bytes_received = time.monotonic()
        self._received += data
        try:
            return self._take_packets()
        except (_Malformed, MalformedPacket):
            return MQTTErrorCode.MQTT_ERR_PROTOCOL

    def acknowledge(self, mids: Sequence[int]) -> None:
        """Sends the PUBACKs of all of them in one piece: paho's own wakes its thread, and writes, for each (section 3.4)."""
        self._packet_queue(_PUBACK, b"".join(_ACKNOWLEDGEMENT.pack(_PUBACK, 2, mid) for mid in mids), mids[0], 1)

    def _take_packets(self) -> MQTTErrorCode:
        """All that are complete."""
        received, start, answer = self._received, 0, MQTTErrorCode.MQTT_ERR_SUCCESS
        while answer == MQTTErrorCode.MQTT_ERR_SUCCESS and (found := _packet(received, start)):
            body, end = found
            command = received[start]
            if command & 0xF0 == _PUBLISH and not command & _QOS_2:
                with self._in_callback_mutex:
                    if self.on_message:
                        self.on_message(self, None, _publication(command, bytes(received[body:end])))  # type: ignore[arg-type]
            else:
                answer = self._let_paho_handle(command, received[body:end])
            start = end
        del received[:start]
        return answer

    def _let_paho_handle(self, command: int, body: bytearray) -> MQTTErrorCode:
        self._in_packet = {
            **self._in_packet,
            "command": command,
            "packet": body,
            "remaining_length": len(body),
            "pos": 0,
        }
        return self._packet_handle()


def _packet(data: bytearray, start: int) -> tuple[int, int] | None:
    """Where the body of the packet that starts there begins and ends; None when it is not complete."""
    length, shift = 0, 0
    for place in range(start + 1, min(start + 5, len(data))):
        length |= (data[place] & 0x7F) << shift
        if data[place] < 0x80:
            end = place + 1 + length
            return (place + 1, end) if end <= len(data) else None
        shift += 7
    if len(data) >= start + 5:
        raise _Malformed("a length of more than four bytes")
    return None


def _publication(command: int, body: bytes) -> Publication:
    qos = command >> 1 & 0x03
    try:
        place = 2 + int.from_bytes(body[:2], "big")
        # What is no UTF-8 becomes a topic that belongs to nobody, and is refused as such.
        topic = body[2:place].decode(errors="replace")
        mid = int.from_bytes(body[place : place + 2], "big") if qos else 0
        place += 2 if qos else 0
        properties, shift = 0, 0
        while True:
            byte = body[place]
            place += 1
            properties |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
    except IndexError:
        raise _Malformed("a PUBLISH that ends too soon") from None
    if place + properties > len(body):
        raise _Malformed("properties that are longer than the packet")
    trace = _traceparent(body[place : place + properties]) if properties >= _TRACEPARENT_BYTES else ""
    place += properties
    return Publication(topic, body[place:], mid, qos, bool(command & _RETAIN), bool(command & _DUP), trace)


def _traceparent(properties: bytes) -> str:
    """The value of the user property (section 2.2.2.2) of that name; empty where there is none."""
    place = properties.find(_TRACEPARENT)
    if place < 0:
        return ""
    return properties[place + len(_TRACEPARENT) :][:55].decode(errors="replace")
