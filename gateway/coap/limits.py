"""The bounds of a CoAP endpoint, and what it counts."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait for the ACK, and how many times the message may still be sent again."""

    timeout_seconds: float
    retries_left: int

    def longer(self) -> Backoff:
        return Backoff(self.timeout_seconds * 2, self.retries_left - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Every bound of an endpoint. Sums at the defaults: about 18 MB of replies, 8 MB of bodies, 5 MB of observers."""

    # A handler mostly waits for the journal; more at once than this only queue up there, so the rest is answered 5.03.
    max_handlers: int = 256
    # Whoever asks for what takes long (or hangs) leaves room for everybody else.
    max_handlers_per_source: int = 128
    busy_retry_seconds: int = 5
    # Notifications ask the same handler; a small pool of their own keeps a broadcast from pushing requests out.
    max_notifiers: int = 16
    # A farm has some thousand devices, each observing itself; one host may stand for all devices behind a router.
    max_observers: int = 4096
    max_observers_per_source: int = 1024
    # An observer is sent the state again after so long, changed or not: one that hears nothing for longer knows that it
    # is no longer on the list, and one that left is found out and forgotten.
    refresh_seconds: float = 45.0
    # Bodies in either direction. A batch of some hundred events; larger ones belong on HTTP.
    max_body_bytes: int = 64 * 1024
    # RFC 7959's largest block; with headers it fits every path without fragments.
    block_bytes: int = 1024
    # A diagnostic payload is one sentence (RFC 7252 5.5.2).
    max_error_bytes: int = 512
    # Bodies under way, at most max_body_bytes each. A block that is not there 60 s after the one before, when a client
    # has sent it five times, is not coming.
    max_uploads: int = 64
    max_downloads: int = 64
    transfer_lifetime_seconds: float = 60.0
    # De-duplication: EXCHANGE_LIFETIME (RFC 7252 4.8.2). The size covers 8 s at 2,000 requests/s, beyond the first two
    # retransmissions; at the 50/s of a large farm it covers the whole lifetime.
    max_exchanges: int = 16384
    exchange_lifetime_seconds: float = 247.0
    # Token bucket per host: 200/s lets the devices behind one router report every five seconds.
    requests_per_second: float = 200.0
    request_burst: int = 400
    max_sources: int = 4096
    # RFC 7252 4.8: the client sends again after 2 s, so the empty ACK leaves after one.
    ack_delay_seconds: float = 1.0
    ack_timeout_seconds: float = 2.0
    ack_random_factor: float = 1.5
    max_retransmits: int = 4
    # Confirmable messages to peers that do not acknowledge; separate responses on top of it are sent once.
    max_unacknowledged: int = 8192
    # RFC 7641 4.5 asks for a confirmable notification at least every 24 hours; every tenth finds the dead much sooner.
    confirm_every: int = 10
    confirm_within_seconds: float = 86400.0

    def first_backoff(self) -> Backoff:
        factor = random.uniform(1.0, self.ack_random_factor)  # noqa: S311  spreads retransmissions, guards nothing
        return Backoff(self.ack_timeout_seconds * factor, self.max_retransmits)

    def next_refresh_seconds(self) -> float:
        """Observers that registered at the same time are not to be notified at the same time for ever."""
        return self.refresh_seconds * random.uniform(0.8, 1.0)  # noqa: S311  spreads the load, guards nothing

    @property
    def tick_seconds(self) -> float:
        return min(self.ack_delay_seconds, self.ack_timeout_seconds) / 10


DEFAULT_LIMITS = Limits()


@dataclass(slots=True)
class Stats:
    """Counted since the start; `observers` is the number now."""

    requests: int = 0  # well-formed, within the rate and seen for the first time
    duplicates: int = 0
    malformed: int = 0  # datagrams that are no request this server understands
    refused_busy: int = 0
    rate_limited: int = 0
    observers: int = 0
    notifications: int = 0
    timeouts: int = 0  # confirmable messages given up
    errors: int = 0  # exceptions of handlers and in handling datagrams
