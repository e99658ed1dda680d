"""Count the requests that Django's handler does not see, under the names of django-prometheus."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from django_prometheus.middleware import Metrics


def observe_telemetry(status: int, *, secure: bool, seconds: float) -> None:
    for increment in _counters(status, secure):
        increment()
    for observe in _histograms():
        observe(seconds)


@lru_cache(maxsize=100)
def _counters(status: int, secure: bool) -> tuple[Callable[[], None], ...]:
    metrics = Metrics.get_instance()
    transport = "https" if secure else "http"
    counters = (
        metrics.requests_total,
        metrics.responses_total,
        metrics.requests_by_method.labels(method="POST"),
        metrics.requests_by_transport.labels(transport=transport),
        metrics.requests_by_view_transport_method.labels(view="telemetry", transport=transport, method="POST"),
        metrics.responses_by_status.labels(status=str(status)),
        metrics.responses_by_status_view_method.labels(status=str(status), view="telemetry", method="POST"),
    )
    return tuple(counter.inc for counter in counters)


@lru_cache(maxsize=1)
def _histograms() -> tuple[Callable[[float], None], ...]:
    metrics = Metrics.get_instance()
    by_view = metrics.requests_latency_by_view_method.labels(view="telemetry", method="POST")
    return metrics.requests_latency_before.observe, by_view.observe
