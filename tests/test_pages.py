"""Pages for growers: what they show to whom, and that their buttons do what they say, in a real browser."""

from __future__ import annotations

import gzip
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.test import Client, RequestFactory
from django.utils import timezone
from django.views.defaults import server_error
from pytest_django.live_server_helper import LiveServer

from devices import latest
from devices.models import Device, DeviceState, Interlock, Organization, Reading, StateChange, Variable, Veto
from pages import overview
from rules.effects import states
from rules.models import Alarm
from tests import builders
from tests.browser import browser
from tests.builders import client_of

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]
PASSWORD = "tomatoes-are-red"


@pytest.fixture
def farm() -> Organization:
    return builders.organization("Basil Farm")


def raised(farm: Organization, sensor: Any, **fields: Any) -> Alarm:
    now = timezone.now()
    about = {"source_type": "sensor", "originator_uuid": sensor.uuid, "type": "pH low", "message": "below 5.5"}
    return Alarm.objects.create(organization=farm, raised_at=now, last_raised_at=now, **{**about, **fields})


def measured(variable: Variable, *numbers: float, age: timedelta = timedelta(minutes=5)) -> None:
    now = timezone.now() - age
    for number, value in enumerate(reversed(numbers)):
        Reading.objects.create(variable=variable, timestamp=now - timedelta(minutes=10 * number), number=value)


def test_a_grower_sees_values_devices_and_alarms_of_the_farm(farm: Organization) -> None:
    sensor = builders.sensor(farm, "Tank 1", variables={"ph": "number", "mode": "string", "leak": "boolean"})
    measured(Variable.objects.get(sensor=sensor, name="ph"), 6.1, 6.12345)
    builders.device(farm, "Pump", states={"power": ["on", "off"]})
    raised(farm, sensor)
    page = client_of(builders.member(farm, "operator")).get("/").text
    for text in ("Basil Farm", "Tank 1", "6.123", "5\xa0minutes ago", "no value yet", "Pump", "pH low", "Acknowledge"):
        assert text in page, text


def test_a_large_farm_is_searched_and_turned_page_by_page(farm: Organization, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "SHOWN", 2)
    for number in range(5):
        builders.sensor(farm, f"Tank {number}")
    builders.device(farm, "Pump 4")
    client = client_of(builders.member(farm, "viewer"))
    first, last = client.get("/").text, client.get("/", {"page": "3"}).text
    assert ("Tank 0" in first, "Tank 2" in first, "page 1 of 3" in first) == (True, False, True)
    assert ("Tank 4" in last, "Tank 3" in last, "Next" in last) == (True, False, False)
    found = client.get("/", {"search": "k 4"}).text
    assert ("Tank 4" in found, "Tank 0" in found, "1 sensor, 0 devices" in found) == (True, False, True)
    for odd in (
        {"page": "0"},
        {"page": "-1"},
        {"page": "9" * 20},
        {"page": "x"},
        {"search": "\x00"},
        {"search": "%" * 500},
    ):
        assert client.get("/", odd).status_code == 200


def test_what_is_suspect_or_silent_says_so(farm: Organization) -> None:
    sensor = builders.sensor(farm, "Tank 1")
    ph = Variable.objects.get(sensor=sensor)
    measured(ph, 6.0, age=timedelta(hours=5))
    seen = overview.of(farm, _access(farm)).sensors[0].tiles[0]
    assert (seen.is_silent, seen.age_text) == (True, "5\xa0hours")


def _access(farm: Organization) -> Any:
    from devices.permissions import Access

    return Access(False, {farm.pk: "admin"})


def test_a_viewer_has_no_buttons(farm: Organization) -> None:
    sensor = builders.sensor(farm)
    builders.device(farm, states={"power": ["on", "off"]})
    raised(farm, sensor)
    assert "data-post" not in client_of(builders.member(farm, "viewer")).get("/").text


def test_a_locked_state_has_no_buttons_and_says_who_holds_it(farm: Organization) -> None:
    state = DeviceState.objects.get(device=builders.device(farm, states={"power": ["on", "off"]}))
    state.lock(timezone.now() + timedelta(hours=1), by="jo", reason="tank is cleaned")
    page = client_of(builders.member(farm, "operator")).get("/").text
    assert "locked by jo: tank is cleaned" in page
    assert "data-device" not in page


def test_who_belongs_to_several_chooses_and_strangers_see_nothing(farm: Organization) -> None:
    other, foreign = builders.organization("Cress Farm"), builders.organization("Dill Farm")
    person = builders.member(farm, "viewer")
    person.memberships.create(organization=other, role="viewer")
    client = client_of(person)
    assert "Cress Farm" in client.get("/").text
    assert client.get("/", {"organization": str(other.uuid)}).status_code == 200
    for wrong in (str(foreign.uuid), "x"):
        assert client.get("/", {"organization": wrong}).status_code == 404
    sensor = builders.sensor(foreign)
    assert client.get(f"/sensors/{sensor.uuid}").status_code == 404
    assert client.get(f"/sensors/{builders.sensor(farm).uuid}").status_code == 200


def test_empty_places_say_what_to_do_next(farm: Organization) -> None:
    assert "Add a sensor" in client_of(builders.member(farm, "admin")).get("/").text
    assert "ask its admin for an invitation" in client_of(builders.user()).get("/").text
    Organization.objects.all().delete()
    assert "make a farm" in client_of(builders.user(is_superuser=True)).get("/").text


def test_who_switched_what_is_on_the_overview(farm: Organization) -> None:
    pump = builders.device(farm, "Pump", states={"power": ["on", "off"]})
    person = builders.member(farm, "operator", username="ada")
    state = pump.states.get()
    states.change_by_person(state, "on", user=person, override="")
    for path in ("/", f"/devices/{pump.uuid}"):
        assert re.search(r"by ada, 0\xa0minutes ago", client_of(person).get(path).text), path
    state.refresh_from_db()
    state.reported_value, state.reported_at = "off", timezone.now() + timedelta(seconds=1)
    state.save()
    assert "minutes ago" not in client_of(person).get("/").text, "it is what the device says now"


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [("/no-such-page", 404, "There is no such page"), ("/operations", 403, "for staff")],
)
def test_what_cannot_be_shown_is_a_page_too(farm: Organization, path: str, status: int, said: str) -> None:
    answer = client_of(builders.member(farm, "viewer")).get(path)
    assert (answer.status_code, said in answer.text, "pages.css" in answer.text) == (status, True, True)


def test_an_error_of_ours_is_a_page_that_needs_nothing() -> None:
    text = server_error(RequestFactory().get("/")).content.decode()
    assert "It is not your fault" in text


def test_strangers_are_asked_to_log_in() -> None:
    for path in ("/", "/sensors/9b0a6e0e-0000-4000-8000-000000000000"):
        answer = Client().get(path)
        assert (answer.status_code, answer.headers["Location"].startswith("/admin/login/")) == (302, True)
        assert Client().post(path).status_code in (302, 405)


def test_names_that_people_write_are_text(farm: Organization) -> None:
    builders.sensor(farm, "<script>alert(1)</script>")
    assert "<script>alert" not in client_of(builders.member(farm, "viewer")).get("/").text


@pytest.mark.parametrize(
    ("value", "text"), [(6.12345, "6.123"), (1234.5, "1234"), (True, "yes"), ("on", "on"), (7, "7")]
)
def test_values_are_written_as_a_display_would(value: Any, text: str) -> None:
    assert overview.as_text(value) == text


def test_a_large_farm_costs_a_few_queries(farm: Organization, django_assert_max_num_queries: Any) -> None:
    for _ in range(30):
        sensor = builders.sensor(farm)
        measured(Variable.objects.get(sensor=sensor), 6.0)
        builders.device(farm)
    client = client_of(builders.member(farm, "operator"))
    with django_assert_max_num_queries(15):
        client.get("/")
    assert latest.recall([]) == {}


@pytest.mark.django_db(transaction=True)
def test_the_buttons_in_a_browser(farm: Organization, live_server: LiveServer, tmp_path: Path) -> None:
    """Log in, see a value and its line, acknowledge an alarm, switch the pump, look at a year, get it as CSV."""
    sensor = builders.sensor(farm, "Tank 1")
    measured(Variable.objects.get(sensor=sensor), *(6.0 + number / 100 for number in range(30)))
    pump = builders.device(farm, "Pump", states={"power": ["on", "off"]})
    alarm = raised(farm, sensor)
    builders.member(farm, "operator", username="ada", password=PASSWORD)
    with browser(tmp_path) as page:
        page.before_each(
            "window.wrong = []; addEventListener('securitypolicyviolation', e => wrong.push(e.violatedDirective));"
            "addEventListener('error', e => wrong.push(e.message));"
            "window.confirm = text => { window.asked = text; return true; }"
        )
        page.open(f"{live_server.url}/")
        page.evaluate(
            f"document.querySelector('#id_username').value = 'ada'; document.querySelector('#id_password').value = '{PASSWORD}';"
            "document.querySelector('#login-form').submit()"
        )
        page.until("!!document.querySelector('#live')")
        assert "6.29" in page.evaluate("document.querySelector('.tile .value').innerText")
        page.until("typeof Chart !== 'undefined' && !!Chart.getChart(document.querySelector('.tile canvas'))")
        page.evaluate("[...document.querySelectorAll('button')].find(b => b.innerText === 'Acknowledge').click()")
        page.until("document.body.innerText.includes('acknowledged by ada')")
        page.evaluate("[...document.querySelectorAll('button[data-device]')].find(b => b.innerText === 'on').click()")
        page.until("document.querySelector('button[aria-pressed=true]')?.innerText === 'on'")
        assert page.evaluate("window.asked") == "Switch Pump: power to on?"
        page.open(f"{live_server.url}/sensors/{sensor.uuid}")
        page.until("document.querySelector('.numbers').innerText.startsWith('now 6.29')")
        page.evaluate("document.querySelector('[data-hours=\"8760\"]').click()")
        page.until("location.search === '?hours=8760'")
        page.until("Chart.getChart(document.querySelector('canvas')).data.datasets[2].data.length")
        csv = page.evaluate("fetch(document.querySelector('[data-csv]').href).then(answer => answer.text())")
        assert csv.startswith("at,variable,value")
        assert page.evaluate("window.wrong") == []
    alarm.refresh_from_db()
    assert alarm.acknowledged_by == "ada"
    assert StateChange.objects.get(state__device=pump).actor == "ada"


def test_a_device_page_shows_commands_limits_vetoes_and_presence(farm: Organization) -> None:
    pump = builders.device(farm, "Pump", states={"power": ["on", "off"]})
    state = DeviceState.objects.get(device=pump)
    now = timezone.now()
    about = {"state": state, "source": "rule", "actor": "Dose / acid", "timestamp": now}
    StateChange.objects.create(effect_key="1", value="on", previous="off", command_state="applied", **about)
    failed = {"command_state": "failed", "command_error": "valve is stuck"}
    StateChange.objects.create(effect_key="2", value="off", previous="on", **failed, **about)
    Interlock.objects.create(state=state, minimum_off_seconds=60)
    Veto.objects.create(state=state, kind="minimum-off", source="rule", actor="Dose / acid", count=3, detail="rests")
    Device.objects.filter(pk=pump.pk).update(connected=False, connection_changed_at=now)
    page = client_of(builders.member(farm, "viewer")).get(f"/devices/{pump.uuid}").text
    for text in (
        "not connected",
        "at least 60 s off",
        "rests",
        "<td>3</td>",
        "Dose / acid",
        "valve is stuck",
        "applied",
    ):
        assert text in page, text
    assert "data-post" not in page
    assert "data-post" in client_of(builders.member(farm, "operator")).get(f"/devices/{pump.uuid}").text
    stranger = client_of(builders.member(builders.organization(), "admin"))
    assert stranger.get(f"/devices/{pump.uuid}").status_code == 404


def test_marks_are_the_limits_changes_and_alarms_around_a_sensor(farm: Organization) -> None:
    sensor, pump = builders.sensor(farm, "Tank 1"), builders.device(farm, "Pump")
    stranger = builders.organization()
    other = builders.switching_chain(builders.sensor(stranger), builders.device(stranger))
    builders.chain(
        farm,
        [
            builders.node("band", builders.leaf(sensor, operator="between", value=[5.5, 6.5]), next="on"),
            builders.node("on", builders.command(pump)),
        ],
        "Band",
    )
    builders.switching_chain(sensor, pump, name="Off", enabled=False)
    rate = {**builders.leaf(sensor, operator=">", value=1), "per": "1m"}
    builders.chain(farm, [builders.node("rate", rate, next="on"), builders.node("on", builders.command(pump))])
    now = timezone.now()
    for number, target in enumerate((pump, Device.objects.get(organization=stranger))):
        state = DeviceState.objects.get(device=target)
        StateChange.objects.create(
            effect_key=str(number), state=state, value="on", source="rule", actor="Band / on", timestamp=now
        )
    raised(farm, sensor, type="pH low")
    raised(farm, sensor, type="over", state="cleared", cleared_at=now - timedelta(days=3))
    client = client_of(builders.member(farm, "viewer"))
    span = {"from": (now - timedelta(hours=1)).isoformat(), "to": (now + timedelta(hours=1)).isoformat()}
    marks = client.get(f"/sensors/{sensor.uuid}/marks", span).json()
    assert [(each["value"], each["rule"]) for each in marks["thresholds"]] == [(5.5, "Band"), (6.5, "Band")]
    assert [each["state"] for each in marks["changes"]] == ["Pump: power"]
    assert [each["type"] for each in marks["alarms"]] == ["pH low"]
    assert other.nodes.exists()
    for wrong in (
        {},
        {"from": "x", "to": "y"},
        {**span, "to": "2026-05-01T00:00:00"},
        {**span, "to": "2026-13-01T00:00:00Z"},
    ):
        assert client.get(f"/sensors/{sensor.uuid}/marks", wrong).status_code == 400
    assert client_of(builders.member(stranger, "viewer")).get(f"/sensors/{sensor.uuid}/marks", span).status_code == 404


def test_the_compressed_file_of_charts_is_that_of_the_other() -> None:
    """WhiteNoise sends it to every browser that takes gzip."""
    folder = Path(overview.__file__).parent / "static/pages"
    assert gzip.decompress((folder / "chart.js.gz").read_bytes()) == (folder / "chart.js").read_bytes()


def test_the_target_range_is_set_on_the_page_and_shown_where_it_is_left(farm: Organization) -> None:
    sensor = builders.sensor(farm, "Tank 1")
    ph = Variable.objects.get(sensor=sensor)
    measured(ph, 7.2)
    client, address = client_of(builders.member(farm, "admin")), f"/sensors/{sensor.uuid}/target"
    client.post(address, {"variable": "ph", "from": "5,5", "to": "6.5"})
    ph.refresh_from_db()
    assert (ph.target_minimum, ph.target_maximum) == (5.5, 6.5)
    assert "above 6.5" in client.get("/").text
    for wrong in ({"from": "high"}, {"from": "7", "to": "6"}, {"from": "nan"}):
        page = client.post(address, {"variable": "ph", **wrong}, follow=True).text
        assert "Nothing was changed" in page
    assert client.post(address, {"variable": "gold", "from": "1"}).status_code == 404
    ph.refresh_from_db()
    assert (ph.target_minimum, ph.target_maximum) == (5.5, 6.5)
    client.post(address, {"variable": "ph", "from": "", "to": ""})
    ph.refresh_from_db()
    assert (ph.target_minimum, ph.target_maximum) == (None, None)
    assert client_of(builders.member(farm, "operator")).post(address, {"variable": "ph"}).status_code == 403
