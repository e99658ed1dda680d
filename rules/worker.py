"""The RQ worker of AEMOS: it runs jobs without a fork, and while no job waits it listens to the journal."""

from __future__ import annotations

import logging
import time
from functools import cached_property
from math import ceil
from typing import Any

from django.conf import settings
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from rq import Queue, SimpleWorker
from rq.exceptions import StopRequested
from rq.job import Job
from rq.timeouts import JobTimeoutException
from rq.worker import WorkerStatus

from aemos.lib import metrics, redis
from aemos.lib.rate_limited_log import RateLimitedLog
from devices.quality import data_problems, sensor_clocks
from rules import jobs
from rules.journal import tickets
from rules.journal.listening import Listener
from rules.journal.slots import Slot
from rules.processing import statistics

log = logging.getLogger(__name__)
# So often a worker that listens looks for a job: a replay, or a ticket of before.
LISTEN_SECONDS = 0.5
# After another worker was faster, before the next look: under load that would otherwise happen all the time.
PAUSE_SECONDS = 0.02
# While Redis is away, so often RQ's calls look whether it is back.
RETRY_SECONDS = 1.0
FOR_EVER = -1


class DrainWorker(SimpleWorker):
    """Runs jobs in this process, without a fork for each: the compiled rules and the connections stay warm."""

    def work(self, burst: bool = False, **options: Any) -> bool:
        """RQ ends a worker when a call to Redis fails. Here the call waits until Redis is back, or a stop is asked for."""
        if not burst:
            self.connection.set_retry(Retry(ExponentialBackoff(cap=RETRY_SECONDS, base=0.1), FOR_EVER))
        return bool(super().work(burst, **options))

    def handle_warm_shutdown_request(self) -> None:
        super().handle_warm_shutdown_request()
        self._stop_requested = True
        self.connection.set_retry(Retry(NoBackoff(), 1))

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, Queue] | None:
        """The next job; until there is one, events are drained as they arrive. Without `timeout` it waits for neither."""
        if timeout is None or max_idle_time is not None:
            waited: tuple[Job, Queue] | None = super().dequeue_job_and_maintain_ttl(timeout, max_idle_time)
            return waited
        while True:
            found: tuple[Job, Queue] | None = super().dequeue_job_and_maintain_ttl(None)
            if found is not None:
                self._stop_listening()
                return found
            try:
                self.check_for_suspension(burst=False)
                if self._stop_requested:
                    raise StopRequested
                self._listen()
            except RedisError as error:
                self._log.log("redis", logging.WARNING, "waiting for Redis: %s", redis.explain(error))
            else:
                self._log.recovered("redis", "Redis is back")

    def _listen(self) -> None:
        """Drains what arrives, for half a second."""
        until = time.monotonic() + LISTEN_SECONDS
        while slot := self._listener.next(until=until):
            count = self._drain(slot)
            if self._stop_requested:
                raise StopRequested
            if count is None:
                time.sleep(PAUSE_SECONDS)
            else:
                self._listener.drained(slot, events=count)

    def _drain(self, slot: Slot) -> int | None:
        """As the job of a ticket: for no longer than that, and to its end when the worker is asked to stop."""
        self._state = WorkerStatus.BUSY
        try:
            with self.death_penalty_class(ceil(settings.WORKER_TIMEOUT_MS / 1_000), JobTimeoutException):
                return jobs.attend(slot)
        except RedisError:
            raise
        except Exception:  # process loop: as that of a job would, it ends the drain and not the worker
            log.exception("%s/%d was not drained to its end", slot.lane, slot.partition)
            return 0
        finally:
            self._state = WorkerStatus.IDLE

    def _stop_listening(self) -> None:
        """From here on appends queue tickets again; what came without one gets it now, or the scheduler sees to it."""
        try:
            tickets.issue_all(self._listener.leave())
        except RedisError as error:
            log.debug("still listening: %s", error)

    @cached_property
    def _log(self) -> RateLimitedLog:
        return RateLimitedLog(log)

    @cached_property
    def _listener(self) -> Listener:
        return Listener(self.name, self.queue_names())

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """Between two jobs, and every half a second of a worker that listens: counts do not wait for the next event."""
        try:
            super().heartbeat(timeout, pipeline)
        except RedisError as error:
            if self._stop_requested:
                raise StopRequested from error
            raise
        if pipeline is None:
            _flush()

    def teardown(self) -> None:
        self._stop_listening()
        _flush(force=True)
        try:
            super().teardown()
        except RedisError as error:
            log.warning("ends without taking its name off the list of workers: %s", redis.explain(error))


def _flush(*, force: bool = False) -> None:
    """Writes what was counted since the last time."""
    statistics.shared().flush(force=force)
    data_problems.shared().flush(force=force)
    sensor_clocks.shared().flush(force=force)
    metrics.flush()
