"""Log lines: one format for all of them, with what they are about as fields."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import structlog
from django.contrib.auth.models import User
from django.test import Client

from aemos import logs
from aemos.lib import tracing

pytestmark = pytest.mark.usefixtures("empty_redis")
log = logging.getLogger("tests.logs")


def line(kind: str, *arguments: object, level: int = logging.WARNING, **fields: object) -> str:
    extra = fields.pop("extra", None)
    record = log.makeRecord(log.name, level, __file__, 1, str(arguments[0]), arguments[1:], None, extra=extra)  # type: ignore[arg-type]
    return logs.formatter(kind).format(record)


def test_a_line_is_one_object_with_the_fields_that_were_given() -> None:
    fields = {"device": "d-1", "event_id": "e-1", "not_a_field": "left out"}
    with structlog.contextvars.bound_contextvars(slot="normal/3"):
        found = json.loads(line("json", "pump %s: %d ml", "A", 5, extra=fields))
    assert found.pop("timestamp").endswith("Z")
    assert found == {
        "level": "warning",
        "logger": "tests.logs",
        "message": "pump A: 5 ml",
        "process": "other",
        "slot": "normal/3",
        "device": "d-1",
        "event_id": "e-1",
    }


def test_a_line_for_people_has_the_fields_at_its_end() -> None:
    text = line("text", "pump on", extra={"device": "d-1"})
    assert text.partition(" ")[2] == "WARNING tests.logs pump on device=d-1"


@pytest.mark.parametrize("kind", ["json", "text"])
def test_a_traceback_stays_with_its_line(kind: str) -> None:
    try:
        raise ValueError("no such pump")
    except ValueError as error:
        record = log.makeRecord(
            log.name, logging.ERROR, __file__, 1, "failed", (), (type(error), error, error.__traceback__)
        )
    text = logs.formatter(kind).format(record)
    assert "ValueError: no such pump" in text
    assert len(text.splitlines()) == 1 or kind == "text"


def test_a_senders_line_breaks_cannot_make_lines_of_their_own() -> None:
    assert len(line("json", "%s", "a\n{}").splitlines()) == 1


def test_the_link_of_an_invitation_is_not_in_the_lines_of_others() -> None:
    assert "/join/..." in line("json", "Forbidden: %s", "/join/aemosi_secret?x=1")
    assert "secret" not in line("text", "Forbidden: %s", "/join/aemosi_secret?x=1")


def test_lines_of_a_span_name_its_trace() -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracing.export_to(exporter)
    try:
        with tracing.span("tried"):
            found = json.loads(line("json", "inside"))
    finally:
        tracing.export_to(None)
    (span,) = exporter.get_finished_spans()
    assert span.context is not None
    assert found["trace_id"] == f"{span.context.trace_id:032x}"


@pytest.fixture
def access(settings: Any, caplog: pytest.LogCaptureFixture) -> Client:
    settings.ACCESS_LOG = True
    settings.MIDDLEWARE = ["aemos.access_log.access_log", *settings.MIDDLEWARE]
    caplog.set_level(logging.INFO, "aemos.access")
    return Client()


@pytest.mark.django_db
def test_each_request_has_a_line_and_an_id(access: Client, caplog: pytest.LogCaptureFixture) -> None:
    user = User.objects.create_user("bo")
    access.force_login(user)
    answer = access.get("/api/v1/sensors?search=secret", headers={"X-Request-ID": "from-the-proxy"})
    assert answer.headers["X-Request-ID"] == "from-the-proxy"
    (record,) = caplog.records
    fields = {name: getattr(record, name) for name in ("method", "path", "status", "address", "user")}
    assert fields == {
        "method": "GET",
        "path": "/api/v1/sensors",
        "status": 200,
        "address": "127.0.0.1",
        "user": user.pk,
    }
    assert "secret" not in caplog.text


@pytest.mark.django_db
def test_an_id_of_a_stranger_is_not_believed_blindly(access: Client) -> None:
    answer = access.get("/api/v1/health/liveness", headers={"X-Request-ID": "x" * 65})
    assert len(answer.headers["X-Request-ID"]) == 32


@pytest.mark.django_db
def test_what_is_asked_all_the_time_has_no_line_unless_it_is_refused(
    access: Client, caplog: pytest.LogCaptureFixture
) -> None:
    access.get("/api/v1/health/liveness")
    assert not caplog.records
    access.get("/api/v1/healthy")
    assert [record.status for record in caplog.records] == [404]  # type: ignore[attr-defined]


@pytest.mark.django_db
def test_the_secret_of_an_invitation_is_not_in_the_line(access: Client, caplog: pytest.LogCaptureFixture) -> None:
    access.get("/join/aemosi_very-secret")
    assert [record.path for record in caplog.records if record.name == "aemos.access"] == ["/join/<str:token>"]  # type: ignore[attr-defined]
    assert "very-secret" not in caplog.text
