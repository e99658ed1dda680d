"""What the overview shows: an organization in; tiles of values, devices and open alarms out, in a few queries for any farm."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from django.db.models import QuerySet
from django.utils import timezone
from django.utils.timesince import timesince
from django.utils.translation import gettext as _

from devices import latest
from devices.areas.models import within
from devices.latest import Latest
from devices.models import Area, Device, DeviceState, Organization, Sensor, StateChange, Variable
from devices.permissions import Access
from devices.units import AS_STORED, Scale, Units
from devices.values import Datatype
from rules.effects import alarms
from rules.models import Alarm

ALARMS_SHOWN = 50
# Of sensors, and of devices: what a person can look at, and a phone can renew every ten seconds.
SHOWN = 40
# A sensor that said nothing for so long is shown as silent.
SILENT_AFTER = timedelta(hours=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One variable: its newest good value as text, empty without one, and how old that is."""

    variable: Variable
    scale: Scale
    text: str
    age: timedelta | None
    suspicion: str
    missed: str
    has_chart: bool

    @property
    def is_silent(self) -> bool:
        return self.age is not None and self.age > SILENT_AFTER

    @property
    def age_text(self) -> str:
        """In the largest unit that fits: 5 minutes, 3 hours, 2 days."""
        now = timezone.now()
        return timesince(now - (self.age or timedelta()), now, depth=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SensorTiles:
    sensor: Sensor
    tiles: Sequence[Tile]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateRow:
    """One state of a device: what it should be, who said so, and what a person may switch it to."""

    state: DeviceState
    text: str
    actor: str
    choices: Sequence[str]
    is_locked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCard:
    device: Device
    rows: Sequence[StateRow]
    may_switch: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    sensors: Sequence[SensorTiles]
    devices: Sequence[DeviceCard]
    alarms: Sequence[Alarm]
    sensor_count: int
    device_count: int
    page: int
    pages: int
    # The ids of those that the person may acknowledge.
    acknowledgeable: Collection[int]
    may_add: bool

    @property
    def is_empty(self) -> bool:
        return not (self.sensors or self.devices)


def of(
    organization: Organization,
    access: Access,
    *,
    units: Units = AS_STORED,
    area: Area | None = None,
    search: str = "",
    page: int = 1,
) -> Overview:
    """What stands in the area or its parts. `search`: a part of the names of sensors and devices; `units` of values.

    Raises RedisError when newest values cannot be read.
    """
    wanted: dict[str, Any] = {"organization": organization, "name__icontains": search}
    open_alarms = Alarm.objects.filter(organization=organization).exclude(state=Alarm.State.CLEARED)
    if area is not None:
        wanted["area__in"] = here = within(area)
        open_alarms = alarms.standing_in(open_alarms, here)
    sensors = Sensor.objects.filter(**wanted).order_by("name")
    devices = Device.objects.filter(**wanted).order_by("name")
    sensor_count, device_count = sensors.count(), devices.count()
    pages = max(1, -(-max(sensor_count, device_count) // SHOWN))
    page = min(max(page, 1), pages)
    shown = slice((page - 1) * SHOWN, page * SHOWN)
    found = list(open_alarms.select_related("chain").order_by("-raised_at")[:ALARMS_SHOWN])
    return Overview(
        sensors=_sensors(sensors[shown], units),
        devices=_devices(devices[shown], access),
        alarms=found,
        sensor_count=sensor_count,
        device_count=device_count,
        page=page,
        pages=pages,
        acknowledgeable=set(alarms.changeable(open_alarms, access).values_list("pk", flat=True)) if found else set(),
        may_add=access.may("add", "sensors", organization.pk),
    )


def _sensors(rows: QuerySet[Sensor], units: Units) -> list[SensorTiles]:
    found = rows.prefetch_related("variables")
    sensors = [(sensor, sorted(sensor.variables.all(), key=lambda each: each.name)) for sensor in found]
    wanted = [("sensor", str(sensor.uuid), variable.name) for sensor, variables in sensors for variable in variables]
    known = latest.recall(wanted)
    return [
        SensorTiles(
            sensor=sensor,
            tiles=[
                _tile(variable, known.get(("sensor", str(sensor.uuid), variable.name)), units) for variable in variables
            ],
        )
        for sensor, variables in sensors
    ]


def _tile(variable: Variable, found: Latest | None, units: Units) -> Tile:
    has_value = found is not None and found.value is not None
    scale = units.scale_of(variable.unit)
    return Tile(
        variable=variable,
        scale=scale,
        text=as_text(scaled(found.value, scale)) if found and has_value else "",
        age=timezone.now() - datetime.fromtimestamp(found.heard_us / 1e6, UTC) if found and has_value else None,
        suspicion=found.suspicion if found else "",
        missed=_missed(variable, found.value, scale) if found and has_value else "",
        has_chart=variable.datatype != Datatype.STRING,
    )


def _missed(variable: Variable, value: object, scale: Scale) -> str:
    """How a value lies to the target range: "below 5.5"."""
    limit = variable.missed_target(value)
    if limit is None:
        return ""
    phrase = _("below {limit}") if limit == variable.target_minimum else _("above {limit}")
    return phrase.format(limit=as_text(scale.shown(limit)))


def scaled(value: Any, scale: Scale) -> Any:
    """A number in the unit that somebody wants; anything else as it is."""
    return scale.shown(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def as_text(value: Any) -> str:
    """A number with four digits that count, as a display would show it."""
    if isinstance(value, bool):
        return _("yes") if value else _("no")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _devices(rows: QuerySet[Device], access: Access) -> list[DeviceCard]:
    devices = list(rows.prefetch_related("states"))
    actors = actors_of(state for device in devices for state in device.states.all())
    return [
        DeviceCard(
            device=device,
            rows=[state_row(state, actors) for state in device.states.all()],
            may_switch=access.may("add", "state-changes", device.organization_id, area=device.area_id),
        )
        for device in devices
    ]


def actors_of(states: Iterable[DeviceState]) -> dict[UUID, str]:
    """Of each command that a state comes from, who gave it: a person, or a rule and its step. One query."""
    wanted = {state.command_uuid for state in states if state.command_uuid}
    return dict(StateChange.objects.filter(uuid__in=wanted).values_list("uuid", "actor")) if wanted else {}


def state_row(state: DeviceState, actors: Mapping[UUID, str]) -> StateRow:
    is_level = state.kind == DeviceState.Kind.LEVEL
    value, _ = state.newest if is_level else (None, None)
    choices = [as_text(each) for each in state.allowed_values] if is_level else []
    if is_level and not choices and state.datatype == Datatype.BOOLEAN:
        choices = ["yes", "no"]
    locked = state.locked_until is not None and state.locked_until > timezone.now()
    is_commanded = value is not None and state.command_uuid is not None and value == state.value
    return StateRow(
        state=state,
        text="" if value is None else as_text(value),
        actor=actors.get(state.command_uuid, "") if is_commanded and state.command_uuid else "",
        choices=() if locked else choices,
        is_locked=locked,
    )
