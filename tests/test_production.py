"""A machine in production, installed by following docs/production-deployment.md to the letter, with real servers."""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
import redis
from paho.mqtt.enums import CallbackAPIVersion

from deploy.production.configure import PROCESSES
from tests import production
from tests.production import Doser, Machine, Sensor
from tests.waiting import until

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with production.machine(tmp_path_factory.mktemp("machine")) as made:
        seconds = production.installed(made)
        print(f"followed the guide in {seconds:.0f} s")
        yield made


def test_the_guide_leads_to_a_stored_reading(machine: Machine) -> None:
    machine.restart_ended()
    machine.follow("production-deployment.md", "8. The first reading")
    *_, answer, _readings = [json.loads(line) for line in machine.said.splitlines()]
    assert {"accepted": 1, "rejected": 0}.items() <= answer.items()

    def stored() -> bool:
        with machine.database() as connection:
            return bool(connection.execute("SELECT 1 FROM devices_reading WHERE number = 6.1").fetchall())

    until(stored)
    assert {each.split()[0] for each in machine.skipped} >= {"apt-get", "adduser", "git", "python3", ".venv/bin/pip"}


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


def test_health_says_when_a_kill_of_redis_would_cost_events(machine: Machine) -> None:
    """As it would with a file of users from before."""

    def problems() -> list[str]:
        token = machine.variables("aemos.env")["METRICS_TOKEN"]
        command = f"curl -sS -H 'Authorization: Bearer {token}' https://farm.example.org/api/v1/health"
        answer = json.loads(machine.shell(command))
        return [each for each in answer["problems"] if "Redis" in each]

    machine.restart_ended()
    assert until(lambda: problems() == [])
    operator = machine.redis("operator")
    for user, before, after, told in (
        ("default", "-@all", "+@all", "loses accepted events when it starts again"),
        ("web", "-acl|dryrun", "+acl|dryrun", "may lose accepted events when it starts again"),
    ):
        operator.execute_command("ACL", "SETUSER", user, before)  # type: ignore[no-untyped-call]
        try:
            (problem,) = problems()
            assert told in problem
        finally:
            operator.execute_command("ACL", "SETUSER", user, after)  # type: ignore[no-untyped-call]
        assert problems() == []


def test_without_a_login_redis_answers_nothing(machine: Machine) -> None:
    for client in (
        redis.Redis(port=machine.ports["REDIS_PORT"]),
        redis.Redis(port=machine.ports["REDIS_PORT"], password="x"),
    ):
        with pytest.raises(redis.AuthenticationError):
            client.ping()


def test_no_secret_is_in_a_log_or_an_answer(machine: Machine) -> None:
    """Planted where clients and people put them, in the right places and in wrong ones, and looked for everywhere."""
    sensor = Doser(machine, name="secretive")
    planted = {
        name: f"planted-{name}-{secrets.token_hex(8)}" for name in ("password", "bearer", "query", "body", "invite")
    }
    answers = [
        *sensor.attempts(planted),
        machine.shell("deploy/manage check --deploy"),
        machine.shell("deploy/manage ledger"),
    ]
    machine.stop("redis-server")
    answers += sensor.attempts(planted)
    time.sleep(2)
    machine.start("redis-server")
    machine.restart_ended()
    until(lambda: sensor.report({"values": {"ph": 6.0}}) == 202)
    files = ("aemos.env", "web.env", "worker.env", "gateway.env", "scheduler.env", "commands.env", "redis/operator.env")
    configured = {
        f"{file}: {name}": value
        for file in files
        for name, value in machine.variables(file).items()
        if name.endswith(("KEY", "SECRET", "PASSWORD", "TOKEN"))
    }
    assert len(configured) == 13
    known = {**planted, **configured, "device token": sensor.token, "admin's password": production.ADMIN_PASSWORD}
    texts = {file.name: file.read_text(errors="replace") for file in machine.folder.glob("*.log")}
    assert texts.keys() >= {"aemos-web.log", "aemos-gateway.log", "aemos-worker@1.log", "aemos-scheduler.log"}
    texts["answers"] = "\n".join(answers)
    found = [(name, place) for name, secret in known.items() for place, text in texts.items() if secret in text]
    assert found == []


def test_every_line_of_a_log_is_json(machine: Machine) -> None:
    machine.follow("production-deployment.md", "7. Is it well?")
    for file in machine.folder.glob("aemos-*.log"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert lines or "worker" in file.stem  # which says nothing while all is well
        assert {line["process"] for line in lines} <= {file.stem.removeprefix("aemos-").partition("@")[0]}
        assert all(line["message"] and line["timestamp"] for line in lines)


def test_what_was_accepted_outlives_a_kill_of_redis(machine: Machine) -> None:
    """While no worker is there, so that nothing of it is anywhere else."""
    sensor = Sensor(machine, name="outliving")
    machine.stop("aemos-worker@1")
    sent = [number / 100 for number in range(1, 21)]
    assert {sensor.report({"values": {"ph": value}}) for value in sent} == {202}
    machine.kill("redis-server")
    machine.start("redis-server")
    machine.restart_ended()
    machine.start("aemos-worker@1")
    until(lambda: sensor.values() == sent)
    machine.shell("deploy/manage ledger")


def test_passwords_of_redis_change_while_readings_come(machine: Machine) -> None:
    before = machine.redis("worker").connection_pool.connection_kwargs["password"]
    sensor = Sensor(machine, name="rotation")
    with sensor.reporting() as sent:
        machine.follow("redis-password-enforcement.md", "A new password without loss")
        until(lambda: len(sent) > 50)
    assert machine.redis("worker").connection_pool.connection_kwargs["password"] != before
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=machine.ports["REDIS_PORT"], username="worker", password=before).ping()
    until(lambda: sensor.values() == sorted(sent))
    machine.shell("deploy/manage ledger")


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
        if client.is_connected():
            return client
        client.loop_stop()
        return None

    client = until(connected, seconds=40)
    assert client is not None
    client.publish(f"devices/{sensor.uuid}/datastream", '{"values": {"ph": 5.9}}', qos=1).wait_for_publish(10)
    until(lambda: sensor.values() == [5.9])
    client.disconnect()
    client.loop_stop()


def test_an_upgrade_refuses_nobody_and_runs_on_tables_of_a_later_version(machine: Machine) -> None:
    """Every table gets another column first, as the next version's migration might do."""
    with machine.database() as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        assert len(tables) > 30
        for (table,) in tables:
            connection.execute(f'ALTER TABLE "{table}" ADD COLUMN IF NOT EXISTS of_a_later_version integer')
    sensor = Sensor(machine, name="upgrade")
    with sensor.reporting() as sent:
        machine.follow("upgrade.md", "Step by step")
        until(lambda: len(sent) > 50)
    assert sensor.refused == []
    until(lambda: sensor.values() == sorted(sent))


def test_a_restored_system_judges_what_was_accepted_and_sends_nothing_twice(machine: Machine, tmp_path: Path) -> None:
    """Half of what the journal holds when Redis is copied is processed, and its commands sent, before the database is."""
    doser = Doser(machine, name="restored")
    backups, go_on = machine.folder / "var/backups/aemos", tmp_path / "go-on"
    slow = tmp_path / "pg_dump"
    slow.write_text(f'#!/bin/sh\nuntil [ -e {go_on} ]; do sleep 0.1; done\nPATH=${{PATH#*:}} exec pg_dump "$@"\n')
    slow.chmod(0o755)
    with doser.dosing() as received:
        doser.measure(1, 10)
        until(lambda: len(received) == 10, seconds=60)
        machine.stop("aemos-worker@1")
        doser.measure(11, 20)
        with ThreadPoolExecutor() as pool:
            copied = pool.submit(machine.shell, "deploy/backup /var/backups/aemos", first_on_path=tmp_path)
            until(
                lambda: [*backups.glob("*.unfinished/redis.rdb")] and not [*backups.glob("*.unfinished/redis.log")],
                seconds=60,
            )
            machine.start("aemos-worker@1")
            until(lambda: len(received) == 20, seconds=60)
            until(lambda: doser.acknowledged() == 20, seconds=60)
            go_on.touch()
            copied.result()
        doser.measure(21, 25)
        until(lambda: len(received) == 25, seconds=60)
        machine.crash()
        machine.start("mosquitto")
        machine.start("caddy")
        machine.follow("backup.md", "Come back")
        assert doser.values() == [number / 100 for number in range(1, 21)]
        doser.measure(26, 27)
        until(lambda: len(received) == 27, seconds=60)
        time.sleep(2)
        assert received == list(dict.fromkeys(received))
    assert doser.values() == [*(number / 100 for number in range(1, 21)), 0.26, 0.27]
    machine.shell("deploy/manage ledger")
