"""Append accepted events to the streams of their slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from aemos.lib import keys
from rules import events
from rules.events import Event
from rules.journal.slots import Slot, by_client

# How long an append trusts that a ticket is on its way. A ticket lost with its worker is found sooner, by the scheduler.
TICKET_MS = 30_000

# What it does: adds one entry, counts its events, and says whether a drain ticket has to be queued: not while a worker listens.
# KEYS: stream, ledger, ticket, backlog, listeners. ARGV: number of events, entry, lifetime of the ticket flag in ms, then pairs
# of organization id and its number of events.
# Returns: 1 when the caller must queue a ticket, else 0.
_APPEND = """
redis.call('XADD', KEYS[1], '*', 'n', ARGV[1], 'b', ARGV[2])
for i = 4, #ARGV, 2 do redis.call('HINCRBY', KEYS[4], ARGV[i], ARGV[i + 1]) end
redis.call('HINCRBY', KEYS[2], 'accepted', ARGV[1])
redis.call('HINCRBY', KEYS[2], 'depth', ARGV[1])
if redis.call('EXISTS', KEYS[5]) == 1 then
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  if redis.call('ZCOUNT', KEYS[5], now, '+inf') > 0 then return 0 end
end
return redis.call('SET', KEYS[3], '1', 'NX', 'PX', ARGV[3]) and 1 or 0
"""


def append(batches: Mapping[Slot, Sequence[Event]]) -> list[Slot]:
    """Makes the events durable, one round trip per server; gives the slots that need a drain ticket. Raises RedisError."""
    needing: list[Slot] = []
    for client, mine in by_client(batches):
        with client.pipeline(transaction=False) as pipeline:
            for slot in mine:
                # EVAL, not EVALSHA: in a pipeline redis-py would first ask, in a round trip of its own, what is loaded.
                pipeline.eval(_APPEND, 5, *_append_keys(slot), *_append_args(batches[slot]))
            needing += [slot for slot, needed in zip(mine, pipeline.execute(), strict=True) if needed]
    return needing


def _append_keys(slot: Slot) -> list[str]:
    lane, partition = slot.lane, slot.partition
    named = (keys.events, keys.ledger, keys.ticket, keys.depth_by_organization)
    return [*(name(lane, partition) for name in named), keys.listeners(lane)]


def _append_args(batch: Sequence[Event]) -> list[Any]:
    organizations = Counter(event.organization_id for event in batch)
    return [len(batch), events.encode(batch), TICKET_MS, *chain.from_iterable(organizations.items())]
