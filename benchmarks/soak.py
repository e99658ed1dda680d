"""Run two of everything under load for minutes, and measure how fast memory grows.

A system of its own is started on free ports of this machine: web, worker, gateway and scheduler twice. Sensors report over
both web processes. Their chains remember (a dead band, "for", "times"), wait for time to pass, rest, raise and clear alarms,
switch pumps and notify; somebody listens on each of the three protocols at either gateway. Memory is read every 5 s. A straight
line through what follows the warm-up, the first four tenths, says how many MB an hour each process grows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import linear_regression
from typing import Any

import requests
from redis import Redis

from benchmarks.listeners import Child, Received, listening
from benchmarks.system import memory_mb, own_system
from deploy.local import LocalSystem

SENSORS = 40
PROCESSES = ("web", "worker", "gateway", "scheduler")
SAMPLE_EVERY_SECONDS = 5.0
SHOW_EVERY = 6
BATCH = 10
DRAIN_SECONDS = 120.0
# Short, so that the stream is as long as it becomes before the warm-up is over.
STREAM_LENGTH = "5000"
# Caches fill in this part of the run.
WARM_UP = 0.4
LIMIT_MB_PER_HOUR = 12.0

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
        builders.node("often", {{**high, "times": 5, "within": "1m"}}, next="notify"),
        builders.node("notify", {{"type": "notify", "severity": "info", **about}}),
    ])
    builders.chain(farm, [
        builders.node("silent", {{**silent, "operator": "olderThan", "duration": "1s"}}, next="on", on_false="off"),
        builders.node("on", builders.command(pump, "on", state="fan")),
        builders.node("off", builders.command(pump, "off", state="fan")),
    ])
    made.append({{"token": builders.token(sensor), "pump": {{"uuid": str(pump.uuid), "token": builders.token(pump)}}}})
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

    def check(self) -> None:
        """RuntimeError when a thread has given up: less load would pass for flat memory."""
        if not all(thread.is_alive() for thread in self._threads):
            raise RuntimeError("a sender gave up; its error is above")

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
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Ends with 1 when memory grows faster than the limit, "
        "something is left in the queue, a listener hears nothing or the ledger does not close.",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long, 1 at least (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=200.0, help="events a second (default: %(default)s)")
    parser.add_argument(
        "--limit-mb-per-hour",
        type=float,
        default=LIMIT_MB_PER_HOUR,
        metavar="MB",
        help="how fast a process and Redis may grow (default: %(default)s; meant for ten minutes and more)",
    )
    options = parser.parse_args()
    if options.minutes < 1:
        parser.error("--minutes: below 1 there are too few samples to draw a line through")
    with own_system(LOG_LEVEL="ERROR", NOTIFICATION_STREAM_LENGTH=STREAM_LENGTH) as system:
        return run(system, minutes=options.minutes, rate=options.rate, limit_mb_per_hour=options.limit_mb_per_hour)


def run(system: LocalSystem, *, minutes: float, rate: float, limit_mb_per_hour: float) -> int:
    """0 when memory is flat, the queue is empty, every listener heard something and the ledger closes, else 1."""
    system.add_second(*PROCESSES)
    made = json.loads(system.manage("shell", "--verbosity", "0", "-c", MAKE_FARM).stdout)
    system.start()
    load = Load([system.web, system.url("web 2", "PORT")], [each["token"] for each in made], rate)
    second = system.url("gateway 2", "SOCKETIO_PORT")
    with listening(system, Received, pump=made[0]["pump"], socketio=second) as listeners:
        load.start()
        try:
            rows = watch(system, load, seconds=minutes * 60)
        finally:
            load.stop()
        kept = [print_growth(mb_per_hour(rows), limit=limit_mb_per_hour), print_drained(system), print_heard(listeners)]
    print(f"{load.accepted} events accepted, {load.refused} refused", flush=True)
    ledger = system.manage("ledger", check=False)
    print(ledger.stdout or ledger.stderr, flush=True)
    return 0 if all(kept) and not ledger.returncode else 1


def watch(system: LocalSystem, load: Load, *, seconds: float) -> list[Row]:
    """A row every 5 s; each sixth is printed as it comes."""
    redis = Redis(port=system.redis.port, password=system.redis.password)
    rows: list[Row] = []
    began = time.monotonic()
    while (elapsed := time.monotonic() - began) < seconds:
        load.check()
        memory = {name: sum(memory_mb(system.pid(name))) for name in system.running()}
        used: Any = redis.info("memory")
        rows.append(Row(elapsed, {**memory, "Redis": used["used_memory"] / 1024**2}, depth(system)))
        if len(rows) == 1:
            print("seconds   queue" + "".join(f"{name:>13}" for name in rows[0].memory), flush=True)
        if len(rows) % SHOW_EVERY == 1:
            print(f"{rows[-1]}   {load.accepted} accepted", flush=True)
        time.sleep(max(0.0, min(len(rows) * SAMPLE_EVERY_SECONDS, seconds) - (time.monotonic() - began)))
    return rows


def mb_per_hour(rows: Sequence[Row]) -> dict[str, float]:
    """By process, the slope of the straight line through its memory after the warm-up (least squares)."""
    warm = [row for row in rows if row.seconds >= WARM_UP * rows[-1].seconds]
    hours = [row.seconds / 3600 for row in warm]
    return {name: linear_regression(hours, [row.memory[name] for row in warm]).slope for name in warm[0].memory}


def print_growth(growth: Mapping[str, float], *, limit: float) -> bool:
    for name, slope in growth.items():
        print(f"{name:<12}{slope:+7.1f} MB/h after the warm-up  {'flat' if slope <= limit else 'GROWS'}", flush=True)
    return max(growth.values()) <= limit


def print_drained(system: LocalSystem) -> bool:
    drained = wait_until_drained(system)
    print("the queue is empty" if drained else "the queue is NOT EMPTY", flush=True)
    return drained


def print_heard(listeners: Mapping[str, Child]) -> bool:
    counts = {name: child.ask("count") for name, child in listeners.items()}
    for name, count in counts.items():
        print(f"{name}: {count or 'NO'} messages received", flush=True)
    return all(counts.values())


def depth(system: LocalSystem) -> int:
    answer = requests.get(f"{system.web}/api/v1/metrics/queue/summary", timeout=10)
    found: int = answer.json()["queueDepth"]
    return found


def wait_until_drained(system: LocalSystem) -> bool:
    deadline = time.monotonic() + DRAIN_SECONDS
    while depth(system) and time.monotonic() < deadline:
        time.sleep(1.0)
    return depth(system) == 0


if __name__ == "__main__":
    sys.exit(main())
