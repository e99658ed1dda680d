"""The journal: events in, kept in Redis streams until a worker has finished with them; every count moves in the same step.

Per lane and partition there are a stream of entries, a sorted set of events that wait for another attempt, and the ledger:
exact counts in events, for which always accepted = processed + duplicate + dead + depth.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

from aemos.lib import keys, redis
from rules.events import Event
from rules.journal.slots import GROUP, Slot, milliseconds_of
from rules.journal.writing import TICKET_MS

# One consumer name for all workers: the lease admits one at a time, and it finds what a dead predecessor left pending.
CONSUMER = "drain"
LEASE_MS = 10_000

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

# What it does: takes the lease unless somebody holds it. The ticket flag stands with it, so that appends queue no tickets.
# KEYS: lease, ticket. ARGV: lease token, ms. Returns: 1 or 0.
_ACQUIRE = """
if not redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 0 end
redis.call('SET', KEYS[2], '1', 'PX', ARGV[2])
return 1
"""

# What it does: gives the lease back. While it was held the ticket flag stood, so that appends queued no tickets; hence it
# also says whether something arrived in the meantime.
# KEYS: lease, stream, ticket. ARGV: lease token, lifetime of the ticket flag in ms, 0 where the caller queues no ticket.
# Returns: 1 when entries are left and the caller must queue a ticket, else 0.
_RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
if ARGV[2] == '0' or redis.call('XLEN', KEYS[2]) == 0 then redis.call('DEL', KEYS[3]) return 0 end
redis.call('SET', KEYS[3], '1', 'PX', ARGV[2])
return 1
"""

# What it does: gives the caller entries that no read returns: the group is past them, and they are not pending, because Redis
# came back without what it knew of that.
# KEYS: lease, stream. ARGV: lease token, group, consumer, how many entries at most. Returns: how many became pending.
_CLAIM_STRANDED = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] or redis.call('XLEN', KEYS[2]) == 0 then return 0 end
for _, fields in ipairs(redis.call('XINFO', 'GROUPS', KEYS[2])) do
  local group = {}
  for i = 1, #fields, 2 do group[fields[i]] = fields[i + 1] end
  if group['name'] == ARGV[2] and group['pending'] == 0 then
    local entries = redis.call('XRANGE', KEYS[2], '-', group['last-delivered-id'], 'COUNT', ARGV[4])
    for _, entry in ipairs(entries) do redis.call('XCLAIM', KEYS[2], ARGV[2], ARGV[3], 0, entry[1], 'FORCE', 'JUSTID') end
    return #entries
  end
end
return 0
"""

# What it does: lengthens the lease and the ticket flag if the lease is still the caller's.
# KEYS: lease, ticket. ARGV: lease token, ms. Returns: 1 or 0.
_RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], '1', 'PX', ARGV[2])
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""


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
        self._backlog = keys.depth_by_organization(slot.lane, slot.partition)
        self._suspect = keys.checkpoint(slot.lane, slot.partition)

    def acquire(self) -> bool:
        """False when another worker drains the slot: its `release` will see what this ticket was for."""
        names = [self._lease, self._ticket]
        return bool(redis.script(_ACQUIRE)(keys=names, args=[self._token, LEASE_MS], client=self._client))

    def renew(self) -> bool:
        """False when the lease was lost."""
        self._renewed_at = time.monotonic()
        return bool(
            redis.script(_RENEW)(keys=[self._lease, self._ticket], args=[self._token, LEASE_MS], client=self._client)
        )

    def renew_if_due(self, _: Event | None) -> None:
        """Renews the lease when a third of its time has gone: called before each event of a batch that may last."""
        if time.monotonic() - self._renewed_at > LEASE_MS / 3_000:
            self.renew()

    def release(self, *, with_ticket: bool = True) -> bool:
        """Gives the slot back; True when it holds entries, for which the caller must queue a ticket.

        Without a ticket the caller, or whoever listens, looks at the slot again.
        """
        names, lifetime = [self._lease, self._stream, self._ticket], TICKET_MS if with_ticket else 0
        return bool(redis.script(_RELEASE)(keys=names, args=[self._token, lifetime], client=self._client))

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

    def begin(self, now_ms: int, *, retries: int, entries: int) -> tuple[list[bytes], list[Entry]]:
        """At most so many events whose next attempt is due, as `events.encode_retry` made them, and so many new entries.

        They stay until `finish` names them.
        """
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.zrangebyscore(self._delayed, "-inf", now_ms, start=0, num=retries)
            pipeline.xreadgroup(GROUP, CONSUMER, {self._stream: ">"}, count=entries)
            due, answer = pipeline.execute(raise_on_error=False)
        for each in (due, answer):
            if isinstance(each, Exception) and "NOGROUP" not in str(each):
                raise each
        return due, self.next(entries) if isinstance(answer, Exception) else _entries(answer)

    def claim_stranded(self, count: int) -> int:
        """After a read that gave nothing: makes up to so many entries pending that no read will ever give; their number."""
        args: list[Any] = [self._token, GROUP, CONSUMER, count]
        return int(redis.script(_CLAIM_STRANDED)(keys=[self._lease, self._stream], args=args, client=self._client))

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
        answer = int(redis.script(_FINISH)(keys=names, args=args, client=self._client))
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
        return _entries(answer)


def _entries(answer: Any) -> list[Entry]:
    rows = answer[0][1] if answer else []
    return [Entry(id=identifier, data=fields[b"b"], count=int(fields[b"n"])) for identifier, fields in rows]
