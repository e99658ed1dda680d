"""Twenty random moments at which a gateway or the broker dies: commands arrive in order, telemetry is not lost.

The moments follow from a seed. What arrives twice is known by its id, as a device would know it.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy.processes import has_ended
from deploy.servers import Server
from gateway.mqtt import topics
from tests.gateway_process import GatewayProcess, operator, running
from tests.mqtt_clients import Client
from tests.mqtt_clients import operator as mqtt_operator
from tests.storms import dice
from tests.test_mqtt import forget_sessions
from tests.waiting import until

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("empty_redis", "_clean_sessions")]
MOMENTS = 20
BURST = 15
MQTT = {"kind": "mqtt"}


@pytest.fixture
def _clean_sessions(broker: Server) -> Iterator[None]:
    forget_sessions(broker)
    yield
    if broker.child is None:
        broker.start()
    forget_sessions(broker)


class Pump:
    """A device with a lasting session that obeys every command once, says so, and measures."""

    def __init__(self, broker: Server, uuid: str) -> None:
        self.uuid = uuid
        self.obeyed: list[str] = []
        self.repeated = 0
        self.measured = 0
        self._client = Client(broker, broker.username, broker.password, session=f"pump-{uuid}")
        self._client._client.on_message = self._obey
        self.until_connected(times=1)
        assert self._client.subscribe(topics.commands(uuid), qos=2)

    def until_connected(self, *, times: int) -> None:
        until(lambda: self._client.connections >= times)

    def measure(self) -> None:
        """Publishes what the broker then acknowledges to the device."""
        self.measured += 1
        self._client.publish(topics.datastream(self.uuid), str(self.measured))

    def _obey(self, client: Any, _data: Any, message: Any) -> None:
        identifier = json.loads(message.payload)["id"]
        if identifier in self.obeyed:
            self.repeated += 1
        else:
            self.obeyed.append(identifier)
        client.publish(topics.acknowledgements(self.uuid), json.dumps({"id": identifier, "status": "applied"}), qos=1)

    def close(self) -> None:
        self._client.close()


@contextmanager
def farm_pump(broker: Server) -> Iterator[Pump]:
    pump = Pump(broker, operator().ask("seed")["device"])
    try:
        yield pump
    finally:
        pump.close()
        with mqtt_operator(broker) as cleaner:
            cleaner.publish(topics.state(pump.uuid), "", retain=True)


def assert_nothing_lost(pump: Pump, commands: list[str], gateways: list[GatewayProcess]) -> None:
    until(lambda: len(pump.obeyed) >= len(commands), seconds=30)
    assert pump.obeyed == commands, "each once, in order"
    until(lambda: set(operator().ask("command_states", device=pump.uuid)) == {"applied"}, seconds=30)
    wanted = {str(number) for number in range(1, pump.measured + 1)}
    until(lambda: taken(gateways, pump.uuid) >= wanted, seconds=30)


def taken(gateways: list[GatewayProcess], uuid: str) -> set[str]:
    return {payload for each in gateways for payload, by, *_ in each.printed("ingested") if by == uuid}


def leading(gateways: list[GatewayProcess]) -> list[GatewayProcess]:
    alive = [each for each in gateways if not has_ended(each.child)]
    return [each for each in alive if "This gateway delivers messages" in each.text]


def until_connected(gateway: GatewayProcess, *, times: int) -> None:
    for what in ("telemetry", "reports", "notifications"):
        gateway.wait_for(lambda what=what: gateway.text.count(f"is connected, for {what}") >= times)  # type: ignore[misc]


def moment(chance: random.Random) -> None:
    threading.Event().wait(chance.uniform(0, 0.3))


def test_gateways_killed_at_random_moments_lose_nothing_and_keep_the_order(broker: Server, tmp_path: Path) -> None:
    chance, commands, gateways = dice(5), list[str](), list[GatewayProcess]()
    with farm_pump(broker) as pump, ExitStack() as stack:
        for number in range(2):
            gateways.append(stack.enter_context(running(tmp_path / f"gateway-{number}", MQTT)))
        for number in range(MOMENTS):
            (leader,) = until(lambda: leading(gateways))
            worker = threading.Thread(target=pump.measure)
            worker.start()
            commands += operator().ask("switch", device=pump.uuid, count=BURST)
            moment(chance)
            leader.kill()
            worker.join(20)
            gateways.append(stack.enter_context(running(tmp_path / f"successor-{number}", MQTT)))
        assert_nothing_lost(pump, commands, gateways)


def test_broker_killed_at_random_moments_loses_nothing_and_keeps_the_order(broker: Server, tmp_path: Path) -> None:
    chance, commands = dice(6), list[str]()
    with farm_pump(broker) as pump, running(tmp_path / "gateway", MQTT) as gateway:
        until(lambda: leading([gateway]))
        until_connected(gateway, times=1)
        broker.restart()  # so that it remembers the sessions: Mosquitto writes them when it stops, and now and then
        for number in range(MOMENTS):
            pump.until_connected(times=number + 2)
            until_connected(gateway, times=number + 2)
            gateway.wait_for(lambda: taken([gateway], pump.uuid) >= {str(pump.measured)} - {"0"})
            if number % 2:
                pump.measure()  # a broker that is killed may lose what it has acknowledged to a device
            commands += operator().ask("switch", device=pump.uuid, count=BURST)
            moment(chance)
            if number % 2:
                broker.restart()
            else:
                broker.kill()
                broker.start()
        assert_nothing_lost(pump, commands, [gateway])
