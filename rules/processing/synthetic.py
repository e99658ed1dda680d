"""Runs that no sender asks for: events of the scheduler, of timers and of people in, urgent entries of the journal out."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence

from redis.exceptions import RedisError

from aemos.lib import metrics, redis
from devices.exceptions import Overloaded
from rules.admission import control
from rules.events import PRIORITIES, Event, EventType
from rules.journal import tickets, writing
from rules.journal.slots import Slot, partition_of

log = logging.getLogger(__name__)

PRIORITY = PRIORITIES[EventType.SCHEDULED]


def refusal() -> Overloaded | None:
    """Why the queue takes no urgent event; None when it does."""
    try:
        verdict = control.shared().verdict(PRIORITY)
    except Overloaded as refused:
        return refused
    return None if verdict.accept else control.shared().refusal(verdict, PRIORITY)


def append(batch: Sequence[Event]) -> None:
    """Raises RedisError; part of the batch may be in the journal then."""
    if not batch:
        return
    slots: defaultdict[Slot, list[Event]] = defaultdict(list)
    for event in batch:
        slots[Slot(event.lane, partition_of(event.originator_uuid))].append(event)
    needing = writing.append(slots)
    control.shared().admitted(len(batch))
    metrics.INGESTED.labels(batch[0].protocol, "accepted").inc(len(batch))
    metrics.flush()
    for slot in needing:
        try:
            tickets.issue(slot)
        except RedisError as error:
            # The events are safe; the scheduler queues lost tickets.
            log.warning("ticket for %s/%d was not queued: %s", slot.lane, slot.partition, redis.explain(error))
