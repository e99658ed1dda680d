"""What the gateway may expect of every transport, memory included: one contract, run over all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gateway.coap.transport import CoapTransport
from gateway.memory import MemoryTransport
from gateway.mqtt.transport import MqttTransport
from gateway.socketio.transport import SocketIoTransport
from gateway.transport import DeliveryReport, Transport, TransportError
from notifications.messages import Message, Protocol
from tests.gateway_process import new_message
from tests.waiting import until


def no_ingest(payload: bytes, *, credential: Any, protocol: str, uuid: str | None = None, **_: Any) -> Any:
    raise AssertionError("nobody sends telemetry here")


TRANSPORTS: dict[str, Callable[[], Transport]] = {
    "memory": lambda: MemoryTransport(Protocol.SOCKETIO),
    "socketio": lambda: SocketIoTransport(port=0),
    "coap": lambda: CoapTransport(no_ingest, port=0),
    "mqtt": lambda: MqttTransport(no_ingest),
}


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest, empty_redis: None) -> Iterator[Transport]:
    found = TRANSPORTS[request.param]()
    found.start()
    yield found
    found.stop(timeout_seconds=2.0)


def test_the_contract_is_run_over_every_protocol() -> None:
    assert {make().protocol for name, make in TRANSPORTS.items() if name != "memory"} == set(Protocol)


def test_every_message_is_delivered_exactly_once(transport: Transport) -> None:
    reports: list[DeliveryReport] = []
    sent: list[Message] = [
        new_message(device="11111111-1111-4111-8111-111111111111", event="device-state-change"),
        new_message(event="alert"),
        new_message(event="notification", payload={"nested": {"list": [1, 2.5, None, True, "äöü"]}}),
    ]
    for message in sent:
        transport.deliver(message, reports.append)
    until(lambda: len(reports) == 3, seconds=10)
    assert sorted(report.message.id for report in reports) == sorted(message.id for message in sent)


def test_a_transport_may_be_stopped_twice(transport: Transport) -> None:
    transport.stop(timeout_seconds=2.0)
    transport.stop(timeout_seconds=2.0)


@pytest.mark.parametrize("make", TRANSPORTS.values(), ids=TRANSPORTS)
def test_a_transport_that_was_never_started_can_be_stopped(make: Callable[[], Transport]) -> None:
    make().stop(timeout_seconds=1.0)


@pytest.mark.parametrize("make", TRANSPORTS.values(), ids=TRANSPORTS)
def test_a_transport_has_the_methods_of_the_interface(make: Callable[[], Transport]) -> None:
    transport = make()
    for name in ("start", "stop", "deliver"):
        wanted = list(inspect.signature(getattr(Transport, name)).parameters)[1:]
        assert list(inspect.signature(getattr(transport, name)).parameters) == wanted


def test_memory_keeps_the_newest_messages_and_forgets_the_rest() -> None:
    transport = MemoryTransport(Protocol.COAP, keep=2)
    sent = [new_message() for _ in range(3)]
    for message in sent:
        transport.deliver(message, lambda _: None)
    assert list(transport.messages) == sent[1:]


def test_memory_fails_as_it_is_told_and_takes_no_message_then() -> None:
    transport = MemoryTransport(Protocol.COAP)
    transport.failure = TransportError("not now")
    with pytest.raises(TransportError, match="not now"):
        transport.deliver(new_message(), lambda _: None)
    assert not transport.messages


def test_memory_without_acknowledgement_keeps_the_message_to_itself() -> None:
    transport = MemoryTransport(Protocol.MQTT, acknowledging=False)
    reports: list[DeliveryReport] = []
    transport.deliver(new_message(), reports.append)
    assert (len(transport.messages), reports) == (1, [])
