"""The second factor: codes of an authenticator app and recovery codes, at both logins."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.test import Client
from django_otp.oath import TOTP
from django_otp.plugins.otp_totp.models import TOTPDevice
from rest_framework.test import APIClient

from tests import builders
from tests.problems import problem

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]
PASSWORD = "tomatoes-are-red"
PAGE = "/account/second-factor"


@pytest.fixture
def ada() -> User:
    return builders.member(builders.organization(), "admin", username="ada", password=PASSWORD)


def code_of(user: User, *, later: int = 0) -> str:
    """What the app shows; `later` in steps of 30 s, because each code is good for once."""
    device = TOTPDevice.objects.get(user=user)
    app = TOTP(device.bin_key, device.step, device.t0, device.digits, device.drift)
    return str(int(app.token()) if not later else _at(device, later)).zfill(6)


def _at(device: TOTPDevice, later: int) -> int:
    app = TOTP(device.bin_key, device.step, device.t0, device.digits, device.drift)
    app.time = time.time() + later * device.step
    return int(app.token())


@pytest.fixture(autouse=True)
def _no_pause_after_a_wrong_code(settings: Any) -> None:
    """django-otp makes who has typed a wrong code wait: a second, then twice as long each time."""
    settings.OTP_TOTP_THROTTLE_FACTOR = settings.OTP_STATIC_THROTTLE_FACTOR = 0


@pytest.fixture
def recovery_codes(ada: User) -> list[str]:
    """Of Ada, who has just switched her second factor on, in the page."""
    client = Client()
    client.force_login(ada)
    assert b"data:image/svg+xml;base64," in client.get(PAGE).content
    answer = client.post(PAGE, {"code": code_of(ada)})
    codes = re.findall(r"<code>(\w+)</code>", answer.content.decode())
    assert len(codes) == 8
    return codes


def api_login(**more: str) -> Any:
    return APIClient().post("/api/v1/auth/login", {"username": "ada", "password": PASSWORD, **more})


def admin_login(**more: str) -> int:
    return (
        Client().post("/admin/login/", {"username": "ada", "password": PASSWORD, "next": "/admin/", **more}).status_code
    )


def test_without_one_nothing_changes(ada: User) -> None:
    assert api_login().status_code == 200
    assert admin_login() == 302


def test_with_one_a_password_alone_opens_nothing(ada: User, recovery_codes: list[str]) -> None:
    refused = api_login()
    assert (refused.status_code, problem(refused)["code"]) == (401, "second-factor")
    assert api_login(otp="000000").status_code == 401
    assert (admin_login(), admin_login(otp="000000")) == (200, 200)


def test_the_apps_code_opens_both_doors_and_each_code_once(ada: User, recovery_codes: list[str]) -> None:
    code = code_of(ada, later=1)
    assert api_login(otp=f"{code[:3]} {code[3:]}").status_code == 200
    assert api_login(otp=code).status_code == 401
    assert admin_login(otp=code) == 200


def test_a_recovery_code_opens_once(ada: User, recovery_codes: list[str]) -> None:
    assert admin_login(otp=recovery_codes[0]) == 302
    assert admin_login(otp=recovery_codes[0]) == 200
    assert api_login(otp=recovery_codes[1]).status_code == 200


def test_the_right_code_with_a_wrong_password_is_not_used_up(ada: User, recovery_codes: list[str]) -> None:
    wrong = APIClient().post("/api/v1/auth/login", {"username": "ada", "password": "x", "otp": recovery_codes[0]})
    assert wrong.status_code == 401
    assert api_login(otp=recovery_codes[0]).status_code == 200


def test_guessing_codes_closes_the_door(ada: User, recovery_codes: list[str]) -> None:
    statuses = [api_login(otp=f"{number:06}").status_code for number in range(12)]
    assert statuses[0] == 401
    assert statuses[-1] == 429


def test_somebody_elses_code_opens_nothing(ada: User, recovery_codes: list[str]) -> None:
    bo = builders.member(builders.organization(), "admin", username="bo", password=PASSWORD)
    client = Client()
    client.force_login(bo)
    client.get(PAGE)
    client.post(PAGE, {"code": code_of(bo)})
    assert api_login(otp=code_of(bo, later=1)).status_code == 401


def test_it_is_not_on_before_a_code_has_shown_that_the_app_has_it(ada: User) -> None:
    client = Client()
    client.force_login(ada)
    client.get(PAGE)
    assert b"not the code of now" in client.post(PAGE, {"code": "000000"}).content
    assert api_login().status_code == 200


def test_switching_it_off_takes_a_code(ada: User, recovery_codes: list[str]) -> None:
    client = Client()
    client.force_login(ada)
    client.post(PAGE, {"code": "000000", "remove": "1"})
    assert api_login().status_code == 401
    assert client.post(PAGE, {"code": recovery_codes[3], "remove": "1"}).status_code == 302
    assert api_login().status_code == 200
    assert not TOTPDevice.objects.filter(confirmed=True).exists()


def test_strangers_have_no_page() -> None:
    assert Client().get(PAGE).status_code == 302


def test_who_has_lost_everything_is_helped_on_the_server(
    ada: User, recovery_codes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    call_command("second_factor", "ada")
    assert capsys.readouterr().out == "The second factor of ada: on.\n"
    call_command("second_factor", "ada", "--remove")
    assert "was on and is off now" in capsys.readouterr().out
    assert api_login().status_code == 200
    with pytest.raises(CommandError, match="There is no user nobody"):
        call_command("second_factor", "nobody")


def test_secrets_of_others_have_no_page_in_the_admin() -> None:
    root = Client()
    root.force_login(builders.user(is_superuser=True, is_staff=True))
    assert "otp_totp" not in root.get("/admin/").content.decode()
    assert root.get("/admin/otp_totp/totpdevice/").status_code == 404
