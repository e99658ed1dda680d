"""Measures what refusing costs a web process whose queue is full: answers, memory, and whether every refusal is accounted for.

A system of its own is started on free ports of this machine: web alone, no worker, so that nothing is ever drained.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from benchmarks import percentiles
from benchmarks.system import memory_mb, own_system
from deploy.local import LocalSystem

FULL = 1_000
LIMITS = {
    "QUEUE_RECOVERY_THRESHOLD": "100",
    "QUEUE_WARNING_THRESHOLD": "200",
    "QUEUE_CRITICAL_THRESHOLD": str(FULL),
    "LOG_LEVEL": "WARNING",
}
SETTLE_SECONDS = 40.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30, help="length of each run (default: %(default)s)")
    parser.add_argument("--rate", type=int, default=20_000, help="events/s in batches (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=100, help="events in a batch (default: %(default)s)")
    parser.add_argument("--single-rate", type=int, default=1_000, help="single-event requests/s (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=16, help="that send at the same time (default: %(default)s)")
    options = parser.parse_args()
    runs = [("batches", options.batch, options.rate), ("single events", 1, options.single_rate)]
    for name, batch, rate in runs:
        with own_system(**LIMITS) as system:
            system.start("web")
            fill(system)
            load = Load(system, batch, options.connections)
            load.run(rate / batch, options.seconds)
            peak_mb = max(memory_mb(system.pid("web"), field="VmHWM"))
            unanswered = load.sent - len(load.milliseconds)
            waited = wait_until_recorded(system, load.refused)
            report(name, load, options.seconds, peak_mb)
            print(f"  accounted for after {waited:.1f} s: {account(system)}; requests without an answer: {unanswered}")
    return 0


def body(system: LocalSystem, count: int) -> tuple[bytes, dict[str, str]]:
    token = system.farm["sensors"][0]["token"]
    content: dict[str, Any] = {"events": [{"values": {"ph": 6.1}}] * count} if count > 1 else {"values": {"ph": 6.1}}
    return json.dumps(content).encode(), {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}


def fill(system: LocalSystem) -> None:
    """Posts until the circuit is open."""
    connection = http.client.HTTPConnection(urlsplit(system.web).netloc, timeout=5)
    content, headers = body(system, 100)
    for _ in range(100):
        connection.request("POST", "/api/v1/telemetry", content, headers)
        answer = connection.getresponse()
        refusal = json.loads(answer.read())
        if answer.status == 503 and refusal["circuitState"] == "OPEN":
            return
        time.sleep(0.02 if answer.status == 202 else 0.3)
    raise RuntimeError("the circuit did not open")


class Load:
    """Requests at a fixed pace on several connections; a request that is late is sent at once, and its wait counts."""

    def __init__(self, system: LocalSystem, batch: int, connections: int) -> None:
        self._system = system
        self._batch = batch
        self._connections = connections
        self._lock = threading.Lock()
        self.statuses: Counter[int] = Counter()
        self.milliseconds: list[float] = []
        self.sent = 0

    @property
    def refused(self) -> int:
        return self.statuses[503] * self._batch

    def run(self, requests_per_second: float, seconds: float) -> None:
        interval = self._connections / requests_per_second
        began = time.perf_counter() + 0.2
        threads = [
            threading.Thread(target=self._send, args=(began + number * interval / self._connections, interval, seconds))
            for number in range(self._connections)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _send(self, due: float, interval: float, seconds: float) -> None:
        connection = http.client.HTTPConnection(urlsplit(self._system.web).netloc, timeout=10)
        content, headers = body(self._system, self._batch)
        end = due + seconds
        while due < end:
            time.sleep(max(0.0, due - time.perf_counter()))
            if time.perf_counter() > end + 5:
                return
            connection.request("POST", "/api/v1/telemetry", content, headers)
            answer = connection.getresponse()
            answer.read()
            took = (time.perf_counter() - due) * 1000
            with self._lock:
                self.sent += 1
                self.statuses[answer.status] += 1
                self.milliseconds.append(took)
            due += interval


def wait_until_recorded(system: LocalSystem, refused: int) -> float:
    began = time.monotonic()
    while time.monotonic() - began < SETTLE_SECONDS:
        found = account(system)
        if found["counted"] >= refused and found["counted"] == found["recorded"] + found["unrecorded"]:
            break
        time.sleep(0.5)
    return time.monotonic() - began


ACCOUNT = """
from rules.admission import rejections
from rules.models import RejectedEvent
import json
found = rejections.counts()
unrecorded = found.pop("unrecorded", 0)
print(json.dumps({"counted": sum(found.values()), "recorded": RejectedEvent.objects.count(), "unrecorded": unrecorded}))
"""


def account(system: LocalSystem) -> dict[str, int]:
    answer = system.manage("shell", "--no-imports", "-c", ACCOUNT).stdout.strip().splitlines()[-1]
    found: dict[str, int] = json.loads(answer)
    return found


def report(name: str, load: Load, seconds: float, peak_mb: float) -> None:
    print(
        f"{name}: {load.refused / seconds:,.0f} refusals/s for {seconds:g} s, statuses {dict(load.statuses)}, "
        f"peak memory {peak_mb:.0f} MB\n  ms{percentiles.HEADER}\n    {percentiles.cells(load.milliseconds)}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
