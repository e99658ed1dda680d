"""Group commit: events of many concurrent requests in, one round trip to the journal, and each request told when it is done."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import gevent
from gevent.event import AsyncResult
from redis.exceptions import RedisError

from rules.events import Event
from rules.journal import tickets, writing
from rules.journal.slots import Slot, partition_of

log = logging.getLogger(__name__)
# An entry is drained as a whole, so it must stay small enough for one slice of a worker.
MAXIMUM_ENTRY_EVENTS = 1_000

Append = Callable[[dict[Slot, Sequence[Event]]], list[Slot]]


class GroupCommit:
    """While one round trip is under way the next group gathers; no request waits for a timer."""

    def __init__(self, append: Append = writing.append, issue: Callable[[Slot], None] = tickets.issue) -> None:
        self._append = append
        self._issue = issue
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
        slots: dict[Slot, list[Event]] = {}
        for batch, _ in group:
            for event in batch:
                slots.setdefault(Slot(event.lane, partition_of(event.originator_uuid)), []).append(event)
        try:
            needing = self._append(dict(slots))
        except Exception as error:
            # Whatever it is, those who wait must be told: an unanswered request would never end.
            if not isinstance(error, RedisError):
                log.exception("%d requests could not be written to the journal", len(group))
            for _, result in group:
                result.set_exception(error)
            return
        for _, result in group:
            result.set(None)
        for slot in needing:
            self._issue_ticket(slot)

    def _issue_ticket(self, slot: Slot) -> None:
        """The events are safe already: a ticket that cannot be queued is only a delay, until the scheduler queues it."""
        try:
            self._issue(slot)
        except RedisError as error:
            log.warning("Ticket for %s/%d was not queued, the scheduler will: %s", slot.lane, slot.partition, error)
