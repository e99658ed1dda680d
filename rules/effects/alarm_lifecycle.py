"""The life of one alarm: decide what requests to raise and clear it change in its rows.

No queries here. Times are those of the events, so a request that comes twice, or late, is known by its time: what is not
newer than what the rows have seen changes nothing. Of a raise and a clear at the same time the raise wins, in any order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from rules import events
from rules.effects.cooldowns import Cooldown, CooldownGate, no_cooldown
from rules.models import Alarm, Severity

# A sender's clock may be ahead by hours. An alarm "raised tomorrow" would turn down all that follows once it is set right.
CLOCK_TOLERANCE = timedelta(minutes=5)
RANK = {severity: rank for rank, severity in enumerate(Severity.values)}
Key = tuple[int, str, str, str]
"""Organization id, source type, uuid of the originator, type: what at most one open alarm has."""


class Change(StrEnum):
    """What may happen to an alarm; `change` in its messages."""

    RAISED = "raised"
    SEVERITY_RAISED = "severity-raised"
    FLAPPING = "flapping"
    ACKNOWLEDGED = "acknowledged"
    CLEARED = "cleared"


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmRequest:
    """What is asked of one alarm; `originator_uuid` is in lower case, `actor` the chain and node that wish it."""

    effect_key: str
    organization_id: int
    source_type: str
    originator_uuid: str
    type: str
    timestamp_us: int
    actor: str
    cooldown: Cooldown | None = None

    @property
    def key(self) -> Key:
        return self.organization_id, self.source_type, self.originator_uuid, self.type


@dataclass(frozen=True, slots=True, kw_only=True)
class Raise(AlarmRequest):
    severity: str
    message: str
    chain_id: int | None = None
    node: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clear(AlarmRequest):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmEvent:
    """Something that happened to an alarm, with the alarm as it was at that moment."""

    effect_key: str
    key: Key
    severity: str
    timestamp: datetime
    payload: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlappingPolicy:
    """What holds for all alarms: one is flapping that is raised after it was cleared `times` times within `window`."""

    times: int
    window: timedelta
    now: datetime
    permits: CooldownGate = no_cooldown

    def moment(self, request: AlarmRequest) -> datetime:
        return min(events.moment(request.timestamp_us), self.now + CLOCK_TOLERANCE)


@dataclass(slots=True, kw_only=True)
class Written:
    """Rows to write: `touched` were only seen again, `changed` are different, `new` are to be inserted."""

    touched: dict[UUID, Alarm] = field(default_factory=dict)
    changed: dict[UUID, Alarm] = field(default_factory=dict)
    new: list[Alarm] = field(default_factory=list)


class AlarmLifecycle:
    """One alarm. `rows` are the open one and those cleared not long ago, locked; requests are processed in order."""

    def __init__(self, rows: Iterable[Alarm], policy: FlappingPolicy) -> None:
        self.written = Written()
        self.alarm_events: list[AlarmEvent] = []
        self.open: Alarm | None = None
        self._cleared: list[Alarm] = []
        self._policy = policy
        for row in rows:
            if row.state == Alarm.State.CLEARED:
                self._cleared.append(row)
            else:
                self.open = row
        self._was_open = self.open is not None

    @property
    def contested(self) -> Alarm | None:
        """The new row that another transaction may have come before with."""
        is_new = self.open is not None and self.open._state.adding
        return self.open if is_new and not self._was_open else None

    def apply(self, requests: Iterable[Raise | Clear]) -> None:
        for request in requests:
            moment = self._policy.moment(request)
            if isinstance(request, Clear):
                self._clear(request, moment)
            elif self.open is not None:
                self._raise_again(request, self.open, moment)
            elif not self._comes_late(moment) and self._may(request):
                self._raise(request, moment)

    def _comes_late(self, moment: datetime) -> bool:
        """Whether it was raised at that time or later, or cleared later. When a person cleared it does not count: that is
        a time by our clock, and the sender's may be behind."""
        return any(moment <= row.last_raised_at or moment < row.last_event_at for row in self._cleared)

    def _may(self, request: AlarmRequest) -> bool:
        return self._policy.permits(request.cooldown, request.effect_key)

    def _raise(self, request: Raise, moment: datetime) -> None:
        since = moment - self._policy.window
        recent = [row for row in self._cleared if row.cleared_at and row.cleared_at > since]
        flapping = next((row for row in recent if row.is_flapping), None)
        if flapping is not None:
            self._reopen(flapping, request, moment)
            return
        row = self.open = _new(request, moment)
        row.is_flapping = len(recent) >= self._policy.times
        self.written.new.append(row)
        self._tell(Change.FLAPPING if row.is_flapping else Change.RAISED, row, request, moment)

    def _reopen(self, row: Alarm, request: Raise, moment: datetime) -> None:
        """An alarm that is flapping keeps its row, and who has acknowledged it need not do so each time."""
        self._cleared.remove(row)
        self.open = row
        row.state = Alarm.State.ACKNOWLEDGED if row.acknowledged_at else Alarm.State.ACTIVE
        row.cleared_at, row.cleared_by = None, ""
        row.raised_at = row.last_raised_at = row.last_event_at = moment
        row.times_raised += 1
        row.message = request.message
        self._note(row)
        if RANK[request.severity] > RANK[row.severity]:
            self._escalate(request, row, moment)

    def _raise_again(self, request: Raise, row: Alarm, moment: datetime) -> None:
        if moment < row.raised_at:
            return
        if moment > row.last_event_at:
            row.last_raised_at = row.last_event_at = moment
            row.times_raised += 1
            if not row._state.adding:
                self.written.touched[row.uuid] = row
        if RANK[request.severity] > RANK[row.severity] and self._may(request):
            self._escalate(request, row, moment)

    def _escalate(self, request: Raise, row: Alarm, moment: datetime) -> None:
        """Who has acknowledged a warning has not acknowledged that it became critical."""
        row.severity, row.message, row.state = request.severity, request.message, Alarm.State.ACTIVE
        row.acknowledged_at, row.acknowledged_by = None, ""
        self._note(row)
        self._tell(Change.SEVERITY_RAISED, row, request, moment)

    def _clear(self, request: Clear, moment: datetime) -> None:
        row = self.open
        if row is None or moment <= row.last_event_at or not self._may(request):
            return
        row.state, row.cleared_at, row.cleared_by = Alarm.State.CLEARED, moment, request.actor[:150]
        row.last_event_at = moment
        self._note(row)
        self.open = None
        self._cleared.append(row)
        if not row.is_flapping:
            self._tell(Change.CLEARED, row, request, moment)

    def _note(self, row: Alarm) -> None:
        if not row._state.adding:
            self.written.changed[row.uuid] = row

    def _tell(self, change: Change, row: Alarm, request: AlarmRequest, moment: datetime) -> None:
        self.alarm_events.append(alarm_event(change, row, effect_key=request.effect_key, by=request.actor, at=moment))


def _new(request: Raise, moment: datetime) -> Alarm:
    return Alarm(
        organization_id=request.organization_id,
        source_type=request.source_type,
        originator_uuid=UUID(request.originator_uuid),
        type=request.type,
        severity=request.severity,
        message=request.message,
        chain_id=request.chain_id,
        node=request.node,
        raised_at=moment,
        last_raised_at=moment,
        last_event_at=moment,
    )


def alarm_event(change: Change, row: Alarm, *, effect_key: str, by: str, at: datetime) -> AlarmEvent:
    """The row as it is now, in the words of the API."""
    originator = str(row.originator_uuid)
    return AlarmEvent(
        effect_key=effect_key,
        key=(row.organization_id, row.source_type, originator, row.type),
        severity=str(row.severity),
        timestamp=at,
        payload={
            "alarm": str(row.uuid),
            "change": change.value,
            "type": row.type,
            "severity": str(row.severity),
            "state": str(row.state),
            "message": row.message,
            "sourceType": row.source_type,
            "originator": originator,
            "raisedAt": row.raised_at.isoformat(),
            "timesRaised": row.times_raised,
            "isFlapping": row.is_flapping,
            "by": by,
        },
    )
