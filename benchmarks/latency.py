"""Measures the time from a reading sent over HTTP to the state change received over each protocol, on an idle system.

A system of its own is started on free ports of this machine, and every reading switches the demo's pump.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiocoap
import paho.mqtt.client as mqtt
import requests
import socketio
from paho.mqtt.enums import CallbackAPIVersion

from deploy.local import LocalSystem, local_system

WAIT_SECONDS = 10.0
PROTOCOLS = ("socketio", "mqtt", "coap")


class Stopwatch:
    """When each protocol received the value that is under way. Clients call `arrived` from threads of their own."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._value = ""
        self._arrived: dict[str, float] = {}

    def start(self, value: str) -> float:
        with self._changed:
            self._value, self._arrived = value, {}
            return time.perf_counter()

    def arrived(self, protocol: str, value: str) -> None:
        now = time.perf_counter()
        with self._changed:
            if value == self._value:
                self._arrived.setdefault(protocol, now)
                self._changed.notify_all()

    def wait(self) -> dict[str, float]:
        """Arrival times of all protocols; TimeoutError names those that did not receive."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._arrived) == len(PROTOCOLS), WAIT_SECONDS):
                missing = ", ".join(set(PROTOCOLS) - self._arrived.keys())
                raise TimeoutError(f"not received within {WAIT_SECONDS:g} s: {missing}")
            return dict(self._arrived)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readings", type=int, default=300, help="how many to measure (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=0.05, help="seconds between them (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="aemos-bench-") as folder, local_system(Path(folder)) as system:
        print("starting a system of its own", flush=True)
        system.start()
        latencies = measure(system, options.readings, options.interval)
    print_table(latencies)
    return 0


def measure(system: LocalSystem, readings: int, interval: float) -> dict[str, list[float]]:
    """Milliseconds per protocol, one for each reading."""
    watch = Stopwatch()
    closers = [connect_socketio(system, watch), connect_mqtt(system, watch), connect_coap(system, watch)]
    found: dict[str, list[float]] = {name: [] for name in (*PROTOCOLS, "answer 202")}
    with requests.Session() as session:
        for number in range(-20, readings):  # the first twenty warm connections and caches
            value = "on" if number % 2 == 0 else "off"
            began = watch.start(value)
            send(session, system, 6.9 if value == "on" else 6.0)
            answered = time.perf_counter()
            arrivals = watch.wait()
            if number >= 0:
                found["answer 202"].append((answered - began) * 1000)
                for protocol, arrival in arrivals.items():
                    found[protocol].append((arrival - began) * 1000)
                show_progress(number + 1, readings)
            time.sleep(interval)
    for close in closers:
        close()
    return found


def send(session: requests.Session, system: LocalSystem, ph: float) -> None:
    sensor = system.farm["sensors"][0]
    body: dict[str, Any] = {"values": {"ph": ph}, "timestamp": datetime.now(UTC).isoformat()}
    headers = {"Authorization": f"Bearer {sensor['token']}"}
    answer = session.post(f"{system.web}/api/v1/telemetry", json=body, headers=headers, timeout=5)
    answer.raise_for_status()


def connect_socketio(system: LocalSystem, watch: Stopwatch) -> Callable[[], None]:
    login = requests.post(f"{system.web}/api/v1/auth/login", json=system.farm["admin"], timeout=5).json()
    client = socketio.Client()
    client.on("device-state-change", lambda message: watch.arrived("socketio", message["data"]["value"]))
    client.connect(system.socketio, auth={"token": login["access"]}, transports=["websocket"])
    close: Callable[[], None] = client.disconnect
    return close


def connect_mqtt(system: LocalSystem, watch: Stopwatch) -> Callable[[], None]:
    pump = system.farm["devices"][0]
    ready = threading.Event()
    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    client.username_pw_set(pump["token"].split("_")[1], pump["token"])
    client.on_connect = lambda client, *_: client.subscribe(f"devices/{pump['uuid']}/state", qos=1)
    client.on_subscribe = lambda *_: ready.set()
    client.on_message = lambda client, data, message: watch.arrived(
        "mqtt", json.loads(message.payload)["data"]["value"]
    )
    client.connect("127.0.0.1", system.broker.port)
    client.loop_start()
    if not ready.wait(WAIT_SECONDS):
        raise TimeoutError("the broker did not let the pump subscribe")

    def close() -> None:
        client.disconnect()
        client.loop_stop()

    return close


def connect_coap(system: LocalSystem, watch: Stopwatch) -> Callable[[], None]:
    pump = system.farm["devices"][0]
    uri = f"coap://{system.coap}/devices/{pump['uuid']}/state?token={pump['token']}"
    ready, loop = threading.Event(), asyncio.new_event_loop()

    def tell(message: Any) -> None:
        watch.arrived("coap", json.loads(message.payload)["states"]["power"]["value"])

    async def observe() -> None:
        context = await aiocoap.Context.create_client_context()
        try:
            request = context.request(aiocoap.Message(code=aiocoap.GET, uri=uri, observe=0))
            await request.response
            ready.set()
            async for message in request.observation:
                tell(message)
        finally:
            await context.shutdown()

    thread = threading.Thread(target=lambda: loop.run_until_complete(task), daemon=True)
    task = loop.create_task(ended_quietly(observe()))
    thread.start()
    if not ready.wait(WAIT_SECONDS):
        raise TimeoutError("the gateway did not let us observe the pump")

    def close() -> None:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(WAIT_SECONDS)

    return close


async def ended_quietly(work: Any) -> None:
    try:
        await work
    except asyncio.CancelledError:
        return


def show_progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{of} readings", end="" if done < of else "\n", file=sys.stderr, flush=True)


def print_table(latencies: dict[str, list[float]]) -> None:
    count = len(latencies["mqtt"])
    print(f"HTTP sent -> received, ms, {count} readings, {datetime.now(UTC):%Y-%m-%d}")
    print(f"{'':<12}{'p50':>8}{'p95':>8}{'p99':>8}{'max':>8}")
    for name, values in latencies.items():
        cuts = statistics.quantiles(values, n=100)
        print(f"{name:<12}{cuts[49]:>8.1f}{cuts[94]:>8.1f}{cuts[98]:>8.1f}{max(values):>8.1f}")


if __name__ == "__main__":
    sys.exit(main())
