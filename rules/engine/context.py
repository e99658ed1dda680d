"""What a rule sees while it runs: values with their times, what it found missing, and what it remembers from run to run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from rules.engine.effect_types import Effect
from rules.engine.values import Lookup, Reference, Sample, Source, Value


class Scope:
    """One run of one chain for one event, as conditions see it.

    `read` gives the sample of a reference or None; what a condition misses it adds to `missing`. `now_us` is the event's own
    time in microseconds since 1970 (UTC): conditions over time are judged by when it happened. `clock_us` is when it was
    received: ages are counted up to then. `memory` holds, by the key of a watch, what is remembered, this event included. A
    condition that may turn true without a further event says with `wake` when that is; `wakes` holds the earliest of these
    times for each source, in microseconds since 1970.
    """

    __slots__ = ("clock_us", "memory", "missing", "now_us", "read", "wakes")

    def __init__(
        self, read: Lookup, now_us: int, memory: Mapping[str, Any] | None = None, *, clock_us: int = 0
    ) -> None:
        self.read = read
        self.now_us = now_us
        self.clock_us = clock_us or now_us
        self.missing: list[Reference] = []
        self.memory: Mapping[str, Any] = {} if memory is None else memory
        self.wakes: dict[Source, int] = {}

    def wake(self, reference: Reference, at_us: int) -> None:
        source = reference[:2]
        self.wakes[source] = min(self.wakes.get(source, at_us), at_us)


def refuses_nothing(device_uuid: str, state_name: str, value: Value) -> str:
    """For runs that know no devices."""
    return ""


class Trigger(msgspec.Struct, kw_only=True):
    """The event that a chain runs for; `uuid` is in lower case, `timestamp_us` in microseconds since 1970 (UTC).

    `values` are the event's own and are never changed. `lookup` gives the latest known sample of everything else:
    what the event carries for its own originator, null included, is never asked of it. `memory` holds what is remembered by
    the key of a watch. `refuses` says why a state (device uuid, name) cannot be set to a value, empty when it can.
    `vetoes` says why it must not be at this moment, empty when it may; asked where a chain has another way for that case.
    `clock_us` is when it was received, 0 for at that time.
    `originator` is the name of the sensor, device or chain that the event comes from, as people know it.
    `deadline` is when the run is stopped, in seconds of `time.monotonic`.
    """

    event_id: str
    source_type: str
    uuid: str
    values: Mapping[str, Value]
    timestamp_us: int
    lookup: Lookup
    memory: Mapping[str, Any] = msgspec.field(default_factory=dict)
    refuses: Callable[[str, str, Value], str] = refuses_nothing
    vetoes: Callable[[str, str, Value], str] = refuses_nothing
    originator: str = ""
    clock_us: int = 0
    deadline: float = math.inf


class Run(Scope):
    """The state of one run, with the event's values as transformed so far; it dies with the run."""

    __slots__ = ("effects", "trigger", "values")

    def __init__(self, trigger: Trigger) -> None:
        self.trigger = trigger
        self.values = dict(trigger.values)
        self.effects: list[Effect] = []
        super().__init__(_reader(trigger, self.values), trigger.timestamp_us, trigger.memory, clock_us=trigger.clock_us)


def _reader(trigger: Trigger, values: dict[str, Value]) -> Lookup:
    """Read the originator's own values, as transformed so far, and everything else through the trigger's lookup.

    What a device reports and had already it has had since its last change, not since the report.
    """
    source_type, uuid, timestamp_us, lookup = trigger.source_type, trigger.uuid, trigger.timestamp_us, trigger.lookup
    clock_us = trigger.clock_us

    def read(reference: Reference) -> Sample | None:
        if reference.uuid != uuid or reference.key not in values or reference.source_type != source_type:
            return lookup(reference)
        value = values[reference.key]
        if source_type == "device" and (known := lookup(reference)) is not None and _is_same(known.value, value):
            return known
        return Sample(value, timestamp_us, clock_us)

    return read


def _is_same(one: Value, other: Value) -> bool:
    return type(one) is type(other) and one == other
