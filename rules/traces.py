"""Spans of the event path: receive, queue, process, rule chain. Events and messages carry the traceparent of what led to them.

For when `tracing.is_on`.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from aemos.lib import tracing
from aemos.lib.tracing import OpenSpan
from rules.events import Event

MICROSECOND_NS = 1_000


def begin_receiving(batch: Sequence[Event], *, parent: str, start_ns: int) -> tuple[list[Event], OpenSpan]:
    """The events of one request, carrying the trace of its span, which ends when the journal has them or they are refused."""
    first = batch[0]
    attributes = {
        "aemos.protocol": first.protocol,
        "aemos.originator": first.originator_uuid,
        "aemos.events": len(batch),
    }
    span = tracing.begin("receive", parent=tracing.valid(parent), start_ns=start_ns, attributes=attributes)
    if not span.traceparent:
        return list(batch), span
    return [msgspec.structs.replace(event, trace=span.traceparent) for event in batch], span


def begin_processing(batch: list[Event], *, slot: str) -> list[OpenSpan]:
    """One span for each trace in the batch; its events carry that from now on. What they waited before has a span of its own."""
    now = tracing.now_ns()
    spans: dict[str, OpenSpan] = {}
    for number, event in enumerate(batch):
        if not event.trace:
            continue
        if event.trace not in spans:
            waited = tracing.begin("queue", parent=event.trace, start_ns=event.received_us * MICROSECOND_NS)
            waited.end(at_ns=now)
            attributes = {"aemos.slot": slot, "aemos.event_id": event.id, "aemos.attempt": event.attempt + 1}
            spans[event.trace] = tracing.begin("process", parent=event.trace, start_ns=now, attributes=attributes)
        batch[number] = msgspec.structs.replace(event, trace=spans[event.trace].traceparent)
    return list(spans.values())


def end(spans: Sequence[OpenSpan], *, error: str = "") -> None:
    for span in spans:
        span.end(error=error)


def chain_ran(event: Event, name: str, *, seconds: float, effects: int = 0, error: str = "") -> None:
    now = tracing.now_ns()
    attributes = {"aemos.chain": name, "aemos.effects": effects}
    span = tracing.begin("rule chain", parent=event.trace, start_ns=now - int(seconds * 1e9), attributes=attributes)
    span.end(error=error, at_ns=now)
