"""A dead band under two workers of which one is killed again and again: every pump switches when it must, once, in order.

AEMOS_ORDER_ROUNDS sets how many pumps there are, each with a sensor of its own and 200 readings; 50 by default.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests

from deploy.local import LocalSystem, local_system
from deploy.processes import Process, kill, spawn
from deploy.programs import REPOSITORY
from tests.conftest import OLD_TIMES_COUNT
from tests.storms import assert_worked_off, dice, random_walk

ROUNDS = int(os.environ.get("AEMOS_ORDER_ROUNDS", "50"))
READINGS = 200
ON_ABOVE, OFF_BELOW = 6.5, 6.2
KILLS = 4
START = datetime(2026, 5, 1, tzinfo=UTC)

MAKE_FARM = f"""
import json, sys
from devices.models import Organization
from tests import builders
farm = Organization.objects.first()
made = []
for number in range({ROUNDS}):
    sensor, pump = builders.sensor(farm), builders.device(farm)
    band = {{**builders.leaf(sensor, operator=">", value={ON_ABOVE}), "releaseAt": {OFF_BELOW}}}
    nodes = [
        builders.node("band", band, next="on", on_false="off"),
        builders.node("on", builders.command(pump, "on")),
        builders.node("off", builders.command(pump, "off")),
    ]
    builders.chain(farm, nodes, f"dead band {{number}}")
    made.append({{"token": builders.token(sensor), "pump": str(pump.uuid)}})
print(json.dumps(made))
"""


def readings_of(number: int) -> list[float]:
    """A random walk across the band, with steps that often end inside it."""
    return random_walk(number, READINGS, start=6.35, step=0.2, within=(5.9, 6.8))


def expected_of(values: list[float]) -> list[tuple[str, str]]:
    """(time, value) of each change, by the plain definition of a dead band."""
    changes: list[tuple[str, str]] = []
    state = ""
    for second, value in enumerate(values):
        wanted = "on" if value > ON_ABOVE or (state == "on" and value >= OFF_BELOW) else "off"
        if wanted != state:
            state = wanted
            changes.append((f"{START + timedelta(seconds=second):%Y-%m-%d %H:%M:%S}", wanted))
    return changes


def send(system: LocalSystem, token: str, values: list[float], chance: random.Random) -> None:
    """In order, in requests of one to forty readings; what is refused for a while is sent again."""
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {token}"
    at = 0
    while at < len(values):
        size = chance.randint(1, 40)
        items: list[Any] = [
            {"values": {"ph": value}, "timestamp": (START + timedelta(seconds=at + offset)).isoformat()}
            for offset, value in enumerate(values[at : at + size])
        ]
        answer = session.post(f"{system.web}/api/v1/telemetry", json={"events": items}, timeout=30)
        if answer.status_code in (429, 503):
            time.sleep(min(int(answer.headers["Retry-After"]), 5))
            continue
        assert answer.status_code == 202, answer.text
        at += size


@pytest.fixture
def system(tmp_path: Path) -> Iterator[LocalSystem]:
    with local_system(tmp_path, LOG_LEVEL="WARNING", **OLD_TIMES_COUNT) as running:
        yield running


def worker(system: LocalSystem) -> subprocess.Popen[bytes]:
    command = (sys.executable, "manage.py", "rqworker")
    process = Process(name="second worker", command=command, environment=system.environment)
    return spawn(process, output=subprocess.DEVNULL, directory=REPOSITORY)


@pytest.mark.timeout(300)
def test_killed_workers_switch_every_pump_as_its_dead_band_says(
    system: LocalSystem,
) -> None:
    made: list[dict[str, str]] = json.loads(system.manage("shell", "--verbosity", "0", "-c", MAKE_FARM).stdout)
    system.start("web", "worker", "scheduler")
    chance = dice(1)
    victim = worker(system)
    try:
        with ThreadPoolExecutor(8) as senders:
            sent = [
                senders.submit(send, system, farm["token"], readings_of(number), dice(number))
                for number, farm in enumerate(made)
            ]
            for _ in range(KILLS):
                time.sleep(chance.uniform(0.5, 3.0))
                kill(victim)
                victim = worker(system)
            for each in sent:
                each.result()
        assert_worked_off(system, len(made) * READINGS)
    finally:
        kill(victim)

    changes = changes_by_pump(system)
    for number, farm in enumerate(made):
        assert changes[farm["pump"].replace("-", "")] == expected_of(readings_of(number)), f"pump {number}"


def changes_by_pump(system: LocalSystem) -> dict[str, list[tuple[str, str]]]:
    """Per pump the times and values of its changes, in the order in which they were made."""
    statement = """
        SELECT device.uuid, change.timestamp, change.value FROM devices_statechange AS change
        JOIN devices_devicestate AS state ON state.id = change.state_id
        JOIN devices_device AS device ON device.id = state.device_id ORDER BY change.id
    """
    found: dict[str, list[tuple[str, str]]] = {}
    with closing(sqlite3.connect(system.environment["DB_NAME"], timeout=20)) as database:
        rows: list[tuple[Any, ...]] = database.execute(statement).fetchall()
    for uuid, at, value in rows:
        found.setdefault(uuid, []).append((at[:19], json.loads(value)))
    return found
