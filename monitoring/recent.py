"""The queue of the last hour: a sample every ten seconds in Redis, written by the scheduler, for people who look.

It is no replacement for Prometheus: it is there at once, without anything to set up, and holds an hour.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from aemos.lib import keys, redis
from devices.exceptions import Overloaded
from rules.admission import control
from rules.journal import ledger

EVERY_SECONDS = 10
SAMPLES = 3_600 // EVERY_SECONDS


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """`at` in seconds since 1970; `depth`: lane -> events; `accepted` and `ended`: events since the beginning."""

    at: int
    depth: Mapping[str, int]
    accepted: int
    ended: int
    circuit: str


def record() -> None:
    """Writes a sample if the last one is old enough: called by the scheduler, every second. Raises RedisError."""
    client = redis.client()
    if not client.set(keys.QUEUE_SAMPLED, "1", nx=True, px=EVERY_SECONDS * 1_000 - 500):
        return
    counted = ledger.counts()
    sample = Sample(
        at=int(time.time()),
        depth=counted.depth,
        accepted=sum(counted.accepted.values()),
        ended=sum(counted.ended.values()),
        circuit=_circuit(),
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


def _circuit() -> str:
    try:
        return str(control.shared().snapshot().circuit.state)
    except Overloaded:
        return ""
