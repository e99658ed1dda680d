"""The form of a rule step by step: any chain goes through it and comes out the same; what is wrong is said at its field."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.utils.html import escape
from pytest_django.live_server_helper import LiveServer

from devices.models import Device, Organization, Sensor
from pages.rules.choices import Choices
from pages.rules.groups import Group, Unreadable, tree_of
from pages.rules.steps import StepsForm, initial_of
from rules.models import RuleChain, RuleNode
from tests import builders
from tests.browser import Page, browser
from tests.waiting import until

pytestmark = pytest.mark.django_db


class Farm:
    def __init__(self) -> None:
        self.organization: Organization = builders.organization()
        self.tank: Sensor = builders.sensor(
            self.organization, "Tank", variables={"ph": "number", "raw": "number", "mode": "string", "leak": "boolean"}
        )
        self.pump: Device = builders.device(self.organization, "Pump", states={"power": ["on", "off"]})
        self.client = builders.client_of(builders.member(self.organization, "operator"))

    def leaf(self, operator: str = ">", value: Any = 6.5, key: str = "ph", **more: Any) -> dict[str, Any]:
        return {**builders.leaf(self.tank, key, operator, value), **more}

    def chain(self, nodes: list[RuleNode], **fields: Any) -> RuleChain:
        return builders.chain(self.organization, nodes, **fields)


@pytest.fixture
def farm() -> Farm:
    return Farm()


def group(kind: str, *parts: Any) -> dict[str, Any]:
    return {"type": kind, "expressions": list(parts)}


def rich(farm: Farm) -> list[RuleNode]:
    """Nested groups, every kind of step, both branches and failures caught."""
    pump = str(farm.pump.uuid)
    automatic, dry = farm.leaf("==", "auto", "mode"), farm.leaf("==", False, "leak")
    lasting = farm.leaf("between", [5, 6], **{"for": "5m"})
    asked = group("AND", farm.leaf(), group("OR", lasting, group("AND", automatic, dry)))
    scale = {"operation": "scale", "key": "raw", "factor": 0.1, "offset": -5, "target": "level"}
    switch = {"type": "device_command", "deviceUuid": pump, "stateName": "power", "valueFrom": "mode"}
    tell = {"type": "notify", "title": "No", "message": "{error}", "severity": "warning", "audience": ["admin"]}
    alarm = {"type": "raise_alarm", "alarm": "Pump fails", "severity": "critical", "message": "look"}
    return [
        builders.node("ask", asked, next="scale", on_false="tell"),
        builders.node("scale", scale, next="on", on_failure="tell"),
        builders.node("on", switch, on_failure="alarm"),
        builders.node("tell", {**tell, "deviceUuid": pump, "cooldown": "1h"}),
        builders.node("alarm", alarm),
    ]


def posted(form: StepsForm) -> dict[str, Any]:
    """What a browser sends of a form as it is shown."""
    sent: dict[str, Any] = {"steps-count": str(form.count)}
    shown = [
        form.head,
        *(part for step in form.steps for part in (step, step.action, step.transform, *step.group.rows)),
    ]
    for part in shown:
        for field in part:
            value = field.value()
            if isinstance(value, bool):
                sent |= {field.html_name: "on"} if value else {}
            elif value is not None:
                sent[field.html_name] = value
    return sent


def form_of(farm: Farm, chain: RuleChain) -> StepsForm:
    nodes, offered = list(chain.nodes.all()), Choices(farm.organization)
    initial = initial_of(chain, nodes, offered)
    assert initial is not None
    return StepsForm(offered, chain, initial=initial)


def told(nodes: Any) -> list[tuple[Any, ...]]:
    return [(node.name, node.type, node.config, node.next, node.on_false, node.on_failure) for node in nodes]


def test_any_chain_comes_out_as_it_went_in(farm: Farm) -> None:
    chain = farm.chain(rich(farm), priority=3, max_retries=0, late_events="run", missed_runs="skip")
    before = told(chain.nodes.all())
    uuids = set(chain.nodes.values_list("uuid", flat=True))
    answer = farm.client.post(f"/rules/{chain.uuid}/edit", posted(form_of(farm, chain)))
    assert answer.status_code == 302, answer.text
    chain.refresh_from_db()
    assert told(chain.nodes.all()) == before
    assert set(chain.nodes.values_list("uuid", flat=True)) == uuids
    assert (chain.priority, chain.max_retries, chain.late_events, chain.missed_runs, chain.version) == (
        3,
        0,
        "run",
        "skip",
        2,
    )


@pytest.mark.parametrize(
    "config",
    [
        {"operation": "add", "key": "ph", "value": 0.2},
        {"operation": "divide", "key": "ph", "value": 2, "target": "half"},
        {"operation": "scale", "key": "raw", "factor": 2},
        {"operation": "rename", "key": "raw", "target": "level"},
        {"operation": "set", "target": "limit", "value": 6.5},
        {"operation": "set", "target": "limit", "value": "high"},
        {"operation": "set", "target": "limit", "value": True},
    ],
)
def test_every_calculation_comes_out_as_it_went_in(farm: Farm, config: dict[str, Any]) -> None:
    chain = farm.chain(
        [
            builders.node("ask", farm.leaf(), next="calculate"),
            builders.node("calculate", config, next="on"),
            builders.node("on", builders.command(farm.pump)),
        ]
    )
    before = told(chain.nodes.all())
    assert farm.client.post(f"/rules/{chain.uuid}/edit", posted(form_of(farm, chain))).status_code == 302
    assert told(chain.nodes.all()) == before


def test_the_page_of_such_a_chain_leads_to_its_steps(farm: Farm) -> None:
    chain = farm.chain(rich(farm))
    assert "Edit" in farm.client.get(f"/rules/{chain.uuid}").text
    page = farm.client.get(f"/rules/{chain.uuid}/edit").text
    for text in ("data-steps", "Name of the step", 'value="scale"', "Remove the group", "{error}", "data-row-template"):
        assert text in page or escape(text) in page, text


def test_a_plain_rule_can_be_edited_step_by_step_too(farm: Farm) -> None:
    chain = builders.switching_chain(farm.tank, farm.pump)
    assert "data-steps" not in farm.client.get(f"/rules/{chain.uuid}/edit").text
    assert "data-steps" in farm.client.get(f"/rules/{chain.uuid}/edit?form=steps").text
    before = told(chain.nodes.all())
    assert farm.client.post(f"/rules/{chain.uuid}/edit?form=steps", posted(form_of(farm, chain))).status_code == 302
    assert told(chain.nodes.all()) == before


def test_a_new_rule_is_made_step_by_step_and_is_off(farm: Farm) -> None:
    url = f"/rules/new?organization={farm.organization.uuid}&template=steps"
    assert "data-steps" in farm.client.get(url).text
    condition = {"source": f"sensor|{farm.tank.uuid}|ph", "operator": ">", "value": "6,5"}
    action = {"kind": "device_command", "target": f"device|{farm.pump.uuid}|power", "value": "on"}
    steps = {
        "count": "3", "0-name": "ask", "0-kind": "filter", "0-next": "on",
        "0-structure": '{"type":"AND","expressions":[{"row":7}]}',
        **{f"0-row-7-{name}": text for name, text in condition.items()},
        "1-name": "gone", "1-kind": "filter", "1-gone": "yes",
        "2-name": "on", "2-kind": "action", **{f"2-action-{name}": text for name, text in action.items()},
    }  # fmt: skip
    sent = {"name": "Mine", "execution_type": "event-triggered"} | {
        f"steps-{name}": text for name, text in steps.items()
    }
    answer = farm.client.post(url, sent)
    assert answer.status_code == 302, answer.text
    chain = RuleChain.objects.get()
    assert (chain.name, chain.enabled) == ("Mine", False)
    assert told(chain.nodes.all()) == [
        ("ask", "filter", farm.leaf(), "on", "", ""),
        ("on", "action", builders.command(farm.pump), "", "", ""),
    ]


def test_problems_stand_at_their_fields(farm: Farm) -> None:
    chain = farm.chain(rich(farm))
    good = posted(form_of(farm, chain))
    for change, field, said in (
        ({"steps-0-next": "nobody"}, "steps-0-next", "names no node"),
        ({"steps-1-name": ""}, "steps-1-name", "required"),
        ({"steps-1-name": "ask"}, "steps-1-name", ""),
        ({"steps-1-transform-factor": "much"}, "steps-1-transform-factor", "number"),
        ({"steps-0-row-0-value": "high"}, "steps-0-row-0-value", "number"),
        ({"steps-0-row-2-source": "sensor|x|y"}, "steps-0-row-2-source", "choose another"),
        ({"steps-0-row-1-lasting": "soon"}, "steps-0-row-1-lasting", ""),
        ({"steps-2-action-target": ""}, "steps-2-action-target", "choose a device"),
        ({"steps-3-action-about": "x"}, "steps-3-action-about", "choose a device"),
        ({"steps-0-structure": "{"}, "steps-0-kind", "load the page anew"),
        ({"steps-0-structure": '{"type":"AND","expressions":[]}'}, "steps-0-kind", "add a condition"),
        ({"steps-0-structure": '{"type":"AND","expressions":[{"row":-1}]}'}, "steps-0-kind", "load the page anew"),
        ({"priority": "0"}, "priority", ""),
    ):
        answer = farm.client.post(
            f"/rules/preview?organization={farm.organization.uuid}&form=steps", {**good, **change}
        )
        errors = answer.json()["errors"]
        assert field in errors, (change, errors, answer.json()["html"])
        assert said in errors[field], (change, errors)
        assert farm.client.post(f"/rules/{chain.uuid}/edit", {**good, **change}).status_code == 400
    assert told(RuleChain.objects.get().nodes.all()) == told(rich(farm)), "nothing was saved"


@pytest.mark.parametrize("count", ["", "x", "-5", "1e9", "99999999999999999999", "\x00", "0"])
def test_a_count_that_is_none_makes_no_steps(farm: Farm, count: str) -> None:
    chain = farm.chain(rich(farm))
    answer = farm.client.post(f"/rules/{chain.uuid}/edit", {**posted(form_of(farm, chain)), "steps-count": count})
    assert answer.status_code in (302, 400)
    assert RuleNode.objects.count() == 5


@pytest.mark.parametrize(
    "structure",
    [
        None, 3, [], {}, {"type": "NOT", "expressions": []}, {"type": "AND"}, {"type": "AND", "expressions": {}},
        *({"type": "AND", "expressions": [part]} for part in (5, {"row": "1"}, {"row": True}, {"row": 1e9}, {"row": -1})),
    ],
)  # fmt: skip
def test_a_structure_that_is_none_is_refused(structure: Any) -> None:
    with pytest.raises(Unreadable):
        tree_of(structure, lambda number: pytest.fail(f"row {number} was made"))


def test_depth_ends_somewhere() -> None:
    deep: Any = {"type": "AND", "expressions": []}
    for _ in range(30):
        deep = {"type": "OR", "expressions": [deep]}
    with pytest.raises(Unreadable):
        tree_of(deep, lambda number: pytest.fail(str(number)))


def test_a_group_of_one_has_no_level_of_its_own() -> None:
    one, two, three = (type("Row", (), {"config": {"n": n}})() for n in (1, 2, 3))
    tree = Group("AND", [Group("OR", [one]), Group("OR", [two, three])])
    assert tree.config == {
        "type": "AND",
        "expressions": [{"n": 1}, {"type": "OR", "expressions": [{"n": 2}, {"n": 3}]}],
    }
    assert (tree.at([0]), tree.at([1, 1]), tree.at([1, 2]), tree.at([0, 0])) == (one, three, None, None)


@pytest.mark.parametrize(
    "node",
    [
        builders.node("x", {"operation": "add", "key": "ph", "value": "5"}),
        builders.node("x", {"operation": "power", "key": "ph"}),
        builders.node("x", {"type": "launch"}),
        RuleNode(name="x", type="filter", config=[]),
        RuleNode(name="x", type="filter", config={"type": "XOR", "expressions": []}),
    ],
)
def test_what_the_form_has_no_field_for_stays_with_the_expert(farm: Farm, node: RuleNode) -> None:
    assert initial_of(RuleChain(organization=farm.organization), [node], Choices(farm.organization)) is None


# In a browser


class Editor:
    """The form, open in a browser, as somebody fills it in."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def put(self, **values: str) -> None:
        """Fields of steps by the ends of their names, with _ for -."""
        for name, value in values.items():
            found = f"document.querySelector('[name=\"{name.replace('__', '-')}\"]')"
            told = "field.dispatchEvent(new Event('input', { bubbles: true }))"
            self.page.evaluate(f"(() => {{ const field = {found}; field.value = {value!r}; {told}; }})()")

    def click(self, selector: str, number: int = 0) -> None:
        self.page.evaluate(f"document.querySelectorAll({selector!r})[{number}].click()")

    @property
    def sentence(self) -> str:
        return str(self.page.evaluate("document.querySelector('#preview').innerText"))


@pytest.fixture
def editor(live_server: LiveServer, tmp_path: Path, transactional_db: None) -> Iterator[tuple[Farm, Editor]]:
    farm = Farm()
    builders.member(farm.organization, "operator", username="ada", password="tomatoes-are-red")
    with browser(tmp_path) as page:
        page.before_each(
            "window.wrong = []; addEventListener('securitypolicyviolation', e => wrong.push(e.violatedDirective));"
            "addEventListener('error', e => wrong.push(e.message));"
        )
        page.open(f"{live_server.url}/rules/new?template=steps")
        page.evaluate(
            "document.querySelector('#id_username').value = 'ada';"
            "document.querySelector('#id_password').value = 'tomatoes-are-red';"
            "document.querySelector('#login-form').submit()"
        )
        page.until("!!document.querySelector('select[name=steps-0-row-0-source]')")
        yield farm, Editor(page)


def fill_in(editor: Editor, farm: Farm) -> None:
    """A group in a group, a calculation, a command, and an alarm when one of them fails; and a step that is taken out again."""
    source = f"sensor|{farm.tank.uuid}|"
    editor.put(name="Careful dosing", steps__0__name="ask")
    editor.put(steps__0__row__0__source=source + "ph", steps__0__row__0__operator=">", steps__0__row__0__value="6,5")
    editor.click("[data-add-group]")
    editor.put(steps__0__row__1__source=source + "leak", steps__0__row__1__operator="==", steps__0__row__1__value="no")
    editor.click("[data-group] [data-group] [data-add-condition]")
    editor.put(
        steps__0__row__2__source=source + "mode", steps__0__row__2__operator="==", steps__0__row__2__value="auto"
    )
    editor.page.evaluate("document.querySelector('[data-group] [data-group] [data-group-type]').value = 'OR'")
    editor.click("[data-add-step]")
    editor.put(steps__1__name="double", steps__1__kind="transform", steps__1__transform__operation="multiply")
    editor.put(steps__1__transform__key="raw", steps__1__transform__value="2")
    editor.click("[data-add-step]")
    editor.put(
        steps__2__name="dose", steps__2__action__target=f"device|{farm.pump.uuid}|power", steps__2__action__value="on"
    )
    editor.click("[data-add-step]")
    editor.put(steps__3__name="call", steps__3__action__kind="raise_alarm", steps__3__action__alarm="Dosing fails")
    editor.click("[data-add-step]")
    editor.click("[data-remove-step]", 4)
    editor.put(steps__0__next="double", steps__1__next="dose", steps__1__on_failure="call", steps__2__on_failure="call")


@pytest.mark.usefixtures("empty_redis")
def test_a_rule_is_made_step_by_step_in_a_browser(editor: tuple[Farm, Editor]) -> None:
    farm, form = editor
    fill_in(form, farm)
    until(lambda: "ph is above 6.5 and (Tank leak is false or Tank mode is auto)" in form.sentence)
    assert "if that fails: raise the info alarm “Dosing fails”" in form.sentence
    form.click("button.main")
    form.page.until("document.body?.innerText.includes('What it would have done')")
    assert form.page.evaluate("wrong") == []
    either = group("OR", farm.leaf("==", False, "leak"), farm.leaf("==", "auto", "mode"))
    assert told(RuleChain.objects.get().nodes.all()) == [
        ("ask", "filter", group("AND", farm.leaf(), either), "double", "", ""),
        ("double", "transform", {"operation": "multiply", "key": "raw", "value": 2}, "dose", "", "call"),
        ("dose", "action", builders.command(farm.pump), "", "", "call"),
        ("call", "action", {"type": "raise_alarm", "alarm": "Dosing fails", "severity": "info"}, "", "", ""),
    ]
    form.page.evaluate("location.href = location.pathname + '/edit'")
    form.page.until("document.querySelectorAll('[data-step]').length === 4")
    assert form.page.evaluate("document.querySelector('[name=steps-1-on_failure]').value") == "call"
    assert form.page.evaluate("document.querySelector('[data-group] [data-group] [data-group-type]').value") == "OR"
