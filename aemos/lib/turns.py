"""Let greenlets take turns at work that never waits, so that those who wait for an answer are not behind all of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import gevent
from gevent.event import Event
from gevent.hub import get_hub

TURN_SECONDS = 0.002


class Turns:
    """One greenlet of the process at a time has the turn, the others get it in the order in which they came.

    A greenlet switches only where it waits. Without turns, a process that has fifty requests to decode decodes all of them before
    it looks whether Redis has answered, and a client whose next request is always there is served alone.
    """

    def __init__(self) -> None:
        self._taken = False
        self._short: deque[Event] = deque()
        self._long: deque[Event] = deque()
        self._looked_at = 0.0

    @contextmanager
    def turn(self, *, short: bool) -> Iterator[None]:
        """What is `short` comes first: it holds up nobody, and would itself be held up most."""
        self._take(short=short)
        try:
            yield
            if time.monotonic() - self._looked_at > TURN_SECONDS:
                # Whoever's socket has something to read goes on meanwhile. `sleep(0)` would come back before the loop has looked.
                gevent.idle(get_hub().loop.MAXPRI)  # type: ignore[attr-defined]
                self._looked_at = time.monotonic()
        finally:
            self._pass_on()

    def _take(self, *, short: bool) -> None:
        if not self._taken:
            self._taken = True
            return
        mine, waiting = Event(), self._short if short else self._long
        waiting.append(mine)
        try:
            mine.wait()
        except BaseException:  # ended while it waited
            if mine.is_set():
                self._pass_on()
            else:
                waiting.remove(mine)
            raise

    def _pass_on(self) -> None:
        """To one that waits, not to whoever comes first now."""
        if waiting := self._short or self._long:
            waiting.popleft().set()
        else:
            self._taken = False
