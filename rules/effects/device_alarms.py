"""Alarms about devices that no chain raises: what an interlock vetoed, and commands that nobody acknowledged."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

from django.utils import timezone

from devices.models import DeviceState
from rules import events
from rules.effects.alarm_lifecycle import Raise
from rules.effects.states import VetoedRequest
from rules.models import Severity

INTERLOCK = "aemos"


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
        actor=INTERLOCK,
        severity=severity,
        message=message[:500],
    )
