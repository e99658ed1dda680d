"""Answers of the API in one format also where no view gave them, and metrics of HTTP with a bounded number of series."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from django.http import HttpRequest, JsonResponse
from django.http.response import HttpResponseBase
from django_prometheus.middleware import PrometheusAfterMiddleware

from aemos.lib import problems

API = "/api/"
BAD_REQUEST = 400
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE"})
OTHER = "<other>"


def problems_below_api(
    get_response: Callable[[HttpRequest], HttpResponseBase],
) -> Callable[[HttpRequest], HttpResponseBase]:
    """Programs get the problem details of API views also where Django refuses a host, a CSRF token, a method or a path."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        is_page = not response.headers.get("Content-Type", "").startswith("application/")
        if response.status_code < BAD_REQUEST or not request.path.startswith(API) or not is_page:
            return response
        problem = JsonResponse(
            problems.of_status(response.status_code), status=response.status_code, content_type=problems.MEDIA_TYPE
        )
        for name in response.headers.keys() - problem.headers.keys():
            problem[name] = response[name]
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
