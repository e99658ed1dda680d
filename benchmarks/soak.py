"""Two of everything under load for minutes: a rate in, memory and queue every 30 s and whether they stay flat out.

A system of its own is started on free ports of this machine: web, worker, gateway and scheduler twice. Sensors report over
both web processes. Their chains remember (a dead band, "for", "times"), wait for time to pass, rest, raise and clear alarms,
switch pumps and notify; somebody listens on each of the three protocols at either gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import requests
from redis import Redis

from benchmarks.notify import START_SECONDS, Child, memory_mb
from deploy.local import LocalSystem, local_system

SENSORS = 40
PROCESSES = ("web", "worker", "gateway", "scheduler")
SHOW_EVERY_SECONDS = 30.0
BATCH = 10
DRAIN_SECONDS = 120.0
# Short, so that the stream is as long as it becomes before the warm-up is over.
STREAM_LENGTH = "5000"
# Caches fill in the first part of the run. Of the rest, the later half may have so much more than the earlier one.
WARM_UP = 0.4
TOLERATED_MB = 6.0

MAKE_FARM = f"""
import json
from devices.models import Organization
from tests import builders
farm = Organization.objects.first()
made = []
for number in range({SENSORS}):
    sensor, pump = builders.sensor(farm), builders.device(farm, states={{"power": ["on", "off"], "fan": ["on", "off"]}})
    high = builders.leaf(sensor, operator=">", value=6.5)
    silent = {{key: high[key] for key in ("sourceType", "UUID", "key")}}
    alarm = {{"alarm": "too high", "severity": "warning", "message": "ph is {{ph}}"}}
    about = {{"title": "ph", "message": "{{ph}} at {{originator}}", "cooldown": "20s", "deviceUuid": str(pump.uuid)}}
    builders.chain(farm, [
        builders.node("band", {{**high, "off": 6.2}}, next="on", on_false="off"),
        builders.node("on", builders.command(pump, "on")),
        builders.node("off", builders.command(pump, "off")),
    ])
    builders.chain(farm, [
        builders.node("lasting", {{**high, "for": "5s"}}, next="raise", on_false="clear"),
        builders.node("raise", {{"type": "raise_alarm", **alarm}}),
        builders.node("clear", {{"type": "clear_alarm", "alarm": "too high"}}),
    ])
    builders.chain(farm, [
        builders.node("often", {{**high, "times": 5, "within": "1m"}}, next="tell"),
        builders.node("tell", {{"type": "notify", "severity": "info", **about}}),
    ])
    builders.chain(farm, [
        builders.node("silent", {{**silent, "operator": "olderThan", "duration": "1s"}}, next="on", on_false="off"),
        builders.node("on", builders.command(pump, "on", state="fan")),
        builders.node("off", builders.command(pump, "off", state="fan")),
    ])
    made.append({{"token": builders.token(sensor), "pump": str(pump.uuid), "pump_token": builders.token(pump)}})
print(json.dumps(made))
"""


@dataclass(slots=True)
class Load:
    """Sends readings from a thread per web process; `accepted` and `refused` are events."""

    urls: list[str]
    tokens: list[str]
    rate: float
    accepted: int = 0
    refused: int = 0
    _stopping: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        for number, url in enumerate(self.urls):
            mine = self.tokens[number :: len(self.urls)]
            self._threads.append(threading.Thread(target=self._send, args=(url, mine), daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(10)

    def _send(self, url: str, tokens: list[str]) -> None:
        chance, session = random.Random(url), requests.Session()
        pause, due = BATCH * len(self.urls) / self.rate, time.monotonic()
        for token in itertools.cycle(tokens):
            due = max(due + pause, time.monotonic() - 1.0)
            if self._stopping.wait(max(0.0, due - time.monotonic())):
                return
            items: list[Any] = [
                {"values": {"ph": round(chance.uniform(6.0, 6.8), 3)}, "timestamp": datetime.now(UTC).isoformat()}
                for _ in range(BATCH)
            ]
            headers = {"Authorization": f"Bearer {token}"}
            answer = session.post(f"{url}/api/v1/telemetry", json={"events": items}, headers=headers, timeout=30)
            taken = answer.json()["accepted"] if answer.status_code == 202 else 0
            self.accepted += taken
            self.refused += BATCH - taken


@dataclass(frozen=True, slots=True)
class Row:
    """Memory of each process and of Redis in MB at a moment, and events in the queue."""

    seconds: float
    memory: dict[str, float]
    queue: int

    def __str__(self) -> str:
        return f"{self.seconds:7.0f}{self.queue:8}" + "".join(f"{value:13.1f}" for value in self.memory.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=200.0, help="events a second (default: %(default)s)")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="aemos-soak-") as folder,
        local_system(Path(folder), LOG_LEVEL="ERROR", NOTIFICATION_STREAM_LENGTH=STREAM_LENGTH) as system,
    ):
        return run(system, minutes=options.minutes, rate=options.rate)


def run(system: LocalSystem, *, minutes: float, rate: float) -> int:
    """0 when memory is flat, nothing is left in the queue and the ledger closes, else 1."""
    system.add_second(*PROCESSES)
    made = json.loads(system.manage("shell", "--verbosity", "0", "-c", MAKE_FARM).stdout)
    system.start()
    load = Load([system.web, system.url("web 2", "PORT")], [each["token"] for each in made], rate)
    server = system.redis
    redis = Redis(port=server.port, password=server.password)
    with listening(system, made[0]) as listeners:
        load.start()
        try:
            rows = watch(system, redis, load, seconds=minutes * 60)
        finally:
            load.stop()
        drained = wait_until_drained(system)
        for name, child in listeners.items():
            print(f"{name}: {child.ask('count')} messages received", flush=True)
    print(f"{load.accepted} events accepted, {load.refused} refused", flush=True)
    ledger = system.manage("ledger", check=False)
    print(ledger.stdout or ledger.stderr, flush=True)
    grown = growth(rows)
    for name, megabytes in grown.items():
        verdict = "flat" if megabytes <= TOLERATED_MB else "GROWS"
        print(f"{name:<12}{megabytes:+7.1f} MB after the warm-up  {verdict}", flush=True)
    print("the queue is empty" if drained else "the queue is NOT EMPTY", flush=True)
    return 0 if drained and not ledger.returncode and max(grown.values()) <= TOLERATED_MB else 1


def watch(system: LocalSystem, redis: Any, load: Load, *, seconds: float) -> list[Row]:
    """A row every 30 s, printed as it comes."""
    rows: list[Row] = []
    began = time.monotonic()
    while (elapsed := time.monotonic() - began) < seconds:
        memory = {name: group_mb(system.pid(name)) for name in system.running()}
        memory["Redis"] = redis.info("memory")["used_memory"] / 1024**2
        rows.append(Row(elapsed, memory, depth(system)))
        if len(rows) == 1:
            print("seconds   queue" + "".join(f"{name:>13}" for name in memory), flush=True)
        print(f"{rows[-1]}   {load.accepted} accepted", flush=True)
        time.sleep(max(0.0, min(SHOW_EVERY_SECONDS, seconds - elapsed)))
    return rows


def growth(rows: list[Row]) -> dict[str, float]:
    """By process, how much the later half of what follows the warm-up has more than the earlier half, in MB."""
    warm = rows[int(len(rows) * WARM_UP) :]
    middle = len(warm) // 2
    earlier, later = warm[: max(middle, 1)], warm[middle:]
    return {
        name: _mean([row.memory[name] for row in later]) - _mean([row.memory[name] for row in earlier])
        for name in rows[0].memory
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def group_mb(pid: int) -> float:
    """A process with its children: the web process has workers."""
    found = memory_mb(pid)
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError):  # it has ended
            found += memory_mb(int(child))
    return found


def depth(system: LocalSystem) -> int:
    answer = requests.get(f"{system.web}/api/v1/metrics/queue/summary", timeout=10)
    found: int = answer.json()["queueDepth"]
    return found


def wait_until_drained(system: LocalSystem) -> bool:
    deadline = time.monotonic() + DRAIN_SECONDS
    while depth(system) and time.monotonic() < deadline:
        time.sleep(1.0)
    return depth(system) == 0


class Received:
    """How many messages a listener was given."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, *_: object) -> None:
        self.count += 1

    def serve(self, connection: Connection) -> None:
        """Says how many whenever it is asked, until it is terminated."""
        connection.send("ready")
        while True:
            connection.recv()
            connection.send(self.count)


def listen_socketio(connection: Connection, url: str, token: str) -> None:
    import socketio

    received, client = Received(), socketio.Client()
    client.on("*", received.add)
    client.connect(url, auth={"token": token}, transports=["websocket"])
    received.serve(connection)


def listen_mqtt(connection: Connection, port: int, username: str, password: str) -> None:
    import paho.mqtt.client as mqtt
    from paho.mqtt.enums import CallbackAPIVersion

    received, ready = Received(), threading.Event()
    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    client.username_pw_set(username, password)
    client.on_connect = lambda client, *_: client.subscribe([("organizations/+/broadcast", 1), ("devices/+/state", 1)])
    client.on_subscribe = lambda *_: ready.set()
    client.on_message = received.add
    client.connect("127.0.0.1", port)
    client.loop_start()
    if ready.wait(START_SECONDS):
        received.serve(connection)


def listen_coap(connection: Connection, uri: str) -> None:
    received = Received()

    async def observe() -> None:
        import aiocoap

        context = await aiocoap.Context.create_client_context()
        request = context.request(aiocoap.Message(code=aiocoap.GET, uri=uri, observe=0))
        await request.response
        threading.Thread(target=received.serve, args=(connection,), daemon=True).start()
        async for _ in request.observation:
            received.add()

    asyncio.run(observe())


@contextlib.contextmanager
def listening(system: LocalSystem, farm: dict[str, str]) -> Iterator[dict[str, Child]]:
    token = requests.post(f"{system.web}/api/v1/auth/login", json=system.farm["admin"], timeout=5).json()["access"]
    path = f"devices/{farm['pump']}/state?token={farm['pump_token']}"
    listeners = {
        "Socket.IO": Child(listen_socketio, system.url("gateway 2", "SOCKETIO_PORT"), token),
        "MQTT": Child(listen_mqtt, system.broker.port, system.broker.username, system.broker.password),
        "CoAP": Child(listen_coap, f"coap://{system.coap}/{path}"),
    }
    try:
        for child in listeners.values():
            child.ready()
        yield listeners
    finally:
        for child in listeners.values():
            child.end()


if __name__ == "__main__":
    sys.exit(main())
