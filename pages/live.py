"""What the scripts of a page need to hear the gateway: its address, and a token of the person who looks."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest, JsonResponse
from django.views.decorators.http import require_POST

from devices.people.jwt import AccessToken
from gateway.views import socketio_url
from pages.place import page


@page
@require_POST
def live_token(request: HttpRequest) -> JsonResponse:
    """An access token as from a login, which ends by itself; only with POST, so that no page of others can have one made."""
    person: Any = request.user
    return JsonResponse({"gateway": socketio_url(request), "token": str(AccessToken.for_user(person))})
