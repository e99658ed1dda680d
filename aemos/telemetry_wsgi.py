"""Answer POST /api/v1/telemetry in WSGI, ahead of Django's handler, middleware and URL resolution: they cost more than the rest.

A sender sees the same: headers come from Django's own middleware, and what Django would redirect or refuse goes to Django.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Any

import msgspec
from django.conf import settings
from django.core.exceptions import DisallowedHost
from django.db import close_old_connections
from django.http import HttpRequest, HttpResponse
from django.middleware.clickjacking import XFrameOptionsMiddleware
from django.middleware.security import SecurityMiddleware

from aemos import http_metrics
from aemos.lib import problems
from aemos.middleware import headers_for
from rules import events
from rules.api import telemetry
from rules.api.telemetry import Answer

log = logging.getLogger(__name__)
PATH = "/api/v1/telemetry"
Environ = dict[str, Any]
Application = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]
_REASONS = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


def telemetry_first(inner: Application) -> Application:
    """`inner` gets every request that is not telemetry, and telemetry that Django has something to say about."""

    def application(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] != PATH or environ["REQUEST_METHOD"] != "POST" or not _is_plain(environ):
            return inner(environ, start_response)
        return _respond(environ, start_response)

    return application


def _respond(environ: Environ, start_response: Callable[..., Any]) -> list[bytes]:
    began = time.perf_counter()
    secure = _is_secure(environ)
    try:
        answer = telemetry.answer(environ, partial(_body, environ))
    except Exception:  # the process loop: as Django's handler does
        log.exception("A telemetry request failed")
        answer = Answer(500, msgspec.json.encode(problems.of_status(500)))
    finally:
        # Django does so at the end of a request: a greenlet that ends with a connection would take it out of the pool.
        close_old_connections()
    length = str(len(answer.body))
    headers = [("Content-Type", answer.content_type), ("Content-Length", length), *answer.headers, *_headers(secure)]
    start_response(_REASONS[answer.status], headers)
    http_metrics.observe_telemetry(answer.status, secure=secure, seconds=time.perf_counter() - began)
    return [answer.body]


def _body(environ: Environ) -> bytes:
    """Raises TooLarge and BadPayload."""
    length = int(environ.get("CONTENT_LENGTH") or 0)
    if length > events.MAXIMUM_BYTES:
        raise telemetry.too_large()
    try:
        body: bytes = environ["wsgi.input"].read(length)
    except OSError:
        raise telemetry.incomplete() from None
    if len(body) < length:
        raise telemetry.incomplete()
    return telemetry.uncompressed(body, environ.get("HTTP_CONTENT_ENCODING", ""))


def _is_plain(environ: Environ) -> bool:
    """Whether Django would neither redirect the request, nor refuse its Host header, nor judge the page that sends it."""
    if settings.CORS_ALLOWED_ORIGINS and "HTTP_ORIGIN" in environ:
        return False
    if settings.SECURE_SSL_REDIRECT and not _is_secure(environ):
        return False
    return _is_allowed_host(environ.get("HTTP_HOST"), environ["SERVER_NAME"], environ["SERVER_PORT"])


def _is_secure(environ: Environ) -> bool:
    if settings.SECURE_PROXY_SSL_HEADER is None:
        return bool(environ["wsgi.url_scheme"] == "https")
    name, value = settings.SECURE_PROXY_SSL_HEADER
    return bool(environ.get(name, "").partition(",")[0].strip() == value)


@lru_cache(maxsize=1_000)
def _is_allowed_host(host: str | None, server_name: str, server_port: str) -> bool:
    request = HttpRequest()
    request.META = {"SERVER_NAME": server_name, "SERVER_PORT": server_port} | (
        {} if host is None else {"HTTP_HOST": host}
    )
    try:
        request.get_host()
    except DisallowedHost:
        return False
    return True


@lru_cache(maxsize=2)
def _headers(secure: bool) -> tuple[tuple[str, str], ...]:
    """What Django's middleware adds to every answer."""
    request = HttpRequest()
    request.path = PATH
    if secure:
        name, value = settings.SECURE_PROXY_SSL_HEADER or ("wsgi.url_scheme", "https")
        request.META[name] = value
    response = HttpResponse()
    del response["Content-Type"]
    for header, text in headers_for(request).items():
        response[header] = text
    for middleware in (XFrameOptionsMiddleware, SecurityMiddleware):
        middleware(lambda _: response).process_response(request, response)
    return tuple(response.items())
