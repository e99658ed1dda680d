"""Rules under a storm: workers and Redis are killed, the database stands still, and all that must happen happens once.

What must happen is computed by a model of this test's own from the readings and the plain words of docs/operators.md and
docs/alarms.md. Both readings and faults follow from seeds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import requests

from deploy.local import LocalSystem, local_system
from deploy.postgresql import start_postgresql
from deploy.servers import Server
from tests.conftest import OLD_TIMES_COUNT
from tests.storms import assert_worked_off, dice, random_walk

SENSORS = 10
READINGS = 100
# So that no reading lies exactly at the end of a time.
STEP_SECONDS = 1.3
LIMIT, OFF_BELOW, ALARMING = 6.5, 6.2, 6.7
FOR_SECONDS, TIMES, WITHIN_SECONDS = 5, 3, 10
# Long ago enough to be over, and not so long that retention deletes the first alarms while the last ones are raised.
START = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
FAULTS = ("worker", "redis", "worker 2", "database", "worker", "redis", "worker 2", "worker", "database", "redis")

MAKE_FARM = f"""
import json
from devices.models import Organization
from tests import builders
farm = Organization.objects.first()
made = []
for number in range({SENSORS}):
    sensor = builders.sensor(farm)
    pump = builders.device(farm, states={{"power": ["on", "off"], "siren": ["on", "off"]}})
    high = builders.leaf(sensor, operator=">", value={LIMIT})
    runs = builders.leaf(pump, "power", "==", "on")
    told = {{"type": "notify", "message": "ph is {{ph}}", "severity": "info"}}
    builders.chain(farm, [
        builders.node("band", {{**high, "off": {OFF_BELOW}}}, next="on", on_false="off"),
        builders.node("on", builders.command(pump, "on")),
        builders.node("off", builders.command(pump, "off")),
    ])
    builders.chain(farm, [
        builders.node("lasting", {{**high, "for": "{FOR_SECONDS}s"}}, next="raise", on_false="clear"),
        builders.node("raise", {{"type": "raise_alarm", "alarm": "lasting", "severity": "warning", "message": "high"}}),
        builders.node("clear", {{"type": "clear_alarm", "alarm": "lasting"}}),
    ])
    builders.chain(farm, [
        builders.node("often", {{**high, "times": {TIMES}, "within": "{WITHIN_SECONDS}s"}}, next="on", on_false="off"),
        builders.node("on", builders.command(pump, "on", state="siren")),
        builders.node("off", builders.command(pump, "off", state="siren")),
    ])
    builders.chain(farm, [
        builders.node("high", high, next="tell"),
        builders.node("tell", {{**told, "title": "rests", "cooldown": "1h"}}),
    ])
    builders.chain(farm, [
        builders.node("alarming", {{**high, "value": {ALARMING}}}, next="tell"),
        builders.node("tell", {{**told, "title": "each"}}),
    ])
    builders.chain(farm, [
        builders.node("runs long", {{**runs, "for": "2s"}}, next="raise", on_false="clear"),
        builders.node("raise", {{"type": "raise_alarm", "alarm": "runs", "severity": "info", "message": "runs"}}),
        builders.node("clear", {{"type": "clear_alarm", "alarm": "runs"}}),
    ])
    made.append({{"token": builders.token(sensor), "sensor": str(sensor.uuid), "pump": str(pump.uuid)}})
print(json.dumps(made))
"""

LOOK = """
import json
from collections import Counter
from devices.models import StateChange
from notifications.models import Notification, Unpublished
from rules.models import Alarm, DeadLetter
changes = {}
rows = StateChange.objects.order_by("id").values_list("state__device__uuid", "state__name", "timestamp", "value")
for device, state, at, value in rows:
    changes.setdefault(f"{device} {state}", []).append([at.isoformat(), value])
alarms = {}
for row in Alarm.objects.order_by("raised_at"):
    times = [row.raised_at.isoformat(), row.cleared_at and row.cleared_at.isoformat()]
    alarms.setdefault(f"{row.originator_uuid} {row.type}", []).append(times)
told = Counter()
for payload in Notification.objects.values_list("payload", flat=True):
    if "title" in payload:
        told[f"{payload['originator']} {payload['title']}"] += 1
print(json.dumps({"changes": changes, "alarms": alarms, "told": told,
                  "unpublished": Unpublished.objects.count(),
                  "dead": list(DeadLetter.objects.values_list("error", flat=True))}))
"""


def moment(number: int) -> str:
    return (START + timedelta(seconds=number * STEP_SECONDS)).isoformat()


def readings_of(number: int) -> list[float]:
    """A random walk around the limit."""
    return random_walk(number, READINGS, start=6.4, step=0.15, within=(6.0, 6.9))


class Model:
    """What one sensor's readings must lead to, by the definitions and nothing of the engine."""

    def __init__(self, values: list[float]) -> None:
        self._values = values

    def power(self) -> list[list[str]]:
        """Dead band: on above the limit, and then until a reading is below the lower one."""
        wanted, state = [], "off"
        for value in self._values:
            state = "on" if value > LIMIT or (state == "on" and value >= OFF_BELOW) else "off"
            wanted.append(state)
        return _changes(wanted)

    def siren(self) -> list[list[str]]:
        """On while so many of the readings of the last seconds were above the limit."""
        back = int(WITHIN_SECONDS / STEP_SECONDS)
        recent = [self._values[max(0, at - back) : at + 1] for at in range(READINGS)]
        return _changes(["on" if sum(value > LIMIT for value in part) >= TIMES else "off" for part in recent])

    def lasting(self) -> list[list[str | None]]:
        """(raised, cleared) of each alarm: raised when all readings of so many seconds were above, cleared when not."""
        found: list[list[str | None]] = []
        above = -1
        for at, value in enumerate(self._values):
            above = above + 1 if value > LIMIT else -1  # steps since the first of those above
            is_open = bool(found) and found[-1][1] is None
            if above * STEP_SECONDS >= FOR_SECONDS and not is_open:
                found.append([moment(at), None])
            elif above * STEP_SECONDS < FOR_SECONDS and is_open:
                found[-1][1] = moment(at)
        return found

    def told(self, title: str) -> int:
        if title == "rests":
            return int(any(value > LIMIT for value in self._values))
        return sum(value > ALARMING for value in self._values)


def _changes(wanted: list[str]) -> list[list[str]]:
    """(time, value) of each change; the first value of a state is one."""
    return [[moment(at), value] for at, value in enumerate(wanted) if at == 0 or value != wanted[at - 1]]


@pytest.fixture
def postgres() -> Iterator[Server]:
    server = start_postgresql()
    yield server
    server.stop()


@pytest.fixture
def system(tmp_path: Path, postgres: Server) -> Iterator[LocalSystem]:
    names = {"DB_NAME": "postgres", "DB_USER": postgres.username, "DB_PASSWORD": postgres.password}
    environment = {"DB_ENGINE": "postgresql", "DB_PORT": str(postgres.port), **names}
    rest = {"LOG_LEVEL": "WARNING", "ALARM_FLAPPING_TIMES": "1000"}
    with local_system(tmp_path, **environment, **rest, **OLD_TIMES_COUNT) as running:
        running.add_second("worker", "scheduler")
        yield running


def send(system: LocalSystem, token: str, values: list[float], chance: random.Random) -> None:
    """In order, as a device does that keeps what was not accepted and sends it again with the same ids."""
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {token}"
    ids = [str(uuid4()) for _ in values]
    at, deadline = 0, time.monotonic() + 90
    while at < len(values):
        size = chance.randint(1, 8)
        items: list[Any] = [
            {"eventId": ids[number], "values": {"ph": values[number]}, "timestamp": moment(number)}
            for number in range(at, min(at + size, len(values)))
        ]
        answer = session.post(f"{system.web}/api/v1/telemetry", json={"events": items}, timeout=30)
        assert time.monotonic() < deadline, answer.text
        if answer.status_code in (429, 503):
            time.sleep(0.3)
            continue
        assert answer.status_code == 202, answer.text
        at += size
        time.sleep(chance.uniform(0.2, 1.5))


def stand_still(server: Server, *, seconds: float) -> None:
    """As a database whose disk hangs: it takes connections and answers nothing."""
    assert server.pid is not None
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    pids = [server.pid, *map(int, children)]
    for pid in pids:
        with suppress(ProcessLookupError):  # a connection's process ends with it
            os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def harm(system: LocalSystem, postgres: Server, what: str, chance: random.Random) -> None:
    if what == "database":
        stand_still(postgres, seconds=chance.uniform(1, 3))
    elif what == "redis":
        system.redis.kill()
        time.sleep(chance.uniform(0, 1.5))
        system.redis.start()
    else:
        system.kill(what)
        time.sleep(chance.uniform(0, 1))
        system.start(what)


def storm(system: LocalSystem, postgres: Server, sent: list[Future[None]]) -> None:
    chance = dice(8)
    for what in FAULTS:
        time.sleep(chance.uniform(0.5, 2.0))
        assert not all(each.done() for each in sent), "everything was sent before the storm was over"
        harm(system, postgres, what, chance)


def look(system: LocalSystem) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(system.manage("shell", "--verbosity", "0", "-c", LOOK).stdout)
    return found


def look_when_settled(system: LocalSystem, pumps: dict[str, bool]) -> dict[str, Any]:
    """After timers and sweeps: the alarms of pumps that run are open, the others are not. `pumps`: whether each runs."""
    deadline = time.monotonic() + 40
    while True:
        found = look(system)
        alarms = {pump: found["alarms"].get(f"{pump} runs", []) for pump in pumps}
        are_open = {pump: sum(cleared is None for _, cleared in rows) for pump, rows in alarms.items()}
        if are_open == pumps and not found["unpublished"]:
            return found
        assert time.monotonic() < deadline, (are_open, pumps, found["unpublished"])
        time.sleep(1)


@pytest.mark.timeout(240)
def test_in_a_storm_of_faults_everything_that_must_happen_happens_once(system: LocalSystem, postgres: Server) -> None:
    made: list[dict[str, str]] = json.loads(system.manage("shell", "--verbosity", "0", "-c", MAKE_FARM).stdout)
    system.start("web", "worker", "worker 2", "scheduler", "scheduler 2")
    with ThreadPoolExecutor(SENSORS) as senders:
        sent = [
            senders.submit(send, system, farm["token"], readings_of(number), dice(number))
            for number, farm in enumerate(made)
        ]
        storm(system, postgres, sent)
        for each in sent:
            each.result()
    assert_worked_off(system, SENSORS * READINGS)

    models = {farm["sensor"]: Model(readings_of(number)) for number, farm in enumerate(made)}
    runs = {farm["pump"]: models[farm["sensor"]].power()[-1][1] == "on" for farm in made}
    found = look_when_settled(system, runs)
    assert found["dead"] == []
    for farm in made:
        model, sensor, pump = models[farm["sensor"]], farm["sensor"], farm["pump"]
        assert found["changes"][f"{pump} power"] == model.power()
        assert found["changes"][f"{pump} siren"] == model.siren()
        assert found["alarms"].get(f"{sensor} lasting", []) == model.lasting()
        for title in ("rests", "each"):
            assert found["told"].get(f"{sensor} {title}", 0) == model.told(title), title
