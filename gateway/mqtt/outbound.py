"""Publish messages over MQTT, and know which of them the broker has acknowledged.

The broker may lose in a crash what it has acknowledged, so a gateway that connects again publishes the newest states again, and
the commands that no device has acknowledged. A device knows a repetition by its id.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import zip_longest
from typing import Any
from uuid import UUID, uuid4

import msgspec
import paho.mqtt.client as mqtt
from django.conf import settings
from django.db import DatabaseError, close_old_connections
from django.utils import timezone
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from aemos.lib import metrics
from aemos.lib.rate_limited_log import RateLimitedLog
from gateway.mqtt import republish, topics
from gateway.mqtt.connection import Connection
from gateway.mqtt.reports import Reports
from gateway.mqtt.topics import Address
from gateway.transport import DeliveryReport, OnReport, Status, TransportError
from notifications import messages
from notifications.messages import Message

log = logging.getLogger(__name__)
# Publications that the broker has not acknowledged, unless it allows fewer: Mosquitto allows 20 as it comes.
MAXIMUM_IN_FLIGHT = 500
# Messages that have not been delivered yet; with the broker away the next one is refused at once, otherwise after a while.
MAXIMUM_WAITING = 1_000
WAIT_FOR_ROOM_SECONDS = 5.0
# A publication that the broker refused is tried again: its reasons, such as a quota, pass.
REFUSED_AGAIN_SECONDS = 5.0
# What has to be published again is read again when the database was unavailable.
REPEAT_AGAIN_SECONDS = 2.0
TICK_SECONDS = 1.0

_encode = msgspec.json.Encoder().encode


@dataclass(slots=True, eq=False)
class _Delivery:
    """A message on its way: how many of its topics the broker has not acknowledged, what follows when that is none, and how
    often the broker refused one of them. `status` and `reason` are what will be reported.
    """

    message_id: UUID
    unacknowledged: int
    finish: Callable[[_Delivery], None]
    refusals: int = 0
    status: Status = Status.DELIVERED
    reason: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class _Publication:
    """One message, or the bytes of what is none, on one topic. The bytes of a message are made when it is sent, because a
    snapshot says what was sent before it."""

    delivery: _Delivery
    address: Address
    content: Message | bytes

    def seconds_left(self) -> float | None:
        """Until its deadline; None without one."""
        deadline = self.address.deadline
        return (deadline - timezone.now()).total_seconds() if deadline else None


@dataclass(frozen=True, slots=True)
class _Acknowledgement:
    """What the broker said to packet `mid`; `problem` is empty when it took it."""

    mid: int
    problem: str


class _Lost:
    """The connection ended: what is in flight has to be published again."""


class _Ready:
    """There is a connection; only now anything may be published over it."""


class _Lead:
    """This gateway begins to deliver."""


class _Stop:
    """Nothing of ours comes after it: what came before is finished, then the loop ends."""


class Outbound:
    """One loop owns all bookkeeping; deliver and paho's thread only put things into its queue.

    So the acknowledgement of a packet cannot overtake the note that it was sent, and nothing of ours is ever locked while
    paho holds its own locks.
    """

    def __init__(self, reports: Reports) -> None:
        self.counts: Counter[str] = Counter()
        self._reports = reports
        self._leads = False
        self._is_open = False
        # How often there was a connection, since the commands under way were published again: once it broke, they may be lost.
        self._connections = 0
        self._repeat_at = float("inf")
        self._news: queue.Queue[_Publication | _Acknowledgement | _Lost | _Ready | _Lead | _Stop | None] = queue.Queue()
        self._room = threading.BoundedSemaphore(MAXIMUM_WAITING)
        self._waiting: deque[_Publication] = deque()
        self._in_flight: dict[int, _Publication] = {}
        # By topic, with the time of the next attempt: what follows on the topic waits behind what was refused.
        self._refused: dict[str, tuple[float, deque[_Publication]]] = {}
        self._stopping = threading.Event()
        self._is_last = False
        self._finished = threading.Event()
        self._thread: threading.Thread | None = None
        self._log = RateLimitedLog(log)
        self._snapshots = republish.Snapshots()
        # Not a lasting session: with one, paho would finish a QoS 2 hand-over that the broker may have forgotten, and the
        # command would be lost. This way it is sent again.
        self._connection = Connection(
            "notifications",
            client_id=f"aemos-notifications-{uuid4().hex[:16]}",
            on_ready=self._on_ready,
            on_lost=self._on_lost,
        )
        self._client = self._connection.client
        self._client.will_set(topics.gateway_status(settings.GATEWAY_NAME), _gateway_status("offline"), 1, retain=True)
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
        if self._connection.connected and not self._stopping.is_set():
            self._say("offline")
        self._stopping.set()
        self._news.put(_Stop())
        if self._connection.connected:
            self._finished.wait(timeout_seconds)
        self._connection.stop()
        self._news.put(None)
        if self._thread:
            self._thread.join(max(deadline - time.monotonic(), 0.1))

    def deliver(self, message: Message, on_report: OnReport) -> None:
        if self._stopping.is_set():
            raise TransportError("the MQTT transport is stopping")
        if not self._room.acquire(timeout=WAIT_FOR_ROOM_SECONDS if self.connected else 0):
            raise TransportError(f"{MAXIMUM_WAITING} messages wait for the MQTT broker")
        for publication in _publications(message, topics.addresses(message), partial(self._finish, message, on_report)):
            self._news.put(publication)

    def on_lead(self, leads: bool) -> None:
        self._leads = leads
        if leads:
            self._news.put(_Lead())

    def _say(self, status: str) -> None:
        """Publishes whether this gateway is online; retained, and `offline` is its last will."""
        address = Address(topics.gateway_status(settings.GATEWAY_NAME), 1, retain=True)
        self._news.put(_Publication(_Delivery(uuid4(), 1, _said), address, _gateway_status(status)))

    def _on_ready(self) -> None:
        self._news.put(_Ready())
        self._say("online")

    def _on_lost(self) -> None:
        # paho would send it again by itself, commands also after their deadline, and behind what is older.
        self._client.drop_out_messages()
        self._news.put(_Lost())

    def _on_publish(self, _client: mqtt.Client, _data: Any, mid: int, reason: ReasonCode, _properties: Any) -> None:
        self._news.put(_Acknowledgement(mid, str(reason) if reason.is_failure else ""))

    def _run(self) -> None:
        while not self._finished.is_set():
            try:
                self._step()
            except Exception:  # process loop: messages would wait for ever without a word
                self.counts["failed"] += 1
                metrics.GATEWAY_FAILURES.labels("mqtt").inc()
                log.exception("Publishing over MQTT failed and is tried again")
                self._stopping.wait(TICK_SECONDS)
            finally:
                # Outside a request nobody else would give it back, nor leave one that broke.
                close_old_connections()
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
        elif isinstance(news, _Lost):
            self._is_open = False
            self._waiting.extendleft(reversed(self._in_flight.values()))
            self._in_flight.clear()
        elif isinstance(news, _Ready):
            self._is_open = True
            self._connections += 1
        elif isinstance(news, _Stop):
            self._is_last = True
        if isinstance(news, _Ready | _Lead):
            self._repeat_at = time.monotonic()
        if self._is_open and self._leads and self._repeat_at <= time.monotonic():
            self._repeat()
        self._try_the_refused_again()
        in_flight = min(MAXIMUM_IN_FLIGHT, self._connection.receive_maximum)
        while self._is_open and self._waiting and len(self._in_flight) < in_flight and self._publish(self._waiting[0]):
            self._waiting.popleft()
        if self._is_last and not (self._waiting or self._in_flight or self._refused):
            self._finished.set()

    def _try_the_refused_again(self) -> None:
        now = time.monotonic()
        for topic in [topic for topic, (at, _) in self._refused.items() if at <= now]:
            self._waiting.extendleft(reversed(self._refused.pop(topic)[1]))

    def _repeat(self) -> None:
        """Publishes the newest states again, and after a lost connection first the commands that no device has acknowledged.

        Read here, when its turn has come: what was published before is in the database, what comes later is newer.
        """
        try:
            self._reports.flush()
            states, to_clear = republish.newest_states(), republish.topics_to_clear()
            commands = republish.commands_under_way() if self._connections > 1 else []
        except DatabaseError as error:
            self._log.log("repeat", logging.WARNING, "States wait to be published again: %s", error)
            self._repeat_at = time.monotonic() + REPEAT_AGAIN_SECONDS
            return
        self._connections, self._repeat_at = 1, float("inf")
        first = [each for message in commands for each in _again(message, _commands_of(message))]
        others = [each for each in self._waiting if each.delivery.finish is not _repeated]
        cleared = [
            _Publication(_Delivery(uuid4(), 1, _repeated), Address(topic, 1, retain=True), b"") for topic in to_clear
        ]
        self._waiting = deque([*first, *others, *cleared, *_states_again(states)])

    def _publish(self, publication: _Publication) -> bool:
        """False when paho cannot take it now."""
        address, seconds = publication.address, publication.seconds_left()
        if seconds is not None and seconds <= 0:
            self.counts["expired"] += 1
            if not address.is_command:  # that a command expires is noted by the scheduler
                publication.delivery.status = Status.EXPIRED
            self._done_with(publication)
            return True
        if address.topic in self._refused:
            self._refused[address.topic][1].append(publication)
            return True
        properties = _properties(publication.content, seconds)
        sent = self._client.publish(
            address.topic, self._body(publication), qos=address.qos, retain=address.retain, properties=properties
        )
        if sent.rc == mqtt.MQTT_ERR_QUEUE_SIZE:  # after 65,535 packets: the number is that of one still in flight
            return False
        self._in_flight[sent.mid] = publication
        return True

    def _body(self, publication: _Publication) -> bytes:
        content = publication.content
        if isinstance(content, bytes):
            return content
        if publication.address.retain:
            self._snapshots.note(content)
        return (
            _encode(self._snapshots.body(content))
            if publication.address.has_snapshot
            else _encode(messages.body(content))
        )

    def _acknowledged(self, acknowledgement: _Acknowledgement) -> None:
        publication = self._in_flight.pop(acknowledgement.mid, None)
        if publication is None:
            return
        if acknowledgement.problem:
            self._was_refused(publication, acknowledgement.problem)
            return
        self.counts["published"] += 1
        if publication.address.is_command:
            self._reports.sent(publication.delivery.message_id)
        self._done_with(publication)

    def _was_refused(self, publication: _Publication, problem: str) -> None:
        """By a broker that is there: after some attempts, which are those of all its topics together, it is given up."""
        self.counts["refused"] += 1
        topic, delivery = publication.address.topic, publication.delivery
        self._log.log("refused", logging.ERROR, "The MQTT broker refused a message to %s: %s", topic, problem)
        delivery.refusals += 1
        if delivery.refusals >= settings.NOTIFICATION_MAX_ATTEMPTS:
            delivery.status, delivery.reason = Status.REFUSED, f"the broker refused it on {topic}: {problem}"
            self._done_with(publication)
            return
        again_at = time.monotonic() + REFUSED_AGAIN_SECONDS
        self._refused.setdefault(topic, (again_at, deque()))[1].append(publication)

    def _done_with(self, publication: _Publication) -> None:
        delivery = publication.delivery
        delivery.unacknowledged -= 1
        if not delivery.unacknowledged:
            delivery.finish(delivery)

    def _finish(self, message: Message, on_report: OnReport, delivery: _Delivery) -> None:
        self._room.release()
        try:
            on_report(DeliveryReport(message, delivery.status, delivery.reason))
        except Exception:  # per message: the next one is not to blame
            self.counts["callback-failed"] += 1
            metrics.GATEWAY_FAILURES.labels("mqtt").inc()
            log.exception("Message %s was delivered over MQTT, but could not be noted as such", message.id)


def _properties(content: Message | bytes, seconds: float | None) -> Properties | None:
    trace = content.trace if isinstance(content, Message) else ""
    if trace:
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.UserProperty = ("traceparent", trace)
        if seconds is not None:
            properties.MessageExpiryInterval = math.ceil(seconds)
        return properties
    return _expiry(math.ceil(seconds)) if seconds is not None else None


@lru_cache(maxsize=256)
def _expiry(seconds: int) -> Properties:
    """How long the broker may keep a message for a device that is away. Kept, because paho builds tables for each anew."""
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.MessageExpiryInterval = seconds
    return properties


def _publications(
    message: Message, addresses: Sequence[Address], finish: Callable[[_Delivery], None]
) -> list[_Publication]:
    delivery = _Delivery(message.id, len(addresses), finish)
    return [_Publication(delivery, address, message) for address in addresses]


def _commands_of(message: Message) -> list[Address]:
    return [address for address in topics.addresses(message) if address.is_command]


def _states_again(states: Sequence[Message]) -> list[_Publication]:
    """Each on its own topic, and the newest of a device on that with the snapshot, which needs those before it."""
    found = []
    for message, following in zip_longest(states, states[1:]):
        is_newest = following is None or following.device_uuid != message.device_uuid
        retained = [address for address in topics.addresses(message) if address.retain]
        found += _again(message, [address for address in retained if is_newest or not address.has_snapshot])
    return found


def _again(message: Message, addresses: Sequence[Address]) -> list[_Publication]:
    return _publications(message, addresses, _repeated)


def _said(_: _Delivery) -> None:
    """What a gateway says of itself: nobody waits for it."""


def _repeated(_: _Delivery) -> None:
    """What is repeated: nobody waits for it, and a later repetition takes its place."""


def _gateway_status(status: str) -> bytes:
    return _encode({"gateway": settings.GATEWAY_NAME, "status": status})
