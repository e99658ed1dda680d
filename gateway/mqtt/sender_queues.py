"""The order in which messages of devices are taken: one queue for each sender. Pure: no Django, no broker."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import islice


@dataclass(slots=True, eq=False)
class Arrival:
    """A message as the broker gave it. `connection` counts connections: it can be acknowledged over that one only. `dup`: the
    broker has sent it before, over this connection or the one before it. `trace` is its sender's traceparent, if any.
    """

    topic: str
    payload: bytes
    mid: int
    qos: int
    connection: int
    retained: bool = False
    dup: bool = False
    trace: str = ""
    attempts: int = 0
    held_since: float = field(default_factory=time.monotonic)

    @property
    def sender(self) -> str:
        """What order is kept by: all that one originator says."""
        return self.topic


class SenderQueues:
    """Arrivals by sender, each sender's in order: the next ones are given only when those before them are done.

    What one sender has to wait for, a retry for example, holds up nobody else. Times are in seconds of any one clock.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Arrival]] = {}
        self._given: dict[str, int] = {}
        self._retry_at: dict[str, float] = {}
        self._ready: deque[str] = deque()
        self._delayed: list[tuple[float, int, str]] = []
        self._order = itertools.count()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, arrival: Arrival) -> None:
        waiting = self._queues.get(arrival.sender)
        if waiting is None:
            waiting = self._queues[arrival.sender] = deque()
            self._ready.append(arrival.sender)
        waiting.append(arrival)
        self._size += 1

    def next(self, now: float, maximum: int = 1) -> list[Arrival]:
        """The next arrivals of one sender that may be tried now, in order; empty when there are none.

        For each of them `done`, `again` or `unused` must follow before the sender has another turn. When one is to be tried
        again, so are those after it.
        """
        while self._delayed and self._delayed[0][0] <= now:
            self._ready.append(heapq.heappop(self._delayed)[2])
        if not self._ready:
            return []
        sender = self._ready.popleft()
        given = list(islice(self._queues[sender], maximum))
        self._given[sender] = len(given)
        return given

    def done(self, arrival: Arrival) -> None:
        self._queues[arrival.sender].remove(arrival)  # the first, unless one before it is tried again
        self._size -= 1
        self._settle(arrival.sender)

    def again(self, arrival: Arrival, *, at: float) -> None:
        self._retry_at.setdefault(arrival.sender, at)
        self._settle(arrival.sender)

    def unused(self, arrival: Arrival) -> None:
        """Was not tried, and is not done."""
        self._settle(arrival.sender)

    def is_held(self, sender: str) -> bool:
        """Whether one of the arrivals that were given is to be tried again."""
        return sender in self._retry_at

    def _settle(self, sender: str) -> None:
        self._given[sender] -= 1
        if self._given[sender]:
            return
        del self._given[sender]
        retry_at = self._retry_at.pop(sender, None)
        if not self._queues[sender]:
            del self._queues[sender]
        elif retry_at is None:
            self._ready.append(sender)
        else:
            heapq.heappush(self._delayed, (retry_at, next(self._order), sender))

    def seconds_until_next(self, now: float, *, longest: float) -> float:
        if self._ready:
            return 0.0
        return min(max(self._delayed[0][0] - now, 0.0), longest) if self._delayed else longest
