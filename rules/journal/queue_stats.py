"""Exact numbers of what the journal holds per lane, and which workers are alive.

Measured on demand, in one step of Redis per slot and one round trip per server; nothing on the path of an event waits for it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rq.job import Job
from rq.suspension import WORKERS_SUSPENDED
from rq.worker import Worker as RqWorker

from aemos.lib import keys, redis
from rules.events import Lane
from rules.journal.slots import GROUP, Slot, by_client, milliseconds_of, slots
from rules.journal.tickets import DRAIN

STATES = ("busy", "idle", "suspended")
# RQ lets a worker's key live this much longer than until its next heartbeat is due.
RQ_GRACE_MS = 60_000

# What it does: counts one slot in one step. KEYS: ledger, stream, delayed. ARGV: group.
# Returns: ledger as a flat list, events delivered and not finished, events delayed, id of the oldest entry or ''.
_MEASURE = """
local active = 0
local pending = redis.pcall('XPENDING', KEYS[2], ARGV[1])
if not pending.err and pending[1] > 0 then
  -- What is delivered and not finished lies together at the head of the stream.
  for _, entry in ipairs(redis.call('XRANGE', KEYS[2], pending[2], pending[3])) do
    active = active + tonumber(entry[2][2])
  end
end
local oldest = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1]
return {redis.call('HGETALL', KEYS[1]), active, redis.call('ZCARD', KEYS[3]), oldest and oldest[1] or ''}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneLoad:
    """One lane, in events. Pending: waiting + active + delayed = accepted - completed - failed.

    `waiting` for their first attempt, `active` with a worker, `delayed` until their next attempt; `completed` includes
    duplicates, `failed` are dead letters. `oldest_age_seconds` is None without an event that waits or is active.
    """

    accepted: int = 0
    waiting: int = 0
    active: int = 0
    delayed: int = 0
    completed: int = 0
    failed: int = 0
    oldest_age_seconds: float | None = None

    @property
    def pending(self) -> int:
        return self.waiting + self.active + self.delayed

    def __add__(self, other: LaneLoad) -> LaneLoad:
        ages = [age for age in (self.oldest_age_seconds, other.oldest_age_seconds) if age is not None]
        return LaneLoad(
            accepted=self.accepted + other.accepted,
            waiting=self.waiting + other.waiting,
            active=self.active + other.active,
            delayed=self.delayed + other.delayed,
            completed=self.completed + other.completed,
            failed=self.failed + other.failed,
            oldest_age_seconds=max(ages, default=None),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A living worker; `lane` and `partition` are None unless it drains a slot."""

    name: str
    state: str
    lane: str | None
    partition: int | None
    last_heartbeat: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """All lanes, and all workers that live."""

    lanes: Mapping[str, LaneLoad]
    workers: Sequence[Worker]

    @property
    def total(self) -> LaneLoad:
        return sum(self.lanes.values(), LaneLoad())

    @property
    def workers_by_state(self) -> dict[str, int]:
        return {state: sum(worker.state == state for worker in self.workers) for state in STATES}


def measure() -> Load:
    """Raises RedisError."""
    return Load(lanes=_lanes(), workers=_workers())


def _lanes() -> dict[str, LaneLoad]:
    lanes = {str(lane): LaneLoad() for lane in Lane}
    for client, mine in by_client(slots()):
        with client.pipeline(transaction=False) as pipeline:
            # By the clock of the server, which also gave the entries their ids.
            pipeline.time()
            for slot in mine:
                names = (keys.ledger, keys.events, keys.delayed)
                pipeline.eval(_MEASURE, 3, *(name(slot.lane, slot.partition) for name in names), GROUP)
            (seconds, microseconds), *answers = pipeline.execute()
        for slot, answer in zip(mine, answers, strict=True):
            lanes[slot.lane] += _slot_load(answer, now_ms=seconds * 1000 + microseconds // 1000)
    return lanes


def _slot_load(answer: Sequence[Any], *, now_ms: int) -> LaneLoad:
    flat, active, delayed, oldest = answer
    ledger = {name.decode(): int(count) for name, count in zip(flat[::2], flat[1::2], strict=True)}
    age_ms = max(now_ms - milliseconds_of(oldest), 0) if oldest else None
    return LaneLoad(
        accepted=ledger.get("accepted", 0),
        waiting=max(ledger.get("depth", 0) - active - delayed, 0),
        active=active,
        delayed=delayed,
        completed=ledger.get("processed", 0) + ledger.get("duplicate", 0),
        failed=ledger.get("dead", 0),
        oldest_age_seconds=None if age_ms is None else age_ms / 1000,
    )


def _workers() -> list[Worker]:
    """Straight from RQ's keys: its registries clean up while they count, and what one process cleans another still reads."""
    client = redis.client()
    names = sorted(client.smembers(RqWorker.redis_workers_keys))
    with client.pipeline(transaction=False) as pipeline:
        pipeline.exists(WORKERS_SUSPENDED)
        for name in names:
            pipeline.pttl(name)
            pipeline.hmget(name, "state", "current_job", "last_heartbeat")
        suspended, *answers = pipeline.execute()
    # A worker that missed its heartbeat is dead, although RQ keeps its name for another minute.
    alive = [
        (name, fields)
        for name, ttl_ms, fields in zip(names, answers[::2], answers[1::2], strict=True)
        if ttl_ms > RQ_GRACE_MS
    ]
    jobs = _slots_of([fields[1] for _, fields in alive])
    return [
        _worker(name, fields, slot=slot, suspended=bool(suspended))
        for (name, fields), slot in zip(alive, jobs, strict=True)
    ]


def _worker(name: bytes, fields: Sequence[bytes | None], *, slot: Slot | None, suspended: bool) -> Worker:
    state, job, heartbeat = fields
    shown = "busy" if state == b"busy" or job else "suspended" if suspended or state == b"suspended" else "idle"
    return Worker(
        name=name.decode().removeprefix(RqWorker.redis_worker_namespace_prefix),
        state=shown,
        lane=slot.lane if slot else None,
        partition=slot.partition if slot else None,
        last_heartbeat=datetime.fromisoformat(heartbeat.decode()) if heartbeat else None,
    )


def _slots_of(job_ids: Sequence[bytes | None]) -> list[Slot | None]:
    """What each job drains; None without a job, and for jobs that drain nothing or have ended meanwhile."""
    with redis.client().pipeline(transaction=False) as pipeline:
        for job_id in job_ids:
            pipeline.hget(Job.redis_job_namespace_prefix.encode() + (job_id or b""), "data")
        return [_slot_of(data) for data in pipeline.execute()]


def _slot_of(data: bytes | None) -> Slot | None:
    try:
        function, _, args, _ = json.loads(zlib.decompress(data or b""))
        return Slot(str(args[0]), int(args[1])) if function == DRAIN else None
    except (zlib.error, ValueError, TypeError, IndexError):
        return None
