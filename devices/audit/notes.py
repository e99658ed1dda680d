"""Write entries of the audit log: what people ask for over HTTP, their logins, and what is done on the server."""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import structlog
from django.db import DatabaseError
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from rest_framework.request import Empty

from devices.audit.models import AuditEntry
from devices.models import ApiToken, Organization
from devices.people import failures

log = logging.getLogger(__name__)
CHANGING_COMMANDS = frozenset(
    {
        "changepassword", "circuit", "createsuperuser", "dbshell", "flush", "import_readings", "lane", "loaddata", "migrate",
        "replay_rejected", "seed_demo", "shell", "sync_broker",
    }
)  # fmt: skip
SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
# What of a request is a secret, or is no news.
_SECRET = re.compile(r"password|token|secret|refresh|^access$|(api|access|private).?key", re.IGNORECASE)
_HIDDEN = "***"
_NO_NEWS = frozenset({"csrfmiddlewaretoken", "next"})
MAXIMUM_DETAIL = 4_000
# Of sensors and devices, which have no account; to look for one in their sessions would cost each reading something.
TELEMETRY = "/api/v1/telemetry"
# Who asks here has not logged in yet: the name is in what they send.
_LOGINS = frozenset({"/api/v1/auth/login", "/admin/login/", "/api/v1/auth/refresh", "/api/v1/auth/logout"})
_JOINS = re.compile(r"/join/|/api/v1/invitations/accept$")
# A closed door is one entry in the metrics and none here: strangers could fill the log.
TOO_MANY = 429


def audit(get_response: Callable[[HttpRequest], HttpResponseBase]) -> Callable[[HttpRequest], HttpResponseBase]:
    """Middleware behind that of sessions: whatever changes something has an entry, also at an address that is new."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        if request.method not in SAFE and request.path != TELEMETRY:
            try:
                _note(request, response)
            except DatabaseError as error:
                log.error("%s %s is not in the audit log: %s", request.method, request.path, error)
        return response

    return middleware


def note_command(words: Sequence[str]) -> None:
    """A management command that somebody has run on the server: its words, without a password. Raises DatabaseError."""
    if words and words[0] in CHANGING_COMMANDS:
        shown = [_HIDDEN if _SECRET.search(word) and "=" in word else word for word in words[1:]]
        AuditEntry.objects.create(
            kind=AuditEntry.Kind.MANAGEMENT,
            actor=os.environ.get("SUDO_USER") or getpass.getuser(),
            action=words[0][:200],
            detail={"arguments": shown},
        )


def _note(request: HttpRequest, response: HttpResponseBase) -> None:
    is_login = request.path in _LOGINS or bool(_JOINS.match(request.path))
    user = getattr(request, "user", None)
    known = user is not None and user.is_authenticated
    if response.status_code == TOO_MANY or not (known or is_login):
        return
    if not is_login and not _was_done(request, response):
        return
    sent = _sent(request, response)
    organization = _organization(request)
    match = request.resolver_match
    AuditEntry.objects.create(
        kind=AuditEntry.Kind.LOGIN if is_login else AuditEntry.Kind.REQUEST,
        organization=organization,
        organization_uuid=organization.uuid if organization else None,
        actor=_storable(_actor(request, sent)),
        action=_storable(f"{request.method} {match.route if match else request.path}")[:200],
        target="" if _JOINS.match(request.path) else _storable(request.path)[:500],
        status=response.status_code,
        detail=_without_secrets(sent),
        address=failures.address_of(request.META)[:50],
        request_id=str(structlog.contextvars.get_contextvars().get("request_id", "")),
    )


def _was_done(request: HttpRequest, response: HttpResponseBase) -> bool:
    """The admin answers 200 with the form again, or with a question, when nothing was done yet."""
    if request.path.startswith("/api/"):
        return response.status_code < 400
    return 300 <= response.status_code < 400


def _sent(request: HttpRequest, response: HttpResponseBase) -> Any:
    context = getattr(response, "renderer_context", None) or {}
    asked = context.get("request")
    # A view that needs no body has not read it, and what came may be nothing that it could read.
    if asked is not None and getattr(asked, "_full_data", Empty) is not Empty:
        data = asked.data
        return data.dict() if hasattr(data, "dict") else data
    return {name: values if len(values) > 1 else values[0] for name, values in request.POST.lists()}


def _without_secrets(sent: Any) -> dict[str, Any]:
    detail = _hidden(sent) if isinstance(sent, dict) else {"body": _hidden(sent)}
    text = json.dumps(detail, default=str)
    return json.loads(text) if len(text) <= MAXIMUM_DETAIL else {"beginning": text[:MAXIMUM_DETAIL]}


def _hidden(sent: Any) -> Any:
    if isinstance(sent, dict):
        return {
            _storable(str(name)): _HIDDEN if _SECRET.search(str(name)) else _hidden(value)
            for name, value in sent.items()
            if name not in _NO_NEWS
        }
    if isinstance(sent, list):
        return [_hidden(each) for each in sent]
    return _storable(sent) if isinstance(sent, str) else sent


def _storable(text: str) -> str:
    """PostgreSQL takes no NUL: whoever sends one must not stay out of the log for it."""
    return text.replace("\x00", "\N{SYMBOL FOR NULL}")


def _actor(request: HttpRequest, sent: Any) -> str:
    user = request.user
    if not user.is_authenticated:
        name = sent.get("username", "") if isinstance(sent, dict) else ""
        return str(name)[:150] or "nobody"
    token = getattr(request, "aemos_token", None)
    return f"{user.get_username()} (token {token.name})"[:200] if isinstance(token, ApiToken) else user.get_username()


def _organization(request: HttpRequest) -> Organization | None:
    """The one that the person needed a right in; none where it was none, or more than one."""
    asked = [key for key in getattr(request, "aemos_organizations", ()) if key is not None]
    return Organization.objects.filter(pk__in=asked).first() if len(asked) == 1 else None
