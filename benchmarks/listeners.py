"""A listener of each protocol, in a process of its own, that counts what it receives."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import requests

from deploy.local import LocalSystem

START_SECONDS = 20.0
# How long an answer, or the last message, may take.
PATIENCE_SECONDS = 30.0
TOPICS = [("organizations/+/broadcast", 1), ("devices/+/state", 1)]
_spawning = multiprocessing.get_context("spawn")


class Child:
    """A process that says "ready" and then answers what it is asked. `target` gets the connection, then the arguments."""

    def __init__(self, name: str, target: Callable[..., None], *arguments: Any) -> None:
        self._name = name
        self._ours, theirs = _spawning.Pipe()
        self._process = _spawning.Process(name=name, target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is seen

    def ready(self) -> None:
        if not self._ours.poll(START_SECONDS) or self._ours.recv() != "ready":
            raise TimeoutError(f"{self._name} did not get ready within {START_SECONDS:g} s")

    def ask(self, what: Any) -> Any:
        self.send(what)
        return self.answer()

    def send(self, what: Any) -> None:
        self._ours.send(what)

    def answer(self) -> Any:
        if not self._ours.poll(PATIENCE_SECONDS):
            raise TimeoutError(f"{self._name} does not answer within {PATIENCE_SECONDS:g} s")
        return self._ours.recv()

    def is_silent(self, seconds: float) -> bool:
        """Whether it says nothing for so long."""
        return not self._ours.poll(seconds)

    def close(self) -> None:
        self._process.terminate()
        self._process.join(5)


class Received:
    """How many messages a listener was given. A subclass that needs more of them keeps it in `add` and answers it in `answer`."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, body: Mapping[str, Any]) -> None:
        """Of Socket.IO and MQTT the whole message, of CoAP the device with its states."""
        self.count += 1

    def answer(self, asked: Any) -> Any:
        return self.count

    def serve(self, connection: Connection) -> None:
        """Answers until the process is terminated."""
        connection.send("ready")
        while True:
            connection.send(self.answer(connection.recv()))


@contextmanager
def listening(
    system: LocalSystem, received: type[Received], *, pump: Mapping[str, str], socketio: str | None = None
) -> Iterator[dict[str, Child]]:
    """To all of the farm over Socket.IO, at the first gateway or another's url, and over MQTT; to the pump over CoAP."""
    login = requests.post(f"{system.web}/api/v1/auth/login", json=system.farm["admin"], timeout=5).json()
    broker, path = system.broker, f"devices/{pump['uuid']}/state?token={pump['token']}"
    wanted: dict[str, tuple[Any, ...]] = {
        "Socket.IO": (listen_socketio, received, socketio or system.socketio, login["access"]),
        "MQTT": (listen_mqtt, received, broker.port, broker.username, broker.password),
        "CoAP": (listen_coap, received, f"coap://{system.coap}/{path}"),
    }
    with ExitStack() as stack:
        children = {name: stack.enter_context(closing(Child(name, *what))) for name, what in wanted.items()}
        for child in children.values():
            child.ready()
        yield children


def listen_socketio(connection: Connection, received: type[Received], url: str, token: str) -> None:
    import engineio
    import socketio

    class Engine(engineio.Client):
        """Handles messages one after the other: a thread for each, as it comes, cannot keep up with thousands."""

        def _trigger_event(self, event: str, *args: Any, **options: Any) -> Any:
            return super()._trigger_event(event, *args, **{**options, "run_async": False})

    class Client(socketio.Client):
        def _engineio_client_class(self) -> type[Engine]:
            return Engine

    found, client = received(), Client()
    # What the gateway itself says, as it does at the beginning, has no data and is no message.
    client.on("*", lambda _event, body: found.add(body) if "data" in body else None)
    client.connect(url, auth={"token": token}, transports=["websocket"])
    found.serve(connection)


def listen_mqtt(connection: Connection, received: type[Received], port: int, username: str, password: str) -> None:
    import paho.mqtt.client as mqtt
    from paho.mqtt.enums import CallbackAPIVersion

    found, ready = received(), threading.Event()
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=username)
    client.username_pw_set(username, password)
    client.on_connect = lambda client, *_: client.subscribe(TOPICS)
    client.on_subscribe = lambda *_: ready.set()
    client.on_message = lambda _client, _data, message: found.add(json.loads(message.payload))
    client.connect("127.0.0.1", port)
    client.loop_start()
    if ready.wait(START_SECONDS):
        found.serve(connection)


def listen_coap(connection: Connection, received: type[Received], uri: str) -> None:
    found = received()

    async def observe() -> None:
        import aiocoap

        context = await aiocoap.Context.create_client_context()
        request = context.request(aiocoap.Message(code=aiocoap.GET, uri=uri, observe=0))
        await request.response
        threading.Thread(target=found.serve, args=(connection,), daemon=True).start()
        async for message in request.observation:
            found.add(json.loads(message.payload))

    asyncio.run(observe())
