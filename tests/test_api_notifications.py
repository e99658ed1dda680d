"""The REST API of notifications: what was told, to whom, and how far it has come."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from django.contrib.auth.models import User
from rest_framework.test import APIClient

from aemos.lib import keys, redis
from devices.models import Device, Membership, Organization, Role
from notifications import messages
from notifications.messages import Message, Protocol
from notifications.models import Delivery, Notification, Unpublished
from tests import builders
from tests.problems import wrong

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]
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
        published_at=written,
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
        "publishedAt": "2026-05-01T06:00:00Z",
        "expiresAt": None,
    }
    Unpublished.objects.create(notification=row, uuid=row.uuid)
    assert viewer.get(f"{URL}/{row.uuid}").json()["publishedAt"] is None


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
    assert wrong(viewer.get(URL, {"from": "noon"})).keys() == {"from"}
    for moment in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
        assert wrong(viewer.get(URL, {"to": moment})).keys() == {"to"}


def test_since_asks_for_what_was_published_since_then_however_long_ago_it_happened(
    farm: Organization, viewer: Any
) -> None:
    told(farm)
    late = told(farm, minute=5)
    found = viewer.get(URL, {"from": "2026-05-01T06:05:00Z"}).json()["results"]
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


@pytest.fixture
def operator(farm: Organization) -> Any:
    client = APIClient()
    client.force_authenticate(builders.member(farm, Role.OPERATOR, username="olga"))
    return client


def published() -> list[Message]:
    return [messages.decode(fields[b"m"]) for _, fields in redis.client().xrange(keys.NOTIFICATIONS)]


def test_an_operator_tells_an_organization_something_by_hand(farm: Organization, operator: Any) -> None:
    body = {"organization": str(farm.uuid), "title": "Harvest", "message": "At noon.", "severity": "warning"}
    answer = operator.post(URL, body)
    assert answer.status_code == 201
    (message,) = published()
    assert str(message.id) == answer.json()["uuid"]
    assert (message.event, message.priority, message.device_uuid) == ("notification", 4, None)
    assert message.payload == {
        "title": "Harvest", "message": "At noon.", "severity": "warning", "source": "person", "actor": "olga"
    }  # fmt: skip
    assert [one["protocol"] for one in answer.json()["deliveries"]] == ["socketio", "mqtt", "coap"]
    assert answer.json()["publishedAt"] is not None
    assert message.expires_at == pytest.approx(time.time() + 86_400, abs=60)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"type": "socket"}, ["socketio"]),
        ({"type": "mqtt"}, ["mqtt"]),
        ({"type": "coap"}, ["coap"]),
        ({"type": "multi-protocol"}, ["socketio", "mqtt", "coap"]),
        ({"type": "pigeon"}, ["socketio", "mqtt", "coap"]),
        ({}, ["socketio", "mqtt", "coap"]),
        ({"type": "coap", "protocols": ["mqtt", "socketio", "mqtt"]}, ["mqtt", "socketio"]),
    ],
)
def test_the_type_says_which_protocols_unless_they_are_named(
    farm: Organization, operator: Any, chosen: dict[str, Any], expected: list[str]
) -> None:
    answer = operator.post(URL, {"organization": str(farm.uuid), "title": "x", **chosen})
    assert answer.status_code == 201, answer.json()
    assert [one["protocol"] for one in answer.json()["deliveries"]] == expected
    assert [list(map(str, message.protocols)) for message in published()] == [expected]


def test_the_same_event_id_tells_nobody_twice_and_is_of_one_organization(farm: Organization, operator: Any) -> None:
    other = builders.organization()
    Membership.objects.create(user=User.objects.get(username="olga"), organization=other, role=Role.OPERATOR)
    body = {"title": "x", "eventId": str(uuid4())}
    first, again = (operator.post(URL, {"organization": str(farm.uuid), **body}).json()["uuid"] for _ in range(2))
    foreign = operator.post(URL, {"organization": str(other.uuid), **body}).json()["uuid"]
    assert first == again != foreign
    assert [str(message.id) for message in published()] == [first, foreign]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"title": ""}, "title"),
        ({"severity": "awful"}, "severity"),
        ({"protocols": ["smoke"]}, "protocols[0]"),
        ({"protocols": []}, "protocols"),
        ({"device": str(uuid4())}, "device"),
        ({"organization": str(uuid4())}, "organization"),
        ({"payload": {}}, "payload"),
        ({"eventId": "1"}, "eventId"),
    ],
)
def test_a_notification_that_cannot_be_told_names_the_field(
    farm: Organization, operator: Any, fields: dict[str, Any], field: str
) -> None:
    answer = operator.post(URL, {"organization": str(farm.uuid), "title": "x", **fields})
    assert field in wrong(answer)
    assert Notification.objects.count() == 0


def test_a_device_of_another_organization_cannot_be_named_even_by_who_may_see_both(
    operator: Any, farm: Organization
) -> None:
    other = builders.organization()
    Membership.objects.create(user=User.objects.get(username="olga"), organization=other, role=Role.OPERATOR)
    body = {"organization": str(farm.uuid), "title": "x", "device": str(builders.device(other).uuid)}
    assert wrong(operator.post(URL, body)).keys() == {"device"}


def test_an_operator_elsewhere_who_only_views_here_may_not_tell_here(farm: Organization, operator: Any) -> None:
    other = builders.organization()
    Membership.objects.create(user=User.objects.get(username="olga"), organization=other, role=Role.VIEWER)
    assert operator.post(URL, {"organization": str(other.uuid), "title": "x"}).status_code == 403
    assert published() == []


def test_notifications_are_found_by_kind_and_by_what_became_of_them(farm: Organization, viewer: Any) -> None:
    fine, failed = told(farm), told(farm, event="notification", minute=1)
    failed.deliveries.filter(protocol="mqtt").update(state="failed")

    def found(**query: Any) -> list[str]:
        return [row["uuid"] for row in viewer.get(URL, query).json()["results"]]

    assert found(kind="notification") == [str(failed.uuid)]
    assert found(state="failed") == found(state="failed", protocol="mqtt") == [str(failed.uuid)]
    assert found(state="failed", protocol="coap") == []
    assert found(state="pending") == [str(failed.uuid), str(fine.uuid)]
    assert found(to="2026-05-01T06:00:30Z") == [str(fine.uuid)]
    assert wrong(viewer.get(URL, {"state": "lost"})).keys() == {"state"}


def test_resending_tells_it_again_on_all_its_protocols_with_a_new_deadline(farm: Organization, operator: Any) -> None:
    row = told(farm)
    row.deliveries.filter(protocol="mqtt").update(state="failed", attempts=5, last_error="never")
    answer = operator.post(f"{URL}/{row.uuid}/resend")
    assert answer.status_code == 200
    states = {(one["state"], one["attempts"], one["lastError"]) for one in answer.json()["deliveries"]}
    assert states == {("pending", 0, "")}
    (message,) = published()
    assert (message.id, set(message.protocols)) == (row.uuid, set(Protocol))
    assert message.expires_at == pytest.approx(time.time() + 86_400, abs=60)


def test_what_is_for_roles_is_shown_to_nobody_else(farm: Organization, viewer: Any, operator: Any) -> None:
    secret, general, empty = told(farm), told(farm, minute=1), told(farm, minute=2)
    Notification.objects.filter(pk=secret.pk).update(payload={"roles": ["admin", "operator"]})
    Notification.objects.filter(pk=empty.pk).update(payload={"roles": []})

    def seen(client: Any) -> list[str]:
        return [row["uuid"] for row in client.get(URL).json()["results"]]

    assert seen(viewer) == [str(empty.uuid), str(general.uuid)]
    assert viewer.get(f"{URL}/{secret.uuid}").status_code == 404
    assert seen(operator) == [str(empty.uuid), str(general.uuid), str(secret.uuid)]


def test_a_role_elsewhere_shows_nothing_of_what_is_for_roles_here(farm: Organization) -> None:
    Notification.objects.filter(pk=told(farm).pk).update(payload={"roles": ["operator"]})
    client = APIClient()
    person = builders.member(farm)
    Membership.objects.create(user=person, organization=builders.organization(), role=Role.OPERATOR)
    client.force_authenticate(person)
    assert client.get(URL).json()["results"] == []
