"""One line for each request of a person or a program, with an id that the answer carries too, and a span if there are traces.

Telemetry, health and metrics have no line when they succeed: a farm of 1,000 sensors would fill a disk with them. Telemetry that
was refused is among the rejected events.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import structlog
from django.conf import settings
from django.http import HttpRequest
from django.http.response import HttpResponseBase

from aemos.lib import tracing
from devices.people import failures

log = logging.getLogger("aemos.access")
HEADER = "X-Request-ID"
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
_QUIET = re.compile(r"/api/v1/(telemetry$|health|metrics)|/static/")


def access_log(get_response: Callable[[HttpRequest], HttpResponseBase]) -> Callable[[HttpRequest], HttpResponseBase]:
    def middleware(request: HttpRequest) -> HttpResponseBase:
        began = time.perf_counter()
        request_id = _request_id(request)
        with structlog.contextvars.bound_contextvars(request_id=request_id), _span(request):
            response = get_response(request)
            response.headers.setdefault(HEADER, request_id)
            if settings.ACCESS_LOG and (response.status_code >= 400 or not _QUIET.match(request.path)):
                _write(request, response, seconds=time.perf_counter() - began)
        return response

    return middleware


def _request_id(request: HttpRequest) -> str:
    """The proxy's, so that its log and this one can be read together, or a new one."""
    given = request.headers.get(HEADER, "")
    return given if _ID.match(given) else uuid.uuid4().hex


def _span(request: HttpRequest) -> AbstractContextManager[Any]:
    if not tracing.is_on() or _QUIET.match(request.path):
        return nullcontext()
    parent = tracing.valid(request.headers.get("traceparent", ""))
    return tracing.span(f"{request.method} request", parent=parent)


def _write(request: HttpRequest, response: HttpResponseBase, *, seconds: float) -> None:
    user = getattr(request, "user", None)
    path = _path(request)
    fields = {
        "method": request.method,
        "path": path,
        "status": response.status_code,
        "milliseconds": round(seconds * 1_000, 1),
        "bytes": int(response.headers.get("Content-Length", 0)),
        "address": failures.address_of(request.META),
        "user": getattr(user, "pk", None),
    }
    log.info("%s %s %d", request.method, path, response.status_code, extra=fields)


def _path(request: HttpRequest) -> str:
    """Without the query, and without a secret that is part of the path, as in the link of an invitation."""
    match = request.resolver_match
    if match is not None and "token" in match.kwargs:
        return f"/{match.route}"
    return request.path
