"""What the page of a device shows: its states and what limits them, commands and their life, vetoes, presence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from devices.interlocks.models import Interlock, Veto
from devices.interlocks.words import describe
from devices.models import Device, StateChange
from pages import overview
from pages.overview import StateRow

CHANGES_SHOWN = 50
VETOES_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePage:
    rows: Sequence[StateRow]
    limits: Sequence[tuple[str, str]]
    changes: Sequence[StateChange]
    vetoes: Sequence[Veto]


def of(device: Device) -> DevicePage:
    interlocks = Interlock.objects.filter(state__device=device).select_related("state")
    described = [(row.state.name, describe(row)) for row in interlocks.prefetch_related("excludes", "requirements")]
    changes = StateChange.objects.filter(state__device=device).select_related("state").order_by("-timestamp", "-id")
    vetoes = Veto.objects.filter(state__device=device).select_related("state").order_by("-last_at")
    states = list(device.states.all())
    actors = overview.actors_of(states)
    return DevicePage(
        rows=[overview.state_row(state, actors) for state in states],
        limits=[(name, text) for name, text in described if text],
        changes=list(changes[:CHANGES_SHOWN]),
        vetoes=list(vetoes[:VETOES_SHOWN]),
    )
