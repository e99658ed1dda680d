"""Measures the time from a reading sent over HTTP to the state change received over each protocol, on an idle system.

A system of its own is started on free ports of this machine, and every reading switches the demo's pump.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import Any

import requests

from benchmarks import percentiles
from benchmarks.listeners import Received, listening
from benchmarks.system import own_system
from deploy.local import LocalSystem


class Arrivals(Received):
    """When one listener received which value of the pump's state."""

    def __init__(self) -> None:
        super().__init__()
        self._arrivals: SimpleQueue[tuple[str, float]] = SimpleQueue()

    def add(self, body: Mapping[str, Any]) -> None:
        now = time.perf_counter()  # the same clock in all processes
        state = body["states"]["power"] if "states" in body else body["data"]
        self._arrivals.put((state.get("value"), now))

    def answer(self, asked: Any) -> float:
        """Waits until it receives the value, not before the given moment."""
        value, since = asked
        while True:
            value_received, at = self._arrivals.get()
            if value_received == value and at >= since:
                return at


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readings", type=int, default=300, help="how many to measure (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=0.05, help="seconds between them (default: %(default)s)")
    options = parser.parse_args()
    with own_system() as system:
        print("starting a system of its own", flush=True)
        system.start()
        latencies = measure(system, options.readings, options.interval)
    print_table(latencies)
    return 0


def measure(system: LocalSystem, readings: int, interval: float) -> dict[str, list[float]]:
    """Milliseconds per protocol, one for each reading; TimeoutError names the protocol that did not receive."""
    with requests.Session() as session, listening(system, Arrivals, pump=system.farm["devices"][0]) as listeners:
        found: dict[str, list[float]] = {name: [] for name in (*listeners, "answer 202")}
        for number in range(-20, readings):  # the first twenty warm connections and caches
            value = "on" if number % 2 == 0 else "off"
            began = time.perf_counter()
            send(session, system, 6.9 if value == "on" else 6.0)
            moments = {"answer 202": time.perf_counter()}
            moments |= {name: child.ask((value, began)) for name, child in listeners.items()}
            if number >= 0:
                for name, moment in moments.items():
                    found[name].append((moment - began) * 1000)
                show_progress(number + 1, readings)
            time.sleep(interval)
    return found


def send(session: requests.Session, system: LocalSystem, ph: float) -> None:
    sensor = system.farm["sensors"][0]
    body: dict[str, Any] = {"values": {"ph": ph}, "timestamp": datetime.now(UTC).isoformat()}
    headers = {"Authorization": f"Bearer {sensor['token']}"}
    answer = session.post(f"{system.web}/api/v1/telemetry", json=body, headers=headers, timeout=5)
    answer.raise_for_status()


def show_progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{of} readings", end="" if done < of else "\n", file=sys.stderr, flush=True)


def print_table(latencies: dict[str, list[float]]) -> None:
    count = len(latencies["MQTT"])
    print(f"HTTP sent -> received, ms, {count} readings, {datetime.now(UTC):%Y-%m-%d}")
    print(f"{'':<12}{percentiles.HEADER}")
    for name, values in latencies.items():
        print(f"{name:<12}{percentiles.cells(values)}")


if __name__ == "__main__":
    sys.exit(main())
