"""Let a worker that has nothing to do wait for the journal itself: a ticket would take longer than the event.

A worker that listens stands in a set, and while somebody does, an append needs no ticket (rules.journal.writing). It leaves the
set before it looks at all slots, so it sees what was appended without a ticket in between. The scheduler finds what is left by a
worker that dies here, as it finds lost tickets.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from aemos.lib import keys, redis
from rules.journal.slots import Slot, slots

LISTEN_SECONDS = 0.5
# Longer than one wait; a worker that was killed counts as listening for this long.
LISTENER_MS = 1_500

# What it does: enters a listener for a while, by the server's clock, which is the one that appends go by.
# KEYS: listeners. ARGV: name, for how many ms. Returns: nothing of interest.
_ENTER = """
local time = redis.call('TIME')
redis.call('ZADD', KEYS[1], time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[2], ARGV[1])
"""


class Listener:
    """One worker, by its name, and the lanes that it serves."""

    def __init__(self, name: str, lanes: Collection[str]) -> None:
        self._name = name
        self._slots = [slot for slot in slots() if slot.lane in lanes]

    def wait(self) -> Slot | None:
        """The slot of the first event that arrives; None when none has for half a second. Raises RedisError.

        Whatever it gives, `unattended` is to be asked after it until that has nothing.
        """
        if not self._slots:
            time.sleep(LISTEN_SECONDS)
            return None
        redis.client().eval(_ENTER, 1, keys.LISTENERS, self._name, LISTENER_MS)
        try:
            return self._wait()
        finally:
            redis.client().zrem(keys.LISTENERS, self._name)

    def _wait(self) -> Slot | None:
        looked = self._look()
        if free := [slot for slot, (_, is_free) in looked.items() if is_free]:
            return free[0]
        streams = {keys.events(slot.lane, slot.partition): newest for slot, (newest, _) in looked.items()}
        answer = redis.blocking_client().xread(streams, count=1, block=int(LISTEN_SECONDS * 1_000))
        heard = {name.decode() for name, _ in answer}
        return next((slot for slot in self._slots if keys.events(slot.lane, slot.partition) in heard), None)

    def unattended(self) -> Slot | None:
        """The first slot with events for which neither a ticket nor a worker is there. Raises RedisError."""
        return next((slot for slot, (_, is_free) in self._look().items() if is_free), None)

    def _look(self) -> dict[Slot, tuple[bytes, bool]]:
        """Of each slot the id of its newest entry, and whether it holds any that nobody attends to."""
        with redis.journal_client(0).pipeline(transaction=False) as pipeline:
            for slot in self._slots:
                pipeline.xrevrange(keys.events(slot.lane, slot.partition), count=1)
                pipeline.exists(keys.lease(slot.lane, slot.partition), keys.ticket(slot.lane, slot.partition))
            answers = pipeline.execute()
        found = {}
        for slot, entries, attended in zip(self._slots, answers[::2], answers[1::2], strict=True):
            # An empty stream is asked for whatever comes: no entry of it was seen, and those before are gone.
            found[slot] = (entries[0][0] if entries else b"0-0", bool(entries) and not attended)
        return found
