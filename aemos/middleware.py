"""Metrics of HTTP with a bounded number of series: only views that exist, each with the methods that it has."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from django.http import HttpRequest
from django_prometheus.middleware import PrometheusAfterMiddleware

METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE"})
OTHER = "<other>"


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
