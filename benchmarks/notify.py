"""Measures notifications: so many a second published for all three protocols, what their listeners receive and when.

A system of its own is started on free ports of this machine; publisher and listeners are processes of their own. Each
message is for Socket.IO, MQTT and CoAP at once. Nine of ten are alerts, one of ten switches a device, which is what CoAP
observers see: they are told the newest state, not every change.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import requests

from deploy.local import LocalSystem, local_system

SLICE_SECONDS = 1 / 30
SWITCH_EVERY = 10
SHOW_EVERY_SECONDS = 5.0
# How long the last message may take.
PATIENCE_SECONDS = 30.0
# So many messages wait when an urgent one comes; a multiple of SWITCH_EVERY.
BACKLOG = 10_000
START_SECONDS = 20.0
_spawning = multiprocessing.get_context("spawn")


class Child:
    """A process that is told to stop and then gives one answer. `target` gets the connection, then the arguments."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self._ours, theirs = _spawning.Pipe()
        self._process = _spawning.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()

    def ready(self) -> None:
        if not self._ours.poll(START_SECONDS) or self._ours.recv() != "ready":
            raise TimeoutError(f"{self._process.name} did not get ready")

    def ask(self, what: str) -> Any:
        self.tell(what)
        return self.answer()

    def tell(self, what: str) -> None:
        self._ours.send(what)

    def answer(self) -> Any:
        if not self._ours.poll(PATIENCE_SECONDS):
            raise TimeoutError("a listener or the publisher does not answer")
        return self._ours.recv()

    def is_silent(self, seconds: float) -> bool:
        """Whether it says nothing for so long."""
        return not self._ours.poll(seconds)

    def end(self) -> None:
        self._process.terminate()
        self._process.join(5)


class Tally:
    """What one listener received: the numbers of the messages, when each came, and how old it was then, in ms."""

    def __init__(self) -> None:
        self.numbers: dict[int, float] = {}
        self.received = 0
        self.ages: list[float] = []
        self.newest = 0.0

    def add(self, number: int, sent: float) -> None:
        self.received += 1
        self.numbers.setdefault(number, time.time())
        self.ages.append((time.time() - sent) * 1000)
        self.newest = max(self.newest, sent)

    def serve(self, connection: Connection) -> None:
        """Says how far it is whenever it is asked, until it is terminated."""
        connection.send("ready")
        while True:
            wanted = connection.recv()
            if wanted == "arrivals":
                connection.send(dict(self.numbers))
                continue
            distinct = len(self.numbers)
            connection.send((distinct, self.received, self.newest, self.ages if wanted == "all" else []))


def listen_socketio(connection: Connection, url: str, token: str) -> None:
    import engineio
    import socketio

    class Engine(engineio.Client):
        """Handles messages one after the other: a thread for each, as it comes, cannot keep up with thousands."""

        def _trigger_event(self, event: str, *args: Any, **options: Any) -> Any:
            return super()._trigger_event(event, *args, **{**options, "run_async": False})

    class Client(socketio.Client):
        def _engineio_client_class(self) -> type[Engine]:
            return Engine

    tally, client = Tally(), Client()
    for event in ("alert", "device-state-change"):
        client.on(event, lambda body: tally.add(body["data"]["number"], body["data"]["sent"]))
    client.connect(url, auth={"token": token}, transports=["websocket"])
    tally.serve(connection)


def listen_mqtt(connection: Connection, port: int, username: str, password: str) -> None:
    import paho.mqtt.client as mqtt
    from paho.mqtt.enums import CallbackAPIVersion

    tally, ready = Tally(), threading.Event()
    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    client.username_pw_set(username, password)
    topics = [("organizations/+/broadcast", 1), ("devices/+/state", 1)]
    client.on_connect = lambda client, *_: client.subscribe(topics)
    client.on_subscribe = lambda *_: ready.set()

    def tell(_client: Any, _data: Any, message: mqtt.MQTTMessage) -> None:
        data = json.loads(message.payload)["data"]
        tally.add(data["number"], data["sent"])

    client.on_message = tell
    client.connect("127.0.0.1", port)
    client.loop_start()
    if ready.wait(START_SECONDS):
        tally.serve(connection)


def listen_coap(connection: Connection, uri: str) -> None:
    tally = Tally()

    async def observe() -> None:
        import aiocoap

        context = await aiocoap.Context.create_client_context()
        request = context.request(aiocoap.Message(code=aiocoap.GET, uri=uri, observe=0))
        await request.response
        threading.Thread(target=tally.serve, args=(connection,), daemon=True).start()
        async for message in request.observation:
            value = json.loads(message.payload)["states"]["power"]["value"]
            if isinstance(value, str) and ":" in value:
                number, sent = value.split(":")
                tally.add(int(number), float(sent))

    asyncio.run(observe())


def publish(connection: Connection, environment: Mapping[str, str], plan: Mapping[str, Any]) -> None:
    """Publishes at the planned rate; gives how many, the last switch, and how many seconds it worked."""
    os.environ |= {**environment, "DJANGO_SETTINGS_MODULE": "aemos.settings"}
    import django

    django.setup()
    from devices.models import Device, DeviceState

    device = Device.objects.select_related("organization").get(uuid=plan["device"])
    state = DeviceState.objects.get(device=device, name="power")
    connection.send("ready")
    if connection.recv() == "urgent":
        connection.send(_publish_backlog(device, state))
        connection.recv()
    published, switched, worked = 0, (0, 0.0), 0.0
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < plan["seconds"]:
        due = int(min(elapsed + SLICE_SECONDS, plan["seconds"]) * plan["rate"]) - published
        at = time.perf_counter()
        batch, last = _batch(device, published, due)
        if last:
            switched = last
            DeviceState.objects.filter(pk=state.pk).update(value=f"{last[0]}:{last[1]}")
        _send(batch, device=device, with_database=plan["run"] == "database")
        published += due
        worked += time.perf_counter() - at
        time.sleep(max(0.0, SLICE_SECONDS - (time.perf_counter() - at)))
    connection.send((published, switched, worked, time.perf_counter() - began))


def _publish_backlog(device: Any, state: Any) -> tuple[int, float]:
    """At once BACKLOG alerts and behind them one urgent switch; the number and the time of the switch."""
    from msgspec.structs import replace

    from notifications import outbox
    from notifications.messages import ALERT

    batch, _ = _batch(device, 0, BACKLOG + 1)
    alerts = [replace(each, event=ALERT, device_uuid=None) for each in batch[:-1]]
    outbox.append_to_stream(alerts)
    now = time.time()
    type(state).objects.filter(pk=state.pk).update(value=f"{BACKLOG}:{now}")
    urgent = replace(batch[-1], priority=1, payload={**batch[-1].payload, "sent": now})
    outbox.append_to_stream([urgent])
    return BACKLOG, now


def _batch(device: Any, first: int, count: int) -> tuple[list[Any], tuple[int, float] | None]:
    """Messages, and the number and time of the last one that switches the device."""
    from uuid import uuid4

    from notifications.messages import ALERT, DEVICE_STATE_CHANGE, Message

    found, switched = [], None
    for number in range(first, first + count):
        now, switches = time.time(), number % SWITCH_EVERY == 0
        switched = (number, now) if switches else switched
        message = Message(
            id=uuid4(),
            effect_key=f"bench:{uuid4().hex}",
            organization_uuid=str(device.organization.uuid),
            device_uuid=str(device.uuid) if switches else None,
            event=DEVICE_STATE_CHANGE if switches else ALERT,
            priority=5,
            timestamp=datetime.now(UTC).isoformat(),
            payload={
                "number": number,
                "sent": now,
                "source": "rule",  # what a rule switches goes to the device as a command, too
                "title": "pH is high",
                "message": "Reservoir A: pH 7.9 is above 6.5.",
            },
        )
        found.append(message)
    return found, switched


def _send(batch: list[Any], *, device: Any, with_database: bool) -> None:
    from django.db import transaction

    from notifications import outbox

    if not with_database:
        outbox.append_to_stream(batch)
        return
    with transaction.atomic():
        rows = [(each, device.organization_id, device.pk if each.device_uuid else None) for each in batch]
        fresh = outbox.write(rows)
    outbox.publish(fresh)


RUNS = {
    "stream": "published to the stream alone",
    "database": "with outbox rows and delivery states in the database",
    "urgent": "one urgent message behind a backlog",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=int, default=3_000, help="messages a second (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=30, help="how long (default: %(default)s)")
    parser.add_argument("--only", choices=list(RUNS), help="one of the runs, instead of all")
    options = parser.parse_args()
    for name in [options.only] if options.only else RUNS:
        plan = {"rate": options.rate, "seconds": options.seconds, "run": name}
        with tempfile.TemporaryDirectory(prefix="aemos-bench-") as folder, local_system(Path(folder)) as system:
            run(system, plan)
    return 0


def run(system: LocalSystem, plan: dict[str, Any]) -> None:
    system.start("web", "gateway")
    listeners = start_listeners(system)
    system.stop("web")
    publisher = Child(publish, system.environment, {**plan, "device": system.farm["devices"][0]["uuid"]})
    try:
        publisher.ready()
        if plan["run"] == "urgent":
            print_urgent(publisher, listeners)
            return
        kind = RUNS[plan["run"]]
        print(f"{plan['rate']} messages/s for {plan['seconds']} s, each for all three protocols, {kind}", flush=True)
        used = processor_seconds(system.pid("gateway"))
        sent = watch(system, publisher, listeners, patience=plan["seconds"] + PATIENCE_SECONDS)
        wait_for_the_rest(listeners, sent)
        print(f"the gateway used {processor_seconds(system.pid('gateway')) - used:.1f} s of a processor")
        print_table(sent, {name: child.ask("all") for name, child in listeners.items()})
        if plan["run"] == "database":
            print_states(system)
    finally:
        for child in (publisher, *listeners.values()):
            child.end()


def start_listeners(system: LocalSystem) -> dict[str, Child]:
    login = requests.post(f"{system.web}/api/v1/auth/login", json=system.farm["admin"], timeout=5).json()
    pump = system.farm["devices"][0]
    listeners = {
        "socketio": Child(listen_socketio, system.socketio, login["access"]),
        "mqtt": Child(listen_mqtt, system.broker.port, system.broker.username, system.broker.password),
        "coap": Child(listen_coap, f"coap://{system.coap}/devices/{pump['uuid']}/state?token={pump['token']}"),
    }
    for child in listeners.values():
        child.ready()
    return listeners


def print_urgent(publisher: Child, listeners: dict[str, Child]) -> None:
    """How long the urgent one took, and how long the backlog lasted, in ms."""
    number, sent = publisher.ask("urgent")
    deadline = time.monotonic() + PATIENCE_SECONDS
    print(f"one urgent message behind {BACKLOG} others", flush=True)
    for name, child in listeners.items():
        found: dict[int, float] = {}
        while number not in found and time.monotonic() < deadline:
            found = child.ask("arrivals")
            time.sleep(0.1)
        urgent = f"{(found[number] - sent) * 1000:.0f} ms" if number in found else "not received"
        print(f"{name:<10} urgent after {urgent}, {len(found)} messages received by then", flush=True)


Sent = tuple[int, tuple[int, float], float, float]


def watch(system: LocalSystem, publisher: Child, listeners: dict[str, Child], *, patience: float) -> Sent:
    """Prints how much memory the gateway has and how far the listeners are, until everything is published."""
    began = time.perf_counter()
    publisher.tell("go")
    while publisher.is_silent(SHOW_EVERY_SECONDS) and time.perf_counter() - began < patience:
        received = ", ".join(f"{name} {child.ask('count')[1]}" for name, child in listeners.items())
        seconds = time.perf_counter() - began
        print(f"{seconds:6.1f} s  gateway {memory_mb(system.pid('gateway')):6.1f} MB  received: {received}", flush=True)
    sent: Sent = publisher.answer()
    return sent


def memory_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for_the_rest(listeners: dict[str, Child], sent: Sent) -> None:
    published, (_, switched_at), *_ = sent
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        counts = {name: child.ask("count") for name, child in listeners.items()}
        if counts["socketio"][0] == counts["mqtt"][0] == published and counts["coap"][2] == switched_at:
            return
        time.sleep(0.2)


def print_table(sent: Sent, received: Mapping[str, Any]) -> None:
    published, (_, switched_at), worked, lasted = sent
    print(f"published {published} in {lasted:.1f} s; the publisher worked {100 * worked / lasted:.0f} % of the time")
    print(f"{'':<10}{'received':>10}{'lost':>8}{'twice':>8}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}{'max ms':>10}")
    for name, (distinct, count, newest, ages) in received.items():
        cuts = statistics.quantiles(ages, n=100)
        lost = published - distinct if name != "coap" else ("-" if newest == switched_at else "STALE")
        twice = count - distinct if name != "coap" else "-"
        ends = f"{cuts[49]:>10.1f}{cuts[94]:>10.1f}{cuts[98]:>10.1f}{max(ages):>10.1f}"
        print(f"{name:<10}{count:>10}{lost:>8}{twice:>8}{ends}", flush=True)


def print_states(system: LocalSystem) -> None:
    """How far the deliveries are, by the rows; all that are pending wait for the database."""
    code = (
        "from collections import Counter; from notifications.models import Delivery as D; "
        "print(sorted(Counter(D.objects.values_list('protocol', 'state')).items()))"
    )
    for _ in range(20):
        shown = system.manage("shell", "-v", "0", "-c", code).stdout.strip()
        if "pending" not in shown:
            break
        time.sleep(1)
    print(f"deliveries: {shown}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
