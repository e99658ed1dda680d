"""Queue lost drain tickets again: a slot that holds events must have a ticket or a worker."""

from __future__ import annotations

import logging
import time

from aemos.lib import keys, redis
from rules.journal import pauses, slots, tickets, writing
from rules.journal.slots import Slot

log = logging.getLogger(__name__)


def reissue_lost_tickets() -> int:
    """Queues a ticket for every slot with events to do and neither a ticket nor a lease alive. Raises RedisError.

    New events of a lane that a worker listens to need none; those whose next attempt is due do.
    A ticket whose flag still stands may have died with its worker: when no job waits on any queue, there is none.
    """
    nothing_queued, paused = tickets.queued() == 0, pauses.current()
    lost = [slot for slot in slots.slots() if slot.lane not in paused and _is_lost(slot, nothing_queued=nothing_queued)]
    for slot in lost:
        log.warning("%s/%d holds events and no ticket, queueing one", slot.lane, slot.partition)
        tickets.issue(slot)
    return len(lost)


def _is_lost(slot: Slot, *, nothing_queued: bool) -> bool:
    lane, partition = slot.lane, slot.partition
    client = redis.journal_client(partition)
    with client.pipeline(transaction=False) as pipeline:
        pipeline.xlen(keys.events(lane, partition))
        pipeline.zcount(keys.delayed(lane, partition), "-inf", int(time.time() * 1000))
        pipeline.exists(keys.lease(lane, partition))
        pipeline.exists(keys.ticket(lane, partition))
        pipeline.zcount(keys.listeners(lane), int(time.time() * 1_000), "+inf")
        entries, due, leased, ticketed, listening = pipeline.execute()
    if not ((entries and not listening) or due) or leased or (ticketed and not nothing_queued):
        return False
    # Claims the slot for this ticket, so that the next look, a second from now, does not queue another.
    client.set(keys.ticket(lane, partition), "1", px=writing.TICKET_MS)
    return True
