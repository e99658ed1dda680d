"""Count the requests that Django's handler does not see, under the names of django-prometheus."""

from __future__ import annotations

import atexit
from collections import Counter
from collections.abc import Callable
from functools import lru_cache

import gevent
from django_prometheus.middleware import Metrics

# A counter of several processes is a place in a file: to count a request in seven of them takes as long as to read its body.
FLUSH_SECONDS = 1.0
_waiting: Counter[tuple[int, bool]] = Counter()


def observe_telemetry(status: int, *, secure: bool, seconds: float) -> None:
    """Counters are a second late at most."""
    if not _waiting:
        gevent.spawn_later(FLUSH_SECONDS, flush)
    _waiting[status, secure] += 1
    for observe in _histograms():
        observe(seconds)


def flush() -> None:
    taken = dict(_waiting)
    _waiting.clear()
    for (status, secure), number in taken.items():
        for increment in _counters(status, secure):
            increment(number)


atexit.register(flush)


@lru_cache(maxsize=100)
def _counters(status: int, secure: bool) -> tuple[Callable[[float], None], ...]:
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
