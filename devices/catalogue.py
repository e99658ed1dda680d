"""A cache of tokens, sensors, devices and their variables in this process.

Loaded from the database on first use and kept until the organization's CatalogueVersion moves, which is looked at no more
than once a second: no query per event, and a revoked token is refused within about a second.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from django.db import Error as DatabaseError
from django.db import transaction
from django.db.models import F, Model, Prefetch
from django.db.models.signals import m2m_changed, post_delete, post_save

from aemos.lib.per_process import per_process
from devices import tokens
from devices.models import (
    CatalogueVersion,
    Device,
    DeviceState,
    DeviceToken,
    Interlock,
    Organization,
    Requirement,
    Sensor,
    Variable,
)
from devices.quality.limits import Limits
from devices.values import value_problem

log = logging.getLogger(__name__)
SECOND_US = 1_000_000
REFRESH_SECONDS = 1.0
# A change moves a version by one. So many at once say that even what did not change is to be built again.
BUILD = 2**32
# Guessed tokens must neither cost a query each nor fill the memory.
MAXIMUM_UNKNOWN = 10_000


@dataclass(frozen=True, slots=True)
class Field:
    """A variable of a sensor or a state of a device. `id` is the row's.

    `limits` say which values of a variable are suspect. After `maximum_age_us` rules see it as missing; 0 is never. `requires`:
    the variables, as devices.latest.Key, that the interlock of a state looks at. `is_guarded`: a command to it may be vetoed.
    """

    id: int
    datatype: str
    allowed_values: tuple[Any, ...] = ()
    limits: Limits | None = None
    maximum_age_us: int = 0
    requires: tuple[tuple[str, str, str], ...] = ()
    is_momentary: bool = False
    is_guarded: bool = False

    def problem_with(self, value: object) -> str:
        """Why the field cannot take the value, as the end of a sentence; empty when it can."""
        problem = value_problem(value, self.datatype)
        if not problem and self.allowed_values and value not in self.allowed_values:
            return f"must be one of {list(self.allowed_values)}"
        return problem


@dataclass(frozen=True, slots=True)
class Originator:
    """A sensor or a device as events see it. `fields`: name -> variable (sensor) or state (device).

    Without `has_clock` its events happen when they are received. `late_after_us` is None where LATE_AFTER_SECONDS holds.
    """

    source_type: str
    id: int
    uuid: str
    name: str
    organization_id: int
    organization_uuid: str
    fields: Mapping[str, Field]
    has_clock: bool = True
    late_after_us: int | None = None


@dataclass(frozen=True, slots=True)
class Credential:
    """A live token: whose it is and what it may claim. `expires_at` is in epoch seconds, infinity for never."""

    prefix: str
    digest: str
    highest_priority: int
    expires_at: float
    originator: Originator


class Catalogue:
    """The cache. One per process; every method may be called from any greenlet."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._checked_at = float("-inf")
        self._versions: dict[int, int] = {}
        self._credentials: dict[str, Credential] = {}
        self._unknown: set[str] = set()
        self._originators: dict[tuple[str, str], Originator] = {}
        self._strongest: dict[tuple[str, str], Credential | None] = {}
        # Moves with every forgetting: what a query began to read before it must not be kept after it.
        self._generation = 0

    def credential(self, token: str) -> Credential | None:
        """The live credential of a token as the sender showed it; None when there is none."""
        self.refresh()
        prefix = tokens.prefix_of(token)
        if not prefix or prefix in self._unknown:
            return None
        found = self._credentials.get(prefix) or self._load_credential(prefix)
        if found is None or found.expires_at <= self._wall_clock() or not tokens.matches(token, found.digest):
            return None
        return found

    def credential_of(self, source_uuid: str) -> Credential | None:
        """The most capable live credential of a sensor or device that a trusted party (the broker) has authenticated."""
        self.refresh()
        for source_type in ("sensor", "device"):
            key = (source_type, source_uuid)
            found = self._strongest[key] if key in self._strongest else self._load_strongest(key)
            if found is not None and found.expires_at > self._wall_clock():
                return found
        return None

    def originator(self, source_type: str, uuid: str) -> Originator | None:
        """As `originators`, for one; a look into a dictionary when it is known."""
        self.refresh()
        key = (source_type, uuid)
        return self._originators.get(key) or self.originators([key]).get(key)

    def originators(self, wanted: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Originator]:
        """(source type, uuid) -> originator, for those that exist; at most two queries for all that are not known yet."""
        self.refresh()
        wanted = set(wanted)
        known = {key: self._originators[key] for key in wanted if key in self._originators}
        generation = self._generation
        loaded: dict[tuple[str, str], Originator] = {}
        for source_type in ("sensor", "device"):
            uuids = [uuid for kind, uuid in wanted if kind == source_type and (kind, uuid) not in known]
            if uuids:
                loaded |= {(source_type, row.uuid): row for row in _load_originators(source_type, uuid__in=uuids)}
        if generation == self._generation:
            self._originators |= loaded
        return known | loaded

    def refresh(self, *, at_once: bool = False) -> None:
        """Forgets what belongs to organizations whose version moved; looks at most once a second unless `at_once`."""
        now = self._clock()
        if not at_once and now - self._checked_at < REFRESH_SECONDS:
            return
        self._checked_at = now  # before the query: other greenlets use what is known instead of queueing up
        try:
            versions = dict(CatalogueVersion.objects.values_list("organization_id", "version"))
        except DatabaseError as error:
            log.warning("Tokens and sensors cannot be refreshed, the last known ones are used: %s", error)
            return
        changed = {
            key for key in self._versions.keys() | versions.keys() if self._versions.get(key) != versions.get(key)
        }
        self._versions = versions
        self._unknown.clear()
        if changed:
            self._forget(changed)

    def _forget(self, organizations: set[int]) -> None:
        self._generation += 1
        self._credentials = {
            k: v for k, v in self._credentials.items() if v.originator.organization_id not in organizations
        }
        self._originators = {k: v for k, v in self._originators.items() if v.organization_id not in organizations}
        self._strongest = {
            k: v
            for k, v in self._strongest.items()
            if v is not None and v.originator.organization_id not in organizations
        }

    def _load_credential(self, prefix: str) -> Credential | None:
        generation = self._generation
        row = DeviceToken.objects.live().filter(prefix=prefix).select_related("sensor", "device").first()
        if row is None:
            if len(self._unknown) < MAXIMUM_UNKNOWN:
                self._unknown.add(prefix)
            return None
        found = self._credential_from(row)
        if generation == self._generation:
            self._credentials[prefix] = found
        return found

    def _load_strongest(self, key: tuple[str, str]) -> Credential | None:
        generation = self._generation
        source_type, uuid = key
        row = (
            DeviceToken.objects.live()
            .filter(**{f"{source_type}__uuid": uuid})
            .select_related("sensor", "device")
            .order_by("highest_priority", F("expires_at").desc(nulls_first=True))
            .first()
        )
        found = self._credential_from(row) if row else None
        if generation == self._generation and (found or len(self._strongest) < MAXIMUM_UNKNOWN):
            self._strongest[key] = found
        return found

    def _credential_from(self, row: DeviceToken) -> Credential:
        source_type = "sensor" if row.sensor_id else "device"
        key = (source_type, str(row.owner.uuid))
        return Credential(
            prefix=row.prefix,
            digest=row.digest,
            highest_priority=row.highest_priority,
            expires_at=row.expires_at.timestamp() if row.expires_at else float("inf"),
            originator=self.originators([key])[key],
        )


@per_process
def shared() -> Catalogue:
    """The catalogue of this process."""
    return Catalogue()


def _load_originators(source_type: str, **filters: Any) -> list[Originator]:
    model: type[Sensor] | type[Device] = Sensor if source_type == "sensor" else Device
    related = "variables" if source_type == "sensor" else "states"
    states = DeviceState.objects.prefetch_related("excluded_by", "interlock__requirements__variable__sensor")
    fields: str | Prefetch[Any] = related if source_type == "sensor" else Prefetch("states", states)
    rows = model.objects.filter(**filters).select_related("organization").prefetch_related(fields)
    return [
        Originator(
            source_type=source_type,
            id=row.pk,
            uuid=str(row.uuid),
            name=row.name,
            organization_id=row.organization_id,
            organization_uuid=str(row.organization.uuid),
            fields={field.name: _field(field) for field in getattr(row, related).all()},
            has_clock=not isinstance(row, Sensor) or row.clock != Sensor.Clock.NONE,
            late_after_us=_late_after_us(row),
        )
        for row in rows
    ]


def _late_after_us(row: Sensor | Device) -> int | None:
    seconds = row.late_after_seconds if isinstance(row, Sensor) else None
    return None if seconds is None else seconds * SECOND_US


def _field(row: Variable | DeviceState) -> Field:
    if isinstance(row, DeviceState):
        interlock = getattr(row, "interlock", None)
        requires = tuple(each.key for each in interlock.requirements.all()) if interlock else ()
        return Field(
            row.pk,
            row.datatype,
            tuple(row.allowed_values),
            requires=requires,
            is_momentary=row.is_momentary,
            is_guarded=bool(interlock or row.locked_until or row.excluded_by.all()),
        )
    maximum_age_us = (row.maximum_age_seconds or 0) * SECOND_US
    return Field(row.pk, row.datatype, limits=_limits(row), maximum_age_us=maximum_age_us)


def _limits(row: Variable) -> Limits | None:
    if row.minimum is row.maximum is row.maximum_step is row.stuck_after_seconds is None:
        return None
    return Limits(
        minimum=row.minimum,
        maximum=row.maximum,
        step=row.maximum_step,
        step_us=row.maximum_step_seconds * SECOND_US,
        stuck_after_us=None if row.stuck_after_seconds is None else row.stuck_after_seconds * SECOND_US,
    )


def mark_changed(organization_id: int) -> None:
    """Moves the organization's version in the current transaction; every process notices within about a second."""
    if not CatalogueVersion.objects.filter(pk=organization_id).update(version=F("version") + 1):
        CatalogueVersion.objects.get_or_create(organization_id=organization_id)


def rebuild_all() -> int:
    """Moves the version of every organization so far that nothing is kept that was built from it; gives how many there are."""
    with transaction.atomic():
        missing = Organization.objects.exclude(pk__in=CatalogueVersion.objects.values("pk"))
        CatalogueVersion.objects.bulk_create(
            [CatalogueVersion(organization=each) for each in missing], ignore_conflicts=True
        )
        return CatalogueVersion.objects.update(version=F("version") + BUILD)


def is_same_build(one: int | None, other: int | None) -> bool:
    """Whether, of what was built at one version, that may be kept at the other which itself did not change."""
    return (one or 0) // BUILD == (other or 0) // BUILD


def connect_signals() -> None:
    for model in (Organization, Sensor, Variable, Device, DeviceState, DeviceToken, Interlock, Requirement):
        post_save.connect(_on_save, sender=model, dispatch_uid="catalogue")
        post_delete.connect(_on_delete, sender=model, dispatch_uid="catalogue")
    m2m_changed.connect(_on_save, sender=Interlock.excludes.through, dispatch_uid="catalogue")


def organization_of(row: Model) -> int | None:
    """The id of the organization that a row of the catalogue belongs to."""
    if isinstance(row, Organization):
        return row.pk
    if isinstance(row, Variable):
        return row.sensor.organization_id
    if isinstance(row, DeviceState):
        return row.device.organization_id
    if isinstance(row, Interlock):
        return row.state.device.organization_id
    if isinstance(row, Requirement):
        return row.interlock.state.device.organization_id
    found: int = row.organization_id  # type: ignore[attr-defined]
    return found


def _on_save(instance: Model, **_: Any) -> None:
    organization_id = organization_of(instance)
    if organization_id is not None:
        mark_changed(organization_id)


def _on_delete(instance: Model, **_: Any) -> None:
    """Only moves a version that exists: in the deletion of a whole organization its row goes, too."""
    organization_id = organization_of(instance)
    CatalogueVersion.objects.filter(pk=organization_id).update(version=F("version") + 1)
