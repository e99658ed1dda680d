"""Let a worker wait for the journal itself: a ticket would take longer than the event.

A worker that listens to a lane stands in a set, and while somebody does, an append needs no ticket (rules.journal.writing). A
worker that turns to something else leaves the set, and then queues the tickets that are missing. What a worker leaves behind that
dies here is found by the scheduler, as it finds lost tickets.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import NamedTuple

from aemos.lib import keys, redis
from rules.events import Lane
from rules.journal.pauses import PAUSABLE
from rules.journal.slots import Slot, milliseconds_of, slots
from rules.journal.tickets import BUDGET_SECONDS

ENTER_EVERY_SECONDS = 0.5
# Longer than that; a worker that was killed counts as listening for this long.
LISTENER_MS = 1_500
# A slot from which few events came rests before its next turn, so that what arrives meanwhile shares a transaction, which costs
# as much as a hundred events. After a single event it does not: it may be all there is.
REST_SECONDS = 0.03
FEW_EVENTS = 200

# What it does: enters a listener for a while, by the server's clock, which is the one that appends go by.
# KEYS: listeners. ARGV: name, for how many ms. Returns: nothing of interest.
_ENTER = """
local time = redis.call('TIME')
for _, key in ipairs(KEYS) do
  redis.call('ZADD', key, time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[2], ARGV[1])
end
"""


class _Seen(NamedTuple):
    """The oldest entry of a slot, and whether a worker has the slot or a ticket for it is queued."""

    slot: Slot
    oldest: bytes | None
    attended: bool

    def urgency(self, now_ms: int) -> float:
        """How much of its lane's budget the oldest event has used."""
        assert self.oldest is not None  # noqa: S101  only asked of slots that hold events
        return (now_ms - milliseconds_of(self.oldest)) / BUDGET_SECONDS[Lane(self.slot.lane)]


class Listener:
    """One worker, by its name, and the lanes that it serves. Every method raises RedisError."""

    def __init__(self, name: str, lanes: Collection[str]) -> None:
        self._name = name
        self._keys = [keys.listeners(lane) for lane in lanes]
        self._slots = [slot for slot in slots() if slot.lane in lanes]
        self._entered_at = float("-inf")
        self._rests_until: dict[Slot, float] = {}

    def next(self, *, until: float) -> Slot | None:
        """The slot to drain now, critical ones first, then the one whose oldest event has used most of its lane's budget; none of
        a lane that is paused.

        Waits for events until this time, on the monotonic clock; None when it has come. Tell `drained` before the next call.
        """
        while (now := time.monotonic()) < until and self._slots:
            if now - self._entered_at > ENTER_EVERY_SECONDS:
                redis.client().eval(_ENTER, len(self._keys), *self._keys, self._name, LISTENER_MS)
                self._entered_at = now
            seen = self._look()
            free = [each for each in seen if each.oldest and not each.attended]
            if ready := [each for each in free if self._rests_until.get(each.slot, 0.0) <= now]:
                now_ms = int(time.time() * 1_000)
                return max(ready, key=lambda each: (each.slot.lane == Lane.CRITICAL, each.urgency(now_ms))).slot
            if free:
                rested = min(self._rests_until[each.slot] for each in free)
                time.sleep(max(min(rested, until) - now, 0.0))
            else:
                self._wait(seen, seconds=until - now)
        return None

    def drained(self, slot: Slot, *, events: int) -> None:
        """`events` came from it."""
        if 1 < events < FEW_EVENTS:
            self._rests_until[slot] = time.monotonic() + REST_SECONDS
        else:
            self._rests_until.pop(slot, None)

    def leave(self) -> list[Slot]:
        """Gives the slots that hold events and need a ticket now: what was appended while this worker listened has none."""
        self._entered_at = float("-inf")
        with redis.client().pipeline(transaction=False) as pipeline:
            for key in self._keys:
                pipeline.zrem(key, self._name)
            pipeline.execute()
        return [each.slot for each in self._look() if each.oldest and not each.attended]

    def _look(self) -> list[_Seen]:
        if not self._slots:
            return []
        with redis.journal_client(0).pipeline(transaction=False) as pipeline:
            for slot in self._slots:
                pipeline.xrange(keys.events(slot.lane, slot.partition), count=1)
                pipeline.exists(keys.lease(slot.lane, slot.partition), keys.ticket(slot.lane, slot.partition))
            for lane in PAUSABLE:
                pipeline.exists(keys.paused(lane))
            *answers, normal, low = pipeline.execute()
        paused = {lane for lane, is_paused in zip(PAUSABLE, (normal, low), strict=True) if is_paused}
        return [
            _Seen(slot, entries[0][0] if entries else None, bool(attended))
            for slot, entries, attended in zip(self._slots, answers[::2], answers[1::2], strict=True)
            if slot.lane not in paused
        ]

    def _wait(self, seen: Collection[_Seen], *, seconds: float) -> None:
        """Until something arrives where nothing was: whoever attends to the others sees what arrives there."""
        # No entry of an empty stream was seen, and those before are gone.
        empty = {keys.events(each.slot.lane, each.slot.partition): "0-0" for each in seen if each.oldest is None}
        if empty:
            redis.blocking_client().xread(empty, count=1, block=max(1, int(seconds * 1_000)))
        else:
            time.sleep(min(seconds, REST_SECONDS))
