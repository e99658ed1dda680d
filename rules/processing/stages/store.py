"""Store a batch's readings and device reports, and find which values of which event are new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from devices.models import StateChange
from notifications import live_channel
from notifications.live_channel import Reading
from rules import events
from rules.effects import states
from rules.events import Event
from rules.processing import readings, schedules
from rules.processing.failures import Failure
from rules.processing.quality import QualityJudge
from rules.processing.readings import Row
from rules.processing.stages.collect import Inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """`events`: each with the names of its values that are new, None for a duplicate. `changes`: what devices reported.

    `failures`: events that could not be stored. `live_readings`: new readings of variables that people look at. `quality`: which
    values are believed.
    """

    events: Sequence[tuple[Event, tuple[str, ...] | None]]
    failures: Sequence[Failure]
    changes: Sequence[states.Change]
    live_readings: Sequence[Reading]
    quality: QualityJudge

    @property
    def duplicates(self) -> int:
        return sum(names is None for _, names in self.events)


def store(inputs: Inputs) -> Stored:
    """Writes in the current transaction."""
    failures = [failure for event in inputs.batch if (failure := _without_originator(event, inputs))]
    failed = {failure.event.id for failure in failures}
    batch = [event for event in inputs.batch if event.id not in failed] if failed else inputs.batch
    ran_before = schedules.already_ran(batch)
    rows: list[Row] = []
    quality = QualityJudge(inputs.latest)
    for event in batch:
        rows += _rows_of(event, inputs, quality)
    as_stored = readings.store(rows)
    live_readings = live_channel.select((row and (*row[:4], row.suspect) for row in as_stored), wanted=inputs.watched)
    left = iter(as_stored)
    changes, reported = _apply_reports(batch, inputs)
    stored: list[tuple[Event, tuple[str, ...] | None]] = []
    for position, event in enumerate(batch):
        names: tuple[str, ...] | None
        if events.is_run(event):
            names = None if position in ran_before else ()
        elif event.chains is not None:  # another attempt: its values are stored, and some chains are still to run
            names = tuple(_measured(event))
        elif event.source_type == "device":
            names = tuple(reported.pop(event.id, ())) or None
        else:
            measured = _measured(event)
            names = tuple([name for name in measured if next(left) is not None]) or (None if measured else ())
        stored.append((event, names))
    return Stored(events=stored, failures=failures, changes=changes, live_readings=live_readings, quality=quality)


def _without_originator(event: Event, inputs: Inputs) -> Failure | None:
    """The failure of an event whose originator, or one of whose variables, was deleted after it was accepted."""
    if events.is_run(event):
        return None
    originator = inputs.originator(event)
    if originator is None:
        deleted = f"{event.source_type} {event.originator_uuid}"
    elif event.values.keys() <= originator.fields.keys():
        return None
    else:
        unknown = event.values.keys() - originator.fields.keys()
        deleted = f"{', '.join(sorted(unknown))} of {originator.name}"
    return Failure(event=event, error=f"{deleted} was deleted after the event was accepted", permanent=True)


def _rows_of(event: Event, inputs: Inputs, quality: QualityJudge) -> list[Row]:
    """The readings that an event of a sensor brings, in the order of its values; of another attempt they are judged alone."""
    originator = inputs.originator(event)
    if originator is None or event.source_type != "sensor":
        return []
    fields, at_us = originator.fields, event.stored_us
    received_us = event.timestamp_us if event.claimed_us else None
    rows = []
    for name, value in event.values.items():
        if value is None:
            continue
        field = fields[name]
        suspect = quality.judge(event, name, value, field.limits) or None if field.limits else None
        rows.append(readings.row_of(field.id, at_us, value, received_us, suspect))
    return rows if event.chains is None else []


def _measured(event: Event) -> list[str]:
    """Without what has no value now: that is known from then on, and neither stored nor a reason to run a chain."""
    return [name for name, value in event.values.items() if value is not None]


def _apply_reports(batch: Sequence[Event], inputs: Inputs) -> tuple[list[states.Change], dict[str, list[str]]]:
    """What devices report becomes their state; gives the changes, and by event the names that changed."""
    requests: list[states.StateChangeRequest] = []
    reports: dict[str, tuple[str, str]] = {}
    for event in batch:
        originator = inputs.originator(event)
        if originator is None or event.source_type != "device" or event.chains is not None:
            continue
        for name, value in event.values.items():
            request = _report(event, originator.fields[name].id, name, value)
            requests.append(request)
            reports[request.effect_key] = (event.id, name)
    # States that chains of the batch may set later are locked at once with these, in the one order.
    changes = states.apply(requests, also_lock=inputs.commanded).changes
    changed: dict[str, list[str]] = {}
    for change in changes:
        event_id, name = reports[change.row.effect_key]
        changed.setdefault(event_id, []).append(name)
    return changes, changed


def _report(event: Event, state_id: int, name: str, value: object) -> states.StateChangeRequest:
    return states.StateChangeRequest(
        effect_key=f"{event.id}:report:{name}",
        state_id=state_id,
        value=value,
        source=StateChange.Source.DEVICE,
        actor="device",
        timestamp_us=event.timestamp_us,
        priority=event.priority,
        newer_only=True,
    )
