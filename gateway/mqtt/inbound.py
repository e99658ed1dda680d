"""Receive what sensors and devices publish over MQTT, hand it on, and acknowledge it once the next store has it.

Telemetry and reports (gateway.mqtt.reports) are two channels with a session each, so that one never waits for the other's store.
The broker holds back what is not acknowledged, and sends it again after a lost connection. One gateway at a time listens, in
a session that lasts: Mosquitto (2.0) gives the messages of a shared subscription to members that are away, too, and drops
them when such a session ends, so that sharing would lose messages whenever a gateway goes. What waits in the broker is
bounded by its own max_queued_messages; Mosquitto drops what is beyond, and says so only in its log.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

import paho.mqtt.client as mqtt
from django.conf import settings
from django.db import InterfaceError, OperationalError
from django.db import connection as database
from paho.mqtt.subscribeoptions import SubscribeOptions

from aemos.lib import keys, metrics
from aemos.lib.leader import Leader
from aemos.lib.rate_limited_log import RateLimitedLog
from devices import catalogue
from devices.exceptions import Overloaded, Refusal
from gateway.mqtt import topics
from gateway.mqtt.connection import Connection, Session
from gateway.mqtt.receiving import Publication
from gateway.mqtt.sender_queues import Arrival, SenderQueues
from gateway.transport import Ingest, Pending
from notifications.messages import Protocol

log = logging.getLogger(__name__)
# So many messages at a time may be unacknowledged, whether they are under way or wait for another attempt. Mosquitto 2.0.11 sends
# more, up to all that it holds, and then looks for each acknowledgement through all of them, which took most of its time: so no
# more are taken up at a time, in the order of their arrival.
RECEIVE_MAXIMUM = 1_000
# Twice of what telemetry may take, so that one a little too large is refused and recorded; MQTT allows 256 MB, and what
# is larger than this the broker drops.
MAXIMUM_PACKET_BYTES = 2 * 1024 * 1024
# QoS 0 cannot be held back by the broker: beyond this it is dropped, as its sender allows, and counted.
MAXIMUM_HELD = 5_000
MAXIMUM_UNDER_WAY = 500
# Messages of one sender that are written to the journal together.
TELEMETRY_TOGETHER = 50
# Together in payloads. Beyond it nothing is read from the connection for a while, so that the broker keeps what follows; not for
# long at a time, because the connection has to say that it lives.
MAXIMUM_HELD_BYTES = 64 * 1024 * 1024
WAIT_FOR_ROOM_SECONDS = 5.0
# How long the broker keeps messages while no gateway runs.
SESSION_SECONDS = 7 * 24 * 3600
# An overloaded system gets so long to recover; then the message is recorded for the admin and acknowledged, because what is
# held back fills the window through which urgent messages have to come, too.
HOLD_SECONDS = 30.0
TICK_SECONDS = 1.0
FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.5, 30.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """What one session listens to: topics, each with what is to become of its retained messages, and who may listen."""

    name: str
    leader_key: str
    topics: Mapping[str, int]


# Retained telemetry would be old telemetry, received again at every connection.
TELEMETRY = Channel(
    name="telemetry",
    leader_key=keys.MQTT_TELEMETRY_LEADER,
    topics={topics.DATASTREAMS: SubscribeOptions.RETAIN_DO_NOT_SEND},
)


class Inbound:
    """Takes the messages of a channel from `start` to `stop`, while this process is the one that listens.

    `take` is called from one thread, in each sender's order; it and `wait` of what it gives may raise devices.exceptions.Refusal,
    which ends the message, and anything else, after which it is tried again. Up to `together` messages of a sender are taken
    without a wait in between: then `take` is given what it gave for the one before, and where that fails, this is to fail, too.
    `on_tick` is called about once a second, also while another process listens. `counts` of messages: accepted, refused,
    overloaded, failed, dropped, redelivered (accepted before a lost connection). `held_bytes`: payloads of those that are not
    done with.
    """

    def __init__(
        self,
        channel: Channel,
        take: Callable[[Arrival, Pending | None], Pending],
        *,
        together: int = 1,
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._channel = channel
        self._take = take
        self._together = together
        self._on_tick = on_tick
        self._leader = Leader(channel.leader_key)
        self._leads = False
        self._next_tick = float("-inf")
        self._connections = 0
        self._news: queue.SimpleQueue[Arrival | None] = queue.SimpleQueue()
        self._sender_queues = SenderQueues()
        # Each is written by one thread alone, so that neither needs a lock.
        self._received_bytes = self._done_bytes = 0
        self._room = threading.Condition()
        self._waits_for_room = False
        self._to_acknowledge: list[Arrival] = []
        self._under_way: deque[tuple[Arrival, Pending]] = deque()
        # By the broker's number the newest that were accepted, as many as may be unacknowledged.
        self._accepted: dict[int, tuple[int, int]] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._log = RateLimitedLog(log)
        # Held while deciding whether a connection is still the one that a message came over.
        self._lock = threading.Lock()
        self._connection = Connection(
            channel.name,
            client_id=session_id(channel.name),
            session=Session(
                expiry_seconds=SESSION_SECONDS, receive_maximum=RECEIVE_MAXIMUM, maximum_bytes=MAXIMUM_PACKET_BYTES
            ),
            on_ready=self._on_ready,
            on_lost=self._on_lost,
        )
        self._connection.client.on_message = self._connection.guarded(self._on_message)

    @property
    def held_bytes(self) -> int:
        return self._received_bytes - self._done_bytes

    @property
    def connected(self) -> bool:
        """Whether this process listens; of several gateways only one does."""
        return self._connection.connected

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{self._channel.name}", daemon=True)
        self._thread.start()

    def ask_to_stop(self) -> None:
        self._stopping.set()
        self._news.put(None)
        with self._room:
            self._room.notify_all()

    def stop(self, *, timeout_seconds: float) -> None:
        """Waits for what is under way, acknowledges it and leaves; the broker keeps the rest for the next to listen."""
        self.ask_to_stop()
        if self._thread:
            self._thread.join(timeout_seconds)
        self._resign()

    def _on_ready(self) -> None:
        # At every connection: the broker may have lost the session.
        for topic, retain_handling in self._channel.topics.items():
            options = SubscribeOptions(qos=1, retainHandling=retain_handling)
            self._connection.client.subscribe(topic, options=options)

    def _on_lost(self) -> None:
        with self._lock:
            self._connections += 1

    def _on_message(self, _client: mqtt.Client, _data: Any, message: Publication) -> None:
        size = len(message.payload)
        if message.qos == 0 and self._is_full(size):
            self.counts["dropped"] += 1
            self._log.log("dropped", logging.WARNING, "Dropped a message of %s: QoS 0, too many wait", message.topic)
            return
        self._make_room(size)
        arrival = Arrival(
            topic=message.topic,
            payload=message.payload,
            mid=message.mid,
            qos=message.qos,
            connection=self._connections,
            retained=message.retain,
            dup=message.dup,
            trace=message.trace,
        )
        self._news.put(arrival)

    def _is_full(self, size: int) -> bool:
        too_many = self._news.qsize() + len(self._sender_queues) >= MAXIMUM_HELD
        return too_many or not self._has_room(size)

    def _has_room(self, size: int) -> bool:
        return self.held_bytes + size <= MAXIMUM_HELD_BYTES

    def _make_room(self, size: int) -> None:
        if not self._has_room(size):
            what = "%s waits in the broker: %d bytes are held"
            self._log.log("full", logging.WARNING, what, self._channel.name, self.held_bytes)
            with self._room:
                self._waits_for_room = True
                self._room.wait_for(lambda: self._has_room(size) or self._stopping.is_set(), WAIT_FOR_ROOM_SECONDS)
                self._waits_for_room = False
        self._received_bytes += size

    def _forget(self, arrival: Arrival) -> None:
        self._sender_queues.done(arrival)
        self._done_bytes += len(arrival.payload)
        if self._waits_for_room:
            with self._room:
                self._room.notify_all()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._step()
            except Exception:  # process loop: the channel would stand still without a word
                self.counts["failed"] += 1
                metrics.GATEWAY_FAILURES.labels("mqtt").inc()
                log.exception("Receiving %s over MQTT failed and is tried again", self._channel.name)
                self._stopping.wait(TICK_SECONDS)
        self._settle()
        self._acknowledge()
        self._on_tick()
        database.close()

    def _step(self) -> None:
        if time.monotonic() >= self._next_tick:
            self._tick()
        self._take_arrivals()
        while len(self._under_way) < MAXIMUM_UNDER_WAY:
            arrivals = self._sender_queues.next(time.monotonic(), self._together)
            if not arrivals:
                break
            self._submit(arrivals)
        self._settle()
        self._acknowledge()

    def _take_arrivals(self) -> None:
        """What is there and has room; waits for the first only if there is nothing else to do."""
        seconds = self._sender_queues.seconds_until_next(time.monotonic(), longest=TICK_SECONDS)
        room = RECEIVE_MAXIMUM - len(self._sender_queues)
        if room <= 0:
            self._stopping.wait(seconds)
            return
        try:
            for _ in range(room):
                arrival = self._news.get(block=seconds > 0, timeout=seconds)
                if arrival is not None:
                    self._sender_queues.add(arrival)
                seconds = 0.0
        except queue.Empty:
            return

    def _submit(self, arrivals: Sequence[Arrival]) -> None:
        """Of one sender; those after one that is to be tried again are tried after it."""
        before: Pending | None = None
        for arrival in arrivals:
            if self._sender_queues.is_held(arrival.sender):
                self._sender_queues.unused(arrival)
            elif arrival.qos and arrival.connection != self._connections:
                self._forget(arrival)  # the broker sends it again
            elif arrival.dup and self._was_accepted(arrival):
                self._finish(arrival, "redelivered")
            elif pending := self._attempt(arrival, partial(self._take, arrival, before)):
                self._under_way.append((arrival, pending))
                before = pending

    def _settle(self) -> None:
        """Waits for what is under way. All of it, so that no sender has a second turn before all others had one."""
        while self._under_way:
            arrival, pending = self._under_way.popleft()
            receipt = self._attempt(arrival, pending.wait)
            if receipt is not None:
                self._finish(arrival, "accepted")

    def _attempt(self, arrival: Arrival, step: Callable[[], T]) -> T | None:
        """What `step` gives; None when it was refused or failed, with what follows from that seen to."""
        try:
            return step()
        except Overloaded as refusal:
            if refusal.recorded:
                self._log.log("refused", logging.WARNING, "Gave up on a message of %s: %s", arrival.topic, refusal)
                self._finish(arrival, "refused")
                return None
            self.counts["overloaded"] += 1
            self._log.log("overloaded", logging.WARNING, "%s has to wait: %s", arrival.topic, refusal)
            self._sender_queues.again(
                arrival, at=time.monotonic() + min(max(refusal.retry_after, 0.1), LONGEST_BACKOFF_SECONDS)
            )
        except Refusal as refusal:
            self._log.log(refusal.reason, logging.WARNING, "Refused a message of %s: %s", arrival.topic, refusal)
            self._finish(arrival, "refused")
        except (OperationalError, InterfaceError) as error:
            self.counts["failed"] += 1
            self._log.log("database", logging.WARNING, "%s waits for the database: %s", arrival.topic, error)
            self._sender_queues.again(arrival, at=time.monotonic() + _backoff_seconds(arrival.attempts))
        except Exception:  # noqa: BLE001  per message: neither lost nor in the way of others, tried until it is understood
            self.counts["failed"] += 1
            metrics.GATEWAY_FAILURES.labels("mqtt").inc()
            self._log.log("failed", logging.ERROR, "A message of %s cannot be taken", arrival.topic, trace=True)
            self._sender_queues.again(arrival, at=time.monotonic() + _backoff_seconds(arrival.attempts))
        arrival.attempts += 1
        return None

    def _was_accepted(self, arrival: Arrival) -> bool:
        """Whether it came over the connection before this one, and only its acknowledgement did not arrive."""
        return self._accepted.get(arrival.mid) == (arrival.connection - 1, hash((arrival.topic, arrival.payload)))

    def _finish(self, arrival: Arrival, result: str) -> None:
        self.counts[result] += 1
        if result in ("accepted", "redelivered"):
            self._accepted.pop(arrival.mid, None)
            self._accepted[arrival.mid] = (arrival.connection, hash((arrival.topic, arrival.payload)))
            if len(self._accepted) > RECEIVE_MAXIMUM:
                del self._accepted[next(iter(self._accepted))]
        self._forget(arrival)
        if arrival.qos:
            self._to_acknowledge.append(arrival)

    def _acknowledge(self) -> None:
        """All that was finished since the last time, together."""
        if not self._to_acknowledge:
            return
        # In the order of their arrival: Mosquitto looks for each through all that it sent before it.
        finished, self._to_acknowledge = sorted(self._to_acknowledge, key=attrgetter("held_since")), []
        with self._lock:
            # Over a later connection the number could be that of another message, which would then be lost.
            if mids := [arrival.mid for arrival in finished if arrival.connection == self._connections]:
                self._connection.acknowledge(mids)

    def _tick(self) -> None:
        self._next_tick = time.monotonic() + TICK_SECONDS
        self._on_tick()
        database.close()  # outside a request nobody else would give it back
        leads = self._leader.leads_or(self._leads)  # without Redis nobody else can take over, either
        if leads and self._leads:
            self._connection.revive()
        elif leads:
            self._connection.start()
        elif self._leads:
            log.info("Another gateway listens to %s over MQTT", self._channel.name)
            self._connection.stop()
        self._leads = leads

    def _resign(self) -> None:
        if not self._leads:
            return
        self._connection.stop()
        self._leads = False
        self._leader.resign()


class Telemetry:
    """Messages of `devices/{uuid}/datastream` in, calls of ingest out. `on_device` hears the uuid of every device that speaks."""

    def __init__(self, ingest: Ingest, *, on_device: Callable[[str], None] = lambda _: None) -> None:
        self._ingest = ingest
        self._on_device = on_device

    def take(self, arrival: Arrival, before: Pending | None) -> Pending:
        uuid = topics.originator_of(arrival.topic)
        credential = catalogue.shared().credential_of(uuid) if uuid else None
        if credential is not None and credential.originator.source_type == "device":
            self._on_device(credential.originator.uuid)
        hold = time.monotonic() - arrival.held_since < HOLD_SECONDS
        return self._ingest(
            arrival.payload,
            credential=credential,
            protocol=Protocol.MQTT.value,
            uuid=uuid,
            hold=hold,
            after=before,
            trace=arrival.trace,
        )


def session_id(name: str) -> str:
    """The client id of a channel's one session: always the same, and not for a device to guess and take over."""
    key = hashlib.blake2b(settings.DEVICE_TOKEN_KEY.encode(), digest_size=10, person=b"mqtt-session").hexdigest()
    return f"aemos-{name}-{key}"


def _backoff_seconds(attempts: int) -> float:
    doubled = min(FIRST_BACKOFF_SECONDS * 2.0 ** min(attempts, 20), LONGEST_BACKOFF_SECONDS)
    return doubled * random.uniform(0.5, 1.0)  # noqa: S311  spreads the load, guards nothing
