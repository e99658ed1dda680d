"""The audit log: who did what is in it, no secret is, and whoever changes it afterwards is found out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import transaction
from django.test import Client
from django.utils import timezone
from rest_framework.test import APIClient

from devices.audit import chain, notes
from devices.models import AuditEntry, AuditHead, DeviceState, Organization, StateChange
from rules.effects import states
from tests import builders

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]
API = "/api/v1"
PASSWORD = "tomatoes-are-red"


@pytest.fixture
def farm() -> Organization:
    return builders.organization("Basil Farm")


@pytest.fixture
def ada(farm: Organization) -> Any:
    """A client that logs in as an admin would."""
    builders.member(farm, "admin", username="ada", password=PASSWORD)
    client = APIClient()
    answer = client.post(f"{API}/auth/login", {"username": "ada", "password": PASSWORD})
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {answer.json()['access']}")
    return client


def newest() -> AuditEntry:
    entry = AuditEntry.objects.first()
    assert entry is not None
    return entry


# What is in it


def test_a_change_over_rest_has_an_entry_with_what_was_sent(ada: Any, farm: Organization) -> None:
    body = {"organization": str(farm.uuid), "name": "Tank 1"}
    assert ada.post(f"{API}/sensors", body, headers={"X-Request-ID": "r-1"}).status_code == 201
    entry = newest()
    assert (entry.kind, entry.actor, entry.action, entry.target) == (
        "request",
        "ada",
        "POST api/v1/sensors",
        f"{API}/sensors",
    )
    assert (entry.organization, entry.organization_uuid, entry.status) == (farm, farm.uuid, 201)
    assert (entry.detail, entry.address) == (body, "127.0.0.1")


def test_a_body_that_a_request_needs_not_is_no_error(ada: Any, farm: Organization) -> None:
    device = builders.device(farm, states={"power": ["on", "off"]})
    path = f"{API}/device-states/{device.states.get().uuid}/unlock"
    for body in ({"note": "done"}, None):
        answer = ada.post(path, body, format="multipart")
        assert answer.status_code == 200, answer.content
    alike = ada.post(path, b"\xff\x00", content_type="application/octet-stream")
    assert alike.status_code == 200
    assert newest().target == path


def test_what_was_refused_or_only_read_has_none(ada: Any, farm: Organization) -> None:
    before = AuditEntry.objects.count()
    assert ada.post(f"{API}/sensors", {"name": "Tank 1"}).status_code == 400
    assert ada.delete(f"{API}/organizations/{farm.uuid}").status_code == 403
    assert ada.get(f"{API}/sensors").status_code == 200
    assert ada.options(f"{API}/sensors").status_code == 200
    assert AuditEntry.objects.count() == before


def test_logins_and_attempts_are_there_without_passwords(ada: Any) -> None:
    assert (newest().kind, newest().actor, newest().status) == ("login", "ada", 200)
    APIClient().post(f"{API}/auth/login", {"username": "ada", "password": "wrong-guess"})
    assert (newest().kind, newest().actor, newest().status) == ("login", "ada", 401)
    page = Client()
    page.post("/admin/login/", {"username": "ada", "password": PASSWORD})
    assert (newest().kind, newest().actor, newest().status) == ("login", "ada", 302)
    texts = json.dumps(list(AuditEntry.objects.values_list("detail", flat=True)))
    assert PASSWORD not in texts
    assert "wrong-guess" not in texts
    assert '"password": "***"' in texts


def test_a_nul_keeps_nobody_out_of_it() -> None:
    """PostgreSQL stores none: the entry has a sign for it."""
    client = Client()
    client.force_login(builders.user("root", is_superuser=True, is_staff=True))
    sent = {"action": "reset", "no\x00te": "a\x00b", "more": ["x\x00", "y"]}
    assert client.post("/operations/circuit", sent).status_code == 302
    assert newest().detail == {"action": "reset", "no\u2400te": "a\u2400b", "more": ["x\u2400", "y"]}
    stranger = APIClient()
    stranger.post(f"{API}/auth/login", {"username": "a\x00da", "password": "x"}, format="json")
    assert newest().actor in ("a\u2400da", "nobody")
    assert newest().kind == "login"


def test_guesses_behind_a_closed_door_do_not_fill_it() -> None:
    statuses = {
        APIClient().post(f"{API}/auth/login", {"username": "ada", "password": "x"}).status_code for _ in range(15)
    }
    assert statuses == {401, 429}
    assert 0 < AuditEntry.objects.count() < 15


def test_a_change_in_the_admin_has_an_entry(farm: Organization) -> None:
    client = Client()
    client.force_login(builders.user("root", is_superuser=True, is_staff=True))
    assert client.post("/admin/devices/organization/add/", {"name": ""}).status_code == 200
    assert not AuditEntry.objects.exists()
    assert client.post("/admin/devices/organization/add/", {"name": "New farm"}).status_code == 302
    assert (newest().actor, newest().action, newest().detail) == (
        "root", "POST admin/devices/organization/add/", {"name": "New farm"},
    )  # fmt: skip


def test_a_script_is_named_by_its_token(ada: Any, farm: Organization) -> None:
    made = ada.post(f"{API}/api-tokens", {"name": "Grafana", "role": "admin"}).json()
    assert made["token"] not in json.dumps(newest().detail)
    script = APIClient()
    script.credentials(HTTP_AUTHORIZATION=f"Bearer {made['token']}")
    assert script.post(f"{API}/sensors", {"organization": str(farm.uuid), "name": "T"}).status_code == 201
    assert newest().actor == "ada (token Grafana)"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ({"secretKey": "x", "nodes": [{"config": {"Authorization-Token": "x"}}]},
         {"secretKey": "***", "nodes": [{"config": {"Authorization-Token": "***"}}]}),
        ({"csrfmiddlewaretoken": "x", "name": "y"}, {"name": "y"}),
        ({"key": "ph", "apiKey": "x", "access_key": "x", "access": "x", "accessible": "y"},
         {"key": "ph", "apiKey": "***", "access_key": "***", "access": "***", "accessible": "y"}),
        ([1, {"password": "x"}], {"body": [1, {"password": "***"}]}),
        (None, {"body": None}),
    ],
)  # fmt: skip
def test_secrets_are_left_out_wherever_they_are(sent: Any, kept: Any) -> None:
    assert notes._without_secrets(sent) == kept


def test_what_is_long_is_cut() -> None:
    kept = notes._without_secrets({"nodes": ["x" * 5_000]})
    assert len(kept["beginning"]) == notes.MAXIMUM_DETAIL


def test_commands_on_the_server_are_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "jo")
    notes.note_command(["circuit", "open", "--note", "tank", "--password=x"])
    notes.note_command(["ledger"])
    notes.note_command([])
    (entry,) = AuditEntry.objects.all()
    assert (entry.kind, entry.actor, entry.action) == ("management", "jo", "circuit")
    assert entry.detail == {"arguments": ["open", "--note", "tank", "***"]}


def change(state: DeviceState, source: str, value: str, **fields: Any) -> StateChange:
    return StateChange.objects.create(
        effect_key=f"{source}{value}{fields}", state=state, source=source, value=value, actor=f"a {source}",
        timestamp=timezone.now(), **fields,
    )  # fmt: skip


def test_each_command_to_a_device_is_in_it_once_and_reports_are_not(farm: Organization) -> None:
    pump = builders.device(farm)
    state = DeviceState.objects.get(device=pump)
    for source in ("rule", "person", "interlock", "device"):
        change(state, source, "on")
    chain.seal()
    chain.seal()
    entries = AuditEntry.objects.order_by("position")
    assert [entry.actor for entry in entries] == ["a rule", "a person", "a interlock"]
    first = entries[0]
    assert (first.kind, first.action, first.organization_uuid) == ("command", "set power", farm.uuid)
    assert str(pump.uuid) in first.target
    assert first.detail == {"source": "rule", "value": "on", "previous": None}


def test_a_command_whose_transaction_ended_late_is_in_it_too(farm: Organization) -> None:
    state = DeviceState.objects.get(device=builders.device(farm))
    late = change(state, "rule", "on", pk=10_000)
    change(state, "rule", "off", pk=10_001)
    values = StateChange.objects.filter(pk=late.pk).values().get()
    late.delete()
    chain.seal()
    assert AuditEntry.objects.count() == 1
    StateChange.objects.create(**values)
    chain.seal()
    assert AuditEntry.objects.count() == 2
    AuditHead.objects.update(seen_at=timezone.now() - timedelta(hours=1))
    for _ in range(3):
        chain.seal()
        AuditHead.objects.update(seen_at=timezone.now() - timedelta(hours=1))
    assert AuditHead.objects.get().state_changes == 10_001
    assert AuditEntry.objects.count() == 2


# The chain


@pytest.fixture
def five() -> list[AuditEntry]:
    for number in range(5):
        AuditEntry.objects.create(
            kind="request", actor="ada", action=f"POST {number}", detail={"limit": 1.50, "größe": [number, None]}
        )
    assert chain.seal() == 5
    return list(AuditEntry.objects.order_by("position"))


def test_a_chain_that_nobody_touched_is_whole(five: list[AuditEntry]) -> None:
    assert [entry.position for entry in five] == [1, 2, 3, 4, 5]
    assert chain.verify() == []
    assert chain.seal() == 0


Forgery = Callable[[list[AuditEntry]], object]


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (lambda five: AuditEntry.objects.filter(pk=five[2].pk).update(actor="nobody"), r"entry 3 .*nobody: POST 2\) was"),
        (lambda five: AuditEntry.objects.filter(pk=five[0].pk).update(detail={}), "entry 1 .*was changed"),
        (lambda five: AuditEntry.objects.filter(pk=five[1].pk).update(at=timezone.now()), "entry 2 .*was changed"),
        (lambda five: five[2].delete(), "entries are missing between 2 and 4"),
        (lambda five: five[0].delete(), "entries are missing between 0 and 2"),
        (lambda five: five[4].delete(), "the end is missing: the last entry is 4, and 5 were sealed"),
        (lambda five: AuditEntry.objects.all().delete(), "the end is missing: the last entry is 0, and 5 were sealed"),
        (lambda five: AuditEntry.objects.filter(pk=five[4].pk).update(hash="0" * 64), "entry 5 .*was changed"),
    ],
)  # fmt: skip
def test_what_was_changed_afterwards_is_named(five: list[AuditEntry], forge: Forgery, said: str) -> None:
    forge(five)
    found = chain.verify()
    assert re.search(said, found[0]), found
    with pytest.raises(CommandError, match="was changed"):
        call_command("audit", "verify")


def test_who_makes_the_whole_chain_anew_needs_the_hash_that_was_written_down(five: list[AuditEntry]) -> None:
    written_down = five[3].hash
    AuditEntry.objects.filter(pk=five[1].pk).update(actor="nobody")
    AuditEntry.objects.update(position=None, hash="")
    AuditHead.objects.update(position=0, hash="")
    chain.seal()
    assert chain.verify() == []
    with pytest.raises(CommandError, match=f"no entry has the hash {written_down}"):
        call_command("audit", "verify", "--head", written_down)


def test_old_entries_go_and_the_rest_can_still_be_verified(five: list[AuditEntry], settings: Any) -> None:
    settings.AUDIT_RETENTION_DAYS = 30
    AuditEntry.objects.filter(position__lte=2).update(at=timezone.now() - timedelta(days=31))
    AuditEntry.objects.update(position=None, hash="")
    AuditHead.objects.update(position=0, hash="")
    chain.seal()
    assert chain.delete_old() == 2
    assert AuditEntry.objects.count() == 3
    assert chain.verify() == []
    AuditEntry.objects.filter(position=3).delete()
    assert chain.verify()[0] == "entries are missing between 2 and 4"
    settings.AUDIT_RETENTION_DAYS = 0
    assert chain.delete_old() == 0


# The command, and who may look


def test_the_command_exports_what_it_can_verify(
    five: list[AuditEntry], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call_command("audit", "export")
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["action"] for line in lines] == [f"POST {number}" for number in range(5)]
    file = tmp_path / "audit.ndjson"
    for whole in (lines, lines[2:]):
        file.write_text("\n".join(whole))
        call_command("audit", "verify", "--file", str(file), "--head", five[4].hash)
        assert "whole" in capsys.readouterr().out
    renamed = [line.replace("ada", "bob") for line in lines]
    for forged in ([*lines[:2], *lines[3:]], [lines[0], renamed[1], *lines[2:]], renamed[:1]):
        file.write_text("\n".join(forged))
        with pytest.raises(CommandError, match=r"missing|changed"):
            call_command("audit", "verify", "--file", str(file))
    for wrong in ("", "{}", "no json", '{"hash": 1}'):
        file.write_text(wrong)
        with pytest.raises(CommandError, match=r"is empty|is no export"):
            call_command("audit", "verify", "--file", str(file))
    call_command("audit", "status")
    said = capsys.readouterr().out
    assert "sealed    5 entries" in said
    assert five[4].hash in said


def test_admins_see_their_organizations_entries_alone(ada: Any, farm: Organization) -> None:
    other = builders.organization()
    AuditEntry.objects.create(kind="request", actor="x", action="POST sensors", organization=other)
    AuditEntry.objects.create(kind="management", actor="root", action="circuit")
    AuditEntry.objects.create(
        kind="request", actor="bo", action="POST sensors", organization=farm, organization_uuid=farm.uuid
    )
    found = ada.get(f"{API}/audit-log").json()["results"]
    assert [(row["actor"], row["organization"]) for row in found] == [("bo", str(farm.uuid))]
    assert "bo" in ada.get(f"{API}/audit-log", {"format": "csv"}).getvalue().decode()
    for method in ("post", "put", "patch", "delete"):
        assert getattr(ada, method)(f"{API}/audit-log/{newest().uuid}").status_code in (403, 404, 405)


def test_a_deleted_organization_leaves_its_entries(farm: Organization) -> None:
    AuditEntry.objects.create(
        kind="request", actor="x", action="POST sensors", organization=farm, organization_uuid=farm.uuid
    )
    chain.seal()
    farm.delete()
    assert chain.verify() == []
    assert newest().organization_uuid == farm.uuid


def test_a_person_who_switches_a_device_is_named_in_the_command(farm: Organization) -> None:
    state = DeviceState.objects.get(device=builders.device(farm))
    request = states.StateChangeRequest(
        effect_key="k", state_id=state.pk, value="on", source="person", actor="ada", timestamp_us=1
    )
    with transaction.atomic():
        states.apply([request])
    chain.seal()
    assert (newest().kind, newest().actor, newest().detail["value"]) == ("command", "ada", "on")
