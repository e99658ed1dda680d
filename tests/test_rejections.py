"""What is refused: counted always, kept as far as there is room, written in bulk, and never lost while a server is away."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import requests
from django.db import OperationalError, connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from aemos.lib import keys, redis
from aemos.lib import retention as chunks
from deploy.local import local_system
from deploy.servers import free_port
from devices.exceptions import BadPayload, Overloaded
from devices.models import Organization
from rules import events, retention
from rules.admission import rejections
from rules.admission.rejections import UNRECORDED
from rules.events import Event
from rules.models import DeadLetter, RejectedEvent, Replay, Status
from tests import builders

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("empty_redis")]
WHEN = datetime(2026, 5, 1, 6, tzinfo=UTC)
OPEN = Overloaded(
    "full", reason="circuit-open", retry_after=7, queue_depth=60_000, threshold=50_000, circuit_state="OPEN"
)


@pytest.fixture
def organization() -> Organization:
    return builders.organization()


def event(of: Organization, **fields: Any) -> Event:
    told = {
        "id": str(uuid4()), "type": "telemetry-data", "priority": 5, "source_type": "sensor", "originator_uuid": str(uuid4()),
        "organization_id": of.pk, "values": {"ph": 6.1}, "timestamp_us": events.microseconds(WHEN),
        "received_us": events.microseconds(WHEN + timedelta(seconds=1)), "protocol": "mqtt",
    }  # fmt: skip
    return Event(**{**told, **fields})


def test_each_refused_event_is_kept_whole_with_depth_and_circuit_of_that_moment(organization: Organization) -> None:
    refused = event(organization)
    rejections.record_events([refused, event(organization, priority=10)], OPEN)
    rejections.shared().flush()

    row = RejectedEvent.objects.get(event_id=refused.id)
    assert (row.reason, row.detail, row.priority, row.lane) == ("circuit-open", "full", 5, "normal")
    assert (row.queue_depth, row.threshold, row.circuit_state) == (60_000, 50_000, "OPEN")
    assert (row.organization, row.protocol, row.source_type, row.type) == (
        organization,
        "mqtt",
        "sensor",
        "telemetry-data",
    )
    assert (row.timestamp, row.received_at) == (WHEN, WHEN + timedelta(seconds=1))
    assert (row.status, row.decided_at, row.decided_by) == (Status.OPEN, None, "")
    sent = json.loads(row.payload)
    assert (sent["values"], sent["eventId"]) == ({"ph": 6.1}, str(refused.id))
    assert RejectedEvent.objects.get(lane="low").priority == 10


def test_an_unreadable_request_is_kept_once_cut_to_4_kb_without_an_event_id() -> None:
    rejections.record(BadPayload("no\x00JSON"), b"\x00\xff" * 5_000, credential=None, protocol="coap", uuid="x" * 50)
    rejections.shared().flush()

    row = RejectedEvent.objects.get()
    assert (row.reason, row.event_id, row.organization, row.priority) == ("bad-payload", None, None, None)
    assert len(row.payload) <= rejections.MAXIMUM_PAYLOAD
    assert row.detail == "no\\x00JSON"
    assert rejections.counts() == {"bad-payload": 1}


@pytest.mark.parametrize("limit", ["MAXIMUM_ROWS", "MAXIMUM_BUFFERED_BYTES"])
def test_what_is_counted_was_recorded_or_is_unrecorded(
    limit: str, organization: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rejections, limit, 10 if limit == "MAXIMUM_ROWS" else 10 * rejections.ROW_BYTES)
    rejections.record_events([event(organization) for _ in range(25)], OPEN)
    rejections.record(BadPayload("x"), b"{", credential=None, protocol="http", uuid=None)
    rejections.shared().flush()
    rejections.record_events([event(organization)], OPEN)
    rejections.shared().flush()

    counted = rejections.counts()
    assert (counted["circuit-open"], counted["bad-payload"]) == (26, 1)
    assert 15 <= counted[UNRECORDED] <= 17
    assert RejectedEvent.objects.count() + counted[UNRECORDED] == 27


def test_no_row_is_built_for_what_does_not_fit(organization: Organization, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejections, "MAXIMUM_ROWS", 0)

    def built(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(rejections, "_event_row", built)
    monkeypatch.setattr(rejections, "_size_bytes", built)
    rejections.record_events([event(organization)] * 100, OPEN)
    rejections.shared().flush()
    assert rejections.counts() == {"circuit-open": 100, UNRECORDED: 100}


def test_overflow_is_logged_at_most_every_five_seconds(
    organization: Organization, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rejections, "MAXIMUM_ROWS", 0)
    recorder = rejections.shared()
    with caplog.at_level(logging.WARNING, "rules.admission.rejections"):
        for now in (100.0, 101.0, 102.0, 105.5):
            recorder._log._clock = partial(float, now)
            rejections.record_events([event(organization)], OPEN)
            recorder.flush()
    assert [record.args for record in caplog.records] == [(1,), (3,)]


def test_rows_are_written_in_bulk(organization: Organization) -> None:
    rejections.record_events([event(organization) for _ in range(rejections.CHUNK_ROWS * 3)], OPEN)
    with CaptureQueriesContext(connection) as queries:
        rejections.shared().flush()
    assert RejectedEvent.objects.count() == rejections.CHUNK_ROWS * 3
    assert len([query for query in queries if "INSERT" in query["sql"]]) == 3


def test_rows_wait_while_the_database_is_away(organization: Organization, monkeypatch: pytest.MonkeyPatch) -> None:
    rejections.record_events([event(organization) for _ in range(60)], OPEN)
    with monkeypatch.context() as patch:

        def away(*_: object) -> None:
            raise OperationalError("gone")

        patch.setattr(rejections, "_insert", away)
        with pytest.raises(OperationalError):
            rejections.shared().flush()
    assert rejections.shared().waiting == 60
    assert rejections.counts() == {"circuit-open": 60}, "counts do not wait for the database"
    rejections.shared().flush()
    assert RejectedEvent.objects.count() == 60
    assert rejections.counts() == {"circuit-open": 60}


def test_counts_wait_while_redis_is_away(organization: Organization, settings: Any) -> None:
    port = settings.REDIS_PORT
    settings.REDIS_PORT = free_port()
    redis.client.cache_clear()
    rejections.record_events([event(organization)], OPEN)
    rejections.shared().close()
    assert RejectedEvent.objects.count() == 1
    settings.REDIS_PORT = port
    redis.client.cache_clear()
    rejections.record_events([event(organization)] * 2, OPEN)
    rejections.shared().flush()

    assert rejections.counts() == {"circuit-open": 3}


def test_a_row_that_cannot_be_stored_does_not_hold_up_the_others(organization: Organization) -> None:
    gone = builders.organization()
    rejections.record_events([event(organization), event(gone), event(organization)], OPEN)
    gone.delete()
    rejections.shared().flush()

    assert RejectedEvent.objects.count() == 2
    assert rejections.counts() == {"circuit-open": 3, UNRECORDED: 1}
    assert rejections.shared().waiting == 0


def test_the_greenlet_writes_rows_and_counts_by_itself(
    organization: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr("gevent.spawn_later", lambda seconds, work: started.append(work))
    monkeypatch.setattr("gevent.sleep", lambda seconds: None)  # greenlets of other tests may wait for their turn
    monkeypatch.setattr(connection, "close", lambda: None)
    rejections.record_events([event(organization)], OPEN)
    rejections.record_events([event(organization)], OPEN)
    (work,) = started
    work()

    assert RejectedEvent.objects.count() == 2
    assert rejections.counts() == {"circuit-open": 2}
    assert started == [work], "nothing waits, so nothing runs"


def test_a_web_process_that_is_stopped_at_once_keeps_its_last_refusals(tmp_path: Path) -> None:
    with local_system(tmp_path) as system:
        system.start("web")
        answer = requests.post(f"{system.web}/api/v1/telemetry", data=b"{", timeout=5)
        assert answer.status_code == 401
        system.stop("web")
        counted = system.manage("shell", "-v", "0", "-c", _TELL).stdout.split()
    assert counted == ["1", "1"]


_TELL = """
from rules.admission import rejections
from rules.models import RejectedEvent
print(RejectedEvent.objects.count(), rejections.counts()["unauthorized"])
"""


# Retention


def make_old(days: int) -> None:
    then = timezone.now() - timedelta(days=days)
    RejectedEvent.objects.create(protocol="http", reason="circuit-open", received_at=then)
    for status in (Status.OPEN, Status.DISCARDED):
        DeadLetter.objects.create(
            failure_key=str(uuid4()), event_id=uuid4(), lane="normal", event={}, error="x", attempts=4, created_at=then,
            status=status,
        )  # fmt: skip
    Replay.objects.create(kind=Replay.Kind.DEAD, created_by="x", state=Replay.State.DONE, ended_at=then)


def test_what_is_too_old_is_deleted_but_no_dead_letter_that_waits_for_a_decision(settings: Any) -> None:
    settings.REJECTED_RETENTION_DAYS, settings.DEAD_LETTER_RETENTION_DAYS = 30, 90
    for days in (1, 40, 100):
        make_old(days)
    assert retention.delete_expired() == 4

    assert RejectedEvent.objects.count() == 1
    assert DeadLetter.objects.filter(status=Status.OPEN).count() == 3
    assert DeadLetter.objects.filter(status=Status.DISCARDED).count() == 2
    assert Replay.objects.count() == 2


def test_retention_works_in_chunks_and_rests_for_an_hour_when_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 2)
    monkeypatch.setattr(chunks, "CHUNKS_PER_TURN", 2)
    for _ in range(5):
        make_old(40)
    assert [retention.delete_expired() for _ in range(3)] == [4, 1, 0]
    make_old(40)
    assert retention.delete_expired() == 0
    assert 3_500 < redis.client().ttl(keys.RETENTION_LOCK) <= 3_600
