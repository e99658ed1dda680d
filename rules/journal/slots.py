"""Slots of the journal: one lane of one partition each, and which of them an originator belongs to."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from django.conf import settings

from aemos.lib import redis
from rules.events import Event, Lane

GROUP = "drain"


@dataclass(frozen=True, slots=True)
class Slot:
    """One lane of one partition: the unit of order, of leases and of tickets."""

    lane: str
    partition: int

    def __str__(self) -> str:
        return f"{self.lane}/{self.partition}"


def slots() -> Iterator[Slot]:
    for lane in Lane:
        for partition in range(settings.EVENT_PARTITIONS):
            yield Slot(lane, partition)


def partition_of(originator_uuid: str) -> int:
    """Always the same for one originator, so that its events stay in order."""
    return zlib.crc32(originator_uuid.encode()) % settings.EVENT_PARTITIONS


def slot_of(event: Event) -> Slot:
    return Slot(event.lane, partition_of(event.originator_uuid))


def by_slot(batch: Iterable[Event]) -> dict[Slot, list[Event]]:
    """The events in their order, as `append` takes them."""
    found: dict[Slot, list[Event]] = {}
    for event in batch:
        found.setdefault(slot_of(event), []).append(event)
    return found


def by_client(wanted: Iterable[Slot]) -> Iterable[tuple[redis.Client, list[Slot]]]:
    """The slots of each server, so that one round trip asks for all of them."""
    found: dict[redis.Client, list[Slot]] = {}
    for slot in wanted:
        found.setdefault(redis.journal_client(slot.partition), []).append(slot)
    return found.items()


def milliseconds_of(entry_id: bytes) -> int:
    """When the entry of a stream was added, in ms since 1970 by the clock of its server."""
    return int(entry_id.partition(b"-")[0])
