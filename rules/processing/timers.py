"""Timers: put an event into the journal when a condition may become true by the passing of time alone.

A run says when its outcome may change although a source stays silent; that time stands in a sorted set of Redis until the
scheduler puts an event of the source, without values, into the journal for this one chain. The event's id follows from chain,
source and time, so a crash in between brings the same one again, and its effects happen once. A time that is too early costs
a run that changes nothing; so times are set by every run and taken back by none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import NamedTuple
from uuid import UUID, uuid5

from django.utils import timezone

from aemos.lib import keys, redis
from rules import events
from rules.engine.bound import DeployedChain
from rules.engine.chains import Chain
from rules.engine.values import Source
from rules.events import Event, EventType, Lane
from rules.journal import slots
from rules.processing import index, synthetic

log = logging.getLogger(__name__)
TIMERS_PER_TICK = 2_000
LOOK_EVERY_SECONDS = 10

# What it does: parks timers whose event is in the journal, unless a run has set them anew meanwhile: they stand at inf, known
# and with nothing to wait for.
# KEYS: timers. ARGV: pairs of member and the due time in ms that was fired. Returns: nothing of interest.
_PARK = """
for i = 1, #ARGV, 2 do
  local due = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if due and tonumber(due) == tonumber(ARGV[i + 1]) then redis.call('ZADD', KEYS[1], 'inf', ARGV[i]) end
end
"""


class Waiting(NamedTuple):
    """A chain that waits for time to pass over a source. `conditions` identifies its conditions over time: an edit changes it."""

    chain_uuid: str
    conditions: str
    source_type: str
    uuid: str

    @property
    def source(self) -> Source:
        return self.source_type, self.uuid

    def __str__(self) -> str:
        return "|".join(self)


def of(chain: Chain, source: Source) -> Waiting:
    return Waiting(chain.spec.uuid, chain.timers_key, *source)


def remember(wakes: Mapping[Waiting, int]) -> None:
    """Sets when, in microseconds since 1970, the scheduler has to look at each again. Raises RedisError."""
    if wakes:
        # Rounded up, or the run would come a little too early and ask for the same time again.
        redis.client().zadd(keys.TIMERS, {str(waiting): -(-due_us // 1_000) for waiting, due_us in wakes.items()})


def fire_due() -> int:
    """Puts an event into the journal for every timer that is due; a periodic task of the scheduler, called every second.

    Gives their number. Raises RedisError or django.db.Error; what was not done then stays due.
    """
    look_for_new()
    _look_at_stirred()
    ready = _ready()
    if not ready:
        return 0
    fired = {waiting: _event(waiting, due_ms) for waiting, due_ms in ready.items()}
    refusal = synthetic.refusal()
    if refusal:
        log.warning("%d timers wait: %s", len(fired), refusal.detail)
        return 0
    synthetic.append(list(fired.values()))
    parked = [part for waiting, due_ms in ready.items() for part in (str(waiting), due_ms)]
    redis.client().eval(_PARK, 1, keys.TIMERS, *parked)
    return len(fired)


def _ready() -> dict[Waiting, int]:
    """Timers to fire now with their times, the earliest first; drops those of chains that are gone.

    Looks past those that are held back: the timers of a partition that is stuck must not keep the others waiting.
    """
    index.shared().refresh()
    found: dict[Waiting, int] = {}
    gone: list[Waiting] = []
    oldest: dict[int, float] = {}
    seen = 0
    now_ms = int(time.time() * 1_000)
    while len(found) < TIMERS_PER_TICK and (due := _due(now_ms, after=seen)):
        seen += len(due)
        gone += [waiting for waiting in due if _chain(waiting) is None]
        found |= _not_overtaken({waiting: at_ms for waiting, at_ms in due.items() if _chain(waiting)}, oldest)
    if gone:
        redis.client().zrem(keys.TIMERS, *map(str, gone))
    return found


def _due(now_ms: int, *, after: int) -> dict[Waiting, int]:
    """The next of those that are due, beginning behind so many."""
    rows = redis.client().zrangebyscore(keys.TIMERS, "-inf", now_ms, start=after, num=TIMERS_PER_TICK, withscores=True)
    return {Waiting(*member.decode().split("|")): int(due_ms) for member, due_ms in rows}


def look_for_new() -> None:
    """Sets a timer for chains that have none: new ones, changed ones, and all when Redis was emptied."""
    if not redis.client().set(keys.TIMERS_SCAN_LOCK, "1", nx=True, ex=LOOK_EVERY_SECONDS):
        return
    index.shared().refresh()
    now_ms = int(time.time() * 1_000)
    wanted = {str(of(bound.compiled, timer.source)): now_ms for bound in index.shared() for timer in bound.timers}
    if wanted:
        redis.client().zadd(keys.TIMERS, wanted, nx=True)


def _look_at_stirred() -> None:
    """Has chains looked at that wait for time to pass over devices whose state changed: see devices.latest."""
    members = redis.client().smembers(keys.TIMERS_DIRTY)
    if not members:
        return
    stirred = {tuple(member.decode().split("|")) for member in members}
    index.shared().refresh()
    now_ms = int(time.time() * 1_000)
    wanted = {
        str(of(bound.compiled, timer.source)): now_ms
        for bound in index.shared()
        for timer in bound.timers
        if timer.source in stirred
    }
    if wanted:
        redis.client().zadd(keys.TIMERS, wanted)
    # What is stirred in between is in the database by then, too: the runs come later than this.
    redis.client().srem(keys.TIMERS_DIRTY, *members)


def _chain(waiting: Waiting) -> DeployedChain | None:
    """The chain, if it is still there, switched on, and waits for the same."""
    bound = index.shared().by_uuid(waiting.chain_uuid)
    return bound if bound and bound.timers and bound.compiled.timers_key == waiting.conditions else None


def _not_overtaken(due: Mapping[Waiting, int], oldest: dict[int, float]) -> dict[Waiting, int]:
    """Without those whose source has older events in the queue: what it said must not count as silence.

    `oldest` is filled with what was asked for, by partition.
    """
    found = {}
    for waiting, due_ms in due.items():
        partition = slots.partition_of(waiting.uuid)
        if partition not in oldest:
            oldest[partition] = _oldest_ms(partition)
        if oldest[partition] > due_ms:
            found[waiting] = due_ms
    return found


def _oldest_ms(partition: int) -> float:
    """When the oldest event of the partition was accepted that is not processed; infinity when there is none."""
    client = redis.journal_client(partition)
    with client.pipeline(transaction=False) as pipeline:
        for lane in Lane:
            pipeline.xrange(keys.events(lane, partition), count=1)
        answers = pipeline.execute()
    return min((slots.milliseconds_of(rows[0][0]) for rows in answers if rows), default=float("inf"))


def _event(waiting: Waiting, due_ms: int) -> Event:
    bound = _chain(waiting)
    assert bound is not None  # noqa: S101  fire_due has looked
    return Event(
        id=str(uuid5(UUID(waiting.chain_uuid), f"{waiting}|{due_ms}")),
        type=EventType.SCHEDULED,
        priority=synthetic.PRIORITY,
        source_type=waiting.source_type,
        originator_uuid=waiting.uuid,
        organization_id=bound.organization_id,
        values={},
        timestamp_us=due_ms * 1_000,
        received_us=events.microseconds(timezone.now()),
        protocol=events.TIMER,
        chains=(waiting.chain_uuid,),
    )
