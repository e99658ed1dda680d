"""The operations page: what it knows with and without Redis, and that its buttons are for staff and do what they say."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from django.test import Client
from django.utils import timezone

from aemos.lib import keys, per_process, redis
from deploy.servers import free_port
from devices.models import Device
from monitoring import recent
from pages.operations import seen
from rules.admission import circuit_store, rejections
from rules.journal import pauses
from rules.models import ChainStatistics, CircuitTransition, DeadLetter, Status
from tests import builders

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]


@pytest.fixture
def staff() -> Client:
    client = Client()
    client.force_login(builders.user(username="ada", is_staff=True))
    return client


def test_it_shows_circuit_limits_ledger_refusals_rules_and_devices(staff: Client) -> None:
    farm = builders.organization("Basil Farm")
    chain = builders.switching_chain(builders.sensor(farm), builders.device(farm, "Pump"), name="Lower the pH")
    ChainStatistics.objects.create(
        chain=chain, executions=4, failures=3, failures_in_a_row=2, seconds=0.01, last_error="gone"
    )
    Device.objects.update(connected=False, connection_changed_at=timezone.now() - timedelta(hours=2))
    redis.client().hset(keys.REJECTED, "rate-limited", 7)
    circuit_store.reset("bob", 12)
    page = staff.get("/operations").text
    for text in (
        "CLOSED", "manual-reset at 12 events", "by bob", "in force", "They are as configured", "rate-limited", "Lower the pH",
        "2.50", "gone", "Pump", "2\xa0hours", "No worker is running", "missing",
    ):  # fmt: skip
        assert text in page, text
    assert rejections.counts()["rate-limited"] == 7


def test_samples_are_taken_every_ten_seconds_and_kept_for_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    redis.client().hset(keys.ledger("normal", 0), mapping={"accepted": 5, "processed": 2, "depth": 3})
    recent.record()
    recent.record()
    (sample,) = recent.samples()
    assert (sample.depth["normal"], sample.accepted, sample.ended, sample.circuit) == (3, 5, 2, "CLOSED")
    assert 0 < redis.client().pttl(keys.QUEUE_SAMPLED) <= 9_500
    for _ in range(recent.SAMPLES + 5):
        redis.client().delete(keys.QUEUE_SAMPLED)
        recent.record()
    assert redis.client().llen(keys.QUEUE_SAMPLES) == recent.SAMPLES
    late = time.time() + 4_000
    monkeypatch.setattr(time, "time", lambda: late)
    assert recent.samples() == []


def test_the_timeline_covers_the_day_without_a_gap() -> None:
    now = timezone.now()
    for hours, old, new in ((30, "OPEN", "HALF_OPEN"), (10, "HALF_OPEN", "OPEN"), (5, "OPEN", "CLOSED")):
        CircuitTransition.objects.create(
            from_state=old, to_state=new, reason="queue-critical", at=now - timedelta(hours=hours)
        )
    bands = seen.see().timeline
    assert [band.state for band in bands] == ["HALF_OPEN", "OPEN", "CLOSED"]
    assert sum(band.width for band in bands) == pytest.approx(100, abs=0.1)
    assert bands[1].left == pytest.approx(100 * 14 / 24, abs=0.1)


def test_staff_hold_the_circuit_open_and_close_it(staff: Client) -> None:
    staff.post("/operations/circuit", {"action": "hold", "hours": "2", "note": "filters are cleaned\x00"})
    held = circuit_store.load()
    hold = held.held(timezone.now())
    assert (held.state, hold and hold.by, hold and hold.note) == ("OPEN", "ada", "filters are cleaned")
    assert "held open by ada" in staff.get("/operations").text
    staff.post("/operations/circuit", {"action": "reset"})
    assert (circuit_store.load().state, circuit_store.load().held(timezone.now())) == ("CLOSED", None)


def test_staff_pause_a_lane_and_let_it_go_on(staff: Client) -> None:
    staff.post("/operations/lane", {"action": "pause", "lane": "normal", "hours": "2", "note": "filters\x00"})
    paused = pauses.current()["normal"]
    assert (paused.by, paused.note, 7_190 < paused.until - time.time() <= 7_200) == ("ada", "filters", True)
    page = staff.get("/operations").text
    assert "paused by ada" in page
    assert "The normal lane is paused by ada" in page
    staff.post("/operations/lane", {"action": "resume", "lane": "normal"})
    assert pauses.current() == {}
    for wrong in ({"lane": "critical", "hours": "1"}, {"lane": "normal", "hours": "99"}, {"lane": "", "hours": ""}):
        answer = staff.post("/operations/lane", {"action": "pause", **wrong}, follow=True)
        assert answer.status_code == 200
        assert re.search("Nothing was changed|Choose for how long", answer.text)
    assert pauses.current() == {}


def test_dead_letters_have_buttons_for_who_may_decide(staff: Client) -> None:
    farm = builders.organization()
    DeadLetter.objects.create(
        failure_key="k", event_id=uuid4(), organization=farm, lane="normal", event={}, error="it broke", attempts=3
    )
    text = staff.get("/operations").text
    assert "it broke" in text
    assert "Discard" not in text
    operator = builders.member(farm, "operator", is_staff=True)
    client = builders.client_of(operator)
    assert "Discard" in client.get("/operations").text
    row = DeadLetter.objects.get()
    answer = client.post("/admin/rules/deadletter/", {"action": "discard_selected", "_selected_action": [row.pk]})
    assert (answer.status_code, DeadLetter.objects.get().status) == (302, Status.DISCARDED)
    assert "it broke" not in client.get("/operations").text


def test_deliveries_are_counted_by_protocol() -> None:
    for protocol, state, number in (("mqtt", "acknowledged", 3), ("mqtt", "expired", 1), ("socketio", "sent", 5)):
        redis.client().hset(keys.METRICS, f"notifications_sent_total|{protocol}|{state}", number)
    recent.record()
    (sample,) = recent.samples()
    assert (sample.delivered, sample.undelivered) == ({"mqtt": 3, "socketio": 5}, 1)


@pytest.mark.parametrize("hours", ["", "0", "-1", "9999", "x"])
def test_a_hold_has_an_end_that_is_offered(staff: Client, hours: str) -> None:
    answer = staff.post("/operations/circuit", {"action": "hold", "hours": hours}, follow=True)
    assert "Choose for how long" in answer.text
    assert circuit_store.load().state == "CLOSED"


def test_others_are_refused() -> None:
    client = Client()
    assert client.get("/operations").status_code == 302
    client.force_login(builders.member(builders.organization(), "admin"))
    assert (
        client.get("/operations").status_code
        == client.post("/operations/circuit", {"action": "reset"}).status_code
        == 403
    )
    assert not CircuitTransition.objects.exists()
    assert "Operations" not in client.get("/").text


def test_without_redis_it_says_so(staff: Client, settings: Any) -> None:
    settings.REDIS_PORT = free_port()
    per_process.forget_all()
    try:
        page = staff.get("/operations")
        assert page.status_code == 200
        assert "Redis does not answer: events are refused" in page.text
    finally:
        per_process.forget_all()
