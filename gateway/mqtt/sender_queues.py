"""The order in which messages of devices are taken: one queue for each sender. Pure: no Django, no broker."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Arrival:
    """A message as the broker gave it. `connection` counts connections: it can be acknowledged over that one only."""

    topic: str
    payload: bytes
    mid: int
    qos: int
    connection: int
    retained: bool = False
    attempts: int = 0
    held_since: float = field(default_factory=time.monotonic)

    @property
    def sender(self) -> str:
        """What order is kept by: all that one originator says."""
        return self.topic


class SenderQueues:
    """Arrivals by sender, each sender's in order: the next one is given only when the one before it is done.

    What one sender has to wait for, a retry for example, holds up nobody else. Times are in seconds of any one clock.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Arrival]] = {}
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

    def next(self, now: float) -> Arrival | None:
        """The next arrival that may be tried now; `done` or `again` must follow before its sender has another turn."""
        while self._delayed and self._delayed[0][0] <= now:
            self._ready.append(heapq.heappop(self._delayed)[2])
        return self._queues[self._ready.popleft()][0] if self._ready else None

    def done(self, arrival: Arrival) -> None:
        waiting = self._queues[arrival.sender]
        waiting.popleft()
        self._size -= 1
        if waiting:
            self._ready.append(arrival.sender)
        else:
            del self._queues[arrival.sender]

    def again(self, arrival: Arrival, *, at: float) -> None:
        heapq.heappush(self._delayed, (at, next(self._order), arrival.sender))

    def seconds_until_next(self, now: float, *, longest: float) -> float:
        if self._ready:
            return 0.0
        return min(max(self._delayed[0][0] - now, 0.0), longest) if self._delayed else longest
