"""The MQTT transport on a real Mosquitto: messages to devices, and telemetry from them."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

import msgspec
import paho.mqtt.client as mqtt
import pytest
from django.conf import settings
from django.db import connection
from paho.mqtt.enums import CallbackAPIVersion

from aemos.lib import keys, metrics
from aemos.lib.leader import Leader
from deploy.servers import Server
from devices.catalogue import Credential
from devices.exceptions import BadPayload, Overloaded, Refusal, Unauthorized
from devices.models import Device
from gateway.mqtt import inbound, outbound, topics
from gateway.mqtt.accounts import sync_once
from gateway.mqtt.dynamic_security import CONTROL
from gateway.mqtt.inbound import Inbound, session_id
from gateway.mqtt.sender_queues import Arrival, SenderQueues
from gateway.mqtt.statistics import BrokerStatistics
from gateway.mqtt.transport import MqttTransport
from gateway.transport import DeliveryReport, Pending, Status, TransportError
from monitoring.exposition import expose
from monitoring.health import problems_of
from monitoring.queue import look
from notifications import broker_load
from notifications.messages import ALERT, DEVICE_STATE_CHANGE, Message
from rules.ingest import Receipt
from tests import builders
from tests.mqtt_clients import Client, device, operator, patient
from tests.waiting import until

Test = TypeVar("Test", bound=Callable[..., None])
ORGANIZATION, DEVICE = str(uuid4()), str(uuid4())


def needs_broker(test: Test) -> Test:
    """With the servers, and a database that other threads see."""
    for mark in (pytest.mark.usefixtures("empty_redis", "_clean_broker"), pytest.mark.django_db(transaction=True)):
        mark(test)
    return test


def message(event: str = ALERT, *, device_uuid: str | None = None, **payload: Any) -> Message:
    return Message(
        id=uuid4(),
        effect_key=str(uuid4()),
        organization_uuid=ORGANIZATION,
        device_uuid=device_uuid,
        event=event,
        priority=5,
        payload=payload,
        timestamp="2026-01-01T00:00:00+00:00",
    )


def state_change(source: str = "rule", **payload: Any) -> Message:
    return message(
        DEVICE_STATE_CHANGE, device_uuid=DEVICE, source=source, **{"stateName": "power", "value": "on", **payload}
    )


class Ingested:
    """An ingest that keeps what it is given. `answers` are used up first: a refusal at once, or the outcome of waiting."""

    def __init__(self) -> None:
        self.asked: list[tuple[str | None, bytes, Credential | None]] = []
        self.accepted: list[tuple[str | None, bytes]] = []
        self.holds: list[bool] = []
        self.at_once: list[Exception] = []
        self.later: list[Exception] = []
        self.released = threading.Event()
        self.released.set()

    def __call__(
        self,
        payload: bytes,
        *,
        credential: Credential | None,
        protocol: str,
        uuid: str | None = None,
        hold: bool = False,
        after: Any = None,
        trace: str = "",
    ) -> Pending:
        assert protocol == "mqtt"
        self.holds.append(hold)
        self.asked.append((uuid, payload, credential))
        if self.at_once:
            raise self.at_once.pop(0)
        return Waiting(self, uuid, payload, after)

    def payloads(self) -> list[bytes]:
        return [payload for _, payload in self.accepted]


class Waiting:
    def __init__(self, ingested: Ingested, uuid: str | None, payload: bytes, after: Waiting | None) -> None:
        self._ingested, self._uuid, self._payload, self._after = ingested, uuid, payload, after
        self.error: Exception | None = None

    def wait(self) -> Receipt:
        assert self._ingested.released.wait(20)
        # What is refused for good is done with, and holds nobody up.
        before = self._after.error if self._after else None
        if before is not None and (isinstance(before, Overloaded) or not isinstance(before, Refusal)):
            self.error = before
        elif self._ingested.later:
            self.error = self._ingested.later.pop(0)
        if self.error:
            raise self.error
        self._ingested.accepted.append((self._uuid, self._payload))
        return Receipt(accepted=1)


@pytest.fixture
def _clean_broker(broker: Server, redis_server: Server) -> Iterator[None]:
    """Nobody may find what another test left: the session of telemetry, and servers that a failed test left killed."""
    forget_sessions(broker)
    with connection.execute_wrapper(patient):
        yield
    for server in (broker, redis_server):
        if server.child is None:
            server.start()
    forget_sessions(broker)


def forget_sessions(broker: Server) -> None:
    for name in ("telemetry", "reports"):
        forget_session(broker, name)


def forget_session(broker: Server, name: str) -> None:
    gone = threading.Event()
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=session_id(name), protocol=mqtt.MQTTv5)
    client.username_pw_set(broker.username, broker.password)
    client.on_connect = lambda client, *_: client.disconnect()
    client.on_disconnect = lambda *_: gone.set()
    client.connect("127.0.0.1", broker.port, clean_start=True)
    client.loop_start()
    assert gone.wait(5)
    client.loop_stop()


class running:  # reads as a sentence where it is used
    """A transport that is connected in both directions."""

    def __init__(self, ingest: Callable[..., Pending] | None = None, *, listens: bool = True) -> None:
        self.transport = MqttTransport(ingest or Ingested())
        self._listens = listens

    def __enter__(self) -> MqttTransport:
        self.transport.start()
        until(lambda: self.transport.connected)
        if self._listens:
            until(lambda: self.transport.telemetry.connected and self.transport.reports.connected)
            self.until_subscribed(self.transport.telemetry)
            self.until_subscribed(self.transport.reports)
        return self.transport

    @staticmethod
    def until_subscribed(inbound: Inbound) -> None:
        """Its own subscriptions are acknowledged in order, so one more says that the ones before are there."""
        done = threading.Event()
        client = inbound._connection.client
        client.on_subscribe = lambda *_: done.set()
        client.subscribe(f"nothing/{uuid4()}")
        assert done.wait(5)

    def __exit__(self, *_: object) -> None:
        self.transport.stop(timeout_seconds=5)
        for side in (self.transport.telemetry, self.transport.reports, self.transport._outbound):
            assert side._thread is not None
            assert not side._thread.is_alive()
            assert side._connection.client._thread is None


@pytest.fixture
def ingested() -> Ingested:
    return Ingested()


@pytest.fixture
def transport(broker: Server, ingested: Ingested) -> Iterator[MqttTransport]:
    with running(ingested) as found:
        yield found


@pytest.fixture
def sender(broker: Server) -> Iterator[Client]:
    with operator(broker) as found:
        yield found


# Topics


def test_state_change_by_rule_or_person_is_state_and_command_a_report_is_neither() -> None:
    state = topics.Address(f"devices/{DEVICE}/state/pump 1%2F2", 1, retain=True)
    snapshot = topics.Address(f"devices/{DEVICE}/state", 1, retain=True, has_snapshot=True)
    command = topics.Address(f"devices/{DEVICE}/commands", 2, is_command=True)
    for source in ("rule", "person", "interlock"):
        assert topics.addresses(state_change(source, stateName="pump 1/2")) == [state, snapshot, command]
        assert topics.addresses(state_change(source, stateName="dose", kind="momentary")) == [command]
    assert topics.addresses(state_change("device")) == [topics.Address(f"devices/{DEVICE}/reported", 1)]


def test_everything_else_is_for_the_organization() -> None:
    everybody = [topics.Address(f"organizations/{ORGANIZATION}/broadcast", 1)]
    assert topics.addresses(message(ALERT)) == everybody
    assert topics.addresses(message(ALERT, device_uuid=DEVICE)) == everybody
    assert topics.addresses(message(DEVICE_STATE_CHANGE)) == everybody


def test_inbound_topic_names_its_originator_or_nobody() -> None:
    assert topics.originator_of(topics.datastream(DEVICE)) == DEVICE
    assert topics.originator_of(topics.datastream(DEVICE.upper())) == DEVICE
    for topic in ("devices/pump/datastream", "devices/datastream", f"sensors/{DEVICE}/datastream", ""):
        assert topics.originator_of(topic) is None


def test_originator_is_granted_its_own_literal_topics_only() -> None:
    assert {(grant.right, grant.topic.split("/")[-1]) for grant in topics.grants(DEVICE, ORGANIZATION)} == {
        ("publishClientSend", "datastream"),
        ("publishClientSend", "status"),
        ("publishClientSend", "ack"),
        *(
            (right, name)
            for right in ("subscribeLiteral", "publishClientReceive")
            for name in ("commands", "broadcast", "status")
        ),
        ("subscribePattern", "#"),
        ("publishClientReceive", "#"),
    }
    wild = [grant.topic for grant in topics.grants(DEVICE, ORGANIZATION) if set("+#%$") & set(grant.topic)]
    assert set(wild) == {topics.GATEWAY_STATUSES, f"devices/{DEVICE}/state/#"}, "nobody else's devices"


# Messages out


@needs_broker
def test_command_reaches_the_device_once_with_its_quality_of_service(broker: Server, transport: MqttTransport) -> None:
    sent = state_change("rule", stateName="power", value="on")
    reports: list[DeliveryReport] = []
    with operator(broker) as listener:
        assert listener.subscribe(f"devices/{DEVICE}/+", qos=2)
        transport.deliver(sent, reports.append)
        until(lambda: len(listener.received) == 2)
        assert until(lambda: reports) == [DeliveryReport(sent)]
        forget_retained(listener)
    bodies = {topic: json.loads(payload) for topic, payload in listener.received if payload}
    snapshot = bodies[topics.state(DEVICE)].pop("states")
    assert snapshot == {"power": {"value": "on", "changedAt": sent.timestamp}}
    assert bodies[topics.commands(DEVICE)] == bodies[topics.state(DEVICE)]
    assert bodies[topics.commands(DEVICE)]["id"] == str(sent.id)
    assert bodies[topics.commands(DEVICE)]["data"]["value"] == "on"


@needs_broker
def test_device_that_connects_later_learns_its_state_but_is_not_commanded(
    broker: Server, transport: MqttTransport
) -> None:
    reports: list[DeliveryReport] = []
    transport.deliver(state_change(value="on"), reports.append)
    until(lambda: reports)
    with operator(broker) as late:
        assert late.subscribe(topics.commands(DEVICE))
        assert late.subscribe(f"{topics.state(DEVICE)}/#")
        until(lambda: len(late.received) == 2)
        assert {topic for topic, _ in late.received} == {topics.state(DEVICE), topics.state_of(DEVICE, "power")}
        forget_retained(late)


@needs_broker
def test_a_device_with_two_relays_that_was_away_learns_both(broker: Server, transport: MqttTransport) -> None:
    reports: list[DeliveryReport] = []
    board = str(uuid4())
    for name, value in (("pump1", "on"), ("pump2", "off"), ("pump1", "off"), ("pump2", "on")):
        change = message(DEVICE_STATE_CHANGE, device_uuid=board, source="rule", stateName=name, value=value)
        transport.deliver(change, reports.append)
    dose = message(DEVICE_STATE_CHANGE, device_uuid=board, source="rule", stateName="dose", kind="momentary", value=5)
    transport.deliver(dose, reports.append)
    until(lambda: len(reports) == 5)
    with operator(broker) as late:
        assert late.subscribe(f"devices/{board}/#")
        until(lambda: len(late.received) == 3)
        found = {topic.removeprefix(topics.state(board)): json.loads(payload) for topic, payload in late.received}
    assert {topic: body["data"]["value"] for topic, body in found.items()} == {
        "/pump1": "off",
        "/pump2": "on",
        "": "on",
    }
    assert {name: state["value"] for name, state in found[""]["states"].items()} == {"pump1": "off", "pump2": "on"}


def forget_retained(listener: Client) -> None:
    """So that the next test finds nothing retained."""
    for topic in (topics.state(DEVICE), topics.state_of(DEVICE, "power")):
        listener.publish(topic, "", retain=True)


@needs_broker
def test_messages_are_delivered_in_order(broker: Server, transport: MqttTransport) -> None:
    reports: list[DeliveryReport] = []
    with operator(broker) as listener:
        assert listener.subscribe(topics.broadcast(ORGANIZATION))
        sent = [message(number=number) for number in range(500)]
        for each in sent:
            transport.deliver(each, reports.append)
        until(lambda: len(listener.received) == 500)
        assert [json.loads(payload)["data"]["number"] for payload in listener.payloads()] == list(range(500))
    until(lambda: len(reports) == 500)
    assert reports == [DeliveryReport(each) for each in sent]
    assert transport.counts["published"] == 501, "and that the gateway is online"


@needs_broker
def test_message_is_delivered_only_when_the_broker_has_it_and_then_once(
    broker: Server, transport: MqttTransport
) -> None:
    reports: list[DeliveryReport] = []
    broker.kill()
    until(lambda: not transport.connected)
    sent = [state_change(number=number) for number in range(60)]
    for each in sent:
        transport.deliver(each, reports.append)
    threading.Event().wait(1.5)
    assert reports == []
    broker.start()
    until(lambda: len(reports) >= 60, seconds=15)
    threading.Event().wait(0.5)
    assert reports == [DeliveryReport(each) for each in sent]


@needs_broker
def test_message_is_not_delivered_while_the_broker_is_silent(broker: Server, transport: MqttTransport) -> None:
    """Stopped, not killed: the connection stands, and what is written to it goes into the kernel's buffers."""
    reports: list[DeliveryReport] = []
    assert broker.pid
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        transport.deliver(message(), reports.append)
        threading.Event().wait(0.5)
        assert reports == []
    finally:
        os.kill(broker.pid, signal.SIGCONT)
    until(lambda: len(reports) == 1)


@needs_broker
def test_too_many_waiting_messages_are_refused_for_now(
    broker: Server, transport: MqttTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[DeliveryReport] = []
    broker.kill()
    until(lambda: not transport.connected)
    for _ in range(outbound.MAXIMUM_WAITING):
        transport.deliver(message(), reports.append)
    with pytest.raises(TransportError) as refusal:
        transport.deliver(message(), reports.append)
    assert not refusal.value.permanent
    broker.start()
    until(lambda: len(reports) == outbound.MAXIMUM_WAITING, seconds=15)
    transport.deliver(message(), reports.append)
    until(lambda: len(reports) == outbound.MAXIMUM_WAITING + 1)


@needs_broker
def test_refused_publication_is_tried_again(
    broker: Server, transport: MqttTransport, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Mosquitto refuses the gateway nothing, so its answer is put in the place of the first real one."""
    monkeypatch.setattr(outbound, "REFUSED_AGAIN_SECONDS", 0.1)
    reports: list[DeliveryReport] = []
    acknowledged = transport._outbound._acknowledged

    def first_is_refused(acknowledgement: Any) -> None:
        monkeypatch.setattr(transport._outbound, "_acknowledged", acknowledged)
        acknowledged(outbound._Acknowledgement(acknowledgement.mid, "Quota exceeded"))

    monkeypatch.setattr(transport._outbound, "_acknowledged", first_is_refused)
    sent = message()
    transport.deliver(sent, reports.append)
    until(lambda: reports == [DeliveryReport(sent)])
    assert transport.counts["refused"] == 1
    assert "Quota exceeded" in caplog.text


@needs_broker
def test_refused_publication_keeps_its_place_before_later_ones_on_its_topic(
    broker: Server, transport: MqttTransport, sender: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbound, "REFUSED_AGAIN_SECONDS", 0.5)
    assert sender.subscribe(topics.broadcast(ORGANIZATION))
    acknowledged = transport._outbound._acknowledged

    def first_is_refused(acknowledgement: Any) -> None:
        monkeypatch.setattr(transport._outbound, "_acknowledged", acknowledged)
        acknowledged(outbound._Acknowledgement(acknowledgement.mid, "Quota exceeded"))

    monkeypatch.setattr(transport._outbound, "_acknowledged", first_is_refused)
    first, second = message(), message()
    reports: list[DeliveryReport] = []
    transport.deliver(first, reports.append)
    until(lambda: transport.counts["refused"])
    transport.deliver(second, reports.append)
    until(lambda: len(reports) == 2)
    until(lambda: len(sender.received) == 3)
    assert reports == [DeliveryReport(first), DeliveryReport(second)]
    heard = [json.loads(payload)["id"] for payload in sender.payloads()]
    assert heard == [str(first.id), str(first.id), str(second.id)]


@contextmanager
def broker_that_refuses(topic: str, operator: Client) -> Iterator[None]:
    """Nobody with the gateway's role may publish there for as long as the block lasts."""
    acl = {"rolename": "gateway", "acltype": "publishClientSend", "topic": topic}

    def ask(**command: Any) -> None:
        connections = operator.connections
        operator.publish(CONTROL, json.dumps({"commands": [{**command, **acl}]}), qos=0)
        until(lambda: operator.connections > connections)  # whoever has the role is sent away to come back with it

    ask(command="addRoleACL", priority=10, allow=False)
    try:
        yield
    finally:
        ask(command="removeRoleACL")


@needs_broker
def test_what_the_broker_refuses_too_often_is_given_up_with_its_reason(
    transport: MqttTransport, sender: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbound, "REFUSED_AGAIN_SECONDS", 0.1)
    monkeypatch.setattr(settings, "NOTIFICATION_MAX_ATTEMPTS", 3)
    reports: list[DeliveryReport] = []
    topic = topics.broadcast(ORGANIZATION)
    with broker_that_refuses(topic, sender):
        transport.deliver(message(), reports.append)
        until(lambda: reports)
    assert (reports[0].status, reports[0].reason) == (
        Status.REFUSED,
        f"the broker refused it on {topic}: Not authorized",
    )
    assert transport.counts["refused"] == 3
    transport.deliver(message(), reports.append)
    until(lambda: len(reports) == 2)
    assert reports[1].status == Status.DELIVERED


@needs_broker
def test_alert_that_waited_for_the_broker_until_it_was_too_late_is_not_sent(
    broker: Server, transport: MqttTransport
) -> None:
    broker.kill()
    until(lambda: not transport.connected)
    late = msgspec.structs.replace(message(), expires_at=time.time() + 1)
    reports: list[DeliveryReport] = []
    transport.deliver(late, reports.append)
    until(lambda: time.time() > late.expires_at)  # type: ignore[operator]
    broker.start()
    with operator(broker) as listener:
        assert listener.subscribe(topics.broadcast(ORGANIZATION))
        next_one = message()
        until(lambda: reports == [DeliveryReport(late, Status.EXPIRED)], seconds=15)
        transport.deliver(next_one, reports.append)
        until(lambda: reports[1:] == [DeliveryReport(next_one)])
        until(lambda: listener.received)
        assert [json.loads(payload)["id"] for payload in listener.payloads()] == [str(next_one.id)]
    assert transport.counts["expired"] == 1


@needs_broker
def test_alert_that_the_broker_acknowledges_after_its_time_is_delivered(
    broker: Server, transport: MqttTransport
) -> None:
    reports: list[DeliveryReport] = []
    assert broker.pid
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        in_flight = msgspec.structs.replace(message(), expires_at=time.time() + 0.5)
        transport.deliver(in_flight, reports.append)
        threading.Event().wait(1)
    finally:
        os.kill(broker.pid, signal.SIGCONT)
    until(lambda: reports == [DeliveryReport(in_flight)])


@needs_broker
def test_callback_that_fails_does_not_stop_the_messages_behind_it(
    broker: Server, transport: MqttTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []
    monkeypatch.setattr(metrics.COUNTERS, "add", lambda name, _amount: counted.append(name))

    def fails(_: DeliveryReport) -> None:
        raise RuntimeError("nobody foresaw this")

    reports: list[DeliveryReport] = []
    transport.deliver(message(), fails)
    transport.deliver(message(), reports.append)
    until(lambda: reports)
    assert transport.counts["callback-failed"] == 1
    assert counted == ["gateway_failures_total|mqtt"]


@needs_broker
def test_stopping_finishes_what_is_in_flight_and_takes_nothing_new(broker: Server) -> None:
    reports: list[DeliveryReport] = []
    with running() as transport:
        for _ in range(200):
            transport.deliver(message(), reports.append)
    assert len(reports) == 200
    with pytest.raises(TransportError):
        transport.deliver(message(), reports.append)


@needs_broker
def test_transport_starts_and_stops_while_the_broker_is_away(broker: Server, caplog: pytest.LogCaptureFixture) -> None:
    broker.kill()
    transport = MqttTransport(Ingested())
    transport.start()
    transport.deliver(message(), lambda _: None)
    until(lambda: "cannot be reached" in caplog.text)
    transport.stop(timeout_seconds=2)
    broker.start()


# Telemetry in


@needs_broker
def test_device_s_telemetry_is_ingested_with_its_own_credential(
    broker: Server, ingested: Ingested, transport: MqttTransport
) -> None:
    pump = builders.device(builders.organization())
    token = builders.token(pump)
    sync_once()
    with device(broker, token) as speaker:
        assert speaker.connected.wait(5)
        speaker.publish(topics.status(str(pump.uuid)), "online")
        speaker.publish(topics.datastream(str(pump.uuid)), '{"values": {"power": "on"}}')
        until(lambda: ingested.accepted)
    ((uuid, payload, credential),) = ingested.asked
    assert (uuid, payload) == (str(pump.uuid), b'{"values": {"power": "on"}}')
    assert credential is not None
    assert credential.originator.uuid == str(pump.uuid)
    until(lambda: transport.reports.counts["accepted"] == 1)  # over a session of its own
    Device.objects.all().delete()
    sync_once()


@needs_broker
def test_unknown_senders_are_passed_on_without_a_credential(
    transport: MqttTransport, ingested: Ingested, sender: Client
) -> None:
    sender.publish(topics.datastream(DEVICE), "a")
    sender.publish("devices/pump/datastream", "b")
    until(lambda: len(ingested.asked) == 2)
    assert sorted(ingested.asked, key=lambda each: each[1]) == [(DEVICE, b"a", None), (None, b"b", None)]


@needs_broker
def test_message_is_acknowledged_only_after_the_journal_has_it(
    broker: Server, sender: Client, ingested: Ingested
) -> None:
    ingested.released.clear()
    second = Ingested()
    with running(ingested) as first:
        sender.publish(topics.datastream(DEVICE), "a")
        until(lambda: ingested.asked)
        crash(first)
        with running(second):
            until(lambda: second.accepted == [(DEVICE, b"a")])
        ingested.released.set()
    third = Ingested()
    with running(third):
        sender.publish(topics.datastream(DEVICE), "b")
        until(lambda: third.accepted)
    assert third.payloads() == [b"b"], "acknowledged by the second and not sent again"


def crash(transport: MqttTransport) -> None:
    """As if its process had been killed: its connections break, its leadership ends, and it does not come back."""
    for direction in (transport.telemetry, transport.reports):
        direction._stopping.set()
        direction._connection.client._reconnect_on_failure = False
        sock = direction._connection.client.socket()
        assert isinstance(sock, socket.socket)
        sock.shutdown(socket.SHUT_RDWR)
        direction._leader.resign()
    until(lambda: not transport.telemetry.connected and not transport.reports.connected)


@needs_broker
def test_telemetry_sent_while_no_gateway_runs_is_kept_by_the_broker(
    broker: Server, sender: Client, ingested: Ingested
) -> None:
    with running():
        pass
    for number in range(50):
        sender.publish(topics.datastream(DEVICE), str(number))
    with running(ingested):
        until(lambda: len(ingested.accepted) == 50)
    assert ingested.payloads() == [str(number).encode() for number in range(50)]


@needs_broker
@pytest.mark.parametrize("when", ["at_once", "later"])
def test_overloaded_is_tried_again_until_it_is_taken_and_keeps_the_order(
    transport: MqttTransport, ingested: Ingested, sender: Client, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    getattr(ingested, when).extend(Overloaded("full", reason="circuit-open", retry_after=0) for _ in range(3))
    for number in range(20):
        sender.publish(topics.datastream(DEVICE), str(number))
    until(lambda: len(ingested.accepted) == 20)
    assert ingested.payloads() == [str(number).encode() for number in range(20)]
    assert transport.telemetry.counts["accepted"] == 20
    # Those behind it that were on their way with it fail with it.
    assert transport.telemetry.counts["overloaded"] >= 3
    assert set(transport.telemetry.counts) == {"overloaded", "accepted"}


@needs_broker
def test_overloaded_is_held_back_for_a_while_and_then_recorded_and_acknowledged(
    ingested: Ingested, sender: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbound, "HOLD_SECONDS", 0.5)
    held = [Overloaded("full", reason="circuit-open", retry_after=1) for _ in range(2)]
    held[1].recorded = True
    ingested.at_once.extend(held)
    with running(ingested) as transport:
        sender.publish(topics.datastream(DEVICE), "refused")
        sender.publish(topics.datastream(DEVICE), "taken")
        until(lambda: ingested.payloads() == [b"taken"])
        assert transport.telemetry.counts == {"overloaded": 1, "refused": 1, "accepted": 1}
    assert ingested.holds == [True, False, False]


@needs_broker
def test_sender_that_has_to_wait_holds_up_nobody_else(
    transport: MqttTransport, ingested: Ingested, sender: Client
) -> None:
    ingested.at_once.append(Overloaded("full", reason="circuit-open", retry_after=2))
    other = str(uuid4())
    sender.publish(topics.datastream(DEVICE), "a")
    until(lambda: ingested.asked)
    sender.publish(topics.datastream(DEVICE), "b")
    sender.publish(topics.datastream(other), "c")
    until(lambda: len(ingested.accepted) == 3)
    assert ingested.payloads() == [b"c", b"a", b"b"]


@needs_broker
@pytest.mark.parametrize("when", ["at_once", "later"])
@pytest.mark.parametrize("refusal", [BadPayload("not JSON"), Unauthorized("no live token")])
def test_refused_message_is_acknowledged_and_does_not_block_the_next(
    broker: Server, ingested: Ingested, sender: Client, when: str, refusal: Refusal
) -> None:
    getattr(ingested, when).append(refusal)
    with running(ingested) as transport:
        sender.publish(topics.datastream(DEVICE), "bad")
        sender.publish(topics.datastream(DEVICE), "good")
        until(lambda: ingested.payloads() == [b"good"])
        assert transport.telemetry.counts == {"refused": 1, "accepted": 1}
    after = Ingested()
    with running(after):
        sender.publish(topics.datastream(DEVICE), "next")
        until(lambda: after.accepted)
    assert after.payloads() == [b"next"]


@needs_broker
@pytest.mark.parametrize("when", ["at_once", "later"])
def test_error_nobody_foresaw_is_told_and_the_message_tried_again(
    transport: MqttTransport, ingested: Ingested, sender: Client, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    getattr(ingested, when).extend(RuntimeError("nobody foresaw this") for _ in range(2))
    sender.publish(topics.datastream(DEVICE), "a")
    sender.publish(topics.datastream(DEVICE), "b")
    until(lambda: ingested.payloads() == [b"a", b"b"])
    assert transport.telemetry.counts["accepted"] == 2
    assert transport.telemetry.counts["failed"] >= 2  # the one behind it fails with it where it was on its way
    assert f"devices/{DEVICE}/datastream cannot be taken" in caplog.text
    assert "nobody foresaw this" in caplog.text


def has_accepted(ingested: Ingested, number: int) -> bool:
    return len(ingested.accepted) == number


@needs_broker
def test_two_thousand_messages_keep_the_order_of_each_device(
    transport: MqttTransport, ingested: Ingested, sender: Client
) -> None:
    devices = [str(uuid4()) for _ in range(20)]
    for uuid in devices:
        ingested.at_once.append(Overloaded(uuid, reason="circuit-open", retry_after=0))
        ingested.later.append(Overloaded(uuid, reason="circuit-open", retry_after=0))
    # 500 at a time: what is more than the window of 1,000 queues up in the broker, and Mosquitto 2.0 may then let a message
    # that just came pass those that it holds.
    for first in range(0, 100, 25):
        numbers = range(first, first + 25)
        sender.publish_many([(topics.datastream(uuid), str(number)) for number in numbers for uuid in devices])
        until(partial(has_accepted, ingested, 20 * (first + 25)), seconds=20)
    heard: defaultdict[str | None, list[int]] = defaultdict(list)
    for spoke, payload in ingested.accepted:
        heard[spoke].append(int(payload))
    assert heard == {uuid: list(range(100)) for uuid in devices}
    assert transport.telemetry.counts["overloaded"] >= 40


@needs_broker
def test_broker_that_restarts_brings_unacknowledged_messages_before_new_ones(
    broker: Server, ingested: Ingested, sender: Client
) -> None:
    ingested.released.clear()
    with running(ingested):
        for number in range(5):
            sender.publish(topics.datastream(DEVICE), str(number))
        until(lambda: ingested.asked)
        broker.restart()
        ingested.released.set()
        assert sender.connected.wait(10)
        sender.publish(topics.datastream(DEVICE), "5")
        until(lambda: ingested.accepted and ingested.payloads()[-1] == b"5", seconds=15)
    assert ingested.payloads() == [b"%d" % n for n in range(6)], "what was accepted is known when it is delivered again"


@needs_broker
def test_qos_0_message_is_dropped_and_counted_when_too_many_wait(
    transport: MqttTransport, ingested: Ingested, sender: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbound, "MAXIMUM_HELD", 3)
    ingested.released.clear()
    for number in range(10):
        sender.publish(topics.datastream(DEVICE), str(number), qos=0)
    until(lambda: transport.telemetry.counts["dropped"])
    sender.publish(topics.datastream(DEVICE), "kept")
    ingested.released.set()
    until(lambda: ingested.accepted and ingested.payloads()[-1] == b"kept")
    assert transport.telemetry.counts["dropped"] + transport.telemetry.counts["accepted"] == 11


@needs_broker
def test_large_messages_that_wait_are_bounded_and_none_is_lost(
    transport: MqttTransport, ingested: Ingested, sender: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbound, "MAXIMUM_HELD_BYTES", 500_000)
    ingested.released.clear()
    sent = [b"%02d" % number * 50_000 for number in range(30)]
    for each in sent:
        sender.publish(topics.datastream(DEVICE), each)
    until(lambda: transport.telemetry.held_bytes >= 500_000)
    threading.Event().wait(1)
    assert transport.telemetry.held_bytes <= 600_000
    sender.publish(topics.datastream(DEVICE), "unsure", qos=0)
    ingested.released.set()
    until(lambda: len(ingested.accepted) >= 30)
    assert ingested.payloads()[:30] == sent
    until(lambda: transport.telemetry.held_bytes == 0)


@needs_broker
def test_large_qos_0_messages_are_dropped_rather_than_held_without_bound(
    transport: MqttTransport, ingested: Ingested, sender: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbound, "MAXIMUM_HELD_BYTES", 500_000)
    ingested.released.clear()
    for _ in range(10):
        sender.publish(topics.datastream(DEVICE), b"x" * 100_000, qos=0)
    until(lambda: transport.telemetry.counts["dropped"] == 5)
    assert transport.telemetry.held_bytes == 500_000
    ingested.released.set()
    until(lambda: transport.telemetry.counts["accepted"] == 5)
    assert transport.telemetry.counts["dropped"] == 5


@needs_broker
def test_message_too_large_for_telemetry_never_reaches_the_gateway(
    broker: Server, transport: MqttTransport, ingested: Ingested, sender: Client
) -> None:
    until(lambda: transport.telemetry.connected)
    topic = topics.datastream(DEVICE)
    for payload in (b"x" * 3_000_000, b"after", b"x" * 3_000_000, b"last"):
        sender.publish(topic, payload)
    until(lambda: b"last" in ingested.payloads())
    assert ingested.payloads() == [b"after", b"last"]


@needs_broker
def test_retained_telemetry_is_not_taken_again_at_every_start(
    broker: Server, sender: Client, ingested: Ingested
) -> None:
    with running(ingested):
        sender.publish(topics.datastream(DEVICE), "a", retain=True)
        until(lambda: ingested.accepted)
    with running(ingested):
        sender.publish(topics.datastream(DEVICE), "", retain=True)
        until(lambda: len(ingested.accepted) == 2)
    assert ingested.payloads() == [b"a", b""]


# Several gateways


@needs_broker
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # paho forgets its own socket pair
def test_one_gateway_listens_and_another_takes_over_without_loss(broker: Server, sender: Client) -> None:
    first, second = Ingested(), Ingested()
    with running(first) as one, running(second, listens=False) as other:
        sender.publish(topics.datastream(DEVICE), "a")
        until(lambda: first.accepted)
        assert not other.telemetry.connected
        one.telemetry.stop(timeout_seconds=5)
        for number in range(50):
            sender.publish(topics.datastream(DEVICE), str(number))
        until(lambda: len(second.accepted) == 50)
    assert first.payloads() == [b"a"]
    assert second.payloads() == [str(number).encode() for number in range(50)]


@needs_broker
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # paho forgets its own socket pair
def test_gateway_that_lost_its_leadership_listens_again_when_it_has_it_back(
    broker: Server, transport: MqttTransport, ingested: Ingested, sender: Client
) -> None:
    transport.telemetry._leader.resign()
    rival = Leader(keys.MQTT_TELEMETRY_LEADER)
    assert rival.leads()
    until(lambda: not transport.telemetry.connected)
    sender.publish(topics.datastream(DEVICE), "a")
    rival.resign()
    until(lambda: ingested.accepted)


@needs_broker
def test_redis_away_changes_nobody_s_part(
    redis_server: Server,
    transport: MqttTransport,
    ingested: Ingested,
    sender: Client,
    caplog: pytest.LogCaptureFixture,
) -> None:
    redis_server.kill()
    until(lambda: f"Who leads ({keys.MQTT_TELEMETRY_LEADER}) is unknown" in caplog.text)
    sender.publish(topics.datastream(DEVICE), "a")
    until(lambda: ingested.accepted)
    redis_server.start()
    until(lambda: f"Who leads ({keys.MQTT_TELEMETRY_LEADER}) is known again" in caplog.text)
    assert transport.telemetry.connected


def test_session_has_one_name_that_gives_no_secret_away() -> None:
    assert session_id("telemetry") == session_id("telemetry") != session_id("reports")
    assert settings.DEVICE_TOKEN_KEY not in session_id("telemetry")


# The order of each sender


def arrival(name: str, number: int = 0) -> Arrival:
    return Arrival(topics.datastream(name), str(number).encode(), number, 1, 0)


def test_next_message_of_a_sender_is_given_when_the_one_before_it_is_done() -> None:
    queues = SenderQueues()
    first, second, other = arrival("a", 1), arrival("a", 2), arrival("b", 3)
    for each in (first, second, other):
        queues.add(each)
    assert [queues.next(0.0), queues.next(0.0), queues.next(0.0)] == [[first], [other], []]
    queues.done(first)
    assert queues.next(0.0) == [second]
    assert len(queues) == 2
    queues.done(second)
    queues.done(other)
    assert len(queues) == 0
    assert queues.next(0.0) == []


def test_messages_that_are_given_together_keep_their_order_when_one_has_to_wait() -> None:
    queues = SenderQueues()
    first, second, third, fourth = (arrival("a", number) for number in range(4))
    for each in (first, second, third):
        queues.add(each)
    assert queues.next(0.0, maximum=10) == [first, second, third]
    queues.add(fourth)
    assert queues.next(0.0) == [], "those before it are not done"
    queues.done(first)
    queues.again(second, at=5.0)
    assert queues.is_held("devices/a/datastream")
    queues.unused(third)
    assert queues.next(4.9, maximum=10) == []
    assert queues.next(5.0, maximum=2) == [second, third]
    queues.done(second)
    queues.done(third)
    assert queues.next(5.0, maximum=2) == [fourth]


def test_message_that_has_to_wait_comes_at_its_time_before_its_successors() -> None:
    queues = SenderQueues()
    first, second = arrival("a", 1), arrival("a", 2)
    queues.add(first)
    queues.add(second)
    assert queues.next(0.0) == [first]
    queues.again(first, at=5.0)
    assert queues.seconds_until_next(1.0, longest=60.0) == 4.0
    assert queues.seconds_until_next(1.0, longest=1.0) == 1.0
    assert queues.next(4.9) == []
    assert queues.next(5.0) == [first]
    queues.done(first)
    assert queues.seconds_until_next(5.0, longest=1.0) == 0.0
    assert queues.next(5.0) == [second]


# What the broker holds


@needs_broker
def test_health_and_metrics_say_what_the_broker_holds_and_that_it_dropped_some(broker: Server, sender: Client) -> None:
    away = Client(broker, broker.username, broker.password, session="away for a while")
    assert away.connected.wait(5)
    assert away.subscribe("devices/+/datastream")
    away.close()
    stop, statistics = threading.Event(), BrokerStatistics()
    thread = threading.Thread(target=statistics.run, args=(stop,))
    thread.start()
    try:
        sender.publish_many([(f"devices/{uuid4()}/datastream", "{}")] * 1_200)
        until(lambda: (found := broker_load.recall()) and found.held >= 1_200, seconds=20)
        load = broker_load.recall()
        assert load is not None
        assert load.dropped_at is None
        assert any("broker holds 1,2" in problem for problem in health_problems())
        assert f"mqtt_broker_held_messages {load.held:.1f}" in expose().decode()
        broker_load.remember(held=0, dropped=load.dropped + 3)
        assert any(f"{load.dropped + 3} since it was started" in problem for problem in health_problems())
    finally:
        stop.set()
        thread.join(10)
        forget(broker, "away for a while")
    assert not thread.is_alive()


def health_problems() -> list[str]:
    found: list[str] = problems_of(look())
    return found


def forget(broker: Server, session: str) -> None:
    """Ends a session that the broker keeps."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=session, protocol=mqtt.MQTTv5)
    client.username_pw_set(broker.username, broker.password)
    client.connect("127.0.0.1", broker.port, clean_start=True)
    client.disconnect()
