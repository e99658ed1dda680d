"""The broker's accounts: live tokens in, devices that may connect out, on a real Mosquitto with real clients."""

from __future__ import annotations

import json
import logging
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.utils import timezone

from aemos.lib import keys, redis
from aemos.lib.leader import Leader
from deploy.servers import GATEWAY_USERNAME, Server, free_port, initial_security, mosquitto
from devices import tokens
from devices.models import Device, DeviceToken, Organization
from gateway.mqtt import accounts, dynamic_security, topics
from gateway.mqtt.accounts import BrokerSync, Changes, reconcile, sync_once, verify
from gateway.mqtt.connection import BrokerAway
from gateway.mqtt.dynamic_security import CommandFailed, DynamicSecurity, Outcome
from notifications.models import BrokerAccount
from tests import builders
from tests.mqtt_clients import client, device, mosquitto_sub, operator, patient
from tests.waiting import until

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("empty_redis", "_clean_broker")]


@pytest.fixture
def _clean_broker(broker: Server, redis_server: Server) -> Iterator[None]:
    """Takes away what the test left in the broker, and starts the servers again that a failed test left killed."""
    with connection.execute_wrapper(patient):
        yield
    for server in (broker, redis_server):
        if server.child is None:
            server.start()
    DeviceToken.objects.all().delete()
    sync_once()


@pytest.fixture
def security(broker: Server) -> Iterator[DynamicSecurity]:
    with DynamicSecurity() as found:
        assert found.ready.wait(5)
        yield found


@pytest.fixture
def farm() -> Organization:
    return builders.organization()


@pytest.fixture
def pump(farm: Organization) -> Device:
    return builders.device(farm)


@pytest.fixture
def syncing() -> Iterator[BrokerSync]:
    """The loop as the gateway runs it."""
    with running() as found:
        yield found


class running:  # reads as a sentence where it is used
    def __init__(self) -> None:
        self._stop = threading.Event()
        self.sync = BrokerSync()
        self._thread = threading.Thread(target=self.sync.run, args=(self._stop,), daemon=True)

    def __enter__(self) -> BrokerSync:
        self._thread.start()
        return self.sync

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()


def lose_data(broker: Server) -> None:
    """As if the broker's disk were new: only the gateway's user is known."""
    broker.kill()
    directory = broker.log.parent
    security = json.dumps(initial_security(GATEWAY_USERNAME, broker.password))
    (directory / "dynamic-security.json").write_text(security)
    (directory / "mosquitto.db").unlink(missing_ok=True)
    broker.start()


def state_of(security: DynamicSecurity) -> tuple[set[str], set[str]]:
    """Usernames and roles that the broker has for devices."""
    clients = {name for name, roles in security.clients().items() if any(map(topics.is_role_of_an_originator, roles))}
    return clients, {role for role in security.roles() if topics.is_role_of_an_originator(role)}


# A device and its token


def test_device_with_a_fresh_token_connects_and_speaks_only_for_itself(
    broker: Server, farm: Organization, pump: Device, syncing: BrokerSync
) -> None:
    other = builders.device(farm)
    token = builders.token(pump)
    with device(broker, token) as speaker, operator(broker) as listener:
        # Of these two only: under devices/# the broker may still hold what another test retained.
        assert all(listener.subscribe(f"devices/{each.uuid}/#") for each in (pump, other))
        assert speaker.connected.wait(5)
        speaker.publish(topics.datastream(str(other.uuid)), "stolen")
        speaker.publish(topics.state(str(pump.uuid)), "own state")
        speaker.publish(topics.broadcast(str(farm.uuid)), "to all")
        speaker.publish(topics.datastream(str(pump.uuid)), "own")
        speaker.publish(topics.status(str(pump.uuid)), "online")
        until(lambda: len(listener.received) >= 2)
        assert listener.payloads() == [b"own", b"online"]


def test_device_hears_its_own_state_and_its_organization_and_nobody_elses(
    broker: Server, farm: Organization, pump: Device
) -> None:
    other = builders.device(builders.organization())
    token = builders.token(pump)
    sync_once()
    own = [topics.state(str(pump.uuid)), topics.commands(str(pump.uuid)), topics.broadcast(str(farm.uuid))]
    foreign = [
        topics.state(str(other.uuid)),
        topics.commands(str(other.uuid)),
        topics.broadcast(str(other.organization.uuid)),
        "devices/+/state",
        "#",
        "$share/g/devices/+/datastream",
        topics.datastream(str(pump.uuid)),
        dynamic_security.RESPONSES,
    ]
    with device(broker, token) as listener, operator(broker) as speaker:
        assert listener.connected.wait(5)
        assert all(listener.subscribe(topic) for topic in own)
        assert not any(listener.subscribe(topic) for topic in foreign)
        for topic in foreign[:3] + own:
            speaker.publish(topic, topic)
        until(lambda: len(listener.received) >= 3)
        assert [topic for topic, _ in listener.received] == own


def test_sensor_has_the_same_rights_as_a_device(broker: Server, farm: Organization) -> None:
    sensor = builders.sensor(farm)
    token = builders.token(sensor)
    sync_once()
    with device(broker, token) as speaker, operator(broker) as listener:
        assert listener.subscribe(topics.datastream(str(sensor.uuid)))
        assert speaker.connected.wait(5)
        speaker.publish(topics.datastream(str(sensor.uuid)), "6.1")
        until(lambda: listener.received)


def test_clients_of_another_make_connect_with_a_token(broker: Server, pump: Device) -> None:
    token = builders.token(pump)
    sync_once()
    topic = topics.state(str(pump.uuid))
    with operator(broker) as speaker:
        speaker.publish(topic, "on", retain=True)
        login = ["-i", tokens.prefix_of(token), "-u", tokens.prefix_of(token), "-P", token]
        heard = mosquitto_sub(broker, *login, "-t", topic, "-C", "1")
        speaker.publish(topic, "", retain=True)
    assert heard.stdout == "on\n"


def test_anonymous_and_wrongly_authenticated_clients_are_refused(broker: Server, pump: Device) -> None:
    token = builders.token(pump)
    sync_once()
    prefix = tokens.prefix_of(token)
    for username, password in ((None, None), (prefix, "wrong"), (prefix, None), ("aemos-gateway", "wrong")):
        with client(broker, username, password) as stranger:
            until(lambda stranger=stranger: stranger.refusals)  # type: ignore[misc]
            assert not stranger.connected.is_set()


# Revoked and expired


@pytest.mark.parametrize("end", ["revoked", "expired", "deleted", "device deleted", "organization deleted"])
def test_token_that_ends_kicks_its_live_session_and_is_refused_from_then_on(
    broker: Server, farm: Organization, pump: Device, syncing: BrokerSync, end: str
) -> None:
    token = builders.token(pump, expires_at=timezone.now() + timedelta(seconds=3) if end == "expired" else None)
    row = DeviceToken.objects.get()
    with device(broker, token) as speaker:
        assert speaker.connected.wait(5)
        ends: dict[str, Callable[[], Any]] = {
            "revoked": DeviceToken.objects.revoke,
            "expired": lambda: None,
            "deleted": row.delete,
            "device deleted": pump.delete,
            "organization deleted": farm.delete,
        }
        ends[end]()
        until(lambda: not speaker.connected.is_set(), seconds=8 if end == "expired" else 5)
        until(lambda: speaker.refusals)
    until(lambda: not BrokerAccount.objects.exists())


def test_role_stays_until_the_last_token_of_its_device_ends(
    broker: Server, pump: Device, security: DynamicSecurity
) -> None:
    builders.token(pump)
    builders.token(pump)
    first, second = DeviceToken.objects.order_by("id")
    assert reconcile(security) == Changes(created=2)
    DeviceToken.objects.filter(pk=first.pk).revoke()
    assert reconcile(security) == Changes(removed=1)
    assert state_of(security) == ({second.prefix}, {topics.role_name(str(pump.uuid))})
    DeviceToken.objects.filter(pk=second.pk).revoke()
    assert reconcile(security) == Changes(removed=1)
    assert state_of(security) == (set(), set())


# Faults


def test_broker_that_was_away_while_a_token_was_issued_catches_up(
    broker: Server, pump: Device, syncing: BrokerSync
) -> None:
    until(lambda: syncing._verified)
    broker.kill()
    token = builders.token(pump)
    until(lambda: not syncing._security.ready.is_set())
    broker.start()
    with device(broker, token) as speaker:
        assert speaker.connected.wait(10)


def test_broker_that_lost_its_data_is_given_the_accounts_again(
    broker: Server, pump: Device, syncing: BrokerSync
) -> None:
    token = builders.token(pump)
    with device(broker, token) as speaker:
        assert speaker.connected.wait(5)
        lose_data(broker)
        until(lambda: not speaker.connected.is_set() or speaker.refusals)
        assert speaker.connected.wait(15)


def test_token_revoked_while_the_broker_was_away_is_gone_when_it_is_back(
    broker: Server, pump: Device, syncing: BrokerSync
) -> None:
    token = builders.token(pump)
    until(BrokerAccount.objects.exists)
    broker.kill()
    DeviceToken.objects.revoke()
    broker.start()
    until(lambda: not BrokerAccount.objects.exists(), seconds=15)
    with device(broker, token) as speaker:
        until(lambda: speaker.refusals)


def test_accounts_written_to_the_broker_but_not_to_the_table_are_adopted(
    broker: Server, pump: Device, security: DynamicSecurity
) -> None:
    token = builders.token(pump)
    reconcile(security)
    BrokerAccount.objects.all().delete()
    assert reconcile(security) == Changes(created=1)
    with device(broker, token) as speaker:
        assert speaker.connected.wait(5)


def test_half_made_account_is_repaired(broker: Server, pump: Device, security: DynamicSecurity) -> None:
    token = builders.token(pump)
    role, prefix = topics.role_name(str(pump.uuid)), tokens.prefix_of(token)
    security.execute(
        [dynamic_security.create_role(role, []), dynamic_security.create_client(prefix, password="old", rolename=role)]
    )
    assert reconcile(security) == Changes(created=1)
    with device(broker, token) as speaker:
        assert speaker.connected.wait(5)
        assert speaker.subscribe(topics.state(str(pump.uuid)))


def test_accounts_that_the_broker_lacks_already_are_removed_from_the_table(
    pump: Device, security: DynamicSecurity
) -> None:
    builders.token(pump)
    reconcile(security)
    row = BrokerAccount.objects.get()
    security.execute(
        [
            dynamic_security.delete_client(row.username),
            dynamic_security.delete_role(topics.role_name(str(row.originator_uuid))),
        ]
    )
    DeviceToken.objects.revoke()
    assert reconcile(security) == Changes(removed=1)
    assert not BrokerAccount.objects.exists()


def test_clients_and_roles_of_no_token_are_taken_away_and_others_left_alone(
    pump: Device, security: DynamicSecurity
) -> None:
    builders.token(pump)
    stranger = topics.role_name(str(uuid4()))
    security.execute(
        [
            dynamic_security.create_role(stranger, []),
            dynamic_security.create_client("stranger", password="x", rolename=stranger),
            dynamic_security.create_role("dashboards", []),
            dynamic_security.create_client("dashboard", password="x", rolename="dashboards"),
        ]
    )
    try:
        assert verify(security) == Changes(created=1, removed=1)
        assert verify(security) == Changes()
        assert state_of(security) == ({DeviceToken.objects.get().prefix}, {topics.role_name(str(pump.uuid))})
        assert "dashboard" in security.clients()
    finally:
        security.execute([dynamic_security.delete_client("dashboard"), dynamic_security.delete_role("dashboards")])


def test_account_that_lost_its_role_is_made_again(broker: Server, pump: Device, security: DynamicSecurity) -> None:
    token = builders.token(pump)
    reconcile(security)
    role, prefix = topics.role_name(str(pump.uuid)), tokens.prefix_of(token)
    security.execute([{"command": "removeClientRole", "username": prefix, "rolename": role}])
    assert verify(security) == Changes(created=1)
    with device(broker, token) as speaker:
        assert speaker.connected.wait(5)
        assert speaker.subscribe(topics.state(str(pump.uuid)))


def test_role_that_an_unknown_client_holds_is_left_until_the_client_is_gone(
    pump: Device, security: DynamicSecurity
) -> None:
    builders.token(pump)
    reconcile(security)
    role = topics.role_name(str(pump.uuid))
    security.execute([dynamic_security.create_client("stranger", password="x", rolename=role)])
    DeviceToken.objects.revoke()
    assert reconcile(security) == Changes(removed=1)
    assert state_of(security) == ({"stranger"}, {role})
    assert verify(security) == Changes(removed=1)
    assert state_of(security) == (set(), set())


def test_more_tokens_than_fit_one_request_are_all_made(farm: Organization, security: DynamicSecurity) -> None:
    for _ in range(accounts.BATCH * 2 + 1):
        builders.token(builders.device(farm))
    number = DeviceToken.objects.count()
    assert reconcile(security) == Changes(created=number)
    assert reconcile(security) == Changes()
    DeviceToken.objects.revoke()
    assert reconcile(security) == Changes(removed=number)
    assert state_of(security) == (set(), set())


def test_refused_command_is_counted_and_the_others_are_done(
    farm: Organization, security: DynamicSecurity, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = builders.device(farm), builders.device(farm)
    builders.token(bad)
    builders.token(good)
    name = topics.role_name
    monkeypatch.setattr(topics, "role_name", lambda uuid: 0 if uuid == str(bad.uuid) else name(uuid))
    with caplog.at_level(logging.ERROR):
        assert reconcile(security) == Changes(created=1, failed=1)
    assert BrokerAccount.objects.get().originator_uuid == good.uuid
    assert "createRole" in caplog.text
    monkeypatch.undo()
    assert reconcile(security) == Changes(created=1)


# The loop


def test_second_instance_stands_by_and_takes_over(broker: Server, pump: Device) -> None:
    with running() as first:
        until(lambda: first._verified)
        with running() as second:
            token = builders.token(pump)
            with device(broker, token) as speaker:
                assert speaker.connected.wait(5)
            assert not second._verified
            rival = Leader(keys.BROKER_SYNC_LEADER)
            assert not rival.leads()
    with running() as third:
        until(lambda: third._verified)


def test_loop_goes_on_after_an_error_nobody_foresaw(
    broker: Server, pump: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[None] = []
    token_for = tokens.token_for

    def fails_once(prefix: str) -> str:
        calls.append(None)
        if len(calls) == 1:
            raise RuntimeError("nobody foresaw this")
        return token_for(prefix)

    token = builders.token(pump)
    monkeypatch.setattr(tokens, "token_for", fails_once)
    with running(), device(broker, token) as speaker:
        assert speaker.connected.wait(5)
    assert "nobody foresaw this" in caplog.text


def test_loop_looks_at_the_tokens_only_when_something_can_have_changed(
    broker: Server, pump: Device, security: DynamicSecurity, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    now = [0.0]

    def comparing(what: str) -> Callable[..., Changes]:
        def compare(*_: object, **__: object) -> Changes:
            compared.append(what)
            return Changes()

        return compare

    monkeypatch.setattr(accounts, "verify", comparing("broker"))
    monkeypatch.setattr(accounts, "reconcile", comparing("tokens"))
    sync = BrokerSync(clock=lambda: now[0])
    sync._security = security
    monkeypatch.setattr(security, "revive", lambda: None)
    sync._step()
    sync._step()
    assert compared == ["broker"]
    builders.token(pump)
    sync._step()
    sync._step()
    assert compared == ["broker", "tokens"]
    now[0] += accounts.SWEEP_SECONDS
    sync._step()
    assert compared == ["broker", "tokens", "broker"]
    security.connections += 1
    sync._step()
    assert compared == ["broker", "tokens", "broker", "broker"]
    sync._leader.resign()


def test_redis_away_is_said_once_and_waited_for(
    broker: Server, pump: Device, redis_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with running() as sync:
        until(lambda: sync._verified)
        redis_server.kill()
        until(lambda: "Who leads" in caplog.text)
        token = builders.token(pump)
        redis_server.start()
        with device(broker, token) as speaker:
            assert speaker.connected.wait(10)
    assert caplog.text.count("cannot be reached") == 1
    redis.client().ping()


def test_rights_of_an_earlier_version_are_replaced_at_the_first_look(
    broker: Server, pump: Device, security: DynamicSecurity
) -> None:
    """Its roles have another name."""
    token = builders.token(pump)
    reconcile(security)
    old, username = f"device-{pump.uuid}", tokens.prefix_of(token)
    security.execute(
        [dynamic_security.create_role(old, []), dynamic_security.modify_client(username, password=token, rolename=old),
         dynamic_security.delete_role(topics.role_name(str(pump.uuid)))]
    )  # fmt: skip
    verify(security)
    assert state_of(security) == ({username}, {topics.role_name(str(pump.uuid))})
    with device(broker, token) as speaker:
        assert speaker.connected.wait(5)
        assert speaker.subscribe(topics.GATEWAY_STATUSES)


# The command


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def sync_broker(*arguments: str) -> str:
    out = StringIO()
    call_command("sync_broker", *arguments, stdout=out)
    return out.getvalue()


def test_sync_broker_counts_what_is_missing_and_too_much_and_evens_it_out(
    broker: Server, farm: Organization, pump: Device, security: DynamicSecurity
) -> None:
    token, ended = builders.token(pump), builders.token(builders.device(farm))
    reconcile(security)
    DeviceToken.objects.filter(prefix=tokens.prefix_of(ended)).revoke()
    security.execute([dynamic_security.delete_client(tokens.prefix_of(token))])
    role = topics.role_name(str(uuid4()))
    security.execute(
        [
            dynamic_security.create_role(role, []),
            dynamic_security.create_client("stranger", password="x", rolename=role),
        ]
    )

    counted = "           1  accounts are missing\n           2  are too many\n"
    assert sync_broker("--dry-run") == counted
    assert sync_broker("--dry-run") == counted, "it has changed nothing"
    assert sync_broker() == f"{counted}1 made, 2 taken away.\n"
    assert sync_broker("--dry-run") == "           0  accounts are missing\n           0  are too many\n"
    with device(broker, token) as speaker:
        assert speaker.connected.wait(5)


def test_sync_broker_draws_its_progress_on_a_terminal(farm: Organization) -> None:
    for _ in range(accounts.BATCH + 1):
        builders.token(builders.device(farm))
    total, out = DeviceToken.objects.count(), Terminal()
    call_command("sync_broker", stdout=out)
    assert f"{accounts.BATCH} of {total}" in out.getvalue()


def test_sync_broker_says_in_one_line_why_it_cannot(broker: Server, settings: Any) -> None:
    settings.MQTT_ENABLED = False
    with pytest.raises(CommandError, match="MQTT_ENABLED is false"):
        sync_broker()
    settings.MQTT_ENABLED, settings.MQTT_PASSWORD = True, "wrong"
    with pytest.raises(CommandError, match=r"cannot be used within .* Check MQTT_HOST"):
        sync_broker()


# TLS


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # paho forgets the socket of a failed handshake
def test_broker_with_tls_is_trusted_by_its_authority_and_asks_for_a_certificate(
    broker: Server, tmp_path: Path, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority(tmp_path)
    secure = mosquitto(tmp_path / "broker", password=broker.password)
    port = free_port()
    files = authority.issue("broker")
    with (tmp_path / "broker" / "mosquitto.conf").open("a") as conf:
        conf.write(f"listener {port} 127.0.0.1\ncafile {authority.file}\nrequire_certificate true\n")
        conf.write(f"certfile {files.certificate}\nkeyfile {files.key}\n")
    secure.start()
    own = authority.issue("gateway")
    settings.MQTT_TLS, settings.MQTT_PORT = True, port
    settings.MQTT_CA_FILE, settings.MQTT_CERT_FILE, settings.MQTT_KEY_FILE = authority.file, own.certificate, own.key
    try:
        with accounts.connected() as security:
            assert "gateway" in security.roles()
        settings.MQTT_CERT_FILE = settings.MQTT_KEY_FILE = ""
        with pytest.raises(BrokerAway), accounts.connected(timeout_seconds=2):
            pass
        stranger = Authority(tmp_path / "stranger")
        settings.MQTT_CA_FILE = stranger.file
        with pytest.raises(BrokerAway), accounts.connected(timeout_seconds=2):
            pass
        assert "certificate verify failed" in caplog.text
    finally:
        secure.stop()


class Files(NamedTuple):
    certificate: str
    key: str


class Authority:
    """Certificates as a farm makes them, with openssl."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self._directory = directory
        self.file, self._key = str(directory / "authority.pem"), str(directory / "authority.key")
        self._openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
            "-subj", "/CN=farm", "-keyout", self._key, "-out", self.file,
        )  # fmt: skip

    def issue(self, name: str) -> Files:
        certificate, key, request = (str(self._directory / f"{name}.{end}") for end in ("pem", "key", "csr"))
        self._openssl(
            "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
            "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", request,
        )  # fmt: skip
        self._openssl(
            "x509", "-req", "-in", request, "-CA", self.file, "-CAkey", self._key, "-CAcreateserial", "-days", "1",
            "-copy_extensions", "copy", "-out", certificate,
        )  # fmt: skip
        return Files(certificate, key)

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)


# The client of the plugin


def test_refused_commands_name_themselves_and_the_reason(security: DynamicSecurity) -> None:
    outcomes = security.execute([dynamic_security.delete_client("nobody"), {"command": "listRoles"}])
    assert outcomes[0] == Outcome("deleteClient", "Client not found")
    assert not outcomes[1].error
    assert "gateway" in outcomes[1].data["roles"]
    with pytest.raises(CommandFailed, match="nonsense: Unknown command"):
        security._list("nonsense")


def test_broker_that_is_away_is_an_error_and_nothing_is_carried_out_later(
    broker: Server, security: DynamicSecurity
) -> None:
    broker.kill()
    until(lambda: not security.ready.is_set())
    role = topics.role_name(str(uuid4()))
    with pytest.raises(BrokerAway):
        security.execute([dynamic_security.create_role(role, [])])
    broker.start()
    assert security.ready.wait(10)
    assert role not in security.roles()


def test_broker_that_goes_while_it_is_asked_is_an_error_at_once(
    broker: Server, security: DynamicSecurity, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = security._connection.client.publish

    def publish_and_die(*arguments: Any, **options: Any) -> Any:
        broker.kill()
        return publish(*arguments, **options)

    monkeypatch.setattr(security._connection.client, "publish", publish_and_die)
    with pytest.raises(BrokerAway):
        security.roles()
    broker.start()


def test_wrong_password_is_reported_as_such_once_and_never_shown(
    broker: Server, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings.MQTT_PASSWORD = "not-the-password"
    with caplog.at_level(logging.INFO), pytest.raises(BrokerAway):
        sync_once(timeout_seconds=4)
    settings.MQTT_PASSWORD = broker.password
    assert caplog.text.count("MQTT_PASSWORD") == 1
    assert "not-the-password" not in caplog.text


def test_broker_that_comes_and_goes_is_logged_once_per_change(broker: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gateway.mqtt.connection"), DynamicSecurity() as security:
        assert security.ready.wait(5)
        broker.kill()
        until(lambda: not security.ready.is_set())
        threading.Event().wait(2.5)  # time for two attempts
        broker.start()
        assert security.ready.wait(10)
    said = [record.getMessage() for record in caplog.records]
    assert ["connected" in line for line in said] == [True, False, True]
    assert "closed the connection" in said[1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # paho forgets its own socket pair
def test_network_thread_that_died_is_started_again(
    broker: Server, security: DynamicSecurity, caplog: pytest.LogCaptureFixture
) -> None:
    security._connection.client.loop_stop()
    security.revive()
    assert security._connection.counts["revived"] == 1
    until(lambda: security.connections == 2)
    assert "gateway" in security.roles()
    security.revive()
    assert security._connection.counts["revived"] == 1


def test_callback_that_fails_is_counted_and_does_not_end_the_connection(
    broker: Server, security: DynamicSecurity, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("nobody foresaw this")

    client_, real = security._connection.client, security._connection.client.on_message
    client_.on_message = security._connection.guarded(fails)
    client_.publish(dynamic_security.CONTROL, json.dumps({"commands": [{"command": "listRoles"}]}))
    until(lambda: security._connection.counts["callback-failed"])
    client_.on_message = real
    assert "gateway" in security.roles()
    assert "nobody foresaw this" in caplog.text


def test_certificates_that_cannot_be_read_are_told_at_the_start(broker: Server, settings: Any, tmp_path: Path) -> None:
    settings.MQTT_TLS, settings.MQTT_CA_FILE = True, str(tmp_path / "none.pem")
    with pytest.raises(OSError, match=r"none\.pem"):
        DynamicSecurity().start()
