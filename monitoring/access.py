"""Whether a request may read health and metrics.

Nothing that is shown is about one organization; but how loaded a farm is and where it fails is not for strangers either.
"""

from __future__ import annotations

import hmac
import ipaddress
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.contrib.auth.models import AnonymousUser
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from rest_framework.authentication import BaseAuthentication
from rest_framework.permissions import BasePermission
from rest_framework.request import Request

from aemos.lib.text import bearer_token

if TYPE_CHECKING:
    from rest_framework.views import APIView

OPEN_ENVIRONMENTS = ("development", "test")
SCRAPER = "metrics-token"


class MetricsTokenAuthentication(BaseAuthentication):
    """`Authorization: Bearer` with METRICS_TOKEN; whatever else stands there is for the next class to judge."""

    def authenticate(self, request: Request) -> tuple[AnonymousUser, str] | None:
        expected = settings.METRICS_TOKEN
        token = bearer_token(request.headers.get("Authorization", ""))
        if not expected or not hmac.compare_digest(token.encode(), expected.encode()):
            return None
        return AnonymousUser(), SCRAPER

    def authenticate_header(self, request: Request) -> str:
        return "Bearer"


class MetricsTokenScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    """Tells OpenAPI of the class above; found by its target."""

    target_class = MetricsTokenAuthentication
    name = "metricsToken"

    def get_security_definition(self, auto_schema: Any) -> dict[str, str]:
        return {"type": "http", "scheme": "bearer", "description": "METRICS_TOKEN, for what scrapes metrics."}


class MayWatch(BasePermission):
    """Staff, METRICS_TOKEN, or a connection from an allowed network; in development and test anybody."""

    message = "Health and metrics are for staff, METRICS_TOKEN, and METRICS_ALLOWED_NETWORKS."

    def has_permission(self, request: Request, view: APIView) -> bool:
        if settings.AEMOS_ENV in OPEN_ENVIRONMENTS or request.auth == SCRAPER:
            return True
        if is_allowed_address(request.META.get("REMOTE_ADDR", "")):
            return True
        return bool(request.user and request.user.is_active and request.user.is_staff)


def is_allowed_address(address: str) -> bool:
    """Of the connection itself: X-Forwarded-For says what its sender likes it to say, and so is not asked."""
    try:
        peer = ipaddress.ip_address(address)
    except ValueError:
        return False
    peer = getattr(peer, "ipv4_mapped", None) or peer
    return any(peer.version == network.version and peer in network for network in settings.METRICS_ALLOWED_NETWORKS)
