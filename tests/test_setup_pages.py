"""How a farm begins: its name, its first sensor and device, and the token with which they connect, in a real browser too."""

from __future__ import annotations

import json
import shlex
import subprocess
from typing import Any

import pytest

from devices.models import Device, DeviceState, DeviceToken, Membership, Organization, Sensor, Variable
from devices.tokens import digest_of
from tests import builders
from tests.builders import client_of

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]


@pytest.fixture
def farm() -> Organization:
    return builders.organization("Basil Farm")


def test_a_superuser_begins_with_a_farm_and_its_first_sensor() -> None:
    person = builders.user(is_superuser=True)
    client = client_of(person)
    assert "/farms/new" in client.get("/").text
    answer = client.post("/farms/new", {"name": "Basil Farm"}, follow=True)
    farm = Organization.objects.get()
    assert answer.redirect_chain[-1][0] == f"/sensors/new?organization={farm.uuid}"
    assert Membership.objects.get(user=person).role == "admin"
    sensor = {"name": "Tank 1", "measures": ["ph", "waterLevel"], "others": "flow l/min, orp"}
    answer = client.post(f"/sensors/new?organization={farm.uuid}", sensor)
    made = Sensor.objects.get()
    assert answer.headers["Location"] == f"/sensors/{made.uuid}/connect"
    units = dict(Variable.objects.values_list("name", "unit"))
    assert units == {"ph": "", "waterLevel": "%", "flow": "l/min", "orp": ""}


def test_a_device_gets_states_that_rules_and_people_can_switch(farm: Organization) -> None:
    client = client_of(builders.member(farm, "admin"))
    client.post(
        f"/devices/new?organization={farm.uuid}", {"name": "Doser", "kinds": ["switch", "dose", "speed", "percent"]}
    )
    states = {row.name: row for row in DeviceState.objects.all()}
    assert states.keys() == {"power", "dose", "speed", "level"}
    assert (states["power"].allowed_values, states["power"].safe_value) == (["on", "off"], "off")
    assert states["dose"].is_momentary
    for row in states.values():
        row.full_clean()


@pytest.mark.parametrize(
    ("body", "field", "text"),
    [
        ({}, "name", "required"),
        ({"name": "Tank 1"}, "measures", "at least one"),
        ({"name": "Tank 0", "measures": ["ph"]}, "name", "already exists"),
        ({"name": "Tank 1", "measures": ["gold"]}, "measures", "not one of the available"),
        ({"name": "Tank 1", "others": "x" * 150}, "others", "at most 100"),
        ({"name": "Tank 1", "others": "flow " + "x" * 30}, "others", "at most 20"),
        ({"name": "x" * 201, "measures": ["ph"]}, "name", "at most 200"),
    ],
)
def test_a_sensor_that_cannot_be_made_says_why_at_the_field(
    farm: Organization, body: dict[str, Any], field: str, text: str
) -> None:
    builders.sensor(farm, "Tank 0")
    answer = client_of(builders.member(farm, "admin")).post(f"/sensors/new?organization={farm.uuid}", body)
    assert answer.status_code == 400
    part = answer.text.split(f"field-{field}")[1].split('class="field ')[0]
    assert text in part
    assert Sensor.objects.count() == 1


def test_a_device_that_cannot_be_made_says_why(farm: Organization) -> None:
    builders.device(farm, "Fan")
    client = client_of(builders.member(farm, "admin"))
    for body, text in (({"name": "Fan", "kinds": ["switch"]}, "already exists"), ({"name": "Pump"}, "at least one")):
        answer = client.post(f"/devices/new?organization={farm.uuid}", body)
        assert (answer.status_code, text in answer.text) == (400, True)
    assert Device.objects.count() == 1


@pytest.mark.parametrize("kind", ["sensor", "device"])
def test_a_token_is_issued_shown_once_and_stands_in_every_command(farm: Organization, kind: str) -> None:
    owner = builders.sensor(farm) if kind == "sensor" else builders.device(farm)
    client = client_of(builders.member(farm, "admin"))
    path = f"/{kind}s/{owner.uuid}/connect"
    assert "none yet" in client.get(path).text
    assert client.post(path).status_code == 302
    page = client.get(path).text
    row = DeviceToken.objects.get()
    token = page.split('<code id="token">')[1].split("<")[0]
    assert row.digest == digest_of(token)
    assert (row.sensor or row.device) == owner
    assert page.count(token) == (4 if kind == "sensor" else 5)
    again = client.get(path).text
    assert token not in again
    assert "has a token already" in again


def test_the_command_that_the_page_shows_is_accepted(farm: Organization, live_server: Any) -> None:
    """Copied into a shell as it stands."""
    sensor = builders.sensor(farm, variables={"ph": "number", "leak": "boolean", "mode": "string"})
    page = page_with_token(farm, f"{live_server.url}/sensors/{sensor.uuid}/connect")
    answer = subprocess.run(shlex.split(page["text1"].replace("\\\n", "")), capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["accepted"] == 1, answer.stdout


def page_with_token(farm: Organization, url: str) -> dict[str, str]:
    """The commands of the page, by the id of their place, as a browser shows them."""
    import html
    import re

    client = client_of(builders.member(farm, "admin"))
    path, host = "/" + url.split("/", 3)[3], url.split("/")[2]
    client.post(path, headers={"host": host})
    text = client.get(path, headers={"host": host}).text
    return {
        place: html.unescape(found) for place, found in re.findall(r'<code id="(text\d)">(.*?)</code>', text, re.DOTALL)
    }


def test_who_may_not_is_refused(farm: Organization) -> None:
    sensor, operator = builders.sensor(farm), client_of(builders.member(farm, "operator"))
    stranger = client_of(builders.member(builders.organization(), "admin"))
    assert operator.post(f"/sensors/new?organization={farm.uuid}", {"name": "x"}).status_code == 403
    assert operator.post(f"/sensors/{sensor.uuid}/connect").status_code == 403
    assert operator.post("/farms/new", {"name": "x"}).status_code == 403
    assert stranger.post(f"/sensors/new?organization={farm.uuid}", {"name": "x"}).status_code == 404
    assert stranger.post(f"/sensors/{sensor.uuid}/connect").status_code == 404
    assert "Add a sensor" not in operator.get("/").text
    assert not DeviceToken.objects.exists()
