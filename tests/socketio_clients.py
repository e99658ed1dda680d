"""Socket.IO clients for tests: the Python and JavaScript libraries', and a bare WebSocket whose frames a test reads itself."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import socketio

from deploy import javascript
from tests.gateway_process import GatewayProcess
from tests.waiting import until

JAVASCRIPT = Path(__file__).resolve().parent / "javascript"


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
def connected(
    gateway: GatewayProcess | str, token: str, *, transport: str = "websocket", **options: Any
) -> Iterator[Client]:
    """To a gateway's process, or to an address."""
    client = Client()
    try:
        client.io.connect(
            gateway if isinstance(gateway, str) else url(gateway),
            **{"auth": {"token": token}, "transports": [transport], "wait_timeout": 10, **options},
        )
        yield client
    finally:
        client.io.disconnect()
        client.io.shutdown()


def url(gateway: GatewayProcess) -> str:
    host, port = gateway.addresses()["socketio"]
    return f"http://{host}:{port}"


class JavaScriptClient:
    """The JavaScript library under node, with everything it received in order; it tries `urls` in turn for ever."""

    def __init__(self, urls: Sequence[str], token: str, *, transports: Sequence[str]) -> None:
        node = shutil.which("node")
        if node is None:
            pytest.skip("node is not on this machine, and JavaScript clients need it")
        options = {"urls": urls, "token": token, "transports": transports}
        self._child = subprocess.Popen(
            [node, str(JAVASCRIPT / "listener.cjs"), json.dumps(options)],
            env={**os.environ, "NODE_PATH": str(javascript.modules(JAVASCRIPT))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def received(self) -> list[tuple[str, Any]]:
        return [(line["event"], line["data"]) for line in list(self.lines) if "event" in line]

    def ids(self) -> list[str]:
        return [data["id"] for _, data in self.received if "id" in data]

    def printed(self, key: str) -> list[Any]:
        """The values of its lines {key: value}."""
        return [line[key] for line in list(self.lines) if key in line]

    def ask(self, event: str, argument: object) -> Any:
        """What the server acknowledges the event with."""
        return self.ask_at_once([[event, argument]])[0]

    def ask_at_once(self, requests: Sequence[Sequence[object]]) -> list[Any]:
        assert self._child.stdin is not None
        before = len(self.printed("answer"))
        self._child.stdin.write("".join(json.dumps(request) + "\n" for request in requests))
        self._child.stdin.flush()
        until(lambda: len(self.printed("answer")) >= before + len(requests))
        return self.printed("answer")[before:]

    def close(self) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        self._child.wait(10)
        self._reader.join(10)
        self._child.stdout.close()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self.lines.append(json.loads(line))


@contextmanager
def javascript_client(urls: Sequence[str], token: str, *, transports: Sequence[str]) -> Iterator[JavaScriptClient]:
    """One that was let in."""
    client = JavaScriptClient(urls, token, transports=transports)
    try:
        until(lambda: client.printed("connected"))
        yield client
    finally:
        client.close()


@contextmanager
def raw_websocket(
    gateway: GatewayProcess, *, token: str = "", receive_buffer: int = 0, **auth: Any
) -> Iterator[socket.socket]:
    """A WebSocket whose bytes the test writes and reads itself; with a token, one that was let in.

    Read from the wire where order matters, because the Python client runs a thread for each event.
    """
    auth = {"token": token, **auth} if token else {}
    with open_websocket(gateway.addresses()["socketio"], receive_buffer=receive_buffer, **auth) as connection:
        yield connection


@contextmanager
def open_websocket(address: tuple[str, int], *, receive_buffer: int = 0, **auth: Any) -> Iterator[socket.socket]:
    """The same at an address; EOFError when the connection ends before it is there."""
    with socket.socket() as connection:
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(10)
        connection.connect(address)
        connection.sendall(
            b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: gateway\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert b" 101 " in _until(connection, b"\r\n\r\n")
        if auth:
            connection.sendall(text_frame(b"40" + json.dumps(auth).encode()))
            _until(connection, b'40{"sid":"')
            _until(connection, b"}")
        yield connection


def _until(connection: socket.socket, end: bytes) -> bytes:
    received = b""
    while not received.endswith(end):
        byte = connection.recv(1)
        if not byte:
            raise EOFError(f"the connection ended after {received!r}")
        received += byte
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
            if len(header) < 2 or header[0] == 0x88:  # the end, said or not
                return
            first, length = header
            assert first == 0x81, "this is no text frame: the one before it was cut off"
            if length > 125:
                length = int.from_bytes(stream.read(2 if length == 126 else 8), "big")
            frame = stream.read(length)
            if len(frame) < length:  # the connection was cut in the middle of it
                return
            if frame.startswith(b"42"):
                event, data = json.loads(frame[2:])
                yield event, data
            time.sleep(pause_seconds)


def messages(connection: socket.socket, *, pause_seconds: float = 0.0, all_with: str = "id") -> Iterator[Any]:
    """The bodies of the messages among the events; of other events, too, that have another key in common."""
    return (data for _, data in events(connection, pause_seconds=pause_seconds) if all_with in data)
