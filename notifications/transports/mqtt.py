"""The MQTT transport: messages in, publications that the broker has acknowledged out; and telemetry in (mqtt_inbound)."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt.reasoncodes import ReasonCode

from notifications import messages, topics
from notifications.broker import Connection, Sparingly
from notifications.messages import Message
from notifications.topics import Address
from notifications.transports.base import Delivered, Ingest, TransportError
from notifications.transports.mqtt_inbound import Inbound

log = logging.getLogger(__name__)
# Publications that the broker has not acknowledged, unless it allows fewer: Mosquitto allows 20 as it comes.
MAXIMUM_IN_FLIGHT = 500
# Messages that have not been delivered yet; with the broker away the next one is refused at once, otherwise after a while.
MAXIMUM_WAITING = 1_000
WAIT_FOR_ROOM_SECONDS = 5.0
# A publication that the broker refused is tried again: its reasons, such as a quota, pass.
REFUSED_AGAIN_SECONDS = 5.0
TICK_SECONDS = 1.0

_encode = msgspec.json.Encoder().encode


class MqttTransport:
    """`counts`: published, refused, callback-failed; those of the telemetry that comes in are in `inbound.counts`.

    A message counts as delivered when the broker has acknowledged it on each of its topics. It may reach a device twice,
    after a lost connection for example: the "id" in the body says that it is the same.
    """

    protocol = messages.Protocol.MQTT

    def __init__(self, ingest: Ingest) -> None:
        self.inbound = Inbound(ingest)
        self._outbound = Outbound()

    @property
    def connected(self) -> bool:
        """Whether messages can be published now."""
        return self._outbound.connected

    @property
    def counts(self) -> Counter[str]:
        return self._outbound.counts

    def start(self) -> None:
        """Begins to connect and returns: a broker that is away is waited for."""
        self._outbound.start()
        self.inbound.start()

    def stop(self, *, timeout_seconds: float) -> None:
        """Takes nothing new, finishes what is in flight within the time, disconnects. The rest comes again later."""
        deadline = time.monotonic() + timeout_seconds
        self.inbound.ask_to_stop()
        self._outbound.stop(timeout_seconds=timeout_seconds)
        self.inbound.stop(timeout_seconds=max(deadline - time.monotonic(), 0.1))

    def deliver(self, message: Message, delivered: Delivered) -> None:
        """Hands the message to the broker; `delivered` is called, from another thread, when the broker has all of it.

        Waits while the broker is slow; TransportError when too many messages wait, at once if the broker is away.
        """
        self._outbound.deliver(message, delivered)


@dataclass(slots=True, eq=False)
class _Delivery:
    """A message on its way: how many of its topics the broker has not acknowledged."""

    message: Message
    delivered: Delivered
    unacknowledged: int


@dataclass(frozen=True, slots=True, eq=False)
class _Publication:
    """One message on one topic."""

    delivery: _Delivery
    address: Address
    body: bytes


@dataclass(frozen=True, slots=True)
class _Acknowledgement:
    """What the broker said to packet `mid`; `problem` is empty when it took it."""

    mid: int
    problem: str


class Outbound:
    """One loop owns all bookkeeping; deliver and paho's thread only put things into its queue.

    So the acknowledgement of a packet cannot overtake the note that it was sent, and nothing of ours is ever locked while
    paho holds its own locks.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._news: queue.Queue[_Publication | _Acknowledgement | None] = queue.Queue()
        self._room = threading.BoundedSemaphore(MAXIMUM_WAITING)
        self._waiting: deque[_Publication] = deque()
        self._in_flight: dict[int, _Publication] = {}
        self._refused: deque[tuple[float, _Publication]] = deque()
        self._idle = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._sparingly = Sparingly(log)
        # Not a lasting session: with one, paho would finish a QoS 2 hand-over that the broker may have forgotten, and the
        # command would be lost. This way it is sent again.
        self._connection = Connection("notifications", client_id=f"aemos-notifications-{uuid4().hex[:16]}")
        self._client = self._connection.client
        self._client.max_inflight_messages = 0  # the limit is kept here
        self._client.on_publish = self._connection.guarded(self._on_publish)

    @property
    def connected(self) -> bool:
        return self._connection.connected

    def start(self) -> None:
        self._connection.start()
        self._thread = threading.Thread(target=self._run, name="mqtt-outbound", daemon=True)
        self._thread.start()

    def stop(self, *, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        self._stopping.set()
        self._news.put(None)
        if self._connection.connected:
            self._idle.wait(timeout_seconds)
        self._connection.stop()
        self._news.put(None)
        if self._thread:
            self._thread.join(max(deadline - time.monotonic(), 0.1))

    def deliver(self, message: Message, delivered: Delivered) -> None:
        if self._stopping.is_set():
            raise TransportError("the MQTT transport is stopping")
        if not self._room.acquire(timeout=WAIT_FOR_ROOM_SECONDS if self.connected else 0):
            raise TransportError(f"{MAXIMUM_WAITING} messages wait for the MQTT broker")
        addresses = topics.addresses(message)
        delivery = _Delivery(message, delivered, len(addresses))
        body = _encode(messages.body(message))
        self._idle.clear()
        for address in addresses:
            self._news.put(_Publication(delivery, address, body))

    def _on_publish(self, _client: mqtt.Client, _data: Any, mid: int, reason: ReasonCode, _properties: Any) -> None:
        self._news.put(_Acknowledgement(mid, str(reason) if reason.is_failure else ""))

    def _run(self) -> None:
        while not (self._stopping.is_set() and self._idle.is_set()):
            try:
                self._step()
            except Exception:  # process loop: messages would wait for ever without a word
                self.counts["failed"] += 1
                log.exception("Publishing over MQTT failed and goes on")
                self._stopping.wait(TICK_SECONDS)
            if self._stopping.is_set() and not self.connected:
                return

    def _step(self) -> None:
        try:
            news = self._news.get(timeout=TICK_SECONDS)
        except queue.Empty:
            news = None
            self._connection.revive()
        if isinstance(news, _Publication):
            self._waiting.append(news)
        elif isinstance(news, _Acknowledgement):
            self._acknowledged(news)
        while self._refused and self._refused[0][0] <= time.monotonic():
            self._waiting.append(self._refused.popleft()[1])
        in_flight = min(MAXIMUM_IN_FLIGHT, self._connection.receive_maximum)
        while self._waiting and len(self._in_flight) < in_flight and self._publish(self._waiting[0]):
            self._waiting.popleft()
        if not (self._waiting or self._in_flight or self._refused or self._news.qsize()):
            self._idle.set()

    def _publish(self, publication: _Publication) -> bool:
        """False when paho cannot take it now. Without a connection paho takes it, too, and sends it once there is one."""
        address = publication.address
        sent = self._client.publish(address.topic, publication.body, qos=address.qos, retain=address.retain)
        if sent.rc == mqtt.MQTT_ERR_QUEUE_SIZE:  # after 65,535 packets: the number is that of one still in flight
            return False
        self._in_flight[sent.mid] = publication
        return True

    def _acknowledged(self, acknowledgement: _Acknowledgement) -> None:
        publication = self._in_flight.pop(acknowledgement.mid, None)
        if publication is None:
            return
        if acknowledgement.problem:
            self.counts["refused"] += 1
            topic, problem = publication.address.topic, acknowledgement.problem
            self._sparingly.say("refused", logging.ERROR, "The MQTT broker refused a message to %s: %s", topic, problem)
            self._refused.append((time.monotonic() + REFUSED_AGAIN_SECONDS, publication))
            return
        self.counts["published"] += 1
        publication.delivery.unacknowledged -= 1
        if not publication.delivery.unacknowledged:
            self._finish(publication.delivery)

    def _finish(self, delivery: _Delivery) -> None:
        self._room.release()
        try:
            delivery.delivered(delivery.message)
        except Exception:  # per message: the next one is not to blame
            self.counts["callback-failed"] += 1
            log.exception("Message %s was delivered over MQTT, but could not be noted as such", delivery.message.id)
