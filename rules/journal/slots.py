"""Slots of the journal: one lane of one partition each, and which of them an originator belongs to."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from django.conf import settings

from rules.events import Lane

GROUP = "drain"


@dataclass(frozen=True, slots=True)
class Slot:
    """One lane of one partition: the unit of order, of leases and of tickets."""

    lane: str
    partition: int


def slots() -> Iterator[Slot]:
    for lane in Lane:
        for partition in range(settings.EVENT_PARTITIONS):
            yield Slot(lane, partition)


def partition_of(originator_uuid: str) -> int:
    """Always the same for one originator, so that its events stay in order."""
    return zlib.crc32(originator_uuid.encode()) % settings.EVENT_PARTITIONS
