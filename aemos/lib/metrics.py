"""Metrics of AEMOS for Prometheus: each process adds to them, and a scrape gives the sums over all processes.

No label ever carries a device, sensor, user or event. django-prometheus counts HTTP and database of the web process by itself.
"""

from __future__ import annotations

import collections
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from aemos.lib import keys, redis
from aemos.lib.counters import Counters

SEPARATOR = "|"
# Seconds; a batch or a chain takes from microseconds to its timeout.
DURATION_BUCKETS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)


COUNTERS = Counters()


class Cell:
    """One number: a counter with its labels."""

    __slots__ = ("_field",)

    def __init__(self, field: str) -> None:
        self._field = field

    def inc(self, amount: float = 1.0) -> None:
        COUNTERS.add(self._field, amount)


class Counter:
    """A counter; `name` ends in _total. With one label, `known` values of it are there before they are counted, as 0."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str] = (), *, known: Sequence[str] = ()) -> None:
        self.name = name
        self._documentation = documentation
        self._label_names = tuple(labels)
        self._none = {(name, value): 0.0 for value in known} if labels else {(name,): 0.0}
        self.labels = cache(self._cell)

    def _cell(self, *values: str) -> Cell:
        if len(values) != len(self._label_names):
            raise ValueError(f"{self.name} has the labels {self._label_names}")
        return Cell(SEPARATOR.join((self.name, *values)))

    def inc(self, amount: float = 1.0) -> None:
        """Of a counter without labels."""
        self.labels().inc(amount)

    def family(self, sums: Mapping[tuple[str, ...], float]) -> Metric:
        """`sums`: name and label values -> number."""
        family = CounterMetricFamily(self.name, self._documentation, labels=self._label_names)
        for (name, *values), number in sorted((self._none | dict(sums)).items()):
            if name == self.name and len(values) == len(self._label_names):
                family.add_metric(values, number)
        return family


class Histogram:
    """Durations in seconds, without labels."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float] = DURATION_BUCKETS) -> None:
        self.name = name
        self._documentation = documentation
        self._bounds = tuple(bounds)
        self._fields = [SEPARATOR.join((name, str(bound))) for bound in (*self._bounds, "+Inf")]
        self._sum = SEPARATOR.join((name, "sum"))

    def observe(self, seconds: float) -> None:
        COUNTERS.add(self._fields[bisect_left(self._bounds, seconds)])
        COUNTERS.add(self._sum, seconds)

    def observe_all(self, seconds: Sequence[float]) -> None:
        """As `observe` for each of them, at the price of a few."""
        for position, number in collections.Counter(bisect_left(self._bounds, each) for each in seconds).items():
            COUNTERS.add(self._fields[position], number)
        COUNTERS.add(self._sum, sum(seconds))

    def family(self, sums: Mapping[tuple[str, ...], float]) -> Metric:
        family = HistogramMetricFamily(self.name, self._documentation)
        if (self.name, "sum") not in sums:
            return family
        buckets, total = [], 0.0
        for bound in (*map(str, self._bounds), "+Inf"):
            total += sums.get((self.name, bound), 0.0)
            buckets.append((bound, total))
        family.add_metric([], buckets, sum_value=sums[self.name, "sum"])
        return family


INGESTED = Counter(
    "telemetry_ingestion_total",
    "Events received, by protocol and result: accepted, or the reason of the refusal.",
    ["protocol", "result"],
)
EVENT_TIMES = Counter(
    "telemetry_time_total", "Events whose time was not taken as it is, by result: late or ahead.", ["result"]
)
UNRECORDED = Counter(
    "rejected_unrecorded_total", "Rejected events that were counted but not recorded, because too many came at once."
)
RULE_EXECUTIONS = Counter("rule_execution_total", "Runs of rule chains, by result: completed or failed.", ["result"])
RULE_SECONDS = Histogram("rule_execution_duration_seconds", "How long one run of a rule chain took.")
RULE_ACTIONS = Counter("rule_action_executions_total", "Actions that rule chains asked for.")
ACTIONS_SUPPRESSED = Counter("rule_actions_suppressed_total", "Actions that had no effect because of their cooldown.")
COMMANDS_VETOED = Counter("rule_commands_vetoed_total", "Commands of rule chains that an interlock did not let happen.")
ALARM_CHANGES = Counter(
    "alarm_changes_total",
    "Changes of alarms that people were notified of: raised, severity-raised, flapping, acknowledged or cleared.",
    ["change"],
)
RULE_FILTERS = Counter(
    "rule_filter_evaluations_total",
    "Filter nodes that were evaluated in runs that did not fail, by result: true or false.",
    ["result"],
    known=["true", "false"],
)
RULE_TIMEOUTS = Counter(
    "rule_timeout_total",
    "What took too long and was stopped, by error code.",
    ["error_code"],
    known=["DATA_COLLECTION_TIMEOUT", "RULE_CHAIN_TIMEOUT", "WORKER_TIMEOUT", "EXTERNAL_ACTION_TIMEOUT"],
)
CHAINS_SUSPENDED = Counter(
    "rule_chains_suspended_total", "Rule chains that were suspended because they failed too often in a row."
)
SCHEDULER_FAILURES = Counter(
    "scheduler_failures_total", "Unexpected failures of a periodic task of the scheduler.", ["task"]
)
COLLECTION_SECONDS = Histogram(
    "data_collection_duration_seconds", "How long it took to read what the rules of one batch of events need."
)
STATE_CHANGES = Counter(
    "device_state_changes_total", "Changes of device states, by source: device, rule or person.", ["source"]
)
NOTIFICATIONS_SENT = Counter(
    "notifications_sent_total",
    "Deliveries that ended, by protocol and state: sent, acknowledged, failed or expired.",
    ["protocol", "state"],
)
LIVE_READINGS = Counter(
    "live_readings_total",
    "Live readings, by result: published by workers, delivered by gateways, lost, over-limit.",
    ["result"],
)
COAP_REFUSED = Counter(
    "coap_refused_total",
    "CoAP datagrams refused before they were read as requests, by reason: rate, busy or malformed.",
    ["reason"],
)
SOCKETIO_ENDED = Counter(
    "socketio_sessions_ended_total",
    "Socket.IO connections that the gateway ended, by reason: token-expired, user-inactive, too-many-events or unread.",
    ["reason"],
)
SOCKETIO_RESUMES = Counter(
    "socketio_resumes_total",
    "Socket.IO clients that resumed, by result: complete, or gap if messages are no longer kept.",
    ["result"],
)
GATEWAY_FAILURES = Counter(
    "gateway_failures_total",
    "Unexpected failures in a gateway, by part: gateway, accounts, socketio, mqtt or coap.",
    ["part"],
)
FAMILIES: tuple[Counter | Histogram, ...] = (
    INGESTED,
    EVENT_TIMES,
    UNRECORDED,
    RULE_EXECUTIONS,
    RULE_SECONDS,
    RULE_ACTIONS,
    ACTIONS_SUPPRESSED,
    COMMANDS_VETOED,
    ALARM_CHANGES,
    RULE_FILTERS,
    RULE_TIMEOUTS,
    CHAINS_SUSPENDED,
    SCHEDULER_FAILURES,
    COLLECTION_SECONDS,
    STATE_CHANGES,
    NOTIFICATIONS_SENT,
    LIVE_READINGS,
    COAP_REFUSED,
    SOCKETIO_ENDED,
    SOCKETIO_RESUMES,
    GATEWAY_FAILURES,
)


def flush() -> None:
    """Adds what this process has counted to the sums in Redis; while Redis does not answer, the counts stay here."""
    COUNTERS.try_flush()


def sums() -> dict[tuple[str, ...], float]:
    """Name and label values -> the sum over all processes, as far as they have told. Raises RedisError."""
    held = redis.client().hgetall(keys.METRICS)
    return {tuple(name.decode().split(SEPARATOR)): float(number) for name, number in held.items()}


def collect() -> Iterator[Metric]:
    """All families with the sums of all processes. Raises RedisError."""
    COUNTERS.flush()
    known = sums()
    for family in FAMILIES:
        yield family.family(known)
