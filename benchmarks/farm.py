"""A whole system with sensors that have a rule chain each, load for it, and what that costs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import requests

from benchmarks.report import Figure
from benchmarks.system import memory_mb, own_system, processor_seconds, shared_memory_mb
from deploy.local import LocalSystem
from deploy.postgresql import start_postgresql
from deploy.programs import get
from deploy.servers import Server

SENSORS = 100
CONNECTIONS = 50
BATCH = 100
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
class Farm:
    """A running system with sensors that have a chain each."""

    system: LocalSystem
    database: Server
    tokens: list[str]
    uuids: list[str]


@contextmanager
def farm(*processes: str, settings: Mapping[str, str] = UNLIMITED) -> Iterator[Farm]:
    with durable_postgresql() as server:
        found = connection_of(server)
        database = {f"DB_{name.upper()}": str(found[key]) for name, key in DATABASE.items()}
        with own_system(DB_ENGINE="postgresql", **database, **settings) as system:
            system.start(*processes)
            tokens, uuids = json.loads(system.manage("shell", "--verbosity", "0", "-c", MAKE_FARM).stdout)
            yield Farm(system=system, database=server, tokens=tokens, uuids=uuids)


def load_script(tokens: Sequence[str], *, size: int, share: float) -> str:
    """For wrk; the readings begin a minute ago: those of longer ago would be history."""
    quoted = ",".join(f'"{token}"' for token in tokens)
    return SCRIPT % {"tokens": quoted, "size": size, "share": share, "start": int(time.time()) - 60}


def measured(running: Farm, name: str, seconds: float, *, size: int, share: float, drained: bool) -> Figure:
    system = running.system
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(load_script(running.tokens, size=size, share=share))
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
        memory_mb=peak_memory(running),
        note=f"{refused} of {sent} refused" if refused else "",
    )


def may_publish(system: LocalSystem, uuid: str, token: str) -> bool:
    """Whether the broker knows the sensor by now."""
    command, environment = publish_command(system, uuid, token, "-m", "{}")
    done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=10)
    return done.returncode == 0 and not done.stderr


def publish_command(system: LocalSystem, uuid: str, token: str, *what: str) -> tuple[list[str], dict[str, str]]:
    """The command, and its environment."""
    program, broker = get("mosquitto_pub"), ["-h", system.broker.host, "-p", str(system.broker.port)]
    username = token.split("_")[1]
    account = ["-i", username, "-u", username, "-P", token, "-V", "mqttv5"]
    command = [str(program.path), *broker, *account, "-q", "1", "-t", f"devices/{uuid}/datastream", *what]
    return command, {**os.environ, **program.environment}


def processors(running: Farm) -> dict[str, float]:
    """Seconds of each process, its children included."""
    return {name: _with_children(pid) for name, pid in _pids(running).items()}


def _with_children(pid: int) -> float:
    children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return processor_seconds(pid) + sum(map(_seconds_if_there, children))


def _seconds_if_there(child: int) -> float:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return processor_seconds(child)
    return 0.0


def peak_memory(running: Farm) -> dict[str, float]:
    """The most that each process ever had, in MB; of PostgreSQL what all its processes have now."""
    peak = {name: max(memory_mb(pid, field="VmHWM")) for name, pid in _pids(running).items() if name != "PostgreSQL"}
    return {**peak, "PostgreSQL": shared_memory_mb(running.database.pid or 0)}


def memory_now(running: Farm) -> dict[str, float]:
    """In MB, of each process with its children; of PostgreSQL without what its processes share counted twice."""
    now = {name: sum(memory_mb(pid)) for name, pid in _pids(running).items() if name != "PostgreSQL"}
    return {**now, "PostgreSQL": shared_memory_mb(running.database.pid or 0)}


def _pids(running: Farm) -> dict[str, int]:
    system = running.system
    servers = {"PostgreSQL": running.database, "Redis": system.redis, "Mosquitto": system.broker}
    found = {name: system.pid(name) for name in system.running()}
    return found | {name: server.pid for name, server in servers.items() if server.pid}


def bytes_waiting(seconds: float, *, size: int) -> float:
    """What an accepted event takes in Redis until a worker has it, sent in requests of so many."""
    with farm("web") as running, redis_of(running.system) as client:
        before = _used_memory(client)
        measured(running, "waiting", seconds, size=size, share=0.0, drained=False)
        return (_used_memory(client) - before) / depth(running.system)


def redis_of(system: LocalSystem) -> redis.Redis:
    return redis.Redis(port=system.redis.port, password=system.redis.password)


def _used_memory(client: redis.Redis) -> int:
    information: Any = client.info("memory")
    used: int = information["used_memory"]
    return used


def depth(system: LocalSystem) -> int:
    found: int = requests.get(f"{system.web}/api/v1/metrics/queue/summary", timeout=10).json()["queueDepth"]
    return found


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
