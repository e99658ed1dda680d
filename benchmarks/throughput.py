"""Measures how many readings a second go through a whole system, beside what the machine can do at all.

One web process, one worker, one gateway and one scheduler on PostgreSQL and Redis that sync every write, and Mosquitto; wrk and
mosquitto_pub send the readings of 100 sensors, each with a rule chain. In the same run: the least that the same web server can do
("hello"), readings inserted without anything else, and entries appended to Redis one by one. Compare the ratios: absolute figures
are those of the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import redis
import requests

from benchmarks.system import memory_mb, own_system, processor_seconds
from deploy.local import LocalSystem
from deploy.postgresql import start_postgresql
from deploy.processes import terminate
from deploy.programs import REPOSITORY, get
from deploy.servers import Server, free_port

RESULTS = REPOSITORY / "benchmarks" / "results"
SENSORS = 100
CONNECTIONS = 50
BATCH = 100
PUBLISHERS = 10
# Of each publisher and second of load. All of them are sent, however long it takes.
PUBLISHED_EACH = 800
WORKER_CLASS = "gunicorn.workers.ggevent.GeventPyWSGIWorker"
# Admission is not what is measured: the queue may grow as long as readings are sent.
UNLIMITED = {
    "ENABLE_BACKPRESSURE": "false",
    "QUEUE_CRITICAL_THRESHOLD": "50000000",
    "QUEUE_WARNING_THRESHOLD": "40000000",
    "QUEUE_RECOVERY_THRESHOLD": "30000000",
}
MAKE_FARM = f"""
import json
from devices.models import DeviceToken, Organization
from rules.authoring import editing
from rules.models import RuleChain, RuleNode
from tests import builders
farm = Organization.objects.create(name="throughput")
tokens = []
uuids = []
for number in range({SENSORS}):
    sensor, pump = builders.sensor(farm), builders.device(farm)
    builders.chain(farm, [
        builders.node("band", {{**builders.leaf(sensor, operator=">", value=6.5), "releaseAt": 6.2}}, next="on", on_false="off"),
        builders.node("on", builders.command(pump)),
        builders.node("off", builders.command(pump, "off")),
    ])
    tokens.append(DeviceToken.objects.issue(sensor)[1])
    uuids.append(str(sensor.uuid))
print(json.dumps([tokens, uuids]))
"""
# Every request has the token of the next sensor. Of `share` of the readings each is on the other side of the dead band than the
# one before it of the same sensor, so that it changes a state.
SCRIPT = """
local tokens = {%(tokens)s}
local size, share, start = %(size)d, %(share)g, %(start)d
local thread_number = 0
function setup(thread) thread:set("number", thread_number) thread_number = thread_number + 1 end
local sent, owed, high = 0, 0, {}
function request()
  sent = sent + 1
  local sensor = sent %% #tokens + 1
  local items = {}
  for item = 1, size do
    owed = owed + share
    if owed >= 1 then owed = owed - 1 high[sensor] = not high[sensor] end
    local us = (number * 40000000 + sent * size + item)
    local second = os.date("!%%Y-%%m-%%dT%%H:%%M:%%S", start + math.floor(us / 1000000))
    local moment = second .. string.format(".%%06dZ", us %% 1000000)
    items[item] = '{"values":{"ph":' .. (high[sensor] and "7.1" or "5.9") .. '},"timestamp":"' .. moment .. '"}'
  end
  local body = size == 1 and items[1] or '{"events":[' .. table.concat(items, ",") .. "]}"
  return wrk.format("POST", nil, {["Authorization"] = "Bearer " .. tokens[sensor], ["Content-Type"] = "application/json"}, body)
end
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """`rate` is in `unit` per second; `processor_ms` per unit, by process; `memory_mb` the most of each process."""

    name: str
    rate: float
    unit: str
    processor_ms: dict[str, float] = field(default_factory=dict)
    memory_mb: dict[str, float] = field(default_factory=dict)
    note: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of load for each figure (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="four seconds each: about a minute in all")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder for Markdown and JSON (default: %(default)s)"
    )
    options = parser.parse_args()
    seconds = 4.0 if options.short else options.seconds
    figures: list[Figure] = []
    try:
        for figure in measure_all(seconds):
            figures.append(figure)
    finally:  # what was measured before something failed is shown all the same
        if figures:
            write(options.output, figures, seconds)
    return 0


def measure_all(seconds: float) -> Iterator[Figure]:
    for name, measure in (("hello", hello), ("raw inserts", raw_inserts), ("raw appends", raw_appends)):
        say(name)
        yield measure(seconds)
    yield from over_http(seconds, 0.0)
    yield from over_http(seconds, 0.18)
    yield over_mqtt(seconds)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def hello(seconds: float) -> Figure:
    port = free_port()
    with tempfile.TemporaryFile() as log:
        command = [
            sys.executable,
            "-m",
            "gunicorn",
            "-b",
            f"127.0.0.1:{port}",
            "-k",
            WORKER_CLASS,
            "benchmarks.hello:application",
        ]
        server = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
        try:
            until(lambda: answers(f"http://127.0.0.1:{port}/"))
            return Figure(name="hello", rate=wrk(f"http://127.0.0.1:{port}/", seconds)[0], unit="requests")
        finally:
            terminate(server, stop_signal=signal.SIGTERM, grace_seconds=5)


def raw_inserts(seconds: float) -> Figure:
    """Readings in batches of 1,000, each in a transaction of its own, into a table like ours, without anything else."""
    with durable_postgresql() as server, psycopg.connect(**connection_of(server), autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE readings (variable_id bigint, timestamp timestamptz, number double precision, text varchar, "
            "PRIMARY KEY (variable_id, timestamp))"
        )
        began, done = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            columns = [
                [number % SENSORS for number in range(1_000)],
                [done + number for number in range(1_000)],
                [6.0] * 1_000,
            ]
            connection.execute(
                "INSERT INTO readings SELECT v, timestamptz 'epoch' + t * interval '1 microsecond', n, NULL "
                "FROM unnest(%b::bigint[], %b::bigint[], %b::float8[]) AS incoming(v, t, n) ON CONFLICT DO NOTHING",
                columns,
            )
            done += 1_000
        return Figure(name="raw inserts", rate=done / (time.monotonic() - began), unit="readings")


def raw_appends(seconds: float) -> Figure:
    """Entries of 60 bytes, each synced to disk before the next is sent."""
    with own_system() as system:
        client = redis.Redis(port=system.redis.port, password=system.redis.password)
        began, done = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            client.xadd("bench", {"b": b"x" * 60})
            done += 1
        return Figure(name="raw appends", rate=done / (time.monotonic() - began), unit="entries")


@dataclass(frozen=True, slots=True, kw_only=True)
class Farm:
    """A running system with sensors that have a chain each."""

    system: LocalSystem
    database: Server
    tokens: list[str]
    uuids: list[str]


@contextmanager
def farm(*processes: str) -> Iterator[Farm]:
    with durable_postgresql() as server:
        settings = connection_of(server)
        database = {f"DB_{name.upper()}": str(settings[key]) for name, key in DATABASE.items()}
        with own_system(DB_ENGINE="postgresql", **database, **UNLIMITED) as system:
            system.start(*processes)
            tokens, uuids = json.loads(system.manage("shell", "--verbosity", "0", "-c", MAKE_FARM).stdout)
            yield Farm(system=system, database=server, tokens=tokens, uuids=uuids)


def over_http(seconds: float, share: float) -> Iterator[Figure]:
    """Single events as far as their answers, then batches end to end: accepted, stored, decided, nothing left in the queue."""
    with farm("web", "worker", "scheduler") as running:
        kind = f"{share:.0%} of events change a state" if share else "no state changes"
        if not share:
            say("single events")
            yield measured(running, "HTTP, single events", seconds, size=1, share=0.0, drained=False)
            until(lambda: depth(running.system) == 0, seconds=300)
        say(f"batches of {BATCH}, {kind}")
        name = f"HTTP, batches of {BATCH}, end to end, {kind}"
        yield measured(running, name, seconds, size=BATCH, share=share, drained=True)


def over_mqtt(seconds: float) -> Figure:
    """QoS 1, from the first message until all are stored and decided."""
    say("MQTT")
    with farm("web", "worker", "scheduler", "gateway") as running, tempfile.TemporaryDirectory() as folder:
        system, each = running.system, int(PUBLISHED_EACH * seconds)
        senders = list(zip(running.uuids, running.tokens, strict=True))[:PUBLISHERS]
        until(lambda: all(may_publish(system, *sender) for sender in senders))
        until(lambda: depth(system) == 0)
        before, began, waiting = processors(running), time.monotonic(), accepted(system)
        publishers = [publisher(system, *sender, each, Path(folder)) for sender in senders]
        for process in publishers:
            if process.wait(timeout=600):
                raise RuntimeError(f"mosquitto_pub ended with {process.returncode}")
        acknowledged = time.monotonic() - began
        count = each * PUBLISHERS
        until(lambda: accepted(system) - waiting >= count and depth(system) == 0, seconds=600)
        elapsed, used = time.monotonic() - began, processors(running)
        return Figure(
            name=f"MQTT QoS 1, {PUBLISHERS} publishers, end to end",
            rate=count / elapsed,
            unit="messages",
            processor_ms={process: (used[process] - before[process]) / count * 1_000 for process in used},
            memory_mb={process: max(memory_mb(system.pid(process), field="VmHWM")) for process in system.running()},
            note=f"acknowledged by the broker at {count / acknowledged:,.0f} a second",
        )


def may_publish(system: LocalSystem, uuid: str, token: str) -> bool:
    """Whether the broker knows the sensor by now."""
    command, environment = publish(system, uuid, token, "-m", "{}")
    done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=10)
    return done.returncode == 0 and not done.stderr


def publisher(system: LocalSystem, uuid: str, token: str, count: int, folder: Path) -> subprocess.Popen[bytes]:
    """Sends a reading per line of a file as fast as it is acknowledged, at most 20 ahead."""
    start = int(time.time()) - 86_400
    moments = (datetime.fromtimestamp(start + number / 1_000, UTC).isoformat() for number in range(count))
    lines = folder / uuid
    lines.write_text("".join(f'{{"values":{{"ph":5.9}},"timestamp":"{moment}"}}\n' for moment in moments))
    command, environment = publish(system, uuid, token, "-l")
    with lines.open("rb") as readings:
        return subprocess.Popen(command, env=environment, stdin=readings)


def publish(system: LocalSystem, uuid: str, token: str, *what: str) -> tuple[list[str], dict[str, str]]:
    """The command, and its environment."""
    program, broker = get("mosquitto_pub"), ["-h", system.broker.host, "-p", str(system.broker.port)]
    account = ["-u", token.split("_")[1], "-P", token, "-V", "mqttv5"]
    command = [str(program.path), *broker, *account, "-q", "1", "-t", f"devices/{uuid}/datastream", *what]
    return command, {**os.environ, **program.environment}


def measured(running: Farm, name: str, seconds: float, *, size: int, share: float, drained: bool) -> Figure:
    system, tokens = running.system, running.tokens
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        quoted = ",".join(f'"{token}"' for token in tokens)
        start = int(time.time()) - 86_400
        script.write(SCRIPT % {"tokens": quoted, "size": size, "share": share, "start": start})
        script.flush()
        before, began = processors(running), time.monotonic()
        rate, sent, refused = wrk(f"{system.web}/api/v1/telemetry", seconds, script=script.name)
        if drained:
            until(lambda: depth(system) == 0, seconds=600)
        elapsed, used = time.monotonic() - began, processors(running)
    events = (sent - refused) * size
    return Figure(
        name=name,
        rate=events / elapsed if drained else rate * (sent - refused) / sent,
        unit="events" if size > 1 else "requests",
        processor_ms={process: (used[process] - before[process]) / events * 1_000 for process in used},
        memory_mb={process: max(memory_mb(system.pid(process), field="VmHWM")) for process in system.running()},
        note=f"{refused} of {sent} refused" if refused else "",
    )


def processors(running: Farm) -> dict[str, float]:
    """Seconds of each process, its children included."""

    def of(pid: int) -> float:
        children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return processor_seconds(pid) + sum(seconds_if_there(child) for child in children)

    def seconds_if_there(child: int) -> float:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            return processor_seconds(child)
        return 0.0

    system = running.system
    servers = {"PostgreSQL": running.database, "Redis": system.redis, "Mosquitto": system.broker}
    found = {name: of(system.pid(name)) for name in system.running()}
    return found | {name: of(server.pid) for name, server in servers.items() if server.pid}


def depth(system: LocalSystem) -> int:
    found: int = requests.get(f"{system.web}/api/v1/metrics/queue/summary", timeout=10).json()["queueDepth"]
    return found


def accepted(system: LocalSystem) -> int:
    """Events by the ledger, since the system began."""
    with redis.Redis(port=system.redis.port, password=system.redis.password) as client:
        ledgers = client.scan_iter(match="aemos:ledger:*")
        return sum(int(client.hget(name, "accepted") or 0) for name in ledgers)


def wrk(url: str, seconds: float, *, script: str = "") -> tuple[float, int, int]:
    """Requests a second, requests, and how many of them were not answered with 2xx."""
    program = get("wrk")
    options = ["-s", script] if script else []
    command = [str(program.path), "-t1", f"-c{CONNECTIONS}", f"-d{seconds:g}s", "--timeout", "10s", *options, url]
    environment = {**os.environ, **program.environment}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", done.stdout)
    rate, sent = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout), re.search(r"(\d+) requests in", done.stdout)
    if rate is None or sent is None:
        raise RuntimeError(f"wrk says something unknown:\n{done.stdout}{done.stderr}")
    return float(rate[1]), int(sent[1]), int(refused[1]) if refused else 0


DATABASE = {"name": "dbname", "port": "port", "user": "user", "password": "password"}


def connection_of(server: Server) -> dict[str, Any]:
    return {
        "host": server.host, "port": server.port, "user": server.username, "password": server.password, "dbname": "postgres"
    }  # fmt: skip


@contextmanager
def durable_postgresql() -> Iterator[Server]:
    server = start_postgresql(durable=True)
    try:
        yield server
    finally:
        server.stop()


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=1).ok
    except requests.ConnectionError:
        return False


def until(reached: Callable[[], bool], *, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not reached within {seconds:g} s")
        time.sleep(0.05)


def write(folder: Path, figures: list[Figure], seconds: float) -> None:
    least = next(figure.rate for figure in figures if figure.name == "hello")
    machine = (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    moment = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines = [f"# Throughput, {moment}", "", f"{machine}; {seconds:g} s of load for each figure.", ""]
    lines += ["| | of hello | per second | processor ms each | memory, MB |", "|---|---|---|---|---|"]
    for figure in figures:
        processor = ", ".join(f"{name} {ms:.3f}" for name, ms in figure.processor_ms.items())
        memory = ", ".join(f"{name} {mb:.0f}" for name, mb in figure.memory_mb.items())
        note = f" ({figure.note})" if figure.note else ""
        lines.append(
            f"| {figure.name}{note} | {figure.rate / least:.2f} | {figure.rate:,.0f} {figure.unit} | {processor} | {memory} |"
        )
    text = "\n".join(lines)
    found = {"at": moment, "machine": machine, "seconds": seconds, "figures": [asdict(figure) for figure in figures]}
    save(folder, "throughput", text, found)


def save(folder: Path, name: str, text: str, found: Any) -> None:
    """Prints the table, and keeps it with its figures as Markdown and JSON."""
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(f"{text}\n")
    (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
