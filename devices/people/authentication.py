"""API tokens as credentials of requests. REST framework imports this by its name in the settings, so it imports no views."""

from __future__ import annotations

from typing import Any

from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.request import Request

from aemos.lib.text import bearer_token
from devices.models import ApiToken
from devices.people.models import PERSONAL


class ApiTokenAuthentication(BaseAuthentication):
    """`Authorization: Bearer aemosp_…`; every other bearer token is for the next class to judge."""

    def authenticate(self, request: Request) -> tuple[Any, ApiToken] | None:
        token = bearer_token(request.headers.get("Authorization", ""))
        if not token.startswith(PERSONAL):
            return None
        found = ApiToken.objects.of(token)
        if found is None:
            raise AuthenticationFailed("This API token is unknown, revoked or expired.", code="token-not-valid")
        found.saw_use()
        return found.user, found

    def authenticate_header(self, request: Request) -> str:
        return 'Bearer realm="api"'
