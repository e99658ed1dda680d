"""The whole system as real processes, real servers and clients that others wrote: a reading in, a pump told out."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiocoap
import paho.mqtt.client as mqtt
import pytest
import requests
import socketio
from paho.mqtt.enums import CallbackAPIVersion

from deploy.local import LocalSystem, local_system
from deploy.programs import get

pytestmark = pytest.mark.timeout(180)
SOON_SECONDS = 15.0


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSystem]:
    with local_system(tmp_path_factory.mktemp("system")) as running:
        running.start()
        yield running


Received = queue.Queue[dict[str, Any]]


def wait_for(found: Callable[[], bool], what: str, seconds: float = SOON_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)


def next_state(received: Received, state: str, value: str) -> dict[str, Any]:
    """The next message about the state with this value; older ones, such as a retained state, are passed over."""
    deadline = time.monotonic() + SOON_SECONDS
    while True:
        message = received.get(timeout=max(0.01, deadline - time.monotonic()))
        if message["data"]["stateName"] == state and message["data"]["value"] == value:
            return message


class Listeners:
    """One client per protocol, each of another make: python-socketio, paho, aiocoap and libcoap."""

    def __init__(self, system: LocalSystem, device: dict[str, str]) -> None:
        self.socket: Received = queue.Queue()
        self.mqtt: Received = queue.Queue()
        self.aiocoap: queue.Queue[str] = queue.Queue()
        self.libcoap: queue.Queue[str] = queue.Queue()
        self._uri = f"coap://{system.coap}/devices/{device['uuid']}/state?token={device['token']}"
        self._socketio = socketio.Client()
        self._socketio.on("device-state-change", self.socket.put)
        self._socketio.connect(system.socketio, auth={"token": access_token(system)})
        self._mqtt = mqtt_client(system, device)
        self._mqtt.on_message = lambda client, data, message: self.mqtt.put(json.loads(message.payload))
        self._mqtt.subscribe(f"devices/{device['uuid']}/state", qos=1)
        observer = (sys.executable, "-u", "-c", AIOCOAP_OBSERVER, self._uri)
        libcoap = get("coap-client-notls")
        client = ("stdbuf", "-oL", str(libcoap.path), "-m", "get", "-s", "90", "-v", "0", "-w", self._uri)
        self._processes = [
            lines_of(observer, self.aiocoap, {}),
            lines_of(client, self.libcoap, dict(libcoap.environment)),
        ]

    def close(self) -> None:
        self._socketio.disconnect()
        self._mqtt.disconnect()
        self._mqtt.loop_stop()
        for process in self._processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


AIOCOAP_OBSERVER = """
import asyncio, sys, aiocoap
async def main():
    context = await aiocoap.Context.create_client_context()
    request = context.request(aiocoap.Message(code=aiocoap.GET, uri=sys.argv[1], observe=0))
    print((await request.response).payload.decode(), flush=True)
    async for message in request.observation:
        print(message.payload.decode(), flush=True)
asyncio.run(main())
"""


def lines_of(command: tuple[str, ...], lines: queue.Queue[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)

    threading.Thread(target=read, daemon=True).start()
    return process


def access_token(system: LocalSystem) -> str:
    answer = requests.post(f"{system.web}/api/v1/auth/login", json=system.farm["admin"], timeout=10)
    assert answer.status_code == 200, answer.text
    token: str = answer.json()["access"]
    return token


def mqtt_client(system: LocalSystem, speaker: dict[str, str]) -> mqtt.Client:
    """A connected client with the credentials that a device token gives."""
    connected = threading.Event()
    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    client.username_pw_set(speaker["token"].split("_")[1], speaker["token"])
    client.on_connect = lambda client, data, flags, reason, properties: None if reason.is_failure else connected.set()
    client.connect("127.0.0.1", system.broker.port)
    client.loop_start()
    assert connected.wait(SOON_SECONDS), "the broker does not know the device"
    return client


def post(system: LocalSystem, sensor: dict[str, str], **values: float) -> None:
    answer = requests.post(
        f"{system.web}/api/v1/telemetry",
        json={"values": values, "timestamp": now()},
        headers={"Authorization": f"Bearer {sensor['token']}"},
        timeout=10,
    )
    assert (answer.status_code, answer.json()["accepted"]) == (202, 1)


def publish(system: LocalSystem, sensor: dict[str, str], **values: float) -> None:
    publish_payload(system, sensor, {"values": values, "timestamp": now()})


def publish_payload(system: LocalSystem, sensor: dict[str, str], body: dict[str, Any]) -> None:
    client = mqtt_client(system, sensor)
    client.publish(f"devices/{sensor['uuid']}/datastream", json.dumps(body), qos=1).wait_for_publish(SOON_SECONDS)
    client.disconnect()
    client.loop_stop()


def coap_post(system: LocalSystem, sensor: dict[str, str], **values: float) -> None:
    assert asyncio.run(coap_answer(system, sensor, {"values": values, "timestamp": now()})) == ("2.04", "")


async def coap_answer(system: LocalSystem, sensor: dict[str, str], body: dict[str, Any]) -> tuple[str, str]:
    """Code and diagnostic payload."""
    context = await aiocoap.Context.create_client_context()
    uri = f"coap://{system.coap}/devices/{sensor['uuid']}/datastream?token={sensor['token']}"
    message = aiocoap.Message(code=aiocoap.POST, uri=uri, payload=json.dumps(body).encode())
    answer = await context.request(message).response
    await context.shutdown()
    return str(answer.code).split()[0], answer.payload.decode()


def now() -> str:
    return datetime.now(UTC).isoformat()


def test_a_reading_over_each_protocol_switches_the_pump_and_every_client_is_told(system: LocalSystem) -> None:
    sensor, pump = system.farm["sensors"][0], system.farm["devices"][0]
    listeners = Listeners(system, pump)
    try:
        # The first line of an observation is the state as it is.
        listeners.aiocoap.get(timeout=SOON_SECONDS)
        listeners.libcoap.get(timeout=SOON_SECONDS)
        for send, value in ((post, "on"), (publish, "off"), (coap_post, "on")):
            send(system, sensor, ph=6.9 if value == "on" else 6.0)
            over_socket = next_state(listeners.socket, "power", value)
            over_mqtt = next_state(listeners.mqtt, "power", value)
            assert over_socket["id"] == over_mqtt["id"]
            assert over_socket["device"] == pump["uuid"]
            for lines in (listeners.aiocoap, listeners.libcoap):
                wait_for_line(lines, f'"value":"{value}"')
    finally:
        listeners.close()
    assert system.manage("ledger").returncode == 0


def wait_for_line(lines: queue.Queue[str], text: str) -> None:
    deadline = time.monotonic() + SOON_SECONDS
    while text not in lines.get(timeout=max(0.01, deadline - time.monotonic())).replace(" ", ""):
        pass


def test_a_person_switches_the_pump_over_rest_and_every_client_is_told(system: LocalSystem) -> None:
    pump = system.farm["devices"][0]
    listeners = Listeners(system, pump)
    try:
        listeners.aiocoap.get(timeout=SOON_SECONDS)
        listeners.libcoap.get(timeout=SOON_SECONDS)
        answer = requests.post(
            f"{system.web}/api/v1/device-state-instances",
            json={"deviceUuid": pump["uuid"], "stateName": "power", "value": "off"},
            headers={"Authorization": f"Bearer {access_token(system)}"},
            timeout=10,
        )
        assert answer.status_code == 201, answer.text
        assert next_state(listeners.socket, "power", "off")["data"]["source"] == "person"
        next_state(listeners.mqtt, "power", "off")
        for lines in (listeners.aiocoap, listeners.libcoap):
            wait_for_line(lines, '"value":"off"')
    finally:
        listeners.close()


def test_the_example_of_a_device_obeys_answers_and_says_goodbye(system: LocalSystem, tmp_path: Path) -> None:
    pump, farm = system.farm["devices"][0], tmp_path / "demo.json"
    farm.write_text(json.dumps(system.farm))
    lines: queue.Queue[str] = queue.Queue()
    command = (
        sys.executable,
        "-u",
        "-m",
        "examples.mqtt_device",
        "--demo",
        str(farm),
        "--port",
        str(system.broker.port),
    )
    device = lines_of(command, lines, {})
    try:
        wait_for(lambda: got(system, f"devices/{pump['uuid']}")["connected"] is True, "the device's online")
        change = requests.post(
            f"{system.web}/api/v1/device-state-instances",
            json={"deviceUuid": pump["uuid"], "stateName": "power", "value": "on"},
            headers={"Authorization": f"Bearer {access_token(system)}"},
            timeout=10,
        ).json()
        path = f"state-changes/{change['uuid']}"
        wait_for(lambda: got(system, path)["command"]["state"] == "applied", "the command")
        wait_for_line(lines, "power=on")
    finally:
        device.send_signal(signal.SIGINT)
        device.wait(SOON_SECONDS)
        assert device.stdout is not None
        device.stdout.close()
    wait_for(lambda: got(system, f"devices/{pump['uuid']}")["connected"] is False, "the device's goodbye")


def got(system: LocalSystem, path: str) -> dict[str, Any]:
    answer = requests.get(
        f"{system.web}/api/v1/{path}", headers={"Authorization": f"Bearer {access_token(system)}"}, timeout=10
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


BAD: dict[str, Any] = {"events": [{"values": {"ph": 6.1}}, {"values": {"ph": "high"}}]}
SAID = "events[1].values.ph must be a number, not a string"


def test_bad_input_is_refused_alike_on_three_protocols_and_kept_for_the_admin(system: LocalSystem) -> None:
    sensor = system.farm["sensors"][1]
    answer = requests.post(
        f"{system.web}/api/v1/telemetry",
        json=BAD,
        headers={"Authorization": f"Bearer {sensor['token']}"},
        timeout=10,
    )
    assert (answer.status_code, answer.json()["detail"]) == (400, SAID)
    publish_payload(system, sensor, BAD)
    assert asyncio.run(coap_answer(system, sensor, BAD)) == ("4.00", SAID)

    headers = {"Authorization": f"Bearer {access_token(system)}"}
    kept: list[dict[str, Any]] = []

    def all_kept() -> bool:
        page = requests.get(f"{system.web}/api/v1/rejected-events", headers=headers, timeout=10).json()
        kept[:] = [row for row in page["results"] if row["detail"] == SAID]
        return len(kept) == 3

    wait_for(all_kept, "the record of all three refusals")
    assert {row["protocol"] for row in kept} == {"http", "mqtt", "coap"}
    assert {row["reason"] for row in kept} == {"bad-payload"}
    assert {json.dumps(json.loads(row["payload"])) for row in kept} == {json.dumps(BAD)}


def test_kill_9_of_the_worker_in_mid_batch_loses_nothing_and_acts_once(tmp_path: Path) -> None:
    """Five kills at different moments while 20,000 events are worked off; each event that was accepted counts once."""
    with local_system(tmp_path, LOG_LEVEL="WARNING") as system:
        system.start("web", "scheduler", "worker")
        with ThreadPoolExecutor(1) as pool:
            accepted = pool.submit(post_batches, system, 40)
            for number in range(5):
                time.sleep(0.7 + 0.13 * number)
                system.kill("worker")
                system.start("worker")
            assert accepted.result() == 20_000
        wait_for(lambda: ledger(system)["waiting"] + ledger(system)["in_flight"] == 0, "the drain", seconds=120)

        total = ledger(system)
        assert total["accepted"] == 20_000
        assert total["processed"] + total["duplicate"] == 20_000
        assert total["dead"] == 0
        assert total["missing"] == 0
        assert count(system, "devices_reading") == 20_000
        keys = count(system, "devices_statechange"), count(system, "notifications_notification")
        assert keys[0] == keys[1] > 0


def post_batches(system: LocalSystem, batches: int) -> int:
    sensors = system.farm["sensors"]
    return sum(post_batch(system, sensors[batch % 2], start=batch * 500, count=500) for batch in range(batches))


def post_batch(system: LocalSystem, sensor: dict[str, str], *, start: int, count: int) -> int:
    """Readings a second apart, every tenth of which is above the limit at which the demo's rule doses."""
    events: list[dict[str, Any]] = [
        {
            "values": {"ph": 6.9 if number % 10 == 0 else 6.0},
            "timestamp": datetime.fromtimestamp(1_770_000_000 + number, UTC).isoformat(),
        }
        for number in range(start, start + count)
    ]
    answer = requests.post(
        f"{system.web}/api/v1/telemetry",
        json={"events": events},
        headers={"Authorization": f"Bearer {sensor['token']}"},
        timeout=30,
    )
    assert answer.status_code == 202, answer.text
    accepted: int = answer.json()["accepted"]
    return accepted


def ledger(system: LocalSystem) -> dict[str, int]:
    total: dict[str, int] = json.loads(system.manage("ledger", "--json").stdout)["lanes"]["total"]
    return total


def count(system: LocalSystem, table: str) -> int:
    with closing(sqlite3.connect(system.environment["DB_NAME"])) as database:
        number: int = database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        return number
