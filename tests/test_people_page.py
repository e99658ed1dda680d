"""The page of a farm's people: roles in words, an invitation in one form, and rights that it keeps."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from devices.models import Area, AuditEntry, Invitation, Membership, Organization
from tests import builders
from tests.problems import problem

pytestmark = pytest.mark.django_db


@pytest.fixture
def farm() -> Organization:
    return builders.organization("Basil Farm")


@pytest.fixture
def ada(farm: Organization) -> Any:
    return builders.member(farm, "admin", username="ada")


@pytest.fixture
def client(ada: Any) -> Client:
    return builders.client_of(ada)


def address(farm: Organization, person: Any, verb: str) -> str:
    return f"/people/{farm.uuid}/{person.pk}/{verb}"


def test_a_colleague_is_invited_in_one_form_and_joins_by_the_link(client: Client, farm: Organization) -> None:
    house = Area.objects.create(organization=farm, name="House 1")
    sent = {"role": "operator", "area": str(house.uuid), "note": "Bo"}
    shown = client.post(f"/people?organization={farm.uuid}", sent, follow=True).text
    (link,) = re.findall(r'<code id="invitation">http://testserver([^<]+)</code>', shown)
    assert "Bo" in shown
    again = client.get("/people").text
    assert ("invitation" in again and link not in again, "Bo" in again) == (True, True)
    assert AuditEntry.objects.first().action == "POST people"  # type: ignore[union-attr]
    stranger = Client()
    page = stranger.get(link).text
    assert "operator: also switches devices" in page
    assert "only in House 1" in page
    assert stranger.post(link, {"username": "bo", "password": "tomatoes-are-red"}).headers["Location"] == "/"
    membership = Membership.objects.get(user__username="bo")
    assert (membership.role, membership.area) == ("operator", house)
    people = client.get("/people").text
    assert "bo" in people
    assert "Open invitations" not in people


def test_roles_are_changed_and_people_taken_out(client: Client, farm: Organization) -> None:
    bo = builders.member(farm, "viewer", username="bo")
    said = client.post(address(farm, bo, "change"), {"role": "operator"}, follow=True).text
    assert "bo is changed." in said
    assert Membership.objects.get(user=bo).role == "operator"
    client.post(address(farm, bo, "change"), {"role": "king"})
    assert Membership.objects.get(user=bo).role == "operator"
    house = Area.objects.create(organization=farm, name="House 1")
    refused = client.post(address(farm, bo, "change"), {"role": "admin", "area": str(house.uuid)}, follow=True).text
    assert "bo stays as before: limits operators only" in refused
    foreign = Area.objects.create(organization=builders.organization(), name="x")
    client.post(address(farm, bo, "change"), {"role": "operator", "area": str(foreign.uuid)})
    assert Membership.objects.get(user=bo).area is None
    client.post(address(farm, bo, "remove"))
    assert not Membership.objects.filter(user=bo).exists()


def test_a_farm_keeps_an_admin(client: Client, farm: Organization, ada: Any) -> None:
    assert "only admin" in client.post(address(farm, ada, "change"), {"role": "viewer"}, follow=True).text
    assert "a farm needs an admin" in client.post(address(farm, ada, "remove"), follow=True).text
    url = f"/api/v1/memberships/{farm.uuid}/ada"
    assert "only admin" in str(problem(client.delete(url), 409))
    assert "only admin" in str(problem(client.patch(url, {"role": "viewer"}, content_type="application/json"), 400))
    row = Membership.objects.get(user=ada)
    deletion = reverse("admin:devices_membership_delete", args=[row.pk])
    assert client.post(deletion, {"post": "yes"}).status_code == 403
    chosen = {"action": "delete_selected", "_selected_action": row.pk, "post": "yes"}
    client.post(reverse("admin:devices_membership_changelist"), chosen)
    assert Membership.objects.get(user=ada).role == "admin"
    builders.member(farm, "admin")
    assert client.post(address(farm, ada, "remove")).headers["Location"] == "/"
    assert not Membership.objects.filter(user=ada).exists()


def test_who_is_no_admin_sees_names_and_changes_nothing(farm: Organization, ada: Any) -> None:
    for role in ("viewer", "operator"):
        person = builders.member(farm, role)
        client = builders.client_of(person)
        page = client.get("/people").text
        assert ("ada" in page, "Invite a colleague" in page, "Take out" in page) == (True, False, False)
        assert client.post(f"/people?organization={farm.uuid}", {"role": "admin"}).status_code == 403
        assert client.post(address(farm, ada, "remove")).status_code == 403
        assert client.post(address(farm, person, "change"), {"role": "admin"}).status_code == 403
    assert not Invitation.objects.exists()
    assert Membership.objects.filter(role="admin").count() == 1


def test_people_of_other_farms_do_not_exist(client: Client, farm: Organization) -> None:
    other = builders.organization()
    person = builders.member(other, "admin")
    assert client.get(f"/people?organization={other.uuid}").status_code == 404
    for owner in (other, farm):
        assert client.post(address(owner, person, "remove")).status_code == 404
    row, _ = Invitation.objects.issue(organization=other, created_by="x")
    assert client.post(f"/people/invitations/{row.uuid}/withdraw").status_code == 404
    assert Membership.objects.filter(user=person).exists()


@pytest.mark.usefixtures("empty_redis")
def test_an_invitation_is_withdrawn(client: Client, farm: Organization) -> None:
    row, token = Invitation.objects.issue(organization=farm, note="Bo", created_by="ada")
    assert "withdrawn" in client.post(f"/people/invitations/{row.uuid}/withdraw", follow=True).text
    assert Client().get(f"/join/{token}").status_code == 410
