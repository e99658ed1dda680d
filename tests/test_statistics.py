"""How chains fare: counted in memory, added up over workers, and what fails too often in a row is suspended, not silently."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import OperationalError, connection
from django.test import Client
from prometheus_client.core import Metric
from rq.serializers import JSONSerializer

from aemos.lib import metrics
from rules.authoring import editing
from rules.effects import suspension
from rules.engine.bound import DeployedChain
from rules.engine.chains import Outcome
from rules.engine.exceptions import ChainFailed, ErrorCode
from rules.journal import tickets
from rules.models import Alarm, ChainStatistics, RuleChain
from rules.processing import statistics
from rules.processing.index import RuleIndex
from rules.processing.statistics import Runs, Statistics
from rules.worker import DrainWorker
from tests import builders

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis", "_old_times_count")]
NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
OUTCOME = Outcome(effects=(), missing=(), stopped_at=None, steps=3, filters_true=2, filters_false=1)


class Clock:
    """Seconds since noon, for both clocks of the statistics."""

    def __init__(self) -> None:
        self.now = 0.0

    def seconds(self) -> float:
        return self.now

    def moment(self) -> datetime:
        return NOON + timedelta(seconds=self.now)


class Worker:
    """What one worker process counts."""

    def __init__(self, clock: Clock) -> None:
        self.statistics = Statistics(clock.seconds, clock.moment)

    def batch(self, bound: DeployedChain, runs: str) -> None:
        """`runs`: one letter each, + for a success, - for a failure, r for one that failed again when it was retried."""
        batch = Runs()
        for letter in runs:
            if letter == "+":
                batch.completed(bound, OUTCOME, seconds=0.25)
            else:
                error = ChainFailed(bound.uuid, "dose", f"no value, {letter}")
                batch.failed(bound, error, seconds=0.25, is_retry=letter == "r")
        self.statistics.add(batch)

    def flush(self) -> None:
        self.statistics.flush(force=True)


def bound_chain(**fields: Any) -> DeployedChain:
    farm = builders.organization()
    row = builders.switching_chain(builders.sensor(farm), builders.device(farm), **fields)
    index = RuleIndex()
    index.refresh()
    found = index.by_uuid(str(row.uuid))
    assert found is not None
    return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def worker(clock: Clock) -> Worker:
    return Worker(clock)


def kept(bound: DeployedChain) -> ChainStatistics:
    return ChainStatistics.objects.get(chain_id=bound.id)


def test_the_runs_of_a_chain_are_added_up_in_its_row(worker: Worker, clock: Clock) -> None:
    bound = bound_chain()
    worker.batch(bound, "++-")
    worker.flush()
    clock.now = 60
    worker.batch(bound, "+")
    worker.flush()

    row = kept(bound)
    assert (row.executions, row.failures, row.failures_in_a_row, row.seconds) == (4, 1, 0, 1.0)
    assert (row.last_executed_at, row.last_failed_at) == (NOON + timedelta(seconds=60), NOON)
    assert row.last_error == "dose: no value, -"


@pytest.mark.parametrize(
    ("batches", "in_a_row"),
    [
        (["-"], 1),
        (["---"], 3),
        (["--", "--"], 4),
        (["--", "+"], 0),
        (["--", "+-"], 1),
        (["--", "-+--"], 2),
        (["+", "-"], 1),
        (["-rrr"], 1),
        (["-", "r", "r"], 1),
        (["--", "r+"], 0),
    ],
)
@pytest.mark.parametrize("flushing", ["between", "once", "two workers"])
def test_failures_in_a_row_end_with_a_success_and_retries_do_not_count(
    worker: Worker, clock: Clock, *, batches: list[str], in_a_row: int, flushing: str
) -> None:
    bound, workers = bound_chain(), [worker, Worker(clock)]
    for number, batch in enumerate(batches):
        by = workers[number % 2] if flushing == "two workers" else worker
        by.batch(bound, batch)
        if flushing != "once":
            by.flush()
    worker.flush()

    assert kept(bound).failures_in_a_row == in_a_row
    assert kept(bound).executions == sum(map(len, batches))
    assert kept(bound).failures == sum(batch.count("-") + batch.count("r") for batch in batches)


def test_writing_waits_two_seconds_unless_it_is_urgent(
    worker: Worker, clock: Clock, django_assert_num_queries: Any
) -> None:
    bounds = [bound_chain() for _ in range(3)]
    worker.batch(bounds[0], "+")
    worker.statistics.flush()
    clock.now = 1.9
    with django_assert_num_queries(0):
        for bound in bounds * 100:
            worker.batch(bound, "+")
            worker.statistics.flush()
    clock.now = 2.0
    with django_assert_num_queries(3):  # savepoint, one statement for all chains, release
        worker.statistics.flush()
    assert [kept(bound).executions for bound in bounds] == [101, 100, 100]
    with django_assert_num_queries(0):
        worker.flush()


def test_while_the_database_is_away_the_counts_wait(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: Any) -> Any:
        raise OperationalError("gone")

    bound = bound_chain()
    worker.batch(bound, "+-")
    with monkeypatch.context() as patched:
        patched.setattr(statistics, "_write", away)
        patched.setattr(connection, "close", lambda: None)  # the test's own transaction lives in it
        worker.flush()
    assert "the counts of 1 rule chains wait for the database: gone" in caplog.text
    assert not ChainStatistics.objects.exists()
    worker.batch(bound, "-")
    worker.flush()

    assert (kept(bound).executions, kept(bound).failures_in_a_row) == (3, 2)


def test_a_chain_that_was_deleted_meanwhile_is_left_out_and_the_others_are_written(worker: Worker) -> None:
    gone, stays = bound_chain(), bound_chain()
    for bound in (gone, stays):
        worker.batch(bound, "-" * 20)
    editing.delete(RuleChain.objects.get(pk=gone.id))
    worker.flush()

    assert ChainStatistics.objects.get().chain_id == stays.id
    assert list(Alarm.objects.values_list("chain_id", flat=True)) == [stays.id]


def test_more_chains_than_one_statement_takes_are_all_written(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "STATEMENT_ROWS", 2)
    bounds = [bound_chain() for _ in range(5)]
    for bound in bounds:
        worker.batch(bound, "+")
    worker.flush()

    assert ChainStatistics.objects.filter(executions=1).count() == 5


def test_an_error_of_any_length_and_text_is_kept_as_far_as_it_fits(worker: Worker) -> None:
    bound, batch = bound_chain(), Runs()
    batch.failed(bound, ChainFailed(bound.uuid, "dose", "nul \0 " + "ü" * 600), seconds=0.1, is_retry=False)
    worker.statistics.add(batch)
    worker.flush()

    assert kept(bound).last_error == "dose: nul  " + "ü" * 489


def test_a_chain_that_fails_too_often_in_a_row_is_suspended_with_an_alarm(
    worker: Worker, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings.RULE_CHAIN_MAX_CONSECUTIVE_FAILURES = 3
    bound, other = bound_chain(name="pH down"), bound_chain()
    index = RuleIndex()
    index.refresh()
    worker.batch(bound, "--")
    worker.batch(other, "--+--")
    worker.flush()
    assert not RuleChain.objects.exclude(suspended_at=None).exists()
    worker.batch(bound, "-")
    worker.flush()
    index.refresh(at_once=True)

    assert RuleChain.objects.exclude(suspended_at=None).get().pk == bound.id
    assert [each.id for each in index] == [other.id]
    reason = "pH down is suspended: it failed 3 times in a row, the last time at dose: no value, -"
    assert (Alarm.objects.get().chain_id, Alarm.objects.get().message) == (bound.id, reason)
    assert f"({bound.uuid}) is suspended: it failed 3 times in a row" in caplog.text


def test_a_chain_is_suspended_once_however_many_workers_find_it_failing(clock: Clock, settings: Any) -> None:
    settings.RULE_CHAIN_MAX_CONSECUTIVE_FAILURES = 2
    bound, workers = bound_chain(), [Worker(clock) for _ in range(3)]
    before = counted("rule_chains_suspended_total")
    for each in workers:
        each.batch(bound, "--")
    for each in workers:
        each.flush()

    assert kept(bound).failures_in_a_row == 6
    assert Alarm.objects.count() == 1
    assert counted("rule_chains_suspended_total") == before + 1


def test_chains_whose_data_could_not_be_read_in_time_are_not_suspended(worker: Worker, settings: Any) -> None:
    settings.RULE_CHAIN_MAX_CONSECUTIVE_FAILURES = 3
    bound, batch = bound_chain(), Runs()
    for _ in range(5):
        slow = ChainFailed(bound.uuid, "", "not read", code=ErrorCode.DATA_COLLECTION_TIMEOUT)
        batch.failed(bound, slow, seconds=5, is_retry=False)
    worker.statistics.add(batch)
    worker.flush()

    assert (kept(bound).failures, kept(bound).failures_in_a_row) == (5, 0)
    assert not RuleChain.objects.exclude(suspended_at=None).exists()


def test_without_a_limit_no_chain_is_suspended(worker: Worker, settings: Any) -> None:
    settings.RULE_CHAIN_MAX_CONSECUTIVE_FAILURES = 0
    worker.batch(bound_chain(), "-" * 100)
    worker.flush()

    assert not RuleChain.objects.exclude(suspended_at=None).exists()


def test_a_chain_that_is_off_or_gone_is_not_suspended() -> None:
    off = bound_chain()
    RuleChain.objects.update(enabled=False)

    assert suspension.suspend(off.id, "it failed") is False
    assert suspension.suspend(off.id + 1, "it failed") is False
    assert Alarm.objects.count() == 0


def test_a_lifted_chain_runs_again_counts_from_none_and_its_alarm_is_cleared(worker: Worker, settings: Any) -> None:
    settings.RULE_CHAIN_MAX_CONSECUTIVE_FAILURES = 3
    bound = bound_chain()
    worker.batch(bound, "---")
    worker.flush()
    row = RuleChain.objects.exclude(suspended_at=None).get()
    suspension.resume(row, by="Ada")
    index = RuleIndex()
    index.refresh()

    assert row.suspended_at is None
    assert len(index) == 1
    assert (Alarm.objects.get().state, Alarm.objects.get().cleared_by) == ("cleared", "Ada")
    assert (kept(bound).failures, kept(bound).failures_in_a_row) == (3, 0)
    worker.batch(bound, "--")
    worker.flush()
    assert not RuleChain.objects.exclude(suspended_at=None).exists()


def counted(sample: str, **labels: str) -> float:
    """As Prometheus would see it."""
    families: list[Metric] = list(metrics.collect())
    return sum(
        each.value
        for family in families
        for each in family.samples
        if each.name == sample and labels.items() <= each.labels.items()
    )


def test_a_batch_is_counted_for_prometheus(worker: Worker) -> None:
    bound, batch = bound_chain(), Runs()
    expected = {
        ("rule_execution_total", "result", "completed"): 2,
        ("rule_execution_total", "result", "failed"): 1,
        ("rule_filter_evaluations_total", "result", "true"): 4,
        ("rule_filter_evaluations_total", "result", "false"): 2,
        ("rule_timeout_total", "error_code", "RULE_CHAIN_TIMEOUT"): 1,
        ("rule_timeout_total", "error_code", "WORKER_TIMEOUT"): 0,
        ("rule_execution_duration_seconds_bucket", "le", "0.0005"): 1,
        ("rule_execution_duration_seconds_bucket", "le", "+Inf"): 3,
    }
    before = {key: counted(key[0], **{key[1]: key[2]}) for key in expected}
    batch.completed(bound, OUTCOME, seconds=0.0002)
    batch.completed(bound, OUTCOME, seconds=0.2)
    slow = ChainFailed(bound.uuid, "dose", "too slow", code=ErrorCode.RULE_CHAIN_TIMEOUT)
    batch.failed(bound, slow, seconds=31, is_retry=False)
    worker.statistics.add(batch)

    assert {key: counted(key[0], **{key[1]: key[2]}) - before[key] for key in expected} == expected


def test_every_error_code_has_its_counter_before_anything_took_too_long() -> None:
    family = metrics.RULE_TIMEOUTS.family({})

    assert {(each.labels["error_code"], each.value) for each in family.samples} == {(code, 0.0) for code in ErrorCode}


@pytest.mark.django_db(transaction=True)
def test_a_worker_writes_what_its_chains_did_before_it_ends(settings: Any) -> None:
    settings.RULE_CHAIN_MAX_CONSECUTIVE_FAILURES = 3
    farm = builders.organization()
    sensor, pump = builders.sensor(farm), builders.device(farm)
    good, bad = (builders.switching_chain(sensor, pump, name=name) for name in ("good", "bad"))
    bad.nodes.filter(name="switch").update(config=builders.command(pump, state="renamed meanwhile"))
    events = [{"values": {"ph": 5.0}, "timestamp": f"2026-05-01T12:00:{second:02}Z"} for second in range(3)]
    answer = Client().post(
        "/api/v1/telemetry",
        {"events": events},
        content_type="application/json",
        headers={"authorization": f"Bearer {builders.token(sensor)}"},
    )
    assert answer.status_code == 202
    queues = [tickets.queue_of(lane) for lane in settings.LANES]
    DrainWorker(queues, connection=queues[0].connection, serializer=JSONSerializer).work(burst=True)

    of = {row.chain_id: row for row in ChainStatistics.objects.all()}
    assert (of[good.pk].executions, of[good.pk].failures) == (3, 0)
    assert (of[bad.pk].executions, of[bad.pk].failures, of[bad.pk].failures_in_a_row) == (3, 3, 3)
    assert "renamed meanwhile" in of[bad.pk].last_error
    assert of[good.pk].seconds > 0
    assert RuleChain.objects.exclude(suspended_at=None).get() == bad


@pytest.mark.django_db(transaction=True)
def test_workers_that_write_at_the_same_time_lose_nothing(clock: Clock) -> None:
    if connection.vendor != "postgresql":
        pytest.skip("SQLite lets one process write at a time")
    bounds = [bound_chain() for _ in range(20)]

    def work(order: list[DeployedChain]) -> None:
        worker = Worker(clock)
        try:
            for _ in range(10):
                for bound in order:
                    worker.batch(bound, "+-")
                worker.flush()
        finally:
            connection.close()

    threads = [threading.Thread(target=work, args=(order,)) for order in (bounds, bounds[::-1], bounds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {(row.executions, row.failures) for row in ChainStatistics.objects.all()} == {(60, 30)}
