"""Socket.IO clients for tests: the Python library's, and a bare WebSocket whose frames a test reads itself."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import socketio

from tests.gateway_process import GatewayProcess


class Client:
    """The real client, with everything it received in order."""

    def __init__(self) -> None:
        # Reconnecting would hide that the server has ended the connection.
        self.io = socketio.Client(reconnection=False)
        self.received: list[tuple[str, Any]] = []
        self.positions: list[str] = []
        self.io.on("*", lambda event, data: self.received.append((event, data)))
        self.io.on("position", lambda data: self.positions.append(data["position"]))

    def ids(self) -> list[str]:
        return [data["id"] for _, data in self.received if "id" in data]

    def ask(self, event: str, *arguments: object) -> dict[str, Any]:
        """What the server acknowledges the event with."""
        answer: dict[str, Any] = self.io.call(event, arguments, timeout=10)
        return answer


@contextmanager
def connected(gateway: GatewayProcess, token: str, *, transport: str = "websocket", **options: Any) -> Iterator[Client]:
    client = Client()
    try:
        client.io.connect(
            url(gateway), **{"auth": {"token": token}, "transports": [transport], "wait_timeout": 10, **options}
        )
        yield client
    finally:
        client.io.disconnect()
        client.io.shutdown()


def url(gateway: GatewayProcess) -> str:
    host, port = gateway.addresses()["socketio"]
    return f"http://{host}:{port}"


@contextmanager
def raw_websocket(
    gateway: GatewayProcess, *, token: str = "", receive_buffer: int = 0, **auth: Any
) -> Iterator[socket.socket]:
    """A WebSocket whose bytes the test writes and reads itself; with a token, one that was let in.

    Read from the wire where order matters, because the Python client runs a thread for each event.
    """
    with socket.socket() as connection:
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(10)
        connection.connect(gateway.addresses()["socketio"])
        connection.sendall(
            b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: gateway\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert b" 101 " in _until(connection, b"\r\n\r\n")
        if token:
            connection.sendall(text_frame(b"40" + json.dumps({"token": token, **auth}).encode()))
            _until(connection, b'40{"sid":"')
            _until(connection, b"}")
        yield connection


def _until(connection: socket.socket, end: bytes) -> bytes:
    received = b""
    while not received.endswith(end):
        received += connection.recv(1)
    return received


def text_frame(data: bytes) -> bytes:
    """RFC 6455 5.2, masked with zeros, which change nothing."""
    if len(data) < 126:
        length = bytes([0x80 | len(data)])
    elif len(data) < 65536:
        length = b"\xfe" + len(data).to_bytes(2, "big")
    else:
        length = b"\xff" + len(data).to_bytes(8, "big")
    return b"\x81" + length + bytes(4) + data


def events(connection: socket.socket, *, pause_seconds: float = 0.0) -> Iterator[tuple[str, Any]]:
    """Each event that comes, name and data, frame after frame."""
    with connection.makefile("rb") as stream:
        while True:
            header = stream.read(2)
            if header[:1] in (b"", b"\x88"):  # the end, said or not
                return
            first, length = header
            assert first == 0x81, "this is no text frame: the one before it was cut off"
            if length > 125:
                length = int.from_bytes(stream.read(2 if length == 126 else 8), "big")
            frame = stream.read(length)
            if frame.startswith(b"42"):
                event, data = json.loads(frame[2:])
                yield event, data
            time.sleep(pause_seconds)


def messages(connection: socket.socket, *, pause_seconds: float = 0.0) -> Iterator[Any]:
    """The bodies of the messages among the events."""
    return (data for _, data in events(connection, pause_seconds=pause_seconds) if "id" in data)
