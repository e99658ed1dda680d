"""Health, readiness, queue and reset: what is shown, to whom, and while Redis or the database is away."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from rq import suspension

from aemos.lib import keys, per_process, redis
from deploy import servers
from deploy.programs import REPOSITORY
from devices.models import Sensor
from devices.people.jwt import AccessToken
from monitoring.queue import Health, health_of
from rules.admission import rejections
from rules.admission.circuit import State, Thresholds
from rules.admission.circuit_store import force
from rules.journal import queue_stats, slots, tickets
from rules.journal.lease import Finished, Lease
from rules.journal.slots import Slot
from rules.models import CircuitTransition
from rules.worker import DrainWorker
from tests import builders

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]
READING = {"values": {"ph": 6.1}}
WATCHED = ("health", "metrics/queue", "metrics/queue/summary", "metrics/prometheus")
TOKEN = "scrape-" + "x" * 32
OURS = "127.0.0.1"


@pytest.fixture
def sensor() -> Sensor:
    return builders.sensor(builders.organization())


@pytest.fixture
def production(settings: Any) -> Any:
    settings.AEMOS_ENV = "production"
    return settings


def get(path: str, **headers: Any) -> Any:
    return Client().get(f"/api/v1/{path}", headers=headers)


def get_json(path: str) -> dict[str, Any]:
    found: dict[str, Any] = get(path).json()
    return found


def post(sensor: Sensor, count: int = 1, kind: str = "telemetry-data") -> int:
    """Events of this type in one request; the status of the answer."""
    body = {"events": [{**READING, "type": kind}] * count}
    token = builders.token(sensor, highest_priority=1)
    answer = Client().post(
        "/api/v1/telemetry",
        json.dumps(body),
        content_type="application/json",
        headers={"authorization": f"Bearer {token}"},
    )
    return answer.status_code


def slot_of(sensor: Sensor, lane: str = "normal") -> Slot:
    return Slot(lane, slots.partition_of(str(sensor.uuid)))


def bearer(person: Any) -> dict[str, str]:
    return {"authorization": f"Bearer {AccessToken.for_user(person)}"}


@contextmanager
def redis_away(settings: Any) -> Iterator[None]:
    """This process looks for Redis where none is."""
    port = settings.REDIS_PORT
    settings.REDIS_PORT = servers.free_port()
    per_process.forget_all()
    yield
    settings.REDIS_PORT = port
    per_process.forget_all()


THRESHOLDS = Thresholds(recovery=5_000, warning=10_000, critical=50_000)


@pytest.mark.parametrize(
    ("depth", "memory_full", "health"),
    [
        (0, False, Health.HEALTHY),
        (4_999, False, Health.HEALTHY),
        (5_000, False, Health.DEGRADED),
        (9_999, False, Health.DEGRADED),
        (10_000, False, Health.WARNING),
        (49_999, False, Health.WARNING),
        (50_000, False, Health.CRITICAL),
        (2**40, False, Health.CRITICAL),
        (0, True, Health.CRITICAL),
    ],
)
def test_health_follows_the_depth(depth: int, memory_full: bool, health: Health) -> None:
    assert health_of(depth, THRESHOLDS, memory_full=memory_full) is health


@pytest.mark.parametrize(
    ("events", "word", "status"),
    [(0, "healthy", 200), (5, "degraded", 200), (10, "warning", 200), (20, "critical", 503)],
)
def test_health_over_http_says_how_full_the_queue_is(
    events: int, word: str, status: int, sensor: Sensor, settings: Any
) -> None:
    settings.QUEUE_RECOVERY_THRESHOLD, settings.QUEUE_WARNING_THRESHOLD, settings.QUEUE_CRITICAL_THRESHOLD = 5, 10, 20
    if events:
        assert post(sensor, events) == 202
    answer = get("health")
    assert (answer.status_code, answer.json()["status"], answer.json()["queueDepth"]) == (status, word, events)


def test_an_idle_system_has_the_summary_of_old() -> None:
    worker = registered_worker()
    assert get_json("metrics/queue/summary") == {
        "health": "healthy",
        "queueDepth": 0,
        "workers": 1,
        "circuitState": "CLOSED",
        "rejectedCount": 0,
    }
    worker.register_death()


def test_health_says_when_backpressure_is_off(settings: Any) -> None:
    settings.ENABLE_BACKPRESSURE = False
    body = get_json("health")
    assert body["backpressureEnabled"] is False
    assert any("ENABLE_BACKPRESSURE" in problem for problem in body["problems"])
    assert get_json("metrics/queue")["circuit"]["backpressureEnabled"] is False


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("appendfsync", "everysec", "set appendfsync always"),
        ("appendonly", "no", "set appendonly yes"),
        ("maxmemory-policy", "allkeys-lru", "set maxmemory-policy noeviction"),
    ],
)
def test_health_says_when_redis_may_lose_accepted_events(setting: str, value: str, sentence: str) -> None:
    worker = registered_worker()
    assert get_json("health")["problems"] == []
    before = redis.client().config_get(setting)[setting]
    redis.client().config_set(setting, value)
    try:
        (problem,) = get_json("health")["problems"]
        assert sentence in problem
    finally:
        redis.client().config_set(setting, before)
        worker.register_death()


def test_the_queue_counts_every_event_once_in_its_lane_and_state(sensor: Sensor) -> None:
    post(sensor, 7)
    post(sensor, 3, "critical-alarm")
    post(sensor, 5, "batch-operation")
    work_on(slot_of(sensor), processed=2, duplicate=1, dead=1, delayed=1)
    post(sensor, 4)

    body = get_json("metrics/queue")
    normal = body["lanes"]["normal"]
    counts = {name: normal[name] for name in ("accepted", "waiting", "active", "delayed", "completed", "failed")}
    assert counts == {"accepted": 11, "waiting": 4, "active": 2, "delayed": 1, "completed": 3, "failed": 1}
    assert {lane: found["waiting"] for lane, found in body["lanes"].items()} == {"critical": 3, "normal": 4, "low": 5}
    assert body["totals"]["accepted"] == 19
    assert body["queueDepth"] == sum(body["totals"][name] for name in ("waiting", "active", "delayed")) == 15


def work_on(slot: Slot, *, processed: int, duplicate: int, dead: int, delayed: int) -> None:
    """Splits the slot's only entry: so many events have ended so, one waits for another attempt, the rest is being worked on."""
    lease = Lease(slot, "test")
    assert lease.acquire()
    (entry,) = lease.next(10)
    client, stream = redis.client(), keys.events(slot.lane, slot.partition)
    ended = Finished(
        processed=processed, duplicate=duplicate, dead=dead, delayed=[(2**40, b"retry %d" % i) for i in range(delayed)]
    )
    assert lease.finish(ended)
    # What is left of the entry stays with the worker.
    left = entry.count - processed - duplicate - dead - delayed
    client.xack(stream, slots.GROUP, entry.id)
    client.xdel(stream, entry.id)
    client.xadd(stream, {"n": left, "b": entry.data})
    assert [taken.count for taken in lease.next(10)] == [left]


def test_the_age_of_the_oldest_event_is_told_per_lane(sensor: Sensor) -> None:
    post(sensor)
    slot = slot_of(sensor, "low")
    past = int(time.time() * 1000) - 90_000
    redis.client().xadd(keys.events(slot.lane, slot.partition), {"n": 1, "b": b""}, id=f"{past}-0")

    lanes = get_json("metrics/queue")["lanes"]
    assert lanes["critical"]["oldestAgeSeconds"] is None
    assert 0 <= lanes["normal"]["oldestAgeSeconds"] < 60
    assert 90 <= lanes["low"]["oldestAgeSeconds"] < 150


def test_the_circuit_is_told_with_thresholds_age_and_refusals(sensor: Sensor, settings: Any) -> None:
    settings.QUEUE_RECOVERY_THRESHOLD, settings.QUEUE_WARNING_THRESHOLD, settings.QUEUE_CRITICAL_THRESHOLD = 5, 10, 20
    assert post(sensor, 20) == 202
    assert post(sensor, 3) == 503
    assert post(sensor, 1, "batch-operation") == 503
    rejections.shared().flush()

    circuit = get_json("metrics/queue")["circuit"]
    assert circuit["thresholds"]["configured"] == {"recovery": 5, "warning": 10, "critical": 20}
    assert circuit["thresholds"]["effective"] == {"recovery": 5, "warning": 10, "critical": 20}
    assert circuit["rejectedCount"] == sum(circuit["rejectedByReason"].values()) == 4
    assert circuit["utilizationPercent"] == 100.0
    assert (circuit["stale"], circuit["lastStateChange"], circuit["stateAgeMs"]) == (False, None, None)


def test_what_could_not_be_kept_is_not_counted_as_refused_twice() -> None:
    redis.client().hset(keys.REJECTED, mapping={"circuit-open": 5, rejections.UNRECORDED: 3})
    circuit = get_json("metrics/queue")["circuit"]
    assert (circuit["rejectedCount"], circuit["rejectedByReason"]) == (5, {"circuit-open": 5})


def test_an_open_circuit_is_told_with_the_time_of_its_change() -> None:
    force(State.OPEN, actor="operator", queue_depth=0)
    circuit = get_json("metrics/queue")["circuit"]
    assert circuit["state"] == "OPEN"
    assert 0 <= circuit["stateAgeMs"] < 60_000
    assert circuit["lastStateChange"].startswith(str(timezone.now().year))


def registered_worker() -> DrainWorker:
    worker = DrainWorker([tickets.queue_of(lane) for lane in ("critical", "normal", "low")], connection=redis.client())
    worker.register_birth()
    return worker


def workers_by_name() -> dict[str, queue_stats.Worker]:
    return {worker.name: worker for worker in queue_stats.measure().workers}


def test_living_workers_are_listed_with_state_and_slot() -> None:
    idle, busy = registered_worker(), registered_worker()
    tickets.issue(Slot("normal", 3))
    busy.set_state("busy")
    redis.client().hset(busy.key, "current_job", tickets.queue_of("normal").job_ids[0])

    found = workers_by_name()
    assert (found[idle.name].state, found[idle.name].lane, found[idle.name].partition) == ("idle", None, None)
    assert (found[busy.name].state, found[busy.name].lane, found[busy.name].partition) == ("busy", "normal", 3)
    assert found[idle.name].last_heartbeat is not None
    suspension.suspend(redis.client())
    assert queue_stats.measure().workers_by_state == {"busy": 1, "idle": 0, "suspended": 1}
    body = get_json("metrics/queue")["workers"]
    assert (body["busy"], body["suspended"], len(body["list"])) == (1, 1, 2)


def test_a_worker_that_missed_its_heartbeat_is_not_counted() -> None:
    living, dead = registered_worker(), registered_worker()
    # RQ sets the end of the key a minute behind the next heartbeat.
    redis.client().pexpire(dead.key, 59_000)
    assert workers_by_name().keys() == {living.name}


def test_a_worker_whose_key_is_gone_is_neither_counted_nor_cleaned_up() -> None:
    gone = registered_worker()
    redis.client().delete(gone.key)
    assert queue_stats.measure().workers == []
    assert redis.client().smembers(DrainWorker.redis_workers_keys) == {gone.key.encode()}


def test_one_look_takes_few_round_trips(sensor: Sensor) -> None:
    post(sensor, 5)
    get_json("metrics/queue")
    registered_worker()
    before = redis.client().info("commandstats")
    queue_stats.measure()
    after = redis.client().info("commandstats")
    evals = [stats.get("cmdstat_eval", {}).get("calls", 0) for stats in (before, after)]
    assert evals[1] - evals[0] == len(list(slots.slots()))


def test_liveness_touches_neither_database_nor_redis(settings: Any) -> None:
    with redis_away(settings), CaptureQueriesContext(connection) as queries:
        answer = get("health/liveness")
    assert (answer.status_code, answer.json(), len(queries)) == (200, {"status": "alive"}, 0)


def test_readiness_is_200_when_database_and_redis_answer() -> None:
    answer = get("health/readiness")
    assert (answer.status_code, answer.json()) == (
        200,
        {"status": "ready", "checks": {"database": "ok", "redis": "ok"}, "circuitState": "CLOSED"},
    )


def test_readiness_names_redis_when_it_is_away(settings: Any) -> None:
    with redis_away(settings):
        answer = get("health/readiness")
    assert (answer.status_code, answer.json()["checks"]) == (503, {"database": "ok", "redis": "unreachable"})
    assert get("health/readiness").status_code == 200


@pytest.mark.parametrize(("fails", "status"), [(False, 200), (True, 503)])
def test_an_open_circuit_leaves_the_instance_ready_unless_it_is_wanted_otherwise(
    fails: bool, status: int, settings: Any
) -> None:
    settings.READINESS_FAILS_WHEN_OPEN = fails
    force(State.OPEN, actor="operator", queue_depth=0)
    answer = get("health/readiness")
    assert (answer.status_code, answer.json()["circuitState"]) == (status, "OPEN")


def test_without_redis_health_is_unknown_and_what_the_database_knows_is_told(settings: Any) -> None:
    force(State.OPEN, actor="operator", queue_depth=0)
    with redis_away(settings):
        for path, key in (("health", "status"), ("metrics/queue", "health"), ("metrics/queue/summary", "health")):
            answer = get(path)
            assert (answer.status_code, answer.json()[key]) == (503, "unknown")
        summary, queue = get("metrics/queue/summary").json(), get("metrics/queue").json()
    assert summary == {
        "health": "unknown",
        "queueDepth": None,
        "workers": None,
        "circuitState": "OPEN",
        "rejectedCount": None,
    }
    assert (queue["lanes"], queue["workers"], queue["circuit"]["state"]) == (None, None, "OPEN")
    assert queue["circuit"]["thresholds"]["configured"]["critical"] == settings.QUEUE_CRITICAL_THRESHOLD


def test_while_redis_hangs_every_answer_comes_within_three_seconds(tmp_path: Path, settings: Any) -> None:
    own = servers.start_redis(tmp_path)
    settings.REDIS_PORT, settings.REDIS_PASSWORD = own.port, own.password
    per_process.forget_all()
    try:
        assert own.pid is not None
        assert get("health").status_code == 200
        os.kill(own.pid, signal.SIGSTOP)
        for path, status in (("health", 503), ("health/readiness", 503), ("metrics/queue/summary", 503)):
            began = time.monotonic()
            assert get(path).status_code == status
            assert time.monotonic() - began < 3
        os.kill(own.pid, signal.SIGCONT)
        deadline = time.monotonic() + 5
        while get("health").status_code != 200:
            assert time.monotonic() < deadline
        assert get("health/readiness").status_code == 200
    finally:
        own.kill()
        per_process.forget_all()


UNREACHABLE = """
import json, time
import gevent.monkey
gevent.monkey.patch_all()
import django
django.setup()
from django.test import Client
began = time.monotonic()
answer = Client(SERVER_NAME="localhost").get("/api/v1/health/readiness")
print(json.dumps([answer.status_code, answer.json(), time.monotonic() - began]))
"""


def test_readiness_names_the_database_when_it_is_away_or_hangs(tmp_path: Path) -> None:
    """A listener that never answers hangs like a database that was stopped."""
    with socket.create_server((OURS, 0)) as silent:
        asked = [asked_of_database_at(port, tmp_path) for port in (servers.free_port(), silent.getsockname()[1])]
        for process in asked:
            output, _ = process.communicate(timeout=30)
            status, body, seconds = json.loads(output.splitlines()[-1])
            assert (status, body["checks"]) == (503, {"database": "unreachable", "redis": "ok"})
            assert seconds < 4


def asked_of_database_at(port: int, folder: Path) -> subprocess.Popen[str]:
    variables = {"DB_ENGINE": "postgresql", "DB_PORT": str(port), "DB_NAME": "none", "VAR_DIR": str(folder)}
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "aemos.settings", **variables}
    command = (sys.executable, "-c", UNREACHABLE)
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("path", WATCHED)
@pytest.mark.parametrize("environment", ["production", "staging"])
def test_in_production_and_staging_strangers_see_nothing(path: str, environment: str, settings: Any) -> None:
    settings.AEMOS_ENV = environment
    answer = get(path)
    assert (answer.status_code, answer["WWW-Authenticate"]) == (401, "Bearer")


@pytest.mark.parametrize("path", WATCHED)
@pytest.mark.parametrize("environment", ["development", "test"])
def test_in_development_anybody_sees_everything(path: str, environment: str, settings: Any) -> None:
    settings.AEMOS_ENV = environment
    assert get(path).status_code == 200


@pytest.mark.parametrize("path", ["health/liveness", "health/readiness"])
def test_probes_need_no_login_anywhere(path: str, production: Any) -> None:
    assert get(path).status_code == 200


@pytest.mark.parametrize("path", WATCHED)
def test_the_metrics_token_opens_the_metrics_and_nothing_else(path: str, production: Any) -> None:
    production.METRICS_TOKEN = TOKEN
    assert get(path, authorization=f"Bearer {TOKEN}").status_code == 200
    assert get(path, authorization=f"bearer {TOKEN}").status_code == 200
    for wrong in (f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer", "Bearer ü", f"Basic {TOKEN}", f"Token {TOKEN}"):
        assert get(path, authorization=wrong).status_code == 401, wrong
    assert get("sensors", authorization=f"Bearer {TOKEN}").status_code == 401


@pytest.mark.parametrize("path", WATCHED)
def test_without_a_configured_token_an_empty_one_opens_nothing(path: str, production: Any) -> None:
    assert production.METRICS_TOKEN == ""
    for empty in ("Bearer ", "Bearer", ""):
        assert get(path, authorization=empty).status_code == 401


@pytest.mark.parametrize("path", WATCHED)
def test_staff_see_the_metrics_and_members_do_not(path: str, production: Any, sensor: Sensor) -> None:
    member, staff = builders.member(sensor.organization, "admin"), builders.user(is_staff=True)
    assert get(path, **bearer(member)).status_code == 403
    assert get(path, **bearer(staff)).status_code == 200
    client = Client()
    client.force_login(staff)
    assert client.get(f"/api/v1/{path}").status_code == 200


@pytest.mark.parametrize(
    ("peer", "status"),
    [("10.1.2.3", 200), ("::ffff:10.1.2.3", 200), ("fd00::5", 200), ("10.2.0.1", 401), ("", 401), ("fd01::1", 401)],
)
def test_an_allowed_network_is_that_of_the_connection(peer: str, status: int, production: Any) -> None:
    production.METRICS_ALLOWED_NETWORKS = [ip_network("10.1.0.0/16"), ip_network("fd00::/64")]
    assert Client(REMOTE_ADDR=peer).get("/api/v1/metrics/prometheus").status_code == status


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Client-IP"])
def test_what_a_header_says_of_the_address_is_not_believed(header: str, production: Any) -> None:
    production.METRICS_ALLOWED_NETWORKS = [ip_network("10.1.0.0/16")]
    client = Client(REMOTE_ADDR="192.0.2.1")
    assert client.get("/api/v1/metrics/prometheus", headers={header: "10.1.2.3"}).status_code == 401


def test_a_network_that_is_none_stops_the_start(tmp_path: Path) -> None:
    ended = subprocess.run(
        (sys.executable, "manage.py", "check"),
        cwd=REPOSITORY,
        env={**os.environ, "METRICS_ALLOWED_NETWORKS": "10.0.0.0/8,10.0.0.1/8,home", "VAR_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 1
    assert "METRICS_ALLOWED_NETWORKS holds '10.0.0.1/8'" in ended.stderr
    assert "METRICS_ALLOWED_NETWORKS holds 'home'" in ended.stderr


RESET = "/api/v1/metrics/backpressure/reset"


def test_staff_reset_the_circuit_and_the_log_says_who(sensor: Sensor) -> None:
    force(State.OPEN, actor="operator", queue_depth=0)
    post(sensor, 3, "critical-alarm")
    answer = Client().post(RESET, headers=bearer(builders.user("grower", is_staff=True)))

    body = {"circuitState": "CLOSED", "previousState": "OPEN", "queueDepth": 3, "resetBy": "grower"}
    assert (answer.status_code, answer.json()) == (200, body)
    written = CircuitTransition.objects.first()
    assert written is not None
    assert (written.from_state, written.to_state) == ("OPEN", "CLOSED")
    assert (written.reason, written.actor, written.queue_depth) == ("manual-reset", "grower", 3)


def test_an_admin_session_resets_only_with_its_csrf_token() -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(builders.user("grower", is_staff=True))
    assert client.post(RESET).status_code == 403
    client.get("/admin/password_change/")
    token = client.cookies["csrftoken"].value
    assert client.post(RESET, headers={"X-CSRFToken": token}).status_code == 200
    assert CircuitTransition.objects.get().actor == "grower"


def test_nobody_else_resets_the_circuit(settings: Any, sensor: Sensor) -> None:
    settings.METRICS_TOKEN = TOKEN
    settings.METRICS_ALLOWED_NETWORKS = [ip_network("127.0.0.0/8")]
    basic = base64.b64encode(b"grower:secret").decode()
    strangers = ("", f"Bearer {TOKEN}", f"Bearer {builders.token(sensor)}", f"Basic {basic}")
    assert [Client().post(RESET, headers={"authorization": word}).status_code for word in strangers] == [401] * 4
    member = builders.member(sensor.organization, "admin")
    assert Client().post(RESET, headers=bearer(member)).status_code == 403
    former = builders.user(is_staff=True, is_active=False)
    assert Client().post(RESET, headers=bearer(former)).status_code == 401
    assert get("metrics/backpressure/reset").status_code in (401, 405)
    assert CircuitTransition.objects.count() == 0


def test_a_reset_works_while_redis_is_away_and_says_that_the_depth_is_not_known(settings: Any) -> None:
    force(State.OPEN, actor="operator", queue_depth=0)
    with redis_away(settings):
        answer = Client().post(RESET, headers=bearer(builders.user(is_staff=True)))
    assert (answer.status_code, answer.json()["queueDepth"]) == (200, None)
    assert get_json("metrics/queue/summary")["circuitState"] == "CLOSED"


@pytest.mark.parametrize(
    ("path", "schema"), [("health", "Health"), ("metrics/queue", "Queue"), ("metrics/queue/summary", "Summary")]
)
def test_answers_are_as_the_api_describes_them(path: str, schema: str, sensor: Sensor) -> None:
    post(sensor)
    registered_worker()
    described = get("schema", accept="application/json").json()["components"]["schemas"]
    compare(get_json(path), described[schema], described)


def compare(value: Any, schema: dict[str, Any], described: dict[str, Any]) -> None:
    """Every key of an object is described, and every key that is described is there."""
    reference = schema.get("$ref") or next((part["$ref"] for part in schema.get("allOf", [])), None)
    if reference:
        schema = described[reference.rsplit("/", 1)[1]]
    if isinstance(value, list):
        for item in value:
            compare(item, schema["items"], described)
    elif isinstance(value, dict):
        extra = schema.get("additionalProperties")
        assert extra or value.keys() == schema["properties"].keys()
        for name, item in value.items():
            compare(item, extra or schema["properties"][name], described)


def test_probes_answer_head_and_refuse_to_be_posted_to() -> None:
    assert Client().head("/api/v1/health/liveness").status_code == 200
    assert Client().post("/api/v1/health/readiness").status_code == 405


def test_prometheus_gets_its_text_whatever_it_accepts() -> None:
    """A scraper asks for OpenMetrics first; one that takes anything gets the same."""
    for accept in ("application/openmetrics-text;version=1.0.0", "text/plain", "*/*", "image/png"):
        answer = get("metrics/prometheus", accept=accept)
        assert (answer.status_code, answer["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
