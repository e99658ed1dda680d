"""Process one batch of events in one database transaction: collect, store, decide, apply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from django.db import transaction

from devices.latest import Key, Latest
from notifications.live_channel import Reading
from rules.effects import perform
from rules.effects.perform import Applied
from rules.events import Event
from rules.processing import data_quality, schedules, statistics
from rules.processing.condition_memory import ConditionStateStore
from rules.processing.failures import Failure
from rules.processing.stages.collect import collect
from rules.processing.stages.decide import Decided, OnEventStart, decide
from rules.processing.stages.store import Stored, store
from rules.processing.timers import Waiting

RecordFailures = Callable[[Sequence[Failure]], None]


@dataclass(slots=True, kw_only=True)
class BatchResult:
    """How the events of a batch ended. The counts are events; all else, but for the failures, is for after the commit."""

    processed: int = 0
    duplicate: int = 0
    failures: list[Failure] = field(default_factory=list)
    applied: Applied = field(default_factory=Applied)
    latest: dict[Key, Latest] = field(default_factory=dict)
    next_timers: dict[Waiting, int] = field(default_factory=dict)
    live_readings: list[Reading] = field(default_factory=list)

    def add(self, other: BatchResult) -> None:
        self.processed += other.processed
        self.duplicate += other.duplicate
        self.failures += other.failures
        self.applied += other.applied
        self.latest |= other.latest
        self.next_timers |= other.next_timers
        self.live_readings += other.live_readings


def process(
    batch: Sequence[Event],
    record_failures: RecordFailures,
    *,
    memory: ConditionStateStore,
    on_event_start: OnEventStart | None = None,
    redelivered: bool = False,
) -> BatchResult:
    """Processes a batch, whole or not at all.

    1. `collect`: read what its chains need to know, before the transaction begins.
    2. `store`: write readings and device reports, and find which values are new.
    3. `decide`: run the chains of each event, in order.
    4. `apply`: apply the effects that the chains asked for.
    5. `record_failures`: write dead letters, so that one is kept exactly when its batch is.

    `on_event_start` is called before each event is decided, and with None before the effects are applied. `redelivered`:
    another worker may have stored the events without acknowledging them; then conditions over time observe them although
    their readings are there. Raises what the database raises, and RedisError when latest values cannot be read.
    """
    inputs = collect(batch, memory)
    with memory.savepoint(), transaction.atomic():
        stored = store(inputs)
        decided = decide(stored, inputs, on_event_start=on_event_start, redelivered=redelivered)
        if on_event_start:
            on_event_start(None)
        applied = apply(decided)
        record_failures([*stored.failures, *decided.failures])
    statistics.shared().add(decided.chain_runs)
    data_quality.count(stored, decided.late_events)
    return _result(stored, decided, applied)


def apply(decided: Decided) -> Applied:
    """Applies the effects in the current transaction, and notes which scheduled runs are done."""
    applied = perform.apply(decided.effects, decided.values)
    schedules.note_runs(decided.completed)
    return applied


def _result(stored: Stored, decided: Decided, applied: Applied) -> BatchResult:
    reported = Applied(changes=list(stored.changes))
    reported += decided.applied
    reported += applied
    return BatchResult(
        processed=len(decided.completed),
        duplicate=stored.duplicates,
        failures=[*stored.failures, *decided.failures],
        applied=reported,
        latest=decided.latest,
        next_timers=decided.next_timers,
        live_readings=list(stored.live_readings),
    )
