"""Values that conditions read, and how they name and look up what they read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Value = float | int | str | bool | None


class Reference(NamedTuple):
    """One variable of one source; `source_type` is sensor or device, `uuid` a lower-case version 4 UUID."""

    source_type: str
    uuid: str
    key: str


class Sample(NamedTuple):
    """A value and when it was taken, in microseconds since 1970 (UTC).

    `received_us` is when its source was last heard of it, whatever its clock says; 0 where that is when it was taken. With
    limits the value is the last good one, and `suspicion` says why the newest is not believed; empty when it is.
    """

    value: Value
    timestamp_us: int
    received_us: int = 0
    suspicion: str = ""

    @property
    def heard_us(self) -> int:
        return self.received_us or self.timestamp_us


Lookup = Callable[[Reference], Sample | None]
Source = tuple[str, str]
"""Source type and uuid."""


class Timer(NamedTuple):
    """A condition that may turn true although its source says nothing; `key` is the same as long as the condition is."""

    key: str
    source: Source


class TemporalCondition(NamedTuple):
    """What a condition over time remembers of the source that it names, from reading to reading.

    `key` is the same as long as the condition is, so that an edit elsewhere in the chain forgets nothing. What is remembered
    is as JSON holds it; `observe(remembered or None, sample)` gives what to remember after this sample; it sees samples
    in the order of arrival, late ones too. When it was lost, the readings of the last `window_us` are observed again, at most
    the newest `maximum`.
    """

    key: str
    reference: Reference
    window_us: int
    maximum: int
    observe: Callable[[Any, Sample], Any]
