"""Count, after the commit, what a batch says of its senders' clocks and which of its readings are suspect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from django.conf import settings

from aemos.lib import metrics
from devices.quality import data_problems, sensor_clocks
from rules import events
from rules.events import Event
from rules.processing.stages.store import Stored

# What an event without a time of its own is dated at most after it was received: as many microseconds as a request has events.
UNDATED_US = events.MAXIMUM_EVENTS


def count(stored: Stored, late: Sequence[Event]) -> None:
    """Of events that are new."""
    clocks = sensor_clocks.shared()
    for event in late:
        metrics.EVENT_TIMES.labels("late").inc()
        clocks.count(event.originator_uuid, sensor_clocks.LATE)
    newest: dict[str, Event] = {}
    tolerance_us = settings.CLOCK_TOLERANCE_SECONDS * 1_000_000
    for event, names in stored.events:
        if not names:
            continue
        newest[event.originator_uuid] = event
        if event.claimed_us and event.claimed_us - event.timestamp_us > tolerance_us:
            metrics.EVENT_TIMES.labels("ahead").inc()
            clocks.count(event.originator_uuid, sensor_clocks.AHEAD)
        if stored.quality.has_suspects:
            _note_suspects(event, stored.quality.suspects(event))
    # Of a batch the newest of each sensor: older ones may have waited at their sender.
    for uuid, event in newest.items():
        offset_us = event.received_us - event.stored_us
        is_of_now = event.source_type == "sensor" and event.chains is None and not event.command_deadline_us
        if is_of_now and not -UNDATED_US < offset_us <= 0:
            clocks.measure(uuid, offset_us)


def _note_suspects(event: Event, suspects: Mapping[str, str]) -> None:
    for name, reason in suspects.items():
        key = data_problems.Key(event.source_type, event.originator_uuid, name, reason)
        payload = msgspec.json.encode(event.values).decode()
        detail = f"{name} = {event.values[name]!r} of {events.moment(event.stored_us):%Y-%m-%d %H:%M:%S} UTC"
        data_problems.shared().note(key, event.organization_id, detail=detail, payload=payload)
