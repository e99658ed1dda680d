"""Commands to devices: record how far each has come (queued, sent, applied, failed, expired), in bulk.

queued -> sent -> acknowledged -> applied or failed; expired when it was not sent or not acknowledged by its deadline. A state
never goes backwards, whoever writes last; a device that answers late is still believed.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

import msgspec
from django.conf import settings
from django.db import transaction
from django.db.models import Case, F, QuerySet, Value, When
from django.db.models.functions import Coalesce
from django.utils import timezone
from redis.exceptions import RedisError

from aemos.lib import redis
from aemos.lib.batched import batched
from devices import latest
from devices.latest import Latest
from devices.models import DeviceState, StateChange

log = logging.getLogger(__name__)
T = TypeVar("T")
State = StateChange.CommandState
# From left to right only. What has expired was perhaps sent all the same: by a gateway that died before it could say so.
_ORDER = (State.QUEUED, State.SENT, State.EXPIRED, State.ACKNOWLEDGED, State.FAILED, State.APPLIED)
_SETTLED = frozenset({State.EXPIRED, State.FAILED, State.APPLIED})
# Names in one statement: below the 999 parameters that the oldest SQLite takes.
STATEMENT_ROWS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledgement:
    """What a device says about one command: acknowledged, applied, or failed with an `error`."""

    device_uuid: UUID
    command_uuid: UUID
    state: State
    error: str = ""


class NewChange(msgspec.Struct, kw_only=True):
    """The row of a StateChange before it is written, by the names of its fields: a model's object takes ten times as long."""

    uuid: UUID
    effect_key: str
    state: DeviceState
    value: Any
    previous: Any
    source: str
    actor: str
    timestamp: datetime
    command_state: str = ""
    deadline: datetime | None = None
    command_error: str = ""

    @property
    def state_id(self) -> int:
        return self.state.pk


def deadline() -> datetime:
    """After which a command that is queued now is not sent any more."""
    return timezone.now() + timedelta(seconds=settings.COMMAND_EXPIRY_SECONDS)


def note_sent(uuids: Sequence[UUID], *, at: datetime | None = None) -> None:
    """Of changes that are no commands, or do not exist, nothing is noted."""
    is_behind = When(command_state=State.QUEUED, then=Value(State.SENT))
    for rows in _commands(uuids):
        rows.filter(sent_at=None).update(
            sent_at=at or timezone.now(), command_state=Case(is_behind, default=F("command_state"))
        )


def note_applied(uuids: Sequence[UUID]) -> None:
    """The device reports the value that these commands wished for."""
    for rows in _commands(uuids):
        rows.exclude(command_state=State.APPLIED).update(
            command_state=State.APPLIED, settled_at=timezone.now(), command_error=""
        )


def expire_overdue(now: datetime | None = None) -> list[StateChange]:
    """Commands that nobody has sent, or no device acknowledged, by their deadline: those that expire by this, some at a time, in
    the current transaction."""
    now = now or timezone.now()
    overdue = StateChange.objects.filter(command_state__in=[State.QUEUED, State.SENT], deadline__lt=now)
    locked = overdue.select_for_update(of=("self",)).select_related("state__device").order_by("id")
    rows = list(locked[:STATEMENT_ROWS])
    if rows:
        ids = [row.pk for row in rows]
        StateChange.objects.filter(pk__in=ids).update(command_state=State.EXPIRED, settled_at=now)
        log.warning("%d commands to devices were not acknowledged by their deadline, and have expired", len(rows))
    return rows


def under_way(now: datetime | None = None) -> QuerySet[StateChange]:
    """Commands that were sent, are not acknowledged and may still be sent, oldest first."""
    rows = StateChange.objects.filter(command_state=State.SENT, deadline__gt=now or timezone.now())
    return rows.select_related("state__device__organization").order_by("id")


def momentary_under_way(devices: Collection[UUID]) -> QuerySet[StateChange]:
    """Momentary commands of these devices that may still be obeyed and are not acknowledged, oldest first."""
    rows = StateChange.objects.filter(
        state__device__uuid__in=devices,
        state__kind=DeviceState.Kind.MOMENTARY,
        command_state__in=[State.QUEUED, State.SENT],
        deadline__gt=timezone.now(),
    )
    return rows.select_related("state__device").order_by("id")


def acknowledge(said: Sequence[Acknowledgement]) -> list[Acknowledgement]:
    """Notes what devices say; gives what names no command of the device that says it, and of that nothing is noted.

    A command that was applied is also a report of its value. Raises django.db.Error, and then nothing is noted.
    """
    known = {row.uuid: row for row in _rows([each.command_uuid for each in said])}
    foreign = [each for each in said if not _is_of(each.device_uuid, known.get(each.command_uuid))]
    accepted = [each for each in said if each not in foreign]
    with transaction.atomic():
        applied = [known[each.command_uuid] for each in accepted if each.state is State.APPLIED]
        # Who says it again answers a repetition, and may have done the opposite since.
        reported = _report([row for row in applied if row.command_state != State.APPLIED])
        for (state, error), uuids in _alike(accepted).items():
            _advance(uuids, state, error=error)
    _remember(reported)
    return foreign


def _advance(uuids: Sequence[UUID], state: State, *, error: str) -> None:
    now = timezone.now()
    behind = _ORDER[: _ORDER.index(state)]
    settled: dict[str, Any] = {"settled_at": now if state in _SETTLED else None}
    for rows in _commands(uuids):
        rows.filter(command_state__in=behind).update(
            command_state=state, acknowledged_at=Coalesce(F("acknowledged_at"), now), command_error=error, **settled
        )


def _report(rows: Sequence[StateChange]) -> list[tuple[DeviceState, datetime]]:
    """States, locked in the order of their ids as everywhere, that devices now say to have."""
    if not rows:
        return []
    now = timezone.now()
    wanted = {row.state_id for row in rows}
    locked = DeviceState.objects.select_for_update(of=("self",)).filter(pk__in=wanted).order_by("pk")
    states = {state.pk: state for state in locked.select_related("device")}
    heard = [
        states[row.state_id]
        for row in rows
        if row.state_id in states and states[row.state_id].report(row.value, at=now)
    ]
    DeviceState.objects.bulk_update(heard, ["reported_value", "reported_at", "differs_since"])
    return [(state, now) for state in heard]


def _remember(reported: Iterable[tuple[DeviceState, datetime]]) -> None:
    """After the commit: what rules see."""
    values = {
        ("device", str(state.device.uuid), state.name): Latest(state.reported_value, int(at.timestamp() * 1_000_000))
        for state, at in reported
    }
    try:
        latest.remember(values)
    except RedisError as error:
        log.warning("Rules see %d reported states late: %s", len(values), redis.explain(error))


def _alike(said: Iterable[Acknowledgement]) -> dict[tuple[State, str], list[UUID]]:
    found: defaultdict[tuple[State, str], list[UUID]] = defaultdict(list)
    for each in said:
        found[each.state, each.error].append(each.command_uuid)
    return found


def _is_of(device_uuid: UUID, row: StateChange | None) -> bool:
    return row is not None and row.state.device.uuid == device_uuid


def _rows(uuids: Sequence[UUID]) -> Iterator[StateChange]:
    for rows in _commands(uuids):
        yield from rows.select_related("state__device")


def _commands(uuids: Sequence[UUID]) -> Iterator[QuerySet[StateChange]]:
    """The rows with these uuids that are commands, in as many queries as one statement has room for."""
    for batch in batched(uuids, STATEMENT_ROWS):
        yield StateChange.objects.filter(uuid__in=batch).exclude(command_state="")
