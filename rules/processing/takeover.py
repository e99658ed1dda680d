"""Take over what a worker left behind when it died, and find the event that kills workers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from functools import partial

from redis.exceptions import RedisError

from rules.events import Event
from rules.journal.lease import Lease
from rules.processing.batch import BatchResult
from rules.processing.failures import Failure
from rules.processing.isolation import AWAY, dead_letter, process_one_by_one, process_with_isolation
from rules.processing.work import BATCH_EVENTS, Work

log = logging.getLogger(__name__)
# Up to so many deliveries a batch that a worker died on is tried again as a whole.
TOGETHER_DELIVERIES = 2
# Workers that die on an event before it becomes a dead letter. Two may be chance: machines fail, and people kill processes.
DEATHS = 3


def take_over(lease: Lease) -> tuple[Work, BatchResult] | None:
    """Processes what a worker was given and did not finish; None when there is nothing.

    1. Read the entries that are pending, and the last checkpoint: the event that a worker was deciding when it died.
    2. An event on which DEATHS workers died at the checkpoint becomes a dead letter.
    3. Process the others, with a checkpoint before each event is decided.

    Raises what says that the database or Redis is away (isolation.AWAY).
    """
    work, deliveries = _pending(lease)
    if not work:
        return None
    log.warning("taking over %d events that a worker did not finish", len(work.events))
    suspect, deaths = lease.last_checkpoint()
    result, due = BatchResult(), work.events
    if deaths >= DEATHS:
        for event in work.events:
            if event.id == suspect:
                error = f"the worker died {deaths} times while it processed this event"
                result.add(dead_letter(Failure(event=event, error=error, permanent=True), lane=lease.slot.lane))
        due = [event for event in work.events if event.id != suspect]
    # Dying again without a checkpoint means dying before or after the decisions; one by one it shows which event it is.
    process_all = process_with_isolation if deliveries <= TOGETHER_DELIVERIES else process_one_by_one
    try:
        result.add(process_all(due, work, on_event_start=partial(_checkpoint, lease, deaths={suspect: deaths})))
    except AWAY:
        # Where Redis is away the checkpoint stays, and counts as one death.
        with contextlib.suppress(RedisError):
            lease.clear_checkpoint()
        raise
    lease.clear_checkpoint()
    return work, result


def _pending(lease: Lease) -> tuple[Work, int]:
    """Entries of at most about one batch, and how often the first of them was given to a worker."""
    work, deliveries = Work(lane=lease.slot.lane, redelivered=True), 0
    entry = lease.next_pending()
    while entry and len(work.events) < BATCH_EVENTS:
        deliveries = deliveries or lease.deliveries(entry)
        work.add(entry)
        entry = lease.next_pending(entry.id)
    return work, deliveries


def _checkpoint(lease: Lease, event: Event | None, *, deaths: Mapping[str, int]) -> None:
    """Records the event that is decided next. After the last one nothing is recorded: their effects are made together."""
    if event is None:
        lease.clear_checkpoint()
    else:
        lease.checkpoint(event.id, deaths=deaths.get(event.id, 0))
    lease.renew()
