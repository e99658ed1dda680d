"""The form of a rule: what people fill in becomes a chain, and a chain becomes what the form shows, without JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone
from pytest_django.live_server_helper import LiveServer

from devices.models import Device, DeviceState, Organization, Reading, Sensor, Variable
from pages.rules import choices, times, views
from pages.rules.choices import Choices
from pages.rules.forms import RuleForm, initial_of
from pages.rules.starters import STARTERS
from rules.authoring import describe, when_then
from rules.models import RuleChain
from tests import builders
from tests.browser import browser
from tests.builders import client_of

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]
Row = Mapping[str, Any]


@pytest.fixture
def farm() -> Organization:
    return builders.organization("Basil Farm")


@pytest.fixture
def tank(farm: Organization) -> Sensor:
    variables = {"ph": "number", "ec": "number", "waterLevel": "number", "airTemperature": "number", "vpd": "number"}
    return builders.sensor(farm, "Tank 1", variables={**variables, "dissolvedOxygen": "number", "mode": "string"})


@pytest.fixture
def pump(farm: Organization) -> Device:
    device = builders.device(farm, "Pump", states={"power": ["on", "off"]})
    DeviceState.objects.create(device=device, name="dose", kind="momentary", datatype="number")
    DeviceState.objects.create(device=device, name="lamp", datatype="boolean")
    return device


def posted(
    when: Sequence[Row] = (), then: Sequence[Row] = (), otherwise: Sequence[Row] = (), **head: Any
) -> dict[str, Any]:
    """As a browser sends the form."""
    found: dict[str, Any] = {"name": "My rule", "execution_type": "event-triggered", "needed": "all", **head}
    for prefix, rows in (("when", when), ("then", then), ("otherwise", otherwise)):
        found |= {f"{prefix}-TOTAL_FORMS": len(rows), f"{prefix}-INITIAL_FORMS": 0}
        for number, row in enumerate(rows):
            found |= {f"{prefix}-{number}-{name}": value for name, value in row.items()}
    return found


def value(source: Sensor | Device, key: str, operator: str, operand: str = "", **more: str) -> Row:
    source_type = "sensor" if isinstance(source, Sensor) else "device"
    return {"source": f"{source_type}|{source.uuid}|{key}", "operator": operator, "value": operand, **more}


def switched(device: Device, state: str, to: str, **more: str) -> Row:
    return {"kind": "device_command", "target": f"device|{device.uuid}|{state}", "value": to, **more}


def made(farm: Organization, client: Client, body: dict[str, Any]) -> RuleChain:
    answer = client.post(f"/rules/new?organization={farm.uuid}&template=blank", body)
    assert answer.status_code == 302, [
        each for each in answer.text.splitlines() if 'class="error"' in each or "problem" in each
    ]
    chain = RuleChain.objects.get(name=body["name"])
    assert answer.headers["Location"] == f"/rules/{chain.uuid}"
    return chain


def test_a_rule_is_made_without_json_and_is_off_until_somebody_has_seen_it(
    farm: Organization, tank: Sensor, pump: Device
) -> None:
    client = client_of(builders.member(farm, "admin"))
    body = posted(
        [value(tank, "ph", ">", "6,5", lasting="5 min"), value(tank, "waterLevel", ">=", "20")],
        [switched(pump, "dose", "5", cooldown="15 minutes")],
        name="Lower the pH",
    )
    chain = made(farm, client, body)
    assert describe.sentence_of(chain, chain.nodes.all()) == (
        "When Tank 1 ph is above 6.5 for 5 m and Tank 1 waterLevel is at least 20, "
        "set Pump dose to 5, at most once in 15 m."
    )
    assert not chain.enabled
    page = client.get(f"/rules/{chain.uuid}").text
    assert "What it would have done" in page
    client.post(f"/rules/{chain.uuid}/switch", {"enabled": "yes"})
    chain.refresh_from_db()
    assert chain.enabled


EVERYTHING: Sequence[tuple[str, str, dict[str, str]]] = [
    ("is between 5.5 and 6.5", "between", {"value": "5.5", "upper": "6.5"}),
    ("was not reported for 30 m", "olderThan", {"duration": "30m"}),
    ("is above 6 (until it is beyond 5.5)", ">", {"value": "6", "release": "5.5"}),
    ("is below 5 at least 3 times within 10 m", "<", {"value": "5", "times": "3", "within": "10m"}),
    ("the change of Tank 1 ph in 1 m is below -0.5", "<", {"value": "-0.5", "measure": "per", "measure_of": "1m"}),
    ("the median of the newest 5 of Tank 1 ph is above 6", ">", {"value": "6", "measure": "median", "measure_of": "5"}),
    ("has no value", "isNull", {}),
]


@pytest.mark.parametrize(("words", "operator", "fields"), EVERYTHING)
def test_every_kind_of_condition_can_be_filled_in_and_is_shown_again(
    farm: Organization, tank: Sensor, pump: Device, words: str, operator: str, fields: dict[str, str]
) -> None:
    client = client_of(builders.member(farm, "admin"))
    chain = made(farm, client, posted([{**value(tank, "ph", operator), **fields}], [switched(pump, "power", "on")]))
    nodes = list(chain.nodes.all())
    assert words in describe.sentence_of(chain, nodes)
    shape = when_then.read(nodes)
    assert shape is not None
    again = initial_of(chain, shape)
    assert again is not None
    assert {name: again["when"][0][name] for name in fields} == fields


def test_groups_otherwise_and_every_action_come_back_as_they_were(
    farm: Organization, tank: Sensor, pump: Device
) -> None:
    client = client_of(builders.member(farm, "admin"))
    actions = [
        switched(pump, "power", "on", force="on"),
        {"kind": "notify", "message": "pH is {ph}", "severity": "critical", "audience": ["operator"]},
        {"kind": "raise_alarm", "alarm": "pH", "severity": "warning", "message": "look"},
    ]
    body = posted(
        [value(tank, "ph", ">", "7"), value(tank, "ph", "<", "5", together="on"), value(tank, "mode", "==", "auto")],
        actions,
        [{"kind": "clear_alarm", "alarm": "pH"}, switched(pump, "lamp", "no")],
    )
    chain = made(farm, client, body)
    sentence = describe.sentence_of(chain, chain.nodes.all())
    assert "(Tank 1 ph is above 7 or Tank 1 ph is below 5) and Tank 1 mode is auto" in sentence
    assert "otherwise clear the alarm “pH”, then set Pump lamp to false" in sentence
    before = list(chain.nodes.values_list("name", "config", "next", "on_false"))
    edited = client.post(f"/rules/{chain.uuid}/edit", {**body, "name": "Another name"})
    assert edited.status_code == 302
    assert list(chain.nodes.values_list("name", "config", "next", "on_false")) == before
    chain.refresh_from_db()
    assert chain.name == "Another name"


def test_a_schedule_is_written_in_words(farm: Organization, pump: Device) -> None:
    client = client_of(builders.member(farm, "admin"))
    head: dict[str, Any] = {
        "execution_type": "schedule-only",
        "times": "6:00, 18:00",
        "weekdays": ["1", "5"],
        "timezone": "Europe/Berlin",
    }
    chain = made(farm, client, posted([], [switched(pump, "power", "on")], **head))
    assert (chain.cron, chain.timezone) == ("0 6,18 * * 1,5", "Europe/Berlin")
    seen = client.post(
        f"/rules/preview?organization={farm.uuid}", posted([], [switched(pump, "power", "on")], **head)
    ).json()
    assert seen["html"].count("<time") == 5


@pytest.mark.parametrize(
    ("text", "days", "cron"),
    [
        ("06:00", [], "0 6 * * *"),
        ("6", [], "0 6 * * *"),
        ("6:30 pm", [], "30 18 * * *"),
        ("12 am, 12 pm", [], "0 0,12 * * *"),
        ("every 15 minutes", ["0"], "*/15 * * * 0"),
        ("every 2 h", [], "0 */2 * * *"),
        ("every hour", [], "0 * * * *"),
        ("0 6-20/2 * * *", [], "0 6-20/2 * * *"),
    ],
)
def test_times_are_read_as_people_write_them(text: str, days: list[str], cron: str) -> None:
    assert times.as_cron(text, days) == cron
    again, weekdays = times.as_times(cron)
    assert times.as_cron(again, weekdays) == cron


@pytest.mark.parametrize("text", ["", "25:00", "6:75", "06:00, 18:30", "every 7 minutes", "every 0 hours", "soon"])
def test_times_that_cannot_be_meant_are_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"time|divide"):
        times.as_cron(text)


@pytest.mark.parametrize(
    ("text", "duration"),
    [("5 min", "5m"), ("5m", "5m"), ("2 hours", "2h"), ("1 Day", "1d"), ("soon", "soon"), ("5", "5")],
)
def test_durations_are_read_as_people_write_them(text: str, duration: str) -> None:
    assert choices.as_duration(text) == duration


def test_what_is_wrong_stands_at_its_field(farm: Organization, tank: Sensor, pump: Device) -> None:
    client = client_of(builders.member(farm, "admin"))
    wrong = posted(
        [value(tank, "ph", ">", "high"), value(tank, "ph", ">", "6", lasting="soon"), {"operator": ">", "source": "x"}],
        [switched(pump, "power", "dimmed"), {"kind": "raise_alarm"}, {"kind": "device_command", "target": ""}],
        name="",
    )
    errors = client.post(f"/rules/preview?organization={farm.uuid}", wrong).json()["errors"]
    assert errors.keys() == {"name", "when-2-source", "then-1-alarm", "then-2-target"}
    wrong = posted(
        [value(tank, "ph", ">", "high"), value(tank, "ph", ">", "6", lasting="soon")],
        [switched(pump, "power", "dimmed", cooldown="often")],
    )
    errors = client.post(f"/rules/preview?organization={farm.uuid}", wrong).json()["errors"]
    assert errors.keys() == {"when-0-value", "when-1-lasting", "then-0-value", "then-0-cooldown"}
    assert "must be a duration" in errors["when-1-lasting"]
    wrong = posted([value(tank, "ph", ">", "6")], [switched(pump, "power", "dimmed")])
    assert client.post(f"/rules/preview?organization={farm.uuid}", wrong).json()["errors"].keys() == {"then-0-value"}
    assert client.post(f"/rules/new?organization={farm.uuid}&template=blank", wrong).status_code == 400
    assert not RuleChain.objects.exists()


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (posted(), "add an action"),
        (posted([], [{"kind": "notify", "message": "x"}]), "add a condition"),
    ],
)
def test_an_unfinished_rule_says_what_is_missing(farm: Organization, body: dict[str, Any], problem: str) -> None:
    client = client_of(builders.member(farm, "admin"))
    assert problem in client.post(f"/rules/preview?organization={farm.uuid}", body).json()["html"]


def test_two_rules_do_not_share_a_name(farm: Organization, tank: Sensor, pump: Device) -> None:
    client = client_of(builders.member(farm, "admin"))
    body = posted([value(tank, "ph", ">", "6")], [switched(pump, "power", "on")])
    made(farm, client, body)
    answer = client.post(f"/rules/new?organization={farm.uuid}&template=blank", body)
    assert (answer.status_code, RuleChain.objects.count()) == (400, 1)
    assert "is the name of another rule" in answer.text


def test_rows_that_were_taken_away_do_not_count(farm: Organization, tank: Sensor, pump: Device) -> None:
    client = client_of(builders.member(farm, "admin"))
    rows = [value(tank, "ph", ">", "high", DELETE="on"), value(tank, "ph", ">", "6")]
    chain = made(farm, client, posted(rows, [switched(pump, "power", "on")]))
    assert chain.nodes.get(name="when").config["value"] == 6


@pytest.mark.parametrize("key", STARTERS)
def test_a_template_fills_in_what_the_farm_has(farm: Organization, tank: Sensor, pump: Device, key: str) -> None:
    """With a choice for what it cannot know, each is a rule that can be saved."""
    builders.device(farm, "Fan", states={"fan": ["on", "off"], "humidifier": ["on", "off"], "light": ["on", "off"]})
    offered = Choices(farm)
    initial = STARTERS[key].initial(offered)
    body = posted(initial["when"], initial["then"], initial["otherwise"], **initial["head"])
    form = RuleForm(offered, RuleChain(organization=farm), data=body)
    nodes = form.build()
    errors = [form.head.errors, form.conditions.errors, form.then.errors, form.otherwise.errors, form.problems]
    assert nodes, errors
    page = client_of(builders.member(farm, "admin")).get(f"/rules/new?organization={farm.uuid}&template={key}")
    assert page.status_code == 200


def test_a_template_in_an_empty_farm_leaves_the_choice_open(farm: Organization) -> None:
    for key in STARTERS:
        page = client_of(builders.member(farm, "admin")).get(f"/rules/new?organization={farm.uuid}&template={key}")
        assert page.status_code == 200


def test_many_rules_cost_few_queries_and_are_turned_page_by_page(
    farm: Organization, tank: Sensor, pump: Device, django_assert_max_num_queries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "SHOWN", 10)
    for number in range(25):
        builders.switching_chain(tank, pump, name=f"Rule {number:02d}")
    client = client_of(builders.member(farm, "viewer"))
    with django_assert_max_num_queries(14):
        first = client.get("/rules").text
    assert ("Rule 09" in first, "Rule 10" in first, first.count("When Tank 1 ph is below 5.5")) == (True, False, 10)
    last = client.get("/rules", {"page": "3"}).text
    assert ("Rule 24" in last, "Next" in last) == (True, False)
    for odd in ("0", "-1", "x", "9" * 30):
        assert client.get("/rules", {"page": odd}).status_code == 200


def test_who_may_do_what(farm: Organization, tank: Sensor, pump: Device) -> None:
    chain = builders.switching_chain(tank, pump)
    viewer, stranger = (
        client_of(builders.member(farm, "viewer")),
        client_of(builders.member(builders.organization(), "admin")),
    )
    assert viewer.get("/rules").status_code == viewer.get(f"/rules/{chain.uuid}").status_code == 200
    assert "Switch off" not in viewer.get(f"/rules/{chain.uuid}").text
    for path in ("edit", "switch", "delete"):
        assert viewer.post(f"/rules/{chain.uuid}/{path}").status_code == 403
        assert stranger.post(f"/rules/{chain.uuid}/{path}").status_code == 404
        assert Client().post(f"/rules/{chain.uuid}/{path}").status_code == 302
    assert viewer.get(f"/rules/new?organization={farm.uuid}").status_code == 403
    assert stranger.get(f"/rules/new?organization={farm.uuid}").status_code == 404
    assert stranger.get(f"/rules/{chain.uuid}").status_code == 404
    assert RuleChain.objects.filter(pk=chain.pk, enabled=True).exists()


def test_a_rule_that_no_form_can_show_is_changed_in_the_expert_view(
    farm: Organization, tank: Sensor, pump: Device
) -> None:
    both = {**builders.leaf(tank, operator="in", value=["a,b", "c"])}
    chain = builders.chain(farm, [builders.node("low", both, next="on"), builders.node("on", builders.command(pump))])
    client = client_of(builders.member(farm, "admin"))
    assert "steps that the form does not show" in client.get(f"/rules/{chain.uuid}").text
    assert client.get(f"/rules/{chain.uuid}/edit").headers["Location"] == f"/admin/rules/rulechain/{chain.pk}/change/"


def test_a_rule_whose_sensor_is_gone_can_still_be_seen_edited_and_deleted(
    farm: Organization, tank: Sensor, pump: Device
) -> None:
    chain = builders.switching_chain(tank, pump)
    tank.delete()
    client = client_of(builders.member(farm, "admin"))
    for path in (f"/rules/{chain.uuid}", f"/rules/{chain.uuid}/edit", "/rules"):
        assert client.get(path).status_code == 200
    assert client.post(f"/rules/{chain.uuid}/delete").status_code == 302
    assert not RuleChain.objects.exists()


@pytest.mark.parametrize("path", ["when-TOTAL_FORMS", "then-INITIAL_FORMS"])
@pytest.mark.parametrize("bad", ["", "x", "-1", "100000000"])
def test_a_form_that_was_tampered_with_is_refused(farm: Organization, path: str, bad: str) -> None:
    client = client_of(builders.member(farm, "admin"))
    body = {**posted([{}], [{"kind": "notify", "message": "x"}]), path: bad}
    assert client.post(f"/rules/preview?organization={farm.uuid}", body).status_code == 200
    assert client.post(f"/rules/new?organization={farm.uuid}&template=blank", body).status_code == 400
    assert not RuleChain.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_a_rule_in_a_browser(
    farm: Organization, tank: Sensor, pump: Device, live_server: LiveServer, tmp_path: Path
) -> None:
    """Pick a template, correct a value, see the rule in words, save, see when it would have fired, switch it on."""
    ph = Variable.objects.get(sensor=tank, name="ph")
    now = timezone.now()
    values = [6.0] * 20 + [7.0] * 20
    Reading.objects.bulk_create(
        Reading(variable=ph, timestamp=now - timedelta(minutes=2 * (40 - number)), number=value)
        for number, value in enumerate(values)
    )
    DeviceState.objects.filter(device=pump).exclude(name="power").delete()
    builders.member(farm, "admin", username="ada", password="tomatoes-are-red")
    with browser(tmp_path) as page:
        page.before_each(
            "window.wrong = []; addEventListener('securitypolicyviolation', e => wrong.push(e.violatedDirective));"
            "addEventListener('error', e => wrong.push(e.message));"
        )
        page.open(f"{live_server.url}/rules/new?template=ph-down")
        page.evaluate(
            "document.querySelector('#id_username').value = 'ada';"
            "document.querySelector('#id_password').value = 'tomatoes-are-red';"
            "document.querySelector('#login-form').submit()"
        )
        page.until("!!document.querySelector('select[name=when-0-source]')")
        assert (
            page.evaluate("document.querySelector('[name=when-0-source]').selectedOptions[0].innerText") == "Tank 1: ph"
        )
        page.evaluate("document.querySelectorAll('[data-rows=when] [data-remove]')[1].click()")
        type_into = (
            "(() => { const field = document.querySelector('[name=when-0-value]'); field.value = '%s';"
            "field.dispatchEvent(new Event('input', { bubbles: true })); })()"
        )
        page.evaluate(type_into % "high")
        page.until("document.querySelector('[data-error=when-0-value]').innerText.includes('must be a')")
        page.evaluate(type_into % "6,5")
        page.until("document.querySelector('#preview').innerText.includes('Tank 1 ph is above 6.5 for 5 m')")
        assert page.evaluate("document.querySelector('[data-error=when-0-value]').innerText") == ""
        page.evaluate("document.querySelector('button.main').click()")
        page.until("document.body?.innerText.includes('What it would have done')")
        assert "once" in page.evaluate("document.querySelector('section strong').innerText")
        page.until("Chart.getChart(document.querySelector('#chart'))?.data.datasets[0].data.length === 1")
        page.evaluate("document.querySelector('button.main').click()")
        page.until("document.querySelector('.badge')?.innerText === 'on'")
        assert page.evaluate("window.wrong") == []
    assert RuleChain.objects.get().enabled
