"""Record how far deliveries have come: update Delivery rows in bulk with the outcomes of the transports.

Outcomes wait in a bounded buffer and are written about twice a second, one statement for all that are alike; while
the database is away they wait, and what the buffer cannot hold is counted and logged. A state never goes backwards,
whichever gateway writes last.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from uuid import UUID

from django.db import DatabaseError, InterfaceError, OperationalError, close_old_connections
from django.db.models import Value
from django.db.models.functions import Greatest
from django.utils import timezone
from gevent.event import Event

from aemos.lib.batched import batched
from aemos.lib.rate_limited_log import RateLimitedLog
from aemos.lib.text import storable
from notifications.messages import Protocol
from notifications.models import Delivery

log = logging.getLogger(__name__)
FLUSH_SECONDS = 0.5
MAXIMUM_WAITING = 50_000
# Names in one statement: below the 999 parameters that the oldest SQLite takes.
STATEMENT_ROWS = 500
RETRY_SECONDS = 1.0

State = Delivery.State
# From left to right only. Failed is left of sent: one gateway's failure says nothing about another one's clients. So is
# expired: the state of a device that was away for long is still sent to it in the end.
_ORDER = (State.PENDING, State.EXPIRED, State.FAILED, State.SENT, State.ACKNOWLEDGED)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one message on one protocol, after so many attempts."""

    state: State
    attempts: int = 1
    error: str = ""

    def or_later(self, other: Outcome) -> Outcome:
        return other if _ORDER.index(other.state) >= _ORDER.index(self.state) else self


class Deliveries:
    """The buffer. One per gateway; `record` never waits."""

    def __init__(self, *, maximum: int = MAXIMUM_WAITING) -> None:
        self._maximum = maximum
        self._waiting: dict[tuple[UUID, Protocol], Outcome] = {}
        self._news = Event()
        self._away = False
        self._log = RateLimitedLog(log)
        self._unreported = 0
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def record(self, message_id: UUID, protocol: Protocol, outcome: Outcome) -> None:
        key = (message_id, protocol)
        earlier = self._waiting.get(key)
        if earlier is None and len(self._waiting) >= self._maximum:
            self.dropped += 1
            self._unreported += 1
            return
        self._waiting[key] = earlier.or_later(outcome) if earlier else outcome
        self._news.set()

    def run(self, stopping: Event) -> None:
        """Flushes until `stopping`; the last flush is the caller's, after the transports have stopped."""
        while not stopping.is_set():
            if self._news.wait(1.0):
                stopping.wait(RETRY_SECONDS if self._away else FLUSH_SECONDS)
                self.flush()

    def flush(self) -> None:
        """Writes what waits; keeps it when the database is away."""
        taken, self._waiting = self._waiting, {}
        self._news.clear()
        try:
            self._write(taken)
        except (OperationalError, InterfaceError) as error:
            self._keep(taken, error)
        except DatabaseError:
            # Not the connection: the same rows would fail for ever, and hold up all that come after them.
            log.exception("%d delivery states cannot be written and are dropped", len(taken))
            self.dropped += len(taken)
        else:
            self._away = False
            self._log.recovered("database", "The database answers again: %d delivery states were written", len(taken))
        finally:
            close_old_connections()
        self._report_dropped()

    def _write(self, taken: dict[tuple[UUID, Protocol], Outcome]) -> None:
        alike: defaultdict[tuple[Protocol, Outcome], list[UUID]] = defaultdict(list)
        for (message_id, protocol), outcome in taken.items():
            alike[protocol, outcome].append(message_id)
        for (protocol, outcome), ids in alike.items():
            for batch in batched(ids, STATEMENT_ROWS):
                _update(batch, protocol, outcome)

    def _keep(self, taken: dict[tuple[UUID, Protocol], Outcome], error: Exception) -> None:
        self._away = True
        self._log.log("database", logging.WARNING, "Delivery states cannot be written, %d wait: %s", len(taken), error)
        for (message_id, protocol), outcome in taken.items():
            newer = self._waiting.pop((message_id, protocol), None)
            self.record(message_id, protocol, outcome.or_later(newer) if newer else outcome)

    def _report_dropped(self) -> None:
        if self._unreported:
            log.error("%d delivery states were dropped: more than %d waited", self._unreported, self._maximum)
        self._unreported = 0


def _update(message_ids: Iterable[UUID], protocol: Protocol, outcome: Outcome) -> None:
    """Only rows whose state is not ahead; the greatest count of attempts wins, so writing twice changes nothing."""
    behind = _ORDER[: max(_ORDER.index(outcome.state), 1)]
    Delivery.objects.filter(notification__uuid__in=message_ids, protocol=protocol, state__in=behind).update(
        state=outcome.state,
        attempts=Greatest("attempts", Value(outcome.attempts)),
        last_error=storable(outcome.error, 500),
        updated_at=timezone.now(),
    )
