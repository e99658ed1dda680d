"""The way on: drain one slot of the journal, as a drain ticket asks for."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections import Counter

import structlog
from django.conf import settings
from django.db import connection
from redis.exceptions import RedisError
from rq.timeouts import BaseTimeoutException

from aemos.lib import keys, metrics, redis, tracing
from devices import latest
from notifications import live_channel
from rules import events, traces
from rules.effects import perform
from rules.engine.exceptions import ErrorCode
from rules.journal import pauses, tickets
from rules.journal.lease import Finished, Lease, StateConflict
from rules.journal.slots import Slot
from rules.processing import failures, index, timers
from rules.processing.batch import BatchResult
from rules.processing.condition_memory import ConditionStateStore
from rules.processing.isolation import AWAY, process_with_isolation
from rules.processing.takeover import take_over
from rules.processing.work import BATCH_EVENTS, Work

log = logging.getLogger(__name__)
SLICE_SECONDS = 0.2
READ_ENTRIES = 128
# Of how many events they are is not known before: together at most a batch.
FIRST_ENTRIES = 2
# When the database or Redis is away, a slot waits this long before its next ticket; no attempt is spent.
STALL_SECONDS = 1.0


def drain(lane: str, partition: int) -> None:
    """What a drain ticket asks for: `attend` to the slot, then queue a ticket for the rest behind those of the other slots."""
    if pauses.is_paused(lane):  # its end is noticed by the scheduler, as a ticket that was lost
        redis.journal_client(partition).delete(keys.ticket(lane, partition))
    else:
        attend(Slot(lane, partition), with_tickets=True)
    metrics.flush()


def attend(slot: Slot, *, with_tickets: bool = False) -> int | None:
    """Processes one slot for about 200 ms; gives how many events came from it, None when another worker was at it.

    1. `Lease.acquire`: one worker at a time drains a slot; another one ends here.
    2. `take_over`: process what a worker left that died.
    3. `_next`: read a batch: events whose next attempt is due, then entries of the journal.
    4. `process_with_isolation`: `batch.process` in one transaction, or event by event when something in it raises.
    5. `_finish`: publish what was committed, then acknowledge it in the journal; repeat from 3 while time is left.
    6. `_take_over_stranded`: when nothing came of all that, what Redis has lost track of.
    7. `_give_back`: release the lease, and queue a ticket if events are left.

    Without tickets the caller looks again soon: then a batch that was not full is the last one. While the database or Redis is
    away the slot waits, and no attempt is spent.
    """
    lease = Lease(slot, uuid.uuid4().hex)
    if not lease.acquire():
        return None
    with structlog.contextvars.bound_contextvars(slot=str(slot)):
        return _attend(lease, with_tickets=with_tickets)


def _attend(lease: Lease, *, with_tickets: bool) -> int:
    count = 0
    try:
        index.shared().refresh()
        count = (
            _take_over(lease)
            or _work(lease, deadline=time.monotonic() + SLICE_SECONDS, until_empty=with_tickets)
            or _take_over_stranded(lease)
        )
    except AWAY as error:
        _wait(lease.slot, error)
    except BaseTimeoutException:
        metrics.RULE_TIMEOUTS.labels(ErrorCode.WORKER_TIMEOUT.value).inc()
        log.error("%s: %s, stopped after %d ms", lease.slot, ErrorCode.WORKER_TIMEOUT, settings.WORKER_TIMEOUT_MS)
        raise
    finally:
        _give_back(lease, with_tickets=with_tickets)
    return count


def _take_over(lease: Lease) -> int:
    if left := take_over(lease):
        _finish(lease, *left)
    return len(left[0].events) if left else 0


def _take_over_stranded(lease: Lease) -> int:
    """A slot with entries that no read gives would be looked at again and again, and the other slots would wait."""
    stranded = lease.claim_stranded(READ_ENTRIES)
    if stranded:
        log.error("%s: Redis has lost track of %d entries in work; they are taken over", lease.slot, stranded)
    return _take_over(lease) if stranded else 0


def _work(lease: Lease, *, deadline: float, until_empty: bool) -> int:
    count = 0
    while work := _next(lease):
        _finish(lease, work, _process(lease, work))
        count += len(work.events)
        is_last = len(work.events) < BATCH_EVENTS and not until_empty
        if is_last or time.monotonic() > deadline or not lease.renew():
            break
    return count


def _process(lease: Lease, work: Work) -> BatchResult:
    if not tracing.is_on():
        return process_with_isolation(work.events, work, on_event_start=lease.renew_if_due)
    spans = traces.begin_processing(work.events, slot=str(lease.slot))
    try:
        result = process_with_isolation(work.events, work, on_event_start=lease.renew_if_due)
    except BaseException as error:
        traces.end(spans, error=repr(error))
        raise
    traces.end(spans)
    if carried := {event.id: event.trace for event in work.events if event.trace}:
        result.applied.carry(carried)
    return result


def _next(lease: Lease) -> Work:
    asked = FIRST_ENTRIES
    retries, entries = lease.begin(_now_ms(), retries=BATCH_EVENTS, entries=asked)
    work = Work(lane=lease.slot.lane, events=[events.decode_retry(data) for data in retries], retries=retries)
    while True:
        for entry in entries:
            work.add(entry)
        if len(entries) < asked or len(work.events) >= BATCH_EVENTS:
            return work
        asked = _entries_to_read(work)
        entries = lease.next(asked)


def _entries_to_read(work: Work) -> int:
    """As many as are likely to fill the batch, from the size of those read so far: an entry holds 1 to 1,000 events."""
    events_per_entry = max(1, len(work.events) // len(work.entries))
    return max(1, min(READ_ENTRIES, (BATCH_EVENTS - len(work.events)) // events_per_entry))


def _finish(lease: Lease, work: Work, result: BatchResult) -> None:
    """After the commit: publishes what changed, then acknowledges. A crash before the last step makes duplicates, no loss."""
    perform.publish(result.applied)
    latest.remember(result.latest)
    timers.remember(result.next_timers)
    live_channel.publish(result.live_readings)
    delayed = failures.next_attempts(result.failures)
    dead = len({failure.event.id for failure in result.failures}) - len(delayed)
    finished = Finished(
        entry_ids=work.entries,
        retries=work.retries,
        processed=result.processed,
        duplicate=result.duplicate,
        dead=dead + work.unreadable,
        organizations=_finished_by_organization(work, result),
        delayed=delayed,
    )
    if not _acknowledge(lease, finished, work.memory):
        log.warning("%s was taken over while a batch ran; its events will be seen as duplicates", lease.slot)


def _acknowledge(lease: Lease, finished: Finished, memory: ConditionStateStore) -> bool:
    """With what conditions over time remember now; False when the lease was lost."""
    while True:
        finished.remembered = memory.changes()
        try:
            return lease.finish(finished)
        except StateConflict:
            memory.reapply()


def _finished_by_organization(work: Work, result: BatchResult) -> Counter[int]:
    """Events by organization, without those that wait for another attempt."""
    again = {failure.event.id for failure in result.failures if not failures.is_final(failure)}
    return Counter(event.organization_id for event in work.events if event.id not in again)


def _wait(slot: Slot, error: Exception) -> None:
    reason = redis.explain(error) if isinstance(error, RedisError) else f"the database is away: {error}".strip()
    log.warning("%s waits: %s", slot, reason)
    connection.close()  # a broken connection must not be used again
    with contextlib.suppress(RedisError):  # the log has it
        redis.journal_client(slot.partition).set(keys.stalled(slot.lane, slot.partition), reason, ex=10)
    time.sleep(STALL_SECONDS)


def _give_back(lease: Lease, *, with_tickets: bool) -> None:
    """Without Redis the lease runs out by itself, and the scheduler queues the next ticket."""
    try:
        if lease.release(with_ticket=with_tickets):
            tickets.issue(
                lease.slot, queue=tickets.queue_for(lease.slot, oldest_ms=lease.oldest_ms(), now_ms=_now_ms())
            )
    except RedisError as error:
        log.warning("%s could not be given back: %s", lease.slot, redis.explain(error))


def _now_ms() -> int:
    return int(time.time() * 1000)
