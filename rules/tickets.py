"""Drain tickets: a slot of the journal in, an RQ job that makes some worker drain it out."""

from __future__ import annotations

from functools import cache
from math import ceil

import django_rq
from django.conf import settings
from rq import Queue
from rq.serializers import JSONSerializer

from aemos.lib import redis
from rules.events import Lane
from rules.journal import Slot
from rules.workers import AllowedJob

DRAIN = "rules.jobs.drain"
# How late the events of a lane may become, from acceptance to effect.
BUDGET_SECONDS = {Lane.CRITICAL: 2, Lane.NORMAL: 30, Lane.LOW: 120}


def issue(slot: Slot, *, queue: str = "") -> None:
    """Queues a ticket on the lane's queue, or on `queue` for a lane that is late. Raises RedisError."""
    queue_of(queue or slot.lane).enqueue_call(
        DRAIN,
        args=(slot.lane, slot.partition),
        timeout=ceil(settings.WORKER_TIMEOUT_MS / 1_000),  # a slice lasts 200 ms: who is not back by then is stuck
        result_ttl=0,
        failure_ttl=3600,
    )


@cache
def queue_of(name: str) -> Queue:
    """Kept, because each new Queue of django-rq opens a connection of its own, without a timeout."""
    return django_rq.get_queue(
        name, connection=redis.client(), serializer=JSONSerializer, job_class=AllowedJob, commit_mode="auto"
    )


def queue_for(slot: Slot, *, oldest_ms: int | None, now_ms: int) -> str:
    """The slot's own queue, or the first one when more than half of the lane's budget has gone for its oldest event."""
    if oldest_ms is None or now_ms - oldest_ms < BUDGET_SECONDS[Lane(slot.lane)] * 1000 / 2:
        return slot.lane
    return Lane.CRITICAL


def queued() -> int:
    """Jobs waiting on all queues."""
    return sum(queue_of(name).count for name in Lane)
