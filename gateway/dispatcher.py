"""The gateway: entries of the notification stream in, messages in the hands of every transport and their deliveries out.

Each transport is served by a greenlet of its own that reads the stream at its own pace, so that one protocol's failure
or slowness never delays another. It reads ahead of what it delivers, so that an urgent message goes out at once.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gevent
import msgspec
from django.conf import settings
from django.db import DatabaseError
from gevent.event import Event
from redis.exceptions import RedisError

from aemos.lib import keys, metrics, redis
from aemos.lib.leader import Leader
from gateway.backlog import Backlog, Item
from gateway.cursors import READ_COUNT, Cursor, Entry, FanOutCursor, GroupCursor
from gateway.deliveries import Deliveries, Outcome, State
from gateway.transport import Transport, TransportError
from notifications import messages
from notifications.messages import Message, Protocol

log = logging.getLogger(__name__)
# Delivered by one gateway among all, kept in the stream until the transport says so.
SHARED_PROTOCOLS = frozenset({Protocol.MQTT})
# Its clients resume at a position of the stream.
IN_ORDER = frozenset({Protocol.SOCKETIO})
# A transport that cannot deliver now is asked again after 0.1 s, doubled up to 5 s, times a random 0.5..1.
FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.1, 5.0
# Read but not delivered, for each transport; what is over it waits in the stream and cannot overtake.
MAXIMUM_AHEAD = 10_000
MAXIMUM_AHEAD_BYTES = 16 * 1024 * 1024
# How often the stream is looked at while there is something to deliver; at once when the last look did not bring all.
LOOK_SECONDS = 0.05
# Then the others have their turn: acknowledgements of the broker, clients, the other transports. A pause of no time at all
# would let transports take turns with each other alone, and the sockets would wait.
SLICE_SECONDS, PAUSE_SECONDS = 0.003, 0.001
# Redis is asked again at most this long after it came back.
LONGEST_RECONNECT_SECONDS = 2.0
RESTART_SECONDS = 1.0
TOO_LATE = "it could not be sent in time"
# A loop that ends when the event it is given is set; gevent's and threading's events are the same to it.
Companion = Callable[[Any], None]


class StartError(Exception):
    """A transport could not take its address; `error` says why."""

    def __init__(self, protocol: Protocol, error: OSError) -> None:
        super().__init__(f"{protocol}: {error}")
        self.protocol = protocol
        self.error = error


@dataclass(slots=True, eq=False)
class Lane:
    """One transport, its position in the stream, what was read and is not delivered, and counts of what became of it.

    `current` is under way. It and the backlog outlive the greenlet that delivers them.
    """

    transport: Transport
    cursor: Cursor
    backlog: Backlog
    current: Item | None = None
    counts: Counter[str] = field(default_factory=Counter)
    is_open: bool = True
    failures: int = 0
    look_at: float = 0.0

    @property
    def protocol(self) -> Protocol:
        return self.transport.protocol

    @property
    def is_shared(self) -> bool:
        return isinstance(self.cursor, GroupCursor)


class Gateway:
    """Serves its transports from `start` to `stop`; `companions` are loops that run and are watched beside them.

    `counts` of each protocol: delivered, retried, failed, expired, undecodable, restarted.
    """

    def __init__(
        self,
        transports: Sequence[Transport],
        *,
        shared_protocols: Collection[Protocol] = SHARED_PROTOCOLS,
        deliveries: Deliveries | None = None,
        companions: Mapping[str, Companion] | None = None,
    ) -> None:
        self._lanes = [
            Lane(
                transport,
                _cursor(transport, shared_protocols),
                Backlog(in_order=transport.protocol in IN_ORDER),
            )
            for transport in transports
        ]
        self._deliveries = deliveries if deliveries is not None else Deliveries()
        self._companions = {"deliveries": self._deliveries.run, **(companions or {})}
        self._maximum_attempts = settings.NOTIFICATION_MAX_ATTEMPTS
        self._stopping = Event()
        self._greenlets: list[gevent.Greenlet[..., None]] = []
        self._redis_away = False

    @property
    def counts(self) -> dict[Protocol, Counter[str]]:
        return {lane.protocol: lane.counts for lane in self._lanes}

    def start(self) -> None:
        """Starts the transports and serves them; StartError when one cannot listen, with the others stopped again."""
        for lane in self._lanes:
            self._open(lane)  # before the first client can connect: what is published from then on is for it
        for index, lane in enumerate(self._lanes):
            try:
                lane.transport.start()
            except OSError as error:
                for started in self._lanes[:index]:
                    started.transport.stop(timeout_seconds=1.0)
                raise StartError(lane.protocol, error) from error
        for name, serve in self._companions.items():
            self._spawn(name, serve)
        for lane in self._lanes:
            self._spawn(f"reader of {lane.protocol}", partial(self._serve, lane), counts=lane.counts)
            if isinstance(lane.cursor, GroupCursor):
                self._spawn(f"keeper of {lane.protocol}", lane.cursor.keep, counts=lane.counts)

    def stop(self, *, timeout_seconds: float = 6.0) -> None:
        """Stops reading, lets the transports finish what is in flight, and writes down how far it came."""
        deadline = time.monotonic() + timeout_seconds
        self._stopping.set()
        gevent.joinall(self._greenlets, timeout=timeout_seconds / 4)
        gevent.killall(self._greenlets, timeout=1.0)
        remaining = max(deadline - time.monotonic() - timeout_seconds / 4, 0.1)
        gevent.joinall(
            [gevent.spawn(self._stop_transport, lane, remaining) for lane in self._lanes], timeout=remaining + 0.5
        )
        gevent.spawn(self._settle).join(timeout_seconds / 4)

    def _spawn(self, name: str, serve: Companion, *, counts: Counter[str] | None = None) -> None:
        self._greenlets.append(gevent.spawn(self._watch, name, serve, counts))

    def _watch(self, name: str, serve: Companion, counts: Counter[str] | None) -> None:
        """Starts a loop again when it dies of something nobody foresaw: one protocol less must not go unnoticed."""
        while not self._stopping.is_set():
            try:
                serve(self._stopping)
            except Exception:  # the process loop
                log.exception("The %s died and is started again", name)
                metrics.GATEWAY_FAILURES.labels("gateway").inc()
                if counts is not None:
                    counts["restarted"] += 1
                self._stopping.wait(RESTART_SECONDS)

    def _serve(self, lane: Lane, stopping: Event) -> None:
        try:
            while not stopping.is_set():
                self._read(lane)
                until = time.monotonic() + SLICE_SECONDS
                while (lane.backlog or lane.current) and time.monotonic() < until and not stopping.is_set():
                    self._deliver_next(lane)
                gevent.sleep(PAUSE_SECONDS)
        finally:
            if stopping.is_set():
                lane.cursor.release(lane.backlog.entry_ids())

    def _read(self, lane: Lane) -> None:
        """Takes what is new into the backlog; waits for it only when there is nothing else to do."""
        idle = not lane.backlog and lane.current is None
        if not idle and not _may_read_ahead(lane):
            return
        try:
            if not lane.is_open:
                lane.cursor.open()
            entries = lane.cursor.read(wait=idle)
        except RedisError as error:
            self._redis_failed(lane, error, idle=idle)
            return
        lane.is_open, lane.failures = True, 0
        lane.look_at = time.monotonic() + (LOOK_SECONDS if len(entries) < READ_COUNT else 0.0)
        self._say_redis_is_back()
        for entry in entries:
            self._keep(lane, entry)

    def _redis_failed(self, lane: Lane, error: RedisError, *, idle: bool) -> None:
        """What was read before goes out meanwhile."""
        lane.is_open, lane.failures = False, lane.failures + 1
        self._say_redis_is_away(error)
        pause = _backoff_seconds(lane.failures, longest=LONGEST_RECONNECT_SECONDS)
        lane.look_at = time.monotonic() + pause
        if idle:
            self._stopping.wait(pause)

    def _keep(self, lane: Lane, entry: Entry) -> None:
        message = self._decode(lane, entry)
        if message is None or lane.protocol not in message.protocols:
            lane.cursor.done(entry.id)
        else:
            lane.backlog.add(Item(entry.id, message, len(entry.message or b"")))

    def _open(self, lane: Lane) -> None:
        try:
            lane.cursor.open()
        except RedisError as error:
            self._say_redis_is_away(error)

    def _deliver_next(self, lane: Lane) -> None:
        if lane.current is None:
            lane.current = lane.backlog.take()
            if not lane.cursor.owns(lane.current.entry_id):
                lane.current = None
                return
        item, attempt = lane.current, 0
        while not (self._expire(lane, item, attempt) or self._attempt(lane, item, attempt := attempt + 1)):
            lane.counts["retried"] += 1
            self._stopping.wait(_backoff_seconds(attempt, longest=LONGEST_BACKOFF_SECONDS))
            if self._stopping.is_set():
                lane.cursor.release([item.entry_id])
                return
        lane.current = None
        if not lane.is_shared:
            lane.cursor.done(item.entry_id)

    def _expire(self, lane: Lane, item: Item, attempts: int) -> bool:
        """True when it is too late: then the message is put aside instead of sent."""
        if not messages.has_expired(item.message, time.time()):
            return False
        log.info("%s did not send message %s: it has expired", lane.protocol, item.message.id)
        self._put_aside(lane, item, Outcome(State.EXPIRED, attempts, TOO_LATE))
        return True

    def _decode(self, lane: Lane, entry: Entry) -> Message | None:
        try:
            return messages.decode(entry.message or b"", position=entry.id.decode())
        except msgspec.MsgspecError as error:
            lane.counts["undecodable"] += 1
            log.error("Skipped the entry %s of the stream, which is no message: %s", entry.id.decode(), error)
            return None

    def _attempt(self, lane: Lane, item: Item, attempt: int) -> bool:
        """True when there is nothing to try again: the transport has the message, or never will have it."""
        try:
            lane.transport.deliver(item.message, partial(self._delivered, lane, item, attempt))
        except TransportError as error:
            return self._failed(lane, item, Outcome(State.PENDING, attempt, str(error)), final=error.permanent)
        except Exception as error:
            # Per item: a message that a transport chokes on must not stop those behind it.
            log.exception("%s could not deliver message %s, attempt %d", lane.protocol, item.message.id, attempt)
            metrics.GATEWAY_FAILURES.labels(lane.protocol.value).inc()
            final = attempt >= self._maximum_attempts
            return self._failed(lane, item, Outcome(State.PENDING, attempt, repr(error)), final=final)
        return True

    def _failed(self, lane: Lane, item: Item, outcome: Outcome, *, final: bool) -> bool:
        """A shared protocol waits for its broker until the message expires; the others give it up after some attempts."""
        final = final or (not lane.is_shared and outcome.attempts >= self._maximum_attempts)
        if final:
            self._give_up(lane, item, outcome.attempts, outcome.error)
            return True
        if outcome.attempts == 1:
            log.warning("%s cannot deliver message %s now: %s", lane.protocol, item.message.id, outcome.error)
        self._deliveries.record(item.message.id, lane.protocol, outcome)
        return False

    def _give_up(self, lane: Lane, item: Item, attempts: int, reason: str) -> None:
        log.error("%s gave message %s up: %s", lane.protocol, item.message.id, reason)
        self._put_aside(lane, item, Outcome(State.FAILED, attempts, reason))

    def _put_aside(self, lane: Lane, item: Item, outcome: Outcome) -> None:
        """The dead letter is the delivery's row: the admin shows it and can send it again."""
        lane.counts[outcome.state.value] += 1
        metrics.NOTIFICATIONS_SENT.labels(lane.protocol.value, outcome.state.value).inc()
        self._deliveries.record(item.message.id, lane.protocol, outcome)
        lane.cursor.done(item.entry_id)

    def _delivered(
        self, lane: Lane, item: Item, attempt: int, _message: Message, *, expired: bool = False, given_up: str = ""
    ) -> None:
        if given_up:
            self._give_up(lane, item, self._maximum_attempts, given_up)
            return
        if expired:
            self._put_aside(lane, item, Outcome(State.EXPIRED, attempt, TOO_LATE))
            return
        lane.counts["delivered"] += 1
        state = State.ACKNOWLEDGED if lane.is_shared else State.SENT
        metrics.NOTIFICATIONS_SENT.labels(lane.protocol.value, state.value).inc()
        self._deliveries.record(item.message.id, lane.protocol, Outcome(state, attempt))
        if lane.is_shared:
            lane.cursor.done(item.entry_id)

    def _stop_transport(self, lane: Lane, timeout_seconds: float) -> None:
        try:
            lane.transport.stop(timeout_seconds=timeout_seconds)
        except Exception:  # per transport: the others and the last acknowledgements still have their turn
            log.exception("%s did not stop in order", lane.protocol)
            metrics.GATEWAY_FAILURES.labels(lane.protocol.value).inc()

    def _settle(self) -> None:
        try:
            for lane in self._lanes:
                if isinstance(lane.cursor, GroupCursor):
                    lane.cursor.close()
        except RedisError as error:
            log.warning("Delivered messages could not be acknowledged and will be sent again: %s", redis.explain(error))
        try:
            self._deliveries.flush()
        except DatabaseError as error:
            log.warning("The last delivery states could not be written: %s", error)
        if self._deliveries:
            log.warning("%d delivery states are not written", len(self._deliveries))

    def _say_redis_is_away(self, error: RedisError) -> None:
        if not self._redis_away:
            log.warning("Notifications wait in the stream: %s", redis.explain(error))
        self._redis_away = True

    def _say_redis_is_back(self) -> None:
        if self._redis_away:
            log.warning("Redis answers again, notifications go on")
        self._redis_away = False


def _cursor(transport: Transport, shared_protocols: Collection[Protocol]) -> Cursor:
    if transport.protocol in shared_protocols:
        return GroupCursor(
            redis.blocking_client(),
            group=keys.NOTIFICATIONS_MQTT_GROUP,
            leader=Leader(keys.MQTT_PUBLISHER_LEADER),
            on_lead=getattr(transport, "lead", lambda _: None),
        )
    return FanOutCursor(redis.blocking_client(), on_hole=getattr(transport, "fill_hole", lambda: None))


def _may_read_ahead(lane: Lane) -> bool:
    maximum = READ_COUNT if lane.protocol in IN_ORDER else MAXIMUM_AHEAD
    has_room = len(lane.backlog) < maximum and lane.backlog.bytes < MAXIMUM_AHEAD_BYTES
    return has_room and time.monotonic() >= lane.look_at


def _backoff_seconds(attempt: int, *, longest: float) -> float:
    doubled = FIRST_BACKOFF_SECONDS * 2.0 ** min(attempt - 1, 20)
    return min(doubled, longest) * random.uniform(0.5, 1.0)  # noqa: S311  spreads the load, guards nothing
