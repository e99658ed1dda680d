"""Faults of each part, again and again, while rules and a person switch a pump and a fan: no interlock is violated."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest
import requests

from deploy import postgresql
from deploy.local import LocalSystem, local_system
from deploy.servers import Server
from tests.system_clients import Person, http_post, reading
from tests.waiting import until

pytestmark = pytest.mark.timeout(600)
# So often each part is killed; 20 by hand.
KILLS = int(os.environ.get("ACTUATOR_KILLS", "3"))
SEED = int(os.environ.get("STORM_SEED", "1"))
MAXIMUM_ON, MINIMUM_OFF = timedelta(seconds=2), timedelta(seconds=1)
# Until the scheduler is there again and finds out.
LATENCY = timedelta(seconds=15)


@pytest.fixture
def database() -> Iterator[Server]:
    server = postgresql.start_postgresql(durable=True)
    yield server
    server.stop()


class Traffic:
    """A sensor whose readings switch the pump and the fan, and a person who presses the same switches."""

    def __init__(self, system: LocalSystem, chance: random.Random) -> None:
        self._system, self._chance = system, chance
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._repeat, args=[each]) for each in (self._measure, self._press)]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, step: Callable[[], None]) -> None:
        while not self._ended.wait(self._chance.uniform(0.02, 0.2)):
            with suppress(requests.RequestException, AssertionError, KeyError):  # refused while something is away
                step()

    def _measure(self) -> None:
        values = {"ph": self._chance.choice([6.0, 6.9]), "temperature": self._chance.choice([20.0, 27.0])}
        http_post(self._system, self._system.farm["sensors"][0], reading(**values), patience=0)

    def _press(self) -> None:
        pump, fan = self._system.farm["devices"]
        wishes = [(pump, "power", "on"), (pump, "power", "off"), (fan, "speed", "high"), (fan, "speed", "off")]
        Person(self._system).switch(*self._chance.choice(wishes))


def faults(system: LocalSystem, database: Server) -> Mapping[str, Callable[[], None]]:
    def server(found: Server) -> Callable[[], None]:
        def fault() -> None:
            found.kill()
            time.sleep(0.2)
            found.start()

        return fault

    def process(name: str) -> Callable[[], None]:
        def fault() -> None:
            system.kill(name)
            system.start(name)

        return fault

    servers = {"broker": system.broker, "redis": system.redis, "database": database}
    processes = ("gateway", "worker", "scheduler")
    return {name: server(each) for name, each in servers.items()} | {name: process(name) for name in processes}


def test_no_interlock_is_violated_whatever_is_killed(tmp_path: Path, database: Server) -> None:
    chance = random.Random(SEED)
    settings = {
        "DB_ENGINE": "postgresql", "DB_NAME": "postgres", "DB_PORT": str(database.port), "DB_USER": database.username,
        "DB_PASSWORD": database.password, "LOG_LEVEL": "WARNING",
    }  # fmt: skip
    with local_system(tmp_path, **settings) as system:
        system.start()
        pump, fan = limit(system)
        with Traffic(system, chance):
            for fault in faults(system, database).values():
                for _ in range(KILLS):
                    time.sleep(chance.uniform(0.3, 1.0))
                    fault()
            time.sleep(2)
        until(lambda: system.manage("ledger", check=False).returncode == 0, seconds=60)
        until(lambda: all(end for _, end in runs_of(database, pump)), seconds=60)
        check(database, pump, fan)


def limit(system: LocalSystem) -> tuple[str, str]:
    """Interlocks of the pump and the fan; their states."""
    person = Person(system)
    states = []
    for device in system.farm["devices"]:
        state = person.get("device-states", device=device["uuid"])["results"][0]
        person.patch(f"device-states/{state['uuid']}", safeValue="off")
        states.append(str(state["uuid"]))
    pump, fan = states
    person.post("interlocks", state=pump, maximumOnSeconds=2, minimumOffSeconds=1, excludes=[fan])
    return pump, fan


def query(database: Server, statement: str, state: str) -> list[tuple[Any, ...]]:
    login = f"host=127.0.0.1 port={database.port} dbname=postgres user={database.username} password={database.password}"
    with psycopg.connect(login) as connection:
        return connection.execute(statement, [state]).fetchall()


def runs_of(database: Server, state: str) -> list[tuple[datetime, datetime]]:
    statement = """SELECT began_at, ended_at FROM devices_staterun JOIN devices_devicestate ON state_id = devices_devicestate.id
                   WHERE uuid = %s ORDER BY began_at"""
    return [(begin, end) for begin, end in query(database, statement, state)]


def check(database: Server, pump: str, fan: str) -> None:
    runs, others = runs_of(database, pump), runs_of(database, fan)
    assert len(runs) >= KILLS, "the pump ran"
    assert others, "and the fan"
    assert all(end - begin <= MAXIMUM_ON + LATENCY for begin, end in runs)
    assert all(begin - end >= MINIMUM_OFF for (_, end), (begin, _) in pairwise(runs))
    still = datetime.max.replace(tzinfo=runs[0][0].tzinfo)
    assert not any(a < (d or still) and c < b for a, b in runs for c, d in others), "never both"
    statement = """SELECT devices_statechange.value FROM devices_statechange
                   JOIN devices_devicestate ON state_id = devices_devicestate.id
                   WHERE devices_devicestate.uuid = %s ORDER BY devices_statechange.id"""
    values = [value for (value,) in query(database, statement, pump)]
    started = sum(after == "on" and before != "on" for before, after in pairwise(["off", *values]))
    assert started == len(runs), "each run is of one recorded change"
