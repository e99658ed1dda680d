"""The RQ worker and job classes of AEMOS: jobs from Redis in, only known functions with JSON arguments run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rq import SimpleWorker
from rq.job import Job
from rq.utils import import_attribute

# Whoever can write to Redis can name any importable function in a job. Only these are ever called.
ALLOWED_FUNCTIONS = frozenset({"rules.jobs.drain", "rules.replay.step"})


class ForbiddenJob(Exception):
    """A job in Redis names a function that workers do not run."""


class AllowedJob(Job):
    """A job that runs only what is listed, without callbacks and web hooks: those too are names and URLs in Redis."""

    @property
    def func(self) -> Callable[..., Any]:
        if self.func_name not in ALLOWED_FUNCTIONS or self.instance:
            raise ForbiddenJob(f"{self.func_name!r} is not a function that workers run")
        function: Callable[..., Any] = import_attribute(self.func_name)
        return function

    def restore(self, raw_data: dict[str, Any]) -> None:
        super().restore(raw_data)
        self._success_callback_name = self._failure_callback_name = self._stopped_callback_name = None
        self.webhooks: list[Any] = []


class DrainWorker(SimpleWorker):
    """Runs jobs in this process, without a fork for each: the compiled rules and the connections stay warm."""

    # After Redis was away, look again soon: RQ's own pause grows to a minute.
    max_connection_wait_time = 3.0

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """Between two jobs, and every few seconds of an idle worker: the counts of the last events do not wait for the next."""
        super().heartbeat(timeout, pipeline)
        if pipeline is None:
            _flush_statistics()

    def teardown(self) -> None:
        _flush_statistics(force=True)
        super().teardown()


def _flush_statistics(*, force: bool = False) -> None:
    from rules import statistics  # here, because whoever queues a ticket imports this module and needs no rules

    statistics.shared().flush(force=force)
