"""The JSON of the monitoring endpoints: a look at the queue in, bodies out, and their description for OpenAPI."""

# ruff: noqa: N815  the API speaks camelCase

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

from rest_framework import serializers

from monitoring.queue import Health, Known, View
from rules.admission.circuit import State, Thresholds
from rules.journal.queue_stats import LaneLoad, Load

LEVELS = ", ".join(health.word for health in Health)
STATES = ", ".join(State)


class HealthSerializer(serializers.Serializer[Any]):
    status = serializers.CharField(help_text=LEVELS)
    queueDepth = serializers.IntegerField(allow_null=True)
    workers = serializers.IntegerField(allow_null=True)
    circuitState = serializers.CharField(allow_null=True, help_text=STATES)
    backpressureEnabled = serializers.BooleanField()
    threshold = serializers.IntegerField(help_text="Events from which the circuit opens now.")
    thresholdSource = serializers.CharField(help_text="configured, or drain-rate: what the workers finish in time.")
    problems = serializers.ListField(child=serializers.CharField())


class SummarySerializer(serializers.Serializer[Any]):
    health = serializers.CharField(help_text=LEVELS)
    queueDepth = serializers.IntegerField(allow_null=True)
    workers = serializers.IntegerField(allow_null=True)
    circuitState = serializers.CharField(allow_null=True, help_text=STATES)
    rejectedCount = serializers.IntegerField(allow_null=True)


class TotalsSerializer(serializers.Serializer[Any]):
    waiting = serializers.IntegerField()
    active = serializers.IntegerField()
    delayed = serializers.IntegerField()
    completed = serializers.IntegerField()
    failed = serializers.IntegerField()
    accepted = serializers.IntegerField()
    oldestAgeSeconds = serializers.FloatField(allow_null=True)


class LaneSerializer(TotalsSerializer):
    drainRate = serializers.FloatField(allow_null=True, help_text="Events per second.")
    estimatedDelaySeconds = serializers.FloatField(allow_null=True, help_text="From acceptance to effect.")


class WorkerSerializer(serializers.Serializer[Any]):
    name = serializers.CharField()
    state = serializers.CharField(help_text="busy, idle or suspended")
    lane = serializers.CharField(allow_null=True)
    partition = serializers.IntegerField(allow_null=True)
    lastHeartbeat = serializers.DateTimeField(allow_null=True)


class ThresholdsSerializer(serializers.Serializer[Any]):
    recovery = serializers.IntegerField()
    warning = serializers.IntegerField()
    critical = serializers.IntegerField()


class BothThresholdsSerializer(serializers.Serializer[Any]):
    configured = ThresholdsSerializer()
    effective = ThresholdsSerializer()
    source = serializers.CharField(help_text="Of the effective ones: configured, or drain-rate.")  # type: ignore[assignment]
    drainRate = serializers.FloatField(allow_null=True, help_text="Events that the workers finish in a second.")


class HoldSerializer(serializers.Serializer[Any]):
    by = serializers.CharField(help_text="Who keeps the circuit open.")
    until = serializers.DateTimeField(allow_null=True, help_text="null: until somebody closes it.")
    note = serializers.CharField(help_text="Why.")


class CircuitSerializer(serializers.Serializer[Any]):
    state = serializers.CharField(allow_null=True, help_text=STATES)
    thresholds = BothThresholdsSerializer()
    hold = HoldSerializer(allow_null=True, help_text="null: nobody keeps it open.")
    rejectedCount = serializers.IntegerField(allow_null=True)
    rejectedByReason = serializers.DictField(child=serializers.IntegerField(), allow_null=True)
    lastStateChange = serializers.DateTimeField(allow_null=True)
    stateAgeMs = serializers.IntegerField(allow_null=True)
    utilizationPercent = serializers.FloatField(
        allow_null=True, help_text="Depth as a share of the critical threshold in force."
    )
    stale = serializers.BooleanField(help_text="The database is away; this is the last known state.")
    backpressureEnabled = serializers.BooleanField()


class WorkersSerializer(serializers.Serializer[Any]):
    busy = serializers.IntegerField()
    idle = serializers.IntegerField()
    suspended = serializers.IntegerField()
    list = WorkerSerializer(many=True)


class QueueSerializer(serializers.Serializer[Any]):
    health = serializers.CharField(help_text=LEVELS)
    queueDepth = serializers.IntegerField(allow_null=True)
    lanes = serializers.DictField(child=LaneSerializer(), allow_null=True)
    totals = TotalsSerializer(allow_null=True)
    workers = WorkersSerializer(allow_null=True)
    circuit = CircuitSerializer()


class ResetSerializer(serializers.Serializer[Any]):
    circuitState = serializers.CharField(help_text=STATES)
    previousState = serializers.CharField(help_text=STATES)
    queueDepth = serializers.IntegerField(allow_null=True)
    resetBy = serializers.CharField()


def summary(view: View) -> dict[str, Any]:
    return {
        "health": view.health.word,
        "queueDepth": view.depth,
        "workers": view.workers,
        "circuitState": view.circuit,
        "rejectedCount": view.rejected,
    }


def queue(view: View) -> dict[str, Any]:
    """All that is known; lanes, totals and workers are null while Redis is away."""
    known = view.known
    return {
        "health": view.health.word,
        "queueDepth": view.depth,
        "lanes": {name: _lane(name, known) for name in known.load.lanes} if known else None,
        "totals": _counts(known.load.total) if known else None,
        "workers": _workers(known.load) if known else None,
        "circuit": _circuit(view),
    }


def _workers(load: Load) -> dict[str, Any]:
    listed = [
        {
            "name": worker.name,
            "state": worker.state,
            "lane": worker.lane,
            "partition": worker.partition,
            "lastHeartbeat": worker.last_heartbeat,
        }
        for worker in load.workers
    ]
    return {**load.workers_by_state, "list": listed}


def _counts(load: LaneLoad) -> dict[str, Any]:
    return {
        "waiting": load.waiting,
        "active": load.active,
        "delayed": load.delayed,
        "completed": load.completed,
        "failed": load.failed,
        "accepted": load.accepted,
        "oldestAgeSeconds": load.oldest_age_seconds,
    }


def _lane(name: str, known: Known) -> dict[str, Any]:
    return _counts(known.load.lanes[name]) | {
        "drainRate": _finite(known.snapshot.drain_rate[name]),
        "estimatedDelaySeconds": _finite(known.snapshot.delays[name]),
    }


def _circuit(view: View) -> dict[str, Any]:
    changed_at, depth = view.changed_at, view.depth
    hold = view.stored.held(datetime.now(UTC)) if view.stored else None
    return {
        "state": view.circuit,
        "thresholds": {
            "configured": _thresholds(view.configured),
            "effective": _thresholds(view.thresholds),
            "source": view.threshold_source,
            "drainRate": _finite(view.known.snapshot.total_drain_rate) if view.known else None,
        },
        "hold": {"by": hold.by, "until": hold.until, "note": hold.note} if hold else None,
        "rejectedCount": view.rejected,
        "rejectedByReason": dict(view.known.rejected) if view.known else None,
        "lastStateChange": changed_at,
        "stateAgeMs": _age_ms(changed_at) if changed_at else None,
        "utilizationPercent": None if depth is None else round(100 * depth / view.thresholds.critical, 1),
        "stale": view.stale,
        "backpressureEnabled": view.enabled,
    }


def _thresholds(thresholds: Thresholds) -> dict[str, int]:
    return {"recovery": thresholds.recovery, "warning": thresholds.warning, "critical": thresholds.critical}


def _age_ms(moment: datetime) -> int:
    return max(int((datetime.now(UTC) - moment).total_seconds() * 1000), 0)


def _finite(number: float | None) -> float | None:
    """JSON has no infinity: a lane that never has its turn has no estimate."""
    return round(number, 3) if number is not None and math.isfinite(number) else None
