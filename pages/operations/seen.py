"""What the operations page shows, as far as it is known: nothing in, a few queries and one look at Redis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db.models import Count, F
from django.utils import timezone
from redis.exceptions import RedisError

from devices.models import Device
from monitoring import health, recent
from monitoring.queue import View, look, stored_circuit
from notifications.models import Delivery, Unpublished
from rules.admission.circuit_store import Hold, Stored
from rules.journal import ledger
from rules.journal.ledger import Account
from rules.journal.pauses import PAUSABLE, Pause
from rules.journal.queue_stats import LaneLoad
from rules.journal.slots import slots
from rules.models import Alarm, ChainStatistics, CircuitTransition, DeadLetter, Status

SHOWN = 8
AUDITED_DEPTH = 5_000
_SHOWN_OF_SAMPLES = ("at", "depth", "delivered", "undelivered")
TIMELINE = timedelta(hours=24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Some of the timeline in which the circuit did not change: `left` and `width` in percent of it."""

    state: str
    left: float
    width: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneRow:
    """One lane of the queue, and who has paused it."""

    name: str
    load: LaneLoad
    pause: Pause | None
    is_pausable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """`ledger` by lane is None while Redis is away or the queue is long."""

    view: View
    stored: Stored | None
    hold: Hold | None
    problems: Sequence[str]
    samples: Sequence[Mapping[str, Any]]
    ledger: Mapping[str, Account] | None
    timeline: Sequence[Band]
    transitions: Sequence[CircuitTransition]
    slowest: Sequence[ChainStatistics]
    failing: Sequence[ChainStatistics]
    pending: Sequence[Mapping[str, Any]]
    unpublished: int
    dead_letters: int
    newest_letters: Sequence[DeadLetter]
    alarms: int
    silent: Sequence[Device]

    @property
    def lanes(self) -> Sequence[LaneRow]:
        if (known := self.view.known) is None:
            return []
        return [
            LaneRow(name=lane, load=load, pause=known.paused.get(lane), is_pausable=lane in PAUSABLE)
            for lane, load in known.load.lanes.items()
        ]

    @property
    def rejected(self) -> Sequence[tuple[str, int]]:
        known = self.view.known
        return sorted(known.rejected.items(), key=lambda each: -each[1]) if known else []


def see() -> Operations:
    view = look()
    # What admission goes by is a moment old; a person who has just pressed a button wants to see what it did.
    stored = stored_circuit() or view.stored
    chains = ChainStatistics.objects.select_related("chain__organization").filter(executions__gt=0)
    letters = DeadLetter.objects.filter(status=Status.OPEN)
    pending = Delivery.objects.filter(state=Delivery.State.PENDING)
    return Operations(
        view=view,
        stored=stored,
        hold=stored.held(datetime.now(UTC)) if stored else None,
        problems=health.problems_of(view),
        samples=_samples(),
        ledger=_ledger(view),
        timeline=_timeline(),
        transitions=list(CircuitTransition.objects.all()[:SHOWN]),
        slowest=list(chains.annotate(mean=F("seconds") * 1_000 / F("executions")).order_by("-mean")[:SHOWN]),
        failing=list(chains.filter(failures__gt=0).order_by("-failures_in_a_row", "-failures")[:SHOWN]),
        pending=list(pending.values("protocol").annotate(count=Count("pk")).order_by("protocol")),
        unpublished=Unpublished.objects.count(),
        dead_letters=letters.count(),
        newest_letters=list(letters.select_related("organization", "chain")[:SHOWN]),
        alarms=Alarm.objects.exclude(state=Alarm.State.CLEARED).count(),
        silent=list(Device.objects.filter(connected=False).select_related("organization").order_by("connection_changed_at")[:SHOWN]),
    )  # fmt: skip


def _samples() -> list[dict[str, Any]]:
    try:
        return [{name: getattr(each, name) for name in _SHOWN_OF_SAMPLES} for each in recent.samples()]
    except RedisError:
        return []


def _ledger(view: View) -> dict[str, Account] | None:
    """It counts the events that wait one by one, which is no work for a Redis that has much to do."""
    if view.depth is None or view.depth > AUDITED_DEPTH:
        return None
    found: dict[str, Account] = {}
    try:
        for slot in slots():
            found[slot.lane] = found.get(slot.lane, Account()) + ledger.audit(slot)
    except RedisError:
        return None
    return found


def _timeline() -> list[Band]:
    """The states of the last day, one after the other."""
    end = timezone.now()
    begin = end - TIMELINE
    rows = list(CircuitTransition.objects.filter(at__gte=begin).order_by("at", "id")[:500])
    before = CircuitTransition.objects.filter(at__lt=begin).order_by("-at", "-id").first()
    state, why, since = (before.to_state, before.reason, begin) if before else ("CLOSED", "", begin)
    bands = []
    for row in rows:
        bands.append(_band(state, why, since, row.at, begin))
        state, why, since = row.to_state, row.reason, row.at
    bands.append(_band(state, why, since, end, begin))
    return bands


def _band(state: str, why: str, since: datetime, until: datetime, begin: datetime) -> Band:
    return Band(
        state=state,
        left=round(100 * ((since - begin) / TIMELINE), 3),
        width=round(100 * ((until - since) / TIMELINE), 3),
        text=f"{state}, {why}" if why else state,
    )
