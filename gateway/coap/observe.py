"""Observations (RFC 7641): registrations and news of a path in, notifications out, one at a time for each observer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import gevent.pool
import gevent.queue

from gateway.coap.blockwise import Clock, ExpiringMap
from gateway.coap.codec import Code, Kind, Message, Reply, Source
from gateway.coap.limits import Limits
from gateway.coap.observer import Observer
from gateway.coap.peers import AddressValidation, ConcurrencyLimit
from gateway.coap.retransmission import Outgoing, Transmission

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


class Observers:
    """The registrations by (source, token) and by path; a source is a network here, since ports cost nothing."""

    def __init__(self, *, max_observers: int, max_per_source: int) -> None:
        self._max_observers = max_observers
        self._shares = ConcurrencyLimit(most=max_per_source)
        self._by_key: dict[tuple[Source, bytes], Observer] = {}
        self._by_path: dict[tuple[str, ...], dict[Observer, None]] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Observer]:
        return iter(list(self._by_key.values()))

    def register(self, message: Message, *, now: float, refresh_at: float) -> Observer | None:
        """The new registration; None when there is no room, then the request is served as a plain GET."""
        if len(self) >= self._max_observers or not self._shares.take(message.source[0]):
            return None
        # A GET's body may be large and says nothing.
        observer = Observer(replace(message, payload=b""), confirmed_at=now, refresh_at=refresh_at)
        self._by_key[message.observation] = observer
        self._by_path.setdefault(message.path, {})[observer] = None
        return observer

    def find(self, message: Message) -> Observer | None:
        return self._by_key.get(message.observation)

    def is_current(self, observer: Observer) -> bool:
        return self.find(observer.message) is observer

    def of(self, path: tuple[str, ...]) -> list[Observer]:
        return list(self._by_path.get(path, ()))

    def remove(self, observer: Observer) -> None:
        """Forgets a current registration, and with it every trace of its path and host."""
        message = observer.message
        del self._by_key[message.observation]
        same_path = self._by_path[message.path]
        del same_path[observer]
        if not same_path:
            del self._by_path[message.path]
        self._shares.give_back(message.source[0])


class Notifications:
    """Brings observers to the newest state, one message under way for each; a slow one delays nobody else.

    `represent` makes the answer to an observer's own request, with an Observe number if the observation is to last.
    """

    def __init__(
        self,
        outgoing: Outgoing,
        *,
        represent: Callable[[Message], Reply],
        proofs: AddressValidation,
        limits: Limits,
        clock: Clock,
    ) -> None:
        self.sent = 0
        self.failed = 0
        self.observers = Observers(max_observers=limits.max_observers, max_per_source=limits.max_observers_per_source)
        # Which notification a RST is about; four for each observer reach back over some unconfirmed ones.
        self.notified: ExpiringMap[tuple[Source, int], Observer] = ExpiringMap(
            max_entries=4 * limits.max_observers, lifetime_seconds=NOTIFIED_SECONDS, clock=clock
        )
        self._outgoing = outgoing
        self._represent = represent
        self._proofs = proofs
        self._limits = limits
        self._clock = clock
        self._news: gevent.queue.SimpleQueue[Observer] = gevent.queue.SimpleQueue()  # an observer is in it once at most
        self._pool = gevent.pool.Pool(limits.max_notifiers)

    def run(self) -> None:
        for observer in self._news:
            self._pool.spawn(self._refresh, observer)

    def stop(self) -> None:
        self._pool.kill()

    def track(self, message: Message) -> Observer | None:
        """Registers or ends what the GET says; the registration is kept busy until `begin`.

        To be called before the answer is made, so that news in between are not missed.
        """
        earlier = self.observers.find(message)
        if earlier is not None:
            self.forget(earlier)
        if message.observe != 0:
            return None
        now = self._clock()
        return self.observers.register(message, now=now, refresh_at=now + self._limits.next_refresh_seconds())

    def begin(self, observer: Observer) -> None:
        """Its registration is answered. Whose address is not proved is asked for that before anything else is sent."""
        if not self.observers.is_current(observer):
            return
        if self._proofs.has(observer.message.source):
            self._release(observer)
        else:
            observer.pending = self._outgoing.ping(observer.message.source, observer=observer)

    def forget(self, observer: Observer) -> None:
        if not self.observers.is_current(observer):
            return
        self.observers.remove(observer)
        if observer.pending is not None:
            self._outgoing.settle(observer.message.source, observer.pending)

    def notify(self, path: tuple[str, ...]) -> int:
        observers = self.observers.of(path)
        for observer in observers:
            self._mark_stale(observer)
        return len(observers)

    def refresh(self, *, now: float) -> None:
        """Notifies again the observers that have not been sent anything for long."""
        for observer in self.observers:
            if observer.refresh_at <= now and not observer.busy:
                self._mark_stale(observer)

    def settle(self, source: Source, mid: int, *, reset: bool) -> bool:
        """ACK or RST to something sent: the end of its repetition; a RST to a notification ends the observation.

        False when nothing is known of what it answers.
        """
        transmission = self._outgoing.settle(source, mid)
        if transmission is not None:
            self._proofs.add(source)
            if transmission.is_ping:
                self._pong(transmission)
                return True
        observer = self.notified.get((source, mid))
        if observer is None or not self.observers.is_current(observer):
            return transmission is not None
        if reset:
            self.forget(observer)
        elif transmission is not None:
            observer.confirmed_at, observer.pending, observer.backoff = self._clock(), None, None
            self._release(observer)
        return True

    def repeat(self, transmission: Transmission, *, now: float) -> None:
        """Sends again what was not acknowledged in time, or the news instead (RFC 7641 4.5.2); gives up in the end."""
        observer = transmission.observer
        backoff = transmission.backoff.longer()
        replaceable = observer is not None and observer.stale and not transmission.is_ping
        if observer is not None and replaceable and backoff.retries_left >= 0:
            self._outgoing.settle(transmission.source, transmission.mid)
            observer.pending, observer.backoff = None, backoff
            self._enqueue(observer)
        elif not self._outgoing.repeat(transmission, now=now) and observer is not None:
            self.forget(observer)

    def _pong(self, transmission: Transmission) -> None:
        observer = transmission.observer
        if observer is not None and self.observers.is_current(observer):
            observer.pending = None
            self._release(observer)

    def _release(self, observer: Observer) -> None:
        """Its last message is done with; news that came meanwhile go out now."""
        observer.busy = False
        if observer.stale:
            self._enqueue(observer)

    def _mark_stale(self, observer: Observer) -> None:
        observer.stale = True
        if not observer.busy:
            self._enqueue(observer)

    def _enqueue(self, observer: Observer) -> None:
        observer.busy = True
        self._news.put(observer)

    def _refresh(self, observer: Observer) -> None:
        if not self.observers.is_current(observer):
            return
        if not self._proofs.has(observer.message.source):  # forgotten: it was proved when the observation began
            self.begin(observer)
            return
        observer.stale = False
        try:
            reply = self._represent(observer.message)
            if not self.observers.is_current(observer):
                return
            if reply.code is Code.UNAVAILABLE:
                self._postpone(observer, reply)
            else:
                self._deliver(observer, reply)
        except Exception:
            self.failed += 1
            logger.exception("CoAP notification to %s for %s failed", observer.message.source, observer.message.path)
            self.forget(observer)

    def _postpone(self, observer: Observer, reply: Reply) -> None:
        """An error would end the observation (RFC 7641 4.2); a database that is away for a moment must not end them all."""
        observer.stale, observer.busy = True, False
        observer.refresh_at = self._clock() + (reply.max_age or self._limits.busy_retry_seconds)

    def _deliver(self, observer: Observer, reply: Reply) -> None:
        peer, source, now = observer.message.observation, observer.message.source, self._clock()
        self.sent += 1
        observer.refresh_at = now + self._limits.next_refresh_seconds()
        if reply.observe is None:  # the last one: worth an ACK, and no observer's any more
            self.forget(observer)
            self._outgoing.send(reply, kind=Kind.CON, peer=peer)
        elif self._is_to_be_confirmed(observer, now=now):
            observer.unconfirmed = 0
            observer.pending = self._outgoing.send(reply, kind=Kind.CON, peer=peer, observer=observer)
            self.notified.put((source, observer.pending), observer)
        else:
            observer.unconfirmed += 1
            mid = self._outgoing.send(reply, kind=Kind.NON, peer=peer)
            self.notified.put((source, mid), observer)
            self._release(observer)

    def _is_to_be_confirmed(self, observer: Observer, *, now: float) -> bool:
        """Always if registered confirmably, else every n-th notification and once in a while."""
        return (
            observer.message.header.kind is Kind.CON
            or observer.backoff is not None
            or observer.unconfirmed + 1 >= self._limits.confirm_every
            or now - observer.confirmed_at >= self._limits.confirm_within_seconds
        )
