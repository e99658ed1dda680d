"""Counters of many processes on many machines, summed in Redis.

A process counts in memory and adds what is new to the sums about every second. One that is killed takes the counts of its last
second with it: the exact account of events is the ledger of the journal.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
from collections import defaultdict

import gevent
from gevent import monkey
from redis.exceptions import RedisError

from aemos.lib import keys, redis
from aemos.lib.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
FLUSH_SECONDS = 1.0


class Counters:
    """What this process counts. Under gevent it is flushed a second after the first `add`; elsewhere somebody calls `flush`."""

    def __init__(self) -> None:
        self._log = RateLimitedLog(log)
        self._counts: defaultdict[str, float]
        self._adding: threading.Lock
        self._flushing: threading.Lock
        self._scheduled: bool
        self.discard()
        os.register_at_fork(after_in_child=self.discard)  # the counts of a parent are its own to flush
        atexit.register(self._flush_last)

    def add(self, name: str, amount: float = 1.0) -> None:
        with self._adding:
            self._counts[name] += amount
        if not self._scheduled:
            self._schedule()

    def flush(self) -> None:
        """Adds what is new to the sums in Redis. Raises RedisError; then it is kept for the next time.

        An answer that does not come leaves open whether Redis has added: then the numbers of one flush may count twice.
        """
        with self._flushing:
            with self._adding:
                counts, self._counts = self._counts, defaultdict(float)
            if not counts:
                return
            try:
                with redis.client().pipeline() as pipeline:
                    for name, number in counts.items():
                        pipeline.hincrbyfloat(keys.METRICS, name, number)
                    pipeline.execute()
            except RedisError:
                for name, number in counts.items():
                    self.add(name, number)
                raise

    def try_flush(self) -> bool:
        """As `flush`; False when Redis is unavailable."""
        try:
            self.flush()
        except RedisError as error:
            self._log.log("redis", logging.WARNING, "Counts wait for Redis: %s", redis.explain(error))
            return False
        return True

    def _schedule(self) -> None:
        # Where gevent does not run, no greenlet would ever have its turn.
        self._scheduled = True
        if monkey.is_module_patched("socket"):
            gevent.spawn_later(FLUSH_SECONDS, self._flush_later)

    def _flush_later(self) -> None:
        self._scheduled = False
        if not self.try_flush():
            self._schedule()

    def _flush_last(self) -> None:
        with contextlib.suppress(RedisError):  # at exit there is nobody to read a log line, and no next time
            self.flush()

    def discard(self) -> None:
        """Forgets what is not flushed."""
        self._counts = defaultdict(float)
        self._adding = threading.Lock()
        self._flushing = threading.Lock()
        self._scheduled = False
