"""Who may do what over the REST API: every endpoint times every role, and nothing seen of another organization."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from django.contrib.auth.models import User
from django.db import transaction
from django.urls import URLResolver, get_resolver
from rest_framework.test import APIClient

from devices.models import (
    Area,
    AuditEntry,
    DataProblem,
    Device,
    DeviceState,
    DeviceToken,
    Interlock,
    Invitation,
    Organization,
    Reading,
    Requirement,
    Sensor,
    StateChange,
    Variable,
    Veto,
)
from devices.viewsets import ScopedViewSet
from notifications.models import Delivery, Notification
from rules.models import ActionCooldown, Alarm, DeadLetter, RejectedEvent, Replay, RuleChain, RuleNode
from tests import builders
from tests.problems import problem, wrong

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]
ROLES = ("viewer", "operator", "admin", "superuser")
WHEN = datetime(2026, 5, 1, 6, tzinfo=UTC)


@dataclass
class Farm:
    """One row of everything, and the words that stand for it in paths and bodies."""

    organization: Organization
    sensor: Sensor
    device: Device
    chain: RuleChain
    people: dict[str, User]
    names: dict[str, Any] = field(default_factory=dict)

    def client(self, role: str) -> APIClient:
        client = APIClient()
        if role != "anonymous":
            client.force_authenticate(self.people[role])
        return client


def make_farm() -> Farm:
    organization = builders.organization()
    sensor, device = builders.sensor(organization), builders.device(organization)
    chain = builders.switching_chain(sensor, device)
    people = {role: builders.member(organization, role) for role in ROLES[:3]}
    people["superuser"] = builders.user(is_superuser=True)
    people["stranger"] = builders.member(builders.organization(), "admin")
    farm = Farm(organization, sensor, device, chain, people)
    farm.names = names_of(farm)
    return farm


def names_of(farm: Farm) -> dict[str, Any]:
    organization, state = farm.organization, DeviceState.objects.get(device=farm.device)
    variable = Variable.objects.get(sensor=farm.sensor)
    Reading.objects.create(variable=variable, timestamp=WHEN, number=6.1)
    problem = DataProblem.objects.create(
        organization=organization, source_type="sensor", originator_uuid=farm.sensor.uuid, name="ph", kind="stuck", count=1,
        first_seen_at=WHEN, last_seen_at=WHEN,
    )  # fmt: skip
    change = StateChange.objects.create(
        effect_key=str(uuid4()), state=state, value="on", source="rule", actor="x", timestamp=WHEN
    )
    told = Notification.objects.create(
        effect_key=str(uuid4()), organization=organization, device=farm.device, event="alert", timestamp=WHEN
    )
    Delivery.objects.create(notification=told, protocol="mqtt")
    refused = {
        "protocol": "http",
        "reason": "circuit-open",
        "event_id": uuid4(),
        "originator_uuid": str(farm.sensor.uuid),
    }
    rejected = RejectedEvent.objects.create(organization=organization, **refused)
    replay = Replay.objects.create(kind=Replay.Kind.REJECTED, organization=organization, created_by="x")
    failed = {"event_id": uuid4(), "originator_uuid": farm.sensor.uuid, "lane": "normal", "event": {}, "attempts": 4}
    dead = DeadLetter.objects.create(organization=organization, failure_key=str(uuid4()), error="x", **failed)
    alarm = Alarm.objects.create(
        organization=organization, source_type="sensor", originator_uuid=farm.sensor.uuid, type="low", raised_at=WHEN,
        last_raised_at=WHEN,
    )  # fmt: skip
    ActionCooldown.objects.create(chain=farm.chain, node="switch", originator_uuid=farm.sensor.uuid, done_at=WHEN)
    dosing = builders.device(organization, states={})
    doser = DeviceState.objects.create(device=dosing, name="dose", kind=DeviceState.Kind.MOMENTARY, datatype="number")
    pulse = DeviceState.objects.create(device=dosing, name="pulse", kind=DeviceState.Kind.MOMENTARY)
    interlock = Interlock.objects.create(state=doser, maximum_runs_per_hour=4)
    requirement = Requirement.objects.create(interlock=interlock, variable=variable, minimum=5)
    veto = Veto.objects.create(state=doser, kind=Veto.Kind.RUNS, source="rule", actor="x", detail="no")
    newcomer = builders.user()
    token, _ = DeviceToken.objects.issue(farm.sensor)
    invitation, _ = Invitation.objects.issue(organization=organization, created_by="x")
    area = Area.objects.create(organization=organization, name="Greenhouse")
    entry = AuditEntry.objects.create(organization=organization, kind="request", actor="x", action="POST sensors")
    rows: dict[str, Any] = {
        "organization": organization, "sensor": farm.sensor, "variable": variable, "problem": problem, "device": farm.device,
        "state": state, "token": token, "change": change, "chain": farm.chain, "notification": told, "rejected": rejected,
        "replay": replay, "alarm": alarm, "interlock": interlock, "doser": doser, "pulse": pulse,
        "requirement": requirement, "veto": veto, "invitation": invitation, "entry": entry, "area": area,
    }  # fmt: skip
    return {name: str(row.uuid) for name, row in rows.items()} | {
        "dead": str(dead.uuid),
        "parent": None,
        "node": str(RuleNode.objects.get(chain=farm.chain, name="low").uuid),
        "action": str(RuleNode.objects.get(chain=farm.chain, name="switch").uuid),
        "person": farm.people["viewer"].username,
        "newcomer": newcomer.username,
    }


def filled(template: Any, names: dict[str, Any]) -> Any:
    """`template` with every {name} in its texts replaced."""
    if isinstance(template, dict):
        return {key: filled(value, names) for key, value in template.items()}
    if isinstance(template, list):
        return [filled(value, names) for value in template]
    return template.format(**names) if isinstance(template, str) else template


FILTER = {"sourceType": "sensor", "UUID": "{sensor}", "key": "ph", "operator": ">", "value": 8}
NODE = {"name": "f", "type": "filter", "config": FILTER}
CHAIN = {"organization": "{organization}", "name": "c", "nodes": [NODE]}
DOCUMENT = {"format": "aemos-rule-chain", "version": 1, "chain": {"name": "d", "nodes": [NODE]}}
COMMAND = {"deviceUuid": "{device}", "stateName": "power", "value": "on"}
REQUIREMENT = {"interlock": "{interlock}", "variable": "{variable}", "minimum": 5}

# Method, path, body, least role that may, status when it may.
MATRIX: list[tuple[str, str, Any, str, int]] = [
    ("GET", "organizations", None, "viewer", 200),
    ("POST", "organizations", {"name": "New"}, "superuser", 201),
    ("GET", "organizations/{organization}", None, "viewer", 200),
    ("PUT", "organizations/{organization}", {"name": "Renamed"}, "admin", 200),
    ("PATCH", "organizations/{organization}", {"name": "Renamed"}, "admin", 200),
    ("DELETE", "organizations/{organization}", None, "superuser", 204),
    ("GET", "memberships", None, "viewer", 200),
    ("POST", "memberships", {"organization": "{organization}", "user": "{newcomer}", "role": "viewer"}, "superuser", 201),
    ("GET", "memberships/{organization}/{person}", None, "viewer", 200),
    ("PUT", "memberships/{organization}/{person}", {"organization": "{organization}", "user": "{person}"}, "admin", 200),
    ("PATCH", "memberships/{organization}/{person}", {"role": "operator"}, "admin", 200),
    ("DELETE", "memberships/{organization}/{person}", None, "admin", 204),
    ("GET", "invitations", None, "admin", 200),
    ("POST", "invitations", {"organization": "{organization}", "role": "operator"}, "admin", 201),
    ("GET", "invitations/{invitation}", None, "admin", 200),
    ("DELETE", "invitations/{invitation}", None, "admin", 204),
    ("GET", "areas", None, "viewer", 200),
    ("POST", "areas", {"organization": "{organization}", "name": "Bench", "parent": "{area}"}, "admin", 201),
    ("GET", "areas/{area}", None, "viewer", 200),
    ("GET", "areas/{area}/history", None, "viewer", 200),
    ("PUT", "areas/{area}", {"organization": "{organization}", "name": "Renamed"}, "admin", 200),
    ("PATCH", "areas/{area}", {"name": "Renamed"}, "admin", 200),
    ("DELETE", "areas/{area}", None, "admin", 204),
    ("GET", "sensors", None, "viewer", 200),
    ("POST", "sensors", {"organization": "{organization}", "name": "New"}, "admin", 201),
    ("GET", "sensors/{sensor}", None, "viewer", 200),
    ("GET", "sensors/{sensor}/history", None, "viewer", 200),
    ("PUT", "sensors/{sensor}", {"organization": "{organization}", "name": "Renamed"}, "admin", 200),
    ("PATCH", "sensors/{sensor}", {"name": "Renamed"}, "admin", 200),
    ("DELETE", "sensors/{sensor}", None, "admin", 204),
    ("GET", "variables", None, "viewer", 200),
    ("POST", "variables", {"sensor": "{sensor}", "name": "ec"}, "admin", 201),
    ("GET", "variables/{variable}", None, "viewer", 200),
    ("PUT", "variables/{variable}", {"sensor": "{sensor}", "name": "ec"}, "admin", 200),
    ("PATCH", "variables/{variable}", {"unit": "pH"}, "admin", 200),
    ("DELETE", "variables/{variable}", None, "admin", 204),
    ("GET", "devices", None, "viewer", 200),
    ("POST", "devices", {"organization": "{organization}", "name": "New"}, "admin", 201),
    ("GET", "devices/{device}", None, "viewer", 200),
    ("PUT", "devices/{device}", {"organization": "{organization}", "name": "Renamed"}, "admin", 200),
    ("PATCH", "devices/{device}", {"name": "Renamed"}, "admin", 200),
    ("DELETE", "devices/{device}", None, "admin", 204),
    ("GET", "device-states", None, "viewer", 200),
    ("POST", "device-states", {"device": "{device}", "name": "speed", "datatype": "number"}, "operator", 201),
    ("GET", "device-states/{state}", None, "viewer", 200),
    ("PUT", "device-states/{state}", {"device": "{device}", "name": "mode"}, "operator", 200),
    ("PATCH", "device-states/{state}", {"name": "mode"}, "operator", 200),
    ("DELETE", "device-states/{state}", None, "operator", 204),
    ("POST", "device-states/{state}/lock", {"until": "2100-01-01T00:00:00Z"}, "operator", 200),
    ("POST", "device-states/{state}/unlock", None, "operator", 200),
    ("GET", "interlocks", None, "viewer", 200),
    ("POST", "interlocks", {"state": "{pulse}", "maximumRunsPerDay": 2}, "admin", 201),
    ("GET", "interlocks/{interlock}", None, "viewer", 200),
    ("PUT", "interlocks/{interlock}", {"state": "{doser}", "maximumRunsPerDay": 2}, "admin", 200),
    ("PATCH", "interlocks/{interlock}", {"minimumOffSeconds": 60}, "admin", 200),
    ("DELETE", "interlocks/{interlock}", None, "admin", 204),
    ("GET", "interlock-requirements", None, "viewer", 200),
    ("POST", "interlock-requirements", REQUIREMENT, "admin", 201),
    ("GET", "interlock-requirements/{requirement}", None, "viewer", 200),
    ("PUT", "interlock-requirements/{requirement}", REQUIREMENT, "admin", 200),
    ("PATCH", "interlock-requirements/{requirement}", {"maximum": 7}, "admin", 200),
    ("DELETE", "interlock-requirements/{requirement}", None, "admin", 204),
    ("GET", "audit-log", None, "admin", 200),
    ("GET", "audit-log/{entry}", None, "admin", 200),
    ("GET", "vetoes", None, "viewer", 200),
    ("GET", "vetoes/{veto}", None, "viewer", 200),
    ("GET", "device-tokens", None, "viewer", 200),
    ("POST", "device-tokens", {"device": "{device}"}, "admin", 201),
    ("GET", "device-tokens/{token}", None, "viewer", 200),
    ("PUT", "device-tokens/{token}", {"name": "n"}, "admin", 200),
    ("PATCH", "device-tokens/{token}", {"name": "n"}, "admin", 200),
    ("DELETE", "device-tokens/{token}", None, "admin", 204),
    ("POST", "device-tokens/{token}/revoke", None, "admin", 200),
    ("GET", "readings?variable={variable}", None, "viewer", 200),
    ("GET", "data-problems", None, "viewer", 200),
    ("DELETE", "data-problems/{problem}", None, "operator", 204),
    ("GET", "state-changes", None, "viewer", 200),
    ("GET", "state-changes/{change}", None, "viewer", 200),
    ("POST", "device-state-instances", COMMAND, "operator", 201),
    ("GET", "rule-chains", None, "viewer", 200),
    ("POST", "rule-chains", CHAIN, "operator", 201),
    ("GET", "rule-chains/{chain}", None, "viewer", 200),
    ("PUT", "rule-chains/{chain}", CHAIN, "operator", 200),
    ("PATCH", "rule-chains/{chain}", {"enabled": False}, "operator", 200),
    ("DELETE", "rule-chains/{chain}", None, "operator", 204),
    ("POST", "rule-chains/{chain}/enable", None, "operator", 200),
    ("POST", "rule-chains/{chain}/disable", None, "operator", 200),
    ("POST", "rule-chains/{chain}/duplicate", {}, "operator", 201),
    ("GET", "rule-chains/{chain}/validate", None, "viewer", 200),
    ("GET", "rule-chains/{chain}/export", None, "viewer", 200),
    ("POST", "rule-chains/import", {"organization": "{organization}", "document": DOCUMENT}, "operator", 201),
    ("POST", "rule-chains/{chain}/execute", {"values": {"ph": 5}}, "viewer", 200),
    ("POST", "rule-chains/execute", {"organization": "{organization}", "nodes": [NODE]}, "viewer", 200),
    ("POST", "rule-chains/{chain}/backtest", {}, "viewer", 200),
    ("POST", "rule-chains/backtest", {"organization": "{organization}", "nodes": [NODE]}, "viewer", 200),
    ("POST", "rule-chains/{chain}/trigger", None, "operator", 202),
    ("GET", "rule-chains/{chain}/nodes", None, "viewer", 200),
    ("POST", "rule-chains/{chain}/nodes", NODE, "operator", 201),
    ("GET", "rule-chains/{chain}/nodes/{node}", None, "viewer", 200),
    ("PUT", "rule-chains/{chain}/nodes/{node}", NODE | {"next": "switch"}, "operator", 200),
    ("PATCH", "rule-chains/{chain}/nodes/{node}", {"config": FILTER}, "operator", 200),
    ("DELETE", "rule-chains/{chain}/nodes/{action}", None, "operator", 204),
    ("GET", "alarms", None, "viewer", 200),
    ("GET", "alarms/{alarm}", None, "viewer", 200),
    ("POST", "alarms/{alarm}/acknowledge", None, "operator", 200),
    ("POST", "alarms/{alarm}/clear", None, "operator", 200),
    ("GET", "rejected-events", None, "viewer", 200),
    ("GET", "rejected-events/{rejected}", None, "viewer", 200),
    ("POST", "rejected-events/replay", {"organization": "{organization}"}, "operator", 202),
    ("POST", "rejected-events/{rejected}/discard", None, "operator", 200),
    ("GET", "dead-letters", None, "viewer", 200),
    ("GET", "dead-letters/{dead}", None, "viewer", 200),
    ("POST", "dead-letters/replay", {"organization": "{organization}"}, "operator", 202),
    ("POST", "dead-letters/{dead}/discard", None, "operator", 200),
    ("GET", "replays", None, "viewer", 200),
    ("GET", "replays/{replay}", None, "viewer", 200),
    ("POST", "replays/{replay}/stop", None, "operator", 200),
    ("GET", "notifications", None, "viewer", 200),
    ("GET", "notifications/{notification}", None, "viewer", 200),
    ("POST", "notifications", {"organization": "{organization}", "title": "Harvest at noon"}, "operator", 201),
    ("POST", "notifications/{notification}/resend", None, "operator", 200),
]  # fmt: skip
CASES = [pytest.param(*row, id=f"{row[0]} {row[1]}") for row in MATRIX]


def call(client: APIClient, farm: Farm, method: str, path: str, body: Any) -> Any:
    url = f"/api/v1/{filled(path, farm.names)}"
    return client.generic(method, url, *encoded(filled(body, farm.names)))


def encoded(body: Any) -> tuple[Any, ...]:
    return () if body is None else (json.dumps(body), "application/json")


@pytest.mark.parametrize(("method", "path", "body", "least", "status"), CASES)
def test_each_role_may_do_what_the_table_says(method: str, path: str, body: Any, least: str, status: int) -> None:
    farm = make_farm()
    found = {}
    for role in ROLES:
        with transaction.atomic():
            found[role] = call(farm.client(role), farm, method, path, body).status_code
            transaction.set_rollback(True)
    assert found == {role: status if ROLES.index(role) >= ROLES.index(least) else 403 for role in ROLES}


def test_nobody_gets_in_without_a_login() -> None:
    farm = make_farm()
    answers = {
        (method, path): call(farm.client("anonymous"), farm, method, path, body) for method, path, body, *_ in MATRIX
    }
    assert {answer.status_code for answer in answers.values()} == {401}, {k: a.status_code for k, a in answers.items()}
    assert all(answer.headers["WWW-Authenticate"].startswith("Bearer") for answer in answers.values())


@pytest.mark.parametrize(("method", "path", "body", "least", "status"), CASES)
def test_an_admin_of_another_organization_finds_nothing(
    method: str, path: str, body: Any, least: str, status: int
) -> None:
    farm = make_farm()
    response = call(farm.client("stranger"), farm, method, path, body)
    if "{" in path.partition("?")[0]:
        assert response.status_code == 404
    elif method == "POST":
        assert response.status_code == (403 if path in ("organizations", "memberships") else 400)
    else:
        assert response.status_code == 200
        found = response.json()["results"]
        own = {"organizations": 1, "memberships": 1}.get(path, 0)
        assert len(found) == own
        assert str(farm.organization.uuid) not in response.text


@pytest.mark.parametrize(
    ("method", "path", "body", "least", "status"), [case for case in CASES if case.values[0] != "GET"]
)
def test_a_viewer_of_another_organization_learns_no_more_from_writing(
    method: str, path: str, body: Any, least: str, status: int
) -> None:
    farm = make_farm()
    client = APIClient()
    client.force_authenticate(builders.member(builders.organization(), "viewer"))
    response = call(client, farm, method, path, body)
    least_to_view = 403 if path.startswith("invitations") else 404  # admins alone see them: it says so before it looks
    assert response.status_code == (least_to_view if "{" in path else 400 if "/" in path else 403)


def test_the_table_of_this_test_names_every_endpoint() -> None:
    assert set(endpoints()) == {(method, shape(path)) for method, path, *_ in MATRIX}


def shape(path: str) -> str:
    return "/".join("*" if part.startswith("{") else part for part in path.split("?", maxsplit=1)[0].split("/"))


def endpoints(patterns: Any = None, prefix: str = "") -> list[tuple[str, str]]:
    """(method, path) of every scoped view, with * for what varies."""
    found = []
    for pattern in get_resolver().url_patterns if patterns is None else patterns:
        route = prefix + str(pattern.pattern)
        if isinstance(pattern, URLResolver):
            found += endpoints(pattern.url_patterns, route)
            continue
        view: Any = pattern.callback
        if issubclass(getattr(view, "cls", object), ScopedViewSet):
            path = "/".join("*" if part.startswith("<") else part for part in route.removeprefix("api/v1/").split("/"))
            found += [(method.upper(), path) for method in view.actions if method != "head"]
    return found


def test_a_superuser_sees_what_belongs_to_no_organization() -> None:
    farm = make_farm()
    RejectedEvent.objects.create(protocol="coap", reason="unauthorized")
    assert farm.client("admin").get("/api/v1/rejected-events").json()["count"] == 1
    assert farm.client("superuser").get("/api/v1/rejected-events").json()["count"] == 2


def test_rights_are_those_of_the_row_s_own_organization() -> None:
    farm, other = make_farm(), builders.organization()
    client, viewed = farm.client("admin"), builders.sensor(other)
    other.memberships.create(user=farm.people["admin"], role="viewer")
    assert client.get(f"/api/v1/sensors/{viewed.uuid}").status_code == 200
    refused = client.patch(f"/api/v1/sensors/{viewed.uuid}", {"name": "Mine"})
    assert refused.status_code == 403
    assert {"admin", "viewer"} <= set(re.findall(r"\w+", refused.json()["detail"]))
    assert client.post("/api/v1/sensors", {"organization": str(other.uuid), "name": "Mine"}).status_code == 403
    assert client.post("/api/v1/device-tokens", {"sensor": str(viewed.uuid)}).status_code == 403


def test_a_person_who_is_deactivated_has_no_access() -> None:
    farm = make_farm()
    farm.people["superuser"].is_active = False
    assert farm.client("superuser").get("/api/v1/sensors").json()["count"] == 0


def test_no_answer_holds_an_integer_id() -> None:
    farm = make_farm()
    for method, path, *_ in MATRIX:
        if method == "GET":
            response = call(farm.client("superuser"), farm, method, path, None)
            if response["Content-Type"].startswith("text/csv"):
                assert not {"id", "pk"} & set(response.getvalue().decode().splitlines()[0].split(","))
                continue
            for row in response.json().get("results", [response.json()]):
                assert not {"id", "pk"} & row.keys()


@pytest.mark.parametrize("path", ["sensors/1", "sensors/no-uuid", "rule-chains/7/nodes", "nothing", "sensors/"])
def test_what_is_no_address_is_a_404_in_json(path: str) -> None:
    response = make_farm().client("superuser").get(f"/api/v1/{path}")
    assert problem(response, 404)["code"] == "not-found"


def test_a_method_that_does_not_exist_is_a_405() -> None:
    farm = make_farm()
    assert farm.client("viewer").post("/api/v1/readings").status_code == 405
    assert farm.client("viewer").delete(f"/api/v1/notifications/{farm.names['notification']}").status_code == 405


@pytest.mark.parametrize("role", ["viewer", "admin", "superuser"])
@pytest.mark.parametrize(
    "path",
    sorted({path for method, path, *_ in MATRIX if method in ("GET", "PUT", "POST")}),
)
def test_options_are_an_answer_for_everybody_who_is_logged_in(path: str, role: str) -> None:
    farm = make_farm()
    answer = farm.client(role).options(f"/api/v1/{filled(path, farm.names)}")

    assert answer.status_code == 200, answer.content


@pytest.mark.parametrize("path", sorted({path for method, path, *_ in MATRIX if method == "GET"}))
def test_a_query_parameter_that_does_not_exist_is_refused_by_name(path: str) -> None:
    farm = make_farm()
    answer = farm.client("superuser").get(f"/api/v1/{filled(path, farm.names)}{'&' if '?' in path else '?'}nmae=x")

    assert list(wrong(answer)) == ["nmae"]


@pytest.mark.parametrize("size", ["abc", "0", "-1", "1.5"])
def test_a_page_size_that_is_no_number_is_refused(size: str) -> None:
    answer = make_farm().client("viewer").get("/api/v1/sensors", {"pageSize": size})

    assert list(wrong(answer)) == ["pageSize"]
