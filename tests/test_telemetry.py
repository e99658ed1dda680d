"""POST /api/v1/telemetry as a sensor sees it: answers, refusals and what is kept of them."""

from __future__ import annotations

import gzip
import json
from datetime import timedelta
from typing import Any

import gevent
import pytest
from django.db import OperationalError, connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from gevent.event import AsyncResult
from redis.exceptions import RedisError

from aemos.lib import per_process
from devices import catalogue
from devices.models import DataProblem, DeviceToken, Sensor, Variable
from devices.quality import data_problems
from rules.admission import control, rejections
from rules.admission.control import Admission
from rules.journal import ledger, slots
from rules.journal.group_commit import GroupCommit
from rules.journal.ledger import Account
from rules.models import RejectedEvent
from tests import builders
from tests.problems import problem

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("empty_redis")]
READING = {"values": {"ph": 6.1}}


@pytest.fixture
def sensor() -> Sensor:
    return builders.sensor(builders.organization())


def post(body: Any, token: str = "", **headers: str) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body)
    if token:
        headers["authorization"] = f"Bearer {token}"
    return Client().post("/api/v1/telemetry", content, content_type="application/json", headers=headers)


def accepted() -> int:
    return sum((ledger.audit(slot) for slot in slots.slots()), Account()).accepted


def test_a_batch_is_accepted_as_a_whole_and_counted_in_events(sensor: Sensor) -> None:
    answer = post({"events": [READING] * 250}, builders.token(sensor))

    assert (answer.status_code, answer.json()) == (202, {"accepted": 250, "rejected": 0})
    assert accepted() == 250


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ({"events": [READING, {"values": {"ec": 1}}], "strict": True}, 400, "bad-payload"),
        ({"events": [{"values": {"ph": "7,2"}}, {"values": {"ec": 1}}]}, 400, "bad-payload"),
        (b"{", 400, "bad-payload"),
        ({"events": [READING] * 1001}, 413, "too-large"),
        (b'{"values": {"ph": 6}}' + b" " * 1_048_576, 413, "too-large"),
        ({**READING, "uuid": "11111111-1111-4111-8111-111111111111"}, 403, "forbidden"),
        ({**READING, "type": "critical-alarm"}, 403, "forbidden"),
    ],
)
def test_a_refused_request_accepts_nothing_and_is_kept_for_the_admin(
    body: Any, status: int, error: str, sensor: Sensor
) -> None:
    answer = post(body, builders.token(sensor))
    rejections.shared().flush()

    assert (answer.status_code, answer.json()["code"], answer.json()["accepted"]) == (status, error, 0)
    assert accepted() == 0
    kept = RejectedEvent.objects.get()
    assert (kept.reason, kept.protocol, kept.organization) == (error, "http", sensor.organization)
    assert kept.originator_uuid == str(sensor.uuid)
    assert kept.detail == answer.json()["detail"]
    assert len(kept.payload) <= rejections.MAXIMUM_PAYLOAD


def test_strangers_cannot_fill_the_list_of_rejected_events_and_keep_nobody_out(sensor: Sensor) -> None:
    statuses = [post(READING, "nonsense").status_code for _ in range(65)]
    assert statuses == [401] * 59 + [429] * 6
    refused = post(READING, "nonsense")
    assert problem(refused, 429)["code"] == "too-many-failures"
    assert 0 < int(refused.headers["Retry-After"]) <= 60
    assert post(READING, builders.token(sensor)).status_code == 202
    rejections.shared().flush()
    assert RejectedEvent.objects.count() == 59
    counts = rejections.counts()
    assert (counts["unauthorized"], counts["too-many-failures"], counts["unrecorded"]) == (59, 7, 7)


def test_bad_input_names_item_and_field(sensor: Sensor) -> None:
    answer = post({"events": [READING, {"values": {"ph": "high"}}], "strict": True}, builders.token(sensor))

    (error,) = problem(answer, 400)["errors"]
    assert (error["index"], error["field"]) == (1, "values.ph")
    assert "events[1].values.ph" in error["detail"]


def test_what_cannot_be_used_costs_nothing_else_and_is_named_and_kept(sensor: Sensor) -> None:
    good = [READING] * 96
    bad: list[Any] = [
        {"values": {"ph": "85,0"}},
        {"values": {"ph": 6.3, "lux": 1}},
        {"value": 6},
        {**READING, "timestamp": "noon"},
    ]
    answer = post({"events": [*good, *bad]}, builders.token(sensor))
    data_problems.shared().flush(force=True)

    assert answer.status_code == 202
    body = answer.json()
    assert (body["accepted"], accepted()) == (97, 97)
    assert [(each["index"], each["field"], each["leftOut"]) for each in body["problems"]] == [
        (96, "values.ph", "event"), (97, "values.lux", "value"), (98, "value", "event"), (99, "timestamp", "event"),
    ]  # fmt: skip
    details = [each["detail"] for each in body["problems"]]
    kinds = [("value", "ph"), ("unknown", ""), ("event", ""), ("clock", "")]
    kept = {(row.kind, row.name): (row.detail, row.count) for row in DataProblem.objects.all()}
    assert kept == {kind: (detail, 1) for kind, detail in zip(kinds, details, strict=True)}
    assert not RejectedEvent.objects.exists(), "it was accepted but for these"


@pytest.mark.parametrize(
    "value", [b"NaN", b"Infinity", b'"nan"', b'"unavailable"', b"true", b"[6]", b"9007199254740993"]
)
def test_a_bad_value_leaves_its_siblings(value: bytes, sensor: Sensor) -> None:
    Variable.objects.create(sensor=sensor, name="ec", datatype="number")
    answer = post(b'{"values": {"ph": 5.0, "ec": %s}}' % value, builders.token(sensor))

    assert (answer.status_code, answer.json()["accepted"]) == (202, 1)
    (problem,) = answer.json()["problems"]
    assert (problem["index"], problem["field"], problem["leftOut"]) == (None, "values.ec", "value")


def test_a_body_in_gzip_is_read_and_another_coding_is_refused_by_name(sensor: Sensor) -> None:
    token, body = builders.token(sensor), json.dumps({"events": [READING] * 500}).encode()
    packed = gzip.compress(body)
    assert post(packed, token, **{"content-encoding": "gzip"}).json() == {"accepted": 500, "rejected": 0}
    for content, coding, status in [
        (packed, "br", 415), (body, "gzip", 400), (packed[:-20], "gzip", 400), (gzip.compress(b" " * 2_000_000), "gzip", 413),
    ]:  # fmt: skip
        answer = post(content, token, **{"content-encoding": coding})
        assert answer.status_code == status, answer.json()
        assert coding in answer.json()["detail"] or status in (400, 413)


def test_strict_may_come_before_the_events(sensor: Sensor) -> None:
    bad = {"values": {"ph": "high"}}
    assert post({"strict": False, "events": [READING, bad]}, builders.token(sensor)).json()["problems"][0]["index"] == 1
    assert post({"strict": True, "events": [READING, bad]}, builders.token(sensor)).json()["errors"][0]["index"] == 1


def test_of_a_batch_of_which_some_are_refused_under_load_and_some_are_bad_each_keeps_its_place(
    sensor: Sensor, settings: Any
) -> None:
    settings.QUEUE_RECOVERY_THRESHOLD, settings.QUEUE_WARNING_THRESHOLD, settings.QUEUE_CRITICAL_THRESHOLD = 10, 20, 30
    per_process.forget_all()
    token = builders.token(sensor, highest_priority=1)
    assert post({"events": [READING] * 30}, token).status_code == 202
    answer = post({"events": [{"values": {"ph": "x"}}, READING, {**READING, "type": "critical-alarm"}]}, token)

    assert answer.status_code == 202
    assert [(each["index"], each["accepted"]) for each in answer.json()["results"]] == [(1, False), (2, True)]
    assert answer.json()["problems"][0]["index"] == 0


@pytest.mark.parametrize("token", ["", "nonsense", "aemos_aaaaaaaaaaaaaa_bbbb", "aemos__", "aemos_\u00e9"])
def test_an_unknown_token_is_unauthorized_and_asked_for_a_bearer(token: str) -> None:
    answer = post(READING, token.encode("ascii", "ignore").decode())

    assert answer.status_code == 401
    assert answer["WWW-Authenticate"].startswith("Bearer")


def test_a_right_prefix_with_a_wrong_secret_is_unauthorized(sensor: Sensor) -> None:
    token = builders.token(sensor)
    assert post(READING, token).status_code == 202

    assert post(READING, token[:-1] + ("A" if token[-1] != "A" else "B")).status_code == 401


def test_a_revoked_token_is_refused_once_the_catalogue_looked(sensor: Sensor) -> None:
    token = builders.token(sensor)
    assert post(READING, token).status_code == 202
    DeviceToken.objects.all().revoke()
    catalogue.shared().refresh(at_once=True)

    assert post(READING, token).status_code == 401


def test_an_expired_token_is_refused_without_waiting_for_a_refresh(sensor: Sensor) -> None:
    token = builders.token(sensor, expires_at=timezone.now() + timedelta(hours=1))
    assert post(READING, token).status_code == 202
    catalogue.shared()._wall_clock = lambda: timezone.now().timestamp() + 3601

    assert post(READING, token).status_code == 401


def test_a_new_variable_is_known_once_the_catalogue_looked(sensor: Sensor) -> None:
    token = builders.token(sensor)
    assert post({"values": {"ec": 1.8}}, token).status_code == 400
    sensor.variables.create(name="ec")
    catalogue.shared().refresh(at_once=True)

    assert post({"values": {"ec": 1.8}}, token).status_code == 202


def test_a_warm_request_makes_no_query(sensor: Sensor, monkeypatch: pytest.MonkeyPatch) -> None:
    token = builders.token(sensor)
    post(READING, token)
    # The looks at versions and at the circuit come by the clock, whatever the traffic.
    catalogue.shared()._checked_at = float("inf")
    monkeypatch.setattr(control, "SNAPSHOT_SECONDS", float("inf"))
    monkeypatch.setattr(control, "TRUST_SECONDS", float("inf"))

    with CaptureQueriesContext(connection) as queries:
        assert post(READING, token).status_code == 202
    assert len(queries) == 0


def test_other_methods_are_not_allowed() -> None:
    answer = Client().get("/api/v1/telemetry")

    assert (answer.status_code, answer["Allow"]) == (405, "POST")


def refused_by_redis(answer: Any) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    assert answer.status_code == 503
    assert body["code"] == body["reason"] == "enqueue-error"
    assert 1 <= int(answer["Retry-After"]) <= 300
    assert int(answer["Retry-After"]) == body["retryAfter"]
    return body


def test_redis_that_cannot_be_reached_refuses_with_enqueue_error(sensor: Sensor, settings: Any) -> None:
    from deploy.servers import free_port

    token = builders.token(sensor)
    settings.REDIS_PORT = free_port()
    per_process.forget_all()

    assert "cannot be reached" in refused_by_redis(post(READING, token))["detail"]


def test_a_wrong_redis_password_is_reported_as_such_and_not_shown(sensor: Sensor, settings: Any) -> None:
    token = builders.token(sensor)
    settings.REDIS_PASSWORD = "not-the-password-of-this-server"
    per_process.forget_all()

    body = refused_by_redis(post(READING, token))
    assert "REDIS_PASSWORD" in body["detail"]
    assert "not-the-password" not in json.dumps(body)


def test_a_missing_redis_password_is_reported_as_such(sensor: Sensor, settings: Any) -> None:
    token = builders.token(sensor)
    settings.REDIS_PASSWORD = ""
    per_process.forget_all()

    assert "refuses the password" in refused_by_redis(post(READING, token))["detail"]


def test_a_database_that_is_away_refuses_unknown_tokens_honestly(
    sensor: Sensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise OperationalError("gone")

    token = builders.token(sensor)
    monkeypatch.setattr(catalogue.Catalogue, "_load_credential", away)
    answer = post(READING, token)

    assert (answer.status_code, answer.json()["code"]) == (503, "database-unavailable")
    assert int(answer["Retry-After"]) >= 1


def test_a_full_queue_refuses_normal_but_accepts_critical_up_to_the_hard_cap(sensor: Sensor, settings: Any) -> None:
    settings.QUEUE_CRITICAL_THRESHOLD = 10
    token = builders.token(sensor, highest_priority=1)
    assert post({"events": [READING] * 10}, token).status_code == 202

    answer = post(READING, token)
    assert (answer.status_code, answer.json()["reason"]) == (503, "queue-critical")
    assert (answer.json()["queueDepth"], answer.json()["threshold"]) == (10, 10)
    alarm = {**READING, "type": "critical-alarm"}
    mixed = post({"events": [READING, alarm]}, token)
    assert (mixed.status_code, mixed.json()["accepted"], mixed.json()["rejected"]) == (202, 1, 1)
    assert mixed.json()["results"] == [
        {"index": 0, "accepted": False, "reason": "queue-critical"},
        {"index": 1, "accepted": True, "reason": "high-priority-override"},
    ]
    assert post(alarm, token).status_code == 202
    answer = post(alarm, token)
    assert (answer.status_code, answer.json()["reason"], answer.json()["threshold"]) == (503, "hard-limit", 12)


def test_the_refused_part_of_a_batch_is_counted_and_kept(sensor: Sensor, settings: Any) -> None:
    settings.QUEUE_CRITICAL_THRESHOLD = 10
    token = builders.token(sensor, highest_priority=1)
    post({"events": [READING] * 10}, token)
    post({"events": [READING, {**READING, "type": "critical-alarm"}]}, token)
    rejections.shared().flush()

    kept = RejectedEvent.objects.get()
    assert kept.reason == "queue-critical"
    assert json.loads(kept.payload)["values"] == {"ph": 6.1}


def test_requests_of_one_group_are_all_answered_whatever_goes_wrong() -> None:
    def append(_: Any) -> Any:
        raise RuntimeError("nobody foresaw this")

    commit = GroupCommit(append)
    results = [commit.put([]), commit.put([])]

    for result in results:
        with pytest.raises(RuntimeError, match="nobody foresaw this"):
            result.get(timeout=5)


def test_events_on_their_way_into_the_journal_are_counted_by_every_snapshot_until_it_has_them() -> None:
    """Else a burst would pass the limits each time the snapshot is renewed while Redis is slow."""
    now = [0.0]
    admission = Admission(clock=lambda: now[0])
    result: AsyncResult[None] = AsyncResult()
    before = admission.snapshot().depth
    admission.admitted(700, until=result)
    assert admission.snapshot().depth == before + 700
    now[0] += 1
    assert admission.snapshot().depth == before + 700
    result.set(None)
    gevent.sleep(0.01)
    now[0] += 1
    assert admission.snapshot().depth == before


def test_what_comes_after_something_that_was_not_written_is_not_written_either() -> None:
    answers: list[Any] = [RedisError("away"), [], []]
    written = []

    def append(batches: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        written.append(batches)
        return answer

    commit = GroupCommit(append)
    first = commit.put([])
    with pytest.raises(RedisError):
        first.get(timeout=5)
    second = commit.put([], after=first)
    third = commit.put([], after=second)
    other = commit.put([])

    for result in (second, third):
        with pytest.raises(RedisError):
            result.get(timeout=5)
    other.get(timeout=5)
    assert len(written) == 1
