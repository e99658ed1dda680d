"""Observations (RFC 7641): registrations and news of a path in, notifications out, repeated until acknowledged."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import gevent.pool
import gevent.queue

from notifications.transports import coap_codec
from notifications.transports.coap_blockwise import Clock, ExpiringMap
from notifications.transports.coap_codec import Kind, Message, Reply, Source

logger = logging.getLogger(__name__)

NOTIFIED_SECONDS = 145.0  # NON_LIFETIME, RFC 7252 4.8.2: an answer to a notification does not come later


class Sequence:
    """Observe numbers of 24 bits, taken from a clock that outlives the process, so that they also grow over a restart.

    A millisecond each: they come round after 4.6 hours, and half of that is the furthest an order is defined
    (RFC 7641 3.4), while a client takes everything that is 128 seconds younger as new.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = 0

    def next(self) -> int:
        self._last = max(self._last + 1, int(self._clock() * 1000))
        return self._last & 0xFFFFFF


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait for the ACK, and how many times the message may still be sent again."""

    timeout_seconds: float
    retries_left: int

    def longer(self) -> Backoff:
        return Backoff(self.timeout_seconds * 2, self.retries_left - 1)


@dataclass(slots=True, eq=False)
class Observer:
    """One registration.

    `busy`: an answer or a notification is being made, or waits for its ACK. `stale`: there is news since it was made.
    """

    message: Message
    confirmed_at: float
    unconfirmed: int = 0
    busy: bool = True
    stale: bool = False
    pending: int | None = None  # message id of the notification that waits for its ACK
    backoff: Backoff | None = None  # where a replaced notification stopped, so that news do not renew the patience


class Observers:
    """The registrations by (source, token) and by path; a source is a host here, since ports cost nothing."""

    def __init__(self, *, max_observers: int, max_per_host: int) -> None:
        self.max_observers = max_observers
        self._max_per_host = max_per_host
        self._by_key: dict[tuple[Source, bytes], Observer] = {}
        self._by_path: dict[tuple[str, ...], dict[Observer, None]] = {}
        self._by_host: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._by_key)

    def register(self, message: Message, *, now: float) -> Observer | None:
        """The new registration; None when there is no room, then the request is served as a plain GET."""
        host = message.source[0]
        if len(self) >= self.max_observers or self._by_host[host] >= self._max_per_host:
            return None
        observer = Observer(
            replace(message, payload=b""), confirmed_at=now
        )  # a GET's body may be large and says nothing
        self._by_key[message.observation] = observer
        self._by_path.setdefault(message.path, {})[observer] = None
        self._by_host[host] += 1
        return observer

    def find(self, message: Message) -> Observer | None:
        return self._by_key.get(message.observation)

    def is_current(self, observer: Observer) -> bool:
        return self.find(observer.message) is observer

    def of(self, path: tuple[str, ...]) -> list[Observer]:
        return list(self._by_path.get(path, ()))

    def remove(self, observer: Observer) -> None:
        """Forgets a current registration, and with it every trace of its path and host."""
        message, host = observer.message, observer.message.source[0]
        del self._by_key[message.observation]
        same_path = self._by_path[message.path]
        del same_path[observer]
        if not same_path:
            del self._by_path[message.path]
        self._by_host[host] -= 1
        if not self._by_host[host]:
            del self._by_host[host]


@dataclass(slots=True, eq=False)
class Transmission:
    """A confirmable message on its way; `observer` is None for a separate response and for a last notification."""

    source: Source
    mid: int
    datagram: bytes
    observer: Observer | None
    backoff: Backoff
    due_at: float


class Outgoing:
    """Sends replies under message ids of this server's own, confirmable ones again until ACK or RST (RFC 7252 4.2)."""

    def __init__(
        self,
        send: Callable[[bytes, Source], None],
        *,
        first_backoff: Callable[[], Backoff],
        max_unacknowledged: int,
        clock: Clock,
    ) -> None:
        self.timeouts = 0
        self.waiting: dict[tuple[Source, int], Transmission] = {}
        self._send = send
        self._first_backoff = first_backoff
        self._max_unacknowledged = max_unacknowledged
        self._clock = clock
        self._mid = int(clock() * 1000)  # not where the last run began, whose ids the peers still remember

    def send(self, reply: Reply, *, kind: Kind, peer: tuple[Source, bytes], observer: Observer | None = None) -> int:
        """Returns the message id. `peer` is source and token; an observer's backoff, if it has one, is taken over."""
        source, token = peer
        self._mid = mid = (self._mid + 1) & 0xFFFF
        datagram = coap_codec.write_reply(reply, kind=kind, mid=mid, token=token)
        # Observers are few enough; peers that provoke separate responses and never acknowledge need a bound.
        if kind is Kind.CON and (observer is not None or len(self.waiting) < self._max_unacknowledged):
            backoff = (observer.backoff if observer is not None else None) or self._first_backoff()
            due_at = self._clock() + backoff.timeout_seconds
            self.waiting[source, mid] = Transmission(source, mid, datagram, observer, backoff, due_at)
        self._send(datagram, source)
        return mid

    def settle(self, source: Source, mid: int) -> Transmission | None:
        return self.waiting.pop((source, mid), None)

    def due(self, now: float) -> list[Transmission]:
        return [transmission for transmission in self.waiting.values() if transmission.due_at <= now]

    def repeat(self, transmission: Transmission, *, now: float) -> bool:
        """False when it was sent often enough: then the peer is given up."""
        backoff = transmission.backoff.longer()
        if backoff.retries_left < 0:
            self.settle(transmission.source, transmission.mid)
            self.timeouts += 1
            return False
        transmission.backoff, transmission.due_at = backoff, now + backoff.timeout_seconds
        self._send(transmission.datagram, transmission.source)
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """When a notification asks for an ACK: always if registered confirmably, else every n-th and once in a while."""

    every: int
    within_seconds: float

    def is_needed(self, observer: Observer, *, now: float) -> bool:
        return (
            observer.message.header.kind is Kind.CON
            or observer.backoff is not None
            or observer.unconfirmed + 1 >= self.every
            or now - observer.confirmed_at >= self.within_seconds
        )


class Notifications:
    """Brings observers to the newest state, one message under way for each; a slow one delays nobody else.

    `represent` makes the answer to an observer's own request, with an Observe number if the observation is to last.
    """

    def __init__(
        self,
        outgoing: Outgoing,
        *,
        represent: Callable[[Message], Reply],
        observers: Observers,
        confirmation: Confirmation,
        max_notifiers: int,
        clock: Clock,
    ) -> None:
        self.sent = 0
        self.failed = 0
        self.observers = observers
        # Which notification a RST is about; four for each observer reach back over some unconfirmed ones.
        self.notified: ExpiringMap[tuple[Source, int], Observer] = ExpiringMap(
            max_entries=4 * observers.max_observers, lifetime_seconds=NOTIFIED_SECONDS, clock=clock
        )
        self._outgoing = outgoing
        self._represent = represent
        self._confirmation = confirmation
        self._clock = clock
        self._news: gevent.queue.SimpleQueue[Observer] = gevent.queue.SimpleQueue()  # an observer is in it once at most
        self._pool = gevent.pool.Pool(max_notifiers)

    def run(self) -> None:
        for observer in self._news:
            self._pool.spawn(self._refresh, observer)

    def stop(self) -> None:
        self._pool.kill()

    def track(self, message: Message) -> Observer | None:
        """Registers or ends what the GET says; the registration is kept busy until `release`.

        To be called before the answer is made, so that news in between are not missed.
        """
        earlier = self.observers.find(message)
        if earlier is not None:
            self.forget(earlier)
        if message.observe != 0:
            return None
        return self.observers.register(message, now=self._clock())

    def forget(self, observer: Observer) -> None:
        if not self.observers.is_current(observer):
            return
        self.observers.remove(observer)
        if observer.pending is not None:
            self._outgoing.settle(observer.message.source, observer.pending)

    def release(self, observer: Observer) -> None:
        """Its last message is done with; news that came meanwhile go out now."""
        observer.busy = False
        if observer.stale and self.observers.is_current(observer):
            self._enqueue(observer)

    def notify(self, path: tuple[str, ...]) -> int:
        observers = self.observers.of(path)
        for observer in observers:
            observer.stale = True
            if not observer.busy:
                self._enqueue(observer)
        return len(observers)

    def settle(self, source: Source, mid: int, *, reset: bool) -> None:
        """ACK or RST to something sent: the end of its repetition, and with RST the end of the observation."""
        transmission = self._outgoing.settle(source, mid)
        observer = self.notified.get((source, mid))
        if observer is None or not self.observers.is_current(observer):
            return
        if reset:
            self.forget(observer)
        elif transmission is not None:
            observer.confirmed_at, observer.pending, observer.backoff = self._clock(), None, None
            self.release(observer)

    def repeat(self, transmission: Transmission, *, now: float) -> None:
        """Sends again what was not acknowledged in time, or the news instead (RFC 7641 4.5.2); gives up in the end."""
        observer = transmission.observer
        backoff = transmission.backoff.longer()
        if observer is not None and observer.stale and backoff.retries_left >= 0:
            self._outgoing.settle(transmission.source, transmission.mid)
            observer.pending, observer.backoff = None, backoff
            self._enqueue(observer)
        elif not self._outgoing.repeat(transmission, now=now) and observer is not None:
            self.forget(observer)

    def _enqueue(self, observer: Observer) -> None:
        observer.busy = True
        self._news.put(observer)

    def _refresh(self, observer: Observer) -> None:
        if not self.observers.is_current(observer):
            return
        observer.stale = False
        try:
            reply = self._represent(observer.message)
            if self.observers.is_current(observer):
                self._deliver(observer, reply)
        except Exception:
            self.failed += 1
            logger.exception("CoAP notification to %s for %s failed", observer.message.source, observer.message.path)
            self.forget(observer)

    def _deliver(self, observer: Observer, reply: Reply) -> None:
        peer, source = observer.message.observation, observer.message.source
        self.sent += 1
        if reply.observe is None:  # the last one: worth an ACK, and no observer's any more
            self.forget(observer)
            self._outgoing.send(reply, kind=Kind.CON, peer=peer)
        elif self._confirmation.is_needed(observer, now=self._clock()):
            observer.unconfirmed = 0
            observer.pending = self._outgoing.send(reply, kind=Kind.CON, peer=peer, observer=observer)
            self.notified.put((source, observer.pending), observer)
        else:
            observer.unconfirmed += 1
            mid = self._outgoing.send(reply, kind=Kind.NON, peer=peer)
            self.notified.put((source, mid), observer)
            self.release(observer)
