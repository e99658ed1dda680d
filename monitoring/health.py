"""Health endpoints: is this process alive, can it do its work, and how is the queue."""

from __future__ import annotations

import contextlib
import time
from datetime import UTC, datetime
from typing import Any

import gevent
from django.conf import settings
from django.db import Error as DatabaseError
from django.db import connection
from django.http import HttpRequest, JsonResponse
from django.views.decorators.http import require_safe
from redis.exceptions import RedisError

from aemos.lib import redis
from monitoring.queue import Health, View, stored_circuit
from notifications.broker_load import BrokerLoad
from rules.admission.circuit import State

CHECK_SECONDS = 2.0
# More than a gateway has in hand at a time.
BROKER_HOLDS_MANY = 1_000
BROKER_DROPPED_SECONDS = 3_600.0
# What a load balancer or a person's monitor should act on. A queue at warning still takes everything.
FAILING = (Health.CRITICAL, Health.UNKNOWN)


@require_safe
def liveness(request: HttpRequest) -> JsonResponse:
    """Touches nothing: a process that is restarted because Redis is away helps nobody."""
    return JsonResponse({"status": "alive"})


@require_safe
def readiness(request: HttpRequest) -> JsonResponse:
    """503 while the database or Redis does not answer; names which, and no more than that to whoever asks."""
    works = {"database": _database_answers(), "redis": _redis_answers()}
    stored = stored_circuit() if works["database"] else None
    circuit = stored.state if stored else None
    ready = all(works.values()) and not (settings.READINESS_FAILS_WHEN_OPEN and circuit == State.OPEN)
    body = {
        "status": "ready" if ready else "not-ready",
        "checks": {name: "ok" if answers else "unreachable" for name, answers in works.items()},
        "circuitState": circuit,
    }
    return JsonResponse(body, status=200 if ready else 503)


def _database_answers() -> bool:
    try:
        with gevent.Timeout(CHECK_SECONDS), connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        return True
    except (DatabaseError, gevent.Timeout):
        # Whatever state the check left it in, the next request must not be given this connection.
        with contextlib.suppress(DatabaseError):
            connection.close()
        return False


def _redis_answers() -> bool:
    try:
        return bool(redis.client().ping())  # gives up by itself
    except RedisError:
        return False


def body_of(view: View) -> dict[str, Any]:
    """The answer of /health."""
    return {
        "status": view.health.word,
        "queueDepth": view.depth,
        "workers": view.workers,
        "circuitState": view.circuit,
        "backpressureEnabled": view.enabled,
        "threshold": view.thresholds.critical,
        "thresholdSource": view.threshold_source,
        "problems": problems_of(view),
    }


def problems_of(view: View) -> list[str]:
    """What a person should know, one sentence each."""
    problems = []
    if view.known is None:
        problems.append("Redis does not answer: events are refused, and nothing is known of the queue.")
    else:
        if view.known.snapshot.memory_full:
            problems.append("The memory of Redis is nearly full: events are refused.")
        problems += [f"The {lane} lane is {pause}. Its events wait." for lane, pause in view.known.paused.items()]
        problems += view.known.weaknesses
        problems += _problems_of_broker(view.known.broker)
    if view.stale:
        problems.append("The database does not answer: the circuit stays in its last known state.")
    if not view.enabled:
        problems.append("Backpressure is switched off: ENABLE_BACKPRESSURE is false.")
    if view.stored and (hold := view.stored.held(datetime.now(UTC))):
        problems.append(f"{hold}: only urgent events are accepted.")
    if view.workers == 0:
        problems.append("No worker is running: events wait.")
    return problems


def _problems_of_broker(broker: BrokerLoad | None) -> list[str]:
    if broker is None:
        return []
    problems = []
    if broker.held > BROKER_HOLDS_MANY:
        problems.append(f"The MQTT broker holds {broker.held:,} messages that wait to be taken.")
    if broker.dropped_at is not None and time.time() - broker.dropped_at < BROKER_DROPPED_SECONDS:
        at = datetime.fromtimestamp(broker.dropped_at, UTC)
        problems.append(
            f"The MQTT broker dropped messages at {at:%H:%M} UTC, {broker.dropped:,} since it was started: a session was full. "
            "Readings may be lost."
        )
    return problems
