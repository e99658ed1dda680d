"""Six clients that others wrote, listening to one device of a running system: what each has heard so far out."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from deploy.local import LocalSystem
from deploy.programs import get
from tests import socketio_clients, system_clients
from tests.waiting import until

# A message's body and where it came from: the event of Socket.IO, the last part of an MQTT topic, "observe" over CoAP.
Heard = list[tuple[str, dict[str, Any]]]
Device = dict[str, str]
TOPICS = {"state": 1, "commands": 2, "broadcast": 1}  # with their quality of service


class Listener(Protocol):
    """A client that listens already when it is made, until the end of the stack it was made with."""

    def heard(self) -> Heard: ...


class Lines:
    """What a program prints, line after line, until it is killed at the end of the block."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.lines: list[str] = []
        self.child = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}, stdin=subprocess.DEVNULL
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self.lines.append(line.strip())

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        self._reader.join(10)
        assert self.child.stdout is not None
        self.child.stdout.close()


class PythonSocketIo:
    def __init__(self, system: LocalSystem, token: str, stack: ExitStack) -> None:
        self._client = stack.enter_context(socketio_clients.connected(system.socketio, token))

    def heard(self) -> Heard:
        return list(self._client.received)


class JavaScriptSocketIo:
    def __init__(self, system: LocalSystem, token: str, stack: ExitStack) -> None:
        client = socketio_clients.javascript_client([system.socketio], token, transports=["websocket"])
        self._client = stack.enter_context(client)

    def heard(self) -> Heard:
        return self._client.received


class Paho:
    def __init__(self, system: LocalSystem, device: Device, stack: ExitStack) -> None:
        self._heard: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._all: Heard = []
        subscribed = threading.Event()
        client = system_clients.mqtt_client(system, device)
        stack.callback(client.loop_stop)
        stack.callback(client.disconnect)
        client.on_message = lambda _client, _data, message: self._heard.put(
            (message.topic.rsplit("/", 1)[1], json.loads(message.payload))
        )
        client.on_subscribe = lambda *_: subscribed.set()
        client.subscribe([(topic, TOPICS[topic.rsplit("/", 1)[1]]) for topic in _topics(system, device)])
        assert subscribed.wait(10)

    def heard(self) -> Heard:
        while not self._heard.empty():
            self._all.append(self._heard.get())
        return self._all


class MosquittoSub:
    def __init__(self, system: LocalSystem, device: Device, stack: ExitStack) -> None:
        program = get("mosquitto_sub")
        topics = [argument for topic in _topics(system, device) for argument in ("-t", topic)]
        # A token is one connection, and the device itself has the first.
        token = device["listenerToken"]
        username = token.split("_")[1]
        login = ["-i", username, "-u", username, "-P", token]
        address = ["-p", str(system.broker.port), "-q", "2", "-F", "%t %p", "-d"]
        command = ["stdbuf", "-oL", str(program.path), *address, *login, *topics]
        self._output = stack.enter_context(Lines(command, dict(program.environment)))
        until(lambda: any(line.startswith("Subscribed") for line in self._output.lines))

    def heard(self) -> Heard:
        told = [line for line in self._output.lines if line.startswith(("devices/", "organizations/"))]
        parted = [line.split(" ", 1) for line in told]
        return [(topic.rsplit("/", 1)[1], json.loads(payload)) for topic, payload in parted]


class CoapObserver:
    """Either program prints a representation a line, the one at the registration first."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], stack: ExitStack) -> None:
        self._output = stack.enter_context(Lines(command, environment))
        until(lambda: self._output.lines)

    def heard(self) -> Heard:
        return [("observe", json.loads(line)) for line in self._output.lines]


AIOCOAP = """
import asyncio, sys, aiocoap
async def main():
    context = await aiocoap.Context.create_client_context()
    request = context.request(aiocoap.Message(code=aiocoap.GET, uri=sys.argv[1], observe=0))
    print((await request.response).payload.decode(), flush=True)
    async for message in request.observation:
        print(message.payload.decode(), flush=True)
asyncio.run(main())
"""


def aiocoap_observer(system: LocalSystem, device: Device, stack: ExitStack) -> CoapObserver:
    return CoapObserver([sys.executable, "-u", "-c", AIOCOAP, _uri(system, device)], {}, stack)


def _libcoap(system: LocalSystem, device: Device, stack: ExitStack) -> CoapObserver:
    program = get("coap-client-notls")
    options = ["-m", "get", "-s", "600", "-v", "0", "-w", _uri(system, device)]
    return CoapObserver(["stdbuf", "-oL", str(program.path), *options], dict(program.environment), stack)


SOCKETIO: dict[str, Callable[[LocalSystem, str, ExitStack], Listener]] = {
    "socketio-in-python": PythonSocketIo,
    "socketio-in-javascript": JavaScriptSocketIo,
}
MQTT: dict[str, Callable[[LocalSystem, Device, ExitStack], Listener]] = {"paho": Paho, "mosquitto_sub": MosquittoSub}
COAP: dict[str, Callable[[LocalSystem, Device, ExitStack], Listener]] = {
    "aiocoap": aiocoap_observer,
    "coap-client-notls": _libcoap,
}
LISTENERS = (*SOCKETIO, *MQTT, *COAP)


@contextmanager
def listening(
    system: LocalSystem, device: Device, *, token: str, names: Sequence[str]
) -> Iterator[dict[str, Listener]]:
    """Those of the names, each of which listens already; over Socket.IO as a person, else as the device."""
    with ExitStack() as stack:
        people = {name: make(system, token, stack) for name, make in SOCKETIO.items() if name in names}
        devices = {name: make(system, device, stack) for name, make in {**MQTT, **COAP}.items() if name in names}
        yield people | devices


def _topics(system: LocalSystem, device: Device) -> list[str]:
    own = [f"devices/{device['uuid']}/{name}" for name in ("state", "commands")]
    return [*own, f"organizations/{system.farm['organization']}/broadcast"]


def _uri(system: LocalSystem, device: Device) -> str:
    return f"coap://{system.coap}/devices/{device['uuid']}/state?token={device['token']}"
