"""What a rule sees while it runs: values with their times, what it found missing, and what it remembers from run to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rules.actions import Effect

Value = float | int | str | bool | None


class Reference(NamedTuple):
    """One variable of one source; `source_type` is sensor or device, `uuid` a lower-case version 4 UUID."""

    source_type: str
    uuid: str
    key: str


class Sample(NamedTuple):
    """A value and when it was taken, in microseconds since 1970 (UTC)."""

    value: Value
    timestamp_us: int


Lookup = Callable[[Reference], Sample | None]
Memory = dict[str, Any]
"""Per node that remembers, by a key of its own making: what it remembers, as JSON holds it."""


class Scope:
    """One run of one chain for one event, as conditions see it.

    `read` gives the sample of a reference or None; what a condition misses it adds to `missing`. `now_us` is the event's
    own time in microseconds since 1970 (UTC), so that a late event is judged by when it happened. `memory` is what this
    chain remembers of this originator; conditions and actions read and change it in place.
    """

    __slots__ = ("memory", "missing", "now_us", "read")

    def __init__(self, read: Lookup, now_us: int, memory: Memory | None = None) -> None:
        self.read = read
        self.now_us = now_us
        self.missing: list[Reference] = []
        self.memory: Memory = {} if memory is None else memory


@dataclass(slots=True, kw_only=True)
class Trigger:
    """The event that a chain runs for; `uuid` is in lower case, `timestamp_us` in microseconds since 1970 (UTC).

    `values` are the event's own and are never changed. `lookup` gives the latest known sample of everything else:
    what the event carries for its own originator, null included, is never asked of it. `memory` is what the chain
    remembers of this originator, and a run changes it in place; the caller keeps it if `Chain.remembers`.
    """

    event_id: str
    source_type: str
    uuid: str
    values: Mapping[str, Value]
    timestamp_us: int
    lookup: Lookup
    memory: Memory = field(default_factory=dict)


class Run(Scope):
    """The state of one run, with the event's values as transformed so far; it dies with the run, all but the memory."""

    __slots__ = ("effects", "trigger", "values")

    def __init__(self, trigger: Trigger) -> None:
        self.trigger = trigger
        self.values = dict(trigger.values)
        self.effects: list[Effect] = []
        super().__init__(_reader(trigger, self.values), trigger.timestamp_us, trigger.memory)


def _reader(trigger: Trigger, values: dict[str, Value]) -> Lookup:
    """Read the originator's own values, as transformed so far, and everything else through the trigger's lookup."""
    source_type, uuid, timestamp_us, lookup = trigger.source_type, trigger.uuid, trigger.timestamp_us, trigger.lookup

    def read(reference: Reference) -> Sample | None:
        if reference.uuid == uuid and reference.key in values and reference.source_type == source_type:
            return Sample(values[reference.key], timestamp_us)
        return lookup(reference)

    return read
