"""Failed attempts to prove who one is, counted over all processes by address and by account: too many close the door for a while.

Kept in Redis. While it does not answer, each process counts for itself: the door neither stands open, nor is it shut for those
who come to see what is wrong.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from django.conf import settings
from redis.exceptions import RedisError

from aemos.lib import keys, redis

# Of one process while Redis is away; who tries more addresses than this begins anew with some of them.
MAXIMUM_KNOWN = 10_000
_IPV6_OF_ONE_SITE = 64


@dataclass(frozen=True, slots=True)
class Limit:
    """So many failures within so many seconds, from the first one on, and the door is closed until they are over."""

    name: str
    failures: int
    seconds: int


ADDRESS = Limit("address", 10, 60)
ACCOUNT = Limit("account", 10, 300)
# Sensors that go on with a revoked token behind one address cost no other sensor there anything: only the failures are refused.
TOKEN_ADDRESS = Limit("token-address", 60, 60)

_alone: dict[str, tuple[int, float]] = {}


def seconds_closed(tried: Mapping[Limit, str]) -> int:
    """How long the door stays closed for what is tried, such as {ADDRESS: "10.0.0.9", ACCOUNT: "ada"}; 0 when it is open."""
    names = {limit: _key(limit, text) for limit, text in tried.items()}
    try:
        with redis.client().pipeline(transaction=False) as pipeline:
            for name in names.values():
                pipeline.get(name).pttl(name)
            answers = pipeline.execute()
    except RedisError:
        found = [_alone.get(name, (0, 0.0)) for name in names.values()]
        counts = [(count, ends - time.monotonic()) for count, ends in found]
    else:
        counts = [(int(count or 0), left / 1000) for count, left in zip(answers[::2], answers[1::2], strict=True)]
    return _wait(names, counts)


def count(tried: Mapping[Limit, str]) -> int:
    """Counts one failure of each. Returns for how many seconds the door is closed to the next one; 0 when it stays open."""
    names = {limit: _key(limit, text) for limit, text in tried.items()}
    try:
        with redis.client().pipeline(transaction=False) as pipeline:
            for limit, name in names.items():
                pipeline.set(name, 0, ex=limit.seconds, nx=True).incr(name).pttl(name)
            answers = pipeline.execute()
    except RedisError:
        counts = [_count_alone(name, limit) for limit, name in names.items()]
    else:
        counts = [(number, left / 1000) for number, left in zip(answers[1::3], answers[2::3], strict=True)]
    return _wait(names, counts)


def address_of(headers: Mapping[str, str]) -> str:
    """The client's address in a WSGI environment: what the proxy in front appended last, because senders can write the rest.
    Of an IPv6 address the network of the site, inside which anybody may choose."""
    forwarded = headers.get("HTTP_X_FORWARDED_FOR", "") if settings.BEHIND_TLS_PROXY else ""
    text = forwarded.rsplit(",", 1)[-1].strip() or headers.get("REMOTE_ADDR", "")
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return text
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, _IPV6_OF_ONE_SITE), strict=False))
    return str(getattr(address, "ipv4_mapped", None) or address)


def _wait(limits: Iterable[Limit], counts: Iterable[tuple[int, float]]) -> int:
    waits = [left for limit, (number, left) in zip(limits, counts, strict=True) if number >= limit.failures]
    return max(0, math.ceil(max(waits, default=0)))


def _key(limit: Limit, text: str) -> str:
    # Hashed: whoever writes a password into the field of the name does not want it kept.
    return keys.failures(limit.name, hashlib.sha256(text.encode()).hexdigest()[:32])


def _count_alone(name: str, limit: Limit) -> tuple[int, float]:
    now = time.monotonic()
    number, ends = _alone.get(name, (0, 0.0))
    if len(_alone) >= MAXIMUM_KNOWN:
        _alone.clear()
    number, ends = _alone[name] = (number + 1, ends) if ends > now else (1, now + limit.seconds)
    return number, ends - now
