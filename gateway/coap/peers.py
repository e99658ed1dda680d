"""Limits per peer: which sources of datagrams may go on, and how many bytes they may be sent.

UDP lets anybody write any source address. Until a source has answered something that only its owner can have received,
it is not sent more than a few times what came from it (RFC 9175 2.4), so that nobody gains by writing another's.
"""

from __future__ import annotations

import secrets
import socket
from collections import Counter
from functools import lru_cache
from hashlib import blake2b

from gevent.event import Event

from gateway.coap.blockwise import Clock, ExpiringMap
from gateway.coap.codec import Source
from gateway.coap.limits import Limits

# The factor RFC 9175 2.4 allows, and QUIC too (RFC 9000 8.1).
AMPLIFICATION = 3
UNLIMITED_BYTES = 1 << 16


@lru_cache(maxsize=4096)
def network(host: str) -> str:
    """What limits apply to: an IPv4 host, or the /64 of an IPv6 host, which has all addresses in it to itself."""
    if ":" not in host or host.startswith("::ffff:"):
        return host
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:8].hex()


class RateLimit:
    """A token bucket per network."""

    def __init__(self, limits: Limits, *, clock: Clock) -> None:
        self._rate, self._burst, self._clock = limits.requests_per_second, limits.request_burst, clock
        # A bucket is full again, and may be forgotten, after burst / rate seconds.
        self.kept: ExpiringMap[str, tuple[float, float]] = ExpiringMap(
            max_entries=limits.max_sources, lifetime_seconds=self._burst / self._rate, clock=clock
        )

    def wait_seconds(self, host: str) -> float:
        """0 and one token less, or the time until there is a token."""
        key, now = network(host), self._clock()
        tokens, filled_at = self.kept.get(key) or (float(self._burst), now)
        tokens = min(self._burst, tokens + (now - filled_at) * self._rate)
        if tokens < 1:
            return (1 - tokens) / self._rate
        self.kept.put(key, (tokens - 1, now))
        return 0.0


class AddressValidation:
    """Sources that have shown that they receive what is sent to them: they answered a message id they had to know.

    Only a proof makes an entry, so that forged sources cannot push out real ones. It lasts twice as long as an observer
    may go without a confirmable notification, so that it is renewed in time.
    """

    def __init__(self, limits: Limits, *, clock: Clock) -> None:
        self.kept: ExpiringMap[Source, bool] = ExpiringMap(
            max_entries=2 * limits.max_observers, lifetime_seconds=2 * limits.confirm_within_seconds, clock=clock
        )
        self._awaited: dict[Source, Event] = {}

    def add(self, source: Source) -> None:
        self.kept.put(source, True)
        if source in self._awaited:
            self._awaited[source].set()

    def wait(self, source: Source, *, seconds: float) -> None:
        """Until there is a proof, or for so long; whoever waits has asked for it."""
        awaited = self._awaited.setdefault(source, Event())
        awaited.wait(seconds)
        self._awaited.pop(source, None)

    def has(self, source: Source) -> bool:
        return self.kept.get(source) is not None

    def room(self, source: Source, *, received_bytes: int) -> int:
        """How many bytes may be sent for so many received."""
        return UNLIMITED_BYTES if self.has(source) else AMPLIFICATION * received_bytes


class MessageIds:
    """Message ids of this server's own: in order for each source, none twice within EXCHANGE_LIFETIME (RFC 7252 4.4), from a
    beginning that no other can guess."""

    def __init__(self, limits: Limits, *, clock: Clock) -> None:
        self._key = secrets.token_bytes(16)
        self._count = 0
        self.kept: ExpiringMap[Source, int] = ExpiringMap(
            max_entries=4 * limits.max_observers, lifetime_seconds=limits.exchange_lifetime_seconds, clock=clock
        )

    def next(self, source: Source) -> int:
        self._count += 1
        self.kept.expire()
        last = self.kept.get(source)
        number = self._first(source) if last is None else (last + 1) & 0xFFFF
        self.kept.put(source, number)
        return number

    def _first(self, source: Source) -> int:
        """A source that had to make room for others starts again."""
        own = blake2b(repr(source).encode(), key=self._key, digest_size=2).digest()
        return (self._count + int.from_bytes(own, "big")) & 0xFFFF


class ConcurrencyLimit:
    """How much of something each network has at the moment, so that none has it all."""

    def __init__(self, *, most: int) -> None:
        self._most = most
        self._held: Counter[str] = Counter()

    def take(self, host: str) -> bool:
        """False when the network has its share already."""
        key = network(host)
        if self._held[key] >= self._most:
            return False
        self._held[key] += 1
        return True

    def give_back(self, host: str) -> None:
        key = network(host)
        self._held[key] -= 1
        if not self._held[key]:
            del self._held[key]
