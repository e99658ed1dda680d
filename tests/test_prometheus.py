"""Prometheus' text: right with several processes, after kill -9 and without Redis; names as documented, labels bounded."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from django.test import Client
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from aemos.lib import keys, metrics, redis
from aemos.lib.counters import Counters
from deploy.local import LocalSystem, local_system
from deploy.programs import REPOSITORY
from monitoring.exposition import CIRCUIT_NUMBERS
from monitoring.queue import Health
from notifications import broker_load
from rules import jobs
from rules.admission import rejections
from rules.admission.circuit import State
from rules.admission.circuit_store import force
from rules.effects.alarm_lifecycle import Change
from rules.engine.exceptions import ErrorCode
from rules.journal import slots
from rules.processing import index
from tests import builders
from tests.system_clients import coap_post, reading
from tests.test_monitoring import redis_away
from tests.waiting import until

PAGE = REPOSITORY / "docs" / "monitoring.md"
# Of the families of django-prometheus and Python, which describe the web process itself.
FOREIGN = ("django_", "python_", "process_")
# Every label and, where there are few, all the values it may take.
LABELS: dict[str, set[str] | None] = {
    "lane": {"critical", "normal", "low"},
    "protocol": {"http", "mqtt", "coap", "socketio"},
    "source": {"device", "rule", "person"},
    "state": {"busy", "idle", "suspended", "sent", "acknowledged", "failed", "expired"},
    "change": set(Change),
    "error_code": set(ErrorCode),
    "result": None,
    "reason": None,
    "task": None,
    "part": None,
    "le": None,
}
FOREIGN_LABELS = {
    "method", "view", "status", "transport", "charset", "templatename", "type", "alias", "vendor", "le", "generation",
    "implementation", "major", "minor", "patchlevel", "version", "model", "cache", "backend", "app",
}  # fmt: skip


def parsed(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def scraped() -> dict[str, Metric]:
    answer = Client().get("/api/v1/metrics/prometheus")
    assert answer.status_code == 200
    return parsed(answer.text)


def value(families: dict[str, Metric], sample: str, **labels: str) -> float | None:
    """Of the one sample with this name and these labels; the sum where labels are left out; None without any."""
    found = [
        one.value
        for family in families.values()
        for one in family.samples
        if one.name == sample and labels.items() <= one.labels.items()
    ]
    return sum(found) if found else None


in_process = pytest.mark.usefixtures("empty_redis", "_old_times_count")
with_database = pytest.mark.django_db(transaction=True)


def post_here(token: str, ph: float, count: int = 1) -> int:
    body = {
        "events": [{"values": {"ph": ph}, "timestamp": f"2026-05-01T12:00:{second:02}Z"} for second in range(count)]
    }
    return (
        Client()
        .post(
            "/api/v1/telemetry",
            json.dumps(body),
            content_type="application/json",
            headers={"authorization": f"Bearer {token}"},
        )
        .status_code
    )


@in_process
@with_database
def test_what_happens_to_an_event_is_counted_and_told(settings: Any) -> None:
    settings.QUEUE_RECOVERY_THRESHOLD, settings.QUEUE_WARNING_THRESHOLD, settings.QUEUE_CRITICAL_THRESHOLD = 1, 2, 3
    farm = builders.organization()
    sensor, pump = builders.sensor(farm), builders.device(farm)
    builders.switching_chain(sensor, pump)
    token = builders.token(sensor)
    before = scraped()
    assert (post_here(token, 5.0, 3), post_here(token, 5.0)) == (202, 503)
    assert post_here(token, float("nan")) == 400
    rejections.shared().flush()
    index.shared().refresh(at_once=True)
    waiting = scraped()
    for slot in slots.slots():
        jobs.drain(slot.lane, slot.partition)
    after = scraped()

    def grown(sample: str, **labels: str) -> float:
        return (value(after, sample, **labels) or 0) - (value(before, sample, **labels) or 0)

    assert value(waiting, "rule_engine_queue_waiting", lane="normal") == 3
    assert value(waiting, "rule_engine_queue_total_pending") == 3
    assert value(waiting, "rule_engine_queue_health") == Health.CRITICAL
    assert value(after, "rule_engine_queue_waiting", lane="normal") == 0
    assert value(after, "rule_engine_queue_completed", lane="normal") == 3
    assert value(after, "rule_engine_backpressure_rejected_total", reason="hard-limit") == 1
    assert value(after, "rule_engine_backpressure_threshold_critical") == 3
    assert grown("telemetry_ingestion_total", protocol="http", result="accepted") == 3
    assert grown("telemetry_ingestion_total", protocol="http", result="hard-limit") == 1
    assert grown("rule_execution_total", result="completed") == 3
    assert grown("rule_action_executions_total") == 3
    assert grown("rule_execution_duration_seconds_count") == 3
    assert grown("rule_execution_duration_seconds_bucket", le="+Inf") == 3
    assert grown("data_collection_duration_seconds_count") == 1
    assert grown("rejected_unrecorded_total") == 0


@in_process
@with_database
@pytest.mark.parametrize("state", list(State))
def test_the_state_of_the_circuit_is_a_number(state: State) -> None:
    force(state, actor="operator", queue_depth=0)
    seen = value(scraped(), "rule_engine_backpressure_circuit_state")
    # An idle queue takes the circuit on from OPEN, but not at once; HALF_OPEN closes at the first sample.
    assert seen in {CIRCUIT_NUMBERS[state], CIRCUIT_NUMBERS[State.CLOSED] if state == State.HALF_OPEN else None}
    assert CIRCUIT_NUMBERS == {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}


@in_process
@with_database
def test_without_redis_the_scrape_tells_what_is_known(settings: Any) -> None:
    force(State.OPEN, actor="operator", queue_depth=0)
    with redis_away(settings):
        families = scraped()
    assert value(families, "rule_engine_queue_health") == -1
    assert value(families, "rule_engine_backpressure_circuit_state") == 2
    assert value(families, "rule_engine_backpressure_threshold_critical") == settings.QUEUE_CRITICAL_THRESHOLD
    assert value(families, "rule_engine_queue_waiting") is None
    assert value(families, "telemetry_ingestion_total") is None
    assert any(name.startswith("django_http_") for name in families)


@in_process
@with_database
def test_every_metric_is_described_on_its_page_and_no_other() -> None:
    post_here(builders.token(builders.sensor(builders.organization())), 6.0)
    broker_load.remember(held=0, dropped=0)
    names = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in scraped().values()
        if not family.name.startswith(FOREIGN)
    }
    described = re.findall(
        r"^\| `([a-z_]+)(?:\{\w+(?:, \w+)*\})?` \|", PAGE.read_text().partition("## Logs")[0], re.MULTILINE
    )
    assert sorted(names) == sorted(set(described))
    assert len(described) == len(set(described))


@in_process
@with_database
def test_labels_have_few_values_and_the_page_names_them() -> None:
    sensor = builders.sensor(builders.organization())
    post_here(builders.token(sensor), 6.0)
    Client().get(f"/api/v1/sensors/{sensor.uuid}")
    families = scraped()
    for family in families.values():
        foreign = family.name.startswith(FOREIGN)
        for sample in family.samples:
            allowed = FOREIGN_LABELS if foreign else LABELS.keys()
            assert sample.labels.keys() <= allowed, sample
            assert str(sensor.uuid) not in sample.labels.values()
            for label, word in sample.labels.items():
                values = None if foreign else LABELS[label]
                assert values is None or word in values, sample
    for name, labels in re.findall(
        r"^\| `([a-z_]+)\{([\w, ]+)\}` \|", PAGE.read_text().partition("## Logs")[0], re.MULTILINE
    ):
        family = families[name.removesuffix("_total")]
        used = {label for sample in family.samples for label in sample.labels}
        assert not family.samples or used == set(labels.split(", ")), name


def sums() -> dict[str, float]:
    return {name.decode(): float(number) for name, number in redis.client().hgetall(keys.METRICS).items()}


@pytest.mark.usefixtures("empty_redis")
def test_each_count_is_added_once() -> None:
    counting = Counters()
    counting.add("a")
    counting.add("a", 2.5)
    counting.flush()
    counting.flush()
    counting.add("b")
    counting.flush()
    assert sums() == {"a": 3.5, "b": 1}


@pytest.mark.usefixtures("empty_redis")
def test_counts_wait_while_redis_is_away_and_are_added_when_it_is_back(settings: Any) -> None:
    counting = Counters()
    counting.add("a")
    with redis_away(settings):
        counting.try_flush()
        counting.add("a")
        counting.try_flush()
    assert sums() == {}
    counting.try_flush()
    assert sums() == {"a": 2}


COUNT = """
import os, sys
import django
django.setup()
from aemos.lib.counters import Counters
counters = Counters()
for number in range(1000):
    counters.add("a")
    if sys.argv[1] == "flush" and number % 100 == 0:
        counters.flush()
if sys.argv[1] == "fork" and os.fork() == 0:
    counters.add("b")
"""


def counting_process(then: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "aemos.settings"}
    command = (sys.executable, "-c", COUNT, then)
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.usefixtures("empty_redis")
def test_counts_of_several_processes_add_up_and_a_fork_counts_for_itself() -> None:
    processes = [counting_process(then) for then in ("flush", "flush", "fork")]
    for process in processes:
        process.communicate(timeout=30)
        assert process.returncode == 0
    until(lambda: sums() == {"a": 3_000, "b": 1})


def test_a_metric_with_other_labels_than_it_has_is_refused() -> None:
    with pytest.raises(ValueError, match="has the labels"):
        metrics.INGESTED.labels("http")


def test_a_bound_of_a_histogram_belongs_to_its_bucket() -> None:
    sums: dict[tuple[str, ...], float] = {("h", "0.1"): 2.0, ("h", "1.0"): 1.0, ("h", "+Inf"): 1.0, ("h", "sum"): 5.5}
    family = metrics.Histogram("h", "A test.", (0.1, 1.0)).family(sums)
    assert [(sample.name, sample.labels.get("le"), sample.value) for sample in family.samples] == [
        ("h_bucket", "0.1", 2.0),
        ("h_bucket", "1.0", 3.0),
        ("h_bucket", "+Inf", 4.0),
        ("h_count", None, 4.0),
        ("h_sum", None, 5.5),
    ]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSystem]:
    with local_system(tmp_path_factory.mktemp("system"), WEB_WORKERS="2") as running:
        running.start("web", "worker", "scheduler")
        # One that is still starting gives up when Redis hangs, and whoever runs it would have to start it again.
        until(lambda: (value(scrape(running), "rule_engine_workers") or 0) >= 1)
        yield running


def scrape(system: LocalSystem) -> dict[str, Metric]:
    answer = requests.get(f"{system.web}/api/v1/metrics/prometheus", timeout=10)
    assert answer.status_code == 200
    return parsed(answer.text)


def send(system: LocalSystem, requests_count: int) -> None:
    assert set(statuses(system, requests_count)) == {202}


def awake(system: LocalSystem) -> list[int]:
    """The statuses of what was sent until none was refused: a web worker that has just begun may be too busy to hear Redis'
    answer in time for its first requests.
    """
    answered: list[int] = []

    def none_is_refused() -> bool:
        newest = statuses(system, 12)
        answered.extend(newest)
        return set(newest) == {202}

    until(none_is_refused)
    return answered


def statuses(system: LocalSystem, requests_count: int) -> list[int]:
    """Each on a connection of its own, four at a time, so that both workers get some."""
    sensor = system.farm["sensors"][0]

    def one(_: int) -> int:
        return requests.post(
            f"{system.web}/api/v1/telemetry",
            json={"values": {"ph": 6.9}},
            headers={"Authorization": f"Bearer {sensor['token']}"},
            timeout=10,
        ).status_code

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, range(requests_count)))


def web_workers(system: LocalSystem) -> list[int]:
    """Those that live, by what the master and the system say."""
    pids = map(int, re.findall(r"Booting worker with pid: (\d+)", system.log("web")))
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def counted(system: LocalSystem) -> list[float]:
    """What django-prometheus, the web workers, the worker and the journal each say of the same number of readings."""
    families = scrape(system)
    numbers = (
        value(families, "django_http_requests_total_by_method_total", method="POST"),
        value(families, "telemetry_ingestion_total", protocol="http", result="accepted"),
        # Two chains of the demo farm wait for each reading.
        (value(families, "rule_execution_total", result="completed") or 0) / 2,
        value(families, "rule_engine_queue_completed", lane="normal"),
    )
    return [number or 0 for number in numbers]


def until_counted(system: LocalSystem, wanted: list[float]) -> None:
    deadline = time.monotonic() + 20
    while (seen := counted(system)) != wanted:
        assert time.monotonic() < deadline, f"{seen} instead of {wanted}"
        time.sleep(0.1)


def test_two_web_workers_are_added_up_and_what_they_flushed_outlives_a_kill_9(system: LocalSystem) -> None:
    awake(system)
    base = settled(system)
    send(system, 60)
    workers = web_workers(system)
    assert len(workers) == 2
    until_counted(system, [number + 60 for number in base])
    os.kill(workers[0], signal.SIGKILL)
    until(lambda: len(web_workers(system)) == 2)
    until_counted(system, [number + 60 for number in base])
    answered, before = awake(system), base
    base = settled(system)
    grown = [len(answered), answered.count(202)]
    assert base[:2] == [number + 60 + more for number, more in zip(before[:2], grown, strict=True)], "nothing is lost"
    send(system, 20)
    until_counted(system, [number + 20 for number in base])
    assert counted(system) == [number + 20 for number in base], "nothing is counted twice"


def test_a_killed_worker_leaves_its_counts_and_its_successor_adds_to_them(system: LocalSystem) -> None:
    awake(system)
    base = settled(system)
    system.kill("worker")
    system.start("worker")
    assert settled(system) == base
    send(system, 10)
    until_counted(system, [number + 10 for number in base])


def settled(system: LocalSystem) -> list[float]:
    """The counts when nothing waits any more and they have stopped growing."""
    until(lambda: value(scrape(system), "rule_engine_queue_total_pending") == 0)
    seen: list[list[float]] = [[]]

    def still() -> bool:
        time.sleep(0.5)
        seen.append(counted(system))
        return seen[-1] == seen[-2]

    until(still)
    return seen[-1]


def test_only_the_web_process_writes_into_its_folder(system: LocalSystem) -> None:
    folder = Path(system.environment["VAR_DIR"]) / "prometheus"
    master = system.pid("web")
    started = {int(pid) for pid in re.findall(r"Booting worker with pid: (\d+)", system.log("web"))} | {master}
    written = {int(re.findall(r"_(\d+)\.db", file.name)[0]) for file in folder.glob("*/*.db")}
    assert written
    assert written <= started


def test_a_web_process_that_starts_again_begins_at_nothing_and_sums_grow_on(system: LocalSystem) -> None:
    send(system, 5)
    before = settled(system)
    system.stop("web")
    system.start("web")
    posts, *sums = counted(system)
    assert posts == 0
    assert sums == before[1:]


def test_redis_that_hangs_costs_a_scrape_less_than_three_seconds(system: LocalSystem) -> None:
    assert system.redis.pid is not None
    os.kill(system.redis.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        families = scrape(system)
        assert time.monotonic() - began < 3
        assert value(families, "rule_engine_queue_health") == -1
        assert requests.get(f"{system.web}/api/v1/health", timeout=10).status_code == 503
    finally:
        os.kill(system.redis.pid, signal.SIGCONT)
    until(lambda: value(scrape(system), "rule_engine_queue_health") == 0)


def test_what_a_gateway_takes_in_is_counted_beside_what_the_web_takes_in(system: LocalSystem) -> None:
    system.start("gateway")
    assert coap_post(system, system.farm["sensors"][0], reading(ph=6.9)) == ("2.04", "")
    until(lambda: value(scrape(system), "telemetry_ingestion_total", protocol="coap", result="accepted") == 1)
    system.kill("gateway")
    assert value(scrape(system), "telemetry_ingestion_total", protocol="coap", result="accepted") == 1


def test_a_worker_that_runs_is_seen(system: LocalSystem) -> None:
    until(lambda: (value(scrape(system), "rule_engine_workers") or 0) >= 1)
    body = requests.get(f"{system.web}/api/v1/metrics/queue/summary", timeout=10).json()
    assert (body["health"], body["queueDepth"], body["circuitState"]) == ("healthy", 0, "CLOSED")
