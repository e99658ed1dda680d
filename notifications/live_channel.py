"""Live readings on their way to people: what a worker has stored in, what somebody watches out on a Redis channel.

This is for looking on, not a promise: nothing is kept, and what a gateway misses is in the readings. While nobody watches
it costs a look at Redis once a second.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec
from redis.exceptions import RedisError

from aemos.lib import keys, metrics, redis
from aemos.lib.per_process import per_process

log = logging.getLogger(__name__)
REFRESH_SECONDS = 1.0
# A gateway says again what it wants well before; one that died is forgotten then.
WANTED_SECONDS = 30.0

# Variable id, timestamp in us, the number or the text that was measured, and why rules do not believe it.
Reading = tuple[int, int, float | None, str | None, str | None]
_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(list[Reading])


class WatchedVariables:
    """The ids of the variables that somebody watches, at most a second old."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked_at = float("-inf")
        self._ids: frozenset[int] = frozenset()

    def ids(self) -> frozenset[int]:
        """As they were when Redis last answered: that it does not is for others to say."""
        if self._clock() - self._looked_at >= REFRESH_SECONDS:
            self._looked_at = self._clock()
            try:
                self._ids = frozenset(map(int, redis.client().zrange(keys.LIVE_READINGS_WATCHED, 0, -1)))
            except RedisError as error:
                log.debug("Nobody knows who watches: %s", redis.explain(error))
        return self._ids


@per_process
def shared() -> WatchedVariables:
    return WatchedVariables()


def select(stored: Iterable[Reading | None], *, wanted: frozenset[int]) -> list[Reading]:
    """Those that somebody watches; None stands for a reading that is not new."""
    if not wanted:
        return []
    return [row for row in stored if row is not None and row[0] in wanted]


def publish(rows: Sequence[Reading]) -> None:
    """After the commit. Without Redis they are counted as lost, and nobody waits."""
    if not rows:
        return
    try:
        redis.client().publish(keys.LIVE_READINGS, _encode([tuple(row) for row in rows]))
    except RedisError as error:
        metrics.LIVE_READINGS.labels("lost").inc(len(rows))
        log.warning("%d live readings were not published: %s", len(rows), redis.explain(error))
        return
    metrics.LIVE_READINGS.labels("published").inc(len(rows))


def decode(data: bytes) -> list[Reading]:
    """msgspec.MsgspecError when the bytes are no readings."""
    return _decoder.decode(data)


def subscribe(ids: Sequence[int], *, now: float) -> None:
    """A gateway's clients watch these variables; to be said again within WANTED_SECONDS. Raises RedisError."""
    with redis.client().pipeline(transaction=False) as pipeline:
        pipeline.zremrangebyscore(keys.LIVE_READINGS_WATCHED, "-inf", now)
        if ids:
            pipeline.zadd(keys.LIVE_READINGS_WATCHED, dict.fromkeys(map(str, ids), now + WANTED_SECONDS))
            pipeline.expire(keys.LIVE_READINGS_WATCHED, int(WANTED_SECONDS))
        pipeline.execute()
