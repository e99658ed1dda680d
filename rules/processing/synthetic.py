"""Put events that no sender asks for into the journal: those of the scheduler, of timers and of people."""

from __future__ import annotations

from collections.abc import Sequence

from aemos.lib import metrics
from devices.exceptions import Overloaded
from rules.admission import control
from rules.events import PRIORITIES, Event, EventType
from rules.journal import tickets, writing
from rules.journal.slots import by_slot

PRIORITY = PRIORITIES[EventType.SCHEDULED]


def refusal() -> Overloaded | None:
    """Why the queue takes no urgent event; None when it does."""
    try:
        verdict = control.shared().verdict(PRIORITY)
    except Overloaded as refused:
        return refused
    return None if verdict.accept else control.shared().refusal(verdict, PRIORITY)


def append(batch: Sequence[Event]) -> None:
    """Raises RedisError; part of the batch may be in the journal then."""
    if not batch:
        return
    needing = writing.append(by_slot(batch))
    control.shared().admitted(len(batch))
    metrics.INGESTED.labels(batch[0].protocol, "accepted").inc(len(batch))
    metrics.flush()
    tickets.issue_all(needing)
