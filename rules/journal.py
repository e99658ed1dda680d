"""The journal: events in, kept in Redis streams until a worker has finished with them; every count moves in the same step.

Per lane and partition there are a stream of entries, a sorted set of events that wait for another attempt, and the ledger:
exact counts in events, for which always accepted = processed + duplicate + dead + depth.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

from django.conf import settings
from redis.commands.core import Script
from redis.exceptions import ResponseError

from aemos.lib import keys, redis
from rules import events
from rules.events import Event, Lane

GROUP = "drain"
# One consumer name for all workers: the lease admits one at a time, and it finds what a dead predecessor left pending.
CONSUMER = "drain"
# How long an append trusts that a ticket is on its way. A ticket lost with its worker is found sooner, by the scheduler.
TICKET_MS = 30_000
LEASE_MS = 10_000
# Of Redis' maxmemory; above it nothing more is accepted.
MEMORY_SHARE = 0.85

# What it does: adds one entry, counts its events, and says whether a drain ticket has to be queued.
# KEYS: stream, ledger, ticket, backlog. ARGV: number of events, entry, lifetime of the ticket flag in ms, then pairs of
# organization id and its number of events.
# Returns: 1 when the caller must queue a ticket, else 0.
_APPEND = """
redis.call('XADD', KEYS[1], '*', 'n', ARGV[1], 'b', ARGV[2])
for i = 4, #ARGV, 2 do redis.call('HINCRBY', KEYS[4], ARGV[i], ARGV[i + 1]) end
redis.call('HINCRBY', KEYS[2], 'accepted', ARGV[1])
redis.call('HINCRBY', KEYS[2], 'depth', ARGV[1])
return redis.call('SET', KEYS[3], '1', 'NX', 'PX', ARGV[3]) and 1 or 0
"""

# What it does: ends entries and due retries, files events that wait for another attempt, moves the counts, and keeps what
# conditions over time remember; all or nothing, and nothing when the caller has lost the lease meanwhile, or when what is
# remembered is not what the caller had read: the other lane of the same source was faster.
# KEYS: stream, ledger, lease, delayed, backlog, then what is remembered... ARGV: lease token, group, processed, duplicate, dead,
# number of entry ids, ids..., number of finished retries, their bytes..., number of organizations, pairs of their id and ended
# events..., number of delayed events, pairs of due time in ms and bytes..., then per remembered key what was read ('' for
# nothing), what is to be kept, and for how many ms.
# Returns: 1; 0 when the lease was lost; -1 when something else is remembered by now.
_FINISH = """
if redis.call('GET', KEYS[3]) ~= ARGV[1] then return 0 end
local at = 6
local function rows(width)
  local first = at + 1
  at = at + 1 + tonumber(ARGV[at]) * width
  return first, at - 1
end
local entries, last_entry = rows(1)
local retries, last_retry = rows(1)
local organizations, last_organization = rows(2)
local delayed, last_delayed = rows(2)
for i = 6, #KEYS do
  if (redis.call('GET', KEYS[i]) or '') ~= ARGV[at + (i - 6) * 3] then return -1 end
end
for i = entries, last_entry do
  redis.call('XACK', KEYS[1], ARGV[2], ARGV[i])
  redis.call('XDEL', KEYS[1], ARGV[i])
end
for i = retries, last_retry do redis.call('ZREM', KEYS[4], ARGV[i]) end
for i = organizations, last_organization, 2 do redis.call('HINCRBY', KEYS[5], ARGV[i], -ARGV[i + 1]) end
for i = delayed, last_delayed, 2 do redis.call('ZADD', KEYS[4], ARGV[i], ARGV[i + 1]) end
for i = 6, #KEYS do
  local own = at + (i - 6) * 3
  redis.call('SET', KEYS[i], ARGV[own + 1], 'PX', ARGV[own + 2])
end
local ended = 0
for i, name in ipairs({'processed', 'duplicate', 'dead'}) do
  local number = tonumber(ARGV[i + 2])
  if number > 0 then redis.call('HINCRBY', KEYS[2], name, number) end
  ended = ended + number
end
-- An empty slot holds nothing of anybody's: whatever was left of an entry that could not be read goes here. Nothing ends in
-- a batch that is tried again as a whole, and minus 0 is no integer to Redis.
if ended > 0 and redis.call('HINCRBY', KEYS[2], 'depth', -ended) <= 0 then redis.call('DEL', KEYS[5]) end
return 1
"""

# What it does: gives the lease back. While it was held the ticket flag stood, so that appends queued no tickets; hence it
# also says whether something arrived in the meantime.
# KEYS: lease, stream, ticket. ARGV: lease token, lifetime of the ticket flag in ms.
# Returns: 1 when entries are left and the caller must queue a ticket, else 0.
_RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
if redis.call('XLEN', KEYS[2]) == 0 then redis.call('DEL', KEYS[3]) return 0 end
redis.call('SET', KEYS[3], '1', 'PX', ARGV[2])
return 1
"""

# What it does: lengthens the lease and the ticket flag if the lease is still the caller's.
# KEYS: lease, ticket. ARGV: lease token, ms. Returns: 1 or 0.
_RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], '1', 'PX', ARGV[2])
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

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


@dataclass(frozen=True, slots=True)
class Slot:
    """One lane of one partition: the unit of order, of leases and of tickets."""

    lane: str
    partition: int


def slots() -> Iterator[Slot]:
    for lane in Lane:
        for partition in range(settings.EVENT_PARTITIONS):
            yield Slot(lane, partition)


def partition_of(originator_uuid: str) -> int:
    """Always the same for one originator, so that its events stay in order."""
    return zlib.crc32(originator_uuid.encode()) % settings.EVENT_PARTITIONS


def slot_of(event: Event) -> Slot:
    return Slot(event.lane, partition_of(event.originator_uuid))


def by_slot(batch: Iterable[Event]) -> dict[Slot, list[Event]]:
    """The events in their order, as `append` takes them."""
    found: dict[Slot, list[Event]] = {}
    for event in batch:
        found.setdefault(slot_of(event), []).append(event)
    return found


def by_client(wanted: Iterable[Slot]) -> Iterable[tuple[redis.Client, list[Slot]]]:
    """The slots of each server, so that one round trip asks for all of them."""
    found: dict[redis.Client, list[Slot]] = {}
    for slot in wanted:
        found.setdefault(redis.journal_client(slot.partition), []).append(slot)
    return found.items()


def milliseconds_of(entry_id: bytes) -> int:
    """When the entry of a stream was added, in ms since 1970 by the clock of its server."""
    return int(entry_id.partition(b"-")[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What was read from the journal in one piece; `count` is its events."""

    id: bytes
    data: bytes
    count: int


@dataclass(slots=True, kw_only=True)
class Finished:
    """How the events of a batch ended, to be acknowledged in one step. Counts are events; `organizations` by id."""

    entry_ids: list[bytes] = field(default_factory=list)
    retries: list[bytes] = field(default_factory=list)
    processed: int = 0
    duplicate: int = 0
    dead: int = 0
    organizations: Mapping[int, int] = field(default_factory=dict)
    delayed: list[tuple[int, bytes]] = field(default_factory=list)
    remembered: list[ConditionStateUpdate] = field(default_factory=list)


class ConditionStateUpdate(NamedTuple):
    """The new state of a condition over time under a key of Redis, and the state that it was computed from."""

    key: str
    was: bytes
    value: bytes
    lifetime_ms: int


class StateConflict(Exception):
    """The state in Redis is not the one that was read: the other lane of the same source has changed it. Nothing was finished."""


def append(batches: Mapping[Slot, Sequence[Event]]) -> list[Slot]:
    """Makes the events durable, one round trip per server; gives the slots that need a drain ticket. Raises RedisError."""
    needing: list[Slot] = []
    for client, mine in by_client(batches):
        with client.pipeline(transaction=False) as pipeline:
            for slot in mine:
                # EVAL, not EVALSHA: in a pipeline redis-py would first ask, in a round trip of its own, what is loaded.
                pipeline.eval(_APPEND, 4, *_append_keys(slot), *_append_args(batches[slot]))
            needing += [slot for slot, needed in zip(mine, pipeline.execute(), strict=True) if needed]
    return needing


def _append_keys(slot: Slot) -> list[str]:
    lane, partition = slot.lane, slot.partition
    named = (keys.events, keys.ledger, keys.ticket, keys.backlog)
    return [name(lane, partition) for name in named]


def _append_args(batch: Sequence[Event]) -> list[Any]:
    organizations = Counter(event.organization_id for event in batch)
    return [len(batch), events.encode(batch), TICKET_MS, *chain.from_iterable(organizations.items())]


@cache
def _script(source: str) -> Script:
    return Script(redis.client(), source)


class Lease:
    """The right to drain one slot, held by one worker at a time; every finish is fenced by its token."""

    def __init__(self, slot: Slot, token: str) -> None:
        self.slot = slot
        self._token = token
        self._renewed_at = time.monotonic()
        self._client = redis.journal_client(slot.partition)
        self._stream = keys.events(slot.lane, slot.partition)
        self._delayed = keys.delayed(slot.lane, slot.partition)
        self._lease = keys.lease(slot.lane, slot.partition)
        self._ledger = keys.ledger(slot.lane, slot.partition)
        self._ticket = keys.ticket(slot.lane, slot.partition)
        self._backlog = keys.backlog(slot.lane, slot.partition)
        self._suspect = keys.suspect(slot.lane, slot.partition)

    def acquire(self) -> bool:
        """False when another worker drains the slot: its `release` will see what this ticket was for."""
        return bool(self._client.set(self._lease, self._token, nx=True, px=LEASE_MS))

    def renew(self) -> bool:
        """False when the lease was lost."""
        self._renewed_at = time.monotonic()
        return bool(
            _script(_RENEW)(keys=[self._lease, self._ticket], args=[self._token, LEASE_MS], client=self._client)
        )

    def renew_if_due(self, _: Event | None) -> None:
        """Renews the lease when a third of its time has gone: called before each event of a batch that may last."""
        if time.monotonic() - self._renewed_at > LEASE_MS / 3_000:
            self.renew()

    def release(self) -> bool:
        """Gives the slot back; True when it holds entries, for which the caller must queue a ticket."""
        names = [self._lease, self._stream, self._ticket]
        return bool(_script(_RELEASE)(keys=names, args=[self._token, TICKET_MS], client=self._client))

    def oldest_ms(self) -> int | None:
        """When the oldest entry was appended, in ms since 1970; None when there is none."""
        first = self._client.xrange(self._stream, count=1)
        return milliseconds_of(first[0][0]) if first else None

    def next_pending(self, after: bytes = b"0") -> Entry | None:
        """The first entry after this one that a worker was given and did not finish."""
        found = self._read(after.decode(), 1)
        return found[0] if found else None

    def deliveries(self, entry: Entry) -> int:
        """How often the entry was given to a worker that did not finish it."""
        rows = self._client.xpending_range(self._stream, GROUP, entry.id, entry.id, 1)
        return int(rows[0]["times_delivered"]) if rows else 0

    def next(self, count: int) -> list[Entry]:
        return self._read(">", count)

    def due(self, now_ms: int, count: int) -> list[bytes]:
        """Events whose next attempt is due, as `events.encode_retry` made them. They stay until `finish` names them."""
        found: list[bytes] = self._client.zrangebyscore(self._delayed, "-inf", now_ms, start=0, num=count)
        return found

    def checkpoint(self, event_id: str, *, deaths: int) -> None:
        """Records the event that is decided next and how many workers have died on it, in case this one dies on it, too."""
        self._client.set(self._suspect, f"{deaths} {event_id}")

    def last_checkpoint(self) -> tuple[str, int]:
        """The event on which a worker died and how many have by now; empty and 0 when there was none."""
        deaths, _, event_id = (self._client.get(self._suspect) or b"").decode().partition(" ")
        return (event_id, int(deaths) + 1) if event_id else ("", 0)

    def clear_checkpoint(self) -> None:
        self._client.delete(self._suspect)

    def finish(self, finished: Finished) -> bool:
        """Ends a batch in one step; False when the lease was lost, in which case nothing changed. Raises StateConflict."""
        args: list[Any] = [self._token, GROUP, finished.processed, finished.duplicate, finished.dead]
        args += [len(finished.entry_ids), *finished.entry_ids, len(finished.retries), *finished.retries]
        args += [len(finished.organizations), *chain.from_iterable(finished.organizations.items())]
        args += [len(finished.delayed), *chain.from_iterable(finished.delayed)]
        args += chain.from_iterable(each[1:] for each in finished.remembered)
        names = [self._stream, self._ledger, self._lease, self._delayed, self._backlog]
        names += [each.key for each in finished.remembered]
        answer = int(_script(_FINISH)(keys=names, args=args, client=self._client))
        if answer < 0:
            raise StateConflict
        return bool(answer)

    def _read(self, position: str, count: int) -> list[Entry]:
        try:
            answer = self._client.xreadgroup(GROUP, CONSUMER, {self._stream: position}, count=count)
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self._client.xgroup_create(self._stream, GROUP, id="0", mkstream=True)
            return self._read(position, count)
        rows = answer[0][1] if answer else []
        return [Entry(id=identifier, data=fields[b"b"], count=int(fields[b"n"])) for identifier, fields in rows]


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
    flat, waiting, flight, delayed = _script(_AUDIT)(keys=names, args=[GROUP], client=redis.journal_client(partition))
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
                pipeline.hgetall(keys.backlog(slot.lane, slot.partition))
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
