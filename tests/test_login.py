"""Logging in: tokens that rotate and end, and doors that close to whoever guesses."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client, RequestFactory, override_settings
from rest_framework.test import APIClient

from aemos.lib import redis
from devices.exceptions import Unauthorized
from devices.models import Organization
from devices.people import failures
from gateway import people
from tests import builders
from tests.problems import problem, wrong

pytestmark = pytest.mark.django_db
API = "/api/v1"


@pytest.fixture
def farm() -> Organization:
    return builders.organization("Basil Farm")


@pytest.fixture
def person(farm: Organization, empty_redis: None) -> User:
    return builders.member(farm, username="ada", password="correct-horse")


def login(password: str = "correct-horse", username: str = "ada", **headers: Any) -> Any:
    return APIClient().post(f"{API}/auth/login", {"username": username, "password": password}, **headers)


def test_a_login_gives_an_access_token_that_opens_the_api(person: User, farm: Organization) -> None:
    pair = login().json()
    assert pair.keys() == {"access", "refresh"}
    client = APIClient(HTTP_AUTHORIZATION=f"Bearer {pair['access']}")
    assert [row["name"] for row in client.get(f"{API}/organizations").json()["results"]] == [farm.name]


def test_a_refresh_token_gives_a_new_access_token(person: User) -> None:
    answer = APIClient().post(f"{API}/auth/refresh", {"refresh": login().json()["refresh"]})
    assert (answer.status_code, answer.json().keys()) == (200, {"access", "refresh"})
    assert APIClient().post(f"{API}/auth/refresh", {"refresh": "nonsense"}).status_code == 401


def test_a_wrong_password_is_a_401_and_a_broken_token_too(person: User) -> None:
    assert login("wrong").status_code == 401
    assert login(username="nobody").status_code == 401
    broken = APIClient(HTTP_AUTHORIZATION="Bearer nonsense").get(f"{API}/sensors")
    assert broken.status_code == 401


def test_a_login_names_what_it_does_not_know(person: User) -> None:
    answer = APIClient().post(f"{API}/auth/login", {"user": "ada", "password": "x"})
    assert answer.status_code == 400
    assert wrong(answer).keys() == {"user", "username"}


def test_ten_failed_logins_from_an_address_close_the_door_for_a_minute(person: User) -> None:
    assert [login("wrong", f"guess{number}").status_code for number in range(10)] == [401] * 10
    refused = login()
    assert refused.status_code == 429
    assert 0 < int(refused["Retry-After"]) <= 60
    assert login(REMOTE_ADDR="10.0.0.9").status_code == 200


def test_an_account_is_closed_to_guesses_from_everywhere(person: User) -> None:
    for number in range(10):
        assert login("wrong", "Ada" if number % 2 else "ada", REMOTE_ADDR=f"10.0.{number}.1").status_code == 401
    refused = login(REMOTE_ADDR="10.9.9.9")
    assert problem(refused, 429)["code"] == "throttled"
    assert 0 < int(refused["Retry-After"]) <= 300


def test_an_ipv6_site_is_one_address() -> None:
    seen = {failures.address_of({"REMOTE_ADDR": f"2001:db8:1:2::{number}"}) for number in range(5)}
    assert seen == {"2001:db8:1:2::/64"}
    assert failures.address_of({"REMOTE_ADDR": "::ffff:10.0.0.1"}) == "10.0.0.1"


def test_without_redis_each_process_counts_for_itself(person: User, settings: Any) -> None:
    settings.REDIS_PORT = 1
    redis.client.cache_clear()
    try:
        assert [login("wrong", REMOTE_ADDR="10.0.7.1").status_code for _ in range(10)] == [401] * 10
        assert login(REMOTE_ADDR="10.0.7.1").status_code == 429
    finally:
        redis.client.cache_clear()
        failures._alone.clear()


def test_the_admin_is_closed_with_the_same_key(person: User) -> None:
    for _ in range(10):
        login("wrong")
    page = Client().post("/admin/login/", {"username": "ada", "password": "correct-horse"})
    assert "Too many failed logins" in page.text


def test_an_access_token_fits_into_a_query_of_coap(farm: Organization) -> None:
    builders.member(farm, username="x" * 150, password="correct-horse", pk=2**31 - 1)
    token = login(username="x" * 150).json()["access"]
    assert len(f"token={token}") <= 255


def test_a_refresh_token_is_good_for_once(person: User) -> None:
    first = login().json()["refresh"]
    second = APIClient().post(f"{API}/auth/refresh", {"refresh": first}).json()["refresh"]
    assert problem(APIClient().post(f"{API}/auth/refresh", {"refresh": first}), 401)["code"] == "token-not-valid"
    assert APIClient().post(f"{API}/auth/refresh", {"refresh": second}).status_code == 200


def test_a_logout_ends_the_refresh_token(person: User) -> None:
    refresh = login().json()["refresh"]
    assert APIClient().post(f"{API}/auth/logout", {"refresh": refresh}).status_code == 204
    for path in ("refresh", "logout"):
        assert APIClient().post(f"{API}/auth/{path}", {"refresh": refresh}).status_code == 401


@pytest.mark.parametrize("change", ["password", "inactive", "deleted"])
def test_a_new_password_ends_every_token_and_so_does_the_end_of_the_user(person: User, change: str) -> None:
    pair = login().json()
    if change == "password":
        person.set_password("another-horse")
        person.save()
    elif change == "inactive":
        User.objects.filter(pk=person.pk).update(is_active=False)
    else:
        person.delete()
    client = APIClient(HTTP_AUTHORIZATION=f"Bearer {pair['access']}")
    assert client.get(f"{API}/sensors").status_code == 401
    assert APIClient().post(f"{API}/auth/refresh", {"refresh": pair["refresh"]}).status_code == 401
    with pytest.raises(Unauthorized):
        people.person(pair["access"])


def test_successful_logins_are_not_limited(person: User) -> None:
    person.set_unusable_password()
    assert [login().status_code for _ in range(12)] == [200] * 12


@pytest.mark.parametrize(("tls_in_front", "ident"), [(True, "192.0.2.7"), (False, "127.0.0.1")])
def test_the_throttle_believes_only_the_proxy_in_front(tls_in_front: bool, ident: str) -> None:
    request = RequestFactory().post("/", headers={"X-Forwarded-For": "10.1.1.1, 192.0.2.7"})
    with override_settings(BEHIND_TLS_PROXY=tls_in_front):
        assert failures.address_of(request.META) == ident
