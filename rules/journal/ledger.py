"""Audit the ledger, the exact counts of a slot, against its events; sum the counts of all slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aemos.lib import keys, redis
from rules.events import Lane
from rules.journal.slots import GROUP, Slot, by_client, slots

# Of Redis' maxmemory; above it nothing more is accepted.
MEMORY_SHARE = 0.85

# What it does: counts one partition in one step, the events themselves included, so that the ledger can be audited.
# KEYS: ledger, stream, delayed. ARGV: group.
# Returns: ledger as a flat list, events in the stream, of these delivered and not finished, events delayed.
_AUDIT = """
local waiting, flight, pending = 0, 0, {}
if redis.call('EXISTS', KEYS[2]) == 1 and #redis.call('XINFO', 'GROUPS', KEYS[2]) > 0 then
  for _, row in ipairs(redis.call('XPENDING', KEYS[2], ARGV[1], '-', '+', 1000000)) do pending[row[1]] = true end
end
for _, entry in ipairs(redis.call('XRANGE', KEYS[2], '-', '+')) do
  local number = tonumber(entry[2][2])
  if pending[entry[1]] then flight = flight + number else waiting = waiting + number end
end
return {redis.call('HGETALL', KEYS[1]), waiting, flight, redis.call('ZCARD', KEYS[3])}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The ledger of one slot or one lane, in events. `waiting` includes what waits for another attempt."""

    accepted: int = 0
    processed: int = 0
    duplicate: int = 0
    dead: int = 0
    depth: int = 0
    waiting: int = 0
    in_flight: int = 0

    @property
    def missing(self) -> int:
        """Accepted events that are nowhere: 0, or the ledger does not close. Negative when something was counted twice."""
        return self.accepted - self.processed - self.duplicate - self.dead - self.waiting - self.in_flight

    @property
    def closes(self) -> bool:
        return self.missing == 0 and self.depth == self.waiting + self.in_flight

    def __add__(self, other: Account) -> Account:
        return Account(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})


def audit(slot: Slot) -> Account:
    """Counts the slot's events one by one in one step of Redis and sets them beside the ledger."""
    lane, partition = slot.lane, slot.partition
    names = [keys.ledger(lane, partition), keys.events(lane, partition), keys.delayed(lane, partition)]
    flat, waiting, flight, delayed = redis.script(_AUDIT)(
        keys=names, args=[GROUP], client=redis.journal_client(partition)
    )
    counts = {name.decode(): int(count) for name, count in zip(flat[::2], flat[1::2], strict=True)}
    return Account(**counts, waiting=waiting + delayed, in_flight=flight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The counters of all slots, summed: events per lane, and the depth per organization id."""

    depth: Mapping[str, int]
    accepted: Mapping[str, int]
    ended: Mapping[str, int]
    organizations: Mapping[int, int]
    memory_full: bool

    @property
    def total(self) -> int:
        return sum(self.depth.values())


def counts() -> Counts:
    """One round trip per server, no event is counted. Raises RedisError."""
    depth, accepted, ended = (dict.fromkeys(map(str, Lane), 0) for _ in range(3))
    organizations: dict[int, int] = {}
    memory_full = False
    for client, mine in by_client(slots()):
        with client.pipeline(transaction=False) as pipeline:
            for slot in mine:
                pipeline.hgetall(keys.ledger(slot.lane, slot.partition))
                pipeline.hgetall(keys.depth_by_organization(slot.lane, slot.partition))
            pipeline.info("memory")
            *answers, memory = pipeline.execute()
        memory_full = memory_full or _is_full(memory)
        for slot, held, backlog in zip(mine, answers[::2], answers[1::2], strict=True):
            depth[slot.lane] += int(held.get(b"depth", 0))
            accepted[slot.lane] += int(held.get(b"accepted", 0))
            ended[slot.lane] += sum(int(held.get(name, 0)) for name in (b"processed", b"duplicate", b"dead"))
            for organization, number in backlog.items():
                organizations[int(organization)] = organizations.get(int(organization), 0) + int(number)
    return Counts(depth=depth, accepted=accepted, ended=ended, organizations=organizations, memory_full=memory_full)


def _is_full(memory: Mapping[str, Any]) -> bool:
    """Above this share workers still get to acknowledge; at the limit itself RQ's queues could not even be read."""
    limit = int(memory.get("maxmemory", 0))
    return limit > 0 and int(memory["used_memory"]) >= limit * MEMORY_SHARE
