"""Drain tickets: the RQ job that makes a worker drain one slot, and the only functions that a job may name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from math import ceil
from typing import Any

import django_rq
from django.conf import settings
from redis.exceptions import RedisError
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import import_attribute

from aemos.lib import redis
from aemos.lib.per_process import per_process
from rules.events import Lane
from rules.journal.slots import Slot

log = logging.getLogger(__name__)
DRAIN = "rules.jobs.drain"
# Whoever can write to Redis can name any importable function in a job. Only these are ever called.
ALLOWED_FUNCTIONS = frozenset({DRAIN, "rules.admission.replay.step"})
# How late the events of a lane may become, from acceptance to effect.
BUDGET_SECONDS = {Lane.CRITICAL: 2, Lane.NORMAL: 30, Lane.LOW: 120}


class ForbiddenJob(Exception):
    """A job in Redis names a function that workers do not run."""


class AllowedJob(Job):
    """A job that runs only what is listed, without callbacks and web hooks: those too are names and URLs in Redis."""

    @property
    def func(self) -> Callable[..., Any]:
        if self.func_name not in ALLOWED_FUNCTIONS or self.instance:
            raise ForbiddenJob(f"{self.func_name!r} is not a function that workers run")
        function: Callable[..., Any] = import_attribute(self.func_name)
        return function

    def restore(self, raw_data: dict[str, Any]) -> None:
        super().restore(raw_data)
        self._success_callback_name = self._failure_callback_name = self._stopped_callback_name = None
        self.webhooks: list[Any] = []


def issue(slot: Slot, *, queue: str = "") -> None:
    """Queues a ticket on the lane's queue, or on `queue` for a lane that is late. Raises RedisError."""
    queue_of(queue or slot.lane).enqueue_call(
        DRAIN,
        args=(slot.lane, slot.partition),
        timeout=ceil(settings.WORKER_TIMEOUT_MS / 1_000),  # a slice lasts 200 ms: who is not back by then is stuck
        result_ttl=0,
        failure_ttl=3600,
    )


def issue_all(slots: Iterable[Slot]) -> None:
    """Queues a ticket for each slot whose events are safe already.

    A ticket that cannot be queued is only a delay: the scheduler queues it within a second.
    """
    for slot in slots:
        try:
            issue(slot)
        except RedisError as error:
            log.warning("ticket for %s/%d was not queued: %s", slot.lane, slot.partition, redis.explain(error))


@per_process
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
