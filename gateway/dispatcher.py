"""The gateway: deliver what the notification stream holds over every transport, and record what became of each message.

Each transport is served by a greenlet of its own that reads the stream at its own pace, so that one protocol's failure
or slowness never delays another. It reads ahead of what it delivers, so that an urgent message goes out at once.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import gevent
import msgspec
from django.conf import settings
from django.db import DatabaseError
from gevent.event import Event
from redis.exceptions import RedisError

from aemos.lib import keys, metrics, redis, tracing
from aemos.lib.leader import Leader
from aemos.lib.rate_limited_log import RateLimitedLog
from gateway.backlog import Backlog, Item
from gateway.cursors import READ_COUNT, Cursor, Entry, FanOutCursor, GroupCursor
from gateway.deliveries import Deliveries, Outcome, State
from gateway.transport import BackgroundTask, DeliveryReport, Status, Transport, TransportError
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


class StartError(Exception):
    """A transport could not take its address; `error` says why."""

    def __init__(self, protocol: Protocol, error: OSError) -> None:
        super().__init__(f"{protocol}: {error}")
        self.protocol = protocol
        self.error = error


@dataclass(slots=True, eq=False)
class TransportRun:
    """One transport, its position in the stream, what was read and is not delivered, and counts of what became of it.

    `in_delivery` is being handed to the transport. It and the backlog outlive the greenlet that delivers them.
    """

    transport: Transport
    cursor: Cursor
    backlog: Backlog
    in_delivery: Item | None = None
    counts: Counter[str] = field(default_factory=Counter)
    is_open: bool = True
    failures: int = 0
    next_read_at: float = 0.0

    @property
    def protocol(self) -> Protocol:
        return self.transport.protocol

    @property
    def is_shared(self) -> bool:
        return isinstance(self.cursor, GroupCursor)

    @property
    def is_idle(self) -> bool:
        return not self.backlog and self.in_delivery is None


class Gateway:
    """Serves its transports from `start` to `stop`, and `background_tasks` beside them; one that dies is started again.

    `counts` of each protocol: delivered, retried, failed, expired, undecodable, restarted.
    """

    def __init__(
        self,
        transports: Sequence[Transport],
        *,
        shared_protocols: Collection[Protocol] = SHARED_PROTOCOLS,
        deliveries: Deliveries | None = None,
        background_tasks: Mapping[str, BackgroundTask] | None = None,
    ) -> None:
        self._runs = [
            TransportRun(
                transport,
                _cursor(transport, shared_protocols),
                Backlog(in_order=transport.protocol in IN_ORDER),
            )
            for transport in transports
        ]
        self._deliveries = deliveries if deliveries is not None else Deliveries()
        self._background_tasks = {"deliveries": self._deliveries.run, **(background_tasks or {})}
        self._maximum_attempts = settings.NOTIFICATION_MAX_ATTEMPTS
        self._stopping = Event()
        self._greenlets: list[gevent.Greenlet[..., None]] = []
        self._log = RateLimitedLog(log)

    @property
    def counts(self) -> dict[Protocol, Counter[str]]:
        return {run.protocol: run.counts for run in self._runs}

    def start(self) -> None:
        """Starts the transports and serves them; StartError when one cannot listen, with the others stopped again."""
        for run in self._runs:
            self._open(run)  # before the first client can connect: what is published from then on is for it
        for index, run in enumerate(self._runs):
            try:
                run.transport.start()
            except OSError as error:
                for started in self._runs[:index]:
                    started.transport.stop(timeout_seconds=1.0)
                raise StartError(run.protocol, error) from error
        for name, serve in self._background_tasks.items():
            self._spawn(name, serve)
        for run in self._runs:
            self._spawn(f"reader of {run.protocol}", partial(self._serve, run), counts=run.counts)
            if isinstance(run.cursor, GroupCursor):
                acknowledge = run.cursor.acknowledge_until_stopped
                self._spawn(f"acknowledgements of {run.protocol}", acknowledge, counts=run.counts)

    def stop(self, *, timeout_seconds: float = 6.0) -> None:
        """Stops reading, lets the transports finish what is in flight, and writes down how far it came."""
        deadline = time.monotonic() + timeout_seconds
        self._stopping.set()
        gevent.joinall(self._greenlets, timeout=timeout_seconds / 4)
        gevent.killall(self._greenlets, timeout=1.0)
        remaining = max(deadline - time.monotonic() - timeout_seconds / 4, 0.1)
        gevent.joinall(
            [gevent.spawn(self._stop_transport, run, remaining) for run in self._runs], timeout=remaining + 0.5
        )
        gevent.spawn(self._acknowledge_last).join(timeout_seconds / 4)

    def _spawn(self, name: str, serve: BackgroundTask, *, counts: Counter[str] | None = None) -> None:
        self._greenlets.append(gevent.spawn(self._watch, name, serve, counts))

    def _watch(self, name: str, serve: BackgroundTask, counts: Counter[str] | None) -> None:
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

    def _serve(self, run: TransportRun, stopping: Event) -> None:
        """Delivers over one transport what the stream holds, until `stopping` is set.

        1. `_read`: put new entries of the stream into the backlog, urgent ones ahead; wait for them only when idle.
        2. `_take`: take the next message, unless another gateway has begun to lead and delivers it.
        3. `_expire`: make it a dead letter if it is too late to send it.
        4. `_attempt`: hand it to the transport; after a failure, wait and go back to 3.
        5. `_on_report`: record what the transport reports of it, now or later: delivered, expired or refused.
        6. On the way out, release what was read and not delivered, so that another gateway delivers it.
        """
        try:
            while not stopping.is_set():
                self._read(run)
                until = time.monotonic() + SLICE_SECONDS
                while time.monotonic() < until and not stopping.is_set() and (item := self._take(run)):
                    self._deliver(run, item)
                gevent.sleep(PAUSE_SECONDS)
        finally:
            if stopping.is_set():
                run.cursor.release(run.backlog.entry_ids())

    def _read(self, run: TransportRun) -> None:
        """Takes what is new into the backlog; waits for it only when there is nothing else to do."""
        idle = run.is_idle
        if not idle and not _may_read_ahead(run):
            return
        try:
            if not run.is_open:
                run.cursor.open()
            entries = run.cursor.read(wait=idle)
        except RedisError as error:
            self._redis_failed(run, error, idle=idle)
            return
        run.is_open, run.failures = True, 0
        run.next_read_at = time.monotonic() + (LOOK_SECONDS if len(entries) < READ_COUNT else 0.0)
        self._log.recovered("redis", "Redis answers again, notifications are delivered")
        for entry in entries:
            self._queue(run, entry)

    def _redis_failed(self, run: TransportRun, error: RedisError, *, idle: bool) -> None:
        """What was read before goes out meanwhile."""
        run.is_open, run.failures = False, run.failures + 1
        self._log.log("redis", logging.WARNING, "Notifications wait in the stream: %s", redis.explain(error))
        pause = _backoff_seconds(run.failures, longest=LONGEST_RECONNECT_SECONDS)
        run.next_read_at = time.monotonic() + pause
        if idle:
            self._stopping.wait(pause)

    def _queue(self, run: TransportRun, entry: Entry) -> None:
        message = self._decode(run, entry)
        if message is None or run.protocol not in message.protocols:
            run.cursor.done(entry.id)
        else:
            read_ns = tracing.now_ns() if message.trace and tracing.is_on() else 0
            run.backlog.add(Item(entry.id, message, len(entry.message or b""), read_ns))

    def _open(self, run: TransportRun) -> None:
        try:
            run.cursor.open()
        except RedisError as error:
            self._log.log("redis", logging.WARNING, "Notifications wait in the stream: %s", redis.explain(error))

    def _take(self, run: TransportRun) -> Item | None:
        while run.in_delivery is None and run.backlog:
            item = run.backlog.take()
            if run.cursor.owns(item.entry_id):
                run.in_delivery = item
        return run.in_delivery

    def _deliver(self, run: TransportRun, item: Item) -> None:
        attempt = 0
        while not (self._expire(run, item, attempt) or self._attempt(run, item, attempt := attempt + 1)):
            run.counts["retried"] += 1
            self._stopping.wait(_backoff_seconds(attempt, longest=LONGEST_BACKOFF_SECONDS))
            if self._stopping.is_set():
                run.cursor.release([item.entry_id])
                return
        run.in_delivery = None
        if not run.is_shared:
            run.cursor.done(item.entry_id)

    def _expire(self, run: TransportRun, item: Item, attempts: int) -> bool:
        """True when it is too late: then the message becomes a dead letter instead of being sent."""
        if not messages.has_expired(item.message, time.time()):
            return False
        log.info("%s did not send message %s: it has expired", run.protocol, item.message.id, extra=_fields(run, item))
        self._dead_letter(run, item, Outcome(State.EXPIRED, attempts, TOO_LATE))
        return True

    def _decode(self, run: TransportRun, entry: Entry) -> Message | None:
        try:
            return messages.decode(entry.message or b"", position=entry.id.decode())
        except msgspec.MsgspecError as error:
            run.counts["undecodable"] += 1
            log.error("Skipped the entry %s of the stream, which is no message: %s", entry.id.decode(), error)
            return None

    def _attempt(self, run: TransportRun, item: Item, attempt: int) -> bool:
        """True when there is nothing to try again: the transport has the message, or never will have it."""
        try:
            run.transport.deliver(item.message, partial(self._on_report, run, item, attempt))
        except TransportError as error:
            return self._failed(run, item, Outcome(State.PENDING, attempt, str(error)), final=error.permanent)
        except Exception as error:
            # Per item: a message that a transport chokes on must not stop those behind it.
            log.exception(
                "%s could not deliver message %s, attempt %d",
                run.protocol,
                item.message.id,
                attempt,
                extra=_fields(run, item),
            )
            metrics.GATEWAY_FAILURES.labels(run.protocol.value).inc()
            final = attempt >= self._maximum_attempts
            return self._failed(run, item, Outcome(State.PENDING, attempt, repr(error)), final=final)
        return True

    def _failed(self, run: TransportRun, item: Item, outcome: Outcome, *, final: bool) -> bool:
        """A shared protocol waits for its broker until the message expires; the others give up after some attempts."""
        final = final or (not run.is_shared and outcome.attempts >= self._maximum_attempts)
        if final:
            self._give_up(run, item, outcome.attempts, outcome.error)
            return True
        if outcome.attempts == 1:
            log.warning(
                "%s cannot deliver message %s now: %s",
                run.protocol,
                item.message.id,
                outcome.error,
                extra=_fields(run, item),
            )
        self._deliveries.record(item.message.id, run.protocol, outcome)
        return False

    def _give_up(self, run: TransportRun, item: Item, attempts: int, reason: str) -> None:
        log.error("%s gave message %s up: %s", run.protocol, item.message.id, reason, extra=_fields(run, item))
        self._dead_letter(run, item, Outcome(State.FAILED, attempts, reason))

    def _dead_letter(self, run: TransportRun, item: Item, outcome: Outcome) -> None:
        """The dead letter is the delivery's row: the admin shows it and can send it again."""
        run.counts[outcome.state.value] += 1
        metrics.NOTIFICATIONS_SENT.labels(run.protocol.value, outcome.state.value).inc()
        self._deliveries.record(item.message.id, run.protocol, outcome)
        run.cursor.done(item.entry_id)

    def _on_report(self, run: TransportRun, item: Item, attempt: int, report: DeliveryReport) -> None:
        if item.read_ns:
            attributes = {"aemos.message_id": str(item.message.id), "aemos.attempt": attempt}
            span = tracing.begin(
                f"deliver {run.protocol}", parent=item.message.trace, start_ns=item.read_ns, attributes=attributes
            )
            span.end(error="" if report.status is Status.DELIVERED else report.reason or report.status)
        match report.status:
            case Status.REFUSED:
                self._give_up(run, item, self._maximum_attempts, report.reason)
            case Status.EXPIRED:
                self._dead_letter(run, item, Outcome(State.EXPIRED, attempt, TOO_LATE))
            case Status.DELIVERED:
                run.counts["delivered"] += 1
                state = State.ACKNOWLEDGED if run.is_shared else State.SENT
                metrics.NOTIFICATIONS_SENT.labels(run.protocol.value, state.value).inc()
                self._deliveries.record(item.message.id, run.protocol, Outcome(state, attempt))
                if run.is_shared:
                    run.cursor.done(item.entry_id)

    def _stop_transport(self, run: TransportRun, timeout_seconds: float) -> None:
        try:
            run.transport.stop(timeout_seconds=timeout_seconds)
        except Exception:  # per transport: the others and the last acknowledgements still have their turn
            log.exception("%s did not stop in order", run.protocol)
            metrics.GATEWAY_FAILURES.labels(run.protocol.value).inc()

    def _acknowledge_last(self) -> None:
        try:
            for run in self._runs:
                if isinstance(run.cursor, GroupCursor):
                    run.cursor.close()
        except RedisError as error:
            log.warning("Delivered messages could not be acknowledged and will be sent again: %s", redis.explain(error))
        try:
            self._deliveries.flush()
        except DatabaseError as error:
            log.warning("The last delivery states could not be written: %s", error)
        if self._deliveries:
            log.warning("%d delivery states are not written", len(self._deliveries))


def _fields(run: TransportRun, item: Item) -> dict[str, str | None]:
    """For log lines."""
    message = item.message
    return {
        "message_id": str(message.id),
        "device": message.device_uuid,
        "protocol": run.protocol.value,
        **tracing.log_fields(message.trace),
    }


def _cursor(transport: Transport, shared_protocols: Collection[Protocol]) -> Cursor:
    if transport.protocol in shared_protocols:
        return GroupCursor(
            redis.blocking_client(),
            group=keys.NOTIFICATIONS_MQTT_GROUP,
            leader=Leader(keys.MQTT_PUBLISHER_LEADER),
            on_lead=transport.on_lead,
        )
    return FanOutCursor(redis.blocking_client(), on_gap=transport.on_gap)


def _may_read_ahead(run: TransportRun) -> bool:
    maximum = READ_COUNT if run.protocol in IN_ORDER else MAXIMUM_AHEAD
    has_room = len(run.backlog) < maximum and run.backlog.bytes < MAXIMUM_AHEAD_BYTES
    return has_room and time.monotonic() >= run.next_read_at


def _backoff_seconds(attempt: int, *, longest: float) -> float:
    doubled = FIRST_BACKOFF_SECONDS * 2.0 ** min(attempt - 1, 20)
    return min(doubled, longest) * random.uniform(0.5, 1.0)  # noqa: S311  spreads the load, guards nothing
