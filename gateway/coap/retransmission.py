"""Messages of the server's own (RFC 7252 4.2): replies in, datagrams out, the confirmable ones again until answered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gateway.coap import codec
from gateway.coap.blockwise import Clock
from gateway.coap.codec import Kind, Reply, Source
from gateway.coap.limits import Backoff, Limits
from gateway.coap.observer import Observer
from gateway.coap.peers import UNLIMITED_BYTES, MessageIds


@dataclass(slots=True, eq=False)
class Transmission:
    """A confirmable message on its way; `observer` is None for a separate response and for a last notification."""

    source: Source
    mid: int
    datagram: bytes
    observer: Observer | None
    backoff: Backoff
    due_at: float

    @property
    def is_ping(self) -> bool:
        return self.datagram[1] == codec.EMPTY


class Outgoing:
    """Sends under message ids of this server's own; what nobody answers is given up after the last retransmission."""

    def __init__(self, send: Callable[[bytes, Source], None], *, limits: Limits, clock: Clock) -> None:
        self.timeouts = 0
        self.waiting: dict[tuple[Source, int], Transmission] = {}
        self._send = send
        self._limits = limits
        self._clock = clock
        self._ids = MessageIds(limits, clock=clock)

    def send(
        self,
        reply: Reply,
        *,
        kind: Kind,
        peer: tuple[Source, bytes],
        observer: Observer | None = None,
        room: int = UNLIMITED_BYTES,
    ) -> int:
        """Returns the message id. `peer` is source and token; an observer's backoff, if it has one, is taken over.

        `room`: the bytes that all retransmissions together may take.
        """
        source, token = peer
        mid = self._ids.next(source)
        datagram = codec.write_reply(reply, kind=kind, mid=mid, token=token)
        # Observers are few enough; peers that provoke separate responses and never acknowledge need a bound.
        if kind is Kind.CON and (observer is not None or len(self.waiting) < self._limits.max_unacknowledged):
            self._expect(source, mid=mid, datagram=datagram, observer=observer, room=room)
        self._send(datagram, source)
        return mid

    def ping(self, source: Source, *, observer: Observer | None = None) -> int:
        """An empty confirmable message, which whoever receives it rejects (RFC 7252 4.3); its message id.

        The timer sends it, not this call: small devices lose what comes right behind the answer they are reading. Its
        first repetitions come sooner than those of other messages: libcoap rejects one empty message in 0.25 s, and news
        wait for the answer.
        """
        mid = self._ids.next(source)
        datagram = codec.write_empty(Kind.CON, mid)
        first = self._limits.first_backoff()
        unsent = Backoff(first.timeout_seconds / 8, first.retries_left + 3)
        self.waiting[source, mid] = Transmission(source, mid, datagram, observer, unsent, self._clock())
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

    def _expect(self, source: Source, *, mid: int, datagram: bytes, observer: Observer | None, room: int) -> None:
        backoff = (observer.backoff if observer is not None else None) or self._limits.first_backoff()
        affordable = max(room // len(datagram) - 1, 0)
        backoff = replace(backoff, retries_left=min(backoff.retries_left, affordable))
        due_at = self._clock() + backoff.timeout_seconds
        self.waiting[source, mid] = Transmission(source, mid, datagram, observer, backoff, due_at)
