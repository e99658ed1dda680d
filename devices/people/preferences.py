"""What a person prefers, for the length of a request: language and time zone of the pages, and the units of what they show."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from django.conf import settings
from django.db import DatabaseError
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.utils import timezone, translation

from devices.models import Preferences

# Programs are spoken to in one language, whatever their headers say; so are those who run the system, because reasons, states and
# guides are English.
_ENGLISH = ("/api/", "/admin/", "/operations")
_LOGIN = "/admin/login/"


def preferences_of(request: HttpRequest) -> Preferences:
    """Looked up once per request; an empty one for strangers, and for who has never chosen anything."""
    known = getattr(request, "aemos_preferences", None)
    if isinstance(known, Preferences):
        return known
    try:
        found = Preferences.objects.filter(user_id=request.user.pk).first() if request.user.is_authenticated else None
    except DatabaseError:  # for the page itself to say, if it needs it
        found = None
    request.aemos_preferences = mine = found or Preferences()  # type: ignore[attr-defined]
    return mine


def for_templates(request: HttpRequest) -> dict[str, Any]:
    """The context processor of the pages."""
    return {"preferences": getattr(request, "aemos_preferences", None)}


def personal(get_response: Callable[[HttpRequest], HttpResponseBase]) -> Callable[[HttpRequest], HttpResponseBase]:
    """Middleware: pages in the language and the time zone of the person who looks."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        if request.path.startswith(_ENGLISH) and request.path != _LOGIN:
            return get_response(request)
        mine = preferences_of(request)
        with translation.override(_language(request, mine)), timezone.override(_zone(mine.time_zone)):
            return get_response(request)

    return middleware


@lru_cache(maxsize=1_000)
def _zone(name: str) -> ZoneInfo | None:
    """None where there is none of that name any more: then times are in UTC, as for who has chosen none."""
    try:
        return ZoneInfo(name) if name else None
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None


def _language(request: HttpRequest, mine: Preferences) -> str:
    if mine.language in dict(settings.LANGUAGES):
        return mine.language
    return translation.get_language_from_request(request)
