"""What every answer has: security headers, one format of errors below the API, and metrics with a bounded number of series."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from django.core.exceptions import DisallowedHost
from django.http import HttpRequest, JsonResponse
from django.http.response import HttpResponseBase
from django_prometheus.middleware import PrometheusAfterMiddleware

from aemos.lib import problems
from gateway.views import socketio_url

GetResponse = Callable[[HttpRequest], HttpResponseBase]
API, DOCUMENTATION = "/api/", "/api/v1/docs"
# django-rq's pages of queues and jobs hold styles. Their scripts only tick all boxes at once, and stay forbidden.
QUEUE_PAGES = "/admin/django_rq/"
_POLICY_OF_DATA = "default-src 'none'; frame-ancestors 'none'"
_POLICY_OF_PAGES = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
_NO_PERMISSIONS = "camera=(), geolocation=(), microphone=(), payment=(), usb=()"
BAD_REQUEST = 400
_OF_BODY = {"Content-Length", "Content-Encoding", "ETag"}
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE"})
OTHER = "<other>"


def security_headers(get_response: GetResponse) -> GetResponse:
    """A page may load, run and be sent to nothing but this server, and talk to the gateway beside it; nobody may frame it."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        for name, value in headers_for(request).items():
            response.headers.setdefault(name, value)
        return response

    return middleware


def headers_for(request: HttpRequest) -> dict[str, str]:
    if request.path.startswith(API) and request.path != DOCUMENTATION:
        return {"Content-Security-Policy": _POLICY_OF_DATA, "Permissions-Policy": _NO_PERMISSIONS}
    try:
        gateway = socketio_url(request)
    except DisallowedHost:
        gateway = ""
    connections = f"'self' {gateway} {gateway.replace('http', 'ws', 1)}" if gateway else "'self'"
    styles = "; style-src 'self' 'unsafe-inline'" if request.path.startswith(QUEUE_PAGES) else ""
    return {
        "Content-Security-Policy": f"{_POLICY_OF_PAGES}; connect-src {connections}{styles}",
        "Permissions-Policy": _NO_PERMISSIONS,
    }


def problems_below_api(get_response: GetResponse) -> GetResponse:
    """Programs get the problem details of API views also where Django refuses a host, a CSRF token, a method or a path."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        is_page = not response.headers.get("Content-Type", "").startswith("application/")
        if response.status_code < BAD_REQUEST or not request.path.startswith(API) or not is_page:
            return response
        problem = JsonResponse(
            problems.of_status(response.status_code), status=response.status_code, content_type=problems.MEDIA_TYPE
        )
        for name in response.headers.keys() - problem.headers.keys() - _OF_BODY:
            problem[name] = response[name]
        problem["Content-Length"] = str(len(problem.content))
        return problem

    return middleware


@lru_cache(maxsize=1_000)
def methods_of(view: Callable[..., Any]) -> frozenset[str]:
    """The methods of METHODS that a view answers. Functions, such as the pages of the admin, answer GET and POST."""
    if actions := getattr(view, "actions", None):
        return METHODS & {name.upper() for name in actions}
    if cls := getattr(view, "cls", None) or getattr(view, "view_class", None):
        return METHODS & {name.upper() for name in cls.http_method_names if hasattr(cls, name)}
    return frozenset({"GET", "POST"})


class BoundedMetricsMiddleware(PrometheusAfterMiddleware):
    """django-prometheus labels durations with whatever method a client writes; anybody could fill the memory with series."""

    def _method(self, request: HttpRequest) -> str:
        match = getattr(request, "resolver_match", None)
        known = methods_of(match.func) if match is not None else METHODS
        return str(request.method) if request.method in known else OTHER

    def label_metric(self, metric: Any, request: HttpRequest, response: Any = None, **labels: str) -> Any:
        if "method" in labels:
            labels["method"] = self._method(request)
        return super().label_metric(metric, request, response, **labels)
