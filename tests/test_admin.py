"""The admin: every page opens, staff see only their organizations, chains are judged, tokens are shown once."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from django.contrib import admin
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone
from django.utils.html import escape

from aemos.admin import GROUPS
from aemos.lib import keys, redis
from devices import catalogue, latest
from devices.models import (
    CatalogueVersion,
    DeviceState,
    DeviceToken,
    Membership,
    Organization,
    Reading,
    Sensor,
    Variable,
)
from devices.scoped_admin import COUNTED_ROWS, BoundedPaginator, ScopedAdmin
from notifications.models import Delivery, Notification
from rules.journal import ledger
from rules.models import Alarm, ChainStatistics, DeadLetter, RejectedEvent, RuleChain
from tests import builders
from tests.test_api_rights import Farm, make_farm

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]
PAGES = [model for model, page in admin.site._registry.items() if isinstance(page, ScopedAdmin)]
RECORDS = {
    "auditentry",
    "reading",
    "statechange",
    "notification",
    "rejectedevent",
    "deadletter",
    "replay",
    "alarm",
    "actioncooldown",
    "dataproblem",
    "veto",
}


def url(model: Any, page: str, *args: Any) -> str:
    return reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_{page}", args=args)


def logged_in(person: User) -> Client:
    client = Client()
    client.force_login(person)
    return client


def superuser() -> Client:
    return logged_in(builders.user(is_superuser=True, is_staff=True))


def staff(of: Organization, role: str = "admin") -> Client:
    """A member: roles and organizations alone say what the pages show."""
    person = builders.member(of, role)
    return logged_in(person)


def test_every_table_that_people_use_has_a_page() -> None:
    named = {model.__name__ for model in PAGES}
    assert named == {
        "Organization", "Membership", "Sensor", "Variable", "Device", "DeviceState", "DeviceToken", "Reading", "StateChange",
        "RuleChain", "RejectedEvent", "DeadLetter", "Replay", "Notification", "Alarm",
        "ActionCooldown", "DataProblem", "Interlock", "Veto", "Invitation",
        "AuditEntry", "Area",
    }  # fmt: skip


@pytest.mark.parametrize("model", PAGES)
def test_a_superuser_opens_list_add_change_and_history_of_every_page(model: Any) -> None:
    make_farm()
    client = superuser()
    row = model._default_manager.first()
    listed = client.get(url(model, "changelist"))
    assert listed.status_code == 200
    assert "AEMOS" in listed.text
    assert client.get(url(model, "changelist"), {"q": str(uuid4())}).status_code == 200
    assert client.get(url(model, "changelist"), {"q": "a name"}).status_code == 200
    assert client.get(url(model, "change", row.pk)).status_code == 200
    assert client.get(url(model, "history", row.pk)).status_code == 200
    read_only = model._meta.model_name in RECORDS
    assert client.get(url(model, "add")).status_code == (403 if read_only else 200)
    if read_only:
        assert client.post(url(model, "change", row.pk), {}).status_code == 403


@pytest.mark.parametrize("model", PAGES)
def test_staff_see_only_the_rows_of_their_organizations(model: Any) -> None:
    own, other = make_farm(), make_farm()
    page = admin.site._registry[model]
    assert isinstance(page, ScopedAdmin)
    path = page.organization_path
    foreign = model._default_manager.filter(**{path: other.organization.pk}).first()
    mine = model._default_manager.filter(**{path: own.organization.pk}).first()
    client = staff(own.organization)
    shown = client.get(url(model, "changelist")).context["cl"].queryset
    assert mine in shown
    assert foreign not in shown
    assert client.get(url(model, "change", mine.pk)).status_code == 200
    hidden = client.get(url(model, "change", foreign.pk))
    assert hidden.status_code == 302  # to the index, with "doesn't exist"
    assert str(other.organization) not in client.get(url(model, "changelist")).text


@pytest.mark.parametrize("model", PAGES)
def test_searching_for_a_uuid_finds_its_row_and_no_other(model: Any) -> None:
    farm = make_farm()
    make_farm()
    page = admin.site._registry[model]
    assert isinstance(page, ScopedAdmin)
    row = model._default_manager.filter(**{page.organization_path: farm.organization.pk}).last()
    value: Any = row
    for name in page.uuid_paths[0].split("__"):
        value = getattr(value, name)
    found = superuser().get(url(model, "changelist"), {"q": str(value)}).context["cl"].queryset
    assert row in found
    assert all(page.organization_path == "pk" or _organization(one, page) == farm.organization for one in found)


def _organization(row: Any, page: ScopedAdmin) -> Any:
    for name in page.organization_path.split("__"):
        row = getattr(row, name)
    return row


def test_the_filter_by_organization_offers_and_takes_only_one_s_own() -> None:
    own, other = make_farm(), make_farm()
    client = staff(own.organization)
    page = client.get(url(Sensor, "changelist"), {"organization": str(own.organization.uuid)})
    assert [row.pk for row in page.context["cl"].queryset] == [own.sensor.pk]
    for foreign in (str(other.organization.uuid), "nonsense"):
        assert not client.get(url(Sensor, "changelist"), {"organization": foreign}).context["cl"].queryset


def test_staff_choose_among_the_rows_of_their_organizations() -> None:
    own, other = make_farm(), make_farm()
    client = staff(own.organization)
    lookup = {"app_label": "devices", "model_name": "sensor", "field_name": "organization"}
    offered = client.get(reverse("admin:autocomplete"), lookup).json()["results"]
    assert [one["text"] for one in offered] == [own.organization.name]
    body = {"name": "Stolen", "organization": other.organization.pk} | no_inlines("variables")
    answer = client.post(url(Sensor, "add"), body)
    assert "Select a valid choice" in answer.text
    assert not Sensor.objects.filter(name="Stolen").exists()


def test_admins_invite_and_only_superusers_enrol() -> None:
    farm = make_farm()
    body = {"user": farm.people["superuser"].pk, "organization": farm.organization.pk, "role": "viewer"}
    assert staff(farm.organization).post(url(Membership, "add"), body).status_code == 403
    assert superuser().post(url(Membership, "add"), body).status_code == 302


def no_inlines(prefix: str) -> dict[str, Any]:
    return {f"{prefix}-TOTAL_FORMS": 0, f"{prefix}-INITIAL_FORMS": 0}


@pytest.mark.parametrize(
    ("role", "changes_sensor", "changes_chain"), [("viewer", 403, 403), ("operator", 403, 200), ("admin", 200, 200)]
)
def test_roles_limit_staff_like_the_api(role: str, changes_sensor: int, changes_chain: int) -> None:
    farm = make_farm()
    client = staff(farm.organization, role)
    assert (
        client.post(url(Sensor, "change", farm.sensor.pk), {"name": ""} | no_inlines("variables")).status_code
        == changes_sensor
    )
    assert (
        client.post(url(RuleChain, "change", farm.chain.pk), {"name": ""} | no_inlines("nodes")).status_code
        == changes_chain
    )
    assert client.get(url(Sensor, "add")).status_code == changes_sensor
    assert client.get(url(Organization, "add")).status_code == 403
    assert client.get(url(Sensor, "changelist")).status_code == 200


def test_who_belongs_to_no_organization_stays_outside_and_reads_why() -> None:
    person = builders.user(password="correct-horse")
    assert logged_in(person).get(url(Sensor, "changelist")).status_code == 302
    page = Client().post("/admin/login/", {"username": person.username, "password": "correct-horse"})
    assert "You belong to no organization yet" in page.text


def test_a_role_alone_opens_the_pages_that_it_allows() -> None:
    farm = make_farm()
    person = builders.member(farm.organization, "operator", password="correct-horse")
    client = Client()
    answer = client.post("/admin/login/?next=/admin/", {"username": person.username, "password": "correct-horse"})
    assert answer.status_code == 302
    index = client.get("/admin/").text
    for name in ("Sensors", "Rule chains", "Alarms", "Rejected events", "Notifications"):
        assert name in index
    assert "Users" not in index
    assert client.post(url(RuleChain, "change", farm.chain.pk), {"name": ""} | no_inlines("nodes")).status_code == 200
    assert client.get(url(User, "changelist")).status_code == 403
    Membership.objects.filter(user=person).delete()
    assert client.get("/admin/").status_code == 302


def test_a_sensor_with_its_variables_is_added_on_one_page() -> None:
    organization = builders.organization()
    body = {
        "name": "Tank", "organization": organization.pk, "clock": "sender",
        "variables-TOTAL_FORMS": 1, "variables-INITIAL_FORMS": 0,
        "variables-0-name": "ec", "variables-0-datatype": "number", "variables-0-unit": "mS/cm",
    }  # fmt: skip
    assert superuser().post(url(Sensor, "add"), body).status_code == 302
    assert Variable.objects.get(sensor__name="Tank").unit == "mS/cm"


def test_a_sensor_stays_in_its_organization_and_keeps_its_name_unique() -> None:
    farm, other = make_farm(), builders.organization()
    twin = builders.sensor(farm.organization, variables={})
    page = url(Sensor, "change", twin.pk)
    answer = superuser().post(page, {"name": farm.sensor.name, "organization": other.pk} | no_inlines("variables"))
    assert "already exists" in answer.text
    body = {"name": "New", "organization": other.pk, "clock": "sender"} | no_inlines("variables")
    assert superuser().post(page, body).status_code == 302
    twin.refresh_from_db()
    assert (twin.name, twin.organization) == ("New", farm.organization)


def test_allowed_values_of_the_wrong_kind_are_refused_on_the_page() -> None:
    farm = make_farm()
    body = {"name": "speed", "device": farm.device.pk, "datatype": "number", "allowed_values": '["fast"]'}
    answer = superuser().post(url(DeviceState, "add"), body)
    assert "item 0: must be a number, not a string" in answer.text.replace("&#x27;", "'")


# Tokens


def test_a_token_is_shown_once_and_works() -> None:
    farm, client = make_farm(), superuser()
    body = {"sensor": farm.sensor.pk, "name": "tank 3", "highest_priority": 1}
    saved = client.post(url(DeviceToken, "add"), body, follow=True)
    (token,) = re.findall(r"aemos_\w{14}_[\w-]+", saved.text)
    assert saved.text.count(token) == 1
    row = DeviceToken.objects.get(name="tank 3")
    assert (row.organization, row.highest_priority) == (farm.organization, 1)
    credential = catalogue.Catalogue().credential(token)
    assert credential is not None
    assert credential.originator.uuid == str(farm.sensor.uuid)
    for page in (
        url(DeviceToken, "changelist"),
        url(DeviceToken, "change", row.pk),
        url(DeviceToken, "history", row.pk),
    ):
        answer = client.get(page)
        assert answer.status_code == 200
        assert token.split("_", 2)[2] not in answer.text


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({}, "one sensor or to one device"),
        ({"sensor": "sensor", "device": "device"}, "one sensor or to one device"),
        ({"sensor": "sensor", "expires_at_0": "2020-01-01", "expires_at_1": "00:00"}, "Must be in the future."),
        ({"sensor": "sensor", "highest_priority": 11}, "less than or equal to 10"),
    ],
)
def test_a_token_that_cannot_be_is_not_issued(values: dict[str, Any], complaint: str) -> None:
    farm = make_farm()
    rows = {"sensor": farm.sensor.pk, "device": farm.device.pk}
    body = {"highest_priority": 5} | {key: rows.get(value, value) for key, value in values.items()}
    before = DeviceToken.objects.count()
    assert complaint in superuser().post(url(DeviceToken, "add"), body).text
    assert DeviceToken.objects.count() == before


def test_a_token_is_changed_but_moves_to_no_other_sensor() -> None:
    farm = make_farm()
    row = DeviceToken.objects.get(sensor=farm.sensor)
    DeviceToken.objects.filter(pk=row.pk).update(expires_at=timezone.now() - timedelta(days=1))
    row.refresh_from_db()
    body = {"name": "old", "highest_priority": 7, "sensor": builders.sensor(farm.organization).pk}
    body |= {"expires_at_0": f"{row.expires_at:%Y-%m-%d}", "expires_at_1": f"{row.expires_at:%H:%M:%S.%f}"}
    assert superuser().post(url(DeviceToken, "change", row.pk), body).status_code == 302
    row.refresh_from_db()
    assert (row.name, row.highest_priority, row.sensor) == ("old", 7, farm.sensor)


def test_tokens_are_revoked_where_one_may_and_never_deleted() -> None:
    own, other = make_farm(), make_farm()
    client = staff(own.organization)
    Membership.objects.create(
        user=User.objects.get(pk=client.session["_auth_user_id"]), organization=other.organization
    )
    rows = list(DeviceToken.objects.values_list("pk", flat=True))
    client.post(url(DeviceToken, "changelist"), {"action": "revoke", "_selected_action": rows})
    assert DeviceToken.objects.get(organization=own.organization).revoked_at is not None
    assert DeviceToken.objects.get(organization=other.organization).revoked_at is None
    assert superuser().post(url(DeviceToken, "delete", rows[0]), {"post": "yes"}).status_code == 403


# Chains


def chain_body(farm: Farm, nodes: list[dict[str, Any]], **values: Any) -> dict[str, Any]:
    old = list(farm.chain.nodes.all())
    body: dict[str, Any] = {
        "name": "Acid", "organization": farm.organization.pk, "enabled": "on", "execution_type": "event-triggered",
        "cron": "", "timezone": "UTC", "missed_runs": "once", "late_events": "history", "priority": 5,
        "max_retries": 3, "nodes-TOTAL_FORMS": len(nodes), "nodes-INITIAL_FORMS": 0,
    } | values  # fmt: skip
    for index, node in enumerate(nodes):
        known = next((row for row in old if row.name == node.get("was")), None)
        body["nodes-INITIAL_FORMS"] += known is not None
        row = {"id": known.pk, "chain": farm.chain.pk} if known else {}
        config = node["config"] if isinstance(node["config"], str) else json.dumps(node["config"])
        values_of_form = row | {"next": "", "on_false": "", "on_failure": ""} | node | {"config": config}
        body |= {f"nodes-{index}-{key}": value for key, value in values_of_form.items()}
    return {key: value for key, value in body.items() if value is not None}


def two_nodes(farm: Farm) -> list[dict[str, Any]]:
    return [
        {"name": "low", "type": "filter", "next": "switch", "config": builders.leaf(farm.sensor)},
        {"name": "switch", "type": "action", "config": builders.command(farm.device)},
    ]


def version_of(farm: Farm) -> int:
    return CatalogueVersion.objects.get(organization=farm.organization).version


def test_a_chain_and_its_nodes_are_added_on_one_page() -> None:
    farm = make_farm()
    before = version_of(farm)
    answer = superuser().post(url(RuleChain, "add"), chain_body(farm, two_nodes(farm)))
    assert answer.status_code == 302
    chain = RuleChain.objects.get(name="Acid")
    assert [(node.name, node.position, node.next) for node in chain.nodes.all()] == [
        ("low", 0, "switch"),
        ("switch", 1, ""),
    ]
    assert (chain.version, version_of(farm)) == (1, before + 1)


def test_a_change_of_nodes_makes_one_new_version_and_keeps_their_uuids() -> None:
    farm = make_farm()
    uuids = {node.name: node.uuid for node in farm.chain.nodes.all()}
    nodes = two_nodes(farm)
    nodes[0] |= {"was": "low", "config": builders.leaf(farm.sensor, value=5)}
    nodes[1] |= {"was": "switch"}
    answer = superuser().post(url(RuleChain, "change", farm.chain.pk), chain_body(farm, nodes))
    assert answer.status_code == 302
    farm.chain.refresh_from_db()
    assert (farm.chain.name, farm.chain.version) == ("Acid", 2)
    assert {node.name: node.uuid for node in farm.chain.nodes.all()} == uuids
    assert farm.chain.nodes.get(name="low").config["value"] == 5


def test_nodes_can_swap_their_names_and_one_can_be_deleted() -> None:
    farm, client = make_farm(), superuser()
    nodes = [
        {"was": "low", "name": "switch", "type": "filter", "next": "low", "config": builders.leaf(farm.sensor)},
        {"was": "switch", "name": "low", "type": "action", "config": builders.command(farm.device)},
    ]
    page = url(RuleChain, "change", farm.chain.pk)
    assert client.post(page, chain_body(farm, nodes)).status_code == 302
    assert [(node.name, node.type) for node in farm.chain.nodes.all()] == [("switch", "filter"), ("low", "action")]
    nodes = [nodes[0] | {"was": "switch", "next": ""}, nodes[1] | {"was": "low", "DELETE": "on"}]
    assert client.post(page, chain_body(farm, nodes)).status_code == 302
    assert [node.name for node in farm.chain.nodes.all()] == ["switch"]


@pytest.mark.parametrize(
    ("index", "change", "field", "complaint"),
    [
        (0, {"next": "nowhere"}, "next", "names no node of this chain"),
        (1, {"next": "low"}, "next", "closes a cycle"),
        (1, {"name": "low"}, "name", "is the name of an earlier node"),
        (0, {"config": {"operator": "~"}}, "config", "operator must be one of"),
        (0, {"config": {"UUID": str(uuid4())}}, "config", "UUID is no sensor of this organization"),
        (1, {"config": {"stateName": "colour"}}, "config", "is no state of this device; it has power"),
        (1, {"config": {"value": "dimmed"}}, "config", "must be one of ["),
        (1, {"on_false": "low"}, "on_false", "only a filter has a false branch"),
    ],
)
def test_what_is_wrong_with_a_node_is_told_at_its_field(
    index: int, change: dict[str, Any], field: str, complaint: str
) -> None:
    farm = make_farm()
    nodes = two_nodes(farm)
    change = {"config": nodes[index]["config"] | change["config"]} if "config" in change else change
    nodes[index] |= change
    answer = superuser().post(url(RuleChain, "add"), chain_body(farm, nodes))
    assert answer.status_code == 200
    (inline,) = answer.context["inline_admin_formsets"]
    told = inline.formset.forms[index].errors[field]
    assert any(complaint in text for text in told), told
    assert not RuleChain.objects.filter(name="Acid").exists()


def test_what_is_wrong_with_the_chain_as_a_whole_is_told_above_its_nodes() -> None:
    farm = make_farm()
    nodes = two_nodes(farm)
    nodes[0]["next"] = ""
    answer = superuser().post(url(RuleChain, "add"), chain_body(farm, nodes))
    (inline,) = answer.context["inline_admin_formsets"]
    (problem,) = inline.formset.non_form_errors()
    assert escape(problem) in answer.text


def test_a_chain_needs_json_and_nodes_even_when_its_own_fields_are_wrong() -> None:
    farm = make_farm()
    nodes = two_nodes(farm)
    nodes[0]["config"] = "{"
    answer = superuser().post(url(RuleChain, "add"), chain_body(farm, nodes, name="", organization=""))
    assert "Enter a valid JSON." in answer.text
    assert superuser().post(url(RuleChain, "add"), chain_body(farm, [])).status_code == 200
    assert not RuleChain.objects.filter(name="Acid").exists()


def test_a_chain_whose_sensor_is_gone_can_be_switched_off_and_not_on() -> None:
    farm, client = make_farm(), superuser()
    farm.sensor.delete()
    page = url(RuleChain, "change", farm.chain.pk)
    nodes = [
        {"was": node.name, "name": node.name, "type": node.type, "config": node.config, "next": node.next}
        for node in farm.chain.nodes.all()
    ]
    assert client.post(page, chain_body(farm, nodes, enabled=None)).status_code == 302
    farm.chain.refresh_from_db()
    assert (farm.chain.enabled, farm.chain.version) == (False, 2)
    assert client.post(page, chain_body(farm, nodes)).context["errors"]
    answer = client.post(
        url(RuleChain, "changelist"), {"action": "switch_on", "_selected_action": [farm.chain.pk]}, follow=True
    )
    assert "stays off" in answer.text
    farm.chain.refresh_from_db()
    assert farm.chain.enabled is False


def test_chains_are_switched_where_one_may() -> None:
    own, other = make_farm(), make_farm()
    client = staff(own.organization, "operator")
    Membership.objects.create(
        user=User.objects.get(pk=client.session["_auth_user_id"]), organization=other.organization
    )
    rows = [own.chain.pk, other.chain.pk]
    client.post(url(RuleChain, "changelist"), {"action": "switch_off", "_selected_action": rows})
    assert dict(RuleChain.objects.values_list("pk", "enabled")) == {own.chain.pk: False, other.chain.pk: True}
    client.post(url(RuleChain, "changelist"), {"action": "switch_on", "_selected_action": rows})
    own.chain.refresh_from_db()
    assert (own.chain.enabled, own.chain.version) == (True, 3)


def page_of(chain: RuleChain, page: str = "change") -> str:
    return url(RuleChain, page, chain.pk)


def test_a_chain_is_shown_in_words_and_as_a_graph_with_schedule_and_statistics() -> None:
    farm = make_farm()
    RuleChain.objects.filter(pk=farm.chain.pk).update(name="<Acid>", next_run_at=datetime(2026, 5, 2, 6, tzinfo=UTC))
    when = datetime(2026, 5, 1, 6, tzinfo=UTC)
    told = {"executions": 40, "failures": 2, "seconds": 0.1, "last_executed_at": when, "last_failed_at": when}
    ChainStatistics.objects.create(chain=farm.chain, last_error="no <value>", **told)
    client = superuser()
    shown = client.get(page_of(farm.chain)).text
    assert f"When {farm.sensor} ph is below 5.5, set {farm.device} power to on." in shown
    assert shown.count('<svg class="chain-graph"') == 1
    assert "Graph of &lt;Acid&gt;" in shown
    listed = client.get(url(RuleChain, "changelist")).text
    for text in ("2026-05-02 06:00", ">40<", ">2<", "2.50 ms", "2026-05-01 06:00: no &lt;value&gt;"):
        assert text in listed
    RuleChain.objects.update(suspended_at=when)
    assert ">suspended<" in client.get(url(RuleChain, "changelist")).text


def test_the_list_of_chains_takes_no_query_for_each_of_them() -> None:
    farm, client = make_farm(), superuser()
    counts = []
    for _ in range(2):
        with CaptureQueriesContext(connection) as queries:
            assert client.get(url(RuleChain, "changelist")).status_code == 200
        counts.append(len(queries))
        for _ in range(10):
            ChainStatistics.objects.create(chain=builders.switching_chain(farm.sensor, farm.device))
    assert counts[0] == counts[1]


def test_a_broken_chain_is_still_shown() -> None:
    farm = make_farm()
    farm.chain.nodes.filter(name="low").update(
        config={"type": "AND", "expressions": [7, {"operator": [1]}]}, next="low"
    )
    client = superuser()
    assert client.get(page_of(farm.chain)).status_code == 200
    answer = client.get(page_of(farm.chain, "try"))
    assert "cannot be tried" in answer.text
    assert "nodes[0].next" in answer.text


@pytest.mark.parametrize(
    ("values", "field", "complaint"),
    [
        ({"cron": "0 6 * * *"}, "cron", "is for scheduled chains"),
        ({"execution_type": "hybrid"}, "cron", "must have five fields"),
        ({"execution_type": "hybrid", "cron": "0 6 * * *", "timezone": "Mars"}, "timezone", "must be a time zone"),
    ],
)
def test_what_is_wrong_with_a_schedule_is_told_at_its_field(values: dict[str, Any], field: str, complaint: str) -> None:
    farm = make_farm()
    answer = superuser().post(url(RuleChain, "add"), chain_body(farm, two_nodes(farm), **values))
    assert complaint in str(answer.context["adminform"].form.errors[field])


def test_a_schedule_is_set_on_the_page() -> None:
    farm = make_farm()
    values = {"execution_type": "hybrid", "cron": "0 6 * * *", "timezone": "Europe/Berlin", "missed_runs": "skip"}
    assert superuser().post(url(RuleChain, "add"), chain_body(farm, two_nodes(farm), **values)).status_code == 302
    chain = RuleChain.objects.get(name="Acid")
    assert {name: getattr(chain, name) for name in values} == values
    assert chain.next_run_at is not None


def test_a_chain_that_becomes_one_that_nothing_triggers_is_refused_on_the_page() -> None:
    farm, client = make_farm(), superuser()
    scheduled = {"execution_type": "schedule-only", "cron": "0 6 * * *"}
    nodes = [{"was": "switch", "name": "switch", "type": "action", "config": builders.command(farm.device)}]
    low = {"was": "low", "name": "low", "type": "filter", "config": builders.leaf(farm.sensor), "DELETE": "on"}
    assert client.post(page_of(farm.chain), chain_body(farm, [low, *nodes], **scheduled)).status_code == 302
    answer = client.post(page_of(farm.chain), chain_body(farm, nodes))
    assert answer.context["errors"]


def test_warnings_are_shown_after_a_save() -> None:
    farm = make_farm()
    nodes = two_nodes(farm)
    nodes[0]["config"] = {
        "type": "AND",
        "expressions": [builders.leaf(farm.sensor), builders.leaf(farm.sensor, value=9)],
    }
    nodes[0]["config"]["expressions"][1]["operator"] = ">"
    answer = superuser().post(url(RuleChain, "add"), chain_body(farm, nodes), follow=True)
    told = [str(message) for message in answer.context["messages"]]
    assert any(text.startswith("low: expressions[1] 9 ") for text in told), told


def test_a_chain_is_run_for_real_from_its_page() -> None:
    farm, client = make_farm(), superuser()
    answer = client.post(page_of(farm.chain, "run"), follow=True)
    assert "runs now, as event" in answer.text
    assert ledger.counts().depth["critical"] == 1
    RuleChain.objects.update(suspended_at=datetime(2026, 5, 1, tzinfo=UTC))
    assert "Run now" not in client.get(page_of(farm.chain)).text
    assert "is not switched on" in client.post(page_of(farm.chain, "run"), follow=True).text
    assert ledger.counts().depth["critical"] == 1
    assert client.get(page_of(farm.chain, "run")).status_code == 405


def test_a_chain_is_tried_from_its_page_with_what_is_known() -> None:
    farm, client = make_farm(), superuser()
    key = ("sensor", str(farm.sensor.uuid), "ph")
    latest.remember({key: latest.Latest(5.1, 1_750_000_000_000_000)})
    page = page_of(farm.chain, "try")
    shown = client.get(page)
    assert shown.context["form"]["value0"].value() == 5.1
    values = {"originator": str(farm.sensor.uuid), "value0": "5.2"}
    report = client.post(page, values)
    assert [effect["value"] for effect in report.context["report"]["effects"]] == ["on"]
    assert f"Set {farm.device} power to on" in report.text
    assert "The run ends at “low”, which is false." in client.post(page, values | {"value0": "6"}).text
    by_schedule = client.post(page, {"originator": "", "value0": "5.1"}).context["report"]
    assert (by_schedule["originator"]["sourceType"], len(by_schedule["effects"])) == ("chain", 1)
    assert client.post(page, {"originator": "", "value0": ""}).context["report"]["partialData"] is True
    assert "Enter a number" in client.post(page, values | {"value0": "acid"}).text
    assert DeviceState.objects.get(device=farm.device).value is None


def test_a_chain_is_copied_and_exported_from_its_page_and_from_the_list() -> None:
    farm, client = make_farm(), superuser()
    answer = client.post(page_of(farm.chain, "duplicate"))
    copy = RuleChain.objects.get(name=f"{farm.chain.name} (copy)")
    assert (answer.headers["Location"], copy.enabled) == (page_of(copy), False)
    selected = {"action": "duplicate_selected", "_selected_action": [farm.chain.pk]}
    client.post(url(RuleChain, "changelist"), selected)
    assert RuleChain.objects.filter(name=f"{farm.chain.name} (copy 2)").exists()
    exported = client.get(page_of(farm.chain, "export"))
    assert "attachment" in exported.headers["Content-Disposition"]
    assert exported.json()["chain"]["name"] == farm.chain.name


def test_pages_of_a_chain_take_the_same_rights_as_the_api() -> None:
    own, other = make_farm(), make_farm()
    viewer = staff(own.organization, "viewer")
    for page in ("try", "export"):
        assert viewer.get(page_of(own.chain, page)).status_code == 200
        assert viewer.get(page_of(other.chain, page)).status_code == 404
    for page in ("run", "duplicate"):
        assert viewer.post(page_of(own.chain, page)).status_code == 403
        assert staff(own.organization, "operator").post(page_of(other.chain, page)).status_code == 404
    assert "Run now" not in viewer.get(page_of(own.chain)).text
    assert RuleChain.objects.count() == 2
    assert ledger.counts().total == 0


def test_switching_on_in_the_list_lets_a_suspended_chain_run_again() -> None:
    farm = make_farm()
    RuleChain.objects.update(suspended_at=datetime(2026, 5, 1, tzinfo=UTC))
    superuser().post(url(RuleChain, "changelist"), {"action": "switch_on", "_selected_action": [farm.chain.pk]})
    farm.chain.refresh_from_db()
    assert (farm.chain.enabled, farm.chain.suspended_at) == (True, None)


@pytest.mark.parametrize("how", ["page", "action"])
def test_deleting_a_chain_tells_the_workers(how: str) -> None:
    farm, client = make_farm(), superuser()
    before = version_of(farm)
    if how == "page":
        client.post(url(RuleChain, "delete", farm.chain.pk), {"post": "yes"})
    else:
        selected = {"action": "delete_selected", "_selected_action": [farm.chain.pk], "post": "yes"}
        client.post(url(RuleChain, "changelist"), selected)
    assert not RuleChain.objects.exists()
    assert version_of(farm) == before + 1


# Records


def test_only_superusers_delete_records_and_only_refused_or_failed_ones() -> None:
    farm = make_farm()
    for model in (RejectedEvent, DeadLetter):
        page = url(model, "delete", model._default_manager.get().pk)
        assert staff(farm.organization).post(page, {"post": "yes"}).status_code == 403
        assert superuser().post(page, {"post": "yes"}).status_code == 302
        assert not model._default_manager.exists()
    for kept in (Reading, Notification):
        assert superuser().post(url(kept, "delete", kept._default_manager.get().pk), {"post": "yes"}).status_code == 403


def test_a_notification_shows_its_deliveries() -> None:
    farm = make_farm()
    row = Notification.objects.get()
    assert "pending" in staff(farm.organization, "viewer").get(url(Notification, "change", row.pk)).text


def test_notifications_are_listed_with_each_delivery_and_found_by_what_went_wrong() -> None:
    farm, client = make_farm(), superuser()
    row = Notification.objects.get()
    Delivery.objects.update_or_create(
        notification=row, protocol="mqtt", defaults={"state": "failed", "last_error": "no"}
    )
    page = client.get(url(Notification, "changelist"))
    assert "failed" in page.text
    for query, found in (("failed", 1), ("failed.mqtt", 1), ("failed.coap", 0), ("expired", 0)):
        listed = client.get(url(Notification, "changelist"), {"delivery": query})
        assert len(listed.context["cl"].result_list) == found
    listed = client.get(url(Notification, "changelist"), {"event": row.event})
    assert [each.pk for each in listed.context["cl"].result_list] == [row.pk]
    assert farm.organization == row.organization


def test_operators_send_notifications_again_and_viewers_do_not() -> None:
    farm = make_farm()
    row = Notification.objects.get()
    row.deliveries.update(state="failed")
    wish = {"action": "resend", ACTION_CHECKBOX_NAME: [row.pk]}
    staff(farm.organization, "viewer").post(url(Notification, "changelist"), wish)
    assert set(row.deliveries.values_list("state", flat=True)) == {"failed"}
    assert redis.client().xlen(keys.NOTIFICATIONS) == 0
    answer = staff(farm.organization, "operator").post(url(Notification, "changelist"), wish, follow=True)
    assert "1 sent again." in answer.text
    assert set(row.deliveries.values_list("state", flat=True)) == {"pending"}
    assert redis.client().xlen(keys.NOTIFICATIONS) == 1


def test_deleting_a_sensor_asks_without_loading_its_readings() -> None:
    farm, client = make_farm(), superuser()
    with CaptureQueriesContext(connection) as queries:
        answer = client.get(url(Sensor, "delete", farm.sensor.pk))
    assert "with everything that belongs to it" in answer.text
    assert not [query for query in queries if "devices_reading" in query["sql"]]
    assert client.post(url(Sensor, "delete", farm.sensor.pk), {"post": "yes"}).status_code == 302
    assert not Reading.objects.exists()


def test_the_list_of_readings_counts_no_further_than_people_turn_pages() -> None:
    farm = make_farm()
    variable = Variable.objects.get(sensor=farm.sensor)
    start = datetime(2026, 6, 1, tzinfo=UTC)
    Reading.objects.bulk_create(
        Reading(variable=variable, timestamp=start + timedelta(seconds=second), number=second) for second in range(120)
    )
    client = superuser()
    with CaptureQueriesContext(connection) as queries:
        page = client.get(url(Reading, "changelist"), {"variable__id__exact": variable.pk})
    assert page.context["cl"].result_count == 121
    counts = [query["sql"] for query in queries if "COUNT(" in query["sql"] and "devices_reading" in query["sql"]]
    assert counts
    assert all(f"LIMIT {COUNTED_ROWS}" in sql for sql in counts)
    assert page.context["cl"].result_list[0].number == 119
    assert BoundedPaginator([1, 2, 3], 2).count == 3


def test_a_new_chain_is_not_enabled_before_somebody_has_tried_it() -> None:
    form = superuser().get(url(RuleChain, "add")).context["adminform"].form

    assert form.initial["enabled"] is False
    assert "Try with values" in form.fields["enabled"].help_text


@pytest.mark.django_db
def test_the_index_is_grouped_by_what_people_look_for_and_counts_what_waits(client: Client) -> None:
    registered = {model.__name__ for model in admin.site._registry}
    assert {name for names in GROUPS.values() for name in names} == registered
    farm, other = builders.organization(), builders.organization()
    now = timezone.now()
    for organization in (farm, other, other):
        about = {
            "source_type": "sensor",
            "originator_uuid": uuid4(),
            "type": "pH",
            "raised_at": now,
            "last_raised_at": now,
        }
        Alarm.objects.create(organization=organization, **about)
    client.force_login(builders.member(farm, "admin"))
    page = client.get("/admin/").text
    assert "<strong>1</strong> open alarms" in page
    assert page.index("Farm") < page.index("Device states") < page.index("Rule chains") < page.index("Memberships")
    assert "Django" not in page.replace("Django site admin", "")
    client.force_login(builders.user(is_superuser=True, is_staff=True))
    page = client.get("/admin/").text
    assert "<strong>3</strong> open alarms" in page
    assert "Queues of RQ" in page
