"""How fast the queue drains and fills, measured once for all processes: by the scheduler that leads, every second.

Each process measures for itself, too, and goes by that while no scheduler runs.
"""

from __future__ import annotations

import msgspec

from aemos.lib import keys, redis

EXPIRY_SECONDS = 5


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Events per second, by lane; None where it is not known yet. `total` is the cautious one that limits follow from."""

    drained: dict[str, float | None]
    arrived: dict[str, float | None]
    total: float | None


_decoder = msgspec.json.Decoder(Measured)


def publish(measured: Measured) -> None:
    """Raises RedisError."""
    redis.client().set(keys.RATES, msgspec.json.encode(measured), ex=EXPIRY_SECONDS)


def recall() -> Measured | None:
    """The newest; None when no scheduler has published for some seconds. Raises RedisError."""
    found = redis.client().get(keys.RATES)
    return _decoder.decode(found) if found else None
