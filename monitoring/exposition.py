"""The metrics of the queue, of all processes and of this web server's workers, as Prometheus text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from aemos.lib import metrics, redis
from monitoring.queue import Known, View, look
from rules.admission.circuit import State
from rules.journal.queue_stats import LaneLoad

log = logging.getLogger(__name__)
CIRCUIT_NUMBERS = {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}
WEB_FAMILIES = ("django_", "python_", "process_")
LANE_GAUGES: Mapping[str, tuple[str, Callable[[LaneLoad], float | None]]] = {
    "rule_engine_queue_waiting": ("Events that wait for their first attempt.", attrgetter("waiting")),
    "rule_engine_queue_active": ("Events that a worker has.", attrgetter("active")),
    "rule_engine_queue_completed": ("Events that were finished, duplicates included; never falls.", attrgetter("completed")),
    "rule_engine_queue_failed": ("Events that became dead letters; never falls.", attrgetter("failed")),
    "rule_engine_queue_delayed": ("Events that wait for another attempt.", attrgetter("delayed")),
    "rule_engine_queue_oldest_age_seconds": ("Age of the oldest event.", attrgetter("oldest_age_seconds")),
}  # fmt: skip


class _Queue(Collector):
    """The queue as it is at this moment, the same on every web server."""

    def __init__(self, view: View) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        view = self._view
        yield GaugeMetricFamily(
            "rule_engine_queue_health",
            "0 healthy, 1 degraded, 2 warning, 3 critical, -1 unknown.",
            value=view.health.value,
        )
        yield from _circuit(view)
        if view.known:
            yield from _lanes(view.known)
            yield from _workers(view.known)
            yield from _rejected(view.known)
            yield from _broker(view.known)


def _circuit(view: View) -> Iterator[Metric]:
    if view.circuit is not None:
        yield GaugeMetricFamily(
            "rule_engine_backpressure_circuit_state",
            "0 CLOSED, 1 HALF_OPEN, 2 OPEN.",
            value=CIRCUIT_NUMBERS[view.circuit],
        )
    yield GaugeMetricFamily(
        "rule_engine_backpressure_enabled", "1, or 0 with ENABLE_BACKPRESSURE=false.", value=int(view.enabled)
    )
    for name in ("warning", "critical"):
        yield GaugeMetricFamily(
            f"rule_engine_backpressure_threshold_{name}",
            f"The {name} threshold in force, in events: lower than configured while workers are slow.",
            value=getattr(view.thresholds, name),
        )


def _lanes(known: Known) -> Iterator[Metric]:
    for name, (documentation, value_of) in LANE_GAUGES.items():
        yield _by_lane(name, documentation, {lane: value_of(load) for lane, load in known.load.lanes.items()})
    paused = {lane: int(lane in known.paused) for lane in known.load.lanes}
    yield _by_lane("rule_engine_lane_paused", "1 for a lane that a person has paused: its events wait.", paused)
    snapshot = known.snapshot
    yield _by_lane("rule_engine_queue_drain_rate", "Events finished per second.", snapshot.drain_rate)
    yield _by_lane(
        "rule_engine_queue_estimated_delay_seconds", "From acceptance to effect, as estimated.", snapshot.delays
    )
    yield GaugeMetricFamily(
        "rule_engine_queue_total_pending",
        "Events accepted and not finished, over all lanes.",
        value=known.load.total.pending,
    )


def _by_lane(name: str, documentation: str, values: Mapping[str, float | None]) -> Metric:
    """A lane without a value is left out: nothing is not 0."""
    family = GaugeMetricFamily(name, documentation, labels=["lane"])
    for lane, value in values.items():
        if value is not None:
            family.add_metric([lane], value)
    return family


def _workers(known: Known) -> Iterator[Metric]:
    family = GaugeMetricFamily("rule_engine_workers", "Living workers by state.", labels=["state"])
    for state, number in known.load.workers_by_state.items():
        family.add_metric([state], number)
    yield family


def _rejected(known: Known) -> Iterator[Metric]:
    family = CounterMetricFamily(
        "rule_engine_backpressure_rejected_total", "Events refused, by reason.", labels=["reason"]
    )
    for reason, number in sorted(known.rejected.items()):
        family.add_metric([reason], number)
    yield family


def _broker(known: Known) -> Iterator[Metric]:
    if known.broker:
        held = "Messages that the MQTT broker holds for whoever is to have them."
        yield GaugeMetricFamily("mqtt_broker_held_messages", held, value=known.broker.held)
        dropped = "Messages that the MQTT broker dropped since it was started, because a session was full."
        yield CounterMetricFamily("mqtt_broker_dropped_messages_total", dropped, value=known.broker.dropped)


class _Fixed(Collector):
    """Families that were collected before."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class _Web(Collector):
    """What django-prometheus and Python count: of all workers of this gunicorn, or of this process where there is none.

    django-rq also registers a metric, which says nothing unless its own collector is used.
    """

    def collect(self) -> Iterator[Metric]:
        try:
            source: Collector = MultiProcessCollector(None)  # type: ignore[no-untyped-call]
        except ValueError:
            source = REGISTRY
        return (family for family in source.collect() if family.name.startswith(WEB_FAMILIES))


def expose() -> bytes:
    """What is known, within three seconds also while Redis hangs; what is not known is left out."""
    view = look()
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Queue(view))
    if view.known:
        registry.register(_Fixed(_counted()))
    registry.register(_Web())
    return generate_latest(registry)


def _counted() -> list[Metric]:
    try:
        return list(metrics.collect())
    except RedisError as error:
        log.warning("the counts of the processes cannot be read: %s", redis.explain(error))
        return []
