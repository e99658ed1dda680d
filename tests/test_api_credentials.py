"""Every URL and every verb with credentials that are worth nothing there: nobody gets in, and nothing breaks."""

from __future__ import annotations

import base64
import json
from datetime import timedelta
from typing import Any

import jwt
import pytest
from django.conf import LazySettings
from django.contrib.auth.models import User
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver

from devices.people.jwt import AccessToken, RefreshToken
from tests import builders

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
UUID = "3f2b9a54-0c57-4a3e-9f0a-6a2a4f0b7a11"
# Open to everybody, whatever comes along.
OPEN = {
    "",
    "admin/jsi18n/",
    "admin/login/",
    "admin/logout/",
    "api/v1/docs",
    "api/v1/gateway",
    "api/v1/health/liveness",
    "api/v1/health/readiness",
    "api/v1/schema",
    # These judge what the body says, not who asks.
    "api/v1/auth/login",
    "api/v1/auth/logout",
    "api/v1/auth/refresh",
    "api/v1/invitations/accept",
    "join/1",
}
REFUSED = {401, 403, 404, 405}


def addresses(patterns: Any = None, prefix: str = "") -> list[str]:
    """Every path of the URLconf, with something in place of what varies."""
    found: list[str] = []
    for pattern in get_resolver().url_patterns if patterns is None else patterns:
        route = prefix + str(pattern.pattern)
        if isinstance(pattern, URLResolver):
            found += addresses(pattern.url_patterns, route)
        elif isinstance(pattern, URLPattern):
            found.append("/".join(_filled(part) for part in route.split("/")))
    return found


def _filled(part: str) -> str:
    if "uuid" in part:
        return UUID
    if part.startswith(("(?P", "^")):
        return ""
    return "1" if part.startswith("<") else part


PATHS = sorted({path for path in addresses() if "(?" not in path and "^" not in path})


def credentials() -> dict[str, str]:
    """What is no access token, by what is wrong with it."""
    user = builders.user(is_superuser=True, is_staff=True)
    good = AccessToken.for_user(user)
    expired = AccessToken.for_user(user)
    expired.set_exp(lifetime=-timedelta(seconds=1))
    claims = dict(good.payload)
    gone = AccessToken.for_user(builders.user(is_active=False))
    sensor = builders.sensor(builders.organization())
    head, body, signature = str(good).split(".")
    return {
        "nothing": "",
        "no token": "Bearer nonsense",
        "expired": f"Bearer {expired}",
        "alg none": f"Bearer {_encoded(alg='none', typ='JWT')}.{body}.",
        "another key": f"Bearer {jwt.encode(claims, 'x' * 48, algorithm='HS256')}",
        "another algorithm": f"Bearer {jwt.encode(claims, 'x' * 64, algorithm='HS512')}",
        "changed claims": f"Bearer {head}.{_encoded(**claims | {'sub': '1'})}.{signature}",
        "refresh as access": f"Bearer {RefreshToken.for_user(user)}",
        "inactive user": f"Bearer {gone}",
        "token of a sensor": f"Bearer {builders.token(sensor)}",
        "basic": "Basic " + base64.b64encode(b"admin:admin").decode(),
    }


def _encoded(**part: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")


def test_every_url_is_looked_at() -> None:
    assert len(PATHS) > 100
    assert set(PATHS) >= OPEN


@pytest.mark.parametrize("path", PATHS)
def test_what_is_no_credential_opens_nothing(path: str, settings: LazySettings) -> None:
    settings.AEMOS_ENV = "production"  # in tests, health and metrics are open to everybody
    client = Client(raise_request_exception=False)
    for name, authorization in credentials().items():
        headers = {"Authorization": authorization} if authorization else {}
        for method in METHODS:
            answer = client.generic(method, f"/{path}", "{}", content_type="application/json", headers=headers)
            if path in OPEN:
                assert answer.status_code < 500, (name, method)
            elif path.startswith("api/"):
                if (path, name) == ("api/v1/telemetry", "token of a sensor"):
                    assert answer.status_code in (400, 405)
                    continue
                assert answer.status_code in REFUSED, (name, method, answer.status_code, answer.content[:200])
                assert answer.headers["Content-Type"] == "application/problem+json"
            else:  # a page: to the login, or forbidden
                to_login = answer.status_code == 302 and "/admin/login/" in answer.headers["Location"]
                assert to_login or answer.status_code in REFUSED, (name, method, answer.status_code)
    assert User.objects.filter(is_superuser=True).count() == 1
