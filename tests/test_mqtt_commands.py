"""Commands, acknowledgements and presence: from a wish through a real Mosquitto to a device, and back from it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.db import OperationalError
from django.utils import timezone

from deploy.servers import Server
from devices import commands
from devices.commands import State
from devices.models import Device, DeviceState, DeviceToken, StateChange
from gateway.mqtt import outbound, republish, topics
from gateway.mqtt.accounts import sync_once
from gateway.mqtt.transport import MqttTransport
from notifications.messages import Message
from notifications.state_messages import message_of
from rules.effects import device_alarms
from tests import builders
from tests.mqtt_clients import Client, device, operator
from tests.test_device_commands import said, state_of, wished
from tests.test_mqtt import _clean_broker, needs_broker, running
from tests.waiting import until

__all__ = ["_clean_broker"]


@pytest.fixture
def farm_pump(broker: Server, _clean_broker: None) -> Iterator[tuple[Device, str]]:
    """A device and its token, which the broker knows."""
    found = builders.device(builders.organization())
    token = builders.token(found)
    sync_once()
    yield found, token
    clear_retained(broker, found)
    found.organization.delete()
    sync_once()


def clear_retained(broker: Server, target: Device) -> None:
    with operator(broker) as cleaner:
        for topic in (topics.state(str(target.uuid)), topics.status(str(target.uuid))):
            cleaner.publish(topic, "", retain=True)


def listening(broker: Server, token: str, target: Device) -> Client:
    found = Client(broker, token.split("_")[1], token)
    assert found.connected.wait(5)
    assert found.subscribe(topics.commands(str(target.uuid)), qos=2)
    return found


@needs_broker
def test_command_is_sent_acknowledged_and_applied_by_a_device(broker: Server, farm_pump: tuple[Device, str]) -> None:
    pump, token = farm_pump
    with running() as transport:
        listener = listening(broker, token, pump)
        row = wished(pump)
        transport.deliver(message_of(row), lambda _: None)
        until(lambda: listener.received)
        body = json.loads(listener.payloads()[0])
        assert body["id"] == str(row.uuid)
        until(lambda: state_of(row) == State.SENT)
        for answer in ("acknowledged", "applied"):
            listener.publish(topics.acknowledgements(str(pump.uuid)), json.dumps({"id": body["id"], "status": answer}))
            until(lambda answer=answer: state_of(row) == answer)  # type: ignore[misc]
        listener.close()
    assert DeviceState.objects.get().reported_value == "on"


@needs_broker
def test_device_cannot_answer_on_the_topic_of_another(broker: Server, farm_pump: tuple[Device, str]) -> None:
    pump, token = farm_pump
    other = builders.device(pump.organization)
    row = wished(other)
    with running() as transport, device(broker, token) as speaker:
        assert speaker.connected.wait(5)
        answer = json.dumps({"id": str(row.uuid), "status": "applied"})
        speaker.publish(topics.acknowledgements(str(other.uuid)), answer)
        speaker.publish(topics.acknowledgements(str(pump.uuid)), answer)
        until(lambda: transport.reports.counts["refused"])
        assert transport.reports.counts == {"refused": 1}, "the broker let only its own topic through"
    assert state_of(row) == State.QUEUED


@needs_broker
def test_command_that_is_too_old_is_not_sent_and_its_state_is(broker: Server, farm_pump: tuple[Device, str]) -> None:
    pump, _ = farm_pump
    row = wished(pump)
    StateChange.objects.filter(pk=row.pk).update(deadline=timezone.now() - timedelta(seconds=1))
    row = StateChange.objects.select_related("state__device__organization").get(pk=row.pk)
    delivered: list[object] = []
    with running() as transport, operator(broker) as listener:
        assert listener.subscribe(f"devices/{pump.uuid}/+", qos=2)
        transport.deliver(message_of(row), delivered.append)
        until(lambda: delivered)
        until(lambda: listener.received)
        assert [topic for topic, _ in listener.received] == [topics.state(str(pump.uuid))]
        assert transport.counts["expired"] == 1
    assert device_alarms.expire_commands() == 1, "the scheduler notes it"
    assert state_of(row) == State.EXPIRED


@needs_broker
def test_command_that_waited_for_the_broker_until_it_was_too_old_is_not_sent(
    broker: Server, farm_pump: tuple[Device, str], settings: Any
) -> None:
    pump, _ = farm_pump
    settings.COMMAND_EXPIRY_SECONDS = 1
    with running() as transport:
        broker.kill()
        until(lambda: not transport.connected)
        row = wished(pump)
        transport.deliver(message_of(row), lambda _: None)
        until(lambda: timezone.now() > row.deadline)  # type: ignore[operator]
        broker.start()
        until(lambda: transport.counts["expired"], seconds=15)
    assert device_alarms.expire_commands() == 1, "the scheduler notes it"
    assert state_of(row) == State.EXPIRED


@needs_broker
def test_command_expires_in_the_broker_while_its_device_is_away(broker: Server, farm_pump: tuple[Device, str]) -> None:
    """The broker is told how long it may keep it."""
    pump, _ = farm_pump
    row = wished(pump)
    with running() as transport, operator(broker) as listener:
        heard: list[Any] = []
        listener._client.on_message = lambda _client, _data, message: heard.append(message)
        assert listener.subscribe(topics.commands(str(pump.uuid)), qos=2)
        transport.deliver(message_of(row), lambda _: None)
        (command,) = until(lambda: heard)
        assert 290 <= command.properties.MessageExpiryInterval <= 300


@needs_broker
def test_status_and_last_will_of_a_device_are_noted(broker: Server, farm_pump: tuple[Device, str]) -> None:
    pump, token = farm_pump
    with running():
        speaker = Client(broker, token.split("_")[1], token, will=(topics.status(str(pump.uuid)), "offline"))
        assert speaker.connected.wait(5)
        speaker.publish(topics.status(str(pump.uuid)), "online")
        until(lambda: Device.objects.get(pk=pump.pk).connected is True)
        speaker.vanish()
        until(lambda: Device.objects.get(pk=pump.pk).connected is False)


@needs_broker
def test_device_whose_token_is_revoked_is_offline(broker: Server, farm_pump: tuple[Device, str]) -> None:
    pump, token = farm_pump
    with running():
        speaker = Client(broker, token.split("_")[1], token, will=(topics.status(str(pump.uuid)), "offline"))
        assert speaker.connected.wait(5)
        speaker.publish(topics.status(str(pump.uuid)), "online")
        until(lambda: Device.objects.get(pk=pump.pk).connected is True)
        DeviceToken.objects.revoke()
        sync_once()
        until(lambda: Device.objects.get(pk=pump.pk).connected is False)
        speaker.close()


@needs_broker
def test_gateway_says_that_it_is_online_and_its_last_will_that_it_is_not(broker: Server, settings: Any) -> None:
    settings.GATEWAY_NAME = "greenhouse-1"
    topic = topics.gateway_status("greenhouse-1")
    with operator(broker) as listener:
        assert listener.subscribe(topics.GATEWAY_STATUSES)
        with running() as transport:
            until(lambda: statuses(listener, topic) == ["online"])
            break_off(transport)
            until(lambda: statuses(listener, topic) == ["online", "offline"])
            until(lambda: statuses(listener, topic) == ["online", "offline", "online"])
        until(lambda: statuses(listener, topic)[3:] == ["offline"])
        with operator(broker) as late:
            assert late.subscribe(topic)
            until(lambda: statuses(late, topic) == ["offline"])
        listener.publish(topic, "", retain=True)


@needs_broker
def test_a_gateway_that_stops_says_so_although_nothing_is_under_way(
    broker: Server, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.GATEWAY_NAME = "greenhouse-2"
    topic = topics.gateway_status("greenhouse-2")
    with operator(broker) as listener:
        assert listener.subscribe(topics.GATEWAY_STATUSES)
        with running() as transport:
            until(lambda: statuses(listener, topic) == ["online"])
            put = transport._outbound._news.put

            def put_late(news: object) -> None:
                monkeypatch.undo()
                time.sleep(outbound.TICK_SECONDS + 0.2)  # by then the loop has looked, and has found nothing to do
                put(news)  # type: ignore[arg-type]

            monkeypatch.setattr(transport._outbound._news, "put", put_late)
        until(lambda: statuses(listener, topic) == ["online", "offline"])
        listener.publish(topic, "", retain=True)


def statuses(listener: Client, topic: str) -> list[str]:
    return [json.loads(payload)["status"] for heard, payload in listener.received if heard == topic and payload]


def break_off(transport: MqttTransport) -> None:
    sock = transport._outbound._client.socket()
    assert isinstance(sock, socket.socket)
    sock.shutdown(socket.SHUT_RDWR)


@needs_broker
def test_broker_that_lost_its_memory_is_told_states_and_unanswered_commands_again(
    broker: Server, farm_pump: tuple[Device, str]
) -> None:
    pump, _ = farm_pump
    old, unanswered, answered = wished(pump, "off", at=-3), wished(pump, "on", at=-2), wished(pump, "off", at=-1)
    with running() as transport:
        transport.on_lead(True)
        for row in (old, unanswered, answered):
            transport.deliver(message_of(row), lambda _: None)
        until(lambda: state_of(answered) == State.SENT)
        commands.acknowledge([said(old, State.APPLIED), said(answered, State.ACKNOWLEDGED)])
        broker.kill()
        (broker.log.parent / "mosquitto.db").unlink(missing_ok=True)
        broker.start()
        with operator(broker) as listener:
            assert listener.subscribe(f"devices/{pump.uuid}/+", qos=2)
            until(lambda: len({topic for topic, _ in listener.received}) == 2, seconds=15)
    heard = {topic: json.loads(payload) for topic, payload in listener.received}
    assert heard[topics.state(str(pump.uuid))]["id"] == str(answered.uuid), "the newest"
    assert heard[topics.commands(str(pump.uuid))]["id"] == str(unanswered.uuid)


@needs_broker
def test_gateway_that_takes_over_tells_states_again_but_commands_nothing(
    broker: Server, farm_pump: tuple[Device, str]
) -> None:
    pump, _ = farm_pump
    row = wished(pump)
    commands.note_sent([row.uuid])
    with operator(broker) as listener:
        assert listener.subscribe(f"devices/{pump.uuid}/+", qos=2)
        with running() as transport:
            transport.on_lead(True)
            until(lambda: listener.received)
        assert [topic for topic, _ in listener.received] == [topics.state(str(pump.uuid))]


@needs_broker
def test_what_has_to_be_told_again_waits_for_a_database_that_is_away(
    broker: Server, farm_pump: tuple[Device, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pump, _ = farm_pump
    newest_states, failures = republish.newest_states, [OperationalError("the server is gone")]

    def away_once() -> list[Message]:
        if failures:
            raise failures.pop()
        return newest_states()

    monkeypatch.setattr(republish, "newest_states", away_once)
    monkeypatch.setattr(outbound, "REPEAT_AGAIN_SECONDS", 0.2)
    row = wished(pump)
    with running() as transport, operator(broker) as listener:
        assert listener.subscribe(topics.state(str(pump.uuid)))
        transport.on_lead(True)
        until(lambda: listener.received)
    assert json.loads(listener.payloads()[0])["id"] == str(row.uuid)
