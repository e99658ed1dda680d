"""Runs that no sender asks for: events of the scheduler, of timers and of people in, urgent entries of the journal out."""

from __future__ import annotations

from collections.abc import Sequence

from aemos.lib import metrics
from devices.exceptions import Overloaded
from rules import backpressure, journal, tickets
from rules.events import PRIORITIES, Event, EventType

CHAIN = "chain"
"""The source type of an event that runs the chain that is its originator."""

TIMER = "timer"
"""The protocol of an event that time alone brings about: a sensor's or device's, without values."""

PRIORITY = PRIORITIES[EventType.SCHEDULED]


def is_run(event: Event) -> bool:
    """Whether the event runs chains on what is known, instead of telling what a sensor or device says."""
    return event.source_type == CHAIN or event.protocol == TIMER


def named(event: Event) -> tuple[str, ...] | None:
    """The uuids of the chains that the event is for; None when it is for all that wait for it."""
    return (event.originator_uuid,) if event.source_type == CHAIN else event.chains


def refusal() -> Overloaded | None:
    """Why the queue takes no urgent event; None when it does."""
    try:
        verdict = backpressure.shared().verdict(PRIORITY)
    except Overloaded as refused:
        return refused
    return None if verdict.accept else backpressure.shared().refusal(verdict, PRIORITY)


def append(batch: Sequence[Event]) -> None:
    """Raises RedisError; part of the batch may be in the journal then."""
    if not batch:
        return
    needing = journal.append(journal.by_slot(batch))
    backpressure.shared().admitted(len(batch))
    metrics.INGESTED.labels(batch[0].protocol, "accepted").inc(len(batch))
    metrics.flush()
    tickets.issue_all(needing)
