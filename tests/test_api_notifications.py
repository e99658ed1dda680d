"""The REST API of notifications: what was told, to whom, and how far it has come."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from rest_framework.test import APIClient

from devices.models import Device, Organization
from notifications.models import Delivery, Notification
from tests import builders

pytestmark = pytest.mark.django_db
URL = "/api/v1/notifications"
WRITTEN = datetime(2026, 5, 1, 6, tzinfo=UTC)


@pytest.fixture
def farm() -> Organization:
    return builders.organization()


@pytest.fixture
def viewer(farm: Organization) -> Any:
    client = APIClient()
    client.force_authenticate(builders.member(farm))
    return client


def told(of: Organization, device: Device | None = None, *, event: str = "alert", minute: int = 0) -> Notification:
    """A notification written `minute` minutes after six, of what had happened an hour before."""
    written = WRITTEN + timedelta(minutes=minute)
    row = Notification.objects.create(
        effect_key=str(uuid4()),
        organization=of,
        device=device,
        event=event,
        payload={"value": 5.1},
        timestamp=written - timedelta(hours=1),
        created_at=written,
    )
    for protocol in ("socketio", "mqtt", "coap"):
        Delivery.objects.create(notification=row, protocol=protocol, updated_at=written)
    return row


def test_a_notification_shows_how_far_each_protocol_has_come(farm: Organization, viewer: Any) -> None:
    device = builders.device(farm)
    row = told(farm, device)
    row.deliveries.filter(protocol="mqtt").update(state="acknowledged", attempts=1)
    row.deliveries.filter(protocol="coap").update(state="failed", attempts=3, last_error="no observer")
    shown = viewer.get(f"{URL}/{row.uuid}").json()
    states = {one["protocol"]: (one["state"], one["attempts"], one["lastError"]) for one in shown.pop("deliveries")}
    assert states == {
        "socketio": ("pending", 0, ""),
        "mqtt": ("acknowledged", 1, ""),
        "coap": ("failed", 3, "no observer"),
    }
    assert shown == {
        "uuid": str(row.uuid),
        "organization": str(farm.uuid),
        "device": str(device.uuid),
        "event": "alert",
        "priority": 5,
        "payload": {"value": 5.1},
        "timestamp": "2026-05-01T05:00:00Z",
        "createdAt": "2026-05-01T06:00:00Z",
        "publishedAt": None,
    }


def test_notifications_come_newest_first_and_are_filtered(farm: Organization, viewer: Any) -> None:
    device = builders.device(farm)
    first, second = told(farm, device), told(farm, device, event="device-state-change", minute=1)
    third = told(farm, minute=2)

    def found(**filters: Any) -> list[str]:
        return [row["uuid"] for row in viewer.get(URL, filters).json()["results"]]

    assert found() == [str(third.uuid), str(second.uuid), str(first.uuid)]
    assert found(device=device.uuid) == [str(second.uuid), str(first.uuid)]
    assert found(event="alert") == [str(third.uuid), str(first.uuid)]
    assert found(device=device.uuid, event="alert") == [str(first.uuid)]
    assert found(organization=builders.organization().uuid) == []
    assert viewer.get(URL, {"since": "noon"}).json().keys() == {"since"}


def test_since_asks_for_what_was_written_since_then_however_long_ago_it_happened(
    farm: Organization, viewer: Any
) -> None:
    told(farm)
    late = told(farm, minute=5)
    found = viewer.get(URL, {"since": "2026-05-01T06:05:00Z"}).json()["results"]
    assert [row["uuid"] for row in found] == [str(late.uuid)]


def test_notifications_of_others_are_not_found(viewer: Any) -> None:
    foreign = told(builders.organization())
    assert viewer.get(URL).json()["count"] == 0
    assert viewer.get(f"{URL}/{foreign.uuid}").status_code == 404


def test_a_page_of_notifications_takes_five_queries(
    farm: Organization, viewer: Any, django_assert_max_num_queries: Any
) -> None:
    for minute in range(5):
        told(farm, builders.device(farm), minute=minute)
    with django_assert_max_num_queries(5):
        viewer.get(URL)
