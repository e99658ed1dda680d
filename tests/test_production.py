"""A machine in production, installed by following docs/production-deployment.md to the letter, with real servers."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import paho.mqtt.client as mqtt
import pytest
import redis
from paho.mqtt.enums import CallbackAPIVersion

from deploy.production.configure import PROCESSES
from tests import production
from tests.production import NOT_HERE, Machine, Sensor
from tests.waiting import until

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with production.machine(tmp_path_factory.mktemp("machine")) as made:
        seconds = production.installed(made)
        print(f"followed the guide in {seconds:.0f} s")
        yield made


def test_the_guide_leads_to_a_stored_reading(machine: Machine) -> None:
    machine.follow("production-deployment.md", "8. The first reading")
    *_, answer, readings = [json.loads(line) for line in machine.said.splitlines()]
    assert {"accepted": 1, "rejected": 0}.items() <= answer.items()
    assert [row["value"] for row in readings["results"]] == [6.1]
    assert len(machine.skipped) == len(NOT_HERE)


FORBIDDEN: dict[str, list[str]] = {
    "everybody": [
        "FLUSHALL", "FLUSHDB", "KEYS *", "CONFIG GET requirepass", "CONFIG SET dir /tmp", "MODULE LIST", "BGREWRITEAOF", "SAVE",
        "SHUTDOWN NOSAVE", "REPLICAOF localhost 1", "ACL LIST", "MONITOR", "CLIENT LIST", "SCRIPT FLUSH", "SORT aemos:timers",
        "GET somebody-elses-key", "SUBSCRIBE somebody-elses-channel", "SWAPDB 0 1", "FUNCTION LIST", "XADD other * a b",
    ],
    "all but workers": [
        "XREADGROUP GROUP drain c STREAMS aemos:events:normal:{0} >", "XACK aemos:events:normal:{0} drain 1-1",
        "XDEL aemos:events:normal:{0} 1-1", "XTRIM aemos:events:normal:{0} MAXLEN 0",
        "XCLAIM aemos:events:normal:{0} drain c 0 1-1",
    ],
}  # fmt: skip


def refused(client: redis.Redis, command: str) -> bool:
    try:
        client.execute_command(*command.split())  # type: ignore[no-untyped-call]
    except redis.exceptions.NoPermissionError:
        return True
    except redis.ResponseError:
        return False
    return False


def test_no_process_may_do_in_redis_what_it_has_no_need_of(machine: Machine) -> None:
    for user in PROCESSES:
        client = machine.redis(user)
        taking = [] if user in ("worker", "commands") else FORBIDDEN["all but workers"]
        allowed = [each for each in (*FORBIDDEN["everybody"], *taking) if not refused(client, each)]
        assert (user, allowed) == (user, [])
        assert client.xlen("aemos:notifications") >= 0
    assert not refused(machine.redis("worker"), FORBIDDEN["all but workers"][0])
    assert refused(machine.redis("gateway"), "XREADGROUP GROUP mqtt c STREAMS aemos:events:normal:{0} >")
    assert not refused(machine.redis("gateway"), "XREADGROUP GROUP mqtt nobody STREAMS aemos:notifications >")


def test_without_a_login_redis_answers_nothing(machine: Machine) -> None:
    for client in (
        redis.Redis(port=machine.ports["REDIS_PORT"]),
        redis.Redis(port=machine.ports["REDIS_PORT"], password="x"),
    ):
        with pytest.raises(redis.AuthenticationError):
            client.ping()


def test_passwords_of_redis_change_while_readings_come(machine: Machine) -> None:
    before = machine.redis("worker").connection_pool.connection_kwargs["password"]
    sensor = Sensor(machine, name="rotation")
    with sensor.reporting() as sent:
        machine.follow("redis-password-enforcement.md", "A new password without loss")
        until(lambda: len(sent) > 50)
    assert machine.redis("worker").connection_pool.connection_kwargs["password"] != before
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=machine.ports["REDIS_PORT"], username="worker", password=before).ping()
    machine.shell("sudo deploy/manage ledger".removeprefix("sudo "))
    assert sensor.values() == sorted(sent)


def test_a_device_speaks_mqtt_over_tls(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trusts the certificate authority of this machine, and the name of the host."""
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest: real("127.0.0.1" if host == production.HOST else host, *rest)
    )
    sensor = Sensor(machine, name="over MQTT")
    username = sensor.token.split("_")[1]

    def connected() -> mqtt.Client | None:
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=username)
        client.tls_set(str(machine.folder / "etc/aemos/mosquitto/ca.crt"))
        client.username_pw_set(username, sensor.token)
        client.connect(production.HOST, machine.ports["MQTTS_PORT"])
        client.loop_start()
        time.sleep(0.5)
        return client if client.is_connected() else None

    client = until(connected)
    assert client is not None
    client.publish(f"devices/{sensor.uuid}/datastream", '{"values": {"ph": 5.9}}', qos=1).wait_for_publish(10)
    until(lambda: sensor.values() == [5.9])
    client.disconnect()
    client.loop_stop()
