"""What a worker processes and acknowledges together."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import msgspec

from rules import events
from rules.events import Event
from rules.journal.lease import Entry
from rules.processing import failures
from rules.processing.condition_memory import ConditionStateStore

log = logging.getLogger(__name__)
# Large enough to share a transaction among many, small enough to end well within a lease.
BATCH_EVENTS = 2_000


@dataclass(slots=True, kw_only=True)
class Work:
    """What is processed and acknowledged together: whole entries, and events whose next attempt is due."""

    lane: str
    memory: ConditionStateStore = field(default_factory=ConditionStateStore)
    redelivered: bool = False
    events: list[Event] = field(default_factory=list)
    entries: list[bytes] = field(default_factory=list)
    retries: list[bytes] = field(default_factory=list)
    unreadable: int = 0

    def __bool__(self) -> bool:
        return bool(self.entries or self.retries)

    def add(self, entry: Entry) -> None:
        """An entry that cannot be read becomes a dead letter as it is, and the slot continues."""
        self.entries.append(entry.id)
        try:
            self.events += events.decode_entry(entry.data)
        except (msgspec.DecodeError, ValueError) as error:
            log.error("entry %s of the %s lane cannot be read: %s", entry.id.decode(), self.lane, error)
            failures.keep_unreadable(entry, lane=self.lane, error=f"unreadable journal entry: {error}")
            self.unreadable += entry.count
