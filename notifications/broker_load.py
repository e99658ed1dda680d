"""What the MQTT broker says of itself: written by gateways, read by health and metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from aemos.lib import keys, redis

# Mosquitto says it every 10 s.
KEPT_SECONDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerLoad:
    """`held`: messages that wait in sessions for whoever is to have them. `dropped`: since the broker began, because a session
    held as many as it may; `dropped_at`: when that number last grew, as far as a gateway saw it, in epoch seconds.
    """

    held: int
    dropped: int
    dropped_at: float | None = None


def remember(*, held: int, dropped: int | None) -> None:
    """`dropped` None: the broker has not said it lately, so it has not grown. Raises RedisError."""
    before = _fields()
    if dropped is None:
        dropped = int(before.get("dropped", 0))
    fields: dict[str, float] = {"held": held, "dropped": dropped}
    if dropped > before.get("dropped", dropped):
        fields["dropped_at"] = time.time()
    with redis.client().pipeline() as pipeline:
        pipeline.hset(keys.BROKER_LOAD, mapping=fields)
        pipeline.expire(keys.BROKER_LOAD, KEPT_SECONDS)
        pipeline.execute()


def recall() -> BrokerLoad | None:
    """None when no gateway has heard of it for a minute. Raises RedisError."""
    fields = _fields()
    if not fields:
        return None
    return BrokerLoad(held=int(fields["held"]), dropped=int(fields["dropped"]), dropped_at=fields.get("dropped_at"))


def _fields() -> dict[str, float]:
    found: Any = redis.client().hgetall(keys.BROKER_LOAD)
    return {name.decode(): float(value) for name, value in found.items()}
