"""What becomes of commands, of what devices report and of their connection: rows and answers, without a broker."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.db import OperationalError, transaction
from django.utils import timezone
from rest_framework.test import APIClient

from devices import commands, latest, presence
from devices.commands import Acknowledgement, State
from devices.exceptions import BadPayload
from devices.models import Device, DeviceState, StateChange
from gateway.mqtt import topics
from gateway.mqtt.reports import Reports
from gateway.mqtt.sender_queues import Arrival
from notifications.models import Notification
from rules import events
from rules.effects import states
from tests import builders

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]


@pytest.fixture
def pump() -> Device:
    return builders.device(builders.organization())


def wished(target: Device, value: Any = "on", *, source: str = "rule", at: float = 0) -> StateChange:
    """A change as a rule makes it, `at` seconds from now."""
    (change,) = _change(target, value, source=source, at=at)
    return StateChange.objects.select_related("state__device").get(uuid=change.row.uuid)


def reported(target: Device, value: Any, *, at: float) -> list[states.Change]:
    return _change(target, value, source="device", at=at)


def _change(target: Device, value: Any, *, source: str, at: float) -> list[states.Change]:
    timestamp_us = events.microseconds(timezone.now() + timedelta(seconds=at))
    request = states.StateChangeRequest(
        effect_key=str(uuid4()),
        state_id=target.states.get().pk,
        value=value,
        source=source,
        actor="test",
        timestamp_us=timestamp_us,
        newer_only=source == "device",
    )
    with transaction.atomic():
        changes = states.apply([request]).changes
    states.publish(changes)
    return changes


def state_of(row: StateChange) -> str:
    return StateChange.objects.get(pk=row.pk).command_state


def said(
    row: StateChange | commands.NewChange, state: State, *, error: str = "", by: UUID | None = None
) -> Acknowledgement:
    device_uuid = by or row.state.device.uuid
    return Acknowledgement(device_uuid=device_uuid, command_uuid=row.uuid, state=state, error=error)


# The life of a command


def test_wish_is_a_command_with_a_deadline_and_its_message_bears_its_id(pump: Device, settings: Any) -> None:
    settings.COMMAND_EXPIRY_SECONDS = 60
    row = wished(pump)
    assert state_of(row) == State.QUEUED
    assert timedelta(seconds=55) < row.deadline - timezone.now() <= timedelta(seconds=60)  # type: ignore[operator]
    told = Notification.objects.get()
    assert told.uuid == row.uuid
    assert told.payload["deadline"] == row.deadline.isoformat()  # type: ignore[union-attr]


def test_command_goes_from_queued_to_applied_and_never_back(pump: Device) -> None:
    row = wished(pump)
    steps: list[tuple[Callable[[], object], State]] = [
        (lambda: commands.note_sent([row.uuid]), State.SENT),
        (lambda: commands.acknowledge([said(row, State.ACKNOWLEDGED)]), State.ACKNOWLEDGED),
        (lambda: commands.note_sent([row.uuid]), State.ACKNOWLEDGED),
        (lambda: commands.acknowledge([said(row, State.APPLIED)]), State.APPLIED),
        (lambda: commands.acknowledge([said(row, State.FAILED, error="late")]), State.APPLIED),
        (lambda: commands.acknowledge([said(row, State.ACKNOWLEDGED)]), State.APPLIED),
    ]
    for step, expected in steps:
        step()
        assert state_of(row) == expected
    row.refresh_from_db()
    assert row.sent_at
    assert row.sent_at <= row.acknowledged_at <= row.settled_at  # type: ignore[operator]
    assert row.command_error == ""


def test_acknowledgement_that_comes_before_the_note_of_sending_keeps_its_place(pump: Device) -> None:
    row = wished(pump)
    commands.acknowledge([said(row, State.FAILED, error="the valve is stuck")])
    commands.note_sent([row.uuid])
    row.refresh_from_db()
    assert (row.command_state, row.command_error) == (State.FAILED, "the valve is stuck")
    assert row.sent_at


def test_overdue_command_expires_and_a_late_answer_is_still_believed(pump: Device) -> None:
    sent, queued, acknowledged = wished(pump), wished(pump, "off"), wished(pump)
    commands.note_sent([sent.uuid])
    commands.acknowledge([said(acknowledged, State.ACKNOWLEDGED)])
    assert commands.expire_overdue(timezone.now() + timedelta(seconds=299)) == []
    expired = commands.expire_overdue(timezone.now() + timedelta(seconds=301))
    assert [row.pk for row in expired] == [sent.pk, queued.pk]
    assert [state_of(each) for each in (sent, queued, acknowledged)] == ["expired", "expired", "acknowledged"]
    commands.acknowledge([said(sent, State.APPLIED)])
    assert state_of(sent) == State.APPLIED


def test_device_answers_for_its_own_commands_only(pump: Device) -> None:
    other, row, report = builders.device(pump.organization), wished(pump), reported(pump, "off", at=1)[0].row
    foreign = [
        said(row, State.APPLIED, by=other.uuid),
        said(report, State.APPLIED),
        Acknowledgement(device_uuid=pump.uuid, command_uuid=uuid4(), state=State.APPLIED),
    ]
    assert commands.acknowledge(foreign) == foreign
    assert state_of(row) == State.QUEUED


def test_number_of_queries_does_not_grow_with_the_number_of_answers(
    pump: Device, django_assert_max_num_queries: Any
) -> None:
    for count in (1, 40):
        rows = [wished(pump, value) for _ in range(count) for value in ("on", "off")]
        with django_assert_max_num_queries(8):
            commands.note_sent([row.uuid for row in rows])
            commands.acknowledge([said(row, State.APPLIED) for row in rows])
        assert {state_of(row) for row in rows} == {State.APPLIED}


# What should be and what is


def test_report_that_contradicts_does_not_change_what_should_be(pump: Device) -> None:
    wished(pump, "on", at=-10)
    (change,) = reported(pump, "off", at=-5)
    state = DeviceState.objects.get()
    assert (state.value, state.reported_value, state.differs) == ("on", "off", True)
    assert state.differs_since == state.reported_at
    assert (change.row.previous, change.row.command_state) == ("on", "")
    reported(pump, "off", at=-4)
    assert DeviceState.objects.get().differs_since == state.differs_since, "as long as it has differed"


def test_report_of_the_wished_value_applies_the_command(pump: Device) -> None:
    row = wished(pump, "on", at=-10)
    reported(pump, "off", at=-9)
    assert state_of(row) == State.QUEUED
    reported(pump, "on", at=-8)
    assert state_of(row) == State.APPLIED
    state = DeviceState.objects.get()
    assert (state.differs, state.differs_since) == (False, None)


def test_state_that_is_not_known_on_both_sides_does_not_differ(pump: Device) -> None:
    assert DeviceState.objects.get().differs is None
    reported(pump, "on", at=-1)
    assert DeviceState.objects.get().differs is None
    wished(pump, "off")
    assert DeviceState.objects.get().differs is True


def test_rule_commands_again_when_the_device_says_that_it_is_not_so(pump: Device) -> None:
    wished(pump, "on", at=-10)
    assert _change(pump, "on", source="rule", at=-9) == [], "it is wished already"
    reported(pump, "off", at=-8)
    assert len(_change(pump, "on", source="rule", at=-7)) == 1


def test_late_report_of_the_past_changes_nothing(pump: Device) -> None:
    reported(pump, "on", at=-5)
    assert reported(pump, "off", at=-6) == []
    assert DeviceState.objects.get().reported_value == "on"


def test_applied_is_a_report_that_rules_see(pump: Device) -> None:
    row = wished(pump, "on", at=-10)
    reported(pump, "off", at=-9)
    commands.acknowledge([said(row, State.APPLIED)])
    state = DeviceState.objects.get()
    assert (state.reported_value, state.differs) == ("on", False)
    key = ("device", str(pump.uuid), "power")
    assert latest.recall([key])[key].value == "on"


def test_rest_shows_both_values_and_the_life_of_commands(pump: Device) -> None:
    row = wished(pump, "on", at=-10)
    reported(pump, "off", at=-9)
    commands.acknowledge([said(row, State.FAILED, error="dry")])
    client = APIClient()
    client.force_authenticate(builders.member(pump.organization))
    (shown,) = client.get("/api/v1/device-states?differs=true").json()["results"]
    assert (shown["value"], shown["reportedValue"], shown["differs"]) == ("on", "off", True)
    assert shown["differsSince"] == shown["reportedAt"]
    assert client.get("/api/v1/device-states?differs=false").json()["results"] == []
    (change,) = client.get("/api/v1/state-changes?commandState=failed").json()["results"]
    assert (change["uuid"], change["command"]["state"], change["command"]["error"]) == (
        str(row.uuid),
        "failed",
        "dry",
    )
    (report,) = client.get("/api/v1/state-changes?source=device").json()["results"]
    assert report["command"] is None


# Presence


def test_change_of_connection_is_noted_once_and_told_to_people_only(pump: Device) -> None:
    reports = Reports()
    for _ in range(2):
        arrival = status(pump, b"online")
        reports.take(arrival).wait()
    pump.refresh_from_db()
    assert pump.connected is True
    assert pump.last_seen_at
    reports.take(status(pump, b'{"status": "offline", "firmware": "1.2"}')).wait()
    told = Notification.objects.filter(event="device-status").order_by("id")
    assert [each.payload["status"] for each in told] == ["online", "offline"]
    assert set(told.values_list("deliveries__protocol", flat=True)) == {"socketio"}
    before = pump.last_seen_at
    pump.refresh_from_db()
    assert (pump.connected, pump.last_seen_at) == (False, before), "a last will is no sign of life"


def test_retained_status_is_believed_but_no_sign_of_life(pump: Device) -> None:
    arrival = status(pump, b"online")
    arrival.retained = True
    Reports().take(arrival).wait()
    pump.refresh_from_db()
    assert (pump.connected, pump.last_seen_at) == (True, None)


def test_status_of_a_sensor_or_of_nobody_is_passed_over(pump: Device) -> None:
    assert presence.record({uuid4(): True, builders.sensor(pump.organization).uuid: True}) == []


def test_telemetry_is_a_sign_of_life_that_is_noted_now_and_then(pump: Device) -> None:
    now = [0.0]
    reports = Reports(clock=lambda: now[0])
    reports.flush()
    reports.saw(str(pump.uuid))
    reports.flush()
    assert Device.objects.get().last_seen_at is None
    now[0] = 11
    reports.flush()
    assert Device.objects.get().last_seen_at


# A fixed id, because processes of a parallel run must collect tests of the same names.
NO_COMMAND = b"5a1f9c1e-4a57-4c38-9e0d-7f0a6f3b2c11"


@pytest.mark.parametrize(
    ("topic", "payload", "words"),
    [
        ("status", b"perhaps", "status must be online or offline"),
        ("status", b'{"state": "online"}', "missing required field `status`"),
        ("commands/ack", b"applied", "an acknowledgement has id, status and perhaps error"),
        ("commands/ack", b'{"id": "7", "status": "applied"}', r"\$\.id"),
        ("commands/ack", b'{"id": "%s", "status": "done"}' % NO_COMMAND, r"\$\.status"),
        ("commands/ack", b'{"id": "%s", "status": "failed", "why": 1}' % NO_COMMAND, "why"),
        ("commands/ack", b'{"id": "%s", "status": "applied"}' % NO_COMMAND, "id: there is no such command"),
    ],
)  # fmt: skip
def test_bad_report_is_refused_with_the_field_that_is_wrong(
    pump: Device, topic: str, payload: bytes, words: str
) -> None:
    with pytest.raises(BadPayload, match=words):
        Reports().take(Arrival(f"devices/{pump.uuid}/{topic}", payload, 1, 1, 0)).wait()


def test_reports_that_wait_are_written_together_and_all_hear_when_that_fails(
    pump: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise OperationalError("the server is gone")

    reports = Reports()
    both = [reports.take(status(pump, b"online")), reports.take(status(pump, b"online"))]
    with monkeypatch.context() as broken:
        broken.setattr(presence, "record", away)
        for each in both:
            with pytest.raises(OperationalError):
                each.wait()
    reports.take(status(pump, b"online")).wait()
    assert Device.objects.get().connected is True


def test_notes_wait_while_the_database_is_away(pump: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise OperationalError("the server is gone")

    row, reports = wished(pump), Reports()
    reports.sent(row.uuid)
    with monkeypatch.context() as broken:
        broken.setattr(commands, "note_sent", away)
        reports.flush()
    assert state_of(row) == State.QUEUED
    reports.flush()
    assert state_of(row) == State.SENT


def status(target: Device, payload: bytes) -> Arrival:
    return Arrival(topics.status(str(target.uuid)), payload, 1, 1, 0)


def test_answer_that_comes_again_is_no_new_report(pump: Device) -> None:
    """A device answers a repeated command again, and may have done the opposite since."""
    first, second = wished(pump, "on"), wished(pump, "off")
    commands.acknowledge([said(first, State.APPLIED)])
    commands.acknowledge([said(second, State.APPLIED)])
    commands.acknowledge([said(first, State.APPLIED)])
    state = pump.states.get()
    assert (state.reported_value, state.differs) == ("off", False)
    key = ("device", str(pump.uuid), "power")
    assert latest.recall([key])[key].value == "off"
