"""Queue and deliveries of the last hour: a sample every ten seconds in Redis, written by the scheduler, for people who look.

It is no replacement for Prometheus: it is there at once, without anything to set up, and holds an hour.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec

from aemos.lib import keys, metrics, redis
from devices.exceptions import Overloaded
from notifications.models import Delivery
from rules.admission import control
from rules.journal import ledger

EVERY_SECONDS = 10
SAMPLES = 3_600 // EVERY_SECONDS
_DELIVERED = frozenset({Delivery.State.SENT.value, Delivery.State.ACKNOWLEDGED.value})


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """`at` in seconds since 1970; `depth`: lane -> events; since the beginning: `accepted` and `ended` events, `delivered`
    messages by protocol, and those that nobody got.
    """

    at: int
    depth: Mapping[str, int]
    accepted: int
    ended: int
    circuit: str
    delivered: Mapping[str, float] = {}
    undelivered: float = 0


def record() -> None:
    """Writes a sample if the last one is old enough: called by the scheduler, every second. Raises RedisError."""
    client = redis.client()
    if not client.set(keys.QUEUE_SAMPLED, "1", nx=True, px=EVERY_SECONDS * 1_000 - 500):
        return
    counted, delivered = ledger.counts(), _deliveries()
    sample = Sample(
        at=int(time.time()),
        depth=counted.depth,
        accepted=sum(counted.accepted.values()),
        ended=sum(counted.ended.values()),
        circuit=_circuit(),
        delivered={protocol: number for protocol, number in delivered.items() if protocol},
        undelivered=delivered[""],
    )
    with client.pipeline() as pipeline:
        pipeline.rpush(keys.QUEUE_SAMPLES, msgspec.json.encode(sample))
        pipeline.ltrim(keys.QUEUE_SAMPLES, -SAMPLES, -1)
        pipeline.execute()


def samples() -> list[Sample]:
    """Of the last hour, the oldest first. Raises RedisError."""
    since = time.time() - SAMPLES * EVERY_SECONDS
    found: list[Any] = redis.client().lrange(keys.QUEUE_SAMPLES, 0, -1)
    return [sample for sample in (msgspec.json.decode(each, type=Sample) for each in found) if sample.at > since]


def _deliveries() -> Counter[str]:
    """Protocol -> messages that were sent or acknowledged; "" -> those that failed or expired, of all protocols."""
    found: Counter[str] = Counter()
    for (name, *labels), number in metrics.sums().items():
        if name == metrics.NOTIFICATIONS_SENT.name:
            protocol, state = labels
            found[protocol if state in _DELIVERED else ""] += int(number)
    return found


def _circuit() -> str:
    try:
        return str(control.shared().snapshot().circuit.state)
    except Overloaded:
        return ""
