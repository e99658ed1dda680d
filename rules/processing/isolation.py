"""Process a batch as a whole or, when something in it raises, event by event, so that one event cannot stop the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from django.db import InterfaceError, OperationalError, transaction
from redis.exceptions import RedisError
from rq.timeouts import BaseTimeoutException

from aemos.lib import tracing
from rules.events import Event
from rules.processing import batch, failures
from rules.processing.batch import BatchResult
from rules.processing.failures import Failure
from rules.processing.stages.decide import OnEventStart
from rules.processing.work import Work

log = logging.getLogger(__name__)
# The database or Redis does not answer: nobody's fault, so no attempt is spent.
AWAY = (OperationalError, InterfaceError, RedisError)


def process_with_isolation(due: Sequence[Event], work: Work, *, on_event_start: OnEventStart) -> BatchResult:
    """The batch in one transaction, or, when something in it raises, event by event, so that one cannot stop the others."""
    try:
        return _together(due, work, on_event_start=on_event_start)
    except (*AWAY, BaseTimeoutException):
        raise
    except Exception:
        if len(due) > 1:
            log.exception("a batch of %d events failed, processing it event by event", len(due))
    return process_one_by_one(due, work, on_event_start=on_event_start)


def _together(due: Sequence[Event], work: Work, *, on_event_start: OnEventStart | None) -> BatchResult:
    keep = partial(failures.keep, lane=work.lane)
    return batch.process(due, keep, memory=work.memory, on_event_start=on_event_start, redelivered=work.redelivered)


def process_one_by_one(due: Sequence[Event], work: Work, *, on_event_start: OnEventStart) -> BatchResult:
    result = BatchResult()
    for event in due:
        result.add(_alone(event, work, on_event_start=on_event_start))
    return result


def _alone(event: Event, work: Work, *, on_event_start: OnEventStart) -> BatchResult:
    on_event_start(event)  # once: whatever happens from here to the commit is this event's doing
    try:
        return _together([event], work, on_event_start=None)
    except (*AWAY, BaseTimeoutException):
        raise
    except Exception as error:
        fields = {"event_id": event.id, **tracing.log_fields(event.trace)}
        log.exception("event %s failed, attempt %d", event.id, event.attempt + 1, extra=fields)
        return dead_letter(Failure.of(event, error), lane=work.lane)


def dead_letter(failure: Failure, *, lane: str) -> BatchResult:
    with transaction.atomic():
        failures.keep([failure], lane=lane)
    return BatchResult(failures=[failure])
