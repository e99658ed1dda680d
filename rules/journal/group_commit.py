"""Group commit: write the events of concurrent requests to the journal in one round trip, and answer each request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

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


class _Waiting(NamedTuple):
    """A call of `put`: see there."""

    batch: Sequence[Event]
    result: AsyncResult[None]
    after: AsyncResult[None] | None


class GroupCommit:
    """While one round trip is under way the next group gathers; no request waits for a timer."""

    def __init__(self, append: Append = writing.append) -> None:
        self._append = append
        self._waiting: list[_Waiting] = []
        self._busy = False

    def put(self, batch: Sequence[Event], *, after: AsyncResult[None] | None = None) -> AsyncResult[None]:
        """Gives a result that is set when the journal has the events, or that raises what kept it from having them.

        All events of a call are of one originator. Where `after`, the result of an earlier call, fails, this one does, too: its
        events must not overtake those before them.
        """
        result: AsyncResult[None] = AsyncResult()
        self._waiting.append(_Waiting(batch, result, after))
        if not self._busy:
            self._busy = True
            gevent.spawn(self._run)
        return result

    def _run(self) -> None:
        try:
            while self._waiting:
                if group := self._next_group():
                    self._commit(group)
        finally:
            self._busy = False

    def _next_group(self) -> list[_Waiting]:
        """Of what waits as much as one entry may hold, without what comes after something that has failed."""
        events = taken = 0
        for each in self._waiting:
            if taken and events + len(each.batch) > MAXIMUM_ENTRY_EVENTS:
                break
            events += len(each.batch)
            taken += 1
        group, self._waiting = self._waiting[:taken], self._waiting[taken:]
        for each in group:
            if each.after is not None and (error := each.after.exception) is not None:
                each.result.set_exception(error)
        return [each for each in group if each.result.exception is None]

    def _commit(self, group: Sequence[_Waiting]) -> None:
        try:
            needing = self._append(by_slot(chain.from_iterable(each.batch for each in group)))
        except Exception as error:
            # Whatever it is, the requests must be answered: one without an answer would never end.
            if not isinstance(error, RedisError):
                log.exception("%d requests could not be written to the journal", len(group))
            for each in group:
                each.result.set_exception(error)
            return
        for each in group:
            each.result.set(None)
        # After the answers: the events are safe, and no request waits for a ticket.
        tickets.issue_all(needing)
