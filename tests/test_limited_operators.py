"""Operators who are limited to an area: what they may do there, and nothing elsewhere, over REST, on pages and in the admin."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.test import Client
from django.utils import timezone

from devices.models import Area, Device, DeviceState, Invitation, Membership, Organization
from devices.permissions import RIGHTS, Access
from rules.models import Alarm
from tests import builders
from tests.problems import wrong

pytestmark = pytest.mark.django_db
API = "/api/v1"


class Farm:
    """A greenhouse North with a bench, one South, and a pump and a sensor in each and in none."""

    def __init__(self) -> None:
        self.organization = builders.organization()
        self.north = self._area("North")
        self.bench = self._area("Bench", parent=self.north)
        self.south = self._area("South")
        self.pumps = {name: self._pump(name, area) for name, area in self._places().items()}
        self.alarms = {name: self._alarm(name, area) for name, area in self._places().items()}
        self.person = builders.member(self.organization, "operator")
        Membership.objects.update(area=self.north)
        self.client = builders.client_of(self.person)

    def _places(self) -> dict[str, Area | None]:
        return {"north": self.north, "bench": self.bench, "south": self.south, "nowhere": None}

    def _area(self, name: str, **fields: Any) -> Area:
        return Area.objects.create(organization=self.organization, name=name, **fields)

    def _pump(self, name: str, area: Area | None) -> Device:
        pump = builders.device(self.organization, f"Pump {name}", states={"power": ["on", "off"]})
        Device.objects.filter(pk=pump.pk).update(area=area)
        return pump

    def _alarm(self, name: str, area: Area | None) -> Alarm:
        sensor = builders.sensor(self.organization, f"Tank {name}")
        sensor.area = area
        sensor.save()
        return Alarm.objects.create(
            organization=self.organization, source_type="sensor", originator_uuid=sensor.uuid, type="pH high",
            raised_at=timezone.now(), last_raised_at=timezone.now(),
        )  # fmt: skip

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return self.client.post(f"{API}/{path}", body or {}, content_type="application/json")


@pytest.fixture
def farm() -> Farm:
    return Farm()


@pytest.mark.usefixtures("empty_redis")
@pytest.mark.parametrize(("place", "status"), [("north", 201), ("bench", 201), ("south", 403), ("nowhere", 403)])
def test_devices_are_switched_and_locked_in_the_area_and_its_parts(farm: Farm, place: str, status: int) -> None:
    pump = farm.pumps[place]
    answer = farm.post("device-state-instances", {"deviceUuid": str(pump.uuid), "stateName": "power", "value": "on"})
    assert answer.status_code == status, answer.content
    state = pump.states.get()
    locked = farm.post(
        f"device-states/{state.uuid}/lock", {"until": (timezone.now() + timedelta(minutes=1)).isoformat()}
    )
    assert locked.status_code == (200 if status == 201 else 403), locked.content
    if status == 403:
        assert "limited to an area" in answer.json()["detail"]
        assert DeviceState.objects.get(pk=state.pk).value is None


@pytest.mark.parametrize(("place", "status"), [("north", 200), ("bench", 200), ("south", 403), ("nowhere", 403)])
def test_alarms_are_acknowledged_in_the_area_and_its_parts(farm: Farm, place: str, status: int) -> None:
    for verb in ("acknowledge", "clear"):
        assert farm.post(f"alarms/{farm.alarms[place].uuid}/{verb}").status_code == status


def test_alarms_are_found_by_the_area(farm: Farm) -> None:
    for area, places in ((farm.north, {"north", "bench"}), (farm.bench, {"bench"}), (farm.south, {"south"})):
        rows = farm.client.get(f"{API}/alarms", {"area": str(area.uuid)}).json()["results"]
        assert {row["uuid"] for row in rows} == {str(farm.alarms[place].uuid) for place in places}
        page = farm.client.get("/", {"area": str(area.uuid)}).text
        assert page.count("pH high") == len(places)
    foreign = Area.objects.create(organization=builders.organization(), name="x")
    for unknown in (foreign.uuid, farm.organization.uuid):
        assert farm.client.get(f"{API}/alarms", {"area": str(unknown)}).json()["count"] == 0


def test_all_of_the_farm_is_seen(farm: Farm) -> None:
    for path, count in (("devices", 4), ("alarms", 4), ("sensors", 4), ("device-states", 4), ("rule-chains", 0)):
        assert farm.client.get(f"{API}/{path}").json()["count"] == count, path


def test_what_belongs_to_the_whole_farm_is_not_changed(farm: Farm) -> None:
    chain = builders.switching_chain(builders.sensor(farm.organization), farm.pumps["north"])
    refused = [
        farm.client.patch(f"{API}/rule-chains/{chain.uuid}", {"name": "x"}, content_type="application/json"),
        farm.client.delete(f"{API}/rule-chains/{chain.uuid}"),
        farm.post("rule-chains", {"organization": str(farm.organization.uuid), "name": "x"}),
        farm.post("notifications", {"organization": str(farm.organization.uuid), "title": "x"}),
        farm.client.get(f"/rules/new?organization={farm.organization.uuid}"),
        farm.client.post(f"/rules/{chain.uuid}/switch", {"enabled": "no"}),
    ]
    assert [answer.status_code for answer in refused] == [403] * len(refused)


def test_the_pages_have_buttons_for_what_stands_there(farm: Farm) -> None:
    text = farm.client.get("/").content.decode()
    for place in ("north", "bench", "south", "nowhere"):
        mine = place in ("north", "bench")
        assert (f'data-device="{farm.pumps[place].uuid}"' in text) == mine, place
        assert (f"/alarms/{farm.alarms[place].uuid}/acknowledge" in text) == mine, place
        page = farm.client.get(f"/devices/{farm.pumps[place].uuid}").content.decode()
        assert ("data-post" in page) == mine, place


def test_the_admin_decides_only_about_alarms_there(farm: Farm) -> None:
    chosen = {"action": "acknowledge_selected", "_selected_action": [row.pk for row in farm.alarms.values()]}
    answer = farm.client.post("/admin/rules/alarm/", chosen, follow=True)
    assert "2 acknowledged." in answer.content.decode()
    assert {name for name, row in farm.alarms.items() if Alarm.objects.get(pk=row.pk).acknowledged_by} == {
        "north",
        "bench",
    }
    for place, status in (("north", 200), ("south", 200)):
        state = farm.pumps[place].states.get()
        page = farm.client.get(f"/admin/devices/devicestate/{state.pk}/change/")
        assert page.status_code == status
        assert ('name="_save"' in page.content.decode()) == (place == "north")


def test_an_api_token_is_limited_as_its_owner(farm: Farm) -> None:
    token = farm.post("api-tokens", {"name": "phone", "role": "operator"}).json()["token"]
    for place, status in (("north", 200), ("south", 403)):
        answer = Client().post(
            f"{API}/alarms/{farm.alarms[place].uuid}/acknowledge", headers={"authorization": f"Bearer {token}"}
        )
        assert answer.status_code == status


def test_an_area_stays_while_somebody_is_limited_to_it(farm: Farm) -> None:
    admin = builders.client_of(builders.member(farm.organization, "admin"))
    answer = admin.delete(f"{API}/areas/{farm.north.uuid}")
    assert (answer.status_code, farm.person.username in answer.json()["detail"]) == (409, True)
    page = admin.post(f"/areas/{farm.north.uuid}/delete", follow=True).content.decode()
    assert f"{farm.person.username} may act only in it" in page
    shown = admin.post(f"/admin/devices/area/{farm.north.pk}/delete/", {"post": "yes"})
    assert (shown.status_code, Area.objects.filter(pk=farm.north.pk).exists()) == (200, True)
    Membership.objects.filter(user=farm.person).update(area=None)
    assert admin.delete(f"{API}/areas/{farm.north.uuid}").status_code == 204


def test_a_farm_with_limited_people_can_be_deleted(farm: Farm) -> None:
    farm.organization.delete()
    assert not Membership.objects.filter(user=farm.person).exists()


def test_memberships_and_invitations_name_the_area(farm: Farm) -> None:
    admin = builders.client_of(builders.member(farm.organization, "admin"))
    body = {"organization": str(farm.organization.uuid), "role": "operator", "area": str(farm.south.uuid)}
    invited = admin.post(f"{API}/invitations", body, content_type="application/json")
    assert (invited.status_code, invited.json()["area"]) == (201, str(farm.south.uuid))
    newcomer = builders.user()
    membership = Invitation.objects.of(invited.json()["token"]).accept(newcomer)
    assert membership.area == farm.south
    url = f"{API}/memberships/{farm.organization.uuid}/{newcomer.username}"
    foreign = Area.objects.create(organization=builders.organization(), name="Elsewhere")
    for change, field in (({"area": str(foreign.uuid)}, "area"), ({"role": "admin"}, "area")):
        answer = admin.patch(url, change, content_type="application/json")
        assert (answer.status_code, field in wrong(answer)) == (400, True), answer.content
    assert admin.patch(url, {"role": "admin", "area": None}, content_type="application/json").status_code == 200


@pytest.mark.parametrize("role", ["viewer", "admin"])
def test_an_area_limits_operators_only(farm: Farm, role: str) -> None:
    row = Membership(user=builders.user(), organization=farm.organization, role=role, area=farm.north)
    with pytest.raises(ValidationError, match="operators only"):
        row.clean()


@pytest.mark.parametrize("resource", RIGHTS)
@pytest.mark.parametrize("verb", ["add", "change", "delete"])
def test_nothing_that_stands_nowhere_is_changed(resource: str, verb: Any) -> None:
    limited = Access(False, {1: "operator"}, {1: frozenset({7})})
    assert not limited.may(verb, resource, 1)
    assert not limited.may(verb, resource, 1, area=8)
    assert limited.may(verb, resource, 1, area=7) == Access(False, {1: "operator"}).may(verb, resource, 1)
    assert limited.organizations(verb, resource) == []


def test_who_is_limited_in_one_farm_is_not_in_another(farm: Farm) -> None:
    other: Organization = builders.organization()
    Membership.objects.create(user=farm.person, organization=other, role="operator")
    pump = builders.device(other, states={"power": ["on", "off"]})
    text = builders.client_of(farm.person).get(f"/devices/{pump.uuid}").content.decode()
    assert "data-post" in text
