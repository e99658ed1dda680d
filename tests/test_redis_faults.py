"""Redis that is killed and started again at twenty random moments, or emptied: effects go on, and every client hears of them.

The moments follow from seeds. Commands are made, published, swept and delivered by processes of their own; Redis syncs its
append-only file at every write. What a client hears twice it knows by its id.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aemos.lib import keys, redis
from deploy.processes import Process, kill, spawn
from deploy.servers import Server
from gateway.mqtt import topics
from notifications import messages
from tests.gateway_process import REPOSITORY, GatewayProcess, operator, running
from tests.listeners import AIOCOAP, Lines
from tests.mqtt_clients import operator as mqtt_operator
from tests.storms import dice
from tests.tcp_relay import Relay
from tests.test_mqtt import forget_sessions
from tests.test_mqtt_faults import MQTT, Pump
from tests.test_socketio_faults import Follower
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("empty_redis", "_clean_sessions")
MOMENTS = 20
BURST = 6
ALL = (MQTT, {"kind": "socketio"}, {"kind": "coap"})


@pytest.fixture
def _clean_sessions(broker: Server) -> Iterator[None]:
    forget_sessions(broker)
    yield
    forget_sessions(broker)


@pytest.fixture
def redis_with_aof(redis_server: Server) -> Iterator[Server]:
    """Running again at the end, whatever became of the test."""
    yield redis_server
    if redis_server.child is None:
        redis_server.start()


class Observer:
    """A CoAP client of another make that has observed a device's state since before the first command."""

    def __init__(self, gateway: GatewayProcess, farm: dict[str, Any]) -> None:
        host, port = gateway.addresses()["coap"]
        uri = f"coap://{host}:{port}/devices/{farm['device']}/state?token={farm['device_token']}"
        self._output = Lines((sys.executable, "-u", "-c", AIOCOAP, uri), {})
        until(lambda: self._output.lines)

    def newest(self) -> Any:
        return json.loads(self._output.lines[-1])["states"]["power"]["value"]

    def close(self) -> None:
        self._output.close()


class Farm:
    """Two gateways and a scheduler, and one client per protocol; `commands` are the ids of all that was switched, in order."""

    def __init__(self, broker: Server, gateways: list[GatewayProcess]) -> None:
        self.seeded = operator().ask("seed")
        self.commands: list[str] = []
        self.relays = [Relay(gateway.addresses()["socketio"]) for gateway in gateways]
        self.pump = Pump(broker, self.seeded["device"])
        self.observer = Observer(gateways[0], self.seeded)
        self.person = Follower([relay.url for relay in self.relays], self.seeded["access_token"])
        self.person.start()

    def switch(self) -> None:
        self.commands += operator().ask("switch", device=self.seeded["device"], count=BURST)

    def deliveries(self) -> dict[str, dict[str, str]]:
        """Per protocol what became of each command."""
        found: dict[str, dict[str, str]] = operator().ask("deliveries_of_device", device=self.seeded["device"])
        return found

    def pending(self) -> list[str]:
        """The commands that nobody has dealt with for the broker."""
        return [command for command, state in self.deliveries()["mqtt"].items() if state == "pending"]

    def close(self) -> None:
        self.person.stop()
        for relay in self.relays:
            relay.close()
        self.person.join(20)
        self.observer.close()
        self.pump.close()


@contextmanager
def farm_on(broker: Server, folder: Path) -> Iterator[Farm]:
    with running(folder / "one", *ALL) as one, running(folder / "two", *ALL) as two, scheduler(folder / "scheduler"):
        farm = Farm(broker, [one, two])
        try:
            until(lambda: farm.person.position)
            yield farm
        finally:
            farm.close()
            with mqtt_operator(broker) as cleaner:
                cleaner.publish(topics.state(farm.pump.uuid), "", retain=True)


@contextmanager
def scheduler(log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The one that publishes what Redis did not take."""
    command = (sys.executable, "manage.py", "runscheduler")
    process = Process(name="scheduler", command=command, environment=operator().environment)
    with log.open("ab") as output:
        child = spawn(process, output=output, directory=REPOSITORY)
    try:
        yield child
    finally:
        kill(child)


def assert_all_heard(farm: Farm) -> None:
    """Each protocol by its promise. What Redis did not take in time may be superseded for the device, and for nobody else."""
    operator().ask("settle_deliveries", seconds=120)  # what Redis has lost after all, as the scheduler finds it later
    until_nothing_is_pending(farm)
    became = farm.deliveries()["mqtt"]
    assert became[farm.commands[-1]] == "acknowledged"
    told = [each for each in farm.commands if became[each] == "acknowledged"]
    until(lambda: set(told) <= set(farm.pump.obeyed), seconds=20)
    assert is_in_order(farm.pump.obeyed, farm.commands), "the device never goes back"
    until(lambda: set(farm.commands) <= set(farm.person.received), seconds=20)
    until(lambda: farm.observer.newest() == operator().ask("wanted", device=farm.seeded["device"]), seconds=20)


def until_nothing_is_pending(farm: Farm) -> None:
    deadline = time.monotonic() + 40
    while waiting := farm.pending():
        assert time.monotonic() < deadline, waiting
        time.sleep(0.1)


def is_in_order(some: list[str], of_all: list[str]) -> bool:
    rest = iter(of_all)
    return all(each in rest for each in some)


def on_stream() -> list[str]:
    """The ids of the messages in the order in which they were published first."""
    entries = redis.client().xrange(keys.NOTIFICATIONS)
    return list(dict.fromkeys(str(messages.decode(fields[b"m"]).id) for _, fields in entries))


def while_it_switches(farm: Farm, moments: random.Random, harm: Any) -> None:
    """Does harm at random moments, under each of which commands are made."""
    with ThreadPoolExecutor(1) as worker:
        for _ in range(MOMENTS):
            switched = worker.submit(farm.switch)
            time.sleep(moments.uniform(0, 0.2))
            harm()
            switched.result(30)


@pytest.mark.timeout(180)
def test_redis_killed_at_random_moments_costs_no_command_and_no_order(
    broker: Server, redis_with_aof: Server, tmp_path: Path
) -> None:
    moments = dice(11)

    def harm() -> None:
        redis_with_aof.kill()
        time.sleep(moments.uniform(0, 0.8))
        if moments.random() < 0.3:
            for relay in farm.relays:  # who comes back while Redis is away waits for what was missed
                relay.cut()
        redis_with_aof.start()

    with farm_on(broker, tmp_path) as farm:
        while_it_switches(farm, moments, harm)
        farm.switch()
        assert_all_heard(farm)
        published = [each for each in on_stream() if each in farm.commands]
        heard = [each for each in dict.fromkeys(farm.person.received) if each in published]
        assert heard == published, "people hear in the order of publication"


@pytest.mark.timeout(180)
def test_redis_emptied_at_random_moments_is_made_good_from_the_database(
    broker: Server, redis_with_aof: Server, tmp_path: Path
) -> None:
    moments = dice(12)

    def harm() -> None:
        redis.client().flushdb()

    with farm_on(broker, tmp_path) as farm:
        while_it_switches(farm, moments, harm)
        farm.switch()
        until(lambda: farm.commands[-1] in farm.person.received)
        assert_all_heard(farm)
