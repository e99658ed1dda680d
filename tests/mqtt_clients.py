"""MQTT clients as devices and operators have them."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import paho.mqtt.client as mqtt
from django.db import OperationalError
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from deploy.programs import get
from deploy.servers import Server
from devices import tokens
from tests.waiting import WAIT_SECONDS, until

T = TypeVar("T")


def patient(execute: Callable[..., T], sql: str, params: Any, many: bool, context: dict[str, Any]) -> T:
    """An execute wrapper: SQLite in memory, unlike a file, does not wait for another thread's statement to end."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return execute(sql, params, many, context)
        except OperationalError as error:
            if "is locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


class Client:
    """A connected paho client. `received` holds (topic, payload); `connected` follows the connection."""

    def __init__(
        self,
        broker: Server,
        username: str | None,
        password: str | None,
        *,
        will: tuple[str, str] | None = None,
        session: str = "",
    ) -> None:
        """`session` is the client id of a session that lasts while the client is away. A device's is its user name."""
        self.received: list[tuple[str, bytes]] = []
        self.connected = threading.Event()
        self.connections = 0
        self.refusals: list[str] = []
        self._subscribed: dict[int, list[Any]] = {}
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id=session or self._own_id(broker, username), protocol=mqtt.MQTTv5
        )
        if username:
            self._client.username_pw_set(username, password)
        if will:
            self._client.will_set(*will, qos=1)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = lambda *_: self.connected.clear()
        self._client.on_subscribe = lambda _client, _data, mid, reasons, _: self._subscribed.update({mid: reasons})
        self._client.on_message = lambda _client, _data, message: self.received.append(
            (message.topic, bytes(message.payload))
        )
        self._client.reconnect_delay_set(1, 1)
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = 3600 if session else 0
        self._client.connect_async(
            "127.0.0.1", broker.port, keepalive=10, clean_start=not session, properties=properties
        )
        self._client.loop_start()

    @staticmethod
    def _own_id(broker: Server, username: str | None) -> str:
        return username if username and username != broker.username else ""

    def _on_connect(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self.refusals.append(str(reason))
        else:
            self.connections += 1
            self.connected.set()

    def subscribe(self, topic: str, qos: int = 1) -> bool:
        """Whether the broker granted it."""
        _, mid = self._client.subscribe(topic, qos=qos)
        assert mid is not None
        return not until(lambda: self._subscribed.get(mid, []))[0].is_failure

    def publish(self, topic: str, payload: str | bytes, qos: int = 1, *, retain: bool = False) -> None:
        """Returns when the broker has acknowledged it, whether it passed it on or not."""
        self._client.publish(topic, payload, qos=qos, retain=retain).wait_for_publish(WAIT_SECONDS)

    def publish_many(self, messages: list[tuple[str, str]]) -> None:
        sent = [self._client.publish(topic, payload, qos=1) for topic, payload in messages]
        for each in sent:
            each.wait_for_publish(20)

    def payloads(self) -> list[bytes]:
        return [payload for _, payload in self.received]

    def vanish(self) -> None:
        """As a device whose power is cut: the broker says its last will."""
        self._client._reconnect_on_failure = False
        sock = self._client.socket()
        assert isinstance(sock, socket.socket)
        sock.shutdown(socket.SHUT_RDWR)
        self._client.loop_stop()

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@contextmanager
def client(broker: Server, username: str | None, password: str | None) -> Iterator[Client]:
    found = Client(broker, username, password)
    try:
        yield found
    finally:
        found.close()


@contextmanager
def device(broker: Server, token: str) -> Iterator[Client]:
    """A device with nothing but its token."""
    with client(broker, tokens.prefix_of(token), token) as found:
        yield found


@contextmanager
def operator(broker: Server) -> Iterator[Client]:
    """Somebody who may publish and see everything."""
    with client(broker, broker.username, broker.password) as found:
        assert found.connected.wait(WAIT_SECONDS)
        yield found


def mosquitto_sub(broker: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Mosquitto's own client for at most five seconds."""
    program = get("mosquitto_sub", say=lambda _: None)
    command = [str(program.path), "-h", "127.0.0.1", "-p", str(broker.port), "-W", "5", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=program.environment, timeout=10, check=False)
