"""Alarms about devices that no chain raises: what an interlock vetoed, and commands that nobody acknowledged."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from uuid import uuid4

from django.db import transaction
from django.db.models import Max
from django.db.models.functions import Coalesce
from django.utils import timezone

from devices import commands
from devices.models import DeviceState, StateChange
from rules import events
from rules.effects import alarms
from rules.effects.alarm_lifecycle import Raise
from rules.effects.states import VetoedRequest
from rules.models import Alarm, Severity

SYSTEM = "aemos"
UNACKNOWLEDGED = "commands not acknowledged"
# A device that answers a command later than this is waited for until it answers the next one.
ANSWERED_WITHIN = timedelta(days=1)


def expire_commands() -> int:
    """A periodic task: commands that no device acknowledged in time expire, with one alarm for each device, which ends when the
    device acknowledges a command again. Gives how many expired. Raises django.db.Error."""
    _clear_answered()
    number = 0
    while expired := _expire_some():
        number += expired
    return number


def _expire_some() -> int:
    with transaction.atomic():
        expired = commands.expire_overdue()
        newest = {row.state.device_id: row for row in expired}
        outgoing = alarms.apply(
            [
                raised(row.state, UNACKNOWLEDGED, f"{row.state} = {row.value!r} was not acknowledged in time")
                for row in newest.values()
            ]
        )
    alarms.publish(outgoing)
    return len(expired)


def _clear_answered() -> None:
    open_ = Alarm.objects.filter(type=UNACKNOWLEDGED, source_type=events.DEVICE).exclude(state=Alarm.State.CLEARED)
    since = dict(open_.values_list("originator_uuid", "last_raised_at"))
    if not since:
        return
    # By the index of times: every second, and a device may have changed a million times.
    earliest = min(since.values()) - ANSWERED_WITHIN
    heard = StateChange.objects.filter(state__device__uuid__in=since, timestamp__gt=earliest)
    heard = heard.exclude(command_state=commands.State.EXPIRED)
    at = Coalesce("acknowledged_at", "settled_at")
    newest = (
        heard.annotate(at=at).filter(at__gt=min(since.values())).values_list("state__device__uuid").annotate(Max("at"))
    )
    answered = [uuid for uuid, at in newest if at > since[uuid]]
    if answered:
        alarms.clear(open_.filter(originator_uuid__in=answered), by=SYSTEM)


def of_vetoes(vetoed: Sequence[VetoedRequest]) -> list[Raise]:
    """For the states whose interlock asks for it; of one state the first of a batch."""
    by_state = {each.state.pk: each for each in reversed(vetoed) if each.alarm}
    return [
        raised(each.state, f"{each.state.name} vetoed", f"{each.state} vetoed {each.request.actor}: {each.veto.detail}")
        for each in by_state.values()
    ]


def raised(state: DeviceState, kind: str, message: str, *, severity: Severity = Severity.WARNING) -> Raise:
    """An alarm of that type at the state's device."""
    return Raise(
        effect_key=f"device:{uuid4()}",
        organization_id=state.device.organization_id,
        source_type=events.DEVICE,
        originator_uuid=str(state.device.uuid),
        type=kind[:100],
        timestamp_us=events.microseconds(timezone.now()),
        actor=SYSTEM,
        severity=severity,
        message=message[:500],
    )
