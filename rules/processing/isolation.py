"""Process a batch as a whole or, when something in it raises, event by event, so that one event cannot stop the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from django.db import InterfaceError, OperationalError, transaction
from redis.exceptions import RedisError
from rq.timeouts import BaseTimeoutException

from rules.events import Event
from rules.processing import batch, failures
from rules.processing.batch import Begin, Ended
from rules.processing.failures import Failure
from rules.processing.work import Work

log = logging.getLogger(__name__)
# The database or Redis does not answer: nobody's fault, so no attempt is spent.
AWAY = (OperationalError, InterfaceError, RedisError)


def process(due: Sequence[Event], work: Work, *, begin: Begin) -> Ended:
    """The batch in one transaction, or, when something in it raises, event by event, so that one cannot stop the others."""
    try:
        return _together(due, work, begin=begin)
    except (*AWAY, BaseTimeoutException):
        raise
    except Exception:
        if len(due) > 1:
            log.exception("a batch of %d events failed, going on event by event", len(due))
    return process_one_by_one(due, work, begin=begin)


def _together(due: Sequence[Event], work: Work, *, begin: Begin | None) -> Ended:
    keep = partial(failures.keep, lane=work.lane)
    return batch.process(due, keep, memory=work.memory, begin=begin, taken_over=work.taken_over)


def process_one_by_one(due: Sequence[Event], work: Work, *, begin: Begin) -> Ended:
    ended = Ended()
    for event in due:
        ended.add(_alone(event, work, begin=begin))
    return ended


def _alone(event: Event, work: Work, *, begin: Begin) -> Ended:
    begin(event)  # once: whatever happens from here to the commit is this event's doing
    try:
        return _together([event], work, begin=None)
    except (*AWAY, BaseTimeoutException):
        raise
    except Exception as error:
        log.exception("event %s failed, attempt %d", event.id, event.attempt + 1)
        return dead_letter(Failure.of(event, error), lane=work.lane)


def dead_letter(failure: Failure, *, lane: str) -> Ended:
    with transaction.atomic():
        failures.keep([failure], lane=lane)
    return Ended(failures=[failure])
