"""How people come in: invitations instead of enrolment, and tokens of their own for scripts."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.utils import timezone
from rest_framework.test import APIClient

from devices.models import ApiToken, Invitation, Membership, Organization
from devices.people.models import digest_of
from tests import builders
from tests.problems import problem, wrong

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]
API = "/api/v1"
PASSWORD = "tomatoes-are-red"


@pytest.fixture
def farm() -> Organization:
    return builders.organization("Basil Farm")


@pytest.fixture
def admin(farm: Organization) -> Any:
    return client_of(builders.member(farm, "admin", username="ada"))


def client_of(user: User) -> APIClient:
    client = APIClient()
    client.force_authenticate(user)
    return client


def invited(admin: Any, farm: Organization, **fields: Any) -> Any:
    answer = admin.post(f"{API}/invitations", {"organization": str(farm.uuid), **fields})
    assert answer.status_code == 201, answer.content
    return answer.json()


def accept(token: str, *, client: Any = None, **account: str) -> Any:
    return (client or APIClient()).post(f"{API}/invitations/accept", {"token": token, **account})


def test_a_new_colleague_joins_with_a_link_and_no_superuser_helps(admin: Any, farm: Organization) -> None:
    made = invited(admin, farm, role="operator", note="Bo")
    assert made["url"].endswith(f"/join/{made['token']}")
    assert made["token"] not in str(Invitation.objects.values())
    answer = accept(made["token"], username="bo", password=PASSWORD)
    assert (answer.status_code, answer.json()["role"], answer.json()["organizationName"]) == (
        201,
        "operator",
        "Basil Farm",
    )
    login = APIClient().post(f"{API}/auth/login", {"username": "bo", "password": PASSWORD})
    assert login.status_code == 200
    shown = admin.get(f"{API}/invitations/{made['uuid']}").json()
    assert (shown["acceptedBy"], shown["createdBy"], "token" in shown) == ("bo", "ada", False)
    assert problem(accept(made["token"], username="eve", password=PASSWORD), 409)["code"] == "cannot-join"
    assert not User.objects.filter(username="eve").exists()


def test_somebody_with_an_account_joins_with_it(admin: Any, farm: Organization) -> None:
    person = builders.member(builders.organization(), "viewer")
    made = invited(admin, farm, role="admin")
    assert accept(made["token"], client=client_of(person)).status_code == 201
    assert set(Membership.objects.filter(user=person).values_list("role", flat=True)) == {"viewer", "admin"}
    again = invited(admin, farm)
    assert problem(accept(again["token"], client=client_of(person)), 409)["detail"].startswith("You belong")
    assert Invitation.objects.get(uuid=again["uuid"]).accepted_at is None


@pytest.mark.parametrize("end", ["expired", "withdrawn", "unknown"])
def test_an_invitation_that_is_over_lets_nobody_in(admin: Any, farm: Organization, end: str) -> None:
    made = invited(admin, farm)
    if end == "expired":
        Invitation.objects.update(expires_at=timezone.now() - timedelta(seconds=1))
    elif end == "withdrawn":
        assert admin.delete(f"{API}/invitations/{made['uuid']}").status_code == 204
    token = "x" * 43 if end == "unknown" else made["token"]
    assert problem(accept(token, username="bo", password=PASSWORD), 409)["code"] == "cannot-join"
    assert not User.objects.filter(username="bo").exists()


@pytest.mark.parametrize(
    ("account", "field"),
    [
        ({}, "username"),
        ({"username": "bo"}, "password"),
        ({"username": "bo", "password": "short"}, "password"),
        ({"username": "b o", "password": PASSWORD}, "username"),
        ({"username": "ada", "password": PASSWORD}, "username"),
    ],
)
def test_an_account_that_cannot_be_made_uses_no_invitation_up(
    admin: Any, farm: Organization, account: dict[str, str], field: str
) -> None:
    made = invited(admin, farm)
    assert field in wrong(accept(made["token"], **account))
    assert accept(made["token"], username="bo", password=PASSWORD).status_code == 201


def test_guessing_tokens_of_invitations_closes_the_door(admin: Any, farm: Organization) -> None:
    made = invited(admin, farm)
    assert [accept(f"guess{number}" + "x" * 30).status_code for number in range(10)] == [409] * 10
    assert accept(made["token"], username="bo", password=PASSWORD).status_code == 429


def test_an_admin_cannot_enrol_anybody_nor_learn_who_exists(admin: Any, farm: Organization) -> None:
    stranger = builders.user()
    for name in (stranger.username, "nobody"):
        body = {"organization": str(farm.uuid), "user": name, "role": "viewer"}
        assert problem(admin.post(f"{API}/memberships", body), 403)["code"] == "permission-denied"


def test_the_page_of_an_invitation(admin: Any, farm: Organization) -> None:
    path = "/" + invited(admin, farm, role="operator")["url"].split("/", 3)[3]
    client = Client()
    assert "Basil Farm" in client.get(path).text
    assert "too common" in client.post(path, {"username": "bo", "password": "password123"}).text
    answer = client.post(path, {"username": "bo", "password": PASSWORD})
    assert (answer.status_code, answer.headers["Location"]) == (302, "/")
    assert "Rule chains" in client.get("/admin/").text
    assert client.get(path).status_code == 410


def test_the_page_joins_who_is_logged_in_only_after_a_click(admin: Any, farm: Organization) -> None:
    path = "/" + invited(admin, farm)["url"].split("/", 3)[3]
    person = builders.user()
    client = Client()
    client.force_login(person)
    assert f"Join as {person.username}" in client.get(path).text
    assert not Membership.objects.filter(user=person).exists()
    assert client.post(path).status_code == 302
    assert Membership.objects.filter(user=person).exists()


def test_the_admin_s_page_shows_the_link_once(farm: Organization) -> None:
    client = Client()
    client.force_login(builders.member(farm, "admin"))
    body = {
        "organization": farm.pk,
        "role": "operator",
        "note": "Bo",
        "expires_at_0": "2099-01-01",
        "expires_at_1": "00:00",
    }
    page = client.post("/admin/devices/invitation/add/", body, follow=True).text
    token = page.split("/join/")[1].split("<")[0]
    row = Invitation.objects.get()
    assert (row.digest, row.role, row.note) == (digest_of(token), "operator", "Bo")
    assert token not in client.get(f"/admin/devices/invitation/{row.pk}/change/").text


# API tokens


def issued(person: User, **fields: Any) -> tuple[Any, APIClient]:
    answer = client_of(person).post(f"{API}/api-tokens", {"name": "Grafana", **fields})
    assert answer.status_code == 201, answer.content
    return answer.json(), APIClient(HTTP_AUTHORIZATION=f"Bearer {answer.json()['token']}")


@pytest.mark.parametrize(
    ("owner", "role", "reads", "writes"),
    [
        ("admin", "viewer", 200, 403),
        ("admin", "operator", 200, 201),
        ("viewer", "admin", 200, 403),
        ("superuser", "operator", 200, 201),
    ],
)
def test_a_token_allows_what_its_role_and_its_owner_do(
    farm: Organization, owner: str, role: str, reads: int, writes: int
) -> None:
    person = builders.user(is_superuser=True) if owner == "superuser" else builders.member(farm, owner)
    made, client = issued(person, role=role)
    device = builders.device(farm)
    assert client.get(f"{API}/devices").status_code == reads
    body = {"device": str(device.uuid), "name": "speed", "datatype": "number"}
    assert client.post(f"{API}/device-states", body).status_code == writes
    assert client.post(f"{API}/organizations", {"name": "New"}).status_code == 403
    assert made["token"] not in str(ApiToken.objects.values())
    assert ApiToken.objects.get().last_used_at is not None


@pytest.mark.parametrize("end", ["revoked", "expired", "inactive", "left", "unknown"])
def test_a_token_ends(farm: Organization, end: str) -> None:
    person = builders.member(farm)
    made, client = issued(person)
    assert client.get(f"{API}/sensors").status_code == 200
    if end == "revoked":
        assert client_of(person).delete(f"{API}/api-tokens/{made['uuid']}").status_code == 204
    elif end == "expired":
        ApiToken.objects.update(expires_at=timezone.now())
    elif end == "inactive":
        User.objects.filter(pk=person.pk).update(is_active=False)
    elif end == "left":
        Membership.objects.all().delete()
        assert client.get(f"{API}/sensors").json()["count"] == 0
        return
    else:
        client = APIClient(HTTP_AUTHORIZATION=f"Bearer {made['token'][:-1]}x")
    assert problem(client.get(f"{API}/sensors"), 401)["code"] == "token-not-valid"


def test_tokens_are_one_s_own_and_make_no_tokens(farm: Organization) -> None:
    made, client = issued(builders.member(farm, "admin"))
    other = client_of(builders.member(farm, "admin"))
    assert other.get(f"{API}/api-tokens").json()["count"] == 0
    assert other.delete(f"{API}/api-tokens/{made['uuid']}").status_code == 404
    assert client.get(f"{API}/api-tokens").status_code == 403
    assert client.post(f"{API}/api-tokens", {"name": "another"}).status_code == 403
    assert wrong(other.post(f"{API}/api-tokens", {"name": "x", "expiresAt": "2020-01-01T00:00:00Z"})).keys() == {
        "expiresAt"
    }
