"""The worker's side of the journal: a drain ticket in, the events of one slot processed and acknowledged out."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
from django.conf import settings
from django.db import InterfaceError, OperationalError, connection, transaction
from redis.exceptions import RedisError
from rq.timeouts import BaseTimeoutException

from aemos.lib import keys, metrics, redis
from devices import latest
from notifications import live_channel
from rules import events
from rules.effects import perform
from rules.engine.exceptions import ErrorCode
from rules.events import Event
from rules.journal import tickets
from rules.journal.lease import Entry, Finished, Lease, StateConflict
from rules.journal.slots import Slot
from rules.processing import batch, failures, index, timers
from rules.processing.batch import Begin, Ended
from rules.processing.condition_memory import Memory
from rules.processing.failures import Failure

log = logging.getLogger(__name__)
SLICE_SECONDS = 0.2
# Large enough to share a transaction among many, small enough to end well within a lease.
BATCH_EVENTS = 1_000
READ_ENTRIES = 128
# When the database or Redis is away, a slot waits this long before its next ticket; no attempt is spent.
STALL_SECONDS = 1.0
# Up to so many deliveries a batch that a worker died on is tried again as a whole.
TOGETHER_DELIVERIES = 2
# Workers that die on an event before it is put aside. Two may be chance: machines fail, and people kill what seems to hang.
DEATHS = 3
AWAY = (OperationalError, InterfaceError, RedisError)


def drain(lane: str, partition: int) -> None:
    """Works on one slot for a slice of about 200 ms, then queues a ticket for the rest behind those of the others."""
    lease = Lease(Slot(lane, partition), uuid.uuid4().hex)
    if not lease.acquire():
        return
    try:
        index.shared().refresh()
        if not _take_over(lease):
            _work(lease, deadline=time.monotonic() + SLICE_SECONDS)
    except AWAY as error:
        _wait(lease.slot, error)
    except BaseTimeoutException:
        metrics.RULE_TIMEOUTS.labels(ErrorCode.WORKER_TIMEOUT.value).inc()
        log.error(
            "%s/%d: %s, stopped after %d ms", *_of(lease.slot), ErrorCode.WORKER_TIMEOUT, settings.WORKER_TIMEOUT_MS
        )
        raise
    finally:
        _give_back(lease)
    metrics.flush()


def _work(lease: Lease, *, deadline: float) -> None:
    while lease.renew():
        work = _next(lease)
        if not work:
            return
        _finish(lease, work, _process(work.events, work, begin=lease.renew_if_due))
        if time.monotonic() > deadline:
            return


@dataclass(slots=True, kw_only=True)
class Work:
    """What is processed and acknowledged together: whole entries, and events whose next attempt is due."""

    lane: str
    memory: Memory = field(default_factory=Memory)
    taken_over: bool = False
    events: list[Event] = field(default_factory=list)
    entries: list[bytes] = field(default_factory=list)
    retries: list[bytes] = field(default_factory=list)
    unreadable: int = 0

    def __bool__(self) -> bool:
        return bool(self.entries or self.retries)


def _next(lease: Lease) -> Work:
    retries = lease.due(_now_ms(), BATCH_EVENTS)
    work = Work(lane=lease.slot.lane, events=[events.decode_retry(data) for data in retries], retries=retries)
    while len(work.events) < BATCH_EVENTS and (entries := lease.next(_entries_to_read(work))):
        for entry in entries:
            _add(work, entry)
    return work


def _entries_to_read(work: Work) -> int:
    """As many as are likely to fill the batch, from the size of those read so far: an entry holds 1 to 1,000 events."""
    if not work.entries:
        return 1
    events_per_entry = max(1, len(work.events) // len(work.entries))
    return max(1, min(READ_ENTRIES, (BATCH_EVENTS - len(work.events)) // events_per_entry))


def _add(work: Work, entry: Entry) -> None:
    """An entry that cannot be read becomes a dead letter as it is, and the slot goes on."""
    work.entries.append(entry.id)
    try:
        work.events += events.decode_entry(entry.data)
    except (msgspec.DecodeError, ValueError) as error:
        log.error("entry %s of the %s lane cannot be read: %s", entry.id.decode(), work.lane, error)
        failures.keep_unreadable(entry, lane=work.lane, error=f"unreadable journal entry: {error}")
        work.unreadable += entry.count


def _process(due: Sequence[Event], work: Work, *, begin: Begin) -> Ended:
    """The batch in one transaction, or, when something in it raises, event by event, so that one cannot stop the others."""
    try:
        return _process_together(due, work, begin=begin)
    except (*AWAY, BaseTimeoutException):
        raise
    except Exception:
        if len(due) > 1:
            log.exception("a batch of %d events failed, going on event by event", len(due))
    return _process_one_by_one(due, work, begin=begin)


def _process_together(due: Sequence[Event], work: Work, *, begin: Begin | None) -> Ended:
    keep = partial(failures.keep, lane=work.lane)
    return batch.process(due, keep, memory=work.memory, begin=begin, taken_over=work.taken_over)


def _process_one_by_one(due: Sequence[Event], work: Work, *, begin: Begin) -> Ended:
    ended = Ended()
    for event in due:
        ended.add(_process_alone(event, work, begin=begin))
    return ended


def _process_alone(event: Event, work: Work, *, begin: Begin) -> Ended:
    begin(event)  # once: whatever happens from here to the commit is this event's doing
    try:
        return _process_together([event], work, begin=None)
    except (*AWAY, BaseTimeoutException):
        raise
    except Exception as error:
        log.exception("event %s failed, attempt %d", event.id, event.attempt + 1)
        return _failed(Failure.of(event, error), lane=work.lane)


def _failed(failure: Failure, *, lane: str) -> Ended:
    with transaction.atomic():
        failures.keep([failure], lane=lane)
    return Ended(failures=[failure])


def _finish(lease: Lease, work: Work, ended: Ended) -> None:
    """After the commit: tells what changed, then acknowledges. A crash before the last step makes duplicates, no loss."""
    perform.tell(ended.performed)
    latest.remember(ended.latest)
    timers.remember(ended.wakes)
    live_channel.tell(ended.watched)
    delayed = failures.next_attempts(ended.failures)
    dead = len({failure.event.id for failure in ended.failures}) - len(delayed)
    finished = Finished(
        entry_ids=work.entries,
        retries=work.retries,
        processed=ended.processed,
        duplicate=ended.duplicate,
        dead=dead + work.unreadable,
        organizations=_ended_by_organization(work, ended),
        delayed=delayed,
    )
    if not _acknowledge(lease, finished, work.memory):
        log.warning("%s/%d was taken over while a batch ran; its events will be seen as duplicates", *_of(lease.slot))


def _acknowledge(lease: Lease, finished: Finished, memory: Memory) -> bool:
    """With what conditions over time remember now; False when the lease was lost."""
    while True:
        finished.remembered = memory.changes()
        try:
            return lease.finish(finished)
        except StateConflict:
            memory.catch_up()


def _ended_by_organization(work: Work, ended: Ended) -> Counter[int]:
    """Events by organization, without those that wait for another attempt."""
    again = {failure.event.id for failure in ended.failures if not failures.is_final(failure)}
    return Counter(event.organization_id for event in work.events if event.id not in again)


def _take_over(lease: Lease) -> bool:
    """Finishes what a worker died on, noting each event before it is decided; True if there was something.

    An event on which DEATHS workers died while it was noted is put aside as a dead letter.
    """
    work, deliveries = _left_behind(lease)
    if not work:
        return False
    log.warning("taking over %d events that a worker did not finish", len(work.events))
    suspect, deaths = lease.last_checkpoint()
    ended, due = Ended(), work.events
    if deaths >= DEATHS:
        for event in work.events:
            if str(event.id) == suspect:
                error = f"the worker died {deaths} times while it processed this event"
                ended.add(_failed(Failure(event=event, error=error, permanent=True), lane=lease.slot.lane))
        due = [event for event in work.events if str(event.id) != suspect]
    # Dying again without a note means dying before or after the decisions, where only going one by one tells whom it is on.
    process = _process if deliveries <= TOGETHER_DELIVERIES else _process_one_by_one
    try:
        ended.add(process(due, work, begin=partial(_begin, lease, deaths={suspect: deaths})))
    except AWAY:
        # Where Redis is away the note stays, and counts as one death.
        with contextlib.suppress(RedisError):
            lease.clear_checkpoint()
        raise
    lease.clear_checkpoint()
    _finish(lease, work, ended)
    return True


def _left_behind(lease: Lease) -> tuple[Work, int]:
    """Entries of at most about one batch, and how often the first of them was given to a worker."""
    work, deliveries = Work(lane=lease.slot.lane, taken_over=True), 0
    entry = lease.next_pending()
    while entry and len(work.events) < BATCH_EVENTS:
        deliveries = deliveries or lease.deliveries(entry)
        _add(work, entry)
        entry = lease.next_pending(entry.id)
    return work, deliveries


def _begin(lease: Lease, event: Event | None, *, deaths: Mapping[str, int]) -> None:
    """Notes the event that is decided next. After the last one nothing is noted: their effects are made together."""
    if event is None:
        lease.clear_checkpoint()
    else:
        lease.checkpoint(str(event.id), deaths=deaths.get(str(event.id), 0))
    lease.renew()


def _wait(slot: Slot, error: Exception) -> None:
    reason = redis.explain(error) if isinstance(error, RedisError) else f"the database is away: {error}".strip()
    log.warning("%s/%d waits: %s", *_of(slot), reason)
    connection.close()  # a broken connection must not be used again
    with contextlib.suppress(RedisError):  # the log has it
        redis.journal_client(slot.partition).set(keys.stalled(slot.lane, slot.partition), reason, ex=10)
    time.sleep(STALL_SECONDS)


def _give_back(lease: Lease) -> None:
    """Without Redis the lease runs out by itself, and the scheduler queues the next ticket."""
    try:
        if lease.release():
            tickets.issue(
                lease.slot, queue=tickets.queue_for(lease.slot, oldest_ms=lease.oldest_ms(), now_ms=_now_ms())
            )
    except RedisError as error:
        log.warning("%s/%d could not be given back: %s", *_of(lease.slot), redis.explain(error))


def _now_ms() -> int:
    return int(time.time() * 1000)


def _of(slot: Slot) -> tuple[str, int]:
    return slot.lane, slot.partition
