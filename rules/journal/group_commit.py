"""Group commit: write the events of concurrent requests to the journal in one round trip, and answer each request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import gevent
from gevent.event import AsyncResult
from redis.exceptions import RedisError

from rules.events import Event
from rules.journal import tickets, writing
from rules.journal.slots import Slot, by_slot

log = logging.getLogger(__name__)
# An entry is drained as a whole, so it must stay small enough for one slice of a worker.
MAXIMUM_ENTRY_EVENTS = 1_000

Append = Callable[[Mapping[Slot, Sequence[Event]]], list[Slot]]


class GroupCommit:
    """While one round trip is under way the next group gathers; no request waits for a timer."""

    def __init__(self, append: Append = writing.append) -> None:
        self._append = append
        self._waiting: list[tuple[Sequence[Event], AsyncResult[None]]] = []
        self._busy = False

    def put(self, batch: Sequence[Event]) -> AsyncResult[None]:
        """Gives a result that is set when the journal has the events, or that raises what kept it from having them.

        All events of a call are of one originator.
        """
        result: AsyncResult[None] = AsyncResult()
        self._waiting.append((batch, result))
        if not self._busy:
            self._busy = True
            gevent.spawn(self._run)
        return result

    def _run(self) -> None:
        try:
            while self._waiting:
                self._commit(self._next_group())
        finally:
            self._busy = False

    def _next_group(self) -> list[tuple[Sequence[Event], AsyncResult[None]]]:
        events = taken = 0
        for batch, _ in self._waiting:
            if taken and events + len(batch) > MAXIMUM_ENTRY_EVENTS:
                break
            events += len(batch)
            taken += 1
        group, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return group

    def _commit(self, group: list[tuple[Sequence[Event], AsyncResult[None]]]) -> None:
        try:
            needing = self._append(by_slot(chain.from_iterable(batch for batch, _ in group)))
        except Exception as error:
            # Whatever it is, the requests must be answered: one without an answer would never end.
            if not isinstance(error, RedisError):
                log.exception("%d requests could not be written to the journal", len(group))
            for _, result in group:
                result.set_exception(error)
            return
        for _, result in group:
            result.set(None)
        # After the answers: the events are safe, and no request waits for a ticket.
        tickets.issue_all(needing)
