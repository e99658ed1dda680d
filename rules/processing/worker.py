"""The RQ worker of AEMOS: it runs jobs without a fork, and flushes what it has counted between two jobs."""

from __future__ import annotations

from typing import Any

from rq import SimpleWorker

from rules.processing import statistics


class DrainWorker(SimpleWorker):
    """Runs jobs in this process, without a fork for each: the compiled rules and the connections stay warm."""

    # After Redis was away, look again soon: RQ's own pause grows to a minute.
    max_connection_wait_time = 3.0

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """Between two jobs, and every few seconds of an idle worker: the counts of the last events do not wait for the next."""
        super().heartbeat(timeout, pipeline)
        if pipeline is None:
            statistics.shared().flush()

    def teardown(self) -> None:
        statistics.shared().flush(force=True)
        super().teardown()
