"""Alarms as people meet them: the REST API and the admin, with the rights of each role."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from rest_framework.test import APIClient

from aemos.lib import keys, redis
from devices.models import Organization, Role
from notifications.models import Notification
from rules.models import Alarm
from tests import builders
from tests.problems import wrong

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("empty_redis")]
API = "/api/v1/alarms"
WHEN = datetime(2026, 5, 1, 6, tzinfo=UTC)
LIST = "admin:rules_alarm_changelist"


class Farm:
    """Three alarms: one active and critical, one acknowledged, one cleared."""

    def __init__(self) -> None:
        self.organization = builders.organization()
        self.sensor = builders.sensor(self.organization, "Reservoir A")
        self.active = self.alarm("pH too high", severity="critical", message="pH is 6.9")
        self.known = self.alarm("dry", state="acknowledged", acknowledged_by="olga", acknowledged_at=WHEN)
        self.over = self.alarm(
            "cold", state="cleared", cleared_by="ivan", cleared_at=WHEN, raised_at=WHEN - timedelta(1)
        )

    def alarm(self, kind: str, **fields: Any) -> Alarm:
        known: dict[str, Any] = {
            "organization": self.organization, "source_type": "sensor", "originator_uuid": self.sensor.uuid, "type": kind,
            "raised_at": WHEN, "last_raised_at": WHEN,
        }  # fmt: skip
        return Alarm.objects.create(**{**known, **fields})

    def client(self, role: str = Role.OPERATOR) -> Any:
        client = APIClient()
        client.force_authenticate(builders.member(self.organization, role))
        return client

    def staff(self, role: str = Role.OPERATOR) -> Client:
        person = builders.member(self.organization, role)
        client = Client()
        client.force_login(person)
        return client


@pytest.fixture
def farm() -> Farm:
    return Farm()


def test_an_alarm_is_shown_with_the_name_of_its_sensor(farm: Farm) -> None:
    shown = farm.client(Role.VIEWER).get(f"{API}/{farm.active.uuid}").json()

    assert shown == {
        "uuid": str(farm.active.uuid), "organization": str(farm.organization.uuid), "sourceType": "sensor",
        "originatorUuid": str(farm.sensor.uuid), "originatorName": "Reservoir A", "type": "pH too high",
        "severity": "critical", "state": "active", "message": "pH is 6.9", "chain": None, "node": "",
        "raisedAt": "2026-05-01T06:00:00Z", "lastRaisedAt": "2026-05-01T06:00:00Z", "timesRaised": 1, "isFlapping": False,
        "acknowledgedAt": None, "acknowledgedBy": "", "clearedAt": None, "clearedBy": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("query", "types"),
    [
        ({}, ["dry", "pH too high", "cold"]),
        ({"state": "active"}, ["pH too high"]),
        ({"open": "true"}, ["dry", "pH too high"]),
        ({"open": "false"}, ["cold"]),
        ({"severity": "critical"}, ["pH too high"]),
        ({"type": "dry"}, ["dry"]),
        ({"from": "2026-05-01T06:00:00Z"}, ["dry", "pH too high"]),
        ({"from": "2026-05-01T06:00:01Z"}, []),
        ({"originator": "sensor"}, ["dry", "pH too high", "cold"]),
        ({"originator": "7b1c2f60-0a4e-4d2c-9a51-3f1f6d1f0002"}, []),
    ],
)
def test_the_list_is_filtered(farm: Farm, query: dict[str, str], types: list[str]) -> None:
    query = {name: str(farm.sensor.uuid) if value == "sensor" else value for name, value in query.items()}
    answer = farm.client(Role.VIEWER).get(API, query)

    assert answer.status_code == 200
    assert [row["type"] for row in answer.json()["results"]] == types


@pytest.mark.parametrize("query", [{"state": "gone"}, {"severity": "bad"}, {"from": "soon"}, {"originator": "x"}])
def test_a_filter_that_makes_no_sense_is_refused_by_name(farm: Farm, query: dict[str, str]) -> None:
    answer = farm.client().get(API, query)
    assert list(wrong(answer)) == list(query)


def test_a_page_of_alarms_costs_no_query_for_each(farm: Farm) -> None:
    client = farm.client()
    client.get(API)
    for number in range(20):
        farm.alarm(f"alarm {number}", originator_uuid=builders.sensor(farm.organization).uuid)
    with CaptureQueriesContext(connection) as asked:
        assert client.get(API).json()["count"] == 23
    assert len(asked) <= 8


def test_an_operator_acknowledges_and_clears_and_everybody_is_told(farm: Farm) -> None:
    client = farm.client()
    acknowledged = client.post(f"{API}/{farm.active.uuid}/acknowledge")
    cleared = client.post(f"{API}/{farm.active.uuid}/clear")

    assert (acknowledged.status_code, acknowledged.json()["state"]) == (200, "acknowledged")
    assert acknowledged.json()["acknowledgedBy"] == cleared.json()["clearedBy"] != ""
    assert (cleared.status_code, cleared.json()["state"]) == (200, "cleared")
    payloads = Notification.objects.order_by("id").values_list("payload", flat=True)
    assert [payload["change"] for payload in payloads] == ["acknowledged", "cleared"]
    assert redis.client().xlen(keys.NOTIFICATIONS) == 2


def test_what_was_decided_before_is_a_conflict(farm: Farm) -> None:
    client = farm.client()
    answers = [
        client.post(f"{API}/{farm.known.uuid}/acknowledge"),
        client.post(f"{API}/{farm.over.uuid}/acknowledge"),
        client.post(f"{API}/{farm.over.uuid}/clear"),
    ]
    assert [answer.status_code for answer in answers] == [409, 409, 409]
    assert Notification.objects.count() == 0


def test_a_viewer_may_look_and_no_more(farm: Farm) -> None:
    client = farm.client(Role.VIEWER)
    for decision in ("acknowledge", "clear"):
        answer = client.post(f"{API}/{farm.active.uuid}/{decision}")
        assert answer.status_code == 403
        assert {"operator", "viewer"} <= set(re.findall(r"\w+", answer.json()["detail"]))
    for method in ("put", "patch", "delete"):
        assert getattr(client, method)(f"{API}/{farm.active.uuid}", {}).status_code == 405
    assert client.post(API, {}).status_code == 405
    farm.active.refresh_from_db()
    assert farm.active.state == "active"


def test_alarms_of_another_organization_do_not_exist(farm: Farm) -> None:
    stranger = APIClient()
    stranger.force_authenticate(builders.member(builders.organization(), Role.ADMIN))
    assert stranger.get(API).json()["count"] == 0
    assert stranger.post(f"{API}/{farm.active.uuid}/clear").status_code == 404


def shown(client: Client, **query: Any) -> list[str]:
    return [row.type for row in client.get(reverse(LIST), query).context["cl"].result_list]


def act(client: Client, name: str, *rows: Alarm) -> Any:
    return client.post(reverse(LIST), {"action": name, "_selected_action": [row.pk for row in rows]}, follow=True)


@pytest.mark.parametrize(
    ("query", "types"),
    [
        ({"state__exact": "active"}, ["pH too high"]),
        ({"severity__exact": "critical"}, ["pH too high"]),
        ({"is_flapping__exact": "1"}, []),
        ({"q": "6.9"}, ["pH too high"]),
        ({"q": "originator"}, ["dry", "pH too high", "cold"]),
    ],
)
def test_the_admin_filters_and_searches_alarms(farm: Farm, query: dict[str, str], types: list[str]) -> None:
    query = {name: str(farm.sensor.uuid) if value == "originator" else value for name, value in query.items()}
    assert shown(farm.staff(), **query) == types


def test_the_admin_shows_the_name_of_the_sensor(farm: Farm) -> None:
    client = farm.staff()
    Alarm.objects.filter(pk=farm.active.pk).update(is_flapping=True)
    assert "sensor Reservoir A" in client.get(reverse(LIST)).text
    assert "active, flapping" in client.get(reverse(LIST)).text
    page = client.get(reverse("admin:rules_alarm_change", args=[farm.active.pk]))
    assert page.status_code == 200
    assert "sensor Reservoir A" in page.text
    assert 'name="_save"' not in page.text


def test_selected_alarms_are_acknowledged_and_cleared_in_the_admin(farm: Farm) -> None:
    client = farm.staff()
    assert "1 acknowledged." in act(client, "acknowledge_selected", farm.active, farm.known, farm.over).text
    assert "2 cleared." in act(client, "clear_selected", farm.active, farm.known, farm.over).text
    assert set(Alarm.objects.values_list("state", flat=True)) == {"cleared"}
    assert Notification.objects.count() == 3


def test_staff_who_may_only_look_are_offered_no_action(farm: Farm) -> None:
    client = farm.staff(Role.VIEWER)
    assert "acknowledge_selected" not in client.get(reverse(LIST)).text
    act(client, "acknowledge_selected", farm.active)
    farm.active.refresh_from_db()
    assert farm.active.state == "active"


def test_staff_decide_only_about_alarms_of_organizations_in_which_they_may(farm: Farm) -> None:
    other = Organization.objects.create(name="Another farm")
    theirs = farm.alarm("theirs", organization=other)
    person = builders.member(farm.organization, Role.OPERATOR, is_staff=True)
    other.memberships.create(user=person, role=Role.VIEWER)
    client = Client()
    client.force_login(person)

    assert "1 acknowledged." in act(client, "acknowledge_selected", farm.active, theirs).text
    theirs.refresh_from_db()
    assert theirs.state == "active"
