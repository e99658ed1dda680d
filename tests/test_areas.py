"""Areas: a tree of places, what stands in them, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.test import Client

from devices.areas.models import MAXIMUM_DEPTH, tree, within
from devices.models import Area, Device, Organization, Sensor
from tests import builders
from tests.problems import wrong
from tests.test_pages import measured

pytestmark = pytest.mark.django_db
API = "/api/v1"


@pytest.fixture
def farm() -> Organization:
    return builders.organization()


@pytest.fixture
def places(farm: Organization) -> dict[str, Area]:
    """A site with two greenhouses; benches in the first."""
    found: dict[str, Area] = {}
    for name, above in (("Site", ""), ("North", "Site"), ("Bench 2", "North"), ("Bench 1", "North"), ("South", "Site")):
        found[name] = Area.objects.create(organization=farm, name=name, parent=found.get(above))
    return found


@pytest.fixture
def client(farm: Organization) -> Client:
    client = Client()
    client.force_login(builders.member(farm, "admin"))
    return client


def sent(client: Client, method: str, path: str, body: dict[str, Any]) -> Any:
    return getattr(client, method)(f"{API}/{path}", body, content_type="application/json")


def test_the_tree_has_each_area_after_what_it_is_a_part_of(places: dict[str, Area]) -> None:
    assert [(area.name, depth) for area, depth in tree(Area.objects.all())] == [
        ("Site", 0), ("North", 1), ("Bench 1", 2), ("Bench 2", 2), ("South", 1),
    ]  # fmt: skip
    assert set(within(places["North"])) == {places[name].pk for name in ("North", "Bench 1", "Bench 2")}
    assert within(places["South"]) == [places["South"].pk]


def test_nothing_is_a_part_of_itself_of_strangers_or_too_deep(farm: Organization, places: dict[str, Area]) -> None:
    for name in ("Site", "North", "Bench 1"):
        places["Site"].parent = places[name]
        with pytest.raises(ValidationError, match="itself"):
            places["Site"].clean()
    foreign = Area.objects.create(organization=builders.organization(), name="Site")
    with pytest.raises(ValidationError, match="another organization"):
        Area(organization=farm, name="x", parent=foreign).clean()
    deep = None
    for number in range(MAXIMUM_DEPTH):
        deep = Area(organization=farm, name=f"in {number}", parent=deep)
        deep.clean()
        deep.save()
    with pytest.raises(ValidationError, match="the most"):
        Area(organization=farm, name="x", parent=deep).clean()


def test_sensors_and_devices_stand_in_areas_and_are_found_by_those_above(
    farm: Organization, places: dict[str, Area], client: Client
) -> None:
    tank = sent(
        client, "post", "sensors", {"organization": str(farm.uuid), "name": "Tank", "area": str(places["Bench 1"].uuid)}
    )
    assert tank.json()["area"] == str(places["Bench 1"].uuid)
    other = builders.sensor(farm, "Elsewhere")
    pump = builders.device(farm, "Pump")
    moved = sent(client, "patch", f"devices/{pump.uuid}", {"area": str(places["South"].uuid)})
    assert moved.json()["area"] == str(places["South"].uuid)
    for name, sensors, devices in (
        ("Site", ["Tank"], ["Pump"]),
        ("North", ["Tank"], []),
        ("Bench 1", ["Tank"], []),
        ("Bench 2", [], []),
        ("South", [], ["Pump"]),
    ):
        query = {"area": str(places[name].uuid)}
        assert [row["name"] for row in client.get(f"{API}/sensors", query).json()["results"]] == sensors
        assert [row["name"] for row in client.get(f"{API}/devices", query).json()["results"]] == devices
    assert client.get(f"{API}/sensors").json()["count"] == 2
    assert client.get(f"{API}/sensors/{other.uuid}").json()["area"] is None
    sent(client, "patch", f"devices/{pump.uuid}", {"area": None})
    assert Device.objects.get().area is None


def test_bad_areas_are_refused_by_field(farm: Organization, places: dict[str, Area], client: Client) -> None:
    stranger = Area.objects.create(organization=builders.organization(), name="Site")
    own = {"organization": str(farm.uuid)}
    for path, body, field in (
        ("sensors", {"name": "x", "area": str(stranger.uuid)}, "area"),
        ("sensors", {"name": "x", "area": "here"}, "area"),
        ("areas", {"name": "x", "parent": str(stranger.uuid)}, "parent"),
        ("areas", {"name": "North", "parent": str(places["Site"].uuid)}, "name"),
        ("areas", {"name": "Site"}, "name"),
        ("areas", {"name": ""}, "name"),
    ):
        answer = sent(client, "post", path, {**own, **body})
        assert (answer.status_code, field in wrong(answer)) == (400, True), (path, body, answer.json())
    loop = sent(client, "patch", f"areas/{places['Site'].uuid}", {"parent": str(places["Bench 1"].uuid)})
    assert (loop.status_code, "parent" in wrong(loop)) == (400, True)
    assert Area.objects.filter(organization=farm).count() == 5


def test_a_member_of_two_farms_mixes_none_up(farm: Organization, places: dict[str, Area]) -> None:
    other = builders.organization()
    person = builders.member(farm, "admin")
    person.memberships.create(organization=other, role="admin")
    client = Client()
    client.force_login(person)
    answer = sent(
        client, "post", "sensors", {"organization": str(other.uuid), "name": "x", "area": str(places["Site"].uuid)}
    )
    assert (answer.status_code, list(wrong(answer))) == (400, ["area"])
    assert not Sensor.objects.exists()


def test_what_stood_in_an_area_that_is_gone_stands_in_none(
    farm: Organization, places: dict[str, Area], client: Client
) -> None:
    sensor = builders.sensor(farm)
    Sensor.objects.filter(pk=sensor.pk).update(area=places["Bench 1"])
    assert client.delete(f"{API}/areas/{places['North'].uuid}").status_code == 204
    assert {area.name for area in Area.objects.all()} == {"Site", "South"}
    assert Sensor.objects.get().area is None


def test_the_page_makes_shows_and_deletes_areas(farm: Organization, client: Client) -> None:
    address = f"/areas?organization={farm.uuid}"
    assert "No areas yet" in client.get(address).text
    client.post(address, {"name": "Greenhouse"})
    above = Area.objects.get()
    client.post(address, {"name": "Bench", "parent": str(above.uuid)})
    builders.sensor(farm, "Tank")
    page = client.get(address).text
    assert page.index("Greenhouse") < page.index("Bench")
    for body, text in (
        ({"name": ""}, "required"),
        ({"name": "Greenhouse"}, "already"),
        ({"name": "x", "parent": "y"}, "Select a valid"),
    ):
        answer = client.post(address, body)
        assert (answer.status_code, text in answer.text) == (400, True), body
    assert client.post(f"/areas/{above.uuid}/delete").status_code == 302
    assert not Area.objects.exists()


def test_pages_of_an_area_show_what_stands_in_it_and_its_parts(
    farm: Organization, places: dict[str, Area], client: Client
) -> None:
    tank, pump = builders.sensor(farm, "Tank"), builders.device(farm, "Pump")
    assert client.post(f"/sensors/{tank.uuid}/area", {"area": str(places["Bench 1"].uuid)}).status_code == 302
    assert client.post(f"/devices/{pump.uuid}/area", {"area": str(places["South"].uuid)}).status_code == 302
    for name, has_tank, has_pump in (("Site", True, True), ("North", True, False), ("South", False, True)):
        page = client.get("/", {"organization": str(farm.uuid), "area": str(places[name].uuid)}).text
        assert ("Tank" in page, "Pump" in page) == (has_tank, has_pump), name
    for wrong_area in ("x", str(Area.objects.create(organization=builders.organization(), name="y").uuid)):
        assert client.get("/", {"area": wrong_area}).status_code == 404
        client.post(f"/sensors/{tank.uuid}/area", {"area": wrong_area})
        tank.refresh_from_db()
        assert tank.area == places["Bench 1"]
    client.post(f"/sensors/{tank.uuid}/area", {"area": ""})
    tank.refresh_from_db()
    assert tank.area is None
    added = {"name": "Tank 2", "measures": ["ph"], "area": str(places["North"].uuid)}
    client.post(f"/sensors/new?organization={farm.uuid}", added)
    assert Sensor.objects.get(name="Tank 2").area == places["North"]


def test_all_of_an_area_comes_as_one_file(farm: Organization, places: dict[str, Area], client: Client) -> None:
    for name, place, numbers in (
        ("Tank 1", "Bench 1", (6.1, 6.2)),
        ("Tank 2", "North", (5.9,)),
        ("Pond", "South", (7.0,)),
    ):
        sensor = builders.sensor(farm, name, variables={"ph": "number", "note": "string"} if name == "Tank 1" else None)
        Sensor.objects.filter(pk=sensor.pk).update(area=places[place])
        measured(sensor.variables.get(name="ph"), *numbers)
    url = f"{API}/areas/{places['North'].uuid}/history"
    answer = client.get(url, {"format": "csv", "interval": "raw", "variables": "ph"})
    lines = answer.getvalue().decode().splitlines()
    assert lines[0].startswith("sensor,at,variable,value,")
    assert sorted((line.split(",")[0], line.split(",")[3]) for line in lines[1:]) == [
        ("Tank 1", "6.1"), ("Tank 1", "6.2"), ("Tank 2", "5.9"),
    ]  # fmt: skip
    rows = [json.loads(line) for line in client.get(url, {"format": "ndjson"}).getvalue().splitlines()]
    assert {(row["sensor"], row["variable"], row["count"]) for row in rows} >= {("Tank 2", "ph", 1)}
    empty = client.get(f"{API}/areas/{places['Bench 2'].uuid}/history").getvalue()
    assert empty.decode().splitlines() == [lines[0]]
    for query, field in (
        ({"variables": "ph,salt"}, "variables"),
        ({"interval": "1s"}, "interval"),
        ({"from": "x"}, "from"),
        ({"since": "x"}, "since"),
    ):
        refused = client.get(url, query)
        assert (refused.status_code, list(wrong(refused))) == (400, [field]), refused.content
    stranger = builders.client_of(builders.member(builders.organization()))
    assert stranger.get(url).status_code == 404
    page = client.get(f"/areas?organization={farm.uuid}").text
    assert f"/api/v1/areas/{places['North'].uuid}/history?format=csv" in page


def test_viewers_see_areas_and_change_none(farm: Organization, places: dict[str, Area]) -> None:
    sensor, viewer = builders.sensor(farm), Client()
    viewer.force_login(builders.member(farm, "viewer"))
    page = viewer.get(f"/areas?organization={farm.uuid}")
    assert (page.status_code, "Bench 1" in page.text, "<button" in page.text.split("<main>")[1]) == (200, True, False)
    assert viewer.post(f"/areas?organization={farm.uuid}", {"name": "x"}).status_code == 403
    assert viewer.post(f"/areas/{places['Site'].uuid}/delete").status_code == 403
    assert viewer.post(f"/sensors/{sensor.uuid}/area", {"area": ""}).status_code == 403
    stranger = Client()
    stranger.force_login(builders.member(builders.organization(), "admin"))
    assert stranger.post(f"/areas/{places['Site'].uuid}/delete").status_code == 404
    assert stranger.get(f"/areas?organization={farm.uuid}").status_code == 404
