"""What people prefer: units of what they see and type, time zones, languages; and that nothing but the pages changes with it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from django.test import Client

from devices.models import Organization, Preferences, Variable
from devices.people.preferences import _zone
from devices.units import AS_STORED, Scale, Units
from pages.rules.choices import Choices
from pages.rules.rows import ConditionForm, condition_initial
from pages.rules.starters import STARTERS
from tests import builders
from tests.test_pages import measured

pytestmark = pytest.mark.django_db
AMERICAN = {"language": "", "time_zone": "America/New_York", "temperature": "°F", "conductivity": "ppm (700)"}


@pytest.fixture
def farm() -> Organization:
    return builders.organization("Basil Farm")


@pytest.fixture
def client(farm: Organization) -> Client:
    return builders.client_of(builders.member(farm, "admin"))


@pytest.fixture
def temperature(farm: Organization) -> Variable:
    variable: Variable = builders.sensor(farm, "Tank 1", variables={"temperature": "number"}).variables.get()
    Variable.objects.filter(pk=variable.pk).update(unit="°C", target_minimum=18.0, target_maximum=24.0)
    variable.refresh_from_db()
    return variable


# Units


@pytest.mark.parametrize(
    ("wanted", "unit", "stored", "shown"),
    [
        (Units("°F"), "°C", 25.0, 77.0),
        (Units("°C"), "°F", 212.0, 100.0),
        (Units("°F"), "K", 273.15, 32.0),
        (Units("", "ppm (500)"), "mS/cm", 1.4, 700.0),
        (Units("", "ppm (700)"), "µS/cm", 1400.0, 980.0),
        (Units("", "mS/cm"), "ppm (500)", 700.0, 1.4),
        (Units("°F", "µS/cm"), "dS/m", 1.4, 1400.0),
    ],
)
def test_values_are_shown_in_the_unit_that_is_wanted_and_back(
    wanted: Units, unit: str, stored: float, shown: float
) -> None:
    scale = wanted.scale_of(unit)
    assert scale.shown(stored) == shown
    assert scale.stored(shown) == pytest.approx(stored)


@pytest.mark.parametrize(
    ("wanted", "unit"),
    [
        (AS_STORED, "°C"), (Units("°C"), "°C"), (Units("°F"), ""), (Units("°F", "ppm (500)"), "ppm"), (Units("°F"), "pH"),
        (Units("furlong"), "°C"),
    ],
)  # fmt: skip
def test_what_needs_no_other_unit_stays_as_it_is(wanted: Units, unit: str) -> None:
    """ppm alone may be CO2: it is never taken for salt."""
    assert wanted.scale_of(unit) == Scale(unit)
    assert wanted.scale_of(unit).shown(1.23456789) == 1.23456789


@pytest.mark.parametrize("typed", [float(each) for each in (0, 1, 32, 71.6, 77, 80, 99.9, -40)])
def test_what_was_typed_is_shown_again(typed: float) -> None:
    scale = Units("°F").scale_of("°C")
    assert scale.shown(scale.stored(typed)) == typed


@pytest.mark.usefixtures("empty_redis")
def test_tiles_charts_and_targets_speak_fahrenheit(client: Client, temperature: Variable) -> None:
    measured(temperature, 25.0)
    client.post("/account/preferences", AMERICAN)
    page = client.get("/").text
    assert "77" in page
    assert "above 75.2" in page
    assert 'data-factor="1.7' in page
    sensor = client.get(f"/sensors/{temperature.sensor.uuid}").text
    for text in ('data-unit="°F"', 'data-low="64.4"', 'data-high="75.2"', 'value="75.2"', "Download as CSV in °C"):
        assert text in sensor, text
    client.post(f"/sensors/{temperature.sensor.uuid}/target", {"variable": "temperature", "from": "68", "to": "77,5"})
    temperature.refresh_from_db()
    assert [temperature.target_minimum, temperature.target_maximum] == pytest.approx([20.0, 25.2777777778])
    assert 'value="77.5"' in client.get(f"/sensors/{temperature.sensor.uuid}").text


def test_the_api_keeps_the_unit_of_the_sensor(client: Client, temperature: Variable) -> None:
    measured(temperature, 25.0)
    client.post("/account/preferences", AMERICAN)
    answer = client.get(f"/api/v1/sensors/{temperature.sensor.uuid}/history?interval=raw").json()["variables"][0]
    assert (answer["unit"], answer["points"][0]["value"]) == ("°C", 25.0)


@pytest.mark.parametrize(
    ("fields", "leaf"),
    [
        ({"operator": ">", "value": "80", "release": "77"}, {"value": 26.6666666667, "releaseAt": 25.0}),
        ({"operator": "between", "value": "68", "upper": "77"}, {"value": [20.0, 25.0]}),
        ({"operator": ">", "value": "9", "measure": "per", "measure_of": "5 min"}, {"value": 5.0, "per": "5m"}),
        (
            {"operator": ">", "value": "80", "measure": "median", "measure_of": "5"},
            {"value": 26.6666666667, "median": 5},
        ),
        ({"operator": "in", "value": "68, 77"}, {"value": [20.0, 25.0]}),
        ({"operator": ">", "value": "warm"}, {"value": "warm"}),
    ],
)
def test_a_condition_is_typed_in_fahrenheit_and_kept_in_celsius(
    farm: Organization, temperature: Variable, fields: dict[str, str], leaf: dict[str, Any]
) -> None:
    offered = Choices(farm, Units("°F"))
    key = f"sensor|{temperature.sensor.uuid}|temperature"
    form = ConditionForm({"source": key, **fields}, offered=offered)
    assert form.is_valid(), form.errors
    config = form.config
    assert {name: config[name] for name in leaf} == leaf
    again = condition_initial(config, together=False, sources=offered.sources)
    assert again is not None
    assert {name: again[name] for name in ("value", "upper", "release") if fields.get(name)} == {
        name: text for name, text in fields.items() if name in ("value", "upper", "release")
    }


def test_templates_are_filled_in_with_the_unit_of_the_form(client: Client, farm: Organization) -> None:
    sensor = builders.sensor(farm, "Air", variables={"temperature": "number", "ec": "number"})
    sensor.variables.filter(name="temperature").update(unit="°F")
    sensor.variables.filter(name="ec").update(unit="µS/cm")
    offered = Choices(farm)
    assert [STARTERS["fan"].initial(offered)["when"][0][name] for name in ("value", "release")] == ["80.6", "77"]
    assert STARTERS["ec"].initial(offered)["when"][0]["value"] == "1400"
    ppm = Choices(farm, Units("°C", "ppm (500)"))
    assert STARTERS["fan"].initial(ppm)["when"][0]["value"] == "27"
    assert STARTERS["ec"].initial(ppm)["when"][0]["value"] == "700"


def test_a_rule_is_told_in_fahrenheit(client: Client, farm: Organization, temperature: Variable) -> None:
    leaf = builders.leaf(temperature.sensor, "temperature", ">", 25)
    chain = builders.chain(farm, [builders.node("hot", {**leaf, "releaseAt": 20})])
    assert "above 25 °C (until it is beyond 20 °C)" in client.get("/rules").text
    client.post("/account/preferences", AMERICAN)
    for path in ("/rules", f"/rules/{chain.uuid}"):
        assert "above 77 °F (until it is beyond 68 °F)" in client.get(path).text


# Time zones and the page itself


def test_a_time_zone_is_that_of_the_page(client: Client, farm: Organization) -> None:
    assert "data-time-zone" not in client.get("/").text
    client.post("/account/preferences", AMERICAN)
    assert 'data-time-zone="America/New_York"' in client.get("/").text
    device = builders.device(farm)
    device.last_seen_at = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
    device.save()
    assert "May 1, 2026, 8 a.m." in client.get(f"/devices/{device.uuid}").text


@pytest.mark.parametrize("name", ["Mars/Olympus", "../etc/passwd", "Europe", "", "x" * 63])
def test_a_zone_that_is_gone_is_none(name: str) -> None:
    assert _zone(name) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("language", "tlh"), ("time_zone", "Mars/Olympus"), ("temperature", "K"), ("conductivity", "ppm"), ("language", "de\x00")],
)  # fmt: skip
def test_what_is_not_offered_is_refused(client: Client, field: str, value: str) -> None:
    answer = client.post("/account/preferences", {**AMERICAN, field: value})
    assert answer.status_code == 400
    assert not Preferences.objects.exists()


def test_preferences_are_one_s_own_and_go_with_the_account(client: Client, farm: Organization) -> None:
    client.post("/account/preferences", AMERICAN)
    other = builders.client_of(builders.member(farm))
    assert "data-time-zone" not in other.get("/").text
    Preferences.objects.get().user.delete()
    assert not Preferences.objects.exists()


def test_strangers_have_none() -> None:
    answer = Client().post("/account/preferences", AMERICAN)
    assert (answer.status_code, Preferences.objects.exists()) == (302, False)
