"""A worker inside the test's own process: drain every slot, and read the ledger of all of them."""

from __future__ import annotations

from devices import catalogue
from rules import jobs
from rules.journal import slots
from rules.journal.ledger import Account, audit
from rules.processing import index


def drain_all() -> None:
    """With what was saved a moment ago."""
    catalogue.shared().refresh(at_once=True)
    index.shared().refresh(at_once=True)
    for slot in slots.slots():
        jobs.drain(slot.lane, slot.partition)


def ledger() -> Account:
    return sum((audit(slot) for slot in slots.slots()), Account())
