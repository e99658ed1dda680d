"""The client that reads many MQTT messages at a time: whatever way the bytes are cut, and whatever they are."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from gateway.mqtt.receiving import Publication, ReceivingClient
from tests.waiting import until

CONNACK = bytes([0x20, 3, 0, 0, 0])
PINGRESP = bytes([0xD0, 0])


def packet(command: int, body: bytes) -> bytes:
    length, encoded = len(body), bytearray()
    while True:
        length, byte = length >> 7, length & 0x7F
        encoded.append(byte | 0x80 if length else byte)
        if not length:
            return bytes([command, *encoded]) + body


def publish(topic: str, payload: bytes, *, mid: int = 0, flags: int = 0, properties: bytes = b"") -> bytes:
    name = topic.encode()
    number = mid.to_bytes(2, "big") if mid else b""
    body = len(name).to_bytes(2, "big") + name + number + bytes([len(properties)]) + properties + payload
    return packet(0x30 | flags, body)


class Broker:
    """Accepts one connection after another, and sends what it is told to."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener

    def accept(self) -> socket.socket:
        connection, _ = self._listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.recv(1_000)
        connection.sendall(CONNACK)
        return connection


@contextmanager
def connected() -> Iterator[tuple[Broker, list[Publication]]]:
    received: list[Publication] = []
    client = ReceivingClient(
        CallbackAPIVersion.VERSION2, client_id="x", protocol=MQTTProtocolVersion.MQTTv5, manual_ack=True
    )
    client.on_message = lambda _client, _data, message: received.append(message)  # type: ignore[arg-type]  # not paho's
    client.reconnect_delay_set(1, 1)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        client.connect_async("127.0.0.1", listener.getsockname()[1])
        client.loop_start()
        try:
            yield Broker(listener), received
        finally:
            client.disconnect()
            client.loop_stop()


STREAM = b"".join(
    (
        publish("a", b"first", mid=7, flags=0x02),
        PINGRESP,
        publish("b", b"", mid=8, flags=0x0A | 0x01, properties=bytes([0x01, 1])),
        publish("c", b"x" * 70_000),
        publish("a", b"last", mid=9, flags=0x02),
    )
)
EXPECTED = [
    Publication("a", b"first", 7, 1, retain=False, dup=False),
    Publication("b", b"", 8, 1, retain=True, dup=True),
    Publication("c", b"x" * 70_000, 0, 0, retain=False, dup=False),
    Publication("a", b"last", 9, 1, retain=False, dup=False),
]


@pytest.mark.parametrize("piece", [1, 2, 7, 1_460, 1_000_000])
def test_messages_are_the_same_whatever_pieces_they_come_in(piece: int) -> None:
    with connected() as (broker, received), closing(broker.accept()) as connection:

        def send() -> None:
            # Byte by byte only where something is to be cut: 70,000 system calls show no more than a few hundred.
            small = STREAM.index(b"x" * 100) if piece < 100 else 0
            for start in range(0, small, piece):
                connection.sendall(STREAM[start : min(start + piece, small)])
            for start in range(small, len(STREAM), max(piece, 1_000)):
                connection.sendall(STREAM[start : start + max(piece, 1_000)])

        sender = threading.Thread(target=send)
        sender.start()
        until(lambda: len(received) == len(EXPECTED), seconds=20)
        sender.join()
        assert received == EXPECTED


@pytest.mark.parametrize(
    "broken",
    [
        bytes([0x32, 0x80, 0x80, 0x80, 0x80, 0x01]),
        packet(0x32, b"\x00"),
        packet(0x32, b"\x00\x05ab"),
        packet(0x32, b"\x00\x01a\x00\x01\x7fpayload"),
        packet(0x60, b""),
    ],
    ids=["length of five bytes", "no topic", "topic cut", "properties too long", "no packet a broker sends"],
)
def test_a_broker_that_sends_what_is_no_mqtt_is_left_and_connected_to_again(broken: bytes) -> None:
    with connected() as (broker, received):
        with closing(broker.accept()) as connection:
            connection.sendall(publish("a", b"1", mid=1, flags=0x02) + broken)
            assert connection.recv(100) in (b"", b"\xe0\x00", b"\xe0\x02\x81\x00")
        with closing(broker.accept()) as connection:
            connection.sendall(publish("a", b"2", mid=2, flags=0x02))
            until(lambda: [message.payload for message in received] == [b"1", b"2"], seconds=20)


def test_half_a_message_of_a_lost_connection_is_forgotten() -> None:
    with connected() as (broker, received):
        with closing(broker.accept()) as connection:
            connection.sendall(publish("a", b"lost", mid=1, flags=0x02)[:-2])
        with closing(broker.accept()) as connection:
            connection.sendall(publish("a", b"whole", mid=1, flags=0x02))
            until(lambda: [message.payload for message in received] == [b"whole"], seconds=20)


def test_a_topic_that_is_no_text_belongs_to_nobody() -> None:
    body = b"\x00\x02\xff\xfe\x00\x01\x00payload"
    with connected() as (broker, received), closing(broker.accept()) as connection:
        connection.sendall(packet(0x32, body))
        until(lambda: received, seconds=20)
        assert received[0].topic == "\ufffd\ufffd"
