"""Sends many times more readings than can be processed, for minutes, and looks at what must hold meanwhile and afterwards.

A system of its own is started on free ports: web, worker, gateway and scheduler on a durable PostgreSQL, with the thresholds that
AEMOS comes with. wrk sends batches without a pause, whatever it is answered. Beside it a sensor reports critical alarms that
switch a pump, and mosquitto_pub publishes readings over MQTT. Ends with 1 when a promise is not kept.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import requests

from benchmarks import percentiles
from benchmarks.farm import (
    CONNECTIONS,
    Farm,
    depth,
    farm,
    load_script,
    may_publish,
    memory_now,
    publish_command,
    until,
)
from benchmarks.latency import Arrivals
from benchmarks.listeners import Child, listen_socketio
from benchmarks.report import say
from benchmarks.soak import Row, mb_per_hour
from deploy.programs import get

# A short stream of notifications, so that it is as long as it becomes in the first minutes.
SETTINGS = {"LOG_LEVEL": "ERROR", "NOTIFICATION_STREAM_LENGTH": "5000"}
BATCH = 500
SHARE = 0.18
SAMPLE_EVERY_SECONDS = 5.0
CRITICAL_EVERY_SECONDS = 0.2
CRITICAL_P95_MS = 1_000.0
RECOVERY_SECONDS = 60.0
MQTT_EVERY_SECONDS = 0.005
# After the warm-up. PostgreSQL is shown alone: it fills its shared buffers, which is what they are for.
GROWTH_MB = 12.0
MAKE_TOKEN = """
from devices.models import DeviceToken, Sensor
print(DeviceToken.objects.issue(Sensor.objects.get(name="Reservoir A"), highest_priority=1)[1])
"""
# Asked for at the end, in the time of wrk's own thread: what each request was answered with.
COUNT_ANSWERS = """
local counts = {}
function response(status, headers)
  local kind = status .. ((status == 503 or status == 429) and not headers["Retry-After"] and " without Retry-After" or "")
  counts[kind] = (counts[kind] or 0) + 1
  summary = ""
  for name, number in pairs(counts) do summary = summary .. name .. "=" .. number .. ";" end
end
local threads = {}
local named = setup
function setup(thread) named(thread) table.insert(threads, thread) end
function done()
  for _, thread in ipairs(threads) do io.write("answers: " .. (thread:get("summary") or "") .. "\\n") end
end
"""


@dataclass(slots=True)
class Critical:
    """Reports a critical alarm five times a second; how long until the pump's new state is received over Socket.IO."""

    running: Farm
    milliseconds: list[float] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)
    answers: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        system = self.running.system
        login = requests.post(f"{system.web}/api/v1/auth/login", json=system.farm["admin"], timeout=5).json()
        with closing(Child("Socket.IO", listen_socketio, Arrivals, system.socketio, login["access"])) as listener:
            listener.ready()
            token = system.manage("shell", "--verbosity", "0", "-c", MAKE_TOKEN).stdout.strip()
            high, session = False, requests.Session()
            session.headers["Authorization"] = f"Bearer {token}"
            while not self._stopping.wait(CRITICAL_EVERY_SECONDS):
                began = time.perf_counter()
                status, text = self._send(session, 5.9 if high else 6.9)
                self.answers.append((time.perf_counter() - began) * 1_000)
                self.statuses[status] += 1
                if status != 202:
                    self.refusals[text] += 1
                else:
                    high = not high
                    self.milliseconds.append((listener.ask(("on" if high else "off", began)) - began) * 1_000)

    def _send(self, session: requests.Session, ph: float) -> tuple[int, str]:
        system = self.running.system
        body: dict[str, Any] = {
            "type": "critical-alarm",
            "values": {"ph": ph},
            "timestamp": datetime.now(UTC).isoformat(),
        }
        answer = session.post(f"{system.web}/api/v1/telemetry", json=body, timeout=30)
        return answer.status_code, answer.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Of wrk: its requests by what they were answered with, and those that were not answered."""

    seconds: float
    counts: dict[str, int]
    errors: str

    def events(self, *statuses: str) -> int:
        return BATCH * sum(self.counts.get(status, 0) for status in statuses)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="of overload, 1 at least (default: %(default)s)")
    options = parser.parse_args()
    if options.minutes < 1:
        parser.error("--minutes: below 1 there are too few samples of memory")
    say("starting a system of its own")
    with farm("web", "worker", "scheduler", "gateway", settings=SETTINGS) as running:
        until(lambda: may_publish(running.system, running.uuids[-1], running.tokens[-1]))
        return 0 if all(run(running, seconds=options.minutes * 60)) else 1


def run(running: Farm, *, seconds: float) -> list[bool]:
    """Whether each promise was kept."""
    critical = Critical(running)
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(load_script(running.tokens[:-1], size=BATCH, share=SHARE) + COUNT_ANSWERS)
        script.flush()
        publisher, published = publish_steadily(running, seconds)
        load, began = start_wrk(running, seconds, script=script.name), time.monotonic()
        critical.start()
        try:
            rows = watch(running, load)
        finally:
            critical.stop()
            load.terminate()
    answers = answers_of(load, time.monotonic() - began)
    recovered = recovery(running)
    all_told(running, publisher, published)
    return judge(running, answers, critical, rows, recovered, published)


def start_wrk(running: Farm, seconds: float, *, script: str) -> subprocess.Popen[str]:
    program = get("wrk")
    command = [str(program.path), "-t1", f"-c{CONNECTIONS}", f"-d{seconds:g}s", "--timeout", "30s", "-s", script]
    environment = {**os.environ, **program.environment}
    url = f"{running.system.web}/api/v1/telemetry"
    return subprocess.Popen([*command, url], env=environment, stdout=subprocess.PIPE, text=True)


def publish_steadily(running: Farm, seconds: float) -> tuple[subprocess.Popen[bytes], int]:
    """The last sensor's readings over MQTT, each with the time at which it is received."""
    count = int(seconds / MQTT_EVERY_SECONDS)
    what = ["-m", '{"values":{"ph":5.9}}', "--repeat", str(count), "--repeat-delay", str(MQTT_EVERY_SECONDS)]
    command, environment = publish_command(running.system, running.uuids[-1], running.tokens[-1], *what)
    return subprocess.Popen(command, env=environment), count


def watch(running: Farm, load: subprocess.Popen[str]) -> list[Row]:
    """A row every 5 s until wrk ends."""
    began, rows = time.monotonic(), list[Row]()
    while load.poll() is None:
        rows.append(Row(time.monotonic() - began, memory_now(running), depth(running.system)))
        if len(rows) == 1:
            print("seconds   queue" + "".join(f"{name:>13}" for name in rows[0].memory) + "   broker holds", flush=True)
        if len(rows) % 3 == 1:
            print(f"{rows[-1]}{held(running):>15}", flush=True)
        time.sleep(SAMPLE_EVERY_SECONDS)
    return rows


def held(running: Farm) -> int:
    """What the MQTT broker holds, as the metrics say."""
    text = requests.get(f"{running.system.web}/api/v1/metrics/prometheus", timeout=10).text
    found = re.search(r"^mqtt_broker_held_messages (\S+)", text, re.MULTILINE)
    return int(float(found[1])) if found else -1


def answers_of(load: subprocess.Popen[str], seconds: float) -> Answers:
    text = load.communicate()[0]
    counts = {name: int(number) for name, number in re.findall(r"([^=;:\n]+)=(\d+);", text.partition("answers: ")[2])}
    errors = re.search(r"Socket errors: (.*)", text)
    return Answers(seconds=seconds, counts=counts, errors=errors[1] if errors else "")


def recovery(running: Farm) -> float:
    """Seconds until a normal reading is as welcome as ever: at most 300."""
    began = time.monotonic()

    def recovered() -> bool:
        health: Any = requests.get(f"{running.system.web}/api/v1/health", timeout=10).json()
        return bool(health["status"] == "healthy" and health["circuitState"] == "CLOSED" and not health["problems"])

    with contextlib.suppress(RuntimeError):  # what was not reached is said by what is printed
        until(recovered, seconds=300)
    return time.monotonic() - began


def all_told(running: Farm, publisher: subprocess.Popen[bytes], published: int) -> None:
    """Waits for what is still to be published, and to be taken from the broker; readings by HTTP have ended."""
    publisher.wait(timeout=600)
    with contextlib.suppress(RuntimeError):  # see `recovery`
        until(lambda: sum(over_mqtt(running)) >= published and depth(running.system) == 0, seconds=60)


def judge(
    running: Farm, answers: Answers, critical: Critical, rows: list[Row], recovered: float, published: int
) -> list[bool]:
    offered, accepted = sum(answers.counts.values()) * BATCH, answers.events("202")
    print(
        f"offered {offered / answers.seconds:,.0f} events/s, {offered / max(accepted, 1):.1f} times what was accepted"
    )
    print(f"{'critical alarms, ms':<40}{percentiles.HEADER}")
    print(f"{'sent -> answered':<40}{percentiles.cells(critical.answers)}")
    print(f"{'sent -> the pump has its new state':<40}{percentiles.cells(critical.milliseconds)}")
    slow = (
        sorted(critical.milliseconds)[int(len(critical.milliseconds) * 0.95)] if critical.milliseconds else float("inf")
    )
    growth = {name: slope * rows[-1].seconds / 3_600 for name, slope in mb_per_hour(rows).items()}
    taken, refused = over_mqtt(running)
    ledger = running.system.manage("ledger", check=False)
    known = {"202", "503", "429"}
    return [
        kept("10 times as much as was accepted", offered >= 10 * accepted, f"{offered:,} of {accepted:,}"),
        kept(
            "every request answered",
            not answers.errors and answers.counts.keys() <= known,
            f"{answers.counts} {answers.errors}",
        ),
        kept(
            "critical alarms accepted",
            critical.statuses.keys() <= {202},
            f"{dict(critical.statuses)} {dict(critical.refusals) or ''}",
        ),
        kept("p95 of critical alarms below 1 s", slow < CRITICAL_P95_MS, f"{slow:.0f} ms"),
        kept(
            "memory flat",
            max(mb for name, mb in growth.items() if name != "PostgreSQL") < GROWTH_MB,
            ", ".join(f"{n} {mb:+.1f}" for n, mb in growth.items()),
        ),
        kept(
            "all of MQTT accounted for",
            taken + refused == published,
            f"{taken:,} + {refused:,} refused of {published:,}",
        ),
        kept("recovered within 60 s", recovered < RECOVERY_SECONDS, f"{recovered:.0f} s"),
        kept("the ledger closes", not ledger.returncode, (ledger.stdout or ledger.stderr).strip().splitlines()[-1]),
    ]


def over_mqtt(running: Farm) -> tuple[int, int]:
    """Messages accepted and refused, as the metrics count them."""
    text = requests.get(f"{running.system.web}/api/v1/metrics/prometheus", timeout=10).text
    counts = dict(
        re.findall(r'^telemetry_ingestion_total\{protocol="mqtt",result="([^"]+)"\} (\S+)', text, re.MULTILINE)
    )
    numbers = {result: int(float(count)) for result, count in counts.items()}
    accepted = numbers.pop("accepted", 0)
    return accepted, sum(numbers.values()) - 1  # the trial of the account


def kept(promise: str, is_kept: bool, figures: str) -> bool:
    print(f"{'ok  ' if is_kept else 'FAIL'}  {promise}: {figures}", flush=True)
    return is_kept


if __name__ == "__main__":
    sys.exit(main())
