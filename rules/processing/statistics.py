"""Statistics of chains: count the runs of each batch for Prometheus and in one row per chain.

A worker adds up in memory and writes every two seconds, whatever the number of events. A worker that is killed takes the counts
of its last seconds with it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.conf import settings
from django.db import Error as DatabaseError
from django.db import connection, transaction
from django.utils import timezone

from aemos.lib import metrics
from aemos.lib.batched import batched
from aemos.lib.per_process import per_process
from aemos.lib.text import storable
from rules.effects import suspension
from rules.engine.bound import DeployedChain
from rules.engine.chains import Outcome
from rules.engine.exceptions import ChainFailed, ErrorCode

log = logging.getLogger(__name__)
FLUSH_SECONDS = 2.0
# A row has eight values, and SQLite takes 32,766 in one statement.
STATEMENT_ROWS = 4_000
LAST_ERROR_CHARACTERS = 500


@dataclass(slots=True)
class Count:
    """How one chain fared in some runs. An event that fails again when it is retried is one failure in a row."""

    executions: int = 0
    failures: int = 0
    failures_in_a_row: int = 0
    seconds: float = 0.0
    last_executed_at: datetime | None = None
    last_failed_at: datetime | None = None
    last_error: str = ""

    def add(self, later: Count) -> None:
        succeeded = later.executions > later.failures
        self.failures_in_a_row = later.failures_in_a_row + (0 if succeeded else self.failures_in_a_row)
        self.executions += later.executions
        self.failures += later.failures
        self.seconds += later.seconds
        self.last_executed_at = later.last_executed_at
        if later.last_failed_at:
            self.last_failed_at, self.last_error = later.last_failed_at, later.last_error


class Runs:
    """The runs of one batch. Counted when the batch stands: one that is rolled back will run again."""

    def __init__(self) -> None:
        self.by_chain: dict[int, Count] = {}
        self._seconds: list[float] = []
        self._actions = self._filters_true = self._filters_false = 0
        self._timeouts: Counter[str] = Counter()

    def completed(self, bound: DeployedChain, outcome: Outcome, *, seconds: float) -> None:
        self._count(bound.id, seconds).failures_in_a_row = 0
        self._actions += len(outcome.effects)
        self._filters_true += outcome.filters_true
        self._filters_false += outcome.filters_false

    def failed(self, bound: DeployedChain, error: ChainFailed, *, seconds: float, is_retry: bool) -> None:
        count = self._count(bound.id, seconds)
        count.failures += 1
        # When Redis is slow, every chain fails: switching them all off would turn a bad minute into a dry greenhouse.
        count.failures_in_a_row += not is_retry and error.code != ErrorCode.DATA_COLLECTION_TIMEOUT
        count.last_error = storable(f"{error.node}: {error.cause}", LAST_ERROR_CHARACTERS)
        if error.code:
            self._timeouts[error.code] += 1

    def _count(self, chain_id: int, seconds: float) -> Count:
        count = self.by_chain.get(chain_id)
        if count is None:
            count = self.by_chain[chain_id] = Count()
        count.executions += 1
        count.seconds += seconds
        self._seconds.append(seconds)
        return count

    def tell_metrics(self) -> None:
        """Once a batch: counting one by one would take as long as a filter."""
        failed = sum(count.failures for count in self.by_chain.values())
        metrics.RULE_EXECUTIONS.labels("completed").inc(len(self._seconds) - failed)
        metrics.RULE_EXECUTIONS.labels("failed").inc(failed)
        metrics.RULE_SECONDS.observe_all(self._seconds)
        metrics.RULE_ACTIONS.inc(self._actions)
        metrics.RULE_FILTERS.labels("true").inc(self._filters_true)
        metrics.RULE_FILTERS.labels("false").inc(self._filters_false)
        for code, number in self._timeouts.items():
            metrics.RULE_TIMEOUTS.labels(code).inc(number)


class Statistics:
    """What this process has counted and not yet written; at most one count for each chain."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], datetime] = timezone.now
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._flushed_at = float("-inf")
        self._waiting: dict[int, Count] = {}

    def add(self, runs: Runs) -> None:
        """Takes over the runs of a batch that was committed."""
        if not runs.by_chain:
            return
        runs.tell_metrics()
        now = self._wall_clock()
        for count in runs.by_chain.values():
            count.last_executed_at = now
            count.last_failed_at = now if count.failures else None
        self._merge(runs.by_chain)

    def flush(self, *, force: bool = False) -> None:
        """Writes what is new, and suspends chains that fail too often; at most every two seconds unless `force`.

        When the database is away, says so and keeps the counts for the next time.
        """
        now = self._clock()
        if not self._waiting or (not force and now - self._flushed_at < FLUSH_SECONDS):
            return
        self._flushed_at = now
        taken, self._waiting = self._waiting, {}
        try:
            in_a_row = _write(taken)
        except DatabaseError as error:
            log.warning("the counts of %d rule chains wait for the database: %s", len(taken), error)
            connection.close()  # a broken connection must not be used again
            self._waiting = taken
            return
        _suspend_failing({pk: in_a_row[pk] for pk, count in taken.items() if count.failures and pk in in_a_row}, taken)

    def _merge(self, counts: dict[int, Count]) -> None:
        for pk, count in counts.items():
            self._waiting.setdefault(pk, Count()).add(count)


@per_process
def shared() -> Statistics:
    """The statistics of this process."""
    return Statistics()


def _suspend_failing(in_a_row: dict[int, int], taken: dict[int, Count]) -> None:
    """Should this not be reached after the counts were written, the next failure finds them as high."""
    limit = settings.RULE_CHAIN_MAX_CONSECUTIVE_FAILURES
    for pk, number in in_a_row.items():
        if limit and number >= limit:
            try:
                suspension.suspend(pk, f"it failed {number} times in a row, the last time at {taken[pk].last_error}")
            except DatabaseError as error:
                log.error("a failing rule chain could not be suspended: %s", error)
                connection.close()
                return


COLUMNS = "chain_id, executions, failures, failures_in_a_row, seconds, last_executed_at, last_failed_at, last_error"
_KINDS = ("bigint", "bigint", "bigint", "bigint", "float8", "timestamptz", "timestamptz", "text")
# Several workers add to the same rows. Only the trailing failures count as in a row, and after them those of before, unless
# there was a success since. A chain that was deleted meanwhile is left out. Always in the same order: no two workers deadlock.
_STATEMENT = f"""
WITH incoming ({COLUMNS}) AS (ROWS)
INSERT INTO rules_chainstatistics AS kept ({COLUMNS})
SELECT incoming.* FROM incoming JOIN rules_rulechain ON rules_rulechain.id = incoming.chain_id WHERE true ORDER BY chain_id
ON CONFLICT (chain_id) DO UPDATE SET
    executions = kept.executions + excluded.executions,
    failures = kept.failures + excluded.failures,
    failures_in_a_row = excluded.failures_in_a_row
        + CASE WHEN excluded.executions > excluded.failures THEN 0 ELSE kept.failures_in_a_row END,
    seconds = kept.seconds + excluded.seconds,
    last_executed_at = excluded.last_executed_at,
    last_failed_at = COALESCE(excluded.last_failed_at, kept.last_failed_at),
    last_error = CASE WHEN excluded.last_failed_at IS NULL THEN kept.last_error ELSE excluded.last_error END
RETURNING chain_id, failures_in_a_row
"""  # noqa: S608  nothing in it comes from outside


def _write(counts: dict[int, Count]) -> dict[int, int]:
    """One statement for up to 4,000 chains; gives, for each that still exists, its failures in a row."""
    found: dict[int, int] = {}
    rows = [_row(pk, count) for pk, count in counts.items()]
    with transaction.atomic(), connection.cursor() as cursor:
        for batch in batched(rows, STATEMENT_ROWS):
            statement, parameters = _statement(batch)
            cursor.execute(statement, parameters)
            found |= dict(cursor.fetchall())
    return found


def _row(pk: int, count: Count) -> tuple[Any, ...]:
    executed, failed = (
        connection.ops.adapt_datetimefield_value(moment) for moment in (count.last_executed_at, count.last_failed_at)
    )
    return (
        pk, count.executions, count.failures, count.failures_in_a_row, count.seconds, executed, failed, count.last_error,
    )  # fmt: skip


def _statement(rows: Sequence[tuple[Any, ...]]) -> tuple[str, list[Any]]:
    if connection.vendor == "postgresql":
        arrays = ", ".join(f"%s::{kind}[]" for kind in _KINDS)
        values = f"SELECT * FROM unnest({arrays})"  # noqa: S608  as above
        return _STATEMENT.replace("ROWS", values), [list(column) for column in zip(*rows, strict=True)]
    places = ", ".join([f"({', '.join(['%s'] * len(_KINDS))})"] * len(rows))
    return _STATEMENT.replace("ROWS", f"VALUES {places}"), [value for row in rows for value in row]
