"""The REST API of logging in, sensors, devices, tokens and readings, as a program sees it."""

from __future__ import annotations

import csv
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import pytest
from django.contrib.auth.models import User
from django.db import DataError, IntegrityError, OperationalError, connection
from django.test import RequestFactory
from django.utils import timezone
from rest_framework.test import APIClient

from devices import catalogue, tokens
from devices.models import (
    CatalogueVersion,
    Device,
    DeviceState,
    DeviceToken,
    Membership,
    Organization,
    Reading,
    Sensor,
    StateChange,
    Variable,
)
from devices.views import ReadingViewSet, SensorViewSet
from tests import builders
from tests.problems import problem, wrong

pytestmark = pytest.mark.django_db
API = "/api/v1"
START = datetime(2026, 5, 1, 6, tzinfo=UTC)


@pytest.fixture
def farm() -> Organization:
    return builders.organization("Basil Farm")


@pytest.fixture
def admin(farm: Organization) -> Any:
    return client_of(builders.member(farm, "admin"))


def client_of(person: User) -> Any:
    client = APIClient()
    client.force_authenticate(person)
    return client


# Bodies


@pytest.mark.parametrize(
    ("body", "field", "complaint"),
    [
        (
            {"nmae": "Tank"},
            "nmae",
            "There is no such field; known here: organization, area, name, clock, lateAfterSeconds.",
        ),
        ({"uuid": str(uuid4())}, "uuid", "This field cannot be written."),
        ({"name": ""}, "name", "may not be blank"),
        ({"organization": "7"}, "organization", "Must be a uuid."),
        ({"organization": str(uuid4())}, "organization", "There is none with the uuid"),
        ({"organization": 7}, "organization", "Must be a uuid."),
        ({"name": "Taken"}, "name", "There is already a sensor with this name for this organization."),
    ],
)
def test_a_sensor_that_cannot_be_is_refused_by_field(
    farm: Organization, admin: Any, body: dict[str, Any], field: str, complaint: str
) -> None:
    builders.sensor(farm, "Taken")
    answer = admin.post(f"{API}/sensors", {"organization": str(farm.uuid), "name": "Tank"} | body)
    assert answer.status_code == 400
    assert wrong(answer).keys() == {field}
    assert complaint in wrong(answer)[field]


def test_all_that_is_wrong_is_told_at_once(admin: Any) -> None:
    assert wrong(admin.post(f"{API}/sensors", {"x": 1})).keys() == {"x", "organization", "name"}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[1]", 400),
        (b'{"name": NaN}', 400),
        (b'{"name": "\\u0000"}', 400),
        (b'{"name": "\\ud800"}', 400),
        (b'{"\\ud800": 1}', 400),
        (b"[" * 100_000, 400),
        (b'{"name": "' + b"x" * 1_048_576 + b'"}', 413),
    ],
)
def test_a_body_that_no_database_could_hold_is_refused(admin: Any, body: bytes, status: int) -> None:
    answer = admin.generic("POST", f"{API}/sensors", body, "application/json")
    assert answer.status_code == status
    assert answer.json()


def test_escaped_characters_that_are_complete_are_taken(farm: Organization, admin: Any) -> None:
    body = b'{"organization": "%s", "name": "\\ud83c\\udf3f \\\\u0000"}' % str(farm.uuid).encode()
    answer = admin.generic("POST", f"{API}/sensors", body, "application/json")
    assert answer.json()["name"] == "\N{HERB} \\u0000"


def test_what_was_read_can_be_written_back(farm: Organization, admin: Any) -> None:
    state = builders.device(farm).states.get()
    url = f"{API}/device-states/{state.uuid}"
    body = admin.get(url).json()
    assert admin.put(url, body | {"name": "mode"}).status_code == 200
    refused = admin.put(url, body | {"value": "on"})
    assert wrong(refused).keys() == {"value"}


def test_a_row_stays_where_it_was_made(farm: Organization, admin: Any) -> None:
    other = builders.organization()
    Membership.objects.create(user=User.objects.get(memberships__organization=farm), organization=other, role="admin")
    sensor = builders.sensor(farm)
    for path, body in (
        (f"sensors/{sensor.uuid}", {"organization": str(other.uuid)}),
        (f"variables/{sensor.variables.get().uuid}", {"sensor": str(builders.sensor(other).uuid)}),
        (f"device-states/{builders.device(farm).states.get().uuid}", {"device": str(builders.device(other).uuid)}),
    ):
        answer = admin.patch(f"{API}/{path}", body)
        assert wrong(answer).keys() == {next(iter(body))}
    assert admin.patch(f"{API}/sensors/{sensor.uuid}", {"organization": str(farm.uuid)}).status_code == 200


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"allowedValues": ["on", 1]}, "item 1: must be a string, not a number"),
        ({"allowedValues": {"on": 1}}, "must be a list of values"),
        ({"datatype": "number", "allowedValues": ["1"]}, "item 0: must be a number, not a string"),
    ],
)
def test_allowed_values_are_of_the_state_s_datatype(
    farm: Organization, admin: Any, body: dict[str, Any], complaint: str
) -> None:
    device = builders.device(farm)
    answer = admin.post(f"{API}/device-states", {"device": str(device.uuid), "name": "mode"} | body)
    assert wrong(answer) == {"allowedValues": complaint}


def test_a_membership_needs_a_person_who_exists_and_is_not_a_member_yet(farm: Organization, admin: Any) -> None:
    member = builders.member(farm)
    superuser = client_of(builders.user(is_superuser=True))
    body = {"organization": str(farm.uuid), "user": member.username, "role": "operator"}
    assert wrong(superuser.post(f"{API}/memberships", body)).keys() == {"organization"}
    assert wrong(superuser.post(f"{API}/memberships", body | {"user": "nobody"})).keys() == {"user"}
    assert wrong(superuser.post(f"{API}/memberships", body | {"role": "king"})).keys() == {"role"}
    assert admin.delete(f"{API}/memberships/{farm.uuid}/{member.username}").status_code == 204
    assert not Membership.objects.filter(user=member).exists()
    assert admin.get(f"{API}/memberships/{farm.uuid}/%00").status_code in (400, 404)


# Lists


def test_a_list_comes_in_pages(farm: Organization, admin: Any) -> None:
    for number in range(5):
        builders.device(farm, f"Pump {number}")
    first = admin.get(f"{API}/devices?pageSize=2").json()
    assert first.keys() == {"count", "next", "previous", "results"}
    assert (first["count"], first["previous"], len(first["results"])) == (5, None, 2)
    assert parse_qs(urlsplit(first["next"]).query) == {"page": ["2"], "pageSize": ["2"]}
    last = admin.get(f"{API}/devices?pageSize=2&page=3").json()
    assert ([row["name"] for row in last["results"]], last["next"]) == (["Pump 4"], None)
    assert admin.get(f"{API}/devices?page=9").status_code == 404


def test_a_page_has_50_rows_and_at_most_500(farm: Organization, admin: Any) -> None:
    Device.objects.bulk_create(Device(organization=farm, name=f"{number}") for number in range(501))
    sizes = [len(admin.get(f"{API}/devices", query).json()["results"]) for query in ({}, {"pageSize": "500"})]
    assert sizes == [50, 500]
    assert wrong(admin.get(f"{API}/devices", {"pageSize": "501"})).keys() == {"pageSize"}
    assert admin.get(f"{API}/devices", {"page": "12"}).status_code == 404


def test_lists_are_ordered_and_searched(farm: Organization, admin: Any) -> None:
    for name in ("Basil", "Chives", "Anise"):
        builders.sensor(farm, name)

    def names(**query: str) -> list[str]:
        return [row["name"] for row in admin.get(f"{API}/sensors", query).json()["results"]]

    assert names(ordering="name") == ["Anise", "Basil", "Chives"]
    assert names(ordering="-name") == ["Chives", "Basil", "Anise"]
    assert names(ordering="-createdAt") == ["Anise", "Chives", "Basil"]
    assert names(search="IV") == ["Chives"]
    assert wrong(admin.get(f"{API}/sensors", {"ordering": "nmae"})).keys() == {"ordering"}
    for typo in ("ture", "null", "2"):
        assert wrong(admin.get(f"{API}/devices", {"connected": typo})).keys() == {"connected"}
    assert [admin.get(f"{API}/devices", {"connected": word}).status_code for word in ("true", "False", "1")] == [
        200
    ] * 3


def test_a_whole_list_is_a_file_for_spreadsheets(farm: Organization, admin: Any) -> None:
    for number in range(60):
        builders.sensor(farm, f"=Tank {number:02}", variables={})
    stranger = builders.sensor(builders.organization(), "Secret")
    for answer in (
        admin.get(f"{API}/sensors", {"format": "csv", "ordering": "name"}),
        admin.get(f"{API}/sensors", {"ordering": "name"}, headers={"Accept": "text/csv"}),
    ):
        assert answer.headers["Content-Type"] == "text/csv; charset=utf-8"
        assert "sensors.csv" in answer.headers["Content-Disposition"]
        rows = list(csv.DictReader(b"".join(answer.streaming_content).decode().splitlines()))
        assert [row["name"] for row in rows] == [f"'=Tank {number:02}" for number in range(60)]
        assert str(stranger.uuid) not in str(rows)
    answer = admin.get(f"{API}/sensors", {"format": "ndjson", "ordering": "name"})
    assert (answer.headers["Content-Type"], "sensors.ndjson" in answer.headers["Content-Disposition"]) == (
        "application/x-ndjson", True,
    )  # fmt: skip
    objects = [json.loads(line) for line in b"".join(answer.streaming_content).splitlines()]
    assert [each["name"] for each in objects] == [f"=Tank {number:02}" for number in range(60)]
    assert objects[0].keys() == admin.get(f"{API}/sensors").json()["results"][0].keys()
    assert problem(admin.get(f"{API}/sensors", {"format": "ndjson", "nmae": "x"}), 400)["code"] == "invalid"
    assert problem(admin.get(f"{API}/sensors", {"format": "csv", "nmae": "x"}), 400)["code"] == "invalid"
    assert admin.get(f"{API}/sensors/{stranger.uuid}", {"format": "csv"}).status_code == 404


def test_lists_are_filtered(farm: Organization, admin: Any) -> None:
    tank, pool = (
        builders.sensor(farm, "Fish tank"),
        builders.sensor(farm, "Pool", variables={"ec": "number", "ph": "number"}),
    )
    pump = builders.device(farm)
    builders.token(tank)
    builders.token(pump)
    DeviceToken.objects.filter(device=pump).revoke()
    builders.token(pool, expires_at=timezone.now() - timedelta(seconds=1))

    def count(path: str, **filters: Any) -> int:
        found: int = admin.get(f"{API}/{path}", filters).json()["count"]
        return found

    assert count("sensors", name="fish") == 1
    assert count("sensors", organization=farm.uuid) == 2
    assert count("sensors", organization=uuid4()) == 0
    assert count("variables", sensor=pool.uuid) == 2
    assert count("variables", sensor=pool.uuid, name="ec") == 1
    assert count("device-states", device=pump.uuid) == 1
    assert count("device-tokens", sensor=tank.uuid) == 1
    assert (count("device-tokens", live=True), count("device-tokens", live=False)) == (1, 2)
    assert count("memberships", role="admin") == 1
    assert wrong(admin.get(f"{API}/sensors?organization=7")).keys() == {"organization"}


# Tokens


def test_a_token_is_shown_in_the_answer_that_issues_it_and_never_again(farm: Organization, admin: Any) -> None:
    sensor = builders.sensor(farm)
    expires = (timezone.now() + timedelta(days=1)).isoformat()
    body = {"sensor": str(sensor.uuid), "name": "tank 3", "highestPriority": 1, "expiresAt": expires}
    answer = admin.post(f"{API}/device-tokens", body)
    assert answer.status_code == 201
    issued = answer.json()
    token = issued.pop("token")
    credential = catalogue.Catalogue().credential(token)
    assert credential is not None
    assert (credential.originator.uuid, credential.highest_priority) == (str(sensor.uuid), 1)
    assert issued == admin.get(f"{API}/device-tokens/{issued['uuid']}").json()
    assert (issued["organization"], issued["prefix"]) == (str(farm.uuid), tokens.prefix_of(token))
    for url in (f"{API}/device-tokens", f"{API}/device-tokens/{issued['uuid']}"):
        shown = admin.get(url).text
        assert '"token"' not in shown
        assert "digest" not in shown
        assert token.split("_", 2)[2] not in shown


@pytest.mark.parametrize("how", ["delete", "revoke"])
def test_a_revoked_token_stays_on_record_and_opens_nothing(farm: Organization, admin: Any, how: str) -> None:
    token = builders.token(builders.device(farm))
    url = f"{API}/device-tokens/{DeviceToken.objects.get().uuid}"
    version = CatalogueVersion.objects.get(organization=farm).version
    if how == "delete":
        assert admin.delete(url).status_code == 204
    else:
        assert admin.post(f"{url}/revoke").json()["revokedAt"] is not None
    revoked_at = admin.get(url).json()["revokedAt"]
    assert catalogue.Catalogue().credential(token) is None
    assert CatalogueVersion.objects.get(organization=farm).version == version + 1
    assert admin.post(f"{url}/revoke").json()["revokedAt"] == revoked_at


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, ""),
        ({"sensor": "sensor", "device": "device"}, ""),
        ({"sensor": "foreign"}, "sensor"),
        ({"sensor": "sensor", "highestPriority": 0}, "highestPriority"),
        ({"sensor": "sensor", "highestPriority": 11}, "highestPriority"),
        ({"sensor": "sensor", "expiresAt": "2020-01-01T00:00:00Z"}, "expiresAt"),
        ({"sensor": "sensor", "token": "mine"}, "token"),
        ({"sensor": "sensor", "prefix": "mine"}, "prefix"),
        ({"sensor": "sensor", "organization": "mine"}, "organization"),
    ],
)
def test_a_token_that_cannot_be_is_not_issued(farm: Organization, admin: Any, body: dict[str, Any], field: str) -> None:
    rows = {
        "sensor": str(builders.sensor(farm).uuid),
        "device": str(builders.device(farm).uuid),
        "foreign": str(builders.sensor(builders.organization()).uuid),
    }
    answer = admin.post(f"{API}/device-tokens", {key: rows.get(value, value) for key, value in body.items()})
    assert list(wrong(answer)) == [field]
    assert not DeviceToken.objects.exists()


def test_a_token_can_be_renamed_after_it_expired_but_not_given_to_another(farm: Organization, admin: Any) -> None:
    sensor = builders.sensor(farm)
    builders.token(sensor, expires_at=timezone.now() - timedelta(days=1))
    url = f"{API}/device-tokens/{DeviceToken.objects.get().uuid}"
    assert admin.put(url, admin.get(url).json() | {"name": "old"}).json()["name"] == "old"
    assert wrong(admin.patch(url, {"sensor": str(builders.sensor(farm).uuid)})).keys() == {"sensor"}
    assert wrong(admin.patch(url, {"expiresAt": "2020-01-01T00:00:00Z"})).keys() == {"expiresAt"}


# Readings and state changes


def readings(sensor: Sensor, count: int, **values: Any) -> Variable:
    variable = sensor.variables.first()
    assert variable is not None
    Reading.objects.bulk_create(
        Reading(variable=variable, timestamp=START + timedelta(minutes=minute), **(values or {"number": minute}))
        for minute in range(count)
    )
    return variable


def test_readings_come_newest_first_and_within_a_time_span(farm: Organization, admin: Any) -> None:
    sensor = builders.sensor(farm)
    variable = readings(sensor, 5)
    found = admin.get(f"{API}/readings", {"sensor": sensor.uuid}).json()["results"]
    assert [row["value"] for row in found] == [4, 3, 2, 1, 0]
    assert found[-1] == {
        "sensor": str(sensor.uuid),
        "variable": str(variable.uuid),
        "name": "ph",
        "timestamp": "2026-05-01T06:00:00Z",
        "value": 0,
        "quality": "good",
        "reason": None,
    }
    span = {"variable": variable.uuid, "from": "2026-05-01T06:01:00Z", "to": "2026-05-01T06:03:00Z"}
    assert [row["value"] for row in admin.get(f"{API}/readings", span).json()["results"]] == [3, 2, 1]
    assert wrong(admin.get(f"{API}/readings", span | {"from": "yesterday"})).keys() == {"from"}


def test_readings_of_everything_are_not_sorted(admin: Any) -> None:
    assert wrong(admin.get(f"{API}/readings")).keys() == {"variable"}
    assert admin.get(f"{API}/readings", {"variable": "ph"}).status_code == 400


def test_readings_of_another_organization_are_not_found(admin: Any) -> None:
    foreign = builders.sensor(builders.organization())
    variable = readings(foreign, 2)
    assert admin.get(f"{API}/readings", {"sensor": foreign.uuid}).json()["count"] == 0
    assert admin.get(f"{API}/readings", {"variable": variable.uuid}).json()["count"] == 0


@pytest.mark.parametrize(
    ("datatype", "stored", "shown"),
    [
        ("number", {"number": 6.1}, 6.1),
        ("boolean", {"number": 1}, True),
        ("string", {"text": "ok"}, "ok"),
        ("string", {"text": ""}, ""),
    ],
)
def test_a_reading_is_shown_as_its_datatype_has_it(
    farm: Organization, admin: Any, datatype: str, stored: dict[str, Any], shown: Any
) -> None:
    sensor = builders.sensor(farm, variables={"x": datatype})
    readings(sensor, 1, **stored)
    (row,) = admin.get(f"{API}/readings", {"sensor": sensor.uuid}).json()["results"]
    assert row["value"] == shown
    assert type(row["value"]) is type(shown)


def test_readings_of_a_variable_are_read_in_the_order_of_their_index(farm: Organization) -> None:
    variable = readings(builders.sensor(farm), 300)
    other = readings(builders.sensor(farm), 300)
    assert other != variable
    view = ReadingViewSet()
    view.request = RequestFactory().get("/", {"variable": str(variable.uuid)})  # type: ignore[assignment]
    view.request.user = builders.user(is_superuser=True)
    view.request.query_params = view.request.GET  # type: ignore[misc]
    rows = view.filter_queryset(view.get_queryset())[:50]
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE devices_reading")
            cursor.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off")
    plan = rows.explain()
    assert "one_reading_per_variable_and_time" in plan or "devices_reading USING INDEX" in plan
    assert "Sort" not in plan
    assert "TEMP B-TREE" not in plan


def test_state_changes_are_listed_newest_first_and_filtered(farm: Organization, admin: Any) -> None:
    state, other = builders.device(farm).states.get(), builders.device(farm).states.get()
    for minute, row in enumerate((state, state, other)):
        when = START + timedelta(minutes=minute)
        StateChange.objects.create(
            effect_key=str(minute), state=row, value="on", source="rule", actor="c", timestamp=when
        )
    found = admin.get(f"{API}/state-changes", {"device": state.device.uuid}).json()["results"]
    assert [row["timestamp"] for row in found] == ["2026-05-01T06:01:00Z", "2026-05-01T06:00:00Z"]
    assert (found[0]["device"], found[0]["state"], found[0]["stateName"]) == (
        str(state.device.uuid),
        str(state.uuid),
        "power",
    )
    assert admin.get(f"{API}/state-changes", {"from": "2026-05-01T06:02:00Z"}).json()["count"] == 1
    assert admin.get(f"{API}/state-changes", {"source": "person"}).json()["count"] == 0


def test_lists_take_the_same_number_of_queries_whatever_their_length(
    farm: Organization, admin: Any, django_assert_max_num_queries: Any
) -> None:
    for _ in range(5):
        sensor, device = builders.sensor(farm), builders.device(farm)
        readings(sensor, 3)
        builders.token(sensor)
        builders.token(device)
    for path in (
        "sensors",
        "variables",
        "devices",
        "device-states",
        "device-tokens",
        "memberships",
        f"readings?sensor={sensor.uuid}",
    ):
        with django_assert_max_num_queries(4):
            admin.get(f"{API}/{path}")


# Trouble


@pytest.mark.parametrize(
    ("error", "status"), [(IntegrityError("twice"), 409), (DataError("too long"), 400), (OperationalError("gone"), 503)]
)
def test_a_database_in_trouble_is_answered_and_not_a_500(
    admin: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def fail(_self: Any) -> Any:
        raise error

    monkeypatch.setattr(SensorViewSet, "get_queryset", fail)
    answer = admin.get(f"{API}/sensors")
    assert answer.status_code == status
    assert ("Retry-After" in answer) == (status == 503)
    assert "gone" not in answer.text


def test_deleting_a_device_takes_its_states_along(farm: Organization, admin: Any) -> None:
    device = builders.device(farm)
    assert admin.delete(f"{API}/devices/{device.uuid}").status_code == 204
    assert not DeviceState.objects.exists()
