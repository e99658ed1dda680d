"""A running system with devices that are killed and come back: what is dosed, what is switched, and who may do so."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import requests
from django.utils import timezone

from deploy.local import LocalSystem, local_system
from deploy.programs import REPOSITORY
from tests.system_clients import Person, coap_ask, http_post, mqtt_client, reading
from tests.waiting import until

pytestmark = pytest.mark.timeout(180)
_numbers = count(1)
SEED = int(os.environ.get("STORM_SEED", "1"))


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSystem]:
    with local_system(tmp_path_factory.mktemp("system")) as running:
        running.start()
        yield running


class Farm:
    """A doser with a momentary state, a board with two relays, and a sensor of the level."""

    def __init__(self, system: LocalSystem) -> None:
        self.system, self.person = system, Person(system)
        organization = system.farm["organization"]
        self.doser = self._device("Doser", organization)
        self.dose = self.person.post(
            "device-states", device=self.doser["uuid"], name="dose", datatype="number", kind="momentary"
        )
        self.board = self._device("Board", organization)
        self.relays = {
            name: self.person.post(
                "device-states", device=self.board["uuid"], name=name, allowedValues=["on", "off"], safeValue="off"
            )
            for name in ("pump1", "pump2")
        }

    def _device(self, name: str, organization: str) -> dict[str, str]:
        name = f"{name} {next(_numbers)}"
        uuid = self.person.post("devices", organization=organization, name=name)["uuid"]
        return {"uuid": uuid, "name": name, "token": self.person.post("device-tokens", device=uuid)["token"]}

    def switch(self, device: dict[str, str], state: str, value: Any, **more: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.person.token}"}
        body = {"deviceUuid": device["uuid"], "stateName": state, "value": value, **more}
        return requests.post(f"{self.system.web}/api/v1/device-state-instances", json=body, headers=headers, timeout=15)

    def commands(self, device: dict[str, str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.person.get("state-changes", device=device["uuid"], pageSize="200")["results"]
        return found

    def value(self, device: dict[str, str], name: str) -> Any:
        return self.person.get("device-states", device=device["uuid"], name=name)["results"][0]["value"]


@pytest.fixture
def farm(system: LocalSystem) -> Farm:
    return Farm(system)


def doser_process(farm: Farm, directory: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "examples.mqtt_doser", "--uuid", farm.doser["uuid"], "--directory", str(directory)]
    address = ["--port", str(farm.system.broker.port), "--seconds", "0.3"]
    environment = {**os.environ, "DEVICE_TOKEN": farm.doser["token"]}
    with (directory / "doser.log").open("ab") as log:
        return subprocess.Popen([*command, *address], cwd=REPOSITORY, env=environment, stdout=log, stderr=log)


def test_a_doser_whose_power_is_cut_again_and_again_doses_each_command_at_most_once(farm: Farm, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    decided: set[str] = set()
    doser = doser_process(farm, tmp_path)
    try:
        # Once it has a session, the broker keeps commands for it.
        until(lambda: "online" in (tmp_path / "doser.log").read_text())
        for _ in range(12):
            answer = farm.switch(farm.doser, "dose", 5)
            assert answer.status_code == 201, answer.text
            decided.add(answer.json()["uuid"])
            time.sleep(chance.uniform(0.0, 0.9))
            if chance.random() < 0.7:
                doser.kill()
                doser.wait()
                doser = doser_process(farm, tmp_path)
        ends = {"applied", "failed"}
        until(lambda: {row["command"]["state"] for row in farm.commands(farm.doser)} <= ends, seconds=60)
    finally:
        doser.kill()
        doser.wait()
    doses = [line.split()[0] for line in (tmp_path / "doses.txt").read_text().splitlines()]
    assert len(doses) == len(set(doses)), "none twice"
    assert set(doses) <= decided
    ended = {row["uuid"]: row["command"]["state"] for row in farm.commands(farm.doser)}
    assert {uuid for uuid, state in ended.items() if state == "applied"} <= set(doses)
    assert ended.keys() == decided


def test_a_board_that_was_away_learns_both_relays_and_no_dose(farm: Farm) -> None:
    for name, value in (("pump1", "on"), ("pump1", "off"), ("pump2", "on")):
        assert farm.switch(farm.board, name, value).status_code == 201
    heard: dict[str, Any] = {}
    board = mqtt_client(farm.system, farm.board)
    board.on_message = lambda _client, _data, message: heard.update({message.topic: message.payload})
    board.subscribe(f"devices/{farm.board['uuid']}/state/+", qos=1)
    until(lambda: len(heard) == 2)
    board.disconnect()
    board.loop_stop()
    assert {topic.rsplit("/", 1)[1]: b'"value":"on"' in body for topic, body in heard.items()} == {
        "pump1": False,
        "pump2": True,
    }


def test_a_device_that_comes_back_while_its_old_connection_stands_is_online(farm: Farm) -> None:
    status = f"devices/{farm.board['uuid']}/status"
    first = mqtt_client(farm.system, farm.board)  # as soon as the broker knows the account
    first.disconnect()
    first.loop_stop()
    connections = []
    for _ in range(3):
        client = mqtt_client(farm.system, farm.board, will=(status, "offline"), comes_back=False)
        client.publish(status, "online", qos=1, retain=True).wait_for_publish(10)
        connections.append(client)
    until(lambda: farm.person.get(f"devices/{farm.board['uuid']}")["connected"] is True)
    time.sleep(2)
    assert farm.person.get(f"devices/{farm.board['uuid']}")["connected"] is True
    for client in connections:
        client.loop_stop()


def test_nobody_takes_the_connection_of_another(farm: Farm) -> None:
    board = mqtt_client(farm.system, farm.board)
    stranger = {**farm.doser, "client_id": farm.board["token"].split("_")[1]}
    with pytest.raises(AssertionError, match="does not know"):
        mqtt_client(farm.system, stranger, patience=3)
    assert board.is_connected()
    board.disconnect()
    board.loop_stop()


def test_a_coap_doser_learns_its_commands_answers_and_is_told_no_more(farm: Farm) -> None:
    change = farm.switch(farm.doser, "dose", 3).json()
    path = f"/devices/{farm.doser['uuid']}"

    def under_way() -> list[str]:
        return [each["id"] for each in coap_ask(farm.system, "GET", f"{path}/state", farm.doser)[1].get("commands", [])]

    assert change["uuid"] in under_way()
    body = {"id": change["uuid"], "status": "applied"}
    assert coap_ask(farm.system, "POST", f"{path}/commands/ack", farm.doser, body)[0] == "2.04"
    assert change["uuid"] not in under_way()
    row = next(row for row in farm.commands(farm.doser) if row["uuid"] == change["uuid"])
    assert row["command"]["state"] == "applied"
    wrong = {"id": farm.board["uuid"], "status": "applied"}
    assert coap_ask(farm.system, "POST", f"{path}/commands/ack", farm.doser, wrong)[0] == "4.00"


def test_interlocks_over_rest_and_in_the_running_system(farm: Farm) -> None:
    pump1, pump2 = farm.relays["pump1"], farm.relays["pump2"]
    for name in farm.relays:
        farm.switch(farm.board, name, "off")
    farm.person.post("interlocks", state=pump1["uuid"], maximumOnSeconds=2, excludes=[pump2["uuid"]])
    assert farm.switch(farm.board, "pump1", "on").status_code == 201
    refused = farm.switch(farm.board, "pump2", "on")
    assert (refused.status_code, refused.json()["detail"]) == (
        409,
        f"pump2 must not be changed now: {farm.board['name']}: pump1 is on",
    )
    until(lambda: farm.value(farm.board, "pump1") == "off")
    assert farm.switch(farm.board, "pump2", "on").status_code == 201
    assert farm.switch(farm.board, "pump1", "on", override="I am standing beside it").status_code == 201
    kinds = {
        (row["kind"], row["overriddenReason"])
        for row in farm.person.get("vetoes", device=farm.board["uuid"])["results"]
    }
    assert kinds == {("excludes", ""), ("excludes", "I am standing beside it")}
    until(lambda: farm.value(farm.board, "pump1") == "off")


def test_a_lock_over_rest_holds_people_off(farm: Farm) -> None:
    pump2 = farm.relays["pump2"]["uuid"]
    farm.switch(farm.board, "pump2", "off")
    until_ = (timezone.now() + timedelta(minutes=5)).isoformat()
    farm.person.post(f"device-states/{pump2}/lock", until=until_, reason="repair")
    assert "holds it until" in farm.switch(farm.board, "pump2", "on").json()["detail"]
    farm.person.post(f"device-states/{pump2}/unlock")
    assert farm.switch(farm.board, "pump2", "on").status_code == 201


def test_a_pump_that_needs_water_stops_when_the_level_falls(farm: Farm) -> None:
    sensor = farm.system.farm["sensors"][0]
    level = farm.person.get("variables", sensor=sensor["uuid"], name="waterLevel")["results"][0]
    farm.switch(farm.board, "pump2", "off")
    interlock = farm.person.post("interlocks", state=farm.relays["pump2"]["uuid"])
    farm.person.post("interlock-requirements", interlock=interlock["uuid"], variable=level["uuid"], minimum=20)
    assert http_post(farm.system, sensor, reading(waterLevel=50)).status_code == 202

    def answers(code: int) -> Callable[[], bool]:
        return lambda: farm.switch(farm.board, "pump2", "on").status_code == code

    until(answers(201))
    assert http_post(farm.system, sensor, reading(waterLevel=5)).status_code == 202
    until(lambda: farm.value(farm.board, "pump2") == "off")
    until(answers(409))


def test_a_maximum_time_on_survives_kills_and_an_emptied_redis(farm: Farm) -> None:
    system = farm.system
    farm.person.post("interlocks", state=farm.relays["pump1"]["uuid"], maximumOnSeconds=6)
    assert farm.switch(farm.board, "pump1", "on").status_code == 201
    system.kill("scheduler")
    system.kill("worker")
    system.redis.kill()
    time.sleep(1)
    system.redis.start()
    system.start("scheduler", "worker")
    until(lambda: farm.value(farm.board, "pump1") == "off", seconds=30)
